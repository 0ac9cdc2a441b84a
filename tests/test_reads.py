"""A step reads the device once: on a GPU the CPU then runs ahead of it, and launches do not cost time."""

import pytest
import torch
from test_parallel import SCRIPTS, world  # noqa: F401
from test_parallel import arguments as small
from torch.profiler import profile

from support import report


def reads(a) -> int:
    """Single values that the whole run reads from tensors (`.item()`, `float(x)`, `if x`), without those of the fused
    AdamW, which on a CPU reads the number of its steps."""
    with profile() as profiler:
        SCRIPTS[a.out.split("/")[-1].split("-")[0]].main(a)
    return sum(event.name == "aten::_local_scalar_dense" and not fused(event) for event in profiler.events())


def fused(event) -> bool:
    return event is not None and (event.name == "aten::_fused_adamw_" or fused(event.cpu_parent))


@pytest.mark.parametrize("name", ["dpo dpo", "dpo kto", "dpo bco", "sft", "rm pairwise"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_more_steps_read_no_more_single_values(name, dtype, world, tmp_path, monkeypatch):  # noqa: F811
    """Their metrics come in one list (`report.read`), once a step."""
    lists = []
    monkeypatch.setattr(report, "curves", lambda out, panels: None)
    read = report.read
    for module in (report, *SCRIPTS.values()):
        if getattr(module, "read", None) is read:
            monkeypatch.setattr(module, "read", lambda parts: lists.append(len(parts)) or read(parts))
    counts = []
    for steps in (4, 7):
        lists.clear()
        out = tmp_path / f"{name.split()[0]}-{steps}"
        flags = {"max_steps": steps, "eval_every": 100, "eval_prompts": 1, "dtype": dtype, "lr": 1e-12}
        counts.append(reads(small(world, out, name, **flags)))
        assert len(lists) == steps
    assert counts[0] == counts[1]


@pytest.mark.parametrize("advantage", ["rloo", "gae"])
def test_more_minibatches_read_no_more_single_values(advantage, world, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.setattr(report, "curves", lambda out, panels: None)
    monkeypatch.setattr(report, "reward_kl_plot", lambda out: None)
    counts = []
    for epochs in (1, 3):
        flags = {"max_steps": 1, "eval_prompts": 1, "epochs_per_rollout": epochs, "lr": 1e-12}
        counts.append(reads(small(world, tmp_path / f"ppo-{epochs}", f"ppo {advantage}", **flags)))
    assert counts[0] == counts[1]


def test_the_count_can_fail():
    with profile() as profiler:
        torch.ones(3).sum().item()
    assert any(event.key == "aten::_local_scalar_dense" for event in profiler.key_averages())
