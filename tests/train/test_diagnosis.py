"""Where a loss that is not finite began."""

import copy

import torch

from tests.train.helpers import train
from twins_fast.checkpoints import load_checkpoint
from twins_fast.train import cli, trainer
from twins_fast.train.diagnosis import origin


def test_the_first_layer_and_its_parameter_are_named(tiny_model, batch):
    assert origin(tiny_model, batch[0]).endswith("it began in the attack or in the loss")
    with torch.no_grad():
        tiny_model.layers[1][0].conv2.weight[0] = torch.nan
    before = copy.deepcopy(tiny_model.state_dict())
    said = origin(tiny_model, batch[0])
    assert said.endswith("that of 'layers.1.0.conv2', as layers.1.0.conv2.weight is not finite")
    assert all(torch.equal(before[name].nan_to_num(), v.nan_to_num()) for name, v in tiny_model.state_dict().items())


def test_a_run_keeps_the_last_good_checkpoint(tmp_path, npz, capsys, monkeypatch):
    step = trainer.Trainer.train_step

    def spoiled(self, *batch):
        if self.step == 4:
            self.model.bn1.weight.data[0] = torch.inf
        return step(self, *batch)

    monkeypatch.setattr(trainer.Trainer, "train_step", spoiled)
    assert train(tmp_path / "run", npz, "--method", "at") == 2
    said = capsys.readouterr().err
    assert "the loss is nan at step 4, learning rate 0.005: on clean images the first output" in said
    assert "that of 'bn1', as bn1.weight is not finite; the last checkpoint is of step 3" in said
    tensors, meta = load_checkpoint(tmp_path / "run" / "last.safetensors")
    assert meta["step"] == 3 and all(value.isfinite().all() for value in tensors.values())
    monkeypatch.setattr(trainer.Trainer, "train_step", step)
    assert cli.main(["train", "--resume", str(tmp_path / "run")]) == 0
