"""Run RLHF without RL on the embedded task, from SFT to evaluation. Each phase is one call of a script's main.

    python pipeline.py              two to three minutes on 2 cores
    python pipeline.py --smoke      20 seconds: the same phases on very little data, to check that they run

    1   train_sft    a small language model learns to write film reviews
    2a  sample       it answers prompts, k times each
    2b  annotate     simulated annotators rank the answers by gold reward plus noise
    2c  train_rm     a reward model learns from the rankings
    3   train_dpo    policies learn from the same rankings, one for each beta (one-shot DPO)
    3'  again        iterative DPO: a policy learns from the first half of the rankings and answers the prompts of the
                     second half; its answers are ranked, and it continues to learn from them
        evaluate     all policies, on prompts that none of them has seen

The final comparison asks whether it is better to learn from a policy's own answers than from the same number of
answers by the SFT model. A higher reward costs a higher KL, so the policy of the second round is compared with
one-shot policies at its own KL: the gold rewards of the two policies with the nearest KLs below and above are
interpolated linearly, prompt by prompt. The reward-KL curve flattens, so the interpolation lies slightly below the
curve and favours the second round; three one-shot policies instead of two keep this error small.
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
from rlhf import require
from support import read_json, read_json_lines, reviews
from support.report import mean_interval
from support.runs import cli, write

SMOKE = {  # with --smoke: the flags of each script, and below the number of rows of the embedded data
    "sft": {"max_steps": 2, "eval_prompts": 4},
    "sample": {"max_new_tokens": 8},
    "train": {"max_steps": 2, "eval_prompts": 4, "max_new_tokens": 8},
    "evaluate": {"eval_prompts": 8, "max_new_tokens": 8},
}
SMOKE_ROWS = {"sft": 60, "prompts": 40, "preference": 8}


@dataclass
class Args:
    out: str = "runs/pipeline"
    """folder for all run directories and files; an existing pipeline in it is never overwritten"""
    prompts: int = 4000
    """number of prompts to answer and rank, >= 16; half of them in each round"""
    k: int = 4
    """answers to each prompt, in [2, 9]"""
    noise: float = reviews.NOISE
    """noise of the simulated annotators, in gold reward, >= 0 (Plackett-Luce)"""
    betas: tuple[float, ...] = (0.6, 0.3, 0.1)
    """DPO's beta for each of two or more one-shot policies, per nat, > 0; both rounds of iterative DPO use the first"""
    smoke: bool = False
    """a few steps of everything, to check that it runs; the results say nothing about the methods"""
    resume: bool = False
    """continue a stopped run that had the same flags"""
    device: str = train_sft.Args.device
    """torch device"""
    seed: int = 0
    """random seed of every phase"""


def main(a: Args) -> dict[str, float]:
    """Run the phases that are not complete yet, and return the comparison at matched KL."""
    out, flags = Path(a.out), {n: x for n, x in json.loads(json.dumps(asdict(a))).items() if n != "resume"}
    require(a.prompts >= 16, f"--prompts must be at least 16, not {a.prompts}")
    require(2 <= a.k <= 9, f"--k must be in [2, 9], not {a.k}")
    require(len({*a.betas}) == len(a.betas) > 1 and min(a.betas) > 0, f"--betas must differ and be above 0: {a.betas}")
    args_file = out / "args.json"
    require(a.resume or not args_file.exists(), f"--out {out} is there already: use --resume, or name another --out")
    if a.resume:
        require(args_file.exists(), f"--resume: {out} holds no pipeline to continue")
        same_flags = read_json(args_file) == flags
        require(same_flags, f"--resume: {out} was run with other flags: see {args_file}")
    out.mkdir(parents=True, exist_ok=True)
    write(args_file, json.dumps(flags, indent=1))
    common = {"device": a.device, "seed": a.seed}
    smoke = defaultdict(dict, SMOKE if a.smoke else {})
    path = lambda name: str(out / name)  # noqa: E731
    data = dict.fromkeys(SMOKE_ROWS, "reviews")
    for kind, n in SMOKE_ROWS.items() if a.smoke else ():
        data[kind] = path(f"reviews-{kind}.jsonl")
        Path(data[kind]).write_text("".join(json.dumps(row) + "\n" for _, row in reviews.rows(kind, n, 1)), "utf-8")

    def train(script, name: str, **flags) -> None:
        """Train the model OUT/NAME, or resume its training, unless it is complete."""
        print(f"\n{'=' * 100}\n{script.__name__} -> {path(name)}\n")
        if not (out / name / "results.json").exists():
            resume = (out / name / "args.json").exists()
            script.main(script.Args(out=path(name), resume=resume, **common, **flags))

    def rank(name: str, model: str, data: str, prompts: int | None) -> None:
        """Let a model answer `prompts` prompts of `data` (None: all), and rank the answers: OUT/NAME.jsonl."""
        print(f"\n{'=' * 100}\nsample, annotate -> {path(name)}.jsonl\n")
        samples = out / f"{name}-samples.jsonl"
        if (out / f"{name}.jsonl").exists():
            return
        flags = {"k": a.k, "max_prompts": prompts, "resume": samples.exists(), **common, **smoke["sample"]}
        sample.main(sample.Args(model=path(model), data=data, out=str(samples), **flags))
        flags = {"out": path(f"{name}.jsonl"), "noise": a.noise, "resume": (out / f"{name}.jsonl.partial").exists()}
        annotate.main(annotate.Args(str(samples), by="gold", seed=a.seed, **flags))

    # ----------------------------------------------------- phases 1, 2a, 2b, 2c: SFT, samples, rankings, reward model
    train(train_sft, "sft", data=data["sft"], **smoke["sft"])
    rank("preferences", "sft", data["prompts"], a.prompts)
    train(train_rm, "rm", model=path("sft"), data=path("preferences.jsonl"), batch_size=16, **smoke["train"])

    # ------------------------------------------------------------------------ phase 3: one-shot DPO on all rankings
    dpo = {"batch_size": 16, "eval_prompts": 64, "ref_cache": path("ref_cache"), **smoke["train"]}
    one_shot = [f"dpo-{beta:g}" for beta in a.betas]
    for name, beta in zip(one_shot, a.betas, strict=True):
        train(train_dpo, name, model=path("sft"), data=path("preferences.jsonl"), beta=beta, **dpo)

    # ---------------------------------- phase 3': iterative DPO, on half of the rankings and then on its own answers
    rows = (out / "preferences.jsonl").read_text("utf-8").splitlines(keepends=True)
    for name, half in (("first", rows[: len(rows) // 2]), ("rest", rows[len(rows) // 2 :])):
        (out / f"{name}.jsonl").write_text("".join(half), "utf-8")
    train(train_dpo, "round1", model=path("sft"), data=path("first.jsonl"), beta=a.betas[0], **dpo)
    rank("second", "round1", path("rest.jsonl"), None)
    train(train_dpo, "round2", model=path("round1"), data=path("second.jsonl"), beta=a.betas[0], **dpo)

    # ---------------------------------------------------------------------------------------------------- comparison
    names = [path(name) for name in ("sft", "round1", "round2", *one_shot)]
    print(f"\n{'=' * 100}\nevaluate -> {path('evaluate')}\n")
    if not (out / "evaluate" / "results.json").exists():
        resume = (out / "evaluate" / "args.json").exists()
        flags = {"reward": "gold", "data": data["preference"], "out": path("evaluate"), "resume": resume}
        evaluate.main(evaluate.Args(models=tuple(names), **flags, **common, **smoke["evaluate"]))
    measured: dict[str, dict[str, list[float]]] = {name: {"kl": [], "reward": []} for name in names}
    for row in read_json_lines(out / "evaluate" / "samples.jsonl", "model", "kl", "reward"):
        for metric in ("kl", "reward"):
            measured[row["model"]][metric].append(row[metric])
    results = matched(measured[names[2]], [measured[name] for name in names[3:]])
    write(out / "results.json", json.dumps(results, indent=1))
    print(f"\n{verdict(results)}")
    return results


def matched(ours: dict, others: Sequence[dict]) -> dict[str, float]:
    """Mean over prompts of the gold reward of `ours` minus that of the others at the same KL, with its 95 % interval.

    The others' reward is w lower + (1 - w) upper. lower and upper are the two policies with the nearest mean KLs, and w
    makes the mean KLs equal. If all others lie on one side, w is outside [0, 1] and the comparison extrapolates."""
    mean_kl = lambda x: statistics.fmean(x["kl"])  # noqa: E731
    others = sorted(others, key=mean_kl)
    below = sum(mean_kl(x) < mean_kl(ours) for x in others)
    lower, upper = others[max(min(below, len(others) - 1) - 1, 0) :][:2]
    gap = mean_kl(upper) - mean_kl(lower)
    w = (mean_kl(upper) - mean_kl(ours)) / gap if gap else 0.5
    rewards = zip(ours["reward"], lower["reward"], upper["reward"], strict=True)
    difference, half = mean_interval([x - w * y - (1 - w) * z for x, y, z in rewards])
    kl = dict(zip(("kl", "kl_lower", "kl_upper"), map(mean_kl, (ours, lower, upper)), strict=True))
    return {"difference": difference, "interval": half, **kl}


def verdict(results: dict[str, float]) -> str:
    """The results of `matched` in one sentence."""
    difference, half = results["difference"], results["interval"]
    conclusion = "no difference that this many prompts can show"
    if abs(difference) > half:
        conclusion = "the second round is better" if difference > 0 else "the second round is worse"
    kl, lower, upper = (results[name] for name in ("kl", "kl_lower", "kl_upper"))
    method = "interpolated" if lower <= kl <= upper else "EXTRApolated"
    return (
        f"At the second round's KL of {kl:.2f} nats, gold reward minus that of one-shot DPO on as many rankings "
        f"(KL {lower:.2f} and {upper:.2f}, {method}): {difference:+.3f} +- {half:.3f}: {conclusion}."
    )


if __name__ == "__main__":
    cli(main, Args)
