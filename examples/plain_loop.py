"""Targeted fine-tuning in a plain PyTorch loop: profile, select layers, and train LoRA adapters there.

python examples/plain_loop.py [MODEL] [DATA] [OUTPUT]
"""

import sys

import torch
from peft import LoraConfig

import layercard
from layercard.data.load import collate

EPOCHS, RECORDS, BATCH = 3, 64, 4


def main(model: str = "smollm2-135m", data: str = "synthetic", output: str = "loop-adapter") -> None:
    base = layercard.load_model(model)
    dataset = layercard.load_data(data, base.tokenizer, records=RECORDS)
    placement = layercard.select(layercard.profile(base, None, dataset), k=2)
    print("layers", *placement.layers)

    lora = layercard.apply(base.model, placement, LoraConfig(r=8, lora_alpha=16)).train()
    optimizer = torch.optim.AdamW([weight for weight in lora.parameters() if weight.requires_grad], lr=2e-3)
    with layercard.fast_training(lora, passes=EPOCHS) as speed:
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
