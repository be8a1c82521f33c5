"""Entries for the tiers whose bits can be compared, and stores on one directory."""

import contextlib
import pathlib
from collections.abc import Iterator

import numpy as np

import ferrum_jax as fj
from ferrum_jax.ops.transfer import BlockFormat, BlockPayload
from ferrum_jax.tiers import TieredStore
from tests.support.caches import tiny_spec

FORMAT = BlockFormat.of(fj.init(tiny_spec(dtype="bfloat16")).pool)
BLOCK = FORMAT.block_bytes
TAGS = {"salt": "tenant-1", "tokens": [3, 1, 2], "nothing": None}


def payload_of(num_blocks: int, seed: int = 0, block_format: BlockFormat = FORMAT) -> BlockPayload:
    """Blocks of random bits."""
    rng = np.random.default_rng(seed)
    arrays = {
        name: np.frombuffer(
            rng.bytes(num_blocks * row.dtype.itemsize * int(np.prod(row.shape))), row.dtype
        ).reshape(num_blocks, *row.shape)
        for name, row in block_format.arrays
    }
    return BlockPayload.of_arrays(block_format, arrays)


def bits(payload: BlockPayload) -> list[bytes]:
    names = [name for name, _ in payload.format.arrays]
    return [b"".join(np.asarray(c[name]).tobytes() for c in payload.chunks) for name in names]


def picture(store: TieredStore, directory: pathlib.Path | None = None):
    """All that can be seen of a store, files included."""
    kept = {key: (bits(store.get(key)[0]), store.metadata(key)) for key in store.keys()}
    names = sorted(path.name for path in directory.iterdir()) if directory else []
    return kept, store.stats(), names


def file_of(directory: pathlib.Path) -> pathlib.Path:
    (path,) = directory.glob("*.kvblocks")
    return path


@contextlib.contextmanager
def stores_on(directory: pathlib.Path) -> Iterator:
    """A function that opens stores, all on one directory; they are closed at last."""
    stores = []

    def open_store(host_blocks=0, disk_bytes=None, block_format=FORMAT, **options) -> TieredStore:
        store = TieredStore(
            block_format,
            host_blocks * BLOCK,
            disk_directory=directory,
            disk_budget_bytes=disk_bytes,
            **options,
        )
        stores.append(store)
        return store

    yield open_store
    for store in stores:
        store.close()
