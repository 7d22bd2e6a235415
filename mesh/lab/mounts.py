"""Mount namespaces: what a pod and a daemon see of this machine's files.

The lab keeps everything it writes in a tmpfs that it mounts over a directory every machine has
(`/run`, else `/mnt`, ...), inside its own mount namespace: nothing of it is on the machine, and
all of it ends with the lab. A pod sees the machine's files, its own /etc/hosts, resolv.conf and
hostname, its volumes, and a fresh tmpfs instead of the lab's. Where a volume's path does not
exist, its closest existing parent is mirrored: a tmpfs with every entry bound to the original,
so that a new entry can be made without touching the machine.

Synchronous, by ctypes. Namespaces are made in a thread of their own, because unshare moves
the thread that calls it; the descriptors outlive it.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import stat
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from mesh.errors import ConfigError, KernelError

CLONE_NEWNS = 0x00020000
CLONE_NEWUTS = 0x04000000
CLONE_NEWIPC = 0x08000000
CLONE_NEWNET = 0x40000000
MS_RDONLY = 1
MS_NOSUID = 2
MS_NODEV = 4
MS_REMOUNT = 32
MS_BIND = 4096
MS_REC = 0x4000
MS_PRIVATE = 1 << 18
MS_SLAVE = 1 << 19
MS_SHARED = 1 << 20
MNT_DETACH = 2

RUN_PLACES = ("/run", "/mnt", "/media", "/srv", "/opt")
RUN_NAME = "ambit"
MAX_MIRRORED = 2000

_libc = ctypes.CDLL(None, use_errno=True)
_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class Bind:
    """Mount `source` (a file or directory) at `target`."""

    source: str
    target: str
    read_only: bool = False


@dataclass(frozen=True, slots=True)
class Namespaces:
    """Descriptors of a pod's namespaces; whoever holds this closes it."""

    net: int
    mount: int
    uts: int

    def all(self) -> tuple[int, ...]:
        """In the order in which a process enters them."""
        return self.net, self.uts, self.mount

    def close(self) -> None:
        """Let go of them; they live on while processes are inside."""
        for fd in self.all():
            os.close(fd)


def choose_run_place(avoid: Sequence[Path]) -> str:
    """A directory to mount the lab's tmpfs over, that none of `avoid` lies in.

    Raises ConfigError when there is none.
    """
    for place in RUN_PLACES:
        real = Path(place).resolve()
        if real.is_dir() and not any(path.resolve().is_relative_to(real) for path in avoid):
            return str(real)
    raise ConfigError(
        "no directory is left to mount the lab's own files over",
        hint=f"one of {', '.join(RUN_PLACES)} must exist and hold neither YAML nor Python",
    )


def prepare_run_directory(place: str) -> Path:
    """Mount the lab's tmpfs over `place` and return the lab's directory in it.

    Keeps /etc/resolv.conf readable when it is a link into `place`. Below the returned
    directory, `netns` is shared, so that namespaces bound there appear in the daemons' mount
    namespaces too. Raises KernelError.
    """
    links = _resolve_links(place)
    mount("ambit-lab", place, "tmpfs", MS_NOSUID | MS_NODEV, "mode=755,size=1024m")
    _restore_links(links)
    directory = Path(place, RUN_NAME)
    shared = directory / "netns"
    shared.mkdir(parents=True)
    mount("ambit-netns", str(shared), "tmpfs", MS_NOSUID | MS_NODEV, "mode=755,size=1m")
    mount("none", str(shared), None, MS_SHARED)
    return directory


def create_pod(
    binds: Sequence[Bind], *, hide: str, hostname: str, network: int | None = None
) -> Namespaces:
    """The namespaces of a pod: a new network (or `network`), mounts, host name and IPC.

    `hide` is the place of the lab's tmpfs, which the pod does not see.
    Raises KernelError, and ConfigError when a bind's target cannot be had.
    """

    def make() -> Namespaces:
        _unshare(CLONE_NEWNS | CLONE_NEWUTS | CLONE_NEWIPC | (0 if network else CLONE_NEWNET))
        mount("none", "/", None, MS_REC | MS_PRIVATE)
        root = _Root(hide)
        hidden = [bind for bind in binds if _is_below(bind.target, hide)]
        root.mirror_missing([bind.target for bind in binds if bind not in hidden])
        for bind in binds:
            if bind not in hidden:
                root.bind(bind)
        root.hide(hidden)
        name = hostname.encode()
        _check(_libc.sethostname(name, len(name)), "sethostname")
        return Namespaces(os.dup(network) if network else _open("net"), _open("mnt"), _open("uts"))

    return _in_thread(make)


def create_mounts(binds: Sequence[Bind]) -> int:
    """A mount namespace for a daemon: the lab's own, with `binds` over it; its descriptor.

    Namespaces that the lab binds under `netns` later appear in it.
    """

    def make() -> int:
        _unshare(CLONE_NEWNS)
        mount("none", "/", None, MS_REC | MS_SLAVE)
        for bind in binds:
            _bind(bind.source, bind.target)
        return _open("mnt")

    return _in_thread(make)


def keep_namespace(fd: int, path: Path) -> None:
    """Bind the namespace `fd` to a file, as `ip netns` does."""
    path.touch()
    mount(f"/proc/self/fd/{fd}", str(path), None, MS_BIND)


def release_namespace(path: Path) -> None:
    """Undo `keep_namespace`; gone already is fine."""
    unmount(str(path))
    with contextlib.suppress(OSError):
        path.unlink()


def mount(
    source: str, target: str, kind: str | None = None, flags: int = 0, data: str | None = None
) -> None:
    """mount(2). Raises KernelError."""
    result = _libc.mount(
        os.fsencode(source),
        os.fsencode(target),
        kind.encode() if kind else None,
        ctypes.c_ulong(flags),
        data.encode() if data else None,
    )
    _check(result, f"mount {target}")


def unmount(target: str) -> None:
    """Detach a mount; nothing there is fine."""
    _libc.umount2(os.fsencode(target), MNT_DETACH)


class _Root:
    """A pod's view of the file tree while it is being made, by the thread inside it."""

    def __init__(self, hide: str) -> None:
        self._hide = hide
        self._devices: set[int] = set()

    def mirror_missing(self, targets: Sequence[str]) -> None:
        """Make every missing target possible by mirroring its closest existing parents.

        Mirrors nest from the top: once `/` is a tmpfs, what lies below it is made with mkdir.
        """
        for target in sorted(set(targets), key=len):
            parent = Path(target)
            while not parent.exists():
                parent = parent.parent
            if str(parent) == os.path.normpath(target) or self._is_ours(parent):
                continue
            if not parent.is_dir():
                raise ConfigError(
                    f"cannot mount at {target}: {parent} is a file", field="mountPath"
                )
            self._mirror(parent)

    def bind(self, bind: Bind) -> None:
        """Bind a source over its target, making the target if it is missing."""
        target = Path(bind.target)
        is_directory = os.path.isdir(bind.source)
        if not target.exists():
            try:
                (target if is_directory else target.parent).mkdir(parents=True, exist_ok=True)
                if not is_directory:
                    target.touch()
            except OSError as exc:
                raise ConfigError(
                    f"cannot mount at {bind.target}: {exc.strerror}", field="mountPath"
                ) from exc
        elif target.is_dir() != is_directory:
            what = "a directory" if target.is_dir() else "a file"
            raise ConfigError(f"cannot mount at {bind.target}: {what} is there", field="mountPath")
        _bind(bind.source, bind.target)
        if bind.read_only:
            mount("none", bind.target, None, MS_REMOUNT | MS_BIND | MS_RDONLY)

    def hide(self, binds: Sequence[Bind]) -> None:
        """Cover the lab's tmpfs with a fresh one, and bind there what belongs there.

        The lab's own stays underneath, as source of the binds. What is bound under `netns` goes,
        or this pod would keep other pods' namespaces alive.
        """
        sources = [os.open(bind.source, os.O_PATH | os.O_CLOEXEC) for bind in binds]
        try:
            unmount(os.path.join(self._hide, RUN_NAME, "netns"))
            mount("tmpfs", self._hide, "tmpfs", MS_NOSUID | MS_NODEV, "mode=755,size=64m")
            for fd, bind in zip(sources, binds, strict=True):
                target = os.path.realpath(bind.target)
                self.bind(Bind(f"/proc/self/fd/{fd}", target, bind.read_only))
        finally:
            for fd in sources:
                os.close(fd)

    def _is_ours(self, directory: Path) -> bool:
        """Whether a new entry in `directory` lands in a tmpfs of this pod and nowhere else."""
        return os.stat(directory).st_dev in self._devices

    def _mirror(self, directory: Path) -> None:
        """A tmpfs over `directory` with every entry bound to the original."""
        names = sorted(os.listdir(directory))
        if len(names) > MAX_MIRRORED:
            raise ConfigError(
                f"cannot make a new entry in {directory}: it has {len(names)} entries",
                field="mountPath",
                hint="mount at a path that exists, or into a smaller directory",
            )
        work = Path(self._hide, "mirror")
        work.mkdir(exist_ok=True)
        mount("ambit-mirror", str(work), "tmpfs", MS_NODEV, "mode=755,size=16m")
        os.chmod(work, stat.S_IMODE(os.stat(directory).st_mode))
        self._devices.add(os.stat(work).st_dev)
        for name in names:
            self._mirror_entry(directory / name, work / name)
        if str(directory) == "/":
            self._pivot(work)
        else:
            mount(str(work), str(directory), None, MS_BIND | MS_REC)
            unmount(str(work))

    def _mirror_entry(self, original: Path, copy: Path) -> None:
        status = os.lstat(original)
        if stat.S_ISLNK(status.st_mode):
            os.symlink(os.readlink(original), copy)
            return
        if stat.S_ISDIR(status.st_mode):
            copy.mkdir()
        else:
            copy.touch()
        try:
            _bind(str(original), str(copy))
        except KernelError as error:
            # A stale mount or a vanished entry is no reason to refuse the pod.
            if error.errno not in (errno.ENOENT, errno.ESTALE, errno.EACCES):
                raise

    def _pivot(self, new_root: Path) -> None:
        os.chdir(new_root)
        _check(_libc.syscall(_PIVOT_ROOT, b".", b"."), "pivot_root")
        unmount(".")
        os.chdir("/")


# pivot_root has no libc function; its number differs per architecture.
_PIVOT_ROOT = 155 if os.uname().machine == "x86_64" else 41


def _resolve_links(place: str) -> dict[str, bytes]:
    """Files inside `place` that /etc/resolv.conf and /etc/hosts are links to."""
    found: dict[str, bytes] = {}
    for name in ("/etc/resolv.conf", "/etc/hosts"):
        real = os.path.realpath(name)
        if real.startswith(place.rstrip("/") + "/"):
            try:
                found[real] = Path(real).read_bytes()
            except OSError:
                found[real] = b""
    return found


def _restore_links(found: dict[str, bytes]) -> None:
    for path, content in found.items():
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(path).write_bytes(content)


def _is_below(target: str, place: str) -> bool:
    return Path(os.path.realpath(target)).is_relative_to(place)


def _bind(source: str, target: str) -> None:
    mount(source, target, None, MS_BIND | MS_REC)


def _open(kind: str) -> int:
    return os.open(f"/proc/thread-self/ns/{kind}", os.O_RDONLY | os.O_CLOEXEC)


def _unshare(flags: int) -> None:
    _check(_libc.unshare(flags), "unshare")


def _check(result: int, what: str) -> None:
    if result < 0:
        number = ctypes.get_errno()
        raise KernelError(f"{what}: {os.strerror(number)}", errno=number, command=what)


def _in_thread(make: Callable[[], _T]) -> _T:
    made: list[_T] = []
    failed: list[BaseException] = []

    def run() -> None:
        try:
            made.append(make())
        except (KernelError, ConfigError, OSError) as exc:
            failed.append(exc)

    thread = threading.Thread(target=run, name="namespaces")
    thread.start()
    thread.join()
    if failed and isinstance(failed[0], OSError):
        number = failed[0].errno or 0
        raise KernelError(f"pod namespaces: {failed[0]}", errno=number) from failed[0]
    if failed:
        raise failed[0]
    return made[0]
