"""What PGD can do besides the published attack: each option against a few lines of its own, on both engines."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tests.attacks.engine.helpers import Mixing, assert_untouched, data, loss_of, small, state_of
from twins_fast import PGD, adversarial_loss
from twins_fast.attacks import ascent, objectives
from twins_fast.attacks.balls import Ball, norm_named

ENGINES = ["eager", "plan"]
EPS, ALPHA = 0.03, 0.01


@pytest.fixture(scope="module")
def model():
    return small()


@pytest.fixture(scope="module")
def problem(model):
    x, _ = data(7, 16)
    x = x * 0.8 + 0.1
    return x, model(x).argmax(1)


def slope(model, x, labels, loss=F.cross_entropy):
    leaf = x.clone().requires_grad_()
    return torch.autograd.grad(loss(model(leaf), labels), leaf)[0]


def losses(model, x, labels):
    with torch.no_grad():
        return F.cross_entropy(model(x), labels, reduction="none")


def same(actual, expected, moved=ALPHA):
    """Equal, but for a few signs of gradients that are zero within roundoff."""
    differ = ((actual - expected).abs() > moved / 100).float()
    assert differ.mean() <= 2e-3, differ.flatten(-3).mean(-1)  # by image


def attack(model, engine, **options):
    return PGD(model, **{"eps": EPS, "alpha": ALPHA, "steps": 3, "random_start": False, "engine": engine, **options})


@pytest.mark.parametrize("engine", ENGINES)
def test_a_function_as_loss(model, problem, engine):
    x, y = problem
    own = attack(model, engine, loss=lambda logits, labels: F.cross_entropy(logits, labels, reduction="none"))(x, y)
    same(own, attack(model, engine)(x, y))
    seen = []

    def weighted(logits, labels):
        seen.append(len(logits))
        return logits.gather(1, labels[:, None])[:, 0] * torch.linspace(1, 2, len(x))

    towards = attack(model, engine, loss=weighted)(x, y)
    assert seen == [7] * 3  # all images at once
    with torch.no_grad():
        assert (model(towards).gather(1, y[:, None]) > model(x).gather(1, y[:, None])).all()
        away = attack(model, engine, loss=weighted, targeted=True)(x, y)
        assert (model(away).gather(1, y[:, None]) < model(x).gather(1, y[:, None])).all()


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("loss", [lambda z, y: F.cross_entropy(z, y), lambda z, y: 3.0, lambda z, y: z])
def test_a_loss_must_give_a_number_per_image(model, problem, engine, loss):
    before = state_of(model)
    with pytest.raises(TypeError, match=r"loss must return a tensor \[7\]"):
        attack(model, engine, loss=loss)(*problem)
    assert_untouched(model, before)


@pytest.mark.parametrize("engine", ENGINES)
def test_a_loss_without_a_gradient_is_refused(model, problem, engine):
    for loss in (lambda z, y: torch.ones(len(z)), lambda z, y: z.argmax(1).float()):
        with pytest.raises(TypeError, match="loss does not depend on the logits"):
            attack(model, engine, loss=loss)(*problem)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("options", [{}, {"best": True}, {"early_stop": True}, {"mean": (0.0,) * 3, "std": (1.0,) * 3}])
def test_memory_format_is_that_of_the_images(model, problem, engine, options):
    x, y = problem
    laid_out = x.to(memory_format=torch.channels_last)
    assert attack(model, engine, **options)(laid_out, y).stride() == laid_out.stride()
    assert attack(model, engine, **options)(x, y).stride() == x.stride()


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("norm", ["linf", "l2", "l1", "l2-sign"])
def test_a_ball_without_room(model, problem, engine, norm):
    x, y = problem
    for options in ({"eps": 0}, {"alpha": 0}, {"eps": 0, "step_rule": "apgd"}):
        if norm in ("linf", "l2") or "step_rule" not in options:
            assert torch.equal(attack(model, engine, norm=norm, **options)(x, y), x)


def test_what_is_no_loss_or_no_bounds_is_refused(model):
    with pytest.raises(TypeError, match="loss must be a name or a function"):
        PGD(model, loss=3)
    with pytest.raises(TypeError, match="bounds must be two numbers"):
        PGD(model, bounds=1.0)
    with pytest.raises(TypeError, match="eps must be a floating-point tensor"):
        PGD(model, eps=torch.tensor(1))


@pytest.mark.parametrize("engine", ENGINES)
def test_margin(model, problem, engine):
    x, y = problem
    adversarial = attack(model, engine, loss="margin", steps=1)(x, y)
    loss = lambda z, y: objectives.margin(z, y).sum()  # noqa: E731
    same(adversarial, (x + ALPHA * slope(model, x, y, loss).sign()).clamp(0, 1))
    by_hand = objectives.margin(torch.tensor([[3.0, 1, 2], [0, 5, 1]]), torch.tensor([0, 2]))
    assert by_hand.tolist() == [-1, 4]
    with pytest.raises(ValueError, match="at least 2 classes"):
        objectives.margin(torch.ones(1, 1), torch.tensor([0]))


@pytest.mark.parametrize("engine", ENGINES)
def test_soft_labels(model, problem, engine):
    x, y = problem
    hard = F.one_hot(y, 10).float()
    same(attack(model, engine)(x, hard), attack(model, engine)(x, y))
    mixed = 0.7 * hard + 0.3 * hard.roll(1, 0)
    same(attack(model, engine, steps=1)(x, mixed), (x + ALPHA * slope(model, x, mixed).sign()).clamp(0, 1))
    attack(model, engine, loss="kl", random_start=True)(x, mixed)
    for loss in ("dlr", "margin"):
        with pytest.raises(TypeError, match="probabilities"):
            attack(model, engine, loss=loss)(x, mixed)


def test_soft_labels_in_training(tiny_model, batch):
    x, y = batch
    tiny_model.train()
    hard = F.one_hot(y, 3).float()

    def loss(labels, method):
        net = copy.deepcopy(tiny_model)  # whose statistics move
        return adversarial_loss(net, x, labels, method=method, x_init=x)

    for method in ("standard", "at", "trades"):
        torch.testing.assert_close(loss(hard, method), loss(y, method))
    first, second, mixed = (
        loss(labels, "standard")[0] for labels in (hard, hard.roll(1, 0), (hard + hard.roll(1, 0)) / 2)
    )
    torch.testing.assert_close(mixed, (first + second) / 2)


@pytest.mark.parametrize("engine", ENGINES)
def test_best_is_the_highest_iterate(model, problem, engine):
    x, y = problem
    start = x.flip(0) * 0.1 + x * 0.9  # outside the ball, so that projections come first
    options = {"alpha": 0.05, "eps": 0.05}  # too long steps: the loss goes up and down
    runs = [attack(model, engine, steps=n, **options)(x, y, x_init=start) for n in range(1, 6)]
    heights = torch.stack([losses(model, run, y) for run in runs])
    best = losses(model, attack(model, engine, steps=5, best=True, **options)(x, y, x_init=start), y)
    assert (best >= heights.amax(0) * (1 - 1e-3)).all()
    lower = losses(model, attack(model, engine, steps=5, best=True, targeted=True, **options)(x, y, x_init=start), y)
    assert (lower <= losses(model, start, y) + 1e-4).all()


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("early_stop", [False, True])
def test_restarts_keep_the_highest(model, problem, engine, early_stop):
    x, y = problem
    options = {"random_start": True, "steps": 1, "alpha": 0.003}
    torch.manual_seed(0)
    runs = torch.stack([losses(model, attack(model, engine, **options)(x, y), y) for _ in range(4)])
    torch.manual_seed(0)
    found = attack(model, engine, restarts=4, early_stop=early_stop, **options)(x, y)
    torch.testing.assert_close(losses(model, found, y), runs.amax(0), rtol=1e-3, atol=1e-4)
    first = attack(model, engine, restarts=2, **options)(x, y, x_init=x)
    assert (losses(model, first, y) >= losses(model, attack(model, engine, steps=1, alpha=0.003)(x, y), y) - 1e-4).all()


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("restarts", [1, 3])
def test_an_image_stays_where_it_fools(model, problem, engine, restarts, monkeypatch):
    x, y = problem
    y = y.clone()
    y[[1, 4]] = (y[[1, 4]] + 1) % 10  # wrong from the start
    seen = []
    options = {"alpha": 0.004, "steps": 8, "random_start": restarts > 1, "restarts": restarts}

    def watched(logits, labels):
        seen.append(len(logits))
        return F.cross_entropy(logits, labels, reduction="none")

    found = attack(model, engine, loss=watched, early_stop=True, **options)(x, y)
    if restarts == 1:
        assert torch.equal(found[[1, 4]], x[[1, 4]])
        path = [x, *(attack(model, engine, **options | {"steps": n})(x, y) for n in range(1, 9))]
        for image in range(len(x)):
            fooled = [bool(model(p[image : image + 1]).argmax() != y[image]) for p in path]
            stop = fooled.index(True) if True in fooled else 8
            same(found[image], path[stop][image], 0.004)
    with torch.no_grad():
        alive = model(found).argmax(1) == y
        assert alive.sum() <= (model(attack(model, engine, **options)(x, y)).argmax(1) == y).sum()
    assert seen[0] == 7 and seen[1] == 7 and seen[-1] <= 5 and 5 in seen  # those that are left


@pytest.mark.parametrize("engine", ENGINES)
def test_an_early_stop_of_all_images_ends_the_attack(model, problem, engine):
    x, y = problem
    assert torch.equal(attack(model, engine, early_stop=True, steps=50)(x, (y + 1) % 10), x)
    target = attack(model, engine, early_stop=True, targeted=True, loss="margin")(x, y)
    assert torch.equal(target, x)


def test_images_that_see_each_other_stay_together():
    torch.manual_seed(0)
    net, (x, _) = Mixing().eval(), data(6, 16)
    y = net(x).argmax(1)
    y[0] = (y[0] + 1) % 4
    found = attack(net, "plan", early_stop=True)(x, y)
    assert torch.equal(found[0], x[0]) and not torch.equal(found[1:], x[1:])


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("kind", ["channel", "image", "both", "one"])
def test_a_radius_and_a_step_per_image_or_channel(model, problem, engine, kind):
    x, y = problem
    shape = {"channel": (3, 1, 1), "image": (7, 1, 1, 1), "both": (7, 3, 1, 1), "one": ()}[kind]
    generator = torch.Generator().manual_seed(0)
    eps = torch.rand(shape, generator=generator) * 0.05
    alpha = torch.rand(shape, generator=generator) * 0.02
    found = attack(model, engine, eps=eps, alpha=alpha, random_start=True)(x, y)
    assert ((found - x).abs() <= eps + 1e-6).all()
    assert ((found - x).abs().amax((2, 3)) > 0).all()
    once = attack(model, engine, eps=eps, alpha=alpha, steps=1)(x, y)
    step = torch.minimum(alpha, eps) * slope(model, x, y).sign()
    same(once, (x + step).clamp(0, 1))
    for norm in ("l2", "l1"):
        if kind in ("image", "one"):
            found = attack(model, engine, norm=norm, eps=eps * 10, alpha=alpha * 10, random_start=True)(x, y)
            length = (found - x).flatten(1).norm(p=int(norm[1]), dim=1)
            assert (length <= (eps * 10).flatten() + 1e-5).all()
        else:
            with pytest.raises(ValueError, match="one radius for all channels"):
                attack(model, engine, norm=norm, eps=eps)(x, y)


@pytest.mark.parametrize("shape", [(3,), (7,), (1, 1), (4, 1, 1), (5, 1, 1, 1), (7, 3, 16, 16)])
def test_tensors_of_other_shapes_are_refused(model, problem, shape):
    for name in ("eps", "alpha"):
        with pytest.raises(ValueError, match=f"{name} must be a number or a tensor"):
            attack(model, "plan", **{name: torch.rand(shape) * 0.1})(*problem)


class Rescaled(nn.Module):
    """``net`` of images * scale + shift."""

    def __init__(self, net, scale, shift):
        super().__init__()
        self.net = net
        self.register_buffer("scale", scale)
        self.register_buffer("shift", shift)

    def forward(self, x):
        return self.net(x * self.scale + self.shift)


MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("norm", ["linf", "l2", "l1", "l2-sign"])
def test_other_spaces_give_the_same_attack(model, problem, engine, norm):
    x, y = problem
    x = x.clone()
    x[:, :, :2], x[:, :, 2:4] = 0, 1
    size = {"linf": 1, "l1": 400}.get(norm, 20)
    options = {"norm": norm, "eps": EPS * size, "alpha": ALPHA * size}
    expected = attack(model, engine, **options)(x, y)
    bytes_ = Rescaled(model, torch.tensor(1 / 255), torch.tensor(0.0)).eval()
    options255 = {"norm": norm, "eps": EPS * size * 255, "alpha": ALPHA * size * 255, "bounds": (0, 255)}
    same(attack(bytes_, engine, **options255)(x * 255, y) / 255, expected)
    mean, std = torch.tensor(MEAN).view(3, 1, 1), torch.tensor(STD).view(3, 1, 1)
    normalised = Rescaled(model, std, mean).eval()
    found = attack(normalised, engine, **options, mean=MEAN, std=std.flatten())((x - mean) / std, y)
    same(found * std + mean, expected)
    if norm == "linf":  # as codebases write it
        low, high = (0 - mean) / std, (1 - mean) / std
        found = attack(normalised, engine, eps=EPS / std, alpha=ALPHA / std, bounds=(low, high))((x - mean) / std, y)
        same(found * std + mean, expected)
        start = attack(normalised, engine, eps=EPS / std, bounds=(low, high), random_start=True, steps=0)
        drawn = start((x - mean) / std, y)
        assert ((drawn * std + mean - x).abs() <= EPS + 1e-6).all() and drawn.ne((x - mean) / std).any()


def test_images_outside_the_bounds_are_refused(model, problem):
    x, y = problem
    with pytest.raises(ValueError, match=r"images must lie in \[0, 1\]"):
        attack(model, "plan")(x * 255, y)
    with pytest.raises(ValueError, match=r"images must lie in \[0, 255\]"):
        attack(model, "plan", bounds=(0, 255))(x - 1, y)
    with pytest.raises(ValueError, match=r"images must lie in \[0, 1\]"):
        attack(model, "plan", mean=MEAN, std=STD)(x * 5, y)
    with pytest.raises(ValueError, match="images must lie in their bounds"):
        attack(model, "plan", bounds=(torch.zeros(3, 1, 1), torch.ones(3, 1, 1)))(x + 0.5, y)
    with pytest.raises(ValueError, match="mean must have 3 numbers"):
        attack(model, "plan", mean=(0.5, 0.5), std=STD)(x, y)
    with pytest.raises(ValueError, match="NaN"):
        attack(model, "plan", mean=MEAN, std=STD)(x * torch.nan, y)


@pytest.mark.parametrize("engine", ENGINES)
def test_momentum(model, problem, engine):
    x, y = problem
    found = attack(model, engine, momentum=0.9)(x, y)
    moved, velocity = x, torch.zeros_like(x)
    for _ in range(3):
        gradient = slope(model, moved, y)
        velocity = 0.9 * velocity + gradient / gradient.abs().sum((1, 2, 3), keepdim=True)
        moved = (moved + ALPHA * velocity.sign()).clamp(x - EPS, x + EPS).clamp(0, 1)
    same(found, moved)


def apgd(model, x, labels, eps, steps, norm):
    """Algorithm 1 of arXiv 2003.01690, image by image."""
    results = []
    for clean, label in zip(x.split(1), labels.split(1), strict=True):

        def f(z, label=label):
            leaf = z.clone().requires_grad_()
            value = F.cross_entropy(model(leaf), label)
            return value.item(), torch.autograd.grad(value, leaf)[0]

        def project(z, clean=clean):
            if norm == "linf":
                return z.clamp(clean - eps, clean + eps).clamp(0, 1)
            length = (z - clean).norm()
            return (clean + (z - clean) / length * eps if length > eps else z).clamp(0, 1)

        def ahead(z, gradient, rate):
            return z + rate * (gradient.sign() if norm == "linf" else gradient / gradient.norm())

        checks, p = [0], [0.0, 0.22]
        while p[-1] < 1:
            checks.append(math.ceil(round(p[-1] * steps, 6)))
            p.append(p[-1] + max(p[-1] - p[-2] - 0.03, 0.06))
        rate, now, before, best = 2 * eps, clean, clean, clean
        value, gradient = f(now)
        best_value, best_gradient, checked, value_before, rises, reduced = value, gradient, value, value, 0, False
        for k in range(steps):
            if k:
                value, gradient = f(now)
                rises += value > value_before
                value_before = value
                if value > best_value:
                    best, best_value, best_gradient = now, value, gradient
            if k and k in checks:
                reduced = rises < 0.75 * (k - checks[checks.index(k) - 1]) or (not reduced and best_value <= checked)
                checked, rises = best_value, 0
                if reduced:
                    rate, now, gradient = rate / 2, best, best_gradient
            z, part = project(ahead(now, gradient, rate)), 0.75 if k else 1
            now, before = project(now + part * (z - now) + (1 - part) * (now - before)), now
        results.append(now if f(now)[0] > best_value else best)
    return torch.cat(results)


@pytest.mark.parametrize("norm, eps", [("linf", 0.03), ("l2", 0.5)])
@pytest.mark.parametrize("engine", ENGINES)
def test_apgd(model, problem, engine, norm, eps):
    x, y = problem
    y = torch.where(torch.arange(7) < 4, y, (y + 1) % 10)
    expected = apgd(model, x, y, eps, 25, norm)
    found = attack(model, engine, step_rule="apgd", norm=norm, eps=eps, steps=25)(x, y)
    torch.testing.assert_close(losses(model, found, y), losses(model, expected, y), rtol=2e-2, atol=2e-2)
    assert ((found - x).flatten(1).norm(p=math.inf if norm == "linf" else 2, dim=1) <= eps + 1e-5).all()
    with torch.no_grad():
        plain = attack(model, engine, norm=norm, eps=eps, alpha=eps / 4, steps=25)(x, y)
    assert losses(model, found, y).mean() >= losses(model, plain, y).mean() * 0.98
    assert list(ascent.checkpoints(100)) == [22, 41, 57, 70, 80, 87, 93, 99]
    stopped = attack(model, engine, step_rule="apgd", norm=norm, eps=eps, steps=25, early_stop=True)(x, y)
    assert torch.equal(stopped[4:], x[4:])


def test_names_of_norms():
    for names, norm in ((("linf", "Linf", "inf", math.inf, float("inf")), "linf"), (("l2", "L2", 2, 2.0), "l2")):
        assert {norm_named(name) for name in names} == {norm}
    assert norm_named("L1") == norm_named(1) == "l1" and norm_named("l2-sign") == "l2-sign"


def test_projection_into_the_l1_ball_is_the_nearest_point():
    generator = torch.Generator().manual_seed(0)
    clean = torch.full((5, 1, 3, 4), 0.5)
    x = clean + torch.randn(clean.shape, generator=generator) * torch.tensor([2, 1, 0.1, 0.01, 0]).view(-1, 1, 1, 1)
    ball = Ball("l1", 1.0, -100.0, 100.0)
    found = ball.project(x, clean)
    for image, own in zip(x - clean, found - clean, strict=True):
        low, high = 0.0, 10.0  # the threshold, by bisection
        for _ in range(60):
            middle = (low + high) / 2
            low, high = (middle, high) if (image.abs() - middle).clamp_min(0).sum() > 1 else (low, middle)
        expected = image if image.abs().sum() <= 1 else image.sign() * (image.abs() - high).clamp_min(0)
        torch.testing.assert_close(own, expected, rtol=1e-5, atol=1e-6)
    assert (Ball("l1", 1.0).project(x, clean) - clean).abs().sum((1, 2, 3)).max() <= 1 + 1e-5


def test_an_l1_step_moves_few_pixels_that_can_move():
    x = torch.rand(2, 3, 20, 20)
    x[0, 0] = 1
    gradient = torch.rand(2, 3, 20, 20) - 0.5
    gradient[0, 0] = 5
    moved = Ball("l1", 1.0).step(x, gradient, 0.5) - x
    assert ((moved != 0).sum((1, 2, 3)) == 12).all() and (moved[0, 0] == 0).all()
    torch.testing.assert_close(moved.abs().sum((1, 2, 3)), torch.full((2,), 0.5))


@pytest.mark.parametrize("norm", ["l1", "l2"])
def test_starts_are_uniform_in_the_ball(norm):
    dimensions, p = 3, int(norm[1])
    images = torch.full((20000, 3, 1, 1), 0.5)
    noise = Ball(norm, 0.4).noise(images, torch.Generator().manual_seed(0))
    length = noise.flatten(1).norm(p=p, dim=1) / 0.4
    for part in (0.3, 0.6, 0.9):
        assert abs((length <= part).float().mean() - part**dimensions) < 0.02
    assert noise.mean((0, 2, 3)).abs().max() < 0.01


class Returning(nn.Module):
    def __init__(self, net, wrap):
        super().__init__()
        self.net, self.wrap = net, wrap

    def forward(self, x):
        return self.wrap(self.net(x), x)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize(
    "wrap, output",
    [
        (lambda z, x: (x, z), 1),
        (lambda z, x: {"features": x.mean(1), "logits": z}, "logits"),
        (lambda z, x: {"heads": [x, (z, x)]}, lambda made: made["heads"][1][0]),
    ],
)
def test_logits_among_other_results(model, problem, engine, wrap, output):
    x, y = problem
    net = Returning(model, wrap).eval()
    own = attack(net, engine, output=output)
    same(own(x, y), attack(model, engine)(x, y))
    assert own.explain(x).engine == engine
    with pytest.raises(TypeError, match="tensor of logits.*output="):
        attack(net, "eager")(x, y)
    with pytest.raises(TypeError, match="output='nothing' is not in the"):
        attack(net, "eager", output="nothing")(x, y)


@pytest.mark.parametrize("engine", ENGINES)
def test_options_together_in_half_precision_and_chunks(model, problem, engine):
    x, y = problem
    options = {
        "restarts": 2, "best": True, "early_stop": True, "momentum": 0.5, "eps": torch.full((7, 1, 1, 1), EPS),
        "random_start": True, "loss": "margin", "amp_dtype": torch.bfloat16, "chunk_size": 3,
    }  # fmt: skip
    options = options if engine == "plan" else options | {"chunk_size": None}
    before = state_of(model)
    found = attack(model, engine, **options)(x, y)
    assert_untouched(model, before)
    assert ((found - x).abs() <= EPS + 1e-6).all() and loss_of(model, found, y) > loss_of(model, x, y)


@pytest.mark.parametrize("options", [{"best": True}, {"restarts": 2, "random_start": True}, {"step_rule": "apgd"}])
def test_chunks_do_not_change_the_result(model, options):
    x, y = data(9, 16)
    torch.manual_seed(0)
    whole = attack(model, "plan", **options)(x, y)
    torch.manual_seed(0)
    same(attack(model, "plan", chunk_size=2, **options)(x, y), whole)


def test_a_training_step_with_such_an_attack_says_why_it_is_no_graph(model):
    for options, reason in (
        ({"early_stop": True}, "early_stop=True"),
        ({"loss": lambda z, y: z[:, 0]}, "loss is a function"),
        ({"eps": torch.tensor(0.1)}, "eps is a tensor"),
        ({"mean": (0.5,) * 3, "std": torch.ones(3)}, "images are normalised"),
        ({"bounds": (torch.zeros(3, 1, 1), 1.0)}, "bounds is a tensor"),
    ):
        assert PGD(model, **options).looks_between_passes == reason
    assert PGD(model, best=True, restarts=3, momentum=1.0, bounds=(0, 255)).looks_between_passes == ""


def test_auto_takes_what_is_faster(model, problem):
    """Folding the weights of a network that is wide for its images takes longer than a step on one of them."""
    x, y = problem
    wide = nn.Sequential(nn.Conv2d(3, 64, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 4096))
    wide, small_x = wide.append(nn.ReLU()).append(nn.Linear(4096, 10)).eval(), x[:, :, :4, :4]
    for count, steps, engine in ((1, 1, "eager"), (7, 200, "plan"), (1, 1400, "plan")):
        own = attack(wide, "auto", steps=steps)
        report = own.explain(small_x[:count])
        assert report.engine == engine, report.reason
        assert engine == "plan" or "do not pay" in report.reason
    assert attack(wide, "plan", steps=1).explain(small_x[:1]).engine == "plan"
    assert attack(model, "auto", steps=1).explain(x[:1]).engine == "plan"
