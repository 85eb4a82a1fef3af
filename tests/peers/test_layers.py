"""peft's adapters and timm's norms inside the heads: outputs, gradients and buffers of the same of plain layers."""

import importlib.util

import pytest
import torch
from foreign import assert_same, run
from pairs import fused, head, ppm, pspnet, x
from torch import nn

if any(importlib.util.find_spec(name) is None for name in ("peft", "timm", "torchvision")):
    pytest.skip("no peers installed: make test-peers", allow_module_level=True)

import packages  # noqa: F401  (torchvision's operators where it cannot load its own)
from peft import LoraConfig, get_peft_model
from timm.layers import BatchNormAct2d

pytestmark = pytest.mark.usefixtures("small_maps_as_large_ones")
LEVELS, ALL = r".*features\.\d\.1", r".*(features\.\d\.1|bottleneck\.0|cls\.0)"


def check(stock: nn.Module, ours: nn.Module) -> None:
    for training in (True, False):
        assert_same(run(ours.train(training), x()), run(stock.train(training), x()))
    with torch.no_grad():
        torch.testing.assert_close(ours(x()), stock(x()), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(
    ("pair", "arguments"),
    [
        (ppm, {"target_modules": LEVELS}),
        (head, {"target_modules": ALL}),
        (head, {"target_modules": ALL, "use_dora": True}),
        (head, {"target_modules": LEVELS, "modules_to_save": ["bottleneck"]}),
        (head, {"target_modules": r".*bottleneck\.0", "modules_to_save": ["ppm.features.0"]}),
        (pspnet, {"target_modules": ALL, "modules_to_save": ["4"]}),
        (pspnet, {"target_modules": LEVELS, "modules_to_save": ["cls"]}),
        (fused, {"target_modules": ALL}),
    ],
)
def test_lora(pair, arguments):
    adapted = []
    for model in pair():
        torch.manual_seed(1)
        adapted.append(get_peft_model(model, LoraConfig(r=2, init_lora_weights=False, **arguments)).double())
    check(*adapted)


@pytest.mark.parametrize(("pair", "name"), [(ppm, "features.1.2"), (head, "bottleneck.1"), (fused, "cls.1")])
def test_norms_with_activation(pair, name):
    models = pair()
    for model in models:
        norm = BatchNormAct2d(model.get_submodule(name).num_features, act_layer=nn.SiLU, inplace=False)
        norm.load_state_dict(model.get_submodule(name).state_dict())
        model.set_submodule(name, norm)
    check(*(model.double() for model in models))
