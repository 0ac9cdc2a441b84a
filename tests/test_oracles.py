"""The losses against exact optima: whole populations on the enumerable world, nothing is sampled.

Where the minimum over a population has a closed form, the gradient must vanish there and not elsewhere, and training
from the reference must arrive there. A loss that is right on every single pair, but at the wrong scale, sign or
length, ends somewhere else.
"""

import itertools
import math
from functools import partial

import pytest
import torch
from enumerable import (
    EOS,
    VOCAB,
    bradley_terry,
    everything,
    kl,
    log_partition,
    next_token_states,
    objective,
    optimal_policy,
    ordered_pairs,
    prefixes,
    random_policy,
    random_rewards,
    random_transformer,
    sequences,
    transformer_logps,
)
from tiny import example, no_float32

from rlhf import losses
from rlhf.logprobs import token_logps
from rlhf.tree import collate
from support.models import output_head
from support.scoring import response_logps

SIZE = 400  # sequences at length 3
BETA = 0.4
DPO = partial(losses.dpo, beta=BETA)


@pytest.fixture(scope="module")
def world():
    """(log pi_ref, r) at length 3; r / BETA has standard deviation 1, so pi* is about half a nat from pi_ref."""
    return random_policy(SIZE, seed=1), random_rewards(SIZE, seed=2, spread=BETA)


def population(loss, ref_logps, preferred, weights=None, reward=losses.implicit_reward):
    """The function log pi -> mean of loss(D_w, D_l) over all pairs, each in both directions.

    preferred[i, j] is the probability of the label "i over j"; weights[i, j] says how often such pairs are drawn.
    """
    chosen, rejected = ordered_pairs(len(ref_logps))
    weight = (preferred if weights is None else preferred * weights)[chosen, rejected]
    weight = weight / weight.sum()

    def mean(logps):
        D = reward(logps, ref_logps)
        return (weight * loss(D[chosen], D[rejected])).sum()

    return mean


def flipped(preferred, e):
    """Label probabilities when every label is turned round with probability e."""
    return (1 - e) * preferred + e * (1 - preferred)


def logit(p):
    return math.log(p / (1 - p))


def slope(mean, logps):
    """Largest derivative of mean(log pi) by a logit of pi, times the number of logits, as they share the mean."""
    logits = logps.detach().clone().requires_grad_()
    mean(logits.log_softmax(0)).backward()
    return logits.grad.abs().max().item() * len(logps)


def trained(mean, ref_logps):
    """log pi at the minimum of mean(log pi): full-batch quasi-Newton steps on logits, from the reference."""
    logits = ref_logps.clone().requires_grad_()
    optimizer = torch.optim.LBFGS(
        [logits], max_iter=300, tolerance_grad=1e-12, tolerance_change=0, line_search_fn="strong_wolfe"
    )

    def closure():
        optimizer.zero_grad()
        value = mean(logits.log_softmax(0))
        value.backward()
        return value

    optimizer.step(closure)
    return logits.detach().log_softmax(0)


def scored(model, responses, layout):
    """Log-probs of an example's responses as the scripts get them, but at the full precision of the model."""
    with no_float32():
        return response_logps(model, collate([responses], layout, EOS))[1]


# --- the world itself, and the log-probs in it


def test_sequences():
    """Each possible sequence once: EOS at the end only, and only full ones without it."""
    assert [len(sequences(n)) for n in (1, 2, 3, 5)] == [8, 57, 400, 19608]
    assert len({tuple(s) for s in sequences(3)}) == 400
    for s in sequences(3):
        assert 1 <= len(s) <= 3 and set(s) <= set(range(VOCAB))
        assert EOS not in s[:-1] and (len(s) == 3 or s[-1] == EOS)
    assert prefixes(2) == [[], [1], [2], [3], [4], [5], [6], [7]]


@pytest.mark.parametrize("layout", ["tree", "padded"])
def test_probabilities_of_all_sequences_sum_to_one(layout):
    """Sum over y of pi(y | prompt) = 1, and each log-prob is the one of the library's own logits.

    Wrong where EOS is counted twice or not at all, where the prompt is scored, and one place off.
    """
    model = random_transformer(seed=0)
    with torch.no_grad():
        logps = scored(model, everything(3), layout)
    assert logps.exp().sum().item() == pytest.approx(1, abs=1e-10)
    assert torch.allclose(logps, transformer_logps(model, 3), rtol=0, atol=1e-10)
    assert kl(torch.full_like(logps, -math.log(SIZE)), logps) > 1  # far from equally likely


LONG = [pytest.param(5, layout, marks=pytest.mark.slow) for layout in ("padded", "tree")]


@pytest.mark.parametrize("length,layout", [(4, "tree"), *LONG])
def test_sequence_kl_is_the_sum_of_expected_token_kl(length, layout):
    """KL(pi || ref) over all sequences = sum over prefixes of pi(prefix) KL(pi(.|prefix) || ref(.|prefix)).

    The chain rule of KL. At length 5 there are 19608 sequences, scored by `response_logps`, and 2801 prefixes, at whose
    hidden states, from plain rows, the kernel scores all 8 tokens.
    """
    complete, of_sequences, of_tokens = sequences(length), [], []
    for model in (random_transformer(seed=0), random_transformer(seed=1)):
        states = next_token_states(model, length)
        every_token = torch.arange(VOCAB).repeat(len(states))
        with torch.no_grad():
            scores, _ = token_logps(states.repeat_interleave(VOCAB, 0), output_head(model), every_token)
            parts = [example([EOS], complete[i : i + 5000]) for i in range(0, len(complete), 5000)]
            of_sequences.append(torch.cat([scored(model, part, layout) for part in parts]))
        of_tokens.append(scores.view(-1, VOCAB))

    policy, ref = of_tokens
    number = {tuple(p): i for i, p in enumerate(prefixes(length))}
    reach = torch.ones(len(number), dtype=torch.float64)
    for prefix, i in number.items():
        if prefix:
            parent = number[prefix[:-1]]
            reach[i] = reach[parent] * policy[parent, prefix[-1]].exp()
    assert (policy.exp().sum(1) - 1).abs().max() < 1e-12
    assert of_sequences[0].exp().sum().item() == pytest.approx(1, abs=1e-10)
    total = kl(*of_sequences).item()
    assert total > 0.5 and total == pytest.approx((reach * kl(policy, ref)).sum().item(), rel=1e-10)


def test_regret_is_beta_times_kl(world):
    """J(pi*) = beta log Z, and J(pi*) - J(pi) = beta KL(pi || pi*) for every pi. Rafailov et al. 2023, Eq. 3 and 4."""
    ref, rewards = world
    best = optimal_policy(ref, rewards, BETA)
    top = objective(best, ref, rewards, BETA)
    assert best.exp().sum().item() == pytest.approx(1, abs=1e-12)
    assert top.item() == pytest.approx(BETA * log_partition(ref, rewards, BETA).item(), abs=1e-12)
    for policy in (ref, *(random_policy(SIZE, seed, spread=2) for seed in range(3, 8))):
        regret = top - objective(policy, ref, rewards, BETA)
        assert regret > 0.1 and regret.item() == pytest.approx(BETA * kl(policy, best).item(), rel=1e-10)


# --- DPO


def test_dpo_reaches_the_optimal_policy(world):
    """With Bradley-Terry labels on all pairs DPO is least at pi* = pi_ref exp(r / beta) / Z.

    Rafailov et al. 2023, Eq. 4 and 7, arXiv 2305.18290. Trained with c beta instead: pi_ref exp(r / (c beta)) / Z.
    """
    ref, rewards = world
    best = optimal_policy(ref, rewards, BETA)
    assert min(kl(ref, best), kl(best, ref)) > 0.1
    mean = population(DPO, ref, bradley_terry(rewards))
    assert slope(mean, best) < 1e-12 and slope(mean, ref) > 1e-2
    assert kl(trained(mean, ref), best) < 1e-6
    for c in (0.5, 3):
        end = trained(population(partial(losses.dpo, beta=c * BETA), ref, bradley_terry(rewards)), ref)
        assert kl(end, optimal_policy(ref, rewards, c * BETA)) < 1e-6 and kl(end, best) > 0.1


def test_which_pairs_are_drawn_does_not_move_the_optimum_of_dpo(world):
    """Any symmetric weights that leave all sequences connected have the optimum pi*; weights on one label have not."""
    ref, rewards = world
    best, labels = optimal_policy(ref, rewards, BETA), bradley_terry(rewards)
    uneven = random_rewards(SIZE**2, seed=9).view(SIZE, SIZE).exp()
    assert slope(population(DPO, ref, labels, uneven + uneven.T), best) < 1e-12
    assert slope(population(DPO, ref, labels, uneven), best) > 1e-2


@pytest.mark.parametrize("layout", ["tree", "padded"])
def test_dpo_gives_a_transformer_no_gradient_where_it_is_optimal(layout):
    """Every pi is optimal for r = beta log(pi / pi_ref) (Rafailov et al. 2023, Eq. 5), where no weight has a gradient.

    r comes from the library's own logits, the gradient through collate, response_logps and dpo.
    """
    policy, ref = random_transformer(seed=0), transformer_logps(random_transformer(seed=1), 3)
    rewards = BETA * (transformer_logps(policy, 3) - ref)
    norms = []
    for r in (rewards, 2 * rewards):
        policy.zero_grad()
        population(DPO, ref, bradley_terry(r))(scored(policy, everything(3), layout)).backward()
        norms.append(torch.cat([w.grad.flatten() for w in policy.parameters()]).norm().item())
    assert norms[0] < 1e-12 and norms[1] > 1e-2


@pytest.mark.slow
def test_dpo_trains_a_transformer_to_the_optimal_policy():
    """A float32 transformer, scored as one prompt with 400 responses and trained from its reference, ends at pi*."""
    policy = random_transformer(seed=1, dtype=torch.float32)
    batch = collate([everything(3)], "padded", EOS)
    ref = response_logps(policy, batch)[1].detach()
    rewards = random_rewards(SIZE, seed=2, spread=BETA).float()
    best = optimal_policy(ref, rewards, BETA)
    assert min(kl(ref, best), kl(best, ref)) > 0.1

    mean = population(DPO, ref, bradley_terry(rewards))
    optimizer = torch.optim.Adam(policy.parameters(), lr=5e-3, betas=(0.9, 0.95))
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 200)
    for step in range(200):
        loss = mean(response_logps(policy, batch)[1])
        if step == 0:
            assert loss.item() == pytest.approx(math.log(2), abs=1e-6)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    assert kl(transformer_logps(policy, 3), best) < 1e-3
    with torch.no_grad():
        assert kl(scored(policy, everything(3), "tree"), best) < 1e-3


# --- IPO


@pytest.mark.parametrize("drawn", ["uniformly", "from the reference"])
def test_ipo_reaches_its_closed_form(world, drawn):
    """Both responses drawn from mu: log pi / pi_ref = p*(y > mu) / tau + constant; tau is `beta` of losses.ipo.

    p*(y > mu) is the probability that y is preferred to a draw from mu, to itself with 1/2. Azar et al. 2023, arXiv
    2310.12036.
    """
    ref, rewards = world
    mu = torch.full_like(ref, 1 / SIZE) if drawn == "uniformly" else ref.exp()
    tau, preferred = 0.1, bradley_terry(rewards)
    mean = population(partial(losses.ipo, beta=tau), ref, preferred, mu[:, None] * mu)
    best = (ref + preferred @ mu / tau).log_softmax(0)
    assert min(kl(ref, best), kl(best, ref)) > 0.1
    assert slope(mean, best) < 1e-12 and slope(mean, ref) > 1e-2
    assert kl(trained(mean, ref), best) < 1e-6


def test_ipo_on_unevenly_drawn_pairs_ends_elsewhere():
    """Pairs of like rewards drawn more often: not the closed form of uniform pairs, but a weighted least-squares fit.

    With symmetric weights w, the gradient of the mean of (D_i - D_j - 1 / (2 tau))^2 is zero where, for every i,
    sum over j of w_ij (D_i - D_j) = sum over j of w_ij (2 p_ij - 1) / (2 tau).
    """
    ref, rewards = random_policy(57, seed=1), random_rewards(57, seed=2, spread=2)
    tau, preferred = 0.5, bradley_terry(rewards)
    weights = (-(rewards[:, None] - rewards).abs()).exp().fill_diagonal_(0)
    laplacian = weights.sum(1).diag() - weights
    D = torch.linalg.pinv(laplacian) @ (weights * (2 * preferred - 1)).sum(1) / (2 * tau)
    fit, uniform = (ref + D).log_softmax(0), (ref + preferred.mean(1) / tau).log_softmax(0)
    mean = population(partial(losses.ipo, beta=tau), ref, preferred, weights)
    assert slope(mean, fit) < 1e-12 and slope(mean, uniform) > 1e-2
    end = trained(mean, ref)
    assert kl(end, fit) < 1e-6 and kl(end, uniform) > 1e-2


# --- labels that are turned round


@pytest.mark.parametrize("p", [0.7, 0.9])
def test_margins_of_two_responses_under_flipped_labels(p):
    """Where beta h ends when labels are right with probability p, and then flipped with e: right with q.

    DPO ends at logit(q), conservative DPO (Mitchell 2023) at the logit of q flipped once more, robust DPO (Chowdhury et
    al. 2024, arXiv 2403.00409) at logit(p), as without the flips.
    """
    e, ref = 0.2, random_policy(2, seed=0)
    clean = torch.tensor([[0.5, p], [1 - p, 0.5]], dtype=torch.float64)
    q = (1 - e) * p + e * (1 - p)

    def margin(loss, preferred):
        D = trained(population(loss, ref, preferred), ref) - ref
        return BETA * (D[0] - D[1]).item()

    conservative = partial(losses.dpo, beta=BETA, label_smoothing=e)
    robust = partial(losses.robust, beta=BETA, label_smoothing=e)
    assert margin(DPO, clean) == pytest.approx(logit(p), abs=1e-6)
    assert margin(DPO, flipped(clean, e)) == pytest.approx(logit(q), abs=1e-6)
    assert margin(conservative, flipped(clean, e)) == pytest.approx(logit((1 - e) * q + e * (1 - q)), abs=1e-6)
    assert margin(robust, flipped(clean, e)) == pytest.approx(logit(p), abs=1e-6)
    certain = torch.tensor([[0.5, 1], [0, 0.5]], dtype=torch.float64)
    assert margin(conservative, certain) == pytest.approx(math.log((1 - e) / e), abs=1e-6)


@pytest.mark.parametrize("e", [0.1, 0.3])
def test_robust_dpo_reaches_the_clean_optimum_from_flipped_labels(world, e):
    """Its mean over flipped labels is DPO's over the clean ones for every pi, so it ends at pi*; DPO stops short.

    Chowdhury et al. 2024, arXiv 2403.00409.
    """
    ref, rewards = world
    best, clean = optimal_policy(ref, rewards, BETA), bradley_terry(rewards)
    noisy = flipped(clean, e)
    robust = population(partial(losses.robust, beta=BETA, label_smoothing=e), ref, noisy)
    for policy in (ref, best, random_policy(SIZE, seed=3, spread=2)):
        assert robust(policy).item() == pytest.approx(population(DPO, ref, clean)(policy).item(), rel=1e-12)
    assert slope(robust, best) < 1e-12 and slope(robust, ref) > 1e-2
    assert kl(trained(robust, ref), best) < 1e-6

    plain = population(DPO, ref, noisy)
    assert slope(plain, best) > 1e-2
    assert 1e-2 < kl(trained(plain, ref), best) < kl(ref, best)


def test_conservative_dpo_reaches_the_reward_behind_its_smoothed_labels(world):
    """Labels p with (1 - e) p + e (1 - p) = sigmoid(r_i - r_j): it ends at the optimum of r, and DPO on p goes further.

    Mitchell 2023, Eq. 3. Such p exist where |r_i - r_j| < log((1 - e) / e).
    """
    ref, e = world[0], 0.1
    rewards = logit(1 - e) * random_rewards(SIZE, seed=4).sigmoid()
    labels = (bradley_terry(rewards) - e) / (1 - 2 * e)
    assert labels.min() > 0 and labels.max() < 1
    assert torch.allclose(flipped(labels, e), bradley_terry(rewards), rtol=0, atol=1e-15)
    best = optimal_policy(ref, rewards, BETA)
    conservative = population(partial(losses.dpo, beta=BETA, label_smoothing=e), ref, labels)
    assert slope(conservative, best) < 1e-12 and slope(conservative, ref) > 1e-2
    assert kl(trained(conservative, ref), best) < 1e-6

    plain = population(DPO, ref, labels)
    assert slope(plain, best) > 1e-2
    assert kl(trained(plain, ref), ref) > kl(best, ref) + 1e-2


# --- other divergences, rankings


def chi_po_ratio(c):
    """u with u - 1 + log u = c, by Newton's method on log u."""
    x = torch.zeros_like(c)
    for _ in range(100):
        x = x - (x.expm1() + x - c) / (x.exp() + 1)
    return x.exp()


# name: (f, whose divergence is the mean of f(u) under the reference, u = pi / pi_ref;
#        the inverse of f'(u) - f'(1), which is what `implicit_reward` must be; what that stays below)
DIVERGENCES = {
    "reverse_kl": (lambda u: u * u.log(), lambda c: c.exp(), math.inf),
    "forward_kl": (lambda u: -u.log(), lambda c: 1 / (1 - c), 1),
    "js": (lambda u: u * u.log() - (1 + u) * ((1 + u) / 2).log(), lambda c: c.exp() / (2 - c.exp()), math.log(2)),
    "alpha": (lambda u: 3 / 0.7 * u - u**0.3 / 0.21, lambda c: (1 - 0.7 * c) ** (-1 / 0.7), 1 / 0.7),
    "chi_po": (lambda u: (u - 1) ** 2 / 2 + u * u.log(), chi_po_ratio, math.inf),
}


@pytest.mark.parametrize("name", DIVERGENCES)
def test_dpo_with_another_divergence_reaches_its_optimal_policy(name):
    """The most E_pi[r] - beta D_f(pi || pi_ref) is where f'(pi / pi_ref) = (r - lam) / beta, and DPO ends there.

    lam, which makes pi sum to 1, by bisection; alpha is 0.3. Wang et al. 2023, arXiv 2309.16240; chi-PO: Huang et al.
    2024, arXiv 2407.13399.
    """
    f, ratio, limit = DIVERGENCES[name]
    ref, rewards = random_policy(57, seed=1), random_rewards(57, seed=2, spread=BETA)
    low, high = max(rewards.min(), rewards.max() - BETA * limit), rewards.max()
    for _ in range(200):
        lam = (low + high) / 2
        low, high = (lam, high) if ref.exp() @ ratio((rewards - lam) / BETA) > 1 else (low, lam)
    best = ref + ratio((rewards - lam) / BETA).log()
    assert best.exp().sum().item() == pytest.approx(1, abs=1e-12)
    assert min(kl(ref, best), kl(best, ref)) > 0.05

    regularised = lambda logps: logps.exp() @ rewards - BETA * (ref.exp() @ f((logps - ref).exp()))  # noqa: E731
    assert slope(regularised, best) < 1e-10 and slope(regularised, ref) > 1e-2
    reward = partial(losses.implicit_reward, divergence=name, divergence_alpha=0.3)
    mean = population(DPO, ref, bradley_terry(rewards), reward=reward)
    assert slope(mean, best) < 1e-12 and slope(mean, ref) > 1e-2
    end = trained(mean, ref)
    assert kl(end, best) < 1e-6
    assert name == "reverse_kl" or kl(end, optimal_policy(ref, rewards, BETA)) > 1e-2


@pytest.mark.parametrize("k", [2, 3, 4])
def test_plackett_luce_reaches_the_optimal_policy(k):
    """Rankings of k of 8 sequences with Plackett-Luce probabilities of r: the loss on beta D is least at pi*.

    Rafailov et al. 2023, appendix A.3, arXiv 2305.18290.
    """
    ref, rewards = random_policy(VOCAB, seed=1), random_rewards(VOCAB, seed=2, spread=BETA)
    rankings = torch.tensor([*itertools.permutations(range(VOCAB), k)])
    strength = rewards[rankings].exp()
    chance = torch.stack([strength[:, i] / strength[:, i:].sum(1) for i in range(k)]).prod(0)
    assert chance.sum().item() == pytest.approx(math.comb(VOCAB, k), rel=1e-12)

    best_first = torch.arange(1, k + 1).expand(rankings.shape)
    mean = lambda logps: (chance * losses.plackett_luce(BETA * (logps - ref)[rankings], best_first)).mean()  # noqa: E731
    best = optimal_policy(ref, rewards, BETA)
    assert min(kl(ref, best), kl(best, ref)) > 0.1
    assert mean(best).item() == pytest.approx(-(chance * chance.log()).mean().item(), rel=1e-12)  # at pi*, the entropy
    assert slope(mean, best) < 1e-12 and slope(mean, ref) > 1e-3
    assert kl(trained(mean, ref), best) < 1e-6
