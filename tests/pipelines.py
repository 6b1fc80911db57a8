"""
Pipelines of diffusers with random weights: tiny ones of eleven families, and ones of the true shapes of SD 1.5 and SDXL.

make_pipeline(folder, kind) writes one. make_vae() makes an autoencoder. draw() lets a pipeline draw by itself.
"""

from pathlib import Path

import diffusers
import numpy as np
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

# The width, layers and heads of the text encoders of pipelines with a UNet.
ENCODERS = {"sd": [(24, 3, 2)], "sd2": [(32, 3, 2)], "sdxl": [(24, 3, 2), (16, 3, 2)]}
ENCODERS |= {"sd15": [(768, 12, 12)], "sdxl10": [(768, 12, 12), (1280, 32, 20)]}
LETTERS = sorted(pre_tokenizers.ByteLevel.alphabet())
TEXT = {"vocab_size": 257, "hidden_size": 16, "intermediate_size": 32, "pad_token_id": 256}
TEXT |= {"num_attention_heads": 2, "num_key_value_heads": 1}
CHAT = "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }} {% endfor %}"

# ---- Tokenizers, text encoders, autoencoders ----


def make_clip(width, layers, heads, kind=transformers.CLIPTextModelWithProjection):
    """Return a tokenizer of letters and a text encoder."""
    words = [*LETTERS, *(f"{letter}</w>" for letter in LETTERS), "<|startoftext|>", "<|endoftext|>"]
    vocabulary = {word: i for i, word in enumerate(words)}
    tok = transformers.CLIPTokenizer(vocab=vocabulary, merges=[], model_max_length=77)
    shape = {"hidden_size": width, "intermediate_size": 4 * width, "projection_dim": width}
    shape |= {"num_hidden_layers": layers, "num_attention_heads": heads, "vocab_size": len(words)}
    ids = {"bos_token_id": 512, "eos_token_id": 513, "pad_token_id": 513}
    return tok, kind(transformers.CLIPTextConfig(**shape, **ids)).eval()


def make_byte_tokenizer(n_unused=0):
    """Return a tokenizer of bytes with a chat template, and with more tokens that no text has."""
    words = [*LETTERS, "<pad>", *(f"unused{i}" for i in range(n_unused))]
    vocabulary = {word: i for i, word in enumerate(words)}
    core = Tokenizer(models.BPE(vocabulary, []))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(False)
    core.decoder = decoders.ByteLevel()
    tok = transformers.PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", eos_token="<pad>")
    tok.chat_template = CHAT
    return tok


def make_text_model(kind, layers=2):
    return kind(kind.config_class(**TEXT, num_hidden_layers=layers, head_dim=8)).eval()


def make_t5(width, kind=transformers.T5EncoderModel):
    shape = {"vocab_size": 257, "d_model": width, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2}
    return kind(kind.config_class(**shape)).eval()


def make_vae(channels, kind=diffusers.AutoencoderKL, widths=(8, 8), **config):
    n = len(widths)
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * n, "up_block_types": ("UpDecoderBlock2D",) * n}
    blocks |= {"norm_num_groups": min(32, widths[0] // 2), "layers_per_block": 2 if n == 4 else 1}
    return kind(block_out_channels=widths, latent_channels=channels, **blocks, **config)


# ---- Families: each function returns the class of the pipeline and its parts, without the scheduler ----

HEADS = {"attention_head_dim": 8, "num_attention_heads": 2}
LATENTS = {"in_channels": 4, "out_channels": 4, "sample_size": 8}


def make_parts(transformer, vae=None):
    """Return the parts of a pipeline that most families have. A factor of 3 gives latents a variance of about 1."""
    vae = vae or make_vae(4, scaling_factor=3.0, shift_factor=0.1)
    return {"transformer": transformer, "vae": vae, "tokenizer": make_byte_tokenizer()}


def make_unet_pipeline(kind):
    encoders = ENCODERS[kind]
    n_time = 4 if kind == "sdxl" else 256
    shape = {"sample_size": 8, "layers_per_block": 1, "block_out_channels": (16, 32), "norm_num_groups": 8}
    shape |= {"attention_head_dim": (2, 4), "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D")}
    shape |= {"up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D")}
    vae = make_vae(4, scaling_factor=3.0)
    if kind == "sd15":
        shape = {"sample_size": 64}  # the rest is the default of UNet2DConditionModel
        vae = make_vae(4, widths=(128, 256, 512, 512), scaling_factor=0.18215)
    if kind == "sdxl10":
        shape = {
            "sample_size": 128,
            "block_out_channels": (320, 640, 1280),
            "attention_head_dim": (5, 10, 20),
        }
        shape |= {"down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D")}
        shape |= {"up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D")}
        shape |= {"transformer_layers_per_block": (1, 2, 10)}
        vae = make_vae(4, widths=(128, 256, 512, 512), scaling_factor=0.13025)
    if len(encoders) == 2:
        shape |= {"addition_embed_type": "text_time", "addition_time_embed_dim": n_time}
        shape["projection_class_embeddings_input_dim"] = 6 * n_time + encoders[1][0]
    shape["use_linear_projection"] = kind not in ("sd", "sd15")
    shape["cross_attention_dim"] = sum(width for width, _, _ in encoders)
    parts = {"vae": vae, "feature_extractor": None}
    parts["unet"] = diffusers.UNet2DConditionModel(in_channels=4, out_channels=4, **shape)
    parts["tokenizer"], parts["text_encoder"] = make_clip(*encoders[0], transformers.CLIPTextModel)
    if len(encoders) == 2:
        parts["tokenizer_2"], parts["text_encoder_2"] = make_clip(*encoders[1])
        return diffusers.StableDiffusionXLPipeline, parts
    parts |= {"safety_checker": None, "requires_safety_checker": False}
    return diffusers.StableDiffusionPipeline, parts


def make_sd3():
    shape = {"joint_attention_dim": 40, "caption_projection_dim": 16, "pooled_projection_dim": 40}
    shape |= {"num_layers": 2, "pos_embed_max_size": 8}
    parts = make_parts(diffusers.SD3Transformer2DModel(**HEADS, **LATENTS, **shape))
    parts["tokenizer"], parts["text_encoder"] = make_clip(24, 2, 2)
    parts["tokenizer_2"], parts["text_encoder_2"] = make_clip(16, 2, 2)
    parts["tokenizer_3"], parts["text_encoder_3"] = make_byte_tokenizer(), make_t5(40)
    return diffusers.StableDiffusion3Pipeline, parts


def make_flux():
    shape = {"in_channels": 16, "joint_attention_dim": 24, "pooled_projection_dim": 24, "num_layers": 2}
    shape |= {"num_single_layers": 1, "guidance_embeds": True, "axes_dims_rope": (4, 2, 2)}
    parts = make_parts(diffusers.FluxTransformer2DModel(**HEADS, **shape))
    parts["tokenizer"], parts["text_encoder"] = make_clip(24, 2, 2, transformers.CLIPTextModel)
    parts["tokenizer_2"], parts["text_encoder_2"] = make_byte_tokenizer(), make_t5(24)
    return diffusers.FluxPipeline, parts


def make_flux_part():
    """Return Flux.1 in its true width, but 2 of 19 double and 4 of 38 single blocks, and a tiny T5."""
    shape = {"in_channels": 64, "joint_attention_dim": 4096, "pooled_projection_dim": 768}
    shape |= {"num_layers": 2, "num_single_layers": 4, "guidance_embeds": True}
    vae = make_vae(16, widths=(128, 256, 512, 512), scaling_factor=0.3611, shift_factor=0.1159)
    parts = make_parts(diffusers.FluxTransformer2DModel(**shape), vae)
    parts["tokenizer"], parts["text_encoder"] = make_clip(768, 12, 12, transformers.CLIPTextModel)
    parts["tokenizer_2"], parts["text_encoder_2"] = make_byte_tokenizer(), make_t5(4096)
    return diffusers.FluxPipeline, parts


def make_flux2():
    shape = {"in_channels": 16, "joint_attention_dim": 48, "axes_dims_rope": (2, 2, 2, 2), "num_layers": 2}
    shape |= {"num_single_layers": 1, "guidance_embeds": False}
    vae = make_vae(4, diffusers.AutoencoderKLFlux2)
    vae.bn.running_mean.normal_()
    vae.bn.running_var.uniform_(0.05, 0.2)
    parts = make_parts(diffusers.Flux2Transformer2DModel(**HEADS, **shape), vae)
    parts["text_encoder"] = make_text_model(transformers.Qwen3ForCausalLM, layers=28)  # it reads the 27th
    return diffusers.Flux2KleinPipeline, parts


def make_z_image():
    shape = {"in_channels": 4, "dim": 16, "n_layers": 2, "n_refiner_layers": 1, "n_heads": 2}
    shape |= {"n_kv_heads": 2, "cap_feat_dim": 16, "axes_dims": [4, 2, 2], "axes_lens": [1024, 32, 32]}
    parts = make_parts(diffusers.ZImageTransformer2DModel(**shape))
    parts["text_encoder"] = make_text_model(transformers.Qwen3Model)
    return diffusers.ZImagePipeline, parts


def make_qwen_image():
    shape = {"in_channels": 16, "out_channels": 4, "joint_attention_dim": 16, "axes_dims_rope": (4, 2, 2)}
    video = {"base_dim": 8, "z_dim": 4, "dim_mult": [1, 1], "temperal_downsample": [False]}
    video |= {"latents_mean": [0.1, -0.2, 0.0, 0.3], "latents_std": [0.3, 0.4, 0.3, 0.2], "num_res_blocks": 1}
    transformer = diffusers.QwenImageTransformer2DModel(**HEADS, **shape, num_layers=2)
    parts = make_parts(transformer, diffusers.AutoencoderKLQwenImage(**video))
    vision = dict.fromkeys(("hidden_size", "intermediate_size", "out_hidden_size"), 16)
    vision |= {"depth": 1, "num_heads": 2}
    text = {"rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e6}}
    text |= TEXT | {"num_hidden_layers": 2}
    config = transformers.Qwen2_5_VLConfig(text_config=text, vision_config=vision)
    parts["text_encoder"] = transformers.Qwen2_5_VLForConditionalGeneration(config).eval()
    return diffusers.QwenImagePipeline, parts


def make_sana():
    shape = {"num_cross_attention_heads": 2, "cross_attention_head_dim": 8, "cross_attention_dim": 16}
    sides = {"block_out_channels": (8, 8), "layers_per_block": (1, 1), "qkv_multiscales": ((), ())}
    sides = {f"{side}_{name}": value for name, value in sides.items() for side in ("encoder", "decoder")}
    vae = diffusers.AutoencoderDC(latent_channels=4, scaling_factor=2.0, **sides)
    shape |= {"num_layers": 2, "caption_channels": 16}
    parts = make_parts(diffusers.SanaTransformer2DModel(**HEADS, **LATENTS, **shape), vae)
    parts["text_encoder"] = make_text_model(transformers.Gemma2Model)
    return diffusers.SanaPipeline, parts


def make_aura_flow():
    shape = {"num_mmdit_layers": 1, "num_single_dit_layers": 1, "joint_attention_dim": 24}
    shape |= {"caption_projection_dim": 16, "pos_embed_max_size": 64}
    transformer = diffusers.AuraFlowTransformer2DModel(**HEADS, **LATENTS, **shape)
    parts = make_parts(transformer, make_vae(4, scaling_factor=3.0))
    parts["text_encoder"] = make_t5(24, transformers.UMT5EncoderModel)
    return diffusers.AuraFlowPipeline, parts


def make_pixart():
    shape = {"cross_attention_dim": 16, "caption_channels": 24, "num_layers": 2}
    transformer = diffusers.PixArtTransformer2DModel(**HEADS, **LATENTS | {"out_channels": 8}, **shape)
    parts = make_parts(transformer, make_vae(4, scaling_factor=3.0))
    parts["text_encoder"] = make_t5(24)
    return diffusers.PixArtSigmaPipeline, parts


TRANSFORMERS = {"sd3": make_sd3, "flux": make_flux, "flux2": make_flux2, "z_image": make_z_image}
TRANSFORMERS |= {"qwen_image": make_qwen_image, "sana": make_sana, "aura_flow": make_aura_flow}
TRANSFORMERS |= {"pixart": make_pixart}
FAMILIES = ["sd", "sd2", "sdxl", *TRANSFORMERS]  # the last one takes no LoRA

# ---- Pipelines ----


def make_scheduler(kind):
    noise = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}
    if kind in ("sd", "sd15"):
        return diffusers.PNDMScheduler(skip_prk_steps=True, **noise)
    if kind == "sd2":
        return diffusers.DDIMScheduler(clip_sample=False, prediction_type="v_prediction", **noise)
    if kind in ("sdxl", "sdxl10", "pixart"):
        return diffusers.DDIMScheduler(clip_sample=False, **noise)
    if kind == "sana":
        flow = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0}
        return diffusers.DPMSolverMultistepScheduler(**flow)
    dynamic = kind in ("flux", "flux_part", "flux2", "qwen_image")  # the shift depends on the resolution
    return diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=dynamic)


def make_pipeline(folder, kind, device="cpu", dtype=torch.float32):
    """Write a pipeline of FAMILIES, or "sd15", "sdxl10" or "flux_part", to a folder. Return the folder."""
    torch.manual_seed(0)
    make = make_flux_part if kind == "flux_part" else TRANSFORMERS.get(kind)
    with torch.device(device):  # a GPU draws the weights of the large ones much faster
        pipeline_class, parts = make_unet_pipeline(kind) if kind in ENCODERS else make()
    pipe = pipeline_class(scheduler=make_scheduler(kind), **parts)
    pipe.to(dtype).save_pretrained(folder)
    return Path(folder)


def draw(pipe, prompts, seeds, **kwargs):
    """Return what a pipeline of diffusers draws by itself, image by image, as a tensor (B, H, W, 3)."""
    images = []
    for prompt, seed in zip(prompts, seeds, strict=True):
        rng = torch.Generator().manual_seed(seed)
        images += pipe(prompt=prompt, generator=rng, **kwargs).images
    return torch.tensor(np.stack(images)).float()
