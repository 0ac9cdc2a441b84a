"""PPO's details, one at a time: one flag of train_ppo.py is changed, all else is the same.

    python -m ablations.ppo_tricks            --quick, --smoke, --seeds, --jobs

Claims. Huang et al. 2024 (arXiv 2403.17031, detail 24): whitened rewards make answers less preferred and shorter.
Ahmadian et al. 2024 (RLOO, arXiv 2402.14740): the clip hardly ever acts, and the bias of a GAE lambda below 1 does not
pay. Ouyang et al. 2022 (InstructGPT, arXiv 2203.02155, appendix E.7): a KL coefficient of 0 and one that is too large
are both poor. For each seed a reward model learns from noisy rankings of its own, and PPO is run against it with each
change. The objective is the reward model's score less 0.3, the baseline's coefficient, times the KL, whatever the run
itself maximises; the utility is the same with gold reward, on answers to held-out prompts.

Criterion, written before the full run; means paired by seed, with 95 % t-intervals. Reproduced: all of these are above
0. Contradicted: one is below 0. Else not resolved.

    whitening    gold reward, and length: baseline - rewards whitened ("scale": their mean stays, as in the code of
                 Ziegler et al. 2019, TRL and Huang et al.)
    clip         0.05 - the share of tokens that the clip acts on, in the baseline
    lambda       objective: lambda 1 - lambda 0
    KL           utility: baseline - KL coefficient 0, and baseline - KL coefficient 10

Reported and not judged: the same for "shift", which also subtracts the rewards' mean; lambda 1 - baseline (0.95); all
other differences to the baseline. The patches of this folder (*.diff) are not run here.
"""

import json
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

import train_ppo
import train_rm
from ablations import common, plot
from ablations.common import markdown, paired, show, t_interval, trained, write
from support.runs import cli

NAME = "ppo_tricks"
CLAIM = (
    "whitened rewards lower gold reward and shorten answers; the clip hardly acts; lambda 1 beats lambda 0; "
    "both extremes of the KL coefficient lower the utility, gold - 0.3 KL"
)
BASELINE = "baseline"
SETTINGS = {
    BASELINE: {},
    "rewards whitened, scale": {"whiten_rewards": "scale"},
    "rewards whitened, shift": {"whiten_rewards": "shift"},
    "advantages as they are": {"whiten_advantages": False},
    "critic starts at 0": {"value_init": "zero"},
    "critic starts as policy": {"value_init": "policy"},
    "no clip": {"clip_range": 1e6},
    "lambda 0": {"lam": 0.0},
    "lambda 1": {"lam": 1.0},
    "KL coefficient 0": {"kl_coef": 0.0},
    "KL coefficient 2": {"kl_coef": 2.0},
    "KL coefficient 10": {"kl_coef": 10.0},
    "adaptive KL, to 2 nats": {"kl_target": 2.0},
}
SHORT = (BASELINE, "rewards whitened, scale", "lambda 0", "lambda 1")  # settings of a quick or smoke run
KL_COEF = 0.3
FULL = {"batch_size": 16, "max_steps": 24, "max_new_tokens": 48}
QUICK = FULL | {"max_steps": 6}
SMOKE = {"batch_size": 4, "max_steps": 2, "max_new_tokens": 8}
COLUMNS = {  # metric: title in the table, digits
    "objective": ("objective", 2),
    "gold": ("gold reward", 2),
    "readable": ("readable gold", 2),
    "utility": ("utility", 2),
    "kl": ("KL, nats", 2),
    "length": ("length", 1),
    "ended": ("ended", 3),
    "explained": ("explained variance", 2),
    "clipped": ("clipped", 3),
    "entropy": ("entropy", 2),
}
DIFFERENCES = ("objective", "gold", "utility", "kl", "length", "explained")


@dataclass
class Args(common.Args):
    jobs: int = 2
    """worker processes of one thread each, >= 1; the results do not depend on it"""


def main(a: Args) -> None:
    """Run what results.csv lacks, then write table and figure."""
    results, folder = common.results(NAME, a), common.work(NAME, a)
    seeds, size = (1, SMOKE) if a.smoke else (2, QUICK) if a.quick else (a.seeds, FULL)
    settings = SHORT if a.smoke or a.quick else [*SETTINGS]
    tasks = [(x, seed, folder, size) for seed in range(seeds) for x in settings if not results.done(x, seed)]
    if tasks:
        prepare(folder, range(seeds), a.smoke)
    for (setting, seed, *_), (final, curve), seconds in common.each(run, tasks, 1 if a.smoke else a.jobs, folder):
        for step, values in curve.items():
            results.add(setting, seed, values, step)
        results.add(setting, seed, final | {"seconds": seconds})
    plot.finish(NAME, a, results, report, draw)


def prepare(folder: Path, seeds: Sequence[int], smoke: bool) -> None:
    """The SFT model, and for each seed its prompts, its rankings and a reward model trained on them."""
    torch.set_num_threads(1)  # as in the processes of `each`: the numbers must not depend on the number of cores
    short, sft = {"max_steps": 2} if smoke else {}, common.sft_model(folder, smoke)
    for seed in seeds:
        write(folder / f"prompts-{seed}.jsonl", common.rows("prompts", 3000, seed + 1))
        data = write(folder / f"rankings-{seed}.jsonl", common.rows("preference", 60 if smoke else 1000, seed))
        flags = {"data": data, "batch_size": 16, "epochs": 2, "seed": seed, "eval_prompts": 0}
        trained(train_rm, folder / f"rm-{seed}", model=sft, **flags | short)


def run(setting: str, seed: int, folder: Path, size: dict):
    """One PPO run -> values at its end, and {rollout: objective, explained variance} along it."""
    smoke, sft, out = size == SMOKE, str(folder / "sft"), folder / f"{setting}-{seed}"
    flags = {"data": str(folder / f"prompts-{seed}.jsonl"), "kl_coef": KL_COEF, "seed": seed, "eval_prompts": 0}
    policy = trained(train_ppo, out, model=sft, reward=str(folder / f"rm-{seed}"), **flags | size | SETTINGS[setting])

    lines = [json.loads(line) for line in open(out / "metrics.jsonl")]
    mean = lambda name, rows: statistics.fmean(row[name] for row in rows)  # noqa: E731
    objective = lambda rows: mean("objective/scores", rows) - KL_COEF * mean("objective/kl", rows)  # noqa: E731
    held = common.prompts(400 if smoke else 24_000)[1][:256]
    per_answer = common.measured(policy, sft, held, seed, size["max_new_tokens"])
    end = {name: statistics.fmean(values) for name, values in per_answer.items()}
    last = lines[-len(lines) // 4 :]
    end |= {"utility": end["gold"] - KL_COEF * end["kl"], "objective": objective(last)}
    end |= {"explained": mean("val/explained_variance", last), "entropy": mean("objective/entropy", lines[-1:])}
    end["clipped"] = mean("policy/clipfrac", lines)
    chunks = [lines[i : i + 2] for i in range(0, len(lines), 2)]
    explained = lambda chunk: mean("val/explained_variance", chunk)  # noqa: E731
    return end, {chunk[-1]["step"]: {"objective": objective(chunk), "explained": explained(chunk)} for chunk in chunks}


# ----------------------------------------------------------------------------------------------------- table and figure


def settings_of(results: common.Results) -> list[str]:
    return [x for x in SETTINGS if results.values(x, "gold")]


def clauses(results: common.Results) -> dict[str, tuple[tuple[float, float], bool]]:
    """Name -> (mean, half interval) of each difference, and whether it is in the criterion."""
    whitened, differences = "rewards whitened", {}
    for x in ("scale", "shift"):
        for name in ("gold", "length"):
            title = f"{COLUMNS[name][0]}: baseline - {whitened}, {x}"
            differences[title] = BASELINE, f"{whitened}, {x}", name, x == "scale"
    differences["objective: lambda 1 - lambda 0"] = "lambda 1", "lambda 0", "objective", True
    differences["objective: lambda 1 - lambda 0.95"] = "lambda 1", BASELINE, "objective", False
    for x in ("0", "10"):
        differences[f"utility: baseline - KL coefficient {x}"] = BASELINE, f"KL coefficient {x}", "utility", True
    below = [0.05 - x for x in results.values(BASELINE, "clipped").values()]
    intervals = {"0.05 minus the share clipped": (t_interval(below), True)}
    for title, (x, y, name, judged) in differences.items():
        if results.values(x, name) and results.values(y, name):
            intervals[title] = paired(results.values(x, name), results.values(y, name)), judged
    return intervals


def report(results: common.Results) -> tuple[str, str, str]:
    """Table, verdict, effect."""
    rows, changes = [], []
    for x in settings_of(results):
        rows.append([x, *(show(t_interval([*results.values(x, n).values()]), k) for n, (_, k) in COLUMNS.items())])
        if x != BASELINE:
            pairs = [paired(results.values(x, n), results.values(BASELINE, n)) for n in DIFFERENCES]
            cells = [f"**{show(y)}**" if abs(y[0]) > y[1] else show(y) for y in pairs]
            changes.append([x, *cells])
    intervals = clauses(results)
    parts = [
        markdown(["change", *(title for title, _ in COLUMNS.values())], rows),
        markdown(["change - baseline (bold: not 0)", *(COLUMNS[n][0] for n in DIFFERENCES)], changes),
        markdown(
            ["difference (claim: above 0)", "mean", "above 0?", "in the criterion"],
            [[x, show(y, 3), common.verdict([y]), "yes" if judged else ""] for x, (y, judged) in intervals.items()],
        ),
    ]
    criterion = {x: y for x, (y, judged) in intervals.items() if judged}
    clipped = show(t_interval([*results.values(BASELINE, "clipped").values()]), 3)
    others = [f"{x.replace(': ', ', ')}: {show(y, 3)}" for x, y in criterion.items() if "clipped" not in x]
    effect = "; ".join([f"share clipped: {clipped} (claim: below 0.05)", *others]) + "."
    return "\n\n".join(parts), common.verdict([*criterion.values()]), effect


def draw(results: common.Results, page) -> None:
    """Objective along the run; changes of objective and gold reward against the baseline at the end."""
    left, right = page.subplots(1, 2, width_ratios=[2, 3])
    settings = settings_of(results)
    for x in settings:
        steps = results.steps(x)
        means = [statistics.fmean(results.values(x, "objective", step).values()) for step in steps]
        left.plot(steps, means, linewidth=2 if x == BASELINE else 1, color="black" if x == BASELINE else None, label=x)
    left.set_xlabel("rollout")
    left.set_title("objective, means over seeds", fontsize=9)
    left.legend(fontsize=5)
    for i, (name, colour) in enumerate((("objective", "C1"), ("gold", "C0"))):
        changes = [paired(results.values(x, name), results.values(BASELINE, name)) for x in settings[1:]]
        means, halves = zip(*changes, strict=True)
        ys, bars = [row + 0.2 * i for row in range(len(changes))], [half if half < 10 else 0.0 for half in halves]
        right.errorbar(means, ys, xerr=bars, fmt="o", markersize=4, capsize=2, color=colour, label=COLUMNS[name][0])
    right.axvline(0, color="black", linewidth=0.5)
    right.set_yticks(range(len(settings) - 1), settings[1:], fontsize=7)
    right.set_title("change - baseline at the end", fontsize=9)
    right.legend(fontsize=7)
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.tick_params(labelsize=7)


if __name__ == "__main__":
    cli(main, Args)
