"""benchmarks/gpu.py without a GPU: every part runs with tiny shapes, and a failure costs one case."""

import csv
import json
import math
import os
import signal
import sys
import time
import warnings

import pytest
import torch
import transformers

from benchmarks import compare, fits, gpu, shapes, watch, wheels

STEP = {"model": "tiny", "rows": "hh", "side": "ours", "pairs": 2, "steps": 1}


@pytest.fixture
def jobs(tmp_path):
    """Run cases of a part as a process of `run_part` would, and return their rows."""

    def run(part: str, *cases: dict) -> list[dict]:
        job, rows = tmp_path / "job.json", tmp_path / "rows.jsonl"
        job.write_text(json.dumps({"part": part, "device": "cpu", "cases": cases}))
        gpu.work(str(job), str(rows))
        return [json.loads(line) for line in rows.read_text().splitlines()]

    gpu.FIRST_LOGPS.clear()
    return run


def test_six_minutes_three_when_quick_and_ours_alone():
    """10 seconds are left for the process that starts the others."""
    assert sum(gpu.LIMITS.values()) <= 350 and sum(gpu.QUICK_LIMITS.values()) <= 170
    for part in gpu.LIMITS:
        quick, full = gpu.cases_of(part, quick=True, cpu=False), gpu.cases_of(part, quick=False, cpu=False)
        assert quick and all(case in full for case in quick)
        if part in ("steps", "memory", "rollout"):
            assert all(case["side"].startswith("ours") for case in quick)
    steps = gpu.cases_of("steps", quick=False, cpu=False)
    assert {(x["model"], x["rows"], x["side"]) for x in steps} >= {
        ("0.5B", rows, side)
        for rows in ("hh", "ultrafeedback", "helpsteer")
        for side in ("ours", "ours, compiled", "trl, 16 pairs", "trl, 32 pairs")
    }


@pytest.mark.parametrize(
    "shape, billions", [("0.5B", 0.494), ("1.5B", 1.544), ("7B", 7.616), ("8B", 8.03), ("70B", 70.554)]
)
def test_shapes_have_the_sizes_of_the_published_models(shape, billions):
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(shapes.config_of(shape))
    assert model.num_parameters() / 1e9 == pytest.approx(billions, abs=0.001)


def test_every_loader_gets_the_same_random_model_and_no_weights_are_written():
    load = transformers.AutoModelForCausalLM.from_pretrained
    with shapes.folder_of("tiny", "cpu") as folder:
        first, info = load(folder, dtype=torch.float32, output_loading_info=True)
        second = transformers.Qwen2ForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, device_map=None)
        assert not any(name.endswith((".safetensors", ".bin")) for name in os.listdir(folder))
    assert not any(info.values()) and first.dtype == torch.float32 and second.dtype == torch.bfloat16
    for x, y in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(x, y.float())
    assert second.model.rotary_emb.inv_freq.dtype == torch.float32
    assert second.to("meta").device.type == "cpu" and second.to(torch.float64).dtype == torch.float64


def test_reads_and_graphs_of_a_step_are_counted():
    double = torch.compile(lambda x: 2 * x, backend="eager")
    steps = watch.Steps("cpu", counted=1)
    for size in (2, 2, 3):
        steps.begin()
        double(torch.ones(size, size + 5)).sum().item()
        torch.ones(()).item()
        steps.end()
    assert steps.results["reads"] == 2
    assert steps.results["graphs"] == [1, 1, 2] and steps.results["reserved"] > 0


def test_waits_for_a_gpu_are_counted_by_its_warnings(monkeypatch):
    modes = []
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", modes.append)
    with watch.host_reads("cuda") as count:
        for message in ("called a synchronizing CUDA operation", "called a synchronizing CUDA operation", "another"):
            warnings.warn(message, stacklevel=1)
    assert count() == 2 and modes == ["warn", "default"]


def test_steps_give_rates_of_the_work_that_counts(jobs):
    ours, adapters, unknown = jobs(
        "steps", STEP, STEP | {"side": "ours, rank 16"}, STEP | {"side": "trl, 16 pairs", "model": "unknown"}
    )
    rows = gpu.rows_of("tiny", "hh", 2)
    tokens = sum(len(x["prompt"]) + sum(map(len, x["responses"])) for x in rows)
    body = 2 * (2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 128)  # layers: query, output; key, value; the MLP
    work = 6 * (body * tokens + 512 * 64 * sum(map(compare.scored, rows)))
    assert ours["TF/s"] * ours["s/step"] * 1e12 == pytest.approx(work)
    assert adapters["TF/s"] * adapters["s/step"] * 1e12 == pytest.approx(work * 4 / 6)  # frozen: no weight gradients
    assert ours["of 989"] == pytest.approx(ours["TF/s"] / 989)
    assert ours["layout"] == "tree" and ours["reads"] > 0 and ours["recompiled"] == 0
    assert 0 < adapters["estimated GiB"] < ours["estimated GiB"] < ours["reserved GiB"]  # of the whole process on a CPU
    assert adapters["gap, nats"] < 0.1  # the same rows and weights
    assert [x["outcome"] for x in (ours, adapters)] == ["ok", "ok"] and "unknown" in unknown["outcome"]


def test_8b_fits_80_gb_by_the_arithmetic():
    """All weights take more than their own bytes and less than the card; adapters at most 30 GiB. Processes share."""
    rows = gpu.rows_of("8B", "ultrafeedback", 32)
    every, adapters = (
        fits.parts("8B", rows, 32, 8192, plan)["peak"] / 2**30 for plan in (fits.EIGHT_BIT, fits.ADAPTERS)
    )
    assert 60.2 < every < 76 and 15 < adapters < 30
    one, four = (fits.parts("8B", rows, 32, 8192, fits.CHECKPOINTED._replace(processes=n)) for n in (1, 4))
    assert four["optimizer"] == one["optimizer"] / 4 and four["gathered"] == pytest.approx(
        8 * 1.05e9 + 10 * 0.218e9, rel=0.01
    )
    assert fits.flags_of(fits.ADAPTERS) == "--gradient-checkpointing --lora-rank 16"


def test_a_flag_that_the_script_lacks_is_the_outcome(jobs, monkeypatch):
    monkeypatch.setitem(gpu.OURS, "ours, other", ({}, {"no_such_flag": 1}))
    (row,) = jobs("memory", STEP | {"side": "ours, other"})
    assert row["outcome"] == "NotImplementedError: train_dpo.py has no --no-such-flag"


def test_each_way_to_log_probs_is_near_float64(jobs):
    ways = [way for way in gpu.WAYS if not gpu.hindrance("kernel", way, "cpu")]
    rows = dict(zip(ways, jobs("kernel", *({"side": way, "n": 8, "d": 16, "v": 64} for way in ways)), strict=True))
    assert rows["ours"]["error"] < 1e-5 and rows["ours, recompute"]["error"] < 1e-5 and rows["naive"]["error"] < 0.1
    assert "error" not in rows["products"] and all(row["ms"] > 0 for row in rows.values())


def alive(pid: int) -> bool:
    """Whether a process exists and is no zombie."""
    try:
        return open(f"/proc/{pid}/stat").read().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_a_limit_ends_the_whole_process_group(tmp_path):
    child = f"import os, time; open({str(tmp_path / 'pid')!r}, 'w').write(str(os.getpid())); time.sleep(60)"
    parent = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"
    began = time.monotonic()
    assert compare.run_limited([sys.executable, "-c", parent], 2) == "stopped after 2 s"
    pid = int((tmp_path / "pid").read_text())
    while alive(pid) and time.monotonic() < began + 10:
        time.sleep(0.05)
    assert not alive(pid) and time.monotonic() - began < 10


def test_a_process_that_fails_says_why():
    assert compare.run_limited([sys.executable, "-c", "pass"], 10) == ""
    assert (
        compare.run_limited([sys.executable, "-c", "1 / 0"], 10) == "exit code 1: ZeroDivisionError: division by zero"
    )
    killed = compare.run_limited([sys.executable, "-c", "import os; os.kill(os.getpid(), 9)"], 10)
    assert killed == f"exit code {-signal.SIGKILL}: no message"


def test_a_case_that_ends_its_process_costs_only_itself(tmp_path, monkeypatch):
    worker = tmp_path / "worker.py"
    worker.write_text(
        "import json, sys, time\n"
        "job, rows = json.load(open(sys.argv[1])), open(sys.argv[2], 'a', buffering=1)\n"
        "for case in job['cases']:\n"
        "    if case['side'] == 'dies': sys.exit('lost the device')\n"
        "    if case['side'] == 'hangs': time.sleep(60)\n"
        "    print(json.dumps({'s': 1.0, 'outcome': 'ok', 'hardware': 'a GPU'}), file=rows)\n"
    )
    monkeypatch.setattr(gpu, "WORKER", [sys.executable, str(worker)])
    cases = [{"side": side} for side in ("a", "dies", "b", "hangs", "c")]
    rows, hardware = gpu.run_part("kernel", cases, "cpu", 5.0)
    assert [row["outcome"].partition(" after")[0] for row in rows] == [
        "ok", "exit code 1: lost the device", "ok", "stopped", "not reached in 5 s"
    ]  # fmt: skip
    assert hardware == "a GPU" and [row["side"] for row in rows] == ["a", "dies", "b", "hangs", "c"]


def test_sigterm_ends_all_and_what_was_measured_is_written(tmp_path, monkeypatch):
    worker, reported = tmp_path / "worker.py", []
    worker.write_text(
        "import json, os, signal, sys, time\n"
        "print(json.dumps({'s': 1.0, 'outcome': 'ok'}), file=open(sys.argv[2], 'a'), flush=True)\n"
        "os.kill(os.getppid(), signal.SIGTERM)\n"
        "time.sleep(60)\n"
    )
    monkeypatch.setattr(gpu, "WORKER", [sys.executable, str(worker)])
    monkeypatch.setattr(gpu.compare, "report", lambda name, rows, *_, **__: reported.append(rows))
    before = signal.getsignal(signal.SIGTERM)
    try:
        with pytest.raises(SystemExit, match="stopped by SIGTERM in kernel"):
            gpu.main(["--quick", "--device", "cpu", "--parts", "kernel", "rollout"])
    finally:
        signal.signal(signal.SIGTERM, before)
    [rows] = reported
    assert [row["outcome"].partition(" in ")[0] for row in rows] == [
        "ok",
        "stopped",
        *["not reached"] * (len(rows) - 2),
    ]


def test_a_table_has_the_ratio_to_ours_on_the_same_rows():
    rows = [
        {"model": "m", "rows": "hh", "side": "ours", "s/step": 2.0, "outcome": "ok"},
        {"model": "m", "rows": "hh", "side": "trl", "s/step": 3.0, "outcome": "ok"},
        {"model": "n", "rows": "hh", "side": "ours", "outcome": "out of memory"},
        {"model": "n", "rows": "hh", "side": "trl", "s/step": 3.0, "outcome": "ok"},
    ]
    full = gpu.for_table(rows)
    assert [row["time / ours"] for row in full] == [1.0, 1.5, "", ""]
    assert {(*row,) for row in full} == {("model", "rows", "side", "s/step", "time / ours", "outcome")}


def test_what_cannot_be_measured_is_refused_or_left_out(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="needs a CUDA"):
        gpu.main([])
    with pytest.raises(SystemExit, match="needs --quick"):
        gpu.main(["--device", "cpu"])
    monkeypatch.setattr(gpu.importlib.util, "find_spec", lambda name: None)
    gpu.main(["--parts", "tests", "--quick", "--device", "cpu"])
    reason = "pytest and hypothesis and beartype not installed"
    assert capsys.readouterr().out == f"tests: left out: CUDA tests ({reason})\n"
    assert gpu.hindrance("steps", "trl, 16 pairs", "cuda") == "trl and datasets not installed"
    assert gpu.hindrance("steps", "ours", "cuda") is None


def test_wheels_over_the_limit_are_refused(tmp_path, monkeypatch):
    def download(command, check):
        assert {"--no-deps", "--only-binary=:all:", "3.12", "trl==1.16.0"} <= {*command} and check
        with open(tmp_path / "a.whl", "wb") as file:
            file.truncate(size)

    monkeypatch.setattr(wheels.subprocess, "run", download)
    size = 64 << 20
    assert wheels.collect(tmp_path, "3.12") == size
    size += 1
    with pytest.raises(SystemExit, match="64.0 MiB of wheels, more than 64"):
        wheels.collect(tmp_path, "3.12")


@pytest.mark.slow
def test_quick_goes_through_every_part(tmp_path, monkeypatch):
    report = compare.report

    def report_there(*args, **kwargs):
        with monkeypatch.context() as patch:
            patch.setattr(compare, "ROOT", tmp_path)
            report(*args, **kwargs)

    monkeypatch.setattr(compare, "report", report_there)
    gpu.main(["--quick", "--device", "cpu"])
    positive = {
        "tests": ["s"],
        "steps": ["s/step", "real tokens/s", "TF/s", "of products", "of square", "of 989", "allocated GiB"],
        "kernel": ["ms", "forward ms"],
        "memory": ["s/step", "real tokens/s", "TF/s", "reserved GiB", "allocated GiB"],
        "rollout": ["s", "longest", "tokens/s", "reserved GiB"],
    }
    for part, columns in positive.items():
        with open(tmp_path / f"runs/benchmarks/gpu_{part}.csv") as file:
            rows = list(csv.DictReader(file))
        assert [row["side"] for row in rows] == [x["side"] for x in gpu.cases_of(part, quick=True, cpu=True)]
        for row in rows:
            assert row["outcome"] == "ok"
            assert all(0 < float(row[name]) < math.inf for name in columns)
            assert f"torch {torch.__version__}" in row["versions"] and row["date"] and row["hardware"]
            if part == "steps" and row["side"] == "ours":  # compiled or padded, the library reads some, too
                assert float(row["reads"]) == 0  # of single values: a step reads its metrics as one list


@pytest.mark.slow
def test_trl_makes_the_same_steps(jobs, monkeypatch):
    pytest.importorskip("trl", reason="benchmarks/requirements.txt is not installed")
    monkeypatch.setitem(gpu.TRL, "trl, 16 pairs", {"rows": 2})
    ours, trl = jobs("steps", STEP, STEP | {"side": "trl, 16 pairs"})
    assert trl["outcome"] == "ok" and trl["gap, nats"] < 0.1 and trl["layout"] == "padded" and trl["reads"] > 0
