"""Replays a trace of requests through the prefix cache, to compare block policies.

`python -m ferrum_jax.replay --help` is the command line.
"""

from ferrum_jax.replay.traces import (
    OPTIMUM,
    TracedRequest,
    format_table,
    optimal_hit_rate,
    read_trace,
    replay,
    replay_all,
)

__all__ = [
    "OPTIMUM",
    "TracedRequest",
    "format_table",
    "optimal_hit_rate",
    "read_trace",
    "replay",
    "replay_all",
]
