"""Reading YAML configurations, untrusted text: nothing in them acts, leads in circles or grows without bound."""

import contextlib
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ldm.errors import AbsentError, FormatError, LdmError, UnsafeFileError, refuse_elsewhere, shown
from ldm.values import MAX_DIGITS

# Of a configuration file; v1-inference.yaml has 3 kB, 141 nodes and 7 levels.
MAX_CONFIG_BYTES = 1 << 20
MAX_CONFIG_VALUES = 10_000
MAX_CONFIG_DEPTH = 64
# A number as YAML writes it: also with underscores, as 0x1f, and in sixties (1:30).
NUMBER = re.compile(r"[-+]?[0-9][0-9a-fA-FxXoO_.:]*([eE][-+]?[0-9]+)?", re.ASCII)
REFERENCE = re.compile(r"\$\{([^${}]*)\}")


def load_config(path: str | Path) -> Any:
    """Read a YAML configuration as an OmegaConf mapping.

    Raises:
        AbsentError: there is no such file.
        FormatError: it is too large, is not YAML, or is not a mapping.
        UnsafeFileError: it carries a Python tag, or asks a resolver such as ${oc.env:...} for a value.
    """
    from omegaconf import OmegaConf

    if not os.path.isfile(path):  # False, too, for what can be no path at all
        refuse_elsewhere("configuration", path)
        raise AbsentError(
            f"configuration '{path}' is not a file; name a YAML file such as configs/v1-inference.yaml"
        )
    try:
        size = os.path.getsize(path)
        if size > MAX_CONFIG_BYTES:
            raise FormatError(f"configuration '{path}' has {size} bytes; at most {MAX_CONFIG_BYTES} are read")
        text = Path(path).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise FormatError(f"configuration '{path}' is not text in UTF-8; save it as such") from error
    except OSError as error:
        raise FormatError(f"configuration '{path}' cannot be read: {error.strerror}") from error
    where = f"configuration '{path}'"
    check_yaml(text, where)
    with readable(where):
        config = OmegaConf.create(text)
    refuse_resolvers(config, where)
    return config


@contextlib.contextmanager
def readable(where: str) -> Iterator[None]:
    """Turn what YAML's and OmegaConf's readers raise into a FormatError of one line, with the place if they say it."""
    import yaml
    from omegaconf.errors import OmegaConfBaseException

    try:
        yield
    except LdmError:
        raise
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        raise FormatError(
            f"{where} is not readable YAML: {place}{first_line(error.problem or error.context)}"
        ) from error
    except (
        yaml.YAMLError,
        OmegaConfBaseException,
        LookupError,
        RecursionError,
        TypeError,
        ValueError,
    ) as error:
        raise FormatError(f"{where} is not readable YAML: {first_line(error)}") from error


def check_yaml(text: str, where: str, *, is_file: bool = True) -> None:
    """Look through a YAML text before anything is built from it: plain tags, sane numbers and size; a file: a mapping.

    The events of a text cost no more than its length, whatever its aliases would multiply to.

    Raises:
        FormatError, UnsafeFileError: see `load_config`.
    """
    with readable(where):
        _check_events(text, where, is_file)


def _check_events(text: str, where: str, is_file: bool) -> None:
    import yaml

    sizes: dict[str, int] = {}  # values below each anchor, its aliases multiplied out
    open_nodes: list[tuple[str | None, int]] = []
    root, total = None, 0
    for event in yaml.parse(text, Loader=yaml.SafeLoader):
        line = event.start_mark.line + 1
        if (getattr(event, "tag", None) or "").startswith("tag:yaml.org,2002:python"):
            raise UnsafeFileError(f"{where} carries a Python tag in line {line}; only plain YAML is read")
        if isinstance(event, yaml.CollectionEndEvent):
            anchor, before = open_nodes.pop()
            if anchor is not None:
                sizes[anchor] = total - before
            continue
        if not isinstance(event, yaml.NodeEvent):
            continue
        root = event if root is None else root
        if isinstance(event, yaml.AliasEvent):
            if event.anchor not in sizes:
                raise FormatError(
                    f"{where}: alias '{event.anchor}' in line {line} stands for nothing before it"
                )
            total += sizes[event.anchor]
        elif isinstance(event, yaml.CollectionStartEvent):
            open_nodes.append((event.anchor, total))
            total += 1
        else:
            _check_scalar(event, f"{where}: line {line}")
            total += 1
            if event.anchor is not None:
                sizes[event.anchor] = 1
        if len(open_nodes) > MAX_CONFIG_DEPTH or total > MAX_CONFIG_VALUES:
            raise FormatError(
                f"{where} is too large: by line {line} it has {total} values "
                f"{len(open_nodes)} levels deep; at most {MAX_CONFIG_VALUES} and {MAX_CONFIG_DEPTH} are read"
            )
    if is_file and (not isinstance(root, yaml.MappingStartEvent) or total == 1):
        raise FormatError(f"{where} should be a mapping with a 'model:' key, but holds none")


def _check_scalar(event: Any, where: str) -> None:
    """Raise FormatError for a number of endless digits, and for a text that is not what its tag (!!bool) says."""
    import yaml

    if event.implicit[0] and len(event.value) > MAX_DIGITS and NUMBER.fullmatch(event.value):
        raise FormatError(f"{where}: a number of {len(event.value)} digits; at most {MAX_DIGITS} are read")
    if event.tag is None or not event.tag.startswith("tag:yaml.org,2002:"):
        return
    try:
        if len(event.value) > MAX_DIGITS and event.tag.endswith((":int", ":float")):
            raise ValueError("too many digits")
        yaml.SafeLoader("").construct_object(yaml.ScalarNode(event.tag, event.value))
    except (yaml.YAMLError, ValueError, LookupError, AttributeError, ArithmeticError) as error:
        kind = event.tag.rpartition(":")[2]
        raise FormatError(f"{where}: {shown(event.value)} is no value of !!{kind}") from error


def first_line(error: object) -> str:
    """Squeeze an error into one line of at most 200 characters."""
    text = re.sub(r"\s+", " ", str(error)).strip() or type(error).__name__
    return text[:200]


def refuse_resolvers(config: Any, where: str = "configuration") -> None:
    """Raise UnsafeFileError if any value asks a resolver (${oc.env:...}); plain ${node} references may stay.

    The whole tree that a part belongs to is looked at, for the part may refer to any of it.
    """
    from omegaconf import OmegaConf

    if OmegaConf.is_config(config):
        config = OmegaConf.to_container(config._get_root(), resolve=False)
    stack = [config]
    while stack:
        value = stack.pop()
        if isinstance(value, Mapping):
            stack.extend(value.keys())
            stack.extend(value.values())
        elif isinstance(value, list | tuple):
            stack.extend(value)
        elif isinstance(value, str) and _asks_resolver(value):
            raise UnsafeFileError(
                f"{where}: '{value[:80]}' asks a resolver for a value; only plain ${{node}} references are read"
            )


def _asks_resolver(value: str) -> bool:
    """Tell whether a colon stands anywhere inside ${...}, however nested: ${oc.${name}:...} counts."""
    depth = 0
    for part in re.findall(r"\$\{|\}|:", value):
        if part == ":" and depth:
            return True
        depth = depth + 1 if part == "${" else max(0, depth - 1) if part == "}" else depth
    return False


def resolved(config: Any, where: str = "configuration") -> Any:
    """Return an OmegaConf tree as plain dicts and lists, every ${node} followed.

    Raises:
        FormatError: a reference leads nowhere or in a circle, references multiply what is there beyond what is read,
            or a value is left as ???.
        UnsafeFileError: a value asks a resolver.
    """
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    refuse_resolvers(config, where)
    try:
        _check_growth(OmegaConf.to_container(config._get_root(), resolve=False), where)
        return OmegaConf.to_container(config, resolve=True, throw_on_missing=True)
    except (OmegaConfBaseException, RecursionError) as error:
        raise FormatError(f"{where} cannot be resolved: {first_line(error)}") from error


def _check_growth(root: Any, where: str) -> None:
    """Raise FormatError where references lead in a circle, or multiply a configuration: nine of nine of nine."""
    known: dict[tuple, int] = {}  # place -> characters below it, references followed

    def size(place: tuple, value: Any, trail: tuple) -> int:
        if place in trail:
            raise FormatError(
                f"{where} cannot be resolved: Recursive reference: '{'.'.join(map(str, place))}' leads back to itself"
            )
        if place not in known:
            trail = (*trail, place)
            if isinstance(value, Mapping):
                parts = [size((*place, key), part, trail) for key, part in value.items()]
            elif isinstance(value, list):
                parts = [size((*place, i), part, trail) for i, part in enumerate(value)]
            elif isinstance(value, str):
                parts = [len(value), *(size(*found, trail) for found in _referred(root, place, value, where))]
            else:
                parts = []
            known[place] = 8 + sum(parts)
        if known[place] > 2 * MAX_CONFIG_BYTES:
            raise FormatError(f"{where} is too large: references multiply what is in it")
        return known[place]

    size((), root, ())


def _referred(root: Any, place: tuple, text: str, where: str) -> Iterator[tuple[tuple, Any]]:
    """Find what the references in a text at this place lead to, as (place, value); those that lead nowhere are left."""
    names = REFERENCE.findall(text)
    if text.count("${") != len(names):
        raise FormatError(
            f"{where}: '{text:.80}' has a reference inside of another; only plain ones are read"
        )
    for name in names:
        rest = name.lstrip(".")
        dots = len(name) - len(rest)
        found, value = (), root
        for part in [*place[: len(place) - dots if dots else 0], *re.findall(r"[^.\[\]\s]+", rest)]:
            if isinstance(value, str) and (onward := next(_referred(root, found, value, where), None)):
                found, value = onward
            keys = (
                value if isinstance(value, Mapping) else range(len(value)) if isinstance(value, list) else ()
            )
            key = next((key for key in keys if str(key) == str(part)), None)
            if key is None:
                break
            found, value = (*found, key), value[key]
        else:
            yield found, value
