#!/usr/bin/env bash
# Everything that is to be found out on a machine with a GPU, in one call of less than ten minutes, without a network:
#
#   bench/gpu_session.sh [FOLDER] [--only STEPS] [--seconds S] [--trace FILE]     FOLDER: bench/results unless given
#   bench/gpu_session.sh FOLDER --dry-run                          no GPU: tiny sizes under the interpreter
#
# Installs this checkout, with PYTHON (python3 unless set) and the packages that are there, then runs gpu_session.py:
# tests, peaks, the goals of the kernels, a model with offloading, compute-sanitizer, a search for block sizes. JSON,
# plots and the log go to FOLDER as they come; the table is printed last.
set -uo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
python=${PYTHON:-python3}
venv=$root/build/gpu-venv
folder=$root/bench/results
dry=
seconds=560
arguments=()
while (($#)); do
    case $1 in
        --dry-run | --interpret) dry=1 arguments+=(--dry-run) ;;
        --seconds) seconds=$2; shift ;;
        --only | --trace) arguments+=("$1" "$2"); shift ;;
        -*) arguments+=("$1") ;;
        *) folder=$1 ;;
    esac
    shift
done
mkdir -p "$folder" || exit 2

# A virtual environment that sees what the Python at hand sees, which may be one itself: then --system-site-packages
# would pass over its packages.
make_venv() {
    "$python" -m venv --without-pip "$venv" && "$python" - "$venv" << 'EOF'
import pathlib, sys
(packages,) = pathlib.Path(sys.argv[1]).glob("lib/python*/site-packages")
seen = [path for path in sys.path if path.endswith(("site-packages", "dist-packages"))]
(packages / "parent.pth").write_text("".join(f"import site; site.addsitedir({path!r})\n" for path in seen))
EOF
}

install() {
    timeout 150 "$venv/bin/python" -m pip install -q --no-deps --no-build-isolation --disable-pip-version-check \
        -e "$root" && "$venv/bin/python" -c 'import torch, triton, transformers, moert._C'
}

# Where that cannot be had: a folder of links with the compiled extension in it, and nothing installed anywhere.
link() {
    make --no-print-directory -s -C "$root" -j"$(nproc)" -f tests/native/native.mk BUILD=build/gpu \
        PYTHON="$(command -v "$python")" build/gpu/package/moert/_C.abi3.so &&
        PYTHONPATH=$root/build/gpu/package "$python" -c 'import torch, triton, transformers, moert._C'
}

set_up() {
    if make_venv && install; then
        python=$venv/bin/python
    else
        echo "it could not be installed into a virtual environment; using links in build/gpu/package"
        link && export PYTHONPATH=$root/build/gpu/package
    fi
}

session() {
    if [ -z "$dry" ]; then
        echo "== install"
        set_up || { echo "the checkout could not be installed"; return 1; }
        echo "== installed for $python, $SECONDS s"
        seconds=$((seconds - SECONDS))
    fi
    PYTHONUNBUFFERED=1 "$python" "$root/bench/gpu_session.py" "$folder" --seconds "$seconds" "${arguments[@]}"
}

session 2>&1 | tee "$folder/gpu-session.log"
exit "${PIPESTATUS[0]}"
