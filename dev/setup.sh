#!/usr/bin/env bash
# Makes this checkout ready to use: .venv, the pinned dependencies, the Rust tokenizer, the project in editable mode.
#
#   bash dev/setup.sh          what runcpu.sh, speedrun.sh and the scripts need
#   bash dev/setup.sh --dev    also what the tests need
#
# Run it as often as you like: it takes a second when nothing has changed. It reaches nothing but package registries.
set -euo pipefail
TORCH_VERSION=2.13.0
PYTHON_VERSION=${PYTHON_VERSION:-3.11} # any from 3.10 on works; used only when .venv does not exist yet

cd "$(dirname "${BASH_SOURCE[0]}")/.."
case "${1:-}" in
    "") dev="" kind=run ;;
    --dev) dev=1 kind=dev ;;
    *) echo "usage: bash dev/setup.sh [--dev]" >&2; exit 2 ;;
esac
say() { printf '\033[1m[setup]\033[0m %s\n' "$*" >&2; }
die() { say "$*"; exit 1; }

# --- has anything changed since the last time? -------------------------------------------------------------------------
fingerprint() {
    cat dev/setup.sh pyproject.toml requirements.lock rustbpe/Cargo.* rustbpe/pyproject.toml rustbpe/src/*.rs 2>/dev/null | cksum
    pwd
    command -v cargo || true
}
stamp=.venv/setup-stamp
wanted="$(fingerprint)"
for done in "$kind" dev; do # what the tests need includes what a run needs
    if [ -x .venv/bin/python ] && [ "$(cat "$stamp" 2>/dev/null)" = "$(printf '%s\n%s' "$wanted" "$done")" ]; then
        exit 0
    fi
done

# --- uv: the one on the PATH, else from PyPI, beside the project where pip may not install into the system ---------------
python=$(command -v "python$PYTHON_VERSION" || command -v python3 || command -v python) || die "no Python found: install Python 3.10 or newer first"
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' || die "$("$python" --version) is too old: install Python 3.10 or newer first"
if ! command -v uv >/dev/null; then
    if [ ! -x .uv/bin/uv ]; then
        say "installing uv beside the project"
        "$python" -m pip install --quiet --upgrade --target .uv uv || die "pip could not install uv: check the network, then run this again"
    fi
    export PATH="$PWD/.uv/bin:$PATH"
fi

[ -x .venv/bin/python ] || uv venv --quiet --python "$python" .venv
export VIRTUAL_ENV="$PWD/.venv"

# --- torch first, in the build that suits the machine ---------------------------------------------------------------------
torch_is_right() { .venv/bin/python -c "import sys, torch; sys.exit(torch.__version__.split('+')[0] != '$TORCH_VERSION')" 2>/dev/null; }
if ! torch_is_right; then
    say "installing torch $TORCH_VERSION (the largest download)"
    installed=
    if [ "$(uname -s)" = Linux ] && ! command -v nvidia-smi >/dev/null; then
        # Without a GPU the CPU build saves gigabytes, where PyTorch's own index can be reached.
        UV_HTTP_TIMEOUT=5 UV_HTTP_RETRIES=0 timeout 300 uv pip install --quiet --torch-backend=cpu "torch==$TORCH_VERSION" 2>/dev/null && installed=1 ||
            say "PyTorch's index of CPU builds did not answer: taking the ordinary build"
    fi
    [ -n "$installed" ] || uv pip install --quiet "torch==$TORCH_VERSION" || die "torch could not be installed: check the network and the disk, then run this again"
fi

# --- everything else at the versions and hashes of the lock -----------------------------------------------------------------
install() { uv pip install --quiet --constraint requirements.lock "$@"; }
say "installing the pinned dependencies"
install -r pyproject.toml --extra hf ${dev:+--extra dev --extra examples} || die "the dependencies could not be installed: check the network, then run this again"
install --no-deps --editable . || die "the project itself could not be installed"

# --- the tokenizer: our crate where cargo can build it, else its PyPI namesake for training and tiktoken for encoding --------
build_crate() {
    command -v cargo >/dev/null || { echo "no cargo on the PATH" > .venv/crate.log; return 1; }
    { install -r pyproject.toml --extra rust && (cd rustbpe && ../.venv/bin/maturin develop --release --locked --uv); } > .venv/crate.log 2>&1
}
say "building the Rust tokenizer"
if ! build_crate; then
    say "the Rust tokenizer could not be built ($(tail -n 1 .venv/crate.log); all of it in .venv/crate.log)"
    say "the package rustbpe from PyPI and tiktoken take its place: everything works, slower"
    install -r pyproject.toml --extra norust || die "the PyPI package rustbpe could not be installed either"
fi

# --- does what we installed really work? ------------------------------------------------------------------------------------
.venv/bin/python - "$TORCH_VERSION" <<'PYTHON' || die "the environment is broken: remove .venv and run this again"
import importlib, sys
for name in "torch numpy tyro rich filelock pyarrow huggingface_hub datasets tiktoken fastapi uvicorn pydantic nh3 rustbpe zangchat".split():
    importlib.import_module(name)
import torch
version = torch.__version__.split("+")[0]
assert version == sys.argv[1], f"torch is {version}, wanted {sys.argv[1]}"
PYTHON

printf '%s\n%s\n' "$wanted" "$kind" > "$stamp"
say "ready: source .venv/bin/activate"
