# layercard export: layers 1-2 of org/model
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
        "model.layers.1.self_attn.o_proj",
        "model.layers.2.mlp.down_proj",
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
