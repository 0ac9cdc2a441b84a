"""Measure how the cost of a training step grows: forward and backward of train_dpo.py's scoring, one size at a time.

    python -m benchmarks.scaling [--quick]

The base has 9 M parameters and a prompt of 128 tokens with 4 responses of 64. One size at a time doubles twice: tokens
of prompt and responses, responses, vocabulary, width, layers. The slope of log time over log size, by least squares, is
1 for linear growth and below 1 if work is shared. `k, padded` adds responses that each have a copy of the prompt.
"""

import math
import random
import tempfile
import time
from dataclasses import dataclass

import torch

from benchmarks import compare
from rlhf.tree import collate
from support import models, scoring
from support.examples import Example

BASE = {"prompt": 128, "response": 64, "k": 4, "vocabulary": 16384, "width": 256, "layers": 6}
GROWS = {  # sizes that are doubled together
    "length": ("prompt", "response"),
    "k": ("k",),
    "k, padded": ("k",),
    "vocabulary": ("vocabulary",),
    "width": ("width",),
    "layers": ("layers",),
}


@dataclass
class Args:
    repeats: int = 5
    """timed steps at each size; the fastest counts"""
    quick: bool = False
    """a quarter of each size, two steps each"""


def seconds(size: dict[str, int], layout: str, repeats: int) -> float:
    """Seconds of the fastest forward and backward pass over one prompt with its responses."""
    rng = random.Random(0)
    with tempfile.TemporaryDirectory() as folder:
        name = compare.small_model(folder, size["layers"], size["width"], size["vocabulary"])
        model = models.load_model(name, "cpu")
        ids = [compare.random_ids(name, rng, n) for n in (size["prompt"], *[size["response"]] * size["k"])]
    example = Example("", ids[0], ids[1:], "", [""] * size["k"], [1] * size["k"])
    batch, times = collate([example], layout, 0, "cpu"), []
    for _ in range(repeats + 1):
        began = time.perf_counter()
        scoring.response_logps(model, batch)[0].sum().backward()
        times.append(time.perf_counter() - began)
        model.zero_grad(set_to_none=False)
    return min(times[1:])


def slope(sizes: list[int], times: list[float]) -> float:
    """Least-squares slope of log time over log size."""
    x, y = (torch.tensor([math.log(v) for v in values]) for values in (sizes, times))
    return ((x - x.mean()) @ (y - y.mean()) / ((x - x.mean()) ** 2).sum()).item()


def main(a: Args) -> None:
    base = {name: max(size // 4, 1) if name != "layers" else 2 for name, size in BASE.items()} if a.quick else BASE
    rows = []
    for row, names in GROWS.items():
        layout, factors = "padded" if "padded" in row else "tree", (1, 2, 4)
        sizes = [base | {name: base[name] * factor for name in names} for factor in factors]
        times = [seconds(size, layout, 2 if a.quick else a.repeats) for size in sizes]
        size_text = "/".join(str(size[names[0]]) for size in sizes)
        cells = {f"ms at {factor}x": 1000 * t for factor, t in zip(factors, times, strict=True)}
        rows.append({"what grows": row, "sizes": size_text, **cells, "slope": slope([*factors], times)})
    compare.report("scaling", rows, a.quick)


if __name__ == "__main__":
    compare.cli(main, Args, {})
