"""The one error that data can cause, and how an error is shown in one line."""


class DataError(ValueError):
    """A list, image or label is at fault; the message is one line that names the file and the way out.

    `kind` heads such faults where many files are checked, for instance "missing labels".
    """

    def __init__(self, message: str, kind: str = "other faults") -> None:
        super().__init__(message)
        self.kind = kind


def one_line(error: object) -> str:
    """Its text without line breaks, or its type's name if it has no text."""
    return " ".join(str(error).split()) or type(error).__name__
