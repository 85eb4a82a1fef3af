"""One iteration of training: forward and backward of each part of a batch, then the optimiser."""

import contextlib
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from pspnet_fast.data import IGNORE_INDEX
from pspnet_fast.training.config_train import TrainConfig
from pspnet_fast.training.distributed import World
from pspnet_fast.training.loading import Item
from pspnet_fast.training.optimizer import RegionLoss, backbone_norms, make_loss, make_optimizer, pspnet_loss
from pspnet_fast.training.times import Times


class Step:
    """The model with all that an iteration changes.

    Attributes:
        model: as it was given, on the device.
        average: its averaged weights, if there are any.
        optimizer, scaler: whose states a checkpoint holds.
    """

    def __init__(self, model: nn.Module, config: TrainConfig, device: torch.device, world: World) -> None:
        self._config, self._device, self._world = config, device, world
        self._memory_format = torch.channels_last if config.channels_last else torch.contiguous_format
        self.model = model.to(device=device, memory_format=self._memory_format)  # type: ignore[call-overload]
        self._frozen = backbone_norms(model) if config.frozen_norms else []
        for norm in self._frozen:
            norm.requires_grad_(False)
        if config.recompute:
            if not hasattr(model, "recompute"):
                raise ValueError("train.recompute needs a PSPNet, or a model with an attribute recompute")
            model.recompute = True  # type: ignore[assignment]
        parameters = next(model.parameters())
        self._dtype = parameters.dtype
        self._criterion = make_loss(config, bool(model.align_corners)).to(device)
        self._regions = RegionLoss(config, bool(model.align_corners)) if max(config.dice, config.lovasz) > 0 else None
        self._class_weights: Tensor | None = self._criterion.get_buffer("weight") if config.class_weights else None
        self.optimizer = make_optimizer(model, config)
        self.scaler = torch.amp.GradScaler(device.type, enabled=config.fp16)
        self.average: AveragedModel | None = None
        if config.ema is not None:
            self.average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(config.ema), use_buffers=True)
        self._distributed: nn.parallel.DistributedDataParallel | None = None
        if world.size > 1:
            devices = [device.index] if device.type == "cuda" else None
            self._distributed = nn.parallel.DistributedDataParallel(model, device_ids=devices)
        network = self._distributed or model
        self._network = torch.compile(network) if config.compile else network

    def train(self) -> None:
        """Set training mode."""
        self.model.train()
        for norm in self._frozen:
            norm.eval()

    def __call__(self, parts: Sequence[Item], times: Times) -> Tensor:
        """Train on one batch, this process's share of it, in parts.

        The loss is the mean over the labelled pixels of all parts and processes; but with ``ohem`` the mean of the
        parts' means, and so are the Dice and Lovasz losses, which are no sums over pixels. But for Lovasz nothing waits
        for the device.

        Returns:
            (2,) float64 on the device: the share of this process in the loss, and 1 if any pixel has a label.
        """
        config = self._config
        batches = [
            (
                images.to(self._device, self._dtype, non_blocking=True, memory_format=self._memory_format),
                labels.to(self._device, non_blocking=True),
            )
            for images, labels in parts
        ]
        count = self._world.sum(torch.stack([self._count(labels) for _, labels in batches]).sum(0))
        divisor = torch.where(count > 0, count, 1)[0]
        labelled = count[1] > 0
        shares = len(parts) * self._world.size
        if config.ohem:
            divisor = torch.full_like(divisor, shares)
        self.optimizer.zero_grad(set_to_none=True)
        total = torch.zeros((), dtype=torch.float64, device=self._device)
        for place, (images, labels) in enumerate(batches, 1):
            with self._reducing(place == len(batches)):
                with torch.autocast(self._device.type, self._autocast_dtype, enabled=config.bf16 or config.fp16):
                    outputs = self._network(images)
                loss = self._loss(outputs, labels, divisor, shares)
                times.mark("forward")
                # DistributedDataParallel averages the gradients of the processes, whose sum is meant
                self.scaler.scale(self._world.size * loss).backward()
                times.mark("backward")
            total += loss.detach()
        if config.clip_norm is not None:
            self.scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(self.model.parameters(), config.clip_norm)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        if self.average is not None:
            self.average.update_parameters(self.model)
        times.mark("optimizer")
        return torch.stack((total, labelled.double()))

    @property
    def validated(self) -> nn.Module:
        """The model to use: with the averaged weights, if there are any."""
        return self.model if self.average is None else self.average.module

    @property
    def _autocast_dtype(self) -> torch.dtype:
        return torch.float16 if self._config.fp16 else torch.bfloat16

    def _loss(self, outputs: Mapping[str, Tensor], labels: Tensor, divisor: Tensor, shares: int) -> Tensor:
        """The share of a part in the loss: of its sum over all pixels, and of as many means as there are parts."""
        config, terms = self._config, []
        if config.cross_entropy > 0:
            loss = pspnet_loss(self._criterion, outputs, labels, config.aux_weight)
            terms.append(config.cross_entropy * loss / divisor.to(loss.dtype))
        if self._regions is not None:
            terms.append(pspnet_loss(self._regions, outputs, labels, config.aux_weight) / shares)
        return torch.stack(terms).sum()

    def _count(self, labels: Tensor) -> Tensor:
        """(2,): what the sum of the losses of these labels is divided by, and how many pixels have one."""
        valid = labels != IGNORE_INDEX
        number = valid.sum().double()
        if self._config.average_ignored:
            return torch.stack((valid.new_full((), valid.numel(), dtype=torch.float64), number))
        weight = self._class_weights
        if weight is None or self._config.ohem:
            return torch.stack((number, number))
        classes = torch.where(valid, labels, 0).clamp(0, len(weight) - 1)  # a bad label is the loss's to find
        return torch.stack((torch.where(valid, weight[classes].double(), 0).sum(), number))

    def _reducing(self, last: bool) -> contextlib.AbstractContextManager[None]:
        """The processes add up their gradients once, with the last part."""
        if self._distributed is None or last:
            return contextlib.nullcontext()
        return self._distributed.no_sync()
