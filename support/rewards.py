"""Load a reward function: the embedded task's gold reward, a reward model, or a Python function.

    gold               reviews.gold_reward of prompt and response together
    RUN_DIR            a reward model (train_rm.py) with its own tokenizer; its reward_mean is subtracted
    module:function    function(prompts, responses, rows) -> floats, imported from the working directory

All are called in the same way. Each argument has one entry per sequence: the prompt (a text or messages), the response
(a text), and the row of the data set, in which `ended` is false if the response was truncated. If it was sampled, the
row also has its token ids as `response_ids`, and the digest of their `tokenizer`. A reward model with this tokenizer
scores the ids, because a text can be tokenised in more than one way.
"""

import importlib
import itertools
import math
import os
import sys
import traceback
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import torch

from rlhf import BadInput, require
from support import models, parallel, reviews, scoring, sharding, tokens
from support.examples import Example, build
from support.rows import Message, prompt_of
from support.scoring import Batching

Reward = Callable[[Sequence[str | list[Message]], Sequence[str], Sequence[dict]], list[float]]


def load_reward(
    source: str,
    device: str = "cpu",
    flag: str = "--reward",
    trust_remote_code: bool = False,
    max_prompt_length: int = 512,
    max_length: int = 1024,
    micro_batch_tokens: int = 2048,
    dtype: torch.dtype = torch.float32,
) -> Reward:
    """The reward function named by `source`. The lengths and the budget, in tokens, and the dtype are a reward model's.

    Raises BadInput with `flag` if there is no such source. The returned function raises BadInput with the prompt and
    response if it cannot score them, or if a user's function raises or does not return one finite number for each.
    """
    if source == "gold":

        def gold(prompts, responses, rows) -> list[float]:
            require(all(isinstance(x, str) for x in prompts), f"{flag} gold: scores texts, but a prompt holds messages")
            return [reviews.gold_reward(f"{x} {y}") for x, y in zip(prompts, responses, strict=True)]

        return gold
    if names_function(source):
        function = checked(load_function(source, flag), f"{flag} {source}")
        return lambda *sequences: parallel.on_main(lambda: function(*sequences))

    tokenizer = models.load_tokenizer(source, trust_remote_code, flag)
    make = lambda device: models.load_reward_model(source, device, trust_remote_code, flag)  # noqa: E731
    model = sharding.load(make, device, dtype)
    batching = Batching("auto", models.pad_id(tokenizer), dtype, micro_batch_tokens, device)

    digest = tokens.digest(tokenizer)
    has_ids = lambda row: bool(row.get("response_ids")) and row.get("tokenizer") == digest  # noqa: E731
    told = False

    def reward(prompts, responses, rows) -> list[float]:
        nonlocal told
        rankings = []
        if not told and any(row.get("response_ids") and not has_ids(row) for row in rows):
            print(f"{flag} {source}: has another tokenizer than what was sampled, whose texts are tokenised anew")
            told = True
        for prompt, response, row in zip(prompts, responses, rows, strict=True):
            empty = row.get("ended") is False and not has_ids(row)
            empty = empty and not tokenizer(response, add_special_tokens=False)["input_ids"]
            require(not empty, f"{flag} {source}: a response without a token has no reward ({place(prompt, response)})")
        if not responses:
            return []
        located = zip(prompts, responses, rows, strict=True)
        key = lambda sequence: (sequence[0], sequence[2].get("tools"), has_ids(sequence[2]))  # noqa: E731
        for (prompt, tools, sampled), sequences in itertools.groupby(located, key):
            _, answers, answer_rows = zip(*sequences, strict=True)
            ended = [row.get("ended") is not False for row in answer_rows]
            ids = {"token_ids": [row["response_ids"] for row in answer_rows], "tokenizer": digest} if sampled else {}
            rankings.append({"prompt": prompt, "responses": [*answers], "ended": ended, "tools": tools} | ids)
        located = [(f"response {i}", ranking) for i, ranking in enumerate(rankings, 1)]
        examples, _ = build(located, tokenizer, "responses", max_prompt_length, max_length)
        layout = scoring.choose_layout(model, examples, batching)
        values = torch.cat(scoring.score_rewards(model, examples, batching._replace(layout=layout))).tolist()
        for prompt, response, value in zip(prompts, responses, values, strict=True):
            require(math.isfinite(value), f"{flag} {source}: gave {value} ({place(prompt, response)})")
        return values

    reward.model = model
    return reward


def require_texts(source: str | None, examples: Sequence[Example]) -> None:
    """BadInput if --reward is gold and a prompt is a list of messages."""
    texts = source != "gold" or all(isinstance(prompt_of(e.row), str) for e in examples)
    require(texts, "--reward gold: scores texts, but a prompt holds messages")


def scores_ids(source: str, tokenizer, trust_remote_code: bool = False) -> bool:
    """Whether `source` is a reward model with this tokenizer's vocabulary and EOS, which can score sampled ids."""
    if not Path(source).is_dir():
        return False
    own = models.load_tokenizer(source, trust_remote_code, "--reward")
    known = tokenizer.get_vocab().items() <= own.get_vocab().items()  # it may know a padding token more
    return known and own.eos_token_id == tokenizer.eos_token_id


def score_texts(reward: Reward, examples: Sequence[Example], ends: Sequence[int]) -> list[float]:
    """Rewards of all responses, as texts; `ends` are the ids that end a response."""
    sequences = [
        (prompt_of(e.row), text, e.row | {"ended": response[-1] in ends})
        for e in examples
        for text, response in zip(e.response_texts, e.responses, strict=True)
    ]
    return reward(*map(list, zip(*sequences, strict=True)))


def one_line(error: Exception, module: str) -> str:
    """The error, with the innermost line of the user's module that it passed through: "KeyError: 'x', at mine.py:9"."""
    file = f"{module.replace('.', '/')}.py"
    frames = [x for x in traceback.extract_tb(error.__traceback__) if f"/{x.filename}".endswith(f"/{file}")]
    at = f", at {file}:{frames[-1].lineno}" if frames else ""
    return f"{type(error).__name__}: {' '.join(str(error).split())}{at}"


def place(prompt: str | list[Message], response: str | tuple[str, str]) -> str:
    """The end of the prompt and the start of the response, for error messages. A judge's `response` is a pair."""
    return f"prompt {str(prompt)[-80:]!r}, response {str(response)[:80]!r}"


def names_function(source: str) -> bool:
    """Whether a source is "module:function" and no folder."""
    return not os.path.isdir(os.path.expanduser(source)) and source.count(":") == 1 and "/" not in source


def load_function(name: str, flag: str) -> Callable:
    """Import "module:function"; the working directory is searched too."""
    module, _, attribute = name.partition(":")
    require(not module.endswith(".py"), f"{flag} {name}: names a module: drop .py ({name.replace('.py:', ':')})")
    if str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    try:
        function = getattr(importlib.import_module(module), attribute)
    except Exception as error:  # importing runs the user's code, which may raise anything
        raise BadInput(f"{flag} {name}: cannot be imported ({one_line(error, module)})") from error
    require(callable(function), f"{flag} {name}: is not a function")
    return function


def checked(function: Reward, name: str) -> Reward:
    """Wrap a function: check its results, and report its errors in one line with the prompt and response. `name` is the
    flag and "module:function"."""
    module = name.split()[-1].partition(":")[0]

    def reward(prompts, responses, rows) -> list[float]:
        sequences = list(zip(prompts, responses, rows, strict=True))
        try:
            returned = function(list(prompts), list(responses), list(rows))
            listed = isinstance(returned, Iterable) and not isinstance(returned, str | bytes | dict)
            returned = list(returned) if listed else returned
            texts = listed and any(isinstance(x, str | bytes) for x in returned)
            values = [float(x) for x in returned] if listed and not texts else None
        except Exception as error:
            where = "none of its sequences when given alone"
            for prompt, response, row in sequences:
                try:
                    [float(x) for x in function([prompt], [response], [row])]
                except Exception:
                    where = place(prompt, response)
                    break
            raise BadInput(f"{name}: raised {one_line(error, module)} ({where})") from error
        kind = "a list of strings" if texts else type(returned).__name__
        require(values is not None, f"{name}: returned {kind}, wanted a list of numbers")
        require(
            len(values) == len(sequences),
            f"{name}: gave {len(values)} numbers for {len(sequences)} responses, from "
            + (place(*sequences[0][:2]) if sequences else "none")
            + " on",
        )
        for (prompt, response, _), value in zip(sequences, values, strict=True):
            require(math.isfinite(value), f"{name}: gave {value} ({place(prompt, response)})")
        return values

    return reward
