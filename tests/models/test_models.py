from __future__ import annotations

import pytest
import torch
from torch import nn

import models


def parameter_count(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize(
    ("options", "image_shape", "classes", "count"),
    [
        ({"stem": "imagenet"}, (3, 224, 224), 1000, 11_689_512),  # torchvision's resnet18
        ({}, (3, 32, 32), 10, 11_173_962),
    ],
)
def test_resnet18_has_the_published_parameter_count(options, image_shape, classes, count) -> None:
    assert parameter_count(models.build("resnet18", image_shape=image_shape, classes=classes, **options)) == count


def test_lenet_has_the_published_parameter_count() -> None:
    assert parameter_count(models.build("lenet", image_shape=(1, 28, 28), classes=10)) == 61_706


def test_mlp_parameter_count_by_hand() -> None:
    assert parameter_count(models.build("mlp", image_shape=(1, 8, 8), classes=10, hidden=[5])) == 65 * 5 + 6 * 10
    assert parameter_count(models.build("mlp", image_shape=(1, 8, 8), classes=10, hidden=[])) == 65 * 10


def test_resnet18_state_is_named_as_in_torchvision() -> None:
    bn = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
    expected = {"conv1.weight", "fc.weight", "fc.bias"} | {f"bn1.{k}" for k in bn}
    for stage in range(1, 5):
        for block in range(2):
            for i in (1, 2):
                expected |= {f"layer{stage}.{block}.conv{i}.weight"} | {f"layer{stage}.{block}.bn{i}.{k}" for k in bn}
        if stage > 1:
            expected |= {f"layer{stage}.0.downsample.0.weight"} | {f"layer{stage}.0.downsample.1.{k}" for k in bn}
    assert set(models.build("resnet18", image_shape=(3, 32, 32), classes=10, width=2).state_dict()) == expected


@pytest.mark.parametrize(("stem", "side"), [("cifar", 4), ("imagenet", 1)])
def test_resnet18_stems_reduce_a_32_pixel_side(stem, side) -> None:
    model = models.build("resnet18", image_shape=(3, 32, 32), classes=10, width=2, stem=stem)
    sides = []
    model.layer4.register_forward_hook(lambda module, inputs, output: sides.append(output.shape[-1]))
    model(torch.zeros(2, 3, 32, 32))
    assert sides == [side]


def test_resnet18_convolutions_start_from_he_fan_out() -> None:
    torch.manual_seed(0)
    weight = models.build("resnet18", image_shape=(3, 32, 32), classes=10).layer4[1].conv1.weight
    assert weight.std().item() == pytest.approx((2 / (512 * 9)) ** 0.5, rel=0.01)


@pytest.mark.parametrize("name", models.names())
@pytest.mark.parametrize("image_shape", [(1, 28, 28), (3, 32, 32), (3, 20, 36)])
def test_every_model_gives_logits_and_trains_every_parameter(name, image_shape) -> None:
    torch.manual_seed(0)
    model = models.build(name, image_shape=image_shape, classes=7, **({"width": 4} if name == "resnet18" else {}))
    logits = model(torch.randn(3, *image_shape))
    assert logits.shape == (3, 7)
    nn.functional.cross_entropy(logits, torch.tensor([0, 3, 6])).backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())


@pytest.mark.parametrize("name", models.names())
def test_no_activation_works_in_place(name) -> None:
    model = models.build(name, image_shape=(1, 28, 28), classes=10)
    relus = [m for m in model.modules() if isinstance(m, nn.ReLU)]
    assert relus
    assert not any(m.inplace for m in relus)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("resnet81", {}, r"unknown model: 'resnet81' \(allowed: mlp, lenet, resnet18\); did you mean 'resnet18'"),
        ("transformer9", {}, r"unknown model: 'transformer9' \(allowed: mlp, lenet, resnet18\)$"),
        ("resnet18", {"widht": 8}, r"unknown option of model 'resnet18': 'widht' .*did you mean 'width'"),
        ("lenet", {"width": 8}, r"unknown option of model 'lenet': 'width' \(allowed: none\)"),
        ("resnet18", {"width": 0}, "width must be at least 1, got 0"),
        ("resnet18", {"stem": "cifra"}, r"unknown stem: 'cifra' \(allowed: cifar, imagenet\)"),
        ("mlp", {"hidden": [16, 0]}, r"hidden: .* got \[16, 0\]"),
    ],
)
def test_bad_input_is_one_clear_error(name, options, message) -> None:
    with pytest.raises(ValueError, match=message):
        models.build(name, image_shape=(3, 32, 32), classes=10, **options)


def test_lenet_refuses_images_that_are_too_small() -> None:
    with pytest.raises(ValueError, match="at least 12x12 pixels, got 11x12"):
        models.build("lenet", image_shape=(1, 11, 12), classes=10)
    assert models.build("lenet", image_shape=(1, 12, 12), classes=10)(torch.zeros(1, 1, 12, 12)).shape == (1, 10)
