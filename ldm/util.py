"""Building objects from configurations, and the small helpers that other people's code imports from here.

A configuration is untrusted text: it may name classes, never call functions, and never make a module be
imported that the program has not chosen already.
"""

import difflib
import functools
import importlib
import inspect
import logging
import pkgutil
import re
import sys
import textwrap
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ldm import values
from ldm.config_text import first_line, refuse_resolvers, resolved
from ldm.config_text import load_config as load_config  # part of this module for its callers
from ldm.errors import LdmError, MismatchError, UnsafeFileError, UsageError, told

logger = logging.getLogger(__name__)

DOTTED_NAME = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)+", re.ASCII)
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


def pinned(x: Tensor) -> Tensor:
    """Copy a tensor into page-locked memory, from which copies to a GPU are made beside all else.

    Where the system has none left, it is given as it is, and the log says so once.
    """
    global _can_pin
    if _can_pin:
        try:
            return x.pin_memory()
        except RuntimeError as error:  # of a limit that is set, or of a driver: the next would fail as well
            _can_pin = False
            reason = str(error).splitlines()[0]
            logger.warning("copies to the GPU are waited for, no memory can be page-locked: %s", reason)
    return x


_can_pin = True


def upload(x: Tensor, device: torch.device) -> Tensor:
    """Copy a tensor of the machine's memory to a device; where that is CUDA, nobody waits."""
    if device.type != "cuda" or x.device.type != "cpu":
        return x.to(device)
    return pinned(x).to(device, non_blocking=True)


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
            f"target {told(string)} is not a dotted class name such as 'ldm.models.autoencoder.AutoencoderKL'"
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


def instantiate_from_config(config: Any, *, allow: Iterable[str] = (), where: str = "", **kwargs: Any) -> Any:
    """Build the object that {"target": dotted name, "params": {...}} describes.

    Values are held against the annotations of the classes of ldm and torch that take them, those of configurations
    inside of this one too, and against `ldm.values.RANGES`, before anything is built. The two special strings of
    CompVis's configurations, "__is_first_stage__" and "__is_unconditional__", give None.

    Args:
        allow: see `get_obj_from_str`.
        where: the configuration's place in its file, such as "model", for messages; an OmegaConf node knows its own.
        kwargs: go to the constructor, too, and win over params of the same name.

    A class outside of ldm whose constructor takes any keyword is given the params as they are; those that it hands on
    to a class of ldm which does not know them are left to it (`leaves_others_to_subclasses`).

    Raises:
        MismatchError: no target, an unknown class, a parameter that the class does not take, or values that do not
            fit together.
        UsageError: a value of the wrong kind or out of range; its key, what was wanted and what came are named.
        UnsafeFileError: a target or a value that does more than name a class or a number, or a model beyond every
            sensible size.
    """
    from omegaconf import OmegaConf

    if isinstance(config, str) and config in ("__is_first_stage__", "__is_unconditional__"):
        return None
    where = where or place_of(config)
    at = f"{where}: " if where else ""
    if not hasattr(config, "keys"):
        raise MismatchError(f"{at}a configuration needs 'target' and 'params', got {told(config)}")
    if "target" not in config:
        found = ", ".join(map(told, config)) or "nothing"
        raise MismatchError(f"{at}a configuration needs the key 'target', got only {found:.80}")
    if OmegaConf.is_config(config):
        resolved(config)
    else:
        refuse_resolvers(config)
    target = config["target"]
    cls = get_obj_from_str(target, allow=allow)
    params = {**_checked(config, cls, f"{where}.params" if where else "params"), **kwargs}
    _refuse_giant(cls, params, where or f"'{target}'")
    with values.bounded(where or f"'{target}'"):
        try:
            return cls(**params)
        except TypeError as error:
            unknown = re.search(r"unexpected keyword argument '(\w+)'", str(error))
            if unknown and unknown.group(1) in params:
                raise _unknown(unknown.group(1), cls, f"{at}'{target}'") from error
            lacking = re.search(r"__init__\(\) missing \d+ required [a-z-]+ arguments?: (.+)", str(error))
            if lacking and not set(re.findall(r"'(\w+)'", lacking.group(1))) & set(params):
                raise MismatchError(f"{at}params of '{target}' lack {lacking.group(1):.300}") from error
            raise _misfit(error, cls, where or target) from error
        except (ArithmeticError, AssertionError, LookupError, RuntimeError, ValueError) as error:
            raise _misfit(error, cls, where or target) from error


def _refuse_giant(cls: type, params: Mapping[str, Any], where: str) -> None:
    """Build a model that may be very large without memory first, so that one beyond every sensible size fills none.

    Whatever else is wrong with it is left to be found when it is built.
    """
    if values.is_counting() or torch.empty(0).is_meta or not cls.__module__.startswith("ldm."):
        return
    if issubclass(cls, nn.Module) and values.may_be_giant(params):
        with values.bounded(where), torch.random.fork_rng(devices=[]), torch.device("meta"):
            try:
                cls(**_without_files(params))
            except UnsafeFileError:
                raise
            except Exception:
                logger.debug("%s cannot be built without memory", where, exc_info=True)


def _without_files(params: Mapping[str, Any]) -> dict[str, Any]:
    """Copy params, and those of the configurations inside, without weights to load."""
    copied = {
        name: _without_files(value) if isinstance(value, Mapping) else value for name, value in params.items()
    }
    if copied.pop("ckpt_path", None) is not None and "finetune_keys" in copied:
        copied["finetune_keys"] = None
    return copied


def place_of(config: Any) -> str:
    """Say where in its file an OmegaConf node is: "model.params.unet_config"; "" for anything else."""
    from omegaconf import OmegaConf

    return config._get_full_key(None) if OmegaConf.is_config(config) else ""


def _unknown(name: str, kind: Any, taker: str) -> MismatchError:
    known = list(values.parameters_of(kind))
    near = difflib.get_close_matches(name, known, n=1)
    hint = f"did you mean '{near[0]}'?" if near else f"it takes {', '.join(known) or 'none'}"
    # A place, a file's own name and forty of ours have to go into one line of 400 characters.
    hint = textwrap.shorten(hint, 160, placeholder=" ...")
    return MismatchError(f"{taker:.150} has no parameter '{name:.60}'; {hint}")


def _misfit(error: Exception, cls: type, where: str) -> Exception:
    """Turn what torch or Python says of values that do not fit together into one line; other errors stay."""
    if isinstance(error, LdmError) or not values.is_annotated(cls) or "memory" in str(error):
        return error
    return MismatchError(
        f"{where}: {cls.__name__} cannot be built from these values: {type(error).__name__}: {first_line(error)}"
    )


def _checked(config: Any, cls: type, where: str) -> dict[str, Any]:
    """Return a configuration's params as its class wants them, having looked at those of all inside of it as well."""
    params = config.get("params")
    if params is None:
        return {}
    if not hasattr(params, "keys") or not all(isinstance(name, str) for name in params):
        raise MismatchError(
            f"params of '{config['target']}' should be a mapping of names to values, got {told(params)}"
        )
    params = {name: params[name] for name in params}
    if values.is_annotated(cls):
        unknown = (
            [] if values.takes_anything(cls) else [n for n in params if n not in values.parameters_of(cls)]
        )
        if unknown:
            raise _unknown(unknown[0], cls, f"{where}: '{config['target']}'")
        params = values.check(params, cls, where)
    for name, value in params.items():
        if not isinstance(value, Mapping):
            continue
        if name in getattr(cls, "PARAMS_OF", {}):
            params[name] = handed_on(value, cls.PARAMS_OF[name], f"{where}.{name}")
        elif isinstance(value.get("target"), str):
            # One that cannot be had is left to whoever builds it, for not everything that is written is built.
            inner = _class_if_any(value["target"])
            if inner is not None:
                _checked(value, inner, f"{where}.{name}.params")
    return params


def _class_if_any(target: str) -> type | None:
    try:
        return get_obj_from_str(target)
    except (LdmError, ImportError):
        return None


def handed_on(params: Mapping[str, Any], kind: Any, where: str) -> dict[str, Any]:
    """Hold a mapping that a constructor hands on whole against the class that takes it; see `ldm.values.check`.

    Raises:
        MismatchError: it has a name that the class does not take, or lacks one that the class needs.
        UsageError: a value of the wrong kind or out of range.
    """
    known = values.parameters_of(kind)
    for name in params:
        if name not in known:
            raise _unknown(str(name), kind, where)
    missing = [name for name, p in known.items() if p.default is p.empty and name not in params]
    if missing:
        raise MismatchError(f"{where} lacks {', '.join(map(repr, missing)):.300}")
    return values.check({name: params[name] for name in params}, kind, where)


def create_model(config_path: str | Path) -> nn.Module:
    """Build the model of a configuration file on the CPU, with initial weights, ready for `load_state_dict`.

    ControlNet's words for it, which tutorials go by:

        model = create_model("configs/v1-inference.yaml")
        model.load_state_dict(load_state_dict("model_data/v1-5-pruned-emaonly.safetensors"), strict=False)

    strict=False says nothing of what it leaves out; load_latent_diffusion of ldm.checkpoints does both in one call,
    faster, and accounts for every tensor.

    Raises:
        As load_config and instantiate_from_config; MismatchError: the file has no 'model:'.
    """
    config = load_config(config_path)
    if "model" not in config:
        found = ", ".join(map(str, config))
        raise MismatchError(
            f"configuration '{config_path}' needs a 'model:' with 'target' and 'params'; it has {found:.120}"
        )
    model = instantiate_from_config(config["model"])
    return model.cpu()


def load_state_dict(path: str | Path, location: str | torch.device = "cpu") -> dict[str, Tensor]:
    """Read the tensors of a .ckpt, .pt, .pth, .bin or .safetensors file by name, what is under "state_dict" as it is.

    Files are told apart by what they hold, not by their names, and none can run code.

    Args:
        location: the device that the tensors go to.

    Raises:
        As ldm.checkpoints.read_tensors; UsageError: there is no such device.
    """
    from ldm.checkpoints import read_tensors
    from ldm.checkpoints.load import usable

    device = usable(location)
    tensors, _ = read_tensors(path)
    return {name: tensor.to(device) for name, tensor in tensors.items()}


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


def leaves_others_to_subclasses(init: Callable[..., None]) -> Callable[..., None]:
    """Let a constructor pass over keywords that it does not know, where they are those of somebody else's class.

    Other people's subclasses take `**kwargs`, read a keyword of their own from it, and hand all of it on. What is
    passed over is said in a warning. The classes of ldm, and subclasses that name all of their keywords, get Python's
    TypeError, as ever.
    """
    known = inspect.signature(init).parameters

    @functools.wraps(init)
    def construct(self: Any, *args: Any, **kwargs: Any) -> None:
        others = [name for name in kwargs if name not in known]
        if others and _hands_on_anything(type(self)):
            constructors = [base.__init__ for base in type(self).__mro__ if "__init__" in base.__dict__]
            names = {name for one in constructors for name in inspect.signature(one).parameters}
            near = {name: difflib.get_close_matches(name, names, n=1, cutoff=0.8) for name in others}
            hints = (f"{name} (did you mean '{hit[0]}'?)" if hit else name for name, hit in near.items())
            logger.warning(
                "left to %s, for ldm does not know these parameters: %s",
                type(self).__name__,
                ", ".join(hints),
            )
            kwargs = {name: value for name, value in kwargs.items() if name in known}
        init(self, *args, **kwargs)

    return construct


def _hands_on_anything(cls: type) -> bool:
    """Tell whether a class is from outside of ldm and its constructor, one that is not ldm's, takes any keyword."""
    for base in cls.__mro__:
        if base.__module__.split(".")[0] == "ldm":
            return False
        if "__init__" in base.__dict__:
            parameters = inspect.signature(base.__init__).parameters.values()
            return any(p.kind is p.VAR_KEYWORD for p in parameters)
    return False
