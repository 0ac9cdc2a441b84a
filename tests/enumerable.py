"""A world small enough to write down: every sequence, its reward and its probability, so that optima are exact.

Vocabulary of 8 tokens. A sequence ends at EOS, which counts, or at the longest length without one: at length 3 there
are 1 + 7 + 49 + 343 = 400 sequences. EOS is also the one prompt token: it never stands inside a sequence, so a model
of exactly 8 tokens needs no ninth, and its probabilities over all sequences sum to 1.

A policy is a vector of log-probs (nats) in the order of `sequences`, a reward a vector in the same order; leading axes
of either are other policies and rewards. Everything is differentiable in the log-probs.
"""

import itertools

import torch
import transformers
from jaxtyping import Float, Int
from tiny import example, no_float32
from torch import Tensor

from support.examples import Example
from support.models import set_attention

VOCAB = 8
EOS = 0


def prefixes(length: int) -> list[list[int]]:
    """All that another token may follow, shortest first: no EOS, fewer than `length` tokens. The first is empty."""
    return [[*p] for n in range(length) for p in itertools.product(range(1, VOCAB), repeat=n)]


def sequences(length: int) -> list[list[int]]:
    """All sequences of at most `length` tokens: every prefix ended by EOS, then the full ones without."""
    ended = [prefix + [EOS] for prefix in prefixes(length)]
    return ended + [[*s] for s in itertools.product(range(1, VOCAB), repeat=length)]


def everything(length: int) -> Example:
    """All sequences as the responses to one prompt, for `collate`."""
    return example([EOS], sequences(length))


def random_policy(size: int, seed: int, spread: float = 1.0) -> Float[Tensor, " s"]:
    """Log-probs of a random distribution, float64; `spread` is the standard deviation of its logits in nats."""
    return random_rewards(size, seed, spread).log_softmax(0)


def random_rewards(size: int, seed: int, spread: float = 1.0) -> Float[Tensor, " s"]:
    """Normal rewards with standard deviation `spread`, float64."""
    return spread * torch.randn(size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def random_transformer(seed: int, dtype: torch.dtype = torch.float64):
    """A small Llama over the 8 tokens, with weights so large that its next-token distributions are far from uniform."""
    torch.manual_seed(seed)
    config = transformers.LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=16,
        bos_token_id=EOS,
        eos_token_id=EOS,
        initializer_range=0.2,
        tie_word_embeddings=False,
    )
    return transformers.AutoModelForCausalLM.from_config(config, dtype=dtype).eval()


@torch.no_grad()
def next_token_states(model, length: int) -> Float[Tensor, "prefixes d"]:
    """The hidden state after the prompt and each of `prefixes(length)`, from plain rows of one length at a time.

    The model is left with its own attention.
    """
    set_attention(model, packed=False)
    rows = [torch.tensor([[EOS, *p] for p in group]) for _, group in itertools.groupby(prefixes(length), len)]
    with no_float32():
        return torch.cat([model.base_model(r, use_cache=False).last_hidden_state[:, -1] for r in rows])


@torch.no_grad()
def transformer_logps(model, length: int) -> Float[Tensor, " s"]:
    """Log-probs of `sequences(length)` by the library's own logits and log-softmax: none of the code under test."""
    step = model.lm_head(next_token_states(model, length)).log_softmax(-1)
    number = {tuple(p): i for i, p in enumerate(prefixes(length))}
    return torch.stack([sum(step[number[*s[:i]], s[i]] for i in range(len(s))) for s in sequences(length)])


def kl(logp: Float[Tensor, "*shape s"], logq: Float[Tensor, "*shape s"]) -> Float[Tensor, "*shape"]:
    """KL(p || q) in nats."""
    return (logp.exp() * (logp - logq)).sum(-1)


def log_partition(ref_logps: Float[Tensor, " s"], rewards: Float[Tensor, " s"], beta: float) -> Float[Tensor, ""]:
    """log Z = log sum pi_ref exp(r / beta)."""
    return (ref_logps + rewards / beta).logsumexp(-1)


def optimal_policy(ref_logps: Float[Tensor, " s"], rewards: Float[Tensor, " s"], beta: float) -> Float[Tensor, " s"]:
    """log pi*, pi* = pi_ref exp(r / beta) / Z: the most reward less beta KL to pi_ref. Rafailov et al. 2023, Eq. 4."""
    return ref_logps + rewards / beta - log_partition(ref_logps, rewards, beta)


def objective(
    logps: Float[Tensor, " s"], ref_logps: Float[Tensor, " s"], rewards: Float[Tensor, " s"], beta: float
) -> Float[Tensor, ""]:
    """J(pi) = E_pi[r] - beta KL(pi || pi_ref), at most beta log Z. Rafailov et al. 2023, Eq. 3."""
    return (logps.exp() * rewards).sum(-1) - beta * kl(logps, ref_logps)


def bradley_terry(rewards: Float[Tensor, " s"]) -> Float[Tensor, "s s"]:
    """P(i is preferred to j) = sigmoid(r_i - r_j) at [i, j]. Rafailov et al. 2023, Eq. 1."""
    return (rewards[:, None] - rewards).sigmoid()


def ordered_pairs(size: int) -> tuple[Int[Tensor, " m"], Int[Tensor, " m"]]:
    """(chosen, rejected): all m = size (size - 1) pairs of two different sequences, each in both directions."""
    chosen, rejected = (~torch.eye(size, dtype=torch.bool)).nonzero().T
    return chosen, rejected
