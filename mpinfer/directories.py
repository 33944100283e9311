"""Where things are kept between runs."""

import os
from collections.abc import Mapping
from pathlib import Path


def cache_directory(environ: Mapping[str, str] = os.environ) -> Path:
    """This user's, below `XDG_CACHE_HOME` or `~/.cache`; relative where there is no home directory."""
    given = environ.get("XDG_CACHE_HOME", "")  # says nothing if it is relative
    home = given if os.path.isabs(given) else os.path.expanduser("~/.cache")
    return Path(home, "mpinfer")
