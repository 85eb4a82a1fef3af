"""What a source's names mean: the table that each module of a source fills."""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from pspnet_fast.convert.backbone import own_name, recognise_stem, strip_prefixes

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


@dataclass(frozen=True)
class Source:
    """How another package names and builds a PSPNet, or a ResNet.

    Attributes:
        name: of ``--from``.
        title: of the package.
        marks: patterns; a file is the source's if for each of them some entry's name begins with it.
        head: pattern of a layer's name -> its name in :class:`pspnet_fast.PSPNet`.
        unused: patterns of entries of no use to a PSPNet, and why.
        conventions: arguments of PSPNet that names and shapes do not tell.
        mean, std: per channel, of RGB images in 0..1.
        respell: a name -> the name by which the tables here know it.
        reversed_levels: whether the levels are concatenated in the opposite order of the bins.
        dilates_second: whether the second convolution of a BasicBlock is dilated, as it is in our ResNet.
    """

    name: str
    title: str
    marks: tuple[str, ...]
    head: Mapping[str, str] = field(default_factory=dict)
    unused: Mapping[str, str] = field(default_factory=dict)
    conventions: Mapping[str, Any] = field(default_factory=dict)
    mean: tuple[float, ...] = IMAGENET[0]
    std: tuple[float, ...] = IMAGENET[1]
    respell: Callable[[str], str] = str
    reversed_levels: bool = False
    dilates_second: bool = True

    def has(self, names: Mapping[str, Any]) -> bool:
        """Whether these are a file's names, wrappers such as ``module.`` taken off."""
        return bool(self.marks) and all(any(re.match(mark, name) for name in names) for mark in self.marks)

    def rename(self, weights: Mapping[str, Tensor], path: object) -> "Renamed":
        """Sort a file's entries into those of a PSPNet and the rest.

        Raises:
            ValueError: it has no ResNet with names that are known.
        """
        renamed, rest = Renamed(), dict[str, str]()
        for name in weights:
            respelled = self.respell(name)
            if own := self._head_name(respelled):
                renamed.names[own] = name
            else:
                rest[respelled] = name
        stripped = strip_prefixes({respelled: weights[name] for respelled, name in rest.items()}, path)
        _, stem = recognise_stem(stripped, path)
        for plain, name in zip(stripped, rest.values(), strict=True):
            if own := own_name(plain, stem):
                renamed.names[own] = name
            elif reason := next((why for pattern, why in self.unused.items() if re.match(pattern, name)), None):
                renamed.dropped[name] = reason
            else:
                renamed.unknown.append(name)
        renamed.weights = {own: weights[name] for own, name in renamed.names.items()}
        return renamed

    def _head_name(self, name: str) -> str | None:
        layer, _, tensor = name.rpartition(".")
        for pattern, own in self.head.items():
            if found := re.fullmatch(pattern, layer):
                return f"{found.expand(own)}.{tensor}"
        return None


@dataclass
class Renamed:
    """Entries of a file under the names of a PSPNet.

    Attributes:
        weights: our name -> tensor.
        names: our name -> the file's.
        dropped: the file's name -> why a PSPNet has no use for it.
        unknown: names of entries of which nothing is known.
    """

    weights: dict[str, Tensor] = field(default_factory=dict)
    names: dict[str, str] = field(default_factory=dict)
    dropped: dict[str, str] = field(default_factory=dict)
    unknown: list[str] = field(default_factory=list)


def unwrap(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Names without what DataParallel, torch.compile and trainers put before a model's.

    Raises:
        ValueError: two entries would have one name.
    """
    names = list(weights)
    for prefix in ("_orig_mod.", "module.", "model.") * 2:
        names = [name.removeprefix(prefix) for name in names]
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"two entries are {twice} but for what stands before it: give a file of one model")
    return dict(zip(names, weights.values(), strict=True))
