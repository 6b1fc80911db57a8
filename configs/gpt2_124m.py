# A GPT of the shape of GPT-2 (124 M parameters) on 1.7 billion tokens of FineWeb, on eight GPUs.
# Input and output embeddings are separate, so there are 162 M parameters, of which 124 M are multiplied.
#
#     accelerate launch --config_file configs/accelerate/ddp.yaml train_lm.py configs/gpt2_124m.py
#     accelerate launch train_lm.py configs/gpt2_124m.py                     # the same run on one GPU, slower
#     python sample.py --out_dir=out/gpt2-124m --prompt="The history of"
#
# Time:   ESTIMATE, never run: 7 minutes on eight H100s, 55 on one, at 45 % of 989 TFLOP/s. 6 x 124 M
#         + 12 x 12 layers x 768 x 1,024 = 0.86 GFLOP per token, times 1.7e9 tokens = 1.5e18 FLOP.
# Memory: not estimated; lower micro_batch_size if it does not fit
# Result: ESTIMATE: val/loss 3.3. The recipe is that of modded-nanogpt's optimization track (result 36, June
#         2026), where a similar GPT with Muon gets to 3.28 in as many steps. The track's AdamW took 5,625.
#         Measured on CPUs, two models (0.9 and 2.2 M parameters), two seeds each: with half of the steps, this
#         recipe got to a lower loss than AdamW with the best of the learning rates 0.002, 0.004, 0.008.
# Data:   FineWeb, sample-10BT. Disk: 28 GB of download, 100 GB of text, 40 GB of tokens. Tokenizing takes
#         about an hour (estimate), once.
# Try:    --max_steps=1000 for a shorter run, --micro_batch_size=16 on a smaller GPU

out_dir = "out/gpt2-124m"
dataset = "HuggingFaceFW/fineweb:sample-10BT"
tokenizer = "gpt2"
val_fraction = 0.001
test_fraction = 0.001

block_size = 1024
n_layer = 12
n_head = 6  # of width 128, which recent GPUs compute fastest; GPT-2 has 12 of width 64
n_kv_head = 6
n_embd = 768
batch_size = 512  # 524,288 tokens
micro_batch_size = 32
learning_rate = 0.025  # of Muon
embed_lr = 0.7
head_lr = 0.004
weight_decay = 0.05
qk_weight_decay = 0.05
max_steps = 3250
warmup_steps = 0
cooldown = 0.7
min_lr = 0.0

eval_interval = 250
eval_batches = 10
save_interval = 250
num_workers = 2
