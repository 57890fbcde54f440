"""Batching: many requests at a time, each run as it would be alone, their passes made together."""
