"""What a run reports at its end: intervals, tables, curves, and answers before and after training.

mean_interval, share_interval    95 % intervals of a mean and of a share
bootstrap                        that of any statistic
table, interval                  numbers as text
weighted_means                   metrics over micro-batches
before_and_after                 the same prompts answered by the model before and after training
curves, reward_kl_plot           the pictures of a run directory
"""

import math
import random
import re
import statistics
from collections import defaultdict
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from support import lazy_import, models, read_json_lines, scoring
from support.examples import Example
from support.generate import answer, answer_stats, end_ids
from support.scoring import Batching

figure, matplotlib = lazy_import("matplotlib.figure"), lazy_import("matplotlib")

ANSWER_STATS = {  # what is measured of sampled answers (generate.answer_stats), as the tables name it
    "gold": "gold reward",
    "score": "reward (--reward)",
    "grammatical": "grammatical share",
    "kl": "KL to the reference, nats per answer",
    "length": "length, tokens",
    "ended": "share that ends with EOS",
}
SHARE_STATS = {"grammatical", "ended"}

# after Okabe and Ito, so that colour-blind readers can tell them apart
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#8C510A", "#7F7F7F")
T = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)  # Student's t, 97.5 %, 1 to 9 degrees of freedom
STYLE = {"font.size": 9, "axes.titlesize": 9, "legend.fontsize": 8, "axes.grid": True, "grid.alpha": 0.3}

# ----------------------------------------------------------------------------------------------- intervals and tables


def student(n: int) -> float:
    """97.5 % quantile of Student's t with n >= 1 degrees of freedom; from 10 on the expansion around the normal
    quantile of Fisher and Cornish 1960, exact to 0.001 there."""
    if n <= len(T):
        return T[n - 1]
    z = 1.959964
    terms = (z**3 + z) / 4, (5 * z**5 + 16 * z**3 + 3 * z) / 96, (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384
    return z + sum(term / n**i for i, term in enumerate(terms, 1))


def standard_error(sums: Sequence[float | int], counts: Sequence[float | int]) -> float:
    """Standard error of the mean of all values, given each group's sum and number of values; infinite for one group.

    se^2 = G / (G - 1) * sum over the G groups of (sum_g - mean count_g)^2 / (number of values)^2
    """
    groups, mean = len(sums), sum(sums) / sum(counts)
    squares = sum((x - mean * n) ** 2 for x, n in zip(sums, counts, strict=True))
    return math.sqrt(squares * groups / (groups - 1)) / sum(counts) if groups > 1 else math.inf


def mean_interval(values: Sequence[float], groups: Sequence | None = None) -> tuple[float, float]:
    """Mean, and half the width of its 95 % interval: `standard_error` times Student's t at the number of groups minus
    1; infinite for fewer than two groups.

    Values of one group, such as those of one prompt, may depend on each other; by default each is its own group.
    """
    mean, deviations, counts = statistics.fmean(values), defaultdict(float), defaultdict(int)
    for value, group in zip(values, range(len(values)) if groups is None else groups, strict=True):
        deviations[group] += value - mean
        counts[group] += 1
    if len(counts) < 2:
        return mean, math.inf
    return mean, student(len(counts) - 1) * standard_error([*deviations.values()], [*counts.values()])


def share_interval(sums: Sequence[float | int], counts: Sequence[float | int]) -> tuple[float, float]:
    """95 % interval of the mean p of values in [0, 1], which stays in [0, 1] and has a width at p = 0 and 1:

        (p + t^2 / 2n -+ t sqrt(p (1 - p) / n + t^2 / 4n^2)) / (1 + t^2 / n),   n = p (1 - p) / se^2

    Wilson 1927, with an effective number of values n, from the `standard_error` over G groups, and Student's t at
    G - 1: values may be fractions, and those of a group may depend on each other. If all values are the same x, se says
    nothing; then a share q = t^2 / (G + t^2) of groups may yet be found that has 0 or 1 instead, and the interval is
    [x (1 - q), x (1 - q) + q], which for x = 0 and 1 is Wilson's with n = G. sums, counts: the sum and the number of
    each group's values; groups without any are left out. (nan, nan) for fewer than two groups.
    """
    groups = [(x, n) for x, n in zip(sums, counts, strict=True) if n]
    if len(groups) < 2:
        return math.nan, math.nan
    p, error = sum(x for x, _ in groups) / sum(n for _, n in groups), standard_error(*zip(*groups, strict=True))
    t2 = student(len(groups) - 1) ** 2
    if error < 1e-9:
        q = t2 / (len(groups) + t2)
        return p * (1 - q), p * (1 - q) + q
    n = p * (1 - p) / error**2
    half = math.sqrt(t2 * (p * (1 - p) / n + t2 / (4 * n * n)))
    return (p + t2 / (2 * n) - half) / (1 + t2 / n), (p + t2 / (2 * n) + half) / (1 + t2 / n)


def share_and_half(values: Sequence[float], groups: Sequence | None = None) -> tuple[float, float]:
    """As `mean_interval` for values in [0, 1]: their mean, and the longer side of its `share_interval`, so that a share
    that is 0 or 1 in the sample is not said to be certain."""
    sums, counts = defaultdict(float), defaultdict(int)
    for value, group in zip(values, range(len(values)) if groups is None else groups, strict=True):
        sums[group] += value
        counts[group] += 1
    mean = statistics.fmean(values)
    low, high = share_interval([*sums.values()], [*counts.values()])
    return mean, math.inf if math.isnan(low) else max(high - mean, mean - low)


def stat_interval(name: str, values: Sequence[float], groups: Sequence | None = None) -> tuple[float, float]:
    """`share_and_half` of a statistic that is a share (SHARE_STATS), `mean_interval` of any other."""
    return (share_and_half if name in SHARE_STATS else mean_interval)(values, groups)


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


def visible(text: str) -> str:
    """The text, safe for a terminal: control characters, which could take it over, are written as \\x1b and so on."""
    return re.sub(r"[\0-\x08\x0b-\x1f\x7f-\x9f]", lambda x: f"\\x{ord(x[0]):02x}", text)


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Lines of text, the first column aligned left and the others right."""
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
    pad = [str.ljust] + [str.rjust] * (len(header) - 1)
    lines = [header, ["-" * w for w in widths], *rows]
    return "\n".join("  ".join(f(x, w) for f, x, w in zip(pad, line, widths, strict=True)) for line in lines)


Totals = dict[str, tuple[Tensor | float, Tensor | float]]  # a metric's weighted sum, and the sum of its weights


def read(parts: Sequence[Totals]) -> list[Totals]:
    """The totals of a step's micro-batches as numbers, with one read of the device."""
    tensors = [x for part in parts for pair in part.values() for x in pair if isinstance(x, Tensor)]
    numbers = iter(torch.stack([x.double() for x in tensors]).tolist() if tensors else ())
    number = lambda x: next(numbers) if isinstance(x, Tensor) else x  # noqa: E731
    return [{name: (number(total), number(weight)) for name, (total, weight) in part.items()} for part in parts]


def weighted_means(parts: Sequence[Totals]) -> dict[str, float]:
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
            settings = {"dtype": batching.dtype, "progress": f"answers {side} training"}
            answers = answer(model, tokenizer, prompts, a.max_new_tokens, a.seed, **settings)
            logps = scoring.score_logps(model, answers, batching)
        ref_logps = logps
        if side == "after" or start is not reference:
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
        intervals = {side: stat_interval(name, values[name]) for side, values in stats.items()}
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
        gain = "{gain/gold:.2f} +- {gain/gold_interval:.2f}".format(**results)
        print(f"gain in gold reward: {gain} standard deviations of the gold reward before training")
    for sample in samples[:4]:
        texts = f"prompt  {sample['prompt'][-300:]}\nbefore  {sample['before']}\nafter   {sample['after']}"
        print("\n" + visible(texts))


# ------------------------------------------------------------------------------------------------------------- pictures


def new_page(width: float, height: float):
    """A matplotlib figure of this size in inches, in the style of all pictures here; saved at 120 dots an inch."""
    matplotlib.rcParams.update(STYLE | {"axes.prop_cycle": matplotlib.cycler(color=COLOURS)})
    return figure.Figure(figsize=(width, height), layout="constrained")


def curves(out: Path, panels: dict[str, list[str]]) -> None:
    """curves.png: a panel for each title, with those of its metrics that were logged, against the step."""
    rows = read_json_lines(out / "metrics.jsonl", "step")
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
    rows = read_json_lines(out / "metrics.jsonl", "step")
    page = new_page(6.4, 4.0)
    axes = page.add_subplot(xlabel="KL to the reference, nats per answer", ylabel="mean over a rollout's answers")
    for name, label in (("objective/scores", "reward (proxy)"), ("objective/gold", "gold reward")):
        points = [(row["objective/kl"], row[name]) for row in rows if name in row]
        if points:
            axes.plot(*zip(*points, strict=True), marker=".", linestyle="", label=label)
    axes.legend()
    page.savefig(out / "reward_kl.png", dpi=120)
