"""--compile: the layers compiled, one by one, give what they give without, and few graphs serve all lengths."""

import functools
import json
import random
from types import SimpleNamespace

import flash_on_cpu  # noqa: F401 - registers kernels
import pytest
import torch
import transformers
from safetensors.torch import load_file
from test_resume import pairs, write_model, write_rows
from tiny import ARCHITECTURES, GQA, random_examples, tiny

import train_dpo
import train_ppo
import train_rm
import train_sft
from rlhf import BadInput, tree
from rlhf.tree import collate
from support import generate as sampling
from support import models, scoring, sharding
from support.generate import generate

BATCHES = [  # of other numbers of prompts, responses and tokens; the last is longer than any before
    random_examples([(7, [5, 9]), (1, [3, 4]), (12, [1, 14])]),
    random_examples([(9, [6, 3, 2]), (4, [3, 4]), (2, [11]), (3, [7, 5])]),
    random_examples([(40, [30, 25]), (9, [6])]),
]


@pytest.fixture(autouse=True)
def forget():
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    sampling._compiled_distribution.cache_clear()
    with (  # compile_layers sets all three
        torch._dynamo.config.patch(recompile_limit=8, fail_on_recompile_limit_hit=False),
        torch.fx.experimental._config.patch(use_duck_shape=True),
    ):
        yield
    torch.set_autocast_enabled("cuda", False)
    torch._dynamo.reset()


def as_named(layout, dtype, monkeypatch) -> str:
    """The layout; for "flash" the tree with the attention that it has on CUDA, by flash_on_cpu.py."""
    if layout != "flash":
        return layout
    torch.set_autocast_enabled("cuda", dtype == torch.bfloat16)
    torch.set_autocast_dtype("cuda", torch.bfloat16)
    for module in (tree, models):
        monkeypatch.setattr(module, "takes_flash", lambda query: True)
    return "tree"


def measured(model, examples, layout, dtype=torch.float32, between=lambda: None):
    """Log-probs of all response tokens, and the gradient of their sum as one vector; `between` is called between the
    forward and the backward pass."""
    model.zero_grad()
    logps, _ = scoring.response_logps(model, collate(examples, layout, 0), dtype)
    between()
    logps.sum().backward()
    return logps.detach(), torch.cat([w.grad.flatten() for w in model.parameters() if w.grad is not None])


def relative(a, b):
    return ((a - b).norm() / b.norm()).item()


def graphs() -> int:
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


KINDS = ("plain", "checkpointed", "adapters", "checkpointed adapters")
CASES = [(layout, "llama", kind) for layout in ("flash", "padded") for kind in KINDS]
CASES += [("flash", "gpt2", "plain"), ("padded", "gpt2", "plain"), ("tree", "llama", "plain")]


@pytest.mark.slow
@pytest.mark.parametrize("layout, name, what", CASES)
def test_compiled_layers_give_the_same_log_probs_and_gradients(layout, name, what, monkeypatch):
    """And batches of other sizes take no graphs of their own."""
    layout = as_named(layout, torch.float32, monkeypatch)
    plain, compiled = tiny(name), tiny(name)
    for model in (plain, compiled):
        if "adapters" in what:
            models.add_lora(model, 3)
            with torch.no_grad():
                for weight in models.trained(model).values():
                    weight.add_(torch.randn(weight.shape, generator=torch.Generator().manual_seed(0)) * 0.1)
        if "checkpointed" in what:
            models.checkpoint_layers(model)
    names = [*compiled.state_dict()]
    models.compile_layers(compiled)
    assert [*compiled.state_dict()] == names
    made = []
    for examples in BATCHES:
        want, got = measured(plain, examples, layout), measured(compiled, examples, layout)
        assert relative(got[0], want[0]) < 1e-5 and relative(got[1], want[1]) < 1e-5
        made.append(graphs())
    assert made[0] > 0 and made[1] == made[2] == made[0]


@pytest.fixture
def backend_eager(monkeypatch):
    """Graphs are made and counted as ever, and not translated."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    monkeypatch.setitem(ARCHITECTURES, "qwen2", lambda: transformers.Qwen2Config(**GQA))


def other_lengths():
    """20 batches: 13 of 1 to 4 prompts with 2 responses, 5 of a single row, two rows without padding, and 2 tokens."""
    rng = random.Random(0)
    lengths = lambda n: [rng.randint(1, 20) for _ in range(n)]  # noqa: E731
    shapes = [[(*lengths(1), lengths(2)) for _ in range(1 + i % 4)] for i in range(13)]
    shapes += [[(*lengths(1), lengths(1))] for _ in range(5)]
    return [random_examples(x) for x in [*shapes, [(4, [6, 6])], [(1, [1])]]]


@pytest.mark.parametrize("layout, number", [("tree", 10), ("flash", 2), ("padded", 2)])  # buckets cut a layer in five
@pytest.mark.parametrize(
    "name, what, dtype",
    [
        ("llama", "checkpointed", torch.bfloat16),
        pytest.param("llama", "checkpointed", torch.float32, marks=pytest.mark.slow),
        pytest.param("llama", "plain", torch.bfloat16, marks=pytest.mark.slow),
        pytest.param("llama", "plain", torch.float32, marks=pytest.mark.slow),
        pytest.param("qwen2", "plain", torch.float32, marks=pytest.mark.slow),
        pytest.param("qwen2", "plain", torch.bfloat16, marks=pytest.mark.slow),
        pytest.param("qwen2", "checkpointed", torch.float32, marks=pytest.mark.slow),
        pytest.param("qwen2", "checkpointed", torch.bfloat16, marks=pytest.mark.slow),
    ],
)
def test_after_one_training_and_one_scoring_batch_other_lengths_add_at_most_two_graphs(
    name, what, dtype, layout, number, backend_eager, monkeypatch
):
    """The first batch is as long as the model is wide."""
    cuts, layout = layout == "tree", as_named(layout, dtype, monkeypatch)
    model, low_bits = sharding.load_trained(lambda device: tiny(name), "cpu", dtype, 0)
    flags = SimpleNamespace(gradient_dtype="float32", optimizer_state="float32", compile=True)
    flags.gradient_checkpointing = what == "checkpointed"
    models.prepare_training(model, low_bits, flags)
    models.adamw(model, low_bits, flags, lr=0.0)

    def train_and_score(examples) -> int:
        measured(model, examples, layout, dtype)
        with torch.no_grad():
            scoring.response_logps(model, collate(examples, layout, 0), dtype)
        return graphs()

    first = train_and_score(random_examples([(7, [9, 25])] if layout == "padded" else [(4, [12, 16])]))
    assert first == number
    later = [train_and_score(examples) for examples in other_lengths()]
    assert later[-1] == first + (0 if cuts else 2)  # a single padded row, and trees without a shared prompt


@pytest.mark.slow
@pytest.mark.parametrize("layout, other", [("tree", "padded"), ("padded", "tree")])
def test_compiled_layers_recompute_what_they_computed(layout, other):
    """Even if a batch in the other layout is scored before the backward pass."""
    plain, compiled = tiny("llama"), tiny("llama")
    models.checkpoint_layers(compiled)
    models.compile_layers(compiled)
    want = measured(plain, BATCHES[0], layout)

    def between():
        with torch.no_grad():
            scoring.response_logps(compiled, collate(BATCHES[1], other, 0))

    for examples in (BATCHES[0], BATCHES[2], BATCHES[0]):
        got = measured(compiled, examples, layout, between=between)
    assert relative(got[0], want[0]) < 1e-5 and relative(got[1], want[1]) < 1e-5


def test_layers_that_scale_their_scores_differently_share_graphs(backend_eager, monkeypatch):
    """The attention of such a GPT-2 stays out of the graphs, which hold the scale as a constant."""
    layout = as_named("flash", torch.float32, monkeypatch)
    plain, compiled = tiny("gpt2"), tiny("gpt2")
    for model in (plain, compiled):
        for i, layer in enumerate(model.transformer.h):
            layer.attn.scaling, layer.attn.scale_attn_by_inverse_layer_idx = 0.5 / (i + 1), True
    models.compile_layers(compiled)
    for examples in BATCHES:
        want, got = measured(plain, examples, layout), measured(compiled, examples, layout)
        assert relative(got[0], want[0]) < 1e-5 and relative(got[1], want[1]) < 1e-5 and graphs() == 5


def test_reaching_the_recompile_limit_is_an_error(backend_eager):
    """Where torch alone would go on uncompiled."""
    model = tiny("llama")
    models.compile_layers(model)
    measured(model, BATCHES[0], "padded")
    with torch._dynamo.config.patch(recompile_limit=1), pytest.raises(torch._dynamo.exc.FailOnRecompileLimitHit):
        measured(model, random_examples([(5, [6])]), "padded")


@pytest.mark.parametrize("name", ["llama", "gemma3_text", "gpt2"])
def test_compiled_steps_of_the_decode_loop_give_the_same_answers_from_five_graphs(name, backend_eager, monkeypatch):
    """Four of the layers, which the attention cuts, and one of the distribution over the vocabulary; other numbers of
    rows, prompts and tokens add none. What else samples, and every prompt, computes eagerly."""
    plain, compiled = tiny(name), tiny(name)
    models.compile_layers(compiled)
    tokenizer = type("Tokenizer", (), {"eos_token_id": 2, "pad_token_id": 0})
    for prompts, number in (([[5, 6, 7], [8, 9], [10]], 12), ([[5, 6] * 9, [8, 9], [10], [11]], 20)):
        want, got = (generate(model, tokenizer, prompts, number, seed=3, k=2) for model in (plain, compiled))
        assert got[0] == want[0] and graphs() == 5
        assert all(x == pytest.approx(y, abs=1e-5) for x, y in zip(got[1], want[1], strict=True))
    monkeypatch.setattr(sampling, "choose_sampler", lambda *_: "library")
    answers = [generate(model, tokenizer, prompts, 12, seed=4)[0] for model in (plain, compiled)]
    assert answers[0] == answers[1] and graphs() == 5


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
