"""Likelihood displacement: DPO makes the preferred answer less likely, the more so the more alike the two answers are.

    python -m ablations.displacement            --quick, --smoke, --seeds
    python -m ablations.displacement --tier s   one pair of one token on a real model (tier_s.py)

Claim (Razin et al. 2024, arXiv 2410.08847; Pal et al. 2024, arXiv 2402.13228): DPO widens the margin between two
answers and lowers the log-prob of both, most of all between answers that are alike; DPO-positive, an NLL term (Pang et
al. 2024, arXiv 2404.19733) and NCA (Chen et al. 2024, arXiv 2402.05369), which hold on to the preferred answer, do not.

By hand first. A step of DPO on one pair (w, l) moves the logits themselves along e_w - e_l, and log pi(w) by
1 - pi(w) + pi(l) times a factor above 0: a table of logits never displaces. Where logits are W h and h is trained, the
step is along W_w - W_l, and log pi(w) moves by <W_w - sum_v pi(v) W_v, W_w - W_l>, which may be below 0.

Then the embedded task. Of each prompt the same preferred answer is paired with its own copy, in which one opinion word
is exchanged for a weaker one of its kind ("edit 1"), with another answer of less gold reward ("random"), or with the
one or the other by turns ("mixed"). D_w is log pi(w) - log ref(w) after the training, of pairs that were trained on.
CHES is Razin et al.'s measure of how alike two answers are, by length: <S_w, S_l> / (n_w n_l) - |S_w|^2 / n_w^2, with S
the sum over an answer's n tokens of the SFT model's last hidden states that predict them.

Criterion, written before the full run. Paired by seed, 95 % t-intervals. Reproduced: all of these are above 0.
Contradicted: one is below 0. Else not resolved. That D_w is higher need not mean more gold reward, which is reported.

    by hand    share of one-pair problems in which log pi(w) never falls - 0.999: of a table
               share in which it falls: of W h with like rows of w and l, and that - the share with unlike rows
    displaces  - mean D_w of DPO, edit 1
    alike      mean D_w of DPO: random - edit 1; and - Spearman's correlation of CHES and D_w, mixed
    fixed      mean D_w, edit 1: DPO-positive - DPO, DPO with NLL - DPO, NCA - DPO
"""

import itertools
import random
import statistics
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

import train_dpo
from ablations import common, plot
from ablations.common import markdown, paired, show, t_interval, trained
from ablations.displacement import tier_s
from rlhf import losses, models, reviews
from rlhf.data import Example, build, held_out, read_rows
from rlhf.runs import cli

NAME = "displacement"
CLAIM = "DPO lowers the log-prob of the preferred answer where both are alike; DPOP, an NLL term and NCA do not"
METHODS = {"DPO": "dpo", "DPO-positive": "dpop", "DPO with NLL": "dpo_nll", "NCA": "nca"}
KINDS = ("edit 1", "random")
RUNS = {f"{m}, {kind}": (loss, kind) for m, loss in METHODS.items() for kind in KINDS} | {
    "DPO, mixed": ("dpo", "mixed")
}
BY_HAND = ("table", "unlike rows", "like rows")
SETTINGS = dict.fromkeys((*BY_HAND, "SFT", *RUNS))
PROBLEMS, WORDS, WIDTH = 500, 8, 4  # by hand
LIKE = 0.3  # deviation of W_l from W_w in like rows; that of an entry of W is 1
BETA = 0.1
PAIRS = 1800  # a tenth of them held out
MEASURED = 512  # of the pairs trained on
PROMPTS, TEST = 6000, 256  # prompts; of the tenth that is held out
FULL = {"batch_size": 32, "max_steps": 50}
SMOKE = {"batch_size": 4, "max_steps": 2}
OF_KIND = {symbol: " ".join(levels.values()).split() for symbol, levels in reviews.OPINIONS.items()}
SYMBOL = {word: symbol for symbol, words in OF_KIND.items() for word in words}
MASS = ("preferred", "other", "kind", "opposite", "else")  # words at the place where an edit differs


@dataclass
class Args(common.Args):
    tier: Literal["w", "s"] = "w"
    """w: by hand and the embedded task; s: one pair of one token on a real model (tier_s.py), into tier_s.csv"""
    model: str = "HuggingFaceTB/SmolLM2-135M-Instruct"
    """of --tier s: a causal language model, as a local folder or a hub id"""


# -------------------------------------------------------------------------------------------------------------- by hand


def by_hand(setting: str, seed: int) -> dict[str, float]:
    """Gradient descent on DPO's loss of one pair, in many problems at once: words 0 and 1 of each are w and l."""
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
    fell, off = torch.zeros(PROBLEMS, dtype=torch.bool), 0.0
    for step in range(100):
        found = logps()
        chosen, rejected = (found - before)[:, :2].unbind(1)
        (gradient,) = torch.autograd.grad(losses.dpo(chosen, rejected, BETA).sum(), state, retain_graph=step == 0)
        if step == 0:  # the change of log pi(w) that the formula above says, against autograd's; 1/2 is s(-beta h)
            (of_chosen,) = torch.autograd.grad(found[:, 0].sum(), state)
            mean = torch.einsum("pv, pvd -> pd", found.detach().exp(), rows)
            formula = ((rows[:, 0] - mean) * (rows[:, 0] - rows[:, 1])).sum(1) * BETA / 2
            off = (-(gradient * of_chosen).sum(1) - formula).abs().max().item()
        with torch.no_grad():
            state -= gradient
            fell |= logps()[:, 0] < now[:, 0]
            now = logps()
    moved = now - before
    return {
        "fell": fell.double().mean().item(),
        "D_w": moved[:, 0].mean().item(),
        "margin": (moved[:, 0] - moved[:, 1]).mean().item(),
        "formula off": off,
    }


# ---------------------------------------------------------------------------------------------------- the embedded task


def main(a: Args) -> None:
    """Runs what results.csv does not have, and writes table and figure."""
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
    names, tasks = ["SFT", *("DPO, edit 1", "DPO, random", "DPO, mixed")] if a.smoke else ["SFT", *RUNS], []
    torch.set_num_threads(1)  # as in the processes of `each`, so that the numbers do not depend on the machine's cores
    for seed, setting in itertools.product(seeds, names):
        if not results.done(setting, seed):
            of = data(folder, seed, RUNS[setting][1], pairs) if setting in RUNS else ""
            tasks.append((setting, seed, of, common.sft_model(folder, a.smoke), folder, prompts, steps))
    for (setting, seed, *_), values, seconds in common.each(run, tasks, 2, folder):
        results.add(setting, seed, values | {"seconds": seconds})
    plot.finish(NAME, a, results, report, draw)


def edited(prompt: str, text: str, rng: random.Random) -> tuple[str, int] | None:
    """The text with one opinion word exchanged for another of its kind so that gold reward falls, and its place."""
    words = text.split()
    places = [i for i, word in enumerate(words) if word in SYMBOL]
    for i in rng.sample(places, len(places)):
        others = OF_KIND[SYMBOL[words[i]]]
        for other in rng.sample(others, len(others)):
            found = " ".join([*words[:i], other, *words[i + 1 :]])
            if reviews.gold_reward(f"{prompt} {found}") < reviews.gold_reward(f"{prompt} {text}"):
                return found, i
    return None


def data(folder: Path, seed: int, kind: str, pairs: int) -> str:
    """Preferences of a seed as a file: of each prompt the same preferred answer, whatever the kind."""
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


def run(setting: str, seed: int, data: str, sft: str, folder: Path, prompts: int, steps: dict) -> dict[str, float]:
    """One run of DPO (none for "SFT") -> what is measured at its end."""
    policy, out = sft, folder / f"{setting}-{seed}".replace(" ", "-").replace(",", "")
    if data:
        flags = {"data": data, "loss": RUNS[setting][0], "beta": BETA, "eval_fraction": 0.1, "seed": seed, **steps}
        policy = trained(train_dpo, out, model=sft, ref_cache=str(folder / "ref_cache"), eval_prompts=0, **flags)
    measured = common.measured(policy, sft, common.prompts(prompts)[1][:TEST], seed, 64)
    values = {name: statistics.fmean(measured[name]) for name in ("gold", "kl", "grammatical", "length")}
    if data:
        tokenizer, after, before = models.load_tokenizer(sft), *(models.load_model(x, "cpu") for x in (policy, sft))
        rows = build(read_rows(data)[0], tokenizer, "preference", 512, 1024, False, [])[0]
        train, held = held_out(rows, 0.1)
        values |= measure(after, before, tokenizer, train[:MEASURED])
        values["D_w held out"] = measure(after, before, tokenizer, held)["D_w"]
    return values


def measure(policy, reference, tokenizer, pairs: list[Example]) -> dict[str, float]:
    """What became of pairs: log-probs, by place of the edit too; where the mass went; CHES and its correlation."""
    pad, lengths = models.pad_id(tokenizer), [len(r) for e in pairs for r in e.responses]
    targets = torch.tensor([t for e in pairs for r in e.responses for t in r])
    states, logps = {}, {}
    for name, model in (("policy", policy), ("reference", reference)):
        models.use_layout(model, "tree")
        of = lambda batch: models.states(model, batch, batch.sources)  # noqa: B023, E731
        states[name] = models.per_token(of, pairs, "tree", pad, 2048, "cpu")
        logps[name] = (states[name] @ models.output_head(model).weight.T).log_softmax(1)
    change = logps["policy"].gather(1, targets[:, None])[:, 0] - logps["reference"].gather(1, targets[:, None])[:, 0]
    changes = change.split(lengths)
    D = torch.stack([x.sum() for x in changes]).unflatten(0, (-1, 2))
    values = {"D_w": D[:, 0].mean().item(), "D_l": D[:, 1].mean().item()}
    values["below 0"] = (D[:, 0] < 0).double().mean().item()

    means = torch.stack([x.mean(0) for x in states["reference"].split(lengths)]).unflatten(0, (-1, 2))
    ches = (means[:, 0] * means[:, 1]).sum(1) - means[:, 0].square().sum(1)
    values |= {"ches": ches.mean().item(), "spearman": spearman(ches, D[:, 0])}

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
    """What the words gained at the place of the edit, by what they are; all together 0."""
    preferred, other = (text.split()[pair.row["place"]] for text in pair.response_texts)
    symbol = SYMBOL[preferred]
    of = lambda words: moved[tokenizer.convert_tokens_to_ids(words)].sum().item()  # noqa: E731
    kind = [word for word in OF_KIND[symbol] if word not in (preferred, other)]
    opposite = OF_KIND[symbol.translate(str.maketrans("+-", "-+"))]
    found = [of([preferred]), of([other]), of(kind), of(opposite)]
    return dict(zip(MASS, [*found, -sum(found)], strict=True))


def spearman(x: Tensor, y: Tensor) -> float:
    """Correlation of ranks, in [-1, 1]; ties in the order that they come in."""
    ranks = torch.stack([x, y]).double().argsort(1).argsort(1)
    return torch.corrcoef(ranks.double())[0, 1].item()


# ----------------------------------------------------------------------------------------------------- table and figure


def clauses(results: common.Results) -> dict[str, tuple[float, float]]:
    """The differences of the criterion, with half their intervals."""
    of = results.values
    minus = lambda values: {seed: -x for seed, x in values.items()}  # noqa: E731
    alone = lambda values, less=0.0: t_interval([x - less for x in values.values()])  # noqa: E731
    edit = {m: of(f"{m}, edit 1", "D_w") for m in METHODS}
    never = {seed: 1 - x for seed, x in of("table", "fell").items()}
    found = {
        "by hand, a table: share that never falls - 0.999": alone(never, 0.999),
        "by hand, like rows: share that falls": alone(of("like rows", "fell")),
        "by hand: share that falls, like rows - unlike rows": paired(
            of("like rows", "fell"), of("unlike rows", "fell")
        ),
        "- D_w of DPO, edit 1": alone(minus(edit["DPO"])),
        "D_w of DPO: random - edit 1": paired(of("DPO, random", "D_w"), edit["DPO"]),
        "- Spearman(CHES, D_w), mixed": alone(minus(of("DPO, mixed", "spearman"))),
    }
    for m in METHODS:
        if m != "DPO" and edit[m]:
            found[f"D_w, edit 1: {m} - DPO"] = paired(edit[m], edit["DPO"])
    return found


def report(results: common.Results) -> tuple[str, str, str]:
    """Table, verdict, effect."""
    cell = lambda setting, name, digits=2: show(t_interval([*results.values(setting, name).values()]), digits)  # noqa: E731
    hand = [[x, cell(x, "fell", 3), cell(x, "D_w"), cell(x, "margin")] for x in BY_HAND]
    off = max(x for setting in BY_HAND for x in results.values(setting, "formula off").values())
    columns = ("D_w", "D_l", "below 0", "D_w held out", "ches", "spearman", "gold", "kl", "grammatical", "length")
    runs, edits = [], []
    for x in ("SFT", *RUNS):
        if results.values(x, "gold"):
            runs.append([x, *(cell(x, n) if results.values(x, n) else "" for n in columns)])
        if results.values(x, "mass else"):
            where = [cell(x, f"D_w {n}") for n in ("before", "at the edit", "after")]
            edits.append([x, *where, *(cell(x, f"mass {n}", 3) for n in MASS)])
    found = clauses(results)
    differences = [[name, show(x, 3), common.verdict([x])] for name, x in found.items()]
    parts = [
        markdown(["by hand", "log pi(w) falls", "D_w", "margin"], hand),
        f"By hand, the formula's change of log pi(w) and autograd's differ by {off:.0e} at most.",
        markdown(["run", *columns], runs),
        markdown(["run", "D_w before the edit", "at it", "after it", *(f"mass: {n}" for n in MASS)], edits),
        markdown(["difference, above 0 by the claim", "mean", ""], differences),
    ]
    real = common.Results(results.path.with_name("tier_s.csv"))
    if real.values_of:
        parts.append(tier_s.report(real))
    effect = (
        f"D_w of DPO, edit 1: {cell('DPO, edit 1', 'D_w')} nats, random: {cell('DPO, random', 'D_w')}; "
        f"Spearman with CHES, mixed: {cell('DPO, mixed', 'spearman')}."
    )
    return "\n\n".join(parts), common.verdict([*found.values()]), effect


def draw(results: common.Results, page) -> None:
    """D_w and D_l by run; gold reward against D_w."""
    left, right = page.subplots(1, 2, width_ratios=[3, 2])
    runs = [x for x in RUNS if results.values(x, "D_w")]
    bar = lambda half: half if half < float("inf") else 0.0  # noqa: E731
    for shift, name, colour in ((-0.2, "D_w", "tab:blue"), (0.2, "D_l", "tab:orange")):
        points = [t_interval([*results.values(x, name).values()]) for x in runs]
        xs = [i + shift for i in range(len(runs))]
        bars = [bar(half) for _, half in points]
        left.bar(xs, [mean for mean, _ in points], 0.4, yerr=bars, color=colour, capsize=2, label=name)
    left.axhline(0, color="black", lw=0.8)
    left.set_xticks(range(len(runs)), runs, rotation=40, ha="right")
    left.set_title("log-prob moved from the SFT model, nats", fontsize=9)
    left.legend(fontsize=7)
    for x in runs:
        (mean, half), (gold, its_half) = (t_interval([*results.values(x, n).values()]) for n in ("D_w", "gold"))
        right.errorbar([mean], [gold], [bar(its_half)], [bar(half)], marker="o", markersize=4, capsize=2, label=x)
    right.axhline(statistics.fmean(results.values("SFT", "gold").values()), color="gray", lw=0.8)
    right.set_xlabel("D_w, nats", fontsize=8)
    right.set_title("gold reward (line: SFT)", fontsize=9)
    right.legend(fontsize=6, ncols=2, loc="upper center", bbox_to_anchor=(0.5, -0.2))
    for axes in (left, right):
        axes.tick_params(labelsize=7)
        axes.grid(alpha=0.3)


if __name__ == "__main__":
    cli(main, Args)
