# Small images of CIFAR-10 (32 x 32) by class, on two CPU cores. 1.9 M parameters.
#
#     accelerate launch train_diffusion.py configs/cifar10_cpu.py
#     python sample.py --out_dir=out/cifar10-cpu --class_label=ship --num_samples=16
#
# Time:   11 minutes on two CPU cores
# Memory: not measured
# Result: val/loss 0.18. The images have the colors and the layout of their classes, but no details; for
#         those, use cifar10.py on a GPU.
# Data:   CIFAR-10 of the Hub. 2 % of the training images are used for validation; the test split is CIFAR's.
#         Without a network: --dataset=folder/ with its parquet files (and --image_column=image, if it is
#         called so)
# Try:    --max_steps=6000, --prediction=v, --label_column= (without classes)

out_dir = "out/cifar10-cpu"
dataset = "uoft-cs/cifar10"
image_column = "img"
image_size = 32
flip = True
val_fraction = 0.02
test_fraction = 0.1  # any value above 0: CIFAR has its own test split

patch_size = 4  # 64 tokens per image
n_layer = 6
n_head = 2
n_embd = 128
batch_size = 64
max_steps = 3000
eval_interval = 1000
eval_batches = 8
save_interval = 1000
