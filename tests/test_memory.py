"""What saves memory: low-rank adapters and gradient checkpointing."""

import json
import math

import pytest
import torch
import transformers
from safetensors.torch import load_file
from test_generate import IDS
from test_resume import pairs, write_model, write_rows
from tiny import ARCHITECTURES, GQA, random_examples, tiny

import train_dpo
import train_ppo
import train_rm
import train_sft
from rlhf import BadInput
from rlhf.tree import collate
from support import models, runs, scoring
from support.generate import generate

TREES = ["llama", "gpt2", "opt", "gemma", "cohere2"]
EXAMPLES = random_examples([(5, [4, 6]), (9, [3, 3])])


def logps_of(model, layout="padded"):
    return scoring.response_logps(model, collate(EXAMPLES, layout, 0, "cpu"))[0]


def filled(model):
    """The model with adapters that do something."""
    lora = models.add_lora(model, 3)
    with torch.no_grad():
        for weight in models.trained(model).values():
            weight.add_(torch.randn_like(weight) * 0.1)
    return lora


# ------------------------------------------------------------------------------------------------------------ adapters


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_without_adapters_the_policy_is_its_reference(name):
    """Before the first step, and inside without_lora always; the head stays frozen, which is the cheap path."""
    model = tiny(name)
    with torch.no_grad():
        before = logps_of(model)
        models.add_lora(model, 3)
        assert torch.equal(logps_of(model), before)
        model = tiny(name)
        filled(model)
        adapted = logps_of(model)
        assert (adapted - before).abs().max() > 1e-3
        with models.without_lora(model):
            assert torch.equal(logps_of(model), before)
        assert torch.equal(logps_of(model), adapted)
    assert not models.output_head(model).weight.requires_grad
    assert all("lora_" in key for key in models.trained(model))


def test_adapters_that_cannot_be_switched_off_are_refused(monkeypatch):
    """As when peft calls its switch something else: the policy would silently be its own reference."""
    model = tiny("llama")
    with models.without_lora(model):  # without adapters there is nothing to switch
        pass
    filled(model)
    for module in model.modules():
        monkeypatch.delattr(module, "_disable_adapters", raising=False)
    with pytest.raises(BadInput, match="cannot switch off the adapters of peft"), models.without_lora(model):
        pass


@pytest.mark.parametrize("layout", ["tree", "padded"])
def test_gradients_of_adapters_follow_the_chain_rule(layout):
    """W' = W + 2 B A: at B = 0, dL/dB = 2 dL/dW A^T and dL/dA = 0."""
    whole, model = tiny("llama"), tiny("llama")
    logps_of(whole, layout).sum().backward()
    models.add_lora(model, 3)
    logps_of(model, layout).sum().backward()
    for i, layer in enumerate(model.model.layers):
        for name in ("self_attn.q_proj", "self_attn.o_proj", "mlp.down_proj"):
            dW = whole.get_submodule(f"model.layers.{i}.{name}").weight.grad
            adapted = layer.get_submodule(name)
            A, B = adapted.lora_A["default"].weight, adapted.lora_B["default"].weight
            assert torch.allclose(B.grad, 2 * dW @ A.T, rtol=1e-3, atol=1e-5) and B.grad.abs().max() > 1e-3
            assert not A.grad.any()


def test_merged_is_w_plus_two_b_a(tmp_path):
    model = tiny("llama")
    W = model.model.layers[1].mlp.up_proj.weight.clone()
    lora = filled(model)
    adapted = model.model.layers[1].mlp.up_proj
    want = W + 2 * adapted.lora_B["default"].weight @ adapted.lora_A["default"].weight
    with torch.no_grad():
        logps = logps_of(model)
        merged = lora.merge_and_unload()
        assert torch.allclose(merged.model.layers[1].mlp.up_proj.weight, want, atol=1e-6)
        assert torch.allclose(logps_of(merged), logps, atol=1e-4)
    assert type(merged) is transformers.LlamaForCausalLM


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
    write_model(folder / "model")
    write_rows(folder / "pairs.jsonl", pairs(24))
    return folder


def arguments(world, out, **settings):
    fixed = {"batch_size": 8, "epochs": 2, "lr": 3e-3, "eval_prompts": 3, "max_new_tokens": 8, "device": "cpu"}
    given = {"model": str(world / "model"), "data": str(world / "pairs.jsonl"), "out": str(out)}
    cache = {"ref_cache": str(world / "cache")}
    return train_dpo.Args(**{**given, **cache, **fixed, "lora_rank": 2, "eval_fraction": 0.2, **settings})


def test_dpo_trains_adapters_alone(world, tmp_path):
    """The loss starts at ln 2; the weights below stay; saved alone and merged are one policy, whose KL is reported."""
    results = train_dpo.main(arguments(world, tmp_path / "alone"))
    rows = [json.loads(line) for line in open(tmp_path / "alone" / "metrics.jsonl")]
    losses = [row["loss"] for row in rows if "loss" in row]
    assert losses[0] == pytest.approx(math.log(2), abs=1e-5) and losses[-1] < losses[0] - 0.01
    assert results["before/kl"] == 0 and results["after/kl"] != 0

    merged = train_dpo.main(arguments(world, tmp_path / "merged", lora_merge=True))
    assert merged == pytest.approx(results, abs=1e-4)
    names = {path.name for path in (tmp_path / "alone").iterdir()}
    assert "adapter_model.safetensors" in names and "model.safetensors" not in names
    assert "model.safetensors" in {path.name for path in (tmp_path / "merged").iterdir()}
    ids = torch.tensor([[5, 6, 7, 8]])
    start, alone, whole = (
        transformers.AutoModelForCausalLM.from_pretrained(folder).eval()(ids).logits
        for folder in (world / "model", tmp_path / "alone", tmp_path / "merged")
    )
    assert torch.allclose(alone, whole, atol=1e-4) and (alone - start).abs().max() > 1e-2
    ours = models.load_model(str(tmp_path / "alone"), "cpu")
    assert "model.layers.0.mlp.up_proj.weight" in ours.state_dict()  # merged, as an ordinary model
    assert torch.allclose(ours(ids).logits, whole, atol=1e-4)


def test_adapters_resume_bit_for_bit(world, tmp_path):
    train_dpo.main(arguments(world, tmp_path / "straight"))
    stopped = arguments(world, tmp_path / "stopped", save_every=2)
    save = runs.Run.save_checkpoint

    def interrupt(run, step, state):
        save(run, step, state)
        assert all("lora_" in name for name in state["model"])
        if step == 2:
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runs.Run, "save_checkpoint", interrupt)
        with pytest.raises(KeyboardInterrupt):
            train_dpo.main(stopped)
    stopped.resume = True
    train_dpo.main(stopped)
    a, b = (load_file(tmp_path / x / "adapter_model.safetensors") for x in ("straight", "stopped"))
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_adapters_on_adapters_are_kept(world, tmp_path):
    """SFT with adapters, then DPO with more on top: what is saved is the policy that was trained, with both in it."""
    rows = write_rows(tmp_path / "rows.jsonl", [{"prompt": r["prompt"], "completion": r["chosen"]} for r in pairs(16)])
    common = {"data": str(rows), "max_steps": 3, "batch_size": 4, "lr": 3e-2, "eval_fraction": 0.0, "eval_prompts": 0}
    sft = train_sft.Args(model=str(world / "model"), lora_rank=2, out=str(tmp_path / "sft"), device="cpu", **common)
    train_sft.main(sft)
    dpo = arguments(world, tmp_path / "dpo", model=str(tmp_path / "sft"))
    with pytest.MonkeyPatch.context() as patch:
        kept = []
        patch.setattr(models, "save", lambda m, *rest, save=models.save: (kept.append(m), save(m, *rest)))
        train_dpo.main(dpo)
    ids = torch.tensor([[5, 6, 7, 8]])
    start, first, both = (models.load_model(str(x), "cpu") for x in (world / "model", sft.out, dpo.out))
    models.set_attention(kept[0], packed=False)
    a, b, c, trained = (model(ids).logits for model in (start, first, both, kept[0]))
    assert torch.allclose(c, trained, atol=1e-4)
    assert (b - a).abs().max() > 1e-2 and (c - b).abs().max() > 1e-2
    assert not models.is_reward_model(dpo.out)


def test_sft_takes_adapters_and_checkpointing(world, tmp_path):
    rows = write_rows(tmp_path / "rows.jsonl", [{"prompt": r["prompt"], "completion": r["chosen"]} for r in pairs(16)])
    common = {"model": str(world / "model"), "data": str(rows), "max_steps": 3, "batch_size": 4, "lr": 3e-3}
    common |= {"eval_fraction": 0.0, "eval_prompts": 0, "device": "cpu"}
    for name, settings in {"lora": {"lora_rank": 2, "lora_merge": True}, "plain": {"lora_rank": 0}}.items():
        for checkpointing in (False, True):
            out = tmp_path / f"{name}{checkpointing}"
            train_sft.main(train_sft.Args(**common, **settings, out=str(out), gradient_checkpointing=checkpointing))
        a, b = (load_file(tmp_path / f"{name}{x}" / "model.safetensors") for x in (False, True))
        assert all(torch.allclose(a[key], b[key], atol=1e-5) for key in a)
        start = load_file(world / "model" / "model.safetensors")
        moved = {key for key in a if not torch.equal(a[key], start[key])}
        assert ("model.embed_tokens.weight" in moved) == (name == "plain") and len(moved) >= 14


def test_merging_nothing_is_refused(world, tmp_path):
    with pytest.raises(BadInput, match="--lora-merge: there are no adapters to merge without --lora-rank"):
        train_dpo.main(arguments(world, tmp_path / "x", lora_rank=0, lora_merge=True))


# ------------------------------------------------------------------------------------------------------- checkpointing


@pytest.mark.slow
@pytest.mark.parametrize("script", [train_dpo, train_rm, train_ppo], ids=lambda x: x.__name__)
def test_every_script_checkpoints_to_the_same_numbers(script, world, tmp_path, monkeypatch):
    used = []
    monkeypatch.setattr(models, "checkpoint_layers", lambda m, own=models.checkpoint_layers: (used.append(m), own(m)))
    given = {"model": str(world / "model"), "data": str(world / "pairs.jsonl"), "max_steps": 2, "batch_size": 4}
    given |= {"eval_fraction": 0.0, "eval_prompts": 0, "device": "cpu", "lr": 1e-3}
    given |= {"reward": "gold", "value_init": "policy", "max_new_tokens": 6, "k": 2} if script is train_ppo else {}
    given |= {"ref_cache": str(tmp_path / "cache")} if script is train_dpo else {}
    rows = []
    for checkpointing in (False, True):
        out = tmp_path / str(checkpointing)
        script.main(script.Args(**given, out=str(out), gradient_checkpointing=checkpointing))
        rows.append([json.loads(line) for line in open(out / "metrics.jsonl")])
    plain, checkpointed = ([{n: x for n, x in r.items() if "perf" not in n} for r in part] for part in rows)
    assert [*map(sorted, plain)] == [*map(sorted, checkpointed)]
    for one, other in zip(plain, checkpointed, strict=True):
        assert one == pytest.approx(other, rel=1e-4, abs=1e-5)
    assert len(used) == (2 if script is train_ppo else 1)  # policy and critic


@pytest.mark.parametrize("layout", ["tree", "padded"])
def test_layers_keep_what_docs_scaling_counts(layout):
    """In SmolLM2's shape 9 + 2 d_kv / d + 4 w / d = 20.3 floats for each number of the residual stream (the tree layout
    keeps copies of keys; the other one what attention gives once), and two thirds of the bytes in bfloat16."""
    shape = {"hidden_size": 576, "intermediate_size": 1536, "num_attention_heads": 9, "num_key_value_heads": 3}
    examples, found = random_examples([(100, [60, 60])]), {}
    for dtype in (torch.float32, torch.bfloat16):
        for layers in (1, 2):
            config = transformers.LlamaConfig(vocab_size=61, num_hidden_layers=layers, **shape)
            model, kept = transformers.LlamaForCausalLM(config).eval(), {}
            batch = collate(examples, layout, 0, "cpu")
            weights = {tuple(sorted(w.shape)) for w in model.parameters()}  # and their copies in bfloat16

            def keep(x, kept=kept, weights=weights):
                if tuple(sorted(x.shape)) not in weights:
                    kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
                return x

            with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
                states = scoring.hidden_states(model, batch, batch.sources, dtype)
            found[dtype, layers] = sum(kept.values()) / (4 * 576 * batch.input_ids.numel())
            del states
    floats, half = (found[dtype, 2] - found[dtype, 1] for dtype in (torch.float32, torch.bfloat16))
    assert floats == pytest.approx(9 + 2 * 192 / 576 + 4 * 1536 / 576, abs=1.1)
    assert half / floats == pytest.approx(2 / 3, abs=0.03)


def starcoder2():
    """Its layers drop out by a number of their own, and not by a module."""
    config = transformers.Starcoder2Config(**GQA, residual_dropout=0.3, embedding_dropout=0.3, attention_dropout=0.3)
    torch.manual_seed(0)
    return models.without_dropout(transformers.Starcoder2ForCausalLM(config))


@pytest.mark.parametrize("make", [starcoder2, lambda: models.without_dropout(tiny("mixtral"))])
def test_checkpointing_brings_no_dropout_back(make):
    model = make()
    before = logps_of(model).detach()
    models.checkpoint_layers(model)
    assert torch.equal(logps_of(model).detach(), before)


def test_a_model_that_cannot_checkpoint_is_refused():
    model = torch.nn.Linear(2, 2)
    model.config = transformers.LlamaConfig()
    with pytest.raises(BadInput, match="--gradient-checkpointing: not possible with llama models"):
        models.checkpoint_layers(model)


@pytest.mark.parametrize("layout", ["tree", "padded"])
@pytest.mark.parametrize("name", TREES)
def test_checkpointing_changes_what_is_kept_and_not_the_gradient(name, layout):
    gradients, kept = [], []
    for checkpointing in (False, True):
        model, total = models.without_dropout(tiny(name)), 0
        if checkpointing:
            models.checkpoint_layers(model)

        def count(x):
            nonlocal total
            total += x.numel() * (not isinstance(x, torch.nn.Parameter))
            return x

        with torch.autograd.graph.saved_tensors_hooks(count, lambda x: x):
            logps = logps_of(model, layout)
            kept.append(total)
            logps.sum().backward()
        assert not checkpointing or (generate(model, IDS, [[5, 6]], 3, k=2)[0] and not model.training)
        gradients.append(torch.cat([w.grad.flatten() for w in model.parameters() if w.grad is not None]))
    assert (gradients[0] - gradients[1]).norm() <= 1e-6 * gradients[0].norm()
    assert kept[1] < 0.5 * kept[0]
