"""Training: a base model and a task in, an adapter folder and its record out."""
