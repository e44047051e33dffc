"""How layers move: cut into tiles that fit, read, computed where the device is, written; within a bound of memory."""
