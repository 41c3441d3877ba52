"""Run the benchmark: `python -m benchmarks.gpu`."""

from benchmarks.gpu.attention import main

if __name__ == "__main__":
    main()
