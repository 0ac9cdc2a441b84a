"""Phase 2b: people rank the K responses to each prompt in a browser, and their rankings are saved.

    python annotate.py runs/samples.jsonl --out preferences.jsonl     a page in your browser; nothing leaves the machine
    python annotate.py runs/samples.jsonl --overlap 2                 two people judge each prompt
    python annotate.py --report --out preferences.jsonl               how well they agree, and which biases they have
    python annotate.py runs/samples.jsonl --by gold --noise 0.5       no people: rank by a reward plus noise

The page shows one prompt at a time, with its unlabelled responses in a different order for each annotator. It moves on
only when the judgement is on disk, as a line of a journal beside --out. --out always holds the current rankings, so
train_rm.py and train_dpo.py can use it at any time. After a stop, the same command resumes.

This file has five parts: samples, the journal and the queue, the server, labelling without people, the report.
"""

import base64
import contextlib
import errno
import fcntl
import hashlib
import json
import math
import os
import random
import re
import secrets
import socket
import statistics
import threading
import time
import webbrowser
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from io import FileIO
from pathlib import Path

import torch
import tyro
import uvicorn
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.base import BaseHTTPMiddleware
from starlette.responses import HTMLResponse, JSONResponse
from starlette.routing import Route
from tqdm import tqdm

from rlhf import BadInput, require
from support import agreement, lazy_import, read_json_lines
from support.report import bootstrap, share_interval, table, visible
from support.rows import read_rows, row_of
from support.runs import check, cli, write

reviews, rewards = lazy_import("support.reviews"), lazy_import("support.rewards")

# --------------------------------------------------------------------------------------------------------------- flags

PAGE = Path(__file__).parent / "support" / "annotate.html"
MOST_BYTES = 2**16  # of a request; the longest note has 24,000
HOLD = 15 * 60  # seconds for which a prompt is reserved for the annotator whose page shows it
CARRIED = ("prompt", "tools", "responses", "ended", "token_ids", "tokenizer", "where")  # what --out keeps of a sample
Event = dict  # a line of the journal: id, kind (rank, skip, flag, undo), annotator, sample, ...


@dataclass
class Args:
    samples: tyro.conf.Positional[str] = "runs/samples.jsonl"
    """rows with a prompt and 2 to 9 responses, as sample.py writes them"""
    out: str = "runs/preferences.jsonl"
    """file for the current rankings, one row each; its journal is beside it, and ranking by people resumes from it"""

    overlap: int = 1
    """number of people who judge the same prompt, >= 1"""
    overlap_share: float = 1.0
    """fraction of the prompts to which --overlap applies, chosen by hash, in [0, 1]; the others are judged once"""
    port: int = 8000
    """port of the page on 127.0.0.1, in [0, 65535]; 0: any free port"""
    open: bool = True
    """open the page in the browser"""
    report: bool = False
    """print agreement, position bias, length bias and time per judgement of --out, without serving the page"""
    dry_run: bool = False
    """print how many prompts there are and how many are judged, without serving the page"""

    by: str | None = None
    """label without people: gold (the embedded task's reward), a reward model's run directory, or
    module:function(prompts, responses, rows) -> floats"""
    noise: float | None = None
    """--by: temperature of the labels, in units of the reward, >= 0: P(i is best) = softmax(rewards / noise)_i, and so
    on for the rest (Plackett-Luce; Bradley-Terry for two); 0: by reward alone, and equal rewards tie; default 0 (gold:
    0.35, the noise of the embedded task's own annotators)"""
    resume: bool = False
    """--by: continue a stopped labelling; the rankings are the same as without the stop"""
    seed: int = 0
    """--by: random seed of the noise"""
    device: str = "cuda" if torch.cuda.is_available() else "cpu"
    """--by RUN_DIR: torch device"""
    trust_remote_code: bool = False
    """--by RUN_DIR: run code that comes with the model"""


# ------------------------------------------------------------------------------------------------------------- samples


@dataclass
class Sample:
    """A prompt with K responses."""

    where: str  # "samples.jsonl:17"
    row: dict
    first: list[int]  # for each response, the index of the first identical one; identical responses tie
    distinct: list[int]  # indices of the distinct responses, which are the ones shown


def identity(row: dict) -> str:
    """Hash of prompt and responses, which identifies the sample that a judgement is about."""
    text = json.dumps([row["prompt"], row["responses"], row.get("ended")])
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def sample_of(where: str, row: dict) -> Sample:
    """Make a Sample. A truncated response and a finished one are never identical, even if their texts are."""
    responses = list(zip(row["responses"], row.get("ended") or row["responses"], strict=True))
    first = [responses.index(response) for response in responses]
    return Sample(where, row, first, sorted(set(first)))


def check_row(where: str, row: dict) -> None:
    """Raise BadInput if the page cannot show the row."""
    prompt, responses, ended, token_ids = (row.get(x) for x in ("prompt", "responses", "ended", "token_ids"))
    turns = prompt if isinstance(prompt, list) else [{"role": "user", "content": prompt}]
    texts = [turn.get(name) if isinstance(turn, dict) else None for turn in turns for name in ("role", "content")]
    valid = bool(prompt) and all(isinstance(text, str) for text in texts)
    require(valid, f"{where}: field 'prompt' is missing or not text or messages: give every row one")
    valid = isinstance(responses, list) and all(isinstance(text, str) for text in responses)
    require(valid, f"{where}: field 'responses' is missing or not a list of texts: give every row 2 to 9")
    valid = 2 <= len(responses) <= 9
    require(valid, f"{where}: field 'responses' has {len(responses)} entries: 2 to 9 can be ranked")
    valid = ended is None or isinstance(ended, list) and list(map(type, ended)) == [bool] * len(responses)
    require(valid, f"{where}: field 'ended' is not true or false for each response: mend it or leave it out")
    valid = not token_ids or isinstance(token_ids, list) and len(token_ids) == len(responses)
    require(valid, f"{where}: field 'token_ids' is not a list for each response: mend it or leave it out")
    for name in (name for name in CARRIED if name in row):
        try:
            json.dumps(row[name], ensure_ascii=False).encode()
        except (TypeError, ValueError) as error:
            problem = "half a surrogate pair" if isinstance(error, UnicodeEncodeError) else f"no JSON ({error})"
            raise BadInput(f"{where}: field {name!r} holds {problem}: mend it or leave it out") from None


def read_samples(source: str) -> dict[str, Sample]:
    """Samples by identity, in the order of the file. Leaves out duplicates and rows with nothing to rank."""
    advice = "make it with `python sample.py`, or name a file of samples" if source == Args.samples else "no such file"
    require(Path(source).is_file(), f"{source} is missing: {advice}")
    try:
        rows, _ = read_rows(source)
    except BadInput as error:
        raise BadInput(str(error).removesuffix(" or use --skip-bad-rows")) from None
    samples, duplicates, identical = {}, 0, 0
    for where, row in rows:
        check_row(where, row)
        sample, key = sample_of(where, row), identity(row)
        duplicates += key in samples
        identical += len(sample.distinct) == 1
        if len(sample.distinct) > 1:
            samples.setdefault(key, sample)
    if duplicates or identical:
        print(f"left out: {duplicates} rows that are there twice, {identical} whose responses are all identical")
    require(bool(samples), f"{source}: no row has two different responses to rank")
    return samples


# ----------------------------------------------------------------------------------------------- journal, queue, views


def journal_of(out: Path) -> Path:
    return out.with_name(out.stem + ".journal.jsonl")


def read_journal(path: Path) -> tuple[list[Event], int]:
    """The events, and their size in bytes. Any bytes after them are a line that a killed server did not finish."""
    data = path.read_bytes() if path.exists() else b""
    complete, events = data[: data.rfind(b"\n") + 1], []
    for number, line in enumerate(complete.split(b"\n")[:-1], 1):
        with contextlib.suppress(ValueError):
            events.append(json.loads(line))
        valid = len(events) == number and isinstance(events[-1], dict)
        valid = valid and {"id", "kind", "annotator", "sample", "where", "note", "time"} <= events[-1].keys()
        require(valid, f"{path}:{number}: not a line of annotate.py's journal: mend it, or name another --out")
    return events, len(complete)


def advance(history: dict[str, list[Event]], event: Event) -> None:
    """Add an event to its annotator's history; an undo removes the last event instead."""
    if event["kind"] == "undo":
        del history[event["annotator"]][-1:]
    else:
        history[event["annotator"]].append(event)


def in_force(history: dict[str, list[Event]]) -> dict[str, dict[str, Event]]:
    """Sample -> annotator -> the last event of this annotator on this sample."""
    judged: dict[str, dict[str, Event]] = defaultdict(dict)
    for annotator in sorted(history):
        for event in history[annotator]:
            judged[event["sample"]][annotator] = event
    return judged


def rankings(events: Iterable[Event]) -> list[Event]:
    return [event for event in events if event["kind"] == "rank"]


def pair_table(sample: Sample, rankings: Sequence[dict]) -> torch.Tensor:
    """Coincidence table of a sample's response pairs, from the `ranks` of several annotators."""
    return agreement.of_rankings(tuple(tuple(x["ranks"][i] for i in sample.distinct) for x in rankings))


class Judgements:
    """People's judgements of the samples. The journal is authoritative, and --out is rewritten to match it.

    `file` is the journal, opened and locked; with None nothing is written. Raises BadInput if the journal does not
    belong to the samples, or --out does not belong to the journal.
    """

    def __init__(self, samples: dict[str, Sample], out: Path, file: FileIO | None, overlap: int, share: float):
        self.samples, self.out, self.file = samples, out, file
        self.history: dict[str, list[Event]] = defaultdict(list)
        self.lines: dict[str, str] = {}  # event id -> line of --out
        self.reserved: dict[str, tuple[str, float]] = {}  # annotator -> sample on the page, end of its reservation
        self.wanted = {key: overlap if int(key[:8], 16) < share * 16**8 else 1 for key in samples}
        journal = journal_of(out)
        events, size = read_journal(journal)
        for number, event in enumerate(events, 1):
            problem = f"{journal}:{number}: a judgement of a prompt that is not among these samples"
            require(event["sample"] in samples, f"{problem}: give those it was made from, or name another --out")
            advance(self.history, event)
        self.judged = in_force(self.history)
        journal_keys = {self.key(e["sample"], e) for e in events if e["kind"] == "rank"}
        for where, row in read_rows(str(out))[0] if out.exists() and out.stat().st_size else []:
            valid = {"prompt", "responses", "ranks", "annotator", "time"} <= row.keys()
            valid = valid and self.key(identity(row), row) in journal_keys
            require(valid, f"{where}: was not written from {journal}: move {out} away, or name another --out")
        if file:
            if size < os.fstat(file.fileno()).st_size:
                os.ftruncate(file.fileno(), size)
                print(f"{journal}: cut off an unfinished last line, which was never confirmed")
            self.write_out()

    @staticmethod
    def key(sample: str, event: dict) -> tuple:
        return sample, event["annotator"], tuple(event["ranks"]), event["time"]

    def add(self, event: Event) -> None:
        """Write the event to the journal, apply it, and rewrite --out. An event that was sent twice is added once."""
        if not any(e["id"] == event["id"] for e in self.history[event["annotator"]][-1:]):
            size = os.fstat(self.file.fileno()).st_size
            try:
                line = json.dumps(event, ensure_ascii=False).encode() + b"\n"
                if self.file.write(line) < len(line):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                os.fsync(self.file.fileno())
            except OSError:
                os.ftruncate(self.file.fileno(), size)
                raise
            advance(self.history, event)
            self.judged = in_force(self.history)
        self.write_out()

    def write_out(self) -> None:
        """Rewrite --out atomically."""
        lines = (self.line(e) for key in self.samples for e in rankings(self.judged.get(key, {}).values()))
        write(self.out, "".join(lines))

    def line(self, event: Event) -> str:
        if event["id"] not in self.lines:
            row = self.samples[event["sample"]].row
            row = {name: row[name] for name in CARRIED if name in row}
            row |= {name: event[name] for name in ("ranks", "annotator", "order", "seconds", "note", "time")}
            self.lines[event["id"]] = json.dumps(row, ensure_ascii=False) + "\n"
        return self.lines[event["id"]]

    def missing(self, annotator: str, reserved: Counter[str]) -> Iterator[tuple[int, str]]:
        """Prompts that still need a judgement and that this annotator can judge, each after its number of rankings."""
        for key in self.samples:
            judged = self.judged.get(key, {})
            ranked = len(rankings(judged.values()))
            flagged = any(event["kind"] == "flag" for event in judged.values())
            if annotator not in judged and not flagged and ranked + reserved[key] < self.wanted[key]:
                yield ranked, key

    def next(self, annotator: str) -> str | None:
        """Reserve a prompt for this annotator: the one on the page, else the one that others have ranked most often."""
        now = time.monotonic()
        reserved = Counter(key for name, (key, end) in self.reserved.items() if name != annotator and end > now)
        free = {key: ranked for ranked, key in self.missing(annotator, reserved)}
        current = self.reserved.pop(annotator, (None,))[0]
        key = current if current in free else max(free, key=free.__getitem__, default=None)
        if key:
            self.reserved[annotator] = key, now + HOLD
        return key

    def order(self, annotator: str, key: str) -> list[int]:
        """Indices of the responses in the order in which this annotator always sees them."""
        distinct = self.samples[key].distinct
        return random.Random(f"{annotator} {key}").sample(distinct, len(distinct))

    def step(self, annotator: str, key: str | None, by: int) -> str | None:
        """The prompt that this annotator judged before or after `key`; after the last one comes a new prompt."""
        done = list(dict.fromkeys(event["sample"] for event in reversed(self.history[annotator])))[::-1]
        index = (done.index(key) if key in done else len(done)) + by
        return done[max(index, 0)] if index < len(done) else self.next(annotator)

    def view(self, annotator: str, key: str | None, draft: Event | None = None) -> dict:
        """The content of the page, without the indices of the responses. `draft`: a ranking to start from."""
        judged = self.judged.get(key, {}).get(annotator)
        judgements = [e for events in self.judged.values() if (e := events.get(annotator))]
        todo = sum(1 for _ in self.missing(annotator, Counter()))
        view = {"sample": key, "done": len(judgements), "todo": todo, "judged": judged and judged["kind"]}
        view["last"] = self.history[annotator][-1]["id"] if self.history[annotator] else None
        seconds = [e["seconds"] for e in judgements if e["kind"] == "rank"]
        view["seconds"] = statistics.median(seconds) if seconds else None
        ranked = {k: rankings(events.values()) for k, events in self.judged.items()}
        tables = [pair_table(self.samples[k], events) for k, events in ranked.items() if len(events) > 1]
        total = torch.stack(tables).sum(0) if tables else torch.zeros(3, 3)
        measures = {"same": agreement.same(total), "alpha": agreement.alpha(total)}
        view |= {name: None if math.isnan(x) else x for name, x in measures.items()} | {"prompts": len(tables)}
        if key:
            row, order, draft = self.samples[key].row, self.order(annotator, key), judged or draft
            ended = row.get("ended") or [True] * len(row["responses"])
            view["prompt"] = row["prompt"]
            view["responses"] = [{"text": row["responses"][i], "cut": not ended[i]} for i in order]
            view["places"] = [draft["ranks"][i] for i in order] if draft and draft["kind"] == "rank" else None
            view["note"] = draft["note"] if draft else ""
        return view


# -------------------------------------------------------------------------------------------------------------- server


def text_of(body: dict, name: str, most: int) -> str:
    """A field that must be a text of at most `most` valid characters; else HTTP 400."""
    text = body.get(name)
    if not isinstance(text, str) or len(text) > most or re.search(r"[\ud800-\udfff]", text):
        raise HTTPException(400, f"{name} is not a text of at most {most} characters")
    return text


def judgement(judgements: Judgements, annotator: str, body: dict) -> Event:
    """The event for a judgement that the page sends. HTTP 400 if the request is not valid."""
    key, kind, places, seconds = (body.get(name) for name in ("sample", "kind", "places", "seconds"))
    if not isinstance(key, str) or key not in judgements.samples:
        raise HTTPException(400, "this prompt is not among the samples any more: reload the page")
    if kind not in ("rank", "skip", "flag"):
        raise HTTPException(400, "kind is not rank, skip or flag")
    if not isinstance(seconds, int | float) or not 0 <= seconds < 1e9:
        raise HTTPException(400, "seconds is not a number of seconds")
    event = {"id": text_of(body, "id", 64), "kind": kind, "annotator": annotator, "sample": key}
    event["where"] = judgements.samples[key].where
    order, first = judgements.order(annotator, key), judgements.samples[key].first
    if kind == "rank":
        valid = isinstance(places, list) and len(places) == len(order) and all(type(x) is int for x in places)
        if not valid or sorted(set(places)) != [*range(1, len(set(places)) + 1)]:
            raise HTTPException(400, "places are not the ranks of all responses, from 1 and without gaps")
        event["ranks"] = [places[order.index(i)] for i in first]
    event |= {"order": order, "seconds": round(seconds, 1), "note": text_of(body, "note", 2000).strip()}
    return event | {"time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())}


def opener(out: Path, port: int) -> tuple[Path, str]:
    """A page beside --out that opens the page of the server, and the address in it. Only this user can read it, and its
    token stays the same, so that after a stop an open page goes on with the new server."""
    path = out.with_name(out.stem + ".page.html")
    before = re.search(r"http://127[.]0[.]0[.]1:\d+/([\w-]{22})/", path.read_text("utf-8") if path.exists() else "")
    address = f"http://127.0.0.1:{port}/{before[1] if before else secrets.token_urlsafe(16)}/"
    with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w", encoding="utf-8") as f:
        os.fchmod(f.fileno(), 0o600)
        f.write(f'<!doctype html><meta http-equiv="refresh" content="0; url={address}">\n')
    return path, address


def app(judgements: Judgements, port: int, token: str) -> Starlette:
    """The server of the page and its four actions, under /TOKEN/, which other users of the machine do not know.
    Requests from other pages or under other host names get HTTP 403."""
    page = PAGE.read_text("utf-8")
    inline = {tag: re.search(rf"<{tag}>(.*?)</{tag}>", page, re.S)[1] for tag in ("style", "script")}
    digests = {tag: base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for tag, text in inline.items()}
    headers = {
        "Content-Security-Policy": "default-src 'none'; connect-src 'self'; img-src data:; base-uri 'none'; "
        "form-action 'none'; frame-ancestors 'none'; "
        + "; ".join(f"{tag}-src 'sha256-{digest}'" for tag, digest in digests.items()),
        "X-Content-Type-Options": "nosniff",
        "Referrer-Policy": "no-referrer",
        "Cross-Origin-Resource-Policy": "same-origin",
        "Cache-Control": "no-store",
    }
    hosts = [f"{name}:{port}" for name in ("127.0.0.1", "localhost")]

    async def guard(request, answer):
        host = request.headers.get("host")
        same_origin = request.headers.get("origin", f"http://{host}") == f"http://{host}"
        same_origin = same_origin and request.headers.get("sec-fetch-site", "same-origin") == "same-origin"
        content_type = request.headers.get("content-type", "").partition(";")[0].strip()
        if host not in hosts:
            advice = f"open http://{hosts[0]} (over ssh, forward the same port number: ssh -L {port}:{hosts[0]})"
            response = JSONResponse({"error": advice}, 403)
        elif request.method not in ("GET", "HEAD") and not same_origin:
            response = JSONResponse({"error": "a request from another page"}, 403)
        elif request.method not in ("GET", "HEAD") and content_type != "application/json":
            response = JSONResponse({"error": "not application/json"}, 415)
        else:
            response = await answer(request)
        response.headers.update(headers)
        return response

    async def index(_request):
        return HTMLResponse(page)

    async def api(request):
        data = b""
        async for part in request.stream():
            data += part
            if len(data) > MOST_BYTES:
                raise HTTPException(413, f"more than {MOST_BYTES} bytes")
        try:
            body = dict(json.loads(data))
        except (ValueError, TypeError, RecursionError):
            raise HTTPException(400, "not a JSON object") from None
        annotator = " ".join(text_of(body, "annotator", 60).split())
        if not annotator:
            raise HTTPException(400, "annotator is empty: give a name")
        action, draft, last = request.path_params["action"], None, judgements.history[annotator][-1:]
        if action == "step":
            key = judgements.step(annotator, body.get("sample"), 1 if body.get("by") == 1 else -1)
        elif action == "undo":
            if not last or last[0]["id"] != body.get("last"):
                raise HTTPException(409, "there is nothing to undo, or you judged on another page: reload this page")
            draft, key = last[0], last[0]["sample"]
            now = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
            judgements.add(draft | {"id": f"undo {draft['id']}", "kind": "undo", "time": now})
            judgements.reserved[annotator] = key, time.monotonic() + HOLD
        elif action not in ("next", "judge"):
            raise HTTPException(404, "no such action: next, judge, undo or step")
        else:
            if action == "judge":
                judgements.add(judgement(judgements, annotator, body))
            key = judgements.next(annotator)
        return JSONResponse(judgements.view(annotator, key, draft))

    def refused(_request, error):
        detail = "open the whole address that annotate.py printed" if error.detail == "Not Found" else error.detail
        return JSONResponse({"error": detail}, error.status_code)

    def failed(_request, error):
        return JSONResponse({"error": f"cannot write: {error.strerror}"}, 500)

    return Starlette(
        routes=[Route(f"/{token}/", index), Route(f"/{token}/api/{{action}}", api, methods=["POST"])],
        middleware=[Middleware(BaseHTTPMiddleware, dispatch=guard)],
        exception_handlers={HTTPException: refused, OSError: failed},
    )


def serve(judgements: Judgements, port: int, browser: bool) -> None:
    """Serve the page on 127.0.0.1 until Ctrl-C."""
    listener = socket.socket()
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind(("127.0.0.1", port))
        listener.listen()
    except OSError as error:
        raise BadInput(f"--port {port}: {error.strerror}; name another, or 0 for any free one") from None
    port = listener.getsockname()[1]
    path, address = opener(judgements.out, port)
    print(f"{address}  (Ctrl-C ends; every confirmed judgement is in {judgements.out})", flush=True)
    if browser:  # by a file, because all users see the command line of a program
        threading.Thread(target=webbrowser.open, args=(path.resolve().as_uri(),), daemon=True).start()
    options = {"log_level": "warning", "access_log": False, "lifespan": "off", "timeout_graceful_shutdown": 1}
    try:
        config = uvicorn.Config(app(judgements, port, address.split("/")[-2]), **options)
        uvicorn.Server(config).run(sockets=[listener])
    except KeyboardInterrupt:
        pass


# ------------------------------------------------------------------------------------------------------ without people


def label(a: Args, samples: dict[str, Sample], out: Path) -> dict:
    """--by: rank every prompt by a reward plus noise. The rows go to a partial file, which becomes --out at the end."""
    noise = a.noise if a.noise is not None else reviews.NOISE if a.by == "gold" else 0.0
    partial = out.with_name(out.name + ".partial")
    stopped = partial.exists()
    require(stopped or not a.resume, f"--resume: {partial} is missing: there is no labelling to continue")
    require(a.resume or not stopped, f"--out {out}: labelling was stopped: go on with --resume, or remove {partial}")

    def ranks_of(key: str, scores: Sequence[float]) -> list[int]:
        sample = samples[key]
        distinct = [scores[i] for i in sample.distinct]
        rng = random.Random(f"annotate {a.seed} {key}")  # one per prompt, so that --resume gives the same ranks
        ranks = reviews.rank(distinct, noise, rng)
        return [ranks[sample.distinct.index(i)] for i in sample.first]

    done = {}
    needed = ("prompt", "responses", "annotator", "noise", "ranks", "rewards")
    for number, row in enumerate(read_json_lines(partial, *needed) if stopped else [], 1):
        key = identity(row)
        valid = key in samples and (row["annotator"], row["noise"]) == (a.by, noise)
        valid = valid and row["ranks"] == ranks_of(key, row["rewards"])
        problem = f"--resume: {partial}:{number} was labelled with other samples or flags"
        require(valid, f"{problem}: give those, or remove it")
        done[key] = json.dumps(row, ensure_ascii=False).encode() + b"\n"
    reward = rewards.load_reward(a.by, a.device, "--by", trust_remote_code=a.trust_remote_code)
    todo = [key for key in samples if key not in done]
    out.parent.mkdir(parents=True, exist_ok=True)
    with open(partial, "wb") as f, tqdm(total=len(samples), initial=len(done), desc=a.by, unit="prompt") as bar:
        f.writelines(done.values())
        for start in range(0, len(todo), 64):
            group = todo[start : start + 64]
            sequences = [(samples[key].row, i) for key in group for i in range(len(samples[key].first))]
            prompts, responses = [row["prompt"] for row, _ in sequences], [row["responses"][i] for row, i in sequences]
            try:
                values = iter(reward(prompts, responses, [row_of(row, i) for row, i in sequences]))
            except BadInput:
                f.close()
                if not partial.stat().st_size:
                    partial.unlink()
                raise
            for key in group:
                sample = samples[key]
                scores = [next(values) for _ in sample.first]
                scores = [scores[i] for i in sample.first]  # identical texts count once, whatever their token ids
                row = {n: sample.row[n] for n in CARRIED if n in sample.row}
                row |= {"ranks": ranks_of(key, scores), "annotator": a.by, "rewards": scores, "noise": noise}
                done[key] = json.dumps(row, ensure_ascii=False).encode() + b"\n"
                f.write(done[key])
            f.flush()
            os.fsync(f.fileno())
            bar.update(len(group))
    os.replace(partial, out)
    print(f"{len(done)} rankings by {a.by} with noise {noise:g} are in {out}\nNext: python train_rm.py --data {out}")
    return {"judgements": len(done), "noise": noise}


# -------------------------------------------------------------------------------------------------------------- report


def report(out: Path) -> dict:
    """Print and return the statistics of the rankings in --out and of the people who made them."""
    require(out.is_file(), f"--report: {out} is missing: name the rankings with --out")
    require(out.stat().st_size > 0, f"--report: {out} holds no rankings yet")
    by_prompt: dict[str, list[dict]] = defaultdict(list)  # sample -> its rankings
    for where, row in read_rows(str(out))[0]:
        check_row(where, row)
        valid = isinstance(row.get("ranks"), list) and list(map(type, row["ranks"])) == [int] * len(row["responses"])
        require(valid, f"{where}: field 'ranks' is missing or not one rank for each response")
        by_prompt[identity(row)].append(row)
    rows = [row for prompt_rows in by_prompt.values() for row in prompt_rows]
    history: dict[str, list[Event]] = defaultdict(list)
    for event in read_journal(journal_of(out))[0]:
        advance(history, event)
    events = [event for by_annotator in in_force(history).values() for event in by_annotator.values()]

    def compare(rankings: Sequence[dict]) -> torch.Tensor:
        return pair_table(sample_of("", rankings[0]), rankings)

    def median(rows: Sequence[dict]) -> float:
        seconds = [row["seconds"] for row in rows if "seconds" in row]
        return statistics.median(seconds) if seconds else math.nan

    def show(x: float, digits: int = 3) -> str:
        return "-" if math.isnan(x) else f"{x:.{digits}f}"

    people = []
    for name in sorted({x["annotator"] for x in [*rows, *events] if x.get("annotator")}):
        ranked = [row for row in rows if row.get("annotator") == name]
        pairs = [compare([x, y]) for x in ranked for y in by_prompt[identity(x)] if y is not x]
        agreement_with_others = agreement.same(torch.stack(pairs).sum(0)) if pairs else math.nan
        kinds = Counter(event["kind"] for event in events if event["annotator"] == name)
        counts = [str(n) for n in (len(ranked), kinds["skip"], kinds["flag"])]
        people.append([visible(name), *counts, show(median(ranked), 1), show(agreement_with_others)])
    print(f"{out}: {len(rows)} rankings of {len(by_prompt)} prompts\n")
    print(table(["annotator", "ranked", "skipped", "flagged", "median seconds", "agrees with others"], people) + "\n")

    tables = [compare(prompt_rows) for prompt_rows in by_prompt.values() if len(prompt_rows) > 1]
    first_shown, longer_wins, chance = [], [], []  # per prompt: a sum over its rankings or untied pairs, their number
    for prompt_rows in by_prompt.values():
        ordered = [row for row in prompt_rows if "order" in row]  # those that the page wrote
        first_shown.append([sum(agreement.first_shown(row["order"], row["ranks"]) for row in ordered), len(ordered)])
        chance.append([sum(1 / len(row["order"]) for row in ordered), len(ordered)])
        distinct = sample_of("", prompt_rows[0]).distinct
        lengths = [len(prompt_rows[0]["responses"][i]) for i in distinct]
        ranks = [[row["ranks"][i] for i in distinct] for row in prompt_rows]
        wins = [x for row_ranks in ranks for x in agreement.longer_wins(lengths, row_ranks)]
        longer_wins.append([sum(wins), len(wins)])

    def share(sums: Sequence[Sequence[float | int]]) -> tuple[float, tuple[float, float]]:
        """Sum over prompts divided by their number of values, and its interval."""
        total, n = torch.tensor(sums, dtype=torch.float64).reshape(-1, 2).sum(0)
        return (total / n).item(), share_interval([x for x, _ in sums], [n for _, n in sums])

    def alpha(indices: Sequence[int]) -> float:
        return agreement.alpha(tables.index_select(0, torch.tensor(indices, dtype=torch.int64)).sum(0))

    (by_chance, _), everything = share(chance), range(len(tables))
    same = share([[table.trace().item(), table.sum().item()] for table in tables])
    tables = torch.stack(tables) if tables else torch.zeros(0, 3, 3)
    same_text = f"pairwise agreement, over {len(tables)} prompts ranked twice or more"
    alpha_text = "Krippendorff's ordinal alpha of the response pairs"
    first_text = f"the response shown first is ranked best (by chance {show(by_chance)})"
    longer_text = "the longer response of an untied pair wins (no bias: 0.500)"
    measures = {  # name: description, value, interval
        "agreement/same": (same_text, *same),
        "agreement/alpha": (alpha_text, alpha(everything), bootstrap(everything, alpha)),
        "bias/first_shown": (first_text, *share(first_shown)),
        "bias/longer": (longer_text, *share(longer_wins)),
    }
    results = {"judgements": len(rows), "prompts": len(by_prompt), "seconds": median(rows), "bias/chance": by_chance}
    lines = []
    for name, (description, value, (low, high)) in measures.items():
        results |= {name: value, f"{name}_interval": (low, high)}
        lines.append([description, show(value), f"{show(low)} to {show(high)}"])
    lines.append(["median time per judgement, seconds", show(results["seconds"], 1), ""])
    print(table(["", "", "95 % interval"], lines))
    for event in events:
        if event["kind"] == "flag" or event["note"]:
            note = " ".join(event["note"].split()) or "-"
            print(visible(f"{event['where']}  {event['kind']} by {event['annotator']}: {note}"))
    return results


# ---------------------------------------------------------------------------------------------------------------- main


def open_journal(out: Path) -> FileIO:
    """Open the journal and lock it for this process. The lock ends with the process, even if that is killed."""
    journal = journal_of(out)
    valid = journal.exists() or not out.exists()
    require(valid, f"--out {out} was not made by this page, which leaves a journal beside it: name another --out")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        file = open(journal, "ab", buffering=0)
        folder = os.open(out.parent, os.O_RDONLY)  # the folder's entry for a new journal must be on disk too
        os.fsync(folder)
        os.close(folder)
    except OSError as error:
        raise BadInput(f"--out {out}: cannot write there: {error.strerror}") from None
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise BadInput(f"--out {out} is being written by another annotate.py: share its page, or end it") from None
    except OSError as error:
        print(f"--out {out}: its file system has no locks ({error.strerror}): start no second page for it")
    return file


def main(a: Args) -> dict:
    """Serve the page, label by a reward, or report. Returns the results (docs/metrics.md)."""
    out = Path(a.out)
    require(out.suffix == ".jsonl", f"--out {out}: must end in .jsonl, as what trains on it wants")
    check(a)
    require(a.noise is None or a.by is not None, "--noise is of --by: people's rankings get no extra noise")
    require(not a.resume or a.by is not None, "--resume is of --by: the page always resumes")
    require(not (a.report and a.by), "--report and --by exclude each other: label first, then report")
    if a.report:
        return report(out)
    if a.by and rewards.names_function(a.by):  # what is wrong with it is said at once
        rewards.load_function(a.by, "--by")
    samples = read_samples(a.samples)
    sizes = Counter(len(sample.first) for sample in samples.values())
    print(f"{a.samples}: " + ", ".join(f"{n} prompts with {k} responses" for k, n in sorted(sizes.items())))
    if a.by:
        existing = next((path for path in (out, journal_of(out)) if path.exists()), None)
        require(existing is None, f"--out {out}: {existing} is there already: name another --out")
        return {"prompts": len(samples)} if a.dry_run else label(a, samples, out)
    file = None if a.dry_run else open_journal(out)
    judgements = Judgements(samples, out, file, a.overlap, a.overlap_share)

    def print_progress() -> dict[str, int]:
        events = [e for by_annotator in judgements.judged.values() for e in by_annotator.values()]
        people, kinds = Counter(e["annotator"] for e in rankings(events)), Counter(e["kind"] for e in events)
        wanting = sum(1 for _ in judgements.missing("", Counter()))
        print(f"{out}: {kinds['rank']} rankings" + "".join(f", {visible(x)} {n}" for x, n in people.items()), end="")
        print(f"; {kinds['skip']} skipped, {kinds['flag']} flagged; {wanting} prompts need more judgements")
        return {"prompts": len(samples), "judgements": kinds["rank"], "wanting": wanting}

    results = print_progress()
    if file:
        with file:
            serve(judgements, a.port, a.open)
        results = print_progress()
        print(f"The same command resumes from here. Next: python train_rm.py --data {out}")
    return results


if __name__ == "__main__":
    cli(main, Args)
