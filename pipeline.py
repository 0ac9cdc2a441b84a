"""All of RLHF without RL, on the embedded task, in one go: each phase is one call of a script's main.

    python pipeline.py              about 4 minutes on 2 cores
    python pipeline.py --smoke      20 seconds: the same steps on next to nothing, to see that they run

    1   train_sft    a small language model learns to write film reviews
    2a  sample       it answers prompts, k times each
    2b  annotate     simulated people rank the answers: the gold reward, seen through noise
    2c  train_rm     a reward model learns from the rankings
    3   train_dpo    policies learn from the same rankings, on three leashes
    3'  again        a policy that learnt from the first half answers the prompts of the second half itself; its answers
                     are ranked, and it goes on from there (iterative DPO)
        evaluate     all of them on prompts that none has seen

The question at the end: is it better to learn from answers of one's own than from as many of the first model's? Reward
is bought with KL, so the second round is compared with one-shot policies at the KL that it has itself: the gold rewards
of the two around it, interpolated prompt by prompt. (The chord of a curve that flattens lies a little below it, which
favours the second round: hence three policies, not two.)
"""

import json
import statistics
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import annotate
import evaluate
import sample
import train_dpo
import train_rm
import train_sft
from rlhf import require, reviews
from rlhf.runs import cli, mean_interval

SMOKE = {  # under --smoke: flags of each script, and rows of the embedded data
    "sft": {"max_steps": 2, "eval_prompts": 4},
    "sample": {"max_new_tokens": 8},
    "train": {"max_steps": 2, "eval_prompts": 4, "max_new_tokens": 8},
    "evaluate": {"eval_prompts": 8, "max_new_tokens": 8},
}
SMOKE_ROWS = {"sft": 60, "prompts": 40, "preference": 8}


@dataclass
class Args:
    out: str = "runs/pipeline"
    """folder of all run directories and files; one that is in use is never overwritten"""
    prompts: int = 4000
    """prompts that are answered and ranked, >= 16; half of them in each round"""
    k: int = 4
    """answers to each prompt, in [2, 9]"""
    noise: float = reviews.NOISE
    """of the simulated annotators, in gold reward, >= 0 (Plackett-Luce)"""
    betas: tuple[float, ...] = (0.6, 0.3, 0.15)
    """leashes of two or more one-shot policies, per nat, > 0; both rounds of the iterated one have the first"""
    smoke: bool = False
    """a few steps of everything, which checks that it runs and says nothing about the methods"""
    resume: bool = False
    """go on where a run with the same flags was stopped"""
    device: str = train_sft.Args.device
    """torch device"""
    seed: int = 0
    """of every phase"""


def main(a: Args) -> dict[str, float]:
    """Runs what is not complete yet, and returns the comparison at matched KL."""
    out, flags = Path(a.out), {n: x for n, x in json.loads(json.dumps(asdict(a))).items() if n != "resume"}
    require(a.prompts >= 16, f"--prompts must be at least 16, not {a.prompts}")
    require(2 <= a.k <= 9, f"--k must be in [2, 9], not {a.k}")
    require(len({*a.betas}) == len(a.betas) > 1 and min(a.betas) > 0, f"--betas must differ and be above 0: {a.betas}")
    begun = out / "args.json"
    require(a.resume or not begun.exists(), f"--out {out} is there already: use --resume, or name another --out")
    if a.resume:
        require(begun.exists(), f"--resume: {out} holds no pipeline to continue")
        require(json.loads(begun.read_text()) == flags, f"--resume: {out} was run with other flags: see {begun}")
    out.mkdir(parents=True, exist_ok=True)
    begun.write_text(json.dumps(flags, indent=1))
    common = {"device": a.device, "seed": a.seed}
    smoke = defaultdict(dict, SMOKE if a.smoke else {})
    place = lambda name: str(out / name)  # noqa: E731
    data = dict.fromkeys(SMOKE_ROWS, "reviews")
    for kind, n in SMOKE_ROWS.items() if a.smoke else ():
        data[kind] = place(f"reviews-{kind}.jsonl")
        Path(data[kind]).write_text("".join(json.dumps(row) + "\n" for _, row in reviews.rows(kind, n, 1)), "utf-8")

    def train(script, name: str, **flags) -> None:
        """Train runs/pipeline/NAME, unless that is done; go on with it if it was begun."""
        print(f"\n{'=' * 100}\n{script.__name__} -> {place(name)}\n")
        if not (out / name / "results.json").exists():
            resume = (out / name / "args.json").exists()
            script.main(script.Args(out=place(name), resume=resume, **common, **flags))

    def rank(name: str, model: str, data: str, prompts: int | None) -> None:
        """Sample `prompts` prompts of `data` from a model, and have the answers ranked: NAME.jsonl."""
        print(f"\n{'=' * 100}\nsample, annotate -> {place(name)}.jsonl\n")
        samples = out / f"{name}-samples.jsonl"
        if (out / f"{name}.jsonl").exists():
            return
        flags = {"k": a.k, "max_prompts": prompts, "resume": samples.exists(), **common, **smoke["sample"]}
        sample.main(sample.Args(model=place(model), data=data, out=str(samples), **flags))
        annotate.main(annotate.Args(str(samples), out=place(f"{name}.jsonl"), by="gold", noise=a.noise, seed=a.seed))

    # ------------------------------------------------------------------------- phase 1, 2a, 2b, 2c: a model that ranks
    train(train_sft, "sft", data=data["sft"], **smoke["sft"])
    rank("preferences", "sft", data["prompts"], a.prompts)
    train(train_rm, "rm", model=place("sft"), data=place("preferences.jsonl"), batch_size=16, **smoke["train"])

    # -------------------------------------------------------------------------------- phase 3: from all of it, one shot
    dpo = {"batch_size": 16, "eval_prompts": 64, "ref_cache": place("ref_cache"), **smoke["train"]}
    names = [f"dpo-{beta:g}" for beta in a.betas]
    for name, beta in zip(names, a.betas, strict=True):
        train(train_dpo, name, model=place("sft"), data=place("preferences.jsonl"), beta=beta, **dpo)

    # ------------------------------------------------------- phase 3': half of it, then its own answers to the rest
    rows = (out / "preferences.jsonl").read_text("utf-8").splitlines(keepends=True)
    for name, half in (("first", rows[: len(rows) // 2]), ("rest", rows[len(rows) // 2 :])):
        (out / f"{name}.jsonl").write_text("".join(half), "utf-8")
    train(train_dpo, "round1", model=place("sft"), data=place("first.jsonl"), beta=a.betas[0], **dpo)
    rank("second", "round1", place("rest.jsonl"), None)
    train(train_dpo, "round2", model=place("round1"), data=place("second.jsonl"), beta=a.betas[0], **dpo)

    # ---------------------------------------------------------------------------------------------------------- compare
    names = [place(name) for name in ("sft", "round1", "round2", *names)]
    print(f"\n{'=' * 100}\nevaluate -> {place('evaluate')}\n")
    if not (out / "evaluate" / "results.json").exists():
        resume = (out / "evaluate" / "args.json").exists()
        flags = {
            "reward": "gold",
            "data": data["preference"],
            "out": place("evaluate"),
            "resume": resume,
            **common,
            **smoke["evaluate"],
        }
        evaluate.main(evaluate.Args(models=tuple(names), **flags))
    found: dict[str, dict[str, list[float]]] = {name: {"kl": [], "reward": []} for name in names}
    for line in open(out / "evaluate" / "samples.jsonl", encoding="utf-8"):
        row = json.loads(line)
        for name in ("kl", "reward"):
            found[row["model"]][name].append(row[name])
    results = matched(found[names[2]], [found[name] for name in names[3:]])
    print(f"\n{verdict(results)}")
    (out / "results.json").write_text(json.dumps(results, indent=1))
    return results


def matched(ours: dict, others: Sequence[dict]) -> dict[str, float]:
    """Gold reward of a policy minus that of others at its KL: w lower + (1 - w) upper, of the two that are next to it,
    with w so that the mean KL is the same. The mean over prompts of the difference, with its 95 % interval. Where all
    others lie on one side w is not in [0, 1], and the comparison extrapolates."""
    mean_kl = lambda x: statistics.fmean(x["kl"])  # noqa: E731
    others = sorted(others, key=mean_kl)
    above = sum(mean_kl(x) < mean_kl(ours) for x in others)
    lower, upper = others[max(min(above, len(others) - 1) - 1, 0) :][:2]
    gap = mean_kl(upper) - mean_kl(lower)
    w = (mean_kl(upper) - mean_kl(ours)) / gap if gap else 0.5
    rewards = zip(ours["reward"], lower["reward"], upper["reward"], strict=True)
    difference, half = mean_interval([x - w * y - (1 - w) * z for x, y, z in rewards])
    kl = dict(zip(("kl", "kl_lower", "kl_upper"), map(mean_kl, (ours, lower, upper)), strict=True))
    return {"difference": difference, "interval": half, **kl}


def verdict(found: dict[str, float]) -> str:
    """The comparison in words."""
    difference, half = found["difference"], found["interval"]
    sign = "no difference that this many prompts can show"
    if abs(difference) > half:
        sign = "the second round is better" if difference > 0 else "the second round is worse"
    between = found["kl_lower"] <= found["kl"] <= found["kl_upper"]
    return (
        f"At the second round's KL of {found['kl']:.2f} nats, gold reward minus that of one-shot DPO on as many "
        f"rankings (KL {found['kl_lower']:.2f} and {found['kl_upper']:.2f}, {'inter' if between else 'EXTRA'}polated): "
        f"{difference:+.3f} +- {half:.3f}: {sign}."
    )


if __name__ == "__main__":
    cli(main, Args)
