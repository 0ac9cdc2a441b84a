"""annotate.py without a browser: the requests of its page, the journal, the queue, --by and --report."""

import asyncio
import base64
import datetime
import hashlib
import http.client
import json
import math
import os
import re
import signal
import subprocess
import sys
import time
import tracemalloc
from collections import Counter
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

import annotate
from rlhf import BadInput
from support import report, reviews
from support.examples import build
from support.rows import read_rows

ROOT = Path(annotate.__file__).parent
TWO, THREE = ["yes", "no"], ["good .", "bad .", "fine ."]


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def samples(folder, n=4, responses=THREE):
    return write(folder / "samples.jsonl", [{"prompt": f"the plot {i} was", "responses": responses} for i in range(n)])


class Page:
    """annotate.py on the files of a folder, asked as the page asks it, without a socket."""

    def __init__(self, folder, overlap=1, share=1.0):
        self.out, self.journal = folder / "out.jsonl", folder / "out.journal.jsonl"
        self.file = annotate.open_journal(self.out)
        found = annotate.read_samples(str(folder / "samples.jsonl"))
        self.judgements = annotate.Judgements(found, self.out, self.file, overlap, share)
        self.app, self.ids = annotate.app(self.judgements, 8000, "token"), iter(range(1000))

    def request(self, method, path, body=None, token="/token", **headers):
        headers = {"host": "127.0.0.1:8000", "content_type": "application/json"} | headers
        raw = [(name.replace("_", "-").encode(), value.encode()) for name, value in headers.items() if value]
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        scope = {
            "type": "http",
            "method": method,
            "path": token + path,
            "headers": raw,
            "query_string": b"",
            "scheme": "http",
        }
        sent = []

        async def receive():
            return {"type": "http.request", "body": data, "more_body": False}

        async def send(message):
            sent.append(message)

        asyncio.run(self.app(scope, receive, send))
        answer = b"".join(message.get("body", b"") for message in sent)
        return sent[0]["status"], {k.decode(): v.decode() for k, v in sent[0]["headers"]}, answer

    def post(self, action, annotator="ana", **body):
        status, _, answer = self.request("POST", f"/api/{action}", {"annotator": annotator, **body})
        assert status == 200, answer
        return json.loads(answer)

    def judge(self, view, kind="rank", places=None, annotator="ana", **body):
        body = {"id": f"event {next(self.ids)}", "seconds": 2.0, "note": ""} | body
        return self.post("judge", annotator, sample=view["sample"], kind=kind, places=places, **body)

    def rank(self, view, annotator="ana", **body):
        """As they are shown, best first."""
        return self.judge(view, places=[*range(1, len(view["responses"]) + 1)], annotator=annotator, **body)

    def stop(self):
        self.file.close()


@pytest.fixture
def page(tmp_path):
    samples(tmp_path)
    page = Page(tmp_path)
    yield page
    page.stop()


# ------------------------------------------------------------------------------------------------------ a judgement


def test_a_ranking_is_written_in_the_order_of_the_samples(page):
    view = page.post("next")
    texts = [response["text"] for response in view["responses"]]
    assert sorted(texts) == sorted(THREE)
    places = {"good .": 1, "fine .": 2, "bad .": 2}
    after = page.judge(view, places=[places[text] for text in texts], note=" hm ", seconds=3.21)
    [row] = read(page.out)
    assert row.pop("time").endswith("Z")
    order = [THREE.index(text) for text in texts]
    assert row == {
        **{"prompt": "the plot 0 was", "responses": THREE, "ranks": [1, 2, 2], "annotator": "ana"},
        **{"order": order, "seconds": 3.2, "note": "hm"},
    }
    [event] = read(page.journal)
    assert event["kind"] == "rank" and event["ranks"] == [1, 2, 2] and event["order"] == order
    assert (after["done"], after["todo"], after["seconds"]) == (1, 3, 3.2)
    assert after["sample"] != view["sample"]


def test_a_ranking_is_right_whatever_the_order_was(tmp_path):
    samples(tmp_path, n=24)
    page = Page(tmp_path)
    view = page.post("next")
    while view["sample"]:
        texts = [response["text"] for response in view["responses"]]
        view = page.judge(view, places=[{"good .": 1, "fine .": 2, "bad .": 3}[text] for text in texts])
    rows = read(page.out)
    assert [row["ranks"] for row in rows] == [[1, 3, 2]] * 24
    assert [1, 2, 0] in [row["order"] for row in rows]  # which is not its own inverse
    page.stop()


def test_the_page_never_learns_where_a_response_stood(page):
    view = page.post("next")
    known = {"sample", "done", "todo", "judged", "last", "seconds", "same", "alpha", "prompts", "prompt", "responses"}
    assert view.keys() == known | {"places", "note"}
    assert all(response.keys() == {"text", "cut"} for response in view["responses"])


def test_the_order_is_an_annotators_own_and_stays(tmp_path):
    samples(tmp_path, n=60)
    page = Page(tmp_path)
    keys = list(page.judgements.samples)
    ana, ben = ([tuple(page.judgements.order(name, key)) for key in keys] for name in ("ana", "ben"))
    assert ana == [tuple(page.judgements.order("ana", key)) for key in keys]
    assert ana != ben
    assert len(set(ana)) == 6 and max(Counter(ana).values()) < 25  # all 3! orders, none of them favoured
    page.stop()


def test_identical_responses_are_shown_once_and_tie(tmp_path):
    rows = [{"prompt": "a", "responses": ["x", "y", "x"]}, {"prompt": "b", "responses": ["x", "x"]}]
    write(tmp_path / "samples.jsonl", rows)
    page = Page(tmp_path)
    view = page.post("next")
    texts = [response["text"] for response in view["responses"]]
    assert sorted(texts) == ["x", "y"]
    after = page.judge(view, places=[1 if text == "y" else 2 for text in texts])
    assert read(page.out)[0]["ranks"] == [2, 1, 2]
    assert after["sample"] is None and after["todo"] == 0  # there is nothing to rank in b
    page.stop()


def test_a_cut_response_is_not_one_that_ended(tmp_path):
    row = {"prompt": "a", "responses": ["x", "x"], "ended": [True, False], "logps": [-1.0, -2.0], "where": "reviews:1"}
    row |= {"token_ids": [[5, 2], [5]], "tokenizer": "abc"}
    write(tmp_path / "samples.jsonl", [row])
    page = Page(tmp_path)
    view = page.post("next")
    assert sorted(response["cut"] for response in view["responses"]) == [False, True]
    page.rank(view)
    [row] = read(page.out)
    assert row["ended"] == [True, False] and row["where"] == "reviews:1" and "logps" not in row
    assert row["token_ids"] == [[5, 2], [5]] and row["tokenizer"] == "abc"
    page.stop()


def test_rankings_are_ready_to_train_on(page):
    view = page.post("next")
    page.rank(view)
    rows, _ = read_rows(str(page.out))
    examples, _ = build(rows, reviews.tokenizer(), "preference", 32, 64)
    assert examples[0].ranks == read(page.out)[0]["ranks"]
    assert examples[0].response_texts == THREE


def test_skip_flag_undo_and_changing_ones_mind(page):
    one = page.post("next")
    two = page.judge(one, "skip")
    three = page.judge(two, "flag", note="odd")
    four = page.rank(three)
    assert [row["prompt"] for row in read(page.out)] == [three["prompt"]]
    back = page.post("step", sample=four["sample"], by=-1)
    assert back["sample"] == three["sample"] and back["judged"] == "rank" and back["places"] == [1, 2, 3]
    assert page.post("step", sample=three["sample"], by=-1)["sample"] == two["sample"]
    assert page.post("step", sample=one["sample"], by=-1)["sample"] == one["sample"]
    flagged = page.post("step", sample=one["sample"], by=1)
    assert (flagged["sample"], flagged["judged"], flagged["note"]) == (two["sample"], "flag", "odd")
    assert page.post("step", sample=three["sample"], by=1)["sample"] == four["sample"]
    page.rank(one)  # the skipped one after all
    assert [row["prompt"] for row in read(page.out)] == [one["prompt"], three["prompt"]]
    page.judge(three, places=[3, 2, 1])
    assert page.post("step", sample=three["sample"], by=-1)["judged"] == "rank"
    undone = page.post("undo", last=page.post("next")["last"])
    assert undone["sample"] == three["sample"] and undone["places"] == [1, 2, 3]  # what stood before is back
    undone = page.post("undo", last=undone["last"])
    assert undone["sample"] == one["sample"] and undone["judged"] == "skip"
    undone = page.post("undo", last=undone["last"])
    assert undone["sample"] == three["sample"] and undone["judged"] is None
    assert undone["places"] == [1, 2, 3]  # to start from
    assert read(page.out) == []
    assert page.post("next")["sample"] == three["sample"]


def test_undo_withdraws_only_what_the_page_showed_as_the_last(page):
    first = page.rank(page.post("next"))
    page.rank(first)
    status, _, answer = page.request("POST", "/api/undo", {"annotator": "ana", "last": first["last"]})
    assert status == 409 and b"reload" in answer
    status, _, _ = page.request("POST", "/api/undo", {"annotator": "ben", "last": None})
    assert status == 409
    assert len(read(page.out)) == 2


def test_a_judgement_sent_twice_counts_once(page):
    view = page.post("next")
    page.rank(view, id="same")
    again = page.rank(view, id="same")
    assert len(read(page.journal)) == len(read(page.out)) == 1
    assert again["done"] == 1


# -------------------------------------------------------------------------------------------------------- the queue


def test_two_at_once_never_get_a_prompt_that_wants_one_judgement(page):
    seen = {"ana": [], "ben": []}
    views = {name: page.post("next", name) for name in seen}
    while any(view["sample"] for view in views.values()):
        for name in seen:
            if views[name]["sample"]:
                seen[name].append(views[name]["sample"])
                views[name] = page.rank(views[name], name)
    assert len(seen["ana"]) == len(seen["ben"]) == 2
    assert not set(seen["ana"]) & set(seen["ben"])
    assert len(read(page.out)) == 4


def test_overlap_gives_each_prompt_to_so_many_people_begun_ones_first(tmp_path):
    samples(tmp_path, n=5)
    page = Page(tmp_path, overlap=2)
    view = page.rank(page.rank(page.post("next")))
    begun = list(page.judgements.samples)[:2]
    ben = page.post("next", "ben")
    assert ben["sample"] == begun[0]
    ben = page.rank(ben, "ben")
    assert ben["sample"] == begun[1]
    cy = page.post("next", "cy")  # the second prompt is on ben's page, which makes two; the third is on ana's
    assert cy["sample"] == view["sample"]
    views = {"ana": view, "ben": ben, "cy": cy}
    while any(found["sample"] for found in views.values()):
        views |= {name: page.rank(found, name) for name, found in views.items() if found["sample"]}
        views |= {name: page.post("next", name) for name, found in views.items() if not found["sample"]}
    assert Counter(row["prompt"] for row in read(page.out)) == {f"the plot {i} was": 2 for i in range(5)}
    assert len({(row["prompt"], row["annotator"]) for row in read(page.out)}) == 10
    page.stop()


def test_what_others_have_begun_comes_before_what_stands_first(tmp_path):
    samples(tmp_path, n=3)
    page = Page(tmp_path, overlap=2)
    second = page.judge(page.post("next"), "skip")
    page.rank(second)
    assert page.post("next", "ben")["sample"] == second["sample"]
    page.stop()


def test_overlap_share(tmp_path):
    samples(tmp_path, n=400)
    page = Page(tmp_path, overlap=3, share=0.25)
    wanted = Counter(page.judgements.wanted.values())
    assert set(wanted) == {1, 3} and 70 < wanted[3] < 130
    page.stop()
    assert set(Page(tmp_path, overlap=3, share=0.0).judgements.wanted.values()) == {1}


def test_a_prompt_left_on_a_page_is_free_again_after_a_while(tmp_path, monkeypatch):
    samples(tmp_path, n=1)
    page, now = Page(tmp_path), [1000.0]
    monkeypatch.setattr(annotate.time, "monotonic", lambda: now[0])
    view = page.post("next")
    waiting = page.post("next", "ben")
    assert waiting["sample"] is None and waiting["todo"] == 1
    now[0] += annotate.HOLD + 1
    assert page.post("next", "ben")["sample"] == view["sample"]
    page.rank(view, "ben")
    page.rank(view)  # came back from lunch: one judgement more than asked for, and none lost
    assert [row["annotator"] for row in read(page.out)] == ["ana", "ben"]
    page.stop()


def test_a_flag_takes_the_prompt_from_everybody_and_a_skip_only_from_oneself(page):
    one = page.post("next")
    two = page.judge(one, "flag")
    page.judge(two, "skip")
    ben = page.post("next", "ben")
    assert ben["sample"] == two["sample"] and ben["todo"] == 3


def test_agreement_on_the_page(tmp_path):
    samples(tmp_path, n=2, responses=TWO)
    page = Page(tmp_path, overlap=2)
    for name in ("ana", "ben"):
        view = page.post("next", name)
        assert view["same"] is None and view["alpha"] is None
        places = [1 if response["text"] == "yes" else 2 for response in view["responses"]]
        view = page.judge(view, places=places, annotator=name)
    assert view["prompts"] == 1 and view["same"] == view["alpha"] == 1
    for name in ("ana", "ben"):
        view = page.post("next", name)
        better = "yes" if name == "ana" else "no"
        places = [1 if response["text"] == better else 2 for response in view["responses"]]
        view = page.judge(view, places=places, annotator=name)
    assert (view["prompts"], view["same"]) == (2, 0.5)  # of n = 4 values, -1 and 1 twice each: 1 - 3 * 2 / (2 * 2 * 2)
    assert view["alpha"] == pytest.approx(0.25)
    page.stop()


# ------------------------------------------------------------------------------------------ the journal and the disk


def test_another_start_goes_on_and_cuts_an_unfinished_line(tmp_path, capsys):
    samples(tmp_path)
    page = Page(tmp_path)
    two = page.rank(page.post("next"))
    three = page.judge(two, "skip")
    page.stop()
    before = page.out.read_bytes()
    with open(page.journal, "ab") as f:
        f.write(b'{"id": "torn", "kind": "ra')
    page.out.unlink()
    page = Page(tmp_path)
    assert "unfinished last line" in capsys.readouterr().out
    assert page.out.read_bytes() == before
    view = page.post("next")
    assert (view["sample"], view["done"], view["todo"]) == (three["sample"], 2, 2)
    page.rank(view)
    page.stop()
    assert [event["kind"] for event in read(page.journal)] == ["rank", "skip", "rank"]


def test_samples_may_grow_but_not_change(tmp_path):
    samples(tmp_path, n=1)
    page = Page(tmp_path)
    page.rank(page.post("next"))
    page.stop()
    samples(tmp_path, n=3)
    page = Page(tmp_path)
    assert page.post("next")["todo"] == 2
    page.stop()
    held = page.journal.read_bytes(), page.out.read_bytes()
    samples(tmp_path, n=3, responses=TWO)
    with pytest.raises(BadInput, match=r"out.journal.jsonl:1: a judgement of a prompt that is not among these samples"):
        Page(tmp_path)
    assert held == (page.journal.read_bytes(), page.out.read_bytes())


def test_an_out_that_the_page_did_not_make_is_refused(tmp_path):
    path = samples(tmp_path)
    write(tmp_path / "out.jsonl", [{"prompt": "a", "responses": TWO, "ranks": [1, 2]}])
    with pytest.raises(BadInput, match="was not made by this page"):
        annotate.main(annotate.Args(str(path), str(tmp_path / "out.jsonl"), open=False))
    assert not (tmp_path / "out.journal.jsonl").exists()
    with pytest.raises(BadInput, match="was not made by this page"):
        annotate.main(annotate.Args(str(path), str(path), open=False))


def test_an_out_with_foreign_rows_is_refused(tmp_path):
    samples(tmp_path)
    page = Page(tmp_path)
    page.rank(page.post("next"))
    page.stop()
    with open(page.out, "a") as f:
        f.write(json.dumps({"prompt": "a", "responses": TWO, "ranks": [1, 2]}) + "\n")
    held = page.out.read_bytes()
    with pytest.raises(BadInput, match=r"out.jsonl:2: was not written from .*out.journal.jsonl"):
        Page(tmp_path)
    assert page.out.read_bytes() == held


def test_a_broken_journal_is_refused(tmp_path):
    samples(tmp_path)
    (tmp_path / "out.journal.jsonl").write_text("not json\n")
    with pytest.raises(BadInput, match="out.journal.jsonl:1: not a line of annotate.py's journal"):
        Page(tmp_path)
    (tmp_path / "out.journal.jsonl").write_text('{"kind": "undo", "sample": "x"}\n')
    with pytest.raises(BadInput, match="out.journal.jsonl:1: "):
        Page(tmp_path)


@pytest.mark.parametrize("written", [None, 7])
def test_a_full_disk_loses_nothing_and_confirms_nothing(page, written):
    """The write fails, or stops after 7 bytes."""
    two = page.rank(page.post("next"))
    held, real = page.journal.read_bytes(), page.file

    class Full:
        fileno = real.fileno

        def write(self, data):
            if written is None:
                raise OSError(28, "No space left on device")
            return real.write(data[:written])

    page.judgements.file = Full()
    body = {"id": "x", "sample": two["sample"], "kind": "rank", "places": [1, 2, 3], "seconds": 1, "note": ""}
    status, _, answer = page.request("POST", "/api/judge", {"annotator": "ana", **body})
    assert status == 500 and b"No space left" in answer
    assert page.journal.read_bytes() == held and len(read(page.out)) == 1
    page.judgements.file = real
    page.post("judge", **body)
    assert len(read(page.journal)) == len(read(page.out)) == 2


def test_a_judgement_whose_out_could_not_be_written_is_written_with_the_next_try(page, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    view = page.post("next")
    body = {"id": "x", "sample": view["sample"], "kind": "rank", "places": [1, 2, 3], "seconds": 1, "note": ""}
    with monkeypatch.context() as m:
        m.setattr(annotate.os, "replace", full)
        assert page.request("POST", "/api/judge", {"annotator": "ana", **body})[0] == 500
    assert read(page.out) == []
    page.post("judge", **body)
    assert len(read(page.journal)) == len(read(page.out)) == 1


def test_the_server_killed_in_the_middle(tmp_path):
    """As a process of its own: it holds the lock, it is killed with SIGKILL, and all that it confirmed is there."""
    path, out = samples(tmp_path, n=20), tmp_path / "out.jsonl"
    command = [sys.executable, ROOT / "annotate.py", path, "--out", out, "--port", "0", "--no-open"]
    environment = os.environ | {"PYTHONUNBUFFERED": "1"}
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
    try:
        port, token = next(
            m.groups() for line in server.stdout if (m := re.match(r"http://127.0.0.1:(\d+)/([^/]+)/", line))
        )

        def post(action, **body):
            connection = http.client.HTTPConnection("127.0.0.1", int(port), timeout=10)
            body = json.dumps({"annotator": "ana", **body})
            connection.request("POST", f"/{token}/api/{action}", body, {"Content-Type": "application/json"})
            return json.load(connection.getresponse())

        with pytest.raises(BadInput, match="is being written by another annotate.py"):
            annotate.main(annotate.Args(str(path), str(out), port=0, open=False))
        view, confirmed = post("next"), []
        for i in range(8):
            view_before = view["sample"]
            places = {"sample": view_before, "kind": "rank", "places": [1, 2, 2], "seconds": 1, "note": ""}
            view = post("judge", id=str(i), **places)
            confirmed.append(view_before)
    finally:
        server.send_signal(signal.SIGKILL)
        server.wait()
        server.stdout.close()
    found = annotate.main(annotate.Args(str(path), str(out), dry_run=True))
    assert found == {"prompts": 20, "judgements": 8, "wanting": 12}
    assert [event["sample"] for event in read(tmp_path / "out.journal.jsonl")] == confirmed
    assert len(read(out)) == 8
    Page(tmp_path).stop()  # the lock went with the process


def test_port_in_use_is_one_line(tmp_path):
    path = samples(tmp_path)
    with annotate.socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(BadInput, match=f"--port {port}: Address already in use"):
            annotate.main(annotate.Args(str(path), str(tmp_path / "out.jsonl"), port=port, open=False))


# ------------------------------------------------------------------------------------------------- who may ask what


@pytest.mark.parametrize(
    "headers, status",
    [
        ({}, 200),
        ({"host": "localhost:8000", "origin": "http://localhost:8000", "sec_fetch_site": "same-origin"}, 200),
        ({"host": "evil.example:8000"}, 403),
        ({"host": "evil.example"}, 403),
        ({"host": "127.0.0.1:9"}, 403),
        ({"host": "127.0.0.1"}, 403),
        ({"host": ""}, 403),
        ({"origin": "http://evil.example"}, 403),
        ({"origin": "http://127.0.0.1:9"}, 403),
        ({"origin": "http://localhost:8000"}, 403),
        ({"origin": "https://127.0.0.1:8000"}, 403),
        ({"origin": "null"}, 403),
        ({"sec_fetch_site": "cross-site"}, 403),
        ({"sec_fetch_site": "same-site"}, 403),
        ({"sec_fetch_site": "none"}, 403),
        ({"content_type": "text/plain"}, 415),
        ({"content_type": "application/x-www-form-urlencoded"}, 415),
        ({"content_type": ""}, 415),
        ({"content_type": "application/json; charset=utf-8"}, 200),
    ],
)
def test_only_the_page_itself_changes_anything(page, headers, status):
    for action in ("next", "undo", "judge", "step"):
        key = next(iter(page.judgements.samples))
        body = {"annotator": "ana", "id": "x", "sample": key, "kind": "skip", "seconds": 1, "note": "", "last": "x"}
        found = page.request("POST", f"/api/{action}", body, **headers)[0]
        assert found == (409 if status == 200 and action == "undo" else status)
    assert len(page.journal.read_bytes()) > 0 if status == 200 else page.journal.read_bytes() == b""


def test_the_page_is_given_to_its_own_host_name_only(page):
    status, headers, body = page.request("GET", "/", host="localhost:8000")
    assert status == 200 and b"<script>" in body
    status, _, body = page.request("GET", "/", host="rebound.example:8000")
    assert status == 403 and b"ssh -L" in body and b"<script>" not in body
    assert page.request("GET", "/api/next")[0] == 405


def test_a_request_cannot_be_as_large_as_it_likes(page):
    """Nor can a place, of which a set up to it would be made."""
    body = {"annotator": "ana", "id": "x", "sample": next(iter(page.judgements.samples)), "kind": "rank", "seconds": 1}
    full = json.dumps(body | {"places": [1, 2, 3], "note": "\U0001f600" * 2000}).encode()
    assert len(full) < annotate.MOST_BYTES == 65536
    status, _, answer = page.request("POST", "/api/judge", full + b" " * (65537 - len(full)))
    assert status == 413 and answer == b'{"error":"more than 65536 bytes"}' and page.journal.read_bytes() == b""
    tracemalloc.start()
    assert page.request("POST", "/api/judge", body | {"places": [1, 2, 30_000_000], "note": ""})[0] == 400
    assert tracemalloc.get_traced_memory()[1] < 10**7
    tracemalloc.stop()
    assert page.request("POST", "/api/judge", full + b" " * (65536 - len(full)))[0] == 200


def test_without_the_token_there_is_nothing(page):
    key = next(iter(page.judgements.samples))
    body = {"annotator": "eve", "id": "x", "sample": key, "kind": "skip", "seconds": 1, "note": ""}
    for token in ("", "/tok", "/other", "/token/token"):
        for method, path in (("GET", "/"), ("POST", "/api/next"), ("POST", "/api/judge"), ("POST", "/api/undo")):
            status, _, answer = page.request(method, path, body, token=token)
            assert status == 404 and answer == b'{"error":"open the whole address that annotate.py printed"}'
    assert page.journal.read_bytes() == b""


def test_only_this_user_can_read_the_token_which_stays(tmp_path):
    path, address = annotate.opener(tmp_path / "out.jsonl", 8000)
    assert path.stat().st_mode & 0o777 == 0o600 and f"url={address}" in path.read_text()
    token = re.fullmatch(r"http://127\.0\.0\.1:8000/([\w-]{22})/", address)[1]
    path.chmod(0o644)
    again = annotate.opener(tmp_path / "out.jsonl", 8001)
    assert again == (path, f"http://127.0.0.1:8001/{token}/") and path.stat().st_mode & 0o777 == 0o600
    assert annotate.opener(tmp_path / "other.jsonl", 8000)[1] != address
    path.write_text("nothing")
    assert annotate.opener(tmp_path / "out.jsonl", 8000)[1] != address


def test_the_policy_allows_this_script_and_no_other(page):
    _, headers, body = page.request("GET", "/")
    policy = dict(part.strip().split(" ", 1) for part in headers["content-security-policy"].split(";"))
    script = re.search(rb"<script>(.*?)</script>", body, re.S)[1]
    digest = base64.b64encode(hashlib.sha256(script).digest()).decode()
    assert policy["default-src"] == "'none'" and policy["script-src"] == f"'sha256-{digest}'"
    assert policy["connect-src"] == "'self'" and policy["frame-ancestors"] == "'none'"
    assert headers["x-content-type-options"] == "nosniff" and headers["cache-control"] == "no-store"


def test_the_page_makes_no_markup_of_texts_and_asks_nobody_else():
    text = annotate.PAGE.read_text()
    assert text.isascii()
    for name in ("innerHTML", "outerHTML", "insertAdjacent", "document.write", "eval(", "DOMParser", "srcdoc", " on"):
        assert name not in re.sub(r"\s(one?|only|onto|once)\b", "", text).replace(" on this", ""), name
    assert not re.search(r"(src|href)=\"(?!data:)", text)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"annotator": " "}, "annotator is empty"),
        ({"annotator": "x" * 61}, "annotator is not a text"),
        ({"annotator": ["ana"]}, "annotator is not a text"),
        ({"annotator": "\ud800"}, "annotator is not a text"),
        ({"note": "x" * 2001}, "note is not a text"),
        ({"note": "\udfff"}, "note is not a text"),
        ({"note": None}, "note is not a text"),
        ({"id": 7}, "id is not a text"),
        ({"sample": "other"}, "not among the samples"),
        ({"sample": ["other"]}, "not among the samples"),
        ({"kind": "undo"}, "kind is not"),
        ({"seconds": -1}, "seconds is not"),
        ({"seconds": float("nan")}, "seconds is not"),
        ({"seconds": "1"}, "seconds is not"),
        ({"places": [1, 2]}, "places are not"),
        ({"places": [1, 3, 3]}, "places are not"),
        ({"places": [0, 1, 2]}, "places are not"),
        ({"places": [1, 2, True]}, "places are not"),
        ({"places": [1, 2, "3"]}, "places are not"),
        ({"places": None}, "places are not"),
        ({"places": 3}, "places are not"),
    ],
)
def test_a_request_that_makes_no_sense_is_refused_and_not_written(page, changes, message):
    view = page.post("next")
    body = {"id": "x", "sample": view["sample"], "kind": "rank", "places": [1, 2, 3], "seconds": 1, "note": ""}
    status, _, answer = page.request("POST", "/api/judge", {"annotator": "ana"} | body | changes)
    assert status == 400 and message in json.loads(answer)["error"]
    assert page.journal.read_bytes() == b""


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b"7", b'"x"', b"null", b"[" * 60000, b"\xff"])
def test_a_body_that_is_not_an_object_is_refused(page, body):
    assert page.request("POST", "/api/next", body)[0] == 400


def test_text_of_any_kind_survives(tmp_path):
    texts = ["<script>alert(1)</script>", "line\u2028separator \x00 \U0001f600", "", " \n"]
    write(tmp_path / "samples.jsonl", [{"prompt": "<b>", "responses": texts}])
    page = Page(tmp_path)
    page.rank(page.post("next", "<i>\u00e9"), "<i>\u00e9", note="a\nb\u2029c")
    page.stop()
    [row] = [row for _, row in read_rows(str(page.out))[0]]
    assert row["responses"] == texts and row["annotator"] == "<i>\u00e9" and row["note"] == "a\nb\u2029c"
    Page(tmp_path).stop()


# ----------------------------------------------------------------------------------------------------------- samples


@pytest.mark.parametrize(
    "line, message",
    [
        ("{", r"samples.jsonl:2: not JSON \(.*\): mend the line$"),
        ("[]", "samples.jsonl:2: not an object"),
        ('{"responses": ["a", "b"]}', "samples.jsonl:2: field 'prompt' is missing"),
        ('{"prompt": "", "responses": ["a", "b"]}', "samples.jsonl:2: field 'prompt' is missing"),
        ('{"prompt": 3, "responses": ["a", "b"]}', "samples.jsonl:2: field 'prompt'"),
        (
            '{"prompt": [{"role": "user"}], "responses": ["a", "b"]}',
            "samples.jsonl:2: field 'prompt' is missing or not text",
        ),
        ('{"prompt": "a"}', "samples.jsonl:2: field 'responses' is missing"),
        ('{"prompt": "a", "responses": "ab"}', "samples.jsonl:2: field 'responses'"),
        ('{"prompt": "a", "responses": ["a", 1]}', "samples.jsonl:2: field 'responses'"),
        ('{"prompt": "a", "responses": ["a"]}', "samples.jsonl:2: field 'responses' has 1 entries"),
        (json.dumps({"prompt": "a", "responses": list("abcdefghij")}), "samples.jsonl:2: field 'responses' has 10"),
        ('{"prompt": "a", "responses": ["a", "b"], "ended": [true]}', "samples.jsonl:2: field 'ended'"),
        ('{"prompt": "a", "responses": ["a", "b"], "ended": [1, 0]}', "samples.jsonl:2: field 'ended'"),
        ('{"prompt": "a", "responses": ["a", "\\ud800"]}', "samples.jsonl:2: .* half a surrogate pair"),
        (
            '{"prompt": [{"role": "user", "content": "a", "when": "\\ud800"}], "responses": ["a", "b"]}',
            "samples.jsonl:2: field 'prompt' holds half a surrogate pair",
        ),
    ],
)
def test_bad_samples_are_one_line(tmp_path, line, message):
    path = tmp_path / "samples.jsonl"
    path.write_text('{"prompt": "a", "responses": ["a", "b"]}\n' + line + "\n")
    with pytest.raises(BadInput, match=message) as error:
        annotate.main(annotate.Args(str(path), str(tmp_path / "out.jsonl"), dry_run=True))
    assert "\n" not in str(error.value)


def test_samples_that_no_journal_can_hold(tmp_path):
    prompt = [{"role": "user", "content": "a", "when": datetime.date(2026, 1, 1)}]
    rows = [{"prompt": prompt, "responses": ["a", "b"]}]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "samples.parquet")
    with pytest.raises(BadInput, match="samples.parquet:1: field 'prompt' holds no JSON .*date is not JSON"):
        annotate.main(annotate.Args(str(tmp_path / "samples.parquet"), str(tmp_path / "out.jsonl"), dry_run=True))


def test_a_reward_function_is_imported_before_the_samples_are_read(tmp_path):
    with pytest.raises(BadInput, match="--by missing_module_of_mine:f: cannot be imported"):
        annotate.main(annotate.Args("none.jsonl", str(tmp_path / "out.jsonl"), by="missing_module_of_mine:f"))


def test_missing_empty_and_useless_samples(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(BadInput, match="runs/samples.jsonl is missing: make it with `python sample.py`"):
        annotate.main(annotate.Args())
    with pytest.raises(BadInput, match="other.jsonl is missing: no such file"):
        annotate.main(annotate.Args("other.jsonl"))
    Path("empty.jsonl").write_text("")
    with pytest.raises(BadInput, match="empty.jsonl: holds no rows"):
        annotate.main(annotate.Args("empty.jsonl"))
    write(Path("same.jsonl"), [{"prompt": "a", "responses": ["x", "x"]}])
    with pytest.raises(BadInput, match="same.jsonl: no row has two different responses"):
        annotate.main(annotate.Args("same.jsonl"))
    assert not Path("runs").exists()


@pytest.mark.parametrize(
    "flags, message",
    [
        ({"overlap": 0}, "--overlap must be at least 1"),
        ({"overlap_share": 1.5}, "--overlap-share must be in"),
        ({"port": 70000}, "--port must be in"),
        ({"noise": -1.0, "by": "gold"}, "--noise must be at least 0"),
        ({"noise": math.nan, "by": "gold"}, "--noise must be at least 0"),
        ({"noise": 1.0}, "--noise is of --by"),
        ({"report": True, "by": "gold"}, "exclude each other"),
    ],
)
def test_flags_out_of_range(tmp_path, flags, message):
    with pytest.raises(BadInput, match=message):
        annotate.main(annotate.Args(str(samples(tmp_path)), str(tmp_path / "out.jsonl"), **flags))


def test_dry_run_says_what_there_is_and_touches_nothing(tmp_path, capsys):
    rows = [{"prompt": str(i), "responses": TWO if i else THREE} for i in (0, 1, 2, 2)]
    write(tmp_path / "samples.jsonl", rows)
    page = Page(tmp_path)
    page.rank(page.post("next"))
    page.stop()
    before = {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in tmp_path.iterdir()}
    capsys.readouterr()
    flags = {"dry_run": True, "overlap": 2}
    found = annotate.main(annotate.Args(str(tmp_path / "samples.jsonl"), str(page.out), **flags))
    assert found == {"prompts": 3, "judgements": 1, "wanting": 3}
    printed = capsys.readouterr().out
    assert "2 prompts with 2 responses, 1 prompts with 3 responses" in printed
    assert "1 rows that are there twice" in printed and "1 rankings, ana 1; 0 skipped, 0 flagged" in printed
    assert before == {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in tmp_path.iterdir()}


# ------------------------------------------------------------------------------------------------------ without people


@pytest.fixture
def labels(tmp_path, monkeypatch):
    """--by over these samples; a module of rewards lies in the working directory."""
    monkeypatch.chdir(tmp_path)
    source = "def length(prompts, responses, rows):\n    return [float(len(text)) for text in responses]\n"
    source += "def cut(prompts, responses, rows):\n    return [float(row['ended']) for row in rows]\n"
    source += "def fails(prompts, responses, rows):\n    raise ValueError('no such word')\n"
    Path("own_rewards.py").write_text(source)

    def label(rows, by="own_rewards:length", **flags):
        write(Path("samples.jsonl"), rows)
        annotate.main(annotate.Args("samples.jsonl", "out.jsonl", by=by, **flags))
        return read(Path("out.jsonl"))

    yield label
    sys.modules.pop("own_rewards", None)


def test_by_a_function_without_noise_equal_rewards_tie(labels):
    [row] = labels([{"prompt": "p", "responses": ["bb", "a", "cc", "dddd"], "where": "x:1"}])
    assert row == {
        **{"prompt": "p", "responses": ["bb", "a", "cc", "dddd"], "where": "x:1"},
        **{"ranks": [2, 3, 2, 1], "rewards": [2.0, 1.0, 2.0, 4.0], "noise": 0.0, "annotator": "own_rewards:length"},
    }


def test_by_a_function_sees_which_responses_were_cut(labels):
    rows = labels([{"prompt": "p", "responses": ["a", "b"], "ended": [False, True]}], by="own_rewards:cut")
    assert rows[0]["ranks"] == [2, 1] and rows[0]["ended"] == [False, True]


def test_by_gold_is_the_embedded_reward_with_its_annotators_noise(labels):
    rows = [{"prompt": f"the plot was {i}", "responses": ["superb .", "quite good .", "dull ."]} for i in range(300)]
    found = labels(rows, by="gold")
    gold = [reviews.gold_reward(f"the plot was 0 {text}") for text in rows[0]["responses"]]
    assert found[0]["rewards"] == gold and found[0]["noise"] == reviews.NOISE and found[0]["annotator"] == "gold"
    ranks = [row["ranks"] for row in found]
    assert gold == sorted(gold, reverse=True) and 0 < ranks.count([1, 2, 3]) < len(ranks)


def test_by_gold_with_zero_noise_is_exact(labels):
    found = labels([{"prompt": "the plot was", "responses": ["dull .", "superb .", "good ."]}], by="gold", noise=0.0)
    assert found[0]["ranks"] == [3, 1, 2]


def test_noise_has_the_probability_of_plackett_and_luce(labels):
    """Lengths 1, 2, 3 at temperature 1.5: P(the longest is best) = softmax; among the others sigmoid(1 / 1.5)."""
    rows = [{"prompt": str(i), "responses": ["a", "bb", "ccc"]} for i in range(3000)]
    found = labels(rows, noise=1.5)
    weights = [math.exp(n / 1.5) for n in (1, 2, 3)]
    best = Counter(row["ranks"].index(1) for row in found)
    for i, weight in enumerate(weights):
        assert best[i] / 3000 == pytest.approx(weight / sum(weights), abs=0.03)
    rest = [row["ranks"] for row in found if row["ranks"][2] == 1]
    assert sum(r[1] < r[0] for r in rest) / len(rest) == pytest.approx(1 / (1 + math.exp(-1 / 1.5)), abs=0.04)
    assert all(sorted(row["ranks"]) == [1, 2, 3] for row in found)


def test_labels_are_those_of_their_seed_whatever_the_global_random_state(labels):
    rows = [{"prompt": str(i), "responses": ["a", "bb"]} for i in range(40)]
    found = {}
    for state, seed in enumerate((0, 0, 1)):
        annotate.random.seed(state)
        Path("out.jsonl").unlink(missing_ok=True)
        ranks = [row["ranks"] for row in labels(rows, noise=1.0, seed=seed)]
        assert found.setdefault(seed, ranks) == ranks
    assert found[0] != found[1]


def test_identical_responses_tie_under_noise_too(labels):
    rows = [{"prompt": str(i), "responses": ["a", "bb", "a"]} for i in range(30)]
    found = labels(rows, noise=5.0)
    assert all(row["ranks"][0] == row["ranks"][2] != row["ranks"][1] for row in found)
    assert {tuple(row["ranks"]) for row in found} == {(1, 2, 1), (2, 1, 2)}


def test_by_goes_on_after_a_stop_to_the_same_rankings(labels, capsys):
    """The reward fails at prompt 150: two groups of 64 are kept, and a torn line behind them is not."""
    rows = [{"prompt": str(i), "responses": ["a", "bb", "ccc"]} for i in range(200)]
    want = labels(rows, noise=2.0)
    Path("out.jsonl").unlink()
    good = Path("own_rewards.py").read_text()
    Path("own_rewards.py").write_text(
        good + "_length = length\ndef length(p, r, rows):\n"
        "    if '150' in p: raise ValueError('later')\n    return _length(p, r, rows)\n"
    )
    sys.modules.pop("own_rewards")
    with pytest.raises(BadInput, match="later"):
        labels(rows, noise=2.0)
    partial = Path("out.jsonl.partial")
    assert len(read(partial)) == 128 and not Path("out.jsonl").exists()
    with open(partial, "a") as f:
        f.write('{"prompt": "12')
    for flags in ({"noise": 1.0}, {"noise": 2.0, "seed": 1}):
        with pytest.raises(BadInput, match="labelled with other samples or flags"):
            labels(rows, resume=True, **flags)
    with pytest.raises(BadInput, match="go on with --resume"):
        labels(rows, noise=2.0)
    Path("own_rewards.py").write_text(
        good + "\nasked = []\n_length = length\ndef length(p, r, rows):\n"
        "    asked.extend(p)\n    return _length(p, r, rows)\n"
    )
    sys.modules.pop("own_rewards")
    assert labels(rows, noise=2.0, resume=True) == want
    assert sys.modules["own_rewards"].asked == [str(i) for i in range(128, 200) for _ in range(3)]
    assert not partial.exists()


def test_by_overwrites_nothing_and_leaves_nothing_half_done(labels):
    rows = [{"prompt": "the first one", "responses": ["a", "bb"]}]
    with pytest.raises(BadInput, match="the first one") as error:
        labels(rows, by="own_rewards:fails")
    assert "no such word" in str(error.value)
    assert not list(Path().glob("out*"))
    labels(rows)
    before = Path("out.jsonl").read_bytes()
    with pytest.raises(BadInput, match="out.jsonl is there already"):
        labels(rows, noise=1.0)
    assert Path("out.jsonl").read_bytes() == before
    Path("out.jsonl").unlink()
    Path("out.journal.jsonl").touch()
    with pytest.raises(BadInput, match="out.journal.jsonl is there already"):
        labels(rows)


# ------------------------------------------------------------------------------------------------------------- report


def test_report(tmp_path, capsys):
    """Values by hand. Pairs (0,1), (0,2), (1,2) of prompt a: ana -1, -1, 0 and ben -1, 1, 1; of prompt b: -1 and -1.
    8 values can be compared, 2 of 4 units agree. Shown first and best: ana 1/2 + 0, ben 1, cy 0 of 4 rankings."""
    a, b = ["one", "three", "seven"], ["four", "five"]
    rows = [
        {"prompt": "a", "responses": a, "ranks": [1, 2, 2], "annotator": "ana", "order": [1, 0, 2], "seconds": 4.0},
        {"prompt": "a", "responses": a, "ranks": [2, 3, 1], "annotator": "ben", "order": [2, 1, 0], "seconds": 8.0},
        {"prompt": "b", "responses": b, "ranks": [1, 2], "annotator": "ana", "order": [0, 1], "seconds": 6.0},
        {"prompt": "b", "responses": b, "ranks": [1, 2], "annotator": "gold"},
        {"prompt": "c", "responses": ["x", "yy"], "ranks": [2, 1], "annotator": "cy", "order": [0, 1], "seconds": 30},
    ]
    write(tmp_path / "out.jsonl", rows)
    found = annotate.main(annotate.Args(out=str(tmp_path / "out.jsonl"), report=True))
    assert (found["judgements"], found["prompts"], found["seconds"]) == (5, 3, 7.0)
    assert found["agreement/same"] == pytest.approx(2 / 4)
    # each pair both ways: n = 8 with (-1: 3.5, 0: 1, 1: 3.5); delta2(-1,1) = 4.5^2, delta2(-1,0) = delta2(0,1) = 2.25^2
    observed, expected = 2 * (4.5**2 + 2.25**2), 2 * (3.5**2 * 4.5**2 + 2 * 3.5 * 2.25**2)
    assert found["agreement/alpha"] == pytest.approx(1 - 7 * observed / expected)
    assert found["bias/first_shown"] == pytest.approx((0 + 1 + 1 + 0) / 4)
    assert found["bias/chance"] == pytest.approx((1 / 3 + 1 / 3 + 1 / 2 + 1 / 2) / 4)
    # the longer one wins: ana a 0 of 2; ben a: (2 over 0) 1, (2 over 1) 1/2, (0 over 1) 0; b half each; c 1
    assert found["bias/longer"] == pytest.approx((0 + 0 + 1 + 0.5 + 0 + 0.5 + 0.5 + 1) / 8)
    low, high = found["agreement/same_interval"]  # of 2 of 6 and 2 of 2: two prompts say next to nothing
    assert (low, high) == pytest.approx(report.share_interval([2, 2], [6, 2])) and low < 0.01 and high > 0.99
    printed = capsys.readouterr().out
    assert "5 rankings of 3 prompts" in printed
    lines = {line.split()[0]: line.split()[1:] for line in printed.splitlines() if line.strip()}
    assert lines["ana"] == ["2", "0", "0", "5.0", "0.500"]
    assert lines["gold"] == ["1", "0", "0", "-", "1.000"]
    assert lines["cy"] == ["1", "0", "0", "30.0", "-"]


def test_report_of_what_the_page_wrote(tmp_path, capsys):
    samples(tmp_path, n=3)
    page = Page(tmp_path, overlap=2)
    view = page.rank(page.post("next"), note="close")
    view = page.judge(view, "flag", note="not a sentence")
    page.judge(view, "skip")
    page.post("undo", last=page.post("next")["last"])
    page.stop()
    found = annotate.main(annotate.Args(out=str(page.out), report=True))
    assert found["judgements"] == 1 and math.isnan(found["agreement/alpha"]) and math.isnan(found["agreement/same"])
    printed = capsys.readouterr().out
    assert re.search(r"ana +1 +0 +1 +2.0 +-", printed)
    assert (
        "samples.jsonl:2  flag by ana: not a sentence" in printed and "samples.jsonl:1  rank by ana: close" in printed
    )
    assert re.search(r"alpha.* +- +- to -", printed)


def test_nothing_that_people_write_drives_the_terminal(tmp_path, capsys):
    """Escape sequences of a name and a note are shown, not obeyed."""
    samples(tmp_path, n=2)
    page = Page(tmp_path)
    page.rank(page.post("next", "\x1b[2Jeve\x9b"), "\x1b[2Jeve\x9b", note="a\x1b]0;title\x07\rb")
    page.stop()
    annotate.main(annotate.Args(str(tmp_path / "samples.jsonl"), str(page.out), dry_run=True))
    annotate.main(annotate.Args(out=str(page.out), report=True))
    printed = capsys.readouterr().out
    assert ", \\x1b[2Jeve\\x9b 1" in printed and re.search(r"^\\x1b\[2Jeve\\x9b +1", printed, re.M)
    assert "rank by \\x1b[2Jeve\\x9b: a\\x1b]0;title\\x07 b\n" in printed
    assert not re.search("[\0-\x09\x0b-\x1f\x7f-\x9f]", printed)


def test_a_rank_as_large_as_can_be_written_is_reported(tmp_path):
    write(
        tmp_path / "out.jsonl", [{"prompt": "a", "responses": TWO, "ranks": [1, 10**30], "annotator": x} for x in "ab"]
    )
    found = annotate.main(annotate.Args(out=str(tmp_path / "out.jsonl"), report=True))
    assert found["agreement/same"] == 1.0


@pytest.mark.parametrize("row", [{"prompt": "a", "responses": TWO}, {"prompt": "a", "responses": TWO, "ranks": [1]}])
def test_report_of_what_is_not_a_ranking(tmp_path, row):
    write(tmp_path / "out.jsonl", [row])
    with pytest.raises(BadInput, match="out.jsonl:1: field 'ranks'"):
        annotate.main(annotate.Args(out=str(tmp_path / "out.jsonl"), report=True))


def test_report_without_rankings(tmp_path):
    with pytest.raises(BadInput, match="--report: .* is missing"):
        annotate.main(annotate.Args(out=str(tmp_path / "out.jsonl"), report=True))
    (tmp_path / "out.jsonl").touch()
    with pytest.raises(BadInput, match="holds no rankings yet"):
        annotate.main(annotate.Args(out=str(tmp_path / "out.jsonl"), report=True))


@pytest.mark.slow
def test_a_judgement_among_a_thousand_prompts_is_quick(tmp_path):
    samples(tmp_path, n=1000, responses=["x" * 2000, "y" * 2000, "z" * 2000])
    page = Page(tmp_path, overlap=2)
    for name in ("ana", "ben"):
        view = page.post("next", name)
        for _ in range(100):
            began = time.perf_counter()
            view = page.rank(view, name)
        assert time.perf_counter() - began < 0.5
    page.stop()
