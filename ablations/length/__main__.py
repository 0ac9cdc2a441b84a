"""Length: how much longer a small bias of the data for longer answers makes the answers under each loss.

    python -m ablations.length            --quick, --smoke, --seeds

Claim (Park et al. 2024, arXiv 2403.19159; Meng et al. 2024, arXiv 2405.14734): if the preferred answer is a little
longer more often than not, DPO's answers become much longer, and those of losses that see the length do not: R-DPO,
which subtracts a penalty per token from the reward, and DPO per token and SimPO, which see means over tokens. Gold
reward on the embedded task is a mean over opinion words and does not reward length. Among the annotators' pairs of
different lengths, pairs are drawn at random so that in 50 %, 60 % or 70 % the preferred answer is the longer one.

Each method has three trials, on separate pairs and with validation prompts. DPO, DPO per token and SimPO try beta, and
take the one at which the KL to the SFT model is TARGET on pairs of 50 %, interpolated between the three. R-DPO, which
takes DPO's beta and so has seen six trials in all, tries its penalty, and takes the one whose answers, on pairs of
60 %, are nearest to the SFT model's length. SimPO has no target margin (gamma 0). Then all run for as many steps on one
set of pairs for each seed and bias. A beta does not fix how far a run goes, so the runs are evaluated on the way: "at
equal KL" is where a run first has the KL at which the run that goes least far of the four, with that seed and bias,
ends; linear between two checkpoints.

Criterion, written before the full run. `ratio` is the mean length of sampled answers to test prompts over that of the
SFT model's, `slope` is what the ratio gains from 50 % to 70 %, per 10 points. Paired by seed, 95 % t-intervals.
Reproduced: all of these are above 0. Contradicted: one is below 0. Else not resolved.

    exploits   slope of DPO, at the end
    do not     slope of DPO - that of R-DPO, of DPO per token, of SimPO: at the end, and at equal KL
    how much   at 60 %, at the end: ratio of DPO - 1.2, and 1.1 - ratio of DPO per token
    control    at 50 %, at the end: 1.1 - the ratio of each method

Reported: a linear fit of the implicit reward log pi - log ref to the length, its R^2 and its slope, among answers of
held-out pairs like the training ones, of the SFT model, and of the policy itself. Park et al. find next to nothing in
the first, and much in fresh answers.
"""

import itertools
import math
import random
import shutil
import statistics
from collections.abc import Sequence
from pathlib import Path

import torch

import train_dpo
from ablations import common, plot
from ablations.common import at_checkpoints, between, markdown, paired, show, t_interval
from support import models, scoring
from support.examples import Example, build, held_out
from support.generate import answer
from support.reward_report import correlation
from support.rows import read_rows
from support.runs import cli
from support.scoring import Batching

NAME = "length"
CLAIM = "a small length bias in the data makes DPO's answers longer, but not those of length-aware losses"
METHODS = {  # flags; the flag that the three trials vary, and its values
    "DPO": ({"loss": "dpo"}, "beta", (0.05, 0.2, 0.8)),
    "DPO per token": ({"loss": "dpo_norm"}, "beta", (0.5, 2.0, 8.0)),
    "SimPO": ({"loss": "simpo", "gamma_beta_ratio": 0.0}, "beta", (2.0, 16.0, 128.0)),
    "R-DPO": ({"loss": "r_dpo"}, "length_penalty", (0.02, 0.05, 0.1)),
}
BIASES = (0.5, 0.6, 0.7)
SETTINGS = dict.fromkeys(("SFT", *(f"{method} {bias:.0%}" for method in METHODS for bias in BIASES)))
TRIALS = {f"{method} {flag} {x:g}": (method, x) for method, (_, flag, values) in METHODS.items() for x in values}
OF_TRIALS = "SFT, trial"  # the SFT model on the trials' prompts
TRIAL_SEED = 1000  # seed of the trials' pairs and answers; results.csv calls it seed 0
TARGET = 0.4  # nats, on validation prompts
PAIRS = 1800  # a tenth is held out
PROMPTS, TEST, VALIDATION = 6000, 256, 128  # prompts; how many of the held-out tenth
TOKENS = 64
FULL = {"batch_size": 32, "max_steps": 50}
SMOKE = {"batch_size": 4, "max_steps": 2}
EVERY = 7  # steps between two evaluations of a run
COLUMNS = {"length": ("length", 1), "ended": ("ended", 3), "gold": ("gold reward", 2), "kl": ("KL, nats", 2)}
ANSWERS = ("pairs", "SFT", "own")  # answers on which the implicit reward is fitted to the length


# ------------------------------------------------------------------------------------------------------------- the runs


def main(a: common.Args) -> None:
    """Run what results.csv lacks, then write table and figure."""
    results, folder = common.results(NAME, a), common.work(NAME, a)
    seeds = range(1 if a.smoke else 2 if a.quick else a.seeds)
    methods = ["DPO", "SimPO"] if a.smoke else [*METHODS]
    torch.set_num_threads(1)  # as in the processes of `each`: the numbers must not depend on the number of cores
    pairs, prompts, steps = (40, 200, SMOKE) if a.smoke else (PAIRS, PROMPTS, FULL)

    def go(tasks: Sequence[tuple[str, int, float, dict]]) -> None:
        """Run the tasks (setting, seed, bias, flags) that have no results yet; without flags it is the SFT model."""
        calls = []
        for setting, seed, bias, flags in tasks:
            if not results.done(setting, seed):
                drawn = seed if setting in SETTINGS else TRIAL_SEED
                if flags:
                    flags = {"data": data(folder, drawn, bias, pairs)} | steps | flags
                calls.append((setting, seed, drawn, common.sft_model(folder, a.smoke), flags, folder, prompts))
        for (setting, seed, *_), (curve, end), seconds in common.each(run, calls, 1 if a.smoke else 2, folder):
            for step, values in curve.items():
                results.add(setting, seed, values, step)
            results.add(setting, seed, end | {"seconds": seconds})

    def trials(names: Sequence[str], bias: float, shared: dict) -> list[tuple[str, int, float, dict]]:
        planned = []
        for name, (m, x) in TRIALS.items():
            flags, flag, values = METHODS[m]
            if m in names and (x == values[0] or not a.smoke):
                planned.append((name, 0, bias, flags | {flag: x} | shared))
        return planned

    plain = [("SFT", seed, 0.5, {}) for seed in seeds] + [(OF_TRIALS, 0, 0.5, {})]
    go(plain + trials([m for m in methods if m != "R-DPO"], 0.5, {}))
    go(trials([m for m in methods if m == "R-DPO"], 0.6, strengths(results)["DPO"]))
    chosen = strengths(results)
    biases = (0.5, 0.7) if a.smoke or a.quick else BIASES
    saves = {"save_every": 1 if a.smoke else EVERY}
    product = itertools.product(seeds, methods, biases)
    go([(f"{m} {bias:.0%}", seed, bias, METHODS[m][0] | chosen[m] | saves) for seed, m, bias in product])
    plot.finish(NAME, a, results, report, draw)


def data(folder: Path, seed: int, bias: float, pairs: int) -> str:
    """The file of a seed's preferences by the annotators; in a share `bias` of them the longer answer is preferred."""
    path = folder / f"pairs-{seed}-{bias:g}.jsonl"
    if not path.exists():
        longer, shorter = [], []
        for row in common.rows("preference", 3 * pairs, seed + 1):
            difference = len(row["chosen"].split()) - len(row["rejected"].split())
            if difference:
                (longer if difference > 0 else shorter).append(row)
        rows = longer[: round(bias * pairs)] + shorter[: pairs - round(bias * pairs)]
        random.Random(seed).shuffle(rows)
        common.write(path, rows)
    return str(path)


def run(
    setting: str, seed: int, drawn: int, sft: str, flags: dict, folder: Path, prompts: int
) -> tuple[dict[int, dict[str, float]], dict[str, float]]:
    """One run of DPO with these flags (none: the SFT model), pairs and answers being of the seed `drawn` -> values by
    step, and at the end."""
    asked = common.prompts(prompts)[1]
    test = len(asked) * TEST // (TEST + VALIDATION)
    asked = asked[:test][:TEST] if setting in SETTINGS else asked[test:][:VALIDATION]

    tokenizer, policy, reference = models.load_tokenizer(sft), *(models.load_model(sft, "cpu") for _ in range(2))

    def measured() -> dict[str, float]:
        values = common.of_answers(policy, reference, tokenizer, answer(policy, tokenizer, asked, TOKENS, drawn))
        return {n: statistics.fmean(values[n]) for n in COLUMNS}

    if not flags:
        return {}, measured()
    out, curve = folder / f"{setting}-{seed}".replace(" ", "-"), {}

    def evaluate(step: int, weights: dict) -> None:
        policy.load_state_dict(weights)
        curve[step] = measured()

    shutil.rmtree(out, ignore_errors=True)  # left by an interrupted run
    flags = {"eval_fraction": 0.1, "eval_prompts": 0, "device": "cpu", "seed": drawn} | flags
    with at_checkpoints(evaluate):
        train_dpo.main(train_dpo.Args(model=sft, out=str(out), ref_cache=str(folder / "ref_cache"), **flags))
    shutil.rmtree(out)
    end = curve[max(curve)]
    rows = build(read_rows(flags["data"])[0], tokenizer, "preference", 512, 1024)[0]
    answers = [answer(model, tokenizer, asked, TOKENS, drawn) for model in (reference, policy)]
    for name, examples in zip(ANSWERS, (held_out(rows, 0.1)[1], *answers), strict=True):
        slope, share = on_length(policy, reference, tokenizer, examples)
        end |= {f"reward a token, {name}": slope, f"R2, {name}": share}
    return curve, end


def on_length(policy, reference, tokenizer, examples: Sequence[Example]) -> tuple[float, float]:
    """The linear fit of log pi - log ref to the length of all these answers: its slope, nats a token, and R^2."""
    pad = models.pad_id(tokenizer)
    logps, ref = (torch.cat(scoring.score_logps(x, examples, Batching("tree", pad))) for x in (policy, reference))
    lengths = torch.tensor([len(r) for e in examples for r in e.responses], dtype=torch.float64)
    rho = correlation(lengths, logps - ref)
    return rho * ((logps - ref).std() / lengths.std()).item(), rho**2


def strengths(results: common.Results) -> dict[str, dict[str, float]]:
    """Each method's flags as its trials choose them, for the methods whose trials have been run."""
    trials = {m: {} for m in METHODS}
    for name, (m, x) in TRIALS.items():
        if results.done(name, 0):
            trials[m][x] = {n: results.values(name, n)[0] for n in ("kl", "length")}
    chosen = {
        m: {"beta": at_kl({x: v["kl"] for x, v in values.items()})}
        for m, values in trials.items()
        if values and m != "R-DPO"
    }
    if trials["R-DPO"]:
        sft_length = results.values(OF_TRIALS, "length")[0]
        best = min(trials["R-DPO"], key=lambda x: abs(trials["R-DPO"][x]["length"] - sft_length))
        chosen["R-DPO"] = chosen["DPO"] | {"length_penalty": best}
    return chosen


def at_kl(tried: dict[float, float], target: float = TARGET) -> float:
    """The beta at which the KL is the target, log KL being linear in log beta between two trials; the nearest trial if
    all are on one side of it."""
    logs = {beta: math.log(max(kl, 1e-9) / target) for beta, kl in tried.items()}
    for low, high in itertools.pairwise(sorted(logs)):
        if logs[low] * logs[high] <= 0 and logs[low] != logs[high]:
            return float(f"{low * (high / low) ** (logs[low] / (logs[low] - logs[high])):.3g}")
    return min(logs, key=lambda beta: abs(logs[beta]))


# ----------------------------------------------------------------------------------------------------- table and figure


def over_sft(results: common.Results, lengths: dict[int, float]) -> dict[int, float]:
    """Seed -> ratio: a length over the SFT model's."""
    usual = results.values("SFT", "length")
    return {seed: x / usual[seed] for seed, x in lengths.items()}


def ratio(results: common.Results, setting: str) -> dict[int, float]:
    return over_sft(results, results.values(setting, "length"))


def one_kl(results: common.Results, bias: str) -> dict[int, float]:
    """Seed -> the KL at the end of the run that went least far, among the methods that have the seed at this bias."""
    ends = [kls for m in METHODS if (kls := results.values(f"{m} {bias}", "kl"))]
    return {seed: min(kls[seed] for kls in ends) for seed in (ends[0] if ends else ()) if all(seed in x for x in ends)}


def at_one_kl(results: common.Results, setting: str, metric: str) -> dict[int, float]:
    """Seed -> a metric where a run, which starts at the SFT model, first has that KL."""
    values, steps = {}, results.steps(setting)
    for seed, nats in one_kl(results, setting.split()[-1]).items():
        points = [(0.0, results.values("SFT", metric)[seed])]
        points += [tuple(results.values_of[setting, seed, step, n] for n in ("kl", metric)) for step in steps]
        values[seed] = between(points, nats)
    return values


def slope(low: dict[int, float], high: dict[int, float]) -> dict[int, float]:
    """Seed -> gain of the ratio per 10 points more of the pairs, from its values at 50 % and 70 %."""
    return {seed: (high[seed] - low[seed]) / 2 for seed in low if seed in high}


def slopes(results: common.Results) -> dict[str, dict[str, dict[int, float]]]:
    """Place ("the end" or "equal KL") -> method -> seed -> slope."""
    methods = [m for m in METHODS if ratio(results, f"{m} 70%")]
    end = {m: slope(*(ratio(results, f"{m} {bias}") for bias in ("50%", "70%"))) for m in methods}
    one = {
        m: slope(*(over_sft(results, at_one_kl(results, f"{m} {bias}", "length")) for bias in ("50%", "70%")))
        for m in methods
    }
    return {"the end": end, "equal KL": one}


def clauses(results: common.Results) -> dict[str, tuple[float, float]]:
    """Name -> (mean, half interval) of each difference in the criterion."""
    by_place, minus = slopes(results), lambda ratios, x, sign=1: t_interval([sign * (y - x) for y in ratios.values()])
    gaps = {"slope of DPO at the end": minus(by_place["the end"]["DPO"], 0.0)}
    for place, slope_of in by_place.items():
        for m in slope_of:
            if m != "DPO":
                gaps[f"slope at {place}: DPO - {m}"] = paired(slope_of["DPO"], slope_of[m])
    if ratio(results, "DPO 60%") and ratio(results, "DPO per token 60%"):
        gaps["at 60 %: DPO - 1.2"] = minus(ratio(results, "DPO 60%"), 1.2)
        gaps["at 60 %: 1.1 - DPO per token"] = minus(ratio(results, "DPO per token 60%"), 1.1, -1)
    for m in by_place["the end"]:
        gaps[f"at 50 %: 1.1 - {m}"] = minus(ratio(results, f"{m} 50%"), 1.1, -1)
    return gaps


def report(results: common.Results) -> tuple[str, str, str]:
    """Tables, verdict, effect."""
    cell = lambda values, digits=2: show(t_interval([*values.values()]), digits)  # noqa: E731
    rows, at_one, rewards = [], [], []
    for x in [x for x in SETTINGS if results.values(x, "length")]:
        cells = [cell(results.values(x, n), digits) for n, (_, digits) in COLUMNS.items()]
        rows.append([x, cell(ratio(results, x), 3), *cells])
    for bias, m in itertools.product((f"{bias:.0%}" for bias in BIASES), METHODS):
        if one_kl(results, bias) and results.values(x := f"{m} {bias}", "length"):
            ratios, dpo_ratios = (over_sft(results, at_one_kl(results, y, "length")) for y in (x, f"DPO {bias}"))
            difference = "" if m == "DPO" else show(paired(dpo_ratios, ratios), 3)
            dpo_gold, own_gold = (at_one_kl(results, y, "gold") for y in (f"DPO {bias}", x))
            golds = [cell(own_gold), "" if m == "DPO" else show(paired(dpo_gold, own_gold), 3)]
            at_one.append([x, cell(one_kl(results, bias)), cell(ratios, 3), difference, *golds])
            names = [(f"{n}, {y}", digits) for y in ANSWERS for n, digits in (("reward a token", 3), ("R2", 2))]
            rewards.append([x, *(cell(results.values(x, name), digits) for name, digits in names)])
    trials = []
    for name in [x for x in (OF_TRIALS, *TRIALS) if results.done(x, 0)]:
        trials.append([name, *(cell(results.values(name, n), digits) for n, (_, digits) in COLUMNS.items())])
    intervals, chosen = clauses(results), strengths(results)
    differences = [[name, show(x, 3), common.verdict([x])] for name, x in intervals.items()]
    taken = "; ".join(f"{m}: {', '.join(f'{n} {x:g}' for n, x in flags.items())}" for m, flags in chosen.items())
    setting = "method, pairs whose longer answer is preferred"
    titles = {"pairs": "held-out pairs", "SFT": "SFT model's answers", "own": "own answers"}
    parts = [
        markdown([setting, "ratio", *(title for title, _ in COLUMNS.values())], rows),
        markdown(["difference (claim: above 0)", "mean", ""], differences),
        "At equal KL, along each run:",
        markdown([setting, "KL, nats", "ratio", "ratio: DPO - this", "gold reward", "gold: DPO - this"], at_one),
        "The implicit reward, log pi - log ref, as a line in the length: nats per token, and R^2:",
        markdown([setting, *(f"{titles[x]}: {n}" for x in ANSWERS for n in ("slope", "R^2"))], rewards),
        f"The trials, on validation prompts, with what was taken from them ({taken}):",
        markdown(["trial", *(title for title, _ in COLUMNS.values())], trials),
    ]
    named = {n.replace(": ", ", "): x for n, x in intervals.items() if n.startswith(("slope of", "slope at equal"))}
    effect = "; ".join(f"{n}: {show(x, 3)}" for n, x in named.items())
    effect = f"Length over the SFT model's, per 10 points of bias: {effect}."
    return "\n\n".join(parts), common.verdict([*intervals.values()]), effect


def draw(results: common.Results, page) -> None:
    """Length against the bias of the data, at the end and at equal KL."""
    left, right = page.subplots(1, 2, sharey=True)
    for i, m in enumerate(m for m in METHODS if ratio(results, f"{m} 70%")):
        biases = [b for b in BIASES if results.values(f"{m} {b:.0%}", "length")]
        for axes, values in (
            (left, lambda x: ratio(results, x)),
            (right, lambda x: over_sft(results, at_one_kl(results, x, "length"))),
        ):
            points = [t_interval([*values(f"{m} {bias:.0%}").values()]) for bias in biases]
            bars = [half if half < float("inf") else 0.0 for _, half in points]
            xs = [100 * bias + 0.3 * (i - 1.5) for bias in biases]
            axes.errorbar(xs, [mean for mean, _ in points], bars, marker="o", markersize=4, capsize=2, label=m)
    left.set_title("length over the SFT model's, at the end", fontsize=9)
    right.set_title("the same, at equal KL", fontsize=9)
    for axes in (left, right):
        axes.axhline(1, color="gray", lw=0.8)
        axes.set_xlabel("% of pairs whose longer answer is preferred", fontsize=8)
        axes.set_xticks([100 * bias for bias in BIASES])
        axes.tick_params(labelsize=8)
        axes.grid(alpha=0.3)
        axes.legend(fontsize=7)


if __name__ == "__main__":
    cli(main, common.Args)
