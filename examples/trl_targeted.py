"""Targeted fine-tuning with TRL: profile, select layers, and train LoRA adapters there with TRL's own trainer.

python examples/trl_targeted.py [MODEL] [DATA] [OUTPUT]
"""

import sys

from datasets import Dataset
from peft import LoraConfig
from trl import SFTConfig, SFTTrainer

from layercard import FastTraining, load_data, load_model, select
from layercard.profiling import profile
from layercard.records import read_records

EPOCHS, RECORDS = 3, 64


def main(model: str = "smollm2-135m", data: str = "synthetic", output: str = "trl-adapter") -> None:
    base = load_model(model)
    card = profile(base, load_data(data, base.tokenizer, records=RECORDS))
    placement = select(card)
    print("layers", *placement.layers)

    records = [record for (_, record), _ in zip(read_records(data)[1], range(RECORDS), strict=False)]
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
        peft_config=LoraConfig(r=8, lora_alpha=16, target_modules=list(placement.paths), task_type="CAUSAL_LM"),
        callbacks=[FastTraining(passes=EPOCHS)],
    )
    trainer.train()
    trainer.save_model(output)


if __name__ == "__main__":
    main(*sys.argv[1:])
