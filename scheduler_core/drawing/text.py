"""Numbers and strangers' names as text: what every table, heading and label of report and page is written with.

A number that does not exist is a dash; why it is missing is said where it is missing. Thin and non-breaking spaces
(U+202F, U+00A0) keep a number and its unit on one line.
"""

import math
import re
import unicodedata

from markupsafe import Markup

DASH = "–"
MINUS = "−"
NAME_CHARACTERS = 64
TITLE_CHARACTERS = 1_000
_CONTROL = {"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"}
_BLANK_LETTERS = frozenset("\u115f\u1160\u2800\u3164\uffa0\u034f")
_PLAIN = re.compile(r"[\x20-\x7e]*")


def visible(text: str) -> str:
    """A stranger's text with every character that one cannot see, or that turns the line around, spelled out.

    >>> visible("\u202egnp.exe")
    '⟨U+202E⟩gnp.exe'
    """
    return text if _PLAIN.fullmatch(text) else "".join(_spelled(text))


def shorten(text: str, characters: int = NAME_CHARACTERS) -> str:
    """``visible`` text of at most so many characters; the last one is an ellipsis where something was cut.

    >>> shorten("a\u200bbcdefgh", 12)
    'a⟨U+200B⟩bc…'
    """
    cut, length = [], 0
    for part in _spelled(text[: characters + 1]):
        cut.append(part)
        length += len(part)
        if length > characters:
            while length > characters - 1:
                length -= len(cut.pop())
            return "".join(cut) + "…"
    return "".join(cut)


def shown(text: str) -> Markup:
    """A stranger's text for HTML: visible, escaped, at most 64 characters, kept from turning what stands beside it.

    Where it was cut, the title holds the text up to 1,000 characters.

    >>> shown("<b>")
    Markup('<bdi>&lt;b&gt;</bdi>')
    """
    short = shorten(text)
    if not short:
        return Markup('<bdi class="mut">(empty)</bdi>')
    if len(text) <= len(short) and not short.endswith("…"):
        return Markup("<bdi>{}</bdi>").format(short)
    return Markup('<bdi title="{}">{}</bdi>').format(shorten(text, TITLE_CHARACTERS), short)


def seconds(value: float | None) -> str:
    """A duration in seconds, read at a glance and never rounded to nothing.

    >>> [seconds(s) for s in (0.0, 8.8e-6, 0.00042, 0.0042, 0.084, 5.123)]
    ['0\xa0s', '8.8\xa0µs', '0.42\xa0ms', '4.2\xa0ms', '84\xa0ms', '5.12\xa0s']
    >>> [seconds(s) for s in (200.0, 11_400.0, None)]
    ['3\xa0min\xa020\xa0s', '3\xa0h\xa010\xa0min', '–']
    """
    if value is None or not math.isfinite(value):
        return DASH
    if value < 0:
        return MINUS + seconds(-value)
    if value == 0:
        return "0\xa0s"
    if value < 0.9995:
        ms = value * 1_000
        if ms < 0.09995:
            return f"{ms * 1_000:.{0 if ms >= 0.00995 else 1}f}\xa0µs"
        digits = 0 if ms >= 9.95 else 1 if ms >= 0.9995 else 2
        return f"{ms:.{digits}f}\xa0ms"
    if value < 99.995:
        return f"{value:.2f}\xa0s"
    if value < 3_599.5:
        minutes, rest = divmod(round(value), 60)
        return f"{minutes}\xa0min\xa0{rest}\xa0s"
    hours, minutes = divmod(round(value / 60), 60)
    return f"{thousands(hours)}\xa0h\xa0{minutes}\xa0min"


def percent(share: float | None) -> str:
    """A share 0..1 in percent; all and nothing are said only where they are true.

    >>> [percent(s) for s in (0.963, 1.0, 0.9996, 0.0001, 0.0, None)]
    ['96.3\xa0%', '100\xa0%', '99.96\xa0%', '0.01\xa0%', '0\xa0%', '–']
    """
    return DASH if share is None or not math.isfinite(share) else f"{number_of_percent(share)}\xa0%"


def number_of_percent(share: float | None) -> str:
    """``percent`` without its sign, for a column whose heading has it.

    >>> number_of_percent(0.963)
    '96.3'
    """
    if share is None or not math.isfinite(share):
        return DASH
    if share in (0.0, 1.0):
        return f"{100 * share:.0f}"
    text = f"{100 * share:.1f}"
    return text if text not in ("0.0", "100.0") else f"{100 * share:.2f}"


def points(value: float | None) -> str:
    """A difference of two shares in percentage points, with its sign.

    >>> [points(p) for p in (20.13, -0.6, 0.0, None)]
    ['+20.1\xa0points', '−0.6\xa0points', '0.0\xa0points', '–']
    """
    return DASH if value is None or not math.isfinite(value) else f"{signed(value)}\xa0points"


def signed(value: float | None) -> str:
    """One decimal with its sign; what rounds to zero has none.

    >>> [signed(v) for v in (1.25, -0.04)]
    ['+1.2', '0.0']
    """
    if value is None or not math.isfinite(value):
        return DASH
    text = f"{abs(value):.1f}"
    return text if float(text) == 0 else (MINUS if value < 0 else "+") + text


def thousands(value: float | None) -> str:
    """A count: tokens, requests, blocks.

    >>> [thousands(v) for v in (123_192, 12.5, None)]
    ['123\u202f192', '12.5', '–']
    """
    if value is None or not math.isfinite(value):
        return DASH
    text = f"{value:,.0f}" if float(value).is_integer() or abs(value) >= 1_000 else f"{value:.1f}"
    return text.replace(",", "\u202f").replace("-", MINUS)


def counted(count: int, noun: str, plural: str = "") -> str:
    """A count with its noun.

    >>> [counted(1, "load"), counted(3, "load"), counted(2, "strategy", "strategies")]
    ['1\xa0load', '3\xa0loads', '2\xa0strategies']
    """
    return f"{thousands(count)}\xa0{noun if count == 1 else plural or noun + 's'}"


def _spelled(text: str) -> list[str]:
    """Each character as it is shown; of a pile of combining marks, two are."""
    parts, marks = [], 0
    for c in text:
        category = unicodedata.category(c)
        marks = marks + 1 if category in ("Mn", "Me") else 0
        hidden = category in _CONTROL or c in _BLANK_LETTERS or marks > 2 or (category == "Zs" and c != " ")
        hidden = hidden or "\ufe00" <= c <= "\ufe0f"
        parts.append(f"⟨U+{ord(c):04X}⟩" if hidden else c)
    return parts
