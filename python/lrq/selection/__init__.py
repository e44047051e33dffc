"""Which layers are quantized, in which format, and why: presets, the user's rules and heuristics."""
