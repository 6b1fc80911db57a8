# ImageNet at 256 x 256 in the latents of Stable Diffusion's autoencoder, as DiT-B/2: 130 M parameters, eight GPUs.
#
#     accelerate launch --config_file configs/accelerate/ddp.yaml train_diffusion.py configs/imagenet256_latent.py
#     python sample.py --out_dir=out/imagenet256 --class_label=207 --num_samples=16 --guidance=4
#
# All of this is an estimate, nothing was measured. The data set needs a login at the hub and consent to its terms.
# Latents: 1.28 M pictures of 4 x 32 x 32 x 2 bytes, as they are and mirrored: 21 GB, made once by the first process in
# about an hour. Work: 12 layers x 12 x 768^2 multiplied parameters x 256 tokens x 2 + attention = 46 GFLOP a picture,
# 138 with the backward pass. Length: 400,000 steps of 256 pictures = 80 times through the data, as in the paper of DiT.
# Time: 1.02e8 pictures x 138 GFLOP = 1.4e19 FLOP, at 40 % of the 989 TFLOP/s of eight H100s 75 minutes, and the loader
# has to bring 23,000 latents a second, 180 MB/s. Peebles & Xie (arXiv:2212.09748) report an FID of 43 for this size,
# length and no guidance, with another objective and optimizer.

out_dir = "out/imagenet256"
dataset = "ILSVRC/imagenet-1k"
vae = "stabilityai/sd-vae-ft-mse"
image_size = 256
flip = True
val_fraction = 0.01
test_fraction = 0.0  # its test split has no classes

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
