"""What the command-line scripts share."""

from ldm.cli.guided import diffusion_parser, given_flags
from ldm.cli.painting import check, paint
from ldm.cli.painting_options import FORMATS, painting_parser
from ldm.cli.parser import Parser, integer, number, seed
from ldm.cli.prompts import Line, read_prompts
from ldm.cli.running import printable, run, say

__all__ = [
    "FORMATS",
    "Line",
    "Parser",
    "check",
    "diffusion_parser",
    "given_flags",
    "integer",
    "number",
    "paint",
    "painting_parser",
    "printable",
    "read_prompts",
    "run",
    "say",
    "seed",
]
