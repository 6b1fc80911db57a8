# ImageNet (256 x 256) by class, in latents of Stable Diffusion's autoencoder, as DiT-B/2. 130 M parameters.
#
#     accelerate launch --config_file configs/accelerate/ddp.yaml train_diffusion.py configs/imagenet256_latent.py
#     python sample.py --out_dir=out/imagenet256 --class_label="golden retriever" --num_samples=16 --guidance=4
#
# Time:   ESTIMATE, never run: 75 minutes on eight H100s, at 40 % of 989 TFLOP/s. 138 GFLOP per image with the
#         backward pass x 1.02e8 images (400,000 steps, 80 times through the data) = 1.4e19 FLOP.
# Memory: not estimated; lower micro_batch_size if it does not fit
# Result: not measured. Peebles & Xie (arXiv:2212.09748) report an FID of 43 for this size and length without
#         guidance, with another objective and optimizer.
# Data:   ImageNet of the Hub; accept its terms there, then `hf auth login`. The latents, also of the mirror
#         images, take 21 GB and are computed once, by all processes. They are read at 180 MB/s (23,000 per
#         second).
# Try:    --max_steps=40000 for a tenth of the run

out_dir = "out/imagenet256"
dataset = "ILSVRC/imagenet-1k"
vae = "stabilityai/sd-vae-ft-mse"
image_size = 256
flip = True
val_fraction = 0.01
test_fraction = 0.0  # its test split has no classes

patch_size = 2  # 256 tokens per image
n_layer = 12
n_head = 12
n_embd = 768
batch_size = 256
max_steps = 400000
warmup_steps = 1000
cooldown = 0.2
ema_decay = 0.9999
guidance = 4.0

eval_interval = 10000
eval_batches = 16
save_interval = 5000
num_workers = 4
