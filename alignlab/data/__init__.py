"""What is read for training: prompts, pictures with captions, pairs, labels."""
