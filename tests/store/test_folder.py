"""Where packs are; whether they can be made there is found out without a trace, and who else may write is said."""

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from vllm_adapmoe.config import AdapMoEError
from vllm_adapmoe.store.folder import others_who_may_write, packs_root, why_not_writable


def test_packs_are_in_the_folder_that_the_user_names(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/home/me")
    assert packs_root("~/packs") == Path("/home/me/packs")
    assert packs_root(Path("packs")) == tmp_path / "packs"
    with pytest.raises(AdapMoEError, match=r"store_dir='~nobody-here/packs': this user has no home folder"):
        packs_root("~nobody-here/packs")


def test_many_may_look_at_one_folder_at_once_and_leave_nothing(tmp_path):
    with ThreadPoolExecutor(8) as threads:
        assert set(threads.map(why_not_writable, [tmp_path / "a" / "store"] * 400)) == {None}
    assert list((tmp_path / "a" / "store").iterdir()) == []


def test_a_folder_that_cannot_be_made_or_written_is_told_why(tmp_path):
    (tmp_path / "file").touch()
    assert why_not_writable(tmp_path / "file") == "File exists"
    assert why_not_writable(tmp_path / "file" / "store") == "Not a directory"
    closed = tmp_path / "closed"
    closed.mkdir(mode=0o555)
    code = (
        "import os, sys; os.geteuid() or os.setresuid(12345, 12345, 12345);"
        "from pathlib import Path; print([why_not_writable(Path(folder)) for folder in sys.argv[1:]])"
    )
    code = "from vllm_adapmoe.store.folder import why_not_writable\n" + code
    tmp_path.chmod(0o755)
    for folder in tmp_path.parents[:2]:
        folder.chmod(0o755)
    found = subprocess.run(
        [sys.executable, "-c", code, closed, closed / "store", "/proc/store"], capture_output=True, text=True
    )
    assert found.stdout.strip() == "['Permission denied', 'Permission denied', 'No such file or directory']"


@pytest.mark.skipif(os.geteuid() != 0, reason="giving files away needs root")
def test_who_may_replace_a_pack(tmp_path):
    folder = tmp_path / "store"
    folder.mkdir(mode=0o755)
    pack = folder / "experts.pack"
    pack.write_bytes(b"")
    assert others_who_may_write(pack) is None
    folder.chmod(0o777)
    assert others_who_may_write(pack) == f"all users (mode 777 of '{folder}')"
    folder.chmod(0o1777)  # files of others are safe there, but not a name that is still free
    assert others_who_may_write(pack) == f"all users (mode 1777 of '{folder}')"
    folder.chmod(0o755)
    os.chown(pack, 12345, -1)
    assert others_who_may_write(pack) == f"user 12345 (owner of '{pack}')"
    os.chown(pack, 0, 0)
    os.chown(folder, 0, 54321)
    folder.chmod(0o775)
    assert others_who_may_write(pack) == f"group 54321 (mode 775 of '{folder}')"
