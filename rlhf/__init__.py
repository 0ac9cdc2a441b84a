"""The mathematics that the training scripts share.

    logprobs.py   per-token log-probabilities from hidden states: the only place where logits and targets meet
    tree.py       a prompt with its k responses as one packed row, and the attention over it
    losses.py     one pure function per loss
    advantages.py from scores and log-probs to what each token gets: KL, GAE, group baselines
    data.py       rows -> token ids
    models.py     loading, scoring, saving
    generate.py   batched sampling
    rewards.py    gold reward, a reward model or a function of yours, all called alike
    agreement.py  how far annotators agree
    annotate.html the page of annotate.py
    reviews.py    the embedded task: film reviews with a known gold reward
    runs.py       run directory, metrics, tables, curves, checkpoints
    parallel.py   one model over many processes (torchrun); nothing in one process

Axis letters, in signatures, einops patterns and comments:

    p  prompts                  t  tokens of a row
    k  responses of a prompt    n  response tokens laid flat, over all sequences
    b  sequences, b = p * k     v  vocabulary
    m  preference pairs         d  hidden size
"""

import importlib
import os
import socket
import urllib.request


class BadInput(ValueError):
    """What the user gave cannot be used. The message is one line: file, row, field, and what to do."""


def require(holds: bool, message: str) -> None:
    """BadInput with `message` unless `holds`."""
    if not holds:
        raise BadInput(message)


class lazy_import:
    """A module that is loaded when one of its attributes is first used, so that `--help` answers at once."""

    def __init__(self, name: str):
        self.name = name

    def __getattr__(self, attribute: str):
        return getattr(importlib.import_module(self.name), attribute)


def answer_at_once_offline() -> None:
    """Tell the model hub's libraries that there is no network, where there is none: they would retry for a minute."""
    hub = lazy_import("huggingface_hub").constants
    try:
        if not urllib.request.getproxies():
            socket.getaddrinfo(hub.ENDPOINT.split("://")[-1].split("/")[0].split(":")[0], None)
    except OSError:
        os.environ["HF_HUB_OFFLINE"], hub.HF_HUB_OFFLINE = "1", True
