"""Fleets that are ready to simulate: `paper`, `b300`, `h100` (docs/configuration.md)."""

from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path

from kairos.scheduler_core.config import Settings
from kairos.scheduler_core.config_file import load_settings
from kairos.scheduler_core.errors import UnknownNameError

FOLDER = Path(str(files(__name__)))


def fleet_names() -> list[str]:
    """The built-in fleets, sorted."""
    return sorted(path.stem for path in FOLDER.glob("*.yaml"))


def load_fleet(name_or_path: str | Path, environ: Mapping[str, str] | None = None) -> Settings:
    """The settings of a built-in fleet or of a YAML file; environment variables override both.

    Raises:
        ConfigError: the file cannot be used.
        UnknownNameError: it is neither a built-in name nor a file.
    """
    name = str(name_or_path)
    path = FOLDER / f"{name}.yaml" if name in fleet_names() else Path(name)
    if not path.is_file() and path.suffix not in (".yaml", ".yml"):
        raise UnknownNameError("fleet (and no file of that name)", name, fleet_names())
    return load_settings(path) if environ is None else load_settings(path, environ)
