# Sourced by every finding. `finding PACKAGE==VERSION ...` reads a Python program from standard input, runs it where
# these packages are installed and nothing of this project is, and prints what it printed.
set -euo pipefail

finding() {
    local folder python
    folder="$(mktemp -d)"
    # The folder is read now: the variable is gone when the shell ends.
    # shellcheck disable=SC2064
    trap "rm -rf '$folder'" EXIT
    cat > "$folder/program.py"
    python="${PYTHON:-}"
    if [ -z "$python" ]; then
        python3 -m venv "$folder/venv"
        python="$folder/venv/bin/python"
        "$python" -m pip install -q "$@" >&2
    fi
    (cd "$folder" && "$python" - "$@" <<'CHECK'
import importlib.metadata
import sys

for wanted in sys.argv[1:]:
    name, _, version = wanted.partition("==")
    found = importlib.metadata.version(name).partition("+")[0]
    if found != version:
        sys.exit(f"{name} {version} is expected, {found} is installed")
CHECK
    )
    (cd "$folder" && HF_HUB_OFFLINE=1 TRANSFORMERS_VERBOSITY=error "$python" -W ignore program.py)
}

# `seen TEXT` compares standard input with what was seen.
seen() {
    diff <(printf '%s\n' "$1") - && echo "as described"
}
