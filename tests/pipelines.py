"""Pipelines of diffusers with random weights: tiny ones of ten families, and ones of the true shapes of SD 1.5 and XL."""

from pathlib import Path

import diffusers
import numpy as np
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

FAMILIES = ["sd", "sd2", "sdxl", "sd3", "flux", "flux2", "z_image", "qwen_image", "sana", "pixart"]
LETTERS = sorted(pre_tokenizers.ByteLevel.alphabet())
CHAT = "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }} {% endfor %}"

# ---- UNets ----
TINY = {"sample_size": 8, "layers_per_block": 1, "block_out_channels": (16, 32), "norm_num_groups": 8}
TINY |= {"attention_head_dim": (2, 4), "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D")}
TINY |= {"up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"), "cross_attention_dim": 24}
TINY_XL = TINY | {"cross_attention_dim": 40, "addition_time_embed_dim": 4, "use_linear_projection": True}
TINY_XL |= {"addition_embed_type": "text_time", "projection_class_embeddings_input_dim": 6 * 4 + 16}
XL = {"sample_size": 128, "block_out_channels": (320, 640, 1280), "attention_head_dim": (5, 10, 20)}
XL |= {"down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D")}
XL |= {"up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D")}
XL |= {"cross_attention_dim": 2048, "transformer_layers_per_block": (1, 2, 10)}
XL |= {"use_linear_projection": True, "addition_embed_type": "text_time", "addition_time_embed_dim": 256}
XL |= {"projection_class_embeddings_input_dim": 2816}
# the UNet, (width, layers, heads) of each text encoder, the autoencoder's widths and the factor of its latents
UNETS = {
    # with random weights, 3 makes the variance of latents about 1
    "sd": (TINY, [(24, 3, 2)], (8, 8), 3.0),
    "sd2": (TINY | {"use_linear_projection": True}, [(24, 3, 2)], (8, 8), 3.0),
    "sdxl": (TINY_XL, [(24, 3, 2), (16, 3, 2)], (8, 8), 3.0),
    "sd15": ({"sample_size": 64, "cross_attention_dim": 768}, [(768, 12, 12)], (128, 256, 512, 512), 0.18215),
    "sdxl10": (XL, [(768, 12, 12), (1280, 32, 20)], (128, 256, 512, 512), 0.13025),
}


def make_clip(width, layers, heads, kind=transformers.CLIPTextModelWithProjection):
    """-> a tokenizer of letters and a text encoder"""
    words = [*LETTERS, *(f"{letter}</w>" for letter in LETTERS), "<|startoftext|>", "<|endoftext|>"]
    vocabulary = {word: i for i, word in enumerate(words)}
    tok = transformers.CLIPTokenizer(vocab=vocabulary, merges=[], model_max_length=77)
    shape = {"hidden_size": width, "intermediate_size": 4 * width, "projection_dim": width}
    shape |= {"num_hidden_layers": layers, "num_attention_heads": heads, "vocab_size": len(words)}
    ids = {"bos_token_id": 512, "eos_token_id": 513, "pad_token_id": 513}
    return tok, kind(transformers.CLIPTextConfig(**shape, **ids)).eval()


def make_bytes():
    """-> a tokenizer of bytes, with a chat template"""
    core = Tokenizer(models.BPE({word: i for i, word in enumerate([*LETTERS, "<pad>"])}, []))
    core.pre_tokenizer, core.decoder = pre_tokenizers.ByteLevel(False), decoders.ByteLevel()
    tok = transformers.PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", eos_token="<pad>")
    tok.chat_template = CHAT
    return tok


def make_text_model(kind, **changes):
    shape = {"vocab_size": 257, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}
    shape |= {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8, "pad_token_id": 256}
    return kind(kind.config_class(**shape | changes)).eval()


def make_t5(width):
    shape = {"vocab_size": 257, "d_model": width, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2}
    return transformers.T5EncoderModel(transformers.T5Config(**shape)).eval()


def make_vae(channels, kind=diffusers.AutoencoderKL, widths=(8, 8), **config):
    n = len(widths)
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * n, "up_block_types": ("UpDecoderBlock2D",) * n}
    blocks |= {"norm_num_groups": min(32, widths[0] // 2), "layers_per_block": 1 + (n == 4)}
    return kind(block_out_channels=widths, latent_channels=channels, **blocks, **config)


def make_transformer_pipeline(kind):
    """-> the class of the pipeline and its parts, but for the scheduler"""
    heads = {"attention_head_dim": 8, "num_attention_heads": 2, "num_layers": 2}
    parts = {"vae": make_vae(4, scaling_factor=3.0, shift_factor=0.1), "tokenizer": make_bytes()}
    if kind == "sd3":
        shape = {"joint_attention_dim": 40, "caption_projection_dim": 16, "pooled_projection_dim": 40}
        shape |= {"sample_size": 8, "in_channels": 4, "out_channels": 4, "pos_embed_max_size": 8}
        parts["transformer"] = diffusers.SD3Transformer2DModel(**heads, **shape)
        parts["tokenizer"], parts["text_encoder"] = make_clip(24, 2, 2)
        parts["tokenizer_2"], parts["text_encoder_2"] = make_clip(16, 2, 2)
        parts["tokenizer_3"], parts["text_encoder_3"] = make_bytes(), make_t5(40)
        return diffusers.StableDiffusion3Pipeline, parts
    if kind == "flux":
        shape = {"in_channels": 16, "joint_attention_dim": 24, "pooled_projection_dim": 24}
        shape |= {"num_single_layers": 1, "guidance_embeds": True, "axes_dims_rope": (4, 2, 2)}
        parts["transformer"] = diffusers.FluxTransformer2DModel(**heads, **shape)
        parts["tokenizer"], parts["text_encoder"] = make_clip(24, 2, 2, transformers.CLIPTextModel)
        parts["tokenizer_2"], parts["text_encoder_2"] = make_bytes(), make_t5(24)
        return diffusers.FluxPipeline, parts
    if kind == "flux2":
        shape = {"in_channels": 16, "joint_attention_dim": 48, "axes_dims_rope": (2, 2, 2, 2)}
        shape |= {"num_single_layers": 1, "guidance_embeds": False}
        parts["transformer"] = diffusers.Flux2Transformer2DModel(**heads, **shape)
        vae = parts["vae"] = make_vae(4, diffusers.AutoencoderKLFlux2)
        vae.bn.running_mean.normal_(), vae.bn.running_var.uniform_(0.05, 0.2)
        parts["text_encoder"] = make_text_model(transformers.Qwen3ForCausalLM, num_hidden_layers=28)
        return diffusers.Flux2KleinPipeline, parts
    if kind == "z_image":
        shape = {"in_channels": 4, "dim": 16, "n_layers": 2, "n_refiner_layers": 1, "n_heads": 2}
        shape |= {"n_kv_heads": 2, "cap_feat_dim": 16, "axes_dims": [4, 2, 2], "axes_lens": [1024, 32, 32]}
        parts["transformer"] = diffusers.ZImageTransformer2DModel(**shape)
        parts["text_encoder"] = make_text_model(transformers.Qwen3Model)
        return diffusers.ZImagePipeline, parts
    if kind == "qwen_image":
        shape = {"in_channels": 16, "out_channels": 4, "joint_attention_dim": 16, "axes_dims_rope": (4, 2, 2)}
        parts["transformer"] = diffusers.QwenImageTransformer2DModel(**heads, **shape)
        video = {"base_dim": 8, "z_dim": 4, "dim_mult": [1, 1], "temperal_downsample": [False]}
        video |= {"latents_mean": [0.1, -0.2, 0.0, 0.3], "latents_std": [0.3, 0.4, 0.3, 0.2]}
        parts["vae"] = diffusers.AutoencoderKLQwenImage(num_res_blocks=1, **video)
        vision = dict.fromkeys(("hidden_size", "intermediate_size", "out_hidden_size"), 16)
        vision |= {"depth": 1, "num_heads": 2}
        text = {"vocab_size": 257, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}
        text |= {"num_attention_heads": 2, "num_key_value_heads": 1, "pad_token_id": 256}
        text |= {"rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e6}}
        config = transformers.Qwen2_5_VLConfig(text_config=text, vision_config=vision)
        parts["text_encoder"] = transformers.Qwen2_5_VLForConditionalGeneration(config).eval()
        return diffusers.QwenImagePipeline, parts
    if kind == "sana":
        shape = {"in_channels": 4, "out_channels": 4, "num_cross_attention_heads": 2, "caption_channels": 16}
        shape |= {"cross_attention_head_dim": 8, "cross_attention_dim": 16, "sample_size": 8}
        parts["transformer"] = diffusers.SanaTransformer2DModel(**heads, **shape)
        sides = {"block_out_channels": (8, 8), "layers_per_block": (1, 1), "qkv_multiscales": ((), ())}
        sides = {f"{side}_{name}": value for name, value in sides.items() for side in ("encoder", "decoder")}
        parts["vae"] = diffusers.AutoencoderDC(latent_channels=4, scaling_factor=2.0, **sides)
        parts["text_encoder"] = make_text_model(transformers.Gemma2Model)
        return diffusers.SanaPipeline, parts
    shape = {"in_channels": 4, "out_channels": 8, "cross_attention_dim": 16, "caption_channels": 24}
    parts["transformer"] = diffusers.PixArtTransformer2DModel(**heads, **shape, sample_size=8)
    parts["vae"], parts["text_encoder"] = make_vae(4, scaling_factor=3.0), make_t5(24)
    return diffusers.PixArtSigmaPipeline, parts


def make_unet_pipeline(kind):
    unet, encoders, widths, scaling_factor = UNETS[kind]
    parts = {"vae": make_vae(4, widths=widths, scaling_factor=scaling_factor), "feature_extractor": None}
    parts["unet"] = diffusers.UNet2DConditionModel(in_channels=4, out_channels=4, **unet)
    kinds = transformers.CLIPTextModel, transformers.CLIPTextModelWithProjection
    for name, shape, model in zip(("", "_2"), encoders, kinds):
        parts[f"tokenizer{name}"], parts[f"text_encoder{name}"] = make_clip(*shape, model)
    if len(encoders) == 2:
        return diffusers.StableDiffusionXLPipeline, parts
    unsafe = {"safety_checker": None, "requires_safety_checker": False}
    return diffusers.StableDiffusionPipeline, parts | unsafe


def make_scheduler(kind):
    if kind == "sana":
        flow = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0}
        return diffusers.DPMSolverMultistepScheduler(**flow)
    if kind not in (*UNETS, "pixart"):
        return diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    noise = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}
    noise |= {"prediction_type": "v_prediction" if kind == "sd2" else "epsilon"}
    if kind in ("sd", "sd15"):
        return diffusers.PNDMScheduler(skip_prk_steps=True, **noise)
    return diffusers.DDIMScheduler(clip_sample=False, **noise)


def make_pipeline(folder, kind):
    """Write one to `folder`: of FAMILIES, or "sd15", "sdxl10"; -> the folder"""
    torch.manual_seed(0)
    model, parts = make_unet_pipeline(kind) if kind in UNETS else make_transformer_pipeline(kind)
    model(scheduler=make_scheduler(kind), **parts).save_pretrained(folder)
    return Path(folder)


def draw(pipe, prompts, seeds, **kwargs):
    """-> what a pipeline of diffusers draws by itself, one after another, as a tensor"""
    pipe.set_progress_bar_config(disable=True)
    rngs = [torch.Generator().manual_seed(seed) for seed in seeds]
    drawn = [pipe(prompt=p, generator=rng, **kwargs).images[0] for p, rng in zip(prompts, rngs)]
    return torch.tensor(np.stack(drawn)).float()
