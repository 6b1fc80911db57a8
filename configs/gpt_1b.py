# A GPT of 1 B parameters on 20 billion tokens of FineWeb-Edu, on eight GPUs that share its weights (FSDP2).
#
#     accelerate launch --config_file configs/accelerate/fsdp2.yaml train_lm.py configs/gpt_1b.py
#     python sample.py --out_dir=out/gpt-1b --prompt="The history of"
#
# Time:   ESTIMATE, never run: 11 hours on eight H100s, at 45 % of 989 TFLOP/s. 18 layers x 12 x 2,048^2, and
#         50,304 x 2,048 in the output layer, are 1.01 B multiplied parameters. 6 x 1.01 B + 12 x 18 layers
#         x 2,048 x 2,048 = 7.0 GFLOP per token, times 20e9 tokens = 1.4e20 FLOP.
# Memory: ESTIMATE: 40 GB per GPU. 1.11 B parameters x 16 bytes (weights, gradients, AdamW's two averages) / 8
#         GPUs = 2.2 GB. The rest is activations and logits: lower micro_batch_size if it does not fit.
# Result: not measured
# Data:   FineWeb-Edu, sample-100BT, of which the run reads a fifth. Disk: 280 GB of download, 1 TB of text,
#         400 GB of tokens. Tokenizing takes ten hours (estimate), once.
# Try:    --dataset=HuggingFaceFW/fineweb-edu:sample-10BT, a tenth of the data, twice through it

out_dir = "out/gpt-1b"
dataset = "HuggingFaceFW/fineweb-edu:sample-100BT"
tokenizer = "gpt2"
val_fraction = 0.0002
test_fraction = 0.0002

block_size = 2048
n_layer = 18
n_head = 16
n_kv_head = 16
n_embd = 2048
batch_size = 256  # 524,288 tokens
micro_batch_size = 8
optimizer = "adamw"  # under FSDP2, Muon must gather every matrix in every step
learning_rate = 0.0004  # of AdamW
beta1 = 0.9
weight_decay = 0.1
max_steps = 38000
warmup_steps = 700
lr_schedule = "cosine"
min_lr = 0.1

eval_interval = 1000
eval_batches = 20
save_interval = 500
num_workers = 2
