"""A device that is only pretended: tensors that say they are on cuda:0 and hold memory of the CPU.

They compute real numbers, so the project runs through them as it is, and what a GPU would refuse is refused: tensors
of two devices in one operation, a CPU's generator for a draw on the device, pinning what is on the device, numpy's view
of it. What would make the processor wait for the device is written down. A graph keeps the operations and the tensors
that it saw, does them over again there, and breaks off at a wait. Not reached are CUDA's kernels and the order of its
streams, and what is written for plain tensors lets these pass by.

`with pretended() as device:` gives the list `device.waits` of (what, "file:line").
"""

import contextlib
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack
from torch.utils._python_dispatch import TorchDispatchMode

ROOT = f"{Path(__file__).resolve().parents[1]}/ldm/"
GPU = torch.device("cuda", 0)

waits: list[tuple[str, str]] = []
_recording: list[tuple[Any, Any, Any, Any]] | None = None  # operations of the graph that is being made
_pinned: dict[int, Tensor] = {}  # by the address of their memory, which stays theirs

# Operations whose result the processor has to see before it can go on.
SEEN = {
    "_local_scalar_dense",
    "is_nonzero",
    "equal",
    "nonzero",
    "masked_select",
    "_unique2",
    "unique_dim",
    "bincount",
}
# Operations that may mix devices, or take numbers of the CPU.
MIXING = {
    "copy_",
    "_to_copy",
    "index",
    "index_put_",
    "fill_",
    "masked_fill",
    "masked_fill_",
    "where",
    "lift_fresh",
    "set_",
}


class OnDevice(Tensor):
    """A tensor on the pretended device; `held` has its numbers."""

    # What is written in C++ sees an empty tensor without memory, with the keys that autograd goes by on CUDA.
    @staticmethod
    def __new__(cls, held: Tensor) -> "OnDevice":
        empty = torch.empty_strided(held.size(), held.stride(), dtype=held.dtype, device="meta")
        return Tensor._make_subclass(cls, empty, False, device_for_backend_keys=GPU)

    def __init__(self, held: Tensor):
        self.held = held

    device = property(lambda self: GPU)
    is_cuda = property(lambda self: True)
    is_cpu = is_meta = is_mps = property(lambda self: False)
    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        return compute(func, args, kwargs or {})

    def __reduce_ex__(self, protocol: int) -> Any:  # a file holds the numbers
        return self.held.detach().__reduce_ex__(protocol)

    def __repr__(self, **_: Any) -> str:
        return f"OnDevice({self.held!r})"


def place() -> str:
    """The line of ldm/ that is being run."""
    frame = sys._getframe(1)
    while frame is not None:
        path = frame.f_code.co_filename
        if path.startswith(ROOT):
            return f"{path.removeprefix(ROOT)}:{frame.f_lineno}"
        frame = frame.f_back
    return "a test"


def waited(what: str) -> None:
    if _recording is not None:
        raise RuntimeError(f"operation not permitted when stream is capturing: {what} at {place()}")
    waits.append((what, place()))


def refuse_mixed(func: Any) -> None:
    raise RuntimeError(
        f"Expected all tensors to be on the same device, cuda:0 and cpu are in {func} at {place()}"
    )


def compute(func: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
    """Do an operation as the device would: refuse, write a wait down, compute, and wrap what is on the device."""
    name = func._schema.name.removeprefix("aten::")
    there, here = [], []
    each(lambda x: (there if isinstance(x, OnDevice) else here).append(x), (*args, *kwargs.values()))
    goal = kwargs.get("device")
    if goal is not None and torch.device(goal).type == "meta" and (there or not _building()):
        goal = kwargs["device"] = GPU  # C++ asked for the device of a tensor that it takes for an empty one
    to_device = goal is not None and torch.device(goal).type == GPU.type
    if not there and not to_device:
        return func(*args, **kwargs)
    first = args[0] if args else None
    leaves = goal is not None and not to_device
    if name == "_to_copy" and leaves and there:
        waited("device to host")
    elif name == "_to_copy" and here:
        travels = kwargs.get("non_blocking") and first.untyped_storage().data_ptr() in _pinned
        waited("host to device") if not travels else None
    elif name == "copy_" and there and here:
        waited("host to device" if isinstance(first, OnDevice) else "device to host")
    elif name in SEEN:
        waited(name)
    elif name in ("index", "index_put_"):
        places = [x for x in args[1] if x is not None]
        if not isinstance(first, OnDevice) and any(isinstance(x, OnDevice) for x in places):
            raise RuntimeError(f"indices should be on the CPU, as the indexed tensor is, at {place()}")
        if any(not isinstance(x, OnDevice) or x.dtype == torch.bool for x in places):
            waited(name)
    pointwise = torch.Tag.pointwise in func.tags or name in MIXING
    if there and any(x.dim() > 0 and name not in MIXING or not pointwise for x in here):
        refuse_mixed(func)
    if (
        here
        and isinstance(first, Tensor)
        and first is here[0]
        and func._schema.is_mutable
        and name != "copy_"
    ):
        refuse_mixed(func)
    generator = kwargs.get("generator")
    if generator is not None and generator.device.type != GPU.type:
        raise RuntimeError(f"Expected a 'cuda' device type for generator but found 'cpu' at {place()}")
    if name == "_fused_sdp_choice":
        return 0

    def real(x: Tensor) -> Tensor:
        return x.held if isinstance(x, OnDevice) else x

    if to_device:
        kwargs = {**kwargs, "device": torch.device("cpu"), "pin_memory": None}
    out = func(*each(real, args), **{key: each(real, x) for key, x in kwargs.items()})
    if _recording is not None:
        _recording.append((func, each(real, args), kwargs, out))
    if leaves:
        return out
    if name == "_to_copy" and out is real(first):
        out = out.clone()  # a copy that goes nowhere on the CPU
    known = {id(x.held): x for x in there} | {id(x): x for x in here}

    return each(lambda x: known[id(x)] if id(x) in known else OnDevice(x), out)


def each(change: Any, values: Any) -> Any:
    """Change the tensors among an operation's arguments or results, which lie in lists if not by themselves."""
    if isinstance(values, list | tuple):
        return type(values)([each(change, x) for x in values])
    return change(values) if isinstance(values, Tensor) else values


def _building() -> bool:
    """Whether a model without weights is being built, which means the meta device in earnest."""
    return any(type(mode).__name__ == "DeviceContext" for mode in _get_current_function_mode_stack())


class _Operations(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        return compute(func, args, kwargs or {})


class _Calls(TorchFunctionMode):
    """What torch decides before an operation is one: which card "cuda" is, and what its C++ asks of a tensor."""

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        kwargs, name = kwargs or {}, getattr(func, "__name__", "")
        if func is torch.device:
            return func(*args, **kwargs)
        args, kwargs = ([_numbered(x) for x in args], {key: _numbered(x) for key, x in kwargs.items()})
        on_it = bool(args) and isinstance(args[0], OnDevice)
        if name == "cuda":
            return args[0].to(GPU)
        if name == "to" and len(args) > 1 and isinstance(args[1], OnDevice):
            return args[0].to(device=GPU, dtype=args[1].dtype)
        if on_it and name == "numpy":
            raise TypeError(f"can't convert cuda:0 device type tensor to numpy at {place()}")
        if on_it and name == "tolist":
            waited(name)
            return args[0].held.detach().tolist()
        if on_it and name == "pin_memory":
            raise RuntimeError(f"cannot pin a tensor of the device, only those of the CPU, at {place()}")
        if name == "pin_memory":
            mine = args[0].detach().clone()
            _pinned[mine.untyped_storage().data_ptr()] = mine
            return mine
        if name == "is_pinned":
            return False
        if name == "record_stream":
            return None
        if on_it and name == "scaled_dot_product_attention":
            return _attend(*args, **kwargs)
        return func(*args, **kwargs)


def _numbered(x: Any) -> Any:
    if isinstance(x, str | torch.device) and str(x) == GPU.type:
        return GPU
    return x


def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attn_mask: Any = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
) -> Tensor:
    scores = q * (q.shape[-1] ** -0.5 if scale is None else scale) @ k.transpose(-1, -2)
    if is_causal:
        attn_mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).tril()
    if attn_mask is not None:
        hidden = attn_mask.dtype == torch.bool
        scores = scores.masked_fill(~attn_mask, float("-inf")) if hidden else scores + attn_mask
    return scores.softmax(-1) @ v


class Graph:
    """A recording: pools are told apart by a number."""

    pools = 0

    def pool(self) -> int:
        return self.number

    def replay(self) -> None:
        for func, args, kwargs, out in self.operations:
            again = func(*args, **kwargs)
            for old, new in zip(_flat(out), _flat(again), strict=True):
                if old.data_ptr() != new.data_ptr():  # neither a view nor written in place
                    old.copy_(new)


class Recording:
    """torch.cuda.graph"""

    def __init__(self, graph: Graph, pool: int | None = None, **_: Any):
        Graph.pools += pool is None
        self.graph, graph.number = graph, Graph.pools if pool is None else pool

    def __enter__(self) -> None:
        global _recording
        _recording = self.graph.operations = []

    def __exit__(self, *_: Any) -> None:
        global _recording
        _recording = None


def _flat(values: Any) -> list[Tensor]:
    found: list[Tensor] = []
    each(found.append, values)
    return found


class _Nothing:
    """A stream, an event or a guard of the device: there is nothing to order."""

    def __init__(self, *_: Any, **__: Any):
        pass

    def __getattr__(self, name: str) -> Any:
        if name == "synchronize":
            waited(name)
        return lambda *_, **__: _Nothing()

    def __enter__(self) -> "_Nothing":
        return self

    def __exit__(self, *_: Any) -> None:
        pass


@contextlib.contextmanager
def pretended():
    """Let torch say that there is a GPU, and tensors be moved to it."""
    nothing = (
        "_lazy_init",
        "empty_cache",
        "manual_seed",
        "manual_seed_all",
        "set_device",
        "reset_peak_memory_stats",
    )
    answers = {
        **{name: lambda *_, **__: None for name in nothing},
        **{name: _Nothing for name in ("Stream", "Event", "device", "current_stream", "stream", "device_of")},
        "graph": Recording,
        "CUDAGraph": Graph,
        "is_available": lambda: True,
        "is_initialized": lambda: True,
        "is_current_stream_capturing": lambda: _recording is not None,
        "is_bf16_supported": lambda *_, **__: True,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "synchronize": lambda *_: waited("synchronize"),
        "get_device_name": lambda *_: "a pretended one",
        "get_device_capability": lambda *_: (9, 0),
        "get_device_properties": lambda *_: SimpleNamespace(
            total_memory=80 << 30, name="a pretended one", major=9
        ),
        "memory_allocated": lambda *_: 0,
        "max_memory_allocated": lambda *_: 0,
        "mem_get_info": lambda *_: (80 << 30, 80 << 30),
        "get_rng_state": lambda *_: torch.zeros(16, dtype=torch.uint8),
        "set_rng_state": lambda *_: None,
        "get_rng_state_all": lambda *_: [],
        "set_rng_state_all": lambda *_: None,
    }
    own = torch.__future__.get_overwrite_module_params_on_conversion()
    with pytest.MonkeyPatch.context() as patch:
        for name, answer in answers.items():
            patch.setattr(torch.cuda, name, answer)
        torch._C._ensureCUDADeviceGuardSet()
        torch._C._set_only_lift_cpu_tensors(True)
        torch.__future__.set_overwrite_module_params_on_conversion(True)
        waits.clear()
        try:
            with _Calls(), _Operations():
                yield SimpleNamespace(waits=waits)
        finally:
            torch.__future__.set_overwrite_module_params_on_conversion(own)
            torch._C._set_only_lift_cpu_tensors(False)
            _pinned.clear()
