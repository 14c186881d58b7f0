"""Norms, numbers of groups and batch sizes under equal conditions: `compare`."""
