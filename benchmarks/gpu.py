"""Measure training, the log-prob kernel, memory and rollouts on one GPU, in at most 6 minutes.

    python -m benchmarks.gpu                         every part
    python -m benchmarks.gpu --parts kernel memory   some parts; the tables of the others stay
    python -m benchmarks.gpu --quick                 ours alone, fewer cases, at most 3 minutes
    python -m benchmarks.gpu --quick --device cpu    every part with tiny shapes, to see that it runs

    tests     the tests that need a CUDA device
    steps     DPO steps of 64 pairs: train_dpo.main as a user calls it, and TRL's trainer at its best settings
    kernel    log-probs from hidden states: `token_logps` and the other ways of logprobs.py
    memory    DPO steps of an 8B model, 16 pairs each, and the memory that they reserve
    rollout   `support.generate.generate` and the library's `generate`: answers of one length, and of geometric lengths

Everything is in bfloat16, on random models of the shapes of Qwen2 0.5B and 1.5B and Llama 3 8B (shapes.py). A part has
its own process and time limit (`LIMITS`) and takes its most important cases first. A case that fails costs itself only:
its reason is its outcome, and if its process has ended, a new one continues with the next case.
"""

import argparse
import contextlib
import functools
import importlib.util
import json
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
import types
from pathlib import Path
from unittest import mock

import torch

if importlib.util.find_spec("tyro") is None:  # only the command lines of the scripts need it
    sys.modules["tyro"] = types.ModuleType("tyro")

from benchmarks import compare, dpo_step, logprobs, rollout, shapes, watch
from rlhf.logprobs import Head, token_logps
from support import generate, models, sharding

LIMITS = {"tests": 45, "steps": 165, "kernel": 30, "memory": 50, "rollout": 60}  # seconds
QUICK_LIMITS = {"tests": 45, "steps": 45, "kernel": 20, "memory": 35, "rollout": 25}
COUNTED = (
    "TF/s: six operations a weight and token (four if the weight is frozen). A prompt counts once, the head on "
    "response tokens only; attention and recomputation do not count."
)
WORKER = [sys.executable, "-u", "-m", "benchmarks.gpu", "--worker"]

# --------------------------------------------------------------------------------------------------------------- cases

CHECKPOINTED = {"gradient_checkpointing": True, "micro_batch_tokens": 8192}
OURS = {  # arguments of dpo_step.ours, and flags of train_dpo.py
    "ours": ({}, {}),
    "ours, compiled": ({"compile": True}, {}),
    "ours, padded": ({}, {"layout": "padded"}),
    "ours, padded, compiled": ({"compile": True}, {"layout": "padded"}),
    "ours, compiled, 32,768 tokens": ({"compile": True}, {"micro_batch_tokens": 32768}),
    "ours, rank 16": ({}, {"lora_rank": 16, **CHECKPOINTED}),
    "ours, all weights": ({}, {"optimizer_state": "8bit", "gradient_dtype": "bfloat16", **CHECKPOINTED}),
}
TRL = {  # arguments of dpo_step.trl; `rows` are the pairs in a micro-batch
    "trl, 16 pairs": {"rows": 16},
    "trl, 32 pairs": {"rows": 32},
    "trl, 16 pairs, compiled": {"rows": 16, "compile": True},
}
WAYS = {  # from hidden states, weight and targets to log-probs; the products are the work that none can avoid
    "ours": lambda h, w, t: token_logps(h, Head(w), t)[0],
    "ours, keep": logprobs.WAYS["ours"],
    "ours, recompute": logprobs.WAYS["ours, recompute"],
    "products": lambda h, w, t: (h @ w.T)[:, 0],
    **{way: function for way, function in logprobs.WAYS.items() if not way.startswith("ours")},
}
SAMPLERS = {
    "ours": None, "ours, compiled": None, "library, static cache": {"cache_implementation": "static"}, "library": {}
}  # fmt: skip


def cases_of(part: str, quick: bool, cpu: bool) -> list[dict]:
    """The cases of a part, most important first."""
    if part == "tests":
        return [{"side": "CUDA tests"}]
    if part == "kernel":
        size = {"n": 64, "d": 32, "v": 512} if cpu else {"n": 8192, "d": 4096, "v": 151936}
        return [{"side": way} | size for way in ([*WAYS][:4] if quick else WAYS)]
    if part == "rollout":
        size = {"model": "tiny", "prompts": 2, "samples": 2} if cpu else {"model": "0.5B", "prompts": 64, "samples": 4}
        lengths = [
            {"tokens": 8 if cpu else 128, "mean": None},
            {"tokens": 16 if cpu else 512, "mean": 4 if cpu else 64},
        ]
        left_out = "compiled" if cpu else "library" if quick else None
        sides = [side for side in SAMPLERS if not left_out or left_out not in side]
        return [{"side": side} | size | length for side in sides for length in lengths]
    profiles, steps = [*dpo_step.PROFILES], 1 if part == "memory" else 2
    if part == "memory":
        order = [("8B", "ultrafeedback", side) for side in ("ours, all weights", "ours, rank 16")]
    elif quick:
        order = [("0.5B", rows, side) for side in ("ours", "ours, compiled") for rows in profiles[:2]]
    else:
        order = [("0.5B", rows, side) for side in ("ours", "ours, compiled", "trl, 16 pairs") for rows in profiles]
        order += [("1.5B", rows, side) for rows in profiles[:2] for side in ("ours, compiled", "trl, 16 pairs")]
        order += [("0.5B", rows, "trl, 32 pairs") for rows in profiles]
        order += [("0.5B", rows, "ours, compiled, 32,768 tokens") for rows in profiles]
        order += [("0.5B", "ultrafeedback", side) for side in ("trl, 16 pairs, compiled", "ours, padded, compiled")]
        order += [("1.5B", rows, "ours") for rows in profiles]
    if cpu:
        order = [("tiny", "hh", side) for side in (["ours, rank 16"] if part == "memory" else ["ours", "ours, padded"])]
    pairs = {"tiny": 4, "8B": 16}
    return [
        {"model": model, "rows": rows, "side": side, "pairs": pairs.get(model, 64), "steps": steps}
        for model, rows, side in order
    ]


def hindrance(part: str, side: str, device: str) -> str | None:
    """Why a side cannot be measured here; None if it can."""
    if part == "kernel" and side in logprobs.WAYS:
        return logprobs.hindrance(side, device, "bfloat16")
    needs = ["pytest", "hypothesis", "beartype"] if part == "tests" else ["trl", "datasets"] if side in TRL else []
    missing = [name for name in needs if importlib.util.find_spec(name) is None]
    return f"{' and '.join(missing)} not installed" if missing else None


# ------------------------------------------------------------------------------------------------------------ measuring

FIRST_LOGPS: dict[tuple[str, str], dict[str, float]] = {}  # of the first side of this process, by model and rows


def run_tests(case: dict, device: str) -> dict:
    """Run the tests that are skipped without a CUDA device."""
    files = [str(x) for x in sorted(Path("tests").glob("test_*.py")) if '"needs a CUDA device"' in x.read_text()]
    command = [sys.executable, "-m", "pytest", "-q", "-o", "addopts=", "-p", "no:cacheprovider", "-m", "skipif", *files]
    workers = min(8, (os.cpu_count() or 1) // 2)  # most of the time they compile
    command += ["-n", str(workers)] if workers > 1 and importlib.util.find_spec("xdist") else []
    began = time.perf_counter()
    run = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    print(run.stdout)
    counts = {name: int(n) for n, name in re.findall(r"(\d+) (passed|failed|skipped|errors?)", run.stdout[-300:])}
    if run.returncode:
        raise RuntimeError("; ".join(x for x in run.stdout.splitlines() if x.startswith(("FAILED", "ERROR"))) or counts)
    return {name: counts.get(name, 0) for name in ("passed", "skipped")} | {"s": time.perf_counter() - began}


@functools.cache
def rows_of(shape: str, profile: str, count: int) -> list[dict]:
    """Pairs of random tokens with the lengths of `dpo_step.PROFILES`, for the tiny model an eighth of them."""
    means = [mean // (8 if shape == "tiny" else 1) for mean in dpo_step.PROFILES[profile]]
    with shapes.folder_of(shape, "cpu") as folder:
        return compare.random_rows(folder, count, *means, k=2)


def run_steps(case: dict, device: str) -> dict:
    """Make two passes over the rows, in which the last step of the first counts reads and the second is timed."""
    import train_dpo

    shape, profile, side, batch, steps = (case[name] for name in ("model", "rows", "side", "pairs", "steps"))
    arguments, flags = OURS.get(side, ({}, {}))
    for name in flags.keys() - train_dpo.Args.__dataclass_fields__.keys():
        raise NotImplementedError(f"train_dpo.py has no --{name.replace('_', '-')}")
    rows = rows_of(shape, profile, batch * steps)
    job = {"rows": rows, "batch": batch, "epochs": 2, "counted": steps - 1, "flags": flags}
    digest = "trl.trainer.dpo_trainer.hash_module"  # of all weights, for TRL's cache of reference log-probs
    no_digest = mock.patch(digest, lambda _: str(time.time_ns())) if side in TRL else contextlib.nullcontext()
    with shapes.folder_of(shape, device) as folder, no_digest:
        job |= {"model": folder, "device": device, "dtype": "bfloat16"}
        result = dpo_step.ours(job, **arguments) if side in OURS else dpo_step.trl(job, best=True, **TRL[side])
    first, logps = FIRST_LOGPS.setdefault((shape, profile), result["logps"]), result["logps"]
    seconds, graphs = sum(result["seconds"][steps:]), result["graphs"]
    work = shapes.operations(shape, rows) * (4 / 6 if flags.get("lora_rank") else 1)
    square, products = shapes.rates(shape, device)
    return {
        "layout": result.get("layout", "padded"), "s/step": seconds / steps,
        "real tokens/s": sum(len(x["prompt"]) + len(r) for x in rows for r in x["responses"]) / seconds,
        "TF/s": work / seconds / 1e12, "of products": work / seconds / products, "of square": work / seconds / square,
        "of 989": work / seconds / compare.H100, "reserved GiB": result["reserved"] / 1024,
        "allocated GiB": result["allocated"] / 1024,
        "estimated GiB": estimated(case, rows, flags, result.get("layout", "padded"), device),
        "reads": result["reads"],
        "graphs": graphs[steps - 1], "recompiled": graphs[-1] - graphs[steps - 1],
        "gap, nats": max((abs(logps[name] - first[name]) for name in logps.keys() & first.keys()), default=0.0),
    }  # fmt: skip


def estimated(case: dict, rows: list[dict], flags: dict, layout: str, device: str) -> float | str:
    """The peak of a step that `--dry-run` gives, in GiB; for others than ours nothing."""
    if case["side"] not in OURS:
        return ""
    import train_dpo
    from benchmarks import fits

    budget = flags.get("micro_batch_tokens", train_dpo.Args.micro_batch_tokens)
    changes = {name: value for name, value in flags.items() if name in fits.Plan._fields}
    plan = fits.Plan("bfloat16", on_gpu=watch.on_gpu(device))._replace(**changes)
    return fits.parts(case["model"], rows, case["pairs"], budget, plan, layout)["peak"] / 2**30


@functools.cache
def kernel_inputs(n: int, d: int, v: int, device: str):
    """Hidden states, weight, targets, gradients of the log-probs, and the log-probs in float64."""
    torch.manual_seed(0)
    with torch.device(device):
        hidden, weight = torch.randn(n, d, dtype=torch.bfloat16), torch.randn(v, d, dtype=torch.bfloat16)
        targets, upstream = torch.randint(v, (n,)), torch.randn(n)
    weight *= 3 / d**0.5
    tiles, precise = zip(hidden.split(1024), targets.split(1024), strict=True), weight.double()
    exact = [(h.double() @ precise.T).log_softmax(-1).gather(1, t[:, None])[:, 0] for h, t in tiles]
    return hidden.requires_grad_(), weight.requires_grad_(), targets, upstream, torch.cat(exact)


def run_kernel(case: dict, device: str) -> dict:
    """Time a way forward and backward, and its forward pass without gradient; the peak is that above the inputs."""
    hidden, weight, targets, upstream, exact = kernel_inputs(case["n"], case["d"], case["v"], device)
    way = functools.partial(WAYS[case["side"]], hidden, weight, targets)

    def run():
        hidden.grad = weight.grad = None
        logps = way()
        logps.backward(upstream.to(logps.dtype))

    run()
    hidden.grad = weight.grad = None
    before = watch.forget_peak(device)
    seconds = shapes.fastest(run, device)
    row = {"ms": 1000 * seconds, "peak GiB": (watch.peak(device) - before) / 1024}
    hidden.grad = weight.grad = None
    with torch.no_grad():
        row["forward ms"] = 1000 * shapes.fastest(way, device)
        if case["side"] != "products":
            row["error"] = (way().double() - exact).square().mean().sqrt().item()
    return row


def run_rollout(case: dict, device: str) -> dict:
    """Sample answers to random prompts of 32 to 128 tokens twice, and time the second pass. Ours is the model that the
    scripts sample from. Where there is a `mean` length, every `mean`-th word ends an answer; the model is so random
    that lengths are then geometric, and a few answers are several times as long as the others."""
    options, k, dtype = SAMPLERS[case["side"]], case["samples"], torch.bfloat16
    with shapes.folder_of(case["model"], device) as folder:
        tokenizer = models.load_tokenizer(folder)
        if options is None:
            model = sharding.load(functools.partial(models.load_model, folder), device, dtype)
            if case["side"] == "ours, compiled":
                models.compile_layers(model)
        else:
            model = shapes.model_of(shapes.config_of(case["model"]), device, dtype)
    rng, words = random.Random(0), range(2, model.config.vocab_size)
    prompts = [rng.choices(words, k=rng.randint(32, 128)) for _ in range(case["prompts"])]
    if case["mean"]:
        model.generation_config.eos_token_id = [*words[:: case["mean"]]]
    ends = {*generate.end_ids(model, tokenizer)}

    def sample() -> list[list[int]]:
        if options is None:
            return generate.generate(model, tokenizer, prompts, case["tokens"], k=k, dtype=dtype)[0]
        return rollout.library(model, tokenizer, prompts, case["tokens"], 1.0, k, **options)

    sample()
    watch.wait(device)
    began = time.perf_counter()
    answers = sample()
    watch.wait(device)
    seconds = time.perf_counter() - began
    lengths = [next((i + 1 for i, token in enumerate(row) if token in ends), len(row)) for row in answers]
    return {
        "s": seconds, "longest": max(lengths), "tokens/s": sum(lengths) / seconds,
        "reserved GiB": watch.reserved(device) / 1024,
    }  # fmt: skip


MEASURES = {
    "tests": run_tests, "steps": run_steps, "kernel": run_kernel, "memory": run_steps, "rollout": run_rollout
}  # fmt: skip


# ------------------------------------------------------------------------------------------------ processes and results


def work(job_file: str, rows_file: str) -> None:
    """Measure the job's cases in a process of its own, and append each row to the file as soon as there is one."""
    job = json.loads(Path(job_file).read_text())
    device = job["device"]
    torch.backends.cuda.enable_cudnn_sdp(False)  # it makes a plan for each new shape, on both sides
    hardware = torch.cuda.get_device_name() if watch.on_gpu(device) else None
    for case in job["cases"]:
        if job["part"] == "steps" and "compiled" in case["side"]:  # so that its graphs are counted
            torch._dynamo.reset()
        watch.free_cache(device)
        began = time.monotonic()
        try:
            row = MEASURES[job["part"]](case, device) | {"outcome": "ok"}
        except (Exception, SystemExit) as error:
            row = {"outcome": " ".join(f"{type(error).__name__}: {error}".split())[:200]}
        watch.wait(device)  # raises if the device is lost: then a new process continues
        with open(rows_file, "a") as file:
            file.write(json.dumps(row | {"hardware": hardware}) + "\n")
        shown = [f"{name} {x:.4g}" if isinstance(x, float) else f"{name} {x}" for name, x in (case | row).items()]
        print(f"  [{time.monotonic() - began:.0f} s] {', '.join(shown)}")


def run_part(part: str, cases: list[dict], device: str, limit: float) -> tuple[list[dict], str | None]:
    """A row for each case, and the name of the GPU. A case that ended its process or met the limit has the reason as
    its outcome, and those behind it go on in a new process while there is time. SIGTERM is a limit, too."""
    rows, hardware, end = [], None, time.monotonic() + limit
    with tempfile.TemporaryDirectory() as folder:
        job_file, rows_file = Path(folder, "job.json"), Path(folder, "rows.jsonl")
        while len(rows) < len(cases) and (left := end - time.monotonic()) > 0:
            job_file.write_text(json.dumps({"part": part, "device": device, "cases": cases[len(rows) :]}))
            rows_file.write_text("")
            try:
                reason = compare.run_limited([*WORKER, str(job_file), str(rows_file)], left)
            except SystemExit:
                reason, end = "stopped", 0.0
            rows += map(json.loads, rows_file.read_text().splitlines())
            if len(rows) < len(cases):
                rows.append({"outcome": reason})
    rows += [{"outcome": f"not reached in {limit:g} s"} for _ in cases[len(rows) :]]
    for row in rows:
        hardware = row.pop("hardware", None) or hardware
    return [case | row for case, row in zip(cases, rows, strict=True)], hardware


def for_table(rows: list[dict]) -> list[dict]:
    """The rows with the same columns, the outcome last, and each time's ratio to that of "ours" on the same rows."""
    ours = {(x.get("model"), x.get("rows")): x for x in rows if x["side"] == "ours" and x["outcome"] == "ok"}
    for row in rows:
        base = ours.get((row.get("model"), row.get("rows")), {})
        if name := next((name for name in ("s/step", "ms") if name in row and name in base), None):
            row["time / ours"] = row[name] / base[name]
    columns = dict.fromkeys(name for row in rows for name in row if name != "outcome")
    return [{name: "" if row.get(name) is None else row[name] for name in (*columns, "outcome")} for row in rows]


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", default=[*LIMITS], choices=LIMITS, help="parts to run, in this order")
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--quick", action="store_true", help="ours alone, fewer cases, no table in the README")
    parser.add_argument("--limit", type=float, help="time limit of each part, seconds")
    a = parser.parse_args(argv)
    if a.device == "cuda" and not torch.cuda.is_available():
        sys.exit("this needs a CUDA device; --quick --device cpu goes through all parts with tiny shapes")
    if a.device == "cpu" and not a.quick:
        sys.exit("--device cpu needs --quick: its shapes are tiny, and its numbers are no results")
    ended = []  # by SIGTERM, which ends the processes; what they have measured is written
    signal.signal(signal.SIGTERM, lambda *_: ended.append(True) or sys.exit(128 + signal.SIGTERM))
    for part in a.parts:
        cases = cases_of(part, a.quick, a.device == "cpu")
        reasons = {case["side"]: hindrance(part, case["side"], a.device) for case in cases}
        for reason in dict.fromkeys(filter(None, reasons.values())):
            print(f"{part}: left out: {'; '.join(side for side in reasons if reasons[side] == reason)} ({reason})")
        if cases := [case for case in cases if not reasons[case["side"]]]:
            limit = (QUICK_LIMITS if a.quick else LIMITS)[part] * (5 if a.device == "cpu" else 1)
            rows, hardware = run_part(part, cases, a.device, a.limit or limit)
            compare.report("gpu", for_table(rows), a.quick, a.device, part=part, hardware=hardware)
            if MEASURES[part] is run_steps:
                print(COUNTED)
        if ended:
            sys.exit(f"stopped by SIGTERM in {part}")


if __name__ == "__main__":
    sys.stdout.reconfigure(line_buffering=True)
    work(*sys.argv[2:]) if sys.argv[1:2] == ["--worker"] else main()
