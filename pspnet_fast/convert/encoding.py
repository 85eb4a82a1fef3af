"""PyTorch-Encoding and awesome-semantic-segmentation-pytorch, which name all but the head alike."""

from pspnet_fast.convert.source import Source

_UNUSED = {r"pretrained\.fc\.": "ImageNet's classifier"}
_CONVENTIONS = {"dilation": "contracted", "align_corners": True}


def _levels(before: str) -> dict[str, str]:
    return {
        rf"{before}\.conv{level + 1}\.{layer}": f"ppm.features.{level}.{layer + 1}"
        for level in range(4)
        for layer in (0, 1)
    }


def _three(before: str, names: tuple[int, int, int], own: str) -> dict[str, str]:
    return {rf"{before}\.{name}": f"{own}.{index}" for name, index in zip(names, (0, 1, 4), strict=True)}


ENCODING = Source(
    name="encoding",
    title="zhanghang1989/PyTorch-Encoding",
    marks=(r"pretrained\.", r"head\.conv5\.0\.conv1\."),
    head={
        **_levels(r"head\.conv5\.0"),
        **_three(r"head\.conv5", (1, 2, 5), "cls"),
        **_three(r"auxlayer\.conv5", (0, 1, 4), "aux"),
    },
    unused=_UNUSED,
    conventions=_CONVENTIONS,
)
TRAMAC = Source(
    name="tramac",
    title="Tramac/awesome-semantic-segmentation-pytorch",
    marks=(r"pretrained\.", r"head\.psp\.conv1\."),
    head={
        **_levels(r"head\.psp"),
        **_three(r"head\.block", (0, 1, 4), "cls"),
        **_three(r"auxlayer\.block", (0, 1, 4), "aux"),
    },
    unused=_UNUSED,
    conventions=_CONVENTIONS,
)
