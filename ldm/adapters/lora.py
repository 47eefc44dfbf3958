"""LoRA and its kin: files are read with every tensor accounted for, and become changes of a model's parameters.

    lora = LoRA("style.safetensors", weight=0.8)
    lora.deltas(model)                                      # parameter name -> function of W that gives W'
    with attached(model, lora, LoRA("face.safetensors")):   # ldm.modules.seams: folded in this order
        ...

Nothing here touches a model; how changed weights get into it, and out again, is the business of `ldm.modules.seams`.
"""

import json
import logging
import math
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, ClassVar
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from ldm.adapters import lora_weights
from ldm.adapters.file_hash import hashes_of, stamp_of
from ldm.adapters.lora_keys import MAGNITUDE, Key, Network, foreign_base, module_names, split_key
from ldm.adapters.lora_weights import Family, UnfitError
from ldm.checkpoints import LoadReport, TensorInfo, Weights, open_weights
from ldm.checkpoints.families import REFUSED, family_of
from ldm.checkpoints.files import require_float
from ldm.checkpoints.folders import read_json
from ldm.checkpoints.key_mapping import TEXT, UNET
from ldm.checkpoints.matching import LEFT_OUT, check_patterns, fits
from ldm.checkpoints.report import first_few
from ldm.checkpoints.safe import check_memory
from ldm.checkpoints.tensors import check_finite
from ldm.errors import FormatError, MismatchError, UsageError, escaped, shown
from ldm.modules.seams import Change, Rank, StepInfo
from ldm.values import Range, check_value

logger = logging.getLogger(__name__)

NUMBERS = ("alpha", "scale", "on_input")  # roles that are one number, of whatever dtype

# The blocks of a UNet of Stable Diffusion v1 as people count them; BASE is the text encoder.
BLOCKS = ("BASE", *(f"IN{n:02d}" for n in range(12)), "M00", *(f"OUT{n:02d}" for n in range(12)))
_WITHOUT_ATTENTION = {"IN00", "IN03", "IN06", "IN09", "IN10", "IN11", "OUT00", "OUT01", "OUT02"}
ATTENTION_BLOCKS = tuple(block for block in BLOCKS if block not in _WITHOUT_ATTENTION)
_BLOCK = re.compile(r"(?:model\.diffusion_model\.)?(?:(input|output)_blocks\.(\d+)|middle_block)\.")


@dataclass(frozen=True)
class ModuleChange:
    """What a file holds for one module.

    Attributes:
        module: as the file names it.
        network, body: as `lora_keys.Key` has them.
        family: how it changes the weight.
        parts: role -> tensor, in the file's dtype.
        keys: role -> key in the file.
    """

    module: str
    network: Network | None
    body: str
    family: Family
    parts: dict[str, Tensor]
    keys: dict[str, str]


WeightFunction = Callable[[Tensor], Tensor]


@torch.no_grad()
def _changed(delta: WeightFunction, strength: float, weight: Tensor) -> Tensor:
    """W + strength * dW, computed in float32 and given in W's dtype; float64 is kept for the sum."""
    wide = weight.detach().to(torch.float64 if weight.dtype is torch.float64 else torch.float32, copy=True)
    return wide.add_(delta(wide.float()), alpha=strength).to(weight.dtype)


class LoraFile:
    """A LoRA's file: LoRA, LoCon, LoHa, LoKr, DoRA, GLoRA, IA3, OFT, BOFT, or whole differences, by any program.

    Attributes:
        path, name: the file, and its name without folder and suffix.
        modules: what it holds, module by module.
        ignored: key -> why it is left out.
        metadata: what the file says of itself (`ss_*` of kohya's, `modelspec.*`).
        notes: what is odd about it and harmless.

    Args:
        path: a safetensors file or one of torch.save; nothing in it can run code.
        ignore: keys that are left out: their beginnings, or shell patterns.

    Raises:
        UsageError: a path or pattern of another kind.
        AbsentError, FormatError, UnsafeFileError: the file cannot be read; see `open_weights`.
        MismatchError: it is for another base model, no LoRA, or has keys or shapes that make no sense.
        NumericError: a weight is not finite.
    """

    def __init__(self, path: str | os.PathLike, ignore: str | Iterable[str] = ()):
        patterns = check_patterns(ignore)
        self.path = os.fspath(check_value(path, str | os.PathLike, "a LoRA's file"))
        self.name = Path(self.path).stem
        self.ignored: dict[str, str] = {}
        self.notes: list[str] = []
        self._stamp = stamp_of(self.path)
        weights = open_weights(self.path)
        try:
            self.metadata = weights.metadata
            self.notes += weights.notes
            self.is_safetensors = weights.kind == "safetensors"
            infos = self._leave_out(weights.infos, patterns)
            keys = self._keys(infos)
            check_memory(self.path, sum(info.nbytes for info in infos.values()))
            self.modules = self._read(weights, keys)
        finally:
            weights.close()
        self._note_stopped()

    def __repr__(self) -> str:
        return f"LoraFile({escaped(self.path)}: {len(self.modules)} modules)"

    def misfit(self, why: str) -> MismatchError:
        """An error that begins with the file's name."""
        return MismatchError(f"'{escaped(self.path)}': {why}")

    def _leave_out(self, infos: Mapping[str, TensorInfo], patterns: tuple[str, ...]) -> dict[str, TensorInfo]:
        for pattern in patterns:
            found = [name for name in infos if fits(name, pattern)]
            self.ignored.update(dict.fromkeys(found, LEFT_OUT))
            if not found:
                self.notes.append(f"ignore '{escaped(pattern, 60)}' fits no tensor of the file")
        return {name: info for name, info in infos.items() if name not in self.ignored}

    def _keys(self, infos: Mapping[str, TensorInfo]) -> dict[str, Key]:
        """Take all keys apart; MismatchError for what is no LoRA of Stable Diffusion v1, by its name."""
        family = family_of(infos)
        alike = family in ("LoRA", "unknown") or any(has_own_role(name) for name in infos)
        if not alike or family in ("IP-Adapter", "ControlNet"):  # which may hold factors of their own
            words = REFUSED.get(family, "a full Stable Diffusion v1 model")
            raise self.misfit(f"a LoRA was wanted, and this is {words}")
        if found := foreign_base(infos):
            base, sign = found
            raise self.misfit(
                f"a LoRA for Stable Diffusion v1 was wanted, and this is one for {base} ('{escaped(sign)}')"
            )
        keys = {name: split_key(name) for name in infos}
        # "weight" is a role beside "on_input" only; elsewhere it is the end of any name.
        factors = {(key.network, key.body) for key in keys.values() if key and key.role == "on_input"}
        unknown = [
            name
            for name, key in keys.items()
            if key is None or (key.role == "weight" and (key.network, key.body) not in factors)
        ]
        if unknown:
            raise self.misfit(
                f"{len(unknown)} of {len(infos)} tensors are nothing that a LoRA is known to hold "
                f"({first_few(unknown, 2)}); leave them out with ignore="
            )
        if not infos:
            raise self.misfit("no tensors are left of a LoRA")
        return {name: key for name, key in keys.items() if key is not None}

    def _read(self, weights: Weights, found: Mapping[str, Key]) -> list[ModuleChange]:
        groups: dict[tuple[Network | None, str], dict[str, str]] = {}
        modules: dict[tuple[Network | None, str], str] = {}
        for name, key in found.items():
            modules.setdefault((key.network, key.body), key.module)
            keys = groups.setdefault((key.network, key.body), {})
            if key.role in keys:
                raise self.misfit(f"'{escaped(keys[key.role])}' and '{escaped(name)}' are the same")
            keys[key.role] = name
        alphas = _Alphas(self.path, self.metadata, list(found))
        read = []
        for (network, body), keys in groups.items():
            parts = {role: self._part(weights, name, role) for role, name in keys.items()}
            if MAGNITUDE in parts:
                parts["dora_scale"] = parts.pop(MAGNITUDE).flatten()
            module = modules[network, body]
            try:
                family = lora_weights.family_of(parts)
            except UnfitError as error:
                raise self.misfit(f"'{escaped(module)}': {error}") from None
            rank = family.rank(parts)
            if rank is not None and "alpha" not in parts:
                alpha = alphas.of(network, module, rank)
                parts |= {} if alpha is None else {"alpha": torch.tensor(alpha)}
            read.append(ModuleChange(module, network, body, family, parts, keys))
        return read

    def _part(self, weights: Weights, name: str, role: str) -> Tensor:
        info = weights.infos[name]
        if role in NUMBERS:
            if info.numel != 1:
                raise self.misfit(f"'{escaped(name)}' should be one number, and has shape {list(info.shape)}")
        else:
            require_float(self.path, name, info.dtype)
            if not info.numel:
                raise self.misfit(f"'{escaped(name)}' is empty, of shape {list(info.shape)}")
        values = weights.read(name)
        if values.is_floating_point():
            check_finite(self.path, name, values)
        return values

    def _note_stopped(self) -> None:
        stopped = [m.module for m in self.modules if lora_weights.is_stopped(m.family, m.parts)]
        if stopped:
            note = (
                f"alpha is 0 in {len(stopped)} of {len(self.modules)} modules ({first_few(stopped, 1)}), which keeps "
                "them from having any effect; kohya's programs take such an alpha for the rank"
            )
            self.notes.append(note)
            logger.warning("'%s': %s", escaped(self.path), note)

    @cached_property
    def hashes(self) -> tuple[str, str]:
        """SHA-256 of the whole file, and of what follows its header; see `file_hash.hashes_of`."""
        return hashes_of(self.path, self._stamp, self.is_safetensors)


def has_own_role(name: str) -> bool:
    """Tell whether a key ends as only a LoRA's do; "weight" and "bias" are anybody's."""
    key = split_key(name)
    return key is not None and key.role not in ("weight", "bias", "scale")


class _Alphas:
    """alpha by module where the keys have none: from diffusers' metadata, or PEFT's adapter_config.json beside."""

    def __init__(self, path: str, metadata: Mapping[str, str], names: list[str]):
        self.path = path
        self.configs: dict[str, Mapping[str, Any]] = {}
        if text := metadata.get("lora_adapter_metadata"):
            try:
                found = json.loads(text)
            except (ValueError, RecursionError) as error:
                raise FormatError(
                    f"'{escaped(path)}': its lora_adapter_metadata is not JSON: {escaped(error, 80)}"
                ) from None
            if not isinstance(found, dict):
                raise FormatError(f"'{escaped(path)}': its lora_adapter_metadata should be a JSON object")
            for key, value in found.items():
                part, _, option = key.partition(".")
                self.configs[part] = {**self.configs.get(part, {}), option: value}
        beside = Path(path).parent / "adapter_config.json"
        if not self.configs and any(name.startswith("base_model.model.") for name in names):
            self.configs = {"": read_json(beside)} if beside.is_file() else {}

    def of(self, network: Network | None, module: str, rank: int) -> float | None:
        """alpha for a module, so that the factor is alpha / rank; None where nothing is said."""
        part = {"unet": "unet", "text": "text_encoder", None: ""}[network]
        config = self.configs.get(part, self.configs.get("", {}))
        alpha = config.get("lora_alpha")
        patterns = config.get("alpha_pattern")
        for pattern, value in patterns.items() if isinstance(patterns, dict) else ():
            plain = str(pattern).removeprefix("^").removesuffix("$").replace("\\.", ".")
            if re.search(r"[^\w.]", plain):
                raise self._wrong("alpha_pattern", "names of modules", pattern)
            if f".{module}".endswith(f".{plain}"):
                alpha = value
        if alpha is None:
            return None
        if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not math.isfinite(alpha):
            raise self._wrong("lora_alpha", "a number", alpha)
        return float(alpha) * (math.sqrt(rank) if config.get("use_rslora") is True else 1.0)

    def _wrong(self, option: str, wanted: str, value: object) -> FormatError:
        return FormatError(
            f"'{escaped(self.path)}': {option} of its configuration should be {wanted}, got {shown(value)}"
        )


@dataclass(frozen=True, eq=False)
class LoRA:
    """A LoRA at a strength, for the UNet and the text encoder, for some of the steps: an attachment of the weights.

    Args:
        file: path or LoraFile; a LoraFile from then on. Reading takes most of the time, and the same LoraFile serves
            any number of LoRAs.
        weight: strength in the UNet; 1 = as trained, 0 = none, negative = the opposite.
        text_weight: strength in the text encoder; None = as the UNet's.
        start, end: share of the sampler's way, from noise (0) to picture (1), where the UNet has it. The text encoder
            works before the first step and has it always.
        blocks: factors of the strengths: 17 numbers, for BASE (the text encoder) and the blocks that have attentions,
            IN01, IN02, IN04, IN05, IN07, IN08, M00, OUT03 to OUT11, while the blocks between get 0; or 26, for BASE,
            IN00 to IN11, M00 and OUT00 to OUT11; or a dict of some of these names, while the others keep 1. A dict
            from then on. As A1111's extension lora-block-weight. What lies outside of the blocks (the embedding of
            the time, the last norm and convolution) keeps 1.

    Raises:
        UsageError: a number that is not finite or out of range, or blocks that are not so.
        Others: as LoraFile.
    """

    file: LoraFile | str | os.PathLike
    weight: float = 1.0
    text_weight: float | None = None
    start: float = 0.0
    end: float = 1.0
    blocks: Mapping[str, float] | Sequence[float] | None = None
    rank: ClassVar[Rank] = Rank.WEIGHTS

    def __post_init__(self) -> None:
        share = Range(0, 1)
        checked = {
            "weight": float(check_value(self.weight, float, "weight")),
            "text_weight": self.text_weight,
            "start": float(check_value(self.start, float, "start", share)),
            "end": float(check_value(self.end, float, "end", share)),
            "blocks": block_weights(self.blocks),
        }
        if self.text_weight is not None:
            checked["text_weight"] = float(check_value(self.text_weight, float, "text_weight"))
        if checked["start"] >= checked["end"]:
            raise UsageError(f"start should be below end, got start={self.start} and end={self.end}")
        checked["file"] = self.file if isinstance(self.file, LoraFile) else LoraFile(self.file)
        # What `changes` has given, by network and by whether the UNet has it; and where the sampler is.
        checked["_given"], checked["_progress"] = WeakKeyDictionary(), None
        for name, value in checked.items():
            object.__setattr__(self, name, value)

    def describe(self) -> dict[str, Any]:
        """Say what goes into a picture's metadata.

        Returns:
            name, weight, hash (the first 12 digits of AutoV3, which A1111 writes as "Lora hashes"), sha256; and
            text_weight, start, end and blocks where they are given.
        """
        whole, body = self.file.hashes
        found: dict[str, Any] = {"name": self.file.name, "weight": self.weight}
        usual = {"text_weight": None, "start": 0.0, "end": 1.0, "blocks": {}}
        found |= {name: getattr(self, name) for name, value in usual.items() if getattr(self, name) != value}
        return {**found, "hash": body[:12], "sha256": whole}

    def is_active(self, progress: float | None) -> bool:
        """Whether the UNet has it at this share of the sampler's way, 0 (noise) to 1 (picture); None = anywhere."""
        return progress is None or self.start <= progress < self.end or progress == self.end == 1

    def strength(self, network: Network, module: str) -> float:
        """The strength in a module, such as ("unet", "model.diffusion_model.input_blocks.1.1.proj_in")."""
        if network == "text":
            weight = self.weight if self.text_weight is None else self.text_weight
            return weight * self.blocks.get("BASE", 1.0)
        return self.weight * self.blocks.get(block_of(module), 1.0)

    def deltas(self, model: nn.Module, progress: float | None = None) -> dict[str, WeightFunction]:
        """Work out what changes in a model, by the names and shapes of its parameters.

        Args:
            model: a LatentDiffusion; or a UNetModel or a FrozenCLIPEmbedder alone, for which only what the file holds
                of that network counts.
            progress: share of the sampler's way, 0 to 1: the UNet changes only where it is active; None = always.

        Returns:
            Parameter name -> a function of W, of any dtype, that gives W' in this dtype, computed in float32.
            Parameters that stay as they are, because a strength is 0 or the file has nothing for them, are left out.

        Raises:
            MismatchError: a module of the file is not in the model, or of another shape there.
        """
        functions: dict[str, WeightFunction] = {}
        for change, network, module in self.places(model):
            strength = self.strength(network, module)
            if strength == 0 or (network == "unet" and not self.is_active(progress)):
                continue
            if lora_weights.changes_weight(change.family, change.parts):
                delta = partial(lora_weights.weight_delta, change.family, change.parts)
                functions[f"{module}.weight"] = partial(_changed, delta, strength)
            bias = lora_weights.bias_delta(change.parts)
            if bias is not None:
                functions[f"{module}.bias"] = partial(_changed, partial(_bias_like, bias), strength)
        return functions

    def places(self, model: nn.Module) -> list[tuple[ModuleChange, Network, str]]:
        """Pair what the file holds with a model's networks and modules.

        Raises: as deltas.
        """
        return _placed(self.file, model)

    def report(self, model: nn.Module) -> LoadReport:
        """Say what becomes of every tensor of the file in a model.

        Raises: as deltas.
        """
        file = self.file
        report = LoadReport(file.path, "LoRA", ignored=dict(file.ignored), notes=list(file.notes))
        for change, _, module in self.places(model):
            for role, key in change.keys.items():
                report.assigned[key] = f"{module}.{'bias' if role in lora_weights.OF_BIAS else 'weight'}"
        return report

    def begin(self) -> "LoRA":
        """Return one for one run of a sampler, which stands at a step of its own; folded weights are shared."""
        run = replace(self)
        object.__setattr__(run, "_given", self._given)
        return run

    def check(self, network: nn.Module) -> None:
        """Raise MismatchError if it does not fit a network."""
        self.deltas(network)

    def changes(self, network: nn.Module) -> Mapping[str, Change]:
        """The same as `deltas`, at the sampler's step, as `ldm.modules.seams.attached` wants it."""
        given = self._given.setdefault(network, {})
        active = self.is_active(self._progress)
        if active not in given:
            functions = self.deltas(network, self._progress)
            others = given.get(not active, {})
            # Those of the text encoder are the same at every step, and their weights stay folded.
            given[active] = {name: others.get(name) or Change(one) for name, one in functions.items()}
        return given[active]

    def at(self, step: StepInfo) -> None:
        """Learn where the sampler is."""
        object.__setattr__(self, "_progress", step.index / max(1, step.total))


def block_of(module: str) -> str | None:
    """The block of the UNet that a module lies in: "IN00", "M00", "OUT11"; None outside of them."""
    found = _BLOCK.match(module)
    if found is None:
        return None
    return f"{'IN' if found[1] == 'input' else 'OUT'}{int(found[2]):02d}" if found[1] else "M00"


def block_weights(blocks: Mapping[str, float] | Sequence[float] | None) -> dict[str, float]:
    """Bring factors of blocks, as LoRA takes them, into a dict of those that are given.

    Raises:
        UsageError: another number of factors, an unknown block, or a factor that is no finite number.
    """
    if blocks is None:
        return {}
    if isinstance(blocks, Mapping):
        given = {str(name).upper(): factor for name, factor in blocks.items()}
        unknown = [name for name in given if name not in BLOCKS]
        if unknown:
            raise UsageError(
                f"blocks should be of BASE, IN00 to IN11, M00 and OUT00 to OUT11, got {shown(unknown[0])}"
            )
    else:
        numbers = check_value(blocks, Sequence[float], "blocks")
        names = {len(ATTENTION_BLOCKS): ATTENTION_BLOCKS, len(BLOCKS): BLOCKS}.get(len(numbers))
        if names is None:
            why = "; 12 and 20 are those of Stable Diffusion XL" if len(numbers) in (12, 20) else ""
            raise UsageError(
                f"blocks should be {len(ATTENTION_BLOCKS)} or {len(BLOCKS)} numbers, got {len(numbers)}{why}"
            )
        given = {**dict.fromkeys(BLOCKS, 0.0), **dict(zip(names, numbers, strict=True))}
    return {name: float(check_value(factor, float, f"blocks {name}")) for name, factor in given.items()}


def _placed(file: LoraFile, model: nn.Module) -> list[tuple[ModuleChange, Network, str]]:
    """Pair what a file holds with the modules of a model, or say in one error what does not pair."""
    parameters = {name: tuple(value.shape) for name, value in model.named_parameters()}
    names = module_names(tuple(parameters))
    alone = None
    if not any(name.startswith((UNET, TEXT)) for name in parameters):
        alone = next(iter(names.has)) if len(names.has) == 1 else None
    pairs, absent = [], []
    taken: dict[str, str] = {}
    for change in file.modules:
        found = names.find(change.network, change.body)
        if found is None:
            if alone is None or change.network in (alone, None):
                absent.append(change)
            continue
        network, module = found
        if module in taken:
            raise file.misfit(f"'{escaped(taken[module])}' and '{escaped(change.module)}' are both {module}")
        taken[module] = change.module
        try:
            _check_shapes(change, module, parameters)
        except UnfitError as error:
            raise file.misfit(
                f"'{escaped(change.module)}' does not fit {module} of the model: {error}"
            ) from None
        pairs.append((change, network, module))
    if absent:
        advice = "leave them out with ignore=" if pairs else "it is for another model"
        if "text" not in names.has and all(change.network == "text" for change in absent):
            advice = "the model has no text encoder of Stable Diffusion v1"
        raise file.misfit(
            f"{len(absent)} of its {len(file.modules)} modules are not in the model "
            f"({first_few((change.module for change in absent), 2)}); {advice}"
        )
    return pairs


def _check_shapes(change: ModuleChange, module: str, parameters: Mapping[str, tuple[int, ...]]) -> None:
    if (weight := parameters.get(f"{module}.weight")) is None:
        raise UnfitError("it has no weight")
    if lora_weights.changes_weight(change.family, change.parts):
        lora_weights.check_fit(change.family, change.parts, weight)
    bias = lora_weights.bias_delta(change.parts)
    if bias is not None:
        shape = parameters.get(f"{module}.bias")
        if shape is None or math.prod(shape) != bias.numel():
            found = "no bias" if shape is None else f"a bias of {math.prod(shape)}"
            raise UnfitError(f"it changes a bias of {bias.numel()}, and there is {found}")


def _bias_like(change: Tensor, bias: Tensor) -> Tensor:
    return change.to(bias.device).reshape(bias.shape)
