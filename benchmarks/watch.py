"""Watching a training loop from outside, ours or TRL's: time and memory of its steps, log-probs, gradient norms."""

import contextlib
import ctypes
import time
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import torch
import transformers

from benchmarks.compare import key
from support.runs import Run


class Done(Exception):
    """What is measured is over, and the rest of a script need not run."""


def _status(field: str) -> float:
    """A field of /proc/self/status in MiB."""
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(field)) / 1024


def on_gpu(device: str | torch.device) -> bool:
    return torch.device(device).type == "cuda"


def wait(device: str | torch.device) -> None:
    """Until the device has done what it was given, so that the clock can be read."""
    if on_gpu(device):
        torch.cuda.synchronize()


def forget_peak(device: str | torch.device = "cpu") -> float:
    """Begin a new peak of memory (resident, or on a GPU allocated), and give freed memory back; MiB in use now."""
    if on_gpu(device):
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated() / 2**20
    with contextlib.suppress(OSError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    return _status("VmRSS")


def peak(device: str | torch.device = "cpu") -> float:
    """Largest memory in use since `forget_peak`, MiB."""
    return torch.cuda.max_memory_allocated() / 2**20 if on_gpu(device) else _status("VmHWM")


def read_weights(*models) -> None:
    """Weights are read from their file when first used: use them."""
    for model in models:
        sum(float(x.detach().sum()) for x in model.parameters())


def matrix_rate(model, device: str = "cpu", dtype: torch.dtype = torch.float32, seconds: float = 4.0) -> float:
    """Floating-point operations a second of the model's own matrix products (each weight's three: output, gradient of
    the input, gradient of the weight) on 2,048 tokens, on a GPU 8,192, timed alone: what a step cannot exceed."""
    rows, repeats = (8192, 10) if on_gpu(device) else (2048, 1)
    shapes = {tuple(x.shape) for x in model.parameters() if x.ndim == 2}
    work = spent = 0.0
    for out_size, in_size in shapes:
        sizes = [(rows, in_size), (out_size, in_size), (rows, out_size)]
        x, w, y = (torch.randn(size, device=device, dtype=dtype) for size in sizes)
        dx, dw = torch.empty_like(x), torch.empty_like(w)
        times, began = [], time.perf_counter()
        while not times or time.perf_counter() - began < seconds / len(shapes):
            wait(device)
            start = time.perf_counter()
            for _ in range(repeats):
                torch.mm(x, w.T, out=y)
                torch.mm(y, w, out=dx)
                torch.mm(y.T, x, out=dw)
            wait(device)
            times.append((time.perf_counter() - start) / repeats)
        count = sum(tuple(p.shape) == (out_size, in_size) for p in model.parameters())
        work, spent = work + count * 6 * rows * out_size * in_size, spent + count * min(times)
    return work / spent


class Steps:
    """Of each optimizer step (of PPO: rollout) the seconds of the clock and of the processor, and the gradient norm
    before clipping; log-probs of the first one's sequences, by their tokens; peak memory over the loaded weights, MiB.
    """

    def __init__(self, device: str | torch.device = "cpu"):
        self.found = {"seconds": [], "cpu": [], "norms": [], "logps": {}, "peak": 0.0}
        self.device, self.resident = device, forget_peak(device)

    def begin(self) -> None:
        wait(self.device)
        self.began, self.cpu = time.perf_counter(), time.process_time()

    def end(self) -> None:
        wait(self.device)
        self.found["seconds"].append(time.perf_counter() - self.began)
        self.found["cpu"].append(time.process_time() - self.cpu)
        self.found["peak"] = peak(self.device) - self.resident
        self.begin()

    def first(self) -> bool:
        return not self.found["seconds"]


@contextlib.contextmanager
def script() -> Iterator[dict]:
    """A script's `main` under watch: its Run saves and logs nothing, and after the last step nothing more is done."""
    watched: dict = {}

    def start(run, *_):
        watched["steps"] = Steps(run.args.device)
        watched["steps"].begin()

    def log(run, step, metrics):
        if step:
            watched["steps"].end()
            watched["steps"].found["norms"].append(metrics["grad_norm"])

    def end(run):
        raise Done

    nothing = lambda *_, **__: None  # noqa: E731
    hooks = {"start": start, "log": log, "end": end, "progress": nothing, "save_checkpoint": nothing}
    with mock.patch.multiple(Run, **hooks), contextlib.suppress(Done):
        yield watched


def settings(job: dict, weights: str = "float32") -> dict:
    """What every trainer of TRL is given: the job's device and dtype of products, weights in float32 or in `weights`;
    nothing is logged, saved or shown."""
    return {
        "bf16": job["dtype"] == "bfloat16", "use_cpu": not on_gpu(job["device"]), "num_train_epochs": job["epochs"],
        "model_init_kwargs": {"dtype": weights if job["dtype"] == "bfloat16" else "float32"}, "max_length": None,
        "report_to": "none", "logging_strategy": "no", "save_strategy": "no", "disable_tqdm": True,
    }  # fmt: skip


def trainer(own) -> dict:
    """What happens while this trainer of transformers trains, as `Steps` has it."""
    watched: dict = {}

    class Watch(transformers.TrainerCallback):
        def on_train_begin(self, *_, **__):
            read_weights(*filter(None, (own.model, getattr(own, "ref_model", None))))
            watched["steps"] = Steps(own.args.device)

        def on_step_begin(self, *_, **__):
            watched["steps"].begin()

        def on_step_end(self, *_, **__):
            watched["steps"].end()

    def keep_logps(model, args, kwargs, out):
        if not (torch.is_grad_enabled() and watched["steps"].first()):
            return
        ids, logps = kwargs["input_ids"], out.log_probs.detach().double()
        if "attention_mask" in kwargs:
            rows = [row[mask.bool()] for row, mask in zip(ids, kwargs["attention_mask"], strict=True)]
        else:  # all in one row, a sequence from one position 0 to the next
            starts = (kwargs["position_ids"][0] == 0).nonzero()[1:, 0].tolist()
            rows, logps = ids[0].tensor_split(starts), logps[0].tensor_split(starts)
        for row, own in zip(rows, logps, strict=True):
            watched["steps"].found["logps"][key(row.tolist())] = own.sum().item()

    def clip(*args, _clip=own.accelerator.clip_grad_norm_, **kwargs):
        norm = _clip(*args, **kwargs)
        watched["steps"].found["norms"].append(float(norm))
        return norm

    own.add_callback(Watch())
    own.model.register_forward_hook(keep_logps, with_kwargs=True)
    own.accelerator.clip_grad_norm_ = clip
    own.train()
    return watched["steps"].found
