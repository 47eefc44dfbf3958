"""Faster ways through the modules of ldm.modules, of the same numbers up to rounding.

Nothing here has weights of its own or is needed: each way stands in for the plain code of a module, is tested against
it, and leaves to it whatever it does not serve.
"""
