"""What the train command is made of: set-up, scoring, guards, evaluation, progress."""
