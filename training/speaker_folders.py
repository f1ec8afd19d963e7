"""Folder names of speakers: an id is data and may be anything, a folder's name may not."""

import re
import unicodedata
from collections import Counter
from collections.abc import Sequence

import xxhash

from modeling.adapters import check_adapter_name

MAX_READABLE = 40  # characters of an id that its folder's name keeps
DEVICE = re.compile(r"(con|prn|aux|nul|com\d|lpt\d)", re.IGNORECASE)  # no file may be called so on Windows
DERIVED = re.compile(r".*-[0-9a-f]{16}", re.DOTALL)


def name_folders(speaker_ids: Sequence[str]) -> dict[str, str]:
    """
    Returns the name of each speaker's folder, all different, also where a file system ignores case.

    An id that may name an adapter is its folder's name; of another one the readable part and a digest are.

    Args:
        speaker_ids: Any text.

    Example:

    ```python
    >>> from training.speaker_folders import name_folders

    >>> list(name_folders(["ann", "Anna Maria", "../x"]).values())
    ['ann', 'Anna_Maria-50e9d03c58683042', 'x-ade92630f33b0870']

    ```
    """
    names = {speaker_id: speaker_id if _is_plain(speaker_id) else _derive(speaker_id) for speaker_id in speaker_ids}
    counts = Counter(name.casefold() for name in names.values())
    return {
        speaker_id: _derive(speaker_id) if counts[name.casefold()] > 1 and name != name.casefold() else name
        for speaker_id, name in names.items()
    }


def _is_plain(speaker_id: str) -> bool:
    try:
        check_adapter_name(speaker_id)
    except ValueError:
        return False
    if speaker_id.startswith("-") or DEVICE.fullmatch(speaker_id) or DERIVED.fullmatch(speaker_id):
        return False
    return unicodedata.is_normalized("NFC", speaker_id)  # a file system may compose what it is given


def _derive(speaker_id: str) -> str:
    decomposed = unicodedata.normalize("NFKD", speaker_id).encode("ascii", "ignore").decode()
    readable = re.sub(r"\W+", "_", decomposed).strip("_")[:MAX_READABLE] or "speaker"
    return f"{readable}-{xxhash.xxh3_64_hexdigest(speaker_id.encode('utf-8', 'surrogatepass'))}"
