"""Models of the structures that fuse has to know, as their packages build them: see each class.

And what the tests of fuse do with them.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pspnet_fast.bench.stock import MMPPM, ConvModule


class PPM(nn.Module):
    """As in semseg: the concatenation, x first, corners aligned."""

    def __init__(self, channels: int, reduction: int, bins=(1, 2, 3, 6), norm=nn.BatchNorm2d) -> None:
        super().__init__()
        self.features = nn.ModuleList(
            nn.Sequential(
                nn.AdaptiveAvgPool2d(b), nn.Conv2d(channels, reduction, 1, bias=False), norm(reduction), nn.ReLU(True)
            )
            for b in bins
        )

    def forward(self, x: Tensor) -> Tensor:
        levels = [F.interpolate(f(x), x.shape[2:], mode="bilinear", align_corners=True) for f in self.features]
        return torch.cat([x, *levels], 1)


class Semseg(nn.Module):
    """As in semseg: `ppm`, then `cls` with the classifier in it; a loss in training; an auxiliary head beside."""

    def __init__(self, channels: int = 8, classes: int = 3) -> None:
        super().__init__()
        self.layer3, self.layer4 = nn.Conv2d(3, channels // 2, 3, 2, 1), nn.Conv2d(channels // 2, channels, 3, 1, 1)
        self.ppm = PPM(channels, channels // 4)
        self.cls, self.aux = (self.head(c, classes) for c in (2 * channels, channels // 2))

    @staticmethod
    def head(channels: int, classes: int) -> nn.Sequential:
        return nn.Sequential(
            nn.Conv2d(channels, 6, 3, padding=1, bias=False),
            nn.BatchNorm2d(6),
            nn.ReLU(inplace=True),
            nn.Dropout2d(0.1),
            nn.Conv2d(6, classes, 1),
        )

    def forward(self, image: Tensor) -> Tensor:
        middle = self.layer3(image)
        x = self.ppm(self.layer4(middle))
        x = self.cls(x)
        return x + self.aux(middle) if self.training else x


class PSPHead(nn.Module):
    """As in mmsegmentation."""

    def __init__(self, channels: int = 8, classes: int = 3, align_corners: bool = False) -> None:
        super().__init__()
        self.align_corners = align_corners
        self.conv_seg, self.dropout = nn.Conv2d(6, classes, 1), nn.Dropout2d(0.1)
        self.psp_modules = MMPPM((1, 2, 3, 6), channels, 6, align_corners)
        self.bottleneck = ConvModule(channels + 4 * 6, 6, 3)

    def _forward_feature(self, x: Tensor) -> Tensor:
        outputs = [x]
        outputs.extend(self.psp_modules(x))
        return self.bottleneck(torch.cat(outputs, dim=1))

    def forward(self, x: Tensor) -> Tensor:
        return self.conv_seg(self.dropout(self._forward_feature(x)))


class UPerHead(nn.Module):
    """As in mmsegmentation: the pyramid's bottleneck, then a feature pyramid network with more of the same modules."""

    def __init__(self, align_corners: bool = False) -> None:
        super().__init__()
        self.align_corners = align_corners
        self.conv_seg = nn.Conv2d(6, 3, 1)
        self.psp_modules = MMPPM((1, 2, 3, 6), 8, 6, align_corners)
        self.bottleneck = ConvModule(8 + 4 * 6, 6, 3)
        self.lateral_convs, self.fpn_convs = nn.ModuleList([ConvModule(8, 6, 1)]), nn.ModuleList([ConvModule(6, 6, 3)])
        self.fpn_bottleneck = ConvModule(12, 6, 3)

    def psp_forward(self, inputs: list[Tensor]) -> Tensor:
        x = inputs[-1]
        outputs = [x]
        outputs.extend(self.psp_modules(x))
        return self.bottleneck(torch.cat(outputs, dim=1))

    def forward(self, x: Tensor) -> Tensor:
        inputs = [x, x[:, :, ::2, ::2]]
        top = self.psp_forward(inputs)
        up = F.interpolate(top, x.shape[2:], mode="bilinear", align_corners=self.align_corners)
        low = self.fpn_convs[0](self.lateral_convs[0](x) + up)
        return self.conv_seg(self.fpn_bottleneck(torch.cat([low, up], 1)))


class PSPBlock(nn.Module):
    """As in segmentation_models_pytorch: no norm but a bias on the level of one cell."""

    def __init__(self, channels: int, out: int, size: int) -> None:
        super().__init__()
        single = size == 1
        norm = nn.Identity() if single else nn.BatchNorm2d(out)
        layers = nn.Sequential(nn.Conv2d(channels, out, 1, bias=single), norm, nn.ReLU(inplace=True))
        self.pool = nn.Sequential(nn.AdaptiveAvgPool2d((size, size)), layers)

    def forward(self, x: Tensor) -> Tensor:
        return F.interpolate(self.pool(x), x.shape[2:], mode="bilinear", align_corners=True)


class PSPModule(nn.Module):
    """As in segmentation_models_pytorch: x last."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(PSPBlock(channels, channels // 4, b) for b in (1, 2, 3, 6))

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([block(x) for block in self.blocks] + [x], dim=1)


class PSPDecoder(nn.Module):
    """As in segmentation_models_pytorch: a 1x1 bottleneck."""

    def __init__(self) -> None:
        super().__init__()
        self.psp = PSPModule(8)
        self.conv = nn.Sequential(nn.Conv2d(16, 6, 1, bias=False), nn.BatchNorm2d(6), nn.ReLU(inplace=True))
        self.dropout = nn.Dropout2d(0.2)

    def forward(self, x: Tensor) -> Tensor:
        return self.dropout(self.conv(self.psp(x)))


class PoolsAside(nn.Module):
    """As in PyTorch-Encoding: four poolings, then four convolutions."""

    def __init__(self) -> None:
        super().__init__()
        for i, b in enumerate((1, 2, 3, 6)):
            setattr(self, f"pool{i}", nn.AdaptiveAvgPool2d(b))
        for i in range(4):
            setattr(self, f"conv{i}", nn.Sequential(nn.Conv2d(8, 2, 1, bias=False), nn.BatchNorm2d(2), nn.ReLU(True)))

    def forward(self, x: Tensor) -> Tensor:
        levels = [getattr(self, f"conv{i}")(getattr(self, f"pool{i}")(x)) for i in range(4)]
        return torch.cat([x, *[F.interpolate(z, x.shape[2:], mode="bilinear", align_corners=True) for z in levels]], 1)


class OwnBottleneck(nn.Module):
    """As in segmentation_models_pytorch's UPerNet: the bottleneck inside the pyramid's module."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.Sequential(
                nn.AdaptiveAvgPool2d(b), nn.Sequential(nn.Conv2d(8, 6, 1, bias=False), nn.BatchNorm2d(6), nn.ReLU())
            )
            for b in (1, 2, 3, 6)
        )
        self.out_conv = nn.Sequential(nn.Conv2d(32, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(), nn.Dropout2d(0.1))

    def forward(self, x: Tensor) -> Tensor:
        levels = [F.interpolate(b(x), x.shape[2:], mode="bilinear", align_corners=False) for b in self.blocks]
        return self.out_conv(torch.cat([x, *levels], dim=1))


MODELS = {
    "semseg": (Semseg, 3),
    "mmseg PSPHead": (PSPHead, 8),
    "mmseg PSPHead aligned": (lambda: PSPHead(align_corners=True), 8),
    "mmseg UPerHead": (UPerHead, 8),
    "smp PSPNet": (PSPDecoder, 8),
    "Encoding": (lambda: nn.Sequential(PoolsAside(), nn.Conv2d(16, 6, 3, padding=1, bias=False), nn.ReLU()), 8),
    "smp UPerNet": (OwnBottleneck, 8),
}


def run(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """Output, gradients, buffers; dropout draws the same in every run."""
    x = x.clone().requires_grad_()
    model.zero_grad(set_to_none=True)
    torch.manual_seed(0)
    output = model(x)
    torch.manual_seed(1)
    output.backward(torch.randn(output.shape, dtype=output.dtype))
    parts = {"output": output.detach(), "input": x.grad, **{n: b.clone() for n, b in model.named_buffers()}}
    return parts | {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def assert_same(ours: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = 1e-10) -> None:
    assert ours.keys() == expected.keys()
    for name, truth in expected.items():
        scale = tolerance * truth.abs().max().clamp_min(1).item()
        torch.testing.assert_close(ours[name], truth, rtol=0, atol=scale, msg=lambda m, n=name: f"{n}: {m}")
