"""One HTML file that needs nothing else: templates, embedded figures, numbers as text."""

import base64
import io
import math

import jinja2
import matplotlib
from matplotlib.figure import Figure
from PIL import Image

from ..version import __version__
from .figures import STYLE

DPI = 150


def environment() -> jinja2.Environment:
    """The templates; everything that they print is escaped."""
    templates = jinja2.Environment(
        loader=jinja2.PackageLoader("medseg.report", "templates"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    templates.filters["number"] = number
    templates.globals["medseg_version"] = __version__
    return templates


def number(value: float, digits: int = 3) -> str:
    """A number as text, a dash where there is none."""
    return f"{value:.{digits}f}" if math.isfinite(value) else "–"


def embed(figure: Figure, vector: bool = False) -> str:
    """A figure as a data URI: PNG (256 colors), or SVG where that is smaller; the same figure gives the same bytes."""
    buffer = io.BytesIO()
    with matplotlib.rc_context(STYLE):
        if vector:
            figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
            return data_uri("svg+xml", buffer.getvalue())
        figure.savefig(buffer, format="png", dpi=DPI, metadata={"Software": None}, pil_kwargs={"compress_level": 1})
    picture = Image.open(buffer).convert("RGB").quantize(256, dither=Image.Dither.NONE)
    small = io.BytesIO()
    picture.save(small, format="PNG")
    return data_uri("png", small.getvalue())


def data_uri(kind: str, content: bytes) -> str:
    """An image as the address of itself."""
    return f"data:image/{kind};base64,{base64.b64encode(content).decode('ascii')}"
