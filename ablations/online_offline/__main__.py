"""Online against offline DPO, with a reference that makes the best answers likely and one that does not.

    python -m ablations.online_offline            --quick, --smoke, --seeds, --jobs

Claim (Tajwar et al. 2024, arXiv 2404.14367; Tang et al. 2024, arXiv 2405.08448; Guo et al. 2024, arXiv 2402.04792):
with the same loss and as many labels, DPO on pairs that the policy has just sampled itself beats DPO on pairs that were
sampled from the reference beforehand, and more so if the reward's peak is unlikely under the reference.

Both arms are the same loop of rounds: two answers are sampled to each of some prompts (sample.py), simulated annotators
rank them (annotate.py), and train_dpo.py goes on from the round before, with the first model as its reference. Only the
sampling model differs: online the policy, offline the reference. Near: the reference is the SFT model of all reviews;
far: of those with a gold reward below -0.5, so that it rarely writes good reviews.

Criterion, written before the full run; gold reward of answers to held-out prompts, paired by seed, with 95 %
t-intervals. Reproduced: all of these are above 0. Contradicted: one is below 0. Else not resolved.

    far           online - offline at the end
    far, at KL    the same at the smaller of the two KLs at the end; the other arm's gold reward is taken where its path
                  through the rounds first has this KL, linear in sqrt(KL) between two rounds
    far - near    (online - offline, far) - (online - offline, near), at the end

Reported and not judged: the near reference; the result of the former version's rule (the smaller of the two largest KLs
on the path, linear in KL); how often the implicit reward agrees with the annotators on the reference's own pairs (Tang
et al.: offline is better at this); readable gold, that of grammatical answers and 0 for others.
"""

import json
import shutil
import statistics
from dataclasses import dataclass
from pathlib import Path

import torch

import annotate
import sample
import train_dpo
import train_sft
from ablations import common, plot
from ablations.common import markdown, paired, show, t_interval, trained, write
from support import reviews
from support.runs import cli, is_made

NAME = "online_offline"
CLAIM = "DPO on its own fresh answers beats DPO on the reference's, most where good answers are unlikely at first"
SETTINGS = {f"{arm}, {cell}": (arm, cell) for cell in ("near", "far") for arm in ("offline", "online")}
FAR = -0.5  # the far reference learns from reviews with a gold reward below this
FULL = {"rounds": 10, "prompts": 320, "held": 256, "tokens": 48, "sft": 500, "rows": 24_000}
QUICK = FULL | {"rounds": 3, "held": 128}
SMOKE = {"rounds": 2, "prompts": 16, "held": 8, "tokens": 8, "sft": 2, "rows": 400}
DPO = {"beta": 0.3, "lr": 3e-4, "batch_size": 32, "max_steps": 20, "epochs": 10, "eval_prompts": 0}
COLUMNS = {  # metric: title in the table, digits
    "gold": ("gold reward", 2),
    "readable": ("readable gold", 2),
    "kl": ("KL, nats", 2),
    "grammatical": ("grammatical", 2),
    "accuracy": ("accuracy", 3),
}


@dataclass
class Args(common.Args):
    jobs: int = 2
    """worker processes of one thread each, >= 1; the results do not depend on it"""


def main(a: Args) -> None:
    """Run what results.csv lacks, then write table and figure."""
    results, folder = common.results(NAME, a), common.work(NAME, a)
    seeds, size = (
        (range(1), SMOKE) if a.smoke else (range(min(a.seeds, 2)), QUICK) if a.quick else (range(a.seeds), FULL)
    )
    tasks = [(x, seed, folder, size) for seed in seeds for x in SETTINGS if not results.done(x, seed)]
    torch.set_num_threads(1)  # as in the processes of `each`: the numbers must not depend on the number of cores
    for cell in ("near", "far") if tasks else ():
        held_pairs(folder, cell, make_reference(folder, cell, size), size)
    for (setting, seed, *_), curve, seconds in common.each(run, tasks, 1 if a.smoke else a.jobs, folder):
        for step, values in curve.items():
            results.add(setting, seed, values, step)
        results.add(setting, seed, curve[max(curve)] | {"seconds": seconds})
    plot.finish(NAME, a, results, report, draw)


def run(setting: str, seed: int, folder: Path, size: dict) -> dict[int, dict[str, float]]:
    """One loop -> {round: values after it}."""
    (arm, cell), out = SETTINGS[setting], folder / f"{setting}-{seed}"
    shutil.rmtree(out, ignore_errors=True)  # left by an interrupted run
    out.mkdir()
    policy = ref = make_reference(folder, cell, size)
    held = common.prompts(size["rows"])[1][: size["held"]]
    flags = DPO | {
        "ref": ref,
        "seed": seed,
        "eval_data": held_pairs(folder, cell, ref, size),
        "eval_fraction": 0.0,
    }
    prompt_rows, n = [e.row for e in common.prompts(size["rows"] // 4, seed + 1)[0]], size["prompts"]
    curve = {0: measure(ref, ref, held, seed, size)}
    for i in range(1, size["rounds"] + 1):
        prompts = write(out / f"prompts-{i}.jsonl", prompt_rows[(i - 1) * n : i * n])
        ranked = rank(out, str(i), policy if arm == "online" else ref, prompts, seed, size)
        policy = trained(
            train_dpo, out / f"policy-{i}", model=policy, data=ranked, ref_cache=str(out / "cache"), **flags
        )
        evaluation = json.loads(Path(policy, "results.json").read_text())
        curve[i] = measure(policy, ref, held, seed, size) | {"accuracy": evaluation["after/eval/rewards/accuracies"]}
    return curve


def rank(out: Path, name: str, model: str, prompts: str, seed: int, size: dict) -> str:
    """The file of a model's two answers to each prompt, ranked."""
    samples, ranked = str(out / f"samples-{name}.jsonl"), str(out / f"ranked-{name}.jsonl")
    flags = {"k": 2, "max_new_tokens": size["tokens"], "seed": seed, "device": "cpu"}
    sample.main(sample.Args(model=model, data=prompts, out=samples, **flags))
    annotate.main(annotate.Args(samples, out=ranked, by="gold", seed=seed))
    return ranked


def make_reference(folder: Path, cell: str, size: dict) -> str:
    """The SFT model of all reviews (near), or of the bad ones (far)."""
    if not is_made(str(folder / cell)):
        rows = common.rows("sft", 4 * 34 * size["sft"])
        rows = [row for row in rows if cell == "near" or reviews.gold_reward(row["text"]) < FAR]
        write(folder / f"{cell}.jsonl", rows[: 34 * size["sft"]])
    flags = {"data": str(folder / f"{cell}.jsonl"), "max_steps": size["sft"], "eval_prompts": 0}
    return trained(train_sft, folder / cell, **flags)


def held_pairs(folder: Path, cell: str, ref: str, size: dict) -> str:
    """The file of ranked pairs of the reference's answers to held-out prompts."""
    if not (folder / f"ranked-{cell}.jsonl").exists():
        held = write(folder / f"held-{cell}.jsonl", [e.row for e in common.prompts(size["rows"])[1][: size["held"]]])
        return rank(folder, cell, ref, held, 0, size)
    return str(folder / f"ranked-{cell}.jsonl")


def measure(policy: str, ref: str, held, seed: int, size: dict) -> dict[str, float]:
    return {n: statistics.fmean(x) for n, x in common.measured(policy, ref, held, seed, size["tokens"]).items()}


# ----------------------------------------------------------------------------------------------------- table and figure


def path(results: common.Results, setting: str, name: str, seed: int) -> list[float]:
    """A metric after each round."""
    return [results.values(setting, name, step)[seed] for step in results.steps(setting)]


def matched(mine: list[tuple[float, float]], other: list[tuple[float, float]]) -> float:
    """Two paths (x, gold) along the rounds: gold of mine - other at the smaller of their last x."""
    nats = min(mine[-1][0], other[-1][0])
    golds = [path[-1][1] if path[-1][0] == nats else common.between(path, nats) for path in (mine, other)]
    return golds[0] - golds[1]


def clauses(results: common.Results) -> dict[str, tuple[tuple[float, float], bool]]:
    """Name -> (mean, half interval) of each difference online - offline, and whether it is in the criterion."""
    gaps, at_end, at_largest = {}, {}, {}
    for cell in ("far", "near"):
        arms = [f"{arm}, {cell}" for arm in ("online", "offline")]
        online, offline = (results.values(x, "gold") for x in arms)
        gaps[cell] = {seed: online[seed] - offline[seed] for seed in online if seed in offline}
        for seed in gaps[cell]:
            paths = [[path(results, x, name, seed) for name in ("kl", "gold")] for x in arms]
            roots = [[*zip([kl**0.5 for kl in kls], golds, strict=True)] for kls, golds in paths]
            up_to_largest = [[*zip(kls, golds, strict=True)][: kls.index(max(kls)) + 1] for kls, golds in paths]
            at_end.setdefault(cell, []).append(matched(*roots))
            at_largest.setdefault(cell, []).append(matched(*up_to_largest))
    intervals = {
        "far": (t_interval([*gaps["far"].values()]), True),
        "far, at KL": (t_interval(at_end["far"]), True),
        "far - near": (paired(gaps["far"], gaps["near"]), True),
        "near": (t_interval([*gaps["near"].values()]), False),
        "near, at KL": (t_interval(at_end["near"]), False),
    }
    return intervals | {f"{cell}, at KL by the former rule": (t_interval(x), False) for cell, x in at_largest.items()}


def report(results: common.Results) -> tuple[str, str, str]:
    """Table, verdict, effect."""
    rows = []
    for x in SETTINGS:
        cells = [show(t_interval([*results.values(x, n).values()]), digits) for n, (_, digits) in COLUMNS.items()]
        rows.append([x, *cells])
    for cell in ("near", "far"):
        start = [t_interval([*results.values(f"online, {cell}", n, 0).values()]) for n in COLUMNS if n != "accuracy"]
        rows.append([f"reference, {cell}", *(show(x) for x in start), ""])
    gains = clauses(results)
    lines = [[x, show(y, 3), common.verdict([y]), "yes" if judged else ""] for x, (y, judged) in gains.items()]
    for cell in ("far", "near"):
        x = paired(*(results.values(f"{arm}, {cell}", "accuracy") for arm in ("offline", "online")))
        lines.append([f"accuracy, offline - online: {cell}", show(x, 3), common.verdict([x]), ""])
    parts = [
        markdown(["arm, reference", *(title for title, _ in COLUMNS.values())], rows),
        markdown(["gold reward, online - offline:", "mean", "above 0?", "in the criterion"], lines),
    ]
    end, at_kl = (", ".join(f"{cell} {show(gains[cell + x][0])}" for cell in ("far", "near")) for x in ("", ", at KL"))
    effect = f"gold reward, online - offline: {end}; at equal KL: {at_kl}."
    return "\n\n".join(parts), common.verdict([y for y, judged in gains.values() if judged]), effect


def draw(results: common.Results, page) -> None:
    """Gold reward against KL along the rounds: each seed thin, and the medians."""
    panels = page.subplots(1, 2, sharey=True)
    for axes, cell in zip(panels, ("near", "far"), strict=True):
        for arm, colour in (("offline", "C1"), ("online", "C0")):
            x = f"{arm}, {cell}"
            for seed in results.values(x, "gold"):
                axes.plot(path(results, x, "kl", seed), path(results, x, "gold", seed), color=colour, alpha=0.3, lw=0.8)
            by_step = [results.values(x, n, step).values() for n in ("kl", "gold") for step in results.steps(x)]
            medians = [statistics.median(values) for values in by_step]
            kls, golds = medians[: len(by_step) // 2], medians[len(by_step) // 2 :]
            axes.plot(kls, golds, color=colour, marker="o", markersize=4, label=arm)
        axes.set_title(f"reference {cell}", fontsize=9)
        axes.set_xscale("symlog", linthresh=4)
        axes.set_xticks([0, 1, 2, 3, 4, 8, 16, 64], ["0", "1", "2", "3", "4", "8", "16", "64"])
        axes.set_xlabel("KL to the reference, nats per answer")
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    panels[0].set_ylabel("gold reward, held-out prompts")


if __name__ == "__main__":
    cli(main, Args)
