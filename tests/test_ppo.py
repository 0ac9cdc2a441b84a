"""train_ppo.py: what each update does, against padded rows and transformers alone; guards, rewards, stop and go on."""

import dataclasses
import itertools
import json
import math
import os
import re
import signal
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers
import tyro
from safetensors.torch import load_file
from test_data import byte_level
from test_resume import (  # noqa: F401 (quick and server are fixtures)
    assert_same,
    contents,
    flags_of,
    logged,
    pairs,
    quick,
    server,
    wait_for,
    write_model,
    write_rows,
)
from test_rm import llama
from test_sample import words
from tiny import ARCHITECTURES, cached_logps, example, tiny

import evaluate
import train_ppo
from rlhf import BadInput
from rlhf.tree import collate
from support import generate as sampling
from support import models, report, reviews, runs, scoring
from support.generate import answer, generate
from support.report import ANSWER_STATS
from support.runs import Run

TOKENIZER = reviews.tokenizer()
EOS = TOKENIZER.eos_token_id
REWARD_MEAN = 0.75
PROMPTS = list(dict.fromkeys(reviews.prompts(30, 0)))[:12]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A small model that ends now and then, another one for a reference, a reward model, 12 prompts, rows for PTX."""
    folder = tmp_path_factory.mktemp("world")
    for seed, name in enumerate(("model", "other")):
        write_model(folder / name, seed)
        model = load(folder / name)
        with torch.no_grad():
            model.get_input_embeddings().weight[EOS] *= 9 if name == "model" else 4
        models.save(model, TOKENIZER, folder / name)
    write_reward_model(folder / "other", folder / "rm")
    write_rows(folder / "prompts.jsonl", [{"prompt": p, "id": i} for i, p in enumerate(PROMPTS)])
    write_rows(folder / "pairs.jsonl", pairs(14))
    return folder


@pytest.fixture(autouse=True)
def plain(monkeypatch, request):
    """No reward_kl.png unless a test wants the whole run."""
    if "whole" not in request.fixturenames:
        monkeypatch.setattr(report, "reward_kl_plot", lambda out: None)


@pytest.fixture
def whole():
    """Asks `plain` to leave the drawing in."""


def write_reward_model(policy: Path, out: Path) -> Path:
    """A reward model on the policy's backbone, whose scores differ by about 1."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(policy)
    torch.manual_seed(1)
    model = models.new_reward_model(load(policy), tokenizer)
    with torch.no_grad():
        model.score.weight *= 2
    model.config.reward_mean, model.config.reward_std = REWARD_MEAN, 1.0
    models.save(model, tokenizer, out)
    return out


def load(folder):
    return transformers.AutoModelForCausalLM.from_pretrained(folder).eval()


def load_rm(folder):
    return transformers.AutoModelForSequenceClassification.from_pretrained(folder).eval()


def small(world, out, **changes) -> train_ppo.Args:
    """One rollout of 4 prompts with 3 answers each, and two passes of two minibatches at a large rate."""
    flags = {"model": f"{world}/model", "ref": f"{world}/other", "reward": f"{world}/rm", "out": str(out)}
    flags |= {"data": f"{world}/prompts.jsonl", "eval_fraction": 1e-9, "device": "cpu", "lr": 1e-2, "critic_lr": 1e-2}
    flags |= {"batch_size": 4, "k": 3, "max_steps": 1, "epochs_per_rollout": 2, "minibatches": 2, "eval_prompts": 1}
    return train_ppo.Args(**flags | {"max_new_tokens": 7, "kl_coef": 0.3} | changes)


CHEAP = {"advantage": "reinforce++", "k": 1, "epochs_per_rollout": 1, "minibatches": 1, "max_new_tokens": 3}


@pytest.fixture
def go(world, tmp_path, monkeypatch):
    """Trains with small settings, and returns all that happened: flags, rollouts, updates, metrics, results."""
    number = itertools.count()

    def run(**changes):
        seen = SimpleNamespace(out=tmp_path / f"ppo{next(number)}", rollouts=[], updates=[], gradients=[], rates=[])
        seen.stepped = []

        class Recorded(train_ppo.Rollout):
            def __init__(self, *args):
                super().__init__(*args)
                self.scores, self.lengths = seen.scored
                seen.rollouts.append(self)

        def compute_advantages(a, kl_coef, kl, scores, lengths, *rest, compute=train_ppo.compute_advantages):
            seen.scored = scores, lengths
            return compute(a, kl_coef, kl, scores, lengths, *rest)

        class Adam(torch.optim.AdamW):
            def step(self):
                seen.rates += [(group["lr"], group["eps"], group["weight_decay"]) for group in self.param_groups]
                grads = [w.grad for group in self.param_groups for w in group["params"] if w.grad is not None]
                seen.stepped.append(torch.cat([grad.flatten() for grad in grads]).norm().item())
                super().step()

        def update(a, policy, reference, critic, rollout, places, kl_coef, batching, update=train_ppo.update):
            copies = [m and {k: v.clone() for k, v in m.state_dict().items()} for m in (policy, critic)]
            seen.a, seen.layout = a, batching.layout
            seen.updates.append(SimpleNamespace(policy=copies[0], critic=copies[1], places=[*places], ptx=[]))
            seen.updates[-1].found = update(a, policy, reference, critic, rollout, places, kl_coef, batching)
            return seen.updates[-1].found

        def add_ptx_gradient(a, policy, rows, batching, add_ptx_gradient=train_ppo.add_ptx_gradient):
            seen.updates[-1].ptx = rows
            return add_ptx_gradient(a, policy, rows, batching)

        def clip(parameters, most, clip=torch.nn.utils.clip_grad_norm_):
            parameters = [*parameters]
            seen.gradients.append(torch.cat([w.grad.flatten().clone() for w in parameters if w.grad is not None]))
            return clip(parameters, most)

        with monkeypatch.context() as patch:
            patch.setattr(train_ppo, "Rollout", Recorded)
            patch.setattr(train_ppo, "update", update)
            patch.setattr(train_ppo, "compute_advantages", compute_advantages)
            patch.setattr(train_ppo, "add_ptx_gradient", add_ptx_gradient)
            patch.setattr(torch.nn.utils, "clip_grad_norm_", clip)
            patch.setattr(torch.optim, "AdamW", Adam)
            seen.results = train_ppo.main(small(world, seen.out, **changes))
        seen.metrics = [json.loads(line) for line in open(seen.out / "metrics.jsonl")]
        return seen

    return run


def off(found, wanted) -> float:
    return ((found - wanted).norm() / wanted.norm()).item()


# ----------------------------------------------------------------------------------- the same, with padded rows [b t]


class Rows:
    """Prompt and answer as right-padded rows of ids [b t]; `mask` is where an answer's tokens are. What is said of a
    token stands at its own place, and is 0 elsewhere."""

    def __init__(self, examples):
        both = [(e.prompt, r) for e in examples for r in e.responses]
        width = max(len(p) + len(r) for p, r in both)
        self.ids = torch.tensor([p + r + [0] * (width - len(p) - len(r)) for p, r in both])
        place = torch.arange(width)
        start, stop = torch.tensor([[len(p), len(p) + len(r)] for p, r in both]).T[:, :, None]
        self.attention, self.mask = (place < stop).long(), (place >= start) & (place < stop)
        self.lengths, self.last = self.mask.sum(1), stop[:, 0] - 1
        self.ended = self.ids[torch.arange(len(both)), self.last] == EOS

    def before(self, x):
        """What the place before each token says, at the answers' tokens."""
        x = torch.cat([torch.zeros_like(x[:, :1]), x[:, :-1]], 1)
        return torch.where(self.mask.view(*self.mask.shape, *[1] * (x.dim() - 2)), x, torch.zeros_like(x))

    def distributions(self, model, temperature: float = 1.0):
        """log p over the vocabulary before each token, [b t v]."""
        logits = model(self.ids, attention_mask=self.attention, use_cache=False).logits.double()
        return self.before((logits / temperature).log_softmax(-1))

    def taken(self, distributions):
        return distributions.gather(2, self.ids[:, :, None])[:, :, 0] * self.mask

    def heads(self, model):
        """w . h at every place, [b t]."""
        states = model.model(self.ids, attention_mask=self.attention, use_cache=False).last_hidden_state
        return (states @ model.score.weight[0]).double()

    def mean(self, x) -> float:
        return (x[self.mask].sum() / self.mask.sum()).item()


@torch.no_grad()
def greedy_rows(policy, examples, most: int) -> Rows:
    found = []
    for e in examples:
        ids = list(e.prompt)
        while len(ids) < len(e.prompt) + most and (len(ids) == len(e.prompt) or ids[-1] != EOS):
            ids.append(policy(torch.tensor([ids])).logits[0, -1].argmax().item())
        found.append(dataclasses.replace(e, responses=[ids[len(e.prompt) :]]))
    return Rows(found)


def white(x, mask, shift: bool = True):
    mean = x[mask].sum() / mask.sum()
    deviation = ((x[mask] - mean) ** 2).sum().div(mask.sum()).add(1e-8).sqrt()
    return ((x - mean) / deviation + (0 if shift else mean)) * mask


def discounted(x, mask, factor: float):
    """sum over l >= t of factor^(l - t) x_l, by its definition."""
    found = torch.zeros_like(x)
    for i, t in mask.nonzero().tolist():
        found[i, t] = sum(factor ** (j - t) * x[i, j] for j in range(t, x.shape[1]) if mask[i, j])
    return found


def kl_of(a, logratio, p, q):
    if a.kl_estimator == "exact":
        return (p.exp() * (p - q)).sum(-1)
    return {"k1": logratio, "k2": logratio**2 / 2, "k3": (-logratio).exp() - 1 + logratio}[a.kl_estimator]


def critic_of(world, state):
    critic = load_rm(world / "rm")
    critic.load_state_dict(state)
    return critic


@torch.no_grad()
def shaped(world, run):
    """Scores, log-probs, values, advantages and returns of the first rollout, as the flags say."""
    a, rows = run.a, Rows(run.rollouts[0].examples)
    policy, reference, rm = load(world / "model"), load(world / "other"), load_rm(world / "rm")
    p, q = (rows.distributions(m, a.temperature) for m in (policy, reference))
    of = SimpleNamespace(rows=rows, logps=rows.taken(p), ref=rows.taken(q), q=q, values=None, returns=None)
    of.entropy = -(p.exp() * p).sum(-1) * rows.mask
    each = torch.arange(len(rows.lengths))
    of.raw = rows_scores(rows, rm)
    of.scores = after_missing_eos(a, of.raw, rows)
    of.kl = kl_of(a, of.logps - of.ref, p, q) * rows.mask
    rewards = -(a.kl_coef if a.kl_in == "reward" else 0.0) * of.kl
    rewards[each, rows.last] += of.scores
    if a.advantage == "gae":
        if a.whiten_rewards != "no":
            rewards = white(rewards, rows.mask, shift=a.whiten_rewards == "shift")
        mean = REWARD_MEAN if a.value_init == "reward" else 0.0
        of.values = rows.before(rows.heads(critic_of(world, run.updates[0].critic)) - mean)
        after = torch.cat([of.values[:, 1:], torch.zeros_like(of.values[:, :1])], 1)
        delta = (rewards + a.gamma * after - of.values) * rows.mask
        of.advantages = discounted(delta, rows.mask, a.gamma * a.lam)
        of.returns = of.advantages + of.values
        if a.whiten_advantages:
            of.advantages = white(of.advantages, rows.mask)
    elif a.advantage == "reinforce++":
        of.advantages = white(discounted(rewards, rows.mask, 1.0), rows.mask)
    else:
        total = rewards.sum(1).view(-1, a.k)
        mean = total.mean(1, keepdim=True)
        if a.advantage == "remax":
            greedy = greedy_rows(policy, run.rollouts[0].examples, a.max_new_tokens)
            found = total - after_missing_eos(a, rows_scores(greedy, rm), greedy)[:, None]
        elif a.advantage == "rloo":
            others = [[j for j in range(a.k) if j != i] for i in range(a.k)]
            found = torch.stack([total[:, i] - total[:, rest].mean(1) for i, rest in enumerate(others)], 1)
        elif a.advantage == "grpo":
            found = (total - mean) / (((total - mean) ** 2).sum(1, keepdim=True).div(a.k - 1).sqrt() + 1e-4)
        else:
            found = total - mean
        of.advantages = found.reshape(-1, 1) * rows.mask
    return of


def after_missing_eos(a, raw, rows):
    cut = {"no": raw, "replace": torch.full_like(raw, a.missing_eos_value), "subtract": raw - a.missing_eos_value}
    return torch.where(rows.ended, raw, cut[a.missing_eos])


def rows_scores(rows, rm):
    return rows.heads(rm)[torch.arange(len(rows.last)), rows.last] - REWARD_MEAN


USUAL = {"gae": "tokens", "reinforce++": "tokens", "rloo": "sequences", "remax": "sequences", "grpo": "responses"}
USUAL |= {"drgrpo": "constant"}  # what each method's paper averages over


def per(a, rows: Rows):
    """What each token counts."""
    each = rows.mask.double()
    if a.overlong == "mask":
        each[~rows.ended] = 0
    answers = each.amax(1).sum()
    if a.average == "tokens":  # all tokens alike
        return each / each.sum()
    if a.average == "sequences":  # a sum over each answer
        return each / answers
    if a.average == "responses":  # a mean over each answer
        return each / rows.lengths[:, None] / answers
    return each / a.max_new_tokens / answers


def wanted(world, run, of, update, factor=1.0):
    """Gradients and metrics of one update, at the weights that it found; `factor` [b t] weighs the policy's loss."""
    a, k = run.a, run.a.k
    at = torch.tensor([i * k + j for i in update.places for j in range(k)])
    rows = Rows([run.rollouts[0].examples[i] for i in update.places])
    width = rows.ids.shape[1]
    cut = lambda x: x[at][:, :width]  # noqa: E731
    policy, weights = load(world / "model"), per(a, rows) * (cut(factor) if torch.is_tensor(factor) else factor)
    policy.load_state_dict(update.policy)
    p = rows.distributions(policy, a.temperature)
    logps, old, A = rows.taken(p), cut(of.logps), cut(of.advantages)
    ratio = (logps - old).exp()
    if a.surrogate == "sequence":
        ratio = ((logps - old).sum(1) / rows.lengths).exp()[:, None] * rows.mask
    loss = -torch.minimum(ratio * A, ratio.clamp(1 - a.clip_range, 1 + a.clip_high) * A)
    outside = (ratio > 1 + a.clip_high) & (A > 0) | (ratio < 1 - a.clip_range) & (A < 0)
    if a.surrogate == "cispo":
        outside = ratio > 1 + a.clip_high
        loss = -A * torch.where(outside, 1 + a.clip_high, ratio).detach() * logps
    entropy = -(p.exp() * p).sum(-1)
    loss = loss - a.entropy_coef * entropy
    if a.kl_in == "loss":
        loss = loss + a.kl_coef * kl_of(a, logps - cut(of.ref), p, cut(of.q))
    loss = (loss * weights).sum()
    found = {"loss/policy": loss.item(), "policy/approxkl": rows.mean((logps - old) ** 2 / 2)}
    found["policy/clipfrac"] = rows.mean(outside.double())
    if update.ptx:
        text = Rows(update.ptx)
        nll = -text.taken(text.distributions(policy)).sum() / text.mask.sum()
        found["loss/ptx"] = nll.item()
        loss = loss + a.ptx_coef * nll
    loss.backward()
    gradients = [torch.cat([w.grad.flatten() for w in policy.parameters()])]
    if update.critic:
        critic = critic_of(world, update.critic)
        values = rows.before(rows.heads(critic) - (REWARD_MEAN if a.value_init == "reward" else 0.0))
        error = (values - cut(of.returns)) ** 2
        if a.value_clip is not None:
            near = torch.minimum(torch.maximum(values, cut(of.values) - a.value_clip), cut(of.values) + a.value_clip)
            error = torch.maximum(error, (near - cut(of.returns)) ** 2)
        error = (error * rows.mask).sum() / 2 / rows.mask.sum()
        error.backward()
        found["loss/value"] = error.item()
        gradients.append(torch.cat([w.grad.flatten() for w in critic.parameters()]))
    return found, gradients


SHORT = {"epochs_per_rollout": 1}
SETTINGS = {
    "gae": {"micro_batch_tokens": 40, "layout": "tree"},
    "rloo": {"advantage": "rloo", "micro_batch_tokens": 40, "layout": "padded"} | SHORT,
    "grpo": {"advantage": "grpo", "kl_in": "loss", "kl_estimator": "k3", "layout": "padded"},
    "drgrpo": {"advantage": "drgrpo"} | SHORT,
    "reinforce++": {"advantage": "reinforce++"} | SHORT,
    "remax": {"advantage": "remax", "k": 2} | SHORT,
    "remax, cut answers": {"advantage": "remax", "missing_eos": "subtract", "missing_eos_value": 1.5} | SHORT,
    "cut answers, rewards whitened": {"missing_eos": "replace", "missing_eos_value": -2.0, "whiten_rewards": "scale"},
    "discount, no whitening": {"gamma": 0.9, "lam": 0.7, "whiten_advantages": False, "value_clip": None} | SHORT,
    "clip range": {"clip_range": 0.02, "value_clip": 0.01},
    "DAPO": {"advantage": "grpo", "average": "tokens", "clip_range": 0.02, "clip_high": 0.05, "overlong": "mask"},
    "GSPO": {"advantage": "grpo", "surrogate": "sequence", "overlong": "mask", "entropy_coef": 0.1},
    "CISPO": {"advantage": "rloo", "surrogate": "cispo", "clip_high": 0.02, "overlong": "mask"},
    "all at a temperature": {"temperature": 0.6, "kl_estimator": "exact", "kl_in": "loss"}
    | {"entropy_coef": 0.1, "ptx_coef": 0.6, "micro_batch_tokens": 30},
}
MORE = {
    f"{estimator} in the {place}, {advantage}": {"kl_estimator": estimator, "kl_in": place, "advantage": advantage}
    for estimator in ("k1", "k2", "k3", "exact")
    for place in ("reward", "loss")
    for advantage in ("gae", "reinforce++", "grpo", "remax")
} | {
    "subtract, shift": {"missing_eos": "subtract", "missing_eos_value": 1.5, "whiten_rewards": "shift"},
    "value of the policy": {"value_init": "policy"},
    "value zero": {"value_init": "zero"},
    "entropy": {"entropy_coef": 0.3},
    "PTX": {"ptx_coef": 1.5, "advantage": "rloo"},
    "replace, remax": {"missing_eos": "replace", "advantage": "remax"},
    "temperature above 1": {"temperature": 1.7, "kl_estimator": "k3"},
}


@pytest.mark.parametrize("name", [*SETTINGS, *(pytest.param(name, marks=pytest.mark.slow) for name in MORE)])
def test_every_update_is_that_of_padded_rows(name, world, go):
    """One or two passes of two minibatches, at their own weights: gradients of policy and critic, losses, share
    clipped; and what the rollout came to, which is the same for all of them."""
    flags = (SETTINGS | MORE)[name]
    run = go(**flags | {"ptx_data": f"{world}/pairs.jsonl"})
    a, rollout, of = run.a, run.rollouts[0], shaped(world, run)
    rows = of.rows
    usual = {"token": (USUAL[a.advantage], a.clip_range), "sequence": ("responses", 4e-4), "cispo": ("tokens", 5.0)}
    assert (a.average, a.clip_high) == tuple(map(flags.get, ("average", "clip_high"), usual[a.surrogate]))
    assert 0 < rows.ended.sum() < len(rows.ended) and len({*rows.lengths.tolist()}) > 2
    assert rollout.lengths.tolist() == rows.lengths.tolist()
    assert rollout.scores.tolist() == pytest.approx(of.scores.tolist(), abs=1e-4)
    flat = {"logps": of.logps, "ref_logps": of.ref, "advantages": of.advantages}
    flat |= {"values": of.values, "returns": of.returns} if a.advantage == "gae" else {}
    for field, x in flat.items():
        assert getattr(rollout, field).tolist() == pytest.approx(x[rows.mask].tolist(), rel=1e-3, abs=1e-4), field
    critics = a.advantage == "gae"
    assert (rollout.values is not None) == (rollout.returns is not None) == critics
    assert (run.updates[0].critic is not None) == critics

    found, number, updates = [], 1 + critics, 2 * a.epochs_per_rollout
    assert len(run.updates) == updates and len(run.gradients) == updates * number
    for i, update in enumerate(run.updates):
        metrics, gradients = wanted(world, run, of, update)
        for mine, theirs in zip(run.gradients[number * i : number * (i + 1)], gradients, strict=True):
            assert (mine - theirs).norm() <= 1e-3 * theirs.norm() + 1e-7  # it is 0 where all is clipped
        found.append(metrics)
    for passed in range(a.epochs_per_rollout):  # every prompt once a pass
        assert sorted(run.updates[2 * passed].places + run.updates[2 * passed + 1].places) == [0, 1, 2, 3]

    k1 = (of.logps - of.ref).sum(1).mean().item()
    want = {name: sum(x[name] for x in found) / updates for name in found[0]} | {
        "objective/scores": of.raw.mean().item(),
        "objective/kl": k1,
        "objective/entropy": rows.mean(of.entropy),
        "objective/rlhf_reward": of.scores.mean().item() - a.kl_coef * k1,
        "length": rows.lengths.double().mean().item(),
        "ended": rows.ended.double().mean().item(),
        "kl_coef": a.kl_coef,
        "lr": a.lr,
    }
    if a.k > 1:
        grouped = of.scores.view(-1, a.k).tolist()
        want["frac_reward_zero_std"] = sum(max(x) - min(x) < 1e-3 for x in grouped) / len(grouped)
    if critics:
        unexplained, all_of_it = (x[rows.mask].var(correction=0) for x in (of.returns - of.values, of.returns))
        want["val/explained_variance"] = (1 - unexplained / all_of_it).item()
    norms = [g.norm().item() for g in run.gradients[::number]]
    assert norms[0] > 1e-2
    want["grad_norm"] = sum(norms) / len(norms)
    texts = [f"{e.prompt_text} {t}" for e in rollout.examples for t in e.response_texts]
    want["objective/gold"] = sum(map(reviews.gold_reward, texts)) / len(texts)
    [metrics] = run.metrics
    assert {name: metrics[name] for name in want} == pytest.approx(want, rel=1e-3, abs=1e-4)
    assert metrics["policy/clipfrac"] > 0 and abs(metrics["objective/kl"]) > 0.1  # else little was tested
    sampler = {"sampler/log_ratio", "sampler/log_ratio_max", "sampler/kl"}
    assert max(abs(metrics[name]) for name in sampler) < 1e-4
    known = {"step", *want, *sampler} | (
        set() if critics else {"loss/value"}
    )  # whether that belongs there: the test below
    assert {name for name in metrics if "perf" not in name} | ({"loss/value"} - {*want}) == known


@pytest.mark.parametrize("correction", ["token", "sequence"])
def test_the_samplers_log_probs_weigh_the_whole_loss(correction, world, go, monkeypatch):
    """A sampler whose log-probs are off by 0.4 sin(i) at the i-th token: surrogate, KL and entropy are all weighted."""

    def off_by_a_sine(*args):
        examples = answer(*args)
        number = itertools.count()
        for e in examples:
            e.sampled_logps = [[x + 0.4 * math.sin(next(number)) for x in logps] for logps in e.sampled_logps]
        return examples

    monkeypatch.setattr(train_ppo, "answer", off_by_a_sine)
    monkeypatch.setattr(train_ppo, "guard", lambda *rest: None)
    flags = {"advantage": "rloo", "kl_in": "loss", "kl_estimator": "k2", "entropy_coef": 0.1, "sampler_cap": 1.2}
    run = go(**flags | SHORT | {"sampler_correction": correction})
    of = shaped(world, run)
    rows, log_ratio = of.rows, torch.zeros_like(of.logps)
    log_ratio[rows.mask] = -0.4 * torch.arange(int(rows.mask.sum())).double().sin()
    if correction == "token":
        factor = log_ratio.exp().clamp(max=1.2)
        cut = log_ratio.exp() > 1.2
    else:
        factor = log_ratio.sum(1, keepdim=True).exp().expand_as(log_ratio)
        cut = factor > 1.2
        factor = torch.where(cut, 0, factor)
    assert 0 < rows.mean(cut.double()) < 1
    assert run.rollouts[0].weights.tolist() == pytest.approx(factor[rows.mask].tolist(), rel=1e-4)
    for mine, update in zip(run.gradients, run.updates, strict=True):
        _, [gradient] = wanted(world, run, of, update, factor)
        assert off(mine, gradient) < 1e-3 and off(mine, wanted(world, run, of, update)[1][0]) > 0.01
    want = {"log_ratio": rows.mean(log_ratio), "log_ratio_max": log_ratio.abs().max().item()}
    want |= {"kl": rows.mean(log_ratio.exp() - 1 - log_ratio), "cut": rows.mean(cut.double())}
    assert {name: run.metrics[0][f"sampler/{name}"] for name in want} == pytest.approx(want, rel=1e-3, abs=1e-5)


@pytest.mark.parametrize(
    "flags, correction, cap",
    [
        ({}, "none", 3.0),
        ({"dtype": "bfloat16"}, "sequence", 3.0),
        ({"dtype": "bfloat16", "sampler_correction": "token"}, "token", 2.0),
    ],
)
def test_the_default_correction_follows_the_dtype(flags, correction, cap, go):
    run = go(**CHEAP | flags)
    assert (run.a.sampler_correction, run.a.sampler_cap) == (correction, cap)
    assert ("sampler/cut" in run.metrics[0]) == (correction != "none")
    assert run.metrics[0]["sampler/log_ratio_max"] < (1e-4 if correction == "none" else 0.5)


def test_what_coefficients_of_kl_and_entropy_multiply():
    """Weights of the tokens of answers of 2, 1 and 3 tokens by hand, and their sum: 1 where they make a mean of tokens
    or of means, the mean length 2 where answers are summed, 2 / 8 where the sums are divided by --max-new-tokens 8."""
    lengths = torch.tensor([2, 1, 3])
    weights = {
        "gae": [1 / 6] * 6,
        "reinforce++": [1 / 6] * 6,
        "rloo": [1 / 3] * 6,
        "remax": [1 / 3] * 6,
        "grpo": [1 / 6] * 2 + [1 / 3] + [1 / 9] * 3,
        "drgrpo": [1 / 24] * 6,
    }
    masked = {"tokens": [1 / 3, 1 / 3, 0], "sequences": [1 / 2, 1 / 2, 0], "responses": [1 / 4, 1 / 2, 0]}
    masked["constant"] = [1 / 16, 1 / 16, 0]
    assert {*weights} == {*train_ppo.AVERAGES}
    for name, expected in weights.items():
        a = train_ppo.Args(advantage=name, average=train_ppo.AVERAGES[name], max_new_tokens=8)
        each = train_ppo.answer_weights(a, lengths, torch.ones(3))
        assert each.repeat_interleave(lengths).tolist() == pytest.approx(expected), name
        total = {"rloo": 2, "remax": 2, "drgrpo": 2 / 8}.get(name, 1)
        assert sum(expected) == pytest.approx(total), name
        each = train_ppo.answer_weights(a, lengths, torch.tensor([1.0, 1.0, 0.0]))  # without the last answer
        assert each.tolist() == pytest.approx(masked[a.average]), name
        assert not train_ppo.answer_weights(a, lengths, torch.zeros(3)).any()


def test_the_kl_in_the_loss_has_the_coefficient_of_its_rollout(world):
    """Which --kl-target moves, and not the flag's: with advantages of 0 the loss is 2 times the mean of the tokens' k2,
    (1 + 4 + 0 + 9 + 1 + 1) / 2 / 6."""
    policy, batching = load(world / "model"), scoring.Batching("padded")
    examples = [example([1, 5, 6], [[7, 8, 9], [10]]), example([1, 7], [[11], [12]])]
    with torch.no_grad():
        logps, _ = scoring.response_logps(policy, collate(examples, "padded", 0))
    ref_logps, none = logps - torch.tensor([1.0, -2.0, 0.0, 3.0, -1.0, 1.0]), torch.zeros(6)
    rollout = train_ppo.Rollout(examples, logps, ref_logps, None, none, None, torch.ones(2, 2), torch.ones(6))
    a = train_ppo.Args(device="cpu", advantage="reinforce++", kl_in="loss", kl_estimator="k2", kl_coef=0.3)
    a.average, a.clip_range = "tokens", 0.2
    found = train_ppo.update(a, policy, None, None, rollout, [0, 1], 2.0, batching)
    assert found["loss/policy"] == pytest.approx(2 * 16 / 2 / 6, rel=1e-4)


@pytest.mark.parametrize("most", [0.01, 1e3])
def test_steps_are_made_with_gradients_of_at_most_max_grad_norm(most, go):
    """Of policy and critic: a longer gradient is scaled to it, a shorter one is as it was."""
    run = go(max_grad_norm=most, epochs_per_rollout=1)
    norms = [gradient.norm().item() for gradient in run.gradients]  # before, of policy and critic in turn
    assert len(norms) == 4 and min(norms) > 0.02
    assert run.stepped == pytest.approx([min(norm, most) for norm in norms], rel=1e-4)


def test_methods_without_a_critic_log_nothing_of_one(go):
    run = go(**CHEAP)
    assert not [name for name in run.metrics[0] if "val" in name]


@pytest.mark.parametrize(
    "init", ["policy", *(pytest.param(name, marks=pytest.mark.slow) for name in ("reward", "zero"))]
)
def test_what_the_critic_starts_as(init, world, go):
    """All of the reward model; or the policy with a head that the seed decides; or that with a head of 0."""
    critic = go(**CHEAP | {"advantage": "gae", "value_init": init}).updates[0].critic
    origin = load_file(world / ("rm" if init == "reward" else "model") / "model.safetensors")
    head = critic["score.weight"]
    assert all(torch.equal(critic[name], weight) for name, weight in origin.items() if name in critic)
    assert len({*critic} & {*origin}) == len(critic) - (init != "reward")
    if init == "zero":
        assert not head.any()
    if init == "policy":
        assert 0.5 < head.std().item() * math.sqrt(33) < 1.5  # N(0, 1 / sqrt(d + 1))


@pytest.mark.slow
@pytest.mark.parametrize(
    "flags",
    [
        {"entropy_coef": 0.1, "ptx_coef": 0.3, "kl_in": "loss", "kl_estimator": "exact"},
        *({"advantage": name} for name in train_ppo.AVERAGES),
    ],
    ids=lambda x: "-".join(map(str, x.values())),
)
def test_gradients_depend_neither_on_the_budget_nor_on_the_layout(flags, world, go):
    """The weights hardly move, so that all four updates can be compared."""
    still = {"lr": 1e-9, "critic_lr": 1e-9, "ptx_data": f"{world}/pairs.jsonl"} | flags
    settings = [("tree", 10**6), ("tree", 40), ("padded", 10**6), ("padded", 1)]
    first, *others = [go(layout=layout, micro_batch_tokens=budget, **still) for layout, budget in settings]
    assert len(first.gradients) == (8 if "advantage" not in flags or flags["advantage"] == "gae" else 4)
    for run in others:
        for mine, theirs in zip(run.gradients, first.gradients, strict=True):
            assert off(mine, theirs) < 1e-4
        rows = [{k: v for k, v in x.metrics[0].items() if "perf" not in k} for x in (run, first)]
        assert rows[0] == pytest.approx(rows[1], rel=1e-4, abs=1e-5)


@pytest.mark.slow
def test_bfloat16_is_near(go, capfd, monkeypatch):
    """On the same answers to a rollout. And the guard says once by how much scoring, sampling and loss differ."""
    given = []

    def once(*args):
        given.append(answer(*args))
        return given[0] if len(given) == 3 else given[-1]  # the second run's first rollout is that of the first run

    monkeypatch.setattr(train_ppo, "answer", once)
    runs = [go(advantage="rloo", layout="padded", dtype=dtype, max_steps=2) for dtype in ("float32", "bfloat16")]
    for name in ("objective/scores", "objective/entropy", "objective/kl"):
        assert runs[1].metrics[0][name] == pytest.approx(runs[0].metrics[0][name], rel=0.05, abs=0.1)
    assert capfd.readouterr().out.count("guard: in bfloat16 scoring and loss differ by") == 1
    assert {w.dtype for w in load_file(runs[1].out / "model.safetensors").values()} == {torch.float32}


def test_ptx_counts_the_tokens_that_are_trained(world):
    """Of a conversation the user's turns are read, not learnt: the mean is over the others, as in train_sft.py."""
    policy = load(world / "model")
    rows = [
        example([5, 6], [[7, 8, 9, 10]], trained=[[True, False, False, True]]),
        example([5, 6, 7], [[11, 12]]),
    ]
    a = train_ppo.Args(device="cpu", ptx_coef=0.5)
    found = train_ppo.add_ptx_gradient(a, policy, rows, scoring.Batching("padded"))["loss/ptx"]
    gradient = torch.cat([w.grad.flatten() for w in policy.parameters()])
    policy.zero_grad()
    total = 0.0
    for e in rows:
        logps = policy(torch.tensor([e.prompt + e.responses[0]])).logits[0].log_softmax(-1)
        trained = e.trained[0] if e.trained else [True] * len(e.responses[0])
        places = [j for j, x in enumerate(trained) if x]
        total = total - sum(logps[len(e.prompt) - 1 + j, e.responses[0][j]] for j in places)
    (0.5 * total / 4).backward()
    assert found == pytest.approx(total.item() / 4, rel=1e-4)
    assert off(gradient, torch.cat([w.grad.flatten() for w in policy.parameters()])) < 1e-4


# ------------------------------------------------------------------------------------------------- sampling and order


def test_answers_are_sampled_at_the_temperature(world, go):
    """Near 0 every answer is the greedy one, by the library alone; at 1 the answers to a prompt differ."""
    cold, warm = (go(**CHEAP | {"temperature": t, "k": 3}).rollouts[0] for t in (1e-3, 1.0))
    greedy = greedy_rows(load(world / "model"), cold.examples, 3)
    assert [e.responses for e in cold.examples] == [
        [ids[mask].tolist()] * 3 for ids, mask in zip(greedy.ids, greedy.mask, strict=True)
    ]
    assert any(len({*map(tuple, e.responses)}) > 1 for e in warm.examples)


def test_each_epoch_sees_every_prompt_once_in_an_order_of_its_own(go, monkeypatch):
    """12 prompts, 4 a rollout: three rollouts an epoch. Another seed: another order, and other answers. No two rollouts
    sample with one seed."""
    seeds = []
    monkeypatch.setattr(train_ppo, "answer", lambda *args: seeds.append(args[4]) or answer(*args))
    first, other = (go(**CHEAP | {"max_steps": 6, "seed": seed, "max_new_tokens": 2}) for seed in (0, 1))
    seen = [[e.prompt_text for e in rollout.examples] for rollout in first.rollouts]
    epochs = [sum(seen[:3], []), sum(seen[3:], [])]
    assert [len(x) for x in seen] == [4] * 6
    assert all(sorted(x) == sorted(PROMPTS) for x in epochs)
    assert epochs[0] != epochs[1] and PROMPTS not in epochs
    assert [e.prompt_text for rollout in other.rollouts for e in rollout.examples] != epochs[0] + epochs[1]
    answers = [[e.responses for rollout in run.rollouts for e in rollout.examples] for run in (first, other)]
    assert answers[0] != answers[1] and len(seeds) == len({*seeds}) == 12


def test_a_prompt_that_is_there_twice_counts_once(world, tmp_path, go):
    data = write_rows(tmp_path / "twice.jsonl", [{"prompt": p} for p in PROMPTS[:4] * 2])
    [rollout] = go(**CHEAP | {"data": str(data)}).rollouts
    assert sorted(e.prompt_text for e in rollout.examples) == sorted(PROMPTS[:4])


def test_the_rates_fall_linearly(go):
    """Those of both optimizers, whose epsilon is the flag's and whose weights do not decay."""
    run = go(**CHEAP | {"advantage": "gae", "max_steps": 4, "lr": 2e-3, "critic_lr": 8e-3, "adam_eps": 1e-4})
    assert run.rates == [(pytest.approx(lr * (1 - i / 4)), 1e-4, 0.0) for i in range(4) for lr in (2e-3, 8e-3)]
    assert [row["lr"] for row in run.metrics] == pytest.approx([2e-3, 1.5e-3, 1e-3, 5e-4])
    assert [row["step"] for row in run.metrics] == [1, 2, 3, 4]
    assert {row["kl_coef"] for row in run.metrics} == {0.3}  # fixed without a target


def test_the_critics_rate_keeps_its_ratio_to_the_policys(go):
    """With the embedded tokenizer 10/3 of it."""
    for rate, critics in ((6e-4, 2e-3), (None, 1e-3)):
        assert go(**CHEAP | {"advantage": "gae", "lr": rate, "critic_lr": None}).a.critic_lr == pytest.approx(critics)


@pytest.mark.parametrize(
    "target, horizon, share", [(0.5, 0.5, 0.5), pytest.param(1e4, 1e-6, 1.0, marks=pytest.mark.slow)]
)
def test_the_coefficient_follows_its_formula(target, horizon, share, go):
    """A target that is passed, with two rollouts to a horizon; and one never reached, a rollout to each."""
    flags = CHEAP | {"kl_target": target, "kl_horizon": horizon, "max_steps": 4, "advantage": "rloo", "k": 2}
    rows = go(**flags).metrics
    for row, after in itertools.pairwise(rows):
        error = min(max(row["objective/kl"] / target - 1, -0.2), 0.2)
        assert after["kl_coef"] == pytest.approx(row["kl_coef"] * (1 + error * share), rel=1e-6)
    assert rows[0]["kl_coef"] == 0.3 and rows[-1]["kl_coef"] != 0.3


def test_kl_stop_ends_the_epochs(go):
    """After the pass in which the policy has gone too far, and not before."""
    flags = CHEAP | {"advantage": "rloo", "k": 2, "epochs_per_rollout": 3, "minibatches": 2}
    free = go(**flags)
    moved = [update.found["policy/approxkl"].item() for update in free.updates]
    assert len(moved) == 6 and moved[0] < 1e-9 < moved[1] < moved[3]
    assert len(go(kl_stop=(moved[1] + moved[3]) / 2, **flags).updates) == 4


# --------------------------------------------------------------------------------------------------------- the reward


def test_a_reward_model_with_the_policys_tokenizer_scores_the_sampled_ids(world, go, monkeypatch):
    """Not their text: here that is lost."""
    decode = type(TOKENIZER).decode
    monkeypatch.setattr(type(TOKENIZER), "decode", lambda self, ids, **kwargs: "was" if kwargs else decode(self, ids))
    [rollout] = go(**CHEAP | {"k": 3, "max_new_tokens": 7}).rollouts
    assert {t for e in rollout.examples for t in e.response_texts} == {"was"}
    with torch.no_grad():
        want = rows_scores(Rows(rollout.examples), load_rm(world / "rm"))
    assert rollout.scores.tolist() == pytest.approx(want.tolist(), abs=1e-4)


def test_a_reward_model_with_another_tokenizer_scores_the_text(world, tmp_path, go):
    models.save(llama(byte_level()), byte_level(), tmp_path / "letters")
    folder = write_reward_model(tmp_path / "letters", tmp_path / "letters-rm")
    tokenizer, rm = transformers.AutoTokenizer.from_pretrained(folder), load_rm(folder)
    [rollout] = go(**CHEAP | {"k": 3, "max_new_tokens": 7, "reward": str(folder)}).rollouts
    want, ended = [], set()
    for e in rollout.examples:
        for text, ids in zip(e.response_texts, e.responses, strict=True):
            letters = tokenizer(e.row["prompt"])["input_ids"] + tokenizer(text, add_special_tokens=False)["input_ids"]
            letters += [tokenizer.eos_token_id] * (ids[-1] == EOS)
            ended.add(ids[-1] == EOS)
            with torch.no_grad():
                want.append(rm(torch.tensor([letters])).logits[0, 0].item() - REWARD_MEAN)
    assert len(ended) == 2 and max(want) - min(want) > 0.1
    assert rollout.scores.tolist() == pytest.approx(want, abs=1e-4)


def test_gold(go):
    [rollout] = go(**CHEAP | {"k": 3, "max_new_tokens": 7, "reward": "gold"}).rollouts
    want = [reviews.gold_reward(f"{e.row['prompt']} {t}") for e in rollout.examples for t in e.response_texts]
    assert rollout.scores.tolist() == pytest.approx(want, abs=1e-6) and len({*want}) > 1


@pytest.fixture
def own(tmp_path, monkeypatch):
    """A module with a reward function of the user's; `calls` are what it was given."""
    (tmp_path / "own_reward.py").write_text(
        "calls = []\nfail = None\n\n\n"
        "def reward(prompts, responses, rows):\n"
        "    calls.append((prompts, responses, rows))\n"
        "    found = [len(y) / 10 for y in responses]\n"
        "    return fail(prompts, responses, found) if fail else found\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "own_reward", raising=False)
    import own_reward

    yield own_reward
    sys.modules.pop("own_reward")


def test_groups_that_score_alike_are_replaced_by_the_next_prompts(own, go):
    """A reward that only some prompts' answers earn: the epoch's next prompts take the places of the others."""
    flags = CHEAP | {"k": 3, "advantage": "grpo", "max_new_tokens": 7, "reward": "own_reward:reward", "max_steps": 3}
    plain = go(**flags)
    order = [e.prompt_text for rollout in plain.rollouts for e in rollout.examples]
    assert sorted(order) == sorted(PROMPTS)
    dull = {*order[:3], order[5]}  # of the first rollout only the last prompt; of the second, not its second
    own.fail = lambda prompts, responses, found: [
        0.5 if any(p.endswith(text) for text in dull) else x for p, x in zip(prompts, found, strict=True)
    ]
    once, twice, never = (go(**flags | {"max_steps": 1, "resample_groups": n}) for n in (1, 2, 0))
    prompts = lambda run: [e.prompt_text for e in run.rollouts[0].examples]  # noqa: E731
    assert prompts(never) == order[:4] and never.rollouts[0].scores[:9].tolist() == pytest.approx([0.5] * 9)
    assert prompts(once) == [order[4], order[5], order[6], order[3]]
    assert prompts(twice) == [order[4], order[7], order[6], order[3]]
    assert [run.metrics[0].get("resampled") for run in (never, once, twice)] == [None, 3 / 4, 4 / 4]
    [rollout] = twice.rollouts
    assert rollout.scores.tolist() == pytest.approx([len(y) / 10 for e in rollout.examples for y in e.response_texts])
    own.fail = lambda prompts, responses, found: [0.5] * len(found)
    assert go(**flags | {"max_steps": 1, "resample_groups": 2}).metrics[0]["resampled"] == 2


@pytest.mark.parametrize("advantage", [pytest.param("reinforce++", marks=pytest.mark.slow), "remax"])
def test_a_function_gets_prompts_responses_and_rows_side_by_side(advantage, own, go):
    run = go(**CHEAP | {"advantage": advantage, "k": 3, "max_new_tokens": 7, "reward": "own_reward:reward"})
    [rollout] = run.rollouts
    prompts, responses, rows = own.calls[0]
    examples = [e for e in rollout.examples for _ in range(3)]
    assert prompts == [row["prompt"] for row in rows] == [e.row["prompt"] for e in examples]
    assert [row["id"] for row in rows] == [PROMPTS.index(p) for p in prompts]
    assert responses == [t for e in rollout.examples for t in e.response_texts]
    ended = [ids[-1] == EOS for e in rollout.examples for ids in e.responses]
    assert [row["ended"] for row in rows] == ended and len({*ended}) == 2
    assert rollout.scores.tolist() == pytest.approx([len(y) / 10 for y in responses])
    greedy = own.calls[1]  # for remax; else of the answers before and after
    assert len(own.calls) == 3 + (advantage == "remax")
    if advantage == "remax":
        assert greedy[0] == [e.row["prompt"] for e in rollout.examples]
        total = (rollout.scores - 0.3 * per_answer(rollout.logps - rollout.ref_logps, rollout.lengths)).view(4, 3)
        want = total - torch.tensor([len(y) / 10 for y in greedy[1]])[:, None]
        starts = rollout.lengths.cumsum(0) - 1
        assert rollout.advantages[starts].tolist() == pytest.approx(want.flatten().tolist(), abs=1e-4)


def per_answer(x, lengths):
    return torch.stack([part.sum() for part in x.split(lengths.tolist())])


def raises(prompts, responses, found):
    raise RuntimeError("no\nluck")


FAILURES = {
    "raises": (raises, "raised RuntimeError: no luck"),
    "wrong count": (lambda prompts, responses, found: found[1:], "gave 3 numbers for 4 responses"),
    "nan": (lambda prompts, responses, found: [math.nan, *found[1:]], "gave nan"),
}


@pytest.mark.parametrize("name", FAILURES)
def test_a_function_that_fails_is_named_with_prompt_and_response(name, own, world, tmp_path):
    failure, message = FAILURES[name]
    own.fail = failure
    with pytest.raises(BadInput) as error:
        train_ppo.main(small(world, tmp_path / "run", **CHEAP | {"reward": "own_reward:reward"}))
    prompts, responses, _ = own.calls[0]
    assert message in str(error.value) and "--reward own_reward:reward" in str(error.value)
    assert repr(prompts[0][-80:]) in str(error.value) and repr(responses[0][:80]) in str(error.value)
    assert "\n" not in str(error.value)


def test_a_function_that_fails_loses_nothing(own, world, tmp_path):
    """The last checkpoint stays, and --resume goes on from it to where an unbroken run ends."""
    flags = CHEAP | {"reward": "own_reward:reward", "max_steps": 4, "save_every": 2}
    train_ppo.main(small(world, tmp_path / "straight", **flags))
    own.calls.clear()
    own.fail = lambda prompts, responses, found: found if len(own.calls) < 4 else raises(prompts, responses, found)
    a = small(world, tmp_path / "run", **flags)
    with pytest.raises(BadInput, match="no luck"):
        train_ppo.main(a)
    assert [folder.name for folder in (tmp_path / "run" / "checkpoint").iterdir()] == ["step-2"]
    own.fail = None
    train_ppo.main(dataclasses.replace(a, resume=True))
    assert_same(tmp_path / "run", tmp_path / "straight")


@pytest.mark.parametrize("reward", ["gold", "{world}/rm"])
def test_the_next_command_evaluates_by_the_same_reward_on_the_same_prompts(reward, world, go, capsys):
    reward = reward.format(world=world)
    out = go(**CHEAP | {"reward": reward}).out
    [line] = re.findall(r"Next: python evaluate\.py (.*)\n", capsys.readouterr().out)
    compared = {"models": (f"{world}/model", str(out)), "data": f"{world}/prompts.jsonl"}
    wanted = evaluate.Args(**compared, reward=reward, out=f"{out}-eval")
    assert tyro.cli(evaluate.Args, args=line.split()) == wanted


def test_a_function_that_fails_at_once_can_be_mended_and_given_again(own, world, tmp_path):
    flags = CHEAP | {"reward": "own_reward:reward", "max_steps": 2}
    train_ppo.main(small(world, tmp_path / "straight", **flags))
    own.fail = raises
    with pytest.raises(BadInput, match="no luck"):
        train_ppo.main(small(world, tmp_path / "run", **flags))
    own.fail = None
    train_ppo.main(small(world, tmp_path / "run", **flags))
    assert_same(tmp_path / "run", tmp_path / "straight")


# --------------------------------------------------------------------------------------------------------- the guards


@pytest.fixture
def loaded(monkeypatch):
    """The language models that a run has loaded: its policy first, then its reference."""
    seen = []
    monkeypatch.setattr(
        models, "load_model", lambda *args, load=models.load_model: seen.append(load(*args)) or seen[-1]
    )
    return seen


@torch.no_grad()
def shake(model):
    generator = torch.Generator().manual_seed(0)
    for weight in model.parameters():
        weight.add_(torch.randn(weight.shape, generator=generator) * 1e-3)


def stops(go, message: str, **flags):
    with pytest.raises(BadInput) as error:
        go(**CHEAP | flags)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_a_policy_that_changes_between_scoring_and_update_is_stopped(go, loaded, monkeypatch):
    """In the second rollout."""
    calls = []

    def compute_advantages(*args, compute=train_ppo.compute_advantages):
        calls.append(1)
        if len(calls) == 2:
            shake(loaded[0])
        return compute(*args)

    monkeypatch.setattr(train_ppo, "compute_advantages", compute_advantages)
    stops(go, "step 2: before its first update, the log-probs of scoring and loss differ by", max_steps=3)


def test_a_scorer_at_another_temperature_is_stopped(go, monkeypatch):
    """Scorer and update agree with each other here, but not with what sampled."""

    def token_logps(states, head, targets, temperature, token_logps=scoring.token_logps, **rest):
        return token_logps(states, head, targets, 1.0, **rest)

    monkeypatch.setattr(scoring, "token_logps", token_logps)
    stops(go, "step 1: before its first update, the log-probs of sampling and scoring differ by", temperature=0.9)


def test_a_sampler_with_another_model_is_stopped(go, monkeypatch):
    """What the cache computes is what the sampler saw: a model that answers otherwise there is found out, at the start
    and, if only then, before an update."""
    forward = transformers.LlamaForCausalLM.forward

    def other(self, *args, **kwargs):
        out = forward(self, *args, **kwargs)
        if kwargs.get("use_cache"):
            out.logits[..., 5] += 0.5
        return out

    monkeypatch.setattr(transformers.LlamaForCausalLM, "forward", other)
    stops(go, "llama: cannot be sampled from: log-probs differ by")
    monkeypatch.setattr(sampling, "choose_sampler", lambda *args: "loop")
    stops(go, "sampling and scoring differ by")


def test_a_reference_that_is_not_where_the_policy_starts_is_stopped(go, monkeypatch):
    """Without --ref the KL of the first rollout is 0; with it, it need not be."""
    seen = []

    def load_model(*args, load=models.load_model):
        seen.append(load(*args))
        if len(seen) == 2:
            shake(seen[1])
        return seen[-1]

    with monkeypatch.context() as patch:
        patch.setattr(models, "load_model", load_model)
        stops(go, "step 1: the log-probs of policy and reference differ by", ref=None)
    run = go(**CHEAP | {"ref": None})
    assert (run.rollouts[0].logps - run.rollouts[0].ref_logps).abs().max() < 1e-5
    assert abs(run.metrics[0]["objective/kl"]) < 1e-4 and run.results["before/kl"] == pytest.approx(0, abs=1e-4)


@pytest.mark.parametrize("layout", ["auto", "padded"])
def test_the_reward_model_is_checked_against_the_library(layout, go, monkeypatch):
    """In every layout: here transformers' own class, which scores every place, gives 1 more than ours."""
    load_reward_model = models.load_reward_model

    def other(*args):
        found = load_reward_model(*args)
        found.score.register_forward_hook(lambda module, given, out: out + 1.0 if given[0].dim() == 3 else out)
        return found

    monkeypatch.setattr(models, "load_reward_model", other)
    stops(go, "transformers' own class gives other rewards than ours", layout=layout)


@pytest.mark.parametrize(
    "name",
    ["llama", "gpt2", *(pytest.param(n, marks=pytest.mark.slow) for n in ARCHITECTURES if n not in ("llama", "gpt2"))],
)
def test_cached_logps_are_plain_ones(name):
    """Prompts and answers of unequal length, among them pads that are tokens; at two temperatures."""
    model = tiny(name)
    prompts = [[5, 6, 7, 8, 9, 10, 11], [12], [13, 0, 14]]
    responses = [[15, 2], [16, 17, 18, 19, 20], [21, 0, 0, 22]]
    for temperature in (1.0, 0.5):
        found = cached_logps(model, prompts, responses, temperature, 0)
        for p, r, mine in zip(prompts, responses, found, strict=True):
            with torch.no_grad():
                logps = (model(torch.tensor([p + r])).logits[0].double() / temperature).log_softmax(-1)
            want = [logps[len(p) - 1 + j, token].item() for j, token in enumerate(r)]
            assert mine.tolist() == pytest.approx(want, abs=1e-4)


# ------------------------------------------------------------------------------------------- models of other families


@pytest.mark.parametrize("init", ["reward", pytest.param("policy", marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "pad, bos", [("</s>", "<s>"), ("<s>", "<s>"), pytest.param("</s>", None, marks=pytest.mark.slow)]
)
def test_a_pad_token_that_is_eos_or_bos(init, pad, bos, tmp_path, go):
    """Where it is EOS, as in SmolLM2 and many others, the reward model has another: BOS, or a new one. BOS is what
    every prompt begins with. Both score the sampled ids."""
    tokenizer = byte_level(bos=bos, pad=pad)
    models.save(llama(tokenizer), tokenizer, tmp_path / "model")
    write_reward_model(tmp_path / "model", tmp_path / "rm")
    data = write_rows(tmp_path / "letters.jsonl", [{"prompt": "abcdefgh"[: i + 1]} for i in range(8)])
    flags = {"model": str(tmp_path / "model"), "ref": None, "reward": str(tmp_path / "rm"), "data": str(data)}
    run = go(**CHEAP | flags | {"advantage": "gae", "value_init": init})
    assert math.isfinite(run.metrics[0]["loss/value"])
    sampled = [torch.tensor([e.prompt + r]) for e in run.rollouts[0].examples for r in e.responses]
    model = load_rm(tmp_path / "rm")
    with torch.no_grad():
        wanted = torch.cat([model(ids).logits[0] for ids in sampled]) - REWARD_MEAN
    assert torch.allclose(run.rollouts[0].scores.cpu(), wanted, atol=1e-5)


def test_a_prompt_and_answer_that_just_fit_the_model(tmp_path, go):
    """GPT-2 here has 128 positions: 121 for the prompt with its BOS, 7 for the answer."""
    models.save(tiny("gpt2"), words(), tmp_path / "gpt2")
    data = write_rows(tmp_path / "w.jsonl", [{"prompt": "w5 " * n + "w6"} for n in (119, 5, 6, 7)])
    flags = {"model": str(tmp_path / "gpt2"), "ref": None, "data": str(data), "max_new_tokens": 7, "layout": "auto"}
    [rollout] = go(**CHEAP | flags | {"reward": "test_ppo:brevity"}).rollouts
    assert max(len(e.prompt) + 7 for e in rollout.examples) == 128


def test_auto_takes_the_padded_layout_where_only_the_reward_model_needs_it(tmp_path, go):
    """A Llama for the policy, a Gemma 2 (whose attention has a soft-cap) for the reward."""
    for name in ("llama", "gemma2"):
        models.save(tiny(name), words(), tmp_path / name)
    write_reward_model(tmp_path / "gemma2", tmp_path / "rm")
    data = write_rows(tmp_path / "w.jsonl", [{"prompt": f"w5 w6 w{i + 7}"} for i in range(6)])
    flags = {"model": str(tmp_path / "llama"), "ref": None, "reward": str(tmp_path / "rm"), "data": str(data)}
    assert go(**CHEAP | flags).layout == "padded"


def test_every_prompt_must_have_embeddings_in_every_model():
    """The reference has 50; of three prompts the one of medium length, which no layout check reads, has the id 55."""
    policy, reference = tiny("llama"), tiny("llama")
    reference.resize_token_embeddings(50)
    prompts = [example([1, 5], []), example([1, 55, 6], [], where="test:2"), example([1, 5, 6, 7], [])]
    ids, a = SimpleNamespace(eos_token_id=2, pad_token_id=0), train_ppo.Args(device="cpu", max_new_tokens=3)
    with pytest.raises(BadInput, match="^test:2: has the token id 55, and the llama model 50 embeddings"):
        scoring.batching_for_answers(policy, [reference], prompts, ids, a)
    assert scoring.batching_for_answers(policy, [policy], prompts, ids, a).layout == "tree"


# --------------------------------------------------------------------------------------------------------- bad input


def test_bad_flags_are_one_line_each(world, tmp_path):
    """Before anything is written."""

    def refused(*message: str, **flags):
        with pytest.raises(BadInput) as error:
            train_ppo.main(small(world, tmp_path / "run", **flags))
        assert all(part in str(error.value) for part in message) and "\n" not in str(error.value), error.value
        assert not [*tmp_path.glob("run/*")]

    for advantage in ("rloo", "grpo", "drgrpo"):
        refused(f"--advantage {advantage}", "--k must be at least 2", advantage=advantage, k=1)
    wrong = {"k": 0, "temperature": 0, "kl_coef": -1, "kl_target": 0, "kl_horizon": 1.5, "kl_stop": 0, "gamma": 2}
    wrong |= {"lam": -0.1, "clip_range": 0, "value_clip": -1, "entropy_coef": -1, "ptx_coef": math.inf}
    wrong |= {"epochs_per_rollout": 0, "minibatches": 5, "lr": 0, "critic_lr": 0, "adam_eps": 0, "max_grad_norm": 0}
    wrong |= {"batch_size": 0, "micro_batch_tokens": 0, "max_steps": 0, "max_prompt_length": 0, "max_new_tokens": 0}
    wrong |= {"eval_prompts": -1, "save_every": 0, "eval_fraction": 1.0}
    for name, value in wrong.items():
        refused(f"--{name.replace('_', '-')} must be", **{name: value})
        if isinstance(value, float) or name in ("gamma", "kl_coef", "lr"):
            refused(f"--{name.replace('_', '-')} must be", **{name: math.nan})
    refused("--minibatches must be", minibatches=0)
    refused("--kl-target: a --kl-coef of 0 stays 0", kl_target=5.0, kl_coef=0.0)
    refused("--kl-horizon must be", kl_horizon=0.0)
    refused("12 prompts are fewer than --batch-size", batch_size=13)
    refused("--value-init reward", "use --value-init policy", reward="gold")
    write_rows(tmp_path / "chats.jsonl", [{"prompt": [{"role": "user", "content": p}]} for p in PROMPTS])
    chats = {"reward": "gold", "value_init": "policy", "data": f"{tmp_path}/chats.jsonl"}
    refused("--reward gold", "a prompt holds messages", **chats)
    refused("--reward", "no such folder", reward=f"{world}/none")
    refused("--reward no_module_of_mine:f: cannot be", reward="no_module_of_mine:f", data=f"{world}/none.jsonl")
    refused("--reward", "not a reward model", reward=f"{world}/model")
    refused("--reward no_such:thing", "cannot be imported", reward="no_such:thing", value_init="policy")
    refused("--model", "a reward model", model=f"{world}/rm")
    refused("no such file or folder", data=f"{world}/none.jsonl")
    models.save(tiny("llama"), words(), tmp_path / "words")
    refused("--ref", "its tokenizer is not the one of --model", ref=f"{tmp_path}/words")
    refused("--ref", "a reward model, where a causal language model is wanted", ref=f"{world}/rm")


def test_flags_at_the_ends_of_their_ranges_are_accepted():
    a = train_ppo.Args(kl_coef=0.0, missing_eos="subtract", missing_eos_value=0.0, minibatches=4, batch_size=4, k=2)
    for advantage in train_ppo.AVERAGES:
        train_ppo.check_flags(dataclasses.replace(a, advantage=advantage))
    train_ppo.check_flags(dataclasses.replace(a, k=1))
    train_ppo.check_flags(dataclasses.replace(a, minibatches=1))


@pytest.mark.parametrize(
    "flags", [{"missing_eos": "subtract"}, {"missing_eos": "replace", "missing_eos_value": math.nan}], ids=str
)
def test_a_bad_value_of_cut_answers_is_refused_at_once(flags, world, tmp_path):
    """A penalty below 0 would be a bonus; said by the flag's name, before anything is written."""
    with pytest.raises(BadInput, match="--missing-eos-value"):
        train_ppo.main(small(world, tmp_path / "run", **flags))
    assert not [*tmp_path.glob("run/*")]


def command(monkeypatch, a: train_ppo.Args) -> int:
    """Exit code of the command with these flags."""
    monkeypatch.setattr(sys, "argv", ["train_ppo.py", *flags_of(a)])
    try:
        runs.cli(train_ppo.main, train_ppo.Args)
    except SystemExit as stop:
        return stop.code
    return 0


def test_from_the_command_line(world, tmp_path, monkeypatch, capfd):
    """--dry-run shows three prompts and writes nothing; bad input is exit code 2 and one line on stderr."""
    before = sorted(world.rglob("*"))
    assert command(monkeypatch, small(world, tmp_path / "run", dry_run=True)) == 0
    printed = capfd.readouterr().out
    assert "12 prompts to train on, 0 held out; 0 rows repeat one of them\n" in printed
    assert printed.count("prompts.jsonl:") == 3
    train_ppo.main(small(world, tmp_path / "run", dry_run=True, data=[str(world / "prompts.jsonl")] * 2))
    assert "12 prompts to train on, 0 held out; 12 rows repeat one of them\n" in capfd.readouterr().out
    assert command(monkeypatch, small(world, tmp_path / "run", advantage="rloo", k=1)) == 2
    lines = capfd.readouterr().err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: --advantage rloo")
    assert not [*tmp_path.iterdir()] and sorted(world.rglob("*")) == before


def test_a_loss_that_explodes_is_stopped(go):
    with pytest.raises(FloatingPointError, match=r"step \d: the loss is \S+ and the gradient norm \S+ \(rows prompts"):
        go(**CHEAP | {"lr": 1e30, "max_grad_norm": 1e30, "max_steps": 3})


# --------------------------------------------------------------------------------------------------- before and after


def test_the_table_is_that_of_the_answers(world, go, monkeypatch, capfd):
    """Of 5 held-out prompts: scores, KL, lengths and ends by transformers alone; a 95 % interval of the gain."""
    seen = []
    monkeypatch.setattr(report, "answer", lambda *args, **kw: seen.append(answer(*args, **kw)) or seen[-1])
    run = go(**CHEAP | {"eval_prompts": 5, "max_new_tokens": 7, "eval_fraction": 0.5, "batch_size": 2})
    held = {e.prompt_text for e in seen[0]}
    assert len(seen) == 2 and len(held) == 5 and not held & {e.prompt_text for e in run.rollouts[0].examples}
    assert [e.prompt_text for e in seen[0]] == [e.prompt_text for e in seen[1]]
    printed = capfd.readouterr().out
    assert "5 answers" in printed and "before" in printed and "after" in printed
    gold = []
    for side, answers, folder in zip(("before", "after"), seen, (world / "model", run.out), strict=True):
        rows = Rows(answers)
        sampled = generate(load(folder), TOKENIZER, [e.prompt for e in answers], 7, 1.0, 0)[0]
        assert [e.responses for e in answers] == [[ids] for ids in sampled]
        with torch.no_grad():
            mine, theirs = (rows.taken(rows.distributions(load(x))) for x in (folder, world / "other"))
            scores = rows_scores(rows, load_rm(world / "rm"))
        gold.append([reviews.gold_reward(f"{e.prompt_text} {e.response_texts[0]}") for e in answers])
        want = {
            "score": scores.mean().item(),
            "kl": (mine - theirs).sum(1).mean().item(),
            "length": rows.lengths.double().mean().item(),
            "ended": rows.ended.double().mean().item(),
            "gold": sum(gold[-1]) / 5,
        }
        assert {name: run.results[f"{side}/{name}"] for name in want} == pytest.approx(want, rel=1e-3, abs=1e-4)
    assert {name.split("/")[1] for name in run.results if name.startswith("after/")} == {*ANSWER_STATS}
    assert all(title in printed for title in ANSWER_STATS.values())
    unit = torch.tensor(gold[0]).double().std().item()
    gains = [(y - x) / unit for x, y in zip(*gold, strict=True)]
    assert run.results["gain/gold"] == pytest.approx(sum(gains) / 5, abs=1e-6)
    assert json.loads((run.out / "results.json").read_text()) == run.results
    lines = [json.loads(line) for line in open(run.out / "samples.jsonl")]
    assert [(x["step"], x["prompt"], x["before"], x["after"]) for x in lines] == [
        (1, x.prompt_text, x.response_texts[0], y.response_texts[0]) for x, y in zip(*seen, strict=True)
    ]


@pytest.mark.parametrize("reward", ["rm", "gold"])
def test_no_answers_before_and_after(reward, world, go):
    """--eval-prompts 0 is allowed: the run ends without a table."""
    run = go(**CHEAP | {"eval_prompts": 0, "reward": f"{world}/rm" if reward == "rm" else "gold"})
    assert (run.out / "results.json").exists() and (run.out / "model.safetensors").exists()


@pytest.mark.slow
def test_what_a_run_leaves(world, go, whole, monkeypatch):
    """Files; the curves of a run with a critic and of one without."""
    monkeypatch.undo()
    for flags in ({}, CHEAP):
        run = go(max_steps=2, **flags)
        names = {path.name for path in run.out.iterdir()}
        assert names >= {"args.json", "environment.json", "train_ppo.py", "metrics.jsonl", "samples.jsonl"}
        assert names >= {"config.json", "model.safetensors", "tokenizer.json", "results.json"}
        assert "checkpoint" in names  # a finished run can be extended
        for name in ("curves.png", "reward_kl.png"):
            assert (run.out / name).read_bytes()[:4] == b"\x89PNG" and (run.out / name).stat().st_size > 5000
        panels = {name for names in train_ppo.PANELS.values() for name in names}
        assert panels - {*run.metrics[0]} == (set() if flags == {} else {"val/explained_variance"})


@pytest.mark.slow
@pytest.mark.parametrize("advantage", train_ppo.AVERAGES)
def test_it_learns(advantage, go):
    """Shorter answers, which is easy to learn: a reward of minus the length in tokens."""
    flags = {"advantage": advantage, "max_steps": 25, "k": 4, "batch_size": 8, "value_init": "zero", "kl_coef": 0.0}
    rows = go(**flags | {"reward": "test_ppo:brevity", "ref": None, "lr": 3e-3, "critic_lr": 3e-3}).metrics
    assert rows[-1]["length"] < rows[0]["length"] - 1.5


def brevity(prompts, responses, rows):
    return [-len(y.split()) / 3 for y in responses]


# ------------------------------------------------------------------------------------------------------------ adapters


def test_the_reference_of_adapters_is_the_policy_without_them(world, go):
    """In the first rollout both are the same to the bit; in the second the reference is still the starting model, and
    so is what answers before. Of the policy adapters alone are trained and kept."""
    run = go(ref=None, lora_rank=2, max_steps=2, kl_estimator="exact")
    first, second = run.rollouts
    assert torch.equal(first.logps, first.ref_logps) and run.metrics[0]["objective/kl"] == 0
    rows = Rows(second.examples)
    with torch.no_grad():
        logits = load(world / "model")(rows.ids, attention_mask=rows.attention).logits[:, :-1]
    start = logits.log_softmax(-1).gather(2, rows.ids[:, 1:, None])[..., 0][rows.mask[:, 1:]]
    assert (second.ref_logps - start).abs().max() < 1e-4 < (second.ref_logps - second.logps).abs().max()
    assert run.results["before/kl"] == 0 and run.results["after/kl"] != 0
    for before, after in itertools.pairwise(x.policy for x in run.updates):
        moved = {name for name in before if not torch.equal(before[name], after[name])}
        assert moved and all("lora_" in name for name in moved)
    assert (run.out / "adapter_model.safetensors").exists() and not (run.out / "model.safetensors").exists()


def test_adapters_merged_and_alone_are_one_policy(world, go):
    alone, merged = (go(lora_rank=2, lora_merge=merge, advantage="rloo") for merge in (False, True))
    assert alone.metrics[0] == pytest.approx(
        merged.metrics[0] | {k: x for k, x in alone.metrics[0].items() if "perf" in k}
    )
    mine, theirs, start = (
        models.load_model(str(x), "cpu").state_dict() for x in (alone.out, merged.out, world / "model")
    )
    assert all(torch.allclose(mine[name], theirs[name], atol=1e-6) for name in theirs)
    moved = {name for name in theirs if not torch.equal(theirs[name], start[name])}
    assert len(moved) == 14 and all("_proj" in name for name in moved)  # 7 products in each of 2 layers


@pytest.mark.parametrize("advantage", ["rloo", pytest.param("gae", marks=pytest.mark.slow)])
def test_adapters_go_on_bit_for_bit(advantage, world, tmp_path):
    a = arguments(world, tmp_path / "run", ref=None, lora_rank=2, lora_merge=True, advantage=advantage)
    train(dataclasses.replace(a, out=str(tmp_path / "straight")))
    with pytest.raises(Killed):
        stopped(a, kill)
    [checkpoint] = (tmp_path / "run" / "checkpoint").iterdir()
    assert all("lora_" in name for name in torch.load(checkpoint / "state.pt")["model"])
    train(dataclasses.replace(a, resume=True))
    assert_same(tmp_path / "run", tmp_path / "straight")
    assert equal(*(torch.load(tmp_path / x / "last.pt") for x in ("run", "straight")))


# -------------------------------------------------------------------------------------------------- stop and go on

STOPPED_AT, SAVED_AT, STEPS = 3, 2, 4


def arguments(world: Path, out: Path, **changes) -> train_ppo.Args:
    """4 rollouts in two epochs, with a critic, a coefficient that adapts, and PTX."""
    flags = {"max_steps": STEPS, "save_every": SAVED_AT, "kl_target": 0.5, "k": 2, "max_new_tokens": 4, "lr": 3e-3}
    flags |= {"batch_size": 6, "epochs_per_rollout": 1}
    return small(world, out, **flags | {"ptx_coef": 0.1, "ptx_data": f"{world}/pairs.jsonl"} | changes)


def train(a: train_ppo.Args) -> None:
    """Runs, and keeps the checkpoint of the last step."""

    def save(self, step, state, save=Run.save_checkpoint):
        save(self, step, state)
        if step == STEPS:
            torch.save(state, self.out / "last.pt")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(report, "curves", lambda out, panels: None)
        patch.setattr(report, "reward_kl_plot", lambda out: None)
        patch.setattr(Run, "save_checkpoint", save)
        train_ppo.main(a)


def equal(x, y) -> bool:
    if isinstance(x, dict):
        return x.keys() == y.keys() and all(equal(x[name], y[name]) for name in x)
    if isinstance(x, list | tuple):
        return len(x) == len(y) and all(map(equal, x, y))
    return torch.equal(x, y) if isinstance(x, torch.Tensor) else x == y


def assert_same_run(out: Path, straight: Path) -> None:
    """Metrics, samples, results and weights; and critic, optimizers and coefficient at the end."""
    assert_same(out, straight)
    mine, theirs = (torch.load(folder / "last.pt") for folder in (out, straight))
    assert {*theirs} == {"step", "kl_coef", "model", "optimizer", "critic", "critic_optimizer"}
    assert {name for name in theirs if not equal(mine[name], theirs[name])} == set()


@pytest.fixture(scope="module")
def straight(world):
    """The folder of the run that was never stopped."""
    train(arguments(world, world / "straight"))
    coefficients = [row["kl_coef"] for row in contents(world / "straight")["metrics"]]
    assert len({*coefficients}) == STEPS  # something to lose
    return world / "straight"


def stopped(a: train_ppo.Args, how) -> None:
    """Runs until the row of a step is written, where `how` happens."""

    def log(self, step, metrics, log=Run.log):
        log(self, step, metrics)
        if step == STOPPED_AT:
            how()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Run, "log", log)
        train(a)


class Killed(Exception):
    pass


def kill():
    raise Killed


@pytest.mark.parametrize("how", ["SIGTERM", "killed"])
def test_stopped_and_continued_is_the_same_run(how, world, straight, tmp_path, capfd):
    """After the third step, the first of an epoch: a signal lets it be saved, else it goes on from the second."""
    a = arguments(world, tmp_path / "run")
    if how == "SIGTERM":
        with pytest.raises(SystemExit) as left:
            stopped(a, lambda: os.kill(os.getpid(), signal.SIGTERM))
        assert left.value.code == 143 and f"stopped after step {STOPPED_AT};" in capfd.readouterr().out
    else:
        with pytest.raises(Killed):
            stopped(a, kill)
    [checkpoint] = (tmp_path / "run" / "checkpoint").iterdir()
    assert checkpoint.name == ("step-3" if how == "SIGTERM" else "step-2")
    train(dataclasses.replace(a, resume=True))
    assert_same_run(tmp_path / "run", straight)


@pytest.mark.slow
@pytest.mark.parametrize("what", ["kl_coef", "critic"])
def test_what_a_checkpoint_lacked_would_show(what, world, straight, tmp_path, monkeypatch):
    """The test above can fail: were the coefficient forgotten, or the critic, the runs would differ."""
    a = arguments(world, tmp_path / "run")
    with pytest.raises(Killed):
        stopped(a, kill)
    fresh = {"kl_coef": 0.3, "critic": load_rm(world / "rm").state_dict()}
    load_checkpoint = Run.load_checkpoint
    monkeypatch.setattr(
        Run, "load_checkpoint", lambda self, **parts: load_checkpoint(self, **parts) | {what: fresh[what]}
    )
    train(dataclasses.replace(a, resume=True))
    assert contents(tmp_path / "run")["metrics"] != contents(straight)["metrics"]


@pytest.mark.slow
@pytest.mark.parametrize("where", ["sample", "answer", "save", "finish"])
def test_stopped_elsewhere(where, world, straight, tmp_path, monkeypatch):
    """While the second rollout is sampled, before any checkpoint; and at each place after the last step."""
    a = arguments(world, tmp_path / "run", save_every=SAVED_AT)
    places = {"sample": (train_ppo, "answer"), "answer": (report, "answer"), "save": (models, "save")}
    owner, name = places.get(where, (Run, "finish"))
    own, calls = getattr(owner, name), []

    def stop(*args, **kwargs):
        calls.append(1)
        if where != "sample" or len(calls) == 2:
            raise Killed
        return own(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(owner, name, stop)
        with pytest.raises(Killed):
            train(a)
    assert (tmp_path / "run" / "checkpoint").exists() == (where != "sample")
    if where == "sample":
        train(dataclasses.replace(a, resume=True))
    else:  # the last step is done, and its checkpoint was kept
        train_ppo.main(dataclasses.replace(a, resume=True))
    assert_same_run(tmp_path / "run", straight)


@pytest.mark.slow
@pytest.mark.parametrize("advantage", ["rloo", "remax"])
def test_methods_without_a_critic_go_on_too(advantage, world, tmp_path):
    a = arguments(world, tmp_path / "run", advantage=advantage)
    train_ppo.main(dataclasses.replace(a, out=str(tmp_path / "straight")))
    with pytest.raises(Killed):
        stopped(a, kill)
    train_ppo.main(dataclasses.replace(a, resume=True))
    assert_same(tmp_path / "run", tmp_path / "straight")


def stand_still(flags: list[str], step: int, printed: Path) -> None:
    """In another process: train_ppo.py, which waits for a signal once the row of `step` is in metrics.jsonl."""
    for stream in (1, 2):
        os.dup2(os.open(printed, os.O_CREAT | os.O_WRONLY | os.O_APPEND), stream)
    log = Run.log

    def log_and_wait(self, at, metrics):
        log(self, at, metrics)
        while at == step and not self.interrupted:
            time.sleep(0.005)

    Run.log = log_and_wait
    report.curves, report.reward_kl_plot = lambda out, panels: None, lambda out: None
    sys.argv = ["train_ppo.py", *flags]
    runs.cli(train_ppo.main, train_ppo.Args)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL], ids=lambda n: n.name)
def test_a_process_that_is_killed_goes_on(number, world, straight, server, tmp_path):  # noqa: F811
    a, printed = arguments(world, tmp_path / "run"), tmp_path / "printed"
    process = server.Process(target=stand_still, args=(flags_of(a), STOPPED_AT, printed))
    process.start()
    try:
        wait_for(lambda: logged(tmp_path / "run", STOPPED_AT) or not process.is_alive())
        assert process.is_alive(), printed.read_text()
        os.kill(process.pid, number)
        process.join(60)
    finally:
        process.kill()
        process.join()
    [checkpoint] = (tmp_path / "run" / "checkpoint").iterdir()
    if number == signal.SIGKILL:
        assert process.exitcode == -number and checkpoint.name == "step-2"
    else:
        assert process.exitcode == 128 + number and checkpoint.name == "step-3"
        assert "Traceback" not in printed.read_text()
    train(dataclasses.replace(a, resume=True))
    assert_same_run(tmp_path / "run", straight)


def test_a_run_is_not_overwritten_and_other_flags_are_refused(world, straight, tmp_path):
    before = contents(straight)
    with pytest.raises(BadInput, match="already holds a run"):
        train_ppo.main(arguments(world, straight))
    with pytest.raises(BadInput, match="is complete"):
        train_ppo.main(arguments(world, straight, resume=True))
    with pytest.raises(BadInput, match="holds no run to continue"):
        train_ppo.main(arguments(world, tmp_path / "none", resume=True))
    assert contents(straight) == before
    a = small(world, tmp_path / "run", **CHEAP | {"max_steps": STOPPED_AT + 1})
    with pytest.raises(Killed):
        stopped(a, kill)
    with pytest.raises(BadInput) as error:
        train_ppo.main(dataclasses.replace(a, resume=True, advantage="remax", seed=3))
    assert "--advantage reinforce++ -> remax" in str(error.value) and "--seed 0 -> 3" in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.slow
def test_on_policy_distillation(own, world, go):
    """A reward of 0 and the exact KL to a teacher in the loss: the answers that the student samples come to be the
    teacher's. recipes/distil.py has the command."""
    own.fail = lambda prompts, responses, found: [0.0] * len(found)
    run = go(
        reward="own_reward:reward",
        advantage="rloo",
        kl_in="loss",
        kl_coef=1.0,
        kl_estimator="exact",
        epochs_per_rollout=1,
        batch_size=12,
        max_steps=60,
    )
    teacher, batching = load(world / "other"), scoring.Batching("padded", 0)
    distances = []
    for policy, rollout in ((load(world / "model"), run.rollouts[0]), (load(run.out), run.rollouts[-1])):
        with torch.no_grad():
            exact = lambda batch, policy=policy: scoring.exact_kl(policy, teacher, batch)  # noqa: E731
            distances.append(scoring.per_token(exact, rollout.examples, batching).mean().item())
    assert distances[0] > 0.1 and distances[1] < 0.2 * distances[0]
