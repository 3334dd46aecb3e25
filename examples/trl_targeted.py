"""Targeted fine-tuning with TRL: profile, select layers, and train LoRA adapters there with TRL's own trainer.

python examples/trl_targeted.py [MODEL] [DATA] [OUTPUT]
"""

import sys

from datasets import Dataset
from trl import SFTConfig, SFTTrainer

import layercard

EPOCHS, RECORDS = 3, 64


def main(model: str = "smollm2-135m", data: str = "synthetic", output: str = "trl-adapter") -> None:
    base = layercard.load_model(model)
    dataset = layercard.load_data(data, base.tokenizer, records=RECORDS)
    placement = layercard.select(layercard.profile(base, None, dataset), k=2)
    print("layers", *placement.layers)

    records = [example.record for example in dataset.examples]
    rows = [{"prompt": record["prompt"] + "\n", "completion": record["completion"]} for record in records]
    trainer = SFTTrainer(
        base.model,
        args=SFTConfig(
            output_dir=output,
            num_train_epochs=EPOCHS,
            per_device_train_batch_size=4,
            learning_rate=2e-3,
            report_to="none",
            bf16=base.device.type == "cuda",
        ),
        train_dataset=Dataset.from_list(rows),
        processing_class=base.tokenizer,
        peft_config=layercard.lora_config(placement, r=8, lora_alpha=16),
        callbacks=[layercard.FastTraining(passes=EPOCHS)],
    )
    trainer.train()
    trainer.save_model(output)


if __name__ == "__main__":
    main(*sys.argv[1:])
