"""The frontier of reward and KL: DPO and its rivals on a world where the best that any policy can do is known exactly.

    python -m ablations.frontier                    --quick, --smoke, --seeds, --jobs
    python -m ablations.frontier --tier s           a real model on film reviews, on a GPU (README.md)

Claim (Rafailov et al. 2023, section 6.1 and figure 2 left, arXiv 2305.18290): at every KL to the reference, DPO has the
most reward. A seed is a world of its own (ablations/world.py): a source, a gold reward in [0, 1), an SFT model, and
rankings of 4 of its answers by gold reward, as sure as in the paper, which all methods share. Every method has four
settings, the paper's where it says which, as many updates, checkpoints at four places along each run, and a learning
rate from the same four, chosen in a world that is not among the seeds. KL and reward of every checkpoint are sums
over all answers to 32 test prompts; 16 others are for validation.

At matched KL: of a method's checkpoints (and its start) those on the upper concave hull of its points on the validation
prompts are kept. On the test prompts its reward at a KL is that of a coin that picks between the two neighbours, whose
KL is at most that; beyond the last point it is that of the last. No such coin is above the exact frontier either.

Criterion, written before the full run. Differences at KL 0.25, 0.5, 1 and 2 nats are paired by seed, with 95 %
t-intervals. Reproduced: all of these are above 0. Contradicted: one is below 0. Else not resolved.

    Preferred-FT    reward of DPO - Preferred-FT, at three of the four KL (the least clear one is left out)
    Unlikelihood    DPO is not worse: DPO - Unlikelihood + 2 % of the optimum's gain at that KL, at three of the four
    optimum         the exact frontier + 1e-6 - reward, of every checkpoint of every run

Judged apart, since the paper does not claim it: the exact law of Best-of-n has within 5 % of the gain that the frontier
has at its KL, for each n from 2 to 64. Reported and not judged: PPO on the gold reward, which is the frontier where it
converges, and PPO on a learned reward.
"""

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal
from unittest import mock

import torch

import train_dpo
import train_ppo
import train_rm
import train_sft
from ablations import common, plot, world
from ablations.common import at_checkpoints, between, markdown, paired, show, t_interval
from ablations.frontier import tier_s
from rlhf import models
from rlhf.runs import cli

NAME = "frontier"
CLAIM = "at the same KL DPO has more reward than Preferred-FT, and no less than Unlikelihood; none is above the optimum"
BETAS, ALPHAS = (0.05, 0.1, 1.0, 5.0), (0.05, 0.1, 0.5, 1.0)  # the paper's
SETTINGS = {  # method: script, and the flags that are its own
    **{f"DPO {x:g}": (train_dpo, {"beta": x}) for x in BETAS},
    **{f"Unlikelihood {x:g}": (train_dpo, {"loss": f"unlikelihood {x:g}"}) for x in ALPHAS},
    **{f"Preferred-FT {x}": (train_sft, {"seed": x}) for x in range(4)},
    **{f"PPO {x:g}": (train_ppo, {"kl_coef": x}) for x in (0.1, 0.3, 1.0, 3.0)},
    **{f"PPO-gold {x:g}": (train_ppo, {"kl_coef": x}) for x in (0.02, 0.05, 0.1, 0.3)},
    "Best-of-n": (None, {}),
    "optimum": (None, {}),
}
METHODS = ("DPO", "Unlikelihood", "Preferred-FT", "PPO", "PPO-gold")
RATES = {"DPO": 1e-3, "Unlikelihood": 1e-3, "Preferred-FT": 1e-2, "PPO": 1e-3, "PPO-gold": 1e-3}
NATS = (0.25, 0.5, 1.0, 2.0)  # where methods are compared
CURVE = (0.05, 0.1, *NATS, 3.0, 4.0, 6.0)  # and the optimum is drawn
DRAWN = (2, 4, 8, 16, 32, 64)  # n of Best-of-n
PARTS = ("validation", "test")
MARGIN, NEAR, ROUNDING = 0.02, 0.05, 1e-6
UPDATES, BATCH, POINTS = 64, 32, 4  # of prompts with 4 answers each, and checkpoints along a run
LOSSES = {  # of its own, for train_dpo.py: -log pi(chosen) + alpha log pi(rejected)
    f"unlikelihood {alpha:g}": lambda a, x, alpha=alpha: -x.chosen_logps + alpha * x.rejected_logps for alpha in ALPHAS
}


@dataclass
class Args(common.Args):
    tier: Literal["e", "s"] = "e"
    """e: the enumerable world; s: a real model on film reviews, on a GPU, one seed and no verdict (tier_s.py)"""
    model: str = "HuggingFaceTB/SmolLM2-135M"
    """of --tier s: a causal language model, as a local folder or a hub id"""
    jobs: int = 2
    """processes, one thread each, >= 1; the results do not depend on it"""


# ------------------------------------------------------------------------------------------------------------- the runs


def main(a: Args) -> None:
    """Runs what results.csv does not have, and writes table and figure."""
    if a.tier == "s":
        with mock.patch.dict(train_dpo.LOSSES, LOSSES):
            tier_s.main(SETTINGS, a.model, a.smoke)
        return
    results, folder = common.results(NAME, a), common.work(NAME, a)
    settings, seeds = list(SETTINGS), range(min(a.seeds, 1 if a.smoke or a.quick else a.seeds))
    if a.smoke:
        settings = ["DPO 0.1", "Unlikelihood 0.1", "Preferred-FT 0", "PPO 0.3", "PPO-gold 0.1", "Best-of-n", "optimum"]
    updates = 8 if a.smoke else UPDATES
    tasks = [(x, seed, folder, updates) for seed in seeds for x in settings if not results.done(x, seed)]
    torch.set_num_threads(1)  # as in the processes of `each`, so that the numbers do not depend on the machine's cores
    for seed in sorted({seed for _, seed, *_ in tasks}):
        prepare(seed, folder, updates)
    for (setting, seed, *_), (along, end), seconds in common.each(run, tasks, a.jobs, folder):
        for step, values in along.items():
            results.add(setting, seed, values, step)
        results.add(setting, seed, end | {"seconds": seconds})
    plot.finish(NAME, a, results, report, draw)


def prepare(seed: int, folder: Path, updates: int) -> None:
    """The world's SFT model, its rankings and their preferred answers, and a reward model that learns from them."""
    own = folder / f"world-{seed}"
    sft = world.learn_source(own, seed, 100 * updates)
    if not (own / "chosen.jsonl").exists():
        asked = world.prompts(seed)["train"]
        logps = world.answer_logps(models.load_model(sft, "cpu"), asked)
        rows = world.rankings(seed, logps, asked, updates * BATCH, 4)
        common.write(own / "prompts.jsonl", [{"prompt": x, "world": seed} for x in asked])
        common.write(own / "rankings.jsonl", rows)
        common.write(own / "chosen.jsonl", world.chosen(rows))
    if not train_sft.is_made(str(own / "rm")):
        shutil.rmtree(own / "rm", ignore_errors=True)
        flags = {"model": sft, "data": str(own / "rankings.jsonl"), "out": str(own / "rm"), "seed": seed}
        train_rm.main(world.args(train_rm, lr=3e-3, batch_size=BATCH, **flags))


def run(setting: str, seed: int, folder: Path, updates: int) -> tuple[dict, dict]:
    """One setting in one world -> {step: values} of its checkpoints, and its last values."""
    own, asked = folder / f"world-{seed}", world.prompts(seed)
    model = models.load_model(str(own / "sft"), "cpu")
    held = {part: (world.answer_logps(model, asked[part]), world.rewards(seed, asked[part])) for part in PARTS}
    ref, r = held["test"]
    if setting == "optimum":
        starts = {f"start {part}": world.expected(*found) for part, found in held.items()}
        return {}, {f"{x:g}": world.optimum(ref, r, x) for x in CURVE} | starts
    if setting == "Best-of-n":
        laws = {n: world.best_of(ref, r, n) for n in DRAWN}
        found = {n: (world.kl(x, ref), world.expected(x, r)) for n, x in laws.items()}
        return {}, {
            f"{n} {name}": value
            for n, (nats, most) in found.items()
            for name, value in (("kl", nats), ("reward", most), ("optimum", world.optimum(ref, r, nats)))
        }

    along: dict[int, dict[str, float]] = {}

    def look(step: int, weights: dict) -> None:
        model.load_state_dict(weights)
        values = {}
        for part, (ref, r) in held.items():
            logps = world.answer_logps(model, asked[part])
            values |= {f"kl {part}": world.kl(logps, ref), f"reward {part}": world.expected(logps, r)}
        along[step] = values | {"room": world.optimum(ref, r, values["kl test"]) - values["reward test"]}

    script, flags = SETTINGS[setting]
    out = folder / f"{setting.replace(' ', '-')}-{seed}"
    shutil.rmtree(out, ignore_errors=True)  # of a run that was stopped
    shared = {"model": str(own / "sft"), "out": str(out), "lr": RATES[setting.split()[0]], "seed": seed}
    with at_checkpoints(look), mock.patch.dict(train_dpo.LOSSES, LOSSES):
        script.main(world.args(script, **shared | flags_of(setting, own, updates) | flags))
    shutil.rmtree(out)
    return along, {name: along[max(along)][name] for name in ("kl test", "reward test")}


def flags_of(setting: str, own: Path, updates: int) -> dict:
    """Data and sizes of a run, so that every method makes as many updates, of as many answers."""
    if setting.startswith("PPO"):  # a rollout is 8 updates: 4 passes of 2 minibatches
        gold = {"reward": "ablations.world:gold", "value_init": "policy"}
        learned = {"reward": str(own / "rm"), "value_init": "reward"}
        size = {"batch_size": 2 * BATCH, "max_steps": updates // 8, "save_every": max(updates // 8 // POINTS, 1)}
        return size | {"data": str(own / "prompts.jsonl")} | (gold if "gold" in setting else learned)
    size = {"batch_size": BATCH, "max_steps": updates, "save_every": updates // POINTS}
    if setting.startswith("Preferred-FT"):  # whose answers are half of those in as many pairs
        return size | {"data": str(own / "chosen.jsonl"), "batch_size": 4 * BATCH}
    return size | {"data": str(own / "rankings.jsonl"), "ref_cache": str(own / "ref_cache")}


# ----------------------------------------------------------------------------------------------------- table and figure


def hull(points: Sequence[tuple[float, float]]) -> list[int]:
    """Places of the points on the upper concave hull of (KL, reward), by KL, as far as the reward rises."""
    found: list[int] = []
    for i in sorted(range(len(points)), key=lambda i: points[i]):
        x, y = points[i]
        while len(found) > 1:
            (x0, y0), (x1, y1) = points[found[-2]], points[found[-1]]
            if (y1 - y0) * (x - x0) > (y - y0) * (x1 - x0):
                break
            found.pop()
        if not found or y > points[found[-1]][1]:
            found.append(i)
    return found


def path(results: common.Results, method: str, seed: int) -> list[tuple[float, float]]:
    """A method's points (KL, reward) on the test prompts, of its hull on the validation prompts; its start first."""
    found = {part: [] for part in PARTS}
    for setting in (x for x in SETTINGS if x.rsplit(" ", 1)[0] == method):
        for step in results.steps(setting):
            for part, points in found.items():
                points.append(tuple(results.values_of[setting, seed, step, f"{x} {part}"] for x in ("kl", "reward")))
    start = {part: results.values("optimum", f"start {part}")[seed] for part in PARTS}
    points = {part: [(0.0, start[part]), *found[part]] for part in PARTS}
    return [points["test"][i] for i in hull(points["validation"])]


def starts(results: common.Results) -> dict[int, float]:
    """Seed -> the reference's reward, in the worlds where all is done."""
    found = results.values("optimum", "start test")
    return {seed: found[seed] for seed in results.seeds()}


def matched(results: common.Results, method: str, nats: float) -> dict[int, float]:
    """Seed -> a method's reward at a KL."""
    return {seed: between(path(results, method, seed), nats) for seed in starts(results)}


def shares(results: common.Results, method: str) -> list[tuple[float, float]]:
    """At each KL a method's gain in reward, as a share of the optimum's, with half its interval."""
    start, found = starts(results), []
    for nats in NATS:
        best = results.values("optimum", f"{nats:g}")
        gains = {seed: x - start[seed] for seed, x in matched(results, method, nats).items()}
        found.append(t_interval([gain / (best[seed] - start[seed]) for seed, gain in gains.items()]))
    return found


def clauses(results: common.Results) -> dict[str, dict[str, tuple[float, float]]]:
    """Claim -> what it says is above 0, with half its interval."""
    found: dict[str, dict[str, tuple[float, float]]] = {}
    start = starts(results)
    for other in METHODS[1:]:
        found[other] = {}
        for nats in NATS:
            mine, best = matched(results, "DPO", nats), results.values("optimum", f"{nats:g}")
            if other == "Unlikelihood":
                mine = {seed: x + MARGIN * (best[seed] - start[seed]) for seed, x in mine.items()}
            found[other][f"{nats:g}"] = paired(mine, matched(results, other, nats))
    rooms = [x for (*_, metric), x in results.values_of.items() if metric == "room"]
    found["optimum"] = {"": (min(rooms) + ROUNDING, 0.0)}
    found["Best-of-n"] = {}
    for n in DRAWN:
        of = lambda name, n=n: results.values("Best-of-n", f"{n} {name}")  # noqa: E731
        gains = [(of("reward")[seed] - start[seed]) / (of("optimum")[seed] - start[seed]) for seed in start]
        mean, half = t_interval(gains)
        found["Best-of-n"][str(n)] = mean - (1 - NEAR), half
    return found


def without_the_least_clear(differences: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """All but the one whose interval reaches lowest."""
    return sorted(differences, key=lambda x: x[0] - x[1])[1:]


def report(results: common.Results) -> tuple[str, str, str]:
    """Tables, verdict, effect."""
    found = clauses(results)
    start = starts(results)
    rows = [["optimum", *(show(t_interval([*results.values("optimum", f"{x:g}").values()]), 3) for x in NATS), ""]]
    for method in METHODS:
        ends = [max(path(results, method, seed))[0] for seed in start]
        cells = [show(t_interval([*matched(results, method, x).values()]), 3) for x in NATS]
        rows.append([method, *cells, show(t_interval(ends), 2)])
    rows.append(["reference", show(t_interval([*start.values()]), 3) + " (KL 0)", "", "", "", ""])
    header = ["reward on test prompts", *(f"KL {x:g}" for x in NATS), "largest KL of the hull"]

    judged = {
        "Preferred-FT": ("DPO - Preferred-FT", without_the_least_clear([*found["Preferred-FT"].values()])),
        "Unlikelihood": (
            f"DPO - Unlikelihood + {MARGIN:.0%} of the optimum's gain",
            without_the_least_clear([*found["Unlikelihood"].values()]),
        ),
    }
    differences = []
    for other in METHODS[1:]:
        title, kept = judged.get(other, (f"DPO - {other}", []))
        cells = [show(x, 3) for x in found[other].values()]
        differences.append([title, *cells, common.verdict(kept) if kept else "not judged"])
    margin = found["optimum"][""]
    count = sum(metric == "room" for (*_, metric) in results.values_of)
    least = f"{margin[0] - ROUNDING:.2g}"
    differences.append([f"optimum - reward, least of {count} checkpoints", least, "", "", "", common.verdict([margin])])
    of_n = [["share of the frontier's gain at its KL"]]
    of_n[0] += [show((mean + 1 - NEAR, half), 3) for mean, half in found["Best-of-n"].values()]
    of_n.append(["KL, nats", *(show(t_interval([*results.values("Best-of-n", f"{n} kl").values()])) for n in DRAWN)])
    of_n.append(["within 5 %", *(common.verdict([x]) for x in found["Best-of-n"].values())])
    parts = [
        markdown(header, rows),
        markdown(["difference", *(f"KL {x:g}" for x in NATS), ""], differences),
        markdown(["Best-of-n", *(f"n = {n}" for n in DRAWN)], of_n),
    ]
    verdict = common.verdict([x for _, kept in judged.values() for x in kept] + [margin])
    less = [show(paired(matched(results, "DPO", 1.0), matched(results, other, 1.0)), 3) for other in METHODS[1:]]
    effect = (
        f"At 1 nat DPO has {show(shares(results, 'DPO')[NATS.index(1.0)])} of the optimum's gain; DPO less "
        + ", ".join(f"{other} {x}" for other, x in zip(METHODS[1:], less, strict=True))
        + "."
    )
    return "\n\n".join(parts), verdict, effect


def draw(results: common.Results, page) -> None:
    """Left: every checkpoint of the first world and the methods' hulls, under its exact frontier. Right: the share of
    the optimum's gain at matched KL, with intervals over the worlds."""
    left, right = page.subplots(1, 2, width_ratios=[3, 2])
    start = starts(results)
    seed = min(start)
    colours = dict(zip(METHODS, ("tab:blue", "tab:red", "tab:gray", "tab:orange", "tab:green"), strict=True))
    best = [(0.0, start[seed]), *((x, results.values("optimum", f"{x:g}")[seed]) for x in CURVE)]
    best += [tuple(results.values("Best-of-n", f"{n} {name}")[seed] for name in ("kl", "optimum")) for n in DRAWN]
    left.plot(*zip(*sorted(best), strict=True), color="black", linewidth=1, label="optimum")
    for method in METHODS:
        points = [
            [results.values_of[setting, seed, step, f"{name} test"] for name in ("kl", "reward")]
            for setting in SETTINGS
            if setting.rsplit(" ", 1)[0] == method
            for step in results.steps(setting)
        ]
        left.plot(*zip(*points, strict=True), ".", color=colours[method], markersize=3)
        left.plot(*zip(*path(results, method, seed), strict=True), color=colours[method], linewidth=1, label=method)
    of_n = [[results.values("Best-of-n", f"{n} {name}")[seed] for name in ("kl", "reward")] for n in DRAWN]
    left.plot(*zip(*of_n, strict=True), "kx", markersize=4, label="Best-of-n")
    left.set_xlim(-0.1, CURVE[-1])
    left.set_xlabel("KL to the reference, nats")
    left.set_ylabel("gold reward")
    left.set_title(f"world {seed}, test prompts", fontsize=9)
    for method in METHODS:
        means, halves = zip(*shares(results, method), strict=True)
        bars = [half if half < 1 else 0.0 for half in halves]
        right.errorbar(NATS, means, bars, color=colours[method], marker="o", markersize=3, capsize=2, linewidth=1)
    right.axhline(1, color="black", linewidth=1)
    right.set_xscale("log", base=2)
    right.set_xticks(NATS, [f"{x:g}" for x in NATS])
    right.set_xlabel("KL, nats")
    right.set_title("share of the optimum's gain", fontsize=9)
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.tick_params(labelsize=8)
    left.legend(fontsize=7)


if __name__ == "__main__":
    cli(main, Args)
