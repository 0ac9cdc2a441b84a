"""`token_logps` as it runs on a GPU: half-precision products, compiled functions of logits.

A CPU plays the GPU here. It has no products of half-precision numbers that are returned in float32, so these are made
of the same numbers in float32. The last test needs a GPU.
"""

import pytest
import torch
from test_logprobs import OPTIONS, error, naive
from torch.nn.functional import embedding

from rlhf import logprobs
from rlhf.logprobs import Head, token_logps

V, ROWS = 200, 32
MODES = {"keep": {}, "recompute": {"keep_bytes": 0}, "frozen": {}, "entropy": {"entropy": True}, "no grad": {}}


@pytest.fixture
def graphs(monkeypatch, request):
    """Lets a CPU play the GPU, and gives the list of compiled graphs. The parameter names the compiler's backend, or is
    "none": no compiler. Without a parameter, graphs run as they are."""
    counted, torch_compile = [], torch.compile

    def count(graph, inputs):
        counted.append(graph)
        return graph.forward

    def compile(function, options, **rest):
        assert options == {"split_reductions": False} and rest == {"dynamic": True, "fullgraph": True}
        backend = getattr(request, "param", count)
        return function if backend == "none" else torch_compile(function, backend=backend, **rest)

    def mm(a, b, dtype, out=None):
        product = (a.float() @ b.float()).to(dtype)
        return product if out is None else out.copy_(product)

    monkeypatch.setattr(torch, "compile", compile)
    monkeypatch.setattr(logprobs, "GPU", "cpu")
    monkeypatch.setattr(logprobs, "_mm", mm)
    logprobs.compiled.cache_clear()
    torch._dynamo.reset()
    yield counted
    logprobs.compiled.cache_clear()
    torch._dynamo.reset()


def run(
    mode,
    n,
    function=token_logps,
    dtype=torch.bfloat16,
    v=V,
    d=16,
    rows=ROWS,
    temperature=1.0,
    bias=True,
    device="cpu",
    **fields,
):
    """Log-probs, entropies, and the gradients of hidden states, weight and bias, on the same bfloat16 numbers in any
    dtype. Every other target is likely, as with a trained model: an error in p weighs more in p - 1."""
    g = torch.Generator().manual_seed(0)
    hidden, weight, b, up = (torch.randn(*shape, generator=g) for shape in ((n, d), (v, d), (v,), (2, n)))
    targets = torch.randint(0, v, (n,), generator=g)
    hidden[::2] += 0.5 * weight[targets[::2]]
    hidden, weight, b = (x.bfloat16().to(device, dtype).requires_grad_() for x in (hidden, weight, b))
    targets, up = targets.to(device), up.to(device)
    weight.requires_grad_(mode != "frozen")
    b.requires_grad_(mode != "frozen")
    head, entropy = Head(weight, b if bias else None, **fields), mode == "entropy"
    options = {"tile_bytes": rows * v * 4} | MODES[mode] if function is token_logps else {}
    with torch.set_grad_enabled(mode != "no grad"):
        logps, entropies = function(hidden, head, targets, temperature, **options)
    if mode != "no grad":
        ((logps * up[0]).sum() + ((entropies * up[1]).sum() if entropy else 0)).backward()
    return logps.detach(), entropies.detach() if entropy else None, hidden.grad, weight.grad, b.grad


@pytest.mark.parametrize("graphs", ["none", "aot_eager"], indirect=True)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("option", OPTIONS)
def test_values_and_gradients(graphs, mode, option):
    """As written and compiled, with and without bias, in one tile and in tiles of 32 rows of which the last has one."""
    for n, rows, bias in ((65, ROWS, True), (65, 3 * ROWS, False), (1, ROWS, True)):
        fields = {"temperature": OPTIONS[option][1], "bias": bias} | OPTIONS[option][0]
        got, exact = run(mode, n, rows=rows, **fields), run(mode, n, naive, torch.float64, **fields)
        for mine, right, bound in zip(got, exact, (1e-5, 1e-5, 2**-6, 2**-6, 2**-6), strict=True):
            assert (mine is None) == (right is None) and (mine is None or error(mine, right) < bound)
        assert got[0].dtype == torch.float32 and (got[0] <= 0).all()


def eager(hidden, head, targets, temperature):
    """Float32 logits by autograd, whose gradient is rounded to bfloat16 for the products, as it must be."""
    z = hidden.float() @ head.weight.float().T
    if z.requires_grad:
        z.register_hook(lambda dz: dz.bfloat16().float())
    logp = z.log_softmax(1)
    return logp.gather(1, targets[:, None])[:, 0], -(logp.exp() * logp).sum(1)


@pytest.mark.slow
@pytest.mark.parametrize("graphs", ["inductor"], indirect=True)
@pytest.mark.parametrize("mode", MODES)
def test_compiled_kernels_are_as_accurate_as_eager_ones(graphs, mode):
    """Root mean square and maximum of the error against float64 are at most 1.5 times those of the eager way."""
    size = {"v": 2003, "d": 64, "rows": 256, "bias": False}
    compiled, plain = run(mode, 700, **size), run(mode, 700, eager, **size)
    exact = run(mode, 700, naive, torch.float64, **size)
    for mine, other, right in zip(compiled, plain, exact, strict=True):
        if right is not None:
            a, b = (mine.double() - right).abs(), (other.double() - right).abs()
            assert a.square().mean() <= 1.5**2 * b.square().mean() and a.max() <= 1.5 * b.max()


def test_graphs_do_not_grow_with_sizes_and_numbers(graphs):
    """One of `_row_stats` for training, whether the head is frozen or not; one without gradient, of which recomputing
    makes use; one for entropies; and one of `_logit_gradients` for each of recomputing and entropies."""
    for mode, new in {"keep": 1, "recompute": 2, "frozen": 0, "entropy": 2, "no grad": 0}.items():
        before = len(graphs)
        for n in (100, *range(1, 200, 10), 64, 65):
            run(mode, n, temperature=1 + n / 100 if n > 1 else 1.0)
        assert len(graphs) - before == new, mode
    before = len(graphs)
    for softcap in (2.0, 3.0, 4.0):
        run("recompute", 100, softcap=softcap, scale=softcap / 2)
    assert len(graphs) - before == 2


def test_too_many_graphs_are_an_error(graphs):
    """A vocabulary takes a graph. Without an error, all others would be computed eagerly, and nobody would know."""
    with torch._dynamo.config.patch(recompile_limit=2):
        run("keep", 40, v=50)
        run("keep", 40, v=60)
        with pytest.raises(Exception, match="fullgraph"):
            run("keep", 40, v=70)


@pytest.mark.parametrize(
    "words, rows", [(151_936, 1024), (262_144, 1024), (128_256, 1024), (50_257, 2048), (500, 268_288)]
)
def test_default_tile_and_budget(monkeypatch, words, rows):
    """A GPU's tile is a multiple of 1,024 rows, and its budget for the softmax is 32,768 x 163,840 x 2 bytes."""
    calls = []

    def apply(hidden, weight, bias, targets, options):
        calls.append(options)
        return hidden[:, 0].float(), None

    monkeypatch.setattr(logprobs._TokenLogps, "apply", apply)
    fits = (10 << 30) // (2 * words)
    for gpu, n in (("meta", fits), ("meta", fits + 1), ("none", (1 << 30) // (4 * words)), ("none", fits)):
        monkeypatch.setattr(logprobs, "GPU", gpu)
        hidden, weight = (torch.empty(x, 8, dtype=torch.bfloat16, device="meta") for x in (n, words))
        token_logps(hidden, Head(weight.requires_grad_()), torch.empty(n, dtype=torch.int64, device="meta"))
    assert [mode for *_, mode, _, _ in calls] == ["keep", "recompute"] * 2
    assert [size for *_, size, _ in calls] == [rows * words * 4] * 2 + [64 << 20] * 2


@pytest.mark.parametrize("gpu", [True, False])
@pytest.mark.parametrize("keep_bytes", [0, None])
def test_gradient_in_float32_for_a_bfloat16_weight(request, gpu, keep_bytes):
    """If the weight's `grad_dtype` says so; of a tied embedding too, whose own gradient is added in float32."""
    if gpu:
        request.getfixturevalue("graphs")
    g = torch.Generator().manual_seed(0)
    weight = torch.randn(V, 16, generator=g).bfloat16()
    ids, targets = torch.randint(0, V, (2, 300), generator=g)
    errors = {}
    exact = weight.double().requires_grad_()
    naive(embedding(ids, exact), Head(exact), targets)[0].sum().backward()
    for grad_dtype in (torch.float32, torch.bfloat16):
        leaf = weight.clone().requires_grad_()
        leaf.grad_dtype = grad_dtype
        token_logps(embedding(ids, leaf), Head(leaf), targets, keep_bytes=keep_bytes)[0].sum().backward()
        assert leaf.grad.dtype == grad_dtype
        errors[grad_dtype] = (leaf.grad.double() - exact.grad).norm() / exact.grad.norm()
    assert errors[torch.float32] < 0.8 * errors[torch.bfloat16] < 2**-8


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("v", [4096, 5003])
def test_cuda(mode, v):
    """Tiles of which the last has one row, in vocabularies whose rows are aligned and are not."""
    torch._dynamo.reset()
    size = {"n": 2049, "v": v, "d": 64, "rows": 1024, "temperature": 0.7, "device": "cuda"}
    got, exact = run(mode, **size), run(mode, function=naive, dtype=torch.float64, **size)
    for mine, right, bound in zip(got, exact, (1e-5, 1e-5, 2**-6, 2**-6, 2**-6), strict=True):
        assert (mine is None) == (right is None) and (mine is None or error(mine, right) < bound)
    assert got[0].dtype == torch.float32 and (got[0] <= 0).all()
