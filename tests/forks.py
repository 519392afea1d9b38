"""Fresh processes without seconds of imports: a server that has run the scripts' imports forks one for each run.

    process = forks.Popen(["train_text_to_image.py", "--help"], stderr=file)

It runs as `python train_text_to_image.py --help` does, as `__main__` and to the interpreter's own end. What differs: a
library that reads an environment variable when it is imported has read it when the server started.
"""

import array
import ast
import gc
import json
import os
import pathlib
import select
import signal
import socket
import subprocess
import sys
import tempfile
import termios
import threading
import tty

ROOT = pathlib.Path(__file__).resolve().parents[1]
IMPORTS = (ast.Import, ast.ImportFrom)
servers = {}
one_at_a_time = threading.Lock()


def start_server(flax):
    """Start a server with JAX or PyTorch. Returns the socket for requests; the server ends when it is closed."""
    own, other = socket.socketpair()
    scripts = [path for path in sorted(ROOT.glob("train_*.py")) if path.stem.endswith("_flax") == flax]
    command = [sys.executable, __file__, str(other.fileno()), *map(str, scripts)]
    subprocess.Popen(command, pass_fds=[other.fileno()], stderr=subprocess.DEVNULL)
    other.close()
    return own


class Terminal:
    """A pseudo-terminal for the stderr of processes, where scripts show their bars; copied to the file `path`.

    with Terminal(path) as terminal:
        process = Popen(words, terminal)
    """

    def __init__(self, path):
        self.reader, self.writer = os.openpty()
        termios.tcsetwinsize(self.writer, (50, 200))  # else there is no room for a bar
        tty.setraw(self.writer)  # else it turns "\n" into "\r\n"
        self.file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        self.lock, self.ended = threading.Lock(), False

    def fileno(self):
        return self.writer

    def __enter__(self):
        return self

    def __exit__(self, *_):
        os.close(self.writer)  # the processes have theirs
        threading.Thread(target=self._copy_until_they_end, daemon=True).start()

    def copy(self):
        """Copy what has been written up to now."""
        with self.lock:
            while not self.ended and select.select([self.reader], [], [], 0)[0]:
                try:
                    os.write(self.file, os.read(self.reader, 65536))
                except OSError:  # nothing writes to it any more
                    self.ended = True

    def _copy_until_they_end(self):
        while not self.ended:
            select.select([self.reader], [], [])
            self.copy()
        os.close(self.reader)
        os.close(self.file)


class Popen:
    """As `subprocess.Popen` of Python with these words, in a session of its own. Files: stderr, and maybe stdout."""

    def __init__(self, words, stderr, stdout=None, env=None):
        words = [str(word) for word in words]
        environment = dict(os.environ if env is None else env)
        flax = "JAX_PROCESS_ID" in environment or any("_flax" in word for word in words)
        request = json.dumps([words, environment, os.getcwd()]).encode()
        files = [file.fileno() for file in (stderr, stdout) if file]
        self.args, self.returncode = words, None
        self.status, status = os.pipe()
        with one_at_a_time:
            if flax not in servers:
                servers[flax] = start_server(flax)
            size = array.array("Q", [len(request)]).tobytes()
            socket.send_fds(servers[flax], [size], [status, *files])
            servers[flax].sendall(request)
        os.close(status)
        self.pid = int(os.read(self.status, 20))

    def poll(self):
        return self._end(0)

    def wait(self, timeout=None):
        if self._end(timeout) is None:
            raise subprocess.TimeoutExpired(self.args, timeout)
        return self.returncode

    def _end(self, timeout):
        if self.returncode is None and select.select([self.status], [], [], timeout)[0]:
            self.returncode = os.waitstatus_to_exitcode(int(os.read(self.status, 20)))
            os.close(self.status)
        return self.returncode

    def send_signal(self, signum):
        if self.poll() is None:
            os.kill(self.pid, signum)

    def kill(self):
        self.send_signal(signal.SIGKILL)


def run(words, env=None, timeout=300):
    """As `subprocess.run`, with stdout and stderr as text."""
    with tempfile.TemporaryFile() as stdout, tempfile.TemporaryFile() as stderr:
        process = Popen(words, stderr, stdout, env)
        try:
            process.wait(timeout)
        finally:
            process.kill()
        texts = []
        for file in (stdout, stderr):
            file.seek(0)
            texts.append(file.read().decode(errors="replace"))
    return subprocess.CompletedProcess(process.args, process.returncode, *texts)


def serve(connection):
    """Fork for each request; returns the words of the command in the new process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # of a terminal: pytest ends, and then its servers
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for those that wait
    while True:
        size, files, *_ = socket.recv_fds(connection, 8, 3)
        if not size:  # pytest has ended
            sys.exit()
        request = connection.recv(array.array("Q", size)[0], socket.MSG_WAITALL)
        if os.fork() == 0:
            break
        for file in files:
            os.close(file)
    connection.close()
    status, *files = files
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    if pid := os.fork():  # this one only waits
        os.write(status, b"%-20d" % pid)
        os.write(status, b"%-20d" % os.waitpid(pid, 0)[1])
        os._exit(0)
    os.close(status)
    os.setsid()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for number, file in zip((2, 1), [*files, os.open(os.devnull, os.O_WRONLY)], strict=False):
        os.dup2(file, number)
        os.close(file)
    words, environment, folder = json.loads(request)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    return words


if __name__ == "__main__":
    import runpy

    sys.path.pop(0)
    for path in sys.argv[2:]:
        imports = [node for node in ast.parse(pathlib.Path(path).read_text()).body if isinstance(node, IMPORTS)]
        exec(compile(ast.Module(imports, []), path, "exec"), {})
    import tensorboardX  # noqa: F401  JAX's script imports these two where it needs them
    from transformers import CLIPTokenizer  # noqa: F401

    gc.freeze()  # a collection would copy all pages that the processes share
    sys.argv = serve(socket.socket(fileno=int(sys.argv[1])))
    sys.path[:0] = [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]
    if sys.argv[0] == "-c":
        code = sys.argv.pop(1)
        sys.path.insert(0, "")
        exec(compile(code, "<string>", "exec"), {"__name__": "__main__"})
    else:
        sys.path.insert(0, os.path.dirname(os.path.abspath(sys.argv[0])))
        runpy.run_path(sys.argv[0], run_name="__main__")
