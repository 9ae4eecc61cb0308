"""Networks: the input stage."""

import pytest
import torch

from twins_fast.models import ARCHITECTURES, CifarResNet, build_model, register


def test_images_are_clamped_and_standardised(tiny_model):
    tiny_model.eval()
    x = torch.rand(2, 3, 8, 8) * 1.4 - 0.2
    seen = []
    tiny_model.conv1.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    assert torch.equal(tiny_model(x), tiny_model(x.clamp(0, 1)))
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    torch.testing.assert_close(seen[0], (x.clamp(0, 1) - mean) / std)


def test_derivative_on_the_bounds_is_one_on_every_torch(tiny_model):
    inside = torch.tensor([0.0, 0.5, 1.0]).view(1, 1, 1, 3).repeat(1, 3, 4, 1)
    outside = torch.tensor([-0.1, 0.5, 1.1]).view(1, 1, 1, 3).repeat(1, 3, 4, 1)
    gradients = []
    for x in (inside, outside):
        leaf = x.requires_grad_()
        gradients.append(torch.autograd.grad(tiny_model.eval()(leaf).sum(), leaf)[0])
    # What is outside is computed as if it were on the bound.
    assert (gradients[0] != 0).all() and (gradients[1][..., [0, 2]] == 0).all()
    assert torch.equal(gradients[0][..., 1], gradients[1][..., 1])


def test_a_registered_network_is_built_by_name(monkeypatch):
    monkeypatch.setattr("twins_fast.models.registry.ARCHITECTURES", dict(ARCHITECTURES))
    register("mine", lambda num_classes: CifarResNet(num_classes, width=4, blocks=(1,)))
    assert build_model("mine", 7)(torch.rand(2, 3, 8, 8)).shape == (2, 7)
    with pytest.raises(ValueError, match="upsample must be none"):
        build_model("mine", 7, upsample=64)
    with pytest.raises(ValueError, match="'mine' is registered already"):
        register("mine", CifarResNet)


def test_entries_are_named_as_published():
    names = set(CifarResNet(5, width=4, blocks=(1, 1)).state_dict())
    assert {"mean", "std", "conv1.weight", "bn1.weight", "layers.1.0.downsample.1.bias", "fc_downstream.bias"} <= names
    names = set(ARCHITECTURES["resnet18"](num_classes=5).state_dict())
    assert {"fc.weight", "fc_downstream.weight", "layer1.0.conv1.weight"} <= names and "mean" not in names


def test_unknown_architecture_is_refused():
    with pytest.raises(ValueError, match="unknown arch 'vgg'"):
        build_model("vgg", 5)


def test_a_network_takes_images_of_any_size_and_upsamples_those_it_is_told_to():
    for name in ("cifar-resnet18-w16", "resnet18"):
        assert build_model(name, 3).eval()(torch.rand(1, 3, 32, 32)).shape == (1, 3)
    model = build_model("resnet18", 3, upsample=64).eval()
    x = torch.rand(1, 3, 32, 32)
    expected = model(x)
    model.upsample = None
    torch.testing.assert_close(model(torch.nn.functional.interpolate(x, size=(64, 64), mode="nearest")), expected)
