"""Backbones and the PSPNet."""

from pspnet_fast.models.pretrained import load_backbone
from pspnet_fast.models.pspnet import PSPNet
from pspnet_fast.models.resnet import ResNet, resnet

__all__ = ["PSPNet", "ResNet", "load_backbone", "resnet"]
