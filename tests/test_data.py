import gzip
import json
import math
import os
import re
import sys
from dataclasses import replace
from pathlib import Path

import datasets
import pytest
import tyro
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import AutoTokenizer, PreTrainedTokenizerFast

import train_dpo
import train_sft
from rlhf import BadInput
from support import reviews, tokens
from support.examples import HH_TEMPLATE, KINDS, Example, build, held_out, load, load_split, show, split_of
from support.preferences import mismatched
from support.rows import _split_of, asked_by_user, prompt_of, read_rows, texts_of
from support.runs import repeated

REAL = Path(os.environ.get("RLHF_TEST_DATA", Path(__file__).parents[1] / "../shared/data"))

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA2 = (  # writes BOS itself, refuses two turns of one role in a row
    "{% for m in messages %}"
    "{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate') }}{% endif %}"
    "{% if m['role'] == 'user' %}{{ bos_token + '[INST] ' + m['content'] + ' [/INST]' }}"
    "{% else %}{{ ' ' + m['content'] + ' ' + eos_token }}{% endif %}{% endfor %}"
)
GEMMA = (  # ends turns with a token of its own, which is not EOS
    "{{ bos_token }}{% for m in messages %}"
    "{{ '<turn>' + m['role'] + '\n' + m['content'] | trim + '</turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<turn>assistant\n' }}{% endif %}"
)


QWEN = (  # shows tools, calls, and the thoughts of a last answer, as Qwen3's does
    "{% if tools %}{{ '<|im_start|>tools\n' + tools | map('tojson') | join('\n') + '<|im_end|>\n' }}{% endif %}"
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}"
    "{% if m.role == 'assistant' and loop.last %}"
    "{{ '<think>\n' + (m.reasoning_content or '') + '\n</think>\n' }}{% endif %}"
    "{{ m.content }}{% for call in m.tool_calls or [] %}{{ '<call>' + call.function.name + '</call>' }}{% endfor %}"
    "{{ '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def byte_level(merges=(), bos="<s>", adds_bos=True, eos="</s>", pad="<pad>", template=None, specials=()):
    """A byte-level BPE: ids are readable, one token a byte but for the merges."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: i for i, token in enumerate(alphabet + ["".join(pair) for pair in merges])}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=list(merges)))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    names = [name for name in dict.fromkeys((bos, eos, pad, *specials)) if name]
    backend.add_special_tokens([AddedToken(name, normalized=False) for name in names])
    if bos and adds_bos:
        backend.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", special_tokens=[(bos, backend.token_to_id(bos))]
        )
    named = {"bos_token": bos, "eos_token": eos, "pad_token": pad}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, **{k: v for k, v in named.items() if v})
    tokenizer.chat_template = template
    return tokenizer


PLAIN = byte_level()
CHAT = byte_level(bos=None, eos="<|im_end|>", pad="<|im_end|>", template=CHATML, specials=["<|im_start|>"])
THINKING = byte_level(bos=None, eos="<|im_end|>", pad="<|im_end|>", template=QWEN, specials=["<|im_start|>"])


def text(tokenizer, ids):
    return "".join(tokenizer.decode([i]) for i in ids)


def one(tokenizer, kind, row, prompt=100, total=200):
    [example], report = build([("f.jsonl:1", row)], tokenizer, kind, prompt, total)
    return example, report


def said(role, content):
    return {"role": role, "content": content}


def talk(*texts):
    """A dialogue of user and assistant in turn."""
    return [said(("user", "assistant")[i % 2], text) for i, text in enumerate(texts)]


def file(tmp_path, *rows, name="prefs.jsonl"):
    path = tmp_path / name
    path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows))
    return str(path)


# ------------------------------------------------------------------------------------------- token boundaries


def test_no_token_merges_across_the_boundary():
    tokenizer = byte_level(merges=[("a", "b")])
    assert len(tokenizer("ab", add_special_tokens=False)["input_ids"]) == 1  # it would, if tokenised together
    a, b = (tokenizer(c, add_special_tokens=False)["input_ids"] for c in "ab")
    for kind, row in {
        "sft": {"prompt": "a", "completion": "b"},
        "preference": {"prompt": "a", "chosen": "b", "rejected": "a"},
        "unpaired": {"prompt": "a", "completion": "b", "label": True},
    }.items():
        example, _ = one(tokenizer, kind, row)
        assert example.prompt == [tokenizer.bos_token_id, *a]
        assert example.responses[0] == [*b, tokenizer.eos_token_id]


@pytest.mark.parametrize("adds_bos", [True, False])
def test_one_bos_where_the_tokenizer_has_the_convention(adds_bos):
    tokenizer = byte_level(adds_bos=adds_bos)
    bos = ["<s>"] if adds_bos else []
    for prompt in ["hi", "<s>hi"]:
        example, report = one(tokenizer, "preference", {"prompt": prompt, "chosen": "x", "rejected": "y"})
        assert text(tokenizer, example.prompt) == "".join(bos or ["<s>"] * prompt.startswith("<s>")) + "hi"
        assert tokenizer.bos_token_id not in example.responses[0] + example.responses[1]
        assert report.bos == (adds_bos or prompt.startswith("<s>"))


@pytest.mark.parametrize("template", [CHATML, LLAMA2, GEMMA])
def test_one_bos_under_a_template(template):
    tokenizer = byte_level(template=template)  # LLAMA2 and GEMMA write BOS, and the tokenizer would add another
    example, report = one(tokenizer, "sft", {"messages": [said("user", "hi"), said("assistant", "yo")]})
    assert example.prompt.count(tokenizer.bos_token_id) == 1 and example.prompt[0] == tokenizer.bos_token_id
    assert report.bos == 1


@pytest.mark.parametrize("response", ["yes", "yes</s>"])
def test_one_eos_unless_cut(response):
    row = {"prompt": "p", "completion": response}
    example, report = one(PLAIN, "sft", row)
    assert text(PLAIN, example.responses[0]) == "yes</s>" and (report.eos, report.responses_cut) == (1, 0)
    example, report = one(PLAIN, "sft", row, total=5)  # <s> p y e s
    assert text(PLAIN, example.responses[0]) == "yes" and (report.eos, report.responses_cut) == (0, 1)


def test_eos_is_trained_where_pad_is_eos():
    tokenizer = byte_level(pad="</s>")
    assert tokenizer.pad_token_id == tokenizer.eos_token_id
    example, _ = one(tokenizer, "sft", {"prompt": "p", "completion": "r"})
    assert example.responses[0][-1] == tokenizer.eos_token_id and example.trained is None
    example, _ = one(CHAT, "sft", {"messages": [said(r, r) for r in ("user", "assistant", "user", "assistant")]})
    ends = [t for i, t in zip(example.responses[0], example.trained[0], strict=True) if i == CHAT.eos_token_id]
    assert ends == [True, False, True]  # the assistant's, the user's, the assistant's


@pytest.mark.parametrize(
    "template, prompt, response",
    [
        (CHATML, "<s><|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n", "yo<|im_end|>\n</s>"),
        (LLAMA2, "<s>[INST] hi [/INST]", " yo </s>"),
        (GEMMA, "<s><turn>user\nhi</turn>\n<turn>assistant\n", "yo</turn>\n</s>"),
        (None, "<s>\n\nHuman: hi\n\nAssistant:", " yo</s>"),
    ],
)
def test_templates_token_by_token(template, prompt, response):
    tokenizer = byte_level(template=template)
    example, _ = one(
        tokenizer, "preference", {"prompt": [said("user", "hi")], "chosen": [said("assistant", "yo")], "rejected": "no"}
    )
    assert text(tokenizer, example.prompt) == prompt
    assert text(tokenizer, example.responses[0]) == response
    assert text(tokenizer, example.responses[1]) == response.replace("yo", "no")


def test_the_response_ends_at_its_end_of_turn():
    example, _ = one(CHAT, "preference", {"prompt": [said("user", "hi")], "chosen": "a <|im_end|> b", "rejected": "c"})
    assert text(CHAT, example.responses[0]) == "a <|im_end|> b<|im_end|>"  # without the newline after it
    assert text(CHAT, example.responses[1]) == "c<|im_end|>"


# ------------------------------------------------------------------------------------------------ truncation


def test_truncation_by_hand():
    row = {"prompt": "0123456789", "chosen": "abcdefgh", "rejected": "xy"}
    example, report = one(PLAIN, "preference", row, prompt=4, total=9)
    assert text(PLAIN, example.prompt) == "<s>789"  # 4 tokens, BOS among them, from the right
    assert [text(PLAIN, r) for r in example.responses] == ["abcde", "xy</s>"]
    assert (report.prompts_cut, report.responses_cut, report.bos, report.eos) == (1, 1, 1, 1)
    assert (report.prompt_lengths, report.response_lengths) == ([4], [5, 3])
    assert (report.length_difference, report.longer_wins) == (2, 1)

    example, _ = one(PLAIN, "preference", row, prompt=11, total=14)
    assert text(PLAIN, example.prompt) == "<s>0123456789"  # fits to the token
    example, _ = one(PLAIN, "preference", row, prompt=1, total=3)
    assert text(PLAIN, example.prompt) == "<s>"
    example, _ = one(byte_level(bos=None), "preference", row, prompt=1, total=3)
    assert text(PLAIN, example.prompt) == "9"


def test_one_response_token_always_stays():
    example, _ = one(PLAIN, "preference", {"prompt": "0" * 50, "chosen": "ab", "rejected": "cd"}, prompt=1000, total=8)
    assert (len(example.prompt), [len(r) for r in example.responses]) == (7, [1, 1])


@settings(deadline=None)
@given(
    st.integers(1, 30),
    st.integers(2, 30),
    st.text("ab", min_size=1),
    st.text("ab", min_size=1),
    st.text("ab", min_size=1),
)
def test_truncation_properties(room, total, prompt, chosen, rejected):
    rows = [
        ("f:1", {"prompt": prompt, "chosen": chosen, "rejected": rejected}),
        ("f:2", {"prompt": "p", "chosen": "y", "rejected": "n"}),
    ]
    examples, report = build(rows, PLAIN, "preference", room, total)
    assert report.kept + report.dropped["identical responses"] == 2
    limit = min(room, total - 1)
    for example in examples:
        whole = [PLAIN.bos_token_id, *PLAIN(example.prompt_text, add_special_tokens=False)["input_ids"]]
        assert example.prompt == (
            whole if len(whole) <= limit else [whole[0], *whole[len(whole) - limit + 1 :]][:limit]
        )
        for ids, response in zip(example.responses, example.response_texts, strict=True):
            full = [*PLAIN(response, add_special_tokens=False)["input_ids"], PLAIN.eos_token_id]
            assert ids == full[: total - len(example.prompt)] and ids


def test_pairs_that_become_identical_are_dropped():
    rows = [
        ("f:1", {"prompt": "p", "chosen": "abc1", "rejected": "abc2"}),
        ("f:2", {"prompt": "p", "chosen": "same", "rejected": "same"}),
        ("f:3", {"prompt": "p", "chosen": "xbc1", "rejected": "abc2"}),
    ]
    examples, report = build(rows, PLAIN, "preference", 2, 5)
    assert [e.where for e in examples] == ["f:3"] and report.dropped == {"identical responses": 2}
    assert (report.rows, report.kept) == (3, 1) and "2 identical responses" in str(report)
    with pytest.raises(BadInput, match="^f: nothing is left of its 2 rows"):
        build(rows[:2], PLAIN, "preference", 2, 5)


# ------------------------------------------------------------------------------------------------ row forms


def test_rankings_and_pairs():
    example, report = one(
        PLAIN, "preference", {"prompt": "p", "responses": ["a", "bbb", "cc"], "ranks": [2, 1, 2.0], "annotator": "me"}
    )
    assert example.ranks == [2, 1, 2] and all(isinstance(rank, int) for rank in example.ranks)
    assert [text(PLAIN, r) for r in example.responses] == ["a</s>", "bbb</s>", "cc</s>"]
    assert (report.length_difference, report.longer_wins) == (((3 - 1) + (3 - 2)) / 2, 1)
    row = {"prompt": "p", "chosen": "a", "rejected": "bbb", "margin": 2, "probability": 0.75}
    example, report = one(PLAIN, "preference", row)
    assert (example.ranks, example.margin, example.probability, example.labels) == ([1, 2], 2.0, 0.75, None)
    assert example.row is row
    assert (report.length_difference, report.longer_wins) == (0.75 * -2 + 0.25 * 2, 0.25)
    example, report = one(PLAIN, "preference", {"prompt": "p", "chosen": "aa", "rejected": "bb"})
    assert (example.margin, example.probability, report.longer_wins) == (None, 1.0, 0.5)  # a tie is half
    tied = [
        ("f:1", {"prompt": "p", "responses": ["a", "b"], "ranks": [1, 1]}),
        ("f:2", {"prompt": "p", "responses": ["a", "b"], "ranks": [1, 2]}),
    ]
    assert build(tied, PLAIN, "preference", 9, 9)[1].dropped == {"ties throughout": 1}


def test_unpaired():
    example, report = one(PLAIN, "unpaired", {"prompt": "p", "completion": "a", "label": 0})
    assert (example.labels, example.ranks, report.desirable) == ([False], [1], 0.0)
    example, report = one(PLAIN, "unpaired", {"prompt": "p", "chosen": "a", "rejected": "b"})
    assert (example.labels, example.ranks, report.desirable) == ([True, False], [1, 2], 0.5)


def test_preferred_fine_tuning_and_prompts():
    pair = {"prompt": "p", "chosen": "a", "rejected": "b"}
    example, _ = one(PLAIN, "sft", pair)
    assert ([text(PLAIN, r) for r in example.responses], example.ranks) == (["a</s>"], [1])
    chat = [said("user", "hi"), said("assistant", "yo")]
    for row, prompt in [
        (pair, "<s>p"),
        ({"prompt": "p"}, "<s>p"),
        ({"prompt": chat[:1]}, "<s>\n\nHuman: hi\n\nAssistant:"),
        ({"messages": chat}, "<s>\n\nHuman: hi\n\nAssistant:"),
        ({"chosen": HH + " c", "rejected": HH + " d"}, "<s>" + HH),
        ({"question": "q", "answer": "a"}, "<s>q"),
        ({"messages": chat, "question": "q"}, "<s>\n\nHuman: hi\n\nAssistant:"),
    ]:
        example, report = one(PLAIN, "prompts", row)
        assert (text(PLAIN, example.prompt), example.responses, example.ranks) == (prompt, [], [])
        assert "1 of 1 rows" in str(report)


@pytest.mark.parametrize(
    "options, prompt, response",
    [
        ({}, "<s>", "hi</s>"),
        ({"adds_bos": False}, "<s>", "hi</s>"),
        ({"bos": None}, "</s>", "hi</s>"),
        ({"bos": None, "eos": None, "pad": None}, "h", "i"),
    ],
)
def test_text_rows(options, prompt, response):
    tokenizer = byte_level(**options)
    example, _ = one(tokenizer, "sft", {"text": "hi", "label": 1})
    assert (text(tokenizer, example.prompt), text(tokenizer, example.responses[0])) == (prompt, response)
    assert (example.prompt_text, example.response_texts, example.trained) == ("", ["hi"], None)


def test_a_tokenizer_without_eos_is_refused():
    with pytest.raises(BadInput, match="no EOS token"):
        one(byte_level(eos=None, pad=None), "sft", {"prompt": "p", "completion": "r"})


HH = "\n\nHuman: one\n\nAssistant: two\n\nHuman: three\n\nAssistant:"


@pytest.mark.parametrize(
    "chosen, rejected, prompt, rests",
    [
        (HH + " yes", HH + " you", HH, [" yes", " you"]),  # "y" is shared too, and belongs to the answers
        (HH + " yes", HH + " yes and no", HH, [" yes", " yes and no"]),
        (HH[2:] + " yes", HH[2:] + " no", HH[2:], [" yes", " no"]),  # copies of hh-rlhf whose texts are stripped
        ("\n\nSystem: s" + HH + " a", "\n\nSystem: s" + HH + " b", "\n\nSystem: s" + HH, [" a", " b"]),
    ],
)
def test_implicit_prompts(chosen, rejected, prompt, rests):
    example, _ = one(PLAIN, "preference", {"chosen": chosen, "rejected": rejected})
    assert (example.prompt_text, example.response_texts) == (prompt, rests)


FRUIT = {"chosen": "The answer is: An apple.", "rejected": "The answer is: A hammer."}


@pytest.mark.parametrize("name", ["question", "instruction", "query", "input"])
def test_a_prompt_of_another_name(name):
    """What two answers share is no prompt: it is in another column, which the report names."""
    row = {name: "Name a fruit.", **FRUIT, "system": None}
    example, report = one(PLAIN, "preference", row)
    assert (example.prompt_text, example.response_texts) == ("Name a fruit.", [*FRUIT.values()])
    assert f"prompt     the column '{name}' of 1 rows, which have no 'prompt'" in str(report)
    assert (prompt_of(example.row), example.row) == ("Name a fruit.", row | {"prompt": "Name a fruit."})
    example, report = one(PLAIN, "preference", row | {"prompt": "p"})
    assert example.prompt_text == "p" and "the column" not in str(report)
    example, _ = one(PLAIN, "unpaired", {name: [said("user", "p")], "completion": "a", "label": True})
    assert example.prompt_text == "\n\nHuman: p\n\nAssistant:"
    example, _ = one(PLAIN, "sft", {name: "p", "completion": "a", "prompt": None})
    assert example.prompt_text == "p"
    sides = {side: [said("user", "u"), said("assistant", side)] for side in ("chosen", "rejected")}
    example, _ = one(PLAIN, "preference", {name: "u", **sides})  # as with a prompt that is there twice
    assert (example.prompt_text, example.response_texts) == ("\n\nHuman: u\n\nAssistant:", [" chosen", " rejected"])


def test_a_prompt_is_not_guessed():
    for message, row in {
        r"field 'prompt' is missing, and 'chosen' and 'rejected' are no dialogues \('\\n\\nHuman: ...'\): rename the "
        r"field that holds the prompt to 'prompt' \(there are no others\)": FRUIT,
        r"rename the field that holds the prompt to 'prompt' \(there are 'context', 'id'\)": FRUIT
        | {"context": "c", "id": 1},
        r"'chosen' and 'rejected' are no dialogues": {"chosen": HH + " a", "rejected": HH[3:] + " b"},
        r"fields 'instruction' and 'input' can both be the prompt: join them": FRUIT
        | {"instruction": "Translate.", "input": "un chat"},
        r"fields 'question' and 'chosen' both hold the prompt: leave": {
            "question": "one",
            "chosen": HH + " a",
            "rejected": HH + " b",
        },
    }.items():
        with pytest.raises(BadInput, match=f"^f.jsonl:1: .*{message}"):
            one(PLAIN, "preference", row)
    example, _ = one(PLAIN, "preference", FRUIT | {"instruction": "Name a fruit.", "input": ""})  # Alpaca's empty input
    assert example.prompt_text == "Name a fruit."
    rows = [("f:1", {"question": "q", **FRUIT}), ("f:2", FRUIT), ("f:3", {"prompt": "p", **FRUIT})]
    examples, report = build(rows, PLAIN, "preference", 99, 199, skip_bad_rows=True)
    assert [e.prompt_text for e in examples] == ["q", "p"]
    assert report.skipped == ["f:2: field 'prompt' is missing: give it to every row"]


def test_implicit_prompts_as_messages():
    before = [said("system", "s"), said("user", "u"), said("assistant", "a"), said("user", "u")]
    sides = {name: [*before, said("assistant", name)] for name in ("chosen", "rejected")}
    explicit = {"prompt": before, "chosen": "chosen", "rejected": "rejected"}
    wanted, _ = one(CHAT, "preference", explicit)
    for row in [sides, {**sides, "prompt": "u"}]:  # the second form: whole dialogues beside their first prompt
        example, _ = one(CHAT, "preference", row)
        assert (example.prompt, example.responses) == (wanted.prompt, wanted.responses)
    assert text(CHAT, wanted.prompt) == (
        "<|im_start|>system\ns<|im_end|>\n<|im_start|>user\nu<|im_end|>\n<|im_start|>assistant\na<|im_end|>\n"
        "<|im_start|>user\nu<|im_end|>\n<|im_start|>assistant\n"
    )


def test_dialogues_that_hold_no_preference_are_dropped_and_counted():
    good = (HH + " a", HH + " b")
    pairs = [
        good,
        (HH + " a\n\nAssistant: c", HH + " b"),
        (HH + " a\n\nHuman: more", HH + " b"),
        (HH + " ", HH + " b"),
        (HH + " a", HH + " a"),
        (talk("u", "a", "v"), talk("u", "b")),
        ([*talk("u", "a"), said("assistant", "c")], talk("u", "b")),
        (HH + " a", HH + " a\n\nHuman: more\n\nAssistant: c"),
        (talk("u", "a", "v", "b"), talk("u", "a")),
    ]
    rows = [(f"f:{i}", {"chosen": a, "rejected": b}) for i, (a, b) in enumerate(pairs)]
    examples, report = build(rows, PLAIN, "preference", 100, 200)
    assert [e.where for e in examples] == ["f:0"]
    assert report.dropped == {
        "dialogues whose turns do not alternate": 4,
        "dialogues of which one goes on where the other ends": 2,
        "blank answers": 1,
        "identical responses": 1,
    }
    with pytest.raises(BadInput, match="f:1: fields 'chosen' and 'rejected' share no beginning"):
        build(
            [("f:1", {"chosen": "\n\nHuman: x" + ends, "rejected": "Human: y" + ends}) for ends in [HH]],
            PLAIN,
            "preference",
            9,
            99,
        )


# ------------------------------------------------------------------------------------------------ multi-turn


def test_multi_turn_mask_token_by_token():
    rows = [
        said("system", "S"),
        said("user", "A"),
        said("assistant", "B"),
        said("user", "C"),
        said("assistant", "D"),
        said("user", "trailing"),
    ]
    example, _ = one(CHAT, "sft", {"messages": rows})
    assert (
        example.prompt_text == "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nA<|im_end|>\n<|im_start|>assistant\n"
    )
    expected = [("B", True), ("<|im_end|>", True)]
    expected += [
        (t, False) for t in ["\n", "<|im_start|>", *"user\nC", "<|im_end|>", "\n", "<|im_start|>", *"assistant\n"]
    ]
    expected += [("D", True), ("<|im_end|>", True)]
    tokens = [CHAT.decode([i]) for i in example.responses[0]]
    assert list(zip(tokens, example.trained[0], strict=True)) == expected
    cut, _ = one(CHAT, "sft", {"messages": rows}, total=len(example.prompt) + 5)
    assert list(zip([CHAT.decode([i]) for i in cut.responses[0]], cut.trained[0], strict=True)) == expected[:5]


def test_multi_turn_without_a_template():
    rows = [said("user", "A"), said("assistant", "B"), said("user", "C"), said("assistant", "D")]
    example, _ = one(PLAIN, "sft", {"messages": rows})
    tokens = [PLAIN.decode([i]) for i in example.responses[0]]
    marks = "".join("+" if t else "." for t in example.trained[0])
    assert "".join(tokens) == " B</s>\n\nHuman: C\n\nAssistant: D</s>"
    assert marks == "+++" + "." * len("\n\nHuman: C\n\nAssistant:") + "+++"


def marked(tokenizer, example):
    """Each response as text, with a + or . for every token: trained or not."""
    masks = example.trained or [[True] * len(response) for response in example.responses]
    return [
        (text(tokenizer, response), "".join("+" if t else "." for t in mask))
        for response, mask in zip(example.responses, masks, strict=True)
    ]


NEXT = "\n<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"  # what CHAT has between two answers
GAP = "." * (1 + 1 + len("user\n") + 1 + 1 + 1 + len("assistant\n"))  # its tokens, but for those of the question


@pytest.mark.parametrize("prompt", [None, "u", "messages"])
def test_a_preference_between_dialogues_trains_all_answers_from_the_fork_on(prompt):
    """The dialogues part in the second answer and go on for a turn; the prompt may stand beside them."""
    before, chosen, rejected = talk("u", "a", "v"), talk("u", "bc", "Xyz", "d")[1:], talk("u", "e", "Z", "fgh")[1:]
    row = {"chosen": before + chosen, "rejected": before + rejected}
    if prompt == "messages":
        row = {"prompt": before, "chosen": chosen, "rejected": rejected}
    example, report = one(CHAT, "preference", row | ({"prompt": "u"} if prompt == "u" else {}))
    assert text(CHAT, example.prompt) == (
        "<|im_start|>user\nu<|im_end|>\n<|im_start|>assistant\na<|im_end|>" + NEXT.format("v")
    )
    assert marked(CHAT, example) == [
        (f"bc<|im_end|>{NEXT.format('Xyz')}d<|im_end|>", f"+++{GAP}...++"),
        (f"e<|im_end|>{NEXT.format('Z')}fgh<|im_end|>", f"++{GAP}.++++"),
    ]
    assert example.lengths == [5, 6] and report.length_difference == -1 and report.longer_wins == 0
    assert "turns      responses of 1 rows have several: the assistant's are trained, from where" in str(report)
    assert [*map(len, example.responses)] == [28, 27]
    assert "responses  27.5 tokens on average, 5.5 of them trained, 28 at most" in str(report)


@pytest.mark.parametrize("tokenizer", [PLAIN, CHAT])
def test_a_preference_between_hh_dialogues_trains_all_answers_from_the_fork_on(tokenizer):
    """Texts are used as they are, but each trained answer ends in EOS, whichever template the tokenizer has."""
    question, eos = "\n\nHuman: go on\n\nAssistant:", tokenizer.eos_token
    row = {"chosen": f"{HH} b{question} cd", "rejected": f"{HH} e"}
    example, report = one(tokenizer, "preference", row)
    assert text(tokenizer, example.prompt).removeprefix("<s>") == HH
    dots = "." * len(question)
    assert marked(tokenizer, example) == [(f" b{eos}{question} cd{eos}", f"+++{dots}++++"), (f" e{eos}", "+++")]
    assert example.lengths == [7, 3] and (report.dialogues, report.length_difference) == (1, 4)


def test_dialogues_that_part_in_a_users_turn():
    """The answer before it is shared: it is read, and not trained. The prompt ends where the assistant speaks."""
    sides = talk("u", "a", "v", "b"), talk("u", "a", "ww", "c")
    for row in (
        {"chosen": sides[0], "rejected": sides[1]},
        {"prompt": "u", "chosen": sides[0][1:], "rejected": sides[1][1:]},
        {"prompt": "u", "responses": [side[1:] for side in sides], "ranks": [1, 2]},
    ):
        example, _ = one(CHAT, "preference", row)
        assert example.prompt_text == "<|im_start|>user\nu<|im_end|>\n<|im_start|>assistant\n"
        assert marked(CHAT, example) == [
            (f"a<|im_end|>{NEXT.format('v')}b<|im_end|>", f"..{GAP}.++"),
            (f"a<|im_end|>{NEXT.format('ww')}c<|im_end|>", f"..{GAP}..++"),
        ]
    row = {"prompt": "u", "chosen": talk("u", "a")[1:], "rejected": sides[1][1:]}
    with pytest.raises(BadInput, match="1 dialogues of which one goes on where the other ends"):
        one(CHAT, "preference", row)
    row = {side: f"{HH} a\n\nHuman: {q}\n\nAssistant: {q}" for side, q in (("chosen", "v"), ("rejected", "w"))}
    example, _ = one(PLAIN, "preference", row)
    assert example.prompt_text == HH
    dots = "." * len(" a\n\nHuman: v\n\nAssistant:")
    assert marked(PLAIN, example)[0] == (" a\n\nHuman: v\n\nAssistant: v</s>", f"{dots}+++")
    rows = [("f:1", row), ("f:2", {side: f"{HH} {side}" for side in ("chosen", "rejected")})]
    examples, report = build(rows, PLAIN, "preference", 100, len(example.prompt) + len(dots))
    assert [e.where for e in examples] == ["f:2"]
    assert report.dropped == {"responses cut before their first trained token": 1}


def test_responses_with_several_turns_in_every_kind_of_row():
    answers = talk("u", "b", "v", "d")[1:], talk("u", "e")[1:]
    trained = [f"++{GAP}.++", "++"]
    pair = {"prompt": "u", "chosen": answers[0], "rejected": answers[1]}
    ranking = {"prompt": "u", "responses": [*answers[::-1]], "ranks": [2, 1]}
    for kind, row, marks in (
        ("preference", pair, trained),
        ("preference", ranking, trained[::-1]),
        ("unpaired", pair, trained),
        ("unpaired", {"prompt": "u", "completion": answers[0], "label": True}, trained[:1]),
        ("sft", pair, trained[:1]),
        ("sft", {"prompt": "u", "completion": answers[0]}, trained[:1]),
    ):
        example, report = one(CHAT, kind, row)
        assert [mark for _, mark in marked(CHAT, example)] == marks and report.dialogues == 1
    example, report = one(CHAT, "prompts", {"chosen": talk("u", *"bvd"), "rejected": talk("u", *"evd")})
    assert example.prompt_text == "<|im_start|>user\nu<|im_end|>\n<|im_start|>assistant\n" and not example.responses
    assert report.dialogues == 0
    row = ranking | {"responses": [*answers], "ended": [True, True]}
    with pytest.raises(BadInput, match=r"field 'responses\[0\]': roles out of order: give it exactly one"):
        one(CHAT, "preference", row)
    with pytest.raises(BadInput, match="a response has several turns, and rewards are of one: leave"):
        texts_of(pair)
    assert texts_of({"chosen": HH + " a", "rejected": HH + " b"}) == [" a", " b"]
    with pytest.raises(BadInput, match="the chat template rewrites earlier turns: give rows of one answer"):
        one(THINKING, "preference", pair)


def test_consecutive_turns_of_one_role_are_fine():
    example, _ = one(
        CHAT, "preference", {"prompt": [said("user", "a"), said("user", "b")], "chosen": "x", "rejected": "y"}
    )
    assert example.prompt_text.count("user") == 2


# ----------------------------------------------------------- a tokenizer without a template, doubts in the report


def hh_form(messages, generate):
    """The hh-rlhf form, written down once more."""
    names = {"system": "System", "user": "Human", "assistant": "Assistant", "tool": "Tool"}
    turns = [f"\n\n{names[m['role']]}: {m['content']}" for m in messages]
    return "".join(turns) + "\n\nAssistant:" * generate


@given(
    st.lists(st.builds(said, st.sampled_from(["system", "user", "assistant", "tool"]), st.text()), min_size=1),
    st.booleans(),
)
def test_the_template_that_stands_in_is_the_hh_form(messages, generate):
    options = {"tokenize": False, "chat_template": HH_TEMPLATE, "add_generation_prompt": generate}
    assert PLAIN.apply_chat_template(messages, **options) == hh_form(messages, generate)


def test_the_template_that_stands_in_is_saved(tmp_path, capsys):
    """The tokenizer keeps it, and the saved one makes the same tokens, EOS after each trained turn among them."""
    tokenizer = byte_level()
    a = train_dpo.Args(data=file(tmp_path, {"prompt": "p", "completion": "a"}))
    load(a.data, "sft", tokenizer, a)
    assert tokenizer.chat_template is None and "template  " not in capsys.readouterr().out
    row = {"messages": [said(role, role[0]) for role in ("system", "user", "assistant", "user", "assistant")]}
    a = train_dpo.Args(data=file(tmp_path, row))
    [before] = load(a.data, "sft", tokenizer, a)
    line = r"template   the tokenizer has none: 1 rows of messages are written as '\n\nHuman: ...\n\nAssistant: ...'"
    assert line in capsys.readouterr().out
    tokenizer.save_pretrained(tmp_path)
    saved = AutoTokenizer.from_pretrained(tmp_path)
    assert saved.chat_template == HH_TEMPLATE
    [after] = load(a.data, "sft", saved, a)
    assert "template  " not in capsys.readouterr().out
    assert text(saved, before.prompt) == "<s>" + hh_form(row["messages"][:2], True)
    assert text(saved, before.responses[0]) == " a</s>\n\nHuman: u\n\nAssistant: a</s>"
    assert (after.prompt, after.responses, after.trained) == (before.prompt, before.responses, before.trained)


def test_strings_under_a_chat_template_are_counted():
    rows = [("f:1", PAIR), ("f:2", CHATTED), ("f:3", PAIR | {"chosen": "c"})]
    _, report = build(rows, CHAT, "preference", 99, 199)
    assert "template   2 rows are strings, used without the tokenizer's chat template\n" in str(report)
    _, report = build(rows, PLAIN, "preference", 99, 199)
    assert "template   the tokenizer has none: 1 rows of messages" in str(report)
    assert "template" not in str(build(rows[1:2], CHAT, "preference", 99, 199)[1])
    assert "template" not in str(build(rows[:1], PLAIN, "preference", 99, 199)[1])


@pytest.mark.parametrize(
    "prompt, chosen, rejected, n",
    [
        ("Why?", "Why? So.", " Why? No.", 1),
        ("Why?", "Why? So.", "No.", 1),
        ("Why?", "No.", "Why? So.", 1),
        ("Why?", "So: Why?", "No.", 0),
        ("Why?", "Why? ", "No.", 0),  # an answer, if a poor one
        ("a", "a", "a b", 1),
        ("a", "ab", "ac", 0),  # another word
        ("a", "ab", "a c", 1),
        ("one", HH[:14] + "\n\nAssistant: a", HH[:14] + "\n\nAssistant: b", 1),
        (HH, HH + " a", HH + " b", 1),
        (HH, " a", " b", 0),
    ],
)
def test_responses_that_repeat_their_prompt_are_counted(prompt, chosen, rejected, n):
    row = {"prompt": prompt, "chosen": chosen, "rejected": rejected}
    _, report = build([("f:1", row), ("f:2", PAIR)], PLAIN, "preference", 99, 199)
    assert ("repeats    responses of 1 rows begin with their prompt" in str(report)) == n and report.repeats == n
    row = {"prompt": prompt, "responses": [rejected, "c", chosen], "ranks": [1, 2, 3]}
    assert one(PLAIN, "preference", row)[1].repeats == n


def test_scores_and_margins_against_the_preference_are_counted():
    scores = [(1, 2), (2, 1), (3, 3), (None, 1), ("1", "10"), (0.5, 0.75), ("4/5", 9), (True, 2), ("", 1)]
    rows = [(f"f:{i}", PAIR | {"score_chosen": x, "score_rejected": y}) for i, (x, y) in enumerate(scores)]
    rows += [("f:9", PAIR | {"margin": margin}) for margin in (-1, 0, 1, -0.5, None, -2)]
    rows += [("f:9", PAIR | {"chosen_rating": 1, "rejected_rating": 5})]
    for kind in ("preference", "sft", "unpaired"):
        shown = str(build(rows, PLAIN, kind, 99, 199)[1])
        assert "scores     'score_chosen' is not above 'score_rejected' in 4 rows, but chosen is preferred\n" in shown
        assert "scores     'chosen_rating' is not above 'rejected_rating' in 1 rows, but chosen is preferred\n" in shown
        assert "scores     'margin' is not above 0 in 4 rows, but chosen is preferred\n" in shown
        unused = "unused     columns that the model does not see: 'margin'\n"
        assert (unused in shown) == (kind != "preference") and ("unused" in shown) == (kind != "preference")
    shown = str(build(rows, PLAIN, "prompts", 99, 199)[1])
    assert "scores" not in shown and "unused" not in shown
    shown = str(build(rows[1:2], PLAIN, "preference", 99, 199)[1])
    assert "scores" not in shown


def test_scores_in_a_csv(tmp_path):
    lines = ["prompt,chosen,rejected,score_chosen,score_rejected,chosen_rating", "p,a,b,9,10,x", "q,a,b,1.5,1,"]
    rows, _ = read_rows(file(tmp_path, *lines, name="s.csv"))
    assert [(row["score_chosen"], row["score_rejected"], row["chosen_rating"]) for _, row in rows] == [
        (9, 10, "x"),
        (1.5, 1, None),
    ]
    shown = str(build(rows, PLAIN, "preference", 99, 199)[1])
    assert "scores     'score_chosen' is not above 'score_rejected' in 1 rows" in shown


# ------------------------------------------------------------------------- fields of messages, system, tools, unused

USER, FOUR = "<|im_start|>user\n2 + 2?<|im_end|>\n<|im_start|>assistant\n", "<think>\n\n</think>\nfour<|im_end|>"
ASKED = [said("user", "2 + 2?")]
CALL = {"role": "assistant", "content": None, "tool_calls": [{"type": "function", "function": {"name": "add"}}]}
TOOLS = [{"type": "function", "function": {"name": "add"}}]


def test_fields_of_messages_reach_the_template():
    thought = said("assistant", "four") | {"reasoning_content": "think", "tool_calls": None, "name": ""}
    row = {"prompt": ASKED, "chosen": [thought], "rejected": [said("assistant", "four")]}
    example, _ = one(THINKING, "preference", row)
    assert (example.prompt_text, example.response_texts) == (USER, [FOUR.replace("\n\n", "\nthink\n"), FOUR])
    messages = [said("user", "2 + 2?"), CALL, said("tool", "4"), thought]
    example, _ = one(THINKING, "sft", {"messages": messages[:2]})
    assert example.response_texts == ["<think>\n\n</think>\n<call>add</call><|im_end|>"]
    example, _ = one(THINKING, "preference", {"prompt": messages[:3], "chosen": [thought], "rejected": "no"})
    assert example.prompt_text == USER + (
        "<call>add</call><|im_end|>\n<|im_start|>tool\n4<|im_end|>\n<|im_start|>assistant\n"
    )
    assert example.response_texts == [FOUR.replace("\n\n", "\nthink\n"), FOUR.replace("four", "no")]
    with pytest.raises(BadInput, match="an answer has 'reasoning_content', and rewards are of texts"):
        texts_of(example.row)


def test_fields_of_a_ranked_answer_reach_the_template():
    """With `ended` too. An answer that was cut has nothing but its text, and so have token ids."""
    thought = said("assistant", "four") | {"reasoning_content": "think"}
    row = {"prompt": ASKED, "responses": [[thought], "five", [CALL]], "ranks": [1, 2, 3]}
    want = [
        FOUR.replace("\n\n", "\nthink\n"),
        FOUR.replace("four", "five"),
        "<think>\n\n</think>\n<call>add</call><|im_end|>",
    ]
    assert one(THINKING, "preference", row)[0].response_texts == want
    want[1] = "five<|im_end|>"  # the model wrote no thought
    assert one(THINKING, "preference", row | {"ended": [True, True, True]})[0].response_texts == want
    want[1] = "five"
    assert one(THINKING, "preference", row | {"ended": [True, False, True]})[0].response_texts == want
    for i, name in ((0, "reasoning_content"), (2, "tool_calls")):
        ended = [j != i for j in range(3)]
        with pytest.raises(BadInput, match=rf"field 'responses\[{i}\]' was cut \('ended' is false\) and has '{name}'"):
            one(THINKING, "preference", row | {"ended": ended})
    ids = THINKING(["four", "five", "six"], add_special_tokens=False)["input_ids"]
    row |= {"token_ids": ids, "tokenizer": tokens.digest(THINKING)}
    with pytest.raises(BadInput, match=r"field 'responses\[0\]' has 'reasoning_content', and 'token_ids' spell texts"):
        one(THINKING, "preference", row)


def test_a_field_of_one_message_does_not_hide_that_of_another():
    """The template shows the thought of the last answer only, calls of answers and no names of users."""
    first, last = (said("assistant", x) | {"reasoning_content": f"thought of {x}"} for x in ("4", "5"))
    for message, kind, row in [
        (
            "'reasoning_content' of message 2",
            "preference",
            {"prompt": [*ASKED, first, *ASKED], "chosen": [last], "rejected": "no"},
        ),
        (
            "'reasoning_content' of message 1",
            "sft",
            {"prompt": [ASKED[0] | {"reasoning_content": "x"}], "completion": [last]},
        ),
        ("'name' of message 3", "sft", {"messages": [*ASKED, CALL, said("tool", "4") | {"name": "add"}, first]}),
        ("'tools'", "sft", {"messages": [*ASKED, CALL], "tools": TOOLS}),
    ]:
        template = QWEN.replace("{% if tools %}", "{% if false %}")
        template = template.replace("{{ m.content }}", "{{ (m.name or '') * (m.role == 'user') + m.content }}")
        tokenizer = byte_level(bos=None, eos="<|im_end|>", template=template, specials=["<|im_start|>"])
        with pytest.raises(BadInput, match=f"^f.jsonl:1: the chat template does not use {message}: leave it out"):
            one(tokenizer, kind, row)
    named = {"prompt": [ASKED[0] | {"name": "Ann: "}], "completion": [last]}
    assert "<|im_start|>user\nAnn: 2 + 2?" in one(tokenizer, "sft", named)[0].prompt_text


@pytest.mark.parametrize("tokenizer", [CHAT, PLAIN])
def test_fields_that_the_template_drops_are_refused(tokenizer):
    thought, weight = (said("assistant", "four") | x for x in ({"reasoning_content": "think"}, {"weight": 0}))
    for kind, name, row in [
        ("preference", "reasoning_content", {"prompt": ASKED, "chosen": [thought], "rejected": "no"}),
        ("preference", "reasoning_content", {"prompt": ASKED, "chosen": "no", "rejected": [thought]}),
        (
            "preference",
            "reasoning_content",
            {"chosen": [*ASKED, said("assistant", "5")], "rejected": [*ASKED, thought]},
        ),
        ("sft", "tool_calls", {"messages": [*ASKED, CALL]}),
        ("sft", "weight", {"messages": [*ASKED, weight]}),
        ("unpaired", "weight", {"prompt": ASKED, "completion": [weight], "label": True}),
        ("prompts", "name", {"prompt": [ASKED[0] | {"name": "Ann"}]}),
        ("prompts", "name", {"messages": [ASKED[0] | {"name": "Ann"}]}),
        ("prompts", "tools", {"messages": ASKED, "tools": TOOLS}),
        ("sft", "tools", {"messages": [*ASKED, said("assistant", "4")], "tools": TOOLS}),
    ]:
        with pytest.raises(BadInput, match=f"^f.jsonl:1: the chat template does not use '{name}'.*: leave it out"):
            one(tokenizer, kind, row)
    rows = [("f:1", {"messages": [*ASKED, weight]}), ("f:2", {"messages": [*ASKED, said("assistant", "4")]})]
    examples, report = build(rows, tokenizer, "sft", 99, 199, skip_bad_rows=True)
    assert [e.where for e in examples] == ["f:2"] and "does not use 'weight'" in report.skipped[0]


@pytest.mark.parametrize("role", ["system", "user", "tool"])
def test_a_message_that_the_template_drops_is_refused(role):
    """Phi-3-mini's template leaves out the system message."""
    tokenizer = byte_level(
        bos=None,
        eos="<|im_end|>",
        template=CHATML.replace("in messages", f"in messages if m['role'] != '{role}'"),
        specials=["<|im_start|>"],
    )
    before = [said("system", "Be brief."), *ASKED, said("assistant", "calls"), said("tool", "result")]
    asked = {"system": before[:2], "user": ASKED, "tool": before[1:]}[role]
    rows = [
        ("preference", {"prompt": asked, "chosen": "four", "rejected": "no"}),
        ("preference", {"prompt": asked, "responses": ["four", "no"], "ranks": [1, 2]}),
        ("sft", {"messages": [*asked, said("assistant", "four")]}),
        ("prompts", {"prompt": asked}),
    ]
    if role == "system":
        rows += [(kind, row | {"prompt": ASKED, "system": "Be brief."}) for kind, row in rows if "prompt" in row]
    for kind, row in rows:
        with pytest.raises(BadInput, match=f"^f.jsonl:1: the chat template does not use the {role} message: leave"):
            one(tokenizer, kind, row)
        assert one(CHAT, kind, row)[0].prompt
    trimmed = byte_level(bos=None, eos="<|im_end|>", template=CHATML.replace("m['content']", "m['content'] | trim"))
    assert "<|im_start|>user\n2<|im_end|>" in one(trimmed, "prompts", {"prompt": [said("user", " 2\n")]})[0].prompt_text


def test_a_thought_that_the_template_drops_is_refused():
    """R1's template keeps what follows </think>. A sampled answer is its own text, whatever a template makes of it."""
    template = CHATML.replace("m['content']", "m['content'].split('</think>')[-1]")
    tokenizer = byte_level(bos=None, eos="<|im_end|>", template=template, specials=["<|im_start|>"])
    thought = "<think>so</think>four"
    for kind, row in [
        ("preference", {"prompt": ASKED, "chosen": thought, "rejected": "no"}),
        ("sft", {"messages": [*ASKED, said("assistant", thought)]}),
        ("sft", {"prompt": ASKED, "completion": thought}),
    ]:
        with pytest.raises(BadInput, match="^f.jsonl:1: the chat template leaves out a part of the answer"):
            one(tokenizer, kind, row)
        assert one(CHAT, kind, row)[0].response_texts[0] == f"{thought}<|im_end|>"
    sampled = {"prompt": ASKED, "responses": [thought, "no"], "ranks": [1, 2], "ended": [True, True]}
    assert one(tokenizer, "preference", sampled)[0].response_texts[0] == f"{thought}<|im_end|>"
    spaced = byte_level(
        bos=None,
        eos="<|im_end|>",
        template=CHATML.replace("m['content']", "m['content'].replace('</think>', '\n</think>\n')"),
    )
    row = {"prompt": ASKED, "completion": thought}
    assert one(spaced, "sft", row)[0].response_texts == ["<think>so\n</think>\nfour<|im_end|>"]


def calling(*all_arguments):
    """Dialogues that end in a call of a tool with these arguments."""
    call = lambda arguments: {"type": "function", "function": {"name": "weather", "arguments": arguments}}  # noqa: E731
    answer = lambda arguments: {"role": "assistant", "content": "", "tool_calls": [call(arguments)]}  # noqa: E731
    return [{"messages": [*ASKED, answer(arguments)]} for arguments in all_arguments]


CALLS = CHATML.replace(
    "m['content']", "m['content'] + (m.tool_calls[0].function.arguments | tojson if m.tool_calls else '')"
)


@pytest.mark.parametrize("form", ["parquet", "folder"])
def test_arguments_of_a_call_do_not_get_those_of_other_calls(form, tmp_path):
    """Arrow gives all objects in a column the same fields, and fills them with nulls."""
    rows = calling({"city": "X"}, {"zip": [1, 2]})
    if form == "parquet":
        written(tmp_path, "calls.parquet", *rows)
    else:
        datasets.Dataset.from_list(rows).save_to_disk(tmp_path / "calls")
    found, _ = read_rows(str(tmp_path / ("calls.parquet" if form == "parquet" else "calls")))
    assert [row["messages"][1]["tool_calls"][0]["function"]["arguments"] for _, row in found] == [
        {"city": "X"},
        {"zip": [1, 2]},
    ]


def test_arguments_that_are_json_already():
    tokenizer = byte_level(bos=None, eos="<|im_end|>", template=CALLS)
    (row,) = calling({"city": "X"})
    assert one(tokenizer, "sft", row)[0].response_texts == ['{"city": "X"}<|im_end|>']
    (row,) = calling("")
    assert one(tokenizer, "sft", row)[0].response_texts == ['""<|im_end|>']
    (row,) = calling('{"city": "X"}')
    with pytest.raises(BadInput, match="arguments of a tool call, which are a text, as a JSON string: give the object"):
        one(tokenizer, "sft", row)
    as_they_are = byte_level(bos=None, eos="<|im_end|>", template=CALLS.replace(" | tojson", ""))
    assert one(as_they_are, "sft", row)[0].response_texts == ['{"city": "X"}<|im_end|>']


@pytest.mark.parametrize(
    "calls", ["text", {"name": "f"}, ["text"], [{"function": None, "name": "f"}], [{"function": "f"}], [{"name": "f"}]]
)
def test_strange_calls_of_tools_do_not_end_the_program(calls):
    row = {"messages": [*ASKED, {"role": "assistant", "content": "", "tool_calls": calls}]}
    with pytest.raises(BadInput, match="does not use 'tool_calls' of message 2"):
        one(CHAT, "sft", row)


def test_no_calls_are_no_calls():
    """Mistral's templates write the calls in place of the content if `tool_calls` is there."""
    template = CHATML.replace("m['content']", "(m['content'] if m.tool_calls is not defined else 'CALLS')")
    tokenizer = byte_level(bos=None, eos="<|im_end|>", template=template)
    row = {"messages": [*ASKED, said("assistant", "four") | {"tool_calls": []}]}
    assert one(tokenizer, "sft", row)[0].response_texts == ["four<|im_end|>"]


def test_labelled_dialogues():
    """LLaMA-Factory's and ms-swift's form for KTO. For SFT an undesirable answer is dropped, in any form of row."""
    rows = [
        ("f:1", {"messages": talk("q", "yes"), "label": True}),
        ("f:2", {"messages": talk("q", "no"), "label": False}),
    ]
    examples, report = build(rows, CHAT, "unpaired", 99, 199)
    assert [(e.response_texts, e.labels) for e in examples] == [
        (["yes<|im_end|>"], [True]),
        (["no<|im_end|>"], [False]),
    ]
    assert examples[0].prompt_text == "<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\n" and not report.unused
    pairs = [("f:1", UNPAIRED), ("f:2", UNPAIRED | {"label": 0}), ("f:3", UNPAIRED | {"label": False})]
    for labelled, n in ((rows, 1), (pairs, 2)):  # 0 may be one of many classes
        examples, report = build(labelled, CHAT, "sft", 99, 199)
        assert [e.where for e in examples] == ["f:1", "f:2"][:n] and report.dropped == {"undesirable completions": 1}
    chosen = PAIR | {"messages": talk("q", "a"), "label": True}
    assert one(PLAIN, "unpaired", chosen)[0].labels == [True, False]
    with pytest.raises(BadInput, match="field 'messages' does not end in the answer that 'label' judges"):
        one(CHAT, "unpaired", {"messages": ASKED, "label": True})


def test_a_prompt_beside_the_dialogue_that_it_begins():
    """HuggingFaceH4/no_robots and ultrachat_200k: `prompt` is the first question of `messages`."""
    dialogue = [said("system", "s"), *talk("first", "answer", "second", "last")]
    example, report = one(CHAT, "prompts", {"prompt": "first", "messages": dialogue})
    assert prompt_of(example.row) == dialogue[:-1] and report.unused == {"prompt"} and report.untemplated == 0
    assert example.prompt_text.endswith("second<|im_end|>\n<|im_start|>assistant\n") and "first" in example.prompt_text
    assert asked_by_user(example.row) == example.row
    row = {"prompt": "first", "messages": dialogue, "completion": "c"}
    assert one(CHAT, "prompts", row)[0].prompt_text == "first" == prompt_of(row)
    for messages in ([], "text", ["text"], talk("another", "answer")):  # not the prompt's
        row = {"prompt": "first", "messages": messages}
        assert one(CHAT, "prompts", row)[0].prompt_text == "first" == prompt_of(row)
    shared = {"prompt": "first", "messages": [{"from": "human", "value": "first"}, {"from": "gpt", "value": None}]}
    assert asked_by_user(shared) == shared


def test_strings_that_are_not_what_they_seem():
    messages = json.dumps([said("assistant", "a")])
    for row in [PAIR | {name: messages} for name in PAIR] + [CHATTED | {"chosen": messages}]:
        with pytest.raises(BadInput, match=r"^f.jsonl:1: a text is the JSON of messages \('\[\{"):
            one(PLAIN, "preference", row)
    with pytest.raises(BadInput, match=r"^f.jsonl:1: a text is the JSON of messages"):
        one(PLAIN, "sft", {"text": str(talk("q", "a"))})
    for answer in ('[{"value": 3, "unit": "kg"}]', '[{"role": "admin", "name": "x"}]'):
        assert one(PLAIN, "sft", {"prompt": "p", "completion": answer})[0].response_texts == [answer]
    answered = {"prompt": "p", "responses": [messages, "b"], "ranks": [1, 2], "ended": [True, True]}
    assert one(PLAIN, "preference", answered)[0].response_texts[0] == messages  # a model wrote it
    with pytest.raises(BadInput, match="fields 'text' and 'role' make the row a single message"):
        one(PLAIN, "sft", {"text": "t", "role": "prompter"})
    assert one(PLAIN, "sft", {"text": "tt", "role": "engineer"})
    ended = {"prompt": "<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\n", "completion": "a<|im_end|>\n"}
    example, report = one(CHAT, "sft", ended)
    assert text(CHAT, example.responses[0]) == "a<|im_end|>" and report.joined == 0


def test_texts_without_a_space_between_them_are_counted():
    rows = [("f:1", PAIR), ("f:2", PAIR | {"prompt": "p "}), ("f:3", PAIR | {"chosen": " a"})]
    rows += [("f:4", PAIR | {"chosen": "\na", "rejected": "\nb"})]
    line = "joined     in 2 rows of strings, prompt and response have no space between them\n"
    assert line in str(build(rows, PLAIN, "preference", 99, 199)[1])
    assert "joined" not in str(one(PLAIN, "sft", {"text": "t"})[1]) + str(one(CHAT, "preference", CHATTED)[1])
    words = reviews.tokenizer()  # which has no spaces
    assert build(reviews.rows("preference", 5), words, "preference", 64, 128)[1].joined == 0


def test_content_in_parts():
    parts = [{"type": "text", "text": "2 +", "image": None}, {"type": "text", "text": " 2?"}]
    answer = [{"role": "assistant", "content": [{"type": "text", "text": "four"}]}]
    row = {"prompt": [said("user", parts)], "chosen": answer, "rejected": "no"}
    example, _ = one(THINKING, "preference", row)
    assert (example.prompt_text, example.response_texts[0]) == (USER, FOUR) and texts_of(example.row) == ["four", "no"]
    for part, kind in [
        ({"type": "image", "image": "x.png"}, "'image'"),
        ({"type": "image_url", "image_url": {}}, "'image_url'"),
        ({"type": "text", "text": "a", "cache": 1}, "with 'cache'"),
        ({"type": "text", "text": None}, "'text'"),
        ("a", "None"),
    ]:
        with pytest.raises(BadInput, match=f"field 'prompt', message 1 has a part {kind}: only parts"):
            one(THINKING, "preference", row | {"prompt": [said("user", [*parts, part])]})
    with pytest.raises(BadInput, match="field 'prompt', message 1 has no content"):
        one(THINKING, "preference", row | {"prompt": [said("user", [])]})


def test_a_system_column():
    plain = {"prompt": "2 + 2?", "chosen": "4", "rejected": "5"}
    strings = [
        ("preference", plain),
        ("preference", {"prompt": "2 + 2?", "responses": ["4", "5"], "ranks": [1, 2]}),
        ("preference", {"question": "2 + 2?", "chosen": "4", "rejected": "5"}),
        ("unpaired", {"prompt": "2 + 2?", "completion": "4", "label": True}),
        ("sft", {"prompt": "2 + 2?", "completion": "4"}),
        ("prompts", {"prompt": "2 + 2?"}),
        ("prompts", {"instruction": "2 + 2?", "output": "4"}),
    ]
    answers = {name: [said("assistant", name)] for name in ("chosen", "rejected")}
    dialogues = {name: ASKED + answer for name, answer in answers.items()}
    with_system = [said("system", "Be brief."), *ASKED]
    expected = "<|im_start|>system\nBe brief.<|im_end|>\n" + USER
    for kind, row in [
        ("preference", {"prompt": ASKED, **answers}),
        ("preference", {"prompt": "2 + 2?", **answers}),
        ("preference", {"question": "2 + 2?", **answers}),
        ("preference", dialogues),
        ("preference", {"prompt": "2 + 2?", **dialogues}),
        ("preference", {"prompt": with_system, **answers}),
        ("prompts", {"prompt": "2 + 2?", **dialogues}),
        ("prompts", {"prompt": ASKED}),
        ("prompts", {"messages": ASKED}),
        ("sft", {"prompt": "2 + 2?", "messages": dialogues["chosen"]}),
        ("sft", {"prompt": ASKED, "completion": "4"}),
        *strings,
    ]:
        example, report = one(CHAT, kind, row | {"system": "Be brief."})
        assert example.prompt_text == expected and "'system'" not in str(report)
        line = "template   the prompts of 1 rows are texts, and are read as a user's message\n"
        is_text = "2 + 2?" in (row.get("prompt"), row.get("question"), row.get("instruction"))
        assert (line in str(report)) == (is_text and dialogues["chosen"] not in row.values())
        if kind != "sft":
            assert prompt_of(example.row) == with_system
        assert one(CHAT, kind, row | {"system": ""})[0].prompt_text.count("Be brief") == (
            row.get("prompt") == with_system
        )
    for kind, row in [
        ("preference", {"chosen": HH + " a", "rejected": HH + " b"}),
        ("preference", {"prompt": HH, "chosen": " a", "rejected": " b"}),
        ("prompts", {"prompt": HH}),
        ("sft", {"text": "t"}),
    ]:
        with pytest.raises(BadInput, match="^f.jsonl:1: field 'system' goes with messages, and '.*' is a text"):
            one(CHAT, kind, row | {"system": "Be brief."})
    for kind, row in strings:  # there is no template to render them with
        with pytest.raises(BadInput, match="^f.jsonl:1: field 'system' goes with messages, and 'prompt' is a text"):
            one(PLAIN, kind, row | {"system": "Be brief."})
    with pytest.raises(BadInput, match="fields 'system' and 'prompt' hold two system messages"):
        one(CHAT, "prompts", {"prompt": with_system, "system": "Be verbose."})
    with pytest.raises(BadInput, match="field 'system' is not text but int"):
        one(CHAT, "prompts", {"prompt": ASKED, "system": 3})


def test_the_row_of_the_issue_with_a_system_text():
    row = {"system": "s", "question": "Name a fruit.", **FRUIT}
    example, report = one(CHAT, "preference", row)
    assert text(CHAT, example.prompt) == (
        "<|im_start|>system\ns<|im_end|>\n<|im_start|>user\nName a fruit.<|im_end|>\n<|im_start|>assistant\n"
    )
    assert [text(CHAT, ids) for ids in example.responses] == [f"{x}<|im_end|>" for x in FRUIT.values()]
    assert prompt_of(example.row) == [said("system", "s"), said("user", "Name a fruit.")]
    assert "prompt     the column 'question' of 1 rows" in str(report)
    assert (report.asked, report.untemplated) == (1, 0)


@pytest.mark.parametrize("name", ["prompt", "question"])
def test_rows_without_a_system_text_have_the_form_of_those_with_one(name):
    """Intel/orca_dpo_pairs: `system` is "" in some rows. All its prompts are rendered, or none."""
    rows = [("f:1", {"system": "s", name: "p", **FRUIT}), ("f:2", {"system": "", name: "p", **FRUIT})]
    for kind in ("preference", "prompts"):
        (first, second), report = build(rows, CHAT, kind, 99, 199)
        assert second.prompt_text == "<|im_start|>user\np<|im_end|>\n<|im_start|>assistant\n"
        assert first.prompt_text == "<|im_start|>system\ns<|im_end|>\n" + second.prompt_text
        assert (report.asked, report.untemplated) == (2, 0) and "system" not in report.unused
    (example,), report = build(rows[1:], CHAT, "preference", 99, 199)
    assert (example.prompt_text, report.asked, report.untemplated) == ("p", 0, 1)
    (example,), report = build(rows[1:], CHAT, "preference", 99, 199, chat=True)
    assert (example.prompt_text, report.asked, report.untemplated) == (second.prompt_text, 1, 0)
    other = ("g:1", {name: USER, **FRUIT})  # of a file without the column
    assert build([*rows, other], CHAT, "preference", 99, 199)[0][2].prompt_text == USER


@pytest.mark.parametrize("tools", [TOOLS, json.dumps(TOOLS)])
def test_a_tools_column(tools):
    shown = "<|im_start|>tools\n" + json.dumps(TOOLS[0]) + "<|im_end|>\n" + USER
    for kind, row in [
        ("preference", {"prompt": ASKED, "chosen": [CALL], "rejected": "no"}),
        ("prompts", {"messages": ASKED}),
        ("prompts", {"prompt": ASKED}),
        ("sft", {"messages": [*ASKED, CALL]}),
    ]:
        example, report = one(THINKING, kind, row | {"tools": tools})
        assert example.prompt_text == shown and "unused" not in str(report)
        assert one(THINKING, kind, row | {"tools": "[]"})[0].prompt_text == USER
    for row in [{"prompt": "p", "completion": "a"}, {"text": "t"}]:
        with pytest.raises(BadInput, match="field 'tools' goes with messages, and the row is of strings"):
            one(THINKING, "sft", row | {"tools": tools})
    for bad, problem in [("[", "JSON"), ("3", "a list of functions"), (["f"], "a list of functions")]:
        with pytest.raises(BadInput, match=f"field 'tools' is not {problem}"):
            one(THINKING, "prompts", {"prompt": ASKED, "tools": bad})


def test_columns_that_nothing_uses_are_listed():
    row = {"prompt": "p", "chosen": "a", "rejected": "b", "where": "x:1", "margin": 1.0, "probability": 0.5}
    assert "unused" not in str(one(PLAIN, "preference", row)[1])
    row |= {"images": ["x.png"], "question": "q", "messages": ASKED, "context": None, "hint": "", "meta": {"a": 1}}
    unused = "unused     columns that the model does not see: 'images', 'messages', 'meta', 'question'\n"
    assert unused in str(one(PLAIN, "preference", row)[1]) and unused in str(one(PLAIN, "prompts", row)[1])


OURS = {"token_ids": [[1], [2]], "tokenizer": "x", "ended": [True, True], "rewards": [1.0, 0.0], "noise": 0.5}
WRITTEN = {"annotator": "ana", "order": [0, 1], "seconds": 2.5, "note": "n", "time": "2026", "where": "p.jsonl:1"}
THEIRS = {name: "x" for name in ("id", "prompt_id", "source", "meta", "metadata")}


@pytest.mark.parametrize(
    "kind, row, unused",
    [
        ("sft", {"prompt": "Translate", "completion": "b", **THEIRS}, THEIRS),
        ("sft", {"prompt": "p", "completion": "b", **WRITTEN}, WRITTEN.keys() - {"where"}),
        ("sft", {"prompt": "p", "completion": "a", "label": True}, ["label"]),
        ("sft", {"prompt": "p", "completion": "a", "margin": 2, "score_chosen": 1}, ["margin", "score_chosen"]),
        ("sft", {"prompt": "p", "chosen": "a", "rejected": "b", "probability": 0.5}, ["probability"]),
        ("sft", {"prompt": "OTHER", "messages": [*ASKED, said("assistant", "4")]}, ["prompt"]),
        ("sft", {"text": "t", "prompt": "p", "question": "q"}, ["prompt", "question"]),
        (
            "preference",
            {"prompt": "p", "chosen": "a", "rejected": "b", **OURS, **WRITTEN},
            {*OURS, *WRITTEN} - {"where"},
        ),
        ("preference", {"prompt": "p", "responses": ["a", "b"], "ranks": [1, 2], **OURS, **WRITTEN}, []),
        (
            "preference",
            {"prompt": "p", "responses": ["a", "b"], "ranks": [1, 2], "margin": 1, "probability": 0.7, "note": "n"},
            ["margin", "note", "probability"],
        ),
        ("preference", {"prompt": "p", "responses": ["a", "b"], "ranks": [1, 2], **THEIRS}, THEIRS),
        ("unpaired", {"prompt": "p", "chosen": "a", "rejected": "b", "margin": 1, "probability": 0.7}, ["margin"]),
        ("unpaired", {"prompt": "p", "completion": "a", "label": 1, "probability": 0.7}, ["probability"]),
        ("prompts", {"prompt": "p", "responses": ["a", "b"], "ended": [False, True], "logps": [1, 2], **WRITTEN}, []),
        ("prompts", {"prompt": "p", "chosen": "a", "rejected": "b", "margin": 1, **THEIRS}, THEIRS),
    ],
)
def test_each_column_is_read_or_listed(kind, row, unused):
    _, report = one(PLAIN, kind, row)
    assert report.unused == {*unused}
    line = "unused     columns that the model does not see: " + ", ".join(map(repr, sorted(unused))) + "\n"
    assert line in str(report) if unused else "unused" not in str(report)


def test_a_cut_answer_is_one_of_a_ranking():
    """Elsewhere it would be trained with an end of turn that the model did not write."""
    for kind, row in [
        ("preference", PAIR | {"ended": [False, True]}),
        ("unpaired", PAIR | {"ended": [True, False]}),
        ("unpaired", UNPAIRED | {"ended": False}),
        ("sft", {"prompt": "p", "completion": "a", "ended": False}),
        ("sft", SFT | {"ended": [False]}),
        ("sft", {"text": "t", "ended": False}),
    ]:
        with pytest.raises(BadInput, match="^f.jsonl:1: field 'ended' goes with 'responses' and 'ranks': give a cut"):
            one(PLAIN, kind, row)
    assert one(PLAIN, "prompts", PAIR | {"ended": [False, True]})[1].unused == set()
    assert one(PLAIN, "preference", PAIR | {"ended": [True, True]})[1].unused == {"ended"}


def test_a_prompt_beside_dialogues_is_in_them():
    """They are what is read; what is nowhere in them would not be seen."""
    before = [
        said("system", "Be kind."),
        said("user", "Name a fruit."),
        said("assistant", "An apple."),
        said("user", "More?"),
    ]
    sides = {name: [*before, said("assistant", name)] for name in ("chosen", "rejected")}
    for name in ("prompt", "question"):
        for asked in ("Name a fruit.", " More?\n", "Be kind."):
            for kind in ("preference", "sft", "unpaired", "prompts"):
                example, report = one(CHAT, kind, sides | {name: asked})
                assert example.prompt_text == one(CHAT, "prompts", {"prompt": before})[0].prompt_text
                assert "prompt     the column" not in str(report) and "unused" not in str(report)
        for kind in ("preference", "sft", "unpaired", "prompts"):
            with pytest.raises(BadInput, match=f"^f.jsonl:1: field '{name}' is not in the dialogues, which are read"):
                one(CHAT, kind, sides | {name: "Name a tool."})


# ------------------------------------------------------------------------------------------------- bad input

CHATTED = {"prompt": [said("user", "u")], "chosen": [said("assistant", "a")], "rejected": [said("assistant", "b")]}
PAIR = {"prompt": "p", "chosen": "a", "rejected": "b"}
UNPAIRED = {"prompt": "p", "completion": "a", "label": True}
RANKED = {"prompt": "p", "responses": ["a", "b"], "ranks": [1, 2]}
SFT = {"messages": [said("user", "u"), said("assistant", "a")]}


@pytest.mark.parametrize(
    "kind, good, change, message",
    [
        ("preference", PAIR, {"chosen": ""}, "field 'chosen' is empty: give it a text or use --skip-bad-rows"),
        ("preference", PAIR, {"rejected": " \n"}, "field 'rejected' is empty"),
        ("preference", PAIR, {"prompt": ""}, "field 'prompt' is empty"),
        ("preference", PAIR, {"chosen": None}, "field 'chosen' is null: give it to every row"),
        ("preference", PAIR, {"chosen": 5}, "field 'chosen' is not text or messages but int"),
        ("preference", PAIR, {"chosen": "\ud800"}, "field 'chosen' holds half a surrogate pair"),
        ("preference", PAIR, {"prompt": []}, "field 'prompt' is empty"),
        ("preference", PAIR, {"margin": "big"}, "field 'margin' is not a number"),
        ("preference", PAIR, {"probability": 1.5}, "field 'probability' is not a number in \\[0, 1\\]"),
        (
            "preference",
            CHATTED,
            {"prompt": [said("assistant", "u")]},
            "field 'prompt': roles out of order: end the prompt",
        ),
        (
            "preference",
            CHATTED,
            {"prompt": [said("user", "u"), said("system", "s"), said("user", "u")]},
            "field 'prompt', message 2: roles out of order: put the system",
        ),
        ("preference", CHATTED, {"prompt": [said("gpt", "u")]}, "field 'prompt', message 1 has the role 'gpt'"),
        ("preference", CHATTED, {"prompt": [{"content": "u"}]}, "field 'prompt', message 1 is not"),
        ("preference", CHATTED, {"chosen": [said("user", "u")]}, "field 'chosen': roles out of order"),
        ("preference", CHATTED, {"chosen": [said("assistant", "u")] * 2}, "field 'chosen': roles out of order"),
        ("preference", CHATTED, {"chosen": [said("assistant", "")]}, "field 'chosen', message 1 has no content"),
        ("preference", CHATTED, {"chosen": [said("assistant", None)]}, "field 'chosen', message 1 has no content"),
        ("preference", RANKED, {"ranks": [1]}, "field 'ranks' has 1 ranks for 2 responses"),
        ("preference", RANKED, {"ranks": [0, 1]}, "field 'ranks' is not made of whole numbers from 1"),
        ("preference", RANKED, {"ranks": [1, 1.5]}, "field 'ranks' is not made of whole numbers from 1"),
        ("preference", RANKED, {"ranks": [1, 10**30]}, "field 'ranks' is not made of whole numbers from 1"),
        ("preference", RANKED, {"rewards": [10**400, 2]}, "field 'rewards' is not a list of finite numbers"),
        ("preference", RANKED, {"rewards": [math.nan, 2]}, "field 'rewards' is not a list of finite numbers"),
        ("preference", RANKED, {"ranks": "12"}, "fields 'responses' and 'ranks' are not two lists"),
        ("preference", RANKED, {"responses": ["a", ""]}, "field 'responses\\[1\\]' is empty"),
        ("unpaired", UNPAIRED, {"label": 2}, "field 'label' is not true or false"),
        ("unpaired", UNPAIRED, {"label": "yes"}, "field 'label' is not true or false"),
        ("sft", SFT, {"messages": [said("user", "u")]}, "field 'messages' has no assistant message"),
        ("sft", SFT, {"messages": [said("assistant", "u")]}, "field 'messages': roles out of order"),
        ("sft", SFT, {"messages": "hello"}, "field 'messages' is not text or messages but str"),
        ("prompts", {"prompt": "p"}, {"prompt": {"a": 1}}, "field 'prompt' is not text or messages but dict"),
    ],
)
def test_bad_rows(tmp_path, kind, good, change, message):
    source = file(tmp_path, good, {**good, **change}, good)
    rows, skipped = read_rows(source)
    with pytest.raises(BadInput, match=f"^prefs.jsonl:2: {message}") as error:
        build(rows, PLAIN, kind, 100, 200)
    assert "\n" not in str(error.value) and str(error.value).endswith("or use --skip-bad-rows")
    examples, report = build(rows, PLAIN, kind, 100, 200, skip_bad_rows=True, skipped=skipped)
    assert [e.where for e in examples] == ["prefs.jsonl:1", "prefs.jsonl:3"]
    assert (report.rows, report.kept, len(report.skipped)) == (3, 2, 1) and "skipped    1 bad rows" in str(report)


def test_a_template_that_refuses_is_a_bad_row():
    tokenizer = byte_level(template=LLAMA2)
    with pytest.raises(BadInput, match=r"f.jsonl:1: the chat template refuses the messages \(roles must alternate\)"):
        one(tokenizer, "preference", {**CHATTED, "prompt": [said("user", "u"), said("user", "u")]})
    tokenizer = byte_level(template="{{ messages | length }}{% for m in messages %}{{ m['content'] }}{% endfor %}")
    with pytest.raises(BadInput, match="f.jsonl:1: the chat template does not begin a conversation with its prompt"):
        one(tokenizer, "preference", CHATTED)


def test_unreadable_files(tmp_path):
    good = {"prompt": "p", "chosen": "a", "rejected": "b"}
    good_json = json.dumps(good)
    packed = tmp_path / "q.JSONL.gz"
    packed.write_bytes(gzip.compress(json.dumps([good, good], indent=1).encode()))
    empty = tmp_path / "empty"
    empty.mkdir()
    for message, source in {
        r"/nowhere/x.jsonl: no such file or folder": "/nowhere/x.jsonl",
        r"nowhere.csv: no such file or folder": "nowhere.csv",
        r"nobody/nothing: no such file, and not to be had from the hub .* `hf download nobody/n": "nobody/nothing",
        r"a.jsonl:3: not JSON \(.*\): mend the line or use --skip-bad-rows": file(
            tmp_path, good, "", "{", name="a.jsonl"
        ),
        r"b.jsonl:2: not an object": file(tmp_path, good, "[1]", name="b.jsonl"),
        r"p.jsonl: line 1 begins a JSON array: name the file p.json$": file(tmp_path, f"[{good_json}]", name="p.jsonl"),
        r"q.JSONL.gz: line 1 begins a JSON array: name the file q.json.gz$": str(packed),
        r"c.jsonl: holds no rows": file(tmp_path, "", name="c.jsonl"),
        r"d.json:2: not JSON": file(tmp_path, "[1,", "2 3]", name="d.json"),
        r"e.txt: unknown kind of file": file(tmp_path, "hello", name="e.txt"),
        r"f.jsonl.gz: cannot be read": file(tmp_path, "hello", name="f.jsonl.gz"),
        r"g.parquet: cannot be read": file(tmp_path, "hello", name="g.parquet"),
        r"h.csv:3: more than 2 cells": file(tmp_path, "prompt,completion", "a,b", "a,b,c", name="h.csv"),
        r"missing: no such file or folder": str(tmp_path / "missing"),
        r"empty: a folder without data: give one that has a .jsonl": str(empty),
        r"j.csv:3: field 'prompt' holds messages that are not JSON": file(
            tmp_path, "prompt,completion", "a,b", "\"[{'role': 'user', 'content': 'hi'}]\",b", name="j.csv"
        ),
        r"i.jsonl:1: not JSON": file(tmp_path, "[" * 100_000, name="i.jsonl"),
        r"k.csv:3: not CSV \(unexpected end of data\): close its quotes": file(
            tmp_path, "prompt,completion", "a,b", 'c,"d', "e,f", "g,h", name="k.csv"
        ),
        r"l.csv:2: not CSV": file(tmp_path, "prompt,completion", 'a,"b', 'c,"d"', name="l.csv"),
        r"m.csv:1: two columns have the name 'prompt': rename one": file(
            tmp_path, "prompt,completion,prompt", "a,b,c", name="m.csv"
        ),
        r"n.jsonl:2: not JSON \('prompt' is there twice\)": file(
            tmp_path, good, '{"prompt": "a", "completion": "b", "prompt": "c"}', name="n.jsonl"
        ),
        r"o.json: not JSON \('a' is there twice\)": file(tmp_path, '[{"a": 1, "a": 2}]', name="o.json"),
    }.items():
        with pytest.raises(BadInput, match=message) as error:
            read_rows(source)
        assert "\n" not in str(error.value)
    with pytest.raises(BadInput, match="k.csv:3: not CSV"):  # it is not known which rows are good
        read_rows(str(tmp_path / "k.csv"), skip_bad_rows=True)
    rows, skipped = read_rows(file(tmp_path, good, "{", "3", '"x"', good), skip_bad_rows=True)
    assert [where for where, _ in rows] == ["prefs.jsonl:1", "prefs.jsonl:5"]
    assert [message.split(" (")[0].split(": write")[0] for message in skipped] == [
        "prefs.jsonl:2: not JSON",
        "prefs.jsonl:3: not an object",
        "prefs.jsonl:4: not an object",
    ]
    assert build(rows, PLAIN, "preference", 9, 9, skipped=skipped)[1].rows == 5


def test_columns_that_fit_no_form():
    with pytest.raises(
        BadInput, match=r"^f.jsonl: its columns \('chosen', 'question'\) fit no form of preference rows"
    ):
        one(PLAIN, "preference", {"question": "q", "chosen": "a"})
    for row, null in (
        ({"prompt": "q", "chosen": "a", "rejected": None}, "rejected"),
        ({"question": "q", "chosen": None, "rejected": None}, "chosen"),
        ({"prompt": None, "responses": ["a", "b"], "ranks": [1, 2]}, "prompt"),
    ):
        rows = [("f.jsonl:1", {"text": "t"}), ("f.jsonl:2", row)]
        with pytest.raises(BadInput, match=f"^f.jsonl:2: field '{null}' is null: give it to every row$"):
            build(rows, PLAIN, "preference", 99, 199)
    with pytest.raises(BadInput, match="of preference rows: use train_dpo.py --loss kto, or rename them to one of"):
        one(PLAIN, "preference", {"prompt": "q", "completion": "a", "label": True})
    with pytest.raises(BadInput, match="of preference rows: use train_sft.py, or rename them to one of"):
        one(PLAIN, "preference", {"text": "q"})


def test_every_kind_of_file_gives_the_same_rows(tmp_path):
    rows = [
        {"prompt": "p, q", "completion": "18", "label": True},
        {"prompt": "NA\nx", "completion": "é", "label": False},
    ]
    lines = "\n".join(map(json.dumps, rows))
    (tmp_path / "a.jsonl").write_text("\ufeff" + lines)
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    (tmp_path / "a.json").write_text(json.dumps(rows, indent=1))
    (tmp_path / "lines.json").write_text(lines)
    (tmp_path / "a.csv").write_text('\ufeffprompt,completion,label\n"p, q",18,True\n"NA\nx",é,0\n')
    data = datasets.Dataset.from_list(rows)
    data.to_parquet(tmp_path / "a.parquet")
    data.save_to_disk(tmp_path / "saved")
    datasets.DatasetDict({"test": data}).save_to_disk(tmp_path / "only")
    for name in ["a.jsonl", "a.jsonl.gz", "a.json", "lines.json", "a.csv", "a.parquet", "saved", "only"]:
        found, skipped = read_rows(str(tmp_path / name))
        assert ([row for _, row in found], skipped) == (rows, []), name
        assert [where for where, _ in found] == [f"{name}:{i}" for i in ((2, 3) if name == "a.csv" else (1, 2))]
    two = datasets.DatasetDict({"test": data, "other": data.select([0])})
    two.save_to_disk(tmp_path / "two")
    assert len(read_rows(str(tmp_path / "two"), split="other")[0]) == 1
    with pytest.raises(BadInput, match="no split 'train': choose --split among test, other"):
        read_rows(str(tmp_path / "two"))


def written(folder, name, *rows):
    """A file with these rows in a folder, whose kind the name says."""
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = "\n".join(map(json.dumps, rows)).encode()
    if path.suffix == ".parquet":
        datasets.Dataset.from_list([*rows]).to_parquet(path)
    else:
        path.write_bytes(gzip.compress(lines) if path.suffix == ".gz" else lines)


def found_in(folder, split=None):
    return [(where, row["prompt"]) for where, row in read_rows(str(folder), split)[0]]


def test_a_folder_of_shards_as_hf_download_makes_it(tmp_path, capsys):
    shards = {"train-00000-of-00002": "ab", "train-00001-of-00002": "c", "test-00000-of-00001-b42a775f407cee45": "d"}
    for name, prompts in shards.items():
        written(tmp_path, f"data/{name}.parquet", *({"prompt": p} for p in prompts))
    written(tmp_path, ".cache/huggingface/download/data/train.jsonl", {"prompt": "hidden"})
    written(tmp_path, "dataset_infos.json", {"default": {}})
    (tmp_path / "README.md").write_text("---\nlicense: mit\n---")
    first, second = (f"data/train-0000{i}-of-00002.parquet" for i in range(2))
    assert found_in(tmp_path) == [(f"{first}:1", "a"), (f"{first}:2", "b"), (f"{second}:1", "c")]
    assert capsys.readouterr().out == f"{tmp_path}: split train, 2 files ({first}, {second}); other splits: test\n"
    assert [prompt for _, prompt in found_in(tmp_path, "test")] == ["d"]
    assert found_in(tmp_path / "data") == [
        (f"{name.removeprefix('data/')}", p)
        for name, p in [(f"{first}:1", "a"), (f"{first}:2", "b"), (f"{second}:1", "c")]
    ]
    with pytest.raises(BadInput, match="no split 'dev': choose --split among test, train$"):
        read_rows(str(tmp_path), "dev")


def test_a_folder_in_the_form_of_hh_rlhf(tmp_path, capsys):
    """Files of one name in subfolders; one that belongs to no split is left out, which is said."""
    pair = {side: f"{HH} {side}" for side in ("chosen", "rejected")}
    for i, part in enumerate(("harmless-base", "helpful-base")):
        for split in ("train", "test"):
            written(tmp_path, f"{part}/{split}.jsonl.gz", *[pair] * (i + 1))
    written(tmp_path, "red-team-attempts/red_team_attempts.jsonl.gz", {"transcript": "x"})
    a = train_dpo.Args(data=str(tmp_path), eval_data=str(tmp_path), eval_split="test")
    train, held = load_split("preference", byte_level(), a)
    wanted = [
        f"{part}/{{}}.jsonl.gz:{i}" for part, i in (("harmless-base", 1), ("helpful-base", 1), ("helpful-base", 2))
    ]
    assert [[e.where for e in part] for part in (train, held)] == [
        [where.format(split) for where in wanted] for split in ("train", "test")
    ]
    out = capsys.readouterr().out
    assert (
        "split train, 2 files (harmless-base/train.jsonl.gz, helpful-base/train.jsonl.gz); other splits: test; of no "
        in out
    )
    assert "of no split, and left out: red-team-attempts/red_team_attempts.jsonl.gz\n" in out
    assert len(read_rows(str(tmp_path / "harmless-base"), "test")[0]) == 1


@pytest.mark.parametrize(
    "name, split",
    [
        ("train.jsonl", "train"),
        ("my_training_set.json", "train"),
        ("validation/part1.csv", "validation"),
        ("dev-0.tsv", "validation"),
        ("test/train.jsonl", "train"),  # the file's own name says more than its folder's
        ("default/test/0000.parquet", "test"),
        ("data/train_prefs-00000-of-00001.parquet", "train_prefs"),
        ("latest.jsonl", None),
        ("data/rlaif.parquet", None),
    ],
)
def test_the_split_of_a_file(name, split):
    assert _split_of(Path(name)) == split


def test_a_folder_whose_names_say_no_split_and_several_sources(tmp_path, capsys):
    for name in ("b/0.jsonl", "a.jsonl", "notes.txt"):
        written(tmp_path / "all", name, {"prompt": name, "completion": "y"})
    assert found_in(tmp_path / "all") == [("a.jsonl:1", "a.jsonl"), ("b/0.jsonl:1", "b/0.jsonl")]
    capsys.readouterr()
    paths = [f"{tmp_path}/all/{name}" for name in ("b/0.jsonl", "a.jsonl")]
    a = tyro.cli(train_sft.Args, args=["--data", *paths, "--eval-data", paths[0]])
    assert (a.data, a.eval_data) == (tuple(paths), paths[0])
    train, held = load_split("sft", byte_level(), a)
    assert [e.where for e in train + held] == [f"{paths[0]}:1", f"{paths[1]}:1", "0.jsonl:1"]
    assert capsys.readouterr().out.startswith(f"{paths[0]} {paths[1]}\nexamples   2 of 2 rows")
    assert tyro.cli(train_sft.Args, args=["--data", paths[0]]).data == paths[0]
    assert repeated(a, "data", "seed") == f" --data {paths[0]} {paths[1]}"
    with pytest.raises(BadInput, match="^reviews is the embedded task"):
        load(("reviews", paths[0]), "sft", byte_level(), a)
    with pytest.raises(BadInput, match=f"{tmp_path}/none.jsonl: no such file or folder"):
        read_rows((paths[0], f"{tmp_path}/none.jsonl"))
    written(tmp_path / "run", "args.json", {})
    with pytest.raises(BadInput, match=r"run: holds a run or a model \(args.json\): name the file with the data"):
        read_rows(f"{tmp_path}/run")


def test_a_tsv(tmp_path):
    source = file(tmp_path, "prompt\tcompletion", 'p, q\t"a\tb ""c"""', "r\ts", name="t.tsv")
    rows = [{"prompt": "p, q", "completion": 'a\tb "c"'}, {"prompt": "r", "completion": "s"}]
    assert read_rows(source)[0] == [("t.tsv:2", rows[0]), ("t.tsv:3", rows[1])]
    with pytest.raises(BadInput, match=r"u.tsv:2: not TSV \(unexpected end of data\): close its quotes"):
        read_rows(file(tmp_path, "prompt\tcompletion", 'p\t"a', name="u.tsv"))


# --------------------------------------------------------------------------------------- data sets of other columns


def from_to(*texts):
    return [{"from": ("human", "gpt")[i % 2], "value": text} for i, text in enumerate(texts)]


def test_sharegpt_messages_are_read():
    """In `conversations`, alone or as the prompt of a preference; null fields beside them do not count."""
    turns = [{**turn, "weight": None} for turn in [{"from": "system", "value": "s"}, *from_to("u", "a", "v", "b")]]
    wanted, _ = one(CHAT, "sft", {"messages": [said("system", "s"), *talk("u", "a", "v", "b")]})
    example, report = one(CHAT, "sft", {"conversations": turns})
    assert (example.prompt, example.responses, example.trained) == (wanted.prompt, wanted.responses, wanted.trained)
    assert "messages   of 1 rows have from and value in place of role and content" in str(report)
    assert "unused" not in str(report) and prompt_of(example.row) == [said("system", "s"), *talk("u", "a", "v")]
    pair = {"chosen": {"from": "gpt", "value": "good"}, "rejected": {"from": "gpt", "value": "bad"}}
    wanted, _ = one(CHAT, "preference", {"prompt": talk("u", "a", "v"), "chosen": "good", "rejected": "bad"})
    for prompt in (from_to("u", "a", "v"), talk("u", "a", "v")):
        example, _ = one(CHAT, "preference", {"conversations": prompt, **pair})
        assert (example.prompt, example.responses) == (wanted.prompt, wanted.responses)
        assert texts_of(example.row) == ["good", "bad"]
    for bad, message in (
        (from_to("u", 3), "field 'messages' is not text but int"),
        ([*from_to("u"), {"from": "bot", "value": "a"}], "field 'messages', message 2 has the role 'bot'"),
        ([*from_to("u"), {"from": ["gpt"], "value": "a"}], "field 'messages', message 2 has the role"),
        ([*from_to("u"), {"value": "a"}], "its columns .'conversations'. fit no form of sft rows"),
    ):
        with pytest.raises(BadInput, match=message):
            one(CHAT, "sft", {"conversations": bad})


DATA_PAGE = (Path(__file__).parents[1] / "docs/data.md").read_text()
PROGRAM, *FUNCTIONS = re.findall(r"```python\n(.*?)```", DATA_PAGE.split("## Conversions")[1], re.S)
WHOSE = re.findall(r"^\*\*(.*?)\*\*", DATA_PAGE.split("## Conversions")[1], re.M)
MORE = {"language": "English"}  # a column that is not read
KNOWN = {  # data set -> rows in its form, and what becomes of them
    "HelpSteer2": (
        [
            {"split": "train", "prompt": "c#", "response_1": "x", "response_2": "y", "preference_strength": -2},
            {
                "split": "val",
                "prompt": "u\n<extra_id_1>Assistant\na\nb\n<extra_id_1>User\nv",
                "response_1": "x",
                "response_2": "y",
                "preference_strength": 1,
            },
            {"split": "train", "prompt": "c#", "response_1": "x", "response_2": "y", "preference_strength": 0},
        ],
        [
            {"prompt": talk("c#"), "chosen": "x", "rejected": "y", "margin": 2},
            {"prompt": talk("u", "a\nb", "v"), "chosen": "y", "rejected": "x", "margin": 1},
        ],
    ),
    "HelpSteer3": (
        [
            {"context": talk("u"), "response1": "x", "response2": "y", "overall_preference": score, **MORE}
            for score in (3, 0, -1)
        ],
        [
            {"prompt": talk("u"), "chosen": "y", "rejected": "x", "margin": 3},
            {"prompt": talk("u"), "chosen": "x", "rejected": "y", "margin": 1},
        ],
    ),
    "Arena": (
        [
            {
                "model_a": "m",
                "model_b": "n",
                "winner": winner,
                "conversation_a": [{**m, "num_tokens": 1} for m in talk("u", "a", "v", "b")],
                "conversation_b": [{**m, "num_tokens": 1} for m in talk("u", "c", "v", "d")],
            }
            for winner in ("model_b", "tie", "tie (bothbad)", "model_a")
        ],
        [
            {"chosen": talk("u", "c", "v", "d"), "rejected": talk("u", "a", "v", "b")},
            {"chosen": talk("u", "a", "v", "b"), "rejected": talk("u", "c", "v", "d")},
        ],
    ),
    "Nectar": (
        [
            {
                "prompt": "\n\nHuman: is Human: a mark?\n\nAssistant: yes\n\nHuman: ok\n\nAssistant: ",
                "answers": [{"answer": x, "model": "m", "rank": rank} for x, rank in (("x", 2.0), ("y", 1.0))],
                "turns": 2,
            }
        ],
        [{"prompt": talk("is Human: a mark?", "yes", "ok"), "responses": ["x", "y"], "ranks": [2, 1]}],
    ),
    "UltraFeedback": (
        [
            {
                "source": "flan",
                "instruction": "u",
                "models": ["m"] * 4,
                "completions": [
                    {
                        "model": "m",
                        "response": x,
                        "overall_score": 10,
                        "annotations": {name: {"Rating": rating, "Rationale": "r"} for name, rating in rated},
                    }
                    for x, rated in zip("wxyz", (zip("ab", pair, strict=True) for pair in ratings), strict=True)
                ],
            }
            for ratings in (["34", ("4", "N/A"), "43", "11"], ["33"] * 4, ["34", ("N/A", "N/A"), "43", "11"])
        ],
        [{"prompt": talk("u"), "responses": [*"wxyz"], "ranks": [2, 1, 2, 4]}],
    ),
    "argilla": (
        [
            {
                "source": "s",
                "instruction": "u",
                "chosen_response": "x",
                "rejected_response": "y",
                "chosen_avg_rating": 5.0,
            }
        ],
        [{"prompt": talk("u"), "chosen": "x", "rejected": "y"}],
    ),
    "argilla 2": (
        [
            {"system": "s", "input": "u", "chosen": "x", "rejected": "y", "status": status, "order": ["chosen"]}
            for status in ("unchanged", "tie", "swapped")
        ],
        [{"system": "s", "input": "u", "chosen": "x", "rejected": "y"}] * 2,
    ),
    "SHP": (
        [
            {
                "post_id": "1",
                "history": "u",
                "human_ref_A": "x",
                "human_ref_B": "y",
                "labels": label,
                "score_ratio": 2.0,
            }
            for label in (1, 0)
        ],
        [
            {"prompt": talk("u"), "chosen": "x", "rejected": "y"},
            {"prompt": talk("u"), "chosen": "y", "rejected": "x"},
        ],
    ),
    "LLaMA-Factory": (
        [
            {"instruction": "i", "input": "j", "chosen": "x", "rejected": "y"},
            {"instruction": "i", "input": "", "chosen": "x", "rejected": "y", "system": "s", "history": [["u", "a"]]},
        ],
        [
            {"prompt": talk("i\nj"), "system": None, "chosen": "x", "rejected": "y"},
            {"prompt": talk("u", "a", "i"), "system": "s", "chosen": "x", "rejected": "y"},
        ],
    ),
    "LLaMA-Factory 2": (
        [{"conversations": from_to("u", "a", "v", "b"), "kto_tag": False}],
        [{"prompt": from_to("u", "a", "v"), "completion": from_to("", "b")[1:], "label": False}],
    ),
    "OpenAI": (
        [
            {
                "input": {"messages": talk("u"), "tools": [], "parallel_tool_calls": True},
                "preferred_output": [said("assistant", "x")],
                "non_preferred_output": [said("assistant", "y")],
            }
        ],
        [{"prompt": talk("u"), "tools": [], "chosen": [said("assistant", "x")], "rejected": [said("assistant", "y")]}],
    ),
}


def test_the_page_on_data_has_code_for_each_data_set():
    named = [name if WHOSE[:i].count(name) == 0 else f"{name} 2" for i, name in enumerate(WHOSE)]
    assert named == [*KNOWN] and len(FUNCTIONS) == len(KNOWN)


@pytest.mark.parametrize("name", KNOWN)
def test_the_code_of_the_page_on_data(name, tmp_path, monkeypatch):
    """It makes of a data set's own rows, in a folder, rows that a script takes; those themselves are refused."""
    rows, wanted = KNOWN[name]
    written(tmp_path / "source", "data/train-00000-of-00001.jsonl", *rows)
    code = PROGRAM.replace("# convert(row)\n", FUNCTIONS[[*KNOWN].index(name)])
    monkeypatch.setattr(sys, "argv", ["convert.py", f"{tmp_path}/source", f"{tmp_path}/new.jsonl"])
    exec(compile(code, "convert.py", "exec"), {})
    found = read_rows(f"{tmp_path}/new.jsonl")[0]
    assert [row for _, row in found] == wanted
    kind = "unpaired" if "label" in wanted[0] else "preference"
    tokenizer = byte_level(bos=None, eos="<|im_end|>", template=CHATML, specials=["<|im_start|>"])
    examples, report = build(found, tokenizer, kind, 500, 1000)
    assert len(examples) == len(wanted) and not report.dropped and not report.untemplated
    if name not in ("argilla 2",):
        with pytest.raises(BadInput, match="docs/data.md"):
            build([("f:1", row) for row in rows], tokenizer, kind, 500, 1000)


def test_the_code_of_the_page_on_data_for_labels_and_sft_of_llama_factory():
    made = {"user": lambda text: [said("user", text)]}
    exec(FUNCTIONS[[*KNOWN].index("LLaMA-Factory")], made)
    row = {"instruction": "i", "input": "", "output": "o"}
    new = {"prompt": talk("i"), "system": None, "completion": "o"}
    assert made["convert"](row) == new and made["convert"](row | {"kto_tag": True}) == new | {"label": True}


@pytest.mark.parametrize("kind", ["Image", "Audio"])
def test_a_column_that_nothing_reads_is_not_decoded(kind, tmp_path):
    """A row keeps its place even if its picture is damaged."""
    rows = [{"prompt": "p", "completion": str(i), "seen": {"bytes": b"no picture", "path": None}} for i in range(3)]
    data = datasets.Dataset.from_list(rows).cast_column("seen", getattr(datasets, kind)())
    data.save_to_disk(tmp_path / "one")
    datasets.DatasetDict({"train": data}).save_to_disk(tmp_path / "dict")
    for name in ("one", "dict"):
        assert [row for _, row in read_rows(str(tmp_path / name))[0]] == rows


def test_a_ranking_in_a_csv(tmp_path):
    source = file(tmp_path, "prompt,responses,ranks", 'p,"[""a"", ""b""]","[2, 1]"', name="r.csv")
    [example], _ = build(read_rows(source)[0], PLAIN, "preference", 9, 9)
    assert (example.response_texts, example.ranks) == (["a", "b"], [2, 1])


def test_messages_in_a_csv(tmp_path):
    cells = [json.dumps(CHATTED[name]).replace('"', '""') for name in ("prompt", "chosen", "rejected")]
    source = file(tmp_path, "prompt,chosen,rejected", ",".join(f'"{cell}"' for cell in cells), name="m.csv")
    assert read_rows(source) == ([("m.csv:2", {n: CHATTED[n] for n in ("prompt", "chosen", "rejected")})], [])
    source = file(tmp_path, "prompt,completion", '"[{""a"": 1}]",[1]', name="t.csv")  # not messages: texts
    assert read_rows(source)[0] == [("t.csv:2", {"prompt": '[{"a": 1}]', "completion": "[1]"})]


def test_unknown_tokens_are_counted():
    words = reviews.tokenizer()
    row = ("f:1", {"prompt": "the zyx film", "chosen": "qwv", "rejected": "the"})  # BOS, 3 words; 1 + EOS; 1 + EOS
    _, report = build([row], words, "preference", 9, 20)
    assert report.unknown == 2 / 8 and "unknown    25.0% of the tokens" in str(report)
    assert build([("f:1", {"prompt": "p", "chosen": "a", "rejected": "b"})], PLAIN, "preference", 9, 20)[1].unknown == 0


# ------------------------------------------------------------------------------------------------------ fuzz

JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text()
    | st.sampled_from(["user", "assistant", HH + " a"]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.text(max_size=3), inner, max_size=3)
        | st.fixed_dictionaries(
            {"role": st.sampled_from(["user", "assistant", "system"]) | inner, "content": inner},
            optional={"tool_calls": inner, "reasoning_content": inner},
        )
    ),
    max_leaves=6,
)
COLUMNS = ["prompt", "chosen", "rejected", "completion", "label", "messages", "text", "responses", "ranks", "margin"]
COLUMNS += ["question", "input", "system", "tools", "score_chosen", "score_rejected"]
ROWS = st.lists(
    st.dictionaries(st.sampled_from([*COLUMNS, "probability", "x"]), JSON, max_size=8), min_size=1, max_size=3
)


@settings(max_examples=300, deadline=None)
@given(ROWS, st.sampled_from(sorted(KINDS)), st.booleans(), st.sampled_from([PLAIN, CHAT, THINKING]))
def test_any_json_gives_examples_or_bad_input(rows, kind, skip, tokenizer):
    try:
        examples, report = build([(f"f:{i}", row) for i, row in enumerate(rows)], tokenizer, kind, 20, 40, skip)
    except BadInput as error:
        assert "\n" not in str(error)
        return
    assert report.rows == len(rows) == report.kept + sum(report.dropped.values()) + len(report.skipped)
    str(report)
    for example in examples:
        assert 1 <= len(example.prompt) <= 20 and all(
            1 <= len(r) <= 40 - len(example.prompt) for r in example.responses
        )
        assert len(example.responses) == len(example.ranks) == len(example.response_texts)
        show(example, tokenizer)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.binary() | st.text().map(str.encode) | st.lists(JSON).map(lambda v: json.dumps(v).encode()),
    st.sampled_from(["f.jsonl", "f.json", "f.csv", "f.parquet", "f.jsonl.gz"]),
    st.booleans(),
)
def test_any_bytes_give_rows_or_bad_input(tmp_path, data, name, skip):
    (tmp_path / name).write_bytes(data)
    try:
        rows, _ = read_rows(str(tmp_path / name), skip_bad_rows=skip)
    except BadInput as error:
        assert "\n" not in str(error)
    else:
        assert rows and all(isinstance(row, dict) for _, row in rows)


# ------------------------------------------------------------------------------- splitting, pairing, showing


def example_of(prompt, response="r", where="f:1"):
    ids = list(prompt.encode()) or [0]
    return Example(where, ids, [list(response.encode())], prompt, [response], [1])


@given(st.lists(st.text("abc", min_size=1, max_size=3), max_size=40), st.floats(0, 1), st.randoms())
def test_held_out_goes_by_the_prompt(prompts, fraction, shuffler):
    examples = [example_of(prompt, where=f"f:{i}") for i, prompt in enumerate(prompts)]
    train, held = held_out(examples, fraction)
    assert sorted(e.where for e in train + held) == sorted(e.where for e in examples)
    assert not {e.prompt_text for e in train} & {e.prompt_text for e in held}
    shuffled = shuffler.sample(examples, len(examples))
    assert {e.where for e in held_out(shuffled, fraction)[1]} == {e.where for e in held}
    assert {e.where for e in held_out(examples, fraction / 2)[1]} <= {e.where for e in held}


def test_held_out_share():
    examples = [example_of(f"prompt {i}") for i in range(4000)]
    assert held_out(examples, 0.0) == (examples, [])
    assert held_out(examples, 1.0) == ([], examples)
    assert abs(len(held_out(examples, 0.05)[1]) - 200) < 4 * (4000 * 0.05 * 0.95) ** 0.5
    texts = [example_of("", response=f"text {i}") for i in range(400)]  # rows without a prompt go by their text
    assert 0 < len(held_out(texts, 0.5)[1]) < 400


def pairs_of(prompts):
    return [{"prompt": prompt, "chosen": "a", "rejected": "b"} for prompt in prompts]


def test_the_split_of_the_held_out_rows(tmp_path, capsys):
    """Two splits of one data set, a file beside a split, and what of the held-out prompts is in training."""
    parts = {"train_prefs": pairs_of("pqr"), "test_prefs": pairs_of("rrst")}
    data = datasets.DatasetDict({name: datasets.Dataset.from_list(rows) for name, rows in parts.items()})
    data.save_to_disk(tmp_path / "prefs")
    folder, lone = str(tmp_path / "prefs"), file(tmp_path, *pairs_of("xy"))

    def prompts(**flags):
        a = train_dpo.Args(data=folder, split="train_prefs", **flags)
        parts = load_split("preference", PLAIN, a)
        return *("".join(e.prompt_text for e in part) for part in parts), capsys.readouterr().out

    train, held, out = prompts(eval_data=folder, eval_split="test_prefs")
    assert (train, held) == ("pqr", "rrst") and "\n1 of 3 held-out prompts are also in training\n" in out
    train, held, out = prompts(eval_data=folder)
    assert (train, held) == ("pqr", "pqr") and "\n3 of 3 held-out prompts are also in training\n" in out
    train, held, out = prompts(eval_data=lone)
    assert (train, held) == ("pqr", "xy") and "also in training" not in out
    train, held, out = prompts(eval_fraction=0.5)
    assert sorted(train + held) == [*"pqr"] and "also in training" not in out
    with pytest.raises(BadInput, match="^--eval-split test_prefs: of which data"):
        prompts(eval_split="test_prefs")
    assert split_of(lone, "x") is None and split_of([lone, folder], "x") == "x"  # as train_ppo.py reads --ptx-data


@given(st.lists(st.sampled_from("abcd"), min_size=2, max_size=30), st.integers(0, 5))
def test_mismatched_is_a_derangement(prompts, seed):
    examples = [example_of(prompt, response=f"answer {i}") for i, prompt in enumerate(prompts)]
    owner = {tuple(e.responses[0]): i for i, e in enumerate(examples)}
    given_to = [owner[tuple(ids)] for ids, _ in mismatched(examples, seed)]
    assert sorted(given_to) == list(range(len(prompts)))
    assert all(i != j for i, j in enumerate(given_to))
    largest = max(prompts.count(p) for p in prompts)
    same = sum(prompts[i] == prompts[j] for i, j in enumerate(given_to))
    assert same == max(0, 2 * largest - len(prompts))  # no derangement can do better
    assert mismatched(examples, seed) == mismatched(examples, seed)


def test_mismatched_needs_two():
    assert mismatched([], 0) == []
    with pytest.raises(BadInput, match="^f:1: the only example"):
        mismatched([example_of("a")], 0)
    assert len({str(mismatched([example_of(c, c) for c in "abcdefgh"], seed)) for seed in range(8)}) > 1


def test_mismatched_responses_bring_their_masks():
    examples = [replace(example_of(c, c), responses=[[5, 6, 7]], trained=[[c == "b", False, True]]) for c in "ab"]
    assert mismatched(examples, 0) == [([5, 6, 7], [True, False, True]), ([5, 6, 7], [False, False, True])]
    assert mismatched([example_of("a"), examples[1]], 0)[1][1] is None


def test_show():
    example, _ = one(PLAIN, "unpaired", {"prompt": "p", "completion": "a\n", "label": True})
    assert show(example, PLAIN).splitlines() == [
        "f.jsonl:1: prompt, 2 tokens (+ trained, . not)",
        "    .'<s>' .'p'",
        "response 1 (desirable), 3 tokens, 3 trained",
        "    +'a' +'Ċ' +'</s>'",
    ]
    example, _ = one(CHAT, "sft", {"messages": [*SFT["messages"], said("user", "u" * 99), said("assistant", "b")]})
    words = show(example, CHAT).split()
    assert words[-2:] == ["+'b'", "+'<|im_end|>'"] and (words.count(".'u'"), words.count("+'u'")) == (1 + 1 + 1 + 99, 0)
    assert max(map(len, show(example, CHAT).splitlines())) <= 120


# -------------------------------------------------------------------------------------------------- real data

BYTES = byte_level(template=CHATML)


@pytest.mark.parametrize(
    "name, kind, kept",
    [
        ("prefs_hh_harmless_test", "preference", 2303),
        ("prefs_hh_helpful_test", "preference", 2339),
        ("prefs_gsm8k_correctness", "preference", 2426),
        ("kto_llamafactory_demo", "unpaired", 300),
        ("sft_alpaca_en_demo", "sft", 999),
        ("sum_tldr_reddit_samples", "sft", 100),
    ],
)
def test_real_files(name, kind, kept):
    source = REAL / f"{name}.jsonl.gz"
    if not source.exists():
        pytest.skip(f"no {source}: set RLHF_TEST_DATA to a folder that has it")
    examples, report = build(read_rows(str(source))[0], BYTES, kind, 1000, 3000)
    assert report.kept == kept == len(examples) and report.bos == kept and not report.dropped and not report.skipped
    assert report.eos == len(report.response_lengths) - report.responses_cut


@pytest.mark.slow
def test_raw_hh_rows_are_the_message_rows():
    raw, clean = REAL / "hh_harmless_raw_test.jsonl.gz", REAL / "prefs_hh_harmless_test.jsonl.gz"
    if not raw.exists() or not clean.exists():
        pytest.skip(f"no {raw}: set RLHF_TEST_DATA to a folder that has it")
    implicit, report = build(read_rows(str(raw))[0], PLAIN, "preference", 10**6, 10**7)
    explicit, _ = build(read_rows(str(clean))[0], PLAIN, "preference", 10**6, 10**7)
    assert report.dropped == {"blank answers": 4, "dialogues whose turns do not alternate": 5}

    def words(example):  # the message rows have stripped texts
        return [text.split() for text in (example.prompt_text, *example.response_texts)]

    assert [words(example) for example in implicit] == [words(example) for example in explicit]


def test_sft_leaves_out_what_people_found_undesirable():
    rows = [{"prompt": "p :", "completion": c, "label": label} for c, label in (("good", True), ("bad", False))]
    examples, report = build([(f"k:{i}", row) for i, row in enumerate(rows, 1)], reviews.tokenizer(), "sft", 9, 20)
    assert [e.response_texts for e in examples] == [["good"]] and report.dropped == {"undesirable completions": 1}
