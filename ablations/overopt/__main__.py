"""Over-optimisation: what the proxy promises and what gold reward says, as Best-of-n and PPO leave the SFT model.

    python -m ablations.overopt            --quick, --smoke, --seeds

Claim (Gao, Schulman and Hilton 2022, arXiv 2210.10760): with d = sqrt(KL(pi || SFT)), the gold reward of what is chosen
by a learned reward model (the proxy) follows

    Best-of-n:  R(d) = d (a - b d)        RL:  R(d) = d (a - b log d)

and b, the over-optimisation, falls with the number of comparisons and the size of the proxy. Proxies learn from pairs
whose better answer by gold reward is chosen, but for 25 % flipped labels (Coste et al. 2023, arXiv 2310.02743); they
have 128 dimensions and the SFT model's weights, or 16 and those of an SFT model of that width. Best-of-n is estimated
from one pool of answers by the mean over all its subsets of n (Nakano et al. 2021, arXiv 2112.09332), at KL = log n -
(n - 1) / n; PPO has no KL penalty, and its KL is measured. Rewards are in deviations of the pool, from its mean.

Criterion, written before the full run. Fits are by least squares for each seed; means with 95 % t-intervals over seeds.
Reproduced: all of these are above 0. Contradicted: one is below 0. Else not resolved.

    gap      slope in d of proxy - gold, with the fewest pairs: Best-of-n, and PPO
    b        of PPO, with the fewest pairs
    order    -Spearman(b, pairs) of Best-of-n at 128 dimensions

Best-of-n has 5 seeds, PPO has 3. PPO's order, the effect of the width, how well the forms fit and where the curves peak
are reported; so is Best-of-n by gold itself, which was added after the results (there is one pool, so one seed).
"""

import json
import math
import random
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
import transformers

import sample
import train_ppo
import train_rm
import train_sft
from ablations import common, plot
from ablations.common import markdown, show, t_interval, trained, write
from rlhf import reviews
from rlhf.rewards import load_reward
from rlhf.runs import cli

NAME = "overopt"
CLAIM = "the proxy outruns gold as KL grows; gold follows d (a - b d) or d (a - b log d), and b falls with more pairs"
PAIRS, NARROW = (100, 400, 1600, 6400), 16
SETTINGS = {f"Best-of-n, {n} pairs": ("Best-of-n", 128, n) for n in PAIRS}
SETTINGS |= {f"Best-of-n, 1600 pairs, {NARROW} wide": ("Best-of-n", NARROW, 1600)}
SETTINGS |= {f"PPO, {n} pairs": ("PPO", 128, n) for n in (100, 1600)}
COLOURS = ("tab:red", "tab:orange", "tab:green", "tab:blue", "tab:gray", "black")
GOLD = "Best-of-n, by gold itself"
SETTINGS |= {GOLD: ("Best-of-n", 0, 0)}
FLIPPED = 0.25
PPO_SEEDS = 3
FULL = {"pool": (24, 512), "tokens": 48, "sft": 700, "rollouts": 24, "prompts": 32, "every": 2}
QUICK = FULL | {"pool": (16, 128), "sft": 300, "rollouts": 10}
SMOKE = {"pool": (2, 8), "tokens": 8, "sft": 2, "rollouts": 2, "prompts": 4, "every": 1}


@dataclass
class Args(common.Args):
    seeds: int = 5
    """seeds 0, 1, ... of Best-of-n, >= 1; PPO has at most 3"""


def main(a: Args) -> None:
    """Runs what results.csv does not have, and writes table and figure."""
    results, folder = common.results(NAME, a), common.work(NAME, a)
    size, seeds = (SMOKE, 1) if a.smoke else (QUICK, 1) if a.quick else (FULL, a.seeds)
    settings = {x: kind for x, (kind, _, n) in SETTINGS.items() if not a.smoke or n == 100}
    most = {x: 1 if x == GOLD else PPO_SEEDS if kind == "PPO" else seeds for x, kind in settings.items()}
    tasks = [(x, seed, folder, size) for seed in range(seeds) for x in settings if seed < most[x]]
    tasks = [task for task in tasks if not results.done(*task[:2])]
    for (setting, seed, *_), (along, end), seconds in common.each(run, tasks, 1, folder):
        for step, values in along.items():
            results.add(setting, seed, values, step)
        results.add(setting, seed, end | {"seconds": seconds})
    plot.finish(NAME, a, results, report, draw)


# ------------------------------------------------------------------------------------------------------------- the runs


def run(setting: str, seed: int, folder: Path, size: dict):
    """One proxy optimised -> {n, or rollout: d, proxy and gold reward}, and what is known at the end."""
    kind, width, n = SETTINGS[setting]
    sft = make_sft(folder, 128, size["sft"])
    rows = pool(folder, sft, *size["pool"], size["tokens"])
    golds = torch.tensor([[reviews.gold_reward(f"{x['prompt']} {y}") for y in x["responses"]] for x in rows])
    proxy = make_proxy(folder, width, n, seed, size) if n else ""
    proxies = scores(proxy, rows) if proxy else golds
    end = {"correlation": torch.corrcoef(torch.stack([golds.flatten(), proxies.flatten()]))[0, 1].item()}
    in_units = {  # of the pool
        "gold": lambda x: (x - golds.mean().item()) / golds.std().item(),
        "proxy": lambda x: (x - proxies.mean().item()) / proxies.std().item(),
    }
    if kind == "Best-of-n":
        order, along = proxies.argsort(1), {}
        for drawn in (2**i for i in range(1, 20) if 2 ** (i + 1) <= len(order[0])):
            best = {"gold": best_of(golds.gather(1, order), drawn), "proxy": best_of(proxies.gather(1, order), drawn)}
            along[drawn] = {name: in_units[name](x.mean().item()) for name, x in best.items()}
            along[drawn]["d"] = math.sqrt(math.log(drawn) - (drawn - 1) / drawn)
        return along, end

    asked = write(folder / f"prompts-{seed}.jsonl", common.rows("prompts", 6000, seed + 1))
    out, flags = (
        folder / f"ppo-{n}-{seed}",
        {"data": str(asked), "kl_coef": 0.0, "batch_size": size["prompts"], "max_steps": size["rollouts"]},
    )
    flags |= {"max_new_tokens": size["tokens"], "seed": seed, "eval_prompts": 0}
    policy = trained(train_ppo, out, model=sft, reward=proxy, **flags)
    lines, along, every = [json.loads(line) for line in open(out / "metrics.jsonl")], {}, size["every"]
    for part in (lines[i : i + every] for i in range(0, len(lines), every)):
        gold, score, kl = (statistics.fmean(x[f"objective/{name}"] for x in part) for name in ("gold", "scores", "kl"))
        found = {"gold": in_units["gold"](gold), "proxy": in_units["proxy"](score), "d": math.sqrt(max(kl, 0.0))}
        along[part[-1]["step"]] = found
    held = common.prompts(400 if size == SMOKE else 24_000)[1][:256]
    measured = common.measured(policy, sft, held, seed, size["tokens"])
    return along, end | {name: statistics.fmean(measured[name]) for name in ("grammatical", "kl", "length")}


def best_of(x: torch.Tensor, n: int) -> torch.Tensor:
    """Of rows [p N], in an order in which the last is best: the mean over all subsets of n of each one's best, [p]."""
    weights = [math.comb(i - 1, n - 1) / math.comb(x.shape[1], n) for i in range(1, x.shape[1] + 1)]
    return x.double() @ torch.tensor(weights, dtype=torch.float64)


def noisy_pairs(n: int, seed: int) -> list[dict]:
    """Two continuations of each of n prompts; the better one by gold reward is chosen, but where the label flips."""
    rng, beginnings = random.Random(f"{NAME} {seed}"), reviews.prompts(n, 1000 + seed)
    rows = reviews.preference_rows(beginnings, [reviews.continuations(p, 2, rng) for p in beginnings], 1e-6, rng)
    for row in rows:
        del row["probability"]
        if rng.random() < FLIPPED:
            row["chosen"], row["rejected"] = row["rejected"], row["chosen"]
    return rows


def make_proxy(folder: Path, width: int, n: int, seed: int, size: dict) -> str:
    """The reward model of this width that learnt from n pairs of this seed."""
    data, out = folder / f"pairs-{n}-{seed}.jsonl", folder / f"rm-{width}-{n}-{seed}"
    if not data.exists():
        write(data, noisy_pairs(n, seed))
    flags = {"data": str(data), "batch_size": 16, "epochs": 1 if n > 1600 else 4, "seed": seed, "eval_prompts": 0}
    flags |= {"max_steps": 2} if size == SMOKE else {}
    return trained(train_rm, out, model=make_sft(folder, width, size["sft"]), **flags)


def make_sft(folder: Path, width: int, steps: int) -> str:
    """The SFT model of the embedded task, of its own width or narrower."""
    out, start = folder / f"sft-{width}", "reviews"
    if train_sft.is_made(str(out)):
        return str(out)
    if width != 128:
        torch.manual_seed(0)
        tokenizer, start = reviews.tokenizer(), str(folder / f"start-{width}")
        sizes = {"hidden_size": width, "intermediate_size": 3 * width, "num_attention_heads": 2, "head_dim": width // 2}
        config = transformers.LlamaConfig(**reviews.config(tokenizer).to_dict() | sizes | {"num_key_value_heads": 2})
        transformers.LlamaForCausalLM(config).save_pretrained(start)
        tokenizer.save_pretrained(start)
    data = write(folder / "sft.jsonl", common.rows("sft", 34 * steps + 20))
    flags = {"max_steps": steps, "eval_prompts": 0, "lr": 4e-3 if width == 128 else 1e-2}
    return trained(train_sft, out, model=start, data=str(data), **flags)


@cache
def pool(folder: Path, sft: str, prompts: int, answers: int, tokens: int) -> list[dict]:
    """Answers of the SFT model to held-out prompts, a row a prompt."""
    out = folder / "pool.jsonl"
    asked = write(folder / "pool-prompts.jsonl", [e.row for e in common.prompts()[1][:prompts]])
    flags = {"k": answers, "batch_size": 2, "max_new_tokens": tokens, "device": "cpu", "resume": out.exists()}
    sample.main(sample.Args(model=sft, data=str(asked), out=str(out), **flags))
    return [json.loads(line) for line in open(out)]


def scores(proxy: str, rows: list[dict]) -> torch.Tensor:
    """The proxy's rewards of all answers [p N]; equal ones are scored once."""
    answers = [[(row["prompt"], *x) for x in zip(row["responses"], row["ended"], strict=True)] for row in rows]
    once = list(dict.fromkeys(x for row in answers for x in row))
    asked, texts, ended = zip(*once, strict=True)
    found = dict(zip(once, load_reward(proxy, "cpu")(asked, texts, [{"ended": x} for x in ended]), strict=True))
    return torch.tensor([[found[x] for x in row] for row in answers])


# ----------------------------------------------------------------------------------------------------- table and figure


def fit(kind: str, points: Sequence[tuple[float, float]]) -> tuple[float, float, float]:
    """a, b of the claim's form by least squares, and the share of the squares about the mean that it leaves."""
    d, y = torch.tensor([x for x in points if x[0] > 0], dtype=torch.float64).T
    basis = torch.stack([d, -d * d if kind == "Best-of-n" else -d * d.log()], 1)
    a, b = torch.linalg.lstsq(basis, y[:, None]).solution[:, 0].tolist()
    left = ((basis @ torch.tensor([a, b], dtype=torch.float64) - y) ** 2).sum() / ((y - y.mean()) ** 2).sum()
    return a, b, left.item()


def points(results: common.Results, setting: str, seed: int, name: str) -> list[tuple[float, float]]:
    """(d, reward) along n or along the run."""
    found = [[results.values(setting, x, step) for x in ("d", name)] for step in results.steps(setting)]
    return [(d[seed], y[seed]) for d, y in found if seed in d]


def seeds_of(results: common.Results, setting: str) -> list[int]:
    return [*results.values(setting, "correlation")]


def fits(results: common.Results, setting: str) -> dict[int, tuple[float, float, float]]:
    """Seed -> fit of the gold reward."""
    kind = SETTINGS[setting][0]
    return {seed: fit(kind, points(results, setting, seed, "gold")) for seed in seeds_of(results, setting)}


def gap_slope(results: common.Results, setting: str, seed: int) -> float:
    """Slope in d, through 0, of proxy - gold."""
    both = zip(*(points(results, setting, seed, name) for name in ("proxy", "gold")), strict=True)
    gaps = [(d, y - z) for (d, y), (_, z) in both]
    return sum(d * gap for d, gap in gaps) / sum(d * d for d, _ in gaps)


def order(results: common.Results, kind: str) -> list[float]:
    """-Spearman(b, pairs) of each seed, at 128 dimensions."""
    there = [x for x, (y, width, _) in SETTINGS.items() if (y, width) == (kind, 128) and seeds_of(results, x)]
    found = []
    for seed in seeds_of(results, there[0]):
        values = torch.tensor([fits(results, x)[seed][1] for x in there])
        pairs = torch.tensor([float(SETTINGS[x][2]) for x in there])
        found.append(
            -train_rm.correlation(train_rm.ranks_of(values), train_rm.ranks_of(pairs)) if len(there) > 1 else 0.0
        )
    return found


def clauses(results: common.Results) -> dict[str, tuple[tuple[float, float], bool]]:
    """Differences that the claim says are above 0, with half their intervals; whether they are in the criterion."""
    few, ppo = f"Best-of-n, {PAIRS[0]} pairs", f"PPO, {PAIRS[0]} pairs"
    found = {}
    for x in (few, ppo):
        found[f"slope of proxy - gold: {x}"] = (
            t_interval([gap_slope(results, x, s) for s in seeds_of(results, x)]),
            True,
        )
    found[f"b: {ppo}"] = t_interval([b for _, b, _ in fits(results, ppo).values()]), True
    found["-Spearman(b, pairs): Best-of-n"] = t_interval(order(results, "Best-of-n")), True
    found["-Spearman(b, pairs): PPO"] = t_interval(order(results, "PPO")), False
    narrow, wide = f"Best-of-n, 1600 pairs, {NARROW} wide", "Best-of-n, 1600 pairs"
    if seeds_of(results, narrow):
        of = [{seed: b for seed, (_, b, _) in fits(results, x).items()} for x in (narrow, wide)]
        found[f"b: {NARROW} - 128 wide, Best-of-n, 1600 pairs"] = common.paired(*of), False
    return found


def report(results: common.Results) -> tuple[str, str, str]:
    """Table, verdict, effect."""
    rows = []
    for x in SETTINGS:
        if not (seeds := seeds_of(results, x)):
            continue
        a, b, left = zip(*fits(results, x).values(), strict=True)
        last = [points(results, x, seed, "gold")[-1] for seed in seeds]
        ends = [
            [d for d, _ in last],
            [points(results, x, seed, "proxy")[-1][1] for seed in seeds],
            [y for _, y in last],
        ]
        peaks = [max(y for _, y in points(results, x, seed, "gold")) for seed in seeds]
        cells = [
            show(t_interval(values)) for values in ([*results.values(x, "correlation").values()], *ends, peaks, a, b)
        ]
        fluent = [*results.values(x, "grammatical").values()]
        rows.append([x, *cells, f"{1 - statistics.fmean(left):.2f}", show(t_interval(fluent)) if fluent else ""])
    titles = [
        "correlation",
        "d at the end",
        "proxy there",
        "gold there",
        "highest gold",
        "a",
        "b",
        "R^2",
        "grammatical",
    ]
    found = clauses(results)
    lines = [[x, show(y, 3), common.verdict([y]), "yes" if inside else ""] for x, (y, inside) in found.items()]
    parts = [
        markdown(["proxy", *titles], rows),
        markdown(["above 0 by the claim", "mean", "above 0?", "in the criterion"], lines),
    ]
    effect = f"{lines[1][0]} {lines[1][1]}; {lines[2][0]} {lines[2][1]}; {lines[3][0]} {lines[3][1]}."
    return "\n\n".join(parts), common.verdict([y for y, inside in found.values() if inside]), effect


def draw(results: common.Results, page) -> None:
    """Proxy (dashed) and gold against d, means over seeds, and the fit of gold to all of them."""
    both = page.subplots(1, 2)
    for axes, kind in zip(both, ("Best-of-n", "PPO"), strict=True):
        there = [x for x in SETTINGS if x.startswith(kind) and seeds_of(results, x)]
        for x, colour in zip(there, COLOURS, strict=False):
            gold = [point for seed in seeds_of(results, x) for point in points(results, x, seed, "gold")]
            axes.plot(*zip(*gold, strict=True), ".", color=colour, markersize=2)
            a, b, _ = fit(kind, gold)
            ds = torch.linspace(0.02, max(d for d, _ in gold), 100).tolist()
            ys = [d * (a - b * (d if kind == "Best-of-n" else math.log(d))) for d in ds]
            axes.plot(ds, ys, color=colour, label=x.removeprefix(f"{kind}, "))
            steps, at = results.steps(x), lambda n, step, x=x: statistics.fmean(results.values(x, n, step).values())
            axes.plot([at("d", s) for s in steps], [at("proxy", s) for s in steps], "--", color=colour, linewidth=0.8)
        axes.set_title(f"{kind}: proxy (dashed), gold with its fit", fontsize=9)
        axes.set_xlabel("d = sqrt(KL)")
        axes.grid(alpha=0.3)
        axes.legend(fontsize=7)
    both[0].set_ylabel("reward, deviations of SFT answers")


if __name__ == "__main__":
    cli(main, Args)
