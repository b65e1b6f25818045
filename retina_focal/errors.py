"""The one exception for what a user can put right."""

import re


class UserError(ValueError):
    """What a user can put right; says what was found, what was expected and what to type.

    Commands end with its message alone and exit status 1. Anything else that is raised is a fault
    of the program and keeps its traceback.
    """

    def __str__(self) -> str:
        """The message; that of a data loader's worker without the traceback before it."""
        text = super().__str__()
        if not text.startswith("Caught "):
            return text
        return re.split(r"^retina_focal[\w.]*: ", text, flags=re.MULTILINE)[-1].strip()
