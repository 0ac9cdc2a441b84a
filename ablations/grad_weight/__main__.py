"""DPO's gradient without its weight: is the policy more degenerate for it, and does it lose reward at the same KL?

    python -m ablations.grad_weight            --quick, --smoke, --seeds, --jobs

Claim (Rafailov et al. 2023, section 4 and appendix C.3, arXiv 2305.18290): DPO's gradient weighs each pair by how
wrong the implicit reward still is about it, and "a naive version of this method without the weighting coefficient can
cause the language model to degenerate". The paper shows samples of Unlikelihood for it, and no number. Three losses of
a pair, h being the margin of the log-ratios of chosen and rejected response:

    DPO             -log sigmoid(beta h)                        gradient in h: -beta sigmoid(-beta h)
    weight 1/2      -beta h / 2                                 -beta / 2, which is DPO's at the start, for ever
    Unlikelihood    -log pi(chosen) + alpha log pi(rejected)    at alpha = 1 the same direction, 2 / beta times as long

Everything else is the same: the embedded task's SFT model, for each seed pairs of its own with the annotators' usual
noise, several epochs over them, and a learning rate of several times the script's own, so that the runs go on long
after DPO has learnt what there is to learn. At sixteen places along a run 128 answers to held-out prompts are measured.
Reward at matched KL is on the straight line between the first two neighbouring places around it, in deviations of the
SFT model's answers; beyond the last place of a run it is that of the last.

Criterion, written before the full run. Differences are paired by seed, with 95 % t-intervals, and are taken for both
unweighted losses. Reproduced: all of these are above 0. Contradicted: one is below 0. Else not resolved.

    entropy     at the end, nats a token: DPO - unweighted
    fluency     at the end, the reference's negative log-likelihood of the answers, nats a token: unweighted - DPO
    reward      gold reward at KL 2, 4 and 8 nats an answer: DPO - unweighted

Reported and not judged: distinct-2, repeated 4-grams, grammatical share, and readable gold (that of the grammatical
answers, and 0, the SFT model's mean, for all others) at the same KL.
"""

import shutil
import statistics
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import torch

import evaluate
import train_dpo
from ablations import common, plot
from ablations.common import at_checkpoints, between, markdown, paired, show, t_interval
from rlhf import models, reviews
from rlhf.data import build
from rlhf.generate import answer, end_ids, facts
from rlhf.logprobs import token_logps
from rlhf.runs import cli

NAME = "grad_weight"
CLAIM = "without DPO's weight on each pair the policy degenerates, and has less reward at the same KL"
LOSSES = {  # of its own, for train_dpo.py
    "weight 1/2": lambda a, x: -a.beta / 2 * (x.chosen - x.rejected),
    "unlikelihood": lambda a, x: x.rejected_logps - x.chosen_logps,
}
SETTINGS = {"DPO": {}, "weight 1/2": {"loss": "weight 1/2"}, "Unlikelihood": {"loss": "unlikelihood"}}
PAIRS, PROMPTS, POINTS, TOKENS = 2048, 128, 16, 48
FULL = {"beta": 0.1, "lr": 1e-3, "batch_size": 64, "epochs": 3}
NATS = (2.0, 4.0, 8.0)
COLUMNS = {  # of the table: digits
    "gold": ("gold reward", 2),
    "readable": ("readable gold", 2),
    "kl": ("KL, nats", 1),
    "entropy": ("entropy, nats", 2),
    "ref_nll": ("reference's NLL, nats", 2),
    "distinct_2": ("distinct-2", 3),
    "repeated_4": ("repeated 4-grams", 3),
    "grammatical": ("grammatical", 2),
    "length": ("length", 1),
}


@dataclass
class Args(common.Args):
    jobs: int = 2
    """processes, one thread each, >= 1; the results do not depend on it"""


# ------------------------------------------------------------------------------------------------------------- the runs


def main(a: Args) -> None:
    """Runs what results.csv does not have, and writes table and figure."""
    results, folder = common.results(NAME, a), common.work(NAME, a)
    seeds = range(min(a.seeds, 1 if a.smoke or a.quick else a.seeds))
    pairs, prompts = (64, 16) if a.smoke else (PAIRS, PROMPTS)
    tasks = [(x, seed, folder, pairs, prompts) for seed in seeds for x in SETTINGS if not results.done(x, seed)]
    torch.set_num_threads(1)  # as in the processes of `each`, so that the numbers do not depend on the machine's cores
    if tasks:
        common.sft_model(folder, a.smoke)
    for seed in sorted({seed for _, seed, *_ in tasks}):
        common.write(folder / f"pairs-{seed}.jsonl", common.rows("preference", pairs, 1 + seed))
    for (setting, seed, *_), along, seconds in common.each(run, tasks, a.jobs, folder):
        for step, values in along.items():
            results.add(setting, seed, values, step)
        results.add(setting, seed, along[max(along)] | {"seconds": seconds})
    plot.finish(NAME, a, results, report, draw)


def run(setting: str, seed: int, folder: Path, pairs: int, prompts: int) -> dict[int, dict[str, float]]:
    """One run of a loss -> {step: values}, from 0, the SFT model, on."""
    sft, out = str(folder / "sft"), folder / f"{setting.replace(' ', '-').replace('/', '-')}-{seed}"
    tokenizer, policy, reference = (
        models.load_tokenizer(sft),
        models.load_model(sft, "cpu"),
        models.load_model(sft, "cpu"),
    )
    rows = [
        (f"reviews:{i}", {"prompt": x}) for i, x in enumerate(dict.fromkeys(reviews.prompts(2 * prompts, 1_000_000)))
    ]
    held = build(rows[:prompts], tokenizer, "prompts", 512, 1024)[0]
    along: dict[int, dict[str, float]] = {}
    units: list[float] = []

    def look(step: int, weights: dict) -> None:
        policy.load_state_dict(weights)
        found = measure(tokenizer, policy, reference, held, seed)
        if not units:
            units.extend([statistics.fmean(found["gold"]), statistics.stdev(found["gold"])])
        found["gold"] = [(x - units[0]) / units[1] for x in found["gold"]]
        found["readable"] = [x * fluent for x, fluent in zip(found["gold"], found["grammatical"], strict=True)]
        ids = found.pop("ids")
        along[step] = {n: statistics.fmean(x) for n, x in found.items()} | {
            "distinct_2": evaluate.distinct(ids, 2),
            "repeated_4": statistics.fmean(repeated(x, 4) for x in ids),
        }
        tokens = sum(found["length"])
        for name in ("entropy", "ref_nll"):  # sums over an answer: the mean over all tokens
            along[step][name] = sum(found[name]) / tokens

    look(0, policy.state_dict())
    shutil.rmtree(out, ignore_errors=True)  # of a run that was stopped
    steps = FULL["epochs"] * -(-pairs // FULL["batch_size"])
    flags = {"data": str(folder / f"pairs-{seed}.jsonl"), "out": str(out), "ref_cache": str(folder / "ref_cache")}
    flags |= {"eval_fraction": 0.0, "eval_prompts": 0, "save_every": -(-steps // POINTS), "device": "cpu", "seed": seed}
    with at_checkpoints(look), mock.patch.dict(train_dpo.LOSSES, LOSSES):
        train_dpo.main(train_dpo.Args(model=sft, **flags, **FULL, **SETTINGS[setting]))
    shutil.rmtree(out)
    return along


@torch.no_grad()
def measure(tokenizer, policy, reference, held, seed: int) -> dict[str, list]:
    """Of one answer to each prompt: token ids, gold reward, grammar, length, exact KL to the reference; entropy and the
    reference's negative log-likelihood, summed over its tokens."""
    answers = answer(policy, tokenizer, held, TOKENS, seed)
    pad, how = models.pad_id(tokenizer), evaluate.Args(device="cpu")
    found = facts(answers, end_ids(policy, tokenizer), embedded=True) | {"ids": [e.responses[0] for e in answers]}
    exact = evaluate.against_reference(how, policy, reference, answers, "tree", pad)
    found["kl"] = exact["kl"]
    found["ref_nll"] = [-x * n for x, n in zip(exact["ref_logp"], found["length"], strict=True)]

    def entropies(batch):
        states = models.states(policy, batch, batch.sources, torch.float32)
        return token_logps(states, models.output_head(policy), batch.targets, entropy=True)[1]

    models.use_layout(policy, "tree")
    entropy = models.per_token(entropies, answers, "tree", pad, how.micro_batch_tokens, "cpu")
    found["entropy"] = [x.sum().item() for x in entropy.split([len(ids) for ids in found["ids"]])]
    return found


def repeated(ids: list[int], n: int) -> float:
    """1 - different n-grams of an answer / all of them; 0 where it has none. Welleck et al. 2020, arXiv 1908.04319."""
    grams = [tuple(ids[i : i + n]) for i in range(len(ids) - n + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


# ----------------------------------------------------------------------------------------------------- table and figure


def matched(results: common.Results, setting: str, metric: str, nats: float) -> dict[int, float]:
    """Seed -> a metric at a KL on the way of a run."""
    steps, found = results.steps(setting), {}
    for seed in results.seeds():
        points = [tuple(results.values_of[setting, seed, step, name] for name in ("kl", metric)) for step in steps]
        found[seed] = between(points, nats)
    return found


def clauses(results: common.Results) -> dict[str, tuple[float, float]]:
    """The differences of the criterion, with half their intervals."""
    found = {}
    for other in [*SETTINGS][1:]:
        mine, its = (lambda metric, x=x: results.values(x, metric) for x in ("DPO", other))
        found[f"entropy at the end: DPO - {other}"] = paired(mine("entropy"), its("entropy"))
        found[f"reference's NLL at the end: {other} - DPO"] = paired(its("ref_nll"), mine("ref_nll"))
        for nats in NATS:
            both = (matched(results, x, "gold", nats) for x in ("DPO", other))
            found[f"gold reward at KL {nats:g}: DPO - {other}"] = paired(*both)
    return found


def report(results: common.Results) -> tuple[str, str, str]:
    """Tables, verdict, effect."""
    row = lambda x, step=None: [  # noqa: E731
        show(t_interval([*results.values(x, n, step).values()]), digits) for n, (_, digits) in COLUMNS.items()
    ]
    rows = [["SFT", *row("DPO", 0)], *([x, *row(x)] for x in SETTINGS)]
    found = clauses(results)
    differences = [[name, show(x, 3), common.verdict([x])] for name, x in found.items()]
    at_kl = []
    for x in SETTINGS:
        cells = [
            show(t_interval([*matched(results, x, metric, nats).values()]))
            for nats in NATS
            for metric in ("gold", "readable")
        ]
        most = max(results.steps(x), key=lambda step: t_interval([*results.values(x, "kl", step).values()])[0])
        at_kl.append([x, *cells, show(t_interval([*results.values(x, "kl", most).values()]), 1)])
    header = [
        "at matched KL",
        *(f"{name}, KL {nats:g}" for nats in NATS for name in ("gold", "readable")),
        "largest KL",
    ]
    parts = [
        markdown(["at the end", *(title for title, _ in COLUMNS.values())], rows),
        markdown(header, at_kl),
        markdown(["difference, above 0 by the claim", "mean", ""], differences),
    ]
    named = [
        f"{name} {value}" for name, value, _ in differences if name.endswith("weight 1/2") or "weight 1/2 -" in name
    ]
    return "\n\n".join(parts), common.verdict([*found.values()]), "; ".join(named) + "."


def draw(results: common.Results, page) -> None:
    """Gold reward against KL along the runs, and entropy and fluency along the steps; means over seeds."""
    axes_of = page.subplots(1, 3)
    for x, colour in zip(SETTINGS, ("tab:blue", "tab:orange", "tab:red"), strict=True):
        steps = results.steps(x)
        mean = lambda metric, x=x, steps=steps: [t_interval([*results.values(x, metric, s).values()])[0] for s in steps]  # noqa: E731
        axes_of[0].plot(mean("kl"), mean("gold"), marker="o", markersize=3, color=colour, label=x)
        axes_of[0].plot(mean("kl"), mean("readable"), linestyle="--", linewidth=1, color=colour)
        axes_of[1].plot(steps, mean("entropy"), marker="o", markersize=3, color=colour, label=x)
        axes_of[2].plot(steps, mean("ref_nll"), marker="o", markersize=3, color=colour, label=x)
    axes_of[0].plot([], [], "k--", linewidth=1, label="readable gold")
    axes_of[0].set_xscale("symlog", linthresh=1)
    axes_of[0].set_xlabel("KL to SFT, nats an answer", fontsize=8)
    axes_of[0].set_title("gold reward", fontsize=9)
    axes_of[1].set_title("entropy, nats a token", fontsize=9)
    axes_of[2].set_title("reference's NLL, nats a token", fontsize=9)
    for axes in axes_of:
        axes.grid(alpha=0.3)
        axes.tick_params(labelsize=7)
    for axes in axes_of[1:]:
        axes.set_xlabel("updates", fontsize=8)
    axes_of[0].legend(fontsize=6)


if __name__ == "__main__":
    cli(main, Args)
