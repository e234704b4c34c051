"""Which configurations of the kernels are compiled, what the host would pass them, and at what size they are costed."""

import dataclasses
import itertools
from collections.abc import Iterator
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget

from fastbert.tuning.neighbours import shipped_tiles
from fastbert.tuning.problems import COMPILED
from fastbert_kernels import ACTIVATIONS, column_sums
from fastbert_kernels.block_passes import sums_in_kernels
from fastbert_kernels.catalogue import KERNELS, Kernel, Launch, Tiles
from fastbert_kernels.launch import row_multiple
from fastbert_kernels.sequences import blocked_length
from fastbert_kernels.tiles import FEED_FORWARD_ACTIVATIONS, PARTIAL_SUMS, short_class

from .limits import FEED_FORWARD, FLAGS, PEAKS, VOCABULARY, Cost, cost

TARGETS: dict[str, GPUTarget] = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_86": GPUTarget("cuda", 86, 32),
    "sm_89": GPUTarget("cuda", 89, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "sm_120": GPUTarget("cuda", 120, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}

#: The GPU of each target, a key of `limits.PEAKS`.
DEVICES = {
    "sm_80": "A100",
    "sm_86": "A10",
    "sm_89": "L4",
    "sm_90": "H200",
    "sm_100": "B200",
    "sm_120": "RTX 5090",
    "gfx942": "MI300X",
}

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
HEAD_DIMS = (8, 32, 48, 64, 80, 96, 128)

#: The size at which a case is costed where it names none: sequences, and tokens of each.
BATCH = (64, 512)
HEADS = 12

#: What `column_sums` takes, by the beginnings of its arguments' names.
MATRICES = ("first", "second", "third", "fourth", "fifth")

#: The dtype of each pointer argument; None is the case's own. Absent tensors are never read: any dtype will do.
_POINTERS: dict[str, torch.dtype | None] = {
    **dict.fromkeys(("qkv_ptr", "out_ptr", "probs_ptr", "dout_ptr", "dprobs_ptr", "dqkv_ptr", "head_mask_ptr")),
    **dict.fromkeys(("x_ptr", "residual_ptr", "weight_ptr", "norm_bias_ptr", "y_ptr", "dy_ptr", "dz_ptr", "dx_ptr")),
    **dict.fromkeys(("student_a_ptr", "student_b_ptr", "teacher_a_ptr", "teacher_b_ptr", "da_ptr", "db_ptr")),
    **dict.fromkeys(("pre_ptr", "dpre_ptr", "normed_ptr")),
    **dict.fromkeys(("word_table_ptr", "position_table_ptr", "token_type_table_ptr", "bias_ptr")),
    **dict.fromkeys(
        ("stats_ptr", "delta_ptr", "dhead_mask_ptr", "rstd_ptr", "then_bias_ptr", "kept_ptr", "partials_ptr"),
        torch.float32,
    ),
    **dict.fromkeys(("type_partials_ptr", *(f"{name}_ptr" for name in MATRICES)), torch.float32),
    **dict.fromkeys(("loss_ptr", "lse_ptr", "dloss_ptr", "dloss_max_ptr"), torch.float32),
    **dict.fromkeys(("cu_seqlens_ptr", "columns_ptr", "order_ptr", "key_spans_ptr"), torch.int32),
    **dict.fromkeys(("seed_ptr", "words_ptr", "positions_ptr", "token_types_ptr"), torch.int64),
    **dict.fromkeys(("found_words_ptr", "found_positions_ptr"), torch.int64),
}

#: Scalars that no problem size changes.
_SCALARS: dict[str, int | float] = {
    "masked_below": -1e30,
    **dict.fromkeys(("scale", "student_scale", "teacher_scale"), 0.125),
    "site": 7,
    "keep_threshold": 6554,
    "keep_scale": 1.1,
    "eps": 1e-12,
    **{f"{name}_rows": PARTIAL_SUMS for name in MATRICES},
    "vocab_rows": VOCABULARY,
    "position_rows": 512,
    "token_type_rows": 2,
    "padding_idx": 0,
    "position_padding_idx": -1,
}

#: Sizes, by whether they are multiples of 16, which the launcher tells the compiler. The bias has one head for all.
_SIZES: dict[bool, dict[str, int]] = {
    aligned: {
        "tokens": batch * seq,
        "count": batch * seq,
        "batch": batch,
        "heads": heads,
        "max_seqlen": seq,
        "probs_seq": seq,
        "bias_batch_stride": seq * seq,
        "bias_head_stride": 0,
        "bias_row_stride": seq,
    }
    for aligned, batch, heads, seq in ((False, 11, 12, 509), (True, 16, 16, 512))
}


@dataclasses.dataclass(frozen=True)
class Case:
    """One kernel in one configuration that the host code can launch."""

    kernel: str
    """A name of `catalogue.KERNELS`."""
    dtype: str
    """A key of `DTYPES`, of the activations and weights."""
    width: int
    """head_dim of an attention kernel, dim of a relation kernel (both models'), hidden size of a feed-forward kernel,
    whose other width is `FEED_FORWARD` times as much, features of the others."""
    flags: tuple[str, ...] = ()
    """Which HAS_ switches are on, without the HAS_."""
    activation: str | None = None
    """The activation, for the kernels that have one."""
    aligned: bool = False
    """Whether tokens, heads and sequence lengths are multiples of 16."""
    batch: tuple[int, int] = BATCH
    """At what size it is costed, and the attention kernels' tiles chosen: sequences, and tokens of each."""

    def __str__(self) -> str:
        return f"{self.kernel} {self.words}"

    @property
    def words(self) -> str:
        """The configuration in words, the kernel's name left out."""
        words = [self.dtype, str(self.width), self.activation, "+".join(self.flags).lower()]
        words += ["aligned" if self.aligned else None, None if self.batch == BATCH else "{}x{}".format(*self.batch)]
        return " ".join([word for word in words if word])

    def matches(self, text: str) -> bool:
        """Whether each word of `text` is part of the kernel's name or begins one of the configuration's words."""
        own = self.words.replace("+", " ").split()
        return all(word in self.kernel or any(mine.startswith(word) for mine in own) for word in text.lower().split())

    @property
    def traits(self) -> Kernel:
        """All else that is known of the kernel."""
        return KERNELS[self.kernel]

    @property
    def launch(self) -> Launch:
        """What its tiles are chosen by."""
        maps = self.traits.attends and not {"BIAS", "PROBS", "DPROBS"}.isdisjoint(self.flags)
        up_to = None
        if self.traits.op == "attention":  # a grid is over or under one wave on every GPU here alike
            sequences, tokens = self.batch
            up_to = short_class(tokens, sequences * HEADS, PEAKS["A100"].multiprocessors)
        return Launch(self.kernel, DTYPES[self.dtype], self.width, maps, up_to)

    def order(self) -> tuple[Any, ...]:
        """Sorts cases by kernel, dtype and width."""
        return list(COMPILED).index(self.kernel), self.dtype, self.width, str(self)

    @property
    def lengths(self) -> list[int]:
        """Tokens of each sequence of a call."""
        sequences, tokens = self.batch
        return [tokens] * sequences

    def cost(self, heads: int = HEADS) -> Cost:
        """What one call must compute and move; `heads` are of a sequence."""
        return cost(
            self.kernel,
            lengths=self.lengths,
            heads=heads if self.traits.attends else 1,
            width=self.width,
            dtype=self.dtype,
            flags=self.flags,
            activation=self.activation,
        )

    def summed(self) -> tuple[int, ...]:
        """Columns of the matrices that `column_sums` takes in a layer: of its activation, of its norms, of dQ, and of
        dK and dV."""
        return tuple(count * self.width for count in (FEED_FORWARD, 3, 3, 1, 2))

    def trips(self, tiles: Tiles, heads: int = HEADS) -> tuple[int, int]:
        """Programs of one call, and how often they go through their loop, all together."""
        tokens, block_m, block_n = sum(self.lengths), tiles["BLOCK_M"], tiles["BLOCK_N"]
        if self.traits.attends:
            own, streamed = (block_n, block_m) if self.traits.by_columns else (block_m, block_n)
            programs = [heads * -(-length // own) for length in self.lengths]
            trips = zip(programs, self.lengths, strict=True)
            return sum(programs), sum(p * -(-length // streamed) for p, length in trips)
        if self.traits.work == "product":  # counted by tile, as if each had a program of its own
            tiled = -(-tokens // block_m) * -(-FEED_FORWARD * self.width // block_n)
            return tiled, tiled * -(-self.width // tiles["BLOCK_K"])
        blocks, columns = -(-tokens // block_m), -(-self.width // block_n)
        if self.traits.work == "sums":
            columns = sum(-(-width // block_n) for width in self.summed())
            return columns, columns * -(-PARTIAL_SUMS // block_m)
        if not self.traits.backward:
            return blocks * columns, 0
        return min(blocks, PARTIAL_SUMS) * columns, blocks * columns


def cases(full: bool) -> list[Case]:
    """The configurations to compile.

    Args:
        full: every dtype, head_dim and activation, with the switches that tell; else a representative part: bfloat16,
            head_dim 64 and 32, 384 and 768 features, inference, training, probabilities, a bias mask, and float32.
    """
    return list(dict.fromkeys(_all_cases() if full else _representative_cases()))


def compiles(case: Case, target: str) -> bool:
    """Whether Triton has a compiler for it: that for AMD fails in 3.6 where a pointer is one of five."""
    return not (target == "gfx942" and case.kernel == "column_sums" and triton.__version__.startswith("3.6."))


#: Switches of the attention kernels where the model has packed a ragged batch.
_PACKED = ("CU_SEQLENS", "ORDER")


#: Short sequences, as of sentences; and a batch that does not fill a GPU.
_BATCHES = ((1092, 30), (256, 128), (1, 128))


def _attention_cases(
    dtype: str, head_dim: int, *switches: str, aligned: bool = False, batch: tuple[int, int] = BATCH
) -> Iterator[Case]:
    """The three attention kernels, as a layer launches them: with column sums, unless sequences are short. PROBS stands
    for probabilities asked for and, in the backward pass, used."""
    yield Case("attention_forward", dtype, head_dim, switches, aligned=aligned, batch=batch)
    sequences, tokens = batch
    sums = ("SUMS",) if sums_in_kernels(sequences * tokens, sequences) else ()
    for kernel in ("attention_backward_dq", "attention_backward_dkv"):
        flags = (*(flag.replace("PROBS", "DPROBS") for flag in switches), *sums)
        yield Case(kernel, dtype, head_dim, flags, aligned=aligned, batch=batch)


def _relation_cases(dtype: str, dim: int, *flags: str, aligned: bool = False) -> Iterator[Case]:
    for kernel in ("relation_forward", "relation_backward_a", "relation_backward_b"):
        yield Case(kernel, dtype, dim, flags, aligned=aligned)


def _representative_cases() -> Iterator[Case]:
    for head_dim in (64, 32):
        yield Case("attention_forward", "bfloat16", head_dim, _PACKED)
        yield from _attention_cases("bfloat16", head_dim, *_PACKED, "DROPOUT")
    for batch in _BATCHES:
        yield from _attention_cases("bfloat16", 64, *_PACKED, "DROPOUT", batch=batch)
    yield from _attention_cases("bfloat16", 64, *_PACKED, "DROPOUT", "PROBS")
    yield from _attention_cases("bfloat16", 64, "BIAS")
    yield from _attention_cases("bfloat16", 64, "KEY_SPANS", "DROPOUT")
    yield from _attention_cases("float32", 64, *_PACKED)
    for dtype, dim in (("bfloat16", 64), ("bfloat16", 32), ("float32", 64)):
        yield from _relation_cases(dtype, dim, "CU_SEQLENS", "SOFTMAX")
    for features in (384, 768):
        yield Case("add_layer_norm_forward", "bfloat16", features, ("BIAS", "RESIDUAL", "DROPOUT", "NORMED"))
        yield Case("add_layer_norm_backward", "bfloat16", features, ("BIAS", "DROPOUT"))
        yield Case("add_layer_norm_backward", "bfloat16", features, ("BIAS", "DROPOUT", "Y"))
        yield Case("embed_forward", "bfloat16", features, ("WORD_TABLE", "TOKEN_TYPES", "DROPOUT", "NORMED"))
        yield Case("embed_backward", "bfloat16", features, ("WORD_TABLE", "TOKEN_TYPES", "DROPOUT"))
    yield Case("add_layer_norm_forward", "bfloat16", 768, ("BIAS", "RESIDUAL"))
    yield Case("embed_forward", "bfloat16", 768, ("WORD_TABLE", "TOKEN_TYPES"))
    yield Case("bias_activation_forward", "bfloat16", 3072, ("BIAS",), activation="gelu")
    yield Case("bias_activation_forward", "bfloat16", 3072, ("BIAS", "THEN"), activation="gelu")
    yield Case("bias_activation_backward", "bfloat16", 3072, ("BIAS", "Y"), activation="gelu")
    for hidden in (384, 768, 1024):
        yield from _feed_forward_cases("bfloat16", hidden, "gelu")
    yield Case("column_sums", "bfloat16", 768)
    # A width of 8 mod 16, as TinyBERT has: its rows are multiples of 16 bytes too.
    yield Case("add_layer_norm_forward", "bfloat16", 312, ("BIAS", "RESIDUAL", "DROPOUT", "NORMED"))
    yield Case("add_layer_norm_backward", "bfloat16", 312, ("BIAS", "DROPOUT"))
    yield Case("embed_forward", "bfloat16", 312, ("WORD_TABLE", "TOKEN_TYPES"))
    yield Case("bias_activation_forward", "bfloat16", 312, ("BIAS",), activation="gelu")
    yield Case("feed_forward_forward", "bfloat16", 312, activation="gelu")
    yield Case("column_sums", "bfloat16", 312)


def _feed_forward_cases(dtype: str, hidden: int, activation: str) -> Iterator[Case]:
    """Inference, and both directions of training."""
    yield Case("feed_forward_forward", dtype, hidden, activation=activation)
    yield Case("feed_forward_forward", dtype, hidden, ("PRE",), activation)
    yield Case("feed_forward_backward", dtype, hidden, activation=activation)


def _subsets(*flags: str) -> Iterator[tuple[str, ...]]:
    for on in itertools.product((False, True), repeat=len(flags)):
        yield tuple(itertools.compress(flags, on))


#: Features of the row kernels in the full sweep: small, BERT's, odd, and the widest.
_ROW_WIDTHS = (37, 384, 768, 1023, 1024, 4096)

#: Switches of the attention kernels that stand for the rest: none, each kind of extra work, and all of it.
_TELLING = ((), ("DROPOUT",), ("PROBS",), ("BIAS", "HEAD_MASK", "DROPOUT", "PROBS"))


def _short(batches: tuple[tuple[int, int], ...]) -> Iterator[Case]:
    """The attention kernels' telling configurations of every dtype and head_dim, at other sizes than `BATCH`."""
    for batch, dtype, head_dim, switches in itertools.product(batches, DTYPES, HEAD_DIMS, _TELLING):
        packed = () if "BIAS" in switches else _PACKED
        yield from _attention_cases(dtype, head_dim, *packed, *switches, batch=batch)
    for batch, dtype, head_dim in itertools.product(batches, DTYPES, HEAD_DIMS):
        yield from _attention_cases(dtype, head_dim, "KEY_SPANS", "HEAD_MASK", "DROPOUT", batch=batch)
        flags = ("CU_SEQLENS", "COLUMNS", "BIAS", "HEAD_MASK", "DROPOUT", "PROBS")
        yield from _attention_cases(dtype, head_dim, *flags, batch=batch)


def _all_cases() -> Iterator[Case]:
    yield from _representative_cases()
    yield from _short(((1092, 30), (546, 60)))
    for dtype, head_dim in itertools.product(DTYPES, HEAD_DIMS):
        # Every set of switches where registers are scarcest; elsewhere, and for the twin dtype, the telling ones.
        every = dtype == "bfloat16" and head_dim in (64, 128)
        for switches in _subsets("BIAS", "HEAD_MASK", "DROPOUT", "PROBS") if every else _TELLING:
            # The model packs where there is no bias, and only packed tokens have columns, read with PROBS alone.
            packed = () if "BIAS" in switches else (*_PACKED, "COLUMNS") if "PROBS" in switches else _PACKED
            yield from _attention_cases(dtype, head_dim, *packed, *switches)
        yield from _attention_cases(dtype, head_dim, *_PACKED, "DROPOUT", "PROBS")
        yield from _attention_cases(dtype, head_dim, "KEY_SPANS", "HEAD_MASK", "DROPOUT")
        yield from _attention_cases(dtype, head_dim, "KEY_SPANS", "HEAD_MASK", "DROPOUT", "PROBS")
        yield from _attention_cases(dtype, head_dim, "CU_SEQLENS", "COLUMNS", "BIAS", "HEAD_MASK", "DROPOUT", "PROBS")
        yield from _attention_cases(dtype, head_dim, "BIAS", "DROPOUT", "PROBS", aligned=True)
        for switches in (("CU_SEQLENS", "SOFTMAX"), ("CU_SEQLENS",), ("SOFTMAX",)):
            yield from _relation_cases(dtype, head_dim, *switches)
        yield from _relation_cases(dtype, head_dim, "CU_SEQLENS", "SOFTMAX", aligned=True)
    for dtype, features in itertools.product(DTYPES, _ROW_WIDTHS):
        for switches in (("BIAS", "RESIDUAL"), ("BIAS", "RESIDUAL", "DROPOUT", "NORMED"), (), ("NORMED",)):
            yield Case("add_layer_norm_forward", dtype, features, switches)
        for switches in (("BIAS",), ("BIAS", "DROPOUT"), ("BIAS", "DROPOUT", "Y"), ()):
            yield Case("add_layer_norm_backward", dtype, features, switches)
        for switches in (("WORD_TABLE", "TOKEN_TYPES", "DROPOUT", "NORMED"), ()):
            yield Case("embed_forward", dtype, features, switches)
        for switches in (("WORD_TABLE", "TOKEN_TYPES", "DROPOUT"), ()):
            yield Case("embed_backward", dtype, features, switches)
    for dtype, features in itertools.product(DTYPES, (37, 768)):
        for activation in ACTIVATIONS:
            yield Case("bias_activation_forward", dtype, features, ("BIAS", "THEN"), activation)
            yield Case("bias_activation_backward", dtype, features, ("BIAS",), activation)
            yield Case("bias_activation_backward", dtype, features, ("BIAS", "Y"), activation)
        for activation in FEED_FORWARD_ACTIVATIONS:
            yield from _feed_forward_cases(dtype, 768, activation)
        yield Case("column_sums", dtype, features)


def launch_tiles(case: Case, target: str) -> Tiles:
    """The tiles and compile options with which the host launches a case."""
    return column_sums.TILES if case.traits.work == "sums" else shipped_tiles(case.launch, target)


def arguments(case: Case, tiles: Tiles) -> dict[str, Any]:
    """A launch of the case by argument name, like the host's: unallocated tensors, sizes, switches, tiles.

    Raises:
        KeyError: for an argument of the kernel that no table here knows, or a switch that the kernel does not have.
    """
    kernel, dtype = COMPILED[case.kernel], DTYPES[case.dtype]
    known: dict[str, Any] = {f"HAS_{flag}": False for flag in FLAGS}
    known |= {f"HAS_{flag}": True for flag in case.flags}
    known |= dict.fromkeys(("HEAD_DIM", "STUDENT_DIM", "TEACHER_DIM"), case.width)
    blocks = max(16, triton.next_power_of_2(case.width))
    known |= dict.fromkeys(("BLOCK_D", "BLOCK_STUDENT", "BLOCK_TEACHER"), blocks)
    operands = ("student_a", "student_b", "teacher_a", "teacher_b")  # of the three projections of a layer
    known |= {f"{name}_row_stride": 3 * _SIZES[case.aligned]["heads"] * case.width for name in operands}
    features = FEED_FORWARD * case.width if case.traits.work == "product" else case.width
    known |= {f"{name}_columns": columns for name, columns in zip(MATRICES, case.summed(), strict=True)}
    known |= {"inner": case.width, "features": features, "ACTIVATION": case.activation}
    known["ROW_MULTIPLE"] = row_multiple(case.width)
    known |= _SCALARS | _SIZES[case.aligned] | tiles
    for name, fixed in _POINTERS.items():
        known[name] = torch.empty(1, dtype=fixed or dtype, device="meta")
    packed = known["cu_seqlens_ptr"] if known["HAS_CU_SEQLENS"] else None
    known["max_seqlen"] = blocked_length(packed, known["max_seqlen"])
    if case.traits.attends:
        known["bias_ptr"] = torch.empty(1, dtype=torch.float32, device="meta")  # an additive mask, not a parameter
    unknown = [name for name in kernel.arg_names if name not in known]
    unknown += [f"HAS_{flag}" for flag in case.flags if f"HAS_{flag}" not in kernel.arg_names]
    if unknown:
        raise KeyError(f"{case.kernel}: cases.py does not know {', '.join(unknown)}: add it to the argument tables")
    return {name: known[name] for name in kernel.arg_names}
