"""How the tokens of each token format lie in blocks."""

from ferrum_jax.codecs.codec import Codec as Codec
from ferrum_jax.codecs.packed import PackedCodec as PackedCodec
from ferrum_jax.codecs.packed import VectorLayout as VectorLayout
from ferrum_jax.codecs.registry import CODECS as CODECS
from ferrum_jax.codecs.registry import CodecEntry as CodecEntry
from ferrum_jax.codecs.registry import codec_for as codec_for
from ferrum_jax.codecs.registry import format_of as format_of
from ferrum_jax.codecs.rotation import rotate as rotate
from ferrum_jax.codecs.rotation import unrotate as unrotate
