"""Flash attention for rows laid end to end, as Triton kernels for Hopper: forward, and backward in two passes.

PyTorch's own ``varlen_attn`` is FlashAttention-2 (Dao 2023, arXiv:2307.08691), written for Ampere: on an H200, with
8 rows of about 790 tokens, it reaches some 150 TFLOP/s. Three things are done differently here.

**The query heads that share a key head are rows of one tile.** A tile of BM rows is BM / J tokens times J heads. A key
tile is read once for all of them, and the causal diagonal is cut BM / J tokens wide rather than BM: with tiles of 128
rows and 64 keys, a row of 790 tokens at J = 4 computes 11 % more scores than the triangle holds, against 44 % where
the tile is 128 tokens of one head. In the backward pass the sum of dK and dV over the group's heads is thereby part of
the matrix product: no expanded gradients, no later sum.

**No atomics.** One kernel makes dQ, and the row sums of dO ∘ O on its way; the next makes dK and dV. Scores and dP are
computed in both, seven matrix products in place of five, but nothing is added up in memory: no float32 dQ to clear,
convert and order, and the same bits every time.

**No empty program, the longest first.** The host knows every row's length, so each program is given (row, tile) from a
table sorted by work.

With ``S = s·QKᵀ``, ``L`` the log-sum-exp of its rows, ``P = exp(S - L)``, ``D = rowsum(dO ∘ O)``:

    O = PV        dV = Pᵀ dO        dP = dO Vᵀ        dS = P ∘ (dP - D)        dQ = s·dS K        dK = s·dSᵀ Q

Softmax runs online (Milakov & Gimelshein 2018, arXiv:1805.02867) in powers of two, so L is kept as log₂ of the sum.
Scores and sums are float32; P and dS are rounded to the inputs' type for their products, as in FlashAttention.

Tiles are fetched by Hopper's tensor memory accelerator where a token's J heads fill a power of two: it takes the
strided (tokens, J, C) box as it lies in the fused buffer, and costs no registers for addresses. Otherwise, and for
heads of 96 channels, by pointers. What lies past a row's end is the next row's; it is set to zero where it would meet a
sum over tokens, because 0 · NaN would carry a neighbour's NaN across. Tiles that can reach past the end, and tiles that
the causal mask cuts, have loops of their own.

Axes: T tokens of all rows; N = H + 2G heads of the fused buffer; H query heads; G key/value heads; J = H/G; C channels,
CP the same padded to a power of two; M = T·J rows of packed queries, the J heads of a token side by side.
"""
# Triton's language is not typed Python: pointers, constexpr and tensor operators mean nothing to a type checker.
# mypy: ignore-errors
# A kernel's parameters are pointers and sizes named as in its launcher, which documents them.
# ruff: noqa: D103

import triton
import triton.language as tl

# The numbers of tokens differ from batch to batch; specialising on them would compile a kernel again in mid-training.
_PER_BATCH = ["num_tokens", "window"]
# Stands for a score of minus infinity: a query whose first tiles are all hidden gets wrong sums of finite values, which
# the first score it does see (its own key's at the latest) multiplies by exp(-2¹⁰⁰) = 0; infinity would give NaN.
# A power of two, because the compiler fuses ``s * scale - highest`` into one rounding: of any other number the product
# and its rounded self, the maximum, would differ by 1e22, and exp2 of that is infinite.
_HIDDEN = tl.constexpr(-(2.0**100))
_LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def _load_rows(base, offsets, row_mask, C: tl.constexpr, CP: tl.constexpr, MASKED: tl.constexpr):
    """A (rows, CP) tile by pointers; rows that the mask hides and channels from C on are zero."""
    channel = tl.arange(0, CP)
    place = base + offsets[:, None] + channel[None, :]
    if C < CP:
        tile = tl.load(place, mask=row_mask[:, None] & (channel < C)[None, :], other=0.0)
    elif MASKED:
        tile = tl.load(place, mask=row_mask[:, None], other=0.0)
    else:
        tile = tl.load(place)
    return tile


@triton.jit
def _load_keys(
    source, token, row_mask, head: tl.constexpr, g,
    N: tl.constexpr, C: tl.constexpr, CP: tl.constexpr, BN: tl.constexpr, BOXES: tl.constexpr, CLEAN: tl.constexpr,
):  # fmt: skip
    """BN tokens of head ``head + g``, from a batch's token on; ``CLEAN``: those past the row's end as zeros."""
    if BOXES:
        tile = source.load([token.to(tl.int32), (head + g) * C])
        if CLEAN:
            tile = tl.where(row_mask[:, None], tile, tl.zeros_like(tile))
    else:
        base = source + (token.to(tl.int64) * N + head + g) * C
        tile = _load_rows(base, tl.arange(0, BN) * (N * C), row_mask, C, CP, CLEAN)
    return tile


@triton.jit
def _load_queries(
    source, token, row_mask, g,
    J: tl.constexpr, N: tl.constexpr, C: tl.constexpr, CP: tl.constexpr, BM: tl.constexpr, BOXES: tl.constexpr,
    CLEAN: tl.constexpr,
):  # fmt: skip
    """The J heads of BM / J tokens, from a batch's token on, out of N heads; ``CLEAN`` as in ``_load_keys``."""
    if BOXES:
        tile = source.load([token.to(tl.int32), g * J, 0]).reshape(BM, CP)
        if CLEAN:
            tile = tl.where(row_mask[:, None], tile, tl.zeros_like(tile))
    else:
        m = tl.arange(0, BM)
        base = source + (token.to(tl.int64) * N + g * J) * C
        tile = _load_rows(base, (m // J) * (N * C) + (m % J) * C, row_mask, C, CP, CLEAN or BM % J != 0)
    return tile


@triton.jit
def _store_rows(base, offsets, row_mask, tile, C: tl.constexpr, CP: tl.constexpr):
    channel = tl.arange(0, CP)
    mask = row_mask[:, None] & (channel < C)[None, :]
    tl.store(base + offsets[:, None] + channel[None, :], tile.to(base.dtype.element_ty), mask=mask)


@triton.jit
def _sees(token, key, window, WINDOWED: tl.constexpr):
    """Whether a query looks at a key; the two broadcast against each other."""
    seen = key <= token
    if WINDOWED:
        seen = seen & (key > token - window)
    return seen


@triton.jit
def _open_tile(tiles, G: tl.constexpr):
    """This program's key head, and its tile: the row's start in the batch, its length, and the first token of the tile.

    The heads of a tile come one after another, so that the table's order, longest first, is that of the programs.
    """
    program = tl.program_id(0)
    entry = tiles + 3 * (program // G)
    return program % G, tl.load(entry).to(tl.int64), tl.load(entry + 1), tl.load(entry + 2)


@triton.jit
def _key_range(
    first, length, window, TOKENS: tl.constexpr, BN: tl.constexpr, SPLIT: tl.constexpr, WINDOWED: tl.constexpr
):
    """The keys that a tile of queries looks at, cut in three: ``low .. plain .. whole .. high``.

    The first and the last part are masked, the middle one needs none, and is empty where the loops are not split. Keys
    before ``whole`` lie within the row. All but ``high`` are multiples of BN.
    """
    high = tl.minimum(first + TOKENS, length)
    low = first * 0
    if WINDOWED:
        low = tl.maximum(first - window + 1, 0) // BN * BN
    if SPLIT:
        plain = low
        whole = tl.maximum((first + 1) // BN * BN, low)  # the first query sees every key before this
        if WINDOWED:
            plain = tl.minimum((tl.maximum(high - window, 0) + BN - 1) // BN * BN, whole)
            plain = tl.maximum(plain, low)
    else:
        whole = tl.minimum(length // BN, (high + BN - 1) // BN) * BN
        plain = whole
    return low, plain, whole, high


# --- forward ----------------------------------------------------------------------------------------------------------


@triton.jit
def _attend_keys(
    acc, high, total, q, source, token, row_start, length, window, g, begin, end,
    H: tl.constexpr, G: tl.constexpr, C: tl.constexpr, CP: tl.constexpr, SCALE2: tl.constexpr, BN: tl.constexpr,
    BOXES: tl.constexpr, MASKED: tl.constexpr, CLEAN: tl.constexpr, WINDOWED: tl.constexpr,
):  # fmt: skip
    n = tl.arange(0, BN)
    for start in range(begin, end, BN):
        key = start + n
        inside = key < length
        k = _load_keys(source, row_start + start, inside, H, g, H + 2 * G, C, CP, BN, BOXES, CLEAN and not BOXES)
        s = tl.dot(q, tl.trans(k))
        if MASKED:
            s = tl.where(_sees(token[:, None], key[None, :], window, WINDOWED), s, _HIDDEN)
        new_high = tl.maximum(high, tl.max(s, 1) * SCALE2)
        p = tl.exp2(s * SCALE2 - new_high[:, None])
        shrink = tl.exp2(high - new_high)
        total = total * shrink + tl.sum(p, 1)
        v = _load_keys(source, row_start + start, inside, H + G, g, H + 2 * G, C, CP, BN, BOXES, CLEAN)
        acc = tl.dot(p.to(v.dtype), v, acc * shrink[:, None])
        high = new_high
    return acc, high, total


@triton.jit(do_not_specialize=_PER_BATCH)
def attend_kernel(
    queries, keys, tiles, out, lse, num_tokens, window,
    H: tl.constexpr, G: tl.constexpr, C: tl.constexpr, CP: tl.constexpr, SCALE: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BOXES: tl.constexpr, SPLIT: tl.constexpr, WINDOWED: tl.constexpr,
):  # fmt: skip
    J: tl.constexpr = H // G
    TOKENS: tl.constexpr = BM // J
    SCALE2: tl.constexpr = SCALE * _LOG2E
    g, row_start, length, first = _open_tile(tiles, G)
    m = tl.arange(0, BM)
    token = first + m // J
    row_mask = (token < length) & (m < TOKENS * J)
    at = row_start + first
    q = _load_queries(queries, at, row_mask, g, J, H + 2 * G, C, CP, BM, False, True)
    low, plain, whole, end = _key_range(first, length, window, TOKENS, BN, SPLIT, WINDOWED)
    acc = tl.zeros((BM, CP), tl.float32)
    high = tl.full((BM,), float("-inf"), tl.float32)
    total = tl.zeros((BM,), tl.float32)
    if WINDOWED or not SPLIT:
        acc, high, total = _attend_keys(
            acc, high, total, q, keys, token, row_start, length, window, g, low, plain,
            H, G, C, CP, SCALE2, BN, BOXES, True, False, WINDOWED,
        )  # fmt: skip
    if SPLIT:
        acc, high, total = _attend_keys(
            acc, high, total, q, keys, token, row_start, length, window, g, plain, whole,
            H, G, C, CP, SCALE2, BN, BOXES, False, False, False,
        )  # fmt: skip
    acc, high, total = _attend_keys(
        acc, high, total, q, keys, token, row_start, length, window, g, whole, end,
        H, G, C, CP, SCALE2, BN, BOXES, True, True, WINDOWED,
    )  # fmt: skip
    packed = lse + (g.to(tl.int64) * num_tokens + at) * J
    tl.store(packed + m, high + tl.log2(total), mask=row_mask)
    offsets = (m // J) * (H * C) + (m % J) * C
    _store_rows(out + (at * H + g * J) * C, offsets, row_mask, acc / total[:, None], C, CP)


# --- backward: dQ and the row sums of dO ∘ O --------------------------------------------------------------------------


@triton.jit
def _gather_dq(
    dq, q, do, lse, delta, source, token, row_start, length, window, g, begin, end,
    H: tl.constexpr, G: tl.constexpr, C: tl.constexpr, CP: tl.constexpr, SCALE2: tl.constexpr, BN: tl.constexpr,
    BOXES: tl.constexpr, MASKED: tl.constexpr, CLEAN: tl.constexpr, WINDOWED: tl.constexpr,
):  # fmt: skip
    n = tl.arange(0, BN)
    for start in range(begin, end, BN):
        key = start + n
        inside = key < length
        k = _load_keys(source, row_start + start, inside, H, g, H + 2 * G, C, CP, BN, BOXES, CLEAN)
        v = _load_keys(source, row_start + start, inside, H + G, g, H + 2 * G, C, CP, BN, BOXES, CLEAN and not BOXES)
        s = tl.dot(q, tl.trans(k))
        dp = tl.dot(do, tl.trans(v))
        ds = tl.exp2(s * SCALE2 - lse[:, None]) * (dp - delta[:, None])
        if MASKED:
            ds = tl.where(_sees(token[:, None], key[None, :], window, WINDOWED), ds, 0.0)
        dq = tl.dot(ds.to(k.dtype), k, dq)
    return dq


@triton.jit(do_not_specialize=_PER_BATCH)
def query_grad_kernel(
    queries, keys, tiles, out, d_out, lse, delta_out, d_query, num_tokens, window,
    H: tl.constexpr, G: tl.constexpr, C: tl.constexpr, CP: tl.constexpr, SCALE: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BOXES: tl.constexpr, SPLIT: tl.constexpr, WINDOWED: tl.constexpr,
):  # fmt: skip
    J: tl.constexpr = H // G
    TOKENS: tl.constexpr = BM // J
    SCALE2: tl.constexpr = SCALE * _LOG2E
    g, row_start, length, first = _open_tile(tiles, G)
    m = tl.arange(0, BM)
    token = first + m // J
    row_mask = (token < length) & (m < TOKENS * J)
    at = row_start + first
    do = _load_queries(d_out, at, row_mask, g, J, H, C, CP, BM, False, True)
    o = _load_queries(out, at, row_mask, g, J, H, C, CP, BM, False, True)
    delta = tl.sum(o.to(tl.float32) * do.to(tl.float32), 1)
    packed = (g.to(tl.int64) * num_tokens + at) * J + m
    tl.store(delta_out + packed, delta, mask=row_mask)
    log_sum = tl.load(lse + packed, mask=row_mask, other=float("inf"))
    q = _load_queries(queries, at, row_mask, g, J, H + 2 * G, C, CP, BM, False, True)
    low, plain, whole, end = _key_range(first, length, window, TOKENS, BN, SPLIT, WINDOWED)
    dq = tl.zeros((BM, CP), tl.float32)
    if WINDOWED or not SPLIT:
        dq = _gather_dq(
            dq, q, do, log_sum, delta, keys, token, row_start, length, window, g, low, plain,
            H, G, C, CP, SCALE2, BN, BOXES, True, False, WINDOWED,
        )  # fmt: skip
    if SPLIT:
        dq = _gather_dq(
            dq, q, do, log_sum, delta, keys, token, row_start, length, window, g, plain, whole,
            H, G, C, CP, SCALE2, BN, BOXES, False, False, False,
        )  # fmt: skip
    dq = _gather_dq(
        dq, q, do, log_sum, delta, keys, token, row_start, length, window, g, whole, end,
        H, G, C, CP, SCALE2, BN, BOXES, True, True, WINDOWED,
    )  # fmt: skip
    offsets = (m // J) * (H * C) + (m % J) * C
    _store_rows(d_query + (at * H + g * J) * C, offsets, row_mask, dq * SCALE, C, CP)


# --- backward: dK and dV ----------------------------------------------------------------------------------------------


@triton.jit
def _gather_dk_dv(
    dk, dv, k, v, queries, d_outs, lse, delta, key, row_start, length, window, g, begin, end,
    H: tl.constexpr, G: tl.constexpr, C: tl.constexpr, CP: tl.constexpr, SCALE2: tl.constexpr, BM: tl.constexpr,
    BOXES: tl.constexpr, MASKED: tl.constexpr, CLEAN: tl.constexpr, WINDOWED: tl.constexpr,
):  # fmt: skip
    # Scores stand transposed, keys by queries, so that P and dS are left operands straight from registers.
    J: tl.constexpr = H // G
    TOKENS: tl.constexpr = BM // J
    m = tl.arange(0, BM)
    for start in tl.range(begin, end, TOKENS, num_stages=1 if CLEAN else None):
        token = start + m // J
        row_mask = m < TOKENS * J
        if CLEAN:
            row_mask = row_mask & (token < length)
        q = _load_queries(queries, row_start + start, row_mask, g, J, H + 2 * G, C, CP, BM, BOXES, CLEAN)
        do = _load_queries(d_outs, row_start + start, row_mask, g, J, H, C, CP, BM, BOXES, CLEAN)
        s = tl.dot(k, tl.trans(q))
        log_sum = tl.load(lse + start * J + m, mask=row_mask, other=float("inf"))
        p = tl.exp2(s * SCALE2 - log_sum[None, :])
        if MASKED:
            p = tl.where(_sees(token[None, :], key[:, None], window, WINDOWED), p, 0.0)
        dv = tl.dot(p.to(do.dtype), do, dv)
        dp = tl.dot(v, tl.trans(do))
        d = tl.load(delta + start * J + m, mask=row_mask, other=0.0)
        ds = p * (dp - d[None, :])
        dk = tl.dot(ds.to(q.dtype), q, dk)
    return dk, dv


@triton.jit(do_not_specialize=_PER_BATCH)
def key_grad_kernel(
    queries, keys, d_outs, tiles, lse, delta, d_key, d_value, num_tokens, window,
    H: tl.constexpr, G: tl.constexpr, C: tl.constexpr, CP: tl.constexpr, SCALE: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BOXES: tl.constexpr, SPLIT: tl.constexpr, WINDOWED: tl.constexpr,
):  # fmt: skip
    J: tl.constexpr = H // G
    N: tl.constexpr = H + 2 * G
    TOKENS: tl.constexpr = BM // J
    SCALE2: tl.constexpr = SCALE * _LOG2E
    g, row_start, length, first = _open_tile(tiles, G)
    n = tl.arange(0, BN)
    key = first + n
    inside = key < length
    k = _load_keys(keys, row_start + first, inside, H, g, N, C, CP, BN, BOXES, not BOXES)
    v = _load_keys(keys, row_start + first, inside, H + G, g, N, C, CP, BN, BOXES, not BOXES)
    packed = (g.to(tl.int64) * num_tokens + row_start) * J
    lse += packed
    delta += packed
    dk, dv = tl.zeros((BN, CP), tl.float32), tl.zeros((BN, CP), tl.float32)
    # Tiles of queries start at the first key. Up to ``diagonal`` they are masked, then not up to ``plain``, then by the
    # window up to ``whole``, and from there on they reach past the row's end.
    end = length
    if WINDOWED:
        end = tl.minimum(end, first + BN - 1 + window)
    whole = first + tl.minimum((length - first) // TOKENS, (end - first + TOKENS - 1) // TOKENS) * TOKENS
    diagonal = whole
    if SPLIT:
        diagonal = tl.minimum(first + (BN - 1 + TOKENS - 1) // TOKENS * TOKENS, whole)
    dk, dv = _gather_dk_dv(
        dk, dv, k, v, queries, d_outs, lse, delta, key, row_start, length, window, g, first, diagonal,
        H, G, C, CP, SCALE2, BM, BOXES, True, False, WINDOWED,
    )  # fmt: skip
    if SPLIT:
        plain = whole
        if WINDOWED:
            plain = tl.maximum(tl.minimum(first + window // TOKENS * TOKENS, whole), diagonal)
        dk, dv = _gather_dk_dv(
            dk, dv, k, v, queries, d_outs, lse, delta, key, row_start, length, window, g, diagonal, plain,
            H, G, C, CP, SCALE2, BM, BOXES, False, False, False,
        )  # fmt: skip
        if WINDOWED:
            dk, dv = _gather_dk_dv(
                dk, dv, k, v, queries, d_outs, lse, delta, key, row_start, length, window, g, plain, whole,
                H, G, C, CP, SCALE2, BM, BOXES, True, False, True,
            )  # fmt: skip
    dk, dv = _gather_dk_dv(
        dk, dv, k, v, queries, d_outs, lse, delta, key, row_start, length, window, g, whole, end,
        H, G, C, CP, SCALE2, BM, BOXES, True, True, WINDOWED,
    )  # fmt: skip
    base = ((row_start + first) * G + g) * C
    _store_rows(d_key + base, n * (G * C), inside, dk * SCALE, C, CP)
    _store_rows(d_value + base, n * (G * C), inside, dv, C, CP)
