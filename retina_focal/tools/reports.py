"""What the reports of the commands share: where numbers come from, tables and figures."""

import math
import platform
import shlex
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from datetime import datetime, timezone
from io import BytesIO
from itertools import takewhile
from pathlib import Path
from typing import TYPE_CHECKING

import detectron2
import torch
import torchvision
import yaml
from tabulate import tabulate

from retina_focal.files import write_whole

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def origin(tool: str, argv: Sequence[str], device: str) -> dict[str, object]:
    """The command, the time and the machine of a measurement."""
    return {
        "command": shlex.join(["retina-focal", tool, *argv]),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "processor": processor(device),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
        "detectron2": detectron2.__version__,
    }


def processor(device: str) -> str:
    """Name of what computes."""
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_name()
    cpuinfo = Path("/proc/cpuinfo")  # of Linux
    lines = cpuinfo.read_text().splitlines() if cpuinfo.is_file() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def table(heads: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A Markdown table that reads in a terminal too: the first column left, the others right."""
    align = ("left", *["right"] * (len(heads) - 1))
    return tabulate(rows, heads, tablefmt="pipe", colalign=align, disable_numparse=True)


def yaml_lines(settings: Mapping[str, object], reasons: Mapping[str, str] | None = None) -> str:
    """{"A.B": 1} as YAML, nested by the dots.

    Args:
        reasons: a comment for each key.
    """
    lines, above = [], []
    for key, value in sorted(settings.items()):
        *parents, leaf = key.split(".")
        pairs = zip(above, parents, strict=False)
        common = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
        lines += [f"{'  ' * i}{parents[i]}:" for i in range(common, len(parents))]
        text = yaml.safe_dump(value, default_flow_style=True, width=math.inf)
        text = text.strip().removesuffix("...").strip()  # the end of a document
        line = f"{'  ' * len(parents)}{leaf}: {text}"
        lines.append(f"{line}  # {reasons[key]}" if reasons else line)
        above = parents
    return "\n".join(lines)


@contextmanager
def figure(path: Path, width: float, height: float) -> Iterator["Figure"]:
    """A figure to draw on, in inches; saved to `path` at the end, as its ending tells."""
    from matplotlib.figure import Figure  # its savefig draws by Agg, whatever the backend is

    with texts_stay() if path.suffix == ".svg" else nullcontext():
        drawn = Figure(figsize=(width, height), layout="constrained")
        yield drawn
        picture = BytesIO()
        drawn.savefig(picture, dpi=120, format=path.suffix.removeprefix("."))
    write_whole(path, picture.getvalue())


@contextmanager
def texts_stay() -> Iterator[None]:
    """Inside, texts of figures stay texts in SVG, which the reader's fonts draw in any language;
    a class may be called "$a$"."""
    import matplotlib

    style = {"svg.fonttype": "none", "font.family": "sans-serif", "text.parse_math": False}
    with matplotlib.rc_context(style), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph", UserWarning)  # of the font that measures them
        yield
