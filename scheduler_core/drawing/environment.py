"""The Jinja2 environment that report and page share."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import jinja2
from markupsafe import Markup

from kairos.scheduler_core.drawing import scale, text
from kairos.scheduler_core.drawing.scale import Point, Span

_HERE = Path(__file__).parent


@dataclass(frozen=True)
class Series:
    """One line of a chart.

    Attributes:
        name: what it shows; a stranger's text.
        style: 1 to 4 for the four colours with their dash and marker, 0 for thin grey.
        points: in the units of the data.
        spans: the interval around the points, drawn as a band; may be empty.
    """

    name: str
    style: int
    points: Sequence[Point]
    spans: Sequence[Span] = ()


def environment(templates: Path) -> jinja2.Environment:
    """An environment with autoescape on that finds ``templates`` first, then the shared macros.

    Undefined names are errors. The functions of ``text`` are filters; ``path_of_line`` and ``path_of_band`` globals.
    """
    env = jinja2.Environment(
        loader=jinja2.FileSystemLoader([templates, _HERE]),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    env.filters |= {
        "shown": text.shown,
        "visible": text.visible,
        "shorten": text.shorten,
        "seconds": text.seconds,
        "percent": text.percent,
        "number_of_percent": text.number_of_percent,
        "points": text.points,
        "signed": text.signed,
        "thousands": text.thousands,
    }
    env.globals |= {"path_of_line": scale.line, "path_of_band": scale.band}
    return env


def stylesheet() -> Markup:
    """The one stylesheet, to be inlined or served as it is."""
    return Markup((_HERE / "kairos.css").read_text(encoding="utf-8"))
