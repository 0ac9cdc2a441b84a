"""Estimators without noise: the KL and its gradient, the policy gradient by groups, and the KL of Best-of-n.

    python -m ablations.estimators            --smoke, --seeds

Everything is a sum over all outcomes or, for normals, an integral: no number has a sampling error. Seeds are worlds:
random policies, references and rewards over a few responses. `off` is |found - exact| / |exact| of a gradient.

Criterion, written before the full run. Reproduced: all of these hold in every world, up to rounding (1e-9). Else
contradicted.

    KL           of N(0, 1) to N(m, 1), m = 0.1 and 1: bias / KL of k1, k2 and k3 is within 0.0005 of Schulman's table
                 (2020, joschu.net/blog/kl-approx.html), which has 3 digits, and deviation / KL within 2 %
    gradients    as a loss k1 has mean gradient 0, k2 that of KL(pi || ref), k3 that of KL(ref || pi), and k1 as a
                 reward that of KL(pi || ref) (Tang and Munos 2025, arXiv 2506.09477); k3 as a loss and k2 and k3 as
                 rewards are off by more than 1 %
    training     gradient ascent on E[r] less 0.5 times the estimator, from ref on: k1 as a reward and k2 as a loss end
                 at ref exp(r / 0.5) / Z, k3 as a loss at 0.5 ref / (l - r), the best by KL(ref || pi), within 1e-6 of
                 each probability; and there E[r] - 0.5 KL(pi || ref) is lower by more than 1 % of the possible gain
    groups       mean over all groups of k: RLOO (Kool et al. 2019) and ReMax (Li et al. 2023, arXiv 2310.10505) are the
                 exact gradient, Dr. GRPO (Liu et al. 2025, arXiv 2503.20783) is (k - 1) / k of it, GRPO's (Shao et al.
                 2024, arXiv 2402.03300) division by the group's deviation turns it: cosine below 0.999
    Best-of-n    KL to the policy is at most log n - (n - 1) / n (Beirami et al. 2024, arXiv 2401.01879), and within 1 %
                 of it if rewards are distinct and no response is more probable than 1 / (20 n); the win rate against
                 one response of the policy, a tie being half a win, is at most n / (n + 1)
"""

import itertools
import math
import statistics
import time

import torch
from torch import Tensor

from ablations import common, plot
from ablations.common import markdown
from ablations.world import bound, law
from rlhf import advantages
from support.runs import cli

NAME = "estimators"
CLAIM = "k3 is unbiased but not as a loss; RLOO and ReMax are exact, GRPO is not; Best-of-n's KL is below its formula"
SHIFTS = (0.1, 0.2, 0.5, 1.0, 2.0)
KS = ("k1", "k2", "k3")
BLOG = {  # Schulman's table: (shift, estimator) -> bias / KL, deviation / KL
    (0.1, "k1"): (0, 20),
    (0.1, "k2"): (0.002, 1.42),
    (0.1, "k3"): (0, 1.42),
    (1.0, "k1"): (0, 2),
    (1.0, "k2"): (0.25, 1.73),
    (1.0, "k3"): (0, 1.7),
}
RESPONSES, GROUPS = 4, (2, 4, 8)
LENGTHS = (1, 2, 4, 8)  # tokens of the responses
BETA, STEPS = 0.5, 4000  # of gradient ascent, at a rate of 1
PLACES = ("k1 reward", "k2 loss", "k3 loss")
METHODS = ("no baseline", "RLOO", "ReMax", "Dr. GRPO", "GRPO", "Dr. GRPO / length")
CHANCES = (0.02, 0.1, 0.5)
DRAWN = (2, 4, 8, 16, 32, 64)  # n of Best-of-n
LAWS = {  # numbers of responses, equally likely unless "of random chance"
    "2 responses": 2,
    "5 responses": 5,
    "50 responses": 50,
    "5000 responses": 5000,
    "5000 of random chance": 5000,
    "5000, reward 0 or 1": 5000,
}
SETTINGS = {
    "normals": {"shift": SHIFTS},
    "gradients": {"responses": RESPONSES},
    "training": {"responses": RESPONSES, "beta": BETA, "steps": STEPS},
    "groups": {"responses": RESPONSES, "k": GROUPS},
    "best of n": {"n": DRAWN},
}
TINY = 1e-9


def main(a: common.Args) -> None:
    """Compute whatever results.csv lacks, and write table and figure."""
    results = common.results(NAME, a)
    for seed in range(a.seeds):
        for setting, of_world in zip(SETTINGS, (normals, gradients, training, groups, best_of_n), strict=True):
            if results.done(setting, seed) or (setting == "normals" and seed):  # normals has no worlds
                continue
            began = time.process_time()
            values = of_world(torch.Generator().manual_seed(seed))
            results.add(setting, seed, values | {"seconds": time.process_time() - began})
    plot.finish(NAME, a, results, report, draw)


# ------------------------------------------------------------------------------------------------------- the exact sums


def normals(_) -> dict[str, float]:
    """Bias and deviation of the estimates of KL(N(0, 1) || N(m, 1)) = m^2 / 2, as shares of it."""
    x, metrics = torch.linspace(-16, 16, 320_001, dtype=torch.float64), {}
    weights = (-x.square() / 2).exp()
    weights /= weights.sum()
    for shift in SHIFTS:
        logratios, true = shift * shift / 2 - shift * x, shift * shift / 2
        for name in KS:
            estimate = advantages.kl_estimate(logratios, name)
            mean = weights @ estimate
            metrics[f"{shift:g} {name} bias"] = (mean.item() - true) / true
            metrics[f"{shift:g} {name} deviation"] = (weights @ (estimate - mean).square()).sqrt().item() / true
    return metrics


def random_logits(world: torch.Generator, size: int = RESPONSES) -> Tensor:
    return torch.randn(size, generator=world, dtype=torch.float64)


def off(mean: Tensor, exact: Tensor) -> float:
    return ((mean - exact).norm() / exact.norm()).item()


def gradients(world: torch.Generator) -> dict[str, float]:
    """Mean gradients of k1, k2 and k3 with respect to the policy's logits, as a loss and as a reward."""
    logits, ref = random_logits(world).requires_grad_(), random_logits(world).log_softmax(0)
    logp = logits.log_softmax(0)
    p, metrics = logp.exp().detach(), {}
    gradient = lambda x: torch.autograd.grad(x, logits, retain_graph=True)[0]  # noqa: E731
    backward, forward = gradient((logp.exp() * (logp - ref)).sum()), gradient((ref.exp() * (ref - logp)).sum())
    for name in KS:
        estimate = advantages.kl_estimate(logp - ref, name)
        loss, reward = gradient((p * estimate).sum()), gradient((p * estimate.detach() * logp).sum())
        metrics[f"{name} loss size"] = (loss.norm() / backward.norm()).item()
        metrics[f"{name} loss off KL(pi, ref)"] = off(loss, backward)
        metrics[f"{name} loss off KL(ref, pi)"] = off(loss, forward)
        metrics[f"{name} reward off KL(pi, ref)"] = off(reward, backward)
    return metrics


def training(world: torch.Generator) -> dict[str, float]:
    """Gradient ascent on E[r] less BETA times an estimator, as a loss or as a reward: distance of the probabilities to
    their closed form, KL to the reference, and share of the possible gain in J = E[r] - BETA KL."""
    ref, rewards, metrics = random_logits(world).log_softmax(0), random_logits(world), {}
    optimum = (ref + rewards / BETA).log_softmax(0)
    low, high = rewards.max(), rewards.max() + BETA  # of l, at which the probabilities BETA ref / (l - r) sum to 1
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if (BETA * ref.exp() / (middle - rewards)).sum() > 1 else (low, middle)
    expected = {"k1 reward": optimum.exp(), "k2 loss": optimum.exp(), "k3 loss": BETA * ref.exp() / (high - rewards)}
    objective = lambda logp: logp.exp() @ (rewards - BETA * (logp - ref))  # noqa: E731
    for name, use in (x.split() for x in PLACES):
        logits = ref.clone().requires_grad_()
        for _ in range(STEPS):
            logp = logits.log_softmax(0)
            estimate = BETA * advantages.kl_estimate(logp - ref, name)
            terms = (rewards - estimate.detach()) * logp if use == "reward" else rewards * logp - estimate
            [gradient] = torch.autograd.grad(logp.exp().detach() @ terms, logits)
            logits.data += gradient
        logp = logits.detach().log_softmax(0)
        share = (objective(logp) - objective(ref)) / (objective(optimum) - objective(ref))
        metrics[f"{name} {use} off"] = (logp.exp() - expected[f"{name} {use}"]).abs().max().item()
        metrics |= {f"{name} {use} KL": (logp.exp() @ (logp - ref)).item(), f"{name} {use} share": share.item()}
    return metrics


def groups(world: torch.Generator) -> dict[str, float]:
    """Mean and variance, over all groups of k responses, of the group's mean of A grad log pi."""
    p, rewards = random_logits(world).softmax(0), random_logits(world) + 2  # only "no baseline" depends on their mean
    exact, metrics = p * (rewards - p @ rewards), {}
    for k in GROUPS:
        which = torch.tensor([*itertools.product(range(RESPONSES), repeat=k)])
        R, chance = rewards[which], p[which].prod(1)
        scores = torch.eye(RESPONSES, dtype=torch.float64)[which] - p  # gradients of log pi by the logits, [group k v]
        centred = advantages.drgrpo(R)
        A = {
            "no baseline": R,
            "RLOO": advantages.rloo(R),
            "ReMax": advantages.remax(R, rewards[p.argmax()].expand(len(R))),
            "Dr. GRPO": centred,
            "GRPO": advantages.grpo(R),
            "Dr. GRPO / length": centred / torch.tensor(LENGTHS)[which],
        }
        for name in METHODS:
            of_group = (A[name][:, :, None] * scores).mean(1)
            mean = chance @ of_group
            share = (mean @ exact / exact.square().sum()).item()  # projection on the exact gradient
            metrics[f"{name} {k} off"] = off(mean, exact)
            metrics[f"{name} {k} share"] = share
            metrics[f"{name} {k} off share"] = off(mean, (k - 1) / k * exact)
            metrics[f"{name} {k} cosine"] = torch.cosine_similarity(mean, exact, 0).item()
            metrics[f"{name} {k} turned"] = (mean.sign() != exact.sign()).sum().item()
            noise = (chance @ (of_group - mean).square().sum(1)).item()
            metrics[f"{name} {k} noise"] = noise / mean.square().sum().item()
        right = torch.tensor([*itertools.product((0.0, 1.0), repeat=k)], dtype=torch.float64)
        for x in CHANCES:  # of a right answer, with reward 1 or 0: the gradient by its log-odds
            mean = (right * x + (1 - right) * (1 - x)).prod(1) @ (advantages.grpo(right) * (right - x)).mean(1)
            metrics[f"GRPO {k} share at {x:g}"] = mean.item() / (x * (1 - x))
    return metrics


def best_of_n(world: torch.Generator) -> dict[str, float]:
    """KL and win rate of the best of n against the policy, and how far they exceed their bounds."""
    metrics = {}
    for name, size in LAWS.items():
        p = torch.full((size,), 1 / size, dtype=torch.float64)
        if "random" in name:
            p = (random_logits(world, size) / 2).softmax(0)
        rewards = torch.randperm(size, generator=world)
        if "0 or 1" in name:
            rewards = rewards % 2
        levels, which = rewards.unique(return_inverse=True)
        q = torch.zeros(len(levels), dtype=torch.float64).index_add(0, which, p)  # probability of each reward
        beaten = (q.cumsum(0) - q / 2)[which]  # probability of a lower reward, and half that of the same
        metrics[f"{name} largest chance"] = p.max().item()
        for n in DRAWN:
            best = law(p, rewards, n)
            kl = torch.xlogy(best, best / p).sum().item()
            metrics |= {f"{name} {n} kl": kl, f"{name} {n} above": kl - bound(n)}
            metrics[f"{name} {n} wins above"] = (best @ beaten).item() - n / (n + 1)
    p, rewards, n = random_logits(world, 5).softmax(0), torch.tensor([0, 1, 1, 2, 2]), 4
    drawn = torch.tensor([*itertools.product(range(5), repeat=n)])
    is_best = (rewards[drawn] == rewards[drawn].amax(1, keepdim=True)).double()
    share = p[drawn].prod(1, keepdim=True) * is_best / is_best.sum(1, keepdim=True)
    counted = torch.zeros(5, dtype=torch.float64).index_add(0, drawn.flatten(), share.flatten())
    return metrics | {"law - enumeration": (law(p, rewards, n) - counted).abs().max().item()}


# ----------------------------------------------------------------------------------------------------- table and figure


def worst(results: common.Results, setting: str, metric: str, most: bool = True) -> float:
    """The largest (or smallest) value over the worlds."""
    return (max if most else min)(results.values(setting, metric).values())


def clauses(results: common.Results) -> list[tuple[str, str, str, str, bool]]:
    """Rows of the table: part, quantity, computed value, claimed value, whether it holds."""
    rows = []
    for (shift, name), (bias, deviation) in BLOG.items():
        b, d = (worst(results, "normals", f"{shift:g} {name} {x}") for x in ("bias", "deviation"))
        holds = abs(b - bias) <= 0.0005 + TINY and abs(d / deviation - 1) <= 0.02
        label = f"{name}, N(0, 1) to N({shift:g}, 1): bias, deviation"
        rows.append(("KL", label, f"{round(b, 4) + 0.0:.4f}, {d:.3f}", f"{bias}, {deviation}", holds))

    def small(part: str, setting: str, metric: str, label: str) -> None:
        x = worst(results, setting, metric)
        rows.append((part, label, f"{x:.1g}", "0", x < TINY))

    def large(part: str, setting: str, metric: str, label: str) -> None:
        x = worst(results, setting, metric, most=False)
        rows.append((part, label, f"at least {x:.3f}", "> 0.01", x > 0.01))

    part = "gradients"
    small(part, "gradients", "k1 loss size", "k1 as a loss: size")
    small(part, "gradients", "k2 loss off KL(pi, ref)", "k2 as a loss: off KL(pi, ref)")
    small(part, "gradients", "k3 loss off KL(ref, pi)", "k3 as a loss: off KL(ref, pi)")
    large(part, "gradients", "k3 loss off KL(pi, ref)", "k3 as a loss: off KL(pi, ref)")
    small(part, "gradients", "k1 reward off KL(pi, ref)", "k1 as a reward: off KL(pi, ref)")
    for name in ("k2", "k3"):
        large(part, "gradients", f"{name} reward off KL(pi, ref)", f"{name} as a reward: off KL(pi, ref)")
    for name in PLACES:
        x = worst(results, "training", f"{name} off")
        label = f"{name.replace(' ', ' as a ')}: probabilities off their closed form"
        rows.append(("training", label, f"{x:.1g}", "0", x < 1e-6))
    x = worst(results, "training", "k3 loss share")
    rows.append(("training", "k3 as a loss: share of the gain in J", f"at most {x:.3f}", "< 0.99", x < 0.99))
    for k in GROUPS:
        for name in ("RLOO", "ReMax"):
            small("groups", "groups", f"{name} {k} off", f"{name}, k = {k}: off")
        small("groups", "groups", f"Dr. GRPO {k} off share", f"Dr. GRPO, k = {k}: off (k - 1) / k of it")
        x = worst(results, "groups", f"GRPO {k} cosine")
        rows.append(("groups", f"GRPO, k = {k}: cosine", f"at most {x:.4f}", "< 0.999", x < 0.999))
    above = max(worst(results, "best of n", f"{name} {n} above") for name in LAWS for n in DRAWN)
    rows.append(("Best-of-n", "KL - formula, everywhere", f"at most {above:.0e}", "<= 0", above <= TINY))
    distinct = [x for x in LAWS if "0 or 1" not in x]
    chance = {x: worst(results, "best of n", f"{x} largest chance") for x in distinct}
    fine = [(x, n) for x in distinct for n in DRAWN if chance[x] < 1 / (20 * n)]
    gap = max(1 - worst(results, "best of n", f"{name} {n} kl", most=False) / bound(n) for name, n in fine)
    label = f"1 - KL / formula, no probability above 1 / (20 n) ({len(fine)} cases)"
    rows.append(("Best-of-n", label, f"at most {gap:.1g}", "< 0.01", gap < 0.01))
    above = max(worst(results, "best of n", f"{name} {n} wins above") for name in LAWS for n in DRAWN)
    rows.append(("Best-of-n", "wins - n / (n + 1), everywhere", f"at most {above:.0e}", "<= 0", above <= TINY))
    small("Best-of-n", "best of n", "law - enumeration", "exact law minus all draws of 4 from 5, with ties")
    return rows


def report(results: common.Results) -> tuple[str, str, str]:
    """Tables, verdict, effect."""
    rows = clauses(results)
    first = markdown(["", "what", "found", "claim", ""], [[*row[:4], "yes" if row[4] else "**no**"] for row in rows])
    of_groups = []
    for name in METHODS:
        for k in GROUPS:
            of = lambda metric, name=name, k=k: [*results.values("groups", f"{name} {k} {metric}").values()]  # noqa: E731
            cells = f"{statistics.fmean(of('share')):.3f}", f"{min(of('cosine')):.4f}", f"{sum(of('turned')):.0f}"
            of_groups.append([name, str(k), *cells, f"{statistics.fmean(of('noise')):.2f}"])
    header = ["method", "k", "share of the exact gradient", "lowest cosine", "components turned", "variance / mean^2"]
    mean = lambda metric: statistics.fmean(results.values("training", metric).values())  # noqa: E731
    trained = [
        [
            x,
            f"{mean(f'{x} KL'):.3f}",
            f"{mean(f'{x} share'):.3f}",
            f"{worst(results, 'training', f'{x} share', False):.3f}",
        ]
        for x in PLACES
    ]
    of_chance = [
        [f"{x:g}", *(f"{worst(results, 'groups', f'GRPO {k} share at {x:g}'):.3f}" for k in GROUPS)] for x in CHANCES
    ]
    of_n = [
        [str(n), f"{bound(n):.4f}", *(f"{worst(results, 'best of n', f'{name} {n} kl'):.4f}" for name in LAWS)]
        for n in DRAWN
    ]
    parts = [first]
    parts.append(
        markdown(["estimator", "KL(pi, ref) at the end, nats", "share of the gain in J", "in the worst world"], trained)
    )
    parts.append(markdown(header, of_groups))
    parts.append(markdown(["probability of a right answer", *(f"GRPO's share, k = {k}" for k in GROUPS)], of_chance))
    parts.append(markdown(["n", "log n - (n - 1) / n", *(x.replace("chance", "probability") for x in LAWS)], of_n))
    reproduced = all(row[4] for row in rows)
    cosine = min(worst(results, "groups", f"GRPO {k} cosine", most=False) for k in GROUPS)
    effect = (
        f"{sum(row[4] for row in rows)} of {len(rows)} statements hold; GRPO's mean gradient has a cosine as low as "
        f"{cosine:.2f} to the exact one, and k3 as a loss is off by at least "
        f"{worst(results, 'gradients', 'k3 loss off KL(pi, ref)', most=False):.0%} (exact: no interval)."
    )
    return "\n\n".join(parts), "reproduced" if reproduced else "contradicted", effect


def draw(results: common.Results, page) -> None:
    """Deviation of the KL estimates; angle of the group gradients to the exact one; Best-of-n's KL."""
    left, middle, right = page.subplots(1, 3)
    for name in KS:
        deviations = [worst(results, "normals", f"{shift:g} {name} deviation") for shift in SHIFTS]
        left.loglog(SHIFTS, deviations, marker="o", markersize=3, label=name)
    left.set_title("KL estimates: deviation / KL", fontsize=8)
    left.set_xlabel("m, of N(0, 1) to N(m, 1)", fontsize=8)
    for name in METHODS:
        cosines = [results.values("groups", f"{name} {k} cosine").values() for k in GROUPS]
        angles = [sum(math.degrees(math.acos(min(x, 1.0))) for x in xs) / len(xs) for xs in cosines]
        middle.plot(GROUPS, angles, marker="o", markersize=3, label=name)
    middle.set_title("groups: degrees off the gradient", fontsize=8)
    middle.set_xscale("log", base=2)
    middle.set_xlabel("k", fontsize=8)
    for name in LAWS:
        kls = [worst(results, "best of n", f"{name} {n} kl") for n in DRAWN]
        right.plot(DRAWN, kls, marker="o", markersize=3, label=name)
    right.plot(DRAWN, [bound(n) for n in DRAWN], "k--", linewidth=1, label="log n - (n - 1) / n")
    right.set_title("Best-of-n: KL, nats", fontsize=8)
    right.set_xscale("log", base=2)
    right.set_xlabel("n", fontsize=8)
    for axes in (left, middle, right):
        axes.grid(alpha=0.3)
        axes.tick_params(labelsize=7)
        axes.legend(fontsize=5.5)
    middle.legend(fontsize=5.5, loc=(0.03, 0.15))


if __name__ == "__main__":
    cli(main, common.Args)
