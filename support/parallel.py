"""Processes and collectives: what the processes that `torchrun` started do together (docs/scaling.md).

Each process takes its share of every step's examples. In one process nothing here changes anything: `gather` returns
its argument, `on_main` calls its function, and a share is everything.
"""

import datetime
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from rlhf import BadInput, tree
from support import lazy_import

transformers = lazy_import("transformers")


def start(device: str) -> None:
    """Join the process group if torchrun started several processes; only the main process prints from here on."""
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        return
    on_gpu = torch.device(device).type == "cuda"
    if on_gpu:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("cpu:gloo,cuda:nccl" if on_gpu else "gloo", timeout=datetime.timedelta(hours=1))
    if dist.get_rank():
        sys.stdout = open(os.devnull, "w")
        warnings.simplefilter("ignore")
        transformers.utils.logging.set_verbosity_error()


def several() -> bool:
    """Whether several processes share the models that are loaded now."""
    return dist.is_initialized()


def is_main() -> bool:
    """Whether this is the process that prints and writes. A single process is."""
    return int(os.environ.get("RANK", 0)) == 0


def gather(items: list) -> list:
    """The items of all processes, in the order of the processes; tensors among them move to the CPU."""
    if not several():
        return items
    lists: list[list] = [[] for _ in range(dist.get_world_size())]
    dist.all_gather_object(lists, torch.utils._pytree.tree_map_only(Tensor, lambda x: x.detach().cpu(), items))
    return [item for local_items in lists for item in local_items]


def add_up(number: int, device: torch.device) -> int:
    """The sum of all processes' numbers, each sent from the process's device."""
    if not several():
        return number
    total = torch.tensor(number, device=device)
    dist.all_reduce(total)
    return int(total)


def on_main(function: Callable[[], Any]) -> Any:
    """Run function() on the main process and broadcast its result or its BadInput: for what is costly or varies."""
    if not several():
        return function()
    result = [None]
    if is_main():
        try:
            result = [function()]
        except BadInput as error:
            result = [error]
    dist.broadcast_object_list(result)
    if isinstance(result[0], BadInput):
        raise result[0]
    return result[0]


def full_tensor(x: Tensor) -> Tensor:
    """A sharded tensor, whole, in every process; any other tensor as it is."""
    return x.full_tensor() if hasattr(x, "full_tensor") else x


def local_items(items: Sequence) -> Sequence:
    """This process's share of items of about the same size. With fewer items than processes, some share the first."""
    if not several():
        return items
    return items[dist.get_rank() :: dist.get_world_size()] or items[:1]


def shares(examples: Sequence[tree.Tree], budget: int, layout: str) -> Iterator[tuple[list[int], float]]:
    """This process's micro-batches (indices of examples), each with the weight of its loss.

    One process gets every group that rlhf/tree.py makes, with weight 1. Several processes split the examples into
    shares of about the same number of tokens. Because gathering weights and adding up gradients takes all processes, a
    process with fewer groups than another makes padding passes at the end: these have weight 0.
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
    local_groups = groups[dist.get_rank()]
    yield from (([dealt[dist.get_rank()][i] for i in group], 1.0) for group in local_groups)
    smallest = min(range(len(examples)), key=lambda i: tree.tokens(examples[i]), default=0)
    yield from [([smallest], 0.0)] * (max(map(len, groups)) - len(local_groups))
