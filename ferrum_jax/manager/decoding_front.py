"""The methods of all managers that run a model on requests."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ferrum_jax.checks import check_items, check_type
from ferrum_jax.decoding.generate import GeneratedTokens, GenerateOptions, generate
from ferrum_jax.decoding.logprobs import Chosen
from ferrum_jax.decoding.models import ModelFn
from ferrum_jax.decoding.prefill import PrefillOptions, prefill, token_ids
from ferrum_jax.manager.handle import RequestLike
from ferrum_jax.manager.pool import WholeStep
from ferrum_jax.manager.pools import Pools
from ferrum_jax.manager.refusals import require_decodable, require_length
from ferrum_jax.manager.requests import LiveRequest
from ferrum_jax.ops.arguments import as_ids
from ferrum_jax.state import CacheState
from ferrum_jax.types import IdsLike


class DecodingFront:
    """Methods of `ManagerFront` that run a model on requests.

    Attributes:
      pools: The pools of the manager; for the package's own use.

    Example:
      >>> from ferrum_jax import CacheConfig, CacheGeometry, PagedKvCacheManager
      >>> def model(params, tokens, batch):  # one layer; the next token is the same again
      ...     x = jax.nn.one_hot(tokens, 8)
      ...     batch = batch.write(0, x[:, :, None], x[:, :, None])
      ...     return batch.last(x), batch.pools
      >>> manager = PagedKvCacheManager(
      ...     CacheConfig(block_size=4, max_blocks=8, initial_blocks=8),
      ...     CacheGeometry(num_layers=1, num_kv_heads=1, head_dim=8, dtype="float32",
      ...                   max_seqs=2, max_sequence_length=16))
      >>> handle = manager.allocate(manager.new_request("a", prompt_token_ids=[3, 1, 2]))
      >>> logits = manager.prefill(model, None, [handle])
      >>> options = GenerateOptions(max_new_tokens=4)
      >>> first = options.choose(logits)
      >>> manager.generate(model, None, ["a"], first, options=options).tokens.tolist()
      [[2, 2, 2, 2]]
    """

    pools: Pools

    def prefill(
        self,
        model_fn: ModelFn,
        params: Any,
        handles: Sequence[RequestLike | None],
        prompts: Sequence[Sequence[int]] | None = None,
        *,
        options: PrefillOptions | None = None,
    ) -> jax.Array:
        """Computes the prompts of requests, except tokens that are cached, and stores them.

        A prompt is the last tokens of its request: all of them after `allocate`, and a further turn
        after an `extend` by its length. A request that holds no token yet is extended chunk by
        chunk, so that layers with a sliding window never hold more than the window and a chunk;
        the call then waits for the device. See `ferrum_jax.prefill` for how prompts are packed, and
        what is compiled. Signal handlers, such as that of Ctrl-C, wait until it is done.

        Args:
          model_fn: The model. Static: pass the same function, or an equal one, at each call.
          params: Parameters of the model, a pytree.
          handles: The requests, each by handle or id, all on one device; None for a prompt that is
            computed but not stored, to compile ahead.
          prompts: Token ids of each prompt; those that each request was allocated with if absent.
          options: Shape of a step; the defaults of `PrefillOptions` if None.

        Returns:
          f32[R, vocab]. Logits for the token after each prompt; `GenerateOptions.choose` chooses
          from them.

        Raises:
          InvalidHandleError: If a request was deallocated, or is of another manager.
          UnknownRequestError: If no request of an id is live.
          SwappedOutError: If a request is swapped out.
          GeometryMismatchError: If the requests are on several devices.
          SequenceTooLongError: If a request without tokens may not hold its prompt.
          RefusedError: If such a request finds too few blocks.
          ValueError: If a prompt is not at the end of its request, a step has had its tokens
            already, or it is not known and not given.
          TypeError: If the model does not return `(logits, pools)`.
        """
        handles = check_items("handles", handles)
        with self.pools.home_of_step(handles, None) as home, home.access.changing():
            requests = home.requests_of(handles)
            new, starts, num_reserved = _parts(requests, _prompts_of(requests, prompts))

            def step(state: CacheState, seq_ids: np.ndarray) -> tuple[jax.Array, CacheState]:
                return prefill(
                    model_fn, params, state, seq_ids, new, starts=starts, options=options
                )

            grows = num_reserved > 0
            return home.run(WholeStep(step), handles, extends=grows, reserve_tokens=num_reserved)

    def generate(
        self,
        model_fn: ModelFn,
        params: Any,
        handles: Sequence[RequestLike | None],
        tokens: IdsLike | Chosen,
        *,
        options: GenerateOptions,
        key: jax.Array | None = None,
    ) -> GeneratedTokens:
        """Generates tokens until every request is done, in one program; waits for the device.

        The pool grows, and cached blocks are evicted, as far as the tokens need it. The first token
        of each request is the given one, as in `ferrum_jax.generate`; choose it from the logits of
        `prefill`. Where blocks run out, `ok` is false, and the tokens so far are valid: free
        blocks, and go on from `next`.

        Args:
          model_fn: The model. Static: pass the same function, or an equal one, at each call.
          params: Parameters of the model, a pytree.
          handles: Different requests, each by handle or id, all on one device; None for padding.
            The loop is compiled for each number of them.
          tokens: i32[R]. First token of each request, not stored yet; or what `options.choose`
            returned, or the `next` of an earlier call.
          options: Stop conditions and sampling.
          key: Typed keys [R] (`jax.random.key`), one per request, or one key, of which request
            number i has `fold_in(key, i)`; required if the temperature is above 0.

        Returns:
          The tokens, with their log-probabilities, and what to go on from.

        Raises:
          InvalidHandleError: If a request was deallocated, or is of another manager.
          UnknownRequestError: If no request of an id is live.
          SwappedOutError: If a request is swapped out.
          GeometryMismatchError: If the requests are on several devices.
          RefusedError: If a request holds no token, or tokens that no step has computed.
          SequenceTooLongError: If a request might pass its `max_sequence_length`.
          ValueError: If a typed key is missing, or there is not one token per request.
          TypeError: If the model does not return `(logits, pools)`.
        """
        handles = check_items("handles", handles)
        check_type("options", options, GenerateOptions)
        tokens = jax.device_get(tokens)  # The requests may have moved since these were chosen.
        num_new = _most_tokens(tokens, len(handles), options)
        options.sampling.check_key(key)
        if key is not None and not options.sampling.is_greedy and key.ndim == 0:
            key = jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(len(handles)))

        def step(state: CacheState, seq_ids: np.ndarray) -> tuple[CacheState, GeneratedTokens]:
            out = generate(model_fn, params, state, seq_ids, tokens, options=options, key=key)
            return out.state, out.without_state()

        with self.pools.home_of_step(handles, None) as home, home.access.changing():
            for request, count in zip(home.requests_of(handles), num_new, strict=True):
                if request is not None and count:
                    require_decodable(request)
                    require_length(request, int(count))
            reserved = int(num_new.max(initial=0))
            return home.run(WholeStep(step), handles, extends=True, reserve_tokens=reserved)


def _prompts_of(
    requests: Sequence[LiveRequest | None], prompts: Sequence[Sequence[int]] | None
) -> list[np.ndarray]:
    """Returns a prompt i32[T] per request: those given, or else those of the requests."""
    if prompts is None:
        prompts = [_own_prompt(request) for request in requests]
    prompts = check_items("prompts", prompts)
    if len(prompts) != len(requests):
        raise ValueError(f"prompts must be one per request, {len(requests)}, got {len(prompts)}.")
    return [token_ids(i, prompt) for i, prompt in enumerate(prompts)]


def _own_prompt(request: LiveRequest | None) -> Sequence[int]:
    """Returns the prompt that a request was allocated with; raises ValueError if it has none."""
    prompt = None if request is None else request.allocation.prompt_token_ids
    if request is None or prompt is None:
        name = None if request is None else request.request_id
        raise ValueError(
            f"The prompt of request {name!r} is not known. Pass prompts, or allocate it with "
            "prompt_token_ids."
        )
    if len(prompt) != request.num_tokens:
        raise ValueError(
            f"Request {request.request_id!r} holds {request.num_tokens} tokens, and its prompt has "
            f"{len(prompt)}. Extend it to hold them, or pass prompts: the tokens that it now ends "
            "with."
        )
    return prompt


def _parts(
    requests: Sequence[LiveRequest | None], prompts: Sequence[np.ndarray]
) -> tuple[list[np.ndarray], list[int], int]:
    """Returns the part of each prompt that is not computed yet, and where in its request it begins.

    The third result is the number of tokens for which requests without tokens need room.
    """
    parts, starts, num_reserved = [], [], 0
    for i, (request, prompt) in enumerate(zip(requests, prompts, strict=True)):
        start = first = 0  # Of the part, and of the prompt.
        if request is not None and not request.num_tokens:
            require_length(request, len(prompt))
            num_reserved = max(num_reserved, len(prompt))
        elif request is not None:
            held, known = request.num_tokens, request.known
            num_cached = min(request.num_cached_tokens, known.max_computed)
            first = held - len(prompt)
            start = max(first, known.num_computed, num_cached)
            if first < 0 or start < known.max_computed or start == held:
                raise ValueError(
                    f"The {len(prompt)} tokens of prompts[{i}] must be the last of the {held} of "
                    f"request {request.request_id!r}, and new: a step has had its first "
                    f"{known.max_computed}. Extend it by what is new, and pass that."
                )
        parts.append(prompt[start - first :])
        starts.append(start)
    return parts, starts, num_reserved


def _most_tokens(tokens: IdsLike | Chosen, num_rows: int, options: GenerateOptions) -> np.ndarray:
    """Returns i32[R]: how many tokens `generate` may add to each request; waits for `tokens`."""
    most = options.max_new_tokens
    first = np.asarray(as_ids(tokens.tokens if isinstance(tokens, Chosen) else tokens))
    limits = np.asarray(as_ids(most if options.limits is None else options.limits))
    if first.shape != (num_rows,) or limits.shape not in ((), first.shape):
        raise ValueError(
            f"tokens and limits must have one number per request, {num_rows}, got shapes "
            f"{list(first.shape)} and {list(limits.shape)}."
        )
    return np.where(first >= 0, np.clip(limits, 0, most), 0)
