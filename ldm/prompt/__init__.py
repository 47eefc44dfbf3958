"""Prompts in other programs' languages: AUTOMATIC1111's, ComfyUI's and compel's."""
