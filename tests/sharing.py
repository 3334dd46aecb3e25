"""What each of two processes does in test_prefix.py: `torchrun --nproc-per-node 2 tests/sharing.py FOLDER` by hand."""

import json
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from layercard import frozen_prefix
from test_prefix import adapted, batch, records


def losses(folder: Path | None) -> tuple[list[float], float, Any]:
    """Three epochs over all records, two a step in each process, which get other ones in each epoch; all processes read one folder."""
    model = DistributedDataParallel(adapted("llama"))
    rows, rank = records(), dist.get_rank()
    optimizer = torch.optim.AdamW([weight for weight in model.parameters() if weight.requires_grad], lr=1e-2)
    found = []
    with nullcontext() if folder is None else frozen_prefix(model, folder, always=True) as cache:
        for epoch in range(3):
            for step in range(2):
                at = 4 * step + 2 * ((rank + epoch) % 2)
                loss = model(**batch(rows[at : at + 2])).loss
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
                found.append(loss.item())
            if cache is not None:
                cache.flush()
            dist.barrier()
    return found, sum(float(weight.sum()) for weight in model.parameters() if weight.requires_grad), cache


def main(folder: Path) -> None:
    """Without and with the cache; each process writes what it found."""
    dist.init_process_group("gloo")
    stock, ours = losses(None), losses(folder / "cache")
    counts = {"found": ours[2].records_read, "computed": ours[2].records_computed}
    (folder / f"results{dist.get_rank()}.json").write_text(json.dumps({"stock": stock[:2], "ours": ours[:2], **counts}), encoding="utf-8")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
