"""PPO and its relatives against exact gradients and optima on the enumerable world.

A policy is a table of logits, a row for each prefix. Where a test speaks of a mean, all sequences are there, those that
were cut included, each with its probability or as often as the policy would sample it: nothing is estimated. Gradients
are of what is maximised, in float64.
"""

import itertools
import math

import pytest
import torch
from enumerable import (
    EOS,
    VOCAB,
    everything,
    kl,
    log_partition,
    objective,
    optimal_policy,
    prefixes,
    random_rewards,
    random_transformer,
    sequences,
    transformer_logps,
)
from tiny import example, no_float32
from torch import Tensor

import train_ppo
from rlhf.advantages import (
    drgrpo,
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
from rlhf.losses import cispo, ppo_clip, value_loss
from rlhf.tree import collate
from support.scoring import Batching, response_logps

BETA = 0.4


class Tokens:
    """Sequences laid flat: which they are, their lengths, and the prefix (its number) and token of each place."""

    def __init__(self, length: int, which: Tensor | None = None):
        complete, number = sequences(length), {tuple(p): i for i, p in enumerate(prefixes(length))}
        self.which = torch.arange(len(complete)) if which is None else which
        rows = [complete[i] for i in self.which.tolist()]
        self.lengths = torch.tensor([len(s) for s in rows])
        self.prefix = torch.tensor([number[tuple(s[:i])] for s in rows for i in range(len(s))])
        self.token = torch.tensor([token for s in rows for token in s])
        self.ended = torch.tensor([s[-1] == EOS for s in rows])

    def logps(self, table: Tensor) -> Tensor:
        return table.log_softmax(1)[self.prefix, self.token]

    def sums(self, per_token: Tensor) -> Tensor:
        sequence = torch.arange(len(self.lengths)).repeat_interleave(self.lengths)
        return torch.zeros(len(self.lengths), dtype=torch.float64).index_add(0, sequence, per_token)


class World:
    """All sequences, a policy, a reference and a reward, all random, and what can be written down about them."""

    def __init__(self, length: int = 3):
        self.all, self.states = Tokens(length), len(prefixes(length))
        table = lambda seed: random_rewards(self.states * VOCAB, seed).view(self.states, VOCAB)  # noqa: E731
        self.policy, self.ref = table(1), table(2)
        self.rewards = random_rewards(len(self.all.lengths), seed=3, spread=BETA)

    def sequence_logps(self, table: Tensor) -> Tensor:
        return self.all.sums(self.all.logps(table))

    def logratios(self, at: Tokens, table: Tensor) -> Tensor:
        return at.logps(table) - at.logps(self.ref)

    def token_kl(self, table: Tensor) -> Tensor:
        """KL(pi || ref) over the vocabulary, after each prefix."""
        return kl(table.log_softmax(1), self.ref.log_softmax(1))

    def gradient(self, table: Tensor, rewards: Tensor, beta: float = BETA) -> Tensor:
        """Of E[r] - beta KL(pi || ref), by differentiating the sum over all sequences."""
        table = table.clone().requires_grad_()
        ref = self.sequence_logps(self.ref)
        return torch.autograd.grad(objective(self.sequence_logps(table), ref, rewards, beta), table)[0]

    def ppo_gradient(self, table: Tensor, advantages: Tensor, weight: Tensor | None = None) -> Tensor:
        """Mean of the first update's gradient: ratio 1, summed over tokens (times weight), divided by sequences."""
        table = table.clone().requires_grad_()
        logps = self.all.logps(table)
        loss = self.all.sums(ppo_clip(logps, logps, advantages, 0.2))
        loss = loss if weight is None else loss * weight
        chance = self.sequence_logps(table).exp().detach()
        return torch.autograd.grad(-(chance * loss).sum(), table)[0]

    def values(self, table: Tensor, rewards: Tensor, soft: bool = False) -> Tensor:
        """What is to come after each prefix, penalties included, from the longest prefixes up: the policy's mean, or
        `soft`, the best there can be: beta log of the mean of exp(to come / beta) under the reference."""
        logp, ref = table.log_softmax(1), self.ref.log_softmax(1)
        after = torch.full((self.states, VOCAB), math.nan, dtype=torch.float64)
        last = self.all.lengths.cumsum(0) - 1
        after[self.all.prefix[last], self.all.token[last]] = rewards
        found = torch.full((self.states,), math.nan, dtype=torch.float64)
        places = {tuple(p): i for i, p in enumerate(prefixes(int(self.all.lengths.max())))}
        for prefix, i in reversed(places.items()):
            if soft:
                found[i] = BETA * (ref[i] + after[i] / BETA).logsumexp(0)
            else:
                found[i] = (logp[i].exp() * (after[i] - BETA * (logp[i] - ref[i]))).sum()
            if prefix:
                after[places[prefix[:-1]], prefix[-1]] = found[i]
        return found


def off(found: Tensor, wanted: Tensor) -> float:
    """|found - wanted| / |wanted|."""
    return ((found - wanted).norm() / wanted.norm()).item()


def cosine(a: Tensor, b: Tensor) -> float:
    return torch.cosine_similarity(a.flatten(), b.flatten(), 0).item()


@pytest.fixture(scope="module")
def world() -> World:
    return World()


# --- the first gradient of PPO


@pytest.mark.parametrize("critic", ["none", "random", "far off"])
@pytest.mark.parametrize("cut", ["as they are", "replace", "subtract"])
def test_ppo_gradient_is_exact(world, critic, cut):
    """k1 in the reward, gamma = lam = 1, any V, any rule for cut responses: that of E[r] - beta KL(pi || ref)."""
    at, table, rewards = world.all, world.policy, world.rewards
    assert at.ended.sum() == 57 and len(at.ended) == 400
    if cut != "as they are":
        rewards = missing_eos(rewards, at.ended, cut, 1.5 if cut == "subtract" else -1.0)
    scale = {"none": 0.0, "random": 1.0, "far off": 100.0}[critic]
    values = random_rewards(world.states, seed=7, spread=scale)[at.prefix]
    r = shape_rewards(kl_estimate(world.logratios(at, table), "k1"), rewards, at.lengths, BETA)
    found = world.ppo_gradient(table, gae(r, values, at.lengths, 1.0, 1.0)[0])
    exact = world.gradient(table, rewards)
    assert exact.norm() > 0.1 and off(found, exact) < 1e-11
    if cut != "as they are":
        assert off(found, world.gradient(table, world.rewards)) > 0.1


@pytest.mark.parametrize("lam", [0.0, 0.5, 0.95])
def test_ppo_gradient_with_the_true_critic_is_exact_for_any_lam(world, lam):
    """V as enumerated: exact. Negative controls: V = 0, a V that is off, and a mean over each sequence's tokens."""
    at, table = world.all, world.policy
    r = shape_rewards(world.logratios(at, table), world.rewards, at.lengths, BETA)
    true, exact = world.values(table, world.rewards), world.gradient(table, world.rewards)
    ours = objective(*map(world.sequence_logps, (table, world.ref)), world.rewards, BETA)
    assert true[0].item() == pytest.approx(ours.item(), abs=1e-13)

    def gradient(values, weight=None):
        return world.ppo_gradient(table, gae(r, values[at.prefix], at.lengths, 1.0, lam)[0], weight)

    assert off(gradient(true), exact) < 1e-12
    assert off(gradient(torch.zeros_like(true)), exact) > 0.01
    assert off(gradient(true + random_rewards(world.states, seed=7, spread=0.2)), exact) > 0.01
    per_sequence = gradient(true, 1 / at.lengths)
    assert off(per_sequence, exact) > 0.01 and cosine(per_sequence, exact) < 0.999


@pytest.mark.parametrize("layout", ["tree", "padded"])
def test_ppo_gradient_of_a_transformer_is_exact(layout):
    """The same for every weight of a model, scored by `response_logps` as one prompt with all sequences."""
    length = 2
    model, rewards = random_transformer(seed=0), random_rewards(57, seed=3, spread=BETA)
    ref = random_transformer(seed=1)
    of_ref, batch = transformer_logps(ref, length), collate([everything(length)], layout, EOS)
    weights = [*model.parameters()]
    with no_float32():
        logps, sums = response_logps(model, batch, keep_bytes=0)
        ref_logps = response_logps(ref, batch)[0]
        r = shape_rewards(kl_estimate(logps - ref_logps, "k1"), rewards, batch.lengths, BETA)
        values = random_rewards(len(prefixes(length)), seed=7)[Tokens(length).prefix]
        loss = ppo_clip(logps, logps, gae(r, values, batch.lengths, 1.0, 1.0)[0], 0.2)
        mean = -(sums.exp().detach() * sequence_sums(loss, batch.lengths)).sum()
        found = torch.autograd.grad(mean, weights, retain_graph=True)
        exact = torch.autograd.grad(objective(sums, of_ref, rewards, BETA), weights)
    flat = lambda grads: torch.cat([g.flatten() for g in grads])  # noqa: E731
    assert flat(exact).norm() > 1e-2 and off(flat(found), flat(exact)) < 1e-9


def test_rewards_of_a_sequence_add_up(world):
    """sum of r_t = R - beta log(pi / ref), so that their mean is J(pi), which pi* exceeds by beta KL(pi || pi*).

    Rafailov et al. 2023, Eq. 3 and 4, arXiv 2305.18290.
    """
    at, policy, ref = world.all, world.sequence_logps(world.policy), world.sequence_logps(world.ref)
    totals = sequence_sums(
        shape_rewards(world.logratios(at, world.policy), world.rewards, at.lengths, BETA), at.lengths
    )
    torch.testing.assert_close(totals, world.rewards - BETA * (policy - ref), rtol=1e-12, atol=1e-13)
    best = optimal_policy(ref, world.rewards, BETA)
    regret = BETA * log_partition(ref, world.rewards, BETA) - (policy.exp() * totals).sum()
    assert regret > 0.1 and regret.item() == pytest.approx(BETA * kl(policy, best).item(), rel=1e-10)


@pytest.mark.parametrize("lam", [0.0, 0.95, 1.0])
def test_nothing_is_left_to_learn_at_the_optimum(world, lam):
    """At pi*, with the soft values as critic, every token's advantage is 0, whatever was sampled; elsewhere it is not.

    V(s) = beta log sum over a of ref(a|s) exp(V(s, a) / beta); pi*(a|s) = ref(a|s) exp((V(s, a) - V(s)) / beta).
    """
    at, soft = world.all, world.values(world.policy, world.rewards, soft=True)
    assert soft[0].item() == pytest.approx(
        BETA * log_partition(world.sequence_logps(world.ref), world.rewards, BETA).item(), abs=1e-13
    )
    best = optimal_policy(world.sequence_logps(world.ref), world.rewards, BETA)
    by_token = torch.zeros_like(world.ref).index_put(
        (at.prefix, at.token), best.exp().repeat_interleave(at.lengths), True
    )
    table = by_token.log()
    torch.testing.assert_close(world.sequence_logps(table), best, rtol=1e-11, atol=1e-12)

    def largest(table):
        r = shape_rewards(world.logratios(at, table), world.rewards, at.lengths, BETA)
        return gae(r, soft[at.prefix], at.lengths, 1.0, lam)[0].abs().max().item()

    assert largest(table) < 1e-12 and largest(world.policy) > 0.1


# --- whitening


@pytest.fixture(scope="module")
def sample():
    """(world, policy, tokens): 4096 sequences, each as often as the policy has it; its probabilities are sixteenths."""
    world, g = World(), torch.Generator().manual_seed(0)
    more = torch.multinomial(torch.ones(world.states, VOCAB), 8, replacement=True, generator=g)
    counts = torch.ones(world.states, VOCAB).scatter_add(1, more, torch.ones(world.states, 8)).double()
    table = counts.log()
    times = (world.sequence_logps(table).exp() * 16**3).round().long()
    assert times.sum() == 4096 and times.min() >= 1
    return world, table, Tokens(3, torch.arange(400).repeat_interleave(times))


def batch_gradient(at: Tokens, table: Tensor, advantages: Tensor) -> Tensor:
    table = table.clone().requires_grad_()
    logps = at.logps(table)
    loss = ppo_clip(logps, logps.detach(), advantages, 0.2).sum() / len(at.lengths)
    return torch.autograd.grad(-loss, table)[0]


def test_whitened_advantages_keep_the_direction(sample):
    """Whitened over a whole population the gradient is the exact one over the deviation; so is that of REINFORCE++."""
    world, table, at = sample
    r = shape_rewards(world.logratios(at, table), world.rewards[at.which], at.lengths, BETA)
    exact = world.gradient(table, world.rewards)
    for values in (torch.zeros_like(r), random_rewards(world.states, seed=7)[at.prefix]):
        A, _ = gae(r, values, at.lengths, 1.0, 1.0)
        assert off(batch_gradient(at, table, A), exact) < 1e-11
        white = whiten(A)
        assert white.mean().abs() < 1e-12 and white.var(correction=0).item() == pytest.approx(1, abs=1e-6)
        found = batch_gradient(at, table, white)
        assert off(found, exact / (A.var(correction=0) + 1e-8).sqrt()) < 1e-11
        assert cosine(found, exact) == pytest.approx(1, abs=1e-12)
    assert cosine(batch_gradient(at, table, reinforce_pp(r, at.lengths)), exact) == pytest.approx(1, abs=1e-12)


@pytest.mark.parametrize("shift_mean", [False, True])
def test_whitened_rewards_pay_for_length(sample, shift_mean):
    """r_t / sd + c: the gradient is that of J / sd + c E[length], c being -mean / sd, or mean - mean / sd unshifted."""
    world, table, at = sample
    r = shape_rewards(world.logratios(at, table), world.rewards[at.which] + 1, at.lengths, BETA)
    A, _ = gae(whiten(r, shift_mean), torch.zeros_like(r), at.lengths, 1.0, 1.0)
    mean, deviation = r.mean(), (r.var(correction=0) + 1e-8).sqrt()
    c = -mean / deviation if shift_mean else mean - mean / deviation
    of_length = world.gradient(table, world.all.lengths.double(), beta=0.0)
    exact = world.gradient(table, world.rewards)  # a constant in the reward changes nothing
    assert off(batch_gradient(at, table, A), exact / deviation + c * of_length) < 1e-11
    assert cosine(batch_gradient(at, table, A), exact) < 0.999


# --- KL


def test_kl_estimators_and_their_gradients(world):
    """Over whole sequences drawn from pi: E[k1] = E[k3] = KL(pi || ref), and the gradients, taken through the estimate,

    E[grad k1] = 0, E[grad k2] = grad KL(pi || ref), E[grad k3] = grad KL(ref || pi). Tang and Munos 2025, arXiv
    2506.09477.
    """
    table = world.policy.clone().requires_grad_()
    policy, ref = world.sequence_logps(table), world.sequence_logps(world.ref)
    chance = policy.exp().detach()
    mean = {name: (chance * kl_estimate(policy - ref, name)).sum() for name in ("k1", "k2", "k3")}
    truth, forward = kl(policy, ref), kl(ref, policy)
    assert mean["k1"].item() == pytest.approx(truth.item(), rel=1e-12)
    assert mean["k3"].item() == pytest.approx(truth.item(), rel=1e-12)
    assert abs(mean["k2"].item() / truth.item() - 1) > 0.01

    gradient = lambda x: torch.autograd.grad(x, table, retain_graph=True)[0]  # noqa: E731
    right, other = gradient(truth), gradient(forward)
    assert gradient(mean["k1"]).norm() < 1e-14 * right.norm() * 100
    assert off(gradient(mean["k2"]), right) < 1e-12
    assert off(gradient(mean["k3"]), other) < 1e-12 and cosine(other, right) < 0.99


def in_the_loss(world: World, table: Tensor, estimate) -> Tensor:
    """Mean gradient of minus beta times the sum over tokens of estimate(table), as a part of the loss."""
    table = table.clone().requires_grad_()
    chance = world.sequence_logps(table).exp().detach()
    return torch.autograd.grad(-BETA * (chance * world.all.sums(estimate(table))).sum(), table)[0]


def test_kl_in_the_loss_is_that_of_the_visited_states(world):
    """Per token, with visits as they are: k1 gives nothing, k2 and the exact KL the same, k3 the other direction's KL.

    So k2 or the exact KL in the loss is not yet the gradient of KL(pi || ref) between sequences: what a token does to
    the KL of later ones is missing.
    """
    at, table = world.all, world.policy
    visits = torch.zeros(world.states, dtype=torch.float64)
    visits.index_add_(0, at.prefix, world.sequence_logps(table).exp().repeat_interleave(at.lengths))
    k1, k2, k3 = (
        in_the_loss(world, table, lambda free, name=name: kl_estimate(world.logratios(at, free), name))
        for name in ("k1", "k2", "k3")
    )

    def held(distance):
        free = table.clone().requires_grad_()
        return torch.autograd.grad(-BETA * (visits * distance(free.log_softmax(1))).sum(), free)[0]

    there = held(lambda logp: kl(logp, world.ref.log_softmax(1)))
    assert k1.norm() < 1e-12
    assert off(k2, there) < 1e-12
    assert off(in_the_loss(world, table, lambda t: world.token_kl(t)[at.prefix]), there) < 1e-12
    assert off(k3, held(lambda logp: kl(world.ref.log_softmax(1), logp))) < 1e-12
    nothing = torch.zeros_like(world.rewards)
    assert off(there, world.gradient(table, nothing)) > 0.01


def test_kl_in_the_reward(world):
    """k1 is exact; k2 and k3 are something else, and so is k1 with the wrong sign.

    The KL over the vocabulary lacks its own gradient at the visited states, which itself or k2 in the loss adds.
    """
    at, table = world.all, world.policy
    exact, D = world.gradient(table, world.rewards), world.logratios(at, table)

    def gradient(estimate):
        r = shape_rewards(estimate, world.rewards, at.lengths, BETA)
        return world.ppo_gradient(table, gae(r, torch.zeros_like(r), at.lengths, 1.0, 1.0)[0])

    assert off(gradient(kl_estimate(D, "k1")), exact) < 1e-12
    for wrong in (kl_estimate(D, "k2"), kl_estimate(D, "k3"), -D):
        assert off(gradient(wrong), exact) > 0.01
    over_vocabulary = gradient(world.token_kl(table)[at.prefix])
    assert off(over_vocabulary, exact) > 0.01
    for rest in (lambda t: world.token_kl(t)[at.prefix], lambda t: kl_estimate(world.logratios(at, t), "k2")):
        assert off(over_vocabulary + in_the_loss(world, table, rest), exact) < 1e-12


# --- groups


def group_gradient(world: World, length: int, k: int, method) -> Tensor:
    """Mean gradient over all groups of k sequences, each with its probability: A summed over tokens, divided by k."""
    groups = torch.tensor([*itertools.product(range(len(world.rewards)), repeat=k)])
    at, table = Tokens(length, groups.flatten()), world.policy.clone().requires_grad_()
    logps = at.logps(table)
    r = shape_rewards(world.logratios(at, table), world.rewards[at.which], at.lengths, BETA)
    A = method(sequence_sums(r, at.lengths).view(-1, k)).flatten().repeat_interleave(at.lengths)
    loss = at.sums(ppo_clip(logps, logps, A, 0.2)).view(-1, k).mean(1)
    chance = at.sums(logps).view(-1, k).sum(1).exp().detach()
    assert chance.sum().item() == pytest.approx(1, abs=1e-12)
    return torch.autograd.grad(-(chance * loss).sum(), table)[0]


@pytest.mark.parametrize("length, k", [(1, 2), (1, 3), (1, 4), (2, 2)])
def test_baselines_of_groups(length, k):
    """RLOO and ReMax: the exact gradient. Dr. GRPO: (k - 1) / k of it. GRPO: another direction.

    R is the score less beta log(pi / ref), and the gradient that of E[r] - beta KL.
    """
    world = World(length)
    exact = world.gradient(world.policy, world.rewards)
    assert off(group_gradient(world, length, k, rloo), exact) < 1e-12
    for greedy in (0.0, 3.0):
        baseline = lambda R: remax(R, torch.full((len(R),), greedy, dtype=torch.float64))  # noqa: B023, E731
        assert off(group_gradient(world, length, k, baseline), exact) < 1e-12
    assert off(group_gradient(world, length, k, drgrpo), (k - 1) / k * exact) < 1e-12
    assert 0 < cosine(group_gradient(world, length, k, grpo), exact) < 0.999


def success(b: float, q: float, of_group) -> float:
    """Where the share of successes ends if it is, again and again, best for A less b KL to a reference with share q."""
    p, size = q, 200_000
    for _ in range(300):
        wins = round(p * size)
        if wins == size:
            break
        R = (torch.arange(size) < wins).double()[None]
        A = of_group(R)[0]
        gap = (A[0] - A[-1]).item()
        p = 1 / (1 + (1 - q) / q * math.exp(-gap / b))
    return wins / size


@pytest.mark.parametrize(
    "b, q, ends, plain", [(2, 0.3, 0.53885, 0.41404), (3, 0.5, 0.67018, 0.58257), (1, 0.3, 1.0, None)]
)
def test_fixed_point_of_grpo(b, q, ends, plain):
    """Rewards 0 and 1 in a large group: p = 1 / (1 + (1 - q) / q exp(-1 / (b sqrt(p (1 - p))))).

    Mroueh 2025, arXiv 2503.06639. Without the deviation (Dr. GRPO) logit(p) = logit(q) + 1 / b, as for plain reward
    less b KL; with it p is above that, and for a small b no failure is left.
    """
    p = success(b, q, grpo)
    assert p == pytest.approx(ends, abs=5e-5)
    if p < 1:
        assert p == pytest.approx(1 / (1 + (1 - q) / q * math.exp(-1 / (b * math.sqrt(p * (1 - p))))), abs=5e-5)
        assert success(b, q, drgrpo) == pytest.approx(plain, abs=1e-5)
        # and there the gradient of the method vanishes: both advantages, weighted by p, against that of the KL
        x = torch.tensor(math.log(p / (1 - p)), dtype=torch.float64, requires_grad=True)
        logp = torch.stack([torch.nn.functional.logsigmoid(x), torch.nn.functional.logsigmoid(-x)])
        A = grpo((torch.arange(200_000) < round(p * 200_000)).double()[None])[0, [0, -1]]
        gain = (logp.exp().detach() * -ppo_clip(logp, logp, A, 0.2)).sum()
        leash = kl(logp, torch.tensor([q, 1 - q], dtype=torch.float64).log())
        assert torch.autograd.grad(gain, x, retain_graph=True)[0] > 0.1
        assert torch.autograd.grad(gain - b * leash, x)[0].abs() < 1e-4


# --- training


@pytest.mark.parametrize("advantage", ["gae", "rloo"])
def test_training_reaches_the_optimal_policy(world, advantage):
    """From the reference, on sampled sequences, PPO with a critic and RLOO end at pi* = ref exp(r / beta) / Z."""
    g = torch.Generator().manual_seed(0)
    best = optimal_policy(world.sequence_logps(world.ref), world.rewards, BETA)
    table, values = world.ref.clone().requires_grad_(), torch.zeros(world.states).double().requires_grad_()
    assert kl(world.sequence_logps(table), best) > 0.2
    steps, b, k = 150, 256, 4
    optimizer = torch.optim.Adam([table, values], lr=0.05)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1, 0.05, steps)
    for _ in range(steps):
        with torch.no_grad():
            chance = world.sequence_logps(table).exp()
            at = Tokens(3, torch.multinomial(chance, b, replacement=True, generator=g))
            old_logps, old_values = at.logps(table), values[at.prefix]
            r = shape_rewards(world.logratios(at, table), world.rewards[at.which], at.lengths, BETA)
        A, returns = gae(r, old_values, at.lengths)
        if advantage == "rloo":
            A = rloo(sequence_sums(r, at.lengths).view(-1, k)).flatten().repeat_interleave(at.lengths)
        for _ in range(2):
            policy_loss = ppo_clip(at.logps(table), old_logps, A, 0.2).sum() / b
            critic_loss = value_loss(values[at.prefix], old_values, returns, 0.2).sum() / b
            optimizer.zero_grad()
            (policy_loss + critic_loss).backward()
            optimizer.step()
        schedule.step()
    assert kl(world.sequence_logps(table), best) < 0.02


# --- a sampler that is not the policy


class Estimator:
    """One answer's REINFORCE gradient with a fixed baseline, drawn from a sampler whose logits are off by `spread`."""

    def __init__(self, world: World, spread: float, correction: str, cap: float = 1e9):
        at, table = world.all, world.policy.clone().requires_grad_()
        sampler = world.policy + random_rewards(world.policy.numel(), 50, spread).view_as(world.policy)
        logps, sampled = at.logps(table), at.logps(sampler)
        self.weights = torch.ones_like(sampled)
        if correction != "none":
            self.weights = sampler_weights(logps, sampled, at.lengths, correction, cap)
        A = (world.rewards - world.rewards.mean()).repeat_interleave(at.lengths)
        each = at.sums(self.weights * A * logps)
        self.gradients = torch.stack([torch.autograd.grad(x, table, retain_graph=True)[0].flatten() for x in each])
        self.chance = world.sequence_logps(sampler).exp()
        self.exact = world.gradient(world.policy, world.rewards, 0.0).flatten()
        self.mean = self.chance @ self.gradients

    def bias(self) -> float:
        return off(self.mean, self.exact)

    def error(self, answers: int) -> float:
        """Root of the mean squared error of a batch's mean, relative to the exact gradient."""
        variance = self.chance @ self.gradients.square().sum(1) - self.mean.square().sum()
        return ((variance / answers).sqrt() / self.exact.norm()).item()


def test_the_sequence_weight_is_exact_and_the_token_weight_is_not(world):
    """A sampler whose logits are off by 0.3. Each term of the token form has the expectation of a policy that differs
    from the sampler in that one token: a bias of 0.53 of the gradient's norm, where no correction has one of 1.08."""
    assert Estimator(world, 0.3, "sequence").bias() < 1e-12
    token = Estimator(world, 0.3, "token")
    assert Estimator(world, 0.3, "none").bias() == pytest.approx(1.075, abs=0.005)
    assert token.bias() == pytest.approx(0.529, abs=0.005)
    at, table = world.all, world.policy.clone().requires_grad_()
    sampler = world.policy + random_rewards(world.policy.numel(), 50, 0.3).view_as(world.policy)
    A = (world.rewards - world.rewards.mean()).repeat_interleave(at.lengths)
    ratio = at.logps(sampler) - at.logps(world.policy)
    others = (at.sums(ratio).repeat_interleave(at.lengths) - ratio).exp()  # p_sampler / p of all tokens but this one
    loss = at.sums(others * A * at.logps(table))
    wanted = torch.autograd.grad((world.sequence_logps(world.policy).exp() * loss).sum(), table)[0].flatten()
    torch.testing.assert_close(token.mean, wanted, rtol=1e-10, atol=1e-13)


def test_at_bfloat16s_noise_the_capped_sequence_weight_is_best(world):
    """Which is why it is the default there: log-probs off by 0.05 a token, batches of 4,096 answers of up to 3 tokens.
    Over hundreds of tokens the cap sets many answers to 0; the metric sampler/cut shows it."""
    kinds = {"none": 1e9, "token": 2.0, "sequence": 3.0}
    estimators = {kind: Estimator(world, 0.05, kind, cap) for kind, cap in kinds.items()}
    errors = {kind: math.hypot(e.bias(), e.error(4096)) for kind, e in estimators.items()}
    assert errors["sequence"] < errors["token"] < errors["none"]
    assert estimators["sequence"].bias() < 1e-9 < 0.03 < estimators["token"].bias() < estimators["none"].bias()
    assert estimators["sequence"].error(1) < 1.01 * estimators["none"].error(1)


# --- surrogates, once the policy has moved


@pytest.fixture(scope="module")
def moved(world):
    """The policy that sampled, and the one that is updated, 0.1 from it in its logits."""
    return world.policy, world.policy + random_rewards(world.policy.numel(), 60, 0.1).view_as(world.policy)


def expected_gradient(world: World, old: Tensor, new: Tensor, surrogate) -> Tensor:
    """That of -surrogate(logps, old_logps, A) [b], one value for each sequence, in expectation over the old policy."""
    table = new.clone().requires_grad_()
    A = (world.rewards - world.rewards.mean()).repeat_interleave(world.all.lengths)
    loss = surrogate(world.all.logps(table), world.all.logps(old), A)
    chance = world.sequence_logps(old).exp()
    return -torch.autograd.grad((chance * loss).sum(), table)[0].flatten()


def test_surrogates_have_the_gradients_of_their_formulas(world, moved):
    """Expected gradients of a moved policy against sums over all sequences of a factor times grad log pi."""
    (old, new), at = moved, world.all
    log_ratio = at.logps(new) - at.logps(old)
    A = (world.rewards - world.rewards.mean()).repeat_interleave(at.lengths)
    lengths = at.lengths.repeat_interleave(at.lengths)
    s = (at.sums(log_ratio) / at.lengths).exp().repeat_interleave(at.lengths)  # GSPO's ratio of a sequence
    r = log_ratio.exp()
    low, high = 0.02, 0.03
    inside = lambda ratio: torch.where(A > 0, ratio <= 1 + high, ratio >= 1 - low)  # noqa: E731
    means = lambda x: sequence_means(x, at.lengths)  # noqa: E731
    factors = {
        "token": (lambda x, y, A: at.sums(ppo_clip(x, y, A, low, high)), A * r * inside(r)),
        "sequence": (
            lambda x, y, A: at.sums(ppo_clip(means(x), means(y), A, low, high)) / at.lengths,
            A * s * inside(s) / lengths,
        ),
        "cispo": (lambda x, y, A: at.sums(cispo(x, y, A, high)), A * r.clamp(max=1 + high)),
    }
    for name, (surrogate, factor) in factors.items():
        table = new.clone().requires_grad_()
        chance = world.sequence_logps(old).exp().repeat_interleave(at.lengths)
        wanted = torch.autograd.grad((chance * factor * at.logps(table)).sum(), table)[0].flatten()
        found = expected_gradient(world, old, new, surrogate)
        torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-13, msg=name)
    assert 0.1 < inside(s).double().mean() < 0.95 and 0.1 < inside(r).double().mean() < 0.95


def test_the_angle_of_each_surrogate_to_the_policy_gradient(world, moved):
    """The cosine, at the policy that sampled and after it moved, with each method's usual bounds. Neither the clip nor
    the cap turns the first update; GSPO's division by the length does, a little. After the move GSPO's narrow bounds
    leave few answers a gradient, and the direction depends on which."""
    (old, new), at = moved, world.all
    means = lambda x: sequence_means(x, at.lengths)  # noqa: E731
    surrogates = {
        "token": lambda x, y, A: at.sums(ppo_clip(x, y, A, 0.2, 0.28)),
        "sequence": lambda x, y, A: at.sums(ppo_clip(means(x), means(y), A, 3e-4, 4e-4)) / at.lengths,
        "cispo": lambda x, y, A: at.sums(cispo(x, y, A, 0.2)),
    }
    first = world.gradient(old, world.rewards, 0.0).flatten()
    later = world.gradient(new, world.rewards, 0.0).flatten()
    at_once = {n: cosine(expected_gradient(world, old, old, f), first) for n, f in surrogates.items()}
    after = {n: cosine(expected_gradient(world, old, new, f), later) for n, f in surrogates.items()}
    assert at_once == pytest.approx({"token": 1, "sequence": 0.989, "cispo": 1}, abs=1e-3)
    assert after == pytest.approx({"token": 0.996, "sequence": 0.539, "cispo": 0.996}, abs=1e-3)


# --- on-policy distillation


def test_on_policy_distillation_reaches_its_teacher():
    """--ref TEACHER --advantage rloo --kl-in loss --kl-coef 1 --kl-estimator exact with a reward of 0: a student that
    samples its own answers, against the exact KL over all sequences."""
    length, g = 2, torch.Generator().manual_seed(0)
    student, teacher = random_transformer(seed=0, dtype=torch.float32), random_transformer(seed=1, dtype=torch.float32)
    of_teacher, complete = transformer_logps(teacher, length), sequences(length)
    distance = lambda: kl(transformer_logps(student, length), of_teacher).item()  # noqa: E731
    a = train_ppo.Args(advantage="rloo", kl_in="loss", kl_estimator="exact", device="cpu", k=32)
    a.average, a.clip_range = "sequences", 0.2
    optimizer, start = torch.optim.AdamW(student.parameters(), lr=3e-3), distance()
    for _ in range(150):
        which = torch.multinomial(transformer_logps(student, length).exp(), a.k, replacement=True, generator=g)
        examples = [example([EOS], [complete[i] for i in which.tolist()])]
        n = sum(map(len, examples[0].responses))
        none, ones = torch.zeros(n), torch.ones(n)
        with torch.no_grad():
            logps, _ = response_logps(student, collate(examples, "padded", EOS))
        rollout = train_ppo.Rollout(examples, logps, none, None, none, None, torch.ones(1, a.k), ones)
        train_ppo.update(a, student, teacher, None, rollout, [0], 1.0, Batching("padded", EOS))
        optimizer.step()
        optimizer.zero_grad()
    assert start > 0.5 and distance() < 0.05 * start
