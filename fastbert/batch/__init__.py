"""How a batch lies: checked and packed on the way in, unpacked on the way out. Tensors only, no modules."""
