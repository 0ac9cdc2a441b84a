"""AdamW for bfloat16 weights whose float32 masters are exact, and the dither that lets a forward pass see them move.

A float32 master is split into the bfloat16 weight that the model computes with and 16 bits that only the optimizer
reads. As integers:

    bits(master) = 2^16 * bits(weight) + low,        -2^15 <= low < 2^15

so the weight is the master rounded to the nearest bfloat16 (ties away from zero), and no second copy of it exists. A
step joins them, updates the master as `torch.optim.AdamW` would in float32, and splits it again.

A checkpoint in bfloat16 has low bits of 0: its masters lie on the grid of bfloat16. At the learning rates of preference
learning a master then moves for many steps before its weight does, and because all updates of a weight tend the same
way, loss, margins and KL see only a part of what was learned. `dither` draws those low bits at random. No weight
changes, but when a master moves by a share s of a grid step, its weight moves by a whole one with probability s: the
forward pass sees every update on average. (Stochastic rounding, arXiv 2010.06192, draws anew at every step.)

`compress` keeps both moments together in 16 bits, block by block (after Dettmers et al. 2022, arXiv 2110.02861).
"""

import functools
import hashlib
from collections.abc import Iterable, Iterator
from typing import no_type_check

import torch
from einops import rearrange
from jaxtyping import BFloat16, Float32, Int16
from torch import Tensor

from rlhf.logprobs import compiled

CHUNK = 1 << 24  # elements that are updated at once, which bounds the temporary memory; a multiple of BLOCK
BLOCK = 256  # elements whose compressed moments share their scales
LowBits = dict[torch.nn.Parameter, Int16[Tensor, "..."]]  # of the masters, by their bfloat16 weight


def split(master: Float32[Tensor, "*shape"]) -> tuple[BFloat16[Tensor, "*shape"], Int16[Tensor, "*shape"]]:
    """The bfloat16 weight and the 16 low bits of a float32 master. Exact for every finite master: `join` undoes it."""
    bits = master.view(torch.int32)
    high = (bits + 0x8000) >> 16
    return high.to(torch.int16).view(torch.bfloat16), (bits - (high << 16)).to(torch.int16)


def join(weight: BFloat16[Tensor, "*shape"], low: Int16[Tensor, "*shape"]) -> Float32[Tensor, "*shape"]:
    """The float32 master of a weight and its low bits."""
    return ((weight.view(torch.int16).to(torch.int32) << 16) + low).view(torch.float32)


def dither(weight: BFloat16[Tensor, "*shape"], name: str, seed: int) -> Int16[Tensor, "*shape"]:
    """Random low bits for a weight whose master lies on the grid of bfloat16.

    low ~ U{-32767, ..., 32766}, by a hash of the seed, the weight's name and the element's index: device and order do
    not matter. A weight of 0 gets |low|, because below 0 its sign would change. `split` gives the same weight for all.
    """
    low = torch.empty_like(weight, dtype=torch.int16).view(-1)
    key = int.from_bytes(hashlib.sha256(f"{seed} {name}".encode()).digest()[:4], "little")
    for part in _chunks(low.numel()):
        x = torch.arange(part.start, part.stop, device=weight.device) + key
        for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B), (16, 1)):  # lowbias32, Wellons 2018
            x = ((x ^ ((x & 0xFFFFFFFF) >> shift)) * factor) & 0xFFFFFFFF
        x = x % 0xFFFE - 0x7FFF
        low[part] = torch.where(weight.reshape(-1)[part] == 0, x.abs(), x)
    return low.view(weight.shape)


@no_type_check  # it may be compiled
def compress(
    m: Float32[Tensor, " n"], v: Float32[Tensor, " n"], step: int
) -> tuple[Int16[Tensor, " n"], Float32[Tensor, "blocks 3"]]:
    """The two moments of AdamW in 16 bits together, with three float32 scales for every block of 256 elements.

        code   = 512 code_m + code_v
        code_v = 1 + floor(510 (log2 v - low) / (high - low) + u),     low, high: the smallest and largest log2 v > 0
        code_m = sign(m) floor(63 sqrt(|m| / (top sqrt(v'))) + u),     top: the largest |m| / sqrt(v'), v' = decoded v

    n is a multiple of 256; v = 0 has code 0. What is coded is m / sqrt(v), which the update consists of: the error of
    an update is small whatever the gradients' sizes in a block, and no update explodes where v is rounded. `low` is at
    least high - 40, and a decoded v at least 2^-126: both raise the smallest v.

    u in [0, 1) is the fractional part of 0.7549 i + 0.618 step for element i of a block. Rounding to nearest would
    lose every change of v, about 0.1 % a step where codes are up to 6 % apart; with u, log2 v is right on average.
    v adds up the rounding errors of about 1,000 steps and m those of ten (beta2 = 0.999, beta1 = 0.9): so v has 9 bits.
    """
    m, v = (rearrange(x, "(blocks i) -> blocks i", i=BLOCK) for x in (m, v))
    index = torch.arange(BLOCK, device=v.device, dtype=torch.float64)
    u = (0.7548776662466927 * index + 0.6180339887498949 * step) % 1
    u = u.float().clamp_max(1 - 2**-15)  # 510 + u and 63 + u must not round up to the next integer
    log_v = v.log2().clamp_max(127)  # of an infinite v too, which would make its whole block NaN
    high = log_v.amax(1, keepdim=True).clamp_min(-126)
    low = torch.where(v > 0, log_v, high).amin(1, keepdim=True).maximum(high - 40)
    share = ((log_v - low).clamp_min(0) / (high - low).clamp_min(1e-30)).clamp_max(1)  # compiled, x / x may exceed 1
    code_v = torch.where(v > 0, 1 + (510 * share + u).floor(), 0)
    ratio = torch.where(v > 0, m / _decode_v(code_v, low, high).sqrt(), 0)
    top = ratio.abs().amax(1, keepdim=True)
    code_m = ratio.sign() * (63 * (ratio.abs() / top.clamp_min(1e-30)).clamp_max(1).sqrt() + u).floor()
    return (512 * code_m + code_v).to(torch.int16).view(-1), torch.cat([top, low, high], dim=1)


@no_type_check
def decompress(
    code: Int16[Tensor, " n"], scales: Float32[Tensor, "blocks 3"]
) -> tuple[Float32[Tensor, " n"], Float32[Tensor, " n"]]:
    """The moments m and v of `compress`, up to rounding."""
    top, low, high = scales.split(1, dim=1)
    code = rearrange(code, "(blocks i) -> blocks i", i=BLOCK)
    v = _decode_v((code & 511).float(), low, high)
    code_m = (code >> 9).float() / 63
    return (code_m * code_m.abs() * top * v.sqrt()).view(-1), v.view(-1)


@no_type_check
def _decode_v(code: Float32[Tensor, "blocks 256"], low: Float32[Tensor, "blocks 1"], high: Float32[Tensor, "blocks 1"]):
    return torch.where(code > 0, (low + (code - 1) / 510 * (high - low)).exp2().clamp_min(2**-126), 0)


class AdamW(torch.optim.Optimizer):
    """AdamW (Loshchilov and Hutter 2019, arXiv 1711.05101, Algorithm 2) on exact float32 masters.

        master -= lr * weight_decay * master
        m = beta1 m + (1 - beta1) g        v = beta2 v + (1 - beta2) g^2
        master -= lr * (m / (1 - beta1^t)) / (sqrt(v / (1 - beta2^t)) + eps)

    `low_bits` has the low bits of each bfloat16 weight, which change in place; a float32 weight is its own master. On a
    CPU the result equals that of `torch.optim.AdamW(foreach=False, fused=False)` in float32 bit for bit; on CUDA one
    kernel gives it up to rounding. The gradients of a step's micro-batches add up in `gradient_dtype`. The moments m
    and v are float32; with `eight_bits` those of matrices are stored by `compress`: 2.05 bytes an element, not 8.
    """

    def __init__(
        self,
        weights: Iterable[torch.nn.Parameter],
        low_bits: LowBits,
        lr: float,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        gradient_dtype: torch.dtype = torch.float32,
        eight_bits: bool = False,
    ):
        self.low_bits, self.sums, self.eight_bits = low_bits, {}, eight_bits
        for weight in low_bits if gradient_dtype == torch.float32 else ():
            weight.grad_dtype = None  # any: that of the output head is float32
            weight.register_post_accumulate_grad_hook(functools.partial(_add_to, self.sums))
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__([weight for weight in weights if weight.requires_grad], defaults)

    def collect_gradients(self) -> None:
        """Put the sums over the micro-batches into `.grad`, where clipping and `step` look for them."""
        for weight, total in self.sums.items():
            weight.grad = total
        self.sums.clear()

    @torch.no_grad()
    def step(self) -> None:
        """Update every weight that has a gradient."""
        self.collect_gradients()
        for group in self.param_groups:
            for weight in group["params"]:
                if weight.grad is None:
                    continue
                eight_bits = self.eight_bits and weight.ndim > 1
                state = self.state[weight]
                if not state:
                    state |= {"step": 0} | _zero_moments(weight, eight_bits)
                state["step"] += 1
                t, (beta1, beta2) = state["step"], group["betas"]
                scalars = 1 - group["lr"] * group["weight_decay"], 1 - beta1, beta2, 1 - beta2
                scalars += (1 - beta2**t) ** 0.5, group["eps"], group["lr"] / (1 - beta1**t)
                flat = [None if x is None else x.view(-1) for x in (weight.data, self.low_bits.get(weight))]
                flat.append(weight.grad.reshape(-1))
                moments = [] if eight_bits else [state[name].view(-1) for name in ("exp_avg", "exp_avg_sq")]
                for part in _chunks(weight.numel()):
                    pieces = [None if x is None else x[part] for x in flat]
                    if eight_bits:
                        _update_compressed(*pieces, state["codes"], state["scales"], part, t, *scalars)
                    else:
                        _update(*pieces, *(x[part] for x in moments), *scalars)

    def load_state_dict(self, state_dict: dict) -> None:
        """Continue from a `state_dict`. (The base class would round each moment to the dtype of its weight.)"""
        for group, saved in zip(self.param_groups, state_dict["param_groups"], strict=True):
            group |= {name: value for name, value in saved.items() if name != "params"}
        weights = [weight for group in self.param_groups for weight in group["params"]]
        for i, saved in state_dict["state"].items():
            device = weights[i].device
            self.state[weights[i]] = {name: int(x) if name == "step" else x.to(device) for name, x in saved.items()}


def _update(weight, low, gradient, m, v, decay, rise1, beta2, rise2, correction, eps, lr) -> None:
    """One step of AdamW on a flat piece of a weight, in place; on a CPU by torch's operations in torch's order."""
    if weight.is_cuda:
        from rlhf import kernels

        return kernels.adamw(weight, low, gradient, m, v, decay, rise1, beta2, rise2, correction, eps, lr)
    master = weight if low is None else join(weight, low)
    gradient = gradient.to(torch.float32)
    master.mul_(decay)
    m.lerp_(gradient, rise1)
    v.mul_(beta2).addcmul_(gradient, gradient, value=rise2)
    master.addcdiv_(m, (v.sqrt() / correction).add_(eps), value=-lr)
    if low is not None:
        for place, half in zip((weight, low), split(master), strict=True):
            place.copy_(half)


def _add_to(sums: dict[torch.nn.Parameter, Tensor], weight: torch.nn.Parameter) -> None:
    """Move a micro-batch's gradient to the sums. (A float32 `.grad` of a bfloat16 weight would keep torch.compile from
    tracing the weight's layer. The weight keeps this hook, so the hook must not keep the optimizer.)"""
    if weight in sums:
        sums[weight] += weight.grad
    else:
        sums[weight] = weight.grad.float()
    weight.grad = None


def _zero_moments(weight: torch.nn.Parameter, eight_bits: bool) -> dict[str, Tensor]:
    """AdamW's state before its first step; in 8 bits, of whole blocks."""
    if not eight_bits:
        return {name: torch.zeros_like(weight, dtype=torch.float32) for name in ("exp_avg", "exp_avg_sq")}
    blocks = -(-weight.numel() // BLOCK)
    codes = weight.new_zeros(blocks * BLOCK, dtype=torch.int16)
    return {"codes": codes, "scales": weight.new_zeros(blocks, 3, dtype=torch.float32)}


def _update_compressed(weight, low, gradient, codes, scales, part: slice, step: int, *scalars) -> None:
    """`_update` on the slice `part` of a weight whose moments are compressed, in place."""
    blocks = slice(part.start // BLOCK, -(-part.stop // BLOCK))
    padded = slice(blocks.start * BLOCK, blocks.stop * BLOCK)
    pack, unpack = (compiled(x) if weight.is_cuda else x for x in (compress, decompress))
    m, v = unpack(codes[padded].data, scales[blocks].data)
    _update(weight, low, gradient, m[: len(weight)], v[: len(weight)], *scalars)
    codes[padded], scales[blocks] = pack(m, v, step)


def _chunks(elements: int) -> Iterator[slice]:
    """Slices of at most CHUNK elements that cover a flat tensor."""
    return (slice(start, min(start + CHUNK, elements)) for start in range(0, elements, CHUNK))
