"""Atomic writes: files are written beside their place and moved into it, all of them or none. They do not travel."""

import os
import shutil
import stat
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from .adapter_loading import MARK_NAME, PENDING_FOLDER, fcntl, find_pending, find_whole, locked, make_mark, reading

__all__ = ["find_whole", "list_whole", "make_scratch", "move_folder", "reading", "write_text", "write_whole"]

SCRATCH_PREFIX = ".writing-"


@contextmanager
def write_whole(folder: str | Path) -> Iterator[Path]:
    """
    Gives a scratch folder; on leaving without an error, its files replace those of the same name in `folder`.

    They appear together: a process that is killed leaves all of the old files or all of the new ones.

        .writing-xyz/a, b   being written; on leaving, synced to the disk
        .moving/a, b        the same folder, renamed: from here on the new files are the ones that count
        a, b                moved one by one; what a killed process left to move, the next writer moves

    Readers of files that belong together call [`find_whole`] inside [`reading`]. Several processes may write: one
    commits after the other, and the last one's files stay. Permissions are those of any new file.

    Args:
        folder: Where the files belong; made if it does not exist.

    Raises:
        ValueError: As [`find_whole`].
    """
    folder = Path(folder)
    with make_scratch(folder) as scratch:
        yield scratch
        _complete(scratch, scratch)
        with locked(folder):
            _finish_moving(folder)
            shutil.copymode(folder, scratch)  # whoever may read the folder may read the files that move
            os.rename(scratch, folder / PENDING_FOLDER)
            _sync(folder)
            _finish_moving(folder)


@contextmanager
def make_scratch(folder: str | Path) -> Iterator[Path]:
    """Gives a scratch folder in `folder`, and removes it at the end; what killed processes left there goes first."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        with locked(folder):
            _remove_stale(folder)
            scratch = Path(tempfile.mkdtemp(prefix=SCRATCH_PREFIX, dir=folder))
            stack.callback(_remove_scratch, scratch)
            (scratch / MARK_NAME).write_bytes(make_mark(scratch))
            stack.enter_context(locked(scratch / MARK_NAME))  # tells others that its writer lives
        yield scratch


def move_folder(source: str | Path, target: str | Path) -> None:
    """
    Moves a folder out of a scratch folder to `target`, in place of what is there: all of its files or none.

    A process that is killed leaves the old folder, the new one or, for an instant, none.

    Args:
        source: In the folder of [`make_scratch`].
        target: Its new name, in the folder that the scratch folder is in.
    """
    source, target = Path(source), Path(target)
    _complete(source, source.parent)
    if target.exists():
        os.rename(target, source.with_name(f"old-{target.name}"))
    os.rename(source, target)
    _sync(target.parent)


def write_text(path: str | Path, text: str) -> None:
    """
    Writes `text` to `path`, whole: a link stays and its target is replaced; a pipe or a device is written to.

    Args:
        path: The file; its folder is made if it does not exist.
        text: Its new content; what Python took from a name that is no UTF-8 becomes the bytes of the name again.

    Raises:
        ValueError: There is a folder at `path`.
    """
    path = Path(path)
    if path.is_dir():
        raise ValueError(f"`output_file` must be a file, got {path}, which is a folder. Name a file in it.")
    if path.exists() and not _is_replaceable(path):
        with path.open("w", encoding="utf-8", errors="surrogateescape") as file:
            file.write(text)
        return
    path = path.resolve()
    with write_whole(path.parent) as scratch:
        (scratch / path.name).write_text(text, encoding="utf-8", errors="surrogateescape")


def _is_replaceable(path: Path) -> bool:
    is_stream = path.absolute().parts[1:2] in (("dev",), ("proc",))  # /dev/stdout may lead to a file that is open
    return path.is_file() and not is_stream


def list_whole(folder: str | Path) -> list[str]:
    """
    Returns the sorted names of the files in `folder`, those on their way among them; no hidden ones.

    Raises:
        ValueError: As [`find_whole`].
    """
    places = [Path(folder), *filter(None, [find_pending(Path(folder))])]
    return sorted({path.name for place in places for path in place.glob("[!.]*") if path.is_file()})


def remove_stale_scratch(folder: str | Path) -> None:
    """Removes what killed writers of `folder` have left half-written."""
    with suppress(FileNotFoundError), locked(Path(folder)):
        _remove_stale(Path(folder))


def _remove_stale(folder: Path) -> None:
    for scratch in folder.glob(f"{SCRATCH_PREFIX}*"):
        if not fcntl or scratch.is_symlink() or not scratch.is_dir():
            continue
        mark = scratch / MARK_NAME
        is_empty = set(os.listdir(scratch)) <= {MARK_NAME}
        if is_empty or (mark.is_file() and mark.read_bytes() == make_mark(scratch)):
            with suppress(BlockingIOError), locked(mark, is_waiting=False):
                _remove_scratch(scratch)


def _remove_scratch(scratch: Path) -> None:
    """Removes a scratch folder, its mark last: what is left of one that was half removed is known for ours."""
    with suppress(OSError):
        for path in scratch.iterdir():
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path, ignore_errors=True)
            elif path.name != MARK_NAME:
                path.unlink()
        (scratch / MARK_NAME).unlink(missing_ok=True)
        scratch.rmdir()


def _complete(folder: Path, scratch: Path) -> None:
    """Gives all files the permissions of the mark, which are those of any new file, and waits for the disk."""
    mode = stat.S_IMODE((scratch / MARK_NAME).stat().st_mode)  # safetensors writes 0600
    for path in [*folder.rglob("*"), folder]:
        if path.is_dir():
            _sync(path)
        else:
            path.chmod(mode)
            with path.open("r+b") as file:  # Windows syncs only what may be written
                os.fsync(file.fileno())


def _sync(folder: Path) -> None:
    if fcntl:  # Windows opens no folders
        file = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(file)
        finally:
            os.close(file)


def _finish_moving(folder: Path) -> None:
    """Moves the files into `folder` that a killed writer has left to move."""
    pending = find_pending(folder)
    if not pending:
        return
    for path in sorted(pending.iterdir()):
        if path.name != MARK_NAME:
            os.replace(path, folder / path.name)
    _sync(folder)
    (pending / MARK_NAME).unlink(missing_ok=True)
    pending.rmdir()
