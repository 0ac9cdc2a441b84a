"""Time an optimizer step of DPO: train_dpo.py, TRL's trainer, and the plain padded loop of the DPO paper.

    python -m benchmarks.dpo_step [--model DIR] [--data FILE] [--profiles hh ultrafeedback helpsteer] [--quick]

    python -m benchmarks.dpo_step --device cuda --dtype bfloat16 --micro-batch-tokens 16384 --model DIR

All sides have the same pairs, model and optimizer (AdamW, gradient clipping). Each makes two passes over the pairs, in
steps of `--pairs`, and the second pass is timed. The sides:

    ours          train_dpo.main with its defaults; reference log-probs computed before training
    trl_best      reference log-probs computed before training, no gradient checkpointing, batches of similar lengths
    trl_best_1    the same with micro-batches of one pair: least padding
    trl_default   reference model in every step, gradient checkpointing
    loop          one padded batch, reference model in every step, float32 logits of every position, log_softmax
    ours_compiled on request: ours with --compile
    trl_bf16      on request, for --dtype bfloat16: trl_best with weights and optimizer in bfloat16 (rounds updates)

Before any timing, all sides must agree in float32 on every summed log-prob and on the norm of the first gradient.
"""

import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal
from unittest import mock

import torch
from torch.nn.utils.rnn import pad_sequence

from benchmarks import compare, watch
from support import models, refcache, scoring
from support.examples import Example

PROFILES = {  # mean tokens of a prompt and of a response; lengths are log-normal
    "hh": (150, 60),
    "ultrafeedback": (150, 250),
    "helpsteer": (500, 120),
}
BETA, LR = 0.1, 1e-6
SIDES = ("ours", "trl_best", "trl_best_1", "trl_default", "loop")


@dataclass
class Args:
    model: str | None = None
    """local model; default: a random Llama of 9 M parameters"""
    data: str | None = None
    """preference rows, tokenised by the model's own tokenizer; default: random tokens with the lengths of --profiles"""
    profiles: tuple[str, ...] = tuple(PROFILES)
    """length profiles: hh, ultrafeedback, helpsteer"""
    pairs: int = 8
    """pairs in an optimizer step"""
    steps: int = 2
    """optimizer steps in a pass"""
    rounds: int = 2
    """number of processes per side"""
    sides: tuple[str, ...] = SIDES
    """ours, trl_best, trl_best_1, trl_default, loop, ours_compiled, trl_bf16"""
    device: Literal["cpu", "cuda"] = "cpu"
    """device of all sides"""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """dtype of the matrix products on all sides; weights are float32"""
    micro_batch_tokens: int | None = None
    """ours: tokens of one forward pass; default: that of the script"""
    quick: bool = False
    """a short run"""


def sequences(job: dict) -> list[tuple[list[int], list[int], list[int]]]:
    return [(x["prompt"], *x["responses"]) for x in job["rows"]]


def ours(job: dict, compile: bool = False) -> dict:
    """Run train_dpo.main on the job and watch it from outside. The job may have more flags of the script."""
    import train_dpo

    examples = [
        Example(f"pair {i}", p, [w, r], f"pair {i}", ["", ""], [1, 2]) for i, (p, w, r) in enumerate(sequences(job))
    ]
    objective, cached, choose_layout, more = train_dpo.objective, refcache.cached, scoring.choose_layout, {}

    def watched_objective(a, part, logps, *args, **kwargs):
        if watched["steps"].first():
            names = [compare.key(e.prompt + r) for e in part for r in e.responses]
            watched["steps"].results["logps"] |= zip(names, logps.tolist(), strict=True)
        return objective(a, part, logps, *args, **kwargs)

    def timed_cached(*args):
        began = time.perf_counter()
        refs = cached(*args)
        more["reference"] = time.perf_counter() - began
        return refs

    def watched_layout(*args):
        watch.free_cache(job["device"])  # the model is loaded: what that took is not counted
        more["layout"] = choose_layout(*args)
        return more["layout"]

    with (
        tempfile.TemporaryDirectory() as folder,
        mock.patch.multiple(train_dpo, load_split=lambda *_: (examples, []), objective=watched_objective),
        mock.patch.object(refcache, "cached", timed_cached),
        mock.patch.object(scoring, "choose_layout", watched_layout),
        watch.script(job.get("counted")) as watched,
    ):
        flags = {"model": job["model"], "out": str(Path(folder, "run")), "ref_cache": str(Path(folder, "cache"))}
        flags |= {name: job[name] for name in ("device", "dtype", "micro_batch_tokens") if name in job}
        flags |= {"batch_size": job["batch"], "epochs": job["epochs"], "beta": BETA, "lr": LR, "warmup": 0.0}
        flags |= job.get("flags", {})
        train_dpo.main(train_dpo.Args(**flags, compile=compile, eval_fraction=0.0, eval_prompts=0))
    return watched["steps"].results | more


def trl(job: dict, best: bool, rows: int | None = None, weights: str = "float32", compile: bool = False) -> dict:
    """Run TRL's trainer on the job with `rows` pairs per micro-batch, and watch it from outside."""
    import datasets
    import trl

    reference = {"reference": 0.0}

    class Watched(trl.DPOTrainer):
        def _prepare_dataset(self, dataset, *_):
            return dataset

        def _precompute_ref_logps(self, *args):
            began = time.perf_counter()
            out = super()._precompute_ref_logps(*args)
            reference["reference"] = time.perf_counter() - began
            return out

    names = ("prompt_ids", "chosen_ids", "rejected_ids")
    columns = dict(zip(names, map(list, zip(*sequences(job), strict=True)), strict=True))
    columns["length"] = [len(p) + max(len(w), len(r)) for p, w, r in sequences(job)]
    rows = rows or job["batch"]
    options = {"precompute_ref_log_probs": True, "gradient_checkpointing": False}
    options |= {"train_sampling_strategy": "group_by_length", "remove_unused_columns": False}
    with tempfile.TemporaryDirectory() as folder:
        settings = trl.DPOConfig(
            output_dir=folder, per_device_train_batch_size=rows, gradient_accumulation_steps=job["batch"] // rows,
            beta=BETA, learning_rate=LR, torch_compile=compile, **watch.settings(job, weights),
            **options if best else {},
        )  # fmt: skip
        trainer = Watched(
            model=job["model"], args=settings, train_dataset=datasets.Dataset.from_dict(columns),
            processing_class=models.load_tokenizer(job["model"]),
        )  # fmt: skip
        return watch.trainer(trainer, job.get("counted")) | reference


def loop(job: dict) -> dict:
    """A plain loop: chosen and rejected are rows of one padded batch, with log_softmax over all logits."""
    device, dtype = job["device"], models.DTYPES[job["dtype"]]
    policy, reference = (models.load_model(job["model"], device) for _ in range(2))
    optimizer = torch.optim.AdamW(policy.parameters(), lr=LR, weight_decay=0.0, fused=True)
    watch.read_weights(policy, reference)
    steps = watch.Steps(device)

    def sums(model, ids, mask, scored):
        with torch.autocast(device, dtype, enabled=dtype != torch.float32):
            logits = model(ids, attention_mask=mask, use_cache=False).logits[:, :-1].float()
        return (logits.log_softmax(-1).gather(2, ids[:, 1:, None])[..., 0] * scored[:, 1:]).sum(1)

    pairs = sequences(job)
    for step in range(job["epochs"] * len(pairs) // job["batch"]):
        steps.begin()
        first = step * job["batch"] % len(pairs)
        rows = [(p, r) for side in (1, 2) for p, r in ((x[0], x[side]) for x in pairs[first : first + job["batch"]])]
        ids = pad_sequence([torch.tensor(p + r) for p, r in rows], True).to(device)
        mask = pad_sequence([torch.ones(len(p + r)).long() for p, r in rows], True).to(device)
        scored = pad_sequence([torch.tensor([0.0] * len(p) + [1.0] * len(r)) for p, r in rows], True).to(device)
        with torch.no_grad():
            ref_logps = sums(reference, ids, mask, scored)
        logps = sums(policy, ids, mask, scored)
        chosen, rejected = (logps - ref_logps).chunk(2)
        (-torch.nn.functional.logsigmoid(BETA * (chosen - rejected)).mean()).backward()
        steps.results["norms"].append(torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0).item())
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if steps.first():
            steps.results["logps"] = {compare.key(p + r): x for (p, r), x in zip(rows, logps.tolist(), strict=True)}
        steps.end()
    return steps.results | {"reference": 0.0}


def make_pairs(a: Args, profile: str, model: str) -> list[dict]:
    count = a.pairs * a.steps
    if a.data:
        return compare.rows_of(a.data, model, "preference", count)
    return compare.random_rows(model, count, *PROFILES[profile], k=2)


def main(a: Args) -> None:
    if a.quick:
        a.pairs, a.steps, a.rounds, a.profiles = 2, 1, 1, a.profiles[:1]
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        model = a.model or compare.small_model(folder)
        loaded = models.load_model(model, "cpu")
        rate = watch.matrix_rate(loaded, a.device, models.DTYPES[a.dtype])
        settings = {"device": a.device, "dtype": a.dtype}
        if a.micro_batch_tokens:
            settings["micro_batch_tokens"] = a.micro_batch_tokens
        for profile in [a.data] if a.data else a.profiles:
            job = {"model": model, "rows": make_pairs(a, profile, model), "batch": a.pairs, **settings}
            rows += compare.optimizer_steps("dpo_step", Path(profile).name, job, a.sides, a.rounds, loaded, rate)
    compare.report("dpo_step", rows, a.quick, a.device, a.model)


WORKERS = {
    "ours": ours,
    "ours_compiled": lambda job: ours(job, compile=True),
    "trl_best": lambda job: trl(job, best=True),
    "trl_best_1": lambda job: trl(job, best=True, rows=1),
    "trl_default": lambda job: trl(job, best=False),
    "trl_bf16": lambda job: trl(job, best=True, weights="bfloat16"),
    "loop": loop,
}

if __name__ == "__main__":
    compare.cli(main, Args, WORKERS)
