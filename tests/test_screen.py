"""util/screen.py and what is printed: text that the terminal lacks, and a terminal that is gone, end nothing."""

import io
import os
import shutil
import subprocess
import sys

import pytest

from tests.helpers import PROJECT_ROOT, run_script
from util import screen
from util.screen import SteadyStream, show_progress, steady_output

NAMES = ["фон", "naïve 🌿", "line\nbreak"]


def test_what_an_encoding_lacks_is_written_in_ascii():
    stream = io.TextIOWrapper(io.BytesIO(), encoding="cp1252")
    SteadyStream(stream).write("naïve фон \udce4\n")
    stream.flush()
    assert stream.buffer.getvalue() == "naïve \\u0444\\u043e\\u043d \\udce4\n".encode("cp1252")


def test_progress_is_a_line_after_ten_seconds_and_then_every_minute_where_there_is_no_terminal(monkeypatch, capsys):
    seconds = iter(range(0, 1000, 25))
    monkeypatch.setattr(screen.time, "monotonic", lambda: next(seconds))
    assert list(show_progress("checking data", "samples", iter("abcdef"), 6)) == list("abcdef")
    assert capsys.readouterr().err == "checking data: 1 of 6 samples\nchecking data: 4 of 6 samples\n"


def test_progress_without_a_known_end_says_how_many_there_are_so_far(monkeypatch, capsys):
    monkeypatch.setattr(screen.time, "monotonic", iter(range(0, 1000, 25)).__next__)
    assert list(show_progress("searching pool", "images", iter("ab"), None)) == ["a", "b"]
    assert capsys.readouterr().err == "searching pool: 1 images so far\n"


class Broken(io.StringIO):
    def write(self, text):
        raise BrokenPipeError

    def flush(self):
        raise OSError("gone")


def test_a_stream_that_is_gone_swallows_the_text():
    stream = SteadyStream(Broken())
    assert stream.write("text") == 4
    stream.flush()
    closed = io.StringIO()
    closed.close()
    print("text", file=SteadyStream(closed), flush=True)


def test_output_is_as_before_afterwards(monkeypatch):
    monkeypatch.setattr(sys, "stdout", None)
    before = sys.stdout, sys.stderr
    with steady_output():
        print("nobody reads this")
        assert isinstance(sys.stdout, SteadyStream) and isinstance(sys.stderr, SteadyStream)
    assert (sys.stdout, sys.stderr) == before


CLOSED = 'exec "$@" >&- 2>&- <&-'
FULL = 'exec "$@" > /dev/full'
GONE = '"$@" | true; exit ${PIPESTATUS[0]}'


@pytest.mark.parametrize("shell", [CLOSED, FULL, GONE], ids=["closed", "full", "gone"])
def test_a_closed_descriptor_a_full_disk_and_a_pipe_without_reader_do_not_end_a_script(tmp_path, shell):
    script = tmp_path / "script.py"
    script.write_text(
        f"""
import sys
from util.screen import steady_output

def main():
    for _ in range(9000):
        print("a line")
    with open({str(tmp_path / "done")!r}, "w") as file:
        file.write("saved")
    print("more", file=sys.stderr)

with steady_output():
    main()
""",
        encoding="utf-8",
    )
    command = ["bash", "-c", shell, "bash", sys.executable, str(script)]
    variables = {**os.environ, "PYTHONPATH": str(PROJECT_ROOT)}
    ended = subprocess.run(command, env=variables, capture_output=True, text=True, check=False)
    assert (ended.returncode, (tmp_path / "done").read_text(encoding="utf-8")) == (0, "saved")
    assert "Error" not in ended.stderr


@pytest.mark.slow
def test_class_names_outside_the_terminals_encoding_do_not_end_a_run(data, tmp_path):
    data.configure(classes=NAMES)
    ended = run_script("unimatch.py", *data.arguments(tmp_path / "run"), env={"PYTHONIOENCODING": "ascii"})
    assert ended.returncode == 0 and "Traceback" not in ended.stderr
    assert r"\u0444\u043e\u043d" in ended.stdout
    assert "фон" in (tmp_path / "run/train.log").read_text(encoding="utf-8")
    arguments = [
        "--config",
        str(data.config),
        "--labeled-id-path",
        str(data.labeled),
        "--output",
        str(tmp_path / "out"),
    ]
    ended = run_script("-m", "scripts.check_data", *arguments, env={"PYTHONIOENCODING": "ascii"})
    assert ended.returncode == 0 and "Traceback" not in ended.stderr


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="file names are bytes on Linux only")
def test_file_names_that_are_no_utf8_are_trained_on(data, tmp_path):
    data.configure(unlabeled_id_path="pool", cache="disk", cache_dir=str(tmp_path / "cache"), workers=1)
    (data.root / "pool").mkdir()
    for index in range(4):
        shutil.copy(data.root / f"images/unlabeled{index}.jpg", data.root / f"pool/\udce4{index}.jpg")
    ended = run_script("unimatch.py", *data.arguments(tmp_path / "run"))
    assert (ended.returncode, ended.stderr) == (0, "")
    (data.root / "pool/\udce40.jpg").write_bytes(b"")
    ended = run_script("unimatch.py", *data.arguments(tmp_path / "next"))
    assert ended.returncode == 2 and r"pool/\udce40.jpg: unreadable image" in ended.stderr
    ended = run_script("unimatch.py", *data.arguments(tmp_path / "run\udce4"))
    assert ended.returncode == 2 and r"run\udce4: the name is no UTF-8 text" in ended.stderr
