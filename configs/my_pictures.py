# A model of your own images (64 x 64) from scratch, on one GPU. 22 M parameters.
#
#     accelerate launch train_diffusion.py configs/my_pictures.py --dataset=path/to/folder
#     python sample.py --out_dir=out/my-pictures --num_samples=16
#
# Time:   ESTIMATE, never run: 15 minutes on a recent GPU
# Memory: not measured; lower micro_batch_size if it does not fit
# Result: depends on the images. With fewer than about 1,000, the model learns them by heart: val/loss rises
#         while train/loss falls. The weights with the lowest val/loss are kept. For few images, fine-tune:
#         sd15_lora.py
# Data:   a folder of some hundreds or thousands of images of one kind. They are scaled and cropped to a
#         square.
# Try:    --label_column=label if each subfolder is a class, --flip=True if mirrored images are plausible

out_dir = "out/my-pictures"
dataset = "my_pictures"
label_column = ""  # subfolders are not classes
image_size = 64
val_fraction = 0.1
test_fraction = 0.0

patch_size = 4  # 256 tokens per image
n_layer = 8
n_head = 6
n_embd = 384
batch_size = 64
max_steps = 10000
warmup_steps = 100
ema_decay = 0.9995

eval_interval = 1000
eval_batches = 0  # all of the validation split
save_interval = 1000
num_workers = 4
