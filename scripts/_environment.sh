# Sourced by quickstart and test: one virtual environment in .venv, installed once per set of extras.
# Sets `root` (the checkout) and `python` (the environment's interpreter).

root="$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)"
venv="$root/.venv"
python="$venv/bin/python"

# A Python that the pinned versions are tested with, and that can make environments.
is_usable_python() {
    "$1" -c 'import ensurepip, sys, venv; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 13))' >/dev/null 2>&1
}

find_python() {
    local candidate
    for candidate in "${PYTHON:-python3}" python3.12 python3.11; do
        if is_usable_python "$candidate"; then
            printf '%s\n' "$candidate"
            return
        fi
    done
    cat >&2 <<MESSAGE
error: no usable Python: 3.11 or 3.12 with the modules venv and ensurepip is needed.
       Found: $(python3 --version 2>/dev/null || echo "no python3").
       Install one (Debian, Ubuntu: with its -venv package, as python3.12-venv), or name one: PYTHON=/path/to/python3.12 $0
MESSAGE
    return 1
}

show_log_and_fail() {
    printf ' failed.\n' >&2
    cat "$log" >&2
    printf 'error: the installation failed; the lines above are also in %s\n' "$log" >&2
    return 1
}

# ensure_environment EXTRAS: make .venv and install the checkout with these extras, unless that was done before.
ensure_environment() {
    local extras="$1" base fingerprint stamp log="$venv/install.log"

    # An environment without a working pip was interrupted while it was made: making it again completes it.
    if ! "$python" -m pip --version >/dev/null 2>&1; then
        base="$(find_python)" || return 1
        mkdir -p "$venv"
        printf 'Making %s with %s ...' "$venv" "$("$base" --version)" >&2
        "$base" -m venv "$venv" >"$log" 2>&1 || show_log_and_fail || return 1
        printf ' done.\n' >&2
    elif ! is_usable_python "$python"; then
        printf 'error: %s holds %s, and 3.11 or 3.12 is needed: remove that folder and run this again.\n' \
            "$venv" "$("$python" --version)" >&2
        return 1
    fi

    # The checkout's place counts too: an editable install points at it.
    fingerprint="$({ cat "$root/pyproject.toml" "$root/constraints.txt" && printf '%s\n' "$root" "$extras"; } |
        "$python" -c 'import hashlib, sys; print(hashlib.sha256(sys.stdin.buffer.read()).hexdigest()[:16])')"
    stamp="$venv/installed-$fingerprint"
    if [[ -e "$stamp" ]]; then
        return
    fi
    printf 'Installing qat[%s] and its dependencies (some minutes the first time; log: %s) ...' "$extras" "$log" >&2
    "$python" -m pip install --disable-pip-version-check --no-input --progress-bar off \
        --constraint "$root/constraints.txt" --editable "$root[$extras]" >"$log" 2>&1 || show_log_and_fail || return 1
    touch "$stamp"
    printf ' done.\n' >&2
}
