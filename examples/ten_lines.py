"""The Python API in ten lines: profile, select layers, put adapters there, and train them with TRL's trainer.

python examples/ten_lines.py MODEL RECORDS.jsonl [OUTPUT]
"""

import json
import sys
from pathlib import Path

from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer

import layercard


def main(name: str, records: str, output: str = "ten-lines-adapter") -> None:
    model, tokenizer = AutoModelForCausalLM.from_pretrained(name), AutoTokenizer.from_pretrained(name)
    data = Dataset.from_list([json.loads(line) for line in Path(records).read_text(encoding="utf-8").splitlines()])
    card = layercard.profile(model, tokenizer, data, separator="")
    placement = layercard.select(card, k=2)
    print("layers", *placement.layers)
    model = layercard.apply(model, placement, LoraConfig(r=16, lora_alpha=32))
    arguments = SFTConfig(output, num_train_epochs=1, per_device_train_batch_size=4, report_to="none", bf16=False)
    trainer = SFTTrainer(model, args=arguments, train_dataset=data, processing_class=tokenizer)
    trainer.train()
    trainer.save_model(output)


if __name__ == "__main__":
    main(*sys.argv[1:])
