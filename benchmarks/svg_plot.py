"""Line plots as SVG text, without a plotting library: panels side by side, linear or logarithmic axes."""

import math
from dataclasses import dataclass
from html import escape
from pathlib import Path

WIDTH, HEIGHT = 460, 320
LEFT, RIGHT, TOP, BOTTOM = 64, 14, 34, 46
COLORS = ("#1f77b4", "#d62728", "#2ca02c", "#9467bd", "#ff7f0e", "#8c564b")
LINE = '<polyline fill="none" stroke="{}" stroke-width="1.5" points="{}"/>'
TEXT = '<text x="{:.1f}" y="{:.1f}" text-anchor="{}">{}</text>'
GRID = '<path d="M{:.1f},{:.1f}L{:.1f},{:.1f}" stroke="#ddd"/>'


@dataclass
class Panel:
    """One plot. `limit` is a dashed horizontal line with a name, such as a target."""

    title: str
    x_label: str
    y_label: str
    series: dict[str, list[tuple[float, float]]]
    is_log: bool = False
    limit: tuple[str, float] | None = None


class Axis:
    """Maps values to pixels and knows where its ticks are."""

    def __init__(self, values: list[float], start: float, stop: float, is_log: bool) -> None:
        self.is_log = is_log
        self.start, self.stop = start, stop
        if is_log:
            positive = [value for value in values if value > 0]
            self.low, self.high = math.floor(_log(min(positive))), math.ceil(_log(max(positive)))
            self.high = max(self.high, self.low + 1)
            self.ticks = [10.0**i for i in range(self.low, self.high + 1)]
        else:
            step = _nice_step(max(values) or 1.0)
            self.low, self.high = 0, math.ceil((max(values) or 1.0) / step) * step
            self.ticks = [i * step for i in range(round(self.high / step) + 1)]

    def pixel(self, value: float) -> float:
        """Where a value is drawn."""
        position = _log(value) if self.is_log else value
        return self.start + (position - self.low) / (self.high - self.low) * (self.stop - self.start)


def write_svg(path: Path, panels: list[Panel]) -> None:
    """Write the panels side by side into one file."""
    body = [f'<g transform="translate({i * WIDTH},0)">{_draw(panel)}</g>' for i, panel in enumerate(panels)]
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH * len(panels)}" height="{HEIGHT}" '
        'font-family="sans-serif" font-size="11"><rect width="100%" height="100%" fill="white"/>'
    )
    path.write_text("\n".join([head, *body, "</svg>"]) + "\n", "utf-8")


def _draw(panel: Panel) -> str:
    points = [point for line in panel.series.values() for point in line]
    limits = [panel.limit[1]] if panel.limit else []
    x = Axis([point[0] for point in points], LEFT, WIDTH - RIGHT, panel.is_log)
    y = Axis([*(point[1] for point in points), *limits], HEIGHT - BOTTOM, TOP, panel.is_log)
    out = [TEXT.format(LEFT, TOP - 14, "start", f"<tspan font-weight='bold'>{escape(panel.title)}</tspan>")]
    for tick in x.ticks:
        out.append(GRID.format(x.pixel(tick), TOP, x.pixel(tick), HEIGHT - BOTTOM))
        out.append(TEXT.format(x.pixel(tick), HEIGHT - BOTTOM + 14, "middle", _short(tick)))
    for tick in y.ticks:
        out.append(GRID.format(LEFT, y.pixel(tick), WIDTH - RIGHT, y.pixel(tick)))
        out.append(TEXT.format(LEFT - 5, y.pixel(tick) + 4, "end", _short(tick)))
    out.append(TEXT.format((LEFT + WIDTH) / 2, HEIGHT - 14, "middle", escape(panel.x_label)))
    out.append(
        f'<text transform="translate(14,{HEIGHT / 2}) rotate(-90)" text-anchor="middle">'
        f"{escape(panel.y_label)}</text>"
    )
    if panel.limit:
        name, value = panel.limit
        out.append(GRID.format(LEFT, y.pixel(value), WIDTH - RIGHT, y.pixel(value)).replace("#ddd", "#555"))
        out.append(TEXT.format(LEFT + 4, y.pixel(value) + 13, "start", escape(name)))
    for i, (name, line) in enumerate(panel.series.items()):
        color = COLORS[i % len(COLORS)]
        drawn = [p for p in line if not panel.is_log or min(p) > 0]
        out.append(LINE.format(color, " ".join(f"{x.pixel(a):.1f},{y.pixel(b):.1f}" for a, b in drawn)))
        label = f'<tspan fill="{color}">{escape(name)}</tspan>'
        out.append(TEXT.format(WIDTH - RIGHT - 4, HEIGHT - BOTTOM - 8 - 14 * i, "end", label))
    return "".join(out)


def _short(value: float) -> str:
    """A number as an axis shows it: 20k, 1M."""
    for unit, size in (("M", 1e6), ("k", 1e3)):
        if value >= size:
            return f"{value / size:g}{unit}"
    return f"{value:g}"


def _nice_step(largest: float) -> float:
    """A step of 1, 2 or 5 times a power of ten that gives four to ten ticks."""
    power = 10.0 ** math.floor(_log(largest / 4))
    return next(power * factor for factor in (1, 2, 5, 10) if largest / (power * factor) <= 8)


def _log(value: float) -> float:
    return math.log10(value)
