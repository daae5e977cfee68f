# shellcheck shell=bash disable=SC2034  # the variables are for the scripts that source it
# Functions that examine the machine, sourced by setup.sh, speedrun.sh, rungpu.sh and test.sh.
# Bash 3.2 and the tools of macOS are enough.

# at_least MAJOR.MINOR TEXT: whether the first version in TEXT ("cargo 1.84.0") is that or newer.
at_least() {
    local found
    found=$(printf '%s\n' "$2" | sed -n '1s/^[^0-9]*\([0-9][0-9]*\)\.\([0-9][0-9]*\).*/\1 \2/p')
    [ -n "$found" ] || return 1
    [ "${found% *}" -gt "${1%%.*}" ] ||
        { [ "${found% *}" -eq "${1%%.*}" ] && [ "${found#* }" -ge "${1#*.}" ]; }
}

# free_gb FOLDER: free space on the disk of a folder, which need not exist yet.
free_gb() {
    local folder=$1
    until [ -e "$folder" ]; do folder=$(dirname "$folder"); done
    df -Pk "$folder" | sed -n '2s/.* \([0-9][0-9]*\)  *[0-9][0-9]*% .*/\1/p' |
        awk '{ printf "%d", $1 * 1024 / 1e9 }'
}

# cargo_problem: the reason if cargo cannot build the crate, else nothing. Run it in the top folder.
cargo_problem() {
    local needed version
    needed=$(sed -n 's/^rust-version = "\([0-9.]*\)".*/\1/p' rustbpe/Cargo.toml)
    if ! command -v cargo > /dev/null; then
        echo "no cargo on the PATH"
    elif ! version=$(cargo --version 2>&1); then
        echo "cargo does not run: ${version%%$'\n'*}"
    elif ! at_least "$needed" "$version"; then
        echo "$version is older than $needed, which the crate needs:" \
            "run \`rustup update\`, or install Rust from https://rustup.rs"
    fi
}

# find_gpus: sets gpus, the number of GPUs that CUDA_VISIBLE_DEVICES and MIG let a program use
# (equal to torch.cuda.device_count()), and
#   gpu_problem  the reason if it is 0
#   gpu_first    the first of them, as nvidia-smi -i takes it
#   gpu_mig      its memory in GB if it is a MIG instance
find_gpus() {
    local listing counted
    gpus=0 gpu_problem="" gpu_first="" gpu_mig=""
    if ! command -v nvidia-smi > /dev/null; then
        gpu_problem="nvidia-smi is not installed"
        return
    fi
    if ! listing=$(nvidia-smi -L 2>&1); then
        gpu_problem="nvidia-smi failed: $(printf '%s' "$listing" | tr '\n' ' ')"
        return
    fi
    counted=$(printf '%s\n' "$listing" | awk -v limited="${CUDA_VISIBLE_DEVICES+yes}" \
        -v visible="${CUDA_VISIBLE_DEVICES:-}" "$GPU_COUNT")
    read -r gpus gpu_first gpu_mig <<< "$counted" || true
    if [ "$gpus" = 0 ]; then
        gpu_problem="nvidia-smi lists none"
        case $listing in
            *"GPU "[0-9]*:*)
                gpu_problem="CUDA_VISIBLE_DEVICES=${CUDA_VISIBLE_DEVICES:-} hides them"
                ;;
        esac
    fi
}

# The lines of `nvidia-smi -L` -> "number, first GPU, its MIG memory". CUDA reads CUDA_VISIBLE_DEVICES
# up to the first entry that is not a device, and treats a list with repetitions as empty. A process
# sees one MIG instance, however many there are.
# shellcheck disable=SC2016
GPU_COUNT='
BEGIN { n = m = count = 0 }
function uuid(line) { sub(/.*UUID: /, "", line); sub(/\).*/, "", line); return line }
/^GPU [0-9]+:/ { ids[n++] = uuid($0) }
/^ +MIG / {
    mig[m] = uuid($0)
    size[m] = match($2, /[0-9]+gb/) ? substr($2, RSTART, RLENGTH - 2) : "" # of 1c.2g.24gb+me.all
    parent[m++] = n - 1
}
function find(entry, i, found) {  # the index of a GPU or, for MIG-..., of an instance; -1: none
    if (kind == "number") return entry ~ /^\+?[0-9]/ && entry + 0 < n ? entry + 0 : -1
    if (substr(entry, 1, 4) != kind) return -1
    found = -1
    for (i = 0; i < (kind == "MIG-" ? m : n); i++)
        if (index(kind == "MIG-" ? mig[i] : ids[i], entry) == 1) {
            if (found >= 0) return -1
            found = i
        }
    return found
}
END {
    if (!limited) for (i = 0; i < n; i++) used[count++] = i
    kind = visible ~ /^(GPU|MIG)-/ ? substr(visible, 1, 4) : "number"
    entries = split(visible, list, ",")
    for (e = 1; e <= entries; e++) {
        gsub(/^ +| +$/, "", list[e])
        if ((i = find(list[e])) < 0) break
        if (i in seen) { count = 0; break }
        seen[i] = 1
        used[count++] = i
    }
    instance = -1
    if (count && kind == "MIG-") instance = used[0]
    else for (j = m - 1; j >= 0; j--)
        for (k = 0; k < count; k++) if (parent[j] == used[k]) instance = j
    if (instance >= 0) print 1, parent[instance], size[instance]
    else print count, count ? used[0] : ""
}'

# nvidia_driver: "driver 550.54.14" or "no NVIDIA driver".
nvidia_driver() {
    local version
    version=$(nvidia-smi --query-gpu=driver_version --format=csv,noheader 2> /dev/null |
        sed -n 1p) || version=""
    echo "${version:+driver }${version:-no NVIDIA driver}"
}
