# Shakespeare, one character at a time, on one GPU: the setting of nanoGPT. 11 M parameters.
#
#     accelerate launch train_lm.py configs/shakespeare_char.py
#     python sample.py --out_dir=out/shakespeare-char --prompt="ROMEO:"
#
# Time:   not measured. nanoGPT documents 3 minutes on an A100 for 5,000 steps.
# Memory: not measured
# Result: not measured. nanoGPT documents a validation loss of 1.4697. The model overfits before the end, and
#         the weights with the lowest val/loss are kept. Batches and blocks are nanoGPT's, the steps are
#         fewer.
# Data:   Shakespeare's plays, 1.1 MB, is downloaded. Without a network: --dataset=path/to/input.txt
# Try:    --dropout=0.3, --max_steps=1000

out_dir = "out/shakespeare-char"
dataset = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
tokenizer = "char"
val_fraction = 0.1  # the last 10 % of the text, as in nanoGPT
test_fraction = 0.0

block_size = 256
n_layer = 6
n_head = 6
n_kv_head = 6
n_embd = 384
dropout = 0.2
batch_size = 64
learning_rate = 0.02  # of Muon
max_steps = 2000
eval_interval = 250
eval_batches = 0  # all of the validation split
