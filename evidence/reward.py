"""Does a reward model on a real model learn which of two arguments people find more convincing?

    python -m evidence.reward --data prefs_ukp_convincing_args.jsonl.gz

UKPConvArg1 (Habernal and Gurevych 2016): five people said which of two arguments for one side of a debate convinces
more. `split_arguments` in common.py makes three parts by debate: for this reward model, for the policies of
preferences.py, and for the test of both. The learning rate is the one with the best accuracy on a further debate, and
then has three seeds. Intervals are over the topics, a debate's sides, of the test.
Learned: with seed 0 the accuracy's whole 95 % interval is above 0.5, and that of its lead over "longer wins" above 0.
"""

from pathlib import Path

import torch

import train_rm
from ablations import common
from evidence.common import (
    LONGEST,
    Args,
    begin,
    best,
    csv_of,
    fill,
    finish,
    on_pairs,
    pair_measures,
    read_pairs,
    response_logps,
    trained,
    with_half,
    write_arguments,
)
from support import models
from support.runs import cli

NAME = "reward"
LRS = {"lr 3e-06": 3e-6, "lr 1e-05": 1e-5, "lr 3e-05": 3e-5}
SIZES = {"reward": 2000, "reward_valid": 200, "test": 600}
SEEDS = 3


def main(a: Args) -> None:
    """Run what reward.csv lacks, then write page and figure."""
    results, folder = begin(NAME, a)
    write_arguments(a, folder, SIZES)
    fill(results, run, ["untrained", *([*LRS][:1] if a.short else LRS)], [0], a, folder)
    fill(results, run, [best(results, LRS)], range(1, 1 if a.short else SEEDS), a, folder)
    finish(NAME, a, results)


def run(setting: str, seed: int, a: Args, folder: Path) -> tuple[dict[str, float], list[dict]]:
    """`pair_measures` on the test. Untrained: the reward is the argument's mean log-prob a token."""
    if setting == "untrained":
        tokenizer = models.load_tokenizer(a.model)
        examples = read_pairs(folder / "test.jsonl", tokenizer)
        logps = response_logps(a.model, examples, tokenizer, a)
        values = pair_measures(examples, [x / torch.tensor(e.lengths) for x, e in zip(logps, examples, strict=True)])
        return values, []
    out = folder / f"{setting}-{seed}"
    flags = {"data": str(folder / "reward.jsonl"), "eval_data": str(folder / "reward_valid.jsonl"), "lr": LRS[setting]}
    flags |= {"max_prompt_length": LONGEST - 1, "max_length": LONGEST, "batch_size": 16, "eval_prompts": 0}
    flags |= {"seed": seed} | ({"max_steps": 2} if a.short else {})
    valid = trained(train_rm, out, a, model=a.model, **flags)["accuracy"]
    return on_pairs(str(out), folder / "test.jsonl", a) | {"valid": valid}, []


def judge(a: Args) -> str:
    """The run directory of the reward model that may judge others: the chosen one, if it learned; else ""."""
    results = common.Results(csv_of(NAME, a))
    chosen = best(results, LRS)
    return str(Path("runs/evidence", NAME, "short" if a.short else "full", f"{chosen}-0")) if learned(results) else ""


def learned(results: common.Results) -> bool:
    """The criterion."""
    chosen = best(results, LRS)
    value = lambda name: results.values(chosen, name)[0]  # noqa: E731
    lead = chosen and value("lead") > value("lead_half")
    return bool(lead) and value("accuracy") - value("accuracy_half") > 0.5


def report(results: common.Results) -> tuple[str, str, str]:
    """Tables, verdict, effect."""
    chosen = best(results, LRS)
    settings = [x for x in ("untrained", *LRS) if results.done(x, 0)]
    rows = []
    for x in settings:
        valid, ece = (results.values(x, n).get(0) for n in ("valid", "ece"))
        rows.append([x + (" (chosen)" if x == chosen else ""), "" if valid is None else f"{valid:.3f}"])
        rows[-1] += [with_half(results, x, n) for n in ("accuracy", "lead")]
        rows[-1] += ["" if x == "untrained" else f"{ece:.3f}"]
    rows.append(["longer wins", "", with_half(results, settings[0], "longer"), "", ""])
    table = common.markdown(["", "validation accuracy", "test accuracy", "lead over longer wins", "ECE"], rows)
    if not chosen:
        return table, "not run yet", "Only the untrained model was measured."
    metrics = [key[3] for key in results.values_of if key[:3] == (chosen, 0, None)]
    votes = sorted((n for n in metrics if n.startswith("votes") and not n.endswith("_half")), key=lambda n: int(n[6:]))
    by_votes = [[n[6:], with_half(results, chosen, n)] for n in votes]
    table += "\n\n" + common.markdown(["votes for chosen less votes for rejected", "test accuracy"], by_votes)
    effect = f"Test accuracy {with_half(results, chosen, 'accuracy')}"
    seeds = [*results.values(chosen, "accuracy").values()]
    if len(seeds) > 1:
        effect += f"; over {len(seeds)} seeds {common.show(common.t_interval(seeds), 3)}"
    return table, "learned" if learned(results) else "did not learn", effect + "."


def draw(results: common.Results, page) -> None:
    """Test accuracy by the margin of the votes, of every setting; the few rows with a margin of 0 or less are left
    out."""
    axes = page.add_subplot(xlabel="votes for chosen less votes for rejected", ylabel="test accuracy")
    for i, x in enumerate(x for x in ("untrained", *LRS) if results.done(x, 0)):
        votes = [n for n in range(1, 6) if results.values(x, f"votes {n}")]
        accuracy, half = ([results.values(x, f"votes {n}{end}")[0] for n in votes] for end in ("", "_half"))
        axes.errorbar([n + 0.04 * i for n in votes], accuracy, half, marker="o", capsize=3, label=x)
    axes.legend()


if __name__ == "__main__":
    cli(main, Args)
