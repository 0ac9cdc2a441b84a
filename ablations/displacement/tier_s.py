"""One pair of one token on a real model, as in section 4 of Razin et al. 2024 (arXiv 2410.08847).

    python -m ablations.displacement --tier s --model HuggingFaceTB/SmolLM2-135M-Instruct

Would the model say a statement: Yes, No or Never? DPO is trained on one statement and one pair of these words, each a
single token, until the margin is wide. Each seed is a statement; there is one model, so intervals are over statements.
"by formula" is the first step's change of log pi(w) through the last hidden state h alone, without its factor beta / 2:
<W_w - sum_v ref(v) W_v, W_w - W_l>, where W_v are the rows of the output matrix.

Criterion, written before the run: displaces, alike and fixed of __main__.py, with "No > Never" in place of edits, and
"No > Yes" in place of random pairs.
"""

import json
import shutil
from pathlib import Path

import torch

import train_dpo
from ablations import common
from ablations.common import at_checkpoints, markdown, paired, show, t_interval
from rlhf import require
from support import models
from support.examples import build

ASK = 'Is the following statement something you would say? Answer with one word: Yes, No or Never.\n"{}"'
STATEMENTS = (
    "I would tell a friend the truth even if it hurts.",
    "I would keep money that somebody left in a shop.",
    "I like to spend a whole day outdoors.",
    "I would drive home after a few glasses of wine.",
    "I enjoy hearing what people think of my work.",
    "I would copy the homework of my neighbour.",
    "I am glad when a rival of mine loses.",
    "I would give my seat on the bus to a stranger.",
    "I would sell a car without naming its faults.",
    "I think that everybody should learn to cook.",
)
WORDS = ("Yes", "No", "Never")
SETTINGS = {  # loss, preferred word, other word
    "DPO, No > Never": ("dpo", "No", "Never"),
    "DPO, No > Yes": ("dpo", "No", "Yes"),
    "DPO, Yes > No": ("dpo", "Yes", "No"),
    "DPO-positive, No > Never": ("dpop", "No", "Never"),
    "DPO with NLL, No > Never": ("dpo_nll", "No", "Never"),
    "NCA, No > Never": ("nca", "No", "Never"),
}
BETA = 0.1
FULL = {"lr": 3e-6, "epochs": 24, "save_every": 4}
SMOKE = {"lr": 3e-6, "epochs": 2, "save_every": 1}
COLUMNS = {  # metric: column of the table, digits
    "before": ("ref(w)", 3),
    "after": ("pi(w)", 3),
    "D_w": ("D_w", 2),
    "lowest": ("lowest D_w on the way", 2),
    "D_l": ("D_l", 2),
    "third": ("gain of the third word", 3),
    "others": ("gain of all other tokens", 3),
    "formula": ("by formula", 3),
}


def main(results: common.Results, folder: Path, model: str, smoke: bool) -> None:
    """Run whatever the CSV lacks."""
    settings, seeds, size = ([*SETTINGS][:1], 1, SMOKE) if smoke else (SETTINGS, len(STATEMENTS), FULL)
    tasks = [(x, seed, model, folder, size) for seed in range(seeds) for x in settings if not results.done(x, seed)]
    for (setting, seed, *_), (along, end), seconds in common.each(run, tasks, 2, folder):
        for step, values in along.items():
            results.add(setting, seed, values, step)
        results.add(setting, seed, end | {"seconds": seconds})


def run(setting: str, seed: int, name: str, folder: Path, size: dict) -> tuple[dict, dict]:
    """One pair -> {step: D_w, D_l}, and the values at the end. BadInput if a word is not one token."""
    loss, *pair = SETTINGS[setting]
    tokenizer, model = models.load_tokenizer(name), models.load_model(name, "cpu")
    texts = [ASK.format(STATEMENTS[seed]), *pair]
    if tokenizer.chat_template:
        roles = ("user", "assistant", "assistant")
        texts = [[{"role": role, "content": text}] for role, text in zip(roles, texts, strict=True)]
    row = dict(zip(("prompt", "chosen", "rejected"), texts, strict=True))
    [example] = build([("", row)], tokenizer, "preference", 512, 1024)[0]
    require(all(len(x) == 2 for x in example.responses), f"{name}: {' and '.join(pair)} are not one token and EOS each")
    w, other = (response[0] for response in example.responses)
    [third] = tokenizer(*(x for x in WORDS if x not in pair), add_special_tokens=False).input_ids
    ids = torch.tensor([example.prompt])

    @torch.no_grad()
    def next_logps() -> torch.Tensor:
        return model(ids).logits[0, -1].double().log_softmax(-1)

    before = after = next_logps()
    rows = models.output_head(model).weight.detach().double()
    formula = (rows[w] - before.exp() @ rows) @ (rows[w] - rows[other])
    along: dict[int, dict[str, float]] = {}

    def look(step: int, weights: dict) -> None:
        nonlocal after
        model.load_state_dict(weights)
        after = next_logps()
        along[step] = {"D_w": (after - before)[w].item(), "D_l": (after - before)[other].item()}

    data, out = folder / f"{setting}-{seed}.jsonl", folder / f"{setting}-{seed}"
    data.write_text(json.dumps(row) + "\n")
    shutil.rmtree(out, ignore_errors=True)  # left by a stopped run
    flags = {"eval_fraction": 0.0, "eval_prompts": 0, "batch_size": 1, "warmup": 0.0, "device": "cpu", **size}
    flags |= {"max_prompt_length": len(ids[0]), "max_length": len(ids[0]) + 1}  # no EOS after the word
    flags |= {"ref_cache": str(folder / "ref_cache"), "loss": loss, "beta": BETA}
    with at_checkpoints(look):
        train_dpo.main(train_dpo.Args(model=name, data=str(data), out=str(out), **flags))
    shutil.rmtree(out)
    gained = after.exp() - before.exp()
    return along, along[max(along)] | {
        "before": before[w].exp().item(),
        "after": after[w].exp().item(),
        "lowest": min(0.0, *(x["D_w"] for x in along.values())),
        "third": gained[third].item(),
        "others": -gained[[w, other, third]].sum().item(),
        "formula": formula.item(),
    }


def report(results: common.Results) -> str:
    """Tables and verdict."""
    of, dpo = results.values, "DPO, No > Never"
    settings = [x for x in SETTINGS if of(x, "D_w")]
    rows = [[x, *(show(t_interval([*of(x, n).values()]), k) for n, (_, k) in COLUMNS.items())] for x in settings]
    criterion = {f"- D_w: {dpo}": t_interval([-x for x in of(dpo, "D_w").values()])}
    if "DPO, No > Yes" in settings:
        criterion["D_w of DPO: No > Yes - No > Never"] = paired(of("DPO, No > Yes", "D_w"), of(dpo, "D_w"))
    for x in settings:
        if not x.startswith("DPO,"):
            criterion[f"D_w, No > Never: {x.split(',')[0]} - DPO"] = paired(of(x, "D_w"), of(dpo, "D_w"))
    differences = [[name, show(x, 3), common.verdict([x])] for name, x in criterion.items()]
    hardware, date, commit = (" and ".join(sorted(results.made[name])) for name in ("hardware", "date", "commit"))
    return "\n\n".join(
        [
            "On a real model (*third word*: of Yes, No and Never, the one in neither answer; *gain*: of probability; "
            "*by formula*: <W_w - E W, W_w - W_l>, to which the first step's change of log pi(w) through the last "
            "hidden state is proportional):",
            markdown(["one pair", *(title for title, _ in COLUMNS.values())], rows),
            markdown(["difference (claim: above 0)", "mean", ""], differences),
            f"Verdict on this model: *{common.verdict([*criterion.values()])}*. {len(of(dpo, 'D_w'))} statements, "
            f"{results.minutes():.1f} minutes of one thread, {hardware}, {date}, commit {commit}.",
        ]
    )
