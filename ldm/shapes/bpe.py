"""Learning a small vocabulary in CLIP's format: every given word one token, anything else still spelt out."""

import json
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path

from ldm.errors import UsageError
from ldm.modules.encoders.tokenizer import (
    BOS,
    EOS,
    WORD_END,
    Merge,
    byte_of_symbol,
    vocabulary,
)

# Every word that the captions of ldm.shapes.scenes know, and some more that a reader may try.
CAPTION_WORDS = (
    "a an small large red green blue yellow purple orange cyan pink white black gray grey beige "
    "circle square triangle star ring cross on the left in center right at top bottom background "
    "above below to of and with picture image photo drawing shape striped stripes dotted two three object "
    "next over under big tiny huge little . , "
    "centre middle beneath disc plus violet backdrop one side medium"
).split()


def learn_bpe(words: Iterable[str] | Mapping[str, int]) -> tuple[dict[str, int], list[Merge]]:
    """Learn merges until every given word is one token.

    Byte-pair encoding (Sennrich et al., arXiv:1508.07909) run to its end: the most frequent neighbours merge
    first, ties go to the pair that sorts first, so that the same words always give the same vocabulary. The
    256 byte symbols stay in it, so any other text is spelt out in pieces and nothing is unknown.

    Args:
        words: lower-case words, or word -> how often it occurs.

    Returns:
        (vocabulary, merges): CLIP's numbering of `vocabulary`, and the merges in order.

    Raises:
        UsageError: no words, or one that CLIP's splitting would never hand over whole (capitals, spaces,
            letters mixed with digits or signs, more than one digit).
    """
    counts = dict(words) if isinstance(words, Mapping) else Counter(words)
    if not counts:
        raise UsageError("learn_bpe needs at least one word, got none")
    symbol_of_byte = {byte: symbol for symbol, byte in byte_of_symbol().items()}
    spelt = []
    for word, count in counts.items():
        if not _stays_whole(word):
            raise UsageError(
                f"learn_bpe got the word {word!r}, which CLIP's rules split or change before merging; "
                "give lower-case words of letters only, single digits, or signs only"
            )
        symbols = [symbol_of_byte[byte] for byte in word.encode()]
        symbols[-1] += WORD_END
        spelt.append((symbols, count))

    merges = []
    while pairs := _count_pairs(spelt):
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        merges.append(best)
        spelt = [(_merge(symbols, best), count) for symbols, count in spelt]
    return vocabulary(merges), merges


def write_tokenizer(folder: str | Path, words: Iterable[str] | Mapping[str, int]) -> dict[str, int]:
    """Learn a vocabulary and write it as CLIP's vocab.json and merges.txt; return the vocabulary."""
    folder = Path(folder)
    vocab, merges = learn_bpe(words)
    folder.mkdir(parents=True, exist_ok=True)
    lines = ["#version: 0.2", *(f"{left} {right}" for left, right in merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    (folder / "vocab.json").write_text(
        json.dumps(vocab, ensure_ascii=False, indent=0) + "\n", encoding="utf-8"
    )
    return vocab


def write_text_model(
    folder: str | Path,
    words: Iterable[str] | Mapping[str, int],
    *,
    width: int = 128,
    layers: int = 4,
    heads: int = 4,
    max_length: int = 32,
) -> None:
    """Write all that FrozenCLIPEmbedder needs to build a small text encoder: tokenizer and config.json.

    The shipped one is `write_text_model("model_data/shapes/text", CAPTION_WORDS)`.
    """
    vocab = write_tokenizer(folder, words)
    config = {
        "model_type": "clip_text_model",
        "vocab_size": len(vocab),
        "hidden_size": width,
        "intermediate_size": 4 * width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "max_position_embeddings": max_length,
        "hidden_act": "quick_gelu",
        "layer_norm_eps": 1e-5,
        "bos_token_id": vocab[BOS],
        "eos_token_id": vocab[EOS],
        "pad_token_id": vocab[EOS],  # CLIP-L pads with its end mark
    }
    (Path(folder) / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _stays_whole(word: str) -> bool:
    kinds = {
        "letter" if c.isalpha() else "digit" if c.isnumeric() else "space" if c.isspace() else "sign"
        for c in word
    }
    return word == word.lower() and (
        kinds in ({"letter"}, {"sign"}) or (kinds == {"digit"} and len(word) == 1)
    )


def _count_pairs(spelt: list[tuple[list[str], int]]) -> Counter[Merge]:
    pairs: Counter[Merge] = Counter()
    for symbols, count in spelt:
        for pair in zip(symbols, symbols[1:], strict=False):
            pairs[pair] += count
    return pairs


def _merge(symbols: list[str], pair: Merge) -> list[str]:
    merged: list[str] = []
    place = 0
    while place < len(symbols):
        width = 2 if tuple(symbols[place : place + 2]) == pair else 1
        merged.append("".join(symbols[place : place + width]))
        place += width
    return merged
