# /// script
# requires-python = ">=3.11"
# dependencies = ["layercard"]
# ///
"""One file that trains, for `uv run`: it installs what it needs into an environment of its own.

uv run examples/one_file.py [MODEL] [DATA] [OUTPUT] [MAX_TIME]
"""

import sys

import layercard


def main(model: str = "smollm2-135m", data: str = "synthetic", output: str = "one-file", max_time: str = "10m") -> None:
    base = layercard.load_model(model)
    records = layercard.load_data(data, base.tokenizer, records=800)
    settings = layercard.RunSettings(search="50%", max_time=max_time)
    result = layercard.run(base, records, output, settings=settings, tell=print)
    print(result.line())


if __name__ == "__main__":
    main(*sys.argv[1:])
