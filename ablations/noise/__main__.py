"""Flipped labels: what they cost DPO, and whether a loss that knows how many there are wins it back.

    python -m ablations.noise            --quick, --smoke, --seeds

Claim (Chowdhury et al. 2024, arXiv 2403.00409; Mitchell 2023, ericmitchell.ai/cdpo.pdf): where a share of the labels is
flipped, robust DPO and conservative DPO, given that share, are better than DPO. The setting of the first paper's
theorems, log-linear policies, in worlds where everything but the training is a sum over all responses:

    pi(y|x) ~ ref(y|x) exp(theta . phi(x, y)),   reward r = w . phi,   64 responses to a prompt, 16 features

so that theta = w / beta is the optimum of J(pi) = E[r] - beta KL(pi || ref) and regret is J(pi*) - J(pi), both at
beta = 1. A pair is two responses of the reference to one of 32 prompts, labelled by Bradley and Terry's model ("BT"),
or by the reward alone ("sure"). Then each label is flipped with the same chance. 32 other prompts are for validation,
and 32 for the test, which all numbers are of. All methods see the same pairs in the same order, for as many steps.

    final       regret at the end, at beta 1
    stopped     the same at the step with the least regret on validation prompts
    tuned       regret at the end, at that of eight betas with the least regret on validation prompts
    matched     E[r] - E_ref[r] of ref^(1 - s) pi^s, on the line of the reference and the end at beta 1, at the s at
                which the KL is 0.5
    cosine      of theta . phi and r over all responses, less their means over a prompt: the direction
    scale       norm of beta theta . phi over that of r, the same way: 1 is right

Criterion, written before the full run: of BT labels of 4,000 pairs, differences paired by seed, 95 % t-intervals.
Reproduced: final regret of DPO - that of robust DPO, told the true share, is above 0 at flips of 0.2, 0.3 and 0.4.
Contradicted: one is below 0. Else not resolved. The rest is reported: the same at other sizes, conservative DPO, a
wrong share, and how much of the difference is left where beta is tuned or KL matched.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ablations import common, plot
from ablations.common import markdown, paired, show, t_interval
from rlhf import losses
from rlhf.runs import cli, schedule

NAME = "noise"
CLAIM = "where labels are flipped, robust DPO that knows the share has less regret than DPO"
METHODS = {  # per-pair losses, of the margin h, beta, and the true share of flips
    "DPO": lambda h, beta, share: losses.dpo(h, torch.zeros_like(h), beta),
    "conservative": lambda h, beta, share: losses.dpo(h, torch.zeros_like(h), beta, share),
    "robust": lambda h, beta, share: losses.robust(h, torch.zeros_like(h), beta, share),
    "IPO": lambda h, beta, share: losses.ipo(h, torch.zeros_like(h), beta),
    "robust told 0.2": lambda h, beta, share: losses.robust(h, torch.zeros_like(h), beta, 0.2),
}
WORLDS = {  # labels, pairs, shares of flips
    "BT 4000": ("BT", 4000, (0.0, 0.1, 0.2, 0.3, 0.4)),
    "BT 1000": ("BT", 1000, (0.2, 0.4)),
    "BT 16000": ("BT", 16000, (0.2, 0.4)),
    "sure 4000": ("sure", 4000, (0.0, 0.2, 0.4)),
}
MAIN = "BT 4000"
SETTINGS = {  # a wrong share is tried in the main world only
    f"{m} {world} {f:g}": (m, world, f)
    for world in WORLDS
    for f in WORLDS[world][2]
    for m in METHODS
    if world == MAIN or m != "robust told 0.2"
}
BETAS = (0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0)
PROMPTS, RESPONSES, FEATURES = 32, 64, 16
SPREAD = 1.5  # of the reward, in nats
STEPS, BATCH, RATE, LOOKS = 1000, 64, 0.05, 20
MATCHED = 0.5  # nats
VALIDATION, TEST = 1, 2  # thirds of the prompts; 0 is for training


@dataclass
class Args(common.Args):
    seeds: int = 10
    """seeds 0, 1, ... of every setting, >= 1"""


def main(a: Args) -> None:
    """Runs what results.csv does not have, and writes table and figure."""
    results = common.results(NAME, a)
    steps, seeds = (LOOKS, 2) if a.smoke else (STEPS, 4) if a.quick else (STEPS, a.seeds)
    torch.set_num_threads(1)
    for world, (labels, pairs, shares) in WORLDS.items():
        for share in shares:
            names = {m: name for name, (m, *where) in SETTINGS.items() if where == [world, share]}
            missing = [x for x in range(seeds) if not all(results.done(name, x) for name in names.values())]
            if not missing or (a.quick and world != MAIN):
                continue
            began = time.process_time()
            found = run(missing, labels, pairs, share, steps)
            seconds = (time.process_time() - began) / len(METHODS) / len(missing)
            for (method, seed), values in found.items():
                if method in names and not results.done(names[method], seed):
                    results.add(names[method], seed, values | {"seconds": seconds})
            print(f"{world}, flips {share:g}: {seconds * len(found):.0f} s", flush=True)
    plot.finish(NAME, a, results, report, draw)


# ----------------------------------------------------------------------------------------------------------- the worlds


def draw_world(seed: int, labels: str, pairs: int, share: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Features [prompts responses d], log-probs of the reference and rewards [prompts responses], and of each pair the
    features of the response that is called better, less those of the other [pairs d]."""
    world = torch.Generator().manual_seed(seed)
    normal = lambda *shape: torch.randn(*shape, generator=world, dtype=torch.float64)  # noqa: E731
    uniform = lambda: torch.rand(pairs, generator=world, dtype=torch.float64)  # noqa: E731
    features, direction = normal(3 * PROMPTS, RESPONSES, FEATURES), normal(FEATURES)
    ref = normal(3 * PROMPTS, RESPONSES).log_softmax(1)
    rewards = SPREAD * features @ (direction / direction.norm())
    prompts = torch.randint(PROMPTS, (pairs,), generator=world)
    first, second = torch.multinomial(ref[prompts].exp(), 2, generator=world).unbind(1)
    gaps = rewards[prompts, first] - rewards[prompts, second]
    right = (uniform() < gaps.sigmoid() if labels == "BT" else gaps > 0) ^ (uniform() < share)
    differences = features[prompts, first] - features[prompts, second]
    return features, ref, rewards, torch.where(right[:, None], differences, -differences)


def run(seeds: list[int], labels: str, pairs: int, share: float, steps: int) -> dict[tuple[str, int], dict[str, float]]:
    """Trains all methods at all betas on all seeds' worlds in one tensor, and measures them."""
    features, ref, rewards, differences = map(
        torch.stack, zip(*(draw_world(seed, labels, pairs, share) for seed in seeds), strict=True)
    )
    theta = torch.zeros(len(METHODS), len(BETAS), len(seeds), FEATURES, dtype=torch.float64, requires_grad=True)
    optimizer, looks = torch.optim.Adam([theta], lr=RATE), []
    drawn = torch.randint(pairs, (steps, BATCH), generator=torch.Generator().manual_seed(0))
    for step in range(steps):
        margins = torch.einsum("mbsd, snd -> mbsn", theta, differences[:, drawn[step]])  # log Z cancels
        total = torch.zeros(())
        for i, loss in enumerate(METHODS.values()):
            for j, beta in enumerate(BETAS):
                total = total + loss(margins[i, j], beta, share).mean(1).sum()
        optimizer.param_groups[0]["lr"] = RATE * schedule(step, steps, 0.1)
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
        if (step + 1) % (steps // LOOKS) == 0:
            looks.append(theta.detach().clone())

    of = lambda theta, part: measure(theta, features, ref, rewards, part)  # noqa: E731
    one = BETAS.index(1.0)
    end, validation = of(looks[-1], TEST), of(looks[-1], VALIDATION)["regret"]
    matched = of(at_kl(looks[-1][:, one : one + 1], of), TEST)["gain"][:, 0]
    along = {
        part: torch.stack([of(x[:, one : one + 1], part)["regret"][:, 0] for x in looks]) for part in (VALIDATION, TEST)
    }
    found = {}
    for i, method in enumerate(METHODS):
        for k, seed in enumerate(seeds):
            best, first = int(validation[i, :, k].argmin()), int(along[VALIDATION][:, i, k].argmin())
            values = {name: end[name][i, one, k].item() for name in ("cosine", "scale")}
            values["final"], values["tuned"] = end["regret"][i, one, k].item(), end["regret"][i, best, k].item()
            values["stopped"], values["matched"] = along[TEST][first, i, k].item(), matched[i, k].item()
            found[method, seed] = values
    return found


def measure(theta: Tensor, features: Tensor, ref: Tensor, rewards: Tensor, part: int) -> dict[str, Tensor]:
    """Of policies theta [methods betas seeds d], exactly, on a third of the prompts: each [methods betas seeds]."""
    features, ref, rewards = (x[:, part * PROMPTS : (part + 1) * PROMPTS] for x in (features, ref, rewards))
    implicit = torch.einsum("mbsd, spkd -> mbspk", theta, features)
    logps = (ref + implicit).log_softmax(-1)
    kl = (logps.exp() * (logps - ref)).sum(-1).mean(-1)
    gain = ((logps.exp() - ref.exp()) * rewards).sum(-1).mean(-1)
    optimum = ((ref + rewards).logsumexp(-1) - (ref.exp() * rewards).sum(-1)).mean(-1)  # J at pi*, less that of ref
    implicit, rewards = ((x - x.mean(-1, keepdim=True)).flatten(-2) for x in (implicit, rewards))
    betas = torch.tensor(BETAS, dtype=theta.dtype) if theta.shape[1] > 1 else torch.ones(1, dtype=theta.dtype)
    norms = implicit.norm(dim=-1), rewards.norm(dim=-1)
    cosine, scale = (implicit * rewards).sum(-1) / (norms[0] * norms[1]), betas[:, None] * norms[0] / norms[1]
    return {"regret": optimum - (gain - kl), "gain": gain, "kl": kl, "cosine": cosine, "scale": scale}


def at_kl(theta: Tensor, of: Callable) -> Tensor:
    """These policies with theta, that is log pi / ref, scaled so that the KL on test prompts is MATCHED (bisection)."""
    low, high = (torch.full_like(theta[..., :1], x) for x in (-5.0, 5.0))  # log10 of the scale
    for _ in range(40):
        middle = (low + high) / 2
        short = of(theta * 10**middle, TEST)["kl"][..., None] < MATCHED
        low, high = torch.where(short, middle, low), torch.where(short, high, middle)
    return theta * 10**middle


# ----------------------------------------------------------------------------------------------------- table and figure


def settings_of(results: common.Results, world: str, share: float) -> dict[str, str]:
    """Method -> setting, of those that have values."""
    names = {m: name for name, (m, *where) in SETTINGS.items() if where == [world, share]}
    return {m: name for m, name in names.items() if results.values(name, "final")}


def clauses(results: common.Results, metric: str, world: str = MAIN) -> dict[float, tuple[float, float]]:
    """Share of flips -> what robust DPO gains over DPO, in regret or in reward at one KL."""
    found = {}
    for share in WORLDS[world][2]:
        if share >= 0.2 and (names := settings_of(results, world, share)):
            both = results.values(names["DPO"], metric), results.values(names["robust"], metric)
            found[share] = paired(*(both[::-1] if metric == "matched" else both))
    return found


def report(results: common.Results) -> tuple[str, str, str]:
    """Table, verdict, effect."""
    columns = ("final", "stopped", "tuned", "matched", "cosine", "scale")
    rows, differences = [], []
    for world, (_, _, shares) in WORLDS.items():
        for share in shares:
            for method, name in settings_of(results, world, share).items():
                cells = [show(t_interval([*results.values(name, x).values()])) for x in columns]
                rows.append([world, f"{share:g}", method, *cells])
        gains = {metric: clauses(results, metric, world) for metric in columns[:4]}
        for share, final in gains["final"].items():
            cells = [show(found[share], 3) for found in gains.values()]
            differences.append([world, f"{share:g}", *cells, common.verdict([final]) if world == MAIN else ""])
    parts = [
        markdown(["labels, pairs", "flips", "method", *columns], rows),
        "What robust DPO gains over DPO, in regret, and at one KL in reward:",
        markdown(["labels, pairs", "flips", *columns[:4], "final, by the criterion"], differences),
    ]
    final, matched = clauses(results, "final"), clauses(results, "matched")
    effect = "; ".join(
        f"flips {share:g}: regret of DPO - robust {show(final[share], 3)}, reward at KL 0.5 of robust - DPO "
        f"{show(matched[share], 3)}"
        for share in (0.2, 0.4)
    )
    return "\n\n".join(parts), common.verdict([*final.values()]), effect + "."


def draw(results: common.Results, page) -> None:
    """Against the share of flips, of BT labels of 4,000 pairs: regret as it is and tuned, direction, scale."""
    grid, world = page.subplots(2, 2), MAIN
    titles = {
        "final": "regret at beta 1, at the end",
        "tuned": "regret at the beta best on validation prompts",
        "cosine": "direction: cosine to the true reward",
        "scale": "scale: norm over that of the true reward",
    }
    for axes, (metric, title) in zip(grid.flat, titles.items(), strict=True):
        for i, method in enumerate(METHODS):
            names = {share: settings_of(results, world, share).get(method) for share in WORLDS[world][2]}
            points = {f: t_interval([*results.values(x, metric).values()]) for f, x in names.items() if x}
            bars = [half if half < float("inf") else 0.0 for _, half in points.values()]
            shifted = [share + 0.004 * (i - 2) for share in points]
            axes.errorbar(
                shifted, [m for m, _ in points.values()], bars, marker="o", markersize=3, capsize=2, lw=1, label=method
            )
        axes.set_title(title, fontsize=9)
        axes.grid(alpha=0.3)
        axes.tick_params(labelsize=7)
    grid[1, 1].axhline(1, color="gray", lw=0.8)
    grid[1, 1].set_yscale("log")
    grid[0, 0].legend(fontsize=6)
    for axes in grid[1]:
        axes.set_xlabel("share of flipped labels", fontsize=8)


if __name__ == "__main__":
    cli(main, Args)
