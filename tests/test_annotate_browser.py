"""The page of annotate.py in a real browser: Debian's Chromium, driven by Playwright."""

import functools
import http.server
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
import uvicorn

import annotate

sync_api = pytest.importorskip("playwright.sync_api", reason="needs playwright: pip install -r requirements-dev.txt")
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(not CHROMIUM, reason="needs Chromium: apt-get install chromium")
ROOT = Path(annotate.__file__).parent
expect = sync_api.expect
HOSTILE = "<script>document.title='run'</script><img src=x onerror=\"document.title='run'\">"
CODE = "So:\n\n```python\nprint(1)" + " # a long comment" * 20 + "\n```\nDone."


def write(folder, rows):
    (folder / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def four(n=3):
    return [{"prompt": f"prompt {i}", "responses": [f"{word} {i}" for word in "abcd"]} for i in range(n)]


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def browser():
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def served(tmp_path):
    """Serves rows from a thread of this process; gives the address and the files."""
    running = []

    def serve(rows, overlap=1, port=0):
        write(tmp_path, rows)
        out = tmp_path / "out.jsonl"
        file = annotate.open_journal(out)
        judgements = annotate.Judgements(
            annotate.read_samples(str(tmp_path / "samples.jsonl")), out, file, overlap, 1.0
        )
        listener = socket.socket()
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(("127.0.0.1", port))
        port = listener.getsockname()[1]
        config = uvicorn.Config(annotate.app(judgements, port, "token"), log_level="error", lifespan="off")
        server = uvicorn.Server(config)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
        thread.start()

        def stop():
            server.should_exit = server.force_exit = True
            thread.join()
            file.close()

        running.append(stop)
        journal = tmp_path / "out.journal.jsonl"
        return SimpleNamespace(url=f"http://127.0.0.1:{port}/token", port=port, out=out, journal=journal, stop=stop)

    yield serve
    for stop in running:
        stop()


@pytest.fixture
def visit(browser):
    """Opens the page for an annotator; what its console says is an error of the test."""
    contexts, problems = [], []

    def visit(url, annotator, **options):
        context = browser.new_context(**{"viewport": {"width": 1280, "height": 800}} | options)
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(5000)
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.goto(f"{url}/?annotator={annotator}" if annotator else f"{url}/")
        if annotator:
            expect(page.locator("#count")).to_have_text(re.compile(r"\d+ done"))
        return page

    yield visit
    for context in contexts:
        context.close()
    assert problems == []


def number(page, text):
    """The number under which a response is shown."""
    return page.locator(".card", has_text=text).locator(".chip").get_attribute("data-response")


def press(page, *texts):
    """The keys of these responses (by what they begin with), and other keys as they are."""
    for text in texts:
        page.keyboard.press(text if text in ("=", "Enter", "Backspace") else str(int(number(page, text)) + 1))


def done(page, n):
    expect(page.locator("#count")).to_have_text(re.compile(f"^{n} done"))


def drag(page, source, to, share=0.5):
    """With the mouse, from the middle of one element to a share of the width of another."""
    a, b = source.bounding_box(), to.bounding_box()
    page.mouse.move(a["x"] + a["width"] / 2, a["y"] + a["height"] / 2)
    page.mouse.down()
    page.mouse.move(a["x"] + 20, a["y"] + 30, steps=2)
    page.mouse.move(b["x"] + b["width"] * share, b["y"] + b["height"] / 2, steps=3)
    page.mouse.up()


def strip(page):
    """The ranking as the bar shows it, in letters of the responses: "c > a=b"."""
    letters = [text[0] for text in page.locator(".card .text").all_inner_texts()]
    groups = page.locator(".rank:not(.ghost)").evaluate_all(
        "boxes => boxes.map(box => [...box.querySelectorAll('.chip')].map(chip => Number(chip.dataset.response)))"
    )
    return " > ".join("=".join(letters[i] for i in group) for group in groups)


def test_rank_by_keys_with_ties_taking_back_and_a_name(served, visit):
    s = served(four())
    page = visit(s.url, None)
    page.keyboard.type("ana")
    page.keyboard.press("Enter")
    done(page, 0)
    expect(page.locator(".card")).to_have_count(4)
    page.keyboard.press("Enter")
    expect(page.locator("#say")).to_contain_text("4 responses are not ranked yet")
    press(page, "c 0", "d 0", "Backspace", "a 0", "=", "b 0")
    assert strip(page) == "c > a=b"
    expect(page.locator(".rank.ghost")).to_have_text(str(int(number(page, "d 0")) + 1))
    press(page, "Enter")
    done(page, 1)
    assert [row["ranks"] for row in read(s.out)] == [[2, 2, 1, 3]]
    press(page, "a 1", "b 1", "c 1", "d 1", "=", "Enter")  # = after the last one ties it too
    done(page, 2)
    assert read(s.out)[1]["ranks"] == [1, 2, 3, 3]
    press(page, "a 2", "=", "b 2", "=", "c 2", "=", "Enter")
    expect(page.locator("#over h1")).to_have_text("All done. Thank you.")
    assert read(s.out)[2]["ranks"] == [1, 1, 1, 1]
    page.goto(f"{s.url}/")  # the name is remembered
    expect(page.locator("#who")).to_have_text("ana")


def test_rank_by_drag(served, visit):
    s = served(four())
    page = visit(s.url, "ana")
    card = {letter: page.locator(".card", has_text=f"{letter} 0").locator(".chip") for letter in "abcd"}
    rank = page.locator(".rank")
    drag(page, card["b"], page.locator("#strip"), 0.3)
    drag(page, card["d"], rank.nth(0), 0.95)
    assert strip(page) == "b > d"
    drag(page, card["a"], rank.nth(0), 0.05)
    assert strip(page) == "a > b > d"
    drag(page, page.locator(".rank .chip").nth(2), rank.nth(1), 0.5)
    assert strip(page) == "a > b=d"
    drag(page, card["c"], page.locator(".prompt"))  # dropped nowhere
    assert strip(page) == "a > b=d"
    drag(page, page.locator(".rank .chip").nth(0), rank.nth(1), 0.98)
    assert strip(page) == "b=d > a"
    drag(page, card["c"], rank.nth(0), 0.02)
    assert strip(page) == "c > b=d > a"
    page.get_by_role("button", name="Confirm").click()
    done(page, 1)
    assert read(s.out)[0]["ranks"] == [3, 2, 1, 2]


def test_rank_by_touch_on_a_phone(served, visit):
    rows = four(1) + [{"prompt": "x" * 300, "responses": [CODE, "y" * 400, "a b", HOSTILE, *"12345"]}]
    s = served(rows)
    page = visit(s.url, "ana", viewport={"width": 360, "height": 740}, has_touch=True, is_mobile=True)
    for letter in "dbca":
        page.locator(".card", has_text=f"{letter} 0").locator(".chip").tap()
    assert strip(page) == "d > b > c > a"
    finger = page.context.new_cdp_session(page)
    boxes = [page.locator(".rank").nth(i).bounding_box() for i in (3, 1)]
    start, end = ({"x": box["x"] + box["width"] / 2, "y": box["y"] + box["height"] / 2} for box in boxes)
    for kind, places in (("Start", [start]), ("Move", [{"x": 90, "y": 600}]), ("Move", [end]), ("End", [])):
        finger.send("Input.dispatchTouchEvent", {"type": f"touch{kind}", "touchPoints": places})
    assert strip(page) == "d > b=a > c"
    assert page.locator(".chip").first.evaluate("chip => getComputedStyle(chip).touchAction") == "none"
    page.get_by_role("button", name="Confirm").tap()
    done(page, 1)
    assert read(s.out)[0]["ranks"] == [2, 2, 3, 1]
    expect(page.locator(".card")).to_have_count(9)
    for i in range(9):
        assert page.evaluate("document.documentElement.scrollWidth") == 360
        page.keyboard.press(str(i + 1))
    assert page.locator(".bottom").bounding_box()["height"] < 300


def test_undo_back_forward_skip_flag_and_note_by_keys(served, visit):
    s = served(four(4))
    page = visit(s.url, "ana")
    expect(page.get_by_role("button", name="Undo")).to_be_disabled()
    press(page, "d 0", "c 0", "b 0", "Enter")
    done(page, 1)
    page.keyboard.press("n")
    page.keyboard.type("skipped, s f u b 1")
    page.keyboard.press("Escape")
    page.keyboard.press("s")
    done(page, 2)
    page.keyboard.press("f")
    done(page, 3)
    assert [(e["kind"], e["note"]) for e in read(s.journal)[1:]] == [("skip", "skipped, s f u b 1"), ("flag", "")]
    page.keyboard.press("b")
    expect(page.locator("#title")).to_have_text("Prompt - you flagged it before")
    page.keyboard.press("ArrowLeft")
    expect(page.locator("#title")).to_have_text("Prompt - you skipped it before")
    expect(page.locator("#note")).to_have_value("skipped, s f u b 1")
    page.keyboard.press("b")
    expect(page.locator("#title")).to_have_text("Prompt - you ranked it before")
    assert strip(page) == "d > c > b > a"
    page.keyboard.press("ArrowRight")
    expect(page.locator("#prompt")).to_have_text("prompt 1")
    page.keyboard.press("ArrowRight")
    expect(page.locator("#prompt")).to_have_text("prompt 2")
    page.keyboard.press("ArrowRight")
    expect(page.locator("#prompt")).to_have_text("prompt 3")
    press(page, "b 3", "=", "c 3")
    for i in (2, 1, 0):
        page.keyboard.press("b")
        expect(page.locator("#prompt")).to_have_text(f"prompt {i}")
    press(page, "a 0", "Backspace", "a 0", "Enter")  # out, b back, a in third place: d > c > a > b
    expect(page.locator("#prompt")).to_have_text("prompt 3")
    assert strip(page) == "b=c"  # as it was left
    assert read(s.out)[0]["ranks"] == [3, 4, 2, 1]
    page.keyboard.press("u")
    expect(page.locator("#prompt")).to_have_text("prompt 0")
    assert strip(page) == "d > c > b > a"
    assert read(s.out)[0]["ranks"] == [4, 3, 2, 1]
    page.keyboard.press("ArrowRight")
    expect(page.locator("#prompt")).to_have_text("prompt 1")
    page.keyboard.press("u")  # the flag
    expect(page.locator("#prompt")).to_have_text("prompt 2")
    done(page, 2)
    page.keyboard.press("?")
    expect(page.locator("#help")).to_be_visible()
    page.keyboard.press("s")  # no shortcut while the help is open
    page.keyboard.press("Escape")
    expect(page.locator("#help")).to_be_hidden()
    done(page, 2)


def test_texts_are_shown_and_never_run(served, visit):
    message = [
        {"role": "user", "content": HOSTILE},
        {"role": "assistant", "content": "<b>x</b>"},
        {"role": "user", "content": "y"},
    ]
    s = served([{"prompt": message, "responses": [HOSTILE, CODE, "", "cut"], "ended": [True, True, True, False]}], 2)
    page = visit(s.url, "%3Cimg%20src=x%20onerror=alert(1)%3E")
    expect(page.locator("#who")).to_have_text("<img src=x onerror=alert(1)>")
    page.keyboard.press("n")
    page.keyboard.type(HOSTILE)
    page.keyboard.press("Escape")
    expect(page.locator(".card", has_text="<script>document.title='run'</script><img src=x onerror=")).to_have_count(1)
    assert page.locator(".turn > b").all_inner_texts() == ["user", "assistant", "user"]
    assert page.locator(".turn p").all_inner_texts() == [HOSTILE, "<b>x</b>", "y"]
    assert page.locator("main img, main script, main p b").count() == 0
    assert page.locator("pre").inner_text().startswith("```python\nprint(1)")
    expect(page.locator(".card", has_text="(empty)")).to_have_count(1)
    expect(page.locator(".card", has_text="(cut off at the length limit)").locator("p").first).to_have_text("cut")
    for key in "1234":
        page.keyboard.press(key)
    page.keyboard.press("Enter")
    expect(page.locator("#over")).to_be_visible()
    page.keyboard.press("b")
    expect(page.locator("#note")).to_have_value(HOSTILE)
    assert page.title() == "Rank the responses"


def test_two_annotators_share_a_queue_with_overlap(served, visit):
    s = served(four(3), overlap=2)
    ana, ben = visit(s.url, "ana"), visit(s.url, "ben")
    for i in range(3):
        for page in (ana, ben):
            prompt = page.locator("#prompt").inner_text()[-1]
            press(page, *(f"{letter} {prompt}" for letter in ("abc" if i or page is ana else "bac")), "Enter")
            done(page, i + 1)
    expect(ana.locator("#over")).to_be_visible()
    expect(ben.locator("#over")).to_be_visible()
    rows = read(s.out)
    assert [(row["prompt"], row["annotator"]) for row in rows] == [
        (f"prompt {i}", name) for i in range(3) for name in ("ana", "ben")
    ]
    expect(ben.locator("#agree")).to_contain_text("agreement 94 %")  # 17 of 18 pairs


def test_a_failed_save_keeps_the_judgement_and_does_not_move_on(served, visit):
    s = served(four())
    page = visit(s.url, "ana")
    press(page, "c 0", "a 0", "b 0")
    s.stop()
    page.keyboard.press("Enter")
    expect(page.get_by_role("alert")).to_contain_text("Not saved: the server does not answer. Your judgement is kept")
    assert page.locator("#prompt").inner_text() == "prompt 0" and strip(page).startswith("c > a > b")
    page.keyboard.press("s")  # not while a judgement waits
    assert read(s.out) == []
    again = served(four(), port=s.port)
    page.get_by_role("button", name="Try now").click()
    expect(page.locator("#prompt")).to_have_text("prompt 1")
    expect(page.get_by_role("alert")).to_be_hidden()
    assert [row["ranks"] for row in read(again.out)] == [[2, 3, 1, 4]]
    assert len(read(again.journal)) == 1


@pytest.mark.slow  # starts two processes
def test_the_server_killed_in_the_middle_goes_on_at_the_next_prompt(tmp_path, visit):
    write(tmp_path, four())
    out, found = tmp_path / "out.jsonl", []
    environment = os.environ | {"PYTHONUNBUFFERED": "1"}

    def start(port):
        command = [sys.executable, ROOT / "annotate.py", tmp_path / "samples.jsonl", "--out", out, "--no-open"]
        server = subprocess.Popen([*command, "--port", port], stdout=subprocess.PIPE, text=True, env=environment)
        found.append(server)
        return next(m.groups() for line in server.stdout if (m := re.match(r"(http://127.0.0.1:(\d+)/[^/]+)/", line)))

    def kill():
        found[-1].send_signal(signal.SIGKILL)
        found[-1].wait()
        found[-1].stdout.close()

    try:
        url, port = start("0")
        page = visit(url, "ana")
        press(page, "b 0", "a 0", "c 0", "Enter")
        done(page, 1)
        press(page, "d 1")
        kill()
        assert [row["ranks"] for row in read(out)] == [[2, 1, 3, 4]]
        press(page, "c 1", "b 1", "Enter")  # confirmed while nobody listens
        expect(page.get_by_role("alert")).to_be_visible()
        assert start(port)[0] == url
        done(page, 2)  # the page has tried again by itself
        page.reload()
        done(page, 2)
        expect(page.locator("#prompt")).to_have_text("prompt 2")
        assert [row["ranks"] for row in read(out)] == [[2, 1, 3, 4], [4, 3, 2, 1]]
    finally:
        kill()


def test_another_origin_and_another_host_name_are_refused(served, visit, browser, tmp_path):
    s = served(four())
    page = visit(s.url, "ana")
    assert page.goto(f"http://rebound.localhost:{s.port}/").status == 403  # this machine, but not by a name of ours
    expect(page.locator("body")).to_contain_text("ssh -L")

    (tmp_path / "evil.html").write_text("<title>evil</title>")
    handler = functools.partial(Quiet, directory=tmp_path)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as evil:
        threading.Thread(target=evil.serve_forever, daemon=True).start()
        page.goto(f"http://127.0.0.1:{evil.server_port}/evil.html")
        key = annotate.identity(four()[0])
        body = {"annotator": "eve", "id": "x", "sample": key, "kind": "skip", "seconds": 1, "note": ""}
        answers = page.evaluate(
            """async ([url, body]) => {
                const ask = how => fetch(url, {method: "POST", body, ...how}).then(() => "got", () => "blocked");
                const json = {"Content-Type": "application/json"};
                return [await ask({mode: "no-cors"}), await ask({}), await ask({headers: json})];
            }""",
            [f"{s.url}/api/judge", json.dumps(body)],
        )
        evil.shutdown()
    assert answers == ["blocked"] * 3
    assert s.journal.read_bytes() == b""
    page = visit(s.url, "eve")
    page.evaluate(
        """([url, body]) => fetch(url, {method: "POST", body, headers: {"Content-Type": "application/json"}})""",
        [f"{s.url}/api/judge", json.dumps(body)],
    )
    assert [event["annotator"] for event in read(s.journal)] == ["eve"]  # the same request from the page itself


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_):
        pass


def test_every_control_is_reached_by_keyboard_and_has_a_name(served, visit):
    s = served([{"prompt": "p", "responses": ["long\n" * 200, "short"]}])
    page = visit(s.url, "ana")
    seen = set()
    for _ in range(40):
        page.keyboard.press("Tab")
        seen.add(
            page.evaluate("(e => e.ariaLabel || e.getAttribute('aria-label') || e.textContent)(document.activeElement)")
        )
        outline = page.evaluate("getComputedStyle(document.activeElement).outlineStyle")
        assert outline != "none" or page.evaluate("document.activeElement === document.body")
    names = {"response 1, rank it next", "response 2, rank it next", "text that scrolls", "change your name"}
    assert names <= seen and any(name.startswith("Confirm") for name in seen)
    assert page.locator("button:not(:disabled)").evaluate_all(
        "all => all.every(e => (e.ariaLabel || e.textContent).trim())"
    )
    page.locator(".card .chip").first.focus()
    page.keyboard.press("Enter")  # of the focused control, not of the page
    expect(page.locator(".rank:not(.ghost)")).to_have_count(1)
    assert s.journal.read_bytes() == b""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_has_contrast_in_both_schemes(served, visit, scheme):
    """WCAG 2.1, 1.4.3: at least 4.5 to 1 between text and what is behind it."""
    s = served(four())
    page = visit(s.url, "ana", color_scheme=scheme)
    page.keyboard.press("1")
    page.keyboard.press("2")

    def luminance(color):
        parts = [int(x) / 255 for x in re.findall(r"\d+", color)[:3]]
        linear = [x / 12.92 if x <= 0.04045 else ((x + 0.055) / 1.055) ** 2.4 for x in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    for selector in (
        "#prompt p",
        ".card p",
        ".place",
        "#count",
        "#agree",
        ".rank .chip",
        ".tray .chip",
        "#say",
        ".main",
    ):
        color, behind = (
            page.locator(selector)
            .locator("visible=true")
            .first.evaluate(
                """e => {
                const color = getComputedStyle(e).color;
                while (getComputedStyle(e).backgroundColor === "rgba(0, 0, 0, 0)") e = e.parentElement;
                return [color, getComputedStyle(e).backgroundColor];
            }"""
            )
        )
        low, high = sorted((luminance(color), luminance(behind)))
        assert (high + 0.05) / (low + 0.05) >= 4.5, (selector, color, behind)
