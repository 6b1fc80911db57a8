# Stable Diffusion 3.5 medium learns your subject or your style, by LoRA. 2.5 B parameters, 1024 x 1024.
#
#     accelerate launch train_diffusion.py configs/sd3_lora.py --dataset=photos/
#     python sample.py --out_dir=out/sd3-lora --prompt="a sks dog on the moon" --num_samples=4
#
# Time:   ESTIMATE, never run on a GPU: 30 minutes on an H100, at 40 % of 989 TFLOP/s. 4,096 tokens x 2.5e9 x
#         2 FLOP x 4 and attention = 0.1 PFLOP per image; 1,500 steps x 4 images.
# Memory: ESTIMATE: a GPU of 12 to 16 GB. Weights 2.5e9 x 2 bytes (bf16) = 5 GB, activations of one image with
#         checkpointing some 4 GB. The text encoders (11 GB, most of it T5) leave the GPU before training;
#         sample.py holds all, 16 GB.
# Result: not measured. Each evaluation leaves its adapter beside its samples in samples/: choose by eye.
# Data:   ten images or more in --dataset=. Captions: see sd15_lora.py Accept the license of the weights on
#         the Hub, then `hf auth login`.
# Try:    --sample_prompts="a sks dog in snow", --image_size=512, --frozen_fp8=True (frozen weights in 8 bits)

out_dir = "out/sd3-lora"
init_from = "stabilityai/stable-diffusion-3.5-medium"
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
