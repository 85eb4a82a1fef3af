"""torchvision: ResNets, and the backbone and auxiliary head of its segmentation models."""

from pspnet_fast.convert.source import Source

SOURCE = Source(
    name="torchvision",
    title="torchvision",
    marks=(r"(backbone\.|encoder\.)?conv1\.weight", r"(backbone\.|encoder\.)?layer1\."),
    head={r"aux_classifier\.([014])": r"aux.\1"},
    unused={r"fc\.": "ImageNet's classifier", r"classifier\.": "the head of FCN or DeepLab, which is no pyramid"},
    conventions={"dilation": "contracted"},
)
