"""Agreement against Krippendorff's published example, a count by hand, and values worked out on paper."""

import itertools
import math
import random

import pytest
import torch

from support import reviews
from support.agreement import (
    alpha,
    coincidences,
    dense_ranks,
    first_shown,
    longer_wins,
    of_rankings,
    ordinal,
    pair_values,
    same,
)

# Krippendorff 2011, "Computing Krippendorff's alpha-reliability", sections C to E: 4 observers, 12 units, gaps (0).
OBSERVERS = [
    [1, 2, 3, 3, 2, 1, 4, 1, 2, 0, 0, 0],
    [1, 2, 3, 3, 2, 2, 4, 1, 2, 5, 0, 3],
    [0, 3, 3, 3, 2, 3, 4, 2, 2, 5, 1, 0],
    [1, 2, 3, 3, 2, 4, 4, 1, 2, 5, 1, 0],
]
UNITS = [[value for value in unit if value] for unit in zip(*OBSERVERS, strict=True)]
SCALE = (1, 2, 3, 4, 5)


def nominal(totals):
    return 1 - torch.eye(len(totals), dtype=totals.dtype)


def interval(totals):
    places = torch.arange(len(totals), dtype=totals.dtype)
    return (places[:, None] - places[None, :]) ** 2


@pytest.mark.parametrize("distance, published", [(nominal, 0.743), (ordinal, 0.815), (interval, 0.849)])
def test_alpha_has_the_published_values(distance, published):
    assert alpha(coincidences(UNITS, SCALE), distance) == pytest.approx(published, abs=5e-4)


def test_coincidences_are_those_of_the_published_table():
    table = coincidences(UNITS, SCALE)
    assert table.sum(1).tolist() == pytest.approx([9, 13, 10, 5, 3])
    expected = [[7, 4 / 3, 1 / 3, 1 / 3, 0], [4 / 3, 10, 4 / 3, 1 / 3, 0], [1 / 3, 4 / 3, 8, 1 / 3, 0]]
    expected += [[1 / 3, 1 / 3, 1 / 3, 4, 0], [0, 0, 0, 0, 3]]
    torch.testing.assert_close(table, torch.tensor(expected, dtype=torch.float64))
    assert same(table) == pytest.approx(32 / 40)


def test_ordinal_distance_counts_the_values_between():
    """n = (9, 13, 10, 5, 3): from 1 to 3 it is 9 + 13 + 10 - (9 + 10) / 2 = 22.5; neighbours 1 and 2 are 11 apart."""
    distance = ordinal(torch.tensor([9.0, 13, 10, 5, 3], dtype=torch.float64))
    assert distance[0, 2] == distance[2, 0] == 22.5**2
    assert distance[0, 1] == 11**2
    assert distance[3, 4] == 4**2
    assert distance.diagonal().tolist() == [0] * 5


def by_definition(units, values):
    """Ordinal alpha from the definition: mean distance within units against that between any two values."""
    units = [unit for unit in units if len(unit) > 1]
    flat = [value for unit in units for value in unit]
    count = {value: flat.count(value) for value in values}

    def distance(c, k):
        between = sum(count[g] for g in values if min(c, k) <= g <= max(c, k))
        return (between - (count[c] + count[k]) / 2) ** 2

    within = sum(distance(a, b) / (len(unit) - 1) for unit in units for a, b in itertools.permutations(unit, 2))
    anyhow = sum(distance(a, b) for a, b in itertools.permutations(flat, 2)) / (len(flat) - 1)
    return 1 - within / anyhow


def test_alpha_is_its_definition_on_random_units():
    rng = random.Random(0)
    for _ in range(20):
        units = [[rng.choice((-1, 0, 1, 1)) for _ in range(rng.randint(0, 4))] for _ in range(12)]
        assert alpha(coincidences(units)) == pytest.approx(by_definition(units, (-1, 0, 1)), abs=1e-12)


def test_two_annotators_by_hand():
    """Values (-1,-1), (1,1), (1,-1), (0,0): o has 2, 2, 2 on its diagonal and 1 where -1 meets 1; n = 8, n_c = 3, 2, 3.
    Then delta2(-1,1) = (8 - 3)^2 = 25 and delta2(-1,0) = delta2(0,1) = (5 - 2.5)^2 = 6.25, so that
    alpha = 1 - 7 (2 * 25) / (2 * (9 * 25 + 6 * 6.25 + 6 * 6.25)) = 1 - 350 / 600."""
    table = coincidences([[-1, -1], [1, 1], [1, -1], [0, 0]])
    assert table.tolist() == [[2, 0, 1], [0, 2, 0], [1, 0, 2]]
    assert same(table) == pytest.approx(6 / 8)
    assert alpha(table) == pytest.approx(1 - 350 / 600)


def test_tables_add_up_over_prompts():
    a, b = [[-1, 1], [0, 0, 1]], [[1, 1], [-1, 0]]
    torch.testing.assert_close(coincidences(a) + coincidences(b), coincidences(a + b))


@pytest.mark.parametrize("units", [[], [[1], [-1], []], [[1, 1], [1, 1, 1]]])
def test_alpha_is_undefined_without_comparison_or_variation(units):
    assert math.isnan(alpha(coincidences(units)))


def test_same_is_undefined_only_without_comparison():
    assert math.isnan(same(coincidences([[1], [-1]])))
    assert same(coincidences([[1, 1], [1, 1]])) == 1


def test_perfect_and_opposite_annotators():
    assert alpha(coincidences([[-1, -1], [1, 1], [0, 0]])) == 1
    assert alpha(coincidences([[-1, 1], [1, -1]])) == pytest.approx(1 - 3 / 2)  # n = 4, all distances equal


def test_annotators_who_toss_a_coin_have_alpha_near_zero():
    rng = random.Random(1)
    units = [[rng.choice((-1, 1)), rng.choice((-1, 1))] for _ in range(4000)]
    assert abs(alpha(coincidences(units))) < 0.05
    assert same(coincidences(units)) == pytest.approx(0.5, abs=0.03)


def test_agreement_of_simulated_annotators_is_what_their_noise_implies():
    """Two annotators with P(better) = p on each pair agree with probability p^2 + (1 - p)^2."""
    rng = random.Random(2)
    p = 1 / (1 + math.exp(-1 / 0.7))
    rankings = [[reviews.rank([1.0, 0.0], 0.7, rng) for _ in range(2)] for _ in range(4000)]
    units = [[pair_values(a)[0], pair_values(b)[0]] for a, b in rankings]
    assert same(coincidences(units)) == pytest.approx(p**2 + (1 - p) ** 2, abs=0.03)


@pytest.mark.parametrize("pairs", [(1, 2), (2, 1)])
def test_alpha_does_not_depend_on_the_order_of_the_responses(pairs):
    """Two annotators agree on 950 of 1,000 pairs, the better response listed first in half, 95 % or all of the rows.

    Each has the values -1 and 1 equally often once a pair counts both ways: n = 2000, o(-1, 1) = 50, so that
    alpha = 1 - 1999 (2 * 50) / (2 * 1000^2)."""
    rng = random.Random(3)
    found = []
    for first in (0.5, 0.95, 1.0):
        total = torch.zeros(3, 3, dtype=torch.float64)
        for row in range(1000):
            ranks = pairs if rng.random() < first else pairs[::-1]
            other = ranks if row % 20 else ranks[::-1]
            total += of_rankings((tuple(ranks), tuple(other)))
        found.append(alpha(total))
        assert same(total) == pytest.approx(0.95)
    assert found == pytest.approx([1 - 1999 * 100 / 2e6] * 3, abs=1e-12)  # 0.90


def test_alpha_of_rankings_with_ties_is_the_same_in_any_order_of_the_responses():
    rng, steps = random.Random(4), torch.tensor([-1.0, 0.0, 1.0], dtype=torch.float64)
    rankings = [tuple(tuple(rng.choices((1, 2, 3), k=4)) for _ in range(3)) for _ in range(30)]
    found = []
    for order in ([0, 1, 2, 3], [3, 2, 1, 0], [2, 0, 3, 1]):
        table = sum(of_rankings(tuple(tuple(ranks[i] for i in order) for ranks in x)) for x in rankings)
        assert alpha(table) == pytest.approx(alpha(table, interval))  # the ordinal distance is the interval one
        found.append(alpha(table))
    assert found[1:] == pytest.approx([found[0]] * 2)
    assert ordinal(table.sum(1))[0] / ordinal(table.sum(1))[0, 1] == pytest.approx((steps - steps[0]) ** 2)


def test_pair_values():
    assert pair_values([1, 2]) == [-1]
    assert pair_values([2, 1, 1, 3]) == [1, 1, -1, 0, -1, -1]  # (0,1) (0,2) (0,3) (1,2) (1,3) (2,3)


def test_dense_ranks():
    assert dense_ranks([0.1, 2.0, 0.1, -1.0]) == [2, 1, 2, 3]
    assert dense_ranks([5]) == [1]


def test_first_shown():
    assert first_shown([2, 0, 1], [2, 3, 1]) == 1  # response 2 was shown first and is the best
    assert first_shown([0, 2, 1], [2, 3, 1]) == 0
    assert first_shown([1, 0, 2], [1, 1, 2]) == 1 / 2
    assert first_shown([1, 0, 2], [1, 1, 1]) == 1 / 3


def test_first_shown_is_one_in_k_when_the_place_does_not_matter():
    rng, k = random.Random(3), 4
    found = [first_shown(rng.sample(range(k), k), [rng.randint(1, 3) for _ in range(k)]) for _ in range(4000)]
    assert sum(found) / len(found) == pytest.approx(1 / k, abs=0.02)


def test_longer_wins():
    assert longer_wins([10, 5, 5], [1, 2, 2]) == [1, 1]  # the tied pair says nothing
    assert longer_wins([3, 9, 3], [1, 2, 3]) == [0, 0.5, 1]  # 0 over 1, 0 over 2, 1 over 2
    assert longer_wins([3, 9], [1, 1]) == []
