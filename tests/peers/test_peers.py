"""fuse on the packages themselves, random weights: the same logits, gradients, keys, and back again."""

import copy
import importlib.util

import pytest
import torch
from torch import Tensor, nn

from pspnet_fast import fuse, ops, unfuse
from pspnet_fast.fusion import Fused, convolution

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
from transformers import (  # noqa: E402
    ConvNextConfig,
    SegformerConfig,
    SegformerForSemanticSegmentation,
    UperNetConfig,
    UperNetForSemanticSegmentation,
)


def upernet() -> nn.Module:
    stages = ["stage1", "stage2", "stage3", "stage4"]
    backbone = ConvNextConfig(hidden_sizes=[32, 64, 96, 128], depths=[1, 1, 1, 1], out_features=stages)
    return UperNetForSemanticSegmentation(UperNetConfig(backbone_config=backbone, num_labels=19, hidden_size=64))


def segformer() -> nn.Module:
    sizes = {"hidden_sizes": [16, 32, 40, 64], "num_attention_heads": [1, 2, 4, 8], "decoder_hidden_size": 64}
    return SegformerForSemanticSegmentation(SegformerConfig(depths=[1] * 4, num_labels=19, drop_path_rate=0.0, **sizes))


def psp(encoder: str, **arguments: int) -> nn.Module:
    return smp.PSPNet(encoder, encoder_weights=None, classes=11, **arguments)


# name: builds the model, the size of an image, the module to fuse, the convolution that gains
MODELS = {
    "smp resnet18": (lambda: psp("resnet18"), (64, 96), "decoder", "decoder.conv.0"),
    "smp resnet50": (
        lambda: psp("resnet50", encoder_depth=5, output_stride=8),
        *((64, 96), "decoder", "decoder.conv.0"),
    ),
    "smp upernet": (
        lambda: smp.UPerNet("resnet18", encoder_weights=None, classes=11, decoder_channels=32),
        *((256, 288), "decoder.psp", "decoder.psp.out_conv.0"),
    ),
    "smp deeplab": (
        lambda: smp.DeepLabV3("resnet18", encoder_weights=None, classes=11),
        *((64, 96), "decoder.aspp", "decoder.aspp.project.0"),
    ),
    "smp segformer": (
        lambda: smp.Segformer("resnet18", encoder_weights=None, classes=11, decoder_segmentation_channels=32),
        *((64, 96), "decoder", "decoder.fuse_stage.0"),
    ),
    "smp unet": (
        lambda: smp.Unet("resnet18", encoder_weights=None, classes=11, decoder_interpolation="bilinear"),
        *((64, 96), "decoder.blocks.0", "decoder.blocks.0.conv1.0"),
    ),
    "transformers upernet": (upernet, (256, 288), "decode_head", "decode_head.bottleneck.conv"),
    "transformers upernet fpn": (upernet, (256, 288), "decode_head", "decode_head.fpn_bottleneck.conv"),
    "transformers segformer": (segformer, (64, 96), "decode_head", "decode_head.linear_fuse"),
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
@pytest.mark.parametrize("by_example", [False, True])
def test_fuse(name, by_example, monkeypatch):
    monkeypatch.setattr(convolution, "LEAST_ELEMENTS", 0)  # these models are narrow
    build, size, scope, gains = MODELS[name]
    torch.manual_seed(0)
    model = build().double()
    original, keys = copy.deepcopy(model), list(model.state_dict())
    parameters = list(model.parameters())
    x = torch.randn(2, 3, *size, dtype=torch.float64)
    if by_example:
        _, report = fuse(model, example=x, return_report=True)
        found = {c.module: c for c in report.convolutions}
        assert gains in found
        assert found[gains].scope == scope
        assert found[gains].saved > 0.1
    else:
        fuse(model)
    assert list(model.state_dict()) == keys
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    calls = []
    pyramid_context_ = ops.pyramid_context_
    monkeypatch.setattr(ops, "pyramid_context_", lambda *a, **k: calls.append(1) or pyramid_context_(*a, **k))
    for training in (True, False):
        ours, expected = run(model.train(training), x), run(original.train(training), x)
        assert ours.keys() == expected.keys()
        for key, truth in expected.items():
            # a gradient that is 0 but for rounding (a bias before a norm) is measured against 1
            error = (ours[key] - truth).double().norm() / truth.double().norm().clamp_min(1)
            assert error <= 1e-10, (key, error)
    assert calls
    assert not any(isinstance(m, Fused) for m in unfuse(model).modules())
    unfuse(model).load_state_dict(original.state_dict())
    assert torch.equal(run(model, x)["output"], run(original, x)["output"])
