"""The reward model, phase 2c: learn from rankings how good people would find a response.

    python train_rm.py                                          the embedded task; makes its SFT model first
    python train_rm.py --model runs/sft --data preferences.jsonl
    python train_rm.py --loss plackett_luce --data rankings.jsonl --out runs/rm-pl

A reward model is the SFT model with one number in place of the next word: r(x, y) = w . h, the hidden state h at the
last token of prompt x and response y. People ranked k responses to a prompt; over all pairs where i is ranked above j

    loss = - 1 / C(k, 2) * sum over pairs of log sigmoid( r(x, y_i) - r(x, y_j) )

(Ouyang et al. 2022, Eq. 1), the likelihood of their choices if P(i over j) = sigmoid(r_i - r_j). All responses of a
prompt share one forward pass. Only differences matter, so the mean over the SFT model's own samples is written down
afterwards and taken off wherever the reward is used. In order: data, model, the loop, how far the model can be trusted.
"""

import itertools
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
from rlhf import losses, models, parallel, require, reviews
from rlhf.data import Example, build, ceiling, group_of, held_out, pairs, read_rows, show, without_ties
from rlhf.generate import answer
from rlhf.parallel import micro_batches
from rlhf.runs import check, cli, figure, interval, mean_interval, schedule, table
from rlhf.tree import by_prompt, collate

# --------------------------------------------------------------------------------------------------------------- flags

LOSSES = {  # name: losses of p prompts, from the flags a, rewards and ranks [p, k], and annotated margins [p]
    "pairwise": lambda a, r, ranks, margins: losses.reward_ranking(r, ranks, a.margin_coef * margins, a.centring),
    "plackett_luce": lambda a, r, ranks, margins: losses.plackett_luce(r, ranks),
    "best_of_k": lambda a, r, ranks, margins: losses.best_of_k(r, ranks),
}
TIE = 1e-4  # of the reward: a smaller margin is rounding, and counts as half right
DEFAULTS = {  # of flags that are None: for any model, and for the embedded task's small one
    "any": {"lr": 1e-5, "eval_fraction": 0.05, "eval_prompts": 256},
    "reviews": {"lr": 1e-3, "eval_fraction": 0.1, "eval_prompts": 512},
}
Loss = Literal[(*LOSSES,)]
REVIEWS = 24_000  # rows of the embedded task
PANELS = {  # of curves.png
    "loss, nats": ["loss", "eval/loss"],
    "accuracy": ["rewards/accuracies", "eval/rewards/accuracies"],
    "margin of the reward": ["rewards/margins", "eval/rewards/margins"],
    "reward": ["rewards/chosen", "rewards/rejected"],
    "gradient norm": ["grad_norm"],
    "learning rate": ["lr"],
}


@dataclass
class Args:
    model: str = "runs/sft"
    """starting weights: a causal language model or a reward model, as a run directory, a local folder or a hub id;
    runs/sft is made first where it is missing"""
    data: str = "reviews"
    """reviews (embedded), a .jsonl/.json/.csv/.parquet file (also .gz), a save_to_disk folder or a hub id"""
    split: str | None = None
    """split of a hub data set; default train"""
    eval_data: str | None = None
    """held-out preferences, in the same forms; default: a share of --data"""
    eval_fraction: float | None = None
    """share of prompts held out, by hash of their text, in [0, 1); default 0.05 (embedded: 0.1)"""
    split_by: str | None = None
    """a column (dots reach inside: meta.topic) by whose values rows are held out instead, all of one value together"""
    skip_bad_rows: bool = False
    """drop and count rows that cannot be used instead of stopping at the first"""
    out: str = "runs/rm"
    """run directory; one that is in use is never overwritten"""

    loss: Loss = "pairwise"
    """pairwise: all pairs of a prompt; plackett_luce: the ranking from best to worst; best_of_k: the best one only"""
    margin_coef: float = 0.0
    """pairwise: the reward margin asked for is this times the rows' `margin` (Llama 2), >= 0"""
    centring: float = 0.0
    """pairwise: weight of (r_i + r_j)^2, which keeps rewards near 0, >= 0; 0.01 is usual"""
    ties: Literal["refuse", "drop", "random"] = "refuse"
    """plackett_luce: what to do with a ranking that has ties; random breaks them for training alone"""

    lr: float | None = None
    """peak learning rate of AdamW, > 0; default 1e-5 (embedded: 1e-3)"""
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
    """passes over the data, >= 1; more than one overfits soon"""
    max_steps: int | None = None
    """stop after this many optimizer steps, >= 1; the learning rate ends there too"""
    max_prompt_length: int = 512
    """tokens of a prompt, >= 1; longer ones lose their beginning"""
    max_length: int = 1024
    """tokens of a prompt with one response, > max-prompt-length; longer responses lose their end"""

    eval_every: int = 100
    """optimizer steps between evaluations on the held-out rankings, >= 1"""
    eval_prompts: int | None = None
    """answers of the starting model, to held-out prompts first, for the reward's mean and deviation, >= 0; default 256
    (embedded: 512); 0, or a reward model to start from: over the data's responses instead"""
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
    gradient_checkpointing: bool = False
    """compute the layers' activations a second time in the backward pass: less memory, about a third more time"""
    compile: bool = False
    """torch.compile of the layers, for a GPU: a longer first step, then shorter ones; wants a C++ compiler"""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """of the matrix products; weights (the master copy), optimizer and rewards are float32 always"""
    device: str = "cuda" if torch.cuda.is_available() else "cpu"
    """torch device"""
    seed: int = 0
    """the new head, order of the data, sampling"""
    trust_remote_code: bool = False
    """run code that comes with a hub model"""


# ----------------------------------------------------------------------------------------------------------- objective


def expected(margins: Tensor, right: Tensor) -> Tensor:
    """Accuracy of each pair: P(label) where the margin is above 0, 1 - P(label) where it is below, 1/2 in a tie."""
    return torch.where(margins.abs() <= TIE, torch.full_like(right, 0.5), torch.where(margins > 0, right, 1 - right))


def objective(a: Args, examples: Sequence[Example], rewards: Tensor):
    """Sum of the losses of p prompts, and the (weighted sum, weight) of each metric.

    rewards are of all b responses, prompt after prompt. Gradient flows to them.
    """
    margins = rewards.new_tensor([e.margin or 0.0 for e in examples])
    loss = LOSSES[a.loss](a, *by_prompt(rewards, examples), margins).sum()
    better, worse = (torch.tensor(x, device=rewards.device) for x in pairs(examples)[:2])
    weights, right = (rewards.new_tensor(x) for x in pairs(examples)[2:])
    found = rewards.detach()[better] - rewards.detach()[worse]
    values = {
        "rewards/margins": found,
        "rewards/accuracies": expected(found, right),
        "rewards/chosen": rewards.detach()[better],
        "rewards/rejected": rewards.detach()[worse],
    }
    totals = {name: (float((x * weights).sum()), float(weights.sum())) for name, x in values.items()}
    return loss, totals | {"loss": (loss.item(), float(len(examples)))}


def means(parts: Sequence[dict[str, tuple[float, float]]]) -> dict[str, float]:
    """Each metric over all micro-batches: the sums divided by the weights."""
    return {name: sum(part[name][0] for part in parts) / sum(part[name][1] for part in parts) for name in parts[0]}


# ---------------------------------------------------------------------------------------------------------------- data


def read(a: Args, source: str, tokenizer) -> list[Example]:
    """The rankings of a source as token ids; prints what became of its rows."""
    if source == "reviews":
        rows, skipped = reviews.rows("preference", REVIEWS), []
    else:
        rows, skipped = read_rows(source, a.split, a.skip_bad_rows)
    examples, report = build(rows, tokenizer, "preference", a.max_prompt_length, a.max_length, a.skip_bad_rows, skipped)
    print(f"{source}\n{report}\n")
    return examples


def make(device: str) -> None:
    """Train the embedded task's reward model for a script that needs it, or finish it where it was stopped."""
    print(f"{Args.out} is missing: making the reward model of the embedded task first\n")
    main(Args(device=device, resume=(Path(Args.out) / "args.json").exists()))
    print()


# ------------------------------------------------------------------------------------- how far the model can be trusted


def ranks_of(values: Tensor) -> Tensor:
    """Rank of each value, from 1; equal values share their mean rank."""
    _, place, counts = values.unique(return_inverse=True, return_counts=True)
    return (counts.cumsum(0) - (counts - 1) / 2)[place]


def correlation(x: Tensor, y: Tensor) -> float:
    """Pearson's; NaN where one of the two does not vary."""
    return torch.corrcoef(torch.stack([x.double(), y.double()]))[0, 1].item()


def calibration(margins: Tensor, right: Tensor, weights: Tensor, bins: int = 10) -> tuple[list[list[float]], float]:
    """Rows (mean confidence, share right, weight) of a reliability curve, and the expected calibration error.

    Confidence is sigmoid(|margin|), in [0.5, 1], in bins of equal width; ECE = sum over bins of their share of the
    weight * |mean confidence - share right| (Guo et al. 2017, Eq. 3, arXiv 1706.04599), in [0, 0.5].
    """
    confidence = margins.abs().sigmoid()
    correct = expected(margins, right)
    place = ((confidence - 0.5) * 2 * bins).long().clamp(0, bins - 1)
    rows = []
    for i in place.unique().tolist():
        inside = place == i
        weight = weights[inside].sum()
        rows.append([((x[inside] * weights[inside]).sum() / weight).item() for x in (confidence, correct)])
        rows[-1].append((weight / weights.sum()).item())
    return rows, sum(weight * abs(sure - true) for sure, true, weight in rows)


def true_margins(examples: Sequence[Example], gold: bool) -> tuple[str, list[float | None]]:
    """What it is, and by how much each pair's first response is better: in gold reward, by the annotator's word, or in
    places of the ranking."""
    kinds: list[tuple[str, list[float | None]]] = [("gold reward", []), ("annotated difference", []), ("places", [])]
    for e in examples:
        for i, j in ((i, j) for i, a in enumerate(e.ranks) for j, b in enumerate(e.ranks) if a < b):
            scores = [reviews.gold_reward(f"{e.prompt_text} {e.response_texts[n]}") for n in (i, j)] if gold else [0, 0]
            kinds[0][1].append(abs(scores[0] - scores[1]) if gold else None)
            seen = abs(e.rewards[i] - e.rewards[j]) if e.rewards else e.margin
            kinds[1][1].append(seen)
            kinds[2][1].append(float(e.ranks[j] - e.ranks[i]))
    return next((kind for kind in kinds if None not in kind[1] and len(set(kind[1])) > 1), ("", []))


def trust(a: Args, held: Sequence[Example], rewards: Sequence[Tensor], embedded: bool):
    """What the held-out rankings say of the model: rows of a table, results, and the panels of report.png."""
    flat = torch.cat([*rewards]).double()
    lengths = torch.tensor([len(r) for e in held for r in e.responses]).double()
    better, worse = (torch.tensor(x) for x in pairs(held)[:2])
    weights, right = (torch.tensor(x, dtype=torch.float64) for x in pairs(held)[2:])
    margins, longer = flat[better] - flat[worse], lengths[better] - lengths[worse]

    group = [group_of(e, a.split_by) for e in held]
    example = torch.tensor([i for i, e in enumerate(held) for _ in pairs([e])[0]])

    def by_example(gaps: Tensor) -> tuple[float, float]:
        """Mean accuracy of the examples, with its interval over groups of them."""
        sums = torch.zeros(len(held)).double().index_add(0, example, expected(gaps, right) * weights)
        return mean_interval(sums.tolist(), group)

    accuracy, longer_wins = by_example(margins), by_example(longer)
    curve, error = calibration(margins, right, weights)
    results = {
        "accuracy": accuracy[0],
        "accuracy_interval": accuracy[1],
        "longer_wins": longer_wins[0],
        "ceiling": ceiling(held),
        "ece": error,
        "length_correlation": correlation(flat, lengths),
    }
    rows = [["held-out accuracy", interval(accuracy, 3)]]
    if results["ceiling"] < 1:
        rows.append(["  (best possible with these labels)", f"{results['ceiling']:.3f}"])
    rows.append(["  ('the longer one is better')", interval(longer_wins, 3)])
    unit, sizes = true_margins(held, embedded)
    bars = []
    if sizes:
        sizes = torch.tensor(sizes)
        edges = sizes.quantile(torch.tensor([0, 0.25, 0.5, 0.75, 1.0])).unique()
        for low, high in zip(edges[:-1], edges[1:], strict=True):
            inside = (sizes >= low) & ((sizes < high) | (high == edges[-1]))
            values = expected(margins, right)[inside]
            if len(values) == 0:
                continue
            best = torch.maximum(right, 1 - right)[inside].mean().item()
            groups = [group[i] for i in example[inside].tolist()]
            bars.append([low.item(), high.item(), *mean_interval(values.tolist(), groups), best])
            results[f"accuracy/margin_{low:.3g}_{high:.3g}"] = bars[-1][2]
            rows.append([f"  where {unit} differs by {low:.3g} to {high:.3g}", interval(tuple(bars[-1][2:4]), 3)])
    rows.append(["calibration error (ECE)", f"{error:.3f}"])
    if math.isfinite(results["length_correlation"]):
        rows.append(["correlation of reward with length", f"{results['length_correlation']:+.2f}"])
    return rows, results, (curve, unit, bars, (lengths.tolist(), flat.tolist()))


def draw(path: Path, curve, unit: str, bars, by_length, by_gold) -> None:
    """report.png: reliability curve, accuracy by margin, reward against length and against the gold reward."""
    page = figure.Figure(figsize=(12.6, 3.2) if not by_gold else (16, 3.2), layout="constrained")
    panels = 2 + bool(bars) + bool(by_gold)
    reliability = page.add_subplot(1, panels, 1, xlabel="confidence sigmoid(|margin|)", ylabel="share right")
    reliability.plot([0.5, 1], [0.5, 1], color="grey", linewidth=1)
    reliability.plot([x for x, _, _ in curve], [y for _, y, _ in curve], marker="o")
    reliability.set_title("calibration on held-out pairs", fontsize=10)
    if bars:
        axes = page.add_subplot(1, panels, 2, xlabel=f"difference of {unit}", ylabel="accuracy", ylim=(0.4, 1.02))
        places = range(len(bars))
        axes.bar(places, [b[2] for b in bars], yerr=[b[3] for b in bars], color="tab:blue", alpha=0.7)
        axes.plot(places, [b[4] for b in bars], "k_", markersize=24, label="best possible")
        axes.set_xticks(places, [f"{b[0]:.2g}-{b[1]:.2g}" for b in bars], fontsize=8)
        axes.set_title("accuracy by size of the difference", fontsize=10)
        axes.legend(fontsize=7)
    axes = page.add_subplot(1, panels, 2 + bool(bars), xlabel="length, tokens", ylabel="reward")
    axes.scatter(*by_length, s=4, alpha=0.3)
    axes.set_title("reward against length, held out", fontsize=10)
    if by_gold:
        axes = page.add_subplot(1, panels, panels, xlabel="gold reward", ylabel="reward")
        axes.scatter(*by_gold, s=4, alpha=0.5)
        axes.set_title("reward against gold, SFT samples", fontsize=10)
    page.savefig(path, dpi=120)


# ---------------------------------------------------------------------------------------------------------------- main


def main(a: Args) -> dict[str, float]:
    """Trains, and returns the final metrics (docs/metrics.md)."""
    to_make = a.model == train_sft.Args.out and not train_sft.is_made()
    tokenizer = reviews.tokenizer() if to_make else models.load_tokenizer(a.model, a.trust_remote_code)
    embedded = tokenizer.get_vocab() == reviews.tokenizer().get_vocab()  # then the gold reward is known
    defaults = DEFAULTS["reviews" if embedded else "any"]
    a = replace(a, **{name: value for name, value in defaults.items() if getattr(a, name) is None})
    check(a)
    for name in ("margin_coef", "centring"):
        require(a.loss == "pairwise" or not getattr(a, name), f"--{name.replace('_', '-')} is of --loss pairwise only")
    require(
        not (a.split_by and a.eval_data), "--split-by and --eval-data exclude each other: both say what is held out"
    )
    torch.manual_seed(a.seed)
    run = parallel.start(a, __file__)
    require(not (to_make and parallel.several()), f"{a.model} is missing: run train_sft.py first, or name a --model")

    # ------------------------------------------------------------------------------------------------------------ data
    train, held = read(a, a.data, tokenizer), []
    if a.eval_data:
        held = read(a, a.eval_data, tokenizer)
    else:
        train, held = held_out(train, a.eval_fraction, a.split_by)
        require(
            bool(held) or not a.split_by or a.eval_fraction == 0,
            f"--split-by {a.split_by}: no value of it falls into --eval-fraction {a.eval_fraction}: raise that",
        )
    if a.loss == "plackett_luce":
        train = without_ties(train, a.ties, a.seed)
        held = held if a.ties == "random" else without_ties(held, a.ties, a.seed)
    require(bool(train), f"--data {a.data}: no example is left to train on")
    require(not a.margin_coef or any(e.margin for e in train), f"--margin-coef: no row of {a.data} has a 'margin'")
    print(f"{len(train)} examples to train on, {len(held)} held out")
    if a.dry_run:
        print("\n\n".join(show(e, tokenizer) for e in train[:3]))
        return {}

    # ----------------------------------------------------------------------------------------------------------- model
    if to_make:
        train_sft.make(a.device)
    from_policy = not models.is_reward_model(a.model, a.trust_remote_code)

    def make_model(device: str):
        if from_policy:
            return models.new_reward_model(models.load_model(a.model, device, a.trust_remote_code), tokenizer)
        return models.load_reward_model(a.model, device, a.trust_remote_code, "--model")

    model = parallel.load(make_model, a.device, models.DTYPES[a.dtype])
    model.config.reward_mean, model.config.reward_std = 0.0, 1.0  # of the new rewards, until they are known
    pad, dtype = models.pad_id(tokenizer), models.DTYPES[a.dtype]
    layout = models.choose_layout(model, train + held, pad, dtype, a.layout)
    print(f"{a.model}: {model.num_parameters() / 1e6:.2f} M parameters, {layout} layout, {a.dtype} on {a.device}")

    def score(examples: Sequence[Example]) -> list[Tensor]:
        return models.score(model, examples, layout, pad, a.micro_batch_tokens, dtype)

    def evaluate() -> dict[str, float]:
        """The metrics of the held-out rankings, each prompt counted once."""
        _, totals = objective(a, held, torch.cat(score(held)))
        return {f"eval/{name}": value for name, value in means([totals]).items()}

    # -------------------------------------------------------------------------------------------------------- training
    if a.gradient_checkpointing:
        models.checkpoint_layers(model)
    if a.compile:
        models.compile_layers(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=a.lr, weight_decay=a.weight_decay, fused=True)
    steps_per_epoch = math.ceil(len(train) / a.batch_size)
    steps = min(a.epochs * steps_per_epoch, a.max_steps or math.inf)
    first = 0
    if state := parallel.load_checkpoint(run, model, optimizer):
        first = state["step"]
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        del state
    run.start(first, steps)
    if first == 0 and held:
        run.log(0, evaluate())

    for step in range(first, steps):
        began = time.perf_counter()
        epoch, place = divmod(step, steps_per_epoch)
        order = random.Random(f"{a.seed} {epoch}").sample(range(len(train)), len(train))
        examples = [train[i] for i in order[place * a.batch_size : (place + 1) * a.batch_size]]

        models.use_layout(model, layout)
        parts = []
        for group in micro_batches(examples, a.micro_batch_tokens, layout, model):
            part = [examples[i] for i in group]
            rewards = models.rewards(model, collate(part, layout, pad, a.device), dtype)
            loss, totals = objective(a, part, rewards)
            (loss / len(examples)).backward()
            parts.append(totals)
        metrics = means(parallel.gather(parts))

        norm = parallel.clip(model, a.max_grad_norm)
        run.require_finite(step + 1, metrics["loss"], norm, examples)
        rate = a.lr * schedule(step, steps, a.warmup)
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

        # ----------------------------------------------- what follows is bookkeeping: metrics, evaluation, checkpoints
        seconds = time.perf_counter() - began
        speed = sum(len(e.prompt) + len(response) for e in examples for response in e.responses) / seconds
        metrics |= {"grad_norm": norm, "lr": rate, "epoch": (step + 1) / steps_per_epoch}
        run.log(step + 1, metrics | {"perf/tokens_per_second": speed, "perf/seconds": seconds})
        run.progress(step + 1, loss=metrics["loss"], accuracy=metrics["rewards/accuracies"], tokens_per_s=speed)
        last = step + 1 == steps
        if held and ((step + 1) % a.eval_every == 0 or last):
            run.log(step + 1, evaluate())
        if run.interrupted or last or (step + 1) % a.save_every == 0:
            weights = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
            run.save_checkpoint(step + 1, {**weights, "step": step + 1})
        if run.interrupted:
            run.leave(step + 1)
    run.end()
    model, _ = parallel.whole(model, a.device)
    if not model:  # a process whose work is done: the first measures and writes
        return {}

    # ----------------------------------------------------------------------------- the reward's mean over SFT's samples
    samples = held or train
    if from_policy and a.eval_prompts:
        distinct = itertools.cycle({e.prompt_text: e for e in held + train}.values())  # as often as it takes
        policy = models.load_model(a.model, a.device, a.trust_remote_code)
        samples = answer(policy, tokenizer, [*itertools.islice(distinct, a.eval_prompts)], a.max_new_tokens, a.seed)
        del policy
    scores = torch.cat(score(samples)).double()
    model.config.reward_mean, model.config.reward_std = scores.mean().item(), scores.std(correction=0).item()
    scores = scores - model.config.reward_mean

    # -------------------------------------------------------------------------------------- how far it can be trusted
    rows, results, panels = trust(a, held, score(held), embedded) if held else ([], {}, None)
    by_gold = None
    if embedded:
        texts = [f"{e.prompt_text} {text}" for e in samples for text in e.response_texts]
        gold = torch.tensor([reviews.gold_reward(text) for text in texts])
        results["gold_spearman"] = correlation(ranks_of(scores), ranks_of(gold))
        rows.append(["Spearman correlation with gold, on samples", f"{results['gold_spearman']:.3f}"])
        by_gold = (gold.tolist(), scores.tolist())
    results |= {"reward_mean": model.config.reward_mean, "reward_std": model.config.reward_std}
    results = {name: value for name, value in results.items() if math.isfinite(value)}  # JSON has no NaN
    rows.append(["deviation of the reward, on samples", f"{model.config.reward_std:.2f}"])
    print("\n" + table([f"{len(held)} held-out rankings, {len(scores)} samples", ""], rows))

    texts = [(e.prompt_text, text) for e in samples for text in e.response_texts]
    found = [{"prompt": x, "answer": y, "reward": z} for (x, y), z in zip(texts, scores.tolist(), strict=True)]
    found.sort(key=lambda row: -row["reward"])
    for title, row in (("best sample", found[0]), ("worst sample", found[-1])):
        print(f"\n{title}, reward {row['reward']:+.2f}\nprompt  {row['prompt'][-300:]}\nanswer  {row['answer']}")
    run.samples(steps, found)
    models.save(model, tokenizer, run.out)
    if panels:
        draw(run.out / "report.png", *panels, by_gold)
    run.finish(results, PANELS)
    print(f"\nThe reward model is in {run.out}, with curves.png" + (" and report.png." if panels else "."))
    print(f"Next: python evaluate.py --reward {run.out}, or label samples with it: python annotate.py --by {run.out}")
    return results


if __name__ == "__main__":
    cli(main, Args)
