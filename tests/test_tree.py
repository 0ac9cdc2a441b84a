"""The packed tree against plain padded rows, on tiny random models of many architectures."""

from collections import Counter

import flash_on_cpu  # noqa: F401 - registers kernels
import pytest
import torch
from einops import rearrange
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import ARCHITECTURES, example, no_float32, random_examples, tiny
from torch.nn.attention import varlen
from torch.nn.functional import scaled_dot_product_attention
from torch.profiler import ProfilerActivity, profile

from rlhf import BadInput
from rlhf.tree import _flash, collate, micro_batches, tokens, tree_attention
from support import models, scoring
from support.models import output_head, set_attention
from support.scoring import Batching, choose_layout, response_logps

TREE = "llama qwen3 mistral gemma gpt2 opt phi olmo2 gpt_neox granite mixtral cohere2".split()
SHAPES = [(7, [5, 9]), (1, [3, 4]), (12, [1, 14]), (4, [6]), (5, [2, 0, 8]), (3, [0, 6])]


def measured(model, examples, layout, budget=10**9):
    """Log-prob sums of all sequences, and the gradient of their weighted sum as one vector."""
    model.zero_grad()
    sums = {}
    for group in micro_batches(examples, budget, layout):
        _, logps = response_logps(model, collate([examples[i] for i in group], layout, 0))
        parts = logps.split([len(examples[i].responses) for i in group])
        sums |= dict(zip(group, parts, strict=True))
        loss = sum((-1) ** j * (i + 1) * x for i, part in zip(group, parts, strict=True) for j, x in enumerate(part))
        loss.backward()
    gradient = torch.cat([w.grad.flatten() for w in model.parameters() if w.grad is not None])
    return torch.cat([sums[i] for i in sorted(sums)]).detach(), gradient


def relative(a, b):
    return ((a - b).norm() / b.norm()).item()


@pytest.mark.parametrize("dtype,bound", [(torch.float32, 1e-5), (torch.float64, 1e-12)])
@pytest.mark.parametrize("name", TREE)
def test_both_layouts_give_the_same_log_probs_and_gradients(name, dtype, bound):
    model, examples = tiny(name, dtype), random_examples(SHAPES)
    with no_float32():
        padded, padded_grad = measured(model, examples, "padded")
        tree, tree_grad = measured(model, examples, "tree")
    assert torch.allclose(tree, padded, rtol=0, atol=bound * 10)
    assert relative(tree_grad, padded_grad) < bound
    # and the padded layout is what the library computes for each sequence alone
    set_attention(model, packed=False)
    alone = []
    for e in examples:
        for r in e.responses:
            with no_float32():
                logps = model(torch.tensor([e.prompt + r])).logits[0].log_softmax(-1)
            alone.append(sum(logps[len(e.prompt) - 1 + j, token].item() for j, token in enumerate(r)))
    assert torch.allclose(padded, torch.tensor(alone, dtype=torch.float64), rtol=0, atol=bound * 10)


@pytest.mark.parametrize("layout", ["tree", "padded"])
@pytest.mark.parametrize("dtype,bound", [(torch.float32, 1e-5), (torch.float64, 1e-12)])
def test_gradients_do_not_depend_on_the_micro_batch_budget(layout, dtype, bound):
    model, examples = tiny("llama", dtype), random_examples(SHAPES)
    with no_float32():
        whole, whole_grad = measured(model, examples, layout)
    for budget in (1, 30, 60):
        with no_float32():
            parts, parts_grad = measured(model, examples, layout, budget)
        assert torch.allclose(parts, whole, rtol=0, atol=bound * 10) and relative(parts_grad, whole_grad) < bound


@pytest.mark.parametrize("name", sorted(ARCHITECTURES))
def test_the_check_ends_on_a_layout_that_is_right(name, capsys):
    model, examples = tiny(name), random_examples(SHAPES + [(20, [20, 25])])
    layout = choose_layout(model, examples, Batching("auto"))
    assert layout == "tree" if name in TREE else True
    if name in ("gemma2", "qwen3_next", "gpt_oss", "stablelm"):
        assert layout == "padded" and "layout: padded" in capsys.readouterr().out
    chosen = measured(model, examples, layout)[0]
    set_attention(model, packed=False)
    for i, e in enumerate(examples[:4]):
        reference = model(torch.tensor([e.prompt + e.responses[0]])).logits[0].log_softmax(-1)
        want = sum(reference[len(e.prompt) - 1 + j, token].item() for j, token in enumerate(e.responses[0]))
        first = sum(len(x.responses) for x in examples[:i])
        assert chosen[first].item() == pytest.approx(want, abs=2e-4)


def test_the_check_catches_a_window_that_matters_on_long_rows_only(monkeypatch):
    """An attention that forgets the window is right on rows of up to 5 tokens: only the longest row shows it."""
    forgetful = lambda *args, sliding_window=None, **kwargs: tree_attention(*args, **kwargs)  # noqa: E731
    monkeypatch.setattr(models, "tree_attention", forgetful)
    model = tiny("mistral")
    short = random_examples([(2, [2, 3]), (1, [3, 2])])
    assert choose_layout(model, short, Batching("auto")) == "tree"
    assert choose_layout(model, short + random_examples([(9, [9, 3])]), Batching("auto")) == "padded"
    with pytest.raises(BadInput, match="--layout tree does not fit mistral"):
        choose_layout(model, random_examples([(9, [9, 3])]), Batching("tree"))


def test_the_check_does_not_take_a_full_memory_for_another_result(monkeypatch):
    def full(*_, **__):
        raise torch.cuda.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(models, "tree_attention", full)
    with pytest.raises(torch.cuda.OutOfMemoryError):
        choose_layout(tiny("llama"), random_examples([(2, [2, 3])]), Batching("auto"))


def test_the_check_scores_the_longest_sequence_and_not_only_the_largest_tree(monkeypatch):
    forgetful = lambda *args, sliding_window=None, **kwargs: tree_attention(*args, **kwargs)  # noqa: E731
    monkeypatch.setattr(models, "tree_attention", forgetful)
    model = tiny("mistral")
    model.config.sliding_window = 24
    for layer in model.model.layers:
        layer.self_attn.sliding_window = 24
    trees = random_examples([(4, [18, 18]), (2, [2, 2])])  # 40 tokens, but no sequence longer than 22
    assert choose_layout(model, trees, Batching("auto")) == "tree"
    assert choose_layout(model, trees + random_examples([(26, [6, 6])]), Batching("auto")) == "padded"


def test_sums_are_as_good_as_float64_over_a_thousand_tokens():
    model, examples = tiny("llama"), random_examples([(3, [120])] * 8)
    logps, sums = response_logps(model, collate(examples, "tree", 0))
    assert sums.dtype == torch.float64 and logps.dtype == torch.float32
    assert torch.equal(sums, torch.stack([x.double().sum() for x in logps.split(120)]))


def test_gradients_are_the_same_each_time_with_two_threads():
    """The state before a response belongs to all responses of its prompt, whose gradients two threads add up."""
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    model, batch = tiny("llama"), collate(random_examples([(5, [4] * 400)]), "tree", 0)
    gradients = []
    for _ in range(5):
        model.zero_grad()
        scoring.response_logps(model, batch)[1].sum().backward()
        gradients.append(torch.cat([weight.grad.flatten() for weight in model.parameters()]))
    torch.set_num_threads(threads)
    assert all(torch.equal(x, gradients[0]) for x in gradients)


def test_the_leak_test_catches_a_branch_that_sees_another(monkeypatch):
    def leaky(module, query, key, value, attention_mask, scaling=None, segments=None, **kwargs):
        out = torch.nn.functional.scaled_dot_product_attention(
            query, key, value, is_causal=True, scale=scaling, enable_gqa=True
        )
        return out.transpose(1, 2), None

    monkeypatch.setattr(models, "tree_attention", leaky)
    model, rows = tiny("llama"), random_examples([(3, [4, 5]), (6, [7, 8])])
    assert choose_layout(model, rows, Batching("auto")) == "padded"
    logps, _ = response_logps(model, collate(rows, "tree", 0))
    assert scoring._leak(model, rows, logps, Batching("auto")) > 1e-2


def test_bfloat16_check():
    model = tiny("llama")
    assert choose_layout(model, random_examples(SHAPES), Batching("auto", dtype=torch.bfloat16)) == "tree"


def test_a_head_that_is_read_wrongly_is_refused(monkeypatch):
    monkeypatch.setattr(models, "output_head", lambda model: output_head(model)._replace(scale=1.0))
    with pytest.raises(BadInput, match="granite.*output_head"):
        choose_layout(tiny("granite"), random_examples(SHAPES), Batching("auto"))


def test_collate_by_hand():
    """prompt abc with de and fgh, then prompt ij with kl, as in the module's docstring."""
    examples = [example([11, 12, 13], [[14, 15], [16, 17, 18]]), example([19, 20], [[21, 22]])]
    tree = collate(examples, "tree", 0)
    assert tree.input_ids.tolist() == [[11, 12, 13, 14, 15, 16, 17, 18, 19, 20, 21, 22]]
    assert tree.position_ids.tolist() == [[0, 1, 2, 3, 4, 3, 4, 5, 0, 1, 2, 3]]
    assert tree.sources.tolist() == [2, 3, 2, 5, 6, 9, 10]
    assert tree.targets.tolist() == [14, 15, 16, 17, 18, 21, 22]
    assert tree.sequence.tolist() == [0, 0, 1, 1, 1, 2, 2] and tree.lengths.tolist() == [2, 3, 1 + 1]
    assert [tuple(s) for s in tree.segments.parts] == [(0, 5, 0, 0), (5, 8, 0, 3), (8, 12, 8, 8)]
    assert [x.tolist() for x in tree.segments.offsets] == [[0, 5, 8, 12], [0, 5, 5 + 6, 5 + 6 + 4]]
    assert tree.ends.tolist() == [4, 7, 11]
    padded = collate(examples, "padded", 7)
    assert padded.input_ids.tolist() == [[11, 12, 13, 14, 15, 7], [11, 12, 13, 16, 17, 18], [19, 20, 21, 22, 7, 7]]
    assert padded.attention_mask.tolist() == [[1, 1, 1, 1, 1, 0], [1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0]]
    assert padded.sources.tolist() == [2, 3, 8, 9, 10, 13, 14] and padded.targets.tolist() == tree.targets.tolist()
    assert padded.ends.tolist() == [4, 11, 15]


@pytest.mark.parametrize("layout, ends", [("tree", [3, 4, 1, 6, 6]), ("padded", [3, 6, 9, 13, 17])])
def test_an_empty_response_ends_with_its_prompt(layout, ends):
    """11 12 with 13 14, 15 and nothing; then 16 17 with nothing, twice: rows of 4 tokens in the padded layout."""
    examples = [example([11, 12], [[13, 14], [15], []]), example([16, 17], [[], []])]
    assert collate(examples, layout, 0).ends.tolist() == ends


def test_attention_for_every_window_is_that_of_one_mask():
    """A token sees its prompt and its own branch up to itself, and with a window w the tokens at distances below w."""
    examples = random_examples([*SHAPES, (100, [40, 30])])  # the last one's segments are not in a call with others
    batch = collate(examples, "tree", 0)
    t, position = batch.input_ids.shape[1], batch.position_ids[0]
    visible = torch.zeros(t, t, dtype=torch.bool)
    for start, stop, prefix, prefix_stop in batch.segments.parts:
        visible[start:stop, prefix:prefix_stop] = True
        visible[start:stop, start:stop] = True
    distance = position[:, None] - position
    g = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(1, h, t, 4, generator=g, dtype=torch.float64) for h in (4, 2, 2))
    for window in (None, *range(1, 40), 129, 130, 139, 140, 141):
        mask = visible & (distance >= 0) & (distance < (window or t))
        want = torch.nn.functional.scaled_dot_product_attention(query, key, value, mask, scale=0.3, enable_gqa=True)
        got, _ = tree_attention(
            None, query, key, value, None, scaling=0.3, sliding_window=window, segments=batch.segments
        )
        torch.testing.assert_close(got, want.transpose(1, 2), rtol=1e-12, atol=1e-12)


def test_untrained_tokens_are_not_scored():
    turns = example([5, 6], [[7, 8, 9, 10]], trained=[[True, False, False, True]])
    batch = collate([turns], "tree", 0)
    assert batch.sources.tolist() == [1, 4] and batch.targets.tolist() == [7, 10] and batch.lengths.tolist() == [2]


def test_micro_batches_by_hand():
    """The longest first, each into the first group with room: 5 + 2 and 4 + 3 tokens; padded, 2 and 2 rows of 5."""
    examples = random_examples([(3, [2]), (1, [2]), (1, [3]), (1, [1])])
    assert micro_batches(examples, 7, "tree") == [[0, 3], [2, 1]]
    assert micro_batches(examples, 6, "tree") == [[0], [2, 3], [1]]
    assert micro_batches(examples, 10, "padded") == [[0, 2], [1, 3]]
    assert micro_batches(examples, 4, "tree") == [[0], [2], [1], [3]]


@pytest.mark.parametrize("option", [{"softcap": 30.0}, {"s_aux": torch.zeros(2)}, {"segments": None}])
def test_attention_that_would_differ_is_refused(option):
    segments = collate([example([5], [[6], [7]])], "tree", 0).segments
    query = torch.zeros(1, 2, 3, 4)
    tree_attention(None, query, query, query, None, segments=segments, softcap=None, s_aux=None)
    tree_attention(None, query, query, query, attention_mask=None, segments=segments)  # as some families call it
    with pytest.raises(NotImplementedError):
        tree_attention(None, query, query, query, None, **{"segments": segments} | option)


@given(
    st.lists(st.tuples(st.integers(1, 9), st.lists(st.integers(0, 9), min_size=1, max_size=4)), min_size=1, max_size=9),
    st.integers(1, 60),
)
@settings(max_examples=100, deadline=None)
def test_micro_batches_hold_everything_once_and_keep_the_budget(shapes, budget):
    examples = random_examples(shapes)
    for layout in ("tree", "padded"):
        groups = micro_batches(examples, budget, layout)
        assert sorted(i for group in groups for i in group) == [*range(len(examples))]
        for group in groups:
            batch = collate([examples[i] for i in group], layout, 0)
            assert len(group) == 1 or batch.input_ids.numel() <= budget
        assert [tokens(e, layout) for e in examples] == [collate([e], layout, 0).input_ids.numel() for e in examples]


@pytest.mark.parametrize("layout", ["tree", "padded"])
def test_a_batch_is_sent_to_a_gpu_once_from_pinned_memory(layout, monkeypatch):
    """On a machine without CUDA any other copy to the device would fail."""
    examples, pinned, sent, to = random_examples(SHAPES), set(), [], torch.Tensor.to
    want = collate(examples, layout, 0)

    def stay(x, *args, **kwargs):
        if args and torch.device("cuda") in (args[0], kwargs.get("device")):
            sent.append((x.data_ptr() in pinned, kwargs))
            return x
        return to(x, *args, **kwargs)

    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda x: pinned.add(x.data_ptr()) or x)
    monkeypatch.setattr(torch.Tensor, "to", stay)
    got = collate(examples, layout, 0, torch.device("cuda"))
    assert sent == [(True, {"non_blocking": True})]
    for name, x in vars(want).items():
        assert not isinstance(x, torch.Tensor) or torch.equal(x, getattr(got, name))


def varlen_attn_2_11(q, k, v, cu_seq_q, cu_seq_k, max_q, max_k, *, scale=None, window_size=(-1, -1)):
    assert q.shape[1] == k.shape[1]
    return varlen._varlen_attn(q, k, v, cu_seq_q, cu_seq_k, max_q, max_k, False, scale, [*window_size])[0]


def varlen_attn_2_13(q, k, v, cu_seq_q, cu_seq_k, max_q, max_k, *, scale=None, window_size=(-1, -1), enable_gqa=False):
    assert enable_gqa == (q.shape[1] != k.shape[1])
    return varlen._varlen_attn(q, k, v, cu_seq_q, cu_seq_k, max_q, max_k, False, scale, [*window_size])[0]


VERSIONS = pytest.mark.parametrize("call", [varlen_attn_2_11, varlen_attn_2_13])


def queries_keys_values(examples, dtype):
    g, t = torch.Generator().manual_seed(0), sum(map(tokens, examples))
    qkv = [torch.randn(1, t, h, 16, generator=g, dtype=dtype).transpose(1, 2) for h in (6, 2, 2)]  # as a model has them
    return [x.requires_grad_() for x in qkv]


@VERSIONS
@pytest.mark.parametrize("dtype,bound", [(torch.float32, 1e-6), (torch.float64, 1e-14)])
@pytest.mark.parametrize("window", [None, 7, 60])
@pytest.mark.parametrize("shapes", [[(9, [30, 17]), (40, [3, 50, 8]), (1, [2, 0])], [(9, [30]), (5, [6])]])
def test_flash_path_against_dense_attention(call, dtype, bound, window, shapes, monkeypatch):
    """Grouped heads, fewer queries than keys, forward and backward; the dense one has a mask made token by token."""
    monkeypatch.setattr(varlen, "varlen_attn", call)
    examples = random_examples(shapes)
    batch = collate(examples, "tree", 0)
    qkv = queries_keys_values(examples, dtype)
    out = _flash(*qkv, 0.3, window, batch.segments)

    parts = [(i, j) for i, e in enumerate(examples) for j, part in enumerate([e.prompt, *e.responses]) for _ in part]
    tree, branch = rearrange(torch.tensor(parts), "t two -> two t")  # branch 0 is the prompt
    distance = batch.position_ids[0][:, None] - batch.position_ids[0]
    seen = (tree[:, None] == tree) & ((branch == 0) | (branch[:, None] == branch))
    seen &= (distance >= 0) & (distance < (window or len(tree)))
    exact = [x.detach().double().requires_grad_() for x in qkv]
    truth = scaled_dot_product_attention(*exact, seen, scale=0.3, enable_gqa=True).transpose(1, 2)
    assert out.shape == truth.shape and (out - truth).abs().max() < 10 * bound
    upstream = torch.randn(truth.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    (out * upstream).sum().backward()
    (truth * upstream).sum().backward()
    for mine, right in zip(qkv, exact, strict=True):
        assert relative(mine.grad, right.grad) < bound


def operators_and_nodes(qkv, segments) -> tuple[Counter, Counter]:
    """Operators and autograd nodes of the flash path forward and backward, by name, without those of the stand-in."""
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        out = _flash(*qkv, 0.25, None, segments)
        out.backward(torch.ones_like(out))

    def ours(event) -> bool:
        return event is None or event.name != "stand-in" and ours(event.cpu_parent)

    names = [event.name for event in profiled.events() if ours(event)]
    nodes = Counter(name for name in names if name.startswith("autograd::engine::evaluate_function"))
    return Counter(name for name in names if name.startswith("aten::")), nodes


@VERSIONS
def test_operators_and_autograd_nodes_do_not_depend_on_the_number_of_segments(call, monkeypatch):
    monkeypatch.setattr(varlen, "varlen_attn", call)
    counts = []
    for shapes in ([(48, [64, 80])] * 2, [(3, [4, 5])] * 32):
        examples = random_examples(shapes)
        segments = collate(examples, "tree", 0).segments
        counts.append(
            (len(segments.parts), *operators_and_nodes(queries_keys_values(examples, torch.float32), segments))
        )
    (few, few_operators, few_nodes), (many, many_operators, many_nodes) = counts
    assert (few, many) == (4, 64) and few_operators == many_operators and few_nodes == many_nodes
    assert few_operators["aten::index_select"] == 2 and few_operators["aten::index_add_"] == 2
    assert "aten::item" not in few_operators and "aten::_local_scalar_dense" not in few_operators
    examples = random_examples([(9, [30]), (5, [6])])  # no shared prompt
    segments = collate(examples, "tree", 0).segments
    operators, _ = operators_and_nodes(queries_keys_values(examples, torch.float32), segments)
    assert "aten::index_select" not in operators and sum(operators.values()) < sum(few_operators.values())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("window", [None, 7])
def test_flash_path_against_float64(window):
    """Grouped heads, fewer queries than keys, forward and backward."""
    examples = random_examples([(9, [30, 17]), (40, [3, 50, 8])])
    segments = collate(examples, "tree", 0, "cuda").segments
    length = sum(tokens(e) for e in examples)
    g = torch.Generator("cuda").manual_seed(0)
    qkv = [torch.randn(1, h, length, 64, generator=g, device="cuda").bfloat16().requires_grad_() for h in (4, 2, 2)]
    exact = [x.detach().double().requires_grad_() for x in qkv]
    flash, _ = tree_attention(None, *qkv, None, sliding_window=window, segments=segments)
    truth, _ = tree_attention(None, *exact, None, sliding_window=window, segments=segments)  # SDPA, for float64
    assert (flash.double() - truth).abs().max() < 2e-2
    upstream = torch.randn(truth.shape, generator=g, device="cuda", dtype=torch.float64)
    (flash.double() * upstream).sum().backward()
    (truth * upstream).sum().backward()
    for mine, right in zip(qkv, exact, strict=True):
        assert relative(mine.grad.double(), right.grad) < 2e-2
