#!/usr/bin/env bash
# Makes a virtual environment, installs sageLLM into it and says what to do next.
set -euo pipefail

usage() {
  cat <<'TEXT'
Usage: ./quickstart.sh [--standard | --dev] [--venv DIR] [--help]

  --standard   install what answering and serving need (the default)
  --dev        install in place, with test tools, linters and type checker
  --venv DIR   where the virtual environment goes (default: .venv)
  --help       this text

PYTHON names the interpreter to use (default: python3; 3.10 or later).
TEXT
}

fail() { echo "quickstart: $*" >&2; exit 1; }

mode=standard
venv=.venv
while [ $# -gt 0 ]; do
  case "$1" in
    --standard) mode=standard ;;
    --dev) mode=dev ;;
    --venv) [ $# -ge 2 ] || fail "--venv needs a folder"; venv=$2; shift ;;
    --help | -h) usage; exit 0 ;;
    *) usage >&2; fail "unknown option $1" ;;
  esac
  shift
done

cd "$(dirname "${BASH_SOURCE[0]}")"
python=${PYTHON:-python3}
command -v "$python" >/dev/null || fail "no $python found; install Python 3.10 or later, or set PYTHON"
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' \
  || fail "$("$python" --version) is too old; install Python 3.10 or later, or set PYTHON"
[ -d "$venv" ] || "$python" -m venv "$venv" || fail "cannot make a virtual environment; on Debian install python3-venv"
command -v c++ >/dev/null || echo "No C++ compiler found: the native CPU kernels are left out, torch computes instead."

echo "Installing into $venv ($mode); torch alone is some 200 MB, this takes a few minutes."
if [ "$mode" = dev ]; then
  "$venv/bin/pip" install --quiet --editable ".[dev]"
else
  "$venv/bin/pip" install --quiet .
fi

cat <<TEXT

Done. Next:
  . $venv/bin/activate
  sage-llm run -p "What is LLM inference?"
  sage-llm chat
  sage-llm serve
TEXT
if [ "$mode" = dev ]; then
  cat <<'TEXT'
and, before a change is offered:
  make check test
TEXT
fi
