"""Prompts to context: each program's way from weighted tokens to what the UNet is conditioned on.

The text encoder is a FrozenCLIPEmbedder, and reads each chunk (of 77 tokens, for CLIP) by itself; a prompt's chunks
follow one another, (b, 77 * chunks, width). LoRAs and embeddings that are attached to it count
(ldm.adapters.use.text_scope).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ldm.errors import UsageError, shown
from ldm.models.diffusion.conditions import Condition, rows_at
from ldm.modules.encoders.modules import FrozenCLIPEmbedder
from ldm.prompt import compel
from ldm.prompt.chunks import Chunk, Chunks
from ldm.prompt.language import Prompt

EMPHASES = ("original", "no norm", "ignore", "none", "comfyui")
MOST_WEIGHT = 1e15  # its square is still a float32
_ROWS = 16  # chunks that the encoder reads at once
_LEAST = 1e-5  # weight of compel's, so that weight 0 has a finite share


@dataclass(frozen=True)
class Conditioning:
    """A prompt as context.

    Attributes:
        parts: for each of the texts that AND joins its weight and its schedule: the last step, counted from 1, and the
            context (n, width).
    """

    parts: tuple[tuple[float, tuple[tuple[int, Tensor], ...]], ...]

    def conditions(self) -> list[Condition]:
        """List the conditions that it is made of.

        As the web UI's sampler counts, from 0: a text scheduled to end at step 2 is read at 0, 1 and 2; beyond the last
        one the first is read once more.
        """
        found = []
        for weight, schedule in self.parts:
            begin = 0
            for end, context in schedule:
                found.append(Condition(context, weight, begin, end))
                begin = max(begin, end + 1)
            found.append(Condition(schedule[0][1], weight, begin))
        return found


def encode(
    encoder: FrozenCLIPEmbedder,
    prompts: Sequence[Prompt],
    *,
    emphasis: str | None = None,
    clip_skip: int = 1,
    rows: Rows | None = None,
) -> list[Conditioning]:
    """Encode prompts that `read` gave for this encoder.

    Every distinct chunk is encoded once. The texts that one part has at different steps share the mean that "original"
    restores, and are padded with the empty prompt's chunk to the same length, as in AUTOMATIC1111.

    Args:
        emphasis: "original" (tokens times their weights, and the whole times what restores its mean), "no norm"
            (without that), "ignore", "none" (the same, of prompts read with weighted=False), "comfyui" (away from the
            empty prompt by the weight); None is the syntax's own.
        clip_skip: 1 is the last layer, 2 the one before, to the number of layers; each is normed.
        rows: of an earlier call for this encoder, whose clip_skip it has; None begins anew.

    Raises:
        UsageError: an unknown emphasis, a clip_skip that the encoder has not, or a weight that is not finite.
    """
    for prompt in prompts:
        if not isinstance(prompt, Prompt):
            raise UsageError(f"prompts should be a list of what ldm.prompt.read gives, got {shown(prompt)}")
        length = len(prompt.parts[0].schedule[0].chunks[0].ids)
        if length != encoder.max_length:
            raise UsageError(
                f"the prompt was read for {length} tokens, and this encoder takes {encoder.max_length}; read it with "
                "read(text, encoder=model.cond_stage_model)"
            )
    rows = Rows(encoder, clip_skip) if rows is None else rows
    found = []
    for prompt in prompts:
        if prompt.tree is not None and emphasis is None:
            end = prompt.parts[0].schedule[-1].end
            found.append(Conditioning(((1.0, ((end, _encode_compel(rows, prompt.tree)),)),)))
            continue
        way = emphasis or ("comfyui" if prompt.syntax == "comfyui" else "original")
        parts = []
        for part in prompt.parts:
            context = encode_chunks(encoder, [one.chunks for one in part.schedule], way, clip_skip, rows=rows)
            ends = [one.end for one in part.schedule]
            parts.append((part.weight, tuple(zip(ends, context, strict=True))))
        found.append(Conditioning(tuple(parts)))
    return found


def encode_chunks(
    encoder: FrozenCLIPEmbedder,
    texts: Sequence[Chunks],
    emphasis: str = "original",
    clip_skip: int = 1,
    *,
    rows: Rows | None = None,
) -> Tensor:
    """Encode texts together, (b, 77 * the most chunks, width); see `encode`."""
    if emphasis not in EMPHASES:
        raise UsageError(f"emphasis should be one of {', '.join(EMPHASES)}, got {shown(emphasis)}")
    rows = rows or Rows(encoder, clip_skip)
    columns = []
    for place in range(max(map(len, texts))):
        chunks = [text[place] if place < len(text) else rows.empty for text in texts]
        z = rows.states([chunk.ids for chunk in chunks])
        weights = _weights(chunks, z)
        if emphasis == "comfyui":
            away = rows.states([rows.empty.ids])
            z = torch.where(weights == 1, z, (z - away) * weights + away)
        elif emphasis not in ("ignore", "none"):
            mean = z.mean()
            z = z * weights
            z = z * (mean / z.mean()) if emphasis == "original" else z
        columns.append(z)
    return torch.cat(columns, dim=1)


def check_weights(chunks: Iterable[Chunk]) -> None:
    """Raise UsageError for a weight that is not finite, or so large that the network overflows by it."""
    for chunk in chunks:
        if not all(map(math.isfinite, chunk.weights)):
            raise UsageError("a weight in the prompt is not a finite number; write one such as 1.3")
        if max(map(abs, chunk.weights), default=0.0) > MOST_WEIGHT:
            raise UsageError(
                f"a weight in the prompt is larger than {MOST_WEIGHT:g}, brackets multiplied; write one such as 1.3"
            )


def _weights(chunks: Sequence[Chunk], like: Tensor) -> Tensor:
    """Give weights (b, 77, 1)."""
    check_weights(chunks)
    return torch.tensor([chunk.weights for chunk in chunks], dtype=like.dtype, device=like.device)[..., None]


class Rows:
    """The encoder's states of chunks, each computed once.

    Attributes:
        known: by their token numbers and their mask.
    """

    def __init__(self, encoder: FrozenCLIPEmbedder, clip_skip: int):
        layers = encoder.transformer.config.num_hidden_layers
        if isinstance(clip_skip, bool) or not isinstance(clip_skip, int) or not 1 <= clip_skip <= layers:
            raise UsageError(f"clip_skip should be a whole number from 1 to {layers}, got {shown(clip_skip)}")
        self.encoder, self.clip_skip = encoder, clip_skip
        self.known: dict[tuple, Tensor] = {}
        start, end = encoder.tokenizer.bos_token_id, encoder.tokenizer.eos_token_id
        self.length = encoder.max_length
        self.empty = Chunk((start, *[end] * (self.length - 1)), (1.0,) * self.length, used=0)

    def states(
        self, ids: Sequence[tuple[int, ...]], masks: Sequence[tuple[int, ...]] | None = None
    ) -> Tensor:
        """Encode token numbers, (b, 77, width); a mask's zeros are tokens that no other looks at."""
        keys = list(zip(ids, masks or [None] * len(ids), strict=True))
        unknown = [key for key in dict.fromkeys(keys) if key not in self.known]
        for begin in range(0, len(unknown), _ROWS):
            some = unknown[begin : begin + _ROWS]
            self.known.update(zip(some, self._encode(some), strict=True))
        return torch.stack([self.known[key] for key in keys])

    @torch.no_grad()
    def _encode(self, keys: list[tuple]) -> Tensor:
        device = self.encoder.device
        options = {}
        if masks := [mask for _, mask in keys if mask is not None]:
            options["attention_mask"] = torch.tensor(masks, device=device)
        ids = torch.tensor([ids for ids, _ in keys], device=device)
        transformer = self.encoder.transformer
        out = transformer(input_ids=ids, output_hidden_states=self.clip_skip > 1, **options)
        if self.clip_skip == 1:
            return out.last_hidden_state
        return transformer.text_model.final_layer_norm(out.hidden_states[-self.clip_skip])


def _encode_compel(rows: Rows, tree: compel.Conjunction) -> Tensor:
    """Encode compel's tree, (n, width): the texts of `.and()` one behind the other."""
    contexts = []
    for text, weight in zip(tree.texts, tree.weights, strict=True):
        if isinstance(text, compel.Blend):
            several = torch.stack([_compel_text(rows, one) for one in text.texts])
            context = _mixed(several, text.weights, text.normalize)
        else:
            context = _compel_text(rows, text)
        if weight != 1:
            empty = rows.states([rows.empty.ids])[0]
            context = empty + (context - empty) * weight
        contexts.append(context)
    return torch.cat(contexts)


def _mixed(several: Tensor, weights: Sequence[float], normalize: bool) -> Tensor:
    """Weigh and add up (k, n, width)."""
    scale = torch.tensor(weights, dtype=several.dtype, device=several.device)[:, None, None]
    total = (several * scale).sum(dim=0)
    return total / scale.sum() if normalize else total


def _compel_text(rows: Rows, text: tuple) -> Tensor:
    """Encode 75 tokens, (77, width): above 1 as ComfyUI; below 1 mixed with the text in which nothing looks there."""
    segments = compel.before_swaps(text)
    ids, weights, owner = [], [], []
    for place, (words, weight) in enumerate(segments):
        numbers = list(rows.encoder.word_ids(words))
        ids += numbers
        weights += [weight] * len(numbers)
        owner += [place] * len(numbers)
    most = rows.length - 2
    ids, weights, owner = ids[:most], weights[:most], owner[:most]
    room = most - len(ids)
    end = rows.empty.ids[-1]
    padded = (rows.empty.ids[0], *ids, *[end] * (room + 1))
    chunk = Chunk(padded, (1.0, *weights, *[1.0] * (room + 1)), used=len(ids))
    lowered = [place for place, (_, weight) in enumerate(segments) if weight < 1]
    everything = (1,) * rows.length
    masks = [everything]
    for place in lowered:
        masks.append((1, *(int(one != place) for one in owner), *[1] * (room + 1)))
    z = rows.states([padded] * len(masks), masks)
    scale, empty = _weights([chunk], z), rows.states([rows.empty.ids])
    z = empty + (z - empty) * scale
    shares = [1.0]
    for place in lowered:
        shares.append(max(0.0, math.tan((1 - max(_LEAST, segments[place][1])) * math.pi / 2)))
    return _mixed(z, shares, normalize=True)


def at_step(conditionings: Sequence[Conditioning], step: int) -> tuple[Tensor, list[list[tuple[int, float]]]]:
    """Give the context of a batch at a step: rows (r, n, width), and for each prompt its (row, weight) pairs.

    Contexts of unequal length are padded with their own last vector, as in AUTOMATIC1111.

    Args:
        step: counted from 0, see Conditioning.conditions.
    """
    rows, owners = rows_at([one.conditions() for one in conditionings], step)
    return rows, [[(row, one.weight) for row, one in own] for own in owners]


def guide(conditional: Tensor, unconditional: Tensor, owners: Sequence, scale: float) -> Tensor:
    """Guide each prompt of a batch by all its parts: u + scale * sum of w_i (c_i - u).

    Args:
        conditional: the network's answers for the rows of `at_step`, (r, ...).
        unconditional: one for each prompt, (b, ...).
        owners: for each prompt its (row, weight) pairs, of `at_step`.
        scale: the guidance scale.
    """
    guided = []
    for base, parts in zip(unconditional, owners, strict=True):
        # One after the other, in this order, as the web UI adds them up.
        total = base
        for row, weight in parts:
            total = total + (conditional[row] - base) * (weight * scale)
        guided.append(total)
    return torch.stack(guided)


def pad_pair(cond: Tensor, uncond: Tensor, empty: Tensor) -> tuple[Tensor, Tensor]:
    """Make two contexts equally long with the empty prompt's: (b, n, d), (b', n', d), empty (1, 77, d).

    Raises:
        UsageError: lengths that do not differ by whole empty prompts.
    """
    longest = max(cond.shape[1], uncond.shape[1])
    padded = []
    for context in (cond, uncond):
        lacking, rest = divmod(longest - context.shape[1], empty.shape[1])
        if rest:
            raise UsageError(
                f"contexts of {cond.shape[1]} and {uncond.shape[1]} tokens do not differ by a multiple of "
                f"{empty.shape[1]}"
            )
        padded.append(torch.cat([context, empty.repeat(len(context), lacking, 1)], dim=1))
    return padded[0], padded[1]
