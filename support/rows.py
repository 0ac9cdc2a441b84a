"""Read rows from a file, a `save_to_disk` folder or the hub, and check their fields.

    read_rows   source -> rows, each with its location ("prefs.jsonl:17")
    prompt_of   the prompt of a row
    texts_of    the responses of a preference or ranking row

Each problem with a row is reported in one line that says how to fix it. The caller adds the file and the row number.

A row in the hh-rlhf form holds two dialogues. Their common beginning is the prompt, and their last turns are the
responses. If the dialogues already differ before the last turn, they do not compare answers to the same prompt; if a
last turn is blank, there is nothing to train on. Both kinds of row are dropped and counted (5 and 4 of the 2,312
harmless test rows of hh-rlhf).
"""

import csv
import gzip
import io
import json
import os
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from rlhf import BadInput
from support import answer_at_once_offline, lazy_import

datasets = lazy_import("datasets")
parquet = lazy_import("pyarrow.parquet")

#

Row = tuple[str, dict]  # location ("prefs.jsonl:17"), columns
Message = dict[str, str]

#

ROLES = ("system", "user", "assistant", "tool")
HUMAN, ASSISTANT = "\n\nHuman:", "\n\nAssistant:"
SAVED = ("dataset_info.json", "dataset_dict.json")  # a save_to_disk folder holds one of these
SUFFIXES = (".jsonl", ".json", ".csv", ".parquet", ".gz")
MESSAGES_CELL = re.compile(r"""\s*\[\s*\{\s*["'](role|content)["']\s*:""")  # a CSV cell with messages
FILES = "a .jsonl, .json, .csv (or .gz of these) or .parquet file"


class Dropped(Exception):
    """Raised for a well-formed row that has nothing to train on. Such rows are counted and never stop the program."""


# ---------------------------------------------------------------------------------------------------- reading


def read_rows(source: str, split: str | None = None, skip_bad_rows: bool = False) -> tuple[list[Row], list[str]]:
    """Read the rows of a file, a `save_to_disk` folder or a hub data set; returns (rows, messages about skipped rows).

    `split` selects a split of a folder or hub data set; the default is "train", or the only split. An unreadable row
    raises BadInput; with `skip_bad_rows` it is skipped.
    """
    path = Path(source).expanduser()
    skipped: list[str] = []
    try:
        if path.is_file():
            if split:
                raise BadInput(f"{source}: a file, which has no splits: leave out --split {split}")
            rows = list(_read_file(path, skipped if skip_bad_rows else None))
        elif path.is_dir() and not any((path / name).exists() for name in SAVED):
            names = sorted(f.name for f in path.iterdir() if f.name.endswith(SUFFIXES))
            raise BadInput(
                f"{source}: a folder, but not one of save_to_disk: "
                + (f"name one of its files, such as {path / names[0]}" if names else f"give {FILES} or such a folder")
            )
        elif path.is_dir():
            rows = _number(path.resolve().name, _select_split(source, datasets.load_from_disk(str(path)), split))
        elif not _may_be_hub_id(source):
            raise BadInput(f"{source}: no such file or folder")
        else:
            rows = _number(source, _load_from_hub(source, split))
    except BadInput:
        raise
    except Exception as error:  # gzip, csv, Arrow and the disk raise different exceptions
        raise BadInput(
            f"{source}: cannot be read ({one_line(error)}): give {FILES} or a save_to_disk folder"
        ) from error
    if not rows:
        raise BadInput(f"{source}: holds no {'good ' if skipped else ''}rows")
    return rows, skipped


def _may_be_hub_id(source: str) -> bool:
    """Whether a source that is not on this disk could be a hub id: "name" or "owner/name"."""
    local = source.startswith(("/", ".", "~")) or "/" in source and Path(source).parent.is_dir()
    return not local and source.count("/") < 2 and not source.endswith(SUFFIXES)


def one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:160] or type(error).__name__


def _number(name: str, rows) -> list[Row]:
    return [(f"{name}:{i}", row) for i, row in enumerate(rows, 1)]


def _load_from_hub(source: str, split: str | None):
    answer_at_once_offline()
    try:
        data = datasets.load_dataset(source, split=split)
    except Exception as error:  # network, unknown id, wrong split and broken files raise different exceptions
        raise BadInput(
            f"{source}: no such file, and not to be had from the hub ({one_line(error)}): check the name and the "
            "split; without a network, download it elsewhere and pass a .jsonl or .parquet file or a save_to_disk "
            "folder"
        ) from error
    return _select_split(source, data, split)


def _select_split(source: str, data, split: str | None):
    if not isinstance(data, datasets.DatasetDict):
        return data
    names = list(data)
    split = split or (names[0] if len(names) == 1 else "train")
    if split not in names:
        raise BadInput(f"{source}: no split {split!r}: choose --split among {', '.join(names)}")
    return data[split]


def _read_file(path: Path, skipped: list[str] | None) -> Iterator[Row]:
    """Rows of one file. For each unreadable row, append a message to `skipped`, or raise BadInput if that is None."""
    suffix = path.name.lower().removesuffix(".gz").rpartition(".")[2]
    if suffix == "parquet":
        yield from _number(path.name, parquet.read_table(path).to_pylist())
        return
    if suffix not in ("jsonl", "json", "csv"):
        raise BadInput(f"{path}: unknown kind of file: give {FILES}")
    data = path.read_bytes()
    if path.name.lower().endswith(".gz"):
        data = gzip.decompress(data)
    data = data.removeprefix(b"\xef\xbb\xbf")

    items = _parse_csv(data, path.name) if suffix == "csv" else _parse_json(data, path.name, suffix)
    for where, item in items:
        if isinstance(item, dict):
            yield where, item
            continue
        problem = f"{where}: {item if isinstance(item, str) else 'not an object: write one {...} a row'}"
        if skipped is None:
            raise BadInput(f"{problem} or use --skip-bad-rows")
        skipped.append(problem)


def _parse_json(data: bytes, name: str, suffix: str) -> Iterator[tuple[str, object]]:
    """Yield each row, or a string that says why it cannot be parsed. A row that is a JSON string becomes None."""
    if suffix == "json":
        try:
            content = json.loads(data)
        except json.JSONDecodeError as error:
            if data.lstrip().startswith(b"["):
                raise BadInput(f"{name}:{error.lineno}: not JSON ({error.msg}): mend the file") from error
        except (ValueError, RecursionError) as error:
            raise BadInput(f"{name}: not JSON ({one_line(error)}): mend the file") from error
        else:
            for where, value in _number(name, content if isinstance(content, list) else [content]):
                yield where, None if isinstance(value, str) else value
            return
    for number, line in enumerate(data.split(b"\n"), 1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except (ValueError, RecursionError) as error:
            yield f"{name}:{number}", f"not JSON ({one_line(error)}): mend the line"
        else:
            yield f"{name}:{number}", None if isinstance(value, str) else value


def _parse_cell(column: str, cell: str | None) -> object:
    """Parse JSON in the columns that never hold text, and in cells that hold messages. Other cells stay text."""
    never_text = column in (
        "messages",
        "responses",
        "ranks",
        "label",
        "margin",
        "probability",
        "ended",
        "token_ids",
        "rewards",
        "noise",
    )
    if not never_text and not MESSAGES_CELL.match(cell or ""):
        return cell
    try:
        return json.loads((cell or "null").lower() if column == "label" else cell or "null")
    except (ValueError, RecursionError):
        return cell  # the checks of the row report it


def _parse_csv(data: bytes, name: str) -> Iterator[tuple[str, object]]:
    try:
        text = data.decode()
    except UnicodeDecodeError as error:
        raise BadInput(f"{name}: not UTF-8 ({one_line(error)}): convert the file") from error
    csv.field_size_limit(min(sys.maxsize, 2**31 - 1))
    reader = csv.DictReader(io.StringIO(text, newline=""))
    line = reader.fieldnames and reader.line_num + 1
    for row in reader:
        if None in row:
            yield f"{name}:{line}", f"more than {len(reader.fieldnames or ())} cells: quote the text that has commas"
        else:
            row = {column: _parse_cell(column, cell) for column, cell in row.items()}
            bad = [c for c, cell in row.items() if isinstance(cell, str) and MESSAGES_CELL.match(cell)]
            problem = f"field {bad[0]!r} holds messages that are not JSON: write them with double quotes" if bad else ""
            yield f"{name}:{line}", problem or row
        line = reader.line_num + 1


# ------------------------------------------------------------------------------------------- checking a row


def check_text(value: object, name: str, sampled: bool = False) -> str:
    """Check for a text that is not blank. A sampled response may be blank, because the model can emit EOS at once."""
    if not isinstance(value, str):
        raise BadInput(f"field {name!r} is not text but {type(value).__name__}: give it a text")
    if not value.strip() and not sampled:
        raise BadInput(f"field {name!r} is empty: give it a text")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise BadInput(f"field {name!r} holds half a surrogate pair: give it valid Unicode") from None
    return value


def check_messages(value: object, name: str) -> list[Message]:
    """Check for a list of messages. A system message is only allowed in first place."""
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
        messages.append({"role": role, "content": check_text(message["content"], name)})
    return messages


def check_prompt(messages: list[Message], name: str) -> list[Message]:
    if not messages or messages[-1]["role"] not in ("user", "tool"):
        raise BadInput(f"field {name!r}: roles out of order: end the prompt with a user message")
    return messages


def check_answer(value: object, name: str, sampled: bool) -> Message:
    """Check the response to a prompt that is a list of messages: a text, or exactly one assistant message."""
    if isinstance(value, str):
        return {"role": "assistant", "content": check_text(value, name, sampled)}
    messages = check_messages(value, name)
    if len(messages) != 1 or messages[0]["role"] != "assistant":
        raise BadInput(f"field {name!r}: roles out of order: give it exactly one assistant message")
    return messages[0]


def optional_number(row: dict, name: str, low: float, high: float) -> float | None:
    value = row.get(name)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
        raise BadInput(f"field {name!r} is not a number in [{low:g}, {high:g}]: give it one or leave it out")
    return float(value)


def optional_list(row: dict, name: str, fits: Callable[[object], bool], expected: str) -> list | None:
    """Check an optional column of a ranking: a list with one value per response, for each of which `fits` is true."""
    values = row.get(name)
    valid = isinstance(values, list) and len(values) == len(row["responses"]) and all(map(fits, values))
    if values is not None and not valid:
        raise BadInput(f"field {name!r} is not a list of {expected}: give one for each response or leave it out")
    return values


def shared_beginning(row: dict) -> tuple[str | list[Message], list]:
    """Split `chosen` and `rejected` into the prompt that they share and the two responses that follow it."""
    chosen, rejected = row["chosen"], row["rejected"]
    if isinstance(chosen, list) and isinstance(rejected, list):
        dialogues = check_messages(chosen, "chosen"), check_messages(rejected, "rejected")
        shared = min(map(len, dialogues)) - 1
        while dialogues[0][:shared] != dialogues[1][:shared]:
            shared -= 1
        prompt, responses = dialogues[0][:shared], [dialogue[shared:] for dialogue in dialogues]
        differ_early = any(len(response) > 1 for response in responses)
    else:
        dialogues = check_text(chosen, "chosen"), check_text(rejected, "rejected")
        prompt = os.path.commonprefix(dialogues)
        if any(ASSISTANT in dialogue for dialogue in dialogues):
            prompt = prompt[: prompt.rfind(ASSISTANT) + len(ASSISTANT)] if ASSISTANT in prompt else ""
            responses = [dialogue[len(prompt) :] for dialogue in dialogues]
            differ_early = any(HUMAN in response or ASSISTANT in response for response in responses)
        else:  # the space belongs to the response, because tokenizers attach it to the next word
            prompt = prompt[: max((i for i, c in enumerate(prompt) if c.isspace()), default=0)].rstrip()
            responses = [dialogue[len(prompt) :] for dialogue in dialogues]
            differ_early = False
    if chosen == rejected:
        raise Dropped("identical responses")
    if not prompt:
        raise BadInput("fields 'chosen' and 'rejected' share no beginning: give the row a 'prompt'")
    if differ_early:
        raise Dropped("dialogues that differ before the last turn")
    if isinstance(prompt, str) and not all(response.strip() for response in responses):
        raise Dropped("blank last turns")
    return prompt, responses


# ------------------------------------------------------------------------------------ prompt and responses of a row


def implicit(row: dict) -> bool:
    """Whether chosen and rejected contain the prompt: `prompt` is missing, or is a text while both are dialogues."""
    sides = [row.get("chosen"), row.get("rejected")]
    dialogues = all(isinstance(side, list) and len(side) > 1 for side in sides)
    return None not in sides and (row.get("prompt") is None or isinstance(row["prompt"], str) and dialogues)


def prompt_of(row: dict) -> str | list[Message]:
    """The prompt of a row that `build` has accepted, in the form that `build` used: a text, or messages."""
    if implicit(row):
        return shared_beginning(row)[0]
    if row.get("prompt") is None:
        return row["messages"][:-1] if row["messages"][-1]["role"] == "assistant" else row["messages"]
    responses = row["responses"] if isinstance(row.get("responses"), list) else []
    answers = [row.get("chosen"), row.get("rejected"), row.get("completion"), *responses]
    if isinstance(row["prompt"], str) and any(isinstance(answer, list) for answer in answers):
        return [{"role": "user", "content": row["prompt"]}]
    return row["prompt"]


def texts_of(row: dict) -> list[str]:
    """The responses of a preference or ranking row as texts, without chat template markup."""
    if row.get("responses") is not None and row.get("ranks") is not None:
        responses = row["responses"]
    else:
        responses = shared_beginning(row)[1] if implicit(row) else [row["chosen"], row["rejected"]]
    return [x if isinstance(x, str) else x[-1]["content"] for x in responses]
