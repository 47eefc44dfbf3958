"""Import lines of public code bases that stand on `ldm`, and the first thing that each does with what it imports."""

import sys
import types

import pytest
import torch
from keyed import keyed_input
from tiny import tiny_model
from torch import nn

# Who, and which names of ldm it imports; their own modules and other packages are left out.
LINES = {
    "CompVis, main.py": """
        from ldm.data.base import Txt2ImgIterableBaseDataset
        from ldm.util import instantiate_from_config""",
    "CompVis, knn2img.py": """
        from ldm.util import instantiate_from_config, parallel_data_prefetch
        from ldm.models.diffusion.ddim import DDIMSampler
        from ldm.models.diffusion.plms import PLMSSampler
        from ldm.modules.encoders.modules import FrozenClipImageEmbedder, FrozenCLIPTextEmbedder""",
    "CompVis, train_searcher.py": """
        from ldm.util import parallel_data_prefetch""",
    "latent-diffusion, sample_diffusion.py": """
        from ldm.models.diffusion.ddim import DDIMSampler
        from ldm.util import instantiate_from_config""",
    "latent-diffusion, autoencoder.py and ddpm.py": """
        from ldm.util import log_txt_as_img, exists, default, ismap, isimage, mean_flat, count_params
        from ldm.modules.ema import LitEma
        from ldm.modules.distributions.distributions import normal_kl, DiagonalGaussianDistribution
        from ldm.models.autoencoder import VQModelInterface, IdentityFirstStage, AutoencoderKL
        from ldm.modules.diffusionmodules.util import make_beta_schedule, extract_into_tensor, noise_like
        from ldm.modules.diffusionmodules.model import Encoder, Decoder""",
    "Stability, superresolution.py": """
        from ldm.util import exists, instantiate_from_config
        from ldm.models.diffusion.ddim import DDIMSampler
        from ldm.models.diffusion.ddpm import LatentUpscaleDiffusion, LatentUpscaleFinetuneDiffusion""",
    "Stability, depth2img.py and inpainting.py": """
        from ldm.models.diffusion.ddpm import LatentDepth2ImageDiffusion, LatentInpaintDiffusion
        from ldm.models.diffusion.dpm_solver import DPMSolverSampler""",
    "Stability and others, a dpm_solver/sampler.py of their own": """
        from ldm.models.diffusion.dpm_solver.dpm_solver import NoiseScheduleVP, model_wrapper, DPM_Solver""",
    "Stability, ddim.py and plms.py": """
        from ldm.models.diffusion.sampling_util import norm_thresholding, spatial_norm_thresholding""",
    "Stability, ddpm.py": """
        from ldm.modules.diffusionmodules.upscaling import ImageConcatWithNoiseAugmentation
        from ldm.modules.diffusionmodules.openaimodel import UNetModel""",
    "textual inversion": """
        from ldm.modules.encoders.modules import FrozenCLIPEmbedder, BERTEmbedder""",
    "a transformer over other tokens": """
        from ldm.modules.encoders.modules import TransformerEmbedder
        from ldm.modules.diffusionmodules.model import Encoder
        from ldm.modules.diffusionmodules.openaimodel import UNetModel
        from ldm.modules.x_transformer import Encoder as Layers, TransformerWrapper""",
    "ControlNet": """
        from ldm.modules.diffusionmodules.util import conv_nd, linear, zero_module, timestep_embedding
        from ldm.modules.attention import SpatialTransformer
        from ldm.modules.diffusionmodules.openaimodel import UNetModel, TimestepEmbedSequential, ResBlock
        from ldm.modules.diffusionmodules.openaimodel import Downsample, AttentionBlock
        from ldm.models.diffusion.ddpm import LatentDiffusion
        from ldm.models.diffusion.ddim import DDIMSampler
        from ldm.util import log_txt_as_img, exists, instantiate_from_config""",
    "InstructPix2Pix and pix2pix-zero kinds": """
        from ldm.models.diffusion.ddpm import disabled_train, DiffusionWrapper
        from ldm.modules.attention import CrossAttention, BasicTransformerBlock, MemoryEfficientCrossAttention""",
    "lists of samples": """
        from ldm.data.imagenet import ImageNetTrain, ImageNetValidation
        from ldm.data.lsun import LSUNBase, LSUNChurchesTrain, LSUNBedroomsTrain""",
    "all of a module": """
        from ldm.modules.diffusionmodules.openaimodel import *
        from ldm.models.autoencoder import *
        from ldm.modules.encoders.modules import *""",
}


@pytest.mark.parametrize("who", LINES)
def test_its_import_lines_run(who):
    names: dict = {}
    for line in LINES[who].strip().splitlines():
        exec(line.strip(), names)
    assert len(names) > 1


def test_all_of_a_module_brings_torch_and_its_classes():
    names: dict = {}
    exec("from ldm.modules.diffusionmodules.openaimodel import *", names)
    assert names["th"] is torch and names["nn"] is nn and issubclass(names["UNetModel"], nn.Module)


class Space(nn.Module):
    """A stand-in for the model that the package `clip` loads."""

    def __init__(self):
        super().__init__()
        self.words = nn.Embedding(99, 128)

    def encode_text(self, tokens):
        return self.words(tokens).mean(dim=1)


@torch.no_grad()
def test_retrieval_samples_from_a_point_of_clip_and_its_neighbours(monkeypatch, tmp_path):
    """knn2img.py: a prompt's point and those near it are the context, zeros the empty one."""
    from ldm.models.diffusion.ddim import DDIMSampler
    from ldm.models.diffusion.plms import PLMSSampler
    from ldm.modules.encoders.modules import FrozenCLIPTextEmbedder

    package = types.ModuleType("clip")
    package.load = lambda name, device="cpu", jit=False: (Space(), None)
    package.tokenize = lambda texts: torch.tensor([[len(text) % 99, 1, 2] for text in texts])
    monkeypatch.setitem(sys.modules, "clip", package)
    weights = tmp_path / "own.pt"
    weights.write_bytes(b"weights")
    model = tiny_model()
    encoder = FrozenCLIPTextEmbedder(str(weights)).to("cpu")
    c = encoder.encode(["a red circle", "a star"])
    c = torch.cat([c, keyed_input("neighbours", (2, 4, 128))], dim=1)
    for sampler in (DDIMSampler(model), PLMSSampler(model)):
        samples, _ = sampler.sample(
            S=2,
            conditioning=c,
            batch_size=c.shape[0],
            shape=[4, 8, 8],
            verbose=False,
            unconditional_guidance_scale=5.0,
            unconditional_conditioning=torch.zeros_like(c),
            eta=0.0,
        )
        assert model.decode_first_stage(samples).shape == (2, 3, 64, 64)
