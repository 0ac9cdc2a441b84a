"""AdamW's moments in 8 bits: the code, the optimizer that uses it against float32 moments, and resuming."""

import copy

import pytest
import torch

from rlhf import logprobs, optim

SCALES = torch.logspace(-7, -3, 64 * 256)
GRADIENTS = {  # of 64 blocks of 256: each element's deviation, and the least cosine of an update
    "blocks that differ": (torch.logspace(-7, -3, 64).repeat_interleave(256), 0.999),
    "mixed blocks": (SCALES[torch.randperm(64 * 256, generator=torch.manual_seed(0))], 0.9985),
}


def block(*values: float) -> torch.Tensor:
    """A block that begins with `values` and continues with the last of them."""
    return torch.tensor([*values, *[values[-1]] * (256 - len(values))])


def test_codes_by_hand():
    """Step 0: u is 0 for the first element, 0.7549 for the second, 0.5098 for the third. log2 v spans -20 to 0."""
    v = block(1.0, 2**-20, 2**-5, 0.0)
    m = block(0.5, -(2**-10) * 2, 0.0, 0.0)  # m / sqrt(v): 0.5, -2, 0
    code, scales = optim.compress(m, v, 0)
    # v: 510 * 0.75 + 0.5098 = 383.01; m: 63 sqrt(0.5 / 2) = 31.5
    assert code[:4].tolist() == [512 * 31 + 511, 512 * -63 + 1, 1 + 383, 0]
    assert scales.tolist() == [[2.0, -20.0, 0.0]]
    m2, v2 = optim.decompress(code, scales)
    assert v2[:4].tolist() == pytest.approx([1.0, 2**-20, 2 ** (-20 + 383 / 510 * 20), 0.0])
    assert m2[:4].tolist() == pytest.approx([2 * (31 / 63) ** 2, -(2**-9), 0.0, 0.0])


def test_an_empty_block_and_one_of_equal_elements():
    zero = torch.zeros(256)
    assert all(not x.any() for x in optim.decompress(*optim.compress(zero, zero, 3)))
    m, v = optim.decompress(*optim.compress(zero - 1e-3, zero + 1e-6, 3))
    assert torch.allclose(m, zero - 1e-3) and torch.allclose(v, zero + 1e-6)


def test_a_v_far_below_its_block_is_raised_and_its_update_shrinks():
    m, v = optim.decompress(*optim.compress(block(1.0, 2**-30), block(1.0, 2**-60), 0))
    assert v[1].item() == pytest.approx(2**-40) and (m / v.sqrt())[1].item() == pytest.approx(2**-10, rel=0.1)


def test_a_v_below_the_smallest_normal_number_is_raised_to_it():
    """Kernels may take it for 0, and would divide by it."""
    m, v = optim.decompress(*optim.compress(block(1e-20, 1e-22), block(1e-36, 1e-44), 0))
    assert v[1].item() == 2**-126 and m[1].item() == pytest.approx(1e-22, rel=0.1)


@pytest.mark.parametrize("backend", ["eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiled_as_on_cuda(backend, monkeypatch):
    """The same codes, from one graph for each direction, whatever the step, the piece and its number of blocks (one
    block alone would get graphs of its own)."""
    torch_compile = torch.compile
    monkeypatch.setattr(torch, "compile", lambda f, options, **rest: torch_compile(f, backend=backend, **rest))
    logprobs.compiled.cache_clear()
    torch._dynamo.reset()
    counters = torch._dynamo.utils.counters
    counters.clear()
    pack, unpack = logprobs.compiled(optim.compress), logprobs.compiled(optim.decompress)
    torch.manual_seed(0)
    codes, all_scales = torch.zeros(100 * 256, dtype=torch.int16), torch.zeros(100, 3)
    for step in range(1, 6):
        for blocks in (5, 64, 7):
            scales = torch.logspace(-22, 0, 256 * blocks)
            m, v = torch.randn(256 * blocks) * scales, (torch.randn(256 * blocks) * scales) ** 2
            code, scales = optim.compress(m, v, step)
            found, its_scales = pack(m, v, step)
            assert (found == code).float().mean() > 0.999 and torch.allclose(its_scales, scales, rtol=1e-5)
            codes[256 : 256 + len(code)], all_scales[1 : 1 + blocks] = code, scales
            pieces = codes[256 : 256 + len(code)].data, all_scales[1 : 1 + blocks].data
            for x, y in zip(unpack(*pieces), optim.decompress(code, scales), strict=True):
                assert torch.allclose(x, y, rtol=1e-5, atol=0)
    assert counters["stats"]["unique_graphs"] == 2
    logprobs.compiled.cache_clear()


def test_rounding_has_no_bias_over_the_steps():
    """A v between two codes: the mean of its decoded logarithms over 10,000 steps; each alone is off by up to 0.04."""
    v = block(1.0, 2**-20, *torch.logspace(-5, 0, 253).tolist(), 0.5)
    logs = [optim.decompress(*optim.compress(v, v, step))[1].log2() for step in range(10_000)]
    assert (torch.stack(logs).mean(0) - v.log2()).abs().max() < 1e-3
    assert (logs[0] - v.log2()).abs().max() > 0.03


def test_no_code_wraps():
    """Steps at which 510 + u or 63 + u would round up to 511 or 64 in float32, for some element of a block; each
    element is its block's largest once."""
    v = (torch.full((256, 256), 1e-8) + torch.eye(256) * 1e-6).view(-1)
    m = v.sqrt() * (0.1 + 0.9 * torch.eye(256).view(-1))
    for step in (740, 1480, 2220, 2258, 4167):
        code, scales = optim.compress(m, v, step)
        assert (code[::257] == 512 * 63 + 511).all() and scales.isfinite().all()


def test_a_gradient_whose_square_overflows_leaves_all_weights_finite():
    weight = torch.nn.Parameter(torch.ones(1, 256))
    optimizer = optim.AdamW([weight], {}, lr=0.1, eight_bits=True)
    for size in (1e21, 1.0):
        weight.grad = torch.ones(1, 256)
        weight.grad[0, 0] = size
        optimizer.step()
    assert weight.isfinite().all()


def both(size: int, **settings):
    """A weight with float32 moments and its copy with 8-bit ones."""
    weights = [torch.nn.Parameter(torch.zeros(1, size)) for _ in range(2)]
    sides = zip(weights, (False, True), strict=True)
    return weights, [optim.AdamW([weight], {}, eight_bits=eight_bits, **settings) for weight, eight_bits in sides]


@pytest.mark.parametrize("kind", ["noise", "drift", "constant"])
@pytest.mark.parametrize("name", GRADIENTS)
def test_200_steps_against_float32_moments(name, kind):
    """Gradients that span four decades, with and without a constant part: every step's update, all of them as one
    vector, and their sum."""
    scale, bound = GRADIENTS[name]
    generator = torch.manual_seed(1)
    drift = torch.randn(len(scale), generator=generator) * (kind != "noise")
    weights, optimizers = both(len(scale), lr=1.0)
    largest, dots = 0.0, torch.zeros(3)
    for _ in range(200):
        gradient = (drift + torch.randn(len(scale), generator=generator) * (kind != "constant")) * scale
        before = [weight.detach().clone() for weight in weights]
        for weight, optimizer in zip(weights, optimizers, strict=True):
            weight.grad = gradient[None].clone()
            optimizer.step()
        true, ours = (w.detach()[0] - x[0] for w, x in zip(weights, before, strict=True))
        assert torch.cosine_similarity(true, ours, dim=0) > bound
        dots += torch.stack([true @ ours, true @ true, ours @ ours])
        largest = max(largest, true.abs().max())
        assert ours.abs().max() < 1.5 * largest
    true, ours = (weight.detach()[0] for weight in weights)
    assert dots[0] > 0.999 * (dots[1] * dots[2]).sqrt() and torch.cosine_similarity(true, ours, dim=0) > 0.999
    assert (ours.norm() / true.norm()).item() == pytest.approx(1, abs=0.01)


def test_padding_chunks_and_vectors(monkeypatch):
    """A size that is no multiple of a block gives the same in one piece and in several; a vector is exact."""
    gradients = [torch.randn(5001, generator=torch.manual_seed(i)) for i in range(5)]

    def train(eight_bits: bool, *shape: int) -> tuple[torch.Tensor, dict]:
        weight = torch.nn.Parameter(torch.ones(shape))
        optimizer = optim.AdamW([weight], {}, lr=1e-2, eight_bits=eight_bits)
        for gradient in gradients:
            weight.grad = gradient.view(shape).clone()
            optimizer.step()
        return weight.detach(), optimizer.state[weight]

    whole, state = train(True, 3, 1667)
    assert sum(x.nbytes for x in (state["codes"], state["scales"])) == 20 * (2 * 256 + 12)
    monkeypatch.setattr(optim, "CHUNK", 1024)
    assert torch.equal(train(True, 3, 1667)[0], whole)
    assert not torch.equal(train(False, 3, 1667)[0], whole)
    assert torch.equal(train(True, 5001)[0], train(False, 5001)[0])


def test_continues_from_a_state_dict_bit_for_bit():
    """A bfloat16 weight with float32 masters, as a checkpoint of a run has them."""
    master = torch.randn(64, 100, generator=torch.manual_seed(0))
    gradients = [torch.randn(64, 100, generator=torch.manual_seed(i)) for i in range(6)]

    def begin(weight, low, state=None):
        weight = torch.nn.Parameter(weight.clone())
        optimizer = optim.AdamW([weight], {weight: low.clone()}, lr=1e-3, eight_bits=True)
        if state:
            optimizer.load_state_dict(copy.deepcopy(state))
        return weight, optimizer

    def train(weight, optimizer, part):
        for gradient in part:
            weight.grad = gradient.bfloat16()
            optimizer.step()
        return weight.data, optimizer.low_bits[weight], optimizer.state_dict()

    straight = train(*begin(*optim.split(master)), gradients)
    half = train(*begin(*optim.split(master)), gradients[:3])
    resumed = train(*begin(*half), gradients[3:])
    assert all(torch.equal(x, y) for x, y in zip(straight[:2], resumed[:2], strict=True))
    assert not torch.equal(straight[0], half[0])
