"""The decode loop: one token's step, from embedding to sampled token, that a CUDA graph can hold.

Rows are prompts with their answers. A prompt is encoded once, padded to the right, and its keys and values are copied
to the rows of its k answers. Then every row gets one token a step. All that a step reads and writes has a fixed place:

    slot of the cache     0  1  2  3  4 | 5  6  7 ...        prompts of 4 and 6 tokens; the last of a prompt is the
    its token's position  0  1  2  -  - | 3  4  5 ...        input of the first step
                          0  1  2  3  4 | 5  6  7 ...

A step writes one slot for all rows, and a row sees the slots whose position is not behind its own (nor, with a sliding
window, too far before it). So there is no padding that a model could see, and no step depends on the number of tokens
so far. On CUDA a step is captured once and replayed; on a CPU, and in several processes, it runs as it is. With
--compile the layers are compiled here too; the attention, which then also writes the cache, stays eager.

Rows that have ended stay until half of the rows are enough for the others. Those then move to the first half, which
gets a graph of its own. A graph lives until its rows move or end: it holds the weights' addresses, and memory.
"""

import functools
import inspect
from collections.abc import Callable, Sequence
from contextlib import nullcontext

import torch
import transformers
from einops import rearrange, repeat
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers.cache_utils import Cache, StaticLayer

from rlhf import logprobs
from support import models, parallel
from support.sharding import as_forward

# LOOK_EVERY: steps between two checks for ended rows, since on CUDA the CPU waits for a check. FEWEST: at most so many
# rows are not halved any further, since on CUDA each number of rows needs a graph of its own
LOOK_EVERY, FEWEST = {"cpu": 1, "cuda": 16}, {"cpu": 1, "cuda": 32}
NEVER = 1 << 40  # a position that no row reaches
ONE_TOKEN = "sdpa_one_token"  # the name of `one_token_attention`


def cache_name(model) -> str:
    """The library's keyword for a key-value cache: "cache" from version 5.24 on."""
    return "cache" if "cache" in inspect.signature(models.backbone(model).forward).parameters else "past_key_values"


class Slots(StaticLayer):
    """A layer's keys and values, (b heads slots d). The first update brings those of the prompts, and stores them k
    times; each later one brings a token of the first rows, and stores it at `slot`, which the caller moves on."""

    def __init__(self, k: int, slots: int, slot: Int[Tensor, "1"], dtype: torch.dtype):
        super().__init__(slots)
        self.k, self.slot, self.dtype = k, slot, dtype

    def update(self, keys: Tensor, values: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.keys, self.values = self._stored(keys), self._stored(values)
            self.is_initialized = True
            return keys, values
        b = len(keys)
        for place, new in ((self.keys, keys), (self.values, values)):
            place[:b].index_copy_(2, self.slot, new.to(place.dtype))
        return self.keys[:b], self.values[:b]

    def _stored(self, x: Tensor) -> Tensor:
        dtype = x.dtype if self.dtype == torch.float32 else self.dtype
        places = x.new_zeros(len(x) * self.k, x.shape[1], self.max_cache_len, x.shape[3], dtype=dtype)
        places[:, :, : x.shape[2]] = x.repeat_interleave(self.k, 0)
        return places

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return query_length, 0  # asked for prompts only

    def get_seq_length(self) -> int:
        return 0  # positions are given


class Rows:
    """The rows that are decoded together: k answers to each prompt. The first `size` of them take part in a step.

    Row i gets most[i] tokens, or ends with one of `ends`. `choose(logits, rows, number)` gives the next token and its
    log-prob, where `rows` are the numbers of the rows (b = p k, in order) and `number` that of the token.
    NotImplementedError, TypeError, ... for architectures that have no such cache.
    """

    def __init__(
        self,
        model,
        prompts: Sequence[list[int]],
        k: int,
        most: list[int],
        choose,
        ends,
        pad: int,
        dtype: torch.dtype,
        compiled: bool = False,
    ):
        self.model, self.choose, self.size, self.dtype, self.compiled = model, choose, len(most), dtype, compiled
        self.windows = windows(model.config.get_text_config())
        device, width = model.device, max(max(map(len, prompts)) - 1, 1)
        steps = max(parallel.gather([max(most)]))  # in which all processes take part
        slots = -(-(width + steps) // 16) * 16  # the kernels on CUDA like multiples of 16
        ids = torch.tensor([[*p[:-1], *[pad] * (width + 1 - len(p))] for p in prompts], device=device)
        lengths = torch.tensor([len(p) - 1 for p in prompts for _ in range(k)], device=device)[:, None]
        place = torch.arange(slots, device=device)
        self.positions = torch.where(place < width, place, place - width + lengths)  # of the tokens in the slots
        self.positions.masked_fill_((place >= lengths) & (place < width), NEVER)
        self.token = torch.tensor([[p[-1]] for p in prompts for _ in range(k)], device=device)
        self.position, self.last = lengths, (models.positions(model) or NEVER) - 1
        self.row = torch.arange(len(most), device=device)
        self.ended = torch.zeros(len(most), dtype=torch.bool, device=device)
        self.ends, self.most = torch.tensor(ends, device=device), torch.tensor(most, device=device)
        self.number = torch.tensor([0], device=device)
        self.slot = slot = torch.tensor([width], device=device)
        self.tokens = torch.zeros(len(most), steps, dtype=torch.long, device=device)
        self.logps = torch.zeros(len(most), steps, device=device)
        # a function that holds self would keep the cache in memory until Python looks for cycles
        self.cache = Cache(layer_class_to_replicate=lambda: Slots(k, slots, slot, dtype))
        with models.eager(model):
            _encode(model, ids, self.cache, self.causal_mask(*ids.shape))
        if not self.cache.layers:
            raise NotImplementedError("its layers put nothing into the cache")

    def step(self) -> None:
        """Draw the next token of the first `size` rows. Reads nothing back to the CPU, and changes no shape."""
        n = self.size
        state = {"attention_mask": self.mask(), "position_ids": self.position[:n]}
        if self.compiled:  # a layer that writes the cache itself would be compiled once for each layer
            state |= {"slots": self.cache, "use_cache": False}
        else:
            state |= {cache_name(self.model): self.cache, "use_cache": True}
        row = self.row[:n]
        token, logp = self.choose(self.logits(self.token[:n], **state), row, self.number)
        self.tokens.index_put_((row, self.number), token)
        self.logps.index_put_((row, self.number), logp)
        self.ended[:n] |= (token[:, None] == self.ends).any(1) | (self.number + 1 >= self.most[row])
        self.token[:n, 0] = token
        self.position[:n] = (self.position[:n] + 1).clamp(max=self.last)
        self.number += 1
        self.slot += 1

    def logits(self, ids: Int[Tensor, "b 1"], **state) -> Float[Tensor, "b v"]:
        """The logits after these tokens. In half precision on CUDA they are those of training: the library would round
        them, which moves a log-prob by 0.03 nats where logits are about 20."""
        if self.dtype == torch.float32 or self.model.device.type != logprobs.GPU or parallel.several():
            return self.model(ids, **state).logits[:, -1]
        states = models.backbone(self.model)(ids, **state).last_hidden_state[:, -1].to(self.dtype)
        with torch.autocast(logprobs.GPU, enabled=False):
            return logprobs.logits(states, models.output_head(self.model))

    def mask(self) -> Tensor | dict[str, Tensor]:
        """What each row sees of the slots, (b 1 1 slots): numbers that are added to scores, for each kind of layer."""
        positions, position = self.positions[: self.size], self.position[: self.size]
        dtype, masks = self.cache.layers[0].keys.dtype, {}
        for kind, window in self.windows.items():
            hidden = positions > position
            if window:
                hidden |= positions <= position - window
            mask = torch.zeros_like(hidden, dtype=dtype).masked_fill(hidden, torch.finfo(dtype).min)
            masks[kind] = rearrange(mask, "b slots -> b 1 1 slots")
        return masks if len(masks) > 1 else masks[kind]

    def causal_mask(self, p: int, t: int) -> Tensor | dict[str, Tensor] | None:
        """What each token of the prompts sees of them, (p 1 t t), where heads share keys in float32 on CUDA: without a
        mask no fused kernel takes those, and the scores of all heads would be in memory. None elsewhere."""
        if self.dtype != torch.float32 or self.row.device.type != logprobs.GPU:
            return None
        config = self.model.config.get_text_config()
        if getattr(config, "num_key_value_heads", None) in (None, config.num_attention_heads):
            return None
        i = torch.arange(t, device=self.row.device)
        distance, masks = i[:, None] - i, {}
        for kind, window in self.windows.items():
            hidden = (distance < 0) | (distance >= (window or t))
            mask = torch.zeros(t, t, device=i.device, dtype=self.model.dtype)
            masks[kind] = mask.masked_fill_(hidden, torch.finfo(mask.dtype).min).expand(p, 1, t, t)
        return masks if len(masks) > 1 else masks[kind]

    def keep(self, size: int, ended: list[bool]) -> None:
        """Move the rows that go on, and as many others as it takes, to the first `size` places."""
        rows = sorted(range(len(ended)), key=lambda i: ended[i])[:size]
        rows = torch.tensor(rows, device=self.row.device)
        layers = [x for layer in self.cache.layers for x in (layer.keys, layer.values)]
        for x in (self.positions, self.token, self.position, self.row, self.ended, *layers):
            x[:size] = x[rows]
        self.size = size


@as_forward
def _encode(model, ids: Int[Tensor, "p t"], cache: Cache, mask) -> None:
    """Fill the cache with right-padded prompts: causal attention keeps the padding out of what comes before it."""
    state = {"position_ids": repeat(torch.arange(ids.shape[1], device=ids.device), "t -> p t", p=len(ids))}
    models.backbone(model)(ids, attention_mask=mask, use_cache=True, **state, **{cache_name(model): cache})


def windows(config) -> dict[str, int | None]:
    """The sliding window of each kind of layer that a model has; None: the layer sees everything. NotImplementedError
    if it has layers of another kind."""
    window = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None) or ["sliding_attention" if window else "full_attention"]
    known = {"full_attention": None, "sliding_attention": window}
    if unknown := sorted({*kinds} - known.keys()):
        raise NotImplementedError(f"it has layers of the kind {unknown[0]}")
    return {kind: known[kind] for kind in sorted({*kinds})}


def one_token_attention(
    module, query, key, value, attention_mask, scaling=None, slots: Cache | None = None, **kwargs
) -> tuple[Tensor, None]:
    """SDPA of one token in each row. The heads that share keys become queries of one head, so that keys and values are
    not copied for each of them (transformers 5.17 would do that). If it gets `slots`, it puts the token there first."""
    if slots is not None:
        key, value = slots.update(key, value, module.layer_idx)
    query = rearrange(query, "b (heads group) 1 d -> b heads group d", heads=key.shape[1])
    out = scaled_dot_product_attention(query, key, value, attn_mask=attention_mask, scale=scaling)
    return rearrange(out, "b heads group d -> b 1 (heads group) d"), None


def compiles(model) -> bool:
    """Whether steps can run the layers compiled: after `models.compile_layers`, with SDPA, in one process."""
    return models.compiled(model) and _uses_sdpa(model) and not parallel.several()


def _uses_sdpa(model) -> bool:
    return model.config._attn_implementation in ("sdpa", models.MASKED, ONE_TOKEN)


def attention(model) -> models.Attention:
    """A context in which the model attends as steps need it: where it uses SDPA, with `one_token_attention`."""
    transformers.AttentionInterface.register(ONE_TOKEN, models.uncompiled(one_token_attention))
    return models.Attention(model, ONE_TOKEN if _uses_sdpa(model) else model.config._attn_implementation)


def decode(rows: Rows) -> tuple[Int[Tensor, "b t"], Float[Tensor, "b t"]]:
    """The tokens of all rows and their log-probs; what follows a row's end is void."""
    device, replay = rows.row.device, None
    with attention(rows.model), nullcontext() if rows.compiled else models.eager(rows.model):
        for number in range(rows.tokens.shape[1]):
            if number and number % LOOK_EVERY[device.type] == 0:
                ended = rows.ended[: rows.size].tolist()
                waiting = ended.count(False)
                if not parallel.add_up(waiting, device):
                    break
                size = rows.size
                while size > FEWEST[device.type] and waiting <= (size + 1) // 2:
                    size = (size + 1) // 2
                if size < rows.size:
                    rows.keep(size, ended)
                    replay = None
            compiling = rows.compiled and number == 0  # in which the CPU may wait for the GPU
            if device.type == "cpu" or parallel.several() or compiling:
                rows.step()
            elif replay:
                replay()
            else:
                replay = _captured(rows)
    return rows.tokens, rows.logps


def _captured(rows: Rows) -> Callable[[], None]:
    """Run a step as it is, which also warms up what must not happen first in a capture, and capture the next ones. A
    step in which the CPU waits for the GPU cannot be captured; a line says so, and the next ones run as they are."""
    stream, graph, problem = _side_stream(), torch.cuda.CUDAGraph(), ""
    stream.wait_stream(torch.cuda.current_stream())
    mode = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        with torch.cuda.stream(stream):
            rows.step()
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        problem = str(error)[:100] or type(error).__name__
    finally:
        torch.cuda.set_sync_debug_mode(mode)
        torch.cuda.current_stream().wait_stream(stream)
    if problem:
        print(f"sampling: no CUDA graph can hold a step of {rows.model.config.model_type}: {problem}")
        rows.step()
        return rows.step
    with torch.cuda.stream(stream), torch.cuda.graph(graph, stream=stream):  # records, and runs nothing
        rows.step()
    return graph.replay


@functools.cache
def _side_stream() -> torch.cuda.Stream:
    """The stream of all captures, one after another: the matrix products keep a workspace for each stream."""
    return torch.cuda.Stream()
