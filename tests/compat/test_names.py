"""The names that other people's code and configurations import are where CompVis has them."""

import importlib
import inspect

import pytest
import torch
from torch import nn

from ldm.errors import LdmError
from ldm.paths import shipped
from ldm.util import get_obj_from_str, instantiate_from_config, load_config

PRESENT = {
    "ldm.util": """
        count_params default exists get_obj_from_str instantiate_from_config isimage ismap log_txt_as_img
        mean_flat parallel_data_prefetch""",
    "ldm.lr_scheduler": """
        LambdaLinearScheduler LambdaWarmUpCosineScheduler LambdaWarmUpCosineScheduler2""",
    "ldm.modules.attention": """
        BasicTransformerBlock CrossAttention FeedForward GEGLU LinearAttention MemoryEfficientCrossAttention
        Normalize SpatialSelfAttention SpatialTransformer default exists init_ max_neg_value uniq
        zero_module""",
    "ldm.modules.ema": "LitEma",
    "ldm.modules.diffusionmodules.util": """
        GroupNorm32 HybridConditioner SiLU avg_pool_nd betas_for_alpha_bar checkpoint conv_nd
        extract_into_tensor linear make_beta_schedule make_ddim_sampling_parameters make_ddim_timesteps
        mean_flat noise_like normalization scale_module timestep_embedding zero_module""",
    "ldm.modules.diffusionmodules.openaimodel": """
        AttentionBlock AttentionPool2d Downsample EncoderUNetModel QKVAttention QKVAttentionLegacy ResBlock
        TimestepBlock TimestepEmbedSequential TransposedUpsample UNetModel Upsample convert_module_to_f16
        convert_module_to_f32 count_flops_attn SpatialTransformer avg_pool_nd checkpoint conv_nd exists
        linear normalization timestep_embedding zero_module SiLU SuperResModel""",
    "ldm.modules.diffusionmodules.model": """
        AttnBlock Decoder Downsample Encoder LinAttnBlock MemoryEfficientAttnBlock Model Normalize ResnetBlock
        Upsample get_timestep_embedding make_attn nonlinearity FirstStagePostProcessor LatentRescaler
        MergedRescaleDecoder MergedRescaleEncoder Resize SimpleDecoder UpsampleDecoder Upsampler""",
    "ldm.modules.diffusionmodules.upscaling": """
        AbstractLowScaleModel ImageConcatWithNoiseAugmentation SimpleImageConcat""",
    "ldm.modules.x_transformer": """
        AbsolutePositionalEmbedding Attention AttentionLayers Encoder FeedForward RMSNorm Residual ScaleNorm
        TransformerWrapper""",
    "ldm.modules.distributions.distributions": """
        AbstractDistribution DiagonalGaussianDistribution DiracDistribution normal_kl""",
    "ldm.modules.encoders.modules": """
        AbstractEncoder BERTEmbedder BERTTokenizer ClassEmbedder FrozenCLIPEmbedder FrozenCLIPTextEmbedder
        FrozenClipImageEmbedder FrozenOpenCLIPEmbedder IdentityEncoder SpatialRescaler TransformerEmbedder""",
    "ldm.modules.losses": "DummyLoss LPIPSWithDiscriminator",
    "ldm.modules.losses.contperceptual": "DummyLoss LPIPSWithDiscriminator",
    "ldm.models.autoencoder": """
        AutoencoderKL DiagonalGaussianDistribution IdentityFirstStage VQModel VQModelInterface""",
    "ldm.models.diffusion.ddpm": """
        DDPM DiffusionWrapper LatentDepth2ImageDiffusion LatentDiffusion LatentFinetuneDiffusion
        LatentInpaintDiffusion LatentUpscaleDiffusion LatentUpscaleFinetuneDiffusion Layout2ImgDiffusion
        disabled_train""",
    "ldm.models.diffusion.ddim": """
        DDIMSampler extract_into_tensor make_ddim_sampling_parameters make_ddim_timesteps""",
    "ldm.models.diffusion.plms": "PLMSSampler",
    "ldm.models.diffusion.sampling_util": "append_dims norm_thresholding spatial_norm_thresholding",
    "ldm.models.diffusion.dpm_solver": "DPMSolverSampler",
    "ldm.models.diffusion.dpm_solver.dpm_solver": """
        DPM_Solver NoiseScheduleVP expand_dims interpolate_fn model_wrapper""",
    "ldm.models.diffusion.dpm_solver.sampler": "DPMSolverSampler",
    "ldm.data.base": "Txt2ImgIterableBaseDataset",
    "ldm.data.imagenet": """
        ImageNetBase ImageNetSR ImageNetSRTrain ImageNetSRValidation ImageNetTrain ImageNetValidation""",
    "ldm.data.lsun": """
        LSUNBase LSUNBedroomsTrain LSUNBedroomsValidation LSUNCatsTrain LSUNCatsValidation LSUNChurchesTrain
        LSUNChurchesValidation""",
}
# Classes that stand on a module of CompVis's and are handed out by it when they are asked for.
HOMES = {
    "ldm.models.diffusion.further_conditions": "ldm.models.diffusion.ddpm",
    "ldm.modules.diffusionmodules.rescaling": "ldm.modules.diffusionmodules.model",
}
REPLACED = "replaced by a better way to the same result"
ABSENT = {
    # Where CompVis or its successors have it: why it is not here.
    "ldm.util.AdamWwithEMAandWings": "Stable Diffusion 2's optimizer; no configuration asks for it",
    "ldm.models.diffusion.classifier.NoisyLatentImageClassifier": "its references lead nowhere in the original",
    "ldm.modules.diffusionmodules.util.CheckpointFunction": REPLACED + ": it fails on frozen parameters",
    "ldm.modules.encoders.modules.CLIPEmbeddingNoiseAugmentation": "of unCLIP, whose pictures' half is not here",
    "ldm.modules.encoders.modules.FrozenCLIPT5Encoder": "no configuration that was published names it",
    "ldm.modules.encoders.modules.FrozenOpenCLIPImageEmbedder": "of unCLIP: OpenCLIP's pictures' half",
    "ldm.modules.encoders.modules.FrozenT5Embedder": "no configuration that was published names it",
    "ldm.modules.image_degradation": "degradations that train an upscaler, made of OpenCV's and scipy's parts",
    "ldm.modules.losses.vqperceptual": "the loss of vector-quantised first stages; v1's is a KL one",
    "ldm.modules.midas": "a depth model with files of its own; depth_stage_config takes any",
}
# What the YAML files of CompVis and of ControlNet name as `target`, as far as the names above go.
TARGETS = """
    ldm.lr_scheduler.LambdaLinearScheduler
    ldm.lr_scheduler.LambdaWarmUpCosineScheduler
    ldm.models.autoencoder.AutoencoderKL
    ldm.models.autoencoder.VQModel
    ldm.models.autoencoder.VQModelInterface
    ldm.models.diffusion.ddpm.DDPM
    ldm.models.diffusion.ddpm.LatentDiffusion
    ldm.models.diffusion.ddpm.LatentDepth2ImageDiffusion
    ldm.models.diffusion.ddpm.LatentInpaintDiffusion
    ldm.models.diffusion.ddpm.LatentUpscaleDiffusion
    ldm.models.diffusion.ddpm.LatentUpscaleFinetuneDiffusion
    ldm.models.diffusion.ddpm.Layout2ImgDiffusion
    ldm.data.imagenet.ImageNetSRTrain
    ldm.data.imagenet.ImageNetSRValidation
    ldm.data.imagenet.ImageNetTrain
    ldm.data.imagenet.ImageNetValidation
    ldm.data.lsun.LSUNBedroomsTrain
    ldm.data.lsun.LSUNBedroomsValidation
    ldm.data.lsun.LSUNCatsTrain
    ldm.data.lsun.LSUNCatsValidation
    ldm.data.lsun.LSUNChurchesTrain
    ldm.data.lsun.LSUNChurchesValidation
    ldm.modules.diffusionmodules.upscaling.ImageConcatWithNoiseAugmentation
    ldm.modules.diffusionmodules.openaimodel.UNetModel
    ldm.modules.encoders.modules.BERTEmbedder
    ldm.modules.encoders.modules.ClassEmbedder
    ldm.modules.encoders.modules.FrozenCLIPEmbedder
    ldm.modules.encoders.modules.FrozenOpenCLIPEmbedder
    ldm.modules.encoders.modules.SpatialRescaler
    ldm.modules.losses.LPIPSWithDiscriminator
    ldm.modules.losses.contperceptual.DummyLoss
    torch.nn.Identity
""".split()


@pytest.mark.parametrize("module", PRESENT)
def test_every_name_is_at_its_compvis_path(module):
    found = importlib.import_module(module)
    assert [name for name in PRESENT[module].split() if not callable(getattr(found, name, None))] == []


@pytest.mark.parametrize("module", PRESENT)
def test_classes_live_at_a_compvis_path(module):
    """These are the real homes, not re-exports, so that rebinding a global of one takes effect in it; but for HOMES."""
    found = importlib.import_module(module)
    classes = [one for name in PRESENT[module].split() if inspect.isclass(one := getattr(found, name))]
    homes = [HOMES.get(one.__module__, one.__module__) for one in classes]
    strays = [
        one
        for one, home in zip(classes, homes, strict=True)
        if one.__name__ not in PRESENT.get(home, "").split()
    ]
    assert strays == []


@pytest.mark.parametrize("name", ABSENT)
def test_what_is_left_out_is_left_out(name):
    """A name that appears after all belongs into the table of those present."""
    assert ABSENT[name]
    with pytest.raises((ImportError, AttributeError)):
        try:
            importlib.import_module(name)
        except ImportError:
            module, attribute = name.rsplit(".", 1)
            getattr(importlib.import_module(module), attribute)


@pytest.mark.parametrize("target", TARGETS)
def test_targets_resolve_to_the_class_itself(target):
    module, name = target.rsplit(".", 1)
    assert get_obj_from_str(target) is getattr(importlib.import_module(module), name)


@pytest.mark.parametrize("target", ["cldm.cldm.Other", "taming.data.faceshq.FFHQTrain"])
def test_targets_of_other_packages_are_refused_until_those_are_imported(target):
    with pytest.raises(LdmError, match=f"'{target}' is not allowed"):
        get_obj_from_str(target)


def test_main_py_of_compvis_is_our_trainer():
    data = pytest.importorskip("ldm.training.data", exc_type=ImportError)
    callbacks = pytest.importorskip("ldm.training.callbacks", exc_type=ImportError)
    assert get_obj_from_str("main.DataModuleFromConfig") is data.DataModuleFromConfig
    assert get_obj_from_str("main.ImageLogger") is callbacks.ImageLogger


def test_ways_of_attention_by_name():
    from ldm.modules.attention import BasicTransformerBlock, CrossAttention

    assert BasicTransformerBlock.ATTENTION_MODES == {
        "softmax": CrossAttention,
        "softmax-xformers": CrossAttention,
    }


@pytest.mark.parametrize("special", ["__is_first_stage__", "__is_unconditional__"])
def test_the_special_strings_build_nothing(special):
    assert instantiate_from_config(special) is None


@pytest.mark.parametrize(
    ("file", "tensors"), [("configs/v1-inference.yaml", 1130), ("configs/v1-inpainting.yaml", 1130)]
)
@pytest.mark.thinned(2)
def test_the_shipped_configurations_build_on_the_meta_device(file, tensors):
    """686 of the UNet, 248 of the autoencoder, 196 of the text encoder, and the tables computed for real."""
    with torch.device("meta"):
        model = instantiate_from_config(load_config(shipped(file))["model"])
    parameters = dict(model.named_parameters())
    assert len(parameters) == tensors and all(p.is_meta for p in parameters.values())
    assert model.alphas_cumprod.device.type == "cpu"
    assert model.alphas_cumprod[-1].item() == pytest.approx(0.004660, abs=1e-6)
    wide = 9 if "inpainting" in file else 4
    assert parameters["model.diffusion_model.input_blocks.0.0.weight"].shape == (320, wide, 3, 3)
    assert isinstance(model.first_stage_model.loss, nn.Identity)
