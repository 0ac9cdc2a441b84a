"""What the benchmarks share: a process for each side, in turn; checks of parity; the small model; tables and CSV."""

import csv
import importlib.metadata
import json
import os
import random
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
SPREAD, LONGEST = 0.6, 1024  # standard deviation of log length; tokens of a prompt with a response
H100 = 989e12  # operations a second of its matrix units in bfloat16, as the maker states them


def cli(main: Callable, args_class: type, workers: dict[str, Callable[[dict], dict]]) -> None:
    """`main` with its flags; or, in a process that `in_turn` started, the worker of that name on that job."""
    if sys.argv[1:2] == ["--worker"]:
        name, job, found = sys.argv[2:]
        result = workers[name](json.loads(Path(job).read_text()))
        Path(found).write_text(json.dumps(result))
    else:
        main(tyro.cli(args_class, description=sys.modules["__main__"].__doc__))


def in_turn(script: str, names: Sequence[str], job: dict, rounds: int) -> dict[str, list[dict]]:
    """What each worker of benchmarks/SCRIPT.py says of the job, in processes of their own: A B A B, `rounds` times."""
    found: dict[str, list[dict]] = {name: [] for name in names}
    with tempfile.TemporaryDirectory() as folder:
        job_file, result = Path(folder, "job.json"), Path(folder, "result.json")
        job_file.write_text(json.dumps(job))
        for _ in range(rounds):
            for name in names:
                worker = [sys.executable, "-m", f"benchmarks.{script}", "--worker", name, str(job_file), str(result)]
                began = time.perf_counter()
                ran = subprocess.run(worker, cwd=ROOT, capture_output=True, text=True, check=False)
                if ran.returncode:
                    sys.exit(f"benchmarks.{script}: {name} failed\n{ran.stdout[-2000:]}\n{ran.stderr[-4000:]}")
                found[name].append(json.loads(result.read_text()))
                print(f"  {name}: {time.perf_counter() - began:.0f} s", file=sys.stderr)
    return found


# -------------------------------------------------------------------------------------------------------------- parity


def largest_gap(ours: dict[str, float], theirs: dict[str, float]) -> float:
    """Largest difference of two sides' numbers of the same sequences."""
    if ours.keys() != theirs.keys():
        sys.exit(f"parity: {len(ours)} and {len(theirs)} sequences, of which {len(ours.keys() & theirs.keys())} agree")
    return max(abs(ours[name] - theirs[name]) for name in ours)


def require_parity(what: str, gap: float, limit: float) -> None:
    """Stops unless both sides compute the same: else their times could not be compared."""
    print(f"parity: {what} differ by {gap:.2g} (at most {limit:g})", file=sys.stderr)
    if not gap <= limit:
        sys.exit(f"parity: {what} differ by {gap:.3g}, more than {limit:g}: not the same work")


def key(tokens: Sequence[int]) -> str:
    return " ".join(map(str, tokens))


# ---------------------------------------------------------------------------------------- optimizer steps of many sides


def random_rows(model: str, count: int, prompt: int, response: int, k: int) -> list[dict]:
    """Prompts of random tokens with k responses each; lengths are log-normal with the means `prompt` and `response`."""
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
    """As many rows of a data set as token ids, drawn at random, with the model's own tokenizer and chat template."""
    rows, skipped = read_rows(source, None, False)
    examples, _ = build(rows, models.load_tokenizer(model), kind, 512, LONGEST, True, skipped)
    drawn = random.Random(0).sample(examples, count)
    return [{"prompt": e.prompt, "responses": e.responses, "trained": e.trained} for e in drawn]


def scored(row: dict) -> int:
    """Response tokens of a row that a loss counts."""
    return sum(map(sum, row["trained"])) if row["trained"] else sum(map(len, row["responses"]))


def operations(model, rows: Sequence[dict]) -> float:
    """Floating-point operations of the matrix products of a pass over the rows, each prompt once, and the head on
    scored tokens alone: 6 for a weight and a token. Those of attention are not counted."""
    head = model.get_output_embeddings().weight.numel()
    body = sum(x.numel() for x in model.base_model.layers.parameters() if x.ndim == 2)
    tokens = sum(len(x["prompt"]) + sum(map(len, x["responses"])) for x in rows)
    return 6 * (body * tokens + head * sum(map(scored, rows)))


def optimizer_steps(
    script: str, name: str, job: dict, sides: Sequence[str], rounds: int, model, rate: float
) -> list[dict[str, str | float]]:
    """A row of the table for each side of benchmarks/SCRIPT.py: its optimizer step, with `batch` of the job's rows.

    All must agree with the first side on the first step's summed log-probs and gradient norm, in float32 whatever the
    job's dtype. Then each goes twice over the rows, and the second pass is timed. `rate` is what the products of
    `model` reach alone.
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
    steps, table = len(job["rows"]) // job["batch"], []
    base: tuple[float, ...] = ()  # the first side's
    for side, found in runs.items():
        for run in found:
            run["pass"], run["pass, cpu"] = sum(run["seconds"][steps:]), sum(run["cpu"][steps:])
        seconds, cpu, peak = (median(found, field) for field in ("pass", "pass, cpu", "peak"))
        base = base or (seconds, cpu, peak)
        table.append({
            "rows": name, "side": side, "s/step": seconds / steps, "real tokens/s": tokens / seconds,
            "time / ours": seconds / base[0], "cpu / ours": cpu / base[1],
            "peak MiB": peak, "ours / peak": base[2] / peak,
            "share of matrix rate": operations(model, job["rows"]) / seconds / rate,
        })  # fmt: skip
        if job["device"] != "cpu" and job["dtype"] == "bfloat16":
            table[-1]["share of 989 TF/s"] = operations(model, job["rows"]) / seconds / H100
        if "reference" in found[0]:
            table[-1]["reference s"] = median(found, "reference")
    return table


# --------------------------------------------------------------------------------------------------- model and results


def small_model(folder: str, layers: int = 6, width: int = 256, vocabulary: int = 16384) -> str:
    """Saves a random Llama (about 9 M parameters, tied) and a tokenizer of as many words; returns the folder."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=vocabulary, hidden_size=width, intermediate_size=688, num_hidden_layers=layers,
        num_attention_heads=8, num_key_value_heads=4, max_position_embeddings=4096, tie_word_embeddings=True,
        bos_token_id=None, eos_token_id=1, pad_token_id=0,
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    words = ["<pad>", "<eos>", *(f"w{i}" for i in range(2, vocabulary))]
    model = {"type": "WordLevel", "vocab": {word: i for i, word in enumerate(words)}, "unk_token": "<pad>"}
    file = {"version": "1.0", "added_tokens": [], "model": model, "pre_tokenizer": {"type": "WhitespaceSplit"}}
    Path(folder, "tokenizer.json").write_text(json.dumps(file))
    special = {"eos_token": "<eos>", "pad_token": "<pad>"}
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_file=str(Path(folder, "tokenizer.json")), **special)
    tokenizer.save_pretrained(folder)
    return folder


def random_ids(model: str, rng: random.Random, count: int) -> list[int]:
    """Tokens of the model's vocabulary, from where no special ones are."""
    size = transformers.AutoConfig.from_pretrained(model).vocab_size
    return [rng.randrange(size // 10, size * 9 // 10) for _ in range(count)]


def report(
    script: str, rows: Sequence[dict[str, str | float]], quick: bool, device: str = "cpu", model: str | None = None
) -> None:
    """Prints the rows as a table, and writes them with hardware, versions and date to benchmarks/results/SCRIPT.csv and
    benchmarks/README.md, or of a short run to runs/benchmarks alone. Those of a local model are in SCRIPT_model.csv and
    a table of their own, and so are a GPU's (SCRIPT_cuda.csv)."""
    name = f"{script}_cuda" if device != "cpu" else f"{script}_model" if model else script
    shown = [
        [x if isinstance(x, str) else f"{x:.3g}" if abs(x) < 1000 else f"{x:.0f}" for x in r.values()] for r in rows
    ]
    lines = table([*rows[0]], shown)
    print(f"\n{lines}\n")
    installed = {x.name: x.version for x in importlib.metadata.distributions()}
    packages = [name for name in ("torch", "transformers", "trl") if name in installed]
    threads = f"{torch.get_num_threads()} threads of {os.cpu_count()} cores, {processor()}"
    facts = {
        "hardware": threads if device == "cpu" else torch.cuda.get_device_name(),
        "versions": ", ".join(f"{name} {installed[name]}" for name in packages),
        "date": time.strftime("%Y-%m-%d"),
    }
    path = ROOT / ("runs/benchmarks" if quick else "benchmarks/results") / f"{name}.csv"
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow([*rows[0], *facts])
        for row in rows:
            writer.writerow([*(x if isinstance(x, str) else f"{x:.6g}" for x in row.values()), *facts.values()])
    print(f"written to {path.relative_to(ROOT)}")
    if not quick:
        readme = ROOT / "benchmarks/README.md"
        before, after = readme.read_text().split(f"<!-- {name} -->\n")
        flags = "".join(f" {os.path.basename(x)}" for x in sys.argv[1:])
        made = f"`python -m benchmarks.{script}{flags}`: {', '.join(facts.values())}"
        after = after.partition("<!-- end -->")[2]
        readme.write_text(f"{before}<!-- {name} -->\n```\n{lines}\n```\n\n{made}\n<!-- end -->{after}")


def median(results: Sequence[dict], *names: str) -> float:
    """Median over runs of the sum of these fields."""
    return statistics.median(sum(result[name] for name in names) for result in results)
