"""The contracts of all operations: shapes, units, errors and source; each checks its arguments and allocates its outputs."""
