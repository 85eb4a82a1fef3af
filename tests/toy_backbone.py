"""A backbone that trains in milliseconds."""

from torch import Tensor, nn


class ToyBackbone(nn.Module):
    """Stride 4, 8 channels: the children that a PSPNet needs."""

    def __init__(self) -> None:
        super().__init__()
        self.layer0 = _layer(3, 8, stride=2)
        self.layer1 = _layer(8, 8, stride=2)
        self.layer2, self.layer3, self.layer4 = (_layer(8, 8) for _ in range(3))
        self.out_channels = (8, 8)

    def forward(self, input: Tensor) -> Tensor:
        return self.layer4(self.layer3(self.layer2(self.layer1(self.layer0(input)))))


def _layer(in_channels: int, channels: int, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(in_channels, channels, 3, stride, padding=1, bias=False), nn.BatchNorm2d(channels), nn.ReLU()
    )
