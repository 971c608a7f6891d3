"""VGG-16 (Simonyan & Zisserman 2015, "Very deep convolutional networks for large-scale image recognition",
configuration D) with batch normalisation, parameters named as in torchvision's vgg16_bn."""

from __future__ import annotations

from itertools import pairwise

from torch import Tensor, nn

from models.options import check_stem, check_width

STAGES = ((1, 1), (2, 2), (4, 4, 4), (8, 8, 8), (8, 8, 8))  # channels of the 3x3 convolutions, in widths
LEAST_SIDE = 2 ** len(STAGES)  # pixels: each stage ends with a pooling by 2
POOLED_SIDE = 7  # of the "imagenet" form


class VGG16(nn.Module):
    """Five stages of 3x3 convolution + batch normalisation + ReLU, each pooled by 2, and a classifier.

    stem: where other networks have two stems, VGG has two ends. "cifar" is the global mean and one linear layer, the
    usual form for 32x32 images; "imagenet" a 7x7 mean pooling and the paper's three linear layers with dropout.
    Convolutions start from He's normal initialisation (fan out), linear layers from N(0, 0.01^2).
    """

    def __init__(self, image_shape: tuple[int, int, int], classes: int, width: int = 64, stem: str = "cifar") -> None:
        super().__init__()
        check_width(width)
        check_stem("vgg16", stem, image_shape, {"cifar": LEAST_SIDE, "imagenet": LEAST_SIDE})
        self.features = _features(image_shape[0], width)
        outputs = STAGES[-1][-1] * width
        self.avgpool = nn.AdaptiveAvgPool2d(1 if stem == "cifar" else POOLED_SIDE)
        self.classifier = (
            nn.Linear(outputs, classes)
            if stem == "cifar"
            else _three_layers(outputs * POOLED_SIDE**2, hidden=64 * width, classes=classes)
        )
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            elif isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=0.01)
            if isinstance(module, nn.Conv2d | nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)

    def forward(self, images: Tensor) -> Tensor:
        """Images [B, C, H, W] -> logits [B, classes]."""
        return self.classifier(self.avgpool(self.features(images)).flatten(1))


def _features(channels: int, width: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for stage in STAGES:
        for inputs, outputs in pairwise([channels, *(width * multiple for multiple in stage)]):
            layers += [nn.Conv2d(inputs, outputs, kernel_size=3, padding=1), nn.BatchNorm2d(outputs), nn.ReLU()]
        layers.append(nn.MaxPool2d(2))
        channels = width * stage[-1]
    return nn.Sequential(*layers)


def _three_layers(inputs: int, hidden: int, classes: int) -> nn.Sequential:
    first = nn.Linear(inputs, hidden), nn.ReLU(), nn.Dropout(0.5)
    second = nn.Linear(hidden, hidden), nn.ReLU(), nn.Dropout(0.5)
    return nn.Sequential(*first, *second, nn.Linear(hidden, classes))
