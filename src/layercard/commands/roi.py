"""`layercard roi`: what a placement saves in money, hours, energy and CO₂."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from layercard.commands import options as opt
from layercard.commands.terminal import emit_json, out
from layercard.errors import OutputError, ReportError
from layercard.files import read_json, refuse_existing, write_json

if TYPE_CHECKING:
    from layercard.report.roi import RoiInputs


def roi(
    files: Annotated[
        list[Path],
        typer.Argument(metavar="FILE…", help="A card, a placement of it, and run records or folders of these."),
    ],
    inputs: opt.RoiFile = None,
    given: opt.RoiFigures = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", metavar="FILE", help="Write the result as JSON.")] = None,
    force: opt.Force = False,
    as_json: opt.AsJson = False,
) -> None:
    """Compute what a placement saves against all layers: a month, a year, hours, payback, energy and CO₂, each with low, mid and high.

    Ratios come from runs, else from the card's cost. What was not measured saves nothing and is named; every figure that is not
    given is an example and is named too.
    """
    if output is not None:
        if output.suffix != ".json":
            raise OutputError(f"{output}: {output.suffix or 'no ending'} is not written; name a .json file")
        refuse_existing(output, force)
    known = figures(inputs, given)
    from layercard.report import roi as model
    from layercard.report.ratios import ratios_of
    from layercard.report.sources import read_sources
    from layercard.report.trials import rows_of

    sources = read_sources(files)
    if sources.placement is None:
        raise ReportError("there is no placement to compare with all layers; make one with `layercard select` and name it too")
    found = model.roi(known, ratios_of(sources.placement["layers"], sources.card, rows_of(sources.trials)))
    if output is not None:
        write_json(output, found.to_json(), force=force)
    if as_json:
        emit_json(found.to_json())
        return
    from layercard.report.calculator import roi_view

    out().print(roi_view(found))
    if output is not None:
        out().print(f"wrote {output}", style="dim", soft_wrap=True)


def figures(file: Path | None, given: Sequence[str] | None) -> "RoiInputs":
    """The reader's figures from a JSON file and from `NAME=VALUE`; the latter win.

    Raises:
        ReportError: The file is no JSON object, a pair has no `=`, or a name or value is none of the calculator's.
    """
    values: dict[str, Any] = {}
    if file is not None:
        values.update(read_json(file, ReportError, "file of figures"))
        values.pop("schema", None)
    for pair in given or ():
        name, equals, value = pair.partition("=")
        if not equals:
            raise ReportError(f"--set {pair!r} has no value; write NAME=VALUE, as in --set gpu_price_per_hour=2.5")
        values[name.strip()] = value.strip()
    from layercard.report.roi import RoiInputs

    return RoiInputs.of(values)
