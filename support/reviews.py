"""The embedded task: short film reviews whose probability and true reward are both known exactly.

A probabilistic grammar generates the reviews (`sample`) and gives the exact probability of any text (`log_prob`). The
gold reward (`gold_reward`) scores the opinion words of a text. Simulated annotators compare texts by that reward plus
noise (`preference_rows`, `rank`). This is the controlled-sentiment experiment of Rafailov et al. 2023 (section 6,
arXiv 2305.18290), made small enough for a laptop. One review, with log probability -26.3 nats and gold reward +0.39:

    we saw it on a rainy sunday . although the script was dull , i really enjoyed the jokes .
"""

import math
import random
from bisect import bisect
from collections import defaultdict
from functools import cache, reduce
from itertools import accumulate

import transformers
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from support.agreement import dense_ranks

# --------------------------------------------------------------------------------------------------------------------
# The opinion words: grammar symbol -> valence -> words. The valences are symmetric about 0, so the mean reward is 0.

OPINIONS = {
    "ADJECTIVE+": {3: "superb brilliant wonderful perfect", 2: "great lovely clever fresh", 1: "good nice fine solid"},
    "ADJECTIVE-": {-3: "terrible dreadful hopeless painful", -2: "bad dull poor tedious", -1: "weak flat bland messy"},
    "LOVE+": {3: "love adore", 2: "enjoy admire", 1: "like"},
    "LOVE-": {-3: "hate loathe", -2: "resent despise", -1: "mind"},
    "LOVED+": {3: "loved adored", 2: "enjoyed admired", 1: "liked"},
    "LOVED-": {-3: "hated loathed", -2: "resented despised", -1: "disliked"},
    "SHONE+": {3: "shone soared", 2: "impressed", 1: "worked"},
    "SHONE-": {-3: "flopped collapsed", -2: "failed", -1: "dragged"},
    "THRILLED+": {3: "thrilled", 2: "delighted", 1: "amused"},
    "THRILLED-": {-3: "appalled", -2: "bored", -1: "annoyed"},
    "GEM+": {3: "masterpiece triumph", 2: "gem joy", 1: "treat"},
    "GEM-": {-3: "disaster failure", -2: "mess bore", -1: "muddle"},
}
VALENCE = {word: value for levels in OPINIONS.values() for value, words in levels.items() for word in words.split()}
INTENSITY = {
    "truly": 1.5,
    "very": 1.25,
    "really": 1.25,
    "fairly": 0.75,
    "rather": 0.75,
    "quite": 0.75,
    "slightly": 0.5,
}
NEGATION = {"not", "never"}
TURNS = {"but", "yet"}  # the sentence up to here is conceded
CONCESSIONS = {"although", "though"}  # from here to the next comma or period, the text is conceded
RESETS = {",", "."} | TURNS | CONCESSIONS  # end a negation and an intensifier
NEGATED = -0.5  # negation flips the sign of a valence and halves it
CONCEDED = 0.75  # the weight of conceded opinions; others have weight 1
MEAN, DEVIATION = 0.0, 1.474  # mean and standard deviation of the unscaled reward over samples of the grammar
ROWS = 24_000  # rows of each kind (reviews, preferences, prompts) that the scripts use
NOISE = 0.35  # of the annotators, in gold reward: they prefer the better of two answers with P = 0.85 on average

# --------------------------------------------------------------------------------------------------------------------
# The grammar. Symbols are in capitals, words in lower case. "|" separates alternatives; a leading number is a weight
# (default 1). A rule for SYMBOL+ also defines SYMBOL-, with every + and - in it exchanged.

RULES = {
    "REVIEW": "SENTENCE SENTENCE",
    "SENTENCE": "2 SHORT | LONG",
    "SETTING": "WE WATCHED SEEN WHEN . | WE WATCHED SEEN with my FRIEND .",
    "SHORT": "5 SHORT+ | 5 SHORT- | SETTING",
    "LONG": "LONG+ | LONG-",
    "SHORT+": "6 CLAUSE+ END | what a DESCRIBED+ FILM . | OPENING , CLAUSE+ END",
    "LONG+": "2 CLAUSE- , BUT CLAUSE+ END | CLAUSE+ , BUT CLAUSE+ END | 2 ALTHOUGH CLAUSE- , CLAUSE+ END"
    " | ALTHOUGH CLAUSE+ , CLAUSE+ END | 2 CLAUSE+ ALTHOUGH CLAUSE- END | CLAUSE+ ALTHOUGH CLAUSE+ END"
    " | 2 CLAUSE+ and CLAUSE+ END | CLAUSE- and CLAUSE+ END",
    "CLAUSE+": "4 ONE was DESCRIBED+ | 3 MANY were DESCRIBED+ | 2 it was DESCRIBED+ | 2 ITEM SEEMED DESCRIBED+"
    " | 3 ITEM DID+ | 4 i FELT+ OBJECT | 2 it was a KIND+",
    # opinions
    "DESCRIBED+": "2 ADJECTIVE+ | HOW DESCRIBED+",
    "FELT+": "2 LOVED+ | STRONGLY LOVED+ | did not LOVE-",
    "DID+": "2 ACTED+ | STRONGLY ACTED+",
    "ACTED+": "2 SHONE+ | THRILLED+ me",
    "KIND+": "ADJECTIVE+ FILM | GEM+",
    # the objects of opinions
    "OBJECT": "3 ITEM | it",
    "ITEM": "3 ONE | 2 MANY",
    "ONE": "3 the PART | its PART | the ROLE",
    "MANY": "3 the PARTS | its PARTS",
    "PART": "plot | story | acting | script | music | ending",
    "PARTS": "jokes | songs | characters | special effects",
    "ROLE": "lead actor | hero | villain",
    "FILM": "film | comedy | drama",
    # words
    "BUT": "2 but | yet",
    "ALTHOUGH": "2 although | though",
    "HOW": "3 very | 2 really | truly | fairly | rather | quite | slightly",
    "STRONGLY": "3 really | 2 truly | quite | slightly",
    "SEEMED": "felt | seemed | looked",
    "END": "5 . | TAIL .",
    "TAIL": "overall | throughout | at times",
    "OPENING": "frankly | overall | for me",
    "WE": "i | we",
    "WATCHED": "saw | watched",
    "SEEN": "it | this FILM",
    "FRIEND": "sister | brother | father | best friend",
    "WHEN": "last night | at home | on a plane | on a rainy sunday",
}

Grammar = dict[str, list[tuple[float, list[str]]]]  # symbol -> alternatives (probability, symbols and words)
Stacks = dict[tuple[str, ...], float]  # symbols still to be expanded, () at the end of a review -> probability
START: Stacks = {("REVIEW",): 1.0}


def read_grammar(rules: dict[str, str]) -> Grammar:
    """Parse rules in the notation of RULES; the probabilities of the alternatives of a symbol sum to 1."""
    twins = {name.replace("+", "-"): rule.translate(str.maketrans("+-", "-+")) for name, rule in rules.items()}
    grammar = {}
    for name, rule in (twins | rules).items():
        parts = [alternative.split() for alternative in rule.split("|")]
        weights = [int(p.pop(0)) if p[0].isdigit() else 1 for p in parts]
        grammar[name] = [(w / sum(weights), p) for w, p in zip(weights, parts, strict=True)]
    return grammar


OPINION_RULES = {name: " | ".join(" ".join(levels.values()).split()) for name, levels in OPINIONS.items()}
GRAMMAR = read_grammar(RULES | OPINION_RULES)
CUMULATIVE = {symbol: [*accumulate(p for p, _ in rule)] for symbol, rule in GRAMMAR.items()}  # probabilities
REVERSED = {symbol: [parts[::-1] for _, parts in rule] for symbol, rule in GRAMMAR.items()}
VOCABULARY = sorted({word for rule in GRAMMAR.values() for _, parts in rule for word in parts} - GRAMMAR.keys())


def expand(symbol: str, rng: random.Random) -> list[str]:
    """Sample one derivation of `symbol` and return its words."""
    words, stack = [], [symbol]
    while stack:
        symbol = stack.pop()
        cumulative = CUMULATIVE.get(symbol)
        if cumulative:
            chosen = bisect(cumulative, rng.random() * cumulative[-1], 0, len(cumulative) - 1)  # as in rng.choices
            stack += REVERSED[symbol][chosen]
        else:
            words.append(symbol)
    return words


def sample(rng: random.Random) -> str:
    """Sample one review: two sentences, 8 to 40 words and punctuation marks in all, separated by single spaces."""
    return " ".join(expand("REVIEW", rng))


@cache
def openings(symbol: str) -> dict[str, dict[tuple[str, ...], float]]:
    """First word of a derivation of `symbol` -> symbols still to be expanded after that word -> probability."""
    if symbol not in GRAMMAR:
        return {symbol: {(): 1.0}}
    totals = defaultdict(lambda: defaultdict(float))
    for probability, (head, *tail) in GRAMMAR[symbol]:
        for word, remainders in openings(head).items():
            for remainder, p in remainders.items():
                totals[word][(*remainder, *tail)] += probability * p
    return totals


def advance(stacks: Stacks, word: str) -> Stacks:
    """The stacks after one more word; empty if no review goes on with it."""
    advanced = defaultdict(float)
    for symbols, p in stacks.items():
        for remainder, q in openings(symbols[0]).get(word, {}).items() if symbols else ():
            advanced[(*remainder, *symbols[1:])] += p * q
    return advanced


@cache
def remainders(words: tuple[str, ...]) -> Stacks:
    """The stacks after the first words of a review."""
    return advance(remainders(words[:-1]), words[-1]) if words else START


def continuations(prompt: str, k: int, rng: random.Random) -> list[str]:
    """k independent continuations of a review that begins with `prompt`, from the exact conditional distribution.

    P(continuation | prompt) sums over all symbol sequences that can remain after the prompt. ValueError if none can.
    """
    words = tuple(prompt.split())
    for n in range(len(words) + 1):  # the shortest first: no deep recursion
        stacks = remainders(words[:n])
    if not any(stacks):
        raise ValueError(f"no review goes on after {prompt!r}")
    sampled = rng.choices(list(stacks), weights=list(stacks.values()), k=k)
    return [" ".join(word for symbol in symbols for word in expand(symbol, rng)) for symbols in sampled]


def log_prob(text: str) -> float:
    """ln P(`sample` returns exactly this text), in nats; -inf if the text is not grammatical."""
    probability = reduce(advance, text.split(), START).get((), 0.0)
    return math.log(probability) if probability > 0 else -math.inf


# --------------------------------------------------------------------------------------------------------------------
# The gold reward, and simulated annotators who see it with noise.


def gold_reward(text: str) -> float:
    """Sentiment of any text: greater is more positive. Always finite; mean 0, deviation 1 over samples of the grammar.

        gold = (r - MEAN) / DEVIATION,   r = sum_i w_i e_i / sum_i w_i,   e_i = polarity * intensity * valence

    i runs over the opinion words. Polarity is NEGATED after a negation, else 1; intensity is that of the last
    intensifier, else 1. Both apply to the next opinion word only, and are reset at a comma, a period and a word of
    TURNS or CONCESSIONS. w_i is CONCEDED before "but" in the same sentence and from "although" to the next comma or
    period, else 1. Being a mean, r does not grow with the number of sentences. |r| <= 4.5; r = 0 without an opinion.
    """
    total = weights = 0.0
    sentence: list[tuple[float, float]] = []  # w_i, e_i
    polarity, intensity, weight = 1.0, 1.0, 1.0
    for word in [*text.split(), "."]:
        if word in NEGATION:
            polarity = NEGATED
        elif word in INTENSITY:
            intensity = INTENSITY[word]
        elif word in VALENCE:
            sentence.append((weight, polarity * intensity * VALENCE[word]))
            polarity, intensity = 1.0, 1.0
        elif word in RESETS:
            polarity, intensity = 1.0, 1.0
            weight = CONCEDED if word in CONCESSIONS else 1.0
            if word in TURNS:
                sentence = [(CONCEDED, e) for _, e in sentence]
            if word == ".":
                total += sum(w * e for w, e in sentence)
                weights += sum(w for w, _ in sentence)
                sentence = []
    return ((total / weights if weights else 0.0) - MEAN) / DEVIATION


def preference_rows(
    prompts: list[str], responses: list[list[str]], noise: float, rng: random.Random
) -> list[dict[str, str | float]]:
    """Preference rows as a simulated annotator labels them: P(a over b) = sigmoid((gold(a) - gold(b)) / noise).

    Bradley and Terry 1952; gold is the reward of prompt and response together. `probability` is the probability of the
    label that was drawn; it is below 0.5 if the annotator preferred the worse response.
    """
    rows = []
    for prompt, (a, b) in zip(prompts, responses, strict=True):
        margin = gold_reward(f"{prompt} {a}") - gold_reward(f"{prompt} {b}")
        probability = (1 + math.tanh(margin / noise / 2)) / 2  # sigmoid(margin / noise), without overflow
        if rng.random() >= probability:
            a, b, probability = b, a, 1 - probability
        rows.append({"prompt": prompt, "chosen": a, "rejected": b, "probability": probability})
    return rows


def rank(rewards: list[float], noise: float, rng: random.Random) -> list[int]:
    """A simulated annotator's ranks of K responses (1 is best), drawn from the Plackett-Luce model.

    P(i first) = softmax(rewards / noise)_i, then the same among the rest (Plackett 1975, Luce 1959). Drawn by sorting
    rewards + noise * Gumbel, where Gumbel = -ln(Exponential(1)). Without noise, equal rewards tie.
    """
    return dense_ranks([reward - noise * math.log(rng.expovariate(1.0)) for reward in rewards])


# --------------------------------------------------------------------------------------------------------------------
# Data, tokenizer and model.


def prompts(n: int, seed: int) -> list[str]:
    """The first 2 to 8 words of n reviews, and at most half of each review."""
    rng = random.Random(seed)
    reviews = [sample(rng).split() for _ in range(n)]
    return [" ".join(words[: rng.randint(2, min(8, len(words) // 2))]) for words in reviews]


def rows(kind: str, n: int, seed: int = 0) -> list[tuple[str, dict]]:
    """The data set `reviews`: n rows for supervised fine-tuning ("sft"), "prompts", or "preference" pairs.

    "prompts" and "preference" have the same prompts. A preference compares two continuations sampled from the grammar.
    """
    rng = random.Random(f"{kind} {seed}")  # the reviews of "sft" must differ from those that the prompts are taken from
    if kind == "sft":
        data = [{"text": sample(rng)} for _ in range(n)]
    elif kind == "prompts":
        data = [{"prompt": prompt} for prompt in prompts(n, seed)]
    else:
        beginnings = prompts(n, seed)
        data = preference_rows(beginnings, [continuations(prompt, 2, rng) for prompt in beginnings], NOISE, rng)
    return [(f"reviews:{i}", row) for i, row in enumerate(data, 1)]


def tokenizer():
    """One id per word of the grammar. Adds <bos>, maps unknown words to <unk>, decodes with single spaces."""
    vocabulary = {word: i for i, word in enumerate(["<pad>", "<bos>", "<eos>", "<unk>", *VOCABULARY])}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.post_processor = processors.TemplateProcessing(
        single="<bos> $A", pair="<bos> $A $B", special_tokens=[("<bos>", vocabulary["<bos>"])]
    )
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=words,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        unk_token="<unk>",
        model_max_length=64,
        clean_up_tokenization_spaces=False,
    )


def is_embedded(model_tokenizer) -> bool:
    """Whether a model with this tokenizer belongs to the embedded task, whose gold reward and grammar are known."""
    return model_tokenizer.get_vocab() == tokenizer().get_vocab()


def config(tokenizer):
    """Configuration of the default model, a Llama with 0.44 million parameters."""
    return transformers.LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=128,
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
