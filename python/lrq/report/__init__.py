"""What error remains, from the files themselves."""
