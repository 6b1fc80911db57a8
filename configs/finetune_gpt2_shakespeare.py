# GPT-2 XL fine-tuned on Shakespeare, all weights: nanoGPT's setting of this name. 1,560 M parameters.
#
#     accelerate launch train_lm.py configs/finetune_gpt2_shakespeare.py
#     python sample.py --out_dir=out/gpt2-shakespeare --prompt="ROMEO:"
#
# Time:   ESTIMATE, never run: less than the download of 6.4 GB. 20 steps x 32,768 tokens x 6 x 1.56e9 =
#         6.1e15 FLOP.
# Memory: ESTIMATE: a GPU of 40 GB. Weights, gradients and AdamW's averages in fp32 are 1.56e9 x 16 bytes = 25
#         GB.
# Result: not measured
# Data:   Shakespeare's plays, 1.1 MB, is downloaded
# Try:    on a laptop, --init_from=gpt2 --batch_size=4 --block_size=256

out_dir = "out/gpt2-shakespeare"
init_from = "gpt2-xl"
dataset = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
val_fraction = 0.1
test_fraction = 0.0

block_size = 1024
batch_size = 32
micro_batch_size = 1
max_steps = 20

learning_rate = 3e-5  # of AdamW
lr_schedule = "constant"
warmup_steps = 0
beta1 = 0.9
weight_decay = 0.1

eval_interval = 5
eval_batches = 2
log_interval = 1
save_interval = 20
