"""Read rows from files, folders or the hub, and check their fields.

    read_rows   source -> rows, each with its location ("prefs.jsonl:17")
    from_sharegpt   a row whose messages are {"from", "value"}, as if they were {"role", "content"}
    standard    a row that names its prompt otherwise, as if it had named it `prompt`
    with_system a row whose system text has a column of its own, as if it were in the messages
    prompt_of   the prompt of a row
    asked_by_user   a row whose prompt is a text, as if that were a user's message
    texts_of    the responses of a preference or ranking row
    row_of      a preference or ranking row with one of its responses, as a reward function gets it

Each problem with a row is reported in one line that says how to fix it. The caller adds the file and the row number.

A row in the hh-rlhf form holds two dialogues. Their common beginning is the prompt, and what follows are the responses:
as a rule one answer each, but a response can go on with the user's next turn and further answers. If the turns of a
dialogue do not alternate, or an answer is blank, the row is dropped and counted (5 and 4 of the 2,312 harmless test
rows of hh-rlhf). Two texts of another form need a prompt beside them: answers can begin alike.
"""

import csv
import gzip
import io
import itertools
import json
import os
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from rlhf import BadInput, require
from support import answer_at_once_offline, lazy_import, may_be_hub_id, one_line

datasets = lazy_import("datasets")
parquet = lazy_import("pyarrow.parquet")


Row = tuple[str, dict]  # location ("prefs.jsonl:17"), columns
Message = dict[str, Any]  # role, content, and fields that some chat templates use, such as tool_calls


ROLES = ("system", "user", "assistant", "tool")
HUMAN, ASSISTANT = "\n\nHuman:", "\n\nAssistant:"
QUESTION = re.compile(r"(\n\nHuman:.*?\n\nAssistant:)", re.S)  # what stands between two answers of such a dialogue
DIALOGUE = re.compile(r"\s*(Human|System):.*\n\nAssistant:", re.S)  # a text that begins as those of hh-rlhf do
PROMPT_COLUMNS = ("question", "instruction", "query", "input")  # one of them is the prompt of a row without `prompt`
SCORES = (
    ("score_chosen", "score_rejected"),
    ("chosen_score", "rejected_score"),
    ("rating_chosen", "rating_rejected"),
    ("chosen_rating", "rejected_rating"),
    ("chosen-rating", "rejected-rating"),
)
OF_MESSAGES = ("messages", "conversations", "prompt", "chosen", "rejected", "completion", "responses", "tools")
EMPTY = (None, "", [], {})  # values of a column that say nothing
SAVED = ("dataset_info.json", "dataset_dict.json")  # a save_to_disk folder holds one of these
NOT_ROWS = (*SAVED, "dataset_infos.json", "state.json")
DATA_FILE = re.compile(r"\.(jsonl|json|csv|tsv|parquet)(\.gz)?$", re.I)
SHARD = re.compile(r"-\d{5}-of-\d{5}(-[0-9a-f]+)?$")  # what follows the split in the name of one of its files
SPLITS = {  # words in the names of files and folders -> their split, as the hub has it
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("validation", "valid", "val", "dev"), "validation"),
    **dict.fromkeys(("test", "testing", "eval", "evaluation"), "test"),
}
MESSAGES_CELL = re.compile(r"""\s*\[\s*\{\s*["'](role|content|from|value)["']\s*:""")  # a CSV cell with messages
MESSAGES_TEXT = re.compile(  # a text that is the JSON of messages, or Python's form of them
    r"""\s*\[\s*\{[^{}]*["'](role|from)["']\s*:\s*["'](system|user|assistant|tool|human|gpt)["']"""
)
NEVER_TEXT = {  # columns whose CSV cells are JSON
    *"messages conversations responses ranks label margin probability ended token_ids rewards noise".split(),
    *itertools.chain(*SCORES),
}
FILES = "a .jsonl, .json, .csv, .tsv (or .gz of these) or .parquet file"
SPEAKERS = {"human": "user", "gpt": "assistant"}  # names that ShareGPT has for roles


class Dropped(Exception):
    """Raised for a well-formed row that has nothing to train on. Such rows are counted and never stop the program."""


# ---------------------------------------------------------------------------------------------------- reading


def sources(source: str | Sequence[str]) -> list[str]:
    """The values of a flag such as --data, which takes one or several."""
    return [source] if isinstance(source, str) else [*source]


def read_rows(
    source: str | Sequence[str], split: str | None = None, skip_bad_rows: bool = False
) -> tuple[list[Row], list[str]]:
    """Read the rows of one or several files, folders or hub data sets; returns (rows, messages about skipped rows).

    A folder is one that `save_to_disk` or `hf download` made, or any other with data files. `split` selects a split of
    a folder or hub data set; the default is "train", or the only split. An unreadable row raises BadInput; with
    `skip_bad_rows` it is skipped.
    """
    if not isinstance(source, str):
        parts = [_read_source(name, name, split, skip_bad_rows) for name in source]
        return [row for rows, _ in parts for row in rows], [message for _, skipped in parts for message in skipped]
    return _read_source(source, Path(source).name, split, skip_bad_rows)


def _read_source(source: str, name: str, split: str | None, skip_bad_rows: bool) -> tuple[list[Row], list[str]]:
    """`read_rows` of one source; `name` is what locations call it if it is a file."""
    path = Path(source).expanduser()
    skipped: list[str] = []
    try:
        if path.is_file():
            if split:
                raise BadInput(f"{source}: a file, which has no splits: leave out --split {split}")
            rows = list(_read_file(path, name, skipped if skip_bad_rows else None))
        elif path.is_dir() and any((path / name).exists() for name in SAVED):
            data = _select_split(source, datasets.load_from_disk(str(path)), split)
            rows = _number(path.resolve().name, map(_without_nulls, data))
        elif path.is_dir():
            rows = list(_read_folder(path, split, skipped if skip_bad_rows else None))
        elif not may_be_hub_id(source) or DATA_FILE.search(source):
            raise BadInput(f"{source}: no such file or folder")
        else:
            rows = _number(source, map(_without_nulls, _load_from_hub(source, split)))
    except BadInput:
        raise
    except Exception as error:  # gzip, csv, Arrow and the disk raise different exceptions
        raise BadInput(
            f"{source}: cannot be read ({one_line(error)}): give {FILES}, or a folder of such files"
        ) from error
    if not rows:
        raise BadInput(f"{source}: holds no {'good ' if skipped else ''}rows")
    return rows, skipped


def _number(name: str, rows) -> list[Row]:
    return [(f"{name}:{i}", row) for i, row in enumerate(rows, 1)]


def _without_nulls(row: dict) -> dict:
    """The row of an Arrow table without the nulls in its messages and tools. All objects in a column of such a table
    have the same fields, so that the arguments of a tool call {"city": ...} get those of all other calls, as nulls."""

    def filled(value):
        if isinstance(value, dict):
            return {name: filled(x) for name, x in value.items() if x is not None or name in ("content", "value")}
        return [filled(x) for x in value] if isinstance(value, list) else value

    return {name: filled(value) if name in OF_MESSAGES else value for name, value in row.items()}


def _load_from_hub(source: str, split: str | None):
    answer_at_once_offline()
    try:
        data = datasets.load_dataset(source, split=split)
    except Exception as error:  # network, unknown id, wrong split and broken files raise different exceptions
        raise BadInput(
            f"{source}: no such file, and not to be had from the hub ({one_line(error)}): check the name and the "
            f"split; without a network, run `hf download {source} --repo-type dataset --local-dir DIR` elsewhere and "
            "give DIR"
        ) from error
    return _select_split(source, data, split)


def _select_split(source: str, data, split: str | None):
    """The rows of one split, in which images and sounds stay bytes: no script reads them, and one may be damaged."""
    if isinstance(data, datasets.DatasetDict):
        data = data[_choose_split(source, list(data), split)]
    for name, feature in data.features.items():
        if hasattr(feature, "decode"):
            data = data.cast_column(name, type(feature)(decode=False))
    return data


def _choose_split(source: str, names: list[str], split: str | None) -> str:
    split = split or (names[0] if len(names) == 1 else "train")
    if split not in names:
        raise BadInput(f"{source}: no split {split!r}: choose --split among {', '.join(names)}")
    return split


def _split_of(path: Path) -> str | None:
    """The split that a file of a folder belongs to, if its path says so: data/test-00000-of-00001.parquet, or a word of
    SPLITS in the name of the file or, failing that, of the nearest folder that has one."""
    name = DATA_FILE.sub("", path.name)
    if SHARD.search(name):
        return SHARD.sub("", name)
    for part in (name, *reversed(path.parts[:-1])):
        for word in re.split(r"[^a-z]+", part.lower()):
            if word in SPLITS:
                return SPLITS[word]
    return None


def _read_folder(folder: Path, split: str | None, skipped: list[str] | None) -> Iterator[Row]:
    """Rows of the files in a folder and its subfolders that belong to a split: to that of all of them if their names
    say none, as the hub does it. A line says which files these are, and which others there are."""
    for name in ("args.json", "config.json"):
        require(not (folder / name).exists(), f"{folder}: holds a run or a model ({name}): name the file with the data")
    splits: dict[str | None, list[Path]] = {}
    for path in sorted(folder.rglob("*")):
        inside = path.relative_to(folder)
        hidden = any(part.startswith(".") for part in inside.parts)
        if DATA_FILE.search(path.name) and path.is_file() and not hidden and path.name not in NOT_ROWS:
            splits.setdefault(_split_of(inside), []).append(inside)
    require(bool(splits), f"{folder}: a folder without data: give one that has {FILES}, or such a file")
    others = splits.pop(None, [])
    if not splits:
        splits, others = {"train": others}, []
    split = _choose_split(str(folder), [*splits], split)
    shown = lambda files: ", ".join(map(str, files[:4])) + ", ..." * (len(files) > 4)  # noqa: E731
    rest = [f"other splits: {', '.join(name for name in splits if name != split)}"] if len(splits) > 1 else []
    rest += [f"of no split, and left out: {shown(others)}"] if others else []
    files = splits[split]
    number = f"{len(files)} file{'s' * (len(files) > 1)}"
    print("; ".join([f"{folder}: split {split}, {number} ({shown(files)})", *rest]))
    for inside in files:
        yield from _read_file(folder / inside, str(inside), skipped)


def _read_file(path: Path, name: str, skipped: list[str] | None) -> Iterator[Row]:
    """Rows of one file, which locations call `name`. For each unreadable row, append a message to `skipped`, or raise
    BadInput if that is None."""
    suffix = path.name.lower().removesuffix(".gz").rpartition(".")[2]
    if suffix == "parquet":
        yield from _number(name, map(_without_nulls, parquet.read_table(path).to_pylist()))
        return
    if suffix not in ("jsonl", "json", "csv", "tsv"):
        raise BadInput(f"{path}: unknown kind of file: give {FILES}")
    data = path.read_bytes()
    if path.name.lower().endswith(".gz"):
        data = gzip.decompress(data)
    data = data.removeprefix(b"\xef\xbb\xbf")

    tables = {"csv": ",", "tsv": "\t"}
    items = _parse_csv(data, name, tables[suffix]) if suffix in tables else _parse_json(data, name, suffix)
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
            content = json.loads(data, object_pairs_hook=_object)
        except json.JSONDecodeError as error:
            if data.lstrip().startswith(b"["):
                raise BadInput(f"{name}:{error.lineno}: not JSON ({error.msg}): mend the file") from error
        except (ValueError, RecursionError) as error:
            raise BadInput(f"{name}: not JSON ({one_line(error)}): mend the file") from error
        else:
            for where, value in _number(name, content if isinstance(content, list) else [content]):
                yield where, None if isinstance(value, str) else value
            return
    if data.lstrip().startswith(b"["):
        try:
            json.loads(data)
        except (ValueError, RecursionError):
            pass  # the lines have problems of their own
        else:
            raise BadInput(f"{name}: line 1 begins a JSON array: name the file {re.sub('(?i)jsonl', 'json', name)}")
    for number, line in enumerate(data.split(b"\n"), 1):
        if not line.strip():
            continue
        try:
            value = json.loads(line, object_pairs_hook=_object)
        except (ValueError, RecursionError) as error:
            yield f"{name}:{number}", f"not JSON ({one_line(error)}): mend the line"
        else:
            yield f"{name}:{number}", None if isinstance(value, str) else value


def _parse_cell(column: str, cell: str | None) -> object:
    """Parse JSON in the columns that never hold text, and in cells that hold messages. Other cells stay text."""
    if column not in NEVER_TEXT and not MESSAGES_CELL.match(cell or ""):
        return cell
    try:
        text = (cell or "null").lower() if column == "label" else cell or "null"
        return json.loads(text, object_pairs_hook=_object)
    except (ValueError, RecursionError):
        return cell  # the checks of the row report it


def _parse_csv(data: bytes, name: str, delimiter: str) -> Iterator[tuple[str, object]]:
    try:
        text = data.decode()
    except UnicodeDecodeError as error:
        raise BadInput(f"{name}: not UTF-8 ({one_line(error)}): convert the file") from error
    csv.field_size_limit(min(sys.maxsize, 2**31 - 1))
    reader, line = csv.DictReader(io.StringIO(text, newline=""), strict=True, delimiter=delimiter), 1
    try:
        columns = list(reader.fieldnames or ())
        for column in columns:
            twice = f"{name}:1: two columns have the name {column[:40]!r}: rename one of them"
            require(columns.count(column) == 1, twice)
        line = reader.line_num + 1
        for row in reader:
            if None in row:
                yield f"{name}:{line}", f"more than {len(columns)} cells: quote the text that has commas or tabs"
            else:
                row = {column: _parse_cell(column, cell) for column, cell in row.items()}
                bad = [c for c, cell in row.items() if isinstance(cell, str) and MESSAGES_CELL.match(cell)]
                problem = f"field {', '.join(bad)!r} holds messages that are not JSON: write them with double quotes"
                yield f"{name}:{line}", problem if bad else row
            line = reader.line_num + 1
    except csv.Error as error:  # an open quote would swallow the rest of the file
        advice = "close its quotes, and write a quote inside a quoted cell twice"
        raise BadInput(
            f"{name}:{line}: not {'TSV' if delimiter == chr(9) else 'CSV'} ({one_line(error)}): {advice}"
        ) from error


def _object(pairs: list[tuple[str, object]]) -> dict:
    """A JSON object. ValueError if a name is there twice, of which only the last value would be kept."""
    item = dict(pairs)
    if len(item) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{next(n for n in names if names.count(n) > 1)[:40]!r} is there twice")
    return item


# ------------------------------------------------------------------------------------------- checking a row


def check_text(value: object, name: str, blank: bool = False) -> str:
    """Check for a text that is not blank. With `blank` it may be: a model can emit EOS at once, or only tool calls."""
    if not isinstance(value, str):
        raise BadInput(f"field {name!r} is not text but {type(value).__name__}: give it a text")
    if not value.strip() and not blank:
        raise BadInput(f"field {name!r} is empty: give it a text")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise BadInput(f"field {name!r} holds half a surrogate pair: give it valid Unicode") from None
    return value


def content_text(content: object, place: str = "the message") -> object:
    """The content of a message, with the parts of one that is a list of {"type": "text", "text"} joined."""
    if not isinstance(content, list):
        return content
    texts = []
    for part in content:
        fields = {k: v for k, v in part.items() if v is not None} if isinstance(part, dict) else {}
        strange = [k for k in fields if k not in ("type", "text")]
        if fields.get("type") != "text" or strange or not isinstance(fields.get("text"), str):
            kind = f"with {strange[0]!r}" if fields.get("type") == "text" and strange else f"{fields.get('type')!r}"
            raise BadInput(f"{place} has a part {kind[:60]}: only parts {{'type': 'text', 'text': ...}} can be read")
        texts.append(fields["text"])
    return "".join(texts)


def fields_of(message: Message) -> list[str]:
    """The names of the filled fields that a message has beside role and content, such as tool_calls."""
    return sorted(name for name, value in message.items() if name not in ("role", "content") and value not in EMPTY)


def json_arguments(messages: list[Message]) -> Iterator[str]:
    """The arguments of tool calls that are a text, the JSON of an object, as in OpenAI's form."""
    for message in messages:
        calls = message.get("tool_calls")
        for call in calls if isinstance(calls, list) else ():
            inner = call.get("function") or call if isinstance(call, dict) else None
            arguments = inner.get("arguments") if isinstance(inner, dict) else None
            if isinstance(arguments, str) and arguments.strip().startswith("{"):
                yield arguments


def check_messages(value: object, name: str) -> list[Message]:
    """Check for a list of messages, and return them without null fields and with their content as one text. A system
    message is only allowed in first place, and only tool calls may be without content."""
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
        fields, calls = {k: v for k, v in message.items() if v not in (None, [])}, bool(message.get("tool_calls"))
        content = content_text(fields.get("content", "" if calls else None), f"field {name!r}, message {i + 1}")
        if content is None or isinstance(content, str) and not content.strip() and not calls:
            raise BadInput(f"field {name!r}, message {i + 1} has no content: give it a text")
        messages.append(fields | {"content": check_text(content, name, blank=calls)})
    return messages


def check_prompt(messages: list[Message], name: str) -> list[Message]:
    if not messages or messages[-1]["role"] not in ("user", "tool"):
        raise BadInput(f"field {name!r}: roles out of order: end the prompt with a user message")
    return messages


def check_response(value: object, name: str, sampled: bool) -> list[Message]:
    """Check the response to a prompt that is a list of messages: a text, an assistant message, or several messages of
    which the first and the last are the assistant's. A sampled response is a single message."""
    if isinstance(value, str):
        return [{"role": "assistant", "content": check_text(value, name, sampled)}]
    messages = check_messages(value, name)
    if not alternates(messages) or sampled and len(messages) > 1:
        expected = "exactly one assistant message" + ("" if sampled else ", or turns that begin and end with one")
        raise BadInput(f"field {name!r}: roles out of order: give it {expected}")
    return messages


def alternates(messages: list[Message]) -> bool:
    """Whether the first and the last message are the assistant's, and no two of its messages follow each other."""
    spoken = [message["role"] == "assistant" for message in messages]
    return spoken[0] and spoken[-1] and not any(a and b for a, b in itertools.pairwise(spoken))


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


def from_sharegpt(row: dict) -> dict:
    """The row with its messages {"from", "value"} as {"role", "content"}, and with its column `conversations` as
    `messages`, or as `prompt` if it has `chosen` and `rejected`. The row itself if it has neither."""
    changed = {}
    for name in ("conversations", "messages", "prompt", "chosen", "rejected", "completion"):
        value = row.get(name)
        items = [value] if isinstance(value, dict) else value
        if not isinstance(items, list) or not items or not all(isinstance(item, dict) for item in items):
            continue
        if all({"from", "value"} <= item.keys() for item in items):
            changed[name] = [
                {"role": SPEAKERS.get(str(item["from"]), item["from"]), "content": item["value"]}
                | {k: v for k, v in item.items() if k not in ("from", "value") and v is not None}
                for item in items
            ]
        elif name == "conversations" and all("role" in item for item in items):
            changed[name] = items
    if "conversations" in changed:
        pair = row.get("chosen") is not None and row.get("rejected") is not None
        name, messages = "prompt" if pair else "messages", changed.pop("conversations")
        if row.get(name) is None:
            row = {k: v for k, v in row.items() if k != "conversations"}
            changed[name] = messages
    return row | changed if changed else row


def prompt_columns(row: dict) -> list[str]:
    """The filled columns that can be the prompt of a row that has neither `prompt` nor `messages`."""
    if row.get("prompt") is not None or row.get("messages") is not None:
        return []
    return [name for name in PROMPT_COLUMNS if row.get(name) not in EMPTY]


def standard(row: dict) -> dict:
    """The row with the one column of `prompt_columns` as `prompt` too, or the row itself if there is none.
    BadInput if there are two such columns, or if the responses are dialogues that hold the prompt as well."""
    names = prompt_columns(row)
    if not names:
        return row
    if len(names) > 1:
        both = f"fields {names[0]!r} and {names[1]!r} can both be the prompt"
        raise BadInput(f"{both}: join them in a field 'prompt' (docs/data.md has the code)")
    for name in ("chosen", "rejected", "completion"):
        if isinstance(row.get(name), str) and DIALOGUE.match(row[name]):
            raise BadInput(f"fields {names[0]!r} and {name!r} both hold the prompt: leave it out of one of them")
    return row | {"prompt": row[names[0]]}


def with_system(row: dict, form: list[str]) -> dict:
    """The row with the text of its column `system` as the first of its messages, or the row itself if it has none.
    BadInput for rows of strings, and if there is another system message."""
    system = row.get("system")
    if system in EMPTY:
        return row
    message = {"role": "system", "content": check_text(system, "system")}
    names = form if form in (["messages"], ["text"]) else ["prompt"]
    if implicit(row) and set(form) <= {"prompt", "chosen", "rejected"}:
        names = ["chosen", "rejected"]
    for name in names:
        messages = prompt_of(row) if name == "prompt" else row[name]
        if not isinstance(messages, list):
            raise BadInput(
                f"field 'system' goes with messages, and {name!r} is a text: write it there, or give messages"
            )
        first = messages[0] if messages and isinstance(messages[0], dict) else {}
        if first.get("role") != "system":
            row = row | {name: [message, *messages]}
        elif first.get("content") != system:
            raise BadInput(f"fields 'system' and {name!r} hold two system messages: leave one out")
    return row


def tools_of(row: dict) -> list[dict] | None:
    """The column `tools`: descriptions of functions that the chat template shows to the model, or their JSON."""
    tools = row.get("tools")
    try:
        tools = json.loads(tools, object_pairs_hook=_object) if isinstance(tools, str) and tools else tools
    except (ValueError, RecursionError) as error:
        raise BadInput(f"field 'tools' is not JSON ({one_line(error)}): give it a list of functions") from error
    if tools in EMPTY:
        return None
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise BadInput("field 'tools' is not a list of functions, each {...}: give it one or leave it out")
    return tools


def shared_beginning(row: dict) -> tuple[str | list[Message], list[list], int]:
    """Split the dialogues `chosen` and `rejected` into the prompt that they share and the two responses that follow it,
    each a list of turns: messages, or texts (the odd ones go from the end of an answer to the beginning of the next).
    The third value is how many turns at their beginning the responses share: 0, unless the dialogues part in a user's
    turn, because a prompt ends where the assistant speaks."""
    chosen, rejected = row["chosen"], row["rejected"]
    if isinstance(chosen, list) and isinstance(rejected, list):
        dialogues = check_messages(chosen, "chosen"), check_messages(rejected, "rejected")
        start = min(min(map(len, dialogues)) - 1, _common(dialogues))
        while start and not all(dialogue[start]["role"] == "assistant" for dialogue in dialogues):
            start -= 1
        prompt, responses = dialogues[0][:start], [dialogue[start:] for dialogue in dialogues]
        out_of_turn = any(len(response) > 1 and not alternates(response) for response in responses)
    else:
        dialogues = check_text(chosen, "chosen"), check_text(rejected, "rejected")
        if not all(DIALOGUE.match(dialogue) for dialogue in dialogues):
            others = [repr(x) for x, value in row.items() if x not in ("chosen", "rejected") and value not in EMPTY]
            raise BadInput(
                f"field 'prompt' is missing, and 'chosen' and 'rejected' are no dialogues ({HUMAN + ' ...'!r}): rename "
                f"the field that holds the prompt to 'prompt' (there are {', '.join(others) or 'no others'})"
            )
        prompt = os.path.commonprefix(dialogues)
        prompt = prompt[: prompt.rfind(ASSISTANT) + len(ASSISTANT)] if ASSISTANT in prompt else ""
        responses = [QUESTION.split(dialogue[len(prompt) :]) for dialogue in dialogues]
        out_of_turn = any(mark in answer for turns in responses for answer in turns[::2] for mark in (HUMAN, ASSISTANT))
    if chosen == rejected:
        raise Dropped("identical responses")
    if not prompt:
        raise BadInput("fields 'chosen' and 'rejected' share no beginning: give the row a 'prompt'")
    if out_of_turn:
        raise Dropped("dialogues whose turns do not alternate")
    if isinstance(prompt, str) and not all(answer.strip() for turns in responses for answer in turns[::2]):
        raise Dropped("blank answers")
    shared = shared_turns(responses)
    asked = row.get("prompt")
    if isinstance(asked, str) and isinstance(prompt, list) and not any(asked.strip() in m["content"] for m in prompt):
        name = next((name for name in PROMPT_COLUMNS if row.get(name) is asked), "prompt")
        raise BadInput(f"field {name!r} is not in the dialogues, which are read instead: leave it out, or mend them")
    return prompt, responses, shared


def shared_turns(responses: Sequence[list]) -> int:
    """How many turns at their beginning all responses to a prompt share. Dropped if one of them has no others."""
    shared = _common(responses)
    if shared == min(map(len, responses)):
        raise Dropped("dialogues of which one goes on where the other ends")
    return shared


def _common(lists: Sequence[list]) -> int:
    """How many elements at their beginning the lists share."""
    same = [all(x == first for x in others) for first, *others in zip(*lists, strict=False)]
    return (*same, False).index(False)


# ------------------------------------------------------------------------------------ prompt and responses of a row


def implicit(row: dict) -> bool:
    """Whether chosen and rejected contain the prompt: `prompt` is missing, or is a text while both are dialogues that
    do not begin with an answer."""
    sides = [row.get("chosen"), row.get("rejected")]
    dialogues = all(isinstance(side, list) and len(side) > 1 for side in sides)
    dialogues = dialogues and not all(isinstance(x[0], dict) and x[0].get("role") == "assistant" for x in sides)
    return None not in sides and (row.get("prompt") is None or isinstance(row["prompt"], str) and dialogues)


def in_messages(row: dict) -> bool:
    """Whether the prompt of a row is in its `messages`: it has no `prompt`, or one that is the text of one of them,
    such as the first question of the dialogue, and no answers beside it."""
    prompt, messages = row.get("prompt"), row.get("messages")
    answers = ("completion", "chosen", "rejected", "responses")
    if prompt is None or messages is None or any(row.get(name) is not None for name in answers):
        return prompt is None and messages is not None
    asked = [x.get("content") for x in messages if isinstance(x, dict) and x.get("role") == "user"]
    return isinstance(prompt, str) and any(prompt.strip() in str(text) for text in asked)


def prompt_of(row: dict) -> Any:
    """The prompt of a row that `build` has accepted, in the form that `build` used: a text, or messages."""
    row = standard(row)
    if implicit(row):
        return shared_beginning(row)[0]
    if in_messages(row):
        return row["messages"][:-1] if row["messages"][-1]["role"] == "assistant" else row["messages"]
    responses = row["responses"] if isinstance(row.get("responses"), list) else []
    answers = [row.get("chosen"), row.get("rejected"), row.get("completion"), *responses]
    if isinstance(row["prompt"], str) and any(isinstance(answer, list) for answer in answers):
        return [{"role": "user", "content": row["prompt"]}]
    return row["prompt"]


def asked_by_user(row: dict) -> dict:
    """The row, with a prompt that is a text turned into a user message; a row with any other prompt as it is."""
    name = next(iter(prompt_columns(row)), "prompt")
    text = row.get(name)
    if not isinstance(text, str) or DIALOGUE.match(text) or implicit(row | {"prompt": text}):
        return row
    if in_messages(from_sharegpt(row)):
        return row
    return row | {name: [{"role": "user", "content": text}]}


def texts_of(row: dict) -> list[str]:
    """The responses of a preference or ranking row as texts, without chat template markup."""
    row = standard(row)
    if row.get("responses") is not None and row.get("ranks") is not None:
        responses = row["responses"]
    else:
        responses = shared_beginning(row)[1] if implicit(row) else [row["chosen"], row["rejected"]]
    texts = []
    for turns in ([x] if isinstance(x, str) else x for x in responses):
        require(len(turns) == 1, "a response has several turns, and rewards are of one: leave it out, or --reward")
        fields = [] if isinstance(turns[0], str) else fields_of(turns[0])
        if fields:
            raise BadInput(f"an answer has {fields[0][:40]!r}, and rewards are of texts: leave it out, or --reward")
        texts.append(turns[0] if isinstance(turns[0], str) else content_text(turns[0].get("content")) or "")
    return texts


def row_of(row: dict, i: int) -> dict:
    """The row as a reward function gets it with response i: with `ended` and, if there are any, the token ids
    (`response_ids`) of this response."""

    def of_response(name: str, default: Any) -> Any:
        values = row.get(name) if row.get("responses") is not None else None
        return values[i] if isinstance(values, list) and i < len(values) else default

    ids = of_response("token_ids", None)
    return row | {"ended": of_response("ended", True)} | ({"response_ids": ids} if ids else {})
