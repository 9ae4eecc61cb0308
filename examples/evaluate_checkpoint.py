"""Evaluates somebody's checkpoint of a torchvision network: python examples/evaluate_checkpoint.py FILE IMAGES.npz

The file is read without running anything in it. IMAGES.npz has ``images`` [N, H, W, 3] uint8 and ``labels`` [N].
"""

import sys

import numpy as np
import torch
import torchvision
from torch import nn

from twins_fast import PGD
from twins_fast.checkpoints import load_state, read_state_dict
from twins_fast.evaluation import evaluate


class Normalised(nn.Module):
    """The networks of torchvision want normalised images; attacks want images in [0, 1]."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model
        self.register_buffer("mean", torch.tensor([0.485, 0.456, 0.406]).view(1, 3, 1, 1))
        self.register_buffer("std", torch.tensor([0.229, 0.224, 0.225]).view(1, 3, 1, 1))

    def forward(self, images):
        return self.model((images - self.mean) / self.std)


def main(checkpoint: str, images: str, arch: str = "resnet50", steps: int = 20) -> None:
    state = read_state_dict(checkpoint)
    network = torchvision.models.get_model(arch, num_classes=len(state["fc.bias"]))
    load_state(network, state, allow_extra=("mean", "std"))
    model = Normalised(network).eval()

    with np.load(images) as file:
        pixels = torch.from_numpy(file["images"]).permute(0, 3, 1, 2).float() / 255
        labels = torch.from_numpy(file["labels"]).long()
    attack = PGD(model, eps=4 / 255, alpha=1 / 255, steps=steps, random_start=False)
    accuracy = evaluate(model, zip(pixels.split(50), labels.split(50), strict=True), attack)
    print(f"clean {accuracy.clean:.1%}, under PGD-{steps} {accuracy.robust:.1%}, on {accuracy.images} images")
    print(attack.explain(pixels[:50]))


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    main(*sys.argv[1:])
