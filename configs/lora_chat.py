# A base model of 600 M parameters learns to chat, by LoRA (10 M parameters) on everyday conversations.
#
#     accelerate launch train_lm.py configs/lora_chat.py
#     python sample.py --out_dir=out/lora-chat --chat=True
#
# Time:   ESTIMATE, never run: minutes on one GPU
# Memory: ESTIMATE: a GPU of 8 GB for short conversations; for rows of 1,024 tokens, --micro_batch_size=1. The
#         frozen weights take 0.6e9 x 2 bytes (bf16); the logits of 152,000 tokens come on top.
# Result: not measured. Answers begin with an empty <think></think>, as Qwen3's template writes them. It
#         leaves the thoughts of earlier turns out, so each answer is a row of its own.
# Data:   2,260 conversations of smoltalk on the Hub, twice. Your own: --dataset=chats.jsonl with rows of
#         {"messages": [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]}
# Try:    --init_from= another base model, --lora_rank=32 --lora_alpha=64

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

learning_rate = 2e-4  # of AdamW
lr_schedule = "cosine"
beta1 = 0.9
weight_decay = 0.0

eval_interval = 50
eval_batches = 0
save_interval = 50
