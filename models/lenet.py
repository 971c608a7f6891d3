"""LeNet-5 (LeCun et al. 1998, "Gradient-based learning applied to document recognition") with ReLU and max pooling."""

from __future__ import annotations

from torch import Tensor, nn

MIN_SIDE = 12  # pixels: the smallest side that leaves one pixel after the second pooling


class LeNet(nn.Module):
    """Two 5x5 convolutions (6 and 16 channels, the first padded by 2), each pooled by 2, then 120, 84 and `classes`."""

    def __init__(self, image_shape: tuple[int, int, int], classes: int) -> None:
        super().__init__()
        channels, height, width = image_shape
        if min(height, width) < MIN_SIDE:
            raise ValueError(f"lenet needs images of at least {MIN_SIDE}x{MIN_SIDE} pixels, got {height}x{width}")
        self.conv1 = nn.Conv2d(channels, 6, kernel_size=5, padding=2)
        self.relu1 = nn.ReLU()
        self.pool1 = nn.MaxPool2d(2)
        self.conv2 = nn.Conv2d(6, 16, kernel_size=5)
        self.relu2 = nn.ReLU()
        self.pool2 = nn.MaxPool2d(2)
        self.fc1 = nn.Linear(16 * _pooled_side(height) * _pooled_side(width), 120)
        self.relu3 = nn.ReLU()
        self.fc2 = nn.Linear(120, 84)
        self.relu4 = nn.ReLU()
        self.fc3 = nn.Linear(84, classes)

    def forward(self, images: Tensor) -> Tensor:
        """Images [B, C, H, W] -> logits [B, classes]."""
        x = self.pool1(self.relu1(self.conv1(images)))
        x = self.pool2(self.relu2(self.conv2(x)))
        x = self.relu3(self.fc1(x.flatten(1)))
        return self.fc3(self.relu4(self.fc2(x)))


def _pooled_side(side: int) -> int:
    return (side // 2 - 4) // 2
