# A small base model learns to hold everyday conversations, by LoRA: 2,260 of them, twice.
#
#     accelerate launch train_lm.py configs/lora_chat.py
#     python sample.py --out_dir=out/lora-chat --chat=True
#
# Not measured. Qwen3's template writes earlier turns without their thoughts, so each answer is a row of its own; it
# begins with an empty <think></think>, which you will see. Memory: 0.6e9 weights x 2 bytes (bf16), an adapter of 10 M
# weights, logits of 152,000 tokens: for short conversations a GPU of 8 GB, for rows of 1,024 tokens
# --micro_batch_size=1. Time: minutes.
# Your own data: a .jsonl file with rows of {"messages": [{"role": "user", "content": "..."}, ...]}, by --dataset=

out_dir = "out/lora-chat"
init_from = "Qwen/Qwen3-0.6B-Base"
dataset = "HuggingFaceTB/smoltalk:everyday-conversations"
adapter = "lora"
lora_rank = 16
lora_alpha = 32.0

block_size = 1024
batch_size = 32
micro_batch_size = 8
epochs = 2.0

learning_rate = 2e-4
lr_schedule = "cosine"
beta1 = 0.9
weight_decay = 0.0

eval_interval = 50
eval_batches = 0
save_interval = 50
