"""One of two processes that decode together: `two_processes.py <rank> <port>`. Prints JSON."""

import json
import sys

import jax
import numpy as np
from jax.sharding import AxisType

import ferrum_jax as fj
from ferrum_jax.sharding import check_replicated, init_sharded
from tests.support import sharded_llama
from tests.support.pools import keys


def check(tree) -> str | None:
    """Returns the message of `check_replicated`, or None if it accepts `tree`."""
    try:
        check_replicated(tree)
    except AssertionError as error:
        return str(error)
    return None


def main(rank: int, port: str) -> None:
    """Decodes, then makes the processes' tables differ in several ways."""
    jax.distributed.initialize(f"127.0.0.1:{port}", num_processes=2, process_id=rank)
    mesh = jax.make_mesh((4,), ("tp",), axis_types=(AxisType.Auto,))
    model_fn, params = sharded_llama.model()
    state = init_sharded(sharded_llama.SPEC, mesh, "tp")
    num_local = len(keys(state.pool).addressable_shards)
    logits, tokens, state = sharded_llama.decode(model_fn, params, state)
    said = {"after decoding": check(state)}

    longer, _ = fj.extend(state, [0], [1 + rank], max_new_tokens=2)
    said["after extending differently"] = check(longer)
    other, _ = fj.allocate(state, [1, 3][: 1 + rank], [3] * (1 + rank))
    said["after allocating differently"] = check(other)
    said["before it happens"] = check({"seq_ids": np.asarray([0, rank])})
    said["of another length"] = check({"seq_ids": np.arange(1 + rank)})
    said["again as one"] = check(state)
    print(json.dumps({"tokens": tokens.tolist(), "logits": logits.tolist(), "said": said,
                      "local": num_local}))  # fmt: skip


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2])
