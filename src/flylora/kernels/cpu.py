"""An optional CPU kernel for routed layers: the same mathematics, touching only the selected ranks.

Plain PyTorch multiplies by all r ranks and pays some microseconds for each of a dozen small operations. The kernel does
selection, update and gradients token by token in one operator. It is C++ and must be compiled once on each machine:

    python -m flylora.kernels.cpu

That needs a C++ compiler and takes about half a minute; from then on every process on that machine uses it, where it
can (see [`usable`]). ``disable()`` turns to plain PyTorch again, for the rest of the process. Without it nothing is
missing but speed.
"""

from __future__ import annotations

import functools
import hashlib
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from flylora.errors import UserError
from flylora.functional import Block

SOURCE = Path(__file__).with_name("cpu.cpp")

# Sums may be reordered, as every matrix product does; infinities and NaN keep their meaning.
_FLAGS = (
    "-O3",
    "-march=native",
    "-std=c++20",
    "-shared",
    "-fPIC",
    "-fopenmp",
    "-w",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-fno-signed-zeros",
    "-fassociative-math",
)
_TYPES = frozenset({torch.float32, torch.bfloat16, torch.float16})
_disabled = False


def cache_folder() -> Path:
    """Where compiled kernels are kept: $XDG_CACHE_HOME/flylora/native, or ~/.cache/flylora/native."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "flylora" / "native"


def library_path() -> Path:
    """The compiled kernel's file for this source, this torch and this processor."""
    built_for = [SOURCE.read_text(), torch.__version__, " ".join(_FLAGS), platform.machine(), _processor()]
    return cache_folder() / f"{hashlib.sha256(chr(0).join(built_for).encode()).hexdigest()[:16]}.so"


def _processor() -> str:
    """What the compiler's -march=native depends on."""
    information = Path("/proc/cpuinfo")
    if not information.exists():
        return platform.processor()
    lines = information.read_text(errors="replace").splitlines()
    return next((line for line in lines if line.startswith(("flags", "Features"))), "")


def build(compiler: str | None = None) -> Path:
    """Compile the kernel, unless it is there already.

    Args:
        compiler: the C++ compiler; $CXX or c++ if left out.

    Returns:
        The library's file.

    Raises:
        UserError: there is no compiler, or it fails; nothing is left behind.
    """
    path = library_path()
    if path.exists():
        return path
    compiler = compiler or os.environ.get("CXX") or "c++"
    if shutil.which(compiler) is None:
        raise UserError(
            f"There is no C++ compiler '{compiler}': install one (such as the package g++), or set CXX; without the "
            "kernel flylora works in plain PyTorch."
        )
    from flylora.records import saving

    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    with saving(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    try:
        done = subprocess.run(
            [compiler, *_FLAGS, str(SOURCE), *_torch_flags(), "-o", str(partial)], capture_output=True
        )
        if done.returncode:
            lines = done.stderr.decode(errors="replace").splitlines()
            reason = next((line for line in lines if "error" in line), lines[-1] if lines else "no message")
            raise UserError(f"{compiler} could not compile the kernel ({reason.strip()}): try another with CXX.")
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
    _loaded.cache_clear()
    return path


def _torch_flags() -> Sequence[str]:
    root = Path(torch.__file__).parent
    include = [f"-I{root / 'include'}", f"-I{root / 'include' / 'torch' / 'csrc' / 'api' / 'include'}"]
    abi = f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}"
    return [*include, abi, f"-L{root / 'lib'}", "-ltorch", "-ltorch_cpu", "-lc10"]


@functools.cache
def _loaded() -> bool:
    path = library_path()
    if not path.exists():
        return False
    torch.ops.load_library(str(path))
    return True


def available() -> bool:
    """Whether the kernel is compiled for this machine and not disabled."""
    return not _disabled and _loaded()


def disable() -> None:
    """Use plain PyTorch from here on."""
    global _disabled
    _disabled = True


def enable() -> None:
    """Use the kernel again, where it is compiled."""
    global _disabled
    _disabled = False


def usable(
    x: Tensor,
    up: Tensor,
    projection: Tensor,
    routing_bias: Tensor,
    blocks: tuple[Block, ...],
    base_out: Tensor | None = None,
) -> bool:
    """Whether the kernel computes this layer: on the CPU, B and A in float32, and all blocks routed alike by score.

    Not while torch.compile traces, which makes its own kernels, and not under autocast, which would compute the scores
    in another type.
    """
    return (
        not torch.compiler.is_compiling()
        and available()
        and x.device.type == "cpu"
        and not torch.is_autocast_enabled("cpu")
        and (base_out is None or base_out.dtype in _TYPES)
        and up.dtype == projection.dtype == routing_bias.dtype == torch.float32
        and x.dtype in _TYPES
        and _routes(blocks)
    )


@functools.lru_cache(maxsize=256)
def _routes(blocks: tuple[Block, ...]) -> bool:
    first = blocks[0]
    return (
        first.selection in ("magnitude", "signed")
        and not first.is_linear
        and all(block[:3] == first[:3] for block in blocks)
        and first.r * len(blocks) < 1 << 15
    )


def routed_add_(
    out: Tensor,
    x: Tensor,
    projection: Tensor,
    up_t: Tensor,
    routing_bias: Tensor,
    blocks: tuple[Block, ...],
    scaling: float,
) -> None:
    """out += s z B^T in place, without a backward pass; only where it is [`usable`].

    Args:
        out: (..., m), contiguous. x: (..., n). projection: A, (R, n). up_t: B^T, (R, m), contiguous, so that the rows
            of the ranks that nobody selected are never read. The others as for [`flylora.functional.routed_update`].
    """
    first = blocks[0]
    magnitude = first.selection == "magnitude"
    torch.ops.flylora.routed_add_(out, x, projection, up_t, routing_bias, len(blocks), first.k, magnitude, scaling)


def routed_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    projection: Tensor,
    up: Tensor,
    routing_bias: Tensor,
    blocks: tuple[Block, ...],
    scaling: float,
    load: Tensor | None = None,
    token_mask: Tensor | None = None,
) -> Tensor:
    """[`flylora.functional.routed_linear`] by the kernel; only where it is [`usable`]."""
    first = blocks[0]
    found: Tensor = torch.ops.flylora.routed_linear(
        x,
        weight,
        bias,
        projection.contiguous(),
        up.contiguous(),
        routing_bias,
        load,
        token_mask,
        len(blocks),
        first.k,
        first.selection == "magnitude",
        scaling,
    )
    return found


def main() -> int:
    """Compile and say where."""
    try:
        print(build())
    except UserError as error:
        print(f"flylora: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
