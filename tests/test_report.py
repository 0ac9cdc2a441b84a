"""Intervals: printed tables of Student's t, sums by hand, and how often a share's interval has the share in it."""

import math
import random
from collections import Counter

import pytest

from support.report import mean_interval, share_interval, standard_error, student


@pytest.mark.parametrize(
    "n, quantile",
    [(1, 12.706), (4, 2.776), (9, 2.262), (10, 2.228), (14, 2.145), (29, 2.045), (120, 1.980), (511, 1.9646)],
)
def test_student_against_printed_tables(n, quantile):
    assert student(n) == pytest.approx(quantile, abs=6e-4)


def test_mean_interval_by_hand():
    # 1, 2, 3, 6, 8: mean 4, squares of the differences 9 + 4 + 1 + 4 + 16 = 34, variance 34 / 4, t(4) = 2.776
    mean, half = mean_interval([1.0, 2.0, 3.0, 6.0, 8.0])
    assert mean == 4
    assert half == pytest.approx(2.776 * math.sqrt(34 / 4 / 5), rel=1e-9)
    assert mean_interval([7.0]) == (7.0, math.inf)
    assert mean_interval([2.0, 2.0, 2.0]) == (2.0, 0.0)


def test_mean_interval_over_groups_by_hand():
    """Sums of the groups' deviations from 4: -5, 2 and 3; with three groups t(2) = 4.303."""
    mean, half = mean_interval([1.0, 2.0, 6.0, 3.0, 8.0], ["a", "a", "b", "c", "c"])
    assert mean == 4 and half == pytest.approx(4.303 * math.sqrt(3 / 2 * (25 + 4 + 9)) / 5)
    assert mean_interval([1.0, 3.0], ["a", "a"]) == (2.0, math.inf)
    assert standard_error([3.0, 6.0, 11.0], [2, 1, 2]) == pytest.approx(math.sqrt(3 / 2 * (25 + 4 + 9)) / 5)


@pytest.mark.parametrize("wins", [1, 20, 63])
def test_a_shares_interval_ends_where_the_share_would_be_just_rejected(wins):
    """Wilson's ends are the roots of (wins / 64 - p)^2 = t^2 p (1 - p) / 63; of 0s and 1s, se^2 = p (1 - p) / 63."""
    low, high = share_interval([1] * wins + [0] * (64 - wins), [1] * 64)
    for p in (low, high):
        assert (wins / 64 - p) ** 2 == pytest.approx(student(63) ** 2 * p * (1 - p) / 63)
    assert 0 < low < wins / 64 < high < 1


def test_a_shares_interval_where_all_values_are_the_same():
    t2 = student(63) ** 2  # 1.998 squared
    assert share_interval([1.0] * 64, [1] * 64) == pytest.approx((64 / (64 + t2), 1.0))  # 0.941
    assert share_interval([0.0] * 64, [1] * 64) == pytest.approx((0.0, t2 / (64 + t2)))
    assert share_interval([0.5] * 64, [1] * 64) == pytest.approx((0.5 * 64 / (64 + t2), 1 - 0.5 * 64 / (64 + t2)))
    assert share_interval([4.0] * 16, [4] * 16) == share_interval(
        [1.0] * 16, [1] * 16
    )  # 16 prompts, however many answers
    assert share_interval([1.0, 1.0, 0.0], [1, 1, 0]) == share_interval([1.0, 1.0], [1, 1])
    for one in (([1.0], [1]), ([], []), ([1.0, 0.0], [4, 0])):
        assert all(map(math.isnan, share_interval(*one)))


def coverage(p: float, draw, runs: int) -> float:
    """How often the interval of a sample of draw() has p in it."""
    found = Counter()
    for _ in range(runs):
        sums, counts = draw()
        found[tuple(sorted(zip(sums, counts, strict=True)))] += 1
    inside = 0
    for sample, times in found.items():
        low, high = share_interval(*zip(*sample, strict=True))
        inside += times * (low - 1e-12 <= p <= high + 1e-12)
    return inside / runs


@pytest.mark.parametrize("p", [0.5, 0.9, 0.99, 1.0])
def test_coverage_of_a_share_of_64_prompts(p):
    rng = random.Random(0)
    assert coverage(p, lambda: ([float(rng.random() < p) for _ in range(64)], [1] * 64), 2000) >= 0.93


@pytest.mark.parametrize("p", [0.5, 0.9, 0.99, 1.0])
def test_coverage_where_the_answers_to_a_prompt_are_alike(p):
    """64 prompts with 4 answers, each with probability 1/2 a copy of its prompt's first: not 256 independent values."""
    rng = random.Random(1)

    def draw():
        sums = []
        for _ in range(64):
            first = rng.random() < p
            sums.append(float(sum(first if rng.random() < 0.5 else rng.random() < p for _ in range(4))))
        return sums, [4] * 64

    assert coverage(p, draw, 1000) >= 0.93


@pytest.mark.parametrize("p", [0.5, 0.9, 0.99])
def test_coverage_with_ties_and_labels_of_a_probability(p):
    """Values of 1/2 in a fifth of the prompts; and 0.8 or 0.2, as the accuracy of labels that are right with 0.8."""
    rng = random.Random(2)
    tied = lambda: [0.5 if rng.random() < 0.2 else float(rng.random() < p) for _ in range(64)]  # noqa: E731
    label = lambda: [0.8 if rng.random() < p else 0.2 for _ in range(64)]  # noqa: E731
    assert coverage(0.2 * 0.5 + 0.8 * p, lambda: (tied(), [1] * 64), 1000) >= 0.93
    assert coverage(0.2 + 0.6 * p, lambda: (label(), [1] * 64), 1000) >= 0.93
