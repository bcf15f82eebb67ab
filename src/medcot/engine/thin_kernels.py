"""Triton kernels that read a wide activation once for all the thin products LoRA makes of it.

A rank of 16 makes a product of (T, N) by (N, 16) as costly as reading its wide factor, and the backward pass wants two
of each output's gradient: ``du = dy B`` and ``dB = dyᵀ u``. Two library calls read dy twice, at well under the memory's
rate; SwiGLU's gradient has the product that the down projection's dA is made of in registers on its way. Here one pass
feeds both (bench/gpu_thin.py has the times):

- A program owns a block of BN columns and walks down a range of rows in tiles of BT. What belongs to its columns (dB,
  dA) is summed in registers to the end of the range. What belongs to the rows (du) is complete for the block's columns
  alone and is written for each tile, as float32. A second kernel adds the blocks, and the ranges, in a fixed order: no
  atomic additions, so that the same inputs give the same bits.
- By count, the rows' partial sums cost ``2 r / BN`` of a 16-bit dy's bytes and the columns' ``2 r / (rows of a
  range)``: at rank 16, 512 columns and seven ranges of 960 rows, 6 % and 3 %. That is why programs own columns and walk
  down rows, and why the blocks are wide.
- In SwiGLU the same order of work keeps the factors of the low-rank terms in place. One program a tile would read BN·r
  of every factor again: for the gradient in tiles of 16 × 128 at rank 16 as many bytes from the cache as of the
  operands themselves.

SwiGLU's gradient is also the operand of an 8-bit product, which wants a scale for each row, the largest number of the
whole row. No program has a whole row. So SwiGLU leaves the largest of its own columns, a float32 a row and block;
``row_scale_kernel`` makes the scales of them; and the thin product that reads the tensor next rounds it on the way.
Rounding by a kernel of its own would read it once more: 605 µs a layer in all against 504 (H200, 6,352 tokens). It does
not pay everywhere: SwiGLU's product, which only a cuBLAS product reads, took 288 µs this way and 258 without, the
rotation back 115 and 108.

Tiles have 64 rows, the least with which Hopper's matrix instructions read an operand from shared memory, so a tile
serves ``dy B`` and ``dyᵀ u`` from where the asynchronous copy left it; where it is rounded it passes through registers
anyway, and tiles of half the rows leave room for more programs. The plain twins are in ``pointwise.py``;
``thin.py`` calls these.

Axes are those of ``kernels.py``.
"""
# Triton's language is not typed Python: pointers, constexpr and tensor operators mean nothing to a type checker.
# mypy: ignore-errors
# A kernel's parameters are pointers and sizes named as in its launcher, which documents them.
# ruff: noqa: D103

import triton
import triton.language as tl

from medcot.engine.kernels import row_scale

# The number of tokens differs from batch to batch; specialising on it would compile a kernel again in mid-training.
_PER_BATCH = ["T", "rows_of_range"]


@triton.jit
def _rows_at(x, start, stride):
    """Where row ``start`` begins: in 64 bits, which a long batch needs. The offsets inside a tile fit 32."""
    return x + (tl.zeros((), tl.int64) + start) * stride


@triton.jit
def _load_rows(x, start, T, stride, columns, column_mask, BT: tl.constexpr):
    """Tile (BT, columns) of x (T, stride) from row ``start``; beyond the last row, zero."""
    t = tl.arange(0, BT)
    mask = (start + t < T)[:, None] & column_mask[None, :]
    return tl.load(_rows_at(x, start, stride) + (t[:, None] * stride + columns[None, :]), mask=mask, other=0.0)


@triton.jit
def _store_rows(x, value, start, T, stride, columns, column_mask, BT: tl.constexpr):
    t = tl.arange(0, BT)
    mask = (start + t < T)[:, None] & column_mask[None, :]
    place = _rows_at(x, start, stride) + (t[:, None] * stride + columns[None, :])
    tl.store(place, value.to(x.dtype.element_ty), mask=mask)


@triton.jit
def _load_factor(b, columns, column_mask, rank, RP: tl.constexpr):
    """Rows ``columns`` of b (N, r), padded to (BN, RP) with zeros."""
    k = tl.arange(0, RP)
    return tl.load(b + columns[:, None] * rank + k[None, :], mask=column_mask[:, None] & (k < rank)[None, :], other=0.0)


@triton.jit
def _store_factor(parts, value, index, N, columns, column_mask, rank, RP: tl.constexpr):
    """Write rows ``columns`` of the (N, r) matrix ``parts[index]``."""
    k = tl.arange(0, RP)
    place = parts + index.to(tl.int64) * N * rank + columns[:, None] * rank + k[None, :]
    tl.store(place, value, mask=column_mask[:, None] & (k < rank)[None, :])


@triton.jit
def _store_thin(parts, value, block, start, T, rank, RP: tl.constexpr, BT: tl.constexpr):
    """Write a tile's rows of the (T, r) matrix ``parts[block]``."""
    k = tl.arange(0, RP)
    _store_rows(parts + block.to(tl.int64) * T * rank, value, start, T, rank, k, k < rank, BT)


@triton.jit
def _store_largest(parts, value, block, start, T, BT: tl.constexpr):
    """Write the largest size of each row of a float32 tile into row ``block`` of the (blocks, T) parts."""
    t = tl.arange(0, BT)
    tl.store(_rows_at(parts, block, T) + start + t, tl.max(tl.abs(value), 1), mask=start + t < T)


@triton.jit
def _store_codes(codes, tile, factor, scale, start, T, stride, columns, column_mask, BT: tl.constexpr):
    """Write a tile rounded to 8 bit: its columns times ``factor``, its rows by their scales."""
    t = tl.arange(0, BT)
    inverse = 1.0 / tl.load(scale + start + t, mask=start + t < T, other=1.0)
    value = tile.to(tl.float32) * factor[None, :] * inverse[:, None]
    _store_rows(codes, value, start, T, stride, columns, column_mask, BT)


@triton.jit(do_not_specialize=["T", "num_blocks"])
def row_scale_kernel(parts, scale, T, num_blocks, AT_ONCE: tl.constexpr, BT: tl.constexpr):
    """Each row's scale from the largest sizes of its blocks, (blocks, T)."""
    rows = tl.program_id(0) * BT + tl.arange(0, BT)
    largest = tl.zeros((BT,), tl.float32)
    for start in range(0, num_blocks, AT_ONCE):
        block = start + tl.arange(0, AT_ONCE)
        mask = (block < num_blocks)[:, None] & (rows < T)[None, :]
        place = parts + block.to(tl.int64)[:, None] * T + rows[None, :]
        largest = tl.maximum(largest, tl.max(tl.load(place, mask=mask, other=0.0), 0))
    tl.store(scale + rows, row_scale(largest), mask=rows < T)


@triton.jit(do_not_specialize=_PER_BATCH)
def thin_gradients_kernel(
    dy, u, b, columns_scale, scale, du_parts, db_parts, codes, T, rows_of_range, N, width0, width1, rank, R,
    ROUNDS: tl.constexpr, RP: tl.constexpr, BT: tl.constexpr, BN: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    # The blocks of a group's parts are numbered through; a block lies in one part, whose own u and B it meets.
    block, row_range = tl.program_id(0), tl.program_id(1)
    blocks0, blocks1 = tl.cdiv(width0, BN), tl.cdiv(width1, BN)
    beyond0 = (block >= blocks0).to(tl.int32)
    beyond1 = (block >= blocks0 + blocks1).to(tl.int32)
    first = beyond0 * width0 + beyond1 * width1
    last = width0 + beyond0 * width1 + beyond1 * (N - width0 - width1)
    columns = first + (block - beyond0 * blocks0 - beyond1 * blocks1) * BN + tl.arange(0, BN)
    column_mask = columns < last
    own_rank = (beyond0 + beyond1) * rank
    k = tl.arange(0, RP)
    b_tile = _load_factor(b, columns, column_mask, rank, RP)
    if ROUNDS:
        factor = tl.load(columns_scale + columns, mask=column_mask, other=0.0)
    db = tl.zeros((BN, RP), tl.float32)
    begin = row_range * rows_of_range
    for start in tl.range(begin, tl.minimum(begin + rows_of_range, T), BT, num_stages=STAGES):
        dy_tile = _load_rows(dy, start, T, N, columns, column_mask, BT)
        u_tile = _load_rows(u, start, T, R, own_rank + k, k < rank, BT)
        du = tl.dot(dy_tile, b_tile, input_precision="ieee")
        db = tl.dot(tl.trans(dy_tile), u_tile, db, input_precision="ieee")
        _store_thin(du_parts, du, block, start, T, rank, RP, BT)
        if ROUNDS:
            _store_codes(codes, dy_tile, factor, scale, start, T, N, columns, column_mask, BT)
    _store_factor(db_parts, db, row_range, N, columns, column_mask, rank, RP)


@triton.jit
def _sum_parts(parts, first, last, size, place, AT_ONCE: tl.constexpr, BLOCK: tl.constexpr):
    """Sum of ``parts[first:last]`` at ``place``, each part ``size`` long; in one order, ``AT_ONCE`` loads in flight."""
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(first, last, AT_ONCE):
        index = start + tl.arange(0, AT_ONCE)
        mask = (index < last)[:, None] & (place < size)[None, :]
        total += tl.sum(tl.load(parts + index.to(tl.int64)[:, None] * size + place[None, :], mask=mask, other=0.0), 0)
    return total


@triton.jit(do_not_specialize=["T", "num_ranges"])
def thin_sum_kernel(
    du_parts, db_parts, du, db, T, num_ranges, size_db, rank, R, blocks0, blocks1, num_blocks,
    AT_ONCE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    # The first programs add blocks of columns, of one part each; the others add ranges of rows.
    size_du = T * rank
    programs_du = tl.cdiv(size_du, BLOCK)
    index = tl.program_id(0)
    if index < R // rank * programs_du:
        part = index // programs_du
        first = (part > 0).to(tl.int32) * blocks0 + (part > 1).to(tl.int32) * blocks1
        last = blocks0 + (part > 0).to(tl.int32) * blocks1 + (part > 1).to(tl.int32) * (num_blocks - blocks0 - blocks1)
        place = (index - part * programs_du) * BLOCK + tl.arange(0, BLOCK)
        total = _sum_parts(du_parts, first, last, size_du, place, AT_ONCE, BLOCK)
        out = du + (place // rank).to(tl.int64) * R + part * rank + place % rank
        tl.store(out, total.to(du.dtype.element_ty), mask=place < size_du)
    else:
        place = (index - R // rank * programs_du) * BLOCK + tl.arange(0, BLOCK)
        total = _sum_parts(db_parts, 0, num_ranges, size_db, place, AT_ONCE, BLOCK)
        tl.store(db + place, total.to(db.dtype.element_ty), mask=place < size_db)


@triton.jit
def _load_term_factor(b, columns, column_mask, rank, RP: tl.constexpr):
    """As ``_load_factor``, the other way up: (RP, BN)."""
    k = tl.arange(0, RP)
    return tl.load(b + columns[None, :] * rank + k[:, None], mask=(k < rank)[:, None] & column_mask[None, :], other=0.0)


@triton.jit(do_not_specialize=_PER_BATCH)
def swiglu_kernel(
    gate_up, u, b, out, T, rows_of_range, F, rank,
    HAS_LOW: tl.constexpr, RP: tl.constexpr, BT: tl.constexpr, BN: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    block, row_range = tl.program_id(0), tl.program_id(1)
    columns = block * BN + tl.arange(0, BN)
    column_mask = columns < F
    k = tl.arange(0, RP)
    if HAS_LOW:
        b_gate = _load_term_factor(b, columns, column_mask, rank, RP)
        b_up = _load_term_factor(b + F * rank, columns, column_mask, rank, RP)
    begin = row_range * rows_of_range
    for start in tl.range(begin, tl.minimum(begin + rows_of_range, T), BT, num_stages=STAGES):
        gate = _load_rows(gate_up, start, T, 2 * F, columns, column_mask, BT).to(tl.float32)
        up = _load_rows(gate_up + F, start, T, 2 * F, columns, column_mask, BT).to(tl.float32)
        if HAS_LOW:
            u_gate = _load_rows(u, start, T, 2 * rank, k, k < rank, BT)
            u_up = _load_rows(u + rank, start, T, 2 * rank, k, k < rank, BT)
            gate = tl.dot(u_gate, b_gate, gate, input_precision="ieee")
            up = tl.dot(u_up, b_up, up, input_precision="ieee")
        _store_rows(out, gate * tl.sigmoid(gate) * up, start, T, F, columns, column_mask, BT)


@triton.jit(do_not_specialize=_PER_BATCH)
def swiglu_grad_kernel(
    dh, du_down, a_down, gate_up, u, b, columns_scale, out, da_parts, largest_parts,
    T, rows_of_range, F, rank, rank_down, HAS_DOWN: tl.constexpr, HAS_LOW: tl.constexpr, MEASURES: tl.constexpr,
    RP: tl.constexpr, RP_DOWN: tl.constexpr, BT: tl.constexpr, BN: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    # out may be gate_up: a tile is read before it is written, by the same program, and by no other.
    # HAS_DOWN: dh lacks a term, and that projection's dA is wanted: a product of h, made again in its 16-bit rounding.
    block, row_range = tl.program_id(0), tl.program_id(1)
    columns = block * BN + tl.arange(0, BN)
    column_mask = columns < F
    k, j = tl.arange(0, RP), tl.arange(0, RP_DOWN)
    kind = out.dtype.element_ty
    if HAS_LOW:
        b_gate = _load_term_factor(b, columns, column_mask, rank, RP)
        b_up = _load_term_factor(b + F * rank, columns, column_mask, rank, RP)
    if HAS_DOWN:
        a_mask = (j < rank_down)[:, None] & column_mask[None, :]
        a_tile = tl.load(a_down + j[:, None] * F + columns[None, :], mask=a_mask, other=0.0)
    if MEASURES:
        gate_factor = tl.load(columns_scale + columns, mask=column_mask, other=0.0)
        up_factor = tl.load(columns_scale + F + columns, mask=column_mask, other=0.0)
    da = tl.zeros((BN, RP_DOWN), tl.float32)
    begin = row_range * rows_of_range
    for start in tl.range(begin, tl.minimum(begin + rows_of_range, T), BT, num_stages=STAGES):
        gate = _load_rows(gate_up, start, T, 2 * F, columns, column_mask, BT).to(tl.float32)
        up = _load_rows(gate_up + F, start, T, 2 * F, columns, column_mask, BT).to(tl.float32)
        gradient = _load_rows(dh, start, T, F, columns, column_mask, BT).to(tl.float32)
        if HAS_LOW:
            u_gate = _load_rows(u, start, T, 2 * rank, k, k < rank, BT)
            u_up = _load_rows(u + rank, start, T, 2 * rank, k, k < rank, BT)
            gate = tl.dot(u_gate, b_gate, gate, input_precision="ieee")
            up = tl.dot(u_up, b_up, up, input_precision="ieee")
        if HAS_DOWN:
            d_tile = _load_rows(du_down, start, T, rank_down, j, j < rank_down, BT)
            gradient = tl.dot(d_tile, a_tile, gradient, input_precision="ieee")
        sigmoid = tl.sigmoid(gate)
        silu = gate * sigmoid
        d_gate = (gradient * up * sigmoid * (1 + gate * (1 - sigmoid))).to(kind)
        d_up = (gradient * silu).to(kind)
        _store_rows(out, d_gate, start, T, 2 * F, columns, column_mask, BT)
        _store_rows(out + F, d_up, start, T, 2 * F, columns, column_mask, BT)
        if MEASURES:
            gate_sizes = tl.abs(d_gate.to(tl.float32) * gate_factor[None, :])
            up_sizes = tl.abs(d_up.to(tl.float32) * up_factor[None, :])
            _store_largest(largest_parts, tl.maximum(gate_sizes, up_sizes), block, start, T, BT)
        if HAS_DOWN:
            da = tl.dot(tl.trans((silu * up).to(kind)), d_tile, da, input_precision="ieee")
    if HAS_DOWN:
        _store_factor(da_parts, da, row_range, F, columns, column_mask, rank_down, RP_DOWN)
