"""What can go wrong, as a tree of exceptions.

```
LayercardError
├── ModelError       a model cannot be found, read or understood
├── DataError        a data file or a record in it
├── CardError        a card file, or a card that does not fit the model
├── PlacementError   a placement file, or layers that a model does not have
├── SelectionError   an objective or budget that no placement meets
├── OutputError      an output that exists or cannot be written
├── TrainingError    a training run that cannot start, resume or be trusted
│   └── ProcessError one process of several failed by itself
├── ExportError      a placement that a trainer cannot express, or a configuration that contradicts it
├── HubError         the hub cannot be reached, or a repository there cannot be used
├── BenchmarkError   a benchmark whose tasks, strategies or folder cannot be used
└── ReportError      files that make no report, or figures that the calculator cannot use
```

The message of each is one line: what was wrong, what was found, how to mend it. The command line prints it and exits with 2.
`symptoms` of each class are the rows of docs/errors.md.
"""

from typing import ClassVar, NamedTuple


class Symptom(NamedTuple):
    """A row of docs/errors.md.

    Attributes:
        says: Words of the message; `…` stands for what differs from time to time. A test looks for them in the source.
        cause: What most often lies behind it.
        mend: What to do.
    """

    says: str
    cause: str
    mend: str


LONGEST = 1000
"""Characters of a message; of a longer one, which quotes what a broken file holds, the middle is left out."""


class LayercardError(Exception):
    """Base of every error that a user can mend."""

    symptoms: ClassVar[tuple[Symptom, ...]] = ()

    def __str__(self) -> str:
        """The message, on one line and not without end whatever it quotes."""
        text = " ".join(super().__str__().split())
        return text if len(text) <= LONGEST else f"{text[: LONGEST // 2]} … {text[-LONGEST // 2 :]}"


class ModelError(LayercardError):
    """A model cannot be found, read or understood."""

    symptoms = (
        Symptom("no such model", "the name is no folder, file or known model", "check the path; the message names what comes close"),
        Symptom("cannot be read as a GGUF model", "damaged, cut short, or of an unknown family", "fetch the file again"),
        Symptom("asks for a model of … weights and holds …", "the header of a GGUF file is damaged", "fetch the file again"),
        Symptom("holds no weights for …, which would be random", "a GGUF file lacks tensors", "fetch the file again"),
        Symptom("has a config.json but no weights", "a folder without safetensors", "name a folder that a trainer saved"),
        Symptom("has only pickled weights", "pickles can run code when they are read", "save the weights as safetensors"),
        Symptom("has no list of decoder blocks", "no transformer decoder", "profile a decoder"),
        Symptom(
            "is an encoder-decoder",
            "two stacks of blocks that see different tokens",
            "name a decoder, or an encoder with a classifier's head",
        ),
        Symptom(
            "is a masked language model",
            "it predicts no next token and has no head",
            "train a head on it and name that, or name a causal model",
        ),
        Symptom("hand each other more than hidden states", "a block needs more of the ones below than their output", "`--probe none`"),
        Symptom(
            "cannot be streamed",
            "`--stream` reads a decoder from plain safetensors files",
            "profile without `--stream`, or save the model as safetensors",
        ),
        Symptom("device … is not available", "PyTorch was built without it, or it is not there", "`--device auto` or `cpu`"),
        Symptom(
            "the loss on record … is not finite",
            "numbers overflow in half precision, or training diverged",
            "`--dtype float32`, or a lower learning rate",
        ),
        Symptom(
            "no such configuration",
            "`cost --meta` with a name that stands for nothing",
            "a `config.json`, a folder with one, or the name that the message gives",
        ),
        Symptom("memory ran out training all layers", "`cost` trains every layer for a moment", "a smaller `--batch-size` or `--length`"),
    )


class DataError(LayercardError):
    """A data file, or a record in it, cannot be used."""

    symptoms = (
        Symptom("no JSON", "a malformed record", "mend or remove the line that the message names"),
        Symptom("no UTF-8", "a file in another encoding", "save it as UTF-8"),
        Symptom("completion is empty", "a record with nothing to learn", "fill it in or remove it"),
        Symptom("no token carries a label", "a record with nothing to learn, or one without an assistant's turn", "lengthen or remove it"),
        Symptom("tokens carry no label and the rest is cut", "the prompt alone is longer than a record may be", "raise `--max-length`"),
        Symptom(
            "is no class of the model", "a `label` that the classifier does not have", "write the name or number of one of its classes"
        ),
        Symptom("a card needs at least 4", "too little data", "profile more records; 64 are a good start"),
        Symptom(
            "the loss of … on these records is …",
            "the weights hold numbers that are not finite, or half precision overflows",
            "check the weights, or `--dtype float32`",
        ),
        Symptom("may be cut short, so write it again", "a damaged Parquet file", "write it again"),
    )


class CardError(LayercardError):
    """A card cannot be read, or does not fit the model at hand."""

    symptoms = (
        Symptom("is no whole …", "truncated, or no such file", "make it again"),
        Symptom("the card is of …", "card and model have different weights", "profile this model"),
        Symptom("are the same card", "`transfer` was given one card twice", "name cards of different data"),
        Symptom(
            "layers of different models cannot be compared",
            "`transfer` was given cards of several models",
            "profile one model on each data set",
        ),
        Symptom("pass --across-dtypes", "the cards are of one model in several dtypes", "profile in one dtype, or pass it"),
        Symptom("not all cards have the measure", "a misspelt `--measure`, or one that a card lacks", "name one that both have"),
        Symptom("make the file with `layercard cost`", "another kind of file", "a file that `layercard cost -o` wrote"),
    )


class PlacementError(LayercardError):
    """A placement cannot be read, is empty, or names layers that the model does not have."""

    symptoms = (
        Symptom("is outside the model", "a layer index that the model does not have", "select again from this model's card"),
        Symptom("the placement is for …", "placement and model have different weights", "select from this model's card"),
        Symptom("rank_pattern and alpha_pattern", "a placement edited by hand", "select again"),
        Symptom("is no adapter: it lacks", "`verify` or `eval` was given another folder", "name the folder that `layercard train` wrote"),
        Symptom(
            "is not as planned",
            "the adapter lies elsewhere than the placement says",
            "the message says where; train again from the placement",
        ),
        Symptom("leave the experts alone (--no-experts)", "the method cannot adapt stacked experts", "`--no-experts`, or LoRA"),
    )


class SelectionError(LayercardError):
    """No placement meets what was asked for."""

    symptoms = (
        Symptom("layers cannot be chosen; the model has", "more layers than there are", "ask for fewer"),
        Symptom(
            "no placement… keeps",
            "budgets, number of layers and performance do not go together",
            "the message names what comes nearest: allow that much",
        ),
        Symptom(
            "is in seconds, but the card has no measured cost",
            "the card knows relative costs only",
            "a share (`60%`), or profile with `--cost`",
        ),
        Symptom("cannot be read; give", "a unit or number of a budget that is none", "`12s`, `800ms`, `2GB`, `500MiB`, `60%`"),
        Symptom("is in per cent of all layers; did you mean", "`--min-performance 0.95`", "write `95` or `95%`"),
    )


class OutputError(LayercardError):
    """An output exists already or cannot be written."""

    symptoms = (
        Symptom("exists already", "the output is kept", "name another one, or `--force`"),
        Symptom("holds an unfinished run", "an interrupted training run", "`--resume` or `--force`"),
        Symptom("where the state of the run would be kept", "`CARD.state` is something else", "move it away"),
        Symptom("another run is at work in", "two runs were given one folder", "wait for the other, or name another folder"),
        Symptom("cannot be reached", "the storage of an address does not answer", "check the address and the access to it"),
        Symptom("make room", "the disk is full", "make room; what was written whole is still there, so `--resume` goes on"),
    )


class TrainingError(LayercardError):
    """A training run cannot start, resume or be trusted."""

    symptoms: ClassVar[tuple[Symptom, ...]] = (
        Symptom("probe … is unknown", "a misspelt `--probe`", "`none`, `step` or `train`"),
        Symptom("the held-out loss of layer … is", "the training probe diverged in that layer", "`--dtype float32`, or `--probe step`"),
        Symptom("has no labelled token to learn from", "every label is masked", "give records with completions"),
        Symptom("the loss is … at step", "training diverged, or half precision overflows", "a lower learning rate, or float32"),
        Symptom("is not finite after training", "an adapter's weight overflowed in the last step", "a lower learning rate"),
        Symptom(
            "memory ran out with … records in a batch",
            "activations of a batch do not fit",
            "a smaller `--batch-size`, more `--accumulation`, or layers nearer to the output",
        ),
        Symptom(
            "backward cannot be cut", "a prompt, a prefix or an embedding trains below the blocks", "freeze it, or train without the cut"
        ),
        Symptom(
            "has become trainable since",
            "a weight below the cut was unfrozen inside `cut_backward`",
            "enter it after the weights are chosen",
        ),
        Symptom(
            "processes cannot share a batch",
            "`torchrun` with a batch size that the number of processes does not divide",
            "a multiple of it",
        ),
        Symptom("another process of this run has ended", "one of several processes failed", "its own message says why; then `--resume`"),
    )


class ProcessError(TrainingError):
    """One process of a run in several failed by itself; the others do not know why."""

    symptoms = (
        Symptom(
            "process …: ",
            "one of several processes failed by itself, most often for want of memory",
            "what the message says, such as a smaller `--batch-size`",
        ),
    )


class ExportError(LayercardError):
    """A trainer cannot express a placement, or the configuration to merge into cannot be used or contradicts it."""

    symptoms = (
        Symptom("is no trainer that placements are written for", "a misspelt trainer", "the name that the message gives"),
        Symptom(
            "which contradicts the placement",
            "the configuration to merge into chooses other layers or modules",
            "take that key out, or `--force`; what was replaced is printed",
        ),
        Symptom("have no key for layers", "torchtune adapts the same maps in every layer", "export to another trainer"),
        Symptom(
            "is not known here",
            "mlx-lm and Megatron-Bridge have names of their own, and these were not read there",
            "train with another trainer",
        ),
        Symptom("is used from Python and reads no file", "`--merge` for unsloth", "export without `--merge`"),
        Symptom("select without --allocate-ranks", "the trainer has one rank for all adapters", "select without `--allocate-ranks`"),
        Symptom(
            "select without the stacked experts",
            "the trainer cannot name parameters",
            "select without the stacked experts, or export to PEFT",
        ),
        Symptom("cannot be read as YAML", "the configuration to merge into is broken", "mend it, or export to a new file"),
        Symptom("has … twice", "the configuration to merge into gives one key two values", "take one of them out"),
        Symptom("is an alias (*) of another value", "a value that stands elsewhere in the file", "write the value itself there"),
    )


class HubError(LayercardError):
    """The hub cannot be reached, refuses, or has no such card."""

    symptoms = (
        Symptom(
            "the hub at … cannot be reached", "no network, or `HF_HUB_OFFLINE` is set", "check the network; `HF_ENDPOINT` names another hub"
        ),
        Symptom("there is no token", "`push` writes in your name", "`hf auth login`, or set `HF_TOKEN`"),
        Symptom("no such repository", "a misspelt name, or a private one", "check the name, or log in"),
        Symptom("holds no card", "the repository is of something else", "name one that `layercard push` made"),
        Symptom("the hub has no card of", "nobody pushed one", "profile the model"),
        Symptom("the hub has … cards of", "several people pushed one", "name one of them"),
    )


class BenchmarkError(LayercardError):
    """A benchmark cannot start: an unknown task or strategy, or a folder that holds another benchmark."""

    symptoms = (
        Symptom("task … is unknown", "a misspelt name, or a folder without train, valid and test files", "the name that the message gives"),
        Symptom("strategy … is unknown", "a misspelt name", "the name that the message gives"),
        Symptom("two models would have the folder", "one model was named twice", "name each model once"),
        Symptom("holds a benchmark with …", "the folder was begun with other settings", "the same settings, or another folder"),
        Symptom("--ray needs Ray", "the extra is not installed", "`pip install 'layercard[ray]'`, or `--workers`"),
    )


class ReportError(LayercardError):
    """Files do not make a report together, or a figure for the calculator is out of range."""

    symptoms = (
        Symptom("a report needs a card", "no card among the files", "name one that `layercard profile` wrote"),
        Symptom("a report is of one model with one set", "files of several models", "make one report for each"),
        Symptom("is no figure of the calculator", "a misspelt name in `roi --inputs`", "the name that the message gives"),
    )


def one_line(error: Exception, longest: int = 160) -> str:
    """What another package's exception says, on one line and not longer than that; the name of its class where it says nothing."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= longest else text[: longest - 1] + "…"
