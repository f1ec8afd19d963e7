"""Atomic writes: files are written beside their place and moved into it, all of them or none."""

import os
import shutil
import stat
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows: nothing is locked there
    fcntl = None

# Complete files on their way into the folder above; they count as being there already.
PENDING_FOLDER = ".moving"
SCRATCH_PREFIX = ".writing-"
# Holds the inode of the folder that it is in: whatever else has such a name, our writer did not leave it here.
MARK_NAME = ".journal"


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
        with _locked(folder):
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
        with _locked(folder):
            _remove_stale(folder)
            scratch = Path(tempfile.mkdtemp(prefix=SCRATCH_PREFIX, dir=folder))
            stack.callback(_remove_scratch, scratch)
            (scratch / MARK_NAME).write_bytes(_mark(scratch))
            stack.enter_context(_locked(scratch / MARK_NAME))  # tells others that its writer lives
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


@contextmanager
def reading(folder: str | Path) -> Iterator[None]:
    """Keeps other processes from committing files to `folder` meanwhile, where the file system has locks."""
    with _locked(Path(folder), is_shared=True):
        yield


def find_whole(folder: str | Path, name: str) -> Path:
    """
    Returns where the newest whole file `name` of `folder` is, or where it would be if there is none; moves nothing.

    Raises:
        ValueError: `folder` has files on their way that [`write_whole`] did not leave there, such as a link.
    """
    pending = _find_pending(Path(folder))
    return pending / name if pending and (pending / name).exists() else Path(folder) / name


def list_whole(folder: str | Path) -> list[str]:
    """
    Returns the sorted names of the files in `folder`, those on their way among them; no hidden ones.

    Raises:
        ValueError: As [`find_whole`].
    """
    places = [Path(folder), *filter(None, [_find_pending(Path(folder))])]
    return sorted({path.name for place in places for path in place.glob("[!.]*") if path.is_file()})


def remove_stale_scratch(folder: str | Path) -> None:
    """Removes what killed writers of `folder` have left half-written."""
    with suppress(FileNotFoundError), _locked(Path(folder)):
        _remove_stale(Path(folder))


def _find_pending(folder: Path) -> Path | None:
    pending = folder / PENDING_FOLDER
    try:
        is_ours = _is_ours(pending)
    except (FileNotFoundError, NotADirectoryError):  # there is nothing, or somebody has just finished
        return None
    if not is_ours:
        raise ValueError(
            f"`folder` must not hold {PENDING_FOLDER}, which no writer of this machine left there, got {pending}. "
            "Remove it, or move its files where they belong."
        )
    return pending


def _is_ours(folder: Path) -> bool:
    """Whether a writer has made this very folder: a copy, a link or a download has another inode than its mark."""
    status = os.lstat(folder)
    if not stat.S_ISDIR(status.st_mode):
        return False
    names = os.listdir(folder)
    if not names:  # made and not yet marked, or all moved
        return True
    is_marked = MARK_NAME in names and all(stat.S_ISREG(os.lstat(folder / name).st_mode) for name in names)
    return is_marked and (folder / MARK_NAME).read_bytes() == _mark(folder)


def _mark(folder: Path) -> bytes:
    return f"{os.lstat(folder).st_ino}\n".encode()


def _remove_stale(folder: Path) -> None:
    for scratch in folder.glob(f"{SCRATCH_PREFIX}*"):
        if not fcntl or scratch.is_symlink() or not scratch.is_dir():
            continue
        mark = scratch / MARK_NAME
        is_empty = set(os.listdir(scratch)) <= {MARK_NAME}
        if is_empty or (mark.is_file() and mark.read_bytes() == _mark(scratch)):
            with suppress(BlockingIOError), _locked(mark, is_waiting=False):
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
    pending = _find_pending(folder)
    if not pending:
        return
    for path in sorted(pending.iterdir()):
        if path.name != MARK_NAME:
            os.replace(path, folder / path.name)
    _sync(folder)
    (pending / MARK_NAME).unlink(missing_ok=True)
    pending.rmdir()


@contextmanager
def _locked(path: Path, *, is_shared: bool = False, is_waiting: bool = True) -> Iterator[None]:
    """
    Locks a file or a folder against others for as long as this process lives; leaves no file.

    It goes on without where there is nothing to lock, or the file system has no locks.

    Raises:
        BlockingIOError: Another has the lock, and `is_waiting` is false.
    """
    with ExitStack() as stack:
        try:
            if fcntl:
                file = os.open(path, os.O_RDONLY)
                stack.callback(os.close, file)
                kind = fcntl.LOCK_SH if is_shared else fcntl.LOCK_EX
                fcntl.flock(file, kind if is_waiting else kind | fcntl.LOCK_NB)
        except BlockingIOError:
            raise
        except OSError:
            pass
        yield
