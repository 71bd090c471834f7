"""What is wrong with a model folder, told from its files and the headers of its weights; no torch."""
