"""Processes that end at a file event, each event in turn, as if they were killed there."""

import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import torch

from modeling.files import write_whole

EVENTS = {"os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.chmod", "os.fsync", "shutil.rmtree"}
KILLED = 9
NUM_LAST = 24


def kill_at_every_event(
    act: Callable[[], None], check: Callable[[], None], *, prepare: Callable[[], None], stride: int = 1
) -> int:
    """
    Runs `act` in a child that ends before its first file event, in another that ends before its second, and so on.

    Args:
        act: What is killed; it must use one thread.
        check: Called after each child, the last of which is not killed; raises if something is wrong.
        prepare: Called before each child.
        stride: Kill at every so many events only, but at each of the last `NUM_LAST`, in which files get their names.

    Returns:
        The number of kills.
    """
    prepare()
    num_events = _run_child(act, None)
    numbers = sorted({*range(0, num_events, stride), *range(max(0, num_events - NUM_LAST), num_events)})
    for number in numbers:
        prepare()
        _run_child(act, number)
        check()
    prepare()
    _run_child(act, None)
    check()
    return len(numbers)


def _run_child(act: Callable[[], None], number: int | None) -> int:
    """Returns the number of events of a child, which ends before the one of `number`, if it has one."""
    reader, writer = os.pipe()
    child = os.fork()
    if not child:
        _act_and_end(act, number, writer)
    os.close(writer)
    with os.fdopen(reader, "rb") as file:
        counted = file.read()
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert code == (0 if number is None else KILLED), f"the child failed before event {number}"
    return int(counted or number)


def _act_and_end(act: Callable[[], None], number: int | None, writer: int) -> None:
    num_events, sync = 0, os.fsync

    def count(event: str, arguments: tuple) -> None:
        nonlocal num_events
        if event in EVENTS or (event == "open" and arguments[2] & (os.O_WRONLY | os.O_RDWR)):
            if num_events == number:
                os._exit(KILLED)
            num_events += 1

    def audited_sync(file: int) -> None:
        sys.audit("os.fsync")
        sync(file)

    code = 1
    try:
        torch.set_num_threads(1)  # a child has none of its parent's threads
        os.fsync = audited_sync
        sys.addaudithook(count)
        act()
        os.write(writer, str(num_events).encode())
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
