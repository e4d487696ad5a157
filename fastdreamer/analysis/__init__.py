"""What is made of finished runs: figures, the report, and the comparison of methods."""
