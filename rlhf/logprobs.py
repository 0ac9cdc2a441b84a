"""Per-token log-probabilities from hidden states, without holding the logits of a whole batch.

A language model's output layer turns n hidden states (n d) into logits (n v), of which one log-prob per row stays. The
logits are by far the largest tensor of a training step, so they are computed in tiles. At most their softmax is kept.

Forward, in tiles of tokens (each row has its whole vocabulary, so its log-sum-exp is exact):

    z = softcap * tanh(scale * (h W' + b) / softcap) / temperature
    logp_i = z[i, target_i] - logsumexp_j z[i, j]

Backward: if the loss has gradient g_i with respect to logp_i, it has g_i * (onehot(target_i) - softmax(z_i)) with
respect to row z_i. Three modes (softcap or entropy: always recompute):

    keep        the softmax was kept, in the inputs' dtype, because it fits in `keep_bytes`: two matrix products
    recompute   logits again, in slices of the vocabulary over all tokens, so that each slice of dW is written once
    frozen      the head takes no gradient: dh was computed in the forward pass and is only scaled here

Matrix products run in the inputs' dtype, everything else in float32 (float64 for float64 inputs). On CUDA, products of
half-precision inputs are accumulated and returned in float32; on a CPU such inputs are converted to float32 first.

Between products, only `_row_stats` and `_logit_gradients` touch logits. On CUDA memory traffic limits them, so in half
precision they are compiled: a logit is read twice and its softmax written, and mode `keep` does not touch it again.
"""

import functools
from typing import NamedTuple, no_type_check

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

GPU = "cuda"


class Head(NamedTuple):
    """The output layer of a language model: logits = softcap * tanh(scale * (hidden @ weight.T + bias) / softcap)."""

    weight: Float[Tensor, "v d"]
    bias: Float[Tensor, " v"] | None = None
    scale: float = 1.0
    softcap: float | None = None


def logits(hidden: Float[Tensor, "n d"], head: Head) -> Float[Tensor, "n v"]:
    """The logits of `Head`, in float32 (float64 for float64). Half-precision inputs, on CUDA only, are not rounded."""
    z = _mm(hidden, head.weight.T, torch.float64 if hidden.dtype == torch.float64 else torch.float32)
    z = head.scale * (z if head.bias is None else z + head.bias)
    return z if head.softcap is None else head.softcap * (z / head.softcap).tanh()


def token_logps(
    hidden: Float[Tensor, "n d"],
    head: Head,
    targets: Int[Tensor, " n"],
    temperature: float = 1.0,
    entropy: bool = False,
    keep_bytes: int | None = None,
    tile_bytes: int | None = None,
) -> tuple[Float[Tensor, " n"], Float[Tensor, " n"] | None]:
    """Log-probability of each target given the hidden state that predicts it, and on request each row's entropy.

        logps[i] = log softmax(z_i)[targets[i]]          entropy[i] = -sum_j p_ij log p_ij,   p_i = softmax(z_i)

    hidden[i] must be the state at the token *before* targets[i]; rlhf/tree.py aligns them. Both results are in nats,
    float32 or float64, with logps <= 0 and 0 <= entropy <= log v. Gradients are exact for any upstream gradient per
    token, and flow to hidden, head.weight and head.bias. A weight's gradient is in its `grad_dtype` or finer.

    keep_bytes: size of the largest softmax that is kept for the backward pass (mode `keep`); calling backward twice
    then raises RuntimeError. Default: on CUDA 10 GiB (32,768 tokens x 163,840 words x 2 bytes), else 1 GiB.
    tile_bytes: size of a tile of logits, by default `default_tile_bytes`. Neither changes the result beyond rounding.
    """
    n, v = hidden.shape[0], head.weight.shape[0]
    compute_dtype = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    weight, bias, cap, on_gpu = head.weight, head.bias, head.softcap, hidden.device.type == GPU
    hidden = hidden if on_gpu else hidden.to(compute_dtype)
    if keep_bytes is None:
        keep_bytes = (10 if on_gpu else 1) << 30
    tile_bytes = tile_bytes or default_tile_bytes(v, compute_dtype.itemsize, on_gpu)

    plain = cap is None and not entropy
    head_grad = weight.requires_grad or (bias is not None and bias.requires_grad)
    if not torch.is_grad_enabled() or not (head_grad or hidden.requires_grad):
        mode = "no grad"
    elif plain and not head_grad:
        mode = "frozen"
    elif plain and n * v * hidden.element_size() <= keep_bytes:
        mode = "keep"
    else:
        mode = "recompute"
    caps = cap and (head.scale / cap, cap / temperature, temperature / cap)  # before tanh, after it, and back to tanh
    grad_dtype = weight.grad_dtype if weight.is_leaf else weight.dtype
    grad_dtype = hidden.dtype if grad_dtype == hidden.dtype else compute_dtype
    options = (head.scale / temperature, caps, entropy, mode, tile_bytes, grad_dtype)
    logps, entropies = _TokenLogps.apply(hidden, weight, bias, targets, options)
    return logps, entropies if entropy else None


def default_tile_bytes(v: int, itemsize: int, on_gpu: bool) -> int:
    """64 MiB; on CUDA the largest multiple of 1,024 rows of logits within 512 MiB, but at least 1,024 rows, since every
    tile reads the whole weight again."""
    block = 1024 * v * itemsize
    return max(1, (512 << 20) // block) * block if on_gpu else 64 << 20


def token_kl(
    hidden: Float[Tensor, "n d"],
    head: Head,
    ref_hidden: Float[Tensor, "n d_ref"],
    ref_head: Head,
    temperature: float = 1.0,
    tile_bytes: int | None = None,
) -> Float[Tensor, " n"]:
    """KL divergence of each row's next-token distribution from the reference's, exact over the vocabulary, in nats.

        kl[i] = sum_j p_ij (log p_ij - log q_ij),   p_i = softmax(z_i), q_i = softmax(z_ref_i)

    z is defined at the top of this file, with one temperature for both. hidden and ref_hidden are aligned as in
    `token_logps`, and the two heads share a vocabulary. If the tokens were sampled from p, the sum over a response is
    an unbiased estimate of the KL between the distributions of whole responses, usually with less variance than the sum
    of log p - log q (Amini, Vieira, Cotterell 2025, arXiv 2504.10637, say always; dependent tokens can break that).

    Range [0, inf) up to rounding; float32, or float64 for float64 inputs. Gradient flows to both sides. The backward
    pass computes the logits a second time, tile by tile, so neither pass holds more than a few tiles of `tile_bytes`.
    While gradients are enabled, half-precision inputs are converted to float32 on CUDA, too.
    """
    compute_dtype = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    v, on_gpu = len(head.weight), hidden.device.type == GPU
    if not on_gpu or torch.is_grad_enabled():
        hidden, ref_hidden = hidden.to(compute_dtype), ref_hidden.to(compute_dtype)
    biases = [None if h.bias is None else h.bias.to(compute_dtype) for h in (head, ref_head)]
    head = head._replace(weight=head.weight.to(hidden.dtype), bias=biases[0])
    ref_head = ref_head._replace(weight=ref_head.weight.to(ref_hidden.dtype), bias=biases[1])

    def divergence(hidden, ref_hidden):
        logp, logq = ((logits(*x) / temperature).log_softmax(1) for x in ((hidden, head), (ref_hidden, ref_head)))
        return (logp.exp() * (logp - logq)).sum(1)

    tile_bytes = tile_bytes or default_tile_bytes(v, compute_dtype.itemsize, on_gpu)
    rows = max(1, tile_bytes // (v * compute_dtype.itemsize))
    tiles = zip(hidden.split(rows), ref_hidden.split(rows), strict=True)
    return torch.cat([checkpoint(divergence, *tile, use_reentrant=False, preserve_rng_state=False) for tile in tiles])


class _TokenLogps(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, bias, targets, options):
        gain, caps, entropy, mode, tile_bytes, _ = options
        n, v = hidden.shape[0], weight.shape[0]
        compute_dtype = torch.float64 if hidden.dtype == torch.float64 else torch.float32
        weight, bias = weight.to(hidden.dtype), None if bias is None else bias.to(compute_dtype)
        logps, lse, entropies = (hidden.new_empty(n, dtype=compute_dtype) for _ in range(3))
        grad_hidden = torch.empty_like(hidden) if mode == "frozen" else None

        rows = max(1, min(n, tile_bytes // (v * compute_dtype.itemsize)))
        half = hidden.dtype != compute_dtype
        softmax = hidden.new_empty(n if mode == "keep" else rows, v) if mode in ("keep", "frozen") else None
        in_place = softmax is not None and not half
        tile = None if in_place else hidden.new_empty(rows, v, dtype=compute_dtype)
        for start in range(0, n, rows):
            part = slice(start, min(start + rows, n))
            place = slice(part.stop - start)
            probs = None if softmax is None else softmax[part if mode == "keep" else place]
            z = _mm(hidden[part], weight.T, compute_dtype, out=probs if in_place else tile[place])
            numbers = _fused(half, _row_stats, z, bias, gain, caps, targets[part], entropy, probs)
            logps[part], lse[part], entropies[part] = numbers
            if mode == "frozen":
                expected = _mm(probs, weight, compute_dtype)
                # in half precision, `probs` is softmax - onehot(target)
                grad_hidden[part] = (-expected if half else weight[targets[part]] - expected) * gain

        ctx.options, ctx.softmax = options, softmax if mode == "keep" else None
        ctx.save_for_backward(hidden, weight, bias, targets, lse, entropies, grad_hidden)
        if not entropy:
            ctx.mark_non_differentiable(entropies)
        return logps, entropies

    @staticmethod
    @once_differentiable
    def backward(ctx, g, g_entropy):
        """Gradients of at least the precision that the inputs want; autograd casts them."""
        gain, caps, entropy, mode, tile_bytes, grad_dtype = ctx.options
        hidden, weight, bias, targets, lse, entropies, grad_hidden = ctx.saved_tensors
        want_hidden, want_weight, want_bias = ctx.needs_input_grad[:3]
        n, v, half = hidden.shape[0], weight.shape[0], hidden.dtype != lse.dtype
        g = g[:, None]

        if mode == "frozen":
            return grad_hidden * g, None, None, None, None

        if mode == "keep":
            if ctx.softmax is None:
                raise RuntimeError("token_logps: the kept softmax was used up by an earlier backward; use keep_bytes=0")
            dz, ctx.softmax = ctx.softmax, None
            slope = g * gain
            if half:  # dz is softmax - onehot: the slope goes to n x d numbers, which saves a pass over n x v
                d_hidden = _mm(dz, weight, lse.dtype).mul_(-slope) if want_hidden else None
                d_weight = _mm(dz.T, (hidden * -slope).to(dz.dtype), grad_dtype) if want_weight else None
                d_bias = _mm(dz.T, -slope.to(dz.dtype), lse.dtype)[:, 0] if want_bias else None
            else:
                dz = _add_at(dz.mul_(-slope), targets, slope)
                d_hidden = dz @ weight if want_hidden else None
                d_weight = dz.T @ hidden if want_weight else None
                d_bias = dz.sum(0) if want_bias else None
            return d_hidden, d_weight, d_bias, None, None

        d_hidden = torch.zeros_like(hidden, dtype=lse.dtype) if want_hidden else None
        d_weight = torch.zeros_like(weight, dtype=grad_dtype) if want_weight else None
        d_bias = torch.zeros_like(bias) if want_bias else None
        upstream = (g, g_entropy[:, None], entropies[:, None]) if entropy else (g, None, None)
        step = 128 if half else 1  # products are slow if rows are not aligned
        columns = max(step, tile_bytes // (max(n, 1) * lse.itemsize) // step * step)
        for start in range(0, v if n else 0, columns):
            part = slice(start, min(start + columns, v))
            z, b = _mm(hidden, weight[part].T, lse.dtype), None if bias is None else bias[part]
            rest = (targets - start, hidden.dtype, lse[:, None], *upstream)
            dz = _fused(half, _logit_gradients, z, b, gain, caps, *rest)
            if want_hidden:
                d_hidden += _mm(dz, weight[part], lse.dtype)
            if want_weight:
                _mm(dz.T, hidden, grad_dtype, out=d_weight[part])
            if want_bias:
                d_bias[part] = dz.sum(0, dtype=lse.dtype)
        return d_hidden, d_weight, d_bias, None, None


def _fused(half, function, z, *rest):
    """function(z, ...); in half precision one graph for all sizes above 1. (Bases of views would be guarded.)"""
    if not half or 1 in z.shape:
        return function(z, *rest)
    return compiled(function)(*(x.data if isinstance(x, Tensor) else x for x in (z, *rest)))


@functools.cache
def compiled(function):
    """Reaching the limit of graphs is an error. A reduction that is split in two would read its input twice."""
    return torch.compile(function, dynamic=True, fullgraph=True, options={"split_reductions": False})


@no_type_check
def _row_stats(z, bias, gain, caps, targets, entropy, probs):
    """Log-prob of the target, log-sum-exp and entropy (if not requested: log-sum-exp again) of each row of z = h W'.
    `probs`, if given, receives the softmax and may be z; in half precision it receives softmax - onehot(target)."""
    if torch.compiler.is_compiling():
        torch._dynamo.mark_static(z, 1)  # maximum and sum take one pass if v is a constant
    z = _transform(z, bias, gain, caps)
    target = z.gather(1, targets[:, None])
    peak = z.amax(1, keepdim=True)
    z -= peak
    exp_z = z.exp() if entropy else z.exp_()
    total = exp_z.sum(1, keepdim=True)
    lse = peak + total.log()
    entropies = (total.log() - exp_z.mul_(z).sum(1, keepdim=True) / total).clamp_(min=0) if entropy else lse
    if probs is not None:
        softmax = exp_z.div_(total)
        half = probs.dtype != softmax.dtype
        probs.copy_(_add_at(softmax, targets, -torch.ones_like(total)) if half else softmax)
    return (target - lse).clamp_(max=0)[:, 0], lse[:, 0], entropies[:, 0]


@no_type_check
def _logit_gradients(z, bias, gain, caps, targets, dtype, lse, g, g_entropy, entropies):
    """Gradient, in `dtype`, of columns z = h W' of the vocabulary; `targets` count from the first of them."""
    z = _transform(z, bias, gain, caps)
    cap_slope = None if caps is None else 1 - (z * caps[2]) ** 2
    z -= lse
    p = z.exp()
    dz = -g * p
    if entropies is not None:
        dz -= g_entropy * p * (z + entropies)
    dz = _add_at(dz, targets, g).mul_(gain)
    return (dz if caps is None else dz.mul_(cap_slope)).to(dtype)


@no_type_check
def _transform(z, bias, gain, caps):
    """Turn z = h W' into logits: in place or, while torch.compile traces it, in a new tensor."""
    compiling = torch.compiler.is_compiling()
    z = z.clone() if compiling else z
    if bias is not None:
        z += bias
    if caps is not None:
        z.mul_(caps[0]).tanh_().mul_(caps[1])
    elif compiling or gain != 1:
        z *= gain
    return z


@no_type_check
def _add_at(x, columns, values):
    """x[i, columns[i]] += values[i] where x has that column; when compiled, fused into the pass that computes x."""
    if torch.compiler.is_compiling():
        return torch.where(columns[:, None] == torch.arange(x.shape[1], device=x.device), x + values, x)
    inside = (columns >= 0) & (columns < x.shape[1])
    return x.scatter_add_(1, columns.clamp(0, x.shape[1] - 1)[:, None], values * inside[:, None])


def _mm(a, b, dtype, out=None):
    """a @ b, accumulated and returned in `dtype`: theirs or, if they are in half precision, float32."""
    return torch.mm(a, b, out=out) if a.dtype == dtype else torch.mm(a, b, out_dtype=dtype, out=out)
