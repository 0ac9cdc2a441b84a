"""The frontier of reward and KL: DPO and its rivals in a world where the optimum at each KL is known exactly.

    python -m ablations.frontier                    --quick, --smoke, --seeds, --jobs
    python -m ablations.frontier --tune             the learning rates, in a world that is not among the seeds
    python -m ablations.frontier --tier s           a real model on film reviews, on a GPU (README.md)
    python -m ablations.frontier --loss mine:fn     a loss of your own beside DPO, IPO and SimPO (docs/my_loss.md)

Claim (Rafailov et al. 2023, section 6.1 and figure 2 left, arXiv 2305.18290): at every KL to the reference, DPO has the
most reward. Each seed is a world of its own (ablations/world.py): a source, a gold reward in [0, 1), an SFT model, and
rankings of 4 of its answers by gold reward, without noise as in the paper, shared by all methods. Every method has four
settings (the exact gradient two), as many updates, four checkpoints per run, and a learning rate from the same five. KL
and reward of every checkpoint are sums over all answers to 32 test prompts; 16 others are for validation.

At matched KL: a method keeps those of its checkpoints (and its start) that are on the upper concave hull of its points
on the validation prompts. On the test prompts its reward at a KL is that of a coin that picks one of the two
neighbouring points, a policy whose KL is at most that; beyond the last point it is that of the last. No such coin is
above the exact frontier either.

Criterion, written before the full run. Differences at KL 0.25, 0.5, 1 and 2 nats are paired by seed, with 95 %
t-intervals. Reproduced: all of these are above 0. Contradicted: one is below 0. Else not resolved.

    Preferred-FT    reward of DPO - Preferred-FT, at three of the four KL (the least clear one is left out)
    Unlikelihood    reward of DPO - Unlikelihood, at three of the four KL, likewise
    optimum         the exact frontier + 1e-6 - reward, of every checkpoint of every run

Preferred-FT has a ceiling: it learns from the better of two answers, so it approaches the distribution of Best-of-2, of
at most ln 2 - 1/2 = 0.193 nats, and at each of the four KL it is past its last point. So DPO and Preferred-FT are also
compared at Preferred-FT's own KL, where the claim is harder; that is reported and not judged.

Judged apart, since the paper does not claim it: exact Best-of-n is within 5 % of the gain that the frontier has at its
KL, for each n from 2 to 64. Reported and not judged: PPO on a learned reward, PPO on the gold reward, and ascent of the
same objective, E r - beta KL, by its exact gradient, a sum over all answers to 8 prompts, which shows what this model
learns in as many updates without sampling. PPO on the gold reward should come near that, which checks the code. "DPO
slow", DPO at the learning rate of Unlikelihood, was added after the results.
"""

import random
import shutil
from collections.abc import Callable, Sequence
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
from support import models
from support.runs import cli, is_made

NAME = "frontier"
CLAIM = "at the same KL DPO has more reward than Preferred-FT, and no less than Unlikelihood; none is above the optimum"
BETAS, ALPHAS = (0.05, 0.1, 1.0, 5.0), (0.05, 0.1, 0.5, 1.0)  # the paper's
# at these coefficients pi* has about 2, 1, 0.5 and 0.25 nats in the world of --tune, by the learned and the gold reward
COEFS, GOLD_COEFS = (0.4, 0.8, 1.3, 2.0), (0.08, 0.17, 0.28, 0.4)
SETTINGS = {  # setting: script and its flags
    **{f"DPO {x:g}": (train_dpo, {"beta": x}) for x in BETAS},
    **{f"Unlikelihood {x:g}": (train_dpo, {"loss": f"unlikelihood {x:g}"}) for x in ALPHAS},
    **{f"Preferred-FT {x}": (train_sft, {"seed": x}) for x in range(4)},
    **{f"PPO {x:g}": (train_ppo, {"kl_coef": x}) for x in COEFS},
    **{f"PPO-gold {x:g}": (train_ppo, {"kl_coef": x}) for x in GOLD_COEFS},
    **{f"Exact gradient {x:g}": (None, {"kl_coef": x}) for x in GOLD_COEFS[::2]},
    "Best-of-n": (None, {}),
    "optimum": (None, {}),
    **{f"DPO slow {x:g}": (train_dpo, {"beta": x}) for x in BETAS},
}
METHODS = ("DPO", "Unlikelihood", "Preferred-FT", "PPO", "PPO-gold", "Exact gradient", "DPO slow")
GRID = (3e-4, 1e-3, 3e-3, 1e-2, 3e-2)  # of learning rates, for --tune
RATES = {"DPO": 3e-3, "Unlikelihood": 1e-3, "Preferred-FT": 1e-2, "PPO": 3e-4, "PPO-gold": 3e-3, "Exact gradient": 1e-2}
RATES["DPO slow"] = RATES["Unlikelihood"]
CRITIC_RATE = 3e-3
NATS = (0.25, 0.5, 1.0, 2.0)  # at which methods are compared
CURVE = (0.05, 0.1, *NATS, 3.0, 4.0, 6.0)  # at which the optimum is drawn
DRAWN = (2, 4, 8, 16, 32, 64)  # n of Best-of-n
PARTS = ("validation", "test")
ENDS = ("kl", "reward", "share")  # at a run's end; share: of the optimum's gain at its KL
NEAR, ROUNDING = 0.05, 1e-6
UPDATES, BATCH, POINTS = 128, 32, 4  # updates, prompts of 4 answers in each, checkpoints per run
WHOLE = 8  # prompts per update of the exact gradient
TUNED_IN = 100  # the world of --tune
LOSSES = {  # added to those of train_dpo.py: -log pi(chosen) + alpha log pi(rejected)
    f"unlikelihood {alpha:g}": lambda a, x, alpha=alpha: -x.chosen_logps + alpha * x.rejected_logps for alpha in ALPHAS
}


@dataclass
class Args(common.Args):
    tier: Literal["e", "s"] = "e"
    """e: the enumerable world; s: a real model on film reviews, on a GPU, one seed and no verdict (tier_s.py)"""
    model: str = "HuggingFaceTB/SmolLM2-135M"
    """causal language model for --tier s: a local folder or a hub id"""
    tune: bool = False
    """only run each method at each learning rate of a grid, in a world that is not one of the seeds"""
    loss: str | None = None
    """module:function(a, x) -> [m], a loss that is put beside DPO, IPO and SimPO (mine.py, docs/my_loss.md)"""
    advantage: str | None = None
    """module:function(R [p k]) -> [p k], an advantage that is put beside RLOO, GRPO and DPO (mine.py)"""
    jobs: int = 2
    """processes, one thread each, >= 1; the results do not depend on it"""


# ------------------------------------------------------------------------------------------------------------- the runs


def main(a: Args) -> None:
    """Run whatever results.csv lacks, and write table and figure."""
    if a.loss or a.advantage:
        from ablations.frontier import mine  # it imports this module

        mine.main(a)
        return
    if a.tier == "s":
        with mock.patch.dict(train_dpo.LOSSES, LOSSES):
            tier_s.main(SETTINGS, a.model, a.smoke)
        return
    torch.set_num_threads(1)  # as in the processes of `each`, so that results do not depend on the number of cores
    updates = 8 if a.smoke else UPDATES
    if a.tune:
        tune(Path("runs/ablations", NAME, "tune"), updates, a.jobs)
        return
    results, folder = common.results(NAME, a), common.work(NAME, a)
    settings, seeds = list(SETTINGS), range(min(a.seeds, 1 if a.smoke or a.quick else a.seeds))
    if a.smoke:
        settings = [*list(SETTINGS)[:24:4], "Best-of-n", "optimum"]  # the first of each method
    tasks = [
        (x, seed, folder, updates, RATES.get(method_of(x), 0.0))
        for seed in seeds
        for x in settings
        if not results.done(x, seed)
    ]
    for seed in sorted({seed for _, seed, *_ in tasks}):
        prepare(seed, folder, updates)
    for (setting, seed, *_), (along, end), seconds in common.each(run, tasks, a.jobs, folder):
        for step, values in along.items():
            results.add(setting, seed, values, step)
        results.add(setting, seed, end | {"seconds": seconds})
    plot.finish(NAME, a, results, report, draw)


def tune(folder: Path, updates: int, jobs: int) -> None:
    """Print each method's reward on validation prompts at each learning rate, averaged over the four KL."""
    results = common.Results(folder / "results.csv")
    prepare(TUNED_IN, folder, updates)
    settings = {method: [x for x in SETTINGS if method_of(x) == method] for method in METHODS[:-1]}
    for method in METHODS[2:-1]:  # one setting is enough: their KL hardly depends on the rate
        settings[method] = settings[method][1:2]
    runs = {f"{x} at {rate:g}": (x, rate) for of_method in settings.values() for x in of_method for rate in GRID}
    runs["optimum"] = ("optimum", 0.0)
    tasks = [
        (x, TUNED_IN, folder, updates, rate) for name, (x, rate) in runs.items() if not results.done(name, TUNED_IN)
    ]
    for (setting, seed, *_, rate), (along, end), _ in common.each(run, tasks, jobs, folder):
        name = setting if setting == "optimum" else f"{setting} at {rate:g}"
        for step, values in along.items():
            results.add(name, seed, values, step)
        results.add(name, seed, end)
    start, rows = results.values("optimum", "start validation")[TUNED_IN], []
    for method, of_method in settings.items():
        rows.append([method])
        for rate in GRID:
            points = [(0.0, start)] + [
                tuple(results.values_of[name, TUNED_IN, step, f"{x} validation"] for x in ("kl", "reward"))
                for name in (f"{x} at {rate:g}" for x in of_method)
                for step in results.steps(name)
            ]
            line = [points[i] for i in hull(points)]
            rows[-1].append(f"{sum(between(line, nats) for nats in NATS) / len(NATS):.3f}")
    print(markdown(["validation reward at learning rate", *(f"{rate:g}" for rate in GRID)], rows))


def method_of(setting: str) -> str:
    """A setting's name without its last word."""
    return setting.rsplit(" ", 1)[0]


def prepare(seed: int, folder: Path, updates: int) -> None:
    """Make the world's SFT model, its rankings and their preferred answers, and a reward model of these rankings."""
    place = folder / f"world-{seed}"
    sft = world.learn_source(place, seed, 100 * updates)
    if not (place / "chosen.jsonl").exists():
        prompts = world.prompts(seed)["train"]
        logps = world.answer_logps(models.load_model(sft, "cpu"), prompts)
        rows = world.rankings(seed, logps, prompts, updates * BATCH, 4)
        common.write(place / "prompts.jsonl", [{"prompt": x, "world": seed} for x in prompts])
        common.write(place / "rankings.jsonl", rows)
        common.write(place / "chosen.jsonl", world.chosen(rows))
    if not is_made(str(place / "rm")):
        shutil.rmtree(place / "rm", ignore_errors=True)
        flags = {"model": sft, "data": str(place / "rankings.jsonl"), "out": str(place / "rm"), "seed": seed}
        train_rm.main(world.args(train_rm, lr=3e-3, batch_size=BATCH, **flags))


def run(setting: str, seed: int, folder: Path, updates: int, rate: float) -> tuple[dict, dict]:
    """One setting in one world -> {step: values} of its checkpoints, and its values at the end."""
    place, prompts = folder / f"world-{seed}", world.prompts(seed)
    parts = {part: prompts[part] for part in PARTS} | {"training": prompts["train"][: world.TEST]}
    model = models.load_model(str(place / "sft"), "cpu")
    held = world.held(model, seed, parts)
    ref, r = held["test"]
    if setting == "optimum":
        starts = {f"start {part}": world.expected(*held[part]) for part in PARTS}
        of_coefs = {f"kl at {x:g}": world.tilted(ref, r, x)[0] for x in GOLD_COEFS}
        return {}, {f"{x:g}": world.optimum(ref, r, x) for x in CURVE} | of_coefs | starts
    if setting == "Best-of-n":
        laws = {n: world.best_of(ref, r, n) for n in DRAWN}
        points = {n: (world.kl(x, ref), world.expected(x, r)) for n, x in laws.items()}
        return {}, {
            f"{n} {name}": value
            for n, (nats, most) in points.items()
            for name, value in (("kl", nats), ("reward", most), ("optimum", world.optimum(ref, r, nats)))
        }

    def measure(part: str) -> dict[str, float]:
        (ref, r), logps = held[part], world.answer_logps(model, parts[part])
        return {f"kl {part}": world.kl(logps, ref), f"reward {part}": world.expected(logps, r)}

    along: dict[int, dict[str, float]] = {}

    def look(step: int, weights: dict) -> None:
        model.load_state_dict(weights)
        values = measure("validation") | measure("test")
        along[step] = values | {"room": world.optimum(ref, r, values["kl test"]) - values["reward test"]}

    script, flags = SETTINGS[setting]
    if script:
        out = folder / f"{setting}-{seed}-{rate:g}".replace(" ", "-")
        shutil.rmtree(out, ignore_errors=True)  # left by a stopped run
        shared = {"model": str(place / "sft"), "out": str(out), "lr": rate, "seed": seed}
        with at_checkpoints(look), mock.patch.dict(train_dpo.LOSSES, LOSSES):
            script.main(world.args(script, **shared | flags_of(setting, place, updates) | flags))
        shutil.rmtree(out)
    else:
        exact_gradient(seed, str(place / "sft"), flags["kl_coef"], rate, updates, look)

    end = along[max(along)] | measure("training")
    for part in ("test", "training"):
        start, nats = world.expected(*held[part]), end[f"kl {part}"]
        end[f"share {part}"] = (end[f"reward {part}"] - start) / (world.optimum(*held[part], nats) - start)
    return along, {f"{name} {part}": end[f"{name} {part}"] for part in ("test", "training") for name in ENDS}


def exact_gradient(seed: int, sft: str, coef: float, rate: float, updates: int, look: Callable) -> None:
    """Ascent of E r - coef KL, summed over all answers to WHOLE training prompts per update; POINTS calls of look."""
    policy, prompts = models.load_model(sft, "cpu"), world.prompts(seed)["train"]
    ref, r = world.held(policy, seed, {"train": prompts})["train"]
    optimizer = torch.optim.AdamW(policy.parameters(), lr=rate, weight_decay=0.0)
    rng = random.Random(f"exact gradient {seed}")
    for step in range(updates):
        for group in optimizer.param_groups:
            group["lr"] = rate * (1 - step / updates)
        drawn = rng.sample(range(len(prompts)), WHOLE)
        logps = world.differentiable_logps(policy, [prompts[i] for i in drawn])
        loss = -(logps.exp() * (r[drawn] - coef * (logps - ref[drawn]))).sum(1).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if (step + 1) % (updates // POINTS) == 0:
            look(step + 1, policy.state_dict())


def flags_of(setting: str, place: Path, updates: int) -> dict:
    """Data and sizes of a run, so that every method makes as many updates of 32 prompts with 4 answers."""
    if setting.startswith("PPO"):  # each update is on new answers: a rollout is one pass of 4 mini-batches
        gold = {"reward": "ablations.world:gold", "value_init": "zero"}
        learned = {"reward": str(place / "rm"), "value_init": "reward"}
        size = {"batch_size": 4 * BATCH, "minibatches": 4, "epochs_per_rollout": 1, "critic_lr": CRITIC_RATE}
        rollouts = updates // 4
        size |= {"data": str(place / "prompts.jsonl"), "max_steps": rollouts, "save_every": max(rollouts // POINTS, 1)}
        return size | (gold if "gold" in setting else learned)
    size = {"batch_size": BATCH, "max_steps": updates, "save_every": updates // POINTS}
    if setting.startswith("Preferred-FT"):  # a batch is the preferred answers of the 6 pairs of each ranking
        return size | {"data": str(place / "chosen.jsonl"), "batch_size": 6 * BATCH}
    return size | {"data": str(place / "rankings.jsonl"), "ref_cache": str(place / "ref_cache")}


# ----------------------------------------------------------------------------------------------------- table and figure


def hull(points: Sequence[tuple[float, float]]) -> list[int]:
    """Indices of the points on the upper concave hull of (KL, reward), in order of KL, as far as the reward rises."""
    kept: list[int] = []
    for i in sorted(range(len(points)), key=lambda i: points[i]):
        x, y = points[i]
        while len(kept) > 1:
            (x0, y0), (x1, y1) = points[kept[-2]], points[kept[-1]]
            if (y1 - y0) * (x - x0) > (y - y0) * (x1 - x0):
                break
            kept.pop()
        if not kept or y > points[kept[-1]][1]:
            kept.append(i)
    return kept


def path(results: common.Results, method: str, seed: int) -> list[tuple[float, float]]:
    """A method's points (KL, reward) on the test prompts that are on its validation hull, beginning with its start."""
    points = {part: [(0.0, results.values("optimum", f"start {part}")[seed])] for part in PARTS}
    for setting in (x for x in SETTINGS if method_of(x) == method):
        for step in results.steps(setting):
            for part in PARTS:
                kl_and_reward = (results.values_of[setting, seed, step, f"{x} {part}"] for x in ("kl", "reward"))
                points[part].append(tuple(kl_and_reward))
    return [points["test"][i] for i in hull(points["validation"])]


def starts(results: common.Results) -> dict[int, float]:
    """Seed -> the reference's reward, for the worlds that are complete."""
    rewards = results.values("optimum", "start test")
    return {seed: rewards[seed] for seed in results.seeds()}


def matched(results: common.Results, method: str, nats: float) -> dict[int, float]:
    """Seed -> a method's reward at a KL."""
    return {seed: between(path(results, method, seed), nats) for seed in starts(results)}


def shares(results: common.Results, method: str) -> list[tuple[float, float]]:
    """A method's share of the optimum's gain in reward at each KL, with half its interval."""
    start, intervals = starts(results), []
    for nats in NATS:
        best = results.values("optimum", f"{nats:g}")
        gains = {seed: x - start[seed] for seed, x in matched(results, method, nats).items()}
        intervals.append(t_interval([gain / (best[seed] - start[seed]) for seed, gain in gains.items()]))
    return intervals


def clauses(results: common.Results) -> dict[str, dict[str, tuple[float, float]]]:
    """Clause -> KL or n -> the mean that it says is above 0, and half its interval."""
    means: dict[str, dict[str, tuple[float, float]]] = {}
    start = starts(results)
    for other in METHODS[1:]:
        means[other] = {}
        for nats in NATS:
            means[other][f"{nats:g}"] = paired(matched(results, "DPO", nats), matched(results, other, nats))
    rooms = [x for (*_, metric), x in results.values_of.items() if metric == "room"]
    means["optimum"] = {"": (min(rooms) + ROUNDING, 0.0)}
    means["Best-of-n"] = {}
    for n in DRAWN:
        of = lambda name, n=n: results.values("Best-of-n", f"{n} {name}")  # noqa: E731
        gains = [(of("reward")[seed] - start[seed]) / (of("optimum")[seed] - start[seed]) for seed in start]
        mean, half = t_interval(gains)
        means["Best-of-n"][str(n)] = mean - (1 - NEAR), half
    return means


def without_the_least_clear(differences: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """All but the difference whose interval reaches lowest."""
    return sorted(differences, key=lambda x: x[0] - x[1])[1:]


def at_the_end_of_preferred(results: common.Results) -> list[list[str]]:
    """Rows: Preferred-FT at its largest KL, DPO at the same KL in each world, and Best-of-2, Preferred-FT's limit."""
    last = {seed: max(path(results, "Preferred-FT", seed)) for seed in starts(results)}
    nats, rewards = ({seed: point[i] for seed, point in last.items()} for i in (0, 1))
    dpo = {seed: between(path(results, "DPO", seed), x) for seed, x in nats.items()}
    two = [show(t_interval([*results.values("Best-of-n", f"2 {x}").values()]), 3) for x in ("kl", "reward")]
    same = show(t_interval([*nats.values()]), 3)
    return [
        ["Preferred-FT", same, show(t_interval([*rewards.values()]), 3)],
        ["DPO", same, show(t_interval([*dpo.values()]), 3)],
        ["DPO - Preferred-FT", "", show(paired(dpo, rewards), 3)],
        ["Best-of-2", *two],
    ]


def ends(results: common.Results) -> list[list[str]]:
    """Rows of settings: KL at a run's end, KL of its objective's optimum, and its share of the exact frontier's gain at
    its own KL, on test prompts and on training prompts."""
    rows = []
    for setting in (x for x in SETTINGS if method_of(x) in ("DPO", "PPO-gold", "Exact gradient")):
        if not results.values(setting, "kl test"):  # of a smoke run
            continue
        cells = [[*results.values(setting, x).values()] for x in ("kl test", "share test", "share training")]
        kl, test, training = (show(t_interval(x)) for x in cells)
        best = results.values("optimum", f"kl at {setting.rsplit(' ', 1)[1]}") if "DPO" not in setting else {}
        rows.append([setting, kl, show(t_interval([*best.values()])) if best else "", test, training])
    return rows


def report(results: common.Results) -> tuple[str, str, str]:
    """Tables, verdict, effect."""
    differences = clauses(results)
    start = starts(results)
    rows = [["optimum", *(show(t_interval([*results.values("optimum", f"{x:g}").values()]), 3) for x in NATS), ""]]
    for method in METHODS:
        last = [max(path(results, method, seed))[0] for seed in start]
        cells = [show(t_interval([*matched(results, method, x).values()]), 3) for x in NATS]
        rows.append([method, *cells, show(t_interval(last), 2)])
    rows.append(["reference", show(t_interval([*start.values()]), 3) + " (KL 0)", "", "", "", ""])
    header = ["reward on test prompts", *(f"KL {x:g}" for x in NATS), "largest KL on the hull"]

    judged = {x: without_the_least_clear([*differences[x].values()]) for x in ("Preferred-FT", "Unlikelihood")}
    lines = []
    for other in METHODS[1:]:
        cells = [show(x, 3) for x in differences[other].values()]
        lines.append([f"DPO - {other}", *cells, common.verdict(judged[other]) if other in judged else "not judged"])
    slow = [paired(matched(results, "DPO slow", x), matched(results, "Unlikelihood", x)) for x in NATS]
    lines.append(["DPO slow - Unlikelihood", *(show(x, 3) for x in slow), "not judged"])
    margin = differences["optimum"][""]
    count = sum(metric == "room" for (*_, metric) in results.values_of)
    least = f"{margin[0] - ROUNDING:.2g}"
    lines.append([f"optimum - reward, least of {count} checkpoints", least, "", "", "", common.verdict([margin])])
    of_n = [["share of the frontier's gain at its KL"]]
    of_n[0] += [show((mean + 1 - NEAR, half), 3) for mean, half in differences["Best-of-n"].values()]
    of_n.append(
        ["reward", *(show(t_interval([*results.values("Best-of-n", f"{n} reward").values()]), 3) for n in DRAWN)]
    )
    of_n.append(["KL, nats", *(show(t_interval([*results.values("Best-of-n", f"{n} kl").values()])) for n in DRAWN)])
    of_n.append(["within 5 %", *(common.verdict([x]) for x in differences["Best-of-n"].values())])
    parts = [
        markdown(header, rows),
        markdown(["difference", *(f"KL {x:g}" for x in NATS), ""], lines),
        markdown(["at Preferred-FT's own KL", "KL, nats", "reward"], at_the_end_of_preferred(results)),
        markdown(["Best-of-n", *(f"n = {n}" for n in DRAWN)], of_n),
        markdown(
            [
                "at the end of a run",
                "KL",
                "KL of pi*, its objective's optimum",
                "share of the optimum's gain at the run's KL, test prompts",
                "the same, training prompts",
            ],
            ends(results),
        ),
    ]
    verdict = common.verdict([x for kept in judged.values() for x in kept] + [margin])
    less = [show(paired(matched(results, "DPO", 1.0), matched(results, other, 1.0)), 3) for other in METHODS[1:]]
    effect = (
        f"At 1 nat DPO has {show(shares(results, 'DPO')[NATS.index(1.0)])} of the optimum's gain; "
        + ", ".join(f"DPO - {other} {x}" for other, x in zip(METHODS[1:], less, strict=True))
        + "."
    )
    return "\n\n".join(parts), verdict, effect


def draw(results: common.Results, page) -> None:
    """Left: all checkpoints of the first world, the methods' hulls, the exact frontier. Right: share of the optimum's
    gain at matched KL, with intervals over the worlds."""
    left, right = page.subplots(1, 2, width_ratios=[3, 2])
    start = starts(results)
    seed = min(start)
    colours = dict(zip(METHODS, (f"C{i}" for i in range(len(METHODS))), strict=True))
    best = [(0.0, start[seed]), *((x, results.values("optimum", f"{x:g}")[seed]) for x in CURVE)]
    best += [tuple(results.values("Best-of-n", f"{n} {name}")[seed] for name in ("kl", "optimum")) for n in DRAWN]
    left.plot(*zip(*sorted(best), strict=True), color="black", linewidth=1, label="optimum")
    for method in METHODS:
        points = [
            [results.values_of[setting, seed, step, f"{name} test"] for name in ("kl", "reward")]
            for setting in SETTINGS
            if method_of(setting) == method
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
