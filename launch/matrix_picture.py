"""A matrix of bits per byte as a picture."""

import io
import math
import warnings
from collections.abc import Sequence

import matplotlib
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties, findfont
from matplotlib.ft2font import FT2Font
from matplotlib.patches import Rectangle

_WIDTH, _HEIGHT = 0.85, 0.42  # of a cell, inches
_INK = "#1a1a1a"
_BEST, _WORST = (0x1F, 0x5F, 0x8B), (0xF4, 0xF1, 0xEA)
_SPAN = math.log(1.5)  # half as many bits again as the column's best are as pale as cells get
_FONT = "DejaVu Sans"  # comes with matplotlib


def draw_matrix(rows: Sequence[str], columns: Sequence[str], values: Sequence[Sequence[float]]) -> bytes:
    """Return an SVG: equal matrices give equal bytes, and nothing in it needs a font or a background.

    A cell is the darker the closer it comes to the least of its column, so that columns of different texts compare.
    """
    # Letters are drawn as paths, but for scripts that the font lacks, which are left to whoever shows the picture.
    font = FT2Font(findfont(FontProperties(family=_FONT)))
    drawn = all(font.get_char_index(ord(character)) for name in (*rows, *columns) for character in name)
    with matplotlib.rc_context(), warnings.catch_warnings():
        matplotlib.rcdefaults()
        matplotlib.rcParams["svg.hashsalt"] = "sigmoe"
        matplotlib.rcParams["svg.fonttype"] = "path" if drawn else "none"
        matplotlib.rcParams["font.family"] = _FONT
        matplotlib.rcParams["text.parse_math"] = False
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        return _svg(_figure(rows, columns, values))


def _figure(rows: Sequence[str], columns: Sequence[str], values: Sequence[Sequence[float]]) -> Figure:
    figure = Figure(figsize=(_WIDTH * len(columns), _HEIGHT * len(rows)), facecolor="white")
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(0, len(columns)), ylim=(len(rows), 0), frame_on=False)
    best = [min((v for v in column if math.isfinite(v)), default=math.nan) for column in zip(*values)]
    for y, row in enumerate(values):
        for x, value in enumerate(row):
            share = _paleness(value, best[x])
            colour = tuple((a + (b - a) * share) / 255 for a, b in zip(_BEST, _WORST))
            axes.add_patch(Rectangle((x, y), 1, 1, facecolor=colour, edgecolor="white", clip_on=False))
            text = f"{value:.3f}" if math.isfinite(value) else "-"
            ink = "white" if share < 0.45 else _INK
            axes.text(x + 0.5, y + 0.5, text, color=ink, size=9, ha="center", va="center")
    axes.set_xticks([x + 0.5 for x in range(len(columns))], columns, size=9, color=_INK)
    axes.set_yticks([y + 0.5 for y in range(len(rows))], rows, size=9, color=_INK)
    axes.tick_params(length=0, top=False, bottom=False, labeltop=True, labelbottom=False)
    if max(map(len, columns)) > 9:
        for label in axes.get_xticklabels():
            label.set(rotation=35, ha="left", rotation_mode="anchor")
    axes.set_title("bits per byte (rows: experts, columns: text)", size=9, color=_INK, loc="left", pad=10)
    return figure


def _paleness(value: float, best: float) -> float:
    """0 for the best of a column, 1 for what is far from it, or no number."""
    if not (math.isfinite(value) and best > 0):
        return 0.0 if value == best else 1.0
    return min(math.log(value / best) / _SPAN, 1.0)


def _svg(figure: Figure) -> bytes:
    out = io.BytesIO()
    metadata = {"Date": None, "Creator": None}
    FigureCanvasSVG(figure).print_figure(out, format="svg", bbox_inches="tight", pad_inches=0.1, metadata=metadata)
    return out.getvalue()
