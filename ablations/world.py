"""A world small enough to write down: eight tokens, answers of at most four, and every policy's KL and reward exact.

A language of seven words and EOS; a prompt is three words, an answer ends at EOS or at four tokens, so there are 2,801
answers to a prompt. What people write (the source) is a random table of the last two words, the gold reward a random
function of prompt and answer in (0, 1), as the sentiment of Rafailov et al. 2023 is, and both are drawn by the world's
seed. The scripts train a small transformer through their own `main`; here its chance of every answer is written
down, and with that KL, reward, Best-of-n and the most reward that any policy has at a KL, without a sampling error.

Leading axis p: prompts. Axis s: the answers, those of l words and EOS for l = 0 to 3, and then the full ones.
"""

import dataclasses
import functools
import itertools
import math
import random
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType

import tokenizers
import torch
import transformers
from jaxtyping import Float
from torch import Tensor

import train_sft
from ablations.common import write
from support import models
from support.runs import is_made

WORDS, EOS, PAD = "abcdefg", 0, 8  # a word's id is its place, from 1 on; EOS stands in front of a prompt too
PROMPT, LONGEST = 3, 4  # words of a prompt, tokens of an answer
VALIDATION, TEST = 16, 32  # prompts that no run trains on, of 343
SENTENCES = 6400  # of the source, that the SFT model learns from
LIMITS = {
    "max_prompt_length": 1 + PROMPT,
    "max_length": 1 + PROMPT + LONGEST,
}  # so that a fourth word is not followed by EOS
ANSWERS = [p for n in range(LONGEST + 1) for p in itertools.product(range(1, 8), repeat=n)]
TEXTS = [" ".join(WORDS[i - 1] for i in answer) for answer in ANSWERS]


def prompts(seed: int) -> dict[str, list[str]]:
    """All prompts, split at random into those of training, validation and test."""
    found = [" ".join(words) for words in itertools.product(WORDS, repeat=PROMPT)]
    random.Random(f"prompts {seed}").shuffle(found)
    ends = VALIDATION, VALIDATION + TEST
    return {"validation": found[: ends[0]], "test": found[ends[0] : ends[1]], "train": found[ends[1] :]}


# -------------------------------------------------------------------------------------------------------------- reward


@functools.cache
def _taste(seed: int) -> Float[Tensor, "first previous word"]:
    """What a word is worth after another, to a prompt with this first word: a sum of three normal tables."""
    draw = functools.partial(torch.randn, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return draw(8) + draw(8, 8) + draw(8, 1, 8)


def reward(seed: int, prompt: str, answer: str) -> float:
    """sigmoid(2 * mean over the answer's words of their worth), 0 for an answer without words; in [0, 1)."""
    if not answer:
        return 0.0
    ids = [WORDS.index(word) + 1 for word in f"{prompt} {answer}".split()]
    worth = _taste(seed)[ids[0]][ids[PROMPT - 1 : -1], ids[PROMPT:]]
    return (2 * worth.mean()).sigmoid().item()


def gold(prompts: Sequence[str], responses: Sequence[str], rows: Sequence[dict]) -> list[float]:
    """The gold reward as `train_ppo.py --reward ablations.world:gold` takes it; each row names its world."""
    return [reward(row["world"], x, y) for x, y, row in zip(prompts, responses, rows, strict=True)]


def rewards(seed: int, asked: Sequence[str]) -> Float[Tensor, "p s"]:
    """The gold reward of every answer."""
    taste, found = _taste(seed), []
    for prompt in asked:
        first, _, last = (WORDS.index(word) + 1 for word in prompt.split())
        sums = [torch.zeros(1, dtype=torch.float64)]  # of the worths of n words, for n = 0, 1, ...
        before = torch.tensor([last])
        for _ in range(LONGEST):
            sums.append((sums[-1][:, None] + taste[first, before, 1:]).flatten())
            before = torch.arange(1, 8).repeat(len(before))
        found.append(torch.cat([sums[0], *((2 * x / n).sigmoid() for n, x in enumerate(sums[1:], 1))]))
    return torch.stack(found)


# ---------------------------------------------------------------------------------------------------- model and source


def source(seed: int, n: int) -> list[dict]:
    """n rows {prompt, completion} for SFT: a prompt, and an answer of one word at least that the source writes."""
    draw = torch.Generator().manual_seed(1_000_000 + seed)
    last, before = (torch.randn(8, 7, generator=draw) for _ in range(2))
    table = (last[:, None] + 0.5 * before[None]).softmax(-1).tolist()  # of the last word and the one before it
    rng, asked = random.Random(f"source {seed}"), prompts(seed)["train"]
    found = []
    for _ in range(n):
        words = rng.choice(asked).split()
        for place in range(LONGEST):
            if place and rng.random() < 0.15:
                break
            two = [WORDS.index(word) + 1 for word in words[-2:]]
            words += rng.choices(WORDS, weights=table[two[1]][two[0]])
        found.append({"prompt": " ".join(words[:PROMPT]), "completion": " ".join(words[PROMPT:])})
    return found


def new_model(folder: Path, seed: int) -> None:
    """An untrained transformer of 0.04 M parameters with its tokenizer. PAD, which a reward model needs, has a bias
    that keeps its chance at 0, so that nothing but words and EOS is ever written."""
    vocabulary = {"<eos>": EOS, **{word: i for i, word in enumerate(WORDS, 1)}, "<pad>": PAD}
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<eos>"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    words.post_processor = tokenizers.processors.TemplateProcessing(single="<eos> $A", special_tokens=[("<eos>", EOS)])
    named = {"bos_token": "<eos>", "eos_token": "<eos>", "pad_token": "<pad>"}
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=words, **named)
    torch.manual_seed(seed)
    config = transformers.PhiConfig(
        vocab_size=9,
        hidden_size=64,
        intermediate_size=192,
        num_hidden_layers=1,
        num_attention_heads=4,
        max_position_embeddings=16,
        bos_token_id=EOS,
        eos_token_id=EOS,
        pad_token_id=PAD,
    )
    model = transformers.PhiForCausalLM(config)
    with torch.no_grad():
        model.lm_head.bias[PAD] = -1e4
    models.save(model, tokenizer, folder)


def learn_source(folder: Path, seed: int, sentences: int = SENTENCES, **flags) -> str:
    """The SFT model of this world, in folder/sft, as train_sft.py makes it; made where it is missing."""
    out = folder / "sft"
    if not is_made(str(out)):
        shutil.rmtree(folder, ignore_errors=True)
        new_model(folder / "untrained", seed)
        data = write(folder / "source.jsonl", source(seed, sentences))
        flags = {"model": str(folder / "untrained"), "data": data, "out": str(out), "seed": seed} | flags
        train_sft.main(args(train_sft, lr=5e-3, batch_size=64, epochs=2, **flags))
    return str(out)


def args(script: ModuleType, **flags):
    """Arguments of a script: as all runs here have them (no rows held out, since other prompts measure, no answers, and
    the world's lengths), and these flags."""
    usual = {"eval_fraction": 0.0, "eval_prompts": 0, "max_new_tokens": LONGEST, "device": "cpu", **LIMITS}
    known = {field.name for field in dataclasses.fields(script.Args)}
    return script.Args(**{name: value for name, value in usual.items() if name in known} | flags)


# --------------------------------------------------------------------------------------------------- policies, exactly


def differentiable_logps(model, asked: Sequence[str]) -> Float[Tensor, "p s"]:
    """The log-prob of every answer to each prompt, float64, with gradient: their chances add up to 1.

    By the library's own cached forward, a level of the tree of answers at a time.
    """
    models.set_attention(model.eval(), packed=False)
    ids = torch.tensor([[EOS, *(WORDS.index(word) + 1 for word in prompt.split())] for prompt in asked])
    path, ended, cache = torch.zeros(len(asked), 1, dtype=torch.float64), [], transformers.DynamicCache()
    for place in range(LONGEST):
        states = model.base_model(ids, past_key_values=cache, use_cache=True).last_hidden_state[:, -1]
        step = model.lm_head(states).double().log_softmax(-1)[:, :PAD].view(*path.shape, PAD)
        ended.append(path + step[..., EOS])
        path = (path[..., None] + step[..., 1:]).flatten(1)
        if place < LONGEST - 1:
            cache.batch_repeat_interleave(7)
            ids = torch.arange(1, 8).repeat(path.numel() // 7)[:, None]
    return torch.cat([*ended, path], 1)


@torch.no_grad()
def answer_logps(model, asked: Sequence[str]) -> Float[Tensor, "p s"]:
    """`differentiable_logps` without gradient."""
    return differentiable_logps(model, asked)


def held(model, seed: int, parts: Mapping[str, Sequence[str]]) -> dict[str, tuple[Tensor, Tensor]]:
    """For the prompts of each part: the model's log-probs of all answers, and their gold rewards, [p s] each."""
    return {part: (answer_logps(model, asked), rewards(seed, asked)) for part, asked in parts.items()}


def kl(logps: Float[Tensor, "p s"], ref: Float[Tensor, "p s"]) -> float:
    """KL(pi || ref), nats, the mean over prompts."""
    return (logps.exp() * (logps - ref)).sum(1).mean().item()


def expected(logps: Float[Tensor, "p s"], r: Float[Tensor, "p s"]) -> float:
    """The mean of r over the policy's answers, and over prompts."""
    return (logps.exp() * r).sum(1).mean().item()


def tilted(ref: Float[Tensor, "p s"], r: Float[Tensor, "p s"], beta: float) -> tuple[float, float]:
    """KL and reward of pi* = ref exp(r / beta) / Z, the most of its KL. Rafailov et al. 2023, Eq. 4."""
    best = (ref + r / beta).log_softmax(1)
    return kl(best, ref), expected(best, r)


def optimum(ref: Float[Tensor, "p s"], r: Float[Tensor, "p s"], nats: float) -> float:
    """The most reward that a policy can have whose KL, the mean over prompts, is at most this: the exact frontier.

    By bisection for the beta of `tilted`, then the tangent there (its slope is beta, since the frontier is concave), so
    that the result is never below the true one, and within 1e-12 above it.
    """
    if nats <= 0:
        return expected(ref, r)
    low, high = 1e-3, 1e3
    for _ in range(100):
        beta = (low * high) ** 0.5
        low, high = (beta, high) if tilted(ref, r, beta)[0] > nats else (low, beta)
    at, most = tilted(ref, r, high)
    return most + high * (nats - at)


def law(p: Float[Tensor, " s"], rewards: Float[Tensor, " s"], n: int) -> Float[Tensor, " s"]:
    """Chance of each answer to be the best of n, ties broken at random: ((F + q)^n - F^n) p / q, where q is the
    chance of its reward and F that of a lower one."""
    levels, which = rewards.unique(return_inverse=True)
    q = torch.zeros(len(levels), dtype=torch.float64).index_add(0, which, p)
    upto = q.cumsum(0) / q.sum()
    below = torch.cat([upto.new_zeros(1), upto[:-1]])
    return ((upto**n - below**n) / q)[which] * p


def bound(n: int) -> float:
    """KL of the best of n to the policy, nats, at most (Beirami et al. 2024, arXiv 2401.01879)."""
    return math.log(n) - (n - 1) / n


def best_of(ref: Float[Tensor, "p s"], r: Float[Tensor, "p s"], n: int) -> Float[Tensor, "p s"]:
    """Log-probs of the best of n of the reference's answers, equal ones taken at random: its exact law."""
    chances = [law(q, own, n) for q, own in zip(ref.exp(), r, strict=True)]
    return torch.stack(chances).clamp(min=1e-300).log()


def rankings(
    seed: int, logps: Float[Tensor, "p s"], asked: Sequence[str], n: int, k: int, flip: float = 0.0
) -> list[dict]:
    """n rows {prompt, responses, ranks} of k answers that the policy gave to these prompts in turn, best first by gold
    reward; a pair (k = 2) is turned round with the chance `flip`. Rows with an empty answer are drawn again."""
    draw = torch.Generator().manual_seed(2_000_000 + seed)
    chances, r, found = logps.exp(), rewards(seed, asked), []
    order = [*range(len(asked))]
    random.Random(f"rankings {seed}").shuffle(order)
    for p in itertools.islice(itertools.cycle(order), n):
        drawn = [0]
        while 0 in drawn or len(set(drawn)) == 1:
            drawn = torch.multinomial(chances[p], k, replacement=True, generator=draw).tolist()
        values = r[p, drawn].tolist()
        ranks = [1 + sum(other > value for other in values) for value in values]
        if flip and torch.rand((), generator=draw) < flip:
            ranks.reverse()
        found.append({"prompt": asked[p], "responses": [TEXTS[i] for i in drawn], "ranks": ranks})
    return found


def chosen(rows: Sequence[dict]) -> list[dict]:
    """The rows {prompt, completion} of Preferred-FT: the preferred answer of each pair of these rankings."""
    found = []
    for row in rows:
        for text, rank in zip(row["responses"], row["ranks"], strict=True):
            worse = sum(rank < other for other in row["ranks"])
            found += [{"prompt": row["prompt"], "completion": text}] * worse if text.strip() else []
    return found
