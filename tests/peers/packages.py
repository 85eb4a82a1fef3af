"""The models of the packages whose heads fuse knows, with random weights; importing this needs the packages."""

import torch
from torch import nn

if torch.version.cuda is None:
    # torchvision's compiled operators are those of a CUDA build and do not load: the two that its Python code knows
    # have to exist all the same
    _operators = torch.library.Library("torchvision", "DEF")
    for _name in ("nms", "qnms"):
        _operators.define(f"{_name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")

import segmentation_models_pytorch as smp
from transformers import (
    BeitConfig,
    BeitForSemanticSegmentation,
    ConvNextConfig,
    Data2VecVisionConfig,
    Data2VecVisionForSemanticSegmentation,
    DPTConfig,
    DPTForSemanticSegmentation,
    SegformerConfig,
    SegformerForSemanticSegmentation,
    UperNetConfig,
    UperNetForSemanticSegmentation,
)


def randomise(model: nn.Module) -> nn.Module:
    """Batch norms that are no identities."""
    for name, value in model.state_dict().items():
        if value.is_floating_point() and value.dim() == 1:
            value.copy_(torch.rand_like(value) + 0.5 if "mean" not in name and "bias" not in name else value + 0.1)
    return model.eval()


def upernet(sizes: list[int], depths: list[int], hidden_size: int, classes: int) -> nn.Module:
    stages = ["stage1", "stage2", "stage3", "stage4"]
    backbone = ConvNextConfig(hidden_sizes=sizes, depths=depths, out_features=stages)
    config = UperNetConfig(backbone_config=backbone, num_labels=classes, hidden_size=hidden_size)
    return UperNetForSemanticSegmentation(config)


def segformer(sizes: list[int], depths: list[int], hidden_size: int, classes: int) -> nn.Module:
    config = SegformerConfig(
        hidden_sizes=sizes,
        depths=depths,
        num_attention_heads=[1, 2, 5, 8] if sizes[2] % 5 == 0 else [1, 2, 4, 8],
        decoder_hidden_size=hidden_size,
        num_labels=classes,
        drop_path_rate=0.0,
    )
    return SegformerForSemanticSegmentation(config)


def beit(config: type, model: type, width: int, classes: int, **arguments: object) -> nn.Module:
    """BEiT or Data2Vec, whose heads are alike; 4 layers where nothing else is said."""
    settings = {"num_hidden_layers": 4, "num_attention_heads": 4, "out_indices": [1, 2, 3, 4], "image_size": 128}
    return model(
        config(hidden_size=width, intermediate_size=4 * width, num_labels=classes, **{**settings, **arguments})
    )


def dpt(width: int, fusion: int, classes: int, **arguments: object) -> nn.Module:
    settings = {"num_hidden_layers": 4, "num_attention_heads": 4, "backbone_out_indices": [0, 1, 2, 3]}
    settings |= {"image_size": 64, "neck_hidden_sizes": [16, 24, 32, 32], **arguments}
    config = DPTConfig(
        hidden_size=width, intermediate_size=4 * width, fusion_hidden_size=fusion, num_labels=classes, **settings
    )
    return DPTForSemanticSegmentation(config)


def of_smp(name: str, encoder: str, classes: int = 11, **arguments: object) -> nn.Module:
    return getattr(smp, name)(encoder, encoder_weights=None, classes=classes, **arguments)


# small ones, for tests: builds the model, the size of an image, the module to fuse, the convolution that gains
SMALL = {
    "smp resnet18": (lambda: of_smp("PSPNet", "resnet18"), (64, 96), "decoder", "decoder.conv.0"),
    "smp resnet50": (
        lambda: of_smp("PSPNet", "resnet50", encoder_depth=5, output_stride=8),
        *((64, 96), "decoder", "decoder.conv.0"),
    ),
    "smp upernet": (
        lambda: of_smp("UPerNet", "resnet18", decoder_channels=32),
        *((256, 288), "decoder.psp", "decoder.psp.out_conv.0"),
    ),
    "smp deeplab": (lambda: of_smp("DeepLabV3", "resnet18"), (64, 96), "decoder.aspp", "decoder.aspp.project.0"),
    "smp segformer": (
        lambda: of_smp("Segformer", "resnet18", decoder_segmentation_channels=32),
        *((64, 96), "decoder", "decoder.fuse_stage.0"),
    ),
    "smp unet": (
        lambda: of_smp("Unet", "resnet18", decoder_interpolation="bilinear"),
        *((64, 96), "decoder.blocks.0", "decoder.blocks.0.conv1.0"),
    ),
    "smp unet, nearest": (
        lambda: of_smp("Unet", "resnet18"),
        *((64, 96), "decoder.blocks.0", "decoder.blocks.0.conv1.0"),
    ),
    "smp unet++": (
        lambda: of_smp("UnetPlusPlus", "resnet18"),
        *((64, 96), "decoder.blocks.x_0_1", "decoder.blocks.x_0_1.conv1.0"),
    ),
    "smp deeplab+": (
        lambda: of_smp("DeepLabV3Plus", "resnet18"),
        *((64, 96), "decoder.aspp.0", "decoder.aspp.0.project.0"),
    ),
    "transformers beit": (
        lambda: beit(BeitConfig, BeitForSemanticSegmentation, 32, 7),
        *((128, 128), "decode_head", "decode_head.fpn_bottleneck.convolution"),
    ),
    "transformers data2vec": (
        lambda: beit(Data2VecVisionConfig, Data2VecVisionForSemanticSegmentation, 32, 7),
        *((128, 128), "decode_head", "decode_head.fpn_bottleneck.convolution"),
    ),
    "transformers upernet": (
        lambda: upernet([32, 64, 96, 128], [1] * 4, 64, 19),
        *((256, 288), "decode_head", "decode_head.bottleneck.conv"),
    ),
    "transformers upernet fpn": (
        lambda: upernet([32, 64, 96, 128], [1] * 4, 64, 19),
        *((256, 288), "decode_head", "decode_head.fpn_bottleneck.conv"),
    ),
    "transformers segformer": (
        lambda: segformer([16, 32, 40, 64], [1] * 4, 64, 19),
        *((64, 96), "decode_head", "decode_head.linear_fuse"),
    ),
}

# which fuse finds by an example only
BY_EXAMPLE = {
    "smp fpn": (
        lambda: of_smp("FPN", "resnet18"),
        *((64, 96), "decoder.seg_blocks.1.block", "decoder.seg_blocks.1.block.1.block.0"),
    ),
    "transformers dpt": (
        lambda: dpt(32, 24, 7),
        *((64, 64), "neck.fusion_stage.layers.3", "neck.fusion_stage.layers.3.projection"),
    ),
}

# as they are used, for benchmarks: builds the model, the side of an image
LARGE = {
    "transformers SegFormer-B0": (lambda: segformer([32, 64, 160, 256], [2, 2, 2, 2], 256, 150), 512),
    "transformers SegFormer-B2": (lambda: segformer([64, 128, 320, 512], [3, 4, 6, 3], 768, 150), 512),
    "transformers UPerNet, ConvNeXt-T": (lambda: upernet([96, 192, 384, 768], [3, 3, 9, 3], 512, 150), 512),
    "transformers BEiT-B": (
        lambda: beit(
            *(BeitConfig, BeitForSemanticSegmentation, 768, 150),
            **{"num_hidden_layers": 12, "num_attention_heads": 12, "out_indices": [3, 5, 7, 11], "image_size": 512},
        ),
        512,
    ),
    "transformers DPT, ViT-B": (
        lambda: dpt(
            *(768, 256, 150),
            **{"num_hidden_layers": 12, "num_attention_heads": 12, "backbone_out_indices": [2, 5, 8, 11]},
            **{"image_size": 384, "neck_hidden_sizes": [96, 192, 384, 768]},
        ),
        384,
    ),
    "smp PSPNet, resnet50": (lambda: of_smp("PSPNet", "resnet50", 21, encoder_depth=5, output_stride=8), 512),
    "smp UPerNet, resnet50": (lambda: of_smp("UPerNet", "resnet50", 21), 512),
    "smp Segformer, resnet34": (lambda: of_smp("Segformer", "resnet34", 21), 512),
    "smp DeepLabV3, resnet50": (lambda: of_smp("DeepLabV3", "resnet50", 21), 512),
    "smp DeepLabV3+, resnet50": (lambda: of_smp("DeepLabV3Plus", "resnet50", 21), 512),
    "smp FPN, resnet50": (lambda: of_smp("FPN", "resnet50", 21), 512),
    "smp Unet, resnet34": (lambda: of_smp("Unet", "resnet34", 21), 512),
    "smp Unet++, resnet34": (lambda: of_smp("UnetPlusPlus", "resnet34", 21), 512),
    "smp Unet, resnet34, bilinear": (lambda: of_smp("Unet", "resnet34", 21, decoder_interpolation="bilinear"), 512),
}
