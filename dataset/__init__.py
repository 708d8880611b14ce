"""Lists, images, views and loaders. Nothing here imports from the rest of the project."""

from dataset.errors import DataError

__all__ = ["DataError"]
