"""Likelihood displacement: DPO makes the preferred answer less likely, most when the two answers are alike.

    python -m ablations.displacement            --quick, --smoke, --seeds
    python -m ablations.displacement --tier s   one pair of one token on a real model (tier_s.py)

Claim (Razin et al. 2024, arXiv 2410.08847; Pal et al. 2024, arXiv 2402.13228): DPO widens the margin between two
answers and lowers the log-prob of both, most of all between answers that are alike; DPO-positive, an NLL term (Pang et
al. 2024, arXiv 2404.19733) and NCA (Chen et al. 2024, arXiv 2402.05369), which hold on to the preferred answer, do not.

By hand first. A DPO step on one pair (w, l) of a table of logits moves it along e_w - e_l, and log pi(w) by
1 - pi(w) + pi(l) times a positive factor: a table never displaces. If the logits are W h and h is trained, the step is
along W_w - W_l, and log pi(w) moves by <W_w - sum_v pi(v) W_v, W_w - W_l>, which may be below 0.

Then the embedded task. The same preferred answer to each prompt is paired with a copy of itself in which one opinion
word is replaced by a weaker one of its kind ("edit 1"), with another answer of less gold reward ("random"), or with
either in turn ("mixed"). D_w is log pi(w) - log ref(w) after training, on pairs that were trained on. CHES is Razin et
al.'s measure of how alike two answers are, normalised by length: <S_w, S_l> / (n_w n_l) - |S_w|^2 / n_w^2, with S the
sum over an answer's n tokens of the SFT model's last hidden states that predict them.

The preferred answers are samples of the grammar that the SFT model learnt, and the mean of log pi - log ref over such
samples is about -KL(ref || pi): below 0 for any policy that moves at all (Rafailov et al. 2024, arXiv 2406.02900). So
D_w is compared with that mean over other answers of the grammar to the same prompts ("fresh"). A loss that hardly moves
also hardly lowers anything, so the losses are compared at one margin too: where each run first reaches the mean margin
D_w - D_l at which the run with the smaller one ends, interpolated linearly between checkpoints. The strength of each
loss (beta, or the coefficient of its own term) is the one of three with the most gold reward on validation prompts, in
trials with pairs of their own.

Criterion, written before the full run. Paired by seed, 95 % t-intervals. Reproduced: all of these are above 0.
Contradicted: one is below 0. Else not resolved. That D_w is higher need not mean more gold reward, which is reported.

    by hand    share of one-pair problems whose D_w ends below 0: rows of w and l alike - unlike
    displaces  - mean D_w of DPO, edit 1; and the mean of fresh answers - that D_w
    alike      mean D_w of DPO, random - edit 1: of pairs trained on, and of held-out ones
               - Spearman's correlation of CHES and D_w, mixed
    hold       mean D_w of DPO-positive, of DPO with NLL, of NCA, edit 1, at the end
    at margin  mean D_w, edit 1, at one margin: DPO-positive - DPO, DPO with NLL - DPO, NCA - DPO
"""

import itertools
import random
import shutil
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

import train_dpo
from ablations import common, plot
from ablations.common import at_checkpoints, between, markdown, paired, show, t_interval
from ablations.displacement import tier_s
from rlhf import losses
from support import models, reviews, scoring
from support.examples import Example, build, held_out
from support.reward_report import correlation, ranks_of
from support.rows import read_rows
from support.runs import cli
from support.scoring import Batching

NAME = "displacement"
CLAIM = (
    "DPO lowers the log-prob of the preferred answer, most if the two answers are alike; "
    "DPOP, an NLL term and NCA do not"
)
METHODS = {  # loss, flag and its three trials
    "DPO": ("dpo", "beta", (0.03, 0.1, 0.3)),
    "DPO-positive": ("dpop", "dpop_lambda", (0.5, 5.0, 50.0)),
    "DPO with NLL": ("dpo_nll", "nll_coef", (0.1, 0.3, 1.0)),
    "NCA": ("nca", "beta", (0.03, 0.1, 0.3)),
}
TRIALS = {f"{m} {flag} {x:g}": (m, x) for m, (_, flag, values) in METHODS.items() for x in values}
TRIAL_SEED = 1000  # of the trials' pairs and answers; results.csv lists the trials under seed 0
KINDS = ("edit 1", "random")
RUNS = {f"{m}, {kind}": (m, kind) for m in METHODS for kind in KINDS} | {"DPO, mixed": ("DPO", "mixed")}
BY_HAND = ("table", "unlike rows", "like rows")
SETTINGS = dict.fromkeys((*BY_HAND, "SFT", *RUNS))
PROBLEMS, WORDS, WIDTH = 500, 8, 4  # by hand
LIKE = 0.3  # deviation of W_l from W_w in like rows; entries of W have deviation 1
BETA = 0.1  # except in trials of beta
PAIRS, HELD = 2100, 0.25  # and their held-out share
MEASURED = 512  # pairs trained on, and held-out pairs
FRESH = 2  # other answers per prompt
PROMPTS, TEST = 6000, 256  # prompts; test prompts of the held-out tenth, and as many for the trials
FULL = {"batch_size": 32, "max_steps": 50, "epochs": 2}
SMOKE = {"batch_size": 4, "max_steps": 2}
EVERY = 7  # steps between measurements
OF_KIND = {symbol: " ".join(levels.values()).split() for symbol, levels in reviews.OPINIONS.items()}
SYMBOL = {word: symbol for symbol, words in OF_KIND.items() for word in words}
MASS = ("preferred", "other", "kind", "opposite", "else")  # groups of words at the edit


@dataclass
class Args(common.Args):
    tier: Literal["w", "s"] = "w"
    """w: by hand and the embedded task; s: one pair of one token on a real model (tier_s.py), into tier_s.csv"""
    model: str = "HuggingFaceTB/SmolLM2-135M-Instruct"
    """causal language model for --tier s: a local folder or a hub id"""


# -------------------------------------------------------------------------------------------------------------- by hand


def by_hand(setting: str, seed: int) -> dict[str, float]:
    """Gradient descent on DPO's loss for one pair, in many problems at once; words 0 and 1 of each are w and l."""
    world = torch.Generator().manual_seed(seed)
    normal = lambda *shape: torch.randn(PROBLEMS, *shape, generator=world, dtype=torch.float64)  # noqa: E731
    rows = torch.eye(WORDS, dtype=torch.float64).expand(PROBLEMS, -1, -1)
    if setting != "table":
        rows = normal(WORDS, WIDTH)
        if setting == "like rows":
            rows[:, 1] = rows[:, 0] + LIKE * normal(WIDTH)
    state = normal(rows.shape[2]).requires_grad_()
    logps = lambda: torch.einsum("pvd, pd -> pv", rows, state).log_softmax(1)  # noqa: E731
    before = now = logps().detach()
    fell, gap = torch.zeros(PROBLEMS, dtype=torch.bool), 0.0
    for step in range(100):
        current = logps()
        chosen, rejected = (current - before)[:, :2].unbind(1)
        (gradient,) = torch.autograd.grad(losses.dpo(chosen, rejected, BETA).sum(), state, retain_graph=step == 0)
        if step == 0:  # the formula's change of log pi(w) against autograd's; 1/2 is sigmoid(-beta h) at h = 0
            (of_chosen,) = torch.autograd.grad(current[:, 0].sum(), state)
            mean = torch.einsum("pv, pvd -> pd", current.detach().exp(), rows)
            formula = ((rows[:, 0] - mean) * (rows[:, 0] - rows[:, 1])).sum(1) * BETA / 2
            gap = (-(gradient * of_chosen).sum(1) - formula).abs().max().item()
        with torch.no_grad():
            state -= gradient
            fell |= logps()[:, 0] < now[:, 0]
            now = logps()
    moved = now - before
    return {
        "fell": fell.double().mean().item(),
        "below 0": (moved[:, 0] < 0).double().mean().item(),
        "D_w": moved[:, 0].mean().item(),
        "margin": (moved[:, 0] - moved[:, 1]).mean().item(),
        "formula off": gap,
    }


# ---------------------------------------------------------------------------------------------------- the embedded task


def main(a: Args) -> None:
    """Run whatever results.csv lacks, and write table and figure."""
    results, folder = common.results(NAME, a), common.work(NAME, a)
    if a.tier == "s":
        real = common.Results(results.path.with_name("tier_s.csv"))
        tier_s.main(real, folder, a.model, a.smoke)
        print(tier_s.report(real))
        return
    seeds = range(1 if a.smoke else 2 if a.quick else a.seeds)
    for setting, seed in itertools.product(BY_HAND, seeds):
        if not results.done(setting, seed):
            began = time.process_time()
            values = by_hand(setting, seed)
            results.add(setting, seed, values | {"seconds": time.process_time() - began})
    pairs, prompts, steps = (60, 100, SMOKE) if a.smoke else (PAIRS, PROMPTS, FULL)
    torch.set_num_threads(1)  # as in the processes of `each`, so that results do not depend on the number of cores

    def go(tasks: Sequence[tuple[str, int, str, dict]]) -> None:
        """Run the missing tasks of (setting, seed, kind of pairs, flags); one without flags measures the SFT model."""
        given = []
        for setting, seed, kind, flags in tasks:
            if not results.done(setting, seed):
                drawn = TRIAL_SEED if setting in TRIALS else seed
                if flags:
                    flags = {"data": data(folder, drawn, kind, pairs), "beta": BETA} | steps | flags
                given.append((setting, seed, drawn, common.sft_model(folder, a.smoke), flags, folder, prompts))
        for (setting, seed, *_), (along, end), seconds in common.each(run, given, 1 if a.smoke else 2, folder):
            for step, values in along.items():
                results.add(setting, seed, values, step)
            results.add(setting, seed, end | {"seconds": seconds})

    tried = [*TRIALS][:1] if a.smoke else [*TRIALS]
    flags = lambda m, x: {"loss": METHODS[m][0], METHODS[m][1]: x}  # noqa: E731
    go([(name, 0, "edit 1", flags(*TRIALS[name])) for name in tried])
    chosen, looks = strengths(results), {"save_every": 1 if a.smoke else EVERY}
    settings = [x for x in RUNS if x.startswith("DPO,")] if a.smoke else [*RUNS]
    every = [(seed, x, *RUNS[x]) for seed, x in itertools.product(seeds, settings)]
    runs = [(x, seed, kind, flags(m, chosen[m]) | looks) for seed, x, m, kind in every if m in chosen]
    go([("SFT", seed, "", {}) for seed in seeds] + runs)
    plot.finish(NAME, a, results, report, draw)


def strengths(results: common.Results) -> dict[str, float]:
    """Method -> the value of its flag in the trial with the most gold reward."""
    gold = {name: results.values(name, "gold")[0] for name in TRIALS if results.done(name, 0)}
    best = {TRIALS[name][0]: TRIALS[name][1] for name in sorted(gold, key=lambda name: gold[name])}
    return {m: best[m] for m in METHODS if m in best}


def edited(prompt: str, text: str, rng: random.Random) -> tuple[str, int] | None:
    """The text with one opinion word replaced by one of its kind that lowers gold reward, and its position; or None."""
    words = text.split()
    places = [i for i, word in enumerate(words) if word in SYMBOL]
    for i in rng.sample(places, len(places)):
        others = OF_KIND[SYMBOL[words[i]]]
        for other in rng.sample(others, len(others)):
            edit = " ".join([*words[:i], other, *words[i + 1 :]])
            if reviews.gold_reward(f"{prompt} {edit}") < reviews.gold_reward(f"{prompt} {text}"):
                return edit, i
    return None


def data(folder: Path, seed: int, kind: str, pairs: int) -> str:
    """The file of a seed's preferences; the preferred answer to a prompt is the same for every kind."""
    path = folder / f"pairs-{seed}-{kind}.jsonl".replace(" ", "-")
    if not path.exists():
        rng, rows = random.Random(seed), []
        for prompt in reviews.prompts(3 * pairs, seed + 1):
            text, *others = reviews.continuations(prompt, 4, rng)
            gold = reviews.gold_reward(f"{prompt} {text}")
            others = [other for other in others if reviews.gold_reward(f"{prompt} {other}") < gold]
            edit = edited(prompt, text, rng)
            if edit and others:
                edits = kind == "edit 1" or kind == "mixed" and len(rows) % 2 == 0
                rejected, place = edit if edits else (others[0], -1)
                rows.append({"prompt": prompt, "chosen": text, "rejected": rejected, "place": place})
            if len(rows) == pairs:
                break
        common.write(path, rows)
    return str(path)


def run(
    setting: str, seed: int, drawn: int, sft: str, flags: dict, folder: Path, prompts: int
) -> tuple[dict[int, dict[str, float]], dict[str, float]]:
    """One DPO run with these flags (none for "SFT") and the seed `drawn` -> {step: values of the pairs}, and all values
    at its end."""
    held_prompts = common.prompts(prompts)[1]
    half = len(held_prompts) // 2
    held_prompts = (held_prompts[half:] if setting in TRIALS else held_prompts[:half])[:TEST]

    def answers(model: str) -> dict[str, float]:
        stats = common.measured(model, sft, held_prompts, drawn, 64)
        return {name: statistics.fmean(stats[name]) for name in ("gold", "kl", "grammatical", "length")}

    if not flags:
        return {}, answers(sft)
    tokenizer, policy, reference = models.load_tokenizer(sft), *(models.load_model(sft, "cpu") for _ in range(2))
    rows = build(read_rows(flags["data"])[0], tokenizer, "preference", 512, 1024)[0]
    pairs, held = (part[:MEASURED] for part in held_out(rows, HELD))
    others = fresh(pairs, tokenizer, drawn)
    pad = models.pad_id(tokenizer)
    score = lambda model, x: torch.cat(scoring.score_logps(model, x, Batching("tree", pad)))  # noqa: E731
    before, other_before = score(reference, pairs), score(reference, others)
    along: dict[int, dict[str, float]] = {}

    def look(step: int, weights: dict) -> None:
        policy.load_state_dict(weights)
        D_w, D_l = (score(policy, pairs) - before).unflatten(0, (-1, 2)).mean(0).tolist()
        along[step] = {"D_w": D_w, "D_l": D_l, "fresh": (score(policy, others) - other_before).mean().item()}

    out = folder / f"{setting}-{seed}".replace(" ", "-").replace(",", "")
    shutil.rmtree(out, ignore_errors=True)  # left by a stopped run
    flags = {"eval_fraction": HELD, "eval_prompts": 0, "device": "cpu", "seed": drawn} | flags
    with at_checkpoints(look):
        train_dpo.main(train_dpo.Args(model=sft, out=str(out), ref_cache=str(folder / "ref_cache"), **flags))
    end = along[max(along)] | answers(str(out)) | measure(policy, reference, tokenizer, pairs)
    held_out_values = measure(policy, reference, tokenizer, held)
    shutil.rmtree(out)
    return along, end | {f"{name} held out": held_out_values[name] for name in ("D_w", "below 0")}


def fresh(pairs: Sequence[Example], tokenizer, seed: int) -> list[Example]:
    """Other answers of the grammar to the prompts of these pairs, FRESH per prompt."""
    rng = random.Random(f"fresh {seed}")
    texts = [(e.prompt_text, text) for e in pairs for text in reviews.continuations(e.prompt_text, FRESH, rng)]
    rows = [("fresh", {"prompt": prompt, "completion": text}) for prompt, text in texts]
    return build(rows, tokenizer, "sft", 512, 1024)[0]


def measure(policy, reference, tokenizer, pairs: Sequence[Example]) -> dict[str, float]:
    """Changes in log-prob, also before, at and after the edit; mass moved at the edit; CHES and its correlation."""
    pad, lengths = models.pad_id(tokenizer), [len(r) for e in pairs for r in e.responses]
    targets = torch.tensor([t for e in pairs for r in e.responses for t in r])
    states, logps = {}, {}
    for name, model in (("policy", policy), ("reference", reference)):
        of = lambda batch: scoring.hidden_states(model, batch, batch.sources)  # noqa: B023, E731
        states[name] = scoring.per_token(of, pairs, Batching("tree", pad))
        logps[name] = (states[name] @ models.output_head(model).weight.T).log_softmax(1)
    change = logps["policy"].gather(1, targets[:, None])[:, 0] - logps["reference"].gather(1, targets[:, None])[:, 0]
    changes = change.split(lengths)
    D = torch.stack([x.sum() for x in changes]).unflatten(0, (-1, 2))
    values = {"D_w": D[:, 0].mean().item(), "D_l": D[:, 1].mean().item()}
    values["below 0"] = (D[:, 0] < 0).double().mean().item()

    means = torch.stack([x.mean(0) for x in states["reference"].split(lengths)]).unflatten(0, (-1, 2))
    ches = (means[:, 0] * means[:, 1]).sum(1) - means[:, 0].square().sum(1)
    values |= {"ches": ches.mean().item(), "spearman": correlation(ranks_of(ches), ranks_of(D[:, 0]))}

    places = [e.row["place"] for e in pairs]
    edits = [i for i, place in enumerate(places) if place >= 0]
    if edits:
        parts = [(changes[2 * i], places[i]) for i in edits]
        values["D_w at the edit"] = statistics.fmean(x[place].item() for x, place in parts)
        values["D_w before"] = statistics.fmean(x[:place].sum().item() for x, place in parts)
        values["D_w after"] = statistics.fmean(x[place + 1 :].sum().item() for x, place in parts)
        moved = (logps["policy"].exp() - logps["reference"].exp()).split(lengths)
        shares = [mass(moved[2 * i][places[i]], pairs[i], tokenizer) for i in edits]
        values |= {f"mass {name}": statistics.fmean(share[name] for share in shares) for name in MASS}
    return values


def mass(moved: Tensor, pair: Example, tokenizer) -> dict[str, float]:
    """Probability gained at the edit by each group of words in MASS; they sum to 0."""
    preferred, other = (text.split()[pair.row["place"]] for text in pair.response_texts)
    symbol = SYMBOL[preferred]
    of = lambda words: moved[tokenizer.convert_tokens_to_ids(words)].sum().item()  # noqa: E731
    kind = [word for word in OF_KIND[symbol] if word not in (preferred, other)]
    opposite = OF_KIND[symbol.translate(str.maketrans("+-", "-+"))]
    gains = [of([preferred]), of([other]), of(kind), of(opposite)]
    return dict(zip(MASS, [*gains, -sum(gains)], strict=True))


# ----------------------------------------------------------------------------------------------------- table and figure


def excess(results: common.Results, setting: str) -> dict[int, float]:
    """Seed -> D_w less the mean of fresh answers."""
    fresh_mean = results.values(setting, "fresh")
    return {seed: x - fresh_mean[seed] for seed, x in results.values(setting, "D_w").items()}


def path(results: common.Results, setting: str, seed: int) -> list[dict[str, float]]:
    """Margin, D_w, and D_w less the mean of fresh answers ("excess"), at the start and at each measured step."""
    points = [{"margin": 0.0, "D_w": 0.0, "excess": 0.0}]
    for step in results.steps(setting):
        D_w, D_l, fresh_mean = (results.values_of[setting, seed, step, name] for name in ("D_w", "D_l", "fresh"))
        points.append({"margin": D_w - D_l, "D_w": D_w, "excess": D_w - fresh_mean})
    return points


def at_one_margin(results: common.Results, *settings: str) -> dict[str, dict[str, dict[int, float]]]:
    """Setting -> margin, D_w and excess (`path`) -> seed -> the value where each first reaches the smallest of their
    last margins."""
    values_of: dict[str, dict[str, dict[int, float]]] = {x: {"margin": {}, "D_w": {}, "excess": {}} for x in settings}
    for seed in results.values(settings[0], "D_w"):
        paths = {x: path(results, x, seed) for x in settings}
        least = min(points[-1]["margin"] for points in paths.values())
        for x, points in paths.items():
            for name, values in values_of[x].items():
                values[seed] = between([(point["margin"], point[name]) for point in points], least)
    return values_of


def clauses(results: common.Results) -> dict[str, tuple[float, float]]:
    """Clause of the criterion -> mean and half its interval."""
    of = results.values
    alone = lambda values, sign=1: t_interval([sign * x for x in values.values()])  # noqa: E731
    differences = {
        "by hand, share with D_w < 0: like rows - unlike rows": paired(
            of("like rows", "below 0"), of("unlike rows", "below 0")
        ),
        "- D_w of DPO, edit 1": alone(of("DPO, edit 1", "D_w"), -1),
        "fresh - D_w of DPO, edit 1": alone(excess(results, "DPO, edit 1"), -1),
    }
    for name in ("D_w", "D_w held out"):
        differences[f"{name} of DPO: random - edit 1"] = paired(of("DPO, random", name), of("DPO, edit 1", name))
    differences["- Spearman(CHES, D_w), mixed"] = alone(of("DPO, mixed", "spearman"), -1)
    for m in [m for m in METHODS if m != "DPO" and of(f"{m}, edit 1", "D_w")]:
        dpo, other = (x["D_w"] for x in at_one_margin(results, "DPO, edit 1", f"{m}, edit 1").values())
        differences[f"D_w, edit 1: {m}"] = alone(of(f"{m}, edit 1", "D_w"))
        differences[f"D_w, edit 1, at one margin: {m} - DPO"] = paired(other, dpo)
    return differences


def report(results: common.Results) -> tuple[str, str, str]:
    """Tables, verdict, effect."""
    all_of = lambda values, digits=2: show(t_interval([*values.values()]), digits) if values else ""  # noqa: E731
    cell = lambda setting, name, digits=2: all_of(results.values(setting, name), digits)  # noqa: E731
    hand = [[x, cell(x, "fell", 3), cell(x, "below 0", 3), cell(x, "D_w"), cell(x, "margin")] for x in BY_HAND]
    gap = max(x for setting in BY_HAND for x in results.values(setting, "formula off").values())
    columns = ("D_w", "D_l", "fresh", "below 0", "D_w held out", "below 0 held out", "ches", "spearman")
    of_answers = ("gold", "kl", "grammatical", "length")
    runs, edits, sampled, at_one = [], [], [], []
    for x in [x for x in ("SFT", *RUNS) if results.values(x, "gold")]:
        sampled.append([x, *(cell(x, n) for n in of_answers)])
        if x in RUNS:
            runs.append([x, *(cell(x, n) for n in columns), all_of(excess(results, x))])
        if results.values(x, "mass else"):
            where = [cell(x, f"D_w {n}") for n in ("before", "at the edit", "after")]
            edits.append([x, *where, *(cell(x, f"mass {n}", 3) for n in MASS)])
    against = {x: f"DPO, {kind}" for x, (m, kind) in RUNS.items() if m != "DPO"} | {"DPO, random": "DPO, edit 1"}
    for x, y in [(x, y) for x, y in against.items() if all(results.values(z, "D_w") for z in (x, y))]:
        second, first = at_one_margin(results, y, x).values()
        differences = [show(paired(first[n], second[n]), 3) for n in ("D_w", "excess")]
        differences += [show(paired(results.values(x, n), results.values(y, n)), 3) for n in ("D_w", "gold")]
        at_one.append([f"{x} - {y}", *map(all_of, (first["margin"], second["D_w"], first["D_w"])), *differences])
    trials = []
    for name in [x for x in TRIALS if results.done(x, 0)]:
        trials.append([name, *(cell(name, n) for n in ("gold", "kl", "D_w", "D_l"))])
    criterion = clauses(results)
    lines = [[name, show(x, 3), common.verdict([x])] for name, x in criterion.items()]
    taken = "; ".join(f"{m}: {METHODS[m][1]} {x:g}" for m, x in strengths(results).items())
    parts = [
        markdown(["by hand", "log pi(w) falls at some step", "ends below", "D_w", "margin"], hand),
        f"By hand, the formula's change of log pi(w) and autograd's differ by {gap:.0e} at most.",
        markdown(["pairs", *columns, "D_w - fresh"], runs),
        markdown(["answers", *of_answers], sampled),
        markdown(["run", "D_w before the edit", "at it", "after it", *(f"mass: {n}" for n in MASS)], edits),
        markdown(["difference (claim: above 0)", "mean", ""], lines),
    ]
    if at_one:
        header = ["first - second, at one margin", "margin", "D_w of the second", "D_w of the first"]
        header += ["difference: D_w", "difference: D_w - fresh", "at the end: D_w", "at the end: gold"]
        parts.append(markdown(header, at_one))
    parts += [
        f"The trials, edit 1, on validation prompts, with what was taken from them ({taken}):",
        markdown(["trial", "gold", "kl", "D_w", "D_l"], trials),
    ]
    real = common.Results(results.path.with_name("tier_s.csv"))
    if real.values_of:
        parts.append(tier_s.report(real))
    effect = (
        f"Log-ratio D_w of the chosen answers under DPO: {cell('DPO, edit 1', 'D_w')} nats for near pairs (edit 1: one "
        f"word differs), {cell('DPO, random', 'D_w')} for random pairs; of fresh answers after near pairs: "
        f"{cell('DPO, edit 1', 'fresh')}; Spearman of D_w and CHES, mixed pairs: {cell('DPO, mixed', 'spearman')}."
    )
    return "\n\n".join(parts), common.verdict([*criterion.values()]), effect


def draw(results: common.Results, page) -> None:
    """Left: D_w, fresh and D_l of each run. Right: D_w against the margin along the runs with edits."""
    left, right = page.subplots(1, 2, width_ratios=[3, 2])
    runs = [x for x in RUNS if results.values(x, "D_w")]
    for i, (name, colour) in enumerate({"D_w": "C0", "fresh": "gray", "D_l": "C1"}.items()):
        points = [t_interval([*results.values(x, name).values()]) for x in runs]
        bars = [half if half < float("inf") else 0.0 for _, half in points]
        xs = [j + 0.27 * (i - 1) for j in range(len(runs))]
        left.bar(xs, [mean for mean, _ in points], 0.27, yerr=bars, color=colour, capsize=2, label=name)
    left.axhline(0, color="black", lw=0.8)
    left.set_xticks(range(len(runs)), runs, rotation=40, ha="right")
    left.set_title("log-prob moved from the SFT model, nats", fontsize=9)
    for m in [m for m in METHODS if f"{m}, edit 1" in runs]:
        of = lambda name, step, m=m: statistics.fmean(results.values(f"{m}, edit 1", name, step).values())  # noqa: E731
        points = [(0.0, 0.0)]
        for step in results.steps(f"{m}, edit 1"):
            points.append((of("D_w", step) - of("D_l", step), of("D_w", step)))
        right.plot(*zip(*points, strict=True), marker="o", markersize=3, label=m)
    right.axhline(0, color="black", lw=0.8)
    right.set_xlabel("margin D_w - D_l, nats", fontsize=8)
    right.set_title("D_w on the way, edit 1", fontsize=9)
    for axes in (left, right):
        axes.tick_params(labelsize=7)
        axes.grid(alpha=0.3)
        axes.legend(fontsize=7)


if __name__ == "__main__":
    cli(main, Args)
