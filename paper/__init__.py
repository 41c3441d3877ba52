"""The figures of arXiv 2509.07963 as studies: `python -m paper width`, in a checkout."""
