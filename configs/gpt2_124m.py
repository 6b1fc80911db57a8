# A GPT of the shape of GPT-2 (124 M parameters) on 10 billion tokens of FineWeb-Edu, on eight GPUs.
# Input and output embeddings are separate, so there are 162 M parameters, of which 124 M are multiplied.
#
#     accelerate launch --config_file configs/accelerate/ddp.yaml train_lm.py configs/gpt2_124m.py
#     accelerate launch train_lm.py configs/gpt2_124m.py                     # the same run on one GPU, slower
#     python sample.py --out_dir=out/gpt2-124m --prompt="The history of"
#
# Time:   ESTIMATE, never run: 40 minutes on eight H100s, 5.4 hours on one, at 45 % of 989 TFLOP/s. 6 x 124 M
#         + 12 x 12 layers x 768 x 1,024 = 0.86 GFLOP per token, 8.6e18 FLOP for 10e9 tokens = 19,073 steps.
# Memory: not estimated; lower micro_batch_size if it does not fit
# Result: ESTIMATE: val/loss 3.2. llm.c's GPT-2 124M reached 3.29 on FineWeb with AdamW in as many tokens.
# Data:   FineWeb-Edu, sample-10BT. Disk: 28 GB of download, 50 GB of text, 40 GB of tokens. Tokenizing takes
#         about an hour (estimate), once.
# Try:    --max_steps=1900 for a tenth of the run, --micro_batch_size=16 on a smaller GPU

out_dir = "out/gpt2-124m"
dataset = "HuggingFaceFW/fineweb-edu:sample-10BT"
tokenizer = "gpt2"
val_fraction = 0.001
test_fraction = 0.001

block_size = 1024
n_layer = 12
n_head = 6  # of width 128, which recent GPUs compute fastest; GPT-2 has 12 of width 64
n_kv_head = 6
n_embd = 768
batch_size = 512
micro_batch_size = 32
learning_rate = 0.02  # of Muon
max_steps = 19073
warmup_steps = 100
cooldown = 0.4

eval_interval = 500
eval_batches = 10
save_interval = 500
num_workers = 2
