"""The backends that fused modules compute by."""

import pytest
import torch

from ldm.kernels import cpu, cuda, fused_module


@pytest.fixture(params=["cpu", "interpreted"])
def backend(request):
    """One backend after the other."""
    return cpu if request.param == "cpu" else request.getfixturevalue("interpreted")


@pytest.fixture
def interpreted(monkeypatch):
    """The GPU's backend for tensors of the CPU: what Triton would compile is interpreted."""
    pytest.importorskip("triton", reason="there is no Triton")
    if torch.cuda.is_available():
        pytest.skip("test_on_gpu.py has the real thing")
    assert cuda.kernels() is not None
    monkeypatch.setitem(fused_module.BACKENDS, "cpu", cuda)
    return cuda
