"""UpsampleDiceLoss and UpsampleLovaszLoss: against plain compositions of torch, of logits upsampled as a whole."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from pspnet_fast import UpsampleDiceLoss, UpsampleLovaszLoss, region_losses

pytestmark = pytest.mark.usefixtures("poison")
LOSSES = {"dice": UpsampleDiceLoss, "lovasz": UpsampleLovaszLoss}
every_loss = pytest.mark.parametrize("name", LOSSES)


@pytest.fixture(params=["cpu", "cuda"])
def device(request) -> torch.device:
    """These losses have no kernels of their own."""
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA GPU on this machine")
    return torch.device(request.param)


def dice(probabilities: Tensor, target: Tensor, squared: bool = False) -> Tensor:
    """Of (pixels, K), as it is defined, over the classes that there are."""
    own = F.one_hot(target, probabilities.size(1)).to(probabilities.dtype)
    of_pixels = probabilities**2 if squared else probabilities
    score = 2 * (probabilities * own).sum(0) / (of_pixels.sum(0) + own.sum(0))
    return (1 - score)[own.sum(0) > 0].mean()


def lovasz(probabilities: Tensor, target: Tensor) -> Tensor:
    """Of (pixels, K): the Lovasz extension of 1 - intersection / union, over the classes that there are."""
    losses = []
    for k in target.unique():
        own = target == k
        errors = (own.to(probabilities.dtype) - probabilities[:, k]).abs()
        errors, order = errors.sort(descending=True)
        missed = own[order].double().cumsum(0)
        count = torch.arange(1, len(order) + 1)
        jaccard = 1 - (own.sum() - missed) / (own.sum() + count - missed)
        losses.append((errors * jaccard.diff(prepend=torch.zeros(1).double())).sum())
    return torch.stack(losses).mean()


def composed(name: str, logits: Tensor, target: Tensor, align_corners: bool, ignore_index: int = 255) -> Tensor:
    size = target.shape[1:]
    upsampled = F.interpolate(logits, size, mode="bilinear", align_corners=align_corners)
    counted = target != ignore_index
    return {"dice": dice, "lovasz": lovasz}[name](upsampled.softmax(1).movedim(1, -1)[counted], target[counted])


def pixels(classes: int = 5, size: tuple[int, int] = (25, 19)) -> tuple[Tensor, Tensor]:
    """Logits (2, K, 4, 3) and a target with ignored pixels and none of class 1."""
    target = torch.randint(0, classes, (2, *size))
    target[torch.rand(target.shape) < 0.2] = 255
    return torch.randn(2, classes, 4, 3).double() * 3, torch.where(target == 1, 2, target)


def with_gradient(function, logits: Tensor, *arguments: object) -> tuple[Tensor, Tensor]:
    leaf = logits.clone().requires_grad_()
    loss = function(leaf, *arguments)
    return loss.detach(), torch.autograd.grad(3 * loss, leaf)[0]


@every_loss
@pytest.mark.parametrize("align_corners", [True, False])
@pytest.mark.parametrize("size", [(25, 19), (4, 3), (1, 1), (3, 8)])
@pytest.mark.parametrize("band", [1, 1000, 1 << 22])  # rows one by one, some at a time, all
def test_equals_the_composition(device, name, align_corners, size, band, monkeypatch):
    monkeypatch.setattr(region_losses, "_BAND", band)
    logits, target = (tensor.to(device) for tensor in pixels(size=size))
    target[0, 0, 0] = 0
    loss = LOSSES[name](align_corners=align_corners)
    ours = with_gradient(loss, logits, target)
    expected = with_gradient(lambda z, t: composed(name, z, t, align_corners), logits.cpu(), target.cpu())
    torch.testing.assert_close([value.cpu() for value in ours], list(expected), rtol=1e-10, atol=1e-13)


def test_dice_of_squares():
    logits, target = pixels()
    ours = with_gradient(UpsampleDiceLoss(squared=True), logits, target)
    upsampled = lambda z: F.interpolate(z, target.shape[1:], mode="bilinear", align_corners=True)  # noqa: E731
    counted = target != 255
    composition = lambda z: dice(upsampled(z).softmax(1).movedim(1, -1)[counted], target[counted], True)  # noqa: E731
    torch.testing.assert_close(ours, with_gradient(composition, logits), rtol=1e-10, atol=1e-13)


@every_loss
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 1e-2), (torch.float16, 2e-3)])
@pytest.mark.parametrize("autocast", [False, True])
def test_precision(name, dtype, tolerance, autocast):
    logits, target = pixels()
    logits = logits.to(dtype)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        loss, grad = with_gradient(LOSSES[name](), logits, target)
    assert (loss.dtype, grad.dtype) == (torch.float32, dtype)
    expected = with_gradient(lambda z, t: composed(name, z, t, True), logits.double(), target)
    torch.testing.assert_close(loss.double(), expected[0], rtol=1e-5, atol=0)
    torch.testing.assert_close(grad.double(), expected[1], rtol=tolerance, atol=tolerance * expected[1].abs().max())


@every_loss
def test_ignored_pixels(name):
    logits, target = pixels()
    loss = LOSSES[name](ignore_index=3)
    expected = with_gradient(lambda z, t: composed(name, z, t, True, 3), logits, target.masked_fill(target == 255, 3))
    torch.testing.assert_close(with_gradient(loss, logits, target.masked_fill(target == 255, 3).byte()), expected)
    value, grad = with_gradient(loss, logits, torch.full_like(target, 3))
    assert value == 0
    assert not grad.any()


@every_loss
def test_what_is_no_number_or_class_shows(device, name):
    logits, target = (tensor.to(device) for tensor in pixels())
    for wrong in (5, -1):
        bad = target.index_fill(1, torch.tensor(3, device=device), wrong)
        if device.type == "cuda":
            assert LOSSES[name]()(logits, bad).isnan()
            continue
        with pytest.raises(IndexError, match=rf"target must be from 0 to 4 or ignore_index 255, but holds {wrong}"):
            LOSSES[name]()(logits, bad)
    with pytest.raises(ValueError, match="target must have shape"):
        LOSSES[name]()(logits, target[0])
    logits[0, 0, 0, 0] = torch.nan
    assert LOSSES[name]()(logits, target).isnan()


class Largest(TorchDispatchMode):
    """How many elements the largest tensor has that any operation makes."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        sizes = [leaf.numel() for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        self.elements = max(self.elements, *sizes, 0)
        return result


@every_loss
def test_no_tensor_holds_the_upsampled_logits(name, monkeypatch):
    logits, target = torch.randn(2, 64, 4, 3, requires_grad=True), torch.randint(0, 64, (2, 32, 32))
    monkeypatch.setattr(region_losses, "_BAND", logits[:, :, 0, 0].numel() * 32)
    with Largest() as largest:
        LOSSES[name]()(logits, target).backward()
    assert largest.elements == logits[:, :, 0, 0].numel() * 32  # a row of all classes


@every_loss
def test_second_derivatives_are_refused(name):
    logits, target = pixels()
    loss = LOSSES[name]()(logits.requires_grad_(), target)
    with pytest.raises(RuntimeError, match="have first derivatives only"):
        torch.autograd.grad(loss, logits, create_graph=True)


@every_loss
def test_perfect_and_opposite_predictions(name):
    target = torch.tensor([[[0, 0], [1, 1]]])
    right = 50.0 * F.one_hot(target, 2).movedim(-1, 1).float()
    assert LOSSES[name]()(right, target) < 1e-6
    assert LOSSES[name]()(-right, target) > 1 - 1e-6
