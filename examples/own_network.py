"""Fine-tunes a network and images of your own with TWINS-AT in a plain loop: python examples/own_network.py"""

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from twins_fast import PGD, adversarial_loss, convert_twin_bn, revert_twin_bn
from twins_fast.evaluation import evaluate
from twins_fast.models import clamp


class Network(nn.Module):
    """Any network with BatchNorm2d will do, as long as it takes images in [0, 1] and normalises them itself."""

    def __init__(self, num_classes: int):
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(3, 32, 3, padding=1, bias=False),
            nn.BatchNorm2d(32),
            nn.ReLU(inplace=True),
            nn.Conv2d(32, 64, 3, stride=2, padding=1, bias=False),
            nn.BatchNorm2d(64),
            nn.ReLU(inplace=True),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
        )
        self.head = nn.Linear(64, num_classes)

    def forward(self, images):
        return self.head(self.body((clamp(images) - 0.5) / 0.25))


def some_images(count: int) -> TensorDataset:
    """Three classes that differ in their colour; put your own data set here."""
    generator = torch.Generator().manual_seed(count)
    labels = torch.arange(count) % 3
    images = 0.5 * torch.rand(count, 3, 32, 32, generator=generator)
    images[torch.arange(count), labels] += 0.2
    return TensorDataset(images, labels)


def main(train_images: int = 512, epochs: int = 3) -> float:
    torch.manual_seed(0)
    train = DataLoader(some_images(train_images), batch_size=64, shuffle=True, drop_last=True)
    test = DataLoader(some_images(99), batch_size=33)

    model = Network(num_classes=3)  # load your adversarially pre-trained weights here
    model = convert_twin_bn(model).train()
    attack = PGD(model, eps=8 / 255, alpha=2 / 255, steps=10)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    for epoch in range(epochs):
        for images, labels in train:
            loss, metrics = adversarial_loss(model, images, labels, method="twins-at", attack=attack)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        print(f"epoch {epoch + 1}: " + ", ".join(f"{name} {float(value):.3f}" for name, value in metrics.items()))

    model = revert_twin_bn(model).eval()  # an ordinary network again
    accuracy = evaluate(model, test, PGD(model, steps=20, random_start=False))
    print(f"clean {accuracy.clean:.1%}, under PGD-20 {accuracy.robust:.1%}")
    return accuracy.robust


if __name__ == "__main__":
    main()
