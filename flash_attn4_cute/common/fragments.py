"""Views of mma.sync register fragments.

An m16n8 accumulator holds ((2, 2), m, n) values a thread: two neighbouring columns, two rows eight
apart. The m16n8k16 A operand holds ((2, 2, 2), m, k): the same pairs, two n8 tiles side by side.
"""

import cutlass.cute as cute


def rows_and_columns(acc: cute.Tensor) -> cute.Tensor:
    """View an accumulator ((2, 2), m, n) as (rows, columns) of the thread."""
    (column, row), m, n = acc.layout.stride
    (columns, rows), tiles_m, tiles_n = acc.layout.shape
    layout = cute.make_layout(((rows, tiles_m), (columns, tiles_n)), stride=((row, m), (column, n)))
    return cute.make_tensor(acc.iterator, layout)


def as_operand_a(acc: cute.Tensor) -> cute.Tensor:
    """View an accumulator ((2, 2), m, n) as the A operand ((2, 2, 2), m, n / 2) of a second MMA."""
    (column, row), m, n = acc.layout.stride
    (columns, rows), tiles_m, tiles_n = acc.layout.shape
    layout = cute.make_layout(
        ((columns, rows, 2), tiles_m, tiles_n // 2), stride=((column, row, n), m, 2 * n)
    )
    return cute.make_tensor(acc.iterator, layout)


def tile_of(acc: cute.Tensor, m: int, n: int) -> cute.Tensor:
    """View one m16n8 tile of an accumulator, as an accumulator ((2, 2), 1, 1)."""
    column_and_row, _, _ = acc.layout.stride
    layout = cute.make_layout(((2, 2), 1, 1), stride=(column_and_row, 0, 0))
    return cute.make_tensor(acc[None, m, n].iterator, layout)
