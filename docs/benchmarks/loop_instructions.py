"""How many instructions the inner loop of each ARM level takes, and how many cycles a model of a core gives it.

    python docs/benchmarks/loop_instructions.py docs/benchmarks/neon-loops.json --mca llvm-mca-16

Compiles the loop of 4-bit products with a cross compiler (``--compiler``), as setup.py does, and finds it in the
assembly: it is the only one that prefetches. One turn of it multiplies 128 weights, 8 input by 16 output channels, by
so many rows. llvm-mca assumes that all data is in the L1 cache. Prints a table.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
LEVELS = {
    "level_neon.cpp": ("Neon", []),
    "level_neon_dotprod.cpp": ("NeonDotprod", ["-march=armv8.2-a+dotprod"]),
    "level_neon_i8mm.cpp": ("NeonI8mm", ["-march=armv8.2-a+dotprod+i8mm"]),
}
GENERIC = ("level_generic.cpp", ("Generic", []))
OPTIONS = ["-std=c++17", "-O3", "-fno-math-errno", "-Wno-psabi", "-fno-asynchronous-unwind-tables", "-S", "-o", "-"]
# The level's file without its table of functions, which would instantiate all the others.
UNIT = """
{level}
}}  // namespace gptq
extern "C" __attribute__((flatten)) void tile(const gptq::Call& c, int row, int strip) {{
    gptq::multiply_tile<gptq::{isa}, 4, {a8}, {rows}, {strips}>(c, row, strip);
}}
"""
CORES = ("cortex-a76", "neoverse-n1", "apple-m1")


def assembly(compiler: str, file: str, isa: str, options: list[str], a8: bool, rows: int, strips: int) -> list[str]:
    """Lines of the function ``tile``."""
    level = (ROOT / "csrc" / "cpu" / file).read_text().partition("const Level")[0]
    unit = UNIT.format(level=level, isa=isa, a8=str(a8).lower(), rows=rows, strips=strips)
    command = [compiler, *OPTIONS, *options, "-I", str(ROOT / "csrc" / "cpu"), "-x", "c++", "-"]
    text = subprocess.run(command, input=unit, capture_output=True, text=True, check=True).stdout
    return text.partition("\ntile:\n")[2].partition("\t.size\ttile,")[0].splitlines()


def inner_loop(lines: list[str]) -> list[str]:
    """Instructions from a label to the branch back to it, of the shortest such piece that prefetches."""
    labels = {line[:-1]: i for i, line in enumerate(lines) if re.fullmatch(r"\.L\w+:", line)}
    found = []
    for i, line in enumerate(lines):
        target = re.search(r"\.L\w+$", line)
        if line.startswith("\t") and target and labels.get(target[0], i) < i:
            piece = [each for each in lines[labels[target[0]] : i + 1] if re.match(r"\t[a-z]", each)]
            if any("prf" in each for each in piece):
                found.append(piece)
    return min(found, key=len)


def cycles(mca: str, core: str, loop: list[str]) -> float | None:
    """Of one turn, by llvm-mca; None where it does not know the core or an instruction."""
    command = [mca, "-mtriple=aarch64-linux-gnu", f"-mcpu={core}", "-mattr=+dotprod,+i8mm", "-iterations=200"]
    done = subprocess.run(command, input="\n".join(loop), capture_output=True, text=True)
    total = re.search(r"Total Cycles:\s+(\d+)", done.stdout)
    return round(int(total[1]) / 200, 1) if total and done.returncode == 0 else None


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("json", type=Path)
    parser.add_argument("--compiler", default="aarch64-linux-gnu-g++")
    parser.add_argument("--mca", default="llvm-mca")
    asked = parser.parse_args()
    records = []
    for file, (isa, options) in [GENERIC, *LEVELS.items()]:
        for a8 in (False, True):
            for rows in (1, 4):
                loop = inner_loop(assembly(asked.compiler, file, isa, options, a8, rows, strips=1))
                record = {"level": file[6:-4], "activations": "int8" if a8 else "int16", "rows": rows}
                record |= {"instructions": len(loop), **{core: cycles(asked.mca, core, loop) for core in CORES}}
                records.append({**record, "instructions_per_row": round(len(loop) / rows, 1)})
    tools = [
        subprocess.run([tool, "--version"], capture_output=True, text=True).stdout
        for tool in (asked.compiler, asked.mca)
    ]
    versions = [re.search(r"\d+\.\d+\.\d+", text)[0] for text in tools]
    asked.json.write_text(json.dumps({"gcc": versions[0], "llvm-mca": versions[1], "loops": records}, indent=1) + "\n")
    print("| level | activations | rows | instructions | of these for a row |" + "".join(f" {c} |" for c in CORES))
    print("|---" * (5 + len(CORES)) + "|")
    for each in records:
        cells = ("level", "activations", "rows", "instructions", "instructions_per_row", *CORES)
        print("| " + " | ".join(str(each[cell]) for cell in cells) + " |")


if __name__ == "__main__":
    main()
