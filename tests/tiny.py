"""Tiny random models of many architectures, and random examples for them."""

import contextlib
import random
from types import SimpleNamespace
from unittest import mock

import torch
import transformers
from torch.utils._python_dispatch import TorchDispatchMode

from support import generate
from support.examples import Example

VOCAB = 61
SMALL = dict(
    vocab_size=VOCAB,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    max_position_embeddings=128,
    bos_token_id=1,
    eos_token_id=2,
    pad_token_id=0,
)
GQA = dict(SMALL, num_key_value_heads=2)
MOE = dict(GQA, num_local_experts=4, num_experts_per_tok=2)
NEXT = dict(
    GQA,
    num_hidden_layers=4,
    head_dim=8,
    linear_num_value_heads=4,
    linear_num_key_heads=2,
    linear_key_head_dim=8,
    linear_value_head_dim=8,
    num_experts=4,
    num_experts_per_tok=2,
    moe_intermediate_size=16,
    shared_expert_intermediate_size=16,
)

ARCHITECTURES = {
    "llama": lambda: transformers.LlamaConfig(**GQA, tie_word_embeddings=True),
    "qwen3": lambda: transformers.Qwen3Config(**GQA, head_dim=8),
    "mistral": lambda: transformers.MistralConfig(**GQA, sliding_window=5),
    "gemma": lambda: transformers.GemmaConfig(**GQA, head_dim=8),
    "gpt2": lambda: transformers.GPT2Config(
        vocab_size=VOCAB, n_embd=32, n_layer=2, n_head=4, n_positions=128, bos_token_id=1, eos_token_id=2
    ),
    "opt": lambda: transformers.OPTConfig(**SMALL, ffn_dim=48, word_embed_proj_dim=16),
    "phi": lambda: transformers.PhiConfig(**GQA),
    "olmo2": lambda: transformers.Olmo2Config(**GQA),
    "gpt_neox": lambda: transformers.GPTNeoXConfig(**SMALL),
    "granite": lambda: transformers.GraniteConfig(
        **GQA, logits_scaling=8.0, embedding_multiplier=12.0, residual_multiplier=0.22, attention_multiplier=0.1
    ),
    "mixtral": lambda: transformers.MixtralConfig(**MOE),
    "cohere2": lambda: transformers.Cohere2Config(
        **GQA, sliding_window=5, layer_types=["sliding_attention", "full_attention"]
    ),
    "gemma2": lambda: transformers.Gemma2Config(**GQA, head_dim=8, sliding_window=5, attn_logit_softcapping=1.0),
    "gemma3_text": lambda: transformers.Gemma3TextConfig(**GQA, head_dim=8, sliding_window=5),
    "qwen3_next": lambda: transformers.Qwen3NextConfig(**NEXT),
    "gpt_oss": lambda: transformers.GptOssConfig(**MOE, head_dim=8, sliding_window=5),
    "stablelm": lambda: transformers.StableLmConfig(**GQA),
}


def tiny(name: str, dtype: torch.dtype = torch.float32, seed: int = 0):
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(ARCHITECTURES[name](), dtype=dtype).eval()
    if dtype == torch.float64 and name == "mixtral":
        model.set_experts_implementation("eager")  # the grouped product has no float64
    with torch.no_grad():  # larger weights than at initialisation, so that attention and gates matter
        for weight in model.parameters():
            weight.add_(torch.randn_like(weight) * 0.15)
    return model


def example(prompt: list[int], responses: list[list[int]], **fields) -> Example:
    defaults = dict(
        where="test:1",
        prompt_text=" ".join(map(str, prompt)),
        response_texts=[" ".join(map(str, r)) for r in responses],
        ranks=[*range(1, len(responses) + 1)],
    )
    return Example(prompt=prompt, responses=responses, **{**defaults, **fields})


def random_examples(shapes: list[tuple[int, list[int]]], seed: int = 0) -> list[Example]:
    """One example for each (prompt length, [response lengths])."""
    rng = random.Random(seed)
    ids = lambda n: [rng.randrange(3, VOCAB) for _ in range(n)]  # noqa: E731
    return [example(ids(p), [ids(r) for r in responses]) for p, responses in shapes]


@contextlib.contextmanager
def no_float32():
    """Norms, rotary embeddings and routers of transformers compute in float32 inside a float64 model, whose results are
    then good to 1e-8 only. Here float64 tensors stay float64, so that two layouts can be compared to 1e-12."""
    to, to_float, softmax = torch.Tensor.to, torch.Tensor.float, torch.nn.functional.softmax

    def stay(x, *args, **kwargs):
        if x.dtype == torch.float64:
            args = tuple(torch.float64 if a is torch.float32 else a for a in args)
            kwargs = {k: torch.float64 if v is torch.float32 else v for k, v in kwargs.items()}
        return to(x, *args, **kwargs)

    def wide_softmax(x, *args, dtype=None, **kwargs):
        return softmax(x, *args, dtype=torch.float64 if x.dtype == torch.float64 else dtype, **kwargs)

    with (
        mock.patch.object(torch.Tensor, "to", stay),
        mock.patch.object(torch.Tensor, "float", lambda x: x if x.dtype == torch.float64 else to_float(x)),
        mock.patch.object(torch.nn.functional, "softmax", wide_softmax),
    ):
        yield


class Bfloat16Products(TorchDispatchMode):
    """On a CPU that cannot multiply bfloat16, compute its products in float32 and round each result once, as a CPU that
    can does. This is several times faster than what PyTorch does there. On other CPUs it changes nothing."""

    cannot = torch.backends.cpu.get_cpu_capability() == "AVX2"
    products = torch.ops.aten.mm.default, torch.ops.aten.addmm.default, torch.ops.aten.bmm.default

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if self.cannot and func in self.products and args[0].dtype == torch.bfloat16 and not kwargs:
            return func(*(x.float() for x in args)).bfloat16()
        return func(*args, **(kwargs or {}))


@torch.no_grad()
def cached_logps(model, prompts, responses, temperature: float, pad_id: int, dtype: torch.dtype = torch.float32):
    """Log-probs (nats) of given response tokens, as `generate` computes them while it samples: one by one, with a
    key-value cache."""
    pad = generate._filler(model, pad_id)
    sampler = generate.choose_sampler(model, prompts, max(map(len, responses)), pad, dtype)
    rows = [SimpleNamespace(prompt=p, responses=[r], trained=None) for p, r in zip(prompts, responses, strict=True)]
    groups = [[row] for row in rows] if sampler == "alone" else [rows]
    return [x for group in groups for x in generate._given_logps(sampler, model, group, temperature, pad, dtype)]
