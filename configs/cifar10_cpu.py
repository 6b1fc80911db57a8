# CIFAR-10 on two CPU cores in eleven minutes: 1.9 M parameters, tokens of 4 x 4 pixels.
#
#     accelerate launch train_diffusion.py configs/cifar10_cpu.py
#     python sample.py --out_dir=out/cifar10-cpu --class_label=ship --num_samples=16
#
# Expected: a val/loss of 0.18, and small pictures with the colours and the layout of their classes; for details it
# takes a GPU and configs/cifar10.py. Without a network: --dataset=folder/ with the parquet files of the data set (and
# --image_column=image, if their column is called so).

out_dir = "out/cifar10-cpu"
dataset = "uoft-cs/cifar10"
image_column = "img"
image_size = 32
patch_size = 4
flip = True
val_fraction = 0.02
test_fraction = 0.1  # CIFAR's own test split

max_steps = 3000
eval_interval = 1000
eval_batches = 8
save_interval = 1000
