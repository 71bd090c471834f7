"""What is found wrong with a dataset, with row numbers and remedies."""
