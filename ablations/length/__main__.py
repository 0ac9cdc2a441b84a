"""Length: how much of a small bias of the data for longer answers each loss turns into longer answers.

    python -m ablations.length            --quick, --smoke, --seeds

Claim (Park et al. 2024, arXiv 2403.19159; Meng et al. 2024, arXiv 2405.14734): where the preferred answer is a little
longer more often than not, DPO's answers become much longer, and those of losses that see the length do not: R-DPO,
which takes a penalty per token off the reward, and DPO per token and SimPO, which see means over tokens. On the
embedded task, whose gold reward is a mean over opinion words and has no use for length. Of 50 %, 60 % or 70 % of the
pairs of the annotators, chosen at random among those of different lengths, the preferred answer is the longer one.

Each method has three trials, on pairs of their own with validation prompts: DPO, DPO per token and SimPO of beta, of
which that one is taken, by interpolation between the three, at which the KL to the SFT model is TARGET on pairs of
50 %; R-DPO, which takes DPO's beta and so has seen six in all, of its penalty, of which the one is taken whose answers,
on pairs of 60 %, are nearest to the SFT model's length. SimPO has no target margin (gamma 0). Then all run for as many
steps on one set of pairs for each seed and bias. A beta does not fix how far a run goes, so the runs are looked at on
the way: "at one KL" is where a run first has the KL at which the least far of the four ends, with that seed and bias,
between two checkpoints on the line.

Criterion, written before the full run. `ratio` is the mean length of sampled answers to test prompts over that of the
SFT model's, `slope` is what the ratio gains from 50 % to 70 %, per 10 points. Paired by seed, 95 % t-intervals.
Reproduced: all of these are above 0. Contradicted: one is below 0. Else not resolved.

    exploits   slope of DPO, at the end
    do not     slope of DPO - that of R-DPO, of DPO per token, of SimPO: at the end, and at one KL
    how much   at 60 %, at the end: ratio of DPO - 1.2, and 1.1 - ratio of DPO per token
    control    at 50 %, at the end: 1.1 - the ratio of each method

Reported: how much of the implicit reward log pi - log ref a line in the length explains (R^2), and its slope, among
answers of held-out pairs like the training ones, of the SFT model, and of the policy itself. Park et al. find next to
nothing in the first, and much in fresh answers.
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
CLAIM = "a small length bias of the data makes DPO's answers longer, and not those of losses that see the length"
METHODS = {  # flags, and those of the three trials
    "DPO": ({"loss": "dpo"}, "beta", (0.05, 0.2, 0.8)),
    "DPO per token": ({"loss": "dpo_norm"}, "beta", (0.5, 2.0, 8.0)),
    "SimPO": ({"loss": "simpo", "gamma_beta_ratio": 0.0}, "beta", (2.0, 16.0, 128.0)),
    "R-DPO": ({"loss": "r_dpo"}, "length_penalty", (0.02, 0.05, 0.1)),
}
BIASES = (0.5, 0.6, 0.7)
SETTINGS = dict.fromkeys(("SFT", *(f"{method} {bias:.0%}" for method in METHODS for bias in BIASES)))
TRIALS = {f"{method} {flag} {x:g}": (method, x) for method, (_, flag, values) in METHODS.items() for x in values}
OF_TRIALS = "SFT, trial"  # the SFT model on the prompts of the trials
TRIAL_SEED = 1000  # of the trials' pairs and answers; in results.csv they are of seed 0
TARGET = 0.4  # nats, on validation prompts
PAIRS = 1800  # a tenth of them held out
PROMPTS, TEST, VALIDATION = 6000, 256, 128  # prompts; of the tenth that is held out
TOKENS = 64
FULL = {"batch_size": 32, "max_steps": 50}
SMOKE = {"batch_size": 4, "max_steps": 2}
EVERY = 7  # steps between two looks at a run
COLUMNS = {"length": ("length", 1), "ended": ("ended", 3), "gold": ("gold reward", 2), "kl": ("KL, nats", 2)}
ANSWERS = ("pairs", "SFT", "own")  # of which the implicit reward is compared with the length


# ------------------------------------------------------------------------------------------------------------- the runs


def main(a: common.Args) -> None:
    """Runs what results.csv does not have, and writes table and figure."""
    results, folder = common.results(NAME, a), common.work(NAME, a)
    seeds = range(1 if a.smoke else 2 if a.quick else a.seeds)
    methods = ["DPO", "SimPO"] if a.smoke else [*METHODS]
    torch.set_num_threads(1)  # as in the processes of `each`, so that the numbers do not depend on the machine's cores
    pairs, prompts, steps = (40, 200, SMOKE) if a.smoke else (PAIRS, PROMPTS, FULL)

    def go(tasks: Sequence[tuple[str, int, float, dict]]) -> None:
        """Those of (setting, seed, bias, flags) that are not there yet; without flags it is the SFT model."""
        given = []
        for setting, seed, bias, flags in tasks:
            if not results.done(setting, seed):
                drawn = seed if setting in SETTINGS else TRIAL_SEED
                if flags:
                    flags = {"data": data(folder, drawn, bias, pairs)} | steps | flags
                given.append((setting, seed, drawn, common.sft_model(folder, a.smoke), flags, folder, prompts))
        for (setting, seed, *_), (along, end), seconds in common.each(run, given, 1 if a.smoke else 2, folder):
            for step, values in along.items():
                results.add(setting, seed, values, step)
            results.add(setting, seed, end | {"seconds": seconds})

    def trials(names: Sequence[str], bias: float, shared: dict) -> list[tuple[str, int, float, dict]]:
        found = []
        for name, (m, x) in TRIALS.items():
            flags, flag, values = METHODS[m]
            if m in names and (x == values[0] or not a.smoke):
                found.append((name, 0, bias, flags | {flag: x} | shared))
        return found

    plain = [("SFT", seed, 0.5, {}) for seed in seeds] + [(OF_TRIALS, 0, 0.5, {})]
    go(plain + trials([m for m in methods if m != "R-DPO"], 0.5, {}))
    go(trials([m for m in methods if m == "R-DPO"], 0.6, strengths(results)["DPO"]))
    chosen = strengths(results)
    biases = (0.5, 0.7) if a.smoke or a.quick else BIASES
    looks = {"save_every": 1 if a.smoke else EVERY}
    every = itertools.product(seeds, methods, biases)
    go([(f"{m} {bias:.0%}", seed, bias, METHODS[m][0] | chosen[m] | looks) for seed, m, bias in every])
    plot.finish(NAME, a, results, report, draw)


def data(folder: Path, seed: int, bias: float, pairs: int) -> str:
    """The annotators' preferences of a seed, of which a share `bias` prefers the longer answer, as a file."""
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
    """One run of DPO with these flags (none for the SFT model), of the seed `drawn` -> what is measured at its steps,
    and at its end."""
    asked = common.prompts(prompts)[1]
    test = len(asked) * TEST // (TEST + VALIDATION)
    asked = asked[:test][:TEST] if setting in SETTINGS else asked[test:][:VALIDATION]

    tokenizer, policy, reference = models.load_tokenizer(sft), *(models.load_model(sft, "cpu") for _ in range(2))

    def measured() -> dict[str, float]:
        found = common.of_answers(policy, reference, tokenizer, answer(policy, tokenizer, asked, TOKENS, drawn))
        return {n: statistics.fmean(found[n]) for n in COLUMNS}

    if not flags:
        return {}, measured()
    out, along = folder / f"{setting}-{seed}".replace(" ", "-"), {}

    def look(step: int, weights: dict) -> None:
        policy.load_state_dict(weights)
        along[step] = measured()

    shutil.rmtree(out, ignore_errors=True)  # of a run that was stopped
    flags = {"eval_fraction": 0.1, "eval_prompts": 0, "device": "cpu", "seed": drawn} | flags
    with at_checkpoints(look):
        train_dpo.main(train_dpo.Args(model=sft, out=str(out), ref_cache=str(folder / "ref_cache"), **flags))
    shutil.rmtree(out)
    end = along[max(along)]
    rows = build(read_rows(flags["data"])[0], tokenizer, "preference", 512, 1024)[0]
    answers = [answer(model, tokenizer, asked, TOKENS, drawn) for model in (reference, policy)]
    for name, examples in zip(ANSWERS, (held_out(rows, 0.1)[1], *answers), strict=True):
        slope, share = on_length(policy, reference, tokenizer, examples)
        end |= {f"reward a token, {name}": slope, f"R2, {name}": share}
    return along, end


def on_length(policy, reference, tokenizer, examples: Sequence[Example]) -> tuple[float, float]:
    """The line of log pi - log ref in the length of all these answers: its slope, nats a token, and R^2."""
    pad = models.pad_id(tokenizer)
    mine, other = (torch.cat(scoring.score_logps(x, examples, Batching("tree", pad))) for x in (policy, reference))
    lengths = torch.tensor([len(r) for e in examples for r in e.responses], dtype=torch.float64)
    both = correlation(lengths, mine - other)
    return both * ((mine - other).std() / lengths.std()).item(), both**2


def strengths(results: common.Results) -> dict[str, dict[str, float]]:
    """Each method's flags as its trials say, of those that have been run."""
    tried = {m: {} for m in METHODS}
    for name, (m, x) in TRIALS.items():
        if results.done(name, 0):
            tried[m][x] = {n: results.values(name, n)[0] for n in ("kl", "length")}
    chosen = {
        m: {"beta": at_kl({x: v["kl"] for x, v in found.items()})}
        for m, found in tried.items()
        if found and m != "R-DPO"
    }
    if tried["R-DPO"]:
        usual = results.values(OF_TRIALS, "length")[0]
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


def over_sft(results: common.Results, lengths: dict[int, float]) -> dict[int, float]:
    """Seed -> ratio: a length over that of the SFT model."""
    usual = results.values("SFT", "length")
    return {seed: x / usual[seed] for seed, x in lengths.items()}


def ratio(results: common.Results, setting: str) -> dict[int, float]:
    return over_sft(results, results.values(setting, "length"))


def one_kl(results: common.Results, bias: str) -> dict[int, float]:
    """Seed -> the KL at the end of the run that went least far, of the methods that have the seed at this bias."""
    ends = [kls for m in METHODS if (kls := results.values(f"{m} {bias}", "kl"))]
    return {seed: min(kls[seed] for kls in ends) for seed in (ends[0] if ends else ()) if all(seed in x for x in ends)}


def at_one_kl(results: common.Results, setting: str, metric: str) -> dict[int, float]:
    """Seed -> a metric where a run first has that KL, the SFT model being its start."""
    found, steps = {}, results.steps(setting)
    for seed, nats in one_kl(results, setting.split()[-1]).items():
        points = [(0.0, results.values("SFT", metric)[seed])]
        points += [tuple(results.values_of[setting, seed, step, n] for n in ("kl", metric)) for step in steps]
        found[seed] = between(points, nats)
    return found


def slope(low: dict[int, float], high: dict[int, float]) -> dict[int, float]:
    """Seed -> what the ratio gains for 10 points more of the pairs, from its values at 50 % and 70 %."""
    return {seed: (high[seed] - low[seed]) / 2 for seed in low if seed in high}


def slopes(results: common.Results) -> dict[str, dict[str, dict[int, float]]]:
    """Where it is measured -> method -> seed -> slope."""
    there = [m for m in METHODS if ratio(results, f"{m} 70%")]
    end = {m: slope(*(ratio(results, f"{m} {bias}") for bias in ("50%", "70%"))) for m in there}
    at_one = {
        m: slope(*(over_sft(results, at_one_kl(results, f"{m} {bias}", "length")) for bias in ("50%", "70%")))
        for m in there
    }
    return {"end": end, "one KL": at_one}


def clauses(results: common.Results) -> dict[str, tuple[float, float]]:
    """The differences of the criterion, with half their intervals."""
    of, less = slopes(results), lambda found, x, sign=1: t_interval([sign * (y - x) for y in found.values()])
    found = {"slope of DPO, at the end": less(of["end"]["DPO"], 0.0)}
    for where, its in of.items():
        for m in its:
            if m != "DPO":
                found[f"slope, at {'the ' * (where == 'end')}{where}: DPO - {m}"] = paired(its["DPO"], its[m])
    if ratio(results, "DPO 60%") and ratio(results, "DPO per token 60%"):
        found["at 60 %: DPO - 1.2"] = less(ratio(results, "DPO 60%"), 1.2)
        found["at 60 %: 1.1 - DPO per token"] = less(ratio(results, "DPO per token 60%"), 1.1, -1)
    for m in of["end"]:
        found[f"at 50 %: 1.1 - {m}"] = less(ratio(results, f"{m} 50%"), 1.1, -1)
    return found


def report(results: common.Results) -> tuple[str, str, str]:
    """Tables, verdict, effect."""
    of = lambda values, digits=2: show(t_interval([*values.values()]), digits)  # noqa: E731
    rows, at_one, rewards = [], [], []
    for x in [x for x in SETTINGS if results.values(x, "length")]:
        cells = [of(results.values(x, n), digits) for n, (_, digits) in COLUMNS.items()]
        rows.append([x, of(ratio(results, x), 3), *cells])
    for bias, m in itertools.product((f"{bias:.0%}" for bias in BIASES), METHODS):
        if one_kl(results, bias) and results.values(x := f"{m} {bias}", "length"):
            mine, of_dpo = (over_sft(results, at_one_kl(results, y, "length")) for y in (x, f"DPO {bias}"))
            difference = "" if m == "DPO" else show(paired(of_dpo, mine), 3)
            gold, its = (at_one_kl(results, y, "gold") for y in (f"DPO {bias}", x))
            golds = [of(its), "" if m == "DPO" else show(paired(gold, its), 3)]
            at_one.append([x, of(one_kl(results, bias)), of(mine, 3), difference, *golds])
            names = [(f"{n}, {y}", digits) for y in ANSWERS for n, digits in (("reward a token", 3), ("R2", 2))]
            rewards.append([x, *(of(results.values(x, name), digits) for name, digits in names)])
    trials = []
    for name in [x for x in (OF_TRIALS, *TRIALS) if results.done(x, 0)]:
        trials.append([name, *(of(results.values(name, n), digits) for n, (_, digits) in COLUMNS.items())])
    found, chosen = clauses(results), strengths(results)
    differences = [[name, show(x, 3), common.verdict([x])] for name, x in found.items()]
    taken = "; ".join(f"{m}: {', '.join(f'{n} {x:g}' for n, x in flags.items())}" for m, flags in chosen.items())
    setting = "method, pairs whose longer answer is preferred"
    titles = {"pairs": "held-out pairs", "SFT": "SFT model's answers", "own": "own answers"}
    parts = [
        markdown([setting, "ratio", *(title for title, _ in COLUMNS.values())], rows),
        markdown(["difference, above 0 by the claim", "mean", ""], differences),
        "At one KL, on the way of each run:",
        markdown([setting, "KL, nats", "ratio", "DPO - it", "gold reward", "DPO - it"], at_one),
        "The implicit reward, log pi - log ref, as a line in the length: nats a token, and R^2:",
        markdown([setting, *(f"{titles[x]}: {n}" for x in ANSWERS for n in ("slope", "R^2"))], rewards),
        f"The trials, on validation prompts, with what was taken from them ({taken}):",
        markdown(["trial", *(title for title, _ in COLUMNS.values())], trials),
    ]
    named = [f"{n} {show(x, 3)}" for n, x in found.items() if n.startswith(("slope of", "slope, at one KL"))]
    effect = f"Length over the SFT model's, per 10 points of bias: {'; '.join(named)}."
    return "\n\n".join(parts), common.verdict([*found.values()]), effect


def draw(results: common.Results, page) -> None:
    """Length against the bias of the data, at the end and at one KL."""
    left, right = page.subplots(1, 2, sharey=True)
    for i, m in enumerate(m for m in METHODS if ratio(results, f"{m} 70%")):
        biases = [b for b in BIASES if results.values(f"{m} {b:.0%}", "length")]
        for axes, of in (
            (left, lambda x: ratio(results, x)),
            (right, lambda x: over_sft(results, at_one_kl(results, x, "length"))),
        ):
            points = [t_interval([*of(f"{m} {bias:.0%}").values()]) for bias in biases]
            bars = [half if half < float("inf") else 0.0 for _, half in points]
            xs = [100 * bias + 0.3 * (i - 1.5) for bias in biases]
            axes.errorbar(xs, [mean for mean, _ in points], bars, marker="o", markersize=4, capsize=2, label=m)
    left.set_title("length over the SFT model's, at the end", fontsize=9)
    right.set_title("the same, at one KL", fontsize=9)
    for axes in (left, right):
        axes.axhline(1, color="gray", lw=0.8)
        axes.set_xlabel("% of pairs whose longer answer is preferred", fontsize=8)
        axes.set_xticks([100 * bias for bias in BIASES])
        axes.tick_params(labelsize=8)
        axes.grid(alpha=0.3)
        axes.legend(fontsize=7)


if __name__ == "__main__":
    cli(main, common.Args)
