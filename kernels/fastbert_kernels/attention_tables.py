"""Tables of tiles for the attention and relation kernels: `tiles.py` reads them, and says how they were chosen."""

from typing import TypeVar

from .catalogue import Tiles


def attention_tile(block_m: int, block_n: int, num_warps: int, num_stages: int) -> Tiles:
    return {"BLOCK_M": block_m, "BLOCK_N": block_n, "num_warps": num_warps, "num_stages": num_stages}


#: Rows of a table: head_dim up to which, tiles, and tiles where maps are read or written. Maps are the tensors of
#: (seq, seq) planes: the bias, the probabilities and their gradient. Their pointers cost registers, and moving them
#: costs so much that smaller products are not what is waited for.
_ByHeadDim = list[tuple[int, Tiles, Tiles]]

#: (architecture, kernel) -> rows, for two-byte dtypes. The rule: of the tiles that spill in no configuration, the one
#: whose instructions take the least time to issue, with dropout on; of nearly equal ones, the one with more warps
#: resident. Times in the reasons are the static report's, of head_dim 64 unless said otherwise.
ATTENTION_HALF: dict[tuple[str, str], _ByHeadDim] = {
    ("sm_80", "forward"): [
        # 32: rows of half the bytes, so twice of them. 64: 12 warps resident, 8 with 128 rows and 4% less to issue.
        (32, attention_tile(128, 64, 8, 2), attention_tile(64, 32, 4, 2)),
        (64, attention_tile(64, 64, 4, 3), attention_tile(64, 32, 4, 2)),
        # Maps: 32 keys spill with a bias.
        (128, attention_tile(128, 32, 8, 2), attention_tile(128, 16, 8, 2)),
    ],
    ("sm_80", "backward_dq"): [
        # Maps: 32 keys spill with a bias; 8 warps on 64 rows leave the products half their size and issue 46% more, but
        # are all that holds wider heads.
        (64, attention_tile(128, 32, 8, 2), attention_tile(64, 16, 4, 2)),
        (128, attention_tile(64, 32, 8, 2), attention_tile(64, 16, 8, 2)),
    ],
    ("sm_80", "backward_dkv"): [
        # All larger tiles are over 255 registers.
        (64, attention_tile(32, 128, 8, 2), attention_tile(16, 128, 8, 2)),
        (128, attention_tile(32, 64, 8, 2), attention_tile(16, 32, 4, 2)),
    ],
    ("sm_86", "backward_dq"): [
        # Maps: two stages spill six registers with Triton 3.6, where sums are made.
        (64, attention_tile(128, 32, 8, 2), attention_tile(64, 16, 4, 3)),
        (128, attention_tile(64, 32, 8, 2), attention_tile(64, 16, 8, 2)),
    ],
    ("sm_120", "forward"): [
        # Three stages leave room for two programs in 100 KiB. On sm_86 two spill with dropout.
        (32, attention_tile(128, 64, 8, 2), attention_tile(64, 32, 4, 2)),
        (64, attention_tile(64, 64, 4, 2), attention_tile(64, 32, 4, 2)),
        (128, attention_tile(128, 32, 8, 2), attention_tile(128, 16, 8, 2)),
    ],
    ("sm_90", "forward"): [
        # Two warp groups of 64 rows: as many warps resident as with one, half the traffic from L2. Maps: 64 keys issue
        # 10% less, but spill where maps are gathered.
        (64, attention_tile(128, 64, 8, 2), attention_tile(128, 32, 8, 2)),
        (128, attention_tile(128, 64, 8, 2), attention_tile(128, 32, 8, 2)),
    ],
    ("sm_90", "backward_dq"): [
        # A warp group for every 64 rows: half of one makes products of half the size, and issues twice as much.
        # Maps: 64 keys issue half as much where head_dim is 64, and spill where it is 32; 32 keys spill with a bias.
        (64, attention_tile(128, 64, 8, 2), attention_tile(64, 16, 4, 2)),
        (128, attention_tile(128, 32, 8, 2), attention_tile(128, 16, 8, 2)),
    ],
    ("sm_90", "backward_dkv"): [
        # The same for keys. Maps: 64 rows issue 8% less, and spill.
        (64, attention_tile(64, 128, 8, 2), attention_tile(32, 64, 4, 2)),
        (128, attention_tile(32, 64, 8, 2), attention_tile(16, 128, 8, 2)),
    ],
    ("sm_100", "forward"): [
        # 128 rows fill the lanes of tensor memory. Maps: 64 keys issue 5% less, and spill; so do 32 of head_dim 128, or
        # two stages.
        (64, attention_tile(128, 64, 8, 2), attention_tile(64, 32, 4, 3)),
        (128, attention_tile(128, 64, 8, 2), attention_tile(64, 16, 4, 3)),
    ],
    ("sm_100", "backward_dq"): [
        # 128 rows for the same reason: 64 issue 25% more. Maps: 32 keys spill in some head_dim, two stages in 64.
        (64, attention_tile(128, 64, 8, 2), attention_tile(128, 16, 8, 3)),
        (128, attention_tile(64, 32, 8, 2), attention_tile(128, 16, 8, 2)),
    ],
    ("sm_100", "backward_dkv"): [
        # 128 keys: 64 issue 17% more with as many warps resident. Maps: two stages spill where sums are made, too.
        (64, attention_tile(32, 128, 8, 2), attention_tile(32, 64, 4, 3)),
        # With two stages ptxas spills a register or two to fit one more program on a multiprocessor.
        (128, attention_tile(32, 64, 8, 3), attention_tile(16, 64, 8, 3)),
    ],
    ("gfx942", "forward"): [
        (64, attention_tile(64, 64, 4, 1), attention_tile(64, 64, 4, 1)),
        (128, attention_tile(64, 32, 4, 1), attention_tile(64, 32, 4, 1)),
    ],
    ("gfx942", "backward_dq"): [
        (64, attention_tile(64, 32, 4, 1), attention_tile(64, 32, 4, 1)),
        (128, attention_tile(64, 32, 8, 1), attention_tile(64, 32, 8, 1)),
    ],
    ("gfx942", "backward_dkv"): [
        (64, attention_tile(32, 64, 4, 1), attention_tile(32, 64, 4, 1)),
        (128, attention_tile(32, 64, 8, 1), attention_tile(32, 64, 8, 1)),
    ],
}

#: (one of `SHORT`, kernel) -> rows for two-byte dtypes on NVIDIA, which have these in common. Two warps on 32 by 32
#: issue 30% less than four, and hold in registers what narrow heads need; wide ones, and maps, spill. 64 rows are where
#: the products of sm_90 begin. 1,092 x 30 tokens on H200, with and without these rows: forward 31 us and 113, dQ 32 and
#: 132, dK/dV 31 and 137.
ATTENTION_SHORT: dict[tuple[int, str], _ByHeadDim] = {
    (32, "forward"): [
        (64, attention_tile(32, 32, 2, 2), attention_tile(32, 32, 4, 2)),
        (128, attention_tile(32, 32, 2, 2), attention_tile(32, 16, 4, 2)),
    ],
    (32, "backward_dq"): [
        (64, attention_tile(32, 32, 2, 2), attention_tile(32, 32, 4, 2)),
        (128, attention_tile(32, 32, 4, 2), attention_tile(32, 16, 4, 2)),
    ],
    (32, "backward_dkv"): [
        (64, attention_tile(32, 32, 2, 2), attention_tile(16, 32, 4, 2)),
        # With two stages ptxas spills two registers of sm_100 to fit one more program on a multiprocessor.
        (128, attention_tile(32, 32, 4, 3), attention_tile(16, 32, 4, 2)),
    ],
    (64, "forward"): [
        (64, attention_tile(64, 32, 4, 2), attention_tile(32, 32, 4, 2)),
        (128, attention_tile(64, 32, 4, 2), attention_tile(32, 16, 4, 2)),
    ],
    (64, "backward_dq"): [
        (64, attention_tile(64, 32, 4, 2), attention_tile(32, 32, 4, 2)),
        (128, attention_tile(32, 32, 4, 2), attention_tile(32, 16, 4, 2)),  # 64 rows spill on sm_86
    ],
    (64, "backward_dkv"): [
        (64, attention_tile(32, 64, 4, 2), attention_tile(16, 32, 4, 2)),
        (128, attention_tile(32, 32, 4, 3), attention_tile(16, 32, 4, 2)),
    ],
}

#: (target, one of `SHORT`, kernel) -> rows instead of those.
ATTENTION_SHORT_OWN: dict[tuple[str, int, str], _ByHeadDim] = {
    # With two stages two registers spill with Triton 3.6.
    ("sm_80", 32, "backward_dq"): [
        (64, attention_tile(32, 32, 2, 3), attention_tile(32, 32, 4, 2)),
        (128, attention_tile(32, 32, 4, 2), attention_tile(32, 16, 4, 2)),
    ],
}

#: Targets and head_dims whose float32 is multiplied by tensor cores, where there are no maps. A product in three parts
#: holds each of its operands twice: wider heads and maps spill, and so do those in between, whose columns are masked.
#: GPUs of smaller kinds multiply float32 as fast as TF32.
TF32_TARGETS, TF32_HEAD_DIMS = ("sm_80", "sm_90", "sm_100"), (32, 64)

#: kernel -> tiles for these, three products for one, or one for one where torch allows it: 30 tokens and 512 are nearly
#: as well off.
ATTENTION_TF32: dict[str, Tiles] = {
    "forward": attention_tile(32, 32, 4, 2),
    "backward_dq": attention_tile(16, 32, 4, 2),
    "backward_dkv": attention_tile(32, 16, 4, 2),
}

#: (architecture, kernel, head_dim) -> tiles instead of those, which spill.
ATTENTION_TF32_OWN: dict[tuple[str, str, int], Tiles] = {
    ("sm_100", "forward", 64): attention_tile(32, 32, 4, 3),  # with Triton 3.6
    ("sm_100", "backward_dkv", 32): attention_tile(16, 32, 4, 3),
}

#: (kernel, head_dim) -> the same on sm_90 for sequences over `SHORT`: parts of operands that lie in shared memory are
#: not held in registers. 32,768 tokens with dropout, three parts and exact: forward 336 us and 1,216, dQ 426 and 2,178,
#: dK/dV 715 and 2,613.
ATTENTION_TF32_LONG: dict[tuple[str, int], Tiles] = {
    ("forward", 32): attention_tile(128, 32, 8, 2),
    ("forward", 64): attention_tile(128, 32, 8, 2),
    ("backward_dq", 32): attention_tile(128, 32, 8, 2),
    ("backward_dq", 64): attention_tile(128, 32, 8, 2),
    ("backward_dkv", 32): attention_tile(32, 128, 8, 2),
    ("backward_dkv", 64): attention_tile(16, 128, 8, 1),  # two stages spill
}

#: float32 that is multiplied exactly: no tensor core does, so its tiles are small, and nearly the same everywhere.
#: Two stages everywhere: with one, operands are held in registers whole, 255 of them instead of about 80.
ATTENTION_FLOAT: dict[str, _ByHeadDim] = {
    "forward": [
        (64, attention_tile(32, 32, 4, 2), attention_tile(16, 32, 4, 2)),
        (128, attention_tile(32, 16, 8, 2), attention_tile(16, 32, 4, 2)),
    ],
    "backward_dq": [
        (64, attention_tile(16, 16, 4, 2), attention_tile(16, 32, 4, 2)),
        (128, attention_tile(16, 16, 8, 2), attention_tile(16, 16, 4, 2)),
    ],
    "backward_dkv": [
        (64, attention_tile(16, 32, 8, 2), attention_tile(16, 16, 4, 2)),
        (128, attention_tile(16, 16, 8, 2), attention_tile(16, 16, 8, 2)),
    ],
}

#: Where what spills is another few registers: (architecture, kernel) -> rows instead of those.
ATTENTION_FLOAT_OWN: dict[tuple[str, str], _ByHeadDim] = {
    ("sm_80", "forward"): [
        (64, attention_tile(32, 16, 4, 2), attention_tile(16, 32, 4, 2)),
        (128, attention_tile(32, 16, 8, 2), attention_tile(16, 32, 4, 2)),
    ],
    ("sm_90", "forward"): [
        (64, attention_tile(32, 32, 4, 2), attention_tile(16, 32, 4, 2)),
        (96, attention_tile(32, 16, 8, 2), attention_tile(16, 32, 4, 2)),
        (128, attention_tile(32, 16, 8, 2), attention_tile(16, 32, 8, 2)),
    ],
    ("sm_90", "backward_dq"): [
        # Maps: 32 keys spill where keys are taken by length.
        (64, attention_tile(16, 16, 4, 2), attention_tile(16, 16, 4, 2)),
        (128, attention_tile(16, 16, 8, 2), attention_tile(16, 16, 4, 2)),
    ],
    ("sm_80", "backward_dq"): [
        (64, attention_tile(16, 16, 4, 2), attention_tile(16, 16, 8, 2)),
        (128, attention_tile(16, 16, 8, 2), attention_tile(16, 16, 4, 2)),
    ],
    ("sm_80", "backward_dkv"): [
        (64, attention_tile(16, 32, 8, 2), attention_tile(16, 16, 8, 3)),
        (128, attention_tile(16, 16, 8, 2), attention_tile(16, 16, 4, 2)),
    ],
    ("sm_100", "forward"): [
        (64, attention_tile(32, 32, 4, 2), attention_tile(16, 32, 8, 2)),
        (128, attention_tile(32, 16, 8, 2), attention_tile(16, 32, 4, 2)),
    ],
    ("sm_100", "backward_dq"): [
        (64, attention_tile(16, 16, 4, 2), attention_tile(32, 32, 4, 2)),
        (128, attention_tile(16, 16, 8, 2), attention_tile(16, 16, 4, 2)),
    ],
    ("sm_100", "backward_dkv"): [
        (64, attention_tile(16, 32, 8, 3), attention_tile(16, 16, 4, 2)),
        (128, attention_tile(16, 16, 8, 2), attention_tile(16, 16, 8, 3)),
    ],
}

#: (architecture, kernel) -> tiles of the relation kernels for two-byte dtypes. Every dim up to 128 has the same: two
#: products of scores are what fills the registers, whatever they sum over.
RELATION_HALF: dict[tuple[str, str], Tiles] = {
    ("sm_80", "forward"): attention_tile(64, 32, 4, 2),
    # With two stages ptxas spills a few registers of 80 and 96 to fit one more program on a multiprocessor.
    ("sm_80", "backward_a"): attention_tile(64, 32, 4, 3),
    ("sm_80", "backward_b"): attention_tile(32, 64, 4, 3),
    # Two stages spill nothing here, issue 6% less, and leave room for another program. On sm_120 three spill.
    ("sm_86", "backward_a"): attention_tile(64, 32, 4, 2),
    ("sm_86", "backward_b"): attention_tile(32, 64, 4, 2),
    ("sm_90", "forward"): attention_tile(128, 64, 8, 2),
    ("sm_90", "backward_a"): attention_tile(128, 64, 8, 2),
    ("sm_90", "backward_b"): attention_tile(64, 128, 8, 2),
    ("sm_100", "forward"): attention_tile(128, 64, 8, 2),
    ("sm_100", "backward_a"): attention_tile(64, 64, 4, 2),
    ("sm_100", "backward_b"): attention_tile(64, 64, 4, 2),
    ("gfx942", "forward"): attention_tile(64, 32, 4, 1),
    ("gfx942", "backward_a"): attention_tile(64, 32, 4, 1),
    ("gfx942", "backward_b"): attention_tile(32, 64, 4, 1),
}

#: The same for float32, by the dim up to which: see `ATTENTION_FLOAT`.
RELATION_FLOAT: dict[str, list[tuple[int, Tiles]]] = {
    # With four warps up to 64, and with two stages over it, ptxas spills two registers on sm_80 to fit one more program
    # on a multiprocessor.
    "forward": [(64, attention_tile(32, 32, 8, 2)), (128, attention_tile(32, 16, 8, 3))],
    "backward_a": [(64, attention_tile(32, 32, 8, 2)), (128, attention_tile(16, 16, 8, 2))],
    "backward_b": [(64, attention_tile(16, 16, 4, 2)), (128, attention_tile(16, 16, 8, 2))],
}

#: (architecture, kernel) -> the same on `TF32_TARGETS` where both models' dims are of `TF32_HEAD_DIMS`, by the larger
#: one: three products for one, or one for one where torch allows it. 64 wide, 16 times 512 tokens, three parts and
#: exact: on H200 forward 251 us and 1,324, dA 296 and 1,631, dB 294 and 1,841; on A100 921 and 2,254, 1,090 and 2,766,
#: 1,107 and 3,187. With Triton 3.6 two registers of dB spill on sm_90 where the student's dim is 32, the teacher's 64.
RELATION_TF32: dict[tuple[str, str], dict[int, Tiles]] = {
    ("sm_80", "forward"): {32: attention_tile(32, 64, 4, 2), 64: attention_tile(32, 64, 4, 2)},
    ("sm_80", "backward_a"): {32: attention_tile(64, 16, 4, 2), 64: attention_tile(32, 32, 4, 2)},
    ("sm_80", "backward_b"): {32: attention_tile(16, 64, 4, 2), 64: attention_tile(32, 32, 4, 2)},
    ("sm_90", "forward"): {32: attention_tile(128, 64, 8, 2), 64: attention_tile(128, 64, 8, 2)},
    ("sm_90", "backward_a"): {32: attention_tile(128, 64, 8, 2), 64: attention_tile(128, 64, 8, 2)},
    ("sm_90", "backward_b"): {32: attention_tile(64, 128, 8, 2), 64: attention_tile(64, 128, 8, 2)},
    ("sm_100", "forward"): {32: attention_tile(128, 64, 8, 2), 64: attention_tile(64, 64, 8, 2)},
    ("sm_100", "backward_a"): {32: attention_tile(128, 64, 8, 2), 64: attention_tile(64, 64, 8, 2)},
    ("sm_100", "backward_b"): {32: attention_tile(64, 64, 8, 2), 64: attention_tile(64, 64, 8, 2)},
}

#: Targets with tensor cores of another's kind, which take its row where they have none of their own: its tiles fit in
#: the 99 KiB of shared memory that their programs may have.
ROWS_OF = {"sm_86": "sm_80", "sm_89": "sm_86", "sm_120": "sm_86"}

_Row = TypeVar("_Row")


def _give_rows(table: dict[tuple[str, str], _Row]) -> None:
    """Complete a table by architecture and kernel with the rows that targets take of others."""
    for target, nearest in ROWS_OF.items():
        table.update({(target, k): row for (a, k), row in table.items() if a == nearest and (target, k) not in table})


_give_rows(ATTENTION_HALF)
_give_rows(ATTENTION_FLOAT_OWN)
_give_rows(RELATION_HALF)
