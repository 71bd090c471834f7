"""The toy base model's texts and tokenizer: a real architecture to train on where no hub can be reached."""
