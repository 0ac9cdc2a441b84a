"""What a run reports at its end: intervals, tables, curves, and answers before and after training.

mean_interval, bootstrap    a mean or a statistic with its 95 % interval
table, interval             numbers as text
weighted_means              metrics over micro-batches
before_and_after            the same prompts answered by the model before and after training
curves, reward_kl_plot      the pictures of a run directory
"""

import json
import math
import random
import statistics
from collections import defaultdict
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from torch import Tensor

from support import lazy_import, models, scoring
from support.examples import Example
from support.generate import answer, answer_stats, end_ids
from support.scoring import Batching

figure, matplotlib = lazy_import("matplotlib.figure"), lazy_import("matplotlib")

ANSWER_STATS = {  # what is measured of sampled answers (generate.answer_stats), as the tables name it
    "gold": "gold reward",
    "score": "score of the reward",
    "grammatical": "grammatical share",
    "kl": "KL to the reference, nats an answer",
    "length": "length, tokens",
    "ended": "share that ends with EOS",
}

# after Okabe and Ito, so that colour-blind readers can tell them apart
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#8C510A", "#7F7F7F")
STYLE = {"font.size": 9, "axes.titlesize": 9, "legend.fontsize": 8, "axes.grid": True, "grid.alpha": 0.3}

# ----------------------------------------------------------------------------------------------- intervals and tables


def mean_interval(values: Sequence[float], groups: Sequence | None = None) -> tuple[float, float]:
    """Mean, and half the width of its 95 % interval: 1.96 standard errors; infinite for fewer than two groups.

    Values of one group, such as those of one prompt, may depend on each other; by default each value is its own group:
    se^2 = G / (G - 1) * sum over the G groups of (sum of the group's (value - mean))^2 / n^2.
    """
    mean, deviations = statistics.fmean(values), defaultdict(float)
    for value, group in zip(values, range(len(values)) if groups is None else groups, strict=True):
        deviations[group] += value - mean
    if len(deviations) < 2:
        return mean, math.inf
    spread = math.sqrt(sum(x * x for x in deviations.values()) * len(deviations) / (len(deviations) - 1))
    return mean, 1.96 * spread / len(values)


def interval(mean_and_half: tuple[float, float], digits: int = 2) -> str:
    """ "mean +- half", or the mean alone if one value gives no interval."""
    mean, half = mean_and_half
    return f"{mean:.{digits}f}" + (f" +- {half:.{digits}f}" if math.isfinite(half) else "")


def bootstrap(
    items: Sequence[Any], statistic: Callable[[Sequence[Any]], float], draws: int = 1000, seed: int = 0
) -> tuple[float, float]:
    """95 % percentile interval of `statistic` over `draws` resamplings, with replacement, of `items` (Efron 1979).

    Draws whose statistic is NaN are left out; (nan, nan) if none is left, or if there are fewer than two items.
    """
    if len(items) < 2:
        return math.nan, math.nan
    rng = random.Random(seed)
    values = sorted(x for _ in range(draws) if not math.isnan(x := statistic(rng.choices(items, k=len(items)))))
    if not values:
        return math.nan, math.nan
    return values[round(0.025 * (len(values) - 1))], values[round(0.975 * (len(values) - 1))]


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Lines of text, the first column aligned left and the others right."""
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
    pad = [str.ljust] + [str.rjust] * (len(header) - 1)
    lines = [header, ["-" * w for w in widths], *rows]
    return "\n".join("  ".join(f(x, w) for f, x, w in zip(pad, line, widths, strict=True)) for line in lines)


def weighted_means(parts: Sequence[dict[str, tuple[Tensor | float, float]]]) -> dict[str, float]:
    """Each metric over all micro-batches: the sum of its weighted sums, divided by the sum of its weights."""
    means = {}
    for name in sorted({name for part in parts for name in part}):
        sums = [part[name] for part in parts if name in part]
        total, weight = sum(float(x) for x, _ in sums), sum(float(w) for _, w in sums)
        if weight:
            means[name] = total / weight
    return means


# ---------------------------------------------------------------------------------------------------- before and after


def before_and_after(
    start,
    policy,
    reference,
    tokenizer,
    prompts: Sequence[Example],
    a: Any,
    batching: Batching,
    embedded: bool,
    score=None,
) -> tuple[list[list[str]], dict[str, float], list[dict[str, str]]]:
    """Answer the same prompts with the model before (`start`) and after training (`policy`): rows of a table, results
    and samples.

    The KL is that to the reference. Adapters of `policy` are off where it stands for `start` or the reference.
    score(answers), where it is given, returns the reward of each answer. a: a script's flags.
    """
    stats, texts = {}, {}
    for side, model, adapters in (("before", start, models.without_lora), ("after", policy, nullcontext)):
        with adapters(model):
            answers = answer(model, tokenizer, prompts, a.max_new_tokens, a.seed, dtype=batching.dtype)
            logps = scoring.score_logps(model, answers, batching)
        with models.without_lora(reference):
            ref_logps = scoring.score_logps(reference, answers, batching)
        stats[side] = answer_stats(answers, end_ids(policy, tokenizer), embedded)
        stats[side]["kl"] = [(x - y).item() for x, y in zip(logps, ref_logps, strict=True)]
        stats[side]["score"] = score(answers).tolist() if score and answers else []
        texts[side] = [e.response_texts[0] for e in answers]
    samples = [
        {"prompt": e.prompt_text, "before": x, "after": y}
        for e, x, y in zip(prompts, texts["before"], texts["after"], strict=True)
    ]
    return *compare_stats(stats), samples


def compare_stats(stats: dict[str, dict[str, list[float]]]) -> tuple[list[list[str]], dict[str, float]]:
    """Rows of a table, and results: the mean of each statistic with a 95 % interval, before and after, over the same
    prompts.

    gain/gold is the mean paired difference of the gold reward in units of its deviation before.
    """
    rows, results = [], {}
    for name in (n for n in ANSWER_STATS if stats["after"].get(n)):
        intervals = {side: mean_interval(values[name]) for side, values in stats.items()}
        results |= {f"{side}/{name}": mean for side, (mean, _) in intervals.items()}
        rows.append([ANSWER_STATS[name], *map(interval, intervals.values())])
    before = stats["before"].get("gold", [])
    if len(before) > 1 and (unit := statistics.stdev(before)):
        gains = [(y - x) / unit for x, y in zip(before, stats["after"]["gold"], strict=True)]
        results["gain/gold"], results["gain/gold_interval"] = mean_interval(gains)
    return rows, results


def print_comparison(title: str, rows: Sequence[Sequence[str]], results: dict[str, float], samples: list[dict]) -> None:
    """The table of before and after, the gain in gold reward where it is known, and the first four samples."""
    print("\n" + table([title, "before", "after"], rows))
    if "gain/gold" in results:
        print("gain in gold reward: {gain/gold:.2f} +- {gain/gold_interval:.2f} deviations of before".format(**results))
    for sample in samples[:4]:
        print(f"\nprompt  {sample['prompt'][-300:]}\nbefore  {sample['before']}\nafter   {sample['after']}")


# ------------------------------------------------------------------------------------------------------------- pictures


def new_page(width: float, height: float):
    """A matplotlib figure of this size in inches, in the style of all pictures here; saved at 120 dots an inch."""
    matplotlib.rcParams.update(STYLE | {"axes.prop_cycle": matplotlib.cycler(color=COLOURS)})
    return figure.Figure(figsize=(width, height), layout="constrained")


def curves(out: Path, panels: dict[str, list[str]]) -> None:
    """curves.png: a panel for each title, with those of its metrics that were logged, against the step."""
    rows = [json.loads(line) for line in open(out / "metrics.jsonl")]
    panels = {t: [n for n in names if any(n in row for row in rows)] for t, names in panels.items()}
    panels = {title: names for title, names in panels.items() if names}
    columns = min(3, len(panels))
    height = math.ceil(len(panels) / columns)
    page = new_page(3.4 * columns, 2.5 * height)
    for i, (title, names) in enumerate(panels.items()):
        axes = page.add_subplot(height, columns, i + 1)
        for name in names:
            points = [(row["step"], row[name]) for row in rows if name in row]
            few = {"marker": ".", "linewidth": 2} if len(points) < 30 else {"linewidth": 0.8}
            axes.plot(*zip(*points, strict=True), label=name, **few)
        axes.set_title(title)
        axes.set_xlabel("step")
        if len(names) > 1:
            axes.legend()
    page.savefig(out / "curves.png", dpi=120)


def reward_kl_plot(out: Path) -> None:
    """reward_kl.png: the score of each rollout, and the gold reward where it is known, against its KL."""
    rows = [json.loads(line) for line in open(out / "metrics.jsonl")]
    page = new_page(6.4, 4.0)
    axes = page.add_subplot(xlabel="KL to the reference, nats an answer", ylabel="mean over a rollout's answers")
    for name, label in (("objective/scores", "score of the reward (proxy)"), ("objective/gold", "gold reward")):
        points = [(row["objective/kl"], row[name]) for row in rows if name in row]
        if points:
            axes.plot(*zip(*points, strict=True), marker=".", linestyle="", label=label)
    axes.legend()
    page.savefig(out / "reward_kl.png", dpi=120)
