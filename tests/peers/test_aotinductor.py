"""Programs compiled ahead of time and run: half a minute for the compiler, each.

Among the peers' tests for its time; tests/test_deployment.py checks the program itself.
"""

import importlib.util
from pathlib import Path

import pytest
import torch
from stock_head import make_head
from toy_backbone import ToyBackbone

from pspnet_fast import PSPNet, export

if importlib.util.find_spec("timm") is None:
    pytest.skip("no peers installed: make test-peers", allow_module_level=True)


def test_aotinductor(tmp_path: Path) -> None:
    module, x = make_head().eval(), torch.randn(2, 8, 17, 15)
    program = torch.export.export(module, (x,))
    path = torch._inductor.aoti_compile_and_package(program, package_path=f"{tmp_path}/head.pt2")
    torch.testing.assert_close(torch._inductor.aoti_load_package(path)(x), module(x), rtol=1e-4, atol=1e-4)


def test_a_file_of_export(tmp_path: Path) -> None:
    """With the kernels, whose call for inference must not be taken for one of training."""
    model = PSPNet(3, ToyBackbone(), aux=False).eval()
    report = export(model, torch.randn(1, 3, 65, 57), path=tmp_path / "a.pt2", format="aoti")
    assert report.difference < 1e-5
