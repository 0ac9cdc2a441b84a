"""Many processes, one model: `torchrun --nproc-per-node N train_*.py` shards it over them with FSDP2 (docs/scaling.md).

Each process holds an N-th of every weight, gradient and optimizer state, and takes its share of each step's examples.
A layer is gathered whole for as long as it computes; its gradients are added up over the processes and cut again. The
loss is divided by the count of the whole step before that, so N processes give what one gives, up to rounding.

In one process nothing here wraps anything.
"""

import datetime
import os
import shutil
import signal
import sys
from collections import defaultdict
from collections.abc import Callable, Sequence
from types import MethodType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from tqdm import tqdm

from rlhf import lazy_import, require, runs, tree
from rlhf.data import Example

dcp = lazy_import("torch.distributed.checkpoint")
fsdp = lazy_import("torch.distributed.fsdp")
models = lazy_import("rlhf.models")  # which imports this file
tensor = lazy_import("torch.distributed.tensor")


def start(a: Any, script: str, refused: Sequence[str] = ()) -> runs.Run:
    """The run directory of a script; where torchrun started several processes, they meet here, and the first alone
    prints from here on. BadInput where one of the `refused` flags is set, which several processes do not support."""
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        return runs.Run(a, script)
    for name in refused:
        require(not getattr(a, name), f"--{name.replace('_', '-')} does not work with several processes yet")
    on_gpu = torch.device(a.device).type == "cuda"
    if on_gpu:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("cpu:gloo,cuda:nccl" if on_gpu else "gloo", timeout=datetime.timedelta(hours=1))
    if dist.get_rank():
        sys.stdout = open(os.devnull, "w")
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
    for turn in range(int(os.environ["LOCAL_WORLD_SIZE"])):
        if turn == int(os.environ["LOCAL_RANK"]):
            model, low = make("cpu"), {}
            if dtype != torch.float32:
                low = {"param_dtype": dtype, "reduce_dtype": torch.float32, "cast_forward_inputs": False}
            for layer in layers(model):
                fsdp.fully_shard(layer, mesh=mesh, mp_policy=fsdp.MixedPrecisionPolicy(**low))
            # True: outside of a forward or backward pass no weight is whole, so the optimizer sees shares only
            fsdp.fully_shard(model, mesh=mesh, reshard_after_forward=True)
        dist.barrier()
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
    """The model's layers, as its class names them for the library."""
    return [module for module in model.modules() if type(module).__name__ in (model._no_split_modules or ())]


def micro_batches(examples: Sequence[Example], budget: int, layout: str, model):
    """Groups of indices as rlhf/tree.py makes them; of several processes each gets those of its own share.

    Shares have about the same number of tokens. Gathering weights and adding up gradients takes all processes, so one
    with fewer groups than another goes through empty passes at the end, whose gradient is 0.
    """
    if not several():
        return tree.micro_batches(examples, budget, layout)
    shares: list[list[int]] = [[] for _ in range(dist.get_world_size())]
    sizes = [0] * len(shares)
    for i in sorted(range(len(examples)), key=lambda i: -tree.tokens(examples[i], layout)):
        least = sizes.index(min(sizes))
        shares[least].append(i)
        sizes[least] += tree.tokens(examples[i], layout)
    groups = [tree.micro_batches([examples[i] for i in share], budget, layout) for share in shares]
    share, own = shares[dist.get_rank()], groups[dist.get_rank()]

    def in_step():
        yield from ([share[i] for i in group] for group in own)
        measure = models.rewards if hasattr(model, "score") else lambda *x: models.response_logps(*x)[1]
        for _ in range(max(map(len, groups)) - len(own)):
            batch = tree.collate([min(examples, key=tree.tokens)], layout, 0, next(model.parameters()).device)
            nothing = measure(model, batch, model.product_dtype).sum() * 0
            if torch.is_grad_enabled():
                nothing.backward()

    return in_step()


def gather(things: list) -> list:
    """The things of all processes, in the order of the processes; tensors among them on the CPU."""
    if not several():
        return things
    lists: list[list] = [[] for _ in range(dist.get_world_size())]
    dist.all_gather_object(lists, torch.utils._pytree.tree_map_only(Tensor, lambda x: x.detach().cpu(), things))
    return [thing for own in lists for thing in own]


def full(x: Tensor) -> Tensor:
    """A tensor of which each process holds a share, in all of them; any other as it is."""
    return x.full_tensor() if hasattr(x, "full_tensor") else x


def clip(model, limit: float) -> float:
    """Scales gradients with a larger norm down to it; their norm before, over all shares."""
    return full(torch.nn.utils.clip_grad_norm_(model.parameters(), limit)).item()


def whole(model, device: str):
    """The model as an ordinary one, in the first process; None in the others, whose work is done.

    It stays in main memory where the device cannot hold it.
    """
    if not several():
        return model
    models.use_layout(model, "padded")
    ordinary = model.make("cpu") if first() else None
    weights = ordinary.state_dict() if ordinary else {}
    for name, share in model.state_dict().items():
        weight = full(share)
        if ordinary:
            weights[name].copy_(weight)
    dist.barrier()
    dist.destroy_process_group()
    if not ordinary:
        return None
    vars(ordinary.config).update(vars(model.config))
    try:
        return ordinary.to(device)
    except torch.cuda.OutOfMemoryError:
        print(f"the model does not fit {device} whole: answers to --eval-prompts come from the CPU, slowly")
        return ordinary.to("cpu")


def load_checkpoint(run: runs.Run, model, optimizer) -> dict | None:
    """A run's newest checkpoint as `Run.load_checkpoint` gives it, cut for the processes there are, whichever number of
    them wrote it. What several wrote has pickled metadata: continue your own runs only."""
    folder = run.newest_checkpoint()
    by_one = folder and (folder / "state.pt").exists()
    if not folder or by_one and not several():
        return run.load_checkpoint()
    own, parameters, found = model.state_dict(), [*model.parameters()], {}

    def place(name: str, size, dtype: torch.dtype) -> Tensor:
        kind, what = name.split("/", 1)
        if kind == "model":
            return own[what]
        return torch.zeros_like(parameters[int(what.split("/")[0])]) if size else torch.zeros((), dtype=dtype)

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
    state = {"model": {}, "optimizer": {**optimizer.state_dict(), "state": defaultdict(dict)}}
    for name, x in found.items():
        match name.split("/"):
            case ["model", weight]:
                state["model"][weight] = x
            case ["optimizer", number, field]:
                state["optimizer"]["state"][int(number)][field] = x
            case ["value", what]:
                state[what] = int(x) if what == "step" else x.item()
    return state


def _flat(state: dict) -> dict[str, Tensor]:
    """A checkpoint's tensors as model/WEIGHT, optimizer/NUMBER/FIELD and value/NAME."""
    flat = {f"model/{name}": x for name, x in state["model"].items()}
    for i, fields in state["optimizer"]["state"].items():
        flat |= {f"optimizer/{i}/{name}": x for name, x in fields.items()}
    values = {name: state[name] for name in sorted(state.keys() - {"model", "optimizer"})}
    return flat | {f"value/{name}": torch.tensor(x, dtype=torch.float64) for name, x in values.items()}


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
