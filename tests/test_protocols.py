"""The presets are the published protocols: label maps equal to the pixel to those of plain transcriptions.

Written down from the facts with numpy, OpenCV and torch's own functions, one image, window and scale after the other.
The model is float64. Where the transcription's two best probabilities differ by less than TIE either may win: images
are resized in float32, and OpenCV resizes maps with weights of float32.
"""

import math
from collections.abc import Sequence

import cv2
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from toy_backbone import ToyBackbone

from pspnet_fast.data.transforms import normalise
from pspnet_fast.inference.protocol import ABSENT, Protocol
from pspnet_fast.inference.sliding import Segmenter
from pspnet_fast.models import PSPNet

pytestmark = pytest.mark.usefixtures("one_thread")
TIE = 5e-6
K = 7
MEAN, STD = (0.45, 0.5, 0.4), (0.25, 0.2, 0.3)
Array = NDArray[np.float64]


def random_model(align_corners: bool) -> PSPNet:
    torch.manual_seed(0)
    model = PSPNet(K, ToyBackbone(), align_corners=align_corners, dropout=0, head_channels=8).double()
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = None
    images = [normalise(random_image(64, 64, seed).astype(np.float32), MEAN, STD) for seed in range(2, 6)]
    with torch.no_grad():
        model(torch.stack(images).double())  # statistics that keep values of the order of 1
        model.cls[-1].weight.normal_()
        model.cls[-1].bias -= model.eval()(torch.stack(images).double())["out"].mean((0, 2, 3))
    return model


def random_image(height: int, width: int, seed: int = 0) -> NDArray[np.uint8]:
    rng = np.random.default_rng(seed)
    blocks = rng.integers(256, size=(height // 4 + 1, width // 4 + 1, 3), dtype=np.uint8)
    return cv2.resize(blocks, (width, height), interpolation=cv2.INTER_CUBIC)


@torch.inference_mode()
def semseg(model: PSPNet, image: NDArray[np.uint8], base: int, crop: Sequence[int], scales: Sequence[float]) -> Array:
    """(H, W, K) probabilities."""
    height, width, _ = image.shape
    mean, std = (255 * np.asarray(values) for values in (MEAN, STD))
    total = np.zeros((height, width, K))
    for scale in scales:
        long = round(scale * base)
        size = (long, round(long / height * width)) if height > width else (round(long / width * height), long)
        scaled = cv2.resize(image.astype(np.float32), size[::-1], interpolation=cv2.INTER_LINEAR)
        short = [max(wanted - given, 0) for wanted, given in zip(crop, size, strict=True)]
        above, left = short[0] // 2, short[1] // 2
        borders = (above, short[0] - above, left, short[1] - left)
        scaled = cv2.copyMakeBorder(scaled, *borders, cv2.BORDER_CONSTANT, value=mean.tolist())
        rows, columns, _ = scaled.shape
        sums, count = np.zeros((rows, columns, K)), np.zeros((rows, columns, 1))
        strides = [math.ceil(extent * 2 / 3) for extent in crop]
        for i in range(math.ceil((rows - crop[0]) / strides[0]) + 1):
            for j in range(math.ceil((columns - crop[1]) / strides[1]) + 1):
                bottom, right = min(i * strides[0] + crop[0], rows), min(j * strides[1] + crop[1], columns)
                window = np.s_[bottom - crop[0] : bottom, right - crop[1] : right]
                pixels = torch.from_numpy(((scaled[window] - mean) / std).transpose(2, 0, 1))[None]
                logits = model(torch.cat([pixels, pixels.flip(3)]))["out"]
                full = F.interpolate(logits, tuple(crop), mode="bilinear", align_corners=model.align_corners).softmax(1)
                sums[window] += ((full[0] + full[1].flip(2)) / 2).numpy().transpose(1, 2, 0)
                count[window] += 1
        kept = (sums / count)[above : above + size[0], left : left + size[1]]
        total += cv2.resize(kept, (width, height), interpolation=cv2.INTER_LINEAR)
    return total / len(scales)


@torch.inference_mode()
def mmseg(
    model: PSPNet,
    image: NDArray[np.uint8],
    box: Sequence[int] | None,
    crop: Sequence[int] | None,
    stride: Sequence[int],
    scales: Sequence[float],
    flip: bool,
) -> Array:
    """(H, W, K) probabilities."""
    height, width, _ = image.shape
    mean, std = (255 * np.asarray(values) for values in (MEAN, STD))
    total = torch.zeros(K, height, width, dtype=torch.float64)
    for scale in scales:
        fit = box or (int(width * scale + 0.5), int(height * scale + 0.5))
        factor = min(max(fit) / max(height, width), min(fit) / min(height, width))
        size = int(height * factor + 0.5), int(width * factor + 0.5)
        scaled = cv2.resize(image, size[::-1], interpolation=cv2.INTER_LINEAR)
        pixels = torch.from_numpy(((scaled - mean) / std).transpose(2, 0, 1))[None]
        for mirrored in (False, True) if flip else (False,):
            logits = mmseg_logits(model, pixels.flip(3) if mirrored else pixels, crop, stride)
            logits = logits.flip(3) if mirrored else logits
            logits = F.interpolate(logits, (height, width), mode="bilinear", align_corners=model.align_corners)
            total += logits[0].softmax(0)
    return (total / len(scales) / (1 + flip)).numpy().transpose(1, 2, 0)


def mmseg_logits(
    model: PSPNet, pixels: torch.Tensor, crop: Sequence[int] | None, stride: Sequence[int]
) -> torch.Tensor:
    def full(part: torch.Tensor) -> torch.Tensor:
        logits = model(part)["out"]
        return F.interpolate(logits, part.shape[2:], mode="bilinear", align_corners=model.align_corners)

    if crop is None:
        return full(pixels)
    rows, columns = pixels.shape[2:]
    sums, count = torch.zeros(1, K, rows, columns, dtype=torch.float64), torch.zeros(1, 1, rows, columns)
    for i in range(max(rows - crop[0] + stride[0] - 1, 0) // stride[0] + 1):
        for j in range(max(columns - crop[1] + stride[1] - 1, 0) // stride[1] + 1):
            bottom, right = min(i * stride[0] + crop[0], rows), min(j * stride[1] + crop[1], columns)
            window = np.s_[:, :, max(bottom - crop[0], 0) : bottom, max(right - crop[1], 0) : right]
            sums[window] += full(pixels[window])
            count[window] += 1
    return sums / count


def assert_same_labels(
    segmenter: Segmenter, images: Sequence[NDArray[np.uint8]], expected: Sequence[Array], tie: float = TIE
) -> None:
    """The labels equal, but at ties; few of these, and several classes; the confidence is right as well."""
    labels, confidence = segmenter(images, confidence=True)
    assert len(labels) == len(images)
    for label, sure, probabilities in zip(labels.numpy(), confidence.numpy(), expected, strict=True):
        assert label.shape == probabilities.shape[:2]
        best = np.sort(probabilities, 2)
        settled = best[..., -1] - best[..., -2] > tie
        assert settled.mean() > 1 - 1e3 * tie
        assert (label == probabilities.argmax(2))[settled].all()
        assert np.abs(sure - best[..., -1]).max() < tie
        assert len(np.unique(label)) >= 3


@pytest.mark.parametrize(
    ("size", "base", "crop", "scales"),
    [
        ((61, 90), None, (33, 41), (1.0,)),  # 3 x 4 windows, the last of them moved inside
        ((90, 61), 75, (33, 41), (0.5, 1.0, 1.75)),  # upright; at 0.5 both sides are padded
        ((64, 64), 61, (65, 57), (0.75, 1.25)),  # square; one side padded by an odd number
        ((20, 23), None, (33, 41), (1.0,)),  # smaller than a window
        ((80, 96), 48, (33, 41), (1.0,)),  # halved, where OpenCV averages areas
    ],
)
@pytest.mark.parametrize("align_corners", [True, False])
def test_semseg(
    size: tuple[int, int], base: int | None, crop: tuple[int, int], scales: tuple[float, ...], align_corners: bool
) -> None:
    model, image = random_model(align_corners), random_image(*size)
    protocol = Protocol.of("semseg", crop=crop, scales=scales, base_size=base and (base,))
    assert protocol.preset == "semseg"
    expected = semseg(model, image, base or max(size), crop, scales)
    assert_same_labels(Segmenter(model, K, MEAN, STD, protocol), [image], [expected])


@pytest.mark.parametrize(
    ("size", "box", "crop", "scales", "flip"),
    [
        ((61, 90), None, None, (1.0,), False),
        ((61, 90), (200, 50), None, (1.0,), False),
        ((90, 61), (100, 77), None, (1.0,), False),
        ((61, 90), None, None, (0.5, 1.0, 1.75), True),
        ((61, 90), None, (33, 41), (1.0,), False),
        ((61, 90), (120, 77), (33, 41), (1.0,), False),
        ((61, 83), None, (33, 41), (0.5, 1.25), True),  # at 0.5 smaller than a window
    ],
)
@pytest.mark.parametrize("align_corners", [True, False])
def test_mmseg(
    size: tuple[int, int],
    box: tuple[int, int] | None,
    crop: tuple[int, int] | None,
    scales: tuple[float, ...],
    flip: bool,
    align_corners: bool,
) -> None:
    model, image = random_model(align_corners), random_image(*size)
    protocol = Protocol.of("mmseg", crop=crop, scales=scales, base_size=box, flip=flip)
    expected = mmseg(model, image, box, crop, (22, 28), scales, flip)
    assert_same_labels(Segmenter(model, K, MEAN, STD, protocol), [image], [expected])


def plain(model: PSPNet, image: NDArray[np.uint8], scales: Sequence[float], flip: bool) -> Array:
    """(H, W, K): softmax of logits interpolated straight to the image's size, averaged over scales and mirrored."""
    height, width, _ = image.shape
    total = torch.zeros(K, height, width, dtype=torch.float64)
    for scale in scales:
        size = [round(scale * extent) for extent in (width, height)]
        scaled = normalise(cv2.resize(image.astype(np.float32), size), MEAN, STD)[None].double()
        for mirrored in (False, True) if flip else (False,):
            with torch.inference_mode():
                logits = model(scaled.flip(3) if mirrored else scaled)["out"]
            full = F.interpolate(logits, (height, width), mode="bilinear", align_corners=model.align_corners).softmax(1)
            total += (full.flip(3) if mirrored else full)[0]
    return (total / len(scales) / (1 + flip)).numpy().transpose(1, 2, 0)


@pytest.mark.parametrize(("scales", "flip"), [((1.0,), False), ((1.0,), True), ((0.5, 1.5), False), ((0.5, 1.0), True)])
def test_whole_images(scales: tuple[float, ...], flip: bool) -> None:
    model, image = random_model(True), random_image(60, 84)
    segmenter = Segmenter(model, K, MEAN, STD, Protocol(scales=scales, flip=flip, preset=None))
    assert segmenter.protocol.plain == (scales == (1.0,) and not flip)
    assert_same_labels(segmenter, [image], [plain(model, image, scales, flip)])


SLIDING = [
    Protocol.of("semseg", crop=(33, 41), scales=(0.75, 1.5)),
    Protocol.of("mmseg", crop=(33, 41), scales=(0.75, 1.5), flip=True),
    Protocol.of("mmseg", scales=(0.75, 1.5), flip=True),
    Protocol.of("whole", crop=(33, 41)),
    Protocol(),
]


@pytest.mark.parametrize("protocol", SLIDING)
def test_batches_bands_and_host_change_nothing(protocol: Protocol, monkeypatch: pytest.MonkeyPatch) -> None:
    """Several images at once, few or many windows at once, thin or thick bands: the same labels."""
    model, images = random_model(True), [random_image(61, 90, seed) for seed in (0, 1, 2)]
    alone = [Segmenter(model, K, MEAN, STD, protocol, batch=1)([image], confidence=True) for image in images]
    together = Segmenter(model, K, MEAN, STD, protocol, batch=5, host=True)(images, confidence=True)
    monkeypatch.setattr("pspnet_fast.inference.sliding._ROWS", (1, 7))
    thin = Segmenter(model, K, MEAN, STD, protocol)(images, confidence=True)
    for labels, confidence in (together, thin):
        assert torch.equal(labels, torch.cat([one for one, _ in alone]))
        torch.testing.assert_close(confidence, torch.cat([one for _, one in alone]), rtol=0, atol=1e-12)


@pytest.mark.parametrize("protocol", SLIDING[:3])
def test_single_precision(protocol: Protocol) -> None:
    """A float32 model's labels are those of the float64 one wherever its two best are 1e-4 apart."""
    model, image = random_model(False), random_image(61, 90)
    _, wide = next(Segmenter(model, K, MEAN, STD, protocol).bands([image]))
    segmenter = Segmenter(model.float(), K, MEAN, STD, protocol)
    expected = wide[0].permute(1, 2, 0).numpy()
    assert expected.shape == (61, 90, K)
    assert_same_labels(segmenter, [image], [expected], tie=1e-4)


class _Widened(torch.nn.Module):
    """A model under bfloat16 autocast whose logits are float32 again."""

    def __init__(self, model: PSPNet) -> None:
        super().__init__()
        self.model, self.align_corners = model, model.align_corners

    def forward(self, input: torch.Tensor) -> dict[str, torch.Tensor]:
        with torch.autocast("cpu", torch.bfloat16):
            return {"out": self.model(input)["out"].float()}


@pytest.mark.parametrize("protocol", SLIDING)
def test_only_the_model_runs_under_autocast(protocol: Protocol) -> None:
    """Its bfloat16 logits are summed in float32: as if they had been float32 all along."""
    model, image = random_model(True).float(), random_image(61, 90)
    expected, sure = Segmenter(_Widened(model), K, MEAN, STD, protocol, channels_last=True)([image], confidence=True)
    narrow = Segmenter(model, K, MEAN, STD, protocol, autocast=torch.bfloat16, channels_last=True)
    labels, confidence = narrow([image], confidence=True)
    assert torch.equal(labels, expected)
    assert confidence.dtype == torch.float32
    torch.testing.assert_close(confidence, sure, rtol=0, atol=1e-6)
    assert not torch.equal(confidence, Segmenter(model, K, MEAN, STD, protocol)([image], confidence=True)[1])


def test_only_some_rows_of_a_map_exist() -> None:
    """Of the map of an upright image only the rows of one row of windows exist, and those of a band."""
    model, image = random_model(True), random_image(700, 40)
    sizes = []
    empty = torch.zeros
    segmenter = Segmenter(model, K, MEAN, STD, Protocol.of("semseg", crop=(33, 41)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pspnet_fast.inference.sliding._ROWS", (1, 16))
        patch.setattr(torch, "zeros", lambda *a, **k: sizes.append(a[0]) or empty(*a, **k))
        labels, _ = segmenter([image])
    rows = [size[2] for size in sizes if isinstance(size, tuple) and len(size) == 4 and size[1] == K]
    assert labels.shape == (1, 700, 40)
    assert len(rows) > 40
    assert max(rows) <= 33 + 22 + 16


def test_images_of_different_sizes_are_refused() -> None:
    segmenter = Segmenter(random_model(True), K, MEAN, STD)
    for images in ([], [random_image(9, 9), random_image(9, 8)], [random_image(9, 9)[..., 0]]):
        with pytest.raises(ValueError, match=r"images must be one or more of one size \(H, W, 3\), got \["):
            segmenter(images)


def test_protocol_refuses_what_does_not_go_together() -> None:
    for settings, message in (
        ({"scales": ()}, r"scales must be one or more numbers above 0, got \(\)"),
        ({"scales": (1.0, -1.0)}, "scales must be"),
        ({"crop": (0, 3)}, "crop must be"),
        ({"pad": True}, "pad must be False without a crop"),
        ({"average": "votes"}, "average must be probabilities or logits, got 'votes'"),
        ({"absent": "two"}, "absent must be skip or zero or one or nan, got 'two'"),
        ({"stride_rate": 0.0}, "stride_rate must be above 0"),
        ({"base_size": (3, 4)}, r"base_size must be \(length of the longer side,\) for sizes 'long'"),
        ({"base_size": (3, 4), "sizes": "fit", "flip": True}, "base_size must be None with scales or flip"),
        ({"preset": "smp"}, "preset must be None or one of"),
    ):
        with pytest.raises(ValueError, match=message):
            Protocol(**settings)
    with pytest.raises(ValueError, match="preset must be one of"):
        Protocol.of("paddle")


def test_protocol_in_words_and_as_a_record() -> None:
    protocol = Protocol.of("semseg", base_size=(2048,), scales=(0.5, 1.0))
    text = "; ".join(protocol.describe())
    for part in ("as semseg's tool/test.py", "longer side of 2048 pixels times 0.5, 1, and mirrored",
                 "windows of 473x473", "316 rows and 316 columns apart", "padded with the mean", "softmax in each",
                 "averaged over scales and mirror images", "count as 0 in means"):  # fmt: skip
        assert part in text
    assert Protocol.from_record(protocol.record()) == protocol
    assert Protocol.of("semseg", flip=False).preset is None  # it always does
    assert Protocol.of("mmseg", flip=True).preset == "mmseg"
    assert Protocol.of("whole", crop=(9, 9)).preset is None
    assert "softmax" not in "".join(Protocol().describe())
    assert len({Protocol(absent=rule).describe()[-1] for rule in ABSENT}) == 4
