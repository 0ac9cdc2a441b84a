"""Per-token log-probabilities from hidden states, without holding the logits of a whole batch.

A language model's output layer turns n hidden states (n d) into logits (n v), of which one log-prob per row stays. The
logits are by far the largest tensor of a training step, so they are computed in tiles here, and thrown away.

Forward, in tiles of tokens (each row has its whole vocabulary, so its log-sum-exp is exact):

    z = softcap * tanh(scale * (h W' + b) / softcap) / temperature
    logp_i = z[i, target_i] - logsumexp_j z[i, j]

Backward: with g_i the gradient of logp_i, that of row z_i is g_i * (onehot(target_i) - softmax(z_i)). Three modes
(softcap or entropy: always recompute):

    keep        the softmax was kept, in the inputs' dtype, because it fits in `keep_bytes`: two matrix products
    recompute   logits again, in slices of the vocabulary over all tokens, so that each slice of dW is written once
    frozen      the head takes no gradient: dh was computed in the forward pass and is only scaled here

Matrix products run in the inputs' dtype, everything else in float32 (float64 for float64 inputs). On CUDA, products of
half-precision inputs are accumulated and returned in float32; on a CPU such inputs are converted to float32 first.
"""

from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint


class Head(NamedTuple):
    """The output layer of a language model: logits = softcap * tanh(scale * (hidden @ weight.T + bias) / softcap)."""

    weight: Float[Tensor, "v d"]
    bias: Float[Tensor, " v"] | None = None
    scale: float = 1.0
    softcap: float | None = None


def token_logps(
    hidden: Float[Tensor, "n d"],
    head: Head,
    targets: Int[Tensor, " n"],
    temperature: float = 1.0,
    entropy: bool = False,
    keep_bytes: int = 1 << 30,
    tile_bytes: int = 64 << 20,
) -> tuple[Float[Tensor, " n"], Float[Tensor, " n"] | None]:
    """Log-probability of each target given the hidden state that predicts it, and on request each row's entropy.

        logps[i] = log softmax(z_i)[targets[i]]          entropy[i] = -sum_j p_ij log p_ij,   p_i = softmax(z_i)

    hidden[i] must be the state at the token *before* targets[i]; rlhf/tree.py aligns them. Both results are in nats,
    float32 or float64, with logps <= 0 and 0 <= entropy <= log v. Gradients are exact for any upstream gradient per
    token, and flow to hidden, head.weight and head.bias.

    keep_bytes: size of the largest softmax that is kept for the backward pass (mode `keep`); calling backward twice
    then raises RuntimeError. tile_bytes: size of a tile of logits. Neither changes the result beyond rounding.
    """
    n, v = hidden.shape[0], head.weight.shape[0]
    compute_dtype = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    weight, bias = head.weight, head.bias
    if not hidden.is_cuda:
        hidden, weight = hidden.to(compute_dtype), weight.to(compute_dtype)
    weight = weight.to(hidden.dtype)
    bias = None if bias is None else bias.to(compute_dtype)

    plain = head.softcap is None and not entropy
    head_grad = weight.requires_grad or (bias is not None and bias.requires_grad)
    if not torch.is_grad_enabled() or not (head_grad or hidden.requires_grad):
        mode = "no grad"
    elif plain and not head_grad:
        mode = "frozen"
    elif plain and n * v * hidden.element_size() <= keep_bytes:
        mode = "keep"
    else:
        mode = "recompute"
    options = (head.scale, head.softcap, temperature, entropy, mode, tile_bytes)
    logps, entropies = _TokenLogps.apply(hidden, weight, bias, targets, options)
    return logps, entropies if entropy else None


def token_kl(
    hidden: Float[Tensor, "n d"],
    head: Head,
    ref_hidden: Float[Tensor, "n d_ref"],
    ref_head: Head,
    temperature: float = 1.0,
    tile_bytes: int = 64 << 20,
) -> Float[Tensor, " n"]:
    """KL divergence of each row's next-token distribution from the reference's, exact over the vocabulary, in nats.

        kl[i] = sum_j p_ij (log p_ij - log q_ij),   p_i = softmax(z_i), q_i = softmax(z_ref_i)

    z is defined at the top of this file, with one temperature for both. hidden and ref_hidden are aligned as in
    `token_logps`, and the two heads share a vocabulary. If the tokens were sampled from p, the sum over a response is
    an unbiased estimate of the KL between the distributions of whole responses, and its variance is at most that of the
    sum of log p - log q (Rao-Blackwell; Amini, Vieira, Cotterell 2025, arXiv 2504.10637).

    Range [0, inf) up to rounding; float32, or float64 for float64 inputs. Gradient flows to both sides. The backward
    pass computes the logits a second time, tile by tile, so neither pass holds more than a few tiles of `tile_bytes`.
    While gradients are enabled, half-precision inputs are converted to float32 on CUDA, too.
    """
    compute_dtype = torch.float64 if hidden.dtype == torch.float64 else torch.float32

    def prepare(hidden, head):
        hidden = hidden if hidden.is_cuda and not torch.is_grad_enabled() else hidden.to(compute_dtype)
        bias = None if head.bias is None else head.bias.to(compute_dtype)
        return hidden, head._replace(weight=head.weight.to(hidden.dtype), bias=bias)

    def log_probs(hidden, head):
        z = head.scale * _logits(hidden, head.weight, head.bias, (1.0, None, 1.0))
        if head.softcap is not None:
            z = head.softcap * (z / head.softcap).tanh()
        return (z / temperature).log_softmax(1)

    def divergence(hidden, ref_hidden):
        logp, logq = log_probs(hidden, head), log_probs(ref_hidden, ref_head)
        return (logp.exp() * (logp - logq)).sum(1)

    (hidden, head), (ref_hidden, ref_head) = prepare(hidden, head), prepare(ref_hidden, ref_head)
    rows = max(1, tile_bytes // (len(head.weight) * compute_dtype.itemsize))
    tiles = zip(hidden.split(rows), ref_hidden.split(rows), strict=True)
    return torch.cat([checkpoint(divergence, *tile, use_reentrant=False) for tile in tiles])


class _TokenLogps(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, bias, targets, options):
        scale, softcap, temperature, entropy, mode, tile_bytes = options
        n, v = hidden.shape[0], weight.shape[0]
        compute_dtype = torch.float64 if hidden.dtype == torch.float64 else torch.float32
        logps, lse, entropies = (hidden.new_empty(n, dtype=compute_dtype) for _ in range(3))
        probs = hidden.new_empty(n, v) if mode == "keep" else None
        grad_hidden = torch.empty_like(hidden) if mode == "frozen" else None

        rows = max(1, min(n, tile_bytes // (v * compute_dtype.itemsize)))
        in_place = mode == "keep" and probs.dtype == compute_dtype
        tile = None if in_place else hidden.new_empty(rows, v, dtype=compute_dtype)
        for start in range(0, n, rows):
            part = slice(start, min(start + rows, n))
            z = probs[part] if in_place else tile[: part.stop - part.start]
            z = _logits(hidden[part], weight, bias, options, out=z)
            target = z.gather(1, targets[part, None])
            peak = z.amax(1, keepdim=True)
            z -= peak
            if entropy:
                exp_z = z.exp()
                total = exp_z.sum(1, keepdim=True)
                entropies[part] = (total.log() - exp_z.mul_(z).sum(1, keepdim=True) / total)[:, 0]
            else:
                total = z.exp_().sum(1, keepdim=True)
            lse[part] = (peak + total.log())[:, 0]
            logps[part] = target[:, 0] - lse[part]
            if in_place:
                z /= total
            elif mode == "keep":
                probs[part] = z / total
            elif mode == "frozen":
                expected = (z / total).to(weight.dtype) @ weight
                grad_hidden[part] = (weight[targets[part]] - expected) * (scale / temperature)

        ctx.options, ctx.probs = options, probs
        ctx.save_for_backward(hidden, weight, bias, targets, lse, entropies, grad_hidden)
        if not entropy:
            ctx.mark_non_differentiable(entropies)
        return logps, entropies

    @staticmethod
    @once_differentiable
    def backward(ctx, g, g_entropy):
        scale, softcap, temperature, entropy, mode, tile_bytes = ctx.options
        hidden, weight, bias, targets, lse, entropies, grad_hidden = ctx.saved_tensors
        want_hidden, want_weight, want_bias = ctx.needs_input_grad[:3]
        n, v = hidden.shape[0], weight.shape[0]
        g = g[:, None]

        if mode == "frozen":
            return (grad_hidden * g).to(hidden.dtype), None, None, None, None

        if mode == "keep":
            if ctx.probs is None:
                raise RuntimeError("token_logps: the kept softmax was used up by an earlier backward; use keep_bytes=0")
            probs, ctx.probs = ctx.probs, None
            slope = (g * (scale / temperature)).to(probs.dtype)
            dz = probs.mul_(-slope).scatter_add_(1, targets[:, None], slope)
            return (
                dz @ weight if want_hidden else None,
                dz.T @ hidden if want_weight else None,
                dz.sum(0, dtype=lse.dtype) if want_bias else None,
                None,
                None,
            )

        d_hidden = torch.zeros_like(hidden, dtype=lse.dtype) if want_hidden else None
        d_weight = torch.zeros_like(weight) if want_weight else None
        d_bias = torch.zeros_like(bias) if want_bias else None
        columns = max(1, min(v, tile_bytes // (max(n, 1) * lse.itemsize)))
        for start in range(0, v, columns):
            part = slice(start, min(start + columns, v))
            z = _logits(hidden, weight[part], None if bias is None else bias[part], ctx.options)
            softcap_slope = 1 - (z * (temperature / softcap)) ** 2 if softcap is not None else None
            logp = z.sub_(lse[:, None])
            p = logp.exp()
            dz = -g * p
            if entropy:
                dz -= g_entropy[:, None] * p * (logp + entropies[:, None])
            inside = (targets >= start) & (targets < part.stop)
            column = (targets - start).clamp(0, part.stop - start - 1)
            dz.scatter_add_(1, column[:, None], g * inside[:, None])
            dz *= scale / temperature
            if softcap_slope is not None:
                dz *= softcap_slope
            dz_low = dz.to(hidden.dtype)
            if want_hidden:
                d_hidden += dz_low @ weight[part]
            if want_weight:
                torch.mm(dz_low.T, hidden, out=d_weight[part])
            if want_bias:
                d_bias[part] = dz.sum(0)
        return None if d_hidden is None else d_hidden.to(hidden.dtype), d_weight, d_bias, None, None


def _logits(hidden, weight, bias, options, out=None):
    """z = softcap * tanh(scale * (hidden weight' + bias) / softcap) / temperature, in float32 (float64)."""
    scale, softcap, temperature = options[:3]
    if hidden.dtype in (torch.float32, torch.float64):
        z = torch.mm(hidden, weight.T, out=out)
    else:
        z = torch.mm(hidden, weight.T, out_dtype=torch.float32)
    if bias is not None:
        z += bias
    if softcap is not None:
        z.mul_(scale / softcap).tanh_().mul_(softcap / temperature)
    elif scale != temperature:
        z *= scale / temperature
    return z
