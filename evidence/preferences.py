"""DPO, IPO, SimPO or KTO on people's preferences between arguments: which would you take?

    python -m evidence.preferences --data prefs_ukp_convincing_args.jsonl.gz

The pairs are 2,000 of the second part of reward.py's data, and the test is the third part; no debate is in both. Each
loss has the beta of its paper or a usual one, and the learning rate with the best accuracy on a further debate; DPO
then has three seeds. Accuracy is that of the implicit reward; KL, length and win rate are of 8 answers to each of the
test's prompts. The win rate, by the reward model of reward.py, is measured only if that one learned: run it first. It
never saw an argument that was cut, so there is also a win rate among answers that both end or are both cut.
Learned: the whole 95 % interval of the test accuracy, over topics, is above that of the untrained model, which is 0.5
for an implicit reward with a reference. SimPO's has none: it begins with the untrained model's log-prob per token.
"""

from pathlib import Path

import evaluate
import train_dpo
from ablations import common
from evidence import reward
from evidence.common import (
    LONGEST,
    Args,
    begin,
    best,
    fill,
    finish,
    of_model,
    on_pairs,
    trained,
    with_half,
    write_arguments,
)
from support import read_json_lines
from support.runs import cli

NAME = "preferences"
LOSSES = {
    "dpo": {"beta": 0.1},
    "ipo": {"beta": 0.1},
    "simpo": {"beta": 2.0, "gamma_beta_ratio": 0.5},
    "kto": {"beta": 0.1},
}
LRS = {"lr 1e-06": 1e-6, "lr 5e-06": 5e-6, "lr 2e-05": 2e-5}  # the first for DPO alone
SETTINGS = {f"{loss}, {lr}": (loss, LRS[lr]) for loss in LOSSES for lr in LRS if loss == "dpo" or lr != "lr 1e-06"}
SIZES = {"policy": 2000, "policy_valid": 200, "test": 600}
SEEDS = 3  # of DPO
WINS = {"win": "win rate", "win_if_ended_alike": "win rate among answers that end alike"}


def of(loss: str) -> list[str]:
    return [x for x in SETTINGS if SETTINGS[x][0] == loss]


def main(a: Args) -> None:
    """Run what preferences.csv lacks, then write page and figure."""
    results, folder = begin(NAME, a)
    write_arguments(a, folder, SIZES)
    fill(results, run, [of(loss)[0] for loss in LOSSES] if a.short else SETTINGS, [0], a, folder)
    fill(results, run, [best(results, of("dpo"))], range(1, 1 if a.short else SEEDS), a, folder)
    finish(NAME, a, results)


def run(setting: str, seed: int, a: Args, folder: Path) -> tuple[dict[str, float], list[dict]]:
    """One run: `pair_measures` on the test; valid, the accuracy on validation rows; fall, by how much the mean log-prob
    of their chosen arguments fell (nats); kl, length and ended; start_length and start_ended, of the untrained model,
    and start_accuracy where that is not 0.5; win and win_if_ended_alike, if there is a judge."""
    loss, lr = SETTINGS[setting]
    out, test = folder / f"{setting}-{seed}", folder / "test.jsonl"
    flags = {"data": str(folder / "policy.jsonl"), "eval_data": str(folder / "policy_valid.jsonl"), "eval_prompts": 0}
    flags |= {"max_prompt_length": LONGEST - 1, "max_length": LONGEST, "batch_size": 16, "ref_cache": str(folder)}
    flags |= {"loss": loss, "lr": lr, "seed": seed} | LOSSES[loss] | ({"max_steps": 2} if a.short else {})
    logged = trained(train_dpo, out, a, model=a.model, **flags)
    values = on_pairs(str(out), test, a)
    if loss in train_dpo.REFERENCE_FREE:
        values["start_accuracy"] = reward.run("untrained", 0, a, folder)[0]["accuracy"]
    values["valid"] = on_pairs(str(out), folder / "policy_valid.jsonl", a)["accuracy"]
    values["fall"] = logged["before/eval/logps/chosen"] - logged["after/eval/logps/chosen"]
    judge, answers = reward.judge(a), folder / f"{setting}-{seed}-answers"
    flags = {"models": (a.model, str(out)), "data": str(test), "reward": judge or None, "eval_pairs": 0, "seed": seed}
    flags["dtype"] = "float32"
    flags |= {"k": 1, "max_new_tokens": 8} if a.short else {"k": 8}
    sampled = trained(evaluate, answers, a, **flags)["models"]
    values |= of_model(sampled[str(out)], ("kl", "length", "ended", "win", "win_if_ended_alike"))
    values |= {f"start_{name}": sampled[a.model][name]["value"] for name in ("length", "ended")}
    rows = read_json_lines(answers / "samples.jsonl", "model")
    texts = [row["text"] for row in rows if row["model"] == str(out)]
    return values, [{"prompt": i, "answer": text} for i, text in enumerate(texts[:: flags["k"]])]


def report(results: common.Results) -> tuple[str, str, str]:
    """Tables, verdict, effect."""
    header = ["", "test accuracy before", "after", "lead over longer wins", "KL, nats", "tokens", "share that ends"]
    header += ["log pi(chosen) falls by", "win rate", "win rate, ends alike"]
    rows, valid, learned, begun = [], [], [], [loss for loss in LOSSES if best(results, of(loss))]
    for loss in begun:
        chosen = best(results, of(loss))
        at = lambda name, x=chosen: results.values(x, name)[0]  # noqa: E731
        start = results.values(chosen, "start_accuracy").get(0, 0.5)
        rows.append([chosen, f"{start:.3f}", *(with_half(results, chosen, n) for n in ("accuracy", "lead"))])
        rows[-1] += [with_half(results, chosen, n, 1) for n in ("kl", "length")] + [f"{at('ended'):.2f}"]
        none = "no pairs" if with_half(results, chosen, "win") else "no judge"
        rows[-1] += [f"{at('fall'):.1f}", *(with_half(results, chosen, n) or none for n in WINS)]
        tried = [results.values(f"{loss}, {lr}", "valid").get(0) for lr in LRS]
        valid.append([loss, *("" if x is None else f"{x:.3f}" for x in tried)])
        learned += [loss] if at("accuracy") - at("accuracy_half") > start else []
    first = best(results, of(begun[0]))
    length, ended = (results.values(first, f"start_{name}")[0] for name in ("length", "ended"))
    rows += [["untrained", "", "", "", "0", f"{length:.1f}", f"{ended:.2f}", "0", "0.500", "0.500"]]
    rows += [["longer wins", "", with_half(results, first, "longer"), *[""] * 7]]
    table = common.markdown(header, rows) + "\n\n" + common.markdown(["validation accuracy", *LRS], valid)
    missing = [loss for loss in LOSSES if loss not in begun]
    effect = f"Not run yet: {', '.join(missing)}." if missing else "All four losses were run."
    for metric, name in {"accuracy": "accuracy", **WINS}.items():
        values = [*results.values(best(results, of("dpo")), metric).values()]
        if len(values) > 1:
            effect += f" DPO's {name} over {len(values)} seeds: {common.show(common.t_interval(values), 3)}."
    return table, f"{', '.join(learned)} learned" if learned else "none learned", effect


def draw(results: common.Results, page) -> None:
    """Test accuracy against KL, a point a learning rate."""
    axes = page.add_subplot(xlabel="KL to the untrained model, nats per answer", ylabel="test accuracy")
    for loss in LOSSES:
        points = [[results.values(x, n)[0] for n in ("kl", "accuracy")] for x in of(loss) if results.done(x, 0)]
        if points:
            axes.plot(*zip(*sorted(points), strict=True), "o-", label=loss)
    axes.legend()


if __name__ == "__main__":
    cli(main, Args)
