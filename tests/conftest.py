"""What holds for every test: no network, one known thread count, no gradient surprises between tests."""

import fcntl
import gc
import os
import socket
import sys
from collections import Counter
from pathlib import Path

# What pytest makes of a test file is kept even where nothing else is: each worker would need 13 s to make it again.
sys.dont_write_bytecode = False
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
if not Path("/dev/nvidiactl").exists():
    # Read when Triton is imported: without a GPU its kernels are interpreted.
    os.environ["TRITON_INTERPRET"] = "1"

import pytest  # noqa: E402
import torch  # noqa: E402

# Workers share the cores, and results in the last bit depend on the number of threads.
torch.set_num_threads(1)

GOLDEN = Path(__file__).parent / "golden"


def pytest_make_parametrize_id(val, argname):
    """Name a row by how long its text is, where that is a whole file: names go to every worker, and into logs."""
    return f"{argname} of {len(val)}" if isinstance(val, str | bytes) and len(val) > 200 else None


def pytest_collection_modifyitems(items):
    """Leave one row of n of a thinned test quick."""
    rows = Counter()
    for item in items:
        if thinned := item.get_closest_marker("thinned"):
            rows[item.function] += 1
            if rows[item.function] % thinned.args[0] != 1:
                item.add_marker("slow")


def pytest_collection_finish():
    """Leave what was imported out of garbage collection: half a million objects, gone over again and again."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(10_000, 10, 10)  # 14 times the usual: models come and go, and hardly any is in a circle


@pytest.fixture(autouse=True, scope="session")
def no_network():
    """Refuse every connection that leaves this machine, so that a test cannot quietly need a hub."""
    connect = socket.socket.connect

    def local_only(self, address):
        if self.family in (socket.AF_INET, socket.AF_INET6) and address[0] not in ("127.0.0.1", "::1"):
            raise AssertionError(f"a test tried to reach {address}")
        return connect(self, address)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket.socket, "connect", local_only)
        yield


@pytest.fixture
def full_size(tmp_path_factory):
    """Let full-size models take turns: they do not fit into the memory side by side."""
    with open(tmp_path_factory.getbasetemp().parent / "full-size.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
        gc.collect()  # before the next one's, whatever is in a circle is gone


@pytest.fixture
def golden() -> Path:
    """The folder of recorded tensors."""
    return GOLDEN
