"""What the memory operation costs at least: the floor that measured times are held against."""

from __future__ import annotations

from collections.abc import Sequence


def memory_flops(shapes: Sequence[tuple[int, int]], chunk: int, momentum: bool = True) -> int:
    """Useful forward FLOPs per token and head (a multiply-add is 2) of the chunkwise form.

    Args:
        shapes: ``(out, in)`` of each layer.
        chunk: tokens per chunk.
        momentum: whether the state stacks momentum below the weights.

    With ``P`` weights, ``s`` stacked parts: keys forward ``2P``; errors back ``2(P - P_1)``; queries through the
    stack ``2sP``; the stack's update ``2sP``; scores and their use ``2 b (sum in + sum out)``. Backward is counted
    as twice this: recomputation and element-wise work are not useful FLOPs.
    """
    parts = 2 if momentum else 1
    total = sum(out * width for out, width in shapes)
    first = shapes[0][0] * shapes[0][1]
    scores = 2 * chunk * sum(out + width for out, width in shapes)
    return 2 * total + 2 * (total - first) + 4 * parts * total + scores
