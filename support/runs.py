"""Around the training loop: the flags that scripts share, the run directory, progress and checkpoints.

runs/NAME/
  args.json, environment.json, train_NAME.py    what was run: flags, versions, commit, the script's source
  metrics.jsonl, samples.jsonl, curves.png      what happened (docs/metrics.md explains each metric)
  config.json, model.safetensors, tokenizer...  the result, as `from_pretrained` reads it; or adapters, as peft does
  results.json                                  the final metrics; written last, so a run that has it is complete
  checkpoint/step-N/                            all that is needed to go on from step N, or to extend a finished run,
                                                with checksums; it may be deleted when the run is complete
"""

import contextlib
import ctypes
import dataclasses
import fcntl
import hashlib
import importlib.metadata
import inspect
import json
import math
import os
import pickle
import platform
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Annotated, Any, Literal

import torch
import torch.distributed as dist
import tyro
from tqdm import tqdm

import rlhf
from rlhf import BadInput, require
from support import lazy_import, models, one_line, parallel, read_json, read_json_lines, report, reviews, sharding

wandb = lazy_import("wandb")

PACKAGES = ["torch", "transformers", "datasets", "tokenizers", "numpy"]
GPU_TOKENS = 16384  # of a micro-batch, by default (benchmarks/README.md)
FREE_TO_CHANGE = {"resume", "wandb", "save_every"}  # flags that may change when a run is resumed
EXTENDING = {"max_steps", "epochs"}  # these may change too, if they ask for more steps than were made
OTHER_NAMES = {  # in other libraries -> here
    "learning-rate": "lr",
    "output-dir": "out",
    "num-epochs": "epochs",
    "num-train-epochs": "epochs",
    "per-device-train-batch-size": "batch-size",
    "model-name-or-path": "model",
    "dataset-name": "data",
}
LOGS = ("metrics.jsonl", "samples.jsonl")  # of a run: each row has its step
SUMS = "SHA256SUMS"  # the file in a checkpoint with the checksums of the others, as `sha256sum --check` reads it
LOCKS: dict[Path, int] = {}  # the run directories that this process has locked, and the handles that hold the locks
Sources = Annotated[str | tuple[str, ...], tyro.conf.arg(metavar="SOURCE ...")]
SFT_MODEL = "runs/sft"  # the default --model, which the scripts make if it is missing

# --------------------------------------------------------------------------------------------------------------- flags


@dataclass
class Flags:
    """Flags of every script that reads rows."""

    data: Sources = "reviews"
    """reviews (embedded), .jsonl/.json/.csv/.tsv/.parquet files (also .gz), folders with such files or hub ids"""
    split: str | None = None
    """split of a hub data set or a folder; default train"""
    skip_bad_rows: bool = False
    """drop and count rows that cannot be used instead of stopping at the first"""
    out: str = "runs/NAME"
    """run directory; one that is in use is never overwritten"""
    max_prompt_length: int = 512
    """tokens of a prompt, >= 1; longer ones lose their beginning"""
    max_new_tokens: int = 128
    """maximum number of tokens of a sampled answer, >= 1"""
    resume: bool = False
    """continue from the last checkpoint in --out, with the same flags; on a CPU the result is the same bit for bit"""
    dry_run: bool = False
    """print the data report, three examples token by token and, for training, its memory and time; and stop there"""
    layout: Literal["auto", "tree", "padded"] = "auto"
    """how responses share a forward pass: tree encodes the prompt once; auto uses it if a check finds it right"""
    micro_batch_tokens: int = GPU_TOKENS if torch.cuda.is_available() else 1024
    """tokens of one forward pass, >= 1: bounds memory, does not change the result; default 16384 on a machine with
    CUDA, and 1024 on one without, where more is no faster"""
    device: str = "cuda" if torch.cuda.is_available() else "cpu"
    """torch device"""
    seed: int = 0
    """random seed for the order of the data, the sampling and new weights"""
    trust_remote_code: bool = False
    """run code that comes with a hub model"""


@dataclass
class TrainingFlags(Flags):
    """Flags of the four training scripts."""

    model: str = SFT_MODEL
    """starting weights: a run directory, a local folder or a hub id; runs/sft is made first if it is missing"""
    eval_fraction: float | None = None
    """share of prompts held out, by hash of their text, in [0, 1); default 0.05 (embedded: 0.1)"""
    eval_prompts: int | None = None
    """held-out prompts answered before and after, >= 0; default 16 (embedded: 512)"""

    lr: float | None = None
    """peak learning rate of AdamW, > 0"""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """how the learning rate goes on after the warm-up: it falls to 0 as a cosine or linearly, or stays"""
    warmup: float = 0.1
    """share of the steps over which the learning rate rises linearly, in [0, 1)"""
    max_grad_norm: float = 1.0
    """gradients with a larger norm are scaled down to it, > 0"""
    batch_size: int = 64
    """prompts per optimizer step, >= 1"""
    max_steps: int | None = None
    """stop after this many optimizer steps, >= 1; the schedule ends there too; a larger one extends a run (--resume)"""
    save_every: int = 100
    """optimizer steps between checkpoints, >= 1"""
    wandb: bool = False
    """log to Weights & Biases too"""

    lora_rank: int = 0
    """rank of low-rank adapters that are trained in place of all weights, >= 0 (0: none); they need a learning rate
    about ten times as high"""
    lora_merge: bool = False
    """save the model with the adapters merged into its weights, not the adapters alone; without --lora-rank nothing is
    trained: the adapter run --model is written out merged, to --out (default: MODEL-merged)"""
    gradient_checkpointing: bool = False
    """recompute the layers' activations in the backward pass: less memory, about a third more time"""
    compile: bool = False
    """torch.compile of the layers, for a GPU: a longer first step, then shorter ones; needs a C++ compiler"""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """dtype of the matrices and their products; log-probs, rewards and AdamW's copy of the weights stay float32"""
    gradient_dtype: Literal["float32", "bfloat16"] = "float32"
    """dtype in which the gradients of a step's micro-batches add up; bfloat16 saves 2 bytes a weight (one process)"""
    optimizer_state: Literal["float32", "8bit"] = "float32"
    """AdamW's two moments; 8bit takes 2 bytes a weight instead of 8 (one process)"""
    save_dtype: Literal["float32", "bfloat16"] = "float32"
    """dtype of the saved model; bfloat16 rounds the weights of a float32 run"""


@dataclass
class EpochFlags(TrainingFlags):
    """Flags of the scripts that train in passes over a data set: SFT, the reward model, DPO."""

    eval_data: Annotated[Sources | None, tyro.conf.arg(metavar="SOURCE ...")] = None
    """held-out rows, in the same forms; default: a share of --data"""
    eval_split: str | None = None
    """split of --eval-data, which may be the same data set as --data; default: that of --split (a file has none)"""
    weight_decay: float = 0.0
    """AdamW's decoupled weight decay, >= 0"""
    epochs: int = 1
    """passes over the data, >= 1"""
    max_length: int = 1024
    """tokens of a prompt with one response, > max-prompt-length; longer responses lose their end"""
    eval_every: int = 100
    """optimizer steps between evaluations on the held-out rows, >= 1"""


RANGES = rlhf.RANGES | rlhf.ranges(  # of every flag that has one, in all scripts
    {
        "at least 1": (
            lambda x: x >= 1,
            "batch_size micro_batch_tokens epochs max_steps max_prompt_length eval_every save_every max_new_tokens k"
            " max_prompts epochs_per_rollout overlap",
        ),
        "at least 0": (
            lambda x: 0 <= x < math.inf,
            "weight_decay eval_prompts eval_pairs keep_softmax_mib noise margin_coef lora_rank entropy_coef ptx_coef"
            " resample_groups",
        ),
        "above 0": (lambda x: 0 < x < math.inf, "lr critic_lr adam_eps max_grad_norm temperature kl_stop"),
        "in [0, 1)": (lambda x: 0 <= x < 1, "warmup eval_fraction"),
        "in [0, 1]": (lambda x: 0 <= x <= 1, "overlap_share"),
        "in (0, 1]": (lambda x: 0 < x <= 1, "kl_horizon"),
        "in [0, 65535]": (lambda x: 0 <= x <= 65535, "port"),
    }
)


def check(args: Any) -> None:
    """BadInput if a flag of `args` is outside its range. None, where a flag allows it, is its default."""
    for name, value in vars(args).items():
        if name in RANGES and value is not None:
            words, test = RANGES[name]
            require(test(value), f"--{name.replace('_', '-')} must be {words}, not {value}")
    alone = int(os.environ.get("WORLD_SIZE", 1)) == 1  # the processes that torchrun started have not met yet
    fits = getattr(args, "gradient_dtype", "float32") == "float32" or args.dtype == "bfloat16" and alone
    require(fits, "--gradient-dtype bfloat16 needs --dtype bfloat16 and a single process")
    fits = getattr(args, "optimizer_state", "float32") == "float32" or alone
    require(fits, "--optimizer-state 8bit needs a single process")
    if hasattr(args, "max_length"):
        require(
            args.max_prompt_length < args.max_length,
            f"--max-prompt-length {args.max_prompt_length} must be below --max-length {args.max_length}",
        )
    try:
        device = torch.device(args.device)
        if device.type == "cuda" and torch.cuda.is_available():  # before a process takes memory of the first GPU
            problem = f"--device {args.device}: torchrun gives each process a GPU of its own: use --device cuda"
            require(alone or device.index is None, problem)
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)) if device.index is None else device.index)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise BadInput(f"--device {args.device}: {str(error).splitlines()[0]}") from None


def with_defaults(args: Any, defaults: dict[str, Any]) -> Any:
    """The flags, checked, with those that were left unset (None) filled in."""
    args = dataclasses.replace(args, **{name: x for name, x in defaults.items() if getattr(args, name) is None})
    check(args)
    return args


def cli(main: Callable, args_class: type) -> None:
    """Read the flags and run; a BadInput is one line on stderr and exit code 2, and so is anything tyro refuses.

    `--help` shows the flags that the script declares itself first, then those that it shares with the others.
    """
    fields = args_class.__dataclass_fields__
    args_class.__dataclass_fields__ = {name: fields[name] for name in inspect.get_annotations(args_class)} | fields
    try:
        for flag in (word.partition("=")[0] for word in sys.argv[1:] if word.startswith("--")):
            name = OTHER_NAMES.get(flag[2:].replace("_", "-"), "")
            require(name.replace("-", "_") not in fields, f"there is no {flag}: use --{name} (see --help)")
        sys.stdout.reconfigure(errors="backslashreplace")  # a terminal that cannot show a letter shows its number
        main(tyro.cli(args_class, description=sys.modules[main.__module__].__doc__))
        sys.stdout.flush()
    except BadInput as error:
        sys.exit(_complain(error, 2))
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # else Python fails again as it ends
        sys.exit(_complain("nobody reads the output any more", 1))
    except (OSError, FloatingPointError) as error:
        sys.exit(_complain(error, 1))
    except torch.OutOfMemoryError as error:
        advice = "lower --micro-batch-tokens, or see what --dry-run says would fit" if "dry_run" in fields else ""
        sys.exit(_complain(": ".join(filter(None, (str(error).partition(". ")[0], advice))), 1))
    except KeyboardInterrupt:
        sys.exit(_complain("stopped", 128 + signal.SIGINT))


def _complain(error: Exception | str, code: int) -> int:
    rank = int(os.environ.get("RANK", 0))
    if rank and not isinstance(error, OSError):  # the main process says what all processes have met, and its end is
        for number in (signal.SIGINT, signal.SIGTERM):  # that of the others: theirs would cut its message short
            signal.signal(number, signal.SIG_DFL)
        time.sleep(10)
    for bar in list(getattr(tqdm, "_instances", ())):  # or the message would stand on the bar's own line
        bar.close()
    advice = ""
    for out in filter(Path.is_dir, LOCKS if code != 2 and not isinstance(error, FloatingPointError) else ()):
        advice = "; before the first step, so the same command begins anew"
        if has_a_step(out):
            advice = f"; continue with --resume, from {newest_checkpoint(out) or 'the first step'}"
    word = "" if code > 128 else f"error{f' (process {rank})' if rank else ''}: "
    print(f"{word}{error}{advice}", file=sys.stderr)
    return code


# ----------------------------------------------------------------------------------------------- before and in the loop


def is_made(out: str) -> bool:
    """Whether a run directory holds a finished run, or a model that someone put there."""
    has = {name: (Path(out) / name).exists() for name in ("results.json", "config.json", "args.json")}
    return has["results.json"] or (has["config.json"] and not has["args.json"])


def make_missing(script: ModuleType, path: str, device: str) -> None:
    """Train the embedded task's model with a script's own defaults, or finish it, if `path` is that script's --out and
    holds no model yet."""
    if path != script.Args.out or is_made(path):
        return
    require(not parallel.several(), f"{path} is missing: run {script.__name__}.py first, or name another")
    print(f"{path} is missing: making it with {script.__name__}.py first\n")
    try:
        script.main(script.Args(device=device, resume=(Path(path) / "args.json").exists()))
    except SystemExit:
        print(f"that was {script.__name__}.py: your own command, given again without --resume, continues it")
        raise
    print()


def load_tokenizer(model: str, trust_remote_code: bool) -> tuple[Any, bool]:
    """The tokenizer of --model, and whether it is the embedded task's, whose gold reward and grammar are known. The
    default model need not be made yet."""
    to_make = model == SFT_MODEL and not is_made(model)
    tokenizer = reviews.tokenizer() if to_make else models.load_tokenizer(model, trust_remote_code)
    return tokenizer, reviews.is_embedded(tokenizer)


def repeated(args: Any, *names: str) -> str:
    """Those of these flags that differ from their defaults, as the next command is given them."""
    changed = [name for name in names if getattr(args, name) != getattr(type(args), name)]
    values = {name: " ".join(map(str, x)) if isinstance(x := getattr(args, name), tuple) else x for name in changed}
    return "".join(f" --{name.replace('_', '-')} {value}" for name, value in values.items())


def start(args: Any, script: str) -> "Run":
    """The run directory of a training script, whose processes, if torchrun started several, meet here. BadInput, before
    any data are read, if --lora-rank does not fit the model."""
    if args.lora_rank and args.model == "reviews":
        problem = "--lora-rank: the new model of --model reviews is saved nowhere, so its adapters need --lora-merge"
        require(args.lora_merge, problem)
    elif args.lora_rank and (args.model != SFT_MODEL or is_made(args.model)):
        models.require_adaptable(args.model, args.trust_remote_code)
    torch.manual_seed(args.seed)
    parallel.start(args.device)
    return Run(args, script)


def merge_adapters(args: Any) -> dict:
    """--lora-merge without --lora-rank: write out an adapter run, of a policy or a reward model, as a whole model.
    Trains nothing. BadInput if there are no adapters, or other flags ask for training."""
    base = models.base_of_adapters(args.model)
    require(bool(base), f"--lora-merge: there are no adapters to merge without --lora-rank, and none in {args.model}")
    used = {"model", "out", "lora_merge", "save_dtype", "trust_remote_code", "device"}
    changed = {f.name for f in dataclasses.fields(args) if getattr(args, f.name) != f.default}
    others = ", ".join(f"--{name.replace('_', '-')}" for name in sorted(changed - used))
    only = f"--lora-merge without --lora-rank only writes out the adapters in {args.model}"
    require(not others, f"{only}: leave out {others}, or give --lora-rank to train")
    require(int(os.environ.get("WORLD_SIZE", 1)) == 1, f"{only}: run it without torchrun")
    out = Path(args.out if args.out != type(args).out else f"{args.model.rstrip('/')}-merged")
    require(not out.exists() or out.is_dir() and not any(out.iterdir()), f"--out {out} already exists: name another")
    is_reward = models.is_reward_model(args.model, args.trust_remote_code)
    load = models.load_reward_model if is_reward else models.load_model
    model = load(args.model, "cpu", args.trust_remote_code, "--model")
    models.save(model, models.load_tokenizer(args.model, args.trust_remote_code), out, dtype=args.save_dtype)
    kind = "reward model" if is_reward else "policy"
    print(f"Nothing was trained: the {kind} in {out} is {base} with the adapters in {args.model} merged into it.")
    return {}


def lock(out: Path) -> None:
    """Lock a run directory until `unlock` or the end of this process, even if that is killed. BadInput if another
    process has locked it."""
    unlock(out)
    handle = os.open(out, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(handle)
        if isinstance(error, BlockingIOError):
            raise BadInput(f"--out {out} is in use by another run: wait for its end, or name another --out") from None
        print(f"--out {out}: its file system has no locks ({error.strerror}): start no second run there")
    else:
        LOCKS[out.resolve()] = handle


def unlock(out: Path) -> None:
    """Undo `lock`."""
    if handle := LOCKS.pop(out.resolve(), None):
        os.close(handle)


def schedule(step: int, steps: int, warmup: float, kind: str = "cosine") -> float:
    """Share of the peak learning rate at `step` (0-based): a linear warm-up over the first `warmup` share of the steps,
    then a cosine or a line that would reach 0 one step after the last, or a constant 1."""
    rising = math.ceil(warmup * steps)
    if step < rising:
        return (step + 1) / rising
    after, rest = step - rising, steps - rising
    return {"cosine": 0.5 * (1 + math.cos(math.pi * after / rest)), "linear": 1 - after / rest, "constant": 1.0}[kind]


class Run:
    """A run directory and what is written to it while training.

    A directory that holds a run is never overwritten: BadInput, unless `args.resume` continues that very run, or if
    another process is running it. Nothing is written before `begin_loop`, and a run that ended before its first step is
    begun anew, so that a command which fails on its data, its reward or its memory can be given again as it is.
    After SIGINT or SIGTERM `interrupted` is the signal's number: the loop finishes its step, saves, and calls `leave`.
    Of several processes the main one writes and shows, and all take part in checkpoints and in stopping.
    """

    def __init__(self, args: Any, script: str):
        joined = parallel.several() or int(os.environ.get("WORLD_SIZE", 1)) == 1
        require(joined, f"{Path(script).name} works in one process only: run it without torchrun")
        self.args, self.out, self.script, self.bar = args, Path(args.out), script, None
        self.interrupted = self.signalled = 0
        self.before: dict[str, Any] = {}  # the flags of the run that is extended
        self.digests: dict[str, str] = {}
        self.flags = json.loads(json.dumps(dataclasses.asdict(args)))
        keep_freed_memory()
        bfloat16 = args.device == "cpu" and getattr(args, "dtype", None) == "bfloat16"
        if bfloat16 and torch.backends.cpu.get_cpu_capability() == "AVX2":
            print("--dtype bfloat16: this CPU cannot multiply it, and is several times faster in float32")
        begun = (self.out / "args.json").exists()
        if args.dry_run:
            return
        if begun and not args.resume:
            holds = f"--out {self.out} already holds a run"
            require(not (self.out / "results.json").exists(), f"{holds}, which is complete: name another, or delete it")
            require(not has_a_step(self.out), f"{holds}: continue it with --resume, or name another --out")
        if (self.out / "config.json").exists() and not begun:
            raise BadInput(f"--out {self.out} already holds a model: name another --out")
        if args.resume and not begun:
            raise BadInput(f"--resume: {self.out} holds no run to continue")
        if args.resume:
            before = read_json(self.out / "args.json")
            for log in filter(Path.exists, map(self.out.joinpath, LOGS)):
                read_json_lines(log, "step")
            for field in dataclasses.fields(args):  # a flag that is newer than the run had its default
                before.setdefault(field.name, self.flags[field.name] if field.default is None else field.default)
            names = [n for n in self.flags if n not in FREE_TO_CHANGE and before[n] != self.flags[n]]
            self.before = before if {*names} & EXTENDING else {}
            names = [n for n in names if n not in EXTENDING]
            if names:
                changes = ", ".join(f"--{n.replace('_', '-')} {before[n]} -> {self.flags[n]}" for n in names)
                raise BadInput(f"--resume: {self.out} was run with other flags: {changes}")
            if (self.out / "results.json").exists():
                if newest_checkpoint(self.out):
                    advice = "a larger --max-steps or --epochs extends it"
                else:
                    advice = "it has no checkpoint to extend it from: name another --out for a new run"
                extended = bool(self.before and newest_checkpoint(self.out))
                require(extended, f"--resume: {self.out} is complete; {advice}")
        if args.wandb and os.environ.get("WANDB_MODE", "online") == "online":
            parallel.on_main(require_wandb)
        try:
            self.out.mkdir(parents=True, exist_ok=True)
            (self.out / ".write").touch()
            (self.out / ".write").unlink(missing_ok=True)  # another process may have been faster
        except OSError as error:
            raise BadInput(f"--out {self.out}: cannot write there: {error.strerror}") from None
        parallel.on_main(lambda: lock(self.out))
        if begun and not args.resume:
            print(f"--out {self.out}: the run there ended before its first step, and is begun anew")

    def check_same(self, **sources: Any) -> None:
        """BadInput if a resumed run would go on with other rows or from other weights than it began with.

        `sources`, by flag: the examples or the model that the flag gave, or None. Held-out rows come from --data if
        there is no --eval-data. Their digests are kept in environment.json; a run that has none is not checked, which a
        line says."""
        path = self.out / "environment.json"
        before = read_json(path).get("contents", {}) if self.args.resume and path.exists() else {}
        changed, unknown = [], []
        for name, source in sources.items():
            if source is None:
                continue
            is_model = isinstance(source, torch.nn.Module)
            self.digests[name] = models.digest(source) if is_model else rows_digest(source)
            flag = f"--{name.replace('_', '-')}" if getattr(self.args, name, None) else "--data"
            if name not in before:
                unknown.append(flag)
            elif before[name] != self.digests[name]:
                changed.append(flag)
        named = lambda flags: ", ".join(dict.fromkeys(flags))  # noqa: E731
        if changed:
            raise BadInput(
                f"--resume: {self.out} began with other contents of {named(changed)}: bring back what was there, or "
                "name another --out for a new run"
            )
        if unknown and self.args.resume:
            print(f"--resume: not checked whether {named(unknown)} is what {self.out} began with: it has no digests")

    def begin_loop(self, step: int, steps: int) -> None:
        """Begin the loop at `step` of `steps`: write down what is run, or cut the logs back to the checkpoint; show the
        progress bar; take over SIGINT and SIGTERM."""
        asked = f"--resume: {self.out} has {step} steps, and these flags ask for {steps}"
        epochs = getattr(self.args, "epochs", None)  # PPO has none
        more = "; the last epoch ends there: raise --epochs" if epochs and steps != self.args.max_steps else ""
        require(step < steps or not self.before, f"{asked}{more or ': raise --max-steps'}")
        if not parallel.is_main():
            self.bar = tqdm(disable=True)
            self._take_over_signals()
            return
        if self.before:
            a, results = self.args, self.out / "results.json"
            rate = a.lr * schedule(step, steps, a.warmup, a.schedule)
            print(
                f"--resume: now {steps} steps in all. From step {step + 1} on the learning rate is that of a run of "
                f"{steps} steps, {rate:.3g} first ({a.schedule}): it does not continue from its value at step {step}"
            )
            write(self.out / "args.json", json.dumps(self.flags, indent=1))
            if results.exists():
                results.rename(self.out / f"results-{step}.json")
        if not self.args.resume:
            shutil.copy(self.script, self.out)
            write(self.out / "environment.json", json.dumps(environment() | {"contents": self.digests}, indent=1))
            write(self.out / "args.json", json.dumps(self.flags, indent=1))
        for name in LOGS:
            path = self.out / name
            if path.exists():
                last = step - (name == "samples.jsonl" and step == steps)  # the end's samples follow its checkpoint
                lines = zip(path.read_text("utf-8").split("\n"), read_json_lines(path, "step"), strict=False)
                write(path, "".join(line + "\n" for line, row in lines if step and row["step"] <= last))
        if self.args.wandb:
            identity = f"{self.out.name}-{int((self.out / 'environment.json').stat().st_mtime)}"  # written once a run
            project = os.environ.get("WANDB_PROJECT", "rlhf")
            options = {"project": project, "name": self.out.name, "dir": str(self.out), "config": self.flags}
            wandb.init(id=identity, resume="allow", **options)
        self._take_over_signals()
        self.bar = tqdm(total=steps, initial=step, desc=self.out.name, unit="step", dynamic_ncols=True, mininterval=0.5)

    def _take_over_signals(self) -> None:
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._interrupt)

    def _interrupt(self, number, _frame):
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
        self.signalled = number
        if parallel.is_main():  # print could be what was interrupted
            os.write(2, b"\nstopping after this step, once it is saved; a second signal stops at once\n")
        if not parallel.several():
            self.interrupted = number

    def log(self, step: int, metrics: dict[str, float]) -> None:
        """Append one row to metrics.jsonl (step counts finished optimizer steps), and to wandb."""
        if not parallel.is_main():
            return
        with open(self.out / "metrics.jsonl", "a") as f:
            f.write(json.dumps({"step": step, **metrics}) + "\n")
        if self.args.wandb:
            wandb.log(metrics, step=step)

    def progress(self, step: int, **shown: float) -> None:
        """Move the progress bar to `step` and show these numbers beside it."""
        self.bar.set_postfix({k: f"{v:.3g}" if v < 1000 else f"{v:,.0f}" for k, v in shown.items()}, refresh=False)
        self.bar.update(step - self.bar.n)
        if parallel.several():  # so that all stop after the same step
            self.interrupted = max(parallel.gather([self.signalled]))

    def require_finite(self, step: int, loss: float, norm: float, examples: Sequence) -> None:
        """FloatingPointError, before the update, where the loss or its gradient is NaN or infinite."""
        if not (math.isfinite(loss) and math.isfinite(norm)):
            self.bar.close()
            rows = ", ".join(e.where for e in examples[:8]) + (", ..." if len(examples) > 8 else "")
            last = newest_checkpoint(self.out)
            kept = f"the last checkpoint, in {last}, is good" if last else "there is no checkpoint yet"
            raise FloatingPointError(
                f"step {step}: the loss is {loss} and the gradient norm {norm} (rows {rows}); {kept}, but --resume "
                "would come to the same step: try a lower --lr in another --out"
            )

    def samples(self, step: int, rows: Sequence[dict]) -> None:
        """Append rows (texts and their scores) to samples.jsonl, and to wandb as a table."""
        with open(self.out / "samples.jsonl", "a", encoding="utf-8", errors="backslashreplace") as f:
            f.writelines(json.dumps({"step": step, **row}, ensure_ascii=False, default=str) + "\n" for row in rows)
        if self.args.wandb and rows:
            wandb.log({"samples": wandb.Table(columns=list(rows[0]), data=[list(r.values()) for r in rows])}, step=step)

    def save_checkpoint(self, step: int, state: dict) -> None:
        """Write `state` as checkpoint/step-N, completely or not at all, and only then drop the older ones."""
        folder = self.out / "checkpoint"
        partial, complete = folder / f"step-{step}.partial", folder / f"step-{step}"
        if parallel.is_main():
            shutil.rmtree(partial, ignore_errors=True)
        if any(parallel.gather([complete.exists()])):
            return
        try:
            if parallel.several():
                sharding.save_checkpoint(partial, state)
            else:
                partial.mkdir(parents=True)
                with open(partial / "state.pt", "wb") as f:
                    torch.save(state, f)
                    f.flush()
                    os.fsync(f.fileno())
            files = parallel.local_items(sorted(partial.iterdir()))
            sums = sorted({*parallel.gather([f"{file_digest(path)}  {path.name}\n" for path in files])})
            if parallel.is_main():
                write(partial / SUMS, "".join(sums))
        except (OSError, RuntimeError) as error:
            if parallel.is_main():
                shutil.rmtree(partial, ignore_errors=True)
            raise OSError(f"no checkpoint of step {step} in {folder} ({error})") from None
        if parallel.is_main():
            os.rename(partial, complete)
            for other in folder.iterdir():
                if other != complete:
                    shutil.rmtree(other, ignore_errors=True)
        if parallel.several():
            dist.barrier()

    def load_checkpoint(self, **parts: Any) -> dict | None:
        """The newest complete checkpoint, or None. `parts`: the models and optimizers that are in it, by name, for
        which several processes cut it, whichever number of them wrote it.

        A checkpoint is tensors and plain values only; nothing in it is executed. BadInput if a file of it is damaged;
        checkpoints that were written before there were checksums have none.
        """
        folder = newest_checkpoint(self.out)
        if folder is None:
            return None
        self._require_undamaged(folder)
        by_one, path = None, folder / "state.pt"
        if path.exists():
            try:
                by_one = torch.load(path, map_location="cpu", weights_only=True)
            except Exception as error:  # damaged files raise almost anything
                raise BadInput(f"--resume: {path} is no checkpoint: {one_line(error)}") from None
            names = {"step", *(name for name, part in parts.items() if part is not None)}
            whole = isinstance(by_one, dict) and by_one.keys() >= names
            require(whole, f"--resume: {path} is no checkpoint of this script: begin anew in another --out")
            if not parallel.several():
                return by_one
        return sharding.load_checkpoint(folder, by_one, parts)

    def _require_undamaged(self, folder: Path) -> None:
        """BadInput, naming it, if a file of a checkpoint is not the one that was written."""
        main, sums = ".metadata" if (folder / ".metadata").exists() else "state.pt", {}
        if (folder / SUMS).exists():
            lines = (folder / SUMS).read_text("utf-8", "replace").splitlines()
            sums = {main: "", **{name: digest for digest, _, name in (line.partition("  ") for line in lines)}}
        names = parallel.local_items(sorted(sums))
        damaged = parallel.gather([name for name in names if file_digest(folder / name) != sums[name]])
        missing = [] if sums or (folder / main).exists() else [main]
        if bad := damaged + missing:
            raise BadInput(
                f"--resume: {folder / bad[0]} is damaged or missing (its SHA-256 is not the one in {SUMS}): bring back "
                "the file that was written, or begin anew in another --out"
            )

    def end_loop(self) -> None:
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
        """Draw curves.png if it has panels; write results.json, which makes the run complete. The checkpoint stays if
        the run can be extended."""
        if panels:
            report.curves(self.out, panels)
        if self.args.wandb:
            if panels:
                wandb.log({"curves": wandb.Image(str(self.out / "curves.png"))})
            wandb.summary.update(results)
            wandb.finish()
        write(self.out / "results.json", json.dumps(results, indent=1))
        if not hasattr(self.args, "max_steps"):
            shutil.rmtree(self.out / "checkpoint", ignore_errors=True)
        unlock(self.out)


def require_wandb() -> None:
    """BadInput unless Weights & Biases accepts this machine's login."""
    try:
        wandb.login()
    except Exception as error:  # no key, a wrong one, or no network
        problem = " ".join(str(error).split()).partition(". ")[0].rstrip(".")
        raise BadInput(f"--wandb: {problem}: run wandb login, or set WANDB_MODE=offline") from None


def keep_freed_memory() -> None:
    """From now on the C library keeps what is freed: a step on a CPU needs the same large blocks again and again, and
    fetching them from the system each time costs about a tenth of it. Does nothing where the library is not glibc."""
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(-3, 1 << 30)  # M_MMAP_THRESHOLD
        libc.mallopt(-1, (1 << 31) - 1)  # M_TRIM_THRESHOLD


def has_a_step(out: Path) -> bool:
    """Whether a step of the run in a directory is in its log, or in a checkpoint, or has made a model."""
    log, made = out / LOGS[0], newest_checkpoint(out) or (out / "config.json").exists()
    return bool(made) or log.exists() and any(row["step"] for row in read_json_lines(log, "step"))


def newest_checkpoint(out: Path) -> Path | None:
    """The folder of a run's newest checkpoint that has its main file; of the newest one if none has."""
    folders = [path for path in out.glob("checkpoint/step-*") if path.name[5:].isdigit()]
    complete = [path for path in folders if any((path / name).exists() for name in ("state.pt", ".metadata"))]
    return max(complete or folders, key=lambda path: int(path.name[5:]), default=None)


def file_digest(path: Path) -> str:
    """SHA-256 of a file; "" if it cannot be read."""
    try:
        with open(path, "rb") as f:
            return hashlib.file_digest(f, "sha256").hexdigest()
    except (OSError, ValueError):  # a damaged name may hold a NUL
        return ""


def rows_digest(examples: Sequence) -> str:
    """SHA-256 of examples: of their tokens, what is said of them, and their rows, which a reward function may read."""
    digest = hashlib.sha256()
    for e in examples:
        judged = [e.ranks, e.labels, e.margin, e.probability, e.rewards, e.noise]
        parts = [e.prompt, e.responses, e.trained, judged, e.row]
        digest.update(json.dumps(parts, default=lambda x: hashlib.sha256(pickle.dumps(x)).hexdigest()).encode())
    return digest.hexdigest()


def write(path: Path, text: str) -> None:
    """Replace a file by another, whole or not at all."""
    partial = path.with_name(path.name + ".partial")
    with open(partial, "w", encoding="utf-8") as f:
        f.write(text)
        f.flush()
        os.fsync(f.fileno())
    os.replace(partial, path)


def processor() -> str:
    """The processor's name where the system says it, else its family."""
    info = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    name = re.search(r"model name\s*: (.*)", info)
    return name[1] if name else platform.processor() or platform.machine()


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
