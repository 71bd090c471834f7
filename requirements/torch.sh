#!/bin/sh
# For the Dockerfiles of trainer, merger and inference: puts torch into $VIRTUAL_ENV and says which build it took.
# Usage: requirements/torch.sh FLAVOUR CPU_WHEELS [uv's options...], from the folder above requirements/.
#
# FLAVOUR gpu: the build on PyPI, with CUDA's libraries.
# FLAVOUR cpu: the CPU-only build that CPU_WHEELS holds (a folder, or the page that lists such wheels); where it does not
#   hold the pinned one this fails. Without CPU_WHEELS: that of UV_FIND_LINKS if there is one, else PyPI's with CUDA.
set -eu
flavour=$1 cpu_wheels=$2
shift 2

install() {
  file=$1
  shift
  uv pip install --no-cache --no-deps --require-hashes "$@" -r "requirements/$file"
}

if [ "$flavour" = gpu ]; then
  UV_FIND_LINKS='' install torch.txt "$@"
  took='the build on PyPI, with CUDA'
elif [ -n "$cpu_wheels" ]; then
  UV_FIND_LINKS=$cpu_wheels install torch-cpu.txt "$@" || {
    echo "CPU_WHEELS=$cpu_wheels does not hold the torch that requirements/torch-cpu.txt pins. Name another place, or none." >&2
    exit 1
  }
  took='the CPU-only build'
elif [ -n "${UV_FIND_LINKS:-}" ] && install torch-cpu.txt "$@"; then
  took='the CPU-only build'
else
  UV_FIND_LINKS='' install torch.txt "$@"
  took='the build on PyPI, WITH CUDA, though the flavour is cpu'
  echo 'WARNING: CPU_WHEELS names no place of CPU-only wheels, so this image carries gigabytes of CUDA libraries that a CPU' >&2
  echo 'does not use. It works all the same. docs/deploy-compose.md, "The CPU build of torch", says how to leave them out.' >&2
fi
echo "torch: $took"
