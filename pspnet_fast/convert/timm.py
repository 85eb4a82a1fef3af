"""timm: ResNets with the stem of one convolution or of three, ResNet-D among them."""

from pspnet_fast.convert.source import Source

SOURCE = Source(
    name="timm",
    title="timm",
    marks=(r"conv1\.(0\.)?weight", r"layer1\."),
    unused={r"fc\.": "ImageNet's classifier"},
    conventions={"dilation": "contracted"},
)
