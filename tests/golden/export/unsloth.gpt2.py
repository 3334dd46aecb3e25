# layercard export: layers 2, 20 of org/model
from unsloth import FastLanguageModel

model, tokenizer = FastLanguageModel.from_pretrained("org/model")
model = FastLanguageModel.get_peft_model(
    model,
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
    target_parameters=[],
    r=8,
    lora_alpha=16,
    lora_dropout=0.0,
)
