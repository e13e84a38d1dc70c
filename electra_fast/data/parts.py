"""The token ids of one or several arrays end to end; each may be a memory-mapped file."""

import ctypes
import mmap
from collections.abc import Sequence

import numpy as np

RANDOM, WILLNEED = 1, 3  # of madvise, on Linux and macOS


def runs(begin: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Return ``begin[i], begin[i] + 1, …``, `lengths[i]` numbers, for each i end to end."""
    before = lengths.cumsum() - lengths
    return np.arange(lengths.sum()) + (begin - before).repeat(lengths)


class Parts:
    """Arrays of token ids as if they were one; a document is in one of them as a whole."""

    def __init__(self, arrays: Sequence[np.ndarray]):
        self.arrays = arrays
        self.bounds = np.cumsum([0, *map(len, arrays)])
        self._addresses = np.array([array.ctypes.data for array in arrays])
        # PyDLL keeps Python's lock: to get it back, each call could wait for the thread that trains.
        self._madvise = getattr(ctypes.PyDLL(None), "madvise", None)

    def __len__(self) -> int:
        return int(self.bounds[-1])

    def _part_of(self, positions: np.ndarray) -> np.ndarray:
        return np.searchsorted(self.bounds, positions, side="right") - 1

    def take(self, rows: np.ndarray) -> np.ndarray:
        """Return the ids, int64, at positions ``[N, L]``.

        All positions of a row are in the array of the first; those outside are moved to its end.
        """
        part = self._part_of(rows[:, 0])
        found = np.empty(rows.shape, np.int64)
        for p in np.flatnonzero(np.bincount(part)):
            here = part == p
            found[here] = self.arrays[p].take(rows[here] - self.bounds[p], mode="clip")
        return found

    def take_runs(self, begin: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        """Return the ids, int64 ``[T]``, of documents end to end: ``lengths[i]`` ids from ``begin[i]`` on."""
        part = self._part_of(begin)
        found = [np.zeros(0, np.int64)]
        for here in np.split(np.arange(len(part)), np.flatnonzero(np.diff(part)) + 1):
            p = part[here[0]]
            found.append(self.arrays[p].take(runs(begin[here] - self.bounds[p], lengths[here]), mode="clip"))
        return np.concatenate(found)

    def announce(self, start: np.ndarray, lengths: np.ndarray) -> None:
        """Let the operating system read the ids from `start` on, ``lengths`` of them each, from a slow disk.

        It reads in the background. A row that is in the memory already costs two microseconds.
        """
        part, size = self._part_of(start), self.arrays[0].itemsize
        begins = self._addresses[part] + (start - self.bounds[part]) * size
        self._advise(begins, lengths * size, WILLNEED)

    def read_only_announced(self) -> None:
        """Let the operating system read only the pages that are needed, instead of megabytes around each.

        This is for ids that do not fit into the memory.
        """
        self._advise(self._addresses, np.array([array.nbytes for array in self.arrays]), RANDOM)

    def _advise(self, begins: np.ndarray, sizes: np.ndarray, advice: int) -> None:
        if self._madvise is None:
            return
        pages = begins & -mmap.PAGESIZE
        for page, size in zip(pages.tolist(), (begins + sizes - pages).tolist(), strict=True):
            self._madvise(ctypes.c_void_p(page), ctypes.c_size_t(size), advice)
