"""A bfloat16 run of 135 M weights never holds a float32 copy of its model: counted by what is allocated on a CPU."""

import pytest
import torch
import transformers
from test_resume import pairs, write_rows
from tiny import Bfloat16Products

import train_dpo
from rlhf import optim
from support import memory, models, reviews, sharding
from support.runs import Run


class Float32Bytes(memory.LiveBytes):
    """Bytes of the float32 tensors on the CPU that operations inside made and that are alive. `peak` is that while
    `counting`."""

    counting = True

    def _add(self, x: torch.Tensor) -> None:
        if x.dtype == torch.float32 and x.device.type == "cpu":
            peak = self.peak
            super()._add(x)
            self.peak = self.peak if self.counting else peak


@pytest.mark.slow
@pytest.mark.parametrize("lora_rank", [0, 8])
def test_nothing_holds_the_model_in_float32(lora_rank, tmp_path, monkeypatch):
    """Reference scoring, two steps, their checkpoint, and the answers before and after. Not counted is what stays in
    main memory when there is a GPU: loading, the masters of a checkpoint, saving; but it counts if it stays alive."""
    config = transformers.LlamaConfig(  # SmolLM2-135M's
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        tie_word_embeddings=True,
        max_position_embeddings=512,
        bos_token_id=1,
        eos_token_id=2,
    )
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config)
    size = 4 * model.num_parameters()
    assert size == 4 * 134_515_008
    model.save_pretrained(tmp_path / "model")
    reviews.tokenizer().save_pretrained(tmp_path / "model")
    write_rows(tmp_path / "pairs.jsonl", pairs(4))
    del model
    mode = Float32Bytes()
    monkeypatch.setattr(memory, "MOST_OPERATIONS", 10**9)  # a limit for traces
    monkeypatch.setattr(optim, "CHUNK", 1 << 20)  # its temporaries are as large for any model, and this one is small

    def uncounted(function, after: bool):
        def call(*args, **kwargs):
            mode.counting = False
            try:
                return function(*args, **kwargs)
            finally:
                mode.counting = after

        return call

    for module, name, after in (
        (sharding, "load", True),
        (sharding, "load_trained", True),
        (models, "trained", False),  # until the checkpoint is written
        (Run, "save_checkpoint", True),
        (models, "save", False),
    ):
        monkeypatch.setattr(module, name, uncounted(getattr(module, name), after))
    checkpoints = []
    trained = models.trained
    monkeypatch.setattr(models, "trained", lambda *args: checkpoints.append(None) or trained(*args))
    flags = {"model": str(tmp_path / "model"), "data": str(tmp_path / "pairs.jsonl"), "out": str(tmp_path / "out")}
    flags |= {"dtype": "bfloat16", "optimizer_state": "8bit", "gradient_dtype": "bfloat16", "device": "cpu"}
    flags |= {"gradient_checkpointing": True, "batch_size": 1, "max_steps": 2, "eval_fraction": 0.3, "save_every": 1}
    flags |= {"eval_prompts": 1, "max_new_tokens": 4, "lora_rank": lora_rank, "ref_cache": str(tmp_path / "cache")}
    with Bfloat16Products(), mode:
        train_dpo.main(train_dpo.Args(**flags))
    # on a CPU the kernel has the head and its gradient in float32, each a fifth of these weights
    assert len(checkpoints) == 2 and 0.05 * size < mode.peak < 0.5 * size
