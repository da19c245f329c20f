"""Names of strangers and numbers as text, and scales."""

import re
import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kairos.scheduler_core.drawing.scale import Scale, line
from kairos.scheduler_core.drawing.text import NAME_CHARACTERS, seconds, shorten, shown, visible

ANY_TEXT = st.text(st.characters(exclude_categories=[]), max_size=200)


@given(ANY_TEXT)
def test_nothing_invisible_is_left_and_the_text_can_be_written(text: str) -> None:
    left = {unicodedata.category(c) for c in visible(text)}

    assert not left & {"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"}
    visible(text).encode()


@given(ANY_TEXT, st.integers(12, 80))
def test_a_shortened_name_keeps_to_its_length(text: str, characters: int) -> None:
    assert len(shorten(text, characters)) <= characters


@given(ANY_TEXT)
def test_a_shown_name_has_no_markup_of_its_own(text: str) -> None:
    html = str(shown(text))

    assert re.fullmatch(r'<bdi(?: title="[^"<>]*"| class="mut")?>[^<>]*</bdi>', html, re.DOTALL)


def test_a_long_name_is_cut_with_its_whole_in_the_title() -> None:
    name = "a" * 70

    assert f'title="{name}"' in shown(name)
    assert f">{'a' * (NAME_CHARACTERS - 1)}…<" in shown(name)


def test_a_name_that_turns_the_line_around_is_spelled_out() -> None:
    assert shown("\u202egnp.exe").striptags() == "⟨U+202E⟩gnp.exe"


def test_a_pile_of_combining_marks_is_spelled_out_from_the_third_on() -> None:
    assert visible("e\u0301\u0301\u0301") == "e\u0301\u0301⟨U+0301⟩"


@given(st.floats(1e-7, 1e6))
def test_a_duration_is_never_rounded_to_nothing(value: float) -> None:
    assert re.search(r"[1-9]", seconds(value))


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.084, "84 ms"), (5.12, "5.12 s"), (0.9996, "1.00 s"), (99.996, "1 min 40 s"), (11_400, "3 h 10 min")],
)
def test_durations_change_their_unit_where_the_rounded_number_does(value: float, text: str) -> None:
    assert seconds(value).replace("\xa0", " ") == text


@given(st.floats(-1e3, 1e3), st.floats(1e-3, 1e3), st.floats(-2e3, 2e3))
def test_a_scale_never_draws_outside_its_area(low: float, width: float, value: float) -> None:
    assert 44 <= Scale(low, low + width, 44, 352)(value) <= 352


@given(st.floats(1e-4, 1e2), st.floats(1.5, 1e4), st.booleans())
def test_a_scale_has_ticks_inside_it(low: float, factor: float, log: bool) -> None:
    scale = Scale(low, low * factor, 0, 100, log=log)

    assert all(low * (1 - 1e-6) <= tick <= low * factor * (1 + 1e-6) for tick in scale.ticks())


def test_points_within_a_pixel_are_not_drawn_but_the_last_one_is() -> None:
    x, y = Scale(0, 100, 0, 100), Scale(0, 1, 0, 100)

    assert line(x, y, [(0, 0.0), (0.5, 0.0), (1.0, 0.0), (1.4, 0.0)]) == "M0 0L1 0L1.4 0"
