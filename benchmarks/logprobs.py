"""The kernel: `rlhf.logprobs.token_logps` against other ways from hidden states to log-probs, forward and backward.

    python -m benchmarks.logprobs [--device cuda --n 8192 --d 4096 --v 151936 --dtypes bfloat16] [--quick]

    ours               keeps the softmax between the passes
    ours, recompute    makes it again: no more than tiles are held
    naive              float32 logits, log_softmax, gather
    trl                TRL's chunked function
    trl, as in DPO     the same with the metrics that DPOTrainer asks of it
    torch              F.linear_cross_entropy, 256 rows a chunk (with its automatic chunks it takes many times longer)

Each in processes of its own, in turn. Peak: memory over what inputs hold, so the gradients are in it. Errors are those
against float64 on the very same inputs: root mean square over tokens, and relative for the gradients.
"""

import time
from dataclasses import dataclass

import torch
from torch.nn.functional import linear_cross_entropy

from benchmarks import compare, watch
from rlhf.logprobs import Head, token_logps


def trl(hidden, weight, targets, outputs: tuple[str, ...] = ()):
    from trl.kernels.chunked_logprob import ChunkedLogProbFunction
    from trl.trainer.utils import _CHUNKED_LOGPROB_CHUNK_SIZE

    return ChunkedLogProbFunction.apply(
        hidden, weight, None, targets, 1.0, _CHUNKED_LOGPROB_CHUNK_SIZE, None, 1.0, ("log_probs", *outputs)
    )[0]


def torch_own(hidden, weight, targets):
    options = torch.nn.LinearCrossEntropyOptions(batch_chunk_size=256, chunking_method=None)
    return -linear_cross_entropy(hidden, weight, targets, reduction="none", options=options)


WAYS = {
    "ours": lambda h, w, t: token_logps(h, Head(w), t)[0],
    "ours, recompute": lambda h, w, t: token_logps(h, Head(w), t, keep_bytes=0)[0],
    "naive": lambda h, w, t: (h @ w.T).float().log_softmax(-1).gather(1, t[:, None])[:, 0],
    "trl": trl,
    "trl, as in DPO": lambda h, w, t: trl(h, w, t, ("entropy", "mean_logits", "is_top1")),
    "torch": torch_own,
}


@dataclass
class Args:
    n: int = 512
    """tokens"""
    d: int = 576
    """hidden size"""
    v: int = 49152
    """vocabulary"""
    dtypes: tuple[str, ...] = ("float32", "bfloat16")
    """of hidden states and weight"""
    device: str = "cpu"
    """torch device"""
    rounds: int = 3
    """processes of each way"""
    quick: bool = False
    """a short run"""


def worker(way: str, job: dict) -> dict:
    cuda = job["device"] != "cpu"
    torch.manual_seed(0)
    hidden, weight = torch.randn(job["n"], job["d"]), torch.randn(job["v"], job["d"]) * 3 / job["d"] ** 0.5
    dtype = getattr(torch, job["dtype"])
    h, w = (x.to(job["device"], dtype).requires_grad_() for x in (hidden, weight))
    targets = torch.randint(job["v"], (job["n"],), device=job["device"])
    upstream = torch.randn(job["n"], device=job["device"])

    def run():
        h.grad = w.grad = None
        logps = WAYS[way](h, w, targets)
        logps.backward(upstream.to(logps.dtype))
        return logps.detach()

    run()
    h.grad = w.grad = None
    before = torch.cuda.memory_allocated() if cuda else watch.forget_peak()
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    times = []
    for _ in range(job["repeats"]):
        began = time.perf_counter()
        logps = run()
        if cuda:
            torch.cuda.synchronize()
        times.append(time.perf_counter() - began)
    peak = (torch.cuda.max_memory_allocated() - before) / 2**20 if cuda else watch.peak() - before

    h64, w64 = (x.detach().double().requires_grad_() for x in (h, w))
    exact = (h64 @ w64.T).log_softmax(-1).gather(1, targets[:, None])[:, 0]
    exact.backward(upstream.double())
    off = lambda x, y: ((x.double() - y).norm() / y.norm()).item()  # noqa: E731
    return {
        "ms": 1000 * min(times),
        "peak": peak,
        "error": (logps.double() - exact.detach()).square().mean().sqrt().item(),
        "gradient error": max(off(h.grad, h64.grad), off(w.grad, w64.grad)),
    }


def main(a: Args) -> None:
    if a.quick:
        a.n, a.d, a.v, a.rounds = 128, 64, 4096, 1
    rows = []
    for dtype in a.dtypes:
        job = {"n": a.n, "d": a.d, "v": a.v, "dtype": dtype, "device": a.device, "repeats": 3 if a.quick else 5}
        found = compare.in_turn("logprobs", [*WAYS], job, a.rounds)
        for way, runs in found.items():
            limit = 1e-4 if dtype == "float32" else 0.1
            compare.require_parity(f"log-probs of {way} and float64", runs[0]["error"], limit)
        ours = compare.median(found["ours"], "ms")
        for way, runs in found.items():
            facts = {name: compare.median(runs, name) for name in ("ms", "peak", "error", "gradient error")}
            rows.append({"dtype": dtype, "way": way, **facts, "time / ours": facts["ms"] / ours})
    compare.report("logprobs", rows, a.quick)


if __name__ == "__main__":
    compare.cli(main, Args, {way: lambda job, way=way: worker(way, job) for way in WAYS})
