"""The kernel against float64 autograd of the definition, in every mode, tile size and option."""

import itertools

import pytest
import torch
from torch.nn.functional import log_softmax

from rlhf.logprobs import Head, token_logps

N, V, D = 13, 37, 11


def naive(hidden, head, targets, temperature=1.0):
    z = hidden @ head.weight.T
    z = (z if head.bias is None else z + head.bias) * head.scale
    z = z if head.softcap is None else head.softcap * torch.tanh(z / head.softcap)
    logp = log_softmax(z / temperature, dim=-1)
    return logp.gather(1, targets[:, None])[:, 0], -(logp.exp() * logp).sum(1)


def problem(dtype=torch.float64, n=N, bias=True, seed=0):
    g = torch.Generator().manual_seed(seed)
    make = lambda *shape: (2 * torch.randn(*shape, generator=g, dtype=torch.float64)).to(dtype)  # noqa: E731
    hidden, weight, b = make(n, D), make(V, D), make(V)
    targets = torch.randint(0, V, (n,), generator=g)
    return hidden.requires_grad_(), weight.requires_grad_(), b.requires_grad_() if bias else None, targets


def error(a, b):
    return ((a.double() - b.double()).abs().max() / b.double().abs().max()).item()


OPTIONS = {
    "plain": ({}, 1.0),
    "temperature": ({}, 0.7),
    "scale": ({"scale": 0.25}, 1.0),
    "softcap": ({"softcap": 3.0}, 1.0),
    "all": ({"scale": 1.5, "softcap": 5.0}, 1.3),
}


@pytest.mark.filterwarnings("error")  # torch resizes a buffer of another size, and warns
@pytest.mark.parametrize("dtype,bound", [(torch.float64, 1e-10), (torch.float32, 1e-5)])
@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("keep_bytes", [0, 1 << 30])
@pytest.mark.parametrize("entropy", [False, True])
def test_values_and_gradients_for_every_tile(dtype, bound, option, bias, keep_bytes, entropy):
    fields, temperature = OPTIONS[option]
    upstream = torch.linspace(-1, 2, N, dtype=torch.float64)

    exact = [x.detach().double().requires_grad_() for x in problem(dtype, bias=bias)[:3] if x is not None]
    targets = problem()[3]
    logps, ent = naive(exact[0], Head(exact[1], exact[2] if bias else None, **fields), targets, temperature)
    ((logps * upstream).sum() + (ent * upstream.flip(0)).sum() * entropy).backward()

    for tokens in (1, 5, N, 3 * N):
        hidden, weight, b, _ = problem(dtype, bias=bias)
        got, got_ent = token_logps(
            hidden, Head(weight, b, **fields), targets, temperature, entropy, keep_bytes, tokens * V * dtype.itemsize
        )
        assert got.dtype == dtype and error(got, logps) < bound
        loss = (got * upstream).sum()
        assert entropy or got_ent is None
        if entropy:
            assert error(got_ent, ent) < bound
            loss = loss + (got_ent * upstream.flip(0)).sum()
        loss.backward()
        for mine, truth in zip((x for x in (hidden, weight, b) if x is not None), exact, strict=True):
            assert error(mine.grad, truth.grad) < bound


@pytest.mark.parametrize("trained", [s for s in itertools.product([True, False], repeat=3) if any(s)])
@pytest.mark.parametrize("keep_bytes", [0, 1 << 30])
@pytest.mark.parametrize("scale, temperature", [(1.0, 1.0), (1.0, 0.6), (0.25, 1.7)])
def test_any_part_may_be_frozen(trained, keep_bytes, scale, temperature):
    """Of every option too: with adapters the head is frozen, and PPO samples at a temperature."""
    hidden, weight, b, targets = problem()
    for x, wanted in zip((hidden, weight, b), trained, strict=True):
        x.requires_grad_(wanted)
    inputs = [x for x in (hidden, weight, b) if x.requires_grad]
    head = Head(weight, b, scale)
    truth = torch.autograd.grad(naive(hidden, head, targets, temperature)[0].square().sum(), inputs)
    for tile in (V * 8, 4 * V * 8, 1 << 20):
        logps, _ = token_logps(hidden, head, targets, temperature, keep_bytes=keep_bytes, tile_bytes=tile)
        for mine, exact in zip(torch.autograd.grad(logps.square().sum(), inputs), truth, strict=True):
            assert error(mine, exact) < 1e-10


@pytest.mark.parametrize("keep_bytes", [0, 1 << 30])
def test_tied_head(keep_bytes):
    """The embedding is also the head: both uses add to one gradient."""
    _, weight, _, targets = problem()
    ids = targets.roll(1)
    naive(weight[ids].tanh(), Head(weight), targets)[0].sum().backward()
    truth, weight.grad = weight.grad, None
    token_logps(weight[ids].tanh(), Head(weight), targets, keep_bytes=keep_bytes)[0].sum().backward()
    assert error(weight.grad, truth) < 1e-10


@pytest.mark.parametrize("fields", [{}, {"softcap": 4.0, "scale": 0.5}])
def test_gradcheck_in_recompute_mode(fields):
    hidden, weight, b, targets = problem(n=4)

    def both(h, w, c):
        return token_logps(h, Head(w, c, **fields), targets, 1.2, True, keep_bytes=0, tile_bytes=3 * V * 8)

    assert torch.autograd.gradcheck(both, (hidden, weight, b))
    assert torch.autograd.gradcheck(lambda *x: both(*x)[0], (hidden, weight, b))


def test_a_kept_softmax_serves_one_backward_only():
    hidden, weight, b, targets = problem()
    loss = token_logps(hidden, Head(weight, b), targets)[0].sum()
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="keep_bytes=0"):
        loss.backward()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_keep_bytes_is_the_size_of_the_largest_softmax_that_is_kept(dtype):
    size = N * V * dtype.itemsize
    for keep_bytes, kept in ((size, True), (size - 1, False)):
        hidden, weight, b, targets = problem(dtype)
        loss = token_logps(hidden, Head(weight, b), targets, keep_bytes=keep_bytes)[0].sum()
        loss.backward(retain_graph=True)
        once = hidden.grad.clone()
        if kept:
            with pytest.raises(RuntimeError, match="keep_bytes=0"):
                loss.backward()
        else:
            loss.backward()
            assert torch.equal(hidden.grad, 2 * once)


@pytest.mark.parametrize("keep_bytes", [0, 1 << 30])
@pytest.mark.parametrize("entropy", [False, True])
def test_no_tokens(keep_bytes, entropy):
    hidden, weight, b, targets = problem(n=0)
    logps, _ = token_logps(hidden, Head(weight, b), targets, entropy=entropy, keep_bytes=keep_bytes)
    assert logps.shape == (0,)
    logps.sum().backward()
    assert hidden.grad.shape == (0, D) and not weight.grad.any() and not b.grad.any()


def test_half_precision_inputs_give_float32_log_probs():
    """Sums over 300 tokens stay within 1e-4 nats of float64 on the same bfloat16 numbers (bf16 logits are not)."""
    g = torch.Generator().manual_seed(1)
    hidden = torch.randn(4 * 300, 64, generator=g).bfloat16()
    weight = (torch.randn(2000, 64, generator=g) / 4).bfloat16()
    targets = torch.randint(0, 2000, (4 * 300,), generator=g)
    logps, _ = token_logps(hidden, Head(weight), targets)
    exact, _ = naive(hidden.double(), Head(weight.double()), targets)
    coarse = log_softmax(hidden @ weight.T, -1).gather(1, targets[:, None])[:, 0].double()
    assert logps.dtype == torch.float32
    sums = lambda x: x.double().view(4, 300).sum(1)  # noqa: E731
    assert (sums(logps) - sums(exact)).abs().max() < 1e-4
    assert (sums(coarse) - sums(exact)).abs().max() > 1e-2  # the comparison can fail


def test_half_precision_gradients():
    hidden, weight, _, targets = problem(torch.bfloat16)
    token_logps(hidden, Head(weight), targets)[0].sum().backward()
    exact_h, exact_w = hidden.detach().double().requires_grad_(), weight.detach().double().requires_grad_()
    naive(exact_h, Head(exact_w), targets)[0].sum().backward()
    assert hidden.grad.dtype == weight.grad.dtype == torch.bfloat16
    assert error(hidden.grad, exact_h.grad) < 2**-7 and error(weight.grad, exact_w.grad) < 2**-7


def test_extreme_logits_stay_finite():
    hidden = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    weight = torch.tensor([[1e4, -1e4], [-1e4, 1e4], [0.0, 0.0]])
    logps, entropy = token_logps(hidden, Head(weight), torch.tensor([0, 0]), entropy=True)
    assert logps.tolist() == [0.0, -2e4] and entropy.tolist() == [0.0, 0.0]


def test_no_graph_without_gradients():
    hidden, weight, b, targets = problem()
    with torch.no_grad():
        assert token_logps(hidden, Head(weight, b), targets)[0].grad_fn is None


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("keep_bytes", [0, 1 << 30])
def test_cuda_half_precision(keep_bytes):
    hidden, weight, b, targets = (x.detach().cuda() for x in problem(torch.bfloat16, n=300))
    leaves = [x.clone().requires_grad_() for x in (hidden, weight, b)]
    logps, _ = token_logps(leaves[0], Head(*leaves[1:]), targets, keep_bytes=keep_bytes)
    logps.sum().backward()
    exact = [x.double().requires_grad_() for x in (hidden, weight, b)]
    truth, _ = naive(exact[0], Head(*exact[1:]), targets)
    truth.sum().backward()
    assert abs(logps.double().sum() - truth.sum()) < 1e-4
    for mine, right in zip(leaves, exact, strict=True):
        assert error(mine.grad, right.grad) < 2**-6
