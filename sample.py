"""Sampling, phase 2a: several responses to each prompt, for people (or a reward model) to rank.

    python sample.py                                                      the embedded task: 4 answers a prompt
    python sample.py --model runs/sft --data prompts.jsonl --k 4 --temperature 0.9
    python sample.py --model runs/dpo --ref runs/sft                      with log-probs under a reference too

Every token is drawn from softmax(logits / temperature), all of it: no top-k, no top-p, no repetition penalty, whatever
the model's own generation settings say. `logps` are the responses' log-probs at temperature 1, whatever they were drawn
at. One row a prompt goes to samples.jsonl, which annotate.py ranks:

    {"prompt": ..., "responses": [k texts], "ended": [k], "logps": [k], "ref_logps": [k], "where": "prompts.jsonl:17"}
"""

import hashlib
import json
import os
import random
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

import torch
from tqdm import tqdm

import train_sft
from rlhf import BadInput, models, require, reviews
from rlhf.data import Example, build, longest, prompt_of, read_rows, show
from rlhf.generate import end_ids, generate
from rlhf.runs import check, cli, environment, interval, mean_interval, table

# --------------------------------------------------------------------------------------------------------------- flags

REVIEWS = 24_000  # prompts of the embedded task
DEFAULTS = {  # of flags that are None: for any model, and for the embedded task's small one
    "any": {"max_prompts": None, "batch_size": 16},
    "reviews": {"max_prompts": 4000, "batch_size": 128},
}


@dataclass
class Args:
    model: str = "runs/sft"
    """the model that answers: a run directory, a local folder or a hub id; runs/sft is made first if it is missing"""
    ref: str | None = None
    """another model with the same tokenizer, whose log-probs of the responses are written down too"""
    data: str = "reviews"
    """prompts: reviews (embedded), a .jsonl/.json/.csv/.parquet file (also .gz), a save_to_disk folder or a hub id;
    of other row forms the prompts are taken, each once"""
    split: str | None = None
    """split of a hub data set; default train"""
    skip_bad_rows: bool = False
    """drop and count rows that cannot be used instead of stopping at the first"""
    max_prompts: int | None = None
    """answer this many prompts, >= 1, drawn by --seed; default all (embedded: 4000)"""
    out: str = "runs/samples.jsonl"
    """the file of samples; one that is there is never overwritten"""

    k: int = 4
    """responses to each prompt, >= 1"""
    temperature: float = 1.0
    """> 0; the model's own distribution at 1, greedier below"""
    max_new_tokens: int = 128
    """tokens of a response at most, >= 1"""
    max_prompt_length: int = 512
    """tokens of a prompt, >= 1; longer ones lose their beginning"""
    batch_size: int | None = None
    """prompts sampled at once, >= 1: a killed run loses one batch; default 16 (embedded: 128)"""
    micro_batch_tokens: int = 4096
    """tokens of one forward pass that scores the responses, >= 1"""
    layout: Literal["auto", "tree", "padded"] = "auto"
    """how responses share a forward pass: tree encodes the prompt once; auto takes it where a check says it is right"""
    resume: bool = False
    """go on with --out, with the same flags: prompts that are there are skipped, and the others get the very responses
    that the run would have given them"""
    dry_run: bool = False
    """print the data report and three prompts token by token, and sample nothing"""
    device: str = "cuda" if torch.cuda.is_available() else "cpu"
    """torch device"""
    seed: int = 0
    """which prompts, and the sampling; the same seed, prompts and batch size give the same responses"""
    trust_remote_code: bool = False
    """run code that comes with a hub model"""


# ---------------------------------------------------------------------------------------------------------------- data


def read(a: Args, tokenizer) -> list[Example]:
    """The distinct prompts of --data, in its order, as token ids; prints what became of its rows."""
    if a.data == "reviews":
        rows, skipped = reviews.rows("prompts", REVIEWS), []
    else:
        rows, skipped = read_rows(a.data, a.split, a.skip_bad_rows)
    limits = (a.max_prompt_length, a.max_prompt_length + a.max_new_tokens)
    examples, report = build(rows, tokenizer, "prompts", *limits, a.skip_bad_rows, skipped)
    first = {e.prompt_text: i for i, e in reversed([*enumerate(examples)])}
    distinct = [examples[i] for i in sorted(first.values())]
    print(f"{a.data}\n{report}\n{len(distinct)} distinct prompts\n")
    chosen = range(len(distinct))
    if a.max_prompts and a.max_prompts < len(distinct):
        chosen = sorted(random.Random(a.seed).sample(chosen, a.max_prompts))
    return [distinct[i] for i in chosen]


def identity(prompt: str | list) -> str:
    """A prompt as a key: its JSON."""
    return json.dumps(prompt, sort_keys=True)


def begun(a: Args, prompts: Sequence[Example]) -> list[dict]:
    """The rows of the whole batches that a stopped run left in --out. BadInput where they are not this run's."""
    out, flags = Path(a.out), Path(a.out).with_suffix(".args.json")
    if not a.resume:
        require(not out.exists(), f"--out {out} is there already: continue it with --resume, or name another --out")
        return []
    require(out.exists() and flags.exists(), f"--resume: {out} holds no samples to continue")
    before, now = json.loads(flags.read_text())["flags"], asdict(a)
    changes = [f"--{n.replace('_', '-')} {before.get(n)} -> {now[n]}" for n in now if before.get(n) != now[n]]
    changes = [change for change in changes if not change.startswith(("--resume", "--micro-batch-tokens"))]
    require(not changes, f"--resume: {out} was sampled with other flags: {', '.join(changes)}")
    whole = out.read_bytes().rpartition(b"\n")[0].split(b"\n")
    rows = [json.loads(line) for line in whole if line]
    asked = {identity(prompt_of(e.row)) for e in prompts}
    strange = [row["where"] for row in rows if identity(row["prompt"]) not in asked]
    require(not strange, f"--resume: {out} has a prompt that --data {a.data} has not ({strange[:1]}): it has changed")
    return rows if len(rows) == len(asked) else rows[: len(rows) // a.batch_size * a.batch_size]


def write(path: Path, rows: Sequence[dict], mode: str) -> None:
    """Append rows ("a"), or replace the file by them ("w"): on disk when this returns, whole or not at all."""
    left = memoryview("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode())
    target = path if mode == "a" else path.with_name(path.name + ".partial")
    with open(target, mode + "b", buffering=0) as f:
        size = f.tell()
        try:
            while left:
                left = left[f.write(left) :]
            os.fsync(f.fileno())
        except OSError:
            os.truncate(target, size)
            raise
    if mode == "w":
        os.replace(target, path)


# ---------------------------------------------------------------------------------------------------------------- main


def main(a: Args) -> dict[str, float]:
    """Samples, and returns what the samples are like: mean length, share that ended, KL to the reference."""
    to_make = a.model == train_sft.Args.out and not train_sft.is_made()
    tokenizer = reviews.tokenizer() if to_make else models.load_tokenizer(a.model, a.trust_remote_code)
    embedded = tokenizer.get_vocab() == reviews.tokenizer().get_vocab()  # then the gold reward is known
    defaults = DEFAULTS["reviews" if embedded else "any"]
    a = replace(a, **{name: value for name, value in defaults.items() if getattr(a, name) is None})
    check(a)
    if a.ref and models.load_tokenizer(a.ref, a.trust_remote_code, "--ref").get_vocab() != tokenizer.get_vocab():
        raise BadInput(f"--ref {a.ref}: its tokenizer is not the one of --model {a.model}")
    require(a.out.endswith(".jsonl"), f"--out {a.out}: must end in .jsonl, as what reads it wants")
    prompts = read(a, tokenizer)
    if a.dry_run:
        print("\n\n".join(show(e, tokenizer) for e in prompts[:3]))
        return {}
    out, rows = Path(a.out), begun(a, prompts)

    # ---------------------------------------------------------------------------------------------------------- models
    if to_make:
        train_sft.make(a.device)
    scorers = {"logps": models.load_model(a.model, a.device, a.trust_remote_code)}
    if a.ref:
        scorers["ref_logps"] = models.load_model(a.ref, a.device, a.trust_remote_code, "--ref")
    model, pad, dtype = scorers["logps"], models.pad_id(tokenizer), torch.float32
    ends, probes = end_ids(model, tokenizer), longest(prompts, a.max_new_tokens)
    layouts = {name: models.choose_layout(scorer, probes, pad, dtype, a.layout) for name, scorer in scorers.items()}
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.with_suffix(".args.json").write_text(json.dumps({"flags": asdict(a), **environment()}, indent=1))
        write(out, rows, "w")
    except OSError as error:
        raise BadInput(f"--out {out}: cannot write there: {error.strerror}") from None

    # -------------------------------------------------------------------------------------------------------- sampling
    # Prompts of like length share a batch. Its seed comes from what is in it, so that a run which goes on after a stop
    # gives the batches that are left what they would have been given.
    there = {identity(row["prompt"]) for row in rows}
    left = [e for e in sorted(prompts, key=lambda e: len(e.prompt)) if identity(prompt_of(e.row)) not in there]
    began, done = time.perf_counter(), 0
    with tqdm(total=len(prompts), initial=len(there), unit="prompt", desc=out.name, dynamic_ncols=True) as bar:
        for start in range(0, len(left), a.batch_size):
            batch = left[start : start + a.batch_size]
            content = json.dumps([a.seed, [e.prompt for e in batch]]).encode()
            seed = int.from_bytes(hashlib.sha256(content).digest()[:7], "big")
            asked, size = [e.prompt for e in batch], len(batch) * a.k
            ids = generate(model, tokenizer, asked, a.max_new_tokens, a.temperature, seed, size, a.k)
            own = [ids[i * a.k : (i + 1) * a.k] for i in range(len(batch))]
            sampled = [replace(e, responses=found, ranks=[1] * a.k) for e, found in zip(batch, own, strict=True)]
            scores = {
                name: models.score(scorer, sampled, layouts[name], pad, a.micro_batch_tokens, dtype)
                for name, scorer in scorers.items()
            }
            found = [
                {
                    "prompt": prompt_of(e.row),
                    "responses": [tokenizer.decode(response, skip_special_tokens=True) for response in e.responses],
                    "ended": [response[-1] in ends for response in e.responses],
                    **{name: values[i].tolist() for name, values in scores.items()},
                    "tokens": [len(response) for response in e.responses],
                    "where": e.where,
                }
                for i, e in enumerate(sampled)
            ]
            write(out, found, "a")
            rows += found
            done += sum(map(len, ids))
            bar.set_postfix({"tokens/s": f"{done / (time.perf_counter() - began):,.0f}"}, refresh=False)
            bar.update(len(batch))
    place = {identity(prompt_of(e.row)): i for i, e in enumerate(prompts)}
    rows.sort(key=lambda row: place[identity(row["prompt"])])
    write(out, rows, "w")

    # ---------------------------------------------------------------------------------------------------- what they are
    facts = {
        "length": ("length, tokens", [float(n) for row in rows for n in row["tokens"]]),
        "ended": ("share that ends with EOS", [float(x) for row in rows for x in row["ended"]]),
        "logps": ("log-prob, nats a response", [x for row in rows for x in row["logps"]]),
    }
    if a.ref and a.temperature == 1:
        kl = [x - y for row in rows for x, y in zip(row["logps"], row["ref_logps"], strict=True)]
        facts["kl"] = ("KL to the reference, nats a response", kl)
    if embedded:
        texts = [f"{row['prompt']} {text}" for row in rows for text in row["responses"]]
        facts["gold"] = ("gold reward", [reviews.gold_reward(text) for text in texts])
    of_prompt = [i for i in range(len(rows)) for _ in range(a.k)]
    shown = [[title, interval(mean_interval(values, of_prompt))] for title, values in facts.values()]
    print("\n" + table([f"{len(rows)} prompts, {a.k} responses each", "mean"], shown))
    for row in rows[:3]:
        print(f"\nprompt  {str(row['prompt'])[-300:]}")
        print("\n".join(f"     {i}  {text}" for i, text in enumerate(row["responses"], 1)))
    print(f"\nThe samples are in {out}.\nNext: python annotate.py {out}")
    return {name: mean_interval(values)[0] for name, (_, values) in facts.items()}


if __name__ == "__main__":
    cli(main, Args)
