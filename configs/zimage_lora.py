# Z-Image learns your subject or your style, by LoRA. 6 B parameters, 1024 x 1024.
#
#     accelerate launch train_diffusion.py configs/zimage_lora.py --dataset=photos/
#     python sample.py --out_dir=out/zimage-lora --prompt="a sks dog on the moon" --num_samples=4
#
# Time:   ESTIMATE, never run on a GPU: an hour on an H100, at 40 % of 989 TFLOP/s. 4,096 tokens x 6.2e9 x 2
#         FLOP x 4 (with checkpointing and the backward pass) = 0.2 PFLOP per image; 1,500 steps x 4 images.
# Memory: ESTIMATE: a GPU of 20 to 24 GB. Weights 6.2e9 x 2 bytes (bf16) = 12 GB, autoencoder 0.3 GB,
#         activations of one image with checkpointing some 4 GB. The text encoder (Qwen3 of 4 B, 8 GB) leaves
#         the GPU before training; sample.py holds both, 20 GB.
# Result: not measured. Each evaluation leaves its adapter beside its samples in samples/: choose by eye.
# Data:   ten images or more in --dataset=. Captions: see sd15_lora.py
# Try:    --sample_prompts="a sks dog in snow", --image_size=512, --frozen_fp8=True (frozen weights in 8
#         bits). Z-Image-Turbo is distilled, but would be trained with another objective than its own: use the
#         base model.

out_dir = "out/zimage-lora"
init_from = "Tongyi-MAI/Z-Image"
dataset = "my_pictures"
image_size = 1024
val_fraction = 0.0  # a few images measure little: every evaluation keeps its adapter beside its samples
test_fraction = 0.0

adapter = "lora"
lora_rank = 16
lora_alpha = 16.0
ema_decay = 0.0
gradient_checkpointing = True

batch_size = 4
micro_batch_size = 1
max_steps = 1500
learning_rate = 1e-4  # of AdamW
lr_schedule = "constant"
beta1 = 0.9
beta2 = 0.999
weight_decay = 0.01

eval_interval = 250
save_interval = 250
