"""util/distributed/store.py: every call to the key-value store ends, with an answer or with StoreLost."""

from __future__ import annotations

import socket
import threading
from datetime import timedelta

import pytest
import torch.distributed as dist

from util.distributed.store import BoundedStore, Helper, NoAnswer, StoreLost


def test_a_key_is_unset_then_has_the_value_that_was_set():
    server = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=10))
    store = BoundedStore("127.0.0.1", server.port, seconds=10)
    assert store.get("key") is None
    store.set("key", "value")
    assert store.get("key") == "value"


def test_of_two_that_set_a_key_first_one_wins():
    server = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=10))
    store = BoundedStore("127.0.0.1", server.port, seconds=10)
    assert store.set_first("key", "mine") == "mine"
    assert store.set_first("key", "yours") == "mine"


def test_a_server_that_says_nothing_is_lost_and_stays_lost():
    with socket.create_server(("127.0.0.1", 0)) as silent:  # takes connections, and never answers
        port = silent.getsockname()[1]
        with pytest.raises(StoreLost, match=f"127.0.0.1:{port} does not answer") as error:
            BoundedStore("127.0.0.1", port, seconds=0.3)
        assert not error.value.answered


def test_a_call_gives_its_result_or_its_error_and_ends_where_there_is_none():
    helper, release = Helper("test"), threading.Event()
    assert helper.call(lambda: 7, 10) == 7
    with pytest.raises(ZeroDivisionError):
        helper.call(lambda: 1 // 0, 10)
    wait = helper.start(release.wait)
    with pytest.raises(NoAnswer):
        wait(0.1)
    release.set()
    assert wait(10)
