"""Sampling from exactly softmax(logits / temperature), with a decode loop of our own (support/decode.py).

A token is drawn by inverting the distribution at one uniform number, a hash of seed, prompt, answer and token number.
So an answer depends on no other row: neither on the batch, nor on rows that leave it, nor on the number of processes.

Before a model is first used, `choose_sampler` compares its log-probs of given tokens, as each of four ways of sampling
computes them, with those of support/scoring.py. The first that agrees samples:

    compiled  our loop with compiled layers, after --compile
    loop      our loop: any transformer whose keys and values fit in fixed places
    library   the library's `generate`, with prompts of several lengths padded to the left
    alone     the library's `generate`, with one row at a time (a model that ignores the mask, or mixes up rows)
"""

import functools
import hashlib
import itertools
import math
import weakref
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import no_type_check

import torch
import transformers
from einops import rearrange, repeat
from jaxtyping import Float, Float64, Int
from torch import Tensor
from tqdm import tqdm

from rlhf import require
from rlhf.tree import Tree
from support import decode, models, one_line, parallel, reviews, scoring, sharding, tokens
from support.examples import Example

SAMPLERS = {
    "compiled": "the compiled decode loop",
    "loop": "the decode loop",
    "library": "the library's generate",
    "alone": "the library's generate, one answer at a time",
}
MEAN_ROUNDING = 0.1  # nats a token; SmolLM2-135M in bfloat16: 0.02 to 0.03, and at single tokens up to 0.23
BLOCK = 64  # tokens of the vocabulary whose probabilities are added up first
_samplers: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()  # model -> {dtype: (tokens checked, its sampler)}


def end_ids(model, tokenizer) -> list[int]:
    """Every token id that ends a response: the tokenizer's EOS, and those in the model's own generation settings."""
    ids = model.generation_config.eos_token_id
    ids = ids if isinstance(ids, list) else [ids]
    return sorted({i for i in (*ids, tokenizer.eos_token_id) if i is not None})


@torch.no_grad()
def generate(
    model,
    tokenizer,
    prompts: Sequence[list[int]],
    max_new_tokens: int,
    temperature: float = 1.0,
    seed: int = 0,
    batch_size: int = 256,
    k: int = 1,
    dtype: torch.dtype = torch.float32,
    progress: str = "",
) -> tuple[list[list[int]], list[list[float]]]:
    """k responses (token ids, with the EOS if it was reached) to each prompt (token ids), prompt after prompt; and the
    log-prob (nats) of each of their tokens under the distribution that it was drawn from.

    y_i ~ softmax(logits / temperature); at temperature 0 greedy, with log-probs at temperature 1. The model's own
    generation settings (top-k, top-p, repetition penalty, ...) are left out. The same seed and prompt give the same
    responses, up to rounding, whatever the other prompts, `batch_size` (in sequences) and the number of processes
    (support/parallel.py) are; a prompt that is asked again gets other ones. The global random state is not used. If the
    model has learnt a number of positions, a response is cut at the last one. Matrix products are in `dtype`.
    `progress` names a progress bar.
    """
    pad, limit = _filler(model, models.pad_id(tokenizer)), models.positions(model) or math.inf
    if not prompts:
        return [], []
    longest = max(map(len, prompts))
    require(longest < limit, f"a prompt has {longest} tokens, and the model {limit} positions")
    sampler = choose_sampler(model, prompts, max_new_tokens, pad, dtype)
    if sampler == "alone":
        prompts, k, batch_size = [p for p in prompts for _ in range(k)], 1, 1
    ends, keys, prompts_at_once = end_ids(model, tokenizer), noise_keys(seed, prompts, k), max(batch_size // k, 1)
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    groups = [order[i : i + prompts_at_once] for i in range(0, len(order), prompts_at_once)]
    responses: dict[int, list[tuple[list[int], list[float]]]] = {}
    with scoring.progress_bar(progress, len(groups) * max_new_tokens, "step") as bar:
        for n, group in enumerate(groups, 1):
            local_group = parallel.local_items(group)
            asked = [prompts[i] for i in local_group]
            group_keys = torch.tensor([key for i in local_group for key in keys[i]], device=model.device)
            most = [min(max_new_tokens, limit - len(p)) for p in asked for _ in range(k)]
            choose = sampling(group_keys, temperature, sampler == "compiled")
            if progress and model.device.type == "cpu":  # on CUDA a step is a recorded graph
                choose = _counted(choose, bar)
            ids, logps = (x.tolist() for x in _run(sampler, model, asked, k, most, choose, ends, pad, dtype))
            cut = [_until_end(*row, ends) for row in zip(ids, logps, most, strict=True)]
            responses |= {i: cut[place * k : (place + 1) * k] for place, i in enumerate(local_group)}
            bar.update(max(n * max_new_tokens - bar.n, 0))
    responses = dict(parallel.gather([*responses.items()]))
    ids, logps = zip(*(response for i in range(len(prompts)) for response in responses[i]), strict=True)
    return [*ids], [*logps]


def _counted(choose: "Choose", bar: tqdm) -> "Choose":
    """`choose`, which moves a bar by one step."""

    def counted(*drawn):
        bar.update()
        return choose(*drawn)

    return counted


def _until_end(ids: list[int], logps: list[float], most: int, ends: Sequence[int]) -> tuple[list[int], list[float]]:
    """A row's tokens up to the first end, at most `most`, and their log-probs."""
    stop = next((i + 1 for i, token in enumerate(ids[:most]) if token in ends), most)
    return ids[:stop], logps[:stop]


def _filler(model, pad_id: int) -> int:
    """An id for places that are masked: any that the model has will do."""
    return min(pad_id, model.get_input_embeddings().num_embeddings - 1)


# --------------------------------------------------------------------------------------------------- drawing one token

Choose = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]  # logits, rows, number of the token -> token, logp


def noise_keys(seed: int, prompts: Sequence[list[int]], k: int) -> list[list[int]]:
    """A 64-bit key for each prompt's k answers: a hash of seed, prompt, and the number of the answer to it."""
    asked: Counter = Counter()
    keys = []
    for prompt in prompts:
        text = f"{seed} {prompt}"
        digests = [hashlib.sha256(f"{text} {asked[text] + i}".encode()).digest() for i in range(k)]
        keys.append([int.from_bytes(digest[:8], "little", signed=True) for digest in digests])
        asked[text] += k
    return keys


def uniform(keys: Int[Tensor, " b"], number: Int[Tensor, "1"]) -> Float64[Tensor, " b"]:
    """Number `number` of each key's own stream of uniform numbers in (0, 1): SplitMix64 (Steele et al. 2014), of whose
    64 bits 50 are used. All of them are exact, and none is 0 or rounds to 1."""
    x = keys + (number + 1) * -0x61C8864680B583EB  # 64-bit integers wrap; the factors are the paper's, signed
    for shift, factor in ((30, -0x40A7B892E31B1A47), (27, -0x6B2FB644ECCEEE15), (31, 1)):
        x = (x ^ ((x >> shift) & ((1 << (64 - shift)) - 1))) * factor
    return (((x >> 14) & ((1 << 50) - 1)).double() + 0.5) * 2.0**-50


def sampling(keys: Int[Tensor, " b"], temperature: float, compiled: bool = False) -> Choose:
    """Draw the first token at which the cumulative distribution exceeds the row's uniform number; greedy at temperature
    0. The sums are float64, so that a token as rare as 1e-12 comes as often as it should."""
    measure = _compiled_distribution() if compiled else _distribution

    def choose(logits, rows, number):
        logps, sums = measure(logits, temperature or 1.0)
        token = logits.argmax(-1) if temperature == 0 else _draw(logps, sums, uniform(keys[rows], number))
        return token, logps.gather(1, token[:, None])[:, 0]

    return choose


@no_type_check  # it may be compiled
def _distribution(logits: Tensor, temperature: float) -> tuple[Float[Tensor, "b v"], Float64[Tensor, "b blocks"]]:
    """Log-probs, and the probability of each block of BLOCK tokens."""
    if torch.compiler.is_compiling():
        torch._dynamo.mark_static(logits, 1)
    logps = (logits.float() / temperature).log_softmax(-1)
    probs = torch.nn.functional.pad(logps.exp(), (0, -logps.shape[1] % BLOCK))
    return logps, rearrange(probs, "b (blocks i) -> b blocks i", i=BLOCK).sum(-1, dtype=torch.float64)


@functools.cache
def _compiled_distribution():
    return torch.compile(_distribution, dynamic=True)


def _draw(
    logps: Float[Tensor, "b v"], sums: Float64[Tensor, "b blocks"], u: Float64[Tensor, " b"]
) -> Int[Tensor, " b"]:
    """The first token at which the cumulative distribution exceeds u: first its block, then its place there, by the
    share of the block that is left. So each block has the probability of its sum, and its tokens share that by their
    own. What rounding leaves beyond the last sum belongs to the last token that has a probability."""
    ends = sums.cumsum(-1)
    wanted = u[:, None] * ends[:, -1:]
    block = ((ends <= wanted) & (ends < ends[:, -1:])).sum(-1, keepdim=True)
    starts = torch.nn.functional.pad(ends, (1, 0)).gather(1, block)
    tokens = block * BLOCK + torch.arange(BLOCK, device=block.device)
    probs = logps.gather(1, tokens.clamp(max=logps.shape[1] - 1)).exp().double() * (tokens < logps.shape[1])
    places = probs.cumsum(-1)
    wanted = (wanted - starts) / sums.gather(1, block) * places[:, -1:]
    return block[:, 0] * BLOCK + ((places <= wanted) & (places < places[:, -1:])).sum(-1)


def given(responses: Sequence[list[int]], temperature: float, device: torch.device) -> Choose:
    """Take the tokens of given responses, and 0 after them."""
    width = max(map(len, responses))
    ids = torch.tensor([r + [0] * (width - len(r)) for r in responses], device=device)

    def choose(logits, rows, number):
        token = ids[rows, number]
        return token, (logits.float() / temperature).log_softmax(-1).gather(1, token[:, None])[:, 0]

    return choose


# --------------------------------------------------------------------------------------- which code computes the logits


def _run(sampler: str, model, prompts, k: int, most: list[int], choose: Choose, ends, pad: int, dtype: torch.dtype):
    """Tokens and log-probs of k answers to each prompt, (p k) rows of max(most); what follows a row's end is void."""
    models.set_attention(model.eval(), packed=False)
    with sharding.gathered(model, dtype), sharding.autocast(model, dtype):
        if sampler in ("compiled", "loop"):
            rows = decode.Rows(model, prompts, k, most, choose, ends, pad, dtype, sampler == "compiled")
            return decode.decode(rows)
        with models.eager(model):
            return _library(model, prompts, k, most, choose, ends, pad)


def _library(model, prompts, k: int, most: list[int], choose: Choose, ends, pad: int):
    """`_run` with the library's `generate`, from prompts padded to the left. `choose` is a logits processor that leaves
    only its token possible."""
    device, sizes = model.device, (max(map(len, prompts)), max(most))
    width, longest = (max(parallel.gather([x])) for x in sizes)  # so that all processes make the same steps
    ids = [[pad] * (width - len(p)) + p for p in prompts]
    mask = [[0] * (width - len(p)) + [1] * len(p) for p in prompts]
    ids, mask = (repeat(torch.tensor(x, device=device), "p t -> (p k) t", k=k) for x in (ids, mask))
    rows, ends, logps = torch.arange(len(ids), device=device), torch.tensor(ends, device=device), []

    def draw(ids: Tensor, logits: Tensor) -> Tensor:
        token, logp = choose(logits, rows, torch.full((1,), ids.shape[1] - width, device=device))
        logps.append(logp)
        return torch.full_like(logits, -torch.inf).scatter(1, token[:, None], 0.0)

    def all_ended(ids: Tensor, _) -> Tensor:
        waiting = len(ids) - int(torch.isin(ids[:, width:], ends).any(1).sum())
        return torch.full((len(ids),), parallel.add_up(waiting, device) == 0, device=device)

    number = min(longest, (models.positions(model) or math.inf) - width)
    config = transformers.GenerationConfig(max_new_tokens=number, pad_token_id=pad, do_sample=False)
    own, model.generation_config = model.generation_config, transformers.GenerationConfig()
    try:
        out = model.generate(
            ids,
            attention_mask=mask,
            generation_config=config,
            logits_processor=transformers.LogitsProcessorList([draw]),
            stopping_criteria=transformers.StoppingCriteriaList([all_ended]),
        )
    finally:
        model.generation_config = own
    return out[:, width:], torch.stack(logps, 1)


@torch.no_grad()
def choose_sampler(model, prompts: Sequence[list[int]], max_new_tokens: int, pad_id: int, dtype: torch.dtype) -> str:
    """compiled, loop, library or alone: the first whose log-probs of given tokens are those of the scorer. The rows are
    of three lengths; the longest is as long as any prompt with its response may get. The tolerance is that of the
    layout check (`scoring.tolerance`), or a mean in half precision. A line says so if it is not the first one. BadInput
    if none agrees.

    `generate` calls this; scripts that sample only at their end also call it at their start. The result is remembered
    with the model object, for sequences of up to the length that was checked, so no rollout repeats the check.
    """
    pad, longest, shortest = _filler(model, pad_id), max(prompts, key=len), min(prompts, key=len)
    length = min(1 << (len(longest) + max_new_tokens - 1).bit_length(), models.positions(model) or math.inf)
    models.set_attention(model, packed=False)
    candidates = [*SAMPLERS][0 if decode.compiles(model) else 1 :]
    checked, before = _samplers.setdefault(model, {}).get(dtype, (0, None))
    if checked >= length:
        return before
    text = [*itertools.islice(itertools.cycle(longest), length)]
    n = min(8, length - 1)
    rows = [(text[:-n], text[-n:]), (text[: -(-(length - n) // 2)], text[:n]), (shortest[: length - n], text[:n])]
    rows = [SimpleNamespace(prompt=prompt, responses=[response], trained=None) for prompt, response in rows]
    batching = scoring.Batching("padded", pad, dtype)
    with models.eager(model):
        plain = torch.cat([scoring.token_numbers(model, [row], batching, "padded") for row in rows])
        allowed = scoring.tolerance(model, rows, plain, batching)
        if dtype != torch.float32:  # our loop may use the scorer's head, and would not show that it is wrong
            scoring.check_against_library(model, rows, plain, batching)
    reasons = {}
    for sampler in candidates:
        found = parallel.gather([_misfit(sampler, model, rows, plain, allowed, pad, dtype)])
        reasons[sampler] = next(filter(None, found), None)
        if not reasons[sampler]:
            break
    kind = model.config.model_type
    require(not reasons[sampler], f"{kind}: cannot be sampled from: {reasons[sampler]}")
    first = candidates[0]
    if sampler not in (before, first):
        print(f"sampling: with {SAMPLERS[sampler]}, because {SAMPLERS[first]} does not fit {kind} ({reasons[first]})")
    _samplers[model][dtype] = length, sampler
    return sampler


def _misfit(sampler: str, model, rows: Sequence[Tree], plain, allowed: float, pad: int, dtype) -> str | None:
    """Why a way of sampling does not fit the model; None if its log-probs are `plain`, up to `allowed` at every token
    or, in half precision, where single tokens can be far off, up to MEAN_ROUNDING on average."""
    groups = [[row] for row in rows] if sampler == "alone" else [rows]
    try:
        logps = [x for group in groups for x in _given_logps(sampler, model, group, 1.0, pad, dtype)]
    except torch.cuda.OutOfMemoryError:
        raise
    except Exception as error:  # whatever the code of an architecture stumbles over
        return one_line(error)
    difference = (torch.cat(logps) - plain).abs()
    if difference.max() <= allowed or (dtype != torch.float32 and difference.mean() <= MEAN_ROUNDING):
        return None
    return f"log-probs differ by {difference.max().item():.2g}, where rounding explains {allowed:.2g}"


def _given_logps(sampler: str, model, rows: Sequence[Tree], temperature: float, pad: int, dtype: torch.dtype):
    """Log-probs of each row's response, as this way of sampling computes them."""
    prompts, responses = [row.prompt for row in rows], [row.responses[0] for row in rows]
    choose = given(responses, temperature, model.device)
    _, logps = _run(sampler, model, prompts, 1, [*map(len, responses)], choose, [], pad, dtype)
    return [x[: len(r)] for x, r in zip(logps, responses, strict=True)]


# ------------------------------------------------------------------------------------------------- answers to examples


def answer(
    model,
    tokenizer,
    examples: Sequence[Example],
    max_new_tokens: int,
    seed: int,
    temperature: float = 1.0,
    k: int = 1,
    dtype: torch.dtype = torch.float32,
    batch_size: int = 256,
    progress: str = "",
) -> list[Example]:
    """The examples' prompts with k sampled responses each, in place of their own; arguments as in `generate`."""
    prompts = [e.prompt for e in examples]
    ids, logps = generate(model, tokenizer, prompts, max_new_tokens, temperature, seed, batch_size, k, dtype, progress)
    pieces = tokens.Pieces(tokenizer)
    contexts = [pieces.context(e.prompt_text) for e in examples]
    texts = [pieces.decode(contexts[i // k], response) for i, response in enumerate(ids)]
    places = [slice(i * k, (i + 1) * k) for i in range(len(examples))]
    unknown = {"ranks": [1] * k, "labels": None, "trained": None, "margin": None, "probability": 1.0}
    return [
        replace(e, responses=ids[place], response_texts=texts[place], sampled_logps=logps[place], **unknown)
        for e, place in zip(examples, places, strict=True)
    ]


def answer_stats(answers: Sequence[Example], ends: Sequence[int], embedded: bool) -> dict[str, list[float]]:
    """Each answer's length and whether it ended; on the embedded task its gold reward and whether it is grammatical."""
    stats = {
        "length": [float(len(e.responses[0])) for e in answers],
        "ended": [float(e.responses[0][-1] in ends) for e in answers],
    }
    if embedded:
        texts = [f"{e.prompt_text} {e.response_texts[0]}".strip() for e in answers]
        stats["gold"] = [reviews.gold_reward(text) for text in texts]
        stats["grammatical"] = [float(reviews.log_prob(text) > float("-inf")) for text in texts]
    return stats
