# Your own pictures, some hundreds or thousands of one kind, at 64 x 64 on one GPU: 20 M parameters.
#
#     accelerate launch train_diffusion.py configs/my_pictures.py --dataset=path/to/folder
#     python sample.py --out_dir=out/my-pictures --num_samples=16
#
# Estimated at a quarter of an hour on a recent GPU; not measured. Any sizes and formats do; the middle of a picture is
# used. If subfolders are classes: --label_column=label. With less than about a thousand pictures it learns them by
# heart: val/loss rises while train/loss still falls; the weights of the best evaluation are kept.

out_dir = "out/my-pictures"
dataset = "my_pictures"
label_column = ""
image_size = 64
patch_size = 4
val_fraction = 0.1
test_fraction = 0.0

n_layer = 8
n_head = 6
n_embd = 384
max_steps = 10000
warmup_steps = 100
ema_decay = 0.9995

eval_interval = 1000
eval_batches = 0  # the whole split
save_interval = 1000
num_workers = 4
