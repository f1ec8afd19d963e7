"""Files that appear whole: written beside their place, then moved into it."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def write_whole(folder: str | Path) -> Iterator[Path]:
    """
    Gives a scratch folder; on leaving without an error, its files replace those of the same name in `folder`.

    Files are synced before they move, so that a crash leaves each file as it was or as it should be.

    Args:
        folder: Where the files belong; made if it does not exist.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=".writing-", dir=folder))
    try:
        yield scratch
        for path in sorted(scratch.iterdir()):
            with path.open("rb") as file:
                os.fsync(file.fileno())
            os.replace(path, folder / path.name)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
