# CIFAR-10 on one GPU: 57 M parameters, about ten minutes on an H100.
#
#     accelerate launch train_diffusion.py configs/cifar10.py
#     python sample.py --out_dir=out/cifar10 --class_label=horse --num_samples=16
#
# All of this is an estimate, nothing was measured on a GPU yet. Work: 12 layers x 12 x 512^2 multiplied parameters x 256
# tokens x 2 + attention = 21 GFLOP a picture, three times that with the backward pass. Time: 11,000 steps x 256 pictures
# x 63 GFLOP = 1.8e17 FLOP, at 30 % of the 989 TFLOP/s of an H100 ten minutes. That is 56 times through the data.
# The test split is CIFAR's own; 2 % of the others validate. Without a network: --dataset=folder/ with the parquet
# files of the data set (and --image_column=image, if their column is called so).

out_dir = "out/cifar10"
dataset = "uoft-cs/cifar10"
image_column = "img"
image_size = 32
flip = True
val_fraction = 0.02
test_fraction = 0.1

n_layer = 12
n_head = 8
n_embd = 512
batch_size = 256
max_steps = 11000
warmup_steps = 200
ema_decay = 0.9995

eval_interval = 1000
eval_batches = 4  # all 1,000 pictures
save_interval = 1000
num_workers = 4
