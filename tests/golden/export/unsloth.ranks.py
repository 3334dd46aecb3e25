# layercard export: layers 1, 12 of org/model
from unsloth import FastLanguageModel

model, tokenizer = FastLanguageModel.from_pretrained("org/model")
model = FastLanguageModel.get_peft_model(
    model,
    target_modules=[
        "model.layers.1.self_attn.q_proj",
        "model.layers.1.self_attn.k_proj",
        "model.layers.12.self_attn.q_proj",
        "model.layers.12.self_attn.k_proj",
    ],
    target_parameters=[],
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
    r=8,
    lora_alpha=16,
    lora_dropout=0.0,
)
