"""evidence/: its splits share nothing, its rewards and intervals are right, its pages say what its CSVs say, and a
short form of everything goes to its end."""

import csv
import importlib
import json
import math
import re
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from test_recipe_lines import commands, give_model, parse
from tiny import example

from ablations import common, plot
from evidence import common as evidence
from evidence import instructgpt, preferences, reward, sft, sums
from rlhf import BadInput
from support import runs

ROOT = Path(__file__).parent.parent
WITH_CSV = [name for name in evidence.NAMES if (evidence.ROOT / f"{name}.csv").exists()]


def said(role, text):
    return [{"role": role, "content": text}]


def argument(topic, i, votes=(5, 0)):
    row = {"prompt": said("user", f"Why {topic}?"), "chosen": said("assistant", f"since {i} and {i}")}
    meta = {"topic": topic, "votes": dict(zip(("chosen", "rejected"), votes, strict=True))}
    return row | {"rejected": said("assistant", f"no {i}" if i % 2 else f"no {i}, and not {i}"), "meta": meta}


def arguments(debates=9, each=4):
    topics = [f"debate-{n}_{side}" for n in range(debates) for side in ("yes", "no")]
    return [argument(topic, i, ((5, 0), (3, 1))[i % 2]) for topic in topics for i in range(each)]


def questions(n):
    """Rows in GSM8K's form, every fourth of its test split."""
    for i in range(n):
        talk = said("user", f"What is {i} and {i}?") + said("assistant", f"It is {2 * i}.\n#### {2 * i}")
        yield {"messages": talk, "meta": {"split": "train" if i % 4 else "test"}}


# -------------------------------------------------------------------------------------------------------------- splits


def test_no_debate_is_in_two_parts():
    rows = arguments() + [argument("debate-0_yes", 10**200)]
    examples = [example([0] * 8, [[0] * len(str(r["chosen"])), [0] * 3], row=r) for r in rows]
    parts = evidence.split_arguments(examples)
    debates = {part: {row["topic"].split("_")[0] for row in its} for part, its in parts.items()}
    assert {part: len(x) for part, x in debates.items()} == {
        "reward": 2,
        "reward_valid": 1,
        "policy": 2,
        "policy_valid": 1,
        "test": 3,
    }
    assert len(set().union(*debates.values())) == 9 == sum(map(len, debates.values()))
    assert sum(map(len, parts.values())) == 72, "the long row is left out"
    row = next(row for row in parts["test"] if row["rejected"][0]["content"] == "no 1")
    assert row.keys() == {"prompt", "chosen", "rejected", "topic", "margin"} and row["margin"] == 2


def test_the_parts_do_not_depend_on_lengths():
    short, long = (
        evidence.split_arguments([example([0] * n, [[0] * 9, [0] * 3], row=r) for r in arguments()]) for n in (8, 183)
    )
    assert short == long
    with pytest.raises(BadInput, match="too few debates"):
        evidence.split_arguments([example([0] * 184, [[0] * 9, [0] * 3], row=r) for r in arguments()])


def test_a_debate_has_two_sides():
    assert {evidence.debate(argument(f"ban-water_{side}", 1)) for side in ("yes", "no-bad")} == {"ban-water"}


def test_no_question_is_in_train_and_test():
    rows = [*questions(40), *({"messages": x["messages"], "meta": {"split": "train"}} for x in questions(4))]
    parts = sft.split(rows)
    asked = {part: {row["messages"][0]["content"] for row in its} for part, its in parts.items()}
    assert len(set().union(*asked.values())) == 40 == sum(map(len, asked.values()))
    assert len(asked["test"]) == 10 == len(parts["test"]), "its copy in the training split is used nowhere"
    assert "What is 0 and 0?" in asked["test"]
    with pytest.raises(BadInput, match="meta.split"):
        sft.split([row for row in rows if row["meta"]["split"] == "train"])


def test_no_sum_is_in_two_parts():
    assert all(sums.part_of(x, y) == sums.part_of(y, x) for x in range(10, 100) for y in range(10, 100))
    parts = {part: sums.questions(part, n) for part, n in sums.SIZES.items()}
    pairs = {}
    for part, rows in parts.items():
        texts = [re.fullmatch(r"What is (\d+) \+ (\d+)\? .*", row["prompt"][0]["content"]).groups() for row in rows]
        pairs[part] = {tuple(sorted(map(int, text))) for text in texts}
        assert len({*texts}) == sums.SIZES[part] and all(10 <= x <= 99 for pair in pairs[part] for x in pair)
    assert not pairs["train"] & pairs["test"] and not pairs["valid"] & (pairs["train"] | pairs["test"])
    assert sums.questions("test", 3) == sums.questions("test", 3)


def test_instructgpts_questions_are_different(tmp_path):
    instructgpt.write_questions(tmp_path, instructgpt.SIZES, instructgpt.TEST)
    files = {path.stem: [json.loads(x) for x in path.read_text().splitlines()] for path in tmp_path.iterdir()}
    assert {name: len(rows) for name, rows in files.items()} == instructgpt.SIZES | {"test": instructgpt.TEST}
    asked = [row["prompt"][0]["content"] for rows in files.values() for row in rows]
    assert len({*asked}) == len(asked)
    row = files["demonstrations"][0]
    assert sums.correct([row["prompt"]], [row["completion"][0]["content"]], [{}]) == [1.0]


# ------------------------------------------------------------------------------------------------- rewards and measures


def test_the_reward_of_a_sum():
    asked = said("user", "What is 47 + 38?")
    answers = ["85", "47 + 38 = 85.", "It is 1,085", "85, or 86", "75", "no idea", "85"]
    rows = [{"ended": True}] * 6 + [{"ended": False}]
    prompts = [asked] * 5 + ["What is 47 + 38?"] * 2
    assert sums.correct(prompts, answers, rows) == [1, 1, 0, 0, 0, 0, 0]
    assert sums.close(prompts, answers, rows) == [1, 1, 0, 0.495, 0.45, 0, 0]
    assert sums.errors(prompts, answers, rows) == [0, 0, 1000, 1, -10, math.inf, math.inf]


def test_demonstrations_are_right():
    row = {"prompt": said("user", "What is 47 + 38?")}
    assert instructgpt.demonstration(row) == row | {"completion": said("assistant", "47 + 38 = 85")}


def test_measures_of_pairs_by_hand():
    """Topic a: right, right; topic b: right, wrong. The longer one is chosen in the first pair only."""
    rows = [("a", [0] * 5, [0] * 4, 5), ("a", [0] * 3, [0] * 4, 2), ("b", [0] * 3, [0] * 4, 5), ("b", [0], [0] * 4, 5)]
    examples = [example([1], [w, other], row={"topic": t}, margin=float(m)) for t, w, other, m in rows]
    rewards = [torch.tensor(x) for x in ([1.0, 0.0], [1.0, 0.0], [1.0, 0.0], [0.0, 1.0])]
    found = evidence.pair_measures(examples, rewards)
    assert found["accuracy"] == 0.75 and found["longer"] == 0.25 and found["lead"] == 0.5
    assert found["votes 5"] == pytest.approx(2 / 3)
    assert "votes 2" not in found, "one topic gives no interval"
    assert found["ece"] == pytest.approx(abs(0.75 - 1 / (1 + math.exp(-1))))
    assert found["lead_half"] == pytest.approx(0.0, abs=1e-12), "both topics have the mean 0.5"
    assert found["accuracy_half"] > 0.2


# --------------------------------------------------------------------------------------------------------------- tables


def filled(path, **settings):
    """A CSV with these values at the end of seed 0."""
    results = common.Results(path)
    for name, values in settings.items():
        results.add(name.replace("_", " "), 0, values)
    return results


def cells(table, first):
    """The cells of the row that begins with this one."""
    return next(line.strip("| ").split(" | ") for line in table.splitlines() if line.startswith(f"| {first}"))


def rm_values(accuracy, lead, **more):
    halves = {"accuracy_half": 0.1, "lead_half": 0.05, "longer_half": 0.2}
    return {"accuracy": accuracy, "lead": lead, "longer": 0.6, "ece": 0.125, **halves, **more}


def test_the_reward_models_table_and_whether_it_may_judge(tmp_path, monkeypatch):
    results = common.Results(tmp_path / "a.csv")
    results.add("untrained", 0, rm_values(0.52, -0.08))
    results.add("lr 3e-06", 0, rm_values(0.9, 0.3, valid=0.6))
    results.add("lr 1e-05", 0, rm_values(0.7, 0.1, valid=0.7, **{"votes 5": 0.8, "votes 5_half": 0.1, "votes -1": 0.4}))
    results.add("lr 1e-05", 1, rm_values(0.8, 0.1, valid=0.7))
    table, verdict, effect = reward.report(results)
    assert cells(table, "lr 1e-05 (chosen)")[1:] == ["0.700", "0.700 +- 0.100", "0.100 +- 0.050", "0.125"]
    assert cells(table, "untrained")[1:4] == ["", "0.520 +- 0.100", "-0.080 +- 0.050"]
    assert cells(table, "longer wins")[2] == "0.600 +- 0.200" and cells(table, "5 ")[1] == "0.800 +- 0.100"
    assert table.index("| -1 | 0.400 |") < table.index("| 5 | 0.800")
    # two seeds, 0.7 and 0.8: 12.706 * 0.0707 / sqrt(2) = 0.635
    assert verdict == "learned" and effect == "Test accuracy 0.700 +- 0.100; over 2 seeds 0.750 +- 0.635."
    monkeypatch.chdir(tmp_path)
    a = evidence.Args(short=True)
    for accuracy, lead, may in ((0.7, 0.06, True), (0.7, 0.04, False), (0.59, 0.06, False)):
        path = evidence.csv_of("reward", a)
        path.unlink(missing_ok=True)
        assert reward.judge(a) == ""
        common.Results(path).add("lr 3e-05", 0, rm_values(accuracy, lead, valid=0.7))
        assert reward.judge(a) == ("runs/evidence/reward/short/lr 3e-05-0" if may else "")


def test_the_table_of_losses(tmp_path):
    results = common.Results(tmp_path / "a.csv")
    base = {"kl": 3.0, "kl_half": 1.0, "length": 20.0, "length_half": 2.0, "ended": 0.5, "fall": 4.0}
    base |= {"start_length": 25.0, "start_ended": 0.25}
    for setting, accuracy, valid in (
        ("dpo, lr 1e-06", 0.9, 0.5),
        ("dpo, lr 5e-06", 0.7, 0.6),
        ("ipo, lr 5e-06", 0.55, 0.6),
    ):
        results.add(setting, 0, rm_values(accuracy, 0.1, valid=valid, **base))
    table, verdict, effect = preferences.report(results)
    wanted = ["0.500", "0.700 +- 0.100", "0.100 +- 0.050", "3.0 +- 1.0", "20.0 +- 2.0", "0.50", "4.0"]
    assert cells(table, "dpo, lr 5e-06")[1:] == [*wanted, "no judge", "no judge"] and "| dpo, lr 1e-06 |" not in table
    assert "| dpo | 0.500 | 0.600 |  |" in table and "| ipo |  | 0.600 |  |" in table
    assert verdict == "dpo learned" and effect == "Not run yet: simpo, kto."
    results.add("dpo, lr 5e-06", 1, rm_values(0.9, 0.1, valid=0.7, **base))
    assert preferences.report(results)[2].endswith(" DPO's accuracy over 2 seeds: 0.800 +- 1.271.")  # t 12.706 * 0.1
    assert cells(table, "untrained")[5:7] == ["25.0", "0.25"] and cells(table, "longer wins")[2] == "0.600 +- 0.200"
    for start, wins in ((0.55, {"win": 0.7, "win_half": 0.1}), (0.65, {})):  # 0.7 - 0.1 lies between the two
        with_start = common.Results(tmp_path / f"{start}.csv")
        with_start.add("simpo, lr 5e-06", 0, rm_values(0.7, 0.1, valid=0.6, start_accuracy=start, **base, **wins))
        table, verdict, _ = preferences.report(with_start)
        row = cells(table, "simpo, lr 5e-06")
        assert row[1] == f"{start:.3f}" and row[-2:] == (["0.700 +- 0.100", "no pairs"] if wins else ["no judge"] * 2)
        assert verdict == ("simpo learned" if start == 0.55 else "none learned")


def test_the_table_of_sums(tmp_path):
    results = common.Results(tmp_path / "a.csv")
    values = {name: 0.25 for n in ("greedy", "sampled", "best_of_4") for name in (n, f"{n}_half")}
    results.add("untrained", 0, values | {"valid": 0.2, "gain": 0.0, "gain_half": 0.0})
    assert sums.report(results)[1:] == ("not run yet", "Not run yet: grpo, rloo, gae, sft.")
    results.add("rloo, lr 5e-06", 0, values | {"valid": 0.3, "gain": 0.1, "gain_half": 0.2})
    results.add("rloo, lr 2e-05", 0, values | {"valid": 0.4, "gain": 0.3, "gain_half": 0.2, "greedy": 0.55})
    results.add("sft, lr 5e-06", 0, values | {"valid": 0.3, "gain": 0.1, "gain_half": 0.1, "right": 0.125})
    table, verdict, effect = sums.report(results)
    assert cells(table, "rloo")[:4] == ["rloo, lr 2e-05", "0.30, 0.40", "0.550 +- 0.250", "0.300 +- 0.200"]
    assert cells(table, "sft")[1] == "0.30, not run" and verdict == "rloo learned"
    assert effect.endswith("samples, 12.5% were right and trained sft.")


def test_the_table_of_sft(tmp_path):
    base = {"nll_half": 0.1, "gain_half": 0.02, "correct_half": 0.01, "length": 50.0, "ended": 0.5}
    results = common.Results(tmp_path / "a.csv")
    results.add("untrained", 0, base | {"nll": 1.5, "gain": 0.0, "correct": 0.0})
    results.add("lr 1e-05", 0, base | {"nll": 0.9, "gain": 0.6, "correct": 0.02, "valid": 0.95})
    results.add("lr 3e-05", 0, base | {"nll": 1.0, "gain": 0.5, "correct": 0.03, "valid": 0.9})
    table, verdict, effect = sft.report(results)
    assert cells(table, "lr 3e-05 (chosen)")[1:4] == ["0.900", "1.000 +- 0.100", "0.500 +- 0.020"]
    assert (verdict, effect) == ("learned", "Test NLL falls by 0.500 +- 0.020.")


def test_instructgpts_table_is_what_evaluate_and_the_reward_model_say(tmp_path):
    number = lambda value, low, high: {"value": value, "low": low, "high": high}  # noqa: E731
    its = {"reward": number(0.5, 0.4, 0.7), "kl": number(2.0, 1.0, 2.5), "length": number(9.0, 8.0, 10.0)}
    measured = {
        str(tmp_path / x): its | ({"win": number(0.6, 0.51, 0.66)} if x == "ppo" else {}) for x in ("sft", "ppo")
    }
    measured[str(tmp_path / "dpo")] = its | {"win": number(0.6, 0.49, 0.66)}
    for name, content in {
        "evaluate": {"models": measured},
        "rm": {"accuracy": 0.75, "accuracy_interval": 0.125, "ceiling": 0.9},
        "ppo": {"before/score": -0.25, "after/score": 1.5},
    }.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "results.json").write_text(json.dumps(content))
    answer = {"prompt": said("user", "What is 47 + 38?"), "ended": 1.0}
    answers = [answer | {"text": text} for text in ("85", "84", "86", "95", "none")]
    answers.append(answer | {"text": "99", "ended": 0.0})
    samples = [{"model": model} | x for model in measured for x in answers]
    (tmp_path / "evaluate/samples.jsonl").write_text("".join(json.dumps(x) + "\n" for x in samples))
    results = common.Results(tmp_path / "a.csv")
    instructgpt.add(results, tmp_path, 120.0)
    table, verdict, effect = instructgpt.report(results)
    shown = cells(table, "ppo")[1:]
    assert shown.pop(1).startswith("0.333 +- ")  # 86 and 95; 99 was cut off
    assert shown == ["0.500 +- 0.200", "0.600 +- 0.090", "2.00 +- 1.00", "9.0 +- 1.0"]
    assert verdict == "ppo learned" and results.minutes() == 2.0
    assert effect == (
        "The reward model's accuracy on held-out rankings is 0.750 +- 0.125."
        " Its mean reward is -0.25 before PPO and 1.50 after."
    )


@pytest.mark.parametrize("name", evidence.NAMES)
def test_a_page_says_what_its_csv_says(name):
    page, results = evidence.ROOT / f"{name}.md", common.Results(evidence.ROOT / f"{name}.csv")
    assert not common.lacks_table(page)
    text = page.read_text()
    assert plot.with_table(text, evidence.table_of(name, results)) == text
    assert ("Not run yet." in text) == (not results.values_of)
    assert (evidence.ROOT / f"{name}.png").exists() == bool(results.values_of)
    assert f"]({name}.md)" in (evidence.ROOT / "README.md").read_text()


@pytest.mark.parametrize("name", WITH_CSV)
def test_every_number_has_its_origin_and_stands_once(name):
    lines = (evidence.ROOT / f"{name}.csv").read_text().splitlines()
    rows = [tuple(row[:4]) for row in csv.reader(lines)]
    assert rows[0] == common.FIELDS[:4] and len(rows) == len({*rows})
    results = common.Results(evidence.ROOT / f"{name}.csv")
    assert all(results.made.values()) and not any("+" in x or x == "none" for x in results.made["commit"])


# ---------------------------------------------------------------------------------------------------- the short forms


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A folder with a two-layer model; tasks run in this process."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(runs, "environment", dict)
    serial = lambda function, tasks, jobs, log: ((task, function(*task), 1.0) for task in tasks)  # noqa: E731
    monkeypatch.setattr(common, "each", serial)
    give_model("model")
    return tmp_path


def check_short(name, settings):
    folder = Path("runs/evidence", name, "short")
    results = common.Results(folder / "results.csv")
    assert {key[0] for key in results.values_of} == settings and (folder / "figure.png").stat().st_size > 0
    assert not [*folder.glob("*/checkpoint")], "checkpoints are deleted"
    return results


@pytest.mark.slow
def test_short_sft_reward_preferences_and_sums(here, monkeypatch):
    committed = {path: path.read_bytes() for path in evidence.ROOT.iterdir() if path.is_file()}
    common.write(Path("gsm8k.jsonl"), questions(40))
    common.write(Path("ukp.jsonl"), arguments())
    a = evidence.Args(model="model", short=True, dtype="float32")

    sft.main(replace(a, data="gsm8k.jsonl"))
    results = check_short("sft", {"untrained", "lr 1e-05"})
    assert results.values("untrained", "gain") == {0: 0.0} and results.values("lr 1e-05", "gain")[0] != 0
    answers = Path("runs/evidence/sft/short/results.jsonl").read_text()
    assert len(answers.splitlines()) == 16 and "What is" not in answers, "no rows of the data"

    reward.main(replace(a, data="ukp.jsonl"))
    results = check_short("reward", {"untrained", "lr 3e-06"})
    assert {"accuracy", "lead", "longer", "ece", "valid", "votes 5", "votes 2"} <= {key[3] for key in results.values_of}

    preferences.main(replace(a, data="ukp.jsonl"))
    results = check_short("preferences", {"dpo, lr 1e-06", *(f"{x}, lr 5e-06" for x in ("ipo", "simpo", "kto"))})
    for x in {key[0] for key in results.values_of}:
        assert results.values(x, "kl")[0] > -1e-5 and results.values(x, "fall")[0] != 0
        assert results.values(x, "longer") == results.values("dpo, lr 1e-06", "longer")
        assert (0 in results.values(x, "start_accuracy")) == x.startswith("simpo")

    odd = lambda prompts, responses, rows: [float(len(text) % 2) for text in responses]  # noqa: E731
    monkeypatch.setattr(sums, "correct", odd)  # a random model adds nothing up
    sums.main(a)
    results = check_short("sums", {"untrained", *(f"{method}, lr 5e-06" for method in sums.METHODS)})
    assert (
        0 < results.values("sft, lr 5e-06", "right")[0] < 1
        and Path("runs/evidence/sums/short/sft, lr 5e-06-0").is_dir()
    )
    for x in {key[0] for key in results.values_of}:
        assert results.values(x, "best_of_4")[0] >= results.values(x, "sampled")[0]
    assert {path: path.read_bytes() for path in evidence.ROOT.iterdir() if path.is_file()} == committed
    with pytest.raises(BadInput, match="--data is missing"):
        sft.main(a)


@pytest.mark.slow
def test_instructgpts_commands_go_to_their_end(here):
    """Each is the script's, with fewer and shorter rows; the last two lines write the table."""
    script = (evidence.ROOT / "instructgpt.sh").read_text()
    subprocess.run(["bash", "-n"], input=script, text=True, check=True)
    instructgpt.write_questions(Path("out"), {name: 96 for name in instructgpt.SIZES}, 4)
    lines = commands(script.replace('"$OUT/', '"out/').replace('"$MODEL"', "model"))
    first, *lines, last = lines
    assert first[:2] == last[:2] == ["-m", "evidence.instructgpt"] and len(lines) == 7
    for words in lines:
        a = parse([word for word in words])
        short = {"batch_size": 4, "max_steps": 2, "max_new_tokens": 4, "eval_prompts": 4, "dtype": "float32"}
        short |= {"device": "cpu"}
        module = importlib.import_module(words[0].removesuffix(".py"))
        module.main(replace(a, **{name: x for name, x in short.items() if hasattr(a, name)}))
    results = common.Results("a.csv")
    instructgpt.add(results, Path("out"), 1.0)
    assert {key[0] for key in results.values_of} == {"sft", "dpo", "ppo", "reward model"}
    plot.picture(results, instructgpt.draw, "a.png")
    assert "| ppo | " in plot.section(results, instructgpt.report)
