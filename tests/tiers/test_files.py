"""Files of the disk tier are written whole or not at all, and never read back wrong."""

import errno
import json
import os
import pickle

import hypothesis
import hypothesis.strategies as st
import pytest

import ferrum_jax as fj
from ferrum_jax.config import TierConfig
from ferrum_jax.errors import CorruptFileError, OutOfHostMemoryError
from ferrum_jax.ops.transfer import BlockFormat
from ferrum_jax.tiers import TieredStore, disk, files
from ferrum_jax.tiers.disk import open_private
from tests.support.caches import tiny_spec
from tests.support.tier_entries import (
    BLOCK,
    FORMAT,
    TAGS,
    bits,
    file_of,
    payload_of,
    picture,
    stores_on,
)


@pytest.fixture
def open_store(tmp_path):
    with stores_on(tmp_path) as open_:
        yield open_


# Files that are not what was written.


@pytest.fixture(scope="module")
def sound_file(tmp_path_factory):
    """A directory with one entry, "a", its file, and what that holds."""
    directory = tmp_path_factory.mktemp("sound")
    store = TieredStore(FORMAT, 0, disk_directory=directory)
    store.put("a", payload_of(3), TAGS)
    yield store, file_of(directory), file_of(directory).read_bytes()
    store.close()


def refusal(sound_file, content: bytes) -> CorruptFileError:
    """The error with which a file of that content is refused."""
    store, path, sound = sound_file
    path.write_bytes(content)
    try:
        with pytest.raises(CorruptFileError) as caught:
            store.get("a")
        assert str(path) == caught.value.path and caught.value.reason in str(caught.value)
        return caught.value
    finally:
        path.write_bytes(sound)
        assert bits(store.get("a")[0]) == bits(payload_of(3))


@hypothesis.settings(max_examples=400)
@hypothesis.given(st.data(), st.integers(1, 255))
def test_a_file_with_any_byte_changed_is_refused(sound_file, data, flips):
    content = bytearray(sound_file[2])
    content[data.draw(st.integers(0, len(content) - 1))] ^= flips
    refusal(sound_file, bytes(content))


@hypothesis.settings(max_examples=200)
@hypothesis.given(st.data())
def test_a_file_cut_anywhere_is_refused(sound_file, data):
    content = sound_file[2]
    refusal(sound_file, content[: data.draw(st.integers(0, len(content) - 1))])


@hypothesis.settings(max_examples=100)
@hypothesis.given(st.data(), st.binary(min_size=1, max_size=40))
def test_a_file_with_bytes_put_in_is_refused(sound_file, data, more):
    content = sound_file[2]
    place = data.draw(st.integers(0, len(content)))
    changed = content[:place] + more + content[place:]
    hypothesis.assume(changed != content)
    refusal(sound_file, changed)


@hypothesis.settings(max_examples=100)
@hypothesis.given(st.binary(max_size=2000), st.booleans())
def test_any_other_file_is_refused(sound_file, content, is_alike):
    refusal(sound_file, files.MAGIC + content if is_alike else content)


def test_a_pickle_is_refused_and_not_opened(sound_file):
    class Bomb:
        def __reduce__(self):
            return (os.abort, ())

    assert "no file of a disk tier" in refusal(sound_file, pickle.dumps(Bomb())).reason


def rewritten(content: bytes, version: int = files.VERSION, **fields) -> bytes:
    """A sound beginning with other fields, then the blocks as they were."""
    length = int.from_bytes(content[12:16], "little")
    header = {**json.loads(content[16 : 16 + length]), **fields}
    text = json.dumps({k: v for k, v in header.items() if v is not ...}).encode()
    start = content[:8] + version.to_bytes(4, "little") + len(text).to_bytes(4, "little") + text
    return start + files._digest([start]) + content[16 + length + 16 :]


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"version": 2}, "it is of version 2 instead of 1"),
        ({"key": "b"}, "it holds 'b' instead of 'a'"),
        (
            {"block_format": {"dtype": "float32", "arrays": []}},
            "its blocks are {'dtype': 'float32'",
        ),
        ({"num_blocks": 10**15}, "bytes instead of"),
        ({"num_blocks": 2}, "bytes instead of"),
        ({"num_blocks": -1}, "num_blocks must be at least 0"),
        ({"num_blocks": "3"}, "num_blocks must be an integer"),
        ({"metadata": [1]}, "metadata must be a dict"),
        ({"metadata": ...}, "its header is none that is written here"),
        ({"more": 1}, "its header is none that is written here"),
        ({"metadata": {}}, "block 0 of 3 was altered"),
    ],
)
def test_a_file_of_another_kind_says_which(sound_file, changes, reason):
    assert reason in refusal(sound_file, rewritten(sound_file[2], **changes)).reason


def test_blocks_that_changed_places_are_refused(sound_file):
    content, size = sound_file[2], BLOCK + 16
    first, second, third = (
        content[-3 * size : -2 * size],
        content[-2 * size : -size],
        content[-size:],
    )
    swapped = content[: -3 * size] + second + first + third
    assert "block 0 of 3" in refusal(sound_file, swapped).reason


def test_a_cache_of_another_model_refuses_the_files(open_store):
    store = open_store()
    store.put("a", payload_of(2), {})
    store.close()
    other = BlockFormat.of(fj.init(tiny_spec(dtype="bfloat16", head_dim=4)).pool)
    with pytest.raises(CorruptFileError, match="those of this cache bfloat16"):
        open_store(block_format=other).get("a")


def test_after_a_refusal_the_others_go_on_and_the_file_can_be_dropped(open_store, tmp_path):
    store = open_store()
    store.put("a", payload_of(2), {})
    path = file_of(tmp_path)
    store.put("b", payload_of(2, seed=1), {})
    path.write_bytes(b"something else")
    for _ in range(2):
        with pytest.raises(CorruptFileError):
            store.pop("a")
        with pytest.raises(CorruptFileError):
            store.metadata("a")
    assert "a" in store and store.keys() == ["b"]
    assert bits(store.get("b")[0]) == bits(payload_of(2, seed=1))
    store.drop("a")
    assert "a" not in store and not path.exists()
    store.put("a", payload_of(1), {})
    assert bits(store.get("a")[0]) == bits(payload_of(1))


def test_a_file_under_the_name_of_another_is_refused(open_store, tmp_path):
    store = open_store()
    store.put("a", payload_of(2), {})
    path = file_of(tmp_path)
    store.put("b", payload_of(2, seed=1), {})
    (other,) = set(tmp_path.glob("*.kvblocks")) - {path}
    os.replace(path, other)
    with pytest.raises(CorruptFileError, match="it holds 'a' instead of 'b'"):
        store.get("b")
    assert store.keys() == []


def test_a_file_that_is_gone_is_refused(open_store, tmp_path):
    store = open_store()
    store.put("a", payload_of(2), {})
    file_of(tmp_path).unlink()
    with pytest.raises(CorruptFileError, match="No such file"):
        store.get("a")
    store.drop("a")
    assert store.stats().disk_used_bytes == 0


# Disks that fail.


class FullDisk:
    """Opens files on a disk with room for so many more bytes."""

    def __init__(self, room: float):
        self.room = room

    def __call__(self, path, mode):
        file = open_private(path, mode)
        write = file.write

        def limited(data):
            self.room -= len(data)
            if self.room < 0:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return write(data)

        file_with_limit = _Wrapped(file, limited)
        return file_with_limit if mode == "xb" else file


class _Wrapped:
    def __init__(self, file, write):
        self._file, self.write = file, write

    def __getattr__(self, name):
        return getattr(self._file, name)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self._file.close()


@pytest.mark.parametrize("room", [0, 10, 300, 3 * BLOCK])
def test_a_disk_full_half_way_leaves_the_store_as_it_was(open_store, tmp_path, room):
    disk_now = FullDisk(float("inf"))
    store = open_store(open_file=disk_now)
    store.put("a", payload_of(2), TAGS)
    before = picture(store, tmp_path)
    disk_now.room = room
    with pytest.raises(OutOfHostMemoryError, match="No space left on device") as caught:
        store.put("b", payload_of(4), {})
    assert isinstance(caught.value.__cause__, OSError)
    assert picture(store, tmp_path) == before
    disk_now.room = float("inf")
    store.put("b", payload_of(4), {})
    assert bits(store.get("b")[0]) == bits(payload_of(4))


def test_a_disk_that_is_full_for_the_system_itself_is_no_different(open_store, tmp_path):
    def open_full(path, mode):
        path.touch()
        return open("/dev/full", "wb")

    store = open_store(open_file=open_full)
    with pytest.raises(OutOfHostMemoryError, match="No space left on device"):
        store.put("a", payload_of(1), {})  # Small: it fails only as the buffer is flushed.
    assert [path.name for path in tmp_path.iterdir()] == ["lock"] and not store.keys()


def test_a_disk_full_at_the_second_of_two_files_takes_back_the_first(open_store, tmp_path):
    disk_now = FullDisk(float("inf"))
    store = open_store(host_blocks=4, open_file=disk_now)
    store.put("a", payload_of(2), {})
    store.put("b", payload_of(2, seed=1), {})
    before = picture(store, tmp_path)
    order = store._host.keys()
    disk_now.room = files.file_bytes("a", FORMAT, 2, {}) + 100
    with pytest.raises(OutOfHostMemoryError, match="cannot be written"):
        store.put("c", payload_of(4), {})
    assert picture(store, tmp_path) == before
    assert store._host.keys() == order


@pytest.mark.parametrize("step", ["os.fsync", "os.replace", "_synchronize"])
def test_whichever_step_fails_nothing_is_left(open_store, tmp_path, monkeypatch, step):
    store = open_store()

    def fails(*_):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with monkeypatch.context() as patch:
        patch.setattr(f"ferrum_jax.tiers.disk.{step}", fails)
        with pytest.raises(OutOfHostMemoryError, match="Input/output error"):
            store.put("a", payload_of(2), {})
    assert [path.name for path in tmp_path.iterdir()] == ["lock"]
    assert "a" not in store and store.stats().disk_used_bytes == 0


def test_the_file_has_its_name_only_once_it_is_whole(open_store, tmp_path, monkeypatch):
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
    store.put("a", payload_of(2), {})
    size = files.file_bytes("a", FORMAT, 2, {})
    assert steps == [("file", 0), ("rename", size), ("directory", 1)]


# Directories that are not for the tier alone, and files that are not to stay.


@pytest.mark.parametrize("directory", ["", 5, b"bytes", ["list"], object()])
def test_what_names_no_directory_is_refused(directory, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / f"mine{disk._SUFFIX}").write_bytes(b"not of any tier")
    for make in (
        lambda: TierConfig(disk_directory=directory),
        lambda: TieredStore(FORMAT, 0, disk_directory=directory),
        lambda: disk.DiskTier(directory, FORMAT),
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
        TieredStore(FORMAT, 0, disk_directory=directory)
    assert target.exists() == does_exist
    (directory / "lock").unlink()
    TieredStore(FORMAT, 0, disk_directory=directory).close()


@pytest.mark.parametrize("end", ["close", "drop"])
def test_files_that_are_not_kept_go_with_their_store(tmp_path, end):
    for keeps_files in (True, False):
        store = TieredStore(FORMAT, 0, disk_directory=tmp_path, keeps_files=keeps_files)
        assert store.keys() == []
        store.put("a", payload_of(2), {})
        if end == "close":
            store.close()
        del store
        assert len(list(tmp_path.glob("*.kvblocks"))) == keeps_files
        with stores_on(tmp_path) as open_store:  # The directory is free again.
            open_store().clear()


def test_a_forked_process_leaves_the_files_of_its_parent(open_store, tmp_path, monkeypatch):
    store = open_store(keeps_files=False)
    store.put("a", payload_of(2), {})
    monkeypatch.setattr(disk.os, "getpid", lambda: -1)
    store.close()
    assert file_of(tmp_path).exists()


def test_a_directory_stays_the_same_when_the_process_goes_elsewhere(tmp_path, monkeypatch):
    (tmp_path / "elsewhere" / "tier").mkdir(parents=True)
    others = tmp_path / "elsewhere" / "tier" / "others.kvblocks"
    others.write_bytes(b"not of this tier")
    monkeypatch.chdir(tmp_path)
    store = TieredStore(FORMAT, 0, disk_directory="tier", keeps_files=False)
    monkeypatch.chdir(tmp_path / "elsewhere")
    store.put("a", payload_of(2), {})
    assert bits(store.get("a")[0]) == bits(payload_of(2))
    assert file_of(tmp_path / "tier").exists()
    store.close()
    assert others.exists() and [path.name for path in (tmp_path / "tier").iterdir()] == ["lock"]
