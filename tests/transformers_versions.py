"""Methods of transformers' models whose names changed between versions."""


def checkpoint_activations(model, *settings):
    """Recompute activations in backward; the method's name before transformers 5.23 has `gradient` in it."""
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable(*settings)
