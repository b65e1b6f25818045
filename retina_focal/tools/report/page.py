"""The page, made from plain values by a template that escapes each of them."""

from pathlib import Path

from retina_focal.errors import UserError
from retina_focal.evaluation.mistakes import KINDS
from retina_focal.evaluation.operating_points import describe
from retina_focal.tools.report.content import SIZES

try:
    from jinja2 import Environment, FileSystemLoader, StrictUndefined
except ImportError as error:
    raise UserError(
        "the page needs jinja2, which is not installed; type: pip install 'retina_focal[report]'"
    ) from error


def render(page: dict) -> str:
    """The HTML of what `report.command` has gathered."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"percent": _percent, "share": _share, "decimal": _decimal}
    names = {"sizes": SIZES, "kinds": KINDS, "describe": describe}
    return environment.get_template("page.html").render(**page, **names)


def _percent(value: float | None) -> str:
    return "none" if value is None else f"{value:.1f}"


def _share(value: float | None) -> str:
    """A share in [0, 1] in percent."""
    return _percent(None if value is None else 100 * value)


def _decimal(value: float | None) -> str:
    return "none" if value is None else f"{value:.2f}"
