# Stable Diffusion XL learns your subject or your style, by LoRA. 2.6 B parameters, 1024 x 1024.
#
#     accelerate launch train_diffusion.py configs/sdxl_lora.py --dataset=photos/
#     python sample.py --out_dir=out/sdxl-lora --prompt="a sks dog on the moon" --num_samples=4
#
# Time:   ESTIMATE, never run on a GPU: an hour on a recent GPU
# Memory: ESTIMATE: a GPU of 12 to 16 GB. Weights 2.6e9 x 2 bytes (bf16), autoencoder 0.3 GB, activations of
#         one image with checkpointing some 4 GB; before training, text encoders 3.3 GB, autoencoder in fp32
#         some 8 GB.
# Result: not measured. Each evaluation leaves its adapter beside its samples in samples/: choose by eye.
# Data:   ten images or more in --dataset=. Captions: see sd15_lora.py
# Try:    --sample_prompts="a sks dog in snow". --frozen_fp8=True stores frozen weights in 8 bits: computed
#         2.6 GB instead of 5.1 GB

out_dir = "out/sdxl-lora"
init_from = "stabilityai/stable-diffusion-xl-base-1.0"
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

sample_steps = 30
guidance = 7.0
eval_interval = 250
save_interval = 250
