"""The one exception for what a user can put right."""


class UserError(ValueError):
    """What a user can put right; says what was found, what was expected and what to type.

    Commands end with its message alone and exit status 1. Anything else that is raised is a fault
    of the program and keeps its traceback.
    """
