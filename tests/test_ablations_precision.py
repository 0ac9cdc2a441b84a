"""ablations/precision: rounding without masters, what is seen of an update by hand, clauses, runs on a real model."""

import copy
import os
import subprocess
import sys

import pytest
import torch
import transformers
from test_data import CHAT
from tiny import random_examples, tiny

from ablations import common
from ablations.precision import __main__ as precision
from ablations.precision import seen, tier_s
from support import models


def on_the_grid(model):
    """The model with weights on the grid, so large that updates of 1e-7 are far below a step of it."""
    for weight in model.parameters():
        weight.data = (weight.data * 4).bfloat16().float() if weight.ndim > 1 else weight.data.bfloat16().float()
    return model


@pytest.mark.parametrize("optimizer", [seen.NoMasters, seen.Stochastic])
def test_rounding_of_the_master_after_each_step(optimizer):
    """Adam's first update is lr whatever the gradient: 1/4 of the distance from 1 to the next bfloat16, 1 + 2^-7."""
    torch.manual_seed(0)
    weight = torch.nn.Parameter(torch.ones(1, 40_000).bfloat16())
    weight.data[0, :50] = 0  # weights of 0 that get no gradient stay 0
    low = torch.zeros_like(weight, dtype=torch.int16)
    adam = optimizer([weight], {weight: low}, lr=2**-9, eps=1e-30)
    weight.grad = -torch.ones_like(weight)
    weight.grad[0, :50] = 0
    adam.step()
    up = (weight.data[0, 50:] == 1 + 2**-7).float().mean().item()
    assert not weight.data[0, :50].any() and not low.any() and {*weight.data.unique().tolist()} <= {0.0, 1.0, 1 + 2**-7}
    assert up == 0 if optimizer is seen.NoMasters else up == pytest.approx(0.25, abs=0.01)  # 4.6 deviations


def test_seen_of_an_update_by_hand():
    """An update of 1e-7 reaches hardly a weight on the grid, so nothing is seen. The masters have moved by the rate."""
    make, pairs = (lambda device: copy.deepcopy(model)), random_examples([(5, [6, 7]), (4, [8, 5])])
    model = on_the_grid(tiny("llama"))
    runs = {form: seen.measure(form, 1e-7, 0, make, pairs, (1,), 0)[1] for form in seen.FORMS if form != "float16"}
    plain, grid, none = (runs[form] for form in ("float32", "on the grid", "no masters"))
    for blind in (grid, none):
        assert blind["changed"] < 1e-3 and abs(blind["seen"]) < 0.05 * plain["true"]
    assert grid["true"] == pytest.approx(plain["true"], rel=0.05) == pytest.approx(runs["autocast"]["true"], rel=0.05)
    assert abs(none["true"]) < 0.1 * plain["true"] and plain["true"] > 1e-4
    assert plain["copied"] == 1 and abs(grid["copied"]) < 0.01
    assert plain["seen"] == pytest.approx(plain["true"], rel=1e-3)
    assert plain["cosine"] == pytest.approx(1) and grid["cosine"] > 0.99
    spacing = torch.cat([2.0 ** (w.abs().log2().floor() - 7).flatten() for w in model.parameters() if w.ndim > 1])
    assert grid["moved"] == pytest.approx((1e-7 / spacing).median().item(), rel=0.2)


def test_a_large_update_is_seen_in_every_form():
    make, pairs = (lambda device: copy.deepcopy(model)), random_examples([(5, [6, 7]), (4, [8, 5])])
    model = on_the_grid(tiny("llama"))
    for form in seen.FORMS:
        values = seen.measure(form, 0.02, 0, make, pairs, (1, 2), 0)[2]
        assert values["true"] > 0.1, form
        assert values["seen"] == pytest.approx(values["true"], rel=0.15), form
        assert values["kl"] == pytest.approx(values["true_kl"], rel=0.3) and values["changed"] > 0.9, form


def test_autocast_is_the_grid_but_for_rounding():
    """Two forward passes of the same float32 weights: the library's under autocast, ours of their bfloat16 copies."""
    model, pairs = on_the_grid(tiny("llama")), random_examples([(5, [6, 7])])
    make = lambda device: copy.deepcopy(model)  # noqa: E731
    both = [seen.measure(form, 1e-3, 0, make, pairs, (3,), 0)[3] for form in ("autocast", "on the grid")]
    assert both[0]["true"] == pytest.approx(both[1]["true"], rel=0.02)
    assert both[0]["copied"] == pytest.approx(both[1]["copied"], rel=0.02)


def results_with(tmp_path, values: dict) -> common.Results:
    results = common.Results(tmp_path / "results.csv")
    for setting, by_seed in values.items():
        for seed, numbers in enumerate(by_seed):
            results.add(setting, seed, numbers, 8)
            results.add(setting, seed, numbers)
    return results


def test_clauses_by_hand(tmp_path):
    of = lambda *pairs: [dict(zip(("seen", "true"), x, strict=True)) for x in pairs]  # noqa: E731
    end = lambda *pairs: [dict(zip(("kl", "gold"), x, strict=True)) for x in pairs]  # noqa: E731
    values = {"seen, on the grid, 1e-06": of((1, 10), (3, 10)), "seen, dithered, 1e-06": of((9, 10), (10, 10))}
    values |= {"DPO, on the grid, 1e-06": end((1.2, 0.5), (1.1, 0.7)), "DPO, dithered, 1e-06": end((1, 0.5), (1, 0.6))}
    clauses = precision.clauses(results_with(tmp_path, values))
    means = [round(mean, 6) for mean, _ in clauses.values()]
    assert means == [0.3, 0.05, -0.05, 0.0]  # 0.5 - 0.2; 0.1 - |0.95 - 1|; 0.1 - |1.15 - 1|; 0.05 - |0.05|
    half = 12.7062047 * 0.5  # of two values that differ by 1
    assert [h / half for _, h in clauses.values()] == pytest.approx([0.2, 0.1, 0.1, 0.1], rel=1e-4)


def test_gold_at_equal_kl_by_hand(tmp_path):
    results = common.Results(tmp_path / "results.csv")
    for step, (kl, gold) in enumerate([(0, 0.0), (1, 0.4), (3, 0.6)]):
        results.add("DPO, float32, 1e-05", 0, {"kl": kl, "gold": gold}, step)
    assert precision.gold_at(results, "DPO, float32, 1e-05", {0: 2.0}) == {0: pytest.approx(0.5)}


@pytest.mark.slow
def test_tier_s_and_check_with_a_small_model(tmp_path, monkeypatch):
    """The runs on a real model, with a small one on the grid in its place; and check.py, as a user runs it."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    sizes = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
    base = transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=len(CHAT), **sizes))
    models.save(on_the_grid(base), CHAT, tmp_path / "base")
    pairs = common.write(tmp_path / "pairs.jsonl", common.rows("preference", 160))
    monkeypatch.setattr(tier_s, "FULL", tier_s.FULL | {"max_steps": 3})
    monkeypatch.setattr(tier_s, "SEEN", {x: y for x, y in tier_s.SEEN.items() if y[1] == 5e-7})
    monkeypatch.setattr(tier_s, "PLACES", (1, 2))
    monkeypatch.setattr(tier_s, "TOKENS", 400)  # the tokenizer's tokens are bytes
    results = common.Results(tmp_path / "tier_s.csv")
    for part in ("seen", "DPO"):
        tier_s.main(results, tmp_path, str(tmp_path / "base"), pairs, part, 1, 1, True)
    ended = results.values("DPO, dithered, 5e-07", "kl")
    assert ended.keys() == {0} and ended[0] >= 0 and results.values("seen, dithered, 5e-07", "true")[0] > 0
    held, train = ((tmp_path / f"{name}.jsonl").read_text().splitlines() for name in ("held", "train"))
    assert len(held) == tier_s.HELD and train and not {*held} & {*train}

    command = [sys.executable, precision.__file__.replace("__main__", "check"), str(tmp_path / "base")]
    done = subprocess.run([*command, "1e-3"], capture_output=True, text=True, env=os.environ | {"HF_HUB_OFFLINE": "1"})
    assert done.returncode == 0, done.stderr
    lines = [line.replace(",", "").split() for line in done.stdout.splitlines()]
    numbers = [[float(line[i]) for i in (3, 5, -1)] for line in lines]
    assert len(lines) == 8 and all(true > 0 for _, true, _ in numbers)
    assert numbers[-1][2] == pytest.approx(1, abs=0.1) == pytest.approx(numbers[-1][0] / numbers[-1][1], abs=0.1)
