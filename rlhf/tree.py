"""A prompt with its k responses as one packed row of tokens, and the attention over such rows.

The responses are branches of a tree. The prompt's tokens are encoded once; a response token attends only to its prompt
and its own branch, and its position continues from the prompt's end. Trees lie end to end in one row, unpadded:

    tokens     a  b  c | d  e | f  g  h || i  j | k  l ...       prompt abc with responses de and fgh, prompt ij with kl
    positions  0  1  2   3  4   3  4  5    0  1   2  3
    f sees     a  b  c          f

`collate` builds this layout or the plain padded one (one row per prompt + response) from the same examples. Both have
the same alignment: `targets[i]` is a response token and `sources[i]` the index of the token before it, whose hidden
state predicts it. A prompt's last token is the source of the first token of each of its responses.
"""

import itertools
from array import array
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple, Protocol, no_type_check, runtime_checkable

import numpy as np
import torch
from einops import rearrange
from jaxtyping import Bool, Int
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

SHORT = 128  # a segment with more keys than this gets its own call of scaled_dot_product_attention (SDPA)


@runtime_checkable
class Tree(Protocol):
    """What this file needs from an example: a prompt and its k responses, as token ids."""

    prompt: list[int]  # never empty
    responses: list[list[int]]  # k of them
    trained: list[list[bool]] | None  # which response tokens count in a loss; None: all


class Segment(NamedTuple):
    """Tokens [start, stop) of the row, which attend to the prefix [prefix, prefix_stop) and causally to each other:
    a prompt with its first response, whose prefix is empty, or another response, whose prefix is the prompt."""

    start: int
    stop: int
    prefix: int
    prefix_stop: int

    def keys(self) -> list[int]:
        """Where the keys are in the row: the prefix, then the segment itself."""
        return [*range(self.prefix, self.prefix_stop), *range(self.start, self.stop)]


def send(x: Tensor, device: torch.device | str) -> Tensor:
    """Copy a CPU tensor to the device; to CUDA from pinned memory, so that the CPU does not wait."""
    return x.pin_memory().to(device, non_blocking=True) if torch.device(device).type == "cuda" else x.to(device)


class Bucket:
    """Segments of similar size, padded to share one SDPA call. A long segment has a bucket to itself, unpadded."""

    def __init__(self, parts: list[Segment], device: torch.device):
        self.parts, self.masks = parts, {}
        queries = [range(s.start, s.stop) for s in parts]
        keys = [s.keys() for s in parts]
        width_q, width_k = max(map(len, queries)), max(map(len, keys))
        pad = lambda rows, width: [[*row] + [row[-1]] * (width - len(row)) for row in rows]  # noqa: E731
        self.queries = send(torch.tensor(pad(queries, width_q)), device)
        self.keys = send(torch.tensor(pad(keys, width_k)), device)
        lengths = send(torch.tensor([[len(q), len(k)] for q, k in zip(queries, keys, strict=True)]), device)
        q_lengths, k_lengths = rearrange(lengths, "s two -> two s 1 1")
        i, j = torch.arange(width_q, device=device)[:, None], torch.arange(width_k, device=device)
        distance = k_lengths - q_lengths + torch.minimum(i, q_lengths - 1) - j  # tokens from key j to query i
        self.distance = torch.where(j < k_lengths, distance, -1)
        real = [n * width_q + i for n, q in enumerate(queries) for i in range(len(q))]
        self.real = send(torch.tensor(real), device)  # indices of the queries that are not padding
        self.causal = len(parts) == 1 and parts[0].prefix == parts[0].prefix_stop

    def take(self, x: Tensor, pieces: dict[int, Tensor], indices: Int[Tensor, "s width"]) -> Tensor:
        """Take the tokens of x at `indices` of the row, (1 h t d) -> (s h width d). `pieces` is `Segments.cut(x)`.

        A bucket of one segment reads from `pieces`, since the backward pass of `index_select` fills a whole row with
        zeros. (That of x[..., indices, :] adds up gradients in any order if a CPU has several threads.)
        """
        if len(self.parts) > 1:
            s, width = indices.shape
            return rearrange(x[0].index_select(1, indices.flatten()), "h (s width) d -> s h width d", s=s, width=width)
        part = self.parts[0]
        if indices is self.queries or self.causal:
            return pieces[part.start]
        return torch.cat([pieces[part.prefix][:, :, : part.prefix_stop - part.prefix], pieces[part.start]], 2)

    def mask(self, window: int | None) -> Bool[Tensor, "s 1 q k"] | None:
        """What each query sees: its prefix, and its own segment up to itself, no further back than the window."""
        if window is not None and window >= self.keys.shape[1]:
            window = None
        if window is None and self.causal:
            return None
        if window not in self.masks:
            visible = self.distance >= 0
            self.masks[window] = (visible if window is None else visible & (self.distance < window))[:, None]
        return self.masks[window]


class Segments:
    """The segments of one packed row, in the form that the attention function needs."""

    def __init__(self, parts: list[Segment], offsets: Int[Tensor, " s2"], keys: Int[Tensor, " n"]):
        self.parts = parts
        self.q_lengths = [s.stop - s.start for s in parts]
        self.k_lengths = [s.stop - s.start + s.prefix_stop - s.prefix for s in parts]
        self.longest = max(self.q_lengths), max(self.k_lengths)
        self.keys = keys  # where all segments' keys are in the row, one segment after another
        self.offsets = offsets.int().chunk(2)  # where each segment begins among all queries, and among all keys

    @cached_property
    def buckets(self) -> list[Bucket]:
        """Segments with up to SHORT keys share a bucket with others of their size: padding costs less than a call."""
        groups: dict[tuple[int, int] | int, list[Segment]] = defaultdict(list)
        for i, (part, q, k) in enumerate(zip(self.parts, self.q_lengths, self.k_lengths, strict=True)):
            groups[(-(-q // 16), -(-k // 16)) if k <= SHORT else i].append(part)
        return [Bucket(group, self.keys.device) for group in groups.values()]

    @cached_property
    def order(self) -> Int[Tensor, " t"] | None:
        """Where each token of the row is in the buckets' outputs, laid end to end; None if the order is the same."""
        if len(self.buckets) == len(self.parts):
            return None
        return torch.cat([b.queries.flatten()[b.real] for b in self.buckets]).argsort()

    def cut(self, x: Tensor) -> dict[int, Tensor]:
        """Split x into segments: start of each segment -> its tokens, (1 h t d) -> (1 h q d)."""
        return {part.start: piece for part, piece in zip(self.parts, x.split(self.q_lengths, 2), strict=True)}


@dataclass
class Batch:
    """p prompts with their responses (b sequences, n scored response tokens), for a model and for rlhf/logprobs.py."""

    input_ids: Int[Tensor, "rows t"]
    position_ids: Int[Tensor, "rows t"]
    attention_mask: Int[Tensor, "rows t"] | None  # None in the tree layout
    segments: Segments | None  # None in the padded layout
    sources: Int[Tensor, " n"]  # index into the flattened (rows t) of the token before each target
    targets: Int[Tensor, " n"]
    sequence: Int[Tensor, " n"]  # which of the b sequences each target belongs to, in order
    lengths: Int[Tensor, " b"]  # scored tokens of each sequence
    ends: Int[Tensor, " b"]  # index into the flattened (rows t) of each sequence's last token


def tokens(example: Tree, layout: str = "tree") -> int:
    """Number of tokens that this example takes up in a batch of its own, padding included."""
    responses = [len(r) for r in example.responses]
    if layout == "tree":
        return len(example.prompt) + sum(responses)
    return len(responses) * (len(example.prompt) + max(responses))


def micro_batches(examples: Sequence[Tree], budget: int, layout: str = "tree") -> list[list[int]]:
    """Indices of `examples` in groups of at most `budget` tokens; a longer example gets a group to itself.

    The longest examples come first, and each goes into the first group with room. In the padded layout every row of a
    group is as long as the longest. The grouping depends only on lengths, so a step is always split the same way.
    """
    groups, n = [[] for _ in examples], 0
    rows, width = np.zeros((2, len(examples)), dtype=int)  # of each group; a tree counts as rows of one token
    for i, e in sorted(enumerate(examples), key=lambda item: -tokens(item[1], layout)):
        more = tokens(e) if layout == "tree" else len(e.responses)
        wide = 1 if layout == "tree" else tokens(e, layout) // more
        fits = (rows[:n] + more) * np.maximum(width[:n], wide) <= budget
        place = int(fits.argmax()) if fits.any() else n
        n = max(n, place + 1)
        groups[place].append(i)
        rows[place], width[place] = rows[place] + more, max(width[place], wide)
    return groups[:n]


def collate(examples: Sequence[Tree], layout: str, pad_id: int, device: torch.device | str = "cpu") -> Batch:
    """Examples as one packed row (`tree`) or as right-padded rows (`padded`). The order of the targets is the same.

    The batch's tensors are parts of one tensor, which is made on the CPU and sent to the device in one copy.
    """
    ids, positions, real, sources, targets, sequence, lengths, ends = ([] for _ in range(8))
    parts: list[Segment] = []
    width = max(len(e.prompt) + len(r) for e in examples for r in e.responses)
    for e in examples:
        p = len(e.prompt)
        for i, response in enumerate(e.responses):
            if i == 0 or layout == "padded":
                first = len(ids) + p  # index of the response's first token in the flattened (rows t)
                root = first - 1  # index of the prompt's last token
                ids += e.prompt + response
                positions += range(p + len(response))
                parts.append(Segment(first - p, len(ids), first - p, first - p))
            elif response:
                first = len(ids)
                ids += response
                positions += range(p, p + len(response))
                parts.append(Segment(first, len(ids), root + 1 - p, root + 1))
            if layout == "padded":
                padding = width - p - len(response)
                ids += [pad_id] * padding
                positions += [0] * padding
                real += [1] * (width - padding) + [0] * padding
            scored = [True] * len(response) if e.trained is None else e.trained[i]
            sources += itertools.compress([root, *range(first, first + len(response) - 1)], scored)
            targets += itertools.compress(response, scored)
            sequence += [len(lengths)] * sum(scored)
            lengths.append(sum(scored))
            ends.append(first + len(response) - 1 if response else root)

    packed, lists = layout == "tree", [ids, positions, sources, targets, sequence, lengths, ends]
    if packed:
        keys = [s.keys() for s in parts]
        q_offsets = itertools.accumulate((s.stop - s.start for s in parts), initial=0)
        k_offsets = itertools.accumulate(map(len, keys), initial=0)
        lists += [[*q_offsets, *k_offsets], [*itertools.chain(*keys)]]
    else:
        lists.append(real)
    flat = torch.frombuffer(bytearray().join(array("q", x) for x in lists), dtype=torch.long)
    flat = send(flat, device).split([len(x) for x in lists])
    ids, positions, sources, targets, sequence, lengths, ends, *rest = flat
    ids, positions = (rearrange(x, "(rows t) -> rows t", rows=1 if packed else len(lengths)) for x in (ids, positions))
    mask, segments = (None, Segments(parts, *rest)) if packed else (rest[0].view_as(ids), None)
    return Batch(ids, positions, mask, segments, sources, targets, sequence, lengths, ends)


@no_type_check  # it may be compiled
def takes_flash(query: Tensor) -> bool:
    """Whether `tree_attention` is one flash call: in half precision on CUDA."""
    return query.is_cuda and (torch.is_autocast_enabled("cuda") or query.dtype in (torch.bfloat16, torch.float16))


@no_type_check
def tree_attention(module, query, key, value, *_, scaling=None, sliding_window=None, segments=None, **kwargs):
    """Attention over a packed row, called by transformers, whose mask it ignores. query, key, value: (1 heads t d).

    In half precision on CUDA it is one variable-length flash call, in which a segment's keys are its own and those of
    its prefix. Everything else goes bucket by bucket through SDPA. Masks cover a bucket, never the whole row (t x t). A
    sliding window is respected. Raises NotImplementedError if the result would differ from the model's own attention:
    no segments, a soft-cap on the scores, or attention sinks.
    """
    if segments is None:
        message = "no segments reach the attention over packed trees: the batch is not packed, or the model drops them"
        raise NotImplementedError(message)
    if kwargs.get("softcap") is not None or kwargs.get("s_aux") is not None:
        raise NotImplementedError("the model's attention has a soft-cap or sinks, which packed trees do not support")
    if takes_flash(query):
        return _flash(query, key, value, scaling, sliding_window, segments), None
    if query.is_cuda and query.shape[1] != key.shape[1]:  # in float32 no fused kernel takes heads that share keys
        key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], 1) for x in (key, value))
    outputs, inputs = [], [(x, segments.cut(x)) for x in (query, key, value)]
    for bucket in segments.buckets:
        indices = (bucket.queries, bucket.keys, bucket.keys)
        q, k, v = (bucket.take(x, pieces, at) for (x, pieces), at in zip(inputs, indices, strict=True))
        mask, grouped = bucket.mask(sliding_window), q.shape[1] != k.shape[1]
        x = scaled_dot_product_attention(q, k, v, mask, is_causal=mask is None, scale=scaling, enable_gqa=grouped)
        x = rearrange(x, "s h q d -> (s q) h d")
        outputs.append(x if len(bucket.parts) == 1 else x[bucket.real])
    out = torch.cat(outputs)
    return (out if segments.order is None else out[segments.order])[None], None


@no_type_check
def _flash(query, key, value, scaling, sliding_window, segments):
    """One variable-length flash call. It aligns a segment's last query with its last key, as a sliding window needs.

    Keys and values are gathered in one operation each, however many segments there are. Under autocast some come in
    float32. In the backward pass the gradient of a shared prompt is added up in the call's dtype, in no fixed order.
    """
    from torch.nn.attention import varlen  # takes seconds to load, and only CUDA needs it

    dtype = torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else query.dtype
    q, k, v = (rearrange(x.to(dtype), "1 h t d -> t h d") for x in (query, key, value))
    if len(segments.keys) > len(q):  # some segment has a prefix
        k, v = (x.index_select(0, segments.keys) for x in (k, v))
    options = {"scale": scaling, "window_size": (-1 if sliding_window is None else sliding_window - 1, 0)}
    if "enable_gqa" in (varlen.varlen_attn.__kwdefaults__ or {}):  # not in torch 2.11
        options["enable_gqa"] = q.shape[1] != k.shape[1]
    elif q.shape[1] != k.shape[1]:
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    q, k, v = (x.contiguous() for x in (q, k, v))
    return varlen.varlen_attn(q, k, v, *segments.offsets, *segments.longest, **options)[None]
