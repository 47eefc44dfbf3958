"""CLIP's tokenizer without a network: where its vocabulary is found and checked, how text is cleaned."""

import gzip
import importlib.metadata
import inspect
import itertools
import json
import logging
import re
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from ldm.errors import AbsentError, FormatError, LdmError, MismatchError, UsageError, refuse_elsewhere
from ldm.paths import CHECKOUT, PACKAGE

logger = logging.getLogger(__name__)

Merge = tuple[str, str]

BOS = "<|startoftext|>"
EOS = "<|endoftext|>"
WORD_END = "</w>"
CLIP_VOCAB_SIZE = 49408  # 256 byte symbols, the same at the end of a word, 48,894 merges, two marks
RAW_NAME = "bpe_simple_vocab_16e6.txt.gz"  # OpenAI's own file; CLIP uses its first 48,894 merges
HUB_NAMES = (
    "openai/clip-vit-large-patch14",
    "stable-diffusion-v1-5/stable-diffusion-v1-5",
    "runwayml/stable-diffusion-v1-5",
    "CompVis/stable-diffusion-v1-4",
)
MAX_CHARACTERS = 100_000  # the worst text of this length is cleaned and split in about a second
_MAX_FILE_BYTES = 8_000_000  # OpenAI's file is 3.2 MB unpacked, CLIP's tokenizer.json 2.2 MB
# Printable ASCII is text that ftfy leaves alone, but for "&", which may begin an entity of HTML.
_PLAIN = re.compile(r"[ -%'-~\t\n]*")
_HALF_CHARACTER = re.compile("[\ud800-\udfff]")
_PROBE = "a photo of a cat"
_PROBE_IDS = [49406, 320, 1125, 539, 320, 2368, 49407]  # recorded from OpenAI's tokenizer


def byte_of_symbol() -> dict[str, int]:
    """Map each of CLIP's 256 byte symbols to its byte, in vocabulary order.

    GPT-2's table: a byte that prints as itself in Latin-1 stands for itself and comes first; the other 68 are
    written as the characters from U+0100 on.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    table = {chr(byte): byte for byte in printable}
    table.update({chr(256 + place): byte for place, byte in enumerate(others)})
    return table


def vocabulary(merges: Iterable[Merge]) -> dict[str, int]:
    """Number the tokens that these merges lead to, as CLIP numbers its own.

    256 byte symbols, the same 256 at the end of a word, one token a merge in the order of merging, and the
    two marks: 514 tokens without merges, 49,408 with CLIP's 48,894.
    """
    symbols = list(byte_of_symbol())
    tokens = [*symbols, *(symbol + WORD_END for symbol in symbols), *map("".join, merges)]
    return dict(zip(dict.fromkeys([*tokens, BOS, EOS]), itertools.count(), strict=False))


def clean(text: str) -> str:
    """Repair text as the tokenizer of CLIP's authors did: ftfy, single spaces, lower case.

    ftfy straightens curly quotes and full-width letters, undoes mojibake and drops control characters; half
    a surrogate pair becomes U+FFFD. transformers 4 does the same by itself, transformers 5 does not.

    Raises:
        UsageError: not a string, or longer than MAX_CHARACTERS.
    """
    if not isinstance(text, str):
        raise UsageError(f"a prompt must be a string, got {type(text).__name__}")
    if len(text) > MAX_CHARACTERS:
        raise UsageError(f"a prompt may have {MAX_CHARACTERS} characters, got {len(text)}; shorten it")
    if not _PLAIN.fullmatch(text):
        import ftfy  # importing it takes longer than anything else that a prompt needs

        text = ftfy.fix_text(text)
    return re.sub(r"\s+", " ", text).strip().lower()


class CleaningTokenizer:
    """transformers' CLIPTokenizer, handed text that `clean` has repaired; all else is the tokenizer's own.

    Marks spelt out in the text (`<|endoftext|>`) are read as the marks, as the originals do.

    Attributes:
        origin: where its vocabulary came from, for reports.
    """

    def __init__(self, tokenizer: Any, origin: str) -> None:
        self.__dict__.update(_tokenizer=tokenizer, origin=origin)

    def __call__(self, text: str | list[str], *args: Any, **kwargs: Any) -> Any:
        return self._tokenizer(_clean_all(text), *args, **kwargs)

    def encode(self, text: str, *args: Any, **kwargs: Any) -> list[int]:
        return self._tokenizer.encode(_clean_all(text), *args, **kwargs)

    def tokenize(self, text: str, *args: Any, **kwargs: Any) -> list[str]:
        return self._tokenizer.tokenize(_clean_all(text), *args, **kwargs)

    def decode(self, *args: Any, **kwargs: Any) -> Any:
        """As the tokenizer's own; a copied or unpickled one of transformers 5 leaves the marks of words' ends in."""
        text = self._tokenizer.decode(*args, **kwargs)
        return text.replace(WORD_END, " ").rstrip() if isinstance(text, str) and WORD_END in text else text

    def __len__(self) -> int:
        return len(self._tokenizer)

    def __getattr__(self, name: str) -> Any:
        # Copying and unpickling look up dunder names before the tokenizer is set.
        if name == "_tokenizer" or name.startswith("__"):
            raise AttributeError(name)
        return getattr(self._tokenizer, name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self._tokenizer, name, value)


def _clean_all(text: str | Iterable[str]) -> str | list[str]:
    return [clean(part) for part in text] if isinstance(text, (list, tuple)) else clean(text)


def build_tokenizer(
    vocab: dict[str, int], merges: list[Merge], *, max_length: int = 77, origin: str = "memory"
) -> CleaningTokenizer:
    """Build the tokenizer of this vocabulary on whichever transformers is installed, leaving no files."""
    from transformers import CLIPTokenizer

    if "vocab_file" in inspect.signature(CLIPTokenizer).parameters:  # transformers 4 reads files only
        with tempfile.TemporaryDirectory() as folder:
            names = [str(path) for path in write_vocabulary(folder, vocab, merges)]
            tokenizer = CLIPTokenizer(*names, model_max_length=max_length)
        # It would run ftfy again on text in lower case by now, which some signs then look like mojibake in.
        tokenizer.fix_text = _as_is
    else:
        tokenizer = CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=max_length)
    return CleaningTokenizer(tokenizer, origin)


def _as_is(text: str) -> str:
    return text


def write_vocabulary(folder: str | Path, vocab: dict[str, int], merges: list[Merge]) -> tuple[Path, Path]:
    """Write vocab.json and merges.txt into an existing folder, as transformers writes them."""
    vocab_path, merges_path = Path(folder) / "vocab.json", Path(folder) / "merges.txt"
    vocab_path.write_text(json.dumps(vocab, ensure_ascii=False) + "\n", encoding="utf-8")
    lines = ["#version: 0.2", *(f"{left} {right}" for left, right in merges)]
    merges_path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return vocab_path, merges_path


def read_vocabulary(path: str | Path) -> tuple[dict[str, int], list[Merge]]:
    """Read a vocabulary and its merges from any of the forms they travel in.

    Args:
        path: a folder with vocab.json and merges.txt, or with tokenizer.json; a tokenizer.json; or a list of
            merges, one pair a line (bpe_simple_vocab_16e6.txt, plain or gzip).

    Raises:
        AbsentError: nothing there, or a folder without these files.
        FormatError: not what the name says, or without a token that every CLIP vocabulary has.
    """
    path = Path(path)
    if path.is_dir():
        if (path / "vocab.json").is_file() and (path / "merges.txt").is_file():
            vocab = _parse_json(path / "vocab.json")
            return _checked(vocab, _parse_merges(path / "merges.txt"), path)
        path = path / "tokenizer.json"
    if not path.is_file():
        raise AbsentError(
            f"no tokenizer at '{path}': give a folder with vocab.json and merges.txt (or tokenizer.json), "
            f"or a {RAW_NAME}"
        )
    if path.suffix == ".json":
        model = _parse_json(path).get("model")
        if not isinstance(model, dict) or not isinstance(model.get("merges"), list):
            raise FormatError(
                f"'{path}' should be a tokenizer.json with model.vocab and model.merges; it has none"
            )
        pairs = [pair.split(" ", 2) if isinstance(pair, str) else pair for pair in model["merges"]]
        for pair in pairs:
            if (
                not isinstance(pair, list)
                or len(pair) != 2
                or not all(isinstance(part, str) for part in pair)
            ):
                raise FormatError(f"'{path}' should hold merges of two tokens each, got {pair!r:.80}")
        return _checked(model.get("vocab"), [(left, right) for left, right in pairs], path)
    merges = _parse_merges(path)
    vocab = vocabulary(merges)  # in order and whole, but for what the merges are made of
    _check_complete(vocab, set(itertools.chain.from_iterable(merges)), path)
    return vocab, merges


def _read_text(path: Path) -> str:
    try:
        opened = gzip.open(path) if path.suffix == ".gz" else path.open("rb")
        with opened as file:
            data = file.read(_MAX_FILE_BYTES + 1)
        text = data.decode("utf-8")
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise FormatError(f"'{path}' cannot be read as a vocabulary: {error}") from error
    if len(data) > _MAX_FILE_BYTES:
        raise FormatError(f"'{path}' is larger than any vocabulary ({_MAX_FILE_BYTES} bytes)")
    return text


def _parse_json(path: Path) -> dict[str, Any]:
    try:
        parsed = json.loads(_read_text(path))
    except (ValueError, RecursionError) as error:  # ValueError: no JSON, or a number without end
        if isinstance(error, LdmError):
            raise
        raise FormatError(f"'{path}' should hold JSON: {error}") from error
    if not isinstance(parsed, dict):
        raise FormatError(f"'{path}' should hold a JSON object, got {type(parsed).__name__}")
    return parsed


def _parse_merges(path: Path) -> list[Merge]:
    most = CLIP_VOCAB_SIZE - 514  # OpenAI's file goes on beyond the merges that CLIP uses
    lines = _read_text(path).removesuffix("\n").split("\n", most + 1)
    if "#version" in lines[0]:
        lines = lines[1:]
    lines = lines[:most]
    if set(map(str.count, lines, itertools.repeat(" "))) - {1}:
        odd = next(line for line in lines if line.count(" ") != 1)
        raise FormatError(f"'{path}' should hold two tokens a line, got {odd[:80]!r:.80}")
    tokens = " ".join(lines).split(" ") if lines else []
    return list(zip(tokens[::2], tokens[1::2], strict=True))


def _checked(vocab: Any, merges: list[Merge], path: Path) -> tuple[dict[str, int], list[Merge]]:
    """Refuse a vocabulary in which some text would silently become the end mark."""
    if not isinstance(vocab, dict) or list(map(type, vocab.values())).count(int) != len(vocab):
        raise FormatError(f"'{path}' should map tokens to their numbers")
    if _HALF_CHARACTER.search("".join(vocab)):  # JSON can spell what no text has
        raise FormatError(f"'{path}' holds a token with half a character (a lone surrogate)")
    for part in itertools.chain.from_iterable(merges):
        if part.split() != [part]:  # merges.txt could not hold it
            raise FormatError(f"'{path}' should hold merges of tokens without spaces, got {part!r:.60}")
    if set(vocab.values()) != set(range(len(vocab))):
        raise FormatError(f"'{path}' should number its tokens 0, 1, 2, ... without gaps")
    symbols = list(byte_of_symbol())
    needed = {BOS, EOS, *symbols, *(symbol + WORD_END for symbol in symbols)}
    needed.update(itertools.chain.from_iterable(merges), map("".join, merges))
    _check_complete(vocab, needed, path)
    return vocab, merges


def _check_complete(vocab: dict[str, int], needed: set[str], path: Path) -> None:
    missing = needed.difference(vocab)
    if missing:
        raise FormatError(
            f"'{path}' lacks {len(missing)} tokens that CLIP's format needs, one is {min(missing)!r:.60}"
        )


def check_tokenizer(tokenizer: CleaningTokenizer, vocab_size: int) -> None:
    """Check that a tokenizer fits its text encoder.

    With transformers 5 a tokenizer that found no files has two tokens and reads every letter as unknown,
    without an error; no tokenizer of this package goes unchecked.

    Raises:
        MismatchError: another number of tokens, or known text read wrongly.
    """
    if len(tokenizer) != vocab_size:
        raise MismatchError(
            f"the tokenizer of {tokenizer.origin} should have {vocab_size} tokens, has {len(tokenizer)}"
        )
    ids = tokenizer(_PROBE)["input_ids"]
    back = tokenizer.decode(ids, skip_special_tokens=True).replace(" ", "")
    marked = [tokenizer.bos_token_id, *ids[1:-1], tokenizer.eos_token_id] == ids
    if not marked or back != _PROBE.replace(" ", "") or (vocab_size == CLIP_VOCAB_SIZE and ids != _PROBE_IDS):
        raise MismatchError(f"the tokenizer of {tokenizer.origin} reads '{_PROBE}' wrongly, as {ids}")


def find_tokenizer(
    source: str | Path | None = None,
    *,
    beside: Iterable[str | Path] = (),
    vocab_size: int = CLIP_VOCAB_SIZE,
    max_length: int = 77,
    allow_download: bool = False,
) -> CleaningTokenizer:
    """Find a tokenizer with this many tokens, the nearest first, and check it.

    In this order: `source`, and then nothing else; the folders of `beside`, with `tokenizer/` and OpenAI's
    file in them; and, for CLIP's own 49,408 tokens, the checkout's model_data/, the merges inside this
    package, the local Hugging Face cache, the file of an installed open_clip_torch or clip-anytorch, and the
    hub if `allow_download`. What is found but does not fit is passed over with a logged warning.

    Args:
        source: what `read_vocabulary` reads.
        beside: folders to look in, such as that of a checkpoint.
        vocab_size: rows of the token embedding that the tokenizer is for.
        max_length: tokens of a prompt, marks included; becomes `model_max_length`.

    Raises:
        AbsentError: there is none; the message lists where it was looked for.
        FormatError, MismatchError: `source` is broken, or is a tokenizer for another model.
    """
    if source is not None:
        refuse_elsewhere("tokenizer", source)
        return _load(Path(source), str(source), vocab_size, max_length)
    looked = []
    for origin, path in _candidates([Path(folder) for folder in beside], vocab_size, allow_download):
        if path is None or not path.exists():
            looked.append(origin)
            continue
        try:
            return _load(path, origin, vocab_size, max_length)
        except LdmError as error:
            logger.warning("passed over a tokenizer: %s", error)
            looked.append(f"{origin} (does not fit)")
    raise AbsentError(
        f"no tokenizer with {vocab_size} tokens; looked for {', '.join(looked) or 'none'}; "
        "give a folder with vocab.json and merges.txt as tokenizer="
    )


def _load(path: Path, origin: str, vocab_size: int, max_length: int) -> CleaningTokenizer:
    vocab, merges = read_vocabulary(path)
    tokenizer = build_tokenizer(vocab, merges, max_length=max_length, origin=origin)
    check_tokenizer(tokenizer, vocab_size)
    logger.info("tokenizer: %s", origin)
    return tokenizer


def _candidates(
    beside: list[Path], vocab_size: int, allow_download: bool
) -> Iterator[tuple[str, Path | None]]:
    """Name the places where a tokenizer may be, nearest first; None where a place holds none."""
    for folder in beside:
        yield from _places_in(folder)
    if vocab_size != CLIP_VOCAB_SIZE:
        return
    yield from _places_in(CHECKOUT / "model_data")
    merges = PACKAGE / "data" / "clip_merges.txt.gz"
    yield f"package data {merges}", merges
    for name in HUB_NAMES:
        yield f"Hugging Face cache of {name}", _in_hub_cache(name)
    for name in ("open_clip_torch", "clip-anytorch"):
        yield f"installed {name}", _in_distribution(name)
    if allow_download:
        yield f"hub {HUB_NAMES[0]}", _download(HUB_NAMES[0])


def _places_in(folder: Path) -> Iterator[tuple[str, Path | None]]:
    for place in (folder, folder / "tokenizer"):
        held = any((place / name).is_file() for name in ("vocab.json", "tokenizer.json"))
        yield f"{place}/vocab.json", place if held else None
    yield str(folder / RAW_NAME), folder / RAW_NAME


def _in_hub_cache(name: str) -> Path | None:
    from huggingface_hub import try_to_load_from_cache

    for inner in ("", "tokenizer/"):
        found = [try_to_load_from_cache(name, inner + file) for file in ("vocab.json", "merges.txt")]
        if all(isinstance(path, str) for path in found):
            return Path(found[0]).parent
    return None


def _in_distribution(name: str) -> Path | None:
    """Find OpenAI's file in an installed package without importing it (its import may need torchvision)."""
    try:
        distribution = importlib.metadata.distribution(name)
    except importlib.metadata.PackageNotFoundError:
        return None
    files = [file for file in distribution.files or [] if file.name == RAW_NAME]
    return Path(str(distribution.locate_file(files[0]))) if files else None


def _download(name: str) -> Path | None:
    from huggingface_hub import hf_hub_download

    try:
        found = [hf_hub_download(name, file) for file in ("vocab.json", "merges.txt")]
    except (OSError, ValueError) as error:
        logger.warning("could not download the tokenizer of %s: %s", name, error)
        return None
    return Path(found[0]).parent
