"""What is attached to a model for a run and changes its numbers: LoRA and its kin, embeddings, DeepCache, ToMe.

sd.txt2img("a <birb-style> portrait", adapters=[LoRA("style.safetensors", 0.8), Embedding("birb.bin")])
"""

from ldm.adapters.deepcache import DeepCache
from ldm.adapters.embedding import Embedding
from ldm.adapters.lora import LoRA
from ldm.adapters.tome import TokenMerging

__all__ = ["DeepCache", "Embedding", "LoRA", "TokenMerging"]
