# Flux.1 dev learns your subject or your style, by LoRA. 12 B parameters, 512 x 512.
#
#     accelerate launch train_diffusion.py configs/flux_lora.py --dataset=photos/
#     python sample.py --out_dir=out/flux-lora --prompt="a sks dog on the moon" --num_samples=4
#
# Time:   ESTIMATE, never run on a GPU: 40 minutes on an H100, at 40 % of 989 TFLOP/s. (1,024 + 512) tokens x
#         11.9e9 x 2 FLOP x 4 = 0.15 PFLOP per image; 1,500 steps x 4 images.
# Memory: ESTIMATE: a GPU of 32 to 40 GB. Weights 11.9e9 x 2 bytes (bf16) = 24 GB, activations of one image
#         with checkpointing some 3 GB. The T5 text encoder (10 GB) leaves the GPU before training; sample.py
#         holds both, 34 GB. Each caption takes 4 MB of disk.
# Result: not measured. Each evaluation leaves its adapter beside its samples in samples/: choose by eye.
#         Guidance is distilled into the weights of Flux.1 dev; training is at guidance 1.
# Data:   ten images or more in --dataset=. Captions: see sd15_lora.py Accept the license of the weights on
#         the Hub, then `hf auth login`.
# Try:    --sample_prompts="a sks dog in snow". --frozen_fp8=True stores frozen weights in 8 bits: computed 12
#         GB instead of 24 GB

out_dir = "out/flux-lora"
init_from = "black-forest-labs/FLUX.1-dev"
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
