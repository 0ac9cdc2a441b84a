"""What ablations/noise, length and displacement compute of their own: worlds, data, measures, criteria by hand."""

import json
import math
import random
from types import SimpleNamespace

import pytest
import torch

from ablations import common, plot, world
from ablations.displacement import tier_s
from rlhf import BadInput
from support import models, reviews
from support.examples import build


@pytest.fixture(scope="module")
def modules():
    return plot.experiments()


# ---------------------------------------------------------------------------------------------------------------- noise


def test_noise_regret_is_the_kl_to_the_optimum(modules):
    """J(pi*) - J(pi) = beta KL(pi || pi*), here at beta 1, and 0 at pi* itself, where direction and scale are 1."""
    noise = modules["noise"]
    features, ref, rewards, _ = (x[None] for x in noise.draw_world(3, "BT", 10, 0.0))
    theta = torch.randn(1, 2, noise.FEATURES, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    optimum = torch.linalg.lstsq(features[0].flatten(0, 1), rewards[0].flatten()).solution
    theta[0, 1] = optimum
    both = (torch.cat([x, x]) for x in (features, ref, rewards))
    found = noise.measure(theta, *both, noise.TEST)
    part = slice(noise.TEST * noise.PROMPTS, None)
    best = (ref + rewards)[0, part].log_softmax(1)
    logps = (ref[0] + features[0] @ theta[0, 0])[part].log_softmax(1)
    kl = (logps.exp() * (logps - best)).sum(1).mean()
    assert found["regret"][0].tolist() == pytest.approx([kl.item(), 0.0], abs=1e-9)
    assert found["cosine"][0, 1].item() == pytest.approx(1) == found["scale"][0, 1].item()


def test_noise_labels_are_right_but_for_the_flips(modules):
    noise = modules["noise"]
    for share in (0.0, 0.3):
        features, _, rewards, differences = noise.draw_world(0, "sure", 4000, share)
        direction = torch.linalg.lstsq(features.flatten(0, 1), rewards.flatten()).solution
        wrong = (differences @ direction < 0).double().mean().item()
        assert wrong == pytest.approx(share, abs=4 * math.sqrt(share * (1 - share) / 4000))


def test_noise_scaled_to_a_kl(modules):
    noise = modules["noise"]
    world = [x[None] for x in noise.draw_world(1, "BT", 10, 0.0)[:3]]
    theta = torch.randn(2, 1, noise.FEATURES, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    scaled = noise.at_kl(theta, *world)
    kl = noise.measure(scaled, *world, noise.TEST)["kl"]
    assert kl.flatten().tolist() == pytest.approx([noise.MATCHED] * 2, abs=1e-9)
    assert torch.nn.functional.cosine_similarity(scaled, theta, dim=-1).min() > 1 - 1e-12


def test_noise_best_scale(modules):
    """Of the true direction the best scale is the true one; of another, where the slope of the regret is 0."""
    noise = modules["noise"]
    world = [x[None] for x in noise.draw_world(1, "BT", 10, 0.0)[:3]]
    optimum = torch.linalg.lstsq(world[0][0].flatten(0, 1), world[2][0].flatten()).solution
    other = torch.randn(noise.FEATURES, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    found = noise.best_scale(torch.stack([40 * optimum, 0.02 * (optimum + 0.3 * other)])[:, None], *world)
    assert torch.allclose(found[0, 0], optimum, rtol=1e-4)
    near = torch.stack([found[1, 0] * x for x in (0.999, 1.0, 1.001)])[:, None]
    low, least, high = noise.measure(near, *world, noise.VALIDATION)["regret"].flatten().tolist()
    assert least < min(low, high)


def test_noise_gains_by_hand(modules, tmp_path):
    noise, results = modules["noise"], common.Results(tmp_path / "results.csv")
    for name, (method, _, share) in noise.SETTINGS.items():
        for seed in (0, 1):
            x = {"DPO": 0.5, "robust": 0.1}.get(method, 0.2) + 0.01 * seed * (method == "robust" and share == 0.4)
            results.add(name, seed, dict.fromkeys(("final", "stopped", "tuned", "matched", "cosine", "scale"), x))
    found = noise.clauses(results)
    assert {share: mean for share, (mean, _) in found.items()} == pytest.approx({0.2: 0.4, 0.3: 0.4, 0.4: 0.395})
    assert found[0.4][1] == pytest.approx(12.706 * 0.005)
    assert noise.gain(results, "matched", noise.MAIN, 0.2, "robust")[0] == pytest.approx(-0.4), "more reward is better"
    assert noise.gain(results, "tuned", noise.MAIN, 0.2, "IPO", "robust")[0] == pytest.approx(-0.1)
    table, verdict, _ = noise.report(results)
    assert verdict == "reproduced" and "| BT 4000 | 0.2 | 0.4000 +- 0.0000 | 0.3000 +- 0.0000 |" in table


# --------------------------------------------------------------------------------------------------------------- length


@pytest.mark.parametrize("bias", [0.5, 0.7])
def test_length_of_the_longer_ones_so_many_are_preferred(bias, modules, tmp_path):
    rows = [json.loads(line) for line in open(modules["length"].data(tmp_path, 0, bias, 40))]
    lengths = [(len(row["chosen"].split()), len(row["rejected"].split())) for row in rows]
    assert len(rows) == 40 and all(chosen != rejected for chosen, rejected in lengths)
    assert sum(chosen > rejected for chosen, rejected in lengths) == round(40 * bias)


def test_length_beta_at_a_kl(modules):
    at_kl = modules["length"].at_kl
    assert at_kl({1.0: 1.6, 4.0: 0.1, 16.0: 0.05}, 0.4) == 2.0  # halfway in logarithms: 4 times above, 4 times below
    assert at_kl({1.0: 0.4, 4.0: 0.1}, 0.4) == 1.0
    assert at_kl({1.0: 0.2, 4.0: 0.1}, 0.4) == 1.0, "the nearest where none is above"


@pytest.fixture
def lengths(modules, tmp_path):
    """Two seeds of SFT answers of 10 and 11 tokens, and runs of three checkpoints, whose KL at each is that here, and
    whose length rises evenly over them to the ratio."""
    results = common.Results(tmp_path / "results.csv")
    ratios = {
        "DPO": (1.0, 1.25, 1.5),
        "DPO per token": (1.0, 1.05, 1.1),
        "SimPO": (1.2, 1.3, 1.4),
        "R-DPO": (1.0, 1.1, 1.3),
    }
    kls = {"DPO": (0.2, 0.4, 0.8), "DPO per token": (0.1, 0.2, 0.4), "SimPO": (0.4, 0.8, 1.6), "R-DPO": (0.2, 0.5, 0.6)}
    for seed in (0, 1):
        results.add("SFT", seed, {"length": 10.0 + seed, "gold": 0.0})
        for m, found in ratios.items():
            for bias, ratio in zip(modules["length"].BIASES, found, strict=True):
                for step, kl in enumerate(kls[m], 1):
                    values = {"length": (10.0 + seed) * (1 + (ratio - 1) * step / 3), "gold": 0.3 * step, "kl": kl}
                    results.add(f"{m} {bias:.0%}", seed, values, step)
                results.add(f"{m} {bias:.0%}", seed, values)
    return results


def test_length_clauses_by_hand(modules, lengths):
    found = modules["length"].clauses(lengths)
    assert found["slope of DPO at the end"] == pytest.approx((0.25, 0), abs=1e-4)
    assert found["slope at the end: DPO - R-DPO"] == pytest.approx((0.1, 0), abs=1e-4)
    assert found["at 60 %: DPO - 1.2"] == pytest.approx((0.05, 0), abs=1e-4)
    assert found["at 60 %: 1.1 - DPO per token"] == pytest.approx((0.05, 0), abs=1e-4)
    assert found["at 50 %: 1.1 - SimPO"] == pytest.approx((-0.1, 0), abs=1e-4)
    # at a KL of 0.4: DPO two thirds of its way, SimPO a third, DPO per token all, R-DPO 5/9
    assert found["slope at equal KL: DPO - SimPO"] == pytest.approx((0.5 / 3 - 0.1 / 3, 0), abs=1e-4)
    assert found["slope at equal KL: DPO - DPO per token"] == pytest.approx((0.5 / 3 - 0.05, 0), abs=1e-4)
    assert found["slope at equal KL: DPO - R-DPO"] == pytest.approx((0.5 / 3 - 0.75 / 9, 0), abs=1e-4)
    assert len(found) == 13 and common.verdict([*found.values()]) == "contradicted"


def test_length_at_one_kl_by_hand(modules, lengths):
    length = modules["length"]
    assert length.one_kl(lengths, "60%") == {0: 0.4, 1: 0.4}, "where DPO per token, which goes least far, ends"
    assert length.at_one_kl(lengths, "DPO 60%", "gold") == pytest.approx({0: 0.6, 1: 0.6})
    assert length.at_one_kl(lengths, "R-DPO 60%", "gold") == pytest.approx({0: 0.5, 1: 0.5})
    assert length.at_one_kl(lengths, "DPO 70%", "length")[0] == pytest.approx(10 * (1 + 0.5 * 2 / 3), abs=1e-3)
    assert length.one_kl(lengths, "80%") == {} == length.at_one_kl(lengths, "DPO 80%", "gold")


def test_length_strengths_are_those_of_the_trials(modules, tmp_path):
    length, results = modules["length"], common.Results(tmp_path / "results.csv")
    results.add(length.OF_TRIALS, 0, {"length": 12.0})
    for beta, kl in ((0.05, 1.6), (0.2, 0.8), (0.8, 0.2)):
        results.add(f"DPO beta {beta:g}", 0, {"kl": kl, "length": 12.0})
    assert length.strengths(results) == {"DPO": {"beta": 0.4}}
    for penalty, tokens in ((0.02, 13.0), (0.05, 11.5), (0.1, 10.0)):
        results.add(f"R-DPO length_penalty {penalty:g}", 0, {"kl": 0.4, "length": tokens})
    assert length.strengths(results)["R-DPO"] == {"beta": 0.4, "length_penalty": 0.05}


def test_length_line_of_the_reward(modules, monkeypatch):
    """log pi - log ref of 0, 1 and 5 nats at lengths of 2, 3 and 4: slope 2.5, R^2 = 2.5^2 * (2/3) / (14/3) = 25/28."""
    length = modules["length"]
    given = {
        "policy": [torch.tensor([0.0, 2.0]), torch.tensor([7.0])],
        "ref": [torch.tensor([0.0, 1.0]), torch.tensor([2.0])],
    }
    monkeypatch.setattr(length.scoring, "score_logps", lambda model, *_: given[model])
    tokenizer = reviews.tokenizer()
    examples = [SimpleNamespace(responses=[[1] * 2, [1] * 3]), SimpleNamespace(responses=[[1] * 4])]
    assert length.on_length("policy", "ref", tokenizer, examples) == pytest.approx((2.5, 25 / 28))


# --------------------------------------------------------------------------------------------------------- displacement


def test_displacement_edit_is_one_weaker_word_of_the_kind(modules):
    edited, symbol, rng = modules["displacement"].edited, modules["displacement"].SYMBOL, random.Random(0)
    made = 0
    for prompt in reviews.prompts(50, 0):
        [text] = reviews.continuations(prompt, 1, rng)
        if found := edited(prompt, text, rng):
            other, place = found
            differing = [i for i, pair in enumerate(zip(text.split(), other.split(), strict=True)) if len({*pair}) == 2]
            assert differing == [place] and symbol[text.split()[place]] == symbol[other.split()[place]]
            assert reviews.gold_reward(f"{prompt} {other}") < reviews.gold_reward(f"{prompt} {text}")
            assert reviews.log_prob(f"{prompt} {other}") > -math.inf
            made += 1
    assert made > 20


def test_displacement_data_share_prompts_and_preferred_answers(modules, tmp_path):
    rows = {}
    for kind in ("edit 1", "random", "mixed"):
        rows[kind] = [json.loads(line) for line in open(modules["displacement"].data(tmp_path, 0, kind, 10))]
    assert len(rows["mixed"]) == 10
    for edit, other, mixed in zip(*rows.values(), strict=True):
        assert edit["prompt"] == other["prompt"] == mixed["prompt"] and edit["chosen"] == other["chosen"]
        assert edit["place"] >= 0 > other["place"]
    assert rows["mixed"] == [rows["edit 1" if i % 2 == 0 else "random"][i] for i in range(10)]


def test_displacement_by_hand_a_table_never_falls(modules):
    found = {x: modules["displacement"].by_hand(x, 7) for x in modules["displacement"].BY_HAND}
    assert found["table"]["fell"] == 0 == found["table"]["below 0"] and found["table"]["D_w"] > 0
    assert all(x["below 0"] <= x["fell"] for x in found.values()), "what ends below 0 has fallen at some step"
    assert found["like rows"]["fell"] > found["unlike rows"]["fell"] > 0.2
    assert all(x["margin"] > 0 and x["formula off"] < 1e-12 for x in found.values())


def test_displacement_fresh_answers_are_the_grammar_s_own(modules):
    tokenizer = reviews.tokenizer()
    prompt = reviews.prompts(1, 0)[0]
    row = {"prompt": prompt, "chosen": "is good .", "rejected": "is bad ."}
    pairs = build([("", row)], tokenizer, "preference", 512, 1024)[0]
    found = modules["displacement"].fresh(pairs * 20, tokenizer, 0)
    assert len(found) == 20 * modules["displacement"].FRESH and len({*(e.response_texts[0] for e in found)}) > 20
    for example in found:
        assert example.prompt == pairs[0].prompt and example.prompt_text == prompt
        assert reviews.log_prob(f"{prompt} {example.response_texts[0]}") > -math.inf


@pytest.fixture
def moved(modules, tmp_path):
    """Runs of two checkpoints with edits: DPO falls, DPO-positive hardly moves, NCA keeps what it has at half."""
    results = common.Results(tmp_path / "results.csv")
    ends = {
        "DPO, edit 1": (-0.3, -1.3, -0.5),
        "DPO, random": (-0.1, -0.9, -0.4),
        "DPO, mixed": (-0.2, -1.0, -0.4),
        "DPO-positive, edit 1": (0.1, -0.1, 0.0),
        "NCA, edit 1": (-0.1, -0.7, -0.2),
    }
    for seed in (0, 1):
        for x, below in {"table": 0.0, "unlike rows": 0.3, "like rows": 0.7}.items():
            results.add(x, seed, {"below 0": below})
        for x, (D_w, D_l, usual) in ends.items():
            for step, share in ((7, 0.25), (14, 1.0)):
                now = share**2 * D_w
                values = {"D_w": now, "D_l": now - share * (D_w - D_l), "fresh": share * usual}
                results.add(x, seed, values, step)
            results.add(x, seed, {"D_w": D_w, "D_l": D_l, "fresh": usual, "D_w held out": 2 * D_w, "spearman": -0.1})
    return results


def test_displacement_clauses_by_hand(modules, moved):
    found = modules["displacement"].clauses(moved)
    wanted = {
        "by hand, share with D_w < 0: like rows - unlike rows": 0.4,
        "- D_w of DPO, edit 1": 0.3,
        "fresh - D_w of DPO, edit 1": -0.2,
        "D_w of DPO: random - edit 1": 0.2,
        "D_w held out of DPO: random - edit 1": 0.4,
        "- Spearman(CHES, D_w), mixed": 0.1,
        "D_w, edit 1: DPO-positive": 0.1,
        "D_w, edit 1, at one margin: DPO-positive - DPO": 0.115,
        "D_w, edit 1: NCA": -0.1,
        "D_w, edit 1, at one margin: NCA - DPO": 0.05,
    }
    assert {name: mean for name, (mean, _) in found.items()} == pytest.approx(wanted, abs=1e-6)
    assert common.verdict([*found.values()]) == "contradicted"


def test_displacement_at_one_margin_by_hand(modules, moved):
    """The margin rises evenly, D_w with its square: DPO has 0.2 at four fifths of the way to its first checkpoint."""
    usual, other = "DPO, edit 1", "DPO-positive, edit 1"
    found = modules["displacement"].at_one_margin(moved, usual, other)
    wanted = {usual: {"margin": 0.2, "D_w": -0.015, "excess": 0.085}, other: {"margin": 0.2, "D_w": 0.1, "excess": 0.1}}
    assert {x: {name: values[1] for name, values in at.items()} for x, at in found.items()} == {
        x: pytest.approx(at, abs=1e-6) for x, at in wanted.items()
    }
    nothing = modules["displacement"].at_one_margin(moved, "NCA, random", usual)
    assert nothing[usual] == {"margin": {}, "D_w": {}, "excess": {}}


def test_displacement_strengths_have_the_most_gold(modules, tmp_path):
    displacement, results = modules["displacement"], common.Results(tmp_path / "results.csv")
    for name, gold in {"NCA beta 0.03": 0.1, "NCA beta 0.1": 0.3, "NCA beta 0.3": 0.2, "DPO beta 0.3": -1.0}.items():
        results.add(name, 0, {"gold": gold})
    assert displacement.strengths(results) == {"DPO": 0.3, "NCA": 0.1}


@pytest.fixture
def small(tmp_path, monkeypatch):
    """An untrained model of eight words in the place of a real one, and three of them in that of Yes, No, Never."""
    world.new_model(tmp_path / "untrained", 0)
    monkeypatch.setattr(tier_s, "ASK", "d {}")
    monkeypatch.setattr(tier_s, "STATEMENTS", ("e f",))
    monkeypatch.setattr(tier_s, "WORDS", ("a", "b", "c"))
    monkeypatch.setattr(tier_s, "SETTINGS", {"DPO": ("dpo", "a", "b"), "long": ("dpo", "a a", "b")})
    return str(tmp_path / "untrained")


def test_displacement_of_one_token(small, tmp_path):
    along, end = tier_s.run("DPO", 0, small, tmp_path, {"lr": 1e-3, "epochs": 4, "save_every": 1})
    assert [*along] == [1, 2, 3, 4] and end["D_w"] - end["D_l"] > along[1]["D_w"] - along[1]["D_l"] > 0
    assert end["after"] == pytest.approx(end["before"] * math.exp(end["D_w"]))

    tokenizer, model = models.load_tokenizer(small), models.load_model(small, "cpu").double()
    w, other = (tokenizer.convert_tokens_to_ids(x) for x in ("a", "b"))
    with torch.no_grad():
        state = model.base_model(tokenizer("d e f", return_tensors="pt").input_ids).last_hidden_state[0, -1]
        head = model.lm_head
        logps = lambda h: head(h).log_softmax(0)  # noqa: E731
        step = 1e-5 * (head.weight[w] - head.weight[other])
        assert end["before"] == pytest.approx(logps(state)[w].exp().item(), rel=1e-5)
        assert end["formula"] == pytest.approx((logps(state + step) - logps(state - step))[w].item() / 2e-5, rel=1e-4)
        lost = (1 - math.exp(end["D_l"])) * logps(state)[other].exp().item()
    assert end["after"] - end["before"] + end["third"] + end["others"] == pytest.approx(lost, rel=1e-4)


def test_displacement_wants_words_of_one_token(small, tmp_path):
    with pytest.raises(BadInput, match="a a and b are not one token"):
        tier_s.run("long", 0, small, tmp_path, tier_s.SMOKE)
