"""A device that fails when a test says so: every program and every read of it can be made to.

All that this process asks of a device is seen here: programs (jitted functions, and single
operations such as `x[0]`), reads (`np.asarray`, `int`, `bool`, `jax.device_get`), copies to it
(`jax.device_put`) and waits for it (`jax.block_until_ready`). One of these inside another, such
as the reads inside `jax.device_get`, is part of that one.

    with observed_device() as device:
        ...
        with device.failing(3, Fault.BEFORE) as failure:
            manager.extend(handle, 4)  # Its third call of the device fails, if it makes so many.
        assert failure.has_happened

`observed_device` forgets what is compiled, so that a module enters it once. A random program
draws `at` and a fault for its next operation, and makes the call by `failures.call_failing`, which
says what has become of it: a call that was not made is made again, and goes as it would have gone;
one that was interrupted may have been made; a manager that is lost is closed, and the program ends.
"""

import contextlib
import dataclasses
import enum
import signal
import threading
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ferrum_jax.errors import CacheLostError

_NO_MEMORY = "RESOURCE_EXHAUSTED: Out of memory while trying to allocate 1 bytes."


class Fault(enum.Enum):
    """What goes wrong with a call of the device."""

    BEFORE = "it fails before it begins"
    AFTER = "it is a program, and loses its result and what was donated to it"
    INTERRUPT = "Ctrl-C comes while it runs"
    UNREADABLE = "it is a program that seems to run, and nothing can be read of what it returns"

    @property
    def errors(self) -> tuple[type[BaseException], ...]:
        """What a manager may raise then."""
        if self is Fault.INTERRUPT:
            return (KeyboardInterrupt,)
        return jax.errors.JaxRuntimeError, CacheLostError


@dataclasses.dataclass
class Failure:
    """A fault that waits for its call.

    Attributes:
      at: Which call of the device fails, the first one being 1; of programs alone, if the fault
        is one of these.
      fault: How it fails.
      calls: The calls so far, by name.
      has_happened: Whether it has failed.
    """

    at: int
    fault: Fault
    calls: list[str] = dataclasses.field(default_factory=list)
    has_happened: bool = False


class ObservedDevice:
    """Sees all calls of the devices that this thread makes; see `observed_device`."""

    def __init__(self) -> None:
        self._failure: Failure | None = None
        self._thread = threading.current_thread()
        self._is_inside = False
        self._unreadable: dict[int, jax.Array] = {}

    @contextlib.contextmanager
    def failing(self, at: int, fault: Fault) -> Iterator[Failure]:
        """Makes the `at`-th call inside fail; 0 for none, which counts them."""
        self._failure = failure = Failure(at, fault)
        self._unreadable.clear()
        before = signal.signal(signal.SIGINT, signal.default_int_handler)
        try:
            yield failure
        finally:
            self._failure = None
            signal.signal(signal.SIGINT, before)

    def call(self, name: str, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Calls a function that uses the device, or fails."""
        failure = self._failure
        is_seen = failure is not None and threading.current_thread() is self._thread
        if not is_seen or self._is_inside:
            return function(*args, **kwargs)
        is_program = name.startswith("jit(")
        if failure.fault in (Fault.AFTER, Fault.UNREADABLE) and not is_program:
            return function(*args, **kwargs)
        failure.calls.append(name)
        fault = failure.fault if len(failure.calls) == failure.at else None
        failure.has_happened |= fault is not None
        if fault is Fault.BEFORE:
            raise jax.errors.JaxRuntimeError(_NO_MEMORY)
        self._is_inside = True
        try:
            result = function(*args, **kwargs)
        finally:
            self._is_inside = False
        if fault is Fault.AFTER:
            raise jax.errors.JaxRuntimeError("INTERNAL: The device has failed.")
        if fault is Fault.INTERRUPT:
            signal.raise_signal(signal.SIGINT)
        if fault is Fault.UNREADABLE:
            self._spoil(result)
        return result

    def spoiled(self, name: str, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Does what `call` does; what cannot be read makes unreadable, or raises.

        It does so until the next `failing`, outside `failing` too.
        """
        is_spoiled = bool(self._unreadable) and any(
            self._unreadable.get(id(x)) is x for x in jax.tree.leaves((args, kwargs))
        )
        if is_spoiled and not name.startswith("jit("):
            raise jax.errors.JaxRuntimeError("INTERNAL: The device has failed.")
        result = self.call(name, function, *args, **kwargs)
        if is_spoiled:
            self._spoil(result)
        return result

    def _spoil(self, result: Any) -> None:
        self._unreadable.update((id(x), x) for x in jax.tree.leaves(result))


@contextlib.contextmanager
def observed_device() -> Iterator[ObservedDevice]:
    """Sees every call of a device until it ends; what was compiled before is compiled again."""
    from jax._src import pjit
    from jax._src.interpreters import pxla

    device = ObservedDevice()

    def seen(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            if any(isinstance(x, jax.core.Tracer) for x in jax.tree.leaves((args, kwargs))):
                return function(*args, **kwargs)
            return device.spoiled(name, function, *args, **kwargs)

        return call

    def read(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(a: Any, *args: Any, **kwargs: Any) -> Any:
            if isinstance(a, array_type):
                return device.spoiled("read", function, a, *args, **kwargs)
            return function(a, *args, **kwargs)

        return call

    array_type: Any = type(jnp.zeros(()))
    value, execute = array_type._value, pxla.ExecuteReplicated.__call__
    with pytest.MonkeyPatch.context() as patch:
        # Else a function that has run once runs again without Python.
        patch.setattr(pjit, "_get_fastpath_data", lambda *args: None)
        patch.setattr(
            pxla.ExecuteReplicated,
            "__call__",
            lambda program, *args: device.spoiled(program.name, execute, program, *args),
        )
        patch.setattr(
            array_type, "_value", property(lambda x: device.spoiled("read", value.fget, x))
        )
        for name in ("asarray", "array"):
            patch.setattr(np, name, read(getattr(np, name)))
        for name in ("device_get", "device_put", "block_until_ready"):
            patch.setattr(jax, name, seen(name, getattr(jax, name)))
        jax.clear_caches()
        yield device
    jax.clear_caches()
