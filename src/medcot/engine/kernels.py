"""The engine's Triton kernels: everything of a decoder layer that is neither a matrix product nor attention.

On an H200 a layer of Llama 8B spends 7.8 ms of a step of 6k tokens in its frozen matrix products, and in plain torch
nearly as long in the rest: LoRA's low-rank products written back into wide outputs (0.73 ms), norms, rotary embedding,
SwiGLU, unpacking 4-bit weights. All of these only move bytes, so the kernels here are written to move fewer:

- A projection's low-rank term ``u Bᵀ`` is not added into its (T, N) output, which would read and write all of it once
  more. The kernel that reads that output next (rotary embedding, SwiGLU, the next norm) adds the term on the way, from
  ``u`` (T, R) and a tile of ``B`` with one small matrix product a tile. The backward pass does the same with ``du A``.
- The residual sum and the norm after it are one kernel; so are the norm's gradient and the sum of the two gradients
  that meet there.
- An 8-bit product's operand is rounded by the kernel that makes it, where one program makes whole rows of it: the norm
  forward and backward. A row's scale is known when the row is complete, so its numbers are looked at once more, from
  registers or from the cache.
- NF4 is unpacked at the copy's speed (3.7 TB/s against 2.1 for bitsandbytes' own kernel), to the same bits.

Sums are float32. The plain-torch twins of the same signatures are in ``pointwise.py``; ``launch.py`` calls these.
SwiGLU is with LoRA's thin products in ``thin_kernels.py``.

Axes: T tokens, D hidden, N outputs, F intermediate, R rank of all projections of a group, r of one, C channels of a
head, V vocabulary. ``RP`` is a rank padded to a power of two of at least 16, which Triton's ``dot`` wants.
"""
# Triton's language is not typed Python: pointers, constexpr and tensor operators mean nothing to a type checker.
# mypy: ignore-errors
# A kernel's parameters are pointers and sizes named as in its launcher, which documents them.
# ruff: noqa: D103

import triton
import triton.language as tl

# The number of tokens differs from batch to batch; specialising on it would compile a kernel again in mid-training.
_PER_BATCH = ["T"]


@triton.jit
def _low_rank(u_tile, factor, columns, column_mask, rank, RP: tl.constexpr, ROW_MAJOR: tl.constexpr, width):
    """``u_tile (BT, RP) @ factorᵀ`` for a factor stored (N, r), or ``@ factor`` for one stored (R, N)."""
    k = tl.arange(0, RP)
    mask = (k < rank)[:, None] & column_mask[None, :]
    if ROW_MAJOR:
        place = factor + k[:, None] * width + columns[None, :]
    else:
        place = factor + columns[None, :] * rank + k[:, None]
    tile = tl.load(place, mask=mask, other=0.0)
    return tl.dot(u_tile, tile, input_precision="ieee")


@triton.jit
def row_scale(largest):
    """The factor that brings a row whose largest size is given to e4m3's range, and back; see ``quantise_rows``."""
    return tl.where(largest > 1e-30, largest / 448.0, 1.0)  # what is less comes out as zero


@triton.jit(do_not_specialize=_PER_BATCH)
def add_norm_kernel(
    x, y, u, b, weight, out_sum, out_norm, out_r, T, rank, eps,
    D: tl.constexpr, HAS_Y: tl.constexpr, HAS_LOW: tl.constexpr, RP: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    rows = (tl.program_id(0) * BT + tl.arange(0, BT)).to(tl.int64)
    row_mask = rows < T
    k = tl.arange(0, RP)
    if HAS_LOW:
        u_tile = tl.load(u + rows[:, None] * rank + k[None, :], mask=row_mask[:, None] & (k < rank)[None, :], other=0.0)
    squares = tl.zeros((BT,), tl.float32)
    for start in range(0, D, BD):
        columns = start + tl.arange(0, BD)
        mask = row_mask[:, None] & (columns < D)[None, :]
        place = rows[:, None] * D + columns[None, :]
        value = tl.load(x + place, mask=mask, other=0.0).to(tl.float32)
        if HAS_Y:
            value += tl.load(y + place, mask=mask, other=0.0).to(tl.float32)
            if HAS_LOW:
                value += _low_rank(u_tile, b, columns, columns < D, rank, RP, False, D)
            stored = value.to(out_sum.dtype.element_ty)
            tl.store(out_sum + place, stored, mask=mask)
            value = stored.to(tl.float32)
        squares += tl.sum(value * value, 1)
    r = 1.0 / tl.sqrt(squares / D + eps)
    tl.store(out_r + rows, r, mask=row_mask)
    tl.debug_barrier()
    for start in range(0, D, BD):
        columns = start + tl.arange(0, BD)
        mask = row_mask[:, None] & (columns < D)[None, :]
        place = rows[:, None] * D + columns[None, :]
        if HAS_Y:
            value = tl.load(out_sum + place, mask=mask, other=0.0).to(tl.float32)
        else:
            value = tl.load(x + place, mask=mask, other=0.0).to(tl.float32)
        scale = tl.load(weight + columns, mask=columns < D, other=0.0).to(tl.float32)
        normed = (value * r[:, None] * scale[None, :]).to(out_norm.dtype.element_ty)
        tl.store(out_norm + place, normed, mask=mask)


@triton.jit(do_not_specialize=_PER_BATCH)
def norm_grad_kernel(
    dn, x, weight, r_in, d_sum, out, columns_scale, codes, codes_scale, T,
    D: tl.constexpr, HAS_SUM: tl.constexpr, ROUNDS: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    # One row a program, held in registers from its reading to its writing. The gradient's low-rank term is added
    # before: with it, rows would have to come in sixteens, for Triton's matrix product, and be read twice.
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BD)
    mask = columns < D
    value = tl.load(x + row * D + columns, mask=mask, other=0.0).to(tl.float32)
    h = tl.load(dn + row * D + columns, mask=mask, other=0.0).to(tl.float32)
    h *= tl.load(weight + columns, mask=mask, other=0.0).to(tl.float32)
    r = tl.load(r_in + row)
    dx = h * r - value * (tl.sum(h * value, 0) * r * r * r / D)
    if HAS_SUM:
        dx += tl.load(d_sum + row * D + columns, mask=mask, other=0.0).to(tl.float32)
    stored = dx.to(out.dtype.element_ty)
    tl.store(out + row * D + columns, stored, mask=mask)
    if ROUNDS:
        factor = tl.load(columns_scale + columns, mask=mask, other=0.0, eviction_policy="evict_last")
        scaled = stored.to(tl.float32) * factor
        scale = row_scale(tl.max(tl.abs(scaled), 0))
        tl.store(codes_scale + row, scale)
        tl.store(codes + row * D + columns, (scaled * (1.0 / scale)).to(codes.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=_PER_BATCH)
def rotate_kernel(
    heads, u, b, cos, sin, T, num_heads, num_queries, num_kv, rank, angle_stride,
    HALF: tl.constexpr, HP: tl.constexpr, HAS_LOW: tl.constexpr, RP: tl.constexpr, BT: tl.constexpr,
):  # fmt: skip
    rows = (tl.program_id(0) * BT + tl.arange(0, BT)).to(tl.int64)
    head = tl.program_id(1)
    row_mask = rows < T
    channel = tl.arange(0, HP)
    mask = row_mask[:, None] & (channel < HALF)[None, :]
    first_column = head * 2 * HALF + channel
    place = heads + rows[:, None] * (num_heads * 2 * HALF) + first_column[None, :]
    first = tl.load(place, mask=mask, other=0.0).to(tl.float32)
    second = tl.load(place + HALF, mask=mask, other=0.0).to(tl.float32)
    if HAS_LOW:
        part = (head >= num_queries).to(tl.int32) + (head >= num_queries + num_kv).to(tl.int32)
        k = tl.arange(0, RP)
        u_place = u + rows[:, None] * (3 * rank) + part * rank + k[None, :]
        u_tile = tl.load(u_place, mask=row_mask[:, None] & (k < rank)[None, :], other=0.0)
        first += _low_rank(u_tile, b, first_column, channel < HALF, rank, RP, False, 0)
        second += _low_rank(u_tile, b, first_column + HALF, channel < HALF, rank, RP, False, 0)
    if head < num_queries + num_kv:
        angle = rows[:, None] * angle_stride + channel[None, :]
        c = tl.load(cos + angle, mask=mask, other=0.0).to(tl.float32)
        s = tl.load(sin + angle, mask=mask, other=0.0).to(tl.float32)
        turned = first * c - second * s
        second = second * c + first * s
        first = turned
    tl.store(place, first.to(heads.dtype.element_ty), mask=mask)
    tl.store(place + HALF, second.to(heads.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=_PER_BATCH)
def rotate_back_kernel(
    dq, dk, dv, cos, sin, out, T, num_heads, num_queries, num_kv, angle_stride,
    HALF: tl.constexpr, HP: tl.constexpr, BT: tl.constexpr,
):  # fmt: skip
    rows = (tl.program_id(0) * BT + tl.arange(0, BT)).to(tl.int64)
    head = tl.program_id(1)
    channel = tl.arange(0, HP)
    mask = (rows < T)[:, None] & (channel < HALF)[None, :]
    if head < num_queries:
        source = dq + rows[:, None] * (num_queries * 2 * HALF) + head * 2 * HALF + channel[None, :]
    elif head < num_queries + num_kv:
        source = dk + rows[:, None] * (num_kv * 2 * HALF) + (head - num_queries) * 2 * HALF + channel[None, :]
    else:
        source = dv + rows[:, None] * (num_kv * 2 * HALF) + (head - num_queries - num_kv) * 2 * HALF + channel[None, :]
    first = tl.load(source, mask=mask, other=0.0).to(tl.float32)
    second = tl.load(source + HALF, mask=mask, other=0.0).to(tl.float32)
    if head < num_queries + num_kv:
        angle = rows[:, None] * angle_stride + channel[None, :]
        c = tl.load(cos + angle, mask=mask, other=0.0).to(tl.float32)
        s = tl.load(sin + angle, mask=mask, other=0.0).to(tl.float32)
        turned = first * c + second * s
        second = second * c - first * s
        first = turned
    place = out + rows[:, None] * (num_heads * 2 * HALF) + head * 2 * HALF + channel[None, :]
    tl.store(place, first.to(out.dtype.element_ty), mask=mask)
    tl.store(place + HALF, second.to(out.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=_PER_BATCH)
def cross_entropy_kernel(logits, targets, losses, V: tl.constexpr, BV: tl.constexpr):
    """One row: its loss, and in place of its logits ``softmax - onehot(target)``."""
    row = tl.program_id(0).to(tl.int64)
    target = tl.load(targets + row)
    own = logits + row * V
    columns = tl.arange(0, BV)
    high = tl.full((BV,), float("-inf"), tl.float32)
    total = tl.zeros((BV,), tl.float32)
    for start in range(0, V, BV):
        value = tl.load(own + start + columns, mask=start + columns < V, other=float("-inf")).to(tl.float32)
        new_high = tl.maximum(high, value)
        # A lane that has seen nothing yet keeps its sum of zero: exp(-inf - -inf) would be NaN.
        total = tl.where(new_high == float("-inf"), 0.0, total * tl.exp(high - new_high) + tl.exp(value - new_high))
        high = new_high
    top = tl.max(high, 0)
    total_sum = tl.sum(tl.where(high == float("-inf"), 0.0, total * tl.exp(high - top)), 0)
    log_sum = top + tl.log(total_sum)
    tl.store(losses + row, log_sum - tl.load(own + target).to(tl.float32))
    tl.debug_barrier()
    for start in range(0, V, BV):
        mask = start + columns < V
        value = tl.load(own + start + columns, mask=mask, other=float("-inf")).to(tl.float32)
        p = tl.exp(value - log_sum) - tl.where(start + columns == target, 1.0, 0.0)
        tl.store(own + start + columns, p.to(logits.dtype.element_ty), mask=mask)


@triton.jit
def unpack_nf4_kernel(
    packed0, absmax0, code0, absmax_code0, absmax_scale0, offset0, num_bytes0,
    packed1, absmax1, code1, absmax_code1, absmax_scale1, offset1, num_bytes1,
    packed2, absmax2, code2, absmax_code2, absmax_scale2, offset2, num_bytes2,
    out, NESTED: tl.constexpr, BLOCKSIZE: tl.constexpr, NESTED_BLOCKSIZE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    # Up to three matrices, one after another in ``out``; those that are not there have no bytes, and no program.
    tile = tl.program_id(0)
    in1 = tile >= tl.cdiv(num_bytes0, BLOCK)
    in2 = tile >= tl.cdiv(num_bytes0, BLOCK) + tl.cdiv(num_bytes1, BLOCK)
    packed = tl.where(in2, packed2, tl.where(in1, packed1, packed0))
    absmax = tl.where(in2, absmax2, tl.where(in1, absmax1, absmax0))
    code = tl.where(in2, code2, tl.where(in1, code1, code0))
    num_bytes = tl.where(in2, num_bytes2, tl.where(in1, num_bytes1, num_bytes0))
    first_tile = tl.where(in1, tl.cdiv(num_bytes0, BLOCK), 0) + tl.where(in2, tl.cdiv(num_bytes1, BLOCK), 0)
    first_byte = tl.where(in1, num_bytes0, 0).to(tl.int64) + tl.where(in2, num_bytes1, 0)
    start = (tile - first_tile).to(tl.int64) * BLOCK
    place = start + tl.arange(0, BLOCK)
    mask = place < num_bytes
    pair = tl.load(packed + place, mask=mask, other=0).to(tl.int32)
    block = place * 2 // BLOCKSIZE
    if NESTED:
        absmax_code = tl.where(in2, absmax_code2, tl.where(in1, absmax_code1, absmax_code0))
        absmax_scale = tl.where(in2, absmax_scale2, tl.where(in1, absmax_scale1, absmax_scale0))
        index = tl.load(absmax + block, mask=mask, other=0).to(tl.int32)
        scale = tl.load(absmax_code + index) * tl.load(absmax_scale + block // NESTED_BLOCKSIZE, mask=mask, other=0.0)
        scale += tl.load(tl.where(in2, offset2, tl.where(in1, offset1, offset0)))
    else:
        scale = tl.load(absmax + block, mask=mask, other=0.0)
    first = tl.load(code + (pair >> 4)) * scale  # the first weight of a pair is in the high half of the byte
    second = tl.load(code + (pair & 15)) * scale
    both = tl.interleave(first, second)
    out_place = start * 2 + tl.arange(0, 2 * BLOCK)
    tl.store(
        out + first_byte * 2 + out_place, both.to(out.dtype.element_ty), mask=out_place < num_bytes.to(tl.int64) * 2
    )


@triton.jit
def _scaled_columns(x, columns_scale, row, columns, N, HAS_SCALE: tl.constexpr):
    value = tl.load(x + row * N + columns, mask=columns < N, other=0.0).to(tl.float32)
    if HAS_SCALE:
        value *= tl.load(columns_scale + columns, mask=columns < N, other=0.0, eviction_policy="evict_last")
    return value


@triton.jit(do_not_specialize=_PER_BATCH)
def quantise_rows_kernel(
    x, columns_scale, out, out_scale, T,
    N: tl.constexpr, HAS_SCALE: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    # The first block of a row stays in registers, so that a row of one block is read once; the gradient of a
    # vocabulary's logits has more, which are read twice. The columns' factors are more bytes than a row: the program's
    # next rows find them in the multiprocessor's own cache.
    head_columns = tl.arange(0, BLOCK)
    first = tl.program_id(0) * ROWS
    for row_number in range(first, tl.minimum(first + ROWS, T)):
        row = tl.zeros((), tl.int64) + row_number
        head = _scaled_columns(x, columns_scale, row, head_columns, N, HAS_SCALE)
        largest = tl.max(tl.abs(head), 0)
        for start in range(BLOCK, N, BLOCK):
            value = _scaled_columns(x, columns_scale, row, start + tl.arange(0, BLOCK), N, HAS_SCALE)
            largest = tl.maximum(largest, tl.max(tl.abs(value), 0))
        scale = row_scale(largest)
        inverse = 1.0 / scale  # a division an element would take longer than the row's reading
        tl.store(out_scale + row, scale)
        tl.store(out + row * N + head_columns, (head * inverse).to(out.dtype.element_ty), mask=head_columns < N)
        for start in range(BLOCK, N, BLOCK):
            columns = start + tl.arange(0, BLOCK)
            value = _scaled_columns(x, columns_scale, row, columns, N, HAS_SCALE)
            tl.store(out + row * N + columns, (value * inverse).to(out.dtype.element_ty), mask=columns < N)
