"""Loading a causal language model, scoring batches with it, choosing the layout, saving.

Every model of the `transformers` library goes through `response_logps`: its own backbone gives hidden states, and the
kernel of rlhf/logprobs.py turns those that precede a response token into log-probs.
"""

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch
import transformers
from einops import rearrange
from jaxtyping import Float
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from rlhf import BadInput, answer_at_once_offline
from rlhf.data import Example
from rlhf.logprobs import Head, token_logps
from rlhf.tree import Batch, collate, micro_batches, tokens, tree_attention

transformers.utils.logging.disable_progress_bar()  # its bars for loading and writing files would break into ours
SCORES_VERSION = 1  # raise it when a change here, in tree.py or in logprobs.py changes log-probs: cached ones are stale
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def load_tokenizer(name: str, trust_remote_code: bool = False, flag: str = "--model"):
    """The tokenizer of a run directory, a local folder or a hub id. BadInput, in one line, where there is none."""
    with _one_line(name, flag):
        return transformers.AutoTokenizer.from_pretrained(name, trust_remote_code=trust_remote_code)


def load_model(name: str, device: str, trust_remote_code: bool = False, flag: str = "--model"):
    """The causal language model of a run directory, a local folder or a hub id; weights in float32, dropout off.

    BadInput, in one line, where there is no such model or it is not a causal language model.
    """
    with _one_line(name, flag):
        model = transformers.AutoModelForCausalLM.from_pretrained(
            name, dtype=torch.float32, trust_remote_code=trust_remote_code
        )
    return without_dropout(model).to(device)


@contextmanager
def _one_line(name: str, flag: str):
    """What the library says about a model that it cannot load, as one line."""
    path = Path(name).expanduser()
    if not path.is_dir():
        if path.exists() or name.startswith((".", "/", "~")) or name.count("/") > 1:
            raise BadInput(f"{flag} {name}: no such folder")
        answer_at_once_offline()
    try:
        yield
    except (OSError, ValueError, KeyError, ImportError, SafetensorError) as error:
        reason = " ".join(str(error).split())[:200]
        if os.path.isdir(name):
            raise BadInput(f"{flag} {name}: the folder has no causal language model: {reason}") from None
        raise BadInput(
            f"{flag} {name}: not a local folder, and the model hub did not give it; without network, download it "
            f"elsewhere with `hf download {name} --local-dir DIR` and use {flag} DIR ({reason})"
        ) from None


def without_dropout(model):
    """The model in eval mode, and with every dropout probability 0 in whatever mode it is."""
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        for field in ("dropout", "attention_dropout", "attn_dropout"):  # those that attention reads as plain numbers
            if isinstance(getattr(module, field, None), float):
                setattr(module, field, 0.0)
    return model.eval()


def pad_id(tokenizer) -> int:
    """The id that fills padded rows. It may equal EOS: masks come from lengths, never from ids."""
    return next((i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id) if i is not None), 0)


def output_head(model) -> Head:
    """The output layer as the kernel wants it; the config names its scale and soft-cap as its family does."""
    config, layer = model.config.get_text_config(), model.get_output_embeddings()
    scale = getattr(config, "logit_scale", None) or getattr(config, "lm_head_multiplier", None) or 1.0
    scale = scale / (getattr(config, "logits_scaling", None) or 1.0)
    return Head(layer.weight, getattr(layer, "bias", None), scale, getattr(config, "final_logit_softcapping", None))


def use_layout(model, layout: str) -> None:
    """Switch the model's attention to the tree's or back to its own (which is also what generation uses)."""
    if layout == "tree":
        transformers.AttentionInterface.register("tree", tree_attention)
        model.own_attention = getattr(model, "own_attention", model.config._attn_implementation)
        model.set_attn_implementation("tree")
    elif hasattr(model, "own_attention"):
        model.set_attn_implementation(model.own_attention)


def response_logps(
    model, batch: Batch, dtype: torch.dtype = torch.float32, temperature: float = 1.0, keep_bytes: int = 1 << 30
) -> tuple[Float[Tensor, " n"], Float[Tensor, " b"]]:
    """Log-probs (nats) of every scored response token given all before it, and their sums over each sequence.

    `dtype` is what the matrix products are done in. Weights and log-probs stay float32; the sums are float64, because
    in float32 a thousand tokens lose a thousandth of a nat.
    """
    precise = torch.float64 if model.dtype == torch.float64 else torch.float32
    with torch.autocast(batch.input_ids.device.type, dtype, enabled=dtype != torch.float32):
        kwargs = {"segments": batch.segments} if batch.segments else {"attention_mask": batch.attention_mask}
        states = model.base_model(
            input_ids=batch.input_ids, position_ids=batch.position_ids, use_cache=False, **kwargs
        ).last_hidden_state
        states = rearrange(states, "rows t d -> (rows t) d")[batch.sources]
    states = states.to(precise if dtype == torch.float32 else dtype)
    logps, _ = token_logps(states, output_head(model), batch.targets, temperature, keep_bytes=keep_bytes)
    sums = torch.zeros(len(batch.lengths), dtype=torch.float64, device=logps.device)
    return logps, sums.index_add(0, batch.sequence, logps.double())


@torch.no_grad()
def score(
    model, examples: Sequence[Example], layout: str, pad: int, budget: int, dtype: torch.dtype, what: str = ""
) -> list[Float[Tensor, " k"]]:
    """Log-prob (nats) of every response of every example, without gradient, in the examples' order, on the CPU.

    `budget` is the tokens of one forward pass; `what` names a progress bar.
    """
    use_layout(model, layout)
    device = next(model.parameters()).device
    found: list[Tensor] = [torch.empty(0)] * len(examples)
    groups = micro_batches(examples, budget, layout)
    for group in tqdm(groups, desc=what, unit="batch", disable=not what, leave=False, dynamic_ncols=True):
        part = [examples[i] for i in group]
        sums = response_logps(model, collate(part, layout, pad, device), dtype)[1].cpu()
        for i, logps in zip(group, sums.split([len(e.responses) for e in part]), strict=True):
            found[i] = logps
    return found


def question(model, tokenizer, examples: Sequence[Example], **settings) -> dict[str, str]:
    """All that the log-probs of `examples` depend on, by name: scores are the same if, and only if, all of this is."""

    def digest(*parts) -> str:
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]

    nowhere = {"dtype": None, "_name_or_path": None, "transformers_version": None}
    weights = hashlib.sha256(str(model.config.to_dict() | nowhere).encode())
    for name, value in sorted(model.state_dict().items()):
        weights.update(f"{name} {tuple(value.shape)} {value.dtype}".encode())
        weights.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return {
        "weights": weights.hexdigest()[:32],
        "tokenizer": digest(sorted(tokenizer.get_vocab().items())),
        "template": digest(tokenizer.chat_template),
        "rows": digest(*[(e.prompt, e.responses) for e in examples]),
        "versions": f"torch {torch.__version__}, transformers {transformers.__version__}, scores {SCORES_VERSION}",
        **{name: str(value) for name, value in settings.items()},
    }


def cached(folder: Path, question: dict[str, str], compute: Callable[[], list[Tensor]]) -> list[Float[Tensor, " k"]]:
    """The answer to `question` from a file of `folder`, else computed and written there for later runs.

    A file answers only the very question that it was written for. Where there is none, a line says what differs in the
    nearest one, so that nobody wonders why the scores are computed again.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise BadInput(f"--ref-cache {folder}: cannot write there: {error.strerror}") from None
    path = folder / (hashlib.sha256(json.dumps(question).encode()).hexdigest()[:16] + ".safetensors")
    nearest: list[str] | None = None
    for other in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(other, "pt") as f:
                asked = json.loads(f.metadata()["question"])
                if other == path and asked == question:
                    print(f"reference log-probs: from {path}")
                    return [*f.get_tensor("logps").split(f.get_tensor("sizes").tolist())]
        except (SafetensorError, KeyError, ValueError, TypeError):
            asked = {}
        differing = [name for name in question if asked.get(name) != question[name]]
        if nearest is None or len(differing) < len(nearest):
            nearest = differing
    if nearest:
        print(f"reference log-probs: no cached ones fit (the nearest were made with other {', '.join(nearest)})")
    found = compute()
    partial = path.with_suffix(f".{os.getpid()}.partial")
    tensors = {"logps": torch.cat(found), "sizes": torch.tensor([len(x) for x in found])}
    save_file(tensors, partial, metadata={"question": json.dumps(question)})
    os.replace(partial, path)
    return found


@torch.no_grad()
def choose_layout(model, examples: Sequence[Example], pad: int, dtype: torch.dtype, wanted: str = "auto") -> str:
    """`tree` where the model gives the same log-probs in both layouts, and no branch sees another; else `padded`.

    Scored are the longest sequence and the largest tree, because a sliding window is harmless on short ones, with the
    shortest in front of them.
    Same means within 1e-4 nats a token in float32, and in bfloat16 within 4 times the difference between two padded
    batchings of the same rows. On the way the kernel's log-probs are checked against the model's own logits.
    """
    device = next(model.parameters()).device
    longest = max(examples, key=lambda e: len(e.prompt) + max(map(len, e.responses)))
    largest = max(examples, key=tokens)
    rows = [min(examples, key=tokens), longest, *([largest] if largest is not longest else [])]
    use_layout(model, "padded")
    plain = torch.cat([response_logps(model, collate([e], "padded", pad, device), dtype)[0] for e in rows])
    tolerance = 1e-4
    if dtype != torch.float32:
        together = response_logps(model, collate(rows, "padded", pad, device), dtype)[0]
        tolerance = max(tolerance, 4 * (together - plain).abs().max().item())

    short = collate(rows[:1], "padded", pad, device)
    ids = {"input_ids": short.input_ids, "attention_mask": short.attention_mask, "position_ids": short.position_ids}
    with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
        logits = rearrange(model(**ids, use_cache=False).logits, "rows t v -> (rows t) v")[short.sources]
    theirs = logits.float().log_softmax(-1).gather(1, short.targets[:, None])[:, 0]
    off = (plain[: len(theirs)] - theirs).abs().max().item()
    if off > (1e-3 if dtype == torch.float32 else 0.5):
        raise BadInput(
            f"{model.config.model_type}: output_head in rlhf/models.py does not make its logits of the hidden states "
            f"(log-probs differ by {off:.3g} nats): this model needs a line there"
        )
    if wanted == "padded":
        return "padded"

    try:
        use_layout(model, "tree")
        tree = response_logps(model, collate(rows, "tree", pad, device), dtype)[0]
        difference, leak = (tree - plain).abs().max().item(), _leak(model, rows, tree, pad, dtype)
        same = max(difference, leak) <= tolerance
        reason = (
            f"the layouts differ by {difference:.2g} nats a token and a branch moves another by {leak:.2g}, "
            f"where rounding explains {tolerance:.2g}"
        )
    except (NotImplementedError, TypeError, ValueError, RuntimeError) as error:
        same, reason = False, str(error).split("\n")[0]
    if same:
        return "tree"
    use_layout(model, "padded")
    if wanted == "tree":
        raise BadInput(f"--layout tree does not fit {model.config.model_type}: {reason}; use --layout padded")
    print(f"layout: padded, because the tree layout does not fit {model.config.model_type} ({reason})")
    return "padded"


def _leak(model, rows: Sequence[Example], logps: Float[Tensor, " n"], pad: int, dtype: torch.dtype) -> float:
    """How far the log-probs of all other branches move (nats) from `logps` when the first one's tokens are changed."""
    changed = [t - 1 if t else 1 for t in rows[0].responses[0]]
    other = replace(rows[0], responses=[changed, *rows[0].responses[1:]])
    batch = collate([other, *rows[1:]], "tree", pad, logps.device)
    moved = (response_logps(model, batch, dtype)[0] - logps)[batch.sequence != 0]
    return moved.abs().max().item() if len(moved) else 0.0


def save(model, tokenizer, out: Path) -> None:
    """Weights (safetensors), config and tokenizer, as `from_pretrained` reads them."""
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
