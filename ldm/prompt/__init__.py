"""Prompts in other programs' languages: AUTOMATIC1111's, ComfyUI's and compel's."""

from ldm.prompt.language import SYNTAXES, Explanation, Part, Prompt, ScheduledText, explain, read

__all__ = ["SYNTAXES", "Explanation", "Part", "Prompt", "ScheduledText", "explain", "read"]
