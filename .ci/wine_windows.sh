#!/usr/bin/env bash
# Uses the Windows wheel under wine, on Debian or Ubuntu: a checkpoint generates, a model is quantized, and tests run
# once per level that this CPU has.
#
#   .ci/wine_windows.sh WHEEL PYTHON FOLDER [pytest arguments]
#
# Before: sudo apt-get install wine wine64. PYTHON (3.10 to 3.12, of this machine, with pip, ziglang) gets packages
# into FOLDER, which is kept for the next time: torch for Windows with its OpenMP, and CPython's DLLs, which panda3d's
# wheel brings for those who ship a game; the rest of Python's library is PYTHON's own, for it is the same everywhere.
set -euo pipefail
wheel=$(realpath "$1") python=$(command -v "$2") folder=$(realpath -m "$3")
shift 3
cd "$(dirname "$0")/.."
minor=$("$python" -c "import sys; print(sys.version_info.minor)")
export WINEPREFIX=$folder/prefix WINEDEBUG=-all

fetch() {
    "$python" -m pip install --quiet --no-deps --only-binary :all: --python-version "3.$minor" --platform win_amd64 \
        --target "$1" "${@:2}"
}

# CPython, and what wine 8 lacks: a random number for the standard library of Rust.
make_python() {
    local home=$folder/python.partial scratch=$folder/scratch
    rm -rf "$home" "$scratch" && mkdir -p "$home/DLLs" "$scratch"
    fetch "$scratch/parts" panda3d==1.10.16 msvc-runtime
    cp "$scratch"/parts/deploy_libs/*.dll "$scratch"/parts/Scripts/*.dll "$home/"
    cp "$scratch"/parts/deploy_libs/*.pyd "$home/DLLs/"
    cp -r "$("$python" -c 'import os; print(os.path.dirname(os.__file__))')" "$home/Lib"
    rm -rf "$home"/Lib/{site-packages,lib-dynload,test}
    # python3.dll is all names of Python's stable ABI, passed on to python311.dll.
    "$python" - "$home/python3$minor.dll" "$scratch" <<'END'
import re, sys
from pathlib import Path

dll, scratch = Path(sys.argv[1]), Path(sys.argv[2])
names = sorted({name.decode() for name in re.findall(rb"\0(_?Py\w+)(?=\0)", dll.read_bytes())})
(scratch / "names.def").write_text("\n".join([f"LIBRARY {dll.name}", "EXPORTS", *names]))
passed_on = [f"{name}={dll.stem}.{name}" for name in names]
(scratch / "python3.def").write_text("\n".join(["LIBRARY python3.dll", "EXPORTS", *passed_on]))
END
    cat > "$scratch/python.c" <<'END'
#include <wchar.h>
int Py_Main(int, wchar_t **);
int wmain(int count, wchar_t **arguments) { return Py_Main(count, arguments); }
END
    cat > "$scratch/random.c" <<'END'
#include <windows.h>
BOOLEAN NTAPI SystemFunction036(void *, ULONG);
__declspec(dllexport) BOOL WINAPI ProcessPrng(BYTE *data, SIZE_T size) { return SystemFunction036(data, (ULONG)size); }
END
    local zig="$python -m ziglang" target="-target x86_64-windows-gnu"
    $zig dlltool -m i386:x86-64 -d "$scratch/names.def" -l "$scratch/names.a"
    $zig cc $target -municode "$scratch/python.c" "$scratch/names.a" -o "$home/python.exe"
    $zig cc $target -shared "$scratch/random.c" -ladvapi32 -o "$home/bcryptprimitives.dll"
    echo > "$scratch/empty.c"
    $zig cc $target -shared "$scratch/empty.c" "$scratch/python3.def" -o "$home/python3.dll"
    rm -rf "$scratch" "$folder/python"
    mv "$home" "$folder/python"
}

# What Python imports.
make_site() {
    local site=$folder/site.partial
    rm -rf "$site" "$folder/site"
    # numpy 2 needs functions that wine 8 lacks.
    fetch "$site" torch==2.13.0 numpy==1.26.4 safetensors greenlet regex transformers==5.19.0 accelerate psutil \
        huggingface_hub tokenizers pyyaml tqdm httpx2 httpcore2 h11 anyio truststore certifi idna hf-xet click typer \
        rich shellingham markdown-it-py mdurl pytest pytest-timeout hypothesis sympy mpmath typing_extensions filelock \
        fsspec jinja2 markupsafe networkx iniconfig packaging pluggy pygments attrs sortedcontainers colorama
    mv "$site" "$folder/site"
}

mkdir -p "$folder"
# What was interrupted is not there under its own name, so it is made again.
[ -e "$folder/python/python3.dll" ] || make_python
[ -d "$folder/site/torch" ] || make_site
rm -rf "$folder/wheel" "$folder/tree" && mkdir "$folder/tree"
"$python" -m zipfile -e "$wheel" "$folder/wheel"
cp -r tests pyproject.toml csrc .ci "$folder/tree/"

# Windows 10, for torch; KMP_AFFINITY, since wine 8 knows no NUMA nodes.
wine reg add 'HKCU\Software\Wine' /v Version /d win10 /f > /dev/null
export OMP_NUM_THREADS=1 CI=1 HF_HUB_OFFLINE=1 KMP_AFFINITY=disabled PYTHONDONTWRITEBYTECODE=1
export PYTHONHOME="Z:$folder/python" PYTHONPATH="Z:$folder/site;Z:$folder/wheel;Z:$folder/tree"
cd "$folder/tree"
# Windows' Python takes no file as its standard output from wine.
emulated() { wine "$folder/python/python.exe" "$@" < /dev/null 2>&1 | cat; }
emulated .ci/smoke.py
levels=$(emulated -c "from gptq_backend import _cpu; print(*_cpu.levels())" | tr -d '\r') || { echo "$levels" >&2; exit 1; }
[ -n "$levels" ] || { echo "error: the wheel names no level of the CPU kernels; expected generic at least" >&2; exit 1; }
for level in $levels; do
    echo "level $level"
    GPTQ_BACKEND_CPU_LEVEL=$level emulated -m pytest -q -p no:cacheprovider --timeout 3600 "$@"
done
