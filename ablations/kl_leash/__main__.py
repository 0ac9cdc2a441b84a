"""The KL penalty of PPO against a fallible reward model: from a coefficient of 0 to one under which nothing moves.

    python -m ablations.kl_leash            --quick, --smoke, --seeds, --jobs

Claim (Ouyang et al. 2022, appendix E.7, arXiv 2203.02155; Stiennon et al. 2020, figure 5, arXiv 2009.01325): a KL
coefficient of 0 and one that is too large are both poor, and the best is in between. For each seed a reward model
learns from a few noisy rankings of its own, and PPO is run against it at each coefficient, all else being the same.
Gold and proxy reward are measured on answers to held-out prompts, in standard deviations of the SFT model's answers.

Gold reward is the sentiment alone, whatever the grammar, but people judge a text as a whole. Hence a second measure,
readable gold: gold reward of the grammatical answers, and 0, the SFT model's mean, for all others.

Criterion, written before the full run. `best` is the coefficient, neither 0 nor the largest, with the highest mean
readable gold on validation prompts; everything else is measured on test prompts. Differences are paired by seed, with
95 % t-intervals. Reproduced: all of these are above 0. Contradicted: one is below 0. Else not resolved.

    collapse      distinct-2, entropy and grammatical share: best - 0
    outrun        proxy - gold: 0 - best
    peak          gold, and readable gold: best - 0, and best - largest
    no movement   a tenth of best's gain in gold over the SFT model - the gain at the largest coefficient
"""

import json
import statistics
from dataclasses import dataclass
from pathlib import Path

import torch

import evaluate
import train_ppo
import train_rm
from ablations import common, plot
from ablations.common import markdown, paired, show, t_interval, trained, write
from support import models, scoring
from support.examples import held_out, load
from support.generate import answer, answer_stats, end_ids
from support.runs import cli, is_made
from support.scoring import Batching

NAME = "kl_leash"
CLAIM = "PPO without a KL penalty collapses, with too much it does not move; gold reward peaks in between"
COEFFICIENTS = (0.0, 0.03, 0.1, 0.3, 1.5, 30.0)
SETTINGS = {f"{x:g}": {"kl_coef": x} for x in COEFFICIENTS}
RANKINGS = 1000  # pairs per reward model, with the annotators' usual noise; a tenth is held out
TEST, VALIDATION = 512, 256  # held-out prompts
EVERY = 4  # rollouts averaged into one point of the curve
ALONG = {"gold": "objective/gold", "proxy": "objective/scores", "kl": "objective/kl", "entropy": "objective/entropy"}
COLUMNS = {  # metric: title in the table, digits
    "gold": ("gold reward", 2),
    "readable": ("readable gold", 2),
    "proxy": ("proxy", 2),
    "gap": ("proxy - gold", 2),
    "kl": ("KL, nats", 2),
    "distinct_2": ("distinct-2", 3),
    "entropy": ("entropy, nats", 2),
    "grammatical": ("grammatical", 2),
    "length": ("length", 1),
    "ended": ("ended", 2),
}
FULL = {"max_steps": 40, "max_new_tokens": 48}
SMOKE = {"batch_size": 4, "max_steps": 2, "max_new_tokens": 8}
QUICK = FULL | {"batch_size": 32, "max_steps": 20}


@dataclass
class Args(common.Args):
    jobs: int = 2
    """worker processes of one thread each, >= 1; the results do not depend on it"""


# ------------------------------------------------------------------------------------------------------------- the runs


def main(a: Args) -> None:
    """Run what results.csv lacks, then write table and figure."""
    results, folder = common.results(NAME, a), common.work(NAME, a)
    settings, seeds = list(SETTINGS), range(min(a.seeds, 1 if a.smoke else 2 if a.quick else a.seeds))
    if a.quick or a.smoke:
        settings = ["0", "0.3", "30"]
    tasks = [(x, seed) for seed in seeds for x in ["sft", *settings] if not results.done(x, seed)]
    if tasks:
        prepare(folder, sorted({seed for _, seed in tasks}), a.smoke)
    ppo = SMOKE if a.smoke else QUICK if a.quick else FULL
    calls = [(setting, seed, folder, ppo) for setting, seed in tasks]
    for (setting, seed, *_), (final, curve), seconds in common.each(run, calls, a.jobs, folder):
        for step, values in curve.items():
            results.add(setting, seed, values, step)
        results.add(setting, seed, final | {"seconds": seconds})
    plot.finish(NAME, a, results, report, draw)


def prepare(folder: Path, seeds: list[int], smoke: bool) -> None:
    """The SFT model, and for each seed its rankings and a reward model trained on them."""
    torch.set_num_threads(1)  # as in the processes of `each`: the numbers must not depend on the number of cores
    sft, short = common.sft_model(folder, smoke), {}
    if smoke:
        write(folder / "prompts.jsonl", common.rows("prompts", 60))
        short = {"max_steps": 2, "eval_prompts": 4, "max_new_tokens": 8}
    for seed in seeds:
        data = write(folder / f"rankings-{seed}.jsonl", common.rows("preference", 60 if smoke else RANKINGS, seed))
        flags = {"data": data, "batch_size": 16, "epochs": 3, "seed": seed, **short}
        trained(train_rm, folder / f"rm-{seed}", model=sft, **flags)


def run(setting: str, seed: int, folder: Path, ppo: dict):
    """One PPO run (none for "sft") -> values at its end, and {rollout: values} along it."""
    data = "reviews" if not (folder / "prompts.jsonl").exists() else str(folder / "prompts.jsonl")
    sft, reward, out = str(folder / "sft"), str(folder / f"rm-{seed}"), folder / f"ppo-{setting}-{seed}"
    flags = {"model": sft, "reward": reward, "data": data, "seed": seed, "eval_prompts": 0, "device": "cpu", **ppo}
    flags |= SETTINGS.get(setting, {}) | {"out": str(out), "resume": (out / "args.json").exists()}
    args = train_ppo.Args(**flags)
    if setting != "sft" and not is_made(out):
        train_ppo.main(args)

    tokenizer = models.load_tokenizer(sft)
    prompts = {e.prompt_text: e for e in load(data, "prompts", tokenizer, args)}
    held = held_out([*prompts.values()], args.eval_fraction)[1][: TEST + VALIDATION]
    initial = measure(args, tokenizer, models.load_model(sft, "cpu"), held)
    values = initial if setting == "sft" else measure(args, tokenizer, models.load_model(str(out), "cpu"), held)
    units = {n: (statistics.fmean(initial[n]), statistics.stdev(initial[n])) for n in ("gold", "proxy")}
    in_units = lambda n, x: (x - units[n][0]) / units[n][1] if n in units else x  # noqa: E731

    test = len(held) * TEST // (TEST + VALIDATION)
    end = {n: in_units(n, statistics.fmean(x[:test])) for n, x in values.items() if n != "ids"}
    end["gap"] = end["proxy"] - end["gold"]
    readable = [in_units("gold", x) * flag for x, flag in zip(values["gold"], values["grammatical"], strict=True)]
    end["readable"], end["readable_validation"] = statistics.fmean(readable[:test]), statistics.fmean(readable[test:])
    end["distinct_2"] = evaluate.distinct(values["ids"][:test], 2)
    end["entropy"] = sum(values["entropy"][:test]) / sum(values["length"][:test])
    if setting == "sft":
        return end, {}
    rows = [json.loads(line) for line in open(out / "metrics.jsonl")]
    chunks = [rows[i : i + EVERY] for i in range(0, len(rows), EVERY)]
    mean = lambda chunk, name: statistics.fmean(row[name] for row in chunk)  # noqa: E731
    return end, {chunk[-1]["step"]: {n: in_units(n, mean(chunk, x)) for n, x in ALONG.items()} for chunk in chunks}


@torch.no_grad()
def measure(args: train_ppo.Args, tokenizer, policy, held) -> dict[str, list]:
    """One answer to each prompt: its token ids, gold and proxy reward, exact KL to SFT, summed entropy, ..."""
    answers = answer(policy, tokenizer, held, args.max_new_tokens, args.seed)
    batching = Batching("tree", models.pad_id(tokenizer), micro_batch_tokens=args.micro_batch_tokens)
    values = answer_stats(answers, end_ids(policy, tokenizer), embedded=True)
    values["ids"] = [e.responses[0] for e in answers]
    reward = models.load_reward_model(args.reward, "cpu")
    proxy = scoring.score_rewards(reward, answers, batching._replace(pad_id=reward.config.pad_token_id))
    values["proxy"] = torch.cat(proxy).tolist()
    reference = models.load_model(args.model, "cpu")
    values["kl"] = evaluate.against_reference(policy, reference, answers, batching)["kl"]
    entropy = common.entropies(policy, tokenizer, answers)
    values["entropy"] = [x.sum().item() for x in entropy.split([len(ids) for ids in values["ids"]])]
    return values


# ----------------------------------------------------------------------------------------------------- table and figure


def settings_of(results: common.Results) -> list[str]:
    return [x for x in SETTINGS if results.values(x, "gold")]


def best_of(results: common.Results) -> str:
    """The coefficient, neither 0 nor the largest, with the highest mean readable gold on validation prompts."""
    mean = lambda x: statistics.fmean(results.values(x, "readable_validation").values())  # noqa: E731
    return max(settings_of(results)[1:-1], key=mean)


def clauses(results: common.Results) -> dict[str, tuple[float, float]]:
    """Name -> (mean, half interval) of each difference in the criterion."""
    values, best, largest = results.values, best_of(results), settings_of(results)[-1]
    differences = {}
    for name, title in (("distinct_2", "distinct-2"), ("entropy", "entropy"), ("grammatical", "grammatical share")):
        differences[f"{title}: {best} - 0"] = paired(values(best, name), values("0", name))
    differences[f"proxy - gold: 0 - {best}"] = paired(values("0", "gap"), values(best, "gap"))
    for name, title in (("gold", "gold reward"), ("readable", "readable gold")):
        for other in ("0", largest):
            differences[f"{title}: {best} - {other}"] = paired(values(best, name), values(other, name))
    gain = lambda x, seed: values(x, "gold")[seed] - values("sft", "gold")[seed]  # noqa: E731
    margins = [gain(best, seed) / 10 - gain(largest, seed) for seed in values(best, "gold")]
    differences[f"gold: a tenth of the gain at {best}, minus the gain at {largest}"] = t_interval(margins)
    return differences


def without_leash(results: common.Results, seed: int) -> list[tuple[float, float, float]]:
    """(d, gold, proxy) along the run without a penalty, d = sqrt(KL), starting at the SFT model."""
    steps = [[results.values("0", n, step)[seed] for n in ("kl", "gold", "proxy")] for step in results.steps("0")]
    return [(0.0, 0.0, 0.0), *((max(kl, 0.0) ** 0.5, gold, proxy) for kl, gold, proxy in steps)]


def early_stopping(results: common.Results) -> dict[str, tuple[float, float]]:
    """Name -> (mean, half interval) of what is not judged: readable gold of the best coefficient minus the others';
    after Gao et al. 2022, gold at a coefficient's end minus gold without a penalty at the same KL, and for the run
    without a penalty a and b of gold = d (a - b log d) and the slope through 0 of proxy - gold in d."""
    paths, best = {seed: without_leash(results, seed) for seed in results.values("0", "gold")}, best_of(results)
    readable = lambda x: results.values(x, "readable")  # noqa: E731
    others = [x for x in settings_of(results)[1:-1] if x != best]
    intervals = {f"readable gold: {best} - {x}": paired(readable(best), readable(x)) for x in others}
    for x in settings_of(results)[1:-1]:
        ends = {seed: [results.values(x, n)[seed] for n in ("kl", "gold")] for seed in paths}
        golds = {seed: common.between([point[:2] for point in paths[seed]], ends[seed][0] ** 0.5) for seed in paths}
        label = f"gold reward: {x} - 0, at the KL where {x} ends"
        intervals[label] = t_interval([ends[seed][1] - golds[seed] for seed in paths])
    fits, slopes = [], []
    for path in paths.values():
        d, gold, proxy = torch.tensor([point for point in path if point[0] > 0], dtype=torch.float64).T
        fits.append(torch.linalg.lstsq(torch.stack([d, -d * d.log()], 1), gold).solution.tolist())
        slopes.append(((proxy - gold) @ d / (d @ d)).item())
    for name, values in zip("ab", zip(*fits, strict=True), strict=True):
        intervals[f"gold = d (a - b log d) at 0: {name}"] = t_interval(values)
    return intervals | {"slope in d of proxy - gold at 0": t_interval(slopes)}


def report(results: common.Results) -> tuple[str, str, str]:
    """Table, verdict, effect."""
    rows = []
    for x in ["sft", *settings_of(results)]:
        cells = [show(t_interval([*results.values(x, n).values()]), digits) for n, (_, digits) in COLUMNS.items()]
        rows.append(["SFT" if x == "sft" else x, *cells])
    judged = clauses(results)
    lines = [[name, show(x, 3), common.verdict([x])] for name, x in judged.items()]
    parts = [
        markdown(["KL coefficient", *(title for title, _ in COLUMNS.values())], rows),
        markdown(["difference (claim: above 0)", "mean", ""], lines),
    ]
    if results.steps("0"):
        rows = [[name, show(x, 3)] for name, x in early_stopping(results).items()]
        parts.append(markdown(["not judged: the peak, and against early stopping", "mean"], rows))
    holds = sum(verdict == "reproduced" for *_, verdict in lines)
    golds = [f"{n.split(':')[0]} {x}" for n, x, _ in lines if n.endswith(" - 0") and "gold" in n]
    effect = f"{holds} of {len(judged)} differences are above 0; coefficient {best_of(results)} minus 0, in SFT "
    effect += f"deviations: {', '.join(golds)}."
    return "\n\n".join(parts), common.verdict([*judged.values()]), effect


def draw(results: common.Results, page) -> None:
    """Gold and proxy against KL, at the ends and along the run without a penalty; grammar, diversity and entropy."""
    left, right = page.subplots(1, 2, width_ratios=[3, 2])
    settings = settings_of(results)
    at = lambda x, n, step=None: t_interval([*results.values(x, n, step).values()])  # noqa: E731
    bar = lambda half: half if half < float("inf") else 0.0  # noqa: E731
    for name, colour in (("proxy", "C1"), ("gold", "C0"), ("readable", "C2")):
        if name in ALONG:
            along = [[at("0", n, step)[0] for step in results.steps("0")] for n in ("kl", name)]
            left.plot(*along, color=colour, linewidth=1, alpha=0.5)
        points = [(at(x, "kl"), at(x, name)) for x in settings]
        (xs, _), (ys, halves) = (zip(*axis, strict=True) for axis in zip(*points, strict=True))
        yerr = [bar(half) for half in halves]
        left.errorbar(
            xs, ys, yerr, marker="o", linestyle="", capsize=2, markersize=4, color=colour, label=COLUMNS[name][0]
        )
    for x in settings:
        left.annotate(x, (at(x, "kl")[0], at(x, "proxy")[0]), (5, 5), textcoords="offset points", fontsize=7)
    left.set_xscale("symlog", linthresh=1)
    left.set_xlim(left=-0.05)
    left.margins(y=0.12)
    left.set_xlabel("KL to SFT, nats per answer")
    left.set_ylabel("reward, deviations of SFT answers")
    left.set_title("ends (number: KL coefficient), path at 0", fontsize=9)
    for name in ("grammatical", "distinct_2", "entropy"):
        points = [at(x, name) for x in settings]
        unit = at("sft", name)[0] or 1.0
        ys, yerr = [mean / unit for mean, _ in points], [bar(half) / unit for _, half in points]
        right.errorbar(range(len(settings)), ys, yerr, marker="o", markersize=4, capsize=2, label=COLUMNS[name][0])
    right.set_xticks(range(len(settings)), settings)
    right.set_xlabel("KL coefficient")
    right.set_title("relative to SFT", fontsize=9)
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.tick_params(labelsize=8)
        axes.legend(fontsize=7)


if __name__ == "__main__":
    cli(main, Args)
