"""Draw each loss and its gradient as functions of the margin, in docs/losses.svg: python -m docs.plot_losses"""

from collections.abc import Callable
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from torch import Tensor

from rlhf import losses

BETA, E, STARTING_LOGP = 1.0, 0.1, -3.5
LOSS, SLOPE, GREY = "#1f4e9c", "#c44e00", "#9a9a9a"


def kto_of_pair(c: Tensor, r: Tensor) -> Tensor:
    z0, desirable = torch.tensor(1.0), torch.ones(len(c), dtype=torch.bool)
    return losses.kto(c, desirable, z0, BETA) + losses.kto(r, ~desirable, z0, BETA)


def under(divergence: str) -> Callable[[Tensor, Tensor], Tensor]:
    reward = lambda D: losses.implicit_reward(D, torch.zeros_like(D), divergence)  # noqa: E731
    return lambda c, r: losses.dpo(reward(c), reward(r), BETA)


def one_token(loss: Callable[..., Tensor], *settings: float) -> Callable[[Tensor, Tensor], Tensor]:
    """A loss on mean log-probs per token: both responses have one token, whose log-prob is STARTING_LOGP at h = 0."""

    def of_logratios(c: Tensor, r: Tensor) -> Tensor:
        lengths = torch.ones(len(c), dtype=torch.long)
        return loss(STARTING_LOGP + c, STARTING_LOGP + r, lengths, lengths, *settings)

    return of_logratios


PANELS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "dpo": lambda c, r: losses.dpo(c, r, BETA),
    "conservative dpo, e = 0.1": lambda c, r: losses.dpo(c, r, BETA, E),
    "robust, e = 0.1": lambda c, r: losses.robust(c, r, BETA, E),
    "hinge": lambda c, r: losses.hinge(c, r, BETA),
    "ipo": lambda c, r: losses.ipo(c, r, BETA),
    "exo, e = 0.1": lambda c, r: losses.exo(c, r, BETA, E),
    "discopop, discopop_tau = 0.05": lambda c, r: losses.discopop(c, r, BETA, 0.05),
    "dpop, dpop_lambda = 1": lambda c, r: losses.dpop(c, r, BETA, 1.0),
    "simpo, gamma = 0.5": one_token(losses.simpo, BETA, 0.5),
    "orpo, orpo_lambda = 1": one_token(losses.orpo, 1.0),
    "nca": lambda c, r: losses.nca(c, r, BETA),
    "bco": lambda c, r: losses.bco(c, r, BETA),
    "apo_zero": lambda c, r: losses.apo_zero(c, r, BETA),
    "apo_down": lambda c, r: losses.apo_down(c, r, BETA),
    "kto, both sides, z0 = 1": kto_of_pair,
    "sppo": lambda c, r: losses.sppo(c, r, BETA),
    "dpo, forward KL": under("forward_kl"),
    "dpo, JS": under("js"),
    "dpo, alpha = 0.5": under("alpha"),
    "chi-PO": under("chi_po"),
}


def main() -> None:
    plt.rcParams.update({"svg.hashsalt": "losses", "font.size": 9})
    plt.rcParams.update({"axes.spines.top": False, "axes.spines.right": False})
    h = torch.linspace(-6, 6, 241)
    figure, axes = plt.subplots(4, 5, figsize=(11, 9), sharex=True, sharey=True, layout="constrained")
    for axis, (title, loss) in zip(axes.flat, PANELS.items(), strict=True):
        margin = h.clone().requires_grad_()
        value = loss(margin / 2, -margin / 2)
        (gradient,) = torch.autograd.grad(value.sum(), margin)
        axis.axhline(0, color="black", linewidth=0.6)
        axis.axvline(0, color="black", linewidth=0.6)
        axis.plot(h, PANELS["dpo"](h / 2, -h / 2), color=GREY, linewidth=1, label="loss of dpo")
        axis.plot(h, value.detach(), color=LOSS, linewidth=2, label="loss")
        axis.plot(h, gradient, color=SLOPE, linewidth=1.6, linestyle="--", label="its gradient in h")
        axis.set(title=title, xlim=(-6, 6), ylim=(-2.5, 6), xticks=range(-6, 7, 3), yticks=range(-2, 7, 2))
    figure.supxlabel("margin h = D_w - D_l in nats, with D_w = h / 2, D_l = -h / 2 and beta = 1")
    figure.legend(*axes[0, 1].get_legend_handles_labels(), loc="outside upper center", ncols=3, frameon=False)
    figure.savefig(Path(__file__).with_name("losses.svg"), metadata={"Date": None})


if __name__ == "__main__":
    main()
