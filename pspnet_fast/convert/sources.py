"""The sources that are known, and whose a file is."""

from collections.abc import Mapping

from torch import Tensor

from pspnet_fast.convert import encoding, mmseg, paddleseg, semseg, smp, timm, torchvision
from pspnet_fast.convert.source import Source

# in the order in which a file is tried: torchvision's marks are the weakest
_ALL = (
    paddleseg.SOURCE,
    smp.SOURCE,
    mmseg.SOURCE,
    encoding.ENCODING,
    encoding.TRAMAC,
    semseg.SOURCE,
    torchvision.SOURCE,
    timm.SOURCE,
)
SOURCES: dict[str, Source] = {source.name: source for source in _ALL}


def recognise(weights: Mapping[str, Tensor], path: object) -> Source:
    """The source whose names these are. torchvision and timm name a ResNet with one 7x7 alike: torchvision then.

    Raises:
        ValueError: nobody's that are known.
    """
    for source in _ALL:
        if source.has(weights):
            return source
    first = ", ".join(list(weights)[:3])
    raise ValueError(
        f"{path}: its {len(weights)} entries have names of no source that is known ({first}, ...); known are "
        f"a PSPNet or ResNet of {', '.join(SOURCES)}"
    )
