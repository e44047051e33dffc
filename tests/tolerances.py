"""Where two implementations may differ, by how much, and why. Everything not named here is compared bit for bit."""

HADAMARD_AGAINST_MATMUL = 1e-6
"""|difference| / amax(x): the butterfly adds in another order than the matrix product of comfy-kitchen."""

KITCHEN_BFLOAT16_INT8 = 0.2
"""Share of INT8 bytes that may differ for bfloat16 input: comfy-kitchen divides in bfloat16."""

KITCHEN_FP8_RECIPROCAL = 0.02
"""Share of FP8 bytes that may differ: comfy-kitchen multiplies by 1/scale, which rounds twice."""

TRITON_SUMS = 1e-5
"""Relative difference of ``rounding_step``'s partial sums: Triton adds 2048 squares in an order of its own."""

SEARCH_OBJECTIVE = 1e-5
"""Relative excess of a chosen scale's objective over the float64 minimum: candidates this close tie in float32."""
