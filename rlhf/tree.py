"""A prompt with its k responses as one packed row, and the attention over it.

The responses are branches of a tree: the prompt's tokens are encoded once, a response token attends to its prompt and
to its own branch only, and its position continues from the prompt's end. Trees lie end to end in one row, unpadded:

    tokens     a  b  c | d  e | f  g  h || i  j | k  l ...       prompt abc with responses de and fgh, prompt ij with kl
    positions  0  1  2   3  4   3  4  5    0  1   2  3
    f sees     a  b  c          f

`collate` builds this layout or the plain padded one (a row for each prompt + response) of the same examples. Both carry
the same alignment: `targets[i]` is a response token and `sources[i]` the place of the token before it, whose hidden
state predicts it. A prompt's last token is the source of the first token of each of its responses.
"""

import inspect
import itertools
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from torch.nn.utils.rnn import pad_sequence

from rlhf import lazy_import
from rlhf.data import Example

varlen = lazy_import("torch.nn.attention.varlen")  # takes seconds to load, and is for CUDA

SHORT = 128  # keys; segments with more are not padded to share a call


class Segment(NamedTuple):
    """Queries [start, stop) of the row. They attend to keys [prefix, prefix_stop), and causally to themselves."""

    start: int
    stop: int
    prefix: int
    prefix_stop: int


class Bucket:
    """Segments of nearly the same size, padded to one call of SDPA; a long one has a bucket of its own, unpadded."""

    def __init__(self, parts: list[Segment], device: torch.device):
        self.parts, self.masks = parts, {}
        own = [range(s.start, s.stop) for s in parts]
        seen = [[*range(s.prefix, s.prefix_stop), *q] for s, q in zip(parts, own, strict=True)]
        width_q, width_k = max(map(len, own)), max(map(len, seen))
        pad = lambda rows, width: [[*row] + [row[-1]] * (width - len(row)) for row in rows]  # noqa: E731
        self.queries = torch.tensor(pad(own, width_q), device=device)
        self.keys = torch.tensor(pad(seen, width_k), device=device)
        lengths = torch.tensor([[len(q), len(k)] for q, k in zip(own, seen, strict=True)], device=device)
        q_lengths, k_lengths = rearrange(lengths, "s two -> two s 1 1")
        i, j = torch.arange(width_q, device=device)[:, None], torch.arange(width_k, device=device)
        distance = (
            (k_lengths - q_lengths) + torch.minimum(i, q_lengths - 1) - j
        )  # from key j back to query i, in tokens
        self.distance = torch.where(j < k_lengths, distance, -1)
        self.real = (i[:, 0] < q_lengths[:, 0]).flatten().nonzero()[:, 0]  # places of the queries that are not padding
        self.causal = len(parts) == 1 and parts[0].prefix == parts[0].prefix_stop

    def take(self, x: Tensor, cut: dict[int, Tensor], places: Int[Tensor, "s width"]) -> Tensor:
        """(1 h t d) -> (s h width d): the tokens at these places of the row, which is also `cut` into its segments by
        their starts: the backward pass of a cut fills no row with zeros."""
        if len(self.parts) > 1:
            return rearrange(x[0][:, places], "h s width d -> s h width d")
        part = self.parts[0]
        if places is self.queries or self.causal:
            return cut[part.start]
        return torch.cat([cut[part.prefix][:, :, : part.prefix_stop - part.prefix], cut[part.start]], 2)

    def mask(self, window: int | None) -> Bool[Tensor, "s 1 q k"] | None:
        """What each query sees: its prefix, and its own segment up to itself, no further back than the window."""
        if window is not None and window > self.distance.max():
            window = None
        if window is None and self.causal:
            return None
        if window not in self.masks:
            seen = self.distance >= 0
            self.masks[window] = (seen if window is None else seen & (self.distance < window))[:, None]
        return self.masks[window]


class Segments:
    """The segments of one packed row: what the attention function is told about it."""

    def __init__(self, parts: list[Segment], device: torch.device):
        self.parts = parts
        self.q_lengths = [s.stop - s.start for s in parts]
        self.k_lengths = [s.stop - s.start + s.prefix_stop - s.prefix for s in parts]
        self.device = device

    @cached_property
    def buckets(self) -> list[Bucket]:
        """Segments with up to SHORT keys in buckets of like size; a call of SDPA costs more than their padding."""
        groups: dict[tuple[int, int] | int, list[Segment]] = defaultdict(list)
        for i, (part, q, k) in enumerate(zip(self.parts, self.q_lengths, self.k_lengths, strict=True)):
            groups[(-(-q // 16), -(-k // 16)) if k <= SHORT else i].append(part)
        return [Bucket(group, self.device) for group in groups.values()]

    @cached_property
    def order(self) -> Int[Tensor, " t"] | None:
        """Where each token of the row is among the buckets' queries laid end to end; None where that is its place."""
        if len(self.buckets) == len(self.parts):
            return None
        return torch.cat([b.queries.flatten()[b.real] for b in self.buckets]).argsort()

    def cut(self, x: Tensor) -> dict[int, Tensor]:
        """Start of each segment -> its tokens, (1 h t d) -> (1 h q d)."""
        return {part.start: piece for part, piece in zip(self.parts, x.split(self.q_lengths, 2), strict=True)}

    @cached_property
    def offsets(self) -> tuple[Int[Tensor, " s1"], Int[Tensor, " s1"]]:
        """Where each segment's queries, and its keys, begin when all are laid end to end (for the flash call)."""
        return tuple(
            torch.tensor([0, *itertools.accumulate(n)], dtype=torch.int32, device=self.device)
            for n in (self.q_lengths, self.k_lengths)
        )


@dataclass
class Batch:
    """p prompts with their responses (b sequences, n scored response tokens), ready for a model and for the kernel."""

    input_ids: Int[Tensor, "rows t"]
    position_ids: Int[Tensor, "rows t"]
    attention_mask: Int[Tensor, "rows t"] | None  # None in the tree layout
    segments: Segments | None  # None in the padded layout
    sources: Int[Tensor, " n"]  # index into the flattened (rows t) of the token before each target
    targets: Int[Tensor, " n"]
    sequence: Int[Tensor, " n"]  # which of the b sequences each target belongs to, in order
    lengths: Int[Tensor, " b"]  # scored tokens of each sequence
    ends: Int[Tensor, " b"]  # index into the flattened (rows t) of each sequence's last token


def tokens(example: Example, layout: str = "tree") -> int:
    """Tokens of a row that holds this example: what `--micro-batch-tokens` counts."""
    responses = [len(r) for r in example.responses]
    if layout == "tree":
        return len(example.prompt) + sum(responses)
    return len(responses) * (len(example.prompt) + max(responses))


def micro_batches(examples: Sequence[Example], budget: int, layout: str = "tree") -> list[list[int]]:
    """Indices of `examples` in groups of at most `budget` tokens (an example that is longer stands alone).

    Longest first, each into the first group that has room. In the padded layout every row of a group is as long as its
    longest. The grouping depends on the lengths alone, so the same step is always cut in the same way.
    """
    groups: list[list[int]] = []
    sizes: list[tuple[int, int]] = []  # tree: tokens so far; padded: sequences so far, and the longest of them
    for i in sorted(range(len(examples)), key=lambda i: -tokens(examples[i], layout)):
        k, own = len(examples[i].responses), tokens(examples[i])
        longest = len(examples[i].prompt) + max(len(r) for r in examples[i].responses)
        for group, (size, width) in enumerate(sizes):
            grown = (size + own, 1) if layout == "tree" else (size + k, max(width, longest))
            if grown[0] * grown[1] <= budget:
                groups[group].append(i)
                sizes[group] = grown
                break
        else:
            groups.append([i])
            sizes.append((own, 1) if layout == "tree" else (k, longest))
    return groups


def collate(examples: Sequence[Example], layout: str, pad_id: int, device: torch.device | str = "cpu") -> Batch:
    """Examples as one packed row (`tree`) or as right-padded rows (`padded`); the order of targets is the same."""
    device = torch.device(device)
    rows: list[list[int]] = [[]] if layout == "tree" else []
    positions: list[list[int]] = [[]] if layout == "tree" else []
    parts: list[Segment] = []
    width = max(len(e.prompt) + len(r) for e in examples for r in e.responses)
    sources, targets, sequence, lengths, ends = [], [], [], [], []
    for e in examples:
        p = len(e.prompt)
        for i, response in enumerate(e.responses):
            if layout == "padded":
                root = len(rows) * width + p - 1  # where the prompt's last token is, in the flattened rows
                first = root + 1  # and the response's first
                rows.append(e.prompt + response)
                positions.append([*range(p + len(response))])
            elif i == 0:
                root = len(rows[0]) + p - 1
                first = root + 1
                rows[0] += e.prompt + response
                positions[0] += range(p + len(response))
                parts.append(Segment(root + 1 - p, len(rows[0]), root + 1 - p, root + 1 - p))
            elif response:
                first = len(rows[0])
                rows[0] += response
                positions[0] += range(p, p + len(response))
                parts.append(Segment(first, len(rows[0]), root + 1 - p, root + 1))
            scored = [j for j in range(len(response)) if e.trained is None or e.trained[i][j]]
            sources += [first + j - 1 if j else root for j in scored]
            targets += [response[j] for j in scored]
            sequence += [len(lengths)] * len(scored)
            lengths.append(len(scored))
            ends.append(first + len(response) - 1 if response else root)

    def tensor(x, value=0):
        return pad_sequence([torch.tensor(r, dtype=torch.long) for r in x], True, value).to(device)

    return Batch(
        input_ids=tensor(rows, pad_id),
        position_ids=tensor(positions),
        attention_mask=None if layout == "tree" else tensor([[1] * len(r) for r in rows]),
        segments=Segments(parts, device) if layout == "tree" else None,
        sources=tensor([sources])[0],
        targets=tensor([targets])[0],
        sequence=tensor([sequence])[0],
        lengths=tensor([lengths])[0],
        ends=tensor([ends])[0],
    )


def by_prompt(
    values: Float[Tensor, " b"], examples: Sequence[Example]
) -> tuple[Float[Tensor, "p k"], Int[Tensor, "p k"]]:
    """Values of all responses and their ranks, a row for each prompt; ranks are 0 beyond a prompt's own responses."""
    rows = values.split([len(e.ranks) for e in examples])
    ranks = [torch.tensor(e.ranks) for e in examples]
    return pad_sequence([*rows], batch_first=True), pad_sequence(ranks, batch_first=True).to(values.device)


def tree_attention(
    module, query, key, value, attention_mask, scaling=None, sliding_window=None, segments=None, **kwargs
):
    """Attention over a packed row, as an attention function of transformers; query, key, value are (1 heads t d_head).

    Float32 goes bucket by bucket through SDPA on every device; half precision on CUDA is one variable-length flash
    call whose keys are each segment's prefix and itself. Nothing of size t x t is built, and a sliding window is kept.
    Raises NotImplementedError where the result would not be the model's own: no segments given, scores with a soft-cap
    or with sinks.
    """
    if segments is None or kwargs.get("softcap") is not None or kwargs.get("s_aux") is not None:
        raise NotImplementedError("the model passes no segments on, or its attention has a soft-cap or sinks")
    if query.is_cuda and torch.is_autocast_enabled("cuda"):  # rotary embeddings and norms leave float32 behind
        query, key, value = (x.to(torch.get_autocast_dtype("cuda")) for x in (query, key, value))
    if query.is_cuda and query.dtype in (torch.bfloat16, torch.float16):
        return _flash(query, key, value, scaling, sliding_window, segments), None
    out, rows = [], [(x, segments.cut(x)) for x in (query, key, value)]
    for bucket in segments.buckets:
        places = (bucket.queries, bucket.keys, bucket.keys)
        q, k, v = (bucket.take(*row, where) for row, where in zip(rows, places, strict=True))
        mask, grouped = bucket.mask(sliding_window), q.shape[1] != k.shape[1]
        x = scaled_dot_product_attention(q, k, v, mask, is_causal=mask is None, scale=scaling, enable_gqa=grouped)
        x = rearrange(x, "s h q d -> (s q) h d")
        out.append(x if len(bucket.parts) == 1 else x[bucket.real])
    found = torch.cat(out)
    return (found if segments.order is None else found[segments.order])[None], None


def _flash(query, key, value, scaling, sliding_window, segments):
    """One varlen flash call: causal, aligned at the end of each segment's keys, so that a window is right too."""
    q, k, v = (rearrange(x, "1 h t d -> t h d").contiguous() for x in (query, key, value))
    if segments.q_lengths != segments.k_lengths:
        places = [x for s in segments.parts for x in (slice(s.prefix, s.prefix_stop), slice(s.start, s.stop))]
        k, v = (torch.cat([x[place] for place in places]) for x in (k, v))
    known, options = inspect.signature(varlen.varlen_attn).parameters, {"scale": scaling}
    if "window_size" in known:  # torch >= 2.11
        options["window_size"] = (-1 if sliding_window is None else sliding_window - 1, 0)
    elif sliding_window is None or sliding_window >= max(segments.k_lengths):
        options["is_causal"] = True
    else:
        raise NotImplementedError("this torch's varlen_attn has no sliding window")
    if "enable_gqa" in known:
        options["enable_gqa"] = q.shape[1] != k.shape[1]
    elif q.shape[1] != k.shape[1]:
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    longest = max(segments.q_lengths), max(segments.k_lengths)
    return varlen.varlen_attn(q, k, v, *segments.offsets, *longest, **options)[None]
