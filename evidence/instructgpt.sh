#!/usr/bin/env bash
# InstructGPT (Ouyang et al. 2022, arXiv 2203.02155) whole, on a real model and a task whose true reward is known:
# two-digit sums. A program ranks in place of people, with noise.
#
#     bash evidence/instructgpt.sh [MODEL] [FOLDER]
set -euo pipefail
export OMP_NUM_THREADS=1 # as in the other runs: the minutes on the page are of one thread
cd "$(dirname "$0")/.."
MODEL=${1:-HuggingFaceTB/SmolLM2-135M-Instruct}
OUT=${2:-runs/evidence/instructgpt/full}

# demonstrations.jsonl, asked.jsonl, prompts.jsonl and test.jsonl: different sums
python -m evidence.instructgpt --folder "$OUT" --questions

# SFT, sample, rank
python train_sft.py --model "$MODEL" --data "$OUT/demonstrations.jsonl" --lr 2e-5 --batch-size 16 \
    --dtype bfloat16 --out "$OUT/sft"
python sample.py --model "$OUT/sft" --data "$OUT/asked.jsonl" --k 4 --max-new-tokens 24 --out "$OUT/samples.jsonl"
python annotate.py "$OUT/samples.jsonl" --by evidence.sums:close --noise 0.1 --out "$OUT/rankings.jsonl"

# reward model and PPO; or DPO
python train_rm.py --model "$OUT/sft" --data "$OUT/rankings.jsonl" --lr 3e-5 --batch-size 16 \
    --dtype bfloat16 --eval-fraction 0.1 --eval-prompts 32 --max-new-tokens 24 --out "$OUT/rm"
python train_ppo.py --model "$OUT/sft" --reward "$OUT/rm" --data "$OUT/prompts.jsonl" --lr 2e-5 --kl-coef 0.05 --k 4 \
    --dtype bfloat16 --batch-size 16 --max-steps 50 --epochs-per-rollout 1 --max-new-tokens 24 --out "$OUT/ppo"
python train_dpo.py --model "$OUT/sft" --data "$OUT/rankings.jsonl" --lr 2e-5 --beta 0.1 --batch-size 16 \
    --dtype bfloat16 --max-new-tokens 24 --ref-cache "$OUT/ref_cache" --out "$OUT/dpo"

# evaluate: the reward is 1 for a right answer, else 0
python evaluate.py --models "$OUT/sft" "$OUT/dpo" "$OUT/ppo" --data "$OUT/test.jsonl" --reward evidence.sums:correct \
    --eval-prompts 200 --max-new-tokens 24 --out "$OUT/evaluate"
python -m evidence.instructgpt --folder "$OUT" --seconds "$SECONDS"
rm -rf "$OUT"/*/checkpoint
