"""accelerate: the model's logits and image gradients by the plan, whatever calls it and in whatever order."""

import copy
import gc
import pickle
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tests.attacks.engine.helpers import Mixing, assert_untouched, data, few_at_once, small, state_of
from twins_fast import PGD, accelerate
from twins_fast.attacks.engine import passes, program
from twins_fast.attacks.engine.cache import plans_of
from twins_fast.attacks.engine.program import round_down, round_up


@pytest.fixture(scope="module")
def model():
    return small()


class Gated(nn.Module):
    """Planned layers around segments."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1, stride=2)
        self.norm, self.head = nn.BatchNorm2d(8), nn.Linear(8, 5)

    def forward(self, x):
        x = F.softplus(self.norm(self.first(x)))
        x = F.max_pool2d(F.relu(self.second(x)), 2)
        return self.head(F.softplus(x).mean((2, 3)))


def gradient(network, x, weights=None):
    leaf = x.clone().requires_grad_()
    logits = network(leaf)
    weights = torch.linspace(-1, 1, logits.shape[1]) if weights is None else weights
    return torch.autograd.grad((logits * weights).sum(), leaf)[0]


def close(actual, expected, tolerance=1e-4):
    assert actual.dtype == torch.float32 and actual.shape == expected.shape
    assert (actual - expected).norm() <= tolerance * expected.norm()


@pytest.mark.parametrize("build", [small, Gated, Mixing])
@pytest.mark.parametrize("count", [1, 2, 5, 9, 33])
def test_logits_and_gradients_are_the_models(build, count):
    torch.manual_seed(3)
    net = build().eval()
    x = data(count, 16)[0] * 3 - 1  # of any range
    fast = accelerate(net)
    assert fast.explain(x).engine == "plan", fast.explain(x).reason
    by_pytorch = [layer for layer in fast.explain(x).layers if "autograd" in layer["runs"]]
    assert by_pytorch or build is small
    close(fast(x), net(x))
    with torch.no_grad():
        close(fast(x), net(x))
    weights = torch.randn(net(x).shape)  # with the same for every image, Mixing's gradients cancel
    close(gradient(fast, x, weights), gradient(net, x, weights))


@pytest.mark.parametrize("build", [small, Gated])
def test_several_forwards_are_alive_at_once(build, monkeypatch):
    torch.manual_seed(3)
    net = build().eval()
    fast = accelerate(net)
    few_at_once(monkeypatch, 1 << 19)  # a few images at a time
    batches = [data(count, 16, seed=count)[0].requires_grad_() for count in (7, 30, 7, 1)]
    logits = [fast(x) for x in batches]
    PGD(net, steps=2, engine="plan")(*data(40, 16, classes=5))  # grows the arena, and uses it
    for x, own in reversed(list(zip(batches, logits, strict=True))):
        close(own, net(x))
        for column in (0, 3):  # more than one gradient from one forward
            (actual,) = torch.autograd.grad(own[:, column].sum(), x, retain_graph=True)
            close(actual, torch.autograd.grad(net(x)[:, column].sum(), x)[0])


def test_a_gradient_does_not_compute_the_forward_again(model, monkeypatch):
    fast, x = accelerate(model), data(4)[0].requires_grad_()
    logits = fast(x)
    runs, real = [], passes._run
    monkeypatch.setattr(passes, "_run", lambda steps: runs.append(steps) or real(steps))
    logits.sum().backward()
    assert len(runs) == 1 and x.grad.abs().sum() > 0
    assert all(p.grad is None for p in model.parameters())


def test_nothing_is_kept_without_gradients(model, monkeypatch):
    fast, x = accelerate(model), data(4)[0]
    fast(x)
    monkeypatch.setattr(passes.Pass, "keep", lambda *_: pytest.fail("kept"))
    fast(x)
    with torch.no_grad():
        fast(x.requires_grad_())
    with torch.inference_mode():
        result = fast(x)
    monkeypatch.undo()
    close(result.clone(), model(x))
    close(gradient(fast, x), gradient(model, x))  # nothing of the inference mode is left


def test_memory_goes_with_the_logits(model):
    fast, x = accelerate(model), data(6)[0].requires_grad_()
    fast(x).sum().backward()
    gc.collect()
    before = sum(isinstance(o, torch.Tensor) for o in gc.get_objects())
    for _ in range(5):
        fast(x)  # without a backward pass
        fast(x).sum().backward()
    gc.collect()
    assert sum(isinstance(o, torch.Tensor) for o in gc.get_objects()) <= before + 2


def test_as_in_pytorch_a_second_backward_needs_retain_graph(model):
    fast, x = accelerate(model), data(2)[0].requires_grad_()
    logits = fast(x)
    logits.sum().backward()
    with pytest.raises(RuntimeError, match="second time"):
        logits.sum().backward()
    (once,) = torch.autograd.grad(fast(x).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable|does not require grad"):
        once.sum().backward()


def test_backward_works_in_any_surrounding_mode(model):
    fast, x = accelerate(model), data(3)[0].requires_grad_()
    expected = gradient(model, x.detach(), 1)
    total = fast(x).sum()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        total.backward()
    close(x.grad, expected)


@pytest.mark.parametrize("change", ["optimiser", "load", "train", "replace", "data"])
def test_changed_parameters_are_seen(change):
    net = small()
    fast, x = accelerate(net), data(2)[0]
    before = fast(x)
    if change == "optimiser":
        net.train()
        net(data(4)[0]).square().mean().backward()
        torch.optim.SGD(net.parameters(), 0.1).step()
        net.eval()
    elif change == "load":
        net.load_state_dict({k: v * 1.1 if v.is_floating_point() else v for k, v in net.state_dict().items()})
    elif change == "train":
        with torch.no_grad():
            fast.train()(data(8, seed=5)[0])
        fast.eval()
    elif change == "replace":
        net.conv1 = nn.Conv2d(3, 8, 3, padding=1)
    else:
        net.conv1.weight.data.mul_(1.5)
        fast.refresh()
    assert not torch.allclose(fast(x), before)
    close(fast(x), net(x))
    close(gradient(fast, x), gradient(net, x))


def test_parameters_are_folded_once(model, monkeypatch):
    fast, x = accelerate(model), data(3)[0]
    fast(x)
    monkeypatch.setattr(program.Program, "fold", lambda *_: pytest.fail("folded again"))
    fast(x)
    gradient(fast, x)


def test_a_parameter_must_not_change_between_the_passes():
    net = small()
    fast, x = accelerate(net), data(2)[0].requires_grad_()
    logits = fast(x)
    with torch.no_grad():
        net.conv1.weight.mul_(2)
    fast(x)
    with pytest.raises(RuntimeError, match="changed between the forward and the backward"):
        logits.sum().backward()


@pytest.mark.parametrize("dtype, tolerance", [(torch.bfloat16, 0.1), (torch.float16, 0.05)])
def test_half_precision(model, dtype, tolerance):
    fast, x = accelerate(model, dtype), data(6)[0]
    close(fast(x), model(x), tolerance)
    close(gradient(fast, x), gradient(model, x), tolerance)
    weights = torch.ones(10)
    weights[3] = -2
    tiny = 2.0**-40  # in float16 a gradient that small would be zero
    assert torch.equal(gradient(fast, x, tiny * weights), tiny * gradient(fast, x, weights))
    with torch.autocast("cpu", dtype):
        assert torch.equal(accelerate(model)(x), fast(x))


def test_train_mode_is_the_model(model):
    net = copy.deepcopy(model)
    twin = copy.deepcopy(net).train()
    fast, (x, y) = accelerate(net).train(), data(4)
    assert net.training and fast.training and fast.explain(x).engine == "eager"
    loss = F.cross_entropy(fast(x), y)
    loss.backward()
    F.cross_entropy(twin(x), y).backward()
    assert all(torch.equal(a.grad, b.grad) for a, b in zip(net.parameters(), twin.parameters(), strict=True))
    assert torch.equal(net.bn1.running_mean, twin.bn1.running_mean)
    net.eval()
    assert not fast.training and fast.explain(x).engine == "plan"
    net.bn1.train()  # one layer of it
    assert fast.explain(x).engine == "eager"


def test_it_looks_like_the_model(model):
    fast = accelerate(model)
    assert [id(p) for p in fast.parameters()] == [id(p) for p in model.parameters()]
    assert [id(b) for b in fast.buffers()] == [id(b) for b in model.buffers()]
    assert fast.device == torch.device("cpu") and fast.conv1 is model.conv1 and not fast.training
    assert fast.to("cpu") is fast and isinstance(fast, nn.Module) and "amp_dtype=None" in repr(fast)
    with pytest.raises(AttributeError, match="nothing"):
        fast.nothing  # noqa: B018
    assert accelerate(fast, torch.bfloat16).module is model
    x = data(2)[0]
    for again in (copy.deepcopy(fast), pickle.loads(pickle.dumps(fast))):
        close(again(x), model(x))
        assert again.module is not model
    assert accelerate(nn.Identity()).device == torch.device("cpu")


def test_a_pgd_of_it_shares_the_models_plans(model):
    fast, (x, y) = accelerate(model), data(4)
    options = {"steps": 2, "random_start": False, "engine": "plan"}
    fast(x)
    known = plans_of(model).programs()
    assert torch.equal(PGD(fast, **options)(x, y), PGD(model, **options)(x, y))
    assert plans_of(model).programs() == known


class WithOptions(nn.Module):
    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, x, with_latent=False, scale=1.0):
        logits = self.net(x) * scale
        return (logits, x.mean(1)) if with_latent else logits


def test_arguments_besides_images(model):
    net, x = WithOptions(model).eval(), data(2)[0]
    fast = accelerate(net)
    close(fast(x, with_latent=False), net(x))
    assert isinstance(fast(x, with_latent=True), tuple)
    assert torch.equal(fast(x, scale=2.0), net(x, scale=2.0)) and torch.equal(fast(x, False, 3.0), net(x, False, 3.0))
    with pytest.raises(TypeError, match="unknown"):
        fast(x, unknown=1)


@pytest.mark.parametrize("x", [torch.rand(2, 3, 32, 32).double(), torch.rand(3, 32, 32), torch.rand(2, 32)])
def test_what_is_no_batch_of_float32_images_goes_to_the_model(x):
    net = nn.Flatten(-1) if x.dtype == torch.float32 else small().double()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(accelerate(net.eval())(x), net(x))


def test_transforms_of_functions_go_to_the_model(model):
    x = data(2)[0]
    actual = torch.func.grad(lambda x: accelerate(model)(x).sum())(x)
    close(actual, gradient(model, x, 1))


def test_empty_batch_and_channels_last(model):
    fast = accelerate(model)
    assert fast(torch.rand(0, 3, 32, 32)).shape == (0, 10)
    assert gradient(fast, torch.rand(0, 3, 32, 32)).shape == (0, 3, 32, 32)
    x = data(3)[0]
    laid_out = x.to(memory_format=torch.channels_last)
    close(gradient(fast, laid_out), gradient(model, x))


class Undecided(nn.Module):
    def forward(self, x):
        return x.mean((2, 3)) * (1 if x.mean() > 0.5 else 2)


def test_a_model_that_cannot_be_planned_is_itself_with_one_warning():
    net, x = Undecided().eval(), data(2)[0]
    fast = accelerate(net)
    with pytest.warns(UserWarning, match="runs as it is") as messages:
        results = [fast(x) for _ in range(3)]
    assert len(messages) == 1 and all(torch.equal(result, net(x)) for result in results)
    assert fast.explain(x).engine == "eager" and fast.explain(x).reason
    assert torch.equal(gradient(fast, x), gradient(net, x))


@pytest.mark.parametrize("fault", [RuntimeError("boom"), MemoryError()])
@pytest.mark.parametrize("where", [1, 2])
def test_an_error_of_the_engine_costs_only_speed(fault, where, monkeypatch):
    net, x = small(), data(3)[0]
    fast = accelerate(net)
    expected = gradient(net, x)
    fast(x)
    before, calls, real = state_of(net), [], passes._run

    def failing(steps):
        calls.append(1)
        if len(calls) == where:
            raise fault
        real(steps)

    monkeypatch.setattr(passes, "_run", failing)
    monkeypatch.setattr(program.Program, "_halve", lambda *_: False)
    with pytest.warns(UserWarning, match="the plan failed"):
        close(gradient(fast, x), expected)
    monkeypatch.undo()
    assert_untouched(net, before)
    close(gradient(fast, x), expected)
    refused = where == 1 and isinstance(fault, RuntimeError)
    assert fast.explain(x).engine == ("eager" if refused else "plan")


def test_memory_that_runs_out_makes_smaller_chunks(model, monkeypatch):
    net, x = small(), data(20)[0]
    fast = accelerate(net)
    real = program.Program.bound
    monkeypatch.setattr(
        program.Program, "bound", lambda self, rows: real(self, rows) if rows <= 6 else failed(MemoryError())
    )

    def failed(error):
        raise error

    with pytest.warns(UserWarning, match="memory ran out"):
        close(gradient(fast, x), gradient(net, x))


def test_an_interruption_between_the_passes_leaves_everything_usable(model):
    fast, x = accelerate(model), data(3)[0].requires_grad_()
    before = state_of(model)
    with pytest.raises(KeyboardInterrupt):
        logits = fast(x)
        logits.register_hook(lambda _: (_ for _ in ()).throw(KeyboardInterrupt()))
        logits.sum().backward()
    assert_untouched(model, before)
    close(gradient(fast, x.detach()), gradient(model, x.detach()))


def test_images_elsewhere_are_the_models_own_affair(model):
    assert "does not run on meta" in accelerate(model).explain(torch.rand(2, 3, 32, 32, device="meta")).reason


@pytest.mark.parametrize("model, dtype, error", [(lambda x: x, None, TypeError), (small(), torch.float64, ValueError)])
def test_bad_arguments(model, dtype, error):
    with pytest.raises(error):
        accelerate(model, dtype)


def test_few_numbers_of_images_at_once():
    sizes = {round_up(n) for n in range(1, 257)}
    assert len(sizes) <= 28 and all(round_up(n) == n == round_down(n) for n in sizes)
    assert all(n <= round_up(n) <= 1.25 * n and 0.8 * n <= round_down(n) <= n for n in range(1, 257))


def test_little_is_computed_in_vain(model):
    fast, x = accelerate(model), data(1)[0]
    fast(x)
    own = plans_of(model).programs()[-1]
    for limit in (None, 7, 40):
        own.chunk_size = limit
        for images in range(1, 200):
            left, computed, parts = images, 0, 0
            while left:
                size = own.chunk(left, rounded=True)
                assert 1 <= size <= left and round_up(size) in own.sizes(images, True)
                left, computed, parts = left - size, computed + round_up(size), parts + 1
            assert computed <= images + max(3, images // 16)
            assert parts <= 3 + images // (own.chunk_size or images) * 2
    own.chunk_size = None


def test_the_image_is_written_while_its_gradient_is_read(model):
    """By the step of the pixels: the two may not share memory."""
    fast, x = accelerate(model), data(2)[0]
    fast(x)
    bound = plans_of(model).programs()[-1].bound(2)
    ends = [(t.data_ptr(), t.data_ptr() + t.numel() * t.element_size()) for t in (bound.image, bound.image_gradient)]
    assert ends[0][1] <= ends[1][0] or ends[1][1] <= ends[0][0]


def test_a_loss_may_attack_the_same_model(model):
    """On one thread its lock lets the second one in."""
    fast, (x, y) = accelerate(model), data(3)
    inner, losses = x.clone().requires_grad_(), []

    def loss(logits, labels):
        fast(inner).sum().backward()
        return F.cross_entropy(logits, labels, reduction="none")

    for function in (loss, "ce"):
        losses.append(PGD(model, loss=function, engine="plan", steps=2, random_start=False)(x, y))
    assert torch.equal(*losses) and inner.grad.abs().sum() > 0


def test_an_eager_attack_on_it_does_not_warn_of_clamps_of_its_checks():
    net, (x, y) = small(), data(3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        PGD(accelerate(net), engine="eager", steps=1)(x, y)
