"""What stands beside an exported model: the runtime that needs no torch."""

from pathlib import Path

from retina_focal.files import write_whole

DETECTOR = "detector.py"


def write_runtime(folder: str | Path) -> Path:
    """Copy `runtime.py` as `detector.py` into the folder of an exported model.

    Returns:
        its path.
    Raises:
        UserError: the folder can't be written to.
    """
    path = Path(folder, DETECTOR)
    write_whole(path, Path(__file__).with_name("runtime.py").read_bytes())
    return path
