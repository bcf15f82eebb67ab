"""Flash attention for rows laid end to end, as Triton kernels for Hopper: forward, and backward in two passes.

PyTorch's own ``varlen_attn`` is FlashAttention-2 (Dao 2023, arXiv:2307.08691), written for Ampere: on an H200, with
8 rows of about 790 tokens, it reaches some 150 TFLOP/s. Three things are done differently here.

**The query heads that share a key head are rows of one tile.** A tile of BM rows is BM / J tokens times J heads. A key
tile is read once for all of them, and the causal diagonal is cut BM / J tokens wide rather than BM: with tiles of 128
rows and 64 keys, a row of 790 tokens at J = 4 computes 11 % more scores than the triangle holds, against 47 % where
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

Keys past a row's end are read as zeros, never as the next row's: 0 · NaN would carry a neighbour's NaN across.

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
# the first score it does see (its own key's at the latest) multiplies by exp(-1e30) = 0; infinity would give NaN.
_HIDDEN = tl.constexpr(-1e30)
_LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def _load_rows(base, offsets, row_mask, C: tl.constexpr, CP: tl.constexpr, MASKED: tl.constexpr):
    """A (rows, CP) tile; rows that the mask hides and channels from C on are zero."""
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
def _key_range(first, length, window, TOKENS: tl.constexpr, BN: tl.constexpr, WINDOWED: tl.constexpr):
    """The keys that a tile of queries looks at, cut in three: ``low .. full`` masked, ``.. diagonal`` not, ``.. high``.

    The first three are multiples of BN.
    """
    high = tl.minimum(first + TOKENS, length)
    diagonal = (first + 1) // BN * BN  # the first query sees every key before this
    low = first * 0
    full = low
    if WINDOWED:
        low = tl.maximum(first - window + 1, 0) // BN * BN
        full = (tl.maximum(high - window, 0) + BN - 1) // BN * BN
        full = tl.minimum(full, tl.maximum(diagonal, low))
        diagonal = tl.maximum(diagonal, full)
    return low, full, diagonal, high


# --- forward ----------------------------------------------------------------------------------------------------------


@triton.jit
def _attend_keys(
    acc, high, total, q, k_base, v_base, token, length, window, begin, end,
    N: tl.constexpr, C: tl.constexpr, CP: tl.constexpr, BN: tl.constexpr, SCALE: tl.constexpr,
    MASKED: tl.constexpr, WINDOWED: tl.constexpr,
):  # fmt: skip
    n = tl.arange(0, BN)
    offsets = n * (N * C)
    k_base += begin.to(tl.int64) * (N * C)
    v_base += begin.to(tl.int64) * (N * C)
    for start in range(begin, end, BN):
        key = start + n
        k = _load_rows(k_base, offsets, key < length, C, CP, MASKED)
        s = tl.dot(q, tl.trans(k))
        if MASKED:
            s = tl.where(_sees(token[:, None], key[None, :], window, WINDOWED), s, _HIDDEN)
        new_high = tl.maximum(high, tl.max(s, 1) * (SCALE * _LOG2E))
        p = tl.exp2(s * (SCALE * _LOG2E) - new_high[:, None])
        shrink = tl.exp2(high - new_high)
        total = total * shrink + tl.sum(p, 1)
        v = _load_rows(v_base, offsets, key < length, C, CP, MASKED)
        acc = tl.dot(p.to(v.dtype), v, acc * shrink[:, None])
        high = new_high
        k_base += BN * N * C
        v_base += BN * N * C
    return acc, high, total


@triton.jit(do_not_specialize=_PER_BATCH)
def attend_kernel(
    heads, tiles, out, lse, num_tokens, window,
    H: tl.constexpr, G: tl.constexpr, C: tl.constexpr, CP: tl.constexpr, SCALE: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, SPLIT: tl.constexpr, WINDOWED: tl.constexpr,
):  # fmt: skip
    J: tl.constexpr = H // G
    N: tl.constexpr = H + 2 * G
    TOKENS: tl.constexpr = BM // J
    g, row_start, length, first = _open_tile(tiles, G)
    m = tl.arange(0, BM)
    token = first + m // J
    row_mask = (token < length) & (m < TOKENS * J)
    at = row_start + first
    q = _load_rows(heads + (at * N + g * J) * C, (m // J) * (N * C) + (m % J) * C, row_mask, C, CP, True)
    k_base, v_base = heads + (row_start * N + H + g) * C, heads + (row_start * N + H + G + g) * C
    low, full, diagonal, end = _key_range(first, length, window, TOKENS, BN, WINDOWED)
    acc = tl.zeros((BM, CP), tl.float32)
    high = tl.full((BM,), float("-inf"), tl.float32)
    total = tl.zeros((BM,), tl.float32)
    if SPLIT:
        if WINDOWED:
            acc, high, total = _attend_keys(
                acc, high, total, q, k_base, v_base, token, length, window, low, full,
                N, C, CP, BN, SCALE, True, True,
            )  # fmt: skip
        acc, high, total = _attend_keys(
            acc, high, total, q, k_base, v_base, token, length, window, full, diagonal,
            N, C, CP, BN, SCALE, False, False,
        )  # fmt: skip
        low = diagonal
    acc, high, total = _attend_keys(
        acc, high, total, q, k_base, v_base, token, length, window, low, end,
        N, C, CP, BN, SCALE, True, WINDOWED,
    )  # fmt: skip
    packed = lse + (g.to(tl.int64) * num_tokens + at) * J
    tl.store(packed + m, high + tl.log2(total), mask=row_mask)
    offsets = (m // J) * (H * C) + (m % J) * C
    _store_rows(out + (at * H + g * J) * C, offsets, row_mask, acc / total[:, None], C, CP)


# --- backward: dQ and the row sums of dO ∘ O --------------------------------------------------------------------------


@triton.jit
def _gather_dq(
    dq, q, do, lse, delta, k_base, v_base, token, length, window, begin, end,
    N: tl.constexpr, C: tl.constexpr, CP: tl.constexpr, BN: tl.constexpr, SCALE: tl.constexpr,
    MASKED: tl.constexpr, WINDOWED: tl.constexpr,
):  # fmt: skip
    n = tl.arange(0, BN)
    offsets = n * (N * C)
    k_base += begin.to(tl.int64) * (N * C)
    v_base += begin.to(tl.int64) * (N * C)
    for start in range(begin, end, BN):
        key = start + n
        k = _load_rows(k_base, offsets, key < length, C, CP, MASKED)
        v = _load_rows(v_base, offsets, key < length, C, CP, MASKED)
        s = tl.dot(q, tl.trans(k))
        dp = tl.dot(do, tl.trans(v))
        p = tl.exp2(s * (SCALE * _LOG2E) - lse[:, None])
        if MASKED:
            p = tl.where(_sees(token[:, None], key[None, :], window, WINDOWED), p, 0.0)
        ds = p * (dp - delta[:, None])
        dq = tl.dot(ds.to(k.dtype), k, dq)
        k_base += BN * N * C
        v_base += BN * N * C
    return dq


@triton.jit(do_not_specialize=_PER_BATCH)
def query_grad_kernel(
    heads, tiles, out, d_out, lse, delta_out, d_query, num_tokens, window,
    H: tl.constexpr, G: tl.constexpr, C: tl.constexpr, CP: tl.constexpr, SCALE: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, SPLIT: tl.constexpr, WINDOWED: tl.constexpr,
):  # fmt: skip
    J: tl.constexpr = H // G
    N: tl.constexpr = H + 2 * G
    TOKENS: tl.constexpr = BM // J
    g, row_start, length, first = _open_tile(tiles, G)
    m = tl.arange(0, BM)
    token = first + m // J
    row_mask = (token < length) & (m < TOKENS * J)
    at = row_start + first
    narrow = (m // J) * (H * C) + (m % J) * C
    narrow_base = (at * H + g * J) * C
    do = _load_rows(d_out + narrow_base, narrow, row_mask, C, CP, True)
    o = _load_rows(out + narrow_base, narrow, row_mask, C, CP, True)
    delta = tl.sum(o.to(tl.float32) * do.to(tl.float32), 1)
    packed = (g.to(tl.int64) * num_tokens + at) * J + m
    tl.store(delta_out + packed, delta, mask=row_mask)
    log_sum = tl.load(lse + packed, mask=row_mask, other=float("inf"))
    q = _load_rows(heads + (at * N + g * J) * C, (m // J) * (N * C) + (m % J) * C, row_mask, C, CP, True)
    k_base, v_base = heads + (row_start * N + H + g) * C, heads + (row_start * N + H + G + g) * C
    low, full, diagonal, end = _key_range(first, length, window, TOKENS, BN, WINDOWED)
    dq = tl.zeros((BM, CP), tl.float32)
    if SPLIT:
        if WINDOWED:
            dq = _gather_dq(
                dq, q, do, log_sum, delta, k_base, v_base, token, length, window, low, full,
                N, C, CP, BN, SCALE, True, True,
            )  # fmt: skip
        dq = _gather_dq(
            dq, q, do, log_sum, delta, k_base, v_base, token, length, window, full, diagonal,
            N, C, CP, BN, SCALE, False, False,
        )  # fmt: skip
        low = diagonal
    dq = _gather_dq(
        dq, q, do, log_sum, delta, k_base, v_base, token, length, window, low, end,
        N, C, CP, BN, SCALE, True, WINDOWED,
    )  # fmt: skip
    _store_rows(d_query + narrow_base, narrow, row_mask, dq * SCALE, C, CP)


# --- backward: dK and dV ----------------------------------------------------------------------------------------------


@triton.jit
def _gather_dk_dv(
    dk, dv, k, v, q_base, do_base, lse, delta, m, key, length, window, begin, end,
    H: tl.constexpr, G: tl.constexpr, C: tl.constexpr, CP: tl.constexpr, SCALE: tl.constexpr, BM: tl.constexpr,
    MASKED: tl.constexpr, WINDOWED: tl.constexpr,
):  # fmt: skip
    # Bases are at the row's first token. Scores stand transposed, keys by queries, so that P and dS are left operands
    # straight from registers.
    J: tl.constexpr = H // G
    N: tl.constexpr = H + 2 * G
    TOKENS: tl.constexpr = BM // J
    wide, narrow = (m // J) * (N * C) + (m % J) * C, (m // J) * (H * C) + (m % J) * C
    skip = begin.to(tl.int64)
    q_base += skip * (N * C)
    do_base += skip * (H * C)
    lse += skip * J
    delta += skip * J
    for start in range(begin, end, TOKENS):
        token = start + m // J
        row_mask = (token < length) & (m < TOKENS * J)
        q = _load_rows(q_base, wide, row_mask, C, CP, True)
        do = _load_rows(do_base, narrow, row_mask, C, CP, True)
        log_sum = tl.load(lse + m, mask=row_mask, other=float("inf"))
        d = tl.load(delta + m, mask=row_mask, other=0.0)
        s = tl.dot(k, tl.trans(q))
        p = tl.exp2(s * (SCALE * _LOG2E) - log_sum[None, :])
        if MASKED:
            p = tl.where(_sees(token[None, :], key[:, None], window, WINDOWED), p, 0.0)
        dp = tl.dot(v, tl.trans(do))
        dv = tl.dot(p.to(do.dtype), do, dv)
        ds = p * (dp - d[None, :])
        dk = tl.dot(ds.to(q.dtype), q, dk)
        q_base += TOKENS * N * C
        do_base += TOKENS * H * C
        lse += TOKENS * J
        delta += TOKENS * J
    return dk, dv


@triton.jit(do_not_specialize=_PER_BATCH)
def key_grad_kernel(
    heads, tiles, d_out, lse, delta, d_key, d_value, num_tokens, window,
    H: tl.constexpr, G: tl.constexpr, C: tl.constexpr, CP: tl.constexpr, SCALE: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, SPLIT: tl.constexpr, WINDOWED: tl.constexpr,
):  # fmt: skip
    J: tl.constexpr = H // G
    N: tl.constexpr = H + 2 * G
    TOKENS: tl.constexpr = BM // J
    g, row_start, length, first = _open_tile(tiles, G)
    m, n = tl.arange(0, BM), tl.arange(0, BN)
    key = first + n
    k_base = heads + ((row_start + first) * N + H + g) * C
    k = _load_rows(k_base, n * (N * C), key < length, C, CP, True)
    v = _load_rows(k_base + G * C, n * (N * C), key < length, C, CP, True)
    q_base, do_base = heads + (row_start * N + g * J) * C, d_out + (row_start * H + g * J) * C
    packed = (g.to(tl.int64) * num_tokens + row_start) * J
    dk, dv = tl.zeros((BN, CP), tl.float32), tl.zeros((BN, CP), tl.float32)
    # Tiles of queries start at the first key: ``.. diagonal`` is masked, ``.. full`` not, ``.. end`` by the window.
    end = length
    diagonal = end
    if WINDOWED:
        end = tl.minimum(end, first + BN - 1 + window)
    if SPLIT:
        diagonal = tl.minimum(first + (BN - 1 + TOKENS - 1) // TOKENS * TOKENS, end)
        if WINDOWED:
            full = diagonal + tl.maximum(first + window - diagonal, 0) // TOKENS * TOKENS
            full = tl.minimum(full, diagonal + (end - diagonal) // TOKENS * TOKENS)
        else:
            full = end
    else:
        diagonal = end
    dk, dv = _gather_dk_dv(
        dk, dv, k, v, q_base, do_base, lse + packed, delta + packed, m, key, length, window, first, diagonal,
        H, G, C, CP, SCALE, BM, True, WINDOWED,
    )  # fmt: skip
    if SPLIT:
        dk, dv = _gather_dk_dv(
            dk, dv, k, v, q_base, do_base, lse + packed, delta + packed, m, key, length, window, diagonal, full,
            H, G, C, CP, SCALE, BM, False, False,
        )  # fmt: skip
        if WINDOWED:
            dk, dv = _gather_dk_dv(
                dk, dv, k, v, q_base, do_base, lse + packed, delta + packed, m, key, length, window, full, end,
                H, G, C, CP, SCALE, BM, True, True,
            )  # fmt: skip
    narrow_base = ((row_start + first) * G + g) * C
    _store_rows(d_key + narrow_base, n * (G * C), key < length, dk * SCALE, C, CP)
    _store_rows(d_value + narrow_base, n * (G * C), key < length, dv, C, CP)
