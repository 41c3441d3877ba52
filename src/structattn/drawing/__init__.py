"""Drawing: one look for every figure, without a backend or a window."""
