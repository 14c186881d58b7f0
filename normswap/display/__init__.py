"""Tables and progress, for terminals and notebooks alike."""
