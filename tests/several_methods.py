"""What each of two processes does in test_methods.py: train with methods that begin, or step, in ways of their own."""

import json
import sys
from pathlib import Path

import torch.distributed as dist

from layercard import processes
from layercard.adapters.apply import place
from layercard.data.load import load_data
from layercard.models.load import wrap_model
from layercard.training.train import train
from test_methods import settings_of
from tiny import build_tiny, tiny_tokenizer

METHODS = ("pissa", "eva", "adalora")

if __name__ == "__main__":
    folder = Path(sys.argv[1])
    dist.init_process_group("gloo")
    base = wrap_model(build_tiny("llama"), tiny_tokenizer(), name="tiny-llama")
    data = load_data(str(folder / "train.jsonl"), base.tokenizer)
    losses = {name: train(base, place(base, [1, 2]), data, folder / name, settings_of(name, save_steps=0)).losses for name in METHODS}
    if processes.is_first():
        (folder / "losses.json").write_text(json.dumps(losses))
    dist.destroy_process_group()
