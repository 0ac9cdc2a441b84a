"""Train with AdamW's moments in 8 bits and in float32: is the result the same?

    python -m benchmarks.optimizer_state [--model runs/sft] [--seeds 5] [--quick]

Runs train_dpo.py on the embedded task with `--optimizer-state 8bit` and `float32`, with the same seeds, and reports the
gold reward, KL and held-out accuracy at the end. The last row is the mean paired difference with its 95 % interval.
Criterion, set before the run: the interval of the difference in gold reward contains 0 and lies within +- 0.1.
"""

from dataclasses import dataclass
from pathlib import Path

import train_dpo
from benchmarks import compare
from support.report import interval, mean_interval

METRICS = {"gold reward": "after/gold", "KL": "after/kl", "accuracy": "after/eval/rewards/accuracies"}


@dataclass
class Args:
    model: str = "runs/sft"
    """starting weights; runs/sft is made first if it is missing"""
    seeds: int = 5
    """seeds 0, 1, ... of each side"""
    quick: bool = False
    """two seeds of three steps"""


def train(job: dict) -> dict:
    """The last metrics of a run of train_dpo.py with the job's flags."""
    results = train_dpo.main(train_dpo.Args(device="cpu", **job["flags"]))
    return {name: results[metric] for name, metric in METRICS.items()}


def main(a: Args) -> None:
    short = {"max_steps": 3, "eval_prompts": 16} if a.quick else {}
    values = {state: [] for state in ("float32", "8bit")}
    for seed in range(2 if a.quick else a.seeds):
        for state, results in values.items():
            out = Path("runs/benchmarks/optimizer_state", f"{state}_{seed}")
            flags = {"model": a.model, "seed": seed, "optimizer_state": state, "out": str(out), **short}
            results += compare.in_turn("optimizer_state", ["train"], {"flags": flags}, 1)["train"]
    pairs = zip(*values.values(), strict=True)
    values["difference"] = [{m: mine[m] - other[m] for m in METRICS} for other, mine in pairs]
    rows = [
        {"moments": side} | {m: interval(mean_interval([x[m] for x in results]), 3) for m in METRICS}
        for side, results in values.items()
    ]
    compare.report("optimizer_state", rows, a.quick)


if __name__ == "__main__":
    compare.cli(main, Args, {"train": train})
