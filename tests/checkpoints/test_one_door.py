"""One reader interprets pickles, and imports nothing; nothing in the package or the scripts runs what a file says."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SOURCES = sorted([*(ROOT / "ldm").rglob("*.py"), *(ROOT / "scripts").rglob("*.py")])
DOOR = ROOT / "ldm" / "checkpoints" / "unpickle.py"
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
FORBIDDEN_MODULES = {
    *("pickle", "_pickle", "cPickle", "pickletools", "dill", "joblib", "cloudpickle", "marshal", "shelve"),
}
# Ways from a word to what it names; the reader, where a file chooses the words, has none.
LOOK_UPS = {
    "getattr",
    "setattr",
    "delattr",
    "globals",
    "locals",
    "vars",
    "import_module",
    "attrgetter",
    "methodcaller",
}
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


def test_no_file_but_one_unpickles():
    found = {path: offences(ast.parse(path.read_text(encoding="utf-8"))) for path in SOURCES}
    assert {path: names for path, names in found.items() if names} == {DOOR: ["import pickletools"]}


def test_the_reader_has_no_way_from_a_word_to_what_it_names():
    functions = [
        node
        for node in ast.walk(ast.parse(DOOR.read_text(encoding="utf-8")))
        if isinstance(node, ast.FunctionDef | ast.Lambda)
    ]
    used = {
        node.id if isinstance(node, ast.Name) else node.attr
        for function in functions
        for node in ast.walk(function)
        if isinstance(node, ast.Name | ast.Attribute)
    }
    assert {"CALLS", "OPS", "HARMLESS"} <= used
    assert not used & (LOOK_UPS | {"__dict__", "__class__", "__import__", "modules"})


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
