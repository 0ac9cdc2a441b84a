"""Supervised fine-tuning, phase 1: teach a language model to write what people wrote.

    python train_sft.py                                         the embedded task: a small Llama learns to write reviews
    python train_sft.py --model DIR --data chats.jsonl          your own model and data

The loss is the mean negative log-likelihood of the response tokens, over all of an optimizer step:

    loss = - sum_i sum_t log pi(y_it | x_i, y_i<t) / (number of response tokens)

Prompts, and the user's turns of a conversation, are read but not trained. The result is the model that the reference
and the policy of train_dpo.py start from. In order below: data, model, the loop, samples.
"""

import math
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
import transformers

from rlhf import losses, models, parallel, require, reviews
from rlhf.data import Example, build, held_out, read_rows, show
from rlhf.generate import answer, end_ids, facts
from rlhf.parallel import micro_batches
from rlhf.runs import FACTS, check, cli, interval, mean_interval, schedule, table
from rlhf.tree import collate

# --------------------------------------------------------------------------------------------------------------- flags

REVIEWS = 24_000  # rows of the embedded task
DEFAULTS = {  # of flags that are None: for any model, and for the embedded task's small one
    "any": {"lr": 2e-5, "eval_prompts": 4},
    "reviews": {"lr": 4e-3, "eval_prompts": 256},
}
PANELS = {  # of curves.png
    "loss, nats a token": ["loss", "eval/loss"],
    "gradient norm": ["grad_norm"],
    "learning rate": ["lr"],
}


@dataclass
class Args:
    model: str = "reviews"
    """starting weights: a run directory, a local folder or a hub id; reviews: the embedded task's Llama, untrained"""
    data: str = "reviews"
    """reviews (embedded), a .jsonl/.json/.csv/.parquet file (also .gz), a save_to_disk folder or a hub id; of pairs,
    chosen is trained"""
    split: str | None = None
    """split of a hub data set; default train"""
    eval_data: str | None = None
    """held-out rows, in the same forms; default: a share of --data"""
    eval_fraction: float = 0.05
    """share of prompts held out, by hash of their text, in [0, 1)"""
    skip_bad_rows: bool = False
    """drop and count rows that cannot be used instead of stopping at the first"""
    out: str = "runs/sft"
    """run directory; one that is in use is never overwritten"""

    lora_rank: int = 0
    """rank of low-rank adapters that are trained in place of all weights, >= 0 (0: none); they want a learning rate
    about ten times as high"""
    lora_merge: bool = False
    """save the model with the adapters merged into its weights, not the adapters alone"""

    lr: float | None = None
    """peak learning rate of AdamW, > 0; default 2e-5 (embedded: 4e-3)"""
    warmup: float = 0.1
    """share of the steps over which the learning rate rises, in [0, 1); then it falls as a cosine to 0"""
    weight_decay: float = 0.0
    """AdamW's decoupled weight decay, >= 0"""
    max_grad_norm: float = 1.0
    """gradients with a larger norm are scaled down to it, > 0"""
    batch_size: int = 32
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
    """tokens of a prompt with its response, > max-prompt-length; longer responses lose their end"""

    eval_every: int = 100
    """optimizer steps between evaluations on the held-out rows, >= 1"""
    eval_prompts: int | None = None
    """held-out prompts answered at the end, >= 0; default 4 (embedded: 256)"""
    max_new_tokens: int = 128
    """tokens of those answers at most, >= 1"""
    save_every: int = 200
    """optimizer steps between checkpoints, >= 1"""
    resume: bool = False
    """go on from the last checkpoint in --out, with the same flags; on a CPU the result is the same bit for bit"""
    dry_run: bool = False
    """print the data report and three examples token by token, and train nothing"""
    wandb: bool = False
    """log to Weights & Biases too"""
    layout: Literal["auto", "tree", "padded"] = "auto"
    """how rows share a forward pass: tree packs them end to end; auto takes it where a check says it is right"""
    keep_softmax_mib: int = 1024
    """MiB of softmax kept between forward and backward, >= 0; a larger one is computed twice"""
    gradient_checkpointing: bool = False
    """compute the layers' activations a second time in the backward pass: less memory, about a third more time"""
    compile: bool = False
    """torch.compile of the layers, for a GPU: a longer first step, then shorter ones; wants a C++ compiler"""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """of the matrix products; weights (the master copy), optimizer and log-probs are float32 always"""
    device: str = "cuda" if torch.cuda.is_available() else "cpu"
    """torch device"""
    seed: int = 0
    """initial weights, order of the data, sampling"""
    trust_remote_code: bool = False
    """run code that comes with a hub model"""


# ---------------------------------------------------------------------------------------------------------------- data


def read(a: Args, source: str, tokenizer) -> list[Example]:
    """The rows of a source as token ids; prints what became of them."""
    if source == "reviews":
        rows, skipped = reviews.rows("sft", REVIEWS), []
    else:
        rows, skipped = read_rows(source, a.split, a.skip_bad_rows)
    examples, report = build(rows, tokenizer, "sft", a.max_prompt_length, a.max_length, a.skip_bad_rows, skipped)
    print(f"{source}\n{report}\n")
    return examples


def trained_tokens(examples: Sequence[Example]) -> int:
    """Response tokens that the loss counts."""
    return sum(sum(map(sum, e.trained)) if e.trained else sum(map(len, e.responses)) for e in examples)


def is_made(out: str = Args.out) -> bool:
    """Whether a run directory holds a finished run, or a model that someone put there."""
    has = {name: (Path(out) / name).exists() for name in ("results.json", "config.json", "args.json")}
    return has["results.json"] or (has["config.json"] and not has["args.json"])


def make(device: str) -> None:
    """Train the embedded task's SFT model for a script that starts from it, or finish it where it was stopped."""
    print(f"{Args.out} is missing: making the SFT model of the embedded task first\n")
    main(Args(device=device, resume=(Path(Args.out) / "args.json").exists()))
    print()


# ---------------------------------------------------------------------------------------------------------------- main


def main(a: Args) -> dict[str, float]:
    """Trains, and returns the final metrics (docs/metrics.md)."""
    tokenizer = reviews.tokenizer() if a.model == "reviews" else models.load_tokenizer(a.model, a.trust_remote_code)
    embedded = tokenizer.get_vocab() == reviews.tokenizer().get_vocab()  # then gold reward and grammar are known
    defaults = DEFAULTS["reviews" if embedded else "any"]
    a = replace(a, **{name: value for name, value in defaults.items() if getattr(a, name) is None})
    check(a)
    torch.manual_seed(a.seed)
    run = parallel.start(a, __file__)

    # ------------------------------------------------------------------------------------------------------------ data
    train, held = read(a, a.data, tokenizer), []
    if a.eval_data:
        held = read(a, a.eval_data, tokenizer)
    else:
        train, held = held_out(train, a.eval_fraction)
    require(bool(train), f"--data {a.data}: no example is left to train on")
    print(f"{len(train)} examples to train on, {len(held)} held out")
    if a.dry_run:
        print("\n\n".join(show(e, tokenizer) for e in train[:3]))
        return {}

    # ----------------------------------------------------------------------------------------------------------- model
    def make_policy(device: str):
        if a.model == "reviews":
            return transformers.LlamaForCausalLM(reviews.config(tokenizer)).eval().to(device)
        return models.load_model(a.model, device, a.trust_remote_code)

    pad, dtype = models.pad_id(tokenizer), models.DTYPES[a.dtype]
    policy = parallel.load(make_policy, a.device, dtype)
    layout = models.choose_layout(policy, train + held, pad, dtype, a.layout)
    print(f"{a.model}: {policy.num_parameters() / 1e6:.2f} M parameters, {layout} layout, {a.dtype} on {a.device}")

    def evaluate() -> dict[str, float]:
        """Mean negative log-likelihood of all response tokens of the held-out rows."""
        logps = torch.cat(models.score(policy, held, layout, pad, a.micro_batch_tokens, dtype))
        return {"eval/loss": losses.sft(logps).sum().item() / trained_tokens(held)}

    # -------------------------------------------------------------------------------------------------------- training
    lora = models.add_lora(policy, a.lora_rank, a.seed) if a.lora_rank else None
    if a.gradient_checkpointing:
        models.checkpoint_layers(policy)
    if a.compile:
        models.compile_layers(policy)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=a.lr, weight_decay=a.weight_decay, fused=True)
    steps_per_epoch = math.ceil(len(train) / a.batch_size)
    steps = min(a.epochs * steps_per_epoch, a.max_steps or math.inf)
    first = 0
    if state := parallel.load_checkpoint(run, policy, optimizer):
        first = state["step"]
        policy.load_state_dict(state["model"], strict=not lora)
        optimizer.load_state_dict(state["optimizer"])
    run.start(first, steps)
    if first == 0 and held:
        run.log(0, evaluate())

    for step in range(first, steps):
        began = time.perf_counter()
        epoch, place = divmod(step, steps_per_epoch)
        order = random.Random(f"{a.seed} {epoch}").sample(range(len(train)), len(train))
        examples = [train[i] for i in order[place * a.batch_size : (place + 1) * a.batch_size]]
        count = trained_tokens(examples)

        models.use_layout(policy, layout)
        total = 0.0
        for group in micro_batches(examples, a.micro_batch_tokens, layout, policy):
            batch = collate([examples[i] for i in group], layout, pad, a.device)
            _, logps = models.response_logps(policy, batch, dtype, keep_bytes=a.keep_softmax_mib << 20)
            loss = losses.sft(logps).sum() / count
            loss.backward()
            total += loss.item()
        total = sum(parallel.gather([total]))

        norm = parallel.clip(policy, a.max_grad_norm)
        run.require_finite(step + 1, total, norm, examples)
        rate = a.lr * schedule(step, steps, a.warmup)
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

        # ----------------------------------------------- what follows is bookkeeping: metrics, evaluation, checkpoints
        seconds = time.perf_counter() - began
        speed = sum(len(e.prompt) + len(response) for e in examples for response in e.responses) / seconds
        metrics = {"loss": total, "grad_norm": norm, "lr": rate, "epoch": (step + 1) / steps_per_epoch}
        run.log(step + 1, metrics | {"perf/tokens_per_second": speed, "perf/seconds": seconds})
        run.progress(step + 1, loss=total, tokens_per_s=speed)
        last = step + 1 == steps
        if held and ((step + 1) % a.eval_every == 0 or last):
            run.log(step + 1, evaluate())
        if run.interrupted or last or (step + 1) % a.save_every == 0:
            weights = {"model": models.trained(policy), "optimizer": optimizer.state_dict()}
            run.save_checkpoint(step + 1, {**weights, "step": step + 1})
        if run.interrupted:
            run.leave(step + 1)
    run.end()

    # --------------------------------------------------------------------------------------------------------- samples
    results = evaluate() if held else {}
    policy, lora = parallel.whole(policy, a.device, lora)
    if not policy:  # a process whose work is done: the first writes answers and model
        return results
    prompts = list({e.prompt_text or e.where: e for e in held or train}.values())
    prompts = prompts[: a.eval_prompts]
    answers = answer(policy, tokenizer, prompts, a.max_new_tokens, a.seed)
    found = facts(answers, end_ids(policy, tokenizer), embedded) if answers else {}
    intervals = {name: mean_interval(values) for name, values in found.items()}
    results |= {name: mean for name, (mean, _) in intervals.items()}
    rows = [["held-out loss, nats a token", f"{results['eval/loss']:.3f}"]] if held else []
    rows += [[FACTS[name], interval(x)] for name, x in intervals.items()]
    print("\n" + table([f"{len(held)} held-out rows, {len(answers)} answers", "after"], rows))
    for e in answers[:4]:
        print(f"\nprompt  {e.prompt_text[-300:]}\nanswer  {e.response_texts[0]}")
    run.samples(steps, [{"prompt": e.prompt_text, "answer": e.response_texts[0]} for e in answers])
    if lora and a.lora_merge:
        policy, lora = lora.merge_and_unload(), None
    models.save(policy, tokenizer, run.out, lora)
    run.finish(results, PANELS)
    print(f"\nThe model is in {run.out}, with its curves in {run.out}/curves.png.")
    print(f"Next: python train_dpo.py --model {run.out}" + ("" if a.data == "reviews" else " --data PREFERENCES"))
    return results


if __name__ == "__main__":
    cli(main, Args)
