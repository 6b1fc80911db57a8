# A model of GPT-2's smallest size (12 layers of 768, contexts of 1,024 tokens) on 10 billion tokens of FineWeb-Edu.
#
#     accelerate launch --config_file configs/accelerate/ddp.yaml train_lm.py configs/gpt2_124m.py
#     accelerate launch train_lm.py configs/gpt2_124m.py                                  # one GPU: the same run, slower
#
# All of this is an estimate, nothing was measured. Length: 10e9 tokens / (512 x 1,024 tokens a step) = 19,073 steps.
# Work: 6 x 124 M multiplied parameters + 12 x 12 layers x 768 x 1,024 = 0.86 GFLOP a token, 8.6e18 FLOP in all.
# Time: at 45 % of the 989 TFLOP/s of an H100, 8 of them take 8.6e18 / (8 x 0.45 x 989e12) = 2,400 s, one 5.4 hours.
# Loss: about 3.2 nats a token (llm.c's GPT-2 124M got to 3.29 on FineWeb with AdamW in as many tokens).
# Disk: 28 GB of download, 50 GB of text, 40 GB of tokens; tokenizing takes about an hour, once.

out_dir = "out/gpt2-124m"
dataset = "HuggingFaceFW/fineweb-edu:sample-10BT"
tokenizer = "gpt2"
val_fraction = 0.001
test_fraction = 0.001

block_size = 1024
n_layer = 12
n_head = 6  # heads of 128, on which the attention of recent GPUs is fastest; GPT-2 has 12 of 64
n_kv_head = 6
n_embd = 768
batch_size = 512
micro_batch_size = 32
learning_rate = 0.02
max_steps = 19073
warmup_steps = 100
cooldown = 0.4

eval_interval = 500
eval_batches = 10
save_interval = 500
num_workers = 2
