"""Batched sampling with the library's own `generate`, from exactly softmax(logits / temperature)."""

import inspect
from collections.abc import Sequence
from dataclasses import replace

import torch
import transformers
from einops import repeat
from jaxtyping import Float, Int
from torch import Tensor

from rlhf import parallel, require, reviews
from rlhf.data import Example
from rlhf.models import as_forward, eager, pad_id, positions, use_layout


def end_ids(model, tokenizer) -> list[int]:
    """Every token id that ends a response: the tokenizer's EOS and those the model's own generation settings name."""
    own = model.generation_config.eos_token_id
    own = own if isinstance(own, list) else [own]
    return sorted({i for i in (*own, tokenizer.eos_token_id) if i is not None})


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
) -> list[list[int]]:
    """k responses (token ids, with the EOS where it was reached) to each prompt (token ids), prompt after prompt.

    y_i ~ softmax(logits / temperature), and greedy at temperature 0. The model's own generation settings (top-k, top-p,
    repetition penalty, ...) are left out, so that log-probs scored later are those of the sampling distribution. The
    same seed, prompts and batch size give the same responses; the global random state is not touched. Prompts of
    similar length share a batch, of `batch_size` sequences, which ends with its longest. A prompt is encoded once, and
    its k responses start from copies of its cache. Where the model has learnt a number of positions, responses are cut
    at the last one. Of several processes (rlhf/parallel.py) each samples its share of every batch, and all together
    what one process samples, up to rounding.
    """
    use_layout(model.eval(), "padded")
    device, ends, pad = next(model.parameters()).device, end_ids(model, tokenizer), pad_id(tokenizer)
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
    at_once = max(batch_size // k, 1)
    own_config, model.generation_config = model.generation_config, transformers.GenerationConfig()
    try:
        apart = torch.random.fork_rng(devices=[device] if device.type == "cuda" else [])
        with eager(model), apart, parallel.gathered(model), parallel.autocast(model):
            torch.manual_seed(seed)
            for start in range(0, len(order), at_once):
                group = order[start : start + at_once]
                width, own = max(len(prompts[i]) for i in group), parallel.part_of(group)
                padding = [width - len(prompts[i]) for i in own]
                ids = [[pad] * n + prompts[i] for n, i in zip(padding, own, strict=True)]
                mask = [[0] * n + [1] * (width - n) for n in padding]
                if limit := positions(model):
                    require(width < limit, f"a prompt has {width} tokens, and the model {limit} positions")
                    config.max_new_tokens = min(max_new_tokens, limit - width)
                ids, mask = (torch.tensor(x, device=device) for x in (ids, mask))
                cache = repeated_cache(model, ids[:, :-1], mask[:, :-1], k) if k > 1 and width > 1 else None
                ids, mask = (repeat(x, "p t -> (p k) t", k=k) for x in (ids, mask))
                in_step = parallel.sampling(own, group, k, width, temperature, ends)
                in_step |= {cache_name(model): cache}
                out = model.generate(ids, attention_mask=mask, generation_config=config, **in_step)
                sampled = out[:, width:].tolist()
                for place, i in enumerate(own):
                    for tokens in sampled[place * k : (place + 1) * k]:
                        stop = next((j + 1 for j, token in enumerate(tokens) if token in ends), len(tokens))
                        responses[i].append(tokens[:stop])
    finally:
        model.generation_config = own_config
    responses = [next(filter(None, found)) for found in zip(*parallel.gather([responses]), strict=True)]
    return [response for own in responses for response in own]


def cache_name(model) -> str:
    """What the library calls a key-value cache: from version 5.24 on by a shorter name."""
    return "cache" if "cache" in inspect.signature(model.base_model.forward).parameters else "past_key_values"


@as_forward
def repeated_cache(model, ids: Int[Tensor, "p t"], mask: Int[Tensor, "p t"], k: int):
    """The key-value cache of these left-padded tokens, k times each; None where the model has none, or one that cannot
    be repeated (linear attention). `generate` goes on from it with the tokens that follow."""
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
    model, prompts: Sequence[list[int]], responses: Sequence[list[int]], temperature: float, pad: int
) -> list[Float[Tensor, " n"]]:
    """Log-probs (nats) of given response tokens, one by one with the key-value cache and left padding: as they were
    computed while `generate` sampled them. To compare with what scores them."""
    use_layout(model.eval(), "padded")
    device, width = next(model.parameters()).device, max(map(len, prompts))
    ids = torch.tensor([[pad] * (width - len(p)) + p for p in prompts], device=device)
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=device)
    positions, cache, found = (mask.cumsum(1) - 1).clamp(min=0), None, []
    for t in range(max(map(len, responses))):
        now = {"attention_mask": mask, "position_ids": positions, cache_name(model): cache}
        with eager(model), parallel.autocast(model):
            out = model(ids, **now, use_cache=True, logits_to_keep=1)
        ids = torch.tensor([[r[t] if t < len(r) else pad] for r in responses], device=device)
        found.append((out.logits[:, -1].float() / temperature).log_softmax(-1).gather(1, ids)[:, 0])
        cache, positions = out[cache_name(model)], positions[:, -1:] + 1
        mask = torch.cat([mask, torch.ones_like(ids)], 1)
    rows = torch.stack(found, 1)
    return [row[: len(r)] for row, r in zip(rows, responses, strict=True)]


def answer(
    model, tokenizer, examples: Sequence[Example], max_new_tokens: int, seed: int, temperature: float = 1.0
) -> list[Example]:
    """The examples' prompts with one sampled response each, in place of their own."""
    sampled = generate(model, tokenizer, [e.prompt for e in examples], max_new_tokens, temperature, seed)
    texts = [tokenizer.decode(ids, skip_special_tokens=True) for ids in sampled]
    alone = {"ranks": [1], "labels": None, "trained": None, "margin": None, "probability": 1.0}
    return [
        replace(e, responses=[ids], response_texts=[text], **alone)
        for e, ids, text in zip(examples, sampled, texts, strict=True)
    ]


def facts(answers: Sequence[Example], ends: Sequence[int], embedded: bool) -> dict[str, list[float]]:
    """For each answer its length, whether it ended, and in the world of the reviews its gold reward and its grammar."""
    found = {
        "length": [float(len(e.responses[0])) for e in answers],
        "ended": [float(e.responses[0][-1] in ends) for e in answers],
    }
    if embedded:
        texts = [f"{e.prompt_text} {e.response_texts[0]}".strip() for e in answers]
        found["gold"] = [reviews.gold_reward(text) for text in texts]
        found["grammatical"] = [float(reviews.log_prob(text) > float("-inf")) for text in texts]
    return found
