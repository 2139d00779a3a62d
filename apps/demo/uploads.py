"""Uploaded pictures: looked at before they are decoded."""

from __future__ import annotations

import warnings
from pathlib import Path

from PIL import Image, UnidentifiedImageError

from attnctl.apps.pictures import PictureError

from .limits import Limits

__all__ = ["read_upload"]

FORMATS = ("PNG", "JPEG", "WEBP")


def read_upload(path: str | Path | None, limits: Limits) -> Image.Image:
    """Return an uploaded picture in RGB.

    Args:
        path: where the server has put the upload.
        limits: bounds of its bytes and pixels; the pixels are told by the file's head, so that
            a small file that would unpack to gigabytes is refused unopened.

    Raises:
        PictureError: if it is none, broken, of another format or too large.
    """
    if path is None:
        raise PictureError("there is no picture: upload one, or take an example")
    try:
        if Path(path).stat().st_size > limits.upload_bytes:
            raise PictureError(f"the file is larger than {limits.upload_bytes >> 20} MiB")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            with Image.open(path, formats=FORMATS) as image:
                width, height = image.size
                if width * height > limits.upload_pixels:
                    raise PictureError(
                        f"the picture has {width} x {height} pixels; at most "
                        f"{limits.upload_pixels >> 20} Mi pixels"
                    )
                return image.convert("RGB")
    except PictureError:
        raise
    except UnidentifiedImageError:
        raise PictureError(f"the file is no picture ({', '.join(FORMATS)})") from None
    except Image.DecompressionBombError:
        raise PictureError("the picture has too many pixels") from None
    except (OSError, ValueError, SyntaxError, EOFError) as error:
        raise PictureError("the picture cannot be read: the file is broken") from error
