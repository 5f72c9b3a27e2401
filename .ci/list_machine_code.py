"""List what a wheel gptq-backend-cuda holds, as the driver gets it; an error if a width of an architecture is missing.

python .ci/list_machine_code.py WHEEL
"""

from __future__ import annotations

import json
import lzma
import re
import struct
import sys
import zipfile

PACKAGE = "gptq_backend_cuda"


def main(path: str) -> None:
    """The command."""
    total = packed = 0
    with zipfile.ZipFile(path) as wheel:
        contents = json.loads(wheel.read(f"{PACKAGE}/contents.json"))
        for target in [*(f"sm_{arch}" for arch in contents["cubins"]), f"compute_{contents['ptx']}"]:
            sizes = []
            for bits in (2, 3, 4, 8):
                data = wheel.read(f"{PACKAGE}/{target}-{bits}.xz")
                code = lzma.decompress(data)
                found = _architecture(code)
                if found != target.partition("_")[2]:
                    sys.exit(f"{target}-{bits}.xz is for {found}")
                sizes.append(len(code))
                total, packed = total + len(code), packed + len(data)
            print(f"{target}: 2, 3, 4 and 8 bits, {sum(sizes)} bytes")
    print(f"CUDA {contents['cuda']}, {total} bytes, {packed} packed")


def _architecture(code: bytes) -> str:
    """Of a cubin, which is an ELF file with it in its flags, or of PTX."""
    if code[:4] == b"\x7fELF":
        (flags,) = struct.unpack_from("<I", code, 48)
        return str((flags >> 8 if code[8] >= 8 else flags) & 0xFF)  # the version of NVIDIA's ABI is in byte 8
    target = re.search(rb"\.target sm_(\d+)", code)
    return target[1].decode() if target else "nothing"


if __name__ == "__main__":
    main(sys.argv[1])
