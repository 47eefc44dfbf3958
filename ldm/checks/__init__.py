"""Checks of the parts of a request, which ldm.request puts together."""
