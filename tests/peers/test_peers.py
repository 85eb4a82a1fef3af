"""fuse on the packages themselves, random weights: the same logits, gradients, keys, and back again."""

import copy
import importlib.util

import pytest
import torch
from torch import Tensor, nn

from pspnet_fast import fuse, unfuse
from pspnet_fast.fusion.patch import Fused

PACKAGES = ("torchvision", "segmentation_models_pytorch", "timm", "transformers")
MISSING = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
if MISSING:
    pytest.skip(f"{', '.join(MISSING)} not installed: make test-peers", allow_module_level=True)

if torch.version.cuda is None:
    # torchvision's compiled operators are those of a CUDA build and do not load: the two that its Python code knows
    # have to exist all the same
    _operators = torch.library.Library("torchvision", "DEF")
    for _name in ("nms", "qnms"):
        _operators.define(f"{_name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")

import segmentation_models_pytorch as smp  # noqa: E402
from transformers import ConvNextConfig, UperNetConfig, UperNetForSemanticSegmentation  # noqa: E402


def upernet() -> nn.Module:
    stages = ["stage1", "stage2", "stage3", "stage4"]
    backbone = ConvNextConfig(hidden_sizes=[32, 64, 96, 128], depths=[1, 1, 1, 1], out_features=stages)
    return UperNetForSemanticSegmentation(UperNetConfig(backbone_config=backbone, num_labels=19, hidden_size=64))


def psp(encoder: str, **arguments: int) -> nn.Module:
    return smp.PSPNet(encoder, encoder_weights=None, classes=11, **arguments)


# name: builds the model; the pyramid, its bottleneck, align_corners, order
MODELS = {
    "smp resnet18": (lambda: psp("resnet18"), "decoder.psp", "decoder.conv", True, "input_last"),
    "smp resnet50": (
        lambda: psp("resnet50", encoder_depth=5, output_stride=8),
        *("decoder.psp", "decoder.conv", True, "input_last"),
    ),
    "smp upernet": (
        lambda: smp.UPerNet("resnet18", encoder_weights=None, classes=11, decoder_channels=32),
        *("decoder.psp", "decoder.psp", False, "input_first"),
    ),
    "transformers upernet": (
        upernet,
        *("decode_head.psp_modules", "decode_head.bottleneck", False, "input_first"),
    ),
}


def run(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    model.zero_grad(set_to_none=True)
    torch.manual_seed(0)
    output = model(x)
    output = output if isinstance(output, Tensor) else output.logits
    torch.manual_seed(1)
    output.backward(torch.randn(output.shape, dtype=output.dtype))
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {"output": output.detach(), **{n: b.clone() for n, b in model.named_buffers()}, **gradients}


@pytest.mark.parametrize("name", MODELS)
def test_fuse(name):
    build, pyramid, bottleneck, align_corners, concat = MODELS[name]
    torch.manual_seed(0)
    model = build().double()
    original, keys = copy.deepcopy(model), list(model.state_dict())
    parameters = list(model.parameters())
    _, report = fuse(model, return_report=True)
    (replaced,) = report.replaced
    found = (replaced.pyramid, replaced.bottleneck, replaced.align_corners, replaced.concat)
    assert found == (pyramid, bottleneck, align_corners, concat)
    assert list(model.state_dict()) == keys
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    x = torch.randn(2, 3, 64, 96, dtype=torch.float64)
    for training in (True, False):
        ours, expected = run(model.train(training), x), run(original.train(training), x)
        assert ours.keys() == expected.keys()
        for key, truth in expected.items():
            # a gradient that is 0 but for rounding (a bias before a norm) is measured against 1
            error = (ours[key] - truth).double().norm() / truth.double().norm().clamp_min(1)
            assert error <= 1e-10, (key, error)
    assert not any(isinstance(m, Fused) for m in unfuse(model).modules())
    unfuse(model).load_state_dict(original.state_dict())
    assert torch.equal(run(model, x)["output"], run(original, x)["output"])
