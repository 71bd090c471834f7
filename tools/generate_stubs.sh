#!/usr/bin/env bash
# Generates the Python stubs of the public contract into packages/api/src (or the folder given).
# `make proto` writes them; `make check-proto` compares a fresh run with what is committed.
set -euo pipefail
cd "$(dirname "$0")/.."
out=${1:-packages/api/src}
mkdir -p "$out"
# buf.validate has no Python distribution of its own for google-protobuf, so its module is generated here too.
python -m grpc_tools.protoc -I proto -I third_party/proto \
  --python_out="$out" --pyi_out="$out" buf/validate/validate.proto
mapfile -t protos < <(cd proto && find loraline -name '*.proto' | sort)
python -m grpc_tools.protoc -I proto -I third_party/proto \
  --python_out="$out" --mypy_out="$out" --grpc_python_out="$out" --mypy_grpc_out="$out" "${protos[@]}"
# google.rpc comes from googleapis-common-protos; nothing of it is generated here.
find "$out" -name '__pycache__' -prune -exec rm -rf {} +
