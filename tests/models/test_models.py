from __future__ import annotations

import re

import pytest
import torch
from torch import nn

import models


def parameter_count(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


# The narrowest form of each, and the smallest side its images may have, by stem
NARROW = {
    "resnet18": ({"width": 4}, {"cifar": 1, "imagenet": 1}),
    "vgg16": ({"width": 2}, {"cifar": 32, "imagenet": 32}),
    "densenet121": ({"width": 4}, {"cifar": 8, "imagenet": 29}),
    "mobilenet_v2": ({"width": 8}, {"cifar": 1, "imagenet": 1}),
}


@pytest.mark.parametrize(
    ("name", "options", "input_shape", "classes", "count"),
    [
        # the papers' networks, as torchvision counts them
        ("resnet18", {"stem": "imagenet"}, (3, 224, 224), 1000, 11_689_512),
        ("vgg16", {"stem": "imagenet"}, (3, 224, 224), 1000, 138_365_992),
        ("densenet121", {"stem": "imagenet"}, (3, 224, 224), 1000, 7_978_856),
        ("mobilenet_v2", {"stem": "imagenet"}, (3, 224, 224), 1000, 3_504_872),
        ("mobilenet_v2", {"stem": "imagenet", "width": 16}, (3, 224, 224), 1000, 1_968_680),
        # the forms for CIFAR-10
        ("resnet18", {}, (3, 32, 32), 10, 11_173_962),
        ("vgg16", {}, (3, 32, 32), 10, 14_728_266),
        ("densenet121", {}, (3, 32, 32), 10, 6_956_298),
        ("mobilenet_v2", {}, (3, 32, 32), 10, 2_236_682),
        # GPT-2 small, whose last layer has no weight of its own
        ("gpt", {"layers": 12, "heads": 12, "width": 768}, (1024,), 50_257, 124_439_808 + 50_257 * 768),
    ],
)
def test_published_parameter_counts(name, options, input_shape, classes, count) -> None:
    with torch.device("meta"):
        model = models.build(name, input_shape=input_shape, classes=classes, **options)
    assert parameter_count(model) == count


@pytest.mark.parametrize(
    ("name", "published"),
    [
        ("resnet18", "resnet18"),
        ("vgg16", "vgg16_bn"),
        ("densenet121", "densenet121"),
        ("mobilenet_v2", "mobilenet_v2"),
    ],
)
def test_state_is_that_of_torchvision(name, published) -> None:
    torchvision = pytest.importorskip("torchvision")
    with torch.device("meta"):
        ours = models.build(name, input_shape=(3, 224, 224), classes=1000, stem="imagenet")
        theirs = getattr(torchvision.models, published)()
    shapes = [{key: tuple(value.shape) for key, value in model.state_dict().items()} for model in (ours, theirs)]
    assert shapes[0] == shapes[1]


def test_lenet_has_the_published_parameter_count() -> None:
    assert parameter_count(models.build("lenet", input_shape=(1, 28, 28), classes=10)) == 61_706


def test_mlp_parameter_count_by_hand() -> None:
    assert parameter_count(models.build("mlp", input_shape=(1, 8, 8), classes=10, hidden=[5])) == 65 * 5 + 6 * 10
    assert parameter_count(models.build("mlp", input_shape=(1, 8, 8), classes=10, hidden=[])) == 65 * 10


def test_resnet18_state_is_named_as_in_torchvision() -> None:
    bn = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
    expected = {"conv1.weight", "fc.weight", "fc.bias"} | {f"bn1.{k}" for k in bn}
    for stage in range(1, 5):
        for block in range(2):
            for i in (1, 2):
                expected |= {f"layer{stage}.{block}.conv{i}.weight"} | {f"layer{stage}.{block}.bn{i}.{k}" for k in bn}
        if stage > 1:
            expected |= {f"layer{stage}.0.downsample.0.weight"} | {f"layer{stage}.0.downsample.1.{k}" for k in bn}
    assert set(models.build("resnet18", input_shape=(3, 32, 32), classes=10, width=2).state_dict()) == expected


@pytest.mark.parametrize(("stem", "side"), [("cifar", 4), ("imagenet", 1)])
def test_resnet18_stems_reduce_a_32_pixel_side(stem, side) -> None:
    model = models.build("resnet18", input_shape=(3, 32, 32), classes=10, width=2, stem=stem)
    sides = []
    model.layer4.register_forward_hook(lambda module, inputs, output: sides.append(output.shape[-1]))
    model(torch.zeros(2, 3, 32, 32))
    assert sides == [side]


def test_resnet18_convolutions_start_from_he_fan_out() -> None:
    torch.manual_seed(0)
    weight = models.build("resnet18", input_shape=(3, 32, 32), classes=10).layer4[1].conv1.weight
    assert weight.std().item() == pytest.approx((2 / (512 * 9)) ** 0.5, rel=0.01)


@pytest.mark.parametrize(
    ("name", "kind", "std"),
    [
        ("vgg16", nn.Conv2d, lambda weight: (2 / weight[:, 0].numel()) ** 0.5),  # He, fan out
        ("vgg16", nn.Linear, lambda weight: 0.01),
        ("densenet121", nn.Conv2d, lambda weight: (2 / weight[0].numel()) ** 0.5),  # He, fan in
        ("mobilenet_v2", nn.Conv2d, lambda weight: (2 / weight[:, 0].numel()) ** 0.5),
        ("mobilenet_v2", nn.Linear, lambda weight: 0.01),
    ],
)
def test_weights_start_as_published(name, kind, std) -> None:
    torch.manual_seed(0)
    model = models.build(name, input_shape=(3, 32, 32), classes=1000, width=16, stem="imagenet")
    large = [m for m in model.modules() if isinstance(m, kind) and m.weight.numel() > 5000]
    assert large
    for layer in large:
        assert layer.weight.std().item() == pytest.approx(std(layer.weight), rel=0.05)
        assert layer.bias is None or not layer.bias.any()


def test_gpt_starts_as_published() -> None:
    torch.manual_seed(0)
    model = models.build("gpt", input_shape=(64,), classes=100, layers=8)
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear | nn.Embedding):
            adds = name.endswith(("projection", "fc2"))
            assert module.weight.std().item() == pytest.approx(0.005 if adds else 0.02, rel=0.05)
    logits = model(torch.randint(0, 100, (2, 64)))
    assert nn.functional.cross_entropy(logits.flatten(0, 1), torch.randint(0, 100, (128,))).item() < 4.8  # ln 100: 4.6


def test_gpt_sees_no_later_token() -> None:
    torch.manual_seed(0)
    model = models.build("gpt", input_shape=(12,), classes=9, layers=2, heads=2, width=8)
    text = torch.randint(0, 9, (3, 12))
    changed = text.clone()
    changed[:, 7] = (changed[:, 7] + 1) % 9
    before, after = model(text), model(changed)
    assert before.shape == (3, 12, 9)
    assert torch.equal(before[:, :7], after[:, :7])
    assert (before[:, 7:] != after[:, 7:]).any(dim=2).all()
    assert torch.allclose(model(text[:, :5]), before[:, :5], atol=1e-6)


def test_gpt_attention_is_that_of_the_paper() -> None:
    torch.manual_seed(0)
    attention = models.build("gpt", input_shape=(6,), classes=5, layers=1, heads=2, width=8).blocks[0].attention
    x = torch.randn(1, 6, 8)
    query, key, value = attention.qkv(x)[0].split(8, dim=1)  # [T, width]
    heads = []
    for columns in (slice(0, 4), slice(4, 8)):
        scores = query[:, columns] @ key[:, columns].T / 2  # sqrt(4)
        scores = scores.masked_fill(torch.ones(6, 6).triu(1).bool(), -torch.inf)
        heads.append(scores.softmax(dim=1) @ value[:, columns])
    assert torch.allclose(attention(x)[0], attention.projection(torch.cat(heads, dim=1)), atol=1e-6)


def train_every_parameter(model: nn.Module, inputs: torch.Tensor, labels: torch.Tensor) -> None:
    logits = model(inputs)
    assert logits.shape == (*labels.shape, 7)
    nn.functional.cross_entropy(logits.flatten(0, -2), labels.flatten()).backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())


@pytest.mark.parametrize("name", ["mlp", "lenet"])
@pytest.mark.parametrize("input_shape", [(1, 28, 28), (3, 32, 32), (3, 20, 36)])
def test_simple_networks_give_logits_and_train_every_parameter(name, input_shape) -> None:
    torch.manual_seed(0)
    model = models.build(name, input_shape=input_shape, classes=7)
    train_every_parameter(model, torch.randn(3, *input_shape), torch.tensor([0, 3, 6]))


@pytest.mark.parametrize("stem", ["cifar", "imagenet"])
@pytest.mark.parametrize("name", NARROW)
@pytest.mark.parametrize("input_shape", [(1, 32, 36)])
def test_image_networks_give_logits_and_train_every_parameter(name, stem, input_shape) -> None:
    torch.manual_seed(0)
    model = models.build(name, input_shape=input_shape, classes=7, stem=stem, **NARROW[name][0])
    train_every_parameter(model, torch.randn(5, *input_shape), torch.tensor([0, 3, 6, 1, 2]))


def test_gpt_gives_logits_and_trains_every_parameter() -> None:
    torch.manual_seed(0)
    model = models.build("gpt", input_shape=(12,), classes=7, layers=2, heads=2, width=8)
    train_every_parameter(model, torch.randint(0, 7, (3, 12)), torch.randint(0, 7, (3, 12)))


@pytest.mark.parametrize(
    ("name", "stem", "side"),
    [
        ("vgg16", "cifar", 2),
        ("vgg16", "imagenet", 2),
        ("densenet121", "cifar", 8),
        ("densenet121", "imagenet", 2),
        ("mobilenet_v2", "cifar", 8),
        ("mobilenet_v2", "imagenet", 2),
    ],
)
def test_stems_reduce_a_64_pixel_side(name, stem, side) -> None:
    model = models.build(name, input_shape=(3, 64, 64), classes=10, stem=stem, **NARROW[name][0])
    assert model.features(torch.zeros(2, 3, 64, 64)).shape[2:] == (side, side)


@pytest.mark.parametrize("width", [8, 24])
@pytest.mark.parametrize("name", NARROW)
def test_width_is_the_channels_after_the_stem(name, width) -> None:
    model = models.build(name, input_shape=(3, 32, 32), classes=10, width=width)
    first = next(module for module in model.modules() if isinstance(module, nn.Conv2d))
    assert first.out_channels == width


@pytest.mark.parametrize("stem", ["cifar", "imagenet"])
@pytest.mark.parametrize("name", NARROW)
def test_the_smallest_images(name, stem) -> None:
    options, least_sides = NARROW[name]
    least = least_sides[stem]
    model = models.build(name, input_shape=(3, least, least), classes=10, stem=stem, **options)
    assert model(torch.randn(2, 3, least, least)).shape == (2, 10)
    if least > 1:
        message = f"{name} (stem: {stem}) needs images of at least {least}x{least} pixels, got {least}x{least - 1}"
        with pytest.raises(ValueError, match=re.escape(message)):
            models.build(name, input_shape=(3, least, least - 1), classes=10, stem=stem, **options)


@pytest.mark.parametrize("name", models.names())
def test_no_activation_works_in_place(name) -> None:
    model = models.build(name, input_shape=(12,) if name == "gpt" else (1, 32, 32), classes=10)
    activations = [m for m in model.modules() if isinstance(m, nn.ReLU | nn.ReLU6 | nn.GELU | nn.Dropout)]
    assert activations
    assert not any(getattr(m, "inplace", False) for m in activations)


KNOWN = ", ".join(models.names())


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("resnet81", {}, rf"unknown model: 'resnet81' \(allowed: {KNOWN}\); did you mean 'resnet18'"),
        ("transformer9", {}, rf"unknown model: 'transformer9' \(allowed: {KNOWN}\)$"),
        ("resnet18", {"widht": 8}, r"unknown option of model 'resnet18': 'widht' .*did you mean 'width'"),
        ("lenet", {"width": 8}, r"unknown option of model 'lenet': 'width' \(allowed: none\)"),
        ("resnet18", {"width": 0}, "width must be at least 1, got 0"),
        ("vgg16", {"width": -1}, "width must be at least 1, got -1"),
        ("densenet121", {"width": 7}, "width must be a positive multiple of 2, got 7"),
        ("mobilenet_v2", {"width": 0}, "width must be a positive multiple of 8, got 0"),
        ("resnet18", {"stem": "cifra"}, r"unknown stem: 'cifra' \(allowed: cifar, imagenet\)"),
        ("mlp", {"hidden": [16, 0]}, r"hidden: .* got \[16, 0\]"),
        ("gpt", {}, "gpt takes text, but the data are images"),
    ],
)
def test_bad_input_is_one_clear_error(name, options, message) -> None:
    with pytest.raises(ValueError, match=message):
        models.build(name, input_shape=(3, 32, 32), classes=10, **options)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("gpt", {"layers": 0}, "layers must be at least 1, got 0"),
        ("gpt", {"heads": 3, "width": 8}, "heads: must divide the width of 8, got 3"),
        ("gpt", {"context": 11}, "context: must be at least the 12 of the data, got 11"),
        ("mlp", {}, "mlp takes images, but the data are text"),
    ],
)
def test_bad_input_of_text_is_one_clear_error(name, options, message) -> None:
    with pytest.raises(ValueError, match=message):
        models.build(name, input_shape=(12,), classes=10, **options)


def test_lenet_refuses_images_that_are_too_small() -> None:
    with pytest.raises(ValueError, match="at least 12x12 pixels, got 11x12"):
        models.build("lenet", input_shape=(1, 11, 12), classes=10)
    assert models.build("lenet", input_shape=(1, 12, 12), classes=10)(torch.zeros(1, 1, 12, 12)).shape == (1, 10)
