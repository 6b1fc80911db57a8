# Z-Image, a flow transformer of 6 B parameters, learns your subject or your style from ten pictures or some thousands.
#
#     accelerate launch train_diffusion.py configs/zimage_lora.py --dataset=photos/ --sample_prompts="a sks dog in snow"
#     python sample.py --out_dir=out/zimage-lora --prompt="a sks dog on the moon" --num_samples=4
#
# Captions as in sd15_lora.py. Not measured on a GPU; all of this is an estimate. Memory: 6.2e9 weights x 2 bytes (bf16) =
# 12 GB, the autoencoder 0.3 GB, activations of one picture of 1024 x 1024 with checkpointing some 4 GB: a GPU of 20 to 24
# GB. The text encoder (Qwen3 of 4 B, 8 GB) leaves before that; sample.py holds both, 20 GB. Time: 4,096 tokens x 6.2e9 x
# 2 FLOP, four times that with checkpointing and backward, = 0.2 PFLOP a picture; 1,500 steps x 4 pictures at 40 % of the
# 989 TFLOP/s of an H100: an hour. For the distilled Z-Image-Turbo the convention is the same but the objective is not the
# one it was trained with: train on the base model.

out_dir = "out/zimage-lora"
init_from = "Tongyi-MAI/Z-Image"
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

eval_interval = 250
save_interval = 250
