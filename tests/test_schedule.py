"""--schedule: how the learning rate goes on after the warm-up, in all four training scripts."""

import json

import pytest
import torch
from test_ppo import small, world  # noqa: F401

import train_dpo
import train_ppo
import train_rm
import train_sft
from support.runs import schedule


def test_linear_and_constant_by_hand():
    assert [schedule(i, 4, 0.0, "linear") for i in range(4)] == [1, 0.75, 0.5, 0.25]
    assert [schedule(i, 6, 0.34, "linear") for i in range(6)] == pytest.approx([1 / 3, 2 / 3, 1, 1, 2 / 3, 1 / 3])
    assert [schedule(i, 6, 0.34, "constant") for i in range(6)] == pytest.approx([1 / 3, 2 / 3, 1, 1, 1, 1])
    assert [schedule(i, 3, 0.0, "constant") for i in range(3)] == [1, 1, 1]
    assert [schedule(i, 3, 0.0) for i in range(3)] == pytest.approx([1, 0.75, 0.25])  # cosine


def test_defaults():
    assert {train_sft.Args().schedule, train_dpo.Args().schedule, train_rm.Args().schedule} == {"cosine"}
    assert train_ppo.Args().schedule == "linear" and train_ppo.Args().warmup == 0


@pytest.mark.parametrize("kind", ["linear", "constant"])
@pytest.mark.parametrize("script", [train_sft, train_dpo, train_rm, train_ppo], ids=lambda script: script.__name__)
def test_the_flag_reaches_the_optimizer(script, kind, world, tmp_path, monkeypatch):  # noqa: F811
    rates, step = [], torch.optim.AdamW.step

    def spy(self, *args):
        rates.append(self.param_groups[0]["lr"])
        return step(self, *args)

    monkeypatch.setattr(torch.optim.AdamW, "step", spy)
    flags = {
        "lr": 0.004,
        "warmup": 0.25,
        "max_steps": 4,
        "schedule": kind,
        "eval_prompts": 0,
        "out": str(tmp_path / "x"),
    }
    if script is train_ppo:
        one = {"advantage": "rloo", "epochs_per_rollout": 1, "minibatches": 1}
        script.main(small(world, **flags, **one))
    else:
        files = {"model": f"{world}/model", "data": f"{world}/pairs.jsonl", "eval_fraction": 0.0, "device": "cpu"}
        script.main(script.Args(**flags, **files, batch_size=3))
    after = [0.004, 0.004 * 2 / 3, 0.004 / 3] if kind == "linear" else [0.004] * 3
    assert rates == pytest.approx([0.004, *after])
    logged = [json.loads(line) for line in open(tmp_path / "x" / "metrics.jsonl")]
    assert [row["lr"] for row in logged if "lr" in row] == rates
