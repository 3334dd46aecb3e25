# layercard export: layers 0, 5 of org/model
from unsloth import FastLanguageModel

model, tokenizer = FastLanguageModel.from_pretrained("org/model")
model = FastLanguageModel.get_peft_model(
    model,
    target_modules=[
        "model.layers.0.self_attn.q_proj",
        "model.layers.0.self_attn.k_proj",
        "model.layers.0.self_attn.v_proj",
        "model.layers.0.self_attn.o_proj",
        "model.layers.5.self_attn.q_proj",
        "model.layers.5.self_attn.k_proj",
        "model.layers.5.self_attn.v_proj",
        "model.layers.5.self_attn.o_proj",
    ],
    target_parameters=[
        "model.layers.0.mlp.experts.gate_up_proj",
        "model.layers.0.mlp.experts.down_proj",
        "model.layers.5.mlp.experts.gate_up_proj",
        "model.layers.5.mlp.experts.down_proj",
    ],
    r=8,
    lora_alpha=16,
    lora_dropout=0.0,
)
