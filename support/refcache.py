"""The reference's log-probs on disk, so that runs on the same data compute them once."""

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from jaxtyping import Float, UInt8
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from rlhf import BadInput
from support import parallel
from support.examples import Example
from support.scoring import Batching, score_logps

SCORES_VERSION = 2  # raise it when a change here, in tree.py or in logprobs.py changes log-probs: cached ones are stale


def reference_logps(
    reference, weights: str, tokenizer, examples: Sequence[Example], batching: Batching, a: Any
) -> list[Tensor]:
    """The reference's log-prob of every response, [k] for each example: read from --ref-cache, or computed and kept.
    `weights` is `models.digest` of the reference."""
    settings = {"lengths": (a.max_prompt_length, a.max_length), "dtype": a.dtype, "layout": batching.layout}
    key = cache_key(weights, tokenizer, examples, **settings, device=torch.device(a.device).type)
    compute = lambda: score_logps(reference, examples, batching, "reference log-probs")  # noqa: E731
    return cached(Path(a.ref_cache), key, row_digests(examples), compute)


def row_digests(examples: Sequence[Example]) -> UInt8[Tensor, "n 16"]:
    """Half of the SHA-256 of each example's tokens, and of which of them are trained."""
    parts = [json.dumps([e.prompt, e.responses, e.trained]).encode() for e in examples]
    digests = [hashlib.sha256(part).digest()[:16] for part in parts]
    return torch.tensor([list(digest) for digest in digests], dtype=torch.uint8).reshape(-1, 16)


def cache_key(weights: str, tokenizer, examples: Sequence[Example], **settings) -> dict[str, str]:
    """Everything that the log-probs of `examples` depend on, by name: they are the same if and only if all of it is."""

    def digest(*parts) -> str:
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]

    return {
        "weights": weights[:32],
        "tokenizer": digest(sorted(tokenizer.get_vocab().items())),
        "template": digest(tokenizer.chat_template),
        "rows": digest(*[(e.prompt, e.responses, e.trained) for e in examples]),
        "versions": f"torch {torch.__version__}, transformers {transformers.__version__}, scores {SCORES_VERSION}",
        **{name: str(value) for name, value in settings.items()},
    }


def cached(
    folder: Path, key: dict[str, str], rows: UInt8[Tensor, "n 16"], compute: Callable[[], list[Tensor]]
) -> list[Float[Tensor, " k"]]:
    """The log-probs stored in `folder` under exactly this key, else compute() written there for later runs.

    A file of these `rows` (`row_digests`) and more, under a key that differs only in its rows, will do too: that of all
    the data when --max-steps or --eval-pairs leaves rows out. If no file fits but one nearly does, a line says what
    differs in it, or that the file is damaged, so that nobody wonders why the scores are computed again.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise BadInput(f"--ref-cache {folder}: cannot write there: {error.strerror}") from None
    path = folder / (hashlib.sha256(json.dumps(key).encode()).hexdigest()[:16] + ".safetensors")
    others = sorted({*folder.glob("*.safetensors")} - {path})
    for file in (path, *others):
        stored = _read(file, key, rows)
        if all(parallel.gather([stored is not None])):  # in every process: they all read it, or compute together
            print(f"reference log-probs: from {file}" + ", which has these rows and more" * (file != path))
            return stored
    if path.exists():
        print(f"reference log-probs: {path} is damaged: they are computed again")
    nearest: list[str] | None = None
    for other in others:
        try:
            with safe_open(other, "pt") as f:
                other_key = json.loads(f.metadata()["question"])
        except (SafetensorError, OSError, KeyError, ValueError, TypeError):
            other_key = {}
        differing = [name for name in key if other_key.get(name) != key[name]]
        if nearest is None or len(differing) < len(nearest):
            nearest = differing
    if nearest and len(nearest) <= 2:  # more: these are of another data set or model
        print(f"reference log-probs: no cached ones fit (the nearest were made with other {', '.join(nearest)})")
    logps = compute()
    if parallel.is_main():
        partial = path.with_suffix(f".{os.getpid()}.partial")
        tensors = {"logps": torch.cat(logps), "sizes": torch.tensor([len(x) for x in logps]), "rows": rows}
        try:
            save_file(tensors, partial, metadata={"question": json.dumps(key), "sha256": _digest(tensors)})
        except SafetensorError as error:  # a full disk, among others
            raise OSError(f"--ref-cache {path.parent}: {error}") from None
        os.replace(partial, path)
    return logps


def _read(path: Path, key: dict[str, str], rows: UInt8[Tensor, "n 16"]) -> list[Tensor] | None:
    """The log-probs of these rows in a file; None if it is not there, damaged, lacks a row, or has another key."""
    try:
        with safe_open(path, "pt") as f:
            stored = json.loads(f.metadata()["question"])
            if stored != key | {"rows": stored["rows"]}:
                return None
            tensors = {name: f.get_tensor(name) for name in f.keys()}  # noqa: SIM118 (no dictionary)
            if f.metadata()["sha256"] != _digest(tensors):
                return None
        logps = tensors["logps"].split(tensors["sizes"].tolist())
        if stored == key:  # a row that is there twice may have two values, up to rounding
            return [*logps]
        places = {bytes(row): i for i, row in enumerate(tensors["rows"].tolist())}
        return [logps[places[bytes(row)]] for row in rows.tolist()]
    except (SafetensorError, OSError, RuntimeError, KeyError, ValueError, TypeError, AttributeError):
        return None


def _digest(tensors: dict[str, Tensor]) -> str:
    return hashlib.sha256(b"".join(tensors[name].numpy().tobytes() for name in ("logps", "sizes", "rows"))).hexdigest()
