#!/usr/bin/env bash
# Renews requirements.lock from pyproject.toml: exact versions and hashes for every Python >= 3.10 and platform.
# It leaves out torch and its own dependencies: dev/setup.sh installs torch first, in the build for the machine.
set -euo pipefail
unset CDPATH
cd "$(dirname "$0")/.."
torch_version=$(sed -n 's/^TORCH_VERSION=//p' dev/setup.sh)
constraint=$(mktemp)
trap 'rm -f "$constraint"' EXIT
echo "torch==$torch_version" > "$constraint"
compile() {
    uv pip compile --quiet --universal --python-version=3.10 --all-extras --no-sources \
        --constraint="$constraint" pyproject.toml "$@"
}
skip=$(compile --no-header --no-annotate | sed -nE 's/^((nvidia|cuda)-[a-z0-9-]+)==.*/--no-emit-package \1/p' | sort -u)
# shellcheck disable=SC2086  # one word per option is meant
compile --generate-hashes --custom-compile-command="bash dev/lock.sh" --no-emit-package torch --no-emit-package triton $skip -o requirements.lock "$@" > /dev/null
