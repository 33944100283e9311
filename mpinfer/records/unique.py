"""Whether names are unique, of more names than would fit into memory."""

from array import array


class Names:
    """64 bits of each name: those that share them with another are few, and looked at again."""

    def __init__(self) -> None:
        self._hashes = array("q")

    def add(self, name: object) -> None:
        self._hashes.append(hash(name))

    def suspects(self) -> list[int]:
        """Numbers of the names, from 0, that another may equal; all those that another does."""
        import numpy as np

        hashes = np.frombuffer(self._hashes, np.int64)
        ordered = np.sort(hashes)
        shared = ordered[1:][ordered[1:] == ordered[:-1]]
        found: list[int] = np.flatnonzero(np.isin(hashes, shared)).tolist() if shared.size else []
        return found
