"""What one decoding step does between its matrix products, as few Triton kernels as it takes.

At one token a row every operation is far too small to fill a GPU, so a step's time is its weights' bytes plus its
number of launches. Plain modules launch some forty kernels a layer; these are four, and a product each between them:

- ``add_norm``: residual sum, RMSNorm, and the low-rank half ``u = x Aᵀ`` of the LoRA product that follows;
- ``attend``: head norms (Qwen3), rotary, writing the new key and value into the cache, attention over the cache;
- ``combine``: joins the parts of ``attend`` (flash-decoding, Dao et al. 2023) where the cache was split, and ``u``;
- ``swiglu``: the activation, and ``u``.

``sample`` ends the step: it picks each row's token on the device, so that the next step can start without asking.

Every row has its own length, in a device tensor, and its cache is read as far as it is filled: a captured graph of
these launches is right for every step, and a short row does not pay for a long one.

A product may leave its output in several parts along a first axis, to be added by whoever reads it (``SPLITS``): that
is how a product with few outputs uses the whole GPU (``gemv.py``). It may also want its input with the eight values
that belong to one packed word of weights apart: element d then lies at ``(d % 8) · D/8 + d // 8`` (``INTERLEAVED``).

Axes: B rows; D hidden; F intermediate; H query heads; G key/value heads; J = H/G; C channels; S cache slots;
V vocabulary; R ranks of a group's adapters, end to end; P partial sums.
"""
# Triton's language is not typed Python: pointers, constexpr and tensor operators mean nothing to a type checker.
# mypy: ignore-errors

import triton
import triton.language as tl

# What follows from how long answers may become: specialising on it would compile kernels again for another length.
_PER_LENGTH = ["splits", "num_chances"]


@triton.jit
def _place(d, width: tl.constexpr, INTERLEAVED: tl.constexpr):
    """Where element d of a product's input lies."""
    if INTERLEAVED:
        return (d % 8) * (width // 8) + d // 8
    else:
        return d


@triton.jit
def _low_rank(x, columns, real, A_ptr, u_ptr, width: tl.constexpr, RANKS: tl.constexpr):
    """Store ``x Aᵀ`` over these columns, all ranks."""
    for first in range(0, RANKS, 16):
        r = first + tl.arange(0, 16)
        mask = (r < RANKS)[:, None] & real[None, :]
        a = tl.load(A_ptr + r[:, None] * width + columns[None, :], mask=mask, other=0.0).to(tl.float32)
        tl.store(u_ptr + r, tl.sum(a * x[None, :], 1), mask=r < RANKS)


@triton.jit
def add_norm_kernel(
    hidden_ptr, delta_ptr, delta_stride, weight_ptr, sum_ptr, x_ptr, A_ptr, u_ptr, eps,
    D: tl.constexpr, BLOCK: tl.constexpr, SPLITS: tl.constexpr, RANKS: tl.constexpr, INTERLEAVED: tl.constexpr,
):  # fmt: skip
    """One program a row and rank: each norms the row, the first stores it, each makes its own element of u."""
    row, rank = tl.program_id(0), tl.program_id(1)
    d = tl.arange(0, BLOCK)
    real = d < D
    hidden = tl.load(hidden_ptr + row * D + d, mask=real, other=0.0).to(tl.float32)
    for part in tl.static_range(SPLITS):
        hidden += tl.load(delta_ptr + part * delta_stride + row * D + d, mask=real, other=0.0).to(tl.float32)
    hidden = hidden.to(hidden_ptr.dtype.element_ty).to(tl.float32)
    x = hidden * tl.rsqrt(tl.sum(hidden * hidden, 0) / D + eps)
    x *= tl.load(weight_ptr + d, mask=real, other=0.0).to(tl.float32)
    if rank == 0:
        tl.store(sum_ptr + row * D + d, hidden, mask=real)
        tl.store(x_ptr + row * D + _place(d, D, INTERLEAVED), x, mask=real)
    if RANKS > 0:
        a = tl.load(A_ptr + rank * D + d, mask=real, other=0.0).to(tl.float32)
        tl.store(u_ptr + row * RANKS + rank, tl.sum(a * x, 0))


@triton.jit
def swiglu_kernel(
    y_ptr, y_stride, x_ptr, A_ptr, u_ptr,
    F: tl.constexpr, BLOCK: tl.constexpr, SPLITS: tl.constexpr, RANKS: tl.constexpr, INTERLEAVED: tl.constexpr,
):  # fmt: skip
    """One program a row and block of channels."""
    row, block = tl.program_id(0), tl.program_id(1)
    f = block * BLOCK + tl.arange(0, BLOCK)
    real = f < F
    gate = tl.zeros([BLOCK], tl.float32)
    up = tl.zeros([BLOCK], tl.float32)
    for part in tl.static_range(SPLITS):
        start = y_ptr + part * y_stride + row * 2 * F
        gate += tl.load(start + f, mask=real, other=0.0).to(tl.float32)
        up += tl.load(start + F + f, mask=real, other=0.0).to(tl.float32)
    x = gate / (1 + tl.exp(-gate)) * up
    tl.store(x_ptr + row * F + _place(f, F, INTERLEAVED), x, mask=real)
    if RANKS > 0:
        _low_rank(x, f, real, A_ptr, u_ptr + (row * tl.num_programs(1) + block) * RANKS, F, RANKS)


@triton.jit
def _load_heads(y_ptr, y_stride, places, mask, SPLITS: tl.constexpr):
    total = tl.load(y_ptr + places, mask=mask, other=0.0).to(tl.float32)
    for part in tl.static_range(1, SPLITS):
        total += tl.load(y_ptr + part * y_stride + places, mask=mask, other=0.0).to(tl.float32)
    return total


@triton.jit
def _rotated(
    y_ptr, y_stride, head, real_head, norm_ptr, eps, cos_ptr, sin_ptr, position,
    C: tl.constexpr, HALF: tl.constexpr, SPLITS: tl.constexpr, NORMS: tl.constexpr,
):  # fmt: skip
    """Heads (J) of one row, normed and rotated: their first and second halves, each (J, HALF) in float32."""
    half: tl.constexpr = C // 2
    c = tl.arange(0, HALF)
    mask = real_head[:, None] & (c < half)[None, :]
    places = head[:, None] * C + c[None, :]
    first = _load_heads(y_ptr, y_stride, places, mask, SPLITS)
    second = _load_heads(y_ptr, y_stride, places + half, mask, SPLITS)
    if NORMS:
        square = tl.sum(first * first, 1) + tl.sum(second * second, 1)
        r = tl.rsqrt(square / C + eps)[:, None]
        first = first * r * tl.load(norm_ptr + c, mask=c < half, other=0.0).to(tl.float32)[None, :]
        second = second * r * tl.load(norm_ptr + half + c, mask=c < half, other=0.0).to(tl.float32)[None, :]
    cos = tl.load(cos_ptr + position * C + c, mask=c < half, other=0.0).to(tl.float32)[None, :]
    sin = tl.load(sin_ptr + position * C + c, mask=c < half, other=0.0).to(tl.float32)[None, :]
    return first * cos - second * sin, second * cos + first * sin


@triton.jit(do_not_specialize=_PER_LENGTH)
def attend_kernel(
    y_ptr, y_stride, lengths_ptr, cos_ptr, sin_ptr, q_norm_ptr, k_norm_ptr, eps, keys_ptr, values_ptr, slots,
    parts_ptr, stats_ptr, out_ptr, scale, splits,
    H: tl.constexpr, G: tl.constexpr, C: tl.constexpr, J_BLOCK: tl.constexpr, HALF: tl.constexpr,
    C_BLOCK: tl.constexpr, BLOCK: tl.constexpr, IN_SPLITS: tl.constexpr, IS_SPLIT: tl.constexpr,
    WINDOW: tl.constexpr, NORMS: tl.constexpr,
):  # fmt: skip
    """One program a row, key/value head and share of the cache; the first share has the new key, and stores it."""
    row, kv, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    J: tl.constexpr = H // G
    half: tl.constexpr = C // 2
    dtype = keys_ptr.dtype.element_ty
    length = tl.load(lengths_ptr + row)
    y_ptr += row * (H + 2 * G) * C
    j = tl.arange(0, J_BLOCK)
    real_j = j < J
    q1, q2 = _rotated(
        y_ptr, y_stride, kv * J + j, real_j, q_norm_ptr, eps, cos_ptr, sin_ptr, length, C, HALF, IN_SPLITS, NORMS
    )
    q1 = q1.to(dtype)
    q2 = q2.to(dtype)
    base = (row.to(tl.int64) * G + kv) * slots * C
    keys_ptr += base
    values_ptr += base
    ch = tl.arange(0, HALF)
    cv = tl.arange(0, C_BLOCK)

    largest = tl.full([J_BLOCK], float("-inf"), tl.float32)
    total = tl.zeros([J_BLOCK], tl.float32)
    out = tl.zeros([J_BLOCK, C_BLOCK], tl.float32)
    if split == 0:
        one = tl.arange(0, 1)
        k1, k2 = _rotated(
            y_ptr, y_stride, H + kv + one, one < 1, k_norm_ptr, eps, cos_ptr, sin_ptr, length,
            C, HALF, IN_SPLITS, NORMS,
        )  # fmt: skip
        k1 = k1.to(dtype)
        k2 = k2.to(dtype)
        v = _load_heads(y_ptr, y_stride, (H + G + kv) * C + cv, cv < C, IN_SPLITS).to(dtype)
        tl.store(keys_ptr + length * C + ch[None, :], k1, mask=(ch < half)[None, :])
        tl.store(keys_ptr + length * C + half + ch[None, :], k2, mask=(ch < half)[None, :])
        tl.store(values_ptr + length * C + cv, v, mask=cv < C)
        largest = scale * (
            tl.sum(q1.to(tl.float32) * k1.to(tl.float32), 1) + tl.sum(q2.to(tl.float32) * k2.to(tl.float32), 1)
        )
        total += 1.0
        out += v.to(tl.float32)[None, :]

    first = 0
    if WINDOW > 0:
        first = tl.maximum(length + 1 - WINDOW, 0)
    share = tl.cdiv(tl.cdiv(length - first, BLOCK), splits) * BLOCK
    start = first + split * share
    stop = tl.minimum(start + share, length)
    for slot in range(start, stop, BLOCK):
        s = slot + tl.arange(0, BLOCK)
        real_s = s < stop
        k_mask = real_s[:, None] & (ch < half)[None, :]
        k1 = tl.load(keys_ptr + s[:, None] * C + ch[None, :], mask=k_mask, other=0.0)
        k2 = tl.load(keys_ptr + s[:, None] * C + half + ch[None, :], mask=k_mask, other=0.0)
        v = tl.load(values_ptr + s[:, None] * C + cv[None, :], mask=real_s[:, None] & (cv < C)[None, :], other=0.0)
        scores = tl.dot(q1, tl.trans(k1), input_precision="ieee")
        scores = tl.dot(q2, tl.trans(k2), scores, input_precision="ieee") * scale
        scores = tl.where(real_s[None, :], scores, float("-inf"))
        new_largest = tl.maximum(largest, tl.max(scores, 1))
        shrink = tl.exp(largest - new_largest)
        p = tl.exp(scores - new_largest[:, None])
        total = total * shrink + tl.sum(p, 1)
        out = tl.dot(p.to(v.dtype), v, out * shrink[:, None], input_precision="ieee")
        largest = new_largest

    head = row * H + kv * J + j
    mask = real_j[:, None] & (cv < C)[None, :]
    if IS_SPLIT:
        place = head * splits + split
        tl.store(parts_ptr + place[:, None] * C + cv[None, :], out, mask=mask)
        tl.store(stats_ptr + place * 2, largest, mask=real_j)
        tl.store(stats_ptr + place * 2 + 1, total, mask=real_j)
    else:
        tl.store(out_ptr + head[:, None] * C + cv[None, :], out / total[:, None], mask=mask)


@triton.jit(do_not_specialize=_PER_LENGTH)
def combine_kernel(
    parts_ptr, stats_ptr, x_ptr, A_ptr, u_ptr, splits,
    H: tl.constexpr, C: tl.constexpr, C_BLOCK: tl.constexpr, MOST: tl.constexpr, RANKS: tl.constexpr,
    INTERLEAVED: tl.constexpr,
):  # fmt: skip
    """One program a row and head. A share of the cache without slots has -inf and zeros, and adds nothing."""
    row, head = tl.program_id(0), tl.program_id(1)
    split = tl.arange(0, MOST)
    place = (row * H + head) * splits + split
    c = tl.arange(0, C_BLOCK)
    real = c < C
    largest = tl.load(stats_ptr + place * 2, mask=split < splits, other=float("-inf"))
    weight = tl.exp(largest - tl.max(largest, 0))
    total = tl.sum(weight * tl.load(stats_ptr + place * 2 + 1, mask=split < splits, other=0.0), 0)
    mask = (split < splits)[:, None] & real[None, :]
    parts = tl.load(parts_ptr + place[:, None] * C + c[None, :], mask=mask, other=0.0)
    x = tl.sum(parts * weight[:, None], 0) / total
    column = head * C + c
    tl.store(x_ptr + row * H * C + _place(column, H * C, INTERLEAVED), x, mask=real)
    if RANKS > 0:
        _low_rank(x, column, real, A_ptr, u_ptr + (row * H + head) * RANKS, H * C, RANKS)


@triton.jit
def _key(bits):
    """The order of 16-bit floats as integers: bits are their signed 16-bit pattern."""
    return tl.where(bits >= 0, bits, bits ^ 0x7FFF)


@triton.jit
def _value(bits, IS_BF16: tl.constexpr):
    """The float32 that a signed 16-bit pattern stands for."""
    if IS_BF16:
        return (bits << 16).to(tl.float32, bitcast=True)
    else:
        return bits.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def _load_bits(logits_ptr, v, V):
    """16-bit patterns, sign-extended; past the vocabulary's end the pattern of the lowest key, which is masked."""
    return tl.load(logits_ptr + v, mask=v < V, other=-1).to(tl.int32)


@triton.jit
def _mass(logits_ptr, V, least, top, inverse_temperature, BLOCK: tl.constexpr, IS_BF16: tl.constexpr):
    """Sum of exp((logit - top)/T) over the tokens whose key is at least ``least``."""
    sums = tl.zeros([BLOCK], tl.float32)
    for start in range(0, V, BLOCK):
        v = start + tl.arange(0, BLOCK)
        bits = _load_bits(logits_ptr, v, V)
        weight = tl.exp((_value(bits, IS_BF16) - top) * inverse_temperature)
        sums += tl.where((v < V) & (_key(bits) >= least), weight, 0.0)
    return tl.sum(sums, 0)


@triton.jit
def _nucleus(logits_ptr, V, best, top, inverse_temperature, top_p, margin, BLOCK: tl.constexpr, IS_BF16: tl.constexpr):
    """The least key in the nucleus, the mass above that key, and how many tokens of that very key belong.

    The mass of all tokens at or above a key falls as the key rises, so the key is found by halving. ``margin`` is how
    far below the largest logit no token can matter: V tokens there weigh less than ``1 - top_p`` of the largest alone.
    """
    wanted = top_p * _mass(logits_ptr, V, -32768, top, inverse_temperature, BLOCK, IS_BF16)
    bound = top - margin
    if IS_BF16:
        bits = bound.to(tl.int32, bitcast=True) >> 16
    else:
        bits = tl.maximum(bound, -65504.0).to(tl.float16).to(tl.int16, bitcast=True).to(tl.int32)
    low = _key(bits) - 2  # rounding the bound may have raised it by one
    high = best + 1
    while high - low > 1:
        middle = (low + high) // 2
        reaches = _mass(logits_ptr, V, middle, top, inverse_temperature, BLOCK, IS_BF16) >= wanted
        low = tl.where(reaches, middle, low)
        high = tl.where(reaches, high, middle)
    above = _mass(logits_ptr, V, low + 1, top, inverse_temperature, BLOCK, IS_BF16)
    weight = tl.exp((_value(_key(low), IS_BF16) - top) * inverse_temperature)
    count = tl.minimum(tl.maximum(tl.ceil((wanted - above) / weight), 1.0), V * 1.0).to(tl.int32)
    return low, above + count * weight, count


@triton.jit(do_not_specialize=_PER_LENGTH)
def sample_kernel(
    logits_ptr, V, chances_ptr, num_chances, steps_ptr, lengths_ptr, ids_ptr, last,
    inverse_temperature, top_p, margin,
    BLOCK: tl.constexpr, IS_BF16: tl.constexpr, GREEDY: tl.constexpr, WHOLE_VOCABULARY: tl.constexpr,
):  # fmt: skip
    """One program a row: pick its token, and move the row on by one, but not past the last place of its cache."""
    row = tl.program_id(0)
    logits_ptr += row.to(tl.int64) * V
    best = tl.full([], -32769, tl.int32)
    chosen = tl.full([], 0, tl.int32)
    for start in range(0, V, BLOCK):
        v = start + tl.arange(0, BLOCK)
        key = tl.where(v < V, _key(_load_bits(logits_ptr, v, V)), -32769)
        here = tl.max(key, 0)
        chosen = tl.where(here > best, tl.min(tl.where(key == here, v, V), 0), chosen)
        best = tl.maximum(best, here)
    step = tl.load(steps_ptr + row)
    if not GREEDY:
        top = _value(_key(best), IS_BF16)
        if WHOLE_VOCABULARY:
            least = tl.full([], -32768, tl.int32)
            mass = _mass(logits_ptr, V, least, top, inverse_temperature, BLOCK, IS_BF16)
            count = V
        else:
            least, mass, count = _nucleus(logits_ptr, V, best, top, inverse_temperature, top_p, margin, BLOCK, IS_BF16)
        goal = mass * tl.load(chances_ptr + row * num_chances + tl.minimum(step, num_chances - 1))
        passed = tl.full([], 0.0, tl.float32)
        ties = tl.full([], 0, tl.int32)
        found = tl.full([], 2147483647, tl.int32)
        for start in range(0, V, BLOCK):
            v = start + tl.arange(0, BLOCK)
            bits = _load_bits(logits_ptr, v, V)
            key = tl.where(v < V, _key(bits), -32769)
            tie = (key == least).to(tl.int32)
            inside = (key > least) | ((tie > 0) & (ties + tl.cumsum(tie, 0) <= count))
            weight = tl.where(inside, tl.exp((_value(bits, IS_BF16) - top) * inverse_temperature), 0.0)
            reached = inside & (passed + tl.cumsum(weight, 0) > goal) & (weight > 0)
            found = tl.minimum(found, tl.min(tl.where(reached, v, 2147483647), 0))
            passed += tl.sum(weight, 0)
            ties += tl.sum(tie, 0)
        chosen = tl.where(found < V, found, chosen)  # rounding may leave the last sum short of the goal
    tl.store(ids_ptr + row, chosen)
    tl.store(steps_ptr + row, step + 1)
    tl.store(lengths_ptr + row, tl.minimum(tl.load(lengths_ptr + row) + 1, last))
