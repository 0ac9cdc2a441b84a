"""recipes/: the reward for gsm8k."""

import gzip
import json

import pytest
from test_data import REAL

from recipes.gsm8k import correct
from rlhf import BadInput
from support.rewards import load_reward

ROW = {"prompt": "48 and 24?", "completion": "48 + 24 = <<48+24=72>>72\n#### 72"}


@pytest.mark.parametrize(
    ("response", "want"),
    [
        ("She sold 72", 1.0),
        ("48 + 24 = 72.", 1.0),
        ("#### 72.0", 1.0),
        ("it is $72", 1.0),
        ("72, or rather 73", 0.0),
        ("it is 720", 0.0),
        ("-72", 0.0),
        ("100-28=72 so 100-72", 1.0),
        ("seventy-two", 0.0),
        ("7,2", 0.0),
        ("the factors are 8,9,72", 1.0),
        ("", 0.0),
    ],
)
def test_the_last_number_must_be_right(response, want):
    assert correct(["q"], [response], [ROW]) == [want]


def test_forms_of_numbers_and_of_rows():
    rows = [
        {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "so\n#### 1,234"}]},
        {"answer": "#### -3"},
        {"completion": "#### 0.5"},
        {"completion": "#### 7", "ended": False},
        {"completion": "#### 7", "ended": True},
        {"answer": "#### 1,234,567.5"},
        {"answer": "#### 12345"},
    ]
    said = ["1234", "x = -3", ".5 is 0.50", "7", "7", "1234567.50", "12,345"]
    assert correct(["q"] * 7, said, rows) == [1.0, 1.0, 1.0, 0.0, 1.0, 1.0, 1.0]


def test_a_row_without_a_solution_is_named():
    reward = load_reward("recipes.gsm8k:correct")
    assert reward(["48 and 24?"], ["72"], [ROW]) == [1.0]
    with pytest.raises(BadInput, match="recipes.gsm8k:correct: raised ValueError: the row has no solution.*prompt 'q'"):
        reward(["q"], ["72"], [{"prompt": "q"}])


@pytest.mark.skipif(not REAL.is_dir(), reason="the shared data is not here")
def test_every_solution_of_gsm8k_is_correct():
    rows = [json.loads(line) for line in gzip.open(REAL / "sft_gsm8k.jsonl.gz", "rt")]
    solutions = [row["messages"][-1]["content"] for row in rows]
    assert len(rows) > 8000 and correct(["q"] * len(rows), solutions, rows) == [1.0] * len(rows)
    assert sum(correct(["q"] * len(rows), solutions[1:] + solutions[:1], rows)) < 0.05 * len(rows)
