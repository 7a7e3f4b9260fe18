"""Networks from images in [0, 1] to logits.

Normalization is the first layer of every network, so that sigma and intensities mean the same
everywhere outside it.

Source: He et al. 2016 (ResNet-18, in its usual form for 32 x 32 images, as in the study); Wu and
He 2018 (GroupNorm).
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from certifl.errors import ModelError


class Normalize(nn.Module):
    """(x - mean) / std for every channel; constants that are never averaged or stored.

    Args:
        in_channels: channels of the images (m, c, h, w).
        mean: subtracted from every intensity.
        std: every intensity is divided by.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, in_channels: int, mean: float = 0.5, std: float = 0.25) -> None:
        super().__init__()
        shape = (1, in_channels, 1, 1)
        self.register_buffer("mean", torch.full(shape, mean), persistent=False)
        self.register_buffer("std", torch.full(shape, std), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        """Normalize images (m, c, h, w)."""
        return (images - self.mean) / self.std


# BatchNorm mixes the images of a batch and keeps statistics; GroupNorm does neither, which privacy
# asks for. Groups are of 16 channels, or a quarter of fewer.
NORMS: dict[str, Callable[[int], nn.Module]] = {
    "batch": nn.BatchNorm2d,
    "group": lambda width: nn.GroupNorm(max(4, width // 16), width),
}


class BasicBlock(nn.Module):
    """Two normalized 3 x 3 convolutions and a shortcut, projected where the shape changes."""

    def __init__(self, in_width: int, width: int, stride: int, norm: str = "batch") -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_width, width, 3, stride, padding=1, bias=False)
        self.bn1 = NORMS[norm](width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn2 = NORMS[norm](width)
        self.shortcut = nn.Sequential()
        if stride != 1 or in_width != width:
            self.shortcut = nn.Sequential(
                nn.Conv2d(in_width, width, 1, stride, bias=False), NORMS[norm](width)
            )

    def forward(self, x: Tensor) -> Tensor:
        """Features (m, in_width, h, w) to (m, width, h / stride, w / stride)."""
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        return F.relu(out + self.shortcut(x))


class ResNet(nn.Module):
    """A residual network for small images: 3 x 3 stem, no early pooling, stages of BasicBlocks.

    Args:
        in_channels: channels of the images.
        num_classes: logits that come out.
        widths: channels of each stage; every stage but the first halves the size.
        depths: blocks of each stage.
        mean: subtracted from every intensity.
        std: every intensity is divided by.
        norm: "batch" (BatchNorm), or "group" (GroupNorm) for training with privacy.
    """

    def __init__(
        self,
        in_channels: int,
        num_classes: int,
        widths: tuple[int, ...],
        depths: tuple[int, ...],
        mean: float = 0.5,
        std: float = 0.25,
        norm: str = "batch",
    ) -> None:
        super().__init__()
        if norm not in NORMS:
            raise ModelError(f"norm = {norm!r} is unknown: choose one of {', '.join(NORMS)}.")
        self.normalize = Normalize(in_channels, mean, std)
        self.stem = nn.Sequential(
            nn.Conv2d(in_channels, widths[0], 3, padding=1, bias=False),
            NORMS[norm](widths[0]),
            nn.ReLU(),
        )
        width, stages = widths[0], []
        for stage, (next_width, depth) in enumerate(zip(widths, depths, strict=True)):
            for block in range(depth):
                stride = 2 if stage > 0 and block == 0 else 1
                stages.append(BasicBlock(width, next_width, stride, norm))
                width = next_width
        self.blocks = nn.Sequential(*stages)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.head = nn.Linear(width, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        """Images (m, c, h, w) in [0, 1] to logits (m, num_classes)."""
        features = self.blocks(self.stem(self.normalize(images)))
        return self.head(self.pool(features).flatten(1))


class QuarterMeans(nn.AdaptiveAvgPool2d):
    """AdaptiveAvgPool2d(2), whose gradient is the same bits every time, also on a GPU."""

    def __init__(self) -> None:
        super().__init__(2)

    def forward(self, input: Tensor) -> Tensor:
        """Features (m, c, h, w) to the means of their quarters, (m, c, 2, 2)."""
        return _quarter_means(input)


# Which way it takes hangs on shape and device, which nobody knows while a network is traced.
@fx.wrap
def _quarter_means(x: Tensor) -> Tensor:
    """Means over quarters, which have rows and columns in common where a side is odd.

    On a GPU the gradients of common ones are added atomically, in any order, by torch's own
    pooling. Means of slices are added in one order.
    """
    common = x.shape[-2] % 2 == 1 or x.shape[-1] % 2 == 1
    return _means_of_slices(x) if common and x.is_cuda else F.adaptive_avg_pool2d(x, 2)


def _means_of_slices(x: Tensor) -> Tensor:
    rows, columns = ((slice((n + 1) // 2), slice(n // 2, n)) for n in x.shape[-2:])
    means = [x[..., row, column].mean((-2, -1)) for row in rows for column in columns]
    return torch.stack(means, -1).unflatten(-1, (2, 2))


def resnet18(
    in_channels: int, num_classes: int, mean: float = 0.5, std: float = 0.25, norm: str = "batch"
) -> nn.Module:
    """The study's network: ResNet-18 for 32 x 32 images, 11.2 million weights; see `ResNet`."""
    return ResNet(in_channels, num_classes, (64, 128, 256, 512), (2, 2, 2, 2), mean, std, norm)


def small_resnet(
    in_channels: int, num_classes: int, mean: float = 0.5, std: float = 0.25, norm: str = "batch"
) -> nn.Module:
    """A ResNet-8 of about 78 000 weights: the paper's ingredients at a size for one core."""
    return ResNet(in_channels, num_classes, (16, 32, 64), (1, 1, 1), mean, std, norm)


def small_cnn(
    in_channels: int, num_classes: int, mean: float = 0.5, std: float = 0.25, width: int = 16
) -> nn.Module:
    """Three convolutions, about 26 000 weights, for images from 8 x 8 to 32 x 32.

    GroupNorm, not BatchNorm: nothing but weights to average between clients, and batches may be as
    small as a client's data. It trains with rates from 0.02 to 0.1, with and without momentum.

    Args:
        in_channels, num_classes, mean, std: as `ResNet` takes them.
        width: channels of the first convolution, a multiple of 4; the others have 2 and 4 times as
            many. The noise of privacy grows with the number of weights: 4 leaves about 2 200.

    Raises:
        ModelError: a width that is not a multiple of 4.
    """
    if width < 4 or width % 4:
        raise ModelError(f"width = {width!r} is not allowed: it must be a multiple of 4.")
    return nn.Sequential(
        OrderedDict(
            normalize=Normalize(in_channels, mean, std),
            conv1=nn.Conv2d(in_channels, width, 3, padding=1),
            norm1=nn.GroupNorm(4, width),
            relu1=nn.ReLU(),
            pool1=nn.MaxPool2d(2),
            conv2=nn.Conv2d(width, 2 * width, 3, padding=1),
            norm2=nn.GroupNorm(4, 2 * width),
            relu2=nn.ReLU(),
            pool2=nn.MaxPool2d(2),
            conv3=nn.Conv2d(2 * width, 4 * width, 3, padding=1),
            norm3=nn.GroupNorm(4, 4 * width),
            relu3=nn.ReLU(),
            pool3=QuarterMeans(),
            flatten=nn.Flatten(),
            head=nn.Linear(4 * width * 4, num_classes),
        )
    )
