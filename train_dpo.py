"""Direct preference optimisation: train a policy straight from preferences, without a reward model.

    python train_dpo.py                                         the embedded task, film reviews; makes its SFT model
    python train_dpo.py --model DIR --data prefs.jsonl --out runs/my-dpo    your own model and pairs
    python train_dpo.py --loss ipo --beta 0.05 --out runs/ipo   another loss of the family

A preference says that response w to a prompt x is better than response l. DPO (Rafailov et al. 2023, Eq. 7) raises
the probability of w over that of l, both relative to a frozen reference model, by logistic regression:

    loss = -log sigmoid( beta * [ (log pi(w|x) - log ref(w|x)) - (log pi(l|x) - log ref(l|x)) ] )

beta * log(pi / ref) is the implicit reward: the policy is its own reward model. A larger beta keeps the policy closer
to the reference. Below, in order: flags, objective, data, model, reference log-probs (once), the loop, results.
"""

import functools
import math
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

import train_sft
from rlhf import losses, require
from rlhf.tree import collate, send
from support import dryrun, generate, models, report, reviews, runs, scoring, sharding
from support.examples import Example, load_split, show
from support.parallel import gather
from support.preferences import by_prompt, ceiling, expected_accuracy, mismatched, pair_tensors, without_ties
from support.refcache import reference_logps

# --------------------------------------------------------------------------------------------------------------- flags

LOSSES = {  # name: per-pair losses [m], from the flags a and a batch x of pairs
    "dpo": lambda a, x: losses.dpo(x.chosen, x.rejected, a.beta, a.label_smoothing, a.clip),
    "robust": lambda a, x: losses.robust(x.chosen, x.rejected, a.beta, a.label_smoothing),
    "ipo": lambda a, x: losses.ipo(x.chosen, x.rejected, a.beta),
    "ipo_norm": lambda a, x: losses.ipo_norm(x.chosen, x.rejected, *x.lengths, a.beta),
    "dpo_norm": lambda a, x: losses.dpo_norm(x.chosen, x.rejected, *x.lengths, a.beta),
    "r_dpo": lambda a, x: losses.r_dpo(x.chosen, x.rejected, *x.lengths, a.beta, a.length_penalty),
    "dpo_nll": lambda a, x: losses.dpo_nll(x.chosen, x.rejected, x.chosen_logps, x.lengths[0], a.beta, a.nll_coef),
    "dpop": lambda a, x: losses.dpop(x.chosen, x.rejected, a.beta, a.dpop_lambda),
    "hinge": lambda a, x: losses.hinge(x.chosen, x.rejected, a.beta),
    "exo": lambda a, x: losses.exo(x.chosen, x.rejected, a.beta, a.label_smoothing),
    "nca": lambda a, x: losses.nca(x.chosen, x.rejected, a.beta),
    "apo_zero": lambda a, x: losses.apo_zero(x.chosen, x.rejected, a.beta),
    "apo_down": lambda a, x: losses.apo_down(x.chosen, x.rejected, a.beta),
    "bco": lambda a, x: losses.bco(x.chosen, x.rejected, a.beta, x.delta),
    "sppo": lambda a, x: losses.sppo(x.chosen, x.rejected, a.beta),
    "discopop": lambda a, x: losses.discopop(x.chosen, x.rejected, a.beta, a.discopop_tau),
    "simpo": lambda a, x: losses.simpo(x.chosen_logps, x.rejected_logps, *x.lengths, a.beta, a.gamma_beta_ratio),
    "orpo": lambda a, x: losses.orpo(x.chosen_logps, x.rejected_logps, *x.lengths, a.orpo_lambda),
}
REFERENCE_FREE = {"simpo", "orpo"}  # the reference's log-probs count as 0
PER_TOKEN = {"simpo", "orpo", "dpo_norm", "ipo_norm"}  # these losses, and their metrics, use means over tokens
REVERSE_KL_ONLY = PER_TOKEN | {"kto", "sppo", "nca", "apo_zero", "apo_down", "dpop"}  # check_flags says why
TIE = 1e-4  # nats: a margin this close to 0 may be rounding, so its pair counts as half right
LN2_AT_START = {"dpo", "robust", "dpo_norm", "dpop"}  # these losses are ln 2 while policy and reference agree
DEFAULTS = {  # for unset flags: any model, or the embedded task's small one
    "any": {"beta": 0.1, "lr": 5e-7, "eval_fraction": 0.05, "eval_prompts": 16, "eval_pairs": 512},
    "reviews": {"beta": 0.6, "lr": 3e-4, "eval_fraction": 0.1, "eval_prompts": 512, "eval_pairs": reviews.ROWS},
}
Loss = Literal[(*LOSSES, "kto", "plackett_luce")]


@dataclass
class Args(runs.EpochFlags):
    ref: str | None = None
    """reference model (frozen), same tokenizer; default: the starting weights"""
    out: str = "runs/dpo"
    loss: Loss = "dpo"
    """which loss (rlhf/losses.py has each equation); a loss of pairs is averaged over the pairs of each prompt"""
    beta: float | None = None
    """reward per nat of log(pi / ref), > 0: a larger beta keeps the policy closer to the reference (simpo and orpo have
    no reference, and orpo has no beta). Papers use other values for other losses (simpo 2, dpo_norm 5); default 0.1
    (embedded: 0.6)"""
    label_smoothing: float = 0.0
    """assumed share of flipped labels, in [0, 0.5), for dpo (then called conservative DPO), robust and exo (where
    it must be > 0)"""
    divergence: Literal["reverse_kl", "forward_kl", "js", "alpha", "chi_po"] = "reverse_kl"
    """the f-divergence whose implicit reward replaces log(pi / ref). reverse_kl works with every loss, the others only
    with dpo, robust, ipo, r_dpo, dpo_nll, hinge, exo, bco, discopop and plackett_luce"""
    divergence_alpha: float = 0.5
    """exponent of --divergence alpha, >= 0 and not 1"""
    clip: float | None = None
    """--loss dpo: the sigmoid's argument, beta times the margin of log-ratios, is clipped to +- this value, > 0 (the
    chi-PO paper takes twice the largest reward); default: no clipping"""
    length_penalty: float = 0.01
    """r_dpo: reward subtracted for each token of a response, >= 0"""
    nll_coef: float = 1.0
    """dpo_nll: weight of the chosen response's NLL per token, >= 0"""
    dpop_lambda: float = 50.0
    """dpop: weight of the penalty on a chosen response that is less likely than under the reference, >= 0"""
    discopop_tau: float = 0.05
    """discopop: temperature of the gate between its two losses, in (0, 1]"""
    gamma_beta_ratio: float = 0.5
    """simpo: target margin divided by beta, in nats per token, >= 0"""
    orpo_lambda: float = 0.1
    """orpo: weight of the odds-ratio term, >= 0"""
    desirable_weight: float = 1.0
    """kto: weight of desirable responses, >= 0"""
    undesirable_weight: float = 1.0
    """kto: weight of undesirable responses, >= 0"""
    ties: Literal["refuse", "drop", "random"] = "refuse"
    """plackett_luce: what to do with a ranking that has ties; random breaks them at random, in training only"""
    lr: float | None = None
    """peak learning rate of AdamW, > 0; default 5e-7 (embedded: 3e-4)"""
    eval_pairs: int | None = None
    """maximum number of held-out rows to score, >= 0, chosen by hash; default 512 (embedded: all)"""
    keep_softmax_mib: int | None = None
    """MiB, >= 0: a softmax of up to this size is kept for the backward pass, and a larger one is recomputed; default
    10240 on CUDA, else 1024"""
    ref_cache: str = "runs/ref_cache"
    """where the reference's log-probs are cached; runs on the same data share them"""


def check_flags(a: Args) -> None:
    """Raise BadInput if flags conflict; support/runs.py has the range of each.

    An implicit reward is known only up to a constant per prompt, and only that of reverse_kl is a log-ratio. So the
    other divergences fit the losses of a margin, in which the constant cancels, and bco, which bounds dpo's loss from
    above whatever the constant is. The remaining losses need the log-ratio itself: they average it over tokens
    (*_norm), subtract a KL (kto), take it as a density ratio (nca), fit it to (win rate - 1/2) / beta (sppo), or
    compare it with 0, where pi = ref (apo_zero, apo_down, dpop). simpo and orpo have no reference.
    """
    require(a.loss != "exo" or a.label_smoothing > 0, "--loss exo needs a --label-smoothing above 0, say 0.001")
    fits = a.divergence == "reverse_kl" or a.loss not in REVERSE_KL_ONLY
    require(fits, f"--loss {a.loss} is not defined with --divergence {a.divergence}: leave that out")


# ----------------------------------------------------------------------------------------------------------- objective


@dataclass
class Pairs:
    """m preference pairs. `chosen`, `rejected`: what `implicit_reward` returns (reverse_kl: log-ratios to ref)."""

    chosen: Tensor
    rejected: Tensor
    chosen_logps: Tensor
    rejected_logps: Tensor
    lengths: tuple[Tensor, Tensor]  # in tokens, of chosen and rejected
    delta: float = 0.0  # bco: running mean of the rewards


def objective(a: Args, examples: Sequence[Example], logps, ref_logps, lengths, delta=0.0, z0=None):
    """Summed loss of p prompts (for kto: of b responses), and each metric as (weighted sum, total weight).

    logps, ref_logps and lengths are those of all b responses, prompt after prompt. Gradient flows to logps.
    """
    log_ratios = losses.implicit_reward(logps, ref_logps, a.divergence, a.divergence_alpha)  # or what replaces them
    rewards = a.beta * log_ratios.detach() / (lengths if a.loss in PER_TOKEN else 1)
    totals: report.Totals = {}

    def add(name: str, values: Tensor, weights: Tensor) -> None:
        totals[name] = ((values.detach() * weights).sum(), weights.sum())

    if a.loss == "kto":
        good = send(torch.tensor([label for e in examples for label in e.labels]), logps.device)
        loss = losses.kto(log_ratios, good, z0, a.beta, a.desirable_weight, a.undesirable_weight)
        ones = torch.ones_like(loss)
        add("loss", loss, ones)
        probability = torch.tensor([e.probability for e in examples for _ in e.labels], dtype=logps.dtype)
        probability = send(probability, logps.device)
        p_desirable = torch.where(good, probability, 1 - probability)
        add("rewards/accuracies", expected_accuracy(rewards - a.beta * z0, p_desirable, TIE * a.beta), ones)
        everywhere = slice(None)
        sides = {"chosen": (everywhere, good.to(loss.dtype)), "rejected": (everywhere, (~good).to(loss.dtype))}
    else:
        better, worse, weights, label_probability = pair_tensors(examples, logps)
        if a.loss == "plackett_luce":
            loss = losses.plackett_luce(*by_prompt(a.beta * log_ratios, examples))
        else:
            both = lambda x: (x[better], x[worse])  # noqa: E731
            loss = LOSSES[a.loss](a, Pairs(*both(log_ratios), *both(logps), both(lengths), delta)) * weights
        totals["loss"] = (loss.detach().sum(), float(len(examples)))
        margins = rewards[better] - rewards[worse]
        add("rewards/margins", margins, weights)
        tie = TIE * a.beta / (lengths[better] if a.loss in PER_TOKEN else 1)
        add("rewards/accuracies", expected_accuracy(margins, label_probability, tie), weights)
        sides = {"chosen": (better, weights), "rejected": (worse, weights)}
    for side, (places, weights) in sides.items():
        add(f"rewards/{side}", rewards[places], weights)
        add(f"logps/{side}", logps[places], weights)
        add(f"logps/{side}_delta", (logps - ref_logps)[places], weights)
    return loss.sum(), totals


# ---------------------------------------------------------------------------------------------------------------- main


def main(a: Args) -> dict[str, float]:
    """Train, and return the final metrics (docs/metrics.md)."""
    if a.lora_merge and not a.lora_rank:
        return runs.merge_adapters(a)
    tokenizer, embedded = runs.load_tokenizer(a.model, a.trust_remote_code)
    a = runs.with_defaults(a, DEFAULTS["reviews" if embedded else "any"])
    check_flags(a)
    run = runs.start(a, __file__)

    # ------------------------------------------------------------------------------------------------------------ data
    models.require_same_tokenizer(a.ref, a.model, tokenizer, a.trust_remote_code)
    kind = "unpaired" if a.loss == "kto" else "preference"
    train, held = load_split(kind, tokenizer, a)
    if a.loss == "plackett_luce":
        train = without_ties(train, a.ties, a.seed)
        held = held if a.ties == "random" else without_ties(held, a.ties, a.seed)
        require(bool(train), "--data: no ranking without ties is left to train on")
    print(f"{len(train)} examples to train on, {len(held)} held out")
    steps_per_epoch = math.ceil(len(train) / a.batch_size)
    steps = min(a.epochs * steps_per_epoch, a.max_steps or math.inf)

    @functools.lru_cache(1)
    def order(epoch: int) -> list[int]:
        """The places of the training rows in this epoch's order, which is the same in a resumed run."""
        return random.Random(f"{a.seed} {epoch}").sample(range(len(train)), len(train))

    held_places = range(len(train), len(train + held))
    seen = range(len(train)) if steps >= steps_per_epoch else order(0)[: steps * a.batch_size]
    scored = [*sorted(seen), *held_places]  # the other rows need no log-probs
    everything = train + held
    others: list[Example] = []
    if a.loss == "kto":  # each prompt with a response to another prompt: these estimate the KL term z0
        for e, (other, trained) in zip(everything, mismatched(everything, a.seed), strict=True):
            limit = a.max_length - len(e.prompt)
            others.append(replace(e, responses=[other[:limit]], trained=trained and [trained[:limit]]))
    if a.dry_run:
        print("\n\n".join(show(e, tokenizer) for e in train[:3]))
        to_score = 0 if a.loss in REFERENCE_FREE else len(scored) * (2 if a.loss == "kto" else 1)
        dryrun.dry_run(a, train, tokenizer, scored_before=to_score)
        return {}

    # ----------------------------------------------------------------------------------------------------------- model
    runs.make_missing(train_sft, a.model, a.device)
    make_policy = lambda device: models.load_model(a.model, device, a.trust_remote_code)  # noqa: E731
    dtype = models.DTYPES[a.dtype]
    policy, low_bits = sharding.load_trained(make_policy, a.device, dtype, None if a.lora_rank else a.seed)
    batching = scoring.batching_for(policy, train + held, tokenizer, a)
    if a.eval_prompts:
        generate.choose_sampler(policy, [e.prompt for e in held or train], a.max_new_tokens, batching.pad_id, dtype)
    run.check_same(data=train, eval_data=held, model=policy)

    # ------------------------------------------------------------ reference: score once, then free it
    if a.loss in REFERENCE_FREE:
        logps = [torch.zeros(len(everything[i].responses), dtype=torch.float64) for i in scored]
    else:
        reference, to_score = policy, [everything[i] for i in scored] + [others[i] for i in scored if others]
        if a.ref:
            make_reference = lambda device: models.load_model(a.ref, device, a.trust_remote_code, "--ref")  # noqa: E731
            reference = sharding.load(make_reference, a.device, batching.dtype)
            run.check_same(ref=reference)
            asked = a.layout if batching.layout == "tree" else "padded"  # both models must fit the tree layout
            layout = scoring.choose_layout(reference, to_score, batching._replace(layout=asked))
            batching = batching._replace(layout=layout)
        weights = run.digests["ref" if a.ref else "model"]
        logps = reference_logps(reference, weights, tokenizer, to_score, batching, a)
        del reference
    refs = dict(zip(scored, logps[: len(scored)], strict=True))
    other_refs = dict(zip(scored, logps[len(scored) :], strict=True)) if others else {}
    held_refs = [refs[i] for i in held_places]

    def z0_of(places: Sequence[int]) -> Tensor | None:
        """kto: max(0, mean log-ratio of the mismatched responses) over the examples at these places of `everything`."""
        if a.loss != "kto":
            return None
        logps = torch.cat(scoring.score_logps(policy, [others[i] for i in places], batching))
        return losses.kto_z0(logps - torch.cat([other_refs[i] for i in places]))

    def evaluate(logps: Sequence[Tensor], delta: float = 0.0, z0: Tensor | None = None) -> dict[str, float]:
        """Metrics of the held-out examples, from the log-probs of their responses."""
        lengths = torch.tensor([n for e in held for n in e.lengths])
        _, totals = objective(a, held, torch.cat(logps), torch.cat(held_refs), lengths, delta, z0)
        return {f"eval/{name}": value for name, value in means([totals]).items()}

    # -------------------------------------------------------------------------------------------------------- training
    lora = models.prepare_training(policy, low_bits, a, a.lora_rank)
    optimizer = models.adamw(policy, low_bits, a, lr=a.lr, weight_decay=a.weight_decay)
    first, delta, final = 0, 0.0, {}
    keep_bytes = None if a.keep_softmax_mib is None else a.keep_softmax_mib << 20
    if state := run.load_checkpoint(model=policy, optimizer=optimizer):
        first, delta = state["step"], state["delta"]
        models.restore(policy, low_bits, state["model"])
        optimizer.load_state_dict(state["optimizer"])
        del state
    run.begin_loop(first, steps)
    if first == 0 and held:
        is_reference = not a.ref and a.loss not in REFERENCE_FREE  # then the policy's log-probs are known
        start = held_refs if is_reference else scoring.score_logps(policy, held, batching, "held-out rows")
        run.log(0, evaluate(start, z0=z0_of(held_places)))

    for step in range(first, steps):
        began = time.perf_counter()
        epoch, nth = divmod(step, steps_per_epoch)
        places = order(epoch)[nth * a.batch_size : (nth + 1) * a.batch_size]
        examples = [train[i] for i in places]
        count = sum(len(e.responses) for e in examples) if a.loss == "kto" else len(examples)
        z0 = z0_of(places)

        parts, gaps = [], []
        for group in scoring.micro_batches(policy, examples, batching):
            members = [examples[i] for i in group]
            batch = collate(members, batching.layout, batching.pad_id, a.device)
            _token_logps, logps = scoring.response_logps(policy, batch, batching.dtype, keep_bytes=keep_bytes)
            ref_logps = send(torch.cat([refs[places[i]] for i in group]), a.device)
            loss, totals = objective(a, members, logps, ref_logps, batch.lengths, delta, z0)
            (loss / count).backward()
            parts.append(totals)
            gaps.append(torch.stack([(logps - ref_logps).detach().abs(), batch.lengths], 1))
        parts.append({"grad_norm": (sharding.clip_gradients(optimizer, a.max_grad_norm), 1.0)})
        metrics = means(gather(report.read(parts)))
        run.require_finite(step + 1, metrics["loss"], metrics["grad_norm"], examples)
        if step == 0 and a.loss not in REFERENCE_FREE:
            guard(a, torch.cat(gather(gaps)), metrics["loss"], scoring.growth(policy))
        rate = a.lr * runs.schedule(step, steps, a.warmup, a.schedule)
        for param_group in optimizer.param_groups:
            param_group["lr"] = rate
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if a.loss == "bco":
            delta += ((metrics["rewards/chosen"] + metrics["rewards/rejected"]) / 2 - delta) / (step + 1)

        # ----------------------------------------------- what follows is bookkeeping: metrics, evaluation, checkpoints
        seconds = time.perf_counter() - began
        speed = sum(len(e.prompt) + len(response) for e in examples for response in e.responses) / seconds
        metrics |= {"lr": rate, "epoch": (step + 1) / steps_per_epoch}
        run.log(step + 1, metrics | {"perf/tokens_per_second": speed, "perf/seconds": seconds})
        run.progress(step + 1, loss=metrics["loss"], accuracy=metrics["rewards/accuracies"], tokens_per_s=speed)
        last = step + 1 == steps
        if held and ((step + 1) % a.eval_every == 0 or last):
            logps = scoring.score_logps(policy, held, batching, "held-out rows")
            final = evaluate(logps, delta, z0_of(held_places))
            run.log(step + 1, final)
        if run.interrupted or last or (step + 1) % a.save_every == 0:
            state = {"model": models.trained(policy, low_bits), "optimizer": optimizer.state_dict()}
            run.save_checkpoint(step + 1, {**state, "step": step + 1, "delta": delta})
            del state
        if run.interrupted:
            run.leave(step + 1)
    run.end_loop()

    # ------------------------------------------------------------------------------------------------ before and after
    del optimizer
    if held:
        final = final or evaluate(scoring.score_logps(policy, held, batching), delta, z0_of(held_places))
    policy, low_bits, lora = sharding.unshard(policy, low_bits, make_policy, a, lora)
    if not policy:  # this process's work is done: the main process writes answers and model
        return final
    reference = policy  # with LoRA: the same model with its adapters off
    if a.ref or not lora:
        make_start = lambda device: models.load_model(a.ref or a.model, device, a.trust_remote_code)  # noqa: E731
        reference = sharding.load(make_start, str(policy.device), dtype)
    rows, results = [], {}
    if held:
        with models.without_lora(reference):
            start = scoring.score_logps(reference, held, batching) if a.loss in REFERENCE_FREE else held_refs
        sides = {"before": evaluate(start, z0=torch.zeros(()) if a.loss == "kto" else None), "after": final}
        results = {f"{side}/{name}": value for side, metrics in sides.items() for name, value in metrics.items()}
        results["ceiling"] = ceiling(held)
        for name in ("accuracies", "margins"):
            values = [metrics.get(f"eval/rewards/{name}") for metrics in sides.values()]
            if None not in values:  # kto has no margin if all labels are the same
                rows.append([f"held-out {name}", *(f"{x:.3f}" for x in values)])
        if results["ceiling"] < 1:
            rows.insert(1, ["  (best possible with these labels)", "", f"{results['ceiling']:.3f}"])
    prompts = list({e.prompt_text: e for e in held or train}.values())[: a.eval_prompts]
    more_rows, more_results, samples = report.before_and_after(
        reference, policy, reference, tokenizer, prompts, a, batching, embedded
    )
    results |= more_results
    title = f"{len(held)} held-out examples, {len(prompts)} answers, {a.dtype}"
    run.samples(steps, samples)
    models.save(policy, tokenizer, run.out, lora, a.lora_merge, low_bits, a.save_dtype)
    run.finish(results, PANELS)
    report.print_comparison(title, rows + more_rows, results, samples)
    print(f"\nThe model is in {run.out}, with curves.png, metrics.jsonl and {len(samples)} answers in samples.jsonl.")
    if a.loss not in REFERENCE_FREE:  # then beta sets the distance to the reference
        names = "model ref data split eval_data eval_split loss label_smoothing divergence divergence_alpha ties"
        names += " batch_size epochs max_steps max_length max_prompt_length"
        if a.lr != DEFAULTS["reviews" if embedded else "any"]["lr"]:
            names += " lr"
        beta = f"--beta {a.beta / 2:g} --out {run.out}-loose  (further from ref)"
        print(f"Next: python train_dpo.py{runs.repeated(a, *names.split())} {beta}")
    return results


# -------------------------------------------------------------------------------------------- metrics, guard, curves


def means(parts: Sequence[report.Totals]) -> dict[str, float]:
    """Each metric over all micro-batches; kto has no pairs, so its margin is the difference of the mean rewards."""
    metrics = report.weighted_means(parts)
    if "rewards/margins" not in metrics and {"rewards/chosen", "rewards/rejected"} <= metrics.keys():
        metrics["rewards/margins"] = metrics["rewards/chosen"] - metrics["rewards/rejected"]
    return metrics


def guard(a: Args, gaps: Tensor, loss: float, growth: float = 1.0) -> None:
    """Raise BadInput unless policy and reference agree before the first update: log-ratios 0, loss ln 2 (LN2_AT_START).
    With --ref they need not agree, and a line says so.

    `gaps` [b 2] has |log pi - log ref| of each response and its length in tokens; rounding grows with the length's
    root, and in float32 with the model by `growth`. The guard catches a reference that was scored with other weights or
    in another dtype, dropout, and attention that leaks between prompts. It cannot see an error that both models share,
    such as a wrong shift of the targets.
    """
    if a.ref:
        print(f"step-0 guard: skipped, since the reference is {a.ref} and not the starting weights")
        return
    gap, lengths = gaps.unbind(1)
    bound = {"float32": 1e-4 * growth, "bfloat16": 0.06}[a.dtype] * lengths.sqrt()
    if a.dtype != "float32":  # the mean, because a single response may be far off
        gap, bound = gap.mean(), bound.mean()
        print(f"step-0 guard: mean |log-ratio| {gap.item():.3g} nats in {a.dtype} (limit {bound.item():.3g})")
    require(
        bool((gap < bound).all()),
        f"step-0 guard: policy and reference are the same, but their log-probs differ by {gap.max().item():.3g} nats",
    )
    if a.loss in LN2_AT_START and a.dtype == "float32":
        require(
            abs(loss - math.log(2)) < 1e-3 * growth * max(1, a.beta) * (1 + a.dpop_lambda if a.loss == "dpop" else 1),
            f"step-0 guard: the {a.loss} loss is {loss:.6f} at the start, but it should be ln 2 = 0.693147",
        )


PANELS = {  # of curves.png
    "loss": ["loss", "eval/loss"],
    "accuracy of the implicit reward": ["rewards/accuracies", "eval/rewards/accuracies"],
    "margin of the implicit reward": ["rewards/margins", "eval/rewards/margins"],
    "held-out log-prob minus the reference's, nats": ["eval/logps/chosen_delta", "eval/logps/rejected_delta"],
    "gradient norm": ["grad_norm"],
    "learning rate": ["lr"],
}

if __name__ == "__main__":
    runs.cli(main, Args)
