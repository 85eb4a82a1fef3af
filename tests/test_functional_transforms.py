"""Every operator under torch.func: grad, vjp, vmap, jvp, hessian and nestings, eager and compiled."""

import itertools

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
)
from torch import Tensor
from torch.autograd import forward_ad
from torch.func import grad, hessian, jacfwd, jacrev, jvp, linearize, vjp, vmap

from pspnet_fast import ops, reference


@every_differentiable_operator
def test_transforms(name):
    case = CASES[name]
    values = inputs(case)

    def scalar(function):
        return lambda first: function(first, *values[1:]).square().sum()

    assert_same(lambda f: grad(scalar(f))(values[0]), case)
    assert_same(lambda f: vjp(f, *values)[1](f(*values)), case)
    assert_same(lambda f: jacrev(f)(*values), case)
    assert_same(lambda f: jacfwd(f)(*values), case)
    assert_same(lambda f: hessian(scalar(f))(values[0]), case)
    assert_same(lambda f: jvp(grad(scalar(f)), (values[0],), (values[0].cos(),)), case)
    assert_same(lambda f: grad(lambda x: jvp(scalar(f), (x,), (x.cos(),))[1])(values[0]), case)
    assert_same(lambda f: linearize(f, *values)[1](*values), case)
    assert_same(lambda f: torch.autograd.functional.hessian(scalar(f), values[0], vectorize=True), case)


WRITTEN = {"pyramid_pool into concat": 1} | {name: 0 for name in CASES if name.split(",")[0].split(" ")[0][-1] == "_"}


@every_operator
def test_vmap(name):
    """Every input alone in batches, all of them, along any dimension, and nested."""
    case = CASES[name]
    one, many, nested = inputs(case), inputs(case, 3), inputs(case, 2, 3)
    for i in range(len(one)):
        values = [m if i == j else o for j, (o, m) in enumerate(zip(one, many, strict=True))]
        dims = tuple(0 if i == j else None for j in range(len(one)))
        if name in WRITTEN and i != WRITTEN[name]:  # a batch does not fit into one map
            with pytest.raises(RuntimeError, match="vmap: inplace arithmetic"):
                vmap(case.function(ops), dims)(*values)
        else:
            assert_same(lambda f, values=values, dims=dims: vmap(f, dims)(*values), case)
    assert_same(lambda f: vmap(f)(*many), case)
    assert_same(lambda f: vmap(f, 1, -1)(*[t.movedim(0, 1) for t in many]), case)
    assert_same(lambda f: vmap(vmap(f))(*nested), case)
    assert_same(lambda f: jvp(vmap(f), tuple(many), tuple(t.cos() for t in many)), case)
    assert_same(lambda f: vmap(lambda *v: jvp(f, v, tuple(t.cos() for t in v)))(*many), case)
    loop = torch.stack([case.function(ops)(*[t[i] for t in many]) for i in range(3)])
    torch.testing.assert_close(vmap(case.function(ops))(*many), loop, rtol=1e-9, atol=1e-11)


@every_differentiable_operator
def test_gradients_of_a_batch(name):
    """vmap of grad, grad of vmap, and backward with a batch of output gradients."""
    case = CASES[name]
    many = inputs(case, 3)

    def scalar(function):
        return lambda *values: function(*values).square().sum()

    def batched_backward(function):
        leaves = [t[0].clone().requires_grad_() for t in many]
        output = function(*leaves)
        return torch.autograd.grad(output, leaves, output.new_ones(4, *output.shape), is_grads_batched=True)

    every = tuple(range(len(many)))
    assert_same(lambda f: vmap(grad(scalar(f), every))(*many), case)
    assert_same(lambda f: grad(lambda *v: vmap(scalar(f))(*v).sum(), every)(*many), case)
    assert_same(batched_backward, case)


# inductor, half a minute each, has the others in FusedPPM (test_derivatives_modules.py)
@pytest.mark.parametrize(
    ("name", "backend"),
    [
        *((n, "aot_eager") for n in ("pyramid_pool into concat", "pyramid_reduce")),
        *itertools.product(["pyramid_context_", "upsample_cross_entropy"], ["aot_eager", "inductor"]),
    ],
)
def test_compiled_transforms(name, backend):
    torch.compiler.reset()
    case = CASES[name]
    values, many = inputs(case), inputs(case, 3)

    def run(function):
        def transformed(values, many):
            tangents = tuple(t.cos() for t in values)
            first = jvp(function, tuple(values), tangents), vmap(function)(*many)
            if backend == "inductor":  # torch 2.13 compiles the tangent of the gradient of F.interpolate wrongly
                return first, grad(lambda x: function(x, *values[1:]).square().sum())(values[0])
            return first, jvp(grad(lambda x: function(x, *values[1:]).square().sum()), (values[0],), tangents[:1])

        if function is not compiled_function:
            return transformed(values, many)
        return torch.compile(transformed, fullgraph=True, backend=backend)(values, many)

    compiled_function = case.function(ops)
    torch.testing.assert_close(run(compiled_function), run(case.function(reference)), rtol=1e-9, atol=1e-11)


OUTSIDE = torch.zeros(1, 9, 5, 4)
INTO_OUTSIDE = [
    lambda x: ops.pyramid_pool(x, BINS, concat=OUTSIDE),
    lambda x: ops.pyramid_upsample_concat_(OUTSIDE, x.flatten(1)[:, :7, None], BINS, offset=0),
    lambda x: ops.pyramid_context_(OUTSIDE, x.flatten(1)[:, :7, None, None].expand(-1, -1, 9, 9), BINS, 3),
    lambda x: ops.upsample_softmax_accumulate_(OUTSIDE, x[:, [0, 1, 2] * 3], align_corners=True),
]


@pytest.mark.parametrize("call", INTO_OUTSIDE)
def test_a_captured_map_is_not_written_into(call):
    """The transform would not see it: torch refuses it, as for its own operators."""
    x = torch.randn(1, 3, 5, 4)
    with pytest.raises(RuntimeError, match="would mutate a captured Tensor"):
        grad(lambda x: call(x).sum())(x)
    with pytest.raises(RuntimeError, match="would mutate a captured Tensor"):
        jvp(call, (x,), (x,))
    with pytest.raises(RuntimeError, match="vmap: inplace arithmetic"):
        vmap(call)(x[None])
    assert not OUTSIDE.any()


def few(x: Tensor, *ones: int) -> Tensor:
    """(1, 7, 1, ...), not of the memory of x."""
    return x.cos().flatten(1)[:, :7].unflatten(1, (7, *ones))


IN_PLACE = {
    "pyramid_pool": lambda x: (x[:, :3].cos(), x, 1, RAW),
    "pyramid_upsample_concat_": lambda x: (x, few(x, 1), 0, RAW, True),
    "pyramid_context_": lambda x: (x, few(x, 1, 1).repeat(1, 1, 1, 5), [], 0.0, False, RAW, [1, 1], [1, 1], 1, True),
    "upsample_softmax_accumulate_": lambda x: (x, x.cos(), 0, 0, 5, 4, True, False, 1.0),
}


@pytest.mark.parametrize("name", IN_PLACE)
def test_raw_operators_that_write_in_place(name):
    """torch.ops refuses them under torch.func; tangents of forward_ad alone pass."""
    x = torch.randn(1, 5, 5, 4, dtype=DOUBLE)

    def function(x: Tensor) -> Tensor:
        map = x.sin()
        getattr(torch.ops.pspnet_fast, name)(*IN_PLACE[name](map))
        return map

    for transform in (jacfwd, jacrev, vmap):
        with pytest.raises(RuntimeError, match=f"call pspnet_fast.ops.{name}"):
            transform(function)(x if transform is not vmap else x[None])
    with forward_ad.dual_level():
        tangent = forward_ad.unpack_dual(function(forward_ad.make_dual(x, x.cos()))).tangent
    difference = (function(x + 1e-5 * x.cos()) - function(x - 1e-5 * x.cos())) / 2e-5
    torch.testing.assert_close(tangent, difference, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("dims", [(0, 0), (0, None), (None, 0)])
def test_vmap_of_what_has_no_derivative(dims):
    shape = [(3, 2, 8, 9) if d == 0 else (2, 8, 9) for d in dims]
    prediction, target = torch.randint(0, 5, shape[0]), torch.randint(0, 5, shape[1])
    target[..., 0, :] = 255
    counts = vmap(lambda p, t: ops.confusion_matrix(p, t, 5), dims)(prediction, target)
    for i in range(3):
        p, t = (v[i] if d == 0 else v for v, d in zip((prediction, target), dims, strict=True))
        assert torch.equal(counts[i], ops.confusion_matrix(p, t, 5))


def test_classes_under_transforms():
    logits = torch.randn(3, 1, 4, 3, 3)
    classes = ops.upsample_argmax(logits.flatten(0, 1), (7, 5), align_corners=False)
    assert torch.equal(
        vmap(lambda z: ops.upsample_argmax(z, (7, 5), align_corners=False))(logits).flatten(0, 1), classes
    )
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(logits.flatten(0, 1), classes.new_ones(3, 4, 3, 3, dtype=torch.float32))
        assert torch.equal(ops.upsample_argmax(dual, (7, 5), align_corners=False), classes)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_new_concat_under_vmap_makes_a_batch(memory_format):
    maps = torch.randn(3, 2, 4, 5, 6)

    def function(x: Tensor) -> Tensor:
        concat = ops.new_concat(x, 8)
        concat[:] = x.repeat(1, 2, 1, 1)
        return concat

    assert torch.equal(vmap(function)(maps), maps.repeat(1, 1, 2, 1, 1))
    one = torch.randn(2, 4, 5, 6).to(memory_format=memory_format)
    with forward_ad.dual_level():
        assert ops.new_concat(one, 8).is_contiguous(memory_format=memory_format)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_under_autocast_the_dtypes_stay(dtype):
    pooled, weights = torch.randn(2, 7, 8, dtype=dtype), [torch.randn(4, 8, dtype=dtype) for _ in BINS]
    with torch.autocast("cpu", torch.bfloat16):
        value, tangent = jvp(lambda p: ops.pyramid_reduce(p, weights, BINS), (pooled,), (pooled,))
    assert value.dtype == tangent.dtype == dtype
    torch.testing.assert_close(value, tangent)
    torch.testing.assert_close(value, ops.pyramid_reduce(pooled, weights, BINS), rtol=0.02, atol=0.05)
