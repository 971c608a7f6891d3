"""DenseNet-121 (Huang et al. 2017, "Densely connected convolutional networks", table 1), parameters named as in
torchvision."""

from __future__ import annotations

from collections import OrderedDict

import torch
from torch import Tensor, nn

from models.options import check_stem, check_width

BLOCKS = (6, 12, 24, 16)  # dense layers of each block
BOTTLENECK = 4  # channels between the two convolutions of a dense layer, in growth rates
LEAST_SIDES = {"cifar": 8, "imagenet": 29}  # pixels: what leaves one for the last of three poolings by 2


class DenseLayer(nn.Sequential):
    """Adds `growth` channels to its input: two times batch normalisation, ReLU, convolution, first 1x1 then 3x3."""

    def __init__(self, inputs: int, growth: int) -> None:
        bottleneck = BOTTLENECK * growth
        super().__init__(
            OrderedDict(
                norm1=nn.BatchNorm2d(inputs),
                relu1=nn.ReLU(),
                conv1=nn.Conv2d(inputs, bottleneck, kernel_size=1, bias=False),
                norm2=nn.BatchNorm2d(bottleneck),
                relu2=nn.ReLU(),
                conv2=nn.Conv2d(bottleneck, growth, kernel_size=3, padding=1, bias=False),
            )
        )

    def forward(self, x: Tensor) -> Tensor:
        """[B, inputs, H, W] -> [B, inputs + growth, H, W]."""
        return torch.cat([x, super().forward(x)], dim=1)


class DenseNet121(nn.Module):
    """Stem, four dense blocks with a transition that halves channels and sides between them, global mean, classifier.

    width: channels after the stem, twice the growth rate.
    stem: "cifar" is one 3x3 convolution at full resolution, as in the paper's networks for CIFAR; "imagenet" a 7x7 of
    stride 2, batch normalisation, ReLU and a max pooling of stride 2.
    Convolutions start from He's normal initialisation (fan in).
    """

    def __init__(self, image_shape: tuple[int, int, int], classes: int, width: int = 64, stem: str = "cifar") -> None:
        super().__init__()
        check_width(width, multiple=2)
        check_stem("densenet121", stem, image_shape, LEAST_SIDES)
        self.features = _stem(image_shape[0], width, stem)
        channels, growth = width, width // 2
        for number, count in enumerate(BLOCKS, start=1):
            if number > 1:
                self.features.add_module(f"transition{number - 1}", _transition(channels))
                channels //= 2
            self.features.add_module(f"denseblock{number}", _block(channels, growth, count))
            channels += count * growth
        self.features.add_module("norm5", nn.BatchNorm2d(channels))
        self.relu = nn.ReLU()
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Linear(channels, classes)
        nn.init.zeros_(self.classifier.bias)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu")

    def forward(self, images: Tensor) -> Tensor:
        """Images [B, C, H, W] -> logits [B, classes]."""
        return self.classifier(self.avgpool(self.relu(self.features(images))).flatten(1))


def _stem(channels: int, width: int, stem: str) -> nn.Sequential:
    if stem == "cifar":
        return nn.Sequential(OrderedDict(conv0=nn.Conv2d(channels, width, kernel_size=3, padding=1, bias=False)))
    return nn.Sequential(
        OrderedDict(
            conv0=nn.Conv2d(channels, width, kernel_size=7, stride=2, padding=3, bias=False),
            norm0=nn.BatchNorm2d(width),
            relu0=nn.ReLU(),
            pool0=nn.MaxPool2d(kernel_size=3, stride=2, padding=1),
        )
    )


def _block(inputs: int, growth: int, count: int) -> nn.Sequential:
    return nn.Sequential(
        OrderedDict((f"denselayer{i + 1}", DenseLayer(inputs + i * growth, growth)) for i in range(count))
    )


def _transition(inputs: int) -> nn.Sequential:
    return nn.Sequential(
        OrderedDict(
            norm=nn.BatchNorm2d(inputs),
            relu=nn.ReLU(),
            conv=nn.Conv2d(inputs, inputs // 2, kernel_size=1, bias=False),
            pool=nn.AvgPool2d(2),
        )
    )
