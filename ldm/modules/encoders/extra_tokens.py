"""Names in a prompt that stand for vectors of their own (textual inversion, arXiv:2208.01618)."""

import re
from collections.abc import Mapping, Sequence


class ExtraTokens:
    """Token numbers behind those of a vocabulary, and the names in a prompt that stand for them.

    A name is found as its token numbers, at any token, the longest first: as AUTOMATIC1111's web UI finds it. One that
    begins or ends with a sign, such as "<cat>", is parted from signs beside it before, as diffusers does: CLIP's
    tokenizer would join those of "<cat>,".

    Args:
        names: the token numbers of a name -> the name, and the numbers of its vectors.
    """

    def __init__(self, names: Mapping[tuple[int, ...], tuple[str, Sequence[int]]]):
        self._names = {ids: (name, tuple(numbers)) for ids, (name, numbers) in names.items()}
        self._lengths = sorted({len(ids) for ids in self._names}, reverse=True)
        self._name_of: dict[int, str] = {}
        for name, numbers in self._names.values():
            for number in numbers:
                self._name_of.setdefault(number, name)
        signed = [
            name for name, _ in self._names.values() if not (name[:1].isalnum() and name[-1:].isalnum())
        ]
        pattern = "|".join(map(re.escape, sorted(signed, key=len, reverse=True)))
        self._signed = re.compile(f"({pattern})", re.IGNORECASE) if signed else None

    @property
    def names(self) -> list[str]:
        """The names."""
        return [name for name, _ in self._names.values()]

    def __len__(self) -> int:
        return len(self._name_of)

    def apart(self, text: str) -> str:
        """Put spaces around names that begin or end with a sign."""
        return text if self._signed is None else self._signed.sub(r" \1 ", text)

    def replace(self, ids: Sequence[int]) -> list[int]:
        """Put the numbers of vectors in the place of those of their names."""
        found: list[int] = []
        place = 0
        while place < len(ids):
            for length in self._lengths:
                named = self._names.get(tuple(ids[place : place + length]))
                if named is not None:
                    found += named[1]
                    place += length
                    break
            else:
                found.append(ids[place])
                place += 1
        return found

    def name_of(self, number: int) -> str | None:
        """Return the name that a number belongs to; None for one of the vocabulary's."""
        return self._name_of.get(number)
