# Stable Diffusion XL learns your subject or your style from ten pictures or some thousands, by LoRA.
#
#     accelerate launch train_diffusion.py configs/sdxl_lora.py --dataset=photos/ --sample_prompts="a sks dog in snow"
#     python sample.py --out_dir=out/sdxl-lora --prompt="a sks dog on the moon" --num_samples=4
#
# Captions as in sd15_lora.py. Not measured on a GPU. Memory (estimate): 2.6e9 weights x 2 bytes (bf16), the autoencoder
# 0.3 GB, activations of one picture of 1024 x 1024 with checkpointing some 4 GB; before training the text encoders take
# 3.3 GB and the autoencoder, in fp32, some 8 GB: a GPU of 12 to 16 GB. Time (estimate): an hour on a recent GPU.

out_dir = "out/sdxl-lora"
init_from = "stabilityai/stable-diffusion-xl-base-1.0"
dataset = "my_pictures"
image_size = 1024
val_fraction = 0.0  # few pictures measure little: each evaluation leaves its adapter beside its grid
test_fraction = 0.0

adapter = "lora"
lora_rank = 16
lora_alpha = 16.0
ema_decay = 0.0
gradient_checkpointing = True

batch_size = 4
micro_batch_size = 1
max_steps = 1500
learning_rate = 1e-4
lr_schedule = "constant"
beta1 = 0.9
beta2 = 0.999
weight_decay = 0.01

sample_steps = 30
guidance = 7.0
eval_interval = 250
save_interval = 250
