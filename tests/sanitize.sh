#!/bin/sh
# Run the compiled kernel's tests under AddressSanitizer and UndefinedBehaviorSanitizer; needs g++ and its sanitizers.
# Usage: PYTHON=python tests/sanitize.sh [instruction set …] [-- pytest arguments]
# An instruction set is a value of g++'s -march. Without one, all run that the machine has, one after the other.
set -e
cd "$(dirname "$0")/.."
targets=""
while [ $# -gt 0 ] && [ "$1" != -- ]; do targets="$targets $1"; shift; done
[ $# -eq 0 ] || shift
if [ -z "$targets" ] && [ "$(uname -m)" = x86_64 ]; then
  targets=x86-64
  ! grep -q -w avx2 /proc/cpuinfo || targets="$targets haswell"
  ! grep -q -w avx512f /proc/cpuinfo || targets="$targets skylake-avx512"
  targets="$targets native"
fi
library() { "${CXX:-g++}" -print-file-name="$1"; }
sanitizers="-fsanitize=address,undefined -fno-sanitize-recover=undefined -fno-omit-frame-pointer -g1"
export ASAN_OPTIONS=detect_leaks=0  # the interpreter does not free all its memory
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-2}"
export STRUCTATTN_KERNEL=source
for target in ${targets:-native}; do
  echo "instruction set: $target"
  flag="-march=$target"
  [ "$(uname -m)" = x86_64 ] || flag="-mcpu=$target"
  # The interpreter is built without the sanitizers, so they are loaded before it starts.
  env STRUCTATTN_CXXFLAGS="$sanitizers $flag" \
    LD_PRELOAD="$(library libasan.so):$(library libubsan.so):$(library libstdc++.so.6)" "${PYTHON:-python}" \
    -m pytest tests/ops/test_attention.py tests/ops/test_decode.py tests/ops/test_cpu_operators.py \
    -k "cpu and not inductor" -p no:cacheprovider "$@"
done
