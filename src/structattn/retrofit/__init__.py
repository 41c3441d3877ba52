"""Give a trained model MLR attention, and measure what it loses."""
