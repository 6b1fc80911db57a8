# Stable Diffusion 1.5 learns your subject or your style, by LoRA. 0.86 B parameters, 512 x 512.
#
#     accelerate launch train_diffusion.py configs/sd15_lora.py --dataset=photos/
#     python sample.py --out_dir=out/sd15-lora --prompt="a sks dog on the moon" --num_samples=4
#
# Time:   ESTIMATE, never run on a GPU: 15 minutes on a recent GPU
# Memory: ESTIMATE: a GPU of 12 GB, or of 6 GB with --micro_batch_size=1 --gradient_checkpointing=True.
#         Weights 0.86e9 x 2 bytes (bf16), autoencoder 0.3 GB, activations of four images some 6 GB.
# Result: not measured. Each evaluation leaves its adapter beside its samples in samples/: choose by eye. Load
#         it with pipe.load_lora_weights("out/sd15-lora"), or kohya_lora.safetensors in ComfyUI.
# Data:   ten images, or some thousands, in --dataset=. Captions: a .txt file beside each image, a
#         metadata.jsonl with rows of {"file_name": ..., "text": ...}, or one for all, such as --caption="a
#         photo of a sks dog"
# Try:    --sample_prompts="a sks dog in snow", --max_steps=800, --learning_rate=5e-5, --lora_rank=4
#         --lora_alpha=4

out_dir = "out/sd15-lora"
init_from = "stable-diffusion-v1-5/stable-diffusion-v1-5"
dataset = "my_pictures"
image_size = 512
val_fraction = 0.0  # a few images measure little: every evaluation keeps its adapter beside its samples
test_fraction = 0.0

adapter = "lora"
lora_rank = 16
lora_alpha = 16.0
ema_decay = 0.0

batch_size = 4
max_steps = 1500
learning_rate = 1e-4  # of AdamW
lr_schedule = "constant"
beta1 = 0.9
beta2 = 0.999
weight_decay = 0.01

sample_steps = 25
guidance = 7.0
eval_interval = 250
save_interval = 250
