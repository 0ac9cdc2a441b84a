"""A loss or an advantage of your own, beside known ones and the exact optimum at equal KL.

    python -m ablations.frontier --loss mine:fn          fn(a, x) -> [m], as in LOSSES of train_dpo.py
    python -m ablations.frontier --advantage mine:fn     fn(R [p k]) -> [p k], as in GROUPED of train_ppo.py
                                                         --quick, --smoke, --seeds, --jobs

fn is imported from mine.py in the working directory, and tried on made-up numbers before anything is trained. A loss is
compared with DPO, IPO and SimPO on the same rankings. An advantage is compared with RLOO and GRPO on the gold reward,
and with DPO, which only sees an order. All methods have the same worlds, updates, number of settings, and learning
rates to choose from: each takes the rate with the most reward on validation prompts of the tuning world, averaged over
the four KL, at the same settings. Reward at a KL is measured as in __main__.py. --quick has two settings instead of
four, four learning rates instead of five, and three worlds.

A loss that ignores a.beta would be the same run for every beta, so it gets as many orders of the data instead. A run
whose loss becomes NaN adds no points. Other methods' runs are kept in rivals.csv and reused by later calls. The
function's own runs are made anew by each call, since the function may have changed.
"""

import math
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from unittest import mock

import torch
from torch import Tensor

import train_dpo
import train_ppo
from ablations import common, plot, world
from ablations.common import between, markdown, paired, show, t_interval
from ablations.frontier import __main__ as frontier
from rlhf import BadInput, require
from support.rewards import load_function, one_line

Methods = dict[str, dict[str, dict]]  # method: setting: flags of its script
RATES = (3e-3, 3e-4, 1e-3, 1e-2)  # of --quick; a smoke run has the first
COORDINATES = [f"{x} {part}" for part in frontier.PARTS for x in ("kl", "reward")]


# -------------------------------------------------------------------------------------------------- the function, tried


def checked(flag: str, name: str) -> Callable:
    """The function `name`, whose errors and wrong results become a BadInput of one line that begins with the flag."""
    function = load_function(name, flag)

    def fn(*args) -> Tensor:
        shape = args[-1].chosen.shape if flag == "--loss" else args[-1].shape
        try:
            values = function(*args)
        except Exception as error:
            raise BadInput(f"{flag} {name}: raised {one_line(error, name.partition(':')[0])}") from error
        require(isinstance(values, Tensor), f"{flag} {name}: gave a {type(values).__name__}, not a tensor")
        problem = f"{flag} {name}: gave the shape {[*values.shape]} for {'pairs' if flag == '--loss' else 'rewards'}"
        require(values.shape == shape, f"{problem} of the shape {[*shape]}: it must be the same")
        return values

    return fn


def try_loss(fn: Callable, name: str) -> bool:
    """Whether the loss depends on a.beta. BadInput if it cannot be trained: tried on eight made-up pairs, at the start
    of training, where policy and reference agree, and away from it."""
    draw = torch.Generator().manual_seed(0)
    ref, lengths = -2 - 6 * torch.rand(2, 8, generator=draw), torch.randint(1, 5, (2, 8), generator=draw)
    moved = ref + torch.randn(2, 8, generator=draw)
    losses = {}
    for place, logps in (("where policy and reference agree", ref), ("at made-up log-probs", moved)):
        for beta in (0.1, 1.0):
            logps = logps.clone().requires_grad_()
            pairs = train_dpo.Pairs(*(logps - ref), *logps, lengths.unbind())
            loss = losses[beta] = fn(world.args(train_dpo, loss=name, beta=beta), pairs)
            require(bool(loss.isfinite().all()), f"--loss {name}: gave {loss.tolist()} {place}: it must be finite")
            (slope,) = torch.autograd.grad(loss.sum(), logps, allow_unused=True) if loss.requires_grad else (None,)
            computed = "compute it from x.chosen, x.rejected or their _logps, without detach() or item()"
            require(slope is not None, f"--loss {name}: has no gradient: {computed}")
            require(bool(slope.isfinite().all()), f"--loss {name}: its gradient is not finite {place}")
            require(bool(slope.any()), f"--loss {name}: its gradient is 0 {place}: nothing would be learned")
    return not torch.equal(losses[0.1], losses[1.0])


def try_advantage(fn: Callable, name: str) -> None:
    """BadInput if the advantage cannot be used: tried on three made-up prompts; all answers to one score alike."""
    rewards = torch.rand(3, 4, generator=torch.Generator().manual_seed(0))
    rewards[2] = 0.5
    values = fn(rewards.clone())
    seen = f"for the rewards {[[round(x, 2) for x in row] for row in rewards.tolist()]}"
    require(bool(values.isfinite().all()), f"--advantage {name}: gave {values.tolist()} {seen}: it must be finite")
    require(bool(values.any()), f"--advantage {name}: is 0 {seen}: nothing would be learned")


@contextmanager
def added(flag: str, name: str) -> Iterator[None]:
    """Inside, train_dpo.py (--loss) or train_ppo.py (--advantage) knows the function by its name, module:function. An
    advantage's loss is summed over each answer's tokens, as RLOO's is."""
    table = train_dpo.LOSSES if flag == "--loss" else train_ppo.GROUPED
    with mock.patch.dict(table, {name: checked(flag, name)}), mock.patch.dict(train_ppo.AVERAGES, {name: "sequences"}):
        yield


# ------------------------------------------------------------------------------------------------------------- the runs


def main(a) -> None:
    """Tune and run the function given by a.loss or a.advantage, and those of its rivals' runs that rivals.csv lacks;
    print tables and a paragraph, and draw a figure."""
    require(not (a.loss and a.advantage), "--loss and --advantage: give one at a time")
    flag, name = ("--loss", a.loss) if a.loss else ("--advantage", a.advantage)
    require(name.count(":") == 1, f"{flag} {name}: must be module:function, as in mine:fn")
    require(a.tier == "e" and not a.tune, f"{flag} {name}: leave out --tier and --tune")
    require(a.seeds > 1, f"--seeds {a.seeds}: {flag} needs at least 2, for an interval")
    torch.set_num_threads(1)  # as in the processes of `each`
    fn, depends = checked(flag, name), True
    if a.loss:
        depends = try_loss(fn, name)
    else:
        try_advantage(fn, name)

    updates = 8 if a.smoke else frontier.UPDATES
    seeds = range(min(a.seeds, 2 if a.smoke else 3 if a.quick else a.seeds))
    rates = RATES[:1] if a.smoke else RATES if a.quick else frontier.GRID
    mine, *others = methods = methods_of(flag, name, 1 if a.smoke else 2 if a.quick else 4, depends)
    folder = common.work(frontier.NAME, a)
    for seed in (frontier.TUNED_IN, *seeds):
        frontier.prepare(seed, folder, updates)

    def fill(results: common.Results, runs: Iterable[tuple[str, float, int, dict]]) -> None:
        """Run what is missing of (setting, learning rate, world, flags)."""
        tasks = [
            (setting, seed, folder, updates, rate, flags)
            for setting, rate, seed, flags in runs
            if not results.done(named(setting, rate), seed)
        ]
        for (setting, seed, *_, rate, _), (along, end), seconds in common.each(run, tasks, a.jobs, folder):
            for step, values in along.items():
                results.add(named(setting, rate), seed, values, step)
            results.add(named(setting, rate), seed, end | {"seconds": seconds})

    def learn(results: common.Results, names: Sequence[str]) -> dict[str, float]:
        """Tune these methods, and run them in all worlds at their best learning rates, which are returned."""
        settings = [(m, setting, flags) for m in names for setting, flags in methods[m].items()]
        fill(results, [(x, rate, frontier.TUNED_IN, flags) for _, x, flags in settings for rate in rates])
        best = {m: best_rate(results, methods[m], rates) for m in names}
        fill(results, [(x, best[m], seed, flags) for m, x, flags in settings for seed in seeds])
        return best

    rivals = common.Results(folder / "rivals.csv")
    if rivals.values_of:
        print(f"other methods' runs are taken from {rivals.path}: delete it to make them again")
    fill(rivals, [("optimum", 0.0, seed, {}) for seed in (frontier.TUNED_IN, *seeds)])
    best = learn(rivals, others)
    out = folder / name.replace(":", ".")
    shutil.rmtree(out, ignore_errors=True)
    results = common.Results(out / "results.csv")
    results.values_of |= rivals.values_of  # in memory: its file has the function's own runs
    best |= learn(results, [mine])

    seconds = [x for key, x in results.values_of.items() if key[3] == "seconds" and key[0].startswith((*methods,))]
    tables, paragraph = report(results, methods, best, rates, seeds)
    plot.picture(results, partial(draw, methods=methods, best=best, seeds=seeds), out / "figure.png")
    print(
        f"\n{tables}\n\n{paragraph}\n\n{sum(seconds) / 60:.1f} minutes of one thread for all these "
        f"runs, {common.hardware()}."
    )
    print(f"The figure is {out}/figure.png; the numbers are {results.path} and {rivals.path}.")


def methods_of(flag: str, name: str, count: int, depends: bool) -> Methods:
    """The user's function first, then its rivals, with `count` settings each; `depends`: whether a loss uses a.beta."""
    betas = {1: frontier.BETAS[1:2], 2: frontier.BETAS[1:3], 4: frontier.BETAS}[count]
    coefs = {1: frontier.GOLD_COEFS[:1], 2: frontier.GOLD_COEFS[::2], 4: frontier.GOLD_COEFS}[count]

    def of_losses(losses: dict[str, str]) -> Methods:
        return {m: {f"{m} {x:g}": {"loss": loss, "beta": x} for x in betas} for m, loss in losses.items()}

    if flag == "--loss":
        methods = of_losses({f"loss {name}": name, "DPO": "dpo", "IPO": "ipo", "SimPO": "simpo"})
        if not depends:
            methods[f"loss {name}"] = {f"loss {name} {i}": {"loss": name, "seed": i} for i in range(len(betas))}
        return methods
    grouped = {f"PPO-gold {name}": name, "PPO-gold RLOO": "rloo", "PPO-gold GRPO": "grpo"}
    of_ppo = {m: {f"{m} {x:g}": {"advantage": n, "kl_coef": x} for x in coefs} for m, n in grouped.items()}
    return of_ppo | of_losses({"DPO": "dpo"})


def named(setting: str, rate: float) -> str:
    """The name of a setting's runs at a learning rate, of which the optimum has none."""
    return f"{setting} at {rate:g}" if rate else setting


def run(setting: str, seed: int, folder: Path, updates: int, rate: float, flags: dict) -> tuple[dict, dict]:
    """What `frontier.run` returns for these flags; no checkpoints, and {"diverged": 1} at the end, if the loss or a
    measurement is not finite."""
    flag = "--advantage" if "advantage" in flags else "--loss"
    name = flags.get(flag[2:], "")
    script = train_ppo if flag == "--advantage" else train_dpo
    with ExitStack() as stack:
        if ":" in name:
            stack.enter_context(added(flag, name))
        stack.enter_context(mock.patch.dict(frontier.SETTINGS, {setting: (script, flags)}))
        try:
            along, end = frontier.run(setting, seed, folder, updates, rate)
        except FloatingPointError as error:
            print(error)
            return {}, {"diverged": 1.0}
    finite = all(math.isfinite(x) for values in (end, *along.values()) for x in values.values())
    return (along, end) if finite else ({}, {"diverged": 1.0})


# ---------------------------------------------------------------------------------------------------- tables and figure


def path(results: common.Results, settings: Sequence[str], rate: float, seed: int, part: str) -> list:
    """The points (KL, reward) of these settings at a learning rate, on the prompts of `part`, that are on the hull of
    their validation points, beginning with the start."""
    points = {x: [(0.0, results.values("optimum", f"start {x}")[seed])] for x in frontier.PARTS}
    for name in (named(x, rate) for x in settings):
        for step in results.steps(name):
            at = {x: results.values_of.get((name, seed, step, x)) for x in COORDINATES}
            if None not in at.values():  # some worlds have diverged
                for x in frontier.PARTS:
                    points[x].append((at[f"kl {x}"], at[f"reward {x}"]))
    return [points[part][i] for i in frontier.hull(points["validation"])]


def best_rate(results: common.Results, settings: Sequence[str], rates: Sequence[float]) -> float:
    """The learning rate with the most reward on the tuning world's validation prompts, averaged over the four KL."""

    def reward(rate: float) -> float:
        line = path(results, settings, rate, frontier.TUNED_IN, "validation")
        return sum(between(line, nats) for nats in frontier.NATS)

    return max(rates, key=reward)


def at_equal_kl(results: common.Results, settings: Sequence[str], rate: float, seeds: Sequence[int]) -> dict:
    """KL -> seed -> reward on test prompts; under "mean" the average over the four KL."""
    lines = {seed: path(results, settings, rate, seed, "test") for seed in seeds}
    rewards = {nats: {seed: between(line, nats) for seed, line in lines.items()} for nats in frontier.NATS}
    mean = {seed: sum(of_seed[seed] for of_seed in rewards.values()) / len(rewards) for seed in seeds}
    return rewards | {"mean": mean}


def report(results: common.Results, methods: Methods, best: dict, rates: Sequence[float], seeds: Sequence[int]):
    """Tables (markdown), and a paragraph that says where the function stands."""
    mine, *others = methods
    rewards = {m: at_equal_kl(results, settings, best[m], seeds) for m, settings in methods.items()}
    tops = {nats: results.values("optimum", f"{nats:g}") for nats in frontier.NATS}
    starts = results.values("optimum", "start test")
    of_seeds = lambda values: t_interval([values[seed] for seed in seeds])  # noqa: E731
    rows = [["optimum", *(show(of_seeds(tops[x]), 3) for x in frontier.NATS), "", ""]]
    reach = {}
    for method, settings in methods.items():
        reach[method] = [max(path(results, settings, best[method], seed, "test"))[0] for seed in seeds]
        cells = [show(of_seeds(rewards[method][x]), 3) for x in frontier.NATS]
        rows.append([method, *cells, show(t_interval(reach[method])), f"{best[method]:g}"])
    rows.append(["reference", show(of_seeds(starts), 3) + " (KL 0)", "", "", "", "", ""])
    columns = [f"KL {x:g}" for x in frontier.NATS]
    differences = {x: {at: paired(rewards[mine][at], rewards[x][at]) for at in rewards[mine]} for x in others}
    lines = [[f"{mine} - {x}", *(show(y, 3) for y in differences[x].values())] for x in others]
    tables = [
        markdown(["reward on test prompts", *columns, "largest KL on the hull", "learning rate"], rows),
        markdown(["difference, paired by world", *columns, "their mean"], lines),
    ]

    def share(method: str) -> str:
        gains = {seed: rewards[method][1.0][seed] - starts[seed] for seed in seeds}
        return show(t_interval([gain / (tops[1.0][seed] - starts[seed]) for seed, gain in gains.items()]))

    sides = [f"{side(differences[x]['mean'])} {x} ({show(differences[x]['mean'], 3)})" for x in others]
    nats, listed = (", ".join(f"{x:g}" for x in xs) for xs in (frontier.NATS, sorted(rates)))
    sentences = [
        f"In reward at equal KL, {mine} is {', '.join(sides[:-1])} and {sides[-1]}.",
        f"These are means over KL {nats} nats, paired by world, with 95 % t-intervals over {len(seeds)} worlds.",
        f"At 1 nat it has {share(mine)} of the gain that the optimum has there "
        f"({', '.join(f'{x} {share(x)}' for x in others)}).",
    ]
    if min(reach[mine]) == 0:
        sentences.append("In some world no checkpoint of it has more reward than the reference, whose reward counts.")
    if ends := {m: min(x) for m, x in reach.items() if min(x) < frontier.NATS[-1]}:
        least = ", ".join(f"{m} {x:.2f}" for m, x in ends.items())
        sentences.append(f"Beyond its largest KL a method's last reward counts; the least over worlds is: {least}.")
    sentences.append(f"Each method has its best learning rate of {listed}, found in another world.")
    at_an_end = [m for m in methods if len(rates) > 1 and best[m] in (min(rates), max(rates))]
    if at_an_end:
        named = " and ".join(filter(None, [", ".join(at_an_end[:-1]), at_an_end[-1]]))
        sentences.append(f"For {named} that is an end of the list, so a better one may lie beyond.")
    if "seed" in next(iter(methods[mine].values())):
        sentences.append("It does not depend on a.beta, so its settings are orders of the data.")
    if lost := sum(key[0].startswith(mine) and key[3] == "diverged" for key in results.values_of):
        sentences.append(f"{lost} of its runs, those for the learning rate included, diverged and add no points.")
    return "\n\n".join(tables), " ".join(sentences)


def side(difference: tuple[float, float]) -> str:
    """Where an interval (mean, half) lies: above, below or not clearly different from."""
    mean, half = difference
    return "above" if mean - half > 0 else "below" if mean + half < 0 else "not clearly different from"


def draw(results: common.Results, page, methods: Methods, best: dict, seeds: Sequence[int]) -> None:
    """Left: the methods' hulls in the first world, the function's checkpoints, the exact frontier. Right: the function
    minus each rival at equal KL, with intervals over the worlds."""
    left, right = page.subplots(1, 2, width_ratios=[3, 2])
    mine, *others = methods
    seed = seeds[0]
    frontier_line = [(0.0, "start test"), *((x, f"{x:g}") for x in frontier.CURVE)]
    exact = [(x, results.values("optimum", name)[seed]) for x, name in frontier_line]
    left.plot(*zip(*exact, strict=True), color="black", linewidth=1, label="optimum")
    rewards = {m: at_equal_kl(results, settings, best[m], seeds) for m, settings in methods.items()}
    for i, (method, settings) in enumerate(methods.items()):
        line = path(results, settings, best[method], seed, "test")
        left.plot(*zip(*line, strict=True), ".-", color=f"C{i}", linewidth=1, markersize=3, label=method)
        if method == mine:
            continue
        means, halves = zip(*(paired(rewards[mine][x], rewards[method][x]) for x in frontier.NATS), strict=True)
        style = {"color": f"C{i}", "marker": "o", "markersize": 3, "capsize": 2, "linewidth": 1}
        right.errorbar(frontier.NATS, means, halves, label=method, **style)
    right.axhline(0, color="black", linewidth=1)
    right.set_xscale("log", base=2)
    right.set_xticks(frontier.NATS, [f"{x:g}" for x in frontier.NATS])
    right.set_title(f"{mine} minus", fontsize=8)
    left.set_xlim(-0.1, frontier.CURVE[-1])
    left.set_ylabel("gold reward")
    left.set_title(f"world {seed}, test prompts", fontsize=9)
    for axes in (left, right):
        axes.set_xlabel("KL to the reference, nats")
        axes.grid(alpha=0.3)
        axes.tick_params(labelsize=8)
        axes.legend(fontsize=7)
