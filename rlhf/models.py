"""Loading policies and reward models, scoring batches with them, choosing the layout, saving.

Every causal language model of the `transformers` library goes through `response_logps`: its own backbone gives hidden
states, and the kernel of rlhf/logprobs.py turns those that precede a response token into log-probs. A reward model is
the library's sequence classifier with one label: `rewards` is its linear head on the state at a response's last token.
"""

import functools
import hashlib
import json
import os
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path

import torch
import transformers
from einops import rearrange
from jaxtyping import Float, Int
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from rlhf import BadInput, answer_at_once_offline, lazy_import, parallel, require
from rlhf.data import Example
from rlhf.logprobs import Head, token_logps
from rlhf.tree import Batch, collate, tokens, tree_attention

modeling_layers = lazy_import("transformers.modeling_layers")
peft = lazy_import("peft")
transformers.utils.logging.disable_progress_bar()  # its bars for loading and writing files would break into ours
SCORES_VERSION = 1  # raise it when a change here, in tree.py or in logprobs.py changes log-probs: cached ones are stale
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def load_tokenizer(name: str, trust_remote_code: bool = False, flag: str = "--model"):
    """The tokenizer of a run directory, a local folder or a hub id. BadInput, in one line, where there is none."""
    with _one_line(name, flag):
        return transformers.AutoTokenizer.from_pretrained(name, trust_remote_code=trust_remote_code)


def load_model(name: str, device: str, trust_remote_code: bool = False, flag: str = "--model"):
    """The causal language model of a run directory, a local folder or a hub id; weights in float32, dropout off.

    A folder of adapters (`add_lora`) is the model that they were trained on, with them merged into it.
    BadInput, in one line, where there is no such model or it is not a causal language model.
    """
    require(
        not is_reward_model(name, trust_remote_code, flag),
        f"{flag} {name}: a reward model, where a causal language model is wanted",
    )
    if below := _below_adapters(name):
        model = load_model(below, "cpu", trust_remote_code, flag)
        with _one_line(name, flag):
            model = peft.PeftModel.from_pretrained(model, name).merge_and_unload()
        model.name_or_path = name  # what further adapters are trained on
    else:
        with _one_line(name, flag):
            model = transformers.AutoModelForCausalLM.from_pretrained(
                name, dtype=torch.float32, trust_remote_code=trust_remote_code
            )
    return without_dropout(model).to(device)


def is_reward_model(name: str, trust_remote_code: bool = False, flag: str = "--model") -> bool:
    """Whether a run directory, local folder or hub id is a sequence classifier, by its config."""
    while below := _below_adapters(name):
        name = below
    with _one_line(name, flag):
        config = transformers.AutoConfig.from_pretrained(name, trust_remote_code=trust_remote_code)
    return any(kind.endswith("ForSequenceClassification") for kind in config.architectures or ())


def load_reward_model(name: str, device: str, trust_remote_code: bool = False, flag: str = "--reward"):
    """The reward model of a run directory, a local folder or a hub id: a sequence classifier with one label, weights
    in float32, dropout off. BadInput, in one line, for anything else."""
    require(
        is_reward_model(name, trust_remote_code, flag),
        f"{flag} {name}: not a reward model (its config names no sequence classifier): train one with train_rm.py",
    )
    with _one_line(name, flag, "reward model"):
        model, found = transformers.AutoModelForSequenceClassification.from_pretrained(
            name, dtype=torch.float32, trust_remote_code=trust_remote_code, output_loading_info=True
        )
    missing = ", ".join(sorted(found["missing_keys"]))
    require(not missing, f"{flag} {name}: no reward model: its weights lack {missing}")
    require(model.config.pad_token_id is not None, f"{flag} {name}: no reward model: its config has no pad id")
    require(
        model.config.num_labels == 1 and isinstance(getattr(model, "score", None), torch.nn.Linear),
        f"{flag} {name}: no reward model: it has {model.config.num_labels} labels, or a head that is no linear score",
    )
    return without_dropout(model).to(device)


def new_reward_model(policy, tokenizer):
    """A reward model that takes over the policy's own backbone, with a new head w ~ N(0, 1 / sqrt(d + 1)), no bias.

    The deviation is that of Stiennon et al. 2020 (arXiv 2009.01325), so that a first score has a deviation of about 1.
    The library's classifier reads the last token that is not its pad id, so this must not be the EOS id: the
    tokenizer's pad token, if that is its EOS, becomes its BOS token, or a new one. Consumes the global random state.
    BadInput where transformers has no such class for the architecture.
    """
    use_layout(policy, "padded")
    if tokenizer.pad_token_id in (None, tokenizer.eos_token_id):
        if tokenizer.bos_token_id not in (None, tokenizer.eos_token_id):
            tokenizer.pad_token = tokenizer.bos_token
        else:
            tokenizer.add_special_tokens({"pad_token": "<|pad|>"})
            if len(tokenizer) > policy.get_input_embeddings().num_embeddings:
                policy.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    config = policy.config
    config.num_labels, config.pad_token_id = 1, tokenizer.pad_token_id
    try:
        with torch.device("meta"):
            model = transformers.AutoModelForSequenceClassification.from_config(config)
    except ValueError:
        model = None
    if not isinstance(getattr(model, "score", None), torch.nn.Linear) or type(model.base_model) is not type(
        policy.base_model
    ):
        raise BadInput(
            f"--model: transformers has no sequence classifier for {config.model_type} models, which a reward model is "
            "saved as: start from another architecture, such as Llama, Qwen, Gemma, Mistral or GPT-2"
        )
    setattr(model, model.base_model_prefix, policy.base_model)
    head = torch.nn.Linear(model.score.in_features, 1, bias=False)
    torch.nn.init.normal_(head.weight, std=(head.in_features + 1) ** -0.5)
    model.score = head.to(policy.device)
    return without_dropout(model)


def _below_adapters(name: str) -> str | None:
    """The model that the adapters in a folder were trained on; None where there are none."""
    path = Path(name).expanduser() / "adapter_config.json"
    return json.loads(path.read_text())["base_model_name_or_path"] if path.is_file() else None


@contextmanager
def _one_line(name: str, flag: str, what: str = "causal language model"):
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
            raise BadInput(f"{flag} {name}: the folder has no {what}: {reason}") from None
        raise BadInput(
            f"{flag} {name}: not a local folder, and the model hub did not give it; without network, download it "
            f"elsewhere with `hf download {name} --local-dir DIR` and use {flag} DIR ({reason})"
        ) from None


def without_dropout(model):
    """The model in eval mode, and with every dropout probability 0 in whatever mode it is."""
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        for field, value in [*vars(module).items()]:  # those that are read as plain numbers, and routers' noise
            if isinstance(value, float) and ("drop" in field or "jitter" in field):
                setattr(module, field, 0.0)
    return model.eval()


def add_lora(model, rank: int, seed: int = 0):
    """Freezes the model and puts low-rank adapters into it, in place; returns peft's handle on them.

        W x  becomes  W x + 2 B A x,   A [rank, in] random, B [out, rank] 0    (Hu et al. 2021, Eq. 3, arXiv 2106.09685)

    in every linear layer but the output head (of a mixture's experts in those that are such layers), so that at first
    the model is what it was. Inside `without_lora` it is that always: the reference needs no weights of its own. Of
    several processes that share the model each has all of the adapters. Seeds the global random state.
    """
    torch.manual_seed(seed)
    settings = {"r": rank, "lora_alpha": 2 * rank, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
    return peft.get_peft_model(model, peft.LoraConfig(**settings))


@contextmanager
def without_lora(model):
    """Inside, the model is what it was before `add_lora`, if that was called. BadInput where peft's layers have another
    switch than the one that is used here."""
    adapted = [module for module in model.modules() if "_disable_adapters" in vars(module)]
    require(
        bool(adapted) or not any("lora_" in name for name, _ in model.named_parameters()),
        f"--lora-rank: without_lora in rlhf/models.py cannot switch off the adapters of peft {peft.__version__}",
    )
    for module in adapted:
        module._disable_adapters = True
    try:
        yield model
    finally:
        for module in adapted:
            module._disable_adapters = False


def checkpoint_layers(model) -> None:
    """From now on each layer's activations are computed a second time in the backward pass instead of being kept.

    BadInput where the library's model has no layers that can do that.
    """
    model.checkpointed = [x for x in model.modules() if isinstance(x, modeling_layers.GradientCheckpointingLayer)]
    require(bool(model.checkpointed), f"--gradient-checkpointing: not possible with {model.config.model_type} models")
    enable = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)  # its newer name
    enable({"use_reentrant": False})


def compile_layers(model) -> None:
    """From now on the layers run compiled (torch.compile), with the names of their weights as they were.

    Each layer is a region of its own, all lengths share a graph, and the attention of the tree layout stays eager, so
    that one compilation serves all layers and batches. After `checkpoint_layers` it is a layer's parts, because what
    the library's checkpoint calls is not compiled. Results differ by rounding.
    BadInput where the library does not name the model's layers.
    """
    found = parallel.layers(model)
    require(bool(found), f"--compile: the library names no layers of {model.config.model_type} models")
    for layer in found:
        for region in layer.children() if hasattr(model, "checkpointed") else [layer]:
            region.compile(dynamic=True)
    model.compiled = True


def eager(model) -> AbstractContextManager:
    """Within this context what `compile_layers` compiled runs as it is: for generation, where each token would bring
    new sizes of the cache."""
    return torch.compiler.set_stance("force_eager") if hasattr(model, "compiled") else nullcontext()


def trained(model) -> dict[str, Tensor]:
    """The model's state without what is frozen: all of it, or with `add_lora` the adapters."""
    frozen = {name for name, weight in model.named_parameters(remove_duplicate=False) if not weight.requires_grad}
    return {name: weight for name, weight in model.state_dict().items() if name not in frozen}


def pad_id(tokenizer) -> int:
    """The id that fills padded rows. It may equal EOS: masks come from lengths, never from ids."""
    return next((i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id) if i is not None), 0)


def positions(model) -> int | None:
    """How many positions the model has learnt, one by one, so that it cannot go beyond; None where it computes them."""
    learnt = ("wpe", "embed_positions", "position_embeddings")
    names = [name.split(".")[-1] for name, module in model.named_modules() if isinstance(module, torch.nn.Embedding)]
    return model.config.max_position_embeddings if any(name in learnt for name in names) else None


def output_head(model) -> Head:
    """The output layer as the kernel wants it; the config names its scale and soft-cap as its family does."""
    config, layer = model.config.get_text_config(), model.get_output_embeddings()
    scale = getattr(config, "logit_scale", None) or getattr(config, "lm_head_multiplier", None) or 1.0
    scale = scale / (getattr(config, "logits_scaling", None) or 1.0)
    return Head(layer.weight, getattr(layer, "bias", None), scale, getattr(config, "final_logit_softcapping", None))


def use_layout(model, layout: str) -> None:
    """Switch the model's attention to the tree's or back to its own (which is also what generation uses)."""
    if layout == "tree":
        transformers.AttentionInterface.register("tree", _never_compiled(tree_attention))
        model.own_attention = getattr(model, "own_attention", model.config._attn_implementation)
        model.set_attn_implementation("tree")
    elif hasattr(model, "own_attention"):
        model.set_attn_implementation(model.own_attention)


@functools.cache
def _never_compiled(attention: Callable) -> Callable:
    return torch.compiler.disable(attention)


def as_forward(measure: Callable) -> Callable:
    """measure(model, ...); of a model that is shared by several processes (rlhf/parallel.py) in what counts as its
    forward pass, since its weights, those of the output head too, are whole only there."""

    @functools.wraps(measure)
    def call(model, *args, **kwargs):
        return model.managed(measure, *args, **kwargs) if hasattr(model, "managed") else measure(model, *args, **kwargs)

    return call


def states(model, batch: Batch, places: Int[Tensor, " n"], dtype: torch.dtype = torch.float32) -> Float[Tensor, "n d"]:
    """The last layer's hidden states at these places of the flattened (rows t), in `dtype`, that of the products.

    After `checkpoint_layers`, what a backward pass needs of the layers is computed again in it, not kept.
    """
    precise = torch.float64 if model.dtype == torch.float64 else torch.float32
    for layer in getattr(model, "checkpointed", ()):
        layer.training = torch.is_grad_enabled()  # a layer does it in train mode only; what is in it stays in eval mode
    with torch.autocast(batch.input_ids.device.type, dtype, enabled=dtype != torch.float32):
        kwargs = {"segments": batch.segments} if batch.segments else {"attention_mask": batch.attention_mask}
        found = model.base_model(
            input_ids=batch.input_ids, position_ids=batch.position_ids, use_cache=False, **kwargs
        ).last_hidden_state
    return rearrange(found, "rows t d -> (rows t) d")[places].to(precise if dtype == torch.float32 else dtype)


@as_forward
def response_logps(
    model, batch: Batch, dtype: torch.dtype = torch.float32, temperature: float = 1.0, keep_bytes: int = 1 << 30
) -> tuple[Float[Tensor, " n"], Float[Tensor, " b"]]:
    """Log-probs (nats) of every scored response token given all before it, and their sums over each sequence.

    `dtype` is what the matrix products are done in. Weights and log-probs stay float32; the sums are float64, because
    in float32 a thousand tokens lose a thousandth of a nat.
    """
    found = states(model, batch, batch.sources, dtype)
    logps, _ = token_logps(found, output_head(model), batch.targets, temperature, keep_bytes=keep_bytes)
    sums = torch.zeros(len(batch.lengths), dtype=torch.float64, device=logps.device)
    return logps, sums.index_add(0, batch.sequence, logps.double())


@as_forward
def rewards(model, batch: Batch, dtype: torch.dtype = torch.float32) -> Float[Tensor, " b"]:
    """A reward model's scores: r(x, y) = w . h - reward_mean, with h the hidden state at the last token of y.

    `reward_mean` is the config's (rlhf/models.py, save_reward_model), 0 while the model is in training; the library's
    class gives w . h. Float32; gradient flows to w and to the model.
    """
    last = states(model, batch, batch.ends, dtype).to(model.score.weight.dtype)
    return model.score(last)[:, 0] - getattr(model.config, "reward_mean", 0.0)


@as_forward
def values(critic, batch: Batch, dtype: torch.dtype = torch.float32) -> Float[Tensor, " n"]:
    """A critic's estimate, before each response token, of the rewards to come: w . h - reward_mean, with h the hidden
    state that predicts the token. Float32; gradient flows to w and to the model."""
    before = states(critic, batch, batch.sources, dtype).to(critic.score.weight.dtype)
    return critic.score(before)[:, 0] - getattr(critic.config, "reward_mean", 0.0)


@torch.no_grad()
def per_token(
    measure: Callable[[Batch], Tensor], examples: Sequence[Example], layout: str, pad: int, budget: int, device: str
) -> Float[Tensor, " n *more"]:
    """What `measure` says of each response token, without gradient: all examples' tokens laid end to end, in order."""
    found: dict[int, Tensor] = {}
    for group, counts in parallel.shares(examples, budget, layout):
        part = [examples[i] for i in group]
        numbers = measure(collate(part, layout, pad, device))
        if counts:
            found |= zip(group, numbers.split([sum(map(len, e.responses)) for e in part]), strict=True)
    found = dict(parallel.gather([*found.items()]))
    return torch.cat([found[i] for i in range(len(examples))]).to(device)


@torch.no_grad()
def score(
    model, examples: Sequence[Example], layout: str, pad: int, budget: int, dtype: torch.dtype, what: str = ""
) -> list[Float[Tensor, " k"]]:
    """Log-prob (nats) of every response of every example, or a reward model's reward, without gradient, in the
    examples' order, on the CPU.

    `budget` is the tokens of one forward pass; `what` names a progress bar.
    """
    use_layout(model, layout)
    device = next(model.parameters()).device
    found: dict[int, Tensor] = {}
    groups, silent = parallel.micro_batches(examples, budget, layout, model), not what or not parallel.first()
    for group in tqdm(groups, desc=what, unit="batch", disable=silent, leave=False, dynamic_ncols=True):
        part = [examples[i] for i in group]
        batch = collate(part, layout, pad, device)
        values = rewards(model, batch, dtype) if hasattr(model, "score") else response_logps(model, batch, dtype)[1]
        found |= zip(group, values.cpu().split([len(e.responses) for e in part]), strict=True)
    found = dict(parallel.gather([*found.items()]))
    return [found[i] for i in range(len(examples))]


def question(model, tokenizer, examples: Sequence[Example], **settings) -> dict[str, str]:
    """All that the log-probs of `examples` depend on, by name: scores are the same if, and only if, all of this is."""

    def digest(*parts) -> str:
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]

    nowhere = {"dtype": None, "_name_or_path": None, "transformers_version": None}
    weights = hashlib.sha256(str(model.config.to_dict() | nowhere).encode())
    for name, value in sorted(model.state_dict().items()):
        value = parallel.full(value)
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
    is_there = all(parallel.gather([path.exists()]))  # for all processes, which read it or compute together
    nearest: list[str] | None = None
    for other in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(other, "pt") as f:
                asked = json.loads(f.metadata()["question"])
                if is_there and other == path and asked == question:
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
    if not parallel.first():
        return found
    partial = path.with_suffix(f".{os.getpid()}.partial")
    tensors = {"logps": torch.cat(found), "sizes": torch.tensor([len(x) for x in found])}
    save_file(tensors, partial, metadata={"question": json.dumps(question)})
    os.replace(partial, path)
    return found


@torch.no_grad()
def choose_layout(model, examples: Sequence[Example], pad: int, dtype: torch.dtype, wanted: str = "auto") -> str:
    """`tree` where the model gives the same numbers in both layouts, and no branch sees another; else `padded`.

    The numbers are the log-probs of the response tokens, or a reward model's scores at the tokens before them.
    Scored are the longest sequence and the largest tree, because a sliding window is harmless on short ones, with the
    shortest in front of them.
    Same means within 1e-4 nats a token in float32, and in bfloat16 within 4 times the difference between two padded
    batchings of the same rows. On the way our numbers are checked against the model's own, from its logits.
    """
    device = next(model.parameters()).device
    longest = max(examples, key=lambda e: len(e.prompt) + max(map(len, e.responses)))
    largest = max(examples, key=tokens)
    rows = [min(examples, key=tokens), longest, *([largest] if largest is not longest else [])]
    most, limit = len(longest.prompt) + max(map(len, longest.responses)), positions(model)
    require(
        limit is None or most <= limit,
        f"{model.config.model_type}: the model has {limit} positions, a prompt with its response {most} tokens: "
        "lower --max-prompt-length, and --max-length or --max-new-tokens",
    )
    use_layout(model, "padded")
    plain = torch.cat([_at_tokens(model, collate([e], "padded", pad, device), dtype) for e in rows])
    tolerance = 1e-4
    if dtype != torch.float32:
        together = _at_tokens(model, collate(rows, "padded", pad, device), dtype)
        tolerance = max(tolerance, 4 * (together - plain).abs().max().item())

    if hasattr(model, "score"):
        _check_rewards(model, rows, pad, dtype)
    else:
        _check_logps(model, rows[0], plain, pad, dtype)
    if wanted == "padded":
        return "padded"

    try:
        use_layout(model, "tree")
        tree = _at_tokens(model, collate(rows, "tree", pad, device), dtype)
        difference, leak = (tree - plain).abs().max().item(), _leak(model, rows, tree, pad, dtype)
        same = max(difference, leak) <= tolerance
        reason = (
            f"the layouts differ by {difference:.2g} at a token and a branch moves another by {leak:.2g}, "
            f"where rounding explains {tolerance:.2g}"
        )
    except torch.cuda.OutOfMemoryError:
        raise
    except (NotImplementedError, TypeError, ValueError, RuntimeError) as error:
        same, reason = False, str(error).split("\n")[0]
    if all(parallel.gather([same])):  # processes that share the model must have the same
        return "tree"
    use_layout(model, "padded")
    if wanted == "tree":
        raise BadInput(f"--layout tree does not fit {model.config.model_type}: {reason}; use --layout padded")
    print(f"layout: padded, because the tree layout does not fit {model.config.model_type} ({reason})")
    return "padded"


def _at_tokens(model, batch: Batch, dtype: torch.dtype) -> Float[Tensor, " n"]:
    """The number of each response token that the layouts must agree on."""
    return values(model, batch, dtype) if hasattr(model, "score") else response_logps(model, batch, dtype)[0]


def _check_logps(model, example: Example, ours: Float[Tensor, " n"], pad: int, dtype: torch.dtype) -> None:
    """BadInput unless the kernel's log-probs of this example are those of the model's own logits."""
    device = ours.device
    batch = collate([example], "padded", pad, device)
    ids = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask, "position_ids": batch.position_ids}
    with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
        logits = rearrange(model(**ids, use_cache=False).logits, "rows t v -> (rows t) v")[batch.sources]
    theirs = logits.float().log_softmax(-1).gather(1, batch.targets[:, None])[:, 0]
    off = (ours[: len(theirs)] - theirs).abs().max().item()
    require(
        off < (1e-3 if dtype == torch.float32 else 0.5),
        f"{model.config.model_type}: output_head in rlhf/models.py does not make its logits of the hidden states "
        f"(log-probs differ by {off:.3g} nats): this model needs a line there",
    )


def _check_rewards(model, examples: Sequence[Example], pad: int, dtype: torch.dtype) -> None:
    """BadInput unless our scores are those of the library's own classifier, with padding to the right and to the left.

    What would break this: a pad id that a response can end with, a wrong last token, positions that count the padding.
    """
    batch = collate(examples, "padded", pad, model.device)
    ours = rewards(model, batch, dtype) + getattr(model.config, "reward_mean", 0.0)
    padding = (batch.attention_mask.shape[1] - batch.attention_mask.sum(1)).tolist()
    for side in ("right", "left"):
        ids, mask, positions = (
            x if side == "right" else torch.stack([row.roll(n) for row, n in zip(x, padding, strict=True)])
            for x in (batch.input_ids, batch.attention_mask, batch.position_ids)
        )
        with torch.autocast(ids.device.type, dtype, enabled=dtype != torch.float32):
            theirs = model(ids, attention_mask=mask, position_ids=positions, use_cache=False).logits[:, 0]
        off = (ours - theirs).abs().max().item() / max(1.0, ours.abs().max().item())
        require(
            off < (1e-4 if dtype == torch.float32 else 0.1),
            f"{model.config.model_type}: with padding to the {side} the library's classifier gives other rewards than "
            f"ours (by {off:.3g}): its pad id {model.config.pad_token_id} may end a response, or its head is another",
        )


def _leak(model, rows: Sequence[Example], before: Float[Tensor, " n"], pad: int, dtype: torch.dtype) -> float:
    """How far the numbers of all other branches move from `before` when the first one's tokens are changed."""
    changed = [t - 1 if t else 1 for t in rows[0].responses[0]]
    other = replace(rows[0], responses=[changed, *rows[0].responses[1:]])
    batch = collate([other, *rows[1:]], "tree", pad, before.device)
    moved = (_at_tokens(model, batch, dtype) - before)[batch.sequence != 0]
    return moved.abs().max().item() if len(moved) else 0.0


def save(model, tokenizer, out: Path, lora=None) -> None:
    """Weights (safetensors), config and tokenizer, as `from_pretrained` reads them; of `add_lora`'s handle the adapters
    alone, beside which the model that they were trained on is needed."""
    (lora or model).save_pretrained(out)
    tokenizer.save_pretrained(out)
