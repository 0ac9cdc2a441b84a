"""Length: how much of a small bias of the data for longer answers each loss turns into longer answers.

    python -m ablations.length            --quick, --smoke, --seeds

Claim (Park et al. 2024, arXiv 2403.19159; Meng et al. 2024, arXiv 2405.14734): where the preferred answer is a little
longer more often than not, DPO's answers become much longer, and those of losses that see the length do not: R-DPO,
which takes a penalty per token off the reward, and DPO per token and SimPO, which see means over tokens. On the
embedded task, whose gold reward is a mean over opinion words and has no use for length. Of 50 %, 60 % or 70 % of the
pairs of the annotators, chosen at random among those of different lengths, the preferred answer is the longer one.

Each method has three trials, on pairs of their own with validation prompts: DPO, DPO per token and SimPO of beta, of
which that one is taken, by interpolation between the three, at which the KL to the SFT model is TARGET on pairs of
50 %, so that methods are compared at about one KL; R-DPO, at DPO's beta, of its penalty, of which the one is taken
whose answers, on pairs of 60 %, are nearest to the SFT model's length. Then all run for as many steps on one set of
pairs for each seed and bias.

Criterion, written before the full run. `ratio` is the mean length of sampled answers to test prompts over that of the
SFT model's, `slope` is what the ratio gains from 50 % to 70 %, per 10 points. Paired by seed, 95 % t-intervals.
Reproduced: all of these are above 0. Contradicted: one is below 0. Else not resolved.

    exploits   slope of DPO
    do not     slope of DPO - that of R-DPO, of DPO per token, of SimPO
    how much   at 60 %: ratio of DPO - 1.2, and 1.1 - ratio of DPO per token
    control    at 50 %: 1.1 - the ratio of each method
"""

import itertools
import math
import random
import statistics
from collections.abc import Sequence
from pathlib import Path

import torch

import train_dpo
from ablations import common, plot
from ablations.common import markdown, paired, show, t_interval, trained
from rlhf import reviews
from rlhf.runs import cli

NAME = "length"
CLAIM = "a small length bias of the data makes DPO's answers longer, and not those of losses that see the length"
METHODS = {  # flags, and those of the three trials
    "DPO": ({"loss": "dpo"}, "beta", (0.05, 0.2, 0.8)),
    "DPO per token": ({"loss": "dpo_norm"}, "beta", (0.5, 2.0, 8.0)),
    "SimPO": ({"loss": "simpo"}, "beta", (2.0, 8.0, 32.0)),
    "R-DPO": ({"loss": "r_dpo"}, "length_penalty", (0.02, 0.05, 0.1)),
}
BIASES = (0.5, 0.6, 0.7)
SETTINGS = {f"{method} {bias:.0%}": {} for method in METHODS for bias in BIASES}
TRIALS = {f"{method} {flag} {x:g}": (method, x) for method, (_, flag, values) in METHODS.items() for x in values}
TRIAL_SEED = 1000  # of the trials' pairs
TARGET = 0.4  # nats, on validation prompts
PAIRS = 1800  # a tenth of them held out
PROMPTS, TEST, VALIDATION = 6000, 256, 128  # prompts; of the tenth that is held out
FULL = {"batch_size": 32, "max_steps": 50}
SMOKE = {"batch_size": 4, "max_steps": 2}
COLUMNS = {"length": ("length", 1), "ended": ("ended", 3), "gold": ("gold reward", 2), "kl": ("KL, nats", 2)}


# ------------------------------------------------------------------------------------------------------------- the runs


def main(a: common.Args) -> None:
    """Runs what results.csv does not have, and writes table and figure."""
    results, folder = common.results(NAME, a), common.work(NAME, a)
    seeds = range(1 if a.smoke else 2 if a.quick else a.seeds)
    methods = ["DPO", "R-DPO"] if a.smoke else [*METHODS]
    torch.set_num_threads(1)  # as in the processes of `each`, so that the numbers do not depend on the machine's cores
    pairs, prompts, steps = (40, 200, SMOKE) if a.smoke else (PAIRS, PROMPTS, FULL)

    def go(tasks: list[tuple[str, int, float, dict]]) -> None:
        """Those of (setting, seed, bias, flags) that are not there yet; without flags it is the SFT model."""
        given = []
        for setting, seed, bias, flags in tasks:
            if not results.done(setting, seed):
                flags = flags and {"data": data(folder, seed, bias, pairs)} | steps | flags
                given.append((setting, seed, common.sft_model(folder, a.smoke), flags, folder, prompts))
        for (setting, seed, *_), values, seconds in common.each(run, given, 2, folder):
            results.add(setting, seed, values | {"seconds": seconds})

    def trials(names: Sequence[str], bias: float, shared: dict) -> list[tuple[str, int, float, dict]]:
        tried = [(name, *trial) for name, trial in TRIALS.items() if trial[0] in names]
        return [(name, TRIAL_SEED, bias, METHODS[m][0] | {METHODS[m][1]: x} | shared) for name, m, x in tried]

    go([("SFT", seed, 0.5, {}) for seed in (*seeds, TRIAL_SEED)])
    go(trials([m for m in methods if m != "R-DPO"], 0.5, {}))
    go(trials(["R-DPO"], 0.6, strengths(results)["DPO"]))
    chosen = strengths(results)
    biases = (0.5, 0.7) if a.smoke or a.quick else BIASES
    every = itertools.product(seeds, methods, biases)
    go([(f"{m} {bias:.0%}", seed, bias, METHODS[m][0] | chosen[m]) for seed, m, bias in every])
    plot.finish(NAME, a, results, report, draw)


def data(folder: Path, seed: int, bias: float, pairs: int) -> str:
    """The annotators' preferences of a seed, of which a share `bias` prefers the longer answer, as a file."""
    path = folder / f"pairs-{seed}-{bias:g}.jsonl"
    if not path.exists():
        longer, shorter = [], []
        for _, row in reviews.rows("preference", 3 * pairs, seed + 1):
            difference = len(row["chosen"].split()) - len(row["rejected"].split())
            if difference:
                (longer if difference > 0 else shorter).append(row)
        rows = longer[: round(bias * pairs)] + shorter[: pairs - round(bias * pairs)]
        random.Random(seed).shuffle(rows)
        common.write(path, rows)
    return str(path)


def run(setting: str, seed: int, sft: str, flags: dict, folder: Path, prompts: int) -> dict[str, float]:
    """One run of DPO with these flags (none for the SFT model) -> what is measured at its end."""
    policy = sft
    if flags:
        flags |= {"seed": seed, "eval_fraction": 0.1, "eval_prompts": 0, "ref_cache": str(folder / "ref_cache")}
        policy = trained(train_dpo, folder / f"{setting}-{seed}".replace(" ", "-"), model=sft, **flags)
    asked = common.prompts(prompts)[1]
    test = len(asked) * TEST // (TEST + VALIDATION)
    asked = asked[test:][:VALIDATION] if seed == TRIAL_SEED else asked[:test][:TEST]
    measured = common.measured(policy, sft, asked, seed, 64)
    return {n: statistics.fmean(measured[n]) for n in COLUMNS}


def strengths(results: common.Results) -> dict[str, dict[str, float]]:
    """Each method's flags as its trials say, of those that have been run."""
    tried = {m: {} for m in METHODS}
    for name, (m, x) in TRIALS.items():
        if results.done(name, TRIAL_SEED):
            tried[m][x] = {n: results.values(name, n)[TRIAL_SEED] for n in ("kl", "length")}
    chosen = {
        m: {"beta": at_kl({x: v["kl"] for x, v in found.items()})}
        for m, found in tried.items()
        if found and m != "R-DPO"
    }
    if tried["R-DPO"]:
        usual = results.values("SFT", "length")[TRIAL_SEED]
        best = min(tried["R-DPO"], key=lambda x: abs(tried["R-DPO"][x]["length"] - usual))
        chosen["R-DPO"] = chosen["DPO"] | {"length_penalty": best}
    return chosen


def at_kl(tried: dict[float, float], target: float = TARGET) -> float:
    """The beta at which the KL is the target, its logarithm being linear in that of beta between two trials; the
    nearest trial where all are on one side of it."""
    logs = {beta: math.log(max(kl, 1e-9) / target) for beta, kl in tried.items()}
    for low, high in itertools.pairwise(sorted(logs)):
        if logs[low] * logs[high] <= 0 and logs[low] != logs[high]:
            return float(f"{low * (high / low) ** (logs[low] / (logs[low] - logs[high])):.3g}")
    return min(logs, key=lambda beta: abs(logs[beta]))


# ----------------------------------------------------------------------------------------------------- table and figure


def ratio(results: common.Results, setting: str) -> dict[int, float]:
    """Seed -> mean length over that of the SFT model."""
    usual = results.values("SFT", "length")
    return {seed: x / usual[seed] for seed, x in results.values(setting, "length").items() if seed in usual}


def slope(results: common.Results, method: str) -> dict[int, float]:
    """Seed -> what the ratio gains for 10 points more of the pairs."""
    low, high = ratio(results, f"{method} 50%"), ratio(results, f"{method} 70%")
    return {seed: (high[seed] - low[seed]) / 2 for seed in low if seed in high}


def at_one_kl(results: common.Results, method: str, kl: float = 0.6) -> dict[int, float]:
    """Seed -> the ratio at this KL, on the line between the two biases whose ends are below and above it, where there
    are such."""
    found = {}
    for seed in slope(results, method):
        ends = [f"{method} {b:.0%}" for b in BIASES if seed in ratio(results, f"{method} {b:.0%}")]
        path = sorted((results.values(x, "kl")[seed], ratio(results, x)[seed]) for x in ends)
        for (x0, y0), (x1, y1) in itertools.pairwise(path):
            if x0 <= kl < x1:
                found[seed] = y0 + (y1 - y0) * (kl - x0) / (x1 - x0)
    return found


def clauses(results: common.Results) -> dict[str, tuple[float, float]]:
    """The differences of the criterion, with half their intervals."""
    slopes = {m: found for m in METHODS if (found := slope(results, m))}
    at = lambda m, bias: t_interval([*ratio(results, f"{m} {bias}").values()])  # noqa: E731
    found = {"slope of DPO": t_interval([*slopes["DPO"].values()])}
    for m in slopes:
        if m != "DPO":
            found[f"slope: DPO - {m}"] = paired(slopes["DPO"], slopes[m])
    if ratio(results, "DPO 60%") and ratio(results, "DPO per token 60%"):
        (mean, half), (other, its_half) = at("DPO", "60%"), at("DPO per token", "60%")
        found |= {"at 60 %: DPO - 1.2": (mean - 1.2, half), "at 60 %: 1.1 - DPO per token": (1.1 - other, its_half)}
    for m in slopes:
        mean, half = at(m, "50%")
        found[f"at 50 %: 1.1 - {m}"] = (1.1 - mean, half)
    return found


def report(results: common.Results) -> tuple[str, str, str]:
    """Table, verdict, effect."""
    rows, chosen = [], strengths(results)
    for setting in ["SFT", *SETTINGS]:
        seeds = [seed for seed in results.values(setting, "length") if seed != TRIAL_SEED]
        if seeds:
            of = lambda values: t_interval([values[seed] for seed in seeds])  # noqa: B023, E731
            cells = [show(of(results.values(setting, n)), digits) for n, (_, digits) in COLUMNS.items()]
            rows.append([setting, show(of(ratio(results, setting)), 3), *cells])
    at_one, of_dpo = [], at_one_kl(results, "DPO")
    for m in METHODS:
        if found := at_one_kl(results, m):
            shared = any(seed in of_dpo for seed in found)
            difference = show(paired(of_dpo, found), 3) if shared and m != "DPO" else ""
            at_one.append([m, show(t_interval([*found.values()]), 3), difference, str(len(found))])
    trials = []
    for name in [x for x in TRIALS if results.done(x, TRIAL_SEED)]:
        cells = [show(t_interval([*results.values(name, n).values()]), digits) for n, (_, digits) in COLUMNS.items()]
        trials.append([name, *cells])
    found = clauses(results)
    differences = [[name, show(x, 3), common.verdict([x])] for name, x in found.items()]
    taken = "; ".join(f"{m}: {', '.join(f'{n} {x:g}' for n, x in flags.items())}" for m, flags in chosen.items())
    parts = [
        markdown(["method, pairs whose longer answer is preferred", "ratio", *(t for t, _ in COLUMNS.values())], rows),
        markdown(["difference, above 0 by the claim", "mean", ""], differences),
        "The ratio at a KL of 0.6, interpolated between biases:",
        markdown(["method", "ratio", "DPO - it", "seeds that have it"], at_one),
        f"The trials, on validation prompts, with what was taken from them ({taken}):",
        markdown(["trial", *(title for title, _ in COLUMNS.values())], trials),
    ]
    names = ["slope of DPO", *(name for name in found if name.startswith("slope: "))]
    effect = "Length over the SFT model's, per 10 points of bias: " + "; ".join(
        f"{n} {show(found[n], 3)}" for n in names
    )
    return "\n\n".join(parts), common.verdict([*found.values()]), effect + "."


def draw(results: common.Results, page) -> None:
    """Length and gold reward against the bias of the data."""
    left, right = page.subplots(1, 2)
    for i, m in enumerate(m for m in METHODS if slope(results, m)):
        biases = [b for b in BIASES if results.values(f"{m} {b:.0%}", "length")]
        for axes, of in ((left, lambda x: ratio(results, x)), (right, lambda x: results.values(x, "gold"))):
            points = [t_interval([*of(f"{m} {bias:.0%}").values()]) for bias in biases]
            bars = [half if half < float("inf") else 0.0 for _, half in points]
            xs = [100 * bias + 0.3 * (i - 1.5) for bias in biases]
            axes.errorbar(xs, [mean for mean, _ in points], bars, marker="o", markersize=4, capsize=2, label=m)
    left.axhline(1, color="gray", lw=0.8)
    usual = [x for seed, x in results.values("SFT", "gold").items() if seed != TRIAL_SEED]
    right.axhline(statistics.fmean(usual), color="gray", lw=0.8, label="SFT")
    left.set_title("length, over the SFT model's", fontsize=9)
    right.set_title("gold reward", fontsize=9)
    for axes in (left, right):
        axes.set_xlabel("% of pairs whose longer answer is preferred", fontsize=8)
        axes.set_xticks([100 * bias for bias in BIASES])
        axes.tick_params(labelsize=8)
        axes.grid(alpha=0.3)
        axes.legend(fontsize=7)


if __name__ == "__main__":
    cli(main, common.Args)
