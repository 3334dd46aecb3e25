"""Recipes: a YAML file with the options of a command, each under its name (`batch_size: 8`); the command line has the last word."""

from pathlib import Path
from typing import Any

from layercard.errors import OutputError, TrainingError, suggestion
from layercard.files import read_bytes, shown, write_text

NOT_KEPT = frozenset({"recipe", "save_recipe", "force", "as_json", "only_plan"})
"""Options that belong to one call and to no recipe."""


def read(path: str, names: frozenset[str] | set[str]) -> dict[str, Any]:
    """The options in a recipe, by the names of the command's parameters.

    Raises:
        TrainingError: There is no such file, it is not a mapping in YAML, or it names an option that the command does not have.
    """
    import yaml

    try:
        values = yaml.safe_load(read_bytes(path, TrainingError, "recipe").decode("utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError, ValueError) as error:
        raise TrainingError(f"{path} is not YAML ({' '.join(str(error).split())[:120]}); write `option: value`, a line each") from None
    if not isinstance(values, dict):
        raise TrainingError(f"{path} holds {type(values).__name__}, not options; write `option: value`, a line each")
    options = {}
    for name, value in values.items():
        key = str(name).replace("-", "_")
        if key not in names:
            raise TrainingError(f"{path}: {shown(name)} is not an option of this command; {suggestion(key, sorted(names))}")
        options[key] = value
    return options


def write(path: Path, values: dict[str, Any]) -> None:
    """Write the options of a call as a recipe.

    Raises:
        OutputError: The file exists, or cannot be written.
    """
    import yaml

    kept = {name: _plain(value) for name, value in values.items() if name not in NOT_KEPT and value is not None}
    if path.suffix not in (".yml", ".yaml"):
        raise OutputError(f"{path}: a recipe is a .yml file; name one")
    write_text(path, yaml.safe_dump(kept, sort_keys=False, allow_unicode=True))


def _plain(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value
