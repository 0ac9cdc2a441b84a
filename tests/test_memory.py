"""What saves memory: low-rank adapters and gradient checkpointing; and what a step takes, known beforehand."""

import itertools
import json
import math
import re
import shutil
import warnings

import pytest
import torch
import transformers
from packaging.version import Version
from safetensors.torch import load_file, save_file
from test_generate import IDS
from test_resume import pairs, write_model, write_rows
from tiny import ARCHITECTURES, GQA, random_examples, tiny

import train_dpo
import train_ppo
import train_rm
import train_sft
from rlhf import BadInput
from rlhf.tree import collate
from support import dryrun, memory, models, reviews, runs, scoring, sharding
from support.generate import generate
from support.rewards import load_reward

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


# ------------------------------------------------------------------------------------------- adapters of reward models


def rm_arguments(world, out, **settings):
    fixed = {"batch_size": 8, "epochs": 2, "lr": 3e-3, "eval_prompts": 3, "max_new_tokens": 8, "device": "cpu"}
    given = {"model": str(world / "model"), "data": str(world / "pairs.jsonl"), "out": str(out)}
    return train_rm.Args(**{**given, **fixed, "lora_rank": 2, "eval_fraction": 0.2, **settings})


@pytest.fixture(scope="module")
def rm(world, tmp_path_factory):
    """A reward model's adapters."""
    out = tmp_path_factory.mktemp("rm") / "rm"
    train_rm.main(rm_arguments(world, out))
    return out


SENTENCES = [("the plot was", "superb ."), ("the acting felt", "not dull but weak ."), ("i", "loved it .")]


def rewards_of(folder):
    prompts, responses = zip(*SENTENCES, strict=True)
    return load_reward(str(folder))(prompts, responses, [{}] * len(SENTENCES))


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_saved_adapters_are_the_model_that_was_trained(name, tmp_path):
    """To rounding; and all of its weights can be trained further. No library calls what we use deprecated."""
    model, tokenizer = tiny(name), reviews.tokenizer()
    models.save(model, tokenizer, tmp_path / "base")
    models.require_adaptable(str(tmp_path / "base"), False)
    with warnings.catch_warnings():
        warnings.simplefilter("error", FutureWarning)
        model = models.load_model(str(tmp_path / "base"), "cpu")
        models.save(model, tokenizer, tmp_path / "adapters", filled(model))
        ours = models.load_model(str(tmp_path / "adapters"), "cpu")
    assert torch.allclose(logps_of(ours), logps_of(model), atol=1e-4)
    assert (logps_of(ours) - logps_of(models.load_model(str(tmp_path / "base"), "cpu"))).abs().max() > 1e-3
    assert all(weight.requires_grad for weight in ours.parameters())
    assert all("lora_" in key for key in load_file(tmp_path / "adapters" / "adapter_model.safetensors"))


@pytest.mark.parametrize("name", [name for name in ARCHITECTURES if name not in ("granite", "cohere2")])
def test_saved_adapters_are_the_reward_model_that_was_trained(name, tmp_path):
    tokenizer = reviews.tokenizer()
    models.save(tiny(name), tokenizer, tmp_path / "base")
    model = models.new_reward_model(models.load_model(str(tmp_path / "base"), "cpu"), tokenizer)
    models.save(model, tokenizer, tmp_path / "adapters", filled(model))
    ours = models.load_reward_model(str(tmp_path / "adapters"), "cpu")
    rewards = [scoring.response_rewards(x, collate(EXAMPLES, "padded", 0, "cpu")) for x in (ours, model)]
    assert torch.allclose(*rewards, atol=1e-4) and rewards[0].std() > 1e-2


def test_a_reward_models_adapters_and_its_head_are_trained(world, rm):
    """The head in full, the matrices below by 2 B A, and nothing else."""
    start = models.new_reward_model(models.load_model(str(world / "model"), "cpu"), reviews.tokenizer())
    saved = load_file(rm / "adapter_model.safetensors")
    assert sorted(saved)[-1] == "base_model.model.score.weight" and all("lora_" in key for key in sorted(saved)[:-1])
    assert saved["base_model.model.score.weight"].shape == (1, 32)
    model = models.load_reward_model(str(rm), "cpu")
    assert torch.equal(model.score.weight, saved["base_model.model.score.weight"])
    for name, weight in start.named_parameters():
        part = f"base_model.model.{name.removesuffix('.weight')}"
        got = model.get_parameter(name)
        if f"{part}.lora_A.weight" in saved:
            A, B = (saved[f"{part}.lora_{x}.weight"] for x in "AB")
            assert torch.allclose(got, weight + 2 * B @ A, atol=1e-6) and B.abs().max() > 1e-4
        elif name != "score.weight":
            assert torch.equal(got, weight)


def test_a_reward_models_head_moves_from_its_start(world, tmp_path):
    """By AdamW's first step, whose size is the learning rate in every coordinate."""
    heads, prepare = [], models.prepare_training
    with pytest.MonkeyPatch.context() as patch:
        keep = lambda model, *rest: (heads.append(model.score.weight.clone()), prepare(model, *rest))[1]  # noqa: E731
        patch.setattr(models, "prepare_training", keep)
        train_rm.main(rm_arguments(world, tmp_path / "one", max_steps=1, schedule="constant", warmup=0.0))
    head = load_file(tmp_path / "one" / "adapter_model.safetensors")["base_model.model.score.weight"]
    assert torch.allclose((head - heads[0]).abs(), torch.full_like(head, 3e-3), rtol=1e-3)


def test_merged_rewards_are_those_of_the_adapters(world, rm, tmp_path, capsys):
    """Merged at the end of training and merged afterwards: one function up to rounding."""
    results = train_rm.main(rm_arguments(world, tmp_path / "at_end", lora_merge=True))
    assert results == pytest.approx(json.loads((rm / "results.json").read_text()), abs=1e-5)
    base = load_file(world / "model" / "model.safetensors")
    capsys.readouterr()
    train_rm.main(train_rm.Args(model=str(rm), lora_merge=True, out=str(tmp_path / "later")))
    printed = capsys.readouterr().out.splitlines()
    assert printed == [
        f"Nothing was trained: the reward model in {tmp_path}/later is {world}/model with the adapters in {rm} merged "
        "into it."
    ]
    want = rewards_of(rm)
    assert max(want) - min(want) > 0.1
    for name in ("at_end", "later"):
        assert rewards_of(tmp_path / name) == pytest.approx(want, abs=1e-5)
        merged = load_file(tmp_path / name / "model.safetensors")
        assert torch.equal(merged["model.embed_tokens.weight"], base["model.embed_tokens.weight"])
        assert not any("lora_" in key for key in merged)


@pytest.mark.skipif(Version(transformers.__version__) < Version("5.24"), reason="transformers 5.17 leaves the head out")
def test_transformers_reads_a_reward_models_adapters(rm):
    ids = torch.tensor([[5, 6, 7, 8]])
    raw = models.load_reward_model(str(rm), "cpu")(ids).logits
    theirs = transformers.AutoModelForSequenceClassification.from_pretrained(
        rm, num_labels=1, pad_token_id=reviews.tokenizer().pad_token_id
    )
    assert torch.allclose(theirs.eval()(ids).logits, raw, atol=1e-5)


def test_the_mean_reward_is_kept_beside_the_adapters(rm):
    """Rewards are relative to it, as those of a whole reward model."""
    results, model = json.loads((rm / "results.json").read_text()), models.load_reward_model(str(rm), "cpu")
    assert [model.config.reward_mean, model.config.reward_std] == [results["reward_mean"], results["reward_std"]]
    assert results["reward_mean"] != 0
    tokenizer = reviews.tokenizer()
    for (prompt, response), reward in zip(SENTENCES, rewards_of(rm), strict=True):
        ids = tokenizer(prompt)["input_ids"] + tokenizer(response, add_special_tokens=False)["input_ids"]
        ids = ids if ids[-1] == tokenizer.eos_token_id else [*ids, tokenizer.eos_token_id]
        raw = model(torch.tensor([ids])).logits.item()
        assert reward == pytest.approx(raw - results["reward_mean"], abs=1e-5)


def test_a_reward_models_adapters_resume_bit_for_bit(world, rm, tmp_path):
    """The head among them. In the middle of the run only these are in the checkpoint."""
    save = runs.Run.save_checkpoint

    def interrupt(run, step, state):
        save(run, step, state)
        assert all("lora_" in name or name == "score.weight" for name in state["model"])
        assert "score.weight" in state["model"]
        if step == 2:
            raise KeyboardInterrupt

    stopped = rm_arguments(world, tmp_path / "stopped", save_every=2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runs.Run, "save_checkpoint", interrupt)
        with pytest.raises(KeyboardInterrupt):
            train_rm.main(stopped)
    stopped.resume = True
    train_rm.main(stopped)
    a, b = (load_file(x / "adapter_model.safetensors") for x in (rm, tmp_path / "stopped"))
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
    assert (rm / "results.json").read_text() == (tmp_path / "stopped" / "results.json").read_text()


def test_ppo_takes_a_reward_models_adapters(world, rm, tmp_path):
    """As reward and as critic, whose weights are all trained: what is logged is what the merged model gives."""
    train_rm.main(train_rm.Args(model=str(rm), lora_merge=True, out=str(tmp_path / "merged")))
    rows = []
    for reward in (rm, tmp_path / "merged"):
        given = {"model": str(world / "model"), "data": str(world / "pairs.jsonl"), "reward": str(reward)}
        given |= {"max_steps": 2, "batch_size": 4, "k": 2, "max_new_tokens": 6, "lr": 1e-3, "eval_prompts": 2}
        train_ppo.main(train_ppo.Args(**given, out=str(tmp_path / f"ppo-{reward.name}"), device="cpu"))
        rows.append([json.loads(line) for line in open(tmp_path / f"ppo-{reward.name}" / "metrics.jsonl")])
    for one, other in zip(*rows, strict=True):
        want = {name: x for name, x in other.items() if "perf" not in name}
        assert {name: one[name] for name in want} == pytest.approx(want, rel=1e-3, abs=1e-4)
    assert rows[0][0]["loss/value"] > 0 and rows[0][0]["objective/scores"] != rows[0][1]["objective/scores"]


@pytest.mark.parametrize("rank", [0, 2], ids=["whole", "adapters"])
def test_a_reward_model_is_trained_on_from_adapters(rank, world, rm, tmp_path):
    """From those of a reward model: it starts with their rewards, and with adapters it is found from both bases."""
    a = rm_arguments(world, tmp_path / "more", model=str(rm), lora_rank=rank)
    train_rm.main(a)
    start, end = rewards_of(rm), rewards_of(tmp_path / "more")
    assert start != pytest.approx(end, abs=1e-3)
    first, last = ([json.loads(line) for line in open(folder / "metrics.jsonl")] for folder in (tmp_path / "more", rm))
    assert first[0]["eval/loss"] == pytest.approx(last[-1]["eval/loss"], abs=1e-5)
    embeddings = [models.load_reward_model(str(x), "cpu").model.embed_tokens.weight for x in (rm, tmp_path / "more")]
    assert torch.equal(*embeddings) == (rank > 0)


def test_a_policys_adapters_are_the_base_of_a_reward_models(world, tmp_path):
    train_dpo.main(arguments(world, tmp_path / "dpo"))
    train_rm.main(rm_arguments(world, tmp_path / "rm", model=str(tmp_path / "dpo"), lora_merge=False))
    train_rm.main(rm_arguments(world, tmp_path / "merged", model=str(tmp_path / "dpo"), lora_merge=True))
    assert json.loads((tmp_path / "rm" / "adapter_config.json").read_text())["base_model_name_or_path"] == str(
        tmp_path / "dpo"
    )
    assert rewards_of(tmp_path / "rm") == pytest.approx(rewards_of(tmp_path / "merged"), abs=1e-5)
    assert models.is_reward_model(str(tmp_path / "rm")) and not models.is_reward_model(str(tmp_path / "dpo"))


def test_bfloat16_trains_adapters_and_head_exactly(world, tmp_path):
    """The frozen base is rounded, without low bits; what is saved of adapters and head is float32."""
    found, prepare = [], models.prepare_training

    def look(model, low_bits, *rest):
        lora = prepare(model, low_bits, *rest)
        found.append((dict(model.named_parameters()), low_bits))
        return lora

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(models, "prepare_training", look)
        train_rm.main(rm_arguments(world, tmp_path / "rm", dtype="bfloat16"))
    [(weights, low_bits)] = found
    assert {w for name, w in weights.items() if "lora_" in name} == low_bits.keys()
    assert weights["score.weight"].requires_grad and weights["score.weight"].dtype == torch.float32
    base = load_file(world / "model" / "model.safetensors")
    key = "model.layers.1.mlp.up_proj.base_layer.weight"
    assert torch.equal(weights[key].float(), base["model.layers.1.mlp.up_proj.weight"].bfloat16().float())
    saved = load_file(tmp_path / "rm" / "adapter_model.safetensors")
    assert {x.dtype for x in saved.values()} == {torch.float32}
    for name in ("base_model.model.score.weight", "base_model.model.model.layers.1.mlp.up_proj.lora_A.weight"):
        assert not torch.equal(saved[name], saved[name].bfloat16().float())


def test_a_new_pad_token_goes_with_the_adapters(tmp_path):
    """The tokenizer has neither pad nor BOS: the base has no row for the new token, and loading adds one."""
    tokenizer, policy = reviews.tokenizer(), models.load_model(str(write_model(tmp_path / "model")), "cpu")
    tokenizer.pad_token = tokenizer.eos_token
    tokenizer.bos_token = tokenizer.eos_token
    models.save(policy, tokenizer, tmp_path / "base")
    model = models.new_reward_model(models.load_model(str(tmp_path / "base"), "cpu"), tokenizer)
    vocabulary = policy.config.vocab_size
    assert tokenizer.pad_token_id == vocabulary
    lora = filled(model)
    models.save(model, tokenizer, tmp_path / "rm", lora)
    before = torch.get_rng_state()
    first = models.load_reward_model(str(tmp_path / "rm"), "cpu")
    assert torch.equal(before, torch.get_rng_state())
    torch.manual_seed(1)
    assert models.digest(first) == models.digest(models.load_reward_model(str(tmp_path / "rm"), "cpu"))
    assert first.config.pad_token_id == vocabulary and first.model.embed_tokens.num_embeddings == vocabulary + 1
    ids = torch.tensor([[5, 6, 7, 8, vocabulary]])
    assert torch.allclose(first(ids).logits, model(ids).logits, atol=1e-5)


def test_adapters_without_the_head_are_refused(rm, tmp_path):
    shutil.copytree(rm, tmp_path / "headless")
    path = tmp_path / "headless" / "adapter_model.safetensors"
    save_file({key: x for key, x in load_file(path).items() if "score" not in key}, path)
    with pytest.raises(BadInput, match="headless: the folder has no set of adapters: 'score.weight'$"):
        models.load_reward_model(str(tmp_path / "headless"), "cpu")


# ------------------------------------------------------------------------------- bases, merging, what peft does not do


def test_the_base_is_found_from_any_directory(world, rm, tmp_path, monkeypatch):
    """Given by a relative path."""
    monkeypatch.chdir(world)
    train_rm.main(rm_arguments(world, "runs/rm", model="model"))
    train_dpo.main(arguments(world, "runs/dpo", model="model"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model").mkdir()  # another one of this name, here
    assert rewards_of(world / "runs" / "rm") == pytest.approx(rewards_of(rm), abs=1e-6)
    for name in ("rm", "dpo"):
        config = json.loads((world / "runs" / name / "adapter_config.json").read_text())
        assert config["base_model_name_or_path"] == str(world / "model")


@pytest.mark.parametrize("load", [models.load_model, models.load_reward_model, models.is_reward_model])
@pytest.mark.parametrize(
    "change, message",
    [
        ({"base_model_name_or_path": "/gone/sft"}, "its base model /gone/sft: no such folder"),
        ({"base_model_name_or_path": None}, "names no model that the adapters were trained on"),
        ("[", "not JSON"),
        ([], "not a JSON object"),
    ],
)
def test_adapters_without_their_base_are_refused(change, message, load, world, tmp_path):
    model = tiny("llama")
    models.save(model, reviews.tokenizer(), tmp_path, models.add_lora(model, 2))
    path = tmp_path / "adapter_config.json"
    config = json.loads(path.read_text()) | change if isinstance(change, dict) else change
    path.write_text(config if isinstance(config, str) else json.dumps(config))
    with pytest.raises(BadInput, match=message) as error:
        load(*[str(tmp_path), "cpu"][: 2 - (load is models.is_reward_model)])
    assert str(tmp_path) in str(error.value) and "\n" not in str(error.value)


def test_merging_alone_writes_a_policy(world, tmp_path, monkeypatch, capsys):
    """Beside the adapters if no --out is given; in half the bytes if asked for."""
    train_dpo.main(arguments(world, tmp_path / "dpo"))
    monkeypatch.chdir(tmp_path)
    capsys.readouterr()
    assert train_sft.main(train_sft.Args(model="dpo", lora_merge=True)) == {}
    line = f"Nothing was trained: the policy in dpo-merged is {world}/model with the adapters in dpo merged into it.\n"
    assert capsys.readouterr().out == line
    train_ppo.main(train_ppo.Args(model="dpo/", lora_merge=True, out="half", save_dtype="bfloat16"))
    ids = torch.tensor([[5, 6, 7, 8]])
    one, other, half = (
        transformers.AutoModelForCausalLM.from_pretrained(x).eval() for x in ("dpo", "dpo-merged", "half")
    )
    assert torch.allclose(one(ids).logits, other(ids).logits, atol=1e-4)
    assert half.lm_head.weight.dtype == torch.bfloat16
    assert transformers.AutoTokenizer.from_pretrained("dpo-merged").get_vocab() == reviews.tokenizer().get_vocab()
    with pytest.raises(BadInput, match="^--out dpo-merged already exists: name another$"):
        train_dpo.main(train_dpo.Args(model="dpo", lora_merge=True))
    with pytest.raises(BadInput, match="only writes out the adapters in dpo: leave out --data, --lr, or give --lora-r"):
        train_dpo.main(train_dpo.Args(model="dpo", lora_merge=True, lr=1e-3, data="x.jsonl", out="more"))
    with pytest.raises(BadInput, match="no adapters to merge without --lora-rank, and none in runs/sft$"):
        train_rm.main(train_rm.Args(lora_merge=True))


@pytest.mark.parametrize("script", [train_sft, train_dpo, train_rm, train_ppo], ids=lambda x: x.__name__)
def test_what_peft_refuses_is_refused_before_rows_are_read(script, tmp_path, capsys):
    model = transformers.MambaForCausalLM(transformers.MambaConfig(vocab_size=500, hidden_size=32, num_hidden_layers=2))
    models.save(model, reviews.tokenizer(), tmp_path / "mamba")
    given = {"model": str(tmp_path / "mamba"), "data": str(tmp_path / "no such.jsonl"), "out": str(tmp_path / "out")}
    with pytest.raises(BadInput, match="^--lora-rank: peft puts no adapters into mamba models: leave it out") as error:
        script.main(script.Args(**given, lora_rank=2, device="cpu"))
    assert "\n" not in str(error.value) and not (tmp_path / "out").exists()
    with pytest.raises(BadInput, match="no such.jsonl"):
        script.main(script.Args(**given, device="cpu"))


def test_adapters_of_a_model_that_is_saved_nowhere_are_refused(tmp_path):
    given = {"data": str(tmp_path / "none.jsonl"), "out": str(tmp_path / "out"), "lora_rank": 2, "device": "cpu"}
    with pytest.raises(BadInput, match="^--lora-rank: the new model of --model reviews is saved nowhere"):
        train_sft.main(train_sft.Args(**given))
    with pytest.raises(BadInput, match="none.jsonl"):
        train_sft.main(train_sft.Args(**given, lora_merge=True))


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


# ---------------------------------------------------------------------------------------- what a step takes, beforehand

SIZES = {  # layers, width, width of the MLP, words, heads, heads of keys and values, whether the head is the embeddings
    "small": (2, 256, 768, 4096, 4, 2, True),
    "larger": (6, 384, 1024, 2048, 6, 2, False),
}
FAST = [("small", 2), ("larger", 1)]  # sizes and micro-batches of a step; the others are slow tests
FLAGS = {
    "float32": {},
    "bfloat16": {"dtype": "bfloat16"},
    "bfloat16 gradients": {"dtype": "bfloat16", "gradient_dtype": "bfloat16"},
    "8-bit moments": {"dtype": "bfloat16", "gradient_dtype": "bfloat16", "optimizer_state": "8bit"},
    "checkpointing": {"gradient_checkpointing": True},
    "bfloat16, checkpointing": {"dtype": "bfloat16", "gradient_checkpointing": True},
    "adapters": {"lora_rank": 8},
    "bfloat16, adapters, checkpointing": {"dtype": "bfloat16", "lora_rank": 8, "gradient_checkpointing": True},
}


def llama_config(size):
    names = "num_hidden_layers hidden_size intermediate_size vocab_size num_attention_heads num_key_value_heads"
    values = dict(zip([*names.split(), "tie_word_embeddings"], SIZES[size], strict=True))
    return transformers.LlamaConfig(**values)


def allocated_bytes(config, steps, layout, flags):
    """What training holds between two steps, and the most that it holds during one, by the allocations that the
    profiler saw on the CPU."""
    a = train_dpo.Args(device="cpu", **flags)
    dtype = models.DTYPES[a.dtype]
    make = lambda device: models.without_dropout(transformers.AutoModelForCausalLM.from_config(config))  # noqa: E731
    model, low_bits = sharding.load_trained(make, "cpu", dtype, None if a.lora_rank else 0)
    models.prepare_training(model, low_bits, a, a.lora_rank)
    optimizer = models.adamw(model, low_bits, a, lr=1e-5, weight_decay=0.0)

    def step(groups):
        for group in groups:
            logps = scoring.response_logps(model, collate(group, layout, 0), dtype)[1]
            (logps.sum() / 8).backward()
        sharding.clip_gradients(optimizer, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    step(steps[0])
    moments = [x for state in optimizer.state.values() for x in state.values() if isinstance(x, torch.Tensor)]
    tensors = [*model.parameters(), *model.buffers(), *low_bits.values(), *moments]
    held = sum({x.untyped_storage()._cdata: x.untyped_storage().nbytes() for x in tensors}.values())
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        for groups in steps[1:]:
            step(groups)
    events = [x for x in profiler.profiler.kineto_results.events() if x.name() == "[memory]"]
    sums = itertools.accumulate(x.nbytes() for x in sorted(events, key=lambda x: x.start_ns()))
    return held, held + max(sums)


@pytest.mark.parametrize(
    "size, flags, passes",
    [
        pytest.param(size, flags, passes, marks=[] if (size, passes) in FAST else pytest.mark.slow)
        for size, flags, passes in itertools.product(SIZES, FLAGS, (1, 2))
    ],
)
def test_a_step_takes_what_was_estimated(size, flags, passes):
    """Within 10 % of the peak, also of what lies above weights and optimizer state, and within 1 % of these."""
    config = llama_config(size)
    examples = random_examples([(120, [150, 90]), (60, [200, 110])])
    steps = [[examples] * passes] * 2
    held, peak = allocated_bytes(config, steps, "tree", FLAGS[flags])
    plan = memory.Plan(**FLAGS[flags])
    sizes = [[memory.measure(group, "tree") for group in groups] for groups in steps]
    parts = memory.estimate(memory.trace(config, examples, plan, "tree"), sizes, plan)
    assert parts["weights"] + parts["low bits"] + parts["optimizer"] == pytest.approx(held, rel=0.01)
    assert parts["peak"] == pytest.approx(peak, rel=0.05)
    assert parts["peak"] - held == pytest.approx(peak - held, rel=0.1)


def test_the_padded_layout_is_estimated_too():
    config, examples = llama_config("small"), random_examples([(120, [150, 90]), (60, [200, 110])])
    held, peak = allocated_bytes(config, [[examples]] * 2, "padded", {})
    size, plan = memory.measure(examples, "padded"), memory.Plan()
    assert size == (4 * 270, 550)
    parts = memory.estimate(memory.trace(config, examples, plan, "padded"), [[size]], plan)
    assert parts["peak"] == pytest.approx(peak, rel=0.05)


def test_many_prompts_are_traced_as_few():
    """The same tokens and keys in fewer segments: 40 prompts take 5 times what 8 take, which are traced one by one."""
    config, plan = llama_config("small"), memory.Plan()
    shapes = [memory.trace(config, random_examples([(60, [70, 50])] * n), plan, "tree") for n in (8, 40)]
    assert [shape.tokens for shape in shapes] == [8 * 180, 40 * 180]
    assert shapes[1].kept == pytest.approx(5 * shapes[0].kept, rel=0.02)


def test_layers_are_traced_as_docs_scaling_counts():
    """9 + 2 d_kv / d + 4 w / d floats for each number of the residual stream; with checkpoints only that number itself;
    and the weights of a Llama by hand."""
    config = llama_config("larger")
    examples, d, w, kv = random_examples([(200, [100])]), 384, 1024, 128
    shape = memory.trace(config, examples, memory.Plan(), "tree")
    assert shape.kept / (4 * 300 * d) == pytest.approx(9 + 2 * kv / d + 4 * w / d, abs=0.5)
    layer = 2 * d * d + 2 * d * kv + 3 * d * w
    assert (shape.layers, shape.layer_matrices, shape.layer_elements) == (6, layer, layer + 2 * d)
    assert shape.elements == 6 * (layer + 2 * d) + 2 * 2048 * d + d
    assert (shape.head, shape.embeddings, shape.tied) == ((2048, d), 2048 * d, False)
    recomputed = memory.trace(config, examples, memory.Plan(gradient_checkpointing=True, lora_rank=16), "tree")
    assert recomputed.kept == 4 * 300 * d
    assert recomputed.adapters == 6 * 16 * (2 * (d + d) + 2 * (d + kv) + 3 * (d + w))


def test_bytes_of_a_weight_by_hand():
    """The figures of an 8B model in one process: 60.2 GiB with bfloat16 gradients, 75.0 with float32 ones."""
    plan = memory.Plan("bfloat16", "bfloat16", "8bit")
    parts = memory.state_bytes(8.03e9, plan)
    assert parts == {
        "weights": 16.06e9,
        "low bits": 16.06e9,
        "gradients": 16.06e9,
        "optimizer": 8.03e9 * (2 + 12 / 256),
    }
    assert sum(parts.values()) / 2**30 == pytest.approx(60.2, abs=0.05)
    assert sum(memory.state_bytes(8.03e9, plan._replace(gradient_dtype="float32")).values()) / 2**30 == pytest.approx(
        75.1, abs=0.1
    )
    assert sum(memory.state_bytes(1000, memory.Plan()).values()) == 16000
    assert sum(memory.state_bytes(1000, memory.Plan("bfloat16"), shards=4).values()) == 4000
    assert memory.state_bytes(1000, memory.Plan("bfloat16"), trained=False)["weights"] == 2000


def test_logits_by_hand():
    """On a GPU in bfloat16: a softmax of 2 bytes, a tile of float32 logits, gradients; and if the softmax is too large,
    tiles alone. 8 processes hold an eighth of 16 bytes a weight."""
    plan = memory.Plan("bfloat16", on_gpu=True)
    n, v, d = 8192, 131072, 4096
    kept, forward, backward = memory.head_bytes(n, v, d, plan)
    assert kept == 2 * n * v + 2 * n * d and forward == 1024 * v * 4 and backward == 4 * v * d + 4 * n * d
    kept, forward, backward = memory.head_bytes(n, v, d, plan._replace(keep_softmax_mib=2047))
    assert kept == 2 * n * d and forward == 1024 * v * 4
    assert backward == 4 * v * d + 4 * n * d + 1.5 * 1024 * v * 4
    assert memory.head_bytes(n, v, d, plan._replace(lora_rank=1))[2] == 4 * n * d
    shape = memory.Shape(1000, 2, 300, 290, 200, (20, 10), False, 200, 0, 1, 0, 0, 0)
    parts = memory.estimate(shape, [[(1, 0)]], memory.Plan(processes=8, gradient_checkpointing=True))
    assert parts["weights"] + parts["gradients"] + parts["optimizer"] == 2000
    assert parts["gathered"] == 400 * 12 + 300 * 16


def test_live_bytes_are_those_alive():
    with memory.LiveBytes() as live:
        a = torch.zeros(100)
        view = a[:50]  # no bytes of its own
        b = a + 1
        del a
        assert live.now == 800 and live.peak == 800
        del view
        assert live.now == 400
        b = b.double()
    assert live.now == 800 and live.peak == 1200 and b.nbytes == 800


def test_operations_by_hand():
    shape = memory.Shape(1000, 2, 300, 290, 200, (20, 10), False, 200, 0, 1, 0, 0, 0)
    body, head = 2 * 290 * 7, 200 * 3
    assert memory.operations(shape, 7, 3) == 2 * (body + head)
    assert memory.operations(shape, 7, 3, memory.Plan()) == 6 * (body + head)
    assert memory.operations(shape, 7, 3, memory.Plan(lora_rank=2)) == 4 * (body + head)
    assert memory.operations(shape, 7, 3, memory.Plan(gradient_checkpointing=True)) == 8 * body + 6 * head


def dry_run(world, capsys, script=train_dpo, **settings):
    """What --dry-run prints of memory and time: the table's rows by their name, and the text."""
    given = {"model": str(world / "model"), "data": str(world / "pairs.jsonl"), "out": str(world / "none")}
    given |= {"device": "cpu", "eval_fraction": 0.2, "dry_run": True}
    script.main(script.Args(**{**given, **settings}))
    text = capsys.readouterr().out.partition("Does it fit")[2]
    header, *lines = text.partition("\n\n")[2].partition("\n\n")[0].splitlines()
    names = re.split(r"\s{2,}", header)
    rows = [re.split(r"\s{2,}", line) for line in lines[1:]]
    return {cells[0]: dict(zip(names, cells, strict=True)) for cells in rows}, text


def test_dry_run_says_what_fits_without_loading_weights(world, capsys, monkeypatch):
    """Numbers recomputed from the model and the rows; checkpointing and adapters take less of what they should."""
    model = models.load_model(str(world / "model"), "cpu")
    monkeypatch.setattr(models, "load_model", None)
    monkeypatch.setattr(transformers.PreTrainedModel, "from_pretrained", None)
    rows, text = dry_run(world, capsys, batch_size=4)
    assert {"flags as given", "--gradient-checkpointing", "--lora-rank 16", "--dtype bfloat16"} <= rows.keys()
    given, saved, lora = (rows[name] for name in ("flags as given", "--gradient-checkpointing", "--lora-rank 16"))
    size = model.num_parameters()
    assert float(given["weights"]) == pytest.approx(4 * size / 2**30, rel=0.01)
    assert float(given["optimizer"]) == pytest.approx(8 * size / 2**30, rel=0.01)
    assert float(saved["activations"]) < float(given["activations"]) and float(saved["peak"]) < float(given["peak"])
    assert float(lora["optimizer"]) < float(given["optimizer"])
    assert given["fits an 80 GB GPU"] == "yes" and "not estimated" not in text
    assert float(saved["hours an epoch"]) > float(given["hours an epoch"]) > float(lora["hours an epoch"])

    tokens = int(re.search(r"time     (\d+) tokens an epoch", text)[1])
    layers = sum(x.numel() for layer in models.layers(model) for x in layer.parameters() if x.ndim > 1)
    low = 6 * layers * tokens / (40e9 * torch.get_num_threads()) / 3600
    assert low < float(given["hours an epoch"]) < 2 * low
    assert f" threads of a CPU: {0.04 * torch.get_num_threads():g}e12 in float32" in text
    assert "before   the reference scores 24 examples" in text


def test_dry_run_compares_with_the_memory_that_there_is(world, capsys, monkeypatch):
    monkeypatch.setattr(dryrun, "_memory", lambda device: ("1 KiB of RAM", 1024))
    monkeypatch.setattr(dryrun, "SAVING", {"rank 16": {"lora_rank": 16}})
    rows, _ = dry_run(world, capsys)
    assert [*rows] == ["flags as given", "rank 16"]
    assert all(row["fits 1 KiB of RAM"] == "no" and row["fits an 80 GB GPU"] == "yes" for row in rows.values())


def test_dry_run_of_ppo_counts_every_model(world, capsys, monkeypatch):
    """Reference 4 bytes a weight; the critic, made of the policy, 16; with adapters the reference is the policy."""
    monkeypatch.setattr(dryrun, "SAVING", {})
    settings = {"reward": "gold", "value_init": "policy", "max_new_tokens": 6, "k": 2, "batch_size": 4}
    rows, text = dry_run(world, capsys, train_ppo, **settings)
    size = models.load_model(str(world / "model"), "cpu").num_parameters()
    assert float(rows["flags as given"]["others"]) == pytest.approx((4 + 16) * size / 2**30, rel=0.1)
    rows, _ = dry_run(world, capsys, train_ppo, **settings, lora_rank=2)
    assert float(rows["flags as given"]["others"]) == pytest.approx(16 * size / 2**30, rel=0.1)
    with monkeypatch.context() as patch:  # a larger reward model, on the hub
        load_config, before = models.load_config, rows["flags as given"]
        larger = load_config(str(world / "model"))
        larger.intermediate_size *= 8
        patch.setattr(models, "is_reward_model", lambda name, *_: name == "org/rm")
        patch.setattr(models, "load_config", lambda name, *x: larger if name == "org/rm" else load_config(name, *x))
        rows, _ = dry_run(world, capsys, train_ppo, **settings | {"reward": "org/rm"}, lora_rank=2)
    more = models.on_meta(larger, reward=True).num_parameters()
    assert float(rows["flags as given"]["others"]) == pytest.approx((4 * more + 16 * size) / 2**30, rel=0.1)
    assert all(rows["flags as given"][name] == before[name] for name in ("weights", "activations", "logits"))
    monkeypatch.setattr(dryrun, "SAVING", {"rank": {"lora_rank": 2}, "none": {"lora_rank": 0}})
    for given, other, name in ((0, 2, "rank"), (2, 0, "none")):  # a row is what its flags would give
        rows, _ = dry_run(world, capsys, train_ppo, **settings, lora_rank=given)
        wanted, _ = dry_run(world, capsys, train_ppo, **settings, lora_rank=other)
        assert rows[name] == wanted["flags as given"] | {"GiB a device": name}


def test_dry_run_refuses_what_training_refuses(world, rm, capsys):
    for script in (train_sft, train_dpo):
        with pytest.raises(BadInput, match="--model .*: a reward model, where a causal language model is wanted"):
            dry_run(world, capsys, script, model=str(rm))
    (world / "one.jsonl").write_text('{"prompt": "it", "completion": "was .", "label": true}\n')
    with pytest.raises(BadInput, match="the only example, but KTO needs the response of another"):
        dry_run(world, capsys, loss="kto", data=str(world / "one.jsonl"), eval_fraction=0.0)


@pytest.mark.parametrize("name, reason", [("mamba", "its layers loop over tokens"), ("mixtral", "RuntimeError")])
def test_dry_run_says_what_it_cannot_estimate(name, reason, world, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(memory, "MOST_OPERATIONS", 1000)
    mamba = transformers.MambaConfig(vocab_size=61, hidden_size=32, num_hidden_layers=2, state_size=4)
    (mamba if name == "mamba" else ARCHITECTURES[name]()).save_pretrained(tmp_path)
    for path in (world / "model").glob("tokenizer*"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    rows, text = dry_run(world, capsys, model=str(tmp_path))
    (line,) = text.splitlines()[2:]
    assert not rows and line.startswith(f"not estimated: --model {tmp_path} cannot be traced without weights: ")
    assert reason in line and len(line) < 400


def test_a_model_that_takes_no_trees_is_estimated_in_padded_rows(world, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(dryrun, "SAVING", {})
    config = ARCHITECTURES["stablelm"]()
    config.save_pretrained(tmp_path)
    for path in (world / "model").glob("tokenizer*"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    rows, text = dry_run(world, capsys, model=str(tmp_path))
    assert "padded layout" in text and float(rows["flags as given"]["peak"]) > 0
