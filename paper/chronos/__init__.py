"""Train Chronos-T5 from scratch on synthetic series, under several attentions."""
