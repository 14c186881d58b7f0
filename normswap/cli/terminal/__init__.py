"""What is shown, and how errors are told."""
