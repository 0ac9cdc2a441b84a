"""Time an optimizer step of supervised fine-tuning: train_sft.py and TRL's trainer.

    python -m benchmarks.sft_step [--model DIR] [--data FILE] [--profiles short chats] [--quick]

    python -m benchmarks.sft_step --device cuda --dtype bfloat16 --micro-batch-tokens 16384 --model DIR

All sides have the same rows, model, optimizer (AdamW, gradient clipping) and loss, on the response only. Each makes
two passes over the rows, in steps of `--rows`, and the second pass is timed. The sides:

    ours          train_sft.main with its defaults
    trl_best      no gradient checkpointing, batches of similar lengths
    trl_best_1    the same with micro-batches of one row: no padding, and least memory
    trl_packed    no gradient checkpointing, the rows of a micro-batch packed into one (padding_free)
    trl_default   gradient checkpointing, random batches
    ours_compiled on request: ours with --compile
    trl_bf16      on request, for --dtype bfloat16: trl_best with weights and optimizer in bfloat16 (rounds updates)

TRL's micro-batches have 8 rows, its default, or all rows of a step with fewer. Before any timing, all sides must agree
in float32 on every summed log-prob and on the norm of the first gradient.
"""

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Literal
from unittest import mock

from benchmarks import compare, watch
from rlhf import losses
from support import models
from support.examples import Example

PROFILES = {"short": (60, 120), "chats": (150, 350)}  # mean tokens of prompt and response; log-normal
LR = 1e-6
SIDES = ("ours", "trl_best", "trl_best_1", "trl_packed", "trl_default")


@dataclass
class Args:
    model: str | None = None
    """local model; default: a random Llama of 9 M parameters"""
    data: str | None = None
    """training rows, tokenised by the model's own tokenizer; default: random tokens with the lengths of --profiles"""
    profiles: tuple[str, ...] = tuple(PROFILES)
    """length profiles: short (instructions), chats"""
    rows: int = 16
    """rows in an optimizer step: at most 8, or a multiple of 8"""
    steps: int = 2
    """optimizer steps in a pass"""
    rounds: int = 2
    """number of processes per side"""
    sides: tuple[str, ...] = SIDES
    """ours, trl_best, trl_best_1, trl_packed, trl_default, ours_compiled, trl_bf16"""
    device: Literal["cpu", "cuda"] = "cpu"
    """device of all sides"""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """dtype of the matrix products on all sides; weights are float32"""
    micro_batch_tokens: int | None = None
    """ours: tokens of one forward pass; default: that of the script"""
    quick: bool = False
    """a short run"""


def ours(job: dict, compile: bool = False) -> dict:
    """Run train_sft.main on the job and watch it from outside."""
    import train_sft

    examples = [
        Example(f"row {i}", x["prompt"], x["responses"], f"row {i}", [""], [1], trained=x["trained"])
        for i, x in enumerate(job["rows"])
    ]
    collate, sft, parts = train_sft.collate, losses.sft, []

    def watched_collate(part, *args):
        parts.append(part)
        return collate(part, *args)

    def watched_sft(logps):
        if watched["steps"].first():
            names = [compare.key(e.prompt + e.responses[0]) for e in parts[-1]]
            watched["steps"].results["logps"] |= zip(names, logps.tolist(), strict=True)
        return sft(logps)

    flags = {"batch_size": job["batch"], "lr": LR, "warmup": 0.0, "compile": compile}
    flags |= {name: job[name] for name in ("model", "epochs", "device", "dtype", "micro_batch_tokens") if name in job}
    with (
        tempfile.TemporaryDirectory() as folder,
        mock.patch.multiple(train_sft, load_split=lambda *_: (examples, []), collate=watched_collate),
        mock.patch.object(losses, "sft", watched_sft),
        watch.script() as watched,
    ):
        train_sft.main(train_sft.Args(**flags, out=str(Path(folder, "run")), eval_fraction=0.0, eval_prompts=0))
    return watched["steps"].results


def trl(job: dict, rows: int = 8, weights: str = "float32", **options) -> dict:
    """Run TRL's trainer on the job with `rows` rows per micro-batch, and watch it from outside."""
    import datasets
    import trl

    ids = [x["prompt"] + x["responses"][0] for x in job["rows"]]
    trained = [x["trained"][0] if x["trained"] else [True] * len(x["responses"][0]) for x in job["rows"]]
    masks = [[False] * (len(row) - len(part)) + part for row, part in zip(ids, trained, strict=True)]
    labels = [
        [token if is_trained else -100 for token, is_trained in zip(row, mask, strict=True)]
        for row, mask in zip(ids, masks, strict=True)
    ]
    rows = min(rows, job["batch"])
    with tempfile.TemporaryDirectory() as folder:
        settings = trl.SFTConfig(
            output_dir=folder, per_device_train_batch_size=rows, gradient_accumulation_steps=job["batch"] // rows,
            learning_rate=LR, **watch.settings(job, weights), **options,
        )  # fmt: skip
        trainer = trl.SFTTrainer(
            model=job["model"], args=settings,
            train_dataset=datasets.Dataset.from_dict({"input_ids": ids, "labels": labels}),
            processing_class=models.load_tokenizer(job["model"]),
        )  # fmt: skip
        return watch.trainer(trainer)


def main(a: Args) -> None:
    if a.quick:
        a.rows, a.steps, a.rounds, a.profiles = 4, 1, 1, a.profiles[:1]
    rows, count = [], a.rows * a.steps
    with tempfile.TemporaryDirectory() as folder:
        model = a.model or compare.small_model(folder)
        loaded = models.load_model(model, "cpu")
        rate = watch.matrix_rate(loaded, a.device, models.DTYPES[a.dtype])
        settings = {"device": a.device, "dtype": a.dtype}
        if a.micro_batch_tokens:
            settings["micro_batch_tokens"] = a.micro_batch_tokens
        for profile in [a.data] if a.data else a.profiles:
            if a.data:
                examples = compare.rows_of(a.data, model, "sft", count)
            else:
                examples = compare.random_rows(model, count, *PROFILES[profile], k=1)
            job = {"model": model, "rows": examples, "batch": a.rows, **settings}
            rows += compare.optimizer_steps("sft_step", Path(profile).name, job, a.sides, a.rounds, loaded, rate)
    compare.report("sft_step", rows, a.quick, a.device, a.model)


NO_CHECKPOINTING = {"gradient_checkpointing": False}
SIMILAR_LENGTHS = NO_CHECKPOINTING | {"train_sampling_strategy": "group_by_length"}
WORKERS = {
    "ours": ours,
    "ours_compiled": lambda job: ours(job, compile=True),
    "trl_best": lambda job: trl(job, **SIMILAR_LENGTHS),
    "trl_best_1": lambda job: trl(job, rows=1, **SIMILAR_LENGTHS),
    "trl_packed": lambda job: trl(job, padding_free=True, **NO_CHECKPOINTING),
    "trl_default": trl,
    "trl_bf16": lambda job: trl(job, weights="bfloat16", **SIMILAR_LENGTHS),
}

if __name__ == "__main__":
    compare.cli(main, Args, WORKERS)
