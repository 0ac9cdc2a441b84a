"""The ablations: their READMEs say what their CSVs say, every --smoke runs, and what they share is right."""

import csv
import dataclasses
import json
import math
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import train_dpo
import train_ppo
from ablations import common, plot, template
from rlhf import BadInput
from support import reviews
from support.rows import read_rows

ROOT = Path(__file__).parent.parent
NAMES = sorted(path.parent.name for path in (ROOT / "ablations").glob("*/__main__.py"))


@pytest.fixture(scope="module")
def modules():
    return plot.experiments()


# ------------------------------------------------------------------------------------------------- every experiment


@pytest.mark.parametrize("name", NAMES)
def test_readme_and_figure_are_what_plot_makes_of_the_csv(name, modules, tmp_path):
    module, folder = modules[name], ROOT / "ablations" / name
    results = common.Results(folder / "results.csv")
    text = (folder / "README.md").read_text()
    if not plot.whole(results, module):
        assert plot.with_table(text, "Not run yet.") == text
        pytest.skip(f"ablations/{name} has not been run yet")
    assert plot.with_table(text, plot.section(results, module.report)) == text
    plot.picture(results, module.draw, tmp_path / "figure.png")
    assert (tmp_path / "figure.png").stat().st_size > 5000
    assert (folder / "figure.png").exists() and "figure.png" in text


def test_the_table_of_all_is_what_plot_writes(modules):
    text = (ROOT / "ablations/README.md").read_text()
    assert plot.with_table(text, plot.overview(modules)) == text
    assert all(f"[{name}]({name}/README.md)" in text for name in NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_criterion_and_results(name, modules):
    module, path = modules[name], ROOT / "ablations" / name / "results.csv"
    assert "riterion" in module.__doc__ and module.CLAIM and module.SETTINGS
    if not path.exists():
        pytest.skip(f"ablations/{name} has not been run yet")
    rows = [*csv.reader(path.read_text().splitlines())]
    assert rows[0] == [*common.FIELDS]
    assert all(len(row) == len(common.FIELDS) and row[5] and row[6] and row[7] for row in rows[1:])
    keys = [tuple(row[:4]) for row in rows[1:]]
    assert len(set(keys)) == len(keys), "a value stands there twice"
    assert module.report(common.Results(path))[1] in ("reproduced", "not resolved", "contradicted")


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_smoke(name, tmp_path):
    committed = ROOT / "ablations" / name / "results.csv"
    before = committed.read_bytes() if committed.exists() else None
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", f"ablations.{name}", "--smoke"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    folder = tmp_path / "runs/ablations" / name / "smoke"
    rows = [*csv.DictReader(open(folder / "results.csv"))]
    assert tuple(rows[0]) == common.FIELDS and all(math.isfinite(float(row["value"])) for row in rows)
    assert (folder / "figure.png").exists()
    assert (committed.read_bytes() if committed.exists() else None) == before, "a smoke run wrote results.csv"


# ------------------------------------------------------------------------------------------------------ what they share


def test_results_come_back_and_a_run_that_is_there_is_skipped(tmp_path):
    path = tmp_path / "results.csv"
    results = common.Results(path)
    results.add("a, b", 1, {"gold": 0.25}, step=4)
    assert not results.done("a, b", 1), "values along a run do not make it done"
    results.add("a, b", 1, {"gold": 1 / 3, "seconds": 60})
    results.add("a, b", 0, {"gold": -2, "seconds": 180})
    again = common.Results(path)
    assert again.done("a, b", 1) and again.done("a, b", 0)
    assert not again.done("a, b", 2) and not again.done("a", 1)
    assert again.values("a, b", "gold") == {0: -2.0, 1: 0.333333} == results.values("a, b", "gold")
    assert list(again.values("a, b", "gold")) == [0, 1]
    assert again.values("a, b", "gold", step=4) == {1: 0.25} and again.steps("a, b") == [4]
    assert again.minutes() == 4.0
    rows = [*csv.DictReader(open(path))]
    assert tuple(rows[0]) == common.FIELDS and rows[0]["step"] == "4" and rows[1]["step"] == ""
    assert rows[0]["hardware"].endswith(f"torch {torch.__version__.split('+')[0]}")


def test_results_survive_a_line_cut_short(tmp_path):
    path = tmp_path / "results.csv"
    common.Results(path).add("a", 0, {"x": 1.0, "y": 2.0})
    whole = path.read_text()
    path.write_text(whole + "a,1,,x,3.")
    results = common.Results(path)
    assert not results.done("a", 1) and path.read_text() == whole
    results.add("a", 1, {"x": 4.0})
    assert common.Results(path).values("a", "x") == {0: 1.0, 1: 4.0}


def test_results_refuse_what_is_not_a_number(tmp_path):
    results = common.Results(tmp_path / "results.csv")
    with pytest.raises(ValueError, match="a, seed 3, step None: gold is nan"):
        results.add("a", 3, {"kl": 1.0, "gold": math.nan})
    assert not results.done("a", 3) and not results.path.exists()


def test_paired_takes_the_seeds_that_both_have():
    mean, half = common.paired({0: 3.0, 1: 5.0, 2: 9.0}, {2: 8.0, 0: 1.0, 3: 100.0})
    assert mean == 1.5  # of 2 and 1
    assert half == pytest.approx(12.706 * 0.5, rel=1e-9)  # deviation sqrt(1/2), over sqrt(2)


def test_verdict():
    above, around, below = (1.0, 0.5), (1.0, 1.5), (-1.0, 0.5)
    assert common.verdict([above, above]) == "reproduced"
    assert common.verdict([above, around]) == "not resolved"
    assert common.verdict([above, (0.0, 0.0)]) == "not resolved"
    assert common.verdict([above, around, below]) == "contradicted"
    assert common.verdict([(1.0, math.inf), (-1.0, math.inf)]) == "not resolved"


def test_each_runs_tasks_in_a_process_and_stops_at_an_error():
    found = common.each(divmod, [(7, 2), (1, 0)], 1)
    task, value, seconds = next(found)
    assert task == (7, 2) and value == (3, 1) and 0 <= seconds < 1
    with pytest.raises(ZeroDivisionError):
        next(found)


def test_table_goes_between_its_marks():
    text = "a\n<!-- table -->\nold\n<!-- end -->\nb\n"
    assert plot.with_table(text, "new") == "a\n<!-- table -->\nnew\n<!-- end -->\nb\n"
    assert plot.with_table(plot.with_table(text, "new"), "old") == text


def test_a_complete_experiment_says_that_it_trains_nothing(modules, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(plot, "main", lambda: None)
    monkeypatch.chdir(ROOT)
    modules["ipo_bandit"].main(modules["ipo_bandit"].Args())
    said = "nothing to train: ablations/ipo_bandit/results.csv has all runs; to repeat them delete it and "
    printed = capsys.readouterr().out
    assert printed.startswith(f"{said}runs/ablations/ipo_bandit\n") and "Verdict: *reproduced*" in printed
    monkeypatch.chdir(tmp_path)
    modules["ipo_bandit"].main(modules["ipo_bandit"].Args(smoke=True))
    assert "nothing to train" not in capsys.readouterr().out


def test_a_full_run_needs_its_readme_with_its_marks_before_it_begins(tmp_path, monkeypatch):
    """That of its own folder: plot.py leaves out the others that have none."""
    monkeypatch.setattr(common, "ROOT", tmp_path)
    monkeypatch.chdir(tmp_path)
    for name in ("old", "new"):
        (tmp_path / name).mkdir()
    (tmp_path / "old/README.md").write_text("# Old\n\n<!-- table -->\n<!-- end -->\n")
    readme = tmp_path / "new/README.md"
    problem = "new/README.md: is missing, or lacks the lines <!-- table --> and <!-- end -->"
    for text in (None, "# New\n", "# New\n\n<!-- table -->\n", "# New\n<!-- end -->\n<!-- table -->\n"):
        if text:
            readme.write_text(text)
        with pytest.raises(BadInput, match=problem):
            common.results("new", common.Args())
        assert common.results("old", common.Args()).path == tmp_path / "old/results.csv"
    assert common.results("new", common.Args(quick=True)).path == Path("runs/ablations/new/quick/results.csv")
    readme.write_text("# New\n\n<!-- table -->\n<!-- end -->\n")
    assert common.results("new", common.Args()).path == tmp_path / "new/results.csv"


def test_plot_leaves_out_a_folder_without_readme(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(common, "ROOT", tmp_path)
    monkeypatch.setattr(plot, "experiments", lambda: {"mine": template, "unfinished": template})
    for name in (".", "mine", "unfinished"):
        (tmp_path / name).mkdir(exist_ok=True)
    for name in (".", "mine"):
        (tmp_path / name / "README.md").write_text("# A\n\n<!-- table -->\n<!-- end -->\n")
    plot.main()
    assert "/unfinished/README.md: is missing, or lacks the lines" in capsys.readouterr().out
    assert "Not run yet." in (tmp_path / "mine/README.md").read_text()
    text = (tmp_path / "README.md").read_text()
    assert "[mine](mine/README.md)" in text and "unfinished" not in text


@pytest.fixture
def few(tmp_path):
    """Results of the template for two seeds: KL 5 and 7 with dpo, 4 and 5 when smoothed."""
    results = common.Results(tmp_path / "results.csv")
    for setting, values in {"dpo": (5.0, 7.0), "smoothed": (4.0, 5.0)}.items():
        for seed, kl in enumerate(values):
            results.add(setting, seed, {"kl": kl, "gold": kl / 10, "seconds": 30.0})
    return results


def test_the_template_is_short_and_reports(few, tmp_path):
    assert len(Path(template.__file__).read_text().splitlines()) <= 60
    table, verdict, effect = template.report(few)  # a mean of 1.5, and t(1) = 12.706 times 0.5
    assert effect == "KL: dpo - smoothed 1.50 +- 6.35." and verdict == "not resolved"
    assert "| smoothed | 4.50 +- 6.35 | 0.45 +- 0.64 |" in table.splitlines()
    plot.picture(few, template.draw, tmp_path / "figure.png")
    assert (tmp_path / "figure.png").stat().st_size > 5000


@pytest.mark.parametrize("kind", ["quick", "smoke"])
def test_a_short_runs_verdict_is_not_the_claims(kind, few, capsys):
    plot.finish("template", common.Args(**{kind: True}), few, template.report, template.draw)
    line = f"This verdict is of a {kind} run, and not the claim's: only the full run judges that."
    assert line in capsys.readouterr().out.splitlines()


@pytest.mark.slow
def test_the_template_runs(tmp_path):
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "ablations.template", "--smoke"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    rows = [*csv.DictReader(open(tmp_path / "runs/ablations/template/smoke/results.csv"))]
    assert {row["setting"] for row in rows} == {*template.SETTINGS}


# --------------------------------------------------------------------------------------------------------------- sweeps


def test_the_script_of_the_sweeps_page(tmp_path, monkeypatch, capsys):
    """Means and t-intervals by hand: KL 4 and 6 of two seeds, and one seed alone, which has no interval."""
    for name, kl, gold in (("beta-0.3-seed-0", 4.0, 1.0), ("beta-0.3-seed-1", 6.0, 1.2), ("beta-1-seed-0", 2.0, 0.5)):
        (tmp_path / "runs" / name).mkdir(parents=True)
        numbers = {"after/kl": kl, "after/gold": gold, "after/eval/rewards/accuracies": 0.75}
        (tmp_path / "runs" / name / "results.json").write_text(json.dumps(numbers))
    (tmp_path / "runs" / "beta-2-seed-0").mkdir()  # a run that is not complete
    monkeypatch.setattr(sys, "argv", ["plot_sweep", f"{tmp_path}/runs/beta-*-seed-*", f"{tmp_path}/sweep.png"])
    runpy.run_module("docs.plot_sweep")
    lines = [line.split() for line in capsys.readouterr().out.splitlines()[2:]]
    assert lines == ["beta-0.3 2 5.00 +- 12.71 1.10 +- 1.27 0.75 +- 0.00".split(), "beta-1 1 2.00 0.50 0.75".split()]
    assert (tmp_path / "sweep.png").read_bytes()[:4] == b"\x89PNG"


def test_the_sweeps_page_gives_flags_that_exist():
    page = (ROOT / "docs/sweeps.md").read_text()
    given = {flag.replace("-", "_") for flag in re.findall(r" --([a-z][a-z-]+)", page)} - {"quick"}
    assert given and given <= {field.name for field in dataclasses.fields(train_dpo.Args)}
    assert (ROOT / "docs/sweep.png").exists()
    assert len([line for line in (ROOT / "docs/plot_sweep.py").read_text().splitlines() if line]) <= 23


# ------------------------------------------------------------------------------------------------------------- kl_leash


@pytest.fixture
def leash(tmp_path, modules):
    """Results of two seeds in which a coefficient of 0.1 is best, and one of 0 collapsed."""
    results = common.Results(tmp_path / "results.csv")
    #                    gold readable proxy gap  kl  distinct entropy grammatical
    rows = {
        "sft": (0.0, 0.0, 0.0, 0.0, 0.0, 0.2, 1.6, 0.95),
        "0": (0.9, 0.0, 3.0, 2.1, 80.0, 0.02, 0.5, 0.0),
        "0.1": (1.3, 1.2, 1.8, 0.5, 4.0, 0.12, 1.3, 0.9),
        "0.3": (1.0, 0.9, 1.3, 0.3, 2.0, 0.15, 1.5, 0.9),
        "30": (0.01, 0.01, 0.01, 0.0, 0.0, 0.2, 1.6, 0.95),
    }
    names = ("gold", "readable", "proxy", "gap", "kl", "distinct_2", "entropy", "grammatical")
    for setting, values in rows.items():
        for seed in (0, 1):
            end = dict(zip(names, values, strict=True)) | {"length": 12.0, "ended": 1.0, "seconds": 60.0}
            end["gold"] += 0.01 * seed * (setting == "0.1")
            results.add(setting, seed, end | {"readable_validation": values[1]})
    return results


def test_leash_clauses_by_hand(leash, modules):
    module = modules["kl_leash"]
    assert module.best_of(leash) == "0.1"
    found = module.clauses(leash)
    assert found["grammatical share: 0.1 - 0"] == pytest.approx((0.9, 0), abs=1e-9)
    assert found["proxy - gold: 0 - 0.1"] == pytest.approx((1.6, 0), abs=1e-9)
    # 0.4 and 0.41: mean 0.405, half 12.706 * 0.005
    assert found["gold reward: 0.1 - 0"] == pytest.approx((0.405, 12.706 * 0.005), abs=1e-9)
    assert found["gold: a tenth of the gain at 0.1, minus the gain at 30"][0] == pytest.approx(0.1305 - 0.01, abs=1e-9)
    table, verdict, effect = module.report(leash)
    assert verdict == "reproduced" and "9 of 9" in effect
    assert "| 0.1 | 1.31 +- 0.06 | 1.20 +- 0.00 |" in table


def test_leash_against_early_stopping(leash, modules):
    """Without a penalty gold is d (0.9 - 0.2 log d) and the proxy 0.25 d ahead of it, by construction."""
    module = modules["kl_leash"]
    gold = lambda d: d * (0.9 - 0.2 * math.log(d))  # noqa: E731
    for step, d in enumerate((0.5, 1.0, 2.0, 4.0), 1):
        for seed in (0, 1):
            leash.add("0", seed, {"kl": d * d, "gold": gold(d), "proxy": gold(d) + 0.25 * d}, step)
    found = module.early_stopping(leash)
    against = {x: found[f"gold reward: {x} - 0, at the KL where {x} ends"][0] for x in (0.1, 0.3)}
    between = gold(1.0) + (gold(2.0) - gold(1.0)) * (2**0.5 - 1)
    assert against[0.1] == pytest.approx(1.305 - gold(2.0), abs=1e-5)  # 4 nats
    assert against[0.3] == pytest.approx(1.0 - between, abs=1e-5)  # 2 nats
    assert found["gold = d (a - b log d) at 0: a"][0] == pytest.approx(0.9, abs=1e-5)
    assert found["gold = d (a - b log d) at 0: b"][0] == pytest.approx(0.2, abs=1e-5)
    assert found["slope in d of proxy - gold at 0"][0] == pytest.approx(0.25, abs=1e-5)


def test_leash_is_contradicted_where_gold_is_highest_without_it(leash, modules):
    for seed in (0, 1):
        leash.add("0", seed, {"gold": 2.0})
    assert modules["kl_leash"].report(leash)[1] == "contradicted"


# --------------------------------------------------------------------------------------------------- the embedded task


def test_prompts_for_training_and_held_out_are_apart():
    train, held = common.prompts(2000, 3)
    texts = [e.prompt_text for e in train + held]
    assert len({*texts}) == len(texts) and 0.05 < len(held) / len(texts) < 0.15
    other = {e.prompt_text for e in common.prompts(2000, 4)[0]}
    assert not other & {e.prompt_text for e in held}, "held out by one seed, trained on by another"


# ------------------------------------------------------------------------------------------------------------ sft_first


def test_sft_first_data(modules, tmp_path):
    module = modules["sft_first"]
    both = zip(common.rows("sft", 400), module.garbled_reviews(400), strict=True)
    words = [pair for a, b in both for pair in zip(a["text"].split(), b["text"].split(), strict=True)]
    assert sum(x != y for x, y in words) / len(words) == pytest.approx(module.GARBLED, abs=0.03)
    for row in module.long_reviews(20, 0):
        assert reviews.log_prob(row["text"]) > -math.inf and len(row["text"].split()) >= 12
    train, held = (read_rows(str(x))[0] for x in module.split_pairs(tmp_path, 100, 0))
    assert len(train) == 100 and held
    assert not {row["prompt"] for _, row in train} & {row["prompt"] for _, row in held}


def test_sft_first_chooses_on_validation_and_reports_test(modules, tmp_path):
    module, results = modules["sft_first"], common.Results(tmp_path / "results.csv")
    golds = {"base, DPO": 0.5, "SFT, DPO": 1.0, "Preferred-FT, DPO": 0.9, "mismatched SFT, DPO": 0.2, "base, KTO": 0.4}
    other = {"readable": 0.1, "grammatical": 0.5, "kl": 2.0, "length": 9.0}
    for arm, gold in golds.items():
        ends = {"accuracy": 0.7, "reference": -20.0}
        results.add(f"{arm}, 0.0003", 0, {"gold": 9.0, "gold_validation": 0.1} | other | ends)
        for seed in (0, 1):
            found = {"gold": gold + 0.1 * seed * (arm == "SFT, DPO"), "gold_validation": 0.2}
            results.add(f"{arm}, 0.001", seed, found | other | ends)
    assert module.chosen(results, "SFT, DPO") == "SFT, DPO, 0.001"
    table, verdict, effect = module.report(results)
    # SFT - base: 0.5 and 0.6, half 12.706 * 0.05: not above 0
    assert verdict == "not resolved"
    assert "gold reward of (SFT then DPO) minus (base then DPO): 0.55 +- 0.64; readable gold of (SFT" in effect
    assert "| gold reward: Preferred-FT, DPO - base, DPO | 0.40 +- 0.00 | reproduced |  |" in table
    assert "| **SFT, DPO, 0.001** | 1.05 +- 0.64 |" in table and "| SFT, DPO, 0.0003 | 9.00 |" in table


# ------------------------------------------------------------------------------------------------------- online_offline


def test_online_offline_clauses_by_hand(modules, tmp_path):
    module, results = modules["online_offline"], common.Results(tmp_path / "results.csv")
    paths = {  # KL and gold after rounds 0, 1 and 2
        "online, far": ([0, 1, 4], [-1.0, 0.0, 1.5]),
        "offline, far": ([0, 1, 2.25], [-1.0, -0.5, 0.0]),
        "online, near": ([0, 9, 4], [0.0, 1.0, 2.0]),  # goes further than where it ends
        "offline, near": ([0, 4, 16], [0.0, 0.9, 1.1]),
    }
    for setting, (kls, golds) in paths.items():
        for seed in (0, 1):
            other = {"readable": 0.0, "grammatical": 1.0, "accuracy": 0.7}
            for step, (kl, gold) in enumerate(zip(kls, golds, strict=True)):
                results.add(setting, seed, {"kl": kl, "gold": gold} | other, step)
            results.add(setting, seed, {"kl": kls[-1], "gold": golds[-1]} | other)
    found = module.clauses(results)
    assert {name for name, (_, judged) in found.items() if judged} == {"far", "far, at KL", "far - near"}
    wanted = {"far": 1.5, "near": 0.9, "far - near": 0.6}
    wanted["far, at KL"] = 0.5 * (0.0 + 1.5)  # sqrt(2.25) is half-way between sqrt(1) and sqrt(4)
    wanted["near, at KL"] = 2.0 - 0.9  # at 4 nats, where online ends
    wanted["far, at KL by the former rule"] = 1.5 * 1.25 / 3  # 2.25 nats, linear between 1 and 4
    wanted["near, at KL by the former rule"] = 1.0 - (0.9 + 0.2 * 5 / 12)  # 9 nats, the most of online
    assert {name: mean for name, ((mean, _), _) in found.items()} == pytest.approx(wanted)
    assert module.report(results)[1] == "reproduced"


# -------------------------------------------------------------------------------------------------------------- overopt


def test_best_of_is_the_mean_over_all_subsets(modules):
    x = torch.tensor([[1.0, 2.0, 4.0], [0.0, 5.0, 3.0]])  # each row in the order of another reward
    found = modules["overopt"].best_of(x, 2)
    assert found.tolist() == pytest.approx([(2 + 4 + 4) / 3, (5 + 3 + 3) / 3])
    assert modules["overopt"].best_of(x, 1).tolist() == pytest.approx([7 / 3, 8 / 3])


def test_fits_recover_their_own_curves(modules):
    module, ds = modules["overopt"], [0.3, 0.7, 1.1, 1.9, 2.6]
    found = module.fit("BoN", [(d, d * (0.9 - 0.2 * d)) for d in ds])
    assert found[:3] == pytest.approx((0.9, 0.2, 1), abs=1e-9) and found[3] > 50
    found = module.fit("PPO", [(0.0, 0.1), *((d, d * (0.7 - 0.4 * math.log(d))) for d in ds)])  # d = 0 says nothing
    assert found[:3] == pytest.approx((0.7, 0.4, 1), abs=1e-9) and found[3] > 50


def test_aicc_of_line_and_form_by_hand(modules):
    """Around the line y = d a second coefficient that explains nothing costs 6 + 24 / 2 - 4 - 12 / 3 = 10 at n = 6, but
    for what it takes off the squares."""
    module = modules["overopt"]
    assert module.aicc(6.0, 6, 1) == pytest.approx(4 + 4) and module.aicc(6.0, 6, 2) == pytest.approx(6 + 12)
    assert module.aicc(6 * math.e, 6, 1) == pytest.approx(6 + 4 + 4)
    d = [1.0, 1.0, 2.0, 2.0, 3.0, 3.0]
    around = [(x, x + e) for x, e in zip(d, [0.1, -0.1] * 3, strict=True)]
    assert module.fit("BoN", around) == pytest.approx((1, 0, 1 - 0.06 / 4.06, -10), abs=1e-9)


@pytest.mark.parametrize("swapped", [False, True])
def test_overopt_clauses_by_hand(swapped, modules, tmp_path):
    """b falls with the pairs, but where swapped, in seed 1, those of the first two sizes change places. Gold itself
    bends by 0.01, so that d (1 - b d) is (1 - 4 b) / 0.96 of it at the end; c of readable gold is 0.3 by construction.
    """
    module, results = modules["overopt"], common.Results(tmp_path / "results.csv")
    for setting, (kind, width, pairs) in module.SETTINGS.items():
        for seed in (0, 1):
            rank = module.PAIRS.index(pairs)
            b = 0.1 - 0.02 * ((1 - rank) if swapped and seed == 1 and rank < 2 else rank) + 0.05 * (width == 16)
            for step, d in enumerate((0.5, 1.0, 1.5, 2.0, 2.5, 3.0, 3.5, 4.0)):
                gold = d * (1 - b * d) if kind == "BoN" else d * (1 - 0.4 * math.log(d)) / 5
                kept = {
                    "readable": gold / 2,
                    "readable_validation": gold,
                    "grammatical": 1.0,
                    "best": d * (1 - 0.01 * d),
                }
                proxy = (0.8 - math.sqrt(0.64 - 4 * 0.3 * gold / 2)) / (2 * 0.3) if kind == "PPO" else d
                results.add(setting, seed, {"d": d, "gold": gold, "proxy": proxy, **kept}, step)
            results.add(setting, seed, {"correlation": 0.5})
    found = {name: mean for name, ((mean, _), _) in module.clauses(results).items()}
    of = lambda b: (1 - 0.5 * b) / 0.995 - (1 - 4 * b) / 0.96  # noqa: E731
    falls = (of(0.1) + of(0.08)) / 2 if swapped else of(0.1)
    assert found["share at n = 2 minus share at the largest n: BoN 800"] == pytest.approx(falls, abs=1e-4)
    assert found["-Spearman(b / a, pairs): BoN"] == pytest.approx((1 + 0.8) / 2 if swapped else 1)
    assert found["Spearman(share, pairs): BoN"] == pytest.approx((1 + 0.8) / 2 if swapped else 1)
    assert found["c, readable gold: PPO 800"] == pytest.approx(0.3, abs=1e-4)
    assert found["readable's peak - end, gold: PPO 800"] == pytest.approx(0, abs=1e-4)
    assert found["b, readable gold: PPO 800"] == pytest.approx(0.04, abs=1e-4)
    assert found["AICc, readable gold: PPO 800"] > 10
    assert found["b / a: BoN 3200, 16 wide - 128"] == pytest.approx(0.05, abs=1e-4)
    assert found["share: 128 - BoN 3200, 64 wide"] == pytest.approx(0, abs=1e-4)
    assert sum(inside for _, inside in module.clauses(results).values()) == 6
    assert module.report(results)[1] == ("not resolved" if swapped else "reproduced")


def test_the_peak_of_readable_gold_is_chosen_on_other_prompts(modules, tmp_path):
    module, results = modules["overopt"], common.Results(tmp_path / "results.csv")
    for step, (readable, chosen) in enumerate(((0.1, 0.0), (0.4, 0.9), (0.8, 0.5), (0.2, 0.1))):
        values = {"d": step + 1, "gold": 1.0, "proxy": 2.0, "readable": readable, "readable_validation": chosen}
        results.add("PPO 800", 0, values, step)
    results.add("PPO 800", 0, {"correlation": 0.5})
    found = {name: own[0] for name, own in module.by_seed(results, "PPO 800", "readable").items()}
    assert (found["peak"], found["at d"], found["fall"]) == pytest.approx((0.4, 2.0, 0.2))


def test_a_quarter_of_the_proxys_labels_is_flipped(modules):
    rows = modules["overopt"].noisy_pairs(1000, 0)
    gold = lambda row, side: reviews.gold_reward(f"{row['prompt']} {row[side]}")  # noqa: E731
    gaps = [gap for row in rows if (gap := gold(row, "chosen") - gold(row, "rejected"))]
    assert sum(gap < 0 for gap in gaps) / len(gaps) == pytest.approx(0.25, abs=0.04)


# ----------------------------------------------------------------------------------------------------------- ppo_tricks


def test_ppo_tricks_clauses_by_hand(modules, tmp_path):
    module, results = modules["ppo_tricks"], common.Results(tmp_path / "results.csv")
    changed = {
        "rewards whitened, scale": {"gold": 0.7, "length": 0.5},
        "rewards whitened, shift": {"gold": 1.2},
        "lambda 0": {"objective": 0.25},
        "lambda 1": {"objective": 1.1},
        "KL coefficient 0": {"utility": 0.5},
        "KL coefficient 10": {"utility": 0.9},
    }
    same = dict.fromkeys(module.COLUMNS, 1.0) | {"clipped": 0.01}
    for setting in module.SETTINGS:
        for seed in (0, 1):
            results.add(setting, seed, same | changed.get(setting, {}))
    found = module.clauses(results)
    assert {name: mean for name, ((mean, _), judged) in found.items() if judged} == pytest.approx(
        {
            "gold reward: baseline - rewards whitened, scale": 0.3,
            "length: baseline - rewards whitened, scale": 0.5,
            "0.05 minus the share clipped": 0.04,
            "objective: lambda 1 - lambda 0": 0.85,
            "utility: baseline - KL coefficient 0": 0.5,
            "utility: baseline - KL coefficient 10": 0.1,
        }
    )
    assert found["gold reward: baseline - rewards whitened, shift"][0][0] == pytest.approx(-0.2)
    assert found["objective: lambda 1 - lambda 0.95"][0][0] == pytest.approx(0.1)
    table, verdict, _ = module.report(results)
    assert verdict == "reproduced" and "| lambda 0 | **-0.75 +- 0.00** | 0.00 +- 0.00 |" in table


def test_ppo_tricks_changes_are_flags_that_differ_from_the_default(modules):
    usual = train_ppo.Args()
    for name, flags in modules["ppo_tricks"].SETTINGS.items():
        assert len(flags) == (name != "baseline")
        assert all(getattr(usual, flag) != value for flag, value in flags.items())
