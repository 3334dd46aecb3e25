# layercard export: layers 2, 20 of org/model
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
        "transformer.h.2.attn.c_attn",
        "transformer.h.2.attn.c_proj",
        "transformer.h.2.mlp.c_fc",
        "transformer.h.2.mlp.c_proj",
        "transformer.h.20.attn.c_attn",
        "transformer.h.20.attn.c_proj",
        "transformer.h.20.mlp.c_fc",
        "transformer.h.20.mlp.c_proj",
    ],
)
trainer = SFTTrainer(
    model="org/model",
    args=SFTConfig(output_dir="adapter"),
    train_dataset=load_dataset("json", data_files="train.jsonl", split="train"),
    peft_config=peft_config,
)
trainer.train()
trainer.save_model()
