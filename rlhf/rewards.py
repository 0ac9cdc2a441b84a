"""Where a reward comes from: the embedded task's gold reward, a reward model, or a function of your own.

    gold               reviews.gold_reward of prompt and response together
    RUN_DIR            a reward model (train_rm.py), read with its own tokenizer; its reward_mean is taken off
    module:function    function(prompts, responses, rows) -> floats, found from the working directory

All are called alike, with one entry for each sequence: its prompt (a text or messages), its response (a text), and the
row of the data that it belongs to, in which `ended` is false where the response was cut before its end.
"""

import importlib
import itertools
import math
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from rlhf import BadInput, models, parallel, require, reviews
from rlhf.data import Message, build

Reward = Callable[[Sequence[str | list[Message]], Sequence[str], Sequence[dict]], list[float]]


def load_reward(
    source: str,
    device: str = "cpu",
    flag: str = "--reward",
    trust_remote_code: bool = False,
    max_prompt_length: int = 512,
    max_length: int = 1024,
    micro_batch_tokens: int = 2048,
) -> Reward:
    """The reward function that `source` names; the lengths and the budget, in tokens, are a reward model's.

    BadInput, naming `flag`, where there is no such source; and from the function itself, naming prompt and response,
    where one cannot be scored, or where a function of the user's raises, or does not give one finite number for each.
    """
    if source == "gold":

        def gold(prompts, responses, rows) -> list[float]:
            require(all(isinstance(x, str) for x in prompts), f"{flag} gold: is of texts, and a prompt is messages")
            return [reviews.gold_reward(f"{x} {y}") for x, y in zip(prompts, responses, strict=True)]

        return gold
    if not os.path.isdir(os.path.expanduser(source)) and source.count(":") == 1 and "/" not in source:
        function = checked(load_function(source, flag), f"{flag} {source}")
        return lambda *sequences: parallel.once(lambda: function(*sequences))

    tokenizer = models.load_tokenizer(source, trust_remote_code, flag)
    make = lambda device: models.load_reward_model(source, device, trust_remote_code, flag)  # noqa: E731
    model, pad = parallel.load(make, device, torch.float32), models.pad_id(tokenizer)

    def reward(prompts, responses, rows) -> list[float]:
        found = []
        for prompt, response, row in zip(prompts, responses, rows, strict=True):
            empty = row.get("ended") is False and not tokenizer(response, add_special_tokens=False)["input_ids"]
            require(not empty, f"{flag} {source}: a response without a token has no reward ({place(prompt, response)})")
        if not responses:
            return []
        for prompt, sequences in itertools.groupby(zip(prompts, responses, rows, strict=True), key=lambda x: x[0]):
            _, answers, sources = zip(*sequences, strict=True)
            ended = [source.get("ended") is not False for source in sources]
            found.append({"prompt": prompt, "responses": [*answers], "ended": ended})
        places = [(f"response {i}", row) for i, row in enumerate(found, 1)]
        examples, _ = build(places, tokenizer, "responses", max_prompt_length, max_length)
        layout = models.choose_layout(model, examples, pad, torch.float32)
        scores = models.score(model, examples, layout, pad, micro_batch_tokens, torch.float32)
        values = torch.cat(scores).tolist()
        for prompt, response, value in zip(prompts, responses, values, strict=True):
            require(math.isfinite(value), f"{flag} {source}: gave {value} ({place(prompt, response)})")
        return values

    return reward


def one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


def place(prompt: str | list[Message], response: str | tuple[str, str]) -> str:
    """A sequence (for a judge, two responses) as messages name it."""
    return f"prompt {str(prompt)[-80:]!r}, response {str(response)[:80]!r}"


def load_function(name: str, flag: str) -> Callable:
    """The function of "module:function", whose module is looked for in the working directory too."""
    module, _, attribute = name.partition(":")
    if str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    try:
        found = getattr(importlib.import_module(module), attribute)
    except Exception as error:  # importing runs the user's code, which may raise anything
        raise BadInput(f"{flag} {name}: cannot be imported ({one_line(error)})") from error
    require(callable(found), f"{flag} {name}: is not a function")
    return found


def checked(function: Reward, name: str) -> Reward:
    """The function with its results checked, and its errors as one line that names prompt and response."""

    def reward(prompts, responses, rows) -> list[float]:
        sequences = list(zip(prompts, responses, rows, strict=True))
        try:
            values = [float(x) for x in function(list(prompts), list(responses), list(rows))]
        except Exception as error:
            where = "none of its sequences when given alone"
            for prompt, response, row in sequences:
                try:
                    [float(x) for x in function([prompt], [response], [row])]
                except Exception:
                    where = place(prompt, response)
                    break
            raise BadInput(f"{name}: raised {one_line(error)} ({where})") from error
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
