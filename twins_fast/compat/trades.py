"""The losses of TRADES, MART and AWP under the names of their authors' code.

``from twins_fast.compat.trades import trades_loss`` in place of ``from trades import trades_loss``
(https://github.com/yaodongyu/TRADES); so for ``mart_loss`` (https://github.com/YisenWang/MART) and for
``AdvWeightPerturb``, ``TradesAWP`` and ``perturb_input`` (https://github.com/csdongxian/AWP).
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer

from twins_fast.attacks import PGD
from twins_fast.compat.balls import BallPGD, BoxFirstBall

_NOISE = 0.001  # standard deviation of the start
_TINY = 1e-20  # as the authors of AWP divide


def trades_loss(
    model: nn.Module,
    x_natural: Tensor,
    y: Tensor,
    optimizer: Optimizer,
    step_size: float = 0.003,
    epsilon: float = 0.031,
    perturb_steps: int = 10,
    beta: float = 1.0,
    distance: str = "l_inf",
    *,
    engine: str = "auto",
    amp_dtype: torch.dtype | None = None,
) -> Tensor:
    """CE(f(x)) + beta / B * KL_sum(f(x) || f(x_adv)) (arXiv 1901.08573), a scalar to call ``backward()`` on.

    The network is attacked in eval mode and left in train mode; as in the original it sees clean, adversarial and again
    clean images in train mode, and the optimizer's gradients are zeroed.

    Args:
        model: maps images [B, C, H, W] in [0, 1] to logits.
        x_natural, y: images and int64 labels [B].
        optimizer: of the model.
        step_size, epsilon, perturb_steps: of the attack; with ``l_2`` a step is 2 * epsilon / perturb_steps long.
        beta: weight of the divergence.
        distance: ``"l_inf"`` or ``"l_2"``.
        engine, amp_dtype: of :class:`twins_fast.PGD`.

    Raises:
        NotImplementedError: another distance, with which the original does not attack at all.
    """
    attack = _away_from_clean(model, step_size, epsilon, perturb_steps, distance, engine, amp_dtype)
    natural, adversarial = _both_logits(attack, model, x_natural, y, optimizer)
    divergence = F.kl_div(F.log_softmax(adversarial, 1), F.softmax(model(x_natural), 1), reduction="sum")
    return F.cross_entropy(natural, y) + beta * (divergence / len(y))


def mart_loss(
    model: nn.Module,
    x_natural: Tensor,
    y: Tensor,
    optimizer: Optimizer,
    step_size: float = 0.007,
    epsilon: float = 0.031,
    perturb_steps: int = 10,
    beta: float = 6.0,
    distance: str = "l_inf",
    *,
    engine: str = "auto",
    amp_dtype: torch.dtype | None = None,
) -> Tensor:
    """BCE(p_adv, y) + beta / B * sum(KL(p || p_adv) * (1 - p[y])) (ICLR 2020), a scalar to call ``backward()`` on.

    Arguments are those of :func:`trades_loss`; the attack maximises the cross-entropy.

    Raises:
        NotImplementedError: another distance than ``"l_inf"``, with which the original does not attack at all.
    """
    if distance != "l_inf":
        raise NotImplementedError(
            f"distance={distance!r}: the original does not attack then; take the method 'mart' with PGD(norm='l2')"
        )
    attack = PGD(model, epsilon, step_size, perturb_steps, random_start=False, engine=engine, amp_dtype=amp_dtype)
    natural, adversarial = _both_logits(attack, model, x_natural, y, optimizer)
    own = y[:, None]
    probabilities, clean = F.softmax(adversarial, 1), F.softmax(natural, 1)
    strongest_other = probabilities.scatter(1, own, 0.0).amax(1)
    boosted = F.cross_entropy(adversarial, y) - (1.0001 - strongest_other + 1e-12).log().mean()
    divergence = F.kl_div((probabilities + 1e-12).log(), clean, reduction="none").sum(1)
    unsure = divergence * (1.0000001 - clean.gather(1, own)[:, 0])
    return boosted + beta * (unsure.sum() / len(y))


def perturb_input(
    model: nn.Module,
    x_natural: Tensor,
    step_size: float = 0.003,
    epsilon: float = 0.031,
    perturb_steps: int = 10,
    distance: str = "l_inf",
    *,
    engine: str = "auto",
    amp_dtype: torch.dtype | None = None,
) -> Tensor:
    """The images [B, C, H, W] that :func:`trades_loss` trains on; the network is left in eval mode."""
    attack = _away_from_clean(model, step_size, epsilon, perturb_steps, distance, engine, amp_dtype)
    unused = torch.zeros(len(x_natural), dtype=torch.int64, device=x_natural.device)  # labels
    adversarial = _from_noise(attack, x_natural, unused)
    model.eval()
    return adversarial


def _away_from_clean(
    model: nn.Module,
    step_size: float,
    epsilon: float,
    steps: int,
    distance: str,
    engine: str,
    amp_dtype: torch.dtype | None,
) -> PGD:
    """The attack of TRADES."""
    if distance not in ("l_inf", "l_2"):
        raise NotImplementedError(f"distance={distance!r}: the original does not attack then; take 'l_inf' or 'l_2'")
    options: dict[str, Any] = {"random_start": False, "loss": "kl", "engine": engine, "amp_dtype": amp_dtype}
    if distance == "l_inf":
        return PGD(model, epsilon, step_size, steps, **options)
    return BallPGD(BoxFirstBall, model, epsilon, 2 * epsilon / steps, steps, norm="l2", **options)


def _from_noise(attack: PGD, images: Tensor, labels: Tensor) -> Tensor:
    """Adversarial images; the start lies outside of [0, 1], as that of the originals does."""
    start = images.detach() + _NOISE * torch.randn(images.shape, device=images.device, dtype=images.dtype)
    return attack(images, labels, x_init=start)


def _both_logits(
    attack: PGD, model: nn.Module, images: Tensor, labels: Tensor, optimizer: Optimizer
) -> tuple[Tensor, Tensor]:
    """Of clean images and of attacked ones, in train mode."""
    adversarial = _from_noise(attack, images, labels)
    model.train()
    optimizer.zero_grad()
    return model(images), model(adversarial)


class AdvWeightPerturb:
    """Moves the weights of a network to where the loss is worse, and back (AWP, NeurIPS 2020).

    Args:
        model: whose weights of two dimensions or more move.
        proxy: a network of the same shapes; it is overwritten.
        proxy_optim: whose step finds the direction, usually plain SGD with a learning rate of 0.01.
        gamma: relative length of the move.
    """

    def __init__(self, model: nn.Module, proxy: nn.Module, proxy_optim: Optimizer, gamma: float):
        self.model, self.proxy, self.proxy_optim, self.gamma = model, proxy, proxy_optim, gamma

    def calc_awp(self, inputs_adv: Tensor, targets: Tensor) -> OrderedDict[str, Tensor]:
        """The moves by the name of the weight, from the loss of adversarial images."""
        return self._moves(F.cross_entropy(self._copied()(inputs_adv), targets))

    def _copied(self) -> nn.Module:
        """The proxy, which has the model's weights."""
        self.proxy.load_state_dict(self.model.state_dict())
        return self.proxy.train()

    def _moves(self, loss: Tensor) -> OrderedDict[str, Tensor]:
        """Those that increase the proxy's loss."""
        self.proxy_optim.zero_grad()
        (-loss).backward()
        self.proxy_optim.step()
        moves = OrderedDict()
        moved = self.proxy.state_dict()
        for name, weight in self.model.state_dict().items():
            if weight.dim() > 1 and "weight" in name:
                difference = moved[name] - weight
                moves[name] = weight.norm() / (difference.norm() + _TINY) * difference
        return moves

    def perturb(self, diff: OrderedDict[str, Tensor]) -> None:
        self._add(diff, self.gamma)

    def restore(self, diff: OrderedDict[str, Tensor]) -> None:
        """Take the move back, but for roundoff."""
        self._add(diff, -self.gamma)

    @torch.no_grad()
    def _add(self, diff: OrderedDict[str, Tensor], factor: float) -> None:
        for name, parameter in self.model.named_parameters():
            if name in diff:
                parameter.add_(factor * diff[name])


class TradesAWP(AdvWeightPerturb):
    """:class:`AdvWeightPerturb` for the loss of TRADES."""

    def calc_awp(  # type: ignore[override]  # as its authors have it
        self, inputs_adv: Tensor, inputs_clean: Tensor, targets: Tensor, beta: float
    ) -> OrderedDict[str, Tensor]:
        """The moves by the name of the weight, from adversarial and clean images."""
        proxy = self._copied()
        natural = proxy(inputs_clean)
        divergence = F.kl_div(F.log_softmax(proxy(inputs_adv), 1), F.softmax(natural, 1), reduction="batchmean")
        return self._moves(F.cross_entropy(natural, targets) + beta * divergence)
