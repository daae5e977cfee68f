#!/usr/bin/env bash
# Makes this checkout ready to use: .venv, the pinned dependencies, the Rust tokenizer, the project in editable mode.
#
#   bash dev/setup.sh          all dependencies of runcpu.sh, speedrun.sh and the scripts
#   bash dev/setup.sh --dev    also those of the tests
#
# Run it as often as you like: it takes a second if nothing has changed. It needs the package registries and
# PyTorch's index and, if no Python here is recent enough, uv's downloads of Python.
#
#   PYTHON_VERSION=3.12    the Python of a new .venv, 3.10 to 3.14
#   TORCH_BACKEND=pypi     the ordinary build of torch, from PyPI or its mirror
#   TORCH_BACKEND=cpu      or cu128, auto, ...: that build from PyTorch's index (uv's --torch-backend).
#                          By default auto if nvidia-smi finds a GPU, cpu on Linux without one, else pypi
set -euo pipefail
TORCH_VERSION=2.13.0
PYTHON_VERSION=${PYTHON_VERSION:-3.11}

# Each of these leads cd, Python, uv or maturin to another place than this checkout and its .venv.
unset CDPATH PYTHONHOME CONDA_PREFIX UV_PYTHON UV_SYSTEM_PYTHON UV_WORKING_DIR
unset PYTHONDONTWRITEBYTECODE # Docker images set it; without bytecode each process takes seconds longer to import torch
cd "$(dirname "${BASH_SOURCE[0]}")/.."
case "${1:-}" in
    "") dev="" kind=run ;;
    --dev) dev=1 kind=dev ;;
    *) echo "usage: bash dev/setup.sh [--dev]" >&2; exit 2 ;;
esac
say() { printf '\033[1m[setup]\033[0m %s\n' "$*" >&2; }
die() { say "$*"; exit 1; }
# shellcheck source=dev/machine.sh
source dev/machine.sh

# --- has anything changed since the last time? ----------------------------------------------------
fingerprint() {
    cat dev/setup.sh dev/machine.sh pyproject.toml requirements.lock \
        rust*/Cargo.* rust*/pyproject.toml 2>/dev/null | cksum
    find rust*/src -name "*.rs" -exec cat {} + | cksum
    pwd
    command -v cargo || true
    cargo --version 2>&1 || true
    # shellcheck disable=SC2012
    ls -d .venv/lib/python*/site-packages/*.dist-info 2>/dev/null | cksum # uv sync removes packages
}
stamp=.venv/setup-stamp
up_to_date() { # --dev includes the plain kind, and a build for GPUs runs on a CPU
    local wanted done_kind done_gpu
    [ -x .venv/bin/python ] && [ -s "$stamp" ] || return 1
    case ${TORCH_BACKEND:-} in # a build that was chosen stays
        "" | "$(sed -n '$s/^backend //p' "$stamp")") ;;
        *) return 1 ;;
    esac
    wanted=$(fingerprint)
    for done_kind in "$kind" dev; do
        for done_gpu in gpu cpu; do
            [ "$(sed '$d' "$stamp")" = "$wanted"$'\n'"$done_kind"$'\n'"$done_gpu" ] || continue
            [ "$done_gpu" = gpu ] || { find_gpus && [ "$gpus" = 0 ]; }
            return
        done
    done
    return 1
}
if up_to_date; then exit 0; fi

# --- a Python that runs and is recent enough, of those on the PATH --------------------------------
suits() { at_least 3.10 "$1" && ! at_least 3.15 "$1"; }
if ! suits "$PYTHON_VERSION"; then # the official images of Python set it to their own version
    say "PYTHON_VERSION=$PYTHON_VERSION is ignored: zangchat needs 3.10 to 3.14"
    PYTHON_VERSION=3.11
fi
candidates=$(type -ap "python$PYTHON_VERSION" python3 python || true)
python="" # the one for the environment
found=""
while read -r path; do
    [ -n "$path" ] || continue
    if ! version=$("$path" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null); then
        name=$(basename "$path")
        say "$path does not run" \
            "(if it is pyenv's: \`pyenv global ${name#python}\`, or \`pyenv install\` first)"
    elif suits "$version"; then
        python=$path found="Python $version"
        break
    else
        found="${found:-Python $version}"
    fi
done <<< "$candidates"

# --- uv: the one on the PATH, else from PyPI, into the project's folder ---------------------------
uv_works() { at_least 0.8 "$("$1" --version 2>/dev/null)"; }
install_uv() {
    local path pip=""
    while read -r path; do # any that can install a program
        [ -n "$path" ] || continue
        "$path" -c 'import sys, pip; sys.exit(sys.version_info < (3, 8))' > /dev/null 2>&1 || continue
        pip=$path
        break
    done <<< "$(printf '%s\n' "$python" "$candidates")"
    if [ -z "$found" ]; then
        die "no Python runs here: install Python 3.11 (\`sudo apt install python3 python3-pip\` on" \
            "Debian, Ubuntu), or uv, then run this again"
    elif [ -z "$pip" ]; then
        die "this Python has no pip: \`sudo apt install python3-pip\` (Debian, Ubuntu)," \
            "or install uv, then run this again"
    fi
    say "installing uv beside the project"
    PIP_ROOT_USER_ACTION=ignore PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_USER=0 PIP_REQUIRE_VIRTUALENV=0 \
        "$pip" -m pip install --quiet --upgrade --target .uv uv ||
        die "pip could not install uv: check the network (PIP_INDEX_URL names a mirror)," \
            "then run this again"
    uv_works .uv/bin/uv || die "the uv that pip installed does not run:" \
        "install uv (https://docs.astral.sh/uv), then run this again"
}
if ! uv_works uv; then
    uv_works .uv/bin/uv || install_uv
    export PATH="$PWD/.uv/bin:$PATH"
fi

# --- the environment ------------------------------------------------------------------------------
need_room() { # need_room GB: on the disks of .venv and of uv's cache
    local folder free
    for folder in .venv "$(uv cache dir)"; do
        free=$(free_gb "$folder")
        if [ "${free:-$1}" -lt "$1" ]; then
            die "the environment needs $1 GB of disk, and $folder has $free GB free: make room" \
                "(UV_CACHE_DIR moves uv's cache), then run this again"
        fi
    done
}
if ! .venv/bin/python -c "" 2>/dev/null; then
    need_room 3
    if [ -n "$python" ]; then
        uv venv --quiet --clear --python "$python" .venv
    else
        say "${found:-no Python} here, and zangchat needs 3.10 to 3.14:" \
            "uv fetches Python $PYTHON_VERSION"
        uv venv --quiet --clear --python "$PYTHON_VERSION" .venv ||
            die "uv could not fetch Python $PYTHON_VERSION: check the network" \
                "(UV_PYTHON_INSTALL_MIRROR names a mirror), or install Python 3.10 to 3.14, then run this again"
    fi
fi
.venv/bin/python -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] < (3, 15))' ||
    die ".venv has $(.venv/bin/python --version 2>&1), and zangchat needs 3.10 to 3.14: remove .venv and run this again"
export VIRTUAL_ENV="$PWD/.venv"

# --- torch first, in the build that suits the machine ---------------------------------------------
find_gpus
case $gpu_problem in "nvidia-smi failed"*) say "no GPU: $gpu_problem" ;; esac
backend=${TORCH_BACKEND:-}
if [ -z "$backend" ]; then
    backend=pypi
    if [ "$(uname -s)" = Linux ]; then
        backend=cpu
        [ "$gpus" = 0 ] || backend=auto
    fi
fi
torch_is_right() { # the version; not a CPU build if there is a GPU; and the build that the user names
    .venv/bin/python - "$TORCH_VERSION" "$backend" "${TORCH_BACKEND:-}" "$gpus" << 'PYTHON' 2>/dev/null
import sys, torch
from importlib.metadata import version
wanted, backend, named, gpus = sys.argv[1:]
release, _, build = version("torch").partition("+") # torch.__version__ has a build on PyPI, too
if backend == "auto":
    right = torch.version.cuda or gpus == "0"
else: # builds for macOS have no name
    right = not named or sys.platform == "darwin" or (build or "pypi") == backend
sys.exit(release != wanted or not right)
PYTHON
}
on_index() { # whether PyTorch's index answers and has this build; the download then has no limit
    UV_HTTP_TIMEOUT=15 UV_HTTP_RETRIES=1 uv pip install --dry-run --torch-backend="$backend" \
        "torch==$TORCH_VERSION" > .venv/torch.log 2>&1
}
install_torch() {
    local options=("torch==$TORCH_VERSION")
    if [ "$backend" != pypi ] && ! on_index; then
        if grep -q "No solution found" .venv/torch.log; then
            die "PyTorch's index has no torch $TORCH_VERSION for '$backend' on this machine" \
                "($(nvidia_driver)): update the driver, or TORCH_BACKEND=cpu bash dev/setup.sh" \
                "(.venv/torch.log has the details)"
        fi
        say "PyTorch's index does not answer: taking the ordinary build from PyPI"
        backend=pypi
    fi
    [ "$backend" = pypi ] || options+=(--torch-backend="$backend")
    if [ "$backend" = cpu ] || [ "$(uname -s)" != Linux ]; then need_room 3; else need_room 6; fi
    say "installing torch $TORCH_VERSION (the largest download)"
    uv pip uninstall --quiet torch 2>/dev/null || true # else uv keeps another build of the version
    uv pip install "${options[@]}" ||
        die "torch could not be installed: check the network and the disk, then run this again" \
            "(TORCH_BACKEND=pypi takes the ordinary build, UV_DEFAULT_INDEX names a mirror)"
}
torch_is_right || install_torch
if [ "$gpus" != 0 ] && [ "$backend" = auto ] && # uv's choice for an old driver
    .venv/bin/python -c 'import sys, importlib.metadata as m; sys.exit(not m.version("torch").endswith("+cpu"))'; then
    die "PyTorch's index has torch $TORCH_VERSION for this machine's $(nvidia_driver) only as a CPU build:" \
        "update the driver, or TORCH_BACKEND=cpu bash dev/setup.sh"
fi

# --- everything else at the versions and hashes of the lock ---------------------------------------
install() { uv pip install --quiet --no-sources --constraint requirements.lock "$@"; }
say "installing the pinned dependencies"
install -r pyproject.toml --extra hf ${dev:+--extra dev --extra examples} ||
    die "the dependencies could not be installed: check the network" \
        "(UV_DEFAULT_INDEX names a mirror), then run this again"
install --no-deps --editable . || die "the project itself could not be installed"

# --- our crates, if cargo can build them: else the tokenizer's PyPI namesake, and torch's own way of decoding
build_crate() { # build_crate NAME: its log is .venv/NAME.log
    local problem
    problem=$(cargo_problem)
    if [ -n "$problem" ]; then
        echo "$problem" > ".venv/$1.log"
        return 1
    fi
    { install -r pyproject.toml --extra rust && (cd "$1" && ../.venv/bin/maturin develop --release --locked --uv); } > ".venv/$1.log" 2>&1
}
not_built() { say "$1 could not be built ($(tail -n 1 ".venv/$2.log"); all of it in .venv/$2.log)"; }
say "building the Rust tokenizer"
if ! build_crate rustbpe; then
    not_built "the Rust tokenizer" rustbpe
    say "the package rustbpe from PyPI and tiktoken take its place: everything works, slower"
    install -r pyproject.toml --extra norust || die "the PyPI package rustbpe could not be installed either"
fi
say "building the decoding step"
if ! build_crate ruststep; then
    not_built "the decoding step" ruststep
    say "torch takes its place: a chat on a CPU works, slower"
fi

# --- does the environment really work? ------------------------------------------------------------
.venv/bin/python - "$TORCH_VERSION" <<'PYTHON' || die "the environment is broken: remove .venv${PYTHONPATH:+, unset PYTHONPATH ($PYTHONPATH)} and run this again"
import importlib, sys
for name in "torch numpy tyro rich filelock pyarrow huggingface_hub datasets tiktoken fastapi uvicorn pydantic nh3 rustbpe zangchat".split():
    importlib.import_module(name)
import torch
version = torch.__version__.split("+")[0]
assert version == sys.argv[1], f"torch is {version}, wanted {sys.argv[1]}"
PYTHON

built=cpu
[ "$gpus" = 0 ] || built=gpu
printf '%s\n%s\n%s\nbackend %s\n' "$(fingerprint)" "$kind" "$built" "${TORCH_BACKEND:-}" > "$stamp"
say "ready: source .venv/bin/activate"
