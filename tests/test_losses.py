"""UpsampleCrossEntropyLoss: the operator's options, and which pixels hard example mining keeps."""

import math

import pytest
import torch

from pspnet_fast import UpsampleCrossEntropyLoss, reference

pytestmark = pytest.mark.usefixtures("poison")


@pytest.fixture
def pixels(device):
    """Logits (2, 5, 4, 4) and a target (2, 25, 25) with ignored pixels."""
    target = torch.randint(0, 5, (2, 25, 25))
    target[torch.rand(target.shape) < 0.2] = 255
    return torch.randn(2, 5, 4, 4, device=device), target.to(device)


def mined(logits, target, threshold: float, min_kept: int) -> torch.Tensor:
    """As mmsegmentation's OHEMPixelSampler: probabilities below the threshold, which min_kept * N of them raise."""
    losses = reference.upsample_cross_entropy(logits, target, reduction="none")
    probabilities = (-losses)[target != 255].exp()
    lowest = probabilities.sort().values
    bound = max(lowest[min(min_kept * len(logits), len(lowest)) - 1].item() if min_kept else 0.0, threshold)
    return losses[target != 255][probabilities <= bound].mean()


def test_options_reach_the_operator(pixels):
    logits, target = pixels
    options = {
        "align_corners": False,
        "weight": torch.rand(5, device=logits.device),
        "ignore_index": 3,
        "label_smoothing": 0.1,
        "reduction": "sum",
    }
    target = target.masked_fill(target == 255, 3)
    loss = UpsampleCrossEntropyLoss(**options)
    torch.testing.assert_close(loss(logits, target), reference.upsample_cross_entropy(logits, target, **options))
    assert not loss.state_dict()


@pytest.mark.parametrize(("threshold", "min_kept"), [(0.2, 0), (0.2, 100), (0.01, 300), (1.0, 1), (0.1, 10**6)])
def test_hard_pixels(pixels, threshold, min_kept):
    logits, target = pixels
    loss = UpsampleCrossEntropyLoss(ohem=True, threshold=threshold, min_kept=min_kept)
    results = []
    for function in (loss, lambda z, t: mined(z, t, threshold, min_kept)):
        leaf = logits.clone().requires_grad_()
        value = function(leaf, target)
        results.append((value, *torch.autograd.grad(value, leaf)))
    torch.testing.assert_close(*results)


def test_hard_pixels_summed(pixels):
    logits, target = pixels
    losses = reference.upsample_cross_entropy(logits, target, reduction="none")
    loss = UpsampleCrossEntropyLoss(ohem=True, threshold=0.2, min_kept=0, reduction="sum")
    torch.testing.assert_close(loss(logits, target), losses[losses >= -math.log(0.2)].sum())


def test_no_hard_pixel_gives_zero(device):
    logits = torch.randn(2, 3, 4, 4, device=device, requires_grad=True)
    for min_kept in (0, 10):
        loss = UpsampleCrossEntropyLoss(ohem=True, min_kept=min_kept)(logits, torch.full((2, 9, 9), 255, device=device))
        assert loss == 0
        assert not torch.autograd.grad(loss, logits)[0].any()


def test_a_loss_that_is_not_a_number_is_kept(pixels):
    logits, target = pixels
    logits[0, 0, 0, 0] = torch.nan
    for min_kept in (0, 10):
        assert UpsampleCrossEntropyLoss(ohem=True, min_kept=min_kept)(logits, target).isnan()


def test_compiles(pixels):
    logits, target = pixels
    loss = UpsampleCrossEntropyLoss(ohem=True, min_kept=100)
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(logits, target), loss(logits, target))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"reduction": "max"}, "reduction must be one of 'none', 'mean', 'sum', but is 'max'"),
        ({"reduction": "none", "ohem": True}, "reduction must be one of 'mean', 'sum', but is 'none'"),
        ({"threshold": 0.0}, "threshold must be above 0 and at most 1, but is 0.0"),
        ({"min_kept": -1}, "min_kept must be at least 0, but is -1"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        UpsampleCrossEntropyLoss(**options)
