"""A run that is stopped at any moment and continued is the run that was never stopped, bit for bit."""

import fcntl
import hashlib
import json
import math
import multiprocessing
import os
import pickle
import random
import resource
import shutil
import signal
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from tiny import example
from torch.distributed.checkpoint.metadata import BytesStorageMetadata

import train_dpo
import train_ppo
import train_rm
import train_sft
from rlhf import BadInput
from support import models, refcache, report, reviews, runs, sharding
from support.runs import Run

HERE = Path(__file__).parent
STOPPED_AT = 8  # of 12 steps, 3 an epoch: in the middle of the third epoch
SAVED_AT = 5  # the checkpoint before it, in the middle of the second
LOADED_LATE = [  # by transformers, in seconds
    "transformers.models.llama.modeling_llama",
    "transformers.models.auto.tokenization_auto",
    "transformers.generation.utils",
    "accelerate",
]


def write_model(folder: Path, seed: int = 0) -> Path:
    """A Llama of 20 thousand parameters, with the tokenizer of the reviews."""
    tokenizer = reviews.tokenizer()
    small = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "head_dim": 8}
    torch.manual_seed(seed)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**reviews.config(tokenizer).to_dict() | small))
    with torch.no_grad():  # larger weights than at initialisation, so that attention matters
        for weight in model.parameters():
            weight.add_(torch.randn_like(weight) * 0.1)
    models.save(model, tokenizer, folder)
    return folder


def write_rows(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def pairs(n: int, seed: int = 0) -> list[dict]:
    return [row for _, row in reviews.rows("preference", n, seed)]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """The folder of a small model, 22 pairs to train on and 5 held out."""
    folder = tmp_path_factory.mktemp("world")
    write_model(folder / "model")
    write_rows(folder / "train.jsonl", pairs(22))
    write_rows(folder / "held.jsonl", pairs(5, seed=1))
    return folder


def arguments(world: Path, out: Path, name: str, **changes):
    """12 steps of a script, in 4 epochs of 8, 8 and 6 pairs."""
    script, *loss = name.split()
    flags = {"model": f"{world}/model", "data": f"{world}/train.jsonl", "eval_data": f"{world}/held.jsonl"}
    flags |= {"out": str(out), "device": "cpu", "lr": 3e-3, "batch_size": 8, "epochs": 4, "micro_batch_tokens": 200}
    flags |= {"eval_every": 4, "save_every": SAVED_AT, "eval_prompts": 3, "max_new_tokens": 4}
    if script == "sft":
        return train_sft.Args(**flags | changes)
    cache = f"{world}/cache-{loss[0]}"  # rows read from kto's, which has more of them, would differ by rounding
    return train_dpo.Args(**flags | {"loss": loss[0], "ref_cache": cache} | changes)


def train(a) -> None:
    (train_sft if isinstance(a, train_sft.Args) else train_dpo).main(a)


def continued(a) -> None:
    a.resume = True
    train(a)


def flags_of(a) -> list[str]:
    """The command line that gives these arguments."""
    given = {name: value for name, value in vars(a).items() if value not in (None, False)}
    parts = [[f"--{name.replace('_', '-')}", *([] if value is True else [str(value)])] for name, value in given.items()]
    return [part for flag in parts for part in flag]


def contents(out: Path) -> dict:
    """All of a run that a resumed one must have too."""
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return {
        "metrics": [{k: v for k, v in row.items() if not k.startswith("perf/")} for row in rows],
        "samples": (out / "samples.jsonl").read_text(),
        "results": json.loads((out / "results.json").read_text()),
    }


def assert_same(out: Path, straight: Path) -> None:
    assert contents(out) == contents(straight)
    mine, theirs = (load_file(folder / "model.safetensors") for folder in (out, straight))
    assert mine.keys() == theirs.keys() and all(torch.equal(mine[name], theirs[name]) for name in mine)


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """No drawing and no calls of git; and our own signal handlers afterwards."""
    monkeypatch.setattr(report, "curves", lambda out, panels: None)
    monkeypatch.setattr(runs, "environment", dict)
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    yield
    for number, handler in zip((signal.SIGINT, signal.SIGTERM), before, strict=True):
        signal.signal(number, handler)


@pytest.fixture(scope="module")
def straight(world):
    """The folder of the run that was never stopped, by the name of what is trained."""
    done = {}

    def folder(name: str) -> Path:
        if name not in done:
            done[name] = world / name.replace(" ", "-")
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(report, "curves", lambda out, panels: None)
                train(arguments(world, done[name], name))
        return done[name]

    return folder


# ------------------------------------------------------------------------------------------------------------- kills


def stand_still(name: str, flags: list[str], step: int, printed: Path) -> None:
    """In another process: a script that, once the row of `step` is in metrics.jsonl, waits there for a signal."""
    for stream in (1, 2):
        os.dup2(os.open(printed, os.O_CREAT | os.O_WRONLY | os.O_APPEND), stream)
    log = Run.log

    def log_and_wait(self, at, metrics):
        log(self, at, metrics)
        while at == step and not self.interrupted:
            time.sleep(0.005)

    Run.log, report.curves = log_and_wait, lambda out, panels: None
    script = train_sft if name == "sft" else train_dpo
    sys.argv = [script.__file__, *flags]
    runs.cli(script.main, script.Args)


@pytest.fixture(scope="module")
def server():
    """Processes that begin with everything imported; as many threads as here, since sums depend on it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join([str(HERE), str(HERE.parent)]))
        patch.setenv("OMP_NUM_THREADS", str(torch.get_num_threads()))
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload([__name__, *LOADED_LATE])
        yield context


def wait_for(condition, seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.005)


def logged(out: Path, step: int) -> bool:
    path = out / "metrics.jsonl"
    return path.exists() and any(f'"step": {step},' in line for line in path.read_text().splitlines())


@pytest.fixture
def stop(server, tmp_path):
    """Runs a script up to `step`, sends it the signal, and returns its exit code and what it printed."""

    def run(a, number: int, step: int = STOPPED_AT) -> tuple[int, str]:
        name, printed = "sft" if isinstance(a, train_sft.Args) else "dpo", tmp_path / "printed"
        process = server.Process(target=stand_still, args=(name, flags_of(a), step, printed))
        process.start()
        try:
            wait_for(lambda: logged(Path(a.out), step) or not process.is_alive())
            assert process.is_alive(), printed.read_text()
            os.kill(process.pid, number)
            process.join(60)
        finally:
            process.kill()
            process.join()
        return process.exitcode, printed.read_text()

    return run


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL], ids=lambda n: n.name)
@pytest.mark.parametrize("name", ["dpo dpo", pytest.param("dpo bco", marks=pytest.mark.slow), "sft"])
def test_stopped_and_continued_is_the_same_run(name, number, world, straight, stop, tmp_path):
    a = arguments(world, tmp_path / "run", name)
    code, printed = stop(a, number)
    [checkpoint] = (tmp_path / "run" / "checkpoint").iterdir()
    if number == signal.SIGKILL:
        assert code == -number and checkpoint.name == f"step-{SAVED_AT}"  # the later rows have to be cut
    else:
        assert code == {signal.SIGTERM: 143, signal.SIGINT: 130}[number] and checkpoint.name == f"step-{STOPPED_AT}"
        assert f"stopped after step {STOPPED_AT}; the same command with --resume goes on from there" in printed
        assert "Traceback" not in printed and "error" not in printed
    assert not (tmp_path / "run" / "results.json").exists()
    continued(a)
    assert_same(tmp_path / "run", straight(name))


@pytest.mark.parametrize("name", ["dpo kto", pytest.param("dpo plackett_luce", marks=pytest.mark.slow)])
def test_kto_and_rankings_too(name, world, straight, stop, tmp_path):
    a = arguments(world, tmp_path / "run", name)
    stop(a, signal.SIGKILL)
    continued(a)
    assert_same(tmp_path / "run", straight(name))


@pytest.mark.parametrize(
    "flags",
    [
        {"optimizer_state": "8bit"},
        pytest.param({}, marks=pytest.mark.slow),
        pytest.param({"lora_rank": 4, "lora_merge": True}, marks=pytest.mark.slow),
    ],
)
def test_bfloat16_weights_and_their_low_bits_too(flags, world, stop, tmp_path):
    straight, a = (
        arguments(world, tmp_path / name, "dpo dpo", dtype="bfloat16", **flags) for name in ("straight", "run")
    )
    train(straight)
    stop(a, signal.SIGKILL)
    continued(a)
    assert_same(tmp_path / "run", tmp_path / "straight")


def test_bco_has_a_running_mean_to_lose(world, straight, stop, tmp_path, monkeypatch):
    """Were the mean not in the checkpoint, the runs would differ: the test above can fail."""
    a, truth = arguments(world, tmp_path / "run", "dpo bco"), straight("dpo bco")
    stop(a, signal.SIGTERM)
    load = Run.load_checkpoint
    monkeypatch.setattr(Run, "load_checkpoint", lambda self, **parts: load(self, **parts) | {"delta": 0.0})
    continued(a)
    mine, theirs = (load_file(out / "model.safetensors") for out in (tmp_path / "run", truth))
    assert not all(torch.equal(mine[name], theirs[name]) for name in mine)


def test_killed_before_the_first_checkpoint_it_begins_anew(world, straight, stop, tmp_path):
    a = arguments(world, tmp_path / "run", "dpo dpo")
    stop(a, signal.SIGKILL, step=2)
    assert not (tmp_path / "run" / "checkpoint").exists()
    continued(a)
    assert_same(tmp_path / "run", straight("dpo dpo"))


def test_stopped_twice(world, straight, stop, tmp_path):
    a = arguments(world, tmp_path / "run", "dpo dpo")
    stop(a, signal.SIGTERM, step=4)
    a.resume = True
    stop(a, signal.SIGKILL, step=11)
    continued(a)
    assert_same(tmp_path / "run", straight("dpo dpo"))


def test_interrupted_before_training_the_command_can_be_given_again(world, straight, tmp_path, monkeypatch):
    a = arguments(world, tmp_path / "run", "dpo dpo", ref_cache=str(tmp_path / "cache"))

    def stop(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(refcache, "score_logps", stop)
        with pytest.raises(KeyboardInterrupt):
            train(a)
    assert not list((tmp_path / "run").iterdir())
    train(a)
    assert_same(tmp_path / "run", straight("dpo dpo"))


@pytest.mark.parametrize(
    "where, name",
    [
        ("save", "dpo dpo"),
        ("save", "dpo bco"),
        ("save", "dpo kto"),
        ("save", "sft"),
        ("finish", "dpo dpo"),
        ("finish", "sft"),
    ],
)
def test_killed_after_the_last_step(name, where, world, straight, tmp_path, monkeypatch):
    """While the answers are sampled and the model is written. The last evaluation, made again, has bco's last delta and
    kto's z0 of the held-out prompts."""
    a = arguments(world, tmp_path / "run", name)

    def stop(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(*((models, "save") if where == "save" else (Run, "finish")), stop)
        with pytest.raises(KeyboardInterrupt):
            train(a)
    assert [folder.name for folder in (tmp_path / "run" / "checkpoint").iterdir()] == ["step-12"]
    continued(a)
    assert_same(tmp_path / "run", straight(name))


def one_line(main, capfd, code: int) -> str:
    """The last line of what a script's command line says on stderr as it ends with this code."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runs.tyro, "cli", lambda *_, **__: None)
        patch.setattr(sys, "argv", ["script"])
        main.__module__ = __name__
        with pytest.raises(SystemExit) as end:
            runs.cli(main, train_sft.Args)
    lines = capfd.readouterr().err.splitlines()
    assert end.value.code == code and not any("Traceback" in line for line in lines)
    return lines[-1]


@pytest.mark.parametrize("name", ["sft", "dpo", "rm", "ppo"])
def test_a_closed_pipe_at_the_end_leaves_the_whole_run(name, begun, capfd):
    """Whatever prints after the last step, the first such line or another."""
    go_on, out = begun(name), None

    def closed(*_, **__):
        raise BrokenPipeError(32, "Broken pipe")

    def main(_):
        nonlocal out
        with pytest.MonkeyPatch.context() as patch:
            end = Run.end_loop

            def last_step(self):
                nonlocal out
                out = self.out
                end(self)
                patch.setitem(vars(sys.modules["builtins"]), "print", closed)

            patch.setattr(Run, "end_loop", last_step)
            patch.setattr(os, "dup2", lambda *_: None)
            go_on()

    assert one_line(main, capfd, 1) == "error: nobody reads the output any more"
    assert (out / "results.json").exists()
    assert load_file(out / "model.safetensors") and (out / "samples.jsonl").exists()


@pytest.mark.parametrize("name", ["sft", "dpo", "rm", "ppo"])
def test_a_disk_that_is_full_at_the_end(name, begun, capfd):
    """The checkpoint of the last step stays, and so the same command with --resume ends as it should have."""
    go_on, limit, end = begun(name), resource.getrlimit(resource.RLIMIT_FSIZE), Run.end_loop

    def main(_):
        def last_step(self):
            end(self)
            resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, limit[1]))  # bytes; the model has 90,000

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Run, "end_loop", last_step)
            try:
                go_on()
            finally:
                resource.setrlimit(resource.RLIMIT_FSIZE, limit)

    line = one_line(main, capfd, 1)
    [out] = [Path(x) for x in runs.LOCKS]
    assert line.startswith("error: the model cannot be written to ") and "File too large" in line
    assert line.endswith(f"; continue with --resume, from {out}/checkpoint/step-2")
    go_on()
    assert (out / "results.json").exists() and load_file(out / "model.safetensors")


def test_interrupted_it_says_how_to_go_on(begun, capfd, monkeypatch, tmp_path):
    def stop(*_):
        raise KeyboardInterrupt

    go_on = begun("sft")
    with monkeypatch.context() as patch:
        patch.setattr(models, "load_model", stop)
        line = one_line(lambda _: go_on(), capfd, 130)
        assert line == f"stopped; continue with --resume, from {tmp_path}/run/checkpoint/step-1"
        shutil.rmtree(tmp_path / "run" / "checkpoint")
        line = one_line(lambda _: go_on(), capfd, 130)
        assert line == "stopped; continue with --resume, from the first step"
        (tmp_path / "run" / "metrics.jsonl").unlink()
        line = one_line(lambda _: go_on(), capfd, 130)
        assert line == "stopped; before the first step, so the same command begins anew"
    runs.unlock(tmp_path / "run")
    assert one_line(stop, capfd, 130) == "stopped"


DAMAGES = {  # of a file, each with what is said of it
    "not JSON": (lambda data: b"{" + data, "Expecting property name"),
    "a list": (lambda _: b"[]\n", "not a JSON object"),
    "half a letter": (lambda data: data.replace(b": ", b": \xff", 1), "can't decode byte 0xff"),
    "NUL": (lambda data: data.replace(b"1", b"\0", 1), ""),
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("file", ["args.json", "metrics.jsonl", "environment.json"])
def test_a_damaged_file_of_a_run_is_named_and_nothing_changes(file, damage, begun, tmp_path):
    go_on, (change, reason) = begun("sft"), DAMAGES[damage]
    path = tmp_path / "run" / file
    whole = path.read_bytes()
    path.write_bytes(change(whole))
    before = snapshot(tmp_path / "run" / "checkpoint")
    with pytest.raises(BadInput) as error:
        go_on()
    where = f"{path}:1" if file == "metrics.jsonl" else str(path)
    assert str(error.value).startswith(f"{where} is damaged (") and reason in str(error.value)
    assert "\n" not in str(error.value) and snapshot(tmp_path / "run" / "checkpoint") == before
    path.write_bytes(whole)
    go_on()
    assert (tmp_path / "run" / "results.json").exists()


@pytest.mark.parametrize("content", [[1, 2], {"model": {}}, {"step": 1}, {"step": 1, "model": {}, "optimizer": {}}])
def test_a_checkpoint_of_something_else(content, begun, tmp_path):
    go_on, path = begun("sft"), tmp_path / "run" / "checkpoint" / "step-1" / "state.pt"
    path.with_name("SHA256SUMS").unlink()
    torch.save(content, path)
    with pytest.raises(BadInput) as error:
        go_on()
    assert str(error.value).startswith("--resume: ") and "checkpoint" in str(error.value)
    assert "\n" not in str(error.value) and path.exists()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["dpo dpo", "dpo bco", "dpo kto", "sft"])
def test_killed_at_random_moments(name, world, straight, server, tmp_path):
    """Ten times `kill -9`, also while a checkpoint is written, until it is allowed to finish."""
    rng = random.Random(name)
    a = arguments(world, tmp_path / "run", name, save_every=1)
    for _ in range(10):
        a.resume = (tmp_path / "run" / "args.json").exists()
        process = server.Process(target=stand_still, args=(name.split()[0], flags_of(a), 13, tmp_path / "printed"))
        before = time.monotonic()
        process.start()
        wait_for(lambda: (tmp_path / "run" / "metrics.jsonl").exists() or time.monotonic() > before + 2)  # noqa: B023
        process.join(rng.uniform(0, 0.2))
        process.kill()
        process.join()
        if (tmp_path / "run" / "results.json").exists():
            break
    if not (tmp_path / "run" / "results.json").exists():
        continued(a) if (tmp_path / "run" / "args.json").exists() else train(a)
    assert_same(tmp_path / "run", straight(name))


def test_without_its_cache_the_reference_is_scored_by_the_starting_weights(world, straight, stop, tmp_path, capsys):
    a = arguments(world, tmp_path / "run", "dpo dpo", ref_cache=str(tmp_path / "cache"))
    stop(a, signal.SIGTERM)
    shutil.rmtree(tmp_path / "cache")
    continued(a)
    assert "reference log-probs: from" not in capsys.readouterr().out and list((tmp_path / "cache").iterdir())
    assert_same(tmp_path / "run", straight("dpo dpo"))


# ----------------------------------------------------------------------------------------------------------- refusals


def snapshot(folder: Path) -> dict:
    return {
        str(path): (path.stat().st_mtime_ns, path.read_bytes() if path.is_file() else None)
        for path in [folder, *folder.rglob("*")]
    }


@pytest.fixture(scope="module")
def halfway(world):
    """The folder of a run whose last checkpoint is that of step 5."""
    a = arguments(world, world / "halfway", "dpo dpo")
    with pytest.MonkeyPatch.context() as patch:

        def log(self, step, metrics, log=Run.log):
            if step == STOPPED_AT:
                raise KeyboardInterrupt
            log(self, step, metrics)

        patch.setattr(Run, "log", log)
        with pytest.raises(KeyboardInterrupt):
            train(a)
    return world / "halfway"


def test_resume_refuses_other_flags(world, halfway):
    before = snapshot(halfway)
    a = arguments(world, halfway, "dpo dpo", lr=4e-3, seed=1, warmup=0.2, resume=True)
    with pytest.raises(BadInput) as error:
        train(a)
    message = str(error.value)
    assert all(change in message for change in ("--lr 0.003 -> 0.004", "--seed 0 -> 1", "--warmup 0.1 -> 0.2"))
    assert "--beta" not in message and "--resume ->" not in message and "\n" not in message
    assert snapshot(halfway) == before


def test_resume_may_save_more_often(world, halfway, straight, tmp_path):
    shutil.copytree(halfway, tmp_path / "run")
    flags = json.loads((tmp_path / "run" / "args.json").read_text()) | {"out": str(tmp_path / "run")}
    (tmp_path / "run" / "args.json").write_text(json.dumps(flags))
    continued(arguments(world, tmp_path / "run", "dpo dpo", save_every=2))
    assert_same(tmp_path / "run", straight("dpo dpo"))


@pytest.mark.parametrize("name", ["dpo dpo", "sft"])
def test_a_complete_run_is_refused(name, world, straight):
    out = straight(name)
    before = snapshot(out)
    with pytest.raises(BadInput, match="is complete"):
        continued(arguments(world, out, name))
    with pytest.raises(BadInput, match="already holds a run, which is complete: name another, or delete it"):
        train(arguments(world, out, name))
    assert snapshot(out) == before


@pytest.mark.parametrize("name", ["dpo dpo", "dpo bco", "sft"])
@pytest.mark.parametrize("first", [{"max_steps": 5}, {"epochs": 2}])
def test_a_finished_run_is_extended(name, first, world, straight, tmp_path, capsys):
    """At a constant learning rate it is the run of 12 steps bit for bit; nothing of the shorter run is lost."""
    constant = {"schedule": "constant", "warmup": 0.0}
    train(arguments(world, tmp_path / "straight", name, **constant))
    a = arguments(world, tmp_path / "run", name, **constant, **first)
    train(a)
    done = first.get("max_steps", 6)
    before = contents(tmp_path / "run")
    for flags in (first, {"max_steps": 4}, {"max_steps": done}):
        with pytest.raises(BadInput, match="a larger --max-steps or --epochs extends it|raise --(max-steps|epochs)"):
            continued(arguments(world, tmp_path / "run", name, **constant, **first | flags))
    if "epochs" in first:  # which --max-steps alone does not extend
        with pytest.raises(BadInput, match="has 6 steps, .* ask for 6; the last epoch ends there: raise --epochs"):
            continued(arguments(world, tmp_path / "run", name, **constant, epochs=2, max_steps=100))
    assert contents(tmp_path / "run") == before
    capsys.readouterr()
    continued(arguments(world, tmp_path / "run", name, **constant))
    said = capsys.readouterr().out
    assert f"--resume: now 12 steps in all. From step {done + 1} on the learning rate is that of a run of 12" in said
    mine, theirs = (load_file(tmp_path / x / "model.safetensors") for x in ("run", "straight"))
    assert all(torch.equal(mine[key], theirs[key]) for key in theirs)
    after, want = contents(tmp_path / "run"), contents(tmp_path / "straight")
    assert after["results"] == want["results"] and after["samples"] == before["samples"] + want["samples"]
    trained = lambda rows: [row for row in rows if "loss" in row]  # noqa: E731
    assert trained(after["metrics"]) == trained(want["metrics"])
    assert json.loads((tmp_path / "run" / f"results-{done}.json").read_text()) == before["results"]
    flags = json.loads((tmp_path / "run" / "args.json").read_text())
    assert (flags["max_steps"], flags["epochs"]) == (None, 4)


def test_extended_the_learning_rate_is_that_of_the_longer_run(world, straight, tmp_path, capsys):
    train(arguments(world, tmp_path / "run", "sft", max_steps=6))
    a = arguments(world, tmp_path / "run", "sft")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Run, "log", lambda *_: exec("raise KeyboardInterrupt"))
        with pytest.raises(KeyboardInterrupt):
            continued(a)
    rate = 3e-3 * 0.5 * (1 + math.cos(math.pi * (6 - 2) / (12 - 2)))
    assert f"is that of a run of 12 steps, {rate:.3g} first (cosine)" in capsys.readouterr().out
    continued(a)  # it was stopped, and goes on with the flags that it has now
    rows = [row for row in contents(tmp_path / "run")["metrics"] if "lr" in row]
    whole = [row["lr"] for row in contents(straight("sft"))["metrics"] if "lr" in row]
    assert [row["lr"] for row in rows[6:]] == whole[6:] and rows[5]["lr"] < rows[6]["lr"]


def test_a_finished_run_without_its_checkpoint_is_not_extended(world, straight, tmp_path):
    shutil.copytree(straight("sft"), tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoint")
    a = arguments(world, tmp_path / "run", "sft", epochs=8)
    a_flags = json.loads((tmp_path / "run" / "args.json").read_text()) | {"out": a.out}
    (tmp_path / "run" / "args.json").write_text(json.dumps(a_flags))
    with pytest.raises(BadInput, match="is complete; it has no checkpoint to extend it from: name another --out"):
        continued(a)


def test_a_used_folder_is_refused(world, halfway, tmp_path):
    before = snapshot(halfway)
    with pytest.raises(BadInput, match="already holds a run: continue it with --resume, or name another --out"):
        train(arguments(world, halfway, "dpo dpo"))
    assert snapshot(halfway) == before

    model = write_model(tmp_path / "model")  # no run, but something that must not be overwritten
    before = snapshot(model)
    for a in (arguments(world, model, "dpo dpo"), arguments(world, model, "sft")):
        with pytest.raises(BadInput, match="already holds a model"):
            train(a)
    assert snapshot(model) == before


@pytest.mark.parametrize("name", ["dpo dpo", "sft"])
def test_a_run_that_failed_in_its_first_step_is_begun_anew(name, world, straight, tmp_path, monkeypatch, capsys):
    """The metrics of step 0 are there. Other flags may be the remedy, so they may differ."""
    out = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(Run, "require_finite", lambda *_: exec("raise FloatingPointError('inf')"))
        with pytest.raises(FloatingPointError):
            train(arguments(world, out, name, lr=9.0))
    assert logged(out, 0) and not logged(out, 1)
    runs.unlock(out)
    train(arguments(world, out, name))
    assert f"--out {out}: the run there ended before its first step, and is begun anew" in capsys.readouterr().out
    assert_same(out, straight(name))
    assert json.loads((out / "args.json").read_text())["lr"] == 3e-3


@pytest.mark.parametrize("sign", ["metrics.jsonl", "checkpoint/step-1/state.pt", "config.json", "results.json"])
def test_a_run_with_any_result_is_not_begun_anew(sign, world, tmp_path):
    (tmp_path / sign).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / "args.json").write_text("{}")
    (tmp_path / sign).write_text('{"step": 1}\n')
    before = snapshot(tmp_path)
    with pytest.raises(BadInput, match="already holds a run"):
        train(arguments(world, tmp_path, "dpo dpo"))
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize("name", ["dpo dpo", "sft"])
def test_nothing_to_continue(name, world, tmp_path):
    with pytest.raises(BadInput, match="holds no run to continue"):
        continued(arguments(world, tmp_path / "none", name))
    assert not (tmp_path / "none").exists()


# --------------------------------------------------------------------------------- other data or weights under a name


SCRIPTS = {"sft": train_sft, "dpo": train_dpo, "rm": train_rm, "ppo": train_ppo}


@pytest.fixture
def begun(tmp_path, monkeypatch):
    """Begins a script's run on files of its own, ends it after the first of two steps, and gives what continues it."""

    def begin(name: str):
        for i, part in enumerate(("model", "ref")):
            write_model(tmp_path / part, seed=i)
        write_rows(tmp_path / "train.jsonl", pairs(12))
        write_rows(tmp_path / "held.jsonl", pairs(5, seed=1))
        tokenizer = reviews.tokenizer()
        reward = models.new_reward_model(models.load_model(str(tmp_path / "ref"), "cpu"), tokenizer)
        reward.config.reward_mean, reward.config.reward_std = 0.0, 1.0
        models.save(reward, tokenizer, tmp_path / "reward")
        flags = {"model": f"{tmp_path}/model", "data": f"{tmp_path}/train.jsonl", "out": f"{tmp_path}/run"}
        flags |= {"device": "cpu", "lr": 1e-3, "batch_size": 4, "max_steps": 2, "save_every": 1, "eval_prompts": 0}
        if name == "ppo":
            flags |= {"reward": f"{tmp_path}/reward", "ref": f"{tmp_path}/ref", "k": 2, "max_new_tokens": 3}
            flags |= {"batch_size": 2, "epochs_per_rollout": 1, "minibatches": 1}
            flags |= {"ptx_coef": 0.1, "ptx_data": f"{tmp_path}/held.jsonl", "eval_fraction": 0.3}
        else:
            flags["eval_data"] = f"{tmp_path}/held.jsonl"
        if name == "dpo":
            flags |= {"ref": f"{tmp_path}/ref", "ref_cache": f"{tmp_path}/cache"}

        def progress(self, step, **shown):
            if step == 2:
                raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(Run, "progress", progress)
            with pytest.raises(KeyboardInterrupt):
                SCRIPTS[name].main(SCRIPTS[name].Args(**flags))
        return lambda: SCRIPTS[name].main(SCRIPTS[name].Args(**flags, resume=True))

    return begin


def other_rows(path: Path) -> None:
    """One word of the last row becomes another."""
    *rows, last = map(json.loads, path.read_text().splitlines())
    last["chosen"] = last["chosen"].replace(last["chosen"].split()[0], "dull", 1)
    write_rows(path, [*rows, last])


def other_weights(folder: Path) -> None:
    """One number of one weight becomes another."""
    weights = load_file(folder / "model.safetensors")
    weights["model.norm.weight"][3] += 1e-3
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def other_score(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    save_file(
        weights | {"score.weight": -weights["score.weight"]}, folder / "model.safetensors", metadata={"format": "pt"}
    )


CHANGES = {  # of a script's files, each with the flag that is named
    "sft": [("train.jsonl", other_rows, "--data"), ("held.jsonl", other_rows, "--eval-data")],
    "rm": [("train.jsonl", other_rows, "--data"), ("model", other_weights, "--model")],
    "dpo": [
        ("train.jsonl", other_rows, "--data"),
        ("held.jsonl", other_rows, "--eval-data"),
        ("model", other_weights, "--model"),
        ("ref", other_weights, "--ref"),
    ],
    "ppo": [
        ("train.jsonl", lambda path: write_rows(path, pairs(13)[1:]), "--data"),
        ("held.jsonl", other_rows, "--ptx-data"),
        ("model", other_weights, "--model"),
        ("ref", other_weights, "--ref"),
        ("reward", other_score, "--reward"),
    ],
}


@pytest.mark.parametrize("name", CHANGES)
def test_other_contents_under_the_same_name_are_refused(name, begun, tmp_path):
    go_on = begun(name)
    read = lambda folder: {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}  # noqa: E731
    before, files = read(tmp_path / "run"), read(tmp_path)
    for file, change, flag in CHANGES[name]:
        change(tmp_path / file)
        with pytest.raises(BadInput) as error:
            go_on()
        message = f"--resume: {tmp_path}/run began with other contents of {flag}: bring back what was there"
        assert str(error.value).startswith(message) and read(tmp_path / "run") == before
        for path, data in files.items():
            path.write_bytes(data)


@pytest.mark.parametrize(
    "name", ["sft", "dpo", *(pytest.param(name, marks=pytest.mark.slow) for name in ("rm", "ppo"))]
)
def test_the_same_contents_go_on_and_an_older_run_says_that_it_is_not_checked(name, begun, tmp_path, capsys):
    go_on = begun(name)
    shutil.copytree(tmp_path / "run", tmp_path / "same")
    capsys.readouterr()
    go_on()
    assert "not checked" not in capsys.readouterr().out
    shutil.rmtree(tmp_path / "run")
    shutil.copytree(tmp_path / "same", tmp_path / "run")
    (tmp_path / "run" / "environment.json").write_text('{"torch": "2.13.0"}')  # as runs were before
    other_weights(tmp_path / "model")
    go_on()
    flags = {"sft": ["data, --eval-data, --model"], "dpo": ["data, --eval-data, --model", "ref"]}
    flags |= {"rm": flags["sft"], "ppo": ["data, --ptx-data, --model", "ref, --reward"]}
    said = [line for line in capsys.readouterr().out.splitlines() if "not checked" in line]
    end = f"is what {tmp_path}/run began with: it has no digests"
    assert said == [f"--resume: not checked whether --{part} {end}" for part in flags[name]]
    assert (tmp_path / "run" / "results.json").exists()


def test_what_else_counts_of_the_rows():
    base = example([1, 2], [[3], [4, 5]])
    changes = [{"ranks": [2, 1]}, {"labels": [True, False]}, {"trained": [[True], [True, False]]}, {"margin": 0.5}]
    changes += [{"probability": 0.9}, {"row": {"answer": 7}}, {"rewards": [0.0, 1.0]}, {"noise": 0.5}]
    others = [example([1, 2], [[3], [4, 5]], **change) for change in changes]
    others += [example([1, 2, 3], [[], [4, 5]]), example([1], [[2, 3], [4, 5]])]
    assert len({runs.rows_digest([e]) for e in [base, *others]}) == 11
    assert runs.rows_digest([base, others[0]]) != runs.rows_digest([others[0], base])
    assert runs.rows_digest([replace(base, where="elsewhere:2")]) == runs.rows_digest([base])


# ----------------------------------------------------------------------------------------------------- two runs at once


def hold(folder: Path) -> None:
    runs.lock(folder)
    (folder / "held").touch()
    time.sleep(60)


def test_a_directory_is_of_one_run_at_a_time(server, halfway, tmp_path):
    """The lock of a process that is killed ends with it; one process may begin again after an error."""
    out = tmp_path / "run"
    shutil.copytree(halfway, out)
    flags = json.loads((out / "args.json").read_text()) | {"out": str(out)}
    (out / "args.json").write_text(json.dumps(flags))
    a = train_dpo.Args(**flags | {"resume": True})
    other = server.Process(target=hold, args=(out,))
    other.start()
    wait_for(lambda: (out / "held").exists() or not other.is_alive())
    with pytest.raises(BadInput) as error:
        Run(a, train_dpo.__file__)
    assert str(error.value) == f"--out {out} is in use by another run: wait for its end, or name another --out"
    other.kill()
    other.join()
    Run(a, train_dpo.__file__)
    Run(a, train_dpo.__file__)
    with pytest.raises(BlockingIOError):
        fcntl.flock(os.open(out, os.O_RDONLY), fcntl.LOCK_EX | fcntl.LOCK_NB)
    runs.unlock(out)
    fcntl.flock(os.open(out, os.O_RDONLY), fcntl.LOCK_EX | fcntl.LOCK_NB)


def test_a_finished_run_is_not_locked(straight):
    fcntl.flock(os.open(straight("sft"), os.O_RDONLY), fcntl.LOCK_EX | fcntl.LOCK_NB)


def test_a_file_system_without_locks_is_said(tmp_path, monkeypatch, capsys):
    def flock(*_):
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", flock)
    runs.lock(tmp_path)
    line = f"--out {tmp_path}: its file system has no locks (Function not implemented): start no second run there\n"
    assert capsys.readouterr().out == line and not runs.LOCKS.get(tmp_path)


# -------------------------------------------------------------------------------------------- checkpoints and log files


@pytest.fixture
def run(world, tmp_path):
    a = arguments(world, tmp_path / "run", "dpo dpo")
    return Run(a, train_dpo.__file__)


def state(step: int) -> dict:
    return {"model": {"weight": torch.full((50,), float(step))}, "step": step, "delta": 0.25}


def test_checkpoints_one_at_a_time(run):
    assert run.load_checkpoint() is None
    for step in (5, 10):
        run.save_checkpoint(step, state(step))
        assert [folder.name for folder in (run.out / "checkpoint").iterdir()] == [f"step-{step}"]
        found = run.load_checkpoint()
        assert found["step"] == step and torch.equal(found["model"]["weight"], torch.full((50,), float(step)))


@pytest.mark.parametrize(
    "failure", [OSError(28, "No space left on device"), RuntimeError("PytorchStreamWriter failed")]
)
def test_a_checkpoint_that_cannot_be_written_leaves_the_one_before(run, failure, monkeypatch):
    run.save_checkpoint(5, state(5))

    def half(_, file):
        file.write(b"PK half of it")
        raise failure

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", half)
        with pytest.raises(OSError) as error:
            run.save_checkpoint(10, state(10))
    message = str(error.value)
    assert message == f"no checkpoint of step 10 in {run.out}/checkpoint ({failure})"
    assert [folder.name for folder in (run.out / "checkpoint").iterdir()] == ["step-5"]
    assert run.load_checkpoint()["step"] == 5
    run.save_checkpoint(10, state(10))
    assert run.load_checkpoint()["step"] == 10


def test_a_full_disk_stops_the_run_and_it_can_go_on(world, straight, tmp_path, monkeypatch):
    a, save = arguments(world, tmp_path / "run", "dpo dpo"), torch.save

    def full(content, file):
        if content["step"] == 2 * SAVED_AT:
            raise OSError(28, "No space left on device")
        save(content, file)

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", full)
        with pytest.raises(OSError, match="No space left on device"):
            train(a)
    continued(a)
    assert_same(tmp_path / "run", straight("dpo dpo"))


def test_half_a_checkpoint_is_never_loaded(run):
    run.save_checkpoint(5, state(5))
    partial = run.out / "checkpoint" / "step-10.partial"
    partial.mkdir()
    (partial / "state.pt").write_bytes(b"PK half of it")
    assert run.load_checkpoint()["step"] == 5
    run.save_checkpoint(10, state(10))  # over what is left of it
    assert [folder.name for folder in (run.out / "checkpoint").iterdir()] == ["step-10"]


def test_the_newest_of_two_checkpoints(run):
    """Killed between writing one and dropping the other; by number, not by name."""
    run.save_checkpoint(5, state(5))
    shutil.copytree(run.out / "checkpoint" / "step-5", run.out / "kept")
    run.save_checkpoint(10, state(10))
    (run.out / "kept").rename(run.out / "checkpoint" / "step-5")
    assert run.load_checkpoint()["step"] == 10


def test_no_checkpoint_is_unpickled(run):
    class Code:
        def __reduce__(self):
            return print, ("run",)

    (run.out / "checkpoint" / "step-5").mkdir(parents=True)
    torch.save({"step": Code()}, run.out / "checkpoint" / "step-5" / "state.pt")
    with pytest.raises(Exception, match="Weights only load failed"):
        run.load_checkpoint()


@pytest.fixture
def shared(run):
    """The run with a checkpoint in the form that several processes write, and the parts that are in it."""
    torch.manual_seed(0)
    parts = {"model": torch.nn.Linear(3, 2).to(torch.bfloat16)}
    parts["optimizer"] = torch.optim.AdamW(parts["model"].parameters())
    parts["model"](torch.ones(3, dtype=torch.bfloat16)).sum().backward()
    parts["optimizer"].step()
    folder = run.out / "checkpoint" / "step-5"
    state = {name: part.state_dict() for name, part in parts.items()}
    sharding.save_checkpoint(folder, state | {"step": 5, "delta": 0.1})
    return run, folder / ".metadata", parts


def test_what_several_processes_wrote_is_read(shared):
    run, _, parts = shared
    found = run.load_checkpoint(**parts)
    assert found["step"] == 5 and found["delta"] == 0.1
    for name, x in parts["model"].state_dict().items():
        assert torch.equal(found["model"][name], x) and x.dtype == torch.bfloat16
    for i, fields in parts["optimizer"].state_dict()["state"].items():
        assert all(torch.equal(found["optimizer"]["state"][i][name], x) for name, x in fields.items())


@pytest.mark.parametrize("place", ["instead", "inside", "below", "after"])
def test_the_metadata_of_several_processes_is_not_executed(place, shared, tmp_path):
    class Code:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "made"),)

    run, path, parts = shared
    metadata = pickle.loads(path.read_bytes())
    contents = {"instead": Code(), "inside": metadata, "below": metadata, "after": [metadata, Code()]}[place]
    if place == "inside":
        metadata.planner_data = Code()
    if place == "below":
        metadata.state_dict_metadata["model/weight"] = Code()
    path.write_bytes(pickle.dumps(contents))
    with pytest.raises(BadInput) as error:
        run.load_checkpoint(**parts)
    assert not (tmp_path / "made").exists()
    asks = "it asks for posix.mkdir"
    assert str(error.value) == f"--resume: {path} is no checkpoint's metadata, and is not loaded: {asks}"
    pickle.loads(path.read_bytes())
    assert (tmp_path / "made").exists()  # Python's own reader does run it


@pytest.mark.parametrize(
    "contents, reason",
    [
        (b"", "EOFError()"),
        (b"no pickle", "KeyError(110)"),
        (pickle.dumps({"step": 5}), "it holds a dict"),
        (pickle.dumps(os.getcwd), "it asks for posix.getcwd"),
        (b"ctorch\nserialization.pickle\n.", "it asks for torch.serialization.pickle"),  # a dotted name is a path
        (b"ctorch\nload\n.", "it asks for torch.load"),
        (b"cpathlib\nPosixPath\nN}X\x07\x00\x00\x00iterdirctorch\nSize\ns\x86b.", "it changes PosixPath"),
        (b"ctorch.serialization\n_get_layout\n}X\x05\x00\x00\x00cache}sb.", "it changes _get_layout"),
        (pickle.dumps(BytesStorageMetadata()), "asks for torch.distributed.checkpoint.metadata.BytesStorageMetadata"),
    ],
)
def test_metadata_that_is_something_else(contents, reason, shared):
    run, path, parts = shared
    path.write_bytes(contents)
    with pytest.raises(BadInput) as error:
        run.load_checkpoint(**parts)
    assert str(path) in str(error.value) and reason in str(error.value) and "\n" not in str(error.value)


def flip(path: Path) -> None:
    """One bit in the middle of a file becomes another."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("damage", [flip, Path.unlink, lambda path: path.write_bytes(path.read_bytes()[:100])])
def test_a_damaged_checkpoint_is_refused_by_name(damage, run):
    run.save_checkpoint(5, state(5))
    path = run.out / "checkpoint" / "step-5" / "state.pt"
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    assert (path.parent / "SHA256SUMS").read_text() == f"{digest}  state.pt\n"
    damage(path)
    with pytest.raises(BadInput) as error:
        run.load_checkpoint()
    assert f"--resume: {path} is damaged or missing" in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("sums", ["", "garbage", "e3b0c442  state.pt\n", "\n\n", "e3b0c442  a\0b\n"])
def test_damaged_checksums(sums, run):
    run.save_checkpoint(5, state(5))
    (run.out / "checkpoint" / "step-5" / "SHA256SUMS").write_text(sums)
    with pytest.raises(BadInput, match="damaged or missing"):
        run.load_checkpoint()


def test_checkpoints_of_before_have_no_checksums(run):
    run.save_checkpoint(5, state(5))
    folder = run.out / "checkpoint" / "step-5"
    (folder / "SHA256SUMS").unlink()
    assert run.load_checkpoint()["step"] == 5
    (folder / "state.pt").write_bytes((folder / "state.pt").read_bytes()[:300])
    with pytest.raises(BadInput, match="state.pt is no checkpoint: "):
        run.load_checkpoint()
    (folder / "state.pt").unlink()  # and it does not begin anew as if there had been none
    with pytest.raises(BadInput, match="state.pt is damaged or missing"):
        run.load_checkpoint()


def test_a_damaged_checkpoint_of_several_is_refused_by_name(shared):
    run, metadata, parts = shared
    shards = metadata.with_name("__0_0.distcp")
    lines = [f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {path.name}\n" for path in (metadata, shards)]
    metadata.with_name("SHA256SUMS").write_text("".join(lines))
    assert run.load_checkpoint(**parts)["step"] == 5
    flip(shards)
    with pytest.raises(BadInput, match=f"--resume: {shards} is damaged or missing"):
        run.load_checkpoint(**parts)
    metadata.with_name("SHA256SUMS").unlink()
    shards.write_bytes(b"")
    with pytest.raises(BadInput, match=f"--resume: {metadata.parent} is damaged: "):
        run.load_checkpoint(**parts)


@pytest.mark.parametrize("half", ["", '{"step": 6, "lo', '{"step": 6, "loss": 1.5}'])
def test_rows_after_the_checkpoint_are_cut(run, half):
    """A line without its end counts as not written, even where it happens to be whole."""
    text = "a line\u2028 that\x85 does not end"
    sample = json.dumps({"step": 5, "prompt": text}, ensure_ascii=False) + "\n"
    rows = [{"step": step, "loss": step / 7} for step in (0, 1, 2, 3, 4, 4, 5, 5, 6, 7)]
    (run.out / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + half, "utf-8")
    (run.out / "samples.jsonl").write_text(sample + json.dumps({"step": 6, "prompt": text}) + "\n" + half, "utf-8")
    run.begin_loop(5, 12)
    assert [json.loads(line) for line in (run.out / "metrics.jsonl").read_text("utf-8").split("\n")[:-1]] == rows[:8]
    assert (run.out / "samples.jsonl").read_text("utf-8") == sample
    run.log(6, {"loss": 0.5})
    assert json.loads((run.out / "metrics.jsonl").read_text("utf-8").split("\n")[-2]) == {"step": 6, "loss": 0.5}


def test_a_half_written_line_does_not_stop_a_resume(world, straight, stop, tmp_path):
    a = arguments(world, tmp_path / "run", "sft")
    stop(a, signal.SIGTERM)
    with open(tmp_path / "run" / "metrics.jsonl", "a") as f:
        f.write('{"step": 9, "loss": 4.')
    continued(a)
    assert_same(tmp_path / "run", straight("sft"))
