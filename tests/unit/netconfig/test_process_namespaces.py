"""Which pod a process is of, and that a tenant's own cgroup names do not count."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from mesh.cluster.api import Ref
from mesh.cluster.objects import Pod
from netconfig.processes import FirstOf, ProcessNamespaces, pod_uid

MINE = "11111111-2222-3333-4444-555555555555"
OTHER = "aaaaaaaa-bbbb-cccc-dddd-eeeeeeeeeeee"
UNDER = MINE.replace("-", "_")


@pytest.mark.parametrize(
    ("cgroups", "uid"),
    [
        (f"0::/kubepods/burstable/pod{MINE}/abc", MINE),
        (f"0::/kubepods/pod{MINE}/abc", MINE),
        (
            "0::/kubepods.slice/kubepods-burstable.slice/"
            f"kubepods-burstable-pod{UNDER}.slice/cri-containerd-abc.scope",
            MINE,
        ),
        (f"12:pids:/kubepods/besteffort/pod{MINE}/abc\n1:name=systemd:/other", MINE),
        # Below its own cgroup a tenant chooses names.
        (f"0::/kubepods/burstable/pod{MINE}/abc/kubepods/pod{OTHER}/x", MINE),
        (f"0::/kubepods/pod{MINE}/a::/kubepods/pod{OTHER}/x", MINE),
        (f"0::/user.slice/pod{OTHER}/x", ""),
        ("0::/system.slice/kubelet.service", ""),
        ("0::/", ""),
        ("", ""),
        ("rubbish", ""),
    ],
)
def test_the_first_name_counts(cgroups: str, uid: str) -> None:
    assert pod_uid(cgroups) == uid


def process(proc: Path, number: str, cgroup: str, namespace: str = "/proc/self/ns/net") -> None:
    (proc / number / "ns").mkdir(parents=True)
    (proc / number / "cgroup").write_text(cgroup)
    (proc / number / "ns" / "net").symlink_to(namespace)


def pod(uid: str) -> Pod:
    return Pod(ref=Ref("Pod", "a", "b"), uid=uid)


def test_a_namespace_is_found_by_a_process(tmp_path: Path) -> None:
    process(tmp_path, "7", "0::/system.slice")
    process(tmp_path, "42", f"0::/kubepods/pod{MINE}/abc")
    # The finder's own namespace stands for the node's; here it is another than the pod's.
    process(tmp_path, "self", "0::/", "/proc/self/ns/uts")
    (tmp_path / "version").write_text("")
    fd = FirstOf([NothingThere(), ProcessNamespaces(tmp_path)]).open(pod(MINE))
    assert fd is not None
    try:
        assert os.fstat(fd).st_ino == os.stat("/proc/self/ns/net").st_ino
    finally:
        os.close(fd)
    assert ProcessNamespaces(tmp_path).open(pod(OTHER)) is None


class NothingThere:
    def open(self, pod: Pod) -> int | None:
        return None


def test_the_nodes_own_network_is_nobodys(tmp_path: Path) -> None:
    process(tmp_path, "42", f"0::/kubepods/pod{MINE}/abc")
    process(tmp_path, "self", "0::/")
    assert ProcessNamespaces(tmp_path).open(pod(MINE)) is None


def test_a_process_that_ends_meanwhile_is_passed_over(tmp_path: Path) -> None:
    process(tmp_path, "42", f"0::/kubepods/pod{MINE}/abc", "/no/such/file")
    assert ProcessNamespaces(tmp_path).open(pod(MINE)) is None
