"""Procedural image-caption pairs: coloured shapes with exact captions, and the loopback server that serves them.

Every row is a function of (settings, index) alone: caption, URL and image bytes. Nothing is stored; the server renders
what it is asked for, so the downloader works on these URLs as it does on any other. A configurable share of the rows
is defective in the ways web data is (dead links, broken files, copies, placeholders, wrong captions).
"""

from __future__ import annotations

import contextlib
import errno
import io
import itertools
import logging
import math
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from PIL import Image

from stages.base import setting
from stages.errors import InputError

logger = logging.getLogger(__name__)

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (225, 30, 30),
    "green": (30, 170, 50),
    "blue": (35, 60, 225),
    "yellow": (245, 225, 40),
    "cyan": (40, 205, 225),
    "magenta": (225, 40, 215),
    "white": (240, 240, 240),
    "black": (15, 15, 15),
}
SHAPES = ("circle", "square", "triangle", "ring")
CAPTIONS: tuple[str, ...] = tuple(
    f"a {foreground} {shape} on a {background} background"
    for foreground, background, shape in itertools.product(COLOURS, COLOURS, SHAPES)
    if foreground != background
)

HOST = "127.0.0.1"
Defect = Literal["missing", "broken", "tiny", "placeholder", "duplicate", "wrong_caption"]
DEFECTS: tuple[Defect, ...] = ("missing", "broken", "tiny", "placeholder", "duplicate", "wrong_caption")

_TINY_PX = 8
_MARGIN = 0.02
# Enough variation that no two pictures are equal, little enough that minutes on a CPU teach a small decoder geometry.
_RADIUS = (0.34, 0.40)  # of the side
_MAX_SHIFT = 0.03  # of the centre, of the side
_MAX_TILT = 0.1  # radians
_COLOUR_JITTER = 10
# Longest reach from the centre and half-width, in units of the radius: polygons are drawn a little larger so that
# their thin parts survive at 16 px.
_SQUARE_HALF_SIDE = 0.82
_TRIANGLE_CIRCUMRADIUS = 1.18
_RING_HOLE = 0.5
_REACH = {
    "circle": 1.0,
    "ring": 1.0,
    "square": _SQUARE_HALF_SIDE * math.sqrt(2),
    "triangle": _TRIANGLE_CIRCUMRADIUS,
}


@dataclass(frozen=True, kw_only=True)
class ShapesConfig:
    """Which pictures there are, how they look, where they are served and how many are defective."""

    num_images: int = setting(
        4000, "rows of the data set; more rows leave the earlier ones as they are", affects="stage"
    )
    seed: int = setting(0, "which pictures; the global seed does not change the data")
    image_size_px: int = setting(64, "side of the square pictures, pixels")
    image_format: Literal["png", "jpg"] = setting("png", "`png` or `jpg`")
    noise_levels: float = setting(4.0, "standard deviation of the pixel noise, of 255 levels")
    port: int = setting(8731, "loopback port the pictures are served on while they are downloaded")
    missing_fraction: float = setting(0.02, "rows whose URL answers 404, 0 to 1")
    broken_fraction: float = setting(0.01, "rows whose file is cut in half, 0 to 1")
    tiny_fraction: float = setting(0.01, f"rows whose picture is {_TINY_PX} px small, 0 to 1")
    placeholder_fraction: float = setting(0.01, "rows that all show one and the same grey picture, 0 to 1")
    duplicate_fraction: float = setting(0.02, "rows that show an earlier row's picture under another URL, 0 to 1")
    wrong_caption_fraction: float = setting(0.02, "rows whose caption describes another picture, 0 to 1")

    def __post_init__(self) -> None:
        if self.num_images < 1:
            raise ValueError(f"num_images: {self.num_images} is below 1; write for example 4000")
        if self.seed < 0:
            raise ValueError(f"seed: {self.seed} is negative; write 0 or more")
        if self.image_size_px < 16:
            raise ValueError(f"image_size_px: {self.image_size_px} is too small to show a shape; write 16 or more")
        if not 0 <= self.noise_levels <= 64:
            raise ValueError(f"noise_levels: {self.noise_levels} is not between 0 and 64")
        if not 1024 <= self.port <= 65535:
            raise ValueError(f"port: {self.port} is not between 1024 and 65535")
        fractions = self.defect_fractions
        if min(fractions) < 0 or sum(fractions) > 1:
            raise ValueError(f"the *_fraction settings {fractions} must be at least 0 and sum to at most 1")

    @property
    def defect_fractions(self) -> tuple[float, ...]:
        """Share of the rows with each of ``DEFECTS``, in that order."""
        return (
            self.missing_fraction,
            self.broken_fraction,
            self.tiny_fraction,
            self.placeholder_fraction,
            self.duplicate_fraction,
            self.wrong_caption_fraction,
        )


@dataclass(frozen=True, kw_only=True)
class Picture:
    """Everything that determines one row.

    Attributes:
        caption: what the row says (a lie where ``defect`` is ``wrong_caption``).
        shape, foreground, background: what the picture shows.
        centre: x, y in units of the side.
        radius: in units of the side.
        angle: rotation, radians.
        noise_seed: seed of the colour jitter and the pixel noise.
        defect: what is wrong with the row, if anything.
    """

    caption: str
    shape: str
    foreground: str
    background: str
    centre: tuple[float, float]
    radius: float
    angle: float
    noise_seed: tuple[int, ...]
    defect: Defect | None


def picture_of(config: ShapesConfig, index: int) -> Picture:
    """Return row ``index``; equal arguments give equal rows, whatever ``num_images`` is."""
    rng = np.random.default_rng([config.seed, index])
    defect = _draw_defect(config, rng.random())
    if defect == "duplicate":
        original = _original_of(config, index, rng)
        if original is not None:
            return original
        defect = None
    foreground, background = rng.choice(list(COLOURS), size=2, replace=False).tolist()
    shape = str(rng.choice(SHAPES))
    radius = float(rng.uniform(*_RADIUS))
    slack = min(_MAX_SHIFT, max(0.0, 0.5 - _MARGIN - radius * _REACH[shape]))
    x, y = rng.uniform(0.5 - slack, 0.5 + slack, size=2).tolist()
    caption = f"a {foreground} {shape} on a {background} background"
    angle = float(rng.uniform(-_MAX_TILT, _MAX_TILT))
    if defect == "wrong_caption":
        caption = str(rng.choice([other for other in CAPTIONS if other != caption]))
    return Picture(
        caption=caption,
        shape=shape,
        foreground=foreground,
        background=background,
        centre=(x, y),
        radius=radius,
        angle=angle,
        noise_seed=(config.seed, index, 1),
        defect=defect,
    )


def _draw_defect(config: ShapesConfig, u: float) -> Defect | None:
    for defect, fraction in zip(DEFECTS, config.defect_fractions, strict=True):
        if u < fraction:
            return defect
        u -= fraction
    return None


def _original_of(config: ShapesConfig, index: int, rng: np.random.Generator) -> Picture | None:
    """Pick an earlier sound row to show again; None where the draws find none (the first rows)."""
    for candidate in rng.integers(0, index, size=16).tolist() if index else ():
        drawn = np.random.default_rng([config.seed, candidate]).random()
        if _draw_defect(config, drawn) is None:
            return picture_of(config, candidate)
    return None


def render(picture: Picture, image_size_px: int, noise_levels: float = 0.0) -> npt.NDArray[np.uint8]:
    """Draw a picture, anti-aliased.

    Args:
        picture: what to draw.
        image_size_px: side of the square image.
        noise_levels: standard deviation of Gaussian pixel noise; 0 draws without noise.

    Returns:
        uint8 array (image_size_px, image_size_px, 3), RGB.
    """
    side = image_size_px
    distance_px = _signed_distance(picture, side) * side
    coverage = np.clip(0.5 - distance_px, 0.0, 1.0)[..., None]
    rng = np.random.default_rng(picture.noise_seed)
    jitter = rng.uniform(-_COLOUR_JITTER, _COLOUR_JITTER, size=(2, 3))
    foreground = np.asarray(COLOURS[picture.foreground]) + jitter[0]
    background = np.asarray(COLOURS[picture.background]) + jitter[1]
    image = coverage * foreground + (1 - coverage) * background
    if noise_levels > 0:
        image += noise_levels * rng.standard_normal(image.shape, dtype=np.float32)
    return np.asarray(np.clip(np.rint(image), 0, 255), np.uint8)


def _signed_distance(picture: Picture, side: int) -> npt.NDArray[np.float64]:
    """Distance of every pixel centre to the outline, negative inside, in units of the side; shape (side, side)."""
    centres = (np.arange(side) + 0.5) / side
    x = centres[None, :] - picture.centre[0]
    y = centres[:, None] - picture.centre[1]
    cos, sin = math.cos(picture.angle), math.sin(picture.angle)
    u, v = cos * x + sin * y, cos * y - sin * x
    radius = picture.radius
    if picture.shape == "square":
        return np.maximum(np.abs(u), np.abs(v)) - _SQUARE_HALF_SIDE * radius
    if picture.shape == "triangle":
        inradius = _TRIANGLE_CIRCUMRADIUS * radius / 2
        slanted = np.abs(u) * (math.sqrt(3) / 2) + v / 2
        return np.maximum(slanted, -v) - inradius
    outer = np.hypot(u, v) - radius
    if picture.shape == "ring":
        return np.maximum(outer, _RING_HOLE * radius - np.hypot(u, v))
    return np.asarray(outer)


def image_bytes(config: ShapesConfig, index: int) -> bytes | None:
    """Return the file that the URL of row ``index`` answers with; None where it answers 404."""
    picture = picture_of(config, index)
    if picture.defect == "missing":
        return None
    if picture.defect == "placeholder":
        return _encode(np.full((config.image_size_px, config.image_size_px, 3), 128, np.uint8), config.image_format)
    side = _TINY_PX if picture.defect == "tiny" else config.image_size_px
    data = _encode(render(picture, side, config.noise_levels), config.image_format)
    return data[: len(data) // 2] if picture.defect == "broken" else data


def _encode(image: npt.NDArray[np.uint8], image_format: str) -> bytes:
    sink = io.BytesIO()
    if image_format == "png":
        Image.fromarray(image).save(sink, "PNG", compress_level=1)
    else:
        Image.fromarray(image).save(sink, "JPEG", quality=95, subsampling=0)
    return sink.getvalue()


def url_of(config: ShapesConfig, index: int) -> str:
    """Return the URL of row ``index``."""
    return f"http://{HOST}:{config.port}{_path_of(config, index)}"


def _path_of(config: ShapesConfig, index: int) -> str:
    return f"/shapes/{config.seed}/{index:08d}.{config.image_format}"


@contextlib.contextmanager
def serve(config: ShapesConfig) -> Iterator[None]:
    """Serve the pictures on the loopback interface for the length of a ``with`` block.

    Raises:
        InputError: if the port is taken.
    """
    try:
        server = _Server((HOST, config.port), _handler_of(config))
    except OSError as error:
        raise InputError(
            f"source.shapes.port: cannot serve the shapes on {HOST}:{config.port} ({error.strerror}); end the program "
            f"that uses the port or choose another one, for example -s source.shapes.port={config.port + 1}"
        ) from error
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.1}, daemon=True)
    thread.start()
    try:
        yield
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def serve_on_this_machine(config: ShapesConfig) -> None:
    """Serve the pictures until this process ends, unless somebody here does so already: the driver, or a neighbour.

    What a worker needs whose driver is on another machine: the URLs name loopback.
    """
    try:
        server = _Server((HOST, config.port), _handler_of(config))
    except OSError as error:
        if error.errno != errno.EADDRINUSE:
            raise
        return
    threading.Thread(target=server.serve_forever, name="shapes", daemon=True).start()


class _Server(ThreadingHTTPServer):
    """A quiet server: a client that hangs up is no news."""

    daemon_threads = True
    request_queue_size = 256

    def handle_error(self, request: Any, client_address: Any) -> None:
        logger.debug("request of %s failed", client_address, exc_info=True)


def _handler_of(config: ShapesConfig) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        """Answers GET for the rows of one data set."""

        def do_GET(self) -> None:
            data = self._find()
            if data is None:
                self.send_error(404)
                return
            self.send_response(200)
            self.send_header("Content-Type", "image/png" if config.image_format == "png" else "image/jpeg")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def _find(self) -> bytes | None:
            stem = self.path.rpartition("/")[2].partition(".")[0]
            if not stem.isdecimal() or self.path != _path_of(config, int(stem)) or int(stem) >= config.num_images:
                return None
            return image_bytes(config, int(stem))

        def log_message(self, format: str, *args: Any) -> None:
            logger.debug(format, *args)

    return Handler
