"""Loading and saving policies, references and reward models; their adapters and their attention.

Every causal language model of the `transformers` library can be a policy. A reward model is the library's sequence
classifier with one label. Nothing here is remembered on the model: what a function needs to know, it reads from the
model's own config and modules.
"""

import copy
import functools
import hashlib
import json
import logging
import os
import pickle
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any, no_type_check

import torch
import transformers
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from rlhf import BadInput, require
from rlhf.logprobs import Head
from rlhf.optim import AdamW, LowBits, dither, join, split
from rlhf.tree import takes_flash, tree_attention
from support import answer_at_once_offline, lazy_import, may_be_hub_id, one_line, read_json
from support.parallel import full_tensor, several

modeling_layers = lazy_import("transformers.modeling_layers")
peft = lazy_import("peft")
transformers.utils.logging.disable_progress_bar()  # the library's bars for loading and writing files would break ours
logging.getLogger("transformers.modeling_utils").addFilter(  # `_require_all_weights` says the same in one line
    lambda record: "LOAD REPORT" not in record.getMessage() or "CONVERSION" in record.getMessage()
)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
PACKED = "tree_"  # begins the name of the attention over packed trees; the model's own attention follows, in hex
IN_PEFT = "base_model.model."  # stands before the names of weights in peft's files
MASKED = "sdpa_masked"  # the library's SDPA attention in a compiled model, with `_mask_of_several_rows`

# ------------------------------------------------------------------------------------------------- loading and saving


def load_tokenizer(name: str, trust_remote_code: bool = False, flag: str = "--model"):
    """The tokenizer of a run directory, a local folder or a hub id. BadInput, in one line, if there is none."""
    with _one_line_errors(name, flag):
        return transformers.AutoTokenizer.from_pretrained(name, trust_remote_code=trust_remote_code)


def require_same_tokenizer(ref: str | None, model: str, tokenizer, trust_remote_code: bool) -> None:
    """BadInput if a reference is named that is no policy, or whose vocabulary is not that of the model's tokenizer."""
    if ref:
        same = load_tokenizer(ref, trust_remote_code, "--ref").get_vocab() == tokenizer.get_vocab()
        require(same, f"--ref {ref}: its tokenizer is not the one of --model {model}")
        require_kind(ref, False, trust_remote_code, "--ref")


def require_kind(name: str, reward: bool, trust_remote_code: bool, flag: str) -> None:
    """BadInput unless the config of a model is that of a reward model, or, without `reward`, of a policy."""
    found = is_reward_model(name, trust_remote_code, flag)
    wanted = f"{flag} {name}: not a reward model (its config names no sequence classifier): train one with train_rm.py"
    require(found or not reward, wanted)
    require(reward or not found, f"{flag} {name}: a reward model, where a causal language model is wanted")


def load_model(name: str, device: str, trust_remote_code: bool = False, flag: str = "--model"):
    """The causal language model of a run directory, a local folder or a hub id; weights in float32, dropout off.

    A folder of adapters (`add_lora`) is loaded as the model that they were trained on with the adapters merged into it.
    BadInput, in one line, if there is no such model, it is not a causal language model, or weights of it are missing.
    """
    require_kind(name, False, trust_remote_code, flag)
    if base := base_of_adapters(name):
        model = load_model(base, "cpu", trust_remote_code, f"{flag} {name}: its base model")
        model = _with_adapters(model, name, flag)
    else:
        model = _load(transformers.AutoModelForCausalLM, name, trust_remote_code, flag, "causal language model")
    return without_dropout(model).to(device)


def load_config(name: str, trust_remote_code: bool = False, flag: str = "--model"):
    """The config of a run directory, local folder or hub id; of adapters, that of the model below them."""
    while base := base_of_adapters(name):
        name, flag = base, f"{flag} {name}: its base model"
    with _one_line_errors(name, flag):
        return transformers.AutoConfig.from_pretrained(name, trust_remote_code=trust_remote_code)


def is_reward_model(name: str, trust_remote_code: bool = False, flag: str = "--model") -> bool:
    """Whether the config of a run directory, local folder or hub id names a sequence classifier."""
    while base := base_of_adapters(name):
        if _adapter_config(name).get("task_type") == "SEQ_CLS":
            return True
        name, flag = base, f"{flag} {name}: its base model"
    architectures = load_config(name, trust_remote_code, flag).architectures or ()
    return any(kind.endswith("ForSequenceClassification") for kind in architectures)


def load_reward_model(name: str, device: str, trust_remote_code: bool = False, flag: str = "--reward"):
    """The reward model of a run directory, a local folder or a hub id: a sequence classifier with one label, weights
    in float32, dropout off. BadInput, in one line, for anything else.

    A folder of adapters (`add_lora`) is loaded as the model that they were trained on, a policy or a reward model, with
    the adapters merged into it and their head.
    """
    require_kind(name, True, trust_remote_code, flag)
    if base := base_of_adapters(name):
        of_base = f"{flag} {name}: its base model"
        if is_reward_model(base, trust_remote_code, of_base):
            model = load_reward_model(base, "cpu", trust_remote_code, of_base)
        else:
            policy = load_model(base, "cpu", trust_remote_code, of_base)
            with torch.random.fork_rng([]):  # the new head's values are replaced by the stored ones
                torch.manual_seed(0)
                model = new_reward_model(policy, load_tokenizer(name, trust_remote_code, flag))
        model = _with_adapters(model, name, flag)
    else:
        model = _load(transformers.AutoModelForSequenceClassification, name, trust_remote_code, flag, "reward model")
    require(model.config.pad_token_id is not None, f"{flag} {name}: no reward model: its config has no pad id")
    require(
        model.config.num_labels == 1 and isinstance(getattr(model, "score", None), torch.nn.Linear),
        f"{flag} {name}: no reward model: it has {model.config.num_labels} labels, or a head that is no linear score",
    )
    return without_dropout(model).to(device)


def new_reward_model(policy, tokenizer):
    """A reward model made of the policy's own backbone and a new head w ~ N(0, 1 / sqrt(d + 1)) without bias.

    The deviation is that of Stiennon et al. 2020 (arXiv 2009.01325), so that first scores have a deviation of about 1.
    The library's classifier reads the last token that is not its pad id, so the pad id must not be the EOS id. If it
    is, the tokenizer's pad token becomes its BOS token, or a new one. Consumes the global random state.
    BadInput if transformers has no such class for the architecture.
    """
    set_attention(policy, packed=False)
    if tokenizer.pad_token_id in (None, tokenizer.eos_token_id):
        if tokenizer.bos_token_id not in (None, tokenizer.eos_token_id):
            tokenizer.pad_token = tokenizer.bos_token
        else:
            tokenizer.add_special_tokens({"pad_token": "<|pad|>"})
    if tokenizer.pad_token_id >= policy.get_input_embeddings().num_embeddings:
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
    model.score, model.name_or_path = head.to(policy.device), policy.name_or_path
    return without_dropout(model)


def backbone(model):
    """The part of a model that gives hidden states. A few classes (Llama 4's) name another one as their base."""
    return model.model if model.base_model is model and hasattr(model, "model") else model.base_model


def has_reward_head(model) -> bool:
    """Whether a loaded model is a reward model or a critic, and not a policy."""
    return hasattr(model, "score")


def digest(model) -> str:
    """SHA-256 of all that a model computes with: its config, what ends its answers, and all weights, by name. Of
    several processes that share the model all must call this."""
    config = model.config.to_dict() | {"dtype": None, "_name_or_path": None, "transformers_version": None}
    ends = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    digest = hashlib.sha256(f"{config}{ends}".encode())
    for name, value in sorted(model.state_dict().items()):
        value = full_tensor(value)
        digest.update(f"{name} {tuple(value.shape)} {value.dtype}".encode())
        digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def save(
    model, tokenizer, out: Path, lora=None, merge: bool = False, low_bits: LowBits | None = None, dtype: str = "float32"
) -> None:
    """Write weights (safetensors), config and tokenizer as `from_pretrained` reads them.

    With `add_lora`'s handle only the adapters and a reward model's head are written, and loading them needs the model
    that they were trained on; with `merge` the model is written, with the adapters merged into its weights. Of a
    bfloat16 model the float32 masters are written, or with dtype "bfloat16" its own weights; for the masters it moves
    to the CPU.
    """
    if dtype == "bfloat16":
        model.to(torch.bfloat16)
    elif model.dtype == torch.bfloat16:
        for weight in model.parameters():
            if lora and not merge and not weight.requires_grad:  # not written
                continue
            low = (low_bits or {}).get(weight)
            weight.data = weight.data.cpu().float() if low is None else join(weight.data.cpu(), low.cpu())
    try:
        if lora and not merge:
            _save_adapters(model, lora, out)
        else:
            (lora.merge_and_unload() if lora else model).save_pretrained(out)
        tokenizer.save_pretrained(out)
    except SafetensorError as error:
        raise OSError(f"the model cannot be written to {out} ({error})") from None


def _save_adapters(model, lora, out: Path) -> None:
    """Write adapters, and a reward model's head, mean and deviation, as peft and transformers read them. A base model
    in a folder is named by its absolute path, so that it is found from any working directory."""
    config, base = copy.copy(lora.peft_config["default"]), model.name_or_path
    config.base_model_name_or_path = os.path.abspath(base) if os.path.isdir(base) else base
    config.inference_mode = True
    weights = peft.get_peft_model_state_dict(model, save_embedding_layers=False)
    out.mkdir(parents=True, exist_ok=True)
    if has_reward_head(model):
        config.modules_to_save = ["score"]
        weights["score.weight"] = model.score.weight
        defaults = {"reward_mean": 0.0, "reward_std": 1.0}
        scale = {name: getattr(model.config, name, default) for name, default in defaults.items()}
        (out / "reward.json").write_text(json.dumps(scale))
    weights = {IN_PEFT + name: weight.detach().contiguous() for name, weight in weights.items()}
    save_file(weights, out / "adapter_model.safetensors", {"format": "pt"})
    config.save_pretrained(out)


def _with_adapters(model, name: str, flag: str):
    """The model with the adapters in a folder merged into its weights; a head that they come with replaces its own.
    Draws nothing from the global random state."""
    folder = Path(name)
    with _one_line_errors(name, flag, "set of adapters"):
        config = peft.PeftConfig.from_pretrained(str(folder))
        require(config.peft_type == "LORA", f"{flag} {name}: adapters of kind {config.peft_type}, where LORA is wanted")
        config.inference_mode = False
        with torch.random.fork_rng([]):  # values that the stored ones replace
            lora = peft.LoraModel(model, {"default": config}, "default")
        weights = load_file(folder / "adapter_model.safetensors")
        weights = {key.removeprefix(IN_PEFT): weight for key, weight in weights.items()}
        keys = peft.set_peft_model_state_dict(model, weights)
    wanted = {name for name, weight in model.named_parameters() if weight.requires_grad}
    _require_all_weights(f"{flag} {name}", wanted & {*keys.missing_keys}, keys.unexpected_keys)
    model = lora.merge_and_unload().requires_grad_(True)
    _require_finite_weights(f"{flag} {name}", model)
    model.name_or_path = name  # further adapters record it as their base model
    if (folder / "reward.json").exists():
        vars(model.config).update(read_json(folder / "reward.json"))
    return model


def _load(auto_class: type, name: str, trust_remote_code: bool, flag: str, kind: str):
    """The model in float32. BadInput if it cannot be read, or if the class would give weights of it random values."""
    with _one_line_errors(name, flag, kind):
        model, info = auto_class.from_pretrained(
            name,
            dtype=torch.float32,
            trust_remote_code=trust_remote_code,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # they are refused below, by name
        )
    other = [f"{key} {[*stored]} for {[*wanted]}" for key, stored, wanted in info["mismatched_keys"]]
    require(not other, f"{flag} {name}: no {kind}: weights have other shapes than its config says: {_few(other)}")
    _require_all_weights(f"{flag} {name}", info["missing_keys"], info["unexpected_keys"], kind)
    _require_finite_weights(f"{flag} {name}", model)
    return model


def _require_finite_weights(source: str, model) -> None:
    """BadInput, naming them, if weights are NaN or infinite. A sum needs no memory; a finite one says that all are."""
    bad = [name for name, w in model.named_parameters() if not (w.sum().isfinite() or w.isfinite().all())]
    require(not bad, f"{source}: weights are NaN or infinite: {_few(bad)}: use another checkpoint of it")


def _require_all_weights(source: str, missing, unexpected, kind: str = "set of adapters") -> None:
    """BadInput, naming them, if weights are missing; a printed line if there are only some that nothing reads."""
    unread = f"weights that no part of the model reads: {_few(unexpected)}" if unexpected else ""
    also = f"; it has {unread}" if unread else ""
    require(not missing, f"{source}: no {kind}: its weights lack {_few(missing)}{also}")
    if unread:
        print(f"{source}: has {unread}; they are left out")


def _few(keys) -> str:
    """The first three of these names, in order, and how many more there are."""
    names = sorted(keys)
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def base_of_adapters(name: str) -> str | None:
    """The model that the adapters in a folder were trained on; None if the folder has none. BadInput if no model is
    named."""
    config = _adapter_config(name)
    if config is None:
        return None
    base = config.get("base_model_name_or_path")
    require(isinstance(base, str), f"{name}/adapter_config.json names no model that the adapters were trained on")
    return base


def _adapter_config(name: str) -> dict | None:
    """What a folder's adapter_config.json says; None if it has none."""
    path = Path(name) / "adapter_config.json"
    return read_json(path) if path.is_file() else None


@contextmanager
def _one_line_errors(name: str, flag: str, kind: str = "causal language model") -> Iterator[None]:
    """Turn what the library says about a model that it cannot load into one line."""
    path = Path(name)
    if not path.is_dir():
        if path.exists() or not may_be_hub_id(name):
            raise BadInput(f"{flag} {name}: no such folder")
        answer_at_once_offline()
    try:
        yield
    except BadInput:
        raise
    except Exception as error:  # damaged files raise almost anything
        reason = one_line(error)
        if isinstance(error, pickle.UnpicklingError):  # whose message advises to execute what is in the file
            reason = "its .bin file is damaged, or holds more than weights"
        if os.path.isdir(name):
            raise BadInput(f"{flag} {name}: the folder has no {kind}: {reason}") from None
        raise BadInput(
            f"{flag} {name}: not a local folder, and the model hub did not give it; without network, download it "
            f"elsewhere with `hf download {name} --local-dir DIR` and use {flag} DIR ({reason})"
        ) from None


# -------------------------------------------------------------------------------------------- dropout, adapters, layers


def without_dropout(model):
    """The model in eval mode, with every dropout probability 0 in either mode."""
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        for field, value in [*vars(module).items()]:  # probabilities kept as plain numbers, and routers' noise
            if isinstance(value, float) and ("drop" in field or "jitter" in field):
                setattr(module, field, 0.0)
    return model.eval()


def add_lora(model, rank: int, seed: int = 0):
    """Freeze the model and put low-rank adapters into it, in place; returns peft's handle on them.

        W x  becomes  W x + 2 B A x,   A [rank, in] random, B [out, rank] 0    (Hu et al. 2021, Eq. 3, arXiv 2106.09685)

    Every linear layer gets one except the output head (in a mixture, those experts that are such layers); a reward
    model's head is trained whole. At first the model computes what it did before, and inside `without_lora` a policy
    always does, so the reference needs no weights of its own. Of several processes that share the model each has all of
    the adapters. Seeds the global random state. BadInput if peft has no adapters for the model's architecture.
    """
    torch.manual_seed(seed)
    task = "SEQ_CLS" if has_reward_head(model) else "CAUSAL_LM"
    config = peft.LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type=task)
    try:
        with warnings.catch_warnings(action="ignore"):  # that GPT-2 stores its matrices transposed
            lora = peft.LoraModel(model, {"default": config}, "default")
    except ValueError as error:
        problem = f"--lora-rank: peft puts no adapters into {model.config.model_type} models: leave it out"
        raise BadInput(f"{problem} ({one_line(error)})") from None
    for weight in model.parameters():
        if weight.requires_grad:
            weight.data = weight.data.float()
    if has_reward_head(model):
        model.score.requires_grad_(True)
    return lora


def on_meta(config, reward: bool = False, trust_remote_code: bool = False):
    """The model of a config, without weights."""
    auto = transformers.AutoModelForSequenceClassification if reward else transformers.AutoModelForCausalLM
    with torch.device("meta"):
        model = auto.from_config(config, dtype=torch.float32, trust_remote_code=trust_remote_code)
    return without_dropout(model)


def require_adaptable(name: str, trust_remote_code: bool) -> None:
    """BadInput if `add_lora` refuses the model of a run directory, local folder or hub id. No weights are loaded."""
    config = load_config(name, trust_remote_code)
    with _one_line_errors(name, "--model"):
        model = on_meta(config, is_reward_model(name, trust_remote_code), trust_remote_code)
    add_lora(model, 1)


@contextmanager
def without_lora(model):
    """Switch the adapters of `add_lora`, if there are any, off inside. BadInput if peft's layers have another switch
    than the one that is used here."""
    adapted = [module for module in model.modules() if "_disable_adapters" in vars(module)]
    require(
        bool(adapted) or not any("lora_" in name for name, _ in model.named_parameters()),
        f"--lora-rank: without_lora in support/models.py cannot switch off the adapters of peft {peft.__version__}",
    )
    for module in adapted:
        module._disable_adapters = True
    try:
        yield model
    finally:
        for module in adapted:
            module._disable_adapters = False


def to_bfloat16(model, device: str, seed: int | None = None) -> LowBits:
    """Move the model to `device` with its matrices in bfloat16, one by one, so that the device never holds a float32
    copy. Returns the low bits of the matrices' float32 masters (rlhf/optim.py) if there is a seed, else nothing: a
    model that is not trained needs none.

    Matrices, and biases beside them, are what `torch.autocast` would cast in every pass. Norms and a reward model's
    head stay float32. Low bits that are all 0 are dithered.
    """
    low_bits: LowBits = {}
    names = {weight: name for name, weight in model.named_parameters()}
    for module in model.modules():
        weights = [*module.parameters(recurse=False)]
        if module is getattr(model, "score", None) or not any(weight.ndim > 1 for weight in weights):
            continue
        for weight in weights:
            if weight.dtype != torch.float32:  # done before, as a weight of another module
                continue
            weight.data, low = split(weight.data.to(device).contiguous())
            if seed is not None and weight.requires_grad:
                low_bits[weight] = low if low.any() else dither(weight.data, names[weight], seed)
    model.to(device)
    return low_bits


def dither_masters(model, seed: int) -> None:
    """Dither float32 weights that lie on the grid of bfloat16, in place, for processes that gather them in bfloat16."""
    for name, weight in model.named_parameters():
        high, low = split(weight.data.contiguous())
        if not low.any() and not name.startswith("score."):
            weight.data = join(high, dither(high, name, seed))


def raise_embeddings(model) -> None:
    """From now on the embeddings give float32, so that the residual stream is float32 whatever the weights are."""
    model.get_input_embeddings().register_forward_hook(lambda module, inputs, states: states.float())


def adamw(model, low_bits: LowBits, a: Any, **settings: float):
    """AdamW of the weights that are trained: torch's own, or rlhf/optim.py's for bfloat16 weights and 8-bit moments."""
    eight_bits = a.optimizer_state == "8bit"
    if low_bits or eight_bits:
        settings |= {"gradient_dtype": DTYPES[a.gradient_dtype], "eight_bits": eight_bits}
        return AdamW(model.parameters(), low_bits, **settings)
    return torch.optim.AdamW(model.parameters(), fused=True, **settings)


def prepare_training(model, low_bits: LowBits, a: Any, lora_rank: int = 0):
    """Apply the flags --lora-rank, --gradient-checkpointing and --compile; returns the handle on the adapters, whose
    low bits join `low_bits`."""
    lora = add_lora(model, lora_rank, a.seed) if lora_rank else None
    if lora and a.dtype == "bfloat16" and not several():
        low_bits |= to_bfloat16(model, str(model.device), a.seed)
    if a.gradient_checkpointing:
        checkpoint_layers(model)
    if a.compile:
        compile_layers(model)
    return lora


def trained(model, low_bits: LowBits | None = None) -> dict[str, Tensor]:
    """The part of the model's state that is trained: everything, or with `add_lora` the adapters and a reward model's
    head. For bfloat16 weights these are their float32 masters, on the CPU."""
    weights = dict(model.named_parameters(remove_duplicate=False))
    frozen = {name for name, weight in weights.items() if not weight.requires_grad}
    state = {name: x for name, x in model.state_dict().items() if name not in frozen}
    masters = {weight: join(weight.data.cpu(), low.cpu()) for weight, low in (low_bits or {}).items()}
    return {name: masters.get(weights.get(name), x) for name, x in state.items()}


def restore(model, low_bits: LowBits, state: dict[str, Tensor]) -> None:
    """Take over what `trained` gave."""
    weights = dict(model.named_parameters(remove_duplicate=False))
    for name, x in state.items():
        low = low_bits.get(weights.get(name))
        if low is not None:
            state[name], low[...] = split(x.to(low.device))
    try:
        model.load_state_dict(state, strict=all(weight.requires_grad for weight in weights.values()))
    except RuntimeError as error:
        raise BadInput(f"--resume: the checkpoint is of another model ({one_line(error)})") from None


def layers(model) -> list[torch.nn.Module]:
    """The model's layers, as its class names them for the library (FSDP puts its own name before theirs)."""
    names = model._no_split_modules or ()
    return [module for module in model.modules() if type(module).__name__.removeprefix("FSDP") in names]


def checkpoint_layers(model) -> None:
    """From now on recompute each layer's activations in the backward pass instead of keeping them.

    The recomputation uses the attention that the forward pass had, even if `set_attention` was called in between. A
    copy of the model needs a call of its own.
    BadInput if the library's model has no layers that can do that.
    """

    def contexts() -> tuple[AbstractContextManager, AbstractContextManager]:
        return nullcontext(), Attention(model, model.config._attn_implementation)

    kind = model.config.model_type
    able = any(isinstance(module, modeling_layers.GradientCheckpointingLayer) for module in model.modules())
    require(able, f"--gradient-checkpointing: not possible with {kind} models")
    enable = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)  # its newer name
    enable({"use_reentrant": False, "context_fn": contexts, "preserve_rng_state": False})  # nothing in them is random
    model.disable_input_require_grads()  # only a reentrant checkpoint needs them, and --compile makes a graph for them


def checkpointed_layers(model) -> list[torch.nn.Module]:
    """The layers that `checkpoint_layers` switched. They recompute in train mode only."""
    kind = modeling_layers.GradientCheckpointingLayer
    return [module for module in model.modules() if isinstance(module, kind) and module.gradient_checkpointing]


def compile_layers(model) -> None:
    """From now on run the layers compiled (torch.compile), under the same weight names.

    All lengths and all layers with the same attention window share a graph; batches of a single row, and trees without
    a shared prompt, have their own. The attention over packed trees is part of it in half precision on CUDA; elsewhere
    it stays eager and cuts a layer into five graphs. After `checkpoint_layers` the recomputed function is compiled, and
    the checkpoint around it stays eager. Results differ by rounding. In this process it becomes an error if a function
    needs more than 64 graphs: by default torch goes on uncompiled after 8.
    BadInput if the library does not name the model's layers.
    """
    regions = layers(model)
    require(bool(regions), f"--compile: the library names no layers of {model.config.model_type} models")
    torch._dynamo.config.recompile_limit, torch._dynamo.config.fail_on_recompile_limit_hit = 64, True
    torch.fx.experimental._config.use_duck_shape = False  # else a batch as long as the model is wide fixes its length
    for layer in regions:
        layer.compile(dynamic=True)
        if getattr(layer, "gradient_checkpointing", False):
            layer._gradient_checkpointing_func = _compiled_inside(layer._gradient_checkpointing_func)
    set_attention(model, packed=False)
    if model.config._attn_implementation == "sdpa":
        attention, masks = transformers.AttentionInterface(), transformers.AttentionMaskInterface()
        attention.register(MASKED, attention["sdpa"])
        masks.register(MASKED, functools.partial(_mask_of_several_rows, masks["sdpa"]))
        model.set_attn_implementation(MASKED)


def _mask_of_several_rows(make_mask: Callable, *, batch_size: int, allow_is_causal_skip: bool = True, **kwargs):
    """The library's mask, but for several rows without padding too. The library leaves it out, which is a new graph."""
    skip = allow_is_causal_skip and batch_size == 1
    return make_mask(batch_size=batch_size, allow_is_causal_skip=skip, **kwargs)


def _compiled_inside(checkpoint: Callable) -> Callable:
    """A checkpoint function that stays eager itself and compiles the function that it runs and recomputes."""
    run = torch.compile(lambda function, *args: function(*args), dynamic=True)
    return torch.compiler.disable(lambda function, *args: checkpoint(run, function, *args))


def compiled(model) -> bool:
    """Whether `compile_layers` has compiled the model."""
    return any(module._compiled_call_impl is not None for module in model.modules())


def eager(model) -> AbstractContextManager:
    """Run what `compile_layers` compiled uncompiled inside: lengths of caches and prompts would bring new graphs."""
    return torch.compiler.set_stance("force_eager") if compiled(model) else nullcontext()


# ------------------------------------------------------------------------------------------- attention, positions, head


def set_attention(model, packed: bool) -> None:
    """Set the model's attention for packed trees (a batch with `segments`), or back to its own for plain rows.

    Whoever computes hidden states calls this with what the batch is, so no caller has to remember it. The setting
    stays: a backward pass may still need it. Generation needs the model's own attention.

    For a model on CUDA it also switches cuDNN's attention off in the whole process: cuDNN builds a plan for each new
    shape, which took 0.28 s in the forward pass of a model of 24 layers on an H200.
    """
    if model.device.type == "cuda":
        torch.backends.cuda.enable_cudnn_sdp(False)
    current = model.config._attn_implementation
    plain = bytes.fromhex(current.removeprefix(PACKED)).decode() if current.startswith(PACKED) else current
    name = PACKED + plain.encode().hex() if packed else plain  # in hex, since the library reads words such as "flash"
    if name == current:
        return
    if packed:
        transformers.AttentionInterface.register(name, _partly_compiled(tree_attention))
    model.set_attn_implementation(name)


class Attention:
    """Set the attention of this name inside, and the current one again afterwards; may be entered several times."""

    def __init__(self, model, name: str):
        self.model, self.name = model, name

    def __enter__(self) -> None:
        self.before = self.model.config._attn_implementation
        if self.before != self.name:
            self.model.set_attn_implementation(self.name)

    def __exit__(self, *_) -> None:
        if self.before != self.name:
            self.model.set_attn_implementation(self.before)


@functools.cache
def _partly_compiled(attention: Callable) -> Callable:
    """An attention over trees of which torch.compile traces the flash call only, since the number of buckets varies;
    and not that of a GPT-2 whose layers have scales of their own, because each scale would be a graph."""
    eager = uncompiled(attention)

    @no_type_check  # it may be compiled
    def choose(module, query, *args, **kwargs):
        traced = takes_flash(query) and not getattr(module, "scale_attn_by_inverse_layer_idx", False)
        return (attention if traced else eager)(module, query, *args, **kwargs)

    return choose


@functools.cache
def uncompiled(function: Callable) -> Callable:
    """The function, which torch.compile does not trace. (A decorator would load torch.compile on import.)"""
    return torch.compiler.disable(function)


def pad_id(tokenizer) -> int:
    """The id that fills padded rows. It may equal EOS: masks come from lengths, never from ids."""
    return next((i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id) if i is not None), 0)


def positions(model) -> int | None:
    """The number of positions that the model learnt one by one and cannot exceed; None if it computes positions."""
    learnt = ("wpe", "embed_positions", "position_embeddings")
    names = [name.split(".")[-1] for name, module in model.named_modules() if isinstance(module, torch.nn.Embedding)]
    return model.config.max_position_embeddings if any(name in learnt for name in names) else None


def output_head(model) -> Head:
    """The output layer as the log-prob kernel wants it; each family's config has its own names for scale and cap."""
    config, layer = model.config.get_text_config(), model.get_output_embeddings()
    scale = getattr(config, "logit_scale", None) or getattr(config, "lm_head_multiplier", None) or 1.0
    scale = scale / (getattr(config, "logits_scaling", None) or 1.0)
    return Head(layer.weight, getattr(layer, "bias", None), scale, getattr(config, "final_logit_softcapping", None))
