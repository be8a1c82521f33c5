"""Turns the `ok` of an operation into an exception, on the host."""

import jax
import numpy as np
from jax.core import Tracer

from ferrum_jax.checks import check_live, check_type
from ferrum_jax.errors import RefusedError
from ferrum_jax.state import CacheState

# Free rows that an error lists by number.
_MAX_LISTED = 8


def require(ok: jax.Array | np.ndarray | bool, what: str, state: CacheState | None = None) -> None:
    """Raises unless an operation succeeded. Reads `ok`, so it waits for the device.

    Args:
      ok: bool[...]. The `ok` that `allocate`, `extend`, `fork`, `share` or `truncate` returned, or
        `Generated.ok`. Every element must be true.
      what: The call, for the error: "allocate rows 0 and 1 for 20 tokens each".
      state: The state that the operation returned; if given, the error says how much is free.

    Raises:
      RefusedError: `ok` is false. The text says what was asked, what is free, and what to do.
      ValueError: `ok` is not a bool, or is traced (inside `jit`), or the state was consumed by a
        later call.

    Example:
      >>> import ferrum_jax as fj
      >>> spec = fj.CacheSpec(num_layers=1, num_kv_heads=1, head_dim=4, dtype="float32",
      ...                     num_blocks=4, block_size=4, max_seqs=2, max_blocks_per_seq=4)
      >>> state, ok = fj.allocate(fj.init(spec), [0, 1], [5, 3])
      >>> fj.require(ok, "allocate rows 0 and 1 for 5 and 3 tokens", state)
    """
    if isinstance(ok, Tracer):
        raise ValueError(
            "require reads ok on the host; inside jit its value is not known. Return ok from the "
            "jitted function, and call require outside."
        )
    if not isinstance(ok, (bool, np.bool_, np.ndarray, jax.Array)) or np.asarray(ok).dtype != bool:
        raise ValueError(
            f"ok must be the bool that an operation returned, got {type(ok).__name__}. Unpack "
            "what the operation returns: `state, ok = ...`."
        )
    if np.all(np.asarray(ok)):
        return
    room = "" if state is None else f" {_room(state)}"
    raise RefusedError(
        f"Not ok: {what}.{room} Free rows, ask for less, or make the cache larger. A row must be "
        "free for `allocate`, and hold tokens for `extend`, `fork` and `generate`."
    )


def _room(state: CacheState) -> str:
    """Returns a sentence that says how many blocks and rows are free."""
    check_type("state", state, CacheState)
    check_live("state", state)
    first = state.page_tables[0]
    num_free, lens = jax.device_get(([t.num_free for t in state.page_tables], state.seq_lens))
    rows = np.flatnonzero(lens == 0).tolist()
    listed = ", ".join(map(str, rows[:_MAX_LISTED])) + ", ..." * (len(rows) > _MAX_LISTED)
    pools = zip(num_free, state.page_tables, strict=True)
    blocks = " and ".join(f"{free} of {tables.num_blocks}" for free, tables in pools)
    return (
        f"{blocks} blocks ({first.block_size} tokens each) and "
        f"{len(rows)} of {first.max_seqs} rows are free{f' ({listed})' if rows else ''}; a row "
        f"holds at most {first.max_blocks_per_seq} blocks."
    )
