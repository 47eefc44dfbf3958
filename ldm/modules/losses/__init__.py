"""Losses of the first stages, by the names that CompVis's configurations use."""

from ldm.modules.losses.contperceptual import DummyLoss, LPIPSWithDiscriminator

__all__ = ["DummyLoss", "LPIPSWithDiscriminator"]
