"""Repairing a converted network from a few unlabelled images."""
