"""How layers rest: safetensors files read by part and written header first."""
