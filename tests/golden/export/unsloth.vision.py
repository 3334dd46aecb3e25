# layercard export: layers 3, 11 of org/model
from unsloth import FastModel

model, tokenizer = FastModel.from_pretrained("org/model")
model = FastModel.get_peft_model(
    model,
    target_modules=[
        "model.language_model.layers.3.self_attn.q_proj",
        "model.language_model.layers.3.self_attn.k_proj",
        "model.language_model.layers.3.self_attn.v_proj",
        "model.language_model.layers.3.self_attn.o_proj",
        "model.language_model.layers.3.mlp.gate_proj",
        "model.language_model.layers.3.mlp.up_proj",
        "model.language_model.layers.3.mlp.down_proj",
        "model.language_model.layers.11.self_attn.q_proj",
        "model.language_model.layers.11.self_attn.k_proj",
        "model.language_model.layers.11.self_attn.v_proj",
        "model.language_model.layers.11.self_attn.o_proj",
        "model.language_model.layers.11.mlp.gate_proj",
        "model.language_model.layers.11.mlp.up_proj",
        "model.language_model.layers.11.mlp.down_proj",
    ],
    target_parameters=[],
    r=8,
    lora_alpha=16,
    lora_dropout=0.0,
)
