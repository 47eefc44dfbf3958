"""Build of C++ sources for this machine, once; the libraries are kept in the user's cache folder."""

import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from ldm.errors import ResourceError


def build(folder: Path, flags: Sequence[str], variants: Mapping[str, Sequence[str]]) -> list[Path]:
    """Compile a folder of sources for this processor and link it in each variant, unless that was done before.

    Args:
        folder: with C++ files, and headers for them.
        flags: of the compilation.
        variants: a suffix of the library's name -> options to link it with.

    Returns:
        the libraries' paths, in the order of the variants. Their names are a hash of everything that they depend on.

    Raises:
        ResourceError: there is no compiler, or it fails.
    """
    compiler = shutil.which(os.environ.get("CXX") or "g++")
    sources = sorted(folder.glob("*.cpp"))
    texts = [path.read_text(encoding="utf-8") for path in [*sources, *sorted(folder.glob("*.h"))]]
    version = "" if compiler is None else _output_of([compiler, "--version"])
    name = hashlib.sha256("\0".join([*texts, _processor(), version, *flags]).encode()).hexdigest()
    cache = cache_folder()
    wanted = {cache / f"{name[:24]}{suffix}.so": options for suffix, options in variants.items()}
    if not all(path.exists() for path in wanted):
        if compiler is None:
            raise ResourceError("there is no C++ compiler; install g++, or name one in CXX")
        with tempfile.TemporaryDirectory(dir=cache) as work:
            parts = [Path(work) / f"{source.stem}.o" for source in sources]
            for source, part in zip(sources, parts, strict=True):
                _output_of([compiler, *flags, "-c", str(source), "-o", str(part)])
            for path, options in wanted.items():
                made = Path(work) / path.name
                _output_of([compiler, "-shared", *options, *map(str, parts), "-o", str(made)])
                os.replace(made, path)
    return list(wanted)


def cache_folder() -> Path:
    """Find or make the user's cache folder for libraries; where none is safe, a temporary one of this process."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    folder = Path(base) / "ldm" / "kernels"
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        status = folder.stat()
        mine = not hasattr(os, "getuid") or (status.st_uid == os.getuid() and not status.st_mode & 0o022)
        # Libraries here are executed, so nobody else may be able to write to the folder.
        if mine and os.access(folder, os.W_OK):
            return folder
    except (OSError, RuntimeError):
        pass  # no home, or none that can be written to
    return Path(tempfile.mkdtemp(prefix="ldm-kernels-"))


def _processor() -> str:
    """Describe the processor, on which -march=native depends."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return "\n".join(sorted({line for line in lines if line.startswith(("flags", "model", "Features"))}))


def _output_of(command: list[str]) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise ResourceError(f"'{command[0]}' could not be run: {error}") from error
    if done.returncode:
        first = next((line for line in done.stderr.splitlines() if "error" in line), done.stderr[-200:])
        raise ResourceError(f"'{command[0]}' failed: {first}")
    return done.stdout
