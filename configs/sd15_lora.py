# Stable Diffusion 1.5 learns your subject or your style from ten pictures or some thousands, by LoRA.
#
#     accelerate launch train_diffusion.py configs/sd15_lora.py --dataset=photos/ --sample_prompts="a sks dog in snow"
#     python sample.py --out_dir=out/sd15-lora --prompt="a sks dog on the moon" --num_samples=4
#
# Captions: a .txt file beside each picture, a metadata.jsonl with rows of {"file_name": ..., "text": ...}, or one for all
# of them, as --caption="a photo of a sks dog". The adapter loads in diffusers, pipe.load_lora_weights("out/sd15-lora"),
# and as kohya_lora.safetensors in ComfyUI and its like.
#
# Not measured on a GPU. Memory (estimate): 0.86e9 weights x 2 bytes (bf16), the autoencoder 0.3 GB, activations of four
# pictures of 512 x 512 some 6 GB: a GPU of 12 GB; with --micro_batch_size=1 --gradient_checkpointing=True one of 6 GB.
# Time (estimate): a quarter of an hour on a recent GPU.

out_dir = "out/sd15-lora"
init_from = "stable-diffusion-v1-5/stable-diffusion-v1-5"
dataset = "my_pictures"
image_size = 512
val_fraction = 0.0  # few pictures measure little: each evaluation leaves its adapter beside its grid
test_fraction = 0.0

adapter = "lora"
lora_rank = 16
lora_alpha = 16.0
ema_decay = 0.0

batch_size = 4
max_steps = 1500
learning_rate = 1e-4
lr_schedule = "constant"
beta1 = 0.9
beta2 = 0.999
weight_decay = 0.01

sample_steps = 25
guidance = 7.0
eval_interval = 250
save_interval = 250
