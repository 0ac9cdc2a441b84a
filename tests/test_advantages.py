"""The mathematics of PPO against worked numbers and definitions written out; exactness in test_ppo_oracles.py."""

import math
import random
import re
from math import exp

import pytest
import torch
from torch import Tensor

from rlhf import BadInput, losses
from rlhf.advantages import (
    adaptive_kl_coef,
    drgrpo,
    explained_variance,
    gae,
    grpo,
    kl_estimate,
    missing_eos,
    reinforce_pp,
    remax,
    rloo,
    sampler_weights,
    sequence_means,
    sequence_sums,
    shape_rewards,
    whiten,
)


def f64(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def close(found: Tensor, *wanted: float, atol: float = 1e-14) -> None:
    torch.testing.assert_close(found, f64(*wanted), rtol=0, atol=atol)


def ragged(lengths: list[int], seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """(rewards, values, lengths), random."""
    g = torch.Generator().manual_seed(seed)
    rewards, values = torch.randn(2, sum(lengths), generator=g, dtype=torch.float64)
    return rewards, values, torch.tensor(lengths)


# The golden response: four tokens, gamma 1, lam 0.95.
REWARDS, VALUES, FOUR = f64(-0.01, 0.02, -0.03, 1), f64(0.1, 0.2, 0.3, 0.4), torch.tensor([4])
ADVANTAGES = f64(0.7816, 0.728, 0.64, 0.6)

# --- KL estimates


def test_kl_estimates_by_hand():
    D = f64(-1, 0, 0.5, 2)
    close(kl_estimate(D, "k1"), -1, 0, 0.5, 2)
    close(kl_estimate(D, "k2"), 0.5, 0, 0.125, 2)
    close(kl_estimate(D, "k3"), exp(1) - 2, 0, exp(-0.5) - 0.5, exp(-2) + 1)


def test_kl_estimates_of_three_words():
    """pi = (.5, .3, .2), ref = (.2, .3, .5): means and deviations of the golden table; k3 the wrong way round."""
    p, q = f64(0.5, 0.3, 0.2), f64(0.2, 0.3, 0.5)
    D = (p / q).log()
    mean = {name: (p * kl_estimate(D, name)).sum().item() for name in ("k1", "k2", "k3")}
    deviation = {n: (p * (kl_estimate(D, n) - mean[n]).square()).sum().sqrt().item() for n in mean}
    assert 0.3 * math.log(2.5) == pytest.approx(0.274887, abs=1e-6)
    assert mean == pytest.approx({"k1": 0.274887, "k2": 0.293856, "k3": 0.274887}, abs=1e-6)
    assert deviation == pytest.approx({"k1": 0.716, "k2": 0.192, "k3": 0.206}, abs=5e-4)
    assert (p * kl_estimate(-D, "k3")).sum().item() == pytest.approx(0.355113, abs=1e-6)  # chi-squared less KL


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_kl_estimates_of_extreme_ratios(estimator, dtype):
    D = torch.tensor([-1e4, -100, -21, -1e-8, 0, 1e-8, 100, 1e4], dtype=dtype, requires_grad=True)
    found = kl_estimate(D, estimator)
    found.sum().backward()
    assert found.dtype == dtype and found.isfinite().all() and D.grad.isfinite().all()
    assert estimator == "k1" or (found >= 0).all()
    if estimator == "k3":
        held = exp(20) - 1 - 20
        assert found[:3].tolist() == pytest.approx([held] * 3, rel=1e-6) and D.grad[:3].tolist() == [0, 0, 0]
        assert D.grad[3:].tolist() == pytest.approx([-1e-8, 0, 1e-8, 1, 1], abs=1e-7)


def test_kl_estimates_are_differentiable():
    D = f64(-1.5, -0.2, 0.3, 2).requires_grad_()
    for estimator in ("k1", "k2", "k3"):
        assert torch.autograd.gradcheck(lambda x: kl_estimate(x, estimator), (D,))  # noqa: B023


# --- rewards


def test_sums_over_sequences():
    per_token = f64(1, 2, 3, 4, 5, 6).requires_grad_()
    sums = sequence_sums(per_token, torch.tensor([2, 1, 3]))
    close(sums.detach(), 3, 3, 15)
    (sums * f64(1, 10, 100)).sum().backward()
    close(per_token.grad, 1, 1, 10, 100, 100, 100)


def test_sums_keep_their_digits():
    """A thousand times 0.1, twice: in float32 alone adding up loses 1e-3; the result has the dtype of the tokens."""
    sums = sequence_sums(torch.full((20000,), 0.1), torch.tensor([10000, 10000]))
    assert sums.dtype == torch.float32 and sums.tolist() == pytest.approx([1000, 1000], rel=1e-7)


def test_rewards_by_hand():
    """The score at a sequence's last token, minus half a point per nat everywhere; lengths 3, 1, 2."""
    kl, scores = f64(0.1, -0.2, 0.4, 1, 0, 2).requires_grad_(), f64(7, -1, 3).requires_grad_()
    rewards = shape_rewards(kl, scores, torch.tensor([3, 1, 2]), 0.5)
    close(rewards, -0.05, 0.1, 6.8, -1.5, 0, 2)
    assert not rewards.requires_grad
    close(kl.detach(), 0.1, -0.2, 0.4, 1, 0, 2)
    alone = shape_rewards(kl, scores, torch.tensor([3, 1, 2]), 0.0)
    close(alone, 0, 0, 7, -1, 0, 3)
    mixed = shape_rewards(kl.detach().float(), scores.detach(), torch.tensor([3, 1, 2]), 0.5)
    assert mixed.dtype == torch.float32


def test_cut_responses():
    scores, ended = f64(2, -3, 0.5), torch.tensor([True, False, False])
    close(missing_eos(scores, ended, "replace", -1.0), 2, -1, -1)
    close(missing_eos(scores, ended, "subtract", 1.0), 2, -4, -0.5)
    assert missing_eos(f64(1, math.nan), torch.tensor([True, False]), "replace", -1.0).tolist() == [1, -1]
    for penalty in (0.0, 0.5):
        close(missing_eos(scores, ended, "subtract", penalty), 2, -3 - penalty, 0.5 - penalty)
    assert not missing_eos(scores.requires_grad_(), ended, "subtract", 1.0).requires_grad


def test_adaptive_coefficient():
    """The golden run: target 6, horizon 10000, 512 episodes a step; KL 12, 6 and 3. Then shares between the clips."""
    kl_coef, path = 0.15, []
    for kl in (12.0, 6.0, 3.0):
        kl_coef = adaptive_kl_coef(kl_coef, kl, kl_target=6.0, episodes=512, horizon=10000.0)
        path.append(kl_coef)
    assert type(kl_coef) is float
    assert path == pytest.approx([0.151536, 0.151536, 0.149984], abs=6e-7)
    assert adaptive_kl_coef(2.0, 6.6, 6.0, 100, 1000.0) == pytest.approx(2 * (1 + 0.1 * 0.1), rel=1e-14)
    assert adaptive_kl_coef(2.0, 5.7, 6.0, 100, 1000.0) == pytest.approx(2 * (1 - 0.05 * 0.1), rel=1e-14)
    assert adaptive_kl_coef(2.0, -1.0, 6.0, 100, 1000.0) == pytest.approx(2 * (1 - 0.2 * 0.1), rel=1e-14)
    assert adaptive_kl_coef(2.0, 6.6, 6.0, 100, 50.0) == pytest.approx(2 * (1 + 0.1 * 2), rel=1e-14)  # above 100 / 5


def test_whitening():
    close(whiten(ADVANTAGES), 1.318819, 0.568408, -0.663610, -1.223618, atol=6e-7)
    close(whiten(ADVANTAGES, shift_mean=False), 2.006219, 1.255808, 0.023790, -0.536218, atol=6e-7)
    unbiased = (ADVANTAGES - ADVANTAGES.mean()) / (ADVANTAGES.var() + 1e-8).sqrt()
    close(unbiased, 1.142131, 0.492256, -0.574703, -1.059685, atol=6e-7)  # in the table as what it is not
    # mean 0, variance 1e-8: the one under the root halves it
    close(whiten(f64(1e-4, -1e-4)), 0.5**0.5, -(0.5**0.5))
    close(whiten(f64(3, 3)), 0, 0)
    close(whiten(f64(3, 3), shift_mean=False), 3, 3)
    assert not whiten(f64(1, 2).requires_grad_()).requires_grad


# --- GAE


def test_gae_of_the_golden_response():
    found, returns = gae(REWARDS, VALUES, FOUR, 1.0, 0.95)
    close(found, 0.7816, 0.728, 0.64, 0.6)
    close(returns, 0.8816, 0.928, 0.94, 1.0)
    assert all(map(torch.equal, gae(REWARDS, VALUES, FOUR), (found, returns)))  # gamma 1, lam 0.95 are the defaults


def by_definition(rewards, values, gamma, lam):
    """A_t = sum over j >= t of (gamma lam)^(j - t) delta_j, for one sequence of plain numbers."""
    following = [*values[1:], 0.0]
    delta = [r + gamma * after - v for r, v, after in zip(rewards, values, following, strict=True)]
    return [sum((gamma * lam) ** (j - t) * delta[j] for j in range(t, len(delta))) for t in range(len(delta))]


@pytest.mark.parametrize("gamma, lam", [(1.0, 0.95), (1.0, 1.0), (0.9, 0.5), (1.0, 0.0), (0.0, 1.0), (0.99, 0.97)])
def test_gae_is_its_definition_on_ragged_sequences(gamma, lam):
    rng = random.Random(0)
    for seed, b in enumerate((1, 2, 7, 12)):
        lengths = [rng.randrange(1, 9) for _ in range(b)]
        rewards, values, of = ragged(lengths, seed)
        found, returns = gae(rewards, values, of, gamma, lam)
        parts = zip(rewards.split(lengths), values.split(lengths), strict=True)
        wanted = [a for r, v in parts for a in by_definition(r.tolist(), v.tolist(), gamma, lam)]
        torch.testing.assert_close(found, f64(*wanted), rtol=1e-12, atol=1e-13)
        torch.testing.assert_close(returns, f64(*wanted) + values, rtol=1e-12, atol=1e-13)


def test_gae_with_lam_1_is_what_is_to_come_less_the_value():
    rewards, values, lengths = ragged([3, 2])
    _, returns = gae(rewards, values, lengths, 1.0, 1.0)
    r = rewards.tolist()
    close(returns, r[0] + r[1] + r[2], r[1] + r[2], r[2], r[3] + r[4], r[4])


def test_sequences_do_not_touch():
    """One between others, of any length, with infinite and undefined numbers in it, moves no other by a bit."""
    rewards, values, lengths = ragged([4, 2, 7])
    for at, middle in ((7, [math.nan] * 7), (2, [math.inf, -math.inf])):
        bad = torch.tensor(middle, dtype=torch.float64)
        sizes = torch.tensor([4, len(middle), 7])
        around = [torch.cat([x[:4], bad, x[6:]]) for x in (rewards, values)]
        for clean, dirty in zip(gae(rewards, values, lengths), gae(*around, sizes), strict=True):
            assert torch.equal(dirty[:4], clean[:4]) and torch.equal(dirty[4 + at :], clean[6:])
            assert not dirty[4 : 4 + at].isfinite().any()


def test_gae_gives_no_gradient_and_keeps_the_dtype():
    rewards, values, lengths = ragged([3, 1])
    found = gae(rewards.float().requires_grad_(), values.float().requires_grad_(), lengths)
    assert not any(x.requires_grad for x in found) and {x.dtype for x in found} == {torch.float32}


def test_gae_of_answers_of_one_token_each():
    """The score less the value before the token."""
    found = gae(f64(1, 2), f64(0.25, 0.5), torch.tensor([1, 1]), 0.9, 0.8)
    close(found[0], 0.75, 1.5)
    close(found[1], 1, 2)


def test_reinforce_pp_by_hand():
    """Two responses of 2 and 1 tokens, kl_coef 0.5: R less half of the k1 from t on, whitened over 3 tokens."""
    rewards = shape_rewards(f64(0.2, 0.4, -0.6), f64(1, 2), torch.tensor([2, 1]), 0.5)
    to_come = [1 - 0.5 * 0.6, 1 - 0.5 * 0.4, 2 + 0.5 * 0.6]
    mean = sum(to_come) / 3
    deviation = math.sqrt(sum((x - mean) ** 2 for x in to_come) / 3 + 1e-8)
    close(reinforce_pp(rewards, torch.tensor([2, 1])), *((x - mean) / deviation for x in to_come))


# --- groups

GROUPS = torch.tensor([[1, 2, 6], [0.5, 0.5, 0.5]], dtype=torch.float64)


def test_groups_by_hand():
    """R = 1, 2, 6: mean 3, of the others 4, 3.5 and 1.5, sample deviation sqrt(7). Equal rewards: nothing to learn."""
    zero = [0.0, 0.0, 0.0]
    close(rloo(GROUPS).flatten(), -3, -1.5, 4.5, *zero)
    close(drgrpo(GROUPS).flatten(), -2, -1, 3, *zero)
    scale = math.sqrt(7) + 1e-4
    close(grpo(GROUPS).flatten(), -2 / scale, -1 / scale, 3 / scale, *zero)
    close(remax(GROUPS, f64(2, -1)).flatten(), -1, 0, 4, 1.5, 1.5, 1.5)
    close(remax(GROUPS[:, :1], f64(2, -1)).flatten(), -1, 1.5)
    assert not remax(GROUPS.clone().requires_grad_(), f64(2, -1)).requires_grad
    assert not remax(GROUPS, f64(2, -1).requires_grad_()).requires_grad


def test_two_responses_of_a_group():
    """RLOO is the difference; GRPO sees only which is better, whatever the difference, up to 1 / sqrt(2)."""
    pair = f64(3, 1)[None]
    close(rloo(pair)[0], 2, -2)
    for spread in (0.1, 1, 100):
        close(grpo(spread * pair)[0], 0.5**0.5, -(0.5**0.5), atol=1e-3)


@pytest.mark.parametrize("method", [rloo, grpo, drgrpo])
def test_groups_are_their_own(method):
    """No group sees another, a constant on all of a group's rewards changes nothing, and its advantages add up to 0."""
    R = torch.randn(3, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64).requires_grad_()
    A = method(R)
    assert not A.requires_grad
    torch.testing.assert_close(A, torch.cat([method(row[None]) for row in R]), rtol=1e-14, atol=1e-15)
    torch.testing.assert_close(method(R + f64(5, -7, 100)[:, None]), A, rtol=1e-11, atol=1e-11)
    assert A.sum(1).abs().max() < 1e-14


def test_rounding_among_equal_rewards_is_not_blown_up():
    """The mean of eight times 0.1 in float32 is not 0.1; dividing by the deviation alone would make that nearly 1."""
    R = torch.full((1, 8), 0.1)
    assert R.std() > 0
    assert grpo(R).abs().max() < 1e-3


def test_of_tokens():
    """A sequence's advantage at each of its tokens."""
    A = rloo(GROUPS).flatten()
    close(A.repeat_interleave(torch.tensor([1, 2, 1, 1, 1, 2])), -3, -1.5, -1.5, 4.5, 0, 0, 0, 0)


def test_explained_variance():
    returns = f64(1, 2, 3, 6)
    assert explained_variance(returns, returns).item() == 1
    assert explained_variance(torch.full_like(returns, 9), returns).item() == 0
    # errors 0, 1, -1, 0 have variance 0.5, the returns 3.5
    assert explained_variance(f64(1, 1, 4, 6), returns).item() == pytest.approx(1 - 0.5 / 3.5, abs=1e-14)
    assert explained_variance(-returns, returns).item() == pytest.approx(-3, abs=1e-14)
    assert explained_variance(f64(1, 1), f64(2, 2)).item() == 1
    assert explained_variance(f64(1), f64(2)).item() == 1  # of one token
    # equal returns: the errors' variance 1e-8 against the smallest that the returns' may be
    assert explained_variance(f64(-1e-4, 1e-4), f64(0, 0)).item() == pytest.approx(0, abs=1e-9)
    assert not explained_variance(returns.clone().requires_grad_(), returns).requires_grad


# --- the losses

E = 0.2
TABLE = [(1.5, 1, -1.2), (1.5, -1, 1.5), (0.5, 1, -0.5), (0.5, -1, 0.8), (1.1, 1, -1.1)]


def test_clipped_surrogate():
    """The golden table, and the gradient by log pi: -A ratio, but 0 in the two clipped cases."""
    ratio, A, wanted = f64(*(x for row in TABLE for x in row)).view(-1, 3).T
    old = f64(-3, -0.1, -7, -1, -2).requires_grad_()
    logps = (old.detach() + ratio.log()).requires_grad_()
    A = A.clone().requires_grad_()
    loss = losses.ppo_clip(logps, old, A, E)
    torch.testing.assert_close(loss.detach(), wanted, rtol=1e-14, atol=0)
    loss.sum().backward()
    torch.testing.assert_close(logps.grad, f64(0, 1.5, -0.5, 0, -1.1), rtol=1e-14, atol=0)
    assert old.grad is None and A.grad is None
    assert losses.clipped(logps, old, A, E).tolist() == [True, False, False, True, False]


def test_an_upper_bound_of_its_own():
    """DAPO's: 0.2 below and 0.28 above, the golden values of the second and of the fourth row unchanged."""
    ratio, A = f64(1.5, 1.25, 0.5, 1.5), f64(1, 1, -1, -1)
    logps = ratio.log().requires_grad_()
    loss = losses.ppo_clip(logps, f64(0, 0, 0, 0), A, 0.2, 0.28)
    loss.sum().backward()
    torch.testing.assert_close(loss.detach(), f64(-1.28, -1.25, 0.8, 1.5), rtol=1e-14, atol=0)
    torch.testing.assert_close(logps.grad, f64(0, -1.25, 0, 1.5), rtol=1e-14, atol=0)
    assert losses.clipped(logps, f64(0, 0, 0, 0), A, 0.2, 0.28).tolist() == [True, False, True, False]


def test_cispo_by_hand():
    """-A min(ratio, 1.2) log pi: the capped token keeps a gradient, and nothing bounds the ratio from below."""
    ratio, A, old = f64(2, 2, 0.5), f64(1, -3, -1), f64(0.1, 0.1, 0.1).log()
    logps = (old + ratio.log()).requires_grad_()
    loss = losses.cispo(logps, old, A, 0.2)
    loss.sum().backward()
    wanted = f64(-1.2 * math.log(0.2), 3.6 * math.log(0.2), 0.5 * math.log(0.05))
    torch.testing.assert_close(loss.detach(), wanted, rtol=1e-14, atol=0)
    torch.testing.assert_close(logps.grad, f64(-1.2, 3.6, 0.5), rtol=1e-14, atol=0)


def test_gspo_by_hand():
    """Answers of 2 and 1 tokens with token ratios 2, 1.125 and 0.5: the first answer's is their geometric mean, 1.5."""
    lengths, logps = torch.tensor([2, 1]), f64(2, 1.125, 0.5).log().requires_grad_()
    close(sequence_means(logps, lengths).exp().detach(), 1.5, 1.5, 0.5)
    for A, wanted, gradient in ((1.0, (-1.2, -1.2, -0.5), (0, 0, -0.5)), (-1.0, (1.5, 1.5, 0.8), (1.5, 1.5, 0))):
        logps.grad = None
        means = sequence_means(logps, lengths)
        loss = losses.ppo_clip(means, f64(0, 0, 0), A * f64(1, 1, 1), 0.2)
        loss.sum().backward()
        close(loss.detach(), *wanted)
        close(logps.grad, *gradient)


def test_sampler_weights_by_hand():
    """Token ratios 2, 1.5 and 0.5 of answers of 2 and 1 tokens; the products are 3 and 0.5."""
    lengths, sampled = torch.tensor([2, 1]), f64(-1, -2, -3)
    logps = (sampled + f64(2, 1.5, 0.5).log()).requires_grad_()
    close(sampler_weights(logps, sampled, lengths, "token", 1.75), 1.75, 1.5, 0.5)
    close(sampler_weights(logps, sampled, lengths, "sequence", 3.1), 3, 3, 0.5)
    close(sampler_weights(logps, sampled, lengths, "sequence", 2.9), 0, 0, 0.5)
    assert not sampler_weights(logps, sampled, lengths, "token", 2.0).requires_grad
    with pytest.raises(BadInput, match="correction must be token or sequence, not none"):
        sampler_weights(logps, sampled, lengths, "none", 2.0)


@pytest.mark.parametrize("clip_range", [0.05, 0.2, 0.9, 1.5])
def test_gradient_is_0_only_where_clipped(clip_range):
    """On a grid of ratios and advantages: 0 where `clipped` says so and where A is 0, else -A ratio, and not 0."""
    x = torch.linspace(-4, 4, 161, dtype=torch.float64)
    logps, A = (v.flatten() for v in torch.meshgrid(x, f64(-2, -1e-3, 0, 1e-3, 2), indexing="ij"))
    logps = logps.clone().requires_grad_()
    old = torch.zeros_like(A)
    losses.ppo_clip(logps, old, A, clip_range).sum().backward()
    ratio, clipped = logps.detach().exp(), losses.clipped(logps, old, A, clip_range)
    by_definition = (A > 0) & (ratio > 1 + clip_range) | (A < 0) & (ratio < 1 - clip_range)
    assert torch.equal(clipped, by_definition) and clipped.any() and not clipped.all()
    torch.testing.assert_close(logps.grad, torch.where(clipped, 0.0, -A * ratio), rtol=1e-14, atol=0)
    assert torch.equal(logps.grad == 0, clipped | (A == 0))


def test_a_ratio_at_the_end_of_the_range_is_not_clipped():
    """2 and 1/2, which are exact: the gradient is all of -A ratio."""
    for ratio, A, clip_range in ((2.0, 3.0, 1.0), (0.5, -3.0, 0.5)):
        logps = f64(math.log(ratio)).requires_grad_()
        assert logps.detach().exp().item() == ratio
        losses.ppo_clip(logps, f64(0), f64(A), clip_range).sum().backward()
        assert logps.grad.item() == -A * ratio
        assert not losses.clipped(logps, f64(0), f64(A), clip_range).any()


def test_at_the_first_update_it_is_the_policy_gradient():
    """At ratio 1, where both branches are equal, the gradient is all of -A, not half of it."""
    logps, A = f64(-1, -2, -0.5).requires_grad_(), f64(2, -3, 0)
    loss = losses.ppo_clip(logps, logps.detach(), A, E)
    loss.sum().backward()
    close(loss.detach(), -2, 3, 0)
    close(logps.grad, -2, 3, 0)
    assert not losses.clipped(logps, logps.detach(), A, E).any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_clipped_surrogate_of_extreme_ratios(dtype):
    """Above exp(20) the ratio goes on as a straight line: finite, and a token that should become rarer still does."""
    x = [-1e4, -1e3, 0.0, 19.0, 21.0, 100.0, 1e4]
    logps, old = torch.tensor(x + x, dtype=dtype, requires_grad=True), torch.zeros(14, dtype=dtype)
    A = torch.tensor([-1.0] * 7 + [1.0] * 7, dtype=dtype)
    loss = losses.ppo_clip(logps, old, A, E)
    loss.sum().backward()
    assert loss.isfinite().all() and logps.grad.isfinite().all()
    ratio = [exp(19)] + [exp(20) * (1 + y - 20) for y in (21, 100, 1e4)]
    assert loss[3:7].tolist() == pytest.approx(ratio, rel=1e-5)
    assert logps.grad[:7].tolist() == pytest.approx([0, 0, 1, exp(19), exp(20), exp(20), exp(20)], rel=1e-5)
    assert logps.grad[7:].tolist() == [0, 0, -1, 0, 0, 0, 0]


def test_value_loss():
    """The golden table: clipped with the larger error, clipped with the smaller, inside."""
    values, old, returns = (f64(*x).requires_grad_() for x in ((1, 0, 0.6), (0.5, 0.5, 0.5), (0.9, 0.9, 0.9)))
    loss = losses.value_loss(values, old, returns, E)
    close(loss.detach(), 0.02, 0.405, 0.045)
    loss.sum().backward()
    close(values.grad, 0, -0.9, -0.3)
    assert old.grad is None and returns.grad is None
    plain = losses.value_loss(values, old, returns)
    close(plain.detach(), 0.005, 0.405, 0.045)


def test_value_gradient_is_0_only_where_clipped():
    """Where V is more than 0.2 from 0 and yet nearer to the return than 0.2 (or -0.2) is."""
    grid = torch.meshgrid(torch.linspace(-1, 1, 40).double(), torch.linspace(-1.1, 1.1, 37).double(), indexing="ij")
    values, returns = (v.flatten().clone() for v in grid)
    values.requires_grad_()
    losses.value_loss(values, torch.zeros_like(values), returns, 0.2).sum().backward()
    v = values.detach()
    held = (v.abs() > 0.2) & ((v - returns).abs() < (0.2 * v.sign() - returns).abs())
    assert held.any() and not held.all()
    torch.testing.assert_close(values.grad, torch.where(held, 0.0, v - returns), rtol=1e-14, atol=0)


def test_loss_gradients():
    old, A = f64(-1, -2, -0.5, -3), f64(2, -3, 1, -1)
    logps = (old + f64(0.1, -0.1, 0.5, 0.5)).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: losses.ppo_clip(x, old, A, E), (logps,))
    assert torch.autograd.gradcheck(lambda x: losses.value_loss(x, old, A, E), (logps,))


# --- impossible settings

ONE, N = f64(1), torch.tensor([1])
YES = torch.tensor([True])


@pytest.mark.parametrize(
    "message, call",
    [
        ("estimator must be k1, k2 or k3, not k4", lambda: kl_estimate(ONE, "k4")),
        ("rule must be replace or subtract, not drop", lambda: missing_eos(ONE, YES, "drop", 1.0)),
        (
            "missing_eos_value must be at least 0 to be subtracted, not -1.0",
            lambda: missing_eos(ONE, YES, "subtract", -1.0),
        ),
        ("missing_eos_value must be finite, not nan", lambda: missing_eos(ONE, YES, "replace", math.nan)),
        ("kl_coef must be at least 0 and finite, not -0.1", lambda: shape_rewards(ONE, ONE, N, -0.1)),
        ("kl_coef must be at least 0 and finite, not nan", lambda: shape_rewards(ONE, ONE, N, math.nan)),
        ("a sequence has no token", lambda: shape_rewards(ONE, f64(1, 2), torch.tensor([1, 0]), 0.1)),
        ("gamma must be in [0, 1], not 1.1", lambda: gae(ONE, ONE, N, 1.1)),
        ("lam must be in [0, 1], not -0.1", lambda: gae(ONE, ONE, N, 1.0, -0.1)),
        ("kl must be finite, not nan", lambda: adaptive_kl_coef(0.1, math.nan, 6.0, 1, 10.0)),
        ("kl_target must be above 0 and finite, not 0.0", lambda: adaptive_kl_coef(0.1, 1.0, 0.0, 1, 10.0)),
        ("horizon must be above episodes / 5 = 2.0, not 2.0", lambda: adaptive_kl_coef(0.1, 1.0, 6.0, 10, 2.0)),
        ("rloo needs at least 2 responses a prompt, not 1", lambda: rloo(ONE[None])),
        ("grpo needs at least 2 responses a prompt, not 1", lambda: grpo(ONE[None])),
        ("drgrpo needs at least 2 responses a prompt, not 1", lambda: drgrpo(ONE[None])),
        ("drgrpo needs at least 2 responses a prompt, not 1", lambda: drgrpo(f64(1, 2, 3)[:, None])),
        ("clip_range must be above 0", lambda: losses.ppo_clip(ONE, ONE, ONE, 0.0)),
        ("clip_range must be above 0", lambda: losses.clipped(ONE, ONE, ONE, -0.2)),
        ("clip_high must be above 0", lambda: losses.ppo_clip(ONE, ONE, ONE, 0.2, 0.0)),
        ("clip_high must be above 0", lambda: losses.cispo(ONE, ONE, ONE, -0.2)),
        ("sampler_cap must be above 0", lambda: sampler_weights(ONE, ONE, N, "token", 0.0)),
        ("value_clip must be above 0", lambda: losses.value_loss(ONE, ONE, ONE, math.inf)),
    ],
)
def test_impossible_settings(message, call):
    with pytest.raises(BadInput, match=f"^{re.escape(message)}") as error:
        call()
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("call", [lambda n: gae(REWARDS, VALUES, n), lambda n: sequence_sums(REWARDS, n)])
def test_lengths_must_add_up(call):
    with pytest.raises(RuntimeError):
        call(torch.tensor([2, 1]))
