"""ablations/ppo_tricks: each edit fits the code as it is, computes what it says, and trains."""

import importlib.util
import json
import math
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from test_ppo import PROMPTS, plain, small, world  # noqa: F401 (plain and world are fixtures)

import train_ppo
from rlhf import BadInput
from support import report

ROOT = Path(__file__).parent.parent
FOLDER = ROOT / "ablations/ppo_tricks"
TRICKS = sorted(path.stem for path in FOLDER.glob("*.diff"))
FLAGS = {  # beside those of `small`; what an edit needs in order to act
    "dual_clip": {"lr": 0.1, "epochs_per_rollout": 4},
    "reward_norm": {"reward": f"{__name__}:one_outlier", "value_init": "policy", "batch_size": 12},
}
pytestmark = pytest.mark.skipif(not shutil.which("git"), reason="git, which applies the diffs, is not installed")


@pytest.fixture
def patched(tmp_path, monkeypatch):
    """Name of an edit -> the module train_ppo with that edit, its losses included."""

    def apply(name: str):
        copy = tmp_path / f"with_{name}"
        (copy / "rlhf").mkdir(parents=True)
        for file in ("train_ppo.py", "rlhf/losses.py", "rlhf/advantages.py"):
            shutil.copy(ROOT / file, copy / file)
        alone = os.environ | {"GIT_CEILING_DIRECTORIES": str(tmp_path)}
        command = ["git", "apply", str(FOLDER / f"{name}.diff")]
        done = subprocess.run(command, cwd=copy, env=alone, capture_output=True, text=True)
        assert done.returncode == 0, f"{name}.diff does not fit the code any more: {done.stderr}"
        changed = [f for f in ("train_ppo.py", "rlhf/losses.py") if (copy / f).read_text() != (ROOT / f).read_text()]
        assert changed, f"{name}.diff changed nothing"
        script = load(copy / "train_ppo.py", f"train_ppo_{name}")
        monkeypatch.setattr(script, "losses", load(copy / "rlhf/losses.py", f"losses_{name}"))
        return script

    def load(path: Path, module: str):
        spec = importlib.util.spec_from_file_location(module, path)
        found = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, module, found)  # where dataclasses look for it
        spec.loader.exec_module(found)
        return found

    return apply


def test_each_is_small_and_in_the_table():
    """Up to 15 changed lines, before them a reason with an arXiv id; and a row of the README's table."""
    assert len(TRICKS) >= 5
    readme = (FOLDER / "README.md").read_text()
    table = re.findall(r"^\| \[(\w+)\.diff\]\((\w+)\.diff\) \|.*?arXiv (\d{4}\.\d{5})", readme, re.M)
    assert [(name, name) for name in TRICKS] == sorted(row[:2] for row in table)
    for name, _, source in table:
        why, diff = (FOLDER / f"{name}.diff").read_text().split("diff --git", 1)
        assert source in " ".join(why.split()), name
        assert 1 <= len(re.findall(r"^[+-](?![+-]{2} )", diff, re.M)) <= 15, name


# ----------------------------------------------------------------------------------------------------- values by hand

SURROGATE = {  # (ratio, advantage, old probability) -> loss, gradient to the log-prob, whether it counts as clipped
    "dual_clip": [
        ((5, -1, 0.1), 3, 0, True),
        ((4, -2, 0.1), 6, 0, True),
        ((2, -1, 0.1), 2, 2, False),
        ((5, 1, 0.1), -1.2, 0, True),
        ((0.5, -1, 0.1), 0.8, 0, True),
        ((0.5, 1, 0.1), -0.5, -0.5, False),
    ],
    "ppo_penalty": [  # gradient -A ratio + 3 (ratio - 1)
        ((2, 1, 0.1), -2 + 3 * (1 - math.log(2)), 1, True),
        ((0.5, -1, 0.1), 0.5 + 3 * (-0.5 + math.log(2)), -1, True),
        ((1, 2, 0.1), -2, -2, False),
    ],
}


@pytest.mark.parametrize("name", SURROGATE)
def test_surrogates(patched, name):
    losses = patched(name).losses
    places, wanted, gradients, outside = zip(*SURROGATE[name], strict=True)
    ratio, A, old = torch.tensor(places, dtype=torch.float64).T
    logps = (ratio * old).log().requires_grad_()
    loss = losses.ppo_clip(logps, old.log(), A, 0.2)
    torch.testing.assert_close(loss, torch.tensor(wanted, dtype=torch.float64))
    torch.testing.assert_close(torch.autograd.grad(loss.sum(), logps)[0], torch.tensor(gradients, dtype=torch.float64))
    assert losses.clipped(logps, old.log(), A, 0.2).tolist() == [*outside]


def test_value_huber(patched):
    values = torch.tensor([1.0, 0.0, 3.0], requires_grad=True)
    old, returns = torch.tensor([0.5, 0.5, 0.5]), torch.tensor([0.9, 0.9, 0.9])
    loss = patched("value_huber").losses.value_loss(values, old, returns, 0.2)
    torch.testing.assert_close(loss, torch.tensor([0.005, 0.405, 1.6]))
    torch.testing.assert_close(torch.autograd.grad(loss.sum(), values)[0], torch.tensor([0.1, -0.9, 1.0]))


# ------------------------------------------------------------------------------------------------------------- training


def one_outlier(prompts, responses, rows):
    return [100.0] + [0.0] * (len(prompts) - 1)


def two_steps(script, world, out, name=""):  # noqa: F811
    """Trains for two rollouts; what the updates and the advantages were given, and the weights."""
    seen = SimpleNamespace(places=[], scores=[])
    update, compute_advantages = script.update, script.compute_advantages

    def recorded(a, policy, reference, critic, rollout, places, *rest):
        seen.places.append([rollout.examples[i].prompt_text for i in places])
        return update(a, policy, reference, critic, rollout, places, *rest)

    def judged(a, kl_coef, kl, scores, *rest):
        seen.scores.append(scores)
        return compute_advantages(a, kl_coef, kl, scores, *rest)

    script.update, script.compute_advantages = recorded, judged
    try:
        script.main(small(world, out, max_steps=2, **FLAGS.get(name, {})))
    finally:
        script.update, script.compute_advantages = update, compute_advantages
    seen.rows = [json.loads(line) for line in open(out / "metrics.jsonl")]
    seen.weights = torch.cat([x.flatten() for x in load_file(out / "model.safetensors").values()])
    seen.critic_losses = [row.get("loss/value") for row in seen.rows]
    return seen


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in TRICKS if name != "dropout"])
def test_training(world, tmp_path, patched, monkeypatch, name):  # noqa: F811
    monkeypatch.setattr(report, "curves", lambda *rest: None)
    before = two_steps(train_ppo, world, tmp_path / "before", name)
    after = two_steps(patched(name), world, tmp_path / "after", name)
    assert [row["step"] for row in after.rows] == [1, 2]
    assert all(math.isfinite(x) for row in after.rows for x in row.values())
    assert before.rows[0]["objective/scores"] == after.rows[0]["objective/scores"]  # before any update, all is the same
    if name == "value_huber":
        assert before.critic_losses != after.critic_losses
    else:
        assert not torch.equal(before.weights, after.weights)
    if name == "reward_norm":
        rest = -1 / 6, -0.167849  # (0 - 100 / 36) / 16.6667, then (0 - 200 / 72) / 16.5490; the 100 is 5.8 above
        for scores, low in zip(after.scores, rest, strict=True):
            torch.testing.assert_close(scores, torch.tensor([5.0] + [low] * 35))


def test_dropout_is_stopped(world, tmp_path, patched):  # noqa: F811
    """The sampler's check sees that the same tokens score differently, before anything has been learnt."""
    with pytest.raises(BadInput, match=r"llama: cannot be sampled from: log-probs differ by"):
        two_steps(patched("dropout"), world, tmp_path / "out")
    assert not (tmp_path / "out/metrics.jsonl").exists()
