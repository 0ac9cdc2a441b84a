"""A world small enough to enumerate: eight tokens, answers of at most four, exact KL and reward of every policy.

A language of seven words and EOS; a prompt is three words, an answer ends at EOS or at four tokens, so there are 2,801
answers to a prompt. The texts that people write (the source) follow a random table of the last two words. The gold
reward is a random function of prompt and answer in (0, 1), like the sentiment of Rafailov et al. 2023. Both are drawn
with the world's seed. The scripts train a small transformer through their own `main`; here the probability of every
answer is computed, and from it KL, reward, Best-of-n and the most reward of any policy at a KL, without sampling error.

Axis p: prompts. Axis s: answers, first those of l words and EOS for l = 0 to 3, then those of four words.
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

WORDS, EOS, PAD = "abcdefg", 0, 8  # ids of words: 1 to 7; EOS also begins a prompt
PROMPT, LONGEST = 3, 4  # words of a prompt, most tokens of an answer
VALIDATION, TEST = 16, 32  # prompts that no run trains on, of 343
SENTENCES = 6400  # of the source, for SFT
LIMITS = {"max_prompt_length": 1 + PROMPT, "max_length": 1 + PROMPT + LONGEST}  # no EOS after a fourth word
ANSWERS = [p for n in range(LONGEST + 1) for p in itertools.product(range(1, 8), repeat=n)]
TEXTS = [" ".join(WORDS[i - 1] for i in answer) for answer in ANSWERS]


def prompts(seed: int) -> dict[str, list[str]]:
    """All prompts, split at random into validation, test and train."""
    texts = [" ".join(words) for words in itertools.product(WORDS, repeat=PROMPT)]
    random.Random(f"prompts {seed}").shuffle(texts)
    ends = VALIDATION, VALIDATION + TEST
    return {"validation": texts[: ends[0]], "test": texts[ends[0] : ends[1]], "train": texts[ends[1] :]}


# -------------------------------------------------------------------------------------------------------------- reward


@functools.cache
def _taste(seed: int) -> Float[Tensor, "first previous word"]:
    """The worth of a word after another, for a prompt with this first word: a sum of three normal tables."""
    draw = functools.partial(torch.randn, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return draw(8) + draw(8, 8) + draw(8, 1, 8)


def reward(seed: int, prompt: str, answer: str) -> float:
    """sigmoid(2 * mean worth of the answer's words), 0 for an answer without words; in [0, 1)."""
    if not answer:
        return 0.0
    ids = [WORDS.index(word) + 1 for word in f"{prompt} {answer}".split()]
    worth = _taste(seed)[ids[0]][ids[PROMPT - 1 : -1], ids[PROMPT:]]
    return (2 * worth.mean()).sigmoid().item()


def gold(prompts: Sequence[str], responses: Sequence[str], rows: Sequence[dict]) -> list[float]:
    """The gold reward for `train_ppo.py --reward ablations.world:gold`; each row names its world."""
    return [reward(row["world"], x, y) for x, y, row in zip(prompts, responses, rows, strict=True)]


def rewards(seed: int, asked: Sequence[str]) -> Float[Tensor, "p s"]:
    """The gold reward of every answer to each prompt."""
    taste, rows = _taste(seed), []
    for prompt in asked:
        first, _, last = (WORDS.index(word) + 1 for word in prompt.split())
        sums = [torch.zeros(1, dtype=torch.float64)]  # summed worths of n words, for n = 0, 1, ...
        before = torch.tensor([last])
        for _ in range(LONGEST):
            sums.append((sums[-1][:, None] + taste[first, before, 1:]).flatten())
            before = torch.arange(1, 8).repeat(len(before))
        rows.append(torch.cat([sums[0], *((2 * x / n).sigmoid() for n, x in enumerate(sums[1:], 1))]))
    return torch.stack(rows)


# ---------------------------------------------------------------------------------------------------- model and source


def source(seed: int, n: int) -> list[dict]:
    """n rows {prompt, completion} for SFT: a training prompt, and an answer of at least one word by the source."""
    draw = torch.Generator().manual_seed(1_000_000 + seed)
    last, before = (torch.randn(8, 7, generator=draw) for _ in range(2))
    table = (last[:, None] + 0.5 * before[None]).softmax(-1).tolist()  # [last word, the one before it, next word]
    rng, asked = random.Random(f"source {seed}"), prompts(seed)["train"]
    rows = []
    for _ in range(n):
        words = rng.choice(asked).split()
        for place in range(LONGEST):
            if place and rng.random() < 0.15:
                break
            before_last, last_word = (WORDS.index(word) + 1 for word in words[-2:])
            words += rng.choices(WORDS, weights=table[last_word][before_last])
        rows.append({"prompt": " ".join(words[:PROMPT]), "completion": " ".join(words[PROMPT:])})
    return rows


def new_model(folder: Path, seed: int) -> None:
    """Save an untrained transformer of 0.04 M parameters with its tokenizer. PAD, which a reward model needs, gets a
    bias that keeps its probability at 0, so that only words and EOS are ever written."""
    vocabulary = {"<eos>": EOS, **{word: i for i, word in enumerate(WORDS, 1)}, "<pad>": PAD}
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<eos>"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    words.post_processor = tokenizers.processors.TemplateProcessing(single="<eos> $A", special_tokens=[("<eos>", EOS)])
    special = {"bos_token": "<eos>", "eos_token": "<eos>", "pad_token": "<pad>"}
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=words, **special)
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
    """The path of this world's SFT model, folder/sft, which train_sft.py makes if it is missing."""
    out = folder / "sft"
    if not is_made(str(out)):
        shutil.rmtree(folder, ignore_errors=True)
        new_model(folder / "untrained", seed)
        data = write(folder / "source.jsonl", source(seed, sentences))
        flags = {"model": str(folder / "untrained"), "data": data, "out": str(out), "seed": seed} | flags
        train_sft.main(args(train_sft, lr=5e-3, batch_size=64, epochs=2, **flags))
    return str(out)


def args(script: ModuleType, **flags):
    """Arguments of a script: the defaults of all runs here (no held-out rows and no answers, since other prompts are
    measured, and the world's lengths), and these flags."""
    defaults = {"eval_fraction": 0.0, "eval_prompts": 0, "max_new_tokens": LONGEST, "device": "cpu", **LIMITS}
    known = {field.name for field in dataclasses.fields(script.Args)}
    return script.Args(**{name: value for name, value in defaults.items() if name in known} | flags)


# --------------------------------------------------------------------------------------------------- policies, exactly


def differentiable_logps(model, asked: Sequence[str]) -> Float[Tensor, "p s"]:
    """Log-prob of every answer to each prompt, float64, with gradient; the probabilities of a prompt sum to 1.

    Uses the library's cached forward, one level of the tree of answers at a time.
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
    """Part -> the model's log-probs of all answers to its prompts, and their gold rewards, [p s] each."""
    return {part: (answer_logps(model, asked), rewards(seed, asked)) for part, asked in parts.items()}


def kl(logps: Float[Tensor, "p s"], ref: Float[Tensor, "p s"]) -> float:
    """KL(pi || ref) in nats, averaged over prompts."""
    return (logps.exp() * (logps - ref)).sum(1).mean().item()


def expected(logps: Float[Tensor, "p s"], r: Float[Tensor, "p s"]) -> float:
    """The policy's expected r, averaged over prompts."""
    return (logps.exp() * r).sum(1).mean().item()


def tilted(ref: Float[Tensor, "p s"], r: Float[Tensor, "p s"], beta: float) -> tuple[float, float]:
    """KL and reward of pi* = ref exp(r / beta) / Z, the best policy at its KL. Rafailov et al. 2023, Eq. 4."""
    best = (ref + r / beta).log_softmax(1)
    return kl(best, ref), expected(best, r)


def optimum(ref: Float[Tensor, "p s"], r: Float[Tensor, "p s"], nats: float) -> float:
    """The exact frontier: the most reward of any policy whose KL, averaged over prompts, is at most this.

    Bisects for the beta of `tilted` and follows the tangent there. Its slope is beta and the frontier is concave, so
    the result is never below the true one, and within 1e-12 above it.
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
    """Probability that each answer is the best of n, ties broken at random: ((F + q)^n - F^n) p / q, where q is the
    probability of its reward and F that of a lower one."""
    levels, which = rewards.unique(return_inverse=True)
    q = torch.zeros(len(levels), dtype=torch.float64).index_add(0, which, p)
    cdf = q.cumsum(0) / q.sum()
    below = torch.cat([cdf.new_zeros(1), cdf[:-1]])
    return ((cdf**n - below**n) / q)[which] * p


def bound(n: int) -> float:
    """Upper bound on the KL of the best of n to the policy, nats (Beirami et al. 2024, arXiv 2401.01879)."""
    return math.log(n) - (n - 1) / n


def best_of(ref: Float[Tensor, "p s"], r: Float[Tensor, "p s"], n: int) -> Float[Tensor, "p s"]:
    """Exact log-probs of the best of n of the reference's answers, ties broken at random."""
    probs = [law(p, of_prompt, n) for p, of_prompt in zip(ref.exp(), r, strict=True)]
    return torch.stack(probs).clamp(min=1e-300).log()


def rankings(
    seed: int, logps: Float[Tensor, "p s"], asked: Sequence[str], n: int, k: int, flip: float = 0.0
) -> list[dict]:
    """n rows {prompt, responses, ranks} of k answers sampled from the policy, cycling through these prompts; rank 1 has
    the most gold reward. A pair (k = 2) is flipped with probability `flip`. Rows with an empty answer, or with k equal
    answers, are drawn again."""
    draw = torch.Generator().manual_seed(2_000_000 + seed)
    probs, r, rows = logps.exp(), rewards(seed, asked), []
    order = [*range(len(asked))]
    random.Random(f"rankings {seed}").shuffle(order)
    for p in itertools.islice(itertools.cycle(order), n):
        drawn = [0]
        while 0 in drawn or len(set(drawn)) == 1:
            drawn = torch.multinomial(probs[p], k, replacement=True, generator=draw).tolist()
        values = r[p, drawn].tolist()
        ranks = [1 + sum(other > value for other in values) for value in values]
        if flip and torch.rand((), generator=draw) < flip:
            ranks.reverse()
        rows.append({"prompt": asked[p], "responses": [TEXTS[i] for i in drawn], "ranks": ranks})
    return rows


def chosen(rows: Sequence[dict]) -> list[dict]:
    """Rows {prompt, completion} for Preferred-FT: the preferred answer of each pair of these rankings."""
    completions = []
    for row in rows:
        for text, rank in zip(row["responses"], row["ranks"], strict=True):
            worse = sum(rank < other for other in row["ranks"])
            completions += [{"prompt": row["prompt"], "completion": text}] * worse if text.strip() else []
    return completions
