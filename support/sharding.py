"""One model over several processes, with FSDP2: `torchrun --nproc-per-node N train_*.py` (docs/scaling.md).

Each process holds an N-th of every weight, gradient and optimizer state. A layer is gathered whole for as long as it
computes; its gradients are added up over the processes and cut again. The loss is divided by the count of the whole
step before that, so N processes give what one gives, up to rounding. In one process nothing here wraps anything.
"""

import dataclasses
import functools
import math
import os
import pickle
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import MethodType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from rlhf import BadInput, require
from rlhf.optim import AdamW, LowBits
from support import lazy_import, models, one_line
from support.parallel import full_tensor, gather, is_main, several

dcp = lazy_import("torch.distributed.checkpoint")
fsdp = lazy_import("torch.distributed.fsdp")
tensor = lazy_import("torch.distributed.tensor")

METADATA = {  # what the checkpoint library's pickled .metadata is made of, besides dtypes and plain values
    "torch.distributed.checkpoint.metadata": "Metadata MetadataIndex StorageMeta TensorProperties "
    "TensorStorageMetadata ChunkStorageMetadata _MEM_FORMAT_ENCODING",
    "torch.distributed.checkpoint.filesystem": "_StorageInfo",
    "torch": "Size",
    "torch.serialization": "_get_layout",
    "pathlib": "PosixPath",
    "pathlib._local": "PosixPath",  # its name in Python 3.13
}


def load(make: Callable[[str], Any], device: str, dtype: torch.dtype):
    """`load_trained` for a model that is not trained."""
    return load_trained(make, device, dtype, None)[0]


def load_trained(make: Callable[[str], Any], device: str, dtype: torch.dtype, seed: int | None) -> tuple[Any, LowBits]:
    """make(device) in one process; in several, each process's shard of make("cpu") on the device. For bfloat16 the
    weights are bfloat16, and their masters' low bits (rlhf/optim.py) are returned too; of several processes each
    gathers the layers in bfloat16 and keeps its shard of the masters in float32.

    `seed` is that of the dither; None: not trained, or only adapters and a reward model's head are, which each process
    holds whole. The processes of a machine make their models one after the other, so that its main memory holds one
    whole model at a time. Each layer is a unit of sharding, and the rest (embeddings, last norm, head) is one.
    Gradients are added up in float32.
    """
    low = dtype == torch.bfloat16
    if not several():
        model = make("cpu" if low else device)
        return model, _lower(model, device, seed) if low else {}
    mesh = dist.device_mesh.init_device_mesh(torch.device(device).type, (dist.get_world_size(),))
    options = {"param_dtype": dtype, "reduce_dtype": torch.float32, "cast_forward_inputs": False}
    products = fsdp.MixedPrecisionPolicy(**(options if low else {}))
    for turn in range(int(os.environ["LOCAL_WORLD_SIZE"])):
        problem = None
        if turn == int(os.environ["LOCAL_RANK"]):
            try:
                model = make("cpu")
                if low:
                    models.raise_embeddings(model)
                if low and seed is not None:
                    models.dither_masters(model, seed)
                whole = set()
                if models.has_reward_head(model) and seed is None:
                    whole = {*model.score.to(device).parameters()}
                elif models.has_reward_head(model):  # in float32
                    fsdp.fully_shard(model.score, mesh=mesh)
                for layer in models.layers(model):
                    fsdp.fully_shard(layer, mesh=mesh, mp_policy=products)
                # True: outside of a forward or backward pass no weight is whole, so the optimizer sees shards only
                fsdp.fully_shard(model, mesh=mesh, mp_policy=products, reshard_after_forward=True, ignored_params=whole)
            except BadInput as error:
                problem = error
        for error in filter(None, gather([problem])):
            raise error
    for unit in _units(model):
        unit.set_gradient_divide_factor(1.0)
        unit.set_force_sum_reduction_for_comms(True)  # gloo has no other reduction
    model.run_gathered = MethodType(_run_gathered, model)
    fsdp.register_fsdp_forward_method(model, "run_gathered")
    return model, {}


def as_forward(measure: Callable) -> Callable:
    """Run measure(model, ...) of a sharded model as an FSDP forward pass, where weights are gathered; those of the
    output head too. Any other model is measured directly."""

    @functools.wraps(measure)
    def call(model, *args, **kwargs):
        if several() and isinstance(model, fsdp.FSDPModule):
            return model.run_gathered(measure, *args, **kwargs)
        return measure(model, *args, **kwargs)

    return call


def _run_gathered(model, measure: Callable, *args, **kwargs):
    """measure(model, ...), as a method that FSDP treats as a forward pass."""
    try:
        return measure(model, *args, **kwargs)
    except Exception:  # the layout check continues after some
        for unit in _units(model):
            unit.reshard()
        raise


def _units(model):
    return [module for module in model.modules() if isinstance(module, fsdp.FSDPModule)]


@contextmanager
def gathered(model, dtype: torch.dtype) -> Iterator[None]:
    """Keep a sharded model's weights whole inside, from their first use on, if the device has the memory: for many
    short passes, each of which would gather them again. `dtype` is that of the matrix products."""
    units, room = _units(model) if several() else [], math.inf
    if units and model.device.type == "cuda":
        free = torch.cuda.mem_get_info()[0] + torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
        room = free / (2 * dtype.itemsize)
    keep = units and min(gather([room])) > model.num_parameters()
    for unit in units if keep else ():
        unit.set_reshard_after_forward(False, recurse=False)
    try:
        yield
    finally:
        for unit in units if keep else ():
            unit.set_reshard_after_forward(True, recurse=False)
            unit.reshard()


def autocast(model, dtype: torch.dtype):
    """Run the matrix products inside in this dtype."""
    return torch.autocast(model.device.type, dtype, enabled=dtype != torch.float32)


def clip_gradients(optimizer: torch.optim.Optimizer, max_norm: float) -> Tensor:
    """Scale gradients with a larger norm down to it; return the norm before, over all shards and all processes, on the
    device."""
    weights = [weight for group in optimizer.param_groups for weight in group["params"]]
    if isinstance(optimizer, AdamW):
        optimizer.collect_gradients()
    if several():
        _add_up_gradients(weights)
    return full_tensor(torch.nn.utils.clip_grad_norm_(weights, max_norm))


def _add_up_gradients(weights: list[torch.nn.Parameter]) -> None:
    """Add up gradients of weights that each process holds whole (adapters); FSDP has done it for shards. A process
    without a gradient adds zeros."""
    for weight in weights:
        if weight.requires_grad and not isinstance(weight, tensor.DTensor):
            weight.grad = torch.zeros_like(weight) if weight.grad is None else weight.grad
            dist.all_reduce(weight.grad)


def _lower(model, device: str, seed: int | None) -> LowBits:
    """`models.to_bfloat16` with a float32 residual stream: in bfloat16 it would double the rounding of a response's
    log-prob (from 0.24 to 0.47 nats on SmolLM2-135M)."""
    models.raise_embeddings(model)
    return models.to_bfloat16(model, device, seed)


def unshard(model, low_bits: LowBits, make: Callable[[str], Any], a: Any, lora=None) -> tuple[Any, LowBits, Any]:
    """The model as an ordinary one, its low bits and its handle of `models.add_lora`, in the main process, which goes
    on alone. The others, whose work is done, get None for all. `make` is what `load_trained` was given. The model stays
    in main memory if the device cannot hold it.
    """
    if not several():
        return model, low_bits, lora
    ordinary = make("cpu") if is_main() else None
    if ordinary and lora:
        lora = models.add_lora(ordinary, lora.peft_config["default"].r)
    weights = ordinary.state_dict() if ordinary else {}
    for name, shard in model.state_dict().items():
        weight = full_tensor(shard)
        if ordinary:
            weights[name].copy_(weight)
    dist.barrier()
    dist.destroy_process_group()
    if not ordinary:
        return None, None, None
    models.set_attention(model, packed=False)
    vars(ordinary.config).update(vars(model.config))
    if a.dtype == "bfloat16":
        low_bits = _lower(ordinary, "cpu", a.seed)
    try:
        return ordinary.to(a.device), low_bits, lora
    except torch.cuda.OutOfMemoryError:
        print(f"the model does not fit {a.device} whole: answers to --eval-prompts come from the CPU, slowly")
        return ordinary.to("cpu"), low_bits, lora


# --------------------------------------------------------------------------------------------------------- checkpoints


def save_checkpoint(folder: Path, state: dict) -> None:
    """Write a checkpoint in which every process writes its shards. OSError with the reason if that fails."""
    try:
        dcp.save(_flat(state), checkpoint_id=folder)
    except dcp.CheckpointException as error:
        raise OSError("; ".join(sorted({str(failure[0]) for failure in error.failures.values()}))) from None


def load_checkpoint(folder: Path, by_one: dict | None, parts: dict[str, Any]) -> dict:
    """A checkpoint's state, cut for the number of processes there are now, whichever number wrote it.

    `parts`: the models and optimizers in it, by name; a model NAME has the optimizer NAME_optimizer, and "model" has
    "optimizer". `by_one`: the state if one process wrote it, else None. Nothing in a checkpoint is executed.
    """
    parts = {name: part for name, part in parts.items() if part is not None}
    own_weights = {
        "optimizer" if name == "model" else f"{name}_optimizer": [*part.parameters()]
        for name, part in parts.items()
        if isinstance(part, torch.nn.Module)
    }
    current = {name: part.state_dict() for name, part in parts.items()}

    def place(name: str, size, dtype: torch.dtype) -> Tensor:
        """An empty tensor, sharded as this run shards it, for an entry of the checkpoint."""
        part, entry = name.split("/", 1)
        if not size:
            return torch.zeros((), dtype=dtype)
        if part in own_weights:
            return torch.zeros_like(own_weights[part][int(entry.split("/")[0])])
        return current[part][entry]

    if by_one:
        entries = {}
        for name, x in _flat(by_one).items():
            like = place(name, x.shape, x.dtype)
            if isinstance(like, tensor.DTensor):
                x = tensor.distribute_tensor(x.to(like.device), like.device_mesh, like.placements, src_data_rank=None)
            entries[name] = x
    else:
        reader, metadata = dcp.FileSystemReader(folder), _read_metadata(folder / ".metadata")
        reader.read_metadata = lambda **_: metadata  # its own would execute what the file says
        saved = metadata.state_dict_metadata
        entries = {name: place(name, info.size, info.properties.dtype) for name, info in saved.items()}
        try:
            dcp.load(entries, storage_reader=reader, no_dist=not several())
        except dcp.CheckpointException as error:
            reason = " ".join("; ".join(sorted({str(failure[0]) for failure in error.failures.values()})).split())
            raise BadInput(f"--resume: {folder} is damaged: {reason[:200]}") from None

    state = {name: {**now, "state": defaultdict(dict)} if name in own_weights else {} for name, now in current.items()}
    for name, x in entries.items():
        match name.split("/"):
            case ["value", key]:
                state[key] = int(x) if key == "step" else x.item()
            case [part, weight]:
                state[part][weight] = x
            case [part, number, field]:
                state[part]["state"][int(number)][field] = x
    return state


class _MetadataUnpickler(pickle._Unpickler):  # the one in Python, whose instructions can be overridden
    """Gives the names in METADATA and torch's dtypes, and refuses all others. Sets attributes of the metadata's own
    objects only: those of a class or a function would outlive the file and change what the program does."""

    dispatch = dict(pickle._Unpickler.dispatch)

    def load_build(self):
        target = self.stack[-2]
        if isinstance(target, type) or not dataclasses.is_dataclass(target):
            raise pickle.UnpicklingError(f"it changes {getattr(target, '__qualname__', type(target).__name__)}")
        super().load_build()

    dispatch[pickle.BUILD[0]] = load_build

    def find_class(self, module: str, name: str):
        is_dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if name in METADATA.get(module, "").split() or is_dtype:
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"it asks for {module}.{name}")


def _read_metadata(path: Path):
    """What several processes wrote where, without executing anything. BadInput if the file holds something else."""
    try:
        with open(path, "rb") as f:
            metadata = _MetadataUnpickler(f).load()
    except Exception as error:  # damaged pickles raise almost anything
        reason = one_line(error) if isinstance(error, pickle.UnpicklingError) else repr(error)
        raise BadInput(f"--resume: {path} is no checkpoint's metadata, and is not loaded: {reason}") from None
    kind = type(metadata).__name__
    require(kind == "Metadata", f"--resume: {path} is no checkpoint's metadata, and is not loaded: it holds a {kind}")
    return metadata


def _flat(state: dict) -> dict[str, Tensor]:
    """A checkpoint's tensors as MODEL/WEIGHT, OPTIMIZER/NUMBER/FIELD and value/NAME."""
    flat = {}
    for part, value in state.items():
        if not isinstance(value, dict):
            flat[f"value/{part}"] = torch.tensor(value, dtype=torch.float64)
        elif "param_groups" not in value:
            flat |= {f"{part}/{weight}": x for weight, x in value.items()}
        else:
            fields = {f"{part}/{i}/{field}": x for i, entry in value["state"].items() for field, x in entry.items()}
            flat |= {
                name: torch.as_tensor(x, dtype=None if name[-4:] != "step" else torch.float32)
                for name, x in fields.items()
            }
    return flat
