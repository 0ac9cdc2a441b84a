"""What instructgpt.sh needs before and after the project's own commands: the questions, and the table of its page.

    bash evidence/instructgpt.sh [MODEL] [FOLDER]

Learned: the whole 95 % interval of DPO's or PPO's win rate against SFT, by the true reward, is above 0.5 (answers that
are both right or both wrong count one half).
"""

import math
from dataclasses import dataclass
from pathlib import Path

from ablations import common
from evidence.common import ROOT, of_model, pages, with_half
from evidence.sums import errors, questions, summands
from support import read_json, read_json_lines
from support.report import share_and_half
from support.runs import cli

NAME = "instructgpt"
MODELS = ("sft", "dpo", "ppo")
SIZES = {"demonstrations": 100, "asked": 1200, "prompts": 2000}  # questions, no two of them the same
TEST = 200
COLUMNS = {
    "reward": ("right answers", 3),
    "too_large": ("too large", 3),
    "win": ("win rate", 3),
    "kl": ("KL to SFT", 2),
    "length": ("tokens", 1),
}


@dataclass
class Args:
    folder: str = "runs/evidence/instructgpt/full"
    """the script's folder"""
    questions: bool = False
    """write the files of questions; else read what was measured, and write the page"""
    seconds: float = 0.0
    """that the script took"""


def main(a: Args) -> None:
    """Write the questions, or instructgpt.csv and page."""
    folder = Path(a.folder)
    if a.questions:
        write_questions(folder, SIZES, TEST)
        return
    (ROOT / f"{NAME}.csv").unlink(missing_ok=True)  # of an earlier run of the script
    results = common.Results(ROOT / f"{NAME}.csv")
    add(results, folder, a.seconds)
    pages([NAME])
    print(report(results)[0])


def write_questions(folder: Path, sizes: dict[str, int], test: int) -> None:
    """A file for each of the sizes, the demonstrations with answers, and test.jsonl."""
    rows = questions("train", sum(sizes.values()))
    for name, n in sizes.items():
        mine, rows = rows[:n], rows[n:]
        common.write(folder / f"{name}.jsonl", map(demonstration, mine) if name == "demonstrations" else mine)
    common.write(folder / "test.jsonl", questions("test", test))


def demonstration(row: dict) -> dict:
    """The row with a right answer, "47 + 38 = 85"."""
    x, y = summands(row["prompt"])
    return row | {"completion": [{"role": "assistant", "content": f"{x} + {y} = {x + y}"}]}


def add(results: common.Results, folder: Path, seconds: float) -> None:
    """The numbers of evaluate.py, and the share of its answers that are too large; those of train_rm.py, and the reward
    before and after PPO. The row of the reward model also has the seconds that the whole script took."""
    measured = read_json(folder / "evaluate/results.json")["models"]
    answers = read_json_lines(folder / "evaluate/samples.jsonl", "model")
    for x in MODELS:
        mine = [row for row in answers if row["model"] == str(folder / x)]
        off = errors([row["prompt"] for row in mine], [row["text"] for row in mine], mine)
        share, half = share_and_half([float(0 < error < math.inf) for error in off])
        values = of_model(measured[str(folder / x)], COLUMNS)
        results.add(x, 0, values | {"too_large": share, "too_large_half": half})
    rm, ppo = (read_json(folder / x / "results.json") for x in ("rm", "ppo"))
    values = {"accuracy": rm["accuracy"], "accuracy_half": rm["accuracy_interval"], "ceiling": rm["ceiling"]}
    values |= {"before": ppo["before/score"], "after": ppo["after/score"]}
    results.add("reward model", 0, values | {"seconds": seconds})


def report(results: common.Results) -> tuple[str, str, str]:
    """Table, verdict, effect."""
    rows = [[x, *(with_half(results, x, n, digits) for n, (_, digits) in COLUMNS.items())] for x in MODELS]
    above = lambda x: results.values(x, "win")[0] - results.values(x, "win_half")[0] > 0.5  # noqa: E731
    learned = [x for x in MODELS[1:] if above(x)]
    effect = f"The reward model's accuracy on held-out rankings is {with_half(results, 'reward model', 'accuracy')}."
    before, after = (results.values("reward model", x)[0] for x in ("before", "after"))
    effect += f" Its mean reward is {before:.2f} before PPO and {after:.2f} after."
    table = common.markdown(["", *(title for title, _ in COLUMNS.values())], rows)
    return table, f"{' and '.join(learned)} learned" if learned else "neither learned", effect


def draw(results: common.Results, page) -> None:
    """Right answers against KL."""
    axes = page.add_subplot(xlabel="KL to SFT, nats per answer", ylabel="right answers")
    for x in MODELS:
        (kl, share), halves = ([results.values(x, f"{n}{end}")[0] for n in ("kl", "reward")] for end in ("", "_half"))
        axes.errorbar(kl, share, halves[1], marker="o", capsize=3, label=x)
    axes.legend()


if __name__ == "__main__":
    cli(main, Args)
