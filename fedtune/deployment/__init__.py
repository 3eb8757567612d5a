"""Coordinator and sites of a federation over a network."""
