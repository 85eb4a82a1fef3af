"""A small backbone that sees little, and the arithmetic of how far a stack of layers sees."""

from collections.abc import Iterable

from torch import Tensor, nn


def receptive_field(layers: Iterable[nn.Module]) -> tuple[int, int]:
    """Receptive field and stride, in input pixels, of one output position of convolutions and poolings in a row.

    Counts every Conv2d, MaxPool2d and AvgPool2d inside ``layers`` in order of registration, so each layer must run its
    children one after the other: a kernel of k taps with dilation d at stride s so far adds (k - 1) * d * s.
    Raises ValueError where the kernels or strides are not square.
    """
    size, stride = 1, 1
    for layer in layers:
        for module in layer.modules():
            if not isinstance(module, nn.Conv2d | nn.MaxPool2d | nn.AvgPool2d):
                continue
            taps, step = _square(module.kernel_size), _square(module.stride)
            size += (taps - 1) * _square(getattr(module, "dilation", 1)) * stride
            stride *= step
    return size, stride


def reach(layers: Iterable[nn.Module]) -> int:
    """How far, in pixels along an axis, the output of ``layers`` sees once it is upsampled to the input's size.

    Upsampling (bilinear, corners aligned, sizes one more than a multiple of the stride) joins positions that lie less
    than one stride away, and each of them sees half its receptive field.
    """
    size, stride = receptive_field(layers)
    return size // 2 + stride - 1


def _square(value: int | tuple[int, ...]) -> int:
    sides = {value} if isinstance(value, int) else set(value)
    if len(sides) != 1:
        raise ValueError(f"kernels, strides and dilations must be square, got {value}")
    return sides.pop()


class SmallBackbone(nn.Module):
    """Five layers of stride 4 in all, ``width`` channels at the end, with a receptive field of 23 pixels.

    Takes the place of a ResNet in :class:`pspnet_fast.models.PSPNet`: children layer0 .. layer4 and ``out_channels``,
    the channels of layer3 and layer4.
    """

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.layer0 = _layer(3, width // 4, 3, stride=2)
        self.layer1 = _layer(width // 4, width // 2, 3, stride=2)
        self.layer2 = _layer(width // 2, width, 3)
        self.layer3 = _layer(width, width, 1)
        self.layer4 = _layer(width, width, 3)
        self.out_channels = (width, width)

    def forward(self, image: Tensor) -> Tensor:
        """(N, 3, H, W) -> (N, width, ceil(H / 4), ceil(W / 4))."""
        return self.layer4(self.layer3(self.layer2(self.layer1(self.layer0(image)))))


def _layer(in_channels: int, out_channels: int, kernel_size: int, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(in_channels, out_channels, kernel_size, stride, padding=kernel_size // 2, bias=False),
        nn.BatchNorm2d(out_channels),
        nn.ReLU(inplace=True),
    )
