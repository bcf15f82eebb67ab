"""One row times a frozen NF4 matrix, with its LoRA: the product that decides how fast one answer is written.

A step of one row reads every weight once and uses it once, so the bound is the bytes of the packed weights: 3.9 GB for
8B parameters in NF4, 0.93 ms at an H200's 4.2 TB/s. Making the weights dense first, as bitsandbytes' general path and
training do, moves 4.56 bytes a weight instead of 0.56. Here each packed word is read once and never written.

Storage (bitsandbytes): two weights a byte, the first in the high nibble, rows end to end; a scale for each 64 weights,
itself stored in 8 bits with a scale for each 256 and one offset. The nested scales are unpacked to float32 once when
decoding starts (1/16 byte a weight): undoing them in the kernel would cost three dependent loads for every 64 weights.

Arithmetic is as tight as memory: at 4.2 TB/s a processor of an H200 gets 29 weights a clock, and has 128 lanes of
multiply-add, 64 of integer arithmetic, 32 of shared memory or shuffles. A lookup of a nibble's value in a table in
memory takes an address (two integer operations) and a load for each weight. A shuffle does it in one integer operation
and one shuffle: lane l of each half-warp holds entry l of the table, and a shuffle of width 16 looks at no more than
the low four bits of the lane it is asked for, so that the packed word, shifted, is the index. Everything is summed in
float32.

LoRA is unmerged: ``u = x Aᵀ`` comes from whoever made x, as P partial sums, and ``B u`` is added at the end.

Axes: D inputs, W = D/8 packed words of a row; N outputs; R rank; P partial sums.
"""
# Triton's language is not typed Python: pointers, constexpr and tensor operators mean nothing to a type checker.
# mypy: ignore-errors

import triton
import triton.language as tl


@triton.jit
def _table_entry(code_ptr):
    """This lane's entry of the table of 16 values."""
    return tl.inline_asm_elementwise(
        """{
        .reg .u32 lane; .reg .u64 place;
        mov.u32 lane, %laneid;
        and.b32 lane, lane, 15;
        mad.wide.u32 place, lane, 4, $1;
        ld.global.nc.f32 $0, [place];
        }""",
        "=f,l",
        [code_ptr.to(tl.int64)],
        dtype=tl.float32,
        is_pure=True,
        pack=1,
    )


@triton.jit
def _unpack(words, entry):
    """The eight values of each packed word, in the order of its weights."""
    return tl.inline_asm_elementwise(
        """{
        .reg .b32 t;
        shr.u32 t, $8, 4;
        shfl.sync.idx.b32 $0, $9, t, 0x101f, 0xffffffff;
        shfl.sync.idx.b32 $1, $9, $8, 0x101f, 0xffffffff;
        shr.u32 t, $8, 12;
        shfl.sync.idx.b32 $2, $9, t, 0x101f, 0xffffffff;
        shr.u32 t, $8, 8;
        shfl.sync.idx.b32 $3, $9, t, 0x101f, 0xffffffff;
        shr.u32 t, $8, 20;
        shfl.sync.idx.b32 $4, $9, t, 0x101f, 0xffffffff;
        shr.u32 t, $8, 16;
        shfl.sync.idx.b32 $5, $9, t, 0x101f, 0xffffffff;
        shr.u32 t, $8, 28;
        shfl.sync.idx.b32 $6, $9, t, 0x101f, 0xffffffff;
        shr.u32 t, $8, 24;
        shfl.sync.idx.b32 $7, $9, t, 0x101f, 0xffffffff;
        }""",
        "=f,=f,=f,=f,=f,=f,=f,=f,r,f",
        [words, entry],
        dtype=(tl.float32,) * 8,
        is_pure=True,
        pack=1,
    )


@triton.jit
def _looked_up(words, code_ptr, SHIFT: tl.constexpr):
    """One of the eight values of each word, from the table in memory."""
    return tl.load(code_ptr + ((words >> SHIFT) & 15))


@triton.jit
def _dot_words(words, x_ptr, kw, real_k, W: tl.constexpr, code_ptr, entry, SHUFFLES: tl.constexpr):
    """Sum of each word's eight products, unscaled. x has its eight parts W apart (see decode_kernels)."""
    if SHUFFLES:
        v0, v1, v2, v3, v4, v5, v6, v7 = _unpack(words, entry)
    else:
        v0 = _looked_up(words, code_ptr, 4)
        v1 = _looked_up(words, code_ptr, 0)
        v2 = _looked_up(words, code_ptr, 12)
        v3 = _looked_up(words, code_ptr, 8)
        v4 = _looked_up(words, code_ptr, 20)
        v5 = _looked_up(words, code_ptr, 16)
        v6 = _looked_up(words, code_ptr, 28)
        v7 = _looked_up(words, code_ptr, 24)
    total = v0 * tl.load(x_ptr + kw, mask=real_k, other=0.0)[None, :]
    total += v1 * tl.load(x_ptr + W + kw, mask=real_k, other=0.0)[None, :]
    total += v2 * tl.load(x_ptr + 2 * W + kw, mask=real_k, other=0.0)[None, :]
    total += v3 * tl.load(x_ptr + 3 * W + kw, mask=real_k, other=0.0)[None, :]
    total += v4 * tl.load(x_ptr + 4 * W + kw, mask=real_k, other=0.0)[None, :]
    total += v5 * tl.load(x_ptr + 5 * W + kw, mask=real_k, other=0.0)[None, :]
    total += v6 * tl.load(x_ptr + 6 * W + kw, mask=real_k, other=0.0)[None, :]
    total += v7 * tl.load(x_ptr + 7 * W + kw, mask=real_k, other=0.0)[None, :]
    return total


@triton.jit
def nf4_gemv_kernel(
    x_ptr, w0_ptr, w1_ptr, w2_ptr, scales_ptr, code_ptr, u_ptr, B_ptr, bias_ptr, y_ptr, y_stride,
    N0: tl.constexpr, N1: tl.constexpr, N2: tl.constexpr, D: tl.constexpr, SPLITS: tl.constexpr,
    RANK: tl.constexpr, RANK_BLOCK: tl.constexpr, PARTIALS: tl.constexpr, PARTIALS_BLOCK: tl.constexpr,
    NUM_PARTS: tl.constexpr, HAS_BIAS: tl.constexpr, ROWS: tl.constexpr, WORDS: tl.constexpr,
    SHUFFLES: tl.constexpr,
):  # fmt: skip
    """One program a tile of output rows, share of the inputs, and row of x; up to three matrices, one after another."""
    tile, split, row = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    W: tl.constexpr = D // 8
    N: tl.constexpr = N0 + N1 + N2
    tiles0: tl.constexpr = (N0 + ROWS - 1) // ROWS
    tiles1: tl.constexpr = (N1 + ROWS - 1) // ROWS
    in1 = (tile >= tiles0) & (tile < tiles0 + tiles1)
    in2 = tile >= tiles0 + tiles1
    w_ptr = tl.where(in2, w2_ptr, tl.where(in1, w1_ptr, w0_ptr))
    first_row = tl.where(in2, N0 + N1, tl.where(in1, N0, 0))
    first_tile = tl.where(in2, tiles0 + tiles1, tl.where(in1, tiles0, 0))
    num_rows = tl.where(in2, N2, tl.where(in1, N1, N0))
    n = (tile - first_tile) * ROWS + tl.arange(0, ROWS)
    real_n = n < num_rows
    n = tl.where(real_n, n, 0)  # the last tile of a matrix reads its first row again rather than mask every load
    scales_ptr += first_row * (D // 64)
    x_ptr += row * D
    entry = 0.0
    if SHUFFLES:
        entry = _table_entry(code_ptr)

    share: tl.constexpr = ((W + WORDS - 1) // WORDS + SPLITS - 1) // SPLITS * WORDS
    start = split * share
    stop = tl.minimum(start + share, W)
    k = tl.arange(0, WORDS)
    quarter = tl.arange(0, WORDS // 4)  # a lane's four words share a scale
    acc = tl.zeros([ROWS, WORDS // 4], tl.float32)
    w_ptrs = w_ptr + n[:, None] * W + k[None, :]
    scales_ptrs = scales_ptr + n[:, None] * (D // 64) + quarter[None, :] // 2
    words = tl.load(w_ptrs + start, mask=(start + k < stop)[None, :], other=0)
    scales = tl.load(scales_ptrs + start // 8, mask=(start + quarter * 4 < stop)[None, :], other=0.0)
    for begin in range(start, stop, WORDS):
        after = begin + WORDS  # the next tile is on its way while this one is summed
        next_words = tl.load(w_ptrs + after, mask=(after + k < stop)[None, :], other=0)
        next_scales = tl.load(scales_ptrs + after // 8, mask=(after + quarter * 4 < stop)[None, :], other=0.0)
        kw = begin + k
        products = _dot_words(words, x_ptr, kw, kw < stop, W, code_ptr, entry, SHUFFLES)
        acc += tl.sum(tl.reshape(products, [ROWS, WORDS // 4, 4]), 2) * scales
        words = next_words
        scales = next_scales
    y = tl.sum(acc, 1)

    if split == 0:
        if RANK > 0:
            r = tl.arange(0, RANK_BLOCK)
            p = tl.arange(0, PARTIALS_BLOCK)
            part = tl.where(in2, 2, tl.where(in1, 1, 0))
            places = (row * PARTIALS + p[:, None]) * (NUM_PARTS * RANK) + part * RANK + r[None, :]
            real = (p < PARTIALS)[:, None] & (r < RANK)[None, :]
            u = tl.sum(tl.load(u_ptr + places, mask=real, other=0.0), 0)
            b = tl.load(B_ptr + (first_row + n)[:, None] * RANK + r[None, :], mask=(r < RANK)[None, :], other=0.0)
            y += tl.sum(b.to(tl.float32) * u[None, :], 1)
        if HAS_BIAS:
            y += tl.load(bias_ptr + first_row + n).to(tl.float32)
    tl.store(y_ptr + split * y_stride + row * N + first_row + n, y, mask=real_n)
