"""Print the GiB that DPO takes on each GPU, from 0.5B to 70B. Nothing is measured: it is the arithmetic of `--dry-run`.

    python -m benchmarks.fits

A step has 64 pairs with the lengths of UltraFeedback (dpo_step.py), with --dtype bfloat16 and the flags in the table.
"Fits" are the GPUs of which the peak takes at most 95 %.
"""

from collections.abc import Sequence

from benchmarks import gpu, shapes
from rlhf import tree
from support import memory
from support.dryrun import FULL, GIB
from support.examples import Example
from support.memory import Plan
from support.report import table

DEVICES = {"24 GB": 24e9, "80 GB": 80e9, "141 GB": 141e9}
PLAIN, CHECKPOINTED = Plan("bfloat16", on_gpu=True), Plan("bfloat16", gradient_checkpointing=True, on_gpu=True)
EIGHT_BIT = CHECKPOINTED._replace(gradient_dtype="bfloat16", optimizer_state="8bit")
ADAPTERS = CHECKPOINTED._replace(lora_rank=16)
CASES = [  # shape, tokens of a micro-batch, flags
    *[(shape, 16384, PLAIN) for shape in ("0.5B", "1.5B")],
    *[(shape, 8192, plan) for shape in ("0.5B", "1.5B", "7B", "8B") for plan in (CHECKPOINTED, EIGHT_BIT, ADAPTERS)],
    *[("8B", 8192, CHECKPOINTED._replace(processes=n)) for n in (4, 8)],
    *[("70B", 8192, CHECKPOINTED._replace(processes=n)) for n in (16, 32, 64)],
    *[("70B", 8192, ADAPTERS._replace(processes=n)) for n in (4, 8)],
]


def example(row: dict) -> Example:
    """An example with a row's tokens and no texts."""
    k = len(row["responses"])
    return Example("", row["prompt"], row["responses"], "", [""] * k, [*range(1, k + 1)])


def parts(
    shape: str, rows: Sequence[dict], batch: int, budget: int, plan: Plan, layout: str = "tree"
) -> dict[str, float]:
    """`memory.estimate` of a shape from benchmarks/shapes.py, in steps of `batch` rows over all processes."""
    examples = [example(row) for row in rows]
    shares = [examples[i : i + batch : plan.processes] for i in range(0, len(examples), batch)]
    groups = [[[share[i] for i in group] for group in tree.micro_batches(share, budget, layout)] for share in shares]
    largest = max((group for step in groups for group in step), key=lambda group: memory.measure(group, layout)[0])
    sizes = [[memory.measure(group, layout) for group in step] for step in groups]
    return memory.estimate(memory.trace(shapes.config_of(shape), largest, plan, layout), sizes, plan)


def flags_of(plan: Plan) -> str:
    """The flags of a plan beside --dtype bfloat16."""
    named = {name: getattr(plan, name) for name in ("optimizer_state", "gradient_dtype", "lora_rank")}
    flags = ["--gradient-checkpointing"] if plan.gradient_checkpointing else []
    flags += [f"--{name.replace('_', '-')} {x}" for name, x in named.items() if x != Plan._field_defaults[name]]
    return " ".join(flags)


def main() -> None:
    rows = gpu.rows_of("0.5B", "ultrafeedback", 64)
    shown, lines = ["weights", "low bits", "gradients", "optimizer", "gathered", "activations", "logits", "peak"], []
    for shape, budget, plan in CASES:
        sizes = parts(shape, rows, 64, budget, plan)
        fits = ", ".join(name for name, size in DEVICES.items() if sizes["peak"] <= FULL * size) or "none"
        cells = [f"{sizes[name] / GIB:.1f}" for name in shown]
        lines.append([shape, str(plan.processes), str(budget), *cells, fits, flags_of(plan)])
    print(table(["model", "devices", "tokens", *shown, "fits", "flags"], lines))


if __name__ == "__main__":
    main()
