"""Watch a training loop, ours or TRL's, from outside: time and memory of its steps, log-probs, gradient norms."""

import contextlib
import ctypes
import gc
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest import mock

import torch
import transformers

from benchmarks.compare import key
from support.runs import Run


class Done(Exception):
    """Raised to end a script once everything is measured."""


def _status(field: str) -> float:
    """A field of /proc/self/status, in MiB."""
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(field)) / 1024


def on_gpu(device: str | torch.device) -> bool:
    return torch.device(device).type == "cuda"


def wait(device: str | torch.device) -> None:
    """Wait until the device has finished its work, so that the clock can be read."""
    if on_gpu(device):
        torch.cuda.synchronize()


def forget_peak(device: str | torch.device = "cpu") -> float:
    """Reset the memory peak; returns the MiB in use: allocated on a GPU, or resident once freed memory is returned."""
    if on_gpu(device):
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated() / 2**20
    with contextlib.suppress(OSError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    return _status("VmRSS")


def peak(device: str | torch.device = "cpu") -> float:
    """Peak of the memory in use since `forget_peak`, in MiB."""
    return torch.cuda.max_memory_allocated() / 2**20 if on_gpu(device) else _status("VmHWM")


def reserved(device: str | torch.device = "cpu") -> float:
    """Most memory that PyTorch reserved on the GPU since `forget_peak`, in MiB; on a CPU the same as `peak`."""
    return torch.cuda.max_memory_reserved() / 2**20 if on_gpu(device) else peak(device)


def free_cache(device: str | torch.device = "cpu") -> None:
    """Give what nothing uses any more back to the GPU, and reset its peaks."""
    gc.collect()
    if on_gpu(device):
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


@contextlib.contextmanager
def host_reads(device: str | torch.device) -> Iterator[Callable[[], int]]:
    """Count how often the host waits for the device inside, as it does to read a value: gives a function that returns
    the count afterwards. On a CPU nothing waits, and the reads of single values are counted."""
    if not on_gpu(device):
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
            yield lambda: sum(x.count for x in profiler.key_averages() if x.key == "aten::_local_scalar_dense")
        return
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield lambda: sum("called a synchronizing" in str(warning.message) for warning in caught)
        finally:
            torch.cuda.set_sync_debug_mode("default")


def graphs() -> int:
    """Number of graphs that torch.compile has made in this process."""
    dynamo = sys.modules.get("torch._dynamo.utils")
    return dynamo.counters["stats"]["unique_graphs"] if dynamo else 0


def read_weights(*models) -> None:
    """Use all weights once, because they are not read from their file before their first use."""
    for model in models:
        sum(float(x.detach().sum()) for x in model.parameters())


def matrix_rate(model, device: str = "cpu", dtype: torch.dtype = torch.float32, seconds: float = 4.0) -> float:
    """Floating-point operations per second of the model's matrix products alone, an upper bound for a step. Each weight
    has three (output, gradient of the input, gradient of the weight), here with 2,048 tokens, or 8,192 on a GPU."""
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
    """Results for each optimizer step (train_ppo.py: for each rollout): wall and CPU seconds, the gradient norm before
    clipping, and the graphs that torch.compile has made since the start. Also the log-prob of each sequence in the
    first step, and of memory, in MiB, the most allocated, the same above what was in use at the start, and the most
    reserved. If a step is `counted` (0 is the first), its `host_reads` are counted, which makes it slower."""

    def __init__(self, device: str | torch.device = "cpu", counted: int | None = None):
        self.results = {"seconds": [], "cpu": [], "norms": [], "graphs": [], "logps": {}, "peak": 0.0}
        self.counted, self.counting, self.reads = counted, contextlib.ExitStack(), None
        self.device, self.reserved_before, self.graphs_before = device, reserved(device), graphs()
        self.resident = forget_peak(device)

    def begin(self) -> None:
        if self.counted == len(self.results["seconds"]):
            self.counted, self.reads = None, self.counting.enter_context(host_reads(self.device))
        wait(self.device)
        self.began, self.cpu = time.perf_counter(), time.process_time()

    def end(self) -> None:
        wait(self.device)
        self.results["seconds"].append(time.perf_counter() - self.began)
        self.results["cpu"].append(time.process_time() - self.cpu)
        self.results["graphs"].append(graphs() - self.graphs_before)
        self.results["allocated"] = peak(self.device)
        self.results["peak"] = self.results["allocated"] - self.resident
        self.results["reserved"] = max(self.reserved_before, reserved(self.device))
        if self.reads:
            self.counting.close()
            self.results["reads"], self.reads = self.reads(), None
        self.begin()

    def first(self) -> bool:
        return not self.results["seconds"]


@contextlib.contextmanager
def script(counted: int | None = None) -> Iterator[dict]:
    """Watch a script's `main`. Its Run saves and logs nothing, and the script ends after its last step. `counted` as in
    `Steps`."""
    watched: dict = {}

    def start(run, *_):
        watched["steps"] = Steps(run.args.device, counted)
        watched["steps"].begin()

    def log(run, step, metrics):
        if step:
            watched["steps"].end()
            watched["steps"].results["norms"].append(metrics["grad_norm"])

    def end(run):
        raise Done

    nothing = lambda *_, **__: None  # noqa: E731
    hooks = {"begin_loop": start, "log": log, "end_loop": end, "progress": nothing, "save_checkpoint": nothing}
    with mock.patch.multiple(Run, **hooks), contextlib.suppress(Done):
        yield watched


def settings(job: dict, weights: str = "float32") -> dict:
    """Settings of every TRL trainer: the job's device, epochs and dtype of products. Weights are float32, or `weights`
    if the products are bfloat16. Nothing is logged, saved or shown."""
    return {
        "bf16": job["dtype"] == "bfloat16", "use_cpu": not on_gpu(job["device"]), "num_train_epochs": job["epochs"],
        "model_init_kwargs": {"dtype": weights if job["dtype"] == "bfloat16" else "float32"}, "max_length": None,
        "report_to": "none", "logging_strategy": "no", "save_strategy": "no", "disable_tqdm": True,
    }  # fmt: skip


def trainer(trl_trainer, counted: int | None = None) -> dict:
    """Run the training of a TRL trainer, and return its results as in `Steps`."""
    watched: dict = {}

    class Watch(transformers.TrainerCallback):
        def on_train_begin(self, *_, **__):
            read_weights(*filter(None, (trl_trainer.model, getattr(trl_trainer, "ref_model", None))))
            watched["steps"] = Steps(trl_trainer.args.device, counted)

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
        else:  # packed into one row, in which each sequence starts at position 0
            starts = (kwargs["position_ids"][0] == 0).nonzero()[1:, 0].tolist()
            rows, logps = ids[0].tensor_split(starts), logps[0].tensor_split(starts)
        for row, row_logps in zip(rows, logps, strict=True):
            watched["steps"].results["logps"][key(row.tolist())] = row_logps.sum().item()

    def clip(*args, _clip=trl_trainer.accelerator.clip_grad_norm_, **kwargs):
        norm = _clip(*args, **kwargs)
        watched["steps"].results["norms"].append(float(norm))
        return norm

    trl_trainer.add_callback(Watch())
    trl_trainer.model.register_forward_hook(keep_logps, with_kwargs=True)
    trl_trainer.accelerator.clip_grad_norm_ = clip
    trl_trainer.train()
    return watched["steps"].results
