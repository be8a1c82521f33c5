"""Which backend computes a call."""

import dataclasses

import jax
from jax import lax

import ferrum_jax.attention.cpu as cpu
import ferrum_jax.attention.gpu as gpu
import ferrum_jax.attention.tpu as tpu
import ferrum_jax.attention.xla as xla
from ferrum_jax.attention.backend import AttentionBackend
from ferrum_jax.attention.call import AttentionCall
from ferrum_jax.ops.platforms import target_platform
from ferrum_jax.types import TokenFormat

# In the order in which they are asked. A kernel's name is that of its platform; XLA computes the
# calls that no kernel takes.
_KERNELS: tuple[AttentionBackend, ...] = (cpu, gpu, tpu)
_BACKENDS: tuple[AttentionBackend, ...] = (*_KERNELS, xla)

# JAX distinguishes GPUs by their makers in a program that is lowered for one platform of several.
_LOWERED_FOR = {"gpu": "cuda"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class BackendChoice:
    """The backend of a call's rows of one token format, and why the others do not compute them.

    Attributes:
      token_format: How the rows' tokens are written.
      backend: Name of the backend.
      refusals: `(name, reason)` for each backend that refused.
    """

    token_format: TokenFormat
    backend: str
    refusals: tuple[tuple[str, str], ...]

    def __str__(self) -> str:
        reasons = "; ".join(f"not {name}: {reason}" for name, reason in self.refusals)
        return f"{self.token_format.name} rows: {self.backend}" + (reasons and f" ({reasons})")


@dataclasses.dataclass(frozen=True)
class BackendExplanation:
    """The backends of a call; its `str` is one line for each token format.

    Attributes:
      choices: One choice for each token format that the pool may hold.
    """

    choices: tuple[BackendChoice, ...]

    def __str__(self) -> str:
        return "\n".join(map(str, self.choices))


def attend_with(call: AttentionCall, backend: AttentionBackend | str | None) -> jax.Array:
    """Computes attention of rows of one format; see `paged_attention`.

    Args:
      call: Checked arguments, on one device.
      backend: Name or backend that must compute the call; None for the first kernel that takes it
        on the platform that the program is lowered for, and XLA if none does.

    Returns:
      [R, T, H, G, D], dtype `call.out_dtype`.

    Raises:
      ValueError: The backend is unknown, does not take the call, or returns another shape or dtype.
    """
    if backend is not None:
        required = _required(call, backend)
        if refusal := required.prepare(call):
            raise _refused(required, refusal)
        out = required.attend(call)
        if (out.shape, out.dtype) != (call.q.shape, call.out_dtype):
            raise ValueError(
                f"backend {required.name!r} returned {out.dtype}{list(out.shape)} for a call that "
                f"needs {call.out_dtype}{list(call.q.shape)}. Mend its attend."
            )
        return out
    kernels = {
        _LOWERED_FOR.get(kernel.name, kernel.name): kernel.attend
        for kernel in _KERNELS
        if kernel.accepts(call) is None and kernel.prepare(call) is None
    }
    if not kernels:
        return xla.attend(call)
    return lax.platform_dependent(call, default=xla.attend, **kernels)


def choose(call: AttentionCall, backend: AttentionBackend | str | None) -> BackendChoice:
    """Returns the backend that `attend_with` takes, as far as that is known without `prepare`."""
    if backend is not None:
        required, refusals = _required(call, backend), ()
    else:
        asked = [(known, known.accepts(call)) for known in _KERNELS]
        target = target_platform()
        required = next((x for x, refusal in asked if not refusal and x.name == target), xla)
        refusals = tuple(
            (x.name, refusal or f"this program is for {target}")
            for x, refusal in asked
            if x is not required
        )
    return BackendChoice(token_format=call.token_format, backend=required.name, refusals=refusals)


def _required(call: AttentionCall, backend: AttentionBackend | str) -> AttentionBackend:
    """Returns the backend of a name, or the given one; raises ValueError if it refuses a call."""
    by_name = {known.name: known for known in _BACKENDS}
    chosen = by_name.get(backend) if isinstance(backend, str) else backend
    if isinstance(chosen, type) or not isinstance(chosen, AttentionBackend):
        raise ValueError(
            f"backend {backend!r} is unknown; there are {', '.join(by_name)}. Give one of "
            "these names, an object with the attributes of AttentionBackend, or None."
        )
    if refusal := chosen.accepts(call):
        raise _refused(chosen, refusal)
    return chosen


def _refused(backend: AttentionBackend, refusal: str) -> ValueError:
    """Returns the error of a named backend that does not take a call."""
    return ValueError(
        f"backend {backend.name!r} does not take this call: {refusal}. Change the call, or give "
        'another backend: "xla" takes every call, and None the fastest backend that takes it.'
    )
