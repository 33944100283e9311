"""The user's own functions, by name."""

import importlib
import sys
from pathlib import Path
from typing import Any

from mpinfer.errors import MpinferError


def load_object(path: str, key: str, error: type[MpinferError]) -> Any:
    """What `package.module:name` names; the working directory counts as a place of packages.

    Raises `error`, which tells the job-file `key`.
    """
    module_name, colon, name = path.partition(":")
    if not colon or not module_name or not name:
        raise error(f"{key}={path}: is not of the form package.module:name; correct it")
    if str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    try:
        found = importlib.import_module(module_name)
    except Exception as problem:
        raise error(
            f"{key}={path}: module {module_name!r} cannot be imported ({one_line(problem)}); install it, or "
            f"start from the directory that has it"
        ) from problem
    for part in name.split("."):
        if not hasattr(found, part):
            names = [
                n for n, value in getattr(found, "__dict__", {}).items() if callable(value) and not n.startswith("_")
            ][:5]
            raise error(f"{key}={path}: {module_name} has no {name!r}; it has {', '.join(names) or 'nothing callable'}")
        found = getattr(found, part)
    return found


def one_line(error: Exception) -> str:
    """Type and text of an exception of the user's code, which may have many lines."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"
