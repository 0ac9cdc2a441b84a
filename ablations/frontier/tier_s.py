"""The frontier on a real model, on a GPU: the settings of the small world, on film reviews; one seed, no optimum.

    python -m ablations.frontier --tier s --model HuggingFaceTB/SmolLM2-135M

The reviews are the embedded task's texts, with its gold reward and the model's own tokenizer. Reward and KL are
measured on one answer to each of 256 prompts held out by the hash of their text, with bootstrap intervals over them
(evaluate.py). There is no exact optimum and no interval over seeds, so this gives no verdict.
"""

import json
from pathlib import Path

import annotate
import evaluate
import sample
import train_dpo
import train_ppo
import train_rm
import train_sft
from ablations import common, world
from ablations.common import rows, write
from support.runs import is_made

FULL = {"texts": 20_000, "rows": 24_000, "asked": 4000, "held": 256, "batch": 64, "updates": 240, "tokens": 48}
SMOKE = {"texts": 60, "rows": 400, "asked": 40, "held": 8, "batch": 8, "updates": 8, "tokens": 8}
RATES = {train_sft: 2e-5, train_dpo: 5e-6, train_rm: 1e-5, train_ppo: 5e-6}


def main(settings: dict, model: str, smoke: bool) -> dict:
    """Train the missing runs of runs/ablations/frontier/tier-s, and compare all of them by evaluate.py."""
    size, out = SMOKE if smoke else FULL, Path("runs/ablations/frontier", "tier-s-smoke" if smoke else "tier-s")
    place = lambda name: str(out / name)  # noqa: E731
    texts = write(out / "texts.jsonl", rows("sft", size["texts"], 0))
    asked, others = common.prompts(size["rows"])
    prompts = write(out / "prompts.jsonl", [e.row for e in asked[: size["asked"]]])
    held = write(out / "held.jsonl", [e.row for e in others[: size["held"]]])

    def train(script, name: str, **flags) -> None:
        """Train `name` unless it is done; resume it if it was begun."""
        if not is_made(place(name)):
            resume = (out / name / "args.json").exists()
            flags = {"model": place("sft"), "lr": RATES[script], "batch_size": size["batch"], "eval_prompts": 0} | flags
            script.main(script.Args(out=place(name), resume=resume, **flags))

    train(train_sft, "sft", model=model, data=texts, max_steps=size["updates"])
    samples, rankings = out / "samples.jsonl", out / "rankings.jsonl"
    if not rankings.exists():
        flags = {"data": prompts, "k": 4, "max_new_tokens": size["tokens"], "resume": samples.exists()}
        sample.main(sample.Args(model=place("sft"), out=str(samples), **flags))
        annotate.main(annotate.Args(str(samples), out=str(rankings), by="gold", noise=0.0))
    chosen = write(out / "chosen.jsonl", world.chosen(map(json.loads, open(rankings))))
    train(train_rm, "rm", data=str(rankings), eval_fraction=0.0)
    for setting, (script, flags) in settings.items():
        if script is None:
            continue
        flags = {"max_steps": size["updates"]} | flags
        if script is train_ppo:  # each update is on new answers, as in the small world
            gold = "gold" in setting
            flags |= {"reward": "gold" if gold else place("rm"), "value_init": "zero" if gold else "reward"}
            flags |= {"batch_size": 4 * size["batch"], "minibatches": 4, "epochs_per_rollout": 1, "data": prompts}
            flags |= {"max_steps": size["updates"] // 4, "max_new_tokens": size["tokens"], "critic_lr": RATES[train_rm]}
        elif script is train_sft:  # a batch is the preferred answers of the 6 pairs of each ranking
            flags |= {"data": chosen, "batch_size": 6 * size["batch"], "eval_fraction": 0.0}
        else:
            flags |= {"data": str(rankings), "eval_fraction": 0.0}
        train(script, setting.replace(" ", "-"), **flags)

    names = [place(x.replace(" ", "-")) for x, (script, _) in settings.items() if script]
    flags = {"data": held, "reward": "gold", "eval_prompts": size["held"], "max_new_tokens": size["tokens"]}
    flags |= {"out": place("evaluate"), "resume": (out / "evaluate" / "args.json").exists()}
    return evaluate.main(evaluate.Args(models=(place("sft"), *names), **flags))
