"""Each module of the package, and a fused model, with the same of plain torch layers: (stock, ours)."""

import copy
from typing import Literal

import torch
from foreign import PPM
from fused_pair import Head
from stock_head import StockHead, make_head
from torch import Tensor, nn
from toy_backbone import ToyBackbone

from pspnet_fast import PSPNet, fuse
from pspnet_fast.bench.stock import StockPPM

Pair = tuple[nn.Module, nn.Module]


def ppm() -> Pair:
    module = make_head(activation=nn.SiLU).ppm
    return StockPPM(module), module


def head() -> Pair:
    module = make_head(activation=nn.SiLU)
    return StockHead(module), module


class Logits(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x.repeat(1, 3, 4, 4)[:, :3])["out"]


def pspnet(head: Literal["fused", "concat"] = "fused") -> Pair:
    model = PSPNet(3, ToyBackbone(), dropout=0.0, aux=False, head=head)
    stock = copy.deepcopy(model)
    stock.ppm = StockPPM(model.ppm)
    return Logits(stock), Logits(model)


def pspnet_concat() -> Pair:
    return pspnet("concat")


def fused() -> Pair:
    model = Head(PPM(8, 2))
    return model, fuse(copy.deepcopy(model))


def x(n: int = 3, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(n, 8, 11, 9, dtype=dtype, generator=torch.Generator().manual_seed(0))
