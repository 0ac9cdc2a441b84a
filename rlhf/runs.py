"""Around the training loop: the run directory, metrics, progress, checkpoints, tables and curves. No mathematics.

runs/NAME/
  args.json, environment.json, train_NAME.py    what was run: flags, versions, commit, the script's source
  metrics.jsonl, samples.jsonl, curves.png      what happened (docs/metrics.md explains each metric)
  config.json, model.safetensors, tokenizer...  the result, as `from_pretrained` reads it
  results.json                                  the final metrics; written last, so a run that has it is complete
  checkpoint/step-N/                            while training: all that is needed to go on from step N
"""

import contextlib
import ctypes
import dataclasses
import importlib.metadata
import json
import math
import os
import platform
import random
import re
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import tyro
from tqdm import tqdm

from rlhf import BadInput, lazy_import, require

figure = lazy_import("matplotlib.figure")
wandb = lazy_import("wandb")

PACKAGES = ["torch", "transformers", "datasets", "tokenizers", "numpy"]
FREE_TO_CHANGE = {"resume", "wandb", "save_every"}  # flags that a resumed run may be given anew


def cli(main: Callable, args_class: type) -> None:
    """Read the flags and run; a BadInput is one line on stderr and exit code 2, and so is anything tyro refuses."""
    try:
        main(tyro.cli(args_class, description=sys.modules[main.__module__].__doc__))
    except BadInput as error:
        sys.exit(_complain(error, 2))
    except (OSError, FloatingPointError) as error:
        sys.exit(_complain(error, 1))
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)


def _complain(error: Exception, code: int) -> int:
    rank = int(os.environ.get("RANK", 0))
    if rank and not isinstance(error, OSError):  # of several processes the first says what all have met,
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_DFL)
        time.sleep(10)  # and its end is that of the others; theirs would cut it short
    for bar in list(getattr(tqdm, "_instances", ())):  # or the message would stand on the bar's own line
        bar.close()
    print(f"error{f' (process {rank})' if rank else ''}: {error}", file=sys.stderr)
    return code


RANGES = {  # of the flags that mean the same in every script
    "at least 1": (
        lambda x: x >= 1,
        "batch_size micro_batch_tokens epochs max_steps max_prompt_length eval_every save_every max_new_tokens k"
        " max_prompts",
    ),
    "at least 0": (
        lambda x: 0 <= x < math.inf,
        "weight_decay eval_prompts keep_softmax_mib noise margin_coef centring lora_rank",
    ),
    "above 0": (lambda x: 0 < x < math.inf, "lr max_grad_norm temperature"),
    "in [0, 1)": (lambda x: 0 <= x < 1, "warmup eval_fraction"),
}


def check(args: Any) -> None:
    """BadInput where a flag of `args` is outside its range; None, where a flag allows it, is its default."""
    for what, (inside, names) in RANGES.items():
        for name in names.split():
            value = getattr(args, name, None)
            require(value is None or inside(value), f"--{name.replace('_', '-')} must be {what}, not {value}")
    merged = getattr(args, "lora_merge", False) and not args.lora_rank
    require(not merged, "--lora-merge: there are no adapters to merge without --lora-rank")
    longest = getattr(args, "max_length", math.inf)
    require(
        args.max_prompt_length < longest,
        f"--max-prompt-length {args.max_prompt_length} must be below --max-length {longest}",
    )
    try:
        torch.empty(0, device=args.device)
    except (RuntimeError, AssertionError) as error:
        raise BadInput(f"--device {args.device}: {str(error).splitlines()[0]}") from None


def schedule(step: int, steps: int, warmup: float) -> float:
    """Share of the peak learning rate at `step` (0-based): linear warm-up over the first `warmup` share of the steps,
    then a cosine that would reach 0 one step after the last."""
    rising = math.ceil(warmup * steps)
    if step < rising:
        return (step + 1) / rising
    return 0.5 * (1 + math.cos(math.pi * (step - rising) / (steps - rising)))


class Run:
    """A run directory and what is written to it while training.

    A directory that holds a run is never overwritten: BadInput, unless `args.resume` continues that very run. Nothing
    is written before `start`, so that a command which fails on its data can be given again as it is.
    After SIGINT or SIGTERM `interrupted` is the signal's number: the loop finishes its step, saves, and calls `leave`.
    """

    def __init__(self, args: Any, script: str):
        fits = type(self) is not Run or int(os.environ.get("WORLD_SIZE", 1)) == 1
        require(fits, f"{Path(script).name} works in one process only: run it without torchrun")
        self.args, self.out, self.script, self.bar, self.interrupted = args, Path(args.out), script, None, None
        self.flags = json.loads(json.dumps(dataclasses.asdict(args)))
        keep_freed_memory()
        begun = (self.out / "args.json").exists()
        if args.dry_run:
            return
        if begun and not args.resume:
            raise BadInput(f"--out {self.out} already holds a run: continue it with --resume, or name another --out")
        if (self.out / "config.json").exists() and not begun:
            raise BadInput(f"--out {self.out} already holds a model: name another --out")
        if args.resume and not begun:
            raise BadInput(f"--resume: {self.out} holds no run to continue")
        if begun:
            before = json.loads((self.out / "args.json").read_text())
            names = [n for n in self.flags if n not in FREE_TO_CHANGE and before.get(n) != self.flags[n]]
            if names:
                changes = ", ".join(f"--{n.replace('_', '-')} {before.get(n)} -> {self.flags[n]}" for n in names)
                raise BadInput(f"--resume: {self.out} was run with other flags: {changes}")
            if (self.out / "results.json").exists():
                raise BadInput(f"--resume: {self.out} is complete; name another --out for a new run")
        try:
            self.out.mkdir(parents=True, exist_ok=True)
            (self.out / ".write").touch()
            (self.out / ".write").unlink(missing_ok=True)  # another process may have been faster
        except OSError as error:
            raise BadInput(f"--out {self.out}: cannot write there: {error.strerror}") from None

    def start(self, step: int, steps: int) -> None:
        """Begin the loop at `step` of `steps`: write down what is run, or cut the logs back to the checkpoint; show the
        progress bar; take over SIGINT and SIGTERM."""
        if not (self.out / "args.json").exists():
            shutil.copy(self.script, self.out)
            _write(self.out / "environment.json", json.dumps(environment(), indent=1))
            _write(self.out / "args.json", json.dumps(self.flags, indent=1))
        for name in ("metrics.jsonl", "samples.jsonl"):
            path = self.out / name
            if path.exists():
                last = step - (name == "samples.jsonl" and step == steps)  # the end's samples follow its checkpoint
                complete = path.read_text("utf-8").split("\n")[:-1]
                _write(path, "".join(line + "\n" for line in complete if step and json.loads(line)["step"] <= last))
        if self.args.wandb:
            identity = f"{self.out.name}-{int((self.out / 'args.json').stat().st_mtime)}"
            options = {"project": "rlhf", "name": self.out.name, "dir": str(self.out), "config": self.flags}
            wandb.init(id=identity, resume="allow", **options)
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._interrupt)
        self.bar = tqdm(total=steps, initial=step, desc=self.out.name, unit="step", dynamic_ncols=True, mininterval=0.5)

    def _interrupt(self, number, _frame):
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
        self.interrupted = number

    def log(self, step: int, metrics: dict[str, float]) -> None:
        """Append one row to metrics.jsonl (step counts finished optimizer steps), and to wandb."""
        with open(self.out / "metrics.jsonl", "a") as f:
            f.write(json.dumps({"step": step, **metrics}) + "\n")
        if self.args.wandb:
            wandb.log(metrics, step=step)

    def progress(self, step: int, **shown: float) -> None:
        """Move the progress bar to `step` and show these numbers beside it."""
        self.bar.set_postfix({k: f"{v:.3g}" if v < 1000 else f"{v:,.0f}" for k, v in shown.items()}, refresh=False)
        self.bar.update(step - self.bar.n)

    def require_finite(self, step: int, loss: float, norm: float, examples: Sequence) -> None:
        """FloatingPointError, before the update, where the loss or its gradient is NaN or infinite."""
        if not (math.isfinite(loss) and math.isfinite(norm)):
            self.bar.close()
            rows = ", ".join(e.where for e in examples[:8]) + (", ..." if len(examples) > 8 else "")
            whole = self.newest_checkpoint()
            kept = f"the last checkpoint, in {whole}, is good" if whole else "there is no checkpoint yet"
            raise FloatingPointError(
                f"step {step}: the loss is {loss} and the gradient norm {norm} (rows {rows}); {kept}, but --resume "
                "would come to the same step: try a lower --lr in another --out"
            )

    def samples(self, step: int, rows: Sequence[dict]) -> None:
        """Append rows (texts and their scores) to samples.jsonl, and to wandb as a table."""
        with open(self.out / "samples.jsonl", "a", encoding="utf-8") as f:
            f.writelines(json.dumps({"step": step, **row}, ensure_ascii=False) + "\n" for row in rows)
        if self.args.wandb and rows:
            wandb.log({"samples": wandb.Table(columns=list(rows[0]), data=[list(r.values()) for r in rows])}, step=step)

    def save_checkpoint(self, step: int, state: dict) -> None:
        """Write `state` as checkpoint/step-N: whole or not at all, and only then drop the older ones."""
        folder = self.out / "checkpoint"
        partial, whole = folder / f"step-{step}.partial", folder / f"step-{step}"
        if whole.exists():
            return
        shutil.rmtree(partial, ignore_errors=True)
        try:
            partial.mkdir(parents=True)
            with open(partial / "state.pt", "wb") as f:
                torch.save(state, f)
                f.flush()
                os.fsync(f.fileno())
        except (OSError, RuntimeError) as error:
            shutil.rmtree(partial, ignore_errors=True)
            raise OSError(f"no checkpoint of step {step} in {folder} ({error}); the one before it stays") from None
        self.keep(partial, whole)

    def keep(self, partial: Path, whole: Path) -> None:
        """A checkpoint is written: give it its name, and drop the others."""
        os.rename(partial, whole)
        for other in whole.parent.iterdir():
            if other != whole:
                shutil.rmtree(other, ignore_errors=True)

    def newest_checkpoint(self) -> Path | None:
        """The folder of the newest whole checkpoint."""
        found = [path for path in self.out.glob("checkpoint/step-*") if path.name[5:].isdigit()]
        whole = [path for path in found if any((path / name).exists() for name in ("state.pt", ".metadata"))]
        return max(whole, key=lambda path: int(path.name[5:]), default=None)

    def load_checkpoint(self) -> dict | None:
        """The newest whole checkpoint, or None. Tensors and plain values only: nothing else is ever unpickled."""
        folder = self.newest_checkpoint()
        return torch.load(folder / "state.pt", map_location="cpu", weights_only=True) if folder else None

    def end(self) -> None:
        """After the loop, whose last checkpoint is written: close the bar, and let signals stop the program again."""
        self.bar.close()
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)

    def leave(self, step: int) -> None:
        """After a signal, with the checkpoint written: say how to go on, and exit with 128 + the signal's number."""
        self.bar.close()
        print(f"\nstopped after step {step}; the same command with --resume goes on from there")
        sys.exit(128 + self.interrupted)

    def finish(self, results: dict, panels: dict[str, list[str]]) -> None:
        """Draw curves.png if it has panels; write results.json, which makes the run complete; drop the checkpoint."""
        if panels:
            curves(self.out, panels)
        if self.args.wandb:
            if panels:
                wandb.log({"curves": wandb.Image(str(self.out / "curves.png"))})
            wandb.summary.update(results)
            wandb.finish()
        _write(self.out / "results.json", json.dumps(results, indent=1))
        shutil.rmtree(self.out / "checkpoint", ignore_errors=True)


def keep_freed_memory() -> None:
    """From now on the C library keeps what is freed: a step on a CPU needs the same large blocks again and again, and
    fetching them from the system each time costs about a tenth of it. Does nothing where the library is not glibc."""
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(-3, 1 << 30)  # M_MMAP_THRESHOLD
        libc.mallopt(-1, (1 << 31) - 1)  # M_TRIM_THRESHOLD


def _write(path: Path, text: str) -> None:
    """Replace a file by another, whole or not at all."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text, "utf-8")
    os.replace(partial, path)


def processor() -> str:
    """The processor's name where the system says it, else its family."""
    info = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    found = re.search(r"model name\s*: (.*)", info)
    return found[1] if found else platform.processor() or platform.machine()


def environment() -> dict[str, Any]:
    """Versions, commit and hardware of this run."""

    def git(*command):
        here = Path(__file__).parent
        return subprocess.run(["git", *command], cwd=here, capture_output=True, text=True, check=False).stdout.strip()

    return {
        "python": platform.python_version(),
        **{name: importlib.metadata.version(name) for name in PACKAGES},
        "commit": git("rev-parse", "HEAD") or None,
        "uncommitted": bool(git("status", "--porcelain")),
        "machine": platform.machine(),
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def curves(out: Path, panels: dict[str, list[str]]) -> None:
    """curves.png: one panel for each title, with those of its metrics that were logged, against the step."""
    rows = [json.loads(line) for line in open(out / "metrics.jsonl")]
    panels = {t: [n for n in names if any(n in row for row in rows)] for t, names in panels.items()}
    panels = {title: names for title, names in panels.items() if names}
    columns = min(3, len(panels))
    height = math.ceil(len(panels) / columns)
    page = figure.Figure(figsize=(4.2 * columns, 3 * height), layout="constrained")
    for i, (title, names) in enumerate(panels.items()):
        axes = page.add_subplot(height, columns, i + 1)
        for name in names:
            points = [(row["step"], row[name]) for row in rows if name in row]
            axes.plot(*zip(*points, strict=True), marker="." if len(points) < 30 else None, label=name)
        axes.set_title(title, fontsize=10)
        axes.set_xlabel("step", fontsize=8)
        axes.tick_params(labelsize=8)
        axes.grid(alpha=0.3)
        if len(names) > 1:
            axes.legend(fontsize=7)
    page.savefig(out / "curves.png", dpi=120)


def mean_interval(values: Sequence[float], groups: Sequence | None = None) -> tuple[float, float]:
    """Mean, and half the width of its 95 % interval: 1.96 standard errors; infinite for fewer than two groups.

    Values of one group (by default each is its own), say those of one prompt, may depend on each other:
    se^2 = G / (G - 1) * sum over the G groups of (sum of the group's (value - mean))^2 / n^2.
    """
    mean, off = statistics.fmean(values), defaultdict(float)
    for value, group in zip(values, range(len(values)) if groups is None else groups, strict=True):
        off[group] += value - mean
    if len(off) < 2:
        return mean, math.inf
    spread = math.sqrt(sum(x * x for x in off.values()) * len(off) / (len(off) - 1))
    return mean, 1.96 * spread / len(values)


def interval(mean_and_half: tuple[float, float], digits: int = 2) -> str:
    """ "mean +- half", or the mean alone where one value gives no interval."""
    mean, half = mean_and_half
    return f"{mean:.{digits}f}" + (f" +- {half:.{digits}f}" if math.isfinite(half) else "")


FACTS = {  # what is found out about sampled answers (rlhf/generate.py), as the tables name it
    "gold": "gold reward",
    "score": "score of the reward",
    "grammatical": "grammatical share",
    "kl": "KL to the reference, nats an answer",
    "length": "length, tokens",
    "ended": "share that ends with EOS",
}


def before_and_after(facts: dict[str, dict[str, list[float]]]) -> tuple[list[list[str]], dict[str, float]]:
    """Rows of a table, and results: each fact's mean with a 95 % interval, before and after, over the same prompts.

    gain/gold is the mean paired difference of the gold reward in units of its deviation before.
    """
    rows, results = [], {}
    for name in (n for n in FACTS if facts["after"].get(n)):
        intervals = {side: mean_interval(found[name]) for side, found in facts.items()}
        results |= {f"{side}/{name}": mean for side, (mean, _) in intervals.items()}
        rows.append([FACTS[name], *map(interval, intervals.values())])
    before = facts["before"].get("gold", [])
    if len(before) > 1 and (unit := statistics.stdev(before)):
        gains = [(y - x) / unit for x, y in zip(before, facts["after"]["gold"], strict=True)]
        results["gain/gold"], results["gain/gold_interval"] = mean_interval(gains)
    return rows, results


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Lines of text, the first column to the left and the others to the right."""
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
    pad = [str.ljust] + [str.rjust] * (len(header) - 1)
    lines = [header, ["-" * w for w in widths], *rows]
    return "\n".join("  ".join(f(x, w) for f, x, w in zip(pad, line, widths, strict=True)) for line in lines)


def bootstrap(
    items: Sequence[Any], statistic: Callable[[Sequence[Any]], float], draws: int = 1000, seed: int = 0
) -> tuple[float, float]:
    """95 % percentile interval of `statistic` over `draws` resamplings, with replacement, of `items` (Efron 1979).

    Draws whose statistic is NaN are left out; (nan, nan) where none is left, or where there are fewer than two items.
    """
    if len(items) < 2:
        return math.nan, math.nan
    rng = random.Random(seed)
    found = sorted(x for _ in range(draws) if not math.isnan(x := statistic(rng.choices(items, k=len(items)))))
    if not found:
        return math.nan, math.nan
    return found[round(0.025 * (len(found) - 1))], found[round(0.975 * (len(found) - 1))]
