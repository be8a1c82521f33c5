"""What a token leaves behind in a layer."""

from ferrum_jax.payload.key_value import KeysAndValues as KeysAndValues
from ferrum_jax.payload.key_value import KeyValue as KeyValue
