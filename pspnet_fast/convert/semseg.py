"""hszhao/semseg: PSPNet's checkpoints, and the ImageNet weights that it starts from."""

from pspnet_fast.convert.source import Source

SOURCE = Source(
    name="semseg",
    title="hszhao/semseg",
    marks=(r"layer0\.0\.weight|conv3\.weight",),
    head={
        r"ppm\.features\.(\d+)\.([12])": r"ppm.features.\1.\2",
        r"cls\.([014])": r"cls.\1",
        r"aux\.([014])": r"aux.\1",
    },
    unused={r"fc\.": "ImageNet's classifier"},
    conventions={"dilation": "full", "align_corners": True},
)
