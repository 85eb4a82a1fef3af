"""The head on an existing pyramid and convolution."""

from torch import Tensor, nn
from torch.nn.functional import conv2d

from ..modules import FusedPPM


class FusedPSPHead(nn.Module):
    """activation(norm(convolution(pyramid(x)))), with the concatenation."""

    def __init__(
        self, ppm: FusedPPM, conv: nn.Conv2d, norm: nn.Module | None = None, activation: nn.Module | None = None
    ) -> None:
        super().__init__()
        self.ppm, self.conv = ppm, conv
        self.norm, self.activation = norm or nn.Identity(), activation or nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, O, H, W)."""
        c = self.conv
        y = conv2d(self.ppm(x), c.weight, c.bias, c.stride, c.padding, c.dilation, c.groups)
        return self.activation(self.norm(y))
