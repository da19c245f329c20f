"""axe sees no contrast inside an SVG, so the palette is computed here from the stylesheet that ships."""

import re
from itertools import combinations

import numpy as np
import pytest

from kairos.scheduler_core.drawing import stylesheet

SERIES = ("c1", "c2", "c3", "c4")
THEMES = pytest.mark.parametrize("theme", [0, 1], ids=["light", "dark"])
# Machado, Oliveira and Fernandes 2009, table for severity 1.0, on linear RGB.
SIGHT = {
    "normal": np.eye(3),
    "protan": np.array(
        [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]]
    ),
    "deutan": np.array(
        [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]]
    ),
    "tritan": np.array(
        [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]]
    ),
}


def linear(name: str, theme: int) -> np.ndarray:
    """A colour of the stylesheet as linear RGB; theme 0 is light, 1 dark."""
    found = re.search(rf"--{name}:light-dark\((#\w+),(#\w+)\)", stylesheet())
    assert found, f"the stylesheet has no colour --{name}"
    digits = found[theme + 1][1:]
    digits = digits if len(digits) == 6 else "".join(2 * d for d in digits)
    srgb = np.array([int(digits[i : i + 2], 16) / 255 for i in (0, 2, 4)])
    return np.where(srgb <= 0.04045, srgb / 12.92, ((srgb + 0.055) / 1.055) ** 2.4)


def contrast(a: str, b: str, theme: int) -> float:
    """WCAG 2 contrast ratio."""
    light, dark = sorted((float(linear(c, theme) @ [0.2126, 0.7152, 0.0722]) for c in (a, b)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


def oklab(rgb: np.ndarray) -> np.ndarray:
    """Björn Ottosson's OKLab of linear RGB."""
    lms = np.cbrt(
        np.array(
            [
                [0.4122214708, 0.5363325363, 0.0514459929],
                [0.2119034982, 0.6806995451, 0.1073969566],
                [0.0883024619, 0.2817188376, 0.6299787005],
            ]
        )
        @ np.clip(rgb, 0, 1)
    )
    return np.array([[0.2104542553, 0.7936177850, -0.0040720468], [1.9779984951, -2.4285922050, 0.4505937099],
                     [0.0259040371, 0.7827717662, -0.8086757660]]) @ lms  # fmt: skip


@THEMES
@pytest.mark.parametrize("ground", ["bg", "panel"])
@pytest.mark.parametrize("ink", ["ink", "mut"])
def test_text_has_a_contrast_of_at_least_4_5_on_both_grounds(ink: str, ground: str, theme: int) -> None:
    assert contrast(ink, ground, theme) >= 4.5


@THEMES
@pytest.mark.parametrize("colour", SERIES)
def test_a_series_has_a_contrast_of_at_least_4_5_on_the_background(colour: str, theme: int) -> None:
    assert contrast(colour, "bg", theme) >= 4.5


@THEMES
def test_a_waiting_bar_can_be_seen_on_the_background(theme: int) -> None:
    assert contrast("wait", "bg", theme) >= 2.9


@THEMES
@pytest.mark.parametrize("sight", SIGHT)
def test_no_two_series_look_alike_whatever_the_sight(sight: str, theme: int) -> None:
    seen = {c: oklab(SIGHT[sight] @ linear(c, theme)) for c in SERIES}

    assert min(float(np.linalg.norm(seen[a] - seen[b])) for a, b in combinations(SERIES, 2)) >= 0.14
