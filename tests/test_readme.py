"""What the README says: its three forks done, its table of methods complete, its first command with its numbers."""

import dataclasses
import inspect
import json
import os
import re
import shutil
import subprocess
import sys
import typing
from pathlib import Path

import pytest
import torch
import transformers
import tyro

import sample
import train_dpo
import train_ppo
import train_rm
import train_sft
from rlhf import advantages, losses
from support import reviews

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
SHORT = "--max-steps 2 --batch-size 4 --eval-prompts 2 --max-new-tokens 8 --eval-fraction 0.001"


def run(where: Path, command: str, timeout: int = 120) -> str:
    command = [sys.executable, *command.split()[1:]]
    done = subprocess.run(command, cwd=where, capture_output=True, text=True, timeout=timeout, env=os.environ)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture
def clone(tmp_path):
    """The code in a folder of its own, with a small untrained model in the place of the SFT model."""
    for name in ("train_sft.py", "train_dpo.py", "train_rm.py", "train_ppo.py"):
        shutil.copy(ROOT / name, tmp_path)
    for name in ("rlhf", "support"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    tokenizer = reviews.tokenizer()
    config = reviews.config(tokenizer)
    config.hidden_size, config.intermediate_size, config.num_hidden_layers = 16, 16, 1
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path / "runs/sft")
    tokenizer.save_pretrained(tmp_path / "runs/sft")
    return tmp_path


def fork(name: str) -> tuple[str, str]:
    """The code block and the command of one worked example."""
    section = README.split(f"**{name}**")[1]
    return re.search(r"```\w+\n(.*?)```", section, re.S)[1], re.search(r"\n    (python .*)\n", section)[1]


def patch(where: Path, diff: str) -> None:
    """As a user applies it, who may have changed the file above or below."""
    (where / "new.diff").write_text(diff)
    path = where / "train_dpo.py"
    path.write_text("# a line of my own\n" + path.read_text())
    environment = os.environ | {"GIT_CEILING_DIRECTORIES": str(where.parent)}
    subprocess.run(["git", "apply", "new.diff"], cwd=where, check=True, env=environment)
    added = [line[1:] for line in diff.splitlines()[2:] if line.startswith("+")]
    assert all(line in path.read_text().splitlines() for line in added)


def test_the_commands_for_ones_own_data_follow_each_other():
    """Each parses, none writes where another does or where the quick start did, and each reads what another wrote."""
    block = README.split("## Your own model and data")[1].split("\n\n")[1]
    given = [line.split() for line in block.splitlines()]
    scripts = {"train_sft.py": train_sft, "train_dpo.py": train_dpo, "train_rm.py": train_rm, "train_ppo.py": train_ppo}
    parsed = [tyro.cli((scripts | {"sample.py": sample})[words[1]].Args, args=words[2:]) for words in given]
    sft, dpo, rm, ppo, answers = parsed
    outs = [a.out for a in parsed]
    assert len({*outs}) == len(outs) and not {*outs} & {script.Args.out for script in scripts.values()}
    assert dpo.model == rm.model == ppo.model == sft.out and ppo.reward == rm.out
    assert answers.model == dpo.out and answers.k == 1


def methods() -> str:
    """The README's table of methods."""
    return README.split("## The methods")[1].split("## Read it")[0]


def test_the_methods_table_has_every_function_of_the_mathematics():
    named = set(re.findall(r"`([a-z][a-z0-9_]*)`", methods()))
    functions = {
        name
        for module in (losses, advantages)
        for name, x in vars(module).items()
        if inspect.isfunction(x) and x.__module__ == module.__name__ and not name.startswith("_")
    }
    assert len(functions) > 35 and not functions - named


def test_every_flag_of_the_methods_table_exists():
    fields = [{f.name: f for f in dataclasses.fields(script.Args)} for script in (train_dpo, train_rm, train_ppo)]
    flags = re.findall(r"`--([a-z-]+)(?: ([a-z_+]+))?`(?:, `([a-z_]+)`)?", methods())
    assert len(flags) > 40
    for flag, *values in flags:
        name = flag.replace("-", "_")
        owners = [x[name] for x in fields if name in x]
        assert owners, f"no script has --{flag}"
        types = [x for owner in owners for x in (owner.type, *typing.get_args(owner.type))]  # of X | None too
        choices = {choice for x in types for choice in typing.get_args(x)}
        assert all(value in choices for value in values if value), f"--{flag} {values}"


@pytest.mark.parametrize("page", sorted(ROOT.glob("*.md")) + sorted(ROOT.glob("docs/*.md")), ids=lambda p: p.name)
def test_links_lead_somewhere(page):
    """Every relative link names a file, and a heading of it where it has a #."""
    for link in re.findall(r"\]\(([^)]+)\)", page.read_text()):
        name, _, heading = link.partition("#")
        if name.startswith("http"):
            continue
        target = (page.parent / name).resolve() if name else page
        assert target.exists(), f"{page.name}: {link}"
        if heading:
            titles = re.findall(r"^#+ (.*)$", target.read_text(), re.M)
            assert heading in {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}, link


@pytest.mark.slow
def test_a_new_loss(clone):
    diff, command = fork("A new loss")
    patch(clone, diff)
    run(clone, f"{command} {SHORT}")
    first = json.loads((clone / "runs/exponential/metrics.jsonl").read_text().splitlines()[1])
    assert first["step"] == 1 and first["loss"] == pytest.approx(1.0, abs=1e-4)  # exp(-beta * 0)


def test_a_new_data_set(clone):
    code, command = fork("A new data set")
    subprocess.run([sys.executable, "-c", code], cwd=clone, check=True)
    rows = [json.loads(line) for line in open(clone / "ratings.jsonl")]
    assert [row["ranks"] for row in rows] == [[1, 2], [2, 1, 2]]
    out = run(clone, f"{command} --eval-prompts 1 --max-new-tokens 4")
    assert "examples   2 of 2 rows" in out and "unknown" not in out


@pytest.mark.slow
def test_a_new_reward(clone):
    code, command = fork("A new reward")
    (clone / "mine.py").write_text(code)
    run(clone, f"{command} {SHORT}")
    results = json.loads((clone / "runs/mine/results.json").read_text())
    answers = [json.loads(line)["after"] for line in open(clone / "runs/mine/samples.jsonl")]
    wanted = [-abs(len(text.split()) - 8) for text in answers]
    assert len(answers) == 2 and results["after/score"] == pytest.approx(sum(wanted) / 2)


@pytest.mark.slow
def test_the_first_command(tmp_path):
    """A clean folder, no flags: the SFT model, then DPO, with the gain and at the price that are promised."""
    for name in ("train_sft.py", "train_dpo.py"):
        shutil.copy(ROOT / name, tmp_path)
    for name in ("rlhf", "support"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    out = run(tmp_path, "python train_dpo.py", timeout=1200)
    print(out)
    assert "runs/sft is missing: making it with train_sft.py first" in out
    found = json.loads((tmp_path / "runs/dpo/results.json").read_text())
    gain, half = map(float, re.search(r"gain in gold reward: (\S+) \+- (\S+)", README).groups())
    kl = float(re.search(r"KL to the reference.* (\S+) \+- \S+$", README, re.M)[1])
    promise = r"gained (\S+) to (\S+)\s+for\s+a\s+KL\s+of\s+(\S+)\s+to\s+(\S+)\."
    low, high, least, most = map(float, re.search(promise, README).groups())
    assert low <= gain <= high and least <= kl <= most
    assert low - half < found["gain/gold"] < high + half and found["gain/gold_interval"] == pytest.approx(half, rel=0.3)
    assert least - 0.5 < found["after/kl"] < most + 0.5, "seeds and CPUs differ"
    assert found["after/grammatical"] >= 0.9 * found["before/grammatical"]
    assert 0.78 <= found["ceiling"] <= 0.88
    assert found["after/eval/rewards/accuracies"] >= found["ceiling"] - 0.05
    assert int(re.search(r"(\d+) held-out examples", out)[1]) >= 2000
    assert len((tmp_path / "runs/dpo/samples.jsonl").read_text().splitlines()) >= 512
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "runs/dpo")
    assert model.generate(torch.tensor([[1]]), max_new_tokens=5).shape[1] > 1
