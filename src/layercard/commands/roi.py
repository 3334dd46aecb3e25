"""`layercard roi`: what a placement saves in money, hours, energy and CO₂."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from layercard.commands import options as opt
from layercard.commands.terminal import show_result
from layercard.errors import ReportError
from layercard.files import read_json
from layercard.settings import setting

if TYPE_CHECKING:
    from layercard.report.roi import RoiInputs


def roi(
    files: list[Path] = setting(..., "A card, a placement of it, and run records or folders of these.", argument=True, metavar="FILE…"),
    inputs: Path | None = opt.ROI_FILE,
    given: list[str] | None = opt.ROI_FIGURES,
    output: Path | None = opt.RESULT_FILE,
    force: bool = opt.FORCE,
    as_json: bool = opt.AS_JSON,
) -> None:
    """Compute what a placement saves: money, hours, energy, CO₂.

    Against all layers, a month and a year, with payback, each with low, mid and high. Ratios come from runs, else from the card's cost.
    What was not measured saves nothing and is named; every figure that is not given is an example and is named too.
    """
    opt.check_output(output, force, ".json")
    roi_inputs = figures(inputs, given)
    from layercard.report import roi as model
    from layercard.report.sources import read_sources
    from layercard.report.terminal import roi_view
    from layercard.report.trials import grouped

    sources = read_sources(files)
    if sources.placement is None:
        raise ReportError("there is no placement to compare with all layers; make one with `layercard select` and name it too")
    placement = sources.placement
    ratios = model.ratios_of(placement.layers, sources.card, grouped(sources.trials), placement.modules or "all")
    result = model.roi(roi_inputs, ratios)
    show_result(result, as_json, roi_view(result), output=output, force=force, then=("report", *files, "-o", "report.html"))


def figures(file: Path | None, given: Sequence[str] | None) -> "RoiInputs":
    """The reader's figures from a JSON file and from `NAME=VALUE`; the latter win.

    Raises:
        ReportError: The file is not a JSON object, a pair has no `=`, or the calculator has no such name or value.
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
