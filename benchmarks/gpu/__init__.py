"""Check and measure the GPU kernels on a card: `python -m benchmarks.gpu PART …`."""
