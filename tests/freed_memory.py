"""glibc gives freed memory of more than 32 MB back to the system, which clears every page of it again in the next step
on a CPU. With these environment variables it keeps it; other C libraries ignore them."""

KEEP_FREED_MEMORY = {"MALLOC_MMAP_THRESHOLD_": str(2**30), "MALLOC_TRIM_THRESHOLD_": str(2**31 - 1)}
