"""The house's picture: imports point down only, heavy packages are imported late, functions are short,
and a wheel holds every room."""

import ast
import functools
import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SOURCES = sorted((ROOT / "ldm").rglob("*.py"))
# Rooms from the floor up; a module may import rooms before its own, and its own. Rooms of one line stand side by side
# and do not know each other.
ROOMS = (
    ("errors",),
    ("limits", "presets", "sampler_names", "values"),
    ("config_text", "option_kinds"),
    ("options",),
    (
        "batches",
        "config",
        "devices",
        "helpers",
        "improved_calls",
        "paths",
        "lr_scheduler",
        "containers",
        "comfyui",
        "comfyui_workflow",
        "other_pictures",
        "other_words",
        "axes",
        "labels",
    ),
    ("process",),
    ("checkpoints", "modules"),
    ("kernels", "util"),
    ("models",),
    ("images", "prompt", "retouch"),
    ("adapters",),
    ("data", "shapes"),
    ("stories",),
)
STORIES = (
    "advice",
    "checks",
    "cli",
    "converting",
    "denoising",
    "diffusers_style",
    "edit",
    "edit_parts",
    "edit_pictures",
    "editing",
    "explain",
    "encoding",
    "finishing",
    "generate",
    "grids",
    "guided_diffusion",
    "hires",
    "merging",
    "metadata",
    "noise",
    "passes",
    "pipeline",
    "prompting",
    "request",
    "results",
    "saving",
    "sources",
    "training",
    "tutorials",
    "web",
)
CORE_FORBIDS = ("accelerate", "diffusers", "lightning", "pytorch_lightning")
LATE = ("huggingface_hub", "transformers")


def name_of(path):
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def room_of(module):
    """(height, room) of a dotted name such as ldm.modules.attention; the package itself is below everything."""
    parts = module.split(".")
    if len(parts) == 1:
        return 0, "ldm"
    room = "stories" if parts[1] in STORIES else parts[1]
    for height, rooms in enumerate(ROOMS, start=1):
        if room in rooms:
            return height, room
    raise AssertionError(f"{module} is in no room of tests/test_imports.py")


MODULES = frozenset(map(name_of, SOURCES))


def statements(node):
    """The statements right inside a node, in the parts of which alone further ones can be."""
    for part in ("body", "handlers", "cases", "orelse", "finalbody"):
        inside = getattr(node, part, ())
        yield from inside if isinstance(inside, list) else ()


def imports_of(tree, path):
    """List (imported dotted name, whether inside a function, whether for type checkers only, line)."""

    def walk(node, late, typing):
        if isinstance(node, ast.Import):
            yield from ((alias.name, late, typing, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: imports are absolute here"
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                yield full if full in MODULES else node.module, late, typing, node.lineno
        else:
            late = late or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
            typing = typing or isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
            for child in statements(node):
                yield from walk(child, late, typing)

    return list(walk(tree, False, False))


MOST_LINES = 80


def long_functions(source, tree):
    """List (name, lines without docstring) of functions longer than MOST_LINES without `# long: why` above them."""
    lines, long, left = source.splitlines(), [], [tree]
    while left:
        node = left.pop()
        left += statements(node)
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        count = node.end_lineno - node.lineno + 1
        if ast.get_docstring(node, clean=False) is not None:
            count -= node.body[0].end_lineno - node.body[0].lineno + 1
        above = lines[min(part.lineno for part in (node, *node.decorator_list)) - 2].strip()
        if count > MOST_LINES and not re.match("# long: .{20}", above):
            long.append((node.name, count))
    return long


@functools.cache
def read(path):
    """What a file imports, and its long functions: each is parsed once, and no tree is kept."""
    source = path.read_text(encoding="utf-8")
    tree = ast.parse(source)
    return imports_of(tree, path), long_functions(source, tree)


def test_imports_point_down():
    wrong = []
    for path in SOURCES:
        height, room = room_of(name_of(path))
        for imported, _, typing, line in read(path)[0]:
            if imported.split(".")[0] in ("scripts", "tests", "bench"):
                wrong.append(f"{path}:{line}: {imported}")
            if imported.split(".")[0] != "ldm" or typing:
                continue
            below, other = room_of(imported)
            if not (room == other or below < height):
                wrong.append(f"{path}:{line}: {room} imports {imported}")
    assert wrong == [] and len(SOURCES) > 200


def circles(arrows):
    """The circles of a graph {name: names}: sets of more than one that lead to one another, sorted."""
    found, left = [], dict(arrows)
    while left:
        reach = {name: {other for other in others if other in left} for name, others in left.items()}
        inner = {other for others in reach.values() for other in others}
        ends = [name for name in left if not reach[name] or name not in inner]
        for name in ends:  # nothing goes in a circle through one that leads nowhere, or that nobody leads to
            del left[name]
        if not ends:
            found.append(sorted(left))
            break
    return found


def test_no_imports_go_in_a_circle():
    """Those inside functions and those for type checkers count as well."""
    arrows = {
        name_of(path): {name for name, *_ in read(path)[0] if name != name_of(path)} for path in SOURCES
    }
    assert circles(arrows) == []
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"b", "d"}, "d": set(), "e": {"e2"}}) == [["b", "c"]]


def test_heavy_packages_are_imported_late_or_never():
    wrong = []
    for path in SOURCES:
        module = name_of(path)
        for imported, late, typing, line in read(path)[0]:
            root = imported.split(".")[0]
            if root in CORE_FORBIDS and not module.startswith("ldm.training"):
                wrong.append(f"{path}:{line}: {imported}")
            if root in LATE and not (late or typing):
                wrong.append(f"{path}:{line}: {imported} outside a function")
    assert wrong == []


def test_functions_fit_on_a_screen_or_say_why_not():
    found = {str(path): read(path)[1] for path in SOURCES}
    assert {path: names for path, names in found.items() if names} == {}


def test_the_eye_that_counts_lines_counts_them():
    """80 lines of a function are counted with its signature, without its decorators and its docstring."""

    def found(source):
        return long_functions(source, ast.parse(source))

    body = '    """Say.\n\n    More.\n    """\n' + "    x = 1\n" * 79
    whole = f"@cache\n\ndef f():\n{body}"
    assert found(whole) == []
    assert found(f"{whole}    x = 2\n") == [("f", 81)]
    assert found(f"class A:\n    pass\n# long: the tables of the whole format\n{whole}    x = 2\n") == []
    assert found(f"# long: because\n{whole}    x = 2\n") == [("f", 81)]


def test_the_eye_that_reads_imports_sees_them(tmp_path):
    """Were it blind, the two tests above would pass on anything."""
    path = tmp_path / "one.py"
    path.write_text(
        "import lightning.pytorch as pl\n"
        "from ldm import util\n"
        "from ldm.util import exists\n"
        "if TYPE_CHECKING:\n    from ldm.generate import StableDiffusion\n"
        "def f():\n    from ldm.models.diffusion import ddpm\n"
    )
    assert read(path)[0] == [
        ("lightning.pytorch", False, False, 1),
        ("ldm.util", False, False, 2),
        ("ldm.util", False, False, 3),
        ("ldm.generate", False, True, 5),
        ("ldm.models.diffusion.ddpm", True, False, 7),
    ]
    assert [room_of(f"ldm.{name}") for name in ("util", "models.x", "cli")] == [
        (8, "util"),
        (9, "models"),
        (13, "stories"),
    ]
    with pytest.raises(AssertionError, match="ldm.attic.x is in no room"):
        room_of("ldm.attic.x")


def python(code, *arguments):
    """Run code in a fresh interpreter at the project's root and give what it prints."""
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_import_ldm_costs_no_more_than_torch():
    code = (
        "import sys, torch; before = set(sys.modules); import ldm; print(*sorted(set(sys.modules) - before))"
    )
    assert python(code).split() == ["ldm"]


def test_the_short_names_lead_to_their_homes():
    import ldm

    assert set(dir(ldm)) == set(ldm.__all__) >= {"StableDiffusion", "instantiate_from_config", "__version__"}
    for name in ldm.__all__:
        assert getattr(ldm, name) is not None
    with pytest.raises(AttributeError, match="module 'ldm' has no attribute 'StableDifusion'"):
        ldm.StableDifusion  # noqa: B018


EACH = """
import functools, importlib, importlib.machinery, json, sys
loader = importlib.machinery.SourceFileLoader
loader.get_code = functools.cache(loader.get_code)  # each source is run anew, and compiled once
class Denied:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in sys.argv[1].split(","):
            raise ImportError(name + " is not here")
sys.meta_path.insert(0, Denied())
failed = {}
for module in sys.argv[2].split(","):
    for known in [name for name in sys.modules if name.split(".")[0] == "ldm"]:
        del sys.modules[known]
    try:
        importlib.import_module(module)
    except Exception as error:
        failed[module] = f"{type(error).__name__}: {error}"
print(json.dumps(failed))
"""


@pytest.mark.slow
def test_each_module_imports_by_itself_without_the_extras():
    """Each is the first of ldm to be imported, and nothing that only extras bring can be."""
    modules = [name_of(path) for path in SOURCES]
    extras = "accelerate,diffusers,lightning,pytorch_lightning,scipy,matplotlib,torchvision,torchmetrics"
    failed = json.loads(python(EACH, extras, ",".join(modules)))
    assert [name for name in failed if not name.startswith(("ldm.training.", "ldm.shapes.checker"))] == []
    assert {reason.split(":")[0] for reason in failed.values()} <= {"ImportError"}
    assert len(modules) > 60


def test_the_wheel_holds_every_package_on_disk():
    options = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]
    moved = options["package-dir"]
    listed = set(options["packages"]) - set(moved)
    on_disk = {name_of(path / "__init__.py") for path in (ROOT / "ldm").rglob("*") if list(path.glob("*.py"))}
    assert listed == on_disk | {"ldm"}
    for package, folder in moved.items():
        assert (ROOT / folder).is_dir(), package
    for package in listed:
        assert (ROOT / package.replace(".", "/") / "__init__.py").is_file(), package
