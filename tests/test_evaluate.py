"""evaluate.py: every number against plain transformers, a closed form or a count by hand."""

import functools
import gc
import json
import math
import signal
import statistics
import weakref
from collections import Counter
from pathlib import Path

import pytest
import torch
import transformers
import tyro
from test_resume import pairs, write_model, write_rows
from tiny import example

import evaluate
import train_dpo
import train_sft
from rlhf import BadInput
from support import models, report, reviews, runs, tokens
from support.examples import build
from support.report import student
from support.rows import prompt_of, read_rows, texts_of

ZEROS = pytest.approx(0, abs=1e-9)


def talkative(folder: Path) -> Path:
    """Turns the embedding of EOS, which is also its output row, towards the hidden states: then answers end."""
    model = load(folder)
    with torch.no_grad():
        hidden = model.base_model(torch.arange(4, 124).reshape(12, 10)).last_hidden_state.mean((0, 1))
        model.get_input_embeddings().weight[2] = 3 * hidden / hidden.square().sum()
    models.save(model, reviews.tokenizer(), folder)
    return folder


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Three small models of the reviews, one with another tokenizer, preferences, a ranking, and prompts alone."""
    folder = tmp_path_factory.mktemp("world")
    for seed, name in enumerate(("first", "second", "third", "copy")):
        talkative(write_model(folder / name, seed % 3))
    tokenizer = reviews.tokenizer()
    tokenizer.add_tokens(["popcorn"])
    strange = load(folder / "first")
    strange.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    models.save(strange, tokenizer, folder / "strange")
    rows = pairs(10)
    ranking = {"prompt": rows[0]["prompt"], "responses": ["good .", "bad and weak .", "fine ."], "ranks": [1, 3, 1]}
    write_rows(folder / "pairs.jsonl", rows + [rows[1] | {"chosen": "superb .", "rejected": "a dull film ."}])
    write_rows(folder / "rankings.jsonl", [ranking, ranking | {"prompt": rows[2]["prompt"], "ranks": [2, 3, 1]}])
    write_rows(folder / "prompts.jsonl", [{"prompt": row["prompt"]} for row in rows])
    return folder


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """No calls of git, few bootstrap draws, and our own signal handlers afterwards."""
    monkeypatch.setattr(runs, "environment", dict)
    monkeypatch.setattr(evaluate, "bootstrap", functools.partial(report.bootstrap, draws=60))
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    yield
    for number, handler in zip((signal.SIGINT, signal.SIGTERM), before, strict=True):
        signal.signal(number, handler)


@pytest.fixture
def answered(monkeypatch):
    """The answers of each model from here on, an example each."""
    seen, original = [], evaluate.one_by_one

    def spy(*args, **kwargs):
        seen.append(original(*args, **kwargs))
        return seen[-1]

    monkeypatch.setattr(evaluate, "one_by_one", spy)
    return seen


@pytest.fixture
def go(world, tmp_path):
    def arguments(*names: str, **changes) -> evaluate.Args:
        flags = {"models": tuple(str(world / name) for name in names or ("first", "second"))}
        flags |= {"data": str(world / "pairs.jsonl"), "out": str(tmp_path / "run"), "device": "cpu"}
        return evaluate.Args(**flags | {"max_new_tokens": 6} | changes)

    def run(*names: str, **changes) -> dict:
        """Evaluates with small settings; results["models"] goes by the names in the world."""
        found = evaluate.main(arguments(*names, **changes))
        return found | {"models": {Path(name).name: numbers for name, numbers in found["models"].items()}}

    run.arguments = arguments
    return run


@pytest.fixture
def module(tmp_path, monkeypatch):
    """Writes functions into a module of the working directory; returns "module:function"."""
    count = Counter()

    def write(source: str, function: str) -> str:
        count["n"] += 1
        name = f"functions_{tmp_path.name}_{count['n']}".replace("-", "_")
        Path(f"{name}.py").write_text(source)
        return f"{name}:{function}"

    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    return write


def load(folder):
    return transformers.AutoModelForCausalLM.from_pretrained(folder).eval()


def examples(path: Path):
    rows = [(f"{path.name}:{i}", json.loads(line)) for i, line in enumerate(open(path), 1)]
    return build(rows, reviews.tokenizer(), "preference", 512, 1024)[0]


@torch.no_grad()
def log_softmax(model, prompt: list[int], response: list[int], temperature: float = 1.0):
    """Log-probs of the whole vocabulary at each token of the response, by the library's own logits."""
    logits = model(torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1].double()
    return (logits / temperature).log_softmax(-1)


def total(model, prompt: list[int], response: list[int]) -> float:
    return log_softmax(model, prompt, response)[range(len(response)), response].sum().item()


# ----------------------------------------------------------------------------------------------------------- numbers


def test_every_number_against_plain_transformers(go, world, answered):
    """Two answers to each of 10 prompts at temperature 0.8; 11 preferences, two of which share a prompt."""
    results = go(k=2, temperature=0.8, micro_batch_tokens=100)
    first, second = load(world / "first"), load(world / "second")
    numbers, answers = results["models"]["second"], answered[1]
    ids = [(e.prompt, e.responses[0]) for e in answers]
    assert len(ids) == 20 and results["prompts"] == 10 and results["answers"] == 20 and results["preferences"] == 11

    def by_prompt(values):
        return [(x + y) / 2 for x, y in zip(values[::2], values[1::2], strict=True)]

    kl = []
    for prompt, response in ids:
        p, q = (log_softmax(model, prompt, response, 0.8) for model in (second, first))
        kl.append((p.exp() * (p - q)).sum().item())
    gold = [reviews.gold_reward(f"{e.prompt_text} {e.response_texts[0]}") for e in answers]
    other = [reviews.gold_reward(f"{e.prompt_text} {e.response_texts[0]}") for e in answered[0]]
    expected = {
        "reward": gold,
        "kl": kl,
        "win": [0.5 if x == y else float(x > y) for x, y in zip(gold, other, strict=True)],
        "length": [len(response) for _, response in ids],
        "ended": [float(response[-1] == 2) for _, response in ids],
        "grammatical": [float(reviews.log_prob(f"{e.prompt_text} {e.response_texts[0]}") > -99) for e in answers],
        "ref_logp": [total(first, *x) / len(x[1]) for x in ids],
    }
    for name, values in expected.items():
        found = numbers[name]
        assert found["value"] == pytest.approx(statistics.fmean(values), abs=1e-5), name
        assert found["se"] == pytest.approx(statistics.stdev(by_prompt(values)) / math.sqrt(10), abs=1e-5), name
        interval = evaluate.bootstrap(by_prompt(values), statistics.fmean)
        if name in ("win", "ended", "grammatical"):
            interval = report.share_interval([2 * x for x in by_prompt(values)], [2] * 10)
        assert (found["low"], found["high"]) == pytest.approx(interval, abs=1e-5), name
    assert min(kl) > 0.5 and 0 < numbers["win"]["value"] < 1 and len(set(expected["length"])) > 1

    flat = [response for _, response in ids]
    words = [token for response in flat for token in response]
    bigrams = [pair for response in flat for pair in zip(response, response[1:], strict=False)]
    assert numbers["distinct_1"] == {"value": len(set(words)) / len(words)}
    assert numbers["distinct_2"] == {"value": len(set(bigrams)) / len(bigrams)}

    assert numbers["self_bleu"]["value"] == evaluate.self_bleu(flat) > 0
    longer = [len(x.responses[0]) - len(y.responses[0]) for x, y in zip(answers, answered[0], strict=True)]
    controlled = evaluate.length_controlled(f64(*expected["win"]), f64(*longer))
    assert numbers["win_at_equal_length"]["value"] == pytest.approx(controlled)
    assert abs(controlled - numbers["win"]["value"]) > 0.001

    ended = [[x.responses[0][-1] == 2 for x in of_model] for of_model in answered]
    same = [(i, j) for i in range(20) for j in range(20) if i // 2 == j // 2 and ended[1][i] == ended[0][j]]
    wins = [0.5 if gold[i] == other[j] else float(gold[i] > other[j]) for i, j in same]
    assert numbers["win_if_ended_alike"]["value"] == pytest.approx(statistics.fmean(wins)) and 0 < len(same) < 40

    assert results["models"]["first"]["kl"]["value"] == 0 and "win" not in results["models"]["first"]
    assert results["models"]["first"]["implicit_accuracy"]["value"] == 0.5


def test_accuracies_of_implicit_and_explicit_reward(go, world):
    results = go()
    first, second, right, gold = load(world / "first"), load(world / "second"), [], []
    for e in examples(world / "pairs.jsonl"):
        moved = [total(second, e.prompt, r) - total(first, e.prompt, r) for r in e.responses]
        right.append(e.probability if moved[0] > moved[1] else 1 - e.probability)
        rewards = [reviews.gold_reward(f"{e.prompt_text} {text}") for text in e.response_texts]
        gold.append(e.probability if rewards[0] > rewards[1] else 1 - e.probability)
    assert results["models"]["second"]["implicit_accuracy"]["value"] == pytest.approx(statistics.fmean(right), abs=1e-9)
    assert results["explicit_accuracy"]["value"] == pytest.approx(statistics.fmean(gold), abs=1e-9)
    assert results["ceiling"] == pytest.approx(statistics.fmean(max(e, 1 - e) for e in right), abs=1e-9)
    low, high = (results["models"]["second"]["implicit_accuracy"][name] for name in ("low", "high"))
    assert low < statistics.fmean(right) < high


def test_rankings_and_a_reward_of_ones_own(go, world, module):
    """The reward is the number of words: it sees each prompt, text and row, and orders 2 of 2 and 1 of 3 pairs."""
    name = module(
        "seen = []\n"
        "def words(prompts, responses, rows):\n"
        "    seen.extend(zip(prompts, responses, rows))\n"
        "    return [-len(x.split()) for x in responses]\n",
        "words",
    )
    rows = [row for _, row in read_rows(str(world / "rankings.jsonl"))[0]]
    ids = reviews.tokenizer()([f"{text} <eos>" for text in rows[1]["responses"]], add_special_tokens=False)["input_ids"]
    rows[1] |= {"token_ids": ids, "tokenizer": tokens.digest(reviews.tokenizer()), "ended": [True, True, False]}
    results = go("first", data=str(write_rows(world / "sampled.jsonl", rows)), reward=name)
    seen = __import__(name.split(":")[0]).seen
    first = [(prompt, text, row["ended"]) for prompt, text, row in seen[:3]]
    assert first == [(pairs(10)[0]["prompt"], x, True) for x in ("good .", "bad and weak .", "fine .")]
    assert [row.get("response_ids") for _, _, row in seen[:6]] == [None] * 3 + ids
    assert [row["ended"] for _, _, row in seen[:6]] == [True] * 5 + [False]
    for _, text, row in seen[6:]:  # the sampled answers, with their ids
        assert row["tokenizer"] == tokens.digest(reviews.tokenizer())
        assert reviews.tokenizer().decode(row["response_ids"], skip_special_tokens=True) == text
        assert row["ended"] == (row["response_ids"][-1] == 2)
    # good 1, bad 3, fine 1: both pairs right. good 2, bad 3, fine 1: fine > good is a tie of the reward
    assert results["explicit_accuracy"]["value"] == pytest.approx((1 + (1 + 1 + 0.5) / 3) / 2)
    assert results["reward"] == name and results["models"]["first"]["reward"]["value"] < 0


def test_a_reward_model(go, world, tmp_path, answered):
    """Scores of transformers' own class on the answers and on the preferences, less its reward_mean."""
    tokenizer = reviews.tokenizer()
    torch.manual_seed(3)
    config = load(world / "first").config
    config.num_labels, config.reward_mean = 1, 0.3
    classifier = transformers.LlamaForSequenceClassification(config).eval()
    models.save(classifier, tokenizer, tmp_path / "rm")
    results = go(reward=str(tmp_path / "rm"))

    @torch.no_grad()
    def score(ids: list[int]) -> float:
        return classifier(torch.tensor([ids])).logits.item() - 0.3

    rewards = [[score(e.prompt + e.responses[0]) for e in x] for x in answered]  # the ids, special tokens among them
    assert len({len(e.responses[0]) for e in answered[1]}) > 1  # some ended, some were cut
    for name, values in zip(("first", "second"), rewards, strict=True):
        found = results["models"][name]["reward"]["value"]
        assert found == pytest.approx(statistics.fmean(values), abs=1e-5)
    wins = statistics.fmean(0.5 if abs(x - y) < 1e-6 else float(y > x) for x, y in zip(*rewards, strict=True))
    assert results["models"]["second"]["win"]["value"] == pytest.approx(wins)
    right = []
    for e in examples(world / "pairs.jsonl"):
        chosen, rejected = (score(tokenizer(f"{e.prompt_text} {text}")["input_ids"] + [2]) for text in e.response_texts)
        right.append(e.probability if chosen > rejected else 1 - e.probability)
    assert results["explicit_accuracy"]["value"] == pytest.approx(statistics.fmean(right))


def test_the_same_held_out_pairs_and_answers_as_train_dpo(go, world, tmp_path):
    """What train_dpo.py says of itself at the end, and what evaluate.py says of its run, on the same share."""
    data = write_rows(tmp_path / "train.jsonl", pairs(60))
    trained = train_dpo.main(
        train_dpo.Args(
            model=str(world / "first"),
            data=str(data),
            out=str(tmp_path / "dpo"),
            ref_cache=str(tmp_path / "cache"),
            eval_fraction=0.25,
            eval_prompts=7,
            max_new_tokens=6,
            lr=3e-3,
            batch_size=8,
            beta=0.1,
            device="cpu",
        )
    )
    results = go("first", tmp_path / "dpo", data=str(data), eval_fraction=0.25, eval_prompts=7)
    for side, name in (("before", "first"), ("after", "dpo")):
        numbers = results["models"][name]
        assert numbers["implicit_accuracy"]["value"] == pytest.approx(trained[f"{side}/eval/rewards/accuracies"])
        assert numbers["reward"]["value"] == pytest.approx(trained[f"{side}/gold"], abs=1e-9)
        for fact in ("length", "ended", "grammatical"):
            assert numbers[fact]["value"] == pytest.approx(trained[f"{side}/{fact}"], abs=1e-9)
    assert results["ceiling"] == pytest.approx(trained["ceiling"])
    assert results["models"]["dpo"]["kl"]["value"] > 0.01


def test_layouts_agree(go, tmp_path):
    both = [go(layout=layout, out=str(tmp_path / layout), k=2)["models"] for layout in ("tree", "padded")]
    for name in both[0]["second"]:
        for x, y in zip(both[0]["second"][name].values(), both[1]["second"][name].values(), strict=True):
            assert x == pytest.approx(y, abs=1e-5), name


def test_reference_other_than_the_first(go, world, answered):
    results = go("second", "third", ref=str(world / "first"), data=str(world / "prompts.jsonl"))
    reference = load(world / "first")
    for i, name in enumerate(("second", "third")):
        model, found = load(world / name), []
        for e in answered[i]:
            p, q = (log_softmax(x, e.prompt, e.responses[0]) for x in (model, reference))
            found.append((p.exp() * (p - q)).sum().item())
        assert results["models"][name]["kl"]["value"] == pytest.approx(statistics.fmean(found), abs=1e-5)
        assert "implicit_accuracy" not in results["models"][name]  # these rows are prompts alone
    assert "win" in results["models"]["third"] and "win" not in results["models"]["second"]


def test_same_prompts_and_seeds_for_all_models(go, world, answered):
    """A copy of a model gives the same answers, so that all wins are ties."""
    results = go("first", "copy", k=3, seed=5)
    assert [e.responses for e in answered[0]] == [e.responses for e in answered[1]]
    assert len({tuple(e.responses[0]) for e in answered[0][:3]}) > 1  # and the k answers to a prompt differ
    share = student(9) ** 2 / (10 + student(9) ** 2)  # of the prompts may have a winner yet
    tie = {"value": 0.5, "se": ZEROS, "low": pytest.approx(0.5 - share / 2), "high": pytest.approx(0.5 + share / 2)}
    assert results["models"]["copy"]["win"] == tie
    assert results["models"]["copy"]["win_at_equal_length"] == {n: tie[n] for n in ("value", "low", "high")}
    assert results["models"]["copy"]["kl"]["value"] == 0


# ---------------------------------------------------------------------------------------------------------- measures


def test_mean_over_prompts_by_hand(monkeypatch):
    """Prompts with the values (1, 2), (3) and (5): mean 11/4; deviations of the sums 3 - 11/2, 3 - 11/4, 5 - 11/4."""
    monkeypatch.setattr(evaluate, "bootstrap", report.bootstrap)
    found = evaluate.mean("reward", [1.0, 2.0, 3.0, 5.0], [[0, 1], [2], [3]])
    assert found["value"] == 2.75
    assert found["se"] == pytest.approx(math.sqrt(3 / 2 * (2.5**2 + 0.25**2 + 2.25**2)) / 4)
    assert found["low"] == 1.5 and found["high"] == 5  # all three draws the first prompt, or the last: 1 in 27 each
    assert evaluate.mean("length", [4.0, 6.0], [[0, 1]]) == {"value": 5.0, "se": None, "low": None, "high": None}


def test_intervals_of_shares_near_0_and_1_have_a_width():
    """All of 64 prompts alike: q = t^2 / (64 + t^2) of prompts may yet be at the other end. A KL of 0 is no share."""
    prompts, q = [[i] for i in range(64)], student(63) ** 2 / (64 + student(63) ** 2)
    of = lambda name, value: evaluate.mean(name, [value] * 64, prompts)  # noqa: E731
    for name in ("win", "judge/win", "ended", "grammatical", "implicit_accuracy", "explicit_accuracy", "reward"):
        assert of(name, 1.0) == {"value": 1, "se": 0, "low": pytest.approx(1 - q), "high": 1}, name
    assert of("judge/orders_disagree", 0.0) == {"value": 0, "se": 0, "low": 0, "high": pytest.approx(q)}
    assert of("judge/position_bias", 0.5) == {"value": 0.5, "se": 0, "low": pytest.approx(0.5 - q), "high": 0.5}
    for name, value in (("kl", 0.0), ("reward", 0.25), ("length", 1.0)):
        assert of(name, value) == {"value": value, "se": ZEROS, "low": value, "high": value}
    differences = [float(i % 7 - 3) for i in range(64)]
    found = evaluate.at_equal_length([1.0] * 64, differences, prompts)
    assert found["low"] == pytest.approx(found["value"] - q) and found["high"] <= 1
    assert found["value"] == evaluate.length_controlled(torch.ones(64).double(), f64(*differences))


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def f64(*values) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def test_length_controlled_win_rate_recovers_its_own_model():
    """Wins that are sigmoid(theta + phi tanh(d / deviation)) exactly: the regression gives theta back."""
    differences = torch.linspace(-20, 35, 4001, dtype=torch.float64)
    x = torch.tanh(differences / differences.std(correction=0))
    for theta, phi in ((0.4, 1.3), (-1.0, 2.0), (0.0, -3.0)):
        wins = torch.sigmoid(theta + phi * x)
        assert abs(wins.mean().item() - sigmoid(theta)) > 0.03
        assert evaluate.length_controlled(wins, differences) == pytest.approx(sigmoid(theta), abs=1e-4)


def test_length_controlled_win_rate_without_and_by_length_alone():
    # each difference is won as often as its opposite: 3 of 4, whatever the length
    wins, differences = f64(1, 1, 1, 0).repeat(100), f64(7, -7, 7, -7).repeat_interleave(4).repeat(25)
    assert evaluate.length_controlled(wins, differences) == pytest.approx(0.75, abs=1e-3)
    # the longer one wins, always, and it is longer in 4 of 5: nothing is left at equal length
    differences = torch.linspace(-5, 20, 500, dtype=torch.float64)
    wins = (differences > 0).double()
    assert wins.mean().item() == pytest.approx(0.8)
    assert evaluate.length_controlled(wins, differences) == pytest.approx(0.5, abs=0.05)
    assert evaluate.length_controlled(1 - wins, -differences) == pytest.approx(0.5, abs=0.05)


@pytest.mark.parametrize("scale", [1.0, 40.0])
def test_length_controlled_win_rate_is_the_optimum(scale):
    """The gradient of the penalised likelihood, written out, is 0 there; also where length separates all wins."""
    g = torch.Generator().manual_seed(0)
    differences = (scale * torch.randn(60, generator=g, dtype=torch.float64) + 3).round()
    for wins in ((differences > 0).double(), torch.ones(60).double(), (torch.rand(60, generator=g) > 0.9).double()):
        rate = evaluate.length_controlled(wins, differences)
        x, theta = torch.tanh(differences / differences.std(correction=0)), math.log(rate / (1 - rate))
        low, high = -50.0, 50.0  # phi by bisection, for this theta: its derivative falls

        def slope(phi):
            return ((wins - torch.sigmoid(theta + phi * x)) * x).sum().item() - evaluate.RIDGE * phi  # noqa: B023

        for _ in range(100):
            phi = (low + high) / 2
            low, high = (phi, high) if slope(phi) > 0 else (low, phi)
        assert (wins - torch.sigmoid(theta + phi * x)).sum().item() == pytest.approx(evaluate.RIDGE * theta, abs=1e-6)


def test_length_controlled_win_rate_where_length_says_nothing_or_all():
    assert evaluate.length_controlled(f64(1, 0, 1, 1), f64(0, 0, 0, 0)) == 0.75
    assert math.isnan(evaluate.length_controlled(f64(1, 0, 1, 1), f64(2, 2, 2, 2)))
    prompts = [[0], [1], [2], [3]]
    undefined = {"value": None, "low": None, "high": None}
    assert evaluate.at_equal_length([1, 0, 1, 1], [2, 2, 2, 2], prompts) == undefined
    wins, differences = [1.0, 1.0, 1.0, 0.0] * 50, [3, -3] * 50 + [-3, 3] * 50
    found = evaluate.at_equal_length(wins, differences, [[i] for i in range(200)])
    plain = evaluate.mean("win", wins, [[i] for i in range(200)])
    assert found == pytest.approx({name: plain[name] for name in found}, abs=0.02)


def test_distinct_by_hand():
    responses = [[1, 2, 1, 2], [1, 2, 3]]  # 12, 21, 12 and 12, 23
    assert evaluate.distinct(responses, 1) == 3 / 7 and evaluate.distinct(responses, 2) == 3 / 5
    assert math.isnan(evaluate.distinct([[1], [2]], 2))


def test_self_bleu_by_hand():
    """1 2 3 4 against 1 2 3 5: precisions 3/4, 2/3, 1/2, and 0 of 1, smoothed to 1/2: their geometric mean."""
    by_hand = (3 / 4 * 2 / 3 * 1 / 2 * 1 / 2) ** (1 / 4)
    assert evaluate.self_bleu([[1, 2, 3, 4], [1, 2, 3, 5]]) == pytest.approx(by_hand)
    assert evaluate.self_bleu([[7, 8, 9, 2]] * 3) == pytest.approx(1)
    assert evaluate.self_bleu([[2]] * 5) == pytest.approx(1)  # all answers empty: EOS alone
    # 1 2 against 1 2 3 is short by one, exp(1 - 3/2); 1 2 3 against 1 2 has 2/3, 1/2, and 0 of 1, smoothed to 1/2
    by_hand = (math.exp(-0.5) + (2 / 3 * 1 / 2 * 1 / 2) ** (1 / 3)) / 2
    assert evaluate.self_bleu([[1, 2], [1, 2, 3]]) == pytest.approx(by_hand)
    assert evaluate.self_bleu([[i, i + 1, i + 2] for i in range(0, 90, 3)]) == ZEROS
    assert math.isnan(evaluate.self_bleu([[1, 2]]))


def test_accuracy_by_hand():
    e = example([5], [[6], [7], [8]], ranks=[1, 2, 2])
    assert evaluate.accuracy(e, torch.tensor([1.0, 0.0, 2.0]), 1e-4) == 0.5
    assert evaluate.accuracy(e, torch.tensor([1.0, 0.99995, 0.0]), 1e-4) == 0.75  # a tie and a right one
    noisy = example([5], [[6], [7]], probability=0.8)
    found = [evaluate.accuracy(noisy, torch.tensor(x), 0.0) for x in ([2, 1], [1, 2], [1, 1])]
    assert found == pytest.approx([0.8, 0.2, 0.5])


def test_win_by_hand():
    assert [evaluate.win(x, y) for x, y in ((2, 1), (1, 2), (1, 1 + 1e-6), (0, 0))] == [1, 0, 0.5, 0.5]


def test_wins_among_answers_that_end_alike_by_hand():
    """An answer that ends and one that is cut, of each model to two prompts, where ending alone is worth 5."""
    places, ended = [range(0, 2), range(2, 4)], [1.0, 0.0, 1.0, 0.0]
    other = {"reward": [5.0, 0.0, 5.0, 0.0], "ended": ended}
    found = evaluate.win_if_ended_alike({"reward": [6.0, 0.0, 4.0, -1.0], "ended": ended}, other, places)
    assert found["value"] == (1 + 0.5 + 0 + 0) / 4
    assert (found["low"], found["high"]) == report.share_interval([1.5, 0.0], [2, 2])
    mine = {"reward": [6.0, 6.0, 4.0, 6.0], "ended": [1.0, 1.0, 0.0, 0.0]}  # 6 and 6 against 5, then 4 and 6 against 0
    assert evaluate.win_if_ended_alike(mine, other, places)["value"] == 1.0
    other["ended"] = [0.0, 0.0, 1.0, 1.0]
    assert evaluate.win_if_ended_alike(mine, other, places) == {"value": None}


def test_prompts_and_texts_of_preferences():
    """As they are scored by others than the model: prompts as `build` took them, responses without a template."""
    say = lambda role, *texts: [{"role": role, "content": text} for text in texts]  # noqa: E731
    text = {"prompt": "p", "chosen": "a b", "rejected": "c"}
    assert (prompt_of(text), texts_of(text)) == ("p", ["a b", "c"])
    chat = {"prompt": say("user", "p"), "chosen": say("assistant", "yes"), "rejected": say("assistant", "no")}
    assert (prompt_of(chat), texts_of(chat)) == (say("user", "p"), ["yes", "no"])
    assert prompt_of(chat | {"prompt": "p"}) == say("user", "p")
    twice = {"prompt": "p", **{n: say("user", "p") + chat[n] for n in ("chosen", "rejected")}}
    assert (prompt_of(twice), texts_of(twice)) == (say("user", "p"), ["yes", "no"])
    hh = {"chosen": "\n\nHuman: p\n\nAssistant: a", "rejected": "\n\nHuman: p\n\nAssistant: b"}
    assert (prompt_of(hh), texts_of(hh)) == ("\n\nHuman: p\n\nAssistant:", [" a", " b"])
    ranked = {"prompt": "p", "responses": ["a", "b", "c"], "ranks": [1, 2, 2]}
    assert texts_of(ranked) == ["a", "b", "c"]


# ------------------------------------------------------------------------------------------------------------- judge


def test_a_judge_with_a_known_bias():
    """0.7 for the first shown, always: bias 0.2, no winner, and the orders disagree on every prompt. A judge of length
    alone has no bias; one that adds 0.1 for the first shown has 0.1."""
    mine, other = ["a", "long", "same"], ["bb", "b", "four"]
    rows = [{}] * 3
    ask = lambda judge: evaluate.judged(judge, "--judge f", ["p", "q", "r"], mine, other, rows)  # noqa: E731
    biased = ask(lambda prompts, first, second, rows: [0.7] * 3)
    assert biased["judge/win"] == pytest.approx([0.5] * 3) and biased["judge/orders_disagree"] == [1, 1, 1]
    assert biased["judge/position_bias"] == pytest.approx([0.2] * 3)

    def longer(extra):
        gap = lambda x, y: 0.5 + 0.4 * ((len(x) > len(y)) - (len(x) < len(y))) + extra  # noqa: E731
        return lambda prompts, first, second, rows: list(map(gap, first, second))

    fair = ask(longer(0))
    assert fair["judge/win"] == pytest.approx([0.1, 0.9, 0.5])
    assert fair["judge/position_bias"] == pytest.approx([0, 0, 0], abs=1e-9)
    assert fair["judge/orders_disagree"] == [0, 0, 0]
    leaning = ask(longer(0.1))
    assert leaning["judge/win"] == pytest.approx([0.1, 0.9, 0.5])
    assert leaning["judge/position_bias"] == pytest.approx([0.1] * 3)
    assert leaning["judge/orders_disagree"] == [0, 0, 1]  # the tie is given to the first place both times


def test_a_judge_from_the_command_line(go, module, answered):
    name = module(
        "calls = []\n"
        "def judge(prompts, first, second, rows):\n"
        "    calls.append((list(prompts), list(first), list(second), list(rows)))\n"
        "    return [0.9 if len(x) > len(y) else 0.3 for x, y in zip(first, second)]\n",
        "judge",
    )
    numbers = go(judge=name, eval_prompts=6)["models"]
    (prompts, *one, rows), (_, *two, _) = __import__(name.split(":")[0]).calls
    texts = [[e.response_texts[0] for e in answers] for answers in answered]
    assert one == [texts[1], texts[0]] and two == [texts[0], texts[1]]  # both orders, and not of the first model
    assert prompts == [e.prompt_text for e in answered[0]] and [row["prompt"] for row in rows] == prompts
    both = [(0.9 if len(x) > len(y) else 0.3, 0.9 if len(y) > len(x) else 0.3) for x, y in zip(*one, strict=True)]
    assert numbers["second"]["judge/win"]["value"] == pytest.approx(statistics.fmean((x + 1 - y) / 2 for x, y in both))
    bias = statistics.fmean((x + y) / 2 - 0.5 for x, y in both)
    assert numbers["second"]["judge/position_bias"]["value"] == pytest.approx(bias) and bias != 0
    ties = sum(x == y for x, y in both)
    assert numbers["second"]["judge/orders_disagree"]["value"] == pytest.approx(ties / 6)  # 0.3 twice
    assert "judge/win" not in numbers["first"] and "judge/win_at_equal_length" in numbers["second"]


@pytest.mark.parametrize(
    "body,said",
    [
        ("return [0.5] * (len(prompts) - 1)", "for 11 "),
        ("return [float('nan')] * len(prompts)", "gave nan"),
        ("return [1.5] * len(prompts)", "gave 1.5, which is no probability"),
        ("return 1 / 0", "raised ZeroDivisionError: division by zero, at functions"),
    ],
)
def test_a_judge_that_fails_is_one_line_with_the_prompt(body, said, go, module, world):
    name = module(f"def judge(prompts, first, second, rows):\n    {body}\n", "judge")
    write_rows(world / "eleven.jsonl", [{"prompt": f"the film{' was' * i}"} for i in range(11)])
    with pytest.raises(BadInput) as error:
        go(judge=name, data=str(world / "eleven.jsonl"))
    assert said in str(error.value) and f"--judge {name}" in str(error.value) and "the film" in str(error.value)
    assert "\n" not in str(error.value)


# --------------------------------------------------------------------------------------------------- files and resume


def test_files_of_a_run(go, tmp_path, world, answered, capsys):
    go("first", "second", "third")
    names = {path.name for path in (tmp_path / "run").iterdir()}
    assert names == {
        *("args.json", "environment.json", "evaluate.py", "metrics.jsonl"),
        *("results.json", "samples.jsonl", "reward_kl.png"),
    }
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert list(results["models"]) == [str(world / name) for name in ("first", "second", "third")]
    samples = [json.loads(line) for line in open(tmp_path / "run" / "samples.jsonl")]
    assert len(samples) == 3 * 10 and samples[12]["model"] == str(world / "second")
    assert samples[12]["text"] == answered[1][2].response_texts[0]
    assert samples[12]["prompt"] == answered[1][2].prompt_text
    kl = [row["kl"] for row in samples if row["model"] == str(world / "third")]
    assert results["models"][str(world / "third")]["kl"]["value"] == pytest.approx(statistics.fmean(kl))
    rows = [json.loads(line) for line in open(tmp_path / "run" / "metrics.jsonl")]
    assert [row["step"] for row in rows] == [1, 2, 3] and rows[2][f"{world}/third/kl"] == statistics.fmean(kl)
    printed = capsys.readouterr().out
    [line] = [line for line in printed.splitlines() if line.startswith("KL to the reference")]
    kl = results["models"][str(world / "second")]["kl"]
    assert line.split()[-6:-3] == [f"{kl['value']:.2f}", "+-", f"{kl['se']:.2f}"]
    assert (tmp_path / "run" / "reward_kl.png").read_bytes()[:4] == b"\x89PNG"


def test_the_plot_has_a_point_for_each_model(tmp_path):
    number = lambda x: {"value": x, "low": x - 0.5, "high": x + 1}  # noqa: E731
    points = {"a": (0.0, 1.0), "b": (3.0, 2.0), "c": (5.0, -1.0)}
    results = {"reference": "a", "reward": "gold", "models": {}}
    results["models"] = {name: {"kl": number(x), "reward": number(y)} for name, (x, y) in points.items()}
    seen = {}

    class Axes:
        def errorbar(self, x, y, xerr, yerr, **_):
            seen[len(seen)] = (x, y, xerr, yerr)

        def annotate(self, name, at, *_, **__):
            seen[name] = at

        def __getattr__(self, _):
            return lambda *args, **kwargs: None

    class Page:
        def __init__(self, *_):
            self.add_subplot, self.savefig = Axes, lambda path, dpi: None

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluate, "new_page", Page)
        evaluate.plot(results, tmp_path / "plot.png")
    assert {name: seen[name] for name in points} == points
    drawn = [seen[i] for i in seen if isinstance(i, int)]
    assert drawn == [(x, y, [[0.5], [1]], [[0.5], [1]]) for x, y in points.values()]


def test_killed_and_continued_is_the_same_run(go, tmp_path, world, answered, monkeypatch, module):
    """While the second of three models is measured; the first one does not answer again, nor is it judged again."""
    judge = module("def judge(p, x, y, rows):\n    return [0.8 if a < b else 0.4 for a, b in zip(x, y)]\n", "judge")
    names = ("first", "second", "third")
    straight = go(*names, judge=judge, out=str(tmp_path / "straight"))
    original, calls = evaluate.against_reference, []

    def stop(*args):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return original(*args)

    with monkeypatch.context() as patch:
        patch.setattr(evaluate, "against_reference", stop)
        with pytest.raises(KeyboardInterrupt):
            go(*names, judge=judge)
    assert not (tmp_path / "run" / "results.json").exists()
    answered.clear()
    assert go(*names, judge=judge, resume=True) == straight
    assert len(answered) == 2
    for name in ("results.json", "samples.jsonl", "metrics.jsonl"):
        assert (tmp_path / "run" / name).read_text() == (tmp_path / "straight" / name).read_text()
    assert not (tmp_path / "run" / "checkpoint").exists()
    with pytest.raises(BadInput, match="is complete"):
        go(*names, judge=judge, resume=True)


@pytest.mark.parametrize("where", ["plot", "cell"])
def test_killed_after_the_last_model(where, go, tmp_path, monkeypatch, answered):
    straight = go(out=str(tmp_path / "straight"))

    def stop(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(evaluate, where, stop)
        with pytest.raises(KeyboardInterrupt):
            go()
    answered.clear()
    assert go(resume=True) == straight and not answered
    for name in ("results.json", "samples.jsonl"):
        assert (tmp_path / "run" / name).read_text() == (tmp_path / "straight" / name).read_text()


def test_a_run_in_use_and_other_flags(go):
    go(eval_prompts=2)
    with pytest.raises(BadInput, match="already holds a run"):
        go(eval_prompts=2)
    with pytest.raises(BadInput, match="--seed 0 -> 1"):
        go(eval_prompts=2, seed=1, resume=True)


def test_one_policy_in_memory_beside_the_reference(go, monkeypatch):
    loaded, most, original = [], [], models.load_model

    def spy(*args):
        gc.collect()
        most.append(sum(model() is not None for model in loaded))
        model = original(*args)
        loaded.append(weakref.ref(model))
        return model

    monkeypatch.setattr(models, "load_model", spy)
    go("first", "second", "third", eval_prompts=3)
    assert most == [0, 1, 1]  # the reference, then each time it alone


# --------------------------------------------------------------------------------------------------- flags, bad input


@pytest.mark.parametrize(
    "changes,said",
    [
        ({"models": ()}, "--models: name at least one"),
        ({"models": ("{first}", "{first}")}, "has the same model twice"),
        ({"models": ("{first}", "{strange}")}, "its tokenizer is not that of the reference"),
        ({"models": ("{first}", "./missing")}, "--models ./missing: no such folder"),
        ({"ref": "./missing"}, "--ref ./missing: no such folder"),
        ({"ref": "{strange}"}, "its tokenizer is not that of the reference"),
        ({"temperature": 0.0}, "--temperature must be above 0"),
        ({"k": 0}, "--k must be at least 1"),
        ({"eval_prompts": 0}, "--eval-prompts must be at least 1, not 0"),
        ({"eval_pairs": -1}, "--eval-pairs must be at least 0, not -1"),
        ({"max_new_tokens": 0}, "--max-new-tokens must be at least 1"),
        ({"eval_fraction": 1e-9}, "no prompt is in --eval-fraction 1e-09"),
        ({"judge": "nowhere:judge"}, "--judge nowhere:judge: cannot be imported"),
        ({"reward": "nowhere:reward"}, "--reward nowhere:reward: cannot be imported"),
        ({"reward": "{first}"}, "not a reward model"),
        ({"data": "missing.jsonl"}, "missing.jsonl: no such file or folder"),
    ],
)
def test_bad_input_is_one_line(changes, said, go, world):
    paths = {"first": str(world / "first"), "strange": str(world / "strange")}
    fill = lambda x: x.format(**paths) if isinstance(x, str) else x  # noqa: E731
    changes = {k: tuple(map(fill, v)) if isinstance(v, tuple) else fill(v) for k, v in changes.items()}
    with pytest.raises(BadInput) as error:
        go(**changes)
    assert said in str(error.value) and "\n" not in str(error.value)


def test_output_layers_of_different_size(go, world, tmp_path):
    """The same tokenizer, and an output layer with two rows more than the reference's."""
    wide = load(world / "second")
    wide.resize_token_embeddings(wide.config.vocab_size + 2, mean_resizing=False)
    models.save(wide, reviews.tokenizer(), tmp_path / "wide")
    with pytest.raises(BadInput, match="output tokens, and the reference has"):
        go("first", tmp_path / "wide", eval_prompts=2, eval_pairs=2)


def test_a_model_of_another_vocabulary_without_a_reward(go, world, tmp_path, capsys):
    results = go("strange", data=str(world / "pairs.jsonl"), eval_pairs=4)
    assert results["reward"] is None and results["preferences"] == 4 and results["prompts"] == 10
    assert not {"reward", "win", "gold", "grammatical"} & results["models"]["strange"].keys()
    assert "no plot of reward against KL" in capsys.readouterr().out
    assert not (tmp_path / "run" / "reward_kl.png").exists()


@pytest.mark.parametrize("name, data", [("strange", "reviews"), ("strange", None), ("first", "reviews")])
def test_a_model_of_ones_own_on_film_reviews_is_told_so(name, data, go, world, monkeypatch, capsys):
    monkeypatch.setattr(reviews, "ROWS", 300)
    evaluate.main(go.arguments(name, dry_run=True, **({"data": data} if data else {})))
    line = f"--data reviews: these are film reviews, and {world / name} is no model of them: name prompts of your own"
    assert (line in capsys.readouterr().out) == (name == "strange" and data == "reviews")


def test_dry_run_evaluates_nothing(go, tmp_path, capsys):
    assert go.arguments(dry_run=True).dry_run and evaluate.main(go.arguments(dry_run=True)) == {}
    assert not (tmp_path / "run").exists()
    printed = capsys.readouterr().out
    assert "examples   11 of 11 rows" in printed and "10 prompts, 1 answers each; 11 preferences" in printed


def test_without_arguments_it_makes_the_models(tmp_path, monkeypatch, capsys):
    """Both models of the embedded task are made where they are missing, held-out prompts are train_dpo.py's own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(reviews, "ROWS", 300)
    made = []

    def sft(a):
        made.append(("sft", a.resume))
        write_model(Path(a.out))
        (Path(a.out) / "results.json").write_text("{}")

    def dpo(a):
        made.append(("dpo", a.model, a.resume))
        write_model(Path(a.out), 1)

    monkeypatch.setattr(train_sft, "main", sft)
    monkeypatch.setattr(train_dpo, "main", dpo)
    results = evaluate.main(evaluate.Args(max_new_tokens=4))
    assert made == [("sft", False), ("dpo", "runs/sft", False)]
    assert "runs/dpo is missing: making it with train_dpo.py first" in capsys.readouterr().out
    assert list(results["models"]) == ["runs/sft", "runs/dpo"] and results["reward"] == "gold"
    everything = build(reviews.rows("preference", 300), reviews.tokenizer(), "preference", 512, 1024)[0]
    held = [e.prompt_text for e in evaluate.held_out(everything, 0.1)[1]]
    samples = [json.loads(line) for line in open("runs/evaluate/samples.jsonl")]
    assert [row["prompt"] for row in samples[: len(samples) // 2]] == list(dict.fromkeys(held))
    assert results["preferences"] == len(held) and 10 < len(held) < 60
    evaluate.main(evaluate.Args(max_new_tokens=4, out="runs/again", eval_prompts=3))
    assert len(made) == 2  # they are there now


def test_flags():
    a = tyro.cli(evaluate.Args, args=["--models", "a", "b", "c", "--k", "3", "--reward", "gold"])
    assert a.models == ("a", "b", "c") and a.k == 3 and a.reward == "gold"


# ------------------------------------------------------------------------------------------------------------- leash


@pytest.mark.slow
def test_a_lower_beta_goes_further_from_the_reference(go, world, tmp_path):
    data = write_rows(tmp_path / "train.jsonl", pairs(240))
    betas = (2.0, 0.5, 0.1)
    for beta in betas:
        train_dpo.main(
            train_dpo.Args(
                model=str(world / "first"),
                data=str(data),
                out=str(tmp_path / f"beta-{beta}"),
                ref_cache=str(tmp_path / "cache"),
                eval_fraction=0.0,
                eval_prompts=0,
                beta=beta,
                lr=1e-3,
                batch_size=24,
                epochs=6,
                device="cpu",
            )
        )
    held = write_rows(tmp_path / "held.jsonl", pairs(64, seed=1))
    runs_ = [tmp_path / f"beta-{beta}" for beta in betas]
    results = go("first", *runs_, data=str(held), max_new_tokens=20)["models"]
    kl = [results[name]["kl"] for name in ("first", *(path.name for path in runs_))]
    assert kl[0]["value"] == 0
    for tight, loose in zip(kl[:-1], kl[1:], strict=True):
        assert tight["high"] < loose["low"]
