"""What a recipe will cost before it runs: start at `estimate`."""
