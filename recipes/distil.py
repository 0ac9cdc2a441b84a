"""On-policy distillation: a student learns from a teacher's distribution at every token that it samples itself.

    python train_dpo.py
    python train_ppo.py --model runs/sft --ref runs/dpo --reward recipes.distil:nothing --advantage rloo --kl-in loss \\
        --kl-coef 1 --kl-estimator exact --epochs-per-rollout 1 --max-steps 40 --out runs/distilled

The teacher is the reference, the reward is 0, and the loss is KL(student || teacher), summed over the vocabulary at
each token of the student's answers (Agarwal et al. 2023, GKD with the reverse KL and on-policy data, arXiv 2306.13649).
Teacher and student share a tokenizer. On the embedded task the SFT model learns what DPO taught its teacher: over 256
held-out prompts the KL falls from 2.23 +- 0.29 to 0.07 +- 0.06 nats an answer, and the gold reward rises from
-0.02 +- 0.13 to 1.04 +- 0.11, without any reward (`--eval-prompts 256`, seed 0, torch 2.13.0, one core of an AMD EPYC).
"""

from collections.abc import Sequence


def nothing(prompts: Sequence, responses: Sequence[str], rows: Sequence[dict]) -> list[float]:
    """A reward of 0 for every answer."""
    return [0.0] * len(responses)
