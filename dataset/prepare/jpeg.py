"""Damage inside JPEG files: what libjpeg complains of while it decodes them all the same."""

from __future__ import annotations

import functools
import os
import re
import sys
import tempfile
from typing import IO

import torch
from torchvision import io as torchvision_io


def jpeg_complaint(data: bytes) -> str | None:
    """What libjpeg says about a damaged JPEG file that it decodes all the same; None if nothing, or for other formats.

    Pillow drops these lines, torchvision lets the library print them to the process's standard error, where they are
    caught; so a process must do one image at a time.
    """
    decode_jpeg = getattr(torchvision_io, "decode_jpeg", None)  # deprecated: later versions will lack it
    if data[:2] != b"\xff\xd8" or decode_jpeg is None:
        return None
    caught = _catcher(os.getpid())
    sys.stderr.flush()
    stderr = os.dup(2)
    os.dup2(caught.fileno(), 2)
    try:
        decode_jpeg(torch.frombuffer(bytearray(data), dtype=torch.uint8), torchvision_io.ImageReadMode.GRAY)
    except RuntimeError:  # a JPEG that torchvision does not know, or no libjpeg: no complaint of the data
        pass
    finally:
        os.dup2(stderr, 2)
        os.close(stderr)
        caught.seek(0)
        text = caught.read().decode(errors="replace")
        caught.seek(0)
        caught.truncate()
    lines = re.findall(r"^(?:Corrupt JPEG data|Premature end of JPEG).*", text, re.MULTILINE)
    return lines[0].strip() if lines else None


@functools.lru_cache(maxsize=1)
def _catcher(process: int) -> IO[bytes]:
    """A file of this process; one taken over from its parent would have a position in common with other processes."""
    return tempfile.TemporaryFile()
