"""What the fuzz tests share: how many examples, changed files, and that only documented errors of one line come out."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from pathlib import Path

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

from util.errors import USER_ERRORS, error_line

COMMON = {"deadline": None, "suppress_health_check": list(HealthCheck), "database": None}
settings.register_profile("short", derandomize=True, max_examples=40, **COMMON)
settings.register_profile("long", max_examples=2000, **COMMON)
settings.load_profile(os.environ.get("FUZZ", "short"))


def documented(function: Callable[[], object], name: str | Path = "") -> None:
    """`function` returns, or raises one of the errors that scripts tell in one line, in which `name` occurs."""
    try:
        function()
    except USER_ERRORS as error:
        line = error_line(error)
        assert line and len(line.splitlines()) == 1
        assert str(name) in line
        assert len(line) < 5000


def in_file(content: bytes, name: str, function: Callable[[Path], object]) -> None:
    """`function` does so on a file of this name and content; errors name the folder that it is in."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / name
        path.write_bytes(content)
        documented(lambda: function(path), folder)


@st.composite
def mutated(draw: st.DrawFn, original: bytes) -> bytes:
    """A file with a few bytes changed, a part left out, doubled or cut off, or other bytes in between."""
    data = bytearray(original)
    for _ in range(draw(st.integers(1, 4))):
        kind = draw(st.sampled_from(["flip", "set", "cut", "drop", "double", "insert"]))
        start = draw(st.integers(0, max(len(data) - 1, 0)))
        end = min(len(data), start + draw(st.integers(1, 40)))
        if kind == "flip" and data:
            data[start] ^= 1 << draw(st.integers(0, 7))
        elif kind == "set":
            data[start:end] = bytes([draw(st.sampled_from([0, 1, 127, 128, 255]))]) * (end - start)
        elif kind == "cut":
            del data[start:]
        elif kind == "drop":
            del data[start:end]
        elif kind == "double":
            data[end:end] = data[start:end]
        else:
            data[start:start] = draw(st.binary(max_size=20))
    return bytes(data)
