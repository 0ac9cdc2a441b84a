"""The reference's log-probs on disk, so that runs on the same data compute them once."""

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from jaxtyping import Float
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from rlhf import BadInput
from support import models, parallel
from support.examples import Example
from support.scoring import Batching, score_logps

SCORES_VERSION = 1  # raise it when a change here, in tree.py or in logprobs.py changes log-probs: cached ones are stale


def reference_logps(reference, tokenizer, examples: Sequence[Example], batching: Batching, a: Any) -> list[Tensor]:
    """The reference's log-prob of every response, [k] for each example: read from --ref-cache, or computed and kept."""
    settings = {"lengths": (a.max_prompt_length, a.max_length), "dtype": a.dtype, "layout": batching.layout}
    key = cache_key(reference, tokenizer, examples, **settings, device=torch.device(a.device).type)
    return cached(Path(a.ref_cache), key, lambda: score_logps(reference, examples, batching, "reference"))


def cache_key(model, tokenizer, examples: Sequence[Example], **settings) -> dict[str, str]:
    """Everything that the log-probs of `examples` depend on, by name: they are the same if and only if all of it is."""

    def digest(*parts) -> str:
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]

    return {
        "weights": models.digest(model)[:32],
        "tokenizer": digest(sorted(tokenizer.get_vocab().items())),
        "template": digest(tokenizer.chat_template),
        "rows": digest(*[(e.prompt, e.responses, e.trained) for e in examples]),
        "versions": f"torch {torch.__version__}, transformers {transformers.__version__}, scores {SCORES_VERSION}",
        **{name: str(value) for name, value in settings.items()},
    }


def cached(folder: Path, key: dict[str, str], compute: Callable[[], list[Tensor]]) -> list[Float[Tensor, " k"]]:
    """The log-probs stored in `folder` under exactly this key, else compute() written there for later runs.

    If no file fits but one nearly does, a line says what differs in it, or that the file is damaged, so that nobody
    wonders why the scores are computed again.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise BadInput(f"--ref-cache {folder}: cannot write there: {error.strerror}") from None
    path = folder / (hashlib.sha256(json.dumps(key).encode()).hexdigest()[:16] + ".safetensors")
    stored = _read(path, key)
    if all(parallel.gather([stored is not None])):  # in every process: they all read it, or compute together
        print(f"reference log-probs: from {path}")
        return stored
    if path.exists():
        print(f"reference log-probs: {path} is damaged: they are computed again")
    nearest: list[str] | None = None
    for other in sorted({*folder.glob("*.safetensors")} - {path}):
        try:
            with safe_open(other, "pt") as f:
                other_key = json.loads(f.metadata()["question"])  # the key, under the name of the first files
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
        tensors = {"logps": torch.cat(logps), "sizes": torch.tensor([len(x) for x in logps])}
        save_file(tensors, partial, metadata={"question": json.dumps(key), "sha256": _digest(tensors)})
        os.replace(partial, path)
    return logps


def _read(path: Path, key: dict[str, str]) -> list[Tensor] | None:
    """The log-probs in a file; None if it is not there, holds another key's, or is damaged. Files that were written
    before there were checksums have none."""
    try:
        with safe_open(path, "pt") as f:
            tensors = {name: f.get_tensor(name) for name in ("logps", "sizes")}
            right = json.loads(f.metadata()["question"]) == key
            right &= f.metadata().get("sha256") in (None, _digest(tensors))
            return [*tensors["logps"].split(tensors["sizes"].tolist())] if right else None
    except (SafetensorError, OSError, RuntimeError, KeyError, ValueError, TypeError):
        return None


def _digest(tensors: dict[str, Tensor]) -> str:
    return hashlib.sha256(b"".join(tensors[name].numpy().tobytes() for name in ("logps", "sizes"))).hexdigest()
