"""Pipelines of diffusers with random weights: tiny ones, and ones of the true shapes of SD 1.5 and SDXL 1.0."""

import json
from pathlib import Path

import diffusers
import torch
import transformers
from tokenizers.pre_tokenizers import ByteLevel

TINY = {"sample_size": 8, "layers_per_block": 1, "block_out_channels": (16, 32), "norm_num_groups": 8}
TINY_SD = TINY | {"attention_head_dim": (2, 4), "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D")}
TINY_SD |= {"up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"), "cross_attention_dim": 24}
TINY_SDXL = TINY_SD | {"cross_attention_dim": 40, "addition_time_embed_dim": 4, "use_linear_projection": True}
TINY_SDXL |= {"addition_embed_type": "text_time", "projection_class_embeddings_input_dim": 6 * 4 + 16}
SDXL = {"sample_size": 128, "block_out_channels": (320, 640, 1280), "attention_head_dim": (5, 10, 20)}
SDXL |= {"down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D")}
SDXL |= {"up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D")}
SDXL |= {
    "cross_attention_dim": 2048,
    "transformer_layers_per_block": (1, 2, 10),
    "use_linear_projection": True,
}
SDXL |= {"addition_embed_type": "text_time", "addition_time_embed_dim": 256}
SDXL |= {"projection_class_embeddings_input_dim": 2816}
# the UNet, (width, layers, heads) of each text encoder, the autoencoder's widths and the factor of its latents
SHAPES = {
    # with random weights, 3 makes the variance of latents about 1
    "sd": (TINY_SD, [(24, 3, 2)], (8, 8), 3.0),
    "sdxl": (TINY_SDXL, [(24, 3, 2), (16, 3, 2)], (8, 8), 3.0),
    "sd15": ({"sample_size": 64, "cross_attention_dim": 768}, [(768, 12, 12)], (128, 256, 512, 512), 0.18215),
    "sdxl10": (SDXL, [(768, 12, 12), (1280, 32, 20)], (128, 256, 512, 512), 0.13025),
}


def make_pipeline(folder, kind, **scheduler):
    """Write one to `folder`: a key of SHAPES, or "ddpm". scheduler: its config; -> the folder"""
    folder = Path(folder)
    torch.manual_seed(0)
    if kind == "ddpm":
        blocks = {"down_block_types": ("DownBlock2D", "AttnDownBlock2D")}
        blocks |= {"up_block_types": ("AttnUpBlock2D", "UpBlock2D")}
        unet = diffusers.UNet2DModel(**TINY, **blocks)
        diffusers.DDPMPipeline(unet, diffusers.DDPMScheduler(**scheduler)).save_pretrained(folder)
        return folder
    unet, encoders, widths, scaling_factor = SHAPES[kind]
    letters = sorted(ByteLevel.alphabet())
    words = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    vocabulary = {word: i for i, word in enumerate(words)}
    tok = transformers.CLIPTokenizer(vocab=vocabulary, merges=[], model_max_length=77)
    noise = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}
    noise |= {"timestep_spacing": "leading", "clip_sample": False} | scheduler
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * len(widths)}
    blocks |= {
        "up_block_types": ("UpDecoderBlock2D",) * len(widths),
        "norm_num_groups": min(32, widths[0] // 2),
    }
    blocks |= {"layers_per_block": 1 + (len(widths) == 4), "latent_channels": 4}
    vae = diffusers.AutoencoderKL(block_out_channels=widths, scaling_factor=scaling_factor, **blocks)
    parts = {"vae": vae, "scheduler": diffusers.DDIMScheduler(**noise), "feature_extractor": None}
    parts["unet"] = diffusers.UNet2DConditionModel(in_channels=4, out_channels=4, **unet)
    names, kinds = ("", "_2"), (transformers.CLIPTextModel, transformers.CLIPTextModelWithProjection)
    for name, make, (width, layers, heads) in zip(names, kinds, encoders):
        shape = {"hidden_size": width, "intermediate_size": 4 * width, "projection_dim": width}
        shape |= {"num_hidden_layers": layers, "num_attention_heads": heads, "vocab_size": len(words)}
        ids = {"bos_token_id": 512, "eos_token_id": 513, "pad_token_id": 513}
        parts |= {f"tokenizer{name}": tok}
        parts |= {f"text_encoder{name}": make(transformers.CLIPTextConfig(**shape, **ids)).eval()}
    if len(encoders) == 2:
        diffusers.StableDiffusionXLPipeline(**parts).save_pretrained(folder)
    else:
        options = {"safety_checker": None, "requires_safety_checker": False}
        diffusers.StableDiffusionPipeline(**parts, **options).save_pretrained(folder)
    if not scheduler and len(encoders) == 1:  # as the published file of SD 1.5, which leaves much unsaid
        published = {"_class_name": "PNDMScheduler", "_diffusers_version": "0.6.0", "beta_end": 0.012}
        published |= {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "num_train_timesteps": 1000}
        published |= {
            "set_alpha_to_one": False,
            "skip_prk_steps": True,
            "steps_offset": 1,
            "clip_sample": False,
        }
        (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(published))
        index = folder / "model_index.json"
        index.write_text(index.read_text().replace("DDIMScheduler", "PNDMScheduler"))
    return folder
