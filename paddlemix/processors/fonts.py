"""A font with Chinese characters, for drawing on pictures."""

from __future__ import annotations

import glob
import os
from typing import List

from paddlemix.utils.log import logger

# Debian's fonts with Chinese characters: noto-cjk, wqy, arphic, droid-fallback.
_FONTS = "/usr/share/fonts/"
_FONT_FILES = (
    "opentype/noto/NotoSansCJK-Regular.ttc",
    "truetype/wqy/*.ttc",
    "truetype/arphic/*.ttc",
    "truetype/droid/DroidSansFallback*.ttf",
    "opentype/noto/*CJK*.ttc",
)
_MAX_FONT_BYTES = 64 << 20


def system_fonts() -> List[str]:
    """The files of Debian's fonts with Chinese characters that are installed."""
    return [path for name in _FONT_FILES for path in sorted(glob.glob(_FONTS + name))]


def find_font(folder: str, size: int):
    """A Pillow font with Chinese characters at `size` pixels, from the model folder (Qwen-VL ships SimSun.ttf) or
    Debian's packages; None if none opens."""
    from PIL import ImageFont

    own = [path for ending in ("ttf", "ttc", "otf") for path in glob.glob(f"{glob.escape(folder)}/*.{ending}")]
    own.sort(key=lambda path: (not os.path.basename(path).lower().startswith("simsun"), path))
    for path in own + system_fonts():
        try:
            # Not a pipe, which would block.
            if os.path.isfile(path) and os.path.getsize(path) <= _MAX_FONT_BYTES:
                return ImageFont.truetype(path, size)
        except (OSError, ValueError) as error:
            logger.warning("the font %s cannot be used: %s", path, error)
    return None
