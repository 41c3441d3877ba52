"""Draw figures in one style, without a backend or a window."""
