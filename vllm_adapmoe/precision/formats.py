"""Sizes of the formats that `precision` quantises experts to: those of vLLM's kernels for int8 and int4."""

GROUPS = (64, 32)
"""Weights that share a scale at 4 bits: the first of these that divides both sizes of an expert."""
PRECISIONS = (16, 8, 4)


def group_of(*sizes: int) -> int | None:
    """Returns the number of weights that share a scale at 4 bits in experts of these sizes; None: no kernel fits."""
    return next((group for group in GROUPS if all(size % group == 0 for size in sizes)), None)


def int8_bytes(rows: int, columns: int, on_cpu: bool) -> int:
    """Returns the bytes of a matrix in int8: a float32 scale for each row; on x86 also an int32 sum.

    The layout on x86 is that of `convert_weight_packed` in vLLM's csrc/cpu/sgl-kernels.
    """
    return rows * columns + (8 if on_cpu else 4) * rows


def int4_bytes(rows: int, columns: int, group: int, on_cpu: bool, scale_bytes: int = 2) -> int:
    """Returns the bytes of a matrix in int4 in groups: a scale for each; on x86 an int32 sum, a float32 scale, a zero.

    The layout on x86 is that of `convert_weight_packed_scale_zp` in vLLM's csrc/cpu/sgl-kernels.
    """
    return rows * columns // 2 + rows * columns // group * (9 if on_cpu else scale_bytes)


def bits_per_weight(precision: int, hidden: int, inner: int, on_cpu: bool) -> float | None:
    """Returns the bits of one weight of a SwiGLU expert at `precision` 8 or 4, scales included.

    Args:
        precision: 8 or 4.
        hidden: hidden size of the model.
        inner: intermediate size of an expert.
        on_cpu: whether vLLM's x86 kernels compute it.

    Returns:
        None if no kernel takes these sizes.
    """
    matrices = ((2 * inner, hidden), (hidden, inner))
    if precision == 8:
        nbytes = sum(int8_bytes(*matrix, on_cpu) for matrix in matrices)
    else:
        group = group_of(hidden, inner)
        if group is None:
            return None
        nbytes = sum(int4_bytes(*matrix, group, on_cpu) for matrix in matrices)
    return 8 * nbytes / (3 * hidden * inner)
