"""The compiled pass from a uint8 image to one normalised float view.

One call renders one view of a stack of images and releases the GIL. An image goes through in blocks of about
a thousand pixels, so that all between the source rows and the finished view happens in the nearest cache:
crop and antialiased resize, colour, gray, blur, solarize, normalise, store. Only contrast (it needs the mean
of the whole view) and blur (it needs the rows around) send the blocks round again.

The inner loops run over slices from their beginning, or index with unsigned numbers: Numba then need not
handle negative indices, and LLVM turns the loops into vector instructions. Pixels are planar float32 in 0..1
until the store interleaves them. All of it lives in one file: Numba's cache on disk sees no edit elsewhere.
"""

import math

import numpy as np
from numba import njit

PLAN = np.dtype("i4, i4, i4, i4, i4, f4")
PLAN.names = ("size", "cubic", "gray_first", "inside", "kernel", "threshold")
"""What the pass must know of a view beyond its draws. ``inside``: the resize sees nothing outside the crop
box (crop, then resize), else all of the image (resize, then crop). ``kernel``: blur taps, 0 for 3 sigma."""

BLOCK = 1024  # pixels that go through together: three float32 planes of them take 12 KB

_BRIGHTNESS, _CONTRAST, _SATURATION, _HUE = range(4)  # as in draw.py
_RED, _GREEN, _BLUE = np.float32(0.2989), np.float32(0.587), np.float32(0.114)  # as in torchvision
_ZERO, _TINY, _ONE, _TWO, _FOUR, _SIX = (np.float32(k) for k in (0, 1e-20, 1, 2, 4, 6))
_U0, _U1, _U2, _U3, _U4, _U5, _U6, _U7, _U8, _U9, _U10, _U11 = (np.uint64(k) for k in range(12))

# Inlined always: a function with a body of its own is linked to one version right after compilation and to another
# when loaded from the cache, and fastmath lets the two round differently.
_inner = njit(nogil=True, error_model="numpy", fastmath=True, forceinline=True)


# Resize: torchvision's antialias=True law, a triangle or cubic (a = -0.5) filter as wide as the downscale.


@_inner
def _filter(x, cubic):
    """The resampling filter at distance x."""
    x = abs(x)
    if not cubic:
        return max(0.0, 1.0 - x)
    if x < 1.0:
        return (1.5 * x - 2.5) * x * x + 1.0
    if x < 2.0:
        return ((-0.5 * x + 2.5) * x - 4.0) * x + 2.0
    return 0.0


@_inner
def _resample(start, step, low, high, cubic, flip, gain, first, weight):
    """Fill each output's first source position and ``taps`` weights of sum ``gain``; return ``taps``.

    Output i has its middle at ``start + step * (i + 0.5)`` in the source and sees positions in [low, high).
    """
    size, stretch = len(first), max(step, 1.0)
    support = (2.0 if cubic else 1.0) * stretch
    taps = min(math.ceil(2 * support), high - low)
    for i in range(size):
        centre = start + step * (i + 0.5)
        lower = max(math.floor(centre - support + 0.5), low)
        upper = min(math.floor(centre + support + 0.5), high)
        origin = min(lower, high - taps)  # near the end all taps still fit, the first ones weigh nothing
        at = size - 1 - i if flip else i
        first[at] = origin
        row = weight[at * taps : (at + 1) * taps]
        total = 0.0
        for k in range(taps):
            inside = lower <= origin + k < upper
            row[k] = _filter((origin + k + 0.5 - centre) / stretch, cubic) if inside else 0.0
            total += row[k]
        for k in range(taps):
            row[k] *= gain / total
    return taps


@_inner
def _blend_rows(image, a, pitch, weight, taps, line):
    """The vertical half for one output row: line = sum over k of weight[k] * (image from a + k * pitch on)."""
    n, p, b = np.uint64(len(line)), weight[0], a + pitch
    c = b + pitch
    if taps == 1:
        for j in range(n):
            line[j] = p * np.float32(image[a + j])
        return
    q = weight[1]
    if taps % 2 == 0:
        for j in range(n):
            line[j] = p * np.float32(image[a + j]) + q * np.float32(image[b + j])
    else:
        s = weight[2]
        for j in range(n):
            line[j] = p * np.float32(image[a + j]) + q * np.float32(image[b + j]) + s * np.float32(image[c + j])
        c += pitch
    for k in range(2 + taps % 2, taps, 2):
        a, b, p, q = c, c + pitch, weight[k], weight[k + 1]
        for j in range(n):
            line[j] += p * np.float32(image[a + j]) + q * np.float32(image[b + j])
        c = b + pitch


@_inner
def _blend_columns(line, first, weight, taps, r, g, b):
    """The horizontal half: an interleaved line to one row of each plane; ``first`` counts its floats."""
    if taps == 2:
        for x in range(len(r)):
            i, p, q = first[x], weight[2 * x], weight[2 * x + 1]
            r[x] = p * line[i] + q * line[i + _U3]
            g[x] = p * line[i + _U1] + q * line[i + _U4]
            b[x] = p * line[i + _U2] + q * line[i + _U5]
    elif taps == 3:
        for x in range(len(r)):
            i, p, q, s = first[x], weight[3 * x], weight[3 * x + 1], weight[3 * x + 2]
            r[x] = p * line[i] + q * line[i + _U3] + s * line[i + _U6]
            g[x] = p * line[i + _U1] + q * line[i + _U4] + s * line[i + _U7]
            b[x] = p * line[i + _U2] + q * line[i + _U5] + s * line[i + _U8]
    elif taps == 4:
        for x in range(len(r)):
            i, p, q = first[x], weight[4 * x], weight[4 * x + 1]
            s, t = weight[4 * x + 2], weight[4 * x + 3]
            r[x] = p * line[i] + q * line[i + _U3] + s * line[i + _U6] + t * line[i + _U9]
            g[x] = p * line[i + _U1] + q * line[i + _U4] + s * line[i + _U7] + t * line[i + _U10]
            b[x] = p * line[i + _U2] + q * line[i + _U5] + s * line[i + _U8] + t * line[i + _U11]
    else:
        at, count = _U0, np.uint64(taps)
        for x in range(len(r)):
            i, p, q, s = first[x], _ZERO, _ZERO, _ZERO
            for k in range(count):
                w = weight[at + k]
                p += w * line[i]
                q += w * line[i + _U1]
                s += w * line[i + _U2]
                i += _U3
            at += count
            r[x], g[x], b[x] = p, q, s


# Colour: torchvision's functionals for floats in 0..1, in place on the three planes of a block.


@_inner
def _affine(factor, offset, planes):
    """Brightness, contrast, or (with 1, 0) only the bounds: clamp(factor * x + offset)."""
    for x in planes:
        for j in range(len(x)):
            x[j] = min(max(factor * x[j] + offset, _ZERO), _ONE)


@_inner
def _saturate(factor, r, g, b):
    for j in range(len(r)):
        gray = (_ONE - factor) * (_RED * r[j] + _GREEN * g[j] + _BLUE * b[j])
        r[j] = min(max(factor * r[j] + gray, _ZERO), _ONE)
        g[j] = min(max(factor * g[j] + gray, _ZERO), _ONE)
        b[j] = min(max(factor * b[j] + gray, _ZERO), _ONE)


@_inner
def _channel(k, value, chroma):
    """One channel of HSV to RGB; k in [0, 12) is the hue in sixths of a turn, offset by the channel."""
    k = k - _SIX if k >= _SIX else k
    return value - chroma * min(max(min(k, _FOUR - k), _ZERO), _ONE)


@_inner
def _rotate_hue(shift, r, g, b):
    """RGB to HSV, shift, and back; the way back needs value and chroma alone, so no saturation is made."""
    for j in range(len(r)):
        red, green, blue = r[j], g[j], b[j]
        value = max(max(red, green), blue)
        chroma = value - min(min(red, green), blue)
        slope = _ONE / max(chroma, _TINY)
        hue = (green - blue) * slope
        hue = _TWO + (blue - red) * slope if value == green else hue
        hue = _FOUR + (red - green) * slope if value == blue else hue
        hue += _SIX * shift  # in [-4, 8)
        hue = hue + _SIX if hue < _ZERO else hue
        hue = hue - _SIX if hue >= _SIX else hue
        r[j] = _channel(hue + np.float32(5), value, chroma)
        g[j] = _channel(hue + np.float32(3), value, chroma)
        b[j] = _channel(hue + np.float32(1), value, chroma)


@_inner
def _gray(r, g, b):
    for j in range(len(r)):
        gray = _RED * r[j] + _GREEN * g[j] + _BLUE * b[j]
        r[j] = g[j] = b[j] = gray


@_inner
def _gray_sum(r, g, b):
    total = _ZERO
    for j in range(len(r)):
        total += _RED * r[j] + _GREEN * g[j] + _BLUE * b[j]
    return total


@_inner
def _apply(op, row, r, g, b):
    """One jitter operation other than contrast; a factor that changes nothing costs nothing."""
    if op == _BRIGHTNESS and row.brightness != _ONE:
        _affine(row.brightness, _ZERO, (r, g, b))
    elif op == _SATURATION and row.saturation != _ONE:
        _saturate(row.saturation, r, g, b)
    elif op == _HUE and row.hue != _ZERO:
        _rotate_hue(row.hue, r, g, b)


# Blur: separable and symmetric, on planes with a margin above and below.


@_inner
def blur_radius(sigma, kernel, size):
    """Taps to each side of the centre: 3 sigma, or those of ``kernel`` taps where it is not 0; 0 is no blur.

    A given kernel is cut at 4 sigma: what lies beyond weighs less than 1e-4 of the whole.
    """
    reach = min(kernel // 2, math.ceil(4 * sigma)) if kernel > 0 else math.ceil(3 * sigma)
    return min(reach, size - 1)


@_inner
def _gaussian(sigma, taps):
    """Fill one half of the kernel: the centre, then ``len(taps) - 1`` weights to one side."""
    total = 0.0
    for t in range(len(taps)):
        value = math.exp(-0.5 * (t / sigma) ** 2)
        taps[t] = value
        total += value if t == 0 else 2 * value
    for t in range(len(taps)):
        taps[t] /= total


@_inner
def _convolve(source, start, stride, taps, out):
    """out[j] = sum over t of taps[|t|] * source[start + j + t * stride]; at least one tap to each side."""
    n, radius = len(out), len(taps) - 1
    centre, p, q = source[start : start + n], taps[0], taps[1]
    a, b = source[start - stride : start - stride + n], source[start + stride : start + stride + n]
    for j in range(n):
        out[j] = p * centre[j] + q * (a[j] + b[j])
    for t in range(2, radius, 2):
        near, far = t * stride, (t + 1) * stride
        a, b = source[start - near : start - near + n], source[start + near : start + near + n]
        c, d = source[start - far : start - far + n], source[start + far : start + far + n]
        p, q = taps[t], taps[t + 1]
        for j in range(n):
            out[j] += p * (a[j] + b[j]) + q * (c[j] + d[j])
    if radius % 2 == 0:
        near, p = radius * stride, taps[radius]
        a, b = source[start - near : start - near + n], source[start + near : start + near + n]
        for j in range(n):
            out[j] += p * (a[j] + b[j])


@_inner
def _reflect_rows(plane, size, margin, radius):
    """Mirror the first and last rows of a plane into its margin, the outermost row not repeated."""
    rows, last = plane.reshape(-1, size), margin + size - 1
    for t in range(1, radius + 1):
        for x in range(size):
            rows[margin - t, x] = rows[margin + t, x]
            rows[last + t, x] = rows[last - t, x]


@_inner
def _blur_block(plane, start, size, rows, taps, tall, wide, out):
    """Blur ``rows`` rows of a plane from ``start``; row y of ``out`` begins at y * (size + 2 radius)."""
    radius = len(taps) - 1
    pitch = size + 2 * radius
    _convolve(plane, start, size, taps, tall[: rows * size])
    for y in range(rows):
        source, line = tall[y * size : (y + 1) * size], wide[y * pitch : (y + 1) * pitch]
        middle = line[radius : radius + size]
        for x in range(size):
            middle[x] = source[x]
        for t in range(1, radius + 1):
            line[radius - t] = source[t]
            line[radius + size - 1 + t] = source[size - 1 - t]
    # One sweep over all the widened rows; what it makes of the seams between them is not read.
    _convolve(wide, radius, 1, taps, out[: rows * pitch - 2 * radius])


# One view of one image, and the loop over images.


@_inner
def _store(r, g, b, row, threshold, colour, out):
    """Solarize, normalise and interleave: ``out`` (3 n,) gets x * colour[0, c] + colour[1, c]."""
    if row.solarize:
        for x in (r, g, b):
            for j in range(len(x)):
                x[j] = _ONE - x[j] if x[j] >= threshold else x[j]
    p, q, s = colour[0, 0], colour[0, 1], colour[0, 2]
    t, u, v = colour[1, 0], colour[1, 1], colour[1, 2]
    for j in range(len(r)):
        out[3 * j] = p * r[j] + t
        out[3 * j + 1] = q * g[j] + u
        out[3 * j + 2] = s * b[j] + v


@_inner
def _blur_and_store(row, plan, colour, planes, size, margin, taps, blocks, out):
    """The last sweep of a view that is blurred; ``blocks`` (5, ...) is scratch."""
    radius, rows = len(taps) - 1, max(1, BLOCK // size)
    pitch = size + 2 * radius
    for c in range(3):
        _reflect_rows(planes[c], size, margin, radius)
    for y in range(0, size, rows):
        count = min(rows, size - y)
        for c in range(3):
            start = (margin + y) * size
            _blur_block(planes[c], start, size, count, taps, blocks[0], blocks[1], blocks[2 + c])
        for k in range(count):
            a, z, at = k * pitch, k * pitch + size, 3 * (y + k) * size
            r, g, b = blocks[2, a:z], blocks[3, a:z], blocks[4, a:z]
            _store(r, g, b, row, plan.threshold, colour, out[at : at + 3 * size])


@_inner
def _render_one(image, height, width, row, plan, colour, planes, margin, scratch, out):
    """Render one view: ``image`` (3 H W,) uint8 to ``out`` (3 S^2,), with ``row`` drawn for it."""
    first, offset, weight, line, blocks, half = scratch
    size = first.shape[1]
    rows, base = max(1, BLOCK // size), margin * size

    top, bottom, left, right, pitch = 0, height, 0, width, np.uint64(3 * width)
    if plan.inside:
        top, bottom = int(row.top), int(row.top + row.height)
        left, right = int(row.left), int(row.left + row.width)
    tall_step, wide_step = row.height / size, row.width / size
    y_taps = _resample(row.top, tall_step, top, bottom, plan.cubic, False, 1 / 255, first[0], weight[0])
    x_taps = _resample(row.left, wide_step, left, right, plan.cubic, row.flip, 1.0, first[1], weight[1])
    left, right = min(first[1, 0], first[1, -1]), max(first[1, 0], first[1, -1]) + x_taps
    for x in range(size):
        offset[x] = 3 * (first[1, x] - left)
    line = line[: 3 * (right - left)]

    gray_first, gray_last = row.gray and plan.gray_first, row.gray and not plan.gray_first
    radius = min(blur_radius(row.sigma, plan.kernel, size), margin)
    cut = 4  # how many operations come before contrast
    for k in range(4):
        if row.order[k] == _CONTRAST and row.contrast != _ONE:
            cut = k
    total = 0.0
    for sweep in range(1 if cut == 4 else 2):
        for y in range(0, size, rows):
            count = min(rows, size - y)
            a, z = base + y * size, base + (y + count) * size
            r, g, b = planes[0, a:z], planes[1, a:z], planes[2, a:z]
            if sweep == 0:
                for k in range(count):
                    source = np.uint64(3 * (first[0, y + k] * width + left))
                    _blend_rows(image, source, pitch, weight[0, (y + k) * y_taps :], y_taps, line)
                    a, z = k * size, (k + 1) * size
                    _blend_columns(line, offset, weight[1], x_taps, r[a:z], g[a:z], b[a:z])
                if plan.cubic:  # its weights overshoot
                    _affine(_ONE, _ZERO, (r, g, b))
                if gray_first:
                    _gray(r, g, b)
                for k in range(cut):
                    _apply(row.order[k], row, r, g, b)
                if cut < 4:
                    total += _gray_sum(r, g, b)
                    continue
            else:
                mean = np.float32(total / (size * size))
                _affine(row.contrast, (_ONE - row.contrast) * mean, (r, g, b))
                for k in range(cut + 1, 4):
                    _apply(row.order[k], row, r, g, b)
            if gray_last:
                _gray(r, g, b)
            if radius == 0:
                _store(r, g, b, row, plan.threshold, colour, out[3 * y * size : 3 * (y + count) * size])
    if radius > 0:
        _gaussian(row.sigma, half[: radius + 1])
        _blur_and_store(row, plan, colour, planes, size, margin, half[: radius + 1], blocks, out)


@njit(nogil=True, error_model="numpy", fastmath=True, cache=True)
def render(images, rows, plans, v, colour, planes, out):
    """Render view ``v`` of every image as ``rows`` (B, V) says.

    ``images`` (B, H, W, 3) uint8, ``plans`` (V,), ``colour`` (2, 3) the factor and the offset that normalise,
    ``planes`` (3, (S + 2 margin) S) scratch, ``out`` (B, S, S, 3) float32.
    """
    batch, height, width, _ = images.shape
    plan = plans[v]
    size = int(plan.size)
    margin = (planes.shape[1] // size - size) // 2
    most = (4 if plan.cubic else 2) * (max(height, width) // size + 1)  # taps of the strongest downscale
    block = max(1, BLOCK // size) * (size + 2 * margin)
    first, offset = np.empty((2, size), np.int64), np.empty(size, np.uint64)
    weight, line = np.empty((2, size * most), np.float32), np.empty(3 * width, np.float32)
    blocks, half = np.empty((5, block), np.float32), np.empty(margin + 1, np.float32)
    scratch = first, offset, weight, line, blocks, half
    pixels, flat = images.reshape(batch, 3 * height * width), out.reshape(batch, 3 * size * size)
    for b in range(batch):
        _render_one(pixels[b], height, width, rows[b, v], plan, colour, planes, margin, scratch, flat[b])
