"""Evaluate a reward model on held-out rankings: accuracy, calibration, length bias, and the plots of report.png."""

import math
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from support import reviews
from support.agreement import better_pairs
from support.examples import Example, group_of
from support.preferences import ceiling, expected_accuracy, pair_tensors
from support.report import interval, new_page, share_and_half

TIE = 1e-4  # in reward: rounding can cause margins up to this size, so they count as half correct


def ranks_of(values: Tensor) -> Tensor:
    """Rank of each value, ascending from 1; equal values share their mean rank."""
    _, inverse, counts = values.unique(return_inverse=True, return_counts=True)
    return (counts.cumsum(0) - (counts - 1) / 2)[inverse]


def correlation(x: Tensor, y: Tensor) -> float:
    """Pearson's correlation; NaN if one of the two does not vary."""
    if len(x) < 2:
        return math.nan
    return torch.corrcoef(torch.stack([x.double(), y.double()]))[0, 1].item()


def calibration(margins: Tensor, p_right: Tensor, weights: Tensor, bins: int = 10) -> tuple[list[list[float]], float]:
    """Reliability curve, as rows (mean confidence, accuracy, weight share), and expected calibration error (ECE).

    Confidence is sigmoid(|margin|), in [0.5, 1], in bins of equal width. ECE = sum over bins of weight share *
    |mean confidence - accuracy|, in [0, 0.5] (Guo et al. 2017, Eq. 3, arXiv 1706.04599). `p_right` is the label.
    """
    confidence = margins.abs().sigmoid()
    correct = expected_accuracy(margins, p_right, TIE)
    bin_of = ((confidence - 0.5) * 2 * bins).long().clamp(0, bins - 1)
    rows = []
    for i in bin_of.unique().tolist():
        inside = bin_of == i
        weight = weights[inside].sum()
        rows.append([((x[inside] * weights[inside]).sum() / weight).item() for x in (confidence, correct)])
        rows[-1].append((weight / weights.sum()).item())
    return rows, sum(weight * abs(confidence - accuracy) for confidence, accuracy, weight in rows)


def true_margins(examples: Sequence[Example], gold: bool) -> tuple[str, list[float]]:
    """By how much each pair's preferred response is better: the unit, and the values. The unit is gold reward, else the
    annotated difference, else ranking places: the first that is known and varies. ("", []) if there is none."""
    measures: list[tuple[str, list[float | None]]] = [("gold reward", []), ("annotated difference", []), ("places", [])]
    for e in examples:
        for i, j in better_pairs(e.ranks):
            golds = [reviews.gold_reward(f"{e.prompt_text} {e.response_texts[n]}") for n in (i, j)] if gold else [0, 0]
            measures[0][1].append(abs(golds[0] - golds[1]) if gold else None)
            measures[1][1].append(abs(e.rewards[i] - e.rewards[j]) if e.rewards else e.margin)
            measures[2][1].append(float(e.ranks[j] - e.ranks[i]))
    return next(((unit, sizes) for unit, sizes in measures if None not in sizes and len(set(sizes)) > 1), ("", []))


def held_out_report(held: Sequence[Example], rewards: Sequence[Tensor], split_by: str | None, embedded: bool):
    """Evaluate the rewards of held-out rankings: rows of a table, results, and the panels of report.png.

    `split_by` is the column whose values were held out together; intervals treat equal values as one group.
    """
    flat = torch.cat([*rewards]).double()
    lengths = torch.tensor([n for e in held for n in e.lengths]).double()
    better, worse, weights, label_probability = pair_tensors(held, flat)
    margins, length_margins = flat[better] - flat[worse], lengths[better] - lengths[worse]

    groups = [group_of(e, split_by) for e in held]
    example = torch.tensor([i for i, e in enumerate(held) for _ in better_pairs(e.ranks)])  # the example of each pair

    def accuracy_interval(margins: Tensor) -> tuple[float, float]:
        """Mean accuracy over the examples, and the half-width of its interval over groups."""
        accuracies = expected_accuracy(margins, label_probability, TIE) * weights
        sums = torch.zeros(len(held)).double().index_add(0, example, accuracies)
        return share_and_half(sums.tolist(), groups)

    accuracy, longer_wins = accuracy_interval(margins), accuracy_interval(length_margins)
    curve, error = calibration(margins, label_probability, weights)
    results = {
        "accuracy": accuracy[0],
        "accuracy_interval": accuracy[1],
        "longer_wins": longer_wins[0],
        "ceiling": ceiling(held),
        "ece": error,
        "length_correlation": correlation(flat, lengths),
    }
    rows = [["held-out accuracy", interval(accuracy, 3)]]
    if results["ceiling"] < 1:
        rows.append(["  (best possible with these labels)", f"{results['ceiling']:.3f}"])
    rows.append(["  ('the longer one is better')", interval(longer_wins, 3)])
    unit, sizes = true_margins(held, embedded)
    bars = []
    if sizes:
        sizes = torch.tensor(sizes)
        edges = sizes.quantile(torch.tensor([0, 0.25, 0.5, 0.75, 1.0])).unique()
        for low, high in zip(edges[:-1], edges[1:], strict=True):
            inside = (sizes >= low) & ((sizes < high) | (high == edges[-1]))
            accuracies = expected_accuracy(margins, label_probability, TIE)[inside]
            if len(accuracies) == 0:
                continue
            best = torch.maximum(label_probability, 1 - label_probability)[inside].mean().item()
            inside_groups = [groups[i] for i in example[inside].tolist()]
            bars.append([low.item(), high.item(), *share_and_half(accuracies.tolist(), inside_groups), best])
            results[f"accuracy/margin_{low:.3g}_{high:.3g}"] = bars[-1][2]
            rows.append([f"  where {unit} differs by {low:.3g} to {high:.3g}", interval(tuple(bars[-1][2:4]), 3)])
    rows.append(["calibration error (ECE)", f"{error:.3f}"])
    if math.isfinite(results["length_correlation"]):
        rows.append(["correlation of reward with length", f"{results['length_correlation']:+.2f}"])
    return rows, results, (curve, unit, bars, (lengths.tolist(), flat.tolist()))


def draw(path: Path, curve, unit: str, bars, by_length, by_gold) -> None:
    """Draw report.png: reliability curve, accuracy by margin, reward against length and against gold reward."""
    page = new_page(13.0 if by_gold else 10.0, 3.0)
    panels = 2 + bool(bars) + bool(by_gold)
    reliability = page.add_subplot(1, panels, 1, xlabel="confidence sigmoid(|margin|)", ylabel="accuracy")
    reliability.plot([0.5, 1], [0.5, 1], color="grey", linewidth=1)
    reliability.plot([x for x, _, _ in curve], [y for _, y, _ in curve], marker="o")
    reliability.set_title("calibration on held-out pairs")
    if bars:
        axes = page.add_subplot(1, panels, 2, xlabel=f"difference of {unit}", ylabel="accuracy", ylim=(0.4, 1.02))
        positions = range(len(bars))
        axes.bar(positions, [b[2] for b in bars], yerr=[b[3] for b in bars], color="C0", alpha=0.7)
        axes.plot(positions, [b[4] for b in bars], "k_", markersize=24, label="best possible")
        axes.set_xticks(positions, [f"{b[0]:.2g}-{b[1]:.2g}" for b in bars], fontsize=8)
        axes.set_title("accuracy by size of the difference")
        axes.legend()
    axes = page.add_subplot(1, panels, 2 + bool(bars), xlabel="length, tokens", ylabel="reward")
    axes.scatter(*by_length, s=4, alpha=0.3)
    axes.set_title("reward against length, held out")
    if by_gold:
        axes = page.add_subplot(1, panels, panels, xlabel="gold reward", ylabel="reward")
        axes.scatter(*by_gold, s=4, alpha=0.5)
        axes.set_title("reward against gold, SFT samples")
    page.savefig(path, dpi=120)
