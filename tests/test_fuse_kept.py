"""What fuse leaves as it is, and what it says of it; modules that are named, and settings that are given."""

import copy
import logging

import pytest
import torch
import torch.nn.functional as F
from foreign import PPM, ConvModule, Semseg, assert_same, run
from torch import Tensor, nn

from pspnet_fast import PyramidSettings, fuse
from pspnet_fast.fusion.patch import Fused

pytestmark = pytest.mark.usefixtures("small_maps_as_large_ones")


def test_report_and_log(caplog):
    model = nn.ModuleDict({"a": Semseg(), "b": nn.Sequential(nn.AdaptiveAvgPool2d(2), nn.AdaptiveAvgPool2d(1))})
    with caplog.at_level(logging.INFO, logger="pspnet_fast"):
        same, report = fuse(model, return_report=True)
    assert same is model
    assert [(r.pyramid, r.bottleneck) for r in report.replaced] == [("a.ppm", "a.cls")]
    assert [k.module for k in report.kept] == ["b"]
    assert "0 convolutions" in report.kept[0].reason
    assert caplog.messages == str(report).splitlines()
    assert caplog.messages[0] == "fused 'a.ppm' with 'a.cls': bins (1, 2, 3, 6), align_corners=True, input_first"


def test_nothing_to_fuse_is_an_error():
    with pytest.raises(ValueError, match="nothing to fuse: looked for modules of AdaptiveAvgPool2d to several sizes"):
        fuse(nn.Sequential(nn.Conv2d(3, 3, 3), nn.AdaptiveAvgPool2d(1)))
    model = fuse(Semseg())
    with pytest.raises(ValueError, match="kept 'ppm': it is fused already"):
        fuse(model)


class Odd(PPM):
    """A pyramid but for one thing in its forward."""

    def __init__(self, change: str) -> None:
        super().__init__(8, 2)
        self.change = change

    def forward(self, x: Tensor) -> Tensor:
        mode = {"mode": "nearest"} if self.change == "nearest" else {"mode": "bilinear", "align_corners": True}
        levels = [F.interpolate(f(x), x.shape[2:], **mode) for f in self.features]
        if self.change == "dropout":
            levels[0] = F.dropout(levels[0], training=self.training)
        if self.change == "reversed":
            levels = levels[::-1]
        if self.change == "raises":
            raise NotImplementedError("needs something")
        return torch.cat([x, *levels], 1) if self.change != "scaled" else torch.cat([x, *levels], 1) * 2


@pytest.mark.parametrize("change", ["nearest", "dropout", "reversed", "scaled"])
def test_what_computes_otherwise_stays(change):
    with pytest.raises(ValueError, match=r"kept '0': its forward is not that of a pyramid"):
        fuse(nn.Sequential(Odd(change), nn.Conv2d(16, 3, 1)))


def test_settings_of_what_cannot_be_tried():
    model = nn.Sequential(Odd("raises"), nn.Conv2d(16, 3, 3, padding=1)).double().eval()
    with pytest.raises(ValueError, match=r"kept '0': on one map \(N, 8, H, W\) it raises NotImplementedError"):
        fuse(model)
    expected = nn.Sequential(copy.deepcopy(model[0]), model[1])
    expected[0].change = ""
    fuse(model, modules={"0": PyramidSettings(align_corners=True, concat="input_first", output="concat")})
    x = torch.randn(2, 8, 13, 9, dtype=torch.float64)
    torch.testing.assert_close(model(x), expected(x), rtol=1e-10, atol=1e-10)


def test_named_module_without_pooling_layers():
    class Functional(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.convs = nn.ModuleList(nn.Conv2d(8, 4, 1) for _ in range(2))

        def forward(self, x: Tensor) -> Tensor:
            levels = [c(F.adaptive_avg_pool2d(x, b)) for c, b in zip(self.convs, (2, 5), strict=True)]
            return torch.cat([F.interpolate(z, x.shape[2:], mode="bilinear") for z in levels] + [x], 1)

    model = nn.Sequential(Functional(), nn.Conv2d(16, 3, 1)).double()
    with pytest.raises(ValueError, match="nothing to fuse"):
        fuse(model)
    reference = copy.deepcopy(model)
    _, report = fuse(model, modules={"0": PyramidSettings(bins=(2, 5))}, return_report=True)
    assert (report.replaced[0].concat, report.replaced[0].align_corners) == ("input_last", False)
    x = torch.randn(2, 8, 13, 9, dtype=torch.float64)
    assert_same(run(model, x), run(reference, x))


def test_names():
    model = nn.ModuleDict({"a": Semseg(), "b": Semseg()})
    _, report = fuse(model, modules=["b.ppm"], return_report=True)
    assert [r.pyramid for r in report.replaced] == ["b.ppm"]
    with pytest.raises(ValueError, match=r"modules must be names in model.named_modules\(\), which has no \['c'\]"):
        fuse(model, modules=["c"])
    with pytest.raises(ValueError, match=r"kept 'a.cls': "):
        fuse(model, modules=["a.ppm", "a.cls"])
    assert not any(isinstance(m, Fused) for m in model["a"].modules())
    with pytest.raises(TypeError, match="modules must be several names or a mapping"):
        fuse(model, modules="a.ppm")


@pytest.mark.parametrize(
    "convolution",
    [
        nn.Conv2d(16, 3, 3),  # unpadded
        nn.Conv2d(16, 3, 2),
        nn.Conv2d(16, 3, 3, padding=1, stride=2),
        nn.Conv2d(16, 4, 3, padding=1, groups=2),
        nn.Conv2d(16, 3, 3, padding=1, padding_mode="reflect"),
    ],
)
def test_other_convolutions_are_no_bottleneck(convolution):
    model = nn.Sequential(PPM(8, 2), convolution).double()
    reference = copy.deepcopy(model)
    _, report = fuse(model, return_report=True)
    assert report.replaced[0].bottleneck is None
    assert "1: conv must be " in report.replaced[0].note or "1: conv must have an odd kernel" in report.replaced[0].note
    x = torch.randn(2, 8, 13, 9, dtype=torch.float64)
    assert_same(run(model, x), run(reference, x))


def test_bottleneck_with_another_order_stays():
    class Reordered(ConvModule):
        def forward(self, x: Tensor) -> Tensor:
            return self.bn(self.activate(self.conv(x)))

    _, report = fuse(nn.Sequential(PPM(8, 2), Reordered(16, 5, 3)), return_report=True)
    assert report.replaced[0].bottleneck is None
    assert "1: it does not run its layers one after another" in report.replaced[0].note


def test_modules_with_hooks_stay():
    model = Semseg()
    model.ppm.features[0][2].register_forward_hook(lambda *_: None)
    with pytest.raises(ValueError, match="BatchNorm2d inside has hooks, which would no longer run"):
        fuse(model)
    model = Semseg()
    model.cls[0].register_forward_hook(lambda *_: None)
    _, report = fuse(model, return_report=True)
    assert report.replaced[0].bottleneck is None
    assert "cls: Conv2d inside has hooks" in report.replaced[0].note


def test_two_possible_bottlenecks_are_none():
    model = nn.ModuleDict({"ppm": PPM(8, 2), "one": nn.Conv2d(16, 3, 1), "two": nn.Conv2d(16, 3, 1)})
    _, report = fuse(model, return_report=True)
    assert report.replaced[0].bottleneck is None
    assert "2 modules beside it take its 16 channels" in report.replaced[0].note
