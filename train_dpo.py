"""Direct preference optimisation: train a policy straight from preferences, without a reward model.

    python train_dpo.py                                         the embedded task; makes its SFT model first
    python train_dpo.py --model DIR --data prefs.jsonl          your own model and pairs
    python train_dpo.py --loss ipo --beta 0.05 --out runs/ipo   another member of the family

A preference says that response w to a prompt x is better than response l. DPO (Rafailov et al. 2023, Eq. 7) raises
the probability of w against that of l, both measured against a frozen reference model, by logistic regression:

    loss = -log sigmoid( beta * [ (log pi(w|x) - log ref(w|x)) - (log pi(l|x) - log ref(l|x)) ] )

beta * log(pi / ref) is the implicit reward: the policy is its own reward model, and beta is the strength of the leash
to the reference. What happens below, in order: data, model, reference log-probs (once), the loop, before and after.
"""

import math
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

import train_sft
from rlhf import BadInput, losses, models, parallel, require, reviews
from rlhf.data import Example, build, ceiling, held_out, mismatched, pairs, read_rows, show, without_ties
from rlhf.generate import answer, end_ids, facts
from rlhf.parallel import micro_batches
from rlhf.runs import before_and_after, check, cli, schedule, table
from rlhf.tree import by_prompt, collate

# --------------------------------------------------------------------------------------------------------------- flags

LOSSES = {  # name: per-pair losses [m], from the flags a and a batch x of pairs
    "dpo": lambda a, x: losses.dpo(x.chosen, x.rejected, a.beta, a.label_smoothing, a.clip),
    "robust": lambda a, x: losses.robust(x.chosen, x.rejected, a.beta, a.label_smoothing),
    "ipo": lambda a, x: losses.ipo(x.chosen, x.rejected, a.beta),
    "ipo_norm": lambda a, x: losses.ipo_norm(x.chosen, x.rejected, x.chosen_lengths, x.rejected_lengths, a.beta),
    "dpo_norm": lambda a, x: losses.dpo_norm(x.chosen, x.rejected, x.chosen_lengths, x.rejected_lengths, a.beta),
    "r_dpo": lambda a, x: losses.r_dpo(
        x.chosen, x.rejected, x.chosen_lengths, x.rejected_lengths, a.beta, a.length_penalty
    ),
    "dpo_nll": lambda a, x: losses.dpo_nll(x.chosen, x.rejected, x.chosen_logps, x.chosen_lengths, a.beta, a.nll_coef),
    "dpop": lambda a, x: losses.dpop(x.chosen, x.rejected, a.beta, a.dpop_lambda),
    "hinge": lambda a, x: losses.hinge(x.chosen, x.rejected, a.beta),
    "exo": lambda a, x: losses.exo(x.chosen, x.rejected, a.beta, a.label_smoothing),
    "nca": lambda a, x: losses.nca(x.chosen, x.rejected, a.beta),
    "apo_zero": lambda a, x: losses.apo_zero(x.chosen, x.rejected, a.beta),
    "apo_down": lambda a, x: losses.apo_down(x.chosen, x.rejected, a.beta),
    "bco": lambda a, x: losses.bco(x.chosen, x.rejected, a.beta, x.delta),
    "sppo": lambda a, x: losses.sppo(x.chosen, x.rejected, a.beta),
    "discopop": lambda a, x: losses.discopop(x.chosen, x.rejected, a.beta, a.discopop_tau),
    "simpo": lambda a, x: losses.simpo(
        x.chosen_logps, x.rejected_logps, x.chosen_lengths, x.rejected_lengths, a.beta, a.gamma_beta_ratio
    ),
    "orpo": lambda a, x: losses.orpo(
        x.chosen_logps, x.rejected_logps, x.chosen_lengths, x.rejected_lengths, a.orpo_lambda
    ),
}
REFERENCE_FREE = {"simpo", "orpo"}  # for these the reference's log-probs count as 0
PER_TOKEN = {"simpo", "orpo", "dpo_norm", "ipo_norm"}  # these see means over tokens, and so do their reward metrics
TIE = 1e-4  # nats: a smaller margin is rounding, and counts as half right
LN2_AT_START = {"dpo", "robust", "dpo_norm", "dpop"}  # loss where policy and reference agree, whatever the flags
DEFAULTS = {  # of flags that are None: for any model, and for the embedded task's small one
    "any": {"beta": 0.1, "lr": 5e-7, "eval_fraction": 0.05, "eval_prompts": 16},
    "reviews": {"beta": 0.6, "lr": 3e-4, "eval_fraction": 0.1, "eval_prompts": 512},
}
Loss = Literal[(*LOSSES, "kto", "plackett_luce")]
REVIEWS = 24_000  # rows of the embedded task
PANELS = {  # of curves.png
    "loss": ["loss", "eval/loss"],
    "accuracy of the implicit reward": ["rewards/accuracies", "eval/rewards/accuracies"],
    "margin, beta * nats": ["rewards/margins", "eval/rewards/margins"],
    "log-prob moved from the reference, held out, nats": ["eval/logps/chosen_delta", "eval/logps/rejected_delta"],
    "gradient norm": ["grad_norm"],
    "learning rate": ["lr"],
}


@dataclass
class Args:
    model: str = "runs/sft"
    """starting weights: a run directory, a local folder or a hub id; runs/sft is made first where it is missing"""
    ref: str | None = None
    """reference model (frozen), same tokenizer; default: the starting weights"""
    data: str = "reviews"
    """reviews (embedded), a .jsonl/.json/.csv/.parquet file (also .gz), a save_to_disk folder or a hub id"""
    split: str | None = None
    """split of a hub data set; default train"""
    eval_data: str | None = None
    """held-out preferences, in the same forms; default: a share of --data"""
    eval_fraction: float | None = None
    """share of prompts held out, by hash of their text, in [0, 1); default 0.05 (embedded: 0.1)"""
    skip_bad_rows: bool = False
    """drop and count rows that cannot be used instead of stopping at the first"""
    out: str = "runs/dpo"
    """run directory; one that is in use is never overwritten"""

    loss: Loss = "dpo"
    """which of the family (rlhf/losses.py has each equation); with k > 2 responses a prompt's pairs are averaged"""
    beta: float | None = None
    """strength of the leash to the reference, per nat, > 0; papers' values differ by loss (simpo 2, dpo_norm 5);
    default 0.1 (embedded: 0.6)"""
    label_smoothing: float = 0.0
    """assumed share of flipped labels, in [0, 0.5): conservative DPO; robust; exo, which needs it > 0, say 0.001"""
    divergence: Literal["reverse_kl", "forward_kl", "js", "alpha", "chi_po"] = "reverse_kl"
    """the f-divergence whose implicit reward takes the place of log(pi / ref)"""
    divergence_alpha: float = 0.5
    """exponent of --divergence alpha, >= 0 and not 1"""
    clip: float | None = None
    """--loss dpo: largest |beta * margin|, > 0 (chi-PO: twice the largest reward); default: none"""
    length_penalty: float = 0.01
    """r_dpo: reward taken off for each token that chosen is longer, >= 0"""
    nll_coef: float = 1.0
    """dpo_nll: weight of the chosen response's NLL per token, >= 0"""
    dpop_lambda: float = 50.0
    """dpop: weight on a fall of the chosen log-prob, >= 0"""
    discopop_tau: float = 0.05
    """discopop: temperature of the mixture, in (0, 1]"""
    gamma_beta_ratio: float = 0.5
    """simpo: target margin over beta, in nats per token, >= 0"""
    orpo_lambda: float = 0.1
    """orpo: weight of the odds ratio, >= 0"""
    desirable_weight: float = 1.0
    """kto: weight of desirable responses, >= 0"""
    undesirable_weight: float = 1.0
    """kto: weight of undesirable responses, >= 0"""
    ties: Literal["refuse", "drop", "random"] = "refuse"
    """plackett_luce: what to do with a ranking that has ties; random breaks them for training alone"""

    lora_rank: int = 0
    """rank of low-rank adapters that are trained in place of all weights, >= 0 (0: none); they want a learning rate
    about ten times as high"""
    lora_merge: bool = False
    """save the model with the adapters merged into its weights, not the adapters alone"""

    lr: float | None = None
    """peak learning rate of AdamW, > 0; default 5e-7 (embedded: 3e-4)"""
    warmup: float = 0.1
    """share of the steps over which the learning rate rises, in [0, 1); then it falls as a cosine to 0"""
    weight_decay: float = 0.0
    """AdamW's decoupled weight decay, >= 0"""
    max_grad_norm: float = 1.0
    """gradients with a larger norm are scaled down to it, > 0"""
    batch_size: int = 64
    """prompts per optimizer step, >= 1"""
    micro_batch_tokens: int = 8192 if torch.cuda.is_available() else 1024
    """tokens of one forward pass, >= 1: bounds memory, does not change the result; default 8192 on a
    machine with CUDA, and 1024 on one without, where more is no faster"""
    epochs: int = 1
    """passes over the data, >= 1"""
    max_steps: int | None = None
    """stop after this many optimizer steps, >= 1; the learning rate ends there too"""
    max_prompt_length: int = 512
    """tokens of a prompt, >= 1; longer ones lose their beginning"""
    max_length: int = 1024
    """tokens of a prompt with one response, > max-prompt-length; longer responses lose their end"""

    eval_every: int = 100
    """optimizer steps between evaluations on the held-out pairs, >= 1"""
    eval_prompts: int | None = None
    """held-out prompts answered before and after, >= 0; default 16 (embedded: 512)"""
    max_new_tokens: int = 128
    """tokens of those answers at most, >= 1"""
    save_every: int = 100
    """optimizer steps between checkpoints, >= 1"""
    resume: bool = False
    """go on from the last checkpoint in --out, with the same flags; on a CPU the result is the same bit for bit"""
    dry_run: bool = False
    """print the data report and three examples token by token, and train nothing"""
    wandb: bool = False
    """log to Weights & Biases too"""
    layout: Literal["auto", "tree", "padded"] = "auto"
    """how responses share a forward pass: tree encodes the prompt once; auto takes it where a check says it is right"""
    keep_softmax_mib: int = 1024
    """MiB of softmax kept between forward and backward, >= 0; a larger one is computed twice"""
    ref_cache: str = "runs/ref_cache"
    """folder of the reference's log-probs, which runs on the same data share"""
    gradient_checkpointing: bool = False
    """compute the layers' activations a second time in the backward pass: less memory, about a third more time"""
    compile: bool = False
    """torch.compile of the layers, for a GPU: a longer first step, then shorter ones; wants a C++ compiler"""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """of the matrix products; weights (the master copy), optimizer and log-probs are float32 always"""
    device: str = "cuda" if torch.cuda.is_available() else "cpu"
    """torch device"""
    seed: int = 0
    """order of the data, sampling, mismatched completions"""
    trust_remote_code: bool = False
    """run code that comes with a hub model"""


def check_loss(a: Args) -> None:
    """The losses themselves know which of their settings are impossible: BadInput."""
    zero, one = torch.zeros(1), torch.ones(1).long()
    try:
        losses.kto(zero, one.bool(), zero[0], a.beta, a.desirable_weight, a.undesirable_weight)  # beta, of every loss
        if a.loss in LOSSES:
            LOSSES[a.loss](a, Pairs(zero, zero, zero - 1, zero - 1, one, one))
        losses.implicit_reward(zero, zero, a.divergence, a.divergence_alpha)
    except BadInput as error:
        raise BadInput(f"--loss {a.loss}: {error}") from None
    needs_log_ratios = a.loss in REFERENCE_FREE | {"kto"} and a.divergence != "reverse_kl"
    require(not needs_log_ratios, f"--loss {a.loss} is not defined with --divergence {a.divergence}: leave that out")


# ----------------------------------------------------------------------------------------------------------- objective


@dataclass
class Pairs:
    """m preference pairs. `chosen`, `rejected`: log-ratios to the reference, or the f-divergence's reward of them."""

    chosen: Tensor
    rejected: Tensor
    chosen_logps: Tensor
    rejected_logps: Tensor
    chosen_lengths: Tensor
    rejected_lengths: Tensor
    delta: float = 0.0  # bco: running mean of the rewards


def objective(a: Args, examples: Sequence[Example], logps, ref_logps, lengths, delta=0.0, z0=None):
    """Sum of the losses of p prompts (for kto: of b responses), and the (weighted sum, weight) of each metric.

    logps, ref_logps and lengths are of all b responses, prompt after prompt. Gradient flows to logps.
    """
    ratios = losses.implicit_reward(logps, ref_logps, a.divergence, a.divergence_alpha)
    rewards = a.beta * ratios.detach() / (lengths if a.loss in PER_TOKEN else 1)
    totals: dict[str, tuple[Tensor, float]] = {}

    def count(name: str, values: Tensor, weights: Tensor) -> None:
        totals[name] = ((values.detach() * weights).sum(), float(weights.sum()))

    if a.loss == "kto":
        good = torch.tensor([label for e in examples for label in e.labels], device=logps.device)
        loss = losses.kto(ratios, good, z0, a.beta, a.desirable_weight, a.undesirable_weight)
        count("loss", loss, torch.ones_like(loss))
        above = rewards - a.beta * z0
        right = logps.new_tensor([e.probability for e in examples for _ in e.labels])
        expected = torch.where((above > 0) == good, right, 1 - right)
        count("rewards/accuracies", torch.where(above.abs() <= TIE * a.beta, 0.5, expected), torch.ones_like(loss))
        sides = {
            "chosen": (good, loss.new_ones(int(good.sum()))),
            "rejected": (~good, loss.new_ones(int((~good).sum()))),
        }
    else:
        better, worse = (torch.tensor(x, device=logps.device) for x in pairs(examples)[:2])
        weights, right = (logps.new_tensor(x) for x in pairs(examples)[2:])
        if a.loss == "plackett_luce":
            loss = losses.plackett_luce(*by_prompt(a.beta * ratios, examples))
        else:
            both = lambda x: (x[better], x[worse])  # noqa: E731
            loss = LOSSES[a.loss](a, Pairs(*both(ratios), *both(logps), *both(lengths), delta)) * weights
        totals["loss"] = (loss.detach().sum(), float(len(examples)))
        margins = rewards[better] - rewards[worse]
        count("rewards/margins", margins, weights)
        expected = torch.where(margins > 0, right, 1 - right)
        tied = margins.abs() <= TIE * a.beta / (lengths[better] if a.loss in PER_TOKEN else 1)
        count("rewards/accuracies", torch.where(tied, 0.5, expected), weights)
        sides = {"chosen": (better, weights), "rejected": (worse, weights)}
    for side, (rows, weights) in sides.items():
        count(f"rewards/{side}", rewards[rows], weights)
        count(f"logps/{side}", logps[rows], weights)
        count(f"logps/{side}_delta", (logps - ref_logps)[rows], weights)
    return loss.sum(), totals


def means(parts: Sequence[dict[str, tuple[Tensor, float]]]) -> dict[str, float]:
    """Each metric over all micro-batches: the sums divided by the weights."""
    names = sorted({name for part in parts for name in part})
    pooled = {n: [sum(float(part[n][i]) for part in parts if n in part) for i in (0, 1)] for n in names}
    found = {n: total / weight for n, (total, weight) in pooled.items() if weight}
    if "rewards/margins" not in found and {"rewards/chosen", "rewards/rejected"} <= found.keys():
        found["rewards/margins"] = found["rewards/chosen"] - found["rewards/rejected"]  # kto has no pairs
    return found


def guard(a: Args, gaps: Tensor, loss: float) -> None:
    """Before the first update the policy is the reference: log-ratios are 0 and the loss has its value there.

    `gaps` are |log pi - log ref| of the step's responses. What would break this: a reference scored with other weights,
    another dtype or template, dropout, attention that leaks between responses, a wrong shift.
    """
    if a.ref:
        print(f"step-0 guard: skipped, since the reference is {a.ref} and not the starting weights")
        return
    worst = gaps.max().item() if a.dtype == "float32" else gaps.mean().item()
    if a.dtype != "float32":
        print(f"step-0 guard: mean |log-ratio| {worst:.3g} nats in {a.dtype}")
    require(
        worst < (1e-3 if a.dtype == "float32" else 0.5),
        f"step-0 guard: the policy is {worst:.3g} nats from the reference that it starts from: the scores disagree",
    )
    if a.loss in LN2_AT_START and a.dtype == "float32":
        require(
            abs(loss - math.log(2)) < 1e-3 * max(1, a.beta) * (1 + a.dpop_lambda if a.loss == "dpop" else 1),
            f"step-0 guard: the {a.loss} loss is {loss:.6f} at the start, where it should be ln 2 = 0.693147",
        )


# ---------------------------------------------------------------------------------------------------------------- data


def read(a: Args, source: str, tokenizer) -> list[Example]:
    """The preferences of a source as token ids; prints what became of its rows."""
    if source == "reviews":
        rows, skipped = reviews.rows("preference", REVIEWS), []
    else:
        rows, skipped = read_rows(source, a.split, a.skip_bad_rows)
    kind = "unpaired" if a.loss == "kto" else "preference"
    examples, report = build(rows, tokenizer, kind, a.max_prompt_length, a.max_length, a.skip_bad_rows, skipped)
    print(f"{source}\n{report}\n")
    return examples


# ---------------------------------------------------------------------------------------------------------------- main


def main(a: Args) -> dict[str, float]:
    """Trains, and returns the final metrics (docs/metrics.md)."""
    to_make = a.model == train_sft.Args.out and not train_sft.is_made()
    tokenizer = reviews.tokenizer() if to_make else models.load_tokenizer(a.model, a.trust_remote_code)
    embedded = tokenizer.get_vocab() == reviews.tokenizer().get_vocab()  # then gold reward and grammar are known
    defaults = DEFAULTS["reviews" if embedded else "any"]
    a = replace(a, **{name: value for name, value in defaults.items() if getattr(a, name) is None})
    check(a)
    check_loss(a)
    torch.manual_seed(a.seed)
    run = parallel.start(a, __file__)
    require(not (to_make and parallel.several()), f"{a.model} is missing: run train_sft.py first, or name a --model")

    # ------------------------------------------------------------------------------------------------------------ data
    if a.ref and models.load_tokenizer(a.ref, a.trust_remote_code, "--ref").get_vocab() != tokenizer.get_vocab():
        raise BadInput(f"--ref {a.ref}: its tokenizer is not the one of --model {a.model}")
    train, held = read(a, a.data, tokenizer), []
    if a.eval_data:
        held = read(a, a.eval_data, tokenizer)
    else:
        train, held = held_out(train, a.eval_fraction)
    if a.loss == "plackett_luce":
        train = without_ties(train, a.ties, a.seed)
        held = held if a.ties == "random" else without_ties(held, a.ties, a.seed)
    require(bool(train), f"--data {a.data}: no example is left to train on")
    print(f"{len(train)} examples to train on, {len(held)} held out")
    steps_per_epoch = math.ceil(len(train) / a.batch_size)
    steps = min(a.epochs * steps_per_epoch, a.max_steps or math.inf)
    if steps < steps_per_epoch:  # then most rows are never seen, and need no reference log-probs
        train = random.Random(a.seed).sample(train, steps * a.batch_size)
    if a.dry_run:
        print("\n\n".join(show(e, tokenizer) for e in train[:3]))
        return {}

    # ----------------------------------------------------------------------------------------------------------- model
    if to_make:
        train_sft.make(a.device)
    pad, dtype = models.pad_id(tokenizer), models.DTYPES[a.dtype]
    policy = parallel.load(lambda device: models.load_model(a.model, device, a.trust_remote_code), a.device, dtype)
    layout = models.choose_layout(policy, train + held, pad, dtype, a.layout)
    print(f"{a.model}: {policy.num_parameters() / 1e6:.2f} M parameters, {layout} layout, {a.dtype} on {a.device}")

    def score(model, examples, what="") -> list[Tensor]:
        return models.score(model, examples, layout, pad, a.micro_batch_tokens, dtype, what)

    # ------------------------------------------------------------ reference: its log-probs once, then it leaves memory
    everything = train + held
    others: list[Example] = []
    if a.loss == "kto":  # one more response a prompt, that belongs to another prompt: it estimates the KL term z0
        matched = zip(everything, mismatched(everything, a.seed), strict=True)
        others = [replace(e, responses=[other[: a.max_length - len(e.prompt)]]) for e, other in matched]
    if a.loss in REFERENCE_FREE:
        refs = [torch.zeros(len(e.responses), dtype=torch.float64) for e in everything]
    else:
        reference, asked = policy, everything + others
        if a.ref:
            make = lambda device: models.load_model(a.ref, device, a.trust_remote_code, "--ref")  # noqa: E731
            reference = parallel.load(make, a.device, dtype)
            layout = models.choose_layout(reference, asked, pad, dtype, a.layout if layout == "tree" else layout)
        limits = (a.max_prompt_length, a.max_length)
        settings = {"lengths": limits, "dtype": a.dtype, "layout": layout, "device": torch.device(a.device).type}
        question = models.question(reference, tokenizer, asked, **settings)
        refs = models.cached(Path(a.ref_cache), question, lambda: score(reference, asked, "reference"))
        del reference
    held_refs, other_refs = refs[len(train) : len(everything)], refs[len(everything) :]

    def z0_of(places: Sequence[int]) -> Tensor | None:
        """kto: max(0, mean log-ratio of the mismatched responses) over the examples at these places of `everything`."""
        if a.loss != "kto":
            return None
        logps = torch.cat(score(policy, [others[i] for i in places]))
        return losses.kto_z0(logps - torch.cat([other_refs[i] for i in places]))

    def evaluate(logps: Sequence[Tensor], delta: float = 0.0, z0: Tensor | None = None) -> dict[str, float]:
        """The metrics of these log-probs of the held-out responses, each example counted once."""
        lengths = torch.tensor([len(r) for e in held for r in e.responses])
        _, totals = objective(a, held, torch.cat(logps), torch.cat(held_refs), lengths, delta, z0)
        return {f"eval/{name}": value for name, value in means([totals]).items()}

    # -------------------------------------------------------------------------------------------------------- training
    lora = models.add_lora(policy, a.lora_rank, a.seed) if a.lora_rank else None
    if a.gradient_checkpointing:
        models.checkpoint_layers(policy)
    if a.compile:
        models.compile_layers(policy)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=a.lr, weight_decay=a.weight_decay, fused=True)
    first, delta, weights, final = 0, 0.0, None, {}
    if state := parallel.load_checkpoint(run, policy, optimizer):
        first, delta = state["step"], state["delta"]
        policy.load_state_dict(state["model"], strict=not lora)
        optimizer.load_state_dict(state["optimizer"])
        del state
    run.start(first, steps)
    held_places = range(len(train), len(everything))
    if first == 0 and held:
        known = not a.ref and a.loss not in REFERENCE_FREE
        run.log(0, evaluate(held_refs if known else score(policy, held), z0=z0_of(held_places)))

    for step in range(first, steps):
        began = time.perf_counter()
        epoch, place = divmod(step, steps_per_epoch)
        order = random.Random(f"{a.seed} {epoch}").sample(range(len(train)), len(train))
        places = order[place * a.batch_size : (place + 1) * a.batch_size]
        examples = [train[i] for i in places]
        count = sum(len(e.responses) for e in examples) if a.loss == "kto" else len(examples)
        z0 = z0_of(places)

        models.use_layout(policy, layout)
        parts, gaps = [], []
        for group in micro_batches(examples, a.micro_batch_tokens, layout, policy):
            part = [examples[i] for i in group]
            batch = collate(part, layout, pad, a.device)
            _, logps = models.response_logps(policy, batch, dtype, keep_bytes=a.keep_softmax_mib << 20)
            ref_logps = torch.cat([refs[places[i]] for i in group]).to(a.device)
            loss, totals = objective(a, part, logps, ref_logps, batch.lengths, delta, z0)
            (loss / count).backward()
            parts.append(totals)
            gaps.append((logps - ref_logps).detach().abs())
        metrics = means(parallel.gather(parts))

        norm = parallel.clip(policy, a.max_grad_norm)
        run.require_finite(step + 1, metrics["loss"], norm, examples)
        if step == 0 and a.loss not in REFERENCE_FREE:
            guard(a, torch.cat(parallel.gather(gaps)), metrics["loss"])
        rate = a.lr * schedule(step, steps, a.warmup)
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if a.loss == "bco":
            delta += ((metrics["rewards/chosen"] + metrics["rewards/rejected"]) / 2 - delta) / (step + 1)

        # ----------------------------------------------- what follows is bookkeeping: metrics, evaluation, checkpoints
        seconds = time.perf_counter() - began
        speed = sum(len(e.prompt) + len(response) for e in examples for response in e.responses) / seconds
        metrics |= {"grad_norm": norm, "lr": rate, "epoch": (step + 1) / steps_per_epoch}
        run.log(step + 1, metrics | {"perf/tokens_per_second": speed, "perf/seconds": seconds})
        run.progress(step + 1, loss=metrics["loss"], accuracy=metrics["rewards/accuracies"], tokens_per_s=speed)
        last = step + 1 == steps
        if held and ((step + 1) % a.eval_every == 0 or last):
            final = evaluate(score(policy, held), delta, z0_of(held_places))
            run.log(step + 1, final)
        if run.interrupted or last or (step + 1) % a.save_every == 0:
            weights = {"model": models.trained(policy), "optimizer": optimizer.state_dict()}
            run.save_checkpoint(step + 1, {**weights, "step": step + 1, "delta": delta})
        if run.interrupted:
            run.leave(step + 1)
    run.end()

    # ------------------------------------------------------------------------------------------------ before and after
    del optimizer, weights
    if held:
        final = final or evaluate(score(policy, held), delta, z0_of(held_places))
    policy, lora = parallel.whole(policy, a.device, lora)
    if not policy:  # a process whose work is done: the first writes answers and model
        return final
    reference = policy  # without its adapters
    if a.ref or not lora:
        reference = models.load_model(a.ref or a.model, str(policy.device), a.trust_remote_code)
    rows, results = [], {}
    if held:
        with models.without_lora(reference):
            start = score(reference, held) if a.loss in REFERENCE_FREE else held_refs
        no_kl = torch.zeros(()) if a.loss == "kto" else None
        metrics = {"before": evaluate(start, z0=no_kl), "after": final}
        results = {f"{side}/{name}": value for side, found in metrics.items() for name, value in found.items()}
        for name in ("accuracies", "margins"):
            if any(f"eval/rewards/{name}" not in found for found in metrics.values()):
                continue  # kto with one label only has no margin
            rows.append([f"held-out {name}", *(f"{found[f'eval/rewards/{name}']:.3f}" for found in metrics.values())])
        results["ceiling"] = ceiling(held)
        if results["ceiling"] < 1:
            rows.insert(1, ["  (best possible with these labels)", "", f"{results['ceiling']:.3f}"])

    prompts = list({e.prompt_text: e for e in held or train}.values())
    prompts = prompts[: a.eval_prompts]
    after = answer(policy, tokenizer, prompts, a.max_new_tokens, a.seed)
    with models.without_lora(reference):
        before = answer(reference, tokenizer, prompts, a.max_new_tokens, a.seed)
        ref_logps = score(reference, after)
    answers = {"before": before, "after": after}
    found = {side: facts(x, end_ids(policy, tokenizer), embedded) for side, x in answers.items()}
    ratios = zip(score(policy, after), ref_logps, strict=True)
    found["before"]["kl"], found["after"]["kl"] = [0.0] * len(prompts), [(x - y).item() for x, y in ratios]
    more_rows, more_results = before_and_after(found)
    results |= more_results
    print("\n" + table([f"{len(held)} held-out examples, {len(prompts)} answers", "before", "after"], rows + more_rows))
    if "gain/gold" in results:
        print("gain in gold reward: {gain/gold:.2f} +- {gain/gold_interval:.2f} deviations of before".format(**results))

    texts = [[e.response_texts[0] for e in x] for x in answers.values()]
    samples = [{"prompt": e.prompt_text, "before": x, "after": y} for e, x, y in zip(prompts, *texts, strict=True)]
    for sample in samples[:4]:
        print(f"\nprompt     {sample['prompt'][-300:]}\nreference  {sample['before']}\npolicy     {sample['after']}")
    run.samples(steps, samples)
    if lora and a.lora_merge:
        policy, lora = lora.merge_and_unload(), None
    models.save(policy, tokenizer, run.out, lora)
    run.finish(results, PANELS)
    print(
        f"\nThe model is in {run.out}, with curves.png, metrics.jsonl and all {len(samples)} answers in samples.jsonl."
    )
    given = "".join(f" --{n} {getattr(a, n)}" for n in ("model", "data", "loss") if getattr(a, n) != getattr(Args, n))
    print(f"Next: python train_dpo.py{given} --beta {a.beta / 2:g} --out {run.out}-loose  (a longer leash)")
    return results


if __name__ == "__main__":
    cli(main, Args)
