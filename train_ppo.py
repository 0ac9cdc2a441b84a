"""PPO, phase 3: let the policy answer, score the answers with a reward model, and make the better ones likelier.

    python train_ppo.py                                          the embedded task; makes its SFT and reward model first
    python train_ppo.py --model runs/sft --reward runs/rm --data prompts.jsonl
    python train_ppo.py --advantage rloo --out runs/rloo         without a critic

The reward model stands in for people only where it has seen text like what they judged. So the policy pays for every
nat by which it leaves its SFT predecessor, the reference (Ouyang et al. 2022, Eq. 2, arXiv 2203.02155):

    maximise  E_{x, y ~ pi} [ R(x, y) - kl_coef * log(pi(y|x) / ref(y|x)) ]

Each step is a rollout: k answers to each of p prompts; their scores; what each token gets for it (advantages: by a
critic and GAE, or by comparing the k answers); then a few epochs of clipped policy gradient on them (Schulman et al.
2017, Eq. 7, arXiv 1707.06347). In order: data, models, the loop, before and after.
"""

import json
import math
import random
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
from einops import rearrange
from torch import Tensor

import train_rm
import train_sft
from rlhf import BadInput, advantages, losses, models, parallel, require, reviews
from rlhf.data import Example, build, held_out, longest, prompt_of, read_rows, show
from rlhf.generate import answer, cached_logps, end_ids, facts, generate
from rlhf.logprobs import Head, token_kl, token_logps
from rlhf.parallel import micro_batches, shares
from rlhf.rewards import load_reward
from rlhf.runs import before_and_after, check, cli, figure, table
from rlhf.tree import Batch, collate

# --------------------------------------------------------------------------------------------------------------- flags

COUNTS = {  # what a minibatch's sum over tokens is divided by; "responses": each response's own mean first
    "gae": "tokens",
    "reinforce++": "tokens",
    "rloo": "sequences",
    "remax": "sequences",
    "grpo": "responses",
    "drgrpo": "constant",
}
REVIEWS = 24_000  # prompts of the embedded task
ROUNDING = 1e-5  # of a log-prob (of 1 nat at least): how far it may be from itself in another grouping of the rows,
# at up to 10 M parameters, and as their root beyond: 5e-7 was seen at 0.4 M, 7e-6 at 135 M with rows of 480 tokens
DEFAULTS = {  # of flags that are None: for any model, and for the embedded task's small one
    "any": {"lr": 1e-6, "critic_lr": 5e-6, "kl_coef": 0.05, "batch_size": 64, "max_steps": 200, "eval_prompts": 16},
    "reviews": {"lr": 3e-4, "critic_lr": 1e-3, "kl_coef": 0.5, "batch_size": 64, "max_steps": 60, "eval_prompts": 512},
}
PANELS = {  # of curves.png
    "score and what is left of it after the KL": ["objective/scores", "objective/rlhf_reward"],
    "KL to the reference, nats an answer": ["objective/kl"],
    "gold reward": ["objective/gold"],
    "entropy, nats a token": ["objective/entropy"],
    "policy: approximate KL of the step, share clipped": ["policy/approxkl", "policy/clipfrac"],
    "critic: explained variance": ["val/explained_variance"],
    "length, tokens": ["length"],
    "gradient norm": ["grad_norm"],
    "KL coefficient": ["kl_coef"],
}


@dataclass
class Args:
    model: str = "runs/sft"
    """starting weights: a run directory, a local folder or a hub id; runs/sft is made first where it is missing"""
    ref: str | None = None
    """reference model (frozen), same tokenizer; default: the starting weights"""
    reward: str = "runs/rm"
    """a reward model's directory (runs/rm is made first where it is missing), gold (embedded task), or
    module:function(prompts, responses, rows) -> floats, for rewards that can be verified"""
    data: str = "reviews"
    """prompts: reviews (embedded), a .jsonl/.json/.csv/.parquet file (also .gz), a save_to_disk folder or a hub id"""
    split: str | None = None
    """split of a hub data set; default train"""
    eval_fraction: float = 0.1
    """share of prompts held out, by hash of their text, in [0, 1)"""
    skip_bad_rows: bool = False
    """drop and count rows that cannot be used instead of stopping at the first"""
    out: str = "runs/ppo"
    """run directory; one that is in use is never overwritten"""

    advantage: Literal[(*COUNTS,)] = "gae"
    """gae: PPO's, with a critic; the others compare the answers to a prompt (rloo, grpo, drgrpo), or take the batch's
    mean (reinforce++) or the greedy answer (remax) for a baseline, and have none"""
    k: int = 4
    """answers to each prompt, >= 1; rloo, grpo and drgrpo need 2 or more"""
    temperature: float = 1.0
    """of the sampling, and of every log-prob of policy and reference, > 0"""
    kl_coef: float | None = None
    """reward that a nat of KL costs, >= 0; default 0.05 (embedded: 0.5)"""
    kl_estimator: Literal["k1", "k2", "k3", "exact"] = "k1"
    """of the KL at each token (rlhf/advantages.py); in the reward only k1 gives the exact gradient"""
    kl_in: Literal["reward", "loss"] = "reward"
    """whether the KL is taken off each token's reward, or added to the loss (as GRPO does, with k3)"""
    kl_target: float | None = None
    """nats an answer: an adaptive kl_coef steers towards it (Ziegler et al. 2019), > 0; default: kl_coef is fixed"""
    kl_horizon: float = 0.25
    """with --kl-target: share of the run's answers in which the coefficient can change by about e^0.2, in (0, 1]"""
    kl_stop: float | None = None
    """end a rollout's epochs when the policy's approximate KL from the one that sampled exceeds this, nats a token"""
    gamma: float = 1.0
    """gae: discount per token, in [0, 1]; 1, since an answer is one decision"""
    lam: float = 0.95
    """gae: 1 is unbiased, lower trusts the critic more, in [0, 1]"""
    whiten_advantages: bool = True
    """gae: mean 0 and deviation 1 over the rollout; keeps the step size whatever the scale of the reward"""
    whiten_rewards: Literal["no", "scale", "shift"] = "no"
    """gae: divide the tokens' rewards by their deviation; shift takes off their mean too; both change the objective"""
    missing_eos: Literal["no", "replace", "subtract"] = "no"
    """score of an answer that was cut: as it is, replaced by --missing-eos-value, or less that value"""
    missing_eos_value: float = -1.0
    """see --missing-eos; in reward"""
    clip_range: float = 0.2
    """a token's ratio to the policy that sampled it has no gradient beyond 1 -+ this, > 0"""
    value_clip: float | None = 0.2
    """change of the critic since the rollout beyond which its error has no gradient, > 0, in reward; None: none"""
    value_init: Literal["reward", "policy", "zero"] = "reward"
    """the critic starts as the reward model (which knows what is good), or as the policy with a new head, or with 0"""
    entropy_coef: float = 0.0
    """bonus for the entropy of each next-token distribution, >= 0"""
    ptx_coef: float = 0.0
    """weight of the SFT loss on --ptx-data in each update, >= 0 (InstructGPT's PPO-ptx; against forgetting)"""
    ptx_data: str = "reviews"
    """rows for --ptx-coef, as train_sft.py takes them"""
    epochs_per_rollout: int = 4
    """passes over the answers of a rollout, >= 1"""
    minibatches: int = 2
    """optimizer steps of each pass, >= 1"""

    lora_rank: int = 0
    """rank of low-rank adapters of the policy that are trained in place of all its weights, >= 0 (0: none); they want a
    learning rate about ten times as high; the reference is then the policy without them; a critic is trained whole"""
    lora_merge: bool = False
    """save the model with the adapters merged into its weights, not the adapters alone"""

    lr: float | None = None
    """learning rate of the policy's AdamW at the start, > 0; falls linearly to 0; default 1e-6 (embedded: 3e-4)"""
    critic_lr: float | None = None
    """that of the critic; default 5 times --lr (embedded: 10/3 times)"""
    adam_eps: float = 1e-5
    """AdamW's epsilon, > 0; with 1e-8 the first updates are several times larger (Huang et al. 2024)"""
    max_grad_norm: float = 1.0
    """gradients with a larger norm are scaled down to it, > 0"""
    batch_size: int | None = None
    """prompts of a rollout, >= 1; default 64"""
    micro_batch_tokens: int = 8192 if torch.cuda.is_available() else 1024
    """tokens of one forward pass, >= 1: bounds memory, does not change the result; default 8192 on a
    machine with CUDA, and 1024 on one without, where more is no faster"""
    max_steps: int | None = None
    """rollouts, >= 1; default 200 (embedded: 60)"""
    max_prompt_length: int = 512
    """tokens of a prompt, >= 1; longer ones lose their beginning"""
    max_new_tokens: int = 128
    """tokens of an answer at most, >= 1"""

    eval_prompts: int | None = None
    """held-out prompts answered before and after, >= 0; default 16 (embedded: 512)"""
    save_every: int = 20
    """rollouts between checkpoints, >= 1"""
    resume: bool = False
    """go on from the last checkpoint in --out, with the same flags; on a CPU the result is the same bit for bit"""
    dry_run: bool = False
    """print the data report and three prompts token by token, and train nothing"""
    wandb: bool = False
    """log to Weights & Biases too"""
    layout: Literal["auto", "tree", "padded"] = "auto"
    """how answers share a forward pass: tree encodes the prompt once; auto takes it where a check says it is right"""
    gradient_checkpointing: bool = False
    """compute the layers' activations a second time in the backward pass: less memory, about a third more time"""
    compile: bool = False
    """torch.compile of the layers, for a GPU: a longer first step, then shorter ones; wants a C++ compiler"""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """of the matrix products; weights (the master copy), optimizer and log-probs are float32 always"""
    device: str = "cuda" if torch.cuda.is_available() else "cpu"
    """torch device"""
    seed: int = 0
    """order of the prompts, sampling, minibatches"""
    trust_remote_code: bool = False
    """run code that comes with a hub model"""


def check_flags(a: Args) -> None:
    """BadInput where an algorithm's flag is outside its range."""
    group = a.advantage in ("rloo", "grpo", "drgrpo")
    require(
        not group or a.k >= 2, f"--advantage {a.advantage} compares the answers to a prompt: --k must be at least 2"
    )
    for name in ("kl_coef", "entropy_coef", "ptx_coef"):
        require(0 <= getattr(a, name) < math.inf, f"--{name.replace('_', '-')} must be at least 0")
    for name in ("kl_target", "kl_stop", "clip_range", "value_clip", "adam_eps", "critic_lr"):
        value = getattr(a, name)
        require(value is None or 0 < value < math.inf, f"--{name.replace('_', '-')} must be above 0, not {value}")
    require(a.kl_coef > 0 or not a.kl_target, "--kl-target: a --kl-coef of 0 stays 0, so start with another")
    for name in ("gamma", "lam"):
        require(0 <= getattr(a, name) <= 1, f"--{name} must be in [0, 1], not {getattr(a, name)}")
    usable = math.isfinite(a.missing_eos_value) and (a.missing_eos != "subtract" or a.missing_eos_value >= 0)
    require(usable, f"--missing-eos-value {a.missing_eos_value}: must be finite, and to be subtracted at least 0")
    require(0 < a.kl_horizon <= 1, f"--kl-horizon must be in (0, 1], not {a.kl_horizon}")
    require(a.epochs_per_rollout >= 1, "--epochs-per-rollout must be at least 1")
    require(1 <= a.minibatches <= a.batch_size, f"--minibatches must be in [1, --batch-size {a.batch_size}]")


# ----------------------------------------------------------------------------------------------------------- objective


@dataclass
class Rollout:
    """p prompts with k answers each: b = p * k sequences, n tokens, laid flat prompt after prompt."""

    examples: list[Example]
    lengths: Tensor  # [b]
    scores: Tensor  # [b], of the reward, the rule for cut answers applied
    logps: Tensor  # [n], of the policy that sampled
    ref_logps: Tensor  # [n]
    values: Tensor | None  # [n], of the critic
    advantages: Tensor  # [n]
    returns: Tensor | None  # [n], what the critic should have said
    layout: str

    def of(self, name: str) -> list[Tensor]:
        """One of the tensors of tokens, prompt by prompt."""
        return [*getattr(self, name).split([sum(map(len, e.responses)) for e in self.examples])]


def judge(a: Args, kl_coef: float, kl: Tensor, scores: Tensor, lengths: Tensor, values, greedy):
    """Advantages and returns [n] of a rollout's tokens, from the KL of each [n] and the score of each answer [b]."""
    rewards = advantages.shape_rewards(kl, scores, lengths, kl_coef if a.kl_in == "reward" else 0.0)
    if a.advantage == "gae":
        if a.whiten_rewards != "no":
            rewards = advantages.whiten(rewards, shift_mean=a.whiten_rewards == "shift")
        found, returns = advantages.gae(rewards, values, lengths, a.gamma, a.lam)
        return advantages.whiten(found) if a.whiten_advantages else found, returns
    if a.advantage == "reinforce++":
        return advantages.reinforce_pp(rewards, lengths), None
    totals = rearrange(advantages.sequence_sums(rewards, lengths), "(p k) -> p k", k=a.k)
    if a.advantage == "remax":
        found = advantages.remax(totals, greedy)
    else:
        found = {"rloo": advantages.rloo, "grpo": advantages.grpo, "drgrpo": advantages.drgrpo}[a.advantage](totals)
    return rearrange(found, "p k -> (p k)").repeat_interleave(lengths), None


def token_weights(a: Args, lengths: Tensor, of_lengths: Tensor) -> Tensor:
    """What the loss of each token [n] counts: 1 / the tokens (or sequences, ...) of a minibatch with these lengths."""
    each = torch.ones(int(of_lengths.sum()), device=of_lengths.device)
    if COUNTS[a.advantage] == "tokens":
        return each / lengths.sum()
    if COUNTS[a.advantage] == "responses":
        each = (1 / of_lengths).repeat_interleave(of_lengths)
    return each / (len(lengths) * (a.max_new_tokens if COUNTS[a.advantage] == "constant" else 1))


# ---------------------------------------------------------------------------------------------------------------- data


def read(a: Args, source: str, tokenizer, kind: str = "prompts") -> list[Example]:
    """The prompts (or for PTX the SFT rows) of a source as token ids; prints what became of its rows."""
    if source == "reviews":
        rows, skipped = reviews.rows(kind, REVIEWS), []
    else:
        rows, skipped = read_rows(source, a.split, a.skip_bad_rows)
    limits = (a.max_prompt_length, a.max_prompt_length + a.max_new_tokens)
    examples, report = build(rows, tokenizer, kind, *limits, a.skip_bad_rows, skipped)
    print(f"{source}\n{report}\n")
    return examples


# ---------------------------------------------------------------------------------------------------------------- main


def main(a: Args) -> dict[str, float]:
    """Trains, and returns the final metrics (docs/metrics.md)."""
    to_make = a.model == train_sft.Args.out and not train_sft.is_made()
    tokenizer = reviews.tokenizer() if to_make else models.load_tokenizer(a.model, a.trust_remote_code)
    embedded = tokenizer.get_vocab() == reviews.tokenizer().get_vocab()  # then gold reward and grammar are known
    defaults = DEFAULTS["reviews" if embedded else "any"]
    if a.lr is not None:  # the critic's rate keeps its ratio to the policy's
        defaults = defaults | {"critic_lr": defaults["critic_lr"] * a.lr / defaults["lr"]}
    a = replace(a, **{name: value for name, value in defaults.items() if getattr(a, name) is None})
    check(a)
    check_flags(a)
    torch.manual_seed(a.seed)
    run = parallel.start(a, __file__)
    require(not (to_make and parallel.several()), f"{a.model} is missing: run train_sft.py first, or name a --model")

    # ------------------------------------------------------------------------------------------------------------ data
    if a.ref and models.load_tokenizer(a.ref, a.trust_remote_code, "--ref").get_vocab() != tokenizer.get_vocab():
        raise BadInput(f"--ref {a.ref}: its tokenizer is not the one of --model {a.model}")
    prompts, held = held_out(list({e.prompt_text: e for e in read(a, a.data, tokenizer)}.values()), a.eval_fraction)
    require(len(prompts) >= a.batch_size, f"--data {a.data}: {len(prompts)} prompts are fewer than --batch-size")
    ptx = read(a, a.ptx_data, tokenizer, "sft") if a.ptx_coef else []
    print(f"{len(prompts)} prompts to train on, {len(held)} held out")
    if a.dry_run:
        print("\n\n".join(show(e, tokenizer) for e in prompts[:3]))
        return {}

    # ----------------------------------------------------------------------------- policy, reference, reward and critic
    if to_make:
        train_sft.make(a.device)
    if a.reward == train_rm.Args.out and not train_sft.is_made(a.reward):
        possible = embedded and not parallel.several()
        require(possible, f"--reward {a.reward}: no reward model is there: train one with train_rm.py first")
        train_rm.make(a.device)
    pad, dtype = models.pad_id(tokenizer), models.DTYPES[a.dtype]

    def load(loader: Callable, name: str, *flag: str):
        return parallel.load(lambda device: loader(name, device, a.trust_remote_code, *flag), a.device, dtype)

    def new_critic(name: str, device: str, trust: bool):
        critic = models.new_reward_model(models.load_model(name, device, trust), models.load_tokenizer(name, trust))
        if a.value_init == "zero":
            torch.nn.init.zeros_(critic.score.weight)
        return critic

    policy = load(models.load_model, a.model)
    reference = policy  # without its adapters
    if a.ref or not a.lora_rank:
        reference = load(models.load_model, a.ref or a.model, "--ref").requires_grad_(False)
    own_reward = Path(a.reward).is_dir()
    if own_reward:
        other = models.load_tokenizer(a.reward, a.trust_remote_code, "--reward")
        own_reward = other.get_vocab() == tokenizer.get_vocab() and other.eos_token_id == tokenizer.eos_token_id
    if own_reward:  # then it scores the very ids that were sampled
        reward = load(models.load_reward_model, a.reward).requires_grad_(False)
    else:
        limits = (a.max_prompt_length, a.max_prompt_length + a.max_new_tokens, a.micro_batch_tokens)
        reward = load_reward(a.reward, a.device, "--reward", a.trust_remote_code, *limits)
    critic = None
    if a.advantage == "gae":
        if a.value_init == "reward":
            require(
                own_reward, "--value-init reward: --reward is no reward model with the policy's tokenizer: use policy"
            )
            critic = load(models.load_reward_model, a.reward)
        else:
            critic = load(new_critic, a.model)
    ends = end_ids(policy, tokenizer)
    own = [(model, pad) for model in {policy: 0, reference: 0}]  # what scores token ids, and the id that pads them
    own += [(model, model.config.pad_token_id) for model in (critic, reward if own_reward else None) if model]
    probes = longest(prompts, a.max_new_tokens, {filler for _, filler in own})
    layouts = {models.choose_layout(model, probes, filler, dtype, a.layout) for model, filler in own}
    layout = "tree" if layouts == {"tree"} else "padded"
    print(f"{a.model}: {policy.num_parameters() / 1e6:.2f} M parameters, {layout} layout, {a.dtype} on {a.device}")

    def score(examples: Sequence[Example]) -> Tensor:
        """Rewards of all responses, [b]."""
        if own_reward:
            own_pad = reward.config.pad_token_id
            found = models.score(reward, examples, layout, own_pad, a.micro_batch_tokens, dtype)
            return torch.cat(found).float().to(a.device)
        asked = [
            (prompt_of(e.row), text, e.row | {"ended": r[-1] in ends})
            for e in examples
            for text, r in zip(e.response_texts, e.responses, strict=True)
        ]
        return torch.tensor(reward(*map(list, zip(*asked, strict=True))), device=a.device)

    def per_token(measure: Callable, examples: Sequence[Example]) -> Tensor:
        return models.per_token(measure, examples, layout, pad, a.micro_batch_tokens, a.device)

    def sample(examples: Sequence[Example], k: int, temperature: float, seed: int) -> list[Example]:
        """k answers to each prompt."""
        ids = generate(policy, tokenizer, [e.prompt for e in examples], a.max_new_tokens, temperature, seed, k=k)
        texts = [tokenizer.decode(x, skip_special_tokens=True) for x in ids]
        places = [slice(i * k, (i + 1) * k) for i in range(len(examples))]
        return [
            replace(e, responses=ids[own], response_texts=texts[own], ranks=[1] * k)
            for e, own in zip(examples, places, strict=True)
        ]

    # -------------------------------------------------------------------------------------------------------- training
    lora = models.add_lora(policy, a.lora_rank, a.seed) if a.lora_rank else None
    if a.gradient_checkpointing:
        for model in filter(None, (policy, critic)):
            models.checkpoint_layers(model)
    if a.compile:
        for model in filter(None, (policy, critic)):
            models.compile_layers(model)
    adam = {"eps": a.adam_eps, "weight_decay": 0.0, "fused": True}
    optimizer = torch.optim.AdamW(policy.parameters(), lr=a.lr, **adam)
    critic_optimizer = torch.optim.AdamW(critic.parameters(), lr=a.critic_lr, **adam) if critic else None
    first, kl_coef, weights = 0, a.kl_coef, None
    if state := parallel.load_checkpoint(run, policy, optimizer, critic=critic, critic_optimizer=critic_optimizer):
        first, kl_coef = state["step"], state["kl_coef"]
        policy.load_state_dict(state["model"], strict=not lora)
        optimizer.load_state_dict(state["optimizer"])
        if critic:
            critic.load_state_dict(state["critic"])
            critic_optimizer.load_state_dict(state["critic_optimizer"])
        del state
    run.start(first, a.max_steps)
    steps_per_epoch = len(prompts) // a.batch_size

    for step in range(first, a.max_steps):
        began = time.perf_counter()
        epoch, place = divmod(step, steps_per_epoch)
        order = random.Random(f"{a.seed} {epoch}").sample(prompts, len(prompts))
        asked = order[place * a.batch_size : (place + 1) * a.batch_size]

        # ------------------------------------------------------------------------ rollout: answers, scores, advantages
        seed = random.Random(f"{a.seed} rollout {step}").getrandbits(60)
        examples = sample(asked, a.k, a.temperature, seed)
        sampled_in = time.perf_counter() - began
        lengths = torch.tensor([len(r) for e in examples for r in e.responses], device=a.device)
        ended = torch.tensor([r[-1] in ends for e in examples for r in e.responses], device=a.device)
        raw = scores = score(examples)
        greedy = None
        if a.missing_eos != "no":
            scores = advantages.missing_eos(raw, ended, a.missing_eos, a.missing_eos_value)
        if a.advantage == "remax":
            greedy = score(sample(asked, 1, 0.0, 0))
        for model in filter(None, (policy, reference, critic)):
            models.use_layout(model, layout)
        logps, entropy = per_token(lambda x: log_probs(policy, a, x, dtype, entropy=True), examples).unbind(1)
        with models.without_lora(reference):
            ref_logps = per_token(lambda x: log_probs(reference, a, x, dtype), examples)
        values = per_token(lambda x: models.values(critic, x, dtype), examples) if critic else None
        k1 = logps - ref_logps
        if a.kl_estimator == "exact":
            kl = per_token(lambda x: exact_kl(a, policy, reference, x, dtype), examples)
        else:
            kl = advantages.kl_estimate(k1, a.kl_estimator)
        found, returns = judge(a, kl_coef, kl, scores, lengths, values, greedy)
        rollout = Rollout(examples, lengths, scores, logps, ref_logps, values, found, returns, layout)

        # ----------------------------------------------------------------------------- epochs of minibatches over them
        rate = 1 - step / a.max_steps
        for group in optimizer.param_groups:
            group["lr"] = a.lr * rate
        for group in critic_optimizer.param_groups if critic else ():
            group["lr"] = a.critic_lr * rate
        parts, norms = [], []
        for passed in range(a.epochs_per_rollout):
            rng = random.Random(f"{a.seed} {step} {passed}")
            shuffled = rng.sample(range(len(examples)), len(examples))
            for i in range(a.minibatches):
                places = shuffled[i :: a.minibatches]
                parts.append(update(a, policy, reference, critic, rollout, places, kl_coef, layout, pad, dtype))
                if ptx:
                    rows = rng.sample(ptx, min(len(places), len(ptx)))
                    parts[-1] |= learn_text(a, policy, rows, layout, pad, dtype)
                if not norms:
                    guard(a, policy, rollout, step, parts[0]["ratio"], pad)
                norms.append(parallel.clip(policy, a.max_grad_norm))
                run.require_finite(step + 1, parts[-1]["loss/policy"], norms[-1], [examples[i] for i in places])
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
                if critic:
                    norm = parallel.clip(critic, a.max_grad_norm)
                    run.require_finite(step + 1, parts[-1]["loss/value"], norm, [examples[i] for i in places])
                    critic_optimizer.step()
                    critic_optimizer.zero_grad(set_to_none=True)
            if a.kl_stop and parts[-1]["policy/approxkl"] > a.kl_stop:
                break

        # ----------------------------------------------- what follows is bookkeeping: metrics, controller, checkpoints
        metrics = {name: sum(part[name] for part in parts) / len(parts) for name in parts[0] if name != "ratio"}
        total_kl = advantages.sequence_sums(k1, lengths).mean().item()
        metrics |= {
            "objective/scores": raw.mean().item(),
            "objective/kl": total_kl,
            "objective/entropy": entropy.mean().item(),
            "objective/rlhf_reward": scores.mean().item() - kl_coef * total_kl,
            "length": lengths.float().mean().item(),
            "ended": ended.float().mean().item(),
            "kl_coef": kl_coef,
            "grad_norm": sum(norms) / len(norms),
            "lr": a.lr * rate,
        }
        if a.k > 1:
            grouped = rearrange(scores, "(p k) -> p k", k=a.k)
            metrics["frac_reward_zero_std"] = (grouped.std(1) < 1e-4).float().mean().item()
        if critic:
            metrics["val/explained_variance"] = advantages.explained_variance(values, returns).item()
        if embedded:
            texts = [f"{e.prompt_text} {text}" for e in examples for text in e.response_texts]
            metrics["objective/gold"] = sum(map(reviews.gold_reward, texts)) / len(texts)
        if a.kl_target:
            answers = float(a.max_steps * len(lengths))
            horizon = max(a.kl_horizon * answers, float(len(lengths)))
            kl_coef = advantages.adaptive_kl_coef(kl_coef, total_kl, a.kl_target, len(lengths), horizon)
        seconds = time.perf_counter() - began
        speed = lengths.sum().item() / seconds
        metrics |= {
            "perf/tokens_per_second": speed,
            "perf/seconds": seconds,
            "perf/sampling_share": sampled_in / seconds,
        }
        run.log(step + 1, metrics)
        run.progress(step + 1, score=metrics["objective/scores"], kl=total_kl, tokens_per_s=speed)
        last = step + 1 == a.max_steps
        if run.interrupted or last or (step + 1) % a.save_every == 0:
            weights = {"model": models.trained(policy), "optimizer": optimizer.state_dict(), "kl_coef": kl_coef}
            if critic:
                weights |= {"critic": critic.state_dict(), "critic_optimizer": critic_optimizer.state_dict()}
            run.save_checkpoint(step + 1, {**weights, "step": step + 1})
        if run.interrupted:
            run.leave(step + 1)
    run.end()

    # ------------------------------------------------------------------------------------------------ before and after
    del optimizer, critic_optimizer, weights
    start = policy if lora else load(models.load_model, a.model) if a.ref else reference
    asked = (held or prompts)[: a.eval_prompts]
    answers, found = {}, {}
    for side, model, adapted in (("before", start, models.without_lora), ("after", policy, nullcontext)):
        with adapted(model):
            answers[side] = answer(model, tokenizer, asked, a.max_new_tokens, a.seed)
            logps = models.score(model, answers[side], layout, pad, a.micro_batch_tokens, dtype)
        with models.without_lora(reference):
            ref_logps = models.score(reference, answers[side], layout, pad, a.micro_batch_tokens, dtype)
        found[side] = facts(answers[side], ends, embedded)
        found[side]["kl"] = [(x - y).item() for x, y in zip(logps, ref_logps, strict=True)]
        found[side]["score"] = score(answers[side]).tolist() if asked else []
    rows, results = before_and_after(found) if asked else ([], {})
    print("\n" + table([f"{len(asked)} answers", "before", "after"], rows))
    if "gain/gold" in results:
        print("gain in gold reward: {gain/gold:.2f} +- {gain/gold_interval:.2f} deviations of before".format(**results))
    texts = [[e.response_texts[0] for e in answers[side]] for side in answers]
    samples = [{"prompt": e.prompt_text, "before": x, "after": y} for e, x, y in zip(asked, *texts, strict=True)]
    for sampled in samples[:4]:
        print(f"\nprompt  {sampled['prompt'][-300:]}\nbefore  {sampled['before']}\nafter   {sampled['after']}")
    policy, lora = parallel.whole(policy, a.device, lora)
    if not policy:  # a process whose work is done: the first writes answers and model
        return results
    run.samples(a.max_steps, samples)
    if lora and a.lora_merge:
        policy, lora = lora.merge_and_unload(), None
    models.save(policy, tokenizer, run.out, lora)
    draw(run.out)
    run.finish(results, PANELS)
    print(
        f"\nThe model is in {run.out}, with curves.png, reward_kl.png and all {len(samples)} answers in samples.jsonl."
    )
    print(f"Next: python evaluate.py --models {a.model} {run.out}")
    return results


@models.as_forward
def log_probs(model, a: Args, batch: Batch, dtype, entropy: bool = False) -> Tensor:
    """Log-probs of the response tokens at the sampling temperature, [n]; with the entropies of their rows, [n 2]."""
    states, head = models.states(model, batch, batch.sources, dtype), models.output_head(model)
    logps, entropies = token_logps(states, head, batch.targets, a.temperature, entropy)
    return torch.stack([logps, entropies], 1) if entropy else logps


@torch.no_grad()
@models.as_forward
def states_and_head(model, batch: Batch, dtype):
    """The hidden states that predict the response tokens, without gradient, and the output head, to be kept."""
    head = models.output_head(model)
    if parallel.several():  # its weight and bias are whole in here only
        head = Head(*(x.clone() if isinstance(x, Tensor) else x for x in head))
    return models.states(model, batch, batch.sources, dtype), head


def exact_kl(a: Args, policy, reference, batch: Batch, dtype) -> Tensor:
    """KL(pi || ref) over the whole vocabulary before each response token, [n], in nats; gradient to the policy."""
    with models.without_lora(reference):
        theirs = states_and_head(reference, batch, dtype)

    @models.as_forward
    def kl(policy):
        mine = models.states(policy, batch, batch.sources, dtype)
        return token_kl(mine, models.output_head(policy), *theirs, a.temperature)

    return kl(policy)


def update(a: Args, policy, reference, critic, rollout: Rollout, places, kl_coef, layout: str, pad: int, dtype):
    """Gradients of one minibatch, the rollout's prompts at these places; returns its metrics."""
    examples = [rollout.examples[i] for i in places]
    names = ["logps", "ref_logps", "advantages", *(["values", "returns"] if critic else [])]
    flat = {name: [own[i] for i in places] for name, own in ((name, rollout.of(name)) for name in names)}
    lengths = torch.tensor([len(r) for e in examples for r in e.responses], device=a.device)
    tokens = float(lengths.sum())
    totals = dict.fromkeys(("loss/policy", "policy/approxkl", "policy/clipfrac", "ratio"), 0.0)
    totals |= {"loss/value": 0.0} if critic else {}
    for model in (policy, reference, critic):
        if model is not None:
            models.use_layout(model, layout)
    for group, counts in shares(examples, a.micro_batch_tokens, layout):  # counts: 1, or of many processes sometimes 0
        batch = collate([examples[i] for i in group], layout, pad, a.device)
        old = {name: torch.cat([x[i] for i in group]) for name, x in flat.items()}
        weights = counts * token_weights(a, lengths, batch.lengths)
        found = log_probs(policy, a, batch, dtype, entropy=a.entropy_coef > 0)
        logps, entropy = found.unbind(1) if a.entropy_coef else (found, None)
        loss = losses.ppo_clip(logps, old["logps"], old["advantages"], a.clip_range)
        if a.entropy_coef:
            loss = loss - a.entropy_coef * entropy
        if a.kl_in == "loss":
            if a.kl_estimator == "exact":
                kl = exact_kl(a, policy, reference, batch, dtype)
            else:
                kl = advantages.kl_estimate(logps - old["ref_logps"], a.kl_estimator)
            loss = loss + kl_coef * kl
        (loss * weights).sum().backward()
        totals["loss/policy"] += (loss.detach() * weights).sum().item()
        moved = counts * (logps - old["logps"]).detach()
        totals["ratio"] = max(totals["ratio"], apart(moved, old["logps"]))
        totals["policy/approxkl"] += advantages.kl_estimate(moved, "k2").sum().item() / tokens
        clipped = losses.clipped(logps, old["logps"], old["advantages"], a.clip_range)
        totals["policy/clipfrac"] += counts * clipped.float().sum().item() / tokens
        if critic:
            values = models.values(critic, batch, dtype)
            error = counts * losses.value_loss(values, old["values"], old["returns"], a.value_clip).sum() / tokens
            error.backward()
            totals["loss/value"] += error.item()
    everywhere = parallel.gather([totals])
    return {name: (max if name == "ratio" else sum)(own[name] for own in everywhere) for name in totals}


def learn_text(a: Args, policy, rows: Sequence[Example], layout: str, pad: int, dtype) -> dict[str, float]:
    """Gradient of --ptx-coef times the mean negative log-likelihood of these rows' tokens, added to the minibatch's."""
    total, tokens = 0.0, train_sft.trained_tokens(rows)
    for group in micro_batches(rows, a.micro_batch_tokens, layout, policy):
        batch = collate([rows[i] for i in group], layout, pad, a.device)
        loss = -models.response_logps(policy, batch, dtype)[1].sum() / tokens
        (a.ptx_coef * loss).backward()
        total += loss.item()
    return {"loss/ptx": sum(parallel.gather([total]))}


def guard(a: Args, policy, rollout: Rollout, step: int, ratio: float, pad: int) -> None:
    """Before a rollout's first update the policy is the one that sampled: scorer, sampler and loss agree on log-probs.

    `ratio` is how far `apart` scorer and update are in the first minibatch. Two answers (after the first step their
    beginnings) are compared with the sampler's own cached, left-padded computation. What would break this: log-probs at
    another temperature, dropout, attention that leaks, a wrong shift, generation settings that warp the distribution.
    """
    e, logps = rollout.examples[0], rollout.of("logps")[0]
    two = [response[: 16 if step else None] for response in e.responses[:2]]
    sampled = torch.cat(cached_logps(policy, [e.prompt] * len(two), two, a.temperature, pad))
    models.use_layout(policy, rollout.layout)
    scored = [own[: len(x)] for own, x in zip(logps.split([*map(len, e.responses)]), two, strict=False)]
    gap = (sampled - torch.cat(scored)).abs().max().item()
    if a.dtype != "float32":
        if step == 0:
            print(f"guard: in {a.dtype} scorer and update differ by {ratio:.3g} nats, sampler and scorer by {gap:.3g}")
        return
    rounding = ROUNDING * max(1.0, policy.num_parameters() / 1e7) ** 0.5
    problem = f"step {step + 1}: before the first update the log-probs of"
    require(ratio < rounding, f"{problem} scorer and update differ by {ratio:.3g} of their size: the scores disagree")
    require(gap < 1e-3, f"{problem} sampler and scorer differ by {gap:.3g} nats: the scores disagree")
    if step == 0 and not a.ref:
        kl = apart(rollout.logps - rollout.ref_logps, rollout.logps)
        require(kl < rounding, f"step 1: policy and reference, its start, differ by {kl:.3g} of their log-probs")


def apart(differences: Tensor, logps: Tensor) -> float:
    """The largest of differences between log-probs, in nats, or as a share of a log-prob that is larger than 1 nat."""
    return (differences.abs() / logps.abs().clamp(min=1)).max().item()


def draw(out: Path) -> None:
    """reward_kl.png: the score of each rollout, and the gold reward where it is known, against its KL."""
    rows = [json.loads(line) for line in open(out / "metrics.jsonl")]
    page = figure.Figure(figsize=(6.4, 4), layout="constrained")
    axes = page.add_subplot(xlabel="KL to the reference, nats an answer", ylabel="mean over a rollout's answers")
    for name, label in (("objective/scores", "score of the reward (proxy)"), ("objective/gold", "gold reward")):
        points = [(row["objective/kl"], row[name]) for row in rows if name in row]
        if points:
            axes.plot(*zip(*points, strict=True), marker=".", linestyle="", label=label)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    page.savefig(out / "reward_kl.png", dpi=120)


if __name__ == "__main__":
    cli(main, Args)
