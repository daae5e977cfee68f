#!/usr/bin/env bash
# Sets everything up and runs the tests: Rust, lint, types, Python, end to end.
#
#   bash dev/test.sh            every change must pass these (minutes)
#   bash dev/test.sh --full     also the long ones (marked slow)
#   bash dev/test.sh -k muon    any other argument goes to pytest, and only pytest runs
set -euo pipefail
unset CDPATH PYTHONHOME CONDA_PREFIX PYTHONDONTWRITEBYTECODE # as dev/setup.sh
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash dev/setup.sh --dev
export PATH="$PWD/.venv/bin:$PATH" VIRTUAL_ENV="$PWD/.venv" PYTHONUNBUFFERED=1 WANDB_MODE=offline

case "${1:-}" in
    "") markers="not slow and not gpu" ;;
    --full) markers=""; shift ;;
    *) exec python -m pytest "$@" ;;
esac
say() { printf '\n\033[1m[test]\033[0m %s\n' "$*"; }

# shellcheck source=dev/machine.sh
source dev/machine.sh
problem=$(cargo_problem)
if [ -z "$problem" ]; then
    say "Rust: tests, clippy, formatting"
    # both crates at once
    printf '%s\n' rustbpe ruststep | xargs -P 2 -I CRATE bash -ec 'cd CRATE
        cargo test --release --quiet --locked
        cargo clippy --release --quiet --locked --all-targets -- -D warnings
        cargo fmt --check'
else
    say "Rust: the crates' own tests are skipped: $problem"
fi
say "lint, types, layers"
ruff check .
ruff format --check .
mypy
lint-imports
say "Python"
# one worker per core, whole files per worker (the tests of a file may build on each other), the long ones of tests/e2e early
python -m pytest -m "$markers" --durations=15 --numprocesses=auto --maxprocesses=4 --dist=loadfile --no-loadscope-reorder "$@"
