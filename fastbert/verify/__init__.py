"""Is fastbert right: `compare` measures it against Hugging Face and float64, `report` holds what was found."""
