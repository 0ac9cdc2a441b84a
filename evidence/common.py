"""Shared by the runs on a real model: flags, whatever the CSV lacks, the split of the arguments, pages.

    python -m evidence.common       rewrite the tables of all pages and redraw all figures from the CSVs alone

NAME.py has main (runs what NAME.csv lacks), report(results) -> (table, verdict, one line), and draw(results, page).
NAME.md is its page, NAME.png its figure, and NAME.jsonl has answers of the models, without rows of the data.
"""

import hashlib
import importlib
import json
import math
import random
import shutil
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Literal

import torch
from torch import Tensor

import evaluate
from ablations import common, plot
from rlhf import require
from support import models, read_json, scoring, sharding
from support.examples import Example, build
from support.generate import answer, end_ids
from support.report import mean_interval, share_and_half
from support.reward_report import TIE, calibration
from support.rows import read_rows
from support.scoring import Batching

ROOT = Path(__file__).parent
NAMES = ("sft", "reward", "preferences", "sums", "instructgpt")
PARTS = ("reward", "policy", "test")  # of the arguments: for the reward model, for the policy, for neither
LONGEST = 192  # tokens of a prompt with an argument; rows with more are left out
MOST = 10**6  # a limit that no row reaches
MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"


@dataclass
class Args:
    data: str = ""
    """the file of rows; README.md says which"""
    model: str = MODEL
    """the starting model: a local folder or a hub id"""
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """of training, of PPO's rollouts too, and of scoring; other answers are sampled in float32"""
    device: str = "cpu"
    """torch device; on a GPU give --jobs 1"""
    jobs: int = 2
    """runs at once, each with one thread, >= 1"""
    only: str = ""
    """run only settings whose names begin with this, as in --only dpo"""
    short: bool = False
    """a few rows and two updates: checks that the code runs, says nothing else; its results stay under runs/"""


# ------------------------------------------------------------------------------------------------------- runs and pages


def begin(name: str, a: Args, wants_data: bool = True) -> tuple[common.Results, Path]:
    """The results, and the folder for run directories: runs/evidence/NAME/full, or short (emptied first)."""
    require(bool(a.data) or not wants_data, f"--data is missing: name the file of rows ({ROOT}/{name}.md says which)")
    folder = Path("runs/evidence", name, "short" if a.short else "full")
    if a.short:
        shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True, exist_ok=True)
    return common.Results(csv_of(name, a)), folder


def csv_of(name: str, a: Args) -> Path:
    """Where an experiment's results are."""
    return Path("runs/evidence", name, "short/results.csv") if a.short else ROOT / f"{name}.csv"


def fill(results: common.Results, run: Callable, settings: Iterable[str], seeds: Iterable[int], a: Args, folder: Path):
    """Add run(setting, seed, a, folder) -> (values, answers) wherever the CSV lacks it."""
    mine = [x for x in settings if x.startswith(a.only)]
    tasks = [(x, seed, a, folder) for seed in seeds for x in mine if not results.done(x, seed)]
    for (setting, seed, *_), (values, answers), seconds in common.each(run, tasks, a.jobs, folder):
        results.add(setting, seed, values | {"seconds": seconds})
        with open(results.path.with_suffix(".jsonl"), "a") as f:
            f.writelines(json.dumps({"setting": setting, "seed": seed} | x) + "\n" for x in answers)


def trained(script: ModuleType, out: Path, a: Args, **flags) -> dict:
    """What results.json of this run directory holds: made if it is missing, resumed if it was begun. The checkpoint,
    of 16 bytes a weight, is deleted afterwards."""
    common.trained(script, out, **({"device": a.device, "dtype": a.dtype} | flags))
    shutil.rmtree(out / "checkpoint", ignore_errors=True)
    return read_json(out / "results.json")


def best(results: common.Results, settings: Iterable[str], metric: str = "valid", choose: Callable = max) -> str:
    """Of the settings that were run with seed 0, the one with the best metric on validation rows; "" if none was."""
    values = {x: results.values(x, metric).get(0) for x in settings}
    return choose((x for x in values if values[x] is not None), key=values.get, default="")


def with_half(results: common.Results, setting: str, metric: str, digits: int = 3, seed: int = 0) -> str:
    """The value of a seed with half its interval over prompts (the metric METRIC_half); "" if it was not measured."""
    value, half = (results.values(setting, name).get(seed) for name in (metric, f"{metric}_half"))
    return "" if value is None else common.show((value, math.inf if half is None else half), digits)


def finish(name: str, a: Args, results: common.Results) -> None:
    """Print the table; after a full run write page and figure."""
    module = importlib.import_module(f"evidence.{name}")
    print("\n" + plot.section(results, module.report))
    if a.short:
        plot.picture(results, module.draw, results.path.with_name("figure.png"))
        print(f"\nA short run says nothing about learning. results.csv and figure.png are in {results.path.parent}")
    else:
        pages([name])


def pages(names: Sequence[str] = NAMES) -> None:
    """Write the tables into the pages and draw the figures."""
    for name in names:
        page, results = ROOT / f"{name}.md", common.Results(ROOT / f"{name}.csv")
        page.write_text(plot.with_table(page.read_text(), table_of(name, results)))
        if results.values_of:
            plot.picture(results, importlib.import_module(f"evidence.{name}").draw, ROOT / f"{name}.png")


def table_of(name: str, results: common.Results) -> str:
    """What stands between the marks of a page."""
    module = importlib.import_module(f"evidence.{name}")
    return plot.section(results, module.report) if results.values_of else "Not run yet."


# -------------------------------------------------------------------------------------------------------- the arguments


def debate(row: dict) -> str:
    """What a topic is about: it has a topic for each of its two sides, "ban-water_yes" and "ban-water_no"."""
    return row["meta"]["topic"].rpartition("_")[0]


def split_arguments(examples: Sequence[Example]) -> dict[str, list[dict]]:
    """Rows of the three PARTS, and of reward_valid and policy_valid. No debate is in two of them.

    In the order of their names' sha256, every third debate goes to the same part, whatever the tokenizer. Then rows
    above LONGEST tokens are left out, and the last debate that a part still has, of two or more, validates. A row keeps
    prompt, chosen and rejected, its topic, and as `margin` the votes for chosen less those for rejected.
    """
    names = sorted({debate(e.row) for e in examples}, key=lambda name: hashlib.sha256(name.encode()).hexdigest())
    by_debate: dict[str, list[dict]] = defaultdict(list)
    for e in examples:
        if len(e.prompt) + max(e.lengths) <= LONGEST:
            votes = e.row["meta"]["votes"]
            row = {name: e.row[name] for name in ("prompt", "chosen", "rejected")}
            row |= {"topic": e.row["meta"]["topic"], "margin": votes["chosen"] - votes["rejected"]}
            by_debate[debate(e.row)].append(row)
    found: dict[str, list[dict]] = {}
    for i, part in enumerate(PARTS):
        mine = [by_debate[name] for name in names[i :: len(PARTS)] if by_debate[name]]
        require(len(mine) > 1 or part == "test" and bool(mine), f"--data: too few debates are left for the part {part}")
        if part != "test":
            found[f"{part}_valid"] = mine.pop()
        found[part] = [row for rows in mine for row in rows]
    return found


def write_arguments(a: Args, folder: Path, most: dict[str, int]) -> None:
    """PART.jsonl in the folder for each of the parts in `most`, with at most so many rows, drawn with seed 0; 24 in a
    short run."""
    examples, _ = build(read_rows(a.data)[0], models.load_tokenizer(a.model), "preference", MOST, MOST)
    parts = split_arguments(examples)
    for part, n in most.items():
        n = min(24 if a.short else n, len(parts[part]))
        common.write(folder / f"{part}.jsonl", random.Random(0).sample(parts[part], n))


def read_pairs(file: Path, tokenizer) -> list[Example]:
    return build(read_rows(str(file))[0], tokenizer, "preference", MOST, MOST)[0]


def on_pairs(model: str, file: Path, a: Args) -> dict[str, float]:
    """`pair_measures` of a reward model, or of a DPO run by its implicit reward, on a file of pairs."""
    tokenizer = models.load_tokenizer(model)
    examples = read_pairs(file, tokenizer)
    flags = evaluate.Args(dtype=a.dtype, device=a.device)
    return pair_measures(examples, evaluate.rewards_of(model, examples, tokenizer, flags, {}))


def pair_measures(examples: Sequence[Example], rewards: Sequence[Tensor]) -> dict[str, float]:
    """Of rewards [2] of each pair: accuracy; longer, that of "the longer one wins"; lead, the paired difference of the
    two; ece, the calibration error of sigmoid(margin); votes N, the accuracy where the margin of the votes is N. Each
    (but ece) with half its 95 % interval over topics, as NAME_half; what one topic alone has is left out."""
    topics = [e.row["topic"] for e in examples]
    right = [evaluate.accuracy(e, x, TIE) for e, x in zip(examples, rewards, strict=True)]
    longer = [evaluate.accuracy(e, torch.tensor(e.lengths), 0.0) for e in examples]
    found = {"accuracy": share_and_half(right, topics), "longer": share_and_half(longer, topics)}
    found["lead"] = mean_interval([x - y for x, y in zip(right, longer, strict=True)], topics)
    for votes in sorted({e.margin for e in examples}):
        at = [i for i, e in enumerate(examples) if e.margin == votes]
        found[f"votes {votes:g}"] = share_and_half([right[i] for i in at], [topics[i] for i in at])
    margins = torch.stack([x.double()[0] - x.double()[1] for x in rewards])
    ones = torch.ones_like(margins)
    values = {name: mean for name, (mean, half) in found.items() if math.isfinite(half)}
    halves = {f"{name}_half": half for name, (_, half) in found.items() if math.isfinite(half)}
    return values | halves | {"ece": calibration(margins, ones, ones)[1]}


# ------------------------------------------------------------------------------------------------------------- answers


def response_logps(model: str, examples: Sequence[Example], tokenizer, a: Args) -> list[Tensor]:
    """`scoring.score_logps` of a model's responses, in --dtype."""
    dtype = models.DTYPES[a.dtype]
    policy = sharding.load(lambda device: models.load_model(model, device), a.device, dtype)
    batching = Batching("auto", models.pad_id(tokenizer), dtype, device=a.device)
    batching = batching._replace(layout=scoring.choose_layout(policy, examples, batching))
    return scoring.score_logps(policy, examples, batching)


def of_model(measured: dict, names: Iterable[str]) -> dict[str, float]:
    """Those of the named numbers that evaluate.py gives for a model with an interval, and half of it as NAME_half."""
    found = {name: measured[name] for name in names if measured.get(name, {}).get("low") is not None}
    values = {name: x["value"] for name, x in found.items()}
    return values | {f"{n}_half": max(x["high"] - x["value"], x["value"] - x["low"]) for n, x in found.items()}


def answered(
    model: str, file: Path, a: Args, tokens: int, seed: int = 0, temperature: float = 1.0, k: int = 1
) -> tuple[list[Example], list[int]]:
    """The prompts of a file with k sampled answers each, the greedy one at temperature 0; and the ids that end one."""
    policy, tokenizer = models.load_model(model, a.device), models.load_tokenizer(model)
    asked = build(read_rows(str(file))[0], tokenizer, "prompts", MOST, MOST)[0]
    return answer(policy, tokenizer, asked, tokens, seed, temperature, k), end_ids(policy, tokenizer)


if __name__ == "__main__":
    pages()
