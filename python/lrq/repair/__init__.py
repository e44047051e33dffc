"""Absorbing what the rounding leaves."""
