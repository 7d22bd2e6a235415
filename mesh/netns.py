"""Network namespaces by file descriptor, and the only `setns` in the project.

`with inside(fd):` runs a *synchronous* block in another namespace and costs about six
microseconds. Never await inside: another task would run in the wrong namespace.
A socket keeps its namespace for life, so only its creation has to happen inside.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import os
import threading

from mesh.errors import KernelError

CLONE_NEWNS = 0x00020000
CLONE_NEWNET = 0x40000000
NS_GET_NSTYPE = 0xB703
SIOCGSKNS = 0x894C
EX_SOFTWARE = 70

_libc = ctypes.CDLL(None, use_errno=True)
_home = threading.local()


def _check(result: int, what: str) -> None:
    if result < 0:
        number = ctypes.get_errno()
        raise KernelError(f"{what}: {os.strerror(number)}", errno=number, command=what)


def current() -> int:
    """A new descriptor of the calling thread's network namespace (the caller closes it)."""
    # thread-self, not self: /proc/self is the main thread's view.
    return os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)


def enter(fd: int, kind: int = CLONE_NEWNET) -> None:
    """Move the calling thread into namespace `fd` for good. Raises KernelError.

    `kind` is the CLONE_NEW* of a namespace that is not a network; 0 takes any.
    """
    _check(_libc.setns(fd, kind), "setns")


def identity(fd: int) -> tuple[int, int]:
    """(device, inode): equal for two descriptors of the same namespace."""
    status = os.fstat(fd)
    return status.st_dev, status.st_ino


def is_network_namespace(fd: int) -> bool:
    """Whether `fd` is a network namespace: asked of the kernel, for descriptors from a peer."""
    try:
        return fcntl.ioctl(fd, NS_GET_NSTYPE) == CLONE_NEWNET
    except OSError:
        return False


def identity_of_socket(fd: int) -> tuple[int, int]:
    """The identity of the network namespace in which a socket was born.

    Raises KernelError: no socket, or no CAP_NET_ADMIN in that namespace.
    """
    try:
        namespace = fcntl.ioctl(fd, SIOCGSKNS)
    except OSError as exc:
        raise KernelError(
            f"namespace of a socket: {exc.strerror}", errno=exc.errno or 0, command="SIOCGSKNS"
        ) from exc
    try:
        return identity(namespace)
    finally:
        os.close(namespace)


def create() -> int:
    """A new anonymous namespace; it lives as long as something refers to it.

    Raises KernelError when the process lacks CAP_SYS_ADMIN in its user namespace.
    """
    made: list[int] = []
    failed: list[BaseException] = []

    def run() -> None:
        try:
            _check(_libc.unshare(CLONE_NEWNET), "unshare(CLONE_NEWNET)")
            made.append(current())
        except (KernelError, OSError) as exc:
            failed.append(exc)

    # A thread of its own, because unshare moves the thread that calls it.
    thread = threading.Thread(target=run, name="netns-create")
    thread.start()
    thread.join()
    if failed:
        raise failed[0]
    return made[0]


class _Home:
    """The descriptor of a thread's own namespace, closed when the thread ends."""

    __slots__ = ("_close", "fd")

    def __init__(self, fd: int) -> None:
        self.fd = fd
        self._close = os.close  # at the interpreter's end the module may be gone first

    def __del__(self) -> None:
        self._close(self.fd)


class _Inside:
    """What `inside` gives: no generator, because every connection that is dialled enters."""

    __slots__ = ("_fd", "_home_fd")

    def __init__(self, fd: int) -> None:
        self._fd = fd

    def __enter__(self) -> None:
        home: _Home | None = getattr(_home, "home", None)
        if home is None:
            home = _home.home = _Home(current())
        self._home_fd = home.fd
        enter(self._fd)

    def __exit__(self, *_exc: object) -> None:
        try:
            enter(self._home_fd)
        except BaseException:
            os.write(2, b"fatal: cannot return to the home network namespace\n")
            os._exit(EX_SOFTWARE)


def inside(fd: int) -> contextlib.AbstractContextManager[None]:
    """Run the body in namespace `fd`. Synchronous bodies only.

    Raises KernelError when the namespace cannot be entered. If the way back fails the
    process ends at once: a thread lost in a pod's namespace must not go on.
    """
    return _Inside(fd)
