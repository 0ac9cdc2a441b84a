"""Time sampling: `support.generate.generate` and the library's `model.generate`, with k samples of the same prompts.

    python -m benchmarks.rollout [--model DIR] [--quick]

Both sides sample from softmax(logits) in float32, 128 tokens or up to the last EOS of the batch. The library's side is
one call on all p * k rows, padded on the left. The time of a pass, prompts included, is divided by the tokens of its
longest answer. The sides take turns in new processes, A B A B. Their greedy answers must agree.
"""

import random
import statistics
import tempfile
import time
from dataclasses import dataclass

import torch

from benchmarks import compare
from support import models
from support.generate import generate

CASES = [(16, 1, 64), (8, 4, 64), (8, 4, 256), (4, 8, 512), (32, 4, 128)]  # prompts, samples per prompt, longest prompt


@dataclass
class Args:
    model: str | None = None
    """local model; default: a random Llama of 9 M parameters"""
    tokens: int = 128
    """most new tokens per sample"""
    rounds: int = 3
    """number of processes per side"""
    quick: bool = False
    """one small case, one round"""


def library(
    model, tokenizer, prompts: list[list[int]], tokens: int, temperature: float, k: int, **options
) -> list[list[int]]:
    """Sample every prompt k times with the library's `generate`, which may get more options."""
    width, pad = max(map(len, prompts)), models.pad_id(tokenizer)
    rows = [prompt for prompt in prompts for _ in range(k)]
    ids = torch.tensor([[pad] * (width - len(row)) + row for row in rows], device=model.device)
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows], device=model.device)
    sampling = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0} if temperature else {}
    sampling = sampling or {"do_sample": False}
    out = model.generate(ids, attention_mask=mask, max_new_tokens=tokens, pad_token_id=pad, **sampling, **options)
    return out[:, width:].tolist()


def worker(side: str, job: dict) -> dict:
    model, tokenizer = models.load_model(job["model"], "cpu"), models.load_tokenizer(job["model"])
    prompts, k, tokens = job["prompts"], job["k"], job["tokens"]

    def sample(temperature: float, tokens: int) -> list[list[int]]:
        if side == "library":
            return library(model, tokenizer, prompts, tokens, temperature, k)
        return generate(model, tokenizer, prompts, tokens, temperature, k=k)[0]

    greedy = sample(0.0, 16)
    passes = []
    for _ in range(3):
        began = time.perf_counter()
        answers = sample(1.0, tokens)
        passes.append((time.perf_counter() - began) / max(map(len, answers)))
    return {"greedy": [row[:16] for row in greedy], "seconds a token": statistics.median(passes)}


def main(a: Args) -> None:
    rng, rows = random.Random(0), []
    with tempfile.TemporaryDirectory() as folder:
        model = a.model or compare.small_model(folder)
        for p, k, longest in CASES[1:2] if a.quick else CASES:
            lengths = [rng.randint(longest // 4, longest) for _ in range(p)]
            prompts = [compare.random_ids(model, rng, n) for n in lengths]
            job = {"model": model, "prompts": prompts, "k": k, "tokens": 16 if a.quick else a.tokens}
            results = compare.in_turn("rollout", ["ours", "library"], job, 1 if a.quick else a.rounds)
            pairs = zip(results["ours"][0]["greedy"], results["library"][0]["greedy"], strict=True)
            different = sum(x != y[: len(x)] for x, y in pairs)
            compare.require_parity("greedy answers", different, 0)
            ours, theirs = (compare.median(results[side], "seconds a token") for side in ("ours", "library"))
            rows.append({
                "prompts": f"{p} x {k}", "longest prompt": longest, "ours, ms a token": 1000 * ours,
                "library, ms a token": 1000 * theirs, "time ratio": ours / theirs,
            })  # fmt: skip
    compare.report("rollout", rows, a.quick)


if __name__ == "__main__":
    compare.cli(main, Args, {side: lambda job, side=side: worker(side, job) for side in ("ours", "library")})
