"""The configuration of a run: YAML files laid over each other, then words of the command line."""

import logging
from pathlib import Path
from typing import Any

from ldm.config_text import check_yaml, first_line, load_config, resolved
from ldm.errors import LdmError, UsageError, shown

logger = logging.getLogger(__name__)


def is_word(text: str) -> bool:
    """Tell a word that changes the configuration, `a.b=c` or `~a.b`, from a file's name."""
    return "=" in text or (text.startswith("~") and not text.startswith("~/"))


def merge_configs(files: list[str | Path], words: list[str]) -> Any:
    """Read YAML files, each overriding those before, then words.

    Where a later file names another `target`, the earlier one's `params` go with the class they belonged to. A word
    is `a.b=c`, which sets a value (and keeps params beside a target), `~a.b`, which takes one out, or `a.b=null`,
    which takes out one that is there.

    Raises:
        UsageError: a word is neither, leads through what is no mapping, or takes out what is not there.
        FormatError, AbsentError, UnsafeFileError: see `ldm.util.load_config`; so for the words' values.
    """
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    for word in words:
        _check_word(word)
    merged: dict[str, Any] = {}
    try:
        for file in files:
            later = OmegaConf.to_container(load_config(file), resolve=False)
            _drop_params(merged, later, str(file))
            merged = _plain(OmegaConf.merge(merged, later))
        for word in words:
            name, _, value = word.partition("=")
            if word.startswith("~"):
                _take_out(merged, word[1:].split("."), word)
            elif value.strip() == "null" and _holder(merged, name.split(".")) is not None:
                _take_out(merged, name.split("."), word)
            else:
                merged = _plain(OmegaConf.merge(merged, OmegaConf.from_dotlist([word])))
        config = OmegaConf.create(merged)
    except (OmegaConfBaseException, TypeError, ValueError, LookupError) as error:
        if isinstance(error, LdmError):
            raise
        what = ", ".join(map(shown, words or map(str, files)))
        raise UsageError(f"{what:.160} cannot be laid over the configuration: {first_line(error)}") from error
    return OmegaConf.create(resolved(config))


def _check_word(word: str) -> None:
    """Raise UsageError for what is neither a.b=c nor ~a.b."""
    name, equals, value = word.partition("=")
    is_deletion = word.startswith("~")
    if is_deletion == bool(equals) or not all(part.strip() for part in name.removeprefix("~").split(".")):
        raise UsageError(
            f"wanted a.b=c to override the configuration or ~a.b to take a value out, got {shown(word)}"
        )
    check_yaml(value, shown(word), is_file=False)


def _plain(config: Any) -> dict[str, Any]:
    from omegaconf import OmegaConf

    return OmegaConf.to_container(config, resolve=False)


def _drop_params(earlier: Any, later: Any, file: str, place: str = "") -> None:
    """Take the params out of `earlier` wherever `later` names another target."""
    if not (isinstance(earlier, dict) and isinstance(later, dict)):
        return
    if "target" in later and earlier.get("target", later["target"]) != later["target"]:
        if earlier.pop("params", None):
            logger.info(
                "%s: '%s' is %s now; the params of %s are left out",
                file,
                place,
                later["target"],
                earlier["target"],
            )
    for key, value in later.items():
        _drop_params(earlier.get(key), value, file, f"{place}.{key}" if place else str(key))


def _holder(config: Any, way: list[str]) -> dict[str, Any] | None:
    """Find the mapping that has the last name of a way; None if there is none."""
    for name in way[:-1]:
        config = config.get(name) if isinstance(config, dict) else None
    return config if isinstance(config, dict) and way[-1] in config else None


def _take_out(config: dict[str, Any], way: list[str], word: str) -> None:
    holder = _holder(config, way)
    if holder is None:
        raise UsageError(f"{shown(word)} takes out what is not there; look at the names in the configuration")
    del holder[way[-1]]
