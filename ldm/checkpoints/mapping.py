"""Weight files used where they lie in the page cache, without a copy, and safe from whoever changes the file.

A file that is mapped and then shortened kills the process that reads it (SIGBUS), long after loading. So a file is
mapped only under a lease: while it is held, whoever opens the file to write or to cut it waits in the kernel, and the
bytes become memory of our own meanwhile (leases.cpp). Renaming another file over it, or removing it, harms no mapping.
Where all this is not to be had, None comes back and the caller copies. Linux only.
"""

import contextlib
import ctypes
import functools
import logging
import os
import sys
import weakref
from pathlib import Path
from typing import Any

from ldm.checkpoints.open_file import OpenFile
from ldm.compiled import build
from ldm.errors import ResourceError

logger = logging.getLogger(__name__)

SOURCE = Path(__file__).with_name("leases.cpp")
FLAGS = ("-std=c++17", "-O2", "-fPIC")
# File systems of this machine; what others do to a file on a network drive, a lease here might not see.
LOCAL = frozenset({"ext2", "ext3", "ext4", "xfs", "f2fs", "tmpfs", "overlay"})
SLOWEST_MOVE = (
    100e6  # bytes a second; a file that could not be moved within the kernel's patience is copied at once
)


@functools.cache
def library() -> ctypes.CDLL | None:
    """Build or find leases.cpp and load it; None, with a line in the log, where that fails."""
    if sys.platform != "linux":
        return None
    try:
        (path,) = build(SOURCE, FLAGS, {"": ("-pthread",)}, for_processor=False)
        found = ctypes.CDLL(str(path))
    except (OSError, ResourceError) as error:
        logger.info("weights are copied out of their files: %s", error)
        return None
    found.ldm_map.argtypes = [ctypes.c_int, ctypes.c_size_t, ctypes.POINTER(ctypes.c_void_p)]
    found.ldm_unmap.argtypes, found.ldm_unmap.restype = [ctypes.c_void_p], None
    return found


def map_file(handle: OpenFile) -> Any | None:
    """Map a file that is open for reading.

    Returns:
        Its bytes as a writable buffer that lives as long as a tensor looks at it; what is written there stays in this
        process. None where that would not be safe, or cannot be done.

    Raises:
        FormatError: the file changed since it was opened.
    """
    if library() is None or handle.size > SLOWEST_MOVE * _patience():
        return None
    if _file_system(handle.before.st_dev) not in LOCAL:
        return None
    at = ctypes.c_void_p()
    failed = library().ldm_map(handle.file.fileno(), handle.size, ctypes.byref(at))
    if failed:
        logger.info("'%s' is copied, for it cannot be mapped: %s", handle.path, os.strerror(failed))
        return None
    pages = (ctypes.c_char * handle.size).from_address(at.value)
    weakref.finalize(pages, library().ldm_unmap, at.value).atexit = False
    handle.check_unchanged()  # from the lease on nobody could
    return pages


def _patience() -> float:
    """Say how many seconds the kernel lets a writer wait for us; 0 if it will not say."""
    try:
        return float(Path("/proc/sys/fs/lease-break-time").read_text())
    except (OSError, ValueError):
        return 0.0


def _file_system(device: int) -> str | None:
    """Name the kind of file system with this st_dev."""
    wanted = f"{os.major(device)}:{os.minor(device)}"
    with contextlib.suppress(OSError), open("/proc/self/mountinfo", encoding="utf-8") as lines:
        for line in lines:
            fields = line.split()
            if fields[2] == wanted:
                return fields[fields.index("-") + 1]
    return None
