"""SFT before DPO: the same updates and preferences, from a base model, from SFT, or from Preferred-FT.

    python -m ablations.sft_first            --quick, --smoke, --seeds

Claim (Rafailov et al. 2023, section 4, arXiv 2305.18290; Ethayarajh et al. 2024, arXiv 2402.01306, section 4.2): DPO
wants a reference that is close to the data, so SFT comes first, or Preferred-FT (SFT on the chosen answers) if the
data's own SFT model is not available; KTO is said to need it less.

The base model learns from reviews in which three words of ten are replaced by random ones. Each arm then has as many
updates, of 64 rows each: all of them DPO (or KTO) on the seed's preferences, or half of them SFT and half DPO.

    base, DPO               DPO from the base model, twice over the same pairs
    SFT, DPO                SFT on clean reviews first
    Preferred-FT, DPO       SFT on the pairs' chosen answers first
    mismatched SFT, DPO     SFT first on reviews of two long sentences: clean, but unlike the pairs
    base, KTO               KTO from the base model, on the answers of the same pairs

Criterion, written before the full run. The learning rate of the preference updates is one of two: for each arm the one
with which seed 0 has the higher gold reward on validation prompts; all else is measured on test prompts. Reproduced:
"SFT, DPO" less "base, DPO", paired by seed, is above 0 with its 95 % t-interval, both in gold reward and in readable
gold (that of grammatical answers, and 0 for others). Contradicted: one is below 0. Else not resolved. The other arms
are reported.
"""

import json
import random
import statistics
from pathlib import Path

import train_dpo
import train_sft
from ablations import common, plot
from ablations.common import markdown, paired, show, t_interval, trained, write
from support import reviews
from support.examples import build, held_out
from support.runs import cli

NAME = "sft_first"
CLAIM = "DPO from an SFT model ends higher than DPO from the base model with equally many updates"
ARMS = {  # SFT rows of the first half of the updates (None: no SFT), and the loss of the rest
    "base, DPO": (None, "dpo"),
    "SFT, DPO": ("sft", "dpo"),
    "Preferred-FT, DPO": ("chosen", "dpo"),
    "mismatched SFT, DPO": ("long", "dpo"),
    "base, KTO": (None, "kto"),
}
STARTS = {"base": None, "SFT": "sft", "Preferred-FT": "chosen", "mismatched SFT": "long"}
RATES = (3e-4, 1e-3)
SETTINGS = {x: (start, None, None) for x, start in STARTS.items()}
SETTINGS |= {f"{arm}, {rate:g}": (*ARMS[arm], rate) for arm in ARMS for rate in RATES}
HALF, BATCH = 40, 64  # updates per half, rows per update
BASE = {"max_steps": 400, "batch_size": 32, "lr": 4e-3}
GARBLED = 0.3  # share of random words in the base model's training text
SFT_RATE = 1e-3
TEST, VALIDATION = 384, 128  # held-out prompts
COLUMNS = {  # metric: title in the table, digits
    "gold": ("gold reward", 2),
    "readable": ("readable gold", 2),
    "grammatical": ("grammatical", 2),
    "kl": ("KL to base, nats", 2),
    "length": ("length", 1),
    "accuracy": ("accuracy", 3),
    "reference": ("log ref(chosen)", 1),
}


def main(a: common.Args) -> None:
    """Run what results.csv lacks, then write table and figure."""
    results, folder = common.results(NAME, a), common.work(NAME, a)
    seeds, half = (range(1), 2) if a.smoke else (range(min(a.seeds, 2)), 20) if a.quick else (range(a.seeds), HALF)
    settings = list(SETTINGS)
    if a.quick or a.smoke:
        settings = [x for x in SETTINGS if SETTINGS[x][2] == RATES[-1] or (a.quick and x in STARTS)]
    for group in (seeds[:1], seeds[1:]):  # the first seed tries both learning rates
        tasks = [(x, seed, folder, half) for seed in group for x in settings if not results.done(x, seed)]
        for (setting, seed, *_), values, seconds in common.each(run, tasks, 1, folder):
            results.add(setting, seed, values | {"seconds": seconds})
        settings = [*STARTS, *(chosen(results, arm) for arm in ARMS)]
    plot.finish(NAME, a, results, report, draw)


def run(setting: str, seed: int, folder: Path, half: int) -> dict[str, float]:
    """Train one arm -> {metric: value} at its end."""
    kind, loss, rate = SETTINGS[setting]
    smoke, rows, values = half < 10, half * BATCH, {}
    garbled, limit = folder / "garbled.jsonl", {"max_steps": 2} if smoke else {}
    if not garbled.exists():
        write(garbled, garbled_reviews(60 if smoke else 14_000))
    model = base = trained(train_sft, folder / "base", data=str(garbled), eval_prompts=0, **BASE | limit)
    pairs, held = split_pairs(folder, rows, seed)
    flags = {"seed": seed, "batch_size": BATCH, "max_steps": half, "eval_prompts": 0, "eval_data": str(held)}
    if kind:
        texts = {"sft": common.rows("sft", rows, seed + 1), "long": long_reviews(rows, seed)}
        data = pairs if kind == "chosen" else write(folder / f"{kind}-{seed}.jsonl", texts[kind])
        model = trained(train_sft, folder / f"model-{kind}-{seed}", model=base, data=str(data), lr=SFT_RATE, **flags)
    if loss:
        flags |= {"max_steps": half if kind else 2 * half, "epochs": 2, "ref_cache": str(folder / "ref_cache")}
        out = folder / f"{setting}-{seed}"
        model = trained(train_dpo, out, model=model, data=str(pairs), lr=rate, loss=loss, **flags)
        evals = json.loads((out / "results.json").read_text())
        values = {"accuracy": evals["after/eval/rewards/accuracies"], "reference": evals["before/eval/logps/chosen"]}
    prompts = common.prompts(400 if smoke else 24_000)[1][: TEST + VALIDATION]
    test = len(prompts) * TEST // (TEST + VALIDATION)
    measured = common.measured(model, base, prompts, seed, 8 if smoke else 48)
    values |= {name: statistics.fmean(per_answer[:test]) for name, per_answer in measured.items()}
    return values | {"gold_validation": statistics.fmean(measured["gold"][test:])}


def garbled_reviews(n: int) -> list[dict]:
    """Reviews in which a share GARBLED of the words is random."""
    rng = random.Random(NAME)
    garble = lambda word: rng.choice(reviews.VOCABULARY) if rng.random() < GARBLED else word  # noqa: E731
    return [{"text": " ".join(map(garble, row["text"].split()))} for row in common.rows("sft", n)]


def long_reviews(n: int, seed: int) -> list[dict]:
    """Reviews whose two sentences both have two clauses."""
    rng = random.Random(f"long {seed}")
    long = lambda: reviews.expand("LONG", rng)  # noqa: E731
    return [{"text": " ".join(long() + long())} for _ in range(n)]


def split_pairs(folder: Path, n: int, seed: int) -> tuple[Path, Path]:
    """Files of n preferences of this seed, and of its preferences with held-out prompts."""
    pairs, held = (folder / f"{name}-{seed}.jsonl" for name in ("pairs", "held"))
    if not pairs.exists():
        rows = reviews.rows("preference", round(1.3 * n) + 60, seed)
        train, others = held_out(build(rows, reviews.tokenizer(), "preference", 512, 1024)[0], 0.1)
        write(held, [e.row for e in others])
        write(pairs, [e.row for e in train[:n]])
    return pairs, held


# ----------------------------------------------------------------------------------------------------- table and figure


def chosen(results: common.Results, arm: str) -> str:
    """The arm's setting with the learning rate at which seed 0 has the higher gold reward on validation prompts."""
    tried = [x for x in (f"{arm}, {rate:g}" for rate in RATES) if results.values(x, "gold")]
    return max(tried, key=lambda x: results.values(x, "gold_validation")[0])


def report(results: common.Results) -> tuple[str, str, str]:
    """Table, verdict, effect."""
    rows, best = [], {arm: chosen(results, arm) for arm in ARMS}
    for x in SETTINGS:
        if results.values(x, "gold"):
            values = lambda n, x=x: [*results.values(x, n).values()]  # noqa: E731
            cells = [show(t_interval(values(n)), digits) if values(n) else "" for n, (_, digits) in COLUMNS.items()]
            rows.append([f"**{x}**" if x in best.values() else x, *cells])
    differences = []
    for name in ("gold", "readable"):
        for arm in [x for x in ARMS if x != "base, DPO"]:
            arm_values, base_values = (results.values(best[x], name) for x in (arm, "base, DPO"))
            differences.append((arm, COLUMNS[name][0], paired(arm_values, base_values)))
    criterion = [x for arm, _, x in differences if arm == "SFT, DPO"]
    lines = [
        [f"{name}: {arm} - base, DPO", show(x), common.verdict([x]), "yes" if x in criterion else ""]
        for arm, name, x in differences
    ]
    parts = [
        markdown(["arm, learning rate (bold: chosen)", *(title for title, _ in COLUMNS.values())], rows),
        markdown(["difference", "mean", "above 0?", "in the criterion"], lines),
    ]
    judged = [(name, show(x)) for _, name, x in differences if x in criterion]
    effect = "; ".join(f"{name} of (SFT then DPO) minus (base then DPO): {x}" for name, x in judged) + "."
    return "\n\n".join(parts), common.verdict(criterion), effect


def draw(results: common.Results, page) -> None:
    """Gold and readable gold reward of each start, and of each arm at its chosen learning rate."""
    left, right = page.subplots(1, 2, sharey=True, width_ratios=[2, 3])
    starts = {x: x for x in STARTS if results.values(x, "gold")}
    for axes, names in ((left, starts), (right, {arm: chosen(results, arm) for arm in ARMS})):
        for i, (name, colour) in enumerate((("gold", "C0"), ("readable", "C2"))):
            points = [t_interval([*results.values(x, name).values()]) for x in names.values()]
            means, halves = [x for x, _ in points], [x for _, x in points]
            xs = [group + 0.4 * i - 0.2 for group in range(len(names))]
            bars = [half if half < 10 else 0.0 for half in halves]
            axes.bar(xs, means, 0.4, yerr=bars, capsize=2, color=colour, label=COLUMNS[name][0])
        axes.set_xticks(range(len(names)), [x.replace("-", "-\n").replace(" ", "\n") for x in names], fontsize=7)
        axes.grid(alpha=0.3, axis="y")
        axes.axhline(0, color="black", linewidth=0.5)
    left.set_title("before the preferences", fontsize=9)
    right.set_title("after as many updates in all", fontsize=9)
    left.set_ylabel("reward, deviations of the grammar's reviews")
    left.legend(fontsize=7)


if __name__ == "__main__":
    cli(main, common.Args)
