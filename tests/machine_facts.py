"""Facts of a made-up machine, as benchmarks record them."""

FACTS = {
    "cpu": "a processor",
    "held_to": "native",
    "instructions": ["avx2"],
    "threads": 1,
    "pinning": "{0}",
    "load_average_before": [0.0, 0.0, 0.0],
    "torch": "2",
    "commit": "0" * 40,
    "time": "now",
}
