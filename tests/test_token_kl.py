"""The exact KL per token against hand values, the definition, and the KL between whole sequences."""

import math

import pytest
import torch
from enumerable import (
    everything,
    kl,
    next_token_states,
    prefixes,
    random_transformer,
    sequences,
    transformer_logps,
)
from tiny import no_float32
from torch.utils._python_dispatch import TorchDispatchMode

from rlhf.logprobs import Head, token_kl
from rlhf.tree import collate
from support.models import output_head
from support.scoring import hidden_states

N, V = 13, 37
SIDES = {
    "plain": ({}, {}),
    "one of each": ({"scale": 0.25}, {"softcap": 3.0}),
    "all": ({"scale": 1.5, "softcap": 5.0}, {"scale": 0.7, "softcap": 2.0}),
}


def side(seed: int, d: int, dtype=torch.float64, bias=True, n=N, **fields):
    g = torch.Generator().manual_seed(seed)
    make = lambda *shape: (2 * torch.randn(*shape, generator=g, dtype=torch.float64)).to(dtype)  # noqa: E731
    return make(n, d), Head(make(V, d), make(V) if bias else None, **fields)


def plain_kl(hidden, head, ref_hidden, ref_head, temperature=1.0):
    """By torch.distributions, from logits written out."""

    def distribution(hidden, head):
        z = torch.einsum("nd,vd->nv", hidden.double(), head.weight.double())
        z = (z if head.bias is None else z + head.bias.double()) * head.scale
        z = z if head.softcap is None else head.softcap * torch.tanh(z / head.softcap)
        return torch.distributions.Categorical(logits=z / temperature)

    return torch.distributions.kl_divergence(distribution(hidden, head), distribution(ref_hidden, ref_head))


def test_three_words_by_hand():
    """p = (.5, .3, .2), q = (.2, .3, .5): .5 ln 2.5 + .2 ln .4 = .3 ln 2.5 = 0.274887; against p itself 0."""
    p, q = (torch.tensor([x], dtype=torch.float64).log() for x in ((0.5, 0.3, 0.2), (0.2, 0.3, 0.5)))
    words = Head(torch.eye(3, dtype=torch.float64))
    found = token_kl(p.repeat(2, 1), words, torch.cat([q, p]), words)
    torch.testing.assert_close(found, torch.tensor([0.3 * math.log(2.5), 0.0], dtype=torch.float64))
    assert found[0].item() == pytest.approx(0.274887, abs=1e-6)


def test_temperature_by_hand():
    """At temperature 1/2 the probabilities are squared: p = (25, 9, 4) / 38, q the other way round."""
    p, q = (torch.tensor([x], dtype=torch.float64).log() for x in ((0.5, 0.3, 0.2), (0.2, 0.3, 0.5)))
    words = Head(torch.eye(3, dtype=torch.float64))
    by_hand = (25 - 4) / 38 * math.log(25 / 4)
    assert token_kl(p, words, q, words, temperature=0.5).item() == pytest.approx(by_hand, rel=1e-12)


@pytest.mark.parametrize("dtype,bound", [(torch.float64, 1e-12), (torch.float32, 2e-5), (torch.bfloat16, 2e-5)])
@pytest.mark.parametrize("name", SIDES)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_values_for_every_tile(dtype, bound, name, bias, temperature):
    """The two sides differ in width, scale and soft-cap; half precision is raised before the product. A tile has at
    least one row."""
    mine, ref = SIDES[name]
    sides = *side(0, 11, dtype, bias, **mine), *side(1, 7, dtype, bias, **ref)
    truth = plain_kl(*sides, temperature)
    assert truth.min() > 0.1
    for tokens in (0, 1, 5, N, 3 * N):
        found = token_kl(*sides, temperature, tokens * V * max(dtype.itemsize, 4))
        assert found.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        torch.testing.assert_close(found.double(), truth, rtol=bound, atol=bound)


@pytest.mark.parametrize("name", SIDES)
def test_gradients_of_both_sides(name):
    mine, ref = SIDES[name]
    sides = *side(2, 5, n=4, **mine), *side(3, 3, n=4, **ref)
    inputs = [x.requires_grad_() for x in (sides[0], *sides[1][:2], sides[2], *sides[3][:2])]

    def tiled(h, w, b, ref_h, ref_w, ref_b):
        heads = sides[1]._replace(weight=w, bias=b), sides[3]._replace(weight=ref_w, bias=ref_b)
        return token_kl(h, heads[0], ref_h, heads[1], 1.2, 3 * V * 8)

    assert torch.autograd.gradcheck(tiled, inputs)
    upstream = torch.linspace(-1, 2, 4, dtype=torch.float64)
    got = torch.autograd.grad((tiled(*inputs) * upstream).sum(), inputs)
    truth = torch.autograd.grad((plain_kl(*sides, 1.2) * upstream).sum(), inputs)
    for mine, exact in zip(got, truth, strict=True):
        torch.testing.assert_close(mine, exact, rtol=1e-9, atol=1e-12)


def test_no_tokens():
    sides = *side(0, 11, n=0), *side(1, 7, n=0)
    assert token_kl(*sides).shape == (0,)


@pytest.mark.parametrize("grad", [False, True])
def test_nothing_of_size_n_x_v_is_held(grad):
    """No tensor on the way has more rows of logits than the tile's two, and none is kept for the backward pass."""
    made, kept = [], []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            made.extend(x.shape for x in (out if isinstance(out, tuple | list) else [out]))
            return out

    hidden, head, ref_hidden, ref_head = *side(0, 1), *side(1, 1)
    hidden.requires_grad_(grad)
    with Watch(), torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.shape) or x, lambda x: x):
        found = token_kl(hidden, head, ref_hidden, ref_head, tile_bytes=2 * V * 8)
        kept_for_backward = [shape for shape in kept if shape[1:] == (V,)]
        if grad:
            found.sum().backward()
    assert max(shape[0] for shape in made if shape[1:] == (V,)) == 2
    assert not kept_for_backward


@pytest.mark.parametrize("length", [2, 3])
def test_its_expectation_is_the_kl_between_whole_sequences(length):
    """Over all sequences, each with its probability: E_y~pi[sum over t of token_kl] = KL(pi || ref), responses that
    were cut included; and its variance is below that of the log-ratio."""
    policy, ref = random_transformer(0), random_transformer(1)
    step = {tuple(p): i for i, p in enumerate(prefixes(length))}
    with no_float32(), torch.no_grad():
        logps, ref_logps = transformer_logps(policy, length), transformer_logps(ref, length)
        batch = collate([everything(length)], "padded", 0)
        found = [(hidden_states(m, batch, batch.sources), output_head(m)) for m in (policy, ref)]
        per_token = token_kl(*found[0], *found[1])
        plain = [(next_token_states(m, length), output_head(m)) for m in (policy, ref)]
        first = token_kl(*plain[0], *plain[1])
    sums = torch.zeros(len(logps), dtype=torch.float64).index_add(0, batch.sequence, per_token)
    by_prefix = [sum(first[step[*s[:i]]] for i in range(len(s))) for s in sequences(length)]
    torch.testing.assert_close(sums, torch.stack(by_prefix), rtol=1e-9, atol=1e-12)
    truth, p = kl(logps, ref_logps), logps.exp()
    assert truth > 0.5
    torch.testing.assert_close((p * sums).sum(), truth, rtol=1e-9, atol=0)
    log_ratio = logps - ref_logps
    variance = lambda x: (p * (x - truth).square()).sum()  # noqa: E731
    assert variance(sums) < 0.5 * variance(log_ratio)
