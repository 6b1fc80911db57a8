# Qwen-Image learns your subject or your style, by LoRA. 20 B parameters, 512 x 512.
#
#     accelerate launch train_diffusion.py configs/qwen_image_lora.py --dataset=photos/
#     python sample.py --out_dir=out/qwen-image-lora --prompt="a sks dog on the moon" --num_samples=4
#
# Time:   ESTIMATE, never run on a GPU: 45 minutes on an H100, at 40 % of 989 TFLOP/s. 1,024 tokens x 20.4e9 x
#         2 FLOP x 4 = 0.17 PFLOP per image; 1,500 steps x 4 images.
# Memory: ESTIMATE: a GPU of 48 GB, better of 80. Weights 20.4e9 x 2 bytes (bf16) = 41 GB, activations of one
#         image with checkpointing some 4 GB. The text encoder (Qwen2.5-VL of 7 B, 16 GB) leaves the GPU
#         before training; sample.py holds both, 57 GB. Images go through the model one by one, as captions
#         differ in length.
# Result: not measured. Each evaluation leaves its adapter beside its samples in samples/: choose by eye.
# Data:   ten images or more in --dataset=. Captions: see sd15_lora.py
# Try:    --sample_prompts="a sks dog in snow". --frozen_fp8=True stores frozen weights in 8 bits: computed 20
#         GB instead of 41 GB

out_dir = "out/qwen-image-lora"
init_from = "Qwen/Qwen-Image"
dataset = "my_pictures"
image_size = 512
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
