# Flux.1 dev, a flow transformer of 12 B parameters, learns your subject or your style from ten pictures or more.
#
#     accelerate launch train_diffusion.py configs/flux_lora.py --dataset=photos/ --sample_prompts="a sks dog in snow"
#     python sample.py --out_dir=out/flux-lora --prompt="a sks dog on the moon" --num_samples=4
#
# Captions as in sd15_lora.py. The weights need a login at the hub and consent to their licence. Not measured on a GPU;
# all of this is an estimate. Memory: 11.9e9 weights x 2 bytes (bf16) = 24 GB, activations of one picture of 512 x 512
# with checkpointing some 3 GB: a GPU of 32 to 40 GB. The T5 text encoder (10 GB) leaves before that; sample.py holds
# both, 34 GB. Each caption is remembered in 4 MB. Time: 1,024 + 512 tokens x 11.9e9 x 2 FLOP x 4 = 0.15 PFLOP a picture;
# 1,500 steps x 4 pictures at 40 % of the 989 TFLOP/s of an H100: 40 minutes. Its guidance is distilled into the weights:
# training is at guidance 1.

out_dir = "out/flux-lora"
init_from = "black-forest-labs/FLUX.1-dev"
dataset = "my_pictures"
image_size = 512
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

eval_interval = 250
save_interval = 250
