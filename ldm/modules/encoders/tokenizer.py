"""CLIP's byte-pair vocabulary: how it is laid out, where it is found, and the tokenizer built from it."""

BOS = "<|startoftext|>"
EOS = "<|endoftext|>"
WORD_END = "</w>"

Merge = tuple[str, str]


def byte_symbols() -> list[str]:
    """List CLIP's 256 byte symbols in vocabulary order.

    GPT-2's table: a byte that prints as itself in Latin-1 stands for itself and comes first; the other 68 are
    written as the characters from U+0100 on. `byte_of_symbol` is the way back.
    """
    return list(byte_of_symbol())


def byte_of_symbol() -> dict[str, int]:
    """Map each byte symbol to its byte, in vocabulary order."""
    printable = [
        *range(ord("!"), ord("~") + 1),
        *range(ord("¡"), ord("¬") + 1),
        *range(ord("®"), ord("ÿ") + 1),
    ]
    others = [byte for byte in range(256) if byte not in printable]
    table = {chr(byte): byte for byte in printable}
    table.update({chr(256 + place): byte for place, byte in enumerate(others)})
    return table


def vocabulary(merges: list[Merge]) -> dict[str, int]:
    """Number the tokens that these merges lead to, as CLIP numbers its own.

    256 byte symbols, the same 256 at the end of a word, one token a merge in the order of merging, and the two
    marks: 514 tokens without merges, 49,408 with CLIP's 48,894.
    """
    symbols = byte_symbols()
    tokens = [*symbols, *(symbol + WORD_END for symbol in symbols), *(left + right for left, right in merges)]
    numbered = {token: number for number, token in enumerate(dict.fromkeys([*tokens, BOS, EOS]))}
    return numbered
