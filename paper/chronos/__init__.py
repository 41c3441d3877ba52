"""Train Chronos-T5 from scratch on synthetic series: one model per attention, equal tokens."""
