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
    for module in model.modules():
        if isinstance(module, fsdp.FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)  # gloo knows no other
    model.managed = MethodType(lambda self, function, *args, **kwargs: function(self, *args, **kwargs), model)
    fsdp.register_fsdp_forward_method(model, "managed")
    model.product_dtype = dtype
    return model


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
    return _in_step([[share[i] for i in g] for g in own], max(map(len, groups)), examples[:1], layout, model)


def _in_step(groups: list[list[int]], passes: int, some: Sequence[Example], layout: str, model):
    yield from groups
    measure = models.rewards if hasattr(model, "score") else lambda *x: models.response_logps(*x)[1]
    for _ in range(passes - len(groups)):
        batch = tree.collate(some, layout, 0, next(model.parameters()).device)
        nothing = measure(model, batch, model.product_dtype).sum() * 0
        if torch.is_grad_enabled():
            nothing.backward()


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
    """The model as an ordinary one, in the first process; None in the others, whose work is done."""
    if not several():
        return model
    models.use_layout(model, "padded")
    weights = {}
    for name, share in model.state_dict().items():
        weight = full(share)
        if first():
            weights[name] = weight.cpu()
    dist.barrier()
    dist.destroy_process_group()
    if not first():
        return None
    kind = type(model).__bases__[1]  # fully_shard made (FSDPModule, kind) of it
    ordinary = kind.from_pretrained(None, config=model.config, state_dict=weights, dtype=torch.float32)
    ordinary.generation_config = model.generation_config
    return models.without_dropout(ordinary).to(device)


def load_checkpoint(run: runs.Run, model, optimizer) -> dict | None:
    """A run's newest checkpoint as `Run.load_checkpoint` gives it, cut for the processes there are, whichever number of
    them wrote it. What several wrote has pickled metadata: continue your own runs only."""
    folder = run.newest_checkpoint()
    if not folder or (folder / "state.pt").exists() and not several():
        return run.load_checkpoint()
    own, parameters = model.state_dict(), [*model.parameters()]

    if (folder / "state.pt").exists():

        def cut(x: Tensor, like: Tensor) -> Tensor:
            if not isinstance(like, tensor.DTensor) or not x.dim():
                return x
            return tensor.distribute_tensor(x.to(like.device), like.device_mesh, like.placements, src_data_rank=None)

        state = run.load_checkpoint()
        state["model"] = {name: cut(x, own[name]) for name, x in state["model"].items()}
        for i, fields in state["optimizer"]["state"].items():
            fields.update({name: cut(x, parameters[i]) for name, x in fields.items()})
        return state

    def place(name: str, saved) -> Tensor:
        kind, what = name.split("/", 1)
        if kind == "model":
            return own[what]
        if kind == "value" or not saved.size:
            return torch.zeros(saved.size, dtype=saved.properties.dtype)
        return torch.zeros_like(parameters[int(what.split("/")[0])])

    saved = dcp.FileSystemReader(folder).read_metadata().state_dict_metadata
    found = {name: place(name, what) for name, what in saved.items()}
    dcp.load(found, checkpoint_id=folder, no_dist=not several())
    state = {"model": {}, "optimizer": {**optimizer.state_dict(), "state": defaultdict(dict)}}
    for name, x in found.items():
        kind, *what = name.split("/")
        if kind == "model":
            state["model"][what[0]] = x
        elif kind == "optimizer":
            state["optimizer"]["state"][int(what[0])][what[1]] = x
        else:
            state[what[0]] = int(x) if what == ["step"] else x.item()
    return state


class Run(runs.Run):
    """A run of several processes: the first writes and shows, and all take part in checkpoints and in stopping.

    A checkpoint is one of torch.distributed.checkpoint, its names model/WEIGHT, optimizer/NUMBER/FIELD and value/NAME.
    """

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
        flat = {f"model/{name}": x for name, x in state["model"].items()}
        for i, fields in state["optimizer"]["state"].items():
            flat |= {f"optimizer/{i}/{name}": x for name, x in fields.items()}
        for name in state.keys() - {"model", "optimizer"}:
            flat[f"value/{name}"] = torch.tensor(state[name], dtype=torch.float64)
        if first():
            shutil.rmtree(partial, ignore_errors=True)
        if any(gather([whole.exists()])):
            return
        try:
            dcp.save(flat, checkpoint_id=partial)
        except dcp.CheckpointException as error:
            reason = "; ".join(sorted({str(failure[0]) for failure in error.failures.values()}))
            raise OSError(
                f"no checkpoint of step {step} in {partial.parent} ({reason}); the one before it stays"
            ) from None
        if first():
            self.keep(partial, whole)
        dist.barrier()
