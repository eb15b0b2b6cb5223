"""``python -m flylora.kernels`` compiles the CPU kernel for this machine and says where it is."""

from __future__ import annotations

import sys

from flylora.errors import UserError
from flylora.kernels import cpu


def main() -> int:
    """Compile and say where."""
    try:
        print(cpu.build())
    except UserError as error:
        print(f"flylora: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
