"""A device on which a test can make any program, read or copy fail.

Every call of a device by this process is seen: programs (jitted functions, and single operations
such as `x[0]`), reads (`np.asarray`, `int`, `bool`, `jax.device_get`), copies to the device
(`jax.device_put`) and waits for it (`jax.block_until_ready`). A call inside another one, such as
the reads inside `jax.device_get`, is part of the outer call.

    with observed_device() as device:
        ...
        with device.failing(3, Fault.BEFORE) as failure:
            manager.extend(handle, 4)  # Its third call of the device fails.
        assert failure.has_happened

`observed_device` discards compiled programs, so a module should enter it once. A random program
makes its calls by `failure_checks.call_failing`.
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
    """How a call of the device fails."""

    BEFORE = "it fails before it begins"
    AFTER = "it is a program that loses its result and its donated arguments"
    INTERRUPT = "Ctrl-C comes while it runs"
    UNREADABLE = "it is a program that runs, but its result cannot be read"

    @property
    def errors(self) -> tuple[type[BaseException], ...]:
        """Errors that a manager may raise."""
        if self is Fault.INTERRUPT:
            return (KeyboardInterrupt,)
        return jax.errors.JaxRuntimeError, CacheLostError


@dataclasses.dataclass
class Failure:
    """A fault, and the calls of the device before it.

    Attributes:
      at: Number of the call that fails, from 1; only programs count for faults of programs.
      fault: How it fails.
      calls: The calls so far, by name.
      has_happened: Whether it has failed.
    """

    at: int
    fault: Fault
    calls: list[str] = dataclasses.field(default_factory=list)
    has_happened: bool = False


class ObservedDevice:
    """Observes all calls of devices by this thread; see `observed_device`."""

    def __init__(self) -> None:
        self._failure: Failure | None = None
        self._thread = threading.current_thread()
        self._is_inside = False
        self._unreadable: dict[int, jax.Array] = {}

    @contextlib.contextmanager
    def failing(self, at: int, fault: Fault) -> Iterator[Failure]:
        """Makes the `at`-th call inside fail; 0 only records the calls."""
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
        """As `call`; unreadable arguments make the result unreadable, or raise when read.

        Holds until the next `failing`, also outside `failing`.
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
    """Observes every call of a device inside; programs are compiled again."""
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
        # Without this, a function that has run once runs again without Python.
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
