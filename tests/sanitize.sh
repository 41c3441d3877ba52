#!/bin/sh
# Runs the compiled kernel's tests under AddressSanitizer and UndefinedBehaviorSanitizer; g++ and its sanitizers needed.
# Usage: tests/sanitize.sh [pytest arguments], with the interpreter to use as PYTHON.
set -e
cd "$(dirname "$0")/.."
library() { "${CXX:-g++}" -print-file-name="$1"; }
export STRUCTATTN_CXXFLAGS="-fsanitize=address,undefined -fno-sanitize-recover=undefined -fno-omit-frame-pointer -g1"
export ASAN_OPTIONS=detect_leaks=0  # the interpreter itself never frees all it takes
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-2}"
# The interpreter is not built with the sanitizers: they have to be there before it starts.
exec env LD_PRELOAD="$(library libasan.so):$(library libubsan.so):$(library libstdc++.so.6)" \
  "${PYTHON:-python}" -m pytest tests/ops/test_attention.py tests/ops/test_decode.py -k "cpu" -p no:cacheprovider "$@"
