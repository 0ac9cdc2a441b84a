"""RL with a reward that a program checks, two-digit sums: GRPO, RLOO and PPO (gae) against best-of-k and SFT.

    python -m evidence.sums

Every method has the same 3,200 samples of the model itself: 50 rollouts of 16 questions with 4 answers each, whose
reward is `close`; "sft" trains once on the right ones among as many samples of the untrained model. Each learning rate
is the one with the best accuracy on 100 validation questions. Accuracy is measured on 200 test questions, whose sums
(in either order) are in neither other part: of the greedy answer; of answers sampled at temperature 1; and of the best
of 4 of these.
Learned: the whole 95 % interval of the gain in greedy accuracy over the untrained model, paired, is above 0.
"""

import hashlib
import itertools
import random
import re
from collections.abc import Sequence
from pathlib import Path

import train_ppo
import train_sft
from ablations import common
from evidence.common import Args, answered, begin, best, fill, finish, trained, with_half
from recipes.gsm8k import last_number
from support.report import mean_interval, share_and_half
from support.rewards import score_texts
from support.runs import cli

NAME = "sums"
METHODS = ("grpo", "rloo", "gae", "sft")
LRS = {"lr 5e-06": 5e-6, "lr 2e-05": 2e-5}
SETTINGS = {"untrained": ("", 0.0)} | {f"{method}, {lr}": (method, LRS[lr]) for method in METHODS for lr in LRS}
SIZES = {"train": 4000, "valid": 100, "test": 200}
ROLLOUTS, QUESTIONS, K, TOKENS = 50, 16, 4, 24
QUESTION = "What is {} + {}? Answer with the number only."  # of four, the one with most right validation answers


# ------------------------------------------------------------------------------------------------- questions and reward


def part_of(x: int, y: int) -> str:
    """test (10 %), valid (5 %) or train, by hash of the two numbers in order of size."""
    digest = hashlib.sha256(f"{min(x, y)}+{max(x, y)}".encode()).digest()
    position = int.from_bytes(digest[:8], "big") / 2**64
    return "test" if position < 0.1 else "valid" if position < 0.15 else "train"


def questions(part: str, n: int) -> list[dict]:
    """n rows with a prompt each, drawn from the sums of a part with seed 0."""
    sums = [(x, y) for x, y in itertools.product(range(10, 100), repeat=2) if part_of(x, y) == part]
    asked = random.Random(0).sample(sums, n)
    return [{"prompt": [{"role": "user", "content": QUESTION.format(*numbers)}]} for numbers in asked]


def summands(prompt: str | list[dict]) -> tuple[int, int]:
    """The two numbers of a question."""
    x, y = re.search(r"(\d+) \+ (\d+)", prompt if isinstance(prompt, str) else prompt[-1]["content"]).groups()
    return int(x), int(y)


def errors(prompts: Sequence, responses: Sequence[str], rows: Sequence[dict]) -> list[float]:
    """For each response: its last number - the sum of the prompt's two; infinite if it has none, or was cut off."""
    found = []
    for prompt, response, row in zip(prompts, responses, rows, strict=True):
        number = last_number(response) if row.get("ended", True) else None
        found.append(float("inf") if number is None else number - sum(summands(prompt)))
    return found


def correct(prompts: Sequence, responses: Sequence[str], rows: Sequence[dict]) -> list[float]:
    """1.0 if the answer's last number is the sum, else 0.0."""
    return [float(error == 0) for error in errors(prompts, responses, rows)]


def close(prompts: Sequence, responses: Sequence[str], rows: Sequence[dict]) -> list[float]:
    """1.0 for the sum, 0.5 - error / 200 for another number, at least 0.0: tells answers apart where few are right."""
    return [1.0 if error == 0 else max(0.0, 0.5 - abs(error) / 200) for error in errors(prompts, responses, rows)]


# ----------------------------------------------------------------------------------------------------------------- runs


def main(a: Args) -> None:
    """Run what sums.csv lacks, then write page and figure."""
    results, folder = begin(NAME, a, wants_data=False)
    for part, n in SIZES.items():
        common.write(folder / f"{part}.jsonl", questions(part, 8 if a.short else n))
    fill(results, run, ["untrained"], [0], a, folder)
    settings = [x for x in SETTINGS if not a.short or x.endswith([*LRS][0])]
    fill(results, run, settings, [0], a, folder)
    finish(NAME, a, results)


def run(setting: str, seed: int, a: Args, folder: Path) -> tuple[dict[str, float], list[dict]]:
    """Train and measure. valid, greedy: accuracies of greedy answers, and gain over the untrained model's, on the same
    test questions; sampled, best_of_4; right: share of right answers among sft's samples."""
    method, lr = SETTINGS[setting]
    rollouts, asked, tokens = (2, 4, 8) if a.short else (ROLLOUTS, QUESTIONS, TOKENS)
    out, model, values = folder / f"{setting}-{seed}", a.model, {}
    flags = {"model": a.model, "lr": lr, "seed": seed, "eval_prompts": 0, "max_new_tokens": tokens}
    if method == "sft":
        file = folder / f"{setting}-{seed}-asked.jsonl"
        common.write(file, questions("train", rollouts * asked))
        examples, right = right_answers(a.model, file, a, tokens, seed, K)
        values["right"] = sum(map(sum, right)) / (K * len(right))
        rows = [
            {"prompt": e.row["prompt"], "completion": [{"role": "assistant", "content": text}]}
            for e, ones in zip(examples, right, strict=True)
            for text, one in zip(e.response_texts, ones, strict=True)
            if one
        ]
        if rows:  # else the model stays as it is
            data = common.write(folder / f"{setting}-{seed}.jsonl", rows)
            trained(train_sft, out, a, data=data, eval_fraction=0.0, batch_size=asked, **flags)
            model = str(out)
    elif method:
        flags |= {"data": str(folder / "train.jsonl"), "eval_fraction": 0.0, "batch_size": asked, "k": K}
        flags |= {"reward": "evidence.sums:close", "value_init": "policy", "epochs_per_rollout": 1, "minibatches": 2}
        flags |= {"advantage": method, "max_steps": rollouts, "save_every": 10}
        trained(train_ppo, out, a, **flags)
        model = str(out)
    greedy = lambda model, part: right_answers(model, folder / f"{part}.jsonl", a, tokens)  # noqa: E731
    values["valid"] = sum(x for (x,) in greedy(model, "valid")[1]) / (8 if a.short else SIZES["valid"])
    examples, right = greedy(model, "test")
    start = right if model == a.model else greedy(a.model, "test")[1]
    values["greedy"], values["greedy_half"] = share_and_half([x for (x,) in right])
    values["gain"], values["gain_half"] = mean_interval([x - y for (x,), (y,) in zip(right, start, strict=True)])
    sampled = right_answers(model, folder / "test.jsonl", a, tokens, seed, K)[1]
    values["sampled"], values["sampled_half"] = share_and_half([sum(x) / K for x in sampled])
    values["best_of_4"], values["best_of_4_half"] = share_and_half([max(x) for x in sampled])
    texts = [(e.row["prompt"][-1]["content"], e.response_texts[0]) for e in examples[:8]]
    return values, [{"question": question, "answer": text} for question, text in texts]


def right_answers(model: str, file: Path, a: Args, tokens: int, seed: int = 0, k: int = 0):
    """The questions of a file with k sampled answers each, or the greedy one (k = 0), and whether each is right, 0 or
    1: a list for each question."""
    examples, ends = answered(model, file, a, tokens, seed, 1.0 if k else 0.0, max(k, 1))
    flat = score_texts(correct, examples, ends)
    return examples, [flat[i : i + max(k, 1)] for i in range(0, len(flat), max(k, 1))]


# -------------------------------------------------------------------------------------------------------------- results


def report(results: common.Results) -> tuple[str, str, str]:
    """Table, verdict, effect."""
    rows, learned, missing = [], [], []
    for name in ("untrained", *METHODS):
        mine = [x for x in SETTINGS if x.split(", ")[0] == name]
        chosen = best(results, mine)
        if not chosen:
            missing.append(name)
            continue
        tried = [results.values(x, "valid").get(0) for x in mine]
        rows.append([chosen, ", ".join("not run" if x is None else f"{x:.2f}" for x in tried)])
        rows[-1] += [with_half(results, chosen, n) for n in ("greedy", "gain", "sampled", "best_of_4")]
        gain, half = (results.values(chosen, n)[0] for n in ("gain", "gain_half"))
        learned += [name] if gain > half else []
    table = common.markdown(
        ["", "validation, each learning rate", "greedy", "gain over untrained", "sampled", "best of 4"], rows
    )
    effect = f"Not run yet: {', '.join(missing)}." if missing else "All methods were run."
    right = results.values(best(results, [x for x in SETTINGS if x.startswith("sft")]), "right").get(0)
    if right is not None:
        effect += f" Of the untrained model's samples, {right:.1%} were right and trained sft."
    verdict = f"{', '.join(learned)} learned" if learned else "none learned" if len(rows) > 1 else "not run yet"
    return table, verdict, effect


def draw(results: common.Results, page) -> None:
    """Greedy and best-of-4 accuracy of each method."""
    axes = page.add_subplot(ylabel="accuracy on test questions", ylim=(0, 1.02))
    names = ("untrained", *METHODS)
    of_name = [best(results, [x for x in SETTINGS if x.split(", ")[0] == name]) for name in names]
    for metric, label in (("greedy", "greedy"), ("best_of_4", "best of 4")):
        known = [(name, x) for name, x in zip(names, of_name, strict=True) if x]
        values, halves = ([results.values(x, n)[0] for _, x in known] for n in (metric, f"{metric}_half"))
        axes.errorbar([name for name, _ in known], values, halves, marker="o", linestyle="", capsize=3, label=label)
    axes.legend()


if __name__ == "__main__":
    cli(main, Args)
