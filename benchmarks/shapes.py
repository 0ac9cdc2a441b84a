"""Random models of known shapes, made on the device from their configs: nothing is downloaded, no weight is written."""

import contextlib
import functools
import tempfile
import time
from collections.abc import Callable, Iterator
from unittest import mock

import torch
import transformers

from benchmarks import compare, watch
from support import models

SHAPES = {  # type, words, width, width of the MLP, layers, heads, heads of keys and values; small Qwen2 tie embeddings
    "0.5B": ("qwen2", 151936, 896, 4864, 24, 14, 2),
    "1.5B": ("qwen2", 151936, 1536, 8960, 28, 12, 2),
    "7B": ("qwen2", 152064, 3584, 18944, 28, 28, 4),
    "8B": ("llama", 128256, 4096, 14336, 32, 32, 8),
    "70B": ("llama", 128256, 8192, 28672, 80, 64, 8),
    "tiny": ("qwen2", 512, 64, 128, 2, 4, 2),
}


def config_of(shape: str) -> transformers.PretrainedConfig:
    kind, words, width, mlp_width, layers, heads, kv_heads = SHAPES[shape]
    return transformers.AutoConfig.for_model(
        kind, vocab_size=words, hidden_size=width, intermediate_size=mlp_width, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=kv_heads, tie_word_embeddings=kind == "qwen2" and width < 3584,
        max_position_embeddings=4096, bos_token_id=None, eos_token_id=1, pad_token_id=0,
        architectures=[{"qwen2": "Qwen2ForCausalLM", "llama": "LlamaForCausalLM"}[kind]],
    )  # fmt: skip


def model_of(config, device: str, dtype: torch.dtype = torch.bfloat16):
    """A model made on the device, with random weights that bfloat16 holds exactly, as most published ones."""
    torch.manual_seed(0)
    with torch.device(device):
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    return (model if dtype == torch.bfloat16 else model.to(dtype)).eval()  # `to` would round the rotary frequencies


@contextlib.contextmanager
def folder_of(shape: str, device: str) -> Iterator[str]:
    """A folder with a config and a small tokenizer. Inside, the library's `from_pretrained` returns a random model on
    the device, for every caller. For speed it stays there if the caller wants it in main memory first, and its weights
    have no digest."""

    def from_pretrained(cls, name, *_, config=None, dtype="auto", output_loading_info=False, **__):
        dtype = {"auto": torch.bfloat16, None: torch.bfloat16}.get(dtype, dtype)
        model = model_of(config or transformers.AutoConfig.from_pretrained(name), device, dtype)
        convert = model.to
        model.to = lambda to, *_, **__: convert(to) if isinstance(to, torch.dtype) else model
        watch.free_cache(device)
        no_problems = dict.fromkeys(("mismatched_keys", "missing_keys", "unexpected_keys"), ())
        return (model, no_problems) if output_loading_info else model

    with (
        tempfile.TemporaryDirectory() as folder,
        mock.patch.object(transformers.PreTrainedModel, "from_pretrained", classmethod(from_pretrained)),
        mock.patch.object(models, "digest", lambda *_: "random"),
    ):
        config_of(shape).save_pretrained(folder)
        yield compare.small_tokenizer(folder, 16)


def operations(shape: str, rows: list[dict]) -> float:
    """`compare.operations` of a shape, without its weights."""
    with torch.device("meta"):
        return compare.operations(transformers.AutoModelForCausalLM.from_config(config_of(shape)), rows)


@functools.cache
def rates(shape: str, device: str) -> tuple[float, float]:
    """Floating-point operations per second of a large square product, and of the model's own products."""
    size, repeats = (8192, 20) if watch.on_gpu(device) else (256, 2)
    x, y = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    seconds = fastest(lambda: [x @ y for _ in range(repeats)], device)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config_of(shape))
    return 2 * size**3 * repeats / seconds, watch.matrix_rate(model, device, torch.bfloat16, seconds=1.0)


def fastest(run: Callable, device: str, repeats: int = 3) -> float:
    """Seconds of the fastest of several runs, after one that does not count."""
    times = []
    for _ in range(repeats + 1):
        watch.wait(device)
        began = time.perf_counter()
        run()
        watch.wait(device)
        times.append(time.perf_counter() - began)
    return min(times[1:])
