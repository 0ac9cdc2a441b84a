"""CPU kernels of torch's variable-length attention, in plain PyTorch; importing this file registers them.

On CUDA the operator is FlashAttention. Here it takes any dtype, and its calls are named "stand-in" for the profiler.
"""

from itertools import pairwise

import torch
from einops import einsum, reduce, repeat
from torch.nn.attention import varlen
from torch.profiler import record_function


def heads_of_queries(x, query):
    return repeat(x, "t h d -> t (h group) d", group=query.shape[1] // x.shape[1])


def segments(query, key, q_offsets, k_offsets, longest, scale, window):
    """Where each segment's queries and keys are, and its softmax (heads q k). The last query sees the last key."""
    widest = (0, 0)
    for (a, b), (c, d) in zip(pairwise(q_offsets.tolist()), pairwise(k_offsets.tolist()), strict=True):
        widest = max(widest[0], b - a), max(widest[1], d - c)
        distance = torch.arange(d - c - (b - a), d - c)[:, None] - torch.arange(d - c)
        hidden = (distance < 0) | (window[0] >= 0) & (distance > window[0])
        scores = einsum(query[a:b], key[c:d], "q h d, k h d -> h q k") * scale
        yield slice(a, b), slice(c, d), scores.masked_fill(hidden, -torch.inf).softmax(-1)
    assert widest == longest and (b, d) == (len(query), len(key))


@varlen._varlen_attn.register_kernel("cpu")
def forward(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, is_causal, scale, window_size, *_):
    assert all(x.is_contiguous() for x in (query, key, value)) and cu_seq_q.dtype == cu_seq_k.dtype == torch.int32
    assert query.dtype == key.dtype == value.dtype and window_size[1] == 0
    with record_function("stand-in"):
        k, v = (heads_of_queries(x, query) for x in (key, value))
        parts = segments(query, k, cu_seq_q, cu_seq_k, (max_q, max_k), scale, window_size)
        out = torch.cat([einsum(weights, v[there], "h q k, k h d -> q h d") for _, there, weights in parts])
        return out, torch.zeros(query.shape[1], len(query)), torch.zeros(2, dtype=torch.uint64)


@varlen._varlen_attn_backward.register_kernel("cpu")
def backward(
    grad, query, key, value, out, lse, cu_seq_q, cu_seq_k, max_q, max_k, is_causal, rng_state, scale, window_size, *_
):
    with record_function("stand-in"):
        k, v = (heads_of_queries(x, query) for x in (key, value))
        dq, dk, dv = (torch.zeros_like(x) for x in (query, k, v))
        for here, there, weights in segments(query, k, cu_seq_q, cu_seq_k, (max_q, max_k), scale, window_size):
            dv[there] = einsum(weights, grad[here], "h q k, q h d -> k h d")
            d_weights = einsum(grad[here], v[there], "q h d, k h d -> h q k")
            d_scores = weights * (d_weights - (d_weights * weights).sum(-1, keepdim=True)) * scale
            dq[here] = einsum(d_scores, k[there], "h q k, k h d -> q h d")
            dk[there] = einsum(d_scores, query[here], "h q k, q h d -> k h d")
        return dq, *(reduce(x, "t (h group) d -> t h d", "sum", h=key.shape[1]) for x in (dk, dv))
