"""The recorded trajectories of the published code, replayed through the public API."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from twins_fast import PGD, adversarial_loss, convert_twin_bn
from twins_fast.methods import METHODS
from twins_fast.models import CifarResNet
from twins_fast.ops import backend, native

FOLDER = Path(__file__).parent / "golden"
NAMES = sorted(path.stem for path in FOLDER.glob("*.npz"))
NORMS = {"linf": "linf", "l2": "l2-sign"}


def method_of(name: str) -> str:
    return "-".join(part for part in name.split("_") if part not in ("linf", "l2", "bottleneck"))


class Replay:
    """The recorded network, attack and batches, rebuilt."""

    def __init__(self, name: str):
        with np.load(FOLDER / f"{name}.npz") as file:
            self.recorded = {key: file[key] for key in file.files}
        self.config = config = json.loads(str(self.recorded["config"]))
        self.method = method_of(name)
        self.model = CifarResNet(config["num_classes"], config["width"], config["blocks"], config["block"])
        if METHODS[self.method].wings == 2:
            convert_twin_bn(self.model)
        self.model.load_state_dict(self.entries("init/"))
        self.attack = PGD(
            self.model,
            eps=config["eps"],
            alpha=config["alpha"],
            steps=config["k"],
            norm=NORMS[config["norm"]],
            engine="eager",
        )

    def entries(self, prefix: str) -> dict[str, torch.Tensor]:
        found = {k.removeprefix(prefix): torch.from_numpy(v) for k, v in self.recorded.items() if k.startswith(prefix)}
        return {name: value.clone() for name, value in found.items()}

    def batch(self, step: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        images, labels, noise = (torch.from_numpy(self.recorded[k][step]) for k in ("images", "labels", "noise"))
        return images, labels, (images + noise).clamp(0, 1)

    def train(self):
        """Yield (loss, adversarial batch) of each step."""
        config, made = self.config, []

        def recording_attack(images, labels, x_init):
            made.append(self.attack(images, labels, x_init=x_init))
            return made[-1]

        optimizer = torch.optim.SGD(self.model.parameters(), config["lr"], momentum=0.9, weight_decay=config["wd"])
        self.model.train()
        for step in range(config["steps"]):
            images, labels, start = self.batch(step)
            loss, _ = adversarial_loss(
                self.model,
                images,
                labels,
                method=self.method,
                attack=recording_attack,
                twins_lambda=config["lambda_twins"],
                trades_beta=config["beta"],
                x_init=start,
            )
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            yield float(loss.detach()), made.pop()


@pytest.fixture(params=NAMES)
def replay(request):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as recorded
    yield Replay(request.param)
    torch.set_num_threads(threads)


def test_all_six_are_here():
    assert NAMES == [
        "at_linf", "trades_linf", "twins_at_l2", "twins_at_linf", "twins_at_linf_bottleneck", "twins_trades_linf",
    ]  # fmt: skip


def test_plain_backend_reproduces_the_trajectory(replay):
    with backend.use_backend("torch"):
        for step, (loss, adversarial) in enumerate(replay.train()):
            assert loss == pytest.approx(replay.recorded["loss"][step], abs=1e-6)
            np.testing.assert_allclose(adversarial.numpy(), replay.recorded["adv"][step], rtol=0, atol=1e-6)
    final = replay.entries("final/")
    state = replay.model.state_dict()
    assert state.keys() == final.keys()
    for name, value in state.items():
        torch.testing.assert_close(value, final[name], rtol=0, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}")

    replay.model.eval()
    images, labels, _ = replay.batch(0)
    np.testing.assert_allclose(replay.model(images).detach().numpy(), replay.recorded["eval_logits"], rtol=0, atol=1e-6)
    adversarial = replay.attack(images, labels, x_init=images)
    np.testing.assert_allclose(adversarial.numpy(), replay.recorded["eval_adv"], rtol=0, atol=1e-6)


@pytest.mark.skipif(native._C is None, reason="the compiled CPU kernels are not installed")
@pytest.mark.parametrize("engine", ["eager", "plan"])
def test_cpp_backend_reproduces_the_losses(replay, engine):
    replay.attack.engine = engine
    with backend.use_backend("cpp"):
        losses = [loss for loss, _ in replay.train()]
    np.testing.assert_allclose(losses, replay.recorded["loss"], rtol=1e-4)
