"""Sampling (phase 2a of pipeline.py): several responses to each prompt, for people (or a reward model) to rank.

    python sample.py                                                      the embedded task: 4 answers a prompt
    python sample.py --model runs/sft --data prompts.jsonl --k 4 --temperature 0.9
    python sample.py --model runs/dpo --ref runs/sft                      with log-probs under a reference too
    python sample.py --model runs/dpo --data prompts.jsonl --k 1 --out runs/answers.jsonl      plain answers
    python sample.py --model runs/dpo --data alpaca_eval.json --k 1 --format alpaca_eval --out runs/alpaca.jsonl

Every token is drawn from the whole of softmax(logits / temperature): no top-k, no top-p and no repetition penalty,
whatever the model's own generation settings say. `logps` are the responses' log-probs at temperature 1, whatever the
sampling temperature. samples.jsonl gets one row for each prompt, and annotate.py ranks its responses:

    {"prompt": ..., "responses": [k texts], "ended": [k], "logps": [k], "ref_logps": [k], "tokens": [k lengths],
     "token_ids": [k lists], "tokenizer": digest of its vocabulary, "where": "prompts.jsonl:17"}

Training on these rows with the same tokenizer uses the token ids, because a text can be tokenised in more than one way.
"""

import hashlib
import json
import os
import random
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import torch
from tqdm import tqdm

import train_sft
from rlhf import BadInput, require
from support import models, read_json, read_json_lines, reviews, runs, scoring, tokens
from support.examples import Example, load, probes, show
from support.generate import answer, end_ids
from support.report import interval, mean_interval, stat_interval, table, visible
from support.rows import content_text, prompt_of
from support.scoring import Batching

# --------------------------------------------------------------------------------------------------------------- flags

DEFAULTS = {  # for unset flags: any model, or the embedded task's small one
    "any": {"max_prompts": None, "batch_size": 16},
    "reviews": {"max_prompts": 4000, "batch_size": 128},
}


@dataclass
class Args(runs.Flags):
    model: str = runs.SFT_MODEL
    """the model that answers: a run directory, a local folder or a hub id; runs/sft is made first if it is missing"""
    ref: str | None = None
    """another model with the same tokenizer, whose log-probs of the responses are written down too"""
    data: runs.Sources = "reviews"
    """prompts: reviews (embedded), .jsonl/.json/.csv/.tsv/.parquet files (also .gz), folders with such files or hub
    ids; of other row forms the prompts are taken, each once"""
    max_prompts: int | None = None
    """answer this many prompts, >= 1, drawn by --seed; default all (embedded: 4000)"""
    out: str = "runs/samples.jsonl"
    """the file of samples; one that is there is never overwritten"""
    format: Literal["alpaca_eval"] | None = None
    """alpaca_eval: write the answers as the list that alpaca_eval reads too, to --out with .json in place of .jsonl;
    needs --k 1. Prompts that are texts are then messages of a user, where the model has a chat template"""
    k: int = 4
    """responses to each prompt, >= 1"""
    temperature: float = 1.0
    """> 0; the model's own distribution at 1, greedier below"""
    batch_size: int | None = None
    """prompts sampled at once, >= 1: a killed run loses one batch; default 16 (embedded: 128)"""
    micro_batch_tokens: int = 4096
    """tokens of one forward pass that scores the responses, >= 1"""
    resume: bool = False
    """continue with --out, with the same flags: prompts that are there are skipped, and the others get the very
    responses that the run would have given them"""
    seed: int = 0
    """which prompts, and the sampling; the same seed, prompts and batch size give the same responses"""


# ---------------------------------------------------------------------------------------------------------------- data


def distinct_prompts(a: Args, tokenizer) -> list[Example]:
    """The distinct prompts of --data, in its order, as token ids, or --max-prompts of them; prints what became of its
    rows."""
    examples = load(a.data, "prompts", tokenizer, a, chat=a.format == "alpaca_eval")
    first = {e.prompt_text: i for i, e in reversed([*enumerate(examples)])}
    distinct = [examples[i] for i in sorted(first.values())]
    print(f"{len(distinct)} distinct prompts\n")
    chosen = range(len(distinct))
    if a.max_prompts and a.max_prompts < len(distinct):
        chosen = sorted(random.Random(a.seed).sample(chosen, a.max_prompts))
    return [distinct[i] for i in chosen]


def identity(prompt: str | list) -> str:
    """A prompt as a key: its JSON, in which a date is the text that a template shows."""
    return json.dumps(prompt, sort_keys=True, default=str)


def instruction(e: Example) -> str:
    """The text of a prompt that is a text, or one message of a user. BadInput for others: alpaca_eval has none."""
    prompt = prompt_of(e.row)
    if isinstance(prompt, str):
        return prompt
    alone = len(prompt) == 1 and prompt[0]["role"] == "user" and not e.row.get("tools")
    require(alone, f"{e.where}: --format alpaca_eval is for prompts of one user message: leave out the row")
    return content_text(prompt[0]["content"])


def begun(a: Args, prompts: Sequence[Example]) -> list[dict]:
    """The rows of the whole batches that a stopped run left in --out. BadInput where they are not this run's."""
    out, flags = Path(a.out), Path(a.out).with_suffix(".args.json")
    if not a.resume:
        require(not out.exists(), f"--out {out} is there already: continue it with --resume, or name another --out")
        return []
    require(out.exists() and flags.exists(), f"--resume: {out} holds no samples to continue")
    before, now = read_json(flags, "flags")["flags"], json.loads(json.dumps(asdict(a)))
    changes = [f"--{n.replace('_', '-')} {before.get(n)} -> {now[n]}" for n in now if before.get(n) != now[n]]
    changes = [change for change in changes if not change.startswith(("--resume", "--micro-batch-tokens"))]
    require(not changes, f"--resume: {out} was sampled with other flags: {', '.join(changes)}")
    rows = read_json_lines(out, "prompt", "where")
    asked = {identity(prompt_of(e.row)) for e in prompts}
    strange = [row["where"] for row in rows if identity(row["prompt"]) not in asked]
    require(not strange, f"--resume: {out} has a prompt that --data has not ({strange[:1]}): it has changed")
    return rows if len(rows) == len(asked) else rows[: len(rows) // a.batch_size * a.batch_size]


def write(path: Path, rows: Sequence[dict], mode: str) -> None:
    """Append rows ("a"), or replace the file by them ("w"): on disk when this returns, whole or not at all."""
    lines = (json.dumps(row, ensure_ascii=False, default=str) + "\n" for row in rows)
    left = memoryview("".join(lines).encode(errors="backslashreplace"))
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
    """Sample, and return statistics of the samples: mean length, share that ended, KL to the reference."""
    tokenizer, embedded = runs.load_tokenizer(a.model, a.trust_remote_code)
    a = runs.with_defaults(a, DEFAULTS["reviews" if embedded else "any"])
    models.require_same_tokenizer(a.ref, a.model, tokenizer, a.trust_remote_code)
    require(a.out.endswith(".jsonl"), f"--out {a.out}: must end in .jsonl, as what reads it wants")
    for_alpaca_eval = a.format == "alpaca_eval"
    require(not for_alpaca_eval or a.k == 1, "--format alpaca_eval: has one answer to an instruction: give --k 1")
    prompts = distinct_prompts(a, tokenizer)
    instructions = [*map(instruction, prompts)] if for_alpaca_eval else []
    if a.dry_run:
        print("\n\n".join(show(e, tokenizer) for e in prompts[:3]))
        return {}
    out, rows = Path(a.out), begun(a, prompts)
    others = out.with_suffix(".json")
    free = not for_alpaca_eval or a.resume or not others.exists()
    require(free, f"--format alpaca_eval: {others} is there already: name another --out")
    flags = out.with_suffix(".args.json")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        flags.touch()
    except OSError as error:
        raise BadInput(f"--out {out}: cannot write there: {error.strerror}") from None
    runs.lock(flags)

    # ---------------------------------------------------------------------------------------------------------- models
    runs.make_missing(train_sft, a.model, a.device)
    scorers = {"logps": models.load_model(a.model, a.device, a.trust_remote_code)}
    if a.ref:
        scorers["ref_logps"] = models.load_model(a.ref, a.device, a.trust_remote_code, "--ref")
    model = scorers["logps"]
    digest = tokens.digest(tokenizer)
    contents = {"data": runs.rows_digest(prompts), "model": models.digest(model)}
    contents |= {"ref": models.digest(scorers["ref_logps"])} if a.ref else {}
    before = read_json(flags).get("contents", contents) if a.resume else contents
    changed = ", ".join(f"--{name}" for name in contents if before.get(name) != contents[name])
    require(not changed, f"--resume: {out} was begun with other contents of {changed}: name another --out")
    ends, probe_rows = end_ids(model, tokenizer), probes(prompts, a.max_new_tokens)
    batching = Batching(a.layout, models.pad_id(tokenizer), torch.float32, a.micro_batch_tokens, a.device)
    for scorer in scorers.values():
        scoring.check_tokens(scorer, prompts)
    layouts = {name: scoring.choose_layout(scorer, probe_rows, batching) for name, scorer in scorers.items()}
    try:
        flags.write_text(json.dumps({"flags": asdict(a), **runs.environment(), "contents": contents}, indent=1))
        write(out, rows, "w")
    except OSError as error:
        raise BadInput(f"--out {out}: cannot write there: {error.strerror}") from None

    # -------------------------------------------------------------------------------------------------------- sampling
    # Prompts of similar length share a batch, whose seed is a hash of its content: a run that continues after a stop
    # samples the same answers for the remaining batches.
    there = {identity(row["prompt"]) for row in rows}
    left = [e for e in sorted(prompts, key=lambda e: len(e.prompt)) if identity(prompt_of(e.row)) not in there]
    began, done = time.perf_counter(), 0
    with tqdm(total=len(prompts), initial=len(there), unit="prompt", desc=out.name, dynamic_ncols=True) as bar:
        for start in range(0, len(left), a.batch_size):
            batch = left[start : start + a.batch_size]
            content = json.dumps([a.seed, [e.prompt for e in batch]]).encode()
            seed = int.from_bytes(hashlib.sha256(content).digest()[:7], "big")
            size = len(batch) * a.k
            sampled = answer(model, tokenizer, batch, a.max_new_tokens, seed, a.temperature, a.k, batch_size=size)
            scores = {
                name: scoring.score_logps(scorer, sampled, batching._replace(layout=layouts[name]))
                for name, scorer in scorers.items()
            }
            new_rows = [
                {
                    "prompt": prompt_of(e.row),
                    **({"tools": e.row["tools"]} if e.row.get("tools") else {}),
                    "responses": e.response_texts,
                    "ended": [response[-1] in ends for response in e.responses],
                    **{name: values[i].tolist() for name, values in scores.items()},
                    "tokens": [len(response) for response in e.responses],
                    "token_ids": e.responses,
                    "tokenizer": digest,
                    "where": e.where,
                }
                for i, e in enumerate(sampled)
            ]
            write(out, new_rows, "a")
            rows += new_rows
            done += sum(len(response) for e in sampled for response in e.responses)
            bar.set_postfix({"tokens/s": f"{done / (time.perf_counter() - began):,.0f}"}, refresh=False)
            bar.update(len(batch))
    place = {identity(prompt_of(e.row)): i for i, e in enumerate(prompts)}
    rows.sort(key=lambda row: place[identity(row["prompt"])])
    write(out, rows, "w")
    if for_alpaca_eval:
        answers = [
            {"instruction": text, "output": row["responses"][0].strip(), "generator": a.model}
            | {name: e.row[name] for name in ("dataset", "datasplit") if e.row.get(name)}
            for text, e, row in zip(instructions, prompts, rows, strict=True)
        ]
        others.write_text(json.dumps(answers, indent=1, ensure_ascii=False), "utf-8")

    # ------------------------------------------------------------------------------------------------------ statistics
    stats = {
        "length": ("length, tokens", [float(n) for row in rows for n in row["tokens"]]),
        "ended": ("share that ends with EOS", [float(x) for row in rows for x in row["ended"]]),
        "logps": ("log-prob, nats a response", [x for row in rows for x in row["logps"]]),
    }
    if a.ref and a.temperature == 1:
        kl = [x - y for row in rows for x, y in zip(row["logps"], row["ref_logps"], strict=True)]
        stats["kl"] = ("KL to the reference, nats a response", kl)
    if embedded:
        texts = [f"{row['prompt']} {text}" for row in rows for text in row["responses"]]
        stats["gold"] = ("gold reward", [reviews.gold_reward(text) for text in texts])
    of_prompt = [i for i in range(len(rows)) for _ in range(a.k)]
    shown = [[title, interval(stat_interval(n, values, of_prompt))] for n, (title, values) in stats.items()]
    print("\n" + table([f"{len(rows)} prompts, {a.k} responses each", "mean"], shown))
    for row in rows[:3]:
        print(visible(f"\nprompt  {str(row['prompt'])[-300:]}"))
        print("\n".join(visible(f"     {i}  {text}") for i, text in enumerate(row["responses"], 1)))
    runs.unlock(flags)
    print(f"\nThe samples are in {out}{f' and {others}' if for_alpaca_eval else ''}.")
    if a.k > 1:
        print(f"Next: python annotate.py {out}")
    return {name: mean_interval(values)[0] for name, (_, values) in stats.items()}


if __name__ == "__main__":
    runs.cli(main, Args)
