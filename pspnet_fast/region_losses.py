"""UpsampleDiceLoss and UpsampleLovaszLoss: losses of regions at full resolution, without full-resolution logits."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .ops.checks import check_map
from .ops.upsample_cross_entropy import check_target, check_values
from .reference import wide

_BAND = 1 << 22  # elements of upsampled logits at once


class _UpsampleRegionLoss(nn.Module):
    """What both losses do with their arguments."""

    def __init__(self, align_corners: bool, ignore_index: int) -> None:
        super().__init__()
        self.align_corners, self.ignore_index = align_corners, ignore_index

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        """The loss of logits (N, K, h, w) against class indices (N, H, W), of an integer type.

        Returns:
            A number in float32 for logits of 16 or 32 bits, else float64.

        Raises:
            TypeError, ValueError: an argument of the wrong type, shape, dtype or device.
            IndexError: on a CPU, a target that is neither a class nor ignore_index; on a GPU the loss is NaN.
        """
        return (_uncompiled if torch.compiler.is_compiling() else _UpsampleRegionLoss._forward)(self, logits, target)

    def _forward(self, logits: Tensor, target: Tensor) -> Tensor:
        target, bad = _checked(logits, target, self.ignore_index)
        values = wide(logits)
        return torch.where(bad, torch.nan, self._loss(values, target)).to(values.dtype)

    def _loss(self, logits: Tensor, target: Tensor) -> Tensor:
        raise NotImplementedError

    def extra_repr(self) -> str:
        """The arguments."""
        return f"align_corners={self.align_corners}, ignore_index={self.ignore_index}"


# as torch.compiler.disable, which would load the compiler, two seconds, with the package
_uncompiled = torch._disable_dynamo(_UpsampleRegionLoss._forward)


class UpsampleDiceLoss(_UpsampleRegionLoss):
    """Soft Dice loss of logits (N, K, h, w), upsampled bilinearly, against targets (N, H, W).

    1 - 2 * sum(p * t) / (sum(p) + sum(t)), the mean over the classes that any target has; without one it is 0. p is the
    softmax of the upsampled logits, t is 1 where the target is the class, and sums are over the pixels of the batch
    that are not ignored. Logits are upsampled in bands of rows, forward and again backward: no tensor of N * K * H * W
    elements is made. First derivatives only, others are refused. After Milletari, Navab and Ahmadi, "V-Net", 3DV 2016
    (`squared`), and Drozdzal et al., "The importance of skip connections in biomedical image segmentation", 2016 (not
    squared, as in segmentation_models_pytorch and MONAI).

    Args:
        align_corners: as in F.interpolate.
        ignore_index: the target of pixels that do not count.
        squared: whether the denominator sums p * p, as V-Net's and mmsegmentation's does.
    """

    def __init__(self, *, align_corners: bool = True, ignore_index: int = 255, squared: bool = False) -> None:
        super().__init__(align_corners, ignore_index)
        self.squared = squared

    def _loss(self, logits: Tensor, target: Tensor) -> Tensor:
        predicted, hit, labelled = _ClassSums.apply(logits, target, self.align_corners, self.squared)
        present = labelled > 0
        dice = 2 * hit / torch.where(present, predicted + labelled, 1)
        return torch.where(present, 1 - dice, 0).sum() / present.sum().clamp(min=1)

    def extra_repr(self) -> str:
        """The arguments."""
        return f"{super().extra_repr()}, squared={self.squared}"


class UpsampleLovaszLoss(_UpsampleRegionLoss):
    """Lovasz-softmax loss of logits (N, K, h, w), upsampled bilinearly, against targets (N, H, W).

    The mean over the classes that any target has of the Lovasz extension of their Jaccard loss, over the pixels of the
    batch that are not ignored; without such a class it is 0. As the published code computes it with classes="present"
    and per_image=False (Berman, Rannen Triki and Blaschko, "The Lovasz-softmax loss", CVPR 2018). It sorts the errors
    of all pixels, class by class, and so holds some numbers a pixel, but no tensor of N * K * H * W elements; the
    gradient is computed with the value. First derivatives only, others are refused. On a GPU it waits once for the
    device, to learn which classes there are: to sort for those alone is most of what can be saved.

    Args:
        align_corners: as in F.interpolate.
        ignore_index: the target of pixels that do not count.
    """

    def __init__(self, *, align_corners: bool = True, ignore_index: int = 255) -> None:
        super().__init__(align_corners, ignore_index)

    def _loss(self, logits: Tensor, target: Tensor) -> Tensor:
        return _LovaszSoftmax.apply(logits, target, self.align_corners)


_NOTHING = -1  # the class of an ignored pixel


def _checked(logits: Tensor, target: Tensor, ignore_index: int) -> tuple[Tensor, Tensor]:
    """The target with _NOTHING where it is ignored or, on a GPU, no class; and whether that occurs."""
    check_map("logits", logits)
    check_target(target, logits)
    if target.device.type == "cpu":
        check_values(target, logits.size(1), ignore_index)
    target, ignored = target.long(), target == ignore_index
    bad = ((target < 0) | (target >= logits.size(1))) & ~ignored
    return torch.where(ignored | bad, _NOTHING, target), bad.any()


def _refuse_to_be_recorded() -> None:
    """In a backward pass: its own derivative would be wrong, silently where the gradient is a constant to autograd."""
    if torch.is_grad_enabled():
        raise RuntimeError("UpsampleDiceLoss and UpsampleLovaszLoss have first derivatives only: no create_graph=True")


class _Band:
    """Some rows of an upsampled map: its rows [top, bottom), and which rows of the logits lie around them."""

    def __init__(self, top: int, low: Tensor, high: Tensor, share: Tensor, width: int, align_corners: bool) -> None:
        self.rows = slice(top, top + len(low))
        self.around = slice(int(low[0]), int(high[-1]) + 1)
        self._low, self._high = low - low[0], high - low[0]
        self._share, self._width, self._align_corners = share[:, None], width, align_corners

    def upsample(self, part: Tensor) -> Tensor:
        """(N, K, rows around, w) -> (N, K, rows, W)."""
        low, high, share = (value.to(part.device) for value in (self._low, self._high, self._share.to(part.dtype)))
        rows = part.index_select(2, low).lerp(part.index_select(2, high), share)
        return F.interpolate(rows, (len(low), self._width), mode="bilinear", align_corners=self._align_corners)


def _bands(logits: Tensor, size: Sequence[int], align_corners: bool) -> Iterator[_Band]:
    """All rows of logits (N, K, h, w) upsampled to (H, W), some at a time."""
    (n, k, h, _), (height, width) = logits.shape, size
    y = torch.arange(height, dtype=torch.float64)
    source = y * ((h - 1) / max(height - 1, 1)) if align_corners else ((y + 0.5) * (h / height) - 0.5).clamp(min=0)
    low = source.long().clamp(max=h - 1)
    high = (low + 1).clamp(max=h - 1)
    rows = max(_BAND // (n * k * width), 1)
    for top in range(0, height, rows):
        band = slice(top, top + rows)
        yield _Band(top, low[band], high[band], (source - low)[band], width, align_corners)


class _ClassSums(torch.autograd.Function):
    """(3, K) float64: sums over the pixels of each class's probability, of that at its own pixels, and of these."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, target: Tensor, align_corners: bool, squared: bool) -> Tensor:
        ctx.save_for_backward(logits, target)
        ctx.settings = align_corners, squared
        sums = logits.new_zeros(3, logits.size(1), dtype=torch.float64)
        for band in _bands(logits, target.shape[1:], align_corners):
            sums += _ClassSums._of(band.upsample(logits[:, :, band.around]), target[:, band.rows], squared)
        return sums

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        _refuse_to_be_recorded()
        logits, target = ctx.saved_tensors
        align_corners, squared = ctx.settings
        result = torch.zeros_like(logits)
        for band in _bands(logits, target.shape[1:], align_corners):
            part = logits[:, :, band.around].detach().requires_grad_()
            with torch.enable_grad():
                sums = _ClassSums._of(band.upsample(part), target[:, band.rows], squared)
            result[:, :, band.around] += torch.autograd.grad(sums, part, grad.to(sums.dtype))[0]
        return result, None, None, None

    @staticmethod
    def _of(logits: Tensor, target: Tensor, squared: bool) -> Tensor:
        probabilities = torch.where(target[:, None] == _NOTHING, 0, logits.softmax(1))
        own = target[:, None] == torch.arange(logits.size(1), device=target.device)[:, None, None]
        summed = probabilities.square() if squared else probabilities
        terms = summed, torch.where(own, probabilities, 0), own.to(summed.dtype)
        return torch.stack([values.sum((0, 2, 3)) for values in terms])


class _LovaszSoftmax(torch.autograd.Function):
    """The loss, and its gradient as soon as it is known that one is needed: errors are sorted once."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, target: Tensor, align_corners: bool) -> Tensor:
        size, needs_grad = target.shape[1:], ctx.needs_input_grad[0]
        pixels = torch.bincount(target.flatten() + 1, minlength=logits.size(1) + 1)[1:].tolist()
        present = [k for k, count in enumerate(pixels) if count > 0]
        lse = logits.new_empty(target.shape)
        for band in _bands(logits, size, align_corners):
            lse[:, band.rows] = band.upsample(logits[:, :, band.around]).logsumexp(1)
        loss = logits.new_zeros((), dtype=torch.float64)
        grad = torch.zeros_like(logits)
        common = torch.zeros_like(lse)  # what the gradients of a pixel's logits have in common: over its probability
        for k in present:
            part = logits[:, k : k + 1].detach().requires_grad_()
            with torch.enable_grad():
                upsampled = F.interpolate(part, size, mode="bilinear", align_corners=align_corners)
            probability = (upsampled.detach()[:, 0] - lse).exp_()
            value, slope = _lovasz_of_class(probability, target, k, pixels[k])
            loss += value
            if needs_grad:
                slope *= probability
                common += slope
                grad[:, k : k + 1] = torch.autograd.grad(upsampled, part, slope[:, None])[0]
        for band in _bands(logits, size, align_corners) if needs_grad and present else ():
            part = logits[:, :, band.around].detach().requires_grad_()
            with torch.enable_grad():
                upsampled = band.upsample(part)
            probabilities = (upsampled.detach() - lse[:, None, band.rows]).exp_()
            probabilities *= common[:, None, band.rows]
            grad[:, :, band.around] -= torch.autograd.grad(upsampled, part, probabilities)[0]
        count = max(len(present), 1)
        ctx.save_for_backward(grad / count if needs_grad else None)
        return (loss / count).to(logits.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        _refuse_to_be_recorded()
        (of_logits,) = ctx.saved_tensors
        return grad * of_logits, None, None


def _lovasz_of_class(probability: Tensor, target: Tensor, k: int, count: int) -> tuple[Tensor, Tensor]:
    """The loss of a class that has `count` pixels, and its derivatives by the class's probabilities (N, H, W)."""
    own = target == k
    errors = torch.where(own, 1 - probability, probability).masked_fill_(target == _NOTHING, -1)  # these come last
    errors, order = errors.flatten().sort(descending=True, stable=True)
    hit = own.flatten()[order]
    hits = hit.cumsum(0)  # whole numbers
    # With every pixel taken for wrong the Jaccard loss grows: one of the class leaves the intersection, another joins
    # the union. These are the differences of the published code, without its cancellation. Ignored pixels, which come
    # once no pixel of the class is left, add nothing.
    union = (torch.arange(count + 1, count + 1 + len(hits), device=hits.device) - hits).to(errors.dtype)
    growth = torch.where(hit, 1 / union, (count - hits) / (union * (union - 1)))
    value = (errors.clamp_(min=0) * growth).sum(dtype=torch.float64)
    slope = torch.empty_like(growth)
    slope[order] = torch.where(hit, -growth, growth)
    return value, slope.view(target.shape)
