"""Building objects from configurations, and the small helpers that other people's code imports from here.

A configuration is untrusted text: it may name classes, never call functions, and never make a module be
imported that the program has not chosen already.
"""

import difflib
import importlib
import inspect
import logging
import os
import pkgutil
import re
import sys
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ldm.errors import AbsentError, FormatError, LdmError, MismatchError, UnsafeFileError, UsageError

logger = logging.getLogger(__name__)

DOTTED_NAME = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)+", re.ASCII)
# Of a configuration file; v1-inference.yaml has 3 kB, 141 nodes and 7 levels.
MAX_CONFIG_BYTES = 1 << 20
MAX_CONFIG_VALUES = 10_000
MAX_CONFIG_DEPTH = 64
# Kinds of class that a target may be; Lightning's are recognised by name so that it need not be imported.
PLAIN_KINDS = (
    nn.Module,
    torch.utils.data.Dataset,
    torch.optim.lr_scheduler.LRScheduler,
    torch.optim.Optimizer,
)
LIGHTNING_KINDS = {"Callback", "LightningDataModule", "LightningModule", "Logger"}
# Names that CompVis's training configurations use for what lived in its main.py.
HISTORIC_NAMES = {
    "main.DataModuleFromConfig": "ldm.training.data.DataModuleFromConfig",
    "main.ImageLogger": "ldm.training.callbacks.ImageLogger",
}


def exists(x: object) -> bool:
    """Tell whether x is anything but None."""
    return x is not None


def default(value: Any, fallback: Any) -> Any:
    """Return value, or the fallback (called first if it is a plain function) where value is None."""
    if value is not None:
        return value
    return fallback() if inspect.isfunction(fallback) else fallback


def ismap(x: object) -> bool:
    """Tell whether x is a batch of feature maps: (b, c, h, w) with more than 3 channels."""
    return isinstance(x, Tensor) and x.dim() == 4 and x.shape[1] > 3


def isimage(x: object) -> bool:
    """Tell whether x is a batch of pictures: (b, c, h, w) with 1 or 3 channels."""
    return isinstance(x, Tensor) and x.dim() == 4 and x.shape[1] in (1, 3)


def mean_flat(tensor: Tensor) -> Tensor:
    """Average over every axis but the first."""
    return tensor.mean(dim=tuple(range(1, tensor.dim()))) if tensor.dim() > 1 else tensor


def count_params(model: nn.Module, verbose: bool = False) -> int:
    """Count a module's parameters; verbose logs the number."""
    total = sum(p.numel() for p in model.parameters())
    if verbose:
        logger.info("%s has %.2f M parameters", type(model).__name__, total * 1e-6)
    return total


def log_txt_as_img(wh: tuple[int, int], xc: Iterable[str], size: int = 10) -> Tensor:
    """Draw one caption per picture, black on white, wrapped to the width.

    Args:
        wh: (width, height) in pixels.
        xc: the captions.
        size: of the letters, in pixels.

    Returns:
        (b, 3, height, width) in [-1, 1].
    """
    import numpy as np
    from PIL import Image, ImageDraw, ImageFont

    width, height = wh
    font = ImageFont.load_default(size)
    per_line = max(1, int(1.6 * width / size))
    pictures = []
    for caption in xc:
        lines = [caption[i : i + per_line] for i in range(0, len(caption), per_line)]
        picture = Image.new("RGB", (width, height), "white")
        ImageDraw.Draw(picture).text((0, 0), "\n".join(lines), fill="black", font=font)
        pictures.append(torch.from_numpy(np.array(picture)).permute(2, 0, 1) / 127.5 - 1.0)  # (3, h, w)
    return torch.stack(pictures)


def load_config(path: str | Path) -> Any:
    """Read a YAML configuration as an OmegaConf mapping.

    Raises:
        AbsentError: there is no such file.
        FormatError: it is too large, is not YAML, or is not a mapping.
        UnsafeFileError: it carries a Python tag, or asks a resolver such as ${oc.env:...} for a value.
    """
    import yaml
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    if not os.path.isfile(path):  # False, too, for what can be no path at all
        raise AbsentError(
            f"configuration '{path}' is not a file; name a YAML file such as configs/v1-inference.yaml"
        )
    try:
        size = os.path.getsize(path)
        if size > MAX_CONFIG_BYTES:
            raise FormatError(f"configuration '{path}' has {size} bytes; at most {MAX_CONFIG_BYTES} are read")
        text = Path(path).read_text(encoding="utf-8")
        _check_yaml(text, path)
        config = OmegaConf.create(text)
    except LdmError:
        raise
    except yaml.MarkedYAMLError as error:
        place = error.problem_mark or error.context_mark
        where = f"line {place.line + 1}, column {place.column + 1}: " if place else ""
        raise FormatError(
            f"configuration '{path}' is not readable YAML: {where}{_first_line(error.problem or error.context)}"
        ) from error
    except UnicodeDecodeError as error:
        raise FormatError(f"configuration '{path}' is not text in UTF-8; save it as such") from error
    except OSError as error:
        raise FormatError(f"configuration '{path}' cannot be read: {error.strerror}") from error
    except (yaml.YAMLError, OmegaConfBaseException, ValueError) as error:
        raise FormatError(f"configuration '{path}' is not readable YAML: {_first_line(error)}") from error
    refuse_resolvers(config, f"configuration '{path}'")
    return config


def _check_yaml(text: str, path: str | Path) -> None:
    """Look through a YAML text before anything is built from it: one mapping, plain tags, and of sane size.

    The events of a text cost no more than its length, whatever its aliases would multiply to.
    """
    import yaml

    sizes: dict[str, int] = {}  # values below each anchor, its aliases multiplied out
    open_nodes: list[tuple[str | None, int]] = []
    root, total = None, 0
    for event in yaml.parse(text, Loader=yaml.SafeLoader):
        line = event.start_mark.line + 1
        if (getattr(event, "tag", None) or "").startswith("tag:yaml.org,2002:python"):
            raise UnsafeFileError(
                f"configuration '{path}' carries a Python tag in line {line}; only plain YAML is read"
            )
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
                    f"configuration '{path}': alias '{event.anchor}' in line {line} stands for nothing before it"
                )
            total += sizes[event.anchor]
        elif isinstance(event, yaml.CollectionStartEvent):
            open_nodes.append((event.anchor, total))
            total += 1
        else:
            total += 1
            if event.anchor is not None:
                sizes[event.anchor] = 1
        if len(open_nodes) > MAX_CONFIG_DEPTH or total > MAX_CONFIG_VALUES:
            raise FormatError(
                f"configuration '{path}' is too large: by line {line} it has {total} values "
                f"{len(open_nodes)} levels deep; at most {MAX_CONFIG_VALUES} and {MAX_CONFIG_DEPTH} are read"
            )
    if not isinstance(root, yaml.MappingStartEvent) or total == 1:
        raise FormatError(f"configuration '{path}' should be a mapping with a 'model:' key, but holds none")


def _first_line(error: object) -> str:
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


def get_obj_from_str(string: str, reload: bool = False, *, allow: Iterable[str] = ()) -> type:
    """Find the class that a dotted name means, importing nothing that was not chosen before.

    Args:
        string: "package.module.Class" from `ldm`, `torch.nn`, or a package the program has imported.
        reload: import the module anew first, as the original offers for notebooks.
        allow: further full names that the caller (never a file) allows, whatever package they are from.

    Raises:
        UnsafeFileError: the name is from elsewhere, or is no class of a buildable kind.
        MismatchError: the package is allowed, but has no such class.
    """
    if not isinstance(string, str) or not DOTTED_NAME.fullmatch(string):
        raise UnsafeFileError(
            f"target {string!r:.80} is not a dotted class name such as 'ldm.models.autoencoder.AutoencoderKL'"
        )
    string = HISTORIC_NAMES.get(string, string)
    module_name, class_name = string.rsplit(".", 1)
    allowed = string in ({allow} if isinstance(allow, str) else set(allow))
    if not (allowed or _may_import(module_name)):
        raise UnsafeFileError(
            f"target '{string}' is not allowed: it is from neither ldm, torch.nn, nor a package that this program "
            f"has imported; import it first, or pass allow=['{string}']"
        )
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if not error.name or not f"{module_name}.".startswith(f"{error.name}."):
            raise
        if not module_name.startswith("ldm.") or not hasattr(
            sys.modules.get(_parent(error.name)), "__path__"
        ):
            # A way through what another module has imported, such as ldm.util.importlib, is no name of a class.
            raise UnsafeFileError(
                f"target '{string}' is not allowed: '{error.name}' is no module that can be imported"
            ) from error
        near = difflib.get_close_matches(error.name, _siblings(_parent(error.name)), n=1)
        hint = f"; did you mean '{near[0]}'?" if near else ""
        raise MismatchError(f"target '{string}': there is no module '{error.name}'{hint}") from error
    if reload:
        module = importlib.reload(module)
    found = getattr(module, class_name, None)
    if found is None:
        near = difflib.get_close_matches(class_name, dir(module), n=1)
        hint = f"; did you mean '{module_name}.{near[0]}'?" if near else ""
        raise MismatchError(f"target '{string}': module '{module_name}' has no '{class_name}'{hint}")
    if not (inspect.isclass(found) and (allowed or _is_buildable(found))):
        raise UnsafeFileError(
            f"target '{string}' is not allowed: it is no model, dataset, scheduler or callback class"
        )
    return found


def _may_import(module_name: str) -> bool:
    if (
        module_name in sys.modules
        or module_name.split(".")[0] == "ldm"
        or f"{module_name}.".startswith("torch.nn.")
    ):
        return True
    # The submodules of an imported package may follow it; those of the standard library and torch may not,
    # for they are always imported and importing some of them acts, as importing any __main__ does.
    root = module_name.split(".")[0]
    tame = root not in sys.stdlib_module_names and root != "torch" and "__" not in module_name
    return tame and root in sys.modules


def _parent(module_name: str) -> str:
    return module_name.rpartition(".")[0]


def _siblings(package: str) -> list[str]:
    """List the modules of an imported package by their full names."""
    return [found.name for found in pkgutil.iter_modules(sys.modules[package].__path__, f"{package}.")]


def _is_buildable(cls: type) -> bool:
    if issubclass(cls, PLAIN_KINDS) or cls.__module__ == "ldm.lr_scheduler":
        return True
    return any(
        base.__name__ in LIGHTNING_KINDS
        and base.__module__.split(".")[0] in ("lightning", "pytorch_lightning")
        for base in cls.__mro__
    )


def instantiate_from_config(config: Any, *, allow: Iterable[str] = ()) -> Any:
    """Build the object that {"target": dotted name, "params": {...}} describes.

    The two special strings of CompVis's configurations, "__is_first_stage__" and "__is_unconditional__",
    give None.

    Raises:
        MismatchError: no target, an unknown class, or a parameter that the class does not take.
        UnsafeFileError: a target or a value that does more than name a class or a number.
    """
    if isinstance(config, str) and config in ("__is_first_stage__", "__is_unconditional__"):
        return None
    if not hasattr(config, "keys"):
        raise MismatchError(f"a configuration needs 'target' and 'params', got {config!r:.80}")
    if "target" not in config:
        found = ", ".join(map(repr, config)) or "nothing"
        raise MismatchError(f"a configuration needs the key 'target', got only {found:.80}")
    refuse_resolvers(config)
    _check_references(config)
    target = config["target"]
    cls = get_obj_from_str(target, allow=allow)
    params = config.get("params") or {}
    if not hasattr(params, "keys") or not all(isinstance(name, str) for name in params):
        raise MismatchError(
            f"params of '{target}' should be a mapping of names to values, got {params!r:.80}"
        )
    try:
        return cls(**params)
    except TypeError as error:
        unknown = re.search(r"unexpected keyword argument '(\w+)'", str(error))
        if unknown and unknown.group(1) in params:
            name, known = unknown.group(1), _keywords(cls)
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean '{near[0]}'?" if near else f"it takes {', '.join(known) or 'none'}"
            raise MismatchError(f"'{target}' has no parameter '{name}'; {hint:.300}") from error
        lacking = re.search(r"__init__\(\) missing \d+ required [a-z-]+ arguments?: (.+)", str(error))
        if lacking and not set(re.findall(r"'(\w+)'", lacking.group(1))) & set(params):
            raise MismatchError(f"params of '{target}' lack {lacking.group(1):.300}") from error
        raise


def _check_references(config: Any) -> None:
    """Raise FormatError for a ${node} that leads nowhere or in a circle, and for a value left as ???."""
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    if not OmegaConf.is_config(config):
        return
    try:
        OmegaConf.to_container(config, resolve=True, throw_on_missing=True)
    except (OmegaConfBaseException, RecursionError) as error:
        raise FormatError(f"configuration cannot be resolved: {_first_line(error)}") from error


def _keywords(cls: type) -> list[str]:
    """List the constructor keywords of a class and of the bases that it hands its own on to."""
    names: list[str] = []
    for base in cls.__mro__:
        if "__init__" not in base.__dict__ or base in (nn.Module, object):
            continue
        parameters = inspect.signature(base.__init__).parameters.values()
        names += [
            p.name for p in parameters if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL) and p.name != "self"
        ]
        if not any(p.kind is p.VAR_KEYWORD for p in parameters):
            break
    return list(dict.fromkeys(names))


def parallel_data_prefetch(
    func: Callable[[Any], Any],
    data: Any,
    n_proc: int,
    target_data_type: str = "ndarray",
    cpu_intensive: bool = True,
    use_worker_id: bool = False,
) -> Any:
    """Apply a function to n_proc slices of the data side by side and join the results in order.

    Args:
        func: takes a slice (and the worker's number, if use_worker_id).
        data: an array or list.
        n_proc: how many workers.
        target_data_type: "ndarray" concatenates the results, "list" chains them.
        cpu_intensive: processes instead of threads.
        use_worker_id: pass the worker's number as a second argument.
    """
    import numpy as np

    if target_data_type not in ("ndarray", "list"):
        raise UsageError(f"target_data_type should be 'ndarray' or 'list', got {target_data_type!r}")
    if n_proc < 1:
        raise UsageError(f"n_proc should be at least 1, got {n_proc}")
    data = list(data.values()) if isinstance(data, Mapping) else data
    bounds = [len(data) * i // n_proc for i in range(n_proc + 1)]
    slices = [data[a:b] for a, b in zip(bounds[:-1], bounds[1:], strict=True)]
    arguments = [slices, range(n_proc)] if use_worker_id else [slices]
    pool = ProcessPoolExecutor if cpu_intensive else ThreadPoolExecutor
    with pool(n_proc) as workers:
        results = list(workers.map(func, *arguments))
    return (
        np.concatenate(results, axis=0) if target_data_type == "ndarray" else [x for r in results for x in r]
    )
