#!/usr/bin/env bash
# Runs tests with the aarch64 wheel's extension under qemu-user, once per level; on Debian or Ubuntu.
#
#   .ci/qemu_aarch64.sh WHEEL PYTHON FOLDER [pytest arguments]
#
# PYTHON (of this machine, with pip) fetches packages into FOLDER, which is kept for the next time: an aarch64 Python from
# Debian's archive (before: sudo dpkg --add-architecture arm64 && sudo apt-get update; apt-get install qemu-user), and the
# last torch that has a small build for it.
set -euo pipefail
wheel=$(realpath "$1") python=$(realpath -s "$2") folder=$(realpath -m "$3")
shift 3
cd "$(dirname "$0")/.."
version=3.11
mkdir -p "$folder/debs" "$folder/root" "$folder/site" "$folder/tree"
if [ ! -e "$folder/root/usr/bin/python$version" ]; then
    (
        cd "$folder/debs"
        apt-get download -q "python$version:arm64" "python$version-minimal:arm64" "libpython$version-minimal:arm64" \
            "libpython$version-stdlib:arm64" libc6:arm64 libgcc-s1:arm64 libstdc++6:arm64 libgomp1:arm64 zlib1g:arm64 \
            libffi8:arm64 libssl3:arm64 libexpat1:arm64 libbz2-1.0:arm64 liblzma5:arm64 libuuid1:arm64 libcrypt1:arm64 \
            libsqlite3-0:arm64
        for package in ./*.deb; do dpkg-deb -x "$package" "$folder/root"; done
    )
fi
if [ ! -d "$folder/site/torch" ]; then
    "$python" -m pip install --quiet --no-deps --only-binary :all: --python-version "$version" --target "$folder/site" \
        --platform manylinux_2_28_aarch64 --platform manylinux2014_aarch64 --platform manylinux_2_17_aarch64 --platform any \
        torch==2.6.0 numpy safetensors greenlet regex pytest pytest-timeout hypothesis sympy mpmath typing_extensions \
        filelock fsspec jinja2 markupsafe networkx iniconfig packaging pluggy pygments attrs sortedcontainers
fi
rm -rf "$folder/tree" && mkdir "$folder/tree"
cp -r gptq_backend integrations tests pyproject.toml csrc "$folder/tree/"
rm -f "$folder"/tree/gptq_backend/_c*.so
"$python" -m zipfile -e "$wheel" "$folder/wheel"
cp "$folder/wheel/gptq_backend/_cpu.abi3.so" "$folder/tree/gptq_backend/"
# Tests start Python again by sys.executable; this one goes through qemu, too.
emulated=$folder/python
cat > "$emulated" <<END
#!/bin/sh
exec qemu-aarch64 -cpu max -L $folder/root $folder/root/usr/bin/python$version "\$@"
END
chmod +x "$emulated"
export OMP_NUM_THREADS=1 CI=1 PYTHONPATH=$folder/site:$folder/tree:$folder/tree/integrations
cd "$folder/tree"
for level in neon neon_dotprod neon_i8mm; do
    echo "level $level"
    GPTQ_BACKEND_CPU_LEVEL=$level "$emulated" -c "import sys, pytest; sys.executable = '$emulated'; sys.exit(pytest.main())" \
        -q -p no:cacheprovider --timeout 3600 "$@"
done
