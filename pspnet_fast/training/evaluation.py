"""Scores of a model on batches of labelled images, and the device they are made on."""

from collections.abc import Iterable

import torch
from torch import nn
from tqdm import tqdm

from pspnet_fast import ops
from pspnet_fast.inference.predict import predict_labels
from pspnet_fast.training.loading import Item
from pspnet_fast.training.metrics import Metrics


def choose_device(name: str, local_rank: int = 0) -> torch.device:
    """Device of a configuration: "auto" is CUDA where there is a GPU, else the CPU; CUDA is that GPU of the process.

    Raises:
        ValueError: no such device here.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and local_rank:
        name = f"cuda:{local_rank}"
    try:
        torch.empty(0, device=name)
        return torch.device(name)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device {name!r} cannot be used here: {str(error).splitlines()[0]}") from None


@torch.inference_mode()
def evaluate(
    model: nn.Module,
    loader: Iterable[Item],
    num_classes: int,
    device: torch.device | str = "cpu",
    *,
    bf16: bool = False,
    fp16: bool = False,
    channels_last: bool = False,
    progress: bool = True,
) -> Metrics:
    """Score ``model`` on every batch of ``loader``; predictions are made at the size of the images.

    Args:
        model: on ``device``; put into evaluation mode for the time of the call.
        loader: batches of (images (N, 3, H, W) float32, labels (N, H, W) int64, 255 ignored).
        num_classes: K.
        bf16, fp16: run the model under bfloat16 or float16 autocast.
        channels_last: bring the images to that layout.
        progress: whether to show a progress bar where stderr is a terminal.
    """
    device = torch.device(device)
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    dtype = next((parameter.dtype for parameter in model.parameters()), torch.float32)
    confusion = torch.zeros(num_classes, num_classes, dtype=torch.int64, device=device)
    was_training = model.training
    model.eval()
    hidden = None if progress else True
    for images, labels in tqdm(loader, desc="validation", unit="batch", leave=False, disable=hidden):
        images = images.to(device, dtype, non_blocking=True, memory_format=memory_format)
        with torch.autocast(device.type, torch.float16 if fp16 else torch.bfloat16, enabled=bf16 or fp16):
            predictions = predict_labels(model, images)
        ops.confusion_matrix(predictions, labels.to(device, non_blocking=True), num_classes, out=confusion)
    model.train(was_training)
    return Metrics(confusion.cpu())
