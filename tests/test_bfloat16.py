"""Training in bfloat16: exact float32 masters, a forward pass that sees them move, and what is saved."""

import copy
import gc
import json
import os
import random
import subprocess
import sys
import weakref
from types import SimpleNamespace

import pytest
import torch
import transformers
from safetensors.torch import load_file
from tiny import Bfloat16Products, example, random_examples, tiny
from torch.utils._python_dispatch import TorchDispatchMode

import train_sft
from rlhf import losses, optim
from rlhf.tree import collate
from support import models, reviews, runs, scoring, sharding

FLAGS = SimpleNamespace(dtype="bfloat16", gradient_dtype="float32", optimizer_state="float32", lora_rank=0, seed=0)
FLAGS.gradient_checkpointing = FLAGS.compile = False


def finite(bits: torch.Tensor) -> torch.Tensor:
    x = bits.to(torch.int32).view(torch.float32)
    return x[x.isfinite()]


def bits(x: torch.Tensor) -> torch.Tensor:
    return x.view(torch.int32 if x.dtype == torch.float32 else torch.int16)


# ----------------------------------------------------------------------------------------------------- split and dither


def test_splitting_is_exact_for_every_finite_float32():
    """2^21 patterns at random; and around each of the 65,536 upper halves the lower ones where rounding changes."""
    g = torch.Generator().manual_seed(0)
    random_bits = torch.randint(-(1 << 31), 1 << 31, (1 << 21,), generator=g)
    edges = (torch.arange(-(1 << 15), 1 << 15)[:, None] << 16) + torch.tensor([0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF])
    for x in (finite(random_bits), finite(edges.flatten())):
        weight, low = optim.split(x)
        assert torch.equal(bits(optim.join(weight, low)), bits(x))
        nearest, ties = x.to(torch.bfloat16), low == -0x8000
        assert torch.equal(bits(weight)[~ties], bits(nearest)[~ties])


def test_a_tie_is_rounded_away_from_zero_and_has_the_lowest_low_bits():
    x = torch.tensor([1 + 2**-8, -1 - 2**-8])  # half-way between 1 and the next bfloat16, 1 + 2^-7
    weight, low = optim.split(x)
    assert weight.tolist() == [1 + 2**-7, -1 - 2**-7] and low.tolist() == [-0x8000, -0x8000]


def test_dither_changes_no_weight_of_either_sign_zero_or_subnormal():
    every = torch.arange(-(1 << 15), 1 << 15).to(torch.int16).view(torch.bfloat16)
    every = every[every.isfinite()]
    for seed in range(20):
        low = optim.dither(every, "w", seed)
        master = optim.join(every, low)
        weight, again = optim.split(master)
        assert torch.equal(bits(weight), bits(every)) and torch.equal(again, low)
        assert torch.equal(bits(master.to(torch.bfloat16)), bits(every)) and master.isfinite().all()


def test_dither_is_uniform_and_depends_on_seed_name_and_index_alone(monkeypatch):
    weight = torch.ones(1 << 20).bfloat16()
    low = optim.dither(weight, "w", 0)
    counts = torch.histc(low.float(), 16, -32767, 32766)
    assert (counts - 65536).abs().max() < 5 * 65536**0.5 and low.min() == -32767 and low.max() == 32766
    others = [low[1:].float(), *(optim.dither(weight, *of)[:-1].float() for of in (("w", 1), ("v", 0)))]
    correlations = torch.corrcoef(torch.stack([low[:-1].float(), *others]))[0, 1:]
    assert correlations.abs().max() < 5 / 1024
    monkeypatch.setattr(optim, "CHUNK", 1000)
    assert torch.equal(optim.dither(weight.view(1024, 1024), "w", 0).flatten(), low)


# ------------------------------------------------------------------------------------------------------------ optimizer


def lowered(module: torch.nn.Module) -> optim.LowBits:
    """Make the module's matrices bfloat16; returns their low bits."""
    low_bits = {}
    for weight in module.parameters():
        if weight.ndim > 1:
            weight.data, low_bits[weight] = optim.split(weight.data)
    return low_bits


def masters(module: torch.nn.Module, low_bits: optim.LowBits) -> list[torch.Tensor]:
    return [optim.join(w.data, low_bits[w]) if w in low_bits else w.data for w in module.parameters()]


def test_joined_masters_equal_torch_adamw_bit_for_bit(monkeypatch):
    monkeypatch.setattr(optim, "CHUNK", 700)  # so that a weight takes several pieces
    torch.manual_seed(0)
    plain = torch.nn.Sequential(torch.nn.Linear(60, 40), torch.nn.Linear(40, 1))
    ours = copy.deepcopy(plain)
    low_bits = lowered(ours)
    settings = {"lr": 5e-7, "weight_decay": 0.1, "eps": 1e-6}
    optimizers = torch.optim.AdamW(plain.parameters(), foreach=False, **settings), None
    optimizers = optimizers[0], optim.AdamW(ours.parameters(), low_bits, **settings)
    for step in range(50):
        for weight, other in zip(plain.parameters(), ours.parameters(), strict=True):
            weight.grad = torch.randn_like(weight) * 10.0 ** (step % 5 - 3)
            other.grad = weight.grad.clone()
        for module, optimizer in zip((plain, ours), optimizers, strict=True):
            torch.nn.utils.clip_grad_norm_(module.parameters(), 1.0)
            optimizer.param_groups[0]["lr"] = 5e-7 * (step + 1) / 7
            optimizer.step()
        if step == 20:  # a new optimizer continues from the state of the old one
            state = copy.deepcopy(optimizers[1].state_dict())
            optimizers = optimizers[0], optim.AdamW(ours.parameters(), low_bits, **settings)
            optimizers[1].load_state_dict(state)
    for weight, master in zip(plain.parameters(), masters(ours, low_bits), strict=True):
        assert torch.equal(bits(weight.data), bits(master))


KERNEL = """
import sys
import torch
from rlhf import kernels, optim
for n in (5, 1024, 3000):
    for half in (True, False):
        torch.manual_seed(n)
        master, sides = torch.randn(n), []
        for device in ("cpu", sys.argv[1]):
            side = [*optim.split(master)] if half else [master.clone(), None]
            side += [None, torch.zeros(n), torch.zeros(n)]
            sides.append([x if x is None else x.to(device) for x in side])
        for t in range(1, 20):
            gradient = torch.randn(n) * 10.0 ** (t % 5 - 3)
            scalars = 1 - 1e-5, 0.1, 0.999, 1 - 0.999, (1 - 0.999**t) ** 0.5, 1e-8, 1e-4 / (1 - 0.9**t)
            for side, update in zip(sides, (optim._update, kernels.adamw)):
                side[2] = gradient.to(side[3].device, copy=True)
                update(*side, *scalars)
        w, low, m, v, w2, low2, m2, v2 = (x if x is None else x.cpu() for side in sides for x in side[:2] + side[3:])
        w, w2 = (optim.join(w, low), optim.join(w2, low2)) if half else (w, w2)
        torch.testing.assert_close(w2, w, rtol=2e-7, atol=2e-7)
        torch.testing.assert_close(m2, m, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(v2, v, rtol=1e-5, atol=1e-6)
"""


def test_the_cuda_kernel_in_tritons_interpreter():
    """The launch that a GPU would make, on a CPU, against the reference: 19 steps, gradients over five decades."""
    pytest.importorskip("triton", reason="needs Triton")
    subprocess.run([sys.executable, "-c", KERNEL, "cpu"], check=True, env=os.environ | {"TRITON_INTERPRET": "1"})


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_cuda_kernel():
    subprocess.run([sys.executable, "-c", KERNEL, "cuda"], check=True)


# ------------------------------------------------------------------------------------- a forward pass that sees updates


def on_the_grid(seed: int):
    """A random Llama of bfloat16's grid, with weights large enough that responses differ in log-prob."""
    torch.manual_seed(seed)
    config = transformers.LlamaConfig(
        vocab_size=2000,
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
    )
    model = transformers.LlamaForCausalLM(config).eval()
    for name, weight in model.named_parameters():
        if weight.ndim > 1 and "embed" not in name:
            weight.data *= 12 if "lm_head" in name else 3
        weight.data = weight.data.bfloat16().float()
    return model


def pairs(count: int, seed: int = 0):
    rng = random.Random(seed)
    ids = lambda low, high: [rng.randrange(3, 2000) for _ in range(rng.randint(low, high))]  # noqa: E731
    return [example(ids(20, 40), [ids(20, 60), ids(20, 60)]) for _ in range(count)]


def seen_and_true_margin(seed: int, steps: int = 40, count: int = 8) -> tuple[float, float]:
    """DPO at lr 1e-6 on the random Llama: the mean margin that the bfloat16 forward pass sees, and that of the masters
    scored in float32, both relative to the start's in the same dtype."""
    policy, low_bits = sharding.load_trained(lambda device: on_the_grid(0), "cpu", torch.bfloat16, seed)
    batch = collate(pairs(count), "tree", 0)
    optimizer = models.adamw(policy, low_bits, FLAGS, lr=1e-6)

    def margins(model, dtype=torch.bfloat16):
        _, logps = scoring.response_logps(model, batch, dtype)
        return logps[::2] - logps[1::2]

    with torch.no_grad():
        start, true_start = margins(policy), margins(on_the_grid(0), torch.float32)
    for _ in range(steps):
        losses.dpo(margins(policy) - start, torch.zeros(count), 0.1).mean().backward()
        sharding.clip_gradients(optimizer, 1.0)
        optimizer.step()
        optimizer.zero_grad()
    trained = on_the_grid(0)
    trained.load_state_dict(models.trained(policy, low_bits))
    with torch.no_grad():
        return (margins(policy) - start).mean().item(), (margins(trained, torch.float32) - true_start).mean().item()


@pytest.mark.slow
def test_the_forward_pass_sees_what_the_masters_did(monkeypatch):
    with Bfloat16Products():
        results = [seen_and_true_margin(seed) for seed in range(5)]
        monkeypatch.setattr(models, "dither", lambda weight, name, seed: torch.zeros_like(weight, dtype=torch.int16))
        seen, true = seen_and_true_margin(0)
    assert all(true > 5 for _, true in results)
    assert 0.95 < sum(seen / true for seen, true in results) / 5 < 1.05
    assert seen / true < 0.7


# ------------------------------------------------------------------------------------------- gradients, casts, saving


@pytest.mark.parametrize("dtype, bound", [(torch.float32, 1 - 1e-6), (torch.bfloat16, 0.9999)])
def test_gradients_of_16_micro_batches_add_up(dtype, bound):
    """Against the sum in float64 of each micro-batch's own gradient."""
    policy, low_bits = sharding.load_trained(lambda device: tiny("llama"), "cpu", torch.bfloat16, 0)
    FLAGS.gradient_dtype = str(dtype).removeprefix("torch.")
    optimizer = models.adamw(policy, low_bits, FLAGS, lr=1e-3)
    FLAGS.gradient_dtype = "float32"
    batches = [collate([e], "tree", 0) for e in random_examples([(5, [4, 9])] * 16)]
    truth = {weight: torch.zeros_like(weight, dtype=torch.float64) for weight in low_bits}
    for batch in batches:
        scoring.response_logps(policy, batch, torch.bfloat16)[1].sum().backward()
        optimizer.collect_gradients()
        for weight in truth:
            truth[weight] += weight.grad
        policy.zero_grad(set_to_none=True)
    for batch in batches:
        scoring.response_logps(policy, batch, torch.bfloat16)[1].sum().backward()
    assert dtype == torch.bfloat16 or all(weight.grad is None for weight in low_bits)
    optimizer.collect_gradients()
    assert {weight.grad.dtype for weight in low_bits} == {dtype}
    added, truth = (torch.cat([x.double().flatten() for x in xs]) for xs in ([w.grad for w in truth], truth.values()))
    cosine = torch.nn.functional.cosine_similarity(added, truth, dim=0)
    assert bound < cosine and (dtype == torch.float32 or cosine < 1 - 1e-7)


def test_the_moments_are_freed_with_the_optimizer():
    """They would be most of the memory while the final answers are sampled."""
    policy, low_bits = sharding.load_trained(lambda device: tiny("llama"), "cpu", torch.bfloat16, 0)
    optimizer = models.adamw(policy, low_bits, FLAGS, lr=1e-3)
    batch = collate(random_examples([(5, [4, 9])]), "tree", 0)
    scoring.response_logps(policy, batch, torch.bfloat16)[1].sum().backward()
    optimizer.step()
    moments = [weakref.ref(state["exp_avg"]) for state in optimizer.state.values()]
    assert moments and all(x() is not None for x in moments)
    del optimizer
    gc.collect()
    assert all(x() is None for x in moments)


class Casts(TorchDispatchMode):
    """The shapes of tensors that are converted to another dtype inside."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **kwargs or {})
        if function is torch.ops.aten._to_copy.default and out.dtype != args[0].dtype:
            shapes.append(tuple(out.shape))
        return out


shapes: list[tuple[int, ...]] = []


@pytest.mark.parametrize("name", ["llama", "qwen3", "gpt2"])
def test_no_weight_is_cast_in_a_step(name):
    """The kernel apart: on a CPU it converts the head to float32."""
    policy, low_bits = sharding.load_trained(lambda device: tiny(name), "cpu", torch.bfloat16, 0)
    batch = collate(random_examples([(5, [4, 9]), (7, [3, 3])]), "tree", 0)
    weights = {tuple(sorted(weight.shape)) for weight in low_bits if weight.ndim > 1}
    shapes.clear()
    with Casts():
        states = scoring.hidden_states(policy, batch, batch.sources, torch.bfloat16)
    assert states.dtype == torch.bfloat16 and shapes
    assert not weights & {tuple(sorted(shape)) for shape in shapes}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_saved_is_the_master_or_the_upper_half(dtype, tmp_path):
    """Tied weights are saved once; the config says the dtype; norms, which are not split, are as they were."""
    start = tiny("llama")
    policy, low_bits = sharding.load_trained(lambda device: tiny("llama"), "cpu", torch.bfloat16, 0)
    assert all(
        torch.equal(bits(w.data), bits(m)) for w, m in zip(start.parameters(), masters(policy, low_bits), strict=True)
    )
    models.save(policy, reviews.tokenizer(), tmp_path, low_bits=low_bits, dtype=dtype)
    saved = load_file(tmp_path / "model.safetensors")
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == dtype
    assert saved.keys() == {name for name, _ in start.named_parameters()}
    for name, weight in start.named_parameters():
        wanted = (
            weight.data if dtype == "float32" else optim.split(weight.data)[0] if weight.ndim > 1 else weight.bfloat16()
        )
        assert torch.equal(saved[name], wanted), name


def test_a_reward_models_head_and_the_norms_stay_float32():
    reward = models.new_reward_model(tiny("llama"), reviews.tokenizer())
    low_bits = models.to_bfloat16(reward, "cpu", 0)
    float32 = {name for name, weight in reward.named_parameters() if weight.dtype == torch.float32}
    assert float32 == {name for name, _ in reward.named_parameters() if "norm" in name or name == "score.weight"}
    assert len(low_bits) == len([*reward.parameters()]) - len(float32)


def test_adapters_are_split_and_their_frozen_base_has_no_low_bits():
    policy, low_bits = sharding.load_trained(lambda device: on_the_grid(0), "cpu", torch.bfloat16, None)
    before = {name: weight.clone() for name, weight in policy.named_parameters()}
    assert low_bits == {}
    models.prepare_training(policy, low_bits, FLAGS, 2)
    named = dict(policy.named_parameters())
    assert {w for n, w in named.items() if "lora_" in n} == low_bits.keys()
    for name, weight in before.items():
        assert torch.equal(named.get(name, named.get(name.replace(".weight", ".base_layer.weight"))), weight)


@pytest.mark.parametrize(
    "capability, dtype, told", [("AVX2", "bfloat16", 1), ("AVX2", "float32", 0), ("AVX512", "bfloat16", 0)]
)
def test_a_cpu_without_bfloat16_is_named(capability, dtype, told, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    runs.Run(train_sft.Args(device="cpu", dtype=dtype, out=str(tmp_path / "a")), "train_sft.py")
    assert capsys.readouterr().out.count("--dtype bfloat16: this CPU cannot multiply it") == told
