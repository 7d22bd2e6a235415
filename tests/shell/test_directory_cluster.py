"""A real directory on a real file system: edits, bad files, replacement, concurrent writers."""

from __future__ import annotations

import gc
import json
import os
import sys
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio

from mesh.cluster.api import Deleted, Fault, NotFound, Put, Ref, Synced
from mesh.cluster.directory import DirectoryCluster
from mesh.errors import ConfigError

SERVICE = """\
apiVersion: v1
kind: Service
metadata:
  name: {name}
  namespace: shop
spec:
  ports:
  - port: {port}
"""


def service(name: str, port: int = 80) -> str:
    return SERVICE.format(name=name, port=port)


def pod(name: str, **labels: str) -> dict:
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": name, "namespace": "shop", "labels": labels},
    }


class Watched:
    """A watch, with the state that its events add up to."""

    def __init__(self, receive: trio.MemoryReceiveChannel) -> None:
        self.receive = receive
        self.objects: dict[Ref, dict] = {}
        self.faults: list[Fault] = []
        self.events: list[object] = []

    async def next(self, seconds: float = 45.0) -> object:
        with trio.fail_after(seconds):
            event = await self.receive.receive()
        self.events.append(event)
        match event:
            case Put(ref, obj, _):
                self.objects[ref] = obj
            case Deleted(ref):
                del self.objects[ref]
            case Fault():
                self.faults.append(event)
        return event

    async def until(self, is_done, seconds: float = 45.0) -> None:
        with trio.fail_after(seconds):
            while not is_done(self):
                await self.next(seconds)

    def ports(self) -> dict[str, int]:
        return {
            ref.name: obj["spec"]["ports"][0]["port"]
            for ref, obj in self.objects.items()
            if ref.kind == "Service"
        }


@asynccontextmanager
async def watched(path: Path, *kinds: str, **options):
    async with DirectoryCluster(path, **options).watch(kinds) as receive:
        watch = Watched(receive)
        await watch.until(lambda each: each.events and isinstance(each.events[-1], Synced))
        yield watch


async def test_everything_is_told_before_synced(tmp_path):
    (tmp_path / "deep").mkdir()
    (tmp_path / "a.yaml").write_text(service("a") + "---\n---\n" + service("b", 81))
    (tmp_path / "deep" / "c.yml").write_text(service("c", 82))
    (tmp_path / "d.json").write_text(json.dumps({"kind": "List", "items": [pod("p"), pod("q")]}))
    (tmp_path / ".hidden.yaml").write_text("{")
    (tmp_path / "notes.txt").write_text("{")
    async with watched(tmp_path) as watch:
        assert watch.ports() == {"a": 80, "b": 81, "c": 82}
        assert Ref("Pod", "shop", "q") in watch.objects
        assert watch.faults == []
        places = {each.ref.name: str(each.source) for each in watch.events if type(each) is Put}
        assert places["b"] == f"{tmp_path}/a.yaml:11:1"


async def test_only_the_kinds_asked_for(tmp_path):
    (tmp_path / "a.yaml").write_text(service("a"))
    (tmp_path / "p.json").write_text(json.dumps(pod("p")))
    async with watched(tmp_path, "Pod") as watch:
        assert [ref.kind for ref in watch.objects] == ["Pod"]


@pytest.mark.parametrize("notify", [True, False], ids=["notify", "poll"])
async def test_edit_create_rename_delete(tmp_path, notify):
    file = tmp_path / "a.yaml"
    file.write_text(service("a"))
    async with watched(tmp_path, notify=notify) as watch:
        file.write_text(service("a", 81))
        await watch.until(lambda each: each.ports() == {"a": 81})
        (tmp_path / "new").mkdir()
        (tmp_path / "new" / "b.yaml").write_text(service("b"))
        await watch.until(lambda each: each.ports() == {"a": 81, "b": 80})
        # A rename keeps the object: it moves, and is never deleted.
        file.rename(tmp_path / "z.yaml")
        with trio.move_on_after(0.5):
            while True:
                event = await watch.next()
                assert not isinstance(event, Deleted)
        (tmp_path / "z.yaml").unlink()
        await watch.until(lambda each: each.ports() == {"b": 80})
        (tmp_path / "new" / "b.yaml").unlink()
        (tmp_path / "new").rmdir()
        await watch.until(lambda each: each.ports() == {})
        assert watch.faults == []


async def test_an_edit_arrives_soon(tmp_path):
    file = tmp_path / "a.yaml"
    file.write_text(service("a"))
    async with watched(tmp_path) as watch:
        times = []
        for port in range(1, 8):
            before = trio.current_time()
            file.write_text(service("a", port))
            await watch.until(lambda each, port=port: each.ports() == {"a": port})
            times.append(trio.current_time() - before)
        assert sorted(times)[len(times) // 2] < 0.2, times


async def test_a_bad_file_keeps_its_last_good_objects(tmp_path):
    file = tmp_path / "a.yaml"
    file.write_text(service("a") + "---\n" + service("b"))
    async with watched(tmp_path) as watch:
        file.write_text(service("a") + "---\n" + service("b") + "  bad: [\n")
        await watch.until(lambda each: each.faults)
        assert watch.ports() == {"a": 80, "b": 80}
        error = watch.faults[0].error
        assert error.file == str(file)
        assert error.line >= 18
        assert not watch.faults[0].repaired
        file.write_text(service("a", 90))
        await watch.until(lambda each: each.ports() == {"a": 90})
        await watch.until(lambda each: len(each.faults) == 2)
        assert watch.faults[1].repaired
        assert watch.faults[1].error.file == str(file)


async def test_a_bad_file_that_goes_away_is_repaired(tmp_path):
    file = tmp_path / "a.yaml"
    file.write_text("kind: [")
    async with watched(tmp_path) as watch:
        assert len(watch.faults) == 1
        file.unlink()
        await watch.until(lambda each: len(each.faults) == 2)
        assert watch.faults[1].repaired


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("a: &a [x, x]\nb: &b [*a, *a, *a]\n", "anchors are not allowed"),
        ("- " * 5000, "nested deeper"),
        (service("a") + "  selector: {a: b}\n  selector: {a: c}\n", "written twice"),
        ("kind: Pod\napiVersion: v1\nmetadata: {name: ../../etc}\n", "not a name"),
        ("x" * (1 << 20) + "y", "larger than 1024 KiB"),
        ("kind: !!python/object/apply:os.system [id]", "not allowed"),
    ],
    ids=["bomb", "deep", "duplicate-key", "path", "huge", "tag"],
)
async def test_what_a_file_may_not_do(tmp_path, text, says):
    (tmp_path / "good.yaml").write_text(service("good"))
    (tmp_path / "bad.yaml").write_text(text)
    async with watched(tmp_path) as watch:
        assert watch.ports() == {"good": 80}
        assert len(watch.faults) == 1
        assert says in str(watch.faults[0].error)
        assert watch.faults[0].error.file == str(tmp_path / "bad.yaml")


async def test_a_named_pipe_and_links_to_nowhere_do_not_block(tmp_path):
    os.mkfifo(tmp_path / "pipe.yaml")
    (tmp_path / "dangling.yaml").symlink_to("nowhere")
    for first, second in (("x.yaml", "y.yaml"), ("x", "y")):
        (tmp_path / first).symlink_to(second)
        (tmp_path / second).symlink_to(first)
    (tmp_path / "here").symlink_to(".")
    (tmp_path / "a.yaml").write_text(service("a"))
    async with watched(tmp_path) as watch:
        assert watch.ports() == {"a": 80}
        said = {Path(each.error.file).name: each.error.message for each in watch.faults}
        assert said == {
            "pipe.yaml": "not a regular file",
            "dangling.yaml": "the link leads nowhere",
            "x.yaml": "cannot be read: Too many levels of symbolic links",
            "y.yaml": "cannot be read: Too many levels of symbolic links",
            "here": "a linked directory is not read",
        }


async def test_a_link_that_breaks_keeps_its_last_good_objects(tmp_path):
    target = tmp_path / "target.txt"
    target.write_text(service("a"))
    link = tmp_path / "a.yaml"
    link.symlink_to(target.name)
    async with watched(tmp_path, notify=False) as watch:
        target.unlink()
        await watch.until(lambda each: each.faults)
        assert watch.ports() == {"a": 80}
        assert watch.faults[0].error.hint == "mend it; until then what it last held stays in force"
        target.write_text(service("a", 81))
        await watch.until(lambda each: each.ports() == {"a": 81})
        await watch.until(lambda each: len(each.faults) == 2)
        assert watch.faults[1].repaired
        target.unlink()
        link.unlink()
        await watch.until(lambda each: each.ports() == {})


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read every file: tests/lab has this one")
async def test_a_file_that_may_not_be_read_keeps_its_last_good_objects(tmp_path):
    file = tmp_path / "a.yaml"
    file.write_text(service("a"))
    async with watched(tmp_path, notify=False) as watch:
        file.chmod(0)
        await watch.until(lambda each: each.faults)
        assert watch.faults[0].error.message == "cannot be read: Permission denied"
        tmp_path.chmod(0o600)
        await trio.sleep(0.3)
        assert watch.ports() == {"a": 80}
        tmp_path.chmod(0o700)


async def test_a_duplicate_names_both_places_and_the_first_stays(tmp_path):
    (tmp_path / "m.yaml").write_text(service("a", 80))
    async with watched(tmp_path) as watch:
        # It sorts earlier, but it came later.
        (tmp_path / "b.yaml").write_text("# a comment\n" + service("a", 99))
        await watch.until(lambda each: each.faults)
        text = str(watch.faults[0].error)
        assert f"{tmp_path}/b.yaml:2:1" in text
        assert f"{tmp_path}/m.yaml:1:1" in text
        assert watch.ports() == {"a": 80}
        (tmp_path / "m.yaml").unlink()
        await watch.until(lambda each: each.ports() == {"a": 99})
        await watch.until(lambda each: len(each.faults) == 2)
        assert watch.faults[1].repaired


async def test_a_mounted_config_map_is_replaced_at_once(tmp_path):
    first, second = tmp_path / "..2024_1", tmp_path / "..2024_2"
    first.mkdir()
    (first / "a.yaml").write_text(service("a", 1))
    (tmp_path / "..data").symlink_to(first.name)
    (tmp_path / "a.yaml").symlink_to("..data/a.yaml")
    async with watched(tmp_path) as watch:
        assert watch.ports() == {"a": 1}
        second.mkdir()
        (second / "a.yaml").write_text(service("a", 2))
        (tmp_path / "..data_tmp").symlink_to(second.name)
        (tmp_path / "..data_tmp").rename(tmp_path / "..data")
        await watch.until(lambda each: each.ports() == {"a": 2})
        assert watch.faults == []


async def test_a_file_emptied_for_an_instant_loses_nothing(tmp_path):
    file = tmp_path / "a.yaml"
    file.write_text(service("a"))
    async with watched(tmp_path) as watch:
        file.write_text("")
        await trio.sleep(0.06)
        file.write_text(service("a", 81))
        await watch.until(lambda each: each.ports() == {"a": 81})
        assert not any(isinstance(each, Deleted) for each in watch.events)
        file.write_text("")
        await watch.until(lambda each: each.ports() == {})


async def test_a_vanished_root_deletes_nothing(tmp_path):
    root = tmp_path / "root"
    root.mkdir()
    (root / "a.yaml").write_text(service("a"))
    async with watched(root, notify=False) as watch:
        root.rename(tmp_path / "away")
        await watch.until(lambda each: each.faults)
        assert watch.ports() == {"a": 80}
        (tmp_path / "away").rename(root)
        await watch.until(lambda each: len(each.faults) == 2)
        assert watch.faults[1].repaired


async def test_no_directory_is_an_error_at_once(tmp_path):
    with pytest.raises(ConfigError, match="not a directory"):
        async with DirectoryCluster(tmp_path / "none").watch([]):
            pass


async def test_the_body_of_a_watch_keeps_its_own_error(tmp_path):
    with pytest.raises(KeyError):
        async with DirectoryCluster(tmp_path).watch([]):
            raise KeyError("mine")


async def test_leaving_a_watch_is_quick_even_unread(tmp_path):
    for index in range(600):
        (tmp_path / f"{index}.json").write_text(json.dumps(pod(f"p{index}")))
    with trio.fail_after(30):  # reading on to the end, one by one, would take for ever
        async with DirectoryCluster(tmp_path).watch([]) as receive:
            await receive.receive()


async def test_apply_patch_delete(tmp_path):
    cluster = DirectoryCluster(tmp_path, writable=True)
    ref = Ref("Pod", "shop", "p")
    async with watched(tmp_path, "Pod", writable=True) as watch:
        await cluster.apply(pod("p", app="web"))
        await watch.until(lambda each: ref in each.objects)
        await cluster.patch(ref, {"metadata": {"annotations": {"a": "1"}, "labels": {"app": None}}})
        await watch.until(lambda each: "annotations" in each.objects[ref]["metadata"])
        assert (await cluster.get(ref))["metadata"] == {
            "name": "p",
            "namespace": "shop",
            "labels": {},
            "annotations": {"a": "1"},
        }
        await cluster.delete(ref)
        await cluster.delete(ref)
        await watch.until(lambda each: not each.objects)
        assert await cluster.get(ref) is None
        with pytest.raises(NotFound):
            await cluster.patch(ref, {})
        assert watch.faults == []
    assert [each.name for each in (tmp_path / "Pod" / "shop").iterdir()] == []


async def test_cluster_scoped_and_defaulted_namespaces(tmp_path):
    cluster = DirectoryCluster(tmp_path, writable=True)
    await cluster.apply({"apiVersion": "v1", "kind": "Node", "metadata": {"name": "n1"}})
    await cluster.apply({"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "p"}})
    assert await cluster.get(Ref("Node", "", "n1")) is not None
    found = await cluster.get(Ref("Pod", "default", "p"))
    assert found["metadata"]["namespace"] == "default"


async def test_writes_that_are_refused(tmp_path):
    cluster = DirectoryCluster(tmp_path, writable=True)
    await cluster.apply(pod("p"))
    ref = Ref("Pod", "shop", "p")
    with pytest.raises(ConfigError, match="cannot turn"):
        await cluster.patch(ref, {"metadata": {"name": "q"}})
    with pytest.raises(ConfigError, match="JSON"):
        await cluster.patch(ref, {"spec": object()})
    with pytest.raises(ConfigError, match="larger"):
        await cluster.patch(ref, {"spec": "x" * (1 << 20)})
    for bad in (Ref("Pod", "..", "p"), Ref("Pod", "shop", "../p"), Ref("../Pod", "shop", "p")):
        with pytest.raises(ConfigError):
            await cluster.get(bad)
    with pytest.raises(ConfigError, match="only read"):
        await DirectoryCluster(tmp_path).apply(pod("r"))
    assert (await cluster.get(ref)) == pod("p")


async def test_get_in_a_users_directory(tmp_path):
    (tmp_path / "a.yaml").write_text(service("a"))
    cluster = DirectoryCluster(tmp_path)
    assert (await cluster.get(Ref("Service", "shop", "a")))["spec"]["ports"] == [{"port": 80}]
    (tmp_path / "a.yaml").unlink()
    assert await cluster.get(Ref("Service", "shop", "a")) is None


_WRITER = """
import sys, trio
from pathlib import Path
from mesh.cluster.api import Ref
from mesh.cluster.directory import DirectoryCluster
async def main(root, who):
    cluster = DirectoryCluster(Path(root), writable=True)
    for n in range(60):
        annotations = {f"{who}-{n}": "x"}
        await cluster.patch(Ref("Pod", "shop", "p"), {"metadata": {"annotations": annotations}})
trio.run(main, *sys.argv[1:])
"""


async def test_concurrent_patches_lose_nothing(tmp_path):
    cluster = DirectoryCluster(tmp_path, writable=True)
    await cluster.apply(pod("p"))
    async with watched(tmp_path, "Pod", writable=True) as watch, trio.open_nursery() as nursery:
        for who in ("a", "b", "c"):
            command = [sys.executable, "-c", _WRITER, str(tmp_path), who]
            nursery.start_soon(lambda command=command: trio.run_process(command))
        await watch.until(
            lambda each: (
                len(each.objects[Ref("Pod", "shop", "p")]["metadata"].get("annotations", {})) == 180
            ),
            seconds=60,
        )
        assert watch.faults == []


async def test_only_changed_files_are_read(tmp_path, monkeypatch):
    from mesh.cluster import tree

    for index in range(50):
        (tmp_path / f"{index}.json").write_text(json.dumps(pod(f"p{index}")))
    read = []
    original = tree.read_documents
    monkeypatch.setattr(
        tree, "read_documents", lambda *a, **k: read.append(a[1]) or original(*a, **k)
    )
    async with watched(tmp_path) as watch:
        assert len(read) == 50
        read.clear()
        (tmp_path / "7.json").write_text(json.dumps(pod("p7", a="b")))
        await watch.until(lambda each: each.objects[Ref("Pod", "shop", "p7")]["metadata"]["labels"])
        assert set(read) == {str(tmp_path / "7.json")}


async def test_without_notification_it_says_so_and_polls(tmp_path, monkeypatch):
    def no_watches(*_args, **_options):
        raise OSError("OS file watch limit reached")

    monkeypatch.setattr("watchfiles.awatch", no_watches)
    async with watched(tmp_path) as watch:
        await watch.until(lambda each: each.faults)
        text = str(watch.faults[0].error)
        assert "OS file watch limit reached" in text
        assert "polling every" in text
        (tmp_path / "a.yaml").write_text(service("a"))
        await watch.until(lambda each: each.ports() == {"a": 80})


async def test_a_reader_that_closes_its_end_ends_the_watch(tmp_path):
    (tmp_path / "a.yaml").write_text(service("a"))
    async with DirectoryCluster(tmp_path).watch([]) as receive:
        await receive.receive()
        receive.close()
        (tmp_path / "b.yaml").write_text(service("b"))
        await trio.sleep(0.2)


async def test_a_cancelled_watch_closes_everything(tmp_path):
    (tmp_path / "a.yaml").write_text(service("a"))
    gc.collect()  # what other tests left to be collected counts neither before nor after
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(3):
        with trio.CancelScope() as scope:
            async with DirectoryCluster(tmp_path).watch([]) as receive:
                async for _event in receive:
                    scope.cancel()
        assert scope.cancelled_caught
    # The notifier's thread hears of the end at its next step.
    with trio.fail_after(30):
        while len(os.listdir("/proc/self/fd")) > before:
            await trio.sleep(0.01)


async def test_more_files_than_are_read(tmp_path, monkeypatch):
    monkeypatch.setattr("mesh.cluster.tree.MAX_FILES", 3)
    for name in "abcdef":
        (tmp_path / f"{name}.yaml").write_text(service(name))
    async with watched(tmp_path) as watch:
        assert len(watch.ports()) <= 4
        assert "more than 3 files" in str(watch.faults[0].error)


async def test_a_linked_directory_is_not_entered(tmp_path):
    (tmp_path / "loop").symlink_to(tmp_path)
    (tmp_path / "a.yaml").write_text(service("a"))
    async with watched(tmp_path) as watch:
        assert watch.ports() == {"a": 80}
        assert "a linked directory is not read" in str(watch.faults[0].error)


async def test_thousands_of_files_are_read_and_one_edit_is_still_heard_soon(tmp_path):
    for number in range(5000):
        (tmp_path / f"{number}.yaml").write_text(service(f"s{number}"))
    async with watched(tmp_path) as watch:
        assert len(watch.objects) == 5000
        with trio.fail_after(30):
            (tmp_path / "77.yaml").write_text(service("s77", 81))
            await watch.until(lambda each: each.ports()["s77"] == 81)
