"""MobileNetV2 (Sandler et al. 2018, "MobileNetV2: inverted residuals and linear bottlenecks"), parameters named as in
torchvision."""

from __future__ import annotations

from torch import Tensor, nn

from models.options import STEMS, check_stem, check_width

STEM_WIDTH = 32  # channels after the stem at width multiplier 1
LAST_WIDTH = 1280  # channels before the classifier: multiplied like the others, but never less
STAGES = (  # expansion, channels at width multiplier 1, blocks, stride of the first: the paper's table 2
    (1, 16, 1, 1),
    (6, 24, 2, 2),
    (6, 32, 3, 2),
    (6, 64, 4, 2),
    (6, 96, 3, 1),
    (6, 160, 3, 2),
    (6, 320, 1, 1),
)


class InvertedResidual(nn.Module):
    """1x1 convolution to `expansion` times the channels, 3x3 depthwise, 1x1 without activation; around it a shortcut
    where the shape stays."""

    def __init__(self, inputs: int, outputs: int, stride: int, expansion: int) -> None:
        super().__init__()
        hidden = expansion * inputs
        self.has_shortcut = stride == 1 and inputs == outputs
        expand = [] if expansion == 1 else [_convolution(inputs, hidden, kernel_size=1)]
        depthwise = _convolution(hidden, hidden, kernel_size=3, stride=stride, groups=hidden)
        project = nn.Conv2d(hidden, outputs, kernel_size=1, bias=False)
        self.conv = nn.Sequential(*expand, depthwise, project, nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        """[B, inputs, H, W] -> [B, outputs, H / stride, W / stride]."""
        return x + self.conv(x) if self.has_shortcut else self.conv(x)


class MobileNetV2(nn.Module):
    """Stem, seven stages of inverted residuals, a 1x1 convolution, global mean, dropout, linear classifier.

    width: channels after the stem, 32 times the paper's width multiplier. Channels are rounded to multiples of 8.
    stem: "imagenet" has stride 2 in the stem and in the second stage, "cifar" stride 1 in both, the usual form for
    32x32 images.
    Convolutions start from He's normal initialisation (fan out), the classifier from N(0, 0.01^2).
    """

    def __init__(self, image_shape: tuple[int, int, int], classes: int, width: int = 32, stem: str = "cifar") -> None:
        super().__init__()
        check_width(width, multiple=8)
        check_stem("mobilenet_v2", stem, image_shape, dict.fromkeys(STEMS, 1))
        multiplier = width / STEM_WIDTH
        early_stride = 1 if stem == "cifar" else 2
        layers: list[nn.Module] = [_convolution(image_shape[0], width, kernel_size=3, stride=early_stride)]
        inputs = width
        for stage, (expansion, channels, blocks, stride) in enumerate(STAGES, start=1):
            outputs = _multiple_of_8(channels * multiplier)
            for block in range(blocks):
                first_stride = early_stride if stage == 2 else stride
                layers.append(InvertedResidual(inputs, outputs, first_stride if block == 0 else 1, expansion))
                inputs = outputs
        last = _multiple_of_8(LAST_WIDTH * max(1.0, multiplier))
        self.features = nn.Sequential(*layers, _convolution(inputs, last, kernel_size=1))
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Sequential(nn.Dropout(0.2), nn.Linear(last, classes))
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            elif isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=0.01)
                nn.init.zeros_(module.bias)

    def forward(self, images: Tensor) -> Tensor:
        """Images [B, C, H, W] -> logits [B, classes]."""
        return self.classifier(self.avgpool(self.features(images)).flatten(1))


def _convolution(inputs: int, outputs: int, kernel_size: int, stride: int = 1, groups: int = 1) -> nn.Sequential:
    convolution = nn.Conv2d(
        inputs, outputs, kernel_size, stride=stride, padding=kernel_size // 2, groups=groups, bias=False
    )
    return nn.Sequential(convolution, nn.BatchNorm2d(outputs), nn.ReLU6())


def _multiple_of_8(channels: float) -> int:
    """The nearest multiple of 8, but not below 8 nor below nine tenths of `channels`."""
    nearest = max(8, 8 * int(channels / 8 + 0.5))
    return nearest if nearest >= 0.9 * channels else nearest + 8
