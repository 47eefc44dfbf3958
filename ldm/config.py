"""Building objects from configurations.

A configuration is untrusted text: it may name classes, never call functions, and never make a module be
imported that the program has not chosen already.
"""

import importlib
import inspect
import logging
import pkgutil
import re
import sys
import textwrap
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn

from ldm import values
from ldm.config_text import first_line, refuse_resolvers, resolved
from ldm.errors import LdmError, MismatchError, UnsafeFileError, nearest, shown

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
# Names in ControlNet's configurations -> ours, which build the same keys; where a program has imported its own cldm,
# they are that one's.
CLDM_NAMES = {
    "cldm.cldm.ControlLDM": "ldm.models.diffusion.control.ControlLDM",
    "cldm.cldm.ControlNet": "ldm.models.diffusion.control.ControlNet",
    "cldm.cldm.ControlledUnetModel": "ldm.modules.diffusionmodules.openaimodel.UNetModel",
}


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
            f"target {shown(string)} is not a dotted class name such as 'ldm.models.autoencoder.AutoencoderKL'"
        )
    string = HISTORIC_NAMES.get(string, string)
    if string in CLDM_NAMES and "cldm" not in sys.modules:
        string = CLDM_NAMES[string]
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
        near = nearest(error.name, _siblings(_parent(error.name)))
        hint = f"; did you mean '{near}'?" if near else ""
        raise MismatchError(f"target '{string}': there is no module '{error.name}'{hint}") from error
    if reload:
        module = importlib.reload(module)
    found = getattr(module, class_name, None)
    if found is None:
        near = nearest(class_name, dir(module))
        hint = f"; did you mean '{module_name}.{near}'?" if near else ""
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

    Values are checked against the annotations of the classes of ldm and torch that take them, those of configurations
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
        raise MismatchError(f"{at}a configuration needs 'target' and 'params', got {shown(config)}")
    if "target" not in config:
        found = ", ".join(map(shown, config)) or "nothing"
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
    near = nearest(name, known)
    hint = f"did you mean '{near}'?" if near else f"it takes {', '.join(known) or 'none'}"
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
    """Return a configuration's params as its class takes them; those of the configurations inside are checked, too."""
    params = config.get("params")
    if params is None:
        return {}
    if not hasattr(params, "keys") or not all(isinstance(name, str) for name in params):
        raise MismatchError(
            f"params of '{config['target']}' should be a mapping of names to values, got {shown(params)}"
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
    """Check a mapping that a constructor passes on whole against the class that takes it; see `ldm.values.check`.

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
