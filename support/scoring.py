"""Log-probs and rewards of batches, and the check that chooses the layout a model is scored in.

A model's backbone gives hidden states (`hidden_states`). `response_logps` turns those that precede a response token
into log-probs, with `token_logps`; `response_rewards` is a reward model's linear head on the state at each response's
last token, and `token_values` a critic's on the states before each token. These take one batch, and gradient flows
through them. `score_logps`, `score_rewards` and `per_token` take any number of examples, without gradient.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor
from tqdm import tqdm

from rlhf import BadInput, require
from rlhf.logprobs import Head, token_kl, token_logps
from rlhf.tree import Batch, Tree, collate, tokens
from support import models, parallel
from support.examples import Example, probes
from support.sharding import as_forward, autocast


class Batching(NamedTuple):
    """How examples become forward passes."""

    layout: str = "padded"  # or "tree" (rlhf/tree.py), or "auto": see `choose_layout`
    pad_id: int = 0  # fills padded rows
    dtype: torch.dtype = torch.float32  # of the matrix products
    micro_batch_tokens: int = 2048  # budget of one forward pass
    device: str = "cpu"


# ------------------------------------------------------------------------------------------------------------ one batch


def hidden_states(
    model, batch: Batch, places: Int[Tensor, " n"], dtype: torch.dtype = torch.float32
) -> Float[Tensor, "n d"]:
    """The last layer's hidden states at these places of the flattened (rows t), in `dtype` (float64 models: float64).

    Sets the model's attention to the one that the batch needs, and leaves it set. After `models.checkpoint_layers`, the
    backward pass recomputes what it needs of the layers.
    """
    models.set_attention(model, packed=batch.segments is not None)
    precise = torch.float64 if model.dtype == torch.float64 else torch.float32
    for layer in models.checkpointed_layers(model):
        layer.training = torch.is_grad_enabled()  # layers recompute in train mode only; their parts stay in eval mode
    with autocast(model, dtype):
        kwargs = {"segments": batch.segments} if batch.segments else {"attention_mask": batch.attention_mask}
        out = models.backbone(model)(
            input_ids=batch.input_ids, position_ids=batch.position_ids, use_cache=False, **kwargs
        )
    states = getattr(out, "last_hidden_state", None)
    require(states is not None, f"{model.config.model_type}: the backbone gives no hidden states: use another model")
    states = rearrange(states, "rows t d -> (rows t) d").index_select(0, places)
    return states.to(precise if dtype == torch.float32 else dtype)


@as_forward
def response_logps(
    model, batch: Batch, dtype: torch.dtype = torch.float32, temperature: float = 1.0, keep_bytes: int | None = None
) -> tuple[Float[Tensor, " n"], Float[Tensor, " b"]]:
    """Log-probs (nats) of every scored response token given all before it, and their sums over each sequence.

    `dtype` is that of the matrix products. Log-probs stay float32; the sums are float64, because in float32
    a thousand tokens lose a thousandth of a nat.
    """
    states = hidden_states(model, batch, batch.sources, dtype)
    logps, _ = token_logps(states, models.output_head(model), batch.targets, temperature, keep_bytes=keep_bytes)
    sums = torch.zeros(len(batch.lengths), dtype=torch.float64, device=logps.device)
    return logps, sums.index_add(0, batch.sequence, logps.double())


@as_forward
def logps_and_entropies(
    model, batch: Batch, dtype: torch.dtype = torch.float32, temperature: float = 1.0
) -> Float[Tensor, "n two"]:
    """Log-prob of every scored response token, and the entropy of the distribution that it was drawn from, in nats."""
    states = hidden_states(model, batch, batch.sources, dtype)
    numbers = token_logps(states, models.output_head(model), batch.targets, temperature, entropy=True)
    return torch.stack(numbers, 1)


@as_forward
def response_rewards(model, batch: Batch, dtype: torch.dtype = torch.float32) -> Float[Tensor, " b"]:
    """A reward model's scores: r(x, y) = w . h - reward_mean, with h the hidden state at the last token of y.

    `reward_mean` is in the config (train_rm.py writes it), and 0 while the model is in training; transformers' own
    class gives w . h. Float32; gradient flows to w and to the model.
    """
    last = hidden_states(model, batch, batch.ends, dtype).to(model.score.weight.dtype)
    return model.score(last)[:, 0] - getattr(model.config, "reward_mean", 0.0)


@as_forward
def token_values(critic, batch: Batch, dtype: torch.dtype = torch.float32) -> Float[Tensor, " n"]:
    """A critic's estimate, before each response token, of the rewards to come: w . h - reward_mean, with h the hidden
    state that predicts the token. Float32; gradient flows to w and to the model."""
    before = hidden_states(critic, batch, batch.sources, dtype).to(critic.score.weight.dtype)
    return critic.score(before)[:, 0] - getattr(critic.config, "reward_mean", 0.0)


def exact_kl(
    policy, reference, batch: Batch, dtype: torch.dtype = torch.float32, temperature: float = 1.0
) -> Float[Tensor, " n"]:
    """KL(pi || ref) over the whole vocabulary before each response token, in nats; gradient flows to the policy. The
    reference may be the policy itself with adapters (`models.add_lora`): it is scored without them."""
    with models.without_lora(reference):
        ref_states, ref_head = _states_and_head(reference, batch, dtype)

    @as_forward
    def kl(policy):
        states = hidden_states(policy, batch, batch.sources, dtype)
        return token_kl(states, models.output_head(policy), ref_states, ref_head, temperature)

    return kl(policy)


@torch.no_grad()
@as_forward
def _states_and_head(model, batch: Batch, dtype: torch.dtype) -> tuple[Float[Tensor, "n d"], Head]:
    """The hidden states that predict the response tokens, and an output head that outlives the forward pass."""
    head = models.output_head(model)
    if parallel.several():  # a sharded model's head is whole only in here
        head = Head(*(x.clone() if isinstance(x, Tensor) else x for x in head))
    return hidden_states(model, batch, batch.sources, dtype), head


# ---------------------------------------------------------------------------------------------------- many examples


def micro_batches(model, examples: Sequence[Example], batching: Batching) -> Iterator[list[int]]:
    """This process's micro-batches, as indices of examples. The dummy passes that keep several processes in step
    (`parallel.shares`) are made here, with a zero gradient if gradients are enabled."""
    for group, weight in parallel.shares(examples, batching.micro_batch_tokens, batching.layout):
        if weight:
            yield group
            continue
        measure = response_rewards if models.has_reward_head(model) else lambda *args: response_logps(*args)[1]
        batch = collate([examples[i] for i in group], batching.layout, 0, next(model.parameters()).device)
        nothing = measure(model, batch, batching.dtype).sum() * 0
        if torch.is_grad_enabled():
            nothing.backward()


def score_logps(model, examples: Sequence[Example], batching: Batching, progress: str = "") -> list[Tensor]:
    """Log-prob (nats) of every response: a float64 tensor [k] for each example, on the CPU, without gradient.
    `progress` names a progress bar."""
    return _score(lambda batch: response_logps(model, batch, batching.dtype)[1], model, examples, batching, progress)


def score_rewards(model, examples: Sequence[Example], batching: Batching, progress: str = "") -> list[Tensor]:
    """A reward model's reward of every response: a float32 tensor [k] for each example, on the CPU, no gradient."""
    return _score(lambda batch: response_rewards(model, batch, batching.dtype), model, examples, batching, progress)


def progress_bar(name: str, total: int | None, unit: str) -> tqdm:
    """A bar that appears after two seconds and goes away at the end; of the main process, and only with a name."""
    hidden, shown = not (name and parallel.is_main()), {"leave": False, "dynamic_ncols": True, "delay": 2}
    return tqdm(desc=name, total=total, unit=unit, disable=hidden, **shown)


@torch.no_grad()
def _score(measure: Callable[[Batch], Tensor], model, examples, batching: Batching, progress: str) -> list[Tensor]:
    device = next(model.parameters()).device
    measured: list[tuple[list[int], Tensor]] = []
    total = None if parallel.several() else sum(tokens(e, batching.layout) for e in examples)
    with progress_bar(progress, total, "token") as bar:
        for group in micro_batches(model, examples, batching):
            members = [examples[i] for i in group]
            measured.append((group, measure(collate(members, batching.layout, batching.pad_id, device))))
            bar.update(sum(tokens(e, batching.layout) for e in members))
    scores: dict[int, Tensor] = {}
    for group, values in measured:
        scores |= zip(group, values.cpu().split([len(examples[i].responses) for i in group]), strict=True)
    scores = dict(parallel.gather([*scores.items()]))
    return [scores[i] for i in range(len(examples))]


@torch.no_grad()
def per_token(
    measure: Callable[[Batch], Tensor], examples: Sequence[Example], batching: Batching
) -> Float[Tensor, " n *more"]:
    """measure(batch) of each response token, without gradient: all examples' tokens laid end to end, in order."""
    values: dict[int, Tensor] = {}
    for group, weight in parallel.shares(examples, batching.micro_batch_tokens, batching.layout):
        members = [examples[i] for i in group]
        numbers = measure(collate(members, batching.layout, batching.pad_id, batching.device))
        if weight:
            values |= zip(group, numbers.split([sum(e.lengths) for e in members]), strict=True)
    values = dict(parallel.gather([*values.items()]))
    return torch.cat([values[i] for i in range(len(examples))]).to(batching.device)


# ------------------------------------------------------------------------------------------------- choosing the layout


def batching_for(model, examples: Sequence[Example], tokenizer, a: Any, others: Sequence = ()) -> Batching:
    """The Batching of a script's flags, with the layout chosen for its model, and for others that score the same
    batches; prints what the model is."""
    batching = Batching(a.layout, models.pad_id(tokenizer), models.DTYPES[a.dtype], a.micro_batch_tokens, a.device)
    layouts = {choose_layout(model, examples, batching)}
    for other in others:
        pad_id = other.config.pad_token_id if models.has_reward_head(other) else batching.pad_id
        layouts.add(choose_layout(other, examples, batching._replace(pad_id=pad_id)))
    batching = batching._replace(layout="tree" if layouts == {"tree"} else "padded")
    size = model.num_parameters() / 1e6
    print(f"{a.model}: {size:.2f} M parameters, {batching.layout} layout, {a.dtype} on {a.device}")
    return batching


def batching_for_answers(policy, others: Sequence, prompts: Sequence[Example], tokenizer, a: Any) -> Batching:
    """`batching_for` for models that all score sampled answers to these prompts."""
    for model in (policy, *others):
        check_tokens(model, prompts)
    pads = {models.pad_id(tokenizer), *(x.config.pad_token_id for x in others if models.has_reward_head(x))}
    return batching_for(policy, probes(prompts, a.max_new_tokens, pads), tokenizer, a, others)


@torch.no_grad()
def choose_layout(model, examples: Sequence[Example], batching: Batching) -> str:
    """`tree` if the model gives the same numbers in both layouts and no branch sees another, else `padded`.

    The numbers are the log-probs of the response tokens, or a reward model's scores at the tokens before them. The
    shortest tree is scored with the longest sequence and the largest tree, because short rows cannot reveal a sliding
    window. On the way our numbers are checked against the model's own. `batching.layout` "tree" or "padded" forces that
    layout. Raises BadInput if a forced tree does not fit, if positions are too few, or if our numbers differ from
    transformers'.
    """
    rows = _probe_rows(examples)
    check_tokens(model, examples)
    plain = torch.cat([token_numbers(model, [e], batching, "padded") for e in rows])
    check_against_library(model, rows, plain, batching)
    if batching.layout == "padded":
        return "padded"

    reason = compare_layouts(model, rows, plain, batching)
    if all(parallel.gather([reason is None])):  # processes that share the model must have the same layout
        return "tree"
    kind = model.config.model_type
    if batching.layout == "tree":
        raise BadInput(f"--layout tree does not fit {kind}: {reason}; use --layout padded")
    print(f"layout: padded, because the tree layout does not fit {kind} ({reason})")
    return "padded"


def check_tokens(model, examples: Sequence[Example]) -> None:
    """BadInput if the model has no embedding of a token, or fewer positions than the longest prompt with a response
    has tokens."""
    size = model.get_input_embeddings().num_embeddings
    for e in examples:
        for ids in (e.prompt, *e.responses):
            largest = max(ids, default=0)
            require(
                largest < size,
                f"{e.where}: has the token id {largest}, and the {model.config.model_type} model {size} embeddings: "
                "its tokenizer is that of another model",
            )
    most = max(len(e.prompt) + max(map(len, e.responses), default=1) for e in examples)
    limit = models.positions(model)
    require(
        limit is None or most <= limit,
        f"{model.config.model_type}: the model has {limit} positions, a prompt with its response {most} tokens: "
        "lower --max-prompt-length, and --max-length or --max-new-tokens",
    )


def check_against_library(model, rows: Sequence[Tree], plain: Float[Tensor, " n"], batching: Batching) -> None:
    """BadInput unless our numbers are transformers': log-probs from its logits, or rewards from its classifier."""
    if models.has_reward_head(model):
        _check_rewards(model, rows, batching)
    else:
        _check_logps(model, rows[0], plain, batching)


def compare_layouts(model, rows: Sequence[Example], plain: Float[Tensor, " n"], batching: Batching) -> str | None:
    """Why the tree layout does not fit the model; None if it does. `plain`: the numbers, one padded row at a time."""
    allowed = tolerance(model, rows, plain, batching)
    try:
        tree_numbers = token_numbers(model, rows, batching, "tree")
        difference = (tree_numbers - plain).abs().max().item()
        leak = _leak(model, rows, tree_numbers, batching)
    except torch.cuda.OutOfMemoryError:
        raise
    except (NotImplementedError, TypeError, ValueError, RuntimeError, ImportError, OSError) as error:
        return str(error).split("\n")[0]
    if max(difference, leak) <= allowed:
        return None
    return (
        f"the layouts differ by {difference:.2g} at a token and a branch moves another by {leak:.2g}, "
        f"where rounding explains {allowed:.2g}"
    )


def tolerance(model, rows: Sequence[Tree], plain: Float[Tensor, " n"], batching: Batching) -> float:
    """How far two ways to compute these rows' token numbers may differ at a token: 1e-4 (nats, or reward) times
    `growth`. In half precision twice what a random relative change of the embeddings by up to a rounding does, and at
    least the rounding of the largest number. (Two batchings of the same rows differ less: often they run the same
    kernels.) `plain` are the numbers, one padded row at a time."""
    if batching.dtype == torch.float32:
        return 1e-4 * growth(model)
    eps = torch.finfo(batching.dtype).eps / 2
    generator = torch.Generator(plain.device).manual_seed(0)

    def disturb(module, inputs, states):
        return states + states * torch.empty_like(states).uniform_(-eps, eps, generator=generator)

    hook = model.get_input_embeddings().register_forward_hook(disturb)
    try:
        disturbed = torch.cat([token_numbers(model, [row], batching, "padded") for row in rows])
    finally:
        hook.remove()
    return max(1e-4, eps * plain.abs().max().item(), 2 * (disturbed - plain).abs().max().item())


def growth(model) -> float:
    """How rounding in float32 grows with a model: above 10 M parameters as the square root of their number."""
    return max(1.0, model.num_parameters() / 1e7) ** 0.5


def _probe_rows(examples: Sequence[Example]) -> list[Example]:
    """The shortest tree, the longest sequence and the largest tree."""
    longest = max(examples, key=lambda e: len(e.prompt) + max(map(len, e.responses)))
    largest = max(examples, key=tokens)
    return [min(examples, key=tokens), longest, *([largest] if largest is not longest else [])]


def token_numbers(model, examples: Sequence[Tree], batching: Batching, layout: str) -> Float[Tensor, " n"]:
    """What the layouts must agree on at each response token, from one batch of all these examples."""
    batch = collate(examples, layout, batching.pad_id, next(model.parameters()).device)
    if models.has_reward_head(model):
        return token_values(model, batch, batching.dtype)
    return response_logps(model, batch, batching.dtype)[0]


def _check_logps(model, example: Tree, ours: Float[Tensor, " n"], batching: Batching) -> None:
    """BadInput unless the log-probs that `token_logps` gives for this example are those of the model's own logits."""
    dtype = batching.dtype
    batch = collate([example], "padded", batching.pad_id, ours.device)
    ids = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask, "position_ids": batch.position_ids}
    models.set_attention(model, packed=False)
    with autocast(model, dtype):
        logits = rearrange(model(**ids, use_cache=False).logits, "rows t v -> (rows t) v")[batch.sources]
    theirs = logits.float().log_softmax(-1).gather(1, batch.targets[:, None])[:, 0]
    difference = (ours[: len(theirs)] - theirs).abs().max().item()
    require(
        difference < (1e-3 if dtype == torch.float32 else 0.5),
        f"{model.config.model_type}: output_head in support/models.py does not turn the hidden states into this "
        f"model's logits (log-probs differ by {difference:.3g} nats): add a case for it there",
    )


def _check_rewards(model, examples: Sequence[Tree], batching: Batching) -> None:
    """BadInput unless our scores are those of transformers' own class, with padding to the right and to the left.

    This catches a pad id that a response can end with, a wrong last token, positions that count the padding.
    """
    dtype = batching.dtype
    batch = collate(examples, "padded", batching.pad_id, model.device)
    ours = response_rewards(model, batch, dtype) + getattr(model.config, "reward_mean", 0.0)
    padding = (batch.attention_mask.shape[1] - batch.attention_mask.sum(1)).tolist()
    for side in ("right", "left"):
        ids, mask, positions = (
            x if side == "right" else torch.stack([row.roll(n) for row, n in zip(x, padding, strict=True)])
            for x in (batch.input_ids, batch.attention_mask, batch.position_ids)
        )
        with autocast(model, dtype):
            theirs = model(ids, attention_mask=mask, position_ids=positions, use_cache=False).logits[:, 0]
        difference = (ours - theirs).abs().max().item() / max(1.0, ours.abs().max().item())
        require(
            difference < (1e-4 * growth(model) if dtype == torch.float32 else 0.1),
            f"{model.config.model_type}: with padding to the {side} transformers' own class gives other rewards than "
            f"ours (by {difference:.3g}): its pad id {model.config.pad_token_id} may end a response, or its head "
            "differs",
        )


def _leak(model, rows: Sequence[Example], before: Float[Tensor, " n"], batching: Batching) -> float:
    """How far the numbers of all other branches move from `before` when the first branch's tokens are changed."""
    changed = [t - 1 if t else 1 for t in rows[0].responses[0]]
    changed_rows = [replace(rows[0], responses=[changed, *rows[0].responses[1:]]), *rows[1:]]
    moved = (token_numbers(model, changed_rows, batching, "tree") - before)[rows[0].lengths[0] :]
    return moved.abs().max().item() if len(moved) else 0.0
