"""Run directories in other tools: lm-eval scores them as this code does, and what vLLM and llama.cpp read is there."""

import importlib
import json
import math
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers
from safetensors.torch import load_file
from test_data import CHAT, talk, written

import train_dpo
from support import models, runs
from support.examples import load
from support.scoring import Batching, score_logps

PAIRS = [
    {"prompt": f"{a} plus {b} is", "chosen": f" {a + b}", "rejected": f" not {a * b} ?"}
    for a in range(4, 8)
    for b in range(3)
]
TASK = """
task: pairs
dataset_path: json
dataset_kwargs: {data_files: {test: pairs.jsonl}, cache_dir: cache}
test_split: test
output_type: multiple_choice
doc_to_text: "{{prompt}}"
doc_to_choice: "{{[chosen, rejected]}}"
doc_to_target: 0
target_delimiter: ""
metric_list: [{metric: acc}]
"""


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A two-layer base model with a chat template, and what DPO made of it: a whole model, and adapters."""
    folder = tmp_path_factory.mktemp("world")
    ids = {"vocab_size": len(CHAT), "bos_token_id": None, "eos_token_id": CHAT.eos_token_id}
    sizes = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
    rope = {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}, "tie_word_embeddings": True}
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**ids, **sizes, **rope, num_key_value_heads=2)
    models.save(transformers.LlamaForCausalLM(config), CHAT, folder / "base")
    written(folder, "pairs.jsonl", *PAIRS)
    given = {"model": str(folder / "base"), "data": str(folder / "pairs.jsonl"), "ref_cache": str(folder / "cache")}
    given |= {"device": "cpu", "batch_size": 4, "epochs": 4, "lr": 1e-2, "eval_fraction": 0.0, "eval_prompts": 0}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runs, "environment", dict)
        train_dpo.main(train_dpo.Args(**given, out=str(folder / "whole"), save_dtype="bfloat16"))
        train_dpo.main(train_dpo.Args(**given, out=str(folder / "adapters"), lora_rank=4))
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("chat", [False, True], ids=["text", "chat"])
@pytest.mark.parametrize("name", ["whole", "adapters"])
def test_lm_eval_scores_a_run_as_this_code_does(name, chat, world, monkeypatch):
    """The log-likelihoods of all responses, and so the accuracy. The harness scores no EOS, and of a chat template the
    newline before the answer too, because it takes whitespace at a prompt's end for the response's beginning."""
    lm_eval = pytest.importorskip("lm_eval", reason="lm-eval of benchmarks/requirements.txt is not installed")
    monkeypatch.chdir(world)
    Path("pairs.yaml").write_text(TASK)
    given = {"whole": {"pretrained": "whole"}, "adapters": {"pretrained": "base", "peft": "adapters"}}[name]
    manager = importlib.import_module("lm_eval.tasks").TaskManager(include_path=str(world), include_defaults=False)
    options = {"tasks": ["pairs"], "task_manager": manager, "device": "cpu", "apply_chat_template": chat}
    found = lm_eval.simple_evaluate(model="hf", model_args=given | {"dtype": "float32"}, **options, bootstrap_iters=0)
    theirs = torch.tensor([[x[0] for x in row["filtered_resps"]] for row in found["samples"]["pairs"]])

    limits = SimpleNamespace(split=None, skip_bad_rows=False, max_prompt_length=99, max_new_tokens=99)
    examples = load("pairs.jsonl", "preference", transformers.AutoTokenizer.from_pretrained(name), limits, chat=chat)
    for e in examples:
        newline, e.prompt = (e.prompt[-1:], e.prompt[:-1]) if chat else ([], e.prompt)
        e.responses = [newline + r[:-1] for r in e.responses]
    run, base = (torch.stack(score_logps(models.load_model(x, "cpu"), examples, Batching())) for x in (name, "base"))
    assert theirs.shape == (len(PAIRS), 2) and (theirs - run).abs().max() < 1e-3 and (run - base).abs().max() > 1
    right = (run[:, 0] > run[:, 1]).double().mean().item()
    assert found["results"]["pairs"]["acc,none"] == pytest.approx(right)


def test_what_vllm_and_llama_cpp_read_of_a_run_is_there(world):
    """docs/other_tools.md says which tool wants what."""
    base, folder = load_file(world / "base/model.safetensors"), world / "whole"
    config = json.loads((folder / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"] and config["model_type"] == "llama"
    assert config["rope_parameters"]["rope_theta"] == 5e5 and config["dtype"] == "bfloat16"
    weights = load_file(folder / "model.safetensors")
    shapes = {name: weight.shape for name, weight in weights.items()}
    assert shapes == {name: weight.shape for name, weight in base.items()} and "lm_head.weight" not in shapes
    assert {weight.dtype for weight in weights.values()} == {torch.bfloat16}
    ends = json.loads((folder / "generation_config.json").read_text())["eos_token_id"]
    for name in ("whole", "adapters"):
        assert (world / name / "tokenizer.json").read_text() == (world / "base/tokenizer.json").read_text()
        tokenizer = transformers.AutoTokenizer.from_pretrained(world / name)
        assert (world / name / "tokenizer_config.json").exists() and tokenizer.eos_token_id == ends
        chat = tokenizer.apply_chat_template(talk("4 plus 2 is"), tokenize=False, add_generation_prompt=True)
        assert chat == CHAT.apply_chat_template(talk("4 plus 2 is"), tokenize=False, add_generation_prompt=True)


def test_what_vllm_and_llama_cpp_read_of_adapters_is_there(world):
    """Plain LoRA of rank r on named linear layers, whose base model is found; and nothing else."""
    config = json.loads((world / "adapters/adapter_config.json").read_text())
    path = Path(config["base_model_name_or_path"])
    assert path.is_absolute() and json.loads((path / "config.json").read_text())["architectures"]
    assert (config["peft_type"], config["task_type"], config["r"], config["lora_alpha"]) == ("LORA", "CAUSAL_LM", 4, 8)
    assert config["bias"] == "none" and not (config["use_dora"] or config["use_rslora"] or config["modules_to_save"])
    base, shapes = load_file(path / "model.safetensors"), {}
    for module in config["target_modules"]:
        rows, columns = base[f"{module}.weight"].shape
        shapes |= {f"base_model.model.{module}.lora_A.weight": (4, columns)}
        shapes |= {f"base_model.model.{module}.lora_B.weight": (rows, 4)}
    found = load_file(world / "adapters/adapter_model.safetensors")
    assert {name: tuple(weight.shape) for name, weight in found.items()} == shapes and len(shapes) == 2 * 2 * 7


def test_the_noise_of_benchmarks_is_that_of_a_share():
    page = (Path(__file__).parent.parent / "docs/other_tools.md").read_text()
    rows = re.findall(r"\| (\d+) \| ([\d.]+) \| ([\d.]+) \| ([\d.]+) \|$", page, re.M)
    assert len(rows) == 5
    for n, half, high, apart in rows:
        errors = [math.sqrt(p * (1 - p) / int(n)) for p in (0.5, 0.8)]
        assert [half, high, apart] == [f"{x:.3f}" for x in (*errors, 1.96 * math.sqrt(2) * errors[0])]
