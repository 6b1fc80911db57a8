# A small base model that learns to solve word problems step by step, by LoRA. 600 M parameters.
#
#     accelerate launch train_lm.py configs/lora_gsm8k.py
#     python sample.py --out_dir=out/lora-gsm8k --temperature=0 --prompt="Tom has 3 boxes of 12 eggs. How many eggs?"
#
# Time:   ESTIMATE, never run: minutes on one GPU. 7,473 x 0.95 x 3 / 32 = 666 steps.
# Memory: not estimated; lower micro_batch_size if it does not fit
# Result: not measured
# Data:   GSM8K of the Hub, 7,473 problems, three times. The loss is on the answers only. Without a network:
#         --dataset=gsm8k/ with train.jsonl and test.jsonl
# Try:    --epochs=1, --lora_rank=16 --lora_alpha=32

out_dir = "out/lora-gsm8k"
init_from = "Qwen/Qwen3-0.6B-Base"
dataset = "openai/gsm8k:main"
prompt_column = "question"
completion_column = "answer"
adapter = "lora"
lora_rank = 32
lora_alpha = 64.0

block_size = 512
batch_size = 32
micro_batch_size = 16
epochs = 3.0

learning_rate = 2e-4  # of AdamW
lr_schedule = "cosine"
beta1 = 0.9
weight_decay = 0.0

eval_interval = 100
eval_batches = 0
save_interval = 100
