"""Whatever people do to a fused model, and around it, it computes what the model alone would."""

import copy
import io
import threading
from collections.abc import Callable
from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
import torch.nn.utils.prune
from foreign import PPM, ConvModule, assert_same
from fused_pair import Head, check, pair, x
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from pspnet_fast import fuse, unfuse

pytestmark = pytest.mark.usefixtures("small_maps_as_large_ones")


# ---- what is done to the model after fuse ------------------------------------------------------------------------


class WeightStandardised(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        return F.conv2d(x, weight, self.bias, self.stride, self.padding)


class ShiftedNorm(nn.BatchNorm2d):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * 0.5 + 0.1


def replace(parent: str, index: int | str, make: Callable[[], nn.Module]) -> Callable[[nn.Module], None]:
    def change(model: nn.Module) -> None:
        torch.manual_seed(2)
        setattr(model.get_submodule(parent), str(index), make().double())

    return change


AFTER = {
    "convolution of its own": replace("cls", 0, lambda: WeightStandardised(16, 6, 3, padding=1)),
    "norm of its own": replace("cls", 1, lambda: ShiftedNorm(6)),
    "norm of a level": replace("ppm.features.1", 2, lambda: ShiftedNorm(2)),
    "other bins": replace("ppm.features.1", 0, lambda: nn.AdaptiveAvgPool2d(4)),
    "wider level": lambda m: (
        replace("ppm.features.1", 1, lambda: nn.Conv2d(8, 3, 1))(m),
        replace("ppm.features.1", 2, lambda: nn.Identity())(m),
        replace("cls", 0, lambda: nn.Conv2d(17, 6, 3, padding=1))(m),
    ),
    "classifier": replace("cls", 3, lambda: nn.Conv2d(6, 9, 1)),
    "whole head": replace("", "cls", lambda: nn.Sequential(nn.Conv2d(16, 7, 1))),
    "layer put in": lambda m: m.cls.insert(1, nn.Hardtanh()),
    "layer appended": lambda m: m.cls.append(nn.Hardtanh()),
    "layer appended to a level": lambda m: m.ppm.features[0].append(nn.Hardtanh(-0.1, 0.1)),
    "hook on the pyramid": lambda m: m.ppm.register_forward_hook(lambda m, i, o: o * 2),
    "hook on the bottleneck": lambda m: m.cls[0].register_forward_hook(lambda m, i, o: o * 2),
    "pre-hook on the bottleneck": lambda m: m.cls[0].register_forward_pre_hook(lambda m, i: (i[0] + 1,)),
    "hook on a level": lambda m: m.ppm.features[1][1].register_forward_hook(lambda m, i, o: o * 2),
    "backward hook": lambda m: m.cls[0].register_full_backward_hook(lambda m, gi, go: (gi[0] * 2,)),
    "forward on the instance": lambda m: setattr(m.ppm, "forward", lambda x: PPM.forward(m.ppm, x) * 2),
    "frozen": lambda m: [p.requires_grad_(False) for p in m.ppm.parameters()],
    "frozen norms": lambda m: setattr(m.cls[1], "train", lambda mode=True: m.cls[1]) or m.cls[1].eval(),
    "pruned": lambda m: nn.utils.prune.ln_structured(m.cls[0], "weight", 0.5, 2, 1),
    "spectral norm": lambda m: torch.manual_seed(0) and nn.utils.spectral_norm(m.cls[0]),
    "parametrized": lambda m: nn.utils.parametrizations.weight_norm(m.cls[0]),
    "synchronised": lambda m: nn.SyncBatchNorm.convert_sync_batchnorm(m) and None,
    "channels last": lambda m: m.to(memory_format=torch.channels_last),
}


@pytest.mark.parametrize("name", AFTER)
def test_changes_after_fuse(name):
    stock, fused = pair()
    for model in (stock, fused):
        model(x())
        AFTER[name](model)
    if "forward on" in name:  # deep copies of such would run the original's
        torch.testing.assert_close(fused(x()), stock(x()), rtol=1e-10, atol=1e-10)
    else:
        check(stock, fused)


def test_flags_and_further_arguments():
    class Switched(PPM):
        gain = 1.0

        def forward(self, x: Tensor, size: tuple[int, int] | None = None) -> Tensor:
            y = super().forward(x) * self.gain
            return y if size is None else F.interpolate(y, size)

    class Model(Head):
        def forward(self, x: Tensor) -> Tensor:
            return self.cls(self.ppm(x, size=(5, 5)))

    stock, fused = pair(lambda: Model(Switched(8, 2)))
    check(stock, fused)
    stock.ppm.gain = fused.ppm.gain = 2.0
    check(stock, fused)


def test_slices_of_a_sequential():
    class Model(Head):
        def forward(self, x: Tensor) -> Tensor:
            return self.cls[-1:](self.cls[:-1](self.ppm(x)))

    check(*pair(Model))
    model = nn.Sequential(PPM(8, 2), nn.Conv2d(16, 6, 3, padding=1), nn.ReLU()).double()
    fused = fuse(copy.deepcopy(model))
    torch.testing.assert_close(fused[:2](x()), model[:2](x()), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close((fused + nn.Sequential(nn.Tanh()))(x()), model(x()).tanh(), rtol=1e-10, atol=1e-10)


def test_modules_that_cannot_be_copied():
    class Locked(nn.BatchNorm2d):
        def __init__(self, n: int) -> None:
            super().__init__(n)
            self.lock = threading.Lock()

    model = Head(PPM(8, 2, norm=Locked)).double().eval()
    expected = model(x())
    torch.testing.assert_close(fuse(model)(x()), expected, rtol=1e-10, atol=1e-10)


def test_default_device():
    stock = Head()
    torch.set_default_device("meta")
    try:
        fused = fuse(stock)
        with torch.device("cpu"):
            assert fused(torch.randn(2, 8, 13, 9)).shape == (2, 5, 13, 9)
    finally:
        torch.set_default_device(None)


# ---- around the model --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("what", ["pyramid", "bottleneck", "both", "whole"])
def test_checkpointing(what, reentrant):
    class Model(Head):
        def forward(self, x: Tensor) -> Tensor:
            ppm, cls = (
                (lambda x, f=f: checkpoint(f, x, use_reentrant=reentrant)) if what in (name, "both") else f
                for name, f in (("pyramid", self.ppm), ("bottleneck", self.cls))
            )
            return cls(ppm(x))

    stock, fused = pair(Model)
    if what == "whole":
        results = []
        for model in (stock, fused):
            v = x().requires_grad_()
            checkpoint(model, v, use_reentrant=reentrant).square().sum().backward()
            results.append(
                {"x": v.grad, **{n: p.grad for n, p in model.named_parameters()}, **dict(model.named_buffers())}
            )
        assert_same(results[1], results[0])
    else:
        check(stock, fused)


def test_second_derivatives():
    results = []
    for model in pair():
        model.eval()
        v = x().requires_grad_()
        (grad,) = torch.autograd.grad(model(v).square().mean(), v, create_graph=True)
        grad.square().sum().backward()
        results.append({"x": v.grad, **{n: p.grad for n, p in model.named_parameters() if p.grad is not None}})
    assert_same(results[1], results[0])


def test_transforms():
    stock, fused = (m.eval() for m in pair())
    for transform in (
        lambda m: torch.func.jvp(m, (x(),), (torch.ones_like(x()),))[1],
        lambda m: torch.func.vmap(m)(x()[:, None]),
        lambda m: torch.func.grad(lambda v: m(v).square().sum())(x()),
        lambda m: torch.func.functional_call(m, {k: p * 1.5 for k, p in m.named_parameters()}, (x(),)),
        lambda m: torch.autograd.functional.hvp(lambda v: m(v).square().sum(), x(), x())[1],
    ):
        torch.testing.assert_close(transform(fused), transform(stock), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("where", ["whole", "pyramid", "bottleneck"])
def test_autocast(where):
    class Model(Head):
        def forward(self, x: Tensor) -> Tensor:
            with torch.autocast("cpu", torch.bfloat16) if where == "pyramid" else nullcontext():
                y = self.ppm(x)
            with torch.autocast("cpu", torch.bfloat16) if where == "bottleneck" else nullcontext():
                return self.cls(y)

    stock = Model().eval()
    fused = fuse(copy.deepcopy(stock))
    v = x().float()
    truth = copy.deepcopy(stock).double()
    truth.forward = lambda v: truth.cls(truth.ppm(v))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16) if where == "whole" else nullcontext():
        ours, theirs = fused(v), stock(v)
    exact = truth(x())
    assert ours.dtype == theirs.dtype
    assert (ours.double() - exact).norm() <= 1.5 * (theirs.double() - exact).norm() + 1e-6


def test_threads():
    """As nn.DataParallel and servers run one model."""
    stock, fused = pair()
    stock.eval(), fused.eval()
    inputs = [torch.randn(2, 8, 13, 9 + i, dtype=torch.float64) for i in range(4)]
    results: list[Tensor | None] = [None] * 4

    def work(i: int) -> None:
        with torch.no_grad():
            for _ in range(5):
                results[i] = fused(inputs[i])

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    [t.start() for t in threads]
    [t.join() for t in threads]
    for v, result in zip(inputs, results, strict=True):
        torch.testing.assert_close(result, stock(v), rtol=1e-10, atol=1e-10)


def test_errors_leave_no_mode_behind():
    class Model(Head):
        def forward(self, x: Tensor) -> Tensor:
            self.ppm(x)
            raise KeyError("of the model")

    _, fused = pair(Model)
    with pytest.raises(KeyError, match="of the model"):
        fused(x())
    z = torch.randn(1, 2, 3, 3)
    assert type(F.interpolate(z, (9, 9), mode="bilinear")) is Tensor


def test_exports_and_scripts():
    stock, fused = pair()
    stock.eval(), fused.eval()
    wide = torch.randn(2, 8, 21, 10, dtype=torch.float64)
    dynamic = torch.export.Dim.DYNAMIC
    exported = torch.export.export(fused, (x(),), dynamic_shapes=({0: dynamic, 2: dynamic, 3: dynamic},)).module()
    torch.testing.assert_close(exported(wide), stock(wide), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(torch.jit.trace(fused, x())(x()), stock(x()), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(torch.fx.symbolic_trace(fused)(wide), stock(wide), rtol=1e-10, atol=1e-10)

    class Scripted(Head):
        def __init__(self) -> None:
            super().__init__(ScriptablePPM())

        def forward(self, x: Tensor) -> Tensor:
            return self.cls(self.ppm(x))

    stock, fused = (m.eval() for m in pair(Scripted))
    torch.testing.assert_close(torch.jit.script(fused)(x()), stock(x()), rtol=1e-10, atol=1e-10)


class ScriptablePPM(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.features = PPM(8, 2).features

    def forward(self, x: Tensor) -> Tensor:
        out = [x]
        for feature in self.features:
            out.append(F.interpolate(feature(x), (x.size(2), x.size(3)), mode="bilinear", align_corners=True))
        return torch.cat(out, 1)


def test_optimizer_steps_and_checkpoints():
    stock, fused = pair()
    for model in (stock, fused):
        optimizer = torch.optim.SGD(model.parameters(), 0.05)
        for _ in range(3):
            optimizer.zero_grad()
            model(x()).square().mean().backward()
            optimizer.step()
    assert_same(dict(fused.state_dict()), dict(stock.state_dict()))
    file = io.BytesIO()
    torch.save(fused.state_dict(), file)
    file.seek(0)
    stock.load_state_dict(torch.load(file))
    check(stock, fused)
    check(stock, unfuse(fused))


@pytest.mark.parametrize("dilation", [1, 2])
def test_dilated_bottleneck(dilation):
    check(*pair(lambda: nn.Sequential(PPM(8, 2), ConvModule(16, 5, 3, dilation))))
