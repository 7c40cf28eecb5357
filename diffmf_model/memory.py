"""How freed memory is kept."""

import ctypes
import sys

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # of glibc's malloc.h


def keep_freed_memory() -> None:
    """Lets this process keep the memory it frees, where the C library is glibc; does nothing elsewhere.

    glibc returns each large tensor to the system, which clears the pages of the next one anew: a third of the time of
    fusing on a CPU. The environment's `MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=-1` do the same for any program.
    """
    if not sys.platform.startswith("linux"):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # musl has none
    if mallopt is not None:
        mallopt(M_MMAP_MAX, 0)  # large blocks come from the heap
        mallopt(M_TRIM_THRESHOLD, -1)  # whose end is never given back
