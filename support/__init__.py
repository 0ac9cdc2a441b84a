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
    generate.py       sampling: which code does it, how a token is drawn, answers
    decode.py         the decode loop, whose step a CUDA graph can hold
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
import json
import os
import socket
import urllib.request
from pathlib import Path

from rlhf import BadInput


class lazy_import:
    """A module that is loaded when one of its attributes is first used, so that `--help` answers at once."""

    def __init__(self, name: str):
        self.name = name

    def __getattr__(self, attribute: str):
        return getattr(importlib.import_module(self.name), attribute)


def one_line(error: BaseException) -> str:
    """What an exception says, in one line of at most 200 characters; its type if it says nothing."""
    return " ".join(str(error).split())[:200] or type(error).__name__


def read_json(path: Path, *names: str) -> dict:
    """The JSON object in a file that a run has written. BadInput if the file is damaged or an object lacks a name."""
    return _json_object(path.read_bytes(), str(path), names)


def read_json_lines(path: Path, *names: str) -> list[dict]:
    """The JSON objects in the lines of a file that a run has written, without a last line that was not finished.
    BadInput, naming the line, if one is damaged or lacks a name."""
    lines = path.read_bytes().split(b"\n")[:-1]
    return [_json_object(line, f"{path}:{i}", names) for i, line in enumerate(lines, 1)]


def _json_object(data: bytes, where: str, names: tuple[str, ...]) -> dict:
    problem = ""
    try:
        value = json.loads(data)
        if not isinstance(value, dict) or not value.keys() >= {*names}:
            problem = f"not a JSON object{' with ' * bool(names)}{', '.join(names)}"
    except (ValueError, RecursionError) as error:
        problem = f"not JSON: {one_line(error)}"
    if problem:
        raise BadInput(f"{where} is damaged ({problem}): mend it, or bring back what was written")
    return value


def may_be_hub_id(name: str) -> bool:
    """Whether a name that is not on this disk could be a hub id: "name" or "owner/name"."""
    local = name.startswith(("/", ".", "~")) or "/" in name and Path(name).parent.is_dir()
    return not local and name.count("/") < 2


def answer_at_once_offline() -> None:
    """Tell the model hub's libraries if there is no network, because they would retry for a minute."""
    hub = lazy_import("huggingface_hub").constants
    try:
        if not urllib.request.getproxies():
            socket.getaddrinfo(hub.ENDPOINT.split("://")[-1].split("/")[0].split(":")[0], None)
    except OSError:
        os.environ["HF_HUB_OFFLINE"], hub.HF_HUB_OFFLINE = "1", True
