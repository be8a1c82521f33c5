"""Tunix (google-tunix) on a paged cache: its models, and a rollout engine for its RL training.

`PagedRollout` is given as `ClusterConfig(rollout_engine=...)`. `tunix_model` and `cache_layers` are
for loops of your own. Needs the extra `tunix`.
"""

from ferrum_jax.integrations.tunix.layers import cache_layers
from ferrum_jax.integrations.tunix.model import TunixModel, tunix_model
from ferrum_jax.integrations.tunix.rollout import PagedRollout, PagedRolloutOptions

__all__ = ["PagedRollout", "PagedRolloutOptions", "TunixModel", "cache_layers", "tunix_model"]
