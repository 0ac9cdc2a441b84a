"""Many processes, one model: `torchrun --nproc-per-node N train_*.py` shards it over them with FSDP2 (docs/scaling.md).

Each process holds an N-th of every weight, gradient and optimizer state, and takes its share of each step's examples.
A layer is gathered whole for as long as it computes; its gradients are added up over the processes and cut again. The
loss is divided by the count of the whole step before that, so N processes give what one gives, up to rounding.

In one process nothing here wraps anything.
"""

import datetime
import math
import os
import shutil
import signal
import sys
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import MethodType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from tqdm import tqdm

from rlhf import BadInput, lazy_import, runs, tree
from rlhf.data import Example

dcp = lazy_import("torch.distributed.checkpoint")
fsdp = lazy_import("torch.distributed.fsdp")
models = lazy_import("rlhf.models")  # which imports this file
tensor = lazy_import("torch.distributed.tensor")
transformers = lazy_import("transformers")


def start(a: Any, script: str) -> runs.Run:
    """The run directory of a script; where torchrun started several processes, they meet here, and the first alone
    prints from here on."""
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        return runs.Run(a, script)
    on_gpu = torch.device(a.device).type == "cuda"
    if on_gpu:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("cpu:gloo,cuda:nccl" if on_gpu else "gloo", timeout=datetime.timedelta(hours=1))
    if dist.get_rank():
        sys.stdout = open(os.devnull, "w")
        warnings.simplefilter("ignore")
        transformers.utils.logging.set_verbosity_error()
    return Run(a, script)


def several() -> bool:
    """Whether several processes share the models that are loaded now."""
    return dist.is_initialized()


def first() -> bool:
    """Whether this is the process that prints and writes; so is the only one."""
    return int(os.environ.get("RANK", 0)) == 0


def load(make: Callable[[str], Any], device: str, dtype: torch.dtype):
    """make(device): a model. Several processes make theirs in main memory, those of a machine one after the other, so
    that it holds one whole model at a time, and keep their share of it on the device.

    A layer is a unit of sharding, and the rest (embeddings, last norm, head) is one. Products in bfloat16 gather layers
    in bfloat16; gradients are added up in float32.
    """
    if not several():
        return make(device)
    mesh = dist.device_mesh.init_device_mesh(torch.device(device).type, (dist.get_world_size(),))
    low = {"param_dtype": dtype, "reduce_dtype": torch.float32, "cast_forward_inputs": False}
    products = fsdp.MixedPrecisionPolicy(**(low if dtype != torch.float32 else {}))
    for turn in range(int(os.environ["LOCAL_WORLD_SIZE"])):
        problem = None
        if turn == int(os.environ["LOCAL_RANK"]):
            try:
                model = make("cpu")
                for layer in layers(model):
                    fsdp.fully_shard(layer, mesh=mesh, mp_policy=products)
                # True: outside of a forward or backward pass no weight is whole, so the optimizer sees shares only
                fsdp.fully_shard(model, mesh=mesh, reshard_after_forward=True)
            except BadInput as error:
                problem = error
        for found in filter(None, gather([problem])):
            raise found
    for unit in _units(model):
        unit.set_gradient_divide_factor(1.0)
        unit.set_force_sum_reduction_for_comms(True)  # gloo knows no other
    model.managed = MethodType(_managed, model)
    fsdp.register_fsdp_forward_method(model, "managed")
    model.make, model.product_dtype = make, dtype
    return model


def _units(model):
    return [module for module in model.modules() if isinstance(module, fsdp.FSDPModule)]


def _managed(model, measure: Callable, *args, **kwargs):
    """measure(model, ...), as a method that FSDP takes for a forward pass."""
    try:
        return measure(model, *args, **kwargs)
    except Exception:  # the check for a layout goes on from some
        for unit in _units(model):
            unit.reshard()
        raise


def layers(model) -> list[torch.nn.Module]:
    """The model's layers, as its class names them for the library (FSDP puts its own name before theirs)."""
    names = model._no_split_modules or ()
    return [module for module in model.modules() if type(module).__name__.removeprefix("FSDP") in names]


@contextmanager
def gathered(model):
    """Inside, a model's weights are whole from their first use on, where its share of a device's free memory allows it:
    for many short passes, each of which would gather them anew."""
    units, room = _units(model), math.inf
    if units and model.device.type == "cuda":
        free = torch.cuda.mem_get_info()[0] + torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
        room = free / (2 * model.product_dtype.itemsize)
    keep = units and min(gather([room])) > model.num_parameters()
    for unit in units if keep else ():
        unit.set_reshard_after_forward(False, recurse=False)
    try:
        yield
    finally:
        for unit in units if keep else ():
            unit.set_reshard_after_forward(True, recurse=False)
            unit.reshard()


def shares(examples: Sequence[Example], budget: int, layout: str) -> Iterator[tuple[list[int], float]]:
    """Groups of indices as rlhf/tree.py makes them, of several processes for each those of its own share; and 1.0.

    Shares have about the same number of tokens. Gathering weights and adding up gradients takes all processes, so one
    with fewer groups than another goes through empty passes at the end: for them 0.0, by which to multiply the loss.
    """
    if not several():
        yield from ((group, 1.0) for group in tree.micro_batches(examples, budget, layout))
        return
    dealt: list[list[int]] = [[] for _ in range(dist.get_world_size())]
    sizes = [0] * len(dealt)
    for i in sorted(range(len(examples)), key=lambda i: -tree.tokens(examples[i], layout)):
        least = sizes.index(min(sizes))
        dealt[least].append(i)
        sizes[least] += tree.tokens(examples[i], layout)
    groups = [tree.micro_batches([examples[i] for i in share], budget, layout) for share in dealt]
    own = groups[dist.get_rank()]
    yield from (([dealt[dist.get_rank()][i] for i in group], 1.0) for group in own)
    smallest = min(range(len(examples)), key=lambda i: tree.tokens(examples[i]), default=0)
    yield from [([smallest], 0.0)] * (max(map(len, groups)) - len(own))


def micro_batches(examples: Sequence[Example], budget: int, layout: str, model):
    """Those groups of `shares` that count; the empty passes through the model are gone through here."""
    if not several():
        return tree.micro_batches(examples, budget, layout)

    def in_step():
        measure = models.rewards if hasattr(model, "score") else lambda *x: models.response_logps(*x)[1]
        for group, counts in shares(examples, budget, layout):
            if counts:
                yield group
                continue
            batch = tree.collate([examples[i] for i in group], layout, 0, next(model.parameters()).device)
            nothing = measure(model, batch, model.product_dtype).sum() * 0
            if torch.is_grad_enabled():
                nothing.backward()

    return in_step()


def part_of(things: Sequence) -> Sequence:
    """This process's share of things of about the same size; where there are too few for all, the first once more."""
    return things[dist.get_rank() :: dist.get_world_size()] or things[:1] if several() else things


def sampling(
    own: Sequence[int], group: Sequence[int], k: int, width: int, temperature: float, ends: Sequence[int]
) -> dict[str, Any]:
    """Arguments for the library's greedy, endless `generate`, with which processes that each sample k responses to
    their own prompts of a group do it in step, and as one process would to the whole group: the noise of
    torch.multinomial is drawn for all prompts, and nobody stops before all responses have ended. `width` is that of the
    padded prompts. Nothing in one process."""
    if not several():
        return {}
    rows = [group.index(i) * k + j for i in own for j in range(k)]

    def draw(_, logits: Tensor) -> Tensor:
        noise = torch.empty(len(group) * k, logits.shape[1], device=logits.device).exponential_()[rows]
        drawn = (logits / temperature).softmax(-1).div(noise).argmax(-1, keepdim=True)
        return torch.full_like(logits, -math.inf).scatter(1, drawn, 0.0)

    def all_ended(ids: Tensor, _) -> Tensor:
        waiting = (~torch.isin(ids[:, width:], torch.tensor(ends, device=ids.device)).any(1)).sum()
        dist.all_reduce(waiting)
        return (waiting == 0).expand(len(ids))

    return {
        "logits_processor": transformers.LogitsProcessorList([draw] if temperature else []),
        "stopping_criteria": transformers.StoppingCriteriaList([all_ended]),
    }


def gather(things: list) -> list:
    """The things of all processes, in the order of the processes; tensors among them on the CPU."""
    if not several():
        return things
    lists: list[list] = [[] for _ in range(dist.get_world_size())]
    dist.all_gather_object(lists, torch.utils._pytree.tree_map_only(Tensor, lambda x: x.detach().cpu(), things))
    return [thing for own in lists for thing in own]


def once(function: Callable[[], Any]) -> Any:
    """What function() gives in the first process, in all of them, its BadInput too: for what costs or varies."""
    if not several():
        return function()
    found = [None]
    if first():
        try:
            found = [function()]
        except BadInput as error:
            found = [error]
    dist.broadcast_object_list(found)
    if isinstance(found[0], BadInput):
        raise found[0]
    return found[0]


def autocast(model):
    """Where a model that several processes share is used outside of `models.states`: its layers are gathered in the
    dtype of the products. Nothing in one process."""
    dtype = getattr(model, "product_dtype", torch.float32)
    return torch.autocast(model.device.type, dtype, enabled=dtype != torch.float32)


def full(x: Tensor) -> Tensor:
    """A tensor of which each process holds a share, in all of them; any other as it is."""
    return x.full_tensor() if hasattr(x, "full_tensor") else x


def clip(model, limit: float) -> float:
    """Scales gradients with a larger norm down to it; their norm before, over all shares and all processes."""
    if several():
        _add_up_gradients(model)
    return full(torch.nn.utils.clip_grad_norm_(model.parameters(), limit)).item()


def _add_up_gradients(model) -> None:
    """Over the processes, where each holds a trained weight whole (adapters); of shares FSDP has done it. Zeros are
    added where a process has no gradient."""
    for weight in model.parameters():
        if weight.requires_grad and not isinstance(weight, tensor.DTensor):
            weight.grad = torch.zeros_like(weight) if weight.grad is None else weight.grad
            dist.all_reduce(weight.grad)


def whole(model, device: str, lora=None):
    """The model as an ordinary one, and its handle of `models.add_lora`, in the first process; None in the others,
    whose work is done. It stays in main memory where the device cannot hold it.
    """
    if not several():
        return model, lora
    models.use_layout(model, "padded")
    ordinary = model.make("cpu") if first() else None
    if ordinary and lora:
        lora = models.add_lora(ordinary, lora.peft_config["default"].r)
    weights = ordinary.state_dict() if ordinary else {}
    for name, share in model.state_dict().items():
        weight = full(share)
        if ordinary:
            weights[name].copy_(weight)
    dist.barrier()
    dist.destroy_process_group()
    if not ordinary:
        return None, None
    vars(ordinary.config).update(vars(model.config))
    try:
        return ordinary.to(device), lora
    except torch.cuda.OutOfMemoryError:
        print(f"the model does not fit {device} whole: answers to --eval-prompts come from the CPU, slowly")
        return ordinary.to("cpu"), lora


def load_checkpoint(run: runs.Run, model, optimizer, **more) -> dict | None:
    """A run's newest checkpoint as `Run.load_checkpoint` gives it, cut for the processes there are, whichever number of
    them wrote it; `more` are other models and optimizers in it, by name. What several wrote has pickled metadata:
    continue your own runs only."""
    folder = run.newest_checkpoint()
    by_one = folder and (folder / "state.pt").exists()
    if not folder or by_one and not several():
        return run.load_checkpoint()
    parts, found = {"model": model, "optimizer": optimizer, **more}, {}
    parts = {part: thing.state_dict() for part, thing in parts.items() if thing is not None}
    weights = {"optimizer": [*model.parameters()]}
    weights |= {f"{name}_optimizer": [*x.parameters()] for name, x in more.items() if isinstance(x, torch.nn.Module)}

    def place(name: str, size, dtype: torch.dtype) -> Tensor:
        part, what = name.split("/", 1)
        if not size:
            return torch.zeros((), dtype=dtype)
        return torch.zeros_like(weights[part][int(what.split("/")[0])]) if part in weights else parts[part][what]

    if by_one:
        for name, x in _flat(run.load_checkpoint()).items():
            like = place(name, x.shape, x.dtype)
            if isinstance(like, tensor.DTensor):
                x = tensor.distribute_tensor(x.to(like.device), like.device_mesh, like.placements, src_data_rank=None)
            found[name] = x
    else:
        saved = dcp.FileSystemReader(folder).read_metadata().state_dict_metadata
        found = {name: place(name, what.size, what.properties.dtype) for name, what in saved.items()}
        dcp.load(found, checkpoint_id=folder, no_dist=not several())
    state = {part: {**own, "state": defaultdict(dict)} if part in weights else {} for part, own in parts.items()}
    for name, x in found.items():
        match name.split("/"):
            case ["value", what]:
                state[what] = int(x) if what == "step" else x.item()
            case [part, weight]:
                state[part][weight] = x
            case [part, number, field]:
                state[part]["state"][int(number)][field] = x
    return state


def _flat(state: dict) -> dict[str, Tensor]:
    """A checkpoint's tensors as MODEL/WEIGHT, OPTIMIZER/NUMBER/FIELD and value/NAME."""
    flat = {}
    for part, what in state.items():
        if not isinstance(what, dict):
            flat[f"value/{part}"] = torch.tensor(what, dtype=torch.float64)
        elif "param_groups" not in what:
            flat |= {f"{part}/{weight}": x for weight, x in what.items()}
        else:
            flat |= {f"{part}/{i}/{field}": x for i, own in what["state"].items() for field, x in own.items()}
    return flat


class Run(runs.Run):
    """A run of several processes: the first writes and shows, and all take part in checkpoints and in stopping."""

    signalled = 0

    def start(self, step: int, steps: int) -> None:
        if first():
            return super().start(step, steps)
        self.bar = tqdm(disable=True)
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._interrupt)

    def _interrupt(self, number, _frame):
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
        self.signalled = number

    def log(self, step: int, metrics: dict[str, float]) -> None:
        if first():
            super().log(step, metrics)

    def progress(self, step: int, **shown: float) -> None:
        super().progress(step, **shown)
        self.interrupted = max(gather([self.signalled]))  # so that all stop after the same step

    def save_checkpoint(self, step: int, state: dict) -> None:
        partial, whole = self.out / f"checkpoint/step-{step}.partial", self.out / f"checkpoint/step-{step}"
        if first():
            shutil.rmtree(partial, ignore_errors=True)
        if any(gather([whole.exists()])):
            return
        try:
            dcp.save(_flat(state), checkpoint_id=partial)
        except dcp.CheckpointException as error:
            reason = "; ".join(sorted({str(failure[0]) for failure in error.failures.values()}))
            raise OSError(
                f"no checkpoint of step {step} in {partial.parent} ({reason}); the one before it stays"
            ) from None
        if first():
            self.keep(partial, whole)
        dist.barrier()
