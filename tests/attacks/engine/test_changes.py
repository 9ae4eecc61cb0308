"""Every call sees the model as it is then."""

import copy
import gc
import inspect
import itertools
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.export import _trace

from tests.attacks.engine.helpers import (
    STEP,
    Doubled,
    Net,
    anew,
    assert_same_step,
    data,
    lively,
    net,
    program_of,
    small,
)
from twins_fast import PGD, adversarial_loss, convert_twin_bn, fuse_twin_bn, wings
from twins_fast.attacks.engine import cache, program
from twins_fast.models import CifarResNet


def double_weights(model):
    model.conv1.weight.data *= 2


def rebind_data(model):
    model.conv1.weight.data = model.conv1.weight.data.clone() * 2


def rebind_parameter(model):
    model.conv1.weight = nn.Parameter(model.conv1.weight.detach() * 2)


def rebind_buffer(model):
    model.bn1.running_mean = model.bn1.running_mean + 0.3


def new_statistics(model):
    model.train()(data(4)[0])
    model.eval()


def optimiser_step(model):
    x, y = data(4)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    F.cross_entropy(model(x), y).backward()
    optimizer.step()


def load_other_state(model):
    model.load_state_dict(lively(copy.deepcopy(model), seed=9).state_dict())


def other_normalisation(model):
    model.mean += 0.1


def other_eps(model):
    model.bn1.eps = 0.5


def other_module(model):
    model.relu = nn.SiLU()


def other_forward(model):
    forward = type(model).forward
    model.forward = lambda images: forward(model, images.flip(3))


def other_head(model):
    model.fc_downstream = nn.Linear(16, 12)


CHANGES = [double_weights, rebind_data, rebind_parameter, rebind_buffer, new_statistics, optimiser_step,
           load_other_state, other_normalisation, other_eps, other_module, other_forward, other_head]  # fmt: skip


@pytest.mark.parametrize("change", CHANGES, ids=lambda f: f.__name__)
def test_changes_are_seen_at_the_next_call(change):
    model = small()
    x, y = data(4)
    attack = PGD(model, engine="plan", **STEP)
    before = attack(x, y)
    change(model)
    after = attack(x, y)
    assert torch.equal(after, anew(model, engine="plan", **STEP)(x, y))
    assert not torch.equal(after, before)
    assert_same_step(model.eval(), x, y)


def test_wing_is_the_one_that_evaluation_uses():
    model = fuse_twin_bn(convert_twin_bn(small()))
    x, y = data(4)
    with torch.no_grad():
        model.bn1.weight *= -1
    attack = PGD(model, engine="plan", **STEP)
    with wings(model, "frozen"):
        frozen = attack(x, y)
        assert_same_step(model, x, y)
    adaptive = attack(x, y)
    assert_same_step(model, x, y)
    assert not torch.equal(frozen, adaptive)
    with wings(model.train(), "frozen"):
        assert torch.equal(attack(x, y), frozen)


def test_other_shapes_and_precisions_get_their_own_plan():
    model = small()
    attack = PGD(model, engine="plan", **STEP)
    for size in (32, 16, 32, 20):
        x, y = data(3, size)
        assert torch.equal(attack(x, y), anew(model, engine="plan", **STEP)(x, y))
    with torch.autocast("cpu", torch.bfloat16):
        half = attack(x, y)
    attack.amp_dtype = torch.bfloat16
    assert torch.equal(attack(x, y), half)


def test_batch_sizes_share_a_plan(monkeypatch):
    captures = []
    real = cache.capture
    monkeypatch.setattr(cache, "capture", lambda *a: captures.append(1) or real(*a))
    model = small()
    attack = PGD(model, engine="plan", **STEP)
    whole, labels = data(40)
    everything = attack(whole, labels)
    for images in (1, 2, 3, 5, 7, 11, 16, 23, 31, 40):
        assert torch.equal(attack(whole[:images], labels[:images]), everything[:images])
    assert len(captures) == 1
    assert len(program_of(attack, whole)._bound) <= program.KEPT_SIZES and len(attack._cache._plans) == 1


def test_plans_are_bounded():
    attack = PGD(small(), engine="plan", **STEP)
    for size in (8, 12, 16, 20, 24, 28):
        attack(*data(2, size))
    assert len(attack._cache._plans) == cache.KEPT_PLANS


def test_a_model_that_changes_at_every_call_is_left_alone():
    class Restless(Doubled):
        calls = 0

        def forward(self, x):
            self.calls += 1
            return self.body(x)

    attack = PGD(Restless(small()), **STEP)
    x, y = data(2)
    for _ in range(cache.RESTLESS + 2):
        attack.model.calls += 1
        attack(x, y)
    assert "from call to call" in attack.explain(x).reason


def separate_layers(m):
    m.c3 = copy.deepcopy(m.c2)
    m.c3.weight.data.neg_()


def separate_weights(m):
    m.c3.weight = nn.Parameter(-m.c2.weight.detach())


def set_scale(m):
    m.cfg.scale = -3.0


def set_number(m):
    m.number.fill_(-3)


def set_class(m):
    type(m).forward = lambda self, x: -self.top(self.c1(x).relu())


@pytest.mark.parametrize("change", [separate_layers, separate_weights, set_scale, set_number, set_class])
def test_changes_of_structure_are_seen(change):
    def forward(m, x):
        return m.top(m.c3(m.c2(m.c1(x)).relu()).relu() * m.cfg.scale * float(m.number))

    model = net(forward)
    model.c3 = model.c2
    if change is separate_weights:
        model.c3 = nn.Conv2d(8, 8, 3, padding=1)
        model.c3.weight, model.c3.bias = model.c2.weight, model.c2.bias
    x, y = data(4, 8)
    attack = PGD(model, **STEP)
    attack(x, y)
    change(model)
    assert torch.equal(attack(x, y), anew(model, **STEP)(x, y))


def test_a_model_that_merges_weights_in_eval_mode():
    class Merging(Net):
        def train(self, mode=True):
            if self.training != mode:
                self.c1.weight.data.mul_(-0.5 if not mode else -2)
            return super().train(mode)

        def forward(self, x):
            return self.top(self.c1(x).relu())

    model = Merging()
    x, y = data(4, 8)
    attack = PGD(model, engine="plan", **STEP)
    first = attack(x, y)
    assert torch.equal(attack(x, y), first)
    assert (first == PGD(model, engine="eager", **STEP)(x, y)).float().mean() > 0.999


def test_another_model_of_the_same_attack():
    x, y = data(4)
    attack = PGD(small(), engine="plan", **STEP)
    attack(x, y)
    attack.model = lively(CifarResNet(10, width=16, blocks=(1,)), seed=4)
    assert torch.equal(attack(x, y), anew(attack.model, engine="plan", **STEP)(x, y))


def test_forgetting_frees_the_plans():
    attack = PGD(small(), engine="plan", **STEP)
    reference = weakref.ref(program_of(attack, data()[0]))
    attack.forget()
    gc.collect()
    assert reference() is None


def test_attacks_on_a_model_share_its_plans(monkeypatch):
    captures = []
    real = cache.capture
    monkeypatch.setattr(cache, "capture", lambda *a: captures.append(1) or real(*a))
    model = small()
    x, y = data(4)
    for steps in (1, 2, 1):
        PGD(model, engine="plan", steps=steps, random_start=False)(x, y)
    PGD(nn.DataParallel(model, [0]) if torch.cuda.is_available() else torch.compile(model), engine="plan", **STEP)(x, y)
    for _ in range(2):
        adversarial_loss(model.train(), x, y, method="at", attack="ce")
    assert len(captures) == 1
    PGD(copy.deepcopy(model), engine="plan", **STEP)(x, y)
    assert len(captures) == 2


def test_plans_go_with_their_model():
    model = small()
    attack = PGD(model, engine="plan", **STEP)
    x, y = data(2)
    attack(x, y)
    program, owner = weakref.ref(program_of(attack, x)), weakref.ref(model)
    del attack
    gc.collect()
    assert program() is not None  # the model is still there
    del model
    gc.collect()
    assert owner() is None and program() is None


def test_the_plans_of_few_models_are_kept():
    models = [nn.Identity() for _ in range(cache.KEPT_MODELS + 3)]
    caches = [cache.plans_of(model) for model in models]
    assert len(cache._caches) <= cache.KEPT_MODELS and cache.plans_of(models[-1]) is caches[-1]
    assert cache.plans_of(models[0]) is not caches[0]


MEAN = torch.tensor([0.5, 0.4, 0.3]).view(3, 1, 1)


def normalised(x):
    return (x + MEAN) / 2


class ByAGlobal(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = small()

    def forward(self, x):
        return self.net(normalised(x))


class ByAClosure(nn.Module):
    def __init__(self, mean):
        super().__init__()
        self.net = small()
        self.normalise = lambda x: (x + mean) / torch.tensor([2.0, 2.5, 3.0]).view(3, 1, 1)

    def forward(self, x):
        return self.net(self.normalise(x))


@pytest.mark.parametrize("make", [ByAGlobal, lambda: ByAClosure(MEAN)], ids=["global", "closure"])
def test_tensors_of_globals_and_closures_are_looked_at(make, monkeypatch):
    model, (x, y) = make().eval(), data(4)
    attack = PGD(model, engine="plan", **STEP)
    assert not [layer for layer in attack.explain(x).layers if "autograd" in layer["runs"]]  # a part of the input
    before = attack(x, y)
    assert_same_step(model, x, y)
    try:
        MEAN.add_(0.03)  # what was captured itself
        changed = attack(x, y)
        assert not torch.equal(changed, before)
        assert_same_step(model, x, y)
    finally:
        MEAN.sub_(0.03)
    assert torch.equal(attack(x, y), before)
    if isinstance(model, ByAGlobal):
        monkeypatch.setitem(globals(), "MEAN", MEAN + 0.04)  # another one under its name
        assert not torch.equal(attack(x, y), before)
        assert_same_step(model, x, y)


def test_a_constant_of_another_type_does_not_become_a_part_of_the_input():
    class Wide(nn.Module):
        def forward(self, x):
            return (x - torch.full((3, 1, 1), 0.5, dtype=torch.float64)).float().mean((2, 3))

    model, (x, y) = Wide(), data(2, classes=3)
    assert torch.equal(PGD(model, **STEP)(x, y), PGD(model, engine="eager", **STEP)(x, y))


def test_averaged_models_are_planned():
    model, (x, y) = torch.optim.swa_utils.AveragedModel(small()).eval(), data(3)
    attack = PGD(model, engine="plan", **STEP)
    before = attack(x, y)
    model.update_parameters(lively(small(), seed=5))
    model.update_parameters(lively(small(), seed=6))
    assert not torch.equal(attack(x, y), before)
    assert_same_step(model, x, y)


class Sparse(nn.Module):
    """Has buffers without dimensions, by which it chooses what it does (MeanSparse, arXiv 2406.05927, is like this)."""

    def __init__(self):
        super().__init__()
        self.body = small()
        self.register_buffer("updating", torch.tensor(0))
        self.register_buffer("initialised", torch.tensor(True))
        self.register_buffer("threshold", torch.tensor(0.0))
        self.register_buffer("calls", torch.tensor(torch.nan))
        self.register_buffer("mean", torch.full((3, 1, 1), 0.5))

    def forward(self, x):
        if self.updating:
            self.mean += x.mean((0, 2, 3), keepdim=True)[0]
        if self.initialised.item() and self.threshold != 0:
            x = torch.where((x - self.mean).abs() < self.threshold * self.mean, self.mean * torch.ones_like(x), x)
        return self.body(x)


def test_buffers_by_which_a_forward_chooses_are_looked_at(capfd):
    model, (x, y) = Sparse().eval(), data(4)
    names = list(model.state_dict())
    attack, found = PGD(model, engine="plan", **STEP), []
    for threshold in (torch.nan, torch.nan, 0, 0.5, 0.5, 0.2):
        model.threshold.fill_(threshold)
        model.calls.add_(1)  # which it does not look at
        found.append(program_of(attack, x))
        assert_same_step(model, x, y)
    same = [before is after for before, after in itertools.pairwise(found)]
    assert same == [True, False, False, True, False]
    model.updating.fill_(1)  # changes the model in its forward
    for _ in range(2):
        with pytest.raises(RuntimeError, match="add_.* changes mean"):
            attack(x, y)
    model.updating.fill_(0)
    assert_same_step(model, x, y)
    assert list(model.state_dict()) == names and "threshold" not in vars(model)
    assert capfd.readouterr().err == ""


def test_a_buffer_that_has_to_be_more_than_a_number():
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = small()
            self.register_buffer("scale", torch.tensor(0.5))

        def forward(self, x):
            return self.body(x * self.scale.exp()) if self.scale > 0 else self.body(x)

    model, (x, y) = Scaled().eval(), data(2)
    with pytest.raises(RuntimeError, match="data-dependent"):
        PGD(model, engine="plan", **STEP)(x, y)


class Keeping(nn.Module):
    """Computes a bias at its first forward and keeps it until it is trained again, as LeViT's attention does."""

    def __init__(self):
        super().__init__()
        self.conv, self.head, self.bias = nn.Conv2d(3, 8, 3, stride=4), nn.Linear(8, 4), nn.Parameter(torch.rand(8))
        self.kept = {}

    def train(self, mode=True):
        if mode:
            self.kept = {}
        return super().train(mode)

    def forward(self, x):
        if "bias" not in self.kept:
            self.kept["bias"] = self.bias * 2
        return self.head(torch.sigmoid(self.conv(x).mean((2, 3)) + self.kept["bias"]))


EXPORT_WARNS = "warn" in inspect.getsource(_trace._detect_attribute_assignment)


@pytest.mark.skipif(not EXPORT_WARNS, reason="this PyTorch exports no forward that keeps what it computed")
def test_what_is_kept_from_the_first_forward():
    torch.manual_seed(0)
    model, (x, y) = Keeping().eval(), data(classes=4)
    assert_same_step(model, x, y)  # without a forward of its own before
    with torch.no_grad():
        model.bias -= 3
    assert_same_step(model, x, y)  # not yet
    assert_same_step(model.train().eval(), x, y)
