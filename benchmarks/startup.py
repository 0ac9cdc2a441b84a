"""Waiting: for the first optimizer step of a run, for the next run of a sweep, and for `--help`.

    python -m benchmarks.startup [--model DIR] [--rounds 3] [--quick]

    first step   from `python train_dpo.py` to the end of its first optimizer step, on the embedded task with its SFT
                 model made before and no reference log-probs in the cache; at most 10 s is the aim
    next run     the same with another --beta, so that the reference log-probs are in the cache: from having the model
                 to the beginning of the first training step; at most 2 s is the aim
    help         `python train_dpo.py --help`

Each in a process of its own. "cpu" is processor time of all threads, in the program and in the system for it.
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

AIMS = {"first step": 10.0, "next run": 2.0, "help": None}


@dataclass
class Args:
    model: str = "runs/sft"
    """starting weights; runs/sft is made first where it is missing"""
    rounds: int = 3
    """processes of each"""
    quick: bool = False
    """once, with the reference log-probs of a single step"""


def flags(job: dict) -> dict:
    """Those of both runs of train_dpo.py; the cache stays from one to the next."""
    shutil.rmtree(Path(job["folder"], "run"), ignore_errors=True)
    given = {"model": job["model"], "out": f"{job['folder']}/run", "ref_cache": f"{job['folder']}/cache"}
    given["device"] = "cpu"
    return given | job["flags"]


def first_step(job: dict) -> dict:
    """Starts train_dpo.py, and ends it when metrics.jsonl has a row of step 1."""
    given = flags(job)
    shutil.rmtree(given["ref_cache"], ignore_errors=True)
    command = [f"--{name.replace('_', '-')}={value}" for name, value in given.items()]
    metrics = Path(given["out"], "metrics.jsonl")
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
    """train_dpo.main with the cache that `first_step` left, up to its first training step."""
    import train_dpo

    load, found = models.load_model, {}

    def loaded(*args):
        model = load(*args)
        found.update(seconds=-time.perf_counter(), cpu=-time.process_time())
        return model

    def training(*_):
        found["seconds"] += time.perf_counter()
        found["cpu"] += time.process_time()
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
            return found


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
        for what, timed in compare.in_turn("startup", [*AIMS], job, a.rounds).items():
            aim = "" if AIMS[what] is None else f"{AIMS[what]:g}"
            facts = {name: compare.median(timed, name) for name in ("seconds", "cpu")}
            rows.append({"what": what, **facts, "at most": aim})
    compare.report("startup", rows, a.quick)


WORKERS = {"first step": first_step, "next run": next_run, "help": show_help}

if __name__ == "__main__":
    compare.cli(main, Args, WORKERS)
