"""The files that a picture names, found, and the model and the adapters made of them; what of it could not be, said."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ldm import options
from ldm.cli.adapters import CONTROLLED, FILELESS, HOW, lacking, told_adapters
from ldm.cli.library import Found, Library
from ldm.cli.told import NO_VAE, by_us
from ldm.errors import AbsentError, LdmError, shown

if TYPE_CHECKING:
    from ldm.pipeline import StableDiffusion

BOX = "model_data/shapes/shapes.safetensors"


@dataclass
class Account:
    """What became of a picture.

    Attributes:
        saved: where it was painted again; None where it was not.
        notes: what is worth knowing.
        lost: what could not be done as the picture says, a line each.
        verdict: how its pixels compare, where the same program wrote it; "" where they are not compared.
        is_same: whether they are the same.
    """

    saved: Path | None = None
    notes: list[str] = field(default_factory=list)
    lost: list[str] = field(default_factory=list)
    verdict: str = ""
    is_same: bool | None = None


class Files:
    """Files that pictures name; the model of the picture before is kept.

    Args:
        models, vaes, loras, embeddings: folders or files, each a list.
        device: as the scripts' --device.

    Raises:
        AbsentError: a folder or file is not there.
    """

    def __init__(
        self,
        models: Sequence[str],
        vaes: Sequence[str],
        loras: Sequence[str],
        embeddings: Sequence[str],
        device: str,
    ):
        self.models = Library("--models", models, folders=True)
        self.vaes = Library("--vae-dir", vaes)
        self.loras = Library("--loras", loras)
        self.embeddings = Library("--embeddings", embeddings)
        self.device = device
        self._box = Library("the model in the box", [_box()])
        self._loaded: tuple[Any, StableDiffusion] | None = None

    # --- the model --------------------------------------------------------------------------------

    def model(self, parameters: Mapping[str, Any], account: Account) -> StableDiffusion:
        """Load the model and the VAE that a picture names, in the precision, and optimised, as it says.

        Raises:
            AbsentError: the model is not here.
        """
        from ldm.devices import pick_device
        from ldm.pipeline import StableDiffusion

        file = self._model_file(parameters, account)
        vae = self._vae_file(parameters, account)
        ours = by_us(parameters)
        wanted = str(parameters.get("device", "")).partition(":")[0] if ours else ""
        device = self.device
        if device == "auto" and wanted in ("cpu", "cuda", "mps"):
            device = wanted
        try:
            device = pick_device(device)
        except LdmError:  # painted elsewhere
            account.notes.append(f"it was painted on {wanted}, which is not here")
            device = pick_device(None)
        dtypes, ways = (_dtypes(parameters), _ways(parameters)) if ours else ({}, [])
        key = (file, vae, device, tuple(dtypes.items()), tuple(ways))
        if self._loaded is None or self._loaded[0] != key:
            self._loaded = None  # let it go before another one comes
            load = StableDiffusion.default if file is None else StableDiffusion.from_single_file
            beside = () if file is None else (file,)
            sd = load(*beside, device=device, vae=vae, **dtypes)
            if ways:
                sd.optimize(**dict.fromkeys(set(ways) - {"fused"}, True))
            self._loaded = key, sd
        return self._loaded[1]

    def _model_file(self, parameters: Mapping[str, Any], account: Account) -> Path | None:
        """Find the model's file; None is the model in the box."""
        name, digits = (text_in(parameters.get(key)) for key in ("model", "model_hash"))
        box = self._box
        if (digits and box.find("", None, digits).is_same) or (not digits and name == box.files[0].stem):
            return None
        if name is None and digits is None:
            if len(self.models.files) != 1:
                raise AbsentError("it names no model; give the one as --models FILE")
            account.notes.append(f"it names no model; '{self.models.files[0].name}' is taken")
            return self.models.files[0]
        found = self.models.find("the model", name, digits)
        if found.path is None:
            raise AbsentError(found.note)
        _note(found, account)
        return found.path

    def _vae_file(self, parameters: Mapping[str, Any], account: Account) -> Path | None:
        name, digits = (text_in(parameters.get(key)) for key in ("vae", "vae_hash"))
        if name is None and digits is None or (name or "").lower() in NO_VAE:
            return None
        found = self.vaes.find("the VAE", name, digits)
        _note(found, account)
        return found.path

    # --- adapters ---------------------------------------------------------------------------------

    @contextlib.contextmanager
    def adapters(
        self, sd: StableDiffusion, parameters: Mapping[str, Any], values: dict[str, Any], account: Account
    ) -> Iterator[list[Any]]:
        """Make the adapters that a picture names, but for those of its prompt's tags, which are found at planning."""
        told = told_adapters(parameters)
        with tempfile.TemporaryDirectory() as folder:
            tagged = self._tagged(values, told, Path(folder), account)
            if tagged:
                values["lora_dir"] = folder
            # Those of tags come last; one of the same file may have been given beside them.
            for name in tagged:
                places = [i for i, one in enumerate(told) if _is_lora(one, name)]
                if places:
                    del told[places[-1]]
            found = [self._adapter(sd, one, values, account) for one in told]
            found += self._named_embeddings(sd, parameters, values, told, account)
            yield [one for one in found if one is not None]

    def _tagged(
        self, values: dict[str, Any], told: Sequence[Mapping[str, Any]], folder: Path, account: Account
    ) -> list[str]:
        """Put the LoRAs that the tags of a prompt name under these names into a folder; take the tags of others out.

        Returns:
            the names of all that are tags of LoRAs, as often as they are.
        """
        from ldm.prompting import tags_of

        tags = tags_of(values.get("prompt", ""), values.get(options.SYNTAX, "plain"))
        for kind, name in dict.fromkeys((tag.kind, tag.name) for tag in tags):
            if kind in ("lora", "lyco") and Path(name).name == name:
                digits = (one.get("hash") for one in told if _is_lora(one, name))
                found = self.loras.find("LoRA", name, text_in(next(digits, None)))
            else:
                found = Found(None, f"<{kind}:{name:.80}> is a tag of a kind that is not here")
            _note(found, account)
            if found.path is not None:
                _link(found.path, folder / f"{name}{found.path.suffix}")
                continue
            pattern = rf"<{re.escape(kind)}:{re.escape(name)}(:[^<>]*)?>"
            for text in values.keys() & {"prompt", "hires_prompt"}:
                values[text] = re.sub(pattern, "", values[text])
        return [tag.name for tag in tags if tag.kind in ("lora", "lyco")]

    def _adapter(
        self, sd: StableDiffusion, one: Mapping[str, Any], values: Mapping[str, Any], account: Account
    ) -> Any:
        """Make an adapter as a picture says it; None where that is not possible, which is said."""
        from ldm import adapters

        kind, name, digits = (text_in(one.get(key)) for key in ("kind", "name", "hash"))
        digits = text_in(one.get("sha256")) or digits
        try:
            if kind in FILELESS:
                return getattr(adapters, kind)(
                    **{key: _tuples(one[key]) for key in FILELESS[kind] if key in one}
                )
            if kind == "LoRA":
                found = self.loras.find(kind, name, digits)
                if "weight" not in one:
                    found = Found(None, f"LoRA {shown(name)} is named without a strength, and in no tag")
                _note(found, account)
                how = {key: one[key] for key in HOW if key in one}
                return None if found.path is None else adapters.LoRA(found.path, **how)
            if kind == "Embedding":
                found = self.embeddings.find("embedding", name, digits)
                _note(found, account)
                return (
                    None
                    if found.path is None
                    else self._embedding(sd, found.path, text_in(one.get("token")) or name)
                )
        except (LdmError, TypeError) as error:
            account.lost.append(f"{kind} {shown(name)}: {error}")
            return None
        account.lost.append(
            f"it {lacking([one], ())}"
            if kind in CONTROLLED
            else f"an adapter of kind {shown(kind)} is not known here"
        )
        return None

    @staticmethod
    def _embedding(sd: StableDiffusion, path: Path, token: str | None) -> Any:
        from ldm.adapters import Embedding
        from ldm.adapters.use import token_width

        return Embedding(path, token, token_width(sd.model))

    def _named_embeddings(
        self,
        sd: StableDiffusion,
        parameters: Mapping[str, Any],
        values: Mapping[str, Any],
        told: Sequence[Mapping[str, Any]],
        account: Account,
    ) -> list[Any]:
        """Find the embeddings that another program's prompt names and its metadata do not."""
        if by_us(parameters) or any(one.get("kind") == "Embedding" for one in told):
            return []
        texts = " ".join(str(values.get(name, "")) for name in ("prompt", "negative_prompt")).lower()
        is_comfyui = values.get(options.SYNTAX) == "comfyui"
        before = "embedding:" if is_comfyui else r"(?<!\w)"
        found = []
        for path in self.embeddings.files:
            if re.search(before + re.escape(path.stem.lower()) + r"(?!\w)", texts):
                try:
                    found.append(self._embedding(sd, path, path.stem))
                except LdmError as error:  # of another model, or none: its name is painted as words
                    account.lost.append(f"the embedding {shown(path.stem)}: {error}")
                    continue
                account.notes.append(f"the embedding {shown(path.stem)} is found by its name alone")
        return found


# --- small steps ----------------------------------------------------------------------------------


def text_in(value: Any) -> str | None:
    """Give a text that a picture says; None for anything else."""
    return value if isinstance(value, str) and value else None


def _box() -> Path:
    from ldm.paths import shipped

    return shipped(BOX)


def _is_lora(one: Mapping[str, Any], name: str) -> bool:
    return one.get("kind") == "LoRA" and one.get("name") == name


def _tuples(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _note(found: Found, account: Account) -> None:
    """Say how a file was found, where that is worth a line."""
    if found.note:
        (account.notes if found.is_same else account.lost).append(found.note)


def _link(path: Path, name: Path) -> None:
    try:
        os.symlink(path.resolve(), name)
    except OSError:  # a system without such links
        shutil.copyfile(path, name)


def _ways(parameters: Mapping[str, Any]) -> list[str]:
    """List the ways of `optimize` that one of our pictures says, but for those that need a GPU."""
    told = parameters.get("optimize")
    return [
        way
        for way in ("fused", "compile", "tiled_vae", "sliced_vae")
        if isinstance(told, list) and way in told
    ]


def _dtypes(parameters: Mapping[str, Any]) -> dict[str, Any]:
    """Give the precisions that one of our pictures says, as from_single_file takes them."""
    import torch

    names = {"dtype": parameters.get("dtype"), "vae_dtype": parameters.get("vae_dtype")}
    words = {key: str(value).partition(", autocast ") for key, value in names.items() if value is not None}
    known = {name: getattr(torch, name) for name in ("float32", "float16", "bfloat16")}
    found = {key: known[word[0]] for key, word in words.items() if word[0] in known}
    if "dtype" in words and words["dtype"][2] in known:
        found["autocast"] = known[words["dtype"][2]]
    return found
