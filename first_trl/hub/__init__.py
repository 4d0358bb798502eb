"""The folder and the card of a student, and their upload: start at `card`."""
