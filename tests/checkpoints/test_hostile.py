"""Hostile files under 1 MB, and sparse ones of 100 GB: refused in one line, without running anything, within a budget.

Each is read in a process of its own (hostile.py). The budget is 2 s of processor time and 200 MB. And sound files that
were changed at random (mutants.py) end as one of our errors, or load.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import hostile
import pytest

ROOT = Path(__file__).resolve().parents[2]
SECONDS, KILOBYTES = 2.0, 200 * 1024
NAMES = [name for name in hostile.all_rows() if name not in hostile.SAME_SIZE]

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="measures in forked processes")


def measure(folder: Path, size: int) -> dict[str, dict]:
    done = subprocess.run(
        [sys.executable, hostile.__file__, str(folder), str(size)],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        cwd=folder,
    )
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    return {row["name"]: row for row in rows}


def faults(row: dict) -> list[str]:
    found = [f"runs {event}" for event in row["events"]]
    if row["raised"] != row["wanted"]:
        found.append(f"ends as {row['raised']} ({row['message']}), not {row['wanted']}")
    if len(row["message"]) > 400 or not row["message"].isprintable():
        found.append(f"says {row['message']!r}")
    if row["seconds"] > SECONDS:
        found.append(f"takes {row['seconds']:.2f} s")
    if row["kilobytes"] > KILOBYTES:
        found.append(f"takes {row['kilobytes'] // 1024} MB")
    return found


def test_hostile_files_end_as_one_line_within_the_budget(tmp_path):
    found = {name: faults(row) for name, row in measure(tmp_path, 16_000).items()}
    assert set(found) == set(NAMES) and len(NAMES) > 140
    assert not {name: what for name, what in found.items() if what}


@pytest.mark.slow
def test_hostile_files_of_a_megabyte_keep_within_the_budget(tmp_path):
    found = {name: faults(row) for name, row in measure(tmp_path, 950_000).items()}
    assert set(found) == set(hostile.all_rows()) == {*NAMES, *hostile.SAME_SIZE}
    assert not {name: what for name, what in found.items() if what}


def mutants(seed: int, count: int) -> dict:
    done = subprocess.run(
        [sys.executable, str(ROOT / "tests" / "mutants.py"), str(seed), str(count)],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}"},
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.slow
def test_no_mutant_of_a_sound_file_gets_out_of_hand():
    count = 1500
    found = mutants(count, count)
    assert found["faults"] == []
    assert len(found["outcomes"]) == 7
    for kind, outcomes in found["outcomes"].items():
        assert sum(outcomes.values()) == count and outcomes["FormatError"] > 0 and outcomes["none"] > 0, kind
