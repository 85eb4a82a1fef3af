"""A program exported without no_grad, compiled ahead of time and run: half a minute for the compiler."""

import pytest
import torch
from stock_head import make_head


def test_aotinductor(tmp_path: pytest.TempPathFactory) -> None:
    module, x = make_head().eval(), torch.randn(2, 8, 17, 15)
    program = torch.export.export(module, (x,))
    path = torch._inductor.aoti_compile_and_package(program, package_path=f"{tmp_path}/head.pt2")
    torch.testing.assert_close(torch._inductor.aoti_load_package(path)(x), module(x), rtol=1e-4, atol=1e-4)
