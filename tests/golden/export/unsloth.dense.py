# layercard export: layers 3, 11 of org/model
from unsloth import FastLanguageModel

model, tokenizer = FastLanguageModel.from_pretrained("org/model")
model = FastLanguageModel.get_peft_model(
    model,
    target_modules=[
        "q_proj",
        "k_proj",
        "v_proj",
        "o_proj",
        "gate_proj",
        "up_proj",
        "down_proj",
    ],
    layers_to_transform=[3, 11],
    layers_pattern="layers",
    target_parameters=[],
    r=8,
    lora_alpha=16,
    lora_dropout=0.0,
)
