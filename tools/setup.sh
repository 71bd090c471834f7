#!/usr/bin/env bash
# Makes .venv with everything that Loraline needs on a CPU, from hash-pinned requirements. Safe to repeat: does nothing
# when the requirements have not changed. Usage: tools/setup.sh [run|dev]   (dev adds the tools that check the project)
set -euo pipefail
cd "$(dirname "$0")/.."
want=${1:-run}
venv=${LORALINE_VENV:-.venv}
python=${PYTHON:-python3}
say() { printf '==> %s\n' "$*"; }

"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
  echo "Loraline needs Python 3.11 or newer; $python is $("$python" -V 2>&1). Set PYTHON=python3.12, for example." >&2
  exit 1
}
inputs=(requirements/all.txt requirements/torch.txt requirements/torch-cpu.txt requirements/build.txt tools/setup.sh
  packages/*/pyproject.toml services/*/pyproject.toml)
[[ $want == dev ]] && inputs+=(requirements/dev.txt)
stamp=$venv/.loraline-$want
digest=$(cat "${inputs[@]}" | cksum)
if [[ -f $stamp && $(cat "$stamp") == "$digest" ]]; then exit 0; fi

[[ -x $venv/bin/python ]] || { say "making $venv"; "$python" -m venv "$venv"; }
[[ -x $venv/bin/uv ]] || "$venv/bin/python" -m pip --version >/dev/null 2>&1 || "$venv/bin/python" -m ensurepip --upgrade >/dev/null
[[ -x $venv/bin/uv ]] || "$venv/bin/python" -m pip install --quiet --disable-pip-version-check --require-hashes -r requirements/build.txt
export VIRTUAL_ENV=$PWD/$venv
[[ $venv == /* ]] && export VIRTUAL_ENV=$venv
# As pip does: the certificates of the machine, for networks whose proxy has its own.
export UV_SYSTEM_CERTS=${UV_SYSTEM_CERTS:-1}
[[ -n ${PIP_FIND_LINKS:-} ]] && export UV_FIND_LINKS=${UV_FIND_LINKS:-$PIP_FIND_LINKS}
uv() { "$venv/bin/uv" pip install --quiet --require-hashes --no-deps "$@"; }

if ! "$venv/bin/python" -c 'import importlib.metadata as m; assert m.version("torch").startswith("2.13.0")' 2>/dev/null; then
  if [[ -n ${UV_FIND_LINKS:-} ]] && uv -r requirements/torch-cpu.txt 2>/dev/null; then
    say "torch: the CPU-only build from the wheel folder"
  else
    say "torch: the build on PyPI (on Linux with CUDA libraries: about 3 GB, once)"
    (unset UV_FIND_LINKS; uv -r requirements/torch.txt)
  fi
fi
say "installing the pinned packages (a minute or two the first time)"
uv -r requirements/all.txt
[[ $want == dev ]] && uv -r requirements/dev.txt
"$venv/bin/uv" pip install --quiet --no-deps --build-constraints requirements/build.txt -e packages/api -e packages/core -e packages/client -e packages/allinone \
  -e services/datagen -e services/trainer -e services/merger -e services/inference
echo "$digest" >"$stamp"
say "ready: $venv"
