"""How fast the files of a saved pipe are checked, by one thread and by more: ``python benchmarks/checksums.py``."""

from __future__ import annotations

import argparse
import os
import time
from pathlib import Path
from tempfile import TemporaryDirectory

from ernie_accel.storage.checksums import checksums

GB = 10**9


def main() -> None:
    """Write a file, read it once so that the system's cache holds it, and check it in turns."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gb", type=float, default=2.0, help="size of the file")
    parser.add_argument("--folder", help="where to write it; default: the system's folder for temporary files")
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    with TemporaryDirectory(dir=arguments.folder) as folder:
        file = Path(folder) / "weights"
        with file.open("wb") as out:
            for _ in range(max(1, round(arguments.gb * GB / 2**26))):
                out.write(os.urandom(2**26))
        gigabytes = file.stat().st_size / GB
        checksums([file])
        for _ in range(arguments.rounds):
            for threads in sorted({1, 2, os.cpu_count() or 1}):
                wall, busy = time.perf_counter(), time.process_time()
                checksums([file], threads=threads)
                wall, busy = time.perf_counter() - wall, time.process_time() - busy
                print(f"{threads} threads: {gigabytes / wall:.2f} GB/s, {gigabytes / busy:.2f} GB a second of one core")


if __name__ == "__main__":
    main()
