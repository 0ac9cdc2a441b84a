"""Seven betas on a few noisy preferences: KL falls with beta, and DPO that is held loosely is at its best early.

    python -m ablations.beta_sweep            --quick, --smoke, --seeds, --jobs

Claim (Rafailov et al. 2023, Eq. 3; Rafailov et al. 2024, arXiv 2406.02900): beta sets how far DPO goes from the
reference; what people think of the answers rises with KL and then falls; runs with a small beta are at their best in
the first part of the training and get worse from there; and the accuracy of the implicit reward does not tell.

A seed is a world of its own (ablations/world.py), where KL and gold reward are sums over all answers. DPO learns for 32
epochs from 128 pairs of answers of the SFT model, of whose labels a quarter is turned round; everything but beta is the
same. The learning rate is constant after its warm-up, as in the first paper's code, so that only the loss can end the
learning. After every second epoch KL, gold reward and accuracy are measured on 32 test prompts, and gold reward on
16 others, by which the best epoch is chosen.

Criterion, written before the full run, but for `leash`: that was judged by the worst seed, which is the surer to fail
the more seeds there are, and is now judged by an interval as the others. Intervals are 95 % t-intervals over seeds.
Reproduced: all of these are above 0. Contradicted: one is below 0. Else not resolved.

    leash     -0.9 - Spearman correlation of beta and the last KL
    concave   -c of the least squares fit gold = a + b d + c d^2, d = sqrt(KL), to the start and all points of a run,
              for each of the three smallest betas; a curve that merely flattens has it too
    fall      gold at the best epoch - gold at the end, for each of the three smallest betas: with it, a hump
    early     1/2 - the best epoch as a share of all epochs, for the smallest beta

Reported and not judged, since the claim is that there is none: the correlation of accuracy and gold reward, over the
betas at the end, and over the epochs at the smallest beta. Accuracy is the chance that the implicit reward orders two
of the SFT model's answers to a test prompt as gold reward does, over all pairs of answers with another gold reward.
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
    """Runs what results.csv does not have, and writes table and figure."""
    results, folder = common.results(NAME, a), common.work(NAME, a)
    settings, epochs = list(SETTINGS), 4 if a.smoke else EPOCHS
    if a.smoke:
        settings = settings[::3]
    seeds = range(min(a.seeds, 1 if a.smoke else 2 if a.quick else a.seeds))
    tasks = [(x, seed, folder, epochs) for seed in seeds for x in settings if not results.done(x, seed)]
    torch.set_num_threads(1)  # as in the processes of `each`, so that the numbers do not depend on the machine's cores
    for seed in sorted({seed for _, seed, *_ in tasks}):
        own, asked = folder / f"world-{seed}", world.prompts(seed)["train"]
        sft = world.learn_source(own, seed, 800 if a.smoke else world.SENTENCES)
        if not (own / "pairs.jsonl").exists():
            logps = world.answer_logps(models.load_model(sft, "cpu"), asked)
            common.write(own / "pairs.jsonl", world.rankings(seed, logps, asked, PAIRS, 2, FLIPPED))
    for (setting, seed, *_), along, seconds in common.each(run, tasks, a.jobs, folder):
        for step, values in along.items():
            results.add(setting, seed, values, step)
        results.add(setting, seed, along[max(along)] | {"seconds": seconds})
    plot.finish(NAME, a, results, report, draw)


def run(setting: str, seed: int, folder: Path, epochs: int) -> dict[int, dict[str, float]]:
    """DPO at one beta in one world -> {epoch: values}, from 0, the start, on."""
    own, asked = folder / f"world-{seed}", world.prompts(seed)
    model = models.load_model(str(own / "sft"), "cpu")
    held = world.held(model, seed, {part: asked[part] for part in PARTS})
    along: dict[int, dict[str, float]] = {}

    def look(step: int, weights: dict) -> None:
        model.load_state_dict(weights)
        values = {}
        for part, (ref, r) in held.items():
            logps = world.answer_logps(model, asked[part])
            values |= {f"kl {part}": world.kl(logps, ref), f"gold {part}": world.expected(logps, r)}
            if part == "test":
                values["accuracy"] = accuracy(ref, logps - ref, r).mean().item() if step else 0.5  # no margin yet
        along[step // (PAIRS // BATCH)] = values

    look(0, model.state_dict())
    out = folder / f"dpo-{setting}-{seed}"
    shutil.rmtree(out, ignore_errors=True)  # of a run that was stopped
    flags = {"model": str(own / "sft"), "data": str(own / "pairs.jsonl"), "out": str(out), "seed": seed}
    flags |= {"batch_size": BATCH, "epochs": epochs, "save_every": EVERY * PAIRS // BATCH}
    flags |= {"lr": RATE, "schedule": "constant"}
    with at_checkpoints(look):
        train_dpo.main(world.args(train_dpo, **flags, ref_cache=str(own / "ref_cache"), **SETTINGS[setting]))
    shutil.rmtree(out)
    return along


def accuracy(ref: Float[Tensor, "p s"], margins: Float[Tensor, "p s"], r: Float[Tensor, "p s"]) -> Float[Tensor, " p"]:
    """The chance that of two answers of the reference, of different r, the one with the larger margin has the larger r.

    Answers lie in the order of r, and are told apart bit by bit of their rank by margin, the highest first: of those
    with equal higher bits, every 1 counts the chances of the 0s in front of it. Then the 0s are put in front.
    """
    r = r.mul(1e9).round()  # equal sums in another order are equal
    order = margins.argsort(dim=1, descending=True)  # so that of equal r none is in front of one with a larger margin
    order = order.gather(1, r.gather(1, order).argsort(dim=1, stable=True))
    rank = margins.argsort(dim=1).argsort(dim=1).gather(1, order)
    chance, right = ref.exp().gather(1, order), ref.new_zeros(len(ref))

    def in_front(chances: Tensor, group: Tensor) -> Tensor:
        """Of each place: the sum of the chances before its group, a run of equal numbers, begins."""
        begins = torch.cat([group.new_ones(len(group), 1).bool(), group[:, 1:] != group[:, :-1]], 1)
        return torch.where(begins, chances.cumsum(1) - chances, 0).cummax(1).values

    different = (chance * in_front(chance, r.gather(1, order))).sum(1)
    for bit in reversed(range((r.shape[1] - 1).bit_length())):
        high = (rank >> bit & 1).bool()
        low = torch.where(high, 0, chance)
        right += torch.where(high, chance * (low.cumsum(1) - in_front(low, rank >> bit + 1)), 0).sum(1)
        place = torch.where(high, (~high).sum(1, keepdim=True) + high.cumsum(1), (~high).cumsum(1)) - 1
        rank, chance = (torch.empty_like(x).scatter(1, place, x) for x in (rank, chance))
    return right / different


# ----------------------------------------------------------------------------------------------------- table and figure


def settings_of(results: common.Results) -> list[str]:
    return [x for x in SETTINGS if results.values(x, "kl test")]


def series(results: common.Results, setting: str, seed: int, metric: str) -> list[float]:
    """A metric at the start and after every second epoch."""
    return [results.values_of[setting, seed, step, metric] for step in results.steps(setting)]


def curvature(results: common.Results, setting: str, seed: int) -> float:
    """c of the least squares fit gold = a + b d + c d^2 with d = sqrt(KL), on the test prompts."""
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
    """Rank correlation of beta and the last KL."""
    last = [results.values(x, "kl test")[seed] for x in settings_of(results)]
    ranks = [sum(other < x for other in last) for x in last]
    return statistics.correlation([float(i) for i in range(len(ranks))], [float(x) for x in ranks])


def correlation(xs: list[float], ys: list[float]) -> float:
    return statistics.correlation(xs, ys) if min(len(set(xs)), len(set(ys))) > 1 else 0.0


def clauses(results: common.Results) -> dict[str, tuple[float, float]]:
    """The differences of the criterion, with half their intervals."""
    settings = settings_of(results)
    seeds = results.seeds()
    order = t_interval([-0.9 - spearman(results, seed) for seed in seeds])
    found = {"leash: -0.9 - Spearman correlation of beta and KL": order}
    for x in settings[:3]:
        found[f"concave: -c at beta {x}"] = t_interval([-curvature(results, x, seed) for seed in seeds])
    for x in settings[:3]:
        falls = [at_best(results, x, seed) - results.values(x, "gold test")[seed] for seed in seeds]
        found[f"fall: gold at the best epoch - at the end, beta {x}"] = t_interval(falls)
    x = settings[0]
    early = [0.5 - best_epoch(results, x, seed) / max(results.steps(x)) for seed in seeds]
    found[f"early: 1/2 - best epoch / epochs, beta {x}"] = t_interval(early)
    return found


def report(results: common.Results) -> tuple[str, str, str]:
    """Tables, verdict, effect."""
    settings, rows = settings_of(results), []
    seeds = results.seeds()
    for x in settings:
        of = lambda metric, x=x: [series(results, x, seed, metric) for seed in seeds]  # noqa: E731
        columns = [
            [float(best_epoch(results, x, seed)) for seed in seeds],
            [at_best(results, x, seed) for seed in seeds],
            *([own[-1] for own in of(n)] for n in ("gold test", "kl test", "accuracy")),
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
    found = clauses(results)
    differences = [[n, show(x, 3), common.verdict([x])] for n, x in found.items()]
    last = {n: {s: [results.values(x, n)[s] for x in settings] for s in seeds} for n in ("accuracy", "gold test")}
    of_betas = t_interval([correlation(last["accuracy"][s], last["gold test"][s]) for s in seeds])
    along = [[series(results, settings[0], s, n)[1:] for n in ("accuracy", "gold test")] for s in seeds]
    of_epochs = t_interval([correlation(*both) for both in along])
    ranks = [spearman(results, seed) for seed in seeds]
    differences.append(["Spearman correlation of beta and KL, all seeds", show(t_interval(ranks)), "not judged"])
    differences.append(["correlation of accuracy and gold, over betas at the end", show(of_betas), "not judged"])
    differences.append([f"the same, over epochs at beta {settings[0]}", show(of_epochs), "not judged"])
    parts = [markdown(header, rows), markdown(["above 0 by the claim", "mean", ""], differences)]
    start = t_interval([series(results, settings[0], s, "gold test")[0] for s in seeds])
    fall = next(x for name, x in found.items() if name.startswith("fall"))
    effect = (
        f"Spearman correlation of beta and the last KL {show(t_interval(ranks))}, in the worst world {max(ranks):.2f}. "
        f"At beta {settings[0]} gold reward goes from {show(start, 3)} to {rows[0][2]} at epoch {rows[0][1]} of "
        f"{max(results.steps(settings[0]))}, and falls by {show(fall, 3)} from there; accuracy and gold correlate by "
        f"{show(of_betas)} over betas."
    )
    return "\n\n".join(parts), common.verdict([*found.values()]), effect


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
