"""benchmarks/: each side does the work that it is timed on, and a side that does other work is refused.

Our sides and the plain loop run here on a tiny model; those of TRL (slow tests) where it is installed.
"""

import csv
import json

import pytest
import torch
from transformers import AutoModelForCausalLM

from benchmarks import compare, dpo_step, logprobs, rl_step, rollout, scaling, sft_step, startup


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return compare.small_model(str(tmp_path_factory.mktemp("model")), layers=1, width=32, vocabulary=256)


def sums_of_logits(model: str, sequences: list[tuple[list[int], list[int]]]) -> dict[str, float]:
    """The log-prob of each response, from the logits of its prompt with it alone."""
    own = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    found = {}
    for prompt, response in sequences:
        logps = own(torch.tensor([prompt + response])).logits[0].double().log_softmax(-1)
        places = range(len(prompt) - 1, len(prompt) + len(response) - 1)
        found[compare.key(prompt + response)] = sum(logps[i, t].item() for i, t in zip(places, response, strict=True))
    return found


ON_CPU = {"device": "cpu", "dtype": "float32", "micro_batch_tokens": 2048}


def rl_job(model: str, method: str) -> dict:
    a = rl_step.Args(prompts=2, k=4, longest_prompt=16, longest_answer=8)
    return rl_step.make_job(a, model, method)


def dpo_job(model: str) -> dict:
    dpo_step.PROFILES["tiny"] = (12, 8)
    pairs = dpo_step.make_pairs(dpo_step.Args(pairs=4, steps=1), "tiny", model)
    return {"model": model, "rows": pairs, "batch": 4, **ON_CPU}


def sft_job(model: str, cut: bool = False) -> dict:
    """Rows with one response; `cut`: of which only every second token is trained."""
    rows = compare.random_rows(model, 4, 12, 8, k=1)
    if cut:
        rows = [x | {"trained": [[j % 2 == 0 for j in range(len(x["responses"][0]))]]} for x in rows]
    return {"model": model, "rows": rows, "batch": 4, **ON_CPU}


@pytest.mark.parametrize("method", ["grpo", "rloo"])
def test_our_rl_step_scores_the_given_answers_and_times_each_rollout(model, method):
    job = rl_job(model, method)
    found = rl_step.ours(job | {"epochs": 2, "minibatches": 2})
    sequences = [(p, r) for p, own in zip(job["prompts"], job["answers"], strict=True) for r in own]
    assert compare.largest_gap(found["logps"], sums_of_logits(model, sequences)) < 1e-4
    assert len(found["rollouts"]) == job["rollouts"] == 2
    assert all(parts[phase] > 0 for parts in found["rollouts"] for phase in rl_step.PHASES)
    summary = rl_step.summary([found])
    assert summary["step"] == pytest.approx(summary["rollout"] + summary["scoring + update"])


def test_our_dpo_step_and_the_padded_loop_do_the_same_work(model):
    job = dpo_job(model) | {"epochs": 2}
    mine, loop = dpo_step.ours(job), dpo_step.loop(job)
    sequences = [(x["prompt"], r) for x in job["rows"] for r in x["responses"]]
    exact = sums_of_logits(model, sequences)
    assert compare.largest_gap(mine["logps"], exact) < 1e-4
    assert compare.largest_gap(loop["logps"], exact) < 1e-4
    assert mine["norms"] == pytest.approx(loop["norms"], rel=1e-4)
    assert len(mine["seconds"]) == len(loop["seconds"]) == 2


@pytest.mark.parametrize("cut", [False, True])
def test_our_sft_step_counts_the_trained_tokens(model, cut):
    """The log-prob of each row's trained tokens, and the norm of the gradient of their mean."""
    job = sft_job(model, cut)
    mine = sft_step.ours(job | {"epochs": 2})
    own = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    exact, total, count = {}, 0.0, 0
    for x in job["rows"]:
        prompt, response = x["prompt"], x["responses"][0]
        logps = own(torch.tensor([prompt + response])).logits[0].log_softmax(-1)
        own_logps = logps[range(len(prompt) - 1, len(prompt) + len(response) - 1), response]
        trained = torch.tensor(x["trained"][0] if cut else [True] * len(response))
        exact[compare.key(prompt + response)] = own_logps[trained].sum().item()
        total, count = total - own_logps[trained].sum(), count + int(trained.sum())
    (total / count).backward()
    norm = torch.stack([p.grad.norm() for p in own.parameters()]).norm().item()
    assert compare.largest_gap(mine["logps"], exact) < 1e-4
    assert mine["norms"][0] == pytest.approx(norm, rel=1e-4) and len(mine["seconds"]) == 2


def test_parity_fails_for_other_sequences_and_other_numbers(model):
    job = dpo_job(model) | {"epochs": 1}
    mine = dpo_step.ours(job)
    job["rows"][0]["responses"][0][0] += 1
    with pytest.raises(SystemExit, match="8 and 8 sequences, of which 7 agree"):
        compare.largest_gap(mine["logps"], dpo_step.loop(job)["logps"])
    name = next(iter(mine["logps"]))
    gap = compare.largest_gap(mine["logps"], mine["logps"] | {name: mine["logps"][name] + 0.002})
    with pytest.raises(SystemExit, match="log-probs differ by 0.002, more than 0.001"):
        compare.require_parity("log-probs", gap, 1e-3)
    with pytest.raises(SystemExit):
        compare.require_parity("log-probs", float("nan"), 1e-3)


def test_both_sides_of_the_rollout_give_the_same_greedy_answers(model):
    prompts = [[30, 40, 50], [60, 70, 80, 90, 100], [35]]
    job = {"model": model, "prompts": prompts, "k": 2, "tokens": 8}
    mine, library = (rollout.worker(side, job) for side in ("ours", "library"))
    assert [y[: len(x)] for x, y in zip(mine["greedy"], library["greedy"], strict=True)] == mine["greedy"]
    assert len(mine["greedy"]) == 6 and mine["greedy"][0] == mine["greedy"][1] != mine["greedy"][2]


@pytest.mark.parametrize("way", ["ours", "ours, recompute", "naive", "torch"])
def test_each_way_to_log_probs_is_near_float64(way):
    if reason := logprobs.hindrance(way, "cpu", "float32"):
        pytest.skip(reason)
    found = logprobs.worker(way, {"n": 20, "d": 8, "v": 50, "dtype": "float32", "device": "cpu", "repeats": 1})
    assert found["error"] < 1e-5 and found["gradient error"] < 1e-5 and found["ms"] > 0


def test_operations_count_prompts_once_and_the_head_on_responses_alone(model):
    own = AutoModelForCausalLM.from_pretrained(model)
    body = 32 * 32 * 2 + 32 * 16 * 2 + 3 * 32 * 688  # query, output; key, value (half the heads); the MLP
    pair = {"prompt": [1] * 10, "responses": [[1] * 3, [1] * 4], "trained": None}
    assert compare.operations(own, [pair]) == 6 * (body * 17 + 32 * 256 * 7)
    cut = pair | {"trained": [[True, False, True], [True] * 4]}
    assert compare.operations(own, [pair, cut]) == 6 * (body * 34 + 32 * 256 * 13)


def test_report_writes_rows_with_hardware(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(compare, "ROOT", tmp_path)
    readme = tmp_path / "benchmarks" / "README.md"
    readme.parent.mkdir()
    readme.write_text("a\n<!-- name -->\nold\n<!-- end -->\n<!-- other -->\nkept\n<!-- end -->\n")
    rows = [{"side": "ours", "s": 1.0}, {"side": "theirs", "s": 4.0}, {"side": "ratio", "s": 0.25}]
    compare.report("name", rows, quick=False)
    with open(tmp_path / "benchmarks/results/name.csv") as file:
        read = list(csv.DictReader(file))
    assert [row["s"] for row in read] == ["1", "4", "0.25"] and f"torch {torch.__version__}" in read[0]["versions"]
    printed = capsys.readouterr().out
    assert "ratio   0.25" in printed
    top, _, rest = readme.read_text().partition("<!-- end -->")
    assert top.startswith("a\n<!-- name -->\n```\nside") and "ratio   0.25" in top and "old" not in top
    assert rest == "\n<!-- other -->\nkept\n<!-- end -->\n"


def test_slopes_are_the_exponents_of_growth():
    assert scaling.slope([1, 2, 4], [3.0, 6.0, 12.0]) == pytest.approx(1, abs=1e-6)
    assert scaling.slope([1, 2, 4], [1.0, 4.0, 16.0]) == pytest.approx(2, abs=1e-6)
    assert scaling.slope([1, 2, 4], [2.0, 2.0, 2.0]) == pytest.approx(0, abs=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["grpo", "rloo"])
def test_trl_computes_the_log_probs_and_the_gradient_of_our_rl_step(model, method):
    pytest.importorskip("trl", reason="benchmarks/requirements.txt is not installed")
    job = rl_job(model, method) | {"rollouts": 1}
    mine, theirs = rl_step.ours(job), rl_step.trl(job)
    assert compare.largest_gap(mine["logps"], theirs["logps"]) < 1e-3
    assert mine["norm"] == pytest.approx(theirs["norm"], rel=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("side", ["trl_best", "trl_best_1", "trl_default"])
def test_trl_computes_the_log_probs_and_the_gradient_of_our_dpo_step(model, side):
    pytest.importorskip("trl", reason="benchmarks/requirements.txt is not installed")
    job = dpo_job(model) | {"epochs": 1}
    mine, theirs = dpo_step.ours(job), dpo_step.WORKERS[side](job)
    assert compare.largest_gap(mine["logps"], theirs["logps"]) < 1e-3
    assert mine["norms"] == pytest.approx(theirs["norms"], rel=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("cut", [False, True])
@pytest.mark.parametrize("side", ["trl_best", "trl_best_1", "trl_packed", "trl_default"])
def test_trl_computes_the_log_probs_and_the_gradient_of_our_sft_step(model, side, cut):
    pytest.importorskip("trl", reason="benchmarks/requirements.txt is not installed")
    job = sft_job(model, cut) | {"epochs": 1}
    mine, theirs = sft_step.ours(job), sft_step.WORKERS[side](job)
    assert compare.largest_gap(mine["logps"], theirs["logps"]) < 1e-3
    assert mine["norms"] == pytest.approx(theirs["norms"], rel=1e-4)


@pytest.mark.slow
def test_startup_times_the_first_step_and_the_next_run_of_a_sweep(model, tmp_path):
    rows = [{"prompt": f"w{i} w30", "chosen": f"w{i + 40}", "rejected": f"w{i + 60}"} for i in range(16)]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    given = {"data": f"{tmp_path}/pairs.jsonl", "eval_fraction": 0.2, "eval_prompts": 0, "device": "cpu"}
    job = {"model": model, "folder": str(tmp_path), "flags": given}
    with pytest.raises(SystemExit, match="not in the cache"):
        startup.next_run(job)
    first = startup.first_step(job)
    assert first["cpu"] > 0 and [*(tmp_path / "cache").iterdir()]
    again = startup.next_run(job)
    assert 0 < again["seconds"] < first["seconds"] and 0 < again["cpu"] < first["cpu"]
    assert startup.show_help(job)["seconds"] > 0


@pytest.mark.slow
def test_sides_run_in_processes_of_their_own(model):
    job = {"model": model, "prompts": [[30, 40], [50]], "k": 2, "tokens": 4}
    found = compare.in_turn("rollout", ["ours", "library"], job, 1)
    assert found["ours"][0]["greedy"] == found["library"][0]["greedy"]
    with pytest.raises(SystemExit, match="ours failed"):
        compare.in_turn("rollout", ["ours"], job | {"model": "/nowhere"}, 1)
