"""PGD: what it computes, what it leaves alone, what it refuses."""

import copy
import re

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tests.attacks.engine.helpers import assert_untouched, loss_of, state_of
from twins_fast import PGD, convert_twin_bn
from twins_fast.attacks import named_attack, objectives, pgd


def test_repr_shows_all_options():
    attack = PGD(nn.Identity(), alpha=0.01, random_start=0, amp_dtype=torch.bfloat16)
    assert repr(attack) == (
        "PGD(Identity, eps=8/255, alpha=0.01, steps=10, random_start=False, norm='linf', loss='ce', bn_mode='eval', "
        "amp_dtype=torch.bfloat16, generator=None, targeted=False, engine='auto', chunk_size=None, restarts=1, "
        "best=False, early_stop=False, momentum=0.0, step_rule='fixed', bounds=(0.0, 1.0), mean=None, std=None, "
        "output=None)"
    )
    for eps in (0, 0.0, 1 / 255, 0.3, 8 / 254, 1.0, 64.0):
        (shown,) = re.findall(r"\(Identity, eps=(.*?),", repr(PGD(nn.Identity(), eps=eps, norm="l2")))
        assert eval(shown) == eps and ("/" in shown) == (eps == 1 / 255)


@pytest.mark.parametrize("norm", ["linf", "l2", "l2-sign", "l1"])
@pytest.mark.parametrize("random_start", [True, False, "normal"])
def test_stays_in_the_ball_and_raises_the_loss(tiny_model, batch, norm, random_start):
    images, labels = batch
    eps = {"linf": 0.05, "l1": 6.0}.get(norm, 0.6)
    attack = PGD(tiny_model, eps=eps, alpha=eps / 4, norm=norm, random_start=random_start)
    adversarial = attack(images, labels)
    offset = (adversarial - images).flatten(1)
    length = {"linf": offset.abs().amax(1), "l1": offset.abs().sum(1)}.get(norm, offset.norm(dim=1))
    assert (length <= eps + 1e-5).all() and (length > 0).all()
    assert adversarial.min() >= 0 and adversarial.max() <= 1 and not adversarial.requires_grad
    assert loss_of(tiny_model, adversarial, labels) > loss_of(tiny_model, images, labels)


def test_one_linf_step_by_hand(tiny_model, batch):
    images, labels = batch
    tiny_model.eval()
    x = images.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(F.cross_entropy(tiny_model(x), labels), x)
    expected = (images + 0.01 * gradient.sign()).clamp(0, 1)
    adversarial = PGD(tiny_model, eps=0.03, alpha=0.01, steps=1, random_start=False)(images, labels)
    assert torch.equal(adversarial, expected)


def test_l2_step_has_length_alpha(tiny_model, batch):
    images, labels = batch[0] * 0.5 + 0.25, batch[1]
    adversarial = PGD(tiny_model, eps=1.0, alpha=0.1, steps=1, random_start=False, norm="l2")(images, labels)
    torch.testing.assert_close((adversarial - images).flatten(1).norm(dim=1), torch.full((8,), 0.1))


@pytest.mark.parametrize("loss", ["ce", "dlr"])
def test_targeted_moves_towards_the_target(tiny_model, batch, loss):
    images, labels = batch
    target = (labels + 1) % 3
    adversarial = PGD(tiny_model, eps=0.1, alpha=0.02, loss=loss, targeted=True)(images, target)
    assert loss_of(tiny_model, adversarial, target) < loss_of(tiny_model, images, target)


def test_kl_moves_away_from_the_clean_prediction(tiny_model, batch):
    images, labels = batch
    adversarial = named_attack("trades", tiny_model, eps=0.1, alpha=0.02)(images, labels)
    with torch.no_grad():
        clean = F.softmax(tiny_model.eval()(images), 1)
        assert (objectives.kl_divergence(tiny_model(adversarial), clean) > 1e-4).all()


def test_dlr_by_hand():
    logits = torch.tensor([[3.0, 1.0, 0.5, 0.0], [0.0, 2.0, 5.0, 1.0]])
    value = objectives.difference_of_logits_ratio(logits, torch.tensor([0, 1]))
    torch.testing.assert_close(value, torch.tensor([-(3 - 1) / (3 - 0.5), -(2 - 5) / (5 - 1.0)]))
    with pytest.raises(ValueError, match="at least 3 classes"):
        objectives.difference_of_logits_ratio(logits[:, :2], torch.tensor([0, 1]))


@pytest.mark.parametrize("classes", [3, 4, 10])
@pytest.mark.parametrize("loss", ["ce", "kl", "dlr", "margin"])
def test_gradients_in_closed_form(loss, classes):
    """Against autograd in float64: labels of every rank, ties, saturated and NaN logits."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(64, classes, dtype=torch.float64, generator=generator) * 3
    logits[:8] *= 100
    logits[8:12] = logits[8:12].round()
    labels = torch.arange(64) % classes
    labels[12:20] = logits[12:20].argmax(1)
    clean = F.softmax(torch.randn(64, classes, dtype=torch.float64, generator=generator), 1)
    values, slope = pgd._LOSSES[loss]
    reference = clean if loss == "kl" else labels
    own_reference = objectives.one_hot(labels, classes).double() if loss == "ce" else reference
    leaf = logits.clone().requires_grad_()
    (expected,) = torch.autograd.grad(values(leaf, reference).sum(), leaf)
    torch.testing.assert_close(slope(logits, own_reference), expected, rtol=1e-12, atol=1e-12)
    if loss == "ce":
        torch.testing.assert_close(values(logits, own_reference), values(logits, labels), rtol=1e-12, atol=1e-12)
    logits[0, 1] = torch.nan
    assert loss == "margin" or slope(logits, own_reference)[0].isnan().any()
    assert slope(logits, own_reference)[1:].isfinite().all()


def test_generator_and_x_init_decide_the_start(tiny_model, batch):
    images, labels = batch
    runs = [PGD(tiny_model, steps=0, generator=torch.Generator().manual_seed(s))(images, labels) for s in (5, 5, 6)]
    assert torch.equal(runs[0], runs[1]) and not torch.equal(runs[0], runs[2])
    start = (images + 0.01).clamp(0, 1)
    adversarial = PGD(tiny_model, steps=0)(images, labels, x_init=start)
    assert torch.equal(adversarial, start) and adversarial.data_ptr() != start.data_ptr()


@pytest.mark.parametrize("fails", [False, True])
def test_model_comes_back_exactly(tiny_model, batch, fails):
    model = convert_twin_bn(tiny_model).train()
    model.layers[0].eval()
    model.conv1.weight.requires_grad_(False)
    images, labels = batch
    model(images).sum().backward()
    before = state_of(model)
    if fails:
        handle = model.fc_downstream.register_forward_hook(lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            PGD(model, steps=2)(images, labels)
        handle.remove()
    else:
        PGD(model, steps=2)(images, labels)
    assert_untouched(model, before)


def test_bn_mode_train_updates_running_statistics(tiny_model, batch):
    expected, (images, labels) = copy.deepcopy(tiny_model).train(), batch
    PGD(tiny_model, steps=2, bn_mode="train", alpha=0, random_start=False)(images, labels)
    for _ in range(2):  # without a step, both passes see the images themselves
        expected(images)
    for name, value in expected.named_buffers():
        torch.testing.assert_close(tiny_model.get_buffer(name), value, msg=name)
    assert tiny_model.bn1.num_batches_tracked == 2


def test_works_under_no_grad_and_with_autocast(tiny_model, batch):
    images, labels = batch
    with torch.no_grad():
        plain = PGD(tiny_model, random_start=False)(images, labels)
    half = PGD(tiny_model, random_start=False, amp_dtype=torch.bfloat16)(images, labels)
    assert half.dtype == torch.float32
    assert (half - images).abs().max() <= 8 / 255 + 1e-6
    assert loss_of(tiny_model, half, labels) > 0.97 * loss_of(tiny_model, plain, labels)


def test_empty_batch(tiny_model):
    adversarial = PGD(tiny_model)(torch.empty(0, 3, 8, 8), torch.empty(0, dtype=torch.int64))
    assert adversarial.shape == (0, 3, 8, 8)


def test_channels_last_is_kept(tiny_model, batch):
    images = batch[0].contiguous(memory_format=torch.channels_last)
    adversarial = PGD(tiny_model, steps=1)(images, batch[1])
    assert adversarial.is_contiguous(memory_format=torch.channels_last)


def spoiled(images, value):
    images = images.clone()
    images[0, 0, 0, 0] = value
    return images


BAD_BATCHES = {
    "above one": (lambda x, y: (spoiled(x, 1.5), y), ValueError, r"\[0, 1\].*1\.5"),
    "negative": (lambda x, y: (spoiled(x, -0.25), y), ValueError, r"\[0, 1\].*-0\.25"),
    "nan": (lambda x, y: (spoiled(x, float("nan")), y), ValueError, "images hold 1 NaN"),
    "integer images": (lambda x, y: ((x * 255).to(torch.uint8), y), TypeError, "images.*uint8"),
    "three dimensions": (lambda x, y: (x[0], y), ValueError, r"images.*\[N, C, H, W\]"),
    "labels too few": (lambda x, y: (x, y[:5]), ValueError, r"labels.*\[8\].*\[5\]"),
    "label dtype": (lambda x, y: (x, y.float()), TypeError, "labels.*float32"),
    "no probabilities": (lambda x, y: (x, torch.ones(8, 3)), ValueError, "probabilities, not negative and 1 in sum"),
    "probabilities of others": (lambda x, y: (x, torch.ones(8, 4) / 4), ValueError, "class|size"),
    "too few probabilities": (lambda x, y: (x, torch.ones(5, 3) / 3), ValueError, r"labels.*\[8, classes\].*\[5, 3\]"),
    "label range": (lambda x, y: (x, y + 2), ValueError, "labels hold class 4.*3 classes"),
    "negative label": (lambda x, y: (x, y - 1), ValueError, "negative.*-1"),
    "another device": (lambda x, y: (x.to("meta"), y.to("meta")), ValueError, "images are on meta.*model is on cpu"),
}


@pytest.mark.parametrize("name", BAD_BATCHES)
def test_bad_batches_are_refused(tiny_model, batch, name):
    spoil, error, message = BAD_BATCHES[name]
    labels = batch[1].clone()
    labels[:3] = torch.arange(3)
    before = state_of(tiny_model)
    with pytest.raises(error, match=message):
        PGD(tiny_model)(*spoil(batch[0], labels))
    assert_untouched(tiny_model, before)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"eps": -0.1}, "eps.*-0.1"),
        ({"alpha": -1}, "alpha.*-1"),
        ({"steps": -2}, "steps.*-2"),
        ({"steps": 1.5}, "steps.*1.5"),
        ({"eps": float("nan")}, "eps.*nan"),
        ({"norm": "l0"}, "norm.*'l0'"),
        ({"norm": 3}, "norm.*3"),
        ({"norm": []}, "norm.*\\[\\]"),
        ({"eps": 2.0}, "eps must be at most 1.*did you mean 2/255"),
        ({"eps": 256, "bounds": (0, 255)}, "eps must be at most 255"),
        ({"eps": torch.tensor(-1.0)}, "eps must hold finite"),
        ({"restarts": 0}, "restarts must be at least 1"),
        ({"restarts": 2, "random_start": False}, "restarts need a random start"),
        ({"step_rule": "adam"}, "step_rule.*'adam'"),
        ({"step_rule": "apgd", "momentum": 0.5}, "momentum of its own"),
        ({"step_rule": "apgd", "norm": "l1"}, "norms linf and l2"),
        ({"momentum": -1}, "momentum.*-1"),
        ({"bounds": (1, 0)}, "bounds.*lower one first"),
        ({"bounds": (0, float("inf"))}, "bounds.*finite"),
        ({"mean": (0.5,)}, "mean and std"),
        ({"loss": "mse"}, "loss.*'mse'"),
        ({"bn_mode": "off"}, "bn_mode.*'off'"),
        ({"amp_dtype": torch.float64}, "amp_dtype"),
        ({"loss": "kl", "targeted": True}, "targeted"),
    ],
)
def test_bad_options_are_refused(tiny_model, options, message):
    with pytest.raises(ValueError, match=message):
        PGD(tiny_model, **options)


def test_batch_norm_without_statistics_is_refused(batch):
    model = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3, track_running_stats=False))
    with pytest.raises(ValueError, match="'1' has none"):
        PGD(model)(*batch)


def test_a_falsy_random_start_starts_at_the_image(tiny_model, batch):
    assert torch.equal(PGD(tiny_model, random_start=0, steps=0)(*batch), batch[0])


def test_without_steps_the_start_is_still_put_into_the_ball(tiny_model, batch):
    adversarial = PGD(tiny_model, eps=0.1, steps=0)(*batch, x_init=batch[0] + 5)
    assert (adversarial - batch[0]).abs().max() <= 0.1 + 1e-6 and adversarial.max() <= 1


def test_a_model_that_returns_no_tensor_and_inference_mode_are_refused(tiny_model, batch):
    class Pair(nn.Module):
        def forward(self, x):
            return tiny_model(x), x

    with pytest.raises(TypeError, match="tensor of logits, got tuple"):
        PGD(Pair())(*batch)
    with torch.inference_mode(), pytest.raises(RuntimeError, match="inference_mode"):
        PGD(tiny_model)(*batch)


def test_bad_x_init_is_refused(tiny_model, batch):
    with pytest.raises(ValueError, match="x_init"):
        PGD(tiny_model)(*batch, x_init=batch[0][:4])
    with pytest.raises(ValueError, match="not finite"):
        PGD(tiny_model)(*batch, x_init=batch[0] / 0)
