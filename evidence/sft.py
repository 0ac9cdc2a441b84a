"""Does SFT on worked answers to grade-school maths teach a real model? Held-out NLL, and answers before and after.

    python -m evidence.sft --data sft_gsm8k.jsonl.gz

GSM8K (Cobbe et al. 2021, arXiv 2110.14168) in rows of `messages`, with its own split in `meta.split`: 2,000 training
rows, 100 others for validation, 200 test rows. The learning rate is the one with the lowest validation NLL.
Learned: the whole 95 % interval, over test rows, of the gain of the NLL is above 0.
"""

import random
import statistics
from collections.abc import Sequence
from pathlib import Path

import torch

import train_sft
from ablations import common
from evidence.common import Args, answered, begin, best, fill, finish, response_logps, trained, with_half
from recipes.gsm8k import correct
from rlhf import require
from support import models
from support.examples import build
from support.generate import answer_stats
from support.report import share_and_half, standard_error, student
from support.rewards import score_texts
from support.rows import prompt_of, read_rows
from support.runs import cli

NAME = "sft"
LRS = {"lr 1e-05": 1e-5, "lr 3e-05": 3e-5, "lr 1e-04": 1e-4}
SIZES = {"train": 2000, "valid": 100, "test": 200, "asked": 64}  # rows; test questions that are answered
TOKENS, SHOWN = 200, 8  # of an answer at most; answers that are kept


def main(a: Args) -> None:
    """Run what sft.csv lacks, then write page and figure."""
    results, folder = begin(NAME, a)
    sizes = {part: 8 for part in SIZES} if a.short else SIZES
    for part, rows in split([row for _, row in read_rows(a.data)[0]]).items():
        common.write(folder / f"{part}.jsonl", rows[: sizes[part]])
        if part == "test":
            common.write(folder / "asked.jsonl", rows[: sizes["asked"]])
    fill(results, run, ["untrained", *([*LRS][:1] if a.short else LRS)], [0], a, folder)
    finish(NAME, a, results)


def split(rows: Sequence[dict]) -> dict[str, list[dict]]:
    """Shuffled rows of train, valid and test; no question is in two of them."""
    rows = random.Random(0).sample(rows, len(rows))
    of = {s: [row for row in rows if row.get("meta", {}).get("split") == s] for s in ("train", "test")}
    require(min(map(len, of.values())) > 0, "--data: no row has meta.split train, or none has test")
    asked = {str(prompt_of(row)) for row in of["test"]}
    train = [row for row in of["train"] if str(prompt_of(row)) not in asked]
    valid = {str(prompt_of(row)) for row in train[:: max(2, len(train) // SIZES["valid"])]}
    return of | {
        "train": [row for row in train if str(prompt_of(row)) not in valid],
        "valid": [row for row in train if str(prompt_of(row)) in valid],
    }


def run(setting: str, seed: int, a: Args, folder: Path) -> tuple[dict[str, float], list[dict]]:
    """Train, unless the setting is "untrained", and measure on test rows: nll, nats a token; gain over the untrained
    model; correct, the share of greedy answers with the right number; length and share with EOS of these."""
    model, values = a.model, {}
    if setting in LRS:
        model = str(folder / f"{setting}-{seed}")
        flags = {"data": str(folder / "train.jsonl"), "eval_data": str(folder / "valid.jsonl"), "lr": LRS[setting]}
        flags |= {"batch_size": 16, "eval_prompts": 0, "seed": seed} | ({"max_steps": 2} if a.short else {})
        values["valid"] = trained(train_sft, Path(model), a, model=a.model, **flags)["eval/loss"]
    nll, lengths = nlls(model, folder, a)
    start, _ = nlls(a.model, folder, a)
    for name, sums in {"nll": nll, "gain": [x - y for x, y in zip(start, nll, strict=True)]}.items():
        values[name] = sum(sums) / sum(lengths)
        values[f"{name}_half"] = student(len(sums) - 1) * standard_error(sums, lengths)
    answers, ends = answered(model, folder / "asked.jsonl", a, 8 if a.short else TOKENS, temperature=0.0)
    values["correct"], values["correct_half"] = share_and_half(score_texts(correct, answers, ends))
    stats = answer_stats(answers, ends, embedded=False)
    values |= {name: statistics.fmean(stats[name]) for name in ("length", "ended")}
    return values, [{"question": i, "answer": e.response_texts[0]} for i, e in enumerate(answers[:SHOWN])]


def nlls(model: str, folder: Path, a: Args) -> tuple[list[float], list[int]]:
    """Of each test row: minus the log-prob of its answer, and the answer's tokens."""
    tokenizer = models.load_tokenizer(model)
    examples = build(read_rows(str(folder / "test.jsonl"))[0], tokenizer, "sft", 512, 1024)[0]
    logps = torch.cat(response_logps(model, examples, tokenizer, a))
    return (-logps).tolist(), [n for e in examples for n in e.lengths]


def report(results: common.Results) -> tuple[str, str, str]:
    """Table, verdict, effect."""
    chosen, rows = best(results, LRS, choose=min), []
    for x in (x for x in ("untrained", *LRS) if results.done(x, 0)):
        valid = results.values(x, "valid").get(0)
        one = lambda name, x=x: f"{results.values(x, name)[0]:.2f}"  # noqa: E731
        rows.append([x + (" (chosen)" if x == chosen else ""), "" if valid is None else f"{valid:.3f}"])
        rows[-1] += [with_half(results, x, n) for n in ("nll", "gain", "correct")] + [one("length"), one("ended")]
    header = ["", "validation NLL", "test NLL, nats a token", "gain", "right numbers", "tokens", "share with EOS"]
    table = common.markdown(header, rows)
    if not chosen:
        return table, "not run yet", "Only the untrained model was measured."
    gain, half = (results.values(chosen, n)[0] for n in ("gain", "gain_half"))
    return table, "learned" if gain > half else "did not learn", f"Test NLL falls by {gain:.3f} +- {half:.3f}."


def draw(results: common.Results, page) -> None:
    """Test NLL of each setting."""
    axes = page.add_subplot(ylabel="test NLL, nats a token")
    for x in (x for x in ("untrained", *LRS) if results.done(x, 0)):
        axes.errorbar([x], *(results.values(x, n)[0] for n in ("nll", "nll_half")), marker="o", capsize=3)


if __name__ == "__main__":
    cli(main, Args)
