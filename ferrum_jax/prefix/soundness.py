"""What always holds of the nodes of a radix tree, checked."""

from ferrum_jax.prefix.tree import Node
from ferrum_jax.tokens import TOKEN_BYTES


def check_node(node: Node, block_size: int) -> None:
    """Raises AssertionError unless a node, its blocks and its children agree.

    Args:
      node: Node of a tree.
      block_size: Tokens per block.
    """
    ends = [(block.logical_index + 1) * block_size for block in node.blocks]
    first = node.begin // block_size + 1
    expected = list(range(first * block_size, node.end + 1, block_size))
    if not node.children and node.parent is not None:
        require_sound(bool(ends) and ends[-1] == node.end, "a leaf does not end with a block")
    require_sound(ends == expected, "a run does not have the blocks that end in it")
    require_sound(all(block.node is node for block in node.blocks), "a block is not where it says")
    for first_token, child in node.children.items():
        require_sound(child.packed[:TOKEN_BYTES] == first_token, "a child has the wrong key")
        require_sound(
            child.parent is node and child.begin == node.end, "a child is not in its place"
        )
        require_sound(child.expires_at <= node.expires_at, "a node expires before what follows it")


def require_sound(truth: bool, broken: str) -> None:
    """Raises AssertionError if something does not hold that always should.

    Args:
      truth: Whether it holds.
      broken: What is wrong otherwise.
    """
    if not truth:
        raise AssertionError(f"The prefix cache is corrupt: {broken}. Please report this as a bug.")
