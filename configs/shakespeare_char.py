# Shakespeare by characters on one GPU: nanoGPT's setting, 10.7 M parameters.
#
#     accelerate launch train_lm.py configs/shakespeare_char.py
#     python sample.py --out_dir=out/shakespeare-char --prompt="ROMEO:"
#
# nanoGPT documents a loss of 1.4697 after 5,000 iterations, in 3 minutes on an A100. Ours makes as large batches of as
# long blocks in fewer steps; it has not been measured on a GPU yet (tests/gpu/run.py does). Overfitting sets in before
# the end; the weights of the best evaluation are kept. Without a network: --dataset=path/to/input.txt

out_dir = "out/shakespeare-char"
dataset = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
tokenizer = "char"
val_fraction = 0.1  # the last tenth of the text, as nanoGPT has it
test_fraction = 0.0

block_size = 256
n_layer = 6
n_head = 6
n_kv_head = 6
n_embd = 384
dropout = 0.2
batch_size = 64
learning_rate = 0.02
max_steps = 2000
eval_interval = 250
eval_batches = 0  # the whole split
