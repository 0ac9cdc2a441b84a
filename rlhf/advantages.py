"""From scores and log-probs to advantages: what each sampled token gets for the reward of its response.

Notation and layout; log-probabilities are in nats:

    D      log pi(a|s) - log pi_ref(a|s) of a token a that pi sampled    R      a sequence's score, or sum of rewards
    kl     an estimate of KL(pi || pi_ref) at each token                 V      the critic's estimate of rewards to come
    gamma  discount per token, in [0, 1]; 1 is usual for text            lam    GAE's share of later errors, in [0, 1]

What belongs to tokens is flat [n], sequence after sequence, with `lengths` [b]: the layout of rlhf/tree.py's Batch. No
padding can leak into a mean, and there is no mask to forget. One line each leads from sequences to tokens and back:

    of_token = of_sequence.repeat_interleave(lengths)               of_sequence = sequence_sums(of_token, lengths)

What belongs to prompts with k responses each is [p k]: rearrange(x, "(p k) -> p k", k=k). A sequence has at least one
token. It ends after its last one, whether that is EOS or it was cut: the value there is 0.

Nothing here passes gradient on, but for `kl_estimate`, which may be a loss, and `sequence_sums`. Results have the dtype
of the first argument. A setting outside its range raises BadInput (a ValueError), naming it.
"""

import math

import torch
from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from rlhf import BadInput, require
from rlhf.losses import MAX_EXPONENT


def sequence_sums(per_token: Float[Tensor, " n"], lengths: Int[Tensor, " b"]) -> Float[Tensor, " b"]:
    """Sum over each sequence's tokens, added up in float64; gradient to per_token."""
    return torch.segment_reduce(per_token.double(), "sum", lengths=lengths).to(per_token.dtype)


# ---------------------------------------------------------------------------------------------------------- rewards


def kl_estimate(logratios: Float[Tensor, " n"], estimator: str) -> Float[Tensor, " n"]:
    """An estimate of KL(pi || pi_ref) from each token that pi sampled, D = logratios:

        k1  D                  mean KL, of either sign                        mean gradient 0
        k2  D^2 / 2            at least 0; mean near KL if pi is near ref     mean gradient that of KL(pi || pi_ref)
        k3  exp(-D) - 1 + D    at least 0; mean KL                            mean gradient that of KL(pi_ref || pi)

    Schulman 2020, joschu.net/blog/kl-approx.html; the gradients (of one token, at a state that pi's change does not
    move): Tang and Munos 2025, arXiv 2506.09477. So k1 belongs in the reward, and as a loss does nothing; k2 as a loss
    is the KL at the visited states; k3 as a loss pulls to another optimum. The exact sum over the vocabulary is
    rlhf.logprobs.token_kl. Below D = -MAX_EXPONENT k3 is held constant and passes no gradient. Gradient to logratios.

    With logratios = old_logps - logps the same lines measure how far the policy has moved since it sampled: KL(pi_old
    || pi), k2 being the usual `approxkl`.
    """
    if estimator == "k1":
        return logratios
    if estimator == "k2":
        return logratios.square() / 2
    if estimator == "k3":
        D = logratios.clamp(min=-MAX_EXPONENT)
        return torch.expm1(-D) + D
    raise BadInput(f"estimator must be k1, k2 or k3, not {estimator}")


def missing_eos(scores: Float[Tensor, " b"], ended: Bool[Tensor, " b"], rule: str, value: float) -> Float[Tensor, " b"]:
    """Scores in which a response that was cut, and so has no EOS, is told apart.

        replace   value instead of R         subtract   R - value

    replace: a reward model has not seen unfinished text, so that its score means nothing there (Huang et al. 2024,
    detail 23, arXiv 2403.17031, with value -1). subtract: value is a penalty, at least 0, as in TRL; a reward that
    reads cut responses well keeps its say.
    """
    require(math.isfinite(value), f"value must be finite, not {value}")
    if rule == "replace":
        cut = torch.full_like(scores, value)
    elif rule == "subtract":
        require(value >= 0, f"value must be at least 0 to be subtracted, not {value}")
        cut = scores - value
    else:
        raise BadInput(f"rule must be replace or subtract, not {rule}")
    return torch.where(ended, scores, cut).detach()


def shape_rewards(
    kl: Float[Tensor, " n"], scores: Float[Tensor, " b"], lengths: Int[Tensor, " b"], kl_coef: float
) -> Float[Tensor, " n"]:
    """The reward of every token: r_t = -kl_coef kl_t, and at a sequence's last token R more.

    Ziegler et al. 2019, Eq. 2, arXiv 1909.08593. kl_coef, in reward per nat, is at least 0; it is 0 where the KL is in
    the loss. With kl = k1 a sequence's rewards add up to R - kl_coef log(pi / pi_ref), and the policy gradient is that
    of E[R] - kl_coef KL(pi || pi_ref). With the KL over the vocabulary, the same at a state whatever is sampled there,
    it lacks that of KL itself at the visited states, which the same KL in the loss, times kl_coef, adds. With k2 and
    k3 it is neither.
    """
    require(0 <= kl_coef < math.inf, f"kl_coef must be at least 0 and finite, not {kl_coef}")
    require(bool((lengths > 0).all()), "a sequence has no token, and so no last one for its score")
    rewards = -kl_coef * kl.detach()
    rewards[lengths.cumsum(0) - 1] += scores.detach().to(rewards.dtype)
    return rewards


def adaptive_kl_coef(kl_coef: float, kl: float, target: float, episodes: int, horizon: float) -> float:
    """The next KL coefficient: kl_coef (1 + clip(kl / target - 1, -0.2, 0.2) episodes / horizon).

    Ziegler et al. 2019, section 2.2, arXiv 1909.08593, with a target of 6 nats and a horizon of 10000 episodes. kl is
    the mean over the sequences of the last rollout, of which there were `episodes`; target > 0, nats a sequence. A KL
    that stays above 1.2 times the target multiplies the coefficient by about e^0.2 in a horizon, so where the horizon
    is far above a run's episodes nothing moves. It must be above episodes / 5, or the coefficient could become
    negative. All the controller's state is this number.
    """
    require(math.isfinite(kl), f"kl must be finite, not {kl}")
    require(0 < target < math.inf, f"target must be above 0 and finite, not {target}")
    require(episodes / 5 < horizon, f"horizon must be above episodes / 5 = {episodes / 5}, not {horizon}")
    return kl_coef * (1 + min(max(kl / target - 1, -0.2), 0.2) * episodes / horizon)


def whiten(x: Float[Tensor, "*shape"], shift_mean: bool = True) -> Float[Tensor, "*shape"]:
    """(x - mean) / sqrt(var + 1e-8) over all of x, with the biased variance; without shift_mean, plus the mean again.

    Ziegler et al. 2019's code: advantages with shift_mean, rewards without. Advantages: to whiten by the mean and
    deviation of the whole population keeps the direction of the expected gradient. Rewards: r_t becomes r_t / sd and
    the same constant for every token, by which length is paid or fined.
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
    """Generalised advantage estimates and the returns that the critic should learn, both without gradient:

        delta_t = r_t + gamma V_{t+1} - V_t          A_t = delta_t + gamma lam A_{t+1}          returns_t = A_t + V_t

    where V and A after the last token are 0. Schulman et al. 2015, Eq. 16, arXiv 1506.02438. values[i] is the critic's
    estimate before token i is chosen: from the hidden state that predicts it. With lam = 1 the mean of the policy
    gradient is exact whatever V is (for gamma = 1, too), with lam < 1 only where V is the policy's own.
    """
    require(0 <= gamma <= 1, f"gamma must be in [0, 1], not {gamma}")
    require(0 <= lam <= 1, f"lam must be in [0, 1], not {lam}")
    # rows that end in zeros: beyond a sequence's end reward and value are 0, and so are delta and A
    r, v = (pad_sequence(x.detach().split(lengths.tolist()), batch_first=True) for x in (rewards, values))
    advantages, later, next_value = torch.zeros_like(r), torch.zeros_like(r[:, 0]), torch.zeros_like(v[:, 0])
    for t in reversed(range(r.shape[1])):
        delta = r[:, t] + gamma * next_value - v[:, t]
        advantages[:, t] = later = delta + gamma * lam * later
        next_value = v[:, t]
    flat = advantages[torch.arange(r.shape[1], device=r.device) < lengths[:, None]]
    return flat, flat + values.detach()


def reinforce_pp(rewards: Float[Tensor, " n"], lengths: Int[Tensor, " b"]) -> Float[Tensor, " n"]:
    """REINFORCE++: A_t = sum over i >= t of r_i, whitened over all tokens of the batch.

    Hu 2025, arXiv 2501.03262, where rewards are `shape_rewards` with k1: A_t = R - kl_coef (sum over i >= t of k1_i)
    before whitening. For its variant with a baseline give R less its prompt's mean, and put k2 in the loss.
    """
    return whiten(gae(rewards, torch.zeros_like(rewards), lengths, gamma=1.0, lam=1.0)[0])


# ------------------------------------------------------------ advantages of whole responses, among k to the prompt
#
# R [p k] is the sum of a response's rewards: sequence_sums(shape_rewards(...), lengths). Its tokens all get the same A.
# What is said of means is said of the mean over k responses drawn from pi of A grad log pi(y), y the whole response.


def rloo(R: Float[Tensor, "p k"]) -> Float[Tensor, "p k"]:
    """REINFORCE leave-one-out: R_i less the mean of the other k - 1, that is (R_i - mean) k / (k - 1). k is at least 2.

    Kool et al. 2019 (openreview.net/forum?id=r1lgTGL5DE); Ahmadian et al. 2024, arXiv 2402.14740. Its mean is the
    exact gradient of E[R].
    """
    k = R.shape[1]
    require(k >= 2, f"rloo needs at least 2 responses a prompt, not {k}")
    return drgrpo(R) * (k / (k - 1))


def grpo(R: Float[Tensor, "p k"]) -> Float[Tensor, "p k"]:
    """Group-relative: (R_i - mean) / (sd + 1e-4), sd the sample's (k - 1 under the root). k is at least 2.

    Shao et al. 2024, section 4.1, arXiv 2402.03300; sd and 1e-4 as in TRL: rounding among equal rewards stays near 0.
    Its mean is not along the gradient of E[R], because each group is divided by its own sd. The method also averages
    over each response's tokens, and has k3 in the loss.
    """
    k = R.shape[1]
    require(k >= 2, f"grpo needs at least 2 responses a prompt, not {k}")
    return drgrpo(R) / (R.detach().std(1, keepdim=True) + 1e-4)


def drgrpo(R: Float[Tensor, "p k"]) -> Float[Tensor, "p k"]:
    """GRPO done right: R_i - mean, not divided by the deviation. k is at least 2.

    Liu et al. 2025 (Dr. GRPO), arXiv 2503.20783. Its mean is (k - 1) / k times the exact gradient of E[R], since R_i is
    part of its own baseline. The method divides a response's sum by a constant, not by its length.
    """
    R = R.detach()
    require(R.shape[1] >= 2, f"drgrpo needs at least 2 responses a prompt, not {R.shape[1]}")
    return R - R.mean(1, keepdim=True)


def remax(R: Float[Tensor, "p k"], greedy: Float[Tensor, " p"]) -> Float[Tensor, "p k"]:
    """ReMax: R_i less the reward of the prompt's greedy response, which is decoded once more and takes no gradient.

    Li et al. 2023, arXiv 2310.10505. Its mean is the exact gradient of E[R], for k = 1 too.
    """
    return R.detach() - rearrange(greedy.detach(), "p -> p 1")


# ------------------------------------------------------------------------------------------------------ diagnostics


def explained_variance(values: Float[Tensor, " n"], returns: Float[Tensor, " n"]) -> Float[Tensor, ""]:
    """1 - var(returns - V) / var(returns): the share of the returns' variance that the critic knew beforehand.

    Range (-inf, 1]: 1 is a perfect critic, 0 one that knows the mean at best. A variance below 1e-8 counts as 1e-8.
    """
    rest, total = (x.detach().var(correction=0) for x in (returns - values, returns))
    return 1 - rest / total.clamp(min=1e-8)
