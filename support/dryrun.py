"""What `--dry-run` answers: whether the training fits and how long it takes, before any weight is loaded."""

import math
import os
import random
import warnings
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from rlhf import BadInput
from support import memory, models, parallel, reviews, runs
from support.examples import Example
from support.memory import Plan
from support.report import table
from support.rewards import names_function

GIB, CARD = 2**30, 80e9  # bytes; CARD is the memory of a common GPU: a dry run on a CPU also says whether it would fit
FULL = 0.95  # share of a device's memory that a step may take; the rest is for the allocator's gaps, CUDA, the system
RATES = {"bfloat16": 200e12, "float32": 30e12}  # operations per second, assumed for a GPU
CPU_RATE = 40e9  # of a thread: steps of SmolLM2-135M in float32 reached 77e9 with 2 threads of an AMD EPYC
EIGHT_BIT, CHECKPOINTED = {"optimizer_state": "8bit"}, {"gradient_checkpointing": True}
SAVING = {  # rows of the table, and what they change
    "--gradient-checkpointing": CHECKPOINTED,
    "--optimizer-state 8bit": EIGHT_BIT,
    "--lora-rank 16": {"lora_rank": 16},
    "--dtype bfloat16": {"dtype": "bfloat16"},
    "bfloat16 (gradients too), 8bit, checkpointing": {
        "dtype": "bfloat16", "gradient_dtype": "bfloat16", "lora_rank": 0, **EIGHT_BIT, **CHECKPOINTED
    },
    "bfloat16, rank 16, checkpointing": {"dtype": "bfloat16", "lora_rank": 16, **CHECKPOINTED},
}  # fmt: skip


class Other(NamedTuple):
    """A model that is in memory beside the one that is trained."""

    model: str
    flag: str
    reward: bool = False
    trained: bool = False  # whole: a critic
    shared: bool = False  # a reference that is the policy itself, its adapters off, if that has adapters


def dry_run(a: Any, examples: Sequence[Example], tokenizer, **settings: Any) -> None:
    """Print what training with a script's flags takes, in memory and time, and what it takes with flags that save
    memory. `settings` are those of `_report`. A line says so if a model cannot be traced without its weights."""
    print("\nDoes it fit, and how long does it take? (from configs and the rows' lengths; no weight is loaded)\n")
    try:
        with warnings.catch_warnings(action="ignore"):
            _report(a, examples, tokenizer, **settings)
    except BadInput:
        raise
    except Exception as error:  # of any kind, since the model's own code runs
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        print(f"not estimated: --model {a.model} cannot be traced without weights: {reason}")


def dry_run_ppo(a: Any, prompts: Sequence[Example], tokenizer) -> None:
    """`dry_run` for train_ppo.py: every answer as long as it can be, and reference, reward model and critic beside the
    policy."""
    others = [Other(a.ref or a.model, "--ref", shared=not a.ref)]
    is_model = a.reward != "gold" and not names_function(a.reward)
    to_make = a.reward == type(a).reward and not runs.is_made(a.reward)
    made_of = a.reward if is_model and not to_make else a.model
    if is_model:
        others.append(Other(made_of, "--reward", reward=True))
    if a.advantage == "gae":
        critic = made_of if a.value_init == "reward" else a.model
        others.append(Other(critic, "--value-init", reward=True, trained=True))
    answered = [replace(e, responses=[[0] * a.max_new_tokens] * a.k) for e in prompts]
    settings = {"per_step": math.ceil(a.batch_size / a.minibatches), "updates": a.epochs_per_rollout}
    dry_run(a, answered, tokenizer, others=others, scorings=1, **settings)


def _report(
    a: Any,
    examples: Sequence[Example],
    tokenizer,
    reward: bool = False,
    others: Sequence[Other] = (),
    per_step: int | None = None,
    updates: int = 1,
    scorings: int = 0,
    scored_before: int = 0,
) -> None:
    """reward: a reward model is trained. per_step: examples of an optimizer step, by default --batch-size. An epoch
    trains each example `updates` times, and scores it `scorings` times with models of the policy's size and once with
    each of the others. scored_before: examples that the reference scores before training."""
    flags = {name: getattr(a, name) for name in Plan._fields if name in vars(a)}
    processes = dist.get_world_size() if parallel.several() else 1
    given = Plan(**flags, on_gpu=torch.device(a.device).type == "cuda", processes=processes)
    config = config_of(a.model, "--model", a, tokenizer, None if reward else False)
    per_step = per_step or a.batch_size
    order = random.Random(f"{a.seed} 0").sample([*examples], len(examples))
    steps = [order[i : i + per_step] for i in range(0, len(order), per_step)]

    def in_layout(layout: str):
        """The layout if the model can be traced in it, the largest micro-batch, the sizes of all."""
        groups = [[[x[i] for i in g] for g, _ in parallel.shares(x, a.micro_batch_tokens, layout)] for x in steps]
        largest = max((group for step in groups for group in step), key=lambda group: memory.measure(group, layout)[0])
        memory.trace(config, largest, given, layout, reward, a.trust_remote_code)
        return layout, largest, [[memory.measure(group, layout) for group in step] for step in groups]

    try:
        layout, largest, sizes = in_layout("padded" if a.layout == "padded" else "tree")
    except NotImplementedError:
        if a.layout != "auto":
            raise
        layout, largest, sizes = in_layout("padded")
    tokens, scored = (processes * sum(size[i] for step in sizes for size in step) for i in (0, 1))
    counts = []  # weights of each of the others, and those of their layers
    for other in others:
        its_config = config_of(other.model, other.flag, a, tokenizer, None if other.reward else False)
        model = models.on_meta(its_config, other.reward, a.trust_remote_code)
        in_layers = sum(x.numel() for layer in models.layers(model) for x in layer.parameters())
        counts.append((model.num_parameters(), in_layers))

    parts_shown = ["weights", "low bits", "gradients", "optimizer", "activations", "logits"]
    parts_shown += ["gathered"] * (processes > 1) + ["others"] * bool(others) + ["peak"]
    device, total = _memory(a.device)
    places = [f"fits {device}"] + ["fits an 80 GB GPU"] * (not given.on_gpu)
    header = ["GiB a device", *parts_shown, *places, "hours an epoch"]
    rows, speeds, refused = [], {}, []
    for name, changes in {"flags as given": {}, **SAVING}.items():
        same = all(flags.get(x, value) == value for x, value in changes.items())
        if changes and (same or not changes.keys() <= flags.keys() or processes > 1 and "optimizer_state" in changes):
            continue
        plan = given._replace(**changes)
        try:
            shape = memory.trace(config, largest, plan, layout, reward, a.trust_remote_code)
        except BadInput as error:  # checkpoints or adapters that this architecture cannot have
            if not changes:
                raise
            refused.append(f"{name}: {error}")
            continue
        beside = 0.0
        work = updates * memory.operations(shape, tokens, scored, plan)
        work += scorings * memory.operations(shape, tokens, scored)
        for other, (elements, in_layers) in zip(others, counts, strict=True):
            if other.shared and plan.lora_rank:
                work += memory.operations(shape, tokens, scored)
                continue
            beside += sum(memory.state_bytes(elements, plan, other.trained, processes).values())
            work += in_layers * tokens * (2 + 6 * updates * other.trained)
        parts = memory.estimate(shape, sizes, plan, beside)
        peaks = [(parts["peak"], total)]
        if not plan.on_gpu:
            peaks.append((memory.estimate(shape, sizes, plan._replace(on_gpu=True), beside)["peak"], CARD))
        rate = RATES[plan.dtype] if plan.on_gpu else CPU_RATE * torch.get_num_threads()
        speeds[plan.dtype] = f"{rate / 1e12:g}e12 in {plan.dtype}"
        fits = ["yes" if peak <= FULL * size else "no" for peak, size in peaks]
        cells = [f"{parts[part] / GIB:.3g}" for part in parts_shown]
        rows.append([name, *cells, *fits, f"{work / rate / processes / 3600:.2g}"])
        if not changes:
            once = memory.operations(shape, tokens, scored) * scored_before / len(examples)
            before = once / rate / processes / 3600
    print("\n".join([table(header, rows), *refused]))
    most, targets = memory.measure(largest, layout)
    chosen = f"{layout} layout" + (", if the check of the loaded model agrees" if a.layout == "auto" else "")
    where = "a GPU" if given.on_gpu else f"{torch.get_num_threads()} threads of a CPU"
    print(
        f"""
model    {shape.elements / 1e6:.2f} M weights; a pass has at most {most} tokens, {targets} of them in a loss; {chosen}
memory   activations and logits are those of the largest pass; the peak is less than the sum of all, because
         activations go while gradients come; it fits if it takes at most {FULL:.0%} of the device
         not counted: sampling, compiling, the exact KL, what the libraries and the allocator need for themselves
time     {tokens} tokens an epoch; operations for each weight and token: 6, with adapters 4, without gradient 2, and
         2 more in recomputed layers; all experts of a mixture count; attention, sampling and evaluation do not
         assumed operations a second of {where}: {", ".join(speeds.values())}"""
    )
    if not given.on_gpu and a.micro_batch_tokens != runs.GPU_TOKENS:
        print(f"GPU      the default of --micro-batch-tokens is {runs.GPU_TOKENS} there, which takes more memory")
    if scored_before:
        own = "it is the policy itself"
        if a.ref:
            its_config = config_of(a.ref, "--ref", a, tokenizer, reward=False)
            model = models.on_meta(its_config, trust_remote_code=a.trust_remote_code)
            weights = memory.state_bytes(model.num_parameters(), given, trained=False, shards=processes)["weights"]
            own = f"until then its weights take {weights / GIB:.3g} GiB beside the policy's"
        print(f"before   the reference scores {scored_before} examples in {before:.2g} hours; {own}")


def config_of(name: str, flag: str, a: Any, tokenizer, reward: bool | None):
    """The config of a model; that of the embedded task's policy before there is one. BadInput if `reward` is not None
    and the model is of the other kind."""
    if name == "reviews" or (name == runs.SFT_MODEL and not runs.is_made(name)):
        return reviews.config(tokenizer)
    if reward is not None:
        models.require_kind(name, reward, a.trust_remote_code, flag)
    return models.load_config(name, a.trust_remote_code, flag)


def _memory(device: str) -> tuple[str, int]:
    """What a device's memory is called, and its bytes."""
    if torch.device(device).type == "cuda":
        total = torch.cuda.get_device_properties(device).total_memory
        return f"{total / GIB:.0f} GiB of {device}", total
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    return f"{total / GIB:.0f} GiB of RAM", total
