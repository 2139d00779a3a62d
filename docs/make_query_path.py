"""Draws `docs/pictures/query_path.svg`: the path of a query tensor through a patched pipeline.

Run `python docs/make_query_path.py` after a change; a test compares the file with `svg()`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from textwrap import wrap
from xml.sax.saxutils import escape

PICTURE = Path(__file__).parent / "pictures" / "query_path.svg"

WIDTH, MARGIN, TOP = 1330, 30, 136
BAND, GAP = 80, 22
IN_X, MID_X, BACK_X, ZONE_X = 46, 385, 735, 1080
MID_W, ZONE_W = 320, 220
INK, FAINT, PAPER, EDGE = "#111827", "#4b5563", "#ffffff", "#9ca3af"
OURS, STOCK = ("#dbeafe", "#2563eb"), ("#f3f4f6", "#6b7280")
GRAPH, OPERATOR = ("#fef3c7", "#b45309"), ("#dcfce7", "#15803d")
WAY_IN, WAY_BACK = "#1d4ed8", "#b91c1c"
ROW_FILL = {"u": "#e5e7eb", "c": "#bfdbfe", "p": "#fed7aa"}


@dataclass(frozen=True)
class Layer:
    """One layer of the path, from `pipe(...)` inwards.

    Args:
        title: what it is.
        code: where it is in the code, or that it is the library's own.
        ours: whether the code is ours.
        down: what happens to the query on the way in.
        up: what happens to the result on the way back.
    """

    title: str
    code: str
    ours: bool
    down: str
    up: str


LAYERS = (
    Layer(
        "pipeline call",
        "hosts/pipeline.py PipelineCalls",
        True,
        "pipe(prompt, ...): a Run begins, with the arguments, step 0 and one state per control",
        "the picture comes out; the Run and the states of the controls are dropped",
    ),
    Layer(
        "denoising loop, scheduler",
        "the library's own; step() in SchedulerCalls",
        False,
        "latents and time go to the denoiser",
        "e = u + g (c - u), the pipeline's own; then step + 1, and the step plane may change "
        "the latents",
    ),
    Layer(
        "denoiser call",
        "hosts/denoiser.py DenoiserCalls, Binding",
        True,
        "names the arguments, the role of every batch row, the step, and the controls that act "
        "at it",
        "the sample goes into the type of output that the pipeline expects",
    ),
    Layer(
        "denoiser plane",
        "Control.denoise(call)",
        True,
        "perturbed rows join the batch (extend), or get a pass of their own (only)",
        "perturbed rows leave; d = w (c - p) is added to every branch",
    ),
    Layer(
        "blocks and attention module",
        "the library's own; SiteCalls notes the site",
        False,
        "to_q, to_k, to_v, QK norm, rotary embedding: here the query comes into being",
        "to_out, residual, next block",
    ),
    Layer(
        "the tap: two patched names",
        "hosts/tap.py",
        True,
        "F.scaled_dot_product_attention or dispatch_attention_fn: views as "
        "[B,\u00a0H,\u00a0N,\u00a0D], one AttentionCall",
        "a view back in the layout of the model",
    ),
    Layer(
        "attention plane",
        "Control.attend(call)",
        True,
        "proceed(q=..., mask=..., scale=...) may hand other tensors further in",
        "own rows and heads get a new output, as lerp(O, V, u); the rest stays as it is",
    ),
    Layer(
        "attention backend",
        "the library's own: SDPA, flash, ...",
        False,
        "q, k, v, mask, scale",
        "O = softmax(scale q·k + mask) v",
    ),
)

ZONES = (
    (
        0,
        4,
        STOCK,
        "plain Python, compiled or not",
        "the pipeline once a picture, the loop once a step, the denoiser once or twice a step",
    ),
    (4, 5, GRAPH, "compiled: the graph", "eager: plain Python"),
    (
        5,
        8,
        OPERATOR,
        "compiled: one opaque operator, attnctl::attend",
        "with Python inside: site, step, rows and options are looked up when it runs, so that a "
        "change of them never recompiles. Eager: the same chain, called directly. Both: once "
        "for each attention call of a site",
    ),
)


def text(x: float, y: float, words: str, size: int = 14, **style: str) -> str:
    """Return one line of text."""
    merged = {"fill": INK, "font-size": str(size), **style}
    attributes = " ".join(f'{k.replace("_", "-")}="{v}"' for k, v in merged.items())
    return f'<text x="{x:g}" y="{y:g}" {attributes}>{escape(words)}</text>'


def paragraph(x: float, middle: float, words: str, columns: int, **style: str) -> list[str]:
    """Return wrapped text, centred vertically around `middle`."""
    lines = wrap(words, columns)
    first = middle - 9 * (len(lines) - 1) + 5
    return [text(x, first + 18 * i, line, 14, **style) for i, line in enumerate(lines)]


def box(x: float, y: float, w: float, h: float, colors: tuple[str, str], radius: int = 8) -> str:
    """Return a filled frame."""
    fill, line = colors
    return (
        f'<rect x="{x:g}" y="{y:g}" width="{w:g}" height="{h:g}" rx="{radius}" '
        f'fill="{fill}" stroke="{line}" stroke-width="1.5"/>'
    )


def arrow(x1: float, y1: float, x2: float, y2: float, color: str) -> str:
    """Return an arrow."""
    head = "in" if color == WAY_IN else "back"
    return (
        f'<line x1="{x1:g}" y1="{y1:g}" x2="{x2:g}" y2="{y2:g}" stroke="{color}" '
        f'stroke-width="2.5" marker-end="url(#{head})"/>'
    )


def layer(i: int, one: Layer) -> list[str]:
    """Return one layer: the way in, its name, the way back."""
    y = TOP + i * (BAND + GAP)
    middle = y + BAND / 2
    center = MID_X + MID_W / 2
    parts = [
        box(MID_X, y, MID_W, BAND, OURS if one.ours else STOCK),
        text(center, middle - 6, one.title, 16, text_anchor="middle", font_weight="bold"),
        text(center, middle + 17, one.code, 13, text_anchor="middle", fill=FAINT),
        *paragraph(IN_X, middle, one.down, 37),
        *paragraph(BACK_X, middle, one.up, 37),
    ]
    if i + 1 < len(LAYERS):
        below = y + BAND
        parts.append(arrow(MID_X + 60, below, MID_X + 60, below + GAP - 1, WAY_IN))
        parts.append(
            arrow(MID_X + MID_W - 60, below + GAP, MID_X + MID_W - 60, below + 1, WAY_BACK)
        )
    return parts


def zones() -> list[str]:
    """Return the strip that says what runs where under torch.compile."""
    parts = []
    for first, stop, colors, main, rest in ZONES:
        y = TOP + first * (BAND + GAP)
        high = (stop - first) * (BAND + GAP) - GAP
        parts.append(box(ZONE_X, y, ZONE_W, high, colors))
        lines = [(line, "bold") for line in wrap(main, 23)]
        lines += [(line, "normal") for line in wrap(rest, 25)]
        start = y + high / 2 - 8.5 * (len(lines) - 1) + 5
        parts += [
            text(ZONE_X + 12, start + 17 * i, line, 13, font_weight=weight)
            for i, (line, weight) in enumerate(lines)
        ]
    return parts


def cells(x: float, y: float, rows: Sequence[str]) -> list[str]:
    """Return batch groups side by side; the first letter chooses the colour."""
    parts = []
    for i, name in enumerate(rows):
        parts.append(box(x + 58 * i, y, 54, 30, (ROW_FILL[name[0]], FAINT), 4))
        parts.append(text(x + 58 * i + 27, y + 20, name, 14, text_anchor="middle"))
    return parts


@dataclass(frozen=True)
class Panel:
    """How rows travel in one way of guidance: (given, run, returned) per denoiser call."""

    title: str
    calls: tuple[tuple[tuple[str, ...], tuple[str, ...], tuple[str, ...]], ...]
    result: tuple[str, ...]


PANELS = (
    Panel(
        "CFG in one call",
        ((("u", "c"), ("u", "c", "p"), ("u + d", "c + d")),),
        ("u + d + g (c - u)", "(both branches hold d, so c - u does not)"),
    ),
    Panel(
        "CFG in two calls, c first",
        (
            (("c",), ("c", "p"), ("c + d",)),
            (("u",), ("u",), ("u + d",)),
        ),
        ("u + d + g (c - u)", "(the state of the run keeps d for the second call)"),
    ),
    Panel(
        "no CFG",
        ((("c",), ("c", "p"), ("c + d",)),),
        ("c + d", "(embedded guidance, or guidance off)"),
    ),
)


def panel(x: float, y: float, width: float, one: Panel) -> list[str]:
    """Return the batch rows of one way of guidance."""
    parts = [
        box(x, y, width, 250, (PAPER, EDGE)),
        text(x + 16, y + 28, one.title, 16, font_weight="bold"),
    ]
    labels = ("pipeline gives", "model runs", "pipeline gets")
    step = (width - 130) / 2 + 4
    if len(one.calls) > 1:
        for j in range(len(one.calls)):
            parts.append(text(x + 122 + step * j, y + 50, f"call {j + 1}", 13, fill=FAINT))
    for i, label in enumerate(labels):
        parts.append(text(x + 16, y + 78 + 44 * i, label, 13, fill=FAINT))
        for j, call in enumerate(one.calls):
            parts += cells(x + 122 + step * j, y + 58 + 44 * i, call[i])
    parts.append(text(x + 16, y + 212, f"pipeline's mix:  {one.result[0]}", 14))
    parts.append(text(x + 16, y + 235, one.result[1], 13, fill=FAINT))
    return parts


def guidance(y: float) -> list[str]:
    """Return the lower part: rows of a batch under classifier-free guidance."""
    width = (WIDTH - 2 * MARGIN - 2 * 20) / 3
    title = "The batch rows of a guidance control:  u uncond, c cond, p perturbed,  d = w (c - p)"
    parts = [text(MARGIN, y, title, 17, font_weight="bold")]
    for i, one in enumerate(PANELS):
        parts += panel(MARGIN + i * (width + 20), y + 18, width, one)
    return parts


def heads() -> Iterable[str]:
    """Return the title, the legend and the column heads."""
    yield text(MARGIN, 46, "The path of a query tensor", 22, font_weight="bold")
    yield box(MARGIN, 64, 20, 16, OURS, 3)
    yield text(MARGIN + 28, 77, "attnctl", 14)
    yield box(MARGIN + 110, 64, 20, 16, STOCK, 3)
    yield text(MARGIN + 138, 77, "diffusers, unchanged", 14)
    head = {"font_weight": "bold"}
    yield text(IN_X, TOP - 14, "on the way in (read downwards)", 14, fill=WAY_IN, **head)
    yield arrow(MID_X + 60, TOP - 30, MID_X + 60, TOP - 1, WAY_IN)
    yield arrow(MID_X + MID_W - 60, TOP, MID_X + MID_W - 60, TOP - 29, WAY_BACK)
    yield text(MID_X + 60, TOP - 38, "pipe(...)", 14, text_anchor="middle", fill=WAY_IN, **head)
    yield text(
        MID_X + MID_W - 60, TOP - 38, "images", 14, text_anchor="middle", fill=WAY_BACK, **head
    )
    yield text(BACK_X, TOP - 14, "on the way back (read upwards)", 14, fill=WAY_BACK, **head)
    yield text(ZONE_X + 12, TOP - 14, "under torch.compile", 14, **head)


def marker(name: str, color: str) -> str:
    """Return the definition of an arrow head."""
    return (
        f'<marker id="{name}" viewBox="0 0 10 10" refX="8" refY="5" markerWidth="4.5" '
        f'markerHeight="4.5" orient="auto"><path d="M0 0L10 5L0 10z" fill="{color}"/></marker>'
    )


def svg() -> str:
    """Return the picture. It brings its own light ground, so it reads on any page."""
    below = TOP + len(LAYERS) * (BAND + GAP) + 28
    height = below + 18 + 250 + MARGIN
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" '
        f'width="{WIDTH}" height="{height}" role="img" '
        'font-family="DejaVu Sans, Verdana, Helvetica, Arial, sans-serif">',
        "<title>The path of a query tensor through a patched pipeline</title>",
        f"<defs>{marker('in', WAY_IN)}{marker('back', WAY_BACK)}</defs>",
        box(1, 1, WIDTH - 2, height - 2, (PAPER, EDGE), 14),
        *heads(),
        *(part for i, one in enumerate(LAYERS) for part in layer(i, one)),
        *zones(),
        *guidance(below),
        "</svg>",
    ]
    return "\n".join(parts) + "\n"


if __name__ == "__main__":
    PICTURE.parent.mkdir(exist_ok=True)
    PICTURE.write_text(svg(), encoding="utf-8")
