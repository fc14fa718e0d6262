# Sourced, from any folder: makes or reuses .venv at the top of the repository and sets PYTHON.
#
#   source examples/environment.sh
#   "$PYTHON" -m pytest
#
# PYTHON=... chooses the interpreter that .venv is made from, VENV=... another folder for it,
# MEGATRON=... another Megatron-Core version (0.19.2). A finished environment leaves a stamp, made of
# what it was installed from, so that later calls return at once. Nothing is installed outside it.

_environment_fail() {
  echo "environment: $*" >&2
  return 1
}

# Usable means: starts (a pyenv shim may not), is 3.12 or newer, and can make virtual environments.
_environment_usable() {
  "$1" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 12))' >/dev/null 2>&1
}

# Versions that Megatron-Core has wheels for come first; a newer Python would have to compile it.
_environment_find_python() {
  local candidate
  if [ -n "${PYTHON:-}" ]; then
    _environment_usable "$PYTHON" && echo "$PYTHON"
    return
  fi
  for candidate in python3.12 python3.13 \
    "${PYENV_ROOT:-$HOME/.pyenv}"/versions/3.12*/bin/python \
    "${PYENV_ROOT:-$HOME/.pyenv}"/versions/3.13*/bin/python \
    "$HOME"/.local/share/uv/python/cpython-3.1[23]*/bin/python3 \
    "${CONDA_PREFIX:-/nonexistent}/bin/python" \
    python3 python python3.14; do
    if _environment_usable "$candidate"; then
      echo "$candidate"
      return
    fi
  done
}

_environment_stamp() {
  cat "$1/setup.py" "$1/pyproject.toml" "$1/examples/environment.sh" | cksum
  echo "$1 megatron-core==${MEGATRON:-0.19.2}"
}

_environment_install() {
  local root=$1 venv=$2 base started=$SECONDS log=$2/install.log
  if [ ! -x "$venv/bin/python" ] || ! _environment_usable "$venv/bin/python"; then
    base=$(_environment_find_python)
    if [ -z "$base" ]; then
      _environment_fail "no Python 3.12 or newer with the venv module was found${PYTHON:+ at $PYTHON};" \
        "install one (Debian: python3.12 and python3.12-venv) or name one with PYTHON=/path/to/python"
      return
    fi
    if [ -e "$venv" ] && [ ! -e "$venv/pyvenv.cfg" ]; then
      _environment_fail "$venv exists and is no virtual environment; name another folder with VENV"
      return
    fi
    echo "environment: making $venv with $("$base" -V) ($base)"
    "$base" -m venv --clear "$venv" || return
  fi
  echo "environment: installing this package and Megatron-Core (a few minutes; log: $log)"
  if ! "$venv/bin/python" -m pip install --disable-pip-version-check \
    -e "$root[dev]" "megatron-core[training]==${MEGATRON:-0.19.2}" >"$log" 2>&1; then
    tail -n 15 "$log" >&2
    _environment_fail "pip failed; the whole log is in $log"
    return
  fi
  _environment_stamp "$root" >"$venv/installed"
  echo "environment: ready after $((SECONDS - started)) s"
}

_environment_main() {
  local root venv
  root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd) || return
  venv=${VENV:-$root/.venv}
  if [ "$(cat "$venv/installed" 2>/dev/null)" != "$(_environment_stamp "$root")" ]; then
    if command -v flock >/dev/null; then
      (
        flock 9
        [ "$(cat "$venv/installed" 2>/dev/null)" = "$(_environment_stamp "$root")" ] ||
          _environment_install "$root" "$venv"
      ) 9<"${BASH_SOURCE[0]}" || return
    else
      _environment_install "$root" "$venv" || return
    fi
  fi
  export PYTHON=$venv/bin/python
}

_environment_main
