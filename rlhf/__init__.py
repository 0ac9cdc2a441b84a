"""The mathematics that the scripts share: tensors in, tensors out. No file, flag, process or print.

    losses.py      one pure function per loss: SFT, the DPO family, reward ranking, PPO
    advantages.py  from scores and log-probs to advantages: KL estimators, reward shaping, GAE, group baselines
    logprobs.py    per-token log-probs from hidden states: the only place where logits and targets meet
    tree.py        a prompt with its k responses as one packed row, and the attention over it
    optim.py       AdamW for bfloat16 weights with exact float32 masters; kernels.py has its CUDA kernel

Axis letters, in signatures, einops patterns and comments (the attention in tree.py has its own: s segments, h heads, q
queries, k keys, and d for the size of a head):

    p  prompts                  t  tokens of a row
    k  responses of a prompt    n  response tokens laid flat, over all sequences
    b  sequences, b = p * k     v  vocabulary
    m  preference pairs         d  hidden size

Everything that touches a file, a flag or a process, or that loads a model, is in support/, which imports this package.
"""

import math
from collections.abc import Callable


class BadInput(ValueError):
    """The input cannot be used. The message is one line: what is wrong, where, and what to do."""


def require(holds: bool, message: str) -> None:
    """Raise BadInput with `message` unless `holds`."""
    if not holds:
        raise BadInput(message)


def ranges(groups: dict[str, tuple[Callable[[float], bool], str]]) -> dict[str, tuple[str, Callable[[float], bool]]]:
    """Turn {range in words: (test, names)} into {name: (range in words, test)}."""
    return {name: (words, test) for words, (test, names) in groups.items() for name in names.split()}


RANGES = ranges(  # the settings of losses.py and advantages.py; the scripts' flags have the same names
    {
        "above 0 and finite": (
            lambda x: 0 < x < math.inf,
            "beta clip clip_range clip_high value_clip kl_target sampler_cap",
        ),
        "at least 0 and finite": (
            lambda x: 0 <= x < math.inf,
            "length_penalty nll_coef dpop_lambda gamma_beta_ratio orpo_lambda desirable_weight undesirable_weight"
            " centring kl_coef",
        ),
        "at least 0 and finite, and not 1": (lambda x: 0 <= x < math.inf and x != 1, "divergence_alpha"),
        "in [0, 0.5)": (lambda x: 0 <= x < 0.5, "label_smoothing"),
        "in (0, 1]": (lambda x: 0 < x <= 1, "discopop_tau"),
        "in [0, 1]": (lambda x: 0 <= x <= 1, "gamma lam"),
        "finite": (math.isfinite, "delta kl missing_eos_value"),
    }
)


def check_ranges(**settings: float | None) -> None:
    """Raise BadInput for a setting outside its range in RANGES. None, where a function accepts it, is in range."""
    for name, value in settings.items():
        words, test = RANGES[name]
        require(value is None or test(value), f"{name} must be {words}, not {value}")
