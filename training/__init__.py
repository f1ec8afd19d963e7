"""How models train: the Trainer, its arguments, what is minimised, and what is frozen and runs once."""
