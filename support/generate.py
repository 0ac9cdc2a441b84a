"""Batched sampling with the library's own `generate`, from exactly softmax(logits / temperature)."""

import inspect
import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
import transformers
from einops import repeat
from jaxtyping import Float, Int
from torch import Tensor

from rlhf import require
from support import models, parallel, reviews, sharding, tokens
from support.examples import Example
from support.sharding import as_forward


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
) -> list[list[int]]:
    """k responses (token ids, with the EOS if it was reached) to each prompt (token ids), prompt after prompt.

    y_i ~ softmax(logits / temperature), and greedy at temperature 0. The model's own generation settings (top-k, top-p,
    repetition penalty, ...) are left out, so that log-probs scored later are those of the sampling distribution. The
    same seed, prompts and batch size give the same responses; the global random state is not touched. Prompts of
    similar length share a batch of `batch_size` sequences, which ends with its longest. A prompt is encoded once, and
    its k responses start from copies of its cache. If the model has learnt a number of positions, responses are cut at
    the last one. Several processes (support/parallel.py) each sample their share of every batch; together they sample
    what one process does, up to rounding. Matrix products are in `dtype`.
    """
    models.set_attention(model.eval(), packed=False)
    device, ends, pad = next(model.parameters()).device, end_ids(model, tokenizer), models.pad_id(tokenizer)
    pad = min(pad, model.get_input_embeddings().num_embeddings - 1)  # it is masked: any id that the model has will do
    config = transformers.GenerationConfig(
        max_new_tokens=max_new_tokens, eos_token_id=ends or None, pad_token_id=pad, do_sample=temperature > 0, top_k=0
    )
    if temperature > 0:
        config.temperature = temperature
    if parallel.several():
        config = transformers.GenerationConfig(max_new_tokens=max_new_tokens, pad_token_id=pad, do_sample=False)
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    responses: list[list[list[int]]] = [[] for _ in prompts]
    prompts_at_once = max(batch_size // k, 1)
    original_config, model.generation_config = model.generation_config, transformers.GenerationConfig()
    try:
        random_state = torch.random.fork_rng(devices=[device] if device.type == "cuda" else [])
        with models.eager(model), random_state, sharding.gathered(model, dtype), sharding.autocast(model, dtype):
            torch.manual_seed(seed)
            for start in range(0, len(order), prompts_at_once):
                group = order[start : start + prompts_at_once]
                width, local_group = max(len(prompts[i]) for i in group), parallel.local_items(group)
                padding = [width - len(prompts[i]) for i in local_group]
                ids = [[pad] * n + prompts[i] for n, i in zip(padding, local_group, strict=True)]
                mask = [[0] * n + [1] * (width - n) for n in padding]
                if limit := models.positions(model):
                    require(width < limit, f"a prompt has {width} tokens, and the model {limit} positions")
                    config.max_new_tokens = min(max_new_tokens, limit - width)
                ids, mask = (torch.tensor(x, device=device) for x in (ids, mask))
                cache = repeated_cache(model, ids[:, :-1], mask[:, :-1], k) if k > 1 and width > 1 else None
                ids, mask = (repeat(x, "p t -> (p k) t", k=k) for x in (ids, mask))
                extra = _in_step(local_group, group, k, width, temperature, ends) | {cache_name(model): cache}
                out = model.generate(ids, attention_mask=mask, generation_config=config, **extra)
                sampled = out[:, width:].tolist()
                for place, i in enumerate(local_group):
                    for tokens in sampled[place * k : (place + 1) * k]:
                        stop = next((j + 1 for j, token in enumerate(tokens) if token in ends), len(tokens))
                        responses[i].append(tokens[:stop])
    finally:
        model.generation_config = original_config
    responses = [next(filter(None, answers)) for answers in zip(*parallel.gather([responses]), strict=True)]
    return [response for answers in responses for response in answers]


def _in_step(
    local_group: Sequence[int], group: Sequence[int], k: int, width: int, temperature: float, ends: Sequence[int]
) -> dict[str, Any]:
    """Arguments with which the library's greedy, endless `generate` samples on several processes what one would sample.

    Every process draws the noise of torch.multinomial for the whole group and uses its own prompts' rows, and none
    stops before all responses have ended. `width` is that of the padded prompts. Empty in one process.
    """
    if not parallel.several():
        return {}
    rows = [group.index(i) * k + j for i in local_group for j in range(k)]

    def draw(_, logits: Tensor) -> Tensor:
        noise = torch.empty(len(group) * k, logits.shape[1], device=logits.device).exponential_()[rows]
        drawn = (logits / temperature).softmax(-1).div(noise).argmax(-1, keepdim=True)
        return torch.full_like(logits, -math.inf).scatter(1, drawn, 0.0)

    def all_ended(ids: Tensor, _) -> Tensor:
        waiting = (~torch.isin(ids[:, width:], torch.tensor(ends, device=ids.device)).any(1)).sum()
        dist.all_reduce(waiting)
        return (waiting == 0).expand(len(ids))

    return {
        "logits_processor": transformers.LogitsProcessorList([draw] if temperature else []),
        "stopping_criteria": transformers.StoppingCriteriaList([all_ended]),
    }


def cache_name(model) -> str:
    """The library's keyword for a key-value cache: "cache" from version 5.24 on."""
    return "cache" if "cache" in inspect.signature(model.base_model.forward).parameters else "past_key_values"


@as_forward
def repeated_cache(model, ids: Int[Tensor, "p t"], mask: Int[Tensor, "p t"], k: int):
    """The key-value cache of these left-padded tokens, k times each, from which `generate` continues. None if the model
    has no cache, or one that cannot be repeated (linear attention)."""
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    out = model.base_model(ids, attention_mask=mask, position_ids=positions, use_cache=True)
    cache = getattr(out, cache_name(model), None)
    layers = getattr(cache, "layers", None)
    if not layers or not all(hasattr(layer, "batch_repeat_interleave") for layer in layers):
        return None
    cache.batch_repeat_interleave(k)
    return cache


@torch.no_grad()
def cached_logps(
    model,
    prompts: Sequence[list[int]],
    responses: Sequence[list[int]],
    temperature: float,
    pad_id: int,
    dtype: torch.dtype = torch.float32,
) -> list[Float[Tensor, " n"]]:
    """Log-probs (nats) of given response tokens, one by one with the key-value cache and left padding: as they were
    computed while `generate` sampled them. For comparison with what scores them."""
    models.set_attention(model.eval(), packed=False)
    device, width = next(model.parameters()).device, max(map(len, prompts))
    ids = torch.tensor([[pad_id] * (width - len(p)) + p for p in prompts], device=device)
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=device)
    positions, cache, columns = (mask.cumsum(1) - 1).clamp(min=0), None, []
    for t in range(max(map(len, responses))):
        state = {"attention_mask": mask, "position_ids": positions, cache_name(model): cache}
        with models.eager(model), sharding.autocast(model, dtype):
            out = model(ids, **state, use_cache=True, logits_to_keep=1)
        ids = torch.tensor([[r[t] if t < len(r) else pad_id] for r in responses], device=device)
        columns.append((out.logits[:, -1].float() / temperature).log_softmax(-1).gather(1, ids)[:, 0])
        cache, positions = out[cache_name(model)], positions[:, -1:] + 1
        mask = torch.cat([mask, torch.ones_like(ids)], 1)
    rows = torch.stack(columns, 1)
    return [row[: len(r)] for row, r in zip(rows, responses, strict=True)]


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
) -> list[Example]:
    """The examples' prompts with k sampled responses each, in place of their own; arguments as in `generate`."""
    prompts = [e.prompt for e in examples]
    ids = generate(model, tokenizer, prompts, max_new_tokens, temperature, seed, batch_size, k, dtype)
    pieces = tokens.Pieces(tokenizer)
    contexts = [pieces.context(e.prompt_text) for e in examples]
    texts = [pieces.decode(contexts[i // k], response) for i, response in enumerate(ids)]
    places = [slice(i * k, (i + 1) * k) for i in range(len(examples))]
    unknown = {"ranks": [1] * k, "labels": None, "trained": None, "margin": None, "probability": 1.0}
    return [
        replace(e, responses=ids[place], response_texts=texts[place], **unknown)
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
