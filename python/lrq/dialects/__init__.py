"""How a loader wants tensors named and marked."""
