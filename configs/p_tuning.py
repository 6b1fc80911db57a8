# GPT-2 stays as it is, and twenty learned vectors before every text make it write Shakespeare (P-tuning).
#
#     accelerate launch train_lm.py configs/p_tuning.py
#     python sample.py --out_dir=out/p-tuning --prompt="ROMEO:"
#
# Not measured. What is kept is 20 x 768 numbers, 61 kB. A few minutes on one GPU, half an hour on a laptop.

out_dir = "out/p-tuning"
init_from = "gpt2"
dataset = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
val_fraction = 0.1
test_fraction = 0.0
adapter = "p_tuning"
virtual_tokens = 20

block_size = 256
batch_size = 16
max_steps = 500

learning_rate = 1e-3
lr_schedule = "cosine"
beta1 = 0.9
weight_decay = 0.0

eval_interval = 100
save_interval = 100
