"""Carrying out a plan: checks, transfer, proof, record, and the way back."""
