"""Round to nearest: a weight's stored numbers without a look at any input.

Works through the rows in blocks that fit into a core's cache; scale_search decides on the scales of
a block.
"""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

from quantize.formats import Format, QuantizedWeight, pack_nibbles
from quantize.mxfp4 import VALUES
from quantize.scale_search import Groups

# Numbers of a block. On a CPU a few arrays of that size fit into a core's cache.
BLOCK_SIZE = 2**16
CUDA_BLOCK_SIZE = 2**22


def round_to_nearest(
    weight: Tensor,
    form: Format,
    *,
    search: bool = True,
    importance: Tensor | None = None,
    name: str = "weight",
) -> QuantizedWeight:
    """weight [..., N, K] in any float dtype -> its stored form, on the same device.

    `search`: for the scale (and zero) of least squared error, in place of the one that just holds
    the largest value. `importance` [K]: what a squared error in a column costs, such as the mean
    square of its input. Memory beyond the result is a few blocks. ValueError, which calls the
    weight `name`, for NaN or infinite numbers.
    """
    num_columns = weight.size(-1)
    rows = weight.detach().reshape(-1, num_columns)
    scales, zeros = _empty_scales(rows, form)
    values = rows.new_empty(len(rows), form.values_width(num_columns), dtype=form.values_dtype)
    if importance is not None:
        importance = check_importance(importance, weight)

    def work(block: slice) -> None:
        numbers, scales[block], zero = _rounded(rows[block], form, search, importance, name)
        values[block] = stored_numbers(numbers, form)
        if zeros is not None and zero is not None:
            zeros[block] = zero

    _for_each_block(work, rows)

    def shaped(tensor: Tensor) -> Tensor:
        return tensor.view(*weight.shape[:-1], tensor.size(-1))

    zeros = None if zeros is None else shaped(zeros)
    return QuantizedWeight(form, num_columns, shaped(values), shaped(scales), zeros).check()


def find_scales(
    rows: Tensor,
    form: Format,
    *,
    search: bool = True,
    importance: Tensor | None = None,
    name: str = "weight",
) -> tuple[Tensor, Tensor | None]:
    """The stored scales and zeros [N, groups] that `round_to_nearest` would give rows [N, K]."""
    scales, zeros = _empty_scales(rows, form)
    if importance is not None:
        importance = check_importance(importance, rows)

    def work(block: slice) -> None:
        _, scales[block], zero = _rounded(rows[block], form, search, importance, name)
        if zeros is not None and zero is not None:
            zeros[block] = zero

    _for_each_block(work, rows)
    return scales, zeros


def check_importance(importance: Tensor, weight: Tensor) -> Tensor:
    """float32 on the weight's device; ValueError unless it is [K], finite and not negative."""
    if importance.shape != weight.shape[-1:]:
        raise ValueError(
            f"importance has shape {list(importance.shape)}; a weight {list(weight.shape)} needs "
            f"[{weight.size(-1)}], one number for each column"
        )
    importance = importance.to(weight.device, torch.float32)
    if not bool((importance.isfinite() & (importance >= 0)).all()):
        raise ValueError("importance has negative, NaN or infinite numbers; mean squares have none")
    return importance


def stored_numbers(numbers: Tensor, form: Format) -> Tensor:
    """The format's numbers as float32 [..., K] -> values [..., width]."""
    if form.kind == "mxfp4":
        sizes = numbers.abs().contiguous()
        codes = torch.bucketize(sizes, sizes.new_tensor(VALUES), out_int32=True)
        return pack_nibbles(codes + 8 * numbers.signbit(), 0)
    if form.in_nibbles:
        return pack_nibbles(numbers.to(torch.int8))
    return numbers.to(form.values_dtype)


def _empty_scales(rows: Tensor, form: Format) -> tuple[Tensor, Tensor | None]:
    shape = (len(rows), form.num_groups(rows.size(1)))
    scales = rows.new_empty(shape, dtype=form.scale_dtype)
    return scales, torch.empty_like(scales) if form.has_zeros else None


def _for_each_block(work: Callable[[slice], None], rows: Tensor) -> None:
    """Does the work of each block of rows. Each core does blocks of its own: if they shared every
    operation, they would meet ten thousand times a second, and a busy core would hold up the rest.
    """
    size = CUDA_BLOCK_SIZE if rows.is_cuda else BLOCK_SIZE
    step = max(1, size // max(1, rows.size(1)))
    blocks = [slice(start, start + step) for start in range(0, len(rows), step)]
    num_threads = torch.get_num_threads()
    if rows.is_cuda or num_threads == 1 or len(blocks) == 1:
        for block in blocks:
            work(block)
        return
    inference = torch.is_inference_mode_enabled()  # known to one thread only

    def work_alone(block: slice) -> None:
        with torch.inference_mode(inference):
            work(block)

    try:
        with ThreadPoolExecutor(num_threads, "", torch.set_num_threads, (1,)) as pool:
            list(pool.map(work_alone, blocks))
    finally:
        torch.set_num_threads(num_threads)


def _rounded(
    rows: Tensor, form: Format, search: bool, importance: Tensor | None, name: str
) -> tuple[Tensor, Tensor, Tensor | None]:
    """rows [r, K] -> the format's numbers as float32 [r, K]; stored scales, zeros [r, groups]."""
    num_columns = rows.size(1)
    size = min(form.group_size or num_columns, num_columns)
    whole = num_columns - num_columns % size
    parts = []
    # The last group may be short; then it is worked on by itself.
    for start, stop, length in ((0, whole, size), (whole, num_columns, num_columns - whole)):
        if start < stop:
            costs = None if importance is None else importance[start:stop]
            groups = Groups(rows[:, start:stop], length, costs, name)
            parts.append(groups.rounded(form, search))
    if len(parts) == 1:
        return parts[0]
    zeros = [zero for _, _, zero in parts if zero is not None]
    return (
        torch.cat([numbers for numbers, _, _ in parts], 1),
        torch.cat([scales for _, scales, _ in parts], 1),
        torch.cat(zeros, 1) if zeros else None,
    )
