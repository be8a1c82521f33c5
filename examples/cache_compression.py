"""A cache in fewer bytes: tokens in 8 or 4 bits, or fewer tokens.

Run with `python -m examples.cache_compression`.
"""

import ferrum_jax as fj
from examples.models import toy
from ferrum_jax.types import TokenFormat

PROMPT = [token % 61 for token in range(192)]
METHODS = {
    "default method, at most 50 %": (0.5, fj.CompressionMethod()),
    "4 bits, rotated": (0.3, fj.CompressionMethod(token_format=TokenFormat.Int4, scorer=None)),
    "window of half the tokens": (0.5, fj.CompressionMethod(token_format=TokenFormat.Native)),
}


def main() -> None:
    """Compresses one prompt's cache in three ways; prints bytes, errors and agreeing tokens."""
    manager = fj.PagedKvCacheManager(
        fj.CacheConfig(block_size=16, max_blocks=32, initial_blocks=32), toy.GEOMETRY
    )
    plain = manager.allocate(manager.new_request("plain", prompt_token_ids=PROMPT))
    token = toy.prefill(manager, plain)
    block_bytes = plain.stats().memory_bytes // plain.stats().blocks_allocated
    print(f"uncompressed: {plain.stats().memory_bytes:,} bytes in blocks of {block_bytes:,}")
    expected = toy.decode(manager, plain, token, num_tokens=16)

    for name, (ratio, method) in METHODS.items():
        handle = manager.allocate(manager.new_request(name, prompt_token_ids=PROMPT))
        toy.prefill(manager, handle)
        manager.compress_cache(name, ratio, method)
        report = handle.compression
        assert report is not None
        blocks = handle.stats().blocks_allocated
        tokens = toy.decode(manager, handle, token, num_tokens=16)
        agreeing = sum(a == b for a, b in zip(tokens, expected, strict=True))
        print(
            f"{name}: {report.ratio:.0%} of the bytes, {blocks} blocks, "
            f"{report.num_kept_tokens} of {report.num_tokens} tokens kept; attention error "
            f"{report.attention_error:.3f}, {agreeing} of 16 new tokens agree"
        )
        manager.deallocate(name)


if __name__ == "__main__":
    main()
