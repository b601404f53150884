"""What the row kernels do to a row: device functions, and the mathematics behind them."""

import triton
import triton.language as tl

# A row whose |p - t|^2 is a smaller share of |p|^2 + |t|^2 is "close": A p + B t cancels in it.
CLOSE = tl.constexpr(1 / 8)


@triton.jit
def load_weights(field_ptr, rows, mask_rows):
    """Row weights in float32: 1 where the pair has none, 0 outside."""
    address = tl.load(field_ptr)
    if address == 0:
        weights = mask_rows.to(tl.float32)
    else:
        weights = tl.load(address.to(tl.pointer_type(tl.float32)) + rows, mask=mask_rows, other=0.0)
    return weights


@triton.jit
def row_sums(p, t):
    """r1 = |p|^2, r2 = p.t, r3 = |t|^2, d2 = |p - t|^2 and r1 - r3, of tiles along axis 1.

    The last two are summed as products of p - t, so they keep their digits where p is close to t.
    """
    gap = p - t
    return (
        tl.sum(p * p, 1),
        tl.sum(p * t, 1),
        tl.sum(t * t, 1),
        tl.sum(gap * gap, 1),
        tl.sum(gap * (p + t), 1),
    )


@triton.jit
def row_terms(
    r1, r2, r3, d2, r1_minus_r3, w, coefficients_ptr, width, eps, IS_SQUARED: tl.constexpr
):
    """The row-Gram family: sums of a row -> its two weighted values, and A, B, S.

    dL/dp = A p + B t + S (p - t), as `reference.row_terms` derives it. In a close row A p + B t
    is rewritten as (A + B) p - B (p - t), and A + B and 1 - cos are taken from |p| - |t| and
    |p - t|^2, which are known to full precision there:

        1 - cos = (|p - t|^2 - (|p| - |t|)^2) / (2 |p| |t|)
        A + B   = g (|t| - |p| - (1 - cos) |t|) / (|p|^2 |t|)

    The scalars of a row are float64: their error would be shared by the whole row.
    """
    r1, r2, r3, d2 = r1.to(tl.float64), r2.to(tl.float64), r3.to(tl.float64), d2.to(tl.float64)
    weight = w.to(tl.float64)
    g_cosine = weight * tl.load(coefficients_ptr).to(tl.float64)
    g_euclidean = weight * tl.load(coefficients_ptr + 1).to(tl.float64)
    floor = tl.full((), eps, tl.float64)
    norm_p, norm_t = tl.sqrt(r1), tl.sqrt(r3)
    clamped_p, clamped_t = tl.maximum(norm_p, floor), tl.maximum(norm_t, floor)
    product = clamped_p * clamped_t
    is_close = (d2 < (r1 + r3) * CLOSE) & (norm_p >= floor) & (norm_t >= floor)

    longer = r1_minus_r3.to(tl.float64) / (clamped_p + clamped_t)  # |p| - |t|
    apart = tl.where(is_close, (d2 - longer * longer) / (2 * product), 1 - r2 / product)
    along_t = -g_cosine / product
    along_p = tl.where(norm_p < floor, 0.0, g_cosine * (1 - apart) / (clamped_p * clamped_p))
    both = -g_cosine * (longer + apart * clamped_t) / (clamped_p * product)
    if IS_SQUARED:
        distance = d2 / width
        slope = 2 * g_euclidean / width
    else:
        distance = tl.sqrt(d2)
        slope = tl.where(d2 == 0, 0.0, g_euclidean / tl.where(d2 == 0, 1.0, distance))
    is_kept = weight != 0
    return (
        tl.where(is_kept, weight * apart, 0.0),
        tl.where(is_kept, weight * distance, 0.0),
        tl.where(is_close, both, along_p),
        tl.where(is_close, 0.0, along_t),
        tl.where(is_close, slope - along_t, slope),
    )


@triton.jit
def row_gradient(p, t, along_p, along_t, slope):
    """dL/dp = A p + B t + S (p - t) of a tile, in float32."""
    return (
        along_p.to(tl.float32)[:, None] * p
        + along_t.to(tl.float32)[:, None] * t
        + slope.to(tl.float32)[:, None] * (p - t)
    )


@triton.jit
def store_values(partial_ptr, slot, cosine, euclidean):
    tl.store(partial_ptr + slot * 2, tl.sum(cosine, 0))
    tl.store(partial_ptr + slot * 2 + 1, tl.sum(euclidean, 0))
