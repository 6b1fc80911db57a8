# Shakespeare, one character at a time, on a laptop. 0.6 M parameters.
#
#     accelerate launch train_lm.py configs/shakespeare_char_cpu.py
#     python sample.py --out_dir=out/shakespeare-char-cpu --prompt="ROMEO:"
#
# Time:   119 s, measured on two cores of an AMD EPYC with bfloat16 (median of three runs)
# Memory: 0.65 GB of main memory, measured on the EPYC
# Result: val/loss 1.48. In the same measurement, nanoGPT's setting for laptops (0.8 M parameters, 2,000 steps of
#         12 x 64 characters) got to 1.89 in 103 s.
# Data:   Shakespeare's plays, 1.1 MB, is downloaded. Without a network: --dataset=path/to/input.txt
# Try:    --n_layer=6 --n_embd=256 --max_steps=2000 --dropout=0.1

out_dir = "out/shakespeare-char-cpu"
dataset = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
tokenizer = "char"
val_fraction = 0.1  # the last 10 % of the text, as in nanoGPT
test_fraction = 0.0

block_size = 256
n_layer = 3
n_head = 2
n_kv_head = 2
n_embd = 128
batch_size = 12
learning_rate = 0.03  # of Muon; far too high for AdamW
weight_decay = 0.1
max_steps = 1150
eval_interval = 1150
eval_batches = 0  # all of the validation split
save_interval = 575
