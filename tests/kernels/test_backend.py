"""The contract between fused modules and backends: both backends offer all of it, in the same form."""

import inspect
from typing import get_type_hints

import pytest

from ldm.kernels import cpu, cuda, fused_module
from ldm.kernels.backend import Backend

OPERATIONS = [name for name, value in vars(Backend).items() if inspect.isfunction(value) and name[0] != "_"]
CONSTANTS = ["DTYPES", "CACHES_CONTEXT", "FEED_FORWARD_ROWS"]


def parameters(function):
    """(name, kind, default) of what a function takes."""
    return [(p.name, p.kind, p.default) for p in inspect.signature(function).parameters.values()]


@pytest.mark.parametrize("backend", [cpu, cuda], ids=["cpu", "cuda"])
@pytest.mark.parametrize("name", OPERATIONS)
def test_each_operation_is_called_alike(backend, name):
    _, *wanted = parameters(getattr(Backend, name))  # without self
    assert parameters(getattr(backend, name)) == wanted
    hints = get_type_hints(getattr(Backend, name))
    assert get_type_hints(getattr(backend, name)) == hints and hints.get("return") is not None


@pytest.mark.parametrize("backend", [cpu, cuda], ids=["cpu", "cuda"])
def test_the_constants_are_there(backend):
    assert list(get_type_hints(Backend)) == CONSTANTS
    assert [type(getattr(backend, name)) for name in CONSTANTS] == [tuple, bool, int]


def test_the_protocol_names_what_fused_modules_use():
    assert len(OPERATIONS) == 12
    assert fused_module.BACKENDS == {"cpu": cpu, "cuda": cuda}
