"""The files of a directory tree and the objects in them, re-read only where they changed.

`refresh` looks at the named paths, `rescan` at all; both give the events that follow: what
is new or different, what is gone, which file cannot be read, which can be read again. A bad
file keeps the objects it last had. An object that stands in two files is taken from where
it was first found, and the other place is a fault until one of them goes.

Hidden names are ignored (temporary files of editors and of `directory`), but a symbolic
link to a file is followed, so that a mounted ConfigMap (`x.yaml -> ..data/x.yaml`) reads as
usual. Linked directories are not entered. Synchronous: the shell runs it in a thread.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeAlias

from mesh.cluster.api import Deleted, Fault, Put, Ref, Source, source_of
from mesh.cluster.documents import Document, read_documents
from mesh.errors import ConfigError

MAX_FILE_BYTES = 1 << 20
MAX_FILES = 20_000
MAX_DIRECTORY_DEPTH = 16
SUFFIXES = (".yaml", ".yml", ".json")

_Signature: TypeAlias = tuple[int, int, int, int, int]
Change: TypeAlias = Put | Deleted | Fault
#: A path, and the object in it if the fault is one object's and not the whole file's.
_FaultKey: TypeAlias = tuple[str, Ref | None]
_Faults: TypeAlias = dict[_FaultKey, ConfigError]


@dataclass(slots=True)
class _File:
    """What one file last held."""

    signature: _Signature | None = None
    documents: dict[Ref, Document] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Refreshed:
    """Events, and the paths that should be looked at again a moment later."""

    events: list[Change]
    unsettled: set[str]


def is_manifest(name: str) -> bool:
    """Whether a file of this name is read."""
    return name.endswith(SUFFIXES) and not name.startswith(".")


class FileTree:
    """The objects under one directory.

    `is_wanted(relative path)` may leave files out unread. `is_patient`: a file that has just
    become empty or vanished is given a moment, because editors replace files that way.
    """

    def __init__(
        self,
        root: Path,
        *,
        marks: bool = True,
        is_patient: bool = True,
        is_wanted: Callable[[str], bool] | None = None,
    ) -> None:
        self._root = str(root)
        self._marks = marks
        self._is_patient = is_patient
        self._is_wanted = is_wanted
        self._files: dict[str, _File] = {}
        self._claims: dict[Ref, dict[str, None]] = {}
        self._owners: dict[Ref, str] = {}
        self._faults: _Faults = {}
        self._waited: set[str] = set()

    def get(self, ref: Ref) -> Document | None:
        """The object as last read."""
        owner = self._owners.get(ref)
        return self._files[owner].documents[ref] if owner is not None else None

    def rescan(self) -> Refreshed:
        """Look at every file; files whose stat is unchanged are not read."""
        faults: _Faults = {}
        found: set[str] = set()
        unreadable: list[str] = []
        for path, error in self._walk(self._root, 0):
            if error is None:
                found.add(path)
            else:
                faults[path, None] = error
                unreadable.append(path + os.sep)
            if len(found) > MAX_FILES:
                faults[self._root, None] = ConfigError(
                    f"more than {MAX_FILES} files: the rest is not read", file=self._root
                )
                break
        # What could not be looked at has not gone away.
        gone = [
            path
            for path in self._files
            if path not in found and not path.startswith(tuple(unreadable))
        ]
        if (self._root, None) in faults:
            gone = []
        walked = {key for key in self._faults if key[0] not in self._files}
        return self._apply([*sorted(found), *gone], faults, walked)

    def refresh(self, paths: Iterable[str]) -> Refreshed:
        """Look at these paths, or at every file if one of them is not plainly a file of ours."""
        chosen = set()
        for path in paths:
            if not is_manifest(os.path.basename(path)) or not self._is_visible(path):
                return self.rescan()
            chosen.add(path)
        return self._apply(sorted(chosen), {}, set())

    def _is_visible(self, path: str) -> bool:
        inner = os.path.relpath(path, self._root).split(os.sep)
        return not any(part.startswith(".") for part in inner)

    def _walk(self, directory: str, depth: int) -> Iterator[tuple[str, ConfigError | None]]:
        if depth > MAX_DIRECTORY_DEPTH:
            yield directory, ConfigError("nested too deep: not read", file=directory)
            return
        try:
            entries = sorted(os.scandir(directory), key=lambda each: each.name)
        except OSError as exc:
            if depth == 0 or not isinstance(exc, FileNotFoundError):
                yield directory, ConfigError(f"cannot be listed: {exc.strerror}", file=directory)
            return
        for entry in entries:
            if entry.name.startswith("."):
                continue
            if entry.is_dir(follow_symlinks=False):
                yield from self._walk(entry.path, depth + 1)
            elif is_manifest(entry.name):
                yield entry.path, None
            elif entry.is_symlink() and os.path.isdir(entry.path):
                yield (
                    entry.path,
                    ConfigError(
                        "a linked directory is not read",
                        file=entry.path,
                        hint="link its files, or copy it",
                    ),
                )

    # -- one round ---------------------------------------------------------------------

    def _apply(self, paths: Iterable[str], faults: _Faults, expired: set[_FaultKey]) -> Refreshed:
        """Read what changed among `paths`, then say what follows from it.

        `faults` are those found on the way; those named by `expired` hold only if found again.
        """
        unsettled: set[str] = set()
        before: dict[Ref, Document | None] = {}
        judged = set(expired)
        for path in paths:
            if self._is_wanted and not self._is_wanted(os.path.relpath(path, self._root)):
                continue
            signature = None
            try:
                signature = _signature(path)
                fresh = self._read(path, signature, unsettled)
            except ConfigError as exc:
                # Known as it was before we read it, so that the same bytes are not read and
                # complained about again.
                file = self._files.setdefault(path, _File())
                file.signature = signature
                exc.hint = exc.hint or _consequence(file)
                faults[path, None] = exc
                continue
            if fresh is None:
                continue
            judged.add((path, None))
            self._replace(path, fresh, before)
        self._settle_owners(before, faults, judged)
        events: list[Change] = [*self._differences(before), *self._judge(faults, judged)]
        return Refreshed(events, unsettled)

    def _read(self, path: str, signature: _Signature | None, unsettled: set[str]) -> _File | None:
        """The file as it is now; None if there is nothing new. Raises ConfigError."""
        file = self._files.get(path)
        has_objects = file is not None and bool(file.documents)
        if signature is None:
            if file is None:
                return None
            if has_objects and self._is_early(path, unsettled):
                return None
            return _File()
        if file is not None and signature == file.signature and path not in self._waited:
            return None
        data, signature = read_file(path)
        if not data and has_objects and self._is_early(path, unsettled):
            return None
        self._waited.discard(path)
        documents = read_documents(data, path, marks=self._marks)
        return _File(signature, {each.ref: each for each in documents})

    def _is_early(self, path: str, unsettled: set[str]) -> bool:
        if not self._is_patient or path in self._waited:
            self._waited.discard(path)
            return False
        self._waited.add(path)
        unsettled.add(path)
        return True

    def _replace(self, path: str, fresh: _File, before: dict[Ref, Document | None]) -> None:
        old = self._files.get(path) or _File()
        for ref in (*old.documents, *fresh.documents):
            if ref not in before:
                before[ref] = self.get(ref)
        for ref in old.documents:
            if ref not in fresh.documents:
                self._claims[ref].pop(path)
        for ref in fresh.documents:
            self._claims.setdefault(ref, {})[path] = None
        if fresh.signature is None:
            self._files.pop(path, None)
        else:
            self._files[path] = fresh

    def _settle_owners(
        self,
        before: dict[Ref, Document | None],
        faults: _Faults,
        judged: set[_FaultKey],
    ) -> None:
        for ref in before:
            claims = self._claims[ref]
            owner = self._owners.get(ref)
            judged.update(key for key in self._faults if key[1] == ref)
            if not claims:
                del self._claims[ref]
                self._owners.pop(ref, None)
                continue
            # A file that has just vanished gives way to one that holds the same: a rename.
            present = [path for path in claims if path not in self._waited]
            if owner is None or owner not in (present or claims):
                owner = self._owners[ref] = min(present or claims)
            for path in present:
                if path != owner:
                    first = self._files[owner].documents[ref].source
                    faults[path, ref] = _duplicate(
                        ref, self._files[path].documents[ref].source, first
                    )

    def _differences(self, before: dict[Ref, Document | None]) -> Iterator[Change]:
        for ref, old in before.items():
            new = self.get(ref)
            if new is None:
                if old is not None:
                    yield Deleted(ref)
            elif old is None or old.object != new.object or old.source != new.source:
                yield Put(ref, new.object, source_of(new.object, new.source))

    def _judge(self, faults: _Faults, judged: set[_FaultKey]) -> Iterator[Change]:
        """New faults, and those of the judged that no longer hold."""
        for key in [key for key in self._faults if key in judged]:
            if key not in faults:
                yield Fault(self._faults.pop(key), repaired=True)
        for key, error in faults.items():
            known = self._faults.get(key)
            self._faults[key] = error
            if known is not None and str(known) == str(error):
                continue
            if known is not None:
                yield Fault(known, repaired=True)
            yield Fault(error)


def _duplicate(ref: Ref, second: Source, first: Source) -> ConfigError:
    return ConfigError(
        f"{ref} is already defined at {first}, which stays in force",
        file=second.file,
        line=second.line,
        column=second.column,
        hint="delete one of the two",
    )


def _consequence(file: _File) -> str:
    if file.documents:
        return "mend it; until then what it last held stays in force"
    return "mend it; until then nothing of it is used"


def _signature(path: str) -> _Signature | None:
    """What the file is now, None if it is gone. Raises ConfigError if that cannot be told."""
    try:
        found = os.stat(path)
    except (FileNotFoundError, NotADirectoryError) as exc:
        if os.path.islink(path):
            raise ConfigError("the link leads nowhere", file=path) from exc
        return None
    except OSError as exc:
        raise ConfigError(f"cannot be read: {exc.strerror}", file=path) from exc
    return _signature_of(found)


def _signature_of(found: os.stat_result) -> _Signature:
    return (found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns)


def read_file(path: str) -> tuple[bytes, _Signature]:
    """All of a regular file, and what it was when we read it.

    Raises ConfigError, whose cause is the OSError if there was one.
    """
    try:
        # Never wait for the writer of a named pipe.
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        try:
            found = os.fstat(fd)
            if not stat.S_ISREG(found.st_mode):
                raise ConfigError("not a regular file", file=path)
            if found.st_size > MAX_FILE_BYTES:
                raise ConfigError(f"larger than {MAX_FILE_BYTES >> 10} KiB: split it", file=path)
            with os.fdopen(fd, "rb", closefd=False) as file:
                data = file.read(MAX_FILE_BYTES + 1)
        finally:
            os.close(fd)
    except OSError as exc:
        raise ConfigError(f"cannot be read: {exc.strerror}", file=path) from exc
    if len(data) > MAX_FILE_BYTES:
        raise ConfigError(f"larger than {MAX_FILE_BYTES >> 10} KiB: split it", file=path)
    return data, _signature_of(found)
