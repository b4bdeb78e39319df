"""Format numbers for readers: means with half-widths, intervals, and minus signs."""

import math

from jaxflat.analysis.cells import Cell
from jaxflat.analysis.statistics.intervals import Interval

MISSING = "–"


def plus_minus(cell: Cell, column: str, style: str = "", scale: float = 1.0) -> str:
    """Format 'mean ± half-width' over seeds, or the mean alone for one seed.

    Without a `style`, the error sets the number of digits. An error that would look like 0 adds up
    to two digits to the style.
    """
    interval = cell.interval(column)
    if interval is None:
        return MISSING
    error = scale * (interval.half_width or 0.0)
    style = _finer(style, error) if style else _style(scale * interval.mean, error)
    text = format(scale * interval.mean, style)
    if interval.half_width is not None:
        text += f" ± {format(scale * interval.half_width, style.lstrip('+'))}"
    return minus(text)


def _style(mean: float, error: float) -> str:
    """Return a format with two digits of the error, at most six of the mean, three if no error."""
    unit = max(error / 10, abs(mean) / (1e5 if error else 100))
    return f",.{max(0, -math.floor(math.log10(unit))) if unit else 0}f"


def _finer(style: str, error: float) -> str:
    """Return a style such as ".4f" with the fewest more digits, up to two, that show the error."""
    start, _, digits = style.rstrip("f").rpartition(".")
    finer = (f"{start}.{int(digits) + more}f" for more in range(3))
    return next((one for one in finer if error and float(format(error, one))), style)


def ranged(interval: Interval | None, style: str, scale: float = 1.0, unit: str = "") -> str:
    """Format 'mean unit (low to high)'."""
    if interval is None:
        return MISSING
    text = format(scale * interval.mean, style) + unit
    if interval.low is None or interval.high is None:
        why = "one seed, no interval" if interval.count < 2 else "unbounded interval"
        return minus(f"{text} ({why})")
    low, high = (format(scale * end, style) for end in (interval.low, interval.high))
    return minus(f"{text} ({low} to {high})")


def points(interval: Interval | None, scale: float = 100.0) -> str:
    """Format a difference in points, with two digits if its half-width is below one point."""
    half_width = interval.half_width if interval else None
    style = "+.1f" if half_width is None or scale * half_width >= 1 else "+.2f"
    return ranged(interval, style, scale)


def slope(interval: Interval | None) -> str:
    return ranged(interval, "+.2f")


def nats(interval: Interval | None) -> str:
    return ranged(interval, "+.4f")


def ratio(interval: Interval | None) -> str:
    return ranged(interval, ".2f", unit="×")


def correlation(interval: Interval | None) -> str:
    return ranged(interval, "+.2f")


def p_value(p: float | None) -> str:
    if p is None:
        return MISSING
    return "< 0.001" if p < 0.001 else f"{p:.3f}"


def params(count: float) -> str:
    """Format a number of parameters in about three characters: 1.2k, 3.4M."""
    for size, letter in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if count >= size:
            return f"{count / size:.3g}{letter}"
    return f"{count:.3g}"


def minus(text: str) -> str:
    return text.replace("-", "−")


def capitalized(text: str) -> str:
    """Return the text with its first letter in upper case; a name such as SAM keeps the others."""
    return text[:1].upper() + text[1:]


def plural(count: int, noun: str) -> str:
    return f"{count} {noun}{'' if count == 1 else 's'}"


def short(text: str, most: int) -> str:
    """Cut a text for a picture to `most` characters."""
    return text if len(text) <= most else f"{text[: most - 1]}…"
