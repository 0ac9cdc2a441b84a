"""Every command line of recipes/: its flags exist, its values are in range, each has a source, none is mistyped, and on
a small model it goes to its end."""

import importlib
import json
import math
import random
import re
import shlex
import sys
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers
import tyro
from test_data import CHAT, talk, written
from test_tokens import SMOLLM2_FOLDER

import recipes.distil
import recipes.gsm8k
import train_ppo
from rlhf import BadInput
from support import models, reviews, runs
from support.runs import check

FOLDER = Path(__file__).parent.parent / "recipes"
FILES = sorted(path for path in FOLDER.glob("*.md") if path.name != "README.md")
GIVEN = "model ref data split out reward by ptx-data".split()  # which model and which rows: not a hyper-parameter

# The values as read in the sources, written down a second time. None: the source has none, and it stays our default.
SFT_HH = {"lr": 5e-7, "batch_size": 64, "warmup": 0.06, "max_grad_norm": 10, "epochs": 1, "max_length": 512}
HALOS = {"lr": 5e-6, "epochs": 1, "max_grad_norm": 5, "max_length": 1024, "max_prompt_length": 512}
SIMPO = {"loss": "simpo", "batch_size": 128, "epochs": 1, "warmup": 0.1}
PPO = {"gamma": 1, "k": 1, "value_init": "reward", "advantage": "gae"}
TLDR_PPO = PPO | {"kl_coef": 0.05, "lam": 0.95, "epochs_per_rollout": 4, "max_new_tokens": 48, "temperature": 1}
WANTED = {
    "runs/imdb-sft": {"epochs": 1},
    "runs/imdb-samples.jsonl": {"k": 4},
    "runs/imdb-preferences.jsonl": {"noise": 0, "by": "mine:positive"},
    "runs/imdb-dpo": {"loss": "dpo", "beta": 0.1, "lr": 1e-6, "batch_size": 11, "warmup": 0.07},
    "runs/imdb-rm": {"epochs": 3, "lr": None},
    "runs/imdb-ppo": {"batch_size": 1024, "k": 1, "kl_target": 6, "lr": None},
    "runs/tldr-dpo": {"loss": "dpo", "beta": 0.5, "lr": 1e-6, "batch_size": 64, "warmup": 0.11},
    "runs/hh-sft": {"lr": None},
    "runs/hh-dpo": {"loss": "dpo", "beta": 0.1, "lr": 1e-6, "batch_size": 64, "warmup": 0.06},
    "runs/hh-repository-sft": SFT_HH,
    "runs/hh-repository-dpo": SFT_HH | {"loss": "dpo", "beta": 0.1, "max_prompt_length": 256},
    "runs/tldr-sft": {"lr": 6.35e-5, "batch_size": 128, "epochs": 1},
    "runs/tldr-rm": {"lr": 1.5e-5, "batch_size": 64, "epochs": 1, "max_prompt_length": 512},
    "runs/tldr-ppo": TLDR_PPO | {"lr": 1.5e-5, "critic_lr": 1.5e-5, "batch_size": 512, "max_steps": 1_000_000 // 512},
    "runs/tldr-sft-6.7b": {"lr": 2.83e-5, "batch_size": 128, "epochs": 1},
    "runs/tldr-rm-6.7b": {"lr": 5e-6, "batch_size": 64, "epochs": 1, "max_prompt_length": 512},
    "runs/tldr-ppo-6.7b": TLDR_PPO | {"lr": 7e-6, "critic_lr": 7e-6, "batch_size": 256, "max_steps": 1_000_000 // 256},
    "runs/n-plus-sft": {"lr": 3e-6, "batch_size": 16 * 8, "epochs": 1, "warmup": 0, "max_length": 562},
    "runs/n-plus-rm": {"lr": 3e-6, "batch_size": 8 * 8, "epochs": 1, "warmup": 0, "max_length": 638},
    "runs/n-plus-ppo": PPO
    | {
        "lr": 3e-6,
        "critic_lr": 3e-6,
        "kl_coef": 0.05,
        "lam": 0.95,
        "clip_range": 0.2,
        "value_clip": 0.2,
        "minibatches": 1,
    }
    | {"batch_size": 512, "max_steps": 1_000_000 // 512, "epochs_per_rollout": 4, "adam_eps": 1e-5, "temperature": 0.7}
    | {"missing_eos": "replace", "missing_eos_value": -1, "max_new_tokens": 53, "whiten_rewards": "no"},
    "runs/instruct-baseline": {"lr": 9.65e-6, "batch_size": 32, "epochs": 16, "warmup": 0},
    "runs/instruct-rm": {"lr": 9e-6, "batch_size": 64, "epochs": 1, "loss": "pairwise", "max_length": 2048},
    "runs/instruct-sft": {"lr": 5e-6, "batch_size": 32, "epochs": 2},
    "runs/instruct-ppo": PPO
    | {"lr": None, "critic_lr": 9e-6, "kl_coef": 0.02, "ptx_coef": 27.8, "clip_range": 0.2, "temperature": 1}
    | {"batch_size": 512, "minibatches": 512 // 64, "epochs_per_rollout": 1, "max_steps": 256_000 // 512},
    "runs/simpo-mistral-base": SIMPO | {"beta": 2, "gamma_beta_ratio": 1.6 / 2, "lr": 3e-7, "max_length": 1024},
    "runs/simpo-mistral-instruct": SIMPO | {"beta": 2.5, "gamma_beta_ratio": 0.1, "lr": 5e-7, "max_length": 2048},
    "runs/simpo-llama-3-base": SIMPO | {"beta": 2, "gamma_beta_ratio": 1 / 2, "lr": 6e-7, "max_length": 2048},
    "runs/simpo-llama-3-instruct": SIMPO | {"beta": 2.5, "gamma_beta_ratio": 0.55, "lr": 1e-6, "max_length": 2048},
    "runs/simpo-llama-3-v0.2": SIMPO | {"beta": 10, "gamma_beta_ratio": 3 / 10, "lr": 1e-6, "max_length": 2048},
    "runs/ipo-zephyr": {"loss": "ipo_norm", "beta": 0.01, "lr": 5e-7, "batch_size": 128, "warmup": 0.1, "epochs": 1},
    "runs/ipo-halos": HALOS | {"loss": "ipo_norm", "beta": 0.1, "batch_size": 32, "warmup": 0.08},
    "runs/halos-sft": HALOS | {"batch_size": 32, "warmup": 0.08},
    "runs/halos-kto": HALOS
    | {"loss": "kto", "beta": 0.1, "batch_size": 32 // 2, "warmup": 0.04}
    | {"desirable_weight": 1, "undesirable_weight": 1},
    "runs/tulu3-dpo": {"loss": "dpo_norm", "beta": 5, "lr": 5e-7, "batch_size": 128, "epochs": 1, "warmup": 0.1},
    "runs/zephyr-sft": {"lr": 2e-5, "batch_size": 512, "epochs": 1, "warmup": 0.1, "max_length": 2048},
    "runs/zephyr-dpo": {"loss": "dpo", "beta": 0.1, "lr": 5e-7, "batch_size": 32, "epochs": 3, "warmup": 0.1},
    "runs/handbook-sft": {"lr": 2e-5, "batch_size": 128, "epochs": 1, "warmup": 0.1, "max_length": 2048},
    "runs/handbook-dpo": {"loss": "dpo", "beta": 0.01, "lr": 5e-7, "batch_size": 128, "epochs": 1, "warmup": 0.1},
}


def commands(text: str) -> list[list[str]]:
    """Each command of a text as words: what follows `python` at the beginning of a line, and of lines after a \\."""
    found = re.findall(r"^ *python +((?:.*\\\n)*.*)$", text, re.M)
    return [shlex.split(command.replace("\\\n", " "), comments=True) for command in found]


def parse(words: list[str]):
    """The script's Args, with every check that the script makes before it reads data; SystemExit or BadInput."""
    script = importlib.import_module(words[0].removesuffix(".py"))
    a = tyro.cli(script.Args, args=words[1:])
    defaults = getattr(script, "DEFAULTS", {"any": {}})["any"]
    filled = replace(a, device="cpu", **{name: x for name, x in defaults.items() if getattr(a, name) is None})
    if hasattr(filled, "max_prompt_length"):
        check(filled)
    getattr(script, "check_flags", lambda _: None)(filled)
    return a


def flags(text: str | list[str]) -> set[str]:
    """{"--lr 1e-6", ...} of words or of the code in a text."""
    text = text if isinstance(text, str) else " ".join(text)
    return {f"--{name} {value}" for name, value in re.findall(r"--([\w-]+) ([^\s`]+)", text) if name not in GIVEN}


def sections(path: Path) -> list[tuple[str, str]]:
    return [(f"{path.name}, {x.splitlines()[0]}", x) for x in re.split(r"^## ", path.read_text(), flags=re.M)[1:]]


def out(words: list[str]) -> str:
    return words[words.index("--out") + 1] if "--out" in words else " ".join(words)


LINES = [words for path in FILES for words in commands(path.read_text())]


def test_every_line_is_known():
    assert sorted(map(out, LINES)) == sorted(WANTED), "one entry of WANTED for each command, and --out names it"
    blocks = [block for path in FILES for block in re.findall(r"^```sh\n(.*?)^```", path.read_text(), re.M | re.S)]
    assert sum(len(commands(block)) for block in blocks) == len(LINES)
    for block in blocks:  # nothing else stands in a block: no line is lost to a missing backslash
        assert all(re.match(r"python \w+\.py | {4}", line) for line in block.splitlines())


@pytest.mark.parametrize("words", LINES, ids=out)
def test_a_line_parses_and_has_the_papers_values(words):
    a = parse(words)
    wanted = WANTED[out(words)]
    assert {name: getattr(a, name) for name in wanted} == wanted


def test_gsm8k_parses():
    (words,) = commands(recipes.gsm8k.__doc__)
    a = parse(words)
    assert (a.reward, a.advantage, a.k, a.kl_coef) == ("recipes.gsm8k:correct", "rloo", 8, 0.01)


def test_distillation_parses():
    _, words = commands(recipes.distil.__doc__)
    a = parse(words)
    assert (a.ref, a.kl_in, a.kl_coef, a.kl_estimator) == ("runs/dpo", "loss", 1.0, "exact")
    assert recipes.distil.nothing([], ["a", "b"], []) == [0.0, 0.0]


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ("train_dpo.py --betta 0.1", "betta"),
        ("train_dpo.py --beta 0,1", "0,1"),
        ("train_dpo.py --loss dop", "dop"),
        ("train_dpo.py --warmup 150", "--warmup must be in"),
        ("train_dpo.py --loss exo", "--label-smoothing"),
        ("train_dpo.py --max-length 512", "must be below --max-length"),
        ("train_ppo.py --batch-size 4 --minibatches 8", "--minibatches must be in"),
        ("train_rm.py --beta 0.1", "beta"),
    ],
)
def test_a_wrong_line_is_refused(line, complaint, capsys):
    with pytest.raises((SystemExit, BadInput)) as refused:
        parse(line.split())
    assert complaint in str(refused.value) + capsys.readouterr().err


@pytest.mark.parametrize(
    ("title", "text"), [x for path in FILES for x in sections(path)], ids=lambda x: x.split("\n")[0][:40]
)
def test_every_value_has_its_place_in_the_table(title, text):
    """The tables' first cells hold the flags of the section's commands, each with its value, and no others."""
    rows = [line.split("|") for line in text.splitlines() if line.startswith("| `")]
    used = set().union(*(flags(words) for words in commands(text)))
    assert used and set().union(*(flags(row[1]) for row in rows)) == used
    assert all(len(row) == 4 and row[2].strip() for row in rows)


def test_ppos_defaults_are_those_of_the_page_that_says_where_they_are_from():
    page = (FOLDER.parent / "docs/ppo.md").read_text()
    rows = re.findall(r"^\| (`--.*?) \|", page.split("## Where the defaults are from")[1].split("\n## ")[0], re.M)
    named = {name.replace("-", "_"): value for row in rows for name, value in re.findall(r"--([\w-]+) ([^\s`]+)", row)}
    defaults = asdict(train_ppo.Args()) | train_ppo.DEFAULTS["any"] | {"clip_range": 0.2}
    assert len(named) > 20
    assert {name: type(defaults[name])(value) for name, value in named.items()} == {n: defaults[n] for n in named}


def test_the_index_names_every_file_and_section():
    index = (FOLDER / "README.md").read_text()
    links = dict.fromkeys(re.findall(r"\]\(([\w.]+)(?:#([\w-]+))?\)", index))
    assert {name for name, _ in links} == {path.name for path in FOLDER.glob("*.*") if path.name != "README.md"}
    for name, anchor in links:
        heads = re.findall(r"^## (.*)$", (FOLDER / name).read_text(), re.M)
        slugs = {re.sub(r"[^\w -]", "", head).lower().replace(" ", "-") for head in heads}
        assert not anchor or anchor in slugs


# --------------------------------------------------------------------------------- each page goes to its end

# The flags that are replaced, where a script has them. All others are the recipe's; what its models, data sets and
# `mine` are called is too: two-layer models, 50 rows and a function bear these names.
SHORT = {"device": "cpu", "batch_size": 8, "max_steps": 2, "max_new_tokens": 8, "eval_prompts": 2}
FORMS = {  # how the sources have their rows, from a prompt and four answers; a pair of dialogues where none is named
    "stanfordnlp/imdb": lambda p, a: {"text": p + a[0], "label": 1},
    "pretraining.jsonl": lambda p, a: {"text": p + a[0]},
    "prefixes.jsonl": lambda p, a: {"prompt": p},
    "prompts.jsonl": lambda p, a: {"prompt": p},
    "tldr.jsonl": lambda p, a: {"prompt": p, "completion": a[0]},
    "demonstrations.jsonl": lambda p, a: {"prompt": p, "completion": a[0]},
    "HuggingFaceH4/ultrachat_200k": lambda p, a: {"prompt": p, "messages": talk(p, *a[:3])},
    "Anthropic/hh-rlhf": lambda p, a: {
        name: f"\n\nHuman: {p}\n\nAssistant: {x}" for name, x in zip(("chosen", "rejected"), a, strict=False)
    },
    "comparisons.jsonl": lambda p, a: {"prompt": p, "chosen": a[0], "rejected": a[1]},
    "CarperAI/openai_summarize_comparisons": lambda p, a: {"prompt": p, "chosen": a[0], "rejected": a[1]},
    "rankings.jsonl": lambda p, a: {"prompt": p, "responses": a, "ranks": [1, 2, 2, 4]},
}


def give_model(name: str) -> None:
    """A two-layer model with SmolLM2's tokenizer, or a tokenizer of bytes where that is not here."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(SMOLLM2_FOLDER) if SMOLLM2_FOLDER.is_dir() else CHAT
    ids = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    sizes = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2)
    config = transformers.LlamaConfig(vocab_size=len(tokenizer), tie_word_embeddings=True, **sizes, **ids)
    torch.manual_seed(0)
    models.save(transformers.LlamaForCausalLM(config), tokenizer, Path(name))


def give_data(name: str, split: str | None) -> None:
    """50 rows, in a file, or in a folder as the hub has it."""
    rng = random.Random(0)
    answers = [(prompt, reviews.continuations(prompt, 4, rng)) for prompt in reviews.prompts(50, 0)]
    form = FORMS.get(name, lambda p, a: {"prompt": p, "chosen": talk(p, a[0]), "rejected": talk(p, a[1])})
    file = name if name.endswith(".jsonl") else f"{name}/{split or 'train'}-00000-of-00001.jsonl"
    written(Path(), file, *(form(p, a) for p, a in answers))


@pytest.mark.slow
@pytest.mark.parametrize("page", FILES, ids=lambda path: path.name)
def test_a_page_goes_to_its_end(page, tmp_path, monkeypatch):
    """All its lines in turn, each on what the earlier ones made: of every model weights have moved, every number is
    finite, and the flags that were not replaced are those of the run."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(runs, "environment", dict)
    longer = lambda prompts, responses, rows: [float(len(text)) for text in responses]  # noqa: E731
    monkeypatch.setitem(sys.modules, "mine", SimpleNamespace(positive=longer))
    for words in commands(page.read_text()):
        script, parsed = importlib.import_module(words[0].removesuffix(".py")), parse(words)
        short = {name: value for name, value in SHORT.items() if hasattr(parsed, name)}
        a, out = replace(parsed, **short), Path(parsed.out)
        for name in {getattr(a, "model", None), getattr(a, "ref", None)} - {None}:
            if not Path(name).exists():  # ipo.md starts from what kto.md made
                give_model(name)
        for name in {getattr(a, "data", None), getattr(a, "ptx_data", None)} - {None, "reviews"}:
            if not Path(name).exists():
                give_data(name, a.split)
        results = script.main(a)

        if not hasattr(a, "lr"):  # sample.py, annotate.py
            assert len(out.read_text().splitlines()) >= 40
            continue
        ran = json.loads((out / "args.json").read_text())
        kept = {name: value for name, value in asdict(parsed).items() if value is not None and name not in SHORT}
        assert len(kept) > 20 and {name: ran[name] for name in kept} == kept
        logged = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
        numbers = [*results.values(), *(value for row in logged for value in row.values())]
        assert logged[-1]["step"] == 2 and all(map(math.isfinite, numbers)), words
        load = models.load_reward_model if words[0] == "train_rm.py" else models.load_model
        before, after = models.load_model(a.model, "cpu"), load(a.out, "cpu").state_dict()
        assert not any(weight.equal(after[name]) for name, weight in before.named_parameters()), words
