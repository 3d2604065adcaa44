"""A chart of points and lines as SVG text: no library is worth its weight for this."""

from __future__ import annotations

import math
from html import escape

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 760, 460, 70, 20, 46, 56
COLOURS = ("#444444", "#c1121f", "#1d6fa5", "#2a9d4b", "#8e5bb5", "#d98300")
Point = tuple[float, float, str]  # x, y, and what stands beside it


def chart(title: str, x_name: str, y_name: str, series: dict[str, list[Point]]) -> str:
    """Lines through the points of each series in the order given; x is logarithmic."""
    xs = [math.log(x) for points in series.values() for x, _, _ in points]
    ys = [y for points in series.values() for _, y, _ in points]
    x_low, x_high = min(xs) - 0.1, max(xs) + 0.1
    step = _round_step((max(ys) - min(ys)) / 5)
    y_low, y_high = math.floor(min(ys) / step) * step, math.ceil(max(ys) / step) * step

    def place(x: float, y: float) -> tuple[float, float]:
        across = (math.log(x) - x_low) / (x_high - x_low)
        up = (y - y_low) / (y_high - y_low)
        return LEFT + across * (WIDTH - LEFT - RIGHT), HEIGHT - BOTTOM - up * (HEIGHT - TOP - BOTTOM)

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>',
        _text(LEFT, 24, title, size=15),
        _text(LEFT + (WIDTH - LEFT - RIGHT) / 2, HEIGHT - 12, x_name, anchor="middle"),
        f'<g transform="rotate(-90 18 {HEIGHT / 2})">{_text(18, HEIGHT / 2, y_name, anchor="middle")}</g>',
    ]
    for k in range(round((y_high - y_low) / step) + 1):
        value = y_low + k * step
        _, y = place(math.exp(x_low), value)
        parts.append(f'<path d="M{LEFT} {y:.1f}H{WIDTH - RIGHT}" stroke="#dddddd"/>')
        parts.append(_text(LEFT - 8, y + 4, f"{value:g}", anchor="end"))
    for value in _ticks(math.exp(x_low), math.exp(x_high)):
        x, _ = place(value, y_low)
        parts.append(f'<path d="M{x:.1f} {TOP}V{HEIGHT - BOTTOM}" stroke="#eeeeee"/>')
        parts.append(_text(x, HEIGHT - BOTTOM + 16, f"{value:g}", anchor="middle"))
    for number, (name, points) in enumerate(series.items()):
        colour = COLOURS[number % len(COLOURS)]
        placed = [(*place(x, y), label) for x, y, label in points]
        line = "L".join(f"{x:.1f} {y:.1f}" for x, y, _ in placed)
        parts.append(f'<path d="M{line}" fill="none" stroke="{colour}" stroke-width="2"/>')
        for x, y, label in placed:
            parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3.5" fill="{colour}"/>')
            parts.append(_text(x + 5, y + 14, label, colour, size=10))
        key = TOP + 14 + 18 * number
        parts.append(f'<path d="M{LEFT + 12} {key - 4}h22" stroke="{colour}" stroke-width="3"/>')
        parts.append(_text(LEFT + 40, key, name, colour))
    return "\n".join([*parts, "</svg>"]) + "\n"


def _text(
    x: float, y: float, text: str, colour: str = "#222222", anchor: str = "start", size: int = 12
) -> str:
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" fill="{colour}" text-anchor="{anchor}" font-size="{size}">'
        f"{escape(text)}</text>"
    )


def _round_step(wanted: float) -> float:
    """1, 2 or 5 times a power of ten, at least `wanted`."""
    power = 10 ** math.floor(math.log10(wanted))
    return next(factor * power for factor in (1, 2, 5, 10) if factor * power >= wanted)


def _ticks(low: float, high: float) -> list[float]:
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    return [f * 10.0**p for p in powers for f in (1, 2, 3, 5, 7) if low <= f * 10.0**p <= high]
