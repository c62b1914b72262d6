"""Child interpreters without their start-up: a process that has imported what costs seconds forks one for each command.

Importing torch, Dagster and the rest costs 2 to 5 CPU seconds a process, and hundreds of processes are started by
tests that are not about starting. `python fork_server.py SOCKET` imports once; `ForkServer.run` and `.start` then work
like `subprocess.run` and `subprocess.Popen`, for this environment's own commands and for Python with `-c` or a file.

A child has its own working directory, environment, session and standard streams. What reads the environment while it
is imported (the definitions, commands, everything under `defs/` but `defs/instance/`) is not imported beforehand.
What is about fresh interpreters (boundaries, a command's start, the first demo, killed Dagster daemons) stays with
`subprocess`.
"""

import array
import contextlib
import gc
import importlib
import importlib.metadata
import json
import os
import pkgutil
import random
import runpy
import selectors
import signal
import socket
import subprocess
import sys
import threading
import time
import types
import warnings
from pathlib import Path

_LIBRARIES = (
    "torch",
    "pyarrow.dataset",
    "cv2",
    "av",
    "simplejpeg",
    "qdrant_edge",
    "dagster",
    "dagster_postgres",
    "sqlglot",
    "typer",
    "rich.logging",
    "rich.progress",
    "rich.table",
    "psycopg2",
    "requests",
)
_NOT_BEFOREHAND = ("extraction_dagster.defs", "extraction_dagster.definitions", "extraction_dagster.cli")
_HEADER = 8  # bytes that say how long a request is
_START_SECONDS = 300
_END_SECONDS = 300


def _import_beforehand():
    for name in _LIBRARIES:
        importlib.import_module(name)
    import extraction_dagster

    for found in pkgutil.walk_packages(extraction_dagster.__path__, "extraction_dagster."):
        if not found.name.startswith(_NOT_BEFOREHAND):
            importlib.import_module(found.name)
    importlib.import_module("extraction_dagster.defs.instance.launching")
    early = [
        name
        for name in sys.modules
        if name.startswith(("extraction_dagster.definitions", "extraction_dagster.defs.assets"))
    ]
    assert not early, f"{early} would hold the settings of the server for every command"


class _Server:
    """Forks a child for each request and tells its client how it ended; ends when its last client has gone."""

    def __init__(self, address):
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(address)
        self._selector = selectors.DefaultSelector()
        self._children = {}
        self._num_clients = 0

    def serve(self):
        """Returns in a child alone, with its request."""
        woken, wakes = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        signal.set_wakeup_fd(wakes)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl+C is for the tests; they take this process with them
        self._listener.listen(64)
        self._selector.register(self._listener, selectors.EVENT_READ)
        self._selector.register(woken, selectors.EVENT_READ)
        self._own = [self._listener.fileno(), woken, wakes]
        begun = False
        while self._num_clients or not begun:
            for key, _ in self._selector.select():
                if key.fileobj is self._listener:
                    client, _ = self._listener.accept()
                    self._selector.register(client, selectors.EVENT_READ)
                    self._num_clients += 1
                    begun = True
                elif key.fileobj == woken:
                    with contextlib.suppress(BlockingIOError):
                        os.read(woken, 4096)
                    self._reap()
                elif (request := self._hear(key.fileobj)) is not None:
                    return request
        sys.exit(0)

    def _hear(self, client):
        """A request, in the child that was forked for it; in the server None."""
        try:
            header, fds = _receive_with_descriptors(client)
        except OSError:
            header, fds = b"", []
        if len(header) < _HEADER:
            self._lose(client)
            return None
        request = json.loads(_receive(client, int.from_bytes(header)))
        if "signal" in request:
            self._send_signal(client, request["signal"])
            return None
        for name in request["modules"]:
            importlib.import_module(name)
        gc.freeze()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # the other threads are of libraries at rest
            process = os.fork()
        if process:
            for descriptor in fds:
                os.close(descriptor)
            self._children[process] = client
            client.sendall(f"{process}\n".encode())
            return None
        self._become_a_child(fds)
        return request

    def _become_a_child(self, fds):
        signal.set_wakeup_fd(-1)
        for number in (signal.SIGCHLD, signal.SIGTERM):
            signal.signal(number, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        os.setsid()
        for number, descriptor in enumerate(fds):
            os.dup2(descriptor, number)
            os.close(descriptor)
        for key in list(self._selector.get_map().values()):
            if isinstance(key.fileobj, socket.socket):
                key.fileobj.close()
        self._selector.close()
        for descriptor in self._own[1:]:
            os.close(descriptor)

    def _reap(self):
        while self._children:
            process, status = os.waitpid(-1, os.WNOHANG)
            if not process:
                return
            client = self._children.pop(process)
            with contextlib.suppress(OSError):
                client.sendall(f"{os.waitstatus_to_exitcode(status)}\n".encode())
            self._forget(client)

    def _send_signal(self, client, number):
        for process, owner in self._children.items():
            if owner is client:  # not reaped yet, so the number is still its own
                os.kill(process, number)

    def _lose(self, client):
        """Its process died, or wants nothing more: no child outlives who asked for it."""
        self._send_signal(client, signal.SIGKILL)
        if client not in self._children.values():
            self._forget(client)
        else:
            self._selector.unregister(client)

    def _forget(self, client):
        with contextlib.suppress(KeyError):
            self._selector.unregister(client)
        client.close()
        self._num_clients -= 1


def _receive_with_descriptors(client):
    data, found, _, _ = client.recvmsg(_HEADER, socket.CMSG_SPACE(3 * array.array("i").itemsize))
    fds = array.array("i")
    for _, _, content in found:
        fds.frombytes(content[: len(content) - len(content) % fds.itemsize])
    return data, list(fds)


def _receive(client, number):
    content = b""
    while len(content) < number:
        content += client.recv(number - len(content))
    return content


def _run(request):
    """What a fresh interpreter would do with this command line, here; returns what `sys.exit` is given."""
    program, *arguments = request["arguments"]
    os.chdir(request["cwd"])
    os.environ.clear()
    os.environ.update(request["environment"])
    random.seed()
    # The streams were made for the server's descriptors: same numbers, other files.
    sys.stdin = open(0, closefd=False)
    sys.stdout = open(1, "w", buffering=1 if os.isatty(1) else -1, closefd=False)
    sys.stderr = open(2, "w", buffering=1, errors="backslashreplace", closefd=False)
    sys.modules["__main__"] = main = types.ModuleType("__main__")
    if Path(program).name.startswith("python"):
        if arguments[0] == "-c":
            sys.argv, sys.path[0] = ["-c", *arguments[2:]], ""
            exec(compile(arguments[1], "<string>", "exec"), main.__dict__)
        elif arguments[0] == "-m":
            sys.argv, sys.path[0] = arguments[1:], str(Path.cwd())
            runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
        else:
            sys.argv, sys.path[0] = arguments, str(Path(arguments[0]).parent)
            runpy.run_path(arguments[0], run_name="__main__")
        return 0
    (command,) = importlib.metadata.entry_points(group="console_scripts", name=Path(program).name)
    sys.argv, sys.path[0] = [program, *arguments], str(Path(program).parent)
    return command.load()()


class Child:
    """A forked command, as `subprocess.Popen` shows one."""

    def __init__(self, connection, arguments, pid, stdout, stderr):
        self._connection, self._inbox, self.args, self.pid = connection, b"", arguments, pid
        self.stdout, self.stderr, self.returncode = stdout, stderr, None

    def poll(self):
        """The exit code, or None while it runs."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.wait(0.0001)
        return self.returncode

    def wait(self, timeout=None):
        """Wait until it has ended; its exit code, negative for a signal."""
        if self.returncode is None:
            self._connection.settimeout(timeout)
            try:
                while not self._inbox.endswith(b"\n"):
                    received = self._connection.recv(64)
                    assert received, "the fork server died"
                    self._inbox += received
            except TimeoutError:
                raise subprocess.TimeoutExpired(self.args, timeout) from None
            self.returncode = int(self._inbox)
            self._connection.close()
        return self.returncode

    def send_signal(self, number):
        """Send it a signal, if it has not ended."""
        if self.poll() is None:
            _send(self._connection, {"signal": int(number)})

    def kill(self):
        """End it as the kernel does."""
        self.send_signal(signal.SIGKILL)

    def terminate(self):
        """Ask it to end."""
        self.send_signal(signal.SIGTERM)

    def communicate(self, timeout=None):
        """Everything that it writes, once it has ended."""
        said = {}

        def read(name, stream):
            said[name] = stream.read()
            stream.close()

        streams = {"stdout": self.stdout, "stderr": self.stderr}
        readers = [
            threading.Thread(target=read, args=item, daemon=True) for item in streams.items() if item[1] is not None
        ]
        for reader in readers:
            reader.start()
        self.wait(timeout)
        for reader in readers:
            reader.join(timeout)
        return said.get("stdout"), said.get("stderr")

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for stream in (self.stdout, self.stderr):
            if stream is not None:
                stream.close()
        self.wait()


class ForkServer:
    """A connection to the server of this session, which the first that asks for it starts."""

    def __init__(self, folder):
        """Start it, unless another worker of the session did; `folder` is common to the workers."""
        self._address, self._process = str(folder / "fork-server"), None
        try:
            self._lifeline = self._connect()
        except OSError:
            self._start()

    def _start(self):
        Path(self._address).unlink(missing_ok=True)
        environment = {**os.environ, "OPENBLAS_NUM_THREADS": "1"}
        self._process = subprocess.Popen(
            [sys.executable, __file__, self._address], stdin=subprocess.DEVNULL, env=environment, start_new_session=True
        )
        end = time.monotonic() + _START_SECONDS
        while True:
            with contextlib.suppress(OSError):
                self._lifeline = self._connect()
                return
            assert self._process.poll() is None, "the fork server did not start"
            assert time.monotonic() < end, "the fork server does not answer"
            time.sleep(0.05)

    def _connect(self):
        connection = socket.socket(socket.AF_UNIX)
        try:
            connection.connect(self._address)
        except OSError:
            connection.close()
            raise
        return connection

    def close(self):
        """Let the server end with its last client; who started it waits for that, so that nothing is left behind."""
        self._lifeline.close()
        if self._process is not None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(_END_SECONDS)

    def start(self, arguments, *, cwd=None, env=None, stdout=subprocess.PIPE, stderr=subprocess.PIPE, modules=()):
        """Start a command in a session of its own; text streams as those of `subprocess.Popen(…, text=True)`.

        Args:
            arguments: The command line; the program is a command of this environment, or its Python.
            cwd: Where; the caller's own folder when it is None.
            env: With which environment; the caller's own when it is None.
            stdout: `subprocess.PIPE`, `subprocess.DEVNULL` or a file.
            stderr: The same, or `subprocess.STDOUT`.
            modules: What the server imports before it forks, if no command asked for it yet.
        """
        arguments = [str(argument) for argument in arguments]
        environment = {name: str(value) for name, value in (os.environ if env is None else env).items()}
        environment.setdefault("PWD", str(cwd or Path.cwd()))
        request = {
            "arguments": arguments,
            "cwd": str(cwd or Path.cwd()),
            "environment": environment,
            "modules": modules,
        }
        with contextlib.ExitStack() as theirs:
            no_input = theirs.enter_context(open(os.devnull, "rb"))
            out, read_out = _stream(theirs, stdout)
            err, read_err = (out, None) if stderr == subprocess.STDOUT else _stream(theirs, stderr)
            connection = self._connect()
            _send(connection, request, [no_input.fileno(), out, err])
        connection.settimeout(_START_SECONDS)
        pid = b""
        while not pid.endswith(b"\n"):
            received = connection.recv(1)
            assert received, "the fork server died"
            pid += received
        return Child(connection, arguments, int(pid), read_out, read_err)

    def run(self, arguments, *, timeout=300, check=False, **options):
        """Run a command to its end and return what it wrote, as `subprocess.run(…, capture_output=True, text=True)`."""
        child = self.start(arguments, **options)
        try:
            out, err = child.communicate(timeout)
        except subprocess.TimeoutExpired:
            child.kill()
            raise
        if check and child.returncode:
            raise subprocess.CalledProcessError(child.returncode, child.args, out, err)
        return subprocess.CompletedProcess(child.args, child.returncode, out, err)


def _stream(theirs, wanted):
    """The descriptor that the child gets, and the file that this process reads from, if any."""
    if wanted == subprocess.PIPE:
        reading, writing = os.pipe()
        theirs.callback(os.close, writing)
        return writing, open(reading, encoding="utf-8")
    if wanted == subprocess.DEVNULL:
        return theirs.enter_context(open(os.devnull, "wb")).fileno(), None
    return wanted.fileno(), None


def _send(connection, request, fds=()):
    content = json.dumps(request).encode()
    header = len(content).to_bytes(_HEADER)
    if fds:
        connection.sendmsg([header], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))])
    else:
        connection.sendall(header)
    connection.sendall(content)


if __name__ == "__main__":
    _import_beforehand()
    sys.path.insert(0, str(Path(__file__).parent))
    importlib.import_module("dagster_templates").use_templates(Path(sys.argv[1]).parent)
    _REQUEST = _Server(sys.argv[1]).serve()
    sys.exit(_run(_REQUEST))
