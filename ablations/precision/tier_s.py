"""A model of real scale, whose weights lie on the grid of bfloat16, on real pairs.

    python -m ablations.precision --tier s --model HuggingFaceTB/SmolLM2-135M-Instruct --pairs hh_helpful.jsonl
    (then the same with --part DPO)

The pairs are those of the file with at most 160 tokens in all, in a random order that is the same for all runs: 64 are
held out. *seen*: 6 of the others for each seed. *DPO*: train_dpo.py on them, 8 in an update, the seed being that of
their order and of the dither. Its true numbers are those of the saved model (its masters) in float32. A process takes 8
to 9 GB of memory, 5 with MALLOC_MMAP_THRESHOLD_=1048576 in front of the command.

Criterion, written before the runs: blind and cured of __main__.py at rate 5e-7 after 5 updates, and same end at rates
5e-7 and 5e-6, with 0.1 - |mean of the ratio of their held-out margins - 1| in place of gold reward.
"""

import json
import random
import shutil
import statistics
from pathlib import Path

import train_dpo
from ablations import common
from ablations.common import markdown, show, t_interval
from ablations.precision import seen
from evaluate import against_reference
from support import models, scoring
from support.examples import Example, build
from support.generate import answer
from support.rows import read_rows

RATES, END_RATES = (1e-7, 5e-7, 5e-6, 1e-4), (5e-7, 5e-6)
END_FORMS = ("float32", "on the grid", "dithered")
PLACES = (1, 2, 5)  # updates after which *seen* measures
SEEN = {
    f"seen, {form}, {rate:g}": (form, rate)
    for rate in RATES
    for form in ("float32", "autocast", "on the grid", "dithered", "stochastic", "no masters")
    if form in END_FORMS or rate == 5e-7 or (rate == 5e-6 and form != "autocast")
}
DPO = {f"DPO, {form}, {rate:g}": (form, rate) for rate in END_RATES for form in END_FORMS}
TOKENS, HELD, PAIRS = 160, 64, 6
FULL = {"max_steps": 24, "batch_size": 8, "epochs": 100, "warmup": 0.1, "schedule": "constant", "beta": seen.BETA}
ASKED, ANSWER = 32, 32  # prompts of the on-policy KL, tokens of their answers
NAMES = {"margin": "margins", "accuracy": "accuracies"}  # ours -> train_dpo.py's
COLUMNS = {  # metric: column of the table of ends, digits
    "margin": ("held-out margin, nats", 2),
    "logged_margin": ("as logged", 2),
    "accuracy": ("held-out accuracy", 3),
    "logged_accuracy": ("as logged", 3),
    "kl": ("KL, nats", 3),
}


def main(
    results: common.Results, folder: Path, model: str, pairs: str, part: str, seeds: int, jobs: int, smoke: bool
) -> None:
    """Run whatever the CSV lacks of this part, seen or DPO."""
    prepare(folder, model, pairs)
    settings, run = (SEEN, measure) if part == "seen" else (DPO, train)
    if smoke:
        settings = {x: y for x, y in settings.items() if y == ("dithered", 5e-7)}
    tasks = [(x, s, model, folder, smoke) for s in range(seeds) for x in settings if not results.done(x, s)]
    for (setting, seed, *_), (along, end), seconds in common.each(run, tasks, jobs, folder):
        for step, values in along.items():
            results.add(setting, seed, values, step)
        results.add(setting, seed, end | {"seconds": seconds})


def prepare(folder: Path, model: str, pairs: str) -> None:
    """Write the short pairs to train.jsonl and held.jsonl."""
    tokenizer, short = models.load_tokenizer(model), []
    for where, row in read_rows(pairs)[0]:
        [example] = build([(where, row)], tokenizer, "preference", 4096, 8192)[0]
        if len(example.prompt) + sum(example.lengths) <= TOKENS:
            short.append({name: row[name] for name in ("prompt", "chosen", "rejected")})
    random.Random("precision").shuffle(short)
    common.write(folder / "held.jsonl", short[:HELD])
    common.write(folder / "train.jsonl", short[HELD:])


def examples(path: Path, tokenizer) -> list[Example]:
    return build(read_rows(str(path))[0], tokenizer, "preference", 4096, 8192)[0]


def measure(setting: str, seed: int, model: str, folder: Path, smoke: bool) -> tuple[dict, dict]:
    """One run of `seen.measure` -> {step: values}, and the values at the end."""
    form, rate = SEEN[setting]
    tokenizer = models.load_tokenizer(model)
    pairs = examples(folder / "train.jsonl", tokenizer)[seed * PAIRS : (seed + 1) * PAIRS]
    make = lambda device: models.load_model(model, device)  # noqa: E731
    along = seen.measure(form, rate, seed, make, pairs, PLACES[:1] if smoke else PLACES, models.pad_id(tokenizer))
    return along, along[max(along)]


def train(setting: str, seed: int, model: str, folder: Path, smoke: bool) -> tuple[dict, dict]:
    """One run of train_dpo.py -> its metrics along it, and at the end those that it logs (in its form of weights) and
    the true ones."""
    (form, rate), out = DPO[setting], folder / f"{setting.replace(', ', '-').replace(' ', '-')}-{seed}"
    shutil.rmtree(out, ignore_errors=True)  # left by a stopped run
    flags = {"data": str(folder / "train.jsonl"), "eval_data": str(folder / "held.jsonl"), "eval_fraction": 0.0}
    flags |= {"dtype": seen.DTYPES[form], "eval_prompts": 0, "save_every": 10**6}
    flags |= {"lr": rate, "seed": seed, "ref_cache": str(folder / "ref_cache"), "eval_every": 10**6, "device": "cpu"}
    flags |= FULL | ({"max_steps": 1} if smoke else {})
    with seen.in_form(form):
        train_dpo.main(train_dpo.Args(model=model, out=str(out), **flags))
    rows = [json.loads(line) for line in open(out / "metrics.jsonl")]
    names = {"rewards/margins": "batch_margin", "rewards/accuracies": "batch_accuracy", "loss": "batch_loss"}
    along = {x["step"]: {short: x[name] for name, short in names.items()} for x in rows if "lr" in x}
    end = {f"logged_{x}": rows[-1][f"eval/rewards/{name}"] for x, name in NAMES.items()}
    end["logged_margin"] /= seen.BETA

    tokenizer = models.load_tokenizer(model)
    policy, start = (models.load_model(x, "cpu") for x in (str(out), model))
    held = examples(folder / "held.jsonl", tokenizer)
    batching = scoring.Batching("tree", models.pad_id(tokenizer))
    scores = zip(*(scoring.score_logps(x, held, batching) for x in (policy, start)), strict=True)
    margins = [(x - y)[0].item() - (x - y)[1].item() for x, y in scores]
    end |= {"margin": statistics.fmean(margins), "accuracy": statistics.fmean(x > 0 for x in margins)}
    answers = answer(policy, tokenizer, held[: 2 if smoke else ASKED], ANSWER, seed)
    end["kl"] = statistics.fmean(against_reference(policy, start, answers, batching)["kl"])
    shutil.rmtree(out)
    return along, end


def clauses(results: common.Results) -> dict[str, tuple[float, float]]:
    """The criterion's clauses that have values."""
    found = {}
    if results.values("seen, dithered, 5e-07", "kl"):
        found |= seen.blind_and_cured(results, "5e-07", PLACES[-1])
    for rate in END_RATES:
        for metric, name in (("kl", "KL"), ("margin", "margin")):
            sides = [results.values(f"DPO, {form}, {rate:g}", metric) for form in ("on the grid", "dithered")]
            if min(map(len, sides)) > 1:
                found[f"DPO, rate {rate:g}: same {name}"] = seen.same(*sides)
    return found


def report(results: common.Results) -> str:
    """The table of ends. The last columns are means of ratios, paired by seed."""
    rows = []
    for setting, (form, rate) in DPO.items():
        if results.values(setting, "kl"):
            cells = [show(t_interval([*results.values(setting, n).values()]), d) for n, (_, d) in COLUMNS.items()]
            for name in ("margin", "kl"):
                pair = (results.values(x, name) for x in (setting, f"DPO, float32, {rate:g}"))
                cells.append("" if form == "float32" else show(seen.ratio(*pair)))
            rows.append([f"{rate:g}", form, *cells])
    header = ["learning rate", "form of weights", *(title for title, _ in COLUMNS.values())]
    return markdown([*header, "margin / float32's", "KL / float32's"], rows)
