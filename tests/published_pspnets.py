"""PSPNets as their packages build them (structure, names and conventions), and weights under their names.

Written plainly, from what the packages' checkpoints hold; tests/peers has packages that can be installed.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

BINS = (1, 2, 3, 6)


class ConvNorm(nn.Module):
    """Convolution and batch norm under the names that a package gives them."""

    def __init__(self, names: tuple[str, str], inputs: int, outputs: int, kernel: int, bias: bool = False) -> None:
        super().__init__()
        self.names = names
        self.add_module(names[0], nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, bias=bias))
        self.add_module(names[1], nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        for name in self.names:
            x = getattr(self, name)(x)
        return F.relu(x)


class Block(nn.Module):
    """A bottleneck: the stride and the dilation lie in the 3x3."""

    def __init__(self, inputs: int, width: int, stride: int, dilation: int, pool: bool) -> None:
        super().__init__()
        outputs = 4 * width
        self.conv1, self.bn1 = nn.Conv2d(inputs, width, 1, bias=False), nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride, dilation, dilation, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3, self.bn3 = nn.Conv2d(width, outputs, 1, bias=False), nn.BatchNorm2d(outputs)
        self.downsample = None
        if inputs != outputs and pool:
            self.downsample = nn.Sequential(
                nn.AvgPool2d(stride, stride, ceil_mode=True, count_include_pad=False),
                nn.Conv2d(inputs, outputs, 1, bias=False),
                nn.BatchNorm2d(outputs),
            )
        elif inputs != outputs:
            self.downsample = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        y = self.bn3(self.conv3(F.relu(self.bn2(self.conv2(y)))))
        return F.relu(y + (x if self.downsample is None else self.downsample(x)))


class PSPNet(nn.Module):
    """All sources' structures in one, with torchvision's names; ``names`` of the source are put on by ``published``."""

    def __init__(
        self,
        classes: int,
        *,
        stem: tuple[int, ...],
        first: tuple[int, int],
        align_corners: bool,
        pool: bool = False,
        bias: bool = False,
        head: int = 512,
        reverse: bool = False,
    ) -> None:
        super().__init__()
        self.align_corners, self.reverse = align_corners, reverse
        layers: list[nn.Module] = []
        inputs = 3
        for i, width in enumerate(stem):
            kernel = 3 if len(stem) > 1 else 7
            layers += [nn.Conv2d(inputs, width, kernel, 1 if i else 2, kernel // 2, bias=False)]
            layers += [nn.BatchNorm2d(width), nn.ReLU()]
            inputs = width
        self.stem = nn.Sequential(*layers, nn.MaxPool2d(3, 2, 1))
        stages = ((64, 3, 1, (1, 1)), (128, 4, 2, (1, 1)), (256, 6, 1, (first[0], 2)), (512, 3, 1, (first[1], 4)))
        for i, (width, count, stride, dilations) in enumerate(stages, 1):
            blocks = [Block(inputs, width, stride, dilations[0], pool)]
            blocks += [Block(4 * width, width, 1, dilations[1], pool) for _ in range(count - 1)]
            self.add_module(f"layer{i}", nn.Sequential(*blocks))
            inputs = 4 * width
        names = ("conv", "bn")
        self.levels = nn.ModuleList(ConvNorm(names, 2048, 512, 1, bias) for _ in BINS)
        self.bottleneck, self.classifier = ConvNorm(names, 4096, head, 3, bias), nn.Conv2d(head, classes, 1)
        self.aux, self.aux_classifier = ConvNorm(names, 1024, 256, 3, bias), nn.Conv2d(256, classes, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Logits and auxiliary logits at the features' size."""
        layer3 = self.layer3(self.layer2(self.layer1(self.stem(x))))
        x = self.layer4(layer3)
        levels = [level(F.adaptive_avg_pool2d(x, size)) for size, level in zip(BINS, self.levels, strict=True)]
        maps = [F.interpolate(z, x.shape[2:], mode="bilinear", align_corners=self.align_corners) for z in levels]
        x = torch.cat([x, *(maps[::-1] if self.reverse else maps)], 1)
        return self.classifier(self.bottleneck(x)), self.aux_classifier(self.aux(layer3))


def randomise(model: nn.Module) -> nn.Module:
    """Weights for which activations keep their size, norms that are no identities, and biases.

    All from one vector of a prime length over and over: no two neighbours are alike, and drawing so many weights anew
    would take most of a test's time.
    """
    noise = torch.rand(65537, generator=torch.Generator().manual_seed(7))
    for at, (name, value) in enumerate(model.state_dict().items()):
        if not value.is_floating_point():
            value.zero_()
            continue
        values = noise.roll(977 * at).repeat(value.numel() // len(noise) + 1)[: value.numel()].view(value.shape)
        if value.dim() > 1:
            value.copy_((values - 0.5) * (24 / value[0].numel()) ** 0.5)
        else:
            value.copy_(values + 0.5 if name.endswith(("weight", "running_var")) else 0.2 * values - 0.1)
    return model.eval()


SEMSEG = {"stem": "layer0", "levels.{}.conv": "ppm.features.{}.1", "levels.{}.bn": "ppm.features.{}.2"}
SEMSEG |= {"bottleneck.conv": "cls.0", "bottleneck.bn": "cls.1", "classifier": "cls.4"}
SEMSEG |= {"aux.conv": "aux.0", "aux.bn": "aux.1", "aux_classifier": "aux.4"}
MMSEG = {"stem": "backbone.stem", "levels.{}": "decode_head.psp_modules.{}.1", "bottleneck": "decode_head.bottleneck"}
MMSEG |= {"classifier": "decode_head.conv_seg", "aux": "auxiliary_head.convs.0"}
MMSEG |= {"aux_classifier": "auxiliary_head.conv_seg", **{f"layer{i}": f"backbone.layer{i}" for i in range(1, 5)}}
MMSEG_B = {**MMSEG, "stem.0": "backbone.conv1", "stem.1": "backbone.bn1"}
ENCODING = {f"stem.{i}": f"pretrained.conv1.{i}" for i in (0, 1, 3, 4, 6)} | {"stem.7": "pretrained.bn1"}
ENCODING |= {f"layer{i}": f"pretrained.layer{i}" for i in range(1, 5)}
ENCODING |= {f"levels.{i}.{p}": f"head.conv5.0.conv{i + 1}.{j}" for i in range(4) for j, p in enumerate(("conv", "bn"))}
ENCODING |= {"bottleneck.conv": "head.conv5.1", "bottleneck.bn": "head.conv5.2", "classifier": "head.conv5.5"}
ENCODING |= {"aux.conv": "auxlayer.conv5.0", "aux.bn": "auxlayer.conv5.1", "aux_classifier": "auxlayer.conv5.4"}
TRAMAC = {own: name.replace("head.conv5.0", "head.psp").replace("conv5", "block") for own, name in ENCODING.items()}
TRAMAC |= {"bottleneck.conv": "head.block.0", "bottleneck.bn": "head.block.1", "classifier": "head.block.4"}


def paddle(name: str) -> str:
    """PaddleSeg's name of an entry."""
    parts = name.split(".")
    if parts[0] == "stem":
        kind = "_conv" if int(parts[1]) % 3 == 0 else "_batch_norm"
        layer = f"backbone.conv1_{int(parts[1]) // 3 + 1}.{kind}"
    elif parts[0].startswith("layer"):
        block = f"backbone.bb_{int(parts[0][-1]) - 1}_{parts[1]}"
        if parts[2] == "downsample":
            layer = f"{block}.short.{'_conv' if parts[3] == '1' else '_batch_norm'}"
        else:
            layer = f"{block}.conv{int(parts[2][-1]) - 1}.{'_conv' if parts[2].startswith('conv') else '_batch_norm'}"
    else:
        layer = ".".join(parts[:-1])
        for own, theirs in (
            ("levels.{}", "head.psp_module.stages.{}.1"),
            ("bottleneck", "head.psp_module.conv_bn_relu2"),
            ("classifier", "head.conv"),
            ("aux_classifier", "head.auxlayer.conv"),
            ("aux", "head.auxlayer.conv_bn_relu"),
        ):
            for number in range(4):
                before = own.format(number)
                if layer == before or layer.startswith(f"{before}."):
                    layer = theirs.format(number) + layer.removeprefix(before)
                    break
        layer = layer.replace(".conv_bn_relu.conv", ".conv_bn_relu._conv")
        kinds = {"conv": "_conv", "bn": "_batch_norm"}
        head, _, last = layer.rpartition(".")
        if parts[0] in ("levels", "bottleneck", "aux"):
            layer = f"{head}.{kinds.get(last, last)}"
    tensor = {"running_mean": "_mean", "running_var": "_variance"}.get(parts[-1], parts[-1])
    return f"{layer}.{tensor}"


def renamed(state: dict[str, Tensor], names: dict[str, str]) -> dict[str, Tensor]:
    """Entries under other names: of the layers in ``names``, longest first, ``{}`` being any of four levels."""
    table = {own.format(i): theirs.format(i) for own, theirs in names.items() for i in range(4)}
    result = {}
    for name, value in state.items():
        own = max((own for own in table if name.startswith(f"{own}.")), key=len, default=None)
        result[name if own is None else table[own] + name.removeprefix(own)] = value
    return result


# source: the model, and its entries as a file has them
STRUCTURES = {
    "semseg": {"stem": (64, 64, 128), "first": (2, 4), "align_corners": True},
    "mmseg": {"stem": (32, 32, 64), "first": (1, 2), "align_corners": False},
    "mmseg V1d": {"stem": (32, 32, 64), "first": (1, 2), "align_corners": False, "pool": True},
    "mmseg b": {"stem": (64,), "first": (1, 2), "align_corners": False},
    "paddleseg": {
        **{"stem": (32, 32, 64), "first": (2, 4), "align_corners": False, "pool": True},
        **{"bias": True, "head": 1024, "reverse": True},
    },
    "encoding": {"stem": (64, 64, 128), "first": (1, 2), "align_corners": True},
    "tramac": {"stem": (64, 64, 128), "first": (1, 2), "align_corners": True},
}
NAMES = {
    "semseg": SEMSEG,
    "mmseg": MMSEG,
    "mmseg V1d": MMSEG,
    "mmseg b": MMSEG_B,
    "encoding": ENCODING,
    "tramac": TRAMAC,
}


def published(source: str, classes: int = 5) -> PSPNet:
    with torch.device("meta"):
        model = PSPNet(classes, **STRUCTURES[source])  # type: ignore[arg-type]
    return randomise(model.to_empty(device="cpu"))  # type: ignore[return-value]


def entries(source: str, model: nn.Module) -> dict[str, Tensor]:
    state = dict(model.state_dict())
    if source == "paddleseg":
        return {paddle(name): value for name, value in state.items() if not name.endswith("num_batches_tracked")}
    return renamed(state, NAMES[source])
