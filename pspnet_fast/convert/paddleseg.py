"""PaddleSeg: PSPNet with ResNet_vd, as plain arrays (.npz or .safetensors) with its names."""

import re

from pspnet_fast.convert.source import Source

_PARTS = {"_conv": 0, "_batch_norm": 1}
_TENSORS = {"_mean": "running_mean", "_variance": "running_var"}


def _respell(name: str) -> str:
    """ResNet_vd's names as mmsegmentation has those of V1d, and batch norm's as torch has them."""
    layer, _, tensor = name.rpartition(".")
    tensor = _TENSORS.get(tensor, tensor)
    if stem := re.fullmatch(r"(.*)conv1_([123])\.(_conv|_batch_norm)", layer):
        layer = f"{stem[1]}stem.{3 * (int(stem[2]) - 1) + _PARTS[stem[3]]}"
    elif block := re.fullmatch(r"(.*)bb_(\d)_(\d+)\.(conv([012])|short)\.(_conv|_batch_norm)", layer):
        part = _PARTS[block[6]]
        own = f"downsample.{part + 1}" if block[4] == "short" else f"{('conv', 'bn')[part]}{int(block[5]) + 1}"
        layer = f"{block[1]}layer{int(block[2]) + 1}.{block[3]}.{own}"
    return f"{layer}.{tensor}" if layer else tensor


SOURCE = Source(
    name="paddleseg",
    title="PaddleSeg",
    marks=(r"head\.psp_module\.|(backbone\.)?bb_0_0\.",),
    head={
        r"head\.psp_module\.stages\.(\d+)\.1\._conv": r"ppm.features.\1.1",
        r"head\.psp_module\.stages\.(\d+)\.1\._batch_norm": r"ppm.features.\1.2",
        r"head\.psp_module\.conv_bn_relu2\._conv": "cls.0",
        r"head\.psp_module\.conv_bn_relu2\._batch_norm": "cls.1",
        r"head\.conv": "cls.4",
        r"head\.auxlayer\.conv_bn_relu\._conv": "aux.0",
        r"head\.auxlayer\.conv_bn_relu\._batch_norm": "aux.1",
        r"head\.auxlayer\.conv": "aux.4",
    },
    conventions={"dilation": "full", "align_corners": False},
    mean=(0.5, 0.5, 0.5),
    std=(0.5, 0.5, 0.5),
    respell=_respell,
    reversed_levels=True,
)
