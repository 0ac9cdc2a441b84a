"""From scores and log-probabilities to advantages, the weights of the sampled tokens in the policy gradient.

Notation; log-probabilities are in nats, and the state s is the prompt with the tokens before a:

    D      log pi(a|s) - log pi_ref(a|s) of a token a that pi sampled    R      the sum of a sequence's rewards
    kl     an estimate of KL(pi || pi_ref) at each token                 V      the critic's estimate of rewards to come
    gamma  discount per token, in [0, 1]; 1 is usual for text            lam    GAE's decay of TD errors, in [0, 1]

Per-token tensors are flat, [n], one sequence after another, with `lengths` [b], as in rlhf/tree.py's Batch. There is no
padding that could leak into a mean, and no mask to forget. These lines convert between sequences and tokens:

    per_token = per_sequence.repeat_interleave(lengths)             per_sequence = sequence_sums(per_token, lengths)

Tensors for prompts with k responses each are [p k]: rearrange(x, "(p k) -> p k", k=k). A sequence has at least one
token. It ends after its last one, whether that is EOS or the response was cut off; the value after the end is 0.

No function passes gradient on, except `kl_estimate`, which may be used as a loss, `sequence_sums` and `sequence_means`.
Results have the dtype of the first argument. A setting outside its range raises BadInput (a ValueError) that names it.
"""

import torch
from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from rlhf import BadInput, check_ranges, require
from rlhf.losses import MAX_EXPONENT


def sequence_sums(per_token: Float[Tensor, " n"], lengths: Int[Tensor, " b"]) -> Float[Tensor, " b"]:
    """Sum over each sequence's tokens, accumulated in float64. Gradient flows to per_token."""
    return torch.segment_reduce(per_token.double(), "sum", lengths=lengths).to(per_token.dtype)


def sequence_means(per_token: Float[Tensor, " n"], lengths: Int[Tensor, " b"]) -> Float[Tensor, " n"]:
    """Each sequence's mean, at each of its tokens. Gradient flows to per_token."""
    return (sequence_sums(per_token, lengths) / lengths).repeat_interleave(lengths, output_size=len(per_token))


# ---------------------------------------------------------------------------------------------------------- rewards


def kl_estimate(logratios: Float[Tensor, " n"], estimator: str) -> Float[Tensor, " n"]:
    """Estimate KL(pi || pi_ref) from each token that pi sampled, D = logratios:

        k1  D                  any sign; mean is the KL                 mean gradient is 0
        k2  D^2 / 2            at least 0; mean near KL if pi near ref  mean gradient is that of KL(pi || pi_ref)
        k3  exp(-D) - 1 + D    at least 0; mean is the KL               mean gradient is that of KL(pi_ref || pi)

    Schulman 2020, joschu.net/blog/kl-approx.html. The gradients are for one token at a fixed state; they ignore that a
    change of pi also changes which states are visited (Tang and Munos 2025, arXiv 2506.09477). So k1 belongs in the
    reward and does nothing as a loss; k2 as a loss has the gradient of the KL at the visited states; k3 as a loss leads
    to another optimum. The exact sum over the vocabulary is rlhf.logprobs.token_kl. Below D = -MAX_EXPONENT, k3 is
    constant and passes no gradient. Gradient flows to logratios. Raises BadInput for any other estimator.

    With logratios = old_logps - logps, the same formulas measure how far the policy has moved since it sampled:
    KL(pi_old || pi). k2 is then the usual `approxkl`.
    """
    if estimator == "k1":
        return logratios
    if estimator == "k2":
        return logratios.square() / 2
    if estimator == "k3":
        D = logratios.clamp(min=-MAX_EXPONENT)
        return torch.expm1(-D) + D
    raise BadInput(f"estimator must be k1, k2 or k3, not {estimator}")


def missing_eos(
    scores: Float[Tensor, " b"], ended: Bool[Tensor, " b"], rule: str, missing_eos_value: float
) -> Float[Tensor, " b"]:
    """Change the scores of responses that were cut off, and so have no EOS, by one of two rules:

        replace   missing_eos_value instead of the score         subtract   score - missing_eos_value

    replace: a reward model was not trained on unfinished text, so its score means nothing there (Huang et al. 2024,
    detail 23, arXiv 2403.17031, with -1). subtract: the value is a penalty, at least 0, as in TRL; it suits a reward
    that can judge unfinished responses. Raises BadInput for another rule or a penalty below 0.
    """
    check_ranges(missing_eos_value=missing_eos_value)
    if rule == "replace":
        cut = torch.full_like(scores, missing_eos_value)
    elif rule == "subtract":
        message = f"missing_eos_value must be at least 0 to be subtracted, not {missing_eos_value}"
        require(missing_eos_value >= 0, message)
        cut = scores - missing_eos_value
    else:
        raise BadInput(f"rule must be replace or subtract, not {rule}")
    return torch.where(ended, scores, cut).detach()


def shape_rewards(
    kl: Float[Tensor, " n"], scores: Float[Tensor, " b"], lengths: Int[Tensor, " b"], kl_coef: float
) -> Float[Tensor, " n"]:
    """The reward of every token: r_t = -kl_coef kl_t, plus the sequence's score at its last token.

    Ziegler et al. 2019, Eq. 2, arXiv 1909.08593. kl_coef is in reward per nat and at least 0; use 0 if the KL is in the
    loss. With kl = k1, a sequence's rewards add up to R = score - kl_coef log(pi / pi_ref), and the policy gradient is
    that of E[score] - kl_coef KL(pi || pi_ref). The exact KL at a state does not depend on the token sampled there, so
    as a reward it only accounts for which states are visited; kl_coef times the same KL in the loss adds the rest. With
    k2 or k3, the policy gradient is neither the whole nor that part. Raises BadInput for an empty sequence.
    """
    check_ranges(kl_coef=kl_coef)
    require(bool((lengths > 0).all()), "a sequence has no token, and so no last one for its score")
    rewards = -kl_coef * kl.detach()
    rewards[lengths.cumsum(0) - 1] += scores.detach().to(rewards.dtype)
    return rewards


def adaptive_kl_coef(kl_coef: float, kl: float, kl_target: float, episodes: int, horizon: float) -> float:
    """The next KL coefficient: kl_coef (1 + clip(kl / kl_target - 1, -0.2, 0.2) episodes / horizon).

    Ziegler et al. 2019, arXiv 1909.08593, section 2.2, with its constant 0.1 as episodes / horizon, as in their code
    (target 6 nats, horizon 10000 episodes). kl is the mean over the `episodes` sequences of the last rollout;
    kl_target > 0; both in nats per sequence. While the KL stays above 1.2 times the target, the coefficient grows by a
    factor of about e^0.2 per horizon, so it hardly changes in a run of far fewer episodes. The coefficient is the
    controller's only state. Raises BadInput unless horizon > episodes / 5, so that the coefficient stays above 0.
    """
    check_ranges(kl=kl, kl_target=kl_target)
    require(episodes / 5 < horizon, f"horizon must be above episodes / 5 = {episodes / 5}, not {horizon}")
    return kl_coef * (1 + min(max(kl / kl_target - 1, -0.2), 0.2) * episodes / horizon)


def whiten(x: Float[Tensor, "*shape"], shift_mean: bool = True) -> Float[Tensor, "*shape"]:
    """(x - mean) / sqrt(var + 1e-8) over all of x, with the biased variance; plus the mean if not shift_mean.

    Ziegler et al. 2019's code: advantages with shift_mean, rewards without. Advantages: whitening by the mean and
    standard deviation of the whole population keeps the direction of the expected gradient. Rewards: r_t becomes
    r_t / sd plus the same constant for every token, so length itself is rewarded or penalised.
    """
    x = x.detach()
    var, mean = torch.var_mean(x, correction=0)
    white = (x - mean) * (var + 1e-8).rsqrt()
    return white if shift_mean else white + mean


# ------------------------------------------------------------------------------------------- advantages of tokens


def gae(
    rewards: Float[Tensor, " n"],
    values: Float[Tensor, " n"],
    lengths: Int[Tensor, " b"],
    gamma: float = 1.0,
    lam: float = 0.95,
) -> tuple[Float[Tensor, " n"], Float[Tensor, " n"]]:
    """Generalised advantage estimates, and the returns that are the critic's regression target; both without gradient:

        delta_t = r_t + gamma V_{t+1} - V_t          A_t = delta_t + gamma lam A_{t+1}          returns_t = A_t + V_t

    V and A after the last token are 0. Schulman et al. 2015, Eq. 16, arXiv 1506.02438. values[i] is the critic's
    estimate before token i is chosen, from the hidden state that predicts it. With gamma = 1 the expected policy
    gradient is exact for any V if lam = 1; if lam < 1, in general only if V is the policy's own value function.
    """
    check_ranges(gamma=gamma, lam=lam)
    # one row per sequence, padded with zeros: beyond the end reward and value are 0, and so are delta and A
    r, v = (pad_sequence(x.detach().split(lengths.tolist()), batch_first=True) for x in (rewards, values))
    advantages, next_advantage, next_value = torch.zeros_like(r), torch.zeros_like(r[:, 0]), torch.zeros_like(v[:, 0])
    for t in reversed(range(r.shape[1])):
        delta = r[:, t] + gamma * next_value - v[:, t]
        advantages[:, t] = next_advantage = delta + gamma * lam * next_advantage
        next_value = v[:, t]
    flat = advantages[torch.arange(r.shape[1], device=r.device) < lengths[:, None]]
    return flat, flat + values.detach()


def reinforce_pp(rewards: Float[Tensor, " n"], lengths: Int[Tensor, " b"]) -> Float[Tensor, " n"]:
    """REINFORCE++: A_t = sum over i >= t of r_i, whitened over all tokens of the batch.

    Hu 2025, arXiv 2501.03262. Its rewards are `shape_rewards` with k1: A_t = score - kl_coef (sum over i >= t of k1_i)
    before whitening. For its variant with a baseline, subtract the prompt's mean from the score; put k2 in the loss.
    """
    sums_from_t, _ = gae(rewards, torch.zeros_like(rewards), lengths, gamma=1.0, lam=1.0)
    return whiten(sums_from_t)


# ------------------------------------------------------------ advantages of whole responses, among k per prompt
#
# R [p k] is the sum of a response's rewards: sequence_sums(shape_rewards(...), lengths). All its tokens get the same A.
# "The expected gradient" is that of (1 / k) sum over i of A_i grad log pi(y_i), with all k responses drawn from pi.


def rloo(R: Float[Tensor, "p k"]) -> Float[Tensor, "p k"]:
    """REINFORCE leave-one-out: R_i minus the mean of the other k - 1, which is (R_i - mean) k / (k - 1).

    Kool et al. 2019 (openreview.net/forum?id=r1lgTGL5DE); Ahmadian et al. 2024, arXiv 2402.14740. The expected gradient
    is exactly that of E[R]. Raises BadInput for k < 2.
    """
    k = R.shape[1]
    require(k >= 2, f"rloo needs at least 2 responses a prompt, not {k}")
    return drgrpo(R) * (k / (k - 1))


def grpo(R: Float[Tensor, "p k"]) -> Float[Tensor, "p k"]:
    """Group-relative policy optimisation: (R_i - mean) / (sd + 1e-4), with the sample sd (k - 1 in the denominator).

    Shao et al. 2024, section 4.1, arXiv 2402.03300; sd and 1e-4 as in TRL, so that equal rewards stay near 0 despite
    rounding. The expected gradient does not point along that of E[R], because each group is divided by its own sd. The
    method also averages over each response's tokens, and has k3 in the loss. Raises BadInput for k < 2.
    """
    require(R.shape[1] >= 2, f"grpo needs at least 2 responses a prompt, not {R.shape[1]}")
    return drgrpo(R) / (R.detach().std(1, keepdim=True) + 1e-4)


def drgrpo(R: Float[Tensor, "p k"]) -> Float[Tensor, "p k"]:
    """GRPO done right: R_i - mean, not divided by the standard deviation.

    Liu et al. 2025 (Dr. GRPO), arXiv 2503.20783. The expected gradient is (k - 1) / k times that of E[R], as R_i is in
    its own baseline. The method divides a response's sum by a constant, not its length. Raises BadInput for k < 2.
    """
    R = R.detach()
    require(R.shape[1] >= 2, f"drgrpo needs at least 2 responses a prompt, not {R.shape[1]}")
    return R - R.mean(1, keepdim=True)


def remax(R: Float[Tensor, "p k"], greedy: Float[Tensor, " p"]) -> Float[Tensor, "p k"]:
    """ReMax: R_i minus the reward of the prompt's greedy response, which is one extra decoding and gets no gradient.

    Li et al. 2023, arXiv 2310.10505. The expected gradient is exactly that of E[R], for k = 1 too.
    """
    return R.detach() - rearrange(greedy.detach(), "p -> p 1")


# ------------------------------------------------------------------------------------------- samplers, diagnostics


def sampler_weights(
    logps: Float[Tensor, " n"],
    sampler_logps: Float[Tensor, " n"],
    lengths: Int[Tensor, " b"],
    correction: str,
    sampler_cap: float,
) -> Float[Tensor, " n"]:
    """Importance weights of tokens whose sampler computed other log-probs than the policy that is trained:

        token      min(w_t, cap) with w_t = exp(logps - sampler_logps) at that token
        sequence   w, or 0 if w > cap, with w = the product of w_t over the sequence

    token: Yao et al. 2025 (fengyao.notion.site/off-policy-rl); sequence: TRL's `sequence_mask`. A loss whose terms are
    multiplied by the sequence weight has, without a cap, exactly the expected gradient of samples from the policy, if a
    term depends on its own sequence only; its variance, and the share above a cap, grow with the length. The token
    weight corrects the choice of its own token, but neither how often the prefix was sampled nor what followed, and so
    leaves a bias. No gradient. Raises BadInput for another correction.
    """
    check_ranges(sampler_cap=sampler_cap)
    log_weights = (logps - sampler_logps).detach()
    if correction == "token":
        return log_weights.exp().clamp(max=sampler_cap)
    require(correction == "sequence", f"correction must be token or sequence, not {correction}")
    weights = sequence_sums(log_weights, lengths).exp()
    return torch.where(weights > sampler_cap, 0, weights).repeat_interleave(lengths, output_size=len(logps))


def explained_variance(values: Float[Tensor, " n"], returns: Float[Tensor, " n"]) -> Float[Tensor, ""]:
    """1 - var(returns - V) / var(returns): the share of the returns' variance that the critic explains.

    Range (-inf, 1]: 1 if V is right up to a constant, 0 if no better than a constant. var(returns) is kept >= 1e-8.
    """
    residual, total = (x.detach().var(correction=0) for x in (returns - values, returns))
    return 1 - residual / total.clamp(min=1e-8)
