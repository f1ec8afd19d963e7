"""Processes that end at a file event, each event in turn, as if they were killed there."""

import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import torch

from modeling.files import write_whole

EVENTS = {"os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.chmod", "os.fsync", "shutil.rmtree"}
KILLED = 9


def kill_at_every_event(act: Callable[[], None], check: Callable[[], None], *, prepare: Callable[[], None]) -> int:
    """
    Runs `act` in a child that ends before its first file event, in another that ends before its second, and so on.

    Args:
        act: What is killed; it must use one thread.
        check: Called after each child, the one that was not killed among them; raises if something is wrong.
        prepare: Called before each child.

    Returns:
        The number of kills.
    """
    number = 0
    while True:
        prepare()
        child = os.fork()
        if not child:
            _run_child(act, number)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        assert code in (0, KILLED), f"the child failed at event {number}"
        check()
        if code == 0:
            return number
        number += 1


def _run_child(act: Callable[[], None], number: int) -> None:
    num_left, sync = number, os.fsync

    def count(event: str, arguments: tuple) -> None:
        nonlocal num_left
        if event in EVENTS or (event == "open" and arguments[2] & (os.O_WRONLY | os.O_RDWR)):
            num_left -= 1
            if num_left < 0:
                os._exit(KILLED)

    def audited_sync(file: int) -> None:
        sys.audit("os.fsync")
        sync(file)

    code = 1
    try:
        torch.set_num_threads(1)  # a child has none of its parent's threads
        os.fsync = audited_sync
        sys.addaudithook(count)
        act()
        code = 0
    finally:
        os._exit(code)


def leave_pending(folder: Path, files: Mapping[str, bytes], *, num_moved: int = 0) -> None:
    """Leaves what a writer of `files` leaves that is killed after the commit, with some of them in their places."""
    moved = 0

    def replace(source: Path, target: Path) -> None:
        nonlocal moved
        if moved == num_moved:
            os._exit(KILLED)
        moved += 1
        os.rename(source, target)

    child = os.fork()
    if not child:
        try:
            os.replace = replace
            with write_whole(folder) as scratch:
                for name, content in files.items():
                    (scratch / name).write_bytes(content)
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == KILLED
