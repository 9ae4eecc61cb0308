"""A snapshot of a model holds as long as nothing has changed that a plan depends on, and no longer."""

import copy
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from tests.attacks.engine.helpers import Net, data, small
from tests.attacks.engine.test_changes import CHANGES
from twins_fast.attacks.engine.watch import Snapshot, Watch, fingerprint, obstacle
from twins_fast.nn.modes import in_mode, modules_of

VALUES_ONLY = {"double_weights", "new_statistics", "optimiser_step", "load_other_state", "other_normalisation"}


class Watched(Net):
    table = {"a": [1, 2]}

    def __init__(self):
        super().__init__()
        self.c3 = nn.Conv2d(8, 8, 3, padding=1)
        self.again = self.c3
        self.sizes = [1, 2, (3, [4])]
        self.extra = SimpleNamespace(inner=SimpleNamespace(value=1))
        self.register_buffer("offset", torch.zeros(4, 4))


def reshaped_in_place(m):
    m.offset.data = m.offset.data.view(2, 8)


def transposed_in_place(m):
    m.offset.data = m.offset.data.t()


def cut_in_place(m):
    m.c1.weight.data = m.c1.weight.data[:4]


def other_dtype(m):
    m.head.half()


def moved(m):
    m.c1.weight.data = m.c1.weight.data.clone()


def hook(m):
    m.c1.register_forward_hook(lambda *a: None)


def hook_before(m):
    m.register_forward_pre_hook(lambda *a: None)


def hook_backward(m):
    m.c2.register_full_backward_hook(lambda *a: None)


def added_buffer(m):
    m.register_buffer("more", torch.zeros(1))


def deleted_attribute(m):
    del m.extra


def renamed_parameter(m):
    m.c1.w = m.c1._parameters.pop("weight")


def own_forward(m):
    m.c1.forward = m.c2.forward


def other_class(m):
    m.c3.__class__ = type("Other", (nn.Conv2d,), {})


def class_attribute(m):
    type(m).table["a"].append(3)


def class_method(m):
    type(m).added = lambda self: None


def replaced_twin(m):
    m.again = copy.deepcopy(m.c3)


def removed_module(m):
    m.c2 = None


def deep_in_a_list(m):
    m.sizes[2][1].append(5)


def deep_in_an_object(m):
    m.extra.inner.value = 2


def deep_in_a_set(m):
    m.cfg.parts.add(2)


def number(m):
    m.number.fill_(3)


def replaced_dictionary(m):
    m.__dict__ = {**m.__dict__, "sizes": []}


ALL = [
    reshaped_in_place, transposed_in_place, cut_in_place, other_dtype, moved, hook, hook_before,
    hook_backward, added_buffer, deleted_attribute, renamed_parameter, own_forward, other_class,
    class_attribute, class_method, replaced_twin, removed_module, deep_in_a_list, deep_in_an_object,
    deep_in_a_set, number, replaced_dictionary,
]  # fmt: skip


@pytest.mark.parametrize("change", ALL, ids=lambda f: f.__name__)
def test_any_change_is_seen(change):
    model = type("Own", (Watched,), {"table": {"a": [1, 2]}})()
    snapshot = Snapshot(model)
    assert snapshot.holds(model) and snapshot.holds(model)
    change(model)
    assert not snapshot.holds(model) and Snapshot(model).holds(model) == ("hook" not in change.__name__)


@pytest.mark.parametrize("change", CHANGES, ids=lambda f: f.__name__)
def test_it_notices_what_a_fingerprint_does_and_where_tensors_are(change):
    def state(model):
        tensors = (*model.parameters(), *model.buffers())
        return fingerprint(model), [t.data_ptr() for t in tensors], obstacle(model, data(1)[0])

    model = small()
    snapshot, before = Snapshot(model), state(model)
    change(model)
    assert snapshot.holds(model) == (state(model) == before) == (change.__name__ in VALUES_ONLY)


def test_a_watch_counts_changes():
    model, watch = small(), Watch()
    assert watch.look(model) and not watch.look(model) and watch.changes == 1
    seen = watch.fingerprint
    model.conv1.kernel_size = tuple(list(model.conv1.kernel_size))  # equal, but another object, as an export leaves it
    assert watch.look(model) and watch.fingerprint is seen and watch.changes == 1
    model.conv1.weight.data = model.conv1.weight.data.clone()
    assert watch.look(model) and watch.fingerprint is seen and watch.changes == 2
    model.bn1.eps = 0.5
    assert watch.look(model) and watch.fingerprint is not seen and watch.changes == 3
    assert watch.look(copy.deepcopy(model)) and watch.changes == 4


def test_hooks_on_all_modules_are_seen():
    model = small()
    snapshot = Snapshot(model)
    handle = nn.modules.module.register_module_forward_hook(lambda *a: None)
    assert not snapshot.holds(model)
    handle.remove()
    assert snapshot.holds(model)


def test_modes_of_odd_modules():
    class Counting(nn.Module):
        calls = 0

        def train(self, mode=True):
            self.calls += 1
            return super().train(mode)

    class Property(nn.Module):
        training = property(lambda self: self.__dict__.get("mode", True), lambda self, m: self.__dict__.update(mode=m))

    odd = nn.Sequential(nn.ReLU(), Property(), Counting(), nn.Sequential(nn.Dropout()))
    odd[3].eval()
    scripted = nn.Sequential(torch.jit.script(nn.Dropout()), nn.ReLU())
    plain = nn.Sequential(nn.Dropout(), nn.Sequential(nn.ReLU()))
    plain[1].eval()
    for model in (odd, scripted, plain):
        assert set(modules_of(model)) == set(model.modules())
        before = [module.training for module in model.modules()]
        with pytest.raises(KeyError), in_mode(model, False):
            assert not any(module.training for module in model.modules())
            raise KeyError
        with in_mode(model, True):
            assert all(module.training for module in model.modules())
        assert [module.training for module in model.modules()] == before
    assert odd[2].calls == 3  # into eval mode and back, and into train mode, where it already was
