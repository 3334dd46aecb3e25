"""Configurations for axolotl and LLaMA-Factory: profile, select layers, and put them into the files beside this one.

python examples/for_trainers.py MODEL RECORDS.jsonl [OUTPUT]
"""

import sys
from pathlib import Path

import layercard
from layercard.export.export import configuration

HERE = Path(__file__).parent
FILES = {"axolotl": "axolotl.yml", "llamafactory": "llamafactory.yaml"}


def main(name: str, records: str, output: str = "configurations") -> None:
    placement = layercard.select(layercard.profile(name, None, records), k=2)
    print("layers", *placement.layers)
    folder = Path(output)
    folder.mkdir(parents=True, exist_ok=True)
    for trainer, file in FILES.items():
        text = configuration(placement, trainer, merge=HERE / file)
        (folder / file).write_text(text, encoding="utf-8")
        print(f"{trainer}: {folder / file}")


if __name__ == "__main__":
    main(*sys.argv[1:])
