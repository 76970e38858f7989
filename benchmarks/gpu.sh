#!/usr/bin/env bash
# Builds, tests and measures on a machine with an NVIDIA GPU; installs nothing, needs no network.
# Python needs torch >= 2.11 with triton, numpy, pytest, setuptools and ninja; nvcc must be found.
#
#   benchmarks/gpu.sh [build] [test] [ops] [models]     all four stages if none is named
#
# Results go to $OUT (benchmarks/results if not set), in a file named after the GPU: h200.json.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
out=${OUT:-benchmarks/results}

stages=("$@")
if [ ${#stages[@]} -eq 0 ]; then stages=(build test ops models); fi
for stage in "${stages[@]}"; do
  case $stage in
    build | test | ops | models) ;;
    *) echo "gpu.sh: there is no stage '$stage'; there are build, test, ops and models" >&2; exit 2 ;;
  esac
done

if ! gpu=$("$python" -c 'import torch; print(torch.cuda.get_device_name())' 2>/dev/null); then
  echo "gpu.sh: $python finds no PyTorch that sees an NVIDIA GPU" >&2
  exit 1
fi
capability=$("$python" -c 'import torch; print("%d.%d" % torch.cuda.get_device_capability())')
name=$(echo "$gpu" | tr '[:upper:]' '[:lower:]' | sed -E 's/^nvidia //; s/[^a-z0-9]+/-/g')
results=$out/$name.json
mkdir -p "$out"
echo "$gpu, compute capability $capability; results: $results"

measure() {
  "$python" -m benchmarks --device cuda --batch_size 128 --dtype bfloat16 --keep --json "$results" "$@"
}

for stage in "${stages[@]}"; do
  echo "== $stage"
  begin=$SECONDS
  case $stage in
    build)
      TORCH_CUDA_ARCH_LIST=${TORCH_CUDA_ARCH_LIST:-$capability} CONVMAE_REQUIRE_EXT=1 \
        "$python" setup.py --quiet build_ext --inplace
      "$python" -m convmae_kernels
      "$python" -c 'from convmae_kernels.ops.library import why_not_cuda; exit(why_not_cuda())'
      ;;
    test) "$python" -m pytest -q -m gpu tests/test_gpu.py ;;
    ops) measure --case mask gather scatter depthwise --budget 3 ;;
    models) measure --case stages12 step mae memory --compile-models --budget 10 ;;
  esac
  echo "== $stage took $((SECONDS - begin)) s"
done
