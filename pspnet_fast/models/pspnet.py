"""Pyramid Scene Parsing Network (Zhao et al., CVPR 2017)."""

from collections.abc import Sequence
from typing import Any, Literal, get_args

from torch import Tensor, nn

from pspnet_fast.head import psp_head
from pspnet_fast.models.hub import Pretrained
from pspnet_fast.models.recompute import recomputed
from pspnet_fast.models.resnet import NormLayer, ResNet, initialise_convolutions, resnet
from pspnet_fast.modules import Concat, FusedPPM

Head = Literal["fused", "concat"]
LAYERS = ("layer0", "layer1", "layer2", "layer3", "layer4")


def _head(
    in_channels: int,
    channels: int,
    classes: int,
    dropout: float,
    norm_layer: NormLayer,
    bottleneck_kernel: int = 3,
    classifier_kernel: int = 1,
) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(in_channels, channels, bottleneck_kernel, padding=bottleneck_kernel // 2, bias=False),
        norm_layer(channels),
        nn.ReLU(inplace=True),
        nn.Dropout2d(dropout),
        nn.Conv2d(channels, classes, classifier_kernel, padding=classifier_kernel // 2),
    )


class PSPNet(Pretrained):
    """PSPNet whose pyramid pooling module is :class:`pspnet_fast.FusedPPM`.

    Names and shapes of the weights with ``stem="deep64"`` are those of semseg (``layer0`` .. ``layer4``, ``ppm``,
    ``cls``, ``aux``).

    Args:
        classes: number of classes K, at least 1.
        backbone: a name for :func:`pspnet_fast.models.resnet`, or a module with children ``layer0`` .. ``layer4`` and
            ``out_channels`` = (channels of layer3, channels of layer4); the children become children of this module.
        stem, dilation, output_stride, avg_down, stages: of the named backbone; see :func:`pspnet_fast.models.resnet`. A
            backbone given as a module keeps its own.
        bins: sizes of the pooled grids; None leaves the pyramid out (a fully convolutional network).
        aux: whether to have the auxiliary head, on layer3 (with fewer stages, on the last but one).
        dropout: probability of dropping a whole channel before the classifiers, 0 <= dropout < 1.
        align_corners: convention of the pyramid's upsampling; logits should be upsampled with the same.
        norm_layer: makes the norm of ``n`` channels.
        head: how the pyramid and the convolution after it run: "fused" without the concatenation, as
            :class:`pspnet_fast.FusedPSPHead` does it, "concat" one after the other. The weights are the same.
        head_channels: channels before the classifier; None means those of layer4 // 4. The auxiliary head has those
            of layer3 // 4.
        concat: "input_first" for [features, levels], "input_last" for [levels, features] (smp).
        reduction_channels: of each level of the pyramid; None means those of layer4 // len(bins).
        bin1_norm: whether the level of bin 1 has a norm; without, its 1x1 convolution has a bias (smp).
        bottleneck_kernel, classifier_kernel: sizes of the convolution after the pyramid and of the last one, odd.

    Attributes:
        config: the arguments but ``classes`` as plain data, which build the model again: ``PSPNet(classes, **config)``.
            None with a backbone given as a module or another norm than BatchNorm2d, which are no plain data.
        metadata: plain data that is saved with the weights, such as ``class_names``; empty at first. See
            ``save_pretrained``, ``from_pretrained`` and ``push_to_hub``.
        recompute: whether training computes the backbone's activations again in the backward pass instead of keeping
            them: less memory, a third more time, the same results. False at first.

    Raises:
        ValueError: an argument is outside its range; the message names it.
    """

    layer0: nn.Module
    layer1: nn.Module
    layer2: nn.Module
    layer3: nn.Module
    layer4: nn.Module

    def __init__(
        self,
        classes: int,
        backbone: str | nn.Module = "resnet50",
        *,
        stem: str = "deep64",
        dilation: str = "full",
        output_stride: int = 8,
        bins: Sequence[int] | None = (1, 2, 3, 6),
        aux: bool = True,
        dropout: float = 0.1,
        align_corners: bool = True,
        norm_layer: NormLayer = nn.BatchNorm2d,
        head: Head = "fused",
        head_channels: int | None = None,
        avg_down: bool = False,
        stages: int = 4,
        concat: Concat = "input_first",
        reduction_channels: int | None = None,
        bin1_norm: bool = True,
        bottleneck_kernel: int = 3,
        classifier_kernel: int = 1,
    ) -> None:
        super().__init__()
        if classes < 1:
            raise ValueError(f"classes must be at least 1, got {classes}")
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout must satisfy 0 <= dropout < 1, got {dropout}")
        if head not in get_args(Head):
            raise ValueError(f"head must be one of {', '.join(map(repr, get_args(Head)))}, got {head!r}")
        for name, channels in (("head_channels", head_channels), ("reduction_channels", reduction_channels)):
            if channels is not None and channels < 1:
                raise ValueError(f"{name} must be None or at least 1, got {channels}")
        for name, kernel in (("bottleneck_kernel", bottleneck_kernel), ("classifier_kernel", classifier_kernel)):
            if kernel < 1 or kernel % 2 == 0:
                raise ValueError(f"{name} must be odd and at least 1, got {kernel}")
        self.config: dict[str, Any] | None = None
        self.metadata: dict[str, Any] = {}
        if isinstance(backbone, str):
            if norm_layer is nn.BatchNorm2d:
                self.config = {
                    "backbone": backbone,
                    "stem": stem,
                    "dilation": dilation,
                    "output_stride": output_stride,
                    "bins": None if bins is None else list(bins),
                    "aux": aux,
                    "dropout": dropout,
                    "align_corners": align_corners,
                    "head": head,
                    "head_channels": head_channels,
                    "avg_down": avg_down,
                    "stages": stages,
                    "concat": concat,
                    "reduction_channels": reduction_channels,
                    "bin1_norm": bin1_norm,
                    "bottleneck_kernel": bottleneck_kernel,
                    "classifier_kernel": classifier_kernel,
                }
            backbone = resnet(
                backbone,
                stem=stem,
                dilation=dilation,
                output_stride=output_stride,
                norm_layer=norm_layer,
                avg_down=avg_down,
                stages=stages,
            )
        self.classes = classes
        self.align_corners = align_corners
        self.head: Head = head
        self.recompute = False
        self._layers: tuple[str, ...] = backbone.stages if isinstance(backbone, ResNet) else LAYERS
        missing = [name for name in (*self._layers, "out_channels") if not hasattr(backbone, name)]
        if missing:
            layers = ", ".join(self._layers)
            raise ValueError(f"backbone must have {layers} and out_channels, lacks {', '.join(missing)}")
        for name in self._layers:
            self.add_module(name, getattr(backbone, name))
        channels3, channels4 = backbone.out_channels  # type: ignore[misc]

        features = channels4
        self.ppm: nn.Module = nn.Identity()
        if bins is not None:
            self.ppm = FusedPPM(
                channels4, reduction_channels, tuple(bins), align_corners, concat=concat, norm_layer=norm_layer
            )
            features = self.ppm.out_channels
            for i, level in enumerate(self.ppm.levels):
                if level == (1, 1) and not bin1_norm:
                    convolution = nn.Conv2d(channels4, self.ppm.reduction_channels, 1)
                    branch = nn.Sequential(nn.Identity(), convolution, nn.Identity(), nn.ReLU(inplace=True))
                    self.ppm.features[i] = branch
        self.cls = _head(
            features,
            head_channels or channels4 // 4,
            classes,
            dropout,
            norm_layer,
            bottleneck_kernel,
            classifier_kernel,
        )
        self.aux = _head(channels3, channels3 // 4, classes, dropout, norm_layer) if aux else None
        for part in (self.ppm, self.cls, self.aux):
            if part is not None:
                initialise_convolutions(part)

    def forward(self, input: Tensor) -> dict[str, Tensor]:
        """Compute logits at feature resolution.

        Args:
            input: (N, 3, H, W), any H and W.

        Returns:
            "out": (N, K, h, w) with h = ceil(H / output_stride) and w likewise. "aux": (N, K, h, w), in training mode
            only and only if the model has the auxiliary head: nothing but a loss needs it.
        """
        last_but_one = input
        for name in self._layers[:-1]:
            last_but_one = self._backbone_layer(name, last_but_one)
        # first, so that its gradients come last: none of them lies in memory while those of the large maps are made
        aux = None if self.aux is None or not self.training else self.aux(last_but_one)
        logits = {"out": self._classify(self._backbone_layer(self._layers[-1], last_but_one))}
        return logits if aux is None else logits | {"aux": aux}

    def _backbone_layer(self, name: str, input: Tensor) -> Tensor:
        layer = getattr(self, name)
        return recomputed(layer, input) if self.recompute and self.training else layer(input)

    def _classify(self, features: Tensor) -> Tensor:
        """Pyramid and classifier."""
        return psp_head(features, self.ppm, self.cls) if self.head == "fused" else self.cls(self.ppm(features))
