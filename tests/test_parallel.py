"""Two or three gloo processes on a CPU give what one gives: losses, gradient norms, evaluations, weights, answers."""

import contextlib
import hashlib
import io
import json
import multiprocessing
import os
import pickle
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from unittest import mock

import pytest
import torch
import transformers
from safetensors.torch import load_file
from test_resume import LOADED_LATE, flags_of, pairs, wait_for, write_model, write_rows
from tiny import ARCHITECTURES, tiny

import evaluate
import train_dpo
import train_ppo
import train_rm
import train_sft
from rlhf import BadInput
from support import models, parallel, reviews, runs, sharding

HERE = Path(__file__).parent
SCRIPTS = {"sft": train_sft, "dpo": train_dpo, "rm": train_rm, "ppo": train_ppo}
SAVED_AT, DIES_AT = 5, 7


@pytest.fixture(scope="module")
def server():
    """Processes that begin with everything imported; on one thread, as torchrun starts them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join([str(HERE), str(HERE.parent)]))
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(
            [__name__, *LOADED_LATE, "torch.distributed.fsdp", "torch.distributed.checkpoint", "matplotlib.figure"]
        )
        yield context


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """The folder of a small model, 22 pairs to train on and 5 held out; for PPO a model whose answers end now and then,
    another one, a reward model and 17 prompts."""
    folder, tokenizer = tmp_path_factory.mktemp("world"), reviews.tokenizer()
    write_model(folder / "model")
    for seed, name in enumerate(("policy", "other")):
        model = models.load_model(str(write_model(folder / name, seed)), "cpu")
        with torch.no_grad():
            model.get_input_embeddings().weight[tokenizer.eos_token_id] *= 9 - 4 * seed
        models.save(model, tokenizer, folder / name)
    reward = models.new_reward_model(model, tokenizer)
    reward.config.reward_mean, reward.config.reward_std = 0.75, 1.0
    models.save(reward, tokenizer, folder / "reward")
    tokenizer.add_tokens("another")
    models.save(reward, tokenizer, folder / "retold")
    write_rows(folder / "prompts.jsonl", [{"prompt": p} for p in dict.fromkeys(reviews.prompts(20, 0))])
    write_rows(folder / "train.jsonl", pairs(22))
    write_rows(folder / "held.jsonl", pairs(5, seed=1))
    return folder


SHORT = {"max_steps": 3, "eval_prompts": 1}  # rollouts
ONE = SHORT | {"max_steps": 1}


def arguments(world: Path, out: Path, name: str, **changes):
    """8 steps in 2 epochs of 7, 7, 7 and 1 pairs: in the last, one of two processes has none. A process has up to three
    micro-batches of a step."""
    script, *loss = name.split()
    changes = {flag: x.replace("WORLD", str(world)) if isinstance(x, str) else x for flag, x in changes.items()}
    if script == "ppo":
        return train_ppo.Args(**rollouts(world, out) | {"advantage": loss[0]} | changes)
    flags = {"model": f"{world}/model", "data": f"{world}/train.jsonl", "eval_data": f"{world}/held.jsonl"}
    flags |= {"out": str(out), "device": "cpu", "lr": 3e-3, "batch_size": 7, "epochs": 2, "micro_batch_tokens": 60}
    flags |= {"eval_every": 4, "save_every": SAVED_AT, "eval_prompts": 3, "max_new_tokens": 4, "max_grad_norm": 0.5}
    if script == "dpo":
        flags |= {"loss": loss[0], "ref_cache": f"{out}-cache"}
    if script == "rm":
        flags |= {"loss": loss[0]}
    return SCRIPTS[script].Args(**flags | changes)


def rollouts(world: Path, out: Path) -> dict:
    """8 rollouts of 5 prompts with 3 answers each, in minibatches of 3 and 2 prompts: of three processes one has none
    of the latter."""
    flags = {"model": f"{world}/policy", "ref": f"{world}/other", "reward": f"{world}/reward", "out": str(out)}
    flags |= {"data": f"{world}/prompts.jsonl", "eval_fraction": 0.2, "device": "cpu", "lr": 3e-3, "critic_lr": 3e-3}
    flags |= {"batch_size": 5, "k": 3, "max_steps": 8, "epochs_per_rollout": 1, "minibatches": 2, "eval_prompts": 2}
    flags |= {"max_new_tokens": 6, "micro_batch_tokens": 60, "kl_coef": 0.3, "kl_target": 0.5, "save_every": SAVED_AT}
    return flags


def costly(prompts, responses, rows):
    """A reward that must not be asked for by more than one process: what it gives depends on the calls before."""
    costly.calls = getattr(costly, "calls", 0) + 1
    assert parallel.is_main()
    return [costly.calls + len(y) / 10 for y in responses]


def member(environment: dict, name: str, flags: list[str], action: str, printed: Path) -> None:
    """One process of a job: what torchrun sets, then the command."""
    os.environ |= environment
    torch.set_num_threads(1)
    last = environment["RANK"] != "0"
    progress, save = runs.Run.progress, runs.Run.save_checkpoint

    def count(self, step, state):
        parts = [state["model"], *state["optimizer"]["state"].values()]
        shares = {id(x.to_local().untyped_storage()): x.to_local() for part in parts for x in part.values() if x.dim()}
        print("\nnumbers:", sum(x.numel() for x in shares.values()), file=sys.stderr)
        save(self, step, state)

    if action == "no room":  # for the whole policy while it samples
        sharding.gathered = lambda model, dtype: contextlib.nullcontext()
    if action == "count":
        runs.Run.save_checkpoint = count

    def act(self, step, **shown):
        if step == DIES_AT and last and action == "die":
            os.kill(os.getpid(), signal.SIGKILL)
        if step == DIES_AT and last and action == "stop":
            os.kill(os.getpid(), signal.SIGTERM)
        progress(self, step, **shown)

    runs.Run.progress = act
    with open(printed, "w") as f, contextlib.redirect_stdout(f), contextlib.redirect_stderr(f):
        sys.argv = [name, *flags]
        runs.cli(SCRIPTS[name].main, SCRIPTS[name].Args)


@pytest.fixture
def job(server, tmp_path):
    """Runs a script in n processes, or in this one; gives the exit codes and what each process printed."""

    def start(a, n: int, action: str = "") -> tuple[list[int], list[str]]:
        [name] = [name for name, script in SCRIPTS.items() if isinstance(a, script.Args)]
        with socket.socket() as free:
            free.bind(("localhost", 0))
            port = free.getsockname()[1]
        processes, printed = [], [tmp_path / f"printed{rank}" for rank in range(n)]
        for rank in range(n):
            environment = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": n, "LOCAL_WORLD_SIZE": n}
            environment |= {"MASTER_ADDR": "localhost", "MASTER_PORT": port}
            environment = {key: str(value) for key, value in environment.items()}
            process = server.Process(target=member, args=(environment, name, flags_of(a), action, printed[rank]))
            process.start()
            processes.append(process)
        end = time.monotonic() + 240  # compilation is slow on a busy machine
        try:
            processes[0].join(max(0, end - time.monotonic()))
            for process in processes[1:]:
                if processes[0].exitcode == 2:  # as torchrun does where one ends with an error
                    process.terminate()
                process.join(max(0, end - time.monotonic()))
        finally:
            for process in processes:
                process.kill()
                process.join()
        return [process.exitcode for process in processes], [path.read_text() for path in printed]

    return start


@pytest.fixture(scope="module")
def alone(world, tmp_path_factory):
    """The folder of a finished run in one process, once for each name."""
    found = {}

    def run(name: str, **changes) -> Path:
        key = f"{name} {changes}"
        if key not in found:
            found[key] = tmp_path_factory.mktemp("alone") / "run"
            with contextlib.redirect_stdout(io.StringIO()):
                SCRIPTS[name.split()[0]].main(arguments(world, found[key], name, **changes))
        return found[key]

    return run


def assert_same(out: Path, other: Path, weights: float = 1e-5, numbers: float = 1e-5) -> None:
    """Weights to a relative L2 norm, numbers to a relative error (where they are rounding around 0, absolute)."""
    mine, theirs = (load_file(path) for folder in (out, other) for path in folder.glob("*model.safetensors"))
    assert mine.keys() == theirs.keys()
    flat = [torch.cat([x[name].double().flatten() for name in sorted(x)]) for x in (mine, theirs)]
    assert (flat[0] - flat[1]).norm() <= weights * flat[1].norm()
    rows = [
        [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()] for folder in (out, other)
    ]
    assert [[*row] for row in rows[0]] == [[*row] for row in rows[1]]
    for mine, theirs in zip(*rows, strict=True):
        expected = {name: value for name, value in theirs.items() if not name.startswith("perf/")}
        assert {name: mine[name] for name in expected} == pytest.approx(expected, rel=numbers, abs=numbers)
    samples = [[json.loads(line) for line in open(folder / "samples.jsonl")] for folder in (out, other)]
    for mine, theirs in zip(*samples, strict=True):
        assert mine == {k: x if isinstance(x, str) else pytest.approx(x, numbers, numbers) for k, x in theirs.items()}
    results = [json.loads((folder / "results.json").read_text()) for folder in (out, other)]
    assert results[0] == pytest.approx(results[1], rel=numbers, abs=numbers)
    assert {path.name for path in out.iterdir()} == {path.name for path in other.iterdir()}


@pytest.mark.parametrize(
    "name, n, changes",
    [
        ("sft", 2, {}),
        ("dpo dpo", 2, {}),
        pytest.param("rm pairwise", 2, {}, marks=pytest.mark.slow),
        pytest.param("sft", 2, {"lora_rank": 2, "lora_merge": True}, marks=pytest.mark.slow),
        pytest.param("dpo dpo", 2, {"lora_rank": 2}, marks=pytest.mark.slow),
        pytest.param("rm pairwise", 2, {"lora_rank": 2}, marks=pytest.mark.slow),
        pytest.param("dpo kto", 3, {}, marks=pytest.mark.slow),
        pytest.param("dpo bco", 2, {"layout": "padded"}, marks=pytest.mark.slow),
        pytest.param("dpo simpo", 2, {"gradient_checkpointing": True}, marks=pytest.mark.slow),
        pytest.param("dpo dpo", 2, {"compile": True}, marks=pytest.mark.slow),
        pytest.param("dpo plackett_luce", 3, {"ref": "WORLD/other"}, marks=pytest.mark.slow),
        ("ppo gae", 2, SHORT),
        pytest.param(
            "ppo remax",
            3,
            SHORT | {"reward": "test_parallel:costly", "ptx_coef": 0.1, "ptx_data": "WORLD/train.jsonl"},
            marks=pytest.mark.slow,
        ),
        pytest.param(
            "ppo rloo",
            2,
            SHORT | {"kl_estimator": "exact", "kl_in": "loss", "entropy_coef": 0.01, "gradient_checkpointing": True},
            marks=pytest.mark.slow,
        ),
        pytest.param("ppo grpo", 2, SHORT | {"ref": None, "lora_rank": 2, "kl_in": "loss"}, marks=pytest.mark.slow),
        pytest.param(
            "ppo gae",
            2,
            ONE | {"reward": "WORLD/retold", "value_init": "policy", "kl_stop": 1e-3, "epochs_per_rollout": 2},
            marks=pytest.mark.slow,
        ),
    ],
)
def test_many_processes_give_what_one_gives(name, n, changes, world, alone, job, tmp_path):
    codes, printed = job(arguments(world, tmp_path / "run", name, **changes), n, "no room" if n == 3 else "")
    assert codes == [0] * n, printed
    assert "model is in" in printed[0] and not any(printed[1:])  # the first alone prints
    with mock.patch.object(train_ppo, "update", wraps=train_ppo.update) as update:
        assert_same(tmp_path / "run", alone(name, **changes))
    assert "kl_stop" not in changes or update.call_count == 2  # of 2 passes with 2 updates each the first alone
    load = models.load_reward_model if "rm" in name else models.load_model
    model = load(str(tmp_path / "run"), "cpu")
    assert type(model).__name__.startswith("LlamaFor") and next(model.parameters()).dtype == torch.float32


@pytest.mark.slow
def test_each_holds_its_share_of_weights_and_optimizer_state(world, job, tmp_path):
    """What docs/scaling.md counts on: together three numbers a parameter, and none much more than its part of them."""
    codes, printed = job(arguments(world, tmp_path / "run", "sft", max_steps=1, eval_prompts=0), 2, "count")
    assert codes == [0, 0], printed
    shares = [int(re.search(r"numbers: (\d+)", text)[1]) for text in printed]
    numbers = sum(x.numel() for x in load_file(tmp_path / "run" / "model.safetensors").values())
    assert sum(shares) == 3 * numbers and max(shares) < 0.51 * 3 * numbers


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gpt2", "gemma2", "qwen3", "mixtral"])
def test_other_architectures(name, world, job, tmp_path):
    """Tied heads, learnt positions, experts; and scores with a soft-cap, which the check for a layout stumbles over."""
    tokenizer, config = reviews.tokenizer(), ARCHITECTURES[name]()
    config.vocab_size, config.eos_token_id, config.bos_token_id = len(tokenizer), tokenizer.eos_token_id, None
    torch.manual_seed(0)
    models.save(transformers.AutoModelForCausalLM.from_config(config), tokenizer, tmp_path / "model")
    flags = {"model": str(tmp_path / "model"), "micro_batch_tokens": 100, "epochs": 1}
    codes, printed = job(arguments(world, tmp_path / "two", "sft", **flags), 2)
    assert codes == [0, 0], printed
    assert ("padded" if name == "gemma2" else "tree") + " layout" in printed[0]
    train_sft.main(arguments(world, tmp_path / "one", "sft", **flags))
    assert_same(tmp_path / "two", tmp_path / "one")


@pytest.mark.slow
@pytest.mark.parametrize("name, changes", [("sft", {}), ("rm pairwise", {"lora_rank": 2, "lr": 3e-4})])
def test_bfloat16_products_differ_by_its_rounding(name, changes, world, alone, job, tmp_path):
    changes = {"dtype": "bfloat16", **changes}
    codes, printed = job(arguments(world, tmp_path / "run", name, **changes), 2)
    assert codes == [0, 0], printed
    assert_same(tmp_path / "run", alone(name, **changes), weights=1e-2, numbers=3e-2)


@pytest.mark.parametrize(
    "name, before, after",
    [
        pytest.param(name, *n, marks=pytest.mark.slow)
        for name, numbers in {"dpo bco": ((2, 1), (2, 2), (2, 3), (3, 2)), "ppo gae": ((3, 1),)}.items()
        for n in numbers
    ],
)
def test_a_process_that_dies_ends_the_job_and_the_rest_goes_on_in_any_number(
    name, before, after, world, alone, job, tmp_path
):
    a = arguments(world, tmp_path / "run", name)
    codes, printed = job(a, before, "die")
    assert codes[1] == -signal.SIGKILL and all(codes), printed
    [checkpoint] = [path.name for path in (tmp_path / "run" / "checkpoint").iterdir()]
    assert checkpoint == f"step-{SAVED_AT}" and not (tmp_path / "run" / "results.json").exists()
    a.resume = True
    if after == 1:
        SCRIPTS[name.split()[0]].main(a)
    else:
        codes, printed = job(a, after)
        assert codes == [0] * after, printed
    assert_same(tmp_path / "run", alone(name))


@pytest.mark.parametrize(
    "name, changes",
    [
        ("sft", {}),
        pytest.param("ppo gae", {}, marks=pytest.mark.slow),
        pytest.param("rm pairwise", {"lora_rank": 2}, marks=pytest.mark.slow),
    ],
)
def test_what_one_process_began_two_finish(name, changes, world, alone, job, tmp_path, monkeypatch):
    a = arguments(world, tmp_path / "run", name, **changes)

    def log(self, step, metrics, log=runs.Run.log):
        if step == DIES_AT:
            raise KeyboardInterrupt
        log(self, step, metrics)

    with monkeypatch.context() as patch:
        patch.setattr(runs.Run, "log", log)
        with pytest.raises(KeyboardInterrupt):
            SCRIPTS[name.split()[0]].main(a)
    runs.unlock(tmp_path / "run")  # as the end of the process does
    assert (tmp_path / "run" / "checkpoint" / f"step-{SAVED_AT}" / "state.pt").exists()
    a.resume = True
    codes, printed = job(a, 2)
    assert codes == [0, 0], printed
    assert_same(tmp_path / "run", alone(name, **changes))


@pytest.mark.slow
def test_a_checkpoint_that_would_run_code_is_refused_by_all(world, job, tmp_path):
    class Code:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "made"),)

    a = arguments(world, tmp_path / "run", "sft")
    job(a, 2, "stop")
    path = tmp_path / "run" / "checkpoint" / f"step-{DIES_AT}" / ".metadata"
    path.write_bytes(pickle.dumps(Code()))
    a.resume = True
    codes, printed = job(a, 2)
    assert codes == [2, -signal.SIGTERM] and f"error: --resume: {path} is damaged or missing" in printed[0]
    (path.parent / "SHA256SUMS").unlink()  # as before there were checksums
    codes, printed = job(a, 2)
    assert codes == [2, -signal.SIGTERM] and not (tmp_path / "made").exists()
    assert printed[0].endswith(
        f"\nerror: --resume: {path} is no checkpoint's metadata, and is not loaded: it asks for posix.mkdir\n"
    )


@pytest.mark.slow
def test_a_signal_to_one_stops_all_after_the_same_step(world, alone, job, tmp_path):
    a = arguments(world, tmp_path / "run", "sft")
    codes, printed = job(a, 2, "stop")
    assert codes == [143, 143], printed
    assert f"stopped after step {DIES_AT}; the same command with --resume" in printed[0] and not printed[1]
    [folder] = (tmp_path / "run" / "checkpoint").iterdir()
    sums = dict(line.split("  ")[::-1] for line in (folder / "SHA256SUMS").read_text().splitlines())
    assert folder.name == f"step-{DIES_AT}" and sums.keys() == {".metadata", "__0_0.distcp", "__1_0.distcp"}
    assert all(hashlib.sha256((folder / name).read_bytes()).hexdigest() == digest for name, digest in sums.items())
    a.resume = True
    codes, printed = job(a, 2)
    assert codes == [0, 0], printed
    assert_same(tmp_path / "run", alone("sft"))


def test_what_they_cannot_load_is_refused_in_one_line_by_one(world, job, tmp_path):
    shutil.copytree(world / "reward", tmp_path / "damaged")
    (tmp_path / "damaged" / "model.safetensors").write_bytes(b"no weights")
    codes, printed = job(arguments(world, tmp_path / "run", "ppo gae", reward=f"{tmp_path}/damaged"), 2)
    assert codes == [2, -signal.SIGTERM]
    assert re.search(r"\nerror: --reward .*damaged: .*\n$", printed[0]) and not printed[1]


@pytest.mark.parametrize("flags", [{"optimizer_state": "8bit"}, {"gradient_dtype": "bfloat16", "dtype": "bfloat16"}])
def test_what_needs_a_single_process_is_refused_before_they_meet(flags, monkeypatch):
    runs.check(train_dpo.Args(device="cpu", **flags))
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(BadInput, match=f"--{[*flags][0].replace('_', '-')} .*single process"):
        runs.check(train_dpo.Args(device="cpu", **flags))


@pytest.mark.parametrize(
    "error, seconds", [(BadInput("mine"), [10]), (FloatingPointError("mine"), [10]), (OSError("mine"), [])]
)
def test_another_than_the_first_says_what_it_met_if_the_first_does_not_end_all(error, seconds, monkeypatch, capsys):
    waited, handlers = [], {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    monkeypatch.setattr(runs.time, "sleep", lambda s: waited.append((s, signal.getsignal(signal.SIGTERM))))
    try:
        for rank, said in (("1", "error (process 1): mine\n"), ("0", "error: mine\n")):
            monkeypatch.setenv("RANK", rank)
            assert runs._complain(error, 2) == 2 and capsys.readouterr().err == said
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    assert waited == [(s, signal.SIG_DFL) for s in seconds]


def test_a_script_for_one_process_refuses_to_be_one_of_many(tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(BadInput, match="evaluate.py works in one process only: run it without torchrun"):
        evaluate.main(evaluate.Args(models=[str(write_model(tmp_path / "model"))], device="cpu", reward="gold"))


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_layers_are_found(name):
    """Without them a model would be one unit, whole in every process for as long as it computes."""
    with torch.device("meta"):
        model = tiny(name)
    assert len(models.layers(model)) == model.config.num_hidden_layers


@pytest.mark.slow
def test_torchrun(world, alone, tmp_path):
    """The command of docs/scaling.md; one whose second process is killed ends with an error, and can be continued."""

    def torchrun(a, kill=False):
        command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "train_sft.py", *flags_of(a)]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1"}
        with open(tmp_path / "printed", "w") as f:
            process = subprocess.Popen(command, cwd=HERE.parent, env=environment, stdout=f, stderr=subprocess.STDOUT)
        if kill:
            wait_for(lambda: list(Path(a.out).glob("checkpoint/step-[0-9]")), 90)
            children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
            os.kill(int(children[1]), signal.SIGKILL)
        code = process.wait(90)
        return code, (tmp_path / "printed").read_text()

    a = arguments(world, tmp_path / "run", "sft", epochs=15, save_every=2, max_steps=40)
    code, printed = torchrun(a, kill=True)
    assert code == 1 and "Signal 9 (SIGKILL)" in printed, printed
    assert [path.name for path in (tmp_path / "run" / "checkpoint").iterdir() if "." not in path.name]
    assert not (tmp_path / "run" / "results.json").exists()
    a.resume = True
    code, printed = torchrun(a)
    assert code == 0 and printed.count("The model is in") == 1, printed
    assert_same(tmp_path / "run", alone("sft", epochs=15, save_every=2, max_steps=40))
