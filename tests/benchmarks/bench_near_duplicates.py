"""How long the search for near duplicates takes, what it finds and what memory it needs.

``python -m tests.benchmarks.bench_near_duplicates`` plants near duplicates among random hashes and prints, for every
radius: wall and CPU seconds, how many of the planted pairs were found (all, or it is a bug), and the peak of
the process's memory over what the data themselves take. Every search runs in a process of its own; the medians of
several are printed.
"""

from __future__ import annotations

import argparse
import os
import time

import numpy as np

from stages.hash_tables import Hashes, Tones
from stages.image_hash import NUM_TONES
from stages.near_duplicates import near_duplicates
from tests.benchmarks.bench_models import cpu_model
from tests.benchmarks.own_process import medians
from tests.resident import resident_mib


def planted(num: int, fraction: float, max_bits: int, seed: int) -> tuple[Hashes, Tones, np.ndarray, np.ndarray]:
    """Make random hashes of which some are others with up to ``max_bits`` bits flipped.

    Returns:
        Hashes and tones of all, in random order; and the two rows of every planted pair.
    """
    rng = np.random.default_rng(seed)
    num_copies = int(num * fraction)
    originals = rng.integers(0, 2**64 - 1, num - num_copies, dtype=np.uint64)
    source = rng.permutation(len(originals))[:num_copies]
    num_flips = rng.integers(0, max_bits + 1, num_copies)
    bits = np.argsort(rng.random((num_copies, 64)), axis=1)[:, : max(max_bits, 1)]
    flips = np.where(np.arange(bits.shape[1]) < num_flips[:, None], np.uint64(1) << bits.astype(np.uint64), 0)
    copies = originals[source] ^ np.bitwise_xor.reduce(flips.astype(np.uint64), axis=1)
    place = rng.permutation(num)
    hashes = np.empty(num, np.uint64)
    hashes[place] = np.concatenate([originals, copies])
    tones = np.full((num, NUM_TONES), 128, np.uint8)
    return hashes, tones, place[source], place[len(originals) :]


def measure(num: int, fraction: float, max_bits: int, seed: int) -> tuple[float, ...]:
    """Search once; return wall and CPU seconds, MiB, pairs found and planted, and images dropped."""
    hashes, tones, originals, copies = planted(num, fraction, max_bits, seed)
    before = resident_mib("VmHWM")
    wall, cpu = time.perf_counter(), time.process_time()
    keepers = near_duplicates(hashes, tones, max_bits=max_bits, max_levels=12)
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    # Of a planted pair the later goes, unless the earlier has gone itself.
    first, last = np.minimum(originals, copies), np.maximum(originals, copies)
    found = (keepers[last] >= 0) | (keepers[first] >= 0)
    above_mib = resident_mib("VmHWM") - before
    return wall, cpu, above_mib, int(found.sum()), len(found), int((keepers >= 0).sum())


def main() -> None:
    """Measure every radius."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num", type=int, default=1_000_000)
    parser.add_argument("--fraction", type=float, default=0.05, help="share of planted near duplicates")
    parser.add_argument("--bits", type=int, nargs="*", default=[4])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--repetitions", type=int, default=3)
    args = parser.parse_args()
    print(f"{args.num:,} hashes, {os.cpu_count()} cores ({cpu_model()}), load {os.getloadavg()[0]:.1f}")
    for max_bits in args.bits:
        arguments = (args.num, args.fraction, max_bits, args.seed)
        wall, cpu, above_mib, *counts = medians(measure, *arguments, repetitions=args.repetitions)
        found, num_planted, dropped = map(int, counts)
        print(
            f"radius {max_bits:2}  {wall:7.1f} s wall  {cpu:7.1f} s CPU  {found} of {num_planted} planted pairs  "
            f"{dropped} dropped  {above_mib:6.0f} MiB above the data",
            flush=True,
        )


if __name__ == "__main__":
    main()
