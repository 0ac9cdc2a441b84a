"""The reward model: learn from rankings how good people would find a response.

    python train_rm.py                                          the embedded task, film reviews; makes its SFT model
    python train_rm.py --model runs/my-sft --data preferences.jsonl --out runs/my-rm
    python train_rm.py --loss plackett_luce --data rankings.jsonl --out runs/rm-pl

A reward model is the SFT model with a linear head that gives one number instead of next-token logits: r(x, y) = w . h,
where h is the hidden state at the last token of response y to prompt x. People ranked k responses to each prompt. The
loss sums over the pairs in which i is ranked above j (Ouyang et al. 2022, Eq. 1, arXiv 2203.02155):

    loss = - 1 / C(k, 2) * sum over pairs of log sigmoid( r(x, y_i) - r(x, y_j) )

It is the mean negative log-likelihood of their choices if P(i over j) = sigmoid(r_i - r_j). All responses of a prompt
share one forward pass. Only differences of rewards matter, so the mean over the SFT model's own samples is stored
afterwards and subtracted wherever the reward is used. Below, in order: flags, objective, data, model, the loop, how far
the model can be trusted.
"""

import itertools
import math
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

import train_sft
from rlhf import losses, require
from rlhf.tree import collate, send
from support import dryrun, models, reviews, runs, scoring, sharding
from support.examples import Example, load_split, show
from support.generate import answer
from support.parallel import gather
from support.preferences import by_prompt, expected_accuracy, pair_tensors, without_ties
from support.report import read, table, visible, weighted_means
from support.reward_report import TIE, correlation, draw, held_out_report, ranks_of

# --------------------------------------------------------------------------------------------------------------- flags

LOSSES = {  # name: losses of p prompts, from the flags a, rewards and ranks [p, k], and annotated margins [p]
    "pairwise": lambda a, r, ranks, margins: losses.reward_ranking(r, ranks, a.margin_coef * margins, a.centring),
    "plackett_luce": lambda a, r, ranks, margins: losses.plackett_luce(r, ranks),
    "best_of_k": lambda a, r, ranks, margins: losses.best_of_k(r, ranks),
}
DEFAULTS = {  # for unset flags: any model, or the embedded task's small one
    "any": {"lr": 1e-5, "eval_fraction": 0.05, "eval_prompts": 256, "eval_pairs": 512},
    "reviews": {"lr": 1e-3, "eval_fraction": 0.1, "eval_prompts": 512, "eval_pairs": reviews.ROWS},
}
Loss = Literal[(*LOSSES,)]


@dataclass
class Args(runs.EpochFlags):
    model: str = runs.SFT_MODEL
    """starting weights: a causal language model or a reward model, as a run directory, a local folder or a hub id;
    runs/sft is made first if it is missing"""
    out: str = "runs/rm"
    loss: Loss = "pairwise"
    """pairwise: all pairs of a prompt; plackett_luce: the ranking from best to worst; best_of_k: the best one only"""
    margin_coef: float = 0.0
    """pairwise: subtract this times the row's `margin` from r_i - r_j (Llama 2), >= 0"""
    centring: float = 0.0
    """pairwise: weight of (r_i + r_j)^2, which keeps rewards near 0, >= 0; 0.01 is usual"""
    ties: Literal["refuse", "drop", "random"] = "refuse"
    """plackett_luce: what to do with a ranking that has ties; random breaks them for training alone"""
    split_by: str | None = None
    """hold rows out by the values of this column, not by prompt; a value is never split (meta.topic: inside meta)"""
    lora_rank: int = 0
    """rank of low-rank adapters that are trained in place of all weights, >= 0 (0: none); the head is trained whole;
    needs about ten times the learning rate"""
    lr: float | None = None
    """peak learning rate of AdamW, > 0; default 1e-5 (embedded: 1e-3)"""
    epochs: int = 1
    """passes over the data, >= 1; more than one overfits soon"""
    eval_pairs: int | None = None
    """maximum number of held-out rows to score, >= 0, chosen by hash; default 512 (embedded: all)"""
    eval_prompts: int | None = None
    """answers sampled from the starting model (held-out prompts first) to measure the reward's mean and deviation,
    >= 0; default 256 (on a CPU: 64; embedded: 512); if this is 0 or --model is a reward model, the data's responses are
    used"""


# ----------------------------------------------------------------------------------------------------------- objective


def objective(a: Args, examples: Sequence[Example], rewards: Tensor):
    """Sum of the losses of p prompts, and the (weighted sum, weight) of each metric.

    rewards are those of all b responses, prompt after prompt. Gradient flows to them.
    """
    margins = send(torch.tensor([e.margin or 0.0 for e in examples], dtype=rewards.dtype), rewards.device)
    loss = LOSSES[a.loss](a, *by_prompt(rewards, examples), margins).sum()
    better, worse, weights, label_probability = pair_tensors(examples, rewards)
    chosen, rejected = rewards.detach()[better], rewards.detach()[worse]
    values = {
        "rewards/margins": chosen - rejected,
        "rewards/accuracies": expected_accuracy(chosen - rejected, label_probability, TIE),
        "rewards/chosen": chosen,
        "rewards/rejected": rejected,
    }
    totals = {name: ((x * weights).sum(), weights.sum()) for name, x in values.items()}
    return loss, totals | {"loss": (loss.detach(), float(len(examples)))}


# ---------------------------------------------------------------------------------------------------------------- main


def main(a: Args) -> dict[str, float]:
    """Train, and return the final metrics (docs/metrics.md)."""
    if a.lora_merge and not a.lora_rank:
        return runs.merge_adapters(a)
    tokenizer, embedded = runs.load_tokenizer(a.model, a.trust_remote_code)
    defaults = DEFAULTS["reviews" if embedded else "any"]
    if a.device == "cpu" and not embedded:
        defaults = defaults | {"eval_prompts": 64}
    a = runs.with_defaults(a, defaults)
    for name in ("margin_coef", "centring"):
        require(a.loss == "pairwise" or not getattr(a, name), f"--{name.replace('_', '-')} is of --loss pairwise only")
    require(
        not (a.split_by and a.eval_data), "--split-by and --eval-data exclude each other: both say what is held out"
    )
    run = runs.start(a, __file__)

    # ------------------------------------------------------------------------------------------------------------ data
    train, held = load_split("preference", tokenizer, a, a.split_by)
    require(
        bool(held) or not a.split_by or a.eval_fraction == 0,
        f"--split-by {a.split_by}: no value of it falls into --eval-fraction {a.eval_fraction}: raise that",
    )
    if a.loss == "plackett_luce":
        train = without_ties(train, a.ties, a.seed)
        held = held if a.ties == "random" else without_ties(held, a.ties, a.seed)
        require(bool(train), "--data: no ranking without ties is left to train on")
    require(not a.margin_coef or any(e.margin for e in train), "--margin-coef: no row of --data has a 'margin'")
    print(f"{len(train)} examples to train on, {len(held)} held out")
    if a.dry_run:
        print("\n\n".join(show(e, tokenizer) for e in train[:3]))
        dryrun.dry_run(a, train, tokenizer, reward=True)
        return {}

    # ----------------------------------------------------------------------------------------------------------- model
    runs.make_missing(train_sft, a.model, a.device)
    from_policy = not models.is_reward_model(a.model, a.trust_remote_code)

    def make_model(device: str):
        if from_policy:
            return models.new_reward_model(models.load_model(a.model, device, a.trust_remote_code), tokenizer)
        return models.load_reward_model(a.model, device, a.trust_remote_code, "--model")

    dtype = models.DTYPES[a.dtype]
    model, low_bits = sharding.load_trained(make_model, a.device, dtype, None if a.lora_rank else a.seed)
    model.config.reward_mean, model.config.reward_std = 0.0, 1.0  # of the new rewards, until they are known
    batching = scoring.batching_for(model, train + held, tokenizer, a)

    def evaluate() -> dict[str, float]:
        """The metrics of the held-out rankings, each prompt counted once."""
        _, totals = objective(a, held, torch.cat(scoring.score_rewards(model, held, batching, "held-out rows")))
        return {f"eval/{name}": value for name, value in weighted_means([totals]).items()}

    # -------------------------------------------------------------------------------------------------------- training
    run.check_same(data=train, eval_data=held, model=model.base_model if from_policy else model)
    lora = models.prepare_training(model, low_bits, a, a.lora_rank)
    optimizer = models.adamw(model, low_bits, a, lr=a.lr, weight_decay=a.weight_decay)
    steps_per_epoch = math.ceil(len(train) / a.batch_size)
    steps = min(a.epochs * steps_per_epoch, a.max_steps or math.inf)
    first = 0
    if state := run.load_checkpoint(model=model, optimizer=optimizer):
        first = state["step"]
        models.restore(model, low_bits, state["model"])
        optimizer.load_state_dict(state["optimizer"])
        del state
    run.begin_loop(first, steps)
    if first == 0 and held:
        run.log(0, evaluate())

    for step in range(first, steps):
        began = time.perf_counter()
        epoch, nth = divmod(step, steps_per_epoch)
        if nth == 0 or step == first:
            order = random.Random(f"{a.seed} {epoch}").sample(range(len(train)), len(train))
        examples = [train[i] for i in order[nth * a.batch_size : (nth + 1) * a.batch_size]]

        parts = []
        for group in scoring.micro_batches(model, examples, batching):
            members = [examples[i] for i in group]
            batch = collate(members, batching.layout, batching.pad_id, a.device)
            loss, totals = objective(a, members, scoring.response_rewards(model, batch, batching.dtype))
            (loss / len(examples)).backward()
            parts.append(totals)
        parts.append({"grad_norm": (sharding.clip_gradients(optimizer, a.max_grad_norm), 1.0)})
        metrics = weighted_means(gather(read(parts)))
        run.require_finite(step + 1, metrics["loss"], metrics["grad_norm"], examples)
        rate = a.lr * runs.schedule(step, steps, a.warmup, a.schedule)
        for param_group in optimizer.param_groups:
            param_group["lr"] = rate
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

        # ----------------------------------------------- what follows is bookkeeping: metrics, evaluation, checkpoints
        seconds = time.perf_counter() - began
        speed = sum(len(e.prompt) + len(response) for e in examples for response in e.responses) / seconds
        metrics |= {"lr": rate, "epoch": (step + 1) / steps_per_epoch}
        run.log(step + 1, metrics | {"perf/tokens_per_second": speed, "perf/seconds": seconds})
        run.progress(step + 1, loss=metrics["loss"], accuracy=metrics["rewards/accuracies"], tokens_per_s=speed)
        last = step + 1 == steps
        if held and ((step + 1) % a.eval_every == 0 or last):
            run.log(step + 1, evaluate())
        if run.interrupted or last or (step + 1) % a.save_every == 0:
            state = {"model": models.trained(model, low_bits), "optimizer": optimizer.state_dict()}
            run.save_checkpoint(step + 1, {**state, "step": step + 1})
            del state
        if run.interrupted:
            run.leave(step + 1)
    run.end_loop()
    del optimizer
    model, low_bits, lora = sharding.unshard(model, low_bits, make_model, a, lora)
    if not model:  # this process's work is done: the main process measures and writes
        return {}

    # ----------------------------------------------------------------------------- the reward's mean over SFT's samples
    samples = held or train
    if from_policy and a.eval_prompts:
        repeated = itertools.cycle({e.prompt_text: e for e in held + train}.values())  # as often as needed
        make_policy = lambda device: models.load_model(a.model, device, a.trust_remote_code)  # noqa: E731
        policy = sharding.load(make_policy, a.device, dtype)
        asked = [*itertools.islice(repeated, a.eval_prompts)]
        settings = {"dtype": dtype, "progress": "answers of the starting model"}
        samples = answer(policy, tokenizer, asked, a.max_new_tokens, a.seed, **settings)
        del policy
    scores = torch.cat(scoring.score_rewards(model, samples, batching, "rewards of the answers")).double()
    model.config.reward_mean, model.config.reward_std = scores.mean().item(), scores.std(correction=0).item()
    scores = scores - model.config.reward_mean

    # -------------------------------------------------------------------------------------- how far it can be trusted
    rows, results, panels = [], {}, None
    if held:
        rewards = scoring.score_rewards(model, held, batching)
        rows, results, panels = held_out_report(held, rewards, a.split_by, embedded)
    by_gold = None
    if embedded:
        texts = [f"{e.prompt_text} {text}" for e in samples for text in e.response_texts]
        gold = torch.tensor([reviews.gold_reward(text) for text in texts])
        results["gold_spearman"] = correlation(ranks_of(scores), ranks_of(gold))
        if math.isfinite(results["gold_spearman"]):
            rows.append(["Spearman correlation with gold, on samples", f"{results['gold_spearman']:.3f}"])
        by_gold = (gold.tolist(), scores.tolist())
    results |= {"reward_mean": model.config.reward_mean, "reward_std": model.config.reward_std}
    results = {name: value for name, value in results.items() if math.isfinite(value)}  # JSON has no NaN
    rows.append(["deviation of the reward, on samples", f"{model.config.reward_std:.2f}"])
    texts = [(e.prompt_text, text) for e in samples for text in e.response_texts]
    shown = [{"prompt": x, "answer": y, "reward": z} for (x, y), z in zip(texts, scores.tolist(), strict=True)]
    shown.sort(key=lambda row: -row["reward"])
    run.samples(steps, shown)
    models.save(model, tokenizer, run.out, lora, a.lora_merge, low_bits, a.save_dtype)
    if panels:
        draw(run.out / "report.png", *panels, by_gold)
    run.finish(results, PANELS)
    print("\n" + table([f"{len(held)} held-out rankings, {len(scores)} samples, {a.dtype}", ""], rows))
    for title, row in (("best sample", shown[0]), ("worst sample", shown[-1])):
        texts = f"prompt  {row['prompt'][-300:]}\nanswer  {row['answer']}"
        print(f"\n{title}, reward {row['reward']:+.2f}\n{visible(texts)}")
    print(f"\nThe reward model is in {run.out}, with curves.png" + (" and report.png." if panels else "."))
    policy = a.model if from_policy else "POLICY"
    own = f"python train_ppo.py --model {policy} --reward {run.out} --data PROMPTS --out {run.out}-ppo"
    ours = f"python evaluate.py --reward {run.out}, or label samples with it: python annotate.py --by {run.out}"
    print("Next:", ours if a.data == "reviews" else own)
    return results


PANELS = {  # of curves.png
    "loss, nats": ["loss", "eval/loss"],
    "accuracy": ["rewards/accuracies", "eval/rewards/accuracies"],
    "margin of the reward": ["rewards/margins", "eval/rewards/margins"],
    "reward": ["rewards/chosen", "rewards/rejected"],
    "gradient norm": ["grad_norm"],
    "learning rate": ["lr"],
}


if __name__ == "__main__":
    runs.cli(main, Args)
