"""A batch decides how a model attends to it: no call to remember before it, no attribute of ours on the model."""

import pytest
import torch
from tiny import cached_logps, random_examples, tiny

from rlhf.tree import collate
from support import models, reviews, scoring
from support.generate import generate

EXAMPLES = random_examples([(7, [5, 9]), (12, [3, 14])])
FAMILIES = ["llama", "mistral", "gpt2", "gemma3_text"]


def logps(model, layout: str) -> torch.Tensor:
    return scoring.response_logps(model, collate(EXAMPLES, layout, 0))[0]


def gradient(model, layout: str, between=lambda model: None) -> torch.Tensor:
    """Of the sum of all log-probs; `between` is called between the forward and the backward pass."""
    model.zero_grad()
    total = logps(model, layout).sum()
    between(model)
    total.backward()
    return torch.cat([w.grad.flatten() for w in model.parameters()])


def sample(model) -> None:
    generate(model, reviews.tokenizer(), [[5, 6], [7]], 4)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_packed_batch_is_right_after_sampling_and_a_plain_one_after_a_packed_one(name):
    model = tiny(name)
    with torch.no_grad():
        plain = logps(model, "padded")
        for _ in range(2):
            sample(model)
            assert torch.allclose(logps(model, "tree"), plain, rtol=0, atol=1e-4)
            assert torch.equal(logps(model, "padded"), plain)
        cached = torch.cat(
            [torch.cat(cached_logps(model, [e.prompt] * len(e.responses), e.responses, 1.0, 0)) for e in EXAMPLES]
        )
        assert torch.allclose(cached, plain, rtol=0, atol=1e-4)


def test_the_padded_attention_would_be_wrong_for_a_packed_batch(monkeypatch):
    """So the test above can fail: with the attention left as sampling needs it, log-probs are off."""
    model = tiny("llama")
    plain = logps(model, "padded")
    sample(model)
    monkeypatch.setattr(models, "set_attention", lambda *args, **kwargs: None)
    assert (logps(model, "tree") - plain).abs().max() > 0.1


def test_a_plain_call_of_a_model_left_in_the_packed_attention_is_refused():
    model = tiny("llama")
    logps(model, "tree")
    with pytest.raises(NotImplementedError, match="no segments reach the attention over packed trees"):
        model(torch.tensor([[5, 6, 7]]))


@pytest.mark.parametrize("first, second", [("tree", "padded"), ("padded", "tree")])
@pytest.mark.parametrize("name", FAMILIES)
def test_checkpointed_gradients_are_right_if_the_other_layout_came_before_the_backward_pass(name, first, second):
    model = tiny(name)
    want = gradient(model, first)
    models.checkpoint_layers(model)
    assert torch.allclose(gradient(model, first), want, rtol=1e-4, atol=1e-5)

    def other(model):
        with torch.no_grad():
            logps(model, second)

    assert torch.allclose(gradient(model, first, other), want, rtol=1e-4, atol=1e-5)
    attention = model.config._attn_implementation
    assert attention.startswith("tree_") == (second == "tree")  # as the last batch left it


def test_checkpointed_gradients_would_be_wrong_if_the_recomputation_took_the_current_attention(monkeypatch):
    """So the test above can fail."""
    model = tiny("llama")
    want = gradient(model, "tree")
    monkeypatch.setattr(models, "Attention", lambda *args: models.nullcontext())
    models.checkpoint_layers(model)

    def other(model):
        with torch.no_grad():
            logps(model, "padded")

    try:
        wrong = gradient(model, "tree", other)
    except Exception:
        return
    assert (wrong - want).norm() > 1e-2 * want.norm()


def test_nothing_of_ours_hangs_on_the_model():
    """Whatever is done with a model adds only the library's private attributes to it."""
    model = tiny("llama")
    public = {name for name in vars(model) if not name.startswith("_")}
    models.checkpoint_layers(model)
    sample(model)
    logps(model, "tree").sum().backward()
    scoring.choose_layout(model, EXAMPLES, scoring.Batching("auto"))
    assert {name for name in vars(model) if not name.startswith("_")} == public


def test_two_backward_passes_recompute_twice():
    model = tiny("llama")
    models.checkpoint_layers(model)
    total = scoring.response_logps(model, collate(EXAMPLES, "tree", 0), keep_bytes=0)[0].sum()
    total.backward(retain_graph=True)
    first = [w.grad.clone() for w in model.parameters()]
    total.backward()
    assert all(
        torch.allclose(w.grad, 2 * x, rtol=1e-4, atol=1e-5) for w, x in zip(model.parameters(), first, strict=True)
    )


@pytest.mark.parametrize("device, on", [("cpu", True), ("cuda", False)])
def test_scoring_rows_on_cuda_switches_the_attention_of_cudnn_off(device, on, monkeypatch):
    """It makes a plan for each new shape. The model says that it is on the device, and computes on the CPU."""
    model, before = tiny("llama"), torch.backends.cuda.cudnn_sdp_enabled()
    monkeypatch.setattr(type(model), "device", torch.device(device))
    torch.backends.cuda.enable_cudnn_sdp(True)
    try:
        logps(model, "padded")
        assert torch.backends.cuda.cudnn_sdp_enabled() == on
    finally:
        torch.backends.cuda.enable_cudnn_sdp(before)
