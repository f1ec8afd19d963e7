"""Files that appear whole: written beside their place, then moved into it, all of them or none."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

# Complete files on their way into the folder above; they count as being there already.
PENDING_FOLDER = ".moving"


@contextmanager
def write_whole(folder: str | Path) -> Iterator[Path]:
    """
    Gives a scratch folder; on leaving without an error, its files replace those of the same name in `folder`.

    They appear together: a process that is killed leaves all of the old files or all of the new ones.

        .writing-xyz/a, b   being written; on leaving, synced to the disk
        .moving/a, b        the same folder, renamed: from here on the new files are the ones that count
        a, b                moved one by one; what a killed process left to move, the next one moves

    Readers of files that belong together call [`find_whole`]. One process at a time may write a folder.

    Args:
        folder: Where the files belong; made if it does not exist.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=".writing-", dir=folder))
    try:
        yield scratch
        for path in scratch.iterdir():
            with path.open("rb") as file:
                os.fsync(file.fileno())
        shutil.copymode(folder, scratch)  # whoever may read the folder may read the files that move
        finish_moving(folder)
        scratch.rename(folder / PENDING_FOLDER)
        finish_moving(folder)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def finish_moving(folder: str | Path) -> None:
    """Moves the files into `folder` that a killed [`write_whole`] has left to move; several processes may try."""
    folder = Path(folder)
    with suppress(FileNotFoundError):
        for path in sorted((folder / PENDING_FOLDER).iterdir()):
            with suppress(FileNotFoundError):
                os.replace(path, folder / path.name)
        (folder / PENDING_FOLDER).rmdir()


def find_whole(folder: str | Path, name: str) -> Path:
    """Returns where the newest whole file `name` of `folder` is, or where it would be if there is none."""
    with suppress(OSError):  # a reader may not be allowed to write
        finish_moving(folder)
    pending = Path(folder) / PENDING_FOLDER / name
    return pending if pending.is_file() else Path(folder) / name
