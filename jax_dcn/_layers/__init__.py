"""What linen.py and nnx.py share."""
