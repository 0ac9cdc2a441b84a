"""Over-optimisation: what the proxy promises and what gold reward says as Best-of-n and PPO leave the SFT model.

    python -m ablations.overopt            --quick, --smoke, --seeds, --jobs

Claim (Gao, Schulman and Hilton 2022, arXiv 2210.10760): with d = sqrt(KL(pi || SFT)), the gold reward of what is chosen
by a learned reward model (the proxy) follows

    Best-of-n:  R(d) = d (a - b d)        RL:  R(d) = d (a - b log d)

and b, the over-optimisation, falls with the number of comparisons and the size of the proxy. Proxies learn from pairs
whose better answer by gold reward is chosen, except for 25 % flipped labels (Coste et al. 2023, arXiv 2310.02743), all
by the same number of updates. Best-of-n is estimated from one pool of answers by the mean over all its subsets of n
(Nakano et al. 2021, arXiv 2112.09332), at KL = log n - (n - 1) / n. PPO has no KL penalty, and is measured along the
run on held-out prompts, with the exact KL. Neither gold reward nor a proxy's data know of grammar. So there is readable
gold: gold if an answer is grammatical, else 0, the SFT model's mean. Rewards are in standard deviations of its answers.

That proxy and gold diverge is no finding: if a proxy with correlation r to gold chooses, gold keeps a share r at every
n (exactly, if both are normal). Neither is the bend of a bounded gold reward, and b has gold's scale. So b / a is
compared, and the share is relative to Best-of-n by gold itself at the same n; the test is whether it falls.

Criterion, written before the full run. Fits are by least squares for each seed; means with 95 % t-intervals over seeds.
Reproduced: all of these are above 0. Contradicted: one is below 0. Else not resolved.

    falls     share at n = 2 - share at the largest n, of Best-of-n with the fewest pairs
    order     Spearman of pairs with the share at the largest n, and with -b / a: Best-of-n at 128 dimensions
    PPO       with the fewest pairs: c of readable gold = proxy (s - c proxy): the larger the promise, the less is kept;
              b of readable gold; and AICc of the line d a - AICc of RL's form for it

Reported: the same for gold itself, for PPO with more pairs and for Best-of-n by gold itself; the widths; where readable
gold is highest, chosen on other prompts, and whether it has fallen at the end.
"""

import json
import math
import random
import shutil
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers

import sample
import train_ppo
import train_rm
import train_sft
from ablations import common, plot
from ablations.common import markdown, paired, show, t_interval, trained, write
from support import models, reviews
from support.reward_report import correlation, ranks_of
from support.rewards import load_reward
from support.runs import cli

NAME = "overopt"
CLAIM = (
    "gold keeps ever less of what the proxy promises: with d = sqrt(KL) it follows d (a - b d) or d (a - b log d), "
    "and b falls with more pairs"
)
PAIRS, WIDTHS = (800, 1600, 3200, 6400), (16, 64)
SETTINGS = {f"BoN {n}": ("BoN", 128, n) for n in PAIRS}
SETTINGS |= {f"BoN 3200, {width} wide": ("BoN", width, 3200) for width in WIDTHS}
SETTINGS |= {f"PPO {n}": ("PPO", 128, n) for n in (800, 6400)}
FEW, PPO = f"BoN {PAIRS[0]}", f"PPO {PAIRS[0]}"
FLIPPED = 0.25
RATES = {16: 1e-2, 64: 6e-3, 128: 4e-3}  # learning rates of the SFT models, by width
REWARD_MODEL = {"batch_size": 16, "epochs": 8, "max_steps": 400}  # pairs are seen 8, 4, 2 times and once
TEST, VALIDATION = 256, 128  # held-out prompts
FULL = {"pool": (24, 512), "tokens": 48, "sft": 700, "rollouts": 32, "prompts": 32, "every": 2}
QUICK = FULL | {"pool": (16, 128), "sft": 300, "rollouts": 12}
SMOKE = {"pool": (2, 8), "tokens": 8, "sft": 2, "rollouts": 2, "prompts": 4, "every": 1}


@dataclass
class Args(common.Args):
    jobs: int = 2
    """worker processes of one thread each, >= 1; the results do not depend on it"""


def main(a: Args) -> None:
    """Run what results.csv lacks, then write table and figure."""
    results, folder = common.results(NAME, a), common.work(NAME, a)
    size, seeds = (SMOKE, 1) if a.smoke else (QUICK, 1) if a.quick else (FULL, a.seeds)
    settings = [FEW, PPO] if a.smoke else [*SETTINGS]
    tasks = [(x, seed, folder, size) for seed in range(seeds) for x in settings]
    tasks = [task for task in tasks if not results.done(*task[:2])]
    torch.set_num_threads(1)  # as in the processes of `each`: the numbers must not depend on the number of cores
    if tasks:
        prepare(folder, size)
    for kind in ("BoN", "PPO"):  # BoN makes the proxies
        chosen = [task for task in tasks if SETTINGS[task[0]][0] == kind]
        for (setting, seed, *_), (curve, end), seconds in common.each(run, chosen, a.jobs, folder):
            for step, values in curve.items():
                results.add(setting, seed, values, step)
            results.add(setting, seed, end | {"seconds": seconds})
    plot.finish(NAME, a, results, report, draw)


# ------------------------------------------------------------------------------------------------------------- the runs


def prepare(folder: Path, size: dict) -> None:
    """The SFT models of all widths, and the pool: answers of the widest to held-out prompts, one row per prompt."""
    data = write(folder / "sft.jsonl", common.rows("sft", 34 * size["sft"] + 20))
    for width in (128,) if size == SMOKE else (128, *WIDTHS):
        start, tokenizer = folder / f"start-{width}", reviews.tokenizer()
        torch.manual_seed(0)
        sizes = {"hidden_size": width, "intermediate_size": 3 * width, "num_attention_heads": 2, "head_dim": width // 2}
        config = transformers.LlamaConfig(**reviews.config(tokenizer).to_dict() | sizes | {"num_key_value_heads": 2})
        models.save(transformers.LlamaForCausalLM(config), tokenizer, start)
        flags = {"max_steps": size["sft"], "eval_prompts": 0, "lr": RATES[width], "data": data}
        trained(train_sft, folder / f"sft-{width}", model="reviews" if width == 128 else str(start), **flags)
    if (folder / "pool.jsonl").exists():
        return
    (prompts, k), out = size["pool"], folder / "samples.jsonl"
    asked = write(folder / "pool-prompts.jsonl", [e.row for e in common.prompts()[1][:prompts]])
    flags = {"k": k, "batch_size": 2, "max_new_tokens": size["tokens"], "device": "cpu", "resume": out.exists()}
    sample.main(sample.Args(model=str(folder / "sft-128"), data=asked, out=str(out), **flags))
    rows = [json.loads(line) for line in open(out)]
    for row in rows:
        texts = [f"{row['prompt']} {y}" for y in row["responses"]]
        row["gold"] = [reviews.gold_reward(text) for text in texts]
        row["grammatical"] = [float(reviews.log_prob(text) > -math.inf) for text in texts]
    write(folder / "pool.jsonl", rows)


def run(setting: str, seed: int, folder: Path, size: dict):
    """Optimise one proxy -> {n or rollout: d, proxy, gold and readable gold}, and values at the end."""
    kind, width, n = SETTINGS[setting]
    proxy = make_proxy(folder, width, n, seed, size)
    return best_of_n(folder, proxy) if kind == "BoN" else ppo(folder, proxy, seed, size)


def best_of_n(folder: Path, proxy: str):
    """Best-of-n by this proxy, and by gold itself (best), for n up to half of the pool."""
    rows = [json.loads(line) for line in open(folder / "pool.jsonl")]
    gold, grammatical = (torch.tensor([row[name] for row in rows]) for name in ("gold", "grammatical"))
    gold = (gold - gold.mean()) / gold.std()
    scored = scores(proxy, rows)
    scored = (scored - scored.mean()) / scored.std()
    order, curve = scored.argsort(1), {}
    for n in (2**i for i in range(1, 20) if 2 ** (i + 1) <= len(order[0])):
        rewards = {"gold": gold, "proxy": scored, "readable": gold * grammatical, "grammatical": grammatical}
        curve[n] = {name: best_of(x.gather(1, order), n).mean().item() for name, x in rewards.items()}
        curve[n] |= {"best": best_of(gold.sort(1).values, n).mean().item()}
        curve[n] |= {"d": math.sqrt(math.log(n) - (n - 1) / n)}
        curve[n]["readable_validation"] = curve[n]["readable"]
    return curve, {"correlation": correlation(gold.flatten(), scored.flatten())}


def ppo(folder: Path, proxy: str, seed: int, size: dict):
    """PPO against this proxy without a KL penalty; after every second rollout one answer to each held-out prompt."""
    sft, out, curve = str(folder / "sft-128"), Path(proxy.replace("rm-", "ppo-")), {}
    asked = write(folder / f"prompts-{seed}.jsonl", common.rows("prompts", 6000, seed + 1))
    held = common.prompts(400 if size == SMOKE else 24_000)[1][: TEST + VALIDATION]
    policy, tokenizer = models.load_model(sft, "cpu"), models.load_tokenizer(sft)
    units = {}

    def evaluate(step: int, weights: dict) -> None:
        policy.load_state_dict(weights)
        models.save(policy, tokenizer, folder / f"now-{out.name}")
        values = common.measured(str(folder / f"now-{out.name}"), sft, held, seed, size["tokens"], reward=proxy)
        for name in ("gold", "proxy"):
            units.setdefault(name, (statistics.fmean(values[name]), statistics.stdev(values[name])))
            values[name] = [(x - units[name][0]) / units[name][1] for x in values[name]]
        values["readable"] = [x * flag for x, flag in zip(values["gold"], values["grammatical"], strict=True)]
        test = len(held) * TEST // (TEST + VALIDATION)
        curve[step] = {name: statistics.fmean(x[:test]) for name, x in values.items()}
        curve[step]["readable_validation"] = statistics.fmean(values["readable"][test:])
        curve[step]["d"] = math.sqrt(max(curve[step]["kl"], 0.0))
        if step == 0:
            curve[step]["correlation"] = correlation(*(torch.tensor(values[x]) for x in ("gold", "proxy")))

    evaluate(0, policy.state_dict())
    flags = {"model": sft, "reward": proxy, "data": asked, "out": str(out), "seed": seed, "device": "cpu"}
    flags |= {"batch_size": size["prompts"], "max_steps": size["rollouts"], "max_new_tokens": size["tokens"]}
    flags |= {"kl_coef": 0.0, "eval_prompts": 0, "save_every": size["every"]}
    shutil.rmtree(out, ignore_errors=True)  # left by an interrupted run
    with common.at_checkpoints(evaluate):
        train_ppo.main(train_ppo.Args(**flags))
    return curve, {"correlation": curve[0].pop("correlation")}


def best_of(x: torch.Tensor, n: int) -> torch.Tensor:
    """Rows [p N], ordered so that the last is best: the mean of the best over all subsets of n, [p]."""
    weights = [math.comb(i - 1, n - 1) / math.comb(x.shape[1], n) for i in range(1, x.shape[1] + 1)]
    return x.double() @ torch.tensor(weights, dtype=torch.float64)


def noisy_pairs(n: int, seed: int) -> list[dict]:
    """Two continuations of each of n prompts; the better one by gold reward is chosen, unless the label flips."""
    rng, beginnings = random.Random(f"{NAME} {seed}"), reviews.prompts(n, 1000 + seed)
    rows = reviews.preference_rows(beginnings, [reviews.continuations(p, 2, rng) for p in beginnings], 1e-6, rng)
    for row in rows:
        del row["probability"]
        if rng.random() < FLIPPED:
            row["chosen"], row["rejected"] = row["rejected"], row["chosen"]
    return rows


def make_proxy(folder: Path, width: int, n: int, seed: int, size: dict) -> str:
    """The reward model of this width, trained on n pairs of this seed."""
    out = folder / f"rm-{width}-{n}-{seed}"
    data = write(folder / f"pairs-{width}-{n}-{seed}.jsonl", noisy_pairs(n, seed))
    flags = REWARD_MODEL | ({"max_steps": 2} if size == SMOKE else {})
    flags |= {"model": str(folder / f"sft-{width}"), "data": data, "seed": seed, "eval_fraction": 0, "eval_prompts": 0}
    return trained(train_rm, out, **flags)


def scores(proxy: str, rows: list[dict]) -> torch.Tensor:
    """The proxy's rewards of all answers [p N]; equal answers are scored once."""
    answers = [[(row["prompt"], *x) for x in zip(row["responses"], row["ended"], strict=True)] for row in rows]
    unique = list(dict.fromkeys(x for row in answers for x in row))
    prompts, texts, ended = zip(*unique, strict=True)
    reward_of = dict(zip(unique, load_reward(proxy, "cpu")(prompts, texts, [{"ended": x} for x in ended]), strict=True))
    return torch.tensor([[reward_of[x] for x in row] for row in answers])


# ----------------------------------------------------------------------------------------------------- table and figure


def fit(kind: str, points: Sequence[tuple[float, float]]) -> tuple[float, float, float, float]:
    """a and b of the claim's form by least squares; R^2, the share of the squares about the mean that it explains; and
    AICc of the line d a less that of the form (Hurvich and Tsai 1989): above 0 if b is worth having."""
    d, y = torch.tensor([x for x in points if x[0] > 0], dtype=torch.float64).T
    basis = torch.stack([d, -d * d if kind == "BoN" else -d * d.log()], 1)
    coefficients = torch.linalg.lstsq(basis, y[:, None]).solution[:, 0]
    squares = lambda fitted: ((fitted - y) ** 2).sum()  # noqa: E731
    of_form, of_line = squares(basis @ coefficients), squares(d * (d @ y) / (d @ d))
    gain = aicc(of_line.item(), len(d), 1) - aicc(of_form.item(), len(d), 2)
    return *coefficients.tolist(), (1 - of_form / squares(y.mean())).item(), gain


def aicc(squares: float, n: int, coefficients: int) -> float:
    """n log(squares / n) + 2 k + 2 k (k + 1) / (n - k - 1), with k: the coefficients and the error variance."""
    k = coefficients + 1
    return n * math.log(max(squares, 1e-12) / n) + 2 * k + 2 * k * (k + 1) / max(n - k - 1, 1)


def points(results: common.Results, setting: str, seed: int, y: str, x: str = "d") -> list[tuple[float, float]]:
    """(d, reward), or (x, y), along n or along the run."""
    values = results.values_of
    keys = [(setting, seed, step) for step in results.steps(setting) if (setting, seed, step, x) in values]
    return [(values[*key, x], values[*key, y]) for key in keys]


def seeds_of(results: common.Results, setting: str) -> list[int]:
    return [*results.values(setting, "correlation")]


def by_seed(results: common.Results, setting: str, y: str = "gold") -> dict[str, dict[int, float]]:
    """Name -> {seed: value} of all that is reported on gold (or readable gold) in this setting."""
    kind, columns = SETTINGS[setting][0], {}
    for seed in seeds_of(results, setting):
        curve = points(results, setting, seed, y)
        chosen = [x for _, x in points(results, setting, seed, "readable_validation")]
        d, peak = curve[chosen.index(max(chosen))]
        a, b, explained, gain = fit(kind, curve)
        values = {"a": a, "b": b, "R^2": explained, "AICc": gain, "peak": peak, "at d": d, "end": curve[-1][1]}
        values |= {"b / a": b / a if a else math.nan, "fall": peak - curve[-1][1]}
        values["c"] = fit("BoN", points(results, setting, seed, y, "proxy"))[1]
        if kind == "BoN":
            best = points(results, setting, seed, "best")
            shares = [x / most for (_, x), (_, most) in zip(curve, best, strict=True)]
            values |= {"share": shares[-1], "share at 2": shares[0], "falls": shares[0] - shares[-1]}
        for name, value in values.items():
            columns.setdefault(name, {})[seed] = value
    return columns


def spearman(results: common.Results, name: str, sign: int) -> list[float]:
    """For each seed: rank correlation of pairs and a value of Best-of-n at 128 dimensions, times the sign."""
    settings = [x for x in SETTINGS if x in {f"BoN {n}" for n in PAIRS} and seeds_of(results, x)]
    by_setting = [by_seed(results, x)[name] for x in settings]
    ranks = lambda values: ranks_of(torch.tensor(values))  # noqa: E731
    pairs = ranks([float(SETTINGS[x][2]) for x in settings])
    return [correlation(ranks([sign * x[seed] for x in by_setting]), pairs) for seed in by_setting[0]]


def clauses(results: common.Results) -> dict[str, tuple[tuple[float, float], bool]]:
    """Name -> (mean, half interval) of what the claim says is above 0, and whether it is in the criterion."""
    mean = lambda setting, name, y="gold": t_interval([*by_seed(results, setting, y)[name].values()])  # noqa: E731
    intervals = {f"share at n = 2 minus share at the largest n: {FEW}": (mean(FEW, "falls"), True)}
    intervals["Spearman(share, pairs): BoN"] = t_interval(spearman(results, "share", 1)), True
    intervals["-Spearman(b / a, pairs): BoN"] = t_interval(spearman(results, "b / a", -1)), True
    for name in ("c", "b", "AICc"):
        intervals[f"{name}, readable gold: {PPO}"] = mean(PPO, name, "readable"), True
    settings = [x for x in SETTINGS if seeds_of(results, x)]
    for x in (x for x in settings if x.startswith("PPO")):
        intervals |= {f"readable's peak - end, {y}: {x}": (mean(x, "fall", y), False) for y in ("readable", "gold")}
    for x in (x for x in settings if "wide" in x):
        narrow, wide = by_seed(results, x), by_seed(results, x.split(",")[0])
        intervals[f"b / a: {x} - 128"] = paired(narrow["b / a"], wide["b / a"]), False
        intervals[f"share: 128 - {x}"] = paired(wide["share"], narrow["share"]), False
    return intervals


def report(results: common.Results) -> tuple[str, str, str]:
    """Tables, verdict, effect."""
    ends, forms = [], []
    cell = lambda values: show(t_interval([*values.values()]))  # noqa: E731
    for x in (x for x in SETTINGS if seeds_of(results, x)):
        last, stats = max(results.steps(x)), {y: by_seed(results, x, y) for y in ("gold", "readable")}
        row = [results.values(x, "correlation"), *(results.values(x, name, last) for name in ("d", "proxy", "gold"))]
        row += [stats["gold"].get(name) for name in ("share at 2", "share")]
        row += [*(stats["readable"][name] for name in ("end", "peak", "at d")), results.values(x, "grammatical", last)]
        ends.append([x, *(cell(values) if values else "" for values in row)])
        for y in ("gold",) if x.startswith("BoN") else ("gold", "readable"):
            forms.append([x, y, *(cell(stats[y][name]) for name in ("a", "b", "b / a", "R^2", "AICc", "c"))])
    a, b, explained, gain = fit("BoN", points(results, FEW, seeds_of(results, FEW)[0], "best"))
    forms.insert(0, ["BoN by gold itself", "gold", *(f"{x:.2f}" for x in (a, b, b / a, explained, gain)), "0.00"])
    intervals = clauses(results)
    lines = [[x, show(y, 3), common.verdict([y]), "yes" if judged else ""] for x, (y, judged) in intervals.items()]
    titles = ["r", "d", "proxy", "gold", "share at n = 2", "share", "readable", "at its peak", "at d", "grammatical"]
    parts = [
        markdown(["proxy of so many pairs", *titles], ends),
        markdown(["", "fit of", "a", "b", "b / a", "R^2", "AICc, line - form", "c"], forms),
        markdown(["quantity (claim: above 0)", "mean", "above 0?", "in the criterion"], lines),
    ]
    effect = "; ".join(f"{x.replace(': ', ', ')}: {y}" for x, y, _, judged in lines if judged) + "."
    return "\n\n".join(parts), common.verdict([y for y, judged in intervals.values() if judged]), effect


def draw(results: common.Results, page) -> None:
    """Proxy (dashed, means) and gold against d, with its fit to all seeds: Best-of-n, PPO, and PPO's readable gold."""
    panels = page.subplots(1, 3, sharey=True)
    for axes, (kind, y) in zip(panels, (("BoN", "gold"), ("PPO", "gold"), ("PPO", "readable")), strict=True):
        settings = [x for x in SETTINGS if x.startswith(kind) and seeds_of(results, x)]
        for colour, x in ((f"C{list(SETTINGS.values()).index(('BoN', *SETTINGS[x][1:]))}", x) for x in settings):
            gold = [point for seed in seeds_of(results, x) for point in points(results, x, seed, y)]
            axes.plot(*zip(*gold, strict=True), ".", color=colour, markersize=2)
            a, b, *_ = fit(kind, gold)
            ds = torch.linspace(0.02, max(d for d, _ in gold), 100).tolist()
            ys = [d * (a - b * (d if kind == "BoN" else math.log(d))) for d in ds]
            axes.plot(ds, ys, color=colour, label=x.removeprefix(f"{kind} "), linewidth=1)
            steps, mean = results.steps(x), lambda n, step, x=x: statistics.fmean(results.values(x, n, step).values())
            ds = [mean("d", step) for step in steps]
            axes.plot(ds, [mean("proxy", step) for step in steps], "--", color=colour, linewidth=0.8)
        if kind == "BoN":
            axes.plot(ds, [mean("best", step) for step in steps], "k:", linewidth=0.8, label="gold itself")
        axes.set_title(f"{kind}, {'readable ' * (y == 'readable')}gold", fontsize=9)
        axes.set_xlabel("d = sqrt(KL)", fontsize=8)
        axes.tick_params(labelsize=7)
        axes.grid(alpha=0.3)
        axes.legend(fontsize=6)
    panels[0].set_ylabel("reward, deviations of SFT answers (dashed: proxy)", fontsize=8)


if __name__ == "__main__":
    cli(main, Args)
