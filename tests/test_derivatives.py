"""Derivatives of every operator: of any order, forward and reverse, under the transforms of torch.func."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import pytest
import torch
from cases import make
from torch import Tensor
from torch.autograd import forward_ad
from torch.func import grad, hessian, jacfwd, jacrev, jvp, linearize, vjp, vmap

from pspnet_fast import ops, reference

BINS = (1, (2, 3))  # 7 cells
RAW = [1, 1, 2, 3]
CPU, DOUBLE = torch.device("cpu"), torch.float64


class Case(NamedTuple):
    """A function of an operator: (ops or reference) -> function of the inputs, linear in none of them."""

    function: Callable[..., Callable[..., Tensor]]
    shapes: Sequence[tuple[int, ...]]
    forward_only: bool = False  # an operator without a gradient: reverse mode is refused


def pool(module):
    return lambda x: module.pyramid_pool(x.sin(), BINS).cos()


def pool_into(module):
    def function(x: Tensor, before: Tensor) -> Tensor:
        concat = before.sin()
        pooled = module.pyramid_pool(x, BINS, concat=concat, offset=1)
        return pooled.sum().sin() * concat.sin()

    return function


def reduce(module):
    return lambda pooled, *weights: module.pyramid_reduce(pooled, weights, BINS).sin()


def reduce_folded(module):
    def function(pooled: Tensor, first: Tensor, second: Tensor, *norm: Tensor) -> Tensor:
        weight, bias, mean, variance = norm
        level = weight, bias, mean, variance.exp(), 0.1
        return module.pyramid_reduce(pooled, [first, second], BINS, norm=[level, level], relu=True).sin()

    return function


def upsample(module):
    def function(before: Tensor, reduced: Tensor) -> Tensor:
        concat = before.sin()
        return module.pyramid_upsample_concat_(concat, reduced, BINS, offset=1, align_corners=False).sin()

    return function


def pool_and_upsample(first: int):
    """The concatenation's gradient is handed on where the levels stand beside the copy."""

    def of(module):
        def function(x: Tensor, reduced: Tensor) -> Tensor:
            concat = x.new_zeros(x.size(0), 9, *x.shape[2:])
            reduced = reduced + module.pyramid_pool(x.sin(), BINS, concat=concat, offset=2)
            return module.pyramid_upsample_concat_(concat, reduced, BINS, offset=first).sin()

        return function

    return of


def context(module):
    def function(conv: Tensor, taps: Tensor) -> Tensor:
        conv = conv.sin()
        return module.pyramid_context_(conv, taps, BINS, (3, 5), dilation=(2, 1)).sin()

    return function


def context_folded(module):
    def function(conv: Tensor, taps: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, variance: Tensor) -> Tensor:
        norm = weight, bias, mean, variance.exp(), 0.1
        return module.pyramid_context_(conv.sin(), taps, BINS, 3, norm=norm, relu=True).sin()

    return function


def cross_entropy(**options):
    target = torch.randint(0, 4, (2, 7, 9), generator=torch.Generator().manual_seed(1))
    target[0, 0, :3] = 255
    return lambda module: lambda logits: module.upsample_cross_entropy(logits, target[: len(logits)], **options)


def confidence(module):
    return lambda logits: module.upsample_argmax(logits, (5, 6), align_corners=True, return_confidence=True)[1]


def accumulate(module):
    def function(before: Tensor, logits: Tensor) -> Tensor:
        map = before.sin()
        return module.upsample_softmax_accumulate_(map, logits, align_corners=False, top=1, mirrored=True, weight=0.5)

    return function


WEIGHT = torch.tensor([0.5, 1.0, 2.0, 0.0], dtype=DOUBLE)
CASES = {
    "pyramid_pool": Case(pool, [(2, 3, 5, 4)]),
    "pyramid_pool into concat": Case(pool_into, [(2, 3, 5, 4), (2, 5, 5, 4)]),
    "pyramid_reduce": Case(reduce, [(2, 7, 3), (2, 3), (2, 3, 1, 1)]),
    "pyramid_reduce, norm, relu": Case(reduce_folded, [(2, 7, 3), (2, 3), (2, 3), *[(2,)] * 4], forward_only=True),
    "pyramid_upsample_concat_": Case(upsample, [(2, 6, 5, 4), (2, 7, 2)]),
    "pyramid_upsample_concat_ beside the copy": Case(pool_and_upsample(4), [(2, 2, 4, 4), (2, 7, 2)]),
    "pyramid_upsample_concat_ over the copy": Case(pool_and_upsample(3), [(2, 2, 4, 4), (2, 7, 2)]),
    "pyramid_context_": Case(context, [(2, 2, 5, 4), (2, 7, 15, 2)]),
    "pyramid_context_, norm, relu": Case(context_folded, [(2, 2, 5, 4), (2, 7, 9, 2), *[(2,)] * 4], forward_only=True),
    "cross entropy": Case(cross_entropy(), [(2, 4, 3, 4)]),
    "cross entropy, weighted": Case(cross_entropy(weight=WEIGHT, label_smoothing=0.1), [(2, 4, 3, 4)]),
    "cross entropy, none": Case(cross_entropy(reduction="none", align_corners=False), [(2, 4, 3, 4)]),
    "cross entropy, sum": Case(cross_entropy(reduction="sum", label_smoothing=0.2), [(2, 4, 7, 9)]),
    "upsample_argmax, confidence": Case(confidence, [(2, 3, 2, 3)], forward_only=True),
    "upsample_softmax_accumulate_": Case(accumulate, [(2, 3, 5, 4), (2, 3, 2, 3)], forward_only=True),
}
REVERSE = [name for name, case in CASES.items() if not case.forward_only]


def inputs(case: Case, *batch: int) -> list[Tensor]:
    return [torch.randn(*batch, *shape, dtype=DOUBLE) for shape in case.shapes]


def assert_same(run: Callable[[Callable[..., Tensor]], object], case: Case) -> None:
    """run(function) is the same for the operator and its reference, and not trivially so."""
    ours, expected = run(case.function(ops)), run(case.function(reference))
    torch.testing.assert_close(ours, expected, rtol=1e-9, atol=1e-11)
    assert all(bool(t.detach().ne(0).any()) for t in torch.utils._pytree.tree_leaves(ours))


every_operator = pytest.mark.parametrize("name", CASES)
every_differentiable_operator = pytest.mark.parametrize("name", REVERSE)


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


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize("name", ["pyramid_pool into concat", "pyramid_reduce", "pyramid_context_", "cross entropy"])
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


def test_compiled_functions_see_tangents():
    torch.compiler.reset()
    compiled = torch.compile(pool(ops), fullgraph=True, backend="aot_eager")
    x = make((2, 3, 5, 4), "contiguous", DOUBLE, CPU)
    torch.testing.assert_close(compiled(x), pool(reference)(x))
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(x, x.cos())
        for _ in range(2):
            torch.testing.assert_close(
                forward_ad.unpack_dual(compiled(dual)).tangent,
                forward_ad.unpack_dual(pool(reference)(dual)).tangent,
            )


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
    "pyramid_context_": lambda x: (x, few(x, 1, 1).repeat(1, 1, 1, 5), [], 0.0, False, RAW, [1, 1], [1, 1], True),
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


def test_confusion_matrix_under_a_transform_still_tells_bad_values():
    with forward_ad.dual_level(), pytest.raises(RuntimeError, match="7"):
        ops.confusion_matrix(torch.tensor([7]), torch.tensor([0]), 5)


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


raw = torch.ops.pspnet_fast
BACKWARD = {
    "pyramid_pool_backward": lambda g, c: raw.pyramid_pool_backward(g.sin(), c.sin(), 1, RAW, 5, 4, False),
    "pyramid_pool_backward alone": lambda g: raw.pyramid_pool_backward(g.sin(), None, 0, RAW, 5, 4, True),
    "pyramid_reduce_backward": lambda g, p, *w: raw.pyramid_reduce_backward(g, p, w, RAW),
    "pyramid_upsample_concat_backward": lambda c: raw.pyramid_upsample_concat_backward(c.sin(), 1, 2, RAW, False),
    "pyramid_context_backward": lambda c: raw.pyramid_context_backward(c.sin(), RAW, [3, 5], [2, 1], True),
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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_under_autocast_the_dtypes_stay(dtype):
    pooled, weights = torch.randn(2, 7, 8, dtype=dtype), [torch.randn(4, 8, dtype=dtype) for _ in BINS]
    with torch.autocast("cpu", torch.bfloat16):
        value, tangent = jvp(lambda p: ops.pyramid_reduce(p, weights, BINS), (pooled,), (pooled,))
    assert value.dtype == tangent.dtype == dtype
    torch.testing.assert_close(value, tangent)
    torch.testing.assert_close(value, ops.pyramid_reduce(pooled, weights, BINS), rtol=0.02, atol=0.05)


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
