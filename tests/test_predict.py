"""Label maps of whole images."""

from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from toy_data import COLORS, NAMES

import pspnet_fast
from pspnet_fast.data.transforms import normalise
from pspnet_fast.inference.predict import Predictor, predict_labels
from pspnet_fast.models import PSPNet

ARGUMENTS = {"backbone": "resnet18", "stem": "deep32", "dilation": "contracted", "head_channels": 8, "bins": [1, 3]}


def checkpoint() -> tuple[PSPNet, dict]:
    torch.manual_seed(0)
    model = PSPNet(len(NAMES), **ARGUMENTS).eval()
    metadata = {"model": ARGUMENTS, "colors": [list(color) for color in COLORS], "mean": [0.5] * 3, "std": [0.2] * 3}
    return model, {"model": model.state_dict(), "class_names": NAMES, "metadata": metadata}


@pytest.mark.parametrize("size", [(1, 1), (37, 53), (64, 65)])
def test_predictor_is_the_saved_model_at_any_size(size: tuple[int, int]) -> None:
    model, saved = checkpoint()
    predictor = Predictor.from_checkpoint(saved, torch.device("cpu"))
    image = torch.randn(3, *size)
    with torch.no_grad():
        expected = F.interpolate(model(image[None])["out"], size, mode="bilinear", align_corners=True)[0].argmax(0)
    label = predictor(image)
    assert label.dtype == torch.uint8
    assert torch.equal(label.long(), expected)
    assert (predictor.class_names, predictor.colors, predictor.mean) == (NAMES, COLORS, [0.5] * 3)


def test_align_corners_is_that_of_the_model() -> None:
    class Fixed(torch.nn.Module):
        align_corners = False

        def forward(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
            return {"out": torch.tensor([[[[0.0, 3.0]], [[0.2, 0.2]]]])}

    model = Fixed()
    images = torch.zeros(1, 3, 1, 8)
    # column i lies at (i + 1/2) / 4 - 1/2 between the two logits, with aligned corners at i / 7
    assert predict_labels(model, images)[0, 0].tolist() == [1, 1, 0, 0, 0, 0, 0, 0]
    model.align_corners = True
    assert predict_labels(model, images)[0, 0].tolist() == [1, 0, 0, 0, 0, 0, 0, 0]


def test_predictor_takes_files_arrays_and_tensors(tmp_path: Path) -> None:
    model, saved = checkpoint()
    saved |= {"format": 3, "config": {}, "step": 1, "steps": 1, "history": []}
    torch.save(saved, tmp_path / "best.pt")
    pixels = np.random.default_rng(0).integers(0, 256, (37, 53, 3)).astype(np.uint8)
    cv2.imwrite(str(tmp_path / "image.png"), pixels[..., ::-1])
    predictor = pspnet_fast.Predictor.from_checkpoint(str(tmp_path / "best.pt"))
    normalised = torch.from_numpy((pixels / 255 - 0.5) / 0.2).permute(2, 0, 1).float()
    expected = predict_labels(model, normalised[None])[0].numpy()
    for image in (tmp_path / "image.png", str(tmp_path / "image.png"), pixels, pixels.astype(np.uint16) * 257):
        label = predictor(image)
        assert label.dtype == np.uint8
        assert (label == expected).all()
    assert (predictor(normalised).numpy() == expected).all()


def test_probabilities_are_those_of_the_upsampled_logits() -> None:
    model, saved = checkpoint()
    predictor = Predictor.from_checkpoint(saved, "cpu")
    images = list(np.random.default_rng(0).integers(0, 256, (2, 37, 53, 3)).astype(np.uint8))
    both = predictor.predict(images, confidence=True, probabilities=True)
    normalised = torch.stack([normalise(image.astype(np.float32), [0.5] * 3, [0.2] * 3) for image in images])
    with torch.no_grad():
        logits = F.interpolate(model(normalised)["out"], (37, 53), mode="bilinear", align_corners=True)
    for softmax, prediction in zip(logits.softmax(1), both, strict=True):
        torch.testing.assert_close(torch.from_numpy(prediction.probabilities), softmax, atol=2e-6, rtol=0)
        torch.testing.assert_close(torch.from_numpy(prediction.confidence), softmax.amax(0), atol=2e-6, rtol=0)
        assert (prediction.labels == softmax.argmax(0).numpy()).all()
    alone = predictor.predict(images)
    assert [(prediction.confidence, prediction.probabilities) for prediction in alone] == [(None, None)] * 2
    assert predictor.predict([]) == []


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        ([(5, 6)], r"image must be RGB of shape \(height, width, 3\), got \(5, 6\)"),
        ([(5, 6, 4)], r"got \(5, 6, 4\)"),
        ([(0, 6, 3)], r"got \(0, 6, 3\)"),
        ([(5, 6, 3), (6, 5, 3)], r"images must be of one size, got \[\(5, 6, 3\), \(6, 5, 3\)\]"),
    ],
)
def test_arrays_that_are_no_images(shapes: list[tuple[int, ...]], message: str) -> None:
    predictor = Predictor.from_checkpoint(checkpoint()[1], "cpu")
    with pytest.raises(ValueError, match=message):
        predictor.predict([np.zeros(shape, np.uint8) for shape in shapes])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"metadata": {}}, r"does not describe its model: metadata\['model'\] must be the arguments of PSPNet"),
        ({"metadata": {"model": "resnet50"}}, "does not describe its model"),
        ({"metadata": {"model": {"backbone": "resnet18"}}}, "weights are not those of the PSPNet it describes"),
        ({"metadata": {"model": {"depth": 18}}}, "weights are not those of the PSPNet it describes .*'depth'"),
        ({"class_names": NAMES[:2]}, "weights are not those of the PSPNet it describes"),
        ({"class_names": ["x"] * 256}, "has 256 classes; label maps hold at most 255"),
    ],
)
def test_checkpoints_that_cannot_be_predicted_with(change: dict, message: str) -> None:
    _, saved = checkpoint()
    with pytest.raises(ValueError, match=message) as error:
        Predictor.from_checkpoint({**saved, **change}, torch.device("cpu"))
    assert "\n" not in str(error.value)


def test_assumed_normalisation_is_said() -> None:
    _, saved = checkpoint()
    saved["metadata"] = {key: value for key, value in saved["metadata"].items() if key not in ("mean", "std")}
    with pytest.warns(UserWarning, match="ImageNet's is assumed") as warned:
        predictor = Predictor.from_checkpoint(saved, torch.device("cpu"))
    assert [str(entry.message).split(":")[0].split()[-1] for entry in warned] == ["mean", "std"]
    assert predictor.mean == pytest.approx([0.485, 0.456, 0.406])
