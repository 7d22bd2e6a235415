"""A lab where none can be had: one clear message each, and nothing is left."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from mesh.errors import ConfigError, KernelError
from mesh.lab import launch
from mesh.lab.launch import LabSettings, check_machine, start

pytestmark = [pytest.mark.lab, pytest.mark.timeout(60)]

TRY = """
import sys
from pathlib import Path
from mesh.errors import MeshError
from mesh.lab.launch import LabSettings, start
try:
    start(LabSettings(Path(sys.argv[1]), name="refused", mesh=False, rootless=True))
except MeshError as error:
    print(type(error).__name__, error, "|", error.hint)
"""


def test_forbidden_user_namespaces_name_the_sysctl(tmp_path: Path) -> None:
    """The limit is set in a user namespace of our own, where it hurts nobody else."""
    script = 'echo 0 > /proc/sys/user/max_user_namespaces && exec "$@"'
    argv = ["unshare", "--user", "--map-root-user", "sh", "-c", script, "sh"]
    argv += [sys.executable, "-c", TRY, str(tmp_path)]
    done = subprocess.run(argv, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("KernelError this user may not make namespaces")
    assert "sysctl user.max_user_namespaces=10000" in done.stdout


def test_no_privilege_and_no_user_namespace(tmp_path: Path) -> None:
    """As root without CAP_SYS_ADMIN: not rootless, because we are uid 0."""
    code = TRY.replace("rootless=True", "rootless=False")
    argv = ["setpriv", "--bounding-set", "-sys_admin", "--inh-caps", "-sys_admin"]
    argv += [sys.executable, "-c", code, str(tmp_path)]
    done = subprocess.run(argv, capture_output=True, text=True, check=False)
    if "setpriv:" in done.stderr:
        pytest.skip("only root can drop capabilities to try this")
    assert "may not make namespaces: Operation not permitted" in done.stdout, done
    assert "run it as root" in done.stdout


def test_a_missing_program_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "find_program", lambda _: None)
    with pytest.raises(ConfigError, match="nft is missing") as caught:
        start(LabSettings(tmp_path, name="refused"))
    assert "apt-get install nftables" in caught.value.hint


def test_an_old_kernel_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "OLDEST_KERNEL", (99, 0))
    with pytest.raises(KernelError, match="too old for a lab") as caught:
        check_machine(LabSettings(tmp_path))
    assert caught.value.hint == "Linux 99.0 or newer is needed"


def test_a_file_is_no_directory(tmp_path: Path) -> None:
    file = tmp_path / "x.yaml"
    file.touch()
    with pytest.raises(ConfigError, match="not a directory"):
        check_machine(LabSettings(file))
