#!/usr/bin/env bash
# Writes the hash-pinned requirements of every way to install Loraline into requirements/. `make lock` runs it.
# torch stands apart: torch.txt is what PyPI serves (on Linux with the CUDA libraries), torch-cpu.txt the CPU-only wheel
# for machines that have it in a wheel folder; tools/setup.sh chooses. So no other file names torch, CUDA or triton.
# Pins that are there stay unless they no longer fit; delete a file to have its packages renewed.
# Usage: tools/lock.sh [--check]   (--check changes nothing and fails when a file is not what the pyproject.toml files ask)
set -euo pipefail
cd "$(dirname "$0")/.."
export UV_SYSTEM_CERTS=${UV_SYSTEM_CERTS:-1}
out=requirements
if [[ ${1:-} == --check ]]; then
  out=$(mktemp -d)
  trap 'rm -r "$out"' EXIT
  cp requirements/* "$out"
fi
unset UV_FIND_LINKS PIP_FIND_LINKS # the result must not depend on this machine's wheels
cuda=() # filled after torch.txt

compile() { # OUTPUT REQUIREMENT... [-- MORE OPTIONS OF UV]
  local output=$1; shift
  local input=$out/.$output.in rest=()
  : >"$input"
  while (($#)); do
    if [[ $1 == -- ]]; then shift; rest=("$@"); break; fi
    echo "$1" >>"$input"; shift
  done
  local skip=() name
  for name in "${cuda[@]}" loraline-{api,core,client,allinone,datagen,trainer,merger,inference}; do
    skip+=(--no-emit-package "$name")
  done
  uv pip compile --quiet --universal --python-version 3.11 --generate-hashes --no-header --no-annotate \
    --no-emit-index-url --no-emit-find-links --override requirements/overrides.txt \
    "${skip[@]}" "${rest[@]}" -o "$out/$output" "$input"
  rm "$input"
  [[ $out != requirements ]] || echo "requirements/$output: $(grep -c '==' "requirements/$output") packages"
}

compile torch.txt "torch==2.13.0"
mapfile -t cuda < <(grep -oE '^(nvidia|cuda)[a-z0-9-]*' "$out/torch.txt"; echo torch; echo triton)

api=./packages/api core=./packages/core client=./packages/client
# One environment for everything on a CPU: the demo, the tests, a laptop.
compile all.txt "$api" "$core[s3,postgres,otel,testing]" "$client[otel]" ./packages/allinone "./services/datagen[korean]" \
  "./services/trainer[engine,quantization,reports]" "./services/merger[engine,export,quantization]" "./services/inference[cpu,transformers]"
# The tools, at versions that live with all.txt.
compile dev.txt "-r dev.in" -- -c "$out/all.txt"
# What sets the environments up: the installer, and what builds our own packages.
compile build.txt uv hatchling editables
# One file per image.
compile datagen.txt "$api" "$core[s3,postgres,otel]" "./services/datagen[korean,parquet]"
compile trainer.txt "$api" "$core[s3,postgres,otel]" "./services/trainer[engine,quantization,reports]"
compile merger.txt "$api" "$core[s3,postgres,otel]" "./services/merger[engine,export,quantization]"
compile inference-cpu.txt "$api" "$core[s3,postgres,otel]" "./services/inference[cpu]"
compile client.txt "$api" "$client[otel]"
# On GPUs vLLM brings torch and CUDA itself, so this file names them.
cuda=()
compile inference-gpu.txt "$api" "$core[s3,postgres,otel]" "./services/inference[gpu]"

if [[ $out != requirements ]]; then
  if diff -rq requirements "$out"; then echo "requirements/ is what the pyproject.toml files ask for"; else
    echo "requirements/ is stale; run: make lock" >&2
    exit 1
  fi
fi
