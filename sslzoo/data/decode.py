"""A picture file to 8-bit RGB: libjpeg-turbo for JPEG, Pillow where it cannot; whole pictures or an error."""

import io
from pathlib import Path

import numpy as np
import simplejpeg
from PIL import Image

from sslzoo.errors import UserError

ORIENTATION = 0x0112  # the EXIF tag


class CorruptImage(UserError):
    """A file that cannot be decoded whole; ``data.on_error=skip`` trains without it."""

    def __init__(self, path: str | Path, reason: str):
        super().__init__(
            f"{path} cannot be decoded ({reason}); replace the file, or pass data.on_error=skip to skip it"
        )


def decode(path: str | Path, upright: bool = True) -> np.ndarray:
    """Decode one picture file.

    Gray and palette pictures become RGB, transparent ones are composited over white, 16-bit gray is scaled to
    8 bits, and the EXIF orientation is applied. The first picture of a file with many is taken.

    Parameters
    ----------
    path : str or Path
        A JPEG, PNG, WebP, BMP or TIFF file; its content decides, whatever it is called.
    upright : bool
        Apply the EXIF orientation; without it the pixels stay as they are stored (TIFF's are always turned).

    Returns
    -------
    np.ndarray of shape (H, W, 3), uint8
        C-contiguous.

    Raises
    ------
    CorruptImage
        The file is missing, is no picture, is damaged or cut short, or is larger than Pillow's limit against
        decompression bombs. Pixels decoded before the damage are never returned.
    """
    try:
        data = Path(path).read_bytes()
        pixels, orientation = _decode_jpeg(data) or _decode_with_pillow(data)
    except Image.UnidentifiedImageError:  # its own message names a memory address
        raise CorruptImage(path, "not a known picture format" if data else "the file is empty") from None
    except Exception as error:  # damage raises nearly anything in Pillow's plugins, even SyntaxError
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise CorruptImage(path, " ".join(reason.split()) or type(error).__name__) from error
    return np.ascontiguousarray(_upright(pixels, orientation) if upright else pixels)


def _decode_jpeg(data: bytes) -> tuple[np.ndarray, int] | None:
    """Pixels and EXIF orientation of a gray or colour JPEG; None for what libjpeg-turbo leaves to Pillow."""
    if not data.startswith(b"\xff\xd8\xff"):
        return None
    try:
        height, width, colorspace, _ = simplejpeg.decode_jpeg_header(data)
    except ValueError:
        return None
    if colorspace not in ("Gray", "YCbCr", "RGB"):
        return None
    limit = 2 * (Image.MAX_IMAGE_PIXELS or float("inf"))  # where Pillow's warning becomes an error
    if height * width > limit:
        raise ValueError(f"{width} x {height} pixels, over Pillow's limit of {limit}")
    # strict turns libjpeg's warnings into errors. Pillow must not get a second try then: it accepts some
    # damaged data that strict refuses.
    pixels = simplejpeg.decode_jpeg(data, colorspace="RGB", strict=True)
    has_exif = b"Exif\0\0" in data[: 1 << 16]  # parsing it costs more than looking for it
    orientation = Image.open(io.BytesIO(data)).getexif().get(ORIENTATION, 1) if has_exif else 1
    return pixels, orientation


def _decode_with_pillow(data: bytes) -> tuple[np.ndarray, int]:
    """Pixels and EXIF orientation of any picture Pillow reads."""
    with Image.open(io.BytesIO(data)) as image:
        image.load()
        orientation = image.getexif().get(ORIENTATION, 1)  # after load, which turns a TIFF by itself
        if image.mode.startswith("I;16"):
            gray = np.asarray(image).astype(np.uint32)
            gray = ((gray + 128) // 257).astype(np.uint8)  # 65535 = 255 * 257; Pillow would clip at 255
            return np.repeat(gray[..., None], 3, axis=2), orientation
        if image.mode in ("I", "F"):
            raise ValueError(f"its 32-bit pixels (mode {image.mode}) have no known white, save 8 or 16 bits")
        if not image.has_transparency_data:
            return np.asarray(image.convert("RGB")), orientation
        over_white = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
        return np.asarray(over_white.convert("RGB")), orientation


def _upright(pixels: np.ndarray, orientation: int) -> np.ndarray:
    """Undo the camera's EXIF orientation, 1 to 8; other values are ignored, as viewers do."""
    match orientation:
        case 2:
            return pixels[:, ::-1]
        case 3:
            return pixels[::-1, ::-1]
        case 4:
            return pixels[::-1]
        case 5:
            return pixels.transpose(1, 0, 2)
        case 6:
            return np.rot90(pixels, -1)
        case 7:
            return pixels[::-1, ::-1].transpose(1, 0, 2)
        case 8:
            return np.rot90(pixels)
        case _:
            return pixels
