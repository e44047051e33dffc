"""What is known of the inputs of layers: measured, kept in a file, and used."""
