"""A bfloat16 run sees only a part of what it has learned, if its model came from a bfloat16 file. Does it matter?

    python -m ablations.precision            --quick, --smoke, --seeds, --jobs
    python -m ablations.precision --tier s   a real model on real pairs (tier_s.py)
    python ablations/precision/check.py      any model, any learning rate, without this project

Claim (this project's): a model from a bfloat16 file lies on the grid of bfloat16. At the learning rates of preference
learning its float32 masters move for many updates before their bfloat16 copies do, so loss, margin and KL as the
forward pass has them are too small. A dither of the masters' low bits (rlhf/optim.py) cures it. Where training ends is
the same with and without it.

The forms of weights are those of seen.py. *seen*: DPO (beta 0.1) on 32 fixed pairs, all in each update, at a constant
learning rate: what the forward pass sees beside the truth. *DPO*, *GRPO*: train_dpo.py (beta 0.6, one epoch, about 144
updates of 32 pairs) and train_ppo.py (--advantage grpo, the gold reward, 40 rollouts of 64 prompts; it samples in the
dtype that it trains in) on the embedded task, whose SFT model is saved in bfloat16. Each seed has pairs, a training
order and a dither of its own. 256 answers to held-out prompts are measured, by the masters in float32.

Criterion, written before the full run; differences are paired by seed, with 95 % t-intervals over seeds. Reproduced:
all of these are above 0. Contradicted: one is below 0. Else not resolved.

    blind       0.5 - (seen / true margin) on the grid, at rate 1e-6 after 8 updates
    cured       0.1 - |mean of (seen / true margin) - 1| of the dithered form, there
    same end    DPO at rates 1e-6 and 1e-5, GRPO at 1e-5, on the grid against dithered: 0.1 - |mean of the ratio of
                their KLs to the start - 1|, and 0.05 - |mean difference of their gold rewards|

Reported and not judged: all other forms and rates; gold reward at equal KL.
"""

import math
import shutil
import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

import train_dpo
import train_ppo
from ablations import common, plot
from ablations.common import at_checkpoints, between, markdown, paired, show, t_interval
from ablations.precision import seen, tier_s
from ablations.precision.seen import blind_and_cured, ratio, same, share
from rlhf import require
from support import models, reviews
from support.examples import build
from support.generate import answer
from support.runs import cli

NAME = "precision"
CLAIM = (
    "a bfloat16 run from a bfloat16 checkpoint sees a part of what it has learned; dithered masters cure it; "
    "where training ends is the same"
)
RATES, DPO_RATES, GRPO_RATES = (1e-7, 1e-6, 1e-5, 1e-4), (1e-6, 1e-5), (1e-5,)
END_FORMS = ("float32", "on the grid", "dithered", "stochastic", "no masters")
GRPO_FORMS = ("float32", "on the grid", "dithered", "no masters")
SETTINGS = {f"seen, {form}, {rate:g}": ("seen", form, rate) for rate in RATES for form in seen.FORMS}
SETTINGS |= {f"DPO, {form}, {rate:g}": ("DPO", form, rate) for rate in DPO_RATES for form in END_FORMS}
SETTINGS |= {f"GRPO, {form}, {rate:g}": ("GRPO", form, rate) for rate in GRPO_RATES for form in GRPO_FORMS}
JUDGED = {"DPO": (1e-6, 1e-5), "GRPO": (1e-5,)}  # rates at which the end should be the same
PAIRS, TRAINING, PROMPTS, TOKENS = 32, 5120, 256, 48
PLACES = (1, 2, 4, 8, 16, 32)  # updates after which *seen* measures
DIGITS = {"true": 3, "changed": 3, "moved": 3, "copied": 2, "cosine": 4}  # metrics of *seen*
PAIRED = ("seen", "true", "kl", "true_kl", "loss", "true_loss")
LAST = ("gold - dithered's", "at equal KL")
ENDS = {"kl": 5, "gold": 3, "grammatical": 3}  # metrics of the ends
FULL = {
    "DPO": {"batch_size": 32, "save_every": 40, "eval_prompts": 0},
    "GRPO": {"max_steps": 40, "batch_size": 64, "save_every": 10, "eval_prompts": 0},
}


@dataclass
class Args(common.Args):
    jobs: int = 2
    """processes, one thread each, >= 1; the results do not depend on it"""
    tier: Literal["w", "s"] = "w"
    """w: the embedded task; s: a real model (tier_s.py), into tier_s.csv"""
    model: str = "HuggingFaceTB/SmolLM2-135M-Instruct"
    """--tier s: a causal language model on the grid of bfloat16, a local folder or a hub id"""
    pairs: str = "hh_helpful.jsonl"
    """--tier s: a file of preferences with a prompt"""
    part: Literal["seen", "DPO"] = "seen"
    """--tier s: which of its two experiments"""


def main(a: Args) -> None:
    """Run whatever results.csv lacks, and write table and figure."""
    results, folder = common.results(NAME, a), common.work(NAME, a)
    if a.tier == "s":
        require(not a.quick, "--quick is for the embedded task: with --tier s give --seeds 1")
        real = common.Results(results.path.with_name("tier_s.csv"))
        tier_s.main(real, folder, a.model, a.pairs, a.part, 1 if a.smoke else a.seeds, a.jobs, a.smoke)
        print(tier_s.report(real))
        return
    seeds = range(1 if a.smoke else 2 if a.quick else a.seeds)
    settings = {x: y for x, y in SETTINGS.items() if not a.quick or y[1] in ("on the grid", "dithered")}
    if a.smoke:
        settings = [f"seen, {form}, 1e-06" for form in ("on the grid", "dithered")]
        settings += [f"{kind}, dithered, 1e-05" for kind in FULL]
    tasks = [(x, seed, folder, a.smoke) for seed in seeds for x in settings if not results.done(x, seed)]
    torch.set_num_threads(1)  # as in the processes of `each`, so that results do not depend on the number of cores
    if tasks:
        common.sft_model(folder, a.smoke, save_dtype="bfloat16")
    for (setting, seed, *_), along, seconds in common.each(run, tasks, a.jobs, folder):
        for step, values in along.items():
            results.add(setting, seed, values, step)
        results.add(setting, seed, along[max(along)] | {"seconds": seconds})
    plot.finish(NAME, a, results, report, draw)


def run(setting: str, seed: int, folder: Path, smoke: bool) -> dict[int, dict[str, float]]:
    """One run -> {update or rollout: values}."""
    (kind, form, rate), sft = SETTINGS[setting], str(folder / "sft")
    if kind == "seen":
        rows = [("", row) for row in common.rows("preference", PAIRS, seed)]
        pairs, _ = build(rows, reviews.tokenizer(), "preference", 512, 1024)
        make = lambda device: models.load_model(sft, device)  # noqa: E731
        return seen.measure(form, rate, seed, make, pairs, PLACES[:4] if smoke else PLACES, 0)
    return end(kind, form, rate, seed, folder, smoke)


def end(kind: str, form: str, rate: float, seed: int, folder: Path, smoke: bool) -> dict[int, dict[str, float]]:
    """One run of a script -> {step: means of `common.of_answers` by the masters in float32}."""
    sft, along = str(folder / "sft"), {}
    tokenizer, policy, reference = models.load_tokenizer(sft), *(models.load_model(sft, "cpu") for _ in range(2))
    asked = common.prompts(200)[1][:8] if smoke else common.prompts()[1][:PROMPTS]

    def look(step: int, weights: dict) -> None:
        policy.load_state_dict(weights)
        answers = answer(policy, tokenizer, asked, TOKENS, seed)
        stats = common.of_answers(policy, reference, tokenizer, answers)
        along[step] = {name: statistics.fmean(values) for name, values in stats.items()}

    out = folder / f"{kind}-{form.replace(' ', '-')}-{rate:g}-{seed}"
    flags = {"model": sft, "out": str(out), "lr": rate, "seed": seed, "device": "cpu", "schedule": "constant"}
    flags |= FULL[kind] | {"dtype": seen.DTYPES[form]}
    flags |= {"max_steps": 2, "save_every": 1} if smoke else {}
    look(0, policy.state_dict())
    shutil.rmtree(out, ignore_errors=True)  # left by a stopped run
    with seen.in_form(form), at_checkpoints(look):
        if kind == "DPO":
            data = common.write(out.with_suffix(".jsonl"), common.rows("preference", 80 if smoke else TRAINING, seed))
            train_dpo.main(train_dpo.Args(data=data, ref_cache=str(folder / "ref_cache"), **flags))
        else:
            train_ppo.main(train_ppo.Args(reward="gold", advantage="grpo", max_new_tokens=TOKENS, **flags))
    shutil.rmtree(out)
    return along


# ----------------------------------------------------------------------------------------------------- table and figure


def clauses(results: common.Results) -> dict[str, tuple[float, float]]:
    """Clause of the criterion -> mean and half its interval."""
    found = blind_and_cured(results, "1e-06", 8)
    for kind, rates in JUDGED.items():
        for rate in rates:
            of = lambda form, name, kind=kind, rate=rate: results.values(f"{kind}, {form}, {rate:g}", name)  # noqa: E731
            if of("on the grid", "kl") and of("dithered", "kl"):
                found[f"{kind}, rate {rate:g}: same KL"] = same(of("on the grid", "kl"), of("dithered", "kl"))
                mean, half = paired(of("on the grid", "gold"), of("dithered", "gold"))
                found[f"{kind}, rate {rate:g}: same gold reward"] = 0.05 - abs(mean), half
    return found


def gold_at(results: common.Results, setting: str, nats: Mapping[int, float]) -> dict[int, float]:
    """Seed -> gold reward at that seed's KL along a run, linear between its points."""
    by_seed, of = {}, results.values_of
    for seed, at in nats.items():
        steps = [x for x in results.steps(setting) if (setting, seed, x, "kl") in of]  # an epoch's end differs by seed
        points = [(of[setting, seed, x, "kl"], of[setting, seed, x, "gold"]) for x in steps]
        by_seed[seed] = between(points, at)
    return by_seed


def seen_rows(results: common.Results, settings: Mapping[str, tuple]) -> list[list[str]]:
    """A row for each setting: what its forward pass sees after the last update. No ratios to what is hardly above 0."""
    rows = []
    for setting, (*_, form, rate) in settings.items():
        of = {name: results.values(setting, name) for name in (*PAIRED, *DIGITS)}
        if of["true"]:
            plain = results.values(f"seen, float32, {rate:g}", "true")
            pairs = (of["true"], plain, 1e-3), (of["seen"], of["true"], 1e-3), (of["kl"], of["true_kl"], 5e-6)
            ratios = [show(ratio(x, y)) if y and min(y.values()) > least else "" for x, y, least in pairs]
            excess = show(paired(of["loss"], of["true_loss"]), 3)
            means = [f"{statistics.fmean(of[name].values()):.{digits}f}" for name, digits in DIGITS.items()]
            rows.append([f"{rate:g}", form, means[0], *ratios, excess, *means[1:]])
    return rows


def end_rows(results: common.Results) -> list[list[str]]:
    """A row for each run of a script: its end, and that against the dithered run's."""
    rows = []
    for setting, (kind, form, rate) in SETTINGS.items():
        of, other = ({n: results.values(x, n) for n in ENDS} for x in (setting, f"{kind}, dithered, {rate:g}"))
        if kind == "seen" or not of["kl"]:
            continue
        cells = [show(t_interval([*of[name].values()]), digits) for name, digits in ENDS.items()]
        if form != "dithered" and other["kl"]:
            nats = {seed: min(x, other["kl"][seed]) for seed, x in of["kl"].items() if seed in other["kl"]}
            at_kl = (gold_at(results, x, nats) for x in (setting, f"{kind}, dithered, {rate:g}"))
            cells += [show(ratio(of["kl"], other["kl"])), show(paired(of["gold"], other["gold"]), 3)]
            cells.append(show(paired(*at_kl), 3))
        rows.append([kind, f"{rate:g}", form, *cells, *[""] * (6 - len(cells))])
    return rows


def report(results: common.Results) -> tuple[str, str, str]:
    """Tables, verdict, effect."""
    header = "learning rate,form of weights,true margin,true / float32's,seen / true,KL: seen / true,loss: seen - true"
    header = [*header.split(","), "changed", "moved", "copied", "cosine"]
    criterion = clauses(results)
    real = common.Results(common.ROOT / NAME / "tier_s.csv")
    more = tier_s.clauses(real)
    lines = [[name, show(x, 3), common.verdict([x])] for name, x in criterion.items()]
    lines += [[f"real model: {name}", show(x, 3), common.verdict([x])] for name, x in more.items()]
    parts = [
        f"What the forward pass sees of 32 pairs after {PLACES[-1]} updates, embedded model:",
        markdown(header, seen_rows(results, {x: y for x, y in SETTINGS.items() if y[0] == "seen"})),
        "Where training ends, beside the dithered run (*at equal KL*: the difference of the gold rewards there):",
        markdown(
            [*"run,rate,form of weights,KL,gold reward,grammatical,KL / dithered's".split(","), *LAST],
            end_rows(results),
        ),
        markdown(["criterion (claim: above 0)", "mean", ""], lines),
    ]
    if real.values_of:
        hardware, date, commit = (" and ".join(sorted(real.made[name])) for name in ("hardware", "date", "commit"))
        parts += [
            f"SmolLM2-135M-Instruct, 6 pairs, {tier_s.PLACES[-1]} updates:",
            markdown(header, seen_rows(real, tier_s.SEEN)),
            f"and DPO on fresh pairs, {tier_s.FULL['max_steps']} updates of {tier_s.FULL['batch_size']}:",
            tier_s.report(real),
            f"Of the real model: {real.minutes():.0f} minutes of one thread, {hardware}, {date}, commit {commit}.",
        ]
    grid, dithered = (t_interval([*share(results, x, "1e-06", 8).values()]) for x in ("on the grid", "dithered"))
    effect = f"Seen / true margin at rate 1e-6 after 8 updates: {show(grid)} on the grid, {show(dithered)} dithered."
    if len(more) > 1:
        pair = (t_interval([*share(real, x, "5e-07", tier_s.PLACES[-1]).values()]) for x in ("on the grid", "dithered"))
        effect += " SmolLM2-135M at 5e-7: {} and {}.".format(*map(show, pair))
    return "\n\n".join(parts), common.verdict([*criterion.values(), *more.values()]), effect


def draw(results: common.Results, page) -> None:
    """Left: seen / true margin against how far the masters have moved. Right: KL at the end, over float32's."""
    left, right = page.subplots(1, 2)
    real = common.Results(common.ROOT / NAME / "tier_s.csv")
    for data, settings, marker, model in ((results, SETTINGS, "o", "embedded"), (real, tier_s.SEEN, "s", "SmolLM2")):
        for form, colour in {"on the grid": "C3", "dithered": "C0"}.items():
            chosen = [x for x in settings if x.startswith(f"seen, {form},") and data.values(x, "true")]
            points = []
            for setting in chosen:
                for step in data.steps(setting):
                    of = lambda name: data.values(setting, name, step).values()  # noqa: E731,B023
                    shares = [x / y for x, y in zip(of("seen"), of("true"), strict=True)]
                    points.append((statistics.fmean(of("moved")), statistics.fmean(shares)))
            if points:
                left.plot(*zip(*points, strict=True), marker, color=colour, markersize=3, label=f"{form}, {model}")
    left.axhline(1, color="black", lw=0.8)
    left.set_xscale("log")
    left.set_xlabel("median move of a master, in steps of the grid", fontsize=8)
    left.set_title("seen / true margin", fontsize=9)
    ends = [(results, rate, "embedded") for rate in DPO_RATES] + [(real, rate, "SmolLM2") for rate in tier_s.END_RATES]
    for i, form in enumerate(END_FORMS[1:]):
        label = form
        for j, (data, rate, _) in enumerate(ends):
            kl = data.values(f"DPO, {form}, {rate:g}", "kl")
            mean, half = ratio(kl, data.values(f"DPO, float32, {rate:g}", "kl"))
            if math.isfinite(mean):
                bar, place = half if math.isfinite(half) else 0.0, j + 0.15 * (i - 1.5)
                right.errorbar([place], [mean], [bar], fmt="o", color=f"C{i}", markersize=3, label=label)
                label = None
    right.axhline(1, color="black", lw=0.8)
    right.set_xticks(range(len(ends)), [f"{rate:g}\n{model}" for _, rate, model in ends])
    right.set_xlabel("learning rate, model", fontsize=8)
    right.set_title("DPO's KL at the end / float32's", fontsize=9)
    for axes in (left, right):
        axes.tick_params(labelsize=7)
        axes.grid(alpha=0.3)
        axes.legend(fontsize=7)


if __name__ == "__main__":
    cli(main, Args)
