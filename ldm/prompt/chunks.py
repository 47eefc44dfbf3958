"""What every prompt language ends in: chunks of token numbers with a weight each."""

from __future__ import annotations

from dataclasses import dataclass

from ldm.errors import UsageError
from ldm.modules.encoders.tokenizer import MAX_CHARACTERS

CHUNK_LENGTH = 75  # tokens between the marks
START, END = 49406, 49407  # of CLIP's vocabulary


@dataclass(frozen=True)
class Chunk:
    """Token numbers, 77 for CLIP, marks and padding included, and the weight of each.

    Attributes:
        used: tokens between the marks that are no padding.
        words: for ComfyUI, which segment a token is of, counted from 1; 0 for marks and padding.
    """

    ids: tuple[int, ...]
    weights: tuple[float, ...]
    used: int
    words: tuple[int, ...] = ()


@dataclass(frozen=True)
class Chunks:
    """A text's chunks, at least one, and its number of tokens as the program that is followed counts them."""

    chunks: tuple[Chunk, ...]
    count: int

    def __iter__(self):
        return iter(self.chunks)

    def __len__(self) -> int:
        return len(self.chunks)

    def __getitem__(self, place: int) -> Chunk:
        return self.chunks[place]


def check_text(text: object) -> None:
    """Refuse what is no text, or too long to be a prompt.

    Raises:
        UsageError: either.
    """
    if not isinstance(text, str):
        raise UsageError(f"a prompt must be a string, got {type(text).__name__}")
    if len(text) > MAX_CHARACTERS:
        raise UsageError(f"a prompt may have {MAX_CHARACTERS} characters, got {len(text)}; shorten it")
