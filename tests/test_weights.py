"""Weights that a checkpoint lacks are never made up: what cannot be loaded in full is refused, by name."""

import json
import math
import pickle
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_resume import write_model
from tiny import ARCHITECTURES, tiny

from rlhf import BadInput
from support import models, reviews

ADAPTER = "base_model.model.model.layers.1.mlp.up_proj.lora_A"


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A policy (20 tensors, its head tied to the embedding), adapters of it and a reward model."""
    folder, tokenizer = tmp_path_factory.mktemp("world"), reviews.tokenizer()
    write_model(folder / "policy")
    models.save(
        models.new_reward_model(models.load_model(f"{folder}/policy", "cpu"), tokenizer), tokenizer, folder / "rm"
    )
    policy = models.load_model(f"{folder}/policy", "cpu")
    models.save(policy, tokenizer, folder / "adapters", models.add_lora(policy, 2))
    return folder


@pytest.fixture
def changed(world, tmp_path):
    """A copy of a model of the world with other weights, and with these fields of its config."""

    def make(name: str, change, **config) -> str:
        shutil.copytree(world / name, tmp_path / name)
        [file] = (tmp_path / name).glob("*model.safetensors")
        save_file(change(load_file(file)), file, metadata={"format": "pt"})
        path = tmp_path / name / "config.json"
        if config:
            path.write_text(json.dumps(json.loads(path.read_text()) | config))
        return f"{tmp_path}/{name}"

    return make


def prefixed(weights):
    return {f"module.{name}": x for name, x in weights.items()}


def without(part):
    return lambda weights: {name: x for name, x in weights.items() if part not in name}


LOADERS = {"policy": models.load_model, "adapters": models.load_model, "rm": models.load_reward_model}


@pytest.mark.parametrize(
    "name, change, config, message",
    [
        (
            "policy",
            prefixed,
            {},
            "no causal language model: its weights lack lm_head.weight, model.embed_tokens.weight, "
            "model.layers.0.input_layernorm.weight and 18 more; it has weights that no part of the model reads: "
            "module.model.embed_tokens.weight, module.model.layers.0.input_layernorm.weight, "
            "module.model.layers.0.mlp.down_proj.weight and 17 more",
        ),
        (
            "policy",
            without("no such"),
            {"tie_word_embeddings": False},
            "no causal language model: its weights lack lm_head.weight",
        ),
        ("policy", without("embed"), {}, "its weights lack lm_head.weight, model.embed_tokens.weight"),
        ("policy", without("1.mlp.up"), {}, "its weights lack model.layers.1.mlp.up_proj.weight"),
        (
            "policy",
            lambda weights: weights | {"model.norm.weight": torch.zeros(3)},
            {},
            "weights have other shapes than its config says: model.norm.weight [3] for [32]",
        ),
        (
            "adapters",
            without("1.mlp.up_proj.lora_A"),
            {},
            f"no set of adapters: its weights lack {ADAPTER.removeprefix('base_model.model.')}.default.weight",
        ),
        ("adapters", prefixed, {}, " and 25 more; it has weights that no part of the model reads: module.base_model."),
        (
            "adapters",
            lambda weights: weights | {f"{ADAPTER}.weight": torch.zeros(3, 3)},
            {},
            f"size mismatch for {ADAPTER.removeprefix('base_model.model.')}",
        ),
        ("rm", prefixed, {}, "no reward model: its weights lack model.embed_tokens.weight, "),
        ("rm", without("score"), {}, "no reward model: its weights lack score.weight"),
        (
            "rm",
            lambda weights: weights | {"score.weight": torch.zeros(1, 3)},
            {},
            "no reward model: weights have other shapes than its config says: score.weight [1, 3] for [1, 32]",
        ),
    ],
)
def test_missing_weights_are_refused_by_name(name, change, config, message, changed):
    source = changed(name, change, **config)
    with pytest.raises(BadInput) as error:
        LOADERS[name](source, "cpu", flag="--flag")
    assert str(error.value).startswith(f"--flag {source}: ") and "\n" not in str(error.value)
    assert message in str(error.value)


@pytest.mark.parametrize("name", LOADERS)
@pytest.mark.parametrize("value", [math.nan, -math.inf])
def test_weights_that_are_not_finite_are_called_so(name, value, changed):
    def one_weight(weights):
        weights[next(key for key in weights if "1.mlp.up_proj" in key)].view(-1)[3] = value
        return weights

    source = changed(name, one_weight)
    with pytest.raises(BadInput) as error:
        LOADERS[name](source, "cpu", flag="--flag")
    assert str(error.value).startswith(f"--flag {source}: weights are NaN or infinite: ")
    assert "1.mlp.up_proj" in str(error.value) and "1.mlp.down_proj" not in str(error.value)


def test_large_weights_are_finite(changed):
    """Although their sum is not."""
    large = lambda weights: {key: x.fill_(3e38) if "norm" in key else x for key, x in weights.items()}  # noqa: E731
    models.load_model(changed("policy", large), "cpu")


BROKEN = {  # what is written to a file of a model, and what is said of it
    "config.json": [b"[]", b"null", b"{", b"\xff", b'{"model_type": "llama", "hidden_size": "big"}'],
    "generation_config.json": [b"[]"],
    "model.safetensors": [b"", b"garbage" * 10],
    "tokenizer.json": [b"[]", b"{"],
    "tokenizer_config.json": [b"[]"],
    "adapter_config.json": [b"[]", b"{"],
    "pytorch_model.bin": [b"garbage" * 10, pickle.dumps(print)],
}


@pytest.mark.parametrize("file", BROKEN)
def test_a_folder_with_a_broken_file_is_refused_in_one_line(file, world, tmp_path):
    for i, data in enumerate(BROKEN[file]):
        source = tmp_path / str(i)
        shutil.copytree(world / "policy", source)
        if file == "pytorch_model.bin":
            (source / "model.safetensors").unlink()
        (source / file).write_bytes(data)
        with pytest.raises(BadInput) as error:
            models.load_tokenizer(str(source))
            models.load_model(str(source), "cpu")
        message = str(error.value)
        assert str(source) in message and "\n" not in message and "weights_only" not in message


@pytest.mark.parametrize("name", LOADERS)
def test_weights_that_nothing_reads_are_said_in_a_line(name, world, changed, capfd):
    want = LOADERS[name](f"{world}/{name}", "cpu", flag="--flag").state_dict()
    assert capfd.readouterr() == ("", "")
    source = changed(name, lambda weights: weights | {"head.extra": torch.ones(2)})
    weights = LOADERS[name](source, "cpu", flag="--flag").state_dict()
    line = f"--flag {source}: has weights that no part of the model reads: head.extra; they are left out\n"
    assert capfd.readouterr() == (line, "")
    assert weights.keys() == want.keys() and all(torch.equal(weights[key], want[key]) for key in want)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_what_the_library_saves_lacks_nothing(name, tmp_path, capfd):
    """Tied weights and buffers among them, which are not in the files."""
    model = tiny(name)
    model.save_pretrained(tmp_path)
    weights = models.load_model(str(tmp_path), "cpu").state_dict()
    assert capfd.readouterr().out == "" and weights.keys() == model.state_dict().keys()
    assert all(torch.equal(weights[key], x) for key, x in model.state_dict().items())


def test_a_backbone_alone_is_a_model_where_the_head_is_tied(changed, world):
    """Its weights have no `model.` before their names, as the library's base classes save them."""
    source = changed("policy", lambda weights: {key.removeprefix("model."): x for key, x in weights.items()})
    mine, theirs = (models.load_model(x, "cpu").state_dict() for x in (source, f"{world}/policy"))
    assert all(torch.equal(mine[key], theirs[key]) for key in theirs)
