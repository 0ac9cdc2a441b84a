"""Where rewards come from (support/rewards.py), and the rankings that carry them (support/examples.py)."""

import itertools
import json
import math
import random
import shutil
import textwrap

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from test_data import CHATML, GEMMA, byte_level
from test_resume import write_model
from test_sample import words
from tiny import example, tiny

import annotate
from rlhf import BadInput
from support import models, reviews, scoring, tokens
from support.examples import Example, build, held_out
from support.preferences import ceiling, pairs, without_ties
from support.rewards import load_reward
from support.rows import prompt_of, read_rows

MEAN = 0.375  # of the reward model below; a power of two, so that taking it off is exact


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("rewards")


@pytest.fixture(scope="module")
def rm(folder):
    """The folder of a reward model over the tokenizer of the reviews."""
    write_model(folder / "policy")
    tokenizer = reviews.tokenizer()
    torch.manual_seed(0)
    model = models.new_reward_model(models.load_model(str(folder / "policy"), "cpu"), tokenizer)
    model.config.reward_mean, model.config.reward_std = MEAN, 1.0
    models.save(model, tokenizer, folder / "rm")
    return str(folder / "rm")


@pytest.fixture
def module(tmp_path, monkeypatch):
    """Writes a module into the working directory and returns its name, another one each time."""

    def write(code: str) -> str:
        name = f"judge_{tmp_path.name}_{len([*tmp_path.iterdir()])}".replace("-", "_")
        (tmp_path / f"{name}.py").write_text(textwrap.dedent(code))
        return name

    monkeypatch.chdir(tmp_path)
    return write


def one_line(error: pytest.ExceptionInfo, *parts: str) -> None:
    message = str(error.value)
    assert "\n" not in message and all(part in message for part in parts), message


PROMPTS = ["the plot", "the plot", "it was", "the plot"]
RESPONSES = ["was superb .", "was dull .", "great", "was not bad ."]
ROWS = [{"n": i} for i in range(4)]


# ------------------------------------------------------------------------------------------------------------- sources


def test_gold_is_that_of_prompt_and_response():
    """By hand: superb 3, dull -2, great 2, not bad -0.5 * -2 = 1, each over the deviation 1.474."""
    want = [3 / 1.474, -2 / 1.474, 2 / 1.474, 1 / 1.474]
    assert load_reward("gold")(PROMPTS, RESPONSES, ROWS) == pytest.approx(want)
    assert load_reward("gold")(["the plot was not"], ["dull ."], [{}]) == pytest.approx([1 / 1.474])


@torch.no_grad()
def library(rm: str, sequences: list[list[int]]) -> list[float]:
    """The rewards of token ids by transformers alone, one at a time, without the mean."""
    model = transformers.AutoModelForSequenceClassification.from_pretrained(rm).eval()
    return [model(torch.tensor([ids])).logits[0, 0].item() - MEAN for ids in sequences]


def test_a_reward_model_scores_like_the_librarys_class(rm):
    """In the order given, though equal prompts stand apart; one that was cut without EOS, the others with it."""
    tokenizer = reviews.tokenizer()
    rows = [{"ended": True}, {"ended": False}, {}, {"ended": False, "n": 1}]
    ids = lambda prompt, text: tokenizer(f"{prompt} {text}")["input_ids"]  # noqa: E731
    sequences = [
        ids(p, r) + [tokenizer.eos_token_id] * row.get("ended", True)
        for p, r, row in zip(PROMPTS, RESPONSES, rows, strict=True)
    ]
    found = load_reward(rm)(PROMPTS, RESPONSES, rows)
    assert found == pytest.approx(library(rm, sequences), abs=1e-5)
    ended = load_reward(rm)(PROMPTS, RESPONSES, [{}] * 4)
    assert [abs(x - y) > 1e-3 for x, y in zip(found, ended, strict=True)] == [False, True, False, True]


def test_a_reward_model_scores_like_models_score(rm):
    """The very function of training, over many prompts, with whatever budget of tokens."""
    rows = [row for _, row in reviews.rows("preference", 12)]
    examples = build([("x:1", row) for row in rows], reviews.tokenizer(), "preference", 512, 1024)[0]
    model = models.load_reward_model(rm, "cpu")
    want = torch.cat(
        scoring.score_rewards(model, examples, scoring.Batching("padded", micro_batch_tokens=10**6))
    ).tolist()
    prompts = [row["prompt"] for row in rows for _ in range(2)]
    responses = [row[side] for row in rows for side in ("chosen", "rejected")]
    for budget in (1, 10**5):
        assert load_reward(rm, micro_batch_tokens=budget)(prompts, responses, [{}] * 24) == pytest.approx(
            want, abs=1e-5
        )
    half = load_reward(rm, dtype=torch.bfloat16)
    rounded = torch.tensor(half(prompts, responses, [{}] * 24))
    assert half.model.dtype == torch.bfloat16 and 0 < (rounded - torch.tensor(want)).abs().max() < 0.05


def test_an_empty_response_is_its_eos_alone(rm):
    tokenizer = reviews.tokenizer()
    want = library(rm, [tokenizer("the plot")["input_ids"] + [tokenizer.eos_token_id]])
    assert load_reward(rm)(["the plot"], [""], [{"ended": True}]) == pytest.approx(want, abs=1e-5)


def test_equal_responses_get_equal_rewards(rm):
    first, second, other = load_reward(rm)(["the plot"] * 3, ["was ."] * 2 + ["it ."], [{}] * 3)
    assert first == pytest.approx(second, abs=1e-6) and first != pytest.approx(other, abs=1e-3)


def test_prompts_of_messages(rm):
    """Without a chat template as hh-rlhf writes them; beside a string, in one call."""
    tokenizer = reviews.tokenizer()
    talk = [{"role": "user", "content": "the plot ?"}]
    asked = tokenizer("Human : the plot ? Assistant : was superb .")["input_ids"]
    plain = tokenizer("the plot was superb .")["input_ids"]
    eos = [tokenizer.eos_token_id]
    [rendered] = build([("x:1", {"prompt": talk})], tokenizer, "prompts", 512, 1024)[0]
    prompts = [talk, "the plot", talk]
    found = load_reward(rm)(prompts, ["was superb ."] * 3, [{}, {}, {"ended": False}])
    answer = tokenizer("was superb .", add_special_tokens=False)["input_ids"]
    want = library(rm, [rendered.prompt + answer + eos, plain + eos, rendered.prompt + answer])
    assert found == pytest.approx(want, abs=1e-5) and len(rendered.prompt) > 5 and asked


def test_a_reward_model_sees_the_tools_of_its_prompt(rm, tmp_path):
    """Equal prompts with other tools, one after the other: as if the tools were written into the prompt."""
    tokenizer = reviews.tokenizer()
    tokenizer.chat_template = (
        "{% for tool in tools or [] %}{{ tool.name + ' ' }}{% endfor %}"
        "{% for m in messages %}{{ m.content + ' ' }}{% endfor %}"
    )
    shutil.copytree(rm, tmp_path / "rm")
    tokenizer.save_pretrained(tmp_path / "rm")
    prompt = lambda text: [{"role": "user", "content": text}]  # noqa: E731
    rows = [{"tools": [{"name": "superb"}]}, {"tools": [{"name": "dull"}]}, {}]
    reward = load_reward(str(tmp_path / "rm"))
    found = reward([prompt("the plot")] * 3, ["was ."] * 3, rows)
    want = reward([prompt(f"{text}the plot") for text in ("superb ", "dull ", "")], ["was ."] * 3, [{}] * 3)
    assert found == pytest.approx(want, abs=1e-5) and len({round(x, 3) for x in want}) == 3


@pytest.fixture(scope="module")
def byte_rm(folder):
    """A reward model whose tokenizer has the token "ab", so that this text can be two ids or one."""
    tokenizer = byte_level(merges=[("a", "b")])
    torch.manual_seed(1)
    sizes = dict(hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)
    sizes |= {"vocab_size": len(tokenizer), "num_labels": 1, "pad_token_id": tokenizer.pad_token_id}
    config = transformers.LlamaConfig(**sizes)
    model = transformers.LlamaForSequenceClassification(config)
    torch.nn.init.normal_(model.score.weight)
    model.config.reward_mean, model.config.reward_std = MEAN, 1.0
    models.save(model, tokenizer, folder / "byte_rm")
    return str(folder / "byte_rm"), tokenizer


def test_sampled_ids_are_scored(byte_rm, capsys):
    """With the same tokenizer the ids of the row, cut or ended; else, or where a row has none, those of the text."""
    source, tokenizer = byte_rm
    a, b, ab, p, c = tokenizer.convert_tokens_to_ids(["a", "b", "ab", "p", "c"])
    bos, eos, digest = tokenizer.bos_token_id, tokenizer.eos_token_id, tokens.digest(tokenizer)
    rows = [
        {"ended": True, "response_ids": [a, b, eos], "tokenizer": digest},
        {"ended": False, "response_ids": [a, b], "tokenizer": digest},
        {"ended": True, "response_ids": [a, b, eos], "tokenizer": "another"},
        {"ended": False, "token_ids": [[a, b], [c]], "tokenizer": digest},  # those of other responses
        {},
        {"ended": False, "response_ids": [c, a, b], "tokenizer": digest},
    ]
    texts = ["ab"] * 5 + ["cab"]
    ids = [[a, b, eos], [a, b], [ab, eos], [ab], [ab, eos], [c, a, b]]
    want, reward = library(source, [[bos, p, *x] for x in ids]), load_reward(source)
    for _ in range(2):
        assert reward(["p"] * 6, texts, rows) == pytest.approx(want, abs=1e-5)
    assert capsys.readouterr().out.count(f"--reward {source}: has another tokenizer than what was sampled") == 1
    assert len({round(x, 3) for x in want}) == 5
    with pytest.raises(BadInput, match=r"field 'token_ids\[0\]' does not spell 'responses\[0\]'"):
        load_reward(source)(["p"], ["ba"], rows[:1])


def test_rankings_by_a_reward_model_are_of_the_sampled_ids(byte_rm, tmp_path, monkeypatch):
    """Identical texts count once, with the first one's ids."""
    monkeypatch.chdir(tmp_path)
    source, tokenizer = byte_rm
    a, b, ab, p, c = tokenizer.convert_tokens_to_ids(["a", "b", "ab", "p", "c"])
    sampled = [[a, b], [c], [ab]]
    row = {"prompt": "p", "responses": ["ab", "c", "ab"], "ended": [False] * 3, "token_ids": sampled}
    for digest, ids in ((tokens.digest(tokenizer), sampled), ("another", [[ab], [c], [ab]])):
        (tmp_path / "s.jsonl").write_text(json.dumps(row | {"tokenizer": digest}))
        annotate.main(annotate.Args("s.jsonl", f"{digest}.jsonl", by=source, device="cpu"))
        [ranked] = [row for _, row in read_rows(f"{digest}.jsonl")[0]]
        first, second = library(source, [[tokenizer.bos_token_id, p, *x] for x in ids[:2]])
        assert ranked["rewards"] == pytest.approx([first, second, first], abs=1e-5)
        assert ranked["ranks"] == ([1, 2, 1] if first > second else [2, 1, 2])
        assert ranked["token_ids"] == sampled
    (tmp_path / "s.jsonl").write_text(json.dumps(row | {"token_ids": [[a, b]]}))
    with pytest.raises(BadInput, match="^s.jsonl:1: field 'token_ids' is not a list for each response"):
        annotate.main(annotate.Args("s.jsonl", "o.jsonl", by=source, device="cpu"))


def test_long_sequences_are_cut_as_told(rm):
    tokenizer = reviews.tokenizer()
    [want] = library(rm, [tokenizer("dull dull dull was great , and")["input_ids"]])
    reward = load_reward(rm, max_prompt_length=4, max_length=8)
    [found] = reward([" ".join(["the plot"] * 9 + ["dull"] * 3)], ["was great , and superb ."], [{}])
    assert found == pytest.approx(want, abs=1e-5)


def test_what_cannot_be_scored_is_one_line_that_names_it(rm):
    """A cut response whose only tokens left no text."""
    with pytest.raises(BadInput) as error:
        load_reward(rm)(["the plot", "it was"], ["was .", ""], [{}, {"ended": False}])
    one_line(error, rm, "it was")


def test_nothing_to_score(rm, module):
    name = module("def f(prompts, responses, rows): return [1.0] * len(prompts)")
    assert [load_reward(source)([], [], []) for source in ("gold", f"{name}:f", rm)] == [[], [], []]


def test_prompts_responses_and_rows_go_together(rm, module):
    name = module("def f(prompts, responses, rows): return [1.0] * len(prompts)")
    for source in ("gold", rm, f"{name}:f"):
        with pytest.raises(ValueError):
            load_reward(source)(PROMPTS, RESPONSES[:3], ROWS)


# ----------------------------------------------------------------------------------------------------------- functions


def test_a_function_of_the_working_directory(module):
    """It gets all sequences at once, in order, and its numbers come back as floats."""
    code = """
        import torch
        calls = []
        def score(prompts, responses, rows):
            calls.append((prompts, responses, rows))
            return torch.tensor([len(r) + row["n"] for r, row in zip(responses, rows)])
        class Judge:
            def __call__(self, prompts, responses, rows):
                return (i % 2 == 0 for i in range(len(prompts)))
        judge = Judge()
    """
    name = module(code)
    found = load_reward(f"{name}:score")(tuple(PROMPTS), tuple(RESPONSES), tuple(ROWS))
    assert found == [12.0, 11.0, 7.0, 16.0] and all(type(x) is float for x in found)
    assert __import__(name).calls == [(PROMPTS, RESPONSES, ROWS)]
    assert load_reward(f"{name}:judge")(PROMPTS, RESPONSES, ROWS) == [1.0, 0.0, 1.0, 0.0]


def test_a_function_keeps_what_it_was_given(module):
    """Prompts that are messages, and lists that the function may change as it likes."""
    name = module("def f(prompts, responses, rows):\n    assert prompts.pop()[0]['role'] == 'user'\n    return [2.0]")
    prompts, responses = [[{"role": "user", "content": "hi"}]], ["ho"]
    assert load_reward(f"{name}:f")(prompts, responses, [{}]) == [2.0]
    assert (len(prompts), responses) == (1, ["ho"])


RAISES = """
    def f(prompts, responses, rows):
        for response in responses:
            if "not" in response:
                raise RuntimeError("no such word")
        return [0.0] * len(prompts)
    def lines(prompts, responses, rows):
        raise ValueError("first\\nsecond\\n  third")
    def tired(prompts, responses, rows):
        if len(prompts) > 1:
            raise TimeoutError("too many")
        return [0.0]
    def few(prompts, responses, rows): return [1.0, 2.0]
    def many(prompts, responses, rows): return [1.0] * 5
    def nan(prompts, responses, rows): return [1.0, 2.0, float("nan"), 4.0]
    def endless(prompts, responses, rows): return [1.0, -float("inf"), 3.0, 4.0]
    def nothing(prompts, responses, rows): pass
    def texts(prompts, responses, rows): return ["good"] * len(prompts)
    def thrice(prompts): return 1
    def text(prompts, responses, rows): return "1" * len(prompts)
    def by_text(prompts, responses, rows): return dict.fromkeys(responses, 1.0)
    def one(prompts, responses, rows): return 1.0
    number = 3
"""
WRONG = {  # name: what the line says
    "f": ("raised RuntimeError: no such word", "'the plot'", "'was not bad .'"),
    "lines": ("raised ValueError: first", "'the plot'", "'was superb .'"),
    "tired": ("raised TimeoutError: too many", "none of its sequences when given alone"),
    "few": ("gave 2 ", "for 4 responses", "'the plot'", "'was superb .'"),
    "many": ("gave 5 ", "for 4 responses"),
    "nan": ("gave nan", "'it was'", "'great'"),
    "endless": ("gave -inf", "'the plot'", "'was dull .'"),
    "nothing": ("returned NoneType, wanted a list of numbers",),
    "text": ("returned str, wanted a list of numbers",),
    "by_text": ("returned dict, wanted a list of numbers",),
    "one": ("returned float, wanted a list of numbers",),
    "texts": ("returned a list of strings, wanted a list of numbers",),
    "thrice": ("raised TypeError", "'the plot'", "'was superb .'"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_function_that_goes_wrong_is_one_line(name, module):
    source = f"{module(RAISES)}:{name}"
    with pytest.raises(BadInput) as error:
        load_reward(source, flag="--by")(PROMPTS, RESPONSES, ROWS)
    one_line(error, f"--by {source}: ", *WRONG[name])


def test_the_innermost_line_of_the_users_file_is_named(module):
    """Not that of the library it calls, nor that of the function's own call."""
    lines = ["import json", "", "def score(text):", "    return json.loads(text)", ""]
    name = module("\n".join([*lines, "def f(prompts, responses, rows):", "    return [*map(score, responses)]"]))
    with pytest.raises(BadInput) as error:
        load_reward(f"{name}:f")(PROMPTS, RESPONSES, ROWS)
    one_line(error, f"raised JSONDecodeError: Expecting value: line 1 column 1 (char 0), at {name}.py:4 (prompt")
    broken = module("import json\n\nx = json.loads('{')\n")
    with pytest.raises(BadInput) as error:
        load_reward(f"{broken}:f")
    one_line(error, f", at {broken}.py:3)")


def test_long_texts_are_shortened_and_messages_shown(module):
    source = f"{module(RAISES)}:f"
    with pytest.raises(BadInput) as error:
        load_reward(source)([[{"role": "user", "content": "why\nnot ?"}]], ["not " * 500], [{}])
    one_line(error, "why", "not not not")
    assert len(str(error.value)) < 400


@pytest.mark.parametrize(
    "what, message",
    [
        ("missing_module_of_mine:f", "cannot be imported (ModuleNotFoundError"),
        ("{name}:g", "cannot be imported (AttributeError"),
        ("{name}:number", "is not a function"),
        ("{name}:", "cannot be imported"),
        ("{name}.py:f", "names a module: drop .py ("),
        ("{broken}:f", "cannot be imported (SyntaxError"),
        ("{raising}:f", "cannot be imported (RuntimeError"),
    ],
)
def test_a_function_that_is_not_there(what, message, module):
    names = {
        "name": module(RAISES),
        "broken": module("def f(:"),
        "raising": module("raise RuntimeError('two\\nlines')"),
    }
    with pytest.raises(BadInput) as error:
        load_reward(what.format(**names), flag="--by")
    one_line(error, "--by", what.format(**names), message)


# ------------------------------------------------------------------------------------------------ not a reward model


def test_a_language_model_is_no_reward_model(folder, rm, tmp_path):
    with pytest.raises(BadInput) as error:
        load_reward(str(folder / "policy"))
    one_line(error, "--reward", "policy: not a reward model", "train_rm.py")
    with pytest.raises(BadInput) as error:
        load_reward(str(tmp_path / "none"), flag="--by")
    one_line(error, "--by", "no such folder")
    (tmp_path / "empty").mkdir()
    with pytest.raises(BadInput) as error:
        load_reward(str(tmp_path / "empty"), flag="--by")
    one_line(error, "--by", "empty")


def test_a_classifier_of_two_labels_is_no_reward_model(tmp_path):
    config = tiny("llama").config
    config.num_labels = 2
    models.save(transformers.LlamaForSequenceClassification(config), words(), tmp_path / "two")
    with pytest.raises(BadInput) as error:
        load_reward(str(tmp_path / "two"))
    one_line(error, "--reward", "2 labels")


@pytest.mark.parametrize("pad", [None, "eos"])
def test_a_reward_model_with_an_unusable_pad_id_is_refused(pad, rm, tmp_path):
    """As others save them: the library's class would read the wrong token, or no batch at all."""
    shutil.copytree(rm, tmp_path / "rm")
    config = json.loads((tmp_path / "rm" / "config.json").read_text())
    config["pad_token_id"] = pad and config["eos_token_id"]
    (tmp_path / "rm" / "config.json").write_text(json.dumps(config))
    with pytest.raises(BadInput) as error:
        load_reward(str(tmp_path / "rm"))(["the plot", "it was"], ["was .", "was really superb ."], [{}, {}])
    one_line(error, "pad id")


def test_a_reward_model_without_its_head_is_refused(rm, tmp_path):
    """The library would make one up."""
    shutil.copytree(rm, tmp_path / "rm")
    weights = load_file(tmp_path / "rm" / "model.safetensors")
    del weights["score.weight"]
    save_file(weights, tmp_path / "rm" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(BadInput) as error:
        load_reward(str(tmp_path / "rm"))
    one_line(error, "--reward", "score")


# ------------------------------------------------------------------------------------- rankings: rewards and noise

PLAIN, CHAT = byte_level(), byte_level(bos=None, eos="<|im_end|>", pad="<|im_end|>", template=CHATML)


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def ranking(ranks, rewards=None, noise=None, **fields) -> Example:
    return example([5], [[6 + i] for i in range(len(ranks))], ranks=ranks, rewards=rewards, noise=noise, **fields)


def test_label_probability():
    e = ranking([2, 1, 3], [0.5, 1.5, -1.0], 0.5)
    assert e.label_probability(1, 0) == pytest.approx(sigmoid(2))
    assert e.label_probability(0, 1) == pytest.approx(1 - sigmoid(2))
    assert e.label_probability(0, 2) == pytest.approx(sigmoid(3))
    assert e.label_probability(2, 2) == 0.5
    assert ranking([1, 2], [1e300, -1e300], 1e-300).label_probability(1, 0) == 0.0  # without overflow
    for unknown in (ranking([1, 2]), ranking([1, 2], [1.0, 0.0]), ranking([1, 2], [0.0, 1.0], 0.0)):
        assert unknown.label_probability(0, 1) == 1.0
    assert ranking([1, 2], probability=0.3).label_probability(0, 1) == 0.3


def test_label_probability_is_how_often_the_annotator_says_so():
    """20,000 rankings of three by reviews.rank, whose pairs are Bradley-Terry: within 4 standard errors."""
    rng, rewards, noise, n = random.Random(0), [0.3, 0.0, -0.4], 0.35, 20_000
    drawn = [reviews.rank(rewards, noise, rng) for _ in range(n)]
    for i, j in itertools.permutations(range(3), 2):
        want = ranking(drawn[0], rewards, noise).label_probability(i, j)
        share = sum(ranks[i] < ranks[j] for ranks in drawn) / n
        assert abs(share - want) < 4 * math.sqrt(want * (1 - want) / n)


def test_pairs_and_their_weights():
    """Ranks 2 1 2: two pairs of 1/2; 1 2: one; 3 1 2: three of 1/3; places count on over the prompts."""
    examples = [ranking([2, 1, 2]), ranking([1, 2], probability=0.8), ranking([3, 1, 2], [0.0, 2.0, 1.0], 0.5)]
    better, worse, weights, right = pairs(examples)
    found = {(i, j): (w, p) for i, j, w, p in zip(better, worse, weights, right, strict=True)}
    want = {(1, 0): (1 / 2, 1.0), (1, 2): (1 / 2, 1.0), (3, 4): (1.0, 0.8)}
    want |= {(6, 5): (1 / 3, sigmoid(4)), (6, 7): (1 / 3, sigmoid(2)), (7, 5): (1 / 3, sigmoid(2))}
    assert found.keys() == want.keys() and len(better) == 6
    for pair, numbers in want.items():
        assert found[pair] == pytest.approx(numbers)
    assert pairs([]) == ([], [], [], []) == pairs([ranking([1])])


def test_weights_add_up_to_one_over_every_prompt():
    rng = random.Random(0)
    for _ in range(200):
        examples = [ranking([rng.randint(1, 4) for _ in range(rng.randint(2, 6))]) for _ in range(5)]
        sums, first = [], 0
        better, worse, weights, _ = pairs(examples)
        for e in examples:
            last = first + len(e.ranks)
            inside = [w for i, w in zip(better, weights, strict=True) if first <= i < last]
            assert all(first <= j < last for i, j in zip(better, worse, strict=True) if first <= i < last)
            assert len(inside) == sum(a < b for a, b in itertools.permutations(e.ranks, 2))
            sums.append((sum(inside), len(set(e.ranks)) > 1))
            first = last
        assert [total for total, _ in sums] == pytest.approx([float(untied) for _, untied in sums])


def test_ceiling_by_hand():
    """Over a prompt's pairs max(P, 1 - P), then over prompts: noise may have turned labels round."""
    three = ranking([3, 1, 2], [1.0, 0.0, 0.5], 0.5)  # the best is ranked last: sigmoid(-2), sigmoid(-1), sigmoid(-1)
    first = (sigmoid(2) + 2 * sigmoid(1)) / 3
    assert ceiling([three]) == pytest.approx(first)
    assert ceiling([three, ranking([1, 2], probability=0.1)]) == pytest.approx((first + 0.9) / 2)
    assert ceiling([three, ranking([1, 2])]) == pytest.approx((first + 1) / 2)
    tied = ranking([1, 1, 2], [1.0, 0.0, -1.0], 1.0)
    assert ceiling([tied]) == pytest.approx((sigmoid(2) + sigmoid(1)) / 2)
    assert ceiling([]) == ceiling([ranking([1])]) == ceiling([ranking([2, 1])]) == 1.0


def ranked_row(**changes) -> dict:
    return {"prompt": "p", "responses": ["a", "bb", "c"], "ranks": [2, 1, 3]} | changes


def built(tokenizer, row: dict, kind: str = "preference") -> Example:
    [found], _ = build([("f.jsonl:1", row)], tokenizer, kind, 100, 200)
    return found


def test_rewards_and_noise_are_read(tmp_path):
    row = ranked_row(rewards=[0, 1.5, -2], noise=0.25, ended=[True, False, True])
    (tmp_path / "r.jsonl").write_text(json.dumps(row) + "\n")
    cells = [json.dumps(v).replace('"', '""') for v in row.values()]
    (tmp_path / "r.csv").write_text(",".join(row) + "\np," + ",".join(f'"{cell}"' for cell in cells[1:]) + "\n")
    for name in ("r.jsonl", "r.csv"):
        [(_, read)], _ = read_rows(str(tmp_path / name))
        e = built(PLAIN, read)
        assert (e.rewards, e.noise, e.ranks) == ([0, 1.5, -2], 0.25, [2, 1, 3])
        assert e.label_probability(1, 0) == pytest.approx(sigmoid(6))
        assert [PLAIN.decode(ids) for ids in e.responses] == ["a</s>", "bb", "c</s>"]
    plain = built(PLAIN, ranked_row())
    assert (plain.rewards, plain.noise) == (None, None) and all(
        ids[-1] == PLAIN.eos_token_id for ids in plain.responses
    )


def test_a_report_expects_labels_by_their_probability():
    """Longer wins: pairs (bb, a), (bb, c), (a, c) with P = 0.9, 0.9, 0.5 and lengths 3 2 2 (EOS included)."""
    half = math.log(9) / 2
    row = ranked_row(rewards=[0.0, 2 * half, 0.0], noise=1.0)
    _, report = build([("f:1", row)], PLAIN, "preference", 100, 200)
    assert report.longer_wins == pytest.approx((0.9 + 0.9 + 0.5) / 3)
    assert report.length_difference == pytest.approx((0.8 + 0.8 + 0) / 3)


BAD = {
    "ended of another length": {"ended": [True, False]},
    "ended of numbers": {"ended": [1, 0, 1]},
    "ended for all": {"ended": True},
    "ended with a gap": {"ended": [True, None, True]},
    "rewards of another length": {"rewards": [1.0, 2.0]},
    "rewards of texts": {"rewards": ["1", "2", "3"]},
    "rewards with a gap": {"rewards": [1.0, None, 2.0]},
    "rewards as a table": {"rewards": {"a": 1}},
    "rewards with a NaN": {"rewards": [1.0, math.nan, 2.0], "noise": 0.5},
    "rewards without end": {"rewards": [1.0, math.inf, math.inf], "noise": 0.5},
    "rewards that are true": {"rewards": [True, False, True]},
    "noise below zero": {"rewards": [1.0, 2.0, 3.0], "noise": -0.1},
    "noise of text": {"rewards": [1.0, 2.0, 3.0], "noise": "0.5"},
    "noise that is true": {"rewards": [1.0, 2.0, 3.0], "noise": True},
    "noise for each": {"rewards": [1.0, 2.0, 3.0], "noise": [0.5, 0.5, 0.5]},
}


@pytest.mark.parametrize("name", BAD)
def test_bad_columns_are_one_line(name):
    with pytest.raises(BadInput) as error:
        built(PLAIN, ranked_row(**BAD[name]))
    one_line(error, "f.jsonl:1: field", repr(name.split()[0]), "leave it out")
    good = ("f.jsonl:2", ranked_row())
    examples, report = build([("f.jsonl:1", ranked_row(**BAD[name])), good], PLAIN, "preference", 100, 200, True)
    assert [e.where for e in examples] == ["f.jsonl:2"] and len(report.skipped) == 1


def test_columns_that_are_empty_are_none():
    e = built(PLAIN, ranked_row(ended=None, rewards=None, noise=None))
    assert (e.rewards, e.noise) == (None, None) and all(ids[-1] == PLAIN.eos_token_id for ids in e.responses)


# -------------------------------------------------------------------------------------------------------- responses


def test_responses_to_be_scored_are_all_kept():
    """No ranks are needed, equal ones and single ones stay, and ranks that are there are not read."""
    rows = [{"prompt": "p", "responses": ["a", "a"]}, {"prompt": "q", "responses": ["b"], "ranks": [1]}]
    examples, report = build([(f"f:{i}", row) for i, row in enumerate(rows)], PLAIN, "responses", 100, 200)
    assert [[PLAIN.decode(r) for r in e.responses] for e in examples] == [["a</s>", "a</s>"], ["b</s>"]]
    assert not report.dropped and report.kept == 2
    for bad in ({"prompt": "p"}, {"prompt": "p", "responses": []}, {"prompt": "p", "responses": "a"}):
        with pytest.raises(BadInput):
            build([("f:1", bad)], PLAIN, "responses", 100, 200)


TALK = [{"role": "user", "content": "hi"}]


@pytest.mark.parametrize("template", [CHATML, GEMMA, None], ids=["chatml", "gemma", "none"])
def test_a_cut_response_to_messages_stops_where_it_was_cut(template):
    """Neither EOS nor the end of a turn, nor the template's spaces, which the model did not write."""
    eos = "<|im_end|>" if template == CHATML else "</s>"
    tokenizer = byte_level(eos=eos, template=template, specials=["<turn>", "</turn>"])
    row = {"prompt": TALK, "responses": [" half a sen", " whole"], "ended": [False, True], "ranks": [1, 2]}
    cut, whole = built(tokenizer, row).responses
    assert cut == tokenizer(" half a sen", add_special_tokens=False)["input_ids"]
    assert tokenizer.decode(whole).endswith(eos) and whole[-2:] != [tokenizer.eos_token_id] * 2
    both = built(tokenizer, row | {"ended": [True, True]})
    assert both.responses[1] == whole and "half a sen" in both.response_texts[0] and both.responses[0] != cut


def test_only_a_sampled_response_may_be_empty():
    row = {"prompt": "p", "responses": ["", "b"], "ranks": [2, 1]}
    with pytest.raises(BadInput, match=r"field 'responses\[0\]' is empty"):
        built(PLAIN, row)
    e = built(PLAIN, row | {"ended": [True, True]})
    assert e.responses[0] == [PLAIN.eos_token_id]
    e = built(CHAT, row | {"prompt": TALK, "ended": [True, True]})
    assert e.responses[0] == [CHAT.eos_token_id]
    with pytest.raises(BadInput, match="nothing is left.*a response without a token"):
        built(PLAIN, row | {"ended": [False, True]})


# ---------------------------------------------------------------------------------------------- prompts and splitting

ANSWERS = [{"role": "assistant", "content": "a"}], [{"role": "assistant", "content": "b"}]
FORMS = {
    "text": ({"prompt": "p", "chosen": "a", "rejected": "b"}, "p"),
    "messages": ({"prompt": TALK, "chosen": ANSWERS[0], "rejected": ANSWERS[1]}, TALK),
    "dialogues": ({"chosen": TALK + ANSWERS[0], "rejected": TALK + ANSWERS[1]}, TALK),
    "an empty prompt": ({"prompt": None, "chosen": TALK + ANSWERS[0], "rejected": TALK + ANSWERS[1]}, TALK),
    "question": ({"question": "so it", "chosen": " is", "rejected": " was"}, "so it"),
    "hh": (
        {"chosen": "\n\nHuman: x\n\nAssistant: a", "rejected": "\n\nHuman: x\n\nAssistant: b"},
        "\n\nHuman: x\n\nAssistant:",
    ),
    "messages that were answered": ({"messages": TALK + ANSWERS[0]}, TALK),
    "messages that were not": ({"messages": TALK}, TALK),
    "a longer talk": ({"messages": TALK + ANSWERS[0] + TALK + ANSWERS[1]}, TALK + ANSWERS[0] + TALK),
    "ranking": (ranked_row(), "p"),
    "ranking of messages": (ranked_row(responses=[*ANSWERS, "c"]), [{"role": "user", "content": "p"}]),
    "a text answered by messages": (
        {"prompt": "p", "chosen": ANSWERS[0], "rejected": ANSWERS[1]},
        [{"role": "user", "content": "p"}],
    ),
    "a prompt that is there twice": (
        {"prompt": "hi", "chosen": TALK + ANSWERS[0], "rejected": TALK + ANSWERS[1]},
        TALK,
    ),
    "unpaired": ({"prompt": "p", "completion": "a", "label": True}, "p"),
    "unpaired messages": (
        {"prompt": "p", "completion": ANSWERS[0], "label": True},
        [{"role": "user", "content": "p"}],
    ),
}


@pytest.mark.parametrize("name", FORMS)
def test_prompt_of_every_form(name):
    """As the row has it, and the prompt that `build` reads from it, to sample from and to train on."""
    row, prompt = FORMS[name]
    assert prompt_of(row) == prompt
    [e] = build([("f:1", row)], CHAT, "prompts", 100, 200)[0]
    [again] = build([("f:1", {"prompt": prompt})], CHAT, "prompts", 100, 200)[0]
    assert e.prompt == again.prompt
    if "messages" not in row:
        [trained] = build([("f:1", row)], CHAT, "unpaired" if "label" in row else "preference", 100, 200)[0]
        assert trained.prompt == e.prompt


@pytest.mark.parametrize("responses", [3, "abc", {"a": 1}, None])
def test_a_prompt_beside_odd_responses_is_a_prompt(responses):
    [e] = build([("f:1", {"prompt": "p", "responses": responses})], PLAIN, "prompts", 100, 200)[0]
    assert e.prompt_text == "p"


def test_split_by_a_column():
    """All rows of a value on one side, by the hash of the value: 60 topics of 5 rows, about a third held out."""
    rows = [{"prompt": f"p{i}", "chosen": "a", "rejected": "b", "meta": {"topic": i % 60}} for i in range(300)]
    examples = build([(f"f:{i}", row) for i, row in enumerate(rows, 1)], PLAIN, "preference", 100, 200)[0]
    train, held = held_out(examples, 0.3, "meta.topic")
    topics = [{e.row["meta"]["topic"] for e in part} for part in (train, held)]
    assert not topics[0] & topics[1] and len(topics[0]) + len(topics[1]) == 60 and 8 <= len(topics[1]) <= 30
    assert len(train) + len(held) == 300 and len(held) == 5 * len(topics[1])
    again = held_out(examples[::-1], 0.3, "meta.topic")[1]
    assert {e.where for e in again} == {e.where for e in held}
    for column in ("topic", "meta.theme", "prompt.topic", "meta.topic.deeper"):
        with pytest.raises(BadInput) as error:
            held_out(examples, 0.3, column)
        one_line(error, f"f:1: field '{column}' is missing")


def test_ties_by_hand(capsys):
    examples = [ranking([1, 1, 2]), ranking([3, 1, 2]), ranking([2, 1, 2])]
    with pytest.raises(BadInput, match="test:1: field 'ranks' has ties"):
        without_ties(examples, "refuse", 0)
    assert [e.ranks for e in without_ties(examples, "drop", 0)] == [[3, 1, 2]]
    seen = {tuple(map(tuple, (e.ranks for e in without_ties(examples, "random", seed)))) for seed in range(30)}
    assert seen == {
        (a, (3, 1, 2), b) for a in [(1, 2, 3), (2, 1, 3)] for b in [(2, 1, 3), (3, 1, 2)]
    }  # every order that the ties allow, and no other
    assert without_ties(examples, "random", 3) == without_ties(examples, "random", 3)
    assert without_ties(examples[1:2], "refuse", 0) == examples[1:2]
