# Shakespeare by characters on a laptop: 0.7 M parameters, a minute and a quarter on two cores.
#
#     accelerate launch train_lm.py configs/shakespeare_char_cpu.py
#     python sample.py --out_dir=out/shakespeare-char-cpu --prompt="ROMEO:"
#
# Expected: a loss of 1.47 to 1.49, by seed, over the whole validation tenth. nanoGPT's setting for laptops (2,000
# iterations of 12 x 64 characters, 0.8 M parameters) gets to 1.89 in this time. Offline: --dataset=path/to/input.txt

out_dir = "out/shakespeare-char-cpu"
dataset = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
tokenizer = "char"
val_fraction = 0.1  # the last tenth of the text, as nanoGPT has it
test_fraction = 0.0

block_size = 256
batch_size = 12
n_kv_head = 1  # faster, and no worse here
learning_rate = 0.03
weight_decay = 0.1
max_steps = 1030
eval_interval = 1030
eval_batches = 0  # the whole split
save_interval = 515
