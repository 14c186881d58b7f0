"""How far two networks are from each other."""
