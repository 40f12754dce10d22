"""Which query token and head each row of a Q tile belongs to."""

from dataclasses import dataclass

import cutlass.cute as cute
from cutlass import Int32

from .tiles import BLOCK_M


@dataclass(frozen=True)
class RowMap:
    """The 128 rows of a tile: token after token, the `group` heads of one key head side by side.

    A group of 1 is a tile of one head (nothing is packed). A tile holds whole tokens: rows that are
    left over if the group does not divide 128 are idle, their scores are of no one.
    """

    group: int

    @property
    def tokens(self) -> int:
        """Query tokens of one tile."""
        return BLOCK_M // self.group

    @property
    def used(self) -> int:
        """Rows of a tile that are not idle."""
        return self.tokens * self.group

    def token(self, row):
        """The token of a row, counted from the tile's first."""
        return row if self.group == 1 else row // self.group

    def head(self, row):
        """The head of a row, counted from the group's first."""
        return Int32(0) if self.group == 1 else row % self.group


def pack_heads(mQ: cute.Tensor, group: int) -> cute.Tensor:
    """(s, d, h, ...) as (group, s, d, h / group, ...)."""
    (s, d, h, *outer), (s_stride, d_stride, h_stride, *outer_stride) = mQ.shape, mQ.stride
    shape = (group, s, d, h // group, *outer)
    stride = (h_stride, s_stride, d_stride, h_stride * group, *outer_stride)
    return cute.make_tensor(mQ.iterator, cute.make_layout(shape, stride=stride))
