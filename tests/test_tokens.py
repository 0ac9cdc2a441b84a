"""Pieces of a text have the ids that they have in the whole text; what is sampled is what is trained on."""

import base64
import functools
import importlib.util
import json
import os
import struct
import sys
from pathlib import Path

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from test_data import byte_level, one, said
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import bytes_to_unicode

import annotate
import sample
from rlhf import BadInput
from support import reviews, runs
from support.examples import load, show
from support.models import save
from support.rows import read_rows
from support.tokens import Pieces, digest

ZEPHYR = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>\n' + m['content'] + eos_token + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)
LLAMA2 = (
    "{% for m in messages %}{% if m['role'] == 'user' %}{{ bos_token + '[INST] ' + m['content'] + ' [/INST]' }}"
    "{% else %}{{ ' ' + m['content'] + ' ' + eos_token }}{% endif %}{% endfor %}"
)
MISTRAL = (  # its marks are tokens
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}{{ '[INST] ' + m['content'] + '[/INST]' }}"
    "{% else %}{{ ' ' + m['content'] + eos_token }}{% endif %}{% endfor %}"
)
PHI3 = (  # its marks are tokens that swallow the whitespace after them
    "{% for m in messages %}{{ '<|' + m['role'] + '|>\n' + m['content'] + '<|end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}"
)
GEMMA = (
    "{{ bos_token }}{% for m in messages %}{{ '<start_of_turn>' + ('model' if m['role'] == 'assistant' else 'user') }}"
    "{{ '\n' + m['content'] | trim + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
SMOLLM2 = (
    "{% for m in messages %}{% if loop.first and m['role'] != 'system' %}"
    "{{ '<|im_start|>system\nBe kind.<|im_end|>\n' }}{% endif %}"
    "{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
QWEN3 = (  # the last answer gets a thought, the earlier ones lose theirs
    "{% for m in messages %}{% set words = m['content'].split('</think>') %}{{ '<|im_start|>' + m['role'] + '\n' }}"
    "{% if m['role'] == 'assistant' and loop.last %}{{ '<think>\n' }}{% if words | length > 1 %}"
    "{{ words[0].split('<think>')[-1].strip('\n') }}{% endif %}{{ '\n</think>\n\n' }}{% endif %}"
    "{{ words[-1].lstrip('\n') + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
QWEN3_THINKING = QWEN3[: -len("{% endif %}")] + "{{ '<think>\n' }}{% endif %}"
LLAMA3_FIRST = (  # the header of the next answer, asked for or not
    "{% for m in messages %}{{ bos_token if loop.first else '' }}"
    "{{ '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n' + m['content'] | trim + '<|eot_id|>' }}{% endfor %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}"
)
HEADER = "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}"
LLAMA3 = LLAMA3_FIRST.replace(HEADER, "{% if add_generation_prompt %}" + HEADER + "{% endif %}")

MARKS = ["[INST]", "[/INST]", "<|user|>", "<|assistant|>", "<|end|>"]
WORDS = "what is the answer four five let me think about one two three six hello world it was a new day".split()
PREPEND = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
STYLES = {  # how a tokenizer puts ▁ in front: (normalizer, pre-tokenizer)
    "prepend": (PREPEND, None),
    "first": (None, pre_tokenizers.Metaspace("▁", "first", split=False)),
    "always": (None, pre_tokenizers.Metaspace("▁", "always", split=False)),
    "never": (normalizers.Replace(" ", "▁"), None),
}
DECODER = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]


def pretrained(model, style: str, marks=(), rstrip=False, template=None):
    backend = Tokenizer(model)
    norm, pre = STYLES[style]
    if norm:
        backend.normalizer = norm
    if pre:
        backend.pre_tokenizer = pre
    backend.decoder = decoders.Sequence(DECODER + [decoders.Strip(" ", 1, 0)] * (style != "never"))
    backend.add_special_tokens([AddedToken(name, normalized=False) for name in ("<unk>", "<s>", "</s>")])
    backend.add_special_tokens([AddedToken(name, normalized=False, rstrip=rstrip) for name in marks])
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    names = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, clean_up_tokenization_spaces=False, **names)
    tokenizer.chat_template = template
    return tokenizer


def sentencepiece(style: str, crossing=(), **options):
    """A SentencePiece-like BPE with a token for each word, with and without its space, and bytes for the rest."""
    vocab = {"<unk>": 0, "<s>": 1, "</s>": 2} | {f"<0x{i:02X}>": 3 + i for i in range(256)}
    merges = []
    for word in WORDS:
        merges += [(word[:i], word[i]) for i in range(1, len(word))]
    merges += [(word[0], word[1:]) for word in crossing] + [("▁", word) for word in WORDS]
    merges = list(dict.fromkeys(merges))
    for token in ["▁", *"".join(map(chr, range(33, 127))), *map("".join, merges)]:
        vocab.setdefault(token, len(vocab))
    model = models.BPE(vocab=vocab, merges=merges, fuse_unk=True, byte_fallback=True, unk_token="<unk>")
    return pretrained(model, style, **options)


def unigram(style: str, **options):
    words = [(token, -3.0 - i / 100) for i, word in enumerate(WORDS) for token in ("▁" + word, word)]
    letters = [(chr(i), -9.0) for i in range(33, 127)] + [("▁", -6.0)]
    bytes_ = [(f"<0x{i:02X}>", -12.0) for i in range(256)]
    scores = [("<unk>", 0.0), ("<s>", 0.0), ("</s>", 0.0), *letters, *words, *bytes_]
    unique = list(dict(reversed(scores)).items())[::-1]
    return pretrained(models.Unigram(unique, 0, byte_fallback=True), style, **options)


CHATS = [
    [said("user", "what is the answer ?"), said("assistant", "four")],
    [said("user", "what is ?"), said("assistant", "it was \n\nfive !"), said("user", "two"), said("assistant", "six")],
    [said("user", "hello"), said("assistant", "é was (five) 42")],
    [said("user", "world"), said("assistant", '"four\n')],
]
ANSWER_STYLES = {
    "zephyr": (ZEPHYR, []),
    "llama-2": (LLAMA2, []),
    "mistral": (MISTRAL, ["[INST]", "[/INST]"]),
    "phi-3": (PHI3, ["<|user|>", "<|assistant|>", "<|end|>"]),
}


def whole(tokenizer, chat) -> list[int]:
    """The library's ids of a conversation, behind BOS and up to the last EOS."""
    ids = tokenizer.apply_chat_template(chat, tokenize=True, return_dict=False)
    ids = ids if ids[0] == tokenizer.bos_token_id else [tokenizer.bos_token_id, *ids]
    return ids[: len(ids) - ids[::-1].index(tokenizer.eos_token_id)]


def assert_as_in_the_whole(tokenizer, chats=CHATS):
    for chat in chats:
        row = {"prompt": chat[:-1], "chosen": chat[-1:], "rejected": [said("assistant", "other")]}
        e, _ = one(tokenizer, "preference", row)
        assert e.prompt + e.responses[0] == whole(tokenizer, chat), chat
        if tokenizer.chat_template != PHI3 or len(chat) == 2:  # it writes EOS behind the last answer only
            e, _ = one(tokenizer, "sft", {"messages": chat})
            assert e.prompt + e.responses[0] == whole(tokenizer, chat), chat


@pytest.mark.parametrize("template", ANSWER_STYLES)
@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("make", [sentencepiece, unigram], ids=["bpe", "unigram"])
def test_conversations_have_the_librarys_ids(make, style, template):
    text, marks = ANSWER_STYLES[template]
    assert_as_in_the_whole(make(style, marks=marks, rstrip=template == "phi-3", template=text))


def raw(tokenizer, ids) -> list[str]:
    return tokenizer.convert_ids_to_tokens(ids)


@pytest.mark.parametrize("style", ["prepend", "first", "always"])
def test_the_answer_of_the_issue(style):
    tokenizer = sentencepiece(style, template=ZEPHYR)
    row = {"prompt": [said("user", "what is the answer ?")], "chosen": "four", "rejected": "five"}
    e, _ = one(tokenizer, "preference", row)
    assert [raw(tokenizer, ids) for ids in e.responses] == [["four", "</s>"], ["five", "</s>"]]
    row = {"prompt": "the answer is :", "responses": ["five", " five"], "ranks": [1, 2]}
    e, _ = one(tokenizer, "preference", row)
    assert raw(tokenizer, e.prompt) == ["<s>", "▁the", "▁answer", "▁is", "▁", ":"]
    assert [raw(tokenizer, ids) for ids in e.responses] == [["five", "</s>"], ["▁five", "</s>"]]
    assert "+'▁five' +'</s>'" in show(e, tokenizer) and "+'five' +'</s>'" in show(e, tokenizer)
    e, _ = one(tokenizer, "sft", {"text": "four five"})  # a text that nothing precedes does begin with its space
    assert raw(tokenizer, e.prompt + e.responses[0]) == ["<s>", "▁four", "▁five", "</s>"]


def test_a_token_that_would_cross_the_boundary_is_split_there():
    tokenizer = sentencepiece("prepend", crossing=[":five"])
    together = raw(tokenizer, tokenizer("the answer is :five")["input_ids"])
    assert together[-1] == ":five"
    e, _ = one(tokenizer, "sft", {"prompt": "the answer is :", "completion": "five"})
    assert (raw(tokenizer, e.prompt)[-1], raw(tokenizer, e.responses[0])) == (":", ["five", "</s>"])


def test_an_answer_after_an_added_token():
    """The library puts ▁ in front of it, or not, by the tokenizer's style."""
    for style, want in {"prepend": "▁four", "always": "▁four", "first": "four", "never": "four"}.items():
        tokenizer = sentencepiece(style, marks=MARKS, rstrip=True, template=PHI3)
        e, _ = one(tokenizer, "sft", {"prompt": [said("user", "what")], "completion": "four"})
        assert raw(tokenizer, e.responses[0]) == [want, "<|end|>", "</s>"]


def with_space():
    """A byte-level BPE that puts a space in front of every text."""
    tokenizer = byte_level(merges=[("Ġ", "f"), ("a", "b")])
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True, use_regex=True)
    return tokenizer


def test_a_byte_level_tokenizer_with_a_space_in_front():
    tokenizer = with_space()
    e, _ = one(tokenizer, "sft", {"prompt": "x:", "completion": "fab"})
    assert raw(tokenizer, e.prompt) == ["<s>", "Ġ", "x", ":"]
    assert raw(tokenizer, e.responses[0]) == ["f", "ab", "</s>"]


PATTERN = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"  # as Tekken's


def patterned():
    """A byte-level BPE whose words may begin with one mark of punctuation, if no other is in front of it."""
    tokenizer = byte_level(merges=[("(", "f"), ("_", "f"), (".", "f"), ("'", "s"), (":", "("), ("Ġ", "f"), ("Ċ", "Ċ")])
    split, to_bytes = pre_tokenizers.Split(Regex(PATTERN), "isolated"), pre_tokenizers.ByteLevel(False, use_regex=False)
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, to_bytes])
    return tokenizer


@pytest.mark.parametrize(
    "prompt, response, ids",
    [
        ("is :", "_fe", "_ f e"),
        ("is :", ".fe", ". f e"),
        ("is :", "'s", "' s"),
        ("is =", "(fe)", "( f e )"),
        ("is", "_fe", "_f e"),
        ("is :", " fe", "Ġf e"),
        ("is (", "fe", "f e"),
        ("is\n", "(fe", "(f e"),
        ("<s>", "(fe", "(f e"),
        ("is :", "(fe)", "(f e )"),  # the token :( would cross the boundary, which stays
        ("is ", "(fe", "( f e"),  # the word " (" crosses it, but not its tokens
        ("is\n", "\nfe", "Ċ f e"),
    ],
)
def test_a_pattern_that_looks_back(prompt, response, ids):
    tokenizer = patterned()
    together = raw(tokenizer, tokenizer(prompt + response, add_special_tokens=False)["input_ids"])
    e, _ = one(tokenizer, "preference", {"prompt": prompt, "chosen": response, "rejected": "other"})
    assert raw(tokenizer, e.responses[0]) == [*ids.split(), "</s>"]
    alone = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    if together[: len(alone)] == raw(tokenizer, alone):
        assert together[len(alone) :] == ids.split()


def by_spaces(name: str):
    """The library's T5 or XLNet tokenizer, which splits texts at whitespace and puts ▁ in front of every word."""
    pieces = [("<unk>", 0.0), ("<s>", 0.0), ("</s>", 0.0), ("▁", -5.0), *((c, -9.0) for c in ":?()<>|\n")]
    pieces += [(mark + word, -3.0) for word in WORDS for mark in ("▁", "")] + [("<pad>", 0.0)]
    pieces += [(c, -9.0) for c in "".join(sorted({*"".join(WORDS), *"usera"})) if c not in WORDS]
    names = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "extra_ids": 0}
    return getattr(transformers, name)(vocab=pieces, **names)


@pytest.mark.parametrize("name", ["T5Tokenizer", "XLNetTokenizer"])
def test_words_that_begin_with_their_space(name):
    tokenizer = by_spaces(name)
    for prompt, response, want in [
        ("the answer is :", "five", ["five"]),
        ("the answer is :", " five", ["▁five"]),
        ("the answer is : ", "five", ["▁five"]),
        ("the answer is :\n", "five five", ["▁five", "▁five"]),
        ("the answer", "five", ["five"]),
        ("the answer </s>", "five", ["▁five"]),
    ]:
        e, _ = one(tokenizer, "sft", {"prompt": prompt, "completion": response})
        assert raw(tokenizer, e.responses[0]) == [*want, "</s>"], (prompt, response)
    tokenizer.chat_template = ZEPHYR
    chat = [said("user", "what is the answer ?"), said("assistant", "four")]
    e, _ = one(tokenizer, "sft", {"messages": chat})
    ids = tokenizer.apply_chat_template(chat, tokenize=True, return_dict=False)
    assert raw(tokenizer, e.responses[0]) == ["▁four", "</s>"]
    assert e.prompt + e.responses[0] == ids[: len(ids) - ids[::-1].index(tokenizer.eos_token_id)]


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("prompt", ["<|assistant|>", "<|assistant|>\n", "<|assistant|> \n "])
def test_an_added_token_swallows_the_whitespace_of_an_answer(style, prompt):
    """The ids are the library's, with a space in front of every text (prepend, always) or not."""
    tokenizer = sentencepiece(style, marks=MARKS, rstrip=True)
    for response in ("four", " four", "\n four"):
        e, _ = one(tokenizer, "sft", {"prompt": prompt, "completion": response})
        want = "▁four" if style in ("prepend", "always") else "four"
        assert raw(tokenizer, e.responses[0]) == [want, "</s>"]
        assert tokenizer(prompt + response)["input_ids"] == e.prompt + e.responses[0][:-1]


JOINING = [patterned(), with_space(), by_spaces("T5Tokenizer"), sentencepiece("prepend"), sentencepiece("never")]
JOINING += [unigram("first"), unigram("always")]
PARTS = ["the", "answer", "four", " ", "\n", "  ", ":", "(", "</s>", "?", "f", "_f", "'s", "(f", "="]
TEXTS = st.lists(st.sampled_from(PARTS), min_size=1, max_size=8)


@pytest.mark.parametrize("tokenizer", JOINING)
@settings(max_examples=100, deadline=None)
@given(before=TEXTS, after=TEXTS)
def test_ids_are_those_of_the_joined_text(tokenizer, before, after):
    """The context is short, and yet the ids are those behind the whole prompt, unless a token crosses the boundary."""
    prompt, response = "".join(before), "".join(after)
    ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    both = tokenizer(prompt + response, add_special_tokens=False, return_offsets_mapping=True)
    joined, n, place = both["input_ids"], len(ids), len(prompt)
    ends, starts = ([span[i] for span in both["offset_mapping"]] for i in (1, 0))
    if ids and joined[:n] == ids and ends[n - 1] <= place and (n == len(joined) or starts[n] >= place):
        pieces = Pieces(tokenizer)
        context = pieces.context(prompt)
        assert pieces.encode([(context, response)]) == {(context, response): joined[n:]}


def test_the_context_of_a_piece():
    """Its last word, or what follows an added token."""
    pieces = Pieces(sentencepiece("prepend", marks=MARKS))
    for before, context in {
        "": "",
        "the answer is :": " :",
        "the answer is :\n\n": " :\n\n",
        "the answer": " answer",
        "what </s>": "</s>",
        "what </s>\n": "</s>\n",
        "what </s> is": "</s> is",
        "what </s> is the": " the",
        "what</s>is": "</s>is",
        "a" * 99: "a" * 32,
        "a" * 99 + "\n": "a" * 32 + "\n",
        "a" * 99 + "</s>" + "a" * 30: "</s>" + "a" * 30,
        "</s>" + "a" * 33: "a" * 32,
        " \n": " \n",
    }.items():
        assert pieces.context(before) == context, before
    assert pieces.context("is\n<|assistant|>\n") == "<|assistant|>\n"


@pytest.mark.parametrize("tokenizer", [reviews.tokenizer()])
def test_words_of_a_word_level_tokenizer_have_the_same_ids_anywhere(tokenizer):
    pieces = Pieces(tokenizer)
    for before in ("", "the plot :", "</s>", "the plot was "):
        assert pieces.context(before) == ""
    texts = ["was superb .", " four", "!", "\n\n", "'s", "four"]
    alone = tokenizer(texts, add_special_tokens=False)["input_ids"]
    encoded = pieces.encode([("", text) for text in texts])
    assert [encoded["", text] for text in texts] == alone


@pytest.mark.parametrize("make", [byte_level, reviews.tokenizer, lambda: sentencepiece("never")])
def test_where_texts_begin_like_any_words_ids_have_one_text(make):
    tokenizer = make()
    pieces = Pieces(tokenizer)
    assert not pieces.marks_beginnings
    ids = tokenizer("was superb .", add_special_tokens=False)["input_ids"]
    for before in ("", "the plot :", "</s>", "the plot was "):
        assert pieces.decode(pieces.context(before), ids) == tokenizer.decode(ids, skip_special_tokens=True)


# -------------------------------------------------------------------------------------------------- real tokenizers

MISTRAL_COMMON = importlib.util.find_spec("mistral_common")  # only its data are read
UNPACKED = os.environ.get("RLHF_TEST_MISTRAL_COMMON", Path(MISTRAL_COMMON.origin).parent if MISTRAL_COMMON else "")
DATA = Path(UNPACKED) / "data"
real = pytest.mark.skipif(
    not (DATA / "tokenizer.model.v1").exists(), reason="mistral-common, which ships tokenizer models, is not installed"
)


def fields(data: bytes, i: int, end: int):
    """(number, value) of the fields of a protobuf message; a value is a number or a slice."""

    def varint(i):
        n = shift = 0
        while True:
            byte = data[i]
            n, shift, i = n | (byte & 127) << shift, shift + 7, i + 1
            if byte < 128:
                return n, i

    while i < end:
        key, i = varint(i)
        if key & 7 == 0:
            value, i = varint(i)
        elif key & 7 == 2:
            n, i = varint(i)
            value, i = slice(i, i + n), i + n
        else:
            n = {1: 8, 5: 4}[key & 7]
            value, i = struct.unpack({8: "<d", 4: "<f"}[n], data[i : i + n])[0], i + n
        yield key >> 3, value


@functools.cache
def mistral_model(name: str):
    """The BPE of a SentencePiece model, and its control tokens."""
    data = (DATA / name).read_bytes()
    pieces = [dict(fields(data, x.start, x.stop)) for n, x in fields(data, 0, len(data)) if n == 1]
    pieces = [(data[p[1]].decode(), p.get(2, 0.0), p.get(3, 1)) for p in pieces]
    vocab = {piece: i for i, (piece, _, _) in enumerate(pieces)}
    merges = [
        (-score, piece[:i], piece[i:])
        for piece, score, kind in pieces
        if kind == 1
        for i in range(1, len(piece))
        if piece[:i] in vocab and piece[i:] in vocab
    ]
    merges = [(a, b) for _, a, b in sorted(merges, key=lambda m: m[0])]
    model = models.BPE(vocab=vocab, merges=merges, fuse_unk=True, byte_fallback=True, unk_token="<unk>")
    return model, [piece for piece, _, kind in pieces if kind == 3 and piece not in ("<s>", "</s>")]


@real
@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize(
    "name, template",
    [("tokenizer.model.v1", t) for t in ("zephyr", "llama-2", "phi-3")]
    + [("mistral_instruct_tokenizer_240323.model.v3", "mistral")],
)
def test_real_sentencepiece_models(name, template, style):
    model, control = mistral_model(name)
    text, marks = ANSWER_STYLES[template]
    tokenizer = pretrained(model, style, list(dict.fromkeys(control + marks)), template == "phi-3", text)
    assert_as_in_the_whole(tokenizer)
    if template == "zephyr":
        e, _ = one(tokenizer, "sft", {"messages": CHATS[0]})
        assert raw(tokenizer, e.responses[0]) == ["four", "</s>"]


@real
def test_a_real_tekken_model():
    """Byte-level BPE with a pattern; of its 130,000 tokens the first 20,000."""
    data, letters = json.loads((DATA / "tekken_240911.json").read_text()), bytes_to_unicode()
    tokens = [base64.b64decode(entry["token_bytes"]) for entry in data["vocab"][:20_000]]
    rank = {token: i for i, token in enumerate(tokens)}
    merges = []
    for token in tokens:
        splits = [(token[:i], token[i:]) for i in range(1, len(token))]
        splits = [split for split in splits if split[0] in rank and split[1] in rank]
        merges += sorted(splits, key=lambda split: (rank[split[0]], rank[split[1]]))
    written = lambda token: "".join(letters[b] for b in token)  # noqa: E731
    vocab = {written(token): i for token, i in rank.items()}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=[(written(a), written(b)) for a, b in merges]))
    pattern = pre_tokenizers.Split(Regex(data["config"]["pattern"]), "isolated")
    backend.pre_tokenizer = pre_tokenizers.Sequence([pattern, pre_tokenizers.ByteLevel(False, use_regex=False)])
    backend.add_special_tokens([AddedToken(x, normalized=False) for x in ("<s>", "</s>", "[INST]", "[/INST]")])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")
    tokenizer.chat_template = MISTRAL
    assert not Pieces(tokenizer).marks_beginnings
    assert_as_in_the_whole(tokenizer)
    for prompt, response, want in [
        ("the answer is :", "(five)", "( f ive )"),
        ("the answer is :", "_name", "_ name"),
        ("the answer is:", ".get", ". get"),
        ("x =", "'s", "' s"),
        ("the answer is", "(five)", "(f ive )"),
    ]:
        e, _ = one(tokenizer, "sft", {"prompt": prompt, "completion": response})
        joined = tokenizer(prompt + response, add_special_tokens=False)["input_ids"]
        assert raw(tokenizer, e.responses[0]) == [*want.split(), "</s>"]
        assert joined == [*tokenizer(prompt, add_special_tokens=False)["input_ids"], *e.responses[0][:-1]]


SMOLLM2_FOLDER = Path(os.environ.get("RLHF_TEST_SMOLLM2", "/nowhere"))  # made by ../shared/tools/smollm2.py


@pytest.mark.skipif(not SMOLLM2_FOLDER.is_dir(), reason="RLHF_TEST_SMOLLM2 names no folder of the model")
def test_real_smollm2():
    tokenizer = transformers.AutoTokenizer.from_pretrained(SMOLLM2_FOLDER)
    assert not Pieces(tokenizer).marks_beginnings
    e, _ = one(tokenizer, "sft", {"prompt": "the answer is :", "completion": "'s"})
    assert raw(tokenizer, e.responses[0]) == ["'", "s", "<|im_end|>"]
    for chat in CHATS:
        e, _ = one(tokenizer, "sft", {"messages": chat})
        ids = tokenizer.apply_chat_template(chat, tokenize=True, return_dict=False)
        assert [*e.prompt, *e.responses[0]] == ids[: len(ids) - ids[::-1].index(tokenizer.eos_token_id)]


# ---------------------------------------------------------------------------------- what is sampled and what is trained


def model_folder(folder: Path, tokenizer) -> Path:
    torch.manual_seed(0)
    sizes = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
    config = transformers.LlamaConfig(vocab_size=len(tokenizer), bos_token_id=1, eos_token_id=2, **sizes)
    save(transformers.LlamaForCausalLM(config), tokenizer, folder)
    return folder


@pytest.mark.parametrize("template", [None, ZEPHYR, PHI3], ids=["string", "zephyr", "phi-3"])
def test_sampled_ids_are_trained(template, tmp_path, monkeypatch, capsys):
    """From sample.py through annotate.py to what a script loads, for random ids, which no text would give again."""
    monkeypatch.setattr(runs, "environment", dict)
    monkeypatch.chdir(tmp_path)
    tokenizer = sentencepiece("prepend", marks=MARKS, rstrip=True, template=template)
    model = model_folder(tmp_path / "model", tokenizer)
    prompts = ["the answer is :", "what is"]
    rows = [{"prompt": [said("user", prompt)] if template else prompt} for prompt in prompts]
    Path("p.jsonl").write_text("\n".join(map(json.dumps, rows)))
    flags = {"model": str(model), "data": "p.jsonl", "out": "s.jsonl", "k": 4, "max_new_tokens": 8, "device": "cpu"}
    sample.main(sample.Args(**flags))
    samples = [row for _, row in read_rows("s.jsonl")[0]]
    Path("own_reward.py").write_text("def f(prompts, responses, rows):\n    return [float(len(x)) for x in responses]")
    annotate.main(annotate.Args("s.jsonl", "ranked.jsonl", by="own_reward:f"))
    sys.modules.pop("own_reward", None)

    args = type("Args", (), dict(split=None, skip_bad_rows=False, max_prompt_length=99, max_new_tokens=99))
    examples = load("ranked.jsonl", "preference", transformers.AutoTokenizer.from_pretrained(model), args)
    assert [e.responses for e in examples] == [row["token_ids"] for row in samples]
    assert [[len(ids) for ids in e.responses] for e in examples] == [row["tokens"] for row in samples]
    assert "token ids  of 8 responses are those that were sampled" in capsys.readouterr().out

    other = sentencepiece("prepend", marks=[*MARKS, "<|more|>"], rstrip=True, template=template)
    assert digest(other) != digest(tokenizer) == samples[0]["tokenizer"]
    again = load("ranked.jsonl", "preference", other, args)
    assert [e.responses for e in again] != [row["token_ids"] for row in samples]
    assert "of 8 responses are another tokenizer's: their texts are tokenised anew" in capsys.readouterr().out


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("template", [None, ZEPHYR, MISTRAL, PHI3], ids=["string", "zephyr", "mistral", "phi-3"])
def test_sampled_words_go_there_and_back_as_text(style, template):
    """Both spellings of a word, by the text alone. Behind an added token the library may always put ▁, or, if the token
    swallows spaces, never."""
    marks = MARKS if template != ZEPHYR else []
    tokenizer = sentencepiece(style, marks=marks, rstrip=template == PHI3, template=template)
    prompt = [said("user", "what is the answer ?")] if template else "the answer is :"
    pieces = Pieces(tokenizer)
    e, _ = one(tokenizer, "prompts", {"prompt": prompt})
    context = pieces.context(e.prompt_text)
    forced = template in (MISTRAL, PHI3) and style in ("prepend", "always")
    spellings = [["four", "▁five"]] * (not forced) + [["▁four", "▁five"]] * (forced or template != PHI3)
    for words in spellings:
        ids = tokenizer.convert_tokens_to_ids(words)
        text = pieces.decode(context, ids)
        assert text == (" " * (words[0] == "▁four" and not forced) + "four five")
        row = {"prompt": prompt, "responses": [text, "other"], "ranks": [1, 2], "ended": [False, True]}
        e, _ = one(tokenizer, "preference", row)
        assert e.responses[0] == ids


def sampled_row(tokenizer, **changes):
    ids = [tokenizer.convert_tokens_to_ids(["fou", "r"]), tokenizer.convert_tokens_to_ids(["▁five", "</s>"])]
    row = {"prompt": "the answer is :", "responses": ["four", " five"], "ranks": [1, 2], "ended": [False, True]}
    return row | {"token_ids": ids, "tokenizer": digest(tokenizer)} | changes


def test_token_ids_that_are_not_the_texts_are_refused():
    tokenizer = sentencepiece("prepend")
    row = sampled_row(tokenizer)
    e, report = one(tokenizer, "preference", row)
    assert e.responses == row["token_ids"] and (report.sampled, report.foreign) == (2, 0)
    for field, value, message in [
        ("responses", ["four", " six"], r"field 'token_ids\[1\]' does not spell 'responses\[1\]'"),
        ("token_ids", [[5], [6, 9999]], "field 'token_ids' is not a list of lists of token ids"),
        ("token_ids", [[5]], "field 'token_ids' is not a list of lists of token ids"),
        ("token_ids", [[5], []], "field 'token_ids' is not a list of lists of token ids"),
    ]:
        with pytest.raises(BadInput, match=f"^f.jsonl:1: {message}"):
            one(tokenizer, "preference", row | {field: value})
    ids = [tokenizer.convert_tokens_to_ids(["▁four"]), row["token_ids"][1]]
    e, _ = one(tokenizer, "preference", row | {"token_ids": ids})  # sampled where its ▁ is no space
    assert e.responses == ids
    e, report = one(tokenizer, "preference", row | {"tokenizer": "another"})
    assert [raw(tokenizer, ids) for ids in e.responses] == [["four"], ["▁five", "</s>"]]
    assert (report.sampled, report.foreign) == (0, 2)


# ------------------------------------------------------------------------------------------------------ chat templates


def test_a_cut_answer_is_no_finished_thought():
    tokenizer = byte_level(eos="<|im_end|>", template=QWEN3_THINKING, specials=["<|im_start|>"])
    row = {"prompt": [said("user", "two ?")], "responses": ["let me think about", "four\n</think>\n\nfour"]}
    row |= {"ranks": [2, 1], "ended": [False, True]}
    e, _ = one(tokenizer, "preference", row)
    assert e.prompt_text == "<|im_start|>user\ntwo ?<|im_end|>\n<|im_start|>assistant\n<think>\n"
    assert e.response_texts == ["let me think about", "four\n</think>\n\nfour<|im_end|>"]
    assert e.responses[0] == tokenizer("let me think about", add_special_tokens=False)["input_ids"]
    e, _ = one(tokenizer, "preference", row | {"ended": [True, True]})  # it ended in the middle of its thought
    assert e.response_texts == ["let me think about<|im_end|>", "four\n</think>\n\nfour<|im_end|>"]


@pytest.mark.parametrize("template", [ZEPHYR, LLAMA2, GEMMA, None], ids=["zephyr", "llama-2", "gemma", "none"])
def test_a_cut_answer_is_itself(template):
    tokenizer = byte_level(template=template)
    row = {"prompt": [said("user", "two ?")], "responses": [" \nlet me ", "four"], "ranks": [2, 1]}
    e, _ = one(tokenizer, "preference", row | {"ended": [False, True]})
    asked, _ = one(tokenizer, "prompts", {"prompt": row["prompt"]})
    assert e.prompt == asked.prompt
    assert e.responses[0] == tokenizer(" \nlet me ", add_special_tokens=False)["input_ids"]


TEMPLATES = {
    "llama-2": LLAMA2,
    "mistral": MISTRAL,
    "zephyr": ZEPHYR,
    "qwen3": QWEN3,
    "qwen3-thinking": QWEN3_THINKING,
    "gemma": GEMMA,
    "smollm2": SMOLLM2,
    "phi-3": PHI3,
    "llama-3": LLAMA3,
}
EOS = {"qwen3": "<|im_end|>", "qwen3-thinking": "<|im_end|>", "smollm2": "<|im_end|>", "llama-3": "<|eot_id|>"}


@pytest.mark.parametrize("name", TEMPLATES)
def test_templates_that_end_an_answer_are_accepted(name):
    tokenizer = byte_level(template=TEMPLATES[name], eos=EOS.get(name, "</s>"))
    e, _ = one(tokenizer, "preference", {"prompt": [said("user", "u")], "chosen": "four", "rejected": "five"})
    assert e.response_texts[0].rstrip().endswith(EOS.get(name, ("<end_of_turn>" if name == "gemma" else "</s>")))
    one(tokenizer, "sft", {"messages": CHATS[0]})


TURNS = "{% for m in messages %}{{ '<|' + m['role'] + '|>' + m['content'] + '<|end|>' }}{% endfor %}"
ASSISTANT = "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
NAMES = "{% for m in messages %}{{ m['role'] | upper + ': ' + m['content'] + '\n' }}{% endfor %}"
ONE_TURN = "{% if messages | length > 2 %}{{ raise_exception('one turn') }}{% endif %}"


def ending(text: str) -> str:
    """The part of a template that writes a text if the last message is an answer."""
    return "{% if messages[-1]['role'] == 'assistant' %}{{ '" + text + "' }}{% endif %}"


@pytest.mark.parametrize("eos", ["</s>", "<|end|>"])
@pytest.mark.parametrize(
    "template",
    [
        TURNS + ASSISTANT,
        ONE_TURN + TURNS + ASSISTANT,
        NAMES,
        ONE_TURN + NAMES,
        "{% for m in messages %}{{ m['content'] + '<|end|>' }}{% endfor %}",  # without a mark of who speaks
        "{{ bos_token }}{% for m in messages %}{{ m['content'] + '<|end|>' }}{% endfor %}",
        (TURNS + ASSISTANT).replace("|>", "_TOKEN|>"),
        (ONE_TURN + TURNS + ASSISTANT).replace("|>", "_TOKEN|>"),
    ],
)
def test_an_end_of_turn_is_no_other_turn(template, eos):
    tokenizer = byte_level(template=template, eos=eos)
    for row in ({"prompt": [said("user", "u")], "completion": "four"}, {"messages": [said("user", "u"), CHATS[0][1]]}):
        e, _ = one(tokenizer, "sft", row)
        assert e.response_texts[0].strip().startswith(("four", "ASSISTANT: four"))


OPENING = {
    "the user's turn": ("<|end|>", TURNS + ending("<|user|>")),
    "the user's turn, no EOS": ("</s>", TURNS + ending("<|user|>")),
    "of one turn, the user's": ("<|end|>", ONE_TURN + TURNS + ending("<|user|>")),
    "of one turn, the user's, no EOS": ("</s>", ONE_TURN + TURNS + ending("<|user|>")),
    "of one turn, always the assistant's": ("<|end|>", ONE_TURN + TURNS + "{{ '<|assistant|>' }}"),
    "of one turn, always the assistant's, no EOS": ("</s>", ONE_TURN + TURNS + "{{ '<|assistant|>' }}"),
    "the user's name": ("</s>", NAMES + ending("USER: ")),
    "the user's name, no space": ("</s>", NAMES + ending("USER:")),
    "of one turn, the user's name": ("</s>", ONE_TURN + NAMES + ending("USER:")),
    "the user's name after EOS": ("</s>", ZEPHYR + ending("USER: ")),
    "chatml": ("<|im_end|>", SMOLLM2 + ending("<|im_start|>user\\n")),
    "chatml, no EOS": ("</s>", SMOLLM2 + ending("<|im_start|>user\\n")),
    "a mark after EOS that no turn has": ("<|end|>", TURNS + ending("<|next|>")),
}


@pytest.mark.parametrize("name", OPENING)
def test_a_template_that_opens_a_turn_is_refused(name):
    eos, template = OPENING[name]
    tokenizer = byte_level(template=template, eos=eos)
    for kind, row in {
        "preference": {"prompt": [said("user", "u")], "chosen": "four", "rejected": "five"},
        "sft": {"messages": CHATS[0]},
        "responses": {"prompt": [said("user", "u")], "responses": ["four", "five"]},
    }.items():
        with pytest.raises(BadInput, match="^f.jsonl:1: the chat template opens another turn after an answer"):
            one(tokenizer, kind, row)


@pytest.mark.parametrize("eos", ["<|eot_id|>", "<|end_of_text|>"])
def test_a_template_that_opens_another_turn_is_refused(eos):
    tokenizer = byte_level(template=LLAMA3_FIRST, eos=eos)
    message = r"^f.jsonl:1: the chat template opens another turn after an answer \('<\|eot_id\|><\|start_header_id\|>"
    for kind, row in {
        "preference": {"prompt": [said("user", "u")], "chosen": "four", "rejected": "five"},
        "sft": {"messages": CHATS[0]},
        "unpaired": {"prompt": [said("user", "u")], "completion": [said("assistant", "four")], "label": True},
    }.items():
        with pytest.raises(BadInput, match=message):
            one(tokenizer, kind, row)
    e, _ = one(tokenizer, "prompts", {"prompt": [said("user", "u")]})  # there is no answer to train on
    assert e.prompt_text.endswith("assistant<|end_header_id|>\n\n")
