#!/bin/sh
# Run the compiled kernel's tests under AddressSanitizer and UndefinedBehaviorSanitizer; needs g++ and its sanitizers.
# Usage: PYTHON=python tests/sanitize.sh [pytest arguments]
set -e
cd "$(dirname "$0")/.."
library() { "${CXX:-g++}" -print-file-name="$1"; }
export STRUCTATTN_CXXFLAGS="-fsanitize=address,undefined -fno-sanitize-recover=undefined -fno-omit-frame-pointer -g1"
export ASAN_OPTIONS=detect_leaks=0  # the interpreter does not free all its memory
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-2}"
# The interpreter is built without the sanitizers, so they are loaded before it starts.
exec env LD_PRELOAD="$(library libasan.so):$(library libubsan.so):$(library libstdc++.so.6)" \
  "${PYTHON:-python}" -m pytest tests/ops/test_attention.py tests/ops/test_decode.py -k "cpu" -p no:cacheprovider "$@"
