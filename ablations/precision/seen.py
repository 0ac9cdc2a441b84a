"""One set of pairs, trained on in each form of weights: how much of what was learned does the forward pass see?"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from types import SimpleNamespace
from unittest import mock

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor

from ablations.common import Results, t_interval
from rlhf import losses
from rlhf.logprobs import token_kl
from rlhf.optim import AdamW, join, split
from rlhf.tree import Batch, collate
from support import models, scoring, sharding
from support.examples import Example

BETA = 0.1
FLAGS = SimpleNamespace(optimizer_state="float32", gradient_dtype="float32")
SCALE = 1024.0  # of the loss, against underflow of float16 gradients; a power of two, so exact in all other forms


class NoMasters(AdamW):
    """AdamW that rounds its masters to bfloat16 after each step, to nearest, and forgets the rest. float32 moments."""

    at_random = False

    @torch.no_grad()
    def step(self) -> None:
        super().step()
        for weight, low in self.low_bits.items():
            master = join(weight.data, low)
            if self.at_random:
                bits = master.view(torch.int32)
                bits += torch.where(master == 0, 0, torch.randint_like(bits, -0x8000, 0x8000))
            weight.data.copy_(split(master)[0])
            low.zero_()


class Stochastic(NoMasters):
    """The same, rounded up or down at random, such that the mean is the master (arXiv 2010.06192)."""

    at_random = True


FORMS = {  # form of weights: optimizer of bfloat16 weights; None: float32 weights
    "float32": None,
    "autocast": None,  # torch.autocast casts the weights to bfloat16 in each pass, as other trainers do
    "float16": None,  # the same, to float16
    "on the grid": AdamW,
    "dithered": AdamW,  # what --dtype bfloat16 does
    "stochastic": Stochastic,
    "no masters": NoMasters,
}
AUTOCAST = {"autocast": torch.bfloat16, "float16": torch.float16}
DTYPES = {form: "bfloat16" if optimizer else "float32" for form, optimizer in FORMS.items()}  # the scripts' --dtype


@contextmanager
def in_form(form: str) -> Iterator[None]:
    """Inside, the scripts' `--dtype bfloat16` gives this form of weights; float32 weights stay as they are."""
    with ExitStack() as patches:
        if form != "dithered":
            zeros = lambda weight, name, seed: torch.zeros_like(weight, dtype=torch.int16)  # noqa: E731
            patches.enter_context(mock.patch.object(models, "dither", zeros))
        if FORMS[form]:
            patches.enter_context(mock.patch.object(models, "AdamW", FORMS[form]))
        yield


def measure(
    form: str, rate: float, seed: int, make: Callable, examples: Sequence[Example], places: Sequence[int], pad_id: int
) -> dict[int, dict[str, float]]:
    """DPO on all pairs at once, at a constant learning rate -> {update: values}, at these numbers of updates.

        seen, true      mean margin of log-ratios (nats): by the form's forward pass; by the masters in float32. Each
                        is relative to the start, in its own precision and without dither
        loss, true_loss DPO's loss of these margins
        changed         share of the matrices' weights that differ from the start in what the forward pass computes with
        copied          <d_w, d> / <d, d>: d is how far the masters have moved, d_w how far the weights of the forward
                        pass have
        moved           median of |d| over the distance to the next bfloat16
    and after the last:
        cosine          of the loss's gradient in this form and in float32, at the same masters
        kl, true_kl     KL to the start over the vocabulary, mean over the pairs' tokens (nats)
    """
    torch.manual_seed(seed)
    dtype = models.DTYPES[DTYPES[form]]
    with in_form(form):
        policy, low_bits = sharding.load_trained(make, "cpu", dtype, seed)
        optimizer = models.adamw(policy, low_bits, FLAGS, lr=rate, weight_decay=0.0)
    truth, grid = make("cpu"), make("cpu")
    grid_low = sharding.load(make, "cpu", dtype)
    first_masters = {n: x.clone() for n, x in models.trained(policy, low_bits).items()}
    batch = collate(examples, "padded" if form in AUTOCAST else "tree", pad_id)
    plain = collate(examples, "tree", pad_id)

    def margins(model, batch: Batch, form: str) -> Float[Tensor, " m"]:
        if form in AUTOCAST:
            logps = _logps(model, batch, AUTOCAST[form])
        else:
            logps = scoring.response_logps(model, batch, models.DTYPES[DTYPES[form]])[1]
        return logps[::2] - logps[1::2]

    with torch.no_grad():
        first, true_first = margins(grid_low, batch, form), margins(grid, plain, "float32")
    along = {}
    for step in range(places[-1] + 1):
        seen = margins(policy, batch, form) - first
        loss = losses.dpo(seen, torch.zeros_like(seen), BETA).mean()
        if step in places:
            truth.load_state_dict(models.trained(policy, low_bits))
            true = margins(truth, plain, "float32") - true_first
            true_loss = losses.dpo(true, torch.zeros_like(true), BETA).mean()
            along[step] = {"seen": seen.mean().item(), "true": true.mean().item()}
            along[step] |= {"loss": loss.item(), "true_loss": true_loss.item()}
            along[step] |= _moved(dict(truth.named_parameters()), first_masters, form)
        (loss * SCALE).backward()
        if isinstance(optimizer, AdamW):
            optimizer.collect_gradients()
        for weight in policy.parameters():
            weight.grad /= SCALE
        if step < places[-1]:
            torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
    true_loss.backward()
    along[step]["cosine"] = _cosine(policy, truth)
    with torch.no_grad():
        along[step]["kl"] = _kl(policy, grid_low, batch, form)
        along[step]["true_kl"] = _kl(truth, grid, plain, "float32")
    return along


def _logits(model, batch: Batch, dtype: torch.dtype) -> Float[Tensor, "n v"]:
    """The library's own forward pass under autocast: logits before each response token."""
    models.set_attention(model, packed=False)
    inputs = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask, "position_ids": batch.position_ids}
    with torch.autocast("cpu", dtype):
        logits = model(**inputs, use_cache=False).logits
    return rearrange(logits, "rows t v -> (rows t) v")[batch.sources].float()


def _logps(model, batch: Batch, dtype: torch.dtype) -> Float[Tensor, " b"]:
    logps = _logits(model, batch, dtype).log_softmax(-1).gather(1, batch.targets[:, None])[:, 0]
    return torch.zeros(len(batch.lengths), dtype=torch.float64).index_add(0, batch.sequence, logps.double())


def _kl(model, start, batch: Batch, form: str) -> float:
    """KL(model || start) over the vocabulary, mean over the response tokens."""
    if form in AUTOCAST:
        log_p, log_q = (_logits(x, batch, AUTOCAST[form]).log_softmax(-1) for x in (model, start))
        return (log_p.exp() * (log_p - log_q)).sum(-1).mean().item()
    dtype = models.DTYPES[DTYPES[form]]
    sides = ((scoring.hidden_states(x, batch, batch.sources, dtype), models.output_head(x)) for x in (model, start))
    return token_kl(*next(sides), *next(sides)).mean().item()


def _cosine(policy, truth) -> float:
    """Of the two models' gradients, over all weights."""
    pairs = [(x.grad.float(), y.grad) for x, y in zip(policy.parameters(), truth.parameters(), strict=True)]
    dot = lambda i, j: sum((pair[i] * pair[j]).sum(dtype=torch.float64).item() for pair in pairs)  # noqa: E731
    return dot(0, 1) / math.sqrt(dot(0, 0) * dot(1, 1))


@torch.no_grad()
def _moved(masters: dict[str, Tensor], first: dict[str, Tensor], form: str) -> dict[str, float]:
    """The metrics changed, copied and moved."""
    changed = count = both = own = 0
    shares = []
    for name, master in masters.items():
        if master.ndim < 2:
            continue
        copies = master, first[name]
        if form != "float32":
            copies = [x.half() if form == "float16" else split(x)[0] for x in copies]
        moved, copy_moved = master - first[name], copies[0].float() - copies[1].float()
        changed += (copy_moved != 0).sum().item()
        count += master.numel()
        both += (copy_moved * moved).sum(dtype=torch.float64).item()
        own += (moved**2).sum(dtype=torch.float64).item()
        every = max(1, master.numel() >> 18)
        spacing = torch.exp2(first[name].flatten()[::every].abs().clamp_min(2.0**-126).log2().floor() - 7)
        shares.append(moved.flatten()[::every].abs() / spacing)
    return {
        "changed": changed / count,
        "copied": both / own if own else 1.0,
        "moved": torch.cat(shares).median().item(),
    }


# -------------------------------------------------------------------------------------------------------- statistics


def ratio(mine: Mapping[int, float], other: Mapping[int, float]) -> tuple[float, float]:
    """Mean of mine / other over the seeds that both have, and half its interval; NaN if they share none."""
    ratios = [x / other[seed] for seed, x in mine.items() if other.get(seed)]
    return t_interval(ratios) if ratios else (math.nan, math.inf)


def share(results: Results, form: str, rate: str, step: int | None = None) -> dict[int, float]:
    """Seed -> seen / true margin."""
    mine, true = (results.values(f"seen, {form}, {rate}", name, step) for name in ("seen", "true"))
    return {seed: mine[seed] / true[seed] for seed in mine}


def blind_and_cured(results: Results, rate: str, step: int) -> dict[str, tuple[float, float]]:
    """The criterion's first two clauses: mean and half its interval."""
    grid, dithered = (t_interval([*share(results, x, rate, step).values()]) for x in ("on the grid", "dithered"))
    where = f"rate {rate}, {step} updates"
    return {
        f"blind, {where}: 0.5 - seen / true on the grid": (0.5 - grid[0], grid[1]),
        f"cured, {where}: 0.1 - abs(seen / true - 1), dithered": (0.1 - abs(dithered[0] - 1), dithered[1]),
    }


def same(mine: Mapping[int, float], other: Mapping[int, float], bound: float = 0.1) -> tuple[float, float]:
    """bound - |mean ratio - 1|, and half the ratio's interval: above 0 if the interval is within 1 +- bound."""
    mean, half = ratio(mine, other)
    return bound - abs(mean - 1), half
