"""Shared by the benchmarks: a process for each side, parity checks, the small model, tables and CSV files."""

import contextlib
import csv
import importlib.metadata
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import transformers
import tyro

from support import models
from support.examples import build
from support.report import table
from support.rows import read_rows
from support.runs import processor

ROOT = Path(__file__).resolve().parents[1]
SPREAD, LONGEST = 0.6, 1024  # standard deviation of log length; most tokens of a prompt with one response
H100 = 989e12  # nominal operations per second of its tensor cores in bfloat16


def cli(main: Callable, args_class: type, workers: dict[str, Callable[[dict], dict]]) -> None:
    """Run `main` with its flags; in a process that `in_turn` started, run the named worker on the job instead."""
    if sys.argv[1:2] == ["--worker"]:
        name, job_file, result_file = sys.argv[2:]
        result = workers[name](json.loads(Path(job_file).read_text()))
        Path(result_file).write_text(json.dumps(result))
    else:
        main(tyro.cli(args_class, description=sys.modules["__main__"].__doc__))


def in_turn(script: str, names: Sequence[str], job: dict, rounds: int) -> dict[str, list[dict]]:
    """Results of the workers of benchmarks/SCRIPT.py on the job: `rounds` runs each, in new processes and in turn."""
    results: dict[str, list[dict]] = {name: [] for name in names}
    with tempfile.TemporaryDirectory() as folder:
        job_file, result_file = Path(folder, "job.json"), Path(folder, "result.json")
        job_file.write_text(json.dumps(job))
        for _ in range(rounds):
            for name in names:
                command = [sys.executable, "-m", f"benchmarks.{script}", "--worker", name, job_file, result_file]
                began = time.perf_counter()
                run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
                if run.returncode:
                    sys.exit(f"benchmarks.{script}: {name} failed\n{run.stdout[-2000:]}\n{run.stderr[-4000:]}")
                results[name].append(json.loads(result_file.read_text()))
                print(f"  {name}: {time.perf_counter() - began:.0f} s", file=sys.stderr)
    return results


def run_limited(command: Sequence[str], seconds: float) -> str:
    """Run a command in a process group of its own; returns "" if it succeeds in this time, else the reason. Nothing of
    the group is left running, and the model hub is never asked."""
    offline = os.environ | {"HF_HUB_OFFLINE": "1"}
    with tempfile.TemporaryFile("w+") as stderr:
        process = subprocess.Popen(
            command, cwd=ROOT, env=offline, stdin=subprocess.DEVNULL, stderr=stderr, process_group=0
        )
        try:
            code = process.wait(seconds)
        except subprocess.TimeoutExpired:
            return f"stopped after {seconds:.0f} s"
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        stderr.seek(0)
        last = (stderr.read().split("\n\n")[-1].strip() or "no message").splitlines()[-1]
    return f"exit code {code}: {last[:200]}" if code else ""


# -------------------------------------------------------------------------------------------------------------- parity


def largest_gap(ours: dict[str, float], theirs: dict[str, float]) -> float:
    """Largest difference between two sides' log-probs of the same sequences; exits if the sequences differ."""
    if ours.keys() != theirs.keys():
        sys.exit(f"parity: {len(ours)} and {len(theirs)} sequences, of which {len(ours.keys() & theirs.keys())} agree")
    return max(abs(ours[name] - theirs[name]) for name in ours)


def require_parity(quantity: str, gap: float, limit: float) -> None:
    """Exit if two sides differ by more than the limit: they do different work, and their times cannot be compared."""
    print(f"parity: {quantity} differ by {gap:.2g} (at most {limit:g})", file=sys.stderr)
    if not gap <= limit:
        sys.exit(f"parity: {quantity} differ by {gap:.3g}, more than {limit:g}: not the same work")


def key(tokens: Sequence[int]) -> str:
    return " ".join(map(str, tokens))


# --------------------------------------------------------------------------------------------------- optimizer steps


def random_rows(model: str, count: int, prompt: int, response: int, k: int) -> list[dict]:
    """Prompts of random tokens with k responses each. Lengths are log-normal, with means `prompt` and `response`."""
    rng = random.Random(0)
    length = lambda mean: max(4, round(mean * rng.lognormvariate(-(SPREAD**2) / 2, SPREAD)))  # noqa: E731
    rows = []
    for _ in range(count):
        size, sizes = min(length(prompt), 512), [length(response) for _ in range(k)]
        ids = random_ids(model, rng, size)
        answers = [random_ids(model, rng, min(n, LONGEST - size)) for n in sizes]
        rows.append({"prompt": ids, "responses": answers, "trained": None})
    return rows


def rows_of(source: str, model: str, kind: str, count: int) -> list[dict]:
    """`count` random rows of a data set as token ids, by the model's own tokenizer and chat template."""
    rows, skipped = read_rows(source, None, False)
    examples, _ = build(rows, models.load_tokenizer(model), kind, 512, LONGEST, True, skipped)
    drawn = random.Random(0).sample(examples, count)
    return [{"prompt": e.prompt, "responses": e.responses, "trained": e.trained} for e in drawn]


def scored(row: dict) -> int:
    """Number of a row's response tokens that the loss counts."""
    return sum(map(sum, row["trained"])) if row["trained"] else sum(map(len, row["responses"]))


def operations(model, rows: Sequence[dict]) -> float:
    """Floating-point operations of a forward and backward pass over the rows: 6 per weight and token. A prompt counts
    once, the head counts on scored tokens only, and attention is left out."""
    head = model.get_output_embeddings().weight.numel()
    body = sum(x.numel() for x in model.base_model.layers.parameters() if x.ndim == 2)
    tokens = sum(len(x["prompt"]) + sum(map(len, x["responses"])) for x in rows)
    return 6 * (body * tokens + head * sum(map(scored, rows)))


def optimizer_steps(
    script: str, name: str, job: dict, sides: Sequence[str], rounds: int, model, rate: float
) -> list[dict[str, str | float]]:
    """Time each side's optimizer step, over `batch` of the job's rows at a time; returns one table row for each side.

    First, all sides must agree with the first one on the summed log-probs and the gradient norm of the first step, in
    float32 whatever the job's dtype. Then each makes two passes over the rows, and the second is timed. `rate` is
    `watch.matrix_rate` of `model`.
    """
    one_step = {"rows": job["rows"][: job["batch"]], "epochs": 1, "dtype": "float32"}
    first = in_turn(script, sides, job | one_step, 1)
    mine = first[sides[0]][0]
    for side in sides[1:]:
        theirs = first[side][0]
        require_parity(f"summed log-probs of {sides[0]} and {side}", largest_gap(mine["logps"], theirs["logps"]), 1e-3)
        ratio = mine["norms"][0] / theirs["norms"][0]
        require_parity(f"gradient norms of {sides[0]} and {side}", abs(ratio - 1), 1e-4)
    runs = in_turn(script, sides, job | {"epochs": 2}, rounds)
    tokens = sum(len(x["prompt"]) + len(r) for x in job["rows"] for r in x["responses"])
    steps, table_rows = len(job["rows"]) // job["batch"], []
    base: tuple[float, ...] = ()  # seconds, CPU seconds and peak of the first side
    for side, results in runs.items():
        for result in results:
            result["pass"], result["pass, cpu"] = sum(result["seconds"][steps:]), sum(result["cpu"][steps:])
        seconds, cpu, peak = (median(results, field) for field in ("pass", "pass, cpu", "peak"))
        base = base or (seconds, cpu, peak)
        table_rows.append({
            "rows": name, "side": side, "s/step": seconds / steps, "real tokens/s": tokens / seconds,
            "time / ours": seconds / base[0], "cpu / ours": cpu / base[1],
            "peak MiB": peak, "ours / peak": base[2] / peak,
            "share of matrix rate": operations(model, job["rows"]) / seconds / rate,
        })  # fmt: skip
        if job["device"] != "cpu" and job["dtype"] == "bfloat16":
            table_rows[-1]["share of 989 TF/s"] = operations(model, job["rows"]) / seconds / H100
        if "reference" in results[0]:
            table_rows[-1]["reference s"] = median(results, "reference")
    return table_rows


# --------------------------------------------------------------------------------------------------- model and results


def small_model(folder: str, layers: int = 6, width: int = 256, vocabulary: int = 16384) -> str:
    """Save a random Llama (by default 9 M parameters, tied) and a tokenizer for its vocabulary; returns the folder."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=vocabulary, hidden_size=width, intermediate_size=688, num_hidden_layers=layers,
        num_attention_heads=8, num_key_value_heads=4, max_position_embeddings=4096, tie_word_embeddings=True,
        bos_token_id=None, eos_token_id=1, pad_token_id=0,
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    return small_tokenizer(folder, vocabulary)


def small_tokenizer(folder: str, vocabulary: int) -> str:
    """Save a tokenizer of that many words, whose pad token is 0 and whose EOS is 1; returns the folder."""
    words = ["<pad>", "<eos>", *(f"w{i}" for i in range(2, vocabulary))]
    model = {"type": "WordLevel", "vocab": {word: i for i, word in enumerate(words)}, "unk_token": "<pad>"}
    file = {"version": "1.0", "added_tokens": [], "model": model, "pre_tokenizer": {"type": "WhitespaceSplit"}}
    Path(folder, "tokenizer.json").write_text(json.dumps(file))
    special = {"eos_token": "<eos>", "pad_token": "<pad>"}
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_file=str(Path(folder, "tokenizer.json")), **special)
    tokenizer.save_pretrained(folder)
    return folder


def random_ids(model: str, rng: random.Random, count: int) -> list[int]:
    """Random tokens from the middle of the model's vocabulary, where there are no special tokens."""
    size = transformers.AutoConfig.from_pretrained(model).vocab_size
    return [rng.randrange(size // 10, size * 9 // 10) for _ in range(count)]


def report(
    script: str,
    rows: Sequence[dict[str, str | float]],
    quick: bool,
    device: str = "cpu",
    model: str | None = None,
    part: str = "",
    hardware: str | None = None,
) -> None:
    """Print the rows as a table, and write them with hardware, versions and date to benchmarks/results/SCRIPT.csv and
    benchmarks/README.md. A quick run writes only a CSV file in runs/benchmarks. Results with a local model or on a GPU
    have a file and a table of their own, SCRIPT_model and SCRIPT_cuda, and so has each part of a script, SCRIPT_PART.
    `hardware`: of the process that measured, if it was not this one."""
    kind = part or ("cuda" if device != "cpu" else "model" if model else "")
    name = f"{script}_{kind}" if kind else script
    cells = [
        [x if isinstance(x, str) else f"{x:.3g}" if abs(x) < 1000 else f"{x:.0f}" for x in r.values()] for r in rows
    ]
    lines = table([*rows[0]], cells)
    print(f"\n{lines}\n")
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        versions["trl"] = importlib.metadata.version("trl")
    threads = f"{torch.get_num_threads()} threads of {os.cpu_count()} cores, {processor()}"
    environment = {
        "hardware": hardware or (threads if device == "cpu" else torch.cuda.get_device_name()),
        "versions": ", ".join(f"{name} {version}" for name, version in versions.items()),
        "date": time.strftime("%Y-%m-%d"),
    }
    path = ROOT / ("runs/benchmarks" if quick else "benchmarks/results") / f"{name}.csv"
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow([*rows[0], *environment])
        for row in rows:
            writer.writerow([*(x if isinstance(x, str) else f"{x:.6g}" for x in row.values()), *environment.values()])
    print(f"written to {path.relative_to(ROOT)}")
    if not quick:
        readme = ROOT / "benchmarks/README.md"
        before, after = readme.read_text().split(f"<!-- {name} -->\n")
        flags = "".join(f" {os.path.basename(x)}" for x in sys.argv[1:])
        caption = f"`python -m benchmarks.{script}{flags}`: {', '.join(environment.values())}"
        after = after.partition("<!-- end -->")[2]
        readme.write_text(f"{before}<!-- {name} -->\n```\n{lines}\n```\n\n{caption}\n<!-- end -->{after}")


def median(results: Sequence[dict], *names: str) -> float:
    """Median over the results of the sum of these fields."""
    return statistics.median(sum(result[name] for name in names) for result in results)
