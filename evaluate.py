"""Compare policies: how much reward each gained, how far it moved from the reference, and what it lost. Or, with
--pairs, compare reward models and DPO runs: how often each rewards the better one of given responses.

    python evaluate.py                                                      the embedded task: runs/sft and runs/dpo
    python evaluate.py --models runs/sft runs/a runs/b --data prefs.jsonl   your own runs, on rows with prompts
    python evaluate.py --reward runs/rm --judge my_module:my_judge          another reward; a judge, say another model
    python evaluate.py --pairs rewardbench.parquet --models runs/rm runs/dpo  RewardBench, or preferences of your own

Every model answers the same prompts with the same seeds. The price of a reward is the distance to the reference, exact
over the vocabulary at each sampled token:

    KL(pi || ref) = E_{y ~ pi} sum_t KL( pi(. | x, y_<t) || ref(. | x, y_<t) )

so runs can be compared in the plane of reward and KL, which the plot shows. Numbers are means over answers, or over
pairs of them, with 95 % intervals over prompts: Wilson's for shares, bootstrap for the others. In order below: the
measures, data, the models one by one, table and plot; then the same for --pairs. docs/metrics.md has the formula of
each number.
"""

import math
import re
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

import train_dpo
import train_sft
from rlhf import BadInput, require
from rlhf.advantages import sequence_sums
from rlhf.logprobs import token_kl, token_logps
from rlhf.tree import Batch
from support import lazy_import, models, read_json, reviews, rewardbench, runs, scoring, sharding, tokens
from support.examples import Example, build, group_of, held_out, load, show
from support.generate import answer, answer_stats, end_ids
from support.preferences import ceiling, expected_accuracy, pair_tensors
from support.report import bootstrap, new_page, share_interval, standard_error, table
from support.rewards import checked, load_function, load_reward, require_texts
from support.rows import Row, prompt_of, read_rows, row_of, texts_of
from support.scoring import Batching

bleu = lazy_import("sacrebleu.metrics")

# --------------------------------------------------------------------------------------------------------------- flags

DEFAULTS = {  # for unset flags: any model, or the embedded task's small one
    "any": {"eval_prompts": 64, "eval_pairs": 256},
    "reviews": {"eval_prompts": 512, "eval_pairs": reviews.ROWS, "reward": "gold"},
}
RIDGE = 0.01  # of the length-controlled win rate's regression
SAME_REWARD = 1e-5  # a smaller difference of rewards is rounding, and a tie
SELF_BLEU_ANSWERS = 100  # at most, because each is compared with all the others
NUMBERS = {  # each model's numbers in results.json -> their names in the table
    "reward": "reward ({reward})",
    "gold": "gold reward",
    "kl": "KL to the reference, nats per answer",
    "win": "win rate by {reward}",
    "win_at_equal_length": "  at equal length",
    "win_if_ended_alike": "  if both end or neither does",
    "judge/win": "win rate by {judge}",
    "judge/win_at_equal_length": "  at equal length",
    "judge/position_bias": "  judge's bias for the first shown",
    "judge/orders_disagree": "  share where the orders disagree",
    "length": "length, tokens",
    "ended": "share that ends with EOS",
    "grammatical": "grammatical share",
    "ref_logp": "log-prob of the reference, nats a token",
    "distinct_1": "distinct-1",
    "distinct_2": "distinct-2",
    "self_bleu": "self-BLEU",
    "implicit_accuracy": "accuracy of the implicit reward",
}
SHARES = {  # numbers in [0, 1], or in [lowest, lowest + 1]: name -> lowest
    "win": 0.0,
    "judge/win": 0.0,
    "judge/position_bias": -0.5,
    "judge/orders_disagree": 0.0,
    "ended": 0.0,
    "grammatical": 0.0,
    "implicit_accuracy": 0.0,
    "explicit_accuracy": 0.0,
}
NOT_OF_PAIRS = ("data", "reward", "judge", "k", "temperature", "eval_fraction", "eval_prompts", "eval_pairs", "seed")


@dataclass
class Args(runs.Flags):
    models: tuple[str, ...] = (train_sft.Args.out, train_dpo.Args.out)
    """run directories, local folders or hub ids, with one tokenizer; win rates are against the first. runs/sft and
    runs/dpo are made first if they are missing and --data is reviews. With --pairs: reward models and DPO runs, each
    with its own tokenizer"""
    ref: str | None = None
    """reference model of the KL and of the implicit reward; default: the first model. With --pairs, of the implicit
    rewards of all DPO runs; default: each run's own, from its args.json"""
    pairs: str | None = None
    """sample nothing, and compare the rewards of the responses in this file, folder or hub id: RewardBench 1 or 2, or
    any preferences or rankings"""
    by: str | None = None
    """with --pairs: the column by whose values accuracies are told apart ("topic", or "meta.topic" if nested); default
    subset, where there is one"""
    data: runs.Sources = "reviews"
    """rows with prompts: reviews (embedded), .jsonl/.json/.csv/.tsv/.parquet files (also .gz), folders with such files
    or hub ids; where they have preferences too, these are the pairs that the rewards' accuracies are measured on"""
    out: str = "runs/evaluate"
    reward: str | None = None
    """gold (embedded task), a reward model's directory, or module:function(prompts, responses, rows) -> floats; default
    none (a model of the embedded task: gold)"""
    judge: str | None = None
    """module:function, called as judge(prompts, first, second, rows): for each prompt the probability, in [0, 1], that
    the first response is the better one; it is asked in both orders"""
    k: int = 1
    """answers to each prompt, >= 1"""
    temperature: float = 1.0
    """of the sampling, and of both distributions of the KL, > 0"""
    eval_fraction: float | None = None
    """use only this share of the prompts, by hash of their text, in [0, 1): with train_dpo.py's --eval-fraction exactly
    those that it held out; default all (of --data reviews: 0.1)"""
    eval_prompts: int | None = None
    """maximum number of prompts to answer, >= 1; default 64 (embedded: 512)"""
    eval_pairs: int | None = None
    """maximum number of preference rows to score, >= 0; default 256 (embedded: all)"""
    max_length: int = 1024
    """tokens of a prompt with a response of the pairs, > max-prompt-length; longer responses lose their end"""
    micro_batch_tokens: int = 2048
    """tokens of one forward pass, >= 1: bounds memory, does not change the result"""
    resume: bool = False
    """continue with the first model that --out has no numbers of, with the same flags"""
    seed: int = 0
    """of the sampling, the same for all models"""
    wandb: bool = False
    """log to Weights & Biases too"""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """dtype of the matrices and their products; log-probs and KL are always float32"""


# ------------------------------------------------------------------------------------------------------------ measures


def against_reference(
    policy, reference, answers: Sequence[Example], batching: Batching, temperature: float = 1.0
) -> dict[str, list[float]]:
    """For each answer: the KL of the policy from the reference, summed over its tokens (nats), and the mean log-prob of
    its tokens under the reference (nats a token, at temperature 1)."""
    heads = models.output_head(policy), models.output_head(reference)

    def measure(batch: Batch) -> Float[Tensor, "n two"]:
        states = [scoring.hidden_states(model, batch, batch.sources, batching.dtype) for model in (policy, reference)]
        kl = token_kl(states[0], heads[0], states[1], heads[1], temperature)
        return torch.stack([kl, token_logps(states[1], heads[1], batch.targets)[0]], 1)

    numbers = scoring.per_token(measure, answers, batching).double()
    lengths = torch.tensor([sum(e.lengths) for e in answers], device=numbers.device)
    kl, ref_logp = (sequence_sums(x, lengths) for x in numbers.unbind(1))
    return {"kl": kl.tolist(), "ref_logp": (ref_logp / lengths).tolist()}


def length_controlled(wins: Float[Tensor, " n"], differences: Float[Tensor, " n"]) -> float:
    """The win rate that a logistic regression predicts for answers of equal length, in (0, 1):

        P(win) = sigmoid(theta + phi * tanh(difference / deviation)),   length-controlled win rate = sigmoid(theta)

    Dubois et al. 2024, arXiv 2404.04475, without their term for the difficulty of a prompt. A difference is between two
    answers' lengths in tokens, and the deviation is taken over all of them; wins may be 1/2. RIDGE/2 (theta^2 + phi^2)
    is added to the negative log-likelihood, so that the optimum is finite. NaN if all differences are the same number
    other than 0, because then nothing tells length from quality.
    """
    deviation = differences.std(correction=0)
    if deviation == 0:
        return math.nan if differences.any() else wins.mean().item()
    x = torch.stack([torch.ones_like(wins), torch.tanh(differences / deviation)])
    weights, ridge = wins.new_zeros(2), RIDGE * torch.eye(2, dtype=wins.dtype)
    for _ in range(50):  # Newton's method
        p = torch.sigmoid(weights @ x)
        step = torch.linalg.solve(x * (p * (1 - p)) @ x.T + ridge, x @ (wins - p) - RIDGE * weights)
        weights = weights + step
        if step.abs().max() < 1e-9:
            break
    return torch.sigmoid(weights[0]).item()


def distinct(responses: Sequence[Sequence[int]], n: int) -> float:
    """Share of the n-grams of tokens that are distinct, over all responses. Li et al. 2016, arXiv 1510.03055."""
    grams = [tuple(ids[i : i + n]) for ids in responses for i in range(len(ids) - n + 1)]
    return len(set(grams)) / len(grams) if grams else math.nan


def self_bleu(responses: Sequence[Sequence[int]]) -> float:
    """Mean BLEU-4, in [0, 1], of each response with all the others as its references; 1 if they are all the same.

    Zhu et al. 2018, arXiv 1802.01886. BLEU is sacrebleu's sentence score over token ids, with exponential smoothing; a
    response of fewer than 4 tokens is compared by the n-grams that it has.
    """
    texts = [" ".join(map(str, ids)) for ids in responses]
    score = bleu.BLEU(tokenize="none", effective_order=True).sentence_score
    if len(texts) < 2:
        return math.nan
    return statistics.fmean(score(text, texts[:i] + texts[i + 1 :]).score / 100 for i, text in enumerate(texts))


def accuracy(example: Example, scores: Tensor, tie: float) -> float:
    """Expected share of the example's pairs that the scores order as a new label would; a tie counts one half."""
    better, worse, weights, label_probability = pair_tensors([example], scores.double())
    margins = scores.double()[better] - scores.double()[worse]
    return sum((expected_accuracy(margins, label_probability, tie) * weights).tolist())


def mean(name: str, values: Sequence[float], prompts: Sequence[Sequence[int]]) -> dict[str, float | None]:
    """Mean of all values of the number `name`, its standard error, and its 95 % interval: of a share (SHARES, and a
    reward that is 0 or 1) `share_interval`, else bootstrap. `prompts` lists the places of each prompt's values, which
    are resampled together and may depend on each other."""
    sums, counts = [sum(values[i] for i in places) for places in prompts], [*map(len, prompts)]
    lowest = SHARES.get(name, 0.0 if name == "reward" and {*values} <= {0.0, 1.0} else None)
    if lowest is None:
        pooled = lambda drawn: sum(x for x, _ in drawn) / sum(n for _, n in drawn)  # noqa: E731
        low, high = bootstrap([*zip(sums, counts, strict=True)], pooled)
    else:
        ends = share_interval([x - lowest * n for x, n in zip(sums, counts, strict=True)], counts)
        low, high = (x + lowest for x in ends)
    numbers = {"value": sum(sums) / sum(counts), "se": standard_error(sums, counts), "low": low, "high": high}
    return {name: x if math.isfinite(x) else None for name, x in numbers.items()}


def at_equal_length(
    wins: Sequence[float], differences: Sequence[float], prompts: Sequence[Sequence[int]]
) -> dict[str, float | None]:
    """The length-controlled win rate with its bootstrap interval, which goes on both sides at least as far as that of
    the plain win rate does (with no loss in the sample there is none in any resample); None if it is not defined."""
    plain = mean("win", wins, prompts)
    wins, differences = (torch.tensor(x, dtype=torch.float64) for x in (wins, differences))

    def rate(drawn: Sequence[Sequence[int]]) -> float:
        places = [i for places in drawn for i in places]
        return length_controlled(wins[places], differences[places])

    value, (low, high) = rate(prompts), bootstrap(prompts, rate)
    if math.isfinite(low):
        low = max(0.0, min(low, value - (plain["value"] - plain["low"])))
        high = min(1.0, max(high, value + (plain["high"] - plain["value"])))
    return {name: x if math.isfinite(x) else None for name, x in {"value": value, "low": low, "high": high}.items()}


def one_by_one(sampled: Sequence[Example]) -> list[Example]:
    """Each answer as an example of its own."""
    return [
        replace(e, responses=[ids], response_texts=[text], sampled_logps=[logps], ranks=[1])
        for e in sampled
        for ids, text, logps in zip(e.responses, e.response_texts, e.sampled_logps, strict=True)
    ]


def answer_texts(e: Example) -> list[str]:
    try:
        return texts_of(e.row)
    except BadInput as error:
        raise BadInput(f"{e.where}: {error}") from error


def win(reward: float, other: float) -> float:
    """1 if the reward is larger, 0 if it is smaller, 1/2 if the two are the same up to rounding."""
    return 0.5 if abs(reward - other) <= SAME_REWARD else float(reward > other)


def win_if_ended_alike(mine: dict, other: dict, places: Sequence[Sequence[int]]) -> dict[str, float | None]:
    """Share of wins among all pairs of answers to one prompt that both end, or are both cut: a reward model that never
    saw a cut answer may rank those low whatever they say. None if there is no such pair. mine, other: reward and
    `ended` of each answer of the two models."""
    wins, groups = [], []
    for answers in places:
        alike = [(i, j) for i in answers for j in answers if mine["ended"][i] == other["ended"][j]]
        groups.append(range(len(wins), len(wins) + len(alike)))
        wins += [win(mine["reward"][i], other["reward"][j]) for i, j in alike]
    return mean("win", wins, [x for x in groups if x]) if wins else {"value": None}


def judged(
    judge: Callable, name: str, prompts: list, mine: list[str], other: list[str], rows: list[dict]
) -> dict[str, list[float]]:
    """For each answer: P(mine is better), the mean over both orders; the judge's bias for the answer shown first; and
    whether the orders disagree, because the same position was preferred both times. BadInput names the prompt."""

    def ask(first: list[str], second: list[str]) -> list[float]:
        one = lambda prompts, both, rows: judge(prompts, *map(list, zip(*both, strict=True)), rows)  # noqa: E731
        chances = checked(one, name)(prompts, [*zip(first, second, strict=True)], rows)
        for prompt, p in zip(prompts, chances, strict=True):
            require(0 <= p <= 1, f"{name}: gave {p}, which is no probability (prompt {str(prompt)[-80:]!r})")
        return chances

    both = [*zip(ask(mine, other), ask(other, mine), strict=True)]
    return {
        "judge/win": [(x + 1 - y) / 2 for x, y in both],
        "judge/position_bias": [(x + y) / 2 - 0.5 for x, y in both],
        "judge/orders_disagree": [float((x - 0.5) * (y - 0.5) > 0) for x, y in both],
    }


# ---------------------------------------------------------------------------------------------------------------- main


def main(a: Args) -> dict:
    """Evaluate, and return what results.json holds (docs/metrics.md)."""
    require(bool(a.pairs) or not a.by, f"--by {a.by}: of which data? give --pairs too")
    if a.pairs:
        require(a.models != Args.models, f"--pairs {a.pairs}: say with --models what is to judge them")
        return on_pairs(a)
    a = replace(a, ref=a.ref or next(iter(a.models), None))
    require(bool(a.models), "--models: name at least one")
    require(len({*a.models}) == len(a.models), f"--models: {' '.join(a.models)} has the same model twice")
    names = list(dict.fromkeys((a.ref, *a.models)))
    makers = {script.Args.out: script for script in (train_sft, train_dpo)}
    to_make = [x for x in makers if x in names and a.data == "reviews" and not runs.is_made(x)]
    flag = {name: "--models" if name in a.models else "--ref" for name in names}
    tokenizers = {
        name: reviews.tokenizer() if name in to_make else models.load_tokenizer(name, a.trust_remote_code, flag[name])
        for name in names
    }
    for name in set(names) - set(to_make):
        reward_model = models.is_reward_model(name, a.trust_remote_code, flag[name])
        require(not reward_model, f"{flag[name]} {name}: a reward model, where a causal language model is wanted")
    tokenizer = tokenizers[a.ref]
    for name, other in tokenizers.items():
        same = other.get_vocab() == tokenizer.get_vocab()
        require(same, f"--models {name}: its tokenizer is not that of the reference {a.ref}, so there is no KL")
    embedded = reviews.is_embedded(tokenizer)  # then gold reward and grammar are known
    if a.data == "reviews" and not embedded:
        print(f"--data reviews: these are film reviews, and {a.ref} is no model of them: name prompts of your own\n")
    if a.data == "reviews" and a.eval_fraction is None:
        a = replace(a, eval_fraction=train_dpo.DEFAULTS["reviews"]["eval_fraction"])
    a = runs.with_defaults(a, DEFAULTS["reviews" if embedded else "any"])
    require(a.eval_prompts >= 1, f"--eval-prompts must be at least 1, not {a.eval_prompts}")
    run = runs.Run(a, __file__)

    # ------------------------------------------------------------------------------------------------------------ data
    judge = load_function(a.judge, "--judge") if a.judge else None
    limits = (a.max_prompt_length, a.max_length, a.micro_batch_tokens)
    reward = load_reward(a.reward, a.device, "--reward", a.trust_remote_code, *limits) if a.reward else None
    examples = load(a.data, "preference or prompts", tokenizer, a)
    require_texts(a.reward, examples)
    if a.eval_fraction is not None:
        examples = held_out(examples, a.eval_fraction)[1]
        require(bool(examples), f"--data: no prompt is in --eval-fraction {a.eval_fraction}: raise it")
    prompts = list({e.prompt_text: e for e in examples}.values())[: a.eval_prompts]
    preferences = [e for e in examples if e.responses][: a.eval_pairs]
    print(f"{len(prompts)} prompts, {a.k} answers each; {len(preferences)} preferences")
    if a.dry_run:
        print("\n\n".join(show(e, tokenizer) for e in prompts[:3]))
        return {}
    for name in to_make:
        runs.make_missing(makers[name], name, a.device)

    # --------------------------------------------------------- reference: it stays in memory, with one policy at a time
    batching = Batching(a.layout, models.pad_id(tokenizer), models.DTYPES[a.dtype], a.micro_batch_tokens, a.device)

    def load_policy(name: str, flag: str):
        make = lambda device: models.load_model(name, device, a.trust_remote_code, flag)  # noqa: E731
        return sharding.load(make, a.device, batching.dtype)

    reference = load_policy(a.ref, flag[a.ref])

    results = {"reference": a.ref, "reward": a.reward, "prompts": len(prompts), "answers": len(prompts) * a.k}
    results |= {"preferences": len(preferences)}
    places_of: dict[str, list[int]] = {}  # prompt -> places of its preferences
    for i, e in enumerate(preferences):
        places_of.setdefault(e.prompt_text, []).append(i)
    if preferences:
        results["ceiling"] = ceiling(preferences)
        chosen = batching._replace(layout=scoring.choose_layout(reference, preferences, batching))
        ref_logps = scoring.score_logps(reference, preferences, chosen, "reference")
    if preferences and reward:
        sequences = [
            (prompt_of(e.row), text, row_of(e.row, i)) for e in preferences for i, text in enumerate(answer_texts(e))
        ]
        rewards = torch.tensor(reward(*map(list, zip(*sequences, strict=True))), dtype=torch.float64)
        rewards = rewards.split([len(e.ranks) for e in preferences])
        right = [accuracy(e, x, SAME_REWARD) for e, x in zip(preferences, rewards, strict=True)]
        results["explicit_accuracy"] = mean("explicit_accuracy", right, [*places_of.values()])

    # ---------------------------------------------------------------------------------------------- models, one by one
    run.check_same(data=examples, ref=reference, reward=getattr(reward, "model", None))
    state = run.load_checkpoint() or {"step": 0, "models": {}, "answers": {}}
    results["models"], samples = state["models"], state["answers"]
    run.begin_loop(state["step"], len(a.models))
    asked, digest = [e for e in prompts for _ in range(a.k)], tokens.digest(tokenizer)
    questions = [prompt_of(e.row) for e in asked]
    places = [range(i * a.k, (i + 1) * a.k) for i in range(len(prompts))]
    for step, name in list(enumerate(a.models))[state["step"] :]:
        policy = reference
        if name != a.ref:
            policy = load_policy(name, "--models")
        sizes = [len(models.output_head(model).weight) for model in (policy, reference)]
        require(sizes[0] == sizes[1], f"--models {name}: {sizes[0]} output tokens, and the reference has {sizes[1]}")
        scoring.check_tokens(policy, prompts)
        sampled = answer(policy, tokenizer, prompts, a.max_new_tokens, a.seed, a.temperature, a.k, batching.dtype)
        answers = one_by_one(sampled)
        layout = scoring.choose_layout(policy, answers + preferences, batching)
        if layout == "tree" and policy is not reference:
            layout = scoring.choose_layout(reference, answers + preferences, batching)
        chosen = batching._replace(layout=layout)
        stats = answer_stats(answers, end_ids(policy, tokenizer), embedded)
        stats |= against_reference(policy, reference, answers, chosen, a.temperature)
        logps = scoring.score_logps(policy, preferences, chosen, name)
        del policy

        texts, ids = [e.response_texts[0] for e in answers], [e.responses[0] for e in answers]
        rows = [
            e.row | {"ended": bool(ended), "response_ids": response, "tokenizer": digest}
            for e, ended, response in zip(asked, stats["ended"], ids, strict=True)
        ]
        if reward:
            stats["reward"] = reward(questions, texts, rows)
        if a.reward == "gold":
            stats.pop("gold", None)
        numbers = {}
        if step > 0:
            first = samples[a.models[0]]
            if reward:
                stats["win"] = [*map(win, stats["reward"], first["reward"])]
                numbers["win_if_ended_alike"] = win_if_ended_alike(stats, first, places)
            if judge:
                stats |= judged(judge, f"--judge {a.judge}", questions, texts, first["text"], rows)
            longer = [x - y for x, y in zip(stats["length"], first["length"], strict=True)]
            for n in stats.keys() & {"win", "judge/win"}:
                numbers[f"{n}_at_equal_length"] = at_equal_length(stats[n], longer, places)
        samples[name] = {"text": texts} | stats

        numbers |= {n: mean(n, values, places) for n, values in stats.items()}
        diversity = {"distinct_1": distinct(ids, 1), "distinct_2": distinct(ids, 2)}
        diversity["self_bleu"] = self_bleu(ids[:SELF_BLEU_ANSWERS])
        numbers |= {n: {"value": value if math.isfinite(value) else None} for n, value in diversity.items()}
        if preferences:
            ratios = [x - y for x, y in zip(logps, ref_logps, strict=True)]
            right = [accuracy(e, x, train_dpo.TIE) for e, x in zip(preferences, ratios, strict=True)]
            numbers["implicit_accuracy"] = mean("implicit_accuracy", right, [*places_of.values()])
        results["models"][name] = {n: numbers[n] for n in NUMBERS if n in numbers}

        values = {f"{name}/{n}": x["value"] for n, x in results["models"][name].items() if x["value"] is not None}
        run.log(step + 1, values)
        run.progress(step + 1)
        run.save_checkpoint(step + 1, {"step": step + 1, "models": results["models"], "answers": samples})
        if run.interrupted:
            run.leave(step + 1)
    run.end_loop()

    # -------------------------------------------------------------------------------------------------- table and plot
    titles = [title.format(reward=a.reward, judge=a.judge) for title in NUMBERS.values()]
    cells = [[cell(n, results["models"][name].get(n)) for name in a.models] for n in NUMBERS]
    shown = [[title, *row] for title, row in zip(titles, cells, strict=True) if any(row)]
    run.samples(
        len(a.models),
        [
            {"model": name, "prompt": questions[i]} | {n: values[i] for n, values in samples[name].items()}
            for name in a.models
            for i in range(len(asked))
        ],
    )
    if reward:
        plot(results, run.out / "reward_kl.png")
    run.finish(results, {})
    print("\n" + table([f"{len(prompts)} prompts, {len(asked)} answers", *map(short, a.models)], shown))
    print(f"[95 % interval over prompts]; +- standard error; the reference is {a.ref}, wins are against {a.models[0]}")
    if "explicit_accuracy" in results:
        print(f"accuracy of --reward {a.reward} on these preferences: {cell('', results['explicit_accuracy'])}")
    if results.get("ceiling", 1) < 1:
        print(f"best accuracy possible with their labels: {results['ceiling']:.3f}")
    if not reward:
        print("no plot of reward against KL: there is no --reward")
    print(f"\nresults.json, samples.jsonl{' and reward_kl.png' if reward else ''} are in {run.out}")
    return results


def short(model: str) -> str:
    """The last two parts of a path: runs/dpo."""
    return "/".join(Path(model).parts[-2:])


def cell(name: str, number: dict | None) -> str:
    """A number as the table shows it: with its standard error (KL), or its interval, where it has one."""
    if number is None or number["value"] is None:
        return ""
    value, digits = number["value"], 2 if abs(number["value"]) >= 1 else 3
    if name == "kl" and number["se"] is not None:
        return f"{value:.{digits}f} +- {number['se']:.{digits}f}"
    if number.get("low") is None:
        return f"{value:.{digits}f}"
    return f"{value:.{digits}f} [{number['low']:.{digits}f}, {number['high']:.{digits}f}]"


def plot(results: dict, path: Path) -> None:
    """Reward against KL, a point a model, with 95 % intervals of both."""
    page = new_page(6.4, 4.4)
    axes = page.add_subplot()
    middle = max(numbers["kl"]["value"] for numbers in results["models"].values()) / 2
    for name, numbers in results["models"].items():
        x, y = numbers["kl"], numbers["reward"]
        at = x["value"], y["value"]
        ends = [None if n["low"] is None else [[n["value"] - n["low"]], [n["high"] - n["value"]]] for n in (x, y)]
        axes.errorbar(*at, xerr=ends[0], yerr=ends[1], marker="o", capsize=3)
        side, shift = ("right", -6) if x["value"] > middle else ("left", 6)
        axes.annotate(short(name), at, (shift, 6), textcoords="offset points", ha=side, fontsize=9)
    axes.margins(y=0.1)
    axes.set_xlabel(f"KL to {results['reference']}, nats per answer")
    axes.set_ylabel(f"reward ({results['reward']})")
    page.savefig(path, dpi=120)


# -------------------------------------------------------------------------------------- pairs: no sampling, only scores


def on_pairs(a: Args) -> dict:
    """Compare the rewards of given responses, and return what results.json holds (docs/metrics.md)."""
    unused = runs.repeated(a, *NOT_OF_PAIRS)
    require(not unused, f"--pairs: samples nothing and does not use{unused}: leave it out")
    require(len({*a.models}) == len(a.models) > 0, "--models: name at least one, and none of them twice")
    runs.check(a)
    for name in a.models:  # before any is scored
        reference_of(name, a)
    run = runs.Run(a, __file__)
    data = read_rows(a.pairs, a.split, a.skip_bad_rows)
    raw = dict(data[0])
    by = a.by or ("subset" if any(row.get("subset") for row in raw.values()) else None)

    def as_row(e: Example) -> rewardbench.Row:
        tie, lists = re.fullmatch(r"(ref|tied):(\d+)", str(e.row.get("id"))), has_lists(raw[e.where])
        rule = "ties" if lists and tie else "best_of_k" if lists else "pairs"
        subset = group_of(e, by) if by else "all"
        return rewardbench.Row(subset, e.prompt_text, e.ranks, rule, tie.groups() if rule == "ties" else ("", ""))

    tokenizer = models.load_tokenizer(a.models[0], a.trust_remote_code, "--models")
    examples, shown = read_pairs(data, tokenizer, a)
    print(f"{a.pairs}\n{shown}\n")
    rows = [*map(as_row, examples)]
    if a.dry_run:
        print("\n\n".join(show(e, tokenizer) for e in examples[:3]))
        return {}
    characters = lambda e: [float(len(text)) for text in e.response_texts]  # noqa: E731
    lengths = {e.where: characters(e) for e in examples}

    # ---------------------------------------------------------------------------------------------- models, one by one
    run.check_same(pairs=examples)
    state = run.load_checkpoint() or {"step": 0, "models": {}, "rewards": {}}
    run.begin_loop(state["step"], len(a.models))
    known: dict[tuple, list[Tensor]] = {}
    for step, name in list(enumerate(a.models))[state["step"] :]:
        tokenizer = models.load_tokenizer(name, a.trust_remote_code, "--models")
        its_examples, report = read_pairs(data, tokenizer, a)
        if report != shown:
            print(f"\n{a.pairs}, by the tokenizer of {name}\n{report}\n")
        rewards = [x.tolist() for x in rewards_of(name, its_examples, tokenizer, a, known)]
        for e, values in zip(its_examples, rewards, strict=True):
            require(all(map(math.isfinite, values)), f"--models {name}: gave the rewards {values} ({e.where})")
        its_lengths = [lengths.get(e.where) or characters(e) for e in its_examples]
        state["models"][name] = rewardbench.scores([*map(as_row, its_examples)], rewards, its_lengths)
        state["rewards"][name] = {e.where: values for e, values in zip(its_examples, rewards, strict=True)}
        values = {f"{name}/{n}": x["value"] for n, x in state["models"][name].items() if x["value"] is not None}
        run.log(step + 1, values)
        run.progress(step + 1)
        run.save_checkpoint(step + 1, state | {"step": step + 1})
        if run.interrupted:
            run.leave(step + 1)
    run.end_loop()

    # ----------------------------------------------------------------------------------------------------------- table
    longer_wins = rewardbench.scores(rows, [*lengths.values()], [*lengths.values()])
    longer_wins = {n: x for n, x in longer_wins.items() if n not in ("longer", "shorter")}
    results = {"pairs": a.pairs, "by": by, "rows": len(rows), "models": state["models"], "longer_wins": longer_wins}
    columns = [*state["models"].values(), longer_wins]
    names = dict.fromkeys(n for numbers in columns for n in numbers if by or n != "subset/all")
    cells = [
        [pairs_title(n, state["models"][a.models[0]].get(n)), *(cell(n, x.get(n)) for x in columns)] for n in names
    ]
    print("\n" + table([f"{len(rows)} rows", *map(short, a.models), "'longer wins'"], cells))
    print("accuracy of the reward [95 % interval over prompts]; in parentheses the number of rows")
    print("'longer wins' counts characters, and equal lengths as wrong; the data report counts tokens, and half")
    for name, its in state["rewards"].items():
        if its.keys() != lengths.keys():
            print(f"{name}: of {len(its)} rows, since others were dropped (see above)")
    run.samples(
        len(a.models),
        [
            {"model": name, "where": where, "rewards": values}
            for name, its in state["rewards"].items()
            for where, values in its.items()
        ],
    )
    run.finish(results, {})
    print(f"\nresults.json and samples.jsonl are in {run.out}")
    return results


def has_lists(row: dict) -> bool:
    """Whether `chosen` and `rejected` are lists of texts, as in RewardBench 2."""
    sides = row.get("chosen"), row.get("rejected")
    return all(isinstance(x, list) and x and all(isinstance(text, str) for text in x) for x in sides)


def read_pairs(data: tuple[list[Row], list[str]], tokenizer, a: Args) -> tuple[list[Example], str]:
    """Examples of --pairs, and the data report. Lists of chosen and rejected texts become a ranking with two ranks."""

    def ranked(row: dict) -> dict:
        if has_lists(row):
            row = dict(row)
            chosen, rejected = row.pop("chosen"), row.pop("rejected")
            row["responses"] = texts = chosen + rejected
            row["ranks"] = [1] * len(chosen) + [2] * len(rejected)
            if not all(text.strip() for text in texts):  # an empty response is one that ended at once
                row["ended"] = [True] * len(texts)
        return row

    rows = [(where, ranked(row)) for where, row in data[0]]
    limits = a.max_prompt_length, a.max_length
    examples, report = build(rows, tokenizer, "preference", *limits, a.skip_bad_rows, data[1], chat=True)
    return examples, str(report)


def reference_of(name: str, a: Args) -> tuple[str | None, str | None]:
    """The reference of a DPO run, and its loss; (None, None) for a reward model. BadInput for any other model."""
    if models.is_reward_model(name, a.trust_remote_code, "--models"):
        return None, None
    path = Path(name) / "args.json"
    flags = read_json(path) if path.exists() else {}
    named = bool(a.ref) or "ref" in flags
    require(named, f"--models {name}: neither a reward model nor a run with a reference: name its reference with --ref")
    return a.ref or flags["ref"] or flags["model"], flags.get("loss")


def rewards_of(name: str, examples: Sequence[Example], tokenizer, a: Args, known: dict) -> list[Tensor]:
    """The reward of every response, one tensor [k] for each example: by a reward model, or the implicit reward of a
    DPO run, without its beta: log pi - log ref, over the length for a loss that is per token, and without log ref for
    one without a reference. `known` keeps the log-probs of references, which several runs may share."""
    batching = Batching(a.layout, models.pad_id(tokenizer), models.DTYPES[a.dtype], a.micro_batch_tokens, a.device)

    def score_with(load: Callable, score: Callable, name: str, flag: str) -> list[Tensor]:
        model = sharding.load(lambda device: load(name, device, a.trust_remote_code, flag), a.device, batching.dtype)
        layout = scoring.choose_layout(model, examples, batching)
        return score(model, examples, batching._replace(layout=layout), short(name))

    reference, loss = reference_of(name, a)
    if not reference:
        return score_with(models.load_reward_model, scoring.score_rewards, name, "--models")
    rewards = score_with(models.load_model, scoring.score_logps, name, "--models")
    if a.ref or loss not in train_dpo.REFERENCE_FREE:
        models.require_same_tokenizer(reference, name, tokenizer, a.trust_remote_code)
        key = reference, tokens.digest(tokenizer), tokenizer.chat_template
        if key not in known:
            known[key] = score_with(models.load_model, scoring.score_logps, reference, "--ref")
        rewards = [x - y for x, y in zip(rewards, known[key], strict=True)]
    if not a.ref and loss in train_dpo.PER_TOKEN:
        rewards = [x / torch.tensor(e.lengths) for x, e in zip(rewards, examples, strict=True)]
    return rewards


def pairs_title(name: str, number: dict | None) -> str:
    """A score's name in the table, with the number of its rows."""
    kind, _, rest = name.partition("/")
    titles = {
        "all": "all rows",
        "section": rest.replace("/swapped", ", weights of xstest swapped"),
        "sections": "mean of the sections",
        "subset": f"  {rest}",
        "subsets": "mean of the subsets",
        "longer": "where the better one is longer",
        "shorter": "where it is shorter",
    }
    return titles[kind] + (f" ({number['n']})" if number else "")


if __name__ == "__main__":
    runs.cli(main, Args)
