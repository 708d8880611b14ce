#!/bin/sh
# Make .venv in the project's root and install requirements.txt into it, or a longer list: sh scripts/setup_env.sh [FILE]
# Nothing is done if that has been done since the lists last changed. pip reads PIP_INDEX_URL and its other variables.
set -eu

fail() {
    printf 'error: %s\n' "$*" >&2
    exit 2
}

CDPATH='' cd -- "$(dirname -- "$0")/.."
list=${1:-requirements.txt}
[ -f "$list" ] || fail "$list: no such file (from $PWD)"
python=.venv/bin/python

if ! "$python" -c '' 2>/dev/null; then
    base=
    for candidate in python3 python python3.13 python3.12 python3.11 python3.10; do
        if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null; then
            base=$candidate
            break
        fi
    done
    [ -n "$base" ] ||
        fail "Python 3.10 or newer is needed; python3 here: $(python3 --version 2>/dev/null || echo not installed)"
    "$base" -c 'import ensurepip, venv' 2>/dev/null ||
        fail "$base lacks its venv module (on Debian and Ubuntu: apt install python3-venv)"
    echo "Making .venv with $("$base" --version)"
    "$base" -m venv .venv
fi
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' ||
    fail ".venv holds $("$python" --version), 3.10 or newer is needed: remove the folder .venv and run this again"

# One stamp for each list: Python's version and the checksum of what was installed. Longer lists include requirements.txt.
stamp() { printf '%s %s' "$("$python" --version)" "$(cksum <"$1")"; }
stamp_file() { printf '.venv/%s.installed' "$(basename "$1")"; }

current=yes
for file in requirements.txt "$list"; do
    [ "$(cat "$(stamp_file "$file")" 2>/dev/null)" = "$(stamp "$file")" ] || current=no
done
if [ $current = no ]; then
    "$python" -m pip --version >/dev/null 2>&1 || "$python" -m ensurepip >/dev/null
    echo "Installing $list into .venv (torch is large: this can take some minutes)"
    quiet=--quiet
    if [ -t 1 ]; then
        quiet= # a person wants to see it move
    fi
    "$python" -m pip install ${quiet:+--quiet} --disable-pip-version-check -r "$list"
    for file in requirements.txt "$list"; do
        stamp "$file" >"$(stamp_file "$file")"
    done
fi
