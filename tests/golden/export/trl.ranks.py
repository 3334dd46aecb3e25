# layercard export: layers 1, 12 of org/model
from datasets import load_dataset
from peft import LoraConfig
from trl import SFTConfig, SFTTrainer

peft_config = LoraConfig(
    task_type="CAUSAL_LM",
    r=8,
    lora_alpha=16,
    lora_dropout=0.0,
    bias="none",
    target_modules=[
        "model.layers.1.self_attn.q_proj",
        "model.layers.1.self_attn.k_proj",
        "model.layers.12.self_attn.q_proj",
        "model.layers.12.self_attn.k_proj",
    ],
    rank_pattern={
        "model.layers.1.self_attn.q_proj": 4,
        "model.layers.1.self_attn.k_proj": 5,
        "model.layers.12.self_attn.q_proj": 6,
        "model.layers.12.self_attn.k_proj": 4,
    },
    alpha_pattern={
        "model.layers.1.self_attn.q_proj": 8,
        "model.layers.1.self_attn.k_proj": 10,
        "model.layers.12.self_attn.q_proj": 12,
        "model.layers.12.self_attn.k_proj": 8,
    },
)
trainer = SFTTrainer(
    model="org/model",
    args=SFTConfig(output_dir="adapter"),
    train_dataset=load_dataset("json", data_files="train.jsonl", split="train"),
    peft_config=peft_config,
)
trainer.train()
trainer.save_model()
