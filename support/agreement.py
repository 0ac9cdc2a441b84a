"""Agreement between annotators, and biases in their rankings.

A ranking of K responses gives K(K-1)/2 pairs i < j. Each pair is a unit, to which an annotator gives the value -1 (i is
better), 0 (tie) or 1 (j is better). The scale is ordinal: -1 against 1 is a larger disagreement than -1 against 0. The
values are counted in one coincidence table, from which all measures of agreement are computed. Tables of several
prompts are summed, so an interval comes from resampling prompts (`support.report.bootstrap`).
"""

import functools
from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

VALUES = (-1, 0, 1)  # the possible values of a response pair


def dense_ranks(scores: Sequence[float | int]) -> list[int]:
    """Ranks of the scores: 1 for the greatest, without gaps; equal scores tie."""
    levels = sorted(set(scores), reverse=True)
    return [levels.index(score) + 1 for score in scores]


def pair_values(ranks: Sequence[int]) -> list[int]:
    """value_ij = sign(rank_i - rank_j) for the K(K-1)/2 pairs i < j in lexicographic order; rank 1 is the best."""
    return [(a > b) - (a < b) for i, a in enumerate(ranks) for b in ranks[i + 1 :]]


def better_pairs(ranks: Sequence[int]) -> list[tuple[int, int]]:
    """All pairs (i, j) of which i is ranked better than j, in lexicographic order; rank 1 is the best."""
    return [(i, j) for i, a in enumerate(ranks) for j, b in enumerate(ranks) if a < b]


def coincidences(units: Sequence[Sequence[int]], values: Sequence[int] = VALUES) -> Float[Tensor, "c c"]:
    """Coincidence table: how often the values c and k are given to the same unit.

        o_ck = sum_u n_uc (n_uk - [c = k]) / (m_u - 1),   m_u = sum_c n_uc

    n_uc is how often unit u got the value c, m_u how many values it got; units with fewer than two values are left out.
    The table is symmetric, and its sum n is the number of values in the remaining units. Krippendorff 2011, "Computing
    Krippendorff's alpha-reliability", section C. `units`: one list of values per unit, of any length and order. Raises
    KeyError for a value that is not in `values`.
    """
    index = {value: c for c, value in enumerate(values)}
    counts = torch.zeros(len(units), len(values), dtype=torch.float64)
    for u, unit in enumerate(units):
        for value in unit:
            counts[u, index[value]] += 1
    counts = counts[counts.sum(1) > 1]
    weighted = counts / (counts.sum(1, keepdim=True) - 1)
    return weighted.T @ counts - weighted.sum(0).diag()


@functools.cache
def of_rankings(rankings: tuple[tuple[int, ...], ...]) -> Float[Tensor, "c c"]:
    """Coincidence table of one prompt's response pairs, from each annotator's ranks of the K responses.

    Which response of a pair comes first says nothing about it, so each pair counts half as (i, j) and half as (j, i),
    which swaps -1 and 1. Both then have the same total, 0 is half way between them, and the distance `ordinal` is the
    interval one times a constant, which alpha cancels: a measure of agreement does not depend on the file's order.
    """
    table = coincidences(list(zip(*map(pair_values, rankings), strict=True)))
    return (table + table.flip(0, 1)) / 2


def same(table: Float[Tensor, "c c"]) -> float:
    """Pairwise agreement, in [0, 1]: how often two annotators give the same value to a unit.

        same = sum_c o_cc / n

    A tie only agrees with a tie. A unit with m_u annotators counts m_u times. NaN if no unit has two values.
    """
    return (table.trace() / table.sum()).item()


def ordinal(totals: Float[Tensor, " c"]) -> Float[Tensor, "c c"]:
    """Squared distance of two values on an ordinal scale, measured by how many given values lie between them.

        delta2_ck = (sum_{g = c..k} n_g - (n_c + n_k) / 2)^2

    Krippendorff 2011, section E. `totals`: n_g, how often the value g was given, in ascending order of g.
    """
    midranks = totals.cumsum(0) - totals / 2
    return (midranks[:, None] - midranks[None, :]) ** 2


def alpha(
    table: Float[Tensor, "c c"], distance: Callable[[Float[Tensor, " c"]], Float[Tensor, "c c"]] = ordinal
) -> float:
    """Krippendorff's alpha: 1 (the maximum) is perfect agreement, 0 chance level, < 0 systematic disagreement.

        alpha = 1 - (n - 1) sum_ck o_ck delta2_ck / sum_ck n_c n_k delta2_ck,   n_c = sum_k o_ck,   n = sum_c n_c

    Krippendorff 2011, section E. `table`: from `coincidences`; `distance`: delta2 from the totals n_c. NaN if no unit
    has two values, or if all values are the same, because the expected disagreement is then 0.
    """
    totals = table.sum(1)
    delta2 = distance(totals)
    expected = (totals[:, None] * totals[None, :] * delta2).sum()
    return (1 - (totals.sum() - 1) * (table * delta2).sum() / expected).item()


def first_shown(order: Sequence[int], ranks: Sequence[int]) -> float:
    """Whether the response that was shown first is ranked best: 1 or 0, or 1 / (number of best ones) if it ties.

    The mean is 1 / K for an annotator without position bias. `order`: indices into `ranks`, in the order in which the
    responses were shown.
    """
    best = [i for i in order if ranks[i] == min(ranks)]
    return (order[0] in best) / len(best)


def longer_wins(lengths: Sequence[int], ranks: Sequence[int]) -> list[float]:
    """For each untied pair: 1 if the longer response is better, 0 if the shorter is, 1/2 if both have equal length."""
    pairs = better_pairs(ranks)
    return [0.5 if lengths[i] == lengths[j] else float(lengths[i] > lengths[j]) for i, j in pairs]
