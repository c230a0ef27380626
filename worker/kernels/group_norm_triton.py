"""Triton's kernels of ``worker.kernels.group_norm``, forward and backward.

Sums over an image are split: each program reduces a piece of the pixels for some channels, and a second kernel puts
the pieces together in their order, so that a few large images occupy the whole device, nothing is added atomically and
the same bits come out each time. How an image is cut depends on its own shape alone. Shape suffixes: B = batch,
S = pieces, C = channels, G = groups, N = pixels.
"""

import triton
import triton.language as tl


@triton.jit
def _sigmoid(u):
    # Never the exponential of a large number, in the rows beside the image either.
    small = tl.exp(-tl.abs(u))
    return tl.where(u < 0.0, small, 1.0) / (1.0 + small)


# Forward -----------------------------------------------------------------------------------------


@triton.jit
def _tile(num_pixels, num_channels, PIXELS: tl.constexpr, CHANNELS: tl.constexpr):
    """Where a program's tile lies in ``(B, N, C)``, which of it is inside, and its channels."""
    pixel = tl.program_id(1) * PIXELS + tl.arange(0, PIXELS)
    channel = tl.program_id(2) * CHANNELS + tl.arange(0, CHANNELS)
    inside = (pixel < num_pixels)[:, None] & (channel < num_channels)[None, :]
    image = tl.program_id(0).to(tl.int64)
    at = (image * num_pixels + pixel[:, None]) * num_channels + channel[None, :]
    return at, inside, channel


@triton.jit
def measure(
    x,
    means,
    squares,
    num_pixels,
    num_channels,
    PIXELS: tl.constexpr,
    CHANNELS: tl.constexpr,
    WIDE: tl.constexpr,
):
    """Of each channel in a piece: its mean, and the sum of squared distances from that."""
    at, inside, channel = _tile(num_pixels, num_channels, PIXELS, CHANNELS)
    count = tl.minimum(num_pixels - tl.program_id(1) * PIXELS, PIXELS)
    values = tl.load(x + at, mask=inside, other=0.0).to(WIDE)
    mean = tl.sum(values, axis=0) / count
    # About the piece's own mean, not zero: squares of large numbers would swallow the difference.
    distance = tl.where(inside, values - mean[None, :], 0.0)
    piece = tl.program_id(0).to(tl.int64) * tl.num_programs(1) + tl.program_id(1)
    place = piece * num_channels + channel
    tl.store(means + place, mean, mask=channel < num_channels)
    tl.store(squares + place, tl.sum(distance * distance, axis=0), mask=channel < num_channels)


@triton.jit
def _pieces(first, num_pieces, num_channels, members, PIECES: tl.constexpr):
    """Where some pieces of a group's channels lie in ``(B, S, C)``, and their numbers."""
    piece = first + tl.arange(0, PIECES)
    at = (tl.program_id(0).to(tl.int64) * num_pieces + piece[:, None]) * num_channels + members[None, :]
    return at, piece


@triton.jit
def settle(
    means,
    squares,
    mean,
    rstd,
    num_pixels,
    num_channels,
    num_pieces,
    eps,
    PIXELS: tl.constexpr,
    PIECES: tl.constexpr,
    PER_GROUP: tl.constexpr,
    MEMBERS: tl.constexpr,
    WIDE: tl.constexpr,
):
    """Mean and reciprocal deviation of a group, from its pieces (Chan, Golub and LeVeque, 1979)."""
    member = tl.arange(0, MEMBERS)
    members = tl.program_id(1) * PER_GROUP + member
    total = tl.full((MEMBERS,), 0.0, WIDE)
    for first in range(0, num_pieces, PIECES):
        at, piece = _pieces(first, num_pieces, num_channels, members, PIECES)
        inside = (piece < num_pieces)[:, None] & (member < PER_GROUP)[None, :]
        count = tl.minimum(num_pixels - piece * PIXELS, PIXELS).to(WIDE)
        total += tl.sum(tl.load(means + at, mask=inside, other=0.0) * count[:, None], axis=0)
    num_values = num_pixels * PER_GROUP
    average = tl.sum(total, axis=0) / num_values
    spread = tl.full((MEMBERS,), 0.0, WIDE)
    for first in range(0, num_pieces, PIECES):
        at, piece = _pieces(first, num_pieces, num_channels, members, PIECES)
        inside = (piece < num_pieces)[:, None] & (member < PER_GROUP)[None, :]
        count = tl.minimum(num_pixels - piece * PIXELS, PIXELS).to(WIDE)
        distance = tl.load(means + at, mask=inside, other=0.0) - average
        within = tl.load(squares + at, mask=inside, other=0.0)
        spread += tl.sum(tl.where(inside, within + count[:, None] * distance * distance, 0.0), axis=0)
    place = tl.program_id(0).to(tl.int64) * tl.num_programs(1) + tl.program_id(1)
    tl.store(mean + place, average)
    tl.store(rstd + place, 1.0 / tl.sqrt(tl.sum(spread, axis=0) / num_values + eps))


@triton.jit
def _statistics(mean, rstd, channel, is_channel, num_groups, PER_GROUP: tl.constexpr):
    """Mean and reciprocal deviation of each channel's group."""
    place = tl.program_id(0).to(tl.int64) * num_groups + channel // PER_GROUP
    return tl.load(mean + place, mask=is_channel, other=0.0), tl.load(rstd + place, mask=is_channel, other=0.0)


@triton.jit
def _affine(
    weight,
    bias,
    scale,
    shift,
    channel,
    is_channel,
    num_channels,
    MODULATED: tl.constexpr,
    WIDE: tl.constexpr,
):
    """``gain`` and ``offset`` of each channel: silu sees ``gain * normalised + offset``."""
    gain = tl.load(weight + channel, mask=is_channel, other=0.0).to(WIDE)
    offset = tl.load(bias + channel, mask=is_channel, other=0.0).to(WIDE)
    if MODULATED:
        place = tl.program_id(0).to(tl.int64) * num_channels + channel
        factor = 1.0 + tl.load(scale + place, mask=is_channel, other=0.0).to(WIDE)
        gain = gain * factor
        offset = offset * factor + tl.load(shift + place, mask=is_channel, other=0.0).to(WIDE)
    return gain, offset


@triton.jit
def apply(
    x,
    y,
    mean,
    rstd,
    weight,
    bias,
    scale,
    shift,
    num_pixels,
    num_channels,
    num_groups,
    PIXELS: tl.constexpr,
    CHANNELS: tl.constexpr,
    PER_GROUP: tl.constexpr,
    MODULATED: tl.constexpr,
    WIDE: tl.constexpr,
):
    """The function itself, for one tile."""
    at, inside, channel = _tile(num_pixels, num_channels, PIXELS, CHANNELS)
    is_channel = channel < num_channels
    centre, reciprocal = _statistics(mean, rstd, channel, is_channel, num_groups, PER_GROUP)
    gain, offset = _affine(weight, bias, scale, shift, channel, is_channel, num_channels, MODULATED, WIDE)
    values = tl.load(x + at, mask=inside, other=0.0).to(WIDE)
    u = (values - centre[None, :]) * reciprocal[None, :] * gain[None, :] + offset[None, :]
    tl.store(y + at, (u * _sigmoid(u)).to(y.dtype.element_ty), mask=inside)


# Backward ----------------------------------------------------------------------------------------


@triton.jit
def _slope(x, dy, at, inside, centre, reciprocal, gain, offset, WIDE: tl.constexpr):
    """Normalised values, and the gradient by what silu sees."""
    values = tl.load(x + at, mask=inside, other=0.0).to(WIDE)
    normalised = (values - centre[None, :]) * reciprocal[None, :]
    u = normalised * gain[None, :] + offset[None, :]
    sigmoid = _sigmoid(u)
    du = tl.load(dy + at, mask=inside, other=0.0).to(WIDE) * sigmoid * (1.0 + u * (1.0 - sigmoid))
    return normalised, du


@triton.jit
def measure_slopes(
    x,
    dy,
    sums,
    products,
    mean,
    rstd,
    weight,
    bias,
    scale,
    shift,
    num_pixels,
    num_channels,
    num_groups,
    PIXELS: tl.constexpr,
    CHANNELS: tl.constexpr,
    PER_GROUP: tl.constexpr,
    MODULATED: tl.constexpr,
    WIDE: tl.constexpr,
):
    """Of each channel in a piece: the sums of du, and of du times the normalised values."""
    at, inside, channel = _tile(num_pixels, num_channels, PIXELS, CHANNELS)
    is_channel = channel < num_channels
    centre, reciprocal = _statistics(mean, rstd, channel, is_channel, num_groups, PER_GROUP)
    gain, offset = _affine(weight, bias, scale, shift, channel, is_channel, num_channels, MODULATED, WIDE)
    normalised, du = _slope(x, dy, at, inside, centre, reciprocal, gain, offset, WIDE)
    place = (tl.program_id(0).to(tl.int64) * tl.num_programs(1) + tl.program_id(1)) * num_channels + channel
    tl.store(sums + place, tl.sum(du, axis=0), mask=is_channel)
    tl.store(products + place, tl.sum(du * normalised, axis=0), mask=is_channel)


@triton.jit
def settle_slopes(
    sums,
    products,
    sum_of,
    product_of,
    mean_sum,
    mean_product,
    weight,
    scale,
    num_pixels,
    num_channels,
    num_pieces,
    PIECES: tl.constexpr,
    PER_GROUP: tl.constexpr,
    MEMBERS: tl.constexpr,
    MODULATED: tl.constexpr,
    WIDE: tl.constexpr,
):
    """Both sums for each channel of a group, and for the group their means, weighted by the channels' gains."""
    member = tl.arange(0, MEMBERS)
    is_member = member < PER_GROUP
    members = tl.program_id(1) * PER_GROUP + member
    total, product = tl.full((MEMBERS,), 0.0, WIDE), tl.full((MEMBERS,), 0.0, WIDE)
    for first in range(0, num_pieces, PIECES):
        at, piece = _pieces(first, num_pieces, num_channels, members, PIECES)
        inside = (piece < num_pieces)[:, None] & is_member[None, :]
        total += tl.sum(tl.load(sums + at, mask=inside, other=0.0), axis=0)
        product += tl.sum(tl.load(products + at, mask=inside, other=0.0), axis=0)
    place = tl.program_id(0).to(tl.int64) * num_channels + members
    tl.store(sum_of + place, total, mask=is_member)
    tl.store(product_of + place, product, mask=is_member)
    gain, _ = _affine(weight, weight, scale, scale, members, is_member, num_channels, MODULATED, WIDE)
    num_values = num_pixels * PER_GROUP
    of_group = tl.program_id(0).to(tl.int64) * tl.num_programs(1) + tl.program_id(1)
    tl.store(mean_sum + of_group, tl.sum(gain * total, axis=0) / num_values)
    tl.store(mean_product + of_group, tl.sum(gain * product, axis=0) / num_values)


@triton.jit
def apply_slopes(
    x,
    dy,
    dx,
    mean_sum,
    mean_product,
    mean,
    rstd,
    weight,
    bias,
    scale,
    shift,
    num_pixels,
    num_channels,
    num_groups,
    PIXELS: tl.constexpr,
    CHANNELS: tl.constexpr,
    PER_GROUP: tl.constexpr,
    MODULATED: tl.constexpr,
    WIDE: tl.constexpr,
):
    """The gradient by x of one tile."""
    at, inside, channel = _tile(num_pixels, num_channels, PIXELS, CHANNELS)
    is_channel = channel < num_channels
    centre, reciprocal = _statistics(mean, rstd, channel, is_channel, num_groups, PER_GROUP)
    centre_sum, centre_product = _statistics(mean_sum, mean_product, channel, is_channel, num_groups, PER_GROUP)
    gain, offset = _affine(weight, bias, scale, shift, channel, is_channel, num_channels, MODULATED, WIDE)
    normalised, du = _slope(x, dy, at, inside, centre, reciprocal, gain, offset, WIDE)
    inner = du * gain[None, :] - centre_sum[None, :] - normalised * centre_product[None, :]
    tl.store(dx + at, (inner * reciprocal[None, :]).to(dx.dtype.element_ty), mask=inside)
