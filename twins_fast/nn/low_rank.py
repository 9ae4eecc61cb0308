"""A low-rank branch beside the convolutions of a network, which the network itself does not see."""

from __future__ import annotations

from torch import Tensor, nn
from torch.func import functional_call

from twins_fast.nn.heads import head_name

BRANCH = "low_rank_branch"  # the child of the network that holds it


class LowRankBranch(nn.Module):
    """For each convolution but the first one a weight of low rank, zero at first (Hu et al., arXiv 2106.09685).

    A kernel [out, in, k, k] is taken for a matrix [out * k, in * k] of rank ``rank * k``, as in the authors' loralib,
    and the branch is scaled by 1 / rank.
    """

    def __init__(self, model: nn.Module, rank: int):
        super().__init__()
        found = [(name, module) for name, module in model.named_modules() if isinstance(module, nn.Conv2d)]
        self.names = [f"{name}.weight" for name, _ in found[1:]]
        if not self.names:
            raise ValueError("a low-rank branch needs a network with two convolutions or more")
        self.rank = rank
        self.up, self.down = nn.ParameterList(), nn.ParameterList()
        for _, convolution in found[1:]:
            weight, (height, width) = convolution.weight, convolution.kernel_size
            inner = rank * height
            rows = weight.shape[0] * height // convolution.groups
            self.up.append(weight.new_zeros(rows, inner))
            self.down.append(weight.new_empty(inner, convolution.in_channels * width).normal_())

    def weights(self, model: nn.Module) -> dict[str, Tensor]:
        """The parameters of ``model`` with the branch added; gradients reach the branch and the head alone."""
        head = head_name(model) + "."
        parameters = {
            name: parameter if name.startswith(head) else parameter.detach()
            for name, parameter in model.named_parameters()
        }
        for name, up, down in zip(self.names, self.up, self.down, strict=True):
            parameters[name] = parameters[name] + (up @ down).view_as(parameters[name]) / self.rank
        return parameters


def add_branch(model: nn.Module, rank: int) -> nn.Module:
    """Give ``model`` a branch, as a child that its forward does not call; returns it."""
    setattr(model, BRANCH, LowRankBranch(model, rank))
    return model


def through_branch(model: nn.Module, images: Tensor) -> Tensor:
    """What ``model`` returns with the branch; gradients reach branch and head alone."""
    branch = getattr(model, BRANCH, None)
    if not isinstance(branch, LowRankBranch):
        raise ValueError("the model has no low-rank branch: prepare it by its method")
    found: Tensor = functional_call(model, branch.weights(model), (images,))
    return found
