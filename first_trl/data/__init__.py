"""From the rows of a dataset to tokens: start at `encoding`."""
