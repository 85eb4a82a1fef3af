"""segmentation_models_pytorch: its PSPNet with an encoder that is a ResNet."""

from pspnet_fast.convert.source import Source

SOURCE = Source(
    name="smp",
    title="segmentation_models_pytorch",
    marks=(r"decoder\.psp\.blocks\.",),
    head={
        r"decoder\.psp\.blocks\.(\d+)\.pool\.1\.0": r"ppm.features.\1.1",
        r"decoder\.psp\.blocks\.(\d+)\.pool\.1\.1": r"ppm.features.\1.2",
        r"decoder\.conv\.([01])": r"cls.\1",
        r"segmentation_head\.0": "cls.4",
    },
    unused={
        r"classification_head\.": "a classifier of the whole image",
        r"encoder\.fc\.": "ImageNet's classifier",
        r"(mean|std)$": "the training script's normalisation: see that it is the one assumed",
    },
    conventions={"dilation": "full", "align_corners": True, "concat": "input_last", "dropout": 0.2},
)
