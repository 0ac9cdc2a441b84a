"""sample.py: what is sampled, what is written, and what is left after a kill."""

import dataclasses
import datetime
import functools
import json
import os
import resource
import shutil
import signal
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers
from test_resume import pairs, server, wait_for, write_model, write_rows  # noqa: F401 (server is a fixture)
from test_scripts import plain_logps
from tiny import ARCHITECTURES, VOCAB, example, tiny
from tokenizers import Tokenizer, pre_tokenizers, processors
from tokenizers.models import WordLevel

import sample
from rlhf import BadInput
from support import examples, generate, models, reviews, runs
from support.examples import build
from support.rows import read_rows
from support.tokens import digest

COLUMNS = ["prompt", "responses", "ended", "logps", "tokens", "token_ids", "tokenizer", "where"]
BOS, EOS = 1, 2
SPECIAL = (0, BOS)  # of the tiny models' tokenizer: they leave no text
PROMPTS = [  # of like length and not, so that batches of 4 mix neighbours of the data
    "it was a rainy sunday",
    "the plot",
    "we saw it last night",
    "the jokes were really",
    "i loved",
    "although the script was dull , the",
    "its songs",
    "for me , the lead actor",
    "the music was",
    "what a",
    "frankly , the",
]
BATCHES = 3  # of 4, 4 and 3 prompts


def words(pad: str = "<pad>", template: str | None = None):
    """A tokenizer of the tiny models' 61 ids, a word each."""
    vocabulary = {"<pad>": 0, "<bos>": BOS, "<eos>": EOS} | {f"w{i}": i for i in range(3, VOCAB)}
    backend = Tokenizer(WordLevel(vocabulary, unk_token="<pad>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", BOS)])
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<bos>",
        eos_token="<eos>",
        pad_token=pad,
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = template
    return tokenizer


@functools.cache
def saved(folder: Path, name: str) -> Path:
    """The folder of a tiny model of this architecture, with `words`."""
    models.save(tiny(name), words(), folder / name)
    return folder / name


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Two small models, the first of which ends now and then, and 11 prompts."""
    folder = tmp_path_factory.mktemp("world")
    write_model(folder / "model")
    write_model(folder / "other", seed=1)
    model, tokenizer = load(folder / "model"), reviews.tokenizer()
    with torch.no_grad():
        model.get_input_embeddings().weight[tokenizer.eos_token_id] *= 8
    models.save(model, tokenizer, folder / "model")
    write_rows(folder / "prompts.jsonl", [{"prompt": prompt} for prompt in PROMPTS])
    return folder


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """No calls of git."""
    monkeypatch.setattr(runs, "environment", dict)


def arguments(world: Path, out: Path, **changes) -> sample.Args:
    flags = {"model": f"{world}/model", "data": f"{world}/prompts.jsonl", "out": str(out), "device": "cpu"}
    flags |= {"k": 3, "max_new_tokens": 6, "batch_size": 4}
    return sample.Args(**flags | changes)


def read(out: Path) -> list[dict]:
    return [json.loads(line) for line in out.read_text("utf-8").split("\n")[:-1]]


@pytest.fixture
def go(world, tmp_path):
    """Samples; returns the file, its rows and the results."""

    def run(name: str = "samples.jsonl", **changes):
        out = tmp_path / name
        results = sample.main(arguments(world, out, **changes))
        return SimpleNamespace(out=out, rows=read(out), results=results)

    return run


@pytest.mark.parametrize("k", [1, 2])
def test_the_next_command_ranks_answers_if_there_are_several(k, go, capsys):
    out = go(k=k).out
    end = f"The samples are in {out}.\n" + (f"Next: python annotate.py {out}\n" if k > 1 else "")
    assert capsys.readouterr().out.endswith(f"\n{end}")


def test_the_list_for_alpaca_eval(world, tmp_path, go, monkeypatch):
    """One answer to each instruction, stripped, with the columns of the data set; instructions are messages of a user
    where there is a template."""
    tokenizer = reviews.tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}the film {{ m['content'] }}{% endfor %}{% if add_generation_prompt %} was{% endif %}"
    )
    models.save(models.load_model(str(world / "model"), "cpu"), tokenizer, tmp_path / "chat")
    asked = [
        {
            "instruction": "the plot",
            "output": "fine .",
            "generator": "davinci",
            "dataset": "koala",
            "datasplit": "eval",
        },
        {"instruction": "i loved", "output": "", "generator": "davinci", "dataset": "vicuna", "input": ""},
    ]
    (tmp_path / "alpaca_eval.json").write_text(json.dumps(asked))
    flags = {"data": str(tmp_path / "alpaca_eval.json"), "k": 1, "format": "alpaca_eval"}
    answer, spaced = sample.answer, lambda e: dataclasses.replace(e, response_texts=[f" {e.response_texts[0]}\n"])
    monkeypatch.setattr(sample, "answer", lambda *args, **kwargs: [*map(spaced, answer(*args, **kwargs))])
    for name, template in (("chat", True), ("model", False)):
        model = str((tmp_path if template else world) / name)
        found = go(f"{name}.jsonl", model=model, **flags)
        user = [[{"role": "user", "content": row["instruction"]}] for row in asked]
        assert [row["prompt"] for row in found.rows] == (user if template else ["the plot", "i loved"])
        assert json.loads((tmp_path / f"{name}.json").read_text()) == [
            {"instruction": "the plot", "output": found.rows[0]["responses"][0].strip(), "generator": model}
            | {"dataset": "koala", "datasplit": "eval"},
            {"instruction": "i loved", "output": found.rows[1]["responses"][0].strip(), "generator": model}
            | {"dataset": "vicuna"},
        ]
    (tmp_path / "new.json").write_text("mine")
    with pytest.raises(BadInput, match=r"new\.json is there already: name another --out"):
        go("new.jsonl", **flags)
    with pytest.raises(BadInput, match="one answer to an instruction: give --k 1"):
        go("two.jsonl", **flags | {"k": 2})
    turns = [*user[0], {"role": "assistant", "content": "was fine ."}, *user[1]]
    write_rows(tmp_path / "turns.jsonl", [{"prompt": turns}])
    with pytest.raises(BadInput, match="turns.jsonl:1: --format alpaca_eval is for prompts of one user message"):
        go("turns-out.jsonl", **flags | {"data": str(tmp_path / "turns.jsonl"), "model": str(tmp_path / "chat")})


@pytest.fixture(scope="module")
def whole(world):
    """The bytes of the file of a run that was never stopped."""
    sample.main(arguments(world, world / "whole.jsonl"))
    return (world / "whole.jsonl").read_bytes()


@pytest.fixture
def ids(monkeypatch):
    """The sampled token ids of each prompt, by the prompt's ids, from here on."""
    found: dict[tuple, list[list[int]]] = {}

    def spy(model, tokenizer, prompts, *args, generate=generate.generate):
        responses, logps = generate(model, tokenizer, prompts, *args)
        k = len(responses) // len(prompts)
        for i, prompt in enumerate(prompts):
            found.setdefault(tuple(prompt), []).extend(responses[i * k : (i + 1) * k])
        return responses, logps

    monkeypatch.setattr(generate, "generate", spy)
    return found


def load(folder):
    return transformers.AutoModelForCausalLM.from_pretrained(folder).eval()


def flags_of(a: sample.Args) -> list[str]:
    """The command line that gives these arguments."""
    given = {name.replace("_", "-"): value for name, value in vars(a).items() if value is not None}
    shown = [[f"--{name}"] if value is True else [f"--{name}", str(value)] for name, value in given.items()]
    return [part for flag in shown for part in flag if flag[-1] != "False"]


def cli(monkeypatch, a: sample.Args) -> int:
    """Exit code of the command with these flags."""
    monkeypatch.setattr(sys, "argv", ["sample.py", *flags_of(a)])
    try:
        runs.cli(sample.main, sample.Args)
    except SystemExit as stop:
        return stop.code
    return 0


def refused(monkeypatch, capfd, a: sample.Args, *message: str, code: int = 2) -> None:
    """The exit code and one line."""
    capfd.readouterr()
    assert cli(monkeypatch, a) == code
    lines = [line for line in capfd.readouterr().err.splitlines() if line]
    assert lines[-1].startswith("error: ") and all("prompt/s" in line for line in lines[:-1]), lines
    assert all(part in lines[-1] for part in message), lines


# ------------------------------------------------------------------------------------------------------- what is there


def test_rows_and_columns(go, world, ids):
    """In the order of the data, k of each, and every column as the sampled ids have it."""
    run = go()
    tokenizer = reviews.tokenizer()
    assert [row["prompt"] for row in run.rows] == PROMPTS
    assert [row["where"] for row in run.rows] == [f"prompts.jsonl:{i}" for i in range(1, 12)]
    for row in run.rows:
        assert list(row) == COLUMNS
        responses = ids[tuple(tokenizer(row["prompt"])["input_ids"])]
        assert len(responses) == 3 and row["tokens"] == [len(r) for r in responses]
        assert row["token_ids"] == responses and row["tokenizer"] == digest(tokenizer)
        assert row["responses"] == [tokenizer.decode(r, skip_special_tokens=True) for r in responses]
        assert row["ended"] == [r[-1] == tokenizer.eos_token_id for r in responses]
        assert all(len(r) == 6 or ended for r, ended in zip(responses, row["ended"], strict=True))
    flat = {name: [x for row in run.rows for x in row[name]] for name in ("tokens", "ended", "logps")}
    assert run.results["length"] == pytest.approx(sum(flat["tokens"]) / 33)
    assert run.results["ended"] == pytest.approx(sum(flat["ended"]) / 33) and 0 < sum(flat["ended"]) < 33
    assert run.results["logps"] == pytest.approx(sum(flat["logps"]) / 33)
    gold = [reviews.gold_reward(f"{row['prompt']} {text}") for row in run.rows for text in row["responses"]]
    assert run.results["gold"] == pytest.approx(sum(gold) / 33)


@pytest.mark.parametrize("settings", [{}, {"layout": "tree", "temperature": 0.7}, {"layout": "padded"}], ids=str)
def test_logps_are_those_of_the_librarys_logits(settings, go, world, ids):
    """Of the model itself, whatever the temperature, EOS included; under the model and under the reference."""
    run = go(ref=f"{world}/other", micro_batch_tokens=40, **settings)
    tokenizer = reviews.tokenizer()
    assert list(run.rows[0]) == [*COLUMNS[:4], "ref_logps", *COLUMNS[4:]]
    examples = [example(p := tokenizer(prompt)["input_ids"], ids[tuple(p)]) for prompt in PROMPTS]
    for column, name in (("logps", "model"), ("ref_logps", "other")):
        want = plain_logps(load(world / name), examples)
        for row, logps in zip(run.rows, want, strict=True):
            assert row[column] == pytest.approx(logps, abs=1e-4)
    kl = [x - y for row in run.rows for x, y in zip(row["logps"], row["ref_logps"], strict=True)]
    assert run.results.get("kl") == (None if "temperature" in settings else pytest.approx(sum(kl) / 33))


def test_the_same_seed_gives_the_same_file_and_another_one_another(go, whole):
    torch.manual_seed(5)
    state = torch.get_rng_state()
    first = go("first.jsonl", micro_batch_tokens=50)
    assert torch.equal(torch.get_rng_state(), state)
    columns = ("prompt", "responses", "ended", "tokens", "token_ids", "tokenizer", "where")
    for mine, theirs in zip(first.rows, map(json.loads, whole.splitlines()), strict=True):
        assert [mine[name] for name in columns] == [theirs[name] for name in columns]
        assert mine["logps"] == pytest.approx(theirs["logps"], abs=1e-4)
    other = go("other.jsonl", seed=1)
    assert sum(x["responses"] == y["responses"] for x, y in zip(first.rows, other.rows, strict=True)) == 0


def test_responses_to_a_prompt_differ_among_themselves(go):
    """Each of the k is a draw of its own: hardly two of 6 words each are the same."""
    assert all(len(set(row["responses"])) == 3 for row in go().rows)


def test_prompts_are_sampled_once_in_the_datas_order(go, tmp_path):
    """A prompt that comes again, in whatever row, is the one of its first row."""
    data = write_rows(tmp_path / "twice.jsonl", [{"prompt": p} for p in ("the plot", "it was", "we saw", "the plot")])
    rows = go(data=str(data)).rows
    assert [(row["prompt"], row["where"]) for row in rows] == [
        ("the plot", "twice.jsonl:1"),
        ("it was", "twice.jsonl:2"),
        ("we saw", "twice.jsonl:3"),
    ]


TALK = [{"role": "system", "content": "be kind"}, {"role": "user", "content": "how was the plot ?"}]
ANSWERS = [{"role": "assistant", "content": "it was superb ."}], [{"role": "assistant", "content": "it was dull ."}]
FORMS = {  # a row, and its prompt
    "prompt": ({"prompt": "the plot"}, "the plot"),
    "prompt of messages": ({"prompt": TALK}, TALK),
    "preference": ({"prompt": "the plot", "chosen": "was superb .", "rejected": "was dull ."}, "the plot"),
    "dialogues": ({"chosen": TALK + ANSWERS[0], "rejected": TALK + ANSWERS[1]}, TALK),
    "question": ({"question": "the plot was", "chosen": "superb .", "rejected": "dull ."}, "the plot was"),
    "hh": (
        {"chosen": "\n\nHuman: hi\n\nAssistant: it was", "rejected": "\n\nHuman: hi\n\nAssistant: a"},
        "\n\nHuman: hi\n\nAssistant:",
    ),
    "ranking": ({"prompt": "the plot", "responses": ["was .", "a ."], "ranks": [1, 2]}, "the plot"),
    "unpaired": ({"prompt": "the plot", "completion": "was superb .", "label": True}, "the plot"),
    "messages": ({"messages": TALK + ANSWERS[0]}, TALK),
    "open messages": ({"messages": TALK}, TALK),
}


@pytest.mark.parametrize("name", FORMS)
def test_prompts_of_every_row_form(name, go, tmp_path):
    """As the row has them: messages stay messages. The samples, ranked, are rows to train on with the same prompts."""
    row, prompt = FORMS[name]
    found = go(data=str(write_rows(tmp_path / "rows.jsonl", [row])))
    [sampled] = found.rows
    assert sampled["prompt"] == prompt and all(isinstance(text, str) for text in sampled["responses"])
    ranked = ("x:1", sampled | {"ranks": [1, 2, 3]})
    [back] = build([ranked], reviews.tokenizer(), "preference", 512, 1024)[0]
    [asked] = build([("x:1", row)], reviews.tokenizer(), "prompts", 512, 1024)[0]
    assert back.prompt == asked.prompt and back.prompt_text == asked.prompt_text


def test_tools_stay_with_the_prompt(go, world, tmp_path):
    """The samples have the tools that the model saw: as rows to rank or to score, they give the same prompt."""
    tokenizer = reviews.tokenizer()
    tokenizer.chat_template = (
        "{% for tool in tools or [] %}{{ tool.name + ' ' }}{% endfor %}"
        "{% for m in messages %}{{ m.content + ' ' }}{% endfor %}"
    )
    models.save(load(world / "model"), tokenizer, tmp_path / "model")
    row = {"prompt": [{"role": "user", "content": "the plot"}], "tools": [{"name": "superb"}]}
    found = go(model=str(tmp_path / "model"), data=str(write_rows(tmp_path / "rows.jsonl", [row])))
    [sampled] = found.rows
    assert {name: sampled[name] for name in row} == row
    [scored] = build([("x:1", sampled)], tokenizer, "responses", 512, 1024)[0]
    assert scored.prompt_text == "superb the plot "


def test_max_prompts_draws_by_seed(go, whole):
    drawn = {seed: [row["prompt"] for row in go(f"{seed}.jsonl", max_prompts=5, seed=seed).rows] for seed in (0, 1)}
    for prompts in drawn.values():
        assert len(prompts) == 5 and prompts == sorted(prompts, key=PROMPTS.index) and prompts != PROMPTS[:5]
    assert drawn[0] != drawn[1]
    assert go("all.jsonl", max_prompts=50).out.read_bytes() == whole


def test_long_prompts_lose_their_beginning(go, tmp_path, ids):
    prompt = " ".join(["very"] * 30 + ["dull", ",", "the"])
    tokenizer = reviews.tokenizer()
    rows = go(data=str(write_rows(tmp_path / "long.jsonl", [{"prompt": prompt}])), max_prompt_length=4).rows
    assert rows[0]["prompt"] == prompt
    assert [*ids] == [tuple(tokenizer("dull , the")["input_ids"])]


# ------------------------------------------------------------------------------------------------------- distribution

CRITICAL = 43.82  # chi-square with 19 degrees of freedom is above it with probability 0.001
GROUPS = 20


def chi_square(counts: torch.Tensor, expected: torch.Tensor) -> float:
    """Over 20 groups of tokens, each expected at least 5 times."""
    groups = torch.arange(len(counts)) % GROUPS
    observed = torch.zeros(GROUPS).double().index_add(0, groups, counts.double())
    wanted = torch.zeros(GROUPS).double().index_add(0, groups, expected.double())
    assert wanted.min() >= 5
    return ((observed - wanted) ** 2 / wanted).sum().item()


def test_samples_follow_the_softmax_at_their_temperature(tmp_path, go, ids):
    """First and second tokens of 3,000 samples, though the model's own settings ask for something else altogether."""
    model, n = tiny("llama"), 3000
    model.generation_config.update(top_k=2, repetition_penalty=1.8, temperature=0.1, do_sample=True)
    models.save(model, words(), tmp_path / "model")
    assert load(tmp_path / "model").generation_config.top_k == 2
    prompt = [BOS, 7, 9, 30]
    data = write_rows(tmp_path / "one.jsonl", [{"prompt": "w7 w9 w30"}])
    flags = {"model": str(tmp_path / "model"), "data": str(data), "temperature": 0.7, "max_new_tokens": 2}
    go(k=n, micro_batch_tokens=10**5, **flags)
    sampled = ids[tuple(prompt)]
    assert len(sampled) == n

    def expected(temperature):
        with torch.no_grad():
            first = (model(torch.tensor([prompt])).logits[0, -1] / temperature).softmax(-1)
            both = torch.tensor([[*prompt, token] for token in range(VOCAB)])
            second = (model(both).logits[:, -1] / temperature).softmax(-1)
        second[EOS] = 0  # nothing follows it
        return first * n, first @ second * n

    firsts = torch.bincount(torch.tensor([r[0] for r in sampled]), minlength=VOCAB)
    seconds = torch.bincount(torch.tensor([r[1] for r in sampled if len(r) > 1]), minlength=VOCAB)
    assert firsts[EOS] + seconds.sum() == n  # a response is cut at its EOS, and only there
    for counts, right, wrong in zip((firsts, seconds), expected(0.7), expected(1.0), strict=True):
        assert chi_square(counts, right * counts.sum() / right.sum()) < CRITICAL
        assert chi_square(counts, wrong * counts.sum() / wrong.sum()) > CRITICAL  # it tells temperatures apart
        rare = right.argsort()[: VOCAB - 50]  # what the library's default of top_k = 50 would leave out
        assert right[rare].sum() > 12 and abs(counts[rare].sum() - right[rare].sum()) < 4 * right[rare].sum().sqrt()


# ------------------------------------------------------------------------------------------- back to the sampled ids


def as_ranking(row: dict) -> tuple[str, dict]:
    return "samples.jsonl:1", row | {"ranks": [*range(1, len(row["responses"]) + 1)]}


def test_a_ranking_of_samples_has_the_sampled_ids(go, ids):
    """Cut ones without EOS, ended ones with it."""
    tokenizer, kinds = reviews.tokenizer(), Counter()
    for row in go().rows:
        responses = ids[tuple(tokenizer(row["prompt"])["input_ids"])]
        [e] = build([as_ranking(row)], tokenizer, "preference", 512, 1024)[0]
        for response, rebuilt, ended in zip(responses, e.responses, row["ended"], strict=True):
            assert rebuilt == response and (rebuilt[-1] == tokenizer.eos_token_id) == ended
            kinds[ended] += 1
        bare = {name: row[name] for name in ("prompt", "responses", "ended")}  # as written before there were token ids
        [e] = build([as_ranking(bare)], tokenizer, "preference", 512, 1024)[0]
        for response, rebuilt in zip(responses, e.responses, strict=True):
            if not {*response} & {*tokenizer.all_special_ids} - {tokenizer.eos_token_id}:
                assert rebuilt == response
    assert kinds[True] > 1 and kinds[False] > 5


def certain(folder: Path, token: int) -> Path:
    """A model that always says `token`."""
    model = tiny("llama")
    model.config.tie_word_embeddings = False
    model.lm_head = torch.nn.Linear(model.lm_head.in_features, VOCAB, bias=False)
    with torch.no_grad():
        model.model.norm.weight.zero_()  # all states are 0 ...
        model.lm_head.weight.zero_()
    model.generation_config.eos_token_id = token  # ... and the first token ends with probability 1 / 61
    models.save(model, words(), folder)
    return folder


def test_an_empty_response_goes_there_and_back(go, tmp_path, ids):
    """EOS at once: no text, one token, and one token again when it is read as a ranking or to be scored."""
    folder = certain(tmp_path / "model", EOS)
    data = write_rows(tmp_path / "one.jsonl", [{"prompt": "w7 w9"}])
    [row] = go(model=str(folder), data=str(data), k=150, max_new_tokens=2).rows
    empty = [i for i, r in enumerate(ids[(BOS, 7, 9)]) if r == [EOS]]
    assert empty, "none of 150 samples ended at once"
    for i in empty:
        assert (row["responses"][i], row["ended"][i], row["tokens"][i]) == ("", True, 1)
        assert row["logps"][i] == pytest.approx(-torch.tensor(VOCAB).log().item(), abs=1e-5)
    full = next(i for i, text in enumerate(row["responses"]) if text.count("w") == 2)
    pair = {name: [row[name][i] for i in (full, empty[0])] for name in ("responses", "ended", "token_ids")}
    for kind in ("preference", "responses"):
        [e] = build([as_ranking(row | pair)], words(), kind, 512, 1024)[0]
        assert e.responses == [ids[(BOS, 7, 9)][full], [EOS]]


def test_every_end_of_the_models_own_settings_ends_a_response(go, tmp_path, ids):
    """Chat models name the end of a turn besides the tokenizer's EOS."""
    model = tiny("llama")
    model.generation_config.eos_token_id = [EOS, 11, 12, 13, 14, 15, 16]
    models.save(model, words(), tmp_path / "model")
    data = write_rows(tmp_path / "one.jsonl", [{"prompt": "w7 w9"}])
    [row] = go(model=str(tmp_path / "model"), data=str(data), k=40).rows
    others = [ended for ended, r in zip(row["ended"], ids[(BOS, 7, 9)], strict=True) if r[-1] in range(11, 17)]
    assert others and all(others)
    assert all(not {*r[:-1]} & {EOS, *range(11, 17)} for r in ids[(BOS, 7, 9)])


# ------------------------------------------------------------------------------------------------------- architectures

FEW = ["llama", "gpt2", "mistral", "opt", "gemma2", "gpt_oss", "granite"]


@pytest.mark.parametrize(
    "name", [*FEW, *(pytest.param(n, marks=pytest.mark.slow) for n in ARCHITECTURES if n not in FEW)]
)
def test_architectures(name, tmp_path_factory, tmp_path, go, ids):
    """Prompts on both sides of a sliding window of 5, left-padded while sampling: log-probs are the library's own, and
    greedy enough a temperature gives the greedy tokens of each prompt alone."""
    folder = saved(tmp_path_factory.getbasetemp(), name)
    prompts = [[BOS, 7, 9], [BOS, 20], [BOS, 30, 31, 32, 33, 34, 35, 36, 37, 38], [BOS, 5, 6, 40, 41]]
    data = write_rows(tmp_path / "p.jsonl", [{"prompt": " ".join(f"w{i}" for i in p[1:])} for p in prompts])
    flags = {"model": str(folder), "data": str(data)}
    run = go(batch_size=2, **flags)
    model = load(folder)
    for row, logps in zip(run.rows, plain_logps(model, [example(p, ids[tuple(p)]) for p in prompts]), strict=True):
        assert row["logps"] == pytest.approx(logps, abs=1e-3)

    ids.clear()
    go("greedy.jsonl", batch_size=4, k=1, temperature=1e-5, **flags)
    for prompt in prompts:
        [response], found = ids[tuple(prompt)], []
        while len(found) < 6 and EOS not in found:
            with torch.no_grad():
                found.append(model(torch.tensor([prompt + found])).logits[0, -1].argmax().item())
        assert response == found


def test_the_layout_is_checked_on_long_sequences_too(tmp_path, tmp_path_factory, go, ids, monkeypatch):
    """Were the tree's attention wrong beyond the window only, the first batch, of the shortest, would not tell."""
    folder = saved(tmp_path_factory.getbasetemp(), "mistral")
    attention = models.tree_attention

    def no_window(*args, sliding_window=None, **kwargs):
        return attention(*args, **kwargs)

    monkeypatch.setattr(models, "tree_attention", no_window)
    prompts = [[BOS, 20], [BOS, 30, 31, 32, 33, 34, 35, 36, 37, 38]]
    data = write_rows(tmp_path / "p.jsonl", [{"prompt": " ".join(f"w{i}" for i in p[1:])} for p in prompts])
    run = go(model=str(folder), data=str(data), batch_size=1, max_new_tokens=2)
    for row, logps in zip(
        run.rows, plain_logps(load(folder), [example(p, ids[tuple(p)]) for p in prompts]), strict=True
    ):
        assert row["logps"] == pytest.approx(logps, abs=1e-3)


# ------------------------------------------------------------------------------------------------------- stop and go on


def stopped(monkeypatch, a: sample.Args, batches: int) -> bytes:
    """What is on disk of a run that is stopped once `batches` batches are."""

    def write(path, rows, mode, write=sample.write):
        if mode == "a" and len(read(path)) >= batches * a.batch_size:
            raise KeyboardInterrupt
        write(path, rows, mode)

    with monkeypatch.context() as patch:
        patch.setattr(sample, "write", write)
        with pytest.raises(KeyboardInterrupt):
            sample.main(a)
    return Path(a.out).read_bytes()


def continued(a: sample.Args) -> bytes:
    sample.main(dataclasses.replace(a, resume=True))
    return Path(a.out).read_bytes()


@pytest.mark.parametrize("batches", range(BATCHES))
def test_stopped_and_continued_is_the_same_file(batches, world, whole, tmp_path, monkeypatch, ids):
    a = arguments(world, tmp_path / "samples.jsonl")
    left = stopped(monkeypatch, a, batches).splitlines()
    assert len(left) == 4 * batches and {*left} < {*whole.splitlines()}
    ids.clear()
    assert continued(a) == whole
    assert len(ids) == len(PROMPTS) - 4 * batches  # none was sampled again
    assert sorted(path.name for path in tmp_path.iterdir()) == ["samples.args.json", "samples.jsonl"]


def test_stopped_twice(world, whole, tmp_path, monkeypatch):
    a = arguments(world, tmp_path / "samples.jsonl")
    stopped(monkeypatch, a, 1)
    stopped(monkeypatch, dataclasses.replace(a, resume=True), 2)
    assert continued(a) == whole


def test_a_line_that_is_torn_counts_as_not_written(world, whole, tmp_path, monkeypatch):
    """However much of the last batch reached the disk, the prompts that are left get the responses that they would
    have had: at most that batch is sampled again."""
    a = arguments(world, tmp_path / "samples.jsonl")
    lines = stopped(monkeypatch, a, 2).splitlines(keepends=True)
    before = b"".join(lines[:4])
    for torn in (lines[4][:20], lines[4][:-1], lines[4], b"".join(lines[4:6]), b"".join(lines[4:7]) + lines[7][:-30]):
        (tmp_path / "samples.jsonl").write_bytes(before + torn)
        assert continued(a) == whole, torn[-40:]


def test_stopped_before_its_flags_are_written_it_can_be_given_again(world, whole, tmp_path, monkeypatch):
    """Either as it is or with --resume."""
    a = arguments(world, tmp_path / "samples.jsonl")

    def stop(path, *args, write_text=Path.write_text):
        if path.name == "samples.args.json":
            raise KeyboardInterrupt
        return write_text(path, *args)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_text", stop)
        with pytest.raises(KeyboardInterrupt):
            sample.main(a)
    try:
        assert continued(a) == whole
    except BadInput:
        sample.main(a)
        assert Path(a.out).read_bytes() == whole


def killed(flags: list[str], batches: int, printed: Path) -> None:
    """In another process: sample.py, which kills itself in the middle of writing down a batch."""
    for stream in (1, 2):
        os.dup2(os.open(printed, os.O_CREAT | os.O_WRONLY | os.O_APPEND), stream)
    write, written = sample.write, []

    def half(path, rows, mode):
        written.extend([1] * (mode == "a"))
        if len(written) <= batches:
            return write(path, rows, mode)
        with open(path, "ab") as f:
            f.write(b'{"prompt": "the pl')
            f.flush()
            os.kill(os.getpid(), signal.SIGKILL)

    sample.write = half
    sys.argv = ["sample.py", *flags]
    runs.cli(sample.main, sample.Args)


@pytest.mark.slow
def test_killed_and_continued_is_the_same_file(world, whole, tmp_path, server):  # noqa: F811
    a = arguments(world, tmp_path / "samples.jsonl")
    process = server.Process(target=killed, args=(flags_of(a), 2, tmp_path / "printed"))
    process.start()
    wait_for(lambda: not process.is_alive())
    process.join()
    assert process.exitcode == -signal.SIGKILL, (tmp_path / "printed").read_text()
    left = (tmp_path / "samples.jsonl").read_bytes()
    assert len(left.splitlines()) == 9 and not left.endswith(b"\n")
    assert continued(a) == whole


def test_a_finished_file_stays(world, whole, tmp_path, monkeypatch, capfd, ids):
    a = arguments(world, tmp_path / "samples.jsonl")
    (tmp_path / "samples.jsonl").write_bytes(whole)
    refused(monkeypatch, capfd, a, "samples.jsonl is there already", "--resume", "another --out")
    assert [path.name for path in tmp_path.iterdir()] == ["samples.jsonl"] and continued_refused(a)
    (tmp_path / "samples.jsonl").unlink()
    sample.main(a)
    ids.clear()
    assert continued(a) == whole and not ids


def continued_refused(a: sample.Args) -> bool:
    """A file without the flags that it was made with cannot be continued."""
    with pytest.raises(BadInput, match="holds no samples to continue"):
        continued(a)
    return True


def test_resume_refuses_other_flags(world, tmp_path, monkeypatch, capfd, whole):
    a = arguments(world, tmp_path / "samples.jsonl")
    refused(monkeypatch, capfd, dataclasses.replace(a, resume=True), "holds no samples to continue")
    left = stopped(monkeypatch, a, 1)
    changed = dataclasses.replace(a, resume=True, seed=1, temperature=0.5, k=2, batch_size=3)
    changes = ("--seed 0 -> 1", "--temperature 1.0 -> 0.5", "--k 3 -> 2", "--batch-size 4 -> 3")
    refused(monkeypatch, capfd, changed, "was sampled with other flags", *changes)
    assert Path(a.out).read_bytes() == left
    assert continued(dataclasses.replace(a, micro_batch_tokens=4095)) == whole


def test_resume_refuses_other_prompts(world, tmp_path, monkeypatch, capfd):
    data = shutil.copy(world / "prompts.jsonl", tmp_path / "prompts.jsonl")
    a = arguments(world, tmp_path / "samples.jsonl", data=str(data))
    left = stopped(monkeypatch, a, 1)
    write_rows(tmp_path / "prompts.jsonl", [{"prompt": "it was"}])
    refused(monkeypatch, capfd, dataclasses.replace(a, resume=True), "--data", "it has changed")
    assert Path(a.out).read_bytes() == left


# ------------------------------------------------------------------------------------------------------- bad input


def test_a_full_disk_is_one_line_and_leaves_whole_batches(world, whole, tmp_path, monkeypatch, capfd):
    a, calls, sync = arguments(world, tmp_path / "samples.jsonl"), [], os.fsync

    def full(number):
        calls.append(number)
        if len(calls) == 3:  # the empty file, the first batch, the second
            raise OSError(28, "No space left on device")
        sync(number)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        refused(patch, capfd, a, "No space left on device", code=1)
    assert len((tmp_path / "samples.jsonl").read_bytes().splitlines()) == 4
    assert continued(a) == whole


@pytest.mark.parametrize("size", [50, 3000, 30_000])
def test_what_cannot_be_written_whole_is_not_written(size, tmp_path):
    """A real limit of the operating system, met in the middle of the rows."""
    path = write_rows(tmp_path / "samples.jsonl", [{"prompt": "before"}])
    before, (soft, hard) = path.read_bytes(), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) + size // 2, hard))
    try:
        with pytest.raises(OSError):
            sample.write(path, [{"prompt": "x" * size}], "a")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert path.read_bytes() == before


def test_an_out_that_cannot_be_written(world, tmp_path, monkeypatch, capfd):
    (tmp_path / "file").write_text("")
    refused(monkeypatch, capfd, arguments(world, tmp_path / "file" / "samples.jsonl"), "--out", "cannot write there")
    if os.geteuid():  # root may write anywhere
        (tmp_path / "closed").mkdir(mode=0o500)
        refused(monkeypatch, capfd, arguments(world, tmp_path / "closed" / "s.jsonl"), "--out", "Permission denied")


@pytest.mark.parametrize(
    "changes",
    [{"k": 0}, {"temperature": 0.0}, {"max_new_tokens": 0}, {"batch_size": 0}, {"max_prompts": 0}, {"device": "moon"}],
    ids=str,
)
def test_impossible_flags(changes, world, tmp_path, monkeypatch, capfd):
    [name] = changes
    refused(monkeypatch, capfd, arguments(world, tmp_path / "s.jsonl", **changes), f"--{name.replace('_', '-')}")
    assert not [*tmp_path.iterdir()]


def test_a_reference_with_another_tokenizer(world, tmp_path, tmp_path_factory, monkeypatch, capfd):
    ref = saved(tmp_path_factory.getbasetemp(), "llama")
    refused(monkeypatch, capfd, arguments(world, tmp_path / "s.jsonl", ref=str(ref)), "--ref", "tokenizer")
    assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize("what", ["model", "ref", "layout"])
def test_the_command_can_be_given_again_once_the_model_is_mended(what, world, tmp_path, tmp_path_factory, go):
    """Whatever a model is refused for, no file is begun that the same command would then refuse."""
    changes = {"layout": "tree", "model": str(saved(tmp_path_factory.getbasetemp(), "gemma2"))}
    if what != "layout":
        shutil.copytree(world / "model", tmp_path / "model")
        (tmp_path / "model" / "model.safetensors").unlink()
        changes = {what: str(tmp_path / "model")}
    else:
        changes["data"] = str(write_rows(tmp_path / "p.jsonl", [{"prompt": "w7 w9"}]))
    with pytest.raises(BadInput):
        go(**changes)
    assert not (tmp_path / "samples.jsonl").exists()


def test_dry_run_writes_nothing(world, tmp_path, monkeypatch, capfd):
    a = arguments(world, tmp_path / "samples.jsonl", dry_run=True)
    before = sorted(world.rglob("*"))
    assert cli(monkeypatch, a) == 0
    out = capfd.readouterr().out
    assert "examples   11 of 11 rows" in out and "11 distinct prompts" in out
    assert out.count("prompts.jsonl:") == 3
    assert ".'<bos>' .'the' .'plot'" in out
    assert not [*tmp_path.iterdir()] and sorted(world.rglob("*")) == before


def test_bad_rows_are_one_line_or_counted(world, tmp_path, monkeypatch, capfd, go):
    data = write_rows(tmp_path / "p.jsonl", [{"prompt": "the plot"}, {"prompt": ""}, {"prompt": 3}])
    refused(
        monkeypatch, capfd, arguments(world, tmp_path / "s.jsonl", data=str(data)), "p.jsonl:2", "'prompt' is empty"
    )
    assert not (tmp_path / "s.jsonl").exists()
    assert [row["prompt"] for row in go(data=str(data), skip_bad_rows=True).rows] == ["the plot"]


def test_the_embedded_prompts(world, tmp_path, monkeypatch):
    """--data reviews draws its 4,000 unless told otherwise, and gold is known."""
    monkeypatch.setattr(reviews, "ROWS", 30)
    results = sample.main(arguments(world, tmp_path / "s.jsonl", data="reviews", k=1, max_prompts=6, batch_size=None))
    rows = read(tmp_path / "s.jsonl")
    texts = {row["prompt"] for _, row in reviews.rows("prompts", 30)}
    assert len(rows) == 6 and {row["prompt"] for row in rows} < texts and "gold" in results
    flags = json.loads((tmp_path / "s.args.json").read_text())["flags"]
    assert flags["batch_size"] == sample.DEFAULTS["reviews"]["batch_size"] and flags["max_prompts"] == 6


def test_samples_are_rows_for_the_other_scripts(go):
    """The file as it is read by read_rows: prompts again, and responses to be scored."""
    run = go()
    rows, _ = read_rows(str(run.out))
    assert [e.prompt_text for e in build(rows, reviews.tokenizer(), "prompts", 512, 1024)[0]] == PROMPTS
    scored, report = build(rows, reviews.tokenizer(), "responses", 512, 1024)
    assert report.eos == sum(sum(row["ended"]) for row in run.rows) and len(scored) == 11


def test_preferences_as_prompts(world, tmp_path, go):
    """The pairs that train_dpo.py takes are prompts to sample from, each once."""
    rows = pairs(6)
    data = write_rows(tmp_path / "pairs.jsonl", rows)
    assert [row["prompt"] for row in go(data=str(data)).rows] == [*dict.fromkeys(row["prompt"] for row in rows)]


def test_other_fields_of_messages_are_written_as_the_template_shows_them(tmp_path, monkeypatch):
    """A date, which JSON does not have, and half of a surrogate pair: both would end the run after its sampling."""
    template = "{% for m in messages %}{{ m['content'] ~ ' ' ~ m['when'] ~ ' ' ~ m['mark'] | length }}{% endfor %}"
    models.save(tiny("llama"), words(template=template + "{{ ' w5' }}"), tmp_path / "model")
    when, half = datetime.datetime(2026, 1, 2, 3, 4), json.loads('"\\ud83d"')
    rows = [{"prompt": [{"role": "user", "content": f"w{i}", "when": when, "mark": half}]} for i in (7, 8, 9)]
    monkeypatch.setattr(examples, "read_rows", lambda *_: ([(f"p:{i}", row) for i, row in enumerate(rows, 1)], []))
    out = tmp_path / "samples.jsonl"
    flags = {"model": f"{tmp_path}/model", "data": "p", "k": 2, "max_new_tokens": 3, "batch_size": 2}
    a = sample.Args(out=str(out), device="cpu", **flags)
    sample.main(a)
    kept = [[row["prompt"][0] | {"when": "2026-01-02 03:04:00"}] for row in rows]
    assert [row["prompt"] for row in read(out)] == kept
    whole = out.read_bytes()
    out.write_bytes(b"".join(whole.splitlines(keepends=True)[:2]))
    sample.main(dataclasses.replace(a, resume=True))
    assert out.read_bytes() == whole
