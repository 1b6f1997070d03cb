"""A fast HTTP server for benchmarks of the download: hosts are loopback addresses, some slow, some mute.

``python -m tests.benchmarks.loopback_server PORT SIDE_PX [PICTURES]`` serves on 127.0.0.1 to 127.0.0.254 (Linux) until
it is ended. The behaviour of an address is told by its last byte, see ``behaviour``.
"""

from __future__ import annotations

import asyncio
import io
import sys
from typing import Literal

import numpy as np
from PIL import Image

Behaviour = Literal["good", "slow", "mute"]
NUM_PICTURES = 32
SLOW_S = 0.5


def behaviour(last_byte: int) -> Behaviour:
    """Tell how 127.0.0.<last_byte> behaves: 1-99 answer at once, 100-149 after half a second, 150-199 never."""
    return "good" if last_byte < 100 else "slow" if last_byte < 150 else "mute"


def jpeg(seed: int, side_px: int) -> bytes:
    """Draw a smooth random picture with a little grain."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (12, 12, 3), dtype=np.uint8))
    smooth = np.asarray(coarse.resize((side_px, side_px), Image.Resampling.BICUBIC), np.float32)
    pixels = np.clip(smooth + rng.normal(0, 6, smooth.shape), 0, 255).astype(np.uint8)
    sink = io.BytesIO()
    Image.fromarray(pixels).save(sink, "JPEG", quality=85)
    return sink.getvalue()


async def main(port: int, side_px: int, num_pictures: int = NUM_PICTURES) -> None:
    """Serve."""
    pictures = [jpeg(seed, side_px) for seed in range(num_pictures)]

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        kind = behaviour(int(writer.get_extra_info("sockname")[0].rpartition(".")[2]))
        try:
            while True:
                request = await reader.readuntil(b"\r\n\r\n")
                if kind == "mute":
                    await asyncio.sleep(3600)
                if kind == "slow":
                    await asyncio.sleep(SLOW_S)
                number = int(request.split(b" ", 2)[1].strip(b"/").partition(b".")[0])
                body = pictures[number % num_pictures]
                closes = b"connection: close" in request.lower()
                head = f"HTTP/1.1 200 OK\r\nContent-Type: image/jpeg\r\nContent-Length: {len(body)}\r\n"
                writer.write(head.encode() + (b"Connection: close\r\n\r\n" if closes else b"\r\n") + body)
                await writer.drain()
                if closes:
                    break
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()

    server = await asyncio.start_server(answer, "0.0.0.0", port, backlog=1024)
    print(f"{np.mean([len(picture) for picture in pictures]):.0f}", flush=True)
    async with server:
        await server.serve_forever()


if __name__ == "__main__":
    asyncio.run(main(*(int(argument) for argument in sys.argv[1:])))
