"""How much of what it learns does a bfloat16 run see?    python check.py MODEL LEARNING_RATE
DPO on three pairs, float32 weights under bfloat16 autocast: the mean margin of log-ratios as that forward pass has it
(seen), and as the same weights have it in float32 (true)."""

import sys

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

PAIRS = [  # prompt, chosen, rejected
    ("Why is the sky blue?", " Air scatters blue light more than red light.", " It just is, do not ask me."),
    ("Is it safe to eat raw flour?", " No, it can carry germs until it is cooked.", " Yes, eat all that you like."),
    ("How long do I boil an egg?", " About nine minutes, if it should be hard.", " Until the pan is empty."),
]
device, tokenizer = "cuda" if torch.cuda.is_available() else "cpu", AutoTokenizer.from_pretrained(sys.argv[1])
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32).to(device).eval()
optimizer = torch.optim.AdamW(model.parameters(), lr=float(sys.argv[2]), weight_decay=0.0)


def logp(prompt, response):
    before, after = (tokenizer(text, add_special_tokens=False).input_ids for text in (prompt, response))
    ids = torch.tensor([before + after], device=device)
    logps = model(ids).logits[0].float().log_softmax(-1)[:-1].gather(1, ids[0, 1:, None])
    return logps[len(before) - 1 :].sum()


def margins(dtype):
    with torch.autocast(device, dtype, enabled=dtype != torch.float32):
        return torch.stack([logp(prompt, good) - logp(prompt, bad) for prompt, good, bad in PAIRS])


first, true_first = (margins(dtype).detach() for dtype in (torch.bfloat16, torch.float32))
for update in range(1, 9):
    torch.nn.functional.softplus(-0.1 * (margins(torch.bfloat16) - first)).mean().backward()  # DPO's loss, beta 0.1
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    with torch.no_grad():
        seen, true = ((margins(x) - y).mean() for x, y in ((torch.bfloat16, first), (torch.float32, true_first)))
    print(f"update {update}: seen {seen:7.3f}, true {true:7.3f} nats, seen / true {seen / true:.2f}")
