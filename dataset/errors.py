"""The one error that data can cause."""


class DataError(ValueError):
    """A list, image or label is at fault; the message is one line that names the file and the way out."""
