"""The report: its figures, tables, sentences and HTML."""
