"""DPO's gradient without its weight: does the policy degenerate more, and does it lose reward at the same KL?

    python -m ablations.grad_weight            --quick, --smoke, --seeds, --jobs

Claim (Rafailov et al. 2023, section 4 and appendix C.3, arXiv 2305.18290): DPO's gradient weights each pair by how
wrong the implicit reward still is about it, and "a naive version of this method without the weighting coefficient can
cause the language model to degenerate". The paper shows samples of Unlikelihood for this, and no number. Three losses
of a pair, where h is the margin of the log-ratios of chosen and rejected response:

    DPO             -log sigmoid(beta h)                        gradient in h: -beta sigmoid(-beta h)
    weight 1/2      -beta h / 2                                 -beta / 2, DPO's at the start, throughout
    Unlikelihood    -log pi(chosen) + alpha log pi(rejected)    at alpha = 1 the same direction, 2 / beta times as long

Everything else is the same: the embedded task's SFT model, for each seed pairs of its own with the annotators' usual
noise, a tenth of them held out by their prompt, a learning rate of several times the script's default, and 240 updates,
about seven epochs. That should be at least five times DPO's optimum: the table has the update at which readable gold is
largest. At fifteen points of a run 128 answers to held-out prompts, which are in no run's pairs, are measured. Reward
at matched KL is interpolated linearly between the first two neighbouring points around it; beyond the last point of a
run it is that of the last.

Criterion, written before the full run. Differences are paired by seed, with 95 % t-intervals. Reproduced: all of these
are above 0. Contradicted: one is below 0. Else not resolved.

    entropy     at the end, nats a token: DPO - weight 1/2
    fluency     at the end, the reference's negative log-likelihood of the answers, nats a token: weight 1/2 - DPO
    reward      gold reward at KL 2, 4 and 8 nats an answer: DPO - weight 1/2

Reported and not judged: the same for Unlikelihood, which under AdamW differs from weight 1/2 only by the clipping of
gradients, and so is no second test; gold reward at the end; repeated 4-grams, at the end and at their largest along a
run; distinct-2, grammatical share, and readable gold (gold reward for grammatical answers, 0 for all others).
"""

import json
import shutil
import statistics
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import torch

import evaluate
import train_dpo
from ablations import common, plot
from ablations.common import at_checkpoints, between, markdown, paired, show, t_interval
from support import models
from support.generate import answer
from support.runs import cli

NAME = "grad_weight"
CLAIM = "without DPO's weight on each pair the policy degenerates, and has less reward at the same KL"
LOSSES = {  # added to those of train_dpo.py
    "weight 1/2": lambda a, x: -a.beta / 2 * (x.chosen - x.rejected),
    "unlikelihood": lambda a, x: x.rejected_logps - x.chosen_logps,
}
SETTINGS = {"DPO": {}, "weight 1/2": {"loss": "weight 1/2"}, "Unlikelihood": {"loss": "unlikelihood"}}
PAIRS, PROMPTS, TOKENS = 2304, 128, 48
FULL = {"beta": 0.1, "lr": 1e-3, "batch_size": 64, "epochs": 100, "max_steps": 240, "warmup": 0.05}
PLACES = (4, 8, 12, 16, 20, 24, 28, 32, 40, 48, 64, 96, 144, 192, 240)  # updates after which it measures
NATS = (2.0, 4.0, 8.0)
COLUMNS = {  # metric: column of the table, digits
    "gold": ("gold reward", 2),
    "readable": ("readable gold", 2),
    "accuracy": ("held-out accuracy", 2),
    "kl": ("KL, nats", 1),
    "entropy": ("entropy, nats", 2),
    "ref_nll": ("reference's NLL, nats", 2),
    "distinct_2": ("distinct-2", 3),
    "repeated_4": ("repeated 4-grams", 3),
    "grammatical": ("grammatical", 2),
    "length": ("length", 1),
}


@dataclass
class Args(common.Args):
    jobs: int = 2
    """processes, one thread each, >= 1; the results do not depend on it"""


# ------------------------------------------------------------------------------------------------------------- the runs


def main(a: Args) -> None:
    """Run whatever results.csv lacks, and write table and figure."""
    results, folder = common.results(NAME, a), common.work(NAME, a)
    seeds = range(1 if a.smoke or a.quick else a.seeds)
    tasks = [(x, seed, folder, a.smoke) for seed in seeds for x in SETTINGS if not results.done(x, seed)]
    torch.set_num_threads(1)  # as in the processes of `each`, so that results do not depend on the number of cores
    if tasks:
        common.sft_model(folder, a.smoke)
    for seed in sorted({seed for _, seed, *_ in tasks}):
        common.write(folder / f"pairs-{seed}.jsonl", common.rows("preference", 80 if a.smoke else PAIRS, 1 + seed))
    for (setting, seed, *_), along, seconds in common.each(run, tasks, a.jobs, folder):
        for step, values in along.items():
            results.add(setting, seed, values, step)
        results.add(setting, seed, along[max(along)] | {"seconds": seconds})
    plot.finish(NAME, a, results, report, draw)


def run(setting: str, seed: int, folder: Path, smoke: bool) -> dict[int, dict[str, float]]:
    """One run of a loss -> {step: values}, beginning with step 0, the SFT model."""
    sft, out = str(folder / "sft"), folder / f"{setting.replace(' ', '-').replace('/', '-')}-{seed}"
    tokenizer, policy, reference = models.load_tokenizer(sft), *(models.load_model(sft, "cpu") for _ in range(2))
    held = common.prompts(200)[1][:8] if smoke else common.prompts()[1][:PROMPTS]
    along: dict[int, dict[str, float]] = {}

    def look(step: int, weights: dict) -> None:
        if smoke or step in PLACES:
            policy.load_state_dict(weights)
            along[step] = measure(tokenizer, policy, reference, held, seed)

    along[0] = measure(tokenizer, policy, reference, held, seed)
    shutil.rmtree(out, ignore_errors=True)  # left by a stopped run
    flags = {"data": str(folder / f"pairs-{seed}.jsonl"), "out": str(out), "ref_cache": str(folder / "ref_cache")}
    flags |= {"eval_fraction": 0.1, "eval_every": 8, "eval_prompts": 0, "save_every": 4, "device": "cpu", "seed": seed}
    flags |= FULL | ({"max_steps": 4} if smoke else {}) | SETTINGS[setting]
    with at_checkpoints(look), mock.patch.dict(train_dpo.LOSSES, LOSSES):
        train_dpo.main(train_dpo.Args(model=sft, **flags))
    for line in open(out / "metrics.jsonl"):
        row = json.loads(line)
        if row["step"] in along and "eval/rewards/accuracies" in row:
            along[row["step"]]["accuracy"] = row["eval/rewards/accuracies"]
    shutil.rmtree(out)
    return along


@torch.no_grad()
def measure(tokenizer, policy, reference, held, seed: int) -> dict[str, float]:
    """For one answer to each prompt: means of `common.of_answers`, repeated 4-grams, distinct-2, and the means over all
    tokens of the entropy and of the reference's negative log-likelihood."""
    answers = answer(policy, tokenizer, held, TOKENS, seed)
    stats, ids = common.of_answers(policy, reference, tokenizer, answers), [e.responses[0] for e in answers]
    nll = [x * n for x, n in zip(stats.pop("ref_nll"), stats["length"], strict=True)]
    return {name: statistics.fmean(x) for name, x in stats.items()} | {
        "entropy": common.entropies(policy, tokenizer, answers).mean().item(),
        "ref_nll": sum(nll) / sum(stats["length"]),
        "distinct_2": evaluate.distinct(ids, 2),
        "repeated_4": statistics.fmean(repeated(x, 4) for x in ids),
    }


def repeated(ids: list[int], n: int) -> float:
    """1 - distinct n-grams / n-grams of an answer; 0 if it has none. Welleck et al. 2020, arXiv 1908.04319."""
    grams = [tuple(ids[i : i + n]) for i in range(len(ids) - n + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


# ----------------------------------------------------------------------------------------------------- table and figure


def matched(results: common.Results, setting: str, metric: str, nats: float) -> dict[int, float]:
    """Seed -> a metric at a KL along a run."""
    steps, by_seed = results.steps(setting), {}
    for seed in results.seeds():
        points = [tuple(results.values_of[setting, seed, step, name] for name in ("kl", metric)) for step in steps]
        by_seed[seed] = between(points, nats)
    return by_seed


def most(results: common.Results, setting: str, metric: str) -> dict[int, tuple[float, int]]:
    """Seed -> the largest value of a metric along a run, and its step."""
    steps = results.steps(setting)
    return {s: max((results.values_of[setting, s, step, metric], step) for step in steps) for s in results.seeds()}


def differences(results: common.Results, other: str) -> dict[str, tuple[float, float]]:
    """Differences of DPO and another loss, above 0 by the claim, with half intervals; first the criterion's five."""
    of_dpo, of_other = (lambda metric, x=x: results.values(x, metric) for x in ("DPO", other))
    pairs = {
        f"entropy at the end: DPO - {other}": paired(of_dpo("entropy"), of_other("entropy")),
        f"reference's NLL at the end: {other} - DPO": paired(of_other("ref_nll"), of_dpo("ref_nll")),
    }
    for nats in NATS:
        both = (matched(results, x, "gold", nats) for x in ("DPO", other))
        pairs[f"gold reward at KL {nats:g}: DPO - {other}"] = paired(*both)
    pairs[f"gold reward at the end: DPO - {other}"] = paired(of_dpo("gold"), of_other("gold"))
    pairs[f"repeated 4-grams at the end: {other} - DPO"] = paired(of_other("repeated_4"), of_dpo("repeated_4"))
    return pairs


def clauses(results: common.Results) -> dict[str, tuple[float, float]]:
    """Clause of the criterion -> mean and half its interval."""
    return dict([*differences(results, "weight 1/2").items()][: 2 + len(NATS)])


def report(results: common.Results) -> tuple[str, str, str]:
    """Tables, verdict, effect."""

    def row(x: str, step: int | None = None) -> list[str]:
        return [show(t_interval([*results.values(x, n, step).values()]), d) for n, (_, d) in COLUMNS.items()]

    rows = [["SFT", *row("DPO", 0)], *([x, *row(x)] for x in SETTINGS)]
    along, at_kl = [], []
    for x in SETTINGS:
        best, repeats, far = (most(results, x, metric).values() for metric in ("readable", "repeated_4", "kl"))
        cells = [show(t_interval([y for y, _ in best])), show(t_interval([float(step) for _, step in best]), 0)]
        for values, digits in ((repeats, 2), (far, 0)):
            cells += [show(t_interval([y for y, _ in values]), digits), f"{max(y for y, _ in values):.{digits}f}"]
        along.append([x, *cells])
        both = ((nats, metric) for nats in NATS for metric in ("gold", "readable"))
        at_kl.append([x, *(show(t_interval([*matched(results, x, n, nats).values()])) for nats, n in both)])
    judged, compared = clauses(results), []
    for x in [*SETTINGS][1:]:
        for name, y in differences(results, x).items():
            compared.append([name, show(y, 3), common.verdict([y]) if name in judged else "not judged"])
    largest = ["repeated 4-grams", "in the worst seed", "KL, nats", "in the farthest seed"]
    header = [f"{name}, KL {nats:g}" for nats in NATS for name in ("gold", "readable")]
    parts = [
        markdown(["at the end", *(title for title, _ in COLUMNS.values())], rows),
        markdown(["largest along a run", "readable gold", "after so many updates", *largest], along),
        markdown(["at matched KL", *header], at_kl),
        markdown(["difference (claim: above 0)", "mean", ""], compared),
    ]
    named = {name.replace(": ", ", "): y for name, y in judged.items()}
    effect = "; ".join(f"{name}: {show(y, 3)}" for name, y in named.items()) + "."
    return "\n\n".join(parts), common.verdict([*judged.values()]), effect


def draw(results: common.Results, page) -> None:
    """Gold reward against KL along the runs, and entropy and fluency along the steps; means over seeds."""
    axes_of = page.subplots(1, 3)
    for x, colour in zip(SETTINGS, ("C0", "C1", "C3"), strict=True):
        steps = results.steps(x)
        mean = lambda metric, x=x, steps=steps: [t_interval([*results.values(x, metric, s).values()])[0] for s in steps]  # noqa: E731
        axes_of[0].plot(mean("kl"), mean("gold"), marker="o", markersize=3, color=colour, label=x)
        axes_of[0].plot(mean("kl"), mean("readable"), linestyle="--", linewidth=1, color=colour)
        axes_of[1].plot(steps, mean("entropy"), marker="o", markersize=3, color=colour, label=x)
        axes_of[2].plot(steps, mean("ref_nll"), marker="o", markersize=3, color=colour, label=x)
    axes_of[0].plot([], [], "k--", linewidth=1, label="readable gold")
    axes_of[0].set_xscale("symlog", linthresh=1)
    axes_of[0].set_xlabel("KL to SFT, nats per answer", fontsize=8)
    axes_of[0].set_title("gold reward", fontsize=9)
    axes_of[1].set_title("entropy, nats per token", fontsize=9)
    axes_of[2].set_title("reference's NLL, nats per token", fontsize=9)
    for axes in axes_of:
        axes.grid(alpha=0.3)
        axes.tick_params(labelsize=7)
    for axes in axes_of[1:]:
        axes.set_xlabel("updates", fontsize=8)
    axes_of[0].legend(fontsize=6)


if __name__ == "__main__":
    cli(main, Args)
