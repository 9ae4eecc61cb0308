"""Layouts with an auxiliary wing against the layers that they stand in for, restated in plain PyTorch."""

import copy

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import nn

from tests.nn.test_layers import perturbed, recorded_calls
from twins_fast import PGD, TrainingStep, convert_twin_bn, fuse_twin_bn, fusion_report, revert_twin_bn, wings
from twins_fast.nn import AdvPropBatchNorm2d, SplitBatchNorm2d, SwitchableBatchNorm2d, TwinBatchNorm2d
from twins_fast.ops import backend, native


class MixBatchNorm2d(nn.BatchNorm2d):
    """AdvProp's."""

    def __init__(self, *arguments, **options):
        super().__init__(*arguments, **options)
        self.aux_bn = nn.BatchNorm2d(*arguments, **options)
        self.batch_type = "clean"

    def forward(self, x):
        main, half = super().forward, len(x) // 2
        ways = {"clean": main, "adv": self.aux_bn, "mix": lambda x: torch.cat([main(x[:half]), self.aux_bn(x[half:])])}
        return ways[self.batch_type](x)


class Switchable(nn.BatchNorm2d):
    """That of ARES."""

    def __init__(self, *arguments, **options):
        super().__init__(*arguments, **options)
        self.bn_mode = "clean"
        self.bn_adv = nn.BatchNorm2d(*arguments, **options)

    def forward(self, x):
        return self.bn_adv(x) if self.training and self.bn_mode == "adv" else super().forward(x)


Switchable.__name__ = "SwitchableBatchNorm2d"
ORIGINALS = {"advprop": MixBatchNorm2d, "timm": timm.layers.SplitBatchNorm2d, "ares": Switchable}
OURS = {"advprop": AdvPropBatchNorm2d, "timm": SplitBatchNorm2d, "ares": SwitchableBatchNorm2d}
SWITCHES = [("advprop", "batch_type", mode) for mode in ("clean", "adv", "mix")]
SWITCHES += [("ares", "bn_mode", mode) for mode in ("clean", "adv")] + [("timm", "", "")]
BACKENDS = ["torch", pytest.param("cpp", marks=pytest.mark.skipif(native._C is None, reason="no compiled module"))]


class Block(nn.Module):
    def __init__(self, norm=nn.BatchNorm2d):
        super().__init__()
        torch.manual_seed(0)
        self.conv1, self.bn1 = nn.Conv2d(3, 8, 3, padding=1, bias=False), norm(8, eps=1e-3, momentum=0.2)
        self.conv2, self.bn2 = nn.Conv2d(8, 8, 3, padding=1, bias=False), norm(8, eps=1e-3, momentum=0.2)
        self.fc = nn.Linear(8, 4)

    def forward(self, x):
        x = F.relu(self.bn1(self.conv1(x)))
        return self.fc(F.relu(self.bn2(self.conv2(x)) + x).mean((2, 3)))


def switch(model, name, mode):
    return model.apply(lambda module: setattr(module, name, mode)) if name else model


def stepped(model, training):
    """Results and gradients of two steps, the second of which sees what the first has written."""
    model.train(training)
    found = []
    for seed in range(2):
        x = torch.rand(6, 3, 8, 8, generator=torch.Generator().manual_seed(seed)).requires_grad_()
        y = model(x)
        y.square().sum().backward()
        found += [y.detach(), x.grad]
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return found, gradients, model.state_dict()


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(("layout", "switched", "mode"), SWITCHES)
def test_equal_to_the_original(layout, switched, mode, training, name):
    original = perturbed(Block(ORIGINALS[layout]))
    model = copy.deepcopy(original)
    parameters = set(model.parameters())
    assert set(convert_twin_bn(model, layout=layout).parameters()) == parameters
    assert type(model.bn1) is OURS[layout] and model.state_dict().keys() == original.state_dict().keys()
    want = stepped(switch(original, switched, mode), training)
    with backend.use_backend(name):
        got = stepped(switch(model, switched, mode), training)
    exact = dict(rtol=0, atol=0) if name == "torch" else dict(rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(got, want, **exact)


@pytest.mark.parametrize("layout", ORIGINALS)
def test_state_dicts_have_the_names_of_the_original(layout):
    original = perturbed(Block(ORIGINALS[layout]))
    plain = Block()
    parameters = {id(parameter) for parameter in plain.parameters()}
    model = convert_twin_bn(plain, layout)
    assert parameters < {id(parameter) for parameter in model.parameters()}
    assert torch.equal(model.bn1.child_wing.running_var, model.bn1.running_var)
    model.load_state_dict(original.state_dict())
    loaded = ORIGINALS[layout](8)
    loaded.load_state_dict(model.bn2.state_dict())
    assert all(torch.equal(value, model.bn2.state_dict()[entry]) for entry, value in loaded.state_dict().items())
    assert convert_twin_bn(model, layout) is model and type(model.bn1) is OURS[layout]
    reverted = revert_twin_bn(model)
    assert type(reverted.bn1) is nn.BatchNorm2d and reverted.state_dict().keys() == Block().state_dict().keys()
    assert torch.equal(reverted.bn1.weight, original.bn1.weight)
    assert torch.equal(reverted.bn1.running_mean, original.bn1.running_mean)


@pytest.mark.parametrize("layout", ORIGINALS)
def test_wings_choose_a_wing_in_any_mode(layout, monkeypatch):
    layer, x = perturbed(OURS[layout](5)), torch.randn(6, 5, 3, 4)
    main, auxiliary = (copy.deepcopy(nn.BatchNorm2d(5)) for _ in range(2))
    for training in (False, True):
        main.load_state_dict({k: v for k, v in layer.state_dict().items() if "." not in k})
        auxiliary.load_state_dict(layer.child_wing.state_dict())
        main.train(training), auxiliary.train(training), layer.train(training)
        calls = recorded_calls(monkeypatch)
        with backend.use_backend("torch"):
            for wing, norms in {"main": [main], "auxiliary": [auxiliary], "mix": [main, auxiliary]}.items():
                with wings(layer, wing):
                    assert torch.equal(
                        layer(x), torch.cat([norm(half) for norm, half in zip(norms, x.chunk(len(norms)), strict=True)])
                    )
        assert len(calls) == 3 * training
        for norm, own in ((main, layer), (auxiliary, layer.child_wing)):
            for entry, value in norm.state_dict().items():
                assert torch.equal(own.state_dict()[entry], value), entry
    assert layer.wing is None
    with (
        pytest.raises(ValueError, match="unknown wing 'frozen'; choose from auxiliary, main, mix"),
        wings(layer, "frozen"),
    ):
        pass


def test_what_cannot_be_split_is_an_error_and_writes_nothing():
    layer = perturbed(SplitBatchNorm2d(5))
    before = copy.deepcopy(layer.state_dict())
    for rows, which in ((1, "main wing got 0"), (2, "main wing got 1"), (3, "main wing got 1")):
        with pytest.raises(ValueError, match=f"at least 2 values per channel, but the {which}"):
            layer(torch.randn(rows, 5, 1, 1))
    assert all(torch.equal(value, before[name]) for name, value in layer.state_dict().items())
    for layer, name in ((AdvPropBatchNorm2d(5), "batch_type"), (SwitchableBatchNorm2d(5), "bn_mode")):
        setattr(layer, name, "both")
        with pytest.raises(ValueError, match=f"unknown {name} 'both'; choose from adv, clean"):
            layer(torch.randn(4, 5, 2, 2))
    with pytest.raises(ValueError, match="need a momentum"):
        SplitBatchNorm2d(5, momentum=None)
    untracked = SplitBatchNorm2d(5, track_running_stats=False)
    assert untracked(torch.randn(4, 5, 2, 2)).shape == (4, 5, 2, 2)
    with pytest.raises(ValueError, match="SplitBatchNorm2d in eval mode needs running statistics"):
        untracked.eval()(torch.randn(4, 5, 2, 2))


def test_nan_stays_in_its_half():
    layer, x = SplitBatchNorm2d(5), torch.randn(6, 5, 3, 4)
    x[1, 2, 0, 0] = torch.nan
    y = layer(x)
    assert y[:3, 2].isnan().all() and y.isnan().sum() == 3 * 12
    assert layer.running_mean[2].isnan() and not layer.child_wing.running_mean.isnan().any()


def test_layouts_are_not_mixed_up():
    with pytest.raises(ValueError, match="unknown layout 'split'; choose from advprop, ares, timm, twins"):
        convert_twin_bn(Block(), "split")
    model = Block(MixBatchNorm2d)
    with pytest.raises(ValueError, match="cannot convert bn1 to layout 'twins': MixBatchNorm2d has that of 'advprop'"):
        convert_twin_bn(model)
    assert type(model.bn1) is MixBatchNorm2d
    with pytest.raises(ValueError, match="another layout than 'ares': TwinBatchNorm2d"):
        convert_twin_bn(convert_twin_bn(Block()), "ares")
    with pytest.raises(ValueError, match="two wings are known here, not 3"):
        convert_twin_bn(timm.layers.SplitBatchNorm2d(5, num_splits=3), "timm")
    model.bn2.aux_bn.eps = 1e-4
    with pytest.raises(ValueError, match="cannot convert bn2: its wings differ in eps or momentum"):
        convert_twin_bn(model, "advprop")
    with pytest.raises(TypeError, match="cannot convert the model to layout 'timm': what BatchNormAct2d adds"):
        convert_twin_bn(timm.layers.BatchNormAct2d(5), "timm")


def test_subclasses_that_add_nothing_are_converted():
    class OtherDefaults(nn.BatchNorm2d):
        """Of some codebase."""

        def __init__(self, channels):
            super().__init__(channels, eps=1e-3, momentum=0.01)

    class Named(OtherDefaults):
        pass

    class Clamped(nn.BatchNorm2d):
        def forward(self, x):
            return super().forward(x).clamp(-1, 1)

    class Loading(nn.BatchNorm2d):
        def _load_from_state_dict(self, *arguments):
            pass

    class Scaled(nn.BatchNorm2d):
        def __init__(self, channels):
            super().__init__(channels)
            self.gain = nn.Parameter(torch.ones(1))

    class Remembering(nn.BatchNorm2d):
        def __init__(self, channels):
            super().__init__(channels)
            self.seen = []

    for layout in ("twins", "timm"):
        layer = convert_twin_bn(Named(4), layout)
        assert isinstance(layer, (TwinBatchNorm2d, SplitBatchNorm2d)) and (layer.eps, layer.momentum) == (1e-3, 0.01)
        assert type(revert_twin_bn(layer)) is nn.BatchNorm2d
    for kind in (Clamped, Loading, Scaled, Remembering):
        with pytest.raises(TypeError, match=f"what .*{kind.__name__} adds to BatchNorm2d is not known"):
            convert_twin_bn(kind(4))
    replaced = Named(4)
    replaced.forward = lambda x: x
    with pytest.raises(TypeError, match="Named"):
        convert_twin_bn(replaced)


@pytest.mark.parametrize("layout", ORIGINALS)
def test_fused_as_any_two_wing_layer(layout, monkeypatch):
    model = convert_twin_bn(perturbed(Block()), layout)
    fused = fuse_twin_bn(copy.deepcopy(model))
    assert [row.fused for row in fusion_report(fused)] == ["relu", "add+relu"]
    with backend.use_backend("torch"):
        for wing in ("main", "auxiliary", "mix"):
            with wings(model, wing), wings(fused, wing):
                want = stepped(model, True)
                calls = recorded_calls(monkeypatch)
                torch.testing.assert_close(stepped(fused, True), want, rtol=0, atol=0)
                assert calls == [(False, True), (True, True)] * 2


def test_the_engine_plans_the_wing_of_the_whole_batch():
    model = convert_twin_bn(perturbed(Block()), "advprop").eval()
    model.bn1.child_wing.running_mean += 1
    images, labels = torch.rand(4, 3, 8, 8), torch.arange(4)
    attacks = [PGD(model, 0.1, 0.02, 3, random_start=False, engine=engine) for engine in ("plan", "eager")]

    def attacked():
        plan, eager = (attack(images, labels) for attack in attacks)
        torch.testing.assert_close(plan, eager, rtol=0, atol=1e-6)
        return plan

    main = attacked()
    with wings(model, "auxiliary"):
        assert not torch.equal(attacked(), main)
    switch(model, "batch_type", "adv")  # which counts in eval mode, too
    assert not torch.equal(attacked(), main)
    switch(model, "batch_type", "clean")
    assert torch.equal(attacked(), main)


def test_methods_say_which_wings_they_need():
    model = convert_twin_bn(Block(), "timm").train()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    images, labels = torch.rand(4, 3, 8, 8), torch.arange(4)
    attack = PGD(model, 0.1, 0.02, 1)
    with pytest.raises(ValueError, match=r'in mix mode; use revert_twin_bn, or wings\(model, "main"\)'):
        TrainingStep(model, optimizer, method="at", attack=attack)(images, labels)
    with wings(model, "main"):
        TrainingStep(model, optimizer, method="at", attack=attack)(images, labels)
    with pytest.raises(ValueError, match="needs a frozen wing, but the model's layout has an auxiliary one"):
        TrainingStep(model, optimizer, method="twins-at", attack=attack)(images, labels)
