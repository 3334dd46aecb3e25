"""A process that has imported everything and forks one child for each command: a run starts in milliseconds instead of seconds.

Reads JSON lines `{"arguments": […], "log": "FILE"}`, answers `{"pid": …}` when the command was started and `{"status": …}` when it ended.
Checkpoints and snapshots come often here, so that a run of a second has as many of them as one of hours.
"""

import json
import os
import signal
import sys

import peft  # noqa: F401
import torch
import transformers
from transformers import AutoModelForCausalLM, Trainer  # noqa: F401

import layercard.checkpoint
import layercard.commands.options
import layercard.profiling.profile
import layercard.profiling.streamed
import layercard.training.streamed
import layercard.training.train
import layercard.trials.bench
import layercard.trials.compare
import layercard.trials.peers
from layercard.commands import main as cli


def prepare() -> None:
    """Settings of this process alone: one thread, little to say, and checkpoints and snapshots that come often."""
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    layercard.checkpoint.EVERY = layercard.checkpoint.SHARE = 0.0
    layercard.trials.peers.aletheia_scores = lambda base, examples: [1.0] * len(base.blocks)  # its package is an extra
    object.__setattr__(layercard.commands.options.TRAINING, "save_steps", 3)


def child(arguments: list[str], log: str) -> None:
    """Become the command."""
    out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for number in (1, 2):
        os.dup2(out, number)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.argv = ["layercard", *arguments]
    try:
        cli.main()
    except SystemExit as done:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(int(done.code or 0))
    except BaseException:
        sys.excepthook(*sys.exc_info())
        sys.stderr.flush()
        os._exit(1)


def main() -> None:
    """Answer until stdin ends; several commands may run at a time."""
    prepare()
    sys.stdout.write('{"ready": true}\n')
    sys.stdout.flush()
    for line in sys.stdin:
        asked = json.loads(line)
        if "wait" in asked:
            said = {"status": os.waitstatus_to_exitcode(os.waitpid(asked["wait"], 0)[1])}
        else:
            pid = os.fork()
            if pid == 0:
                child(asked["arguments"], asked["log"])
            said = {"pid": pid}
        sys.stdout.write(json.dumps(said) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
