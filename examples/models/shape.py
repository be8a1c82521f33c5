"""The shape of a decoder: its sizes, what each layer caches, and its rotary frequencies."""

import dataclasses


@dataclasses.dataclass(frozen=True, kw_only=True)
class LayerKind:
    """What a layer caches, and which tokens its queries see.

    Attributes:
      num_kv_heads: Heads that are cached.
      head_dim: Features of a head.
      sliding_window: Tokens that a query sees, itself included, or None for all before it.
      shared_layer: The earlier layer with the cache that this one reads; None if it has its own.
    """

    num_kv_heads: int
    head_dim: int
    sliding_window: int | None = None
    shared_layer: int | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rope:
    """Rotary frequencies of the heads of a layer.

    Attributes:
      head_dim: Features of a head, an even number.
      base: Base of the frequencies.
      divisors: `head_dim / 2` numbers that divide the frequencies (context extension; infinity
        for a pair of features that is not rotated), or None.
    """

    head_dim: int
    base: float
    divisors: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        if self.head_dim % 2:
            raise ValueError(f"head_dim={self.head_dim} is odd; RoPE rotates pairs of features.")
        if self.divisors is not None and len(self.divisors) != self.head_dim // 2:
            raise ValueError(
                f"rope_divisors has {len(self.divisors)} entries; RoPE has {self.head_dim // 2} "
                "frequencies. Give one divisor per frequency."
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Shape of a decoder; each family adds its own fields.

    Attributes:
      vocab_size: Tokens in the vocabulary.
      width: Features of the residual stream.
      num_layers: Decoder layers.
      num_q_heads: Query heads.
      num_kv_heads: Heads that are cached; divides `num_q_heads`.
      head_dim: Features of a head, an even number.
      mlp_width: Hidden features of the gated MLP.
      norm_epsilon: Added to the mean square in RMSNorm.
      rope_base: Base of the rotary frequencies.
      rope_divisors: See `Rope.divisors`.
      ties_embeddings: Whether the output matrix is the embedding matrix.
      normalizes_heads: Whether queries and keys are normalized before RoPE (QK-norm).
      attention_scale: Factor on `q @ k`; `head_dim ** -0.5` if absent.
      sliding_window: Tokens that a query sees, or None for all before it.
      full_layers: Layers that see all tokens although there is a sliding window.
      max_sequence_length: Tokens that the model was trained to hold.
    """

    vocab_size: int
    width: int
    num_layers: int
    num_q_heads: int
    num_kv_heads: int
    head_dim: int
    mlp_width: int
    norm_epsilon: float = 1e-5
    rope_base: float = 10_000.0
    rope_divisors: tuple[float, ...] | None = None
    ties_embeddings: bool = True
    normalizes_heads: bool = False
    attention_scale: float | None = None
    sliding_window: int | None = None
    full_layers: tuple[int, ...] = ()
    max_sequence_length: int = 2048

    def __post_init__(self) -> None:
        if self.num_kv_heads < 1 or self.num_q_heads % self.num_kv_heads:
            raise ValueError(
                f"num_q_heads={self.num_q_heads} is not a multiple of "
                f"num_kv_heads={self.num_kv_heads}; query heads are divided evenly among them."
            )
        self.rope(0)

    @property
    def layer_types(self) -> tuple[str, ...]:
        """The type of each layer, as Hugging Face calls it, for `CacheGeometry.of`."""
        is_full = (self.kind(layer).sliding_window is None for layer in range(self.num_layers))
        return tuple("full_attention" if full else "sliding_attention" for full in is_full)

    def kind(self, layer: int) -> LayerKind:
        """Returns what a layer caches and sees."""
        return LayerKind(
            num_kv_heads=self.num_kv_heads,
            head_dim=self.head_dim,
            sliding_window=None if layer in self.full_layers else self.sliding_window,
        )

    def rope(self, layer: int) -> Rope:
        """Returns the rotary frequencies of a layer; in this family, of all layers."""
        del layer
        return Rope(head_dim=self.head_dim, base=self.rope_base, divisors=self.rope_divisors)
