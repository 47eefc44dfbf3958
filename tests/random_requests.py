"""Requests drawn at random from the table of options: every option that a picture tells, with values of its kind."""

import random

from ldm import option_kinds as kinds
from ldm import options
from ldm.errors import AbsentError, NumericError, UsageError

# Where a kind's whole range would take long, or give pictures that are not finite.
RANGES = {
    "steps": (2, 3),
    "hires_steps": (1, 3),
    "guidance_scale": (1, 8),
    "height": (64, 72),
    "width": (64, 80),
    "clip_skip": (1, 2),
    "cache_interval": (2, 2),
    "hires_scale": (1, 1.5),
    "order": (2, 2),
    "loops": (2, 2),
    "upscale_by": (1, 1.2),
    "upscale_overlap": (8, 16),
    "cache_depth": (1, 1),
    "mask_blur": (1, 4),
}
TEXTS = {
    "plain": ("a red circle", "a large blue square, (not) text", ""),
    "a1111": (
        "a (red:1.3) circle",
        "[red:blue:0.5] square <lora:ink:0.6>",
        "a star AND a ring :0.5",
        "((birb)) [a|b]",
    ),
    "comfyui": ("a (red:1.2) circle", "embedding:birb in blue"),
    "compel": ("a red+ circle", '("red", "blue").blend(0.7, 0.3)'),
}
SHARE = 0.1  # of requests that have an option without being made to
MODES = ("txt2img", "txt2img", "img2img", "inpaint")
TRIES = 30


def drawable():
    """List the options that a picture tells and that can be drawn."""
    rng, found = random.Random(0), [one for one in options.told() if one.keyword]
    return [one for one in found if value_of(one.name, one.kind, rng) is not None]


def apart():
    """List the options that can be drawn in three kinds, of which two of one kind may not go together."""
    found = drawable()
    of_start = [one.name for one in found if one.group in (options.HIRES, options.START, options.MASK)]
    of_sampler = [one.name for one in found if one.part == "sampler"]
    return of_start, of_sampler, [one.name for one in found if one.name not in (*of_start, *of_sampler)]


def modes_of(must):
    """List the modes that have all of these options."""
    groups = {options.option(name).group for name in must}
    if options.HIRES in groups:
        return ("txt2img",)
    return ("inpaint",) if options.MASK in groups else ("img2img",) if options.START in groups else MODES


GROUPS = {"txt2img": (options.HIRES,), "img2img": (options.START,), "inpaint": (options.START, options.MASK)}
OF_MODES = {group for groups in GROUPS.values() for group in groups}


def draw(rng, mode, must=()):
    """Draw a prompt and the keywords of a request; whether they go together, the model says.

    Args:
        must: names of options that are set.
    """
    drawn = {
        one.name: value_of(one.name, one.kind, rng)
        for one in drawable()
        if one.name in must
        or (rng.random() < SHARE and (one.group not in OF_MODES or one.group in GROUPS[mode]))
    }
    for one in options.told():  # what an option is of is set as well
        needed = one.beside[:1] or (("hires_scale",) if one.group == options.HIRES else ())
        needed = (
            ("upscale_overlap",) if one.name == "upscale_by" else needed
        )  # whose default is for larger ones
        if one.name in drawn and "hires_size" not in drawn:
            for name in {*needed} - drawn.keys():
                other = options.option(name)
                drawn[name] = value_of(name, other.kind, rng)
    if any(options.option(name).part == "sampler" for name in must):  # which few samplers have
        drawn.setdefault("sampler", value_of("sampler", options.option("sampler").kind, rng))
    syntax = drawn.setdefault(options.SYNTAX, rng.choice(list(TEXTS)))
    prompt = rng.choice(TEXTS[syntax])
    drawn |= {"steps": drawn.get("steps", 2), "seed": rng.getrandbits(32)}
    return prompt, drawn


def value_of(name, kind, rng):
    """Draw a value of a kind; None where there is none to be drawn."""
    low, high = RANGES.get(name, (getattr(kind, "low", None), getattr(kind, "high", None)))
    if isinstance(kind, kinds.Words):
        return rng.choice([word for word in kind.words if word])
    if isinstance(kind, kinds.Whole):
        value = rng.randint(low, high if name in RANGES else min(high, low + 10**6))
        return value - value % 8 if name in ("height", "width") else value
    if isinstance(kind, kinds.Number):
        return round(low + rng.random() * (min(high, low + 3) - low), 3)
    if isinstance(kind, kinds.Switch):
        return True
    if isinstance(kind, kinds.Size):
        return (rng.choice((64, 72)), rng.choice((64, 80)))
    if isinstance(kind, kinds.Interval):
        return (0.0, round(rng.uniform(0.6, 1), 2))
    if isinstance(kind, kinds.Wholes):
        return tuple(8 * rng.randrange(2) for _ in range(kind.count))
    if isinstance(kind, kinds.Numbers):
        return tuple(round(rng.uniform(0.6, 1.4), 2) for _ in range(kind.count))
    if isinstance(kind, kinds.Prompt):
        return rng.choice(TEXTS["plain"])
    return rng.choice(("midpoint", "heun", "bh2")) if type(kind) is kinds.Kind else None


def painted(seed, must, paint, modes=None):
    """Draw requests until one can be painted with the options that it must have, and paint it.

    Args:
        paint: takes mode, prompt and keywords.
        modes: to choose from, where not all that have these options.

    Returns:
        what it gave, and the mode and the keywords; None where there is no such request.
    """
    rng = random.Random(seed)
    for _ in range(TRIES):
        mode = rng.choice(modes or modes_of(must))
        prompt, drawn = draw(rng, mode, must)
        for _ in range(8):
            try:
                return paint(mode, prompt, drawn), drawn | {"mode": mode, "prompt": prompt}
            except (AbsentError, UsageError, NumericError) as error:  # they do not go together, or overflow
                others = [name for name in drawn if name not in (*must, "seed", "steps", options.SYNTAX)]
                named = [name for name in others if name in str(error)]
                if not others or any(name in str(error) for name in must):
                    break
                del drawn[rng.choice(named or others)]
    return None
