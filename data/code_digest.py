"""The version of a cached result: a digest of the code that computes it.

`datasets.map` finds a cached result by the name of a function that can be imported, not by what it does: after a
change of its code the old result would come back without a word.
"""

import ast
import sys
from collections.abc import Callable
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec, resolve_name
from pathlib import Path

import xxhash
from datasets import Dataset

PACKAGES = ("data", "modeling")  # whose modules are followed; of other packages the version counts


def digest_code(*objects: object) -> str:
    """
    Returns 32 hexadecimal digits over the source of the modules that define `objects` and of those that they import.

    Args:
        objects: Functions, classes or instances.

    Example:
        >>> digest_code(digest_code) == digest_code(digest_code), len(digest_code(digest_code))
        (True, 32)
    """
    return _digest_modules(tuple(sorted({thing.__module__ for thing in objects})))


@cache
def _digest_modules(names: tuple[str, ...]) -> str:
    digest, pending, seen = xxhash.xxh3_128(), list(names), set(names)
    while pending:
        name = pending.pop()
        source = _read_source(name) if name in names or _is_own(name) else _read_version(name)
        digest.update(f"{name} {len(source)} ".encode() + source)
        new = sorted(_find_imports(name, source) - seen) if _is_own(name) else []
        pending += new
        seen.update(new)
    return digest.hexdigest()


def _is_own(name: str) -> bool:
    return name.split(".")[0] in PACKAGES


def _read_source(name: str) -> bytes:
    spec = None if name == "__main__" else find_spec(name)
    file = getattr(sys.modules.get(name), "__file__", None) or (spec.origin if spec and spec.has_location else None)
    return Path(file).read_bytes() if file else _read_version(name)  # no file: the interpreter's own, or typed in


def _read_version(name: str) -> bytes:
    package = name.split(".")[0]
    installed = getattr(sys.modules.get(package), "__version__", None)
    try:
        return str(installed or version(package)).encode()
    except PackageNotFoundError:  # of the standard library
        return b""


def _find_imports(name: str, source: bytes) -> set[str]:
    """Returns the modules that a module imports anywhere in its text; packages of others by their first name."""
    package = name.rpartition(".")[0]
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            module = resolve_name("." * node.level + (node.module or ""), package) if node.level else node.module
            names |= {module, *(f"{module}.{alias.name}" for alias in node.names)}
    own = {name for name in names if _is_own(name) and _is_module(name)}
    return own | {name.split(".")[0] for name in names if not _is_own(name)}


def _is_module(name: str) -> bool:
    try:
        return find_spec(name) is not None
    except ModuleNotFoundError:  # a class or a function of a module
        return False


def map_versioned(table: Dataset, function: Callable[..., dict], *, fn_kwargs: dict, **options) -> Dataset:
    """
    Returns `table.map(function)`; a result is found in the cache as long as the function's code is the same.

    Args:
        table: The rows.
        function: As for `Dataset.map`; of a module.
        fn_kwargs: Its keyword arguments.
        options: Of `Dataset.map`.
    """
    code = digest_code(function)
    return table.map(_call, fn_kwargs={"function": function, "code": code, "arguments": fn_kwargs}, **options)


def _call(*inputs, function: Callable[..., dict], code: str, arguments: dict) -> dict:
    del code  # part of the cache's key alone
    return function(*inputs, **arguments)
