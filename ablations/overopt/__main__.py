"""Over-optimisation: what the proxy promises and what gold reward says, as Best-of-n and PPO leave the SFT model.

    python -m ablations.overopt            --quick, --smoke, --seeds, --jobs

Claim (Gao, Schulman and Hilton 2022, arXiv 2210.10760): with d = sqrt(KL(pi || SFT)), the gold reward of what is chosen
by a learned reward model (the proxy) follows

    Best-of-n:  R(d) = d (a - b d)        RL:  R(d) = d (a - b log d)

and b, the over-optimisation, falls with the number of comparisons and the size of the proxy. Proxies learn from pairs
whose better answer by gold reward is chosen, but for 25 % flipped labels (Coste et al. 2023, arXiv 2310.02743), all by
the same number of updates. Best-of-n is estimated from one pool of answers by the mean over all its subsets of n
(Nakano et al. 2021, arXiv 2112.09332), at KL = log n - (n - 1) / n. PPO has no KL penalty, and is measured along the
run on held-out prompts, with the exact KL. Neither gold reward nor a proxy's data know of grammar, so readable gold is
there too: gold where an answer is grammatical, else 0, the SFT model's mean. Rewards are in deviations of its answers.

That proxy and gold part is no finding: by a proxy that correlates with gold by r, gold keeps a share r at every n
(exactly, where both are normal). Nor is a bend of a gold reward that is bounded, and b has gold's scale. So b / a is
compared, and the share is of the gold that Best-of-n by gold itself has at the same n; tested is whether it falls.

Criterion, written before the full run. Fits are by least squares for each seed; means with 95 % t-intervals over seeds.
Reproduced: all of these are above 0. Contradicted: one is below 0. Else not resolved.

    falls     share at n = 2 - share at the largest n, of Best-of-n with the fewest pairs
    order     Spearman of pairs with the share at the largest n, and with -b / a: Best-of-n at 128 dimensions
    PPO       with the fewest pairs: c of readable gold = proxy (s - c proxy), a promise kept less the more it promises;
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
CLAIM = "gold keeps ever less of what the proxy promises: d (a - b d) or d (a - b log d), and b falls with more pairs"
PAIRS, WIDTHS = (800, 1600, 3200, 6400), (16, 64)
SETTINGS = {f"BoN {n}": ("BoN", 128, n) for n in PAIRS}
SETTINGS |= {f"BoN 3200, {width} wide": ("BoN", width, 3200) for width in WIDTHS}
SETTINGS |= {f"PPO {n}": ("PPO", 128, n) for n in (800, 6400)}
FEW, PPO = f"BoN {PAIRS[0]}", f"PPO {PAIRS[0]}"
FLIPPED = 0.25
RATES = {16: 1e-2, 64: 6e-3, 128: 4e-3}  # of the SFT models, by width
REWARD_MODEL = {"batch_size": 16, "epochs": 8, "max_steps": 400}  # all pairs 8, 4, 2 times and once
TEST, VALIDATION = 256, 128  # held-out prompts
FULL = {"pool": (24, 512), "tokens": 48, "sft": 700, "rollouts": 32, "prompts": 32, "every": 2}
QUICK = FULL | {"pool": (16, 128), "sft": 300, "rollouts": 12}
SMOKE = {"pool": (2, 8), "tokens": 8, "sft": 2, "rollouts": 2, "prompts": 4, "every": 1}


@dataclass
class Args(common.Args):
    jobs: int = 2
    """processes, one thread each, >= 1; the results do not depend on it"""


def main(a: Args) -> None:
    """Runs what results.csv does not have, and writes table and figure."""
    results, folder = common.results(NAME, a), common.work(NAME, a)
    size, seeds = (SMOKE, 1) if a.smoke else (QUICK, 1) if a.quick else (FULL, a.seeds)
    settings = [FEW, PPO] if a.smoke else [*SETTINGS]
    tasks = [(x, seed, folder, size) for seed in range(seeds) for x in settings]
    tasks = [task for task in tasks if not results.done(*task[:2])]
    torch.set_num_threads(1)  # as in the processes of `each`, so that the numbers do not depend on the machine's cores
    if tasks:
        prepare(folder, size)
    for kind in ("BoN", "PPO"):  # the first makes the proxies
        own = [task for task in tasks if SETTINGS[task[0]][0] == kind]
        for (setting, seed, *_), (along, end), seconds in common.each(run, own, a.jobs, folder):
            for step, values in along.items():
                results.add(setting, seed, values, step)
            results.add(setting, seed, end | {"seconds": seconds})
    plot.finish(NAME, a, results, report, draw)


# ------------------------------------------------------------------------------------------------------------- the runs


def prepare(folder: Path, size: dict) -> None:
    """The SFT models of all widths, and the pool: answers of the widest to held-out prompts, a row a prompt."""
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
    """One proxy optimised -> {n, or rollout: d, proxy, gold and readable gold}, and what is known at the end."""
    kind, width, n = SETTINGS[setting]
    proxy = make_proxy(folder, width, n, seed, size)
    return best_of_n(folder, proxy) if kind == "BoN" else ppo(folder, proxy, seed, size)


def best_of_n(folder: Path, proxy: str):
    """Best-of-n by this proxy, and by gold itself (best), for n up to half of the pool."""
    rows = [json.loads(line) for line in open(folder / "pool.jsonl")]
    gold, grammatical = (torch.tensor([row[name] for row in rows]) for name in ("gold", "grammatical"))
    gold = (gold - gold.mean()) / gold.std()
    found = scores(proxy, rows)
    found = (found - found.mean()) / found.std()
    order, along = found.argsort(1), {}
    for drawn in (2**i for i in range(1, 20) if 2 ** (i + 1) <= len(order[0])):
        of = {"gold": gold, "proxy": found, "readable": gold * grammatical, "grammatical": grammatical}
        along[drawn] = {name: best_of(x.gather(1, order), drawn).mean().item() for name, x in of.items()}
        along[drawn] |= {"best": best_of(gold.sort(1).values, drawn).mean().item()}
        along[drawn] |= {"d": math.sqrt(math.log(drawn) - (drawn - 1) / drawn)}
        along[drawn]["readable_validation"] = along[drawn]["readable"]
    return along, {"correlation": correlation(gold.flatten(), found.flatten())}


def ppo(folder: Path, proxy: str, seed: int, size: dict):
    """PPO against this proxy without a KL penalty; at every second rollout an answer to each held-out prompt."""
    sft, out, along = str(folder / "sft-128"), Path(proxy.replace("rm-", "ppo-")), {}
    asked = write(folder / f"prompts-{seed}.jsonl", common.rows("prompts", 6000, seed + 1))
    held = common.prompts(400 if size == SMOKE else 24_000)[1][: TEST + VALIDATION]
    policy, tokenizer = models.load_model(sft, "cpu"), models.load_tokenizer(sft)
    units = {}

    def look(step: int, weights: dict) -> None:
        policy.load_state_dict(weights)
        models.save(policy, tokenizer, folder / f"now-{out.name}")
        found = common.measured(str(folder / f"now-{out.name}"), sft, held, seed, size["tokens"], reward=proxy)
        for name in ("gold", "proxy"):
            units.setdefault(name, (statistics.fmean(found[name]), statistics.stdev(found[name])))
            found[name] = [(x - units[name][0]) / units[name][1] for x in found[name]]
        found["readable"] = [x * fluent for x, fluent in zip(found["gold"], found["grammatical"], strict=True)]
        test = len(held) * TEST // (TEST + VALIDATION)
        along[step] = {name: statistics.fmean(x[:test]) for name, x in found.items()}
        along[step]["readable_validation"] = statistics.fmean(found["readable"][test:])
        along[step]["d"] = math.sqrt(max(along[step]["kl"], 0.0))
        if step == 0:
            along[step]["correlation"] = correlation(*(torch.tensor(found[x]) for x in ("gold", "proxy")))

    look(0, policy.state_dict())
    flags = {"model": sft, "reward": proxy, "data": asked, "out": str(out), "seed": seed, "device": "cpu"}
    flags |= {"batch_size": size["prompts"], "max_steps": size["rollouts"], "max_new_tokens": size["tokens"]}
    flags |= {"kl_coef": 0.0, "eval_prompts": 0, "save_every": size["every"]}
    shutil.rmtree(out, ignore_errors=True)  # of a run that was stopped
    with common.at_checkpoints(look):
        train_ppo.main(train_ppo.Args(**flags))
    return along, {"correlation": along[0].pop("correlation")}


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
    out = folder / f"rm-{width}-{n}-{seed}"
    data = write(folder / f"pairs-{width}-{n}-{seed}.jsonl", noisy_pairs(n, seed))
    flags = REWARD_MODEL | ({"max_steps": 2} if size == SMOKE else {})
    flags |= {"model": str(folder / f"sft-{width}"), "data": data, "seed": seed, "eval_fraction": 0, "eval_prompts": 0}
    return trained(train_rm, out, **flags)


def scores(proxy: str, rows: list[dict]) -> torch.Tensor:
    """The proxy's rewards of all answers [p N]; equal ones are scored once."""
    answers = [[(row["prompt"], *x) for x in zip(row["responses"], row["ended"], strict=True)] for row in rows]
    once = list(dict.fromkeys(x for row in answers for x in row))
    asked, texts, ended = zip(*once, strict=True)
    found = dict(zip(once, load_reward(proxy, "cpu")(asked, texts, [{"ended": x} for x in ended]), strict=True))
    return torch.tensor([[found[x] for x in row] for row in answers])


# ----------------------------------------------------------------------------------------------------- table and figure


def fit(kind: str, points: Sequence[tuple[float, float]]) -> tuple[float, float, float, float]:
    """a and b of the claim's form by least squares, the share of the squares about the mean that it explains (R^2), and
    AICc of the line d a less that of the form (Hurvich and Tsai 1989): above 0 where b is worth having."""
    d, y = torch.tensor([x for x in points if x[0] > 0], dtype=torch.float64).T
    basis = torch.stack([d, -d * d if kind == "BoN" else -d * d.log()], 1)
    coefficients = torch.linalg.lstsq(basis, y[:, None]).solution[:, 0]
    squares = lambda fitted: ((fitted - y) ** 2).sum()  # noqa: E731
    left, of_line = squares(basis @ coefficients), squares(d * (d @ y) / (d @ d))
    gain = aicc(of_line.item(), len(d), 1) - aicc(left.item(), len(d), 2)
    return *coefficients.tolist(), (1 - left / squares(y.mean())).item(), gain


def aicc(squares: float, n: int, coefficients: int) -> float:
    """n log(squares / n) + 2 k + 2 k (k + 1) / (n - k - 1), k: the coefficients and the variance of the errors."""
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
    """What is known of gold (or readable gold) in this setting: name -> {seed: value}."""
    kind, found = SETTINGS[setting][0], {}
    for seed in seeds_of(results, setting):
        own = points(results, setting, seed, y)
        chosen = [x for _, x in points(results, setting, seed, "readable_validation")]
        d, peak = own[chosen.index(max(chosen))]
        a, b, explained, gain = fit(kind, own)
        values = {"a": a, "b": b, "R^2": explained, "AICc": gain, "peak": peak, "at d": d, "end": own[-1][1]}
        values |= {"b / a": b / a if a else math.nan, "fall": peak - own[-1][1]}
        values["c"] = fit("BoN", points(results, setting, seed, y, "proxy"))[1]
        if kind == "BoN":
            best = points(results, setting, seed, "best")
            shares = [x / most for (_, x), (_, most) in zip(own, best, strict=True)]
            values |= {"share": shares[-1], "share at 2": shares[0], "falls": shares[0] - shares[-1]}
        for name, value in values.items():
            found.setdefault(name, {})[seed] = value
    return found


def spearman(results: common.Results, name: str, sign: int) -> list[float]:
    """Of each seed: the rank correlation of a value of Best-of-n at 128 dimensions, times the sign, and pairs."""
    there = [x for x in SETTINGS if x in {f"BoN {n}" for n in PAIRS} and seeds_of(results, x)]
    of = [by_seed(results, x)[name] for x in there]
    ranks = lambda values: ranks_of(torch.tensor(values))  # noqa: E731
    pairs = ranks([float(SETTINGS[x][2]) for x in there])
    return [correlation(ranks([sign * x[seed] for x in of]), pairs) for seed in of[0]]


def clauses(results: common.Results) -> dict[str, tuple[tuple[float, float], bool]]:
    """Differences that the claim says are above 0, with half their intervals; whether they are in the criterion."""
    mean = lambda setting, name, y="gold": t_interval([*by_seed(results, setting, y)[name].values()])  # noqa: E731
    found = {f"share at n = 2 - at the largest: {FEW}": (mean(FEW, "falls"), True)}
    found["Spearman(share, pairs): BoN"] = t_interval(spearman(results, "share", 1)), True
    found["-Spearman(b / a, pairs): BoN"] = t_interval(spearman(results, "b / a", -1)), True
    for name in ("c", "b", "AICc"):
        found[f"{name}, readable gold: {PPO}"] = mean(PPO, name, "readable"), True
    there = [x for x in SETTINGS if seeds_of(results, x)]
    for x in (x for x in there if x.startswith("PPO")):
        found |= {f"readable's peak - end, {y}: {x}": (mean(x, "fall", y), False) for y in ("readable", "gold")}
    for x in (x for x in there if "wide" in x):
        narrow, wide = by_seed(results, x), by_seed(results, x.split(",")[0])
        found[f"b / a: {x} - 128"] = paired(narrow["b / a"], wide["b / a"]), False
        found[f"share: 128 - {x}"] = paired(wide["share"], narrow["share"]), False
    return found


def report(results: common.Results) -> tuple[str, str, str]:
    """Tables, verdict, effect."""
    ends, forms = [], []
    cell = lambda values: show(t_interval([*values.values()]))  # noqa: E731
    for x in (x for x in SETTINGS if seeds_of(results, x)):
        last, of = max(results.steps(x)), {y: by_seed(results, x, y) for y in ("gold", "readable")}
        row = [results.values(x, "correlation"), *(results.values(x, name, last) for name in ("d", "proxy", "gold"))]
        row += [of["gold"].get(name) for name in ("share at 2", "share")]
        row += [*(of["readable"][name] for name in ("end", "peak", "at d")), results.values(x, "grammatical", last)]
        ends.append([x, *(cell(values) if values else "" for values in row)])
        for y in ("gold",) if x.startswith("BoN") else ("gold", "readable"):
            forms.append([x, y, *(cell(of[y][name]) for name in ("a", "b", "b / a", "R^2", "AICc", "c"))])
    a, b, explained, gain = fit("BoN", points(results, FEW, seeds_of(results, FEW)[0], "best"))
    forms.insert(0, ["BoN by gold itself", "gold", *(f"{x:.2f}" for x in (a, b, b / a, explained, gain)), "0.00"])
    found = clauses(results)
    lines = [[x, show(y, 3), common.verdict([y]), "yes" if inside else ""] for x, (y, inside) in found.items()]
    titles = ["r", "d", "proxy", "gold", "share at n = 2", "share", "readable", "at its peak", "at d", "grammatical"]
    parts = [
        markdown(["proxy of so many pairs", *titles], ends),
        markdown(["", "fit of", "a", "b", "b / a", "R^2", "AICc, line - form", "c"], forms),
        markdown(["above 0 by the claim", "mean", "above 0?", "in the criterion"], lines),
    ]
    effect = "; ".join(f"{x} {y}" for x, y, _, inside in lines if inside) + "."
    return "\n\n".join(parts), common.verdict([y for y, inside in found.values() if inside]), effect


def draw(results: common.Results, page) -> None:
    """Proxy (dashed, means) and gold against d with its fit to all seeds: Best-of-n, PPO, and readable gold of PPO."""
    panels = page.subplots(1, 3, sharey=True)
    for axes, (kind, y) in zip(panels, (("BoN", "gold"), ("PPO", "gold"), ("PPO", "readable")), strict=True):
        there = [x for x in SETTINGS if x.startswith(kind) and seeds_of(results, x)]
        for colour, x in ((f"C{list(SETTINGS.values()).index(('BoN', *SETTINGS[x][1:]))}", x) for x in there):
            gold = [point for seed in seeds_of(results, x) for point in points(results, x, seed, y)]
            axes.plot(*zip(*gold, strict=True), ".", color=colour, markersize=2)
            a, b, *_ = fit(kind, gold)
            ds = torch.linspace(0.02, max(d for d, _ in gold), 100).tolist()
            ys = [d * (a - b * (d if kind == "BoN" else math.log(d))) for d in ds]
            axes.plot(ds, ys, color=colour, label=x.removeprefix(f"{kind} "), linewidth=1)
            steps, at = results.steps(x), lambda n, step, x=x: statistics.fmean(results.values(x, n, step).values())
            ds = [at("d", step) for step in steps]
            axes.plot(ds, [at("proxy", step) for step in steps], "--", color=colour, linewidth=0.8)
        if kind == "BoN":
            axes.plot(ds, [at("best", step) for step in steps], "k:", linewidth=0.8, label="gold itself")
        axes.set_title(f"{kind}, {'readable ' * (y == 'readable')}gold", fontsize=9)
        axes.set_xlabel("d = sqrt(KL)", fontsize=8)
        axes.tick_params(labelsize=7)
        axes.grid(alpha=0.3)
        axes.legend(fontsize=6)
    panels[0].set_ylabel("reward, deviations of SFT answers (dashed: proxy)", fontsize=8)


if __name__ == "__main__":
    cli(main, Args)
