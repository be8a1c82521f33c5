"""The methods of all managers by which requests share blocks, and by which they cease to."""

from __future__ import annotations

from collections.abc import Hashable, Sequence

from ferrum_jax.checks import check_count, check_items, check_key, check_type
from ferrum_jax.manager.handle import PagedKvCacheHandle, RequestLike
from ferrum_jax.manager.pools import Pools
from ferrum_jax.manager.uncopied import Uncopied
from ferrum_jax.types import RequestId


class SharingFront(Uncopied):
    """Methods of `ManagerFront` about shared blocks.

    Args:
      pools: The pools of the manager.

    Attributes:
      pools: As given; for the package's own use.
    """

    def __init__(self, pools: Pools):
        self.pools = pools

    def reset_prefixes(self, salt: str | None = None) -> None:
        """Removes cached prefixes, so that nothing computed before is found again.

        For example when a tenant leaves. Blocks that no request uses are freed at once, pinned ones
        too. Live requests keep their blocks and go on, but what they hold now,
        and compute on top of it, never joins the prefix cache, nor do requests that share it later:
        deallocate and allocate them again for that. `explain_lookup` says that prompts were reset.

        Args:
          salt: Prefixes of this salt are removed; if absent, those of every salt and of none.
        """
        if salt is not None:
            check_type("salt", salt, str)
        self.pools.change_each(lambda device: device.reset_prefixes(salt))

    def set_weights_version(self, version: Hashable) -> None:
        """Sets the version of the model's weights, which every cached block carries; None at first.

        Call it when the weights change, between two steps. Prefixes of other versions are not found
        from then on, are evicted before any others, and lose their pins. If a version is set again,
        what is still cached of it is found again. Live requests go on, resident or swapped out, but
        what they hold and compute on top of it never joins the prefix cache: deallocate and
        allocate them again for that. `explain_lookup` says that a version was the reason.

        Args:
          version: Any key, for example a number; to set the present one again changes nothing.
        """
        check_key("version", version)
        self.pools.change_each(lambda device: device.prefixes.set_version(version, device.requests))

    def share_prefix(self, source: RequestLike, target: RequestLike, shared_tokens: int) -> None:
        """Puts the first tokens of a request into another one; waits for the device.

        Full blocks are shared, the rest is copied, and the target's blocks that are replaced are
        freed. Cached blocks of the target stay: they hold the same tokens. Blocks that are shared
        before they are cached can be cached once a single request holds them again.

        Args:
          source: The request that has the tokens, by id or handle.
          target: The request that is to hold them, on the same device.
          shared_tokens: Leading tokens to share; at most either sequence's length.

        Raises:
          UnknownRequestError: If either request is not live.
          InvalidHandleError: If a handle is of another manager, or its request was deallocated.
          SwappedOutError: If either request is swapped out.
          GeometryMismatchError: If the requests are on different devices.
          PrefixMismatchError: If both are one request, have different salts or versions of the
            weights, or are known to begin with different tokens.
          CompressionError: If either request is compressed.
          RefusedError: If a sliding window of the source has passed what the next token would see.
          ValueError: If `shared_tokens` is more than a sequence's length.
          OutOfBlocksError: If no block is available for a copy.
        """
        shared_tokens = check_count("shared_tokens", shared_tokens, minimum=0)
        with self.pools.home_of([source, target]) as device, device.access.changing():
            device.share_prefix(source, target, shared_tokens)

    def fork(self, source: RequestLike, new_ids: Sequence[RequestId]) -> list[PagedKvCacheHandle]:
        """Starts requests with all tokens of another one, in one program, or none of them.

        For several samples of one prompt, or for beams. Full blocks are shared, and a partly filled
        last block is copied. Each new request is in all else like the source: salt, priority,
        limit, what is known of its tokens and of compression. It may be extended at once.

        Commit before the fork: what requests share outside the prefix cache can be cached once a
        single one of them holds it. The call does not wait for the device, nor for room, not even
        in `AsyncKvCacheManager`.

        Args:
          source: The request that has the tokens, by id or handle.
          new_ids: Ids of the requests to start, on the same device.

        Returns:
          A handle of each new request. Its `num_cached_tokens` are those that the source has
          computed.

        Raises:
          UnknownRequestError: If the source is not live.
          InvalidHandleError: If its handle is of another manager, or the request was deallocated.
          SwappedOutError: If the source is swapped out.
          DuplicateRequestError: If a new id is live, on any device, or named twice.
          RefusedError: If no step has computed the tokens of a block that would be shared.
          OutOfBlocksError: If too few blocks are available for the copies.
          OutOfRowsError: If there are too few rows.
          OutOfHostMemoryError: If a less urgent request cannot be stored.
        """
        new_ids = check_items("new_ids", new_ids)
        for new_id in new_ids:
            check_key("new_ids", new_id)
        return self.pools.fork(source, new_ids)
