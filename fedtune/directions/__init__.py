"""Seeded directions of FedKSeed: a generator of integers, three banks, and exact rebuilds of a model from K integers.

A bank has K directions z_k, each as large as the model. A run's whole history is K integers A_k, and every device
computes the same weights w = w0 - u * sum_k A_k z_k, bit for bit: with numpy (`rebuild_numpy`, the reference), with
numba (`rebuild_numba`) or with torch (`rebuild_torch`).
"""
