"""Sampling: the decode loop against the library's generate, the scorer and the softmax; what it does not fit."""

import contextlib
import gc
import math
import weakref
from collections import Counter
from types import SimpleNamespace

import pytest
import torch
import transformers
from tiny import ARCHITECTURES, GQA, MOE, SMALL, VOCAB, cached_logps, example, tiny

from rlhf import BadInput, logprobs
from rlhf.tree import collate
from support import decode, models, scoring, sharding
from support import generate as sampling
from support.generate import end_ids, generate

IDS = SimpleNamespace(eos_token_id=2, pad_token_id=0)
PADDED_WITH_EOS = SimpleNamespace(eos_token_id=2, pad_token_id=2)
PROMPTS = [[1, 7, 9], [1, 20, 21, 22, 23, 24, 25], [1], [1, 5, 6, 40, 41], [1, 7, 9, 30]]


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_samples_follow_the_softmax(temperature):
    """Chi-square of 6,000 first tokens; what the model's own settings ask for is left out, and put back."""
    model, n = tiny("llama"), 6000
    model.generation_config.update(top_k=2, top_p=0.5, repetition_penalty=5.0, temperature=3.0, do_sample=True)
    own = model.generation_config.to_dict()
    sampled = generate(model, IDS, [PROMPTS[0]] * n, 1, temperature, seed=3, batch_size=2000)[0]
    with torch.no_grad():
        expected = n * (model(torch.tensor([PROMPTS[0]])).logits[0, -1] / temperature).softmax(-1)
    counts = torch.bincount(torch.tensor(sampled)[:, 0], minlength=len(expected))
    common = expected >= 5
    observed = [*counts[common].tolist(), counts[~common].sum().item()]
    wanted = [*expected[common].tolist(), max(expected[~common].sum().item(), 1e-9)]
    if wanted[-1] < 5:
        observed[-2:], wanted[-2:] = [sum(observed[-2:])], [sum(wanted[-2:])]
    chi2 = sum((o - w) ** 2 / w for o, w in zip(observed, wanted, strict=True))
    freedom = len(wanted) - 1
    assert freedom > 10 and chi2 < freedom + 4 * math.sqrt(2 * freedom)
    other = [
        *((model(torch.tensor([PROMPTS[0]])).logits[0, -1] / (temperature + 0.3)).softmax(-1) * n)[common].tolist()
    ]
    assert (
        sum((o - w) ** 2 / w for o, w in zip(observed, other, strict=False)) > 2 * chi2
    )  # it tells temperatures apart
    assert model.generation_config.to_dict() == own


def test_the_second_token_follows_the_first():
    """The log-probs scored later are those of what was sampled: mean of -log pi is the entropy of two tokens."""
    model, n = tiny("llama"), 4000
    sampled = generate(model, IDS, [PROMPTS[0]] * n, 2, seed=1, batch_size=2000)[0]
    with torch.no_grad():
        first = model(torch.tensor([PROMPTS[0]])).logits[0, -1].log_softmax(-1)
        pairs = torch.tensor([[*PROMPTS[0], token] for token in range(len(first))])
        second = model(pairs).logits[:, -1].log_softmax(-1)
    ended = torch.arange(len(first)) == 2
    entropies = torch.where(ended, 0, -(second.exp() * second).sum(-1))
    want = -(first.exp() * first).sum() + (first.exp() * entropies).sum()
    found = torch.tensor(
        [-sum(([first] + [second[ids[0]]])[i][t].item() for i, t in enumerate(ids)) for ids in sampled]
    )
    assert (found.mean() - want).abs() < 4 * found.std() / math.sqrt(n)


@pytest.mark.parametrize("tokenizer", [IDS, PADDED_WITH_EOS], ids=["pad", "pad is eos"])
def test_left_padding_changes_nothing(tokenizer):
    model = tiny("llama")
    together = generate(model, tokenizer, PROMPTS, 8, temperature=0.0)[0]
    for prompt, response in zip(PROMPTS, together, strict=True):
        assert generate(model, tokenizer, [prompt], 8, temperature=0.0)[0] == [response]
        ids = list(prompt)
        while len(ids) < len(prompt) + 8 and (len(ids) == len(prompt) or ids[-1] != 2):
            with torch.no_grad():
                ids.append(model(torch.tensor([ids])).logits[0, -1].argmax().item())
        assert ids[len(prompt) :] == response
    assert generate(model, tokenizer, PROMPTS, 8, temperature=0.0, batch_size=2)[0] == together


def test_seeds_decide_and_the_global_state_stays():
    model = tiny("llama")
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first, again, other = (generate(model, IDS, PROMPTS, 10, seed=seed)[0] for seed in (1, 1, 2))
    assert first == again != other and torch.equal(torch.get_rng_state(), before)
    assert generate(model, IDS, [], 10)[0] == []


@pytest.mark.parametrize("tokenizer", [IDS, PADDED_WITH_EOS], ids=["pad", "pad is eos"])
def test_a_response_ends_with_its_eos(tokenizer):
    model = tiny("llama")
    model.generation_config.eos_token_id = [2, 11]  # as chat models have it: the end of a turn too
    assert end_ids(model, tokenizer) == [2, 11]
    with torch.no_grad():  # as likely as not
        model.get_input_embeddings().weight[[2, 11]] *= 3
    responses = generate(model, tokenizer, PROMPTS * 40, 12, seed=4)[0]
    ends = [[i for i, token in enumerate(ids) if token in (2, 11)] for ids in responses]
    assert all(found in ([], [len(ids) - 1]) for found, ids in zip(ends, responses, strict=True))
    assert all(found or len(ids) == 12 for found, ids in zip(ends, responses, strict=True))
    assert {ids[-1] for ids, found in zip(responses, ends, strict=True) if found} == {2, 11}
    assert 20 < sum(map(bool, ends)) < 200 and len({*map(len, responses)}) > 4


def test_sampling_uses_the_models_own_attention():
    model = tiny("llama")
    own = model.config._attn_implementation
    plain = generate(model, IDS, PROMPTS, 6, seed=1)[0]
    models.set_attention(model, packed=True)
    assert model.config._attn_implementation == f"tree_{own.encode().hex()}"
    assert generate(model, IDS, PROMPTS, 6, seed=1)[0] == plain
    assert model.config._attn_implementation == own and not model.training


# ------------------------------------------------------------------------------------------------------ the noise


def test_the_noise_is_splitmix64():
    """The published first outputs of SplitMix64 from the seed 1234567, and one past the sign bit."""
    published = [6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431]
    for number, x in enumerate(published):
        u = sampling.uniform(torch.tensor([1234567, 5]), torch.tensor([number]))
        assert u[0].item() == ((x >> 14) + 0.5) / 2**50 and u.dtype == torch.float64 and u[1] != u[0]


def test_the_noise_belongs_to_seed_prompt_answer_and_token():
    keys = sampling.noise_keys(3, [[1, 2], [1, 2, 3], [1, 2]], 2)
    assert len({*keys[0], *keys[1], *keys[2]}) == 6 and keys == sampling.noise_keys(3, [[1, 2], [1, 2, 3], [1, 2]], 2)
    assert sampling.noise_keys(3, [[1, 2]], 4) == [keys[0] + keys[2]] and sampling.noise_keys(4, [[1, 2]], 1) != [
        keys[0][:1]
    ]
    assert sampling.noise_keys(3, [[1, 2, 3]], 1) == [keys[1][:1]]
    u = torch.stack([sampling.uniform(torch.tensor(sum(keys, [])), torch.tensor([t])) for t in range(20000)])
    assert torch.allclose(u.mean(0), torch.full((6,), 0.5).double(), atol=5 / math.sqrt(12 * 20000))
    assert (torch.corrcoef(torch.cat([u, u.roll(1, 0)], 1).T) - torch.eye(12)).abs().max() < 5 / math.sqrt(20000)
    counts = torch.stack([torch.histc(column, 100, 0, 1) for column in u.T])
    assert (((counts - 200) ** 2 / 200).sum(1) - 99).abs().max() < 5 * math.sqrt(2 * 99)


@pytest.mark.parametrize(
    "u, token",
    [
        (2.0**-51, 1),  # the smallest: not token 0, whose probability is 0
        (0.5 - 1e-9, 1),
        (0.5 + 1e-9, 2),
        (1 - 1e-9 - 0.25e-12, 2),
        (1 - 1e-9 + 0.25e-12, 3),  # one of the 2,000 last words, which share 1e-9
        (1 - 0.5e-9 + 0.25e-12, 1003),
        (1 - 2.0**-51, 2002),  # the largest
    ],
)
def test_a_uniform_number_is_inverted_far_into_the_tail(u, token, monkeypatch):
    """Words of probability 0, 1/2, 1/2 - 1e-9, 2,000 times 5e-13, and 0."""
    monkeypatch.setattr(sampling, "uniform", lambda keys, number: torch.tensor([u], dtype=torch.float64))
    p = torch.tensor([0, 0.5, 0.5 - 1e-9, *[5e-13] * 2000, 0], dtype=torch.float64)
    choose = sampling.sampling(torch.tensor([0]), 1.0)
    drawn, logp = choose(p.log()[None], torch.tensor([0]), torch.tensor([0]))
    assert drawn.item() == token and logp.item() == pytest.approx(p[token].log().item(), abs=1e-5)


@pytest.mark.parametrize("error", [0.0, 6e-8, -6e-8])
def test_a_blocks_tokens_share_what_its_sum_says(error):
    """Even if the sum, which another kernel may have made, is off by a rounding of float32."""
    p = torch.tensor([[0.6, *[1e-12] * 63, 0.4]], dtype=torch.float64)
    sums = torch.tensor([[0.6 * (1 + error), 0.4]], dtype=torch.float64)
    ends = sums.sum()
    for token, share in ((0, 0.9), (1, 1 - 62.5e-12 / 0.6), (62, 1 - 1.5e-12 / 0.6), (63, 1 - 0.5e-12 / 0.6)):
        assert sampling._draw(p.log().float(), sums, share * sums[:, 0] / ends).item() == token
    for token, u in ((64, sums[:, 0] / ends + 1e-9), (64, torch.tensor([1 - 2**-51], dtype=torch.float64))):
        assert sampling._draw(p.log().float(), sums, u).item() == token


# ---------------------------------------------------------------------------------- against the library and the scorer

IDS_2 = {"vocab_size": VOCAB, "bos_token_id": 1, "eos_token_id": 2}
MORE = {
    "falcon": lambda: transformers.FalconConfig(**SMALL),
    "gptj": lambda: transformers.GPTJConfig(**IDS_2, n_embd=32, n_layer=2, n_head=4, n_positions=128, rotary_dim=4),
    "qwen2, every second layer with a window": lambda: transformers.Qwen2Config(
        **GQA, use_sliding_window=True, sliding_window=5, max_window_layers=1
    ),
    "phi3": lambda: transformers.Phi3Config(**GQA, sliding_window=5),
    "qwen3_moe": lambda: transformers.Qwen3MoeConfig(
        **GQA, head_dim=8, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16
    ),
}
STATE = {**IDS_2, "hidden_size": 32, "num_hidden_layers": 2}
UNFIT = {  # the sampler that each takes: the library's generate, or that with one answer at a time
    "mamba": ("library", lambda: transformers.MambaConfig(**STATE)),
    "rwkv": (
        "alone",
        lambda: transformers.RwkvConfig(**STATE, attention_hidden_size=32, intermediate_size=64, context_length=128),
    ),
    "minimax": ("library", lambda: transformers.MiniMaxConfig(**MOE, head_dim=8, block_size=4)),
    "falcon_h1": (
        "library",
        lambda: transformers.FalconH1Config(
            **GQA, mamba_d_ssm=32, mamba_n_heads=4, mamba_d_head=8, mamba_n_groups=1, mamba_d_state=16
        ),
    ),
    "openai-gpt": (
        "library",
        lambda: transformers.OpenAIGPTConfig(**IDS_2, n_embd=32, n_layer=2, n_head=4, n_positions=64),
    ),
    "mpt": ("library", lambda: transformers.MptConfig(vocab_size=VOCAB, d_model=32, n_layers=2, n_heads=4)),
    "gpt_neo": (
        "library",
        lambda: transformers.GPTNeoConfig(
            **IDS_2,
            hidden_size=32,
            num_layers=2,
            num_heads=4,
            attention_types=[[["global", "local"], 1]],
            window_size=5,
        ),
    ),
}


def other_tiny(config):
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(torch.randn_like(weight) * 0.1)
    model.generation_config.eos_token_id = 2
    return model


def assert_greedy(model, tokens: int, k: int = 2) -> None:
    """The k answers to each prompt are the library's to the prompt alone; their log-probs are the scorer's."""
    answers, logps = generate(model, IDS, PROMPTS, tokens, temperature=0.0, k=k, batch_size=4)
    models.set_attention(model, packed=False)
    for i, prompt in enumerate(PROMPTS):
        ids, mask = torch.tensor([prompt]), torch.ones(1, len(prompt), dtype=torch.long)
        out = model.generate(ids, attention_mask=mask, max_new_tokens=tokens, do_sample=False, pad_token_id=0)
        assert answers[i * k : (i + 1) * k] == [out[0, len(prompt) :].tolist()] * k
    assert_scored(model, answers, logps, k)


@torch.no_grad()
def assert_scored(model, answers, logps, k: int, temperature: float = 1.0, tolerance: float = 1e-4) -> None:
    prompts = [p for p in PROMPTS for _ in range(k)]
    for prompt, answer, found in zip(prompts, answers, logps, strict=True):
        batch = collate([example(prompt, [answer])], "padded", 0)
        wanted = scoring.response_logps(model, batch, temperature=temperature)[0]
        assert len(found) == len(answer) and torch.allclose(torch.tensor(found), wanted, rtol=0, atol=tolerance)


@pytest.mark.parametrize("name", [*ARCHITECTURES, *MORE])
def test_greedy_answers_are_those_of_the_library(name, capsys):
    """40 tokens, which is far more than the windows of 5."""
    model = tiny(name) if name in ARCHITECTURES else other_tiny(MORE[name]())
    model.generation_config.eos_token_id = None if name == "gpt2" else 2
    assert_greedy(model, 40)
    loop = name != "qwen3_next"
    assert (sampling._samplers[model][torch.float32][1] == "loop") == loop
    assert ("because the decode loop does not fit" in capsys.readouterr().out) != loop


@pytest.mark.parametrize("name", ["llama", "mistral", "gemma3_text"])
def test_prompts_are_encoded_with_a_mask_on_a_gpu(name, monkeypatch):
    """In float32, where heads share keys: one kind of layer, sliding windows, and both kinds."""
    monkeypatch.setattr(logprobs, "GPU", "cpu")
    masks, encode = [], decode._encode
    monkeypatch.setattr(decode, "_encode", lambda *args: masks.append(args[-1]) or encode(*args))
    model = tiny(name)
    assert_greedy(model, 12)
    assert len(masks) > 1 and all(mask is not None for mask in masks)


@pytest.mark.parametrize("name", [*ARCHITECTURES, *MORE])
def test_steps_whose_attention_writes_the_cache_give_the_same_answers(name, monkeypatch, capsys):
    """Compiled steps' attention does so; here nothing is compiled. If a model does not fit, a line says so."""
    model = tiny(name) if name in ARCHITECTURES else other_tiny(MORE[name]())
    plain = generate(model, IDS, PROMPTS, 12, seed=5, k=2)[0]
    before = sampling._samplers.pop(model)[torch.float32][1]
    capsys.readouterr()
    monkeypatch.setattr(models, "compiled", lambda model: True)
    monkeypatch.setattr(sampling, "_compiled_distribution", lambda: sampling._distribution)
    assert generate(model, IDS, PROMPTS, 12, seed=5, k=2)[0] == plain
    sampler, says = sampling._samplers[model][torch.float32][1], capsys.readouterr().out
    if name in ("stablelm", "falcon", "qwen3_next"):
        assert sampler == before and "because the compiled decode loop does not fit" in says
    else:
        assert sampler == ("compiled" if decode.compiles(model) else "loop") and not says


@pytest.mark.parametrize("name", UNFIT)
def test_what_the_loop_does_not_fit_takes_the_librarys_generate(name, capsys):
    """Greedy, each answer is the most likely token after a pass over all before it, and one line says why. Sampled with
    one seed, answers are the same in any batch."""
    sampler, config = UNFIT[name]
    model = other_tiny(config())
    answers, logps = generate(model, IDS, PROMPTS, 12, temperature=0.0, k=2)
    assert sampling._samplers[model][torch.float32][1] == sampler
    [line] = capsys.readouterr().out.splitlines()
    assert line.startswith(
        f"sampling: with {sampling.SAMPLERS[sampler]}, because the decode loop does not fit {name} ("
    )
    for prompt, first, second in zip(PROMPTS, answers[::2], answers[1::2], strict=True):
        ids = list(prompt)
        while len(ids) < len(prompt) + 12 and (len(ids) == len(prompt) or ids[-1] != 2):
            with torch.no_grad():
                out = model(torch.tensor([ids]), **({} if name == "openai-gpt" else {"use_cache": False}))
                ids.append(out.logits[0, -1].argmax().item())
        assert first == second == ids[len(prompt) :]
    assert_scored(model, answers, logps, 2)
    sampled = generate(model, IDS, PROMPTS, 12, seed=3, k=2)
    again = generate(model, IDS, PROMPTS, 12, seed=3, k=2, batch_size=3)
    assert again[0] == sampled[0] and not capsys.readouterr().out
    assert_scored(model, *sampled, 2)


ONE_TOKEN, ALL = [0.3] + [0.0] * 23, [0.15] * 24
CASES = [(torch.bfloat16, ONE_TOKEN, True), (torch.bfloat16, ALL, False), (torch.float32, ONE_TOKEN, False)]


@pytest.mark.parametrize("dtype, shift, fits", CASES)
def test_rounding_of_half_precision_is_judged_by_its_mean(dtype, shift, fits, monkeypatch):
    """One of the 24 log-probs of the scorer is 0.3 nats off, or each is 0.15 off."""
    own, shifts = scoring.token_numbers, iter(torch.tensor(shift).split(8))
    shifted = lambda *args: own(*args) + next(shifts)  # noqa: E731
    monkeypatch.setattr(scoring, "token_numbers", shifted)
    monkeypatch.setattr(scoring, "tolerance", lambda *args: 1e-3)
    model = tiny("llama")
    with contextlib.nullcontext() if fits else pytest.raises(BadInput, match="cannot be sampled from"):
        sampling.choose_sampler(model, [[*range(3, 20)], [5, 6]], 20, 0, dtype)


def test_a_model_that_no_sampler_fits_is_refused(monkeypatch):
    own = scoring.token_numbers
    monkeypatch.setattr(scoring, "token_numbers", lambda *args: own(*args) - 0.5)
    with pytest.raises(BadInput, match="^llama: cannot be sampled from: log-probs differ by 0.5, where rounding expl"):
        generate(tiny("llama"), IDS, PROMPTS, 4)


def test_the_check_is_made_again_for_longer_sequences_only(monkeypatch):
    model, lengths = tiny("llama"), []
    own = sampling._misfit
    longest = lambda rows: max(len(x.prompt) + len(x.responses[0]) for x in rows)  # noqa: E731
    monkeypatch.setattr(sampling, "_misfit", lambda *args: lengths.append(longest(args[2])) or own(*args))
    for prompt, tokens in (([1, 5, 6], 10), ([1], 15), ([1, 5, 6], 14), ([1, 5], 2), ([1] * 20, 13)):
        generate(model, IDS, [prompt], tokens)
    assert lengths == [16, 32, 64]


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_log_probs_are_those_of_the_distribution_that_was_sampled(temperature):
    model = tiny("mistral")
    answers, logps = generate(model, IDS, PROMPTS, 30, temperature, seed=2, k=3)
    assert_scored(model, answers, logps, 3, temperature)
    rows = [[p for p in PROMPTS for _ in range(3)], answers]
    cached = cached_logps(model, *rows, temperature, 0)
    assert all(torch.allclose(x, torch.tensor(y), rtol=0, atol=1e-4) for x, y in zip(cached, logps, strict=True))


def test_bfloat16():
    """The cache is bfloat16, the sampler our loop, and the log-probs are as far from the scorer's as rounding is."""
    model = sharding.load(lambda device: tiny("llama"), "cpu", torch.bfloat16)
    answers, logps = generate(model, IDS, PROMPTS, 20, seed=2, k=2, dtype=torch.bfloat16)
    assert sampling._samplers[model][torch.bfloat16][1] == "loop"
    prompts = [p for p in PROMPTS for _ in range(2)]
    for prompt, answer, found in zip(prompts, answers, logps, strict=True):
        with torch.no_grad():
            wanted = scoring.response_logps(model, collate([example(prompt, [answer])], "padded", 0), torch.bfloat16)[0]
        assert (torch.tensor(found) - wanted).abs().max() < 0.1
    with sharding.autocast(model, torch.bfloat16), torch.no_grad():
        choose = sampling.given([[5, 6]], 1.0, model.device)
        rows = decode.Rows(model, [[5, 6, 7]], 1, [2], choose, [2], 0, torch.bfloat16)
        rows.step()
    assert {x.dtype for layer in rows.cache.layers for x in (layer.keys, layer.values)} == {torch.bfloat16}


# ----------------------------------------------------------------------------------------------------------- the loop


def ending(name: str):
    """A model of whose tokens many are an end."""
    model = tiny(name)
    model.generation_config.eos_token_id = [*range(2, 8)]
    return model


@pytest.fixture
def sizes(monkeypatch):
    """The number of rows in each step from here on."""
    found, own = [], decode.Rows.step
    monkeypatch.setattr(decode.Rows, "step", lambda rows: found.append(rows.size) or own(rows))
    return found


@pytest.mark.parametrize("name", ["llama", "mistral", "gpt2", "gemma3_text"])
def test_neither_the_batch_nor_rows_that_leave_it_change_an_answer(name, sizes, monkeypatch):
    model = ending(name)
    prompts = [[1, *range(3 + i, 5 + 2 * i)] for i in range(16)]
    monkeypatch.setitem(decode.FEWEST, "cpu", 1000)
    whole, logps = generate(model, IDS, prompts, 30, seed=7, k=3)
    assert {*sizes[-30:]} == {48}
    monkeypatch.setitem(decode.FEWEST, "cpu", 1)
    for every in (1, 4):
        monkeypatch.setitem(decode.LOOK_EVERY, "cpu", every)
        sizes.clear()
        shrinking, logps_2 = generate(model, IDS, prompts, 30, seed=7, k=3)
        assert shrinking == whole and {*sizes} > {48, 24, 12} and sizes[::-1] == sorted(sizes)
        assert all(
            torch.allclose(torch.tensor(x), torch.tensor(y), atol=1e-5) for x, y in zip(logps, logps_2, strict=True)
        )
    assert generate(model, IDS, prompts, 30, seed=7, k=3, batch_size=5)[0] == whole
    assert generate(model, IDS, prompts[::-1], 30, seed=7, k=3, batch_size=7)[0][:3] == whole[-3:]
    assert generate(model, IDS, prompts[4:5], 30, seed=7)[0] == whole[12:13]
    assert len({*map(len, whole)}) > 8


def test_the_loop_stops_when_all_rows_have_ended(sizes):
    model = tiny("llama")
    model.generation_config.eos_token_id = [*range(VOCAB)]
    assert [*map(len, generate(model, IDS, PROMPTS, 30, seed=1)[0])] == [1] * 5
    sizes.clear()
    generate(model, IDS, PROMPTS, 30, seed=1)
    assert sizes == [5]


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_prompt_is_encoded_once_for_all_its_responses(name):
    """One pass over the prompts without their last tokens, then one token of each row a step."""
    model, shapes = tiny(name), []
    generate(model, IDS, PROMPTS, 8, seed=5)
    model.get_input_embeddings().register_forward_pre_hook(lambda _, ids: shapes.append(tuple(ids[0].shape)))
    generate(model, IDS, PROMPTS, 8, seed=5, k=3)
    if name != "qwen3_next":
        assert shapes[:2] == [(5, 6), (15, 1)] and {width for _, width in shapes[1:]} == {1} and len(shapes) <= 9


@pytest.mark.parametrize("name", ["gpt2", "opt"])
def test_each_response_is_cut_at_the_last_position_that_the_model_has_learnt(name, monkeypatch):
    """A response of 12, 6 or 1 tokens, in a batch as alone, also if the rows that have ended stay in the batch."""
    monkeypatch.setitem(decode.FEWEST, "cpu", 1000)
    config = ARCHITECTURES[name]()
    config.update({"n_positions": 16} if name == "gpt2" else {"max_position_embeddings": 16})
    model = other_tiny(config)
    model.generation_config.eos_token_id = None
    ids = SimpleNamespace(eos_token_id=None, pad_token_id=0)
    prompts = [[*range(3, 3 + n)] for n in (4, 10, 15)]
    together = generate(model, ids, prompts, 40, temperature=0.0)[0]
    assert [*map(len, together)] == [12, 6, 1]
    assert together == [generate(model, ids, [p], 40, temperature=0.0)[0][0] for p in prompts]
    with pytest.raises(BadInput, match="a prompt has 16 tokens, and the model 16 positions"):
        generate(model, ids, [[*range(3, 19)]], 4)


@pytest.mark.parametrize("name", [x for x in ARCHITECTURES if x not in ("qwen3_next", "mixtral", "gpt_oss")])
def test_a_cuda_graph_could_hold_a_step(name):
    """A step reads nothing back, which would end a capture, and its operators and shapes do not depend on how far it
    is. (Mixtures are left out: on a CPU the library reads how many tokens each expert gets.)"""
    model, seen = tiny(name), []
    choose = sampling.sampling(torch.tensor(sum(sampling.noise_keys(0, PROMPTS, 2), [])), 0.7)
    with torch.no_grad():
        rows = decode.Rows(model, PROMPTS, 2, [20] * 10, choose, [2], 0, torch.float32)
    with torch.no_grad(), decode.attention(model):
        for number in range(12):
            with (
                torch.profiler.profile(record_shapes=True) if number in (2, 11) else contextlib.nullcontext() as profile
            ):
                rows.step()
            events = profile.events() if profile else []
            seen.append(Counter((x.name, str(x.input_shapes)) for x in events if x.name.startswith("aten::")))
    assert seen[2] == seen[11] and len(seen[2]) > 20
    assert not {"aten::_local_scalar_dense", "aten::nonzero"} & {name for name, _ in seen[11]}


def test_the_cache_leaves_memory_with_its_rows():
    """At once, and not when Python next looks for cycles: on a GPU it may be larger than the model."""
    choose = sampling.given([[5, 6]], 1.0, torch.device("cpu"))
    gc.disable()
    try:
        with torch.no_grad():
            rows = decode.Rows(tiny("llama"), [[5, 6, 7]], 1, [2], choose, [2], 0, torch.float32)
            rows.step()
        alive = [weakref.ref(x) for x in (rows, rows.model, rows.cache.layers[0].keys)]
        assert all(x() is not None for x in alive)
        del rows
        assert [x() for x in alive] == [None] * 3
    finally:
        gc.enable()


@pytest.fixture
def like_a_gpu(monkeypatch):
    """Products of half-precision numbers in float32, which CUDA has, are made here of the same numbers."""
    monkeypatch.setattr(logprobs, "GPU", "cpu")
    monkeypatch.setattr(logprobs, "_mm", lambda a, b, dtype, out=None: torch.mm(a.to(dtype), b.to(dtype), out=out))
    monkeypatch.setattr(logprobs, "compiled", lambda function: function)


def test_a_head_that_is_not_the_models_is_refused_in_half_precision(like_a_gpu, monkeypatch):
    own = models.output_head
    monkeypatch.setattr(models, "output_head", lambda model: own(model)._replace(scale=0.25))
    model = sharding.load(lambda device: ending("llama"), "cpu", torch.bfloat16)
    with pytest.raises(BadInput, match="output_head"):
        generate(model, IDS, [[1, 3, 4]], 6, dtype=torch.bfloat16)


def test_logits_in_half_precision_are_not_rounded(like_a_gpu, monkeypatch):
    found, own = [], logprobs.logits
    monkeypatch.setattr(logprobs, "logits", lambda *args: found.append((*args, own(*args))) or found[-1][2])
    model = sharding.load(lambda device: ending("llama"), "cpu", torch.bfloat16)
    generate(model, IDS, [[1, 3, 4], [1, 5]], 6, seed=7, k=3, dtype=torch.bfloat16)
    assert sampling._samplers[model][torch.bfloat16][1] == "loop" and len(found) > 5
    for states, head, logits in found:
        assert states.dtype == head.weight.dtype == torch.bfloat16 and logits.dtype == torch.float32
        assert torch.allclose(logits.double(), states.double() @ head.weight.double().T, rtol=1e-5, atol=1e-5)
        assert (logits != logits.bfloat16()).float().mean() > 0.9


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize(
    "name, dtype, compiled",
    [
        *[(name, torch.bfloat16, False) for name in ("llama", "mistral", "gpt2", "gemma3_text")],
        ("llama", torch.float32, False),
        ("mistral", torch.bfloat16, True),
    ],
)
def test_replayed_graphs_give_what_steps_give(name, dtype, compiled, monkeypatch):
    """Same tokens and log-probs, also after rows have left; each number of rows is captured once in a call."""
    model = sharding.load(lambda device: ending(name).to(device), "cuda", dtype)
    if compiled:
        models.compile_layers(model)
    prompts = [[1, *range(3 + i, 5 + 2 * i)] for i in range(16)]
    captured, own = [], decode._captured
    monkeypatch.setattr(decode, "_captured", lambda rows: captured.append(rows.size) or own(rows))
    monkeypatch.setitem(decode.LOOK_EVERY, "cuda", 4)
    replayed, logps = generate(model, IDS, prompts, 40, seed=7, k=3, dtype=dtype)
    sizes = captured[captured.index(48) :]  # after those of the check
    assert sampling._samplers[model][dtype][1] == ("compiled" if compiled else "loop")
    assert len(sizes) > 1 and sizes == sorted({*sizes}, reverse=True)
    monkeypatch.setattr(decode, "_captured", lambda rows: rows.step() or rows.step)
    stepped, others = generate(model, IDS, prompts, 40, seed=7, k=3, dtype=dtype)
    assert replayed == stepped
    assert all(x == pytest.approx(y, abs=1e-5) for x, y in zip(logps, others, strict=True))
