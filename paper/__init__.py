"""The figures of arXiv 2509.07963 as studies: each runs, resumes, draws, and says what it found beside the paper."""
