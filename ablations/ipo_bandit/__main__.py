"""IPO and DPO on three actions: preferences that never fail drive DPO, but not IPO, to one action whatever tau is.

    python -m ablations.ipo_bandit            --quick, --smoke, --seeds

Claim (Azar et al. 2023, section 5.4, arXiv 2310.12036, figures 1 and 2): if an action is always preferred, DPO ends
at a policy that gives the others no probability, for every tau, while IPO stays as near the reference as tau says. The
paper's own scale: a softmax over actions a, b and c, a uniform reference, Adam at 0.01, mini-batches of 9 pairs drawn
with replacement, 18,000 steps, 10 seeds. IPO's least squares have a closed form, which the paper does not print:

    D1  a > b, b > c, a > c    log-ratios 1 / (3 tau), 0, -1 / (3 tau)
    D2  a > b, b > c, c > a    0, 0, 0
    D3  a > b, b > a, b > c    0, 0, -1 / (2 tau)

The paper prints D3 as a > b, b > a alone. Then no loss sees c: its logit stays, and so does its probability of 1/3,
apart from the noise of the other two. The figure, where DPO lets c vanish, needs one pair with c in it. Both are run.

Criterion, written before the full run, on D1; means over seeds with 95 % t-intervals. Reproduced: at each tau the whole
interval of IPO's probability of each action is within 0.01 of the closed form, and at each tau up to 1 the whole
interval of DPO's probability of a is above 0.99. Contradicted: one of these intervals lies wholly outside. Else not
resolved. DPO at tau = 10 is still on its way after 18,000 steps, and is not part of the criterion.
"""

import time
from dataclasses import dataclass

import torch
from torch import Tensor

from ablations import common, plot
from ablations.common import markdown, t_interval
from rlhf import losses
from support.runs import cli

NAME = "ipo_bandit"
CLAIM = "if preferences are certain, DPO collapses to one action for every tau; IPO follows its closed form"
METHODS = {"IPO": losses.ipo, "DPO": losses.dpo}
TAUS = (0.1, 0.5, 1.0, 10.0)
PAIRS = {"D1": "ab bc ac", "D2": "ab bc ca", "D3": "ab ba bc", "D3 as printed": "ab ba"}  # the preferred action first
OPTIMA = {"D1": (1 / 3, 0, -1 / 3), "D2": (0, 0, 0), "D3": (0, 0, -1 / 2), "D3 as printed": (0, 0, 0)}  # tau log-ratio
SETTINGS = {f"{m} {d} {tau:g}": (m, d, tau) for m in METHODS for d in PAIRS for tau in TAUS}
STEPS, BATCH, RATE = 18_000, 9, 0.01
NEAR, SURE = 0.01, 0.99


@dataclass
class Args(common.Args):
    seeds: int = 10
    """seeds 0, 1, ... of every setting, >= 1"""


def main(a: Args) -> None:
    """Run the seeds that results.csv lacks, and write table and figure."""
    results, steps = common.results(NAME, a), 50 if a.smoke else 6000 if a.quick else STEPS
    seeds = [seed for seed in range(a.seeds) if not all(results.done(setting, seed) for setting in SETTINGS)]
    began = time.perf_counter()
    along = learn(seeds, steps) if seeds else {}
    seconds = (time.perf_counter() - began) / len(SETTINGS) / max(len(seeds), 1)
    for i, setting in enumerate(SETTINGS):
        for j, seed in enumerate(seeds):
            if results.done(setting, seed):
                continue
            policy = {step: dict(zip("abc", probs[i, j].tolist(), strict=True)) for step, probs in along.items()}
            if SETTINGS[setting][1] == "D1":
                for step in along:
                    results.add(setting, seed, {"a": policy[step]["a"]}, step)
            results.add(setting, seed, policy[steps] | {"seconds": seconds})
    plot.finish(NAME, a, results, report, draw)


def learn(seeds: list[int], steps: int) -> dict[int, Tensor]:
    """Train all settings and seeds in one tensor -> {step: probabilities [settings seeds 3]} at ten steps."""
    pairs = torch.zeros(len(PAIRS), 3, 2, dtype=torch.long)  # [data pair winner-loser]; missing pairs are a, a
    for i, text in enumerate(PAIRS.values()):
        pairs[i, : len(text.split())] = torch.tensor([["abc".index(x) for x in pair] for pair in text.split()])
    sizes = torch.tensor([len(text.split()) for text in PAIRS.values()])
    drawn = []
    for seed in seeds:
        uniform = torch.rand(steps, len(PAIRS), BATCH, generator=torch.Generator().manual_seed(seed))
        which = (uniform * sizes[:, None]).long()
        drawn.append(torch.stack([(which == pair).double().mean(2) for pair in range(3)], 2))
    shares = torch.stack(drawn, 2)  # [steps data seeds pair]: share of the mini-batch

    # logits [method tau data seed action]; with a uniform reference, the log-ratios up to log Z, which cancels
    logits = torch.zeros(len(METHODS), len(TAUS), len(PAIRS), len(seeds), 3, dtype=torch.float64, requires_grad=True)
    optimizer, along = torch.optim.Adam([logits], lr=RATE), {}
    winner, loser = pairs[:, None].expand(*logits.shape[:-1], -1, -1).unbind(-1)
    for step in range(1, steps + 1):
        chosen, rejected = (logits.gather(4, action).flatten(2) for action in (winner, loser))
        share = shares[step - 1].flatten()
        total = torch.zeros(())
        for i, loss in enumerate(METHODS.values()):
            for j, tau in enumerate(TAUS):
                total = total + loss(chosen[i, j], rejected[i, j], tau) @ share
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
        if step % (steps // 10) == 0:
            along[step] = logits.detach().softmax(-1).transpose(1, 2).flatten(0, 2)
    return along


# ----------------------------------------------------------------------------------------------------- table and figure


def optimum(data: str, tau: float) -> list[float]:
    """IPO's closed form: probabilities of a, b and c."""
    return (torch.tensor(OPTIMA[data], dtype=torch.float64) / tau).softmax(0).tolist()


def chances(results: common.Results, setting: str) -> list[tuple[float, float]]:
    """Mean probability of a, b and c over seeds, and half its interval."""
    return [t_interval([*results.values(setting, action).values()]) for action in "abc"]


def clauses(results: common.Results) -> list[tuple[float, float]]:
    """The quantities that the criterion says are above 0, with half their intervals."""
    differences = []
    for tau in TAUS:
        for (mean, half), exact in zip(chances(results, f"IPO D1 {tau:g}"), optimum("D1", tau), strict=True):
            differences += [(NEAR - (mean - exact), half), (NEAR + (mean - exact), half)]
        if tau <= 1:
            mean, half = chances(results, f"DPO D1 {tau:g}")[0]
            differences.append((mean - SURE, half))
    return differences


def report(results: common.Results) -> tuple[str, str, str]:
    """Table, verdict, effect."""
    rows, joined = [], lambda xs: " ".join(f"{x:.4f}" for x in xs)  # noqa: E731
    for data in PAIRS:
        for tau in TAUS:
            both = [chances(results, f"{method} {data} {tau:g}") for method in METHODS]
            cells = [f"{joined(m for m, _ in x)} (+- {max(half for _, half in x):.4f})" for x in both]
            rows.append([data, f"{tau:g}", joined(optimum(data, tau)), *cells])
    header = ["data", "tau", "closed form of IPO: a b c", "IPO: a b c (largest half-interval)", "DPO: a b c"]
    mine, other = (common.show(chances(results, f"{method} D1 1")[0], 4) for method in METHODS)
    closed = f"{optimum('D1', 1)[0]:.4f}"
    effect = f"data D1, tau 1: P(action a) is {mine} with IPO (closed form {closed}), {other} with DPO."
    return markdown(header, rows), common.verdict(clauses(results)), effect


def draw(results: common.Results, page) -> None:
    """Probabilities at the end for each set of pairs, with IPO's closed form as lines; the way there on D1."""
    grid = page.subplots(2, 2)
    fine = torch.logspace(-1.1, 1.1, 60).tolist()
    for axes, data in zip(grid.flat, ("D1", "D2", "D3"), strict=False):
        exact = torch.tensor([optimum(data, tau) for tau in fine])
        for i, colour in enumerate(("C0", "C1", "C2")):
            axes.plot(fine, exact[:, i], color=colour, linewidth=1)
            for method, marker, filled in (("IPO", "o", colour), ("DPO", "s", "none")):
                points = [chances(results, f"{method} {data} {tau:g}")[i] for tau in TAUS]
                means, halves = zip(*points, strict=True)
                bars = [half if half < 1 else 0.0 for half in halves]
                axes.errorbar(TAUS, means, bars, fmt=marker, color=colour, mfc=filled, markersize=5, capsize=2)
        axes.set_xscale("log")
        axes.set_xticks(TAUS, [f"{tau:g}" for tau in TAUS])
        axes.set_title(f"{data}: {PAIRS[data].replace(' ', ', ')}", fontsize=9)
        axes.set_xlabel("tau", fontsize=8)
    for method, line in (("IPO", "-"), ("DPO", "--")):
        for tau, colour in zip(TAUS, ("C4", "C3", "C6", "C7"), strict=True):
            setting = f"{method} D1 {tau:g}"
            steps = results.steps(setting)
            means = [t_interval([*results.values(setting, "a", step).values()])[0] for step in steps]
            grid[1, 1].plot(
                [step / 1000 for step in steps], means, line, color=colour, linewidth=1, label=f"{method} {tau:g}"
            )
    grid[1, 1].set_title("pi(a) on D1", fontsize=9)
    grid[1, 1].set_xlabel("thousand steps", fontsize=8)
    grid[1, 1].legend(fontsize=5, ncols=2, loc="lower right")
    for name, colour in zip("abc", ("C0", "C1", "C2"), strict=True):
        grid[0, 1].plot([], [], color=colour, label=f"{name}, closed form of IPO")
    grid[0, 1].plot([], [], "ko", markersize=4, label="IPO")
    grid[0, 1].plot([], [], "ks", markersize=4, mfc="none", label="DPO")
    grid[0, 1].legend(fontsize=6, loc="upper right")
    for axes in grid.flat:
        axes.grid(alpha=0.3)
        axes.set_ylim(-0.03, 1.03)
        axes.tick_params(labelsize=7)


if __name__ == "__main__":
    cli(main, Args)
