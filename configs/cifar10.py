# Images of CIFAR-10 (32 x 32) by class, on one GPU. 58 M parameters. For CPUs, see cifar10_cpu.py.
#
#     accelerate launch train_diffusion.py configs/cifar10.py
#     python sample.py --out_dir=out/cifar10 --class_label=horse --num_samples=16
#
# Time:   ESTIMATE, never run on a GPU: 10 minutes on an H100, at 30 % of 989 TFLOP/s. 63 GFLOP per image with
#         the backward pass x 256 images x 11,000 steps = 1.8e17 FLOP. That is 56 times through the data.
# Memory: not estimated; lower micro_batch_size if it does not fit
# Result: not measured
# Data:   CIFAR-10 of the Hub. 2 % of the training images are used for validation; the test split is CIFAR's.
#         Without a network: --dataset=folder/ with its parquet files (and --image_column=image, if it is
#         called so)
# Try:    --prediction=v, --micro_batch_size=64, --guidance=1.5

out_dir = "out/cifar10"
dataset = "uoft-cs/cifar10"
image_column = "img"
image_size = 32
flip = True
val_fraction = 0.02
test_fraction = 0.1  # any value above 0: CIFAR has its own test split

patch_size = 2  # 256 tokens per image
n_layer = 12
n_head = 8
n_embd = 512
batch_size = 256
max_steps = 11000
warmup_steps = 200
ema_decay = 0.9995

eval_interval = 1000
eval_batches = 0  # all 1,000 images
save_interval = 1000
num_workers = 4
