"""LoRA adapters as pairs of factors, and exact low-rank sums of them."""
