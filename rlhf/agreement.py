"""How far annotators agree, and what else than quality their rankings follow.

A ranking of K responses is taken apart into its K(K-1)/2 pairs i < j. Such a pair is a unit that each annotator values
-1 (i is better), 0 (tie) or 1 (j is better): an ordinal scale, where -1 against 1 is worse than -1 against 0. All
values that were given go into one table of coincidences, and every measure of agreement is read off that table. Tables
add up over prompts, so an interval is had by drawing prompts (`rlhf.runs.bootstrap`).
"""

import functools
from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

VALUES = (-1, 0, 1)  # of a response pair


def dense_ranks(scores: Sequence[float | int]) -> list[int]:
    """Ranks from 1 (the greatest score), without gaps; equal scores tie."""
    levels = sorted(set(scores), reverse=True)
    return [levels.index(score) + 1 for score in scores]


def pair_values(ranks: Sequence[int]) -> list[int]:
    """value_ij = sign(rank_i - rank_j) of the K(K-1)/2 pairs i < j, in the order of (i, j); rank 1 is the best."""
    return [(a > b) - (a < b) for i, a in enumerate(ranks) for b in ranks[i + 1 :]]


def coincidences(units: Sequence[Sequence[int]], values: Sequence[int] = VALUES) -> Float[Tensor, "c c"]:
    """How often the values c and k meet in a unit.

        o_ck = sum_u n_uc (n_uk - [c = k]) / (m_u - 1),   m_u = sum_c n_uc

    n_uc is how often unit u was given the value c, m_u how often it was valued at all; units valued less than twice
    have nothing to compare and are left out. Symmetric; its sum n is the number of values that could be compared.
    Krippendorff 2011, "Computing Krippendorff's alpha-reliability", section C. `units`: one list of values a unit, of
    any lengths, in any order. KeyError for a value that is not among `values`.
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
    """Coincidences of one prompt's response pairs, from the ranks that each annotator gave its K responses."""
    return coincidences(list(zip(*map(pair_values, rankings), strict=True)))


def same(table: Float[Tensor, "c c"]) -> float:
    """Pairwise agreement, in [0, 1]: how often two annotators of the same unit value it alike.

        same = sum_c o_cc / n

    A tie agrees with a tie only. With m_u annotators each unit counts m_u times. NaN where nothing was valued twice.
    """
    return (table.trace() / table.sum()).item()


def ordinal(totals: Float[Tensor, " c"]) -> Float[Tensor, "c c"]:
    """The squared distance of two values on an ordinal scale: how many values lie between them, by rank.

        delta2_ck = (sum_{g = c..k} n_g - (n_c + n_k) / 2)^2

    Krippendorff 2011, section E. `totals`: n_g, how often the value g was given, from the least value to the greatest.
    """
    middle = totals.cumsum(0) - totals / 2
    return (middle[:, None] - middle[None, :]) ** 2


def alpha(
    table: Float[Tensor, "c c"], distance: Callable[[Float[Tensor, " c"]], Float[Tensor, "c c"]] = ordinal
) -> float:
    """Krippendorff's alpha, at most 1: 1 is perfect agreement, 0 what chance gives, below 0 systematic disagreement.

        alpha = 1 - (n - 1) sum_ck o_ck delta2_ck / sum_ck n_c n_k delta2_ck,   n_c = sum_k o_ck,   n = sum_c n_c

    Krippendorff 2011, section E. `table`: from `coincidences`; `distance`: delta2 from the totals n_c. NaN where
    nothing was valued twice, or where all values are the same: then agreement cannot be told from habit.
    """
    totals = table.sum(1)
    delta2 = distance(totals)
    expected = (totals[:, None] * totals[None, :] * delta2).sum()
    return (1 - (totals.sum() - 1) * (table * delta2).sum() / expected).item()


def first_shown(order: Sequence[int], ranks: Sequence[int]) -> float:
    """How far the response that was shown first is the best one: 1 or 0, and 1 / (number of best ones) in a tie.

    An annotator whom the place on the page does not sway gives 1 / K on average. `order`: the responses as they were
    shown, as places in `ranks`.
    """
    best = [i for i in order if ranks[i] == min(ranks)]
    return (order[0] in best) / len(best)


def longer_wins(lengths: Sequence[int], ranks: Sequence[int]) -> list[float]:
    """For each untied pair: 1 where the longer response is the better one, 0 where the shorter is, 1/2 if as long."""
    pairs = [(i, j) for i, a in enumerate(ranks) for j, b in enumerate(ranks) if a < b]
    return [0.5 if lengths[i] == lengths[j] else float(lengths[i] > lengths[j]) for i, j in pairs]
