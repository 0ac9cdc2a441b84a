"""train_sft.py and train_dpo.py from the command line to the result, on a tiny Llama."""

import ast
import dataclasses
import hashlib
import inspect
import itertools
import json
import math
import os
import re
import resource
import shlex
import shutil
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers
import tyro
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from test_resume import pairs, write_model, write_rows
from tiny import ARCHITECTURES, GQA, VOCAB, example, random_examples, tiny

import train_dpo
import train_sft
from rlhf import BadInput, losses
from rlhf.tree import collate
from support import models, refcache, report, reviews, runs, scoring
from support.examples import build
from support.examples import load as load_examples
from support.generate import generate
from support.preferences import without_ties
from support.runs import schedule

ROOT = Path(__file__).parent.parent
BETA = 0.3
SCRIPTS = {"dpo": train_dpo, "sft": train_sft}
ALL_LOSSES = [*train_dpo.LOSSES, "kto", "plackett_luce"]


@pytest.fixture(scope="session")
def world(tmp_path_factory):
    """The folder of a small model, another one for a reference, 22 pairs to train on and 5 held out."""
    folder = tmp_path_factory.mktemp("world")
    write_model(folder / "model")
    write_model(folder / "other", seed=1)
    write_rows(folder / "train.jsonl", pairs(22))
    write_rows(folder / "held.jsonl", pairs(5, seed=1))
    return folder


@pytest.fixture(autouse=True)
def quick(monkeypatch, request):
    """No drawing and no calls of git unless a test wants the whole run, and our own signal handlers afterwards."""
    if "whole" not in request.fixturenames:
        monkeypatch.setattr(report, "curves", lambda out, panels: None)
        monkeypatch.setattr(runs, "environment", dict)
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    yield
    for number, handler in zip((signal.SIGINT, signal.SIGTERM), before, strict=True):
        signal.signal(number, handler)


@pytest.fixture
def whole():
    """Asks `quick` to leave everything in."""


@pytest.fixture
def go(world, tmp_path):
    """Runs a script with small settings; returns its folder, the rows of metrics.jsonl and the results."""
    number = itertools.count()

    def run(script: str = "dpo", **changes):
        out = tmp_path / f"{script}{next(number)}"
        flags = {"model": f"{world}/model", "data": f"{world}/train.jsonl", "eval_data": f"{world}/held.jsonl"}
        flags |= {"out": str(out), "device": "cpu", "lr": 1e-3, "batch_size": 8, "eval_prompts": 0}
        if script == "dpo":
            flags |= {"loss": "dpo", "beta": BETA, "ref_cache": f"{tmp_path}/cache"}
        flags |= changes
        results = SCRIPTS[script].main(SCRIPTS[script].Args(**flags))
        rows = [json.loads(line) for line in open(Path(flags["out"]) / "metrics.jsonl")]
        return SimpleNamespace(
            out=Path(flags["out"]),
            results=results,
            train=[row for row in rows if "lr" in row],
            evals=[row for row in rows if "eval/loss" in row],
        )

    return run


@pytest.fixture
def steps(monkeypatch):
    """The examples of each optimizer step from here on."""
    seen = []

    def spy(model, examples, batching, micro_batches=scoring.micro_batches):
        if torch.is_grad_enabled():
            seen.append(list(examples))
        return micro_batches(model, examples, batching)

    monkeypatch.setattr(scoring, "micro_batches", spy)
    return seen


def load(folder) -> torch.nn.Module:
    return transformers.AutoModelForCausalLM.from_pretrained(folder).eval()


def read(path, kind: str = "preference"):
    """The examples of a file, as the scripts have them."""
    rows = [(f"{path.name}:{i}", json.loads(line)) for i, line in enumerate(open(path), 1)]
    return build(rows, reviews.tokenizer(), kind, 512, 1024)[0]


@torch.no_grad()
def plain_logps(model, examples) -> list[list[float]]:
    """log pi of every response by the library's own logits, a sequence at a time."""
    found = []
    for e in examples:
        found.append([])
        for response in e.responses:
            logps = model(torch.tensor([e.prompt + response])).logits[0].double().log_softmax(-1)
            found[-1].append(sum(logps[len(e.prompt) - 1 + j, token].item() for j, token in enumerate(response)))
    return found


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def mean(values) -> float:
    values = [*values]
    return sum(values) / len(values)


# ------------------------------------------------------------------------------------------------------------ losses

E = 0.1  # label smoothing where there is one
AT_ZERO = {  # the loss of a pair where the policy is the reference, from lp and n of chosen and rejected
    "dpo": lambda w, r, n, m: math.log(2),
    "robust": lambda w, r, n, m: math.log(2),
    "dpo_norm": lambda w, r, n, m: math.log(2),
    "dpop": lambda w, r, n, m: math.log(2),
    "plackett_luce": lambda w, r, n, m: math.log(2),
    "ipo": lambda w, r, n, m: 1 / (4 * BETA**2),
    "ipo_norm": lambda w, r, n, m: 1 / (4 * BETA**2),
    "hinge": lambda w, r, n, m: 1.0,
    "nca": lambda w, r, n, m: 2 * math.log(2),
    "bco": lambda w, r, n, m: 2 * math.log(2),
    "sppo": lambda w, r, n, m: 1 / (2 * BETA**2),
    "apo_zero": lambda w, r, n, m: 1.0,
    "apo_down": lambda w, r, n, m: 1.0,
    "exo": lambda w, r, n, m: -math.log(4 * E * (1 - E)) / 2,
    "discopop": lambda w, r, n, m: (math.log(2) + 1) / 2,
    "kto": lambda w, r, n, m: 0.5,
    "r_dpo": lambda w, r, n, m: -math.log(sigmoid(0.02 * (n - m))),
    "dpo_nll": lambda w, r, n, m: math.log(2) - 0.7 * w / n,
    "simpo": lambda w, r, n, m: -math.log(sigmoid(BETA * (w / n - r / m - 0.4))),
    "orpo": lambda w, r, n, m: -w / n - 0.2 * math.log(sigmoid(log_odds(w / n) - log_odds(r / m))),
}


def log_odds(a: float) -> float:
    return a - math.log(1 - math.exp(a))


@pytest.fixture(scope="session")
def train_logps(world):
    """The pairs to train on, and their log-probs under the starting weights."""
    examples = read(world / "train.jsonl")
    return examples, plain_logps(load(world / "model"), examples)


def test_every_loss_has_a_value_at_the_start():
    assert sorted(AT_ZERO) == sorted(ALL_LOSSES)


@pytest.mark.parametrize("loss", ALL_LOSSES)
def test_every_loss_from_its_value_at_the_start(loss, go, train_logps):
    """Two steps on all 22 ragged pairs, in several micro-batches; the first loss is the closed form at D = 0."""
    settings = {
        "length_penalty": 0.02,
        "nll_coef": 0.7,
        "dpop_lambda": 2.0,
        "gamma_beta_ratio": 0.4,
        "orpo_lambda": 0.2,
    }
    if loss in ("dpo", "robust", "exo"):
        settings["label_smoothing"] = E
    run = go(loss=loss, batch_size=22, max_steps=2, epochs=2, micro_batch_tokens=150, **settings)
    want = mean(AT_ZERO[loss](*logps, *map(len, e.responses)) for e, logps in zip(*train_logps, strict=True))
    assert run.train[0]["loss"] == pytest.approx(want, rel=1e-4)
    assert len(run.train) == 2
    if loss != "discopop":  # which is not convex, and has a bump at 0
        assert run.train[1]["loss"] < run.train[0]["loss"]  # the same data: it has learnt
    assert all(math.isfinite(value) for row in run.train + run.evals for value in row.values())
    assert run.evals[0]["eval/loss"] != run.evals[-1]["eval/loss"]


def dialogues(n: int, seed: int = 0) -> list[dict]:
    """Pairs of dialogues that part in their first answer. All chosen ones go on for a turn, and half of the others."""
    said = lambda role, text: [{"role": role, "content": text}]  # noqa: E731
    rows = []
    for i, row in enumerate(pairs(n, seed)):
        start, more = said("user", row["prompt"]), said("user", "it was" + " dull" * i) + said("assistant", "bad .")
        sides = [start + said("assistant", row[side]) for side in ("chosen", "rejected")]
        rows.append({"chosen": sides[0] + more, "rejected": sides[1] + (more if i % 2 else [])})
    return rows


@torch.no_grad()
def masked_logps(model, examples) -> list[list[float]]:
    """log pi of the trained tokens of every response by the library's own logits, a sequence at a time."""
    found = []
    for e in examples:
        found.append([])
        for response, mask in zip(e.responses, e.trained, strict=True):
            logps = model(torch.tensor([e.prompt + response])).logits[0].double().log_softmax(-1)
            scored = [j for j, trained in enumerate(mask) if trained]
            found[-1].append(sum(logps[len(e.prompt) - 1 + j, response[j]].item() for j in scored))
    return found


@pytest.fixture(scope="session")
def dialogue_logps(world):
    """The pairs of dialogues, and the log-probs of their answers under the starting weights."""
    write_rows(world / "dialogues.jsonl", dialogues(8))
    examples = read(world / "dialogues.jsonl")
    assert all(0 < sum(mask) < len(mask) for e in examples for mask in e.trained[:1])
    return examples, masked_logps(load(world / "model"), examples)


@pytest.mark.parametrize("loss", ALL_LOSSES)
def test_every_loss_on_dialogues_is_that_of_their_answers(loss, world, go, dialogue_logps, capsys):
    """The first loss and log-probs by the library's logits at the trained tokens; both layouts give the same run."""
    settings = {"length_penalty": 0.02, "nll_coef": 0.7, "dpop_lambda": 2.0, "gamma_beta_ratio": 0.4}
    settings |= {"orpo_lambda": 0.2} | ({"label_smoothing": E} if loss in ("dpo", "robust", "exo") else {})
    data = f"{world}/dialogues.jsonl"
    settings |= {"loss": loss, "data": data, "eval_data": data, "max_steps": 2, "epochs": 2, "micro_batch_tokens": 120}
    tree, padded = (go(layout=layout, **settings) for layout in ("tree", "padded"))
    pairs = [*zip(*dialogue_logps, strict=True)]
    want = mean(AT_ZERO[loss](*logps, *(sum(mask) for mask in e.trained)) for e, logps in pairs)
    losses_at_first = [tree.train[0]["loss"], tree.evals[0]["eval/loss"]]
    assert losses_at_first == pytest.approx([want, want], rel=1e-4)
    for i, side in enumerate(("chosen", "rejected")):
        assert tree.train[0][f"logps/{side}"] == pytest.approx(mean(logps[i] for _, logps in pairs), abs=1e-3)
    for mine, theirs in zip(tree.train + tree.evals, padded.train + padded.evals, strict=True):
        numbers = [{k: v for k, v in row.items() if "perf" not in k} for row in (mine, theirs)]
        assert numbers[0] == pytest.approx(numbers[1], rel=1e-5, abs=1e-5)
    weights = [load_file(run.out / "model.safetensors") for run in (tree, padded)]
    assert all((x - weights[1][name]).abs().max() < 1e-4 for name, x in weights[0].items())


def test_z0_of_kto_is_of_the_trained_tokens(world, go, dialogue_logps, monkeypatch):
    seen = []

    def spy(*args, z0=None, objective=train_dpo.objective):
        seen.append(args[6])
        return objective(*args)

    monkeypatch.setattr(train_dpo, "objective", spy)
    data, examples = f"{world}/dialogues.jsonl", read(world / "dialogues.jsonl", "unpaired")
    others = [
        dataclasses.replace(e, responses=[y], trained=[mask])
        for e, (y, mask) in zip(examples, train_dpo.mismatched(examples * 2, 0), strict=False)
    ]
    largest = 0.0
    for model, ref in (("model", "other"), ("other", "model")):  # one of them has a mean above 0
        seen.clear()
        go(loss="kto", data=data, eval_data=data, model=f"{world}/{model}", ref=f"{world}/{ref}", max_steps=1)
        both = [masked_logps(load(world / name), others) for name in (model, ref)]
        want = max(0.0, mean(x - y for [x], [y] in zip(*both, strict=True)))
        assert seen[1].item() == pytest.approx(want, abs=1e-4)
        largest = max(largest, want)
    assert largest > 0.01


def test_cached_reference_log_probs_are_of_the_trained_tokens(world, go, dialogue_logps, capsys):
    """A second run reads them. Rows with the same tokens and another mask have log-probs of their own."""
    examples, logps = dialogue_logps
    data = f"{world}/dialogues.jsonl"
    first, second = (go(data=data, eval_data=data, max_steps=1) for _ in range(2))
    assert capsys.readouterr().out.count("reference log-probs: from") == 1
    assert first.train[0]["logps/chosen_delta"] == pytest.approx(0, abs=1e-4)
    assert first.train[0]["logps/chosen_delta"] == second.train[0]["logps/chosen_delta"]
    model, tokenizer = load(world / "model"), reviews.tokenizer()
    whole = [dataclasses.replace(e, trained=None) for e in examples]
    keys = [refcache.cache_key(models.digest(model), tokenizer, x)["rows"] for x in (examples, whole)]
    assert keys[0] != keys[1]


@pytest.mark.parametrize("divergence", ["forward_kl", "js", "alpha", "chi_po"])
def test_every_divergence(divergence, go):
    run = go(divergence=divergence, batch_size=22, max_steps=2, epochs=2, clip=3.0)
    assert run.train[0]["loss"] == pytest.approx(math.log(2), abs=1e-4) and run.train[1]["loss"] < run.train[0]["loss"]
    assert run.train[1]["rewards/margins"] > 0


@pytest.mark.parametrize("loss", ["dpo", "ipo", "bco", "plackett_luce"])
def test_the_objective_has_the_reward_of_its_divergence(loss):
    """D is 0.8 and -0.4: the loss, gradient and reward metrics by the rewards' formulas."""
    rewards = {
        "reverse_kl": lambda D: D,
        "forward_kl": lambda D: 1 - math.exp(-D),
        "js": lambda D: math.log(2 * math.exp(D) / (1 + math.exp(D))),
        "alpha": lambda D: (math.exp(-0.7 * D) - 1) / -0.7,
        "chi_po": lambda D: math.exp(D) - 1 + D,
    }
    of = {
        "dpo": lambda w, r: -math.log(sigmoid(BETA * (w - r))),
        "plackett_luce": lambda w, r: -math.log(sigmoid(BETA * (w - r))),
        "ipo": lambda w, r: (w - r - 1 / (2 * BETA)) ** 2,
        "bco": lambda w, r: -math.log(sigmoid(BETA * w - 0.2)) - math.log(sigmoid(0.2 - BETA * r)),
    }[loss]
    for divergence, reward in rewards.items():
        a = train_dpo.Args(loss=loss, beta=BETA, divergence=divergence, divergence_alpha=0.3)
        logps = torch.tensor([-2.0, -5.0], dtype=torch.float64, requires_grad=True)
        reference = torch.tensor([-2.8, -4.6], dtype=torch.float64)
        total, totals = train_dpo.objective(a, [ranked([1, 2])], logps, reference, torch.tensor([2, 3]), delta=0.2)
        w, r = reward(0.8), reward(-0.4)
        assert total.item() == pytest.approx(of(w, r), rel=1e-9), divergence
        found = train_dpo.means([totals])
        assert (found["rewards/chosen"], found["rewards/rejected"]) == pytest.approx((BETA * w, BETA * r)), divergence
        step = 1e-6
        slope = (of(reward(0.8 + step), r) - of(reward(0.8 - step), r)) / (2 * step)
        assert torch.autograd.grad(total, logps)[0][0].item() == pytest.approx(slope, rel=1e-6), divergence


def ranked(ranks: list[int], probability: float = 1.0):
    return example([5], [[6] * (i + 2) for i in range(len(ranks))], ranks=ranks, probability=probability)


def test_objective_over_rankings_with_ties():
    """Pairs of ranks 1 2 2: two of weight 1/2; of 2 1 3: three of weight 1/3; of 1 2: one. Tied pairs do not count."""
    examples = [ranked([1, 2, 2]), ranked([2, 1, 3]), ranked([1, 2], probability=0.8)]
    policy = [-3.0, -5.0, -4.0, -2.0, -9.0, -6.5, -4.0, -4.5]
    reference = [-3.5, -4.0, -4.2, -2.5, -8.0, -6.5, -3.0, -4.0]
    lengths = torch.tensor([len(r) for e in examples for r in e.responses])
    D = [x - y for x, y in zip(policy, reference, strict=True)]
    weighted = {(0, 1): 1 / 2, (0, 2): 1 / 2, (3, 5): 1 / 3, (4, 3): 1 / 3, (4, 5): 1 / 3, (6, 7): 1}

    def total(value):
        return sum(weight * value(w, r) for (w, r), weight in weighted.items())

    def right(w, r):
        p = 0.8 if w == 6 else 1.0
        return p if D[w] > D[r] else 1 - p if D[w] < D[r] else 0.5

    a = train_dpo.Args(loss="dpo", beta=BETA)
    loss, totals = train_dpo.objective(a, examples, torch.tensor(policy), torch.tensor(reference), lengths)
    want = {
        "loss": total(lambda w, r: -math.log(sigmoid(BETA * (D[w] - D[r])))),
        "rewards/accuracies": total(right),
        "rewards/margins": total(lambda w, r: BETA * (D[w] - D[r])),
        "rewards/chosen": total(lambda w, r: BETA * D[w]),
        "rewards/rejected": total(lambda w, r: BETA * D[r]),
        "logps/chosen": total(lambda w, r: policy[w]),
        "logps/rejected": total(lambda w, r: policy[r]),
        "logps/chosen_delta": total(lambda w, r: D[w]),
        "logps/rejected_delta": total(lambda w, r: D[r]),
    }
    assert loss.item() == pytest.approx(want["loss"], rel=1e-5)
    assert {name: value.item() for name, (value, _) in totals.items()} == pytest.approx(want, rel=1e-5)
    assert all(weight == pytest.approx(len(examples)) for _, weight in totals.values())
    assert train_dpo.means([totals]) == pytest.approx({name: value / 3 for name, value in want.items()}, rel=1e-5)


def test_accuracy_of_a_tied_margin_is_one_half():
    examples = [ranked([1, 2], probability=0.9), ranked([1, 2], probability=0.9)]
    logps = torch.tensor([-1.0, -2.0, -1.0, -3.0])
    reference = torch.tensor([-2.0, -3.0, -2.0, -3.0])  # margins 0 and 1
    totals = train_dpo.objective(train_dpo.Args(beta=1.0), examples, logps, reference, torch.ones(4).long())[1]
    assert train_dpo.means([totals])["rewards/accuracies"] == pytest.approx((0.5 + 0.9) / 2)


@pytest.mark.parametrize("beta", [0.3, 3.0])
@pytest.mark.parametrize("loss, lengths", [("dpo", [2, 2]), ("dpo_norm", [2, 2]), ("kto", [2])])
def test_what_counts_as_a_tie_is_measured_in_nats(beta, loss, lengths):
    """0.9e-4 nats of a response's log-ratio are a tie, 1.1e-4 are none, whatever beta and length."""
    for gap, right in ((0.9e-4, 0.5), (1.1e-4, 1.0)):
        e = example([5], [[6]], labels=[True]) if loss == "kto" else ranked([1, 2])
        logps = torch.tensor([gap, 0.0][: len(lengths)], dtype=torch.float64)
        a, z0 = train_dpo.Args(loss=loss, beta=beta), torch.zeros(())
        totals = train_dpo.objective(a, [e], logps, torch.zeros_like(logps), torch.tensor(lengths), z0=z0)[1]
        assert train_dpo.means([totals])["rewards/accuracies"] == right, gap


@pytest.mark.parametrize("loss", ["bco", "kto", "plackett_luce"])
def test_metrics_hold_no_graph_and_delta_begins_at_0(loss):
    labels = [True, False] if loss == "kto" else None
    e = example([5], [[6], [7, 8]], labels=labels)
    logps = torch.tensor([-1.0, -2.0], requires_grad=True)
    a, z0 = train_dpo.Args(loss=loss, beta=BETA), torch.zeros(())
    total, totals = train_dpo.objective(a, [e], logps, torch.tensor([-1.0, -2.0]), torch.tensor([1, 2]), z0=z0)
    assert total.requires_grad and not any(x.requires_grad for x, _ in totals.values())
    at_zero = {"bco": 2 * math.log(2), "kto": 2 * 0.5, "plackett_luce": math.log(2)}[loss]
    assert total.item() == pytest.approx(at_zero, rel=1e-6)


def test_per_token_rewards():
    examples = [ranked([1, 2])]
    logps, reference = torch.tensor([-1.0, -5.0]), torch.tensor([-2.0, -3.0])
    for loss in train_dpo.PER_TOKEN:
        a = train_dpo.Args(loss=loss, beta=2.0)
        found = train_dpo.means([train_dpo.objective(a, examples, logps, reference, torch.tensor([2, 4]))[1]])
        assert found["rewards/chosen"] == pytest.approx(2 * 1 / 2)
        assert found["rewards/rejected"] == pytest.approx(2 * -2 / 4)


def test_plackett_luce_of_ragged_rankings():
    """-log P of the ranking, best first: the product of the best's share among those that are left."""
    examples = [ranked([3, 1, 2]), ranked([2, 1])]
    logps = torch.tensor([-2.0, -1.0, -4.0, -3.0, -2.5])
    r = [BETA * x for x in logps.tolist()]
    e = [math.exp(x) for x in r]
    want = -math.log(e[1] / (e[0] + e[1] + e[2]) * e[2] / (e[2] + e[0])) - math.log(e[4] / (e[3] + e[4]))
    a = train_dpo.Args(loss="plackett_luce", beta=BETA)
    loss, totals = train_dpo.objective(a, examples, logps, torch.zeros(5), torch.ones(5).long())
    assert loss.item() == pytest.approx(want, rel=1e-5) and totals["loss"][1] == 2


def test_kto_objective_by_hand():
    z0, weights, labels = 0.5, (1.5, 0.8), [True, False, False]
    examples = [example([5], [[6, 7]], labels=[label]) for label in labels]
    logps, reference = torch.tensor([-1.0, -2.0, -3.0]), torch.tensor([-2.0, -2.5, -1.0])
    D = [1.0, 0.5, -2.0]
    a = train_dpo.Args(loss="kto", beta=BETA, desirable_weight=weights[0], undesirable_weight=weights[1])
    loss, totals = train_dpo.objective(a, examples, logps, reference, torch.full((3,), 2), z0=torch.tensor(z0))
    want = weights[0] * sigmoid(-BETA * (D[0] - z0)) + sum(weights[1] * sigmoid(BETA * (d - z0)) for d in D[1:])
    found = train_dpo.means([totals])
    assert loss.item() == pytest.approx(want, rel=1e-5) and found["loss"] == pytest.approx(want / 3, rel=1e-5)
    assert found["rewards/chosen"] == pytest.approx(BETA * 1.0)
    assert found["rewards/rejected"] == pytest.approx(BETA * (0.5 - 2.0) / 2)
    assert found["rewards/margins"] == pytest.approx(BETA * (1.0 + 0.75))
    # D > z0 is desirable; 0.5 is level with z0, and counts as half right
    assert found["rewards/accuracies"] == pytest.approx((1 + 0.5 + 1) / 3)


def test_kto_z0_is_of_the_whole_step_and_bco_delta_of_all_steps_before(world, go, steps, monkeypatch):
    """Both are the same in every micro-batch; z0 from mismatched responses, delta from the rewards of the steps."""
    seen = []

    def spy(a, examples, logps, ref_logps, lengths, delta=0.0, z0=None, objective=train_dpo.objective):
        if logps.requires_grad:
            seen.append((len(seen), delta, None if z0 is None else z0.item()))
        return objective(a, examples, logps, ref_logps, lengths, delta, z0)

    monkeypatch.setattr(train_dpo, "objective", spy)
    run = go(loss="bco", batch_size=8, micro_batch_tokens=100, epochs=2)
    rewards = [(row["rewards/chosen"] + row["rewards/rejected"]) / 2 for row in run.train]
    want = [mean(rewards[:step]) if step else 0.0 for step in range(6)]
    found = list(dict.fromkeys(delta for _, delta, _ in seen))
    assert found == pytest.approx(want) and len(seen) > 2 * len(found) and abs(want[-1]) > 1e-4

    train, held = read(world / "train.jsonl", "unpaired"), read(world / "held.jsonl", "unpaired")
    mismatched = dict(zip([e.where for e in train], train_dpo.mismatched(train + held, 0), strict=False))
    largest = 0.0
    for model, ref in (("model", "other"), ("other", "model")):  # one of them has a mean above 0
        seen.clear(), steps.clear()
        go(loss="kto", batch_size=22, micro_batch_tokens=100, model=f"{world}/{model}", ref=f"{world}/{ref}")
        others = [dataclasses.replace(e, responses=[mismatched[e.where][0]]) for e in steps[0]]
        policy, reference = (plain_logps(load(world / name), others) for name in (model, ref))
        want = max(0.0, mean(x - y for [x], [y] in zip(policy, reference, strict=True)))
        assert len(seen) > 1 and [z0 for *_, z0 in seen] == pytest.approx([want] * len(seen), abs=1e-4)
        largest = max(largest, want)
    assert largest > 0.01


def test_the_last_evaluation_has_the_last_delta_of_bco(world, go):
    """The held-out loss of the saved policy, with the mean of the rewards of all steps for delta."""
    run = go(loss="bco", beta=1.0, lr=1e-2, epochs=3)
    delta = mean((row["rewards/chosen"] + row["rewards/rejected"]) / 2 for row in run.train)
    held = read(world / "held.jsonl")
    policy, reference = (plain_logps(load(path), held) for path in (run.out, world / "model"))
    pairs = [[x - y for x, y in zip(*both, strict=True)] for both in zip(policy, reference, strict=True)]
    loss = lambda delta: mean(-math.log(sigmoid(w - delta) * sigmoid(delta - r)) for w, r in pairs)  # noqa: E731
    assert abs(loss(delta) - loss(0.0)) > 0.01
    assert run.evals[-1]["eval/loss"] == run.results["after/eval/loss"] == pytest.approx(loss(delta), abs=1e-4)
    assert run.results["before/eval/loss"] == pytest.approx(2 * math.log(2), abs=1e-4)


def test_the_last_evaluation_has_its_own_z0_of_kto(world, go):
    """The held-out loss of the saved policy, with z0 from the held-out prompts' mismatched responses; and of the start
    as its own reference, where z0 is 0."""
    flags = {"beta": 1.0, "lr": 1e-2, "epochs": 2, "undesirable_weight": 0.5}
    run = go(loss="kto", model=f"{world}/other", ref=f"{world}/model", **flags)
    train, held = read(world / "train.jsonl", "unpaired"), read(world / "held.jsonl", "unpaired")
    other = train_dpo.mismatched(train + held, 0)
    others = [dataclasses.replace(e, responses=[y]) for e, (y, _) in zip(train + held, other, strict=True)]
    models = load(run.out), load(world / "model")

    def ratios(examples):
        both = ([x for logps in plain_logps(model, examples) for x in logps] for model in models)
        return [x - y for x, y in zip(*both, strict=True)]

    D, good = ratios(held), [label for e in held for label in e.labels]
    z0, of_training = (max(0.0, mean(ratios(x))) for x in (others[len(train) :], others[: len(train)]))
    loss = lambda z0: mean(  # noqa: E731
        sigmoid(z0 - d) if y else 0.5 * sigmoid(d - z0) for d, y in zip(D, good, strict=True)
    )
    assert {*good} == {True, False}
    assert min(abs(loss(z0) - loss(x)) for x in (0.0, of_training)) > 0.002, (z0, of_training)
    assert run.evals[-1]["eval/loss"] == run.results["after/eval/loss"] == pytest.approx(loss(z0), abs=1e-4)
    assert run.results["before/eval/loss"] == pytest.approx((0.5 + 0.25) / 2, abs=1e-4)


def test_ties(world, go, tmp_path):
    rows = [
        {"prompt": f"the plot {i}", "responses": ["was .", "was a .", "it ."], "ranks": [1, 2, 2]} for i in range(4)
    ]
    rows += [{"prompt": f"it {i}", "responses": ["was .", "was a .", "it ."], "ranks": [2, 1, 3]} for i in range(6)]
    data = str(write_rows(tmp_path / "ranks.jsonl", rows))
    with pytest.raises(BadInput, match="ranks.jsonl:1: field 'ranks' has ties.*--ties drop or random"):
        go(loss="plackett_luce", data=data, eval_data=data)
    examples = load_examples(data, "preference", reviews.tokenizer(), train_dpo.Args())
    tied = str(write_rows(tmp_path / "tied.jsonl", rows[:4]))
    with pytest.raises(BadInput, match="--data: no ranking without ties is left to train on"):
        go(loss="plackett_luce", data=tied, eval_data=data, ties="drop")
    seen = {ties: [e.ranks for e in without_ties(examples, ties, 0)] for ties in ("drop", "random")}
    assert seen["drop"] == [[2, 1, 3]] * 6
    assert {*map(tuple, seen["random"][:4])} == {(1, 2, 3), (1, 3, 2)} and seen["random"][4:] == seen["drop"]
    run = go(loss="plackett_luce", data=data, eval_data=data, ties="random", max_steps=1)
    assert run.train[0]["loss"] == pytest.approx(math.log(6), abs=1e-5)
    # held-out rankings keep their ties: what is tied stays in the choice below, so 3 * 2 * 2 for four of ten
    assert run.evals[0]["eval/loss"] == pytest.approx(math.log(6) + 0.4 * math.log(2), abs=1e-5)


def test_a_token_that_the_model_has_no_embedding_of_is_refused(world):
    """In the prompt or in a response, and in prompts that are yet to be answered."""
    llama, last = tiny("llama"), VOCAB - 1
    for e in (example([last + 1], [[3]]), example([3], [[4], [5, last + 1]]), example([3, last + 1], [])):
        with pytest.raises(BadInput) as error:
            scoring.check_tokens(llama, [example([last], [[last]]), e])
        reason = f"test:1: has the token id {VOCAB}, and the llama model {VOCAB} embeddings: its tokenizer is that of"
        assert str(error.value).startswith(reason) and "\n" not in str(error.value)
    scoring.check_tokens(llama, [example([last], [[last]]), example([last], [])])


def test_a_model_whose_base_is_itself(monkeypatch):
    """Llama 4's language model: its log-probs are those of its own logits, and it can answer."""
    flags = {"intermediate_size_mlp": 48, "num_local_experts": 2, "head_dim": 8}
    monkeypatch.setitem(ARCHITECTURES, "llama4", lambda: transformers.Llama4TextConfig(**GQA, **flags))
    model = tiny("llama4")
    assert model.base_model is model
    examples = random_examples([(5, [3, 4]), (9, [6, 2])])
    batching = scoring.Batching("auto", 0, torch.float32, 200, "cpu")
    batching = batching._replace(layout=scoring.choose_layout(model, examples, batching))
    scores = scoring.score_logps(model, examples, batching)
    models.set_attention(model, packed=False)
    for e, logps in zip(examples, scores, strict=True):
        for response, logp in zip(e.responses, logps.tolist(), strict=True):
            own = model(torch.tensor([e.prompt + response])).logits[0, len(e.prompt) - 1 : -1].log_softmax(-1)
            assert logp == pytest.approx(own[range(len(response)), response].sum().item(), abs=1e-4)
    ids = SimpleNamespace(pad_token_id=0, eos_token_id=2)
    greedy, logps = generate(model, ids, [examples[0].prompt], 4, temperature=0.0, k=2)
    assert greedy[0] == greedy[1] and len(logps[0]) == len(greedy[0]) > 0


def test_answers_end_at_the_last_position_that_a_model_has_learnt(go, world, tmp_path):
    """GPT-2 with 16 positions: rows that are longer are refused before training, longer answers are cut after it."""
    tokenizer = reviews.tokenizer()
    config = transformers.GPT2Config(vocab_size=len(tokenizer), n_embd=16, n_layer=1, n_head=2, n_positions=16)
    config.bos_token_id, config.eos_token_id = tokenizer.bos_token_id, tokenizer.eos_token_id
    models.save(transformers.GPT2LMHeadModel(config), tokenizer, tmp_path / "gpt2")
    flags = {"model": str(tmp_path / "gpt2"), "max_steps": 1, "eval_prompts": 3}
    with pytest.raises(BadInput, match="the model has 16 positions, a prompt with its response"):
        go(**flags)
    run = go(**flags, max_prompt_length=6, max_length=12)
    assert run.results["after/length"] <= 14
    prompts = [[1, 5, 6], [1, *range(5, 15)]]
    answers = generate(load(tmp_path / "gpt2"), tokenizer, prompts, 40, batch_size=1)[0]
    assert len(answers[0]) <= 13 and len(answers[1]) <= 5


# ------------------------------------------------------------------------------------------- gradients and counting


def gradients(monkeypatch, run, *args, **flags):
    """The gradients of each step of a script, just before they are clipped, and its metrics."""
    seen = []

    def spy(parameters, max_norm, clip=torch.nn.utils.clip_grad_norm_):
        parameters = [*parameters]
        seen.append(torch.cat([w.grad.flatten().clone() for w in parameters]))
        return clip(parameters, max_norm)

    with monkeypatch.context() as patch:
        patch.setattr(torch.nn.utils, "clip_grad_norm_", spy)
        return seen, run(*args, **flags)


@pytest.mark.parametrize("name", ["dpo", "kto", "bco", "orpo", "sft"])
def test_gradient_and_metrics_depend_neither_on_the_budget_nor_on_the_layout(name, world, go, monkeypatch):
    """Away from the reference (another one), over 3 steps of 8, 8 and 6 examples; the weights hardly move."""
    flags = {"lr": 1e-9, "eval_every": 1}
    flags |= {} if name == "sft" else {"loss": name, "ref": f"{world}/other"}
    script = "sft" if name == "sft" else "dpo"
    runs = [
        gradients(monkeypatch, go, script, layout=layout, micro_batch_tokens=budget, **flags)
        for layout, budget in [("tree", 10**6), ("tree", 100), ("padded", 10**6), ("padded", 1)]
    ]
    wanted, first = runs[0]
    assert len(wanted) == 3
    for found, run in runs[1:]:
        for gradient, want in zip(found, wanted, strict=True):
            assert (gradient - want).norm() / want.norm() < 1e-5
        for mine, theirs in zip(run.train + run.evals, first.train + first.evals, strict=True):
            assert {k: v for k, v in mine.items() if "perf" not in k} == pytest.approx(
                {k: v for k, v in theirs.items() if "perf" not in k}, rel=1e-5, abs=1e-5
            )


@pytest.mark.parametrize("script", ["dpo", "sft"])
def test_every_example_once_an_epoch(script, world, go, steps, monkeypatch):
    """22 examples in batches of 8: three steps an epoch, the last of 6; in another order each epoch."""
    collated = Counter()

    def spy(examples, *args):
        collated.update(e.where for e in examples)
        return collate(examples, *args)

    monkeypatch.setattr(SCRIPTS[script], "collate", spy)
    run = go(script, epochs=2, micro_batch_tokens=100)
    places = [[e.where for e in step] for step in steps]
    assert [len(step) for step in places] == [8, 8, 6, 8, 8, 6] and len(run.train) == 6
    epochs = [sum(places[:3], []), sum(places[3:], [])]
    assert all(sorted(seen) == sorted(f"train.jsonl:{i}" for i in range(1, 23)) for seen in epochs)
    assert epochs[0] != epochs[1] and epochs[0] != sorted(epochs[0])
    assert collated == Counter(sum(epochs, []))
    assert [row["epoch"] for row in run.train] == pytest.approx([i / 3 for i in range(1, 7)])
    assert [row["step"] for row in run.train] == [1, 2, 3, 4, 5, 6]


def test_the_last_small_batch_weighs_by_its_own_size(world, go, steps, monkeypatch):
    """The gradient of a step is that of the mean over its own examples."""
    found, _ = gradients(monkeypatch, go, batch_size=16, lr=1e-12, ref=f"{world}/other", epochs=1)
    policy, reference = load(world / "model"), load(world / "other")
    for gradient, examples in zip(found, steps, strict=True):
        policy.zero_grad()
        loss = 0.0
        for e in examples:
            D = []
            for response in e.responses:
                ids, n = torch.tensor([e.prompt + response]), len(response)
                mine, theirs = (
                    m(ids).logits[0, -n - 1 : -1].log_softmax(-1).gather(1, ids[0, -n:, None]).sum()
                    for m in (policy, reference)
                )
                D.append(mine - theirs.detach())
            loss = loss - torch.nn.functional.logsigmoid(BETA * (D[0] - D[1])) / len(examples)
        loss.backward()
        want = torch.cat([w.grad.flatten() for w in policy.parameters()])
        assert (gradient - want).norm() / want.norm() < 1e-4


def test_evaluation_by_hand(world, go):
    """Five held-out pairs with label probabilities, before and after, by the library's own logits."""
    run = go(ref=f"{world}/other", lr=3e-3, epochs=3, micro_batch_tokens=100)
    held = read(world / "held.jsonl")
    reference = plain_logps(load(world / "other"), held)
    for row, model in ((run.evals[0], world / "model"), (run.evals[-1], run.out)):
        D = [
            [x - y for x, y in zip(mine, theirs, strict=True)]
            for mine, theirs in zip(plain_logps(load(model), held), reference, strict=True)
        ]
        margins = [w - r for w, r in D]
        chances = [e.probability if h > 0 else 1 - e.probability for e, h in zip(held, margins, strict=True)]
        assert row["eval/rewards/accuracies"] == pytest.approx(mean(chances), abs=1e-6)
        assert row["eval/rewards/margins"] == pytest.approx(BETA * mean(margins), abs=1e-4)
        assert row["eval/loss"] == pytest.approx(mean(-math.log(sigmoid(BETA * h)) for h in margins), abs=1e-4)
        assert row["eval/logps/chosen_delta"] == pytest.approx(mean(w for w, _ in D), abs=1e-4)
    ceiling = mean(max(e.probability, 1 - e.probability) for e in held)
    assert run.results["ceiling"] == pytest.approx(ceiling) and 0.5 < ceiling < 1
    assert run.results["after/eval/loss"] == pytest.approx(run.evals[-1]["eval/loss"], abs=1e-6)


def test_accuracy_is_one_half_before_the_first_step(go):
    """Policy and reference are equal: every margin is 0, and a coin is right half the time."""
    run = go(max_steps=1, micro_batch_tokens=100)
    assert run.evals[0]["step"] == 0 and run.evals[0]["eval/rewards/accuracies"] == pytest.approx(0.5)
    assert run.results["before/eval/rewards/accuracies"] == 0.5
    assert run.evals[0]["eval/rewards/margins"] == pytest.approx(0, abs=1e-5)


def test_sft_evaluation_by_hand(world, go):
    run = go("sft", epochs=2, micro_batch_tokens=100)
    held = read(world / "held.jsonl", "sft")
    count = sum(len(e.responses[0]) for e in held)
    for value, model in (
        (run.evals[0]["eval/loss"], world / "model"),
        (run.evals[-1]["eval/loss"], run.out),
        (run.results["eval/loss"], run.out),
    ):
        want = -sum(logps for [logps] in plain_logps(load(model), held)) / count
        assert value == pytest.approx(want, abs=1e-5)


def test_sft_loss_is_the_mean_over_tokens(world, go):
    """Of all trained tokens of the step, whatever their responses' lengths; conversations by their mask."""
    run = go("sft", batch_size=22, max_steps=1, micro_batch_tokens=100)
    examples = read(world / "train.jsonl", "sft")
    total = -sum(logps for [logps] in plain_logps(load(world / "model"), examples))
    assert run.train[0]["loss"] == pytest.approx(total / sum(len(e.responses[0]) for e in examples), rel=1e-5)
    masked = example([5], [[6, 7, 8]], trained=[[True, False, True]])
    assert train_sft.trained_tokens([masked, example([5], [[6, 7]])]) == 4


# ------------------------------------------------------------------------------------------- schedule, determinism


def test_schedule_by_hand():
    assert [schedule(i, 4, 0.5) for i in range(4)] == pytest.approx([1 / 2, 1, 1, 1 / 2])
    assert [schedule(i, 4, 0.0) for i in range(4)] == pytest.approx(
        [1, (1 + math.sqrt(1 / 2)) / 2, 1 / 2, (1 - math.sqrt(1 / 2)) / 2]
    )
    assert [schedule(i, 3, 0.9) for i in range(3)] == pytest.approx([1 / 3, 2 / 3, 1])
    assert schedule(0, 1, 0.1) == schedule(0, 1, 0.0) == 1
    for steps, warmup in itertools.product((1, 2, 7, 100), (0.0, 0.1, 0.5)):
        values = [schedule(i, steps, warmup) for i in range(steps)]
        rising = math.ceil(steps * warmup)
        assert max(values) == 1 and min(values) > 0 and values[:rising] == sorted(values[:rising])
        assert values[rising:] == sorted(values[rising:], reverse=True)
        if rising < steps:
            assert schedule(steps, steps, warmup) == pytest.approx(0)  # one step after the last


@pytest.mark.parametrize("script", ["dpo", "sft"])
def test_the_schedule_reaches_the_optimizer(script, go, monkeypatch):
    used, step = [], torch.optim.AdamW.step

    def spy(self, *args):
        used.append({group["lr"] for group in self.param_groups})
        return step(self, *args)

    monkeypatch.setattr(torch.optim.AdamW, "step", spy)
    run = go(script, lr=0.002, warmup=0.5, epochs=2, max_steps=4)
    assert [row["lr"] for row in run.train] == pytest.approx([0.001, 0.002, 0.002, 0.001])
    assert used == [{row["lr"]} for row in run.train]


@pytest.mark.parametrize("script", ["dpo", "sft"])
def test_the_same_seed_gives_the_same_run(script, go):
    first, again, other = (go(script, seed=seed, eval_prompts=2, max_new_tokens=5) for seed in (0, 0, 1))
    a, b, c = (load_file(run.out / "model.safetensors") for run in (first, again, other))
    assert all(torch.equal(a[name], b[name]) for name in a) and not all(torch.equal(a[name], c[name]) for name in a)
    samples = [(run.out / "samples.jsonl").read_text() for run in (first, again, other)]
    assert samples[0] == samples[1] != samples[2]


# ------------------------------------------------------------------------------------------------------- reference


def metrics(run) -> list[dict]:
    return [{k: v for k, v in row.items() if "perf" not in k} for row in run.evals + run.train]


def test_the_reference_is_scored_once(go, capsys):
    first = go(epochs=2)
    assert "reference log-probs" not in capsys.readouterr().out
    again = go(epochs=2)
    assert "reference log-probs: from" in capsys.readouterr().out
    assert metrics(again) == metrics(first)


def test_cached_and_live_metrics_agree(go, world, tmp_path, capsys):
    """Scored in other micro-batches than they are used in, against scored in the same ones.

    The policy stands still (AdamW's first steps would magnify differences in the last digit) and is not the reference.
    """
    still = {"ref": f"{world}/other", "lr": 1e-12}
    go(micro_batch_tokens=60, **still)
    cached = go(micro_batch_tokens=10**6, **still)
    assert "reference log-probs: from" in capsys.readouterr().out
    live = go(micro_batch_tokens=10**6, ref_cache=f"{tmp_path}/empty", **still)
    assert abs(cached.train[0]["logps/chosen_delta"]) > 0.01
    for mine, theirs in zip(metrics(cached), metrics(live), strict=True):
        assert mine == pytest.approx(theirs, abs=1e-5, rel=1e-5)


def test_cached_log_probs_are_the_models_own(world, tmp_path, go):
    go()
    [file] = (tmp_path / "cache").iterdir()
    found = load_file(file)
    examples = read(world / "train.jsonl") + read(world / "held.jsonl")
    want = [x for logps in plain_logps(load(world / "model"), examples) for x in logps]
    assert found["sizes"].tolist() == [2] * 27 and found["logps"].tolist() == pytest.approx(want, abs=1e-4)


def test_a_stale_cache_is_refused_with_the_reason(tmp_path, capsys):
    model, tokenizer, examples = tiny("llama"), reviews.tokenizer(), random_examples([(3, [2, 4]), (2, [5, 1])])

    def ask(rows=examples, **changes):
        settings = {"lengths": (512, 1024), "dtype": "float32", "layout": "tree"} | changes
        scored = []

        def compute():
            scored.append(True)
            return scoring.score_logps(model, rows, scoring.Batching("tree", micro_batch_tokens=1000))

        key = refcache.cache_key(models.digest(model), tokenizer, rows, **settings)
        found = refcache.cached(tmp_path, key, refcache.row_digests(rows), compute)
        return bool(scored), capsys.readouterr().out, found

    assert ask()[0] and not ask()[0]
    assert not ask(list(examples))[0]
    for name, changes in {
        "lengths": {"lengths": (512, 1025)},
        "dtype": {"dtype": "bfloat16"},
        "layout": {"layout": "padded"},
        "rows": {"rows": examples + random_examples([(3, [1, 1])], seed=1)},
    }.items():
        scored, said, _ = ask(**changes)
        assert scored and f"no cached ones fit (the nearest were made with other {name})" in said
        assert not ask(**changes)[0]
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 5] += 1e-3
    scored, said, found = ask()
    assert scored and "made with other weights)" in said
    again = ask()
    assert not again[0] and all(torch.equal(x, y) for x, y in zip(found, again[2], strict=True))
    tokenizer.chat_template = "{{ messages }}"
    assert "made with other template)" in ask()[1]
    tokenizer.add_tokens(["zebra"])
    assert "made with other tokenizer)" in ask()[1]
    tokenizer.add_tokens(["gnu"])
    assert "made with other tokenizer, rows)" in ask(examples[:1])[1]
    tokenizer.add_tokens(["okapi"])
    assert ask(examples[1:], layout="padded")[:2] == (True, "")  # these are another data set's


@pytest.mark.parametrize(
    "damage", ["cut", "empty", "garbage", "other number", "other question", "no tensor", "no checksum"]
)
def test_a_damaged_cache_is_not_used(damage, go, tmp_path, capsys):
    first = go()
    [file] = (tmp_path / "cache").iterdir()
    whole = file.read_bytes()
    with safe_open(file, "pt") as f:
        asked = f.metadata()
    if damage == "other question":
        question = json.loads(asked["question"]) | {"rows": "0"}
        save_file(load_file(file), file, metadata={"question": json.dumps(question)})
    elif damage == "other number":
        tensors = load_file(file)
        tensors["logps"][3] += 0.5
        save_file(tensors, file, metadata=asked)
    elif damage == "no checksum":
        save_file(load_file(file), file, metadata={"question": asked["question"]})
    elif damage == "no tensor":
        save_file({"sizes": torch.ones(2)}, file, metadata=asked)
    else:
        file.write_bytes({"cut": whole[:-9], "empty": b"", "garbage": b"\xff" * 500}[damage])
    again = go()
    assert f"reference log-probs: {file} is damaged: they are computed again" in capsys.readouterr().out
    assert metrics(again) == metrics(first)
    assert load_file(file)["sizes"].tolist() == [2] * 27  # and it is whole again
    assert [path.name for path in (tmp_path / "cache").iterdir()] == [file.name]


def test_a_disk_that_is_full_when_the_cache_is_written(go, tmp_path, monkeypatch):
    def fail(*args, **kwargs):
        raise SafetensorError("I/O error: No space left on device")

    monkeypatch.setattr(refcache, "save_file", fail)
    with pytest.raises(OSError, match=f"--ref-cache {tmp_path}/cache: I/O error: No space left on device"):
        go()


def test_another_reference(world, go, tmp_path, capsys):
    run = go(ref=f"{world}/other", max_steps=1, batch_size=22)
    assert f"step-0 guard: skipped, since the reference is {world}/other" in capsys.readouterr().out
    examples = read(world / "train.jsonl")
    policy, reference = (plain_logps(load(world / name), examples) for name in ("model", "other"))
    want = mean(
        -math.log(sigmoid(BETA * ((a - b) - (c - d)))) for (a, c), (b, d) in zip(policy, reference, strict=True)
    )
    assert run.train[0]["loss"] == pytest.approx(want, abs=1e-4)


NEXT = {  # flags -> those that the proposed command repeats
    "dpo": ({}, {}),
    "exo": ({"loss": "exo", "label_smoothing": E}, {"loss": "exo", "label_smoothing": E}),
    "js": ({"divergence": "js", "clip": 3.0}, {"divergence": "js"}),
    "alpha": (x := {"loss": "ipo", "divergence": "alpha", "divergence_alpha": 0.3}, x),
    "plackett_luce": (x := {"loss": "plackett_luce", "ties": "random"}, x),
}


@pytest.mark.parametrize("name", NEXT)
def test_the_next_command_has_the_same_loss_and_half_the_beta(name, world, go, capsys):
    flags, repeated = NEXT[name]
    run = go(**flags, ref=f"{world}/other", max_steps=1)
    [line] = re.findall(r"Next: python train_dpo\.py (.*)  \(further from ref\)\n", capsys.readouterr().out)
    proposed = tyro.cli(train_dpo.Args, args=shlex.split(line))
    files = {"model": f"{world}/model", "ref": f"{world}/other", "data": f"{world}/train.jsonl"}
    files["eval_data"] = f"{world}/held.jsonl"
    steps = {"lr": 1e-3, "batch_size": 8, "max_steps": 1}
    assert proposed == train_dpo.Args(**files, **repeated, **steps, beta=BETA / 2, out=f"{run.out}-loose")
    train_dpo.check_flags(proposed)


def test_the_command_after_sft_has_an_out_of_its_own(world, go, capsys):
    run = go("sft", max_steps=1)
    [line] = re.findall(r"Next: python train_dpo\.py (.*)\n", capsys.readouterr().out)
    proposed = tyro.cli(train_dpo.Args, args=shlex.split(line))
    assert proposed == train_dpo.Args(model=str(run.out), data="PREFERENCES", out=f"{run.out}-dpo")


@pytest.mark.parametrize("loss", ["simpo", "orpo"])
def test_no_next_command_where_beta_is_no_leash(loss, go, capsys):
    go(loss=loss, max_steps=1)
    assert "Next:" not in capsys.readouterr().out


# ----------------------------------------------------------------------------------------------------- step-0 guard


@pytest.mark.parametrize("loss", ["dpo", "kto", "ipo"])
def test_the_guard_finds_a_reference_that_is_not_the_start(loss, go, tmp_path):
    go(loss=loss, batch_size=64)
    [file] = (tmp_path / "cache").iterdir()
    with safe_open(file, "pt") as f:
        question = f.metadata()["question"]
    tensors = load_file(file)
    tensors["logps"][5] += 0.01
    save_file(tensors, file, metadata={"question": question, "sha256": refcache._digest(tensors)})
    with pytest.raises(
        BadInput, match=r"step-0 guard: policy and reference are the same, but their log-probs differ by 0\.01 nats"
    ):
        go(loss=loss, batch_size=64)


@pytest.mark.parametrize(("parameters", "want"), [(4e5, 1.0), (1e7, 1.0), (4e7, 2.0), (9e9, 30.0)])
def test_bounds_grow_with_the_root_of_a_large_model(parameters, want):
    assert scoring.growth(SimpleNamespace(num_parameters=lambda: parameters)) == pytest.approx(want)


def test_guard_bounds(capsys):
    guard, ln2 = train_dpo.guard, math.log(2)
    a = train_dpo.Args(loss="dpo", beta=0.1)

    def of(gaps: list[float], tokens: float = 100.0) -> torch.Tensor:
        return torch.tensor([[gap, tokens] for gap in gaps])

    guard(a, of([0.0, 9e-4]), ln2)
    guard(a, of([0.0, 1.8e-3], 400.0), ln2)
    guard(a, of([0.0, 1.8e-3]), ln2, growth=2.0)
    for gaps, loss in [([0.0, 1.1e-3], ln2), ([math.nan, 0.0], ln2), ([0.0, 0.0], ln2 + 2e-3), ([0.0], math.nan)]:
        with pytest.raises(BadInput, match="step-0 guard"):
            guard(a, of(gaps), loss)
    for loss in ("robust", "dpo_norm", "dpop"):
        with pytest.raises(BadInput, match=f"the {loss} loss is 0.8"):
            guard(train_dpo.Args(loss=loss, beta=0.1, dpop_lambda=5.0), of([0.0, 0.0]), 0.8)
    assert capsys.readouterr().out == ""
    half = train_dpo.Args(dtype="bfloat16")
    guard(half, of([0.9, 0.25]), 0.7)
    assert "step-0 guard: mean |log-ratio| 0.575 nats in bfloat16 (limit 0.6)" in capsys.readouterr().out
    with pytest.raises(BadInput, match="step-0 guard"):
        guard(half, of([0.9, 0.35]), 0.7)


def test_bfloat16_run(go, capsys):
    run = go(dtype="bfloat16", batch_size=22, epochs=2)
    assert "step-0 guard: mean |log-ratio|" in capsys.readouterr().out
    assert run.train[0]["loss"] == pytest.approx(math.log(2), abs=0.02) and run.train[1]["loss"] < math.log(2)
    assert {w.dtype for w in load_file(run.out / "model.safetensors").values()} == {torch.float32}


# -------------------------------------------------------------------------------------------------------- NaN losses


def command(script: str, world, tmp_path, **changes) -> list[str]:
    flags = {"model": world / "model", "data": world / "train.jsonl", "out": tmp_path / "run", "device": "cpu"}
    flags |= {"batch-size": 8, "lr": 1e-3, "eval-prompts": 0, "eval-data": world / "held.jsonl"}
    flags |= {"ref-cache": tmp_path / "cache"} if script == "dpo" else {}
    flags |= {name.replace("_", "-"): value for name, value in changes.items()}
    given = [[f"--{name}"] if value is True else [f"--{name}", str(value)] for name, value in flags.items()]
    return [f"train_{script}.py", *sum(given, [])]


def cli(monkeypatch, script: str, argv: list[str]) -> int:
    """Exit code of the script with this command line."""
    monkeypatch.setattr(sys, "argv", argv)
    try:
        runs.cli(SCRIPTS[script].main, SCRIPTS[script].Args)
    except SystemExit as stop:
        return stop.code
    return 0


@pytest.mark.parametrize("script", ["dpo", "sft"])
def test_a_nan_stops_the_run_and_names_its_rows(script, world, go, steps, tmp_path, monkeypatch, capfd):
    straight = go(script)
    name = "dpo" if script == "dpo" else "sft"
    loss, calls = getattr(train_dpo.losses, name), []

    def broken(*args):
        values = loss(*args)
        if values.requires_grad:
            calls.append(1)
        return values * (math.nan if len(calls) == 3 and values.requires_grad else 1)

    argv = command(script, world, tmp_path, save_every=1, **({"beta": BETA} if script == "dpo" else {}))
    with monkeypatch.context() as patch:
        patch.setattr(train_dpo.losses, name, broken)
        assert cli(patch, script, argv) == 1
    rows = ", ".join(e.where for e in steps[-1])
    line = capfd.readouterr().err.splitlines()[-1]
    assert line.startswith(f"error: step 3: the loss is nan and the gradient norm nan (rows {rows})")
    assert "--resume" in line
    state = torch.load(tmp_path / "run" / "checkpoint" / "step-2" / "state.pt", weights_only=True)
    assert state["step"] == 2 and all(w.isfinite().all() for w in state["model"].values())
    assert cli(monkeypatch, script, [*argv, "--resume"]) == 0
    mine, theirs = (load_file(out / "model.safetensors") for out in (tmp_path / "run", straight.out))
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize("most", [0.01, 1e3])
def test_the_step_is_made_with_a_gradient_of_at_most_max_grad_norm(script, go, most, monkeypatch):
    """A longer gradient is scaled to it, a shorter one is as it was; `grad_norm` is the norm before."""
    seen = []

    class Adam(torch.optim.AdamW):
        def step(self):
            norms = [w.grad.norm().square() for group in self.param_groups for w in group["params"]]
            seen.append(sum(norms).sqrt().item())
            super().step()

    monkeypatch.setattr(torch.optim, "AdamW", Adam)
    norms = [row["grad_norm"] for row in go(script, max_steps=2, max_grad_norm=most).train]
    assert min(norms) > 0.02 and len(norms) == 2
    assert seen == pytest.approx([min(norm, most) for norm in norms], rel=1e-4)


def test_a_learning_rate_that_explodes(go, tmp_path):
    with pytest.raises(FloatingPointError, match=r"step 2: the loss is \S+ and the gradient norm \S+ \(rows train"):
        go(lr=1e30, max_grad_norm=1e30, eval_every=100)


# --------------------------------------------------------------------------------------------------------- bad input


def bad_rows(*changes: dict) -> list[dict]:
    """Good pairs, and in the third line something else."""
    rows = pairs(5)
    for change in changes:
        rows[2] = {k: v for k, v in (rows[2] | change).items() if v is not None}
    return rows


TIED = [{"prompt": "it was", "responses": ["a .", "the .", "so ."], "ranks": [1, 2, 2]}] * 2
FLAGS = {  # for both scripts: flag, impossible value, what the message says
    "batch_size": (0, "--batch-size must be at least 1, not 0"),
    "micro_batch_tokens": (0, "--micro-batch-tokens must be at least 1"),
    "epochs": (0, "--epochs must be at least 1"),
    "max_steps": (0, "--max-steps must be at least 1"),
    "eval_every": (0, "--eval-every must be at least 1"),
    "save_every": (-3, "--save-every must be at least 1, not -3"),
    "max_new_tokens": (0, "--max-new-tokens must be at least 1"),
    "eval_prompts": (-1, "--eval-prompts must be at least 0"),
    "keep_softmax_mib": (-1, "--keep-softmax-mib must be at least 0"),
    "lr": (0, "--lr must be above 0"),
    "max_grad_norm": (0, "--max-grad-norm must be above 0"),
    "weight_decay": (-0.1, "--weight-decay must be at least 0"),
    "warmup": (1, "--warmup must be in [0, 1)"),
    "eval_fraction": (1, "--eval-fraction must be in [0, 1), not 1"),
    "max_prompt_length": (1024, "--max-prompt-length 1024 must be below --max-length 1024"),
    "device": ("nowhere", "--device nowhere"),
}
LOSS_FLAGS = {  # of train_dpo.py alone
    "beta 0": ({"beta": 0}, "--beta must be above 0"),
    "beta, kto": ({"loss": "kto", "beta": 0}, "--beta must be above 0"),
    "beta, rankings": ({"loss": "plackett_luce", "beta": -1}, "--beta must be above 0"),
    "beta, orpo": ({"loss": "orpo", "beta": -1}, "--beta must be above 0"),
    "smoothing": ({"label_smoothing": 0.7}, "--label-smoothing must be in [0, 0.5), not 0.7"),
    "exo": ({"loss": "exo"}, "--loss exo needs a --label-smoothing above 0"),
    "clip": ({"clip": 0}, "--clip must be above 0"),
    "alpha": (
        {"divergence": "alpha", "divergence_alpha": 1},
        "--divergence-alpha must be at least 0 and finite, and not 1",
    ),
    "tau": ({"loss": "discopop", "discopop_tau": 2}, "--discopop-tau must be in (0, 1]"),
    "kto weight": ({"loss": "kto", "desirable_weight": -1}, "--desirable-weight must be at least 0"),
}
DATA = {  # rows (or text), and what the message says
    "not JSON": ('{"prompt": "a"\n', "bad.jsonl:1: not JSON"),
    "not JSON, third": (
        "".join(json.dumps(row) + "\n" for row in pairs(2)) + "nonsense\n",
        "bad.jsonl:3: not JSON",
    ),
    "missing column": ([{"question": "a", "answer": "b"}], "bad.jsonl: its columns"),
    "missing field": (bad_rows({"rejected": None}), "bad.jsonl:3: field 'rejected' is missing"),
    "empty": (bad_rows({"rejected": " "}), "bad.jsonl:3: field 'rejected' is empty"),
    "not text": (bad_rows({"rejected": 5}), "bad.jsonl:3: field 'rejected' is not text or messages but int"),
    "roles": (
        bad_rows({"prompt": [{"role": "assistant", "content": "a"}]}),
        "bad.jsonl:3: field 'prompt': roles out of order",
    ),
    "no rows": ("", "holds no rows"),
    "nothing left": ([pairs(1)[0] | {"rejected": pairs(1)[0]["chosen"]}], "nothing is left of its 1 rows"),
}


def refused(monkeypatch, capfd, script, argv, message, out):
    """Exit code 2, one line that says so, and nothing written: the same command can be given again."""
    capfd.readouterr()
    assert cli(monkeypatch, script, argv) == 2
    lines = capfd.readouterr().err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: ") and message in lines[0], lines
    assert not out.exists() or not [*out.iterdir()]


@pytest.mark.parametrize("script", ["dpo", "sft"])
def test_impossible_flags(script, world, tmp_path, monkeypatch, capfd):
    for flag, (value, message) in FLAGS.items():
        argv = command(script, world, tmp_path, **{flag: value})
        refused(monkeypatch, capfd, script, argv, message, tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", LOSS_FLAGS)
def test_impossible_settings_of_a_loss(name, world, tmp_path, monkeypatch, capfd):
    changes, message = LOSS_FLAGS[name]
    refused(monkeypatch, capfd, "dpo", command("dpo", world, tmp_path, **changes), message, tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", DATA)
def test_bad_data(name, world, tmp_path, monkeypatch, capfd):
    content, message = DATA[name]
    path = tmp_path / "bad.jsonl"
    path.write_text(content) if isinstance(content, str) else write_rows(path, content)
    for script in ["dpo"] if name in ("nothing left", "empty", "not text", "missing field") else ["dpo", "sft"]:
        argv = command(script, world, tmp_path, data=path)
        refused(monkeypatch, capfd, script, argv, message, tmp_path / "run")
        argv = command(script, world, tmp_path, eval_data=path)
        refused(monkeypatch, capfd, script, argv, message, tmp_path / "run")


def test_the_command_can_be_given_again_once_the_data_is_mended(world, tmp_path, monkeypatch, capfd):
    path = write_rows(tmp_path / "bad.jsonl", bad_rows({"rejected": ""}))
    argv = command("dpo", world, tmp_path, data=path, max_steps=1)
    refused(monkeypatch, capfd, "dpo", argv, "bad.jsonl:3", tmp_path / "run")
    assert cli(monkeypatch, "dpo", [*argv, "--skip-bad-rows", "--dry-run"]) == 0
    assert "skipped    1 bad rows" in capfd.readouterr().out
    write_rows(path, pairs(5))
    assert cli(monkeypatch, "dpo", argv) == 0 and (tmp_path / "run" / "results.json").exists()


@pytest.mark.parametrize("script", ["dpo", "sft"])
def test_files_and_models_that_are_not_there(script, world, tmp_path, monkeypatch, capfd):
    (tmp_path / "no-model").mkdir()
    write_model(tmp_path / "torn")
    weights = tmp_path / "torn" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    tied = write_rows(tmp_path / "tied.jsonl", TIED)
    cases = [
        ({"data": tmp_path / "none.jsonl"}, "none.jsonl: no such file or folder"),
        ({"eval_data": tmp_path / "none.jsonl"}, "none.jsonl: no such file or folder"),
        ({"data": "somebody/something"}, "without a network, run `hf download somebody/something --repo-type dataset"),
        ({"model": tmp_path / "no-model"}, "the folder has no causal language model"),
        ({"model": tmp_path / "none"}, "no such folder"),
        ({"model": "~/none"}, "--model ~/none: no such folder"),
        ({"model": "somebody/something"}, "hf download somebody/something --local-dir DIR"),
        ({"out": world / "model"}, "already holds a model"),
        ({"out": world / "train.jsonl" / "below"}, "cannot write there"),
        ({"out": world / "train.jsonl"}, "cannot write there"),
        ({"resume": True}, "holds no run to continue"),
    ]
    if script == "dpo":
        cases.append(({"data": tied, "loss": "plackett_luce"}, "tied.jsonl:1: field 'ranks' has ties"))
    for changes, message in cases:
        refused(monkeypatch, capfd, script, command(script, world, tmp_path, **changes), message, tmp_path / "run")
    # the torn file is met after the library has shown its progress bar
    assert cli(monkeypatch, script, command(script, world, tmp_path, model=tmp_path / "torn")) == 2
    assert capfd.readouterr().err.splitlines()[-1].startswith(f"error: --model {tmp_path / 'torn'}: ")
    assert not [*(tmp_path / "run").iterdir()]


def test_a_reference_that_is_not_there(world, tmp_path, monkeypatch, capfd):
    assert cli(monkeypatch, "dpo", command("dpo", world, tmp_path, ref=tmp_path / "none")) == 2
    last = capfd.readouterr().err.splitlines()[-1]
    assert last.startswith("error: ") and f"--ref {tmp_path / 'none'}: no such folder" in last
    assert not [*(tmp_path / "run").iterdir()]


def test_unknown_flags_are_refused(world, tmp_path, monkeypatch, capfd):
    for changes in ({"loss": "nonsense"}, {"layout": "circle"}, {"batch_size": "many"}, {"nonsense": 1}):
        assert cli(monkeypatch, "dpo", command("dpo", world, tmp_path, **changes)) == 2
        assert next(iter(changes)).replace("_", "-") in capfd.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_bad_input_from_a_shell(world, tmp_path):
    """Without this test's hooks: the one line is all of stderr."""
    argv = command("dpo", world, tmp_path, data=tmp_path / "none.jsonl")
    done = subprocess.run([sys.executable, *argv], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert done.stderr == (f"error: {tmp_path}/none.jsonl: no such file or folder\n")


# -------------------------------------------------------------------------------------------------------- the result


@pytest.mark.parametrize("script", ["dpo", "sft"])
def test_what_a_run_leaves(script, world, go, whole, monkeypatch):
    kept = []
    monkeypatch.setattr(
        models, "save", lambda m, t, out, *lora, save=models.save: (kept.append(m), save(m, t, out, *lora))
    )
    run = go(script, eval_prompts=4, max_new_tokens=6, max_steps=2)
    names = {path.name for path in run.out.iterdir()}
    own = {"args.json", "environment.json", f"train_{script}.py", "metrics.jsonl", "samples.jsonl", "curves.png"}
    assert own | {"results.json", "config.json", "model.safetensors", "tokenizer.json"} <= names
    assert [path.name for path in (run.out / "checkpoint").iterdir()] == ["step-2"]  # from which it can be extended
    assert not [name for name in names if "partial" in name or name.startswith(".")]

    flags = json.loads((run.out / "args.json").read_text())
    assert set(flags) == {field.name for field in dataclasses.fields(SCRIPTS[script].Args)}
    assert flags["eval_prompts"] == 4 and flags["data"] == f"{world}/train.jsonl"
    environment = json.loads((run.out / "environment.json").read_text())
    assert environment["torch"] == torch.__version__.split("+")[0] or environment["torch"] == torch.__version__
    assert environment["transformers"] == transformers.__version__ and environment["threads"] == torch.get_num_threads()
    assert (run.out / f"train_{script}.py").read_text() == (ROOT / f"train_{script}.py").read_text()
    assert json.loads((run.out / "results.json").read_text()) == run.results
    samples = [json.loads(line) for line in open(run.out / "samples.jsonl")]
    columns = {"step", "prompt", "before", "after"} if script == "dpo" else {"step", "prompt", "answer"}
    assert len(samples) == 4 and all(row.keys() == columns and row["step"] == 2 for row in samples)
    assert {row["prompt"] for row in samples} <= {row["prompt"] for row in pairs(5, seed=1)}

    image = (run.out / "curves.png").read_bytes()
    assert image.startswith(b"\x89PNG\r\n\x1a\n") and image.endswith(b"IEND\xaeB`\x82")
    width, height = (int.from_bytes(image[i : i + 4], "big") for i in (16, 20))
    assert width > 500 and height > 250

    model, tokenizer = load(run.out), transformers.AutoTokenizer.from_pretrained(run.out)
    assert model.config._attn_implementation == "sdpa" and "tree" not in (run.out / "config.json").read_text()
    final = kept[0].state_dict()
    assert all(torch.equal(value, final[name]) for name, value in model.state_dict().items())
    start = load(world / "model").state_dict()
    assert any(not torch.equal(value, start[name]) for name, value in final.items())
    inputs = tokenizer("the plot was", return_tensors="pt", return_token_type_ids=False)
    assert inputs["input_ids"][0, 0] == tokenizer.bos_token_id
    out = model.generate(**inputs, max_new_tokens=5, do_sample=False)
    assert out.shape[1] > inputs["input_ids"].shape[1]


def test_kl_is_that_of_the_answers(world, go):
    """results.json: mean log pi - log ref of the policy's own answers, in nats an answer."""
    run = go(lr=3e-3, epochs=3, eval_prompts=5, max_new_tokens=6, layout="padded")
    held, tokenizer = read(world / "held.jsonl"), reviews.tokenizer()
    policy, reference = load(run.out), load(world / "model")
    sampled = generate(policy, tokenizer, [e.prompt for e in held], 6, seed=0)[0]
    answers = [dataclasses.replace(e, responses=[ids]) for e, ids in zip(held, sampled, strict=True)]
    ratios = zip(plain_logps(policy, answers), plain_logps(reference, answers), strict=True)
    assert run.results["after/kl"] == pytest.approx(mean(x - y for [x], [y] in ratios), abs=1e-3)
    assert run.results["before/kl"] == 0
    assert run.results["after/length"] == pytest.approx(mean(map(len, sampled)))
    assert run.results["after/ended"] == mean(ids[-1] == tokenizer.eos_token_id for ids in sampled)
    texts = [
        f"{e.prompt_text} {tokenizer.decode(ids, skip_special_tokens=True)}"
        for e, ids in zip(held, sampled, strict=True)
    ]
    assert run.results["after/gold"] == pytest.approx(mean(map(reviews.gold_reward, texts)))


@pytest.mark.parametrize("prompts", [0, 1, 2])
@pytest.mark.parametrize("script", ["dpo", "sft"])
def test_few_answers_and_no_held_out_rows(script, prompts, go):
    run = go(script, eval_prompts=prompts, max_new_tokens=1, max_steps=1, eval_data=None, eval_fraction=0.0)
    assert not run.evals and (run.out / "results.json").exists()
    samples = (run.out / "samples.jsonl").read_text().splitlines()
    assert len(samples) == prompts


def test_held_out_by_a_share_of_the_prompts(world, go, capsys):
    go(eval_data=None, eval_fraction=0.3, max_steps=1)
    prompts = [row["prompt"] for row in pairs(22)]
    held = sum(int(hashlib.sha256(p.encode()).hexdigest()[:16], 16) / 2**64 < 0.3 for p in prompts)
    assert 0 < held < 22 and f"{22 - held} examples to train on, {held} held out" in capsys.readouterr().out


@pytest.mark.parametrize("script", ["dpo", "sft"])
def test_dry_run_shows_three_examples_and_writes_nothing(script, world, tmp_path, monkeypatch, capfd):
    before = sorted(world.rglob("*"))
    assert cli(monkeypatch, script, [*command(script, world, tmp_path), "--dry-run"]) == 0
    out = capfd.readouterr().out
    assert "examples   22 of 22 rows" in out and "BOS        one in front of 22 of 22 prompts" in out
    assert f"EOS        at the end of {44 if script == 'dpo' else 22} of" in out
    assert ("baseline" in out) == (script == "dpo")
    assert "22 examples to train on, 5 held out" in out
    assert len(re.findall(r"train.jsonl:\d+: prompt", out)) == 3
    for i, row in enumerate(pairs(22), 1):
        shown = " ".join(out.partition(f"train.jsonl:{i}: prompt")[2].partition("train.jsonl:")[0].split())
        if shown:
            assert " ".join(f".{word!r}" for word in ["<bos>", *row["prompt"].split()]) in shown
            for side in ("chosen", "rejected"):
                response = " ".join(f"+{word!r}" for word in [*row[side].split(), "<eos>"])
                assert (response in shown) == (script == "dpo" or side == "chosen")
    assert not [*tmp_path.iterdir()] and sorted(world.rglob("*")) == before


@pytest.mark.parametrize(
    "given, flag",
    [
        ("--learning-rate 1e-4", "--lr"),
        ("--output_dir=runs/mine", "--out"),
        ("--num-epochs 2", "--epochs"),
        ("--per-device-train-batch-size 4", "--batch-size"),
    ],
)
def test_other_libraries_names_of_flags_are_translated(given, flag, monkeypatch, capsys):
    assert cli(monkeypatch, "dpo", ["train_dpo.py", *given.split()]) == 2
    name = re.split("[ =]", given)[0]
    assert capsys.readouterr().err == f"error: there is no {name}: use {flag} (see --help)\n"


# ------------------------------------------------------------------------------------------------------------- wandb


@pytest.fixture
def fake_wandb(monkeypatch):
    """A stand-in for wandb, which has `logged` what begins and is logged, and `finished` what ends."""
    logged, finished = [], []
    fake = SimpleNamespace(
        logged=logged,
        finished=finished,
        login=lambda: True,
        init=lambda **options: logged.append(options),
        log=lambda row, step=None: logged.append((step, row)),
        finish=lambda: finished.append(True),
        summary=SimpleNamespace(update=lambda results: finished.append(results)),
        Table=lambda columns, data: ("table", columns, data),
        Image=lambda path: ("image", path),
    )
    monkeypatch.setattr(runs, "wandb", fake)
    return fake


def test_wandb_gets_the_same_metrics(go, fake_wandb, monkeypatch):
    monkeypatch.setenv("WANDB_PROJECT", "films")
    run = go(wandb=True, eval_prompts=3, max_new_tokens=4)
    options, *rows = fake_wandb.logged
    assert options["config"]["loss"] == "dpo" and options["dir"] == str(run.out) and options["resume"] == "allow"
    assert options["project"] == "films" and options["name"] == run.out.name
    written = [json.loads(line) for line in open(run.out / "metrics.jsonl")]
    assert [{"step": step, **row} for step, row in rows[: len(written)]] == written
    (step, samples), (_, curves) = rows[len(written) :]
    kind, columns, data = samples["samples"]
    assert step == 3 and columns == ["prompt", "before", "after"] and len(data) == 3
    assert [dict(zip(columns, row, strict=True)) | {"step": 3} for row in data] == [
        json.loads(line) for line in open(run.out / "samples.jsonl")
    ]
    assert curves == {"curves": ("image", f"{run.out}/curves.png")} and fake_wandb.finished == [run.results, True]


def test_wandb_without_a_login_is_one_line_before_any_work(go, fake_wandb, tmp_path, monkeypatch):
    def login():
        raise RuntimeError("No API key configured.\nUse `wandb login` to log in.")

    accepts, fake_wandb.login = fake_wandb.login, login
    for name in ("WANDB_MODE", "WANDB_PROJECT"):
        monkeypatch.delenv(name, raising=False)
    out = tmp_path / "run"
    with pytest.raises(BadInput) as error:
        go(wandb=True, out=str(out))
    assert str(error.value) == "--wandb: No API key configured: run wandb login, or set WANDB_MODE=offline"
    assert not out.exists() and not (tmp_path / "cache").exists()
    fake_wandb.login = accepts
    go(wandb=True, out=str(out))
    assert fake_wandb.logged[0]["project"] == "rlhf"


@pytest.mark.slow
def test_wandb_offline(go, whole):
    pytest.importorskip("wandb")
    run = go(wandb=True, eval_prompts=2, max_new_tokens=4)
    [folder] = (run.out / "wandb").glob("offline-run-*")
    assert [*folder.glob("*.wandb")]
    assert [path.name for path in folder.rglob("*.png")] and [*folder.rglob("*.table.json")]


# --------------------------------------------------------------------------------------------------------- pad is eos


@pytest.mark.parametrize("layout", ["tree", "padded"])
def test_eos_is_trained_where_it_is_the_padding(layout, world, tmp_path):
    """A tokenizer without padding of its own: after a few steps the model ends a review where reviews end."""
    tokenizer = reviews.tokenizer()
    tokenizer.pad_token = tokenizer.eos_token
    model, eos = load(world / "model"), tokenizer.eos_token_id
    models.save(model, tokenizer, tmp_path / "model")
    rows = [
        {"prompt": "the plot was", "completion": "dull ."},
        {"prompt": "the script", "completion": "was not dull ."},
    ]
    data = write_rows(tmp_path / "rows.jsonl", rows)
    examples = build(list(enumerate_rows(rows)), tokenizer, "sft", 512, 1024)[0]
    batch = collate(examples, layout, models.pad_id(tokenizer))
    assert models.pad_id(tokenizer) == eos and batch.targets.tolist().count(eos) == 2
    logps, sums = scoring.response_logps(model, batch)
    models.set_attention(model, packed=False)
    want = [logps for [logps] in plain_logps(model, examples)]
    assert sums.tolist() == pytest.approx(want, abs=1e-4)
    ends = logps[batch.targets == eos]
    assert len(ends) == 2 and ends.tolist() == pytest.approx(
        [
            model(torch.tensor([e.prompt + e.responses[0][:-1]])).logits[0, -1].log_softmax(-1)[eos].item()
            for e in examples
        ],
        abs=1e-4,
    )

    a = train_sft.Args(model=str(tmp_path / "model"), data=str(data), out=str(tmp_path / "run"), device="cpu")
    train_sft.main(dataclasses.replace(a, eval_fraction=0.0, lr=2e-2, epochs=15, eval_prompts=0, layout=layout))
    trained = load(tmp_path / "run")
    for e in examples:
        with torch.no_grad():
            logits = trained(torch.tensor([e.prompt + e.responses[0][:-1]])).logits[0, -1]
        assert logits.softmax(-1)[eos] > 0.5


def enumerate_rows(rows):
    return ((f"rows.jsonl:{i}", row) for i, row in enumerate(rows, 1))


# -------------------------------------------------------------------------------------------------------------- help


@pytest.mark.parametrize("script", ["dpo", "sft"])
def test_help_is_quick_and_explains_every_flag(script):
    path, args = ROOT / f"train_{script}.py", SCRIPTS[script].Args
    helps = {}
    for kind in reversed(args.__mro__[:-1]):  # a flag has the help of its own class, or of one above
        [definition] = ast.parse(inspect.getsource(kind)).body
        for field, text in itertools.pairwise([*definition.body, ast.Pass()]):
            if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr):
                helps[field.target.id] = text.value.value
    assert helps.keys() == {field.name for field in dataclasses.fields(args)}

    seconds = []
    while not seconds or seconds[-1] >= 5 and len(seconds) < 2:
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        done = subprocess.run(
            [sys.executable, path, "--help"], capture_output=True, text=True, env=os.environ | {"COLUMNS": "300"}
        )
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        seconds.append(after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime)
    assert done.returncode == 0 and min(seconds) < 5
    squeezed = "".join(done.stdout.replace("│", " ").split())
    for name, text in helps.items():
        assert f"--{name.replace('_', '-')}" in done.stdout and "".join(text.split()) in squeezed, name


# ------------------------------------------------------------------------------------------------- settings at the edge


def test_kto_with_one_label_among_the_held_out_rows(go, tmp_path):
    rows = [{"prompt": row["prompt"], "completion": row["chosen"], "label": True} for row in pairs(4, seed=2)]
    write_rows(tmp_path / "good.jsonl", rows)
    run = go(loss="kto", eval_data=f"{tmp_path}/good.jsonl", max_steps=1)
    assert "after/eval/rewards/chosen" in run.results and "after/eval/rewards/margins" not in run.results


def test_kto_mismatched_responses_keep_to_max_length(go, tmp_path, monkeypatch):
    """A short prompt with a long answer, and a long prompt: the one's answer to the other's prompt would not fit."""
    word = "plot "
    rows = [
        {"prompt": word * 2, "completion": word * 20, "label": True},
        {"prompt": word * 12, "completion": word * 3, "label": False},
    ]
    write_rows(tmp_path / "uneven.jsonl", rows)
    longest = []
    collate_as_it_is = scoring.collate
    monkeypatch.setattr(scoring, "collate", lambda e, *a: longest.append(e) or collate_as_it_is(e, *a))
    data = f"{tmp_path}/uneven.jsonl"
    go(loss="kto", data=data, eval_data=data, max_prompt_length=14, max_length=24, max_steps=1)
    lengths = [len(e.prompt) + len(r) for examples in longest for e in examples for r in e.responses]
    assert max(lengths) == 24


def test_dpop_without_its_penalty_is_dpo(go):
    same = [go(max_steps=1, **flags).train[0] for flags in ({}, {"loss": "dpop", "dpop_lambda": 0.0})]
    assert same[0]["grad_norm"] == pytest.approx(same[1]["grad_norm"], rel=1e-6)


MARGIN_ALONE = {"dpo", "robust", "ipo", "r_dpo", "dpo_nll", "hinge", "exo", "discopop", "plackett_luce"}


@pytest.mark.parametrize("loss", sorted({*ALL_LOSSES} - MARGIN_ALONE - {"bco"}))
def test_a_divergence_that_a_loss_does_not_have_is_refused(go, loss):
    assert loss in "simpo orpo dpo_norm ipo_norm kto sppo nca apo_zero apo_down dpop".split()
    with pytest.raises(BadInput, match=f"--loss {loss} is not defined with --divergence js"):
        go(loss=loss, divergence="js")


def test_every_other_loss_takes_a_divergence():
    """Those of the margin, from which a prompt's constant drops out; and bco, an upper bound of dpo's loss for any
    rewards and any delta, since sigmoid(x) sigmoid(y) < sigmoid(x + y)."""
    for loss in {*MARGIN_ALONE, "bco"}:
        train_dpo.check_flags(train_dpo.Args(loss=loss, beta=BETA, divergence="chi_po", label_smoothing=0.1))
        D, constant = torch.tensor([0.7, -0.2], dtype=torch.float64), 3.0
        if loss in MARGIN_ALONE:
            lengths = torch.tensor([2, 3])
            a = train_dpo.Args(loss=loss, beta=BETA, label_smoothing=0.1)
            found = [train_dpo.objective(a, [ranked([1, 2])], D, -x * torch.ones(2), lengths)[0] for x in (0, constant)]
            assert found[0].item() == pytest.approx(found[1].item(), rel=1e-6), loss
    g = torch.Generator().manual_seed(0)
    w, r = 3 * torch.randn(2, 1000, generator=g, dtype=torch.float64)
    for delta in (-2.0, 0.0, 0.5):
        assert (losses.bco(w, r, BETA, delta) > losses.dpo(w, r, BETA)).all()


def test_a_reference_with_another_vocabulary_is_refused(go, tmp_path):
    tiny("llama").save_pretrained(tmp_path / "foreign")
    tokenizer = reviews.tokenizer()
    tokenizer.add_tokens(["zebra"])
    tokenizer.save_pretrained(tmp_path / "foreign")
    with pytest.raises(BadInput, match="its tokenizer is not the one of --model"):
        go(ref=f"{tmp_path}/foreign")


@pytest.mark.parametrize("most", [0, 3, 5, 512])
def test_held_out_rows_that_are_scored_are_chosen_by_hash(most, go, tmp_path, capsys):
    """The same metrics as with a file of just those rows, whose order there does not matter."""

    def digest(row: dict) -> bytes:
        return hashlib.sha256(repr((row["prompt"], [row["chosen"], row["rejected"]])).encode()).digest()

    held = pairs(5, seed=1)
    run = go(max_steps=1, eval_pairs=most)
    said = f"{most} of 5 held-out rows are scored, chosen by hash (--eval-pairs)"
    assert (said in capsys.readouterr().out) == (most < 5)
    few = sorted(held, key=digest)[:most]
    if not few:
        assert not run.evals and "after/eval/loss" not in run.results
        return
    for name, rows in (("few", few), ("mixed", [*reversed(held)])):
        write_rows(tmp_path / f"{name}.jsonl", rows)
        other = go(max_steps=1, eval_data=f"{tmp_path}/{name}.jsonl", eval_pairs=most)
        for mine, theirs in zip(run.evals, other.evals, strict=True):
            assert mine == pytest.approx(theirs, abs=1e-5)


@pytest.mark.parametrize("loss", ["dpo", "kto"])
def test_a_part_of_the_rows_uses_the_cache_of_all(loss, go, tmp_path, capsys, monkeypatch):
    """With a lower --max-steps, and with fewer held-out rows: what is read is what would be computed."""
    parts = [{"max_steps": 1}, {"eval_pairs": 2}][: 1 if loss == "kto" else 2]  # kto's z0 is of all held-out prompts
    alone = [go(loss=loss, **part) for part in parts]
    assert len({*(tmp_path / "cache").iterdir()}) == len(parts)
    shutil.rmtree(tmp_path / "cache")
    go(loss=loss)
    [file] = (tmp_path / "cache").iterdir()
    monkeypatch.setattr(refcache, "score_logps", lambda *_: pytest.fail("scored again"))
    capsys.readouterr()
    for run, part in zip(alone, parts, strict=True):
        again = go(loss=loss, **part, max_new_tokens=2, eval_prompts=1)
        assert f"reference log-probs: from {file}, which has these rows and more" in capsys.readouterr().out
        for mine, theirs in zip(again.train + again.evals, run.train + run.evals, strict=True):
            names = [name for name in mine if not name.startswith("perf/")]
            assert [mine[n] for n in names] == pytest.approx([theirs[n] for n in names], abs=1e-4)
    assert len({*(tmp_path / "cache").iterdir()}) == 1


def test_a_cache_of_more_rows_must_have_the_same_trained_tokens(tmp_path):
    rows = random_examples([(3, [2, 4]), (2, [5, 1])])
    masked = [dataclasses.replace(rows[0], trained=[[True, False], [True] * 4]), rows[1]]

    def ask(examples, value):
        key = refcache.cache_key("weights", reviews.tokenizer(), examples)
        logps = [torch.full((2,), value, dtype=torch.float64) for _ in examples]
        return refcache.cached(tmp_path, key, refcache.row_digests(examples), lambda: logps)[0].tolist()

    assert ask(masked, -1.0) == [-1, -1] and ask(masked[:1], -3.0) == [-1, -1] and ask(rows[:1], -2.0) == [-2, -2]


def test_a_row_that_is_there_twice_keeps_both_of_its_values(tmp_path):
    """They may differ by rounding, and a resumed run must have the same."""
    rows, logps = random_examples([(3, [2, 4])]) * 2, [torch.full((2,), x, dtype=torch.float64) for x in (-1.0, -2.0)]
    ask = lambda: refcache.cached(tmp_path, refcache.cache_key("", reviews.tokenizer(), rows), digests, lambda: logps)  # noqa: E731
    digests = refcache.row_digests(rows)
    assert [x.tolist() for x in ask()] == [x.tolist() for x in ask()] == [[-1, -1], [-2, -2]]


def test_a_damaged_cache_of_more_rows_is_not_used(go, tmp_path):
    go()
    [file] = (tmp_path / "cache").iterdir()
    tensors = load_file(file)
    with safe_open(file, "pt") as f:
        metadata = f.metadata()
    tensors["logps"][3] += 1
    save_file(tensors, file, metadata=metadata)
    go(max_steps=1)
    assert len({*(tmp_path / "cache").iterdir()}) == 2


def test_a_checkpoint_folder_without_its_state_is_passed_over(tmp_path):
    run = runs.Run(train_dpo.Args(out=f"{tmp_path}/run"), __file__)
    run.save_checkpoint(3, {"step": 3})
    (run.out / "checkpoint/step-9").mkdir()
    assert run.load_checkpoint() == {"step": 3}


def test_a_nan_at_the_first_step_names_its_rows(go, monkeypatch):
    monkeypatch.setitem(train_dpo.LOSSES, "dpo", lambda a, x: x.chosen * math.nan)
    with pytest.raises(FloatingPointError, match=r"step 1: the loss is nan.*train\.jsonl:\d+"):
        go(max_steps=1)


def test_prompts_of_preferences_are_not_the_beginnings_of_sft_rows():
    sft = [row["text"] for _, row in reviews.rows("sft", 300)]
    prompts = [row["prompt"] for _, row in reviews.rows("preference", 300)]
    assert sum(text.startswith(prompt + " ") for text, prompt in zip(sft, prompts, strict=True)) < 30


def test_a_gpu_without_memory_is_one_line_of_advice(monkeypatch, capsys):
    def main(a):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total of 1 GiB.")

    main.__module__ = train_dpo.__name__
    monkeypatch.setattr(sys, "argv", ["train_dpo.py"])
    with pytest.raises(SystemExit, match="1"):
        runs.cli(main, train_dpo.Args)
    line = "error: CUDA out of memory: lower --micro-batch-tokens, or see what --dry-run says would fit\n"
    assert capsys.readouterr().err == line
