"""Checkpoints: bytes to tensors, other programs' keys to ours, and a report of every tensor."""

from ldm.checkpoints.files import Weights, open_weights, read_object, read_tensors
from ldm.checkpoints.load import load_latent_diffusion, load_vae
from ldm.checkpoints.report import LoadReport, TensorInfo
from ldm.checkpoints.states import assign, match_states
from ldm.checkpoints.summary import FileSummary, inspect
from ldm.checkpoints.write import replacing, save_object, save_safetensors

__all__ = [
    "FileSummary",
    "LoadReport",
    "TensorInfo",
    "Weights",
    "match_states",
    "assign",
    "inspect",
    "load_latent_diffusion",
    "load_vae",
    "open_weights",
    "read_object",
    "read_tensors",
    "replacing",
    "save_object",
    "save_safetensors",
]
