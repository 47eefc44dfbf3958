"""One prompt in any of the languages, read to the end: what its texts are, when each counts, and as what tokens."""

from __future__ import annotations

import functools
import html
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from ldm.errors import UsageError, nearest, shown
from ldm.limits import SYNTAXES
from ldm.modules.encoders.tokenizer import find_tokenizer
from ldm.prompt import a1111, comfyui, compel
from ldm.prompt.chunks import CHUNK_LENGTH, END, START, Chunks, check_text

if TYPE_CHECKING:
    from ldm.modules.encoders.modules import FrozenCLIPEmbedder


@dataclass(frozen=True)
class Vocabulary:
    """Which token numbers a text has, what they stand for, and how many go into a chunk.

    Attributes:
        ids: a text to its token numbers, without marks.
        start, end, length: the marks, and the tokens between them.
        tokenizer: transformers', to spell a number.
        name_of: a number to the name of the embedding (textual inversion) that it is of, or None; None without any.
    """

    ids: Callable[[str], Sequence[int]]
    start: int
    end: int
    length: int
    tokenizer: Any
    name_of: Callable[[int], str | None] | None = None

    @classmethod
    def of(cls, encoder: FrozenCLIPEmbedder) -> Vocabulary:
        """Take that of a text encoder, with the embeddings that are attached to it."""
        tokenizer, extra = encoder.tokenizer, encoder.extra_tokens
        marks = tokenizer.bos_token_id, tokenizer.eos_token_id
        return cls(
            encoder.word_ids, *marks, encoder.max_length - 2, tokenizer, extra.name_of if extra else None
        )

    def embedding(self, name: str) -> list[int] | None:
        """Give the numbers of an embedding's vectors by its name; None if there is none of this name.

        As in ComfyUI, a folder may stand before it and its file's ending behind it.
        """
        if self.name_of is None:
            return None
        bare = re.sub(r"\.(?:safetensors|pt|bin)\Z", "", re.split(r"[/\\]", name)[-1])
        for one in dict.fromkeys((name, bare)):
            numbers = list(self.ids(one))
            names = {self.name_of(number) for number in numbers}
            if len(names) == 1 and None not in names:
                return numbers
        return None

    def spell(self, number: int) -> str:
        """Spell a token; one that does not end a word has a "-" behind it."""
        if self.name_of and (name := self.name_of(number)) is not None:
            return name
        word = self.tokenizer.decode([number], clean_up_tokenization_spaces=False).strip()
        token = self.tokenizer.convert_ids_to_tokens([number])[0]
        return word if token.endswith("</w>") or token.startswith("<|") else f"{word}-"


@functools.cache
def _clip() -> Vocabulary:
    tokenizer = find_tokenizer()

    def ids(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]

    return Vocabulary(ids, START, END, CHUNK_LENGTH, tokenizer)


@dataclass(frozen=True)
class ScheduledText:
    """A text, the last step (counted from 1) for which it is scheduled, and its tokens.

    Attributes:
        segments: pieces of it with their weights.
        chunks: their token numbers.
    """

    end: int
    text: str
    segments: tuple[tuple[str, float], ...]
    chunks: Chunks


@dataclass(frozen=True)
class Part:
    """One of the texts between AND (A1111) or in `.and()` and `.blend()` (compel), at every step."""

    weight: float
    schedule: tuple[ScheduledText, ...]


@dataclass(frozen=True)
class Prompt:
    """A prompt that has been read.

    Attributes:
        text, syntax: what was read, and as which language.
        parts: at least one.
        tags: `<lora:name:0.8>` and the like, in order (A1111), or `withLora(name, 0.8)` as such tags (compel).
        tree: compel's own structure; None for the others.
        vocabulary: what its tokens are numbers of.
    """

    text: str
    syntax: str
    parts: tuple[Part, ...]
    tags: tuple[a1111.Tag, ...] = ()
    tree: compel.Conjunction | None = None
    vocabulary: Vocabulary | None = field(default=None, repr=False, compare=False)


def read(
    text: str,
    syntax: str = "a1111",
    *,
    encoder: FrozenCLIPEmbedder | None = None,
    steps: int = 20,
    hires_steps: int | None = None,
    old_schedule: bool = False,
    comma_backtrack: int = a1111.COMMA_BACKTRACK,
    joined: bool = True,
    weighted: bool = True,
) -> Prompt:
    """Read a prompt in one of the languages.

    Args:
        syntax: "plain" (as CompVis: no marks, and what does not fit is cut), "a1111", "comfyui" or "compel".
        encoder: the text encoder whose tokens and embeddings count, such as `sd.model.cond_stage_model`; None reads as
            Stable Diffusion v1's does.
        steps, hires_steps, old_schedule: see `a1111.schedule`; only A1111's prompts have schedules.
        comma_backtrack: see `a1111.chunk`.
        joined: AND joins several (A1111); False reads it as a word, as the web UI does in negative prompts.
        weighted: round and square brackets weigh, and BREAK parts (A1111); False reads them as text, which is the web
            UI's emphasis "None".

    Raises:
        UsageError: an unknown syntax, or a prompt that this language cannot read.
    """
    if syntax not in SYNTAXES:
        near = nearest(syntax, SYNTAXES)
        advice = f"; did you mean {near!r}?" if near else ""
        raise UsageError(f"syntax should be one of {', '.join(SYNTAXES)}, got {shown(syntax)}{advice}")
    check_text(text)
    a1111.check_steps("steps", steps)
    words = _clip() if encoder is None else Vocabulary.of(encoder)
    options = {"tokenize": words.ids, "length": words.length, "start": words.start, "end": words.end}
    whole = functools.partial(a1111.chunk, vectors=words.name_of, **options)
    if syntax == "a1111":
        left, tags = a1111.split_tags(a1111.without_comments(text))
        commas = words.ids(",")
        options = {"comma": commas[0] if len(commas) == 1 else None, "backtrack": comma_backtrack}
        parts, known = [], {}  # of alternations most steps' texts were read before
        for part, weight in a1111.split_and(left) if joined else [(left, 1.0)]:
            scheduled = []
            for end, at in a1111.schedule(part, steps, hires_steps=hires_steps, old=old_schedule):
                if at not in known:
                    segments = a1111.parse_emphasis(at) if weighted else [(at, 1.0)]
                    known[at] = tuple(segments), whole(segments, **options)
                scheduled.append(ScheduledText(end, at, *known[at]))
            parts.append(Part(weight, tuple(scheduled)))
        prompt = Prompt(text, syntax, tuple(parts), tuple(tags))
    elif syntax == "comfyui":
        segments = comfyui.parse_weights(text)
        # Without a text encoder it is not known which there are.
        chunks = comfyui.chunk(segments, embeddings=None if encoder is None else words.embedding, **options)
        prompt = Prompt(text, syntax, (Part(1.0, (ScheduledText(steps, text, tuple(segments), chunks),)),))
    elif syntax == "compel":
        prompt = _read_compel(text, steps, whole)
    else:
        chunks = whole([(text, 1.0)], backtrack=0)
        kept = Chunks(chunks.chunks[:1], min(chunks.count, words.length))
        prompt = Prompt(text, syntax, (Part(1.0, (ScheduledText(steps, text, ((text, 1.0),), kept),)),))
    return replace(prompt, vocabulary=words)


def _read_compel(text: str, steps: int, whole: Callable[..., Chunks]) -> Prompt:
    tree = compel.parse(text)
    parts = []
    for item, weight in zip(tree.texts, tree.weights, strict=True):
        is_blend = isinstance(item, compel.Blend)
        texts = zip(item.texts, item.weights, strict=True) if is_blend else [(item, weight)]
        for words, own in texts:
            segments = compel.before_swaps(words)
            spelt = " ".join(word for word, _ in segments)
            chunks = whole(segments, backtrack=0)
            kept = Chunks(chunks.chunks[:1], min(chunks.count, len(chunks[0].ids) - 2))  # compel cuts
            parts.append(Part(own, (ScheduledText(steps, spelt, segments, kept),)))
    tags = tuple(a1111.Tag("lora", (name, str(strength))) for name, strength in tree.loras)
    return Prompt(text, "compel", tuple(parts), tags, tree)


def explain(text: str, syntax: str = "a1111", **options: Any) -> Explanation:
    """Show how a prompt is read: its parts, what each step gets, and every token with its weight.

    Args:
        syntax, options: see `read`.

    Returns:
        An object that prints as text, and shows itself in a notebook; `.prompt` is the Prompt.
    """
    return Explanation(read(text, syntax, **options))


@dataclass(frozen=True)
class Explanation:
    """How a prompt is read, as text (`str`) and as HTML (in a notebook)."""

    prompt: Prompt

    def __str__(self) -> str:
        return "\n".join(line for line, _ in self._lines(_token_text))

    __repr__ = __str__

    def _repr_html_(self) -> str:
        rows = []
        for line, is_tokens in self._lines(_token_html):
            body = line if is_tokens else html.escape(line)
            indent = len(line) - len(line.lstrip())
            rows.append(f'<div style="padding-left:{indent}em">{body.strip()}</div>')
        return f'<div style="font-family:monospace">{"".join(rows)}</div>'

    def _lines(self, show_token: Callable[[str, float], str]) -> list[tuple[str, bool]]:
        """List lines, and whether each is made of tokens as `show_token` gives them."""
        prompt = self.prompt
        lines = [(f"{prompt.syntax}: {prompt.text!r}", False)]
        for tag in prompt.tags:
            lines.append((f"  tag {tag.kind}: {', '.join((*tag.positional, *_named(tag)))}", False))
        blend = (
            prompt.tree.texts[0] if prompt.tree and isinstance(prompt.tree.texts[0], compel.Blend) else None
        )
        if blend is not None:
            kind = "mean" if blend.normalize else "sum"
            lines.append((f"  a blend of {len(prompt.parts)} texts: their weighted {kind}", False))
        for number, part in enumerate(prompt.parts, start=1):
            several = len(prompt.parts) > 1
            if several:
                lines.append((f"  part {number} of {len(prompt.parts)}, weight {part.weight:g}", False))
            begin = 1
            for scheduled in part.schedule:
                if len(part.schedule) > 1:
                    until = f"steps {begin} to {scheduled.end}" if begin < scheduled.end else f"step {begin}"
                    lines.append((f"  {until}: {scheduled.text!r}", False))
                begin = scheduled.end + 1
                for place, chunk in enumerate(scheduled.chunks, start=1):
                    of = f"chunk {place}: " if len(scheduled.chunks) > 1 else ""
                    lines.append((f"    {of}{chunk.used} of {len(chunk.ids) - 2} tokens", False))
                    tokens = zip(chunk.ids[1 : chunk.used + 1], chunk.weights[1:], strict=False)
                    shown_ = [
                        show_token(prompt.vocabulary.spell(number), weight) for number, weight in tokens
                    ]
                    if shown_:
                        lines.append((f"      {' '.join(shown_)}", True))
        return lines


def _named(tag: a1111.Tag) -> list[str]:
    return [f"{key}={value}" for key, value in tag.named.items()]


def _token_text(word: str, weight: float) -> str:
    return word if weight == 1 else f"{word}*{weight:.4g}"


def _token_html(word: str, weight: float) -> str:
    # Red is above 1, blue below; the farther, the stronger.
    strength = min(0.8, abs(weight - 1)) if weight == weight else 0.8
    colour = f"rgba({'220,60,60' if weight > 1 else '60,100,220'},{strength:.2f})"
    return f'<span title="weight {weight:.4g}" style="background:{colour}">{html.escape(word)}</span>'
