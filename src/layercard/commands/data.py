"""`layercard data`: what a model learns from records, token by token."""

from typing import Any

from layercard.commands import options as opt
from layercard.commands.terminal import show_result
from layercard.settings import DataSettings, setting


def data(
    data: list[str] = setting(..., "Records, as --data of the other commands takes them.", argument=True, metavar="DATA"),
    model: str = setting(..., "The model whose tokenizer and chat template read them: an id, a folder, or smollm2-135m."),
    records: int | None = opt.RECORDS,
    show: int = setting(3, "Show the first N records.", low=0),
    reading: DataSettings = DataSettings(),
    trust_remote_code: bool = setting(False, "Let code that comes with the tokenizer run."),
    as_json: bool = opt.AS_JSON,
) -> None:
    """Show records as the model reads them, the learnt tokens marked. No weights are loaded."""
    opt.check_data(data, columns=reading.columns)
    from layercard.data.load import load_data
    from layercard.models.load import locate, quiet_libraries, read_tokenizer

    with quiet_libraries():
        tokenizer = read_tokenizer(locate(model), trust_remote_code)
    dataset = load_data(data, tokenizer, records=records, **reading.to_json())
    # The tokens of the first records: id, text, and whether the model learns to say it.
    shown = [
        [
            {"id": token, "text": tokenizer.decode([token]), "learnt": label == token}
            for token, label in zip(example.input_ids, example.labels, strict=True)
        ]
        for example in dataset.examples[:show]
    ]
    lengths = sorted(len(example.input_ids) for example in dataset.examples)
    value = {
        "schema": "layercard-data/1",
        "source": dataset.source,
        "fingerprint": dataset.fingerprint,
        "format": dataset.format,
        "records": len(dataset),
        "tokens": dataset.tokens,
        "learnt_tokens": dataset.labelled_tokens,
        "median_length": lengths[len(lengths) // 2],
        "longest": lengths[-1],
        "cut": dataset.truncated,
        "notes": list(dataset.notes),
        "shown": shown,
    }
    usual = DataSettings()
    changed = {"--columns": reading.columns, "--separator": reading.separator if reading.separator != usual.separator else None}
    how = [word for option, text in changed.items() if text is not None for word in (option, text)]
    show_result(value, as_json, _view(value), then=("run", model, *opt.data_options(data), *how, "-o", "run"))


def _view(value: dict[str, Any]) -> Any:
    from rich.console import Group
    from rich.text import Text

    from layercard.report.terminal import pairs

    share = 100 * value["learnt_tokens"] / value["tokens"]
    rows = {
        "Data": f"{value['source']} · {value['format']} · {value['records']:,} records, fingerprint {value['fingerprint']}",
        "Tokens": f"{value['tokens']:,}, of these {value['learnt_tokens']:,} learnt ({share:.0f} %)",
        "Length": f"median {value['median_length']:,}, longest {value['longest']:,}, {value['cut']:,} cut",
    }
    parts: list[Any] = [pairs(rows)]
    for number, tokens in enumerate(value["shown"], 1):
        # Where there are no colours, brackets show what is learnt.
        text, inside = Text(f"\nrecord {number}, what is learnt in «»:\n", style="dim"), False
        for token in [*tokens, {"text": "", "learnt": False}]:
            if token["learnt"] != inside:
                text.append("«" if token["learnt"] else "»", style="bold")
                inside = token["learnt"]
            text.append(token["text"], style="bold green" if token["learnt"] else "")
        parts.append(text)
    return Group(*parts)
