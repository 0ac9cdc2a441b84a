"""How the cost of a training step grows: forward and backward of train_dpo.py's scoring, one size at a time.

    python -m benchmarks.scaling [--quick]

From a base (9 M parameters, a prompt of 128 tokens with 4 responses of 64) one size doubles twice: tokens of prompt and
responses, responses, vocabulary, width, layers. The slope is that of log time over log size, by least squares: 1 is
linear, below 1 is shared work. `k, padded` is what more responses cost where each has the prompt to itself.
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
GROWS = {  # what doubles
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
    """steps that are timed at each size; the fastest counts"""
    quick: bool = False
    """sizes that are a quarter, two steps each"""


def seconds(size: dict[str, int], layout: str, repeats: int) -> float:
    """Of a forward and backward pass over one prompt with its responses."""
    rng = random.Random(0)
    with tempfile.TemporaryDirectory() as folder:
        name = compare.small_model(folder, size["layers"], size["width"], size["vocabulary"])
        model = models.load_model(name, "cpu")
        ids = [compare.random_ids(name, rng, n) for n in (size["prompt"], *[size["response"]] * size["k"])]
    example = Example("", ids[0], ids[1:], "", [""] * size["k"], [1] * size["k"], None, None, None, 1.0, {})
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
    for what, names in GROWS.items():
        layout, factors = "padded" if "padded" in what else "tree", (1, 2, 4)
        sizes = [base | {name: base[name] * factor for name in names} for factor in factors]
        times = [seconds(size, layout, 2 if a.quick else a.repeats) for size in sizes]
        shown = "/".join(str(size[names[0]]) for size in sizes)
        cells = {f"ms at {factor}x": 1000 * t for factor, t in zip(factors, times, strict=True)}
        rows.append({"what grows": what, "sizes": shown, **cells, "slope": slope([*factors], times)})
    compare.report("scaling", rows, a.quick)


if __name__ == "__main__":
    compare.cli(main, Args, {})
