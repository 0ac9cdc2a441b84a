"""Time the wait for the first optimizer step of a run, for the next run of a sweep, and for `--help`.

    python -m benchmarks.startup [--model DIR] [--rounds 3] [--quick]

    first step   from `python train_dpo.py` to the end of its first optimizer step, on the embedded task. The SFT model
                 exists, the cache of reference log-probs is empty. Target: at most 10 s
    next run     the same with another --beta, so the reference log-probs are in the cache: from the loaded model to the
                 start of the first training step. Target: at most 2 s
    help         `python train_dpo.py --help`

Each runs in its own process. "cpu" is the CPU time of all threads, user and system.
"""

import os
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

from benchmarks import compare
from benchmarks.watch import Done
from support import models, refcache, runs, scoring

TARGETS = {"first step": 10.0, "next run": 2.0, "help": None}


@dataclass
class Args:
    model: str = "runs/sft"
    """starting weights; runs/sft is made first if it is missing"""
    rounds: int = 3
    """number of processes for each measurement"""
    quick: bool = False
    """measure once, with reference log-probs for a single step only"""


def flags(job: dict) -> dict:
    """Flags of both runs of train_dpo.py, in an empty run directory; the cache is kept from the first to the next."""
    shutil.rmtree(Path(job["folder"], "run"), ignore_errors=True)
    common = {"model": job["model"], "out": f"{job['folder']}/run", "ref_cache": f"{job['folder']}/cache"}
    return common | {"device": "cpu"} | job["flags"]


def first_step(job: dict) -> dict:
    """Start train_dpo.py, and kill it once metrics.jsonl has a row for step 1."""
    run_flags = flags(job)
    shutil.rmtree(run_flags["ref_cache"], ignore_errors=True)
    command = [f"--{name.replace('_', '-')}={value}" for name, value in run_flags.items()]
    metrics = Path(run_flags["out"], "metrics.jsonl")
    began = time.perf_counter()
    run = subprocess.Popen([sys.executable, "train_dpo.py", *command], cwd=compare.ROOT, stdout=subprocess.DEVNULL)
    while not (metrics.exists() and '{"step": 1,' in metrics.read_text()):
        time.sleep(0.01)
        if run.poll() is not None:
            sys.exit("train_dpo.py ended before its first step")
    seconds = time.perf_counter() - began
    run.kill()
    used = os.wait4(run.pid, 0)[2]
    return {"seconds": seconds, "cpu": used.ru_utime + used.ru_stime}


def next_run(job: dict) -> dict:
    """Run train_dpo.main with the cache that `first_step` left, up to its first training step."""
    import train_dpo

    load, times = models.load_model, {}

    def loaded(*args):
        model = load(*args)
        times.update(seconds=-time.perf_counter(), cpu=-time.process_time())
        return model

    def training(*_):
        times["seconds"] += time.perf_counter()
        times["cpu"] += time.process_time()
        raise Done

    def missed(*_):
        sys.exit("the reference log-probs are not in the cache")

    with (
        mock.patch.object(models, "load_model", loaded),
        mock.patch.object(refcache, "score_logps", missed),
        mock.patch.object(scoring, "micro_batches", training),
    ):
        try:
            train_dpo.main(train_dpo.Args(**flags(job), beta=0.3))
        except Done:
            return times


def show_help(_: dict) -> dict:
    began = time.perf_counter()
    run = subprocess.Popen([sys.executable, "train_dpo.py", "--help"], cwd=compare.ROOT, stdout=subprocess.DEVNULL)
    _, status, used = os.wait4(run.pid, 0)
    if status:
        sys.exit("train_dpo.py --help failed")
    return {"seconds": time.perf_counter() - began, "cpu": used.ru_utime + used.ru_stime}


def main(a: Args) -> None:
    import train_sft

    if a.quick:
        a.rounds = 1
    runs.make_missing(train_sft, a.model, "cpu")
    with tempfile.TemporaryDirectory() as folder:
        job = {"model": str(Path(a.model).absolute()), "folder": folder, "flags": {"max_steps": 1} if a.quick else {}}
        rows = []
        for name, times in compare.in_turn("startup", [*TARGETS], job, a.rounds).items():
            target = "" if TARGETS[name] is None else f"{TARGETS[name]:g}"
            medians = {field: compare.median(times, field) for field in ("seconds", "cpu")}
            rows.append({"what": name, **medians, "at most": target})
    compare.report("startup", rows, a.quick)


WORKERS = {"first step": first_step, "next run": next_run, "help": show_help}

if __name__ == "__main__":
    compare.cli(main, Args, WORKERS)
