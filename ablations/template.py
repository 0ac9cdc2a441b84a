"""A template: copy it to ablations/NAME/__main__.py, with a README beside it, and change what it says.

    python -m ablations.template --smoke

Claim (author, year, section, arXiv id): with --label-smoothing 0.2 DPO ends at a lower KL to the reference.
Criterion, written before the full run: the whole 95 % t-interval of the KL of "dpo" less that of "smoothed", paired by
seed, is above 0: reproduced. Contradicted: all of it is below 0. Else not resolved.
"""

import statistics
from pathlib import Path

import train_dpo
from ablations import common, plot
from ablations.common import markdown, paired, show, t_interval
from support.runs import cli

NAME = Path(__file__).parent.name if Path(__file__).stem == "__main__" else "template"  # the folder's name
CLAIM = "with smoothed labels DPO ends at a lower KL"
SETTINGS = {"dpo": {}, "smoothed": {"label_smoothing": 0.2}}  # setting: flags of train_dpo.py
PAIRS, TEST = 6400, 256  # preferences of each seed, held-out prompts


def main(a: common.Args) -> None:
    """Run what results.csv lacks, then write table and figure."""
    results, folder = common.results(NAME, a), common.work(NAME, a)
    seeds, pairs = (range(1), 40) if a.smoke else (range(min(a.seeds, 2)), 1600) if a.quick else (range(a.seeds), PAIRS)
    model = common.sft_model(folder, a.smoke)
    tasks = [(x, seed, folder, model, pairs) for seed in seeds for x in SETTINGS if not results.done(x, seed)]
    for (setting, seed, *_), values, seconds in common.each(run, tasks, 1, folder):
        results.add(setting, seed, values | {"seconds": seconds})
    plot.finish(NAME, a, results, report, draw)


def run(setting: str, seed: int, folder: Path, model: str, pairs: int) -> dict[str, float]:
    """One run -> {metric: value}. The settings of a seed have the same data; all else that is random has the seed."""
    data = common.write(folder / f"pairs-{seed}.jsonl", common.rows("preference", pairs, seed))
    flags = {"model": model, "data": data, "seed": seed, "eval_prompts": 0, "ref_cache": str(folder / "ref_cache")}
    policy = common.trained(train_dpo, folder / f"{setting}-{seed}", **flags, **SETTINGS[setting])
    measured = common.measured(policy, model, common.prompts()[1][: min(TEST, pairs)], seed, 48)
    return {metric: statistics.fmean(measured[metric]) for metric in ("kl", "gold")}


def report(results: common.Results) -> tuple[str, str, str]:
    """Table, verdict, effect."""
    rows = [[x, *(show(t_interval([*results.values(x, n).values()])) for n in ("kl", "gold"))] for x in SETTINGS]
    difference, header = paired(*(results.values(x, "kl") for x in SETTINGS)), ["setting", "KL, nats", "gold reward"]
    return markdown(header, rows), common.verdict([difference]), f"KL: dpo - smoothed {show(difference)}."


def draw(results: common.Results, page) -> None:
    """Gold reward against KL, a point a seed."""
    axes = page.add_subplot(xlabel="KL to the SFT model, nats per answer", ylabel="gold reward")
    for x in SETTINGS:
        axes.plot(*([*results.values(x, n).values()] for n in ("kl", "gold")), "o", label=x)
    axes.legend()


if __name__ == "__main__":
    cli(main, common.Args)
