"""Draw ads with captions that describe them exactly, as TSV files.

    python tools/make_demo_data.py OUT_DIR [--pretrain 6000] [--tune 3000] [--held_out 200] [--seed 7]

Each ad shows one product in one colour at one side of a patterned background, a slogan in Chinese and a price. Both
styles of captions name all of these attributes, and `parse_caption` reads them back, so that a generated caption can be
checked attribute by attribute. Written to OUT_DIR:

    pretrain.tsv             id, base64 JPEG, caption in the "plain" style
    tune.tsv                 the same with captions in the "ad" style
    held_out.tsv             id and base64 JPEG only: the input of run.sh
    held_out_blank.tsv       the same ids with one grey image: what can be said without seeing the ad
    held_out_captions.tsv    id and the "ad" caption: the references
    ad0.jpg, ad1.jpg, …      the first few of held_out.tsv as image files

No combination of attributes occurs twice, so no held-out ad is in the training data.
"""

from __future__ import annotations

import argparse
import base64
import colorsys
import contextlib
import functools
import io
import math
import os
import random
import re
import sys
from typing import IO, Callable, Dict, Iterator, List, NamedTuple, Optional, Tuple

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from paddlemix.processors.fonts import system_fonts  # noqa: E402
from paddlemix.utils import cli  # noqa: E402
from paddlemix.utils.errors import UserError  # noqa: E402
from paddlemix.utils.files import atomic_write  # noqa: E402
from paddlemix.utils.parallel import map_chunks  # noqa: E402
from paddlemix.utils.progress import Progress  # noqa: E402

Color = Tuple[int, int, int]

PRODUCT_COLORS: Dict[str, Color] = {
    "红色": (214, 40, 40),
    "橙色": (245, 130, 32),
    "黄色": (250, 210, 30),
    "绿色": (40, 150, 70),
    "蓝色": (35, 90, 205),
    "紫色": (130, 60, 170),
    "棕色": (120, 75, 40),
    "黑色": (35, 35, 38),
}
BACKGROUND_COLORS: Dict[str, Color] = {
    "白色": (250, 250, 250),
    "灰色": (176, 180, 184),
    "粉色": (252, 190, 206),
    "浅蓝色": (170, 212, 245),
    "浅绿色": (184, 230, 180),
    "米黄色": (246, 230, 180),
}
PATTERNS = ("纯色", "条纹", "圆点")
SIDES: Dict[str, float] = {"左侧": 0.26, "中间": 0.5, "右侧": 0.74}
PRICES = ("9", "15", "27", "38", "46", "50", "64", "72")
SLOGANS = ("限时特价", "新品上市", "买一送一", "全场包邮", "清仓甩卖", "会员专享")
SLOGAN_PLACES = ("上方", "下方")

# Held-out ads that are also written as picture files.
PICTURE_FILES = 8


class Ad(NamedTuple):
    """What an image shows. Each field is an attribute that a caption is marked on."""

    product: str
    color: str
    side: str
    background: str
    pattern: str
    price: str
    slogan: str
    slogan_place: str


# --- captions ---

STYLES: Dict[str, str] = {
    "plain": "一个{color}的{product}放在画面{side}，{background}的{pattern}背景，{slogan_place}写着“{slogan}”，"
    "价格{price}元。",
    "ad": "{background}的{pattern}背景的广告图中，{slogan_place}的标语是“{slogan}”，"
    "画面{side}展示了一款{color}的{product}，仅售{price}元！",
}


def write_caption(ad: Ad, style: str) -> str:
    """The caption of `ad` in a style of STYLES."""
    return STYLES[style].format(**ad._asdict())


def _words() -> Dict[str, Tuple[str, ...]]:
    return {
        "product": tuple(PRODUCTS),
        "color": tuple(PRODUCT_COLORS),
        "side": tuple(SIDES),
        "background": tuple(BACKGROUND_COLORS),
        "pattern": PATTERNS,
        "price": PRICES,
        "slogan": SLOGANS,
        "slogan_place": SLOGAN_PLACES,
    }


def find_attributes(caption: str) -> Dict[str, Tuple[int, int]]:
    """Where a caption states its attributes: field of Ad → begin and end, in characters.

    What it does not state is missing. Each clause of either style is looked for by itself, so a caption that goes
    wrong halfway still counts for what it got right.
    """
    words = _words()
    found: Dict[str, Tuple[int, int]] = {}
    for template in STYLES.values():
        # A clause holds one to three attributes and the fixed words that tell them apart.
        for clause in re.split("，", template.rstrip("。！")):
            pattern = re.escape(clause)
            for field, values in words.items():
                # Longest first: 浅蓝色 is not 蓝色.
                alternatives = "|".join(map(re.escape, sorted(values, key=len, reverse=True)))
                pattern = pattern.replace(re.escape(f"{{{field}}}"), f"(?P<{field}>{alternatives})")
            match = re.search(f"(?:^|，){pattern}(?:[，。！]|$)", caption)
            if match:
                found.update((field, match.span(field)) for field in match.groupdict())
    return found


def parse_caption(caption: str) -> Dict[str, Optional[str]]:
    """The attributes that a caption states, by field of Ad; None where it states none (see find_attributes)."""
    found = find_attributes(caption)
    return {field: caption[slice(*found[field])] if field in found else None for field in Ad._fields}


# --- drawing ---


def _shade(color: Color, factor: float) -> Color:
    """Darker for factor < 1, nearer to white for factor > 1 (2 is white)."""
    if factor <= 1:
        return tuple(int(c * factor) for c in color)  # type: ignore[return-value]
    return tuple(int(c + (255 - c) * (factor - 1)) for c in color)  # type: ignore[return-value]


def _vary(color: Color, rng: random.Random) -> Color:
    """The same colour to the eye, never the same number twice."""
    hue, light, saturation = colorsys.rgb_to_hls(*(c / 255 for c in color))
    light = min(1.0, max(0.0, light + rng.uniform(-0.025, 0.025)))
    saturation = min(1.0, max(0.0, saturation * rng.uniform(0.9, 1.0)))
    red, green, blue = colorsys.hls_to_rgb((hue + rng.uniform(-0.008, 0.008)) % 1.0, light, saturation)
    return round(red * 255), round(green * 255), round(blue * 255)


class _Pen:
    """Draws in a box of its own, from (-1, -1) at the top left to (1, 1), turned by a few degrees."""

    def __init__(self, draw, center: Tuple[float, float], half: float, degrees: float):
        self.draw, self.center, self.half = draw, center, half
        self.cos, self.sin = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))

    def _at(self, x: float, y: float) -> Tuple[float, float]:
        return (
            self.center[0] + self.half * (x * self.cos - y * self.sin),
            self.center[1] + self.half * (x * self.sin + y * self.cos),
        )

    def polygon(self, points: List[Tuple[float, float]], fill: Color, outline: Optional[Color] = None) -> None:
        self.draw.polygon([self._at(x, y) for x, y in points], fill=fill)
        if outline:
            self.line(points + points[:1], outline, 0.05)

    def box(self, x0: float, y0: float, x1: float, y1: float, fill: Color, outline: Optional[Color] = None) -> None:
        self.polygon([(x0, y0), (x1, y0), (x1, y1), (x0, y1)], fill, outline)

    def arc(self, x: float, y: float, rx: float, ry: float, start: float, end: float) -> List[Tuple[float, float]]:
        steps = 24
        angles = [math.radians(start + (end - start) * i / steps) for i in range(steps + 1)]
        return [(x + rx * math.cos(a), y + ry * math.sin(a)) for a in angles]

    def disc(self, x: float, y: float, r: float, fill: Color, outline: Optional[Color] = None) -> None:
        self.polygon(self.arc(x, y, r, r, 0, 360), fill, outline)

    def line(self, points: List[Tuple[float, float]], fill: Color, width: float) -> None:
        self.draw.line([self._at(x, y) for x, y in points], fill=fill, width=max(1, round(width * self.half)))


def _cup(pen: _Pen, main: Color, dark: Color, light: Color) -> None:
    pen.line(pen.arc(0.5, 0.05, 0.42, 0.42, -90, 90), dark, 0.2)
    pen.polygon([(-0.75, -0.65), (0.55, -0.65), (0.42, 0.65), (-0.62, 0.65)], main, dark)
    pen.box(-0.6, -0.5, -0.42, 0.45, light)
    pen.box(-0.85, 0.7, 0.75, 0.85, dark)


def _bottle(pen: _Pen, main: Color, dark: Color, light: Color) -> None:
    pen.polygon([(-0.2, -0.6), (0.2, -0.6), (0.42, -0.2), (0.42, 0.95), (-0.42, 0.95), (-0.42, -0.2)], main, dark)
    pen.box(-0.26, -0.95, 0.26, -0.65, dark)
    pen.box(-0.42, 0.15, 0.42, 0.6, light, dark)


def _phone(pen: _Pen, main: Color, dark: Color, light: Color) -> None:
    pen.box(-0.55, -0.95, 0.55, 0.95, main, dark)
    pen.box(-0.38, -0.68, 0.38, 0.6, light, dark)
    pen.disc(0.0, 0.77, 0.1, light)


def _bag(pen: _Pen, main: Color, dark: Color, light: Color) -> None:
    pen.line(pen.arc(0, -0.2, 0.45, 0.65, 180, 360), dark, 0.16)
    pen.polygon([(-0.65, -0.25), (0.65, -0.25), (0.95, 0.85), (-0.95, 0.85)], main, dark)
    pen.disc(0, 0.15, 0.16, light, dark)


def _watch(pen: _Pen, main: Color, dark: Color, light: Color) -> None:
    pen.box(-0.28, -1.0, 0.28, 1.0, main, dark)
    pen.disc(0, 0, 0.6, main, dark)
    pen.disc(0, 0, 0.42, (250, 250, 250), dark)
    pen.line([(0, -0.3), (0, 0), (0.22, 0.1)], dark, 0.08)


def _lamp(pen: _Pen, main: Color, dark: Color, light: Color) -> None:
    pen.box(-0.08, 0.0, 0.08, 0.8, dark)
    pen.polygon([(-0.4, -0.9), (0.4, -0.9), (0.85, 0.05), (-0.85, 0.05)], main, dark)
    pen.box(-0.55, 0.75, 0.55, 0.95, main, dark)


def _umbrella(pen: _Pen, main: Color, dark: Color, light: Color) -> None:
    pen.box(-0.06, -0.2, 0.06, 0.75, dark)
    pen.line(pen.arc(0.2, 0.72, 0.2, 0.2, 0, 180), dark, 0.12)
    pen.polygon(pen.arc(0, 0, 0.98, 0.9, 180, 360), main, dark)
    for x in (-0.33, 0.33):
        pen.line([(0, -0.88), (x, 0.0)], dark, 0.05)


def _shirt(pen: _Pen, main: Color, dark: Color, light: Color) -> None:
    half = [(0.25, -0.8), (0.5, -0.8), (1.0, -0.35), (0.75, -0.02), (0.55, -0.2), (0.55, 0.9)]
    pen.polygon(half + [(-x, y) for x, y in reversed(half)], main, dark)
    pen.polygon(pen.arc(0, -0.8, 0.25, 0.22, 0, 180), light, dark)


PRODUCTS: Dict[str, Callable[[_Pen, Color, Color, Color], None]] = {
    "杯子": _cup,
    "瓶子": _bottle,
    "手机": _phone,
    "手提包": _bag,
    "手表": _watch,
    "台灯": _lamp,
    "雨伞": _umbrella,
    "T恤": _shirt,
}

# Drawn at this multiple of the final size and reduced, which smooths the edges.
_OVERSAMPLE = 2


def _paint_background(draw, side: int, ad: Ad, rng: random.Random) -> None:
    color = _vary(BACKGROUND_COLORS[ad.background], rng)
    draw.rectangle([0, 0, side, side], fill=color)
    pattern_color = _shade(color, 0.55)
    step = side * rng.uniform(0.2, 0.23)
    start = rng.uniform(0, step)
    if ad.pattern == "条纹":
        lean = rng.choice((-1, 1)) * side * rng.uniform(0.3, 0.5)
        x = start - 2 * side
        while x < 2 * side:
            draw.polygon([(x, 0), (x + step / 2, 0), (x + step / 2 + lean, side), (x + lean, side)], fill=pattern_color)
            x += step
    elif ad.pattern == "圆点":
        radius = step * 0.3
        for row in range(int(side / step) + 2):
            for column in range(int(side / step) + 3):
                x = start + (column - 1) * step + (row % 2) * step / 2
                y = start + (row - 1) * step
                draw.ellipse([x - radius, y - radius, x + radius, y + radius], fill=pattern_color)


def draw_ad(ad: Ad, rng: random.Random, size: int, font: str):
    """Draw `ad` as an RGB PIL image of size × size pixels; what it does not fix is varied by `rng`."""
    from PIL import Image, ImageDraw

    side = size * _OVERSAMPLE
    image = Image.new("RGB", (side, side))
    draw = ImageDraw.Draw(image)
    _paint_background(draw, side, ad, rng)

    # The slogan is a band at one end, the price one at the other; what is between is the product's. A band is as high,
    # and a character of the slogan as wide, as a patch of the tiny model's ViT (a quarter of the side): characters that
    # were cut by patches were not learned with every seed.
    band_color = rng.choice(((178, 24, 43), (20, 60, 120), (30, 30, 30), (120, 20, 90)))
    slogan = (ad.slogan, 0.23, (255, 255, 255), band_color)
    price = (f"¥{ad.price}", 0.3, (170, 0, 0), (255, 236, 60))
    above, below = (slogan, price) if ad.slogan_place == "上方" else (price, slogan)

    center = (side * (SIDES[ad.side] + rng.uniform(-0.02, 0.02)), side * (0.5 + rng.uniform(-0.02, 0.02)))
    main = _vary(PRODUCT_COLORS[ad.color], rng)
    pen = _Pen(draw, center, side * rng.uniform(0.23, 0.25), rng.uniform(-6, 6))
    PRODUCTS[ad.product](pen, main, _shade(main, 0.55), _shade(main, 1.7))

    for middle, (text, height, ink, paper) in ((0.125, above), (0.875, below)):
        draw.rectangle([0, side * (middle - 0.125), side, side * (middle + 0.125)], fill=paper)
        typeface = _load_font(font, int(height * side))
        left, top, right, bottom = typeface.getbbox(text, anchor="mm")
        x = side * (0.5 + rng.uniform(-0.015, 0.015)) - (left + right) / 2
        draw.text((x, side * middle - (top + bottom) / 2), text, font=typeface, fill=ink, anchor="mm")
    return image.resize((size, size), Image.Resampling.BOX)


def encode_jpeg(image) -> bytes:
    """A JPEG of quality 88, as base64 text in ASCII bytes."""
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=88)
    return base64.b64encode(buffer.getvalue())


# --- the font ---


def find_font() -> str:
    """The path of a font with Chinese: the pinned PyPI package's Noto Sans SC, with which the same seed draws the same
    pictures everywhere, else one of the system's.

    Raises:
        UserError: there is none.
    """
    import importlib.util

    package = importlib.util.find_spec("justmytype_intl_cjk")
    folders = package.submodule_search_locations if package else ()
    pinned = [os.path.join(folder, "fonts", "ofl", "notosanssc", "NotoSansSC[wght].ttf") for folder in folders]
    for path in filter(os.path.isfile, pinned + system_fonts()):
        return path
    raise UserError(
        "no font with Chinese characters found: pip install justmytype-intl-cjk, or apt install fonts-noto-cjk, "
        "or give one with --font"
    )


@functools.lru_cache(maxsize=None)
def _load_font(path: str, pixels: int):
    """The font at a size, bold where the file lets us choose."""
    from PIL import ImageFont

    font = ImageFont.truetype(path, pixels)
    if path.endswith("[wght].ttf"):
        font.set_variation_by_axes([800])
    return font


# --- the files ---


def sample_ads(count: int, seed: int) -> List[Ad]:
    """`count` different ads, drawn evenly from all combinations."""
    rng = random.Random(seed)
    values = _words()
    total = math.prod(len(v) for v in values.values())
    if count > total:
        raise UserError(f"there are {total} different ads, so {count} rows cannot all differ; ask for fewer")
    ads = []
    for number in rng.sample(range(total), count):
        fields = {}
        for field in Ad._fields:
            number, index = divmod(number, len(values[field]))
            fields[field] = values[field][index]
        ads.append(Ad(**fields))
    return ads


def draw_all(ads: List[Ad], seed: str, size: int, font: str, workers: int, bar: Progress) -> Iterator[bytes]:
    """The base64 of each ad's image in order, drawn by `workers` processes (0: in this one)."""

    def draw(chunk: range) -> List[bytes]:
        return [encode_jpeg(draw_ad(ads[i], random.Random(f"{seed}/{i}"), size, font)) for i in chunk]

    for images in map_chunks(draw, (range(len(ads))[i : i + 32] for i in range(0, len(ads), 32)), workers):
        for encoded in images:
            bar.update()
            yield encoded


def make_demo_data(
    out_dir: str, pretrain: int, tune: int, held_out: int, seed: int, size: int, font: str, workers: int
) -> None:
    """Draw and write the files that the module names."""
    from PIL import Image

    ads = sample_ads(pretrain + tune + held_out, seed)
    parts = {"pretrain": ads[:pretrain], "tune": ads[pretrain : pretrain + tune], "held_out": ads[pretrain + tune :]}
    with Progress(total=len(ads), desc="drawing", unit="image") as bar, contextlib.ExitStack() as stack:

        def create(name: str) -> IO[bytes]:
            return stack.enter_context(atomic_write(os.path.join(out_dir, name), "wb"))

        def images(name: str) -> Iterator[bytes]:
            return draw_all(parts[name], f"{seed}/{name}", size, font, workers, bar)

        for name, style in (("pretrain", "plain"), ("tune", "ad")):
            file = create(f"{name}.tsv")
            for i, (ad, image) in enumerate(zip(parts[name], images(name))):
                file.write(b"%s%d\t%s\t%s\n" % (name.encode(), i, image, write_caption(ad, style).encode()))

        blank = encode_jpeg(Image.new("RGB", (size, size), (128, 128, 128)))
        rows, blank_rows, captions = map(create, ("held_out.tsv", "held_out_blank.tsv", "held_out_captions.tsv"))
        for i, (ad, image) in enumerate(zip(parts["held_out"], images("held_out"))):
            rows.write(b"ad%d\t%s\n" % (i, image))
            blank_rows.write(b"ad%d\t%s\n" % (i, blank))
            captions.write(b"ad%d\t%s\n" % (i, write_caption(ad, "ad").encode()))
            if i < PICTURE_FILES:
                create(f"ad{i}.jpg").write(base64.b64decode(image))


def parse_arguments(arguments: Optional[List[str]] = None) -> argparse.Namespace:
    parser = cli.Parser(description=__doc__)
    count = cli.number(int, 0)
    parser.add_argument("out_dir", type=cli.output_folder, help="folder to write")
    parser.add_argument("--pretrain", type=count, default=6000, help="rows with captions in the plain style")
    parser.add_argument("--tune", type=count, default=3000, help="rows with captions in the ad style")
    parser.add_argument("--held_out", type=count, default=200, help="rows without captions, for prediction")
    parser.add_argument("--seed", type=cli.seed, default=7)
    parser.add_argument("--size", type=cli.number(int, 32), default=128, help="image side in pixels (default: 128)")
    parser.add_argument("--font", type=cli.path, help="font file with Chinese characters (default: the first found)")
    parser.add_argument("--workers", type=count, default=os.cpu_count() or 1, help="worker processes; 0: none")
    return parser.parse_args(arguments)


def main() -> None:
    args = parse_arguments()
    if args.font and not os.path.isfile(args.font):
        raise UserError(f"no font file {args.font}")
    font = args.font or find_font()
    try:
        _load_font(font, args.size)
    except OSError as error:
        raise UserError(f"{font} cannot be used as a font: {error}") from None
    make_demo_data(
        args.out_dir, args.pretrain, args.tune, args.held_out, args.seed, args.size, font, args.workers
    )
    print(f"{args.pretrain} rows to pretrain on, {args.tune} to tune on, {args.held_out} held out: {args.out_dir}")


if __name__ == "__main__":
    sys.exit(cli.run(main))
