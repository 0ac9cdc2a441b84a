"""PPO: let the policy answer, score the answers with a reward model, and make the better ones likelier.

    python train_ppo.py                                     the embedded task, film reviews; makes its SFT model and RM
    python train_ppo.py --model runs/my-sft --reward runs/my-rm --data prompts.jsonl --out runs/my-ppo
    python train_ppo.py --advantage rloo --out runs/rloo    without a critic

The reward model is reliable only on text like its training data. So the policy pays for every nat of KL
divergence from the reference, its SFT model (Ouyang et al. 2022, Eq. 2, arXiv 2203.02155):

    maximise  E_{x, y ~ pi} [ R(x, y) - kl_coef * log(pi(y|x) / ref(y|x)) ]

Each step samples a rollout, k answers to each of p prompts, and scores it. A token's advantage is how much better the
answer turned out than expected from a value model (GAE's critic) or from other answers. A few epochs of clipped policy
gradient follow (Schulman et al. 2017, Eq. 7, arXiv 1707.06347). Below: flags, objective, main, one update, the guard.
"""

import random
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from einops import rearrange
from torch import Tensor

import train_rm
import train_sft
from rlhf import advantages, losses, require
from rlhf.tree import collate, send
from support import dryrun, models, report, reviews, runs, scoring, sharding
from support.examples import Example, held_out, load, show, split_of
from support.generate import answer, end_ids
from support.parallel import gather, shares
from support.rewards import load_function, load_reward, names_function, require_texts, score_texts, scores_ids
from support.scoring import Batching

# --------------------------------------------------------------------------------------------------------------- flags

AVERAGES = {  # default of --average with --surrogate token
    "gae": "tokens",
    "reinforce++": "tokens",
    "rloo": "sequences",
    "remax": "sequences",
    "grpo": "responses",
    "drgrpo": "constant",
}
GROUPED = {"rloo": advantages.rloo, "grpo": advantages.grpo, "drgrpo": advantages.drgrpo}  # compare a prompt's answers
ROUNDING = 1e-5  # in float32, how far a log-prob may differ between two batchings, relative to max(1 nat, |log-prob|);
# `scoring.growth` is its factor for larger models. Seen: 5e-7 at 0.4 M parameters, 7e-6 at 135 M (with 480 tokens)
DEFAULTS = {  # for unset flags: any model, or the embedded task's small one
    "any": {"lr": 1e-6, "critic_lr": 5e-6, "kl_coef": 0.05, "max_steps": 200, "eval_prompts": 16},
    "reviews": {"lr": 3e-4, "critic_lr": 1e-3, "kl_coef": 0.5, "max_steps": 60, "eval_prompts": 512},
}


@dataclass
class Args(runs.TrainingFlags):
    ref: str | None = None
    """reference model (frozen), same tokenizer; default: the starting weights"""
    reward: str = "runs/rm"
    """a reward model's directory (embedded task: runs/rm is made first if it is missing), gold (embedded task), or
    module:function(prompts, responses, rows) -> floats, for answers that a program can check"""
    out: str = "runs/ppo"
    advantage: Literal[(*AVERAGES,)] = "gae"
    """gae: PPO's own, with a critic (a value model). The others have no critic: rloo, grpo and drgrpo compare the
    answers to a prompt, reinforce++ subtracts the rollout's mean, and remax the reward of the greedy answer"""
    k: int = 4
    """answers to each prompt, >= 1; rloo, grpo and drgrpo need 2 or more"""
    temperature: float = 1.0
    """temperature at which rollouts are sampled and at which policy and reference score them, > 0"""
    kl_coef: float | None = None
    """reward that a nat of KL costs, >= 0; default 0.05 (embedded: 0.5). With --kl-in loss it multiplies a minibatch's
    KL, averaged as --average says"""
    kl_estimator: Literal["k1", "k2", "k3", "exact"] = "k1"
    """estimator of the KL at each token (rlhf/advantages.py); in the reward, only k1 gives an unbiased gradient; in
    the loss, k1 does nothing on average"""
    kl_in: Literal["reward", "loss"] = "reward"
    """whether the KL is subtracted from each token's reward, or added to the loss (as GRPO does, with k3)"""
    kl_target: float | None = None
    """KL in nats per answer that an adaptive kl_coef steers towards (Ziegler et al. 2019), > 0; default: none"""
    kl_horizon: float = 0.25
    """share of the run's answers over which --kl-target can raise kl_coef by a factor of at most e^0.2, in (0, 1]"""
    kl_stop: float | None = None
    """skip the rest of a rollout's passes once the last minibatch of a pass finds pi further than this from pi_old, the
    policy that sampled (k2, in nats per token), > 0; default: never"""
    gamma: float = 1.0
    """gae: discount per token, in [0, 1]; at 1 the score counts in full at every token"""
    lam: float = 0.95
    """gae: lambda, in [0, 1]; 1 is unbiased, lower values trust the critic more"""
    whiten_advantages: bool = True
    """gae: shift and scale the advantages to mean 0 and deviation 1 over the rollout, so that the step size does not
    depend on the reward's scale"""
    whiten_rewards: Literal["no", "scale", "shift"] = "no"
    """gae: scale gives the token rewards a deviation of 1 and keeps their mean; shift also subtracts the mean; both
    change the objective"""
    missing_eos: Literal["no", "replace", "subtract"] = "no"
    """score of an answer without EOS: kept, replaced by --missing-eos-value, or reduced by that value"""
    missing_eos_value: float = -1.0
    """see --missing-eos; in units of reward"""
    surrogate: Literal["token", "sequence", "cispo"] = "token"
    """token: PPO's, with a ratio pi / pi_old for each token, where pi_old is the policy that sampled; sequence: GSPO's,
    with one ratio for an answer, the geometric mean of its tokens' ratios; cispo: the detached, capped
    ratio times log pi, through which every token keeps a gradient"""
    clip_range: float | None = None
    """how far the ratio may fall below 1 before a token of negative advantage gets no gradient, > 0 (cispo has no such
    bound); default 0.2 (--surrogate sequence: 3e-4)"""
    clip_high: float | None = None
    """how far the ratio may rise above 1, > 0; default: 5 for --surrogate cispo (our choice), else --clip-range if
    that is set, else 0.2 (sequence: 4e-4). DAPO has 0.28, with --clip-range 0.2"""
    average: Literal["tokens", "responses", "sequences", "constant"] | None = None
    """how a minibatch's loss is averaged. tokens: over its tokens (default of gae, reinforce++, --surrogate cispo);
    responses: over the means of its answers (grpo, --surrogate sequence); sequences: over their sums (rloo, remax);
    constant: over their sums / --max-new-tokens (drgrpo)"""
    overlong: Literal["keep", "mask"] = "keep"
    """mask: the policy's loss leaves out answers that were cut at --max-new-tokens; other answers to the prompt are
    still compared with them"""
    sampler_correction: Literal["none", "token", "sequence"] | None = None
    """importance weights of the loss where sampling computes other log-probs than training. token: p_train / p_sampler
    of each token, at most --sampler-cap; sequence: that of the whole answer, or 0 above --sampler-cap. Default:
    sequence in bfloat16, none in float32, in which the two must agree"""
    sampler_cap: float | None = None
    """see --sampler-correction, > 0; default 3 (token: 2)"""
    resample_groups: int = 0
    """rloo, grpo, drgrpo: if the answers to a prompt all score the same, only their KL tells them apart. They are
    replaced by answers to the next prompts in the epoch's order, in at most this many more rounds, >= 0"""
    value_clip: float | None = 0.2
    """in units of reward, > 0: a value that has moved further than this towards its target gets no gradient; None: no
    clipping"""
    value_init: Literal["reward", "policy", "zero"] = "reward"
    """the critic starts as the reward model, as the policy with a new random head, or as the policy with a head of 0"""
    entropy_coef: float = 0.0
    """bonus for the entropy of next-token distributions, >= 0; averaged as --average says"""
    ptx_coef: float = 0.0
    """weight of the SFT loss on --ptx-data in each update, >= 0 (InstructGPT's PPO-ptx, against forgetting)"""
    ptx_data: runs.Sources = "reviews"
    """rows for --ptx-coef, as train_sft.py takes them"""
    epochs_per_rollout: int = 4
    """passes over the answers of a rollout, >= 1"""
    minibatches: int = 2
    """optimizer steps in each pass, >= 1"""
    lora_rank: int = 0
    """rank of low-rank adapters of the policy, trained in place of its weights, >= 0 (0: none); needs about ten times
    the learning rate. Without --ref the reference is then the policy without adapters. A critic is trained in full"""
    data: runs.Sources = "reviews"
    """prompts: reviews (embedded), .jsonl/.json/.csv/.tsv/.parquet files (also .gz), folders with such files or hub
    ids; the prompt of two dialogues is their shared beginning"""
    lr: float | None = None
    """peak learning rate of the policy's AdamW, > 0; default 1e-6 (embedded: 3e-4)"""
    critic_lr: float | None = None
    """peak learning rate of the critic's AdamW, > 0; default 5 times --lr (embedded: 10/3 times)"""
    adam_eps: float = 1e-5
    """AdamW's epsilon, > 0; 1e-8, the usual one, makes the first updates larger where gradients are tiny"""
    schedule: Literal["cosine", "linear", "constant"] = "linear"
    warmup: float = 0.0
    batch_size: int = 64
    """prompts of a rollout, >= 1"""
    max_steps: int | None = None
    """rollouts, >= 1; default 200 (embedded: 60)"""
    eval_fraction: float = 0.1
    """share of prompts held out, by hash of their text, in [0, 1)"""
    save_every: int = 20
    """rollouts between checkpoints, >= 1"""


def defaults_of(a: Args, embedded: bool) -> dict[str, Any]:
    """What flags that are left unset become. The critic's rate keeps its ratio to the policy's."""
    defaults = DEFAULTS["reviews" if embedded else "any"]
    if a.lr is not None:
        defaults = defaults | {"critic_lr": defaults["critic_lr"] * a.lr / defaults["lr"]}
    clip_range, clip_high, average = {
        "token": (0.2, 0.2, AVERAGES[a.advantage]),
        "sequence": (3e-4, 4e-4, "responses"),
        "cispo": (0.2, 5.0, "tokens"),
    }[a.surrogate]
    correction = a.sampler_correction or ("sequence" if a.dtype == "bfloat16" else "none")
    return defaults | {
        "clip_range": clip_range,
        "clip_high": clip_high if a.surrogate == "cispo" else a.clip_range or clip_high,
        "average": average,
        "sampler_correction": correction,
        "sampler_cap": 2.0 if correction == "token" else 3.0,
    }


def check_flags(a: Args) -> None:
    """Raise BadInput if flags conflict; support/runs.py has the range of each."""
    advantage, grouped = f"--advantage {a.advantage}", a.advantage in GROUPED
    require(a.k >= 2 or not grouped, f"{advantage} compares the answers to a prompt: --k must be at least 2")
    require(a.kl_coef > 0 or not a.kl_target, "--kl-target: a --kl-coef of 0 stays 0, so start with another")
    problem = f"--missing-eos-value {a.missing_eos_value}: must be at least 0 to be subtracted"
    require(a.missing_eos != "subtract" or a.missing_eos_value >= 0, problem)
    problem = f"--surrogate sequence wants one advantage for an answer, and {advantage} has one for each token"
    require(a.surrogate != "sequence" or a.advantage not in ("gae", "reinforce++"), problem)
    problem = f"--resample-groups is for advantages that compare a prompt's answers, and {advantage} does not"
    require(grouped or not a.resample_groups, problem)
    require(1 <= a.minibatches <= a.batch_size, f"--minibatches must be in [1, --batch-size {a.batch_size}]")


def check_reward(a: Args, tokenizer, embedded: bool) -> bool:
    """Whether --reward is a model that scores the sampled ids as they are, and not a function of texts. What is wrong
    with it is raised as BadInput before the long work."""
    to_make = a.reward == train_rm.Args.out and not runs.is_made(a.reward)
    require(embedded or not to_make, f"--reward {a.reward}: no reward model is there: train one with train_rm.py first")
    if names_function(a.reward):
        load_function(a.reward, "--reward")
    elif a.reward != "gold" and not to_make:
        models.require_kind(a.reward, True, a.trust_remote_code, "--reward")
    by_ids = to_make or scores_ids(a.reward, tokenizer, a.trust_remote_code)
    problem = "--value-init reward needs a --reward model with the policy's tokenizer: use --value-init policy instead"
    require(by_ids or a.advantage != "gae" or a.value_init != "reward", problem)
    return by_ids


# ----------------------------------------------------------------------------------------------------------- objective


@dataclass
class Rollout:
    """p prompts with k answers each: b = p * k sequences, n tokens, flattened in prompt order."""

    examples: list[Example]
    logps: Tensor  # [n], of the policy that sampled, as scoring computes them
    ref_logps: Tensor  # [n]
    values: Tensor | None  # [n], of the critic
    advantages: Tensor  # [n]
    returns: Tensor | None  # [n], the critic's regression target
    kept: Tensor  # [p k], 1 for answers that are in the policy's loss, else 0; on the CPU
    weights: Tensor  # [n], of the policy's loss, from --sampler-correction

    def by_prompt(self, name: str, places: Sequence[int]) -> list[Tensor]:
        """A per-token tensor at the prompts at these places, one part for each."""
        parts = getattr(self, name).split([sum(e.lengths) for e in self.examples])
        return [parts[i] for i in places]


def compute_advantages(a: Args, kl_coef: float, kl: Tensor, scores: Tensor, lengths: Tensor, values, greedy):
    """Advantages and returns [n] of a rollout's tokens, from each token's KL [n] and each answer's score [b].

    values [n] are the critic's, with --advantage gae only; without a critic there are no returns. greedy [p] are the
    scores of the greedy answers, with --advantage remax only.
    """
    rewards = advantages.shape_rewards(kl, scores, lengths, kl_coef if a.kl_in == "reward" else 0.0)
    if a.advantage == "gae":
        if a.whiten_rewards != "no":
            rewards = advantages.whiten(rewards, shift_mean=a.whiten_rewards == "shift")
        estimates, returns = advantages.gae(rewards, values, lengths, a.gamma, a.lam)
        return advantages.whiten(estimates) if a.whiten_advantages else estimates, returns
    if a.advantage == "reinforce++":
        return advantages.reinforce_pp(rewards, lengths), None
    totals = rearrange(advantages.sequence_sums(rewards, lengths), "(p k) -> p k", k=a.k)
    estimates = advantages.remax(totals, greedy) if a.advantage == "remax" else GROUPED[a.advantage](totals)
    return rearrange(estimates, "p k -> (p k)").repeat_interleave(lengths, output_size=len(kl)), None


def answer_weights(a: Args, lengths: Tensor, kept: Tensor) -> Tensor:
    """One weight for each answer [b] and all its tokens: the weighted losses add up to the mean that --average names.

    lengths [b]: tokens of the minibatch's answers; kept [b]: 1 for those that count, else 0. All are on the CPU.
    """
    if a.average == "tokens":
        return kept / (kept * lengths).sum().clamp(min=1)
    each = kept / lengths if a.average == "responses" else kept
    return each / (kept.sum().clamp(min=1) * (a.max_new_tokens if a.average == "constant" else 1))


def surrogate(a: Args, logps: Tensor, old_logps: Tensor, estimates: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
    """The policy's loss at each token [n], and which tokens are clipped (with cispo, capped)."""
    if a.surrogate == "cispo":
        ones = torch.ones_like(estimates)  # with an advantage of 1, a token is clipped if its ratio is too high
        capped = losses.clipped(logps, old_logps, ones, a.clip_range, a.clip_high)
        return losses.cispo(logps, old_logps, estimates, a.clip_high), capped
    if a.surrogate == "sequence":
        logps, old_logps = (advantages.sequence_means(x, lengths) for x in (logps, old_logps))
    bounds = a.clip_range, a.clip_high
    return losses.ppo_clip(logps, old_logps, estimates, *bounds), losses.clipped(logps, old_logps, estimates, *bounds)


# ---------------------------------------------------------------------------------------------------------------- main


def main(a: Args) -> dict[str, float]:
    """Train, and return the final metrics (docs/metrics.md)."""
    if a.lora_merge and not a.lora_rank:
        return runs.merge_adapters(a)
    tokenizer, embedded = runs.load_tokenizer(a.model, a.trust_remote_code)
    a = runs.with_defaults(a, defaults_of(a, embedded))
    check_flags(a)
    by_ids = check_reward(a, tokenizer, embedded)
    run = runs.start(a, __file__)

    # ------------------------------------------------------------------------------------------------------------ data
    models.require_same_tokenizer(a.ref, a.model, tokenizer, a.trust_remote_code)
    loaded = load(a.data, "prompts", tokenizer, a)
    require_texts(a.reward, loaded)
    distinct = {e.prompt_text: e for e in loaded}
    prompts, held = held_out(list(distinct.values()), a.eval_fraction)
    require(len(prompts) >= a.batch_size, f"--data: {len(prompts)} prompts are fewer than --batch-size {a.batch_size}")
    of_ptx = replace(a, split=split_of(a.ptx_data, a.split))
    ptx = load(a.ptx_data, "sft", tokenizer, of_ptx) if a.ptx_coef else []
    repeated = len(loaded) - len(distinct)
    print(f"{len(prompts)} prompts to train on, {len(held)} held out; {repeated} rows repeat one of them")
    if a.dry_run:
        print("\n\n".join(show(e, tokenizer) for e in prompts[:3]))
        dryrun.dry_run_ppo(a, prompts, tokenizer)
        return {}

    # ----------------------------------------------------------------------------- policy, reference, reward and critic
    runs.make_missing(train_sft, a.model, a.device)
    if embedded:
        runs.make_missing(train_rm, a.reward, a.device)

    make_policy = lambda device: models.load_model(a.model, device, a.trust_remote_code)  # noqa: E731
    make_ref = lambda device: models.load_model(a.ref or a.model, device, a.trust_remote_code, "--ref")  # noqa: E731
    make_reward = lambda device: models.load_reward_model(a.reward, device, a.trust_remote_code)  # noqa: E731

    def make_critic(device: str):
        """The critic as it starts, by --value-init."""
        if a.value_init == "reward":
            return make_reward(device)
        critic = models.new_reward_model(make_policy(device), models.load_tokenizer(a.model, a.trust_remote_code))
        if a.value_init == "zero":
            torch.nn.init.zeros_(critic.score.weight)
        return critic

    dtype = models.DTYPES[a.dtype]
    policy, low_bits = sharding.load_trained(make_policy, a.device, dtype, None if a.lora_rank else a.seed)
    reference = policy  # with LoRA: the same model with its adapters off
    if a.ref or not a.lora_rank:
        reference = sharding.load(make_ref, a.device, dtype).requires_grad_(False)
    reward = reward_model = None  # a function of texts, or a model that scores the sampled ids as they are
    if by_ids:
        reward_model = sharding.load(make_reward, a.device, dtype).requires_grad_(False)
    else:
        limits = (a.max_prompt_length, a.max_prompt_length + a.max_new_tokens, a.micro_batch_tokens)
        reward = load_reward(a.reward, a.device, "--reward", a.trust_remote_code, *limits, dtype)
    critic, critic_low_bits = None, {}
    if a.advantage == "gae":
        critic, critic_low_bits = sharding.load_trained(make_critic, a.device, dtype, a.seed)
    ends = end_ids(policy, tokenizer)
    others = [x for x in (reference, critic, reward_model) if x and x is not policy]
    batching = scoring.batching_for_answers(policy, others, prompts, tokenizer, a)

    def score(examples: Sequence[Example]) -> Tensor:
        """Rewards of all responses, [b]."""
        if not reward_model:
            return torch.tensor(score_texts(reward, examples, ends), device=a.device)
        own = batching._replace(pad_id=reward_model.config.pad_token_id)
        return torch.cat(scoring.score_rewards(reward_model, examples, own)).float().to(a.device)

    def sample(asked: Sequence[Example], name: str) -> list[Example]:
        """The prompts with --k answers each; `name` and --seed determine the noise."""
        seed = random.Random(f"{a.seed} {name}").getrandbits(60)
        return answer(policy, tokenizer, asked, a.max_new_tokens, seed, a.temperature, a.k, dtype)

    def has_eos(examples: Sequence[Example]) -> Tensor:
        """Which responses reached their end, [b]; the others were cut at --max-new-tokens."""
        return torch.tensor([r[-1] in ends for e in examples for r in e.responses], device=a.device)

    def after_missing_eos(scores: Tensor, examples: Sequence[Example]) -> Tensor:
        """The scores of these examples' responses by the rule --missing-eos, [b]."""
        if a.missing_eos == "no":
            return scores
        return advantages.missing_eos(scores, has_eos(examples), a.missing_eos, a.missing_eos_value)

    def alike(scores: Tensor) -> Tensor:
        """Which prompts have answers that all score the same, [p]."""
        return rearrange(scores, "(p k) -> p k", k=a.k).std(1) < 1e-4

    def resample_groups(examples: list[Example], raw: Tensor, more: Sequence[Example], step: int) -> tuple[int, float]:
        """--resample-groups: replace, in place, prompts whose answers all score the same by the first of `more`, which
        are answered and scored. Returns how many were replaced, and the seconds that sampling took."""
        replaced, seconds = 0, 0.0
        for extra in range(a.resample_groups):
            places = alike(after_missing_eos(raw, examples)).nonzero().flatten().tolist()
            if not places:
                break
            began = time.perf_counter()
            asked = [more[(replaced + i) % len(more)] for i in range(len(places))]
            answered = sample(asked, f"rollout {step} {extra}")
            seconds += time.perf_counter() - began
            raw.view(-1, a.k)[places] = score(answered).view(-1, a.k)
            for i, example in zip(places, answered, strict=True):
                examples[i] = example
            replaced += len(places)
        return replaced, seconds

    # -------------------------------------------------------------------------------------------------------- training
    run.check_same(data=prompts, eval_data=held, ptx_data=ptx or None, model=policy)
    run.check_same(ref=reference if a.ref else None, reward=reward_model or getattr(reward, "model", None))
    lora = models.prepare_training(policy, low_bits, a, a.lora_rank)
    adam = {"eps": a.adam_eps, "weight_decay": 0.0}
    optimizer, critic_optimizer = models.adamw(policy, low_bits, a, lr=a.lr, **adam), None
    if critic:
        models.prepare_training(critic, critic_low_bits, a)
        critic_optimizer = models.adamw(critic, critic_low_bits, a, lr=a.critic_lr, **adam)
    first, kl_coef = 0, a.kl_coef
    trained = {"model": policy, "optimizer": optimizer, "critic": critic, "critic_optimizer": critic_optimizer}
    if state := run.load_checkpoint(**trained):
        first, kl_coef = state["step"], state["kl_coef"]
        models.restore(policy, low_bits, state["model"])
        optimizer.load_state_dict(state["optimizer"])
        if critic:
            models.restore(critic, critic_low_bits, state["critic"])
            critic_optimizer.load_state_dict(state["critic_optimizer"])
        del state
    run.begin_loop(first, a.max_steps)
    steps_per_epoch = len(prompts) // a.batch_size

    for step in range(first, a.max_steps):
        began = time.perf_counter()
        epoch, nth = divmod(step, steps_per_epoch)
        order = random.Random(f"{a.seed} {epoch}").sample(prompts, len(prompts))
        asked = order[nth * a.batch_size : (nth + 1) * a.batch_size]

        # ------------------------------------------------------------------------ rollout: answers, scores, advantages
        examples = sample(asked, f"rollout {step}")
        sampling_seconds = time.perf_counter() - began
        raw, greedy, replaced = score(examples), None, 0
        if a.resample_groups:
            stop = (nth + 1) * a.batch_size
            replaced, seconds = resample_groups(examples, raw, order[stop:] + order[:stop], step)
            sampling_seconds += seconds
        lengths = torch.tensor([n for e in examples for n in e.lengths], device=a.device)
        ended, scores = has_eos(examples), after_missing_eos(raw, examples)
        if a.advantage == "remax":
            started = time.perf_counter()
            greedy_answers = answer(policy, tokenizer, asked, a.max_new_tokens, 0, 0.0, 1, dtype)
            sampling_seconds += time.perf_counter() - started
            greedy = after_missing_eos(score(greedy_answers), greedy_answers)
        by_policy = lambda batch: scoring.logps_and_entropies(policy, batch, dtype, a.temperature)  # noqa: E731
        logps, entropy = scoring.per_token(by_policy, examples, batching).unbind(1)
        with models.without_lora(reference):
            by_ref = lambda batch: scoring.response_logps(reference, batch, dtype, a.temperature)[0]  # noqa: E731
            ref_logps = scoring.per_token(by_ref, examples, batching)
        values = None
        if critic:
            values = scoring.per_token(lambda batch: scoring.token_values(critic, batch, dtype), examples, batching)
        sampled = torch.tensor([x for e in examples for y in e.sampled_logps for x in y], device=a.device)
        sampler_gap, weights = logps - sampled, torch.ones_like(logps)
        if a.sampler_correction != "none":
            weights = advantages.sampler_weights(logps, sampled, lengths, a.sampler_correction, a.sampler_cap)
        log_ratios = logps - ref_logps
        if a.kl_estimator == "exact":
            exact = lambda batch: scoring.exact_kl(policy, reference, batch, dtype, a.temperature)  # noqa: E731
            kl = scoring.per_token(exact, examples, batching)
        else:
            kl = advantages.kl_estimate(log_ratios, a.kl_estimator)
        estimates, returns = compute_advantages(a, kl_coef, kl, scores, lengths, values, greedy)
        kept = rearrange(ended.float() if a.overlong == "mask" else torch.ones(len(ended)), "(p k) -> p k", k=a.k).cpu()
        rollout = Rollout(examples, logps, ref_logps, values, estimates, returns, kept, weights)

        # ------------------------------------------------------------------------------ minibatch epochs on the rollout
        lr_share = runs.schedule(step, a.max_steps, a.warmup, a.schedule)
        for param_group in optimizer.param_groups:
            param_group["lr"] = a.lr * lr_share
        for param_group in critic_optimizer.param_groups if critic else ():
            param_group["lr"] = a.critic_lr * lr_share
        parts = []
        for rollout_epoch in range(a.epochs_per_rollout):
            rng = random.Random(f"{a.seed} {step} {rollout_epoch}")
            shuffled = rng.sample(range(len(examples)), len(examples))
            for i in range(a.minibatches):
                places = shuffled[i :: a.minibatches]
                totals = update(a, policy, reference, critic, rollout, places, kl_coef, batching)
                if ptx:
                    rows = rng.sample(ptx, min(len(places), len(ptx)))
                    totals |= add_ptx_gradient(a, policy, rows, batching)
                totals["grad_norm"] = sharding.clip_gradients(optimizer, a.max_grad_norm)
                if critic:
                    totals["critic_norm"] = sharding.clip_gradients(critic_optimizer, a.max_grad_norm)
                parts.append(over_processes(totals))
                if len(parts) == 1:
                    guard(a, policy, rollout, step, parts[0]["gap"], sampler_gap.abs().max().item())
                answered = [examples[i] for i in places]
                run.require_finite(step + 1, parts[-1]["loss/policy"], parts[-1]["grad_norm"], answered)
                if critic:
                    run.require_finite(step + 1, parts[-1]["loss/value"], parts[-1]["critic_norm"], answered)
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
                if critic:
                    critic_optimizer.step()
                    critic_optimizer.zero_grad(set_to_none=True)
            if a.kl_stop and parts[-1]["policy/approxkl"] > a.kl_stop:
                break

        # ---------------------------------------------- what follows: metrics, the adaptive KL coefficient, checkpoints
        logged = [name for name in parts[0] if name not in ("gap", "critic_norm")]
        metrics = {name: sum(part[name] for part in parts) / len(parts) for name in logged}
        mean_kl = advantages.sequence_sums(log_ratios, lengths).mean().item()
        metrics |= {
            "sampler/log_ratio": sampler_gap.mean().item(),
            "sampler/log_ratio_max": sampler_gap.abs().max().item(),
            "sampler/kl": advantages.kl_estimate(-sampler_gap, "k3").mean().item(),
            "objective/scores": raw.mean().item(),
            "objective/kl": mean_kl,
            "objective/entropy": entropy.mean().item(),
            "objective/rlhf_reward": scores.mean().item() - kl_coef * mean_kl,
            "length": lengths.float().mean().item(),
            "ended": ended.float().mean().item(),
            "kl_coef": kl_coef,
            "lr": a.lr * lr_share,
        }
        if a.k > 1:
            metrics["frac_reward_zero_std"] = alike(scores).float().mean().item()
        if a.sampler_correction != "none":
            cut = weights == (a.sampler_cap if a.sampler_correction == "token" else 0)
            metrics["sampler/cut"] = cut.float().mean().item()
        if a.resample_groups:
            metrics["resampled"] = replaced / len(examples)
        if critic:
            metrics["val/explained_variance"] = advantages.explained_variance(values, returns).item()
        if embedded:
            texts = [f"{e.prompt_text} {text}" for e in examples for text in e.response_texts]
            metrics["objective/gold"] = sum(map(reviews.gold_reward, texts)) / len(texts)
        if a.kl_target:
            answers = float(a.max_steps * len(lengths))
            horizon = max(a.kl_horizon * answers, float(len(lengths)))
            kl_coef = advantages.adaptive_kl_coef(kl_coef, mean_kl, a.kl_target, len(lengths), horizon)
        seconds = time.perf_counter() - began
        speed = lengths.sum().item() / seconds
        metrics |= {"perf/tokens_per_second": speed, "perf/seconds": seconds}
        run.log(step + 1, metrics | {"perf/sampling_share": sampling_seconds / seconds})
        run.progress(step + 1, score=metrics["objective/scores"], kl=mean_kl, tokens_per_s=speed)
        if run.interrupted or step + 1 == a.max_steps or (step + 1) % a.save_every == 0:
            state = {"model": models.trained(policy, low_bits), "optimizer": optimizer.state_dict()}
            if critic:
                state["critic"] = models.trained(critic, critic_low_bits)
                state["critic_optimizer"] = critic_optimizer.state_dict()
            run.save_checkpoint(step + 1, {**state, "step": step + 1, "kl_coef": kl_coef})
            del state
        if run.interrupted:
            run.leave(step + 1)
    run.end_loop()

    # ------------------------------------------------------------------------------------------------ before and after
    del optimizer, critic_optimizer, trained
    start = policy if lora else reference  # the starting weights: with LoRA, the policy without its adapters
    if a.ref and not lora:
        start = sharding.load(make_policy, a.device, dtype)
    asked = (held or prompts)[: a.eval_prompts]
    rows, results, samples = report.before_and_after(
        start, policy, reference, tokenizer, asked, a, batching, embedded, score
    )
    policy, low_bits, lora = sharding.unshard(policy, low_bits, make_policy, a, lora)
    if not policy:  # this process's work is done: the main process writes answers and model
        return results
    run.samples(a.max_steps, samples)
    models.save(policy, tokenizer, run.out, lora, a.lora_merge, low_bits, a.save_dtype)
    report.reward_kl_plot(run.out)
    run.finish(results, PANELS)
    report.print_comparison(f"{len(asked)} answers, {a.dtype}", rows, results, samples)
    print(f"\nThe model is in {run.out}, with curves.png, reward_kl.png and {len(samples)} answers in samples.jsonl.")
    flags = f"{runs.repeated(a, 'data', 'split')} --reward {a.reward} --out {run.out}-eval"
    print(f"Next: python evaluate.py --models {a.model} {run.out}{flags}")
    return results


# ------------------------------------------------------------------------------------------------ one update, and guard


def update(a: Args, policy, reference, critic, rollout: Rollout, places, kl_coef: float, batching: Batching):
    """Backpropagate one minibatch, the rollout's prompts at these places; returns its metrics."""
    examples = [rollout.examples[i] for i in places]
    names = ["logps", "ref_logps", "advantages", "weights", *(["values", "returns"] if critic else [])]
    by_prompt = {name: rollout.by_prompt(name, places) for name in names}
    lengths = torch.tensor([n for e in examples for n in e.lengths])
    tokens = sum(sum(e.lengths) for e in examples)
    average = answer_weights(a, lengths, rollout.kept[places].flatten()).repeat_interleave(lengths, output_size=tokens)
    by_prompt["average"] = send(average, a.device).split([sum(e.lengths) for e in examples])
    parts = []
    for group, real in shares(examples, a.micro_batch_tokens, batching.layout):  # real: 0 for a padding pass
        batch = collate([examples[i] for i in group], batching.layout, batching.pad_id, a.device)
        stored = {name: torch.cat([x[i] for i in group]) for name, x in by_prompt.items()}
        if a.entropy_coef:
            logps, entropy = scoring.logps_and_entropies(policy, batch, batching.dtype, a.temperature).unbind(1)
        else:
            logps, _ = scoring.response_logps(policy, batch, batching.dtype, a.temperature)
        loss, clipped = surrogate(a, logps, stored["logps"], stored["advantages"], batch.lengths)
        if a.entropy_coef:
            loss = loss - a.entropy_coef * entropy
        if a.kl_in == "loss" and a.kl_estimator == "exact":
            loss = loss + kl_coef * scoring.exact_kl(policy, reference, batch, batching.dtype, a.temperature)
        elif a.kl_in == "loss":
            loss = loss + kl_coef * advantages.kl_estimate(logps - stored["ref_logps"], a.kl_estimator)
        loss = (loss * (real * stored["average"] * stored["weights"])).sum()
        loss.backward()
        moved = real * (logps - stored["logps"]).detach()
        part = {
            "loss/policy": loss.detach().double(),
            "policy/approxkl": advantages.kl_estimate(moved, "k2").sum().double() / tokens,
            "policy/clipfrac": real * clipped.float().sum().double() / tokens,
            "gap": relative_gap(moved, stored["logps"]).double(),
        }
        if critic:
            values = scoring.token_values(critic, batch, batching.dtype)
            critic_loss = losses.value_loss(values, stored["values"], stored["returns"], a.value_clip)
            critic_loss = real * critic_loss.sum() / tokens
            critic_loss.backward()
            part["loss/value"] = critic_loss.detach().double()
        parts.append(part)
    totals = {name: sum(part[name] for part in parts) for name in parts[0]}
    return totals | {"gap": torch.stack([part["gap"] for part in parts]).max()}


def over_processes(totals: dict[str, Tensor]) -> dict[str, float]:
    """A minibatch's totals over all processes, with one read of the device: gap and norms are maxima, others sums."""
    local = dict(zip(totals, torch.stack([x.double() for x in totals.values()]).tolist(), strict=True))
    everywhere = gather([local])
    largest = {"gap", "grad_norm", "critic_norm"}
    return {name: (max if name in largest else sum)(x[name] for x in everywhere) for name in totals}


def add_ptx_gradient(a: Args, policy, rows: Sequence[Example], batching: Batching) -> dict[str, Tensor]:
    """Add the gradient of --ptx-coef times the mean negative log-likelihood of these rows' tokens."""
    total, tokens = torch.zeros((), dtype=torch.float64, device=a.device), train_sft.trained_tokens(rows)
    for group in scoring.micro_batches(policy, rows, batching):
        batch = collate([rows[i] for i in group], batching.layout, batching.pad_id, a.device)
        loss = -scoring.response_logps(policy, batch, batching.dtype)[1].sum() / tokens
        (a.ptx_coef * loss).backward()
        total = total + loss.detach()
    return {"loss/ptx": total}


def guard(a: Args, policy, rollout: Rollout, step: int, gap: float, sampling_gap: float) -> None:
    """In float32, raise BadInput unless sampling, scoring and loss agree on log-probs before a rollout's first update.

    `gap` is the `relative_gap` between scoring and loss in the first minibatch, `sampling_gap` the largest difference
    in nats between scoring and token-by-token sampling with a cache. This catches log-probs at another temperature,
    dropout, attention that leaks and a wrong shift.
    """
    if a.dtype != "float32":
        if step == 0:
            gaps = f"scoring and loss differ by {gap:.3g} (relative), sampling and scoring by {sampling_gap:.3g} nats"
            print(f"guard: in {a.dtype} {gaps}")
        return
    growth = scoring.growth(policy)
    rounding = ROUNDING * growth
    problem = f"step {step + 1}: before its first update, the log-probs of"
    require(gap < rounding, f"{problem} scoring and loss differ by {gap:.3g} (relative), more than rounding")
    apart = f"sampling and scoring differ by {sampling_gap:.3g} nats"
    require(sampling_gap < 1e-3 * growth, f"{problem} {apart}, more than rounding")
    if step == 0 and not a.ref:
        ref_gap = relative_gap(rollout.logps - rollout.ref_logps, rollout.logps).item()
        require(ref_gap < rounding, f"step 1: the log-probs of policy and reference differ by {ref_gap:.3g} (relative)")


def relative_gap(differences: Tensor, logps: Tensor) -> Tensor:
    """The largest difference between log-probs, relative to the log-prob's size (at least 1 nat)."""
    return (differences.abs() / logps.abs().clamp(min=1)).max()


PANELS = {  # of curves.png
    "score, and score minus KL penalty": ["objective/scores", "objective/rlhf_reward"],
    "KL to the reference, nats per answer": ["objective/kl"],
    "gold reward": ["objective/gold"],
    "entropy, nats per token": ["objective/entropy"],
    "policy: approximate KL of the step, share clipped": ["policy/approxkl", "policy/clipfrac"],
    "critic: explained variance": ["val/explained_variance"],
    "length, tokens": ["length"],
    "gradient norm": ["grad_norm"],
    "KL coefficient": ["kl_coef"],
}


if __name__ == "__main__":
    runs.cli(main, Args)
