"""The one error that data can cause."""


class DataError(ValueError):
    """A list, image or label is at fault; the message is one line that names the file and the way out.

    `kind` heads such faults where many files are checked, for instance "missing labels".
    """

    def __init__(self, message: str, kind: str = "other faults") -> None:
        super().__init__(message)
        self.kind = kind
