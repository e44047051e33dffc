"""The contracts of all operations: shapes, units, errors, source; each checks its arguments and allocates outputs."""
