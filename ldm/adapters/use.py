"""Adapters of a request: whether they fit a model, and what of each is attached to which network."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ldm import options
from ldm.adapters.attention_control import AttentionControl
from ldm.adapters.embedding import Embedding
from ldm.adapters.freeu import FreeU
from ldm.adapters.guidance import PAG, SAG
from ldm.adapters.lora import LoRA
from ldm.adapters.seamless import SeamlessTiling
from ldm.adapters.slicing import AttentionSlicing
from ldm.errors import MismatchError, UsageError, escaped, shown
from ldm.limits import ADAPTERS
from ldm.modules.diffusionmodules.model import Decoder, Encoder
from ldm.modules.encoders.extra_tokens import ExtraTokens
from ldm.modules.encoders.modules import FrozenCLIPEmbedder
from ldm.modules.seams import Change, Rank, StepInfo, Undo, attached, fill


def check_adapters(model: nn.Module, adapters: Any) -> tuple[Any, ...]:
    """Return adapters that fit a LatentDiffusion, in their order.

    Raises:
        UsageError: no sequence of adapters, too many, two that go by the same name in a prompt or slice attention, of
            which one would do nothing, or one that this model's networks cannot take.
        MismatchError: a LoRA with modules that the model does not have, or an embedding of another width.
    """
    if isinstance(adapters, str | os.PathLike) or not isinstance(adapters, Sequence):
        raise UsageError(
            f"adapters must be a list such as [LoRA('style.safetensors', 0.8)] of ldm.adapters, got {shown(adapters)}"
        )
    if len(adapters) > ADAPTERS[1]:
        raise UsageError(f"at most {ADAPTERS[1]} adapters work together, got {len(adapters)}")
    for one in adapters:
        if isinstance(one, LoRA):
            one.deltas(model)
        elif isinstance(one, Embedding):
            continue  # together, below
        elif hasattr(one, "rank") and any(callable(getattr(one, way, None)) for way in ("attach", "changes")):
            getattr(one, "check", lambda unet: None)(model.model.diffusion_model)
        else:
            hint = "; a file is LoRA(file) or Embedding(file)" if isinstance(one, str | os.PathLike) else ""
            raise UsageError(
                f"adapters must be those of ldm.adapters, or have a rank and attach or changes, got {shown(one)}{hint}"
            )
    if sum(isinstance(one, AttentionSlicing) for one in adapters) > 1:
        raise UsageError(
            "AttentionSlicing is given twice, in adapters or as attention_slicing; leave one out"
        )
    PromptWords.of(model, adapters)
    return tuple(adapters)


def check_hints(adapters: Iterable[Any], images: int) -> None:
    """Raise UsageError where the hints of an adapter do not go round evenly among so many images of a request."""
    for one in adapters:
        if hasattr(one, "hint") and hasattr(one.hint, "check_rows"):
            one.hint.check_rows(images)


def for_part(adapters: Iterable[Any], size: tuple[int, int], box: tuple[int, int, int, int]) -> list[Any]:
    """Give attachments as they are for a box of a picture of (width, height): of hints what lies in it."""
    return [one.of_part(size, box) if hasattr(one, "of_part") else one for one in adapters]


def check_parts(request: Any) -> None:
    """Raise UsageError where a request paints a part of a picture at a time, and an adapter's mask is of all of it."""
    if request.part_of(0) is None:
        return
    for one in request.adapters:
        if getattr(one, "mask", None):
            option = "inpaint_full_res" if request.tiles is None else "upscale_by"
            raise UsageError(
                f"{option} paints a part of the picture at a time, and the mask of {type(one).__name__} is of all of "
                "it; leave one of them out"
            )


def is_of_places(one: Any) -> bool:
    """Tell whether an adapter knows the places of a picture: by a hint, a mask, or control of where it attends."""
    return hasattr(one, "hint") or bool(getattr(one, "mask", None)) or isinstance(one, AttentionControl)


OF_OPTIONS: dict[str, Callable[[Any], Any]] = {
    "freeu": lambda factors: FreeU(*factors),
    "pag_scale": PAG,
    "sag_scale": SAG,
    "tiling": lambda _: SeamlessTiling(),
    "attention_slicing": lambda _: AttentionSlicing(),
}


def adapters_of(values: Mapping[str, Any]) -> list[Any]:
    """Make the adapters that options stand for, of their checked values by name; at its default one stands for none."""
    return [
        OF_OPTIONS[one.name](values[one.name])
        for one in options.options()
        if one.section == "network"
        and one.keyword
        and one.kind.plain(values[one.name]) != one.kind.plain(one.default)
    ]


def described(adapters: Iterable[Any]) -> list[dict[str, Any]]:
    """Say what of adapters goes into a picture's metadata: the kind of each, and what it says of itself."""
    return [
        {"kind": type(one).__name__, **getattr(one, "describe", lambda one=one: {"is": shown(one)})()}
        for one in adapters
    ]


def unet_attachments(adapters: Iterable[Any]) -> list[Any]:
    """List what is attached to the UNet."""
    return [one for one in adapters if not isinstance(one, Embedding)]


def for_batch(model: nn.Module, request: Any, batch: Sequence[Any]) -> list[Any]:
    """Give a request's attachments for one batch, which may be a part of one that did not fit into memory.

    Those with hints (`of_images`) have those of its images, and those that look at its prompts (`for_batch`) are told
    them.

    Args:
        request, batch: an ldm.request.Request and some of its images.

    Raises:
        UsageError: prompts that one of them does not take.
    """
    places = [spec.place for spec in batch]
    adapters = [one.of_images(places) if hasattr(one, "of_images") else one for one in request.attachments]
    looking = [one for one in adapters if hasattr(one, "for_batch")]
    if not looking:
        return adapters
    if request.embeds is not None or request.prompt_syntax != "plain":
        raise UsageError(
            f"{type(looking[0]).__name__} looks at the words of plain prompts; leave prompt_embeds and prompt_syntax "
            "out"
        )
    return told_of(model, adapters, [spec.prompt for spec in batch], [spec.seed for spec in batch])


def told_of(
    model: nn.Module, adapters: Sequence[Any], prompts: Sequence[str], seeds: Sequence[int]
) -> list[Any]:
    """Tell adapters that look at the prompts of a batch (`for_batch`) what they are, and which seeds pictures have.

    Raises:
        UsageError: prompts that one of them does not take.
    """
    with prompt_reader(model, adapters) as encoder:
        return [
            one.for_batch(encoder, prompts, seeds) if hasattr(one, "for_batch") else one for one in adapters
        ]


@contextlib.contextmanager
def prompt_reader(model: nn.Module, adapters: Sequence[Any]) -> Iterator[FrozenCLIPEmbedder]:
    """Let a model's text encoder read the names of embeddings in prompts, until the end of the block; gives it.

    Raises:
        UsageError: the model has another encoder than CLIP's.
    """
    encoder, words = _encoder_of(model), PromptWords.of(model, adapters)
    with attached(encoder, *([] if words is None else [_Names(words.tokens)])):
        yield encoder


def looks_at_batches(adapters: Iterable[Any]) -> bool:
    """Tell whether pictures of a batch depend on each other, so that it cannot be halved."""
    return any(hasattr(one, "for_batch") for one in adapters)


def begun(attachment: Any) -> Any:
    """Give one for one run of a sampler, which is at a step of its own."""
    return getattr(attachment, "begin", lambda: attachment)()


def text_scope(model: nn.Module, adapters: Sequence[Any]) -> contextlib.AbstractContextManager[None]:
    """Let a model encode prompts with its LoRAs and embeddings, within each `with` block of what is returned.

    Weights are folded when the first block is entered, a vocabulary with the vectors of embeddings among them, and are
    known in those that follow.
    """
    words = PromptWords.of(model, adapters)
    parts = [one for one in adapters if isinstance(one, LoRA)] + ([] if words is None else words.attachments)
    return attached(model.cond_stage_model, *parts) if parts else contextlib.nullcontext()


@contextlib.contextmanager
def vae_scope(model: nn.Module, adapters: Sequence[Any]) -> Iterator[None]:
    """Let a model's autoencoder compute with the adapters that are for it, too, until the end of the block."""
    parts = [one for one in adapters if getattr(one, "is_for_vae", False)]
    with contextlib.ExitStack() as stack:
        for half in model.first_stage_model.modules() if parts else ():
            if isinstance(half, Encoder | Decoder):
                stack.enter_context(attached(half, *parts))
        yield


@dataclass(frozen=True)
class PromptWords:
    """Embeddings as words of a prompt: their vectors behind the vocabulary's, and their names.

    Attributes:
        embeddings: in the order of their vectors.
        tokens: their names' token numbers.
        attachments: to attach to the text encoder.
    """

    embeddings: tuple[Embedding, ...]
    tokens: ExtraTokens
    attachments: list[Any]

    @classmethod
    def of(cls, model: nn.Module, adapters: Iterable[Any]) -> PromptWords | None:
        """Make the words of the embeddings among some adapters; None if there are none.

        Raises:
            UsageError: the model has no text encoder for them, or two go by the same token.
            MismatchError: vectors of another width.
        """
        embeddings = tuple(one for one in adapters if isinstance(one, Embedding))
        if not embeddings:
            return None
        encoder = _encoder_of(model)
        name, table = _table_of(encoder)
        names: dict[tuple[int, ...], tuple[str, list[int]]] = {}
        owners: dict[tuple[int, ...], Embedding] = {}
        first = len(table)
        for embedding in embeddings:
            if embedding.vectors.shape[1] != table.shape[1]:
                raise MismatchError(
                    f"'{escaped(embedding.file)}' has vectors of width {embedding.vectors.shape[1]}, the text "
                    f"encoder's have width {table.shape[1]}"
                )
            numbers = list(range(first, first + len(embedding.vectors)))
            first += len(embedding.vectors)
            for word in embedding.names:
                ids = tuple(encoder.tokenizer(word, add_special_tokens=False)["input_ids"])
                owner = owners.setdefault(ids, embedding)
                if owner is embedding:
                    names[ids] = (word, numbers)
                elif word == embedding.token:
                    raise UsageError(
                        f"'{escaped(owner.file)}' and '{escaped(embedding.file)}' both go by {shown(word)} in a "
                        "prompt; give one another token"
                    )
        tokens = ExtraTokens(names)
        vectors = torch.cat([embedding.vectors for embedding in embeddings])
        return cls(embeddings, tokens, [_Vectors(name, vectors), _Names(tokens)])

    def unnamed(self, encoder: FrozenCLIPEmbedder, prompts: Iterable[str]) -> list[Embedding]:
        """List the embeddings that none of these prompts names."""
        found: set[int] = set()
        with attached(encoder, _Names(self.tokens)):
            for prompt in dict.fromkeys(prompts):
                found.update(encoder.word_ids(prompt))
        unnamed, number = [], len(_table_of(encoder)[1])
        for embedding in self.embeddings:
            if number not in found:
                unnamed.append(embedding)
            number += len(embedding.vectors)
        return unnamed


def token_width(model: nn.Module) -> int:
    """Give the width of the vectors that words become in a model.

    Raises:
        UsageError: the model has no text encoder for embeddings.
    """
    return _table_of(_encoder_of(model))[1].shape[1]


def _encoder_of(model: nn.Module) -> FrozenCLIPEmbedder:
    encoder = model.cond_stage_model
    if not isinstance(encoder, FrozenCLIPEmbedder):
        raise UsageError(
            f"embeddings and control of attention to words are for CLIP's text encoder, this model has a "
            f"{type(encoder).__name__}; leave them out"
        )
    return encoder


def _table_of(encoder: FrozenCLIPEmbedder) -> tuple[str, Tensor]:
    """Find the vocabulary's vectors, (tokens, width), and their name among the encoder's parameters."""
    name = next(name for name, _ in encoder.named_parameters() if name.endswith("token_embedding.weight"))
    return name, encoder.get_parameter(name)


class _Vectors:
    """Vectors behind those of a vocabulary, as an attachment."""

    rank = Rank.WEIGHTS

    def __init__(self, name: str, vectors: Tensor):
        self._changes = {name: Change(lambda table: torch.cat([table, vectors.to(table)]))}

    def changes(self, network: nn.Module) -> dict[str, Change]:
        return self._changes

    def at(self, step: StepInfo) -> None:
        """Do nothing: prompts are encoded before the first step."""


class _Names:
    """Names of embeddings, as an attachment."""

    rank = Rank.ATTENTION

    def __init__(self, tokens: ExtraTokens):
        self._tokens = tokens

    def attach(self, network: nn.Module) -> Undo:
        return fill(network, "extra_tokens", self._tokens)

    def at(self, step: StepInfo) -> None:
        """Do nothing: prompts are encoded before the first step."""
