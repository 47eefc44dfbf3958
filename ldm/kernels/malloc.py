"""malloc thresholds (glibc's mallopt): let the process keep freed memory for reuse.

By default glibc gets blocks above 32 MB from the system by mmap and returns them when they are freed, so that every
large tensor costs page faults: measured on two cores, a fifth of a UNet step's time.
"""

import contextlib
import ctypes
import weakref

from torch import nn

# Of glibc's mallopt; its own defaults are 128 KiB for both, moving up to 32 and 64 MiB as larger blocks are freed.
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
MAX_BLOCK = 1 << 30
DEFAULT_MMAP, DEFAULT_TRIM = 32 << 20, 64 << 20

_users: weakref.WeakSet[nn.Module] = weakref.WeakSet()


def _set(mmap: int, trim: int) -> None:
    # Not glibc: no such function, and nothing to do.
    with contextlib.suppress(OSError, AttributeError):
        library = ctypes.CDLL(None)
        library.gnu_get_libc_version  # noqa: B018 (musl has a mallopt that does nothing)
        library.mallopt(M_MMAP_THRESHOLD, mmap)
        library.mallopt(M_TRIM_THRESHOLD, trim)


def keep_freed(user: nn.Module) -> None:
    """Allocate blocks of up to 1 GiB from memory that the process keeps, for as long as `user` or another one lives.

    Does nothing without glibc.
    """
    _users.add(user)
    _set(MAX_BLOCK, 2**31 - 1)


def restore_defaults(user: nn.Module) -> None:
    """Once the last user is gone, restore the default thresholds and return free memory to the system."""
    if user not in _users:
        return
    _users.discard(user)
    if _users:
        return
    _set(DEFAULT_MMAP, DEFAULT_TRIM)
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
