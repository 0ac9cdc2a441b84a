"""Time one step of GRPO and of RLOO: train_ppo.py and TRL's trainers for these methods.

    python -m benchmarks.rl_step [--model DIR] [--quick]

Both sides have the same model, prompts, k, lengths, optimizer and optimizer steps per rollout, in float32, and save and
log nothing. Our micro-batches are the script's default; TRL's have `--rows` sequences, with one run for each number.
Both sides run their whole loop: `train_ppo.main`, and the trainer's `train`. Both sample. Then the sampled answers are
replaced by given ones, the same for both sides; at least one has the maximum length. So both sides score and update on
the same tokens, and their log-probs and first gradients must agree before any timing.
Phases: rollout (sampling), scoring (log-probs of policy and reference, rewards, advantages), update (all the rest).
"""

import random
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

from benchmarks import compare, watch
from support import generate, models
from support.examples import Example

PHASES = ("rollout", "scoring", "update")
METHODS = {  # our flags, and TRL's settings
    "grpo": (
        {"kl_in": "loss", "kl_estimator": "k3"},
        {"loss_type": "grpo", "use_bias_correction_kl": False, "scale_rewards": "group"},
    ),
    "rloo": ({"kl_in": "reward", "kl_estimator": "k1"}, {"normalize_advantages": False}),
}
KL_COEF, LR, EPSILON = 0.05, 1e-6, 1e-5


@dataclass
class Args:
    model: str | None = None
    """local model; default: a random Llama of 9 M parameters"""
    prompts: int = 8
    """prompts in a rollout"""
    k: int = 4
    """answers to each prompt"""
    longest_prompt: int = 192
    """tokens of the longest possible prompt; the shortest has a quarter of that"""
    longest_answer: int = 96
    """tokens of the longest answer; the shortest possible one has an eighth of that"""
    rows: tuple[int, ...] = (4, 16)
    """sequences in TRL's micro-batches"""
    rounds: int = 2
    """number of processes per side"""
    quick: bool = False
    """a short run"""


def reward(prompts, responses, rows) -> list[float]:
    return [float(len(text) % 7) for text in responses]


def ours(job: dict) -> dict:
    """Run train_ppo.main on the job and watch it from outside."""
    import train_ppo

    given = {compare.key(prompt): answers for prompt, answers in zip(job["prompts"], job["answers"], strict=True)}
    examples = [
        Example(f"prompt {i}", ids, [], f"prompt {i}", [], [], row={"prompt": f"prompt {i}"})
        for i, ids in enumerate(job["prompts"])
    ]
    sample, update, phases, sampled = generate.generate, train_ppo.update, [], []

    def watched_generate(model, tokenizer, prompts, *args, **kwargs):
        began = time.perf_counter()
        sample(model, tokenizer, prompts, *args, **kwargs)
        sampled.append(time.perf_counter())
        phases.append({"rollout": sampled[-1] - began})
        answers = [answer for prompt in prompts for answer in given[compare.key(prompt)]]
        return answers, [[0.0] * len(answer) for answer in answers]  # nobody sampled them, so `guard` is left out

    def watched_update(a, policy, reference, critic, rollout, *args, **kwargs):
        phases[-1].setdefault("scoring", time.perf_counter() - sampled[-1])
        if watched["steps"].first():
            rows = [compare.key(e.prompt + answer) for e in rollout.examples for answer in e.responses]
            lengths = [len(answer) for e in rollout.examples for answer in e.responses]
            sums = [x.double().sum().item() for x in rollout.logps.split(lengths)]
            watched["steps"].results["logps"] = dict(zip(rows, sums, strict=True))
        return update(a, policy, reference, critic, rollout, *args, **kwargs)

    flags = {
        "advantage": job["method"], "model": job["model"], "reward": "benchmarks.rl_step:reward", "k": job["k"],
        "batch_size": len(examples), "max_new_tokens": job["tokens"], "kl_coef": KL_COEF, "lr": LR,
        "adam_eps": EPSILON, "epochs_per_rollout": job["epochs"], "minibatches": job["minibatches"],
        "max_steps": job["rollouts"], "eval_fraction": 0.0, "eval_prompts": 0, "device": "cpu",
    }  # fmt: skip
    with (
        tempfile.TemporaryDirectory() as folder,
        mock.patch.multiple(train_ppo, load=lambda *_: examples, update=watched_update, guard=lambda *_: None),
        mock.patch.object(generate, "generate", watched_generate),
        watch.script() as watched,
    ):
        train_ppo.main(train_ppo.Args(out=str(Path(folder, "run")), **METHODS[job["method"]][0], **flags))
    return with_phases(watched["steps"].results, phases)


def with_phases(results: dict, phases: list[dict[str, float]]) -> dict:
    """The results of `watch.Steps`, by rollout: time that is neither rollout nor scoring is update."""
    updates = len(results["seconds"]) // len(phases)
    for i, phase in enumerate(phases):
        steps = slice(i * updates, (i + 1) * updates)
        phase["update"] = sum(results["seconds"][steps]) - phase["rollout"] - phase["scoring"]
        phase["cpu"] = sum(results["cpu"][steps])
    return {"rollouts": phases, "logps": results["logps"], "norm": results["norms"][0], "peak": results["peak"]}


def trl(job: dict, rows: int = 4) -> dict:
    """Run TRL's trainer on the job with `rows` sequences per micro-batch, and watch it from outside."""
    import datasets
    import trl

    base, config = {"grpo": (trl.GRPOTrainer, trl.GRPOConfig), "rloo": (trl.RLOOTrainer, trl.RLOOConfig)}[job["method"]]
    given = {compare.key(prompt): answers for prompt, answers in zip(job["prompts"], job["answers"], strict=True)}
    phases: list[dict[str, float]] = []

    class Watched(base):
        def _tokenize_prompts(self, prompts):
            return [job["prompts"][int(prompt)] for prompt in prompts], None, {}

        def _generate_single_turn(self, prompt_ids, *args):
            began = time.perf_counter()
            out = super()._generate_single_turn(prompt_ids, *args)
            phases.append({"rollout": time.perf_counter() - began})
            answers = [given[compare.key(ids)][i % job["k"]] for i, ids in enumerate(prompt_ids)]
            return (answers, None) if isinstance(out, tuple) else answers

        def _generate_and_score_completions(self, inputs):
            began = time.perf_counter()
            out = super()._generate_and_score_completions(inputs)
            phases[-1]["scoring"] = time.perf_counter() - began - phases[-1]["rollout"]
            return out

    b, minibatches = len(job["prompts"]) * job["k"], job["minibatches"]
    with tempfile.TemporaryDirectory() as folder:
        settings = config(
            output_dir=folder, per_device_train_batch_size=rows, gradient_accumulation_steps=b // minibatches // rows,
            steps_per_generation=b // rows, num_iterations=job["epochs"], num_generations=job["k"],
            max_steps=job["rollouts"] * job["epochs"] * minibatches, max_completion_length=job["tokens"],
            beta=KL_COEF, learning_rate=LR, adam_epsilon=EPSILON, weight_decay=0.0, max_grad_norm=1.0,
            shuffle_dataset=False, gradient_checkpointing=False, bf16=False, use_cpu=True, report_to="none",
            logging_strategy="no", save_strategy="no", disable_tqdm=True, model_init_kwargs={"dtype": "float32"},
            **METHODS[job["method"]][1],
        )  # fmt: skip
        trainer = Watched(
            model=job["model"], reward_funcs=lambda completions, **_: reward(None, completions, None), args=settings,
            train_dataset=datasets.Dataset.from_dict({"prompt": [str(i) for i in range(len(job["prompts"]))]}),
            processing_class=models.load_tokenizer(job["model"]),
        )  # fmt: skip
        return with_phases(watch.trainer(trainer), phases)


def make_job(a: Args, model: str, method: str) -> dict:
    rng = random.Random(0)
    ids = lambda n: compare.random_ids(model, rng, n)  # noqa: E731
    prompts = [ids(rng.randint(a.longest_prompt // 4, a.longest_prompt)) for _ in range(a.prompts)]
    answers = [[ids(rng.randint(a.longest_answer // 8, a.longest_answer)) for _ in range(a.k)] for _ in prompts]
    answers[0][0] = ids(a.longest_answer)
    return {
        "model": model, "method": method, "prompts": prompts, "answers": answers, "k": a.k, "tokens": a.longest_answer,
        "rollouts": 2, "epochs": 1, "minibatches": 1,
    }  # fmt: skip


def summary(runs: list[dict]) -> dict[str, float]:
    """Medians in seconds over the steps of all runs, without each run's first step; median of the peaks in MiB."""
    steps = [step for run in runs for step in run["rollouts"][1:] or run["rollouts"]]
    medians = {phase: compare.median(steps, phase) for phase in PHASES}
    medians["scoring + update"] = compare.median(steps, *PHASES[1:])
    medians["step"], medians["step, cpu"] = compare.median(steps, *PHASES), compare.median(steps, "cpu")
    return medians | {"rollout share": medians["rollout"] / medians["step"], "peak MiB": compare.median(runs, "peak")}


def main(a: Args) -> None:
    if a.quick:
        a.prompts, a.k, a.longest_prompt, a.longest_answer, a.rounds, a.rows = 4, 4, 64, 32, 1, (4,)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        model = a.model or compare.small_model(folder)
        for method in METHODS:
            job = make_job(a, model, method)
            sides = ["ours", *(f"trl {n}" for n in a.rows)]
            first = compare.in_turn("rl_step", sides[:2], job | {"rollouts": 1}, 1)
            mine, theirs = first["ours"][0], first[sides[1]][0]
            compare.require_parity("summed log-probs", compare.largest_gap(mine["logps"], theirs["logps"]), 1e-3)
            compare.require_parity("gradient norms", abs(mine["norm"] / theirs["norm"] - 1), 1e-4)
            for epochs, minibatches in ((1, 1), (2, 2)):
                updates = {"epochs": epochs, "minibatches": minibatches}
                medians = {x: summary(y) for x, y in compare.in_turn("rl_step", sides, job | updates, a.rounds).items()}
                for side, x in medians.items():
                    over = {f"ours: {n}": medians["ours"][n] / x[n] for n in ("scoring + update", "step", "peak MiB")}
                    rows.append({"method": method, "updates": str(epochs * minibatches), "side": side, **x, **over})
    compare.report("rl_step", rows, a.quick)


if __name__ == "__main__":
    compare.cli(main, Args, {"ours": ours, **{f"trl {n}": lambda job, n=n: trl(job, n) for n in (2, 4, 8, 16, 32)}})
