"""Today's surrogates on the same answers: where their mean gradients point, how noisy they are, where training ends.

    python -m ablations.surrogates            --quick, --smoke, --seeds, --jobs

Each seed is a world of its own (ablations/world.py) with an SFT model, whose expected gold reward E[R] and its gradient
are sums over all 2,801 answers to a prompt. All methods are flags of train_ppo.py, without a KL term, with 8 answers to
a prompt, their usual clip bounds and averages, and the group-normalised advantages of GRPO (RLOO has its own):

    RLOO            leave-one-out advantage, each answer's sum, clip 0.2         Ahmadian et al. 2024, arXiv 2402.14740
    GRPO            each answer's mean, clip 0.2                                 Shao et al. 2024, arXiv 2402.03300
    clip-high       GRPO with an upper clip of 0.28                              Yu et al. 2025 (DAPO), arXiv 2503.14476
    token average   GRPO with a mean over all tokens                             the same
    DAPO            both                                                         the same
    GSPO            one ratio for an answer, clip 3e-4 below and 4e-4 above      Zheng et al. 2025, arXiv 2507.18071
    GSPO 0.2        GSPO with a clip of 0.2, reported and not judged
    CISPO           the ratio as a weight of at most 5, a mean over all tokens   Chen et al. 2025, arXiv 2506.13585

gradients   The SFT model answers 8 training prompts in 96 rollouts, which are saved. `train_ppo.update` computes each
            method's gradient of each rollout, first at the model that sampled (ratio 1), then after the model has moved
            by 4 and by 8 updates of Adam along the exact gradient, while the rollouts stay. `cosine` is between the
            mean gradient and the exact one of E[R] at the same model, `variance` is E|g - mean|^2 / |mean|^2, where g
            is the gradient of 64 answers. |mean|^2 is estimated without bias, as |average of g|^2 less its variance.
training    train_ppo.py from the SFT model at each of RATES: 6 rollouts of 32 prompts, 2 passes in 4 minibatches each.
            E[R] and KL to the SFT model are exact, on 32 prompts that no run trains on. Each method's learning rate has
            the highest E[R] in two worlds that are not among the seeds: one rate for the end, and one for each KL, at
            which E[R] is linear between the rollouts of a run.

Claims: GRPO divides by the group's deviation and by the length, which turns its gradient, and RLOO does not (Liu et al.
2025, arXiv 2503.20783); ratios of tokens are noisy, and one ratio for an answer is not (Zheng et al.); at equal numbers
of updates DAPO is above GRPO (Yu et al.), GSPO above GRPO (Zheng et al.), and CISPO above DAPO (Chen et al.).

Criterion, written before the full run. Differences are paired by seed, with 95 % t-intervals. Reproduced: all of these
are above 0. Contradicted: one is below 0. Else not resolved.

    turned      cosine at ratio 1, RLOO - GRPO
    noise       log of the variance after 8 updates, GRPO - GSPO
    DAPO        E[R] at the end, DAPO - GRPO
    GSPO        E[R] at the end, GSPO - GRPO
    CISPO       E[R] at the end, CISPO - DAPO

Reported and not judged: the other methods and numbers of updates, and E[R] at equal KL and, added after the results, at
equal learning rates.
"""

import dataclasses
import random
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

import train_ppo
from ablations import common, plot, world
from ablations.common import at_checkpoints, between, markdown, paired, show, t_interval
from support import models, scoring
from support.examples import Example, build
from support.generate import answer
from support.runs import cli
from support.scoring import Batching

NAME = "surrogates"
CLAIM = (
    "GRPO's mean gradient is turned, RLOO's is not; GSPO's has less variance than GRPO's once the policy has moved; "
    "after as many updates DAPO and GSPO have more reward than GRPO, and CISPO more than DAPO"
)
GRPO = {"advantage": "grpo", "average": "responses", "clip_range": 0.2, "clip_high": 0.2}
METHODS = {  # flags of train_ppo.py
    "RLOO": GRPO | {"advantage": "rloo", "average": "sequences"},
    "GRPO": GRPO,
    "clip-high": GRPO | {"clip_high": 0.28},
    "token average": GRPO | {"average": "tokens"},
    "DAPO": GRPO | {"clip_high": 0.28, "average": "tokens"},
    "GSPO": GRPO | {"surrogate": "sequence", "clip_range": 3e-4, "clip_high": 4e-4},
    "GSPO 0.2": GRPO | {"surrogate": "sequence"},
    "CISPO": GRPO | {"surrogate": "cispo", "average": "tokens", "clip_high": 4.0},
}
K, PROMPTS, ROLLOUTS = 8, 8, 96  # answers to a prompt; prompts and number of the saved rollouts
MOVES, MOVE_RATE = (0, 4, 8), 3e-4  # updates along the exact gradient before the gradients are computed, and their rate
STEPS, BATCH = 6, 32  # of training: rollouts, prompts in each
RATES, VALIDATION_SEEDS = (3e-4, 1e-3, 3e-3, 1e-2, 3e-2), (100, 101)
SETTINGS = {f"{method} at {rate:g}": flags | {"lr": rate} for method, flags in METHODS.items() for rate in RATES}
SETTINGS |= {f"{method}, gradient": flags for method, flags in METHODS.items()}
NATS = (0.5, 1.0, 2.0)  # at which methods are compared
COSINE = 0.9  # between the gradient and the exact one, for the number of answers that it takes


@dataclass
class Args(common.Args):
    jobs: int = 2
    """processes, one thread each, >= 1; the results do not depend on it"""


def main(a: Args) -> None:
    """Run whatever results.csv lacks, and write table and figure."""
    torch.set_num_threads(1)
    results, folder = common.results(NAME, a), common.work(NAME, a)
    short = a.smoke or a.quick
    seeds, others = range(min(a.seeds, 1 if short else a.seeds)), VALIDATION_SEEDS[: 1 if short else None]
    steps, rollouts = (1, 2) if a.smoke else (STEPS, ROLLOUTS)
    settings = [x for x in SETTINGS if "lr" in SETTINGS[x] and (not a.smoke or SETTINGS[x]["lr"] == 1e-3)]
    for seed in (*others, *seeds):
        prepare(seed, folder, 128 if a.smoke else world.SENTENCES)
    tasks = [(x, seed, folder, steps) for seed in (*others, *seeds) for x in settings if not results.done(x, seed)]
    for (setting, seed, *_), along, seconds in common.each(train, tasks, a.jobs, folder):
        for step, values in along.items():
            results.add(setting, seed, values, step)
        results.add(setting, seed, {"seconds": seconds})
    missing = [x for x in seeds if not all(results.done(f"{method}, gradient", x) for method in METHODS)]
    for (seed, *_), values_of, seconds in common.each(
        gradients, [(x, folder, rollouts) for x in missing], a.jobs, folder
    ):
        for method in (x for x in METHODS if not results.done(f"{x}, gradient", seed)):
            for step, values in values_of[method].items():
                results.add(f"{method}, gradient", seed, values, step)
            results.add(f"{method}, gradient", seed, {"seconds": seconds / len(METHODS)})
    plot.finish(NAME, a, results, report, draw)


def prepare(seed: int, folder: Path, sentences: int) -> None:
    """Make the world's SFT model and its file of prompts."""
    place = folder / f"world-{seed}"
    world.learn_source(place, seed, sentences)
    common.write(place / "prompts.jsonl", [{"prompt": x, "world": seed} for x in world.prompts(seed)["train"]])


# ------------------------------------------------------------------------------------------------------------ gradients


def gradients(seed: int, folder: Path, rollouts: int) -> dict[str, dict[int, dict[str, float]]]:
    """Method -> number of MOVES -> cosine, variance, share clipped and KL to the sampling policy, in one world."""
    sft, asked = str(folder / f"world-{seed}" / "sft"), world.prompts(seed)["train"][:PROMPTS]
    policy, tokenizer = models.load_model(sft, "cpu"), models.load_tokenizer(sft)
    batching, r = Batching("padded", models.pad_id(tokenizer)), world.rewards(seed, asked)
    rows = [("", {"prompt": prompt, "world": seed}) for prompt in asked]
    examples, _ = build(rows, tokenizer, "prompts", *world.LIMITS.values())
    args = {method: world.args(train_ppo, k=K, **flags) for method, flags in METHODS.items()}
    saved = [rollout(policy, tokenizer, examples, batching, f"{seed} {i}") for i in range(rollouts)]
    estimates = {
        name: [
            train_ppo.compute_advantages(args[name], 0.0, 0 * x.logps, scores, lengths, None, None)[0]
            for x, scores, lengths in saved
        ]
        for name in METHODS
    }
    start = world.answer_logps(policy, asked)
    optimizer = torch.optim.Adam(policy.parameters(), lr=MOVE_RATE)
    found: dict[str, dict[int, dict[str, float]]] = {method: {} for method in METHODS}
    for step in range(max(MOVES) + 1):
        optimizer.zero_grad()
        logps = world.differentiable_logps(policy, asked)
        (-(logps.exp() * r).sum(1).mean()).backward()
        exact = flat_gradient(policy)
        if step in MOVES:
            moved = {"moved": world.kl(logps.detach(), start)}
            for method, a in args.items():
                one, clipped = [], 0.0
                for (x, *_), of_method in zip(saved, estimates[method], strict=True):
                    optimizer.zero_grad()
                    same = dataclasses.replace(x, advantages=of_method)
                    totals = train_ppo.update(a, policy, policy, None, same, range(len(asked)), 0.0, batching)
                    one.append(flat_gradient(policy))
                    clipped += totals["policy/clipfrac"].item() / len(saved)
                found[method][step] = direction(torch.stack(one), exact) | {"clipped": clipped} | moved
            set_gradient(policy, exact)
        optimizer.step()
    return found


def rollout(policy, tokenizer, examples: Sequence[Example], batching: Batching, name: str):
    """A saved rollout, whose advantages are still to be computed; its scores [p k] and lengths [p k]."""
    answers = answer(policy, tokenizer, examples, world.LONGEST, random.Random(name).getrandbits(60), k=K)
    prompts, texts, rows = zip(
        *((e.prompt_text, text, e.row) for e in answers for text in e.response_texts), strict=True
    )
    scores = torch.tensor(world.gold(prompts, texts, rows))
    lengths = torch.tensor([len(y) for e in answers for y in e.responses])
    logps = scoring.per_token(lambda batch: scoring.response_logps(policy, batch)[0], answers, batching)
    nothing, kept = torch.zeros_like(logps), torch.ones(len(examples), K)
    return train_ppo.Rollout(answers, logps, logps, None, nothing, None, kept, torch.ones_like(logps)), scores, lengths


def flat_gradient(model) -> torch.Tensor:
    """The gradient with respect to all parameters in one vector, float64."""
    return torch.cat([x.grad.flatten() for x in model.parameters() if x.grad is not None]).double()


def set_gradient(model, gradient: torch.Tensor) -> None:
    """The reverse of `flat_gradient`."""
    used = [x for x in model.parameters() if x.grad is not None]
    for x, piece in zip(used, gradient.split([x.numel() for x in used]), strict=True):
        x.grad = piece.view_as(x).to(x.dtype)


def direction(of_rollouts: torch.Tensor, exact: torch.Tensor) -> dict[str, float]:
    """Cosine of the mean of these gradients [m d] to the exact one [d], and their variance over the squared mean.

    |mean|^2 is that of the average less the average's own variance, so that the number of rollouts does not bias it.
    """
    mean, m = of_rollouts.mean(0), len(of_rollouts)
    variance = (of_rollouts - mean).square().sum() / (m - 1)
    square = (mean @ mean - variance / m).clamp(min=1e-3 * (mean @ mean))
    return {"cosine": (mean @ exact / exact.norm() / square.sqrt()).item(), "variance": (variance / square).item()}


def answers_needed(cosine: float, variance: float) -> float:
    """How many answers it takes until the gradient has COSINE to the exact one; infinite if its mean has less.

    The average of n gradients of PROMPTS * K answers has the cosine c / sqrt(1 + variance / n), for a squared length of
    the average at its expectation.
    """
    return PROMPTS * K * variance / ((cosine / COSINE) ** 2 - 1) if cosine > COSINE else float("inf")


# ------------------------------------------------------------------------------------------------------------- training


def train(setting: str, seed: int, folder: Path, steps: int) -> dict[int, dict[str, float]]:
    """train_ppo.py with a setting's flags -> number of rollouts -> E[R] and KL on the test prompts."""
    place, asked = folder / f"world-{seed}", world.prompts(seed)["test"]
    model, along = models.load_model(str(place / "sft"), "cpu"), {}
    ref, r = world.answer_logps(model, asked), world.rewards(seed, asked)

    def look(step: int, weights: dict) -> None:
        model.load_state_dict(weights)
        logps = world.answer_logps(model, asked)
        along[step] = {"reward": world.expected(logps, r), "kl": world.kl(logps, ref)}

    look(0, model.state_dict())
    out = folder / f"{setting}-{seed}".replace(" ", "-")
    shutil.rmtree(out, ignore_errors=True)  # left by a stopped run
    flags = {"model": str(place / "sft"), "data": str(place / "prompts.jsonl"), "reward": "ablations.world:gold"}
    flags |= {"out": str(out), "seed": seed, "kl_coef": 0.0, "k": K, "batch_size": BATCH, "minibatches": 4}
    flags |= {"epochs_per_rollout": 2, "max_steps": steps, "save_every": 1}
    with at_checkpoints(look):
        train_ppo.main(world.args(train_ppo, **flags | SETTINGS[setting]))
    shutil.rmtree(out)
    return along


# ----------------------------------------------------------------------------------------------------- table and figure


def gradient(results: common.Results, method: str, metric: str, moves: int) -> dict[int, float]:
    """Seed -> value."""
    return results.values(f"{method}, gradient", metric, moves)


def log_variance(results: common.Results, method: str) -> dict[int, float]:
    """Seed -> natural logarithm of the variance after the most updates."""
    of_seeds = gradient(results, method, "variance", MOVES[-1])
    return {seed: torch.tensor(x).log().item() for seed, x in of_seeds.items()}


Paths = dict[str, dict[int, list[tuple[float, float]]]]


def paths(results: common.Results) -> Paths:
    """Setting -> seed -> (KL, reward) after each rollout of the run, from the start on."""
    found: Paths = {}
    for (setting, seed, step, metric), nats in results.values_of.items():
        if metric == "kl":
            found.setdefault(setting, {}).setdefault(seed, []).append(
                (nats, results.values_of[setting, seed, step, "reward"])
            )
    return found


def reached(points: Sequence[tuple[float, float]], nats: float | None) -> float | None:
    """A run's reward at the end, or at a KL, if it reaches that."""
    if nats is None:
        return points[-1][1]
    return between(points, nats) if max(points)[0] > nats else None


def chosen(runs: Paths, method: str, nats: float | None = None) -> str | None:
    """The setting whose learning rate has the most reward in all worlds of VALIDATION_SEEDS, at the end or at a KL."""
    means = {}
    for setting in (f"{method} at {rate:g}" for rate in RATES):
        found = [reached(x, nats) for seed, x in runs.get(setting, {}).items() if seed in VALIDATION_SEEDS]
        if found and None not in found:
            means[setting] = sum(found) / len(found)
    return max(means, key=means.get) if means else None


def reward(runs: Paths, method: str, nats: float | None = None) -> dict[int, float]:
    """Seed -> reward of a method at its chosen learning rate, at the end or at a KL, without the worlds that chose."""
    of_seeds = runs.get(chosen(runs, method, nats), {})
    found = {seed: reached(x, nats) for seed, x in sorted(of_seeds.items()) if seed not in VALIDATION_SEEDS}
    return {seed: x for seed, x in found.items() if x is not None}


def clauses(results: common.Results) -> dict[str, tuple[float, float]]:
    """Clause -> the mean that it says is above 0, and half its interval."""
    runs = paths(results)
    end = {method: reward(runs, method) for method in METHODS}
    turned = [gradient(results, method, "cosine", 0) for method in ("RLOO", "GRPO")]
    noise = [log_variance(results, method) for method in ("GRPO", "GSPO")]
    return {
        "cosine at ratio 1: RLOO - GRPO": paired(*turned),
        f"log variance after {MOVES[-1]} updates: GRPO - GSPO": paired(*noise),
        "E[R] at the end: DAPO - GRPO": paired(end["DAPO"], end["GRPO"]),
        "E[R] at the end: GSPO - GRPO": paired(end["GSPO"], end["GRPO"]),
        "E[R] at the end: CISPO - DAPO": paired(end["CISPO"], end["DAPO"]),
    }


def of_gradients(results: common.Results) -> list[list[str]]:
    """Rows of methods: cosine, variance, answers needed and share clipped."""
    rows = []
    for method in METHODS:
        over = lambda metric, n, method=method: t_interval([*gradient(results, method, metric, n).values()])  # noqa: E731
        needed = [answers_needed(over("cosine", n)[0], over("variance", n)[0]) for n in MOVES]
        row = [method, *(show(over("cosine", n), 3) for n in MOVES), *(show(over("variance", n)) for n in MOVES)]
        row += [f"{x:.0f}" if x < float("inf") else "never" for x in needed]
        rows.append(row + [f"{over('clipped', n)[0]:.3f}" for n in MOVES[1:]])
    return rows


def same_rates(runs: Paths, method: str) -> list[str]:
    """Reward at the end of a method minus GRPO's at the same learning rate, for each rate."""
    cells = []
    for rate in RATES:
        both = [runs.get(f"{name} at {rate:g}", {}) for name in (method, "GRPO")]
        ends = [{seed: points[-1][1] for seed, points in x.items() if seed not in VALIDATION_SEEDS} for x in both]
        cells.append(show(paired(*ends), 3) if all(ends) else "")
    return cells


def of_training(results: common.Results) -> tuple[list[list[str]], list[list[str]], list[list[str]]]:
    """Rows of methods at the chosen rates, of differences to GRPO, and of the reward by rate in the choosing worlds."""
    runs, rows, differences, by_rate = paths(results), [], [], []
    seeds = len(reward(runs, "GRPO"))
    for method in METHODS:
        found = {nats: reward(runs, method, nats) for nats in (None, *NATS)}
        kls = [runs[chosen(runs, method)][seed][-1][0] for seed in found[None]]
        cells = [show(t_interval([*x.values()]), 3) if len(x) == seeds else "" for x in found.values()]
        rates = [(chosen(runs, method, nats) or " none").rsplit(" ", 1)[1] for nats in (None, *NATS)]
        rows.append([method, cells[0], show(t_interval(kls)), *cells[1:], ", ".join(rates)])
        both = [(x, reward(runs, "GRPO", nats)) for nats, x in found.items()]
        cells = [show(paired(*x), 3) if all(len(y) == seeds for y in x) else "" for x in both]
        if method != "GRPO":
            differences.append([f"{method} - GRPO", *cells, *same_rates(runs, method)])
        choosing = [runs.get(f"{method} at {rate:g}", {}) for rate in RATES]
        ends = [[x[seed][-1][1] for seed in VALIDATION_SEEDS if seed in x] for x in choosing]
        by_rate.append([method, *(f"{sum(x) / len(x):.3f}" if x else "" for x in ends)])
    return rows, differences, by_rate


def report(results: common.Results) -> tuple[str, str, str]:
    """Tables, verdict, effect."""
    judged, (rows, differences, by_rate) = clauses(results), of_training(results)
    moved = [show(t_interval([*gradient(results, "GRPO", "moved", n).values()]), 3) for n in MOVES[1:]]
    header = [f"{metric}, {n}" for metric in ("cosine", "variance", "answers") for n in MOVES]
    at_kl = [f"E[R] at KL {x:g}" for x in NATS]
    parts = [
        f"Gradients after 0, {MOVES[1]} and {MOVES[2]} updates, that is 0, {' and '.join(moved)} nats from the policy "
        f"that sampled; *answers*: needed for a cosine of {COSINE:g} to the exact gradient:",
        markdown(["gradient", *header, *(f"clipped, {n}" for n in MOVES[1:])], of_gradients(results)),
        "Training:",
        markdown(["method", "E[R] at the end", "KL at the end", *at_kl, "learning rates of these E[R]"], rows),
        markdown(["difference", "E[R] at the end", *at_kl, *(f"at the end, rate {x:g}" for x in RATES)], differences),
        "E[R] at the end by learning rate, in the two worlds that choose it:",
        markdown(["method", *(f"{rate:g}" for rate in RATES)], by_rate),
        markdown(
            ["criterion (claim: above 0)", "mean", "above 0?"],
            [[name, show(x, 3), common.verdict([x])] for name, x in judged.items()],
        ),
    ]
    effect = "; ".join(f"{name} {show(x, 3)}" for name, x in judged.items())
    return "\n\n".join(parts), common.verdict([*judged.values()]), effect + "."


def draw(results: common.Results, page) -> None:
    """Cosine and variance against the number of updates; reward along training, means over the worlds."""
    axes, runs = page.subplots(1, 3), paths(results)
    for method in METHODS:
        mean = lambda metric, n, method=method: t_interval([*gradient(results, method, metric, n).values()])[0]  # noqa: E731
        for place, metric in zip(axes, ("cosine", "variance"), strict=False):
            place.plot(MOVES, [mean(metric, n) for n in MOVES], marker="o", markersize=3, lw=1, label=method)
        of_seeds = runs[chosen(runs, method)]
        of_worlds = torch.tensor([points for seed, points in of_seeds.items() if seed not in VALIDATION_SEEDS])
        axes[2].plot(range(of_worlds.shape[1]), of_worlds[..., 1].mean(0), marker="o", markersize=3, lw=1)
    axes[1].set_yscale("log")
    for place, title, below in zip(
        axes,
        ("cosine to the exact gradient", "variance / |mean|^2", "E[R] at the chosen learning rate"),
        ("updates since sampling", "updates since sampling", "rollouts"),
        strict=True,
    ):
        place.set_title(title, fontsize=8)
        place.set_xlabel(below, fontsize=8)
        place.grid(alpha=0.3)
        place.tick_params(labelsize=7)
    axes[0].legend(fontsize=6)


if __name__ == "__main__":
    cli(main, Args)
