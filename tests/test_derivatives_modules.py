"""Derivatives of the modules against their stock twins: any order, forward and reverse, torch.func."""

import copy
import warnings
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, stack_module_state, vjp, vmap

from pspnet_fast import FusedPPM, UpsampleCrossEntropyLoss, reference
from pspnet_fast.bench.stock import StockPPM

DOUBLE = torch.float64


def randomized(module: nn.Module) -> nn.Module:
    with torch.no_grad():
        for tensor in [*module.parameters(), *module.buffers()]:
            if tensor.is_floating_point():
                tensor.uniform_(0.5, 1.5)
    return module.double()


def biased() -> FusedPPM:
    """From branches whose convolutions have a bias, which evaluation folds into the running mean."""
    branches = [(nn.Conv2d(3, 2, 1), nn.BatchNorm2d(2), nn.Tanh()) for _ in range(2)]
    return FusedPPM.from_branches(branches, (1, (2, 3)), False)


def untracked(channels: int) -> nn.Module:
    """Batch norm without running statistics, which torch.func cannot write."""
    return nn.BatchNorm2d(channels, track_running_stats=False)


PYRAMIDS: dict[str, Callable[[], nn.Module]] = {
    "eval": lambda: FusedPPM(3, 2, (1, (2, 3)), activation=nn.SiLU).eval(),
    "eval, ReLU": lambda: FusedPPM(3, 2, (2, 3), concat="input_last").eval(),
    "eval, bias": lambda: biased().eval(),
    "train": lambda: FusedPPM(3, 2, (2, 3), False, activation=nn.Tanh, norm_layer=untracked),
    "train, ReLU": lambda: FusedPPM(3, 2, (2, 3), norm_layer=untracked),
    "group norm": lambda: FusedPPM(3, 2, (2, 3), norm_layer=lambda r: nn.GroupNorm(1, r), activation=nn.SiLU),
    "no norm": lambda: FusedPPM(3, 2, (1, 4), norm_layer=nn.Identity, activation=nn.Tanh),
}


def pair(name: str) -> tuple[nn.Module, nn.Module]:
    fused = randomized(PYRAMIDS[name]())
    return fused, StockPPM(fused).train(fused.training)


def state(module: nn.Module) -> dict[str, Tensor]:
    return {name: t.detach().clone() for name, t in module.named_parameters()}


def same(ours: object, expected: object) -> None:
    torch.testing.assert_close(ours, expected, rtol=1e-8, atol=1e-10)
    assert any(bool(t.detach().ne(0).any()) for t in torch.utils._pytree.tree_leaves(ours))


every_pyramid = pytest.mark.parametrize("name", PYRAMIDS)


@every_pyramid
def test_forward_mode(name):
    """By the input and by every parameter."""
    modules = pair(name)
    x = torch.randn(2, 3, 5, 4, dtype=DOUBLE)
    for enabled in (True, False):
        with torch.set_grad_enabled(enabled):
            same(*[jvp(module, (x,), (x.cos(),)) for module in modules])
    for key, value in state(modules[0]).items():
        tangents = {key: value.cos()}

        def run(module, tangents=tangents, key=key):
            function = lambda p: functional_call(module, p, (x,))  # noqa: E731
            return jvp(function, ({key: state(module)[key]},), (tangents,))

        same(*map(run, modules))


@every_pyramid
def test_dual_parameters(name):
    """As torch.autograd.forward_ad is used with modules: dual tensors put in place of the parameters."""
    modules = pair(name)
    x = torch.randn(2, 3, 5, 4, dtype=DOUBLE)
    results = []
    for module in modules:
        with forward_ad.dual_level():
            duals = {key: forward_ad.make_dual(value, value.cos()) for key, value in state(module).items()}
            primal, tangent = forward_ad.unpack_dual(functional_call(module, duals, (x,)))
            assert tangent is not None
            results.append((primal, tangent))
    same(*results)


@every_pyramid
def test_second_derivatives(name):
    modules = pair(name)
    x = torch.randn(2, 3, 5, 4, dtype=DOUBLE)

    def penalty(module, third):
        leaf = x.clone().requires_grad_()
        module.zero_grad()
        (first,) = torch.autograd.grad(module(leaf).sin().sum(), leaf, create_graph=True)
        (second,) = torch.autograd.grad(first.square().sum(), leaf, create_graph=third)
        if not third:
            return first, second
        second.square().sum().backward()
        return first, second, leaf.grad, [p.grad for p in module.parameters() if p.grad is not None]

    # third derivatives of F.batch_norm in training take the statistics for constants (torch 2.13) or are refused (2.14)
    same(*[penalty(module, third=not name.startswith("train")) for module in modules])
    if name == "train, ReLU":  # which is an operator of ours

        def first(x: Tensor) -> Tensor:
            return torch.autograd.grad(modules[0](x).sin().sum(), x, create_graph=True)[0]

        assert torch.autograd.gradgradcheck(first, x.clone().requires_grad_(), fast_mode=True)
        return
    if "ReLU" not in name:
        assert torch.autograd.gradgradcheck(modules[0], x.clone().requires_grad_(), fast_mode=True)
        assert torch.autograd.gradcheck(modules[0], x.clone().requires_grad_(), check_forward_ad=True, fast_mode=True)


@every_pyramid
def test_transforms(name):
    modules = pair(name)
    x, parameters = torch.randn(2, 3, 4, 3, dtype=DOUBLE), state(modules[0])

    def scalar(module):
        return lambda p, x: functional_call(module, p, (x,)).sin().sum()

    def per_sample(module):
        return vmap(grad(lambda p, x: scalar(module)(p, x[None])), (None, 0))(parameters, x)

    def batch_norm_in_training(module):
        return any(isinstance(m, nn.BatchNorm2d) and m.training for m in module.modules())

    same(*[grad(scalar(m), (0, 1))(parameters, x) for m in modules])
    same(*[vjp(m, x)[1](torch.ones(2, 7, 4, 3, dtype=DOUBLE)) for m in modules])
    same(*[jacrev(m)(x) for m in modules])
    same(*[jacfwd(m)(x) for m in modules])
    same(*[hessian(lambda x, m=m: scalar(m)(parameters, x))(x) for m in modules])
    same(*[jvp(grad(scalar(m)), (parameters, x), (parameters, x)) for m in modules])
    same(*[torch.autograd.functional.jacobian(m, x, vectorize=True) for m in modules])
    if not batch_norm_in_training(modules[0]) or name.startswith("train"):
        same(*map(per_sample, modules))
        same(*[grad(lambda p, m=m: vmap(lambda x: scalar(m)(p, x[None]))(x).sum())(parameters) for m in modules])


@every_pyramid
def test_ensembles(name):
    """Parameters and buffers in batches, the input in batches or not."""
    fused = [pair(name)[0] for _ in range(3)]
    state = stack_module_state(fused)
    for x, dim in ((torch.randn(2, 3, 5, 4, dtype=DOUBLE), None), (torch.randn(3, 2, 3, 5, 4, dtype=DOUBLE), 0)):
        run = lambda p, b, x: functional_call(fused[0], (p, b), (x,))  # noqa: E731
        expected = torch.stack([m(x if dim is None else x[i]) for i, m in enumerate(fused)])
        same(vmap(run, (0, 0, dim))(*state, x), expected)


def test_a_level_with_one_value_keeps_its_running_statistics():
    fused = randomized(FusedPPM(3, 2, (1, 2), activation=nn.SiLU)).train()
    x, before = torch.randn(1, 3, 5, 4, dtype=DOUBLE), copy.deepcopy(fused.state_dict())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with forward_ad.dual_level():
            value, tangent = forward_ad.unpack_dual(fused(forward_ad.make_dual(x, x.cos())))
        after = copy.deepcopy(fused.state_dict())
        difference = (fused(x + 1e-5 * x.cos()) - fused(x - 1e-5 * x.cos())) / 2e-5
        fused.load_state_dict(before)
        same(value, fused(x))
    torch.testing.assert_close(tangent, difference, rtol=1e-6, atol=1e-8)
    for key, kept in fused.state_dict().items():
        assert torch.equal(after[key], kept), key
    assert torch.equal(after["features.0.2.running_mean"], before["features.0.2.running_mean"])


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled_transforms(backend):
    """Without batch norm, whose tangents torch 2.13 cannot compile, and in one thread, since its inductor cannot
    generate the sum of a vmap's gradients for several: the stock module's neither."""
    torch.compiler.reset()
    fused, stock = pair("no norm")
    x = torch.randn(3, 2, 3, 5, 4, dtype=DOUBLE)

    def transformed(module, x):
        return jvp(module, (x[0],), (x[1],)), vmap(lambda x: module(x))(x), grad(lambda x: module(x).sin().sum())(x[2])

    same(torch.compile(transformed, fullgraph=True, backend=backend)(fused, x), transformed(stock, x))


def mined(logits: Tensor, target: Tensor, loss: UpsampleCrossEntropyLoss) -> Tensor:
    losses = reference.upsample_cross_entropy(
        logits,
        target,
        align_corners=loss.align_corners,
        weight=loss.weight,
        ignore_index=loss.ignore_index,
        label_smoothing=loss.label_smoothing,
        reduction="none" if loss.ohem else loss.reduction,
    )
    return losses if not loss.ohem else losses[loss._hard(losses.detach(), target)].mean()


LOSSES = {
    "mean": lambda: UpsampleCrossEntropyLoss(),
    "sum": lambda: UpsampleCrossEntropyLoss(align_corners=False, reduction="sum", ignore_index=3),
    "none": lambda: UpsampleCrossEntropyLoss(reduction="none", label_smoothing=0.2),
    "weight": lambda: UpsampleCrossEntropyLoss(weight=torch.tensor([0.5, 0.0, 1, 2.0]).double(), label_smoothing=0.1),
    "ohem": lambda: UpsampleCrossEntropyLoss(ohem=True, threshold=0.3, min_kept=20),
    "ohem, weight": lambda: UpsampleCrossEntropyLoss(
        ohem=True, threshold=0.2, min_kept=0, label_smoothing=0.1, weight=torch.tensor([0.5, 1.0, 1, 2.0]).double()
    ),
}


@pytest.mark.parametrize("name", LOSSES)
def test_losses(name):
    loss = LOSSES[name]()
    logits, target = torch.randn(3, 1, 4, 3, 4, dtype=DOUBLE), torch.randint(0, 4, (3, 1, 7, 9))
    target[:, 0, 0, :4] = 255 if loss.ignore_index == 255 else 3

    def scalar(of, target=target[0]):
        return lambda z: of(z, target).sum()

    functions = loss, lambda z, t: mined(z, t, loss)
    same(*[jvp(scalar(f), (logits[0],), (logits[1],)) for f in functions])
    same(*[grad(scalar(f))(logits[0]) for f in functions])
    same(*[hessian(scalar(f))(logits[0]) for f in functions])
    same(*[jvp(grad(scalar(f)), (logits[0],), (logits[1],)) for f in functions])
    same(*[torch.autograd.functional.hessian(scalar(f), logits[0]) for f in functions])
    assert torch.autograd.gradcheck(scalar(loss), logits[0].clone().requires_grad_(), check_forward_ad=True)
    assert torch.autograd.gradgradcheck(scalar(loss), logits[0].clone().requires_grad_())
    batch = vmap(loss)(logits, target), vmap(grad(lambda z, t: loss(z, t).sum()))(logits, target)
    each = [(functions[1](z, t), grad(scalar(functions[1], t))(z)) for z, t in zip(logits, target, strict=True)]
    same(batch, tuple(map(torch.stack, zip(*each, strict=True))))
    torch.compiler.reset()
    compiled = torch.compile(lambda z: jvp(scalar(loss), (z,), (z.cos(),)), fullgraph=True, backend="aot_eager")
    same(compiled(logits[0]), jvp(scalar(functions[1]), (logits[0],), (logits[0].cos(),)))
