"""Copies of handles, and managers, which cannot be copied."""

import copy
import gc
import pickle

import pytest

from ferrum_jax.errors import InvalidHandleError
from ferrum_jax.manager.aio import AsyncKvCacheManager
from tests.support.managers import make_manager, start
from tests.support.multi_device import make_multi

COPIES = {
    "clone_handle": lambda handle: handle.clone_handle(),
    "copy": copy.copy,
    "deepcopy": copy.deepcopy,
    "deepcopy of a list": lambda handle: copy.deepcopy([handle, handle])[1],
}


@pytest.mark.parametrize("kind", COPIES)
def test_gc_keeps_a_request_while_a_copy_of_its_handle_exists(kind):
    manager = make_manager()
    handle = start(manager, "a", 4)
    other = COPIES[kind](handle)
    assert other is not handle and other.cache_id() == handle.cache_id()
    del handle
    gc.collect()
    assert manager.gc().caches_freed == 0
    manager.extend(other, 1)
    assert other.num_tokens() == 5
    del other
    gc.collect()
    assert manager.gc().caches_freed == 1
    manager.check()


@pytest.mark.parametrize("kind", COPIES)
def test_a_handle_is_not_copied_after_deallocate(kind):
    manager = make_manager()
    handle = start(manager, "a", 4)
    manager.deallocate("a")
    with pytest.raises(InvalidHandleError, match="after the request was deallocated"):
        COPIES[kind](handle)


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_a_handle_cannot_be_pickled(protocol):
    handle = start(make_manager(), "a", 4)
    with pytest.raises(TypeError, match="PagedKvCacheHandle.* cannot be pickled.*get_handle"):
        pickle.dumps(handle, protocol)


@pytest.mark.parametrize("duplicate", [copy.copy, copy.deepcopy, pickle.dumps])
@pytest.mark.parametrize(
    "make",
    [make_manager, lambda: make_multi(1), lambda: AsyncKvCacheManager(make_manager())],
    ids=["one device", "several devices", "async"],
)
def test_a_manager_cannot_be_copied_or_pickled(make, duplicate):
    with pytest.raises(TypeError, match="Manager cannot be copied or pickled.*Share the object"):
        duplicate(make())
