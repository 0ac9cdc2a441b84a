"""Supervised fine-tuning: teach a language model to write what people wrote.

    python train_sft.py                                         the embedded task: a small Llama learns to write reviews
    python train_sft.py --model DIR --data chats.jsonl --out runs/my-sft    your own model and data

The loss is the mean negative log-likelihood of the response tokens, over all of an optimizer step:

    loss = - sum_i sum_t log pi(y_it | x_i, y_i<t) / (number of response tokens)

Prompts, and the user's turns of a conversation, are read but not trained. train_dpo.py starts its reference and its
policy from the result. Below, in order: flags, data, model, the loop, samples.
"""

import math
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import transformers

from rlhf import losses
from rlhf.tree import collate
from support import dryrun, models, reviews, runs, scoring, sharding
from support.examples import Example, load_split, show
from support.generate import answer, answer_stats, choose_sampler, end_ids
from support.parallel import gather
from support.report import ANSWER_STATS, interval, read, stat_interval, table, visible, weighted_means

# --------------------------------------------------------------------------------------------------------------- flags

DEFAULTS = {  # for unset flags: any model, or the embedded task's small one
    "any": {"lr": 2e-5, "eval_prompts": 4},
    "reviews": {"lr": 4e-3, "eval_prompts": 256},
}


@dataclass
class Args(runs.EpochFlags):
    model: str = "reviews"
    """starting weights: a run directory, a local folder or a hub id; reviews: the embedded task's Llama, untrained"""
    data: runs.Sources = "reviews"
    """reviews (embedded), .jsonl/.json/.csv/.tsv/.parquet files (also .gz), folders with such files or hub ids; of a
    preference pair only the chosen response is trained on"""
    out: str = "runs/sft"
    lr: float | None = None
    """peak learning rate of AdamW, > 0; default 2e-5 (embedded: 4e-3)"""
    batch_size: int = 32
    eval_fraction: float = 0.05
    """share of prompts held out, by hash of their text, in [0, 1)"""
    eval_prompts: int | None = None
    """held-out prompts answered at the end, >= 0; default 4 (embedded: 256)"""
    save_every: int = 200
    keep_softmax_mib: int | None = None
    """MiB, >= 0: a softmax of up to this size is kept for the backward pass, and a larger one is recomputed; default
    10240 on CUDA, else 1024"""


def trained_tokens(examples: Sequence[Example]) -> int:
    """Response tokens that the loss counts."""
    return sum(sum(e.lengths) for e in examples)


# ---------------------------------------------------------------------------------------------------------------- main


def main(a: Args) -> dict[str, float]:
    """Train, and return the final metrics (docs/metrics.md)."""
    if a.lora_merge and not a.lora_rank:
        return runs.merge_adapters(a)
    tokenizer = reviews.tokenizer() if a.model == "reviews" else models.load_tokenizer(a.model, a.trust_remote_code)
    embedded = reviews.is_embedded(tokenizer)  # then gold reward and grammar are known
    a = runs.with_defaults(a, DEFAULTS["reviews" if embedded else "any"])
    run = runs.start(a, __file__)

    # ------------------------------------------------------------------------------------------------------------ data
    train, held = load_split("sft", tokenizer, a)
    print(f"{len(train)} examples to train on, {len(held)} held out")
    if a.dry_run:
        print("\n\n".join(show(e, tokenizer) for e in train[:3]))
        dryrun.dry_run(a, train, tokenizer)
        return {}

    # ----------------------------------------------------------------------------------------------------------- model
    def make_policy(device: str):
        if a.model == "reviews":
            return transformers.LlamaForCausalLM(reviews.config(tokenizer)).eval().to(device)
        return models.load_model(a.model, device, a.trust_remote_code)

    # low_bits: the other 16 bits of the bfloat16 weights' float32 masters, which AdamW updates too (rlhf/optim.py); for
    # a bfloat16 checkpoint they are drawn at random, with the last argument as the seed; in float32 there are none
    dtype = models.DTYPES[a.dtype]
    policy, low_bits = sharding.load_trained(make_policy, a.device, dtype, None if a.lora_rank else a.seed)
    batching = scoring.batching_for(policy, train + held, tokenizer, a)
    if a.eval_prompts:
        choose_sampler(policy, [e.prompt for e in held or train], a.max_new_tokens, batching.pad_id, dtype)

    def evaluate() -> dict[str, float]:
        """Mean negative log-likelihood of all response tokens of the held-out rows."""
        logps = torch.cat(scoring.score_logps(policy, held, batching, "held-out rows"))
        return {"eval/loss": losses.sft(logps).sum().item() / trained_tokens(held)}

    # -------------------------------------------------------------------------------------------------------- training
    run.check_same(data=train, eval_data=held, model=policy)
    lora = models.prepare_training(policy, low_bits, a, a.lora_rank)
    optimizer = models.adamw(policy, low_bits, a, lr=a.lr, weight_decay=a.weight_decay)
    steps_per_epoch = math.ceil(len(train) / a.batch_size)
    steps = min(a.epochs * steps_per_epoch, a.max_steps or math.inf)
    first, final = 0, {}
    keep_bytes = None if a.keep_softmax_mib is None else a.keep_softmax_mib << 20
    if state := run.load_checkpoint(model=policy, optimizer=optimizer):
        first = state["step"]
        models.restore(policy, low_bits, state["model"])
        optimizer.load_state_dict(state["optimizer"])
        del state
    run.begin_loop(first, steps)
    if first == 0 and held:
        run.log(0, evaluate())

    for step in range(first, steps):
        began = time.perf_counter()
        epoch, nth = divmod(step, steps_per_epoch)
        if nth == 0 or step == first:  # a resumed run finds the same order again
            order = random.Random(f"{a.seed} {epoch}").sample(range(len(train)), len(train))
        examples = [train[i] for i in order[nth * a.batch_size : (nth + 1) * a.batch_size]]
        count = trained_tokens(examples)

        parts = []
        for group in scoring.micro_batches(policy, examples, batching):
            batch = collate([examples[i] for i in group], batching.layout, batching.pad_id, a.device)
            _token_logps, logps = scoring.response_logps(policy, batch, batching.dtype, keep_bytes=keep_bytes)
            loss = losses.sft(logps).sum()
            (loss / count).backward()
            parts.append({"loss": (loss.detach(), float(len(batch.targets)))})
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
        run.progress(step + 1, loss=metrics["loss"], tokens_per_s=speed)
        last = step + 1 == steps
        if held and ((step + 1) % a.eval_every == 0 or last):
            final = evaluate()
            run.log(step + 1, final)
        if run.interrupted or last or (step + 1) % a.save_every == 0:
            state = {"model": models.trained(policy, low_bits), "optimizer": optimizer.state_dict()}
            run.save_checkpoint(step + 1, {**state, "step": step + 1})
            del state
        if run.interrupted:
            run.leave(step + 1)
    run.end_loop()

    # --------------------------------------------------------------------------------------------------------- samples
    del optimizer
    results = final or (evaluate() if held else {})
    policy, low_bits, lora = sharding.unshard(policy, low_bits, make_policy, a, lora)
    if not policy:  # this process's work is done: the main process writes answers and model
        return results
    prompts = list({e.prompt_text or e.where: e for e in held or train}.values())
    settings = {"dtype": dtype, "progress": "answers"}
    answers = answer(policy, tokenizer, prompts[: a.eval_prompts], a.max_new_tokens, a.seed, **settings)
    stats = answer_stats(answers, end_ids(policy, tokenizer), embedded) if answers else {}
    intervals = {n: stat_interval(n, x) for n, x in stats.items()}
    results |= {name: mean for name, (mean, _) in intervals.items()}
    rows = [["held-out loss, nats a token", f"{results['eval/loss']:.3f}"]] if held else []
    rows += [[ANSWER_STATS[name], interval(x)] for name, x in intervals.items()]
    run.samples(steps, [{"prompt": e.prompt_text, "answer": e.response_texts[0]} for e in answers])
    models.save(policy, tokenizer, run.out, lora, a.lora_merge, low_bits, a.save_dtype)
    run.finish(results, PANELS)
    print("\n" + table([f"{len(held)} held-out rows, {len(answers)} answers, {a.dtype}", "after"], rows))
    for e in answers[:4]:
        print(visible(f"\nprompt  {e.prompt_text[-300:]}\nanswer  {e.response_texts[0]}"))
    print(f"\nThe model is in {run.out}, with its curves in {run.out}/curves.png.")
    data = "" if a.data == "reviews" else " --data PREFERENCES"
    print(f"Next: python train_dpo.py --model {run.out}{data} --out {run.out}-dpo")
    return results


PANELS = {  # of curves.png
    "loss, nats a token": ["loss", "eval/loss"],
    "gradient norm": ["grad_norm"],
    "learning rate": ["lr"],
}

if __name__ == "__main__":
    runs.cli(main, Args)
