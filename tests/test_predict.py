"""Label maps of whole images."""

import pytest
import torch
import torch.nn.functional as F
from toy_data import COLORS, NAMES

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
