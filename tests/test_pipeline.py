"""All phases one after the other: that they fit together, and what comes out of the whole."""

import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import pipeline
from rlhf import BadInput
from support import reviews


def rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in open(path, encoding="utf-8")]


@pytest.fixture
def smoke(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    pipeline.main(pipeline.Args(prompts=32, smoke=True, device="cpu"))
    return tmp_path / "runs/pipeline"


def test_smoke_writes_every_file_with_its_columns(smoke, capsys):
    """Each phase reads what the one before it wrote; the rewards in the rankings are gold's, the ranks go with them."""
    samples, ranked = rows(smoke / "preferences-samples.jsonl"), rows(smoke / "preferences.jsonl")
    assert len(samples) == len(ranked) == 32 and {len(row["responses"]) for row in ranked} == {4}
    for sample, row in zip(samples, ranked, strict=True):
        assert {k: row[k] for k in ("prompt", "responses", "ended")} == {
            k: sample[k] for k in ("prompt", "responses", "ended")
        }
        assert row["noise"] == reviews.NOISE and set(row["ranks"]) <= {1, 2, 3, 4}
        assert row["rewards"] == [reviews.gold_reward(f"{row['prompt']} {text}") for text in row["responses"]]
    second = rows(smoke / "second.jsonl")
    assert [row["prompt"] for row in second] == [row["prompt"] for row in ranked[16:]]
    assert any(x["responses"] != y["responses"] for x, y in zip(second, ranked[16:], strict=True))

    for name in ("sft", "rm", "round1", "round2", "dpo-0.6", "dpo-0.3", "dpo-0.1"):
        assert {"results.json", "config.json", "model.safetensors", "curves.png"} <= {
            path.name for path in (smoke / name).iterdir()
        }
    assert "score.weight" in load_file(smoke / "rm" / "model.safetensors")
    sft, first = (load_file(smoke / name / "model.safetensors") for name in ("sft", "round1"))
    assert any(not torch.equal(sft[name], first[name]) for name in sft)

    results = json.loads((smoke / "results.json").read_text())
    assert all(map(math.isfinite, results.values()))
    assert {"difference", "interval", "kl", "kl_lower", "kl_upper"} == results.keys()
    assert (smoke / "evaluate" / "reward_kl.png").exists()

    with pytest.raises(BadInput, match="is there already: use --resume"):
        pipeline.main(pipeline.Args(prompts=32, smoke=True, device="cpu"))
    with pytest.raises(BadInput, match="other flags"):
        pipeline.main(pipeline.Args(prompts=33, smoke=True, device="cpu", resume=True))
    (smoke / "results.json").unlink()
    weights = {name: (smoke / name / "model.safetensors").stat().st_mtime_ns for name in ("sft", "round2")}
    capsys.readouterr()
    again = pipeline.main(pipeline.Args(prompts=32, smoke=True, device="cpu", resume=True))
    assert again == results
    assert weights == {name: (smoke / name / "model.safetensors").stat().st_mtime_ns for name in weights}

    for name in ("preferences", "second"):  # killed while it labelled
        ranked = (smoke / f"{name}.jsonl").read_bytes()
        (smoke / f"{name}.jsonl").unlink()
        (smoke / f"{name}.jsonl.partial").write_bytes(ranked[: len(ranked) // 2])
        assert pipeline.main(pipeline.Args(prompts=32, smoke=True, device="cpu", resume=True)) == results
        assert (smoke / f"{name}.jsonl").read_bytes() == ranked
    (smoke / "args.json").write_text("{")
    with pytest.raises(BadInput, match=r"runs/pipeline/args.json is damaged \("):
        pipeline.main(pipeline.Args(prompts=32, smoke=True, device="cpu", resume=True))


def test_matched_interpolates_at_the_kl_of_the_second_round():
    """KL 2 lies a quarter of the way from 1 to 5: the lower policy has 3/4 of the weight, prompt by prompt."""
    ours = {"kl": [1.0, 3.0], "reward": [1.0, 2.0]}
    lower, upper = {"kl": [1.0, 1.0], "reward": [0.4, 0.8]}, {"kl": [4.0, 6.0], "reward": [2.0, 0.0]}
    far, near = {"kl": [9.0, 9.0], "reward": [9.0, 9.0]}, {"kl": [0.5, 0.5], "reward": [9.0, 9.0]}
    differences = [1 - (0.75 * 0.4 + 0.25 * 2), 2 - (0.75 * 0.8 + 0.25 * 0)]
    for others in ([lower, upper], [upper, lower, far], [near, upper, lower]):
        found = pipeline.matched(ours, others)
        assert found["difference"] == pytest.approx(sum(differences) / 2)
        assert found["interval"] == pytest.approx(12.706 * abs(differences[0] - differences[1]) / 2)  # t(1)
        assert (found["kl"], found["kl_lower"], found["kl_upper"]) == (2, 1, 5)
    assert "is better" not in pipeline.verdict(found) and "interpolated" in pipeline.verdict(found)
    assert "the second round is worse" in pipeline.verdict(found | {"difference": -0.5, "interval": 0.1})

    beyond = pipeline.matched(
        far, [lower, upper]
    )  # on the line through both, at 9: -1 times the lower, 2 times the upper
    assert beyond["difference"] == pytest.approx(((9 + 0.4 - 4) + (9 + 0.8 - 0)) / 2)
    assert "EXTRApolated" in pipeline.verdict(beyond)
    assert pipeline.matched(near, [upper, lower])["kl_lower"] == 1


@pytest.mark.slow
def test_the_whole(tmp_path, monkeypatch):
    """The embedded task from beginning to end: what each phase must reach."""
    monkeypatch.chdir(tmp_path)
    found = pipeline.main(pipeline.Args(device="cpu"))
    out = tmp_path / "runs/pipeline"
    results = {name: json.loads((out / name / "results.json").read_text()) for name in ("rm", "evaluate")}
    assert results["rm"]["ceiling"] - results["rm"]["accuracy"] < 0.03
    assert results["rm"]["gold_spearman"] > 0.9
    models = {Path(name).name: numbers for name, numbers in results["evaluate"]["models"].items()}
    for name in ("round1", "round2", "dpo-0.6", "dpo-0.3", "dpo-0.1"):
        assert models[name]["reward"]["low"] > models["sft"]["reward"]["high"]
        assert models[name]["win"]["low"] > 0.6
    for tight, loose in (("0.6", "0.3"), ("0.3", "0.1")):  # the leash
        assert models[f"dpo-{loose}"]["kl"]["low"] > models[f"dpo-{tight}"]["kl"]["high"]
    assert models["round2"]["kl"]["low"] > models["round1"]["kl"]["high"]
    assert found["kl_lower"] < found["kl"] < found["kl_upper"] + 0.1  # interpolated, or hardly beyond, which is said
    assert ("EXTRApolated" in pipeline.verdict(found)) == (found["kl"] > found["kl_upper"])
