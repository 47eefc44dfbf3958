"""bench/first_gpu.sh: what it asks for can be had, and what one section leaves outlives the failure of another."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from bench import speed

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = ROOT / "bench" / "first_gpu.sh"
# Answers for python: small programs are run, what would take long is noted. `picture` fails, `networks` never ends.
STUB = """#!/usr/bin/env bash
case "$*" in
    -c*) exit 0 ;;
    "- cuda") exit 0 ;;
    "- "*) exec "$REAL" "$@" ;;
esac
echo "$*" >> "$NOTES"
case "$*" in
    *"--rows image"*) echo broken; exit 3 ;;
    *"--rows unet/b2"*)
        echo "[1/6] unet/b2/float32: ldm 9 ms"
        echo {} > "$RESULTS/speed.json"
        exec tail -f /dev/null ;;
esac
echo "[1/1] fine"
"""


def run(tmp_path, *options, **environment):
    made = {"RESULTS": str(tmp_path / "results"), "OUT": str(tmp_path / "out"), **environment}
    return subprocess.run(
        [SCRIPT, *options], env={**os.environ, **made}, capture_output=True, text=True, timeout=120
    )


@pytest.fixture(scope="module", params=["cpu", "cuda"])
def device(request):
    return request.param


@pytest.fixture(scope="module")
def rehearsed(tmp_path_factory, device):
    """How the script ended, the words of each call of python, and the folder that it worked in."""
    tmp_path = tmp_path_factory.mktemp(device)
    stub = tmp_path / "python"
    stub.write_text(STUB)
    stub.chmod(0o755)
    given = {"PYTHON": str(stub), "REAL": sys.executable, "NOTES": str(tmp_path / "notes"), "MOST": "1"}
    done = run(tmp_path, "--device", device, **given)
    return done, [line.split() for line in (tmp_path / "notes").read_text().splitlines()], tmp_path


@pytest.mark.slow
def test_what_is_finished_outlives_a_failure_and_a_time_limit(rehearsed, device):
    done, asked, tmp_path = rehearsed
    assert done.returncode == 1, done.stderr
    words = done.stdout.split("== summary", 1)[1]
    assert "networks: stopped after" in words and "picture: failed (3)" in words
    assert "memory: done" in words and "many: done" in words
    assert "[1/6] unet/b2/float32: ldm 9 ms" in words
    for folder in ("results", "out"):
        (logs,) = (tmp_path / folder).glob("first-gpu-*")
        assert device == "cuda" or "torch " in (logs / "machine.txt").read_text()
        assert (logs / "picture.log").read_text() == "broken\n"
        assert "many: done" in (logs / "summary.txt").read_text()
        assert (tmp_path / folder / "speed.json").read_text() == "{}\n"
    assert len(asked) == 5


@pytest.mark.slow
def test_every_row_that_is_asked_for_is_one(rehearsed, device):
    _, asked, _ = rehearsed
    tests, *speeds = asked
    assert (ROOT / tests[-1]).is_file() and ("--collect-only" in tests) is (device == "cpu")
    for words in speeds:
        assert words[0] == "bench/speed.py"
        opt = speed.make_parser().parse_args(words[1:])
        px = {"tiny": 64, "v1": 512}[opt.model]
        assert opt.device == device and speed.choose(opt, px, device)


def test_what_is_missing_is_said_in_one_line(tmp_path):
    empty = tmp_path / "python"
    empty.write_text(f'#!/usr/bin/env bash\nexec {sys.executable} -I -S "$@"\n')
    empty.chmod(0o755)
    for python, words in (
        (str(tmp_path / "absent"), "there is no"),
        (str(empty), "packages are missing: torch, "),
    ):
        done = run(tmp_path, PYTHON=python)
        assert done.returncode == 2 and words in done.stderr
        assert len(done.stderr.splitlines()) == 1 and not done.stdout
