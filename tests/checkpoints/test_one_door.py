"""One function unpickles; nothing else in the package or the scripts runs what a file says."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SOURCES = sorted([*(ROOT / "ldm").rglob("*.py"), *(ROOT / "scripts").rglob("*.py")])
DOOR = ROOT / "ldm" / "checkpoints" / "pickles.py"
FORBIDDEN_CALLS = {
    "torch.load",
    "torch.serialization.load",
    "torch.hub.load",
    "torch.jit.load",
    "yaml.load",
    "yaml.unsafe_load",
    "os.system",
    "os.popen",
    "eval",
    "exec",
    "compile",
    "__import__",
}
FORBIDDEN_MODULES = {"pickle", "_pickle", "cPickle", "dill", "joblib", "cloudpickle", "marshal", "shelve"}
FORBIDDEN_OPTIONS = {"weights_only": False, "allow_pickle": True, "trust_remote_code": True, "shell": True}


def offences(tree: ast.AST) -> list[str]:
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [f"import {a.name}" for a in node.names if a.name.split(".")[0] in FORBIDDEN_MODULES]
        elif isinstance(node, ast.ImportFrom):
            if (node.module or "").split(".")[0] in FORBIDDEN_MODULES:
                found.append(f"from {node.module}")
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            found += [f"import of {name}" for name in names if name in FORBIDDEN_CALLS]
        elif isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            if name in FORBIDDEN_CALLS:
                found.append(name)
            for option in node.keywords:
                value = option.value.value if isinstance(option.value, ast.Constant) else None
                if option.arg in FORBIDDEN_OPTIONS and value is FORBIDDEN_OPTIONS[option.arg]:
                    found.append(f"{option.arg}={value}")
    return found


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_file_but_one_unpickles(path):
    found = offences(ast.parse(path.read_text(encoding="utf-8")))
    assert found == (["torch.load"] if path == DOOR else [])


@pytest.mark.parametrize(
    "line",
    [
        "torch.load('a')",
        "import pickle",
        "from pickle import loads",
        "from torch import load",
        "eval('1')",
        "np.load('a', allow_pickle=True)",
        "f(weights_only=False)",
        "os.system('true')",
    ],
)
def test_the_search_finds_what_it_looks_for(line):
    assert len(offences(ast.parse(line))) == 1
