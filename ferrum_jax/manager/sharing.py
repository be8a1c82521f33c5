"""The methods of a manager by which requests share blocks, and leave them to others for a while."""

from __future__ import annotations

from collections.abc import Sequence

import ferrum_jax.manager.kinship as kinship
from ferrum_jax.checks import check_count, check_type
from ferrum_jax.config import PrefixCacheConfig
from ferrum_jax.interfaces import KvCacheHandle
from ferrum_jax.manager.admission import require_alike, require_as_known, require_computed
from ferrum_jax.manager.core import ManagerCore
from ferrum_jax.policies.blocks import Retention
from ferrum_jax.prefix.report import LookupReport
from ferrum_jax.tokens import TokenIds
from ferrum_jax.types import RequestId


class Sharing(ManagerCore):
    """Prefix caching, sharing and swapping."""

    def enable_prefix_caching(self, config: PrefixCacheConfig) -> None:
        """Begins to keep prompt prefixes, or goes by another configuration from now on.

        Args:
          config: Which prefixes are kept.
        """
        check_type("config", config, PrefixCacheConfig)
        with self._changing():
            self._prefixes.cache.configure(config)

    def commit(
        self,
        handle: KvCacheHandle,
        token_ids: Sequence[int] = (),
        *,
        num_tokens: int | None = None,
        retention: Retention | None = None,
    ) -> int:
        """Keeps what was computed for later prompts: full blocks, from the first token on.

        Call it after prefill, and as tokens are generated. A block that another request has
        committed meanwhile takes the place of this one's, so that equal content is kept once.
        Without prefix caching it only remembers the tokens. It waits for the device when there
        are blocks to keep.

        Args:
          handle: A handle of the request.
          token_ids: What follows the tokens that are known already, the prompt at first.
          num_tokens: How many of all these tokens, the first ones, have keys and values that a step
            has written, or is writing. If absent, as many as the manager finds: it knows how long
            the request was when a step last had its row, and, with
            `ManagerOptions.scrub_freed_blocks` and in a pool of floats, which of its slots are not
            zero. Without scrubbing, pass the number where a prompt is computed in chunks.
          retention: How long all of it is kept; as configured if absent. It holds too for what is
            cached anew when the request was away meanwhile.

        Returns:
          Tokens that are kept, from the beginning.

        Raises:
          InvalidHandleError: If the request was deallocated.
          PrefixMismatchError: If the request is known to hold other tokens, from the prefix cache
            or from a request with which it shares.
          ValueError: If more tokens are named than the request holds, or `num_tokens` is more than
            are computed, as far as the manager can know.
        """
        if retention is not None:
            check_type("retention", retention, Retention)
        if num_tokens is not None:
            num_tokens = check_count("num_tokens", num_tokens, minimum=0)
        with self._changing():
            entry = self._entry_of(handle)
            tokens = require_as_known(entry, entry.tokens + token_ids)
            num_claimed = len(tokens) if num_tokens is None else min(num_tokens, len(tokens))
            num_computed, num_sure = self._prefixes.num_computed(entry, num_claimed)
            if num_tokens is not None:
                require_computed(entry, num_tokens, len(tokens), num_computed)
            before = entry.tokens, entry.num_computed_tokens
            entry.tokens = tokens
            entry.num_computed_tokens = max(num_sure, entry.num_computed_tokens)
            try:
                self._prefixes.commit(entry, retention)
            except BaseException:
                entry.tokens, entry.num_computed_tokens = before
                raise
            if retention is not None:
                entry.retention, entry.num_retained_tokens = retention, entry.num_computed_tokens
            kinship.tell(entry)
            self._note_use([entry])
            return entry.lease.num_blocks * self._cache.counts.block_size

    def reset_prefixes(self, salt: str | None = None) -> None:
        """Drops what is cached of prompts, so that nothing computed before is found again.

        For new weights of the model, say. Blocks that no request uses are free at once, pinned ones
        too. Live requests keep their blocks and go on, those that are swapped out too, but what
        they hold now, and compute on top of it, never joins the prefix cache, nor do those that
        share it later: deallocate and allocate them again for that. `explain_lookup` says that
        prompts were reset.

        Args:
          salt: The salt whose prompts are dropped; those of every salt, and without one, if absent.
        """
        if salt is not None:
            check_type("salt", salt, str)
        with self._changing():
            self._prefixes.reset(salt, self._residents())
            for entry in self._entries.values():
                if salt in (None, entry.request.cache_salt):
                    entry.may_be_cached, entry.blocks_away = False, ()

    def explain_lookup(
        self, token_ids: Sequence[int], cache_salt: str | None = None
    ) -> LookupReport:
        """Says what `allocate` would find cached of a prompt now, and why not more.

        For operators: it also tells when other salts have it.

        Args:
          token_ids: The prompt.
          cache_salt: Whose.
        """
        if cache_salt is not None:
            check_type("cache_salt", cache_salt, str)
        with self._looking():
            return self._prefixes.explain(TokenIds(token_ids), cache_salt)

    def share_prefix(self, source: RequestId, target: RequestId, shared_tokens: int) -> None:
        """Lets a sequence hold the beginning of another one; waits for the device.

        Full blocks are shared, the rest is copied, and the target's blocks that are so replaced
        go back to the pool. What the target holds of cached blocks already stays: it has the same
        tokens. Blocks that are shared before they are cached can be cached once they have one
        holder again.

        Args:
          source: Whose tokens are shared.
          target: Who holds them from now on.
          shared_tokens: How many; at most either sequence's length.

        Raises:
          UnknownRequestError: If either request is not live.
          SwappedOutError: If either is not on the device.
          PrefixMismatchError: If both are one request, have different salts, or are known to
            begin with different tokens.
          ValueError: If `shared_tokens` passes a sequence's length.
          OutOfBlocksError: If a block is needed for a copy and there is none.
        """
        shared_tokens = check_count("shared_tokens", shared_tokens, minimum=0)
        with self._changing():
            giver, taker = self._resident(source), self._resident(target)
            require_alike(giver, taker, shared_tokens)
            num_new = self._cache.queries.num_blocks_to_share(taker.seq_id, shared_tokens)
            priority = taker.request.priority
            self._make_room("share_prefix", num_new, priority, but=(giver, taker))
            self._prefixes.share(giver, taker, shared_tokens)
            self._note_use((giver, taker))

    # Swapping.

    def swap_out(self, request_id: RequestId) -> None:
        """Moves a request's bytes to host memory, or from there to disk, and frees its blocks.

        Its handles stay valid: they tell its tokens, and cannot be computed with. A request that
        is swapped out already stays so.

        Args:
          request_id: The caller's key.

        Raises:
          UnknownRequestError: If no such request is live.
          OutOfHostMemoryError: If no tier has room for it; it stays on the device.
        """
        with self._changing():
            entry = self._known(request_id)
            if entry.is_resident:
                self._swapping.swap_out([entry])

    def swap_in(self, request_id: RequestId) -> None:
        """Moves a request's bytes back to the device, bit for bit.

        A request that is there already stays so.

        Args:
          request_id: The caller's key.

        Raises:
          UnknownRequestError: If no such request is live.
          OutOfBlocksError: If too few blocks are free and none can be evicted.
          OutOfRowsError: If as many sequences are held as may be.
          OutOfHostMemoryError: If a less urgent request cannot be stored; all stay where they are.
          CorruptFileError: If its file is not what was written; it stays swapped out.
        """
        with self._changing():
            entry = self._known(request_id)
            if entry.is_resident:
                return
            shape = entry.shape
            num_new = self._cache.counts.blocks_for(shape.num_tokens, shape.token_format)
            victims = self._victims_for(entry.request, num_new)
            needs_room = bool(victims) or num_new > self._cache.counts.num_free
            # It may fail: before anything goes for it.
            payload = self._swapping.read(entry, checks=needs_room)
            self._room.make(num_new, victims)
            self._swapping.swap_in(entry, payload)
            self._note_use([entry])
