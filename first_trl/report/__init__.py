"""The report of a run: `writing` writes it, `figures` draws it, `verdict` puts it into words."""
