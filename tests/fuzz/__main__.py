"""Fuzzes the adapter file's reader: `python -m tests.fuzz [--seconds 60 | --files N] [--seed N] [--only INDEX]`."""

import argparse
import os
import sys

from tests.fuzz.run import run


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--seconds", type=float, default=float("inf"), help="stop after this long")
    parser.add_argument("--files", type=int, default=10**9, help="stop after this many files")
    parser.add_argument("--seed", type=int, default=int.from_bytes(os.urandom(3), "little"), help="default: a new one")
    parser.add_argument("--only", type=int, metavar="INDEX", help="check this file alone")
    arguments = parser.parse_args()
    indices = range(arguments.files) if arguments.only is None else range(arguments.only, arguments.only + 1)
    if arguments.seconds == float("inf") and indices.stop == 10**9:
        arguments.seconds = 60.0
    result = run(arguments.seed, arguments.seconds, indices)
    for outcome, count in result.outcomes.most_common():
        print(f"{count:8}  {outcome}")
    for index, what in result.failures[:10]:
        print(f"\nWRONG: python -m tests.fuzz --seed {arguments.seed} --only {index}\n{what}")
    rate = result.files / max(result.seconds, 1e-9)
    print(
        f"seed {arguments.seed}: {result.files} files, {rate:.0f} a second, {result.accepted} accepted, "
        f"{len(result.outcomes)} outcomes, {len(result.failures)} wrong"
    )
    return 1 if result.failures else 0


if __name__ == "__main__":
    sys.exit(main())
