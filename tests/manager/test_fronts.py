"""The three managers offer the same methods: parameters, defaults and first words of docstrings."""

import inspect

import pytest

from ferrum_jax.manager import (
    AsyncKvCacheManager,
    MultiDevicePagedKvCacheManager,
    PagedKvCacheManager,
)

ONE, SEVERAL, ASYNC = PagedKvCacheManager, MultiDevicePagedKvCacheManager, AsyncKvCacheManager


def public_names(cls: type) -> set[str]:
    return {name for name in dir(cls) if not name.startswith("_")}


ONLY_ONE = {
    *("allocate_blocks", "free_blocks", "free_block_count", "total_block_count", "block_size"),
    *("holds", "move_to", "add_room_listener", "num_room_changes", "is_lost", "preempts"),
    "caches_prefixes",
}
ONLY_SEVERAL = {
    *("supported_devices", "set_device_preference", "get_cache_device", "device_stats"),
    *("move_cache", "plan_rebalance", "rebalance_devices", "last_rebalance"),
}
# What an event loop needs no coroutine for: the wrapped manager is at hand as `manager`.
NOT_ASYNC = {
    *("holds", "move_to", "add_room_listener", "num_room_changes", "is_lost", "preempts"),
    "caches_prefixes",
}
ONLY_ASYNC = {"manager", "num_waiting", "hold", "block_table"}
AT_ONCE = {
    *("new_request", "can_allocate", "get_handle", "list_handles", "stats", "compression_stats"),
    *("set_pressure_callback", "free_block_count", "total_block_count", "block_size"),
    *("supported_devices", "get_cache_device", "device_stats"),
}

# Parameters that one front adds to those of `PagedKvCacheManager`.
MORE_OF_SEVERAL = {"new_request": {"device"}}
WAITING = ("allocate", "extend", "extend_all", "swap_in")
MORE_OF_ASYNC = {
    "new_request": {"device"},
    "allocate_blocks": {"priority", "timeout_seconds"},
    **{name: {"timeout_seconds"} for name in WAITING},
}


def test_each_manager_offers_the_methods_of_the_others():
    one, several, asynchronous = map(public_names, (ONE, SEVERAL, ASYNC))
    assert one - several == ONLY_ONE and several - one == ONLY_SEVERAL
    assert (one | several) - asynchronous == NOT_ASYNC
    assert asynchronous - (one | several) == ONLY_ASYNC


def parameters_of(cls: type, name: str, without: set[str]) -> list[inspect.Parameter]:
    """A method's parameters, without annotations and without some that are keyword-only."""
    parameters = inspect.signature(getattr(cls, name)).parameters
    added = {parameters[extra].kind for extra in without}
    assert added <= {inspect.Parameter.KEYWORD_ONLY}
    kept = [parameter for extra, parameter in parameters.items() if extra not in without]
    return [parameter.replace(annotation=inspect.Parameter.empty) for parameter in kept]


def methods_in(*classes: type) -> list[str]:
    names = set.intersection(*map(public_names, classes))
    return sorted(name for name in names if inspect.isfunction(getattr(classes[0], name)))


@pytest.mark.parametrize("name", methods_in(ONE, SEVERAL))
def test_a_method_of_several_devices_has_the_parameters_of_that_of_one(name):
    more = MORE_OF_SEVERAL.get(name, set())
    assert parameters_of(SEVERAL, name, more) == parameters_of(ONE, name, set())


@pytest.mark.parametrize("base", [ONE, SEVERAL])
def test_an_async_method_has_the_parameters_of_that_of_the_manager(base):
    for name in methods_in(base, ASYNC):
        more = (
            MORE_OF_ASYNC.get(name, set())
            - inspect.signature(getattr(base, name)).parameters.keys()
        )
        assert parameters_of(ASYNC, name, more) == parameters_of(base, name, set()), name
        assert inspect.iscoroutinefunction(getattr(ASYNC, name)) == (name not in AT_ONCE), name


@pytest.mark.parametrize("name", sorted(set(methods_in(ONE)) | set(methods_in(SEVERAL))))
def test_docstrings_of_a_method_begin_alike_in_all_managers(name):
    methods = [getattr(cls, name) for cls in (ONE, SEVERAL, ASYNC) if name in public_names(cls)]
    first_words = {inspect.getdoc(method).split()[0] for method in methods}
    assert len(first_words) == 1, first_words
