"""Every loss against worked numbers, its closed-form gradient, and the invariances it should and should not have."""

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from math import exp, log

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from rlhf import BadInput, losses

BETA = 0.1
E = 0.1  # label smoothing
LN2 = log(2)
DIVERGENCES = ("reverse_kl", "forward_kl", "js", "alpha", "chi_po")


def f64(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def best_first(rewards: Tensor) -> Tensor:
    """The ranks 1 to k of rewards [p, k] that are given best first."""
    return torch.arange(1, rewards.shape[1] + 1).expand(rewards.shape)


@dataclass
class Pairs:
    """What a loss may read of m pairs; log-probabilities are sums over the response's tokens, in nats."""

    chosen: Tensor
    rejected: Tensor
    ref_chosen: Tensor
    ref_rejected: Tensor
    chosen_lengths: Tensor
    rejected_lengths: Tensor

    def ratios(self, divergence: str = "reverse_kl", alpha: float = 0.5) -> tuple[Tensor, Tensor]:
        return (
            losses.implicit_reward(self.chosen, self.ref_chosen, divergence, alpha),
            losses.implicit_reward(self.rejected, self.ref_rejected, divergence, alpha),
        )

    @property
    def lengths(self) -> tuple[Tensor, Tensor]:
        return self.chosen_lengths, self.rejected_lengths

    def moved(self, chosen: Tensor | float, rejected: Tensor | float) -> "Pairs":
        """The same pairs after the policy's log-probabilities rose by so many nats."""
        return replace(self, chosen=self.chosen + chosen, rejected=self.rejected + rejected)

    def swapped(self) -> "Pairs":
        return Pairs(
            self.rejected, self.chosen, self.ref_rejected, self.ref_chosen, self.rejected_lengths, self.chosen_lengths
        )


# The two pairs of the golden table: log-ratios (1, -0.5) and (-2, 1), so h = 1.5 and -3.
PAIRS = Pairs(f64(-10, -30), f64(-12, -20), f64(-11, -28), f64(-11.5, -21), torch.tensor([5, 10]), torch.tensor([8, 4]))


def kto_of_pairs(q: Pairs, beta: float = BETA, z0: float = 0.5) -> Tensor:
    chosen, rejected = q.ratios()
    z0, yes = torch.tensor(z0, dtype=chosen.dtype), torch.ones(len(chosen), dtype=torch.bool)
    return losses.kto(chosen, yes, z0, beta) + losses.kto(rejected, ~yes, z0, beta)


Loss = Callable[..., Tensor]  # (pairs, beta) -> one loss for each pair
LOSSES: dict[str, Loss] = {
    "sft": lambda q, b=BETA: losses.sft(q.chosen),
    "dpo": lambda q, b=BETA: losses.dpo(*q.ratios(), b),
    "conservative": lambda q, b=BETA: losses.dpo(*q.ratios(), b, label_smoothing=E),
    "robust": lambda q, b=BETA: losses.robust(*q.ratios(), b, E),
    "hinge": lambda q, b=BETA: losses.hinge(*q.ratios(), b),
    "ipo": lambda q, b=BETA: losses.ipo(*q.ratios(), b),
    "ipo_norm": lambda q, b=BETA: losses.ipo_norm(*q.ratios(), *q.lengths, b),
    "dpo_norm": lambda q, b=BETA: losses.dpo_norm(*q.ratios(), *q.lengths, b),
    "r_dpo": lambda q, b=BETA: losses.r_dpo(*q.ratios(), *q.lengths, b, length_penalty=0.01),
    "dpop": lambda q, b=BETA: losses.dpop(*q.ratios(), b, dpop_lambda=5.0),
    "dpo_nll": lambda q, b=BETA: losses.dpo_nll(*q.ratios(), q.chosen, q.chosen_lengths, b, nll_coef=0.3),
    "exo": lambda q, b=BETA: losses.exo(*q.ratios(), b, E),
    "nca": lambda q, b=BETA: losses.nca(*q.ratios(), b),
    "apo_zero": lambda q, b=BETA: losses.apo_zero(*q.ratios(), b),
    "apo_down": lambda q, b=BETA: losses.apo_down(*q.ratios(), b),
    "bco": lambda q, b=BETA: losses.bco(*q.ratios(), b),
    "bco_delta": lambda q, b=BETA: losses.bco(*q.ratios(), b, delta=0.2),
    "sppo": lambda q, b=BETA: losses.sppo(*q.ratios(), b),
    "discopop": lambda q, b=BETA: losses.discopop(*q.ratios(), b, discopop_tau=0.05),
    "kto": kto_of_pairs,
    "simpo": lambda q, b=2.0: losses.simpo(q.chosen, q.rejected, *q.lengths, b, gamma_beta_ratio=0.5),
    "orpo": lambda q, b=BETA: losses.orpo(q.chosen, q.rejected, *q.lengths, orpo_lambda=0.1),
    "plackett_luce": lambda q, b=BETA: losses.plackett_luce(
        rewards := b * torch.stack(q.ratios(), dim=1), best_first(rewards)
    ),
    "forward_kl": lambda q, b=BETA: losses.dpo(*q.ratios("forward_kl"), b),
    "js": lambda q, b=BETA: losses.dpo(*q.ratios("js"), b),
    "alpha": lambda q, b=BETA: losses.dpo(*q.ratios("alpha", 0.5), b),
    "chi_po": lambda q, b=BETA: losses.dpo(*q.ratios("chi_po"), b, clip=0.6),
}


def every(names) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("name", sorted(names))


# ---- values

GOLDEN = {
    "dpo": (0.620957, 0.854355),
    "conservative": (0.635957, 0.824355),
    "robust": (0.602207, 0.891855),
    "hinge": (0.85, 1.3),
    "ipo": (12.25, 64.0),
    "ipo_norm": (22.443906, 29.7025),
    "dpo_norm": (0.680108, 0.7159),
    "simpo": (2.126928, 0.048587),
    "exo": (0.431388, 0.685517),
    "nca": (1.350825, 1.469407),
    "bco": (1.312856, 1.542536),
    "sppo": (36.25, 85.0),
    "apo_zero": (0.962523, 1.074813),
    "apo_down": (0.987549, 1.024609),
    "discopop": (0.849338, 0.85558),
    "forward_kl": (0.631154, 1.104602),
    "js": (0.660652, 0.787937),
    "dpop": (0.620957, 1.541008),
    "r_dpo": (0.634946, 0.82033),
    "kto": (0.962523, 1.074674),
    "orpo": (2.104206, 3.012175),
    "plackett_luce": (0.620957, 0.854355),
}

BY_HAND = {
    "sft": (10.0, 30.0),
    # -log s(0.15) + 0.3 * 10 / 5 and -log s(-0.3) + 0.3 * 30 / 10
    "dpo_nll": (log(1 + exp(-0.15)) + 0.6, log(1 + exp(0.3)) + 0.9),
    # rewards 0.1, -0.05 and -0.2, 0.1, each against a running mean of 0.2
    "bco_delta": (
        log(1 + exp(0.2 - 0.1)) + log(1 + exp(-0.05 - 0.2)),
        log(1 + exp(0.2 + 0.2)) + log(1 + exp(0.1 - 0.2)),
    ),
    # f' = u^(-1/2) / (-1/2): -2 exp(-D / 2)
    "alpha": (
        log(1 + exp(-0.1 * (-2 * exp(-0.5) + 2 * exp(0.25)))),
        log(1 + exp(-0.1 * (-2 * exp(1) + 2 * exp(-0.5)))),
    ),
    # exp(D) + D: 0.1 * (e^1 + 1 - e^-0.5 + 0.5) = 0.361 is inside the clip; 0.1 * (e^-2 - 2 - e - 1) = -0.558 too
    "chi_po": (
        log(1 + exp(-0.1 * (exp(1) + 1 - exp(-0.5) + 0.5))),
        log(1 + exp(-0.1 * (exp(-2) - 2 - exp(1) - 1))),
    ),
}


def test_every_loss_has_a_worked_value():
    assert GOLDEN.keys() | BY_HAND.keys() == LOSSES.keys()


@every(GOLDEN)
def test_golden_values(name):
    torch.testing.assert_close(LOSSES[name](PAIRS), f64(*GOLDEN[name]), rtol=0, atol=6e-7)


@every(BY_HAND)
def test_values_by_hand(name):
    torch.testing.assert_close(LOSSES[name](PAIRS), f64(*BY_HAND[name]), rtol=1e-14, atol=0)


def test_simpo_without_a_reference_margin_is_dpo_of_the_log_probabilities():
    one = torch.ones(2, dtype=torch.long)
    got = losses.simpo(PAIRS.chosen, PAIRS.rejected, one, one, BETA, gamma_beta_ratio=0.0)
    torch.testing.assert_close(got, f64(0.598139, 1.313262), rtol=0, atol=6e-7)  # reference-free DPO in the table


def test_chi_po_clip_holds_the_margin_and_stops_its_gradient():
    # P1: 0.1 * (e^1 + 1 - e^-0.5 + 0.5) = 0.361 is cut to 0.3; P2: -0.558 is cut to -0.3
    chosen, rejected = (x.requires_grad_() for x in PAIRS.ratios("chi_po"))
    loss = losses.dpo(chosen, rejected, BETA, clip=0.3)
    torch.testing.assert_close(loss.detach(), f64(log(1 + exp(-0.3)), log(1 + exp(0.3))), rtol=1e-14, atol=0)
    loss.sum().backward()
    assert chosen.grad.tolist() == rejected.grad.tolist() == [0, 0]


def test_plackett_luce_on_scores_and_on_reward_differences():
    scores = f64(2, 1, 0.5, -1)[None]
    torch.testing.assert_close(losses.plackett_luce(scores, best_first(scores)), f64(1.251552), rtol=0, atol=6e-7)
    # beta = 0.1, log-ratios 3, 1, -2: rewards 0.3, 0.1, -0.2, that is two choices left after the best
    rewards = BETA * (f64(-7, -12, -20) - f64(-10, -13, -18))[None]
    by_hand = log(1 + exp(-0.2) + exp(-0.5)) + log(1 + exp(-0.3))
    torch.testing.assert_close(losses.plackett_luce(rewards, best_first(rewards)), f64(by_hand), rtol=1e-14, atol=0)


def test_plackett_luce_is_a_distribution_over_rankings():
    rewards = torch.tensor(list(itertools.permutations([0.7, -1.3, 2.1, 0.0])), dtype=torch.float64)
    assert losses.plackett_luce(rewards, best_first(rewards)).neg().exp().sum().item() == pytest.approx(1, abs=1e-14)
    assert losses.plackett_luce(f64(0.4)[None], torch.ones(1, 1).long()).item() == 0  # one response: one ranking
    equal = torch.full((1, 5), 3.0)
    assert losses.plackett_luce(equal, best_first(equal)).item() == pytest.approx(log(120), abs=1e-6)


# ---------------------------------------------------------------------------------------------------- reward ranking

RAGGED = torch.tensor([[2, 1, 0.5, -1], [0.3, 1.4, -0.2, 0]], dtype=torch.float64)  # the second prompt has 3 responses
RANKS = torch.tensor([[1, 2, 3, 4], [2, 1, 3, 0]])


def sigmoid_loss(x: float) -> float:
    return log(1 + exp(-x))


def test_reward_ranking_weighs_all_pairs_of_a_prompt():
    """The golden value over C(4, 2) pairs, and three pairs by hand where a response is missing."""
    ours = losses.reward_ranking(RAGGED, RANKS)
    assert ours[0].item() == pytest.approx(0.227613, abs=6e-7)
    assert ours[1].item() == pytest.approx((sigmoid_loss(1.1) + sigmoid_loss(0.5) + sigmoid_loss(1.6)) / 3, abs=1e-14)
    garbage = RAGGED.clone()
    garbage[1, 3] = 1e4
    torch.testing.assert_close(
        losses.reward_ranking(garbage, RANKS, centring=0.1)[1], losses.reward_ranking(RAGGED, RANKS, centring=0.1)[1]
    )


def test_reward_ranking_skips_tied_pairs_and_keeps_the_weight():
    rewards = f64(0.7, -0.4, 1.2)[None]
    want = (sigmoid_loss(0.7 - 1.2) + sigmoid_loss(-0.4 - 1.2)) / 3  # the first two are tied, the third is worst
    assert losses.reward_ranking(rewards, torch.tensor([[1, 1, 2]])).item() == pytest.approx(want, abs=1e-14)
    assert losses.reward_ranking(rewards, torch.tensor([[1, 1, 1]])).item() == 0
    assert losses.reward_ranking(rewards, torch.tensor([[1, 0, 0]])).item() == 0  # one response has no pair


def test_reward_ranking_with_margin_and_centring():
    """2 against 0.5 with a margin of 0.5, and 0.01 times the squared sum: the golden value."""
    ours = losses.reward_ranking(f64(2, 0.5)[None], torch.tensor([[1, 2]]), f64(0.5), 0.01)
    assert ours.item() == pytest.approx(0.375762, abs=6e-7)
    with pytest.raises(BadInput, match="centring must be at least 0"):
        losses.reward_ranking(f64(2, 0.5)[None], torch.tensor([[1, 2]]), centring=-1.0)


def test_best_of_k():
    assert losses.best_of_k(RAGGED, RANKS)[0].item() == pytest.approx(0.495182, abs=6e-7)
    by_hand = log(exp(0.3) + exp(1.4) + exp(-0.2)) - 1.4
    assert losses.best_of_k(RAGGED, RANKS)[1].item() == pytest.approx(by_hand, abs=1e-14)
    tied = losses.best_of_k(f64(1, 2, 3)[None], torch.tensor([[1, 1, 2]])).item()
    assert tied == pytest.approx(log(exp(1) + exp(2) + exp(3)) - 1.5, abs=1e-14)
    few = losses.best_of_k(f64(2, 1, 0)[None], torch.tensor([[10, 20, 0]])).item()  # two of a longer ranking
    assert few == pytest.approx(sigmoid_loss(1), abs=1e-14)
    equal = torch.zeros(1, 9, dtype=torch.float64)
    assert losses.best_of_k(equal, best_first(equal)).item() == pytest.approx(log(9), abs=1e-14)


def test_the_three_reward_losses_are_one_at_two_responses():
    rewards = f64(0.4, 1.7)[None]
    for ranks in ([[1, 2]], [[2, 1]]):
        found = [loss(rewards, torch.tensor(ranks)) for loss in REWARD_LOSSES]
        want = sigmoid_loss((0.4 - 1.7) * (1 if ranks == [[1, 2]] else -1))
        assert [x.item() for x in found] == pytest.approx([want] * 3, abs=1e-14)


REWARD_LOSSES = [losses.reward_ranking, losses.plackett_luce, losses.best_of_k]


@pytest.mark.parametrize("loss", REWARD_LOSSES)
def test_gradients_of_reward_losses(loss):
    """Exact, 0 for a missing response, and finite at rewards far apart; they add up to 0 over a prompt."""
    rewards = RAGGED.clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: loss(x, RANKS), (rewards,))
    loss(rewards, RANKS).sum().backward()
    assert rewards.grad[1, 3].item() == 0
    assert rewards.grad.sum(1).abs().max().item() < 1e-15
    far = torch.tensor([[1e4, -1e4, 0.0, 3.0], [-1e4, 0.0, 1e4, 0.0]], requires_grad=True)
    loss(far, RANKS).sum().backward()
    assert far.grad.isfinite().all()


def test_nine_responses_weigh_as_much_as_two():
    """At equal rewards, without ties, the loss of a prompt is ln 2 whatever its k."""
    for k in (2, 4, 9):
        equal = torch.zeros(1, k, dtype=torch.float64)
        assert losses.reward_ranking(equal, best_first(equal)).item() == pytest.approx(log(2), abs=1e-14)


def test_implicit_rewards():
    D = f64(-2, -0.5, 0, 1)
    expected = {
        "reverse_kl": D.tolist(),
        "forward_kl": [1 - exp(-d) for d in D.tolist()],
        "js": [log(2 * exp(d) / (1 + exp(d))) for d in D.tolist()],
        "alpha": [2 - 2 * exp(-d / 2) for d in D.tolist()],
        "chi_po": [exp(d) - 1 + d for d in D.tolist()],
    }
    for divergence in DIVERGENCES:
        got = losses.implicit_reward(D - 7, torch.full_like(D, -7), divergence)
        torch.testing.assert_close(got, f64(*expected[divergence]), rtol=1e-13, atol=1e-15)
    got = losses.implicit_reward(D, torch.zeros_like(D), "alpha", 0.0)
    torch.testing.assert_close(got, f64(*expected["forward_kl"]), rtol=1e-13, atol=0)
    got = losses.implicit_reward(D, torch.zeros_like(D), "alpha", 1 - 1e-9)
    torch.testing.assert_close(got, D, rtol=1e-8, atol=0)


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_implicit_rewards_have_slope_f_second(divergence):
    # d f'(u) / dD = u f''(u): 1 at u = 1 where f is scaled as KL is; 1/2 for JS, 2 for chi-PO
    policy = f64(-5).requires_grad_()
    losses.implicit_reward(policy, f64(-5), divergence).sum().backward()
    assert policy.grad.item() == pytest.approx({"js": 0.5, "chi_po": 2}.get(divergence, 1), abs=1e-15)


@pytest.mark.parametrize("divergence, D", [("forward_kl", -30.0), ("alpha", -60.0), ("chi_po", 30.0)])
def test_implicit_reward_holds_the_exponential(divergence, D):
    policy = f64(D).requires_grad_()
    reward = losses.implicit_reward(policy, f64(0), divergence)
    reward.sum().backward()
    held = {"forward_kl": 1 - exp(20), "alpha": 2 - 2 * exp(20), "chi_po": exp(20) - 1 + 30}[divergence]
    assert reward.item() == pytest.approx(held, rel=1e-14)
    assert policy.grad.item() == (1 if divergence == "chi_po" else 0)


AT_ZERO = {
    **dict.fromkeys(("dpo", "conservative", "robust", "dpo_norm", "dpop", "plackett_luce"), LN2),
    **dict.fromkeys(("forward_kl", "js", "alpha", "chi_po"), LN2),
    **dict.fromkeys(("ipo", "ipo_norm"), 25.0),
    **dict.fromkeys(("hinge", "apo_zero", "apo_down"), 1.0),
    **dict.fromkeys(("nca", "bco"), 2 * LN2),
    "exo": -log(4 * E * (1 - E)) / 2,
    "sppo": 50.0,
    "discopop": (LN2 + 1) / 2,
    "bco_delta": log(1 + exp(0.2)) + log(1 + exp(-0.2)),
    "kto": 1.0,  # s(beta z0) + s(-beta z0)
}


@every(AT_ZERO)
def test_value_where_the_policy_is_the_reference(name):
    at_reference = replace(PAIRS, chosen=PAIRS.ref_chosen, rejected=PAIRS.ref_rejected)
    torch.testing.assert_close(LOSSES[name](at_reference), f64(AT_ZERO[name]).expand(2), rtol=1e-14, atol=0)


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1, 0.49])
def test_ln_2_at_zero_for_every_label_smoothing(label_smoothing):
    for loss in (losses.dpo, losses.robust):
        assert loss(f64(3), f64(3), BETA, label_smoothing).item() == pytest.approx(LN2, abs=1e-13)


# ---- gradients and numerics


@every(LOSSES)
def test_gradcheck(name):
    chosen, rejected = PAIRS.chosen.clone().requires_grad_(), PAIRS.rejected.clone().requires_grad_()
    assert torch.autograd.gradcheck(
        lambda c, r: LOSSES[name](replace(PAIRS, chosen=c, rejected=r)), (chosen, rejected), atol=1e-8, rtol=1e-6
    )


def test_gradcheck_plackett_luce_of_many():
    rewards = f64(0.3, 1.2, -0.7, 0.1, 2.2, 2.2, -1.0, 0.5).reshape(2, 4).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: losses.plackett_luce(x, best_first(x)), (rewards,))


def test_gradcheck_orpo_near_certainty():
    lengths = torch.tensor([2, 3])
    certain = f64(-1e-2, -3e-2).requires_grad_()
    unsure = f64(-4, -0.5).requires_grad_()
    for chosen, rejected in ((certain, unsure), (unsure, certain)):
        assert torch.autograd.gradcheck(
            lambda c, r: losses.orpo(c, r, lengths, lengths, 0.5), (chosen, rejected), eps=1e-7, rtol=1e-5
        )


def test_orpo_log_odds_keep_their_digits_near_certainty():
    # a = -1e-9: odds exp(a) / (1 - exp(a)) = 1e9 (1 - 5e-10); subtracting exp(a) from 1 would lose 7 digits of 16
    a = f64(-1e-9).requires_grad_()
    odds = losses._log_odds(a)
    odds.sum().backward()
    assert odds.item() == pytest.approx(9 * log(10) - 5e-10, abs=1e-14)
    assert a.grad.item() == pytest.approx(1e9 + 0.5, rel=1e-14)


@pytest.mark.parametrize("dtype, eps", [(torch.float64, 2.0**-52), (torch.float32, 2.0**-23)])
def test_orpo_log_odds_of_a_certain_response_are_those_of_eps(dtype, eps):
    """exp(a) / (1 - exp(a)) at a = -eps is 1 / eps - 1/2: 36.04 and 15.94 nats, and no gradient."""
    a = torch.zeros(1, dtype=dtype, requires_grad=True)
    odds = losses._log_odds(a)
    odds.sum().backward()
    assert odds.item() == pytest.approx(log(1 / eps), rel=1e-6) and a.grad.item() == 0


@every(LOSSES)
def test_per_example(name):
    """One loss for each pair, which no other pair touches, in the dtype of its inputs."""
    loss = LOSSES[name](PAIRS)
    alone = [LOSSES[name](Pairs(*(x[i : i + 1] for x in vars(PAIRS).values()))) for i in range(2)]
    assert loss.shape == (2,) and loss.dtype == torch.float64
    assert torch.equal(loss, torch.cat(alone))
    single = LOSSES[name](Pairs(*(x.float() if x.is_floating_point() else x for x in vars(PAIRS).values())))
    assert single.dtype == torch.float32
    torch.testing.assert_close(single.double(), loss, rtol=2e-6, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@every(LOSSES)
def test_extreme_inputs_stay_finite(name, dtype):
    logps = [0.0, -1e-30, -1e-6, -25.0, -1e4]
    grid = torch.tensor(list(itertools.product(logps, repeat=4)), dtype=dtype)
    lengths = torch.ones(len(grid), dtype=torch.long)
    chosen, rejected = grid[:, 0].clone().requires_grad_(), grid[:, 1].clone().requires_grad_()
    for beta in (0.01, 1.0, 10.0):
        chosen.grad = rejected.grad = None
        loss = LOSSES[name](Pairs(chosen, rejected, grid[:, 2], grid[:, 3], lengths, lengths), beta)
        (loss + 0 * (chosen + rejected)).sum().backward()
        assert loss.isfinite().all() and chosen.grad.isfinite().all() and rejected.grad.isfinite().all()


# ---- what a swap, a shift and a change of units do

# loss(w, l) - loss(l, w), from z = beta h, the rewards and the lengths
SWAP = {
    "dpo": lambda q, z: -z,
    "conservative": lambda q, z: -(1 - 2 * E) * z,
    "robust": lambda q, z: -z / (1 - 2 * E),
    "plackett_luce": lambda q, z: -z,
    "hinge": lambda q, z: -2 * z,  # |z| < 1 here
    "ipo": lambda q, z: -2 * z / BETA**2,
    "sppo": lambda q, z: -2 * z / BETA**2,
    "ipo_norm": lambda q, z: -2 / BETA * norm_margin(q),
    "dpo_norm": lambda q, z: -BETA * norm_margin(q),
    "r_dpo": lambda q, z: -z - 0.01 * (q.chosen_lengths - q.rejected_lengths),
    "exo": lambda q, z: -(z / 2).tanh() * log((1 - E) / E),
    "bco": lambda q, z: -z,
    "bco_delta": lambda q, z: -z,
    "apo_zero": lambda q, z: 2 * (reward(q)[1].sigmoid() - reward(q)[0].sigmoid()),
    "apo_down": lambda q, z: reward(q)[0].sigmoid() - reward(q)[1].sigmoid() - (z / 2).tanh(),
    "nca": lambda q, z: F.logsigmoid(reward(q)[1]) - F.logsigmoid(reward(q)[0]),
    "forward_kl": lambda q, z: -BETA * ((-q.ratios()[1]).exp() - (-q.ratios()[0]).exp()),
    "js": lambda q, z: -BETA * (F.logsigmoid(q.ratios()[0]) - F.logsigmoid(q.ratios()[1])),
    "alpha": lambda q, z: -2 * BETA * ((-q.ratios()[1] / 2).exp() - (-q.ratios()[0] / 2).exp()),
    "chi_po": lambda q, z: -z - BETA * (q.ratios()[0].exp() - q.ratios()[1].exp()),
}


def reward(q: Pairs) -> tuple[Tensor, Tensor]:
    return BETA * (q.chosen - q.ref_chosen), BETA * (q.rejected - q.ref_rejected)


def norm_margin(q: Pairs) -> Tensor:
    return (q.chosen - q.ref_chosen) / q.chosen_lengths - (q.rejected - q.ref_rejected) / q.rejected_lengths


@every(SWAP)
def test_swap(name):
    z = reward(PAIRS)[0] - reward(PAIRS)[1]
    difference = LOSSES[name](PAIRS) - LOSSES[name](PAIRS.swapped())
    torch.testing.assert_close(difference, SWAP[name](PAIRS, z), rtol=1e-12, atol=1e-14)


SHIFT_BLIND = {"dpo", "conservative", "robust", "hinge", "ipo", "r_dpo", "exo", "discopop", "plackett_luce"}
BLIND_PER_TOKEN = {"dpo_norm", "ipo_norm", "simpo"}


@every(LOSSES)
def test_shift(name):
    """Losses of the margin alone do not see both log-probabilities rise together; the others anchor them."""
    shifted = LOSSES[name](PAIRS.moved(7, 7))
    if name in SHIFT_BLIND:
        torch.testing.assert_close(shifted, LOSSES[name](PAIRS), rtol=1e-13, atol=0)
    else:
        assert (shifted - LOSSES[name](PAIRS)).abs().max() > 1e-3


@every(BLIND_PER_TOKEN)
def test_shift_per_token(name):
    shifted = LOSSES[name](PAIRS.moved(*(0.7 * n.double() for n in PAIRS.lengths)))
    torch.testing.assert_close(shifted, LOSSES[name](PAIRS), rtol=1e-13, atol=0)


SCALE_FREE = SHIFT_BLIND | BLIND_PER_TOKEN | {"dpop", "nca", "apo_zero", "apo_down", "bco", "bco_delta", "sppo", "kto"}


@every(SCALE_FREE)
def test_scale(name):
    """Nats are a unit: beta times c with log-probabilities over c changes nothing, but for nats^2 in ipo and sppo."""
    c, settings = 3.7, {}
    scaled = Pairs(*(x / c if x.is_floating_point() else x for x in vars(PAIRS).values()))
    if name == "kto":
        settings["z0"] = 0.5 / c
    if name == "simpo":
        got = losses.simpo(scaled.chosen, scaled.rejected, *scaled.lengths, 2 * c, 0.5 / c)
    else:
        got = LOSSES[name](scaled, BETA * c, **settings)
    nats = c**-2 if name in {"ipo", "ipo_norm", "sppo"} else 1
    torch.testing.assert_close(got, LOSSES[name](PAIRS) * nats, rtol=1e-12, atol=0)


# ---- closed forms

H = torch.linspace(-40, 40, 17, dtype=torch.float64)


def slope(loss: Callable[[Tensor], Tensor], at: Tensor) -> Tensor:
    at = at.clone().requires_grad_()
    return torch.autograd.grad(loss(at).sum(), at)[0]


def margin_loss(loss: Callable[..., Tensor], *settings: float) -> Callable[[Tensor], Tensor]:
    return lambda h: loss(h, torch.zeros_like(h), *settings)


@pytest.mark.parametrize(
    "loss, expected",
    [
        (margin_loss(losses.dpo, BETA), lambda z: -BETA * (-z).sigmoid()),
        (margin_loss(losses.dpo, BETA, E), lambda z: -BETA * (1 - E - z.sigmoid())),
        (margin_loss(losses.robust, BETA, E), lambda z: -BETA * ((-z).sigmoid() + E / (1 - 2 * E))),
        (margin_loss(losses.ipo, BETA), lambda z: 2 * (z / BETA - 1 / (2 * BETA))),
        (margin_loss(losses.hinge, BETA), lambda z: -BETA * (z < 1).double()),
        (margin_loss(losses.exo, BETA, E), lambda z: BETA * z.sigmoid() * (-z).sigmoid() * (z - log((1 - E) / E))),
    ],
    ids=["dpo", "conservative", "robust", "ipo", "hinge", "exo"],
)
def test_gradient_in_the_margin(loss, expected):
    h = H[H != 10]  # the hinge's kink
    torch.testing.assert_close(slope(loss, h), expected(BETA * h), rtol=1e-9, atol=1e-13)


def test_dpo_at_the_start_weighs_a_pair_by_one_half():
    assert slope(margin_loss(losses.dpo, BETA), f64(0)).item() == -BETA / 2


def test_conservative_dpo_is_cross_entropy_with_a_soft_label():
    expected = F.binary_cross_entropy_with_logits(BETA * H, torch.full_like(H, 1 - E), reduction="none")
    torch.testing.assert_close(losses.dpo(H, torch.zeros_like(H), BETA, E), expected)


def test_robust_is_unbiased_under_flipped_labels():
    zero = torch.zeros_like(H)
    mean = (1 - E) * losses.robust(H, zero, BETA, E) + E * losses.robust(zero, H, BETA, E)
    torch.testing.assert_close(mean, losses.dpo(H, zero, BETA), rtol=1e-12, atol=1e-14)


def test_exo_is_the_divergence_from_the_soft_label():
    q = torch.stack([(BETA * H).sigmoid(), (-BETA * H).sigmoid()], dim=1)
    expected = (q * (q / f64(1 - E, E)).log()).sum(1)
    torch.testing.assert_close(losses.exo(H, torch.zeros_like(H), BETA, E), expected, rtol=1e-9, atol=1e-12)


ANCHOR = log((1 - E) / E) / BETA  # beta h at which s(beta h) = 1 - e
MINIMA = {  # loss of one number, where it is least, how much it is there
    "conservative": (margin_loss(losses.dpo, BETA, E), ANCHOR, -(1 - E) * log(1 - E) - E * log(E)),
    "exo": (margin_loss(losses.exo, BETA, E), ANCHOR, 0.0),
    "ipo": (margin_loss(losses.ipo, BETA), 1 / (2 * BETA), 0.0),
    "nca, chosen": (lambda w: losses.nca(w, torch.full_like(w, -1e4), BETA), LN2 / BETA, log(27 / 4) / 2),
    "sppo, chosen": (lambda w: losses.sppo(w, torch.full_like(w, -5.0), BETA), 1 / (2 * BETA), 0.0),
    "sppo, rejected": (lambda r: losses.sppo(torch.full_like(r, 5.0), r, BETA), -1 / (2 * BETA), 0.0),
}


@every(MINIMA)
def test_finite_optimum(name):
    loss, where, least = MINIMA[name]
    assert loss(f64(where)).item() == pytest.approx(least, abs=1e-14)
    below, at, above = slope(loss, f64(where - 1, where, where + 1)).tolist()
    assert below < 0 < above and at == pytest.approx(0, abs=1e-14)


@pytest.mark.parametrize("beta", [0.05, 1.0, 4.0])
def test_plackett_luce_of_two_is_dpo(beta):
    rewards = beta * torch.stack([H, H.flip(0) / 3], dim=1)
    torch.testing.assert_close(
        losses.plackett_luce(rewards, best_first(rewards)), losses.dpo(H, H.flip(0) / 3, beta), rtol=1e-9, atol=1e-14
    )


def test_special_cases_are_dpo():
    chosen, rejected = PAIRS.ratios()
    dpo = losses.dpo(chosen, rejected, BETA)
    for other in (
        losses.robust(chosen, rejected, BETA, 0.0),
        losses.dpop(chosen, rejected, BETA, dpop_lambda=0.0),
        losses.r_dpo(chosen, rejected, *PAIRS.lengths, BETA, length_penalty=0.0),
        losses.dpo_nll(chosen, rejected, PAIRS.chosen, PAIRS.chosen_lengths, BETA, nll_coef=0.0),
        losses.dpo_norm(chosen, rejected, *torch.ones(2, 2, dtype=torch.long), BETA),
        losses.dpo(chosen, rejected, BETA, clip=100.0),
    ):
        torch.testing.assert_close(other, dpo, rtol=1e-14, atol=0)


def test_dpop_pulls_the_chosen_response_back_only_below_the_reference():
    at = f64(-1, 1)
    got = slope(lambda w: losses.dpop(w, torch.zeros_like(w), BETA, dpop_lambda=5.0), at)
    # D_w = -1: z = 0.1 (-1 - 5) with slope 0.1 (1 + 5); D_w = 1: plain DPO
    torch.testing.assert_close(got, f64(-0.6 / (1 + exp(-0.6)), -0.1 / (1 + exp(0.1))), rtol=1e-13, atol=0)


# ---- KTO


def test_kto_of_ragged_labels_and_weights():
    D = f64(1, -0.5, 2, -3)
    labels = torch.tensor([True, False, False, True])
    got = losses.kto(D, labels, torch.tensor(0.5, dtype=torch.float64), BETA, 1.5, 0.75)
    # weight (1 - s(beta (D - z0))) where desirable, weight (1 - s(beta (z0 - D))) where not
    by_hand = [
        1.5 * (1 - 1 / (1 + exp(-0.05))),
        0.75 * (1 - 1 / (1 + exp(-0.1))),
        0.75 * (1 - 1 / (1 + exp(0.15))),
        1.5 * (1 - 1 / (1 + exp(0.35))),
    ]
    torch.testing.assert_close(got, f64(*by_hand), rtol=1e-13, atol=0)


@pytest.mark.parametrize("D, z0", [((2.0, -0.5, 3.0), 1.5), ((-2.0, 0.5, -3.0), 0.0)])
def test_kto_z0_is_the_mean_held_at_zero_without_gradient(D, z0):
    mismatched = f64(*D).requires_grad_()
    got = losses.kto_z0(mismatched)
    assert got.item() == z0 and got.shape == () and not got.requires_grad


def test_kto_gives_z0_no_gradient():
    D, z0 = f64(1, -1).requires_grad_(), torch.tensor(0.5, dtype=torch.float64, requires_grad=True)
    losses.kto(D, torch.tensor([True, False]), z0, BETA).sum().backward()
    assert z0.grad is None
    # weight beta s(g) s(-g) with g = beta (D - z0), down in D where desirable and up where not
    s = [1 / (1 + exp(-0.05)), 1 / (1 + exp(0.15))]
    by_hand = f64(-BETA * s[0] * (1 - s[0]), BETA * s[1] * (1 - s[1]))
    torch.testing.assert_close(D.grad, by_hand, rtol=1e-13, atol=0)


# ---- impossible settings

ONE, N = f64(1), torch.tensor([3])
LABEL, Z0 = torch.tensor([True]), torch.tensor(0.0, dtype=torch.float64)
WITH_BETA = {
    "dpo": lambda b: losses.dpo(ONE, ONE, b),
    "robust": lambda b: losses.robust(ONE, ONE, b, E),
    "ipo": lambda b: losses.ipo(ONE, ONE, b),
    "ipo_norm": lambda b: losses.ipo_norm(ONE, ONE, N, N, b),
    "hinge": lambda b: losses.hinge(ONE, ONE, b),
    "dpo_norm": lambda b: losses.dpo_norm(ONE, ONE, N, N, b),
    "r_dpo": lambda b: losses.r_dpo(ONE, ONE, N, N, b, 0.1),
    "dpop": lambda b: losses.dpop(ONE, ONE, b, 5.0),
    "dpo_nll": lambda b: losses.dpo_nll(ONE, ONE, ONE, N, b, 1.0),
    "exo": lambda b: losses.exo(ONE, ONE, b, E),
    "nca": lambda b: losses.nca(ONE, ONE, b),
    "apo_zero": lambda b: losses.apo_zero(ONE, ONE, b),
    "apo_down": lambda b: losses.apo_down(ONE, ONE, b),
    "bco": lambda b: losses.bco(ONE, ONE, b),
    "sppo": lambda b: losses.sppo(ONE, ONE, b),
    "discopop": lambda b: losses.discopop(ONE, ONE, b, 0.05),
    "simpo": lambda b: losses.simpo(ONE, ONE, N, N, b, 0.5),
    "kto": lambda b: losses.kto(ONE, LABEL, Z0, b),
}


@pytest.mark.parametrize("beta", [0.0, -0.1, math.inf, math.nan])
@every(WITH_BETA)
def test_beta_must_be_above_zero(name, beta):
    with pytest.raises(BadInput, match=rf"^beta must be above 0 and finite, not {beta}$"):
        WITH_BETA[name](beta)


@pytest.mark.parametrize(
    "message, call",
    [
        (r"label_smoothing must be in \[0, 0.5\), not 0.5", lambda: losses.dpo(ONE, ONE, BETA, 0.5)),
        (r"label_smoothing must be in \[0, 0.5\), not -0.1", lambda: losses.dpo(ONE, ONE, BETA, -0.1)),
        (r"label_smoothing must be in \[0, 0.5\), not 0.5", lambda: losses.robust(ONE, ONE, BETA, 0.5)),
        (r"label_smoothing must be in \[0, 0.5\), not 0.7", lambda: losses.exo(ONE, ONE, BETA, 0.7)),
        ("label_smoothing must be above 0 for exo", lambda: losses.exo(ONE, ONE, BETA, 0.0)),
        ("clip must be above 0", lambda: losses.dpo(ONE, ONE, BETA, clip=0.0)),
        ("dpop_lambda must be at least 0", lambda: losses.dpop(ONE, ONE, BETA, -1.0)),
        ("orpo_lambda must be at least 0", lambda: losses.orpo(ONE, ONE, N, N, -1.0)),
        ("length_penalty must be at least 0", lambda: losses.r_dpo(ONE, ONE, N, N, BETA, -0.1)),
        ("nll_coef must be at least 0", lambda: losses.dpo_nll(ONE, ONE, ONE, N, BETA, -1.0)),
        ("delta must be finite", lambda: losses.bco(ONE, ONE, BETA, math.nan)),
        (r"discopop_tau must be in \(0, 1\]", lambda: losses.discopop(ONE, ONE, BETA, 0.0)),
        (r"discopop_tau must be in \(0, 1\]", lambda: losses.discopop(ONE, ONE, BETA, 2.0)),
        ("gamma_beta_ratio must be at least 0", lambda: losses.simpo(ONE, ONE, N, N, BETA, -0.5)),
        ("desirable_weight must be", lambda: losses.kto(ONE, LABEL, Z0, BETA, desirable_weight=-1.0)),
        ("undesirable_weight must be", lambda: losses.kto(ONE, LABEL, Z0, BETA, undesirable_weight=math.inf)),
        (
            "divergence_alpha must be at least 0 and finite, and not 1",
            lambda: losses.implicit_reward(ONE, ONE, "alpha", 1.0),
        ),
        ("divergence_alpha must be at least 0", lambda: losses.implicit_reward(ONE, ONE, "alpha", -0.5)),
        ("divergence must be reverse_kl, .* not kl", lambda: losses.implicit_reward(ONE, ONE, "kl")),
    ],
)
def test_impossible_settings(message, call):
    with pytest.raises(BadInput, match=f"^{message}") as error:
        call()
    assert isinstance(error.value, ValueError) and "\n" not in str(error.value)
