"""Rows -> token ids: from a file, a folder or the hub to prompts with their responses.

    read_rows   source -> rows, each with its place ("prefs.jsonl:17")
    build       rows -> Examples and a Report of what was kept, cut, dropped and why
    pairs       every preference between two responses of a prompt
    held_out    a split by the hash of the prompt, so that equal prompts stay together
    mismatched  for KTO: every prompt with a response that belongs to another one
    show        an example token by token

Row forms, recognised by their columns; text is a string or a list of {"role", "content"} messages:

    SFT         prompt, completion | messages | text
    preference  prompt, chosen, rejected | chosen, rejected with a shared beginning; optional margin, probability
    ranking     prompt, responses, ranks        (1 is best, equal is a tie); optional ended, rewards and noise
    unpaired    prompt, completion, label       (KTO)
    prompts     prompt | any form that has one

Prompt and responses are tokenised apart and joined as ids, so that no token merges across the boundary. Strings are
joined as they are: a space between prompt and response is the data's business. Messages go through the tokenizer's chat
template; where it has none they are written as in hh-rlhf, "\\n\\nHuman: ...\\n\\nAssistant: ...".

The shared beginning of two dialogues is the prompt and their last turns are the responses. Two dialogues that differ
before the last turn hold no preference between answers to one prompt, and a dialogue that ends in a blank answer has
nothing to train on: both are dropped and counted (5 and 4 of the 2,312 harmless test rows of hh-rlhf).

A sampled response that was cut before its end (`ended` false, from sample.py) gets no EOS. `rewards` and `noise` are
what a simulated annotator saw of each response, and through how much noise (annotate.py --by).
"""

import csv
import gzip
import hashlib
import io
import itertools
import json
import math
import os
import random
import re
import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from rlhf import BadInput, answer_at_once_offline, lazy_import

datasets = lazy_import("datasets")
parquet = lazy_import("pyarrow.parquet")

Row = tuple[str, dict]  # where it is, and what it says
Message = dict[str, str]

KINDS = {  # what a script trains on, and the row forms it takes, the first that fits
    "sft": [["prompt", "completion"], ["messages"], ["text"], ["prompt", "chosen", "rejected"], ["chosen", "rejected"]],
    "preference": [["prompt", "responses", "ranks"], ["prompt", "chosen", "rejected"], ["chosen", "rejected"]],
    "unpaired": [["prompt", "completion", "label"], ["prompt", "chosen", "rejected"], ["chosen", "rejected"]],
    "prompts": [["prompt"], ["chosen", "rejected"], ["messages"]],
    "responses": [["prompt", "responses"]],  # to be scored: no ranks, and none is dropped
}
TAKERS = {"sft": "train_sft.py", "preference": "train_dpo.py", "unpaired": "train_dpo.py --loss kto"}
ROLES = ("system", "user", "assistant", "tool")
HUMAN, ASSISTANT = "\n\nHuman:", "\n\nAssistant:"
SAVED = ("dataset_info.json", "dataset_dict.json")  # what save_to_disk leaves
SUFFIXES = (".jsonl", ".json", ".csv", ".parquet", ".gz")
MESSAGES_CELL = re.compile(r"""\s*\[\s*\{\s*["'](role|content)["']\s*:""")  # of a csv
FILES = "a .jsonl, .json, .csv (or .gz of these) or .parquet file"


@dataclass
class Example:
    """One prompt with its k responses, as token ids."""

    where: str  # "prefs.jsonl:17", for messages
    prompt: list[int]  # never empty; begins with BOS where the tokenizer's convention wants one
    responses: list[list[int]]  # k lists, none empty; each ends in EOS unless it was cut
    prompt_text: str  # as rendered; "" for `text` rows
    response_texts: list[str]
    ranks: list[int]  # 1 is best, equal is a tie
    labels: list[bool] | None  # unpaired rows: desirable or not
    trained: list[list[bool]] | None  # conversations: which tokens of each response are trained; None: all
    margin: float | None  # by how much the first response is better, where the row says
    probability: float  # P(the first response is preferred)
    row: dict
    rewards: list[float] | None = None  # of a ranking by a simulated annotator: the true rewards of the responses,
    noise: float | None = None  # and the scale of the noise through which the annotator saw them

    def label_probability(self, better: int, worse: int) -> float:
        """P(the annotator prefers `better` to `worse`), who did so: sigmoid((r_better - r_worse) / noise), or 1 where
        it is not known."""
        if self.rewards is None or not self.noise:
            return self.probability
        return (1 + math.tanh((self.rewards[better] - self.rewards[worse]) / self.noise / 2)) / 2


@dataclass
class Report:
    """What became of the rows; `str(report)` is printed before training. Lengths are in tokens, EOS included."""

    rows: int = 0
    kept: int = 0
    prompts_cut: int = 0
    responses_cut: int = 0
    dropped: Counter[str] = field(default_factory=Counter)  # reason -> rows
    skipped: list[str] = field(default_factory=list)  # bad rows under --skip-bad-rows, one message each
    bos: int = 0  # prompts that begin with exactly one BOS
    eos: int = 0  # responses that end in EOS
    unknown: float = 0.0  # share of all tokens that are the tokenizer's UNK; in [0, 1]
    prompt_lengths: list[int] = field(default_factory=list)
    response_lengths: list[int] = field(default_factory=list)
    length_difference: float | None = None  # mean of chosen - rejected over the pairs; tokens
    longer_wins: float | None = None  # accuracy of "the longer response is better", ties half; in [0, 1]
    desirable: float | None = None  # share of the labels; in [0, 1]

    def lines(self) -> list[str]:
        out = [f"examples   {self.kept} of {self.rows} rows"]
        if self.dropped:
            out.append("dropped    " + ", ".join(f"{n} {reason}" for reason, n in sorted(self.dropped.items())))
        if self.skipped:
            out.append(f"skipped    {len(self.skipped)} bad rows, the first of them:")
            out += [f"             {message}" for message in self.skipped[:3]]
        if not self.kept:
            return out
        prompts, responses = self.prompt_lengths, self.response_lengths
        out.append(f"cut        {self.prompts_cut} prompts, {self.responses_cut} responses")
        out.append(f"BOS        one in front of {self.bos} of {len(prompts)} prompts")
        out.append(f"prompts    {sum(prompts) / len(prompts):.1f} tokens on average, {max(prompts)} at most")
        if responses:
            out.append(f"EOS        at the end of {self.eos} of {len(responses)} responses")
            out.append(f"responses  {sum(responses) / len(responses):.1f} tokens on average, {max(responses)} at most")
        if self.unknown:
            out.append(f"unknown    {self.unknown:.1%} of the tokens: the tokenizer does not know their text")
        if self.desirable is not None:
            out.append(f"labels     {self.desirable:.1%} desirable")
        if self.longer_wins is not None:
            out.append(f"lengths    chosen - rejected = {self.length_difference:+.1f} tokens on average")
            out.append(f"baseline   'the longer one is better' is right in {self.longer_wins:.1%} of the pairs")
        return out

    def __str__(self) -> str:
        return "\n".join(self.lines())


class _Drop(Exception):
    """A row that is well formed but has nothing to train on: counted, never fatal."""


# ---------------------------------------------------------------------------------------------------- reading


def read_rows(source: str, split: str | None = None, skip_bad_rows: bool = False) -> tuple[list[Row], list[str]]:
    """Rows of a file, a `save_to_disk` folder or a hub id, and the messages of those that could not be read.

    `split` picks one of a folder's or hub set's splits; by default "train", or the only one. Unreadable rows raise
    BadInput, or are left out under `skip_bad_rows`.
    """
    path = Path(source).expanduser()
    skipped: list[str] = []
    try:
        if path.is_file():
            if split:
                raise BadInput(f"{source}: a file, which has no splits: leave out --split {split}")
            found = list(_file(path, skipped if skip_bad_rows else None))
        elif path.is_dir() and not any((path / name).exists() for name in SAVED):
            names = sorted(f.name for f in path.iterdir() if f.name.endswith(SUFFIXES))
            raise BadInput(
                f"{source}: a folder, but not one of save_to_disk: "
                + (f"name one of its files, such as {path / names[0]}" if names else f"give {FILES} or such a folder")
            )
        elif path.is_dir():
            found = _placed(path.resolve().name, _choose(source, datasets.load_from_disk(str(path)), split))
        elif not _hub_id(source):
            raise BadInput(f"{source}: no such file or folder")
        else:
            found = _placed(source, _hub(source, split))
    except BadInput:
        raise
    except Exception as error:  # gzip, csv, Arrow and the disk each have their own
        raise BadInput(f"{source}: cannot be read ({_line(error)}): give {FILES} or a save_to_disk folder") from error
    if not found:
        raise BadInput(f"{source}: holds no {'good ' if skipped else ''}rows")
    return found, skipped


def _hub_id(source: str) -> bool:
    """Whether a source that does not exist here can be meant for the hub: "name" or "owner/name"."""
    local = source.startswith(("/", ".", "~")) or "/" in source and Path(source).parent.is_dir()
    return not local and source.count("/") < 2 and not source.endswith(SUFFIXES)


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:160] or type(error).__name__


def _placed(name: str, rows) -> list[Row]:
    return [(f"{name}:{i}", row) for i, row in enumerate(rows, 1)]


def _hub(source: str, split: str | None):
    answer_at_once_offline()
    try:
        found = datasets.load_dataset(source, split=split)
    except Exception as error:  # network, unknown id, wrong split, broken files: the hub's many ways to say no
        raise BadInput(
            f"{source}: no such file, and not to be had from the hub ({_line(error)}): check the name and the split; "
            "without a network, download it elsewhere and pass a .jsonl or .parquet file or a save_to_disk folder"
        ) from error
    return _choose(source, found, split)


def _choose(source: str, found, split: str | None):
    if not isinstance(found, datasets.DatasetDict):
        return found
    names = list(found)
    wanted = split or (names[0] if len(names) == 1 else "train")
    if wanted not in names:
        raise BadInput(f"{source}: no split {wanted!r}: choose --split among {', '.join(names)}")
    return found[wanted]


def _file(path: Path, skipped: list[str] | None) -> Iterator[Row]:
    """Rows of one file; `skipped` collects the messages of the unreadable ones, None makes the first one fatal."""
    suffix = path.name.lower().removesuffix(".gz").rpartition(".")[2]
    if suffix == "parquet":
        yield from _placed(path.name, parquet.read_table(path).to_pylist())
        return
    if suffix not in ("jsonl", "json", "csv"):
        raise BadInput(f"{path}: unknown kind of file: give {FILES}")
    data = path.read_bytes()
    if path.name.lower().endswith(".gz"):
        data = gzip.decompress(data)
    data = data.removeprefix(b"\xef\xbb\xbf")

    items = _csv(data, path.name) if suffix == "csv" else _json(data, path.name, suffix)
    for where, value in items:
        if isinstance(value, dict):
            yield where, value
            continue
        problem = f"{where}: {value if isinstance(value, str) else 'not an object: write one {...} a row'}"
        if skipped is None:
            raise BadInput(f"{problem} or use --skip-bad-rows")
        skipped.append(problem)


def _json(data: bytes, name: str, suffix: str) -> Iterator[tuple[str, object]]:
    """Each row, or the problem with it as a string (a row that is itself a string is as little an object)."""
    if suffix == "json":
        try:
            whole = json.loads(data)
        except json.JSONDecodeError as error:
            if data.lstrip().startswith(b"["):
                raise BadInput(f"{name}:{error.lineno}: not JSON ({error.msg}): mend the file") from error
        except (ValueError, RecursionError) as error:
            raise BadInput(f"{name}: not JSON ({_line(error)}): mend the file") from error
        else:
            for where, value in _placed(name, whole if isinstance(whole, list) else [whole]):
                yield where, None if isinstance(value, str) else value
            return
    for number, line in enumerate(data.split(b"\n"), 1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except (ValueError, RecursionError) as error:
            yield f"{name}:{number}", f"not JSON ({_line(error)}): mend the line"
        else:
            yield f"{name}:{number}", None if isinstance(value, str) else value


def _cell(column: str, cell: str | None) -> object:
    """JSON in the columns that are never text, and where it is a list of messages; else the text."""
    never_text = column in (
        "messages",
        "responses",
        "ranks",
        "label",
        "margin",
        "probability",
        "ended",
        "rewards",
        "noise",
    )
    if not never_text and not MESSAGES_CELL.match(cell or ""):
        return cell
    try:
        return json.loads((cell or "null").lower() if column == "label" else cell or "null")
    except (ValueError, RecursionError):
        return cell  # for the checks to name


def _csv(data: bytes, name: str) -> Iterator[tuple[str, object]]:
    try:
        text = data.decode()
    except UnicodeDecodeError as error:
        raise BadInput(f"{name}: not UTF-8 ({_line(error)}): convert the file") from error
    csv.field_size_limit(min(sys.maxsize, 2**31 - 1))
    reader = csv.DictReader(io.StringIO(text, newline=""))
    line = reader.fieldnames and reader.line_num + 1
    for row in reader:
        if None in row:
            yield f"{name}:{line}", f"more than {len(reader.fieldnames or ())} cells: quote the text that has commas"
        else:
            row = {column: _cell(column, cell) for column, cell in row.items()}
            odd = [c for c, cell in row.items() if isinstance(cell, str) and MESSAGES_CELL.match(cell)]
            problem = f"field {odd[0]!r} holds messages that are not JSON: write them with double quotes" if odd else ""
            yield f"{name}:{line}", problem or row
        line = reader.line_num + 1


# ------------------------------------------------------------------------------------------- checking a row


def _text(value: object, name: str, sampled: bool = False) -> str:
    """A text that says something; only one that a model sampled may be empty (it ended at once)."""
    if not isinstance(value, str):
        raise BadInput(f"field {name!r} is not text but {type(value).__name__}: give it a text")
    if not value.strip() and not sampled:
        raise BadInput(f"field {name!r} is empty: give it a text")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise BadInput(f"field {name!r} holds half a surrogate pair: give it valid Unicode") from None
    return value


def _messages(value: object, name: str) -> list[Message]:
    """Any list of messages; a system message comes first or not at all."""
    if not isinstance(value, list) or not value:
        problem = "empty" if value == [] else f"not text or messages but {type(value).__name__}"
        raise BadInput(f"field {name!r} is {problem}: give it a text or a list of messages")
    messages = []
    for i, message in enumerate(value):
        if not isinstance(message, dict) or message.get("role") is None:
            raise BadInput(f"field {name!r}, message {i + 1} is not {{'role', 'content'}}: give it both")
        role = message["role"]
        if role not in ROLES:
            raise BadInput(f"field {name!r}, message {i + 1} has the role {str(role)[:40]!r}: use {', '.join(ROLES)}")
        if role == "system" and i:
            raise BadInput(f"field {name!r}, message {i + 1}: roles out of order: put the system message first")
        if message.get("content") is None:
            raise BadInput(f"field {name!r}, message {i + 1} has no content (tool calls are not read): give it a text")
        messages.append({"role": role, "content": _text(message["content"], name)})
    return messages


def _prompt(messages: list[Message], name: str) -> list[Message]:
    if not messages or messages[-1]["role"] not in ("user", "tool"):
        raise BadInput(f"field {name!r}: roles out of order: end the prompt with a user message")
    return messages


def _answer(value: object, name: str, sampled: bool) -> Message:
    """A response to a prompt of messages: a text, or exactly one assistant message."""
    if isinstance(value, str):
        return {"role": "assistant", "content": _text(value, name, sampled)}
    messages = _messages(value, name)
    if len(messages) != 1 or messages[0]["role"] != "assistant":
        raise BadInput(f"field {name!r}: roles out of order: give it exactly one assistant message")
    return messages[0]


def _scalar(row: dict, name: str, low: float, high: float) -> float | None:
    value = row.get(name)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
        raise BadInput(f"field {name!r} is not a number in [{low:g}, {high:g}]: give it one or leave it out")
    return float(value)


def _each(row: dict, name: str, fits: Callable[[object], bool], what: str) -> list | None:
    """An optional column of a ranking: one value for each response."""
    values = row.get(name)
    fit = isinstance(values, list) and len(values) == len(row["responses"]) and all(map(fits, values))
    if values is not None and not fit:
        raise BadInput(f"field {name!r} is not a list of {what}: give one for each response or leave it out")
    return values


def _common(row: dict) -> tuple[str | list[Message], list]:
    """The prompt that two dialogues share, and what follows it in each."""
    chosen, rejected = row["chosen"], row["rejected"]
    if isinstance(chosen, list) and isinstance(rejected, list):
        sides = _messages(chosen, "chosen"), _messages(rejected, "rejected")
        shared = min(map(len, sides)) - 1
        while sides[0][:shared] != sides[1][:shared]:
            shared -= 1
        prompt, rests = sides[0][:shared], [side[shared:] for side in sides]
        strayed = any(len(rest) > 1 for rest in rests)
    else:
        sides = _text(chosen, "chosen"), _text(rejected, "rejected")
        prompt = os.path.commonprefix(sides)
        if any(ASSISTANT in side for side in sides):
            prompt = prompt[: prompt.rfind(ASSISTANT) + len(ASSISTANT)] if ASSISTANT in prompt else ""
            rests = [side[len(prompt) :] for side in sides]
            strayed = any(HUMAN in rest or ASSISTANT in rest for rest in rests)
        else:  # the space goes with the response, as tokenizers have it
            prompt = prompt[: max((i for i, c in enumerate(prompt) if c.isspace()), default=0)].rstrip()
            rests = [side[len(prompt) :] for side in sides]
            strayed = False
    if chosen == rejected:
        raise _Drop("identical responses")
    if not prompt:
        raise BadInput("fields 'chosen' and 'rejected' share no beginning: give the row a 'prompt'")
    if strayed:
        raise _Drop("dialogues that differ before the last turn")
    if isinstance(prompt, str) and not all(rest.strip() for rest in rests):
        raise _Drop("blank last turns")
    return prompt, rests


# ---------------------------------------------------------------------------------------- rendering a row


@dataclass
class _Draft:
    """A row as text. A response is a list of pieces (text, trained), each tokenised apart."""

    where: str
    row: dict
    prompt: str
    responses: list[list[tuple[str, bool]]]
    ranks: list[int]
    labels: list[bool] | None = None
    ended: list[bool] | None = None  # None: all
    margin: float | None = None
    probability: float = 1.0
    rewards: list[float] | None = None
    noise: float | None = None


def _render(tokenizer, messages: list[Message], generate: bool = False) -> str:
    """Messages as one text, up to the point where the assistant's answer begins if `generate`."""
    if not tokenizer.chat_template:
        head = {"system": "\n\nSystem: ", "user": HUMAN + " ", "assistant": ASSISTANT + " ", "tool": "\n\nTool: "}
        return "".join(head[m["role"]] + m["content"] for m in messages) + (ASSISTANT if generate else "")
    try:
        return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=generate)
    except Exception as error:  # templates are programs, and raise what they like
        raise BadInput(f"the chat template refuses the messages ({_line(error)}): mend them") from error


def _turn(tokenizer, messages: list[Message], before: str) -> str:
    """What the last of the messages adds to the text before it, up to its EOS where the template puts one."""
    whole = _render(tokenizer, messages)
    if not whole.startswith(before):
        raise BadInput("the chat template does not begin a conversation with its prompt: give the row as strings")
    added = whole[len(before) :]
    if tokenizer.eos_token:
        head, eos, tail = added.rpartition(tokenizer.eos_token)
        if eos and not tail.strip():
            return head + eos
    return added


def _conversation(tokenizer, messages: list[Message]) -> tuple[str, list[tuple[str, bool]]]:
    """The text before the first assistant turn; and from there to the last one in pieces, the assistant's trained."""
    turns = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    if not turns:
        raise BadInput("field 'messages' has no assistant message: give it one to train on")
    prompt = text = _render(tokenizer, _prompt(messages[: turns[0]], "messages"), generate=True)
    pieces: list[tuple[str, bool]] = []
    for i in turns:
        before = _render(tokenizer, messages[:i], generate=True)
        if not before.startswith(text):
            raise BadInput("the chat template rewrites earlier turns: train on prompt, completion rows instead")
        if len(before) > len(text):
            pieces.append((before[len(text) :], False))
        answer = _turn(tokenizer, messages[: i + 1], before)
        pieces.append((answer, True))
        text = before + answer
    return prompt, pieces


def _draft(where: str, row: dict, form: list[str], kind: str, tokenizer) -> _Draft:
    for name in form:
        if row.get(name) is None:
            raise BadInput(f"field {name!r} is missing: give it to every row")

    if form == ["text"]:
        return _Draft(where, row, "", [[(_text(row["text"], "text"), True)]], [1])
    if form == ["messages"]:
        messages = _messages(row["messages"], "messages")
        if kind == "sft":
            prompt_text, pieces = _conversation(tokenizer, messages)
            return _Draft(where, row, prompt_text, [pieces], [1])
        messages = messages[:-1] if messages[-1]["role"] == "assistant" else messages
        return _Draft(where, row, _render(tokenizer, _prompt(messages, "messages"), generate=True), [], [])

    draft = _Draft(where, row, "", [], [1])
    pair = "chosen" in form
    if pair and ("prompt" not in form or implicit(row)):
        prompt, values = _common(row)
        names = ["chosen", "rejected"]
    else:
        prompt = row["prompt"]
        if kind == "prompts" and isinstance(prompt, str):  # that may belong to answers in messages
            prompt = prompt_of(row)
        names = [name for name in form if name in ("completion", "chosen", "rejected")]
        values = [row[name] for name in names]
    if "responses" in form:
        values = row["responses"]
        draft.ranks = row["ranks"] if "ranks" in form else [1] * (len(values) if isinstance(values, list) else 0)
        if not isinstance(values, list) or not isinstance(draft.ranks, list) or not values:
            raise BadInput("fields 'responses' and 'ranks' are not two lists: give one rank for each response")
        if len(values) != len(draft.ranks):
            raise BadInput(f"field 'ranks' has {len(draft.ranks)} ranks for {len(values)} responses: give one for each")
        if not all(isinstance(rank, int | float) and rank >= 1 and rank == rank // 1 for rank in draft.ranks):
            raise BadInput("field 'ranks' is not made of whole numbers from 1 (best) on: rank the responses")
        draft.ranks = [int(rank) for rank in draft.ranks]
        draft.ended = _each(row, "ended", lambda x: isinstance(x, bool), "true or false")
        number = lambda x: isinstance(x, int | float) and not isinstance(x, bool) and math.isfinite(x)  # noqa: E731
        found = _each(row, "rewards", number, "finite numbers")
        draft.rewards = found and [float(x) for x in found]
        draft.noise = _scalar(row, "noise", 0.0, 1e30)
        names = [f"responses[{i}]" for i in range(len(values))]
    elif pair:
        draft.ranks = [1, 2]
        draft.margin = _scalar(row, "margin", -1e30, 1e30)
        probability = _scalar(row, "probability", 0.0, 1.0)
        draft.probability = 1.0 if probability is None else probability
        draft.labels = [True, False] if kind == "unpaired" else None
    elif "label" in form:
        if not isinstance(row["label"], int | float) or row["label"] not in (0, 1):
            raise BadInput("field 'label' is not true or false: say whether the completion is desirable")
        draft.labels = [bool(row["label"])]

    if kind == "prompts":
        values, names, draft.ranks = [], [], []
    elif kind == "sft":
        values, names, draft.ranks, draft.margin, draft.probability = values[:1], names[:1], [1], None, 1.0

    if isinstance(prompt, str) and all(isinstance(value, str) for value in values):
        draft.prompt = _text(prompt, "prompt")
        draft.responses = [
            [(_text(value, name, draft.ended is not None), True)] for value, name in zip(values, names, strict=True)
        ]
    else:
        if isinstance(prompt, str):
            prompt = [{"role": "user", "content": _text(prompt, "prompt")}]
        prompt = _messages(prompt, "prompt")
        draft.prompt = _render(tokenizer, _prompt(prompt, "prompt"), generate=True)
        for value, name in zip(values, names, strict=True):
            messages = [*prompt, _answer(value, name, draft.ended is not None)]
            draft.responses.append([(_turn(tokenizer, messages, draft.prompt), True)])
        for i, ended in enumerate(draft.ended or ()):
            if not ended:  # then nothing of the template's end of a turn belongs to it
                [(text, _)], content = draft.responses[i], _answer(values[i], names[i], True)["content"].strip()
                if content not in text:
                    raise BadInput(f"the chat template rewrites field {names[i]!r}: give the row as strings")
                draft.responses[i] = [(text[: text.rfind(content) + len(content)], True)]
    if "ranks" in form and len(set(draft.ranks)) == 1:
        raise _Drop("ties throughout")
    return draft


# ------------------------------------------------------------------------------------------------ token ids


def build(
    rows: Sequence[Row],
    tokenizer,
    kind: str,
    max_prompt_length: int,
    max_length: int,
    skip_bad_rows: bool = False,
    skipped: Sequence[str] = (),
) -> tuple[list[Example], Report]:
    """Examples for one kind of training ("sft", "preference", "unpaired", "prompts"), and what became of the rows.

    A prompt is cut from its left to `max_prompt_length` tokens, BOS kept; a response is cut from its right so that the
    two have at most `max_length` tokens, and then has no EOS. `skipped`: the messages of `read_rows`, for the report.
    A malformed row raises BadInput, or is left out and counted under `skip_bad_rows`.
    """
    if max_prompt_length < 1:
        raise BadInput(f"--max-prompt-length {max_prompt_length}: leaves no token for the prompt: give 1 or more")
    if max_length < 2:
        raise BadInput(f"--max-length {max_length}: leaves no token for prompt and response: give 2 or more")
    form = _form(rows, kind)
    if tokenizer.eos_token_id is None and form != ["text"] and kind != "prompts":
        raise BadInput("the tokenizer has no EOS token, so that no response could end: set its eos_token")
    report = Report(rows=len(rows) + len(skipped), skipped=list(skipped))

    def attempt(where: str, step: Callable, *args):
        try:
            return step(*args)
        except _Drop as reason:
            report.dropped[str(reason)] += 1
        except BadInput as error:
            if not skip_bad_rows:
                raise BadInput(f"{where}: {error} or use --skip-bad-rows") from error
            report.skipped.append(f"{where}: {error}")

    drafts = [attempt(where, _draft, where, row, form, kind, tokenizer) for where, row in rows]
    drafts = [draft for draft in drafts if draft is not None]
    pieces = {text for draft in drafts for response in draft.responses for text, _ in response}
    texts = ["", *sorted(pieces | {draft.prompt for draft in drafts})]
    ids = dict(zip(texts, tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"], strict=True))

    bos = tokenizer.bos_token_id if tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id] else None
    room = min(max_prompt_length, max_length - 1)
    examples = [attempt(draft.where, _join, draft, ids, tokenizer, bos, room, max_length, report) for draft in drafts]
    examples = [example for example in examples if example is not None]
    if not examples:
        reasons = [f"{n} {reason}" for reason, n in report.dropped.items()] + report.skipped[:1]
        name = rows[0][0].rpartition(":")[0]
        raise BadInput(f"{name}: nothing is left of its {len(rows)} rows ({'; '.join(reasons)}): give other data")
    _measure(examples, report, tokenizer)
    return examples, report


def _form(rows: Sequence[Row], kind: str) -> list[str]:
    """The columns of the first row form that some row fits; every row has to."""
    if not rows:
        raise BadInput("the data holds no rows: give it some")
    filled = {frozenset(name for name, value in row.items() if value is not None) for _, row in rows}
    for form in KINDS[kind]:
        if any(names.issuperset(form) for names in filled):
            return form
    found = ", ".join(repr(str(name)[:40]) for name in sorted(set().union(*filled), key=str)[:20]) or "none"
    needed = " | ".join(", ".join(form) for form in KINDS[kind])
    name = rows[0][0].rpartition(":")[0]
    others = [k for k in ("preference", "unpaired", "sft") if any(n.issuperset(f) for n in filled for f in KINDS[k])]
    hint = f"use {TAKERS[others[0]]}, or rename" if others else "rename"
    raise BadInput(f"{name}: its columns ({found}) fit no form of {kind} rows: {hint} them to one of {needed}")


def _join(
    draft: _Draft,
    ids: dict[str, list[int]],
    tokenizer,
    bos: int | None,
    room: int,
    max_length: int,
    report: Report,
) -> Example:
    """Prompt ids and response ids, tokenised apart, with BOS and EOS where due, cut to `room` and `max_length`."""
    eos = tokenizer.eos_token_id
    responses, trained = [], []
    for pieces, ended in zip(draft.responses, draft.ended or [True] * len(draft.responses), strict=True):
        response: list[int] = []
        mask: list[bool] = []
        for i, (text, train) in enumerate(pieces):
            piece = list(ids[text])
            if train and not piece and draft.ended is None:
                raise BadInput(f"a response has no token in this tokenizer ({text[:40]!r}): give it another text")
            ends = i == len(pieces) - 1 or not tokenizer.chat_template
            if train and ends and ended and eos is not None and piece[-1:] != [eos]:
                piece.append(eos)
            response += piece
            mask += [train] * len(piece)
        if not response:
            raise _Drop("a response without a token")
        responses.append(response)
        trained.append(mask)

    prompt = list(ids[draft.prompt])
    if draft.prompt:
        if bos is not None and prompt[:1] != [bos]:
            prompt = [bos, *prompt]
        if not prompt:
            raise BadInput(f"the prompt has no token in this tokenizer ({draft.prompt[:40]!r}): give it another text")
    else:  # a `text` row begins at BOS, else at EOS, else at its own first token, which is then not scored
        start = eos if tokenizer.bos_token_id is None else tokenizer.bos_token_id
        prompt = [responses[0][0] if start is None else start]
        if responses[0][0] == prompt[0]:
            responses, trained = [responses[0][1:]], [trained[0][1:]]
        if not responses[0]:
            raise BadInput("field 'text' has one token only, and nothing to predict it from: give it a longer text")

    prompt_cut = len(prompt) > room
    if prompt_cut:
        head = [bos] if prompt[0] == bos else []
        prompt = head + prompt[len(prompt) - room + len(head) :]
    space = max_length - len(prompt)
    cut = [response[:space] for response in responses]
    trained = [mask[:space] for mask in trained]
    if len(set(draft.ranks)) > 1 and all(response == cut[0] for response in cut):
        raise _Drop("identical responses")
    report.prompts_cut += prompt_cut
    report.responses_cut += sum(len(response) > space for response in responses)
    return Example(
        where=draft.where,
        prompt=prompt,
        responses=cut,
        prompt_text=draft.prompt,
        response_texts=["".join(text for text, _ in pieces) for pieces in draft.responses],
        ranks=draft.ranks,
        labels=draft.labels,
        trained=None if all(map(all, trained)) else trained,
        margin=draft.margin,
        probability=draft.probability,
        rewards=draft.rewards,
        noise=draft.noise,
        row=draft.row,
    )


def _measure(examples: list[Example], report: Report, tokenizer) -> None:
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    responses = [response for example in examples for response in example.responses]
    report.kept = len(examples)
    report.bos = sum(example.prompt[0] == bos and example.prompt[1:2] != [bos] for example in examples)
    report.eos = sum(response[-1] == eos for response in responses)
    report.prompt_lengths = [len(example.prompt) for example in examples]
    report.response_lengths = [len(response) for response in responses]
    if tokenizer.unk_token_id not in (None, bos, eos):
        rows = [*(example.prompt for example in examples), *responses]
        report.unknown = sum(ids.count(tokenizer.unk_token_id) for ids in rows) / sum(map(len, rows))
    labels = [label for example in examples for label in example.labels or ()]
    report.desirable = sum(labels) / len(labels) if labels else None

    differences, longer = [], []  # both as expected under the label's probability
    for example in examples:
        for better, worse in itertools.permutations(range(len(example.responses)), 2):
            if example.ranks[better] < example.ranks[worse]:
                difference = len(example.responses[better]) - len(example.responses[worse])
                label = example.label_probability(better, worse)
                differences.append((2 * label - 1) * difference)
                right = 0.5 + 0.5 * ((difference > 0) - (difference < 0))
                longer.append(label * right + (1 - label) * (1 - right))
    if longer:
        report.length_difference = sum(differences) / len(differences)
        report.longer_wins = sum(longer) / len(longer)


# ------------------------------------------------------------------------------- splitting, pairing, showing


def group_of(example: Example, column: str | None = None) -> str:
    """What must not straddle a split: the prompt's text, or the value of a column of the row."""
    if column is None:
        return example.prompt_text or example.response_texts[0]
    value = example.row
    for name in column.split("."):
        value = value.get(name) if isinstance(value, dict) else None
    if value is None:
        raise BadInput(f"{example.where}: field {column!r} is missing: name another column to split by")
    return str(value)


def held_out(
    examples: Sequence[Example], fraction: float, column: str | None = None
) -> tuple[list[Example], list[Example]]:
    """Training and held-out examples: held out where the prompt's sha256, as a number in [0, 1), is below `fraction`.

    It depends on the text alone, not on order or seed, so equal prompts never straddle. `text` rows go by their text.
    With a `column` of the rows ("topic", or "meta.topic" inside another) its value takes the prompt's place.
    """
    parts: tuple[list[Example], list[Example]] = [], []
    for example in examples:
        text = group_of(example, column)
        share = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") / 2**64
        parts[share < fraction].append(example)
    return parts


def pairs(examples: Sequence[Example]) -> tuple[list[int], list[int], list[float], list[float]]:
    """Every pair (i preferred to j) of every prompt, i and j as places among all responses laid flat; the pair's weight
    (they add up to 1 over a prompt), and the probability of its label."""
    better, worse, weights, right, first = [], [], [], [], 0
    for e in examples:
        found = [(i, j) for i, a in enumerate(e.ranks) for j, b in enumerate(e.ranks) if a < b]
        better += [first + i for i, _ in found]
        worse += [first + j for _, j in found]
        weights += [1 / max(len(found), 1)] * len(found)
        right += [e.label_probability(i, j) for i, j in found]
        first += len(e.ranks)
    return better, worse, weights, right


def ceiling(examples: Sequence[Example]) -> float:
    """Accuracy of someone who knows the true reward: the mean of max(P(label), 1 - P(label)) over all pairs, where the
    pairs of a prompt share its weight. In [0.5, 1]; 1 where the annotators' noise is not known."""
    _, _, weights, right = pairs(examples)
    return sum(w * max(p, 1 - p) for w, p in zip(weights, right, strict=True)) / sum(weights) if weights else 1.0


def without_ties(examples: Sequence[Example], ties: str, seed: int) -> list[Example]:
    """Plackett-Luce needs a full order: rankings with ties are refused, dropped, or their ties broken at random."""
    tied = [e for e in examples if len(set(e.ranks)) < len(e.ranks)]
    if tied and ties == "refuse":
        raise BadInput(
            f"{tied[0].where}: field 'ranks' has ties, which plackett_luce cannot use: --ties drop or random"
        )
    if tied:
        print(f"{len(tied)} rankings with ties: {ties}\n")
    if ties == "drop":
        return [e for e in examples if len(set(e.ranks)) == len(e.ranks)]
    rng = random.Random(seed)
    orders = [sorted(range(len(e.ranks)), key=lambda i: (e.ranks[i], rng.random())) for e in examples]  # noqa: B023
    return [replace(e, ranks=[o.index(i) + 1 for i in range(len(o))]) for e, o in zip(examples, orders, strict=True)]


def implicit(row: dict) -> bool:
    """Whether the prompt of a row is what its chosen and rejected share: it has no other, or has it twice."""
    sides = [row.get("chosen"), row.get("rejected")]
    dialogues = all(isinstance(side, list) and len(side) > 1 for side in sides)
    return None not in sides and (row.get("prompt") is None or isinstance(row["prompt"], str) and dialogues)


def prompt_of(row: dict) -> str | list[Message]:
    """The prompt of a row that `build` took, as it took it: a text, or messages."""
    if implicit(row):
        return _common(row)[0]
    if row.get("prompt") is None:
        return row["messages"][:-1] if row["messages"][-1]["role"] == "assistant" else row["messages"]
    several = row["responses"] if isinstance(row.get("responses"), list) else []
    answers = [row.get("chosen"), row.get("rejected"), row.get("completion"), *several]
    if isinstance(row["prompt"], str) and any(isinstance(answer, list) for answer in answers):
        return [{"role": "user", "content": row["prompt"]}]
    return row["prompt"]


def texts_of(row: dict) -> list[str]:
    """The responses of a preference or ranking row as texts, without the marks of a chat template."""
    ranked = row.get("responses") is not None and row.get("ranks") is not None
    found = row["responses"] if ranked else _common(row)[1] if implicit(row) else [row["chosen"], row["rejected"]]
    return [x if isinstance(x, str) else x[-1]["content"] for x in found]


def longest(prompts: Sequence[Example], tokens: int, without: Collection[int] = ()) -> list[Example]:
    """The shortest and the longest prompt with two made-up responses of so many tokens: what a layout is checked on
    before anything is sampled. `without`: ids that no response has, such as those that pad."""
    ends = [min(prompts, key=lambda e: len(e.prompt)), max(prompts, key=lambda e: len(e.prompt))]
    words = [token for token in ends[1].prompt if token not in without] or [max(without) + 1]
    made_up = (words * tokens)[:tokens]
    return [replace(e, responses=[made_up, made_up[::-1]], ranks=[1, 1]) for e in ends]


def mismatched(examples: Sequence[Example], seed: int) -> list[list[int]]:
    """For each example a response of another example, and of another prompt wherever that is possible.

    KTO's KL estimate needs them (Ethayarajh et al. 2024, arXiv 2402.01306). A derangement by rotation: the examples are
    laid out shuffled, equal prompts side by side, the largest such group first, and each takes a response of the one
    that lies that group's length further on. Raises BadInput where there is but one example.
    """
    if len(examples) == 1:
        raise BadInput(f"{examples[0].where}: the only example, and KTO needs another one's response: give more rows")
    rng = random.Random(seed)
    groups = defaultdict(list)
    for i in rng.sample(range(len(examples)), len(examples)):
        groups[tuple(examples[i].prompt)].append(i)
    layout = sorted(groups.values(), key=len, reverse=True)
    order = [i for group in layout for i in group]
    shift = len(layout[0]) if len(layout) > 1 else 1
    out: list[list[int]] = [[] for _ in examples]
    for place, i in enumerate(order):
        out[i] = rng.choice(examples[order[(place + shift) % len(order)]].responses)
    return out


def show(example: Example, tokenizer) -> str:
    """The example token by token: `+` before a token that is trained, `.` before one that is not."""

    def block(ids: list[int], trained: list[bool]) -> list[str]:
        lines = [""]
        for token, train in zip(ids, trained, strict=True):
            word = ("+" if train else ".") + repr(tokenizer.decode([token]))
            if len(lines[-1]) + len(word) > 110:
                lines.append("")
            lines[-1] += " " + word
        return ["   " + line for line in lines]

    prompt = example.prompt
    out = [f"{example.where}: prompt, {len(prompt)} tokens", *block(prompt, [False] * len(prompt))]
    for i, ids in enumerate(example.responses):
        trained = example.trained[i] if example.trained else [True] * len(ids)
        fate = f"rank {example.ranks[i]}"
        if example.labels is not None:
            fate = "desirable" if example.labels[i] else "undesirable"
        out += [f"response {i + 1} ({fate}), {len(ids)} tokens, {sum(trained)} trained", *block(ids, trained)]
    return "\n".join(out)
