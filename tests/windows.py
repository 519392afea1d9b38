"""What Windows and macOS lack is taken away from Python on Linux: `windows.take_away()` in a process of its own.

Imitated of Windows: no fork, and data workers that are started by spawn (as on macOS); no SIGUSR1 and the like; no
`os.sched_getaffinity`; folders cannot be opened; `os.fsync` needs a descriptor that may write; a file that is open or
mapped into memory, and a folder above it, can be neither renamed nor deleted; `os.rename` replaces nothing; output
that is no console takes the characters of code page 1252 only. Not imitated: paths with drives and backslashes, and
what a library does where it finds `sys.platform == "win32"`.
"""

import errno
import fcntl
import multiprocessing
import os
import re
import shutil
import signal
import sys
from pathlib import Path

SIGNALS = ("SIGUSR1", "SIGUSR2", "SIGHUP", "SIGQUIT", "SIGALRM", "SIGCHLD", "SIGPIPE")
FUNCTIONS = ("sched_getaffinity", "sched_setaffinity", "fork", "forkpty", "killpg", "setsid", "getpgid", "fchmod")


def in_use(path):
    """Whether this process has the file, or any below the folder, open or mapped."""
    path = os.path.realpath(path)
    used = [os.path.realpath(f"/proc/self/fd/{number}") for number in os.listdir("/proc/self/fd")]
    used += [line.split(maxsplit=5)[-1].strip() for line in Path("/proc/self/maps").read_text().splitlines()]
    return any(name == path or name.startswith(path + os.sep) for name in used)


def refusing_files_in_use(function, replaces=True):
    """`os.rename`, `os.unlink` or the like as on Windows. replaces: whether the second path may exist."""

    def on_windows(*paths, **options):
        for path in paths:
            locks = re.search(r"\.lock$|filelock-probe", str(path))  # of filelock, which does without on Windows
            if os.path.lexists(path) and not locks and in_use(path):
                raise PermissionError(errno.EACCES, "used by a process", str(path))
        if not replaces and os.path.lexists(paths[1]):
            raise FileExistsError(errno.EEXIST, "exists", str(paths[1]))
        return function(*paths, **options)

    return on_windows


def take_away():
    for name in SIGNALS:
        delattr(signal, name)
    for name in FUNCTIONS:
        delattr(os, name)
    multiprocessing.set_start_method("spawn")
    open_, fsync = os.open, os.fsync

    def open_file(path, flags, *arguments, **options):
        if not isinstance(path, int) and os.path.isdir(path):
            raise PermissionError(errno.EACCES, "is a folder", str(path))
        return open_(path, flags, *arguments, **options)

    def fsync_file(descriptor):
        number = descriptor if isinstance(descriptor, int) else descriptor.fileno()
        if fcntl.fcntl(number, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY:
            raise OSError(errno.EBADF, "Bad file descriptor")
        return fsync(descriptor)

    os.open, os.fsync = open_file, fsync_file
    os.rename = refusing_files_in_use(os.rename, replaces=False)
    for name in ("replace", "unlink", "remove", "rmdir"):
        setattr(os, name, refusing_files_in_use(getattr(os, name)))
    shutil._use_fd_functions = False  # these open folders
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(encoding="cp1252")
    if torch := sys.modules.get("torch"):  # as torch does on Windows
        torch.utils.data._utils.signal_handling._set_SIGCHLD_handler = lambda: None
