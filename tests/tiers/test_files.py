"""Files of the disk tier are written as a whole or not at all, and never read back wrong."""

import errno
import os
import pickle
import signal
import subprocess
import sys

import hypothesis
import hypothesis.strategies as st
import pytest

import ferrum_jax as fj
from ferrum_jax.config import TierConfig
from ferrum_jax.errors import CorruptFileError, OutOfHostMemoryError
from ferrum_jax.ops.transfer import BlockShape
from ferrum_jax.tiers import TieredStore, disk, files
from tests.support.caches import tiny_spec
from tests.support.tier_stores import (
    BLOCK,
    FORMAT,
    LimitedDisk,
    bits,
    file_of,
    file_size,
    open_full,
    payload_of,
    picture,
    stores_on,
)

# Files that are not what was written.


@pytest.fixture(scope="module")
def sound_file(tmp_path_factory):
    """A store with one entry, "a", its file, and the content of that file."""
    directory = tmp_path_factory.mktemp("sound")
    with stores_on(directory) as open_store:
        store = open_store()
        store.put("a", payload_of(3))
        yield store, file_of(directory), file_of(directory).read_bytes()


def refusal(sound_file, content: bytes) -> CorruptFileError:
    """The error with which a file of that content is refused."""
    store, path, sound = sound_file
    path.write_bytes(content)
    try:
        with pytest.raises(CorruptFileError) as caught:
            bits(store.stream("a"))
        assert str(path) == caught.value.path and caught.value.reason in str(caught.value)
        return caught.value
    finally:
        path.write_bytes(sound)
        assert bits(store.stream("a")) == bits(payload_of(3))


@hypothesis.settings(max_examples=500)
@hypothesis.given(st.data(), st.sampled_from(["change", "cut", "insert", "replace"]))
def test_stream_refuses_a_corrupt_file(sound_file, data, how):
    content = sound_file[2]
    place, more = data.draw(st.integers(0, len(content) - 1)), data.draw(st.binary(max_size=40))
    changed = {
        "change": content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :],
        "cut": content[:place],
        "insert": content[:place] + more + content[place:],
        "replace": files.MAGIC + more,
    }[how]
    hypothesis.assume(changed != content)
    refusal(sound_file, changed)


class Bomb:
    """What ends the process if it is unpickled."""

    def __reduce__(self):
        return (os.abort, ())


def other_header(content: bytes) -> bytes:
    """The content with the header of another entry of the same size."""
    return content.replace(b'"key": "a"', b'"key": "b"')


def other_order(content: bytes) -> bytes:
    """The content with its three blocks in another order."""
    size = BLOCK + 16
    return content[: -3 * size] + content[-size:] + content[-3 * size : -size]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda content: content[:10], "it has 10 bytes instead of"),
        (lambda content: pickle.dumps(Bomb()), "bytes instead of"),
        (lambda content: pickle.dumps(Bomb()).ljust(len(content)), "its header is not that of"),
        (other_header, "its header is not that of entry 'a'"),
        (other_order, "block 0 of 3 was altered"),
        (lambda content: content[:-1] + b"x", "block 2 of 3 was altered"),
    ],
)
def test_stream_says_what_is_wrong_with_a_corrupt_file(sound_file, change, reason):
    assert reason in refusal(sound_file, change(sound_file[2])).reason


def test_blocks_of_another_file_are_refused():
    """Every block's digest depends on the header of its file."""
    headers = [files.EntryFile(key, FORMAT, 1) for key in "ab"]
    other = BlockShape.of(fj.init(tiny_spec(dtype="bfloat16", head_dim=4)).pool)
    headers += [files.EntryFile("a", other, 1), files.EntryFile("a", FORMAT, 2)]
    assert len({file._digest([memoryview(b"block")], 0) for file in headers}) == 4


@pytest.mark.parametrize("harm", ["overwritten", "renamed", "removed"])
def test_discard_removes_a_corrupt_file_and_other_entries_stay(open_store, tmp_path, harm):
    store = open_store()
    store.put("a", payload_of(2))
    path = file_of(tmp_path)
    store.put("b", payload_of(2, seed=1))
    if harm == "overwritten":
        path.write_bytes(b"something else")
    elif harm == "renamed":
        (other,) = set(tmp_path.glob("*.kvblocks")) - {path}
        path.write_bytes(other.read_bytes())
    else:
        path.unlink()
    for _ in range(2):
        with pytest.raises(CorruptFileError):
            store.stream("a")
    assert "a" in store and bits(store.stream("b")) == bits(payload_of(2, seed=1))
    store.discard("a")
    assert "a" not in store and not path.exists() and store.disk_used_bytes == file_size("b", 2)
    store.put("a", payload_of(1))
    assert bits(store.stream("a")) == bits(payload_of(1))


# Disks that fail.


@pytest.mark.parametrize("room", [0, 10, 300, 3 * BLOCK])
def test_put_on_a_disk_that_is_full_half_way_changes_nothing(open_store, tmp_path, room):
    limit = LimitedDisk()
    store = open_store(open_file=limit)
    store.put("a", payload_of(2))
    before = picture(store, tmp_path)
    limit.room = room
    with pytest.raises(OutOfHostMemoryError, match="No space left on device") as caught:
        store.put("b", payload_of(4))
    assert isinstance(caught.value.__cause__, OSError)
    assert picture(store, tmp_path) == before
    limit.room = float("inf")
    store.put("b", payload_of(4))
    assert bits(store.stream("b")) == bits(payload_of(4))


def test_put_on_a_disk_that_is_full_for_the_system_changes_nothing(open_store, tmp_path):
    store = open_store(open_file=open_full)
    with pytest.raises(OutOfHostMemoryError, match="No space left on device"):
        store.put("a", payload_of(1))  # Small: it fails only as the buffer is flushed.
    assert [path.name for path in tmp_path.iterdir()] == ["lock"] and not len(store)


def test_put_that_fails_at_the_second_of_two_files_removes_the_first(open_store, tmp_path):
    limit = LimitedDisk()
    store = open_store(host_blocks=4, open_file=limit)
    store.put("a", payload_of(2))
    store.put("b", payload_of(2, seed=1))
    before = picture(store, tmp_path)
    limit.room = file_size("a", 2) + 100
    with pytest.raises(OutOfHostMemoryError, match="cannot be written"):
        store.put("c", payload_of(4))
    assert picture(store, tmp_path) == before


@pytest.mark.parametrize("step", ["os.fsync", "os.replace", "_synchronize"])
def test_put_leaves_nothing_whichever_step_fails(open_store, tmp_path, monkeypatch, step):
    store = open_store()

    def fails(*_):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with monkeypatch.context() as patch:
        patch.setattr(f"ferrum_jax.tiers.disk.{step}", fails)
        with pytest.raises(OutOfHostMemoryError, match="Input/output error"):
            store.put("a", payload_of(2))
    assert [path.name for path in tmp_path.iterdir()] == ["lock"]
    assert "a" not in store and store.disk_used_bytes == 0


def test_put_gives_a_file_its_name_only_once_it_is_whole(open_store, tmp_path, monkeypatch):
    store, steps = open_store(), []
    synchronize, rename = os.fsync, os.replace

    def noted(descriptor):
        is_directory = os.path.isdir(f"/proc/self/fd/{descriptor}")
        steps.append(
            ("directory" if is_directory else "file", len(list(tmp_path.glob("*.kvblocks"))))
        )
        return synchronize(descriptor)

    def renamed(source, target):
        steps.append(("rename", os.path.getsize(source)))
        return rename(source, target)

    monkeypatch.setattr(disk.os, "fsync", noted)
    monkeypatch.setattr(disk.os, "replace", renamed)
    store.put("a", payload_of(2))
    assert steps == [("file", 0), ("rename", file_size("a", 2)), ("directory", 1)]


# Directories.


@pytest.mark.parametrize("directory", ["", 5, b"bytes", ["list"], object()])
def test_disk_directory_must_be_a_path(directory, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / f"mine{disk._SUFFIX}").write_bytes(b"not of any tier")
    for make in (
        lambda: TierConfig(disk_directory=directory),
        lambda: TieredStore([FORMAT], 0, disk_directory=directory),
    ):
        with pytest.raises(ValueError, match="disk_directory must"):
            make()
    assert [path.name for path in tmp_path.iterdir()] == ["mine.kvblocks"]


@pytest.mark.parametrize("does_exist", [True, False])
def test_a_lock_that_is_a_symbolic_link_is_not_followed(tmp_path, does_exist):
    directory, target = tmp_path / "tier", tmp_path / "precious"
    directory.mkdir()
    if does_exist:
        target.write_bytes(b"precious")
    (directory / "lock").symlink_to(target)
    with pytest.raises(ValueError, match="lock that is a symbolic link.*Remove the link"):
        TieredStore([FORMAT], 0, disk_directory=directory)
    assert target.exists() == does_exist
    (directory / "lock").unlink()
    TieredStore([FORMAT], 0, disk_directory=directory).close()


@pytest.mark.parametrize("end", ["close", "drop"])
def test_close_deletes_the_files_and_unlocks_the_directory(tmp_path, end):
    (tmp_path / "notes.txt").touch()
    for name in ("earlier.kvblocks", "crashed.kvblocks.unfinished"):
        (tmp_path / name).touch()
    store = TieredStore([FORMAT], 0, disk_directory=tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"lock", "notes.txt"} and not len(store)
    store.put("a", payload_of(2))
    with pytest.raises(ValueError, match="disk_directory .* is in use by another cache"):
        TieredStore([FORMAT], 0, disk_directory=tmp_path)
    assert bits(store.stream("a")) == bits(payload_of(2)), "the second one touched no file"
    if end == "close":
        store.close()
    del store
    assert {path.name for path in tmp_path.iterdir()} == {"lock", "notes.txt"}
    TieredStore([FORMAT], 0, disk_directory=tmp_path).close()


def test_a_killed_process_unlocks_its_directory(open_store, tmp_path):
    program = (
        "import fcntl, os, sys, time\n"
        f"lock = os.open({str(tmp_path / 'lock')!r}, os.O_RDWR | os.O_CREAT)\n"
        "fcntl.flock(lock, fcntl.LOCK_EX)\n"
        "print('locked', flush=True)\n"
        "time.sleep(60)\n"
    )
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE) as process:
        assert process.stdout.readline() == b"locked\n"
        with pytest.raises(ValueError, match="in use"):
            open_store()
        process.send_signal(signal.SIGKILL)
    open_store().put("a", payload_of(1))


def test_a_forked_process_leaves_the_files_of_its_parent(open_store, tmp_path, monkeypatch):
    store = open_store()
    store.put("a", payload_of(2))
    with monkeypatch.context() as patch:
        patch.setattr(disk.os, "getpid", lambda: -1)
        store.close()
    assert file_of(tmp_path).exists()


def test_a_directory_stays_the_same_when_the_process_changes_its_own(tmp_path, monkeypatch):
    (tmp_path / "elsewhere" / "tier").mkdir(parents=True)
    others = tmp_path / "elsewhere" / "tier" / "others.kvblocks"
    others.write_bytes(b"not of this tier")
    monkeypatch.chdir(tmp_path)
    store = TieredStore([FORMAT], 0, disk_directory="tier")
    monkeypatch.chdir(tmp_path / "elsewhere")
    store.put("a", payload_of(2))
    assert bits(store.stream("a")) == bits(payload_of(2))
    store.close()
    assert others.exists() and [path.name for path in (tmp_path / "tier").iterdir()] == ["lock"]
