"""Who is in, and how bytes move: the contract (`base`) and its implementations."""
