"""Heads that upsample large maps and convolve them, of the structures that their packages have: see each class.

All take x (N, 8, H, W), of which they make the maps of a backbone.
"""

import torch
import torch.nn.functional as F
from foreign import ConvModule
from torch import Tensor, nn

CHANNELS = (5, 6, 7, 8)


class Backbone(nn.Module):
    """Four maps, each of half the size of the one before."""

    def __init__(self, channels: tuple[int, ...] = CHANNELS) -> None:
        super().__init__()
        self.stages = nn.ModuleList(nn.Conv2d(8, c, 1, stride=2**i) for i, c in enumerate(channels))

    def forward(self, x: Tensor) -> list[Tensor]:
        return [stage(x) for stage in self.stages]


def resize(x: Tensor, size: torch.Size, align_corners: bool | None = None) -> Tensor:
    return F.interpolate(x, size, None, "bilinear", align_corners)


class FCNHead(nn.Module):
    """As in mmsegmentation on HRNet: `input_transform="resize_concat"`, a 1x1 convolution, the classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = Backbone()
        self.convs = nn.Sequential(ConvModule(sum(CHANNELS), 6, 1))
        self.conv_seg = nn.Conv2d(6, 3, 1)

    def _transform_inputs(self, inputs: list[Tensor]) -> Tensor:
        return torch.cat([resize(x, inputs[0].shape[2:], False) for x in inputs], dim=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv_seg(self.convs(self._transform_inputs(self.backbone(x))))


class HighResolutionNetOCR(nn.Module):
    """As in HRNet-OCR: two branches convolve the same concatenation; the second's result weighs the first's."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = Backbone()
        self.conv3x3_ocr = nn.Sequential(nn.Conv2d(26, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(inplace=True))
        self.aux_head = nn.Sequential(
            nn.Conv2d(26, 26, 1), nn.BatchNorm2d(26), nn.ReLU(inplace=True), nn.Conv2d(26, 3, 1)
        )
        self.cls_head = nn.Conv2d(6, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        maps = self.backbone(x)
        h, w = maps[0].size(2), maps[0].size(3)
        rest = [F.interpolate(m, size=(h, w), mode="bilinear", align_corners=True) for m in maps[1:]]
        feats = torch.cat([maps[0], *rest], 1)
        out_aux = self.aux_head(feats)
        feats = self.conv3x3_ocr(feats)
        context = torch.einsum("nkhw,nchw->nkc", out_aux.softmax(1), feats).mean(1)[:, :, None, None]
        return self.cls_head(feats + context)


class SegformerHead(nn.Module):
    """As in mmsegmentation: convolution, norm and ReLU before the upsampling."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = Backbone()
        self.convs = nn.ModuleList(ConvModule(c, 4, 1) for c in CHANNELS)
        self.fusion_conv = ConvModule(16, 6, 1)
        self.conv_seg = nn.Conv2d(6, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        inputs, outs = self.backbone(x), []
        for map, conv in zip(inputs, self.convs, strict=True):
            outs.append(resize(conv(map), inputs[0].shape[2:], False))
        return self.conv_seg(self.fusion_conv(torch.cat(outs, dim=1)))


class Up(nn.Module):
    """As in milesial's U-Net: the upsampled map is padded to the size of the other."""

    def __init__(self, channels: int, skip: int, out: int) -> None:
        super().__init__()
        self.up = nn.Upsample(scale_factor=2, mode="bilinear", align_corners=True)
        self.conv = nn.Sequential(
            nn.Conv2d(channels + skip, out, 3, padding=1, bias=False), nn.BatchNorm2d(out), nn.ReLU(inplace=True)
        )

    def forward(self, x1: Tensor, x2: Tensor) -> Tensor:
        x1 = self.up(x1)
        rows, columns = x2.size(2) - x1.size(2), x2.size(3) - x1.size(3)
        x1 = F.pad(x1, [columns // 2, columns - columns // 2, rows // 2, rows - rows // 2])
        return self.conv(torch.cat([x2, x1], dim=1))


class UNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.backbone = Backbone()
        self.up1, self.up2, self.up3 = Up(8, 7, 6), Up(6, 6, 5), Up(5, 5, 4)
        self.outc = nn.Conv2d(4, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        a, b, c, d = self.backbone(x)
        return self.outc(self.up3(self.up2(self.up1(d, c), b), a))


class UnetDecoderBlock(nn.Module):
    """As in segmentation_models_pytorch: the nearest cells, at the size of the map that is concatenated."""

    def __init__(self, channels: int, skip: int, out: int) -> None:
        super().__init__()
        self.conv1 = nn.Sequential(
            nn.Conv2d(channels + skip, out, 3, padding=1, bias=False), nn.BatchNorm2d(out), nn.ReLU(inplace=True)
        )

    def forward(self, map: Tensor, skip: Tensor) -> Tensor:
        map = F.interpolate(map, size=(skip.shape[2], skip.shape[3]), mode="nearest")
        return self.conv1(torch.cat([map, skip], dim=1))


class NearestUnet(nn.Module):
    """With a fusion of both ways of upsampling at the end."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = Backbone()
        self.blocks = nn.ModuleList([UnetDecoderBlock(8, 7, 6), UnetDecoderBlock(6, 6, 5)])
        self.fuse = nn.Conv2d(5 + 5 + 8, 4, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        a, b, c, d = self.backbone(x)
        map = self.blocks[1](self.blocks[0](d, c), b)
        maps = [F.interpolate(map, scale_factor=2), a, F.interpolate(d, scale_factor=8.0, mode="bilinear")]
        return self.fuse(torch.cat(maps, 1))


class DeepLabHeadV3Plus(nn.Module):
    """As in VainF's DeepLabV3Plus-Pytorch, whose convolution of the concatenation is dense."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = Backbone()
        self.project = nn.Sequential(nn.Conv2d(5, 4, 1, bias=False), nn.BatchNorm2d(4), nn.ReLU(inplace=True))
        self.aspp = ConvModule(7, 9, 3, dilation=2)
        self.classifier = nn.Sequential(
            nn.Conv2d(13, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6), nn.ReLU(inplace=True), nn.Conv2d(6, 3, 1)
        )

    def forward(self, x: Tensor) -> Tensor:
        low, _, out, _ = self.backbone(x)
        low, out = self.project(low), self.aspp(out)
        out = F.interpolate(out, size=low.shape[2:], mode="bilinear", align_corners=False)
        return self.classifier(torch.cat([low, out], dim=1))


class SETRUPHead(nn.Module):
    """As in mmsegmentation's SETR-PUP: convolutions and upsampling in turn, no concatenation."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = Backbone()
        self.up_convs = nn.ModuleList(
            nn.Sequential(ConvModule(8, 8, 3), nn.Upsample(scale_factor=2, mode="bilinear", align_corners=False))
            for _ in range(3)
        )
        self.conv_seg = nn.Conv2d(8, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.backbone(x)[3]
        for up_conv in self.up_convs:
            x = up_conv(x)
        return self.conv_seg(x)


class CascadeFeatureFusion(nn.Module):
    """As in ICNet: a dilated convolution of the upsampled map, added to one of the larger map."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = Backbone()
        self.conv_low = nn.Sequential(nn.Conv2d(8, 6, 3, padding=2, dilation=2, bias=False), nn.BatchNorm2d(6))
        self.conv_high = nn.Sequential(nn.Conv2d(7, 6, 1, bias=False), nn.BatchNorm2d(6))
        self.conv_low_cls = nn.Conv2d(6, 3, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        _, _, high, low = self.backbone(x)
        low = F.interpolate(low, size=high.shape[2:], mode="bilinear", align_corners=True)
        return self.conv_low_cls(F.relu(self.conv_low(low) + self.conv_high(high)))


# model: the convolutions of upsampled maps, whether fuse finds them without an example
MODELS: dict[type[nn.Module], tuple[tuple[str, ...], bool]] = {
    FCNHead: (("convs.0.conv",), True),
    HighResolutionNetOCR: (("aux_head.0", "conv3x3_ocr.0"), True),
    SegformerHead: (("fusion_conv.conv",), True),
    UNet: (("up1.conv.0", "up2.conv.0", "up3.conv.0"), True),
    NearestUnet: (("blocks.0.conv1.0", "blocks.1.conv1.0", "fuse"), True),
    DeepLabHeadV3Plus: (("classifier.0",), True),
    SETRUPHead: (("up_convs.1.0.conv", "up_convs.2.0.conv", "conv_seg"), False),
    CascadeFeatureFusion: (("conv_low.0",), False),
}
