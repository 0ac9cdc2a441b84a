"""What a training step takes, in bytes and operations, from a model's config and the rows' lengths.

No weight is loaded. Weights, gradients and optimizer state are counted on the meta device (`state_bytes`), the log-prob
kernel by the sizes of its tensors (`head_bytes`). What layers keep is traced: two of them compute a micro-batch forward
and backward on tensors without data, and `LiveBytes` adds up what is alive. `estimate` puts these together to a step's
peak. docs/scaling.md has the formulas that follow for a Llama.
"""

import itertools
import logging
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from rlhf import tree
from rlhf.logprobs import default_tile_bytes
from rlhf.optim import BLOCK, CHUNK
from support import models, scoring
from support.examples import Example

MOST_OPERATIONS = 100_000  # in a trace; a model that exceeds it loops over tokens in Python
FEW = 8  # trees that are traced one by one
Size = tuple[int, int]  # of a micro-batch: tokens with padding, and response tokens that a loss scores


class Plan(NamedTuple):
    """The flags that decide how much memory a step takes, and where it runs."""

    dtype: str = "float32"
    gradient_dtype: str = "float32"
    optimizer_state: str = "float32"
    lora_rank: int = 0
    gradient_checkpointing: bool = False
    keep_softmax_mib: int | None = None
    on_gpu: bool = False
    processes: int = 1


class Shape(NamedTuple):
    """A model in numbers of weights, and its activations in a micro-batch of `tokens`, in bytes."""

    elements: int  # all weights
    layers: int
    layer_elements: int  # weights of one layer
    layer_matrices: int  # those of them that are in matrices
    embeddings: int
    head: tuple[int, int]  # words and width of the output head; of a reward model (0, 0)
    tied: bool  # the head is the embeddings
    largest: int  # elements of the largest weight
    adapters: int
    tokens: int
    kept: int  # by each layer, from the forward to the backward pass
    kept_outside: int  # by the rest of the model, without the output head
    transient: int  # what the backward pass of a layer takes in addition, without sums of gradients


class LiveBytes(TorchDispatchMode):
    """Count the bytes of the tensors that operations inside make, while they are alive: `now`, and their `peak`."""

    def __init__(self, known: Sequence[Tensor] = ()):
        super().__init__()
        self.now = self.peak = self.operations = 0
        self.alive = {x.untyped_storage()._cdata: None for x in known}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.operations += 1
        if self.operations > MOST_OPERATIONS:
            raise NotImplementedError("its layers loop over tokens")
        result = func(*args, **(kwargs or {}))
        for x in tree_leaves(result):
            if isinstance(x, Tensor) and x.untyped_storage()._cdata not in self.alive:
                self._add(x)
        return result

    def _add(self, x: Tensor) -> None:
        storage = x.untyped_storage()
        key, size = storage._cdata, storage.nbytes()

        def free(_) -> None:
            del self.alive[key]
            self.now -= size

        self.alive[key] = weakref.ref(storage, free)
        self.now += size
        self.peak = max(self.peak, self.now)


# ------------------------------------------------------------------------------------------------------ one micro-batch


def measure(examples: Sequence[Example], layout: str) -> Size:
    """The size of a micro-batch of these examples."""
    scored = sum(sum(e.lengths) for e in examples)
    if layout == "tree":
        return sum(map(tree.tokens, examples)), scored
    rows = [len(e.prompt) + len(r) for e in examples for r in e.responses]
    return len(rows) * max(rows), scored


def trace(
    config, examples: Sequence[Example], plan: Plan, layout: str, reward: bool = False, trust_remote_code: bool = False
) -> Shape:
    """The shape of a model, with its activations in a micro-batch of these examples. All layers count as the first two.

    Raises NotImplementedError, or whatever the model's own code raises on tensors without data.
    """
    model = models.on_meta(config, reward, trust_remote_code)
    layers, head, embeddings = models.layers(model), model.get_output_embeddings(), model.get_input_embeddings()
    if not layers:
        raise NotImplementedError("the library does not name its layers")
    first = [*layers[0].parameters()]
    counts = (
        model.num_parameters(),
        len(layers),
        sum(x.numel() for x in first),
        sum(x.numel() for x in first if x.ndim > 1),
        embeddings.weight.numel(),
        (0, 0) if reward else tuple(head.weight.shape),
        not reward and head.weight is embeddings.weight,
        max(x.numel() for x in model.parameters()),
    )
    for module in model.modules():
        if isinstance(module, torch.nn.ModuleList) and layers[0] in [*module]:
            del module[2:]
    if plan.dtype == "bfloat16":
        models.raise_embeddings(model)
    if plan.lora_rank:
        models.add_lora(model, plan.lora_rank)
    if plan.dtype == "bfloat16":
        models.to_bfloat16(model, "meta")
    if plan.gradient_checkpointing:
        models.checkpoint_layers(model)
    adapters = sum(x.numel() for name, x in model.named_parameters() if "lora_" in name)
    embeddings.weight.requires_grad_(False)  # `estimate` adds their gradient
    embeddings.register_forward_hook(lambda module, inputs, states: states.detach().requires_grad_())
    joined = layout == "tree" and len(examples) > FEW
    batch = tree.collate(_joined(examples) if joined else examples, layout, 0)
    batch.attention_mask = None  # the library looks at a mask's values
    after: list[int] = []
    places, dtype = batch.ends if reward else batch.sources, models.DTYPES[plan.dtype]
    with _without_data(model):
        for bucket in batch.segments.buckets if joined else ():
            bucket.mask(None)  # not counted, since those of joined trees are too large
        with LiveBytes([*model.parameters(), *model.buffers()]) as live:
            for layer in models.layers(model):
                layer.register_forward_hook(lambda *_: after.append(live.now))
            states = scoring.hidden_states(model, batch, places, dtype)
            kept, live.peak = live.now, 0
            states.sum().backward()
    each = after[-1] - after[0] if len(after) > 1 else after[0]
    adapters = adapters * len(layers) // len(after)
    return Shape(*counts, adapters, measure(examples, layout)[0], each, kept - len(after) * each, live.peak - kept)


def _joined(examples: Sequence[Example]) -> list[Example]:
    """A few trees with as many tokens, targets and keys in all, so that attention takes few operations to trace."""
    join = lambda rows: [[*itertools.chain(*parts)] for parts in itertools.zip_longest(*rows, fillvalue=())]  # noqa: E731
    trees = []
    for group in (examples[i::FEW] for i in range(FEW)):
        trained = join(e.trained or [[True] * len(r) for r in e.responses] for e in group)
        prompt = [token for e in group for token in e.prompt]
        trees.append(replace(group[0], prompt=prompt, responses=join(e.responses for e in group), trained=trained))
    return trees


@contextmanager
def _without_data(model) -> Iterator[None]:
    """Turn a model on the meta device into one on the CPU whose tensors have no data, for autocast. Its gradients are
    freed as soon as they are complete."""
    log = logging.getLogger("torch._subclasses.fake_tensor")
    level = log.level
    log.setLevel(logging.CRITICAL)  # an operation that cannot be traced is an exception, too
    empty = lambda x: torch.empty(x.shape, dtype=x.dtype)  # noqa: E731
    try:
        with FakeTensorMode(allow_non_fake_inputs=True):
            for module in model.modules():
                for name, x in [*module.named_parameters(recurse=False, remove_duplicate=False)]:
                    module._parameters[name] = weight = torch.nn.Parameter(empty(x), x.requires_grad)
                    if x.requires_grad:
                        weight.register_post_accumulate_grad_hook(lambda weight: setattr(weight, "grad", None))
                for name, x in [*module.named_buffers(recurse=False)]:
                    module._buffers[name] = empty(x)
            yield
    finally:
        log.setLevel(level)


# ------------------------------------------------------------------------------------------------- bytes and operations


def state_bytes(elements: float | int, plan: Plan, trained: bool = True, shards: int = 1) -> dict[str, float]:
    """Bytes on each device of weights and, if they are trained, of what belongs to them. A weight takes

    weights      4; with --dtype bfloat16 in one process 2
    low bits     of its master, there: 2
    gradients    4, or 2 with --gradient-dtype bfloat16
    optimizer    8, or with --optimizer-state 8bit 2 + 12 / 256 (norms and biases, which keep 8, are not told apart)
    """
    half = plan.dtype == "bfloat16" and shards == 1
    each = {"weights": 2.0 if half else 4.0, "low bits": 0.0, "gradients": 0.0, "optimizer": 0.0}
    if trained:
        each["low bits"] = 2.0 if half else 0.0
        each["gradients"] = 2.0 if plan.gradient_dtype == "bfloat16" else 4.0
        each["optimizer"] = 2 + 12 / BLOCK if plan.optimizer_state == "8bit" else 8.0
    return {name: elements * size / shards for name, size in each.items()}


def head_bytes(n: int, v: int, d: int, plan: Plan) -> tuple[float | int, ...]:
    """Bytes of `token_logps` for n tokens: kept from its forward to its backward pass, and what each pass takes in
    addition. The backward pass makes gradients of hidden states (n d) and, without adapters, of the weight (v d)."""
    low = plan.dtype == "bfloat16" and plan.on_gpu  # a CPU converts to float32
    size = 2 if low else 4
    tile_bytes = default_tile_bytes(v, 4, plan.on_gpu)
    keep_bytes = (plan.keep_softmax_mib if plan.keep_softmax_mib is not None else 10240 if plan.on_gpu else 1024) << 20
    rows = max(1, min(n, tile_bytes // (4 * v)))
    kept = size * n * d + (4 * v * d if size == 4 and plan.dtype == "bfloat16" else 0)
    tile, d_hidden = 4 * rows * v, 4 * n * d
    if plan.lora_rank:  # frozen: the gradient of the hidden states is kept, and the softmax of one tile is not
        return kept + size * n * d, rows * v * size + 12 * rows * d + (tile if low else 0), d_hidden
    d_weight = v * d * (2 if low and plan.gradient_dtype == "bfloat16" else 4)
    if size * n * v <= keep_bytes:
        return kept + size * n * v, tile if low else 0, d_hidden + d_weight
    slices = min(tile_bytes, 4 * n * v) * (1.5 if low else 3)  # logits, softmax, gradient
    return kept, tile, d_hidden + d_weight + slices


def estimate(shape: Shape, steps: Sequence[Sequence[Size]], plan: Plan, others: float = 0.0) -> dict[str, float]:
    """Bytes of training on each device: of each part at its largest, and the `peak` of their sum, which is smaller.

    `steps` are the micro-batches of each optimizer step; `others` are the bytes of other models. The sum is largest in
    one of the two passes of the log-prob kernel, in the backward pass of the last layer, of the first one or of the
    embeddings, or in the optimizer. Only the first micro-batch of a step begins without gradients.
    """
    words, width = shape.head
    lora, half, shards = plan.lora_rank > 0, plan.dtype == "bfloat16", plan.processes
    parts = state_bytes(shape.adapters if lora else shape.elements, plan, shards=1 if lora else shards)
    if lora:
        parts["weights"] += state_bytes(shape.elements, plan, trained=False, shards=shards)["weights"]
    parts |= {"gathered": 0.0, "others": others, "activations": 0.0, "logits": 0.0}
    if shards > 1:  # embeddings, head and two layers, and but for one layer their gradients and float32 sums of them
        size, outside = 2 if half else 4, shape.elements - shape.layers * shape.layer_elements
        gradient = 0 if lora else size + 4
        parts["gathered"] = outside * (size + gradient) + shape.layer_elements * (2 * size + gradient)
    held = sum(parts[name] for name in ("weights", "low bits", "optimizer", "gathered", "others"))

    sums, size = parts["gradients"], 2 if plan.gradient_dtype == "bfloat16" else 4
    whole = not lora and shards == 1  # else no gradient of head and embeddings, or it is part of `gathered`
    d_head = words * width * (size if plan.on_gpu else 4) * whole
    d_embeddings = shape.embeddings * (2 if half else 4) * whole
    update = 33 if plan.optimizer_state == "8bit" else 20 if half and not plan.on_gpu else 0  # of rlhf.optim, measured
    update *= min(CHUNK, shape.largest) * whole
    parts["peak"] = held + sums + update
    for sizes in steps:
        for i, (tokens, scored) in enumerate(sizes):
            kept, outside, transient = (x * tokens / shape.tokens for x in shape[-3:])
            activations = outside + shape.layers * kept
            in_head, forward, backward = head_bytes(scored, words, width, plan) if words else (0, 0, 0)
            if not lora and shards > 1:
                backward -= 4 * words * width
            before, tied = sums if i else 0, d_head * shape.tied  # the head's gradient waits for that of the embeddings
            until_first = sums - (0 if i else (shape.embeddings + shape.layer_elements) * size * whole)
            at_end = sums + (tied + d_embeddings if i else d_embeddings * (shape.tied or half))
            parts["activations"] = max(parts["activations"], activations + transient)
            parts["logits"] = max(parts["logits"], in_head + max(forward, backward))
            parts["peak"] = held + max(
                parts["peak"] - held,
                before + activations + in_head + max(forward, backward),
                (before + tied if i or shape.tied else d_head) + activations + transient,
                until_first + tied + outside + kept + transient,
                at_end + outside,
            )
    return {name: float(size) for name, size in parts.items()}


def operations(shape: Shape, tokens: int, scored: int, plan: Plan | None = None) -> int:
    """Floating-point operations of the products with weights; attention does not count. A token takes for each weight

        6 if weights are trained, 4 if adapters are, 2 without a backward pass (no plan); 2 more in recomputed layers

    The head counts on scored tokens only.
    """
    each = 2 if plan is None else 4 if plan.lora_rank else 6
    again = 2 if plan and plan.gradient_checkpointing else 0
    words, width = shape.head
    return shape.layers * shape.layer_matrices * tokens * (each + again) + words * width * scored * each
