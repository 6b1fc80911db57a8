# GPT-2 with twenty learned vectors in front of every text, so that it writes Shakespeare (P-tuning).
# 124 M parameters stay as they are; 20 x 768 numbers (61 kB) are kept.
#
#     accelerate launch train_lm.py configs/p_tuning.py
#     python sample.py --out_dir=out/p-tuning --prompt="ROMEO:"
#
# Time:   ESTIMATE, never run: minutes on one GPU, half an hour on a laptop
# Memory: not estimated; lower micro_batch_size if it does not fit
# Result: not measured
# Data:   Shakespeare's plays, 1.1 MB, is downloaded
# Try:    --virtual_tokens=50, or for comparison --adapter=lora --learning_rate=2e-4

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

learning_rate = 1e-3  # of AdamW
lr_schedule = "cosine"
beta1 = 0.9
weight_decay = 0.0

eval_interval = 100
save_interval = 100
