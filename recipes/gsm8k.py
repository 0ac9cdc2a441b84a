"""A verifiable reward: 1 if the answer to a grade-school maths problem ends with the right number, else 0.

    python train_ppo.py --model DIR_OR_HUB_ID --data gsm8k.jsonl --reward recipes.gsm8k:correct --advantage rloo \\
        --k 8 --kl-coef 0.01 --max-new-tokens 256

The rows are those of GSM8K (Cobbe et al. 2021, arXiv 2110.14168), whose solutions end in, say, `#### 72`. A row has
`messages`, or `prompt` and either `completion` or `answer`.
"""

import re
from collections.abc import Sequence

NUMBER = re.compile(r"(?:(?<![\d)])-)?(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?")


def last_number(text: str) -> float | None:
    """The last number in a text, which may have commas between thousands; None if there is no number."""
    numbers = NUMBER.findall(text)
    return float(numbers[-1].replace(",", "")) if numbers else None


def solution(row: dict) -> float:
    """The number after `####` in a row's solution; ValueError if the row has none."""
    text = row["messages"][-1]["content"] if "messages" in row else row.get("completion", row.get("answer"))
    number = last_number(text.rpartition("####")[2]) if isinstance(text, str) and "####" in text else None
    if number is None:
        raise ValueError("the row has no solution that ends in '#### number'")
    return number


def correct(prompts: Sequence, responses: Sequence[str], rows: Sequence[dict]) -> list[float]:
    """For each response: 1.0 if it was not cut off and its last number is the solution's, else 0.0."""
    return [
        float(row.get("ended", True) and last_number(response) == solution(row))
        for response, row in zip(responses, rows, strict=True)
    ]
