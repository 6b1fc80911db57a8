# Stable Diffusion 3.5 medium, a flow transformer of 2.5 B parameters, learns your subject or your style.
#
#     accelerate launch train_diffusion.py configs/sd3_lora.py --dataset=photos/ --sample_prompts="a sks dog in snow"
#     python sample.py --out_dir=out/sd3-lora --prompt="a sks dog on the moon" --num_samples=4
#
# Captions as in sd15_lora.py. The weights need a login at the hub and consent to their licence. Not measured on a GPU;
# all of this is an estimate. Memory: 2.5e9 weights x 2 bytes (bf16) = 5 GB, activations of one picture of 1024 x 1024
# with checkpointing some 4 GB: a GPU of 12 to 16 GB. The text encoders (11 GB, most of it T5) leave before that;
# sample.py holds all, 16 GB. Time: 4,096 tokens x 2.5e9 x 2 FLOP x 4 and attention = 0.1 PFLOP a picture; 1,500 steps x 4
# pictures at 40 % of the 989 TFLOP/s of an H100: half an hour.

out_dir = "out/sd3-lora"
init_from = "stabilityai/stable-diffusion-3.5-medium"
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
