"""PyTorch-Encoding and awesome-semantic-segmentation-pytorch, which name all but the head alike."""

from pspnet_fast.convert.source import Source


def _levels(before: str) -> dict[str, str]:
    return {
        rf"{before}\.conv{level + 1}\.{layer}": f"ppm.features.{level}.{layer + 1}"
        for level in range(4)
        for layer in (0, 1)
    }


def _three(before: str, names: tuple[int, int, int], own: str) -> dict[str, str]:
    return {rf"{before}\.{name}": f"{own}.{index}" for name, index in zip(names, (0, 1, 4), strict=True)}


def _source(name: str, title: str, pyramid: str, bottleneck: tuple[str, tuple[int, int, int]], aux: str) -> Source:
    return Source(
        name=name,
        title=title,
        marks=(r"pretrained\.", rf"{pyramid}\.conv1\."),
        head={**_levels(pyramid), **_three(*bottleneck, "cls"), **_three(aux, (0, 1, 4), "aux")},
        unused={r"pretrained\.fc\.": "ImageNet's classifier"},
        conventions={"dilation": "contracted", "align_corners": True},
    )


ENCODING = _source(
    "encoding",
    "zhanghang1989/PyTorch-Encoding",
    r"head\.conv5\.0",
    (r"head\.conv5", (1, 2, 5)),
    r"auxlayer\.conv5",
)
TRAMAC = _source(
    "tramac",
    "Tramac/awesome-semantic-segmentation-pytorch",
    r"head\.psp",
    (r"head\.block", (0, 1, 4)),
    r"auxlayer\.block",
)
