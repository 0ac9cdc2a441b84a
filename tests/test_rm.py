"""train_rm.py: the loss, what is saved, and what is said of how far the reward can be trusted."""

import dataclasses
import hashlib
import itertools
import json
import math
import os
import re
import signal
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers
import tyro
from safetensors.torch import load_file
from test_data import byte_level
from test_resume import (  # noqa: F401 (quick and server are fixtures)
    assert_same,
    contents,
    flags_of,
    logged,
    pairs,
    quick,
    server,
    wait_for,
    write_model,
    write_rows,
)
from test_sample import saved, words
from test_scripts import gradients, ranked
from tiny import ARCHITECTURES, GQA, random_examples, tiny

import train_ppo
import train_rm
from rlhf import BadInput
from support import models, report, reviews, runs, scoring
from support.examples import build
from support.generate import end_ids
from support.reward_report import calibration, correlation, held_out_report, ranks_of, true_margins
from support.rewards import load_reward
from support.runs import Run
from support.scoring import Batching

TOKENIZER = reviews.tokenizer()
EOS = TOKENIZER.eos_token_id
AT_ONCE = Batching("padded", micro_batch_tokens=10**6)


def rankings(n: int, seed: int = 0, ties: bool = True) -> list[dict]:
    """Rankings of 2, 3, 4, 2, ... responses, every second one with a tie for the best; some responses were cut."""
    rows = []
    for i, (_, row) in enumerate(reviews.rows("preference", n, seed)):
        responses = [row["chosen"], row["rejected"], "was really dull .", "it was a gem ,"][: 2 + i % 3]
        ranks = [[1, 2], [2, 1, 3], [4, 2, 1, 3]][i % 3]
        if ties and i % 2:
            ranks = [max(rank - 1, 1) for rank in ranks] if len(ranks) > 2 else ranks
        ended = [not text.endswith(",") for text in responses]
        rows.append({"prompt": row["prompt"], "responses": responses, "ranks": ranks, "ended": ended})
    return rows


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A small model and a reward model that starts from it; preferences and rankings to train on, some held out."""
    folder = tmp_path_factory.mktemp("world")
    write_model(folder / "model")
    policy, tokenizer = models.load_model(str(folder / "model"), "cpu"), reviews.tokenizer()
    torch.manual_seed(1)
    model = models.new_reward_model(policy, tokenizer)
    with torch.no_grad():
        model.score.weight *= 8  # margins of about 1
    model.config.reward_mean, model.config.reward_std = 5.0, 2.0  # which a run that starts from it forgets
    models.save(model, tokenizer, folder / "rm")
    write_rows(folder / "pairs.jsonl", pairs(14))
    margins = [row | {"margin": [0.0, 0.5, 2.0][i % 3]} for i, row in enumerate(pairs(14))]
    write_rows(folder / "margins.jsonl", [{k: v for k, v in row.items() if k != "probability"} for row in margins])
    write_rows(folder / "ranked.jsonl", rankings(12))
    write_rows(folder / "orders.jsonl", rankings(12, ties=False))
    write_rows(folder / "held.jsonl", rankings(5, seed=1))
    return folder


@pytest.fixture(autouse=True)
def plain(monkeypatch, request):
    """No report.png unless a test wants the whole run."""
    if "whole" not in request.fixturenames:
        monkeypatch.setattr(train_rm, "draw", lambda *_: None)


@pytest.fixture
def whole():
    """Asks `plain` to leave the drawing in."""


@pytest.fixture
def go(world, tmp_path):
    """Trains with small settings; returns its folder, the rows of metrics.jsonl and the results."""
    number = itertools.count()

    def run(**changes):
        out = tmp_path / f"rm{next(number)}"
        flags = {"model": f"{world}/rm", "data": f"{world}/ranked.jsonl", "eval_data": f"{world}/held.jsonl"}
        flags |= {"out": str(out), "device": "cpu", "lr": 1e-3, "batch_size": 100, "eval_prompts": 0}
        results = train_rm.main(train_rm.Args(**flags | changes))
        rows = [json.loads(line) for line in open(out / "metrics.jsonl")]
        return SimpleNamespace(
            out=out,
            results=results,
            train=[row for row in rows if "lr" in row],
            evals=[row for row in rows if "eval/loss" in row],
        )

    return run


@pytest.mark.parametrize("start", ["model", "rm"])
def test_the_next_command_is_ppo_on_prompts_of_ones_own(start, world, go, capsys):
    out = go(model=f"{world}/{start}", max_steps=1).out
    [line] = re.findall(r"Next: python train_ppo\.py (.*)\n", capsys.readouterr().out)
    policy = "POLICY" if start == "rm" else f"{world}/model"  # a reward model writes nothing
    wanted = train_ppo.Args(model=policy, reward=str(out), data="PROMPTS", out=f"{out}-ppo")
    assert tyro.cli(train_ppo.Args, args=line.split()) == wanted


@pytest.fixture
def started(monkeypatch, tmp_path):
    """The folder into which a run writes the weights that it starts from."""

    def choose(model, *args, choose_layout=scoring.choose_layout):
        if hasattr(model, "score") and not (tmp_path / "started").exists():
            model.save_pretrained(tmp_path / "started")
        return choose_layout(model, *args)

    monkeypatch.setattr(scoring, "choose_layout", choose)
    return tmp_path / "started"


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def mean(values) -> float:
    values = [*values]
    return sum(values) / len(values)


def load(folder):
    return transformers.AutoModelForSequenceClassification.from_pretrained(folder).eval()


@torch.no_grad()
def plain_rewards(folder, rows: list[dict]) -> list[list[float]]:
    """w . h of each response of each row, by transformers alone, from texts, one sequence at a time."""
    model, found = load(folder), []
    for row in rows:
        responses = row.get("responses") or [row["chosen"], row["rejected"]]
        found.append([])
        for text, ended in zip(responses, row.get("ended") or [True] * len(responses), strict=True):
            ids = TOKENIZER(f"{row['prompt']} {text}")["input_ids"] + [EOS] * ended
            found[-1].append(model(torch.tensor([ids])).logits[0, 0].item())
    return found


def ordered(row: dict) -> list[tuple[int, int]]:
    ranks = row.get("ranks") or [1, 2]
    return [(i, j) for i, a in enumerate(ranks) for j, b in enumerate(ranks) if a < b]


# ---------------------------------------------------------------------------------------------------------- the loss


def pairwise(row, r, coef=0.0, centring=0.0):
    """-log sigmoid(r_i - r_j - margin) + centring (r_i + r_j)^2, over pairs; C(k, 2) counts tied pairs too."""
    terms = [
        -math.log(sigmoid(r[i] - r[j] - coef * row.get("margin", 0))) + centring * (r[i] + r[j]) ** 2
        for i, j in ordered(row)
    ]
    return sum(terms) / math.comb(len(r), 2)


def plackett_luce(row, r):
    """The best among all, the second among those that are left, ..."""
    left = [x for _, x in sorted(zip(row["ranks"], r, strict=True))]
    return sum(math.log(sum(math.exp(x) for x in left[i:])) - left[i] for i in range(len(left)))


def best_of_k(row, r):
    best = [x for rank, x in zip(row["ranks"], r, strict=True) if rank == min(row["ranks"])]
    return math.log(sum(map(math.exp, r))) - mean(best)


LOSSES = {  # data, flags, loss of a row
    "pairs": ("pairs", {}, pairwise),
    "rankings with ties": ("ranked", {}, pairwise),
    "margins": ("margins", {"margin_coef": 0.7}, lambda row, r: pairwise(row, r, coef=0.7)),
    "centring": ("ranked", {"centring": 0.1}, lambda row, r: pairwise(row, r, centring=0.1)),
    "plackett_luce": ("orders", {"loss": "plackett_luce"}, plackett_luce),
    "best_of_k": ("ranked", {"loss": "best_of_k"}, best_of_k),
}


@pytest.mark.parametrize("name", LOSSES)
def test_the_first_loss_and_its_metrics_by_hand(name, world, go):
    """At the weights of a reward model, by transformers alone; the held-out numbers are those of the same rows."""
    data, flags, loss = LOSSES[name]
    path = world / f"{data}.jsonl"
    rows = [json.loads(line) for line in open(path)]
    run = go(data=str(path), eval_data=str(path), micro_batch_tokens=150, **flags)
    r = plain_rewards(world / "rm", rows)

    def weighted(value):
        """Over all rows, each row's pairs sharing its weight."""
        return mean(mean(value(row, x[i], x[j]) for i, j in ordered(row)) for row, x in zip(rows, r, strict=True))

    def right(row, x, y):
        p = row.get("probability", 1.0)
        return p if x > y else 1 - p

    want = {
        "loss": mean(loss(row, x) for row, x in zip(rows, r, strict=True)),
        "rewards/margins": weighted(lambda _, x, y: x - y),
        "rewards/accuracies": weighted(right),
        "rewards/chosen": weighted(lambda _, x, y: x),
        "rewards/rejected": weighted(lambda _, x, y: y),
    }
    assert 0 < want["rewards/accuracies"] < 1 and abs(want["rewards/margins"]) > 0.01
    assert {name: run.train[0][name] for name in want} == pytest.approx(want, rel=1e-4, abs=1e-5)
    assert {name: run.evals[0][f"eval/{name}"] for name in want} == pytest.approx(want, rel=1e-4, abs=1e-5)
    assert run.evals[0]["step"] == 0 and run.evals[-1]["step"] == 1 and len(run.train) == 1
    assert run.evals[-1]["eval/loss"] < want["loss"]  # a step on these very rows


def test_from_a_policy_too(world, go, started):
    """The weights of the language model with a new head, which the seed decides; the loss is that of these weights."""
    rows = [json.loads(line) for line in open(world / "ranked.jsonl")]
    run = go(model=f"{world}/model")
    r = plain_rewards(started, rows)
    assert run.train[0]["loss"] == pytest.approx(mean(pairwise(*x) for x in zip(rows, r, strict=True)), rel=1e-4)
    mine, policy = load_file(started / "model.safetensors"), load_file(world / "model" / "model.safetensors")
    assert {*mine} - {*policy} == {"score.weight"}
    assert all(torch.equal(mine[name], policy[name]) for name in {*mine} & {*policy})
    losses = [go(model=f"{world}/model", max_steps=1, seed=seed).train[0]["loss"] for seed in (0, 1)]
    assert losses[0] == run.train[0]["loss"] != losses[1]


@pytest.mark.parametrize(
    "name",
    ["rankings with ties", *(pytest.param(n, marks=pytest.mark.slow) for n in LOSSES if n != "rankings with ties")],
)
def test_gradient_and_metrics_depend_neither_on_the_budget_nor_on_the_layout(name, world, go, monkeypatch):
    """Over the steps of two batches; the weights hardly move. Held-out metrics depend on no batch either."""
    data, flags, _ = LOSSES[name]
    flags = flags | {"data": f"{world}/{data}.jsonl", "lr": 1e-9, "batch_size": 8}
    flags |= {"eval_data": f"{world}/orders.jsonl"} if name == "plackett_luce" else {}
    settings = [("tree", 10**6), ("tree", 60), ("padded", 10**6), ("padded", 1)]
    found = [
        gradients(monkeypatch, go, layout=layout, micro_batch_tokens=budget, **flags) for layout, budget in settings
    ]
    (wanted, first), *others = found
    assert len(wanted) == 2
    for gradient, run in others:
        for mine, theirs in zip(gradient, wanted, strict=True):
            assert (mine - theirs).norm() / theirs.norm() < 1e-5
        for mine, theirs in zip(run.train + run.evals, first.train + first.evals, strict=True):
            numbers = [{k: v for k, v in row.items() if "perf" not in k} for row in (mine, theirs)]
            assert numbers[0] == pytest.approx(numbers[1], rel=1e-5, abs=1e-5)
    assert len({len(run.evals) for _, run in found}) == 1 and len(first.evals) == 2


def test_the_reward_of_a_dialogue_is_at_its_end(world, go, tmp_path):
    """Of pairs that part before their last turn, by transformers' own class; both layouts agree."""
    said = lambda role, text: {"role": role, "content": text}  # noqa: E731
    more = [said("user", "the plot was dull ,"), said("assistant", "good .")]
    rows = [
        {"prompt": [said("user", row["prompt"])], "chosen": [said("assistant", row["chosen"]), *more]}
        | {"rejected": row["rejected"]}
        for row in pairs(9)
    ]
    write_rows(tmp_path / "dialogues.jsonl", rows)
    data = f"{tmp_path}/dialogues.jsonl"
    tokenizer = reviews.tokenizer()
    examples, _ = build([(f"d:{i}", row) for i, row in enumerate(rows)], tokenizer, "preference", 512, 1024)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(world / "rm").eval()
    with torch.no_grad():
        r = [[model(torch.tensor([e.prompt + y])).logits.item() for y in e.responses] for e in examples]
    assert [tokenizer.decode(e.responses[0][-3:]) for e in examples] == ["good . <eos>"] * 9
    want = {"loss": mean(-math.log(sigmoid(x - y)) for x, y in r), "rewards/chosen": mean(x for x, _ in r)}
    runs = [go(data=data, eval_data=data, layout=layout, micro_batch_tokens=100) for layout in ("tree", "padded")]
    assert {name: runs[0].train[0][name] for name in want} == pytest.approx(want, rel=1e-4, abs=1e-5)
    for mine, theirs in zip(*(run.train + run.evals for run in runs), strict=True):
        numbers = [{k: v for k, v in row.items() if "perf" not in k} for row in (mine, theirs)]
        assert numbers[0] == pytest.approx(numbers[1], rel=1e-5, abs=1e-5)
    trained = [[sum(mask) for mask in e.trained] for e in examples]
    longer = mean((x > y) + 0.5 * (x == y) for x, y in trained)
    assert runs[0].results["longer_wins"] == pytest.approx(longer) and longer < 1


def test_the_gradient_is_that_of_the_library(world, go, monkeypatch):
    """Two rows, their pairs by hand, and autograd through transformers' own class: backbone and head."""
    rows = rankings(2)
    data = write_rows(world / "two.jsonl", rows)
    [found], _ = gradients(monkeypatch, go, data=str(data), lr=1e-12)
    model = load(world / "rm")
    loss = 0.0
    for row in rows:
        ids = [
            TOKENIZER(f"{row['prompt']} {text}")["input_ids"] + [EOS] * ended
            for text, ended in zip(row["responses"], row["ended"], strict=True)
        ]
        r = [model(torch.tensor([x])).logits[0, 0] for x in ids]
        for i, j in ordered(row):
            loss = loss - torch.nn.functional.logsigmoid(r[i] - r[j]) / math.comb(len(r), 2) / len(rows)
    loss.backward()
    want = torch.cat([w.grad.flatten() for w in model.parameters()])
    assert (found - want).norm() / want.norm() < 1e-4


def test_tied_margins_count_half():
    """A margin that is rounding only is half right, whatever the label's probability."""
    examples = [ranked([1, 2], probability=0.9), ranked([1, 2], probability=0.9), ranked([1, 2], probability=0.9)]
    rewards = torch.tensor([1.0, 1.0 + 1e-5, 2.0, 1.0, 0.0, 3.0])
    _, totals = train_rm.objective(train_rm.Args(), examples, rewards)
    assert report.weighted_means([totals])["rewards/accuracies"] == pytest.approx((0.5 + 0.9 + 0.1) / 3)


def test_bfloat16_hardly_changes_the_loss(world, go):
    runs = [go(dtype=dtype) for dtype in ("float32", "bfloat16")]
    assert runs[1].train[0]["loss"] == pytest.approx(runs[0].train[0]["loss"], rel=0.02)
    assert {w.dtype for w in load_file(runs[1].out / "model.safetensors").values()} == {torch.float32}


def test_the_starting_model_samples_in_the_runs_dtype(world, go, monkeypatch):
    """A float32 copy of it would take twice the memory of the model that was trained."""
    seen, answer = [], train_rm.answer

    def watched(policy, *rest, dtype, **more):
        seen.append((policy.get_input_embeddings().weight.dtype, dtype))
        return answer(policy, *rest, dtype=dtype, **more)

    monkeypatch.setattr(train_rm, "answer", watched)
    for dtype in ("float32", "bfloat16"):
        go(dtype=dtype, eval_prompts=2, max_steps=1, model=f"{world}/model")
    assert seen == [(torch.float32,) * 2, (torch.bfloat16,) * 2]


# ---------------------------------------------------------------------------------------------- ties, and bad input


def cli(monkeypatch, world, out, **changes) -> int:
    """Exit code of the command with small settings and these flags."""
    flags = {"model": world / "rm", "data": world / "ranked.jsonl", "out": out, "device": "cpu", "eval-prompts": 0}
    flags |= {"eval-data": world / "held.jsonl"}
    flags |= {name.replace("_", "-"): value for name, value in changes.items()}
    given = [
        [f"--{name}"] if value is True else [f"--{name}", str(value)]
        for name, value in flags.items()
        if value is not None
    ]
    monkeypatch.setattr(sys, "argv", ["train_rm.py", *sum(given, [])])
    try:
        runs.cli(train_rm.main, train_rm.Args)
    except SystemExit as stop:
        return stop.code
    return 0


@pytest.fixture
def refused(world, tmp_path, monkeypatch, capfd):
    """Exit code 2, one line that says so, and nothing written."""

    def check(*message: str, **changes):
        capfd.readouterr()
        assert cli(monkeypatch, world, tmp_path / "run", **changes) == 2
        lines = capfd.readouterr().err.splitlines()
        assert len(lines) == 1 and lines[0].startswith("error: "), lines
        assert all(part in lines[0] for part in message), lines
        assert not (tmp_path / "run").exists() or not [*(tmp_path / "run").iterdir()]

    return check


def test_ties_of_plackett_luce(world, go, refused):
    refused("ranked.jsonl:2: field 'ranks' has ties", "--ties drop or random", loss="plackett_luce")
    rows = [json.loads(line) for line in open(world / "ranked.jsonl")]
    whole = [row for row in rows if len(set(row["ranks"])) == len(row["ranks"])]
    assert 3 < len(whole) < len(rows)
    r = dict(zip([row["prompt"] for row in rows], plain_rewards(world / "rm", rows), strict=True))
    flags = {"loss": "plackett_luce", "eval_data": None, "eval_fraction": 0.0}
    drop = go(ties="drop", **flags)
    assert drop.train[0]["loss"] == pytest.approx(mean(plackett_luce(row, r[row["prompt"]]) for row in whole), rel=1e-4)

    def orders(row):
        """The loss under each order that the ties allow."""
        all_orders = itertools.permutations(range(1, len(row["ranks"]) + 1))
        kept = [o for o in all_orders if all(o[i] < o[j] for i, j in ordered(row))]
        return [plackett_luce({"ranks": o}, r[row["prompt"]]) for o in kept]

    low, high = (mean(f(orders(row)) for row in rows) for f in (min, max))
    losses = {seed: go(ties="random", seed=seed, **flags).train[0]["loss"] for seed in (0, 1)}
    assert all(low - 1e-5 <= x <= high + 1e-5 for x in losses.values()) and len({*losses.values()}) > 1
    assert go(ties="random", **flags).train[0]["loss"] == losses[0]


def test_flags_that_do_not_fit_together(refused):
    refused("--margin-coef: no row of", "has a 'margin'", margin_coef=1.0)
    for loss in ("best_of_k", "plackett_luce"):
        refused("--centring is of --loss pairwise only", loss=loss, centring=0.01, ties="drop")
        refused("--margin-coef is of --loss pairwise only", loss=loss, margin_coef=1.0, ties="drop")
    for name, value in {"margin_coef": -1, "centring": -0.1, "lr": 0, "batch_size": 0, "eval_fraction": 1}.items():
        refused(f"--{name.replace('_', '-')} must be", **{name: value})


def test_split_by_keeps_values_apart(world, tmp_path, go, refused, monkeypatch):
    """Topics by their hash: 28 rows of 7 topics; a column that is not there is one line with the first row's place."""
    rows = [row | {"meta": {"topic": f"topic {i % 7}"}} for i, row in enumerate(pairs(28))]
    topic_hashes = [int(hashlib.sha256(f"topic {i}".encode()).hexdigest()[:16], 16) / 16**16 for i in range(7)]
    held = {f"topic {i}" for i, share in enumerate(topic_hashes) if share < 0.5}
    data = write_rows(tmp_path / "topics.jsonl", rows)
    seen = {}

    def objective(a, examples, rewards, objective=train_rm.objective):
        seen.setdefault(rewards.requires_grad, set()).update(e.row["meta"]["topic"] for e in examples)
        return objective(a, examples, rewards)

    with monkeypatch.context() as patch:
        patch.setattr(train_rm, "objective", objective)
        go(data=str(data), eval_data=None, eval_fraction=0.5, split_by="meta.topic")
    assert seen[False] == held and seen[True] == {f"topic {i}" for i in range(7)} - held and 0 < len(held) < 7
    refused("topics.jsonl:1: field 'meta.theme' is missing", data=data, eval_data=None, split_by="meta.theme")
    refused("--split-by", "--eval-fraction", data=data, eval_data=None, split_by="meta.topic", eval_fraction=1e-9)


def test_bad_data_and_models(world, tmp_path, refused):
    empty = write_rows(tmp_path / "bad.jsonl", [rankings(1)[0] | {"ended": [True]}])
    refused("bad.jsonl:1: field 'ended' is not a list of true or false", data=empty)
    refused("no such file or folder", data=tmp_path / "none.jsonl")
    refused("--model", "no such folder", model=tmp_path / "none")
    config = tiny("llama").config
    config.num_labels = 2
    models.save(transformers.LlamaForSequenceClassification(config), words(), tmp_path / "two")
    write_rows(tmp_path / "w.jsonl", [{"prompt": "w5", "chosen": "w6", "rejected": "w7"}])
    refused("--model", "2 labels", model=tmp_path / "two", data=tmp_path / "w.jsonl", eval_data=tmp_path / "w.jsonl")


@pytest.mark.parametrize("name", ["granite", "cohere2"])
def test_an_architecture_without_a_classifier_is_one_line(name, tmp_path, tmp_path_factory, refused):
    data = write_rows(tmp_path / "w.jsonl", [{"prompt": "w5", "chosen": "w6", "rejected": "w7"}])
    folder = saved(tmp_path_factory.getbasetemp(), name)
    refused("no sequence classifier for", name, model=folder, data=data, eval_data=data)


def test_a_reward_model_is_no_language_model(world):
    """Its head for the next word is gone; the library would make one up."""
    with pytest.raises(BadInput) as error:
        models.load_model(f"{world}/rm", "cpu")
    assert "--model" in str(error.value) and "\n" not in str(error.value)


def test_dry_run_shows_three_examples_and_writes_nothing(world, tmp_path, monkeypatch, capfd):
    before = sorted(world.rglob("*"))
    assert cli(monkeypatch, world, tmp_path / "run", dry_run=True) == 0
    out = capfd.readouterr().out
    assert "examples   12 of 12 rows" in out and "12 examples to train on, 5 held out" in out
    assert out.count("ranked.jsonl:") == 3 and out.count("tokens trained") + out.count(" trained") >= 6
    assert not [*tmp_path.iterdir()] and sorted(world.rglob("*")) == before


@pytest.mark.parametrize("most", [0.01, 1e3])
def test_the_step_is_made_with_a_gradient_of_at_most_max_grad_norm(go, most, monkeypatch):
    """A longer gradient is scaled to it, a shorter one is as it was; `grad_norm` is the norm before."""
    seen = []

    class Adam(torch.optim.AdamW):
        def step(self):
            norms = [w.grad.norm().square() for group in self.param_groups for w in group["params"]]
            seen.append(sum(norms).sqrt().item())
            super().step()

    monkeypatch.setattr(torch.optim, "AdamW", Adam)
    norms = [row["grad_norm"] for row in go(max_steps=2, epochs=2, max_grad_norm=most).train]
    assert min(norms) > 0.02 and len(norms) == 2
    assert seen == pytest.approx([min(norm, most) for norm in norms], rel=1e-4)


def test_a_loss_that_explodes_is_stopped(go):
    with pytest.raises(FloatingPointError, match=r"step 2: the loss is \S+ and the gradient norm \S+ \(rows ranked"):
        go(lr=1e30, max_grad_norm=1e30, batch_size=4, eval_every=100)


# ---------------------------------------------------------------------------------------------------------- the head


@pytest.mark.parametrize("seed", range(3))
def test_the_new_head(seed):
    """N(0, 1 / sqrt(d + 1)), d = 1,024: its deviation within 10 %, its mean within 4 standard errors; no bias."""
    d = 1024
    config = transformers.LlamaConfig(**dict(GQA, hidden_size=d, intermediate_size=8, num_hidden_layers=1))
    with torch.device("meta"):
        policy = transformers.LlamaForCausalLM(config)
    policy = policy.to_empty(device="cpu").eval()
    torch.manual_seed(seed)
    model = models.new_reward_model(policy, words())
    assert model.score.weight.shape == (1, d) and model.score.bias is None
    assert model.score.weight.std().item() == pytest.approx(1 / math.sqrt(d + 1), rel=0.1)
    assert abs(model.score.weight.mean().item()) < 4 / d
    assert model.base_model is policy.base_model and model.config.num_labels == 1


def llama(tokenizer, tie: bool = True):
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**dict(GQA, vocab_size=len(tokenizer)), tie_word_embeddings=tie)
    return transformers.LlamaForCausalLM(config).eval()


PADS = {  # tokenizer, the pad token it is given, whether it is new
    "pad of its own": (lambda: byte_level(), "<pad>", False),
    "pad is eos": (lambda: byte_level(pad="</s>"), "<s>", False),
    "no pad": (lambda: byte_level(pad=None), "<s>", False),
    "no pad, bos is eos": (lambda: byte_level(bos="</s>", adds_bos=False, pad=None), "<|pad|>", True),
    "pad is eos, no bos": (lambda: byte_level(bos=None, pad="</s>"), "<|pad|>", True),
}
LETTERS = [
    {"prompt": "p" * (i + 1), "chosen": "abc"[: 1 + i % 3] * 2, "rejected": "xyz"[i % 3] * (i + 1)} for i in range(8)
]


@pytest.mark.parametrize("name", PADS)
def test_the_pad_id_is_never_the_eos_id(name, tmp_path, go):
    """In the saved config and tokenizer; where a token is new, the embeddings have a row for it. And the whole run goes
    through, the answers of the language model included, which does not know the new token."""
    make, pad, new = PADS[name]
    models.save(llama(make()), make(), tmp_path / "model")
    data = str(write_rows(tmp_path / "letters.jsonl", LETTERS))
    run = go(model=str(tmp_path / "model"), data=data, eval_data=data, eval_prompts=4, max_new_tokens=3)
    tokenizer = transformers.AutoTokenizer.from_pretrained(run.out)
    config = json.loads((run.out / "config.json").read_text())
    assert tokenizer.pad_token == pad and config["pad_token_id"] == tokenizer.pad_token_id != tokenizer.eos_token_id
    rows = load_file(run.out / "model.safetensors")["model.embed_tokens.weight"].shape[0]
    assert rows == len(make()) + new == len(tokenizer) == config["vocab_size"]
    rewards = load_reward(str(run.out))(["p", "ppp"], ["abc", "x"], [{}, {"ended": False}])
    model = load(run.out)
    for prompt, text, ended, reward in [("p", "abc", True, rewards[0]), ("ppp", "x", False, rewards[1])]:
        ids = tokenizer(prompt)["input_ids"] + tokenizer(text, add_special_tokens=False)["input_ids"]
        ids += [tokenizer.eos_token_id] * ended
        with torch.no_grad():
            raw = model(torch.tensor([ids])).logits[0, 0].item()
        assert reward == pytest.approx(raw - config["reward_mean"], abs=1e-5)


# ----------------------------------------------------------------------------------- what the library reads back

FEW = ["llama", "gpt2", "opt", "mistral"]
WITHOUT = {"granite", "cohere2"}
MORE = [name for name in ARCHITECTURES if name not in WITHOUT and name not in FEW]


@pytest.mark.parametrize("name", [*FEW, *(pytest.param(name, marks=pytest.mark.slow) for name in MORE)])
def test_the_library_gives_our_score(name, tmp_path, tmp_path_factory, go):
    """AutoModelForSequenceClassification of the run: response_rewards + reward_mean, within 1e-5; alone and in a batch,
    padded to the right and to the left, cut ones without EOS among them."""
    rows = [
        {"prompt": "w7 w9", "responses": ["w5", "w30 w31 w32"], "ranks": [1, 2], "ended": [True, False]},
        {"prompt": "w20 w21 w22 w23 w24 w25 w26", "responses": ["w8 w9", "w3", "w4 w4"], "ranks": [3, 1, 2]},
        {"prompt": "w3", "responses": ["w11 w12 w13 w14 w15 w16 w17", ""], "ranks": [1, 2], "ended": [False, True]},
    ]
    folder = saved(tmp_path_factory.getbasetemp(), name)
    data = write_rows(tmp_path / "w.jsonl", rows)
    flags = {"model": str(folder), "data": str(data), "eval_data": str(data)}
    run = go(epochs=2, lr=1e-2, eval_prompts=3, max_new_tokens=3, **flags)
    assert run.train[1]["loss"] < run.train[0]["loss"]

    tokenizer = words()
    ours = models.load_reward_model(str(run.out), "cpu")
    examples = build([(f"w:{i}", row) for i, row in enumerate(rows)], tokenizer, "responses", 50, 100)[0]
    mean_reward = ours.config.reward_mean
    assert mean_reward != 0
    want = torch.cat(scoring.score_rewards(ours, examples, AT_ONCE)) + mean_reward
    theirs = load(run.out)
    sequences = [e.prompt + response for e in examples for response in e.responses]
    width = max(map(len, sequences))
    pad = theirs.config.pad_token_id
    assert pad == 0 and pad != theirs.config.eos_token_id
    with torch.no_grad():
        alone = torch.stack([theirs(torch.tensor([ids])).logits[0, 0] for ids in sequences])
        padded = {
            "right": [ids + [pad] * (width - len(ids)) for ids in sequences],
            "left": [[pad] * (width - len(ids)) + ids for ids in sequences],
        }
        for side, rows_of_ids in padded.items():
            ids = torch.tensor(rows_of_ids)
            mask = (ids != pad).long()
            given = {"position_ids": (mask.cumsum(1) - 1).clamp(min=0)} if name == "gpt2" and side == "left" else {}
            found = theirs(ids, attention_mask=mask, **given).logits[:, 0]
            assert found.tolist() == pytest.approx(want.tolist(), abs=1e-5), side
    assert alone.tolist() == pytest.approx(want.tolist(), abs=1e-5)


# ------------------------------------------------------------------------------------------- the mean of the reward


def test_the_mean_is_that_of_the_sft_models_own_samples(world, go, monkeypatch):
    """Read back, the reward has mean 0 on the very answers that the language model gave; samples.jsonl has them."""
    seen = {}

    def answer(policy, *args, answer=train_rm.answer, **kwargs):
        seen["weights"] = {k: v.clone() for k, v in policy.state_dict().items()}
        seen["answers"] = answer(policy, *args, **kwargs)
        return seen["answers"]

    monkeypatch.setattr(train_rm, "answer", answer)
    run = go(model=f"{world}/model", eval_prompts=4, max_new_tokens=5, epochs=2)
    own = models.load_model(f"{world}/model", "cpu").state_dict()
    assert all(torch.equal(seen["weights"][name], weight) for name, weight in own.items())
    held = [json.loads(line)["prompt"] for line in open(world / "held.jsonl")]
    assert [e.prompt_text for e in seen["answers"]] == held[:4]

    model = models.load_reward_model(str(run.out), "cpu")
    rewards = torch.cat(scoring.score_rewards(model, seen["answers"], AT_ONCE)).double()
    assert abs(rewards.mean().item()) < 1e-4
    assert rewards.std(correction=0).item() == pytest.approx(model.config.reward_std, rel=1e-4)
    assert run.results["reward_mean"] == model.config.reward_mean and run.results["reward_std"] > 0
    rows = [json.loads(line) for line in open(run.out / "samples.jsonl")]
    assert [row["reward"] for row in rows] == pytest.approx(sorted(rewards.tolist(), reverse=True), abs=1e-5)
    texts = {(e.prompt_text, e.response_texts[0]) for e in seen["answers"]}
    assert {(row["prompt"], row["answer"]) for row in rows} == texts

    ends = end_ids(models.load_model(f"{world}/model", "cpu"), TOKENIZER)
    ended = {(e.prompt_text, e.response_texts[0]): e.responses[0][-1] in ends for e in seen["answers"]}
    places = [(row["prompt"], row["answer"]) for row in rows]
    scored = load_reward(str(run.out))(*zip(*places, strict=True), [{"ended": ended[place]} for place in places])
    special = [len(TOKENIZER(text, add_special_tokens=False)["input_ids"]) + ended[p, text] for p, text in places]
    lengths = {(e.prompt_text, e.response_texts[0]): len(e.responses[0]) for e in seen["answers"]}
    same = [n == lengths[place] for n, place in zip(special, places, strict=True)]  # no <pad> or <bos> was sampled
    assert any(same)
    for fits, x, row in zip(same, scored, rows, strict=True):
        assert not fits or x == pytest.approx(row["reward"], abs=1e-5)


def test_without_answers_the_mean_is_over_the_data(world, go):
    """--eval-prompts 0, or a reward model to start from: the held-out responses, each counted once."""
    rows = [json.loads(line) for line in open(world / "held.jsonl")]
    for flags in ({"model": f"{world}/model"}, {"eval_prompts": 4}):
        run = go(**flags)
        raw = [x for r in plain_rewards(run.out, rows) for x in r]
        config = json.loads((run.out / "config.json").read_text())
        assert config["reward_mean"] == pytest.approx(mean(raw), abs=1e-5)
        assert config["reward_std"] == pytest.approx(math.sqrt(mean((x - mean(raw)) ** 2 for x in raw)), rel=1e-4)
    unseen = go(eval_data=None, eval_fraction=0.0, max_steps=1)
    train = [json.loads(line) for line in open(world / "ranked.jsonl")]
    assert unseen.results["reward_mean"] == pytest.approx(
        mean(x for r in plain_rewards(unseen.out, train) for x in r), abs=1e-5
    )
    assert "accuracy" not in unseen.results and not unseen.evals


def test_a_reward_model_goes_on(world, go):
    """Two runs of one step each, the second from the first: what it starts from is what the first reached."""
    first = go(eval_data=f"{world}/ranked.jsonl")
    second = go(model=str(first.out), eval_data=f"{world}/ranked.jsonl")
    assert second.evals[0]["eval/loss"] == pytest.approx(first.evals[-1]["eval/loss"], rel=1e-5)
    assert second.evals[0]["eval/rewards/chosen"] == pytest.approx(first.evals[-1]["eval/rewards/chosen"], abs=1e-5)
    assert second.evals[-1]["eval/loss"] < first.evals[-1]["eval/loss"]
    assert transformers.AutoTokenizer.from_pretrained(second.out).get_vocab() == TOKENIZER.get_vocab()


# --------------------------------------------------------------------------------------------------------- the report


def test_ranks_and_correlation_by_hand():
    values = torch.tensor([3.0, 1.0, 3.0, 2.0, 1.0, 1.0])
    assert ranks_of(values).tolist() == [5.5, 2.0, 5.5, 4.0, 2.0, 2.0]
    assert ranks_of(torch.tensor([0.5, -1.0, 7.0])).tolist() == [2.0, 1.0, 3.0]
    x, y = torch.tensor([1.0, 2.0, 3.0, 6.0]), torch.tensor([2.0, 1.0, 4.0, 5.0])
    # deviations -2 -1 0 3 and -1 -2 1 2: 10 / sqrt(14 * 10)
    assert correlation(x, y) == pytest.approx(10 / math.sqrt(140))
    assert correlation(x, -3 * x + 1) == pytest.approx(-1)
    assert math.isnan(correlation(x, torch.ones(4)))
    # Spearman: ranks 1 2 3 4 and 1.5 1.5 3 4: 4.5 / sqrt(5 * 4.5)
    tied = correlation(ranks_of(x), ranks_of(torch.tensor([0.0, 0.0, 1.0, 9.0])))
    assert tied == pytest.approx(4.5 / math.sqrt(5 * 4.5))


def test_calibration_by_hand():
    """Confidences 0.61 and 0.63, 0.93 and 0.94, the second and the third against the label; bins of width 0.05."""
    logit = lambda p: math.log(p / (1 - p))  # noqa: E731
    margins = torch.tensor([logit(0.61), -logit(0.63), -logit(0.93), logit(0.94)]).double()
    right = torch.tensor([1.0, 0.7, 1.0, 0.8]).double()
    weights = torch.tensor([1.0, 1.0, 0.5, 0.5]).double()
    rows, error = calibration(margins, right, weights)
    assert len(rows) == 2
    low, high = rows
    assert low == pytest.approx([0.62, (1 + 0.3) / 2, 2 / 3])
    assert high == pytest.approx([0.935, (0 + 0.8) / 2, 1 / 3])
    assert error == pytest.approx(2 / 3 * abs(0.62 - 0.65) + 1 / 3 * abs(0.935 - 0.4))


def test_calibration_in_closed_form():
    """Where P(label) = sigmoid(margin) nothing is off; certainty that is right half of the time is off by 0.5."""
    margins = torch.linspace(-6, 6, 401).double()
    rows, error = calibration(margins, margins.sigmoid(), torch.ones(401).double())
    assert error == pytest.approx(0, abs=1e-9) and len(rows) == 10 and sum(w for *_, w in rows) == pytest.approx(1)
    assert [x for x, *_ in rows] == sorted(x for x, *_ in rows)
    sure = torch.tensor([40.0, -40.0]).double()
    assert calibration(sure, torch.ones(2).double(), torch.ones(2).double())[1] == pytest.approx(0.5)
    assert calibration(sure.abs(), torch.ones(2).double(), torch.ones(2).double())[1] == pytest.approx(0)


def test_a_tied_margin_is_as_sure_as_it_is_right():
    """Margin 0 is confidence 1/2 and, as in the accuracy, half right: nothing is off."""
    rows, error = calibration(torch.zeros(3).double(), torch.ones(3).double(), torch.ones(3).double())
    assert rows == [[0.5, 0.5, 1.0]] and error == 0


def made_up():
    """Three rankings of made-up rewards: lengths 2 3 4 of ranks 1 2 2; 2 3 of 2 1; 2 3 with a label of P = 0.8."""
    examples = [ranked([1, 2, 2]), ranked([2, 1]), ranked([1, 2], probability=0.8)]
    examples = [dataclasses.replace(e, prompt_text=f"prompt {i}") for i, e in enumerate(examples)]
    rewards = [torch.tensor([1.0, 0.0, 2.0]), torch.tensor([0.5, 1.5]), torch.tensor([3.0, 1.0])]
    return examples, rewards


def longer_side(p: float, error: float, t: float) -> float:
    """Of the interval by Wilson 1927, with n = p (1 - p) / error^2 values."""
    n = p * (1 - p) / error**2
    centre, half = p + t * t / (2 * n), t * math.sqrt(p * (1 - p) / n + t * t / (4 * n * n))
    return max(abs((centre + side * half) / (1 + t * t / n) - p) for side in (-1, 1))


def test_what_is_said_of_held_out_rankings_by_hand():
    """Margins +1 and -1 of weight 1/2, +1 of weight 1, +2 of weight 1 and P = 0.8."""
    examples, rewards = made_up()
    rows, results, (curve, unit, bars, by_length) = held_out_report(examples, rewards, None, embedded=False)
    accuracy = [0.5, 1.0, 0.8]
    assert results["accuracy"] == pytest.approx(mean(accuracy))
    deviation = math.sqrt(sum((x - mean(accuracy)) ** 2 for x in accuracy) / 2)
    wanted = longer_side(mean(accuracy), deviation / math.sqrt(3), 4.303)  # t(2)
    assert results["accuracy_interval"] == pytest.approx(wanted, rel=1e-3)
    # the longer one: loses both pairs of the first, wins the second, loses the third, whose label may be wrong
    assert results["longer_wins"] == pytest.approx((0.0 + 1.0 + 0.2) / 3)
    assert results["ceiling"] == pytest.approx((1.0 + 1.0 + 0.8) / 3)
    # confidences sigmoid(1) three times, of which 1/2 + 1 of 2 right, and sigmoid(2), right with 0.8
    one, two = sigmoid(1), sigmoid(2)
    assert results["ece"] == pytest.approx(2 / 3 * abs(one - 0.75) + 1 / 3 * abs(two - 0.8))
    assert curve == [pytest.approx([one, 0.75, 2 / 3]), pytest.approx([two, 0.8, 1 / 3])]
    lengths, flat = [2.0, 3.0, 4.0, 2.0, 3.0, 2.0, 3.0], [1.0, 0.0, 2.0, 0.5, 1.5, 3.0, 1.0]
    assert by_length == (lengths, flat)
    u, v = ([x - mean(values) for x in values] for values in (lengths, flat))
    dot = lambda x, y: sum(a * b for a, b in zip(x, y, strict=True))  # noqa: E731
    assert results["length_correlation"] == pytest.approx(dot(u, v) / math.sqrt(dot(u, u) * dot(v, v)))
    assert unit == "" and bars == []  # all pairs are one place apart
    table = {name.strip(): value for name, value in rows}
    assert table["held-out accuracy"].startswith("0.767 +- ")
    assert table["(best possible with these labels)"] == "0.933"


def test_intervals_are_over_prompts_or_over_the_values_split_by():
    """Accuracies 1/2, 1 and 0.8: deviations -4/15, 7/30, 1/30; with the first two of one group their sum is -1/30."""
    examples, rewards = made_up()
    alike = [dataclasses.replace(e, prompt_text="aab"[i]) for i, e in enumerate(examples)]
    _, results, _ = held_out_report(alike, rewards, None, embedded=False)
    wanted = longer_side(2.3 / 3, math.sqrt(2 * 2 * (1 / 30) ** 2) / 3, 12.706)  # t(1)
    assert results["accuracy_interval"] == pytest.approx(wanted, rel=1e-3)
    topics = [dataclasses.replace(e, row={"meta": {"topic": "t"}}) for e in examples]
    rows, results, _ = held_out_report(topics, rewards, "meta.topic", embedded=False)
    assert results["accuracy_interval"] == math.inf  # one group gives none
    assert dict(rows)["held-out accuracy"] == "0.767"


def test_accuracy_by_the_size_of_the_margin_by_hand():
    """Annotated margins 1 ... 8: quartiles at 2.75, 4.5 and 6.25, two pairs between each."""
    examples = [dataclasses.replace(ranked([1, 2], probability=0.9), margin=float(m)) for m in range(1, 9)]
    signs = [1, -1, 1, 1, -1, -1, 1, 1]
    rewards = [torch.tensor([s * 1.0, 0.0]) for s in signs]
    rows, results, (_, unit, bars, _) = held_out_report(examples, rewards, None, embedded=False)
    assert unit == "annotated difference"
    assert [b[:2] for b in bars] == [[1.0, 2.75], [2.75, 4.5], [4.5, 6.25], [6.25, 8.0]]
    assert [b[2] for b in bars] == pytest.approx([0.5, 0.9, 0.1, 0.9])
    assert [b[4] for b in bars] == pytest.approx([0.9] * 4)
    found = [value for name, value in results.items() if name.startswith("accuracy/margin")]
    assert found == pytest.approx([0.5, 0.9, 0.1, 0.9])
    assert any("annotated difference differs by 1" in name and "to 2.75" in name for name, _ in rows)


def test_small_margins_keep_their_buckets_apart():
    """Of margins below a hundredth too, each bucket has a name of its own."""
    examples = [dataclasses.replace(ranked([1, 2]), margin=m / 1000) for m in range(1, 9)]
    rewards = [torch.tensor([1.0, 0.0])] * 8
    _, results, (_, _, bars, _) = held_out_report(examples, rewards, None, embedded=False)
    assert len(bars) == 4 == len([name for name in results if name.startswith("accuracy/margin")])


def test_true_margins():
    """Gold where it is known, else what the annotator saw or said, else places of the ranking."""
    texts = ["was superb .", "was dull .", "was great ."]
    e = dataclasses.replace(ranked([1, 3, 2]), prompt_text="the plot", response_texts=texts)
    assert true_margins([e], True) == ("gold reward", pytest.approx([5 / 1.474, 1 / 1.474, 4 / 1.474]))
    assert true_margins([e], False) == ("places", [2.0, 1.0, 1.0])
    seen = dataclasses.replace(e, rewards=[0.5, -1.0, 0.75], noise=0.1)
    assert true_margins([seen], False) == ("annotated difference", [1.5, 0.25, 1.75])
    assert true_margins([seen, e], False)[0] == "places"  # one of them does not say
    assert true_margins([ranked([1, 2])], False) == ("", [])


def test_one_tie_throughout_the_held_out_rewards():
    """All rewards equal: half right, and nothing to correlate."""
    examples, _ = made_up()
    _, results, _ = held_out_report(examples, [torch.zeros(len(e.ranks)) for e in examples], None, False)
    assert results["accuracy"] == 0.5 and results["ece"] == pytest.approx(0)
    assert math.isnan(results.get("length_correlation", math.nan))


def test_the_report_is_that_of_the_saved_model(world, go):
    """Accuracy and ceiling of the results, from the rewards of the folder that was written."""
    path = world / "pairs.jsonl"
    rows = [json.loads(line) for line in open(path)]
    run = go(eval_data=str(path), lr=1e-2)
    right = [
        row["probability"] if x > y else 1 - row["probability"]
        for row, (x, y) in zip(rows, plain_rewards(run.out, rows), strict=True)
    ]
    assert run.results["accuracy"] == pytest.approx(mean(right), abs=1e-6)
    assert run.results["ceiling"] == pytest.approx(
        mean(max(row["probability"], 1 - row["probability"]) for row in rows)
    )
    assert run.results["accuracy"] == pytest.approx(run.evals[-1]["eval/rewards/accuracies"], abs=1e-6)
    longer = []
    for row in rows:
        gap = len(row["chosen"].split()) - len(row["rejected"].split())
        longer.append(0.5 if gap == 0 else row["probability"] if gap > 0 else 1 - row["probability"])
    assert run.results["longer_wins"] == pytest.approx(mean(longer))
    assert -1 <= run.results["gold_spearman"] <= 1
    assert json.loads((run.out / "results.json").read_text()) == run.results


@pytest.mark.parametrize("held", [1, pytest.param(5, marks=pytest.mark.slow)])
def test_what_a_run_leaves(held, world, go, whole, tmp_path, monkeypatch):
    """Files and columns, report.png drawn; a single held-out row has no interval, and is enough."""
    monkeypatch.undo()
    data = write_rows(tmp_path / "few.jsonl", rankings(5, seed=1)[:held])
    run = go(model=f"{world}/model", eval_data=str(data), eval_prompts=2, max_new_tokens=4)
    names = {path.name for path in run.out.iterdir()}
    assert names >= {"args.json", "train_rm.py", "metrics.jsonl", "samples.jsonl", "curves.png", "report.png"}
    assert names >= {"config.json", "model.safetensors", "tokenizer.json", "results.json", "checkpoint"}
    for name in ("report.png", "curves.png"):
        assert (run.out / name).read_bytes()[:4] == b"\x89PNG" and (run.out / name).stat().st_size > 5000
    read = json.loads((run.out / "results.json").read_text(), parse_constant=lambda x: pytest.fail(f"{x} is no JSON"))
    assert read["accuracy"] == run.results["accuracy"]
    [architecture] = json.loads((run.out / "config.json").read_text())["architectures"]
    assert architecture == "LlamaForSequenceClassification"
    assert {"prompt", "answer", "reward", "step"} == {*json.loads(open(run.out / "samples.jsonl").readline())}


# ------------------------------------------------------------------------------------------------- stop and go on

STOPPED_AT, SAVED_AT = 5, 3


def arguments(world: Path, out: Path, **changes) -> train_rm.Args:
    """8 steps, in 4 epochs of 8 and 4 rankings."""
    flags = {"model": f"{world}/model", "data": f"{world}/ranked.jsonl", "eval_data": f"{world}/held.jsonl"}
    flags |= {"out": str(out), "device": "cpu", "lr": 3e-3, "batch_size": 8, "epochs": 4, "micro_batch_tokens": 200}
    flags |= {"eval_every": 2, "save_every": SAVED_AT, "eval_prompts": 3, "max_new_tokens": 4}
    return train_rm.Args(**flags | changes)


@pytest.fixture(scope="module")
def straight(world):
    """The folder of the run that was never stopped."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(report, "curves", lambda out, panels: None)
        patch.setattr(train_rm, "draw", lambda *_: None)
        train_rm.main(arguments(world, world / "straight"))
    return world / "straight"


def continued(a: train_rm.Args) -> None:
    train_rm.main(dataclasses.replace(a, resume=True))


def stand_still(flags: list[str], step: int, printed: Path) -> None:
    """In another process: train_rm.py, which waits for a signal once the row of `step` is in metrics.jsonl."""
    for stream in (1, 2):
        os.dup2(os.open(printed, os.O_CREAT | os.O_WRONLY | os.O_APPEND), stream)
    log = Run.log

    def log_and_wait(self, at, metrics):
        log(self, at, metrics)
        while at == step and not self.interrupted:
            time.sleep(0.005)

    Run.log, report.curves, train_rm.draw = log_and_wait, lambda out, panels: None, lambda *_: None
    sys.argv = ["train_rm.py", *flags]
    runs.cli(train_rm.main, train_rm.Args)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL], ids=lambda n: n.name)
def test_killed_and_continued_is_the_same_run(number, world, straight, server, tmp_path):  # noqa: F811
    a = arguments(world, tmp_path / "run")
    process = server.Process(target=stand_still, args=(flags_of(a), STOPPED_AT, tmp_path / "printed"))
    process.start()
    try:
        wait_for(lambda: logged(tmp_path / "run", STOPPED_AT) or not process.is_alive())
        assert process.is_alive(), (tmp_path / "printed").read_text()
        os.kill(process.pid, number)
        process.join(60)
    finally:
        process.kill()
        process.join()
    [checkpoint] = (tmp_path / "run" / "checkpoint").iterdir()
    printed = (tmp_path / "printed").read_text()
    if number == signal.SIGKILL:
        assert process.exitcode == -number and checkpoint.name == f"step-{SAVED_AT}"
    else:
        assert process.exitcode == 128 + number and checkpoint.name == f"step-{STOPPED_AT}"
        assert f"stopped after step {STOPPED_AT}" in printed and "Traceback" not in printed
    assert not (tmp_path / "run" / "results.json").exists()
    continued(a)
    assert_same(tmp_path / "run", straight)


@pytest.mark.parametrize(
    "where", ["log", "save", *(pytest.param(n, marks=pytest.mark.slow) for n in ("answer", "finish"))]
)
def test_stopped_and_continued_is_the_same_run(where, world, straight, tmp_path, monkeypatch):
    """In the middle of training, two steps after a checkpoint; and at each place after the last step."""
    a = arguments(world, tmp_path / "run")
    places = {"log": (Run, "log"), "answer": (train_rm, "answer"), "save": (models, "save"), "finish": (Run, "finish")}
    owner, name = places[where]
    own = getattr(owner, name)

    def stop(*args, **kwargs):
        if where != "log" or args[1] == STOPPED_AT:
            raise KeyboardInterrupt
        own(*args)

    with monkeypatch.context() as patch:
        patch.setattr(owner, name, stop)
        with pytest.raises(KeyboardInterrupt):
            train_rm.main(a)
    [checkpoint] = (tmp_path / "run" / "checkpoint").iterdir()
    assert checkpoint.name == ("step-3" if where == "log" else "step-8")
    continued(a)
    assert_same(tmp_path / "run", straight)
    configs = [json.loads((out / "config.json").read_text()) for out in (tmp_path / "run", straight)]
    assert configs[0] == configs[1] and configs[0]["reward_mean"] != 0


def test_a_run_is_not_overwritten_and_other_flags_are_refused(world, straight, tmp_path, monkeypatch):
    before = contents(straight)
    with pytest.raises(BadInput, match="already holds a run"):
        train_rm.main(arguments(world, straight))
    with pytest.raises(BadInput, match="is complete"):
        continued(arguments(world, straight))
    with pytest.raises(BadInput, match="holds no run to continue"):
        continued(arguments(world, tmp_path / "none"))
    assert contents(straight) == before

    def stop(self, step, metrics, log=Run.log):
        if step == STOPPED_AT:
            raise KeyboardInterrupt
        log(self, step, metrics)

    a = arguments(world, tmp_path / "run")
    with monkeypatch.context() as patch:
        patch.setattr(Run, "log", stop)
        with pytest.raises(KeyboardInterrupt):
            train_rm.main(a)
    with pytest.raises(BadInput) as error:
        continued(dataclasses.replace(a, loss="best_of_k", seed=3))
    assert "--loss pairwise -> best_of_k" in str(error.value) and "--seed 0 -> 3" in str(error.value)
    assert "\n" not in str(error.value)
    continued(dataclasses.replace(a, save_every=1))
    assert_same(tmp_path / "run", straight)


# ------------------------------------------------------------------------------------------------------- the layouts


@pytest.mark.parametrize("name", ["llama", "mistral", "opt", "gemma2"])
def test_scores_depend_neither_on_the_budget_nor_on_the_layout(name):
    """Where the check allows the tree, it gives the padded layout's rewards, at every size of a forward pass."""
    torch.manual_seed(0)
    model = models.new_reward_model(tiny(name), words())
    model.config.reward_mean = 0.25
    examples = random_examples([(3, [2, 4, 9]), (12, [1, 1]), (1, [5]), (7, [3, 8, 2, 6])])
    layout = scoring.choose_layout(model, examples, Batching("auto"))
    assert layout == ("padded" if name == "gemma2" else "tree")
    models.set_attention(model, packed=False)
    with torch.no_grad():
        want = [
            [
                model(torch.tensor([e.prompt + r]), attention_mask=torch.ones(1, len(e.prompt + r))).logits[0, 0].item()
                - 0.25
                for r in e.responses
            ]
            for e in examples
        ]
    for budget in (1, 40, 10**6):
        found = scoring.score_rewards(model, examples, Batching(layout, micro_batch_tokens=budget))
        assert [len(x) for x in found] == [3, 2, 1, 4]
        for x, y in zip(found, want, strict=True):
            assert x.tolist() == pytest.approx(y, abs=1e-4)
