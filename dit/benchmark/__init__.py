"""How fast training, data and sampling are: what `dit benchmark` measures."""
