"""mmsegmentation: PSPNet with ResNet, V1c and V1d, and what its checkpoints say of themselves."""

import re
from collections.abc import Mapping
from typing import Any

from pspnet_fast.convert.source import Source

SOURCE = Source(
    name="mmseg",
    title="mmsegmentation",
    marks=(r"decode_head\.psp_modules\.|(backbone\.)?stem\.0\.weight",),
    head={
        r"decode_head\.psp_modules\.(\d+)\.1\.conv": r"ppm.features.\1.1",
        r"decode_head\.psp_modules\.(\d+)\.1\.bn": r"ppm.features.\1.2",
        r"decode_head\.bottleneck\.conv": "cls.0",
        r"decode_head\.bottleneck\.bn": "cls.1",
        r"decode_head\.conv_seg": "cls.4",
        r"auxiliary_head\.convs\.0\.conv": "aux.0",
        r"auxiliary_head\.convs\.0\.bn": "aux.1",
        r"auxiliary_head\.conv_seg": "aux.4",
    },
    unused={r"(fc|head\.fc)\.": "ImageNet's classifier"},
    conventions={"dilation": "contracted", "align_corners": False},
    dilates_second=False,
)


def read_meta(rest: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """What a checkpoint's ``meta`` says, if anything: arguments of PSPNet, and ``class_names`` and ``colors``."""
    meta = rest.get("meta")
    if not isinstance(meta, Mapping):
        return {}, {}
    data = meta.get("dataset_meta") if isinstance(meta.get("dataset_meta"), Mapping) else meta
    lower = {str(key).lower(): value for key, value in data.items()}  # type: ignore[union-attr]
    classes: dict[str, Any] = {}
    if isinstance(lower.get("classes"), list | tuple):
        classes["class_names"] = [str(name) for name in lower["classes"]]
    if isinstance(lower.get("palette"), list | tuple):
        classes["colors"] = [[int(value) for value in color] for color in lower["palette"]]
    text = meta.get("cfg", meta.get("config"))
    arguments: dict[str, Any] = {}
    if isinstance(text, str):
        aligned = set(re.findall(r"align_corners\s*=\s*(True|False)", text))
        if len(aligned) == 1:
            arguments["align_corners"] = aligned == {"True"}
        if strides := re.search(r"strides\s*=\s*\(\s*1,\s*2,\s*([12]),\s*([12])\s*,?\s*\)", text):
            arguments["output_stride"] = 8 * int(strides[1]) * int(strides[2])
        if "strides" in text and "dilations" in text:
            arguments["dilation"] = "contracted" if re.search(r"contract_dilation\s*=\s*True", text) else "full"
        if scales := re.search(r"pool_scales\s*=\s*\(([\d,\s]+)\)", text):
            arguments["bins"] = [int(scale) for scale in scales[1].split(",") if scale.strip()]
    return arguments, classes
