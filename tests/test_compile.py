"""--compile: the layers compiled, one by one, give what they give without."""

import json

import pytest
import torch
from safetensors.torch import load_file
from test_resume import pairs, write_model, write_rows
from tiny import random_examples, tiny

import train_dpo
import train_ppo
import train_rm
import train_sft
from rlhf import BadInput
from rlhf.tree import collate
from support import models, scoring
from support.generate import cached_logps, generate

BATCHES = [  # of other numbers of prompts, responses and tokens; the last is longer than any before
    random_examples([(7, [5, 9]), (1, [3, 4]), (12, [1, 14])]),
    random_examples([(9, [6, 3, 2]), (4, [3, 4]), (2, [11]), (3, [7, 5])]),
    random_examples([(40, [30, 25]), (9, [6])]),
]


@pytest.fixture(autouse=True)
def forget():
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield
    torch._dynamo.reset()


def measured(model, examples, layout):
    """Log-probs of all response tokens, and the gradient of their sum as one vector."""
    model.zero_grad()
    logps, _ = scoring.response_logps(model, collate(examples, layout, 0))
    logps.sum().backward()
    return logps.detach(), torch.cat([w.grad.flatten() for w in model.parameters() if w.grad is not None])


def relative(a, b):
    return ((a - b).norm() / b.norm()).item()


def graphs() -> int:
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "name, what", [("llama", "plain"), ("llama", "checkpointed"), ("llama", "adapters"), ("gpt2", "plain")]
)
def test_compiled_layers_give_the_same_log_probs_and_gradients(name, what):
    """In both layouts; and batches of other sizes take no graphs of their own."""
    plain, compiled = tiny(name), tiny(name)
    for model in (plain, compiled):
        if what == "adapters":
            models.add_lora(model, 3)
            with torch.no_grad():
                for weight in models.trained(model).values():
                    weight.add_(torch.randn(weight.shape, generator=torch.Generator().manual_seed(0)) * 0.1)
        if what == "checkpointed":
            models.checkpoint_layers(model)
    names = [*compiled.state_dict()]
    models.compile_layers(compiled)
    assert [*compiled.state_dict()] == names
    for layout in ("tree", "padded"):
        made = []
        for examples in BATCHES:
            want, got = measured(plain, examples, layout), measured(compiled, examples, layout)
            assert relative(got[0], want[0]) < 1e-5 and relative(got[1], want[1]) < 1e-5
            made.append(graphs())
        assert made[0] > 0 and made[1] == made[2] == made[0]


@pytest.mark.slow
def test_generation_computes_eagerly():
    plain, compiled = tiny("llama"), tiny("llama")
    models.compile_layers(compiled)
    measured(compiled, BATCHES[0], "tree")
    tokenizer = type("Tokenizer", (), {"eos_token_id": 2, "pad_token_id": 0})
    prompts, before = [[5, 6, 7], [8, 9], [10]], graphs()
    answers = [generate(model, tokenizer, prompts, 12, seed=3, k=2) for model in (plain, compiled)]
    assert answers[0] == answers[1] and graphs() == before > 0
    responses = answers[0][::2]
    want, got = (cached_logps(model, prompts, responses, 1.0, 0) for model in (plain, compiled))
    assert all(torch.equal(x, y) for x, y in zip(want, got, strict=True)) and graphs() == before
    scored = measured(compiled, BATCHES[0], "tree")[0]
    assert relative(scored, measured(plain, BATCHES[0], "tree")[0]) < 1e-5


def test_a_model_whose_layers_are_not_named_is_refused(monkeypatch):
    model = tiny("llama")
    monkeypatch.setattr(model, "_no_split_modules", None)
    with pytest.raises(BadInput, match="--compile: the library names no layers of llama models"):
        models.compile_layers(model)


@pytest.mark.slow
@pytest.mark.parametrize("script", [train_sft, train_dpo, train_rm, train_ppo], ids=lambda x: x.__name__)
def test_every_script_compiles_to_the_same_numbers_and_weights(script, tmp_path):
    write_model(tmp_path / "model")
    write_rows(tmp_path / "pairs.jsonl", pairs(16))
    given = {"model": str(tmp_path / "model"), "data": str(tmp_path / "pairs.jsonl"), "max_steps": 2, "batch_size": 4}
    given |= {"eval_fraction": 0.2, "eval_prompts": 2, "device": "cpu", "lr": 1e-3}
    given |= {"reward": "gold", "value_init": "policy", "max_new_tokens": 6, "k": 2} if script is train_ppo else {}
    given |= {"ref_cache": str(tmp_path / "cache")} if script is train_dpo else {}
    rows, weights = [], []
    for compile in (False, True):
        out = tmp_path / str(compile)
        script.main(script.Args(**given, out=str(out), compile=compile))
        lines = [json.loads(line) for line in open(out / "metrics.jsonl")]
        rows.append([{name: x for name, x in line.items() if "perf" not in name} for line in lines])
        weights.append(load_file(out / "model.safetensors"))
    assert graphs() > 0 and [*map(sorted, rows[0])] == [*map(sorted, rows[1])]
    for one, other in zip(*rows, strict=True):
        assert one == pytest.approx(other, rel=1e-4, abs=1e-5)
    assert weights[0].keys() == weights[1].keys()
    assert all(torch.allclose(weights[0][name], weights[1][name], atol=1e-5) for name in weights[0])
