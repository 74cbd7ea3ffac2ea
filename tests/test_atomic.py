from __future__ import annotations

import errno
import os
import random
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest

from sphinxkit import atomic
from sphinxkit.atomic import TEMP_SUFFIX, atomic_directory, atomic_file, clean_leftovers

DEAD = "0123456789abcdef"
FILES_PER_VERSION = 6
KILLS = 8

WRITER = """
import sys
from sphinxkit import atomic
from sphinxkit.atomic import atomic_directory
if sys.argv[2] == "renames":
    atomic._exchange = lambda one, other: False
version = int(sys.argv[3])
print("ready", flush=True)
while True:
    version += 1
    with atomic_directory(sys.argv[1]) as folder:
        for index in range({files}):
            (folder / str(index)).write_text(str(version))
"""


def content(folder: Path) -> set[str]:
    return {path.read_text() for path in folder.iterdir()}


def is_first_version(folder: Path) -> bool:
    try:
        return (folder / "0").read_text() == "0"
    except FileNotFoundError:  # between two renames
        return True


def leftovers(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.name.endswith(TEMP_SUFFIX))


def write_then_raise(path: Path, error: BaseException) -> None:
    path.write_text("half")
    raise error


@pytest.fixture(params=["exchange", "renames"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Both ways of replacing a folder: Linux's exchange, and two renames."""
    if request.param == "renames":
        monkeypatch.setattr(atomic, "_exchange", lambda one, other: False)
    return str(request.param)


def test_file_is_replaced_whole_and_kept_on_failure(tmp_path: Path) -> None:
    target = tmp_path / "sub" / "a.txt"
    with atomic_file(target) as path:
        path.write_text("one")
        assert not target.exists()
        assert path.parent == target.parent
    assert target.read_text() == "one"
    with pytest.raises(RuntimeError, match="stop"), atomic_file(target) as path:
        write_then_raise(path, RuntimeError("stop"))
    assert target.read_text() == "one"
    assert leftovers(target.parent) == []


def test_directory_is_replaced_whole_and_kept_on_failure(tmp_path: Path, way: str) -> None:
    target = tmp_path / "model"
    for version in ("1", "2"):
        with atomic_directory(target) as folder:
            (folder / "a").write_text(version)
            (folder / version).write_text(version)
    assert sorted(path.name for path in target.iterdir()) == ["2", "a"]
    with pytest.raises(KeyboardInterrupt), atomic_directory(target) as folder:
        write_then_raise(folder / "a", KeyboardInterrupt())
    assert content(target) == {"2"}
    assert leftovers(tmp_path) == []


def test_empty_directory_is_replaced(tmp_path: Path, way: str) -> None:
    target = tmp_path / "model"
    target.mkdir()
    with atomic_directory(target) as folder:
        (folder / "a").write_text("1")
    assert content(target) == {"1"}


def test_link_to_a_directory_is_followed(tmp_path: Path, way: str) -> None:
    real, link = tmp_path / "real", tmp_path / "link"
    real.mkdir()
    link.symlink_to(real)
    with atomic_directory(link) as folder:
        (folder / "a").write_text("1")
    assert link.is_symlink()
    assert content(real) == {"1"}


def test_a_file_in_the_way_is_an_error(tmp_path: Path) -> None:
    target = tmp_path / "model"
    target.write_text("mine")
    with pytest.raises(NotADirectoryError, match="model"), atomic_directory(target):
        pass
    assert target.read_text() == "mine"


def test_failure_between_two_renames_puts_the_old_one_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(atomic, "_exchange", lambda one, other: False)
    target = tmp_path / "model"
    target.mkdir()
    (target / "a").write_text("old")
    rename = Path.rename

    def failing(self: Path, other: Path) -> Path:
        if other == target and "-old" not in self.name:
            raise OSError(errno.EIO, "broken disk")
        return rename(self, other)

    monkeypatch.setattr(Path, "rename", failing)
    with pytest.raises(OSError, match="broken disk"), atomic_directory(target) as folder:
        (folder / "a").write_text("new")
    assert content(target) == {"old"}
    assert leftovers(tmp_path) == []


def test_exchange_swaps_and_says_where_it_cannot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one, other = tmp_path / "one", tmp_path / "other"
    one.write_text("1")
    other.mkdir()
    if not atomic._exchange(one, other):
        pytest.skip("no renameat2 here")
    assert one.is_dir()
    assert other.read_text() == "1"
    with pytest.raises(FileNotFoundError):
        atomic._exchange(one, tmp_path / "nothing")
    monkeypatch.setattr(atomic, "_NOT_POSSIBLE", (errno.ENOENT,))
    assert atomic._exchange(one, tmp_path / "nothing") is False
    monkeypatch.setattr(atomic.ctypes, "CDLL", lambda *args, **kwargs: object())
    assert atomic._exchange(one, other) is False


def test_leftovers_of_the_dead_are_removed_and_others_kept(tmp_path: Path) -> None:
    target, held = tmp_path / "model", tmp_path / "held"
    dead = [tmp_path / f".model.{DEAD}{TEMP_SUFFIX}", tmp_path / f".model.{DEAD[::-1]}{TEMP_SUFFIX}"]
    dead[0].mkdir()
    dead[1].write_text("half")
    lock = tmp_path / f".model.lock{TEMP_SUFFIX}"
    lock.touch()
    others = [tmp_path / f".model2.{DEAD}{TEMP_SUFFIX}", tmp_path / f".model.x{TEMP_SUFFIX}"]
    for path in others:
        path.mkdir()
    with atomic_file(held) as writing, atomic_directory(tmp_path / "folder") as filling:
        assert sorted(clean_leftovers(target)) == sorted(dead)
        assert clean_leftovers(held) == clean_leftovers(tmp_path / "folder") == []
        assert writing.exists()
        assert filling.exists()
    assert sorted(tmp_path.iterdir()) == sorted([*others, held, tmp_path / "folder"])
    assert clean_leftovers(tmp_path / "no" / "folder") == []


def test_moved_aside_directory_is_restored_only_if_the_target_is_missing(tmp_path: Path) -> None:
    target = tmp_path / "model"
    aside = tmp_path / f".model.{DEAD}-old{TEMP_SUFFIX}"
    half = tmp_path / f".model.{DEAD[::-1]}{TEMP_SUFFIX}"
    for path in (aside, half):
        path.mkdir()
        (path / "a").write_text("old" if path == aside else "half")
    atomic.put_back(target)
    assert content(target) == {"old"}
    assert leftovers(tmp_path) == [half.name]
    aside.mkdir()
    (aside / "a").write_text("older")
    atomic.put_back(target)
    clean_leftovers(target)
    assert content(target) == {"old"}
    assert leftovers(tmp_path) == []


def test_a_second_writer_of_a_folder_is_refused(tmp_path: Path) -> None:
    target = tmp_path / "model"
    with atomic_directory(target) as folder:
        (folder / "a").write_text("1")
        with pytest.raises(BlockingIOError, match=r"another process is writing it.*model"), atomic_directory(target):
            pass
        atomic.put_back(target)
    assert content(target) == {"1"}
    assert leftovers(tmp_path) == []


def test_two_writers_of_a_file_have_files_of_their_own(tmp_path: Path) -> None:
    target = tmp_path / "a.txt"
    with atomic_file(target) as one, atomic_file(target) as other:
        assert one != other
        one.write_text("1")
        other.write_text("2")
    assert target.read_text() == "1"
    assert leftovers(tmp_path) == []


def test_without_locks_nothing_is_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refusing(descriptor: int, operation: int) -> None:
        raise OSError(errno.ENOLCK, "no locks")

    monkeypatch.setattr(atomic.fcntl, "flock", refusing)
    dead = [tmp_path / f".model.{DEAD}{TEMP_SUFFIX}", tmp_path / f".model.{DEAD[::-1]}{TEMP_SUFFIX}"]
    dead[0].mkdir()
    dead[1].write_text("half")
    with atomic_directory(tmp_path / "model") as folder, atomic_file(tmp_path / "file") as file:
        (folder / "a").write_text("1")
        file.write_text("1")
    assert clean_leftovers(tmp_path / "model") == []
    assert all(path.exists() for path in dead)
    assert content(tmp_path / "model") == {"1"}


def test_a_pipe_stays_a_pipe_and_gets_the_content(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    with subprocess.Popen(["cat", str(pipe)], stdout=subprocess.PIPE) as reader:
        with atomic_file(pipe) as path:
            path.write_text("text")
        assert reader.communicate()[0] == b"text"
    assert stat.S_ISFIFO(pipe.stat().st_mode)


def test_devices_and_descriptors_are_written_not_replaced(tmp_path: Path) -> None:
    with atomic_file("/dev/null") as path:
        path.write_text("text")
    assert stat.S_ISCHR(Path("/dev/null").stat().st_mode)
    with pytest.raises(OSError, match="No space left"), atomic_file("/dev/full") as path:
        path.write_text("text")
    with (tmp_path / "a").open("w+") as file:
        with atomic_file(f"/proc/self/fd/{file.fileno()}") as path:
            path.write_text("text")
        assert file.read() == "text"


def test_a_link_is_followed_and_permissions_are_kept(tmp_path: Path) -> None:
    behind, link, loose = tmp_path / "sub" / "behind", tmp_path / "link", tmp_path / "loose"
    behind.parent.mkdir()
    behind.write_text("old")
    behind.chmod(0o640)
    link.symlink_to(behind)
    loose.symlink_to("nowhere")
    for path in (link, loose):
        with atomic_file(path) as temporary:
            temporary.write_text("new")
        assert path.is_symlink()
        assert path.read_text() == "new"
    assert stat.S_IMODE(behind.stat().st_mode) == 0o640
    folder = tmp_path / "folder"
    folder.mkdir(mode=0o700)
    with atomic_directory(folder):
        pass
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    with pytest.raises(IsADirectoryError), atomic_file(folder):
        pass


def test_a_long_name_has_a_temporary_one(tmp_path: Path) -> None:
    target = tmp_path / ("n" * 250)
    with atomic_file(target) as temporary:
        temporary.write_text("1")
    assert target.read_text() == "1"


def test_directory_fsync_that_is_not_supported_is_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refusing(descriptor: int) -> None:
        raise OSError(errno.EINVAL, "no fsync")

    monkeypatch.setattr(atomic.os, "fsync", refusing)
    atomic.flush(tmp_path)
    (tmp_path / "a").write_text("1")
    with pytest.raises(OSError, match="no fsync"):
        atomic.flush(tmp_path / "a")


@pytest.mark.parametrize("way", ["exchange", "renames"])
def test_killed_at_any_moment_leaves_a_complete_directory(tmp_path: Path, way: str) -> None:
    target = tmp_path / "model"
    begin = time.monotonic()
    with atomic_directory(target) as folder:
        for index in range(FILES_PER_VERSION):
            (folder / str(index)).write_text("0")
    once = time.monotonic() - begin  # a slow disk takes longer to replace it
    moments = random.Random(0)
    script = WRITER.format(files=FILES_PER_VERSION)
    reached = 0
    for number in range(KILLS):
        command = [sys.executable, "-c", script, str(target), way, str(reached)]
        environment = {**os.environ, "PYTHONPATH": str(Path(atomic.__file__).parents[1])}
        with subprocess.Popen(command, stdout=subprocess.PIPE, env=environment) as writer:
            assert writer.stdout is not None
            assert writer.stdout.readline() == b"ready\n"
            time.sleep(moments.uniform(0.0, max(0.05, 2 * once)))
            while number == KILLS - 1 and is_first_version(target):  # no kill was late enough to see another
                time.sleep(0.01)
            writer.send_signal(signal.SIGKILL)
        if way == "renames":
            clean_leftovers(target)
        versions = content(target)
        assert len(versions) == 1, versions
        assert len(list(target.iterdir())) == FILES_PER_VERSION
        assert int(versions.copy().pop()) >= reached
        reached = int(versions.pop())
    assert reached > 0  # at least one run got far enough to replace it
    clean_leftovers(target)
    assert leftovers(tmp_path) == []
