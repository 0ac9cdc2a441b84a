"""The CUDA kernel of rlhf/optim.py, in Triton. Imported only where it runs, since no CPU build of torch has Triton."""

import triton
import triton.language as tl

BLOCK = 1024  # elements of one program


@triton.jit
def _adamw(weights, lows, gradients, ms, vs, n, decay, rise1, beta2, rise2, correction, eps, lr, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < n
    if lows is not None:
        high, low = tl.load(weights + at, inside).to(tl.int32), tl.load(lows + at, inside).to(tl.int32)
        master = ((high << 16) + low).to(tl.float32, bitcast=True)
    else:
        master = tl.load(weights + at, inside)
    gradient = tl.load(gradients + at, inside).to(tl.float32)
    m, v = tl.load(ms + at, inside), tl.load(vs + at, inside)
    m += rise1 * (gradient - m)
    v = beta2 * v + rise2 * gradient * gradient
    master = decay * master - lr * m / (tl.sqrt_rn(v) / correction + eps)
    if lows is not None:
        bits = master.to(tl.int32, bitcast=True)
        high = (bits + 0x8000) >> 16
        tl.store(weights + at, high.to(tl.int16), inside)
        tl.store(lows + at, (bits - (high << 16)).to(tl.int16), inside)
    else:
        tl.store(weights + at, master, inside)
    tl.store(ms + at, m, inside)
    tl.store(vs + at, v, inside)


def adamw(weight, low, gradient, m, v, *scalars: float) -> None:
    """`optim._update` for a weight of n elements: one launch, 28 bytes of traffic an element."""
    n, weight = weight.numel(), weight if low is None else weight.view(low.dtype)
    _adamw[(triton.cdiv(n, BLOCK),)](weight, low, gradient, m, v, n, *scalars, BLOCK=BLOCK)
