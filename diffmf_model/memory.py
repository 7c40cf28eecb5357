"""How freed memory is kept."""

import ctypes
import os
import sys

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # of glibc's malloc.h


def keep_freed_memory() -> None:
    """Lets this process keep the memory it frees, in large pages; to be called before PyTorch is imported.

    glibc returns each large tensor to the system, which clears the pages of the next one anew: a third of the time of
    fusing on a CPU. With other C libraries only the large pages are asked for. The environment does the same for any
    program: `MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=-1 THP_MEM_ALLOC_ENABLE=1`.
    """
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # read at PyTorch's first allocation
    if not sys.platform.startswith("linux"):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # musl has none
    if mallopt is not None:
        mallopt(M_MMAP_MAX, 0)  # large blocks come from the heap
        mallopt(M_TRIM_THRESHOLD, -1)  # whose end is never given back
