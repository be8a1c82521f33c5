"""A rollout engine for Tunix: the answers of its sampler, from a paged cache."""

import dataclasses
import importlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from ferrum_jax.arithmetic import ceil_div
from ferrum_jax.integrations import Rollout, Sampling, ServeOptions, StepOptions, rollout
from ferrum_jax.integrations.tunix.layers import cache_layers
from ferrum_jax.integrations.tunix.model import tunix_model
from ferrum_jax.layers import LayerGroup, most_window_blocks
from ferrum_jax.sharding import init_sharded
from ferrum_jax.spec import CacheSpec
from ferrum_jax.state import CacheState, init

_tokenizers: Any = importlib.import_module("tunix.generate.tokenizer_adapter")
_padding: Any = importlib.import_module("tunix.generate.utils")
_scoring: Any = importlib.import_module("tunix.rl.common")
_resharding: Any = importlib.import_module("tunix.rl.reshard")
_meshes: Any = importlib.import_module("tunix.rl.utils")
_base: Any = importlib.import_module("tunix.rl.rollout.base_rollout")


@dataclasses.dataclass(frozen=True, kw_only=True)
class PagedRolloutOptions:
    """Sizes and rules of a `PagedRollout`.

    Attributes:
      block_size: Tokens per block.
      max_rows: Samples that are decoded at once, at most; others follow as rows become free.
      step: Shape of a step that reads prompts.
      forbidden_token_ids: Tokens that are never chosen.
    """

    block_size: int = 16
    max_rows: int = 64
    step: StepOptions = StepOptions()
    forbidden_token_ids: tuple[int, ...] = ()


class PagedRollout(_base.BaseRollout):
    """A rollout engine on a paged cache, for `ClusterConfig(rollout_engine=...)`.

    Equal prompts are computed once, and their samples share its blocks. A row takes the blocks
    that it fills, and is taken by the next sample when it is done. The cache exists during
    `generate` only: training has its memory, and no prefix outlives the weights that computed it.

    Prompts and answers are as those of Tunix's sampler: tokens with the pad id count as padding
    wherever they are in a prompt, a prompt longer than `max_prompt_length` is kept whole, and the
    stop token is not part of an answer. At temperature 0, or without `top_p`, the best token is
    chosen.

    Attributes:
      max_blocks: i32[pools]. The most blocks of each pool that were in use at once so far.
    """

    def __init__(
        self,
        rollout_actor: nnx.Module,
        tokenizer: Any,
        mesh: Mesh,
        rollout_config: Any,
        *,
        num_blocks: int,
        options: PagedRolloutOptions | None = None,
    ) -> None:
        """Makes an engine. Tunix passes the first four arguments.

        Args:
          rollout_actor: The model, which is not changed. If its weights are on the mesh, they are
            shared: training it in place changes those of the engine. Else they are copied.
          tokenizer: A tokenizer, or Tunix's adapter of one.
          mesh: Devices of the weights and of the cache. The heads of the cache are divided along
            the same axis as the model's, if it divides their number.
          rollout_config: Tunix's `RolloutConfig`. `kv_cache_size` is the maximum of a prompt's and
            its answer's tokens, and `data_type` the dtype of the weights.
          num_blocks: Blocks of the cache, or of each pool where layers differ in their heads.
          options: Sizes and rules; the defaults of `PagedRolloutOptions` if None.

        Raises:
          TypeError: The model is of a family that is not known.
          ValueError: A number is not a positive integer.
        """
        self._options = options or PagedRolloutOptions()
        if not isinstance(tokenizer, _tokenizers.TokenizerAdapter):
            tokenizer = _tokenizers.TokenizerAdapter(tokenizer)
        self._tokenizer = tokenizer
        self._mesh = mesh
        self._model_fn, params = tunix_model(rollout_actor)
        self._params = _on_mesh(params, mesh, rollout_config.data_type)
        longest = rollout_config.max_prompt_length + rollout_config.max_tokens_to_generate
        max_blocks_per_seq = ceil_div(
            max(longest, rollout_config.kv_cache_size), self._options.block_size
        )
        self._spec = _spec(self.model(), num_blocks, max_blocks_per_seq, self._options)
        self._num_calls = 0
        self.max_blocks = np.zeros(len(self._spec.pools), np.int32)

    def generate(self, prompts: list[str], rollout_config: Any, **kwargs: Any) -> Any:
        """Generates an answer to each prompt; equal prompts get different draws.

        Args:
          prompts: The prompts.
          rollout_config: Tunix's `RolloutConfig`: lengths and sampling. With a `seed`, an equal
            call returns equal answers; without one, each call draws with another key.
          **kwargs: Not used.

        Returns:
          Tunix's `RolloutOutput`: texts, tokens i32[T] of each answer, prompts padded on the left;
          log-probabilities f32[T] of each answer if `return_logprobs` is set.

        Raises:
          OutOfBlocksError: The blocks do not hold the longest prompt with its answer, even alone.
          ValueError: That is longer than a row can be; or a prompt is empty.
        """
        del kwargs  # Unused.
        encoded = [self._encode(prompt) for prompt in prompts]
        stops = tuple(rollout_config.eos_tokens or [self.eos_id()])
        sampled = rollout(
            self._model_fn,
            self._params,
            self._empty_cache(),
            [tokens[tokens != self.pad_id()].tolist() for tokens in encoded],
            samples=1,
            options=self._serve_options(rollout_config, stops),
            key=self._key(rollout_config.seed),
        )
        self.max_blocks = np.maximum(self.max_blocks, np.asarray(sampled.max_blocks))
        tokens, logprobs = _without_stops(sampled, stops)
        return _base.RolloutOutput(
            text=[self._tokenizer.decode(answer.tolist()) for answer in tokens],
            logits=[],
            tokens=tokens,
            left_padded_prompt_tokens=self._left_padded(encoded, rollout_config.max_prompt_length),
            logprobs=logprobs if rollout_config.return_logprobs else None,
        )

    def get_per_token_logps(
        self, prompt_tokens: jax.Array, completion_tokens: jax.Array
    ) -> jax.Array:
        """Computes the log-probabilities of answers, by Tunix's forward pass without a cache.

        Args:
          prompt_tokens: i32[B, P]. Prompts, padded on the left.
          completion_tokens: i32[B, C]. Answers, padded on the right.

        Returns:
          f32[B, C].
        """
        return _scoring.compute_per_token_logps(
            self._model_fn.graphdef,
            self._params,
            prompt_tokens=prompt_tokens,
            completion_tokens=completion_tokens,
            pad_id=self.pad_id(),
            eos_id=self.eos_id(),
            stop_gradient=True,
            return_logits=False,
        )

    def update_params(self, params: Any, filter_types: tuple[Any, ...] | None = None) -> None:
        """Replaces weights; the next `generate` uses them, and compiles nothing.

        Args:
          params: State of the weights to replace: of all, or of LoRA alone.
          filter_types: Types of the variables in `params`, which are then moved to the mesh.
        """
        model = self.model()
        own = nnx.state(model) if filter_types is None else nnx.state(model, filter_types)
        if filter_types is not None:
            shardings = jax.tree.map(lambda x: x.sharding, own)
            params = _resharding.reshard_pytree(params, shardings)
        nnx.update(model, jax.tree.map(lambda new, old: new.astype(old.dtype), params, own))
        self._params = nnx.state(model)

    def pad_id(self) -> int:
        """Returns the pad id of the tokenizer."""
        return self._tokenizer.pad_id()

    def eos_id(self) -> int:
        """Returns the end-of-sequence id of the tokenizer."""
        return self._tokenizer.eos_id()

    def model(self) -> Any:
        """Returns a new module of Tunix with the current weights, of which it shares the arrays."""
        return nnx.merge(self._model_fn.graphdef, jax.tree.map(lambda x: x, self._params))

    def _encode(self, prompt: str) -> np.ndarray:
        """Returns a prompt's token ids i32[T], with one begin-of-sequence token if there is one."""
        begin = [self._tokenizer.bos_id()] if self._tokenizer.bos_id() else []
        ids = self._tokenizer.dedup_bos_ids([*begin, *self._tokenizer.encode(prompt)])
        return np.asarray(ids, np.int32)

    def _left_padded(self, encoded: list[np.ndarray], max_prompt_length: int) -> np.ndarray:
        """Returns prompts i32[B, P], padded on the left."""
        longest = max(map(len, encoded))
        if longest > max_prompt_length:
            max_prompt_length = _padding.next_power_of_2(longest)
        return np.stack(
            [
                _padding.pad_to_length(tokens, max_prompt_length, self.pad_id(), left=True)
                for tokens in encoded
            ]
        )

    def _serve_options(self, config: Any, stops: tuple[int, ...]) -> ServeOptions:
        """Returns the options of a rollout, with log-probabilities as Tunix's sampler has them."""
        sampling = Sampling(forbidden_token_ids=self._options.forbidden_token_ids)
        if config.temperature > 0 and config.top_p is not None:
            top_k = config.top_k if config.top_k and config.top_k > 0 else None
            sampling = dataclasses.replace(
                sampling, temperature=config.temperature, top_k=top_k, top_p=config.top_p
            )
        return ServeOptions(
            max_new_tokens=config.max_tokens_to_generate,
            stop_token_ids=stops,
            sampling=sampling,
            logprobs_after_temperature=True,
            step=self._options.step,
        )

    def _key(self, seed: Any) -> jax.Array:
        """Returns the typed key of a seed, which may be an int or any key; None is another one."""
        if seed is None:
            self._num_calls += 1
            return jax.random.fold_in(jax.random.key(0), self._num_calls)
        seed = jnp.asarray(seed)
        if jnp.issubdtype(seed.dtype, jax.dtypes.prng_key):
            return seed
        return jax.random.key(seed) if seed.ndim == 0 else jax.random.wrap_key_data(seed)

    def _empty_cache(self) -> CacheState:
        """Returns an empty cache on the mesh."""
        axis = self.model().config.shd_config.act_btnh[2]
        heads = [pool.payload.num_kv_heads for pool in self._spec.pools]
        if axis in self._mesh.shape and not any(n % self._mesh.shape[axis] for n in heads):
            return init_sharded(self._spec, self._mesh, axis)
        return init(self._spec, self._mesh)


def _on_mesh(params: nnx.State, mesh: Mesh, dtype: Any) -> nnx.State:
    """Returns weights on a mesh, divided as the model says, in a dtype; their own if None.

    If nothing changes, the variables are those of the model. Tunix expects this: it does not pass
    new weights to an engine that begins with the arrays of the model which it trains.
    """
    if dtype is not None:
        params = jax.tree.map(lambda x: x.astype(dtype), params)
    if _meshes.get_pytree_mesh_info(params) == mesh:
        return params
    specs = nnx.get_partition_spec(params)
    shardings = jax.tree.map(
        lambda spec: NamedSharding(mesh, PartitionSpec() if spec is None else spec),
        specs,
        is_leaf=lambda spec: spec is None or isinstance(spec, PartitionSpec),
    )
    return _resharding.reshard_pytree(params, shardings)


def _spec(
    model: Any, num_blocks: int, max_blocks_per_seq: int, options: PagedRolloutOptions
) -> CacheSpec:
    """Returns the cache of a model; a pool of windows alone has no more blocks than it can fill."""
    layers = cache_layers(model)
    groups: tuple[LayerGroup, ...] = layers["groups"]

    def blocks_of(group: LayerGroup) -> int:
        row = 0
        for other in groups:
            if other.payload == group.payload:
                if other.sliding_window is None:
                    return num_blocks
                row += most_window_blocks(
                    other.sliding_window, options.step.prompt_tokens, options.block_size
                )
        return min(num_blocks, options.max_rows * row)

    return CacheSpec(
        groups=[dataclasses.replace(group, num_blocks=blocks_of(group)) for group in groups],
        shared_layers=layers["shared_layers"],
        num_blocks=num_blocks,
        block_size=options.block_size,
        max_seqs=options.max_rows,
        max_blocks_per_seq=max_blocks_per_seq,
    )


def _without_stops(
    sampled: Rollout, stops: tuple[int, ...]
) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Returns tokens and log-probabilities of each answer, without its stop token."""
    tokens, logprobs, counts = jax.device_get(
        (sampled.tokens[:, 0], sampled.logprobs[:, 0], sampled.num_tokens[:, 0])
    )
    ends = [
        count - (answer[count - 1] in stops) for answer, count in zip(tokens, counts, strict=True)
    ]
    return (
        [answer[:end] for answer, end in zip(tokens, ends, strict=True)],
        [answer[:end] for answer, end in zip(logprobs, ends, strict=True)],
    )
