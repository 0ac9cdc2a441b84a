"""Time the kernel `rlhf.logprobs.token_logps` and other ways from hidden states to log-probs, forward and backward.

    python -m benchmarks.logprobs [--device cuda --n 8192 --d 4096 --v 151936 --dtypes bfloat16] [--quick]

    ours               keeps the softmax for the backward pass, whatever its size
    ours, recompute    recomputes it, and never holds more than tiles
    naive              float32 logits, log_softmax, gather
    trl                TRL's chunked function
    trl, as in DPO     the same with the metrics that DPOTrainer requests
    torch              F.linear_cross_entropy in chunks of 256 rows, on a GPU 2,048 (its automatic chunks take many
                       times longer)
    liger              liger-kernel's fused linear cross entropy, reduction "none"; on a GPU in bfloat16 only
    liger, scaled      its per-token kernel for Hopper; on a GPU in bfloat16 only
    cce                cut-cross-entropy, reduction "none", without gradients below rounding; on a GPU in bfloat16 only

The ways take turns, each in its own processes; a way that cannot run here is skipped, and a line says why. Peak is the
memory above the inputs, gradients included; "extra" is without gradients. Errors are those against float64 on the same
inputs: the root mean square over tokens for log-probs, and relative for gradients.
"""

import importlib.util
import time
from dataclasses import dataclass

import torch

from benchmarks import compare, watch
from rlhf.logprobs import Head, token_logps


def trl(hidden, weight, targets, outputs: tuple[str, ...] = ()):
    from trl.kernels.chunked_logprob import ChunkedLogProbFunction
    from trl.trainer.utils import _CHUNKED_LOGPROB_CHUNK_SIZE

    return ChunkedLogProbFunction.apply(
        hidden, weight, None, targets, 1.0, _CHUNKED_LOGPROB_CHUNK_SIZE, None, 1.0, ("log_probs", *outputs)
    )[0]


def torch_own(hidden, weight, targets):
    rows = 2048 if hidden.is_cuda else 256
    options = torch.nn.LinearCrossEntropyOptions(batch_chunk_size=rows, chunking_method=None)
    return -torch.nn.functional.linear_cross_entropy(hidden, weight, targets, reduction="none", options=options)


def liger(hidden, weight, targets):
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    return -liger_fused_linear_cross_entropy(hidden, weight, targets, reduction="none")


def liger_scaled(hidden, weight, targets):
    from liger_kernel.ops import LigerFusedLinearScaledCrossEntropyFunction

    return -LigerFusedLinearScaledCrossEntropyFunction.apply(hidden, weight, targets)


def cce(hidden, weight, targets):
    from cut_cross_entropy import linear_cross_entropy

    return -linear_cross_entropy(hidden, weight, targets, reduction="none")


WAYS = {
    "ours": lambda h, w, t: token_logps(h, Head(w), t, keep_bytes=1 << 40)[0],
    "ours, recompute": lambda h, w, t: token_logps(h, Head(w), t, keep_bytes=0)[0],
    "naive": lambda h, w, t: (h @ w.T).float().log_softmax(-1).gather(1, t[:, None])[:, 0],
    "trl": trl,
    "trl, as in DPO": lambda h, w, t: trl(h, w, t, ("entropy", "mean_logits", "is_top1")),
    "torch": torch_own,
    "liger": liger,
    "liger, scaled": liger_scaled,
    "cce": cce,
}
PACKAGES = {  # required by each way
    "trl": ["trl"], "trl, as in DPO": ["trl"], "liger": ["liger_kernel"], "cce": ["cut_cross_entropy"],
    "liger, scaled": ["liger_kernel", "cutlass"],
}  # fmt: skip
NUMBERS = ("ms", "peak MiB", "extra MiB", "error", "gradient error")
HALF_ON_GPU = {"liger", "liger, scaled", "cce"}


@dataclass
class Args:
    n: int = 512
    """tokens"""
    d: int = 576
    """hidden size"""
    v: int = 49152
    """vocabulary"""
    dtypes: tuple[str, ...] = ("float32", "bfloat16")
    """dtypes of the hidden states and the weight"""
    device: str = "cpu"
    """torch device"""
    others: tuple[str, ...] = tuple(WAYS)[1:]
    """ways to measure besides ours"""
    rounds: int = 3
    """number of processes per way"""
    quick: bool = False
    """a short run"""


def hindrance(way: str, device: str, dtype: str) -> str | None:
    """Why a way cannot be measured here; None if it can."""
    if missing := [name for name in PACKAGES.get(way, ()) if importlib.util.find_spec(name) is None]:
        return f"{' and '.join(missing)} not installed"
    if way in HALF_ON_GPU and not (watch.on_gpu(device) and dtype == "bfloat16"):
        return "it is for a GPU, in bfloat16"
    if way == "torch" and not hasattr(torch.nn, "LinearCrossEntropyOptions"):
        return f"torch {torch.__version__} has none"
    return None


def worker(way: str, job: dict) -> dict:
    device = job["device"]
    torch.manual_seed(0)
    hidden, weight = torch.randn(job["n"], job["d"]), torch.randn(job["v"], job["d"]) * 3 / job["d"] ** 0.5
    dtype = getattr(torch, job["dtype"])
    h, w = (x.to(device, dtype).requires_grad_() for x in (hidden, weight))
    targets = torch.randint(job["v"], (job["n"],), device=device)
    upstream = torch.randn(job["n"], device=device)

    def run():
        h.grad = w.grad = None
        logps = WAYS[way](h, w, targets)
        logps.backward(upstream.to(logps.dtype))
        return logps.detach()

    run()
    h.grad = w.grad = None
    watch.wait(device)
    before, times = watch.forget_peak(device), []
    for _ in range(job["repeats"]):
        began = time.perf_counter()
        logps = run()
        watch.wait(device)
        times.append(time.perf_counter() - began)
    peak = watch.peak(device) - before

    h64, w64 = (x.detach().double().requires_grad_() for x in (h, w))
    exact = (h64 @ w64.T).log_softmax(-1).gather(1, targets[:, None])[:, 0]
    exact.backward(upstream.double())
    relative_error = lambda x, y: ((x.double() - y).norm() / y.norm()).item()  # noqa: E731
    return {
        "ms": 1000 * min(times),
        "peak MiB": peak,
        "extra MiB": peak - (h.numel() + w.numel()) * dtype.itemsize / 2**20,
        "error": (logps.double() - exact.detach()).square().mean().sqrt().item(),
        "gradient error": max(relative_error(h.grad, h64.grad), relative_error(w.grad, w64.grad)),
    }


def main(a: Args) -> None:
    if a.quick:
        a.n, a.d, a.v, a.rounds = 128, 64, 4096, 1
    rows = []
    for dtype in a.dtypes:
        job = {"n": a.n, "d": a.d, "v": a.v, "dtype": dtype, "device": a.device, "repeats": 3 if a.quick else 5}
        hindrances = {way: hindrance(way, a.device, dtype) for way in ("ours", *a.others)}
        for way in filter(hindrances.get, hindrances):
            print(f"{dtype}: {way} is left out: {hindrances[way]}")
        results = compare.in_turn("logprobs", [way for way in hindrances if not hindrances[way]], job, a.rounds)
        for way, runs in results.items():
            limit = 1e-4 if dtype == "float32" else 0.1
            compare.require_parity(f"log-probs of {way} and float64", runs[0]["error"], limit)
        ours = compare.median(results["ours"], "ms")
        for way, runs in results.items():
            medians = {name: compare.median(runs, name) for name in NUMBERS}
            rows.append({"dtype": dtype, "way": way, **medians, "time / ours": medians["ms"] / ours})
    compare.report("logprobs", rows, a.quick, a.device)


if __name__ == "__main__":
    compare.cli(main, Args, {way: lambda job, way=way: worker(way, job) for way in WAYS})
