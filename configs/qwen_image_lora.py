# Qwen-Image, a flow transformer of 20 B parameters, learns your subject or your style from ten pictures or more.
#
#     accelerate launch train_diffusion.py configs/qwen_image_lora.py --dataset=photos/ --sample_prompts="a sks dog in snow"
#     python sample.py --out_dir=out/qwen-image-lora --prompt="a sks dog on the moon" --num_samples=4
#
# Captions as in sd15_lora.py. Not measured on a GPU; all of this is an estimate. Memory: 20.4e9 weights x 2 bytes (bf16)
# = 41 GB, activations of one picture of 512 x 512 with checkpointing some 4 GB: a GPU of 48 GB, better of 80. The text
# encoder (Qwen2.5-VL of 7 B, 16 GB) leaves before that; sample.py holds both, 57 GB. Its captions differ in length, so
# pictures pass one by one, whatever micro_batch_size says. Time: 1,024 tokens x 20.4e9 x 2 FLOP x 4 = 0.17 PFLOP a
# picture; 1,500 steps x 4 pictures at 40 % of the 989 TFLOP/s of an H100: 45 minutes.

out_dir = "out/qwen-image-lora"
init_from = "Qwen/Qwen-Image"
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
