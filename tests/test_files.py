"""Files appear whole, or not at all."""

import os
import shutil
import stat
import threading
from pathlib import Path

import pytest
from kills import kill_at_every_event, leave_pending

from modeling.files import MARK_NAME, PENDING_FOLDER, find_whole, list_whole, reading, write_text, write_whole

NAMES = ("config", "weights")
NEW = dict.fromkeys(NAMES, b"new")


def write_both(folder: Path, text: str) -> None:
    with write_whole(folder) as scratch:
        for name in NAMES:
            (scratch / name).write_text(text)


def read_both(folder: Path) -> list[str]:
    with reading(folder):
        return [find_whole(folder, name).read_text() for name in NAMES]


def test_files_replace_those_of_the_same_name_and_leave_others(tmp_path):
    (tmp_path / "kept").write_text("old")
    (tmp_path / "replaced").write_text("old")
    with write_whole(tmp_path) as scratch:
        (scratch / "replaced").write_text("new")
        (scratch / "added").write_text("new")
        assert (tmp_path / "replaced").read_text() == "old"

    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {
        "kept": "old",
        "replaced": "new",
        "added": "new",
    }


def test_an_error_leaves_the_folder_as_it_was(tmp_path):
    (tmp_path / "replaced").write_text("old")

    def fail_half_way() -> None:
        with write_whole(tmp_path) as scratch:
            (scratch / "replaced").write_text("new")
            raise RuntimeError("half way")

    with pytest.raises(RuntimeError, match="half way"):
        fail_half_way()

    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("replaced", "old")]


def test_a_folder_that_does_not_exist_is_made(tmp_path):
    with write_whole(tmp_path / "a" / "b") as scratch:
        (scratch / "file").write_bytes(b"\0" * 10)
    assert (tmp_path / "a" / "b" / "file").stat().st_size == 10


@pytest.mark.parametrize("umask", [0o022, 0o027, 0o077])
def test_files_have_the_permissions_of_any_new_file(tmp_path, umask):
    before = os.umask(umask)
    try:
        with write_whole(tmp_path) as scratch:
            (scratch / "secretive").touch(mode=0o600)  # as safetensors writes
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "secretive").stat().st_mode) == 0o666 & ~umask


def test_a_write_inside_a_write_is_part_of_it(tmp_path):
    with write_whole(tmp_path) as scratch:
        write_both(scratch, "new")
        assert not (tmp_path / "config").exists()
    assert sorted(os.listdir(tmp_path)) == ["config", "weights"]


def test_a_writer_killed_at_any_event_leaves_all_old_or_all_new_files(tmp_path, monkeypatch):
    monkeypatch.setattr("os.fsync", lambda _file: None)  # an event all the same
    folder, seen = tmp_path / "folder", []

    def prepare() -> None:
        shutil.rmtree(folder, ignore_errors=True)
        write_both(folder, "old")

    def check() -> None:
        found = read_both(folder)
        assert found in (["old", "old"], ["new", "new"])
        with write_whole(folder) as scratch:
            (scratch / "card").write_text("next")
        assert sorted(os.listdir(folder)) == ["card", *NAMES]  # nothing that was half-written is left
        assert read_both(folder) == found
        seen.append(found[0])

    kill_at_every_event(lambda: write_both(folder, "new"), check, prepare=prepare)

    assert seen == sorted(seen, reverse=True)  # first the kills that leave the old files
    assert seen.count("old") > 10
    assert seen.count("new") > 5


def test_files_are_on_the_disk_before_they_count_and_so_is_the_folder_after(tmp_path, monkeypatch):
    write_both(tmp_path, "old")
    synced, events = set(), []
    sync, rename = os.fsync, os.rename

    def note_sync(file: int) -> None:
        sync(file)
        synced.add(os.fstat(file).st_ino)
        events.append("sync")

    def note_rename(source, target) -> None:
        assert {path.stat().st_ino for path in (source, *source.iterdir())} <= synced
        rename(source, target)
        synced.clear()
        events.append("rename")

    monkeypatch.setattr("os.fsync", note_sync)
    monkeypatch.setattr("os.rename", note_rename)
    write_both(tmp_path, "new")

    assert events[-3:] == ["rename", "sync", "sync"]
    assert synced == {tmp_path.stat().st_ino}


@pytest.mark.parametrize("num_moved", [0, 1])
def test_what_a_killed_writer_left_is_read_and_not_moved(tmp_path, num_moved):
    write_both(tmp_path, "old")
    leave_pending(tmp_path, NEW, num_moved=num_moved)
    before = sorted(path.relative_to(tmp_path) for path in tmp_path.rglob("*"))

    assert read_both(tmp_path) == ["new", "new"]
    assert list_whole(tmp_path) == list(NAMES)
    assert find_whole(tmp_path, "absent") == tmp_path / "absent"
    assert sorted(path.relative_to(tmp_path) for path in tmp_path.rglob("*")) == before
    assert Path(PENDING_FOLDER, "weights") in before


def test_what_a_killed_writer_left_comes_before_what_is_written_next(tmp_path):
    write_both(tmp_path, "old")
    leave_pending(tmp_path, NEW)
    with write_whole(tmp_path) as scratch:
        (scratch / "weights").write_text("last")
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"config": "new", "weights": "last"}


def link_to_others(pending: Path, others: Path) -> None:
    pending.symlink_to(others)


def copy_marked(pending: Path, others: Path) -> None:
    shutil.copytree(others, pending)
    (pending / MARK_NAME).write_text(f"{others.stat().st_ino}\n")


def mark_with_a_link(pending: Path, others: Path) -> None:
    pending.mkdir()
    (pending / "weights").symlink_to(others / "weights")
    (pending / MARK_NAME).write_text(f"{pending.stat().st_ino}\n")


def write_a_file(pending: Path, others: Path) -> None:
    shutil.copy(others / "weights", pending)


@pytest.mark.parametrize("arrive", [link_to_others, copy_marked, mark_with_a_link, write_a_file, shutil.copytree])
def test_what_no_writer_left_here_is_refused_and_stays(tmp_path, arrive):
    folder, others = tmp_path / "folder", tmp_path / "others"
    write_both(folder, "mine")
    write_both(others, "precious")
    arrive(*((others, folder / PENDING_FOLDER) if arrive is shutil.copytree else (folder / PENDING_FOLDER, others)))
    before = sorted(tmp_path.rglob("*"))

    message = r"`folder` must not hold .moving, which no writer of this machine left there, got .*Remove it"
    for act in (lambda: read_both(folder), lambda: list_whole(folder), lambda: write_both(folder, "new")):
        with pytest.raises(ValueError, match=message):
            act()

    assert sorted(tmp_path.rglob("*")) == before
    assert [(folder / name).read_text() for name in NAMES] == ["mine", "mine"]
    assert [(others / name).read_text() for name in NAMES] == ["precious", "precious"]


def test_scratch_of_living_writers_and_folders_of_others_are_left_alone(tmp_path):
    (tmp_path / ".writing-notes").mkdir()
    (tmp_path / ".writing-notes" / "precious").write_text("mine")
    (tmp_path / ".writing-linked").symlink_to(tmp_path / ".writing-notes")
    with write_whole(tmp_path) as living:
        (living / "config").write_text("new")
        write_both(tmp_path, "other")
        assert (living / "config").read_text() == "new"
    assert read_both(tmp_path) == ["new", "other"]
    assert (tmp_path / ".writing-linked" / "precious").read_text() == "mine"


def write_often(folder: Path, name: str) -> int:
    """Returns a child that writes both files 40 times."""
    child = os.fork()
    if not child:
        code = 1
        try:
            for number in range(40):
                write_both(folder, f"{name}{number}")
            code = 0
        finally:
            os._exit(code)
    return child


def test_two_writers_of_one_folder_both_succeed_and_never_mix(tmp_path, monkeypatch):
    monkeypatch.setattr("os.fsync", lambda _file: None)
    write_both(tmp_path, "old")
    children, codes = {write_often(tmp_path, name) for name in "ab"}, []
    while children:
        config, weights = read_both(tmp_path)
        assert config == weights
        for child in list(children):
            finished, status = os.waitpid(child, os.WNOHANG)
            if finished:
                children.remove(child)
                codes.append(status)
    assert codes == [0, 0]
    assert read_both(tmp_path) in (["a39", "a39"], ["b39", "b39"])
    assert sorted(os.listdir(tmp_path)) == list(NAMES)


def test_text_goes_through_a_link_to_its_target(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "old").write_text("old")
    (tmp_path / "link").symlink_to("elsewhere/old")
    (tmp_path / "broken").symlink_to("elsewhere/new")

    write_text(tmp_path / "link", "one\n")
    write_text(tmp_path / "broken", "two\n")

    assert [(tmp_path / name).is_symlink() for name in ("link", "broken")] == [True, True]
    assert (tmp_path / "elsewhere" / "old").read_text() == "one\n"
    assert (tmp_path / "elsewhere" / "new").read_text() == "two\n"
    assert len(os.listdir(tmp_path / "elsewhere")) == 2


def test_text_goes_into_a_pipe_and_leaves_it(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    read = []
    reader = threading.Thread(target=lambda: read.append((tmp_path / "pipe").read_text()))
    reader.start()
    write_text(tmp_path / "pipe", "said\n")
    reader.join()
    assert read == ["said\n"]
    assert stat.S_ISFIFO((tmp_path / "pipe").stat().st_mode)


def test_text_goes_to_a_device_and_leaves_it(tmp_path):
    (tmp_path / "null").symlink_to("/dev/null")
    for path in ("/dev/null", tmp_path / "null"):
        write_text(path, "said\n")
    assert stat.S_ISCHR(os.stat("/dev/null").st_mode)
    assert (tmp_path / "null").is_symlink()


def test_text_is_not_written_in_place_of_a_folder(tmp_path):
    with pytest.raises(ValueError, match="`output_file` must be a file, got .*, which is a folder. Name a file in it"):
        write_text(tmp_path, "said")
