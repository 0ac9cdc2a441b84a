"""Flipped labels: what they cost DPO, and whether a loss that knows their share wins it back.

    python -m ablations.noise            --quick, --smoke, --seeds

Claim (Chowdhury et al. 2024, arXiv 2403.00409; Mitchell 2023, ericmitchell.ai/cdpo.pdf): if a share of the labels is
flipped, robust DPO and conservative DPO, given that share, are better than DPO. The setting is that of the first
paper's theorems, log-linear policies, in worlds where everything but the training is a sum over all responses:

    pi(y|x) ~ ref(y|x) exp(theta . phi(x, y)),   reward r = w . phi,   64 responses to a prompt, 16 features

so theta = w / beta is the optimum of J(pi) = E[r] - beta KL(pi || ref), and regret is J(pi*) - J(pi), both at beta = 1.
A pair is two responses of the reference to one of 32 prompts, labelled by the Bradley-Terry model ("BT"), or by the
reward alone ("sure"). Then each label is flipped with the same probability. 32 other prompts are for validation, and 32
for the test, which all numbers are measured on. All methods see the same pairs in the same order, for as many steps.

    final       regret at the end, at beta 1
    stopped     the same at the step with the least regret on validation prompts
    tuned       regret at the end with theta scaled by the factor that has the least regret on validation prompts: what
                another beta can give back, without the gaps of a grid of betas
    matched     E[r] - E_ref[r] with theta scaled so that the KL is 0.5
    cosine      of theta . phi and r over all responses, less their means over a prompt: the direction
    scale       norm of theta . phi over that of r, the same way: 1 is right

Criterion, written before the full run: with BT labels of 4,000 pairs, differences paired by seed, 95 % t-intervals.
Reproduced: final regret of DPO - that of robust DPO, told the true share, is above 0 at flips of 0.2, 0.3 and 0.4.
Contradicted: one is below 0. Else not resolved. The rest is reported: the same at other sizes, conservative DPO, a
wrong share, and how much of the difference is left if the scale is tuned or the KL matched.
"""

import time
from dataclasses import dataclass

import torch
from torch import Tensor

from ablations import common, plot
from ablations.common import markdown, paired, show, t_interval
from rlhf import losses
from support.runs import cli, schedule

NAME = "noise"
CLAIM = "if labels are flipped, robust DPO told the share of flips has less regret than DPO"
METHODS = {  # loss per pair at beta 1, from the margin h and the true share of flips
    "DPO": lambda h, share: losses.dpo(h, torch.zeros_like(h), 1.0),
    "conservative": lambda h, share: losses.dpo(h, torch.zeros_like(h), 1.0, share),
    "robust": lambda h, share: losses.robust(h, torch.zeros_like(h), 1.0, share),
    "IPO": lambda h, share: losses.ipo(h, torch.zeros_like(h), 1.0),
    "robust told 0.2": lambda h, share: losses.robust(h, torch.zeros_like(h), 1.0, 0.2),
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
PROMPTS, RESPONSES, FEATURES = 32, 64, 16
SPREAD = 1.5  # standard deviation of the reward, nats
STEPS, BATCH, RATE, LOOKS = 1000, 64, 0.05, 20
MATCHED = 0.5  # nats
VALIDATION, TEST = 1, 2  # thirds of the prompts; the first is for training


@dataclass
class Args(common.Args):
    seeds: int = 10
    """seeds 0, 1, ... of every setting, >= 1"""


def main(a: Args) -> None:
    """Run what results.csv lacks, then write table and figure."""
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
            measured = run(missing, labels, pairs, share, steps)
            seconds = (time.process_time() - began) / len(METHODS) / len(missing)
            for (method, seed), values in measured.items():
                if method in names and not results.done(names[method], seed):
                    results.add(names[method], seed, values | {"seconds": seconds})
            print(f"{world}, flips {share:g}: {seconds * len(measured):.0f} s", flush=True)
    plot.finish(NAME, a, results, report, draw)


# ----------------------------------------------------------------------------------------------------------- the worlds


def draw_world(seed: int, labels: str, pairs: int, share: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Features [prompts responses d], log-probs of the reference and rewards [prompts responses], and for each pair the
    features of the response labelled better, less those of the other [pairs d]."""
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
    """Train all methods on all seeds' worlds in one tensor -> {(method, seed): values}."""
    drawn_worlds = zip(*(draw_world(seed, labels, pairs, share) for seed in seeds), strict=True)
    *world, differences = map(torch.stack, drawn_worlds)
    theta = torch.zeros(len(METHODS), len(seeds), FEATURES, dtype=torch.float64, requires_grad=True)
    optimizer, thetas = torch.optim.Adam([theta], lr=RATE), []
    batches = torch.randint(pairs, (steps, BATCH), generator=torch.Generator().manual_seed(0))
    for step in range(steps):
        margins = torch.einsum("msd, snd -> msn", theta, differences[:, batches[step]])  # log Z cancels
        total = torch.zeros(())
        for h, loss in zip(margins, METHODS.values(), strict=True):
            total = total + loss(h, share).mean(1).sum()
        optimizer.param_groups[0]["lr"] = RATE * schedule(step, steps, 0.1)
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
        if (step + 1) % (steps // LOOKS) == 0:
            thetas.append(theta.detach().clone())

    end = measure(thetas[-1], *world, TEST)
    tuned = measure(best_scale(thetas[-1], *world), *world, TEST)["regret"]
    matched = measure(at_kl(thetas[-1], *world), *world, TEST)["gain"]
    regrets = {part: torch.stack([measure(x, *world, part)["regret"] for x in thetas]) for part in (VALIDATION, TEST)}
    stopped = regrets[TEST].gather(0, regrets[VALIDATION].argmin(0, keepdim=True))[0]
    columns = {"final": end["regret"], "stopped": stopped, "tuned": tuned, "matched": matched}
    columns |= {name: end[name] for name in ("cosine", "scale")}
    return {
        (method, seed): {name: x[i, k].item() for name, x in columns.items()}
        for i, method in enumerate(METHODS)
        for k, seed in enumerate(seeds)
    }


def measure(theta: Tensor, features: Tensor, ref: Tensor, rewards: Tensor, part: int) -> dict[str, Tensor]:
    """Exact values of policies theta [methods seeds d] on one third of the prompts: each [methods seeds]."""
    features, ref, rewards = (x[:, part * PROMPTS : (part + 1) * PROMPTS] for x in (features, ref, rewards))
    implicit = torch.einsum("msd, spkd -> mspk", theta, features)
    logps = (ref + implicit).log_softmax(-1)
    kl = (logps.exp() * (logps - ref)).sum(-1).mean(-1)
    gain = ((logps.exp() - ref.exp()) * rewards).sum(-1).mean(-1)
    optimum = ((ref + rewards).logsumexp(-1) - (ref.exp() * rewards).sum(-1)).mean(-1)  # J(pi*) - J(ref)
    implicit, rewards = ((x - x.mean(-1, keepdim=True)).flatten(-2) for x in (implicit, rewards))
    norms = implicit.norm(dim=-1), rewards.norm(dim=-1)
    cosine, scale = (implicit * rewards).sum(-1) / (norms[0] * norms[1]), norms[0] / norms[1]
    return {"regret": optimum - (gain - kl), "gain": gain, "kl": kl, "cosine": cosine, "scale": scale}


def best_scale(theta: Tensor, *world: Tensor) -> Tensor:
    """These policies with theta scaled by the factor in [1e-3, 1e3] that has the least regret on validation prompts.

    Search: the best of 41 factors in equal ratios, then of 41 around it, and so on until the ratio is 1.0001."""
    middle, width = torch.zeros_like(theta[..., :1]), 3.0  # log10 of the factor
    for _ in range(4):
        tried = torch.stack([middle + width * i / 20 for i in range(-20, 21)]).clamp(-3, 3)
        regrets = torch.stack([measure(theta * 10**x, *world, VALIDATION)["regret"] for x in tried])
        middle, width = tried.gather(0, regrets.argmin(0)[None, ..., None])[0], width / 15
    return theta * 10**middle


def at_kl(theta: Tensor, *world: Tensor) -> Tensor:
    """These policies with theta, that is log pi / ref, scaled so that the KL on test prompts is MATCHED (bisection)."""
    low, high = (torch.full_like(theta[..., :1], x) for x in (-5.0, 5.0))  # log10 of the scale
    for _ in range(40):
        middle = (low + high) / 2
        short = measure(theta * 10**middle, *world, TEST)["kl"][..., None] < MATCHED
        low, high = torch.where(short, middle, low), torch.where(short, high, middle)
    return theta * 10**middle


# ----------------------------------------------------------------------------------------------------- table and figure


def settings_of(results: common.Results, world: str, share: float) -> dict[str, str]:
    """Method -> setting, for settings that have values."""
    names = {m: name for name, (m, *where) in SETTINGS.items() if where == [world, share]}
    return {m: name for m, name in names.items() if results.values(name, "final")}


def gain(
    results: common.Results, metric: str, world: str, share: float, method: str, than: str = "DPO"
) -> tuple[float, float]:
    """What a method gains over another, in regret or in reward at one KL: (mean, half interval)."""
    names = settings_of(results, world, share)
    both = results.values(names[than], metric), results.values(names[method], metric)
    return paired(*(both[::-1] if metric == "matched" else both))


def clauses(results: common.Results) -> dict[float, tuple[float, float]]:
    """Share of flips -> (mean, half interval) of DPO's regret minus robust DPO's."""
    return {share: gain(results, "final", MAIN, share, "robust") for share in WORLDS[MAIN][2] if share >= 0.2}


def report(results: common.Results) -> tuple[str, str, str]:
    """Tables, verdict, effect."""
    columns, criterion = ("final", "stopped", "tuned", "matched", "cosine", "scale"), clauses(results)
    rows, differences, tuned = [], [], []
    for world, (_, _, shares) in WORLDS.items():
        for share in shares:
            names, place = settings_of(results, world, share), [world, f"{share:g}"]
            for method, name in names.items():
                rows.append([*place, method, *(show(t_interval([*results.values(name, x).values()])) for x in columns)])
            if names and share:
                cells = [show(gain(results, metric, world, share, "robust"), 3) for metric in columns[:4]]
                inside = world == MAIN and share in criterion
                differences.append([*place, *cells, common.verdict([criterion[share]]) if inside else ""])
            if names:
                pairs = [("robust", "DPO"), ("conservative", "DPO"), ("IPO", "DPO"), ("IPO", "robust")]
                tuned.append([*place, *(show(gain(results, "tuned", world, share, *x), 4) for x in pairs)])
    header = ["robust over DPO", "conservative over DPO", "IPO over DPO", "IPO over robust"]
    parts = [
        markdown(["labels, pairs", "flips", "method", *columns], rows),
        "Gains of robust DPO over DPO: in regret, and at equal KL in reward:",
        markdown(["labels, pairs", "flips", *columns[:4], "final, by the criterion"], differences),
        "Gains in regret with the scale tuned:",
        markdown(["labels, pairs", "flips", *header], tuned),
    ]
    effect = "; ".join(
        f"flips {share:g}: regret of DPO minus robust DPO {show(criterion[share], 3)}, with the scale tuned "
        f"{show(gain(results, 'tuned', MAIN, share, 'robust'), 3)}"
        for share in criterion
    )
    return "\n\n".join(parts), common.verdict([*criterion.values()]), effect + "."


def draw(results: common.Results, page) -> None:
    """Against the share of flips, for BT labels of 4,000 pairs: regret as it is and tuned, direction, scale."""
    grid, world = page.subplots(2, 2), MAIN
    titles = {
        "final": "regret at beta 1, at the end",
        "tuned": "regret with the scale tuned on validation prompts",
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
