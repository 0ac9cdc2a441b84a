"""Preferences among the responses to a prompt: pairs, ties, accuracy and its ceiling, KTO's mismatched pairs."""

import random
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from rlhf import BadInput
from rlhf.tree import send
from support.agreement import better_pairs
from support.examples import Example


def pairs(examples: Sequence[Example]) -> tuple[list[int], list[int], list[float], list[float]]:
    """All pairs (i preferred to j) of all prompts, as four lists: indices i and indices j into the concatenated
    responses, weights (they sum to 1 over a prompt), and the probability of each label."""
    better, worse, weights, label_probability, first = [], [], [], [], 0
    for e in examples:
        prompt_pairs = better_pairs(e.ranks)
        better += [first + i for i, _ in prompt_pairs]
        worse += [first + j for _, j in prompt_pairs]
        weights += [1 / max(len(prompt_pairs), 1)] * len(prompt_pairs)
        label_probability += [e.label_probability(i, j) for i, j in prompt_pairs]
        first += len(e.ranks)
    return better, worse, weights, label_probability


def pair_tensors(examples: Sequence[Example], like: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`pairs` as tensors [m] on the device of `like`: indices of the preferred and of the other responses, and weights
    and label probabilities in the dtype of `like`."""
    better, worse, *numbers = pairs(examples)
    tensors = [torch.tensor(x) for x in (better, worse)] + [torch.tensor(x, dtype=like.dtype) for x in numbers]
    return tuple(send(x, like.device) for x in tensors)


def by_prompt(
    values: Float[Tensor, " b"], examples: Sequence[Example]
) -> tuple[Float[Tensor, "p k"], Int[Tensor, "p k"]]:
    """Values of all responses and their ranks, with one row per prompt. Short rows are padded with value and rank 0."""
    rows = values.split([len(e.ranks) for e in examples])
    ranks = [torch.tensor(e.ranks) for e in examples]
    return pad_sequence([*rows], batch_first=True), send(pad_sequence(ranks, batch_first=True), values.device)


def expected_accuracy(
    margins: Float[Tensor, " m"], label_probability: Float[Tensor, " m"], tie: Float[Tensor, " m"] | float
) -> Float[Tensor, " m"]:
    """The probability that a newly drawn label agrees with the sign of each margin, in [0, 1].

    It is P(label) if the margin is above 0, 1 - P(label) if it is below 0, and 1/2 if |margin| <= `tie`, a difference
    that rounding can cause.
    """
    accuracy = torch.where(margins > 0, label_probability, 1 - label_probability)
    return torch.where(margins.abs() <= tie, 0.5, accuracy)


def ceiling(examples: Sequence[Example]) -> float:
    """Best possible expected accuracy, reached by the true reward: the mean of max(P(label), 1 - P(label)) over pairs,
    with equal weight for each prompt. In [0.5, 1]; 1 if the annotators' noise is not known."""
    _, _, weights, chances = pairs(examples)
    return sum(w * max(p, 1 - p) for w, p in zip(weights, chances, strict=True)) / sum(weights) if weights else 1.0


def without_ties(examples: Sequence[Example], ties: str, seed: int) -> list[Example]:
    """Rankings without ties, for Plackett-Luce. `ties`: "refuse" (BadInput), "drop", or "random" (broken at random)."""
    tied = [e for e in examples if len(set(e.ranks)) < len(e.ranks)]
    if tied and ties == "refuse":
        raise BadInput(
            f"{tied[0].where}: field 'ranks' has ties, which plackett_luce cannot use: --ties drop or random"
        )
    if tied:
        print(f"{len(tied)} rankings with ties: {ties}\n")
    if ties == "drop":
        return [e for e in examples if len(set(e.ranks)) == len(e.ranks)]
    rng = random.Random(seed)
    orders = [sorted(range(len(e.ranks)), key=lambda i: (e.ranks[i], rng.random())) for e in examples]  # noqa: B023
    return [replace(e, ranks=[o.index(i) + 1 for i in range(len(o))]) for e, o in zip(examples, orders, strict=True)]


def mismatched(examples: Sequence[Example], seed: int) -> list[tuple[list[int], list[bool] | None]]:
    """For each example, a response from another example, and from another prompt if possible; and which of its tokens
    are trained (None: all).

    KTO's KL estimate needs them (Ethayarajh et al. 2024, arXiv 2402.01306). The examples are shuffled and grouped by
    prompt, largest group first. Each takes a random response of the example that comes n places later, cyclically; n is
    the size of the largest group, or 1 if there is only one group. Raises BadInput if there is only one example.
    """
    if len(examples) == 1:
        raise BadInput(f"{examples[0].where}: the only example, but KTO needs the response of another: give more rows")
    rng = random.Random(seed)
    groups = defaultdict(list)
    for i in rng.sample(range(len(examples)), len(examples)):
        groups[tuple(examples[i].prompt)].append(i)
    by_size = sorted(groups.values(), key=len, reverse=True)
    order = [i for group in by_size for i in group]
    shift = len(by_size[0]) if len(by_size) > 1 else 1
    responses: list[tuple[list[int], list[bool] | None]] = [([], None) for _ in examples]
    for position, i in enumerate(order):
        other = examples[order[(position + shift) % len(order)]]
        k = rng.randrange(len(other.responses))
        responses[i] = other.responses[k], other.trained and other.trained[k]
    return responses
