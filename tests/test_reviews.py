import functools
import itertools
import math
import random
import re
from collections import Counter, defaultdict

import pytest
from transformers import AutoTokenizer, LlamaForCausalLM

from support import reviews
from support.reviews import GRAMMAR, NOISE, gold_reward, log_prob

TINY = {
    "S": [(0.5, ["A", "B"]), (0.3, ["a", "S"]), (0.2, ["b"])],
    "A": [(0.6, ["a"]), (0.4, ["a", "a"])],
    "B": [(0.75, ["b"]), (0.25, ["a", "b"])],
}


@pytest.fixture(scope="module")
def samples():
    rng = random.Random(0)
    return [reviews.sample(rng) for _ in range(20_000)]


def inside(grammar, symbol, words):
    """Inside probability P(symbol => words), summed over all parses (Baker 1979). Left recursion never terminates."""

    @functools.cache
    def ends(symbol, start):
        """end -> P(symbol => words[start:end])"""
        totals = defaultdict(float)
        for probability, parts in grammar[symbol]:
            partial = {start: probability}  # position after the parts so far -> probability
            for part in parts:
                advanced = defaultdict(float)
                for position, p in partial.items():
                    if part in grammar:
                        for end, q in ends(part, position).items():
                            advanced[end] += p * q
                    elif position < len(words) and words[position] == part:
                        advanced[position + 1] += p
                partial = advanced
                if not partial:
                    break
            for end, p in partial.items():
                totals[end] += p
        return totals

    return ends(symbol, 0).get(len(words), 0.0)


def open_symbols(grammar, words):
    """Leftmost derivations of texts that begin with `words`: what is still to be expanded -> probability."""
    stacks = {("REVIEW",): 1.0}
    for word in words:
        matched = Counter()
        todo = list(stacks.items())
        while todo:
            stack, p = todo.pop()
            top, rest = stack[0] if stack else None, stack[1:]
            if top in grammar:
                todo += [((*parts, *rest), p * q) for q, parts in grammar[top]]
            elif top == word:
                matched[rest] += p
        stacks = matched
    return stacks


# -- the grammar ------------------------------------------------------------------------------------------------------


def test_every_rule_is_a_distribution_over_known_symbols():
    for symbol, alternatives in GRAMMAR.items():
        assert sum(p for p, _ in alternatives) == pytest.approx(1, abs=1e-12), symbol
        for _, parts in alternatives:
            assert parts and all(part in GRAMMAR or part == part.lower() for part in parts), (symbol, parts)
    assert 120 <= len(reviews.VOCABULARY) <= 500
    assert set(reviews.VALENCE) | set(reviews.INTENSITY) | {"not"} <= set(reviews.VOCABULARY)
    assert reviews.TURNS | reviews.CONCESSIONS <= set(reviews.VOCABULARY)


def test_reviews_have_8_to_40_tokens_in_two_sentences(samples):
    lengths = [len(text.split()) for text in samples]
    assert min(lengths) == 8 and max(lengths) <= 40
    assert 15 < sum(lengths) / len(lengths) < 16.5
    assert all(text.endswith(" .") and text.split().count(".") == 2 for text in samples)


def test_read_grammar_weights_and_twins():
    grammar = reviews.read_grammar({"S": "3 X+ | X-", "X+": "good X+ | 2 Y-", "Y+": "y", "Y-": "z"})
    assert grammar["S"] == [(0.75, ["X+"]), (0.25, ["X-"])]
    assert grammar["X-"] == [(1 / 3, ["good", "X-"]), (2 / 3, ["Y+"])]
    assert grammar["Y+"] == [(1.0, ["y"])] and grammar["Y-"] == [(1.0, ["z"])]


def test_inside_sums_over_the_parses_of_an_ambiguous_grammar():
    # "a a b" is A(a) B(a b), A(a a) B(b), a S(a S(b)) or a S(A(a) B(b))
    by_hand = 0.5 * 0.6 * 0.25 + 0.5 * 0.4 * 0.75 + 0.3 * (0.3 * 0.2 + 0.5 * 0.6 * 0.75)
    assert inside(TINY, "S", ["a", "a", "b"]) == pytest.approx(by_hand, rel=1e-12)
    assert inside(TINY, "S", ["b"]) == 0.2
    assert inside(TINY, "S", ["a", "a"]) == inside(TINY, "S", []) == 0


def test_inside_agrees_with_enumeration_and_adds_up_to_one():
    def derivations(symbols, longest):
        """Every (words, probability) of every derivation with at most `longest` words."""
        if len(symbols) > longest:
            return
        open_at = next((i for i, s in enumerate(symbols) if s in TINY), None)
        if open_at is None:
            yield symbols, 1.0
            return
        for p, parts in TINY[symbols[open_at]]:
            for words, q in derivations((*symbols[:open_at], *parts, *symbols[open_at + 1 :]), longest):
                yield words, p * q

    enumerated = Counter()
    for words, p in derivations(("S",), 7):
        enumerated[words] += p
    total = 0.0
    for n in range(1, 8):
        for words in itertools.product("ab", repeat=n):
            p = inside(TINY, "S", list(words))
            assert p == pytest.approx(enumerated[words], abs=1e-15)
            total += p
    # every text is some a, then one b
    longer = [inside(TINY, "S", ["a"] * n + ["b"]) for n in range(7, 60)]
    assert total + sum(longer) == pytest.approx(1, abs=1e-12)


def test_log_prob_agrees_with_the_inside_algorithm_and_leftmost_derivations(samples):
    for text in samples[:40]:
        assert log_prob(text) == pytest.approx(math.log(inside(GRAMMAR, "REVIEW", text.split())), abs=1e-9)
        assert log_prob(text) == pytest.approx(math.log(open_symbols(GRAMMAR, text.split())[()]), abs=1e-9)


def test_log_prob_by_hand():
    # a sentence is LONG (1 of 3), LONG+ (1 of 2), CLAUSE+ and CLAUSE+ END (2 of 12), END a period (5 of 6); or it is
    # SHORT (2 of 3), SHORT+ (5 of 11), CLAUSE+ END (6 of 8), that period; each clause is it was DESCRIBED+ (2 of 20),
    # ADJECTIVE+ (2 of 3), its word (1 of 12)
    clause = 2 / 20 * 2 / 3 * 1 / 12
    long = 1 / 3 * 1 / 2 * 2 / 12 * 5 / 6 * clause**2
    short = 2 / 3 * 5 / 11 * 6 / 8 * 5 / 6 * clause
    assert log_prob("it was good and it was nice . it was fine .") == pytest.approx(math.log(long * short), abs=1e-12)


def test_sampled_frequencies_match_probabilities(samples):
    for start in ("although the", "i really", "what a", "we watched"):
        p = sum(open_symbols(GRAMMAR, start.split()).values())
        count = sum(text.startswith(start + " ") for text in samples)
        assert abs(count - p * len(samples)) < 4 * math.sqrt(p * (1 - p) * len(samples)), start


def test_every_sample_is_grammatical_and_broken_texts_are_not(samples):
    assert all(-120 < log_prob(text) < 0 for text in samples[:300])
    good = "the plot was very good . i did not enjoy the jokes ."
    assert log_prob(good) > -math.inf
    for broken in (
        "",
        ".",
        "the plot was good very . i did not enjoy the jokes .",
        "the plot were very good . i did not enjoy the jokes .",
        "the plot was very good . i did not enjoyed the jokes .",
        "the plot was very good . i did not enjoy the jokes",
        "the plot was very good . i did not enjoy the jokes . .",
        "the plot was very zebra . i did not enjoy the jokes .",
        "the plot was very good i did not enjoy the jokes .",
        "The plot was very good . i did not enjoy the jokes .",
        "the plot was very good .",  # a single short sentence is no review
    ):
        assert log_prob(broken) == -math.inf, broken


# -- the gold reward --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "r"),
    [
        ("", 0),
        ("we saw it last night .", 0),
        ("the plot was good .", 1),
        ("the plot was superb", 3),
        ("the plot was very good .", 1.25),
        ("the plot was not good .", -0.5),
        ("the plot was not very bad .", -0.5 * 1.25 * -2),
        ("it was never a gem .", -0.5 * 2),
        ("the songs never really thrilled me .", -0.5 * 1.25 * 3),
        ("slightly very good", 1.25),  # the last intensifier counts
        ("the plot was good . i hated it .", (1 - 3) / 2),
        ("the plot was good , but i hated it .", (0.75 * 1 - 3) / 1.75),
        ("the plot was good yet i hated it . it was nice .", (0.75 * 1 - 3 + 1) / 2.75),
        ("it was nice . the plot was good , but i hated it .", (1 + 0.75 * 1 - 3) / 2.75),
        ("although the plot was good , i hated it .", (0.75 * 1 - 3) / 1.75),
        ("i hated it although the plot was good .", (-3 + 0.75 * 1) / 1.75),
        ("i hated it though the plot was good . it was nice .", (-3 + 0.75 * 1 + 1) / 2.75),
        ("the plot was not . good", 1),
        ("very , not but good", 1),
        ("superb superb zebra superb", 3),
    ],
)
def test_gold_reward_by_hand(text, r):
    assert gold_reward(text) == pytest.approx((r - reviews.MEAN) / reviews.DEVIATION, abs=1e-12)


def test_the_review_in_the_module_docstring():
    number = r"([-+][\d.]+)"
    stated, reward, text = re.search(
        rf"log probability {number} nats and gold reward {number}:\s+(.*)\n", reviews.__doc__
    ).groups()
    assert log_prob(text) == pytest.approx(float(stated), abs=0.05)
    assert gold_reward(text) == pytest.approx(float(reward), abs=0.005)


def test_gold_reward_is_standardised_and_has_room_above(samples):
    rewards = [gold_reward(text) for text in samples]
    mean = sum(rewards) / len(rewards)
    assert abs(mean) < 0.03
    assert abs(math.sqrt(sum((r - mean) ** 2 for r in rewards) / len(rewards)) - 1) < 0.02
    best = "i truly loved it and it was a triumph . i truly adored it and the plot was truly superb ."
    assert log_prob(best) > -math.inf
    assert gold_reward(best) == pytest.approx((3 * 4.5 + 3) / 4 / reviews.DEVIATION)
    assert gold_reward(best) > 2.5
    assert gold_reward("truly superb " * 10_000) == pytest.approx(4.5 / reviews.DEVIATION)


# -- annotators -------------------------------------------------------------------------------------------------------


def test_preference_labels_follow_bradley_terry():
    prompt, a, b = "the plot", "was good .", "was not good ."
    p = 1 / (1 + math.exp(-(1 + 0.5) / reviews.DEVIATION / 2.0))
    n = 20_000
    rows = reviews.preference_rows([prompt] * n, [[a, b]] * n, 2.0, random.Random(0))
    assert {row["prompt"] for row in rows} == {prompt}
    assert {(row["chosen"], row["rejected"]) for row in rows} == {(a, b), (b, a)}
    for row in rows[:200]:
        assert row["probability"] == pytest.approx(p if row["chosen"] == a else 1 - p, abs=1e-12)
    share = sum(row["chosen"] == a for row in rows) / n
    assert abs(share - p) < 4 * math.sqrt(p * (1 - p) / n)
    rows = reviews.preference_rows([prompt] * 200, [[b, a]] * 200, 1e-6, random.Random(0))
    assert all(row["chosen"] == a and row["probability"] == 1 for row in rows)


def test_rank_frequencies_follow_plackett_luce():
    rewards, noise, n = [1.0, 0.0, -0.5], 0.8, 30_000
    rng = random.Random(0)
    counts = Counter(tuple(reviews.rank(rewards, noise, rng)) for _ in range(n))
    w = [math.exp(r / noise) for r in rewards]
    for order in itertools.permutations(range(3)):
        p = w[order[0]] / sum(w) * w[order[1]] / (w[order[1]] + w[order[2]])
        ranks = tuple(order.index(i) + 1 for i in range(3))
        assert abs(counts[ranks] - n * p) < 4 * math.sqrt(n * p * (1 - p)), order
    assert reviews.rank([0.1, 0.3, 0.2], 1e-9, rng) == [3, 1, 2]


def test_continuations_follow_the_exact_conditional_distribution():
    """Next words against the open derivations of a prompt, found by an independent search."""
    prompt, n = "what a weak", 20_000
    begun = open_symbols(GRAMMAR, prompt.split())
    counts = Counter(text.split()[0] for text in reviews.continuations(prompt, n, random.Random(0)))
    for word, count in counts.items():
        p = sum(open_symbols(GRAMMAR, [*prompt.split(), word]).values()) / sum(begun.values())
        assert abs(count / n - p) < 4 * math.sqrt(p * (1 - p) / n)
    assert len(counts) == 3
    with pytest.raises(ValueError, match="no review goes on"):
        reviews.continuations("plot the", 1, random.Random(0))


def test_rows_of_the_data_set():
    for where, row in reviews.rows("sft", 20):
        assert where.startswith("reviews:") and row.keys() == {"text"} and log_prob(row["text"]) > -math.inf
    for _, row in reviews.rows("preference", 200):
        gap = gold_reward(f"{row['prompt']} {row['chosen']}") - gold_reward(f"{row['prompt']} {row['rejected']}")
        assert row["probability"] == pytest.approx(1 / (1 + math.exp(-gap / NOISE)))
        assert all(log_prob(f"{row['prompt']} {row[side]}") > -math.inf for side in ("chosen", "rejected"))


def test_noise_puts_the_ceiling_near_085():
    rng = random.Random(0)
    expected = []
    for prompt in reviews.prompts(700, seed=3):
        a, b = (gold_reward(f"{prompt} {text}") for text in reviews.continuations(prompt, 2, rng))
        expected.append(1 / (1 + math.exp(-abs(a - b) / NOISE)))
    assert 0.83 < sum(expected) / len(expected) < 0.87


# -- data and model ---------------------------------------------------------------------------------------------------


def test_prompts_are_short_proper_beginnings(samples):
    prompts = reviews.prompts(2_000, seed=1)
    rng = random.Random(1)
    review = reviews.sample(rng)
    assert review.startswith(prompts[0] + " ")
    assert {len(prompt.split()) for prompt in prompts} == set(range(2, 9))
    for prompt in prompts[:100]:
        assert sum(p for rest, p in open_symbols(GRAMMAR, prompt.split()).items() if rest) > 0


def test_everything_is_decided_by_the_seed():
    for kind in ("sft", "preference"):
        assert reviews.rows(kind, 20, seed=5) == reviews.rows(kind, 20, seed=5) != reviews.rows(kind, 20, seed=6)
    assert reviews.prompts(20, seed=5) == reviews.prompts(20, seed=5) != reviews.prompts(20, seed=6)
    pairs = ["the plot"] * 50, [["was good .", "was bad ."]] * 50, 3.0
    assert reviews.preference_rows(*pairs, random.Random(1)) == reviews.preference_rows(*pairs, random.Random(1))
    assert reviews.preference_rows(*pairs, random.Random(1)) != reviews.preference_rows(*pairs, random.Random(2))


def test_tokenizer_round_trip(samples, tmp_path):
    tokenizer = reviews.tokenizer()
    special = [tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id]
    assert len(set(special)) == 4 and len(tokenizer) == len(reviews.VOCABULARY) + 4
    tokenizer.save_pretrained(tmp_path)
    for tok in (tokenizer, AutoTokenizer.from_pretrained(tmp_path)):
        for text, ids in zip(samples[:2_000], tok(samples[:2_000]).input_ids, strict=True):
            assert ids[0] == tok.bos_token_id and not set(ids[1:]) & set(special)
            assert len(ids) == len(text.split()) + 1
            assert tok.decode(ids, skip_special_tokens=True) == text
        assert tok("the zebra").input_ids[2] == tok.unk_token_id
        plain = tok("the plot", add_special_tokens=False).input_ids
        assert tok.decode(plain) == "the plot" and len(plain) == 2


def test_config_is_a_small_tied_llama():
    tokenizer = reviews.tokenizer()
    config = reviews.config(tokenizer)
    model = LlamaForCausalLM(config)
    assert 350_000 <= model.num_parameters() <= 500_000
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert (config.pad_token_id, config.bos_token_id, config.eos_token_id) == (0, 1, 2)
    assert config.max_position_embeddings == 128 and config.vocab_size == len(tokenizer)
