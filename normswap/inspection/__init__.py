"""What is in a network: every norm, every suspect, the role of each part."""
