# layercard export: layers 1-2 of org/model
from unsloth import FastLanguageModel

model, tokenizer = FastLanguageModel.from_pretrained("org/model")
model = FastLanguageModel.get_peft_model(
    model,
    target_modules=[
        "model.layers.1.self_attn.o_proj",
        "model.layers.2.mlp.down_proj",
    ],
    target_parameters=[],
    r=8,
    lora_alpha=16,
    lora_dropout=0.0,
)
