"""A model as a graph for inference: exported, with everything that no input changes computed once."""

import operator
import warnings
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export import ExportedProgram

from pspnet_fast import ops

from .any_size import AnySize
from .winograd import rewrite_convolutions

_aten: Any = torch.ops.aten
_NORM = _aten._native_batch_norm_legit_no_training.default
_VIEWS = {_aten.view.default, _aten._unsafe_view.default}
_COPIES = {_aten.clone.default, _aten.detach.default, _aten.dropout.default, _aten.feature_dropout.default}


def graph_of(
    model: nn.Module,
    args: tuple[Tensor, ...],
    dynamic_shapes: Any = None,
    *,
    portable: bool = True,
    winograd: bool = False,
    any_size: bool = False,
) -> ExportedProgram:
    """A program of a model in evaluation, without operators of ours if `portable`.

    What depends on weights and fixed sizes alone is computed: parts of weights, matrices of sizes, folded batch norms.
    With `portable`, large 3x3 convolutions may become products with matrices (winograd.py), and pyramids of any size
    operators that only ONNX has (any_size.py).
    """
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of torch.export about torch
        mode = AnySize if any_size else ops.portable.Portable
        with mode() if portable else nullcontext():
            program = torch.export.export(model, args, dynamic_shapes=dynamic_shapes, strict=False)
        if not portable:
            return program
        module: Any = program.run_decompositions({}).module(check_guards=False)
        fold_constants(module)
        if fold_norms(module):
            fold_constants(module)
        if winograd:
            rewrite_convolutions(module)
        return torch.export.export(module, args, dynamic_shapes=dynamic_shapes, strict=False)


def fold_constants(module: Any) -> None:
    """Computes every node that depends on no input, once, in place."""
    graph = module.graph
    values: dict[fx.Node, Any] = {}
    uses: list[fx.Node] = []
    for node in graph.nodes:
        if node.op == "get_attr":
            values[node] = operator.attrgetter(node.target)(module)
        elif node.op == "call_function" and node.target is _aten._assert_tensor_metadata.default:
            continue
        elif node.op == "call_function" and all(n in values for n in node.all_input_nodes):
            args, kwargs = fx.node.map_arg((node.args, node.kwargs), values.__getitem__)
            values[node] = node.target(*args, **kwargs)
        else:
            uses += [n for n in node.all_input_nodes if n in values]
    for number, node in enumerate(n for n in dict.fromkeys(uses) if n.op != "get_attr"):
        name, value = f"_constant{number}", values[node]
        while hasattr(module, name):
            name += "_"
        if isinstance(value, Tensor):
            module.register_buffer(name, value.detach().contiguous())
            with graph.inserting_before(node):
                node.replace_all_uses_with(graph.get_attr(name))
    _clean(module)


def _clean(module: Any) -> None:
    for node in module.graph.nodes:
        if node.target is _aten._assert_tensor_metadata.default:
            module.graph.erase_node(node)
        elif node.target in _COPIES and not (node.args[2:] and node.args[2]):
            node.replace_all_uses_with(node.args[0])
        elif node.target is _aten.split_with_sizes.default and (parts := _joined(node)):
            for user in node.users:
                user.replace_all_uses_with(parts[user.args[1]])
        elif node.target in _VIEWS:  # which asks for no layout, as a copy before it made
            node.target = _aten.reshape.default
        elif node.target is _aten.copy.default:
            node.replace_all_uses_with(node.args[1])
    module.graph.eliminate_dead_code()
    module.delete_all_unused_submodules()
    module.recompile()


def _joined(split: Any) -> list[fx.Node]:
    """The parts of a concatenation that is split into just these again; none where it is not."""
    cat, sizes, *dim = split.args
    if cat.target is not _aten.cat.default or (*cat.args[1:], *dim) not in ((1, 1), ()):
        return []
    parts = cat.args[0]
    axis = dim[0] if dim else 0
    return parts if [part.meta["val"].size(axis) for part in parts] == sizes else []


def fold_norms(module: Any) -> int:
    """Puts every batch norm that follows a convolution into its weight and bias; how many."""
    graph, count = module.graph, 0

    def tensor(node: Any) -> Any:
        return operator.attrgetter(str(node.target))(module) if isinstance(node, fx.Node) else node

    for norm in list(graph.nodes):
        if norm.target is not _NORM:
            continue
        conv = norm.args[0]
        constants = [*conv.args[1:3], *norm.args[1:5]]
        if conv.target is not _aten.conv2d.default or len(conv.users) > 1:
            continue
        if any(isinstance(c, fx.Node) and c.op != "get_attr" for c in constants):
            continue
        weight, bias = tensor(conv.args[1]), tensor(conv.args[2]) if len(conv.args) > 2 else None
        gamma, beta, mean, var = (tensor(n) for n in norm.args[1:5])
        scale = (var.double() + norm.args[6]).rsqrt() * (1 if gamma is None else gamma.double())
        shift = (-mean.double() if bias is None else bias.double() - mean.double()) * scale
        shift = shift if beta is None else shift + beta.double()
        count += 1
        names = f"_folded_weight{count}", f"_folded_bias{count}"
        module.register_buffer(names[0], (weight.double() * scale.view(-1, 1, 1, 1)).to(weight.dtype))
        module.register_buffer(names[1], shift.to(weight.dtype))
        with graph.inserting_before(conv):
            new = [graph.get_attr(name) for name in names]
        conv.args = (conv.args[0], *new, *conv.args[3:])
        for result in list(norm.users):
            result.replace_all_uses_with(conv)
            graph.erase_node(result)
        graph.erase_node(norm)
    _clean(module)
    return count
