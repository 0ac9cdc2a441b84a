"""Losses, one value per example (PPO: per token); scripts divide a step's sum by its tokens, prompts or answers.

Notation; log-probabilities are in nats, summed over a response's tokens, including the end-of-sequence token (EOS):

    lp    log pi(y|x), from the policy                       w, l  the chosen and the rejected response of a pair
    D     log pi(y|x) - log pi_ref(y|x), the log-ratio, or   h     D_w - D_l, the margin
          what `implicit_reward` returns in its place        n     a response's length in tokens, at least 1
    beta  above 0, reward per nat: the reward is beta D      s     the logistic sigmoid

Gradient flows to every log-probability, log-ratio and reward, but not to lengths, labels, z0 or delta; the caller
scores the reference without gradient. Results have the dtype of the log-probabilities. Every loss and its gradient stay
finite for |D| up to 1e4. A setting outside its range raises BadInput (a ValueError) that names it.

Unchanged if D_w and D_l shift by the same amount: dpo, robust, ipo, hinge, r_dpo, exo, discopop, plackett_luce.
A single finite margin or reward is best: dpo with label smoothing, ipo, ipo_norm, exo, sppo, nca (only r_w).
"""

import math

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor

from rlhf import BadInput, check_ranges, require

MAX_EXPONENT = 20.0  # exp(20) = 4.9e8; above it exp is replaced by a constant, or by its tangent in `_ratio`


def implicit_reward(
    policy_logps: Float[Tensor, "*shape"],
    ref_logps: Float[Tensor, "*shape"],
    divergence: str = "reverse_kl",
    divergence_alpha: float = 0.5,
) -> Float[Tensor, "*shape"]:
    """The implicit reward, divided by beta, of a policy that an f-divergence penalty keeps close to the reference.

    A policy that maximises E[r] - beta * (f-divergence from pi_ref) has r / beta = f'(u) - f'(1) wherever pi > 0, up to
    a constant per prompt (pi can be 0 only for alpha with a > 1). f is the generator, and u = pi / pi_ref = exp(D):

        reverse_kl  D                      forward_kl  1 - exp(-D)            chi_po  exp(D) - 1 + D
        js          log(2 u / (1 + u))     alpha       (exp((a - 1) D) - 1) / (a - 1),  a = divergence_alpha

    Wang et al. 2023 (f-DPO), arXiv 2309.16240; Huang et al. 2024 (chi-PO), arXiv 2407.13399. divergence_alpha is at
    least 0 and not 1, and is 1 minus f-DPO's alpha: 0 is forward_kl, values near 1 approach reverse_kl, 2 is
    chi-squared. Exponents are capped at MAX_EXPONENT, above which the exponential passes no gradient; below that the
    result increases with D. Gradient flows to both arguments. Raises BadInput for any other divergence.
    """
    D = policy_logps - ref_logps
    if divergence == "reverse_kl":
        return D
    if divergence == "forward_kl":
        return -torch.expm1((-D).clamp(max=MAX_EXPONENT))
    if divergence == "js":
        return F.logsigmoid(D) + math.log(2)
    if divergence == "alpha":
        check_ranges(divergence_alpha=divergence_alpha)
        return torch.expm1(((divergence_alpha - 1) * D).clamp(max=MAX_EXPONENT)) / (divergence_alpha - 1)
    if divergence == "chi_po":
        return torch.expm1(D.clamp(max=MAX_EXPONENT)) + D
    raise BadInput(f"divergence must be reverse_kl, forward_kl, js, alpha or chi_po, not {divergence}")


def sft(response_logps: Float[Tensor, " b"]) -> Float[Tensor, " b"]:
    """Negative log-likelihood of a response, summed over its trained tokens: -lp. Range [0, inf).

    The script divides the step's sum by the step's number of trained tokens, so every token weighs the same.
    """
    return -response_logps


def dpo(
    chosen_logratios: Float[Tensor, " m"],
    rejected_logratios: Float[Tensor, " m"],
    beta: float,
    label_smoothing: float = 0.0,
    clip: float | None = None,
) -> Float[Tensor, " m"]:
    """Direct preference optimisation: -(1 - e) log s(z) - e log s(-z), z = beta h, e = label_smoothing in [0, 0.5).

    Rafailov et al. 2023, Eq. 7, arXiv 2305.18290. e > 0 is conservative DPO (Mitchell 2023, Eq. 3,
    ericmitchell.ai/cdpo.pdf), which assumes that a label is wrong with probability e; its minimum, the label's entropy,
    is at z = log((1 - e) / e). `clip` limits z to [-clip, clip]; a pair outside gets no gradient. chi-PO sets it to
    twice the largest reward, 2 R_max (Huang et al. 2024, arXiv 2407.13399). Range (0, inf); ln 2 at h = 0 for every e.
    Gradient in h: -beta (1 - e - s(z)).
    """
    check_ranges(beta=beta, label_smoothing=label_smoothing, clip=clip)
    margin = beta * (chosen_logratios - rejected_logratios)
    if clip is not None:
        margin = margin.clamp(-clip, clip)
    return -(1 - label_smoothing) * F.logsigmoid(margin) - label_smoothing * F.logsigmoid(-margin)


def robust(
    chosen_logratios: Float[Tensor, " m"], rejected_logratios: Float[Tensor, " m"], beta: float, label_smoothing: float
) -> Float[Tensor, " m"]:
    """DPO unbiased under label noise: (-(1 - e) log s(z) + e log s(-z)) / (1 - 2 e), z = beta h, e = label_smoothing.

    Chowdhury et al. 2024, arXiv 2403.00409. If labels are flipped with probability e in [0, 0.5), the expected loss is
    DPO's loss on the clean labels. Gradient in h: -beta (s(-z) + e / (1 - 2 e)), never 0 if e > 0. Range
    (-inf, inf) if e > 0; ln 2 at h = 0 for every e.
    """
    check_ranges(beta=beta, label_smoothing=label_smoothing)
    margin = beta * (chosen_logratios - rejected_logratios)
    clean, flipped = -F.logsigmoid(margin), -F.logsigmoid(-margin)
    return ((1 - label_smoothing) * clean - label_smoothing * flipped) / (1 - 2 * label_smoothing)


def ipo(
    chosen_logratios: Float[Tensor, " m"], rejected_logratios: Float[Tensor, " m"], beta: float
) -> Float[Tensor, " m"]:
    """Identity preference optimisation on summed log-ratios: (h - 1 / (2 beta))^2; beta is the paper's tau.

    Azar et al. 2023, Eq. 17, arXiv 2310.12036. Range [0, inf) nats^2: 0 at h = 1 / (2 beta), 1 / (4 beta^2) at h = 0.
    """
    check_ranges(beta=beta)
    return (chosen_logratios - rejected_logratios - 1 / (2 * beta)).square()


def ipo_norm(
    chosen_logratios: Float[Tensor, " m"],
    rejected_logratios: Float[Tensor, " m"],
    chosen_lengths: Int[Tensor, " m"],
    rejected_lengths: Int[Tensor, " m"],
    beta: float,
) -> Float[Tensor, " m"]:
    """IPO on log-ratios per token: (D_w / n_w - D_l / n_l - 1 / (2 beta))^2. It needs a different beta than `ipo`.

    Azar et al. 2023, Eq. 17, arXiv 2310.12036, per token as in TRL. Range [0, inf); 1 / (4 beta^2) at D = 0.
    """
    return ipo(chosen_logratios / chosen_lengths, rejected_logratios / rejected_lengths, beta)


def hinge(
    chosen_logratios: Float[Tensor, " m"], rejected_logratios: Float[Tensor, " m"], beta: float
) -> Float[Tensor, " m"]:
    """Hinge loss on the normalised likelihood: max(0, 1 - beta h). The gradient is 0 once beta h >= 1.

    Liu et al. 2023 (RSO), arXiv 2309.06657; beta is their gamma. Range [0, inf); 1 at h = 0.
    """
    check_ranges(beta=beta)
    return F.relu(1 - beta * (chosen_logratios - rejected_logratios))


def dpo_norm(
    chosen_logratios: Float[Tensor, " m"],
    rejected_logratios: Float[Tensor, " m"],
    chosen_lengths: Int[Tensor, " m"],
    rejected_lengths: Int[Tensor, " m"],
    beta: float,
) -> Float[Tensor, " m"]:
    """DPO on log-ratios per token: -log s(beta (D_w / n_w - D_l / n_l)).

    Lambert et al. 2024 (Tulu 3), arXiv 2411.15124, with beta 5. Range (0, inf); ln 2 at D = 0.
    """
    return dpo(chosen_logratios / chosen_lengths, rejected_logratios / rejected_lengths, beta)


def r_dpo(
    chosen_logratios: Float[Tensor, " m"],
    rejected_logratios: Float[Tensor, " m"],
    chosen_lengths: Int[Tensor, " m"],
    rejected_lengths: Int[Tensor, " m"],
    beta: float,
    length_penalty: float,
) -> Float[Tensor, " m"]:
    """Length-regularised DPO: -log s(beta h + length_penalty (n_w - n_l)), length_penalty >= 0 in reward per token.

    Park et al. 2024, arXiv 2403.19159. If the chosen response is the longer one, its length is taken to explain part of
    the preference, so the pair gets a smaller gradient. Range (0, inf); -log s(length_penalty (n_w - n_l)) at h = 0.
    """
    check_ranges(beta=beta, length_penalty=length_penalty)
    margin = beta * (chosen_logratios - rejected_logratios) + length_penalty * (chosen_lengths - rejected_lengths)
    return -F.logsigmoid(margin)


def dpop(
    chosen_logratios: Float[Tensor, " m"], rejected_logratios: Float[Tensor, " m"], beta: float, dpop_lambda: float
) -> Float[Tensor, " m"]:
    """DPO-positive, which penalises a chosen response that becomes less likely than under the reference:

        -log s(beta (h - dpop_lambda max(0, -D_w)))

    Pal et al. 2024 (Smaug), arXiv 2402.13228, with dpop_lambda 50 (>= 0; 0 is DPO). Range (0, inf); ln 2 at D = 0.
    """
    check_ranges(beta=beta, dpop_lambda=dpop_lambda)
    return -F.logsigmoid(beta * (chosen_logratios - rejected_logratios - dpop_lambda * F.relu(-chosen_logratios)))


def dpo_nll(
    chosen_logratios: Float[Tensor, " m"],
    rejected_logratios: Float[Tensor, " m"],
    chosen_logps: Float[Tensor, " m"],
    chosen_lengths: Int[Tensor, " m"],
    beta: float,
    nll_coef: float,
) -> Float[Tensor, " m"]:
    """DPO plus the chosen response's negative log-likelihood per token: -log s(beta h) - nll_coef lp_w / n_w.

    Pang et al. 2024 (Iterative RPO), arXiv 2404.19733, with nll_coef 1. nll_coef >= 0. Range (0, inf);
    ln 2 - nll_coef lp_w / n_w at h = 0.
    """
    check_ranges(nll_coef=nll_coef)
    return dpo(chosen_logratios, rejected_logratios, beta) - nll_coef * chosen_logps / chosen_lengths


def exo(
    chosen_logratios: Float[Tensor, " m"], rejected_logratios: Float[Tensor, " m"], beta: float, label_smoothing: float
) -> Float[Tensor, " m"]:
    """Efficient exact optimisation: q log(q / (1 - e)) + (1 - q) log((1 - q) / e), q = s(beta h), e = label_smoothing.

    Ji et al. 2024, arXiv 2402.00856. This is KL(q || label); conservative DPO minimises KL(label || q). e is in
    (0, 0.5); e = 0 would make the loss infinite. Range [0, -log e): 0 at q = 1 - e, -log(4 e (1 - e)) / 2 at h = 0.
    """
    check_ranges(beta=beta, label_smoothing=label_smoothing)
    require(label_smoothing > 0, "label_smoothing must be above 0 for exo: a certain label makes the loss infinite")
    margin = beta * (chosen_logratios - rejected_logratios)
    label_right = margin.sigmoid() * (F.logsigmoid(margin) - math.log1p(-label_smoothing))
    label_wrong = (-margin).sigmoid() * (F.logsigmoid(-margin) - math.log(label_smoothing))
    return label_right + label_wrong


def nca(
    chosen_logratios: Float[Tensor, " m"], rejected_logratios: Float[Tensor, " m"], beta: float
) -> Float[Tensor, " m"]:
    """Noise-contrastive alignment on pairs: -log s(r_w) - log s(-r_w) / 2 - log s(-r_l) / 2, r = beta D.

    Chen et al. 2024, arXiv 2402.05369. The optimal chosen reward is finite, r_w = ln 2; the rejected reward is always
    pushed down. Range (log(27 / 4) / 2, inf); 2 ln 2 at D = 0.
    """
    check_ranges(beta=beta)
    chosen, rejected = beta * chosen_logratios, beta * rejected_logratios
    return -F.logsigmoid(chosen) - 0.5 * F.logsigmoid(-chosen) - 0.5 * F.logsigmoid(-rejected)


def apo_zero(
    chosen_logratios: Float[Tensor, " m"], rejected_logratios: Float[Tensor, " m"], beta: float
) -> Float[Tensor, " m"]:
    """Anchored preference optimisation, zero: 1 - s(beta D_w) + s(beta D_l). It raises chosen and lowers rejected.

    D'Oosterlinck et al. 2024, arXiv 2408.06266, for chosen responses better than the model's. Range (0, 2); 1 at D = 0.
    """
    check_ranges(beta=beta)
    return (-beta * chosen_logratios).sigmoid() + (beta * rejected_logratios).sigmoid()


def apo_down(
    chosen_logratios: Float[Tensor, " m"], rejected_logratios: Float[Tensor, " m"], beta: float
) -> Float[Tensor, " m"]:
    """Anchored preference optimisation, down: s(beta D_w) + 1 - s(beta h). It lowers both, rejected further.

    D'Oosterlinck et al. 2024, arXiv 2408.06266, for chosen responses worse than the model's. Range (0, 2); 1 at D = 0.
    """
    check_ranges(beta=beta)
    return (beta * chosen_logratios).sigmoid() + (-beta * (chosen_logratios - rejected_logratios)).sigmoid()


def bco(
    chosen_logratios: Float[Tensor, " m"], rejected_logratios: Float[Tensor, " m"], beta: float, delta: float = 0.0
) -> Float[Tensor, " m"]:
    """Binary classifier optimisation on pairs: -log s(r_w - delta) - log s(-(r_l - delta)), r = beta D.

    Jung et al. 2024, arXiv 2404.04656. delta, in units of reward, is the running mean reward, which the script
    keeps. Range (0, inf); 2 ln 2 at D = 0 with delta = 0.
    """
    check_ranges(beta=beta, delta=delta)
    return -F.logsigmoid(beta * chosen_logratios - delta) - F.logsigmoid(delta - beta * rejected_logratios)


def sppo(
    chosen_logratios: Float[Tensor, " m"], rejected_logratios: Float[Tensor, " m"], beta: float
) -> Float[Tensor, " m"]:
    """Self-play preference optimisation with hard labels: (D_w - 1 / (2 beta))^2 + (D_l + 1 / (2 beta))^2.

    Wu et al. 2024, arXiv 2405.00675; 1 / beta is their eta. Range [0, inf) nats^2; 1 / (2 beta^2) at D = 0.
    """
    check_ranges(beta=beta)
    return (chosen_logratios - 1 / (2 * beta)).square() + (rejected_logratios + 1 / (2 * beta)).square()


def discopop(
    chosen_logratios: Float[Tensor, " m"], rejected_logratios: Float[Tensor, " m"], beta: float, discopop_tau: float
) -> Float[Tensor, " m"]:
    """Discovered preference optimisation: (1 - g) (-log s(z)) + g exp(-z), z = beta h, gate g = s(z / discopop_tau).

    Lu et al. 2024, arXiv 2406.08414, with discopop_tau 0.05. Not convex. discopop_tau is in (0, 1]; above 1, exp(-z)
    would grow faster than its gate g shrinks as z falls. Range (0, inf); (ln 2 + 1) / 2 at h = 0.
    """
    check_ranges(beta=beta, discopop_tau=discopop_tau)
    margin = beta * (chosen_logratios - rejected_logratios)
    gated_exp = (F.logsigmoid(margin / discopop_tau) - margin).exp()  # g exp(-z) as one exponential cannot overflow
    return -(-margin / discopop_tau).sigmoid() * F.logsigmoid(margin) + gated_exp


def simpo(
    chosen_logps: Float[Tensor, " m"],
    rejected_logps: Float[Tensor, " m"],
    chosen_lengths: Int[Tensor, " m"],
    rejected_lengths: Int[Tensor, " m"],
    beta: float,
    gamma_beta_ratio: float,
) -> Float[Tensor, " m"]:
    """Simple preference optimisation, without a reference: -log s(beta (lp_w / n_w - lp_l / n_l - gamma_beta_ratio)).

    Meng et al. 2024, arXiv 2405.14734, with beta 2 to 10 and gamma_beta_ratio (at least 0, nats per token) 0.1 to 0.8;
    their gamma is beta * gamma_beta_ratio. Range (0, inf); log(1 + exp(gamma)) if lp_w / n_w = lp_l / n_l.
    """
    check_ranges(beta=beta, gamma_beta_ratio=gamma_beta_ratio)
    return -F.logsigmoid(beta * (chosen_logps / chosen_lengths - rejected_logps / rejected_lengths - gamma_beta_ratio))


def orpo(
    chosen_logps: Float[Tensor, " m"],
    rejected_logps: Float[Tensor, " m"],
    chosen_lengths: Int[Tensor, " m"],
    rejected_lengths: Int[Tensor, " m"],
    orpo_lambda: float,
) -> Float[Tensor, " m"]:
    """Odds-ratio preference optimisation, without a reference and with the SFT loss included:

        -a_w - orpo_lambda log s(o_w - o_l),   a = lp / n,   log-odds o = a - log(1 - exp(a))

    Hong et al. 2024, arXiv 2403.07691, with orpo_lambda 0.1. orpo_lambda >= 0. In the log-odds, a is capped at -eps of
    the dtype and passes no gradient above that. Range (0, inf); -a_w + orpo_lambda ln 2 if a_w = a_l.
    """
    check_ranges(orpo_lambda=orpo_lambda)
    chosen, rejected = chosen_logps / chosen_lengths, rejected_logps / rejected_lengths
    return -chosen - orpo_lambda * F.logsigmoid(_log_odds(chosen) - _log_odds(rejected))


def _log_odds(mean_logps: Float[Tensor, " m"]) -> Float[Tensor, " m"]:
    mean_logps = mean_logps.clamp(max=-torch.finfo(mean_logps.dtype).eps)
    return mean_logps - (-mean_logps.expm1()).log()


def kto(
    logratios: Float[Tensor, " b"],
    labels: Bool[Tensor, " b"],
    z0: Float[Tensor, ""],
    beta: float,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> Float[Tensor, " b"]:
    """Kahneman-Tversky optimisation, per completion: weight s(-g) if desirable, else weight s(g), g = beta (D - z0).

    Ethayarajh et al. 2024, arXiv 2402.01306. labels: True is desirable. z0: from `kto_z0`, in nats, without gradient.
    Weights are at least 0. Range (0, weight); half the weight at D = z0.
    """
    check_ranges(beta=beta, desirable_weight=desirable_weight, undesirable_weight=undesirable_weight)
    gain = beta * (logratios - z0.detach())
    return torch.where(labels, desirable_weight * (-gain).sigmoid(), undesirable_weight * gain.sigmoid())


def kto_z0(mismatched_logratios: Float[Tensor, " b"]) -> Float[Tensor, ""]:
    """KTO's reference point, an estimate of KL(pi || pi_ref) in nats: max(0, mean of D), without gradient.

    Ethayarajh et al. 2024, arXiv 2402.01306. mismatched_logratios: D of each prompt with another prompt's completion,
    over the whole optimizer step, at least one.
    """
    return mismatched_logratios.detach().mean().clamp(min=0)


def plackett_luce(rewards: Float[Tensor, "p k"], ranks: Int[Tensor, "p k"]) -> Float[Tensor, " p"]:
    """Negative log-probability of a ranking: sum over i of log(sum over j of exp(r_j - r_i)), j = i or ranked below i.

    Rafailov et al. 2023, appendix A.3, arXiv 2305.18290. With r = beta D it is DPO on rankings, and equals `dpo` at
    k = 2; with a reward model's scores it trains that model. ranks: 1 is best, without ties; 0 pads a prompt with fewer
    than k responses. Only differences of rewards matter. Range [0, inf); log k! if all rewards are equal.
    """
    no_better = (rearrange(ranks, "p i -> p i 1") <= rearrange(ranks, "p j -> p 1 j")) & (ranks > 0)[:, :, None]
    no_better |= torch.eye(ranks.shape[1], dtype=torch.bool, device=ranks.device)  # a missing response adds log 1
    rewards_j = torch.where(no_better, rearrange(rewards, "p j -> p 1 j"), -math.inf)
    return (rewards_j.logsumexp(2) - rewards).sum(1)


def reward_ranking(
    rewards: Float[Tensor, "p k"],
    ranks: Int[Tensor, "p k"],
    margins: Float[Tensor, " p"] | None = None,
    centring: float = 0.0,
) -> Float[Tensor, " p"]:
    """Reward ranking loss over all pairs of a prompt's k responses in which i is ranked better than j:

        1 / C(k, 2) * sum over pairs of [ -log s(r_i - r_j - margin) + centring (r_i + r_j)^2 ]

    Ouyang et al. 2022, Eq. 1, arXiv 2203.02155; at k = 2 it is Bradley and Terry's (1952), as in Stiennon et
    al. 2020, arXiv 2009.01325. margins, default none: how much better annotators found i than j (Touvron et
    al. 2023, section 3.2.2, arXiv 2307.09288). centring, at least 0: keeps the mean reward near 0 (Eisenstein et
    al. 2023, arXiv 2312.09244). ranks: 1 is best; a tied pair adds nothing; 0 pads a prompt with fewer than k
    responses, and C(k, 2) counts real ones only. Without centring, only differences of rewards matter. Range [0, inf);
    ln 2 at r = 0 without ties and margin.
    """
    check_ranges(centring=centring)
    better = (rearrange(ranks, "p i -> p i 1") < rearrange(ranks, "p j -> p 1 j")) & (ranks > 0)[:, :, None]
    gaps = rearrange(rewards, "p i -> p i 1") - rearrange(rewards, "p j -> p 1 j")
    if margins is not None:
        gaps = gaps - rearrange(margins, "p -> p 1 1")
    sums = rearrange(rewards, "p i -> p i 1") + rearrange(rewards, "p j -> p 1 j")
    losses = torch.where(better, -F.logsigmoid(gaps) + centring * sums.square(), 0.0)
    k = (ranks > 0).sum(1)
    return losses.sum((1, 2)) / (k * (k - 1) / 2).clamp(min=1).to(losses.dtype)


def best_of_k(rewards: Float[Tensor, "p k"], ranks: Int[Tensor, "p k"]) -> Float[Tensor, " p"]:
    """Cross-entropy of the best of k responses: log(sum over j of exp(r_j)) - r_best, averaged over tied best ones.

    Ziegler et al. 2019, Eq. 1, arXiv 1909.08593. ranks as in `reward_ranking`, at least one not 0; the order below the
    best is not used. Only differences of rewards matter. Range [0, inf); log k if all rewards are equal.
    """
    best_rank = ranks.masked_fill(ranks == 0, torch.iinfo(ranks.dtype).max).amin(1, keepdim=True)
    best = (ranks == best_rank).to(rewards.dtype)
    log_total = torch.where(ranks > 0, rewards, -math.inf).logsumexp(1)
    return log_total - (best * rewards).sum(1) / best.sum(1)


# ---------------------------------------------------------------------------------------------------------------- PPO
#
# One value for each token that an earlier policy pi_old sampled; ratio = pi / pi_old = exp(logps - old_logps). Gradient
# flows to logps and values, but not to old_logps, old_values, advantages or returns.


def _ratio(logps: Float[Tensor, " n"], old_logps: Float[Tensor, " n"]) -> Float[Tensor, " n"]:
    """exp(x), x = logps - old_logps; above MAX_EXPONENT its tangent there, which stays finite and keeps a slope."""
    x = logps - old_logps.detach()
    return x.clamp(max=MAX_EXPONENT).exp() * (1 + F.relu(x - MAX_EXPONENT))


def ppo_clip(
    logps: Float[Tensor, " n"],
    old_logps: Float[Tensor, " n"],
    advantages: Float[Tensor, " n"],
    clip_range: float,
    clip_high: float | None = None,
) -> Float[Tensor, " n"]:
    """Clipped surrogate objective: max(-A ratio, -A clip(ratio, 1 - clip_range, 1 + clip_high)), A = advantages.

    Schulman et al. 2017, Eq. 7, arXiv 1707.06347, with 0.2 on both sides; clip_high is clip_range by default, and 0.28
    in DAPO (Yu et al. 2025, arXiv 2503.14476), so that an unlikely token can grow further. Gradient to logps: -A ratio,
    the policy gradient at ratio = 1, and exactly 0 for a token that is `clipped`. Above exp(MAX_EXPONENT) the ratio
    continues as a straight line, so loss and gradient stay finite for log-ratios up to 1e4. The loss is -A at ratio =
    1. Range [-A (1 + clip_high), 0) for A > 0; at least -A (1 - clip_range) and unbounded above for A < 0.

    Given each response's `sequence_means` (rlhf/advantages.py) in place of logps and old_logps it is GSPO (Zheng et
    al. 2025, section 4, arXiv 2507.18071, clipped at 3e-4 and 4e-4): the ratio is exp(mean log-ratio of the response).
    GSPO averages a response's values over its tokens, which divides its gradient by its length. So even at ratio = 1
    that is not the policy gradient unless all responses are equally long; the gradient of their sum is.
    """
    check_ranges(clip_range=clip_range, clip_high=clip_high)
    A, ratio = advantages.detach(), _ratio(logps, old_logps)
    high = clip_range if clip_high is None else clip_high
    return torch.maximum(-A * ratio, -A * ratio.clamp(1 - clip_range, 1 + high))


def clipped(
    logps: Float[Tensor, " n"],
    old_logps: Float[Tensor, " n"],
    advantages: Float[Tensor, " n"],
    clip_range: float,
    clip_high: float | None = None,
) -> Bool[Tensor, " n"]:
    """Which tokens `ppo_clip` clips: ratio > 1 + clip_high with A > 0, or ratio < 1 - clip_range with A < 0.

    Such a token has moved as far as its advantage allows: its gradient is 0. The mean is `policy/clipfrac`.
    """
    check_ranges(clip_range=clip_range, clip_high=clip_high)
    ratio = _ratio(logps.detach(), old_logps)
    high = clip_range if clip_high is None else clip_high
    return (advantages > 0) & (ratio > 1 + high) | (advantages < 0) & (ratio < 1 - clip_range)


def cispo(
    logps: Float[Tensor, " n"], old_logps: Float[Tensor, " n"], advantages: Float[Tensor, " n"], clip_high: float
) -> Float[Tensor, " n"]:
    """CISPO: -A min(ratio, 1 + clip_high) logps, in which the ratio is a weight without gradient.

    Chen et al. 2025 (MiniMax-M1), arXiv 2506.13585; without a lower bound, as there. Gradient to logps:
    -A min(ratio, 1 + clip_high), which is that of the unclipped surrogate except where the ratio is capped. No token's
    gradient is cut to 0, not even that of a rare token that turns a response. At ratio = 1 it is the policy gradient.
    """
    check_ranges(clip_high=clip_high)
    return -advantages.detach() * _ratio(logps.detach(), old_logps).clamp(max=1 + clip_high) * logps


def value_loss(
    values: Float[Tensor, " n"],
    old_values: Float[Tensor, " n"],
    returns: Float[Tensor, " n"],
    value_clip: float | None = None,
) -> Float[Tensor, " n"]:
    """The critic's loss: max((V - G)^2, (clip(V, V_old - value_clip, V_old + value_clip) - G)^2) / 2, G = returns.

    Ziegler et al. 2019, in their code, arXiv 1909.08593, with value_clip 0.2 in units of reward; None does not clip.
    Gradient to values: V - G, but exactly 0 if V is more than value_clip from V_old and closer to G than the clipped
    value. Range [0, inf), in squared units of reward.
    """
    check_ranges(value_clip=value_clip)
    returns, old_values = returns.detach(), old_values.detach()
    error = (values - returns).square()
    if value_clip is not None:
        near = values.clamp(old_values - value_clip, old_values + value_clip)
        error = torch.maximum(error, (near - returns).square())
    return error / 2
