"""A reward that can be verified: 1 where an answer to a grade-school problem ends with the right number, else 0.

    python train_ppo.py --model DIR_OR_HUB_ID --data gsm8k.jsonl --reward recipes.gsm8k:correct --advantage rloo \\
        --k 8 --kl-coef 0.01 --max-new-tokens 256

The rows are GSM8K's (Cobbe et al. 2021, arXiv 2110.14168), whose solutions end in `#### 72`: as `messages`, or as
`prompt` with `completion` or `answer`.
"""

import re
from collections.abc import Sequence

NUMBER = re.compile(r"(?:(?<![\d)])-)?(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?")


def last_number(text: str) -> float | None:
    """The last number in a text, its thousands' commas left out; None where there is none."""
    found = NUMBER.findall(text)
    return float(found[-1].replace(",", "")) if found else None


def solution(row: dict) -> float:
    """The number after `####` in a row's solution; ValueError where the row has none."""
    text = row["messages"][-1]["content"] if "messages" in row else row.get("completion", row.get("answer"))
    number = last_number(text.rpartition("####")[2]) if isinstance(text, str) and "####" in text else None
    if number is None:
        raise ValueError("the row has no solution that ends in '#### number'")
    return number


def correct(prompts: Sequence, responses: Sequence[str], rows: Sequence[dict]) -> list[float]:
    """For each response 1.0 if it came to its end and its last number is the solution's, else 0.0."""
    return [
        float(row.get("ended", True) and last_number(response) == solution(row))
        for response, row in zip(responses, rows, strict=True)
    ]
