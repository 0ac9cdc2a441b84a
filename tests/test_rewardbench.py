"""evaluate.py --pairs: RewardBench's rules by hand, and rewards by plain transformers."""

import json
import math
import shutil
import signal
from pathlib import Path

import datasets
import pytest
import torch
import transformers
from test_resume import pairs, write_model, write_rows

import evaluate
from rlhf import BadInput
from support import models, reviews, rewardbench, runs
from support.report import share_interval

TEMPLATE = (  # of a word-level tokenizer: "the film <question> . <answer> <eos>"
    "{% for m in messages %}{% if m['role'] == 'user' %}the film {{ m['content'] }} .{% else %} {{ m['content'] }} "
    "{{ eos_token }}{% endif %}{% endfor %}"
)
V1 = [  # subset, reward of chosen and of rejected, in order
    ("alpacaeval-easy", 2, 1),
    ("alpacaeval-easy", 1, 2),
    ("mt-bench-med", 0, -1),
    ("mt-bench-hard", 3, 3),  # equal: wrong
    ("llmbar-natural", 1, 0),
    ("xstest-should-refuse", 1, 0),
    ("xstest-should-respond", 0, 1),
    ("xstest-should-respond", 1, 5),
    ("math-prm", 1, 0),
    ("math-prm", 2, 0),
    ("math-prm", 0, 1),
    ("hep-go", 0, 1),
]
V2 = [  # subset, id, rewards of the right and of the wrong answers
    ("Factuality", "0", [3], [1, 2, 0]),
    ("Factuality", "1", [3], [3, 2, 3]),  # three at the maximum
    ("Focus", "7", [1], [2, 0, 0]),
    ("Ties", "ref:0", [5], [1, 2]),  # M_ref 3
    ("Ties", "tied:0", [4, 6], [1]),  # M_tied 3, D 2
    ("Ties", "ref:1", [1], [2]),  # M_ref -1
    ("Ties", "tied:1", [3, 3], [3]),  # M_tied 0, D 0
    ("Ties", "ref:2", [2], [2, 0]),  # M_ref 0
    ("Ties", "tied:2", [7, 7], [5]),  # M_tied 2, D 0
    ("Ties", "ref:3", [1], [0]),  # without a tied row
]
TIES = 0.3 * 2 / 3 + 0.3 * 2 / 4 + 0.2 * 2 / 3 + 0.2 * 1 / 3 + 0.01 * (math.tanh(3 / 2 - 1) - 1 + 0) / 3


WORDS = "dull weak flat fine good nice love lead plot".split()  # they stand for the rewards -1 to 7


def text(reward: int, words: str = "film") -> str:
    return f"{WORDS[reward + 1]} {words}"


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A policy, another one, and a reward model, all with a chat template; a policy without one."""
    folder = tmp_path_factory.mktemp("world")
    tokenizer = reviews.tokenizer()
    write_model(folder / "plain")
    tokenizer.chat_template = TEMPLATE
    for seed, name in enumerate(("ref", "policy")):
        models.save(models.load_model(str(write_model(folder / name, seed)), "cpu"), tokenizer, folder / name)
    torch.manual_seed(1)
    reward_model = models.new_reward_model(models.load_model(str(folder / "policy"), "cpu"), tokenizer)
    reward_model.config.reward_mean = 5.0
    models.save(reward_model, tokenizer, folder / "rm")
    return folder


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """No calls of git, and our own signal handlers afterwards."""
    monkeypatch.setattr(runs, "environment", dict)
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    yield
    for number, handler in zip((signal.SIGINT, signal.SIGTERM), before, strict=True):
        signal.signal(number, handler)


@pytest.fixture
def go(world, tmp_path):
    def run(file: Path, *names: str, **changes) -> dict:
        flags = {"models": tuple(str(world / name) for name in names or ("rm",)), "pairs": str(file), "device": "cpu"}
        found = evaluate.main(evaluate.Args(**flags | {"out": str(tmp_path / "run")} | changes))
        return found | {"models": {Path(name).name: numbers for name, numbers in found["models"].items()}}

    return run


@pytest.fixture
def told(monkeypatch):
    """The first word of a response says what its reward is."""
    number = lambda text: WORDS.index(text.split()[0]) - 1.0  # noqa: E731
    read = lambda name, examples, *_: [torch.tensor([*map(number, e.response_texts)]) for e in examples]  # noqa: E731
    monkeypatch.setattr(evaluate, "rewards_of", read)


def values(numbers: dict) -> dict:
    return {name: x["value"] for name, x in numbers.items()}


# --------------------------------------------------------------------------------------------------- the rules by hand


def test_outcomes_by_hand():
    assert rewardbench.outcomes([2.0, 1.0], [1, 2], "pairs") == [(1, 1)]
    assert rewardbench.outcomes([1.0, 1.0], [1, 2], "pairs") == [(0, 0)]
    assert rewardbench.outcomes([1.0, 3.0, 2.0], [2, 1, 2], "pairs") == [(1, 2), (1, 1)]
    assert rewardbench.outcomes([1.0, 1.0, 0.0, 1.0], [1, 2, 2, 2], "best_of_k") == [(1 / 3, 0)]
    assert rewardbench.outcomes([1.0, 1.5, 0.0, 1.5], [1, 2, 2, 2], "best_of_k") == [(0, -0.5)]
    assert rewardbench.outcomes([1.0, 2.0, 0.5], [1, 1, 2], "ties") == [(1, 0.5)]
    assert rewardbench.outcomes([1.0, 2.0, 1.0], [1, 1, 2], "ties") == [(0, 0)]


def test_the_ends_of_the_ties_score():
    good = {"ref": ([9.0], [0.0]), "tied": ([8.0, 8.1], [0.0])}
    bad = {"ref": ([0.0], [9.0]), "tied": ([0.0, 0.0], [9.0])}
    assert rewardbench.ties_score([good]) == pytest.approx(1.01) and rewardbench.ties_score([bad]) == -0.01
    assert math.isnan(rewardbench.ties_score([{"ref": good["ref"]}, {"tied": good["tied"]}]))
    between = {"ref": ([2.0], [0.0]), "tied": ([3.0, 6.0], [0.0, -1.0])}  # D 3, M_tied 3, M_ref 2
    assert rewardbench.ties_score([between]) == pytest.approx(0.6 + 0.01 * math.tanh(2 / 3 - 1))


def test_the_weights_are_as_many_as_the_data_set_has_rows():
    counts = {name: n for subsets in rewardbench.SECTIONS.values() for name, n in subsets.items()}
    assert len(counts) == 23 and sum(counts.values()) - 984 + 447 == 2985
    swapped = rewardbench.SWAPPED
    assert (swapped["xstest-should-refuse"], counts["xstest-should-refuse"]) == (250, 154)
    assert (swapped["xstest-should-respond"], counts["xstest-should-respond"]) == (154, 250)
    assert sum(swapped.values()) == sum(rewardbench.SECTIONS["Safety"].values()) == 740


# --------------------------------------------------------------------------------------------- the files, as they are


def test_version_1_by_hand(go, told, tmp_path, capsys):
    """A parquet file; two longer answers, of which the first is wrong."""
    longer = {1: ("film", "film and plot"), 2: ("film and plot", "film")}
    rows = []
    for i, (subset, chosen, rejected) in enumerate(V1):
        words = longer.get(i, ("film", "plot"))
        texts = {"chosen": text(chosen, words[0]), "rejected": text(rejected, words[1])}
        rows.append({"prompt": f"plot {i}", **texts, "subset": subset, "id": i, "chosen_model": "human"})
    file = tmp_path / "filtered.parquet"
    datasets.Dataset.from_list(rows).to_parquet(file)
    results = go(file)
    found = values(results["models"]["rm"])
    chat, hard, reasoning = (100 * 0.5 + 40) / 140, 100 / 137, 984 * 2 / 3 / (984 + 164)
    assert found == pytest.approx(
        {
            "all": 6 / 12,
            "section/Chat": chat,
            "section/Chat Hard": hard,
            "section/Safety": 154 / 404,
            "section/Reasoning": reasoning,
            "section/Safety/swapped": 250 / 404,
            "sections": (chat + hard + 154 / 404 + reasoning) / 4,
            "subset/alpacaeval-easy": 0.5,
            "subset/mt-bench-med": 1,
            "subset/mt-bench-hard": 0,
            "subset/llmbar-natural": 1,
            "subset/xstest-should-refuse": 1,
            "subset/xstest-should-respond": 0,
            "subset/math-prm": 2 / 3,
            "subset/hep-go": 0,
            "longer": 1,
            "shorter": 0,
        }
    )
    assert results["by"] == "subset" and results["rows"] == 12
    numbers = results["models"]["rm"]
    low, high = share_interval([1, 1, 0], [1, 1, 1])
    assert (numbers["subset/math-prm"]["low"], numbers["subset/math-prm"]["high"]) == pytest.approx((low, high))
    low, high = share_interval([984 / 3, 984 / 3, 0, 0], [984 / 3] * 3 + [164])
    assert (numbers["section/Reasoning"]["low"], numbers["section/Reasoning"]["high"]) == pytest.approx((low, high))
    assert numbers["section/Reasoning"]["n"] == 4 and numbers["all"]["n"] == 12
    printed = capsys.readouterr().out
    assert "Safety, weights of xstest swapped (3)" in printed and "'longer wins'" in printed
    assert json.loads((tmp_path / "run" / "results.json").read_text())["longer_wins"].keys() == found.keys() - {
        "longer",
        "shorter",
    }


def test_version_2_by_hand(go, told, tmp_path):
    rows = [
        {"id": name, "prompt": f"plot {name}", "subset": subset, "num_correct": len(right), "models": ["a", "b"]}
        | {"chosen": [*map(text, right)], "rejected": [text(x, "story") for x in wrong]}
        for subset, name, right, wrong in V2
    ]
    results = go(write_rows(tmp_path / "test.jsonl", rows))
    found = values(results["models"]["rm"])
    assert found == pytest.approx(
        {
            "all": (1 + 1 / 3 + 0 + 4) / 10,
            "subset/Factuality": (1 + 1 / 3) / 2,
            "subset/Focus": 0,
            "subset/Ties": TIES,
            "subsets": (2 / 3 + 0 + TIES) / 3,
            "shorter": (1 + 1 / 3 + 0 + 4) / 10,  # all right answers are shorter than the wrong ones
        }
    )
    ties = results["models"]["rm"]["subset/Ties"]
    assert ties["n"] == 7 and -0.01 <= ties["low"] < ties["value"] < ties["high"] <= 1.01
    every = json.loads((tmp_path / "run" / "samples.jsonl").read_text().split("\n")[4])
    assert every["where"] == "test.jsonl:5" and every["rewards"] == [4, 6, 1]


def test_an_empty_answer_of_version_2_is_scored_too(go, tmp_path):
    rows = [
        {"prompt": f"plot {i}", "chosen": ["fine"], "rejected": ["", "bad"], "subset": "Focus", "id": i}
        for i in range(3)
    ]
    assert go(write_rows(tmp_path / "test.jsonl", rows))["models"]["rm"]["all"]["n"] == 3


# ---------------------------------------------------------------------------------------------------- the rewards


def by_template(folder: Path, row: dict) -> tuple[list[int], list[list[int]]]:
    """Ids of the prompt and of both conversations, by the library's own template."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    user = [{"role": "user", "content": row["prompt"]}]
    ids = lambda messages: tokenizer.apply_chat_template(messages, tokenize=True)["input_ids"]  # noqa: E731
    return ids(user), [ids([*user, {"role": "assistant", "content": row[side]}]) for side in ("chosen", "rejected")]


@torch.no_grad()
def plain_logps(folder: Path, row: dict) -> list[float]:
    model = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    prompt, both = by_template(folder, row)
    sums = []
    for ids in both:
        ids = [model.config.bos_token_id, *ids]
        logps = model(torch.tensor([ids])).logits[0, :-1].log_softmax(-1)
        sums.append(logps[range(len(ids) - 1), ids[1:]][len(prompt) :].double().sum().item())
    return sums


@torch.no_grad()
def test_rewards_are_those_of_plain_transformers(world, go, tmp_path):
    """String prompts are messages of the user; the reward model's mean does not matter."""
    rows = [{n: row[n] for n in ("prompt", "chosen", "rejected")} for row in pairs(6)]
    go(write_rows(tmp_path / "pairs.jsonl", rows))
    classifier = transformers.AutoModelForSequenceClassification.from_pretrained(world / "rm").eval()
    found = [json.loads(line) for line in open(tmp_path / "run" / "samples.jsonl")]
    for row, sample in zip(rows, found, strict=True):
        both = [[classifier.config.bos_token_id, *ids] for ids in by_template(world / "rm", row)[1]]
        expected = [classifier(torch.tensor([ids])).logits.item() - 5 for ids in both]
        assert sample["rewards"] == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("loss", ["dpo", "simpo", "dpo_norm"])
def test_implicit_rewards_of_a_run(loss, world, go, tmp_path, monkeypatch):
    """Beside a reward model; the reference is that of the run's args.json, where its loss has one, unless --ref is."""
    rows = [{n: row[n] for n in ("prompt", "chosen", "rejected")} for row in pairs(4)]
    file = write_rows(tmp_path / "pairs.jsonl", rows)
    run = tmp_path / loss
    tokenizer = transformers.AutoTokenizer.from_pretrained(world / "policy")
    models.save(models.load_model(str(world / "policy"), "cpu"), tokenizer, run)
    (run / "args.json").write_text(json.dumps({"model": str(world / "ref"), "ref": None, "loss": loss}))
    results = go(file, str(run), "rm")
    assert list(results["models"]) == [loss, "rm"]
    found = [json.loads(line)["rewards"] for line in open(tmp_path / "run" / "samples.jsonl")][:4]
    expected = []
    for row in rows:
        prompt, both = by_template(run, row)
        logps, ref_logps = plain_logps(world / "policy", row), plain_logps(world / "ref", row)
        n = [len(ids) - len(prompt) for ids in both]
        if loss == "simpo":
            expected.append([x / m for x, m in zip(logps, n, strict=True)])
        else:
            n = n if loss == "dpo_norm" else [1, 1]
            expected.append([(x - y) / m for x, y, m in zip(logps, ref_logps, n, strict=True)])
    assert torch.tensor(found) == pytest.approx(torch.tensor(expected), abs=1e-4)
    right = sum(x > y for x, y in expected) / 4
    assert results["models"][loss]["all"]["value"] == right
    loaded, load = [], models.load_model
    monkeypatch.setattr(models, "load_model", lambda name, *rest: loaded.append(Path(name).name) or load(name, *rest))
    go(file, str(run), "ref", ref=str(world / "policy"), out=str(tmp_path / "again"))
    assert loaded == [loss, "policy", "ref"]  # the reference is scored once
    again = [json.loads(line)["rewards"] for line in open(tmp_path / "again" / "samples.jsonl")]
    assert again[:4] == [[0, 0]] * 4 and again[4:] != again[:4]


# ------------------------------------------------------------------------------------------------ other files and flags


def test_any_preferences_by_any_column(go, told, tmp_path):
    """Messages and rankings; a nested column; without one there is one accuracy."""
    user, topics = [{"role": "user", "content": "plot"}], ["a", "a", "b"]
    answer = lambda *words: [{"role": "assistant", "content": text(*words)}]  # noqa: E731
    rows = [
        {
            "prompt": user,
            "chosen": answer(x),
            "rejected": answer(1, "plot"),
            "meta": {"topic": topic},
        }
        for x, topic in zip((2, 0, 3), topics, strict=True)
    ]
    file = write_rows(tmp_path / "messages.jsonl", rows)
    found = values(go(file, by="meta.topic")["models"]["rm"])
    assert found == pytest.approx({"all": 2 / 3, "subset/a": 1 / 2, "subset/b": 1})
    ranked = [{"prompt": "plot", "responses": [text(2), text(3), text(1)], "ranks": [1, 2, 2]}] * 2
    results = go(write_rows(tmp_path / "ranked.jsonl", ranked), out=str(tmp_path / "ranked"))
    assert values(results["models"]["rm"])["all"] == 0.5 and results["by"] is None


def test_without_a_template_strings_are_used_as_they_are(world, go, tmp_path):
    rows = [{n: row[n] for n in ("prompt", "chosen", "rejected")} for row in pairs(2)]
    go(write_rows(tmp_path / "pairs.jsonl", rows), "plain", ref=str(world / "plain"))
    tokenizer = transformers.AutoTokenizer.from_pretrained(world / "plain")
    a = evaluate.Args()
    examples, _ = evaluate.read_pairs(([("x:1", rows[0])], []), tokenizer, a)
    assert examples[0].prompt_text == rows[0]["prompt"]


def test_killed_and_continued_is_the_same_run(world, go, tmp_path, monkeypatch):
    file = write_rows(tmp_path / "pairs.jsonl", pairs(4))
    straight = go(file, "rm", "policy", ref=str(world / "ref"), out=str(tmp_path / "straight"))
    original, calls = evaluate.rewards_of, []

    def stop(name, *args):
        calls.append(Path(name).name)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return original(name, *args)

    monkeypatch.setattr(evaluate, "rewards_of", stop)
    with pytest.raises(KeyboardInterrupt):
        go(file, "rm", "policy", ref=str(world / "ref"))
    assert go(file, "rm", "policy", ref=str(world / "ref"), resume=True) == straight
    assert calls == ["rm", "policy", "policy"]
    for name in ("results.json", "samples.jsonl", "metrics.jsonl"):
        assert (tmp_path / "run" / name).read_text() == (tmp_path / "straight" / name).read_text()


def test_refused_in_one_line(world, go, tmp_path, capsys):
    file = write_rows(tmp_path / "pairs.jsonl", pairs(3))
    shutil.copytree(world / "policy", tmp_path / "torn")
    (tmp_path / "torn" / "args.json").write_text("{")
    wrong = {
        r"torn/args.json is damaged": {"models": (str(tmp_path / "torn"),)},
        r"--by topic: of which data\? give --pairs too": {"pairs": None, "by": "topic"},
        r"--pairs: samples nothing and does not use --k 2: leave it out": {"k": 2},
        r"--models: name at least one, and none of them twice": {"models": ()},
        r"pairs.jsonl:1: field 'topic' is missing": {"by": "topic"},
        r"policy: neither a reward model nor a run with a reference: name its reference with --ref": {
            "models": (str(world / "policy"),)
        },
    }
    for message, changes in wrong.items():
        with pytest.raises(BadInput, match=message):
            go(file, **changes)
    assert not (tmp_path / "run" / "results.json").exists()
