"""Shared by all experiments: flags, the CSV of results, worker processes, intervals over seeds, the verdict.

An experiment is a module ablations/NAME/__main__.py with the criterion in its docstring and

    CLAIM                 one line
    SETTINGS              {setting: flags}
    main(a: Args)         runs whatever its CSV lacks, and ends with plot.finish
    report(results)       -> table (markdown), verdict, effect (one line with an interval)
    draw(results, page)   draws on a matplotlib figure of 6.4 x 4 inches
"""

import csv
import importlib
import json
import math
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from multiprocessing import get_context
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import torch
from jaxtyping import Float
from torch import Tensor

import evaluate
import train_sft
from rlhf import require
from support import models, reviews, scoring
from support.examples import Example, build, held_out
from support.generate import answer, answer_stats, end_ids
from support.report import interval as show  # noqa: F401 (experiments import it from here)
from support.report import mean_interval as t_interval
from support.rewards import load_reward
from support.runs import Run, is_made, processor
from support.scoring import Batching

ROOT = Path(__file__).parent
START, END = "<!-- table -->\n", "<!-- end -->"  # in each README: what plot.py writes stands between them
FIELDS = ("setting", "seed", "step", "metric", "value", "commit", "hardware", "date")


@dataclass
class Args:
    quick: bool = False
    """a smaller experiment, at most 5 minutes on 2 cores; its results stay under runs/"""
    smoke: bool = False
    """a tiny run, at most 20 seconds: checks that the code runs, says nothing about the claim"""
    seeds: int = 5
    """seeds 0, 1, ... of every setting, >= 1; a quick or smoke run may take fewer"""


def work(name: str, a: Args) -> Path:
    """The folder for run directories and logs: runs/ablations/NAME/full, quick, or smoke (emptied first)."""
    folder = Path("runs/ablations", name, "smoke" if a.smoke else "quick" if a.quick else "full")
    if a.smoke:
        shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def results(name: str, a: Args) -> "Results":
    """The experiment's results: ablations/NAME/results.csv; of a quick or smoke run, results.csv in `work`.

    BadInput if plot.py could not write a full run's tables, because the README or a mark in it is missing."""
    short = a.quick or a.smoke
    problem = "" if short else lacks_table(ROOT / name / "README.md")
    require(not problem, f'{problem}: see {ROOT}/README.md, "Add one in 15 minutes"')
    return Results(work(name, a) / "results.csv" if short else ROOT / name / "results.csv")


def lacks_table(readme: Path) -> str:
    """What keeps plot.py from writing a table into a README; "" if nothing does."""
    text = readme.read_text() if readme.exists() else ""
    marked = START in text and END in text.split(START, 1)[1]
    return "" if marked else f"{readme}: is missing, or lacks the lines {START.strip()} and {END}"


# ------------------------------------------------------------------------------------------------------------- results


class Results:
    """Rows (setting, seed, step, metric, value, commit, hardware, date) of a CSV file; step is empty at a run's end.

    `add` appends to the file at once, so a stopped experiment can continue with the runs that are not `done`, and sets
    `added`.
    """

    def __init__(self, path: str | Path):
        self.path, self.added = Path(path), False
        self.values_of: dict[tuple[str, int, int | None, str], float] = {}
        self.made: dict[str, set[str]] = {"commit": set(), "hardware": set(), "date": set()}
        text = self.path.read_text() if self.path.exists() else ""
        complete = text[: text.rfind("\n") + 1]  # without a last line that was cut short when the machine stopped
        if complete != text:
            self.path.write_text(complete)
        for row in csv.DictReader(complete.splitlines()):
            step = int(row["step"]) if row["step"] else None
            self.values_of[row["setting"], int(row["seed"]), step, row["metric"]] = float(row["value"])
            for name, values in self.made.items():
                values.add(row[name])

    def done(self, setting: str, seed: int) -> bool:
        """Whether this run has values at its end."""
        return any(key[:3] == (setting, seed, None) for key in self.values_of)

    def seeds(self) -> list[int]:
        """The seeds, in order, for which every setting that has values is done."""
        done = {key[:2] for key in self.values_of if key[2] is None}
        settings = {setting for setting, _ in done}
        return [seed for seed in sorted({seed for _, seed in done}) if all((x, seed) in done for x in settings)]

    def add(self, setting: str, seed: int, values: Mapping[str, float], step: int | None = None) -> None:
        """Append a value per metric, steps first: values without one make the run done. ValueError if not finite."""
        for metric, value in values.items():
            if not math.isfinite(value):
                raise ValueError(f"{setting}, seed {seed}, step {step}: {metric} is {value}")
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.added = True
        new = not self.path.exists() or not self.path.stat().st_size
        made = {"commit": commit(), "hardware": hardware(), "date": time.strftime("%Y-%m-%d")}
        with open(self.path, "a", newline="") as f:
            writer = csv.writer(f, lineterminator="\n")
            writer.writerows([FIELDS] if new else [])
            for metric, value in values.items():
                at = "" if step is None else step
                writer.writerow([setting, seed, at, metric, f"{value:.6g}", *made.values()])
                self.values_of[setting, seed, step, metric] = float(f"{value:.6g}")
            for name, value in made.items():
                self.made[name].add(value)

    def values(self, setting: str, metric: str, step: int | None = None) -> dict[int, float]:
        """Seed -> value, at the end of the run or at a step."""
        by_seed = {key[1]: x for key, x in self.values_of.items() if key[::2] == (setting, step) and key[3] == metric}
        return dict(sorted(by_seed.items()))

    def steps(self, setting: str) -> list[int]:
        """The steps that have values, in order."""
        return sorted({key[2] for key in self.values_of if key[0] == setting and key[2] is not None})

    def minutes(self) -> float:
        """The sum of the metric `seconds` over all runs, one thread each, in minutes."""
        return sum(x for key, x in self.values_of.items() if key[3] == "seconds") / 60


_cached: dict[str, str] = {}


def commit() -> str:
    """The current commit, with a + if the code differs from it."""

    def git(*command: str) -> str:
        return subprocess.run(["git", *command], cwd=ROOT, capture_output=True, text=True, check=False).stdout.strip()

    if "commit" not in _cached:
        changed = git("status", "--porcelain", "--", ":/*.py")
        _cached["commit"] = (git("rev-parse", "--short=12", "HEAD") or "none") + ("+" if changed else "")
    return _cached["commit"]


def hardware() -> str:
    """Processor and torch version, as in "2 cores of an AMD EPYC, torch 2.13.0"."""
    if "hardware" not in _cached:
        version = torch.__version__.split("+")[0]
        _cached["hardware"] = f"{os.cpu_count()} cores of an {processor()}, torch {version}"
    return _cached["hardware"]


# ----------------------------------------------------------------------------------------------------------- processes


def _worker(log: str | None) -> None:
    torch.set_num_threads(1)
    if log:
        file = os.open(Path(log, f"{os.getpid()}.log"), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(file, sys.stdout.fileno())
        os.dup2(file, sys.stderr.fileno())


def _timed(module: str, name: str, task: Sequence) -> tuple[Any, float]:
    began = time.process_time()
    return getattr(importlib.import_module(module), name)(*task), time.process_time() - began


def each(
    function: Callable, tasks: Sequence[Sequence], jobs: int, log: Path | None = None
) -> Iterator[tuple[Sequence, Any, float]]:
    """Run independent tasks in `jobs` processes; yield (task, function(*task), CPU seconds) as each one finishes.

    Each process has one torch thread, so results do not depend on `jobs`; its output goes to a file in `log`. The
    function must be at the top level of a module and use only its arguments. The first error cancels tasks not begun.
    """
    module = function.__module__
    if module == "__main__":  # a new process needs the importable name
        module = sys.modules["__main__"].__spec__.name
    pool = ProcessPoolExecutor(jobs, get_context("spawn"), _worker, (log and str(log),))
    began = time.perf_counter()
    try:
        futures = {pool.submit(_timed, module, function.__name__, task): task for task in tasks}
        for n, future in enumerate(as_completed(futures), 1):
            value, seconds = future.result()
            label = " ".join(str(x) for x in futures[future] if isinstance(x, str | int | float))
            minutes = (time.perf_counter() - began) / 60
            print(f"{n} of {len(tasks)} in {minutes:.1f} min: {label} ({seconds:.0f} s)", flush=True)
            yield futures[future], value, seconds
    finally:
        pool.shutdown(cancel_futures=True)


@contextmanager
def at_checkpoints(look: Callable[[int, dict], None]) -> Iterator[None]:
    """Inside, scripts call look(step, weights) instead of saving a checkpoint (--save-every), and draw no curves."""
    save = mock.patch.object(Run, "save_checkpoint", lambda _, step, state: look(step, state["model"]))
    with save, mock.patch("support.report.curves"):
        yield


# ---------------------------------------------------------------------------------------------------------- statistics


def paired(mine: Mapping[int, float], other: Mapping[int, float]) -> tuple[float, float]:
    """Mean of mine - other over the seeds that both have, and half its 95 % interval."""
    return t_interval([mine[seed] - other[seed] for seed in mine if seed in other])


def between(points: Sequence[tuple[float, float]], nats: float) -> float:
    """The reward at a KL, linear between the first two neighbours around it; beyond the last point, that point's."""
    for (x0, y0), (x1, y1) in zip(points, points[1:], strict=False):
        if x0 <= nats < x1:
            return y0 + (y1 - y0) * (nats - x0) / (x1 - x0)
    return points[-1][1]


def verdict(differences: Sequence[tuple[float, float]]) -> str:
    """For differences (mean, half) that the claim says are above 0: *reproduced* if every interval is above 0,
    *contradicted* if one is below 0, else *not resolved*."""
    if any(mean + half < 0 for mean, half in differences):
        return "contradicted"
    return "reproduced" if all(mean - half > 0 for mean, half in differences) else "not resolved"


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


# --------------------------------------------------------------------------------------------------- the embedded task


def write(path: Path, rows: Iterable[dict]) -> str:
    """Write the rows to a .jsonl file and return its name."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def rows(kind: str, n: int, seed: int = 0) -> list[dict]:
    """Rows of the embedded task, without their source locations."""
    return [row for _, row in reviews.rows(kind, n, seed)]


def trained(script: ModuleType, out: Path, **flags) -> str:
    """The run directory `out` of a script: trained if it is missing, resumed if it was begun; on the CPU by default."""
    if not is_made(str(out)):
        script.main(script.Args(out=str(out), resume=(out / "args.json").exists(), **({"device": "cpu"} | flags)))
    return str(out)


def sft_model(folder: Path, smoke: bool, **flags) -> str:
    """The embedded task's SFT model, made by train_sft.py in folder/sft; with two updates in a smoke run."""
    flags |= {"data": write(folder / "sft.jsonl", rows("sft", 60)), "max_steps": 2} if smoke else {}
    return trained(train_sft, folder / "sft", eval_prompts=0, **flags)


@cache
def prompts(n: int = 24_000, seed: int = 0) -> tuple[list[Example], list[Example]]:
    """The distinct prompts of n rows: training prompts, and those that --eval-fraction 0.1 holds out."""
    examples, _ = build(reviews.rows("prompts", n, seed), reviews.tokenizer(), "prompts", 512, 1024)
    return held_out([*{e.prompt_text: e for e in examples}.values()], 0.1)


def measured(
    model: str, ref: str, asked: Sequence[Example], seed: int, tokens: int, reward: str = ""
) -> dict[str, list[float]]:
    """`of_answers` for one sampled answer of at most `tokens` tokens to each prompt; with a reward model, "proxy", its
    reward, too. The models are run directories."""
    tokenizer, policy = models.load_tokenizer(model), models.load_model(model, "cpu")
    answers = answer(policy, tokenizer, asked, tokens, seed)
    stats = of_answers(policy, models.load_model(ref, "cpu"), tokenizer, answers)
    if reward:
        texts = zip(*((e.prompt_text, e.response_texts[0]) for e in answers), strict=True)
        stats["proxy"] = load_reward(reward)(*texts, [{"ended": bool(x)} for x in stats["ended"]])
    return stats


@torch.no_grad()
def entropies(policy, tokenizer, answers: Sequence[Example]) -> Float[Tensor, " n"]:
    """The policy's entropy over the vocabulary at each token of all answers, concatenated, in nats; no gradient."""
    of_batch = lambda batch: scoring.logps_and_entropies(policy, batch)[:, 1]  # noqa: E731
    return scoring.per_token(of_batch, answers, Batching("tree", models.pad_id(tokenizer)))


def of_answers(policy, reference, tokenizer, answers: Sequence[Example]) -> dict[str, list[float]]:
    """For each answer: length, ended, gold reward, grammatical (0 or 1), readable (gold if grammatical, else 0), the
    exact KL to the reference in nats per answer, and the reference's negative log-likelihood in nats per token."""
    stats = answer_stats(answers, end_ids(policy, tokenizer), embedded=True)
    stats["readable"] = [x * fluent for x, fluent in zip(stats["gold"], stats["grammatical"], strict=True)]
    exact = evaluate.against_reference(policy, reference, answers, Batching("tree", models.pad_id(tokenizer)))
    return stats | {"kl": exact["kl"], "ref_nll": [-x for x in exact["ref_logp"]]}
