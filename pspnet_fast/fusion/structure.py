"""Finds pyramid pooling in a model by its layers, and what it computes by running a copy of it on a small map."""

import copy
import itertools
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor, nn

from ..head import check_bottleneck
from ..modules import Branch, FusedPPM
from ..ops.checks import Bins

Output = Literal["concat", "maps", "head"]  # the concatenation; the list of upsampled maps; what a bottleneck makes
Names = tuple[str, str | None, str | None]  # of a convolution, its norm and its activation, below their module

_NORMS = (nn.modules.batchnorm._NormBase, nn.GroupNorm, nn.LayerNorm)
_NOTHING = nn.Identity()  # one for all: in a forward, the compiler could not make any
_MAP = (2, 9, 7)  # batch, height and width of the map for trial: no bin divides both, no two conventions agree


class NotFusable(Exception):
    """Why a module stays as it is."""


@dataclass(frozen=True)
class Chain:
    """A convolution and what follows it, by their names below a module."""

    names: Names
    rest: tuple[str, ...] = ()

    def modules(self, root: nn.Module) -> Branch:
        """Convolution, norm and activation; nn.Identity where there is none."""
        convolution, *others = (_NOTHING if name is None else child(root, name) for name in self.names)
        return convolution, *others  # type: ignore[return-value]


@dataclass(frozen=True)
class Structure:
    """A pyramid: its branches, and how they are put together (None: not known)."""

    bins: Bins
    branches: tuple[Chain, ...]
    bottleneck: Chain | None = None
    align_corners: bool | None = None
    concat: Literal["input_first", "input_last"] | None = None
    output: Output | None = None

    def ppm(self, root: nn.Module) -> FusedPPM:
        """The fused pyramid on the modules below root, which it shares."""
        branches = [branch.modules(root) for branch in self.branches]
        return FusedPPM.from_branches(branches, self.bins, bool(self.align_corners), self.concat or "input_first")


def child(root: nn.Module, name: str) -> nn.Module:
    """The submodule of a dotted name; "" is root itself."""
    for part in name.split(".") if name else ():
        root = root._modules[part]  # type: ignore[assignment]
    return root


def layers(root: nn.Module, name: str = "") -> Iterator[tuple[str, nn.Module]]:
    """Names and modules without children, in the order of registration; a convolution is one even if parametrized."""
    if isinstance(root, nn.Conv2d) or not root._modules:
        yield name, root
        return
    for part, module in root._modules.items():
        if module is not None:
            yield from layers(module, f"{name}.{part}" if name else part)


def candidates(model: nn.Module) -> list[str]:
    """Names of the innermost modules with a forward of their own and average pooling to more than one size."""
    found: list[str] = []
    for name, module in model.named_modules():
        sizes = {str(layer.output_size) for _, layer in layers(module) if isinstance(layer, nn.AdaptiveAvgPool2d)}
        if len(sizes) > 1 and type(module).forward is not nn.Module.forward:
            found = [other for other in found if other and not name.startswith(other + ".")]
            found.append(name)
    return found


def parse(module: nn.Module, bins: Bins | None = None) -> Structure:
    """The branches below a module, and its bottleneck if it has one.

    Args:
        bins: where the module does not pool by nn.AdaptiveAvgPool2d.

    Raises:
        NotFusable: other layers than these, or hooks on them.
    """
    pools, chains = [], []
    for name, layer in layers(module):
        if isinstance(layer, nn.AdaptiveAvgPool2d):
            pools.append(layer.output_size)
        elif isinstance(layer, nn.Conv2d):
            chains.append([name])
        elif chains:
            chains[-1].append(name)
        elif type(layer) is not nn.Identity:
            raise NotFusable(f"{name} ({type(layer).__name__}) stands before every convolution")
    bins = bins if bins is not None else tuple(pools)  # type: ignore[arg-type]
    if not bins or len(chains) < len(bins):
        raise NotFusable(f"it has {len(bins)} adaptive average poolings and {len(chains)} convolutions")
    branches = tuple(_chain(module, names) for names in chains[: len(bins)])
    if any(branch.rest for branch in branches):
        raise NotFusable(f"a branch has more than a convolution, a norm and an activation: {chains[0]}")
    bottleneck = None
    if rest := list(itertools.chain(*chains[len(bins) :])):
        bottleneck = _chain(module, rest)
    structure = Structure(bins, branches, bottleneck)
    try:
        ppm = structure.ppm(module)
    except (TypeError, ValueError) as error:
        raise NotFusable(str(error)) from None
    inner = [m for name, m in module.named_modules() if name]
    check_hooks(inner)
    if bottleneck is not None:
        _check_convolution(ppm, bottleneck.modules(module)[0])
    return structure


def parse_bottleneck(module: nn.Module, ppm: FusedPPM) -> Chain:
    """Convolution, norm and activation at the start of a module, and the layers after them.

    Raises:
        NotFusable: it does not begin with a convolution that FusedPSPHead takes, or runs its layers otherwise.
    """
    names = [name for name, _ in layers(module)]
    chain = _chain(module, names)
    _check_convolution(ppm, chain.modules(module)[0])
    check_hooks(list(module.modules()))
    containers = [m for m in module.modules() if m._modules and not isinstance(m, nn.Conv2d)]
    if any(type(m).forward is not nn.Sequential.forward for m in containers):
        trial = _random_copy(module)
        x = torch.randn(_MAP[0], ppm.out_channels, *_MAP[1:], dtype=torch.float64)
        if not _equal(trial, lambda x: run([child(trial, name) for name in names], x), x):
            raise NotFusable("it does not run its layers one after another")
    return chain


def _check_convolution(ppm: FusedPPM, convolution: nn.Module) -> None:
    try:
        check_bottleneck(ppm, convolution)  # type: ignore[arg-type]
    except ValueError as error:
        raise NotFusable(str(error)) from None
    if type(convolution).forward is not nn.Conv2d.forward:
        raise NotFusable(f"{convolution} has a forward of its own")


def check_hooks(modules: Sequence[nn.Module]) -> None:
    """Raises NotFusable where a module has hooks: the fused forward does not call it."""
    for module in modules:
        if module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks:
            raise NotFusable(f"{type(module).__name__} inside has hooks, which would no longer run")


def run(modules: Sequence[nn.Module], x: Tensor) -> Tensor:
    """The modules one after another."""
    for module in modules:
        x = module(x)
    return x


def resolve(module: nn.Module, structure: Structure) -> Structure:
    """Fills in what the structure does not say of alignment and order: by what a copy of the module computes.

    The copy has random weights, in float64 on the CPU, so that no two conventions agree by chance.

    Raises:
        NotFusable: it computes nothing that the fused pyramid does, or cannot be run on one map.
    """
    if structure.output is not None and structure.align_corners is not None and structure.concat is not None:
        return structure
    trial = _random_copy(module)
    channels = structure.branches[0].modules(trial)[0].in_channels
    x = torch.randn(_MAP[0], channels, *_MAP[1:], dtype=torch.float64)
    for align_corners, concat, output in itertools.product(
        (True, False) if structure.align_corners is None else (structure.align_corners,),
        ("input_first", "input_last") if structure.concat is None else (structure.concat,),
        ("concat", "maps") if structure.bottleneck is None else ("head",),
    ):
        known = replace(structure, align_corners=align_corners, concat=concat, output=output)  # type: ignore[arg-type]
        if _equal(trial, _expected(trial, known), x):
            return known
    raise NotFusable(
        "its forward is not that of a pyramid: [x, levels] or [levels, x] or the list of levels, by any align_corners"
    )


def _expected(trial: nn.Module, structure: Structure) -> Callable[[Tensor], Tensor | list[Tensor]]:
    ppm = structure.ppm(trial)

    def expected(x: Tensor) -> Tensor | list[Tensor]:
        if structure.output == "maps":
            return list(ppm(x).split([ppm.in_channels, *[ppm.reduction_channels] * len(structure.branches)], 1)[1:])
        if structure.bottleneck is None:
            return ppm(x)
        after = [child(trial, name) for name in structure.bottleneck.rest]
        return run([*structure.bottleneck.modules(trial), *after], ppm(x))

    return expected


def _chain(root: nn.Module, names: Sequence[str]) -> Chain:
    """Splits the layers from a convolution on into convolution, norm, activation and the rest."""
    convolution, *tail = names
    norm = activation = None
    kinds = [child(root, name) for name in tail]
    if tail and (isinstance(kinds[0], _NORMS) or type(kinds[0]) is nn.Identity):
        norm, *tail = tail
        kinds = kinds[1:]
    if tail and (type(kinds[0]).__module__ == nn.modules.activation.__name__ or type(kinds[0]) is nn.Identity):
        activation, *tail = tail
    return Chain((convolution, norm, activation), tuple(tail))


def _random_copy(module: nn.Module) -> nn.Module:
    trial = copy.deepcopy(module).to_empty(device="cpu").double()
    with torch.no_grad():
        for tensor in (*trial.parameters(), *trial.buffers()):
            if not tensor.is_floating_point():
                tensor.zero_()
            elif tensor.dim() > 1:
                tensor.normal_().div_(tensor[0].numel() ** 0.5)
            else:
                tensor.uniform_(0.5, 1.5)
    return trial


def _equal(module: nn.Module, expected: Callable[[Tensor], Tensor | list[Tensor]], x: Tensor) -> bool:
    """Whether a module computes what is expected of it, in evaluation and in training, dropout included."""
    for training in (False, True):
        module.train(training)
        results = []
        for function in (module, expected):
            torch.manual_seed(0)
            try:
                with torch.no_grad(), warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    results.append(function(x.clone()))
            except Exception as error:
                raise NotFusable(f"on one map (N, {x.size(1)}, H, W) it raises {error!r}") from error
        got, wanted = ([r] if isinstance(r, Tensor) else r for r in results)
        if not isinstance(got, (list, tuple)) or isinstance(results[0], Tensor) != isinstance(results[1], Tensor):
            return False
        if len(got) != len(wanted) or not all(
            isinstance(a, Tensor) and a.shape == b.shape and torch.allclose(a, b, rtol=1e-9, atol=1e-9)
            for a, b in zip(got, wanted, strict=True)
        ):
            return False
    return True
