"""What is known of a model: which of its tensors are weights to quantize, as data."""
