"""What surrounds the mathematics: files, models, processes, printing. A first reader may skip it.

    rows.py           files and hub ids -> rows, with the checks and their one-line messages
    tokens.py         pieces of a text -> token ids, and back
    examples.py       rows -> token ids (`Example`), lengths, the held-out split
    preferences.py    pairs, ties, ceilings, expected accuracy
    models.py         loading and saving policies, references and reward models; adapters
    scoring.py        log-probs and rewards of batches; which layout a model accepts
    memory.py         what a training step takes, from a config and the lengths of the rows
    dryrun.py         what --dry-run prints of memory and time
    refcache.py       the reference's log-probs on disk
    generate.py       batched sampling
    rewards.py        gold reward, a reward model or a function of yours, all called alike
    agreement.py      how far annotators agree
    annotate.html     the page of annotate.py
    reviews.py        the embedded task: film reviews with a known gold reward
    runs.py           run directory, the flags that all scripts share, progress, checkpoints
    report.py         tables, intervals, curves, before and after
    reward_report.py  how far a reward model can be trusted
    rewardbench.py    RewardBench's scores, from the rewards of given responses
    parallel.py       processes and collectives (torchrun)
    sharding.py       one model over several processes (FSDP2)

Imports go one way: a script imports support, and support imports rlhf.
"""

import importlib
import os
import socket
import urllib.request


class lazy_import:
    """A module that is loaded when one of its attributes is first used, so that `--help` answers at once."""

    def __init__(self, name: str):
        self.name = name

    def __getattr__(self, attribute: str):
        return getattr(importlib.import_module(self.name), attribute)


def answer_at_once_offline() -> None:
    """Tell the model hub's libraries if there is no network, because they would retry for a minute."""
    hub = lazy_import("huggingface_hub").constants
    try:
        if not urllib.request.getproxies():
            socket.getaddrinfo(hub.ENDPOINT.split("://")[-1].split("/")[0].split(":")[0], None)
    except OSError:
        os.environ["HF_HUB_OFFLINE"], hub.HF_HUB_OFFLINE = "1", True
