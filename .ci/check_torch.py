"""Stop before pip downloads gigabytes of CUDA onto a machine that has no NVIDIA GPU.

Reads the report of ``pip install --dry-run --no-deps --report FILE torch``.
"""

import json
import shutil
import sys
from pathlib import Path

from pip._vendor.packaging.requirements import Requirement

metadata = json.loads(Path(sys.argv[1]).read_text())["install"][0]["metadata"]
wanted = [Requirement(line) for line in metadata.get("requires_dist", [])]
cuda = [
    item.name
    for item in wanted
    if item.name.startswith(("nvidia-", "cuda-")) and (item.marker is None or item.marker.evaluate({"extra": ""}))
]
if cuda and not shutil.which("nvidia-smi"):
    sys.exit(
        f"torch {metadata['version']} as pip finds it is a CUDA build ({len(cuda)} more packages, GBs), "
        "and this machine has no NVIDIA GPU.\n"
        "Take the CPU build:  make <target> TORCH='torch==2.13.0 --index-url ADDRESS'\n"
        "with the ADDRESS that https://pytorch.org/get-started shows for CPU,\n"
        "or take CUDA all the same:  make <target> CHECK_TORCH=0"
    )
