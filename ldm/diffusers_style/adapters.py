"""diffusers' words for LoRA and textual inversion: names of adapters over what `ldm.StableDiffusion.adapters` holds."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ldm.adapters import Embedding, FreeU, LoRA
from ldm.adapters.use import check_adapters, token_width
from ldm.errors import AbsentError, UsageError, nearest, refuse_elsewhere, shown
from ldm.pipeline import StableDiffusion

log = logging.getLogger(__name__)

DEFAULT_LORA, DEFAULT_EMBEDDING = "pytorch_lora_weights.safetensors", "learned_embeds.bin"
SUFFIXES = (".safetensors", ".bin", ".pt")


class Adapters:
    """The part of a pipeline that loads and names adapters, by diffusers' methods.

    Attributes:
        sd: what paints; its `adapters` hold those that are active.
    """

    sd: StableDiffusion

    def __init__(self) -> None:
        self._loras: dict[str, LoRA] = {}
        self._fused: list[LoRA] = []

    # --- FreeU ---

    def enable_freeu(self, s1: float, s2: float, b1: float, b2: float) -> None:
        """Paint with FreeU from now on, in place of one that was enabled; see ldm.adapters.FreeU.

        Raises:
            UsageError: a factor out of range.
        """
        freeu = FreeU(b1, b2, s1, s2)
        check_adapters(self.sd.model, [freeu])
        self.disable_freeu()
        self.sd.adapters.append(freeu)

    def disable_freeu(self) -> None:
        """Paint without FreeU."""
        self.sd.adapters[:] = [one for one in self.sd.adapters if not isinstance(one, FreeU)]

    # --- LoRA ---

    def load_lora_weights(
        self,
        pretrained_model_name_or_path_or_dict: str | os.PathLike,
        weight_name: str | None = None,
        adapter_name: str | None = None,
        **others: Any,
    ) -> None:
        """Load a LoRA. The first is active at once; of several, set_adapters says which are.

        Args:
            pretrained_model_name_or_path_or_dict: a file of any program, or a folder.
            weight_name: the file in the folder; default: diffusers' own name, or the only one that is there.
            adapter_name: what it is called; default "default_0" and on.

        Raises:
            UsageError: a name that is used, or another option. As LoRA; MismatchError: it is for another model.
        """
        self._refuse("load_lora_weights", others)
        path = _file_of("a LoRA", pretrained_model_name_or_path_or_dict, weight_name, DEFAULT_LORA)
        name = f"default_{len(self._loras)}" if adapter_name is None else adapter_name
        if not isinstance(name, str) or name in self._loras:
            raise UsageError(f"adapter_name should be a name that no LoRA has yet, got {shown(name)}")
        lora = LoRA(path)
        check_adapters(self.sd.model, [lora])
        if self._loras:
            log.warning(
                "%s is loaded; which LoRAs are active, set_adapters says: pipe.set_adapters(%s)",
                name,
                [*self._loras, name],
            )
        else:
            self.sd.adapters.append(lora)
        self._loras[name] = lora

    def set_adapters(
        self,
        adapter_names: str | Sequence[str],
        adapter_weights: float | Mapping[str, float] | Sequence[float | Mapping[str, float]] | None = None,
    ) -> None:
        """Make LoRAs active, and all others not.

        Args:
            adapter_names: as load_lora_weights has them.
            adapter_weights: the strength of all, or of each; None = 1. A dict has "unet" and "text_encoder", 1 if
                left out.

        Raises:
            UsageError: an unknown name, another number of strengths, or one that is no number.
        """
        names = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)
        several = isinstance(adapter_weights, Sequence) and not isinstance(adapter_weights, str)
        weights = list(adapter_weights) if several else [adapter_weights] * len(names)
        if len(weights) != len(names):
            raise UsageError(
                f"adapter_weights should be one number, or one for each of {len(names)} adapters, got {len(weights)}"
            )
        changed: dict[str, LoRA] = {}
        for name, weight in zip(names, weights, strict=True):
            changed[name] = self._at(self._named(name), weight)
        self._take_off(self._loras.values())
        self._loras |= changed
        self.sd.adapters += changed.values()

    @staticmethod
    def _at(lora: LoRA, weight: Any) -> LoRA:
        if isinstance(weight, Mapping):
            if unknown := [part for part in weight if part not in ("unet", "text_encoder")]:
                raise UsageError(
                    f"strengths are for 'unet' and 'text_encoder' here, got {shown(unknown[0])}; for blocks see "
                    "ldm.adapters.LoRA"
                )
            return replace(lora, weight=weight.get("unet", 1.0), text_weight=weight.get("text_encoder", 1.0))
        return replace(lora, weight=1.0 if weight is None else weight, text_weight=None)

    def _named(self, name: Any) -> LoRA:
        if name not in self._loras:
            near = nearest(name, self._loras)
            hint = f"did you mean {near!r}?" if near else f"there are {', '.join(self._loras) or 'none'}"
            raise UsageError(f"no LoRA is called {shown(name)}; {hint}")
        return self._loras[name]

    def _take_off(self, adapters: Any) -> None:
        off = list(adapters)
        self.sd.adapters[:] = [one for one in self.sd.adapters if one not in off]

    def delete_adapters(self, adapter_names: str | Sequence[str]) -> None:
        """Forget LoRAs by name."""
        names = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)
        loras = [self._named(name) for name in names]
        self._take_off(loras)
        self._loras = {name: one for name, one in self._loras.items() if name not in names}

    def get_active_adapters(self) -> list[str]:
        """List the LoRAs that paint."""
        names = {lora: name for name, lora in self._loras.items()}
        return [names[one] for one in self.sd.adapters if one in names]

    def get_list_adapters(self) -> dict[str, list[str]]:
        """List the loaded LoRAs of each network."""
        parts: dict[str, list[str]] = {}
        for name, lora in self._loras.items():
            networks = {network for _, network, _ in lora.places(self.sd.model)}
            for part, network in (("unet", "unet"), ("text_encoder", "text")):
                if network in networks:
                    parts.setdefault(part, []).append(name)
        return parts

    def unload_lora_weights(self) -> None:
        """Forget all LoRAs. The model is what it was, bit for bit; what was fused before keeps painting, as there."""
        self._take_off(one for one in self._loras.values() if one not in self._fused)
        self._loras = {}

    def fuse_lora(
        self, components: Any = None, lora_scale: float = 1.0, safe_fusing: bool = False, **others: Any
    ) -> None:
        """Say that nothing needs fusing here: a LoRA that is active costs no time after the first step.

        Until unfuse_lora, unload_lora_weights leaves those that are active now in place.

        Raises:
            UsageError: another lora_scale than 1, or another option.
        """
        self._refuse("fuse_lora", others)
        if lora_scale != 1:
            raise UsageError(
                f"fuse_lora has lora_scale 1 here, got {shown(lora_scale)}; set_adapters(name, weight) sets strengths"
            )
        self._fused = [self._loras[name] for name in self.get_active_adapters()]
        log.warning("nothing needs fusing here: an active LoRA costs no time after the first step")

    def unfuse_lora(self, components: Any = None, **others: Any) -> None:
        """Undo fuse_lora: LoRAs that were unloaded after it no longer paint."""
        self._refuse("unfuse_lora", others)
        self._take_off(one for one in self._fused if one not in self._loras.values())
        self._fused = []

    # --- textual inversion ---

    def load_textual_inversion(
        self,
        pretrained_model_name_or_path: str | os.PathLike | Sequence[str | os.PathLike],
        token: str | Sequence[str] | None = None,
        weight_name: str | None = None,
        **others: Any,
    ) -> None:
        """Load embeddings, which stand in prompts by their names from now on.

        Args:
            pretrained_model_name_or_path: a file, a folder with weight_name in it, or a list of them.
            token: their names; default: those of the files.

        Raises:
            UsageError: a name that is used, or not as many names as files. As Embedding.
        """
        self._refuse("load_textual_inversion", others)
        several = isinstance(pretrained_model_name_or_path, list | tuple)
        files = list(pretrained_model_name_or_path) if several else [pretrained_model_name_or_path]
        tokens = list(token) if isinstance(token, list | tuple) else [token] * len(files)
        if len(tokens) != len(files):
            raise UsageError(f"token should be one name for each of {len(files)} files, got {len(tokens)}")
        width = token_width(self.sd.model)
        loaded = [
            Embedding(_file_of("an embedding", file, weight_name, DEFAULT_EMBEDDING), name, width)
            for file, name in zip(files, tokens, strict=True)
        ]
        check_adapters(self.sd.model, [*self.sd.adapters, *loaded])
        self.sd.adapters += loaded

    def unload_textual_inversion(self, tokens: str | Sequence[str] | None = None) -> None:
        """Forget embeddings, all or those of these names.

        Raises:
            UsageError: an unknown name.
        """
        there = {one.token: one for one in self.sd.adapters if isinstance(one, Embedding)}
        names = list(there) if tokens is None else [tokens] if isinstance(tokens, str) else list(tokens)
        if unknown := [name for name in names if name not in there]:
            raise UsageError(
                f"no embedding is called {shown(unknown[0])}; there are {', '.join(there) or 'none'}"
            )
        self._take_off(there[name] for name in names)

    @staticmethod
    def _refuse(method: str, others: Mapping[str, Any]) -> None:
        """Refuse further options that are set; those that say what is so here anyway pass."""
        for name, value in others.items():
            if value is not None and name not in ("local_files_only", "low_cpu_mem_usage", "use_safetensors"):
                raise UsageError(f"{method} has no option '{name:.60}' here; leave it out")


def _file_of(what: str, where: Any, name: str | None, usual: str) -> Path:
    """Find a file by itself, or in a folder."""
    if not isinstance(where, str | os.PathLike):
        raise UsageError(f"{what} is loaded from a file or folder here, got {shown(where)}")
    refuse_elsewhere(what, where)
    path = Path(where)
    if not path.is_dir():
        return path
    if name is None:
        names = sorted(one.name for one in path.iterdir() if one.suffix in SUFFIXES)
        name = usual if usual in names or len(names) != 1 else names[0]
    if not (path / name).is_file():
        raise AbsentError(f"folder '{path}' has no {shown(name)}; name the file with weight_name=")
    return path / name
