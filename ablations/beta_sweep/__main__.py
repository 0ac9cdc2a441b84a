"""Seven betas on a few noisy preferences: KL falls with beta, and DPO with a small beta is at its best early.

    python -m ablations.beta_sweep            --quick, --smoke, --seeds, --jobs

Claim (Rafailov et al. 2023, Eq. 3; Rafailov et al. 2024, arXiv 2406.02900): beta sets how far DPO goes from the
reference; people's opinion of the answers rises with KL and then falls; runs with a small beta are at their best in the
first part of the training and get worse from there; and the accuracy of the implicit reward does not predict this.

Each seed is a world of its own (ablations/world.py), where KL and gold reward are sums over all answers. DPO trains for
32 epochs on 128 pairs of the SFT model's answers, with a quarter of the labels flipped; everything but beta is the
same. The learning rate is constant after its warm-up, as in the first paper's code, so that only the loss can end the
learning. After every second epoch KL, gold reward and accuracy are measured on 32 test prompts, and gold reward on 16
others, which choose the best epoch.

Criterion, written before the full run, but for `leash`: that was judged by the worst seed, which is the surer to fail
the more seeds there are, and is now judged by an interval as the others. Intervals are 95 % t-intervals over seeds.
Reproduced: all of these are above 0. Contradicted: one is below 0. Else not resolved.

    leash     -0.9 - Spearman correlation of beta and the last KL
    concave   -c of the least-squares fit gold = a + b d + c d^2, d = sqrt(KL), to the start and all points of a run,
              for each of the three smallest betas; a curve that merely flattens has it too
    fall      gold at the best epoch - gold at the end, for each of the three smallest betas: with it, a hump
    early     1/2 - the best epoch as a share of all epochs, for the smallest beta

Reported and not judged, since the claim is that there is none: the correlation of accuracy and gold reward, over the
betas at the end, and over the epochs at the smallest beta. Accuracy is the probability that the implicit reward orders
two of the SFT model's answers to a test prompt as gold reward does, over all pairs of answers that differ in it.
"""

import shutil
import statistics
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

import train_dpo
from ablations import common, plot, world
from ablations.common import at_checkpoints, markdown, show, t_interval
from support import models
from support.runs import cli

NAME = "beta_sweep"
CLAIM = "KL falls with beta, gold reward is a hump in KL, and with a small beta it peaks early"
BETAS = (0.01, 0.03, 0.1, 0.3, 1.0, 2.0, 5.0)
SETTINGS = {f"{x:g}": {"beta": x} for x in BETAS}
PAIRS, FLIPPED, EPOCHS, BATCH, RATE = 128, 0.25, 32, 32, 1e-3
EVERY = 2  # epochs between measurements
PARTS = ("validation", "test")


@dataclass
class Args(common.Args):
    seeds: int = 10
    """seeds 0, 1, ... of every setting, >= 1; a quick or smoke run may take fewer"""
    jobs: int = 2
    """processes, one thread each, >= 1; the results do not depend on it"""


# ------------------------------------------------------------------------------------------------------------- the runs


def main(a: Args) -> None:
    """Run whatever results.csv lacks, and write table and figure."""
    results, folder = common.results(NAME, a), common.work(NAME, a)
    settings, epochs = list(SETTINGS), 4 if a.smoke else EPOCHS
    if a.smoke:
        settings = settings[::3]
    seeds = range(min(a.seeds, 1 if a.smoke else 2 if a.quick else a.seeds))
    tasks = [(x, seed, folder, epochs) for seed in seeds for x in settings if not results.done(x, seed)]
    torch.set_num_threads(1)  # as in the processes of `each`, so that results do not depend on the number of cores
    for seed in sorted({seed for _, seed, *_ in tasks}):
        place, prompts = folder / f"world-{seed}", world.prompts(seed)["train"]
        sft = world.learn_source(place, seed, 800 if a.smoke else world.SENTENCES)
        if not (place / "pairs.jsonl").exists():
            logps = world.answer_logps(models.load_model(sft, "cpu"), prompts)
            common.write(place / "pairs.jsonl", world.rankings(seed, logps, prompts, PAIRS, 2, FLIPPED))
    for (setting, seed, *_), along, seconds in common.each(run, tasks, a.jobs, folder):
        for step, values in along.items():
            results.add(setting, seed, values, step)
        results.add(setting, seed, along[max(along)] | {"seconds": seconds})
    plot.finish(NAME, a, results, report, draw)


def run(setting: str, seed: int, folder: Path, epochs: int) -> dict[int, dict[str, float]]:
    """DPO at one beta in one world -> {epoch: values}, beginning with epoch 0, the SFT model."""
    place, prompts = folder / f"world-{seed}", world.prompts(seed)
    model = models.load_model(str(place / "sft"), "cpu")
    held = world.held(model, seed, {part: prompts[part] for part in PARTS})
    along: dict[int, dict[str, float]] = {}

    def look(step: int, weights: dict) -> None:
        model.load_state_dict(weights)
        values = {}
        for part, (ref, r) in held.items():
            logps = world.answer_logps(model, prompts[part])
            values |= {f"kl {part}": world.kl(logps, ref), f"gold {part}": world.expected(logps, r)}
            if part == "test":
                values["accuracy"] = accuracy(ref, logps - ref, r).mean().item() if step else 0.5  # all margins are 0
        along[step // (PAIRS // BATCH)] = values

    look(0, model.state_dict())
    out = folder / f"dpo-{setting}-{seed}"
    shutil.rmtree(out, ignore_errors=True)  # left by a stopped run
    flags = {"model": str(place / "sft"), "data": str(place / "pairs.jsonl"), "out": str(out), "seed": seed}
    flags |= {"batch_size": BATCH, "epochs": epochs, "save_every": EVERY * PAIRS // BATCH}
    flags |= {"lr": RATE, "schedule": "constant"}
    with at_checkpoints(look):
        train_dpo.main(world.args(train_dpo, **flags, ref_cache=str(place / "ref_cache"), **SETTINGS[setting]))
    shutil.rmtree(out)
    return along


def accuracy(ref: Float[Tensor, "p s"], margins: Float[Tensor, "p s"], r: Float[Tensor, "p s"]) -> Float[Tensor, " p"]:
    """Probability that of two reference answers with different r, the one with the larger margin has the larger r.

    Counts ordered pairs by a radix sort: answers start in order of r and are compared by the bits of their margin's
    rank, highest first. Among equal higher bits each 1 counts the probability of the 0s before it; then 0s go first.
    """
    r = r.mul(1e9).round()  # so that sums that differ only by rounding are equal
    order = margins.argsort(dim=1, descending=True)  # so that among equal r the larger margin comes first
    order = order.gather(1, r.gather(1, order).argsort(dim=1, stable=True))
    rank = margins.argsort(dim=1).argsort(dim=1).gather(1, order)
    prob, right = ref.exp().gather(1, order), ref.new_zeros(len(ref))

    def sum_before(probs: Tensor, group: Tensor) -> Tensor:
        """For each position, the sum of probs before its group (a run of equal numbers) begins."""
        begins = torch.cat([group.new_ones(len(group), 1).bool(), group[:, 1:] != group[:, :-1]], 1)
        return torch.where(begins, probs.cumsum(1) - probs, 0).cummax(1).values

    different = (prob * sum_before(prob, r.gather(1, order))).sum(1)
    for bit in reversed(range((r.shape[1] - 1).bit_length())):
        high = (rank >> bit & 1).bool()
        low = torch.where(high, 0, prob)
        right += torch.where(high, prob * (low.cumsum(1) - sum_before(low, rank >> bit + 1)), 0).sum(1)
        position = torch.where(high, (~high).sum(1, keepdim=True) + high.cumsum(1), (~high).cumsum(1)) - 1
        rank, prob = (torch.empty_like(x).scatter(1, position, x) for x in (rank, prob))
    return right / different


# ----------------------------------------------------------------------------------------------------- table and figure


def settings_of(results: common.Results) -> list[str]:
    return [x for x in SETTINGS if results.values(x, "kl test")]


def series(results: common.Results, setting: str, seed: int, metric: str) -> list[float]:
    """A metric at the start and after every second epoch."""
    return [results.values_of[setting, seed, step, metric] for step in results.steps(setting)]


def curvature(results: common.Results, setting: str, seed: int) -> float:
    """c of the least-squares fit gold = a + b d + c d^2 with d = sqrt(KL), on the test prompts."""
    d = torch.tensor(series(results, setting, seed, "kl test"), dtype=torch.float64).clamp(min=0).sqrt()
    gold = torch.tensor(series(results, setting, seed, "gold test"), dtype=torch.float64)
    return torch.linalg.lstsq(torch.stack([torch.ones_like(d), d, d.square()], 1), gold[:, None]).solution[2].item()


def best_epoch(results: common.Results, setting: str, seed: int) -> int:
    """The epoch with the most gold reward on the validation prompts."""
    return max(results.steps(setting), key=lambda step: results.values_of[setting, seed, step, "gold validation"])


def at_best(results: common.Results, setting: str, seed: int) -> float:
    """Gold reward on the test prompts at that epoch."""
    return results.values_of[setting, seed, best_epoch(results, setting, seed), "gold test"]


def spearman(results: common.Results, seed: int) -> float:
    """Spearman correlation of beta and the last KL."""
    last = [results.values(x, "kl test")[seed] for x in settings_of(results)]
    ranks = [sum(other < x for other in last) for x in last]
    return statistics.correlation([float(i) for i in range(len(ranks))], [float(x) for x in ranks])


def correlation(xs: list[float], ys: list[float]) -> float:
    return statistics.correlation(xs, ys) if min(len(set(xs)), len(set(ys))) > 1 else 0.0


def clauses(results: common.Results) -> dict[str, tuple[float, float]]:
    """Clause of the criterion -> mean and half its interval."""
    settings = settings_of(results)
    seeds = results.seeds()
    order = t_interval([-0.9 - spearman(results, seed) for seed in seeds])
    differences = {"leash: -0.9 - Spearman correlation of beta and KL": order}
    for x in settings[:3]:
        differences[f"concave: -c at beta {x}"] = t_interval([-curvature(results, x, seed) for seed in seeds])
    for x in settings[:3]:
        falls = [at_best(results, x, seed) - results.values(x, "gold test")[seed] for seed in seeds]
        differences[f"fall: gold at the best epoch - at the end, beta {x}"] = t_interval(falls)
    x = settings[0]
    early = [0.5 - best_epoch(results, x, seed) / max(results.steps(x)) for seed in seeds]
    differences[f"early: 1/2 - best epoch / epochs, beta {x}"] = t_interval(early)
    return differences


def report(results: common.Results) -> tuple[str, str, str]:
    """Tables, verdict, effect."""
    settings, rows = settings_of(results), []
    seeds = results.seeds()
    for x in settings:
        of = lambda metric, x=x: [series(results, x, seed, metric) for seed in seeds]  # noqa: E731
        columns = [
            [float(best_epoch(results, x, seed)) for seed in seeds],
            [at_best(results, x, seed) for seed in seeds],
            *([values[-1] for values in of(n)] for n in ("gold test", "kl test", "accuracy")),
        ]
        digits = (1, 3, 3, 2, 3)
        cells = [show(t_interval(values), d) for values, d in zip(columns, digits, strict=True)]
        rows.append([x, *cells, show(t_interval([curvature(results, x, seed) for seed in seeds]), 3)])
    header = [
        "beta",
        "best epoch",
        "gold there",
        "gold at the end",
        "KL at the end, nats",
        "accuracy at the end",
        "c of the fit",
    ]
    criterion = clauses(results)
    lines = [[n, show(x, 3), common.verdict([x])] for n, x in criterion.items()]
    last = {n: {s: [results.values(x, n)[s] for x in settings] for s in seeds} for n in ("accuracy", "gold test")}
    of_betas = t_interval([correlation(last["accuracy"][s], last["gold test"][s]) for s in seeds])
    along = [[series(results, settings[0], s, n)[1:] for n in ("accuracy", "gold test")] for s in seeds]
    of_epochs = t_interval([correlation(*both) for both in along])
    ranks = [spearman(results, seed) for seed in seeds]
    lines.append(["Spearman correlation of beta and KL, all seeds", show(t_interval(ranks)), "not judged"])
    lines.append(["correlation of accuracy and gold, over betas at the end", show(of_betas), "not judged"])
    lines.append([f"the same, over epochs at beta {settings[0]}", show(of_epochs), "not judged"])
    parts = [markdown(header, rows), markdown(["above 0 by the claim", "mean", ""], lines)]
    start = t_interval([series(results, settings[0], s, "gold test")[0] for s in seeds])
    fall = next(x for name, x in criterion.items() if name.startswith("fall"))
    effect = (
        f"Spearman correlation of beta and the last KL {show(t_interval(ranks))}, in the worst world {max(ranks):.2f}. "
        f"At beta {settings[0]} gold reward goes from {show(start, 3)} to {rows[0][2]} at epoch {rows[0][1]} of "
        f"{max(results.steps(settings[0]))}, and falls by {show(fall, 3)} from there; accuracy and gold correlate by "
        f"{show(of_betas)} over betas."
    )
    return "\n\n".join(parts), common.verdict([*criterion.values()]), effect


def draw(results: common.Results, page) -> None:
    """Gold reward against the square root of KL, and along the epochs; means over seeds, the end of a run as a dot."""
    left, right = page.subplots(1, 2)
    settings = settings_of(results)
    for i, x in enumerate(settings):
        colour = f"C{i}"
        steps = results.steps(x)
        mean = lambda metric, x=x, steps=steps: [t_interval([*results.values(x, metric, s).values()])[0] for s in steps]  # noqa: E731
        gold, roots = mean("gold test"), [max(y, 0.0) ** 0.5 for y in mean("kl test")]
        left.plot(roots, gold, color=colour, linewidth=1, label=f"beta {x}")
        left.plot(roots[-1:], gold[-1:], "o", color=colour, markersize=4)
        right.plot(steps, gold, color=colour, linewidth=1)
    left.set_xlabel("sqrt(KL to the reference)")
    left.set_ylabel("gold reward on test prompts")
    right.set_xlabel(f"epochs over the same {PAIRS} pairs")
    left.legend(fontsize=7)
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.tick_params(labelsize=8)


if __name__ == "__main__":
    cli(main, Args)
