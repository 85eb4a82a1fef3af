"""Derivatives of every operator: first and second, forward and reverse mode."""

import pytest
import torch
from derivative_cases import (
    BINS,
    CASES,
    DOUBLE,
    RAW,
    assert_same,
    every_differentiable_operator,
    every_operator,
    inputs,
    pool,
)
from torch.autograd import forward_ad
from torch.func import jvp

from pspnet_fast import ops, reference


@every_differentiable_operator
def test_second_derivatives(name):
    case = CASES[name]
    arguments = [t.requires_grad_() for t in inputs(case)]
    assert torch.autograd.gradgradcheck(case.function(ops), arguments, fast_mode=True)


@every_differentiable_operator
def test_derivatives_of_some_inputs(name):
    """Of each input alone, first and second, as the reference has them."""
    case = CASES[name]
    values = inputs(case)
    for i in range(len(values)):

        def run(function, i=i):
            arguments = [t.clone().requires_grad_(i == j) for j, t in enumerate(values)]
            output = function(*arguments)
            (first,) = torch.autograd.grad(output.square().sum(), arguments[i], create_graph=True)
            (second,) = torch.autograd.grad(first.sin().sum(), arguments[i], create_graph=True)
            return first, second, torch.autograd.grad(second.sin().sum(), arguments[i])

        assert_same(run, case)


@every_operator
def test_forward_mode(name):
    case = CASES[name]
    arguments = [t.requires_grad_() for t in inputs(case)]
    options = {"check_forward_ad": True, "check_backward_ad": not case.forward_only, "fast_mode": True}
    if case.forward_only:
        values = [t.detach() for t in arguments]
        ours, theirs = (jvp(case.function(m), tuple(values), tuple(t.cos() for t in values)) for m in (ops, reference))
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)
        assert ours[1].any()
    else:
        assert torch.autograd.gradcheck(
            case.function(ops), arguments, check_batched_grad=True, check_batched_forward_grad=True, **options
        )


@every_operator
def test_dual_tensors(name):
    """Also where one input alone carries a tangent, and with or without gradients."""
    case = CASES[name]
    values = inputs(case)
    for i, enabled in ((i, enabled) for i in range(len(values)) for enabled in (False, True)):

        def run(function, i=i, enabled=enabled):
            with forward_ad.dual_level(), torch.set_grad_enabled(enabled):
                duals = [forward_ad.make_dual(t, t.cos()) if i == j else t for j, t in enumerate(values)]
                primal, tangent = forward_ad.unpack_dual(function(*duals))
                assert tangent is not None
                return primal, tangent

        assert_same(run, case)


@every_differentiable_operator
def test_a_tangent_of_the_output_gradient(name):
    """The operators ran without tangents; backward meets them."""
    case = CASES[name]
    values = [t.requires_grad_() for t in inputs(case)]

    def run(function):
        output = function(*values)
        with forward_ad.dual_level():
            gradient = forward_ad.make_dual(output.detach().cos(), output.detach())
            grads = torch.autograd.grad(output, values, gradient)
            return [forward_ad.unpack_dual(g).tangent for g in grads]

    assert_same(run, case)


def test_compiled_functions_see_tangents():
    torch.compiler.reset()
    compiled = torch.compile(pool(ops), fullgraph=True, backend="aot_eager")
    x = torch.randn(2, 3, 5, 4, dtype=DOUBLE)
    torch.testing.assert_close(compiled(x), pool(reference)(x))
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(x, x.cos())
        for _ in range(2):
            torch.testing.assert_close(
                forward_ad.unpack_dual(compiled(dual)).tangent,
                forward_ad.unpack_dual(pool(reference)(dual)).tangent,
            )


def test_confusion_matrix_under_a_transform_still_tells_bad_values():
    with forward_ad.dual_level(), pytest.raises(IndexError, match="7"):
        ops.confusion_matrix(torch.tensor([7]), torch.tensor([0]), 5)


raw = torch.ops.pspnet_fast
BACKWARD = {
    "pyramid_pool_backward": lambda g, c: raw.pyramid_pool_backward(g.sin(), c.sin(), 1, RAW, 5, 4, False),
    "pyramid_pool_backward alone": lambda g: raw.pyramid_pool_backward(g.sin(), None, 0, RAW, 5, 4, True),
    "pyramid_reduce_backward": lambda g, p, *w: raw.pyramid_reduce_backward(g, p, w, RAW),
    "pyramid_upsample_concat_backward": lambda c: raw.pyramid_upsample_concat_backward(c.sin(), 1, 2, RAW, False),
    "pyramid_context_backward": lambda c: raw.pyramid_context_backward(c.sin(), RAW, [3, 5], [2, 1], 1),
}
BACKWARD_SHAPES = {
    "pyramid_pool_backward": [(2, 7, 3), (2, 5, 5, 4)],
    "pyramid_pool_backward alone": [(2, 7, 3)],
    "pyramid_reduce_backward": [(2, 7, 2), (2, 7, 3), (2, 3), (2, 3)],
    "pyramid_upsample_concat_backward": [(2, 6, 5, 4)],
    "pyramid_context_backward": [(2, 2, 5, 4)],
}


@pytest.mark.parametrize("name", BACKWARD)
def test_backward_operators_called_alone(name):
    """Their plain forms give what the kernels give, and their derivatives."""
    values = [torch.randn(shape, dtype=DOUBLE) for shape in BACKWARD_SHAPES[name]]
    kernel = BACKWARD[name](*values)
    leaves = [t.clone().requires_grad_() for t in values]
    torch.testing.assert_close(BACKWARD[name](*leaves), kernel)
    assert torch.autograd.gradcheck(BACKWARD[name], leaves, check_forward_ad=True, check_batched_grad=True)
    assert torch.autograd.gradgradcheck(BACKWARD[name], leaves, fast_mode=True)


def test_first_derivatives_take_the_kernels():
    """The plain forms are for what the kernels cannot do."""
    x = torch.randn(2, 3, 5, 4, requires_grad=True)
    with torch.profiler.profile() as profile:
        concat = ops.new_concat(x, 9)
        pooled = ops.pyramid_pool(x, BINS, concat=concat)
        reduced = ops.pyramid_reduce(pooled, [torch.ones(3, 3), torch.ones(3, 3)], BINS)
        ops.pyramid_upsample_concat_(concat, reduced, BINS, offset=3).sum().backward()
        ops.upsample_cross_entropy(x, torch.zeros(2, 9, 9, dtype=torch.uint8)).backward()
    names = {event.key for event in profile.key_averages()}
    expected = {"pool", "pool_backward", "reduce", "reduce_backward", "upsample_concat_", "upsample_concat_backward"}
    expected = {f"pspnet_fast::pyramid_{name}" for name in expected} | {"pspnet_fast::new_concat"}
    assert expected | {f"pspnet_fast::upsample_cross_entropy{end}" for end in ("", "_backward")} <= names
    assert not any("upsample_bilinear" in name or "adaptive_avg" in name for name in names)
