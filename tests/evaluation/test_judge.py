"""Half precision never makes an image robust by taking it for fooled."""

import torch
from torch import nn

from twins_fast.evaluation import judged


class Threshold(nn.Module):
    """Class 1 from a mean brightness on."""

    def __init__(self, at: float):
        super().__init__()
        self.at = at

    def forward(self, images):
        above = images.mean((1, 2, 3)) - self.at
        return torch.stack([-above, above], 1)


def test_images_that_only_half_precision_took_for_fooled_are_attacked_again():
    images = torch.full((4, 3, 2, 2), 0.1) * torch.arange(4).view(-1, 1, 1, 1)  # of brightness 0, 0.1, 0.2, 0.3
    labels, seen = torch.zeros(4, dtype=torch.int64), []

    def attack(images, labels):
        return images + 0.25

    def again(images, labels):
        seen.append(images)
        return images + 0.35

    adversarial, count = judged(Threshold(0.52), Threshold(0.4), images, labels, attack, again)
    assert count == 1 and torch.equal(seen[0], images[2:3])  # at 0.45; the last one is fooled, the others not at all
    assert torch.equal(adversarial, images + torch.tensor([0.25, 0.25, 0.35, 0.25]).view(-1, 1, 1, 1))
    assert (Threshold(0.52)(adversarial).argmax(1) != labels).tolist() == [False, False, True, True]


def test_where_both_agree_nothing_is_attacked_again():
    images, labels = torch.rand(3, 3, 2, 2), torch.tensor([0, 1, 0])
    adversarial, count = judged(Threshold(0.5), Threshold(0.5), images, labels, lambda x, y: x, None)
    assert count == 0 and adversarial is images
