"""Networks as recipes describe them."""

import numpy
import torch
import torchvision

import tests.train.helpers  # noqa: F401, registers the tiny network
from twins_fast.checkpoints import save_checkpoint
from twins_fast.methods import TwinsAT
from twins_fast.models import CifarResNet
from twins_fast.train.build import make_network
from twins_fast.train.recipe import Network


def test_training_starts_from_a_pretrained_body_and_a_fresh_head(tmp_path, npz):
    source = CifarResNet(num_classes=7, width=8, blocks=(1, 1))
    save_checkpoint(tmp_path / "source.safetensors", source.state_dict(), {})
    network = Network("tiny", checkpoint=str(tmp_path / "source.safetensors"))
    model = TwinsAT().prepare(make_network(network, 3))
    assert torch.equal(model.conv1.weight, source.conv1.weight)
    assert torch.equal(model.layers[1][0].bn2.main_bn.weight, source.layers[1][0].bn2.weight)
    assert model.fc_downstream.weight.shape[0] == 3


def test_a_robust_imagenet_checkpoint_starts_the_published_network(tmp_path):
    """A file laid out like resnet50_linf_eps4.0.ckpt, into both wings of the CIFAR-10 recipe's network."""
    source = torchvision.models.resnet50()
    entries = {}
    for prefix in ("module.model.", "module.attacker.model."):
        entries |= {prefix + name: value for name, value in source.state_dict().items()}
    for name in ("module.normalizer.new_mean", "module.attacker.normalize.new_std"):
        entries[name] = torch.ones(3, 1, 1)
    path = tmp_path / "resnet50_linf_eps4.0.ckpt"
    torch.save({"model": entries, "epoch": 90, "schedule": {"last_lr": numpy.float64(0.1)}}, path)
    model = TwinsAT().prepare(make_network(Network(checkpoint=str(path), upsample=224), 10))
    own = model.state_dict()
    for name, value in source.state_dict().items():
        assert torch.equal(own[name], value), name
    assert torch.equal(own["layer4.2.bn3.main_bn.running_var"], source.layer4[2].bn3.running_var)
    assert own["fc_downstream.weight"].shape == (10, 2048) and model.upsample == 224
