"""ResNet backbones for dense prediction (He et al., CVPR 2016): deep stems, dilated layer3 and layer4.

Children are named ``layer0`` (stem) to ``layer4`` as in semseg, so its PSPNet weights load by name and shape. The
stride of a bottleneck lies in its 3x3 convolution.
"""

from collections.abc import Callable, Collection
from typing import ClassVar

from torch import Tensor, nn

NormLayer = Callable[[int], nn.Module]

STEMS = {"deep64": (64, 64, 128), "deep32": (32, 32, 64), "conv7": (64,)}
DILATIONS = ("full", "contracted")
OUTPUT_STRIDES = (8, 16, 32)
STAGES = (2, 3, 4)


def check_choice(argument: str, value: object, allowed: Collection[object]) -> None:
    """Raise ValueError unless ``value`` is one of ``allowed``."""
    if value not in allowed:
        raise ValueError(f"{argument} must be one of {', '.join(map(repr, allowed))}, got {value!r}")


def initialise_convolutions(module: nn.Module) -> None:
    """Kaiming normal weights (He et al., ICCV 2015, fan out) for every convolution in ``module``; biases zero."""
    for child in module.modules():
        if isinstance(child, nn.Conv2d):
            nn.init.kaiming_normal_(child.weight, mode="fan_out", nonlinearity="relu")
            if child.bias is not None:
                nn.init.zeros_(child.bias)


def _conv3x3(in_channels: int, channels: int, stride: int = 1, dilation: int = 1) -> nn.Conv2d:
    return nn.Conv2d(in_channels, channels, 3, stride, padding=dilation, dilation=dilation, bias=False)


def _shortcut(
    in_channels: int, channels: int, stride: int, norm_layer: NormLayer, avg_down: bool
) -> nn.Sequential | None:
    """Projection for the identity branch; None where the shapes already agree."""
    if stride == 1 and in_channels == channels:
        return None
    if not avg_down:
        return nn.Sequential(nn.Conv2d(in_channels, channels, 1, stride, bias=False), norm_layer(channels))
    # an odd side's last row is pooled too, by itself; the mean is of the pixels there are
    pool = nn.Identity() if stride == 1 else nn.AvgPool2d(stride, ceil_mode=True, count_include_pad=False)
    return nn.Sequential(pool, nn.Conv2d(in_channels, channels, 1, bias=False), norm_layer(channels))


class BasicBlock(nn.Module):
    """Two 3x3 convolutions; the first carries the stride and ``first_dilation``, the second ``dilation``."""

    expansion: ClassVar[int] = 1

    def __init__(
        self,
        in_channels: int,
        channels: int,
        stride: int,
        first_dilation: int,
        dilation: int,
        norm_layer: NormLayer,
        avg_down: bool = False,
    ) -> None:
        super().__init__()
        self.conv1 = _conv3x3(in_channels, channels, stride, first_dilation)
        self.bn1 = norm_layer(channels)
        self.conv2 = _conv3x3(channels, channels, dilation=dilation)
        self.bn2 = norm_layer(channels)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = _shortcut(in_channels, channels, stride, norm_layer, avg_down)

    def forward(self, input: Tensor) -> Tensor:
        output = self.relu(self.bn1(self.conv1(input)))
        output = self.bn2(self.conv2(output))
        return self.relu(output + (input if self.downsample is None else self.downsample(input)))


class Bottleneck(nn.Module):
    """1x1, 3x3, 1x1; the only 3x3 carries the stride and ``first_dilation`` (``dilation`` has nothing to act on)."""

    expansion: ClassVar[int] = 4

    def __init__(
        self,
        in_channels: int,
        channels: int,
        stride: int,
        first_dilation: int,
        dilation: int,
        norm_layer: NormLayer,
        avg_down: bool = False,
    ) -> None:
        super().__init__()
        out_channels = channels * self.expansion
        self.conv1 = nn.Conv2d(in_channels, channels, 1, bias=False)
        self.bn1 = norm_layer(channels)
        self.conv2 = _conv3x3(channels, channels, stride, first_dilation)
        self.bn2 = norm_layer(channels)
        self.conv3 = nn.Conv2d(channels, out_channels, 1, bias=False)
        self.bn3 = norm_layer(out_channels)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = _shortcut(in_channels, out_channels, stride, norm_layer, avg_down)

    def forward(self, input: Tensor) -> Tensor:
        output = self.relu(self.bn1(self.conv1(input)))
        output = self.relu(self.bn2(self.conv2(output)))
        output = self.bn3(self.conv3(output))
        return self.relu(output + (input if self.downsample is None else self.downsample(input)))


# name -> block and number of blocks of layer1 .. layer4
BACKBONES: dict[str, tuple[type[BasicBlock] | type[Bottleneck], tuple[int, int, int, int]]] = {
    "resnet18": (BasicBlock, (2, 2, 2, 2)),
    "resnet34": (BasicBlock, (3, 4, 6, 3)),
    "resnet50": (Bottleneck, (3, 4, 6, 3)),
    "resnet101": (Bottleneck, (3, 4, 23, 3)),
    "resnet152": (Bottleneck, (3, 8, 36, 3)),
}


def _stem(stem: str, norm_layer: NormLayer) -> nn.Sequential:
    """Stride 4: a 7x7 (conv7) or three 3x3 convolutions, the first with stride 2, then a 3x3 max pool with stride 2."""
    widths = STEMS[stem]
    layers: list[nn.Module] = []
    in_channels = 3
    for i, width in enumerate(widths):
        stride = 2 if i == 0 else 1
        if len(widths) == 1:
            conv = nn.Conv2d(in_channels, width, 7, stride, padding=3, bias=False)
        else:
            conv = _conv3x3(in_channels, width, stride)
        layers += [conv, norm_layer(width), nn.ReLU(inplace=True)]
        in_channels = width
    return nn.Sequential(*layers, nn.MaxPool2d(3, stride=2, padding=1))


class ResNet(nn.Module):
    """Feature extractor of a ResNet; see :func:`resnet`.

    Attributes:
        stages: names of its children in the order in which they run, ``layer0`` .. ``layer4``.
        out_channels: of the last stage but one, and of the last.
    """

    def __init__(
        self,
        name: str,
        stem: str,
        dilation: str,
        output_stride: int,
        norm_layer: NormLayer,
        avg_down: bool = False,
        stages: int = 4,
    ) -> None:
        super().__init__()
        check_choice("backbone", name, BACKBONES)
        check_choice("stem", stem, STEMS)
        check_choice("dilation", dilation, DILATIONS)
        check_choice("output_stride", output_stride, OUTPUT_STRIDES)
        check_choice("stages", stages, STAGES)
        if output_stride > 2 ** (stages + 1):
            raise ValueError(
                f"output_stride must be at most {2 ** (stages + 1)} with stages={stages}, is {output_stride}"
            )
        block, blocks = BACKBONES[name]

        def stage(in_channels: int, channels: int, count: int, stride: int, first: int, rest: int) -> nn.Sequential:
            out_channels = channels * block.expansion
            return nn.Sequential(
                block(in_channels, channels, stride, first, rest, norm_layer, avg_down),
                *(block(out_channels, channels, 1, rest, rest, norm_layer, avg_down) for _ in range(count - 1)),
            )

        # Each stride above the output stride is replaced by a doubled dilation. "contracted": the convolution that
        # lost its stride keeps the dilation before it, which samples the strided network exactly on a finer grid.
        stride3, dilation3 = (1, 2) if output_stride == 8 else (2, 1)
        stride4, dilation4 = (1, 2 * dilation3) if output_stride < 32 else (2, 1)
        first3, first4 = (dilation3, dilation4) if dilation == "full" else (1, dilation3)

        widths = [width * block.expansion for width in (64, 128, 256, 512)]
        self.layer0 = _stem(stem, norm_layer)
        self.layer1 = stage(STEMS[stem][-1], 64, blocks[0], 1, 1, 1)
        self.layer2 = stage(widths[0], 128, blocks[1], 2, 1, 1)
        if stages > 2:
            self.layer3 = stage(widths[1], 256, blocks[2], stride3, first3, dilation3)
        if stages > 3:
            self.layer4 = stage(widths[2], 512, blocks[3], stride4, first4, dilation4)
        self.stages = tuple(f"layer{i}" for i in range(stages + 1))
        self.out_channels = (widths[stages - 2], widths[stages - 1])
        initialise_convolutions(self)

    def forward(self, input: Tensor) -> Tensor:
        """(N, 3, H, W) -> features of the last stage, (N, C, ceil(H / output_stride), ceil(W / output_stride))."""
        for name in self.stages:
            input = getattr(self, name)(input)
        return input


def resnet(
    name: str,
    *,
    stem: str = "deep64",
    dilation: str = "full",
    output_stride: int = 8,
    norm_layer: NormLayer = nn.BatchNorm2d,
    avg_down: bool = False,
    stages: int = 4,
) -> ResNet:
    """Build a ResNet without its classifier, with random weights.

    Args:
        name: "resnet18", "resnet34", "resnet50", "resnet101" or "resnet152".
        stem: "deep64" (3x3 convolutions of 64, 64, 128 channels; semseg), "deep32" (32, 32, 64; mmseg's V1c) or
            "conv7" (one 7x7 of 64; torchvision).
        dilation: "full": every 3x3 of layer3 has dilation 2, of layer4 dilation 4 (semseg). "contracted": the 3x3 that
            carried the stride keeps the dilation of the layer before (torchvision, mmseg). The choice does not show in
            names or shapes of the weights, so weights trained with one load under the other and give other numbers.
        output_stride: 8; 16 (layer3 keeps its stride and has no dilation; layer4 has dilation 2); or 32 (no dilation).
        norm_layer: makes the norm of ``n`` channels.
        avg_down: whether shortcuts pool (2x2 means) where they would stride, as in ResNet-D (mmseg's V1d, PaddleSeg's
            vd, timm's resnet50d).
        stages: how many of the four stages after the stem there are: 2 ends with layer2, with output stride 8 (smp).

    Raises:
        ValueError: an argument is none of the above.
    """
    return ResNet(name, stem, dilation, output_stride, norm_layer, avg_down, stages)
