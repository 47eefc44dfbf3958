"""What is attached to a model for a run and changes its numbers: LoRA, embeddings, ControlNet, IP-Adapter and others.

sd.txt2img("a <birb-style> portrait", adapters=[LoRA("style.safetensors", 0.8), Embedding("birb.bin")])
"""

from ldm.adapters.controlnet import ControlNet
from ldm.adapters.deepcache import DeepCache
from ldm.adapters.embedding import Embedding
from ldm.adapters.freeu import FreeU
from ldm.adapters.guidance import PAG, SAG
from ldm.adapters.ip_adapter import IPAdapter
from ldm.adapters.lora import LoRA
from ldm.adapters.preprocessors import preprocess
from ldm.adapters.prompt_to_prompt import LocalBlend, PromptToPrompt
from ldm.adapters.seamless import SeamlessTiling
from ldm.adapters.slicing import AttentionSlicing
from ldm.adapters.source_attention import MutualSelfAttention, PlugAndPlay
from ldm.adapters.style_adapter import StyleAdapter
from ldm.adapters.t2i_adapter import T2IAdapter
from ldm.adapters.tome import TokenMerging
from ldm.adapters.word_maps import WordMaps

__all__ = [
    "AttentionSlicing",
    "ControlNet",
    "DeepCache",
    "Embedding",
    "FreeU",
    "IPAdapter",
    "LoRA",
    "LocalBlend",
    "MutualSelfAttention",
    "PAG",
    "PlugAndPlay",
    "PromptToPrompt",
    "SAG",
    "SeamlessTiling",
    "StyleAdapter",
    "T2IAdapter",
    "TokenMerging",
    "WordMaps",
    "preprocess",
]
