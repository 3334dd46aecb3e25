"""Targeted fine-tuning in a plain PyTorch loop: profile, select layers, and train LoRA adapters there.

python examples/plain_loop.py [MODEL] [DATA] [OUTPUT]
"""

import sys

import torch
from peft import LoraConfig, get_peft_model

from layercard import fast_training, load_data, load_model, select
from layercard.data import collate
from layercard.profiling import profile

EPOCHS, RECORDS, BATCH = 3, 64, 4


def main(model: str = "smollm2-135m", data: str = "synthetic", output: str = "loop-adapter") -> None:
    base = load_model(model)
    dataset = load_data(data, base.tokenizer, records=RECORDS)
    placement = select(profile(base, dataset))
    print("layers", *placement.layers)

    config = LoraConfig(r=8, lora_alpha=16, target_modules=list(placement.paths), task_type="CAUSAL_LM")
    lora = get_peft_model(base.model, config).train()
    optimizer = torch.optim.AdamW([weight for weight in lora.parameters() if weight.requires_grad], lr=2e-3)
    with fast_training(lora, passes=EPOCHS) as speed:
        for epoch in range(EPOCHS):
            total = 0.0
            for rows in torch.randperm(len(dataset)).split(BATCH):
                batch = collate(dataset.examples, rows.tolist(), base.pad_id).to(base.device)
                loss = lora(input_ids=batch.input_ids, attention_mask=batch.attention_mask, labels=batch.labels).loss
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
                total += loss.item() * len(rows)
            print(f"epoch {epoch + 1}: loss {total / len(dataset):.4f}")
        print(*speed.to_json().values(), sep="\n")
    lora.save_pretrained(output)


if __name__ == "__main__":
    main(*sys.argv[1:])
