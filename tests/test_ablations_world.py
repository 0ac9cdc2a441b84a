"""The enumerable world of the ablations and what its experiments compute: DPO's frontier, beta, weight; surrogates."""

import itertools
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import train_dpo
import train_ppo
from ablations import common, world
from ablations.beta_sweep import __main__ as beta_sweep
from ablations.frontier import __main__ as frontier
from ablations.frontier import mine, tier_s
from ablations.grad_weight import __main__ as grad_weight
from ablations.surrogates import __main__ as surrogates
from rlhf import BadInput, advantages
from rlhf.losses import dpo
from support import models, runs, scoring
from support.examples import build

SEED = 3
SIZE = 1 + 7 + 49 + 343 + 2401


@pytest.fixture(scope="module")
def untrained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world") / "model"
    world.new_model(folder, SEED)
    model = models.load_model(str(folder), "cpu")
    with torch.no_grad():
        for weight in model.parameters():  # so that words are far from equally likely
            weight.add_(0.1 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(0)))
    return model, models.load_tokenizer(str(folder))


@pytest.fixture(scope="module")
def reference(untrained):
    asked = world.prompts(SEED)["validation"][:3]
    return asked, world.answer_logps(untrained[0], asked), world.rewards(SEED, asked)


# ------------------------------------------------------------------------------------------------------------ the world


def test_prompts_are_split():
    parts = world.prompts(SEED)
    assert [len(x) for x in parts.values()] == [world.VALIDATION, world.TEST, 343 - world.VALIDATION - world.TEST]
    assert len({x for part in parts.values() for x in part}) == 343


def test_answers_are_all_there_once():
    assert len(world.TEXTS) == SIZE == len(set(world.TEXTS))
    assert world.TEXTS[:3] == ["", "a", "b"] and world.TEXTS[-1] == "g g g g"


def test_log_probs_are_those_that_the_scripts_train(untrained, reference):
    model, tokenizer = untrained
    asked, logps, _ = reference
    assert torch.allclose(logps.exp().sum(1), torch.ones(3, dtype=torch.float64), rtol=0, atol=1e-12)
    places = [1, 9, 60, 400, 2000, SIZE - 1]
    rows = [
        ("x:1", {"prompt": x, "responses": [world.TEXTS[i] for i in places], "ranks": [*range(1, 7)]}) for x in asked
    ]
    examples, _ = build(rows, tokenizer, "preference", *world.LIMITS.values())
    assert [len(r) for r in examples[0].responses] == [2, 3, 4, 4, 4, 4]  # a fourth word is not followed by EOS
    found = torch.stack(scoring.score_logps(model, examples, scoring.Batching("tree", world.PAD))).double()
    assert torch.allclose(found, logps[:, places], rtol=0, atol=1e-4)
    assert found.std() > 1


def test_rewards_are_those_of_the_texts(reference):
    asked, _, r = reference
    for i in (0, 1, 60, 399, 400, 1234, SIZE - 1):
        assert [world.reward(SEED, x, world.TEXTS[i]) for x in asked] == pytest.approx(r[:, i].tolist(), abs=1e-12)
    rows = [{"world": SEED}] * 3
    assert world.gold(asked, ["a b"] * 3, rows) == pytest.approx(r[:, world.TEXTS.index("a b")].tolist(), abs=1e-12)
    assert (r[:, 0] == 0).all() and r.std() > 0.2


def test_reward_by_hand():
    # prompt a b c, answer d e: the worths of d after c and of e after d, to a prompt that begins with a
    draw = torch.Generator().manual_seed(SEED)
    own, after, first = (torch.randn(shape, generator=draw, dtype=torch.float64) for shape in ((8,), (8, 8), (8, 1, 8)))
    worth = [own[4] + after[3, 4] + first[1, 0, 4], own[5] + after[4, 5] + first[1, 0, 5]]
    assert world.reward(SEED, "a b c", "d e") == pytest.approx(1 / (1 + math.exp(-sum(worth))), abs=1e-12)


def test_the_source_writes_of_training_prompts_and_at_least_a_word():
    rows = world.source(SEED, 300)
    assert {row["prompt"] for row in rows} <= set(world.prompts(SEED)["train"])
    lengths = [len(row["completion"].split()) for row in rows]
    assert min(lengths) == 1 and max(lengths) == world.LONGEST


def test_optimum_is_on_the_line_of_the_optimal_policies_and_above_all_others(reference):
    _, ref, r = reference
    for beta in (0.05, 0.3, 2.0):
        nats, most = world.tilted(ref, r, beta)
        assert world.optimum(ref, r, nats) == pytest.approx(most, abs=1e-9)
    assert world.optimum(ref, r, 0.0) == world.expected(ref, r)
    draw = torch.Generator().manual_seed(1)
    for size in (0.1, 1.0, 3.0):
        policy = (ref + size * torch.randn(ref.shape, generator=draw, dtype=torch.float64) + size * r).log_softmax(1)
        assert world.expected(policy, r) < world.optimum(ref, r, world.kl(policy, ref))


def test_optimum_by_hand():
    """Two answers, equally likely, rewards 0 and 1: a policy with chance q has reward q and KL ln 2 - H(q)."""
    ref, r = torch.full((1, 2), 0.5, dtype=torch.float64).log(), torch.tensor([[0.0, 1.0]], dtype=torch.float64)
    q = 0.8
    nats = math.log(2) + q * math.log(q) + (1 - q) * math.log(1 - q)
    assert world.optimum(ref, r, nats) == pytest.approx(q, abs=1e-9)


def test_best_of_two_by_all_pairs(reference):
    """The better of two draws, and half a chance for each of two that are as good."""
    _, ref, r = reference
    p, r = ref[0].exp(), r[0]
    wins = (r[:, None] > r).double() + 0.5 * (r[:, None] == r).double()
    assert torch.allclose(world.best_of(ref[:1], r[None], 2).exp()[0], 2 * p * (wins @ p), rtol=1e-6, atol=1e-15)
    for n in (2, 64):
        assert world.kl(world.best_of(ref[:1], r[None], n), ref[:1]) <= math.log(n) - (n - 1) / n


def test_rankings_are_by_gold_reward_and_a_flip_turns_a_pair_round(reference):
    asked, logps, r = reference
    right = lambda row: sorted(  # noqa: E731
        zip(row["ranks"], row["responses"], strict=True), key=lambda x: -world.reward(SEED, row["prompt"], x[1])
    )
    for row in world.rankings(SEED, logps, asked, 20, 4):
        assert "" not in row["responses"] and [rank for rank, _ in right(row)] == sorted(row["ranks"])
    rows = world.rankings(SEED, logps, asked, 600, 2, flip=0.25)
    wrong = sum([rank for rank, _ in right(row)] == [2, 1] for row in rows) / len(rows)
    assert abs(wrong - 0.25) < 4 * (0.25 * 0.75 / 600) ** 0.5


def test_held_has_the_log_probs_and_rewards_of_each_part(untrained, reference):
    asked, logps, r = reference
    found = world.held(untrained[0], SEED, {"one": asked[:1], "two": asked[1:]})
    assert torch.equal(found["one"][1], r[:1]) and torch.equal(found["two"][1], r[1:])
    assert torch.allclose(found["two"][0], logps[1:], rtol=0, atol=1e-5)
    assert not found["one"][0].requires_grad and world.differentiable_logps(untrained[0], asked[:1]).requires_grad


def test_the_formula_of_best_of_n():
    assert world.bound(2) == pytest.approx(0.193147, abs=1e-6)
    p = torch.full((4000,), 1 / 4000, dtype=torch.float64)
    best = world.law(p, torch.arange(4000), 2)  # where no answer has much chance, its KL is the formula
    assert torch.xlogy(best, best / p).sum().item() == pytest.approx(world.bound(2), abs=1e-3)


# -------------------------------------------------------------------------------------------------------- at matched KL


def test_between_by_hand():
    points = [(0.0, 1.0), (1.0, 3.0), (2.0, 4.0)]
    assert [common.between(points, x) for x in (0, 0.25, 1, 1.5, 2, 9)] == [1, 1.5, 3, 3.5, 4, 4]


def test_hull_by_hand():
    #          start     below the line   on it      highest    later, lower
    points = [(0.0, 0.0), (1.0, 0.3), (0.5, 1.0), (2.0, 2.0), (3.0, 1.9)]
    assert frontier.hull(points) == [0, 2, 3]
    assert frontier.hull([(0.0, 1.0), (1.0, 0.5)]) == [0]


def test_the_least_clear_is_left_out():
    assert frontier.without_the_least_clear([(1.0, 0.1), (0.5, 2.0), (0.2, 0.1)]) == [(0.2, 0.1), (1.0, 0.1)]


# ------------------------------------------------------------------------------------------------------------- frontier


@pytest.fixture
def made_up(tmp_path):
    """Two worlds in which a method's reward is its share of sqrt(KL) / 4, which the optimum has all of."""
    results = common.Results(tmp_path / "results.csv")
    share = {
        "DPO": 0.9,
        "Unlikelihood": 0.8,
        "Preferred-FT": 0.3,
        "PPO": 0.7,
        "PPO-gold": 0.95,
        "Exact gradient": 0.96,
        "DPO slow": 0.9,
    }
    for seed in (0, 1):
        for setting in frontier.SETTINGS:
            method = frontier.method_of(setting)
            if method in share:
                places = ((1, 0.25), (2, 0.5), (3, 1.0), (4, 2.0), (5, 4.0))
                for step, nats in places[: 1 if method == "Preferred-FT" else 5]:
                    gold = (share[method] + 0.01 * seed * (method == "DPO")) * nats**0.5 / 4
                    values = {f"{n} {part}": x for part in frontier.PARTS for n, x in (("kl", nats), ("reward", gold))}
                    results.add(setting, seed, values | {"room": nats**0.5 / 4 - gold}, step)
                last = {"kl test": 4.0, "share test": share[method], "share training": share[method] + 0.01}
                results.add(setting, seed, last | {"seconds": 1.0})
        best = {
            f"{n} {name}": x for n in frontier.DRAWN for name, x in (("kl", 1.0), ("reward", 0.24), ("optimum", 0.25))
        }
        results.add("Best-of-n", seed, best)
        results.add(
            "optimum",
            seed,
            {f"{x:g}": x**0.5 / 4 for x in frontier.CURVE}
            | {f"kl at {x:g}": 3.5 for x in frontier.GOLD_COEFS}
            | {"start test": 0.0, "start validation": 0.0},
        )
    return results


def test_frontier_clauses_by_hand(made_up):
    found = frontier.clauses(made_up)
    # at 1 nat: 0.9 and 0.91 of 1/4, less 0.3 of 1/8, where Preferred-FT ends: 0.1875 and 0.19, half 12.706 * 0.00125
    assert found["Preferred-FT"]["1"] == pytest.approx((0.18875, 12.706 * 0.00125), rel=1e-4)
    assert found["Unlikelihood"]["1"] == pytest.approx((0.02625, 12.706 * 0.00125), rel=1e-4)
    assert found["optimum"][""][0] == pytest.approx((1 - 0.96) * 0.25**0.5 / 4 + 1e-6, rel=1e-4)
    assert found["Best-of-n"]["8"] == pytest.approx((0.96 - 0.95, 0), abs=1e-9)
    table, verdict, effect = frontier.report(made_up)
    assert verdict == "reproduced" and "0.91 +- 0.06 of the optimum's gain" in effect
    assert "| Preferred-FT | 0.037 +- 0.000 |" in table
    # at Preferred-FT's own KL of 1/4: 0.9 and 0.91 of 1/8, less 0.3 of it
    assert "| DPO - Preferred-FT |  | 0.076 +- 0.008 |" in table
    assert "| PPO-gold 0.08 | 4.00 +- 0.00 | 3.50 +- 0.00 | 0.95 +- 0.00 | 0.96 +- 0.00 |" in table


def test_frontier_is_not_resolved_by_a_method_that_is_as_good(made_up):
    for (setting, seed, step, metric), value in [*made_up.values_of.items()]:
        if frontier.method_of(setting) == "DPO":  # the first world's share is Unlikelihood's, the second's is better
            made_up.values_of[setting, seed, step, metric] = value * (8 / 9 if metric.startswith("reward") else 1)
    assert frontier.report(made_up)[1] == "not resolved"


def test_frontier_is_contradicted_by_a_policy_above_the_optimum(made_up):
    made_up.add("DPO 1", 0, {"room": -2e-6}, 1)
    assert frontier.report(made_up)[1] == "contradicted"


def test_the_loss_of_unlikelihood_by_hand():
    one = torch.tensor([1.0])
    pair = train_dpo.Pairs(*(torch.tensor([x]) for x in (0.0, 0.0, -3.0, -5.0)), (one, one))
    assert frontier.LOSSES["unlikelihood 0.5"](train_dpo.Args(), pair).item() == 3.0 + 0.5 * -5.0


def test_the_exact_gradient_raises_its_objective_and_keeps_its_checkpoints(untrained, tmp_path):
    model, tokenizer = untrained
    models.save(model, tokenizer, tmp_path / "sft")
    asked, seen = world.prompts(SEED)["train"][:8], {}
    ref, r = world.held(model, SEED, {"train": asked})["train"]

    def look(step, weights):
        other = models.load_model(str(tmp_path / "sft"), "cpu")
        other.load_state_dict(weights)
        logps = world.answer_logps(other, asked)
        seen[step] = world.expected(logps, r) - 0.3 * world.kl(logps, ref)

    frontier.exact_gradient(SEED, str(tmp_path / "sft"), 0.3, 3e-4, 16, look)
    best = world.tilted(ref, r, 0.3)
    assert [*seen] == [4, 8, 12, 16]
    assert world.expected(ref, r) < seen[4] < seen[16] < best[1] - 0.3 * best[0]


# ------------------------------------------------------------------------------------------- a loss of the user's own


@pytest.fixture
def user(tmp_path, monkeypatch):
    """Write the module and return a way to name its function; the working directory is the module's."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "of_a_user", raising=False)

    def write(body: str) -> str:
        Path("of_a_user.py").write_text(f"import torch\n\n\ndef fn(*args):\n    *_, x = args\n    {body}\n")
        return "of_a_user:fn"

    yield write
    sys.modules.pop("of_a_user", None)


def test_the_users_function_is_known_inside_only(user):
    name, before = user("return x.chosen - 3 * x.rejected_logps"), dict(train_dpo.LOSSES)
    pair = train_dpo.Pairs(*(torch.tensor([v]) for v in (0.5, 0.0, -3.0, -5.0)), (torch.tensor([1]), torch.tensor([1])))
    with mine.added("--loss", name):
        assert train_dpo.LOSSES[name](train_dpo.Args(), pair).item() == 0.5 + 15.0
        assert name not in train_ppo.GROUPED
    assert before == train_dpo.LOSSES and name not in train_ppo.AVERAGES


def test_the_users_advantage_is_known_inside_only(user):
    name, before = user("return 2 * x"), (dict(train_ppo.GROUPED), dict(train_ppo.AVERAGES))
    a = train_ppo.Args(advantage=name, k=2, kl_coef=0.0)
    scores, lengths = torch.tensor([1.0, 3.0]), torch.tensor([1, 2])
    with mine.added("--advantage", name):
        estimates, _ = train_ppo.compute_advantages(a, 0.0, torch.zeros(3), scores, lengths, None, None)
        assert estimates.tolist() == [2.0, 6.0, 6.0] and train_ppo.AVERAGES[name] == "sequences"
    assert before == (train_ppo.GROUPED, train_ppo.AVERAGES)


@pytest.mark.parametrize(
    ("flag", "body", "message"),
    [
        (
            "loss",
            "return x.choosen",
            "raised AttributeError: 'Pairs' object has no attribute 'choosen', at of_a_user.py:6",
        ),
        ("loss", "return 1.0", "gave a float, not a tensor"),
        ("loss", "return x.chosen.mean()", r"gave the shape [] for pairs of the shape [8]: it must be the same"),
        ("loss", "return (x.chosen - x.rejected).log()", "where policy and reference agree: it must be finite"),
        ("loss", "return x.chosen.abs().sqrt()", "its gradient is not finite where policy and reference agree"),
        ("loss", "return x.chosen.detach()", "has no gradient: compute it from x.chosen, x.rejected or their _logps"),
        (
            "loss",
            "return x.chosen ** 2",
            "its gradient is 0 where policy and reference agree: nothing would be learned",
        ),
        ("advantage", "return x.mean(1)", "gave the shape [3] for rewards of the shape [3, 4]: it must be the same"),
        ("advantage", "return (x - x.mean(1, keepdim=True)) / x.std(1, keepdim=True)", "it must be finite"),
        ("advantage", "return 0 * x", "nothing would be learned"),
        ("advantage", "return x / [1]", "raised TypeError"),
    ],
)
def test_a_function_that_cannot_be_used_is_refused_before_the_run(flag, body, message, user, monkeypatch):
    monkeypatch.setattr(frontier, "prepare", lambda *_: pytest.fail("it is run"))
    name = user(body)
    with pytest.raises(BadInput) as error:
        frontier.main(frontier.Args(smoke=True, **{flag: name}))
    text = str(error.value)
    assert text.startswith(f"--{flag} {name}: ") and message in text and "\n" not in text
    assert not Path("runs").exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"loss": "ipo"}, "--loss ipo: must be module:function, as in mine:fn"),
        ({"loss": "no_such:fn"}, "--loss no_such:fn: cannot be imported"),
        ({"loss": "m:f", "advantage": "m:f"}, "give one at a time"),
        ({"loss": "m:f", "tune": True}, "leave out --tier and --tune"),
        ({"advantage": "m:f", "seeds": 1}, "--seeds 1: --advantage needs at least 2"),
    ],
)
def test_flags_of_a_users_function(flags, message):
    with pytest.raises(BadInput) as error:
        frontier.main(frontier.Args(**flags))
    assert message in str(error.value)


def test_a_loss_without_beta_gets_orders_of_the_data(user):
    fn = lambda name: mine.checked("--loss", name)  # noqa: E731
    name = user("a = args[0]; return (x.rejected - x.chosen) * a.beta")
    assert mine.try_loss(fn(name), name)
    sys.modules.pop("of_a_user")
    name = user("return x.rejected_logps - x.chosen_logps")
    assert not mine.try_loss(fn(name), name)
    known, unknown = (mine.methods_of("--loss", name, 2, x)[f"loss {name}"] for x in (True, False))
    assert [*known.values()] == [{"loss": name, "beta": 0.1}, {"loss": name, "beta": 1.0}]
    assert [*unknown.values()] == [{"loss": name, "seed": 0}, {"loss": name, "seed": 1}]


@pytest.fixture
def small(tmp_path):
    """Two worlds and the tuning world. A method's reward is slope * KL up to 1 nat, its only checkpoint."""
    results = common.Results(tmp_path / "results.csv")
    methods = {m: {f"{m} 1": {"beta": 1.0}} for m in ("loss m:f", "DPO", "IPO")}
    slopes = {"loss m:f": (0.3, 0.5), "DPO": (0.2, 0.4), "IPO": (0.5, 0.4)}
    for seed in (0, 1, frontier.TUNED_IN):
        tops = {f"{x:g}": 0.8 * x for x in frontier.CURVE}
        results.add("optimum", seed, tops | {"start test": 0.0, "start validation": 0.0, "seconds": 30.0})
    for method, of_worlds in slopes.items():
        for seed, slope in enumerate(of_worlds):
            values = {f"{n} {part}": x for part in frontier.PARTS for n, x in (("kl", 1.0), ("reward", slope))}
            results.add(f"{method} 1 at 0.003", seed, values, 4)
            results.add(f"{method} 1 at 0.003", seed, {"seconds": 60.0})
    return results, methods


def test_a_users_loss_at_equal_kl_by_hand(small):
    results, methods = small
    best = dict.fromkeys(methods, 0.003)
    rewards = mine.at_equal_kl(results, methods["loss m:f"], 0.003, (0, 1))
    # 0.3 and 0.5 a nat, and from 1 nat on what the last point has
    assert rewards[0.25] == pytest.approx({0: 0.075, 1: 0.125}) and rewards[2.0] == pytest.approx({0: 0.3, 1: 0.5})
    assert rewards["mean"] == pytest.approx({0: 0.3 * 2.75 / 4, 1: 0.5 * 2.75 / 4})
    tables, paragraph = mine.report(results, methods, best, (0.001, 0.003), (0, 1))
    # - DPO: 0.1 a nat in both worlds; - IPO: -0.2 and 0.1 a nat, so -0.05 +- 12.706 * 0.15
    assert (
        "| loss m:f - DPO | 0.025 +- 0.000 | 0.050 +- 0.000 | 0.100 +- 0.000 | 0.100 +- 0.000 | 0.069 +- 0.000 |"
        in tables
    )
    assert "| loss m:f - IPO | -0.013 +- 0.476 | -0.025 +- 0.953 | -0.050 +- 1.906 |" in tables
    assert "loss m:f is above DPO (0.069 +- 0.000) and not clearly different from IPO (-0.034 +- 1.310)." in paragraph
    # of the optimum's 0.8 at 1 nat: 0.375 and 0.625
    assert "At 1 nat it has 0.50 +- 1.59 of the gain" in paragraph and "DPO 0.38 +- 1.59" in paragraph
    assert "the least over worlds is: loss m:f 1.00, DPO 1.00, IPO 1.00." in paragraph
    assert "For loss m:f, DPO and IPO that is an end of the list" in paragraph and "diverged" not in paragraph


def test_sides_of_an_interval():
    assert [mine.side(x) for x in ((0.2, 0.1), (-0.2, 0.1), (0.05, 0.1), (0.0, 0.0))] == [
        "above",
        "below",
        "not clearly different from",
        "not clearly different from",
    ]


def test_the_rate_is_the_best_on_validation_prompts(small):
    results, methods = small
    for rate, (validation, test) in {0.001: (0.4, 0.1), 0.003: (0.3, 0.9)}.items():
        values = {"kl validation": 1.0, "reward validation": validation, "kl test": 1.0, "reward test": test}
        results.add(f"DPO 1 at {rate:g}", frontier.TUNED_IN, values, 4)
    assert mine.best_rate(results, methods["DPO"], (0.003, 0.001, 0.01)) == 0.001


def test_a_run_that_diverges_adds_no_points(small, monkeypatch, tmp_path):
    def diverge(*_):
        raise FloatingPointError("step 3: the loss is nan")

    monkeypatch.setattr(frontier, "run", diverge)
    assert mine.run("DPO 1", 0, tmp_path, 8, 0.1, {"loss": "dpo"}) == ({}, {"diverged": 1.0})
    monkeypatch.setattr(frontier, "run", lambda *_: ({4: {"kl test": math.nan}}, {"share test": 0.5}))
    assert mine.run("DPO 1", 0, tmp_path, 8, 0.1, {"loss": "dpo"}) == ({}, {"diverged": 1.0})
    results, methods = small
    results.add("loss m:f 1 at 0.01", 0, {"diverged": 1.0})
    assert mine.path(results, methods["loss m:f"], 0.01, 0, "test") == [(0.0, 0.0)]
    results.add("optimum", 2, {"start test": 0.0, "start validation": 0.0})
    assert mine.path(results, methods["loss m:f"], 0.003, 2, "test") == [(0.0, 0.0)], "the other worlds have points"
    paragraph = mine.report(results, methods, dict.fromkeys(methods, 0.003) | {"loss m:f": 0.01}, (0.01,), (0, 1))[1]
    assert "1 of its runs, those for the learning rate included, diverged" in paragraph
    assert "no checkpoint of it has more reward than the reference" in paragraph


@pytest.mark.slow
@pytest.mark.parametrize(("flag", "method"), [("loss", "loss of_a_user:fn"), ("advantage", "PPO-gold of_a_user:fn")])
def test_a_users_function_is_run_beside_others(flag, method, user, tmp_path):
    name = user({"loss": "return x.rejected - x.chosen", "advantage": "return x - x.mean(1, keepdim=True)"}[flag])
    root = Path(world.__file__).parent.parent
    committed = root / "ablations/frontier/results.csv"
    before = committed.read_bytes()
    environment = os.environ | {"PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "ablations.frontier", f"--{flag}", name, "--smoke"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    assert f"In reward at equal KL, {method} is " in done.stdout and f"| {method} - DPO |" in done.stdout
    folder = tmp_path / "runs/ablations/frontier/smoke"
    assert (folder / "of_a_user.fn/figure.png").stat().st_size > 5000
    own = {x.split(",")[0] for x in (folder / "of_a_user.fn/results.csv").read_text().splitlines()[1:]}
    assert own and all(x.startswith(method) for x in own) and committed.read_bytes() == before


@pytest.mark.slow
def test_tier_s_runs_with_a_small_model(tmp_path, monkeypatch):
    """Every kind of run, from the embedded task's untrained model in the place of a real one, on a CPU."""
    monkeypatch.chdir(tmp_path)
    names = ["DPO 0.1", "Unlikelihood 0.1", "Preferred-FT 0", "PPO 0.4", "PPO-gold 0.08", "Exact gradient 0.08"]
    monkeypatch.setattr(train_dpo, "LOSSES", train_dpo.LOSSES | frontier.LOSSES)
    found = tier_s.main({x: frontier.SETTINGS[x] for x in names}, "reviews", smoke=True)
    assert [Path(x).name for x in found["models"]] == ["sft", *(x.replace(" ", "-") for x in names[:-1])]
    prompts, held = ({*map(str, open(f"runs/ablations/frontier/tier-s-smoke/{x}.jsonl"))} for x in ("prompts", "held"))
    assert len(held) == 8 and not held & prompts
    kl = [numbers["kl"]["value"] for numbers in found["models"].values()]
    assert kl[0] == 0 and all(x > 0 for x in kl[1:])
    assert all(math.isfinite(numbers["reward"]["low"]) for numbers in found["models"].values())


# ----------------------------------------------------------------------------------------------------------- beta_sweep


def test_beta_sweep_clauses_by_hand(tmp_path):
    """gold = 1 + 2 d - (4, 3, 2, ...) d^2 along each run, the d of beta's place n at epoch e being e / (n + 1)."""
    results = common.Results(tmp_path / "results.csv")
    for seed in (0, 1):
        for n, setting in enumerate(beta_sweep.SETTINGS):
            for epoch in range(5):
                d = epoch / (n + 1) / 4
                gold = 1 + 2 * d - (4 - n) * d * d
                values = {"kl test": d * d, "kl validation": d * d, "gold test": gold, "gold validation": gold}
                values["accuracy"] = 0.5 + gold / 100
                results.add(setting, seed, values, epoch)
            results.add(setting, seed, values)
    assert beta_sweep.curvature(results, "0.03", 0) == pytest.approx(-3, rel=1e-3)
    assert beta_sweep.spearman(results, 1) == -1
    assert beta_sweep.best_epoch(results, "0.01", 0) == 1  # 2 d - 4 d^2 is largest at d = 1/4
    found = [mean for mean, _ in beta_sweep.clauses(results).values()]
    # 2 d - c d^2 is best at epochs 1, 3 and 4 of 4: 2 / 4 - 4 / 16 against 2 - 4, 6 / 8 - 27 / 64 against 1 - 3 / 4, 0
    assert found == pytest.approx([0.1, 4, 3, 2, 0.25 - -2, 0.328125 - 0.25, 0, 0.5 - 0.25], rel=1e-3)
    table, verdict, _ = beta_sweep.report(results)
    assert verdict == "not resolved" and "beta and KL | 0.100 +- 0.000 | reproduced |" in table


def test_beta_sweep_judges_the_order_of_kl_over_all_seeds(monkeypatch):
    """Nine worlds in order and one half in it: the worst alone would contradict, and the surer the more worlds there
    are. Mean -0.95, deviation sqrt((9 * 0.05^2 + 0.45^2) / 9); t(9) = 2.262."""
    results = common.Results(common.ROOT / "beta_sweep" / "results.csv")
    monkeypatch.setattr(beta_sweep, "spearman", lambda results, seed: -0.5 if seed == 3 else -1.0)
    mean, half = next(iter(beta_sweep.clauses(results).values()))
    assert (mean, half) == pytest.approx((0.05, 2.262 * math.sqrt((9 * 0.05**2 + 0.45**2) / 9 / 10)), rel=1e-6)
    assert common.verdict([(mean, half)]) == "not resolved"


def test_accuracy_over_all_pairs_of_answers():
    draw = torch.Generator().manual_seed(0)
    ref, margins = (torch.randn(3, 77, generator=draw, dtype=torch.float64) for _ in range(2))
    ref, r = ref.log_softmax(1), torch.randint(9, (3, 77), generator=draw).double() + 1e-12 * margins  # with ties
    margins[2] = -r.round()[2] - 1e-3 * margins[2]  # every pair is wrong
    found = beta_sweep.accuracy(ref, margins, r)
    for q, m, true, x in zip(ref.exp(), margins, r.round(), found, strict=True):
        product, weight = (m[:, None] - m) * (true[:, None] - true), q[:, None] * q
        assert x.item() == pytest.approx((weight[product > 0].sum() / weight[product != 0].sum()).item(), abs=1e-12)
    assert found[0] > 0.3 and found[2] == 0


def test_the_rate_stays_after_its_warm_up():
    assert [runs.schedule(step, 20, 0.2, "constant") for step in (0, 1, 3, 4, 19)] == [0.25, 0.5, 1, 1, 1]


# ---------------------------------------------------------------------------------------------------------- grad_weight


def test_the_unweighted_loss_has_the_gradient_of_dpo_at_the_start():
    arguments = train_dpo.Args(beta=0.3)
    gradients = {}
    for name in ("dpo", "weight 1/2"):
        chosen, rejected = (torch.tensor([0.0, 5.0], requires_grad=True) for _ in range(2))
        loss = dpo(chosen, rejected, 0.3) if name == "dpo" else None
        if loss is None:
            nothing = chosen.detach()
            pairs = train_dpo.Pairs(chosen, rejected, nothing, nothing, (nothing, nothing))
            loss = grad_weight.LOSSES[name](arguments, pairs)
        loss.sum().backward()
        gradients[name] = chosen.grad
    assert torch.allclose(gradients["dpo"], gradients["weight 1/2"], rtol=1e-6)
    assert torch.allclose(gradients["dpo"], torch.full((2,), -0.15))


def test_repeated_by_hand():
    assert grad_weight.repeated([1, 2, 1, 2, 1, 2], 4) == pytest.approx(1 / 3)  # 1212, 2121, 1212
    assert grad_weight.repeated([1, 2, 3], 4) == 0.0


def test_grad_weight_clauses_by_hand(tmp_path):
    """DPO's gold is KL / 8, that of the others 0.1 less at each KL; the run goes to 9 nats, and its best is before."""
    results = common.Results(tmp_path / "results.csv")
    ends = {"DPO": (1.5, 3.0, 0.0), "weight 1/2": (0.5, 4.0, 0.4), "Unlikelihood": (1.7, 2.5, 0.1)}
    for setting, (entropy, ref_nll, repeated) in ends.items():
        for seed in (0, 1):
            for step, kl in enumerate((0.0, 1.0, 5.0, 9.0)):
                values = dict.fromkeys(grad_weight.COLUMNS, 0.5) | {"kl": kl, "entropy": entropy, "ref_nll": ref_nll}
                values["gold"] = kl / 8 - (0.1 if setting != "DPO" and step else 0)
                values |= {"readable": step * (4 - step) + 0.2 * seed, "repeated_4": repeated if step else 0.0}
                results.add(setting, seed, values, step)
            results.add(setting, seed, values)
    assert grad_weight.matched(results, "DPO", "gold", 4.0) == pytest.approx({0: 0.5, 1: 0.5})
    assert grad_weight.most(results, "weight 1/2", "readable") == {0: (4.0, 2), 1: (4.2, 2)}
    judged = [mean for mean, _ in grad_weight.clauses(results).values()]
    assert judged == pytest.approx([1, 1, 0.1, 0.1, 0.1])
    reported = [mean for mean, _ in grad_weight.differences(results, "Unlikelihood").values()]
    assert reported == pytest.approx([-0.2, -0.5, 0.1, 0.1, 0.1, 0.1, 0.1])
    table, verdict, _ = grad_weight.report(results)
    assert verdict == "reproduced", "Unlikelihood is not judged"
    assert "| weight 1/2 | 4.10 +- 1.27 | 2 +- 0 | 0.40 +- 0.00 | 0.40 | 9 +- 0 | 9 |" in table


# ----------------------------------------------------------------------------------------------------------- surrogates


def test_direction_by_hand():
    of_rollouts = torch.tensor([[1.0, 1.0], [1.0, -1.0], [1.0, 1.0], [1.0, -1.0]])
    # mean (1, 0); variance 4 / 3; the squared mean is 1 less a quarter of that, 2 / 3
    found = surrogates.direction(of_rollouts, torch.tensor([3.0, 3.0]))
    assert found == pytest.approx({"cosine": 0.5**0.5 / (2 / 3) ** 0.5, "variance": 2.0}, rel=1e-6)


def test_answers_needed_by_hand():
    assert surrogates.answers_needed(1.0, 2.0) == pytest.approx(64 * 2 / (1 / 0.81 - 1))
    n = surrogates.answers_needed(0.95, 3.0) / 64
    assert 0.95 / (1 + 3.0 / n) ** 0.5 == pytest.approx(0.9)
    assert surrogates.answers_needed(0.9, 0.1) == math.inf


@pytest.fixture
def place(untrained, tmp_path):
    model, tokenizer = untrained
    models.save(model, tokenizer, tmp_path / f"world-{SEED}" / "sft")
    return tmp_path


def test_gradients_of_a_saved_rollout_are_those_of_the_enumerated_log_probs(place, untrained):
    """RLOO's and GRPO's gradients by `update`, against autograd through the log-probs of all answers."""
    model, tokenizer = untrained
    asked, batching = world.prompts(SEED)["train"][:3], scoring.Batching("padded", world.PAD)
    rows = [("", {"prompt": x, "world": SEED}) for x in asked]
    examples, _ = build(rows, tokenizer, "prompts", *world.LIMITS.values())
    saved, scores, lengths = surrogates.rollout(model, tokenizer, examples, batching, "a")
    which = torch.tensor([[world.TEXTS.index(text.strip()) for text in e.response_texts] for e in saved.examples])
    assert torch.allclose(scores.view(which.shape).double(), world.rewards(SEED, asked).gather(1, which))
    grouped, sizes = scores.view(which.shape).double(), lengths.view(which.shape)
    expected = {"RLOO": advantages.rloo(grouped), "GRPO": advantages.grpo(grouped) / sizes}
    for method, weights in expected.items():
        a = world.args(train_ppo, k=surrogates.K, **surrogates.METHODS[method])
        saved.advantages, _ = train_ppo.compute_advantages(a, 0.0, 0 * saved.logps, scores, lengths, None, None)
        model.zero_grad()
        train_ppo.update(a, model, model, None, saved, range(3), 0.0, batching)
        found = surrogates.flat_gradient(model)
        model.zero_grad()
        logps = world.differentiable_logps(model, asked).gather(1, which)
        (-(weights * logps).sum() / which.numel()).backward()
        exact = surrogates.flat_gradient(model)
        assert (found - exact).norm() < 1e-4 * exact.norm()
        surrogates.set_gradient(model, 2 * found)
        assert torch.equal(surrogates.flat_gradient(model), 2 * found)
        model.zero_grad()


def test_at_ratio_1_surrogates_differ_by_their_average_only(place, monkeypatch):
    monkeypatch.setattr(surrogates, "PROMPTS", 2)
    found = surrogates.gradients(SEED, place, 3)
    assert [*found] == [*surrogates.METHODS] and all([*x] == [*surrogates.MOVES] for x in found.values())
    start = {method: x[0]["cosine"] for method, x in found.items()}
    for same in (("GRPO", "clip-high", "GSPO", "GSPO 0.2"), ("token average", "DAPO", "CISPO")):
        assert [start[x] for x in same] == pytest.approx([start[same[0]]] * len(same), abs=1e-5)
    assert abs(start["GRPO"] - start["DAPO"]) > 1e-4 and abs(start["GRPO"] - start["RLOO"]) > 1e-4
    assert all(x[0]["moved"] == pytest.approx(0, abs=1e-9) and x[0]["clipped"] == 0 for x in found.values())
    last = surrogates.MOVES[-1]
    assert found["GSPO"][last]["clipped"] > found["GRPO"][last]["clipped"] >= found["clip-high"][last]["clipped"]
    assert found["CISPO"][last]["clipped"] < found["clip-high"][last]["clipped"] and found["GRPO"][last]["moved"] > 0


@pytest.fixture
def trained(tmp_path):
    """Two worlds. Rewards end at 0.6 (GRPO), 0.7 (DAPO), 0.65 (CISPO and others) at a rate of 0.003, the best in the
    worlds that choose, and at 0.9 at other rates; paths are straight lines to 4 nats."""
    results, ends = common.Results(tmp_path / "results.csv"), {"GRPO": 0.6, "DAPO": 0.7}
    runs = [(method, rate) for method in surrogates.METHODS for rate in surrogates.RATES]
    for (method, rate), seed in itertools.product(runs, (*surrogates.VALIDATION_SEEDS, 0, 1)):
        end = ends.get(method, 0.65) + 0.01 * (seed == 1) * (method == "DAPO")
        if rate != 0.003:
            end = 0.5 if seed in surrogates.VALIDATION_SEEDS else 0.9
        for step in range(surrogates.STEPS + 1):
            share, run = step / surrogates.STEPS, (f"{method} at {rate:g}", seed, step)
            results.values_of |= {(*run, "kl"): 4 * share, (*run, "reward"): 0.2 + (end - 0.2) * share}
    for method, seed, n in itertools.product(surrogates.METHODS, (0, 1), surrogates.MOVES):
        values = {"cosine": 0.98 if method == "RLOO" else 0.9, "clipped": 0.1, "moved": 0.01 * n}
        values["variance"] = math.e if method == "GSPO" else math.e**3
        for metric, value in values.items():
            results.values_of[f"{method}, gradient", seed, n, metric] = value
    return results


def test_surrogates_choose_the_rate_in_other_worlds(trained):
    runs = surrogates.paths(trained)
    assert surrogates.chosen(runs, "GRPO") == "GRPO at 0.003"
    assert surrogates.reward(runs, "GRPO") == pytest.approx({0: 0.6, 1: 0.6})
    assert surrogates.reward(runs, "GRPO", 1.0) == pytest.approx({0: 0.3, 1: 0.3})  # a quarter of the way
    assert surrogates.chosen(runs, "GRPO", 5.0) is None and surrogates.reward(runs, "GRPO", 5.0) == {}


def test_surrogates_clauses_by_hand(trained):
    found = [*surrogates.clauses(trained).values()]
    assert [mean for mean, _ in found] == pytest.approx([0.08, 2, 0.105, 0.05, -0.055], abs=1e-5)
    assert found[2][1] == pytest.approx(12.706 * 0.005, rel=1e-4)  # of 0.1 and 0.11
    table, verdict, effect = surrogates.report(trained)
    assert verdict == "not resolved" and "CISPO - DAPO -0.055 +- 0.064" in effect
    assert "| DAPO | 0.705 +- 0.064 | 4.00 +- 0.00 |" in table and "0.003, 0.003, 0.003, 0.003 |" in table
    assert "| CISPO - GRPO | 0.050 +- 0.000 |" in table and surrogates.same_rates(
        surrogates.paths(trained), "DAPO"
    ) == ["0.000 +- 0.000", "0.000 +- 0.000", "0.105 +- 0.064", "0.000 +- 0.000", "0.000 +- 0.000"]
    needed = 64 * math.e**3 / ((0.98 / 0.9) ** 2 - 1)
    assert f"| {needed:.0f} | {needed:.0f} | {needed:.0f} | 0.100 | 0.100 |" in table and "| never |" in table
    trained.values_of["CISPO at 0.003", 1, surrogates.STEPS, "reward"] = 0.665  # 0.05 and 0.045 below DAPO
    assert surrogates.report(trained)[1] == "contradicted"
